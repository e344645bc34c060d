"""What the moved scripts make of data: transitions, returns, spaces, and the environment they evaluate in.

Scripts whose plumbing has the same text are tested once.
"""

import io
import json

import gymnasium as gym
import h5py
import harness
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from harness import load_data, steps, write_d4rl, write_minari
from PIL import Image

D4RL_HOPPER = -20.272305, 3234.3  # returns of D4RL's random and expert policy
EMBEDDED = sorted(path.parents[1].relative_to(harness.DATA) for path in harness.DATA.rglob("metadata.json"))


scripts = pytest.mark.parametrize("script", harness.distinct())


def refuses(script, *names):
    return harness.refused(script, "--dataset", *names, "--eval-episodes", 0)


def check(data, episodes, last_obs=True):
    """Data against the plainest loop. Without a last observation the step of a time limit is no transition,
    and nothing reads what follows a true end."""
    rows = []
    lengths = []
    for obs, action, reward, terminated, _ in episodes:
        T = len(reward) - (not last_obs and not terminated[-1])
        for t in range(T):
            rows.append((obs[t], action[t], reward[t], obs[t + 1], terminated[t]))
        lengths.append(T)
    obs, action, reward, next_obs, terminated = map(np.array, zip(*rows))
    assert np.array_equal(data.obs, obs) and np.array_equal(data.reward, reward)
    assert np.array_equal(data.terminated, terminated)
    assert np.allclose(data.action, action, rtol=0, atol=1e-12)
    read = last_obs | ~terminated
    assert np.array_equal(data.next_obs[read], next_obs[read])
    assert data.lengths.tolist() == lengths
    assert np.allclose(data.returns, [sum(map(float, episode[2])) for episode in episodes], rtol=1e-12)


# Ends of episodes, returns ------------------------------------------------------------------------
@scripts
def test_transitions_as_logged(script, tmp_path):
    """In either format; rewards and ends also as (T, 1), actions also as (T,); twelve episodes, because HDF5
    lists episode_10 before episode_2. A step that is dropped still counts in its return."""
    episodes = harness.hopper_episodes(12, 5, action_dim=1)
    check(load_data(script, write_minari(tmp_path / "m", episodes)), episodes)
    columns = [(obs, action, *(x[:, None] for x in rest)) for obs, action, *rest in episodes]
    check(load_data(script, write_minari(tmp_path / "columns", columns)), episodes)
    vectors = [(obs, action[:, 0], *rest) for obs, action, *rest in episodes]
    folder = write_minari(tmp_path / "vectors", vectors, action_space=Box(-1, 1, (1,)))
    check(load_data(script, folder), episodes)
    check(load_data(script, write_d4rl(tmp_path / "hopper.hdf5", episodes)), episodes)
    check(load_data(script, write_d4rl(tmp_path / "hopper-columns.hdf5", episodes, column=True)), episodes)
    short = write_d4rl(tmp_path / "hopper-short.hdf5", episodes, next_observations=False)
    check(load_data(script, short), episodes, last_obs=False)


@scripts
def test_termination_cuts_and_truncation_does_not(script, tmp_path):
    """... nor a time limit in the same step as a true end; no next observation is another episode's."""
    both = steps([1, 1], terminated=True)
    both[4][-1] = True
    episodes = [steps([1, 1, 1], terminated=True), steps([1, 1]), both]
    for path in write_d4rl(tmp_path / "hopper.hdf5", episodes), write_minari(tmp_path / "m", episodes):
        data = load_data(script, path)
        assert data.terminated.tolist() == [0, 0, 1, 0, 0, 0, 1]
        assert data.next_obs[:, 0].tolist() == [1, 2, 3, 1, 2, 1, 2]


@scripts
def test_ends_of_d4rl_episodes(script, tmp_path):
    """A trailing unfinished episode counts, one without transitions does not; without `timeouts` episodes end
    at the step limit, 1,000 steps after the last end, and a task whose limit nobody knows is refused."""
    unfinished = [steps([1, 2]), steps([3, 4, 5]), steps([6])]
    unfinished[-1][4][-1] = False
    data = load_data(script, write_d4rl(tmp_path / "hopper.hdf5", unfinished))
    assert data.returns.tolist() == [3, 12, 6] and data.lengths.tolist() == [2, 3, 1]
    unfinished[1] = *unfinished[1][:3], np.float32([0, np.nan, 0]), unfinished[1][4]  # NaN is no end
    assert load_data(script, write_d4rl(tmp_path / "hopper-nan.hdf5", unfinished)).returns.tolist() == [3, 12, 6]
    unfinished[1] = steps([3, 4, 5])
    data = load_data(script, write_d4rl(tmp_path / "hopper-short.hdf5", unfinished, next_observations=False))
    assert data.returns.tolist() == [3, 12] and data.lengths.tolist() == [1, 2]

    limited = [steps([1.0] * 1000), steps([1.0] * 7, terminated=True), steps([1.0] * 1000), steps([1.0] * 3)]
    without = dict(next_observations=False, timeouts=False)
    data = load_data(script, write_d4rl(tmp_path / "Hopper-medium-v2.hdf5", limited, **without))
    assert data.lengths.tolist() == [999, 7, 999, 2] and data.returns.tolist() == [1000, 7, 1000, 3]
    refuses(script, write_d4rl(tmp_path / "warehouse.hdf5", limited, **without))
    own_limit = write_d4rl(tmp_path / "long.hdf5", [steps([1.0] * 1500)], next_observations=False)
    assert load_data(script, own_limit).lengths.tolist() == [1499]


