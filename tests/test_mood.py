"""Rewards of mood.py against those of environments that went the same way, against mechanics by hand and shimmy's
environments; its datasets against the logs they are made of, and an offline script that learns from one."""

import json
import os
import sys
from unittest import mock

import gymnasium as gym
import harness
import minari
import numpy as np
import pytest
import torch

suite = pytest.importorskip("dm_control.suite", reason="dm_control is not installed: pip install dm-control==1.0.44")
mood = harness.load("mood")
td3 = harness.load("td3")


def drive(env, seed, T=6, push=0):
    """An episode of random actions: obs (T + 1, O), action (T, A), reward (T,), physics (T + 1, P) in float64. It
    begins as the task's do or, with a push, in the model's own pose, which stands, but moving."""
    obs = [env.reset(seed=seed)[0]]
    if push:
        with env.physics.reset_context():
            env.physics.data.qvel[:3] = push
        obs = [env.observe(env.suite.task.get_observation(env.physics))]
    bounds = env.action_space.low, env.action_space.high
    action = np.random.default_rng(seed).uniform(*bounds, size=(T, *env.action_space.shape)).astype(np.float32)
    states, rewards = [env.physics.get_state()], []
    for x in action:
        step = env.step(x)
        assert step[2:] == (False, False, {})
        obs.append(step[0])
        rewards.append(step[1])
        states.append(env.physics.get_state())
    return np.array(obs), action, np.array(rewards), np.array(states)


def write_log(folder, episodes, env, physics=True):
    """Episodes in the form of td3.py's logs. Their rewards are wrong, so that a test can see them replaced."""
    steps = []
    for obs, action, reward, states in episodes:
        began, states = np.arange(len(action)) == 0, np.float32(states[:, : None if physics else 0])
        columns = obs[:-1], action, -1 - reward[:, None], obs[1:], 1 + 0 * reward[:, None], began[:, None]
        steps.append(np.concatenate([*columns, states[:-1], states[1:]], axis=1, dtype=np.float32))
    replay = td3.FullReplay(1, sum(map(len, steps)), steps[0].shape[1], "cpu")
    for row in np.concatenate(steps):
        replay.add([row[None]])
    O, A, P = obs.shape[1], action.shape[1], states.shape[1]
    td3.save_log(folder, replay, [O, A, 1, O, 1, 1, P, P], env.spec)
    return folder


def main(*flags):
    with mock.patch.object(sys, "argv", ["mood.py", *map(str, flags)]), mock.patch.dict(os.environ):
        mood.main()


def read(folder):
    return list(minari.MinariDataset(folder / "data").iterate_episodes())


# The tasks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("domain", mood.TARGET_RETURNS)
def test_relabelled_is_what_every_task_gave(domain):
    """Each task's environment goes the same way; the log of one, in float32, has the rewards of all, its own among
    them. The humanoid's would be too high if its control were forgotten."""
    envs = [mood.SuiteTask(domain, task) for task in mood.TARGET_RETURNS[domain]]
    rewards = []
    for push in (0, 1, -1):
        logs = [drive(env, 3, push=push) for env in envs]
        obs, action, _, states = logs[0]
        for env, (own_obs, _, reward, own_states) in zip(envs, logs):
            np.testing.assert_array_equal(own_states, states)
            np.testing.assert_array_equal(own_obs, obs)
            relabelled = mood.relabel(env, np.float32(states), action)
            np.testing.assert_allclose(relabelled, reward, rtol=0, atol=1e-6)
            if domain == "humanoid" and push:
                excess = mood.relabel(env, np.float32(states), 0 * action) / reward
                assert 1.02 < excess.min() and excess.max() < 1.25
        rewards.append([reward for _, _, reward, _ in logs])
    rewards = np.concatenate(rewards, axis=1)
    assert np.ptp(rewards, axis=1).min() > 0.01  # of every task
    assert len(np.unique(rewards.round(6), axis=0)) == len(envs)


