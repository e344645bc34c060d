"""The environment that the moved scripts evaluate in, and what one evaluation episode is."""

import json
import pickle
import sys

import gymnasium as gym
import harness
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from harness import load_data, steps, write_minari

D4RL_HOPPER = -20.272305, 3234.3  # returns of D4RL's random and expert policy

scripts = pytest.mark.parametrize("script", harness.distinct())


def refuses(script, name, *flags):
    return harness.refused(script, "--dataset", name, "--eval-episodes", 1, *flags)


class Recorded(gym.Env):
    """Shows two random numbers in `z`, 5 in `a`, the time in `t`; pays the action; has no time limit."""

    observation_space = Dict([("z", Box(-9, 9, (2,))), ("a", Box(-9, 9, (1,))), ("t", Box(0, np.inf, (1,)))])
    action_space = Box(-2, 2, (1, 1))
    pay = float

    def observe(self):
        draws = np.float32(self.np_random.random(2))
        return {"z": draws, "a": np.float32([5]), "t": np.float32([self.time])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.end = int(self.np_random.integers(3, 30))
        return self.observe(), {}

    def step(self, action):
        assert action.shape == (1, 1)
        self.time += 1
        return self.observe(), self.pay(action.item()), self.time == self.end, False, {}


class ArrayReward(Recorded):
    pay = staticmethod(lambda x: np.array([x]))


gym.register("test/Recorded-v0", Recorded)
gym.register("test/ArrayReward-v0", ArrayReward)


class Copy(torch.nn.Module):
    """A policy whose action is a tenth of one number of the observation."""

    def __init__(self, column):
        super().__init__()
        self.column = column

    def forward(self, obs):
        return obs[..., self.column : self.column + 1] / 10


class Still(torch.nn.Module):
    def forward(self, obs):
        return torch.zeros(*obs.shape[:2], 3)


def recorded_data(folder):
    """Data of the environment, whose Dict Minari keeps in another order."""
    obs = {"z": np.zeros((4, 2)), "a": np.zeros((4, 1)), "t": np.zeros((4, 1))}
    episode = obs, np.zeros((3, 1, 1)), *steps([1, 2, 3])[2:]
    space = Dict({key: Recorded.observation_space[key] for key in "atz"})
    options = dict(env_spec=None, obs_space=space, action_space=Recorded.action_space, references=None)
    return write_minari(folder, [episode], **options)


def evaluate(script, data, policy, seeds=range(1), update=100, episode=0):
    arguments = data.spec, data.references, None, seeds, update, episode
    return harness.load(script).run_episode(pickle.dumps(policy), *arguments)


def hopper(folder, **options):
    return write_minari(folder, harness.hopper_episodes(2, 5), **options)


@scripts
@pytest.mark.parametrize("env_id", ["test/Recorded-v0", "test/ArrayReward-v0"])
def test_an_episode_is_a_plain_loop(script, tmp_path, env_id):
    """Observations in the order of the data, actions in [-1, 1] as the environment's [-2, 2], rewards also as
    arrays of one number. Seeds end at different times, each with the return of an environment of its own."""
    folder = recorded_data(tmp_path / "m")
    data = load_data(script, folder, env_id=env_id, eval_episodes=1)
    column = list(minari.MinariDataset(folder / "data").observation_space).index("a")
    assert column == 0  # in the environment it would be the third number
    assert data.spec.max_episode_steps <= 10_000  # or an episode might never end
    rows = evaluate(script, data, Copy(column), range(3, 6))
    assert len(set(rows[:, 4])) > 1
    for row, seed in zip(rows, range(3, 6)):
        env = Recorded()
        entropy = seed, harness.load(script).EVALUATION, 100, 1
        env.reset(seed=np.random.SeedSequence(entropy).generate_state(1).item())
        assert row[:5].tolist() == [100, seed, 0, pytest.approx(env.end * 2 * 5 / 10), env.end]
        assert np.isnan(row[5])  # nobody knows references
        alone = evaluate(script, data, Copy(column), range(seed, seed + 1))
        assert np.array_equal(alone[0], row, equal_nan=True)
    others = (100, 0), (100, 1), (200, 0)
    returns = [evaluate(script, data, Copy(2), range(3, 4), *other)[0, 3] for other in others]
    assert len(set(returns)) == 3  # no two episodes start alike


@scripts
def test_the_environment_is_the_metadatas(script, tmp_path):
    """eval_env_spec before env_spec, with arguments and step limit, without a window; its references."""
    kwargs = {"terminate_when_unhealthy": False, "healthy_reward": 50.0, "render_mode": "human"}
    seven = harness.env_spec("Hopper-v5", kwargs, max_episode_steps=7)
    nine = harness.env_spec("Hopper-v5", kwargs, max_episode_steps=9)
    for name, length, options in (
        ("both", 7, {"env_spec": nine, "eval_env_spec": seven}),
        ("one", 9, {"env_spec": nine}),
    ):
        data = load_data(script, hopper(tmp_path / name, references=(5.0, 25.0), **options), eval_episodes=1)
        (row,) = evaluate(script, data, Still())
        assert row[4] == length and abs(row[3] - 50 * length) < 25
        assert row[5] == pytest.approx(100 * (row[3] - 5) / 20)
    assert "render_mode" not in gym.spec("Hopper-v5").kwargs
    data = load_data(script, tmp_path / "one", eval_episodes=1, env_id="Hopper-v5")
    assert data.spec.max_episode_steps == 1000 and "healthy_reward" not in data.spec.kwargs
    data = load_data(script, hopper(tmp_path / "none", references=None), eval_episodes=1)
    assert tuple(data.references) == D4RL_HOPPER


@scripts
def test_wrappers_of_the_metadata_are_applied(script, tmp_path):
    """Actions in [-0.5, 0.5]: the data's are scaled, the policy's are scaled back."""
    env = gym.wrappers.RescaleAction(gym.make("Hopper-v5"), -0.5, 0.5)
    options = dict(action_space=Box(-0.5, 0.5, (3,)))
    data = load_data(script, hopper(tmp_path / "m", env_spec=env.spec.to_json(), **options), eval_episodes=1)
    logged = np.concatenate([episode[1] for episode in harness.hopper_episodes(2, 5)])
    assert np.allclose(data.action, 2 * logged, atol=1e-6)
    assert "RescaleAction" in [wrapper.name for wrapper in data.spec.additional_wrappers]
    assert evaluate(script, data, Still())[0, 4] > 0
    refuses(script, hopper(tmp_path / "without", **options))  # the bounds differ


@scripts
def test_what_does_not_fit_the_data_is_refused(script, tmp_path):
    """No environment named; other observations, other sizes by key, other actions, other bounds."""
    folder = hopper(tmp_path / "m", env_spec=None)
    refuses(script, folder)
    for env_id in "Walker2d-v5", "Pendulum-v1", "CartPole-v1":
        refuses(script, folder, "--env-id", env_id)
    episodes = harness.hopper_episodes(2, 5, obs_dim=3, action_dim=1)
    torques = write_minari(tmp_path / "pendulum", episodes, "Pendulum-v1")  # Pendulum's go to 2, these to 1
    refuses(script, torques)
    flat = [(obs, action[..., None], *rest) for obs, action, *rest in harness.hopper_episodes(2, 5, 4, 1)]
    options = dict(env_spec=None, action_space=Recorded.action_space)
    folder = write_minari(tmp_path / "flat", flat, **options)
    refuses(script, folder, "--env-id", "test/Recorded-v0")


@scripts
def test_nothing_that_a_dataset_names_is_run(script, tmp_path, monkeypatch):
    """Entry points and wrappers outside the trusted packages are refused. Neither they nor vector entry
    points, nor what would only be asked for its spaces, is imported."""
    for name in "trap_for_data", "gymnasium_trap":
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    good = json.loads(harness.env_spec("Hopper-v5"))
    bad = {"entry_point": "trap_for_data:Env"}
    for name, changes in (
        ("env", bad),
        ("lookalike", {"entry_point": "gymnasium_trap:Env"}),
        ("wrapper", {"additional_wrappers": [{"name": "W", "kwargs": {}, **bad}]}),
    ):
        for key in "env_spec", "eval_env_spec":
            folder = hopper(tmp_path / f"{name}-{key}", **{key: json.dumps(good | changes)})
            refuses(script, folder)
    folder = hopper(tmp_path / "spaces", env_spec=json.dumps(good | bad))
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    del metadata["observation_space"]
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    refuses(script, folder)
    spec = json.dumps(good | {"vector_entry_point": "trap_for_data:Env"})
    vector = load_data(script, hopper(tmp_path / "vector", env_spec=spec), eval_episodes=1)
    evaluate(script, vector, Still())

    # trusted packages have functions, too, that make what their arguments name
    maker = {"entry_point": "gymnasium.envs.registration:make", "kwargs": {"id": "trap_for_data:Env-v0"}}
    importer = {"entry_point": "gymnasium.envs.registration:load_env_creator", "kwargs": {"name": "trap_for_data:E"}}
    for i, part in enumerate([maker, importer]):
        for changes in part, {"additional_wrappers": [{"name": "W", **part}]}:
            folder = hopper(tmp_path / f"function-{i}-{len(changes)}", env_spec=json.dumps(good | changes))
            with pytest.raises((TypeError, SystemExit)):
                load_data(script, folder, eval_episodes=1)
    folder = hopper(tmp_path / "env_id", env_id="trap_for_data:Env-v0", **{"env_spec": json.dumps(good)})
    assert load_data(script, folder, eval_episodes=1).spec.id == "Hopper-v5"
    assert not {"trap_for_data", "gymnasium_trap"} & sys.modules.keys() and not (tmp_path / "sprung").exists()
