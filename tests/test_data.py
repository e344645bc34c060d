"""load_dataset of iql_red.py: what a D4RL file, a Minari folder and their metadata become."""

import json
import sys

import gymnasium as gym
import h5py
import harness
import numpy as np
import pytest

EMBEDDED = sorted(path.parent.parent for path in harness.DATA.glob("**/data/metadata.json"))


@pytest.fixture
def iql():
    return harness.load("iql_red")


def obvious_rows(episodes):
    """Packed transitions by the slowest and plainest loop; without a last observation, a truncated step has no row."""
    rows = []
    for obs, action, reward, terminated, _ in episodes:
        for t in range(len(reward)):
            if t + 1 < len(obs):
                next_obs = obs[t + 1]
            elif terminated[t]:
                next_obs = obs[t]  # masked: nothing bootstraps from it
            else:
                continue
            rows.append([*obs[t], *action[t], reward[t], *next_obs, 0 if terminated[t] else 1])
    return np.array(rows, np.float32)


def returns_of(episodes):
    return np.array([sum(map(float, reward)) for _, _, reward, _, _ in episodes])


def without_last_observation(episodes):
    return [(obs[:-1], *rest) for obs, *rest in episodes]


def steps(rewards, terminated=False, obs_dim=2, first_obs=0.0):
    """One episode with these rewards and numbered observations, which ends in a termination or a truncation."""
    T = len(rewards)
    ends = np.zeros((2, T), bool)
    ends[0 if terminated else 1, -1] = True
    obs = first_obs + np.arange((T + 1) * obs_dim, dtype=np.float32).reshape(T + 1, obs_dim)
    return obs, np.full((T, 1), 0.5, np.float32), np.float64(rewards), *ends


def test_d4rl_and_minari_give_identical_tensors(iql, tmp_path):
    """The format is no part of the data: same rows, lengths, returns, bit by bit, and equal to a plain loop's."""
    episodes = harness.hopper_episodes()
    d4rl = iql.load_dataset([str(harness.write_d4rl(tmp_path / "hopper-test-v2.hdf5", episodes))])
    minari = iql.load_dataset([str(harness.write_minari(tmp_path / "m", episodes))])
    assert np.array_equal(d4rl.transitions, minari.transitions)
    assert np.array_equal(d4rl.episode_lengths, minari.episode_lengths)
    assert np.array_equal(d4rl.episode_returns, minari.episode_returns)
    assert np.array_equal(minari.transitions, obvious_rows(episodes))
    assert minari.transitions.dtype == np.float32 and minari.episode_returns.dtype == np.float64
    assert (minari.obs_dim, minari.action_dim) == (d4rl.obs_dim, d4rl.action_dim) == (11, 3)
    assert list(minari.episode_lengths) == [len(reward) for _, _, reward, _, _ in episodes]
    assert np.allclose(minari.episode_returns, returns_of(episodes), rtol=1e-12)


def test_without_next_observations_a_truncated_step_counts_but_gives_no_transition(iql, tmp_path):
    """T observations only (D4RL without next_observations; Minari folders of that kind): a truncated episode loses its
    last transition, never its reward; a terminated one keeps both."""
    episodes = harness.hopper_episodes()
    d4rl = iql.load_dataset([str(harness.write_d4rl(tmp_path / "hopper-test-v2.hdf5", episodes, False))])
    minari = iql.load_dataset([str(harness.write_minari(tmp_path / "m", without_last_observation(episodes)))])
    lost = [0 if terminated[-1] else 1 for _, _, _, terminated, _ in episodes]
    for dataset in d4rl, minari:
        assert np.array_equal(dataset.transitions, obvious_rows(without_last_observation(episodes)))
        assert list(dataset.episode_lengths) == [len(e[2]) - n for e, n in zip(episodes, lost)]
        assert np.allclose(dataset.episode_returns, returns_of(episodes), rtol=1e-12)


