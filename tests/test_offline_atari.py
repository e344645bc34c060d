"""The five offline Atari scripts against numpy and numbers by hand: losses, projection, whole updates, seeds, what a run
feeds to an update, resume, learning on Catch.

The loader, the network, evaluation and TensorFlow's Adam are the text of rem_atari.py: test_rem_atari.py tests them.
"""

import copy
import math
import pickle
import re

import harness
import numpy as np
import pytest
import torch
from reference import random_frames

SCRIPTS = "rem_atari", "offline_dqn_atari", "ensemble_dqn_atari", "qrdqn_atari", "c51_atari"
qr, c51 = map(harness.load, SCRIPTS[3:])
every_script = pytest.mark.parametrize("script", SCRIPTS)
VARIANTS = [
    ("rem_atari", {}),
    ("rem_atari", {"padding": "valid"}),
    ("offline_dqn_atari", {}),
    ("offline_dqn_atari", {"optimizer": "rmsprop", "optimizer_eps": 1e-5}),
    ("ensemble_dqn_atari", {}),
    ("ensemble_dqn_atari", {"averaged_target": True}),
    ("qrdqn_atari", {}),
    ("c51_atari", {"num_atoms": 7, "v_max": 1.2}),
]

A = 3  # actions of the small agents below
SMALL = {"channels": (2, 3, 2), "hidden_size": 5, "batch_size": 3, "device": "cpu"}
HEADS = {"rem_atari": {"num_heads": 4}, "ensemble_dqn_atari": {"num_heads": 4}, "qrdqn_atari": {"num_quantiles": 4}}


def make_agent(script, spread=None, **flags):
    """Args and agent. With `spread` all parameters are drawn anew: targets and online networks differ."""
    module = harness.load(script)
    args = module.Args(**{**SMALL, **HEADS.get(script, {}), **flags})
    agent = module.Agent(A, args)
    torch.manual_seed(7)
    for parameter in agent.parameters() if spread else ():
        parameter.data.normal_(0, spread)
    return args, agent


@torch.no_grad()
def set_constant(network, values):
    """Makes a network return values (A, K) for every state."""
    for parameter in network.parameters():
        parameter.zero_()
    network.biases[-1].copy_(torch.tensor(values).flatten().expand_as(network.biases[-1]))


# Settings -----------------------------------------------------------------------------------------
@every_script
def test_defaults(script):
    """Those of the papers and their code, in updates where they count agent steps of 4 an update."""
    args = vars(harness.load(script).Args())
    expected = {
        "gamma": 0.99, "batch_size": 32, "target_every": 2_000, "padding": "same", "channels": (32, 64, 64),
        "hidden_size": 512, "num_updates": 12_500_000, "eval_every": 62_500, "files_every": 62_500,
    }  # fmt: skip
    expected |= {
        "rem_atari": {"num_heads": 200, "learning_rate": 5e-5, "adam_eps": 3.125e-4},
        "offline_dqn_atari": {"optimizer": "adam", "learning_rate": 5e-5, "optimizer_eps": 3.125e-4},
        "ensemble_dqn_atari": {"num_heads": 200, "averaged_target": False, "learning_rate": 5e-5, "adam_eps": 3.125e-4},
        "qrdqn_atari": {"num_quantiles": 200, "learning_rate": 5e-5, "adam_eps": 3.125e-4},
        "c51_atari": {"num_atoms": 51, "v_max": 10.0, "learning_rate": 2.5e-4, "adam_eps": 3.125e-4},
    }[script]
    assert {name: args[name] for name in expected} == expected


@every_script
def test_first_weights(script):
    """Glorot's bound for one value an action, sqrt(sqrt(3) / fan_in) for many; zero biases; a seed's own weights; the
    target is a copy. C51's atoms are evenly spaced."""
    agent, alone = [make_agent(script, channels=(32, 8, 8), hidden_size=64, num_seeds=n, seed=2 - n)[1] for n in (2, 1)]
    heads = {"offline_dqn_atari": 1, "c51_atari": 51}.get(script, 4)
    assert agent.network(random_frames(2)[0]).shape == (2, 3, A, heads)
    fans = (256, 2048), (512, 128), (72, 72), (8 * 121, 64), (64, A * heads)
    for i, (fan_in, fan_out) in enumerate(fans):
        weight = agent.network.weights[i]
        bound = math.sqrt(6 / (fan_in + fan_out) if script == "offline_dqn_atari" else math.sqrt(3) / fan_in)
        assert 0.96 * bound < weight.abs().max() <= 1.0001 * bound and not agent.network.biases[i].any()
        assert torch.equal(weight[1], alone.network.weights[i][0]) and not torch.equal(weight[0], weight[1])
        assert torch.equal(weight, agent.target_network.weights[i])
    if script == "c51_atari":
        torch.testing.assert_close(agent.atoms, 0.4 * torch.arange(-25, 26))


