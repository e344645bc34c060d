"""Runs of sac.py and td3.py in an environment that keeps a log of its own: who acts, what is logged, what a
resumed run goes on with, seeds, learning. What they learn from a batch is tested in the scripts' own files."""

import os
from unittest import mock

import harness
import minari
import numpy as np
import pytest
import torch
from reference import LoggedEnv, logged_rows

LOGGED = "--env-id Logged-v0 --hidden-sizes 8 --batch-size 8 --eval-episodes 0 --device cpu".split()
ACT = {  # what a policy does, with its noise
    "sac": lambda agent, obs, noise: agent.actor.sample(obs, noise)[0],
    "td3": lambda agent, obs, noise: (agent.actor(obs) + 0.2 * noise).clip(-1, 1),
}


def main(script, *flags):
    """Runs main() in this process; returns the checkpoint."""
    LoggedEnv.logs.clear()
    with mock.patch.dict(os.environ):  # what main() sets ends with the run
        harness.run_main(script, *flags if "--resume" in flags else [*LOGGED, *flags])
    folder = flags[flags.index("--run-dir" if "--run-dir" in flags else "--resume") + 1]
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def read(folder):
    """Episodes of a dataset as Minari lists and loads it."""
    name = f"{folder.parent.name}/{folder.name}"
    with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=str(folder.parents[1])):
        assert name in minari.list_local_datasets()
        return list(minari.load_dataset(name).iterate_episodes())


@pytest.mark.parametrize("script", ACT)
def test_log_is_what_the_environments_saw(script, tmp_path):
    """Every step of every seed, with a mask that is 0 at terminations only; actions are random at first, then
    the policy's. The log has all episodes, of sac.py those of the first seed, in order, in the environment's
    own units, terminations and truncations apart, also the last ones, which the run cuts."""
    module = harness.load(script)
    folder = tmp_path / "logged" / "log-v3"
    flags = "--num-steps 60 --num-seeds 2 --learning-starts 30 --learning-rate 0".split()
    checkpoint = main(script, *flags, "--run-dir", tmp_path / "run", "--save-replay", folder)
    replay = checkpoint["agent"]["replay._extra_state"].numpy()
    assert replay.shape[1] == 60
    args = module.Args(hidden_sizes=(8,), num_seeds=2, device="cpu")
    agent = module.Agent(4, 2, args)  # has learned nothing
    draws = [module.draw((0, 1), module.EXPLORATION, n, 2, (1, 2), "cpu") for n in range(60)]
    for s in range(2):
        rows = logged_rows(s)
        np.testing.assert_allclose(replay[s, :, :12], rows, atol=1e-6)
        for n, (uniform, noise) in enumerate(draws):
            obs = torch.from_numpy(np.float32(rows[n, :4])).expand(2, 1, 4)
            expected = 2 * uniform[s] - 1 if n < 30 else ACT[script](agent, obs, noise)[s, 0].detach()
            np.testing.assert_allclose(rows[n, 4:6], expected, atol=1e-5)

    logs = LoggedEnv.logs[0] + (LoggedEnv.logs[1] if script == "td3" else [])
    assert [len(episode) for episode in LoggedEnv.logs[0]] == [7, 7, 5] * 3 + [3]
    for n, (episode, steps) in enumerate(zip(read(folder), logs, strict=True)):
        obs, action, reward, next_obs = map(np.array, zip(*steps))
        np.testing.assert_array_equal(episode.observations, np.concatenate([obs, next_obs[-1:]]))
        np.testing.assert_allclose(episode.actions, action, atol=1e-6)
        np.testing.assert_allclose(episode.rewards, reward, rtol=1e-6)
        assert [*episode.terminations.nonzero()[0], *episode.truncations.nonzero()[0]] == [len(steps) - 1]
        assert episode.terminations[-1] == (n % 10 % 3 == 2)