@pytest.mark.parametrize("next_observations", [True, False])
def test_next_observations_never_cross_episodes(iql, tmp_path, next_observations):
    """Observations carry their episode's number: s' has that of s in every row whose target bootstraps."""
    episodes = []
    for i, (obs, *rest) in enumerate(harness.hopper_episodes(5, 7)):
        obs[:, 0] = i
        episodes.append((obs, *rest))
    path = harness.write_d4rl(tmp_path / "hopper-test-v2.hdf5", episodes, next_observations)
    rows = iql.load_dataset([str(path)]).transitions
    same = rows[:, 0] == rows[:, 11 + 3 + 1]
    assert same[rows[:, -1] == 1].all() and same.all()
    assert list(np.unique(rows[:, 0])) == [0, 1, 2, 3, 4]


def test_terminated_cuts_and_truncated_does_not(iql, tmp_path):
    """not_terminated is 0 at the last step of a terminated episode and 1 everywhere else."""
    episodes = [steps([1, 1, 1], terminated=True), steps([1, 1], terminated=False), steps([1], terminated=True)]
    for path in harness.write_d4rl(tmp_path / "a.hdf5", episodes), harness.write_minari(tmp_path / "m", episodes):
        assert list(iql.load_dataset([str(path)]).transitions[:, -1]) == [1, 1, 0, 1, 1, 0]


def test_termination_wins_over_a_time_limit_in_the_same_step(iql, tmp_path):
    obs, action, reward, terminated, truncated = steps([1, 1], terminated=True)
    truncated[-1] = True
    episodes = [(obs, action, reward, terminated, truncated), steps([1, 1])]
    for path in harness.write_d4rl(tmp_path / "a.hdf5", episodes), harness.write_minari(tmp_path / "m", episodes):
        dataset = iql.load_dataset([str(path)])
        assert list(dataset.episode_lengths) == [2, 2] and list(dataset.transitions[:, -1]) == [1, 0, 1, 1]


@pytest.mark.parametrize("last_end", [True, False])
def test_a_trailing_unfinished_episode_is_kept(iql, tmp_path, last_end):
    """Spec 1.10 (2): returns per transition 3 3 12 12 12 6, whether or not the file ends with a flag."""
    episodes = [steps([1, 2]), steps([3, 4, 5]), steps([6])]
    episodes[-1][4][-1] = last_end
    dataset = iql.load_dataset([str(harness.write_d4rl(tmp_path / "a.hdf5", episodes))])
    assert list(np.repeat(dataset.episode_returns, dataset.episode_lengths)) == [3, 3, 12, 12, 12, 6]


def test_returns_of_whole_episodes_where_the_file_has_no_next_observations(iql, tmp_path):
    """Spec 1.10 (3) under our convention: 5 steps of reward 1 twice, then a lone row, without next_observations: 4 + 4
    transitions, returns 5 and 5 (the whole episode; D4RL's own loader says 4), and the lone row is no transition."""
    episodes = [steps([1] * 5), steps([1] * 5), steps([1])]
    episodes[-1][4][-1] = False
    dataset = iql.load_dataset([str(harness.write_d4rl(tmp_path / "a.hdf5", episodes, next_observations=False))])
    assert list(dataset.episode_lengths) == [4, 4] and list(dataset.episode_returns) == [5, 5]


def test_a_file_without_timeouts(iql, tmp_path):
    """Early D4RL files have `terminals` only: they alone cut episodes."""
    path = harness.write_d4rl(tmp_path / "a.hdf5", [steps([1, 2], terminated=True), steps([3, 4], terminated=True)])
    with h5py.File(path, "a") as file:
        del file["timeouts"]
    assert list(iql.load_dataset([str(path)]).episode_returns) == [3, 7]


def test_returns_are_summed_in_float64_as_logged(iql, tmp_path):
    """A float32 sum of 20,000 rewards of 0.1 on top of 1e5 would be off by hundreds."""
    reward = np.full(20_000, 0.1)
    reward[0] = 1e5
    dataset = iql.load_dataset([str(harness.write_minari(tmp_path / "m", [steps(reward)]))])
    assert abs(dataset.episode_returns[0] - 101_999.9) < 1e-6
    obs, action, _, *ends = steps(reward)
    float32 = iql.load_dataset([str(harness.write_minari(tmp_path / "f", [(obs, action, np.float32(reward), *ends)]))])
    assert abs(float32.episode_returns[0] - 101_999.9) < 1e-2