# Losses by hand -----------------------------------------------------------------------------------
def test_quantile_huber():
    """All theta = q, all y at a distance of 1/2, N = 200: N u^2 / 4 = 12.5. Low quantiles that are too high weigh
    most, high ones that are too low; beyond 1 the slope is 1."""
    q = torch.full((1, 2, 200), 3.0)
    for distance in (0.5, -0.5):
        torch.testing.assert_close(qr.quantile_huber(q, q + distance), torch.full((1, 2), 12.5))
    low_too_high = qr.quantile_huber(torch.tensor([[[0.5, 0.0]]]), torch.zeros(1, 1, 2)).item()  # tau = 1/4
    high_too_high = qr.quantile_huber(torch.tensor([[[0.0, 0.5]]]), torch.zeros(1, 1, 2)).item()  # tau = 3/4
    assert (low_too_high, high_too_high) == (pytest.approx(0.75 * 0.125), pytest.approx(0.25 * 0.125))
    sums = qr.quantile_huber(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 4.0]]]))  # by hand: i first, then j
    assert sums.item() == pytest.approx(0.5 * (0 + 0.25 * 2.5) + 0.5 * (0.25 * 0.5 + 0.75 * 1.5))


def numpy_project(returns, probability, atoms):
    """Algorithm 1 of the C51 paper for one transition, (K,) each: return by return, its two neighbours. A return on an
    atom, for which that algorithm's two shares are 0, stays there."""
    mass = np.zeros(len(atoms))
    for y, p in zip(returns, probability):
        b = min(max(0, (y - atoms[0]) / (atoms[1] - atoms[0])), len(atoms) - 1)
        low, high = math.floor(b), math.ceil(b)
        mass[low] += p * (high - b) + p * (low == high)
        mass[high] += p * (b - low)
    return mass