@scripts
def test_returns_are_summed_in_float64(script, tmp_path):
    """A float32 sum of 20,000 rewards of 0.1 on top of 1e5 is off by hundreds."""
    obs, action, reward, *ends = steps([1e5] + [0.1] * 19_999)
    data = load_data(script, write_minari(tmp_path / "m", [(obs, action, np.float32(reward), *ends)]))
    assert abs(data.returns[0] - 101_999.9) < 0.01


# Spaces -------------------------------------------------------------------------------------------
def own_space(folder):
    return minari.MinariDataset(folder / "data").observation_space


@scripts
def test_dict_observations_are_flattened_in_the_datasets_order(script, tmp_path):
    """Nested, capitals, a matrix, a Discrete as one-hot; the keys in no alphabetical order."""
    inner = Dict([("z", Box(-9, 9, (2,))), ("B", Box(-9, 9, (1,)))])
    parts = [("speed", Box(-9, 9, (2,))), ("body", inner), ("mode", Discrete(3)), ("arm", Box(-9, 9, (2, 3)))]
    space = Dict(parts)
    space.seed(0)
    logged = [space.sample() for _ in range(5)]
    stacked = {key: np.stack([obs[key] for obs in logged]) for key in ("speed", "mode", "arm")}
    stacked["body"] = {key: np.stack([obs["body"][key] for obs in logged]) for key in inner}
    folder = write_minari(tmp_path / "m", [(stacked, *steps([1, 2, 3, 4])[1:])], obs_space=space)
    data = load_data(script, folder)
    flat = np.stack([gym.spaces.flatten(own_space(folder), obs) for obs in logged])
    assert np.array_equal(data.obs, flat[:-1]) and np.array_equal(data.next_obs, flat[1:])
    assert data.obs.shape == (4, 2 + 3 + 3 + 6)


@scripts
@pytest.mark.parametrize("jpeg", [True, False])
def test_images_are_flattened_decoded(script, tmp_path, jpeg):
    colours = np.random.default_rng(0).integers(0, 256, (4, 1, 1, 3), np.uint8)
    seen = np.broadcast_to(colours, (4, 32, 32, 3))
    stored = seen
    if jpeg:
        stored = np.empty(4, h5py.vlen_dtype(np.uint8))
        for i, image in enumerate(seen):
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG", quality=95)
            stored[i] = np.frombuffer(file.getvalue(), np.uint8)
    options = dict(obs_space=Box(0, 255, (32, 32, 3), np.uint8), jpeg_encoding=jpeg)
    data = load_data(script, write_minari(tmp_path / "m", [(stored, *steps([1, 2, 3])[1:])], **options))
    assert np.abs(np.float64(data.obs) - seen[:-1].reshape(3, -1)).max() <= (4 if jpeg else 0)


@scripts
def test_actions_are_scaled_by_the_datasets_own_bounds(script, tmp_path):
    """[0, 100], and in a matrix other bounds for each entry, without an environment; what has no bounds, or
    leaves those of D4RL, is refused."""
    obs, _, *rest = steps([1] * 5)
    part = np.linspace(-1, 1, 5)[:, None]
    high = np.float32([[1, 2], [3, 4]])
    for name, action, space, scaled in (
        ("hundred", 50 * (part + 1), Box(0, 100, (1,)), part),
        ("matrix", part[..., None] * high, Box(-high, high), part.repeat(4, axis=1)),
    ):
        folder = write_minari(tmp_path / name, [(obs, action, *rest)], env_spec=None, action_space=space)
        assert np.allclose(load_data(script, folder).action, scaled, rtol=0, atol=1e-7)
    for name, action, space in (
        ("unbounded", part, Box(-np.inf, np.inf, (1,))),
        ("discrete", np.arange(5) % 2, Discrete(2)),
    ):
        refuses(script, write_minari(tmp_path / name, [(obs, action, *rest)], action_space=space))
    for name, action in ("numbers", np.arange(5) % 2), ("large", 1.5 * part):
        refuses(script, write_d4rl(tmp_path / f"hopper-{name}.hdf5", [(obs, action, *rest)]))


# Names, shares, several datasets ------------------------------------------------------------------
@scripts
def test_a_share_takes_whole_episodes_and_the_same_for_every_seed(script, tmp_path):
    episodes = harness.hopper_episodes(10, 5)
    folder = write_minari(tmp_path / "m", episodes)
    half = load_data(script, f"{folder}:0.5")
    kept = [np.abs([episode[2].sum() - x for episode in episodes]).argmin() for x in half.returns]
    assert len(kept) == 5 and kept == sorted(set(kept)) and kept != [0, 1, 2, 3, 4]
    check(half, [episodes[i] for i in kept])
    assert load_data(script, f"{folder}:0.5", seed=7).returns.tolist() == half.returns.tolist()
    assert len(load_data(script, f"{folder}:0.01").returns) == 1  # one at least
    for share in ("0", "1.5", "-0.1", "nan"):
        refuses(script, f"{folder}:{share}")