STOCK = ["cheetah-run", "quadruped-walk", "quadruped-run"]
STOCK += [f"{domain}-{task}" for domain in ("walker", "humanoid") for task in ("stand", "walk", "run")]


@pytest.mark.parametrize("name", STOCK)
def test_stock_tasks_are_shimmys(name):
    """... from the first observation of a seed on, to the bit of float32; and so are rewards and spaces."""
    pytest.importorskip("shimmy", reason="shimmy is not installed: pip install shimmy==2.0.1")
    ours = gym.make(f"mood:{name}-v0")
    theirs = gym.wrappers.FlattenObservation(gym.make(f"shimmy:dm_control/{name}-v0"))
    assert ours.observation_space.shape == theirs.observation_space.shape
    for name in ("low", "high"):
        assert np.array_equal(getattr(ours.action_space, name), np.float32(getattr(theirs.action_space, name)))
    np.testing.assert_array_equal(ours.reset(seed=4)[0], np.float32(theirs.reset(seed=4)[0]))
    for action in np.random.default_rng(0).uniform(-1, 1, (5, *ours.action_space.shape)):
        obs, reward, *_ = ours.step(np.float32(action))
        expected = theirs.step(np.float32(action))
        assert np.array_equal(obs, np.float32(expected[0])) and reward == expected[1]


def reward_at(env, **changes):
    """Reward in the model's own pose with these entries of qpos or qvel: name={index: value}."""
    with env.physics.reset_context():
        for name, values in changes.items():
            for i, value in values.items():
                getattr(env.physics.data, name)[i] = value
    return env.suite.task.get_reward(env.physics)


def test_cheetah_by_hand():
    """The whole body moves at one speed."""
    expected = {"walk": (0.5, 1, 0, 0), "walk_backward": (0, 0, 0.5, 1), "run_backward": (0, 0, 0.1, 1)}
    for task, rewards in expected.items():
        env = mood.SuiteTask("cheetah", task)
        found = [reward_at(env, qvel={0: speed}) for speed in (1, 5, -1, -20)]
        np.testing.assert_allclose(found, rewards, atol=1e-9)


def test_walker_spin_by_hand():
    """The body turns as one about the y axis through its root: angular momentum is inertia times rate, with the
    inertia by Steiner's theorem."""
    env = mood.SuiteTask("walker", "spin")
    mass, data = env.physics.model.body_mass, env.physics.data  # in the model's own pose at first
    x, _, z = (data.xipos - mass @ data.xipos / mass.sum()).T
    axes = data.ximat.reshape(-1, 3, 3)[:, 1]  # the world's y axis in the axes of each body's inertia
    inertia = (mass * (x**2 + z**2) + (axes**2 * env.physics.model.body_inertia).sum(1)).sum()
    for momentum, reward in ((4, 0.4), (-4, 0), (25, 1)):
        assert reward_at(env, qvel={2: momentum / inertia}) == pytest.approx(reward, abs=1e-6)
    assert reward_at(env, qvel={0: 5}) == pytest.approx(0, abs=1e-9)  # moves but does not turn


def test_quadruped_by_hand():
    """Turned about its x axis, its centre of mass at a height; motion changes nothing."""
    jump, stand = (mood.SuiteTask("quadruped", task) for task in ("jump", "stand"))
    share = jump.physics.model.body_mass / jump.physics.model.body_mass.sum()
    for angle in np.deg2rad([0, 60, 90, 180]):
        pose = dict(enumerate([np.cos(angle / 2), np.sin(angle / 2), 0, 0], start=3))
        reward_at(jump, qpos={2: 0, **pose})
        center = share @ jump.physics.data.xipos[:, 2]
        upright = (1 + np.cos(angle)) / 2
        for height, jumped in ((0.5, 0.75), (0, 0.5), (-1.5, 0), (1, 1), (3, 1)):
            pose[2] = height - center
            assert reward_at(jump, qpos=pose, qvel={0: 3}) == pytest.approx(upright * jumped, abs=1e-9)
            assert reward_at(stand, qpos=pose) == pytest.approx(upright, abs=1e-9)