def test_projection():
    """By hand on atoms -1, 0, 1: 0.25 goes to 0 and 1 as 3 to 1, what is outside to the ends. The numbers of the spec:
    as it is by r = 0 and gamma = 1; an end by r = 0 on atom 25; r = 20 on the last one. And against numpy."""
    atoms = torch.tensor([-1.0, 0.0, 1.0])
    moved = c51.project(torch.tensor([[[-9.0, 0.25, 1.5]]]), torch.tensor([[[0.5, 0.4, 0.1]]]), atoms)
    torch.testing.assert_close(moved, torch.tensor([[[0.5, 0.3, 0.2]]]))
    atoms = torch.linspace(-10, 10, 51)
    probability = torch.rand(1, 40, 51, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(c51.project(atoms.expand(1, 40, 51), probability, atoms), probability, atol=1e-6, rtol=0)
    for value, atom in ((0.0, 25), (20.0, 50), (-20.0, 0)):
        assert c51.project(torch.full((1, 40, 51), value), probability, atoms)[0, :, atom].sum() == pytest.approx(40)
    returns = 1.0 + 0.99 * atoms + torch.linspace(-12, 12, 40)[:, None]
    moved = c51.project(returns[None], probability, atoms)[0].numpy()
    for ours, row in zip(moved, zip(returns.numpy(), probability[0].numpy())):
        np.testing.assert_allclose(ours, numpy_project(*row, np.linspace(-10, 10, 51)), atol=2e-6)


@every_script
def test_policies(script):
    """By the mean of the heads, or of the distributions, not by a vote or by the likeliest; pickled as they are."""
    module = harness.load(script)
    if script == "c51_atari":  # means 0.9, 1.1, 1 of returns -3, -1, 1, 3
        _, agent = make_agent(script, num_seeds=2, num_atoms=4, v_max=3.0)
        policy = c51.GreedyCategoricalPolicy(agent.network, agent.atoms)
        values = np.log([[0.35, 1e-9, 1e-9, 0.65], [0.05, 0.05, 0.7, 0.2], [1e-9, 1e-9, 1, 1e-9]]).tolist()
    else:
        _, agent = make_agent(script, num_seeds=2)
        policy = module.GreedyPolicy(agent.network)
        values = [[9.0, 0, 0, 0], [3, 3, 3, 3], [8, 0, 0, 1]] if script in HEADS else [[0.0], [3.0], [1.0]]
    set_constant(agent.network, values)
    assert pickle.loads(pickle.dumps(policy))(random_frames(2)[0]).tolist() == [[1, 1, 1], [1, 1, 1]]


# Whole updates: losses, their gradients by the values, and optimizers in numpy --------------------
def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def loss_and_gradient(script, args, q, next_q, action, reward, mask, mixture):
    """From the equations, transition by transition: q, next_q (B, A, K) -> loss, its gradient (B, A, K) by q. Of
    huber(u) = slope (u - slope / 2) the slope is u, at most 1 in size."""
    if script == "rem_atari":  # DQN of one mixture
        mixed, next_mixed = q @ mixture[:, None], next_q @ mixture[:, None]
        loss, grad = loss_and_gradient("offline_dqn_atari", args, mixed, next_mixed, action, reward, mask, None)
        return loss, grad * mixture
    B, _, K = q.shape
    grad, loss = np.zeros_like(q), 0.0
    for b in range(B):
        a, bootstrap = action[b], args.gamma * mask[b]
        if script == "c51_atari":
            atoms = np.linspace(-args.v_max, args.v_max, K)
            star = np.argmax(softmax(next_q[b]) @ atoms)
            mass = numpy_project(reward[b] + bootstrap * atoms, softmax(next_q[b, star]), atoms)
            loss -= mass @ np.log(softmax(q[b, a])) / B
            grad[b, a] = (softmax(q[b, a]) - mass) / B
        elif script == "qrdqn_atari":
            star = np.argmax([next_q[b, other].mean() for other in range(A)])
            for i in range(K):
                u = reward[b] + bootstrap * next_q[b, star] - q[b, a, i]
                weight, slope = np.abs((i + 0.5) / K - (u < 0)), np.clip(u, -1, 1)
                loss += (weight * slope * (u - slope / 2)).mean() / B
                grad[b, a, i] = -(weight * slope).mean() / B
        else:  # DQN is an ensemble of one
            best = [max(next_q[b, :, k]) for k in range(K)]
            if getattr(args, "averaged_target", False):
                best = K * [max(next_q[b, other].mean() for other in range(A))]
            u = q[b, a] - (reward[b] + bootstrap * np.array(best))
            slope = np.clip(u, -1, 1)
            loss += (slope * (u - slope / 2)).mean() / B
            grad[b, a] = slope / K / B
    return loss, grad


def numpy_step(args, moments, key, p, g):
    """A step of Adam or centred RMSProp as TensorFlow has them, on one array."""
    adam = getattr(args, "optimizer", "adam") == "adam"
    eps = getattr(args, "optimizer_eps", None) or args.adam_eps
    b1, b2 = (0.9, 0.999) if adam else (0.95, 0.95)
    m, v, t = moments.get(key, (0.0, 0.0 if adam else 1.0, 0))
    m, v, t = moments[key] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, t + 1
    if adam:
        return p - args.learning_rate * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    return p - args.learning_rate * g / np.sqrt(v - m**2 + eps)


@pytest.mark.parametrize("script, flags", VARIANTS, ids=str)
def test_updates_equal_numpy(script, flags):
    """Five updates of two seeds, targets copied after the third: losses and all weights of both networks. Seed 1 alone
    learns the same from its own batches: seeds never mix. (test_rem_atari.py has the network in numpy.)"""
    module = harness.load(script)
    flags = {"learning_rate": 3e-3, **flags}
    args, agent = make_agent(script, 0.15, num_seeds=2, **flags)
    alone_args, alone = make_agent(script, seed=1, **flags)
    slow, moments = copy.deepcopy(agent), {}  # weights that numpy moves
    for ours, theirs in zip(alone.parameters(), agent.parameters()):
        ours.data.copy_(theirs[1:2])
    for n in range(5):
        obs, action, reward, next_obs, mask = batch = random_frames(S=2, seed=n)
        reward *= 2  # so that errors are beyond 1, too
        mixture = torch.rand(2, 4, generator=torch.Generator().manual_seed(n)).softmax(-1)
        if script == "rem_atari":
            batch = *batch, mixture
        metrics = module.update(agent, *batch, args)
        module.update(alone, *[x[1:2] for x in batch], alone_args)
        values = slow.network(obs)
        q, next_q = np.float64(values.detach()), np.float64(slow.target_network(next_obs))
        columns = [x.numpy() for x in (action, reward, mask, mixture)]
        pairs = [loss_and_gradient(script, args, *[x[s] for x in (q, next_q, *columns)]) for s in (0, 1)]
        losses, gradients = zip(*pairs)
        np.testing.assert_allclose(next(iter(metrics.values())), losses, rtol=1e-4)
        weights = list(slow.network.parameters())
        gradients = torch.autograd.grad(values, weights, torch.tensor(np.stack(gradients), dtype=torch.float32))
        for i, (p, gradient) in enumerate(zip(weights, gradients)):
            p.data.copy_(torch.from_numpy(numpy_step(args, moments, i, np.float64(p.detach()), np.float64(gradient))))
        if n == 2:
            slow.target_network.load_state_dict(slow.network.state_dict())
            module.synchronize(agent)
            module.synchronize(alone)
        for ours, theirs, expected in zip(*[x.parameters() for x in (alone, agent, slow)]):
            torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(ours[0], theirs[1], rtol=1e-4, atol=1e-6)


# Runs ---------------------------------------------------------------------------------------------
@every_script
def test_what_a_run_feeds_to_an_update(monkeypatch, tmp_path, script):
    """The loader's batches row by row; targets are copied in time; a run that goes on ends as one that did not stop."""
    module = harness.load(script)
    update, seen = module.update, []

    def recording(agent, *inputs):
        metrics = update(agent, *inputs)
        pairs = zip(agent.network.parameters(), agent.target_network.parameters())
        seen.append((inputs, [torch.equal(*pair) for pair in pairs]))
        return metrics

    monkeypatch.setattr(module, "update", recording)
    flags = "--channels 2 3 2 --hidden-size 8 --batch-size 4 --padding valid --device cpu --dataset atari/catch"
    flags += " --env-id catch:Catch-v0 --num-seeds 2 --target-every 40 --eval-every 60 --log-every 20 --eval-episodes 2"
    flags = flags.split() + [f"--{name.replace('_', '-')}=4" for name in HEADS.get(script, ())]
    harness.run_main(script, *flags, "--num-updates", 120, "--run-dir", tmp_path / "whole")
    args = module.Args(dataset=("atari/catch",), batch_size=4, num_updates=120, device="cpu")
    replay = module.LoggedFrames(module.load_replay(args)[0], args, 0)
    for n, ((obs, action, reward, next_obs, mask, *_), _) in enumerate(seen):
        if n % 20 == 0:
            actions, rewards, masks, *frames = replay.draw(range(2), n, 4)
        assert torch.equal(obs, frames[n % 20][:, :, :4]) and torch.equal(next_obs, frames[n % 20][:, :, 1:])
        for x, column in zip((action, reward, mask), (actions, rewards, masks)):
            assert torch.equal(x, column[n % 20])
    assert len(seen) == 120 and not any(any(same) for n, (_, same) in enumerate(seen) if n % 40)
    harness.run_main(script, *flags, "--num-updates", 60, "--run-dir", tmp_path / "half")
    for num_updates in 120, 60:  # fewer than there are: nothing to do
        harness.run_main(script, "--resume", tmp_path / "half", "--num-updates", num_updates)
    ours, theirs = [torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in ("half", "whole")]
    for name, x in theirs["agent"].items():
        assert torch.equal(ours["agent"][name], x), name
        if name.startswith("target_network"):  # copied after update 120, too
            assert torch.equal(x, theirs["agent"][name.replace("target_", "")])
    csv = (tmp_path / "half" / "evaluations.csv").read_text()
    assert csv == (tmp_path / "whole" / "evaluations.csv").read_text() and csv.count("\n") == 1 + 2 * 2 * 2


@every_script
def test_learns_catch(tmp_path, capsys, script):
    """From a log of return -0.31 to 0.8 and more, with the small network of the docstring's command. C51, which has a
    policy of its own, is run as a user does."""
    run = tmp_path / "run"
    flags = re.search(r"(--channels .*--target-every 100)", harness.load(script).__doc__, re.DOTALL)[1].split()
    flags += "--num-updates 1000 --batch-size 16 --eval-every 1000 --eval-episodes 40 --device cpu --dataset atari/catch".split()
    flags += ["--env-id", "catch:Catch-v0", "--run-dir", run]
    if script == "c51_atari":
        done = harness.run(script, *flags, PYTHONPATH=str(harness.ROOT / "tests"))
        assert done.returncode == 0 and "mean return -0.31" in done.stdout
    else:
        harness.run_main(script, *flags)
        assert "mean return -0.31" in capsys.readouterr().out
    assert np.loadtxt(run / "evaluations.csv", delimiter=",", skiprows=1)[:, 3].mean() >= 0.8