def test_float64_input_becomes_float32(iql, tmp_path):
    obs, action, *rest = steps([1, 2, 3])
    folder = harness.write_minari(tmp_path / "m", [(np.float64(obs) * (1 + 1e-12), np.float64(action), *rest)])
    dataset = iql.load_dataset([str(folder)])
    assert dataset.transitions.dtype == np.float32
    assert np.array_equal(dataset.transitions, obvious_rows([(obs, action, *rest)]))


def test_more_than_ten_episodes_keep_their_order(iql, tmp_path):
    """HDF5 lists episode_10 before episode_2; the episodes' own numbers count."""
    folder = harness.write_minari(tmp_path / "m", [steps([i]) for i in range(12)])
    assert list(iql.load_dataset([str(folder)]).episode_returns) == list(range(12))


def test_fraction_takes_whole_episodes_and_depends_on_the_seed_only(iql, tmp_path):
    episodes = harness.hopper_episodes(10, 5)
    folder, returns = str(harness.write_minari(tmp_path / "m", episodes)), returns_of(episodes)
    half, again, other = (iql.load_dataset([folder + ":0.5"], seed=seed) for seed in (3, 3, 4))
    assert len(half.episode_returns) == 5
    assert np.array_equal(half.transitions, again.transitions)
    assert not np.array_equal(half.episode_returns, other.episode_returns)
    kept = [i for i, x in enumerate(returns) if np.isclose(half.episode_returns, x, rtol=1e-12).any()]
    assert np.array_equal(half.transitions, obvious_rows([episodes[i] for i in kept]))  # whole, and in their order
    assert len(iql.load_dataset([folder + ":0.01"]).episode_returns) == 1  # one at least
    assert len(iql.load_dataset([folder + ":1"]).episode_returns) == 10
    every = [i for seed in range(40) for i in iql.load_dataset([folder + ":0.2"], seed=seed).episode_returns]
    assert len(set(every)) == 10  # no episode is out of reach


def test_several_datasets_are_concatenated_in_order(iql, tmp_path):
    first, second = harness.hopper_episodes(3, 5, seed=1), harness.hopper_episodes(4, 6, seed=2)
    names = [harness.write_d4rl(tmp_path / "hopper-a-v2.hdf5", first), harness.write_minari(tmp_path / "m", second)]
    dataset = iql.load_dataset([str(name) for name in names])
    assert np.array_equal(dataset.transitions, obvious_rows(first + second))
    assert np.allclose(dataset.episode_returns, returns_of(first + second), rtol=1e-12)
    assert len(iql.load_dataset([f"{names[0]}:0.34", f"{names[1]}:0.5"]).episode_returns) == 1 + 2
    assert dataset.environment["references"] == iql.D4RL_REFERENCES["Hopper"]  # those of the first
    swapped = iql.load_dataset([str(name) for name in reversed(names)])
    assert tuple(swapped.environment["references"]) == (0, 100)
    assert np.array_equal(swapped.transitions, obvious_rows(second + first))


@pytest.mark.parametrize("given", ["m/data", "m", "./m/"])
def test_a_minari_folder_may_be_given_as_its_data_folder_or_the_parent(iql, tmp_path, monkeypatch, given):
    harness.write_minari(tmp_path / "m", [steps([1, 2])])
    monkeypatch.chdir(tmp_path)
    assert list(iql.load_dataset([given]).episode_returns) == [3]


def test_datasets_that_minari_has_on_this_machine_are_found_by_id(iql, tmp_path, monkeypatch):
    """... with a fraction too, although ids have no colon of their own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    harness.write_minari(tmp_path / "root" / "mujoco" / "walker2d" / "tiny-v0", [steps([1, 2]), steps([3, 4])])
    assert list(iql.load_dataset(["mujoco/walker2d/tiny-v0"]).episode_returns) == [3, 7]
    assert len(iql.load_dataset(["mujoco/walker2d/tiny-v0:0.5"]).episode_returns) == 1


def test_environment_comes_from_the_metadata(iql, tmp_path):
    """Id, plain keyword arguments, the spec's time limit and the reference scores."""
    spec = {"id": "Hopper-v5", "kwargs": {"ctrl_cost_weight": 0.5}, "max_episode_steps": 7, "entry_point": "x:Y"}
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 3), env_spec=json.dumps(spec))
    environment = iql.load_dataset([str(folder)]).environment
    assert environment["id"] == "Hopper-v5"
    assert environment["kwargs"] == {"ctrl_cost_weight": 0.5, "max_episode_steps": 7}
    assert tuple(environment["references"]) == (0.0, 100.0)
    env = iql.make_env(environment)
    assert env.spec.max_episode_steps == 7 and env.unwrapped._ctrl_cost_weight == 0.5


