"""rem_online_atari.py: mixtures, update, who plays an episode, random actions, what is stored and logged, seeds, runs,
learning on Catch; dqn_atari.py, which plays alike: random actions, RMSProp, what updates get. What is the same text in
rem_atari.py (test_copies.py) has more tests in test_rem_atari.py."""

import itertools
import json
from unittest import mock

import catch
import gymnasium as gym
import harness
import numpy as np
import pytest
import torch
from reference import nature_network

rem = harness.load("rem_online_atari")
offline = harness.load("rem_atari")

A = 3  # actions of Catch
TINY = "--env-id catch:Catch-v0 --channels 2 3 2 --hidden-size 5 --batch-size 3 --padding valid --device cpu".split()
TINY += ["--replay-size", 2000, "--eval-episodes", 0]
online = pytest.mark.parametrize("script", ["rem_online_atari", "dqn_atari"])
both = pytest.mark.parametrize("baseline", [False, True], ids=["rem", "bootstrapped"])


class Loud(catch.Catch):  # with rewards of 3, and 2 on the way, which clipping takes to 1
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, 3 * reward + 2 * (self.ball_row == 2), terminated, truncated, info


gym.register("Loud-v0", entry_point=Loud)


def draw(seeds, step, **flags):
    return rem.random_mixtures(rem.random_generators(seeds, rem.DRAWS, step), rem.Args(device="cpu", **flags))


def run(folder, *flags, script="rem_online_atari"):
    harness.run_main(script, *TINY, *flags, "--run-dir", folder / "run")
    return folder / "run"


# The method ---------------------------------------------------------------------------------------
def test_flags():
    """Those of DQN, and online REM's own numbers."""
    ours, theirs = [set(vars(harness.load(script).Args()).items()) for script in ("rem_online_atari", "dqn_atari")]
    own = {"num_networks": 4, "bootstrapped": False, "learning_rate": 5e-5, "adam_eps": 0.001 / 32}
    assert ours - theirs == own.items() and {name for name, _ in theirs - ours} == {"learning_rate", "rmsprop_eps"}


def test_mixtures():
    """Normalised uniforms: of two the first is below 1/4 with probability 1/6, and not 1/4. The baseline's are the
    networks alone, each once; the first, which plays, is each as often as the others."""
    alpha = torch.cat([draw(range(40), step, num_networks=2) for step in range(250)])
    assert alpha.shape == (10_000, 1, 2, 1) and (alpha > 0).all() and (alpha.sum(2) - 1).abs().max() < 1e-6
    assert abs((alpha[:, 0, 0] < 0.25).float().mean() - 1 / 6) < 0.015 and abs(alpha[:, 0, 0].mean() - 0.5) < 0.01
    assert len(alpha.unique()) > 9_900 and torch.equal(draw([5, 6], 7)[1], draw([6], 7)[0])
    alone = torch.cat([draw(range(40), step, num_networks=3, bootstrapped=True) for step in range(100)])
    assert alone.shape == (4000, 1, 3, 3) and set(alone.unique().tolist()) == {0.0, 1.0}
    assert (alone.sum(2) == 1).all() and (alone.sum(3) == 1).all()
    np.testing.assert_allclose(alone[:, 0, :, 0].mean(0), 1 / 3, atol=0.03)


def numpy_loss(networks, targets, batch, alphas, gamma):
    """Loss of one seed, transition by transition and mixture by mixture, and the mean of the targets."""
    obs, action, reward, next_obs, not_terminated = batch
    values = [nature_network(parameters, obs) for parameters in networks]
    next_values = [nature_network(parameters, next_obs) for parameters in targets]
    terms = []
    for alpha, b in itertools.product(alphas, range(len(action))):
        best = max(sum(w * v[b, i] for w, v in zip(alpha, next_values)) for i in range(A))
        y = reward[b] + gamma * not_terminated[b] * best
        u = abs(sum(w * v[b, action[b]] for w, v in zip(alpha, values)) - y)
        terms.append((u**2 / 2 if u <= 1 else u - 0.5, y))
    return np.mean(terms, axis=0)