@pytest.mark.parametrize(
    "script, flags, counts",  # of each optimizer's steps: after 30 of the environment, after 50
    [
        ("sac", "", {"critic": (21, 41), "policy": (21, 41)}),
        ("td3", "--objective rnd", {"critic": (21, 41), "actor": (11, 21), "rnd": (21, 41)}),
        ("td3", "--algorithm ddpg", {"critic": (21, 41), "actor": (21, 41)}),
    ],
)
def test_resume_goes_on_with_a_new_episode(script, capsys, tmp_path, flags, counts):
    """... that the log keeps apart from the one the stop has cut. TD3's actor learns in every second update.
    The flags of the resume count."""
    flags += " --num-steps 30 --learning-starts 10"
    before = main(script, *flags.split(), "--run-dir", tmp_path / "run")
    resume = "--resume", tmp_path / "run", "--num-steps", 50, "--learning-rate", 0, "--save-replay"
    after = main(script, *resume, tmp_path / "all" / "log-v0")
    assert "from step 30 on, with a new episode" in capsys.readouterr().out
    assert after["num_updates"] == 50
    for name, steps in counts.items():
        assert tuple(x["optimizers"][name][0]["step"].item() for x in (before, after)) == steps, name
    if "rnd" in counts:
        assert after["agent"]["rnd.count"].item() == 41
    assert torch.equal(after["agent"]["critic.weights.1"], before["agent"]["critic.weights.1"])
    assert torch.equal(after["agent"]["replay._extra_state"][:, :30], before["agent"]["replay._extra_state"])
    assert [len(episode) for episode in read(tmp_path / "all" / "log-v0")] == [7, 7, 5, 7, 4] + [7, 7, 5, 1]


@pytest.mark.parametrize("script, flags", [("sac", []), ("td3", ["--objective", "rnd"])])
def test_seed_k_among_three_is_the_run_with_seed_k(script, flags, tmp_path):
    """The same random steps, to the bit, and the same agents after 50 updates."""
    runs = {}
    for seed, num_seeds in ((3, 3), (3, 1), (5, 1)):
        seeds = "--seed", seed, "--num-seeds", num_seeds, "--run-dir", tmp_path / f"{seed}-{num_seeds}"
        steps = "--num-steps", 69, "--learning-starts", 20
        runs[seed, num_seeds] = main(script, *steps, *flags, *seeds)["agent"]
    together = runs[3, 3]
    for k in (0, 2):
        alone = runs[3 + k, 1]
        for name, x in alone.items():
            torch.testing.assert_close(together[name][k * len(x) : (k + 1) * len(x)], x, rtol=1e-3, atol=1e-4)
        assert torch.equal(together["replay._extra_state"][k, :20], alone["replay._extra_state"][0, :20])
    assert not torch.allclose(together["replay._extra_state"][0], together["replay._extra_state"][2])


@pytest.mark.parametrize(
    "script, flags, reached",
    [
        ("sac", "--num-steps 3000 --target-update-rate 0.01 --eval-every 3000", -250),
        ("td3", "--num-steps 2500 --target-update-rate 0.02 --eval-every 2500", -350),
        ("td3", "--num-steps 2500 --target-update-rate 0.02 --eval-every 2500 --algorithm ddpg", -350),
    ],
)
def test_learns_to_swing_up(tmp_path, script, flags, reached):
    """Pendulum, whose returns are about -1,200 with a random policy."""
    flags += " --env-id Pendulum-v1 --learning-starts 400 --batch-size 64 --hidden-sizes 64 64"
    flags += " --learning-rate 2e-3 --device cpu --run-dir"
    flags = *flags.split(), tmp_path / "run"
    if script == "sac":  # td3.py is run like this in test_dm_control_in_workers
        done = harness.run("sac", *flags)
        assert done.returncode == 0, done.stderr
    else:
        harness.run_main(script, *flags)
    returns = harness.read_evaluations(tmp_path / "run")["return"]
    assert len(returns) == 10 and returns.mean() > reached