def test_env_id_overrides_the_datasets_own(iql, tmp_path):
    """Another environment brings neither keyword arguments nor scores of the old one; the same one keeps them."""
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 3), env_kwargs={"frame_skip": 4})
    other = iql.load_dataset([str(folder)], env_id="Walker2d-v5").environment
    assert other == {"id": "Walker2d-v5", "kwargs": {}, "references": iql.D4RL_REFERENCES["Walker2d"]}
    same = iql.load_dataset([str(folder)], env_id="Hopper-v5").environment
    assert same["kwargs"] == {"frame_skip": 4} and tuple(same["references"]) == (0.0, 100.0)


def test_reference_scores_fall_back_on_d4rls(iql, tmp_path):
    """By the environment's name; an environment that D4RL does not have gets none."""
    path = harness.write_d4rl(tmp_path / "hopper-medium-v2.hdf5", harness.hopper_episodes(2, 3))
    environment = iql.load_dataset([str(path)]).environment
    assert environment["id"] == "Hopper-v5" and environment["references"] == (-20.272305, 3234.3)
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 3), references=None)
    assert iql.load_dataset([str(folder)]).environment["references"] == (-20.272305, 3234.3)
    assert iql.load_dataset([str(path)], env_id="AntMaze_UMaze-v5").environment["references"] == (0.0, 1.0)
    assert iql.load_dataset([str(path)], env_id="Pendulum-v1").environment["references"] is None


def test_normalised_scores_and_reward_scale(iql, tmp_path):
    """Spec 1.10 (1) and (4)."""
    for name, score in ("HalfCheetah", 10.3114), ("Hopper", 31.3489), ("Walker2d", 21.7478), ("AdroitHandPen", 30.3209):
        assert iql.normalized_score(1000, iql.D4RL_REFERENCES[name]) == pytest.approx(score, abs=1e-4)
    assert np.isnan(iql.normalized_score(1000, None))
    episodes = [steps([-20, 0]), steps([3000, 200])]
    for mode, rewards in (
        ("scale", np.array([-20, 0, 3000, 200]) * 0.310559),
        ("shift", [-21, -1, 2999, 199]),
        ("none", [-20, 0, 3000, 200]),
    ):
        dataset = iql.load_dataset([str(harness.write_minari(tmp_path / mode, episodes))])
        iql.transform_rewards(dataset, mode, iql.IQL_TRANSFORMS)
        assert dataset.transitions[:, 3] == pytest.approx(rewards, rel=1e-5)
        assert list(dataset.episode_returns) == [-20, 3200]  # as logged


@pytest.mark.parametrize(
    "env_id, factor", [("Hopper-v5", 1000 / 3220), ("AntMaze_UMaze-v5", None), ("AdroitHandPen-v1", 1), (None, 1)]
)
def test_rewards_are_transformed_by_the_kind_of_environment(iql, tmp_path, env_id, factor):
    spec = {"env_spec": json.dumps({"id": env_id}) if env_id else None}
    folder = harness.write_minari(tmp_path / "m", [steps([-20, 0]), steps([3000, 200])], **spec)
    dataset = iql.load_dataset([str(folder)])
    logged = dataset.transitions[:, 3].copy()
    iql.transform_rewards(dataset, "auto", iql.IQL_TRANSFORMS)
    assert dataset.transitions[:, 3] == pytest.approx(logged - 1 if factor is None else logged * factor, rel=1e-5)


# -- Dict observations ------------------------------------------------------------------------------------------------