@both
def test_update(baseline):
    """Losses of two seeds; Adam's first step on parameters of every layer of every network, by differences of the
    loss; nothing moves the targets."""
    S, K, B = 2, 3, 5
    small = {"channels": (2, 3, 2), "hidden_size": 5, "padding": "valid", "device": "cpu", "replay_size": 10}
    args = rem.Args(num_networks=K, bootstrapped=baseline, num_seeds=S, gamma=0.9, learning_rate=1e-3, **small)
    agent = rem.Agent(A, args)
    torch.manual_seed(7)
    for parameter in agent.parameters():
        parameter.data.normal_(0, 0.2)
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (S, B, 5, 84, 84), dtype=np.uint8)
    action, reward, mask = rng.integers(A, size=(S, B)), rng.choice([-2, 0, 2], (S, B)), rng.random((S, B)) > 0.3
    batch = frames[:, :, :4], action, np.float32(reward), frames[:, :, 1:], np.float32(mask)
    mixtures = draw(range(S), 3, num_networks=K, bootstrapped=baseline)

    def parts(network, s):  # of a seed's networks
        parameters = [*network.weights, *network.biases]
        return [[p[s * K + k].detach().numpy().astype(float) for p in parameters] for k in range(K)]

    before = [parts(agent.network, s) for s in range(S)]
    targets = [parts(agent.target_network, s) for s in range(S)]
    metrics = rem.update(agent, *map(torch.from_numpy, batch), mixtures, args)
    alphas = [np.eye(K)] * S if baseline else mixtures[:, 0].mT.numpy()  # of a seed (J, K)
    for s in range(S):
        of_seed = targets[s], [x[s] for x in batch], alphas[s], 0.9
        found = [metrics[name][s].item() for name in ("loss/td", "value/target_q")]
        np.testing.assert_allclose(found, numpy_loss(before[s], *of_seed), rtol=1e-4)
        after = parts(agent.network, s)
        for k, i in np.ndindex(K, 10):
            p = before[s][k][i]
            place = np.unravel_index(rng.integers(p.size), p.shape)
            start = p[place]
            losses = [numpy_loss(before[s], *of_seed)[0] for p[place] in (start + 1e-6, start - 1e-6)]
            p[place] = start
            g = (losses[0] - losses[1]) / 2e-6
            expected = -1e-3 * 0.001**0.5 / 0.1 * 0.1 * g / (0.001**0.5 * abs(g) + args.adam_eps)
            assert after[k][i][place] - start == pytest.approx(expected, abs=1e-6 + 0.01 * abs(expected))
        assert all(map(np.array_equal, sum(parts(agent.target_network, s), []), sum(targets[s], [])))


# Play ---------------------------------------------------------------------------------------------
def play(tmp_path, *flags, values=None, script="rem_online_atari"):
    """frames, action, reward, ended of a run, (steps, S, ...); `values` (A, K): what its networks say to all frames."""
    seen = []
    module = harness.load(script)
    step, forward = module.Games.step, module.NatureNetwork.forward

    def recording(games, action):
        frames, before = games.obs[:, -1].copy(), games.returns * ~games.ended
        step(games, action)
        seen.append((frames, action.copy(), games.returns - before, games.ended.copy()))

    def saying(network, frames):
        if not values or not network.weights[0].requires_grad:  # the frozen ones do not play
            return forward(network, frames)
        return torch.tensor(values).expand(*frames.shape[:2], -1, -1)

    patch = mock.patch.object
    with patch(module.Games, "step", recording), patch(module.NatureNetwork, "forward", saying):
        run(tmp_path, *flags, script=script)
    return [np.stack(x) for x in zip(*seen)]


@both
def test_an_episode_is_played_by_one_mixture(tmp_path, baseline):
    """Network k wants action k, and 2 is the second best of both: only a mixture takes it. One action throughout; each
    as often as the others: with alpha_0 above 3/5, below 2/5, between."""
    flags = "--num-networks 2 --epsilon-steps 1 --epsilon 0 --learning-starts 0 --num-steps 1801 --num-seeds 2".split()
    flags += ["--update-every", 10**6] + ["--bootstrapped"] * baseline
    action = play(tmp_path, *flags, values=[[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]])[1]
    episodes = action[6:1800].reshape(299, 6, 2)  # without the first, which begins at random
    assert (episodes == episodes[:, :1]).all()
    counts = np.bincount(episodes[:, 0].flatten(), minlength=3) / (2 * 299)
    np.testing.assert_allclose(counts, [0.5, 0.5, 0] if baseline else [1 / 3] * 3, atol=0.06)
    assert 0.2 < (episodes[:, 0, 0] == episodes[:, 0, 1]).mean() < 0.7  # seeds have their own