# Datasets -----------------------------------------------------------------------------------------
def test_mixture(tmp_path, capsys):
    """A tenth of each source by whole episodes, the same ones for both targets and in a part of the mixture; rewards
    of the target, nothing else changed, and the returns that score 0 and 100. An offline script learns from it."""
    env = gym.make("mood:walker-stand-v0")
    logs = [[drive(env.unwrapped, 100 * k + n, T=3 + n % 4) for n in range(20)] for k in range(2)]
    sources = [write_log(tmp_path / "logs" / f"source-v{k}", log, env) for k, log in enumerate(logs)]
    made = {}
    for name, target, parts in (("a-v0", "run", sources), ("b-v0", "spin", sources), ("c-v0", "run", sources[1:])):
        folder = tmp_path / "made" / name
        main("--domain", "walker", "--target", target, "--sources", *parts, "--out", folder)
        made[name] = read(folder)
        metadata = minari.MinariDataset(folder / "data").storage.metadata
        assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (0, {"run": 730, "spin": 990}[target])
        assert metadata["total_episodes"] == 2 * len(parts) and "env_spec" not in metadata
        task = mood.SuiteTask("walker", target)
        for i, episode in enumerate(made[name], 4 - 2 * len(parts)):
            log = logs[i // 2]
            (found,) = [x for x in log if np.array_equal(x[0], episode.observations)]
            np.testing.assert_allclose(episode.actions, found[1], atol=1e-7)
            np.testing.assert_allclose(episode.rewards, mood.relabel(task, found[3], found[1]), atol=1e-6)
            assert not episode.terminations.any() and [*episode.truncations.nonzero()[0]] == [len(found[1]) - 1]
    for one, other in zip([*made["a-v0"], *made["a-v0"][2:]], [*made["b-v0"], *made["c-v0"]]):
        np.testing.assert_array_equal(one.observations, other.observations)
    assert "--dataset" in capsys.readouterr().out.splitlines()[-1]

    flags = *harness.small("asac"), "--num-updates", 20, "--eval-episodes", 1, "--env-id", "mood:walker-run-v0"
    done = harness.run("asac", *flags, "--dataset", tmp_path / "made" / "a-v0", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = harness.read_evaluations(tmp_path / "run")
    assert rows["length"] == 1000 and rows["normalized_score"] == pytest.approx(rows["return"] / 7.3)


@pytest.mark.parametrize("script", ["asac", "awac", "iql_scaled", "td3_bc_scaled"])
def test_preset(script, tmp_path):
    """The paper's networks for MOOD, on the embedded mixture: simple and large, 5 critics. Given flags come first."""
    assert harness.load(script).Args(preset="mood", num_critics=3).num_critics == 3
    flags = "--preset", "mood", "--dataset", "mood/walker-run-v0", "--eval-episodes", 0, "--batch-size", 4
    harness.run_main(script, *flags, "--num-updates", 20, "--log-every", 20, "--run-dir", tmp_path / "run")
    args = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    settings = [args[name] for name in ("architecture", "num_critics", "pessimism")]
    assert settings == ["simple-large", 5, 0.5]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    shapes = [x.shape for name, x in checkpoint.items() if name.startswith("critic.weights")]
    assert shapes == [(5, 30, 256), (5, 256, 256), (5, 256, 256), (5, 256, 1)]


def test_td3_logs_a_custom_task(tmp_path):
    """... from which mood.py gives its rewards again: a humanoid's, too, whose actions count."""
    for domain, task, lengths in (("cheetah", "run_backward", [1000, 5]), ("humanoid", "stand", [25])):
        folder = tmp_path / domain / "log-v0"
        flags = "--learning-starts 5000 --hidden-sizes 4 --eval-episodes 0 --device cpu --num-steps".split()
        done = harness.forked("td3", "--env-id", f"mood:{domain}-{task}-v0", *flags, sum(lengths),
                              "--run-dir", tmp_path / domain / "run", "--save-replay", folder)  # fmt: skip
        assert done.returncode == 0, done.stderr
        out = tmp_path / domain / "made-v0"
        main("--domain", domain, "--target", task, "--sources", folder, "--share", 1, "--out", out)
        assert [len(episode) for episode in read(out)] == lengths
        for logged, episode in zip(read(folder), read(out), strict=True):
            np.testing.assert_allclose(episode.rewards, logged.rewards, rtol=0, atol=1e-6)
            assert np.array_equal(episode.actions, logged.actions) and not logged.terminations.any()


@pytest.mark.parametrize("domain", ["walker", "quadruped"])
def test_exorl(tmp_path, domain):
    """Files as ExoRL writes them: observations in the task's order, a first row without action, any reward."""
    env = mood.SuiteTask(domain, "stand")
    logs = [drive(env, n) for n in range(4)]
    (tmp_path / "buffer").mkdir()
    for n, (_, action, _, states) in enumerate(logs):
        task = suite.load(domain, "run", {"random": n}, {"flat_observation": True})
        steps = [task.reset(), *map(task.step, action)]
        obs = np.float32([step.observation["observations"] for step in steps])
        assert not np.array_equal(obs, logs[n][0])
        low, high = env.action_space.low, env.action_space.high
        action = np.pad(2 * (action - low) / (high - low) - 1, ((1, 0), (0, 0)))
        columns = {"observation": obs, "action": action, "physics": states}
        columns |= {"reward": np.full((7, 1), 9, np.float32), "discount": np.ones((7, 1), np.float32)}
        np.savez_compressed(tmp_path / "buffer" / f"episode_{n:06}_6.npz", **columns)
    out = tmp_path / "made" / "exorl-v0"
    main("--domain", domain, "--target", "stand", "--exorl", tmp_path, "--share", 1, "--out", out)
    for (obs, action, reward, _), episode in zip(logs, read(out), strict=True):
        np.testing.assert_array_equal(episode.observations, obs)
        np.testing.assert_allclose(episode.actions, action, atol=1e-6)
        np.testing.assert_allclose(episode.rewards, reward, atol=1e-6)


def test_what_is_missing_or_wrong(tmp_path, monkeypatch):
    env, cheetah = (gym.make(f"mood:{name}-run-v0") for name in ("walker", "cheetah"))
    *columns, states = episode = drive(env.unwrapped, 0)
    late = np.concatenate([states[:1], states[:-1]])  # each state one step after its observation
    write_log(tmp_path / "logs" / "late-v0", [(*columns, late)], env)
    write_log(tmp_path / "logs" / "none-v0", [episode], env, physics=False)
    write_log(tmp_path / "logs" / "cheetah-v0", [drive(cheetah.unwrapped, 0)], cheetah)
    out = "--out", tmp_path / "made" / "x-v0"
    for flags, message in (
        (["--sources", tmp_path / "logs" / "late-v0", *out], "not those of its physics"),
        (["--sources", tmp_path / "logs" / "none-v0", *out], "no physics to relabel"),
        (["--sources", tmp_path / "logs" / "cheetah-v0", *out], r"\(17,\), .*\(24,\), .*give logs of this robot"),
        (["--exorl", tmp_path / "nothing", *out], "no .npz files"),
        (["--out", tmp_path], "Minari cannot name"),
        (["--out", tmp_path / "logs" / "none-v0"], "is there already"),
        (out, "nothing to make data of"),
        (["--target", "fly", *out], "has the tasks"),
        (["--share", "0", *out], "share"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main(*flags)
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(mood, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^error: .*pip install dm-control==1.0.44$"):
        gym.make("mood:walker-run-v0")