def collect(env, num_episodes, num_steps):
    """Raw episodes of random actions, Dict observations stacked by key at every level."""

    def stack(observations):
        if isinstance(observations[0], dict):
            return {key: stack([obs[key] for obs in observations]) for key in observations[0]}
        return np.stack(observations)

    env.action_space.seed(0)
    raw, episodes = [], []
    for i in range(num_episodes):
        observations, actions = [env.reset(seed=i)[0]], []
        for _ in range(num_steps):
            actions.append(env.action_space.sample())
            observations.append(env.step(actions[-1])[0])
        ends = np.zeros((2, num_steps), bool)
        ends[1, -1] = True
        raw.append(observations)
        episodes.append((stack(observations), np.stack(actions), np.arange(num_steps, dtype=float), *ends))
    return raw, episodes


def assert_flattened_as_gymnasium_does(dataset, raw, space):
    flat = [np.stack([gym.spaces.flatten(space, obs) for obs in episode]).astype(np.float32) for episode in raw]
    obs_dim, s_next = dataset.obs_dim, dataset.obs_dim + dataset.action_dim + 1
    assert obs_dim == flat[0].shape[1]
    assert np.array_equal(dataset.transitions[:, :obs_dim], np.concatenate([obs[:-1] for obs in flat]))
    assert np.array_equal(dataset.transitions[:, s_next:-1], np.concatenate([obs[1:] for obs in flat]))


def test_pointmaze_observations_are_flat_in_data_and_environment_alike(iql, tmp_path):
    robotics = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(robotics)
    kwargs = {"maze_map": [[1, 1, 1, 1], [1, 0, "g", 1], [1, 1, 1, 1]], "continuing_task": False}
    env = gym.make("PointMaze_UMaze-v3", **kwargs)
    raw, episodes = collect(env, 2, 6)
    folder = harness.write_minari(tmp_path / "m", episodes, "PointMaze_UMaze-v3", kwargs)
    dataset = iql.load_dataset([str(folder)])
    assert_flattened_as_gymnasium_does(dataset, raw, env.observation_space)
    flat_env = iql.make_env(dataset.environment)
    obs = flat_env.reset(seed=0)[0]
    assert np.array_equal(obs, gym.spaces.utils.flatten(env.observation_space, env.reset(seed=0)[0]))
    assert np.array_equal(np.float32(obs), dataset.transitions[0, : dataset.obs_dim])  # the same reset as logged
    iql.fit_to_environment(dataset)  # raises SystemExit where they do not fit


def test_nested_dict_observations(iql, tmp_path):
    """Keys out of alphabetical order, a Dict in a Dict, a matrix, a scalar-like box, capitals."""
    box = lambda *shape: gym.spaces.Box(-9, 9, shape, np.float64)
    inner = gym.spaces.Dict({"z": box(2), "a": box(1), "B": box(3)})
    space = gym.spaces.Dict({"velocity": box(2), "body": inner, "arm": box(2, 3), "Zero": box(1)})
    space.seed(0)
    rng, raw, episodes = np.random.default_rng(0), [], []
    for _ in range(2):
        obs = [space.sample() for _ in range(5)]
        stacked = {key: np.stack([o[key] for o in obs]) for key in ("velocity", "arm", "Zero")}
        stacked["body"] = {key: np.stack([o["body"][key] for o in obs]) for key in inner}
        ends = np.zeros((2, 4), bool)
        raw.append(obs)
        episodes.append((stacked, rng.normal(size=(4, 1)), rng.normal(size=4), *ends))
    dataset = iql.load_dataset([str(harness.write_minari(tmp_path / "m", episodes))])
    assert_flattened_as_gymnasium_does(dataset, raw, space)


# -- actions ----------------------------------------------------------------------------------------------------------