@online
def test_random_actions(tmp_path, script):
    """All until learning starts, then fewer in a line, in the end one in five; a third of them look greedy."""
    flags = "--learning-starts 600 --epsilon-steps 2400 --epsilon 0.2 --num-steps 4200 --num-seeds 2"
    module = harness.load(script)
    K = 4 if script == "rem_online_atari" else 1
    values = [[0.0] * K, [1.0] * K, [0.0] * K]
    _, action, _, _ = play(tmp_path, *flags.split(), "--update-every", 10**6, values=values, script=script)
    shares = (action != 1).reshape(7, 1200).mean(1) * 3 / 2
    np.testing.assert_allclose(shares, [1, 0.9, 0.7, 0.5, 0.3, 0.2, 0.2], atol=0.07)
    shares = [module.share_of_random_actions(t, module.Args()) for t in (0, 20_000, 145_000, 270_000, 10**7)]
    np.testing.assert_allclose(shares, [1, 1, 0.505, 0.01, 0.01])


def test_what_is_stored_and_logged(tmp_path):
    """Rows of the memory in the order of play, three black ones before an episode, rewards clipped. The loader of
    rem_atari.py draws from the files what was played, and knows the scores."""
    flags = "--env-id Loud-v0 --replay-size 150 --num-steps 400 --learning-starts 60 --eval-episodes 2 --eval-every 200"
    steps = play(tmp_path, *flags.split(), "--save-replay", tmp_path / "log")
    frames, action, reward, ended = [x[:, 0] for x in steps]
    rows = []
    for t in range(400):
        if t == 0 or ended[t - 1]:
            rows += [(np.zeros((84, 84)), 0, 0, False)] * 3
        rows.append((frames[t], action[t], np.clip(reward[t], -1, 1), ended[t]))
    agent = harness.leaves(tmp_path / "run")
    for n in range(len(rows) - 150, len(rows)):
        stored = [agent[f"/agent/replay.{x}"][0, n % 150].numpy() for x in ("frame", "action", "reward", "terminal")]
        assert all(map(np.array_equal, stored, rows[n])) and agent["/agent/replay.add_count"] == len(rows)

    args = offline.Args(dataset=(str(tmp_path / "log"),), files_in_memory=9, device="cpu")
    files, returns = offline.load_replay(args)
    replay = offline.LoggedFrames(files, args, 0)
    played = [n for n in range(3, len(rows) - 1) if 3 <= n % 150 < 148 and rows[n][0].any()]
    assert len(replay.valid) == len(played) > 300 and returns.sum() == sum(rows[n][2] for n in played)
    for row, n in zip(replay.valid.tolist(), played):
        near = [rows[i][0] for i in range(n - 3, n + 2)][: 5 - rows[n][3]]
        np.testing.assert_array_equal(replay.frames[row - 3 : row - 3 + len(near)], near)
        assert [column[row].item() for column in replay.columns] == [*rows[n][1:3], not rows[n][3]]
    best = harness.read_evaluations(tmp_path / "run")["return"].reshape(2, 2).mean(1).max()
    found = json.loads((tmp_path / "log" / "replay.json").read_text()).values()
    assert list(found) == ["Loud-v0", pytest.approx(reward[:60].sum() / 10), best]


# Runs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", ["rem_online_atari", "rem_online_atari --bootstrapped", "dqn_atari"])
def test_updates_of_a_run(tmp_path, flags):
    """From play at random: the newest frames of a next state are those that follow. Each of the 4 steps per update draws
    its own mixtures; the targets are copied after every second."""
    script, *flags = flags.split()
    flags += "--num-steps 66 --learning-starts 20 --target-every 2 --num-seeds 2".split()
    with mock.patch.object(harness.load(script), "synchronize") as synchronize:
        _, inputs = harness.record_updates(script, *TINY, *flags, "--run-dir", tmp_path / "run")
    obs, next_obs, reward, not_terminated = [inputs[x] for x in ("obs", "next_obs", "reward", "not_terminated")]
    assert obs.shape == (11, 2, 3, 4, 84, 84) and synchronize.call_count == 6
    assert np.array_equal(obs[:, :, :, 1:], next_obs[:, :, :, :3]) and obs[:, :, :, 3].any()
    assert np.array_equal(reward != 0, not_terminated == 0) and 0 < not_terminated.mean() < 1
    if script == "rem_online_atari":
        baseline = "--bootstrapped" in flags
        assert inputs["mixtures"].shape == (11, 2, 1, 4, 4 if baseline else 1)
        assert np.allclose(inputs["mixtures"].sum(-2), 1) and (baseline or len(np.unique(inputs["mixtures"])) == 88)