@scripts
def test_several_datasets_follow_each_other(script, tmp_path):
    """They must agree in the parts of observations, in the bounds of actions, and in their environment; the
    reference returns are those of the last."""
    first, second = harness.hopper_episodes(3, 5, seed=1), harness.hopper_episodes(4, 6, seed=2)
    d4rl = write_d4rl(tmp_path / "hopper.hdf5", first)
    other = write_minari(tmp_path / "m", second, references=(5.0, 105.0))
    data = load_data(script, d4rl, other, eval_episodes=1)
    check(data, first + second)
    assert tuple(data.references) == (5, 105)
    assert tuple(load_data(script, other, d4rl, eval_episodes=1).references) == D4RL_HOPPER
    assert len(load_data(script, f"{other}:0.5", f"{d4rl}:0.34").returns) == 2 + 1
    refuses(script, other, write_minari(tmp_path / "wide", harness.hopper_episodes(2, 5, obs_dim=12)))
    refuses(script, other, write_minari(tmp_path / "bounds", second, action_space=Box(-2, 2, (3,))))
    cheetah = write_d4rl(tmp_path / "halfcheetah.hdf5", harness.hopper_episodes(2, 5, 17, 6))
    walker = write_d4rl(tmp_path / "walker2d.hdf5", harness.hopper_episodes(2, 5, 17, 6))
    harness.refused(script, "--dataset", cheetah, walker, "--eval-episodes", 1)
    loose = write_minari(tmp_path / "loose", second, env_kwargs={"terminate_when_unhealthy": False})
    harness.refused(script, "--dataset", other, loose, "--eval-episodes", 1)
    folders = []
    for sizes in (1, 2), (2, 1):  # three numbers each
        parts = {key: np.zeros((2, size)) for key, size in zip("ab", sizes)}
        folders.append(write_minari(tmp_path / f"{sizes}", [(parts, *steps([1])[1:])]))
    refuses(script, *folders)


@scripts
def test_a_minari_dataset_is_found_by_folder_or_id(script, tmp_path, monkeypatch):
    """Relative to here, embedded, in Minari's own root, downloaded; else the error names what is embedded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    write_minari(tmp_path / "ä folder", [steps([1, 2])])
    write_minari(tmp_path / "12:30" / "log", [steps([1, 2]), steps([9])])
    write_minari(tmp_path / "root" / "mujoco" / "tiny-v0", [steps([3, 4]), steps([5])])
    download = lambda name: write_minari("root/far-v0", [steps([6])])
    monkeypatch.setattr(minari, "download_dataset", download)
    for name, returns in (
        ("ä folder", [3]),
        ("./ä folder/", [3]),
        ("12:30/log", [3, 9]),
        (f"{tmp_path}/12:30/log:0.5", [3]),
        ("mujoco/tiny-v0", [7, 5]),
        ("mujoco/tiny-v0:0.5", [7]),
        ("far-v0", [6]),
    ):
        assert load_data(script, name).returns.tolist() == returns
    monkeypatch.setattr(minari, "download_dataset", lambda name: 1 / 0)
    assert "hopper/replay-v0" in refuses(script, "no/such-v0")


@scripts
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_numbers_that_no_update_survives_are_refused(script, tmp_path, column, value):
    """The square of 1e30 is infinite in float32. Also in an observation that is only a next one, and in the
    reward of a step that is no transition."""
    episodes = harness.hopper_episodes(4, 5)
    episodes[1][column][-1] = value
    refuses(script, write_minari(tmp_path / "m", episodes))
    if column == 2:
        refuses(script, path := write_d4rl(tmp_path / "hopper.hdf5", episodes, next_observations=False))
        with h5py.File(path, "r+") as file:
            del file["rewards"]
            file["rewards"] = np.zeros((20, 2))  # of two tasks
        with pytest.raises(ValueError, match="reshape"):
            load_data(script, path)


@scripts
@pytest.mark.parametrize("name", EMBEDDED, ids=str)
def test_embedded_dataset(script, name):
    """Its metadata says what is in it, it fits its environment, and the README there says how it was made."""
    folder = harness.DATA / name
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    env_id = None
    if name.parts[0] == "mood":  # whose environments no file may name
        pytest.importorskip("dm_control")
        env_id = f"mood:{name.name}"
    data = load_data(script, f"{name}:0.02", eval_episodes=1, env_id=env_id)
    assert len(data.returns) == max(1, round(0.02 * metadata["total_episodes"]))
    assert np.abs(data.action).max() <= 1 + 1e-6 and data.references[0] < data.references[1]
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 15e6
    lines = (harness.DATA / "README.md").read_text().splitlines()
    assert any(str(name) in line and ".py " in line for line in lines)