def test_actions_are_scaled_to_one_in_data_and_environment_alike(iql, tmp_path):
    """Pendulum's torque goes from -2 to 2: the learner sees half of it, and the environment doubles it again."""
    obs, action, *rest = harness.hopper_episodes(1, 5, obs_dim=3, action_dim=1)[0]
    action = np.float32([[-2], [-1], [0], [1], [2]])
    folder = harness.write_minari(tmp_path / "m", [(obs, action, *rest)], "Pendulum-v1")
    dataset = iql.load_dataset([str(folder)])
    iql.fit_to_environment(dataset)
    assert list(iql.actions_of(dataset)[:, 0]) == [-1, -0.5, 0, 0.5, 1]
    ours, raw = iql.make_env(dataset.environment), gym.make("Pendulum-v1")
    ours.reset(seed=0), raw.reset(seed=0)
    assert ours.action_space.low == -1 and ours.action_space.high == 1
    for share in -1.0, -0.5, 0.25, 1.0:
        mine, theirs = ours.step(np.float32([share])), raw.step(np.float32([2 * share]))
        assert np.allclose(mine[0], theirs[0], atol=1e-6) and mine[1] == pytest.approx(theirs[1], abs=1e-6)


def test_actions_in_one_stay_as_logged(iql, tmp_path):
    episodes = harness.hopper_episodes(2, 5)
    dataset = iql.load_dataset([str(harness.write_minari(tmp_path / "m", episodes))])
    iql.fit_to_environment(dataset)
    assert np.array_equal(dataset.transitions, obvious_rows(episodes))


# -- a dataset is data ------------------------------------------------------------------------------------------------


def test_nothing_that_a_dataset_names_is_imported(iql, tmp_path, monkeypatch):
    """entry_point, wrappers and a module before a colon in the id could each run code; none is ever imported."""
    (tmp_path / "trap_of_test_data.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {
        "id": "Hopper-v5",
        "entry_point": "trap_of_test_data:Env",
        "vector_entry_point": "trap_of_test_data:Env",
        "additional_wrappers": [{"name": "W", "entry_point": "trap_of_test_data:W", "kwargs": {}}],
        "kwargs": {},
    }
    names = {"env_spec": json.dumps(spec), "eval_env_spec": json.dumps(spec), "requirements": ["trap_of_test_data"]}
    dataset = iql.load_dataset([str(harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 3), **names))])
    iql.fit_to_environment(dataset)
    assert iql.make_env(dataset.environment).unwrapped.__class__.__name__ == "HopperEnv"
    colon = harness.write_minari(tmp_path / "c", harness.hopper_episodes(2, 3), "trap_of_test_data:Hopper-v5")
    with pytest.raises(SystemExit) as stop:
        iql.load_dataset([str(colon)])
    assert stop.value.code == 2
    # an entry point smuggled in as a keyword argument reaches the environment's constructor, which refuses it
    smuggled = {"entry_point": "trap_of_test_data:Env"}
    folder = harness.write_minari(tmp_path / "k", harness.hopper_episodes(2, 3), env_kwargs=smuggled)
    with pytest.raises(SystemExit):
        iql.fit_to_environment(iql.load_dataset([str(folder)]))
    assert "trap_of_test_data" not in sys.modules and not (tmp_path / "sprung").exists()


# -- the datasets in tests/data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: str(folder.relative_to(harness.DATA)))
def test_embedded_dataset(iql, folder):
    """Each loads by its short name, fits its environment, is finite and small, and the README says how it was made."""
    name = str(folder.relative_to(harness.DATA))
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    dataset = iql.load_dataset([name])
    iql.fit_to_environment(dataset)
    assert len(dataset.episode_returns) == metadata["total_episodes"]
    assert dataset.episode_lengths.sum() == len(dataset.transitions) == metadata["total_steps"]
    assert np.isfinite(dataset.transitions).all() and np.isfinite(dataset.episode_returns).all()
    assert np.abs(iql.actions_of(dataset)).max() <= 1 + 1e-6
    low, high = dataset.environment["references"]
    assert low < high
    for key in "env_spec", "observation_space", "action_space", "algorithm_name", "description", "dataset_size":
        assert metadata[key], key
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 15e6


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: str(folder.relative_to(harness.DATA)))
def test_embedded_dataset_has_a_readme_line_with_its_command(folder):
    name = str(folder.relative_to(harness.DATA))
    lines = (harness.DATA / "README.md").read_text().splitlines()
    assert any(name in line and ".py " in line for line in lines)


def test_all_embedded_datasets_together_are_small_enough_for_git():
    assert EMBEDDED
    assert sum(path.stat().st_size for path in harness.DATA.rglob("*")) <= 60e6