@pytest.mark.parametrize("script", ["dqn_atari", "offline_dqn_atari"])
def test_rmsprop_of_tensorflow(script):
    """Gradients about 3, or about 0, for so long that their variance is far from the mean of their squares."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rmsprop = harness.load(script).TensorFlowRMSProp([p], 0.01, 0.1)
    expected, mean, square = np.zeros(2), np.zeros(2), np.ones(2)
    for n in range(60):
        gradient = np.array([3, 0]) + 0.1 * np.sin(n)
        p.grad = torch.from_numpy(gradient)
        rmsprop.step()
        mean, square = 0.95 * mean + 0.05 * gradient, 0.95 * square + 0.05 * gradient**2
        expected -= 0.01 * gradient / np.sqrt(square - mean**2 + 0.1)
        np.testing.assert_allclose(p.detach(), expected)
    assert square[0] > 5 * (square - mean**2)[0]


def test_seed_k_among_two_is_the_run_with_seed_k(tmp_path):
    flags = "--num-steps", 230, "--learning-starts", 30, "--target-every", 20, "--epsilon-steps", 100
    run(tmp_path / "together", *flags, "--seed", 3, "--num-seeds", 2)
    run(tmp_path / "alone", *flags, "--seed", 4)
    together, alone = [harness.leaves(tmp_path / name / "run") for name in ("together", "alone")]
    for name in filter(lambda name: "/agent/network" in name or "/agent/target" in name, alone):
        torch.testing.assert_close(together[name][4:], alone[name], rtol=1e-3, atol=1e-6)
    both, one = [x["/agent/replay.action"] for x in (together, alone)]
    assert torch.equal(both[1:], one) and not torch.equal(both[0], both[1])


def test_resume_and_evaluate(tmp_path, capsys):
    """A resumed run keeps what it knows and goes on with a new episode; Adam goes on counting."""
    folder = run(tmp_path, "--num-steps", 100, "--learning-starts", 20, "--eval-every", 50)
    first = harness.leaves(folder)
    harness.run_main("rem_online_atari", "--resume", folder, "--num-steps", 200, "--eval-episodes", 2)
    then = harness.leaves(folder)
    counts = [(x["/num_updates"], x["/optimizers/network/0/num_steps"]) for x in (first, then)]
    assert counts == [(100, 20), (200, 45)]  # steps and updates
    actions = [x["/agent/replay.action"][0, : 100 + 3 * 17] for x in (first, then)]
    assert torch.equal(*actions) and then["/agent/replay.terminal"][0, 150]
    harness.run_main("rem_online_atari", "--evaluate", folder)
    assert "policies of step 200" in capsys.readouterr().out


@online
def test_a_log_belongs_to_one_run(script, tmp_path, monkeypatch):
    """Its folder is made at the start, and named in full, so that a resume from elsewhere goes on with it."""
    monkeypatch.chdir(tmp_path)
    flags = "--num-steps", 40, "--learning-starts", 20, "--save-replay", "log"
    folder = run(tmp_path / "first", *flags, script=script)
    assert json.loads((folder / "config.json").read_text())["args"]["save_replay"] == str(tmp_path / "log")
    with pytest.raises(FileExistsError):
        run(tmp_path / "second", *flags, script=script)
    assert not (tmp_path / "second").exists()


def test_rem_learns_catch(tmp_path):
    flags = "--channels 4 8 8 --hidden-size 32 --batch-size 32 --learning-rate 2e-3 --adam-eps 1e-6 --num-networks 2"
    flags += " --num-steps 2500 --learning-starts 500 --epsilon-steps 1500 --epsilon 0 --target-every 50"
    flags += " --update-every 2 --eval-every 2500 --eval-episodes 40 --replay-size 4000"
    assert harness.read_evaluations(run(tmp_path, *flags.split()))["return"].mean() >= 0.8
