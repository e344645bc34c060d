"""rvs_lds.py against numpy, numbers by hand and its own runs: returns to go, LDS weights, the update, conditioning."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch

rvs = harness.load("rvs_lds")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below, the condition included
CPU = torch.device("cpu")


def make_args(**flags):
    return rvs.Args(**{"hidden_sizes": (16, 12), "batch_size": 32, **flags})


def make_agent(args, spread=None, obs_dim=O, device="cpu"):
    """An RvSAgent of inputs that are normalised already. With `spread`, all parameters are drawn anew."""
    agent = rvs.RvSAgent(obs_dim, A, args, torch.device(device), 0.0, 1.0)
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(args, B=32, seed=0):
    """(S, B, O + A + 1) random examples with weights of average 1, and the hidden units to keep."""
    rng, S = np.random.default_rng(seed), args.num_seeds
    obs, action, weight = rng.normal(size=(S, B, O)), rng.uniform(-1, 1, (S, B, A)), rng.exponential(size=(S, B, 1))
    kept = torch.from_numpy(rng.random((S, B, sum(args.hidden_sizes))) >= args.dropout)
    return torch.from_numpy(np.concatenate([obs, action, weight], -1)).float(), kept


def make_dataset(returns, lengths, rewards=None, seed=0):
    """A Dataset of random observations and actions with these returns; by default, every step of an episode pays the
    same."""
    rng, N = np.random.default_rng(seed), sum(lengths)
    rewards = np.repeat(np.array(returns) / lengths, lengths) if rewards is None else rewards
    columns = rng.normal(size=(N, O)), rng.uniform(-1, 1, (N, A)), np.reshape(rewards, (N, 1)), np.zeros((N, O + 1))
    return rvs.Dataset(
        np.float32(np.concatenate(columns, 1)), np.array(lengths), np.float64(returns), O, A, {"id": None}
    )


def state_of(agent):
    """A copy of the state dict without the optimiser, whose step counter has no seed axis."""
    return {name: x.clone() for name, x in agent.state_dict().items() if not name.startswith("optimizers.")}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): rvs_lds's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["rvs_lds.py", *map(str, flags)])
        try:
            rvs.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


SMALL = "--hidden-sizes", 16, 12, "--batch-size", 16, "--device", "cpu", "--eval-workers", 0
BLIND = *SMALL, "--eval-episodes", 0


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same_checkpoint(run_dir, reference):
    """Bit-identical weights, optimiser, normaliser, generators; the same update."""
    ours, theirs = checkpoint_of(run_dir), checkpoint_of(reference)
    assert ours["num_updates"] == theirs["num_updates"] and ours["agent"].keys() == theirs["agent"].keys()
    assert not [name for name in ours["agent"] if not torch.equal(ours["agent"][name], theirs["agent"][name])]
    assert all(torch.equal(a, b) for a, b in zip(ours["generators"], theirs["generators"], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Returns to go, the spec's 9(g)
# ---------------------------------------------------------------------------------------------------------------------


def test_returns_to_go_by_hand():
    """r = [1, 2, 3]: 6, 5, 3; with gamma 0.5: 2.75, 3.5, 3; per step left of an episode of 5: 1.2, 1.25, 1."""
    r, lengths = np.array([1.0, 2, 3, 9, 9, 9, 9, 9]), np.array([3, 5])
    G = rvs.returns_to_go(r, lengths, np.array([6.0, 45]))
    assert G[:3].tolist() == [6, 5, 3] and G[3:].tolist() == [45, 36, 27, 18, 9]
    assert rvs.returns_to_go(r, lengths, np.array([6.0, 45]), 0.5)[:3].tolist() == [2.75, 3.5, 3]
    assert rvs.conditions_of(G, lengths, "return")[:, 0].tolist() == G.tolist()
    np.testing.assert_allclose(rvs.conditions_of(G, lengths, "average")[:, 0], [1.2, 1.25, 1, 9, 9, 9, 9, 9])
    assert rvs.conditions_of(G, lengths, "none").shape == (8, 0)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_against_a_plain_loop(gamma):
    """... that never leaves its episode, among them some of a single step; the argument stays as it was."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 7, 1, 1, 30, 2, 13])
    rewards = np.float32(rng.normal(size=lengths.sum()))
    before, expected, returns = rewards.copy(), [], []
    for episode in np.split(np.float64(rewards), np.cumsum(lengths)[:-1]):
        returns.append(episode.sum())
        expected += [sum(gamma**k * r for k, r in enumerate(episode[t:])) for t in range(len(episode))]
    G = rvs.returns_to_go(rewards, lengths, np.array(returns), gamma)
    np.testing.assert_allclose(G, expected, atol=1e-12)
    assert G.dtype == np.float64 and np.array_equal(rewards, before)


def test_the_reward_of_a_step_without_transition_counts():
    """The second episode's return is 2.5 more than its rewards: a last step of reward 2.5."""
    rewards, lengths = np.array([1.0, 1, 1, 1, 1]), np.array([2, 3])
    G = rvs.returns_to_go(rewards, lengths, np.array([2.0, 5.5]))
    assert G.tolist() == [2, 1, 5.5, 4.5, 3.5]
    assert rvs.returns_to_go(rewards, lengths, np.array([2.0, 5.5]), 0.5)[2:].tolist() == [2.0625, 2.125, 2.25]


# ---------------------------------------------------------------------------------------------------------------------
# LDS, the spec's 10(g)
# ---------------------------------------------------------------------------------------------------------------------


def reflected_kernel(size, sigma):
    """The LDS code's kernel, literally: an impulse, reflected at both ends, under a Gaussian that ends at 4 sigma."""
    impulse, reach = np.zeros(size), int(4 * sigma + 0.5)
    impulse[size // 2] = 1
    padded = np.pad(impulse, reach, mode="symmetric")
    gauss = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]
    out = np.array([sum(gauss[j] * padded[i + j] for j in range(2 * reach + 1)) for i in range(size)])
    return out / out.max()


def test_smoothing_kernel():
    folded = [0.858285, 0.945828, 1, 0.945828, 0.858285]
    np.testing.assert_allclose(rvs.smoothing_kernel(5, 2.0), folded, atol=5e-7)
    plain = [0.606531, 0.882497, 1, 0.882497, 0.606531]
    np.testing.assert_allclose(rvs.smoothing_kernel(5, 2.0, "plain"), plain, atol=5e-7)
    np.testing.assert_allclose(rvs.smoothing_kernel(9, 1.0), rvs.smoothing_kernel(9, 1.0, "plain"), atol=1e-6)
    for size, sigma in ((1, 2.0), (3, 0.01), (5, 0.7), (7, 9.0), (21, 3.0)):
        np.testing.assert_allclose(rvs.smoothing_kernel(size, sigma), reflected_kernel(size, sigma), rtol=1e-12)


LABELS = np.repeat([0.05, 0.25, 1.0], [8, 1, 1])  # in 5 bins on [0.05, 1]: 8, 1, 0, 0, 1; the last on the very edge


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, [0.555861, 0.580467, 4.972641]),
        ({"kernel": "plain"}, [0.556033, 0.612776, 4.938961]),
        ({"kernel_size": 1}, [0.416667, 3.333333, 3.333333]),
        ({"power": 0.5}, [0.781176, 0.802230, 2.948359]),
        ({"power": 0.0, "kernel_size": 1}, [1, 1, 1]),
    ],
)
def test_lds_weights_by_hand(flags, expected):
    arguments = {"num_bins": 5, "kernel_size": 5, "sigma": 2.0, **flags}
    bins, counts, smoothed = rvs.smoothed_density(LABELS, **arguments)
    assert counts.tolist() == [8, 1, 0, 0, 1] and bins.tolist() == [0] * 8 + [1, 4]
    if not flags:
        np.testing.assert_allclose(smoothed, [8.945828, 8.566621, 8.670395, 1.804113, 1.0], atol=5e-7)
    np.testing.assert_allclose(rvs.lds_weights(LABELS, **arguments), np.repeat(expected, [8, 1, 1]), atol=5e-7)


@pytest.mark.parametrize("num_bins, kernel_size, sigma", [(100, 5, 2.0), (37, 9, 1.0), (3, 7, 2.0), (1, 5, 2.0)])
def test_lds_weights_against_a_plain_convolution(num_bins, kernel_size, sigma):
    """On a long tail with empty bins: counts by a loop, sum over the window by a loop, zeros beyond the ends."""
    y = np.random.default_rng(0).lognormal(3, 1.5, size=500)
    edges = np.linspace(y.min(), y.max(), num_bins + 1)
    bins = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, num_bins - 1)
    counts, half, kernel = np.bincount(bins, minlength=num_bins), kernel_size // 2, reflected_kernel(kernel_size, sigma)
    density = [
        sum(kernel[d + half] * counts[b + d] for d in range(-half, half + 1) if 0 <= b + d < num_bins)
        for b in range(num_bins)
    ]
    expected = 1 / np.array([density[b] for b in bins])
    weights = rvs.lds_weights(y, num_bins, kernel_size, sigma)
    np.testing.assert_allclose(weights, expected * len(y) / expected.sum(), rtol=1e-9)
    assert weights.mean() == pytest.approx(1) and weights.min() > 0


@pytest.mark.parametrize(
    "y",
    [[3.0], [7.0] * 50, [0.0, 0.0, 1e9], [-1e-300, 0, 1e-300], [-5.0, -4, -3, 100], np.r_[np.zeros(10**5), 1.0]],
    ids=["one", "equal", "gap", "tiny", "negative", "isolated"],
)
def test_lds_weights_of_degenerate_targets(y):
    """Finite, positive, 1 on average; one where there is nothing to tell apart."""
    weights = rvs.lds_weights(np.array(y), 100, 5, 2.0)
    assert weights.shape == (len(y),) and np.isfinite(weights).all() and weights.min() > 0
    assert weights.mean() == pytest.approx(1)
    if np.ptp(y) == 0:
        assert np.all(weights == 1)


def test_properties_of_lds_weights(monkeypatch):
    """Flat histogram: equal weights inside; kernel of size 1: every bin that holds anything counts the same; a factor
    on the kernel is nothing; a bound holds about, and leaves the average."""
    flat = np.arange(1000) / 1000
    weights = rvs.lds_weights(flat, 100, 5, 2.0)
    np.testing.assert_allclose(weights[20:-20], weights[500])
    assert weights[0] / weights[500] == pytest.approx(1.643, abs=1e-3)  # the window reaches beyond the edge
    y = np.random.default_rng(0).normal(size=2000)
    bins, counts, _ = rvs.smoothed_density(y, 50, 1, 2.0)
    mass = np.bincount(bins, rvs.lds_weights(y, 50, 1, 2.0), 50)
    np.testing.assert_allclose(mass[counts > 0], 2000 / (counts > 0).sum())
    before, kernel = rvs.lds_weights(y, 50, 5, 2.0), rvs.smoothing_kernel
    bounded = rvs.lds_weights(y, 50, 5, 2.0, max_weight=3.0)
    assert before.max() > 10 and bounded.mean() == pytest.approx(1)
    assert bounded.max() / bounded.min() == pytest.approx(3 / before.min())
    monkeypatch.setattr(rvs, "smoothing_kernel", lambda *args: 7 * kernel(*args))
    np.testing.assert_allclose(rvs.lds_weights(y, 50, 5, 2.0), before)


# ---------------------------------------------------------------------------------------------------------------------
# The best episodes, the spec's 8(g)
# ---------------------------------------------------------------------------------------------------------------------


def test_best_episodes():
    """Of 20 episodes of 50 steps, the tenth is one (two would not be less than a tenth); whole episodes, the best."""
    returns = np.random.default_rng(0).permutation(20).astype(float)
    dataset = make_dataset(returns, [50] * 20)
    best = rvs.best_episodes(dataset, 0.1)
    assert best.episode_returns.tolist() == [19] and best.episode_lengths.tolist() == [50]
    i = int(np.argmax(returns))
    assert np.array_equal(best.transitions, dataset.transitions[50 * i : 50 * i + 50])
    assert best.transitions.flags.c_contiguous and rvs.best_episodes(dataset, 1.0) is dataset
    lengths = np.random.default_rng(1).integers(1, 40, size=20)
    dataset = make_dataset(returns, lengths)
    half = rvs.best_episodes(dataset, 0.5)
    assert half.episode_returns.min() > np.setdiff1d(returns, half.episode_returns).max()
    assert 0 < len(half.transitions) == half.episode_lengths.sum() < len(dataset.transitions) / 2
    G = rvs.returns_to_go(half.transitions[:, O + A], half.episode_lengths, half.episode_returns)
    np.testing.assert_allclose(G[np.cumsum(half.episode_lengths) - half.episode_lengths], half.episode_returns)
    assert len(rvs.best_episodes(dataset, 0.0).episode_returns) == 1  # one at least


# ---------------------------------------------------------------------------------------------------------------------
# The environment that counts down, 9(g)
# ---------------------------------------------------------------------------------------------------------------------


class Rewards(gym.Env):
    """Pays 1, 2, 3 and ends; the observation is the number of the step."""

    observation_space = gym.spaces.Box(-5, 5, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (A,), np.float32)

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), float(self.t), self.t == 3, False, {}


@pytest.mark.parametrize(
    "flags, inputs",
    [({}, [6, 5, 3, 0]), ({"gamma": 0.5}, [6, 10, 16, 26]), ({"horizon": 4}, [1.5, 1.5, 1.5, 1.5])],
)
def test_return_to_go_counts_down(flags, inputs):
    """Asked for 6, paid 1, 2, 3: 6, 5, 3, 0; every episode starts from 6 again."""
    env = rvs.ReturnToGo(Rewards(), 6.0, **flags)
    assert env.observation_space.shape == (2,)
    for _ in range(2):
        seen = [env.reset(seed=0)[0]]
        seen += [env.step(np.zeros(A))[0] for _ in range(3)]
        assert [obs[-1] for obs in seen] == inputs and [obs[0] for obs in seen] == [0, 1, 2, 3]


def test_the_conditioned_environment_is_the_environment():
    """By its registered id: the same rewards and ends for the same actions; torques in [-1, 1] although Pendulum's go
    to 2; the return to go is the target less what run_episodes counts as return."""
    plain = {"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 30, "g": 9.0}, "references": None}
    asking = json.loads(json.dumps(rvs.conditioned_environment(plain, -200, 1.0, None)))
    assert asking["references"] is None and rvs.make_env(asking).action_space.high == 1
    seen = []

    class Policy:
        def act(self, obs):
            seen.append(obs[0].numpy().copy())
            return obs[..., :1]

    returns = [rvs.run_episodes(Policy(), environment, [3, 4]) for environment in (plain, asking)]
    assert returns[0] == returns[1] and returns[0][0][1] == 30 and returns[0][0] != returns[0][1]
    unconditioned, conditioned = np.array(seen[:30]), np.array(seen[30:])
    assert np.array_equal(unconditioned, conditioned[..., :3]) and np.all(conditioned[0, :, 3] == -200)
    left = conditioned[-1, :, 3] - (-200 - np.array([r for r, _ in returns[0]]))
    assert np.all(left <= 0) and np.all(left > -20)  # all but the reward of the last step, which is a cost


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def test_log_prob_is_that_of_a_normal():
    """Of a state-independent and a state-dependent deviation, both kept within [e^-5, e^2]."""
    for state_dependent in (False, True):
        args = make_args(num_seeds=2, state_dependent_std=state_dependent, dropout=0.0)
        agent = make_agent(args, spread=1.5)
        batch, _ = make_batch(args)
        obs, action, _ = batch.split(agent.widths, -1)
        mean, log_std = agent.actor(obs)
        raw = agent.actor.net(obs)[..., A:] if state_dependent else agent.actor.log_std
        assert log_std.shape == ((2, 32, A) if state_dependent else (2, 1, A))
        assert torch.equal(log_std, raw.clamp(-5, 2))
        if state_dependent:
            assert raw.min() < -5 and raw.max() > 2  # both bounds were reached
        normal = torch.distributions.Normal(mean, log_std.exp().expand_as(mean))
        expected = normal.log_prob(action).sum(-1)
        torch.testing.assert_close(rvs.gaussian_log_prob(mean, log_std, action), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(agent.actor.act(1.001 * obs), mean.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        assert agent.actor.act(3 * obs).abs().max() == 1


def test_initial_weights():
    """Orthogonal of gain sqrt 2, 0.01 at the output, zero biases: actions near 0 at first, deviation 1."""
    agent = make_agent(make_args(num_seeds=2, hidden_sizes=(32, 32)))
    for i, gain in enumerate((2**0.5, 2**0.5, 0.01)):
        weight, bias = agent.actor.net.layers[i]
        assert not bias.any()
        for w in weight:
            small = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weight[0], weight[1]) and not agent.actor.log_std.any()


def test_layernorm_is_torchs():
    """(S, B, H) at once is each seed's own layer normalisation between the linear layer and the ReLU."""
    args = make_args(num_seeds=3, layernorm=True)
    agent, plain = make_agent(args, spread=0.7), make_agent(make_args(num_seeds=3), spread=0.7)
    assert {name for name, _ in agent.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        f"actor.net.{kind}{i}" for kind in ("gain", "shift") for i in (0, 1)
    }
    obs, net = make_batch(args)[0][..., :O], agent.actor.net
    for s in range(3):
        x = obs[s]
        for i, (weight, bias) in enumerate(net.layers):
            x = x @ weight[s] + bias[s]
            if i < 2:
                norm = torch.nn.LayerNorm(x.shape[-1])
                norm.weight.data, norm.bias.data = net.norms[i][0][s, 0], net.norms[i][1][s, 0]
                x = norm(x).relu()
        torch.testing.assert_close(net(obs)[s], x, rtol=1e-4, atol=1e-5)
        alone = rvs.policy_of_seed(agent.actor, s)
        torch.testing.assert_close(alone.act(obs[s : s + 1])[0], agent.actor.act(obs)[s])


def test_without_the_return_to_go_it_is_behaviour_cloning():
    """9(g): with zeros behind the last input, the conditioned policy is one that has no such input."""
    args = make_args(num_seeds=2)
    conditioned, plain = make_agent(args, spread=0.5), make_agent(args, spread=0.5, obs_dim=O - 1)
    with torch.no_grad():
        first = conditioned.actor.net.layers[0][0]
        first[:, -1] = 0
        for (name, p), (other, q) in zip(plain.named_parameters(), conditioned.named_parameters()):
            assert name == other
            p.copy_(q[:, :-1] if p.shape != q.shape else q)
    obs = make_batch(args)[0][..., :O]
    torch.testing.assert_close(conditioned.actor(obs)[0], plain.actor(obs[..., :-1])[0])
    with torch.no_grad():
        first[:, -1] = 1
    assert not torch.allclose(conditioned.actor(obs)[0], plain.actor(obs[..., :-1])[0])


def test_dropout_masks():
    """A share `rate` of the units is dropped, each on its own; seed k's masks do not depend on its neighbours."""

    def masks(seeds, rate):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return rvs.dropout_masks(generators, 24, (16, 12), rate)

    for rate in (0.1, 0.5, 0.99):
        kept = masks([0, 1, 2], rate)
        assert kept.shape == (rvs.UPDATES_PER_BLOCK, 3, 24, 28) and kept.dtype == torch.bool
        n = kept.numel()
        assert abs((~kept).double().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / n) + 2**-16
        assert torch.equal(kept[:, 1], masks([1], rate)[:, 0]) and not torch.equal(kept[:, 1], kept[:, 0])
    x = (~masks([0], 0.5)).double() - 0.5  # +-1/2: neighbours in each direction are uncorrelated
    for axis in (0, 2, 3):
        k = x.shape[axis] - 1
        product = x.narrow(axis, 0, k) * x.narrow(axis, 1, k)
        assert abs(product.mean().item()) < 5 * 0.25 / math.sqrt(product.numel())
    generator = torch.Generator().manual_seed(0)
    first, second = (rvs.dropout_masks([generator], 24, (16, 12), 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    assert masks([0, 1], 0.0).shape == (rvs.UPDATES_PER_BLOCK, 2, 24, 0)


def test_dropout_keeps_the_average():
    """The average over masks of a network of one hidden layer is the network without dropout."""
    args = make_args(hidden_sizes=(16,), dropout=0.3)
    net, obs = make_agent(args, spread=0.5).actor.net, make_batch(args)[0][..., :O]
    kept = rvs.dropout_masks([torch.Generator().manual_seed(0)], 32, (16,), 0.3)  # (100, 1, 32, 16)
    outputs = torch.stack([net(obs, mask) for mask in kept])
    error = (outputs.mean(0) - net(obs)) / (outputs.std(0) / 10)
    assert error.abs().max() < 4.5 and outputs.std(0).min() > 0


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser, and the whole update against numpy
# ---------------------------------------------------------------------------------------------------------------------


def test_adam_l2_is_torchs_adam():
    """... with its weight_decay, and not AdamW's."""
    generator, steps = torch.Generator().manual_seed(0), {}
    start, target = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    for name in ("ours", "Adam", "AdamW"):
        p = start.clone().requires_grad_()
        adam = None if name == "ours" else getattr(torch.optim, name)([p], 0.05, weight_decay=0.3)
        ours = rvs.AdamL2([p], 0.05, 0.3)
        for _ in range(20):
            loss = (p - target).square().sum()
            if adam:
                adam.zero_grad(), loss.backward(), adam.step()
            else:
                ours.minimize(loss)
        steps[name] = p.detach()
    torch.testing.assert_close(steps["ours"], steps["Adam"])
    assert not torch.allclose(steps["ours"], steps["AdamW"], atol=1e-3)


class NumpyRvS:
    """One seed of the update in numpy, float64, with the gradients derived by hand."""

    def __init__(self, agent, s, args):
        self.args, self.t = args, 0
        self.p = {name: p[s].detach().numpy().copy() for name, p in agent.actor.named_parameters()}
        self.m = {name: np.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.p.items()}

    def update(self, batch, kept):
        args, p, g, B = self.args, self.p, {}, len(batch)
        x, a, w = np.split(batch, [O, O + A], axis=1)
        kept = np.split(kept, [args.hidden_sizes[0]], axis=1)
        tape = []
        for i in range(2):
            z = x @ p[f"net.weight{i}"] + p[f"net.bias{i}"]
            std = unit = None
            if args.layernorm:
                std = np.sqrt(z.var(1, keepdims=True) + 1e-5)
                unit = (z - z.mean(1, keepdims=True)) / std
                z = unit * p[f"net.gain{i}"] + p[f"net.shift{i}"]
            tape.append((x, std, unit, z))
            x = np.maximum(z, 0) * kept[i] / (1 - args.dropout)
        out = x @ p["net.weight2"] + p["net.bias2"]
        mean, raw = (out[:, :A], out[:, A:]) if args.state_dependent_std else (out, p["log_std"])
        log_std = np.clip(raw, -5, 2)
        error = (a - mean) / np.exp(log_std)
        log_prob = np.sum(-0.5 * error**2 - log_std - 0.5 * np.log(2 * np.pi), 1)
        loss = -np.mean(w[:, 0] * log_prob)

        grad_mean = -w / B * error / np.exp(log_std)
        grad_log_std = -w / B * (error**2 - 1) * ((raw > -5) & (raw < 2))
        if args.state_dependent_std:
            grad = np.concatenate([grad_mean, grad_log_std], 1)
        else:
            grad, g["log_std"] = grad_mean, grad_log_std.sum(0, keepdims=True)
        g["net.weight2"], g["net.bias2"] = x.T @ grad, grad.sum(0, keepdims=True)
        grad = grad @ p["net.weight2"].T
        for i in (1, 0):
            x, std, unit, z = tape[i]
            grad = grad * kept[i] / (1 - args.dropout) * (z > 0)
            if args.layernorm:
                g[f"net.gain{i}"], g[f"net.shift{i}"] = (grad * unit).sum(0)[None], grad.sum(0)[None]
                grad = grad * p[f"net.gain{i}"]
                grad = grad - grad.mean(1, keepdims=True) - unit * (grad * unit).mean(1, keepdims=True)
                grad = grad / std
            g[f"net.weight{i}"], g[f"net.bias{i}"] = x.T @ grad, grad.sum(0, keepdims=True)
            grad = grad @ p[f"net.weight{i}"].T
        self.t += 1
        for name in p:
            gradient = g[name] + args.weight_decay * p[name]
            self.m[name] = 0.9 * self.m[name] + 0.1 * gradient
            self.v[name] = 0.999 * self.v[name] + 0.001 * gradient**2
            m_hat, v_hat = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            p[name] = p[name] - args.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8)
        return [loss, -np.mean(log_prob)]


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_update_against_numpy(layernorm, state_dependent_std):
    """Six updates of two seeds in float64: weights, dropout, weight decay, both kinds of deviation, both networks."""
    flags = {"layernorm": layernorm, "state_dependent_std": state_dependent_std}
    args = make_args(num_seeds=2, learning_rate=0.02, weight_decay=0.05, dropout=0.5, **flags)
    agent = make_agent(args, spread=0.5).double()
    agent.optimizers["actor"].learning_rate.fill_(args.learning_rate)  # it was rounded to float32
    references = [NumpyRvS(agent, s, args) for s in range(2)]
    for n in range(6):
        batch, kept = make_batch(args, seed=n)
        metrics = rvs.update(agent, batch.double(), kept, args)
        for s, reference in enumerate(references):
            losses = reference.update(batch[s].double().numpy(), kept[s].numpy())
            ours = [metrics[name][s].item() for name in ("loss/actor", "loss/negative_log_likelihood")]
            np.testing.assert_allclose(ours, losses, rtol=1e-9)
    for s, reference in enumerate(references):
        for name, p in agent.actor.named_parameters():
            np.testing.assert_allclose(p[s].detach().numpy(), reference.p[name], rtol=0, atol=1e-9, err_msg=name)


def test_weights_of_one_are_the_plain_likelihood():
    """... and a weight of 2 counts an example twice, 0 not at all."""
    args = make_args(dropout=0.0, learning_rate=0.0)
    batch, kept = make_batch(args, B=3)
    batch[..., -1] = 1

    def loss(batch):
        return rvs.update(make_agent(args, spread=0.5), batch, kept, args)["loss/actor"].item()

    single = [loss(batch[:, i : i + 1]) for i in range(3)]
    assert loss(batch) == pytest.approx(np.mean(single), rel=1e-5)
    batch[0, :, -1] = torch.tensor([2.0, 1, 0])
    assert loss(batch) == pytest.approx((2 * single[0] + single[1]) / 3, rel=1e-5)


def test_the_optimiser_owns_the_policy_and_no_statistics():
    agent = make_agent(make_args(num_seeds=2, layernorm=True))
    assert {*map(id, agent.optimizers["actor"].params)} == {*map(id, agent.actor.parameters())}
    before = state_of(agent)
    metrics = rvs.update(agent, *make_batch(make_args(num_seeds=2)), make_args(num_seeds=2))
    unmoved = {name for name, x in state_of(agent).items() if torch.equal(x, before[name])}
    assert unmoved == {"actor.obs_mean", "actor.obs_std"}
    assert all(x.shape == (2,) and not x.requires_grad for x in metrics.values())


# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------


def test_pack_examples():
    """Input (s, G), normalised together by the dataset's statistics; then the action, then the weight."""
    dataset = make_dataset([100.0, -50, 3000], [5, 20, 40])
    G = rvs.returns_to_go(dataset.transitions[:, O + A], dataset.episode_lengths, dataset.episode_returns)
    weights = np.random.default_rng(0).random(65)
    examples, mean, std = rvs.pack_examples(dataset, G[:, None], weights)
    assert examples.shape == (65, O + 1 + A + 1) and examples.dtype == mean.dtype == std.dtype == np.float32
    x = np.c_[dataset.transitions[:, :O].astype(np.float64), G]
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, x.std(0), rtol=1e-5)
    np.testing.assert_allclose(examples[:, : O + 1], (x - x.mean(0)) / (x.std(0) + 1e-3), atol=1e-5)
    np.testing.assert_array_equal(examples[:, O + 1 : -1], dataset.transitions[:, O : O + A])
    np.testing.assert_allclose(examples[:, -1], weights, rtol=1e-6)
    assert rvs.pack_examples(dataset, np.empty((65, 0)), weights)[0].shape == (65, O + A + 1)
    assert rvs.default_targets(dataset, G) == pytest.approx((3000, 712.5, 1475, 2237.5, 3762.5))


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01, layernorm=True), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(5):
            batch, kept = make_batch(args, seed=n)
            batch[1] *= factor
            rvs.update(agent, batch, kept, args)
        states.append(state_of(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        if "obs_" not in name:
            assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_five_is_the_run_with_seed_k(run_main, data, monkeypatch, tmp_path):
    """Through main(): the same first weights, batches and dropout masks, and the same agents after 50 updates."""
    update, runs = rvs.update, {}

    def recorder(agent, batch, kept, args):
        record = runs.setdefault((args.seed, args.num_seeds), {"draws": [], "first": state_of(agent)})
        record["draws"].append(torch.cat([batch, kept], -1))
        return update(agent, batch, kept, args)

    monkeypatch.setattr(rvs, "update", recorder)
    for seed, num_seeds in ((3, 5), (3, 1), (5, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        flags = "--num-updates", 50, "--seed", seed, "--num-seeds", num_seeds, "--learning-rate", 0.003
        run_main("--dataset", data, *BLIND, *flags, "--run-dir", run_dir)
        last = {k: x for k, x in checkpoint_of(run_dir)["agent"].items() if not k.startswith("optimizers.")}
        runs[seed, num_seeds] |= {"last": last, "draws": torch.stack(runs[seed, num_seeds]["draws"])}
    five = runs[3, 5]
    assert five["draws"].shape == (50, 5, 16, 12 + 3 + 1 + 28)
    for k in (0, 2, 4):
        alone = runs[3 + k, 1]
        assert torch.equal(five["draws"][:, k], alone["draws"][:, 0])
        for name in five["first"]:
            assert torch.equal(five["first"][name][k], alone["first"][name][0]), name
            torch.testing.assert_close(five["last"][name][k], alone["last"][name][0], rtol=1e-4, atol=1e-5)
        assert not torch.equal(five["draws"][:, k], five["draws"][:, 1])
        assert not torch.allclose(five["first"]["actor.net.weight0"][k], five["first"]["actor.net.weight0"][1])
    assert (five["last"]["actor.net.weight0"] - five["first"]["actor.net.weight0"]).abs().max() > 0.01  # all learned


# ---------------------------------------------------------------------------------------------------------------------
# Learning: two behaviours that only the return tells apart
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_behaviours(tmp_path_factory):
    """Of 40 episodes of 10 steps, 36 act -0.5 and are paid -1 a step, 4 act 0.5 and are paid 1; states tell nothing."""
    rng, episodes, ends = np.random.default_rng(0), [], np.zeros((2, 10), bool)
    for i in range(40):
        good = i % 10 == 0
        action = np.full((10, 1), 0.5 if good else -0.5) + rng.normal(0, 0.05, (10, 1))
        reward = rng.normal(1 if good else -1, 0.02, 10)
        episodes.append((np.zeros((11, 3), np.float32), np.float32(action), reward, *ends))
    return harness.write_minari(tmp_path_factory.mktemp("two") / "behaviours", episodes, env_spec=None)


def learned_actions(run_main, folder, run_dir, *flags, asked=(10.0, -10.0), conditioned=True):
    """The action in the first step, when asked for each of these returns."""
    more = "--hidden-sizes", 32, 32, "--batch-size", 128, "--learning-rate", 0.005, "--num-updates", 300
    run_main("--dataset", folder, *more, "--eval-episodes", 0, "--run-dir", run_dir, *flags)
    args = rvs.Args(**json.loads((run_dir / "config.json").read_text())["args"])
    agent = rvs.RvSAgent(3 + conditioned, 1, args, CPU)
    agent.load_state_dict(checkpoint_of(run_dir)["agent"])
    with torch.no_grad():
        if not conditioned:
            return agent.actor.act(torch.zeros(1, 1, 3)).item()
        return [agent.actor.act(torch.tensor([[[0, 0, 0, g]]])).item() for g in asked]


def test_who_asks_for_more_gets_the_better_behaviour(run_main, two_behaviours, tmp_path):
    for weighting in ("lds", "none"):
        good, bad = learned_actions(run_main, two_behaviours, tmp_path / weighting, "--weighting", weighting)
        assert good > 0.35 and bad < -0.35, (weighting, good, bad)
    flags = "--condition", "average"
    good, bad = learned_actions(run_main, two_behaviours, tmp_path / "average", *flags, asked=(1.0, -1.0))
    assert good > 0.35 and bad < -0.35, (good, bad)


def test_behaviour_cloning_cannot_tell_them_apart(run_main, two_behaviours, tmp_path):
    """It acts like the average of the data, -0.4. Weighted by rarity, in the loss or in the sampler, both behaviours
    count about the same; the tenth of the data with the best returns has the good one alone."""
    actions = partial(learned_actions, run_main, two_behaviours, conditioned=False)
    flags = "--condition", "none", "--lds-target", "episode_return", "--num-bins", 10
    assert actions(tmp_path / "bc", *flags, "--weighting", "none") == pytest.approx(-0.4, abs=0.08)
    assert actions(tmp_path / "ir", *flags) == pytest.approx(0, abs=0.1)
    assert actions(tmp_path / "sampling", *flags, "--weighting", "lds_sampling") == pytest.approx(0, abs=0.1)
    top = actions(tmp_path / "top", *flags, "--weighting", "none", "--top-fraction", 0.1)
    assert top == pytest.approx(0.5, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# A run: examples, evaluations, asked against achieved, --evaluate, --resume
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of two seeds, evaluated twice: (run folder, its output, the batches, the arguments of run_episodes)."""
    run_dir, handlers = tmp_path_factory.mktemp("run") / "run", {s: signal.getsignal(s) for s in (2, 15)}
    update, run_episodes, batches, jobs = rvs.update, rvs.run_episodes, [], []
    flags = "--dataset", data, *SMALL, "--num-updates", 60, "--eval-every", 40, "--eval-episodes", 2, "--num-seeds", 2
    with pytest.MonkeyPatch.context() as patch:
        out = patch_output(patch)
        patch.setattr(rvs, "update", lambda agent, batch, *rest: batches.append(batch) or update(agent, batch, *rest))
        patch.setattr(rvs, "run_episodes", lambda *job: jobs.append(job) or run_episodes(*job))
        patch.setattr(sys, "argv", ["rvs_lds.py", *map(str, flags), "--run-dir", str(run_dir)])
        rvs.main()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return run_dir, "".join(out), batches, jobs


def patch_output(patch):
    """A list that gets what print() writes to stdout."""
    written = []
    patch.setattr(rvs, "print", lambda *a, **k: written.append(f"{a[0]}\n" if "file" not in k else ""), raising=False)
    return written


def test_what_the_learner_sees(run, data):
    """Every row of a batch is a logged step: its state and return to go, normalised; its action; its weight."""
    episodes = harness.hopper_episodes()
    states = np.concatenate([obs[:-1] for obs, *_ in episodes]).astype(np.float64)
    G = np.concatenate([np.cumsum(reward[::-1])[::-1] for _, _, reward, *_ in episodes])
    x, weights = np.c_[states, G], rvs.lds_weights(G, 100, 5, 2.0)
    inputs = (x - x.mean(0)) / (x.std(0) + 1e-3)
    actions = np.concatenate([action for _, action, *_ in episodes])
    for row in run[2][-1].flatten(0, 1).double().numpy():
        i = np.argmin(np.abs(inputs - row[:12]).sum(1))
        np.testing.assert_allclose(row[:12], inputs[i], atol=1e-3)
        np.testing.assert_allclose(row[12:15], actions[i], atol=1e-6)
        assert row[15] == pytest.approx(weights[i], rel=1e-4)


def test_asked_against_achieved(run, data):
    """target_returns.csv has every target, seed and episode; what asks for the first is the last evaluation itself."""
    run_dir, out, _, jobs = run
    args = json.loads((run_dir / "config.json").read_text())["args"]
    returns = [reward.sum() for _, _, reward, *_ in harness.hopper_episodes()]
    worst, best = min(returns), max(returns)
    asked = [worst + f * (best - worst) for f in (1, 0.25, 0.5, 0.75, 1.25)]
    assert args["target_return"] == pytest.approx(asked, rel=1e-5)
    first, *more = args["target_return"]
    targets = [environment["kwargs"]["target_return"] for _, environment, _ in jobs]
    assert targets == [first] * 4 + [t for t in sorted([first, *more]) for _ in range(2)]  # for each seed
    header, *rows = (run_dir / "target_returns.csv").read_text().splitlines()
    assert header == "target_return,seed,episode,return,length,normalized_score"
    rows = np.array([row.split(",") for row in rows], float)
    expected = [(t, s, e) for t in sorted(args["target_return"]) for s in (0, 1) for e in (0, 1)]
    assert [tuple(row[:3]) for row in rows] == expected
    first, evaluations = rows[rows[:, 0] == args["target_return"][0]], harness.read_evaluations(run_dir)
    last = evaluations["update"] == 60
    assert first[:, 3].tolist() == evaluations["return"][last].tolist()
    assert sorted(set(evaluations["update"])) == [40, 60]
    for target in args["target_return"]:
        mine = rows[rows[:, 0] == target][:, 3].reshape(2, 2)
        assert f"asked for {target:.1f}: return {mean_and_std(mine)}" in out
    spread = [evaluations["return"][evaluations["update"] == n].reshape(2, 2).std(1).mean() for n in (40, 60)]
    assert f"return {np.mean(spread):.1f}" in re.search("standard deviation over episodes, mean.*", out)[0]


def mean_and_std(returns):
    return f"{returns.mean():.1f} ± {returns.std(1).mean():.1f}"


def test_pictures_and_spread_in_tensorboard(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run[0]), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"data/lds_density", "evaluation/asked_against_achieved"}
    evaluations = harness.read_evaluations(run[0])
    for scalar in events.Scalars("evaluation/std_over_episodes"):
        mine = evaluations["return"][evaluations["update"] == scalar.step].reshape(2, 2)
        assert scalar.value == pytest.approx(mine.std(1).mean(), rel=1e-5)


def test_line_chart_draws_what_it_is_given():
    """A rising curve goes from the lower left to the upper right; constant curves and single points are no error."""
    x = np.arange(10)
    picture = rvs.line_chart("title", x, {"rising": 2 * x})
    assert picture.shape == (400, 640, 3) and picture.dtype == np.uint8
    navy = np.argwhere((picture == (0, 0, 128)).all(-1))
    navy = navy[(navy[:, 1] > 150)]  # without the label
    for row, column in navy[:: len(navy) // 20]:
        assert (350 - row) / 300 == pytest.approx((column - 50) / 540, abs=0.02)
    rvs.line_chart("constant", x, {"zero": 0 * x, "three": 0 * x + 3})
    rvs.line_chart("point", [5.0], {"a": [-1.0]})


def test_evaluate(run, run_main, capsys, monkeypatch):
    """One line for each target, by the policies of training; other targets may be asked for; the run stays as it is."""
    run_dir, _, _, trained = run
    before, evaluated, run_episodes = {p.name: p.read_bytes() for p in run_dir.iterdir()}, [], rvs.run_episodes
    monkeypatch.setattr(rvs, "run_episodes", lambda *job: evaluated.append(job[0]) or run_episodes(*job))
    run_main("--evaluate", run_dir, "--eval-episodes", 1)
    targets = json.loads((run_dir / "config.json").read_text())["args"]["target_return"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"asked for {t:.1f}" for t in sorted(targets)]
    run_main("--evaluate", run_dir, "--eval-episodes", 1, "--target-return", 77, 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["asked for 5.0", "asked for 77.0"]
    assert before == {p.name: p.read_bytes() for p in run_dir.iterdir()}
    obs = 3 * torch.randn(1, 50, 12, generator=torch.Generator().manual_seed(0))
    for s in range(2):
        actions = trained[-2 + s][0].act(obs)
        assert torch.equal(actions, evaluated[s].act(obs)) and not actions.isnan().any()


def test_evaluate_of_behaviour_cloning(run_main, data, capsys, tmp_path):
    """Without a condition there is nothing to ask for: the shared --evaluate, on the environment as it is."""
    flags = "--dataset", data, *SMALL, "--num-updates", 5, "--eval-episodes", 1, "--condition", "none"
    run_main(*flags, "--weighting", "none", "--run-dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["id"] == "Hopper-v5"
    assert not (tmp_path / "run" / "target_returns.csv").exists() and "asked" not in capsys.readouterr().out
    run_main("--evaluate", tmp_path / "run", "--eval-episodes", 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("seed 0: return ") and "over 2 episodes" in line


def test_resume_at_an_odd_update(run_main, data, tmp_path):
    """A run that ended after 137 updates goes on with the right draws, and ends like one of 250 at once; it may ask for
    something else then."""
    flags = "--dataset", data, *BLIND, "--num-seeds", 2, "--layernorm", "--state-dependent-std"
    run_main(*flags, "--num-updates", 250, "--run-dir", tmp_path / "whole")
    run_main(*flags, "--num-updates", 137, "--run-dir", tmp_path / "parts")
    run_main("--resume", tmp_path / "parts", "--num-updates", 250, "--target-return", 3)
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_while_it_asks(run_main, data, monkeypatch, capsys, tmp_path):
    """Ctrl-C in the sweep at the end: nothing is lost, the line says how to go on, and going on finishes the sweep."""
    stopped, run_episodes, calls = tmp_path / "run", rvs.run_episodes, []

    def interrupted(*job):
        calls.append(job)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return run_episodes(*job)

    monkeypatch.setattr(rvs, "run_episodes", interrupted)
    flags = "--dataset", data, *SMALL, "--num-updates", 5, "--eval-episodes", 1, "--run-dir", stopped
    with pytest.raises(SystemExit) as ended:
        run_main(*flags)
    assert ended.value.code == 130 and len(calls) == 3 and not (stopped / "target_returns.csv").exists()
    assert f"--resume {stopped}" in capsys.readouterr().out.splitlines()[-1]
    run_main("--resume", stopped)
    assert (stopped / "target_returns.csv").read_text().count("\n") == 6
    assert "normalised score" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "flag, value",
    [("--dropout", 1), ("--kernel-size", 4), ("--kernel-size", 0), ("--sigma", 0), ("--num-bins", 0), ("--gamma", 0),
     ("--max-weight", 0.5), ("--top-fraction", 2), ("--target-return", "nan"), ("--weight-decay", -1)],
)  # fmt: skip
def test_flag_out_of_range(run_main, data, capsys, tmp_path, flag, value):
    with pytest.raises(SystemExit) as ended:
        run_main("--dataset", data, flag, value, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {flag} ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_killed_and_resumed_run_ends_like_one_never_stopped(run_main, data, tmp_path):
    """kill -9 at a random moment after a checkpoint at an odd update, --resume: the same bits, the same csv files."""
    rng, victim, path = random.Random(3), tmp_path / "victim", tmp_path / "victim" / "checkpoint.pt"
    flags = "--dataset", data, *SMALL, "--num-updates", 900, "--eval-every", 370, "--eval-episodes", 1
    flags += "--checkpoint-every", 111, "--target-return", 100, 50
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    process = subprocess.Popen(harness.command("rvs_lds", *flags, "--run-dir", victim), **pipes)
    saves, last, deadline = 0, None, time.time() + 120
    while saves < 2 + rng.randint(0, 2):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        now = path.stat().st_mtime_ns if path.exists() else None
        saves, last = saves + (now != last), now
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    assert process.poll() is None, "the run was over before it could be killed: make it longer"
    process.kill()
    process.communicate()
    assert 0 < checkpoint_of(victim)["num_updates"] < 900
    run_main("--resume", victim)
    run_main(*flags, "--run-dir", tmp_path / "unbroken")
    assert_same_checkpoint(victim, tmp_path / "unbroken")
    for name in ("evaluations.csv", "target_returns.csv"):
        assert (victim / name).read_text() == (tmp_path / "unbroken" / name).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("flags", [{}, {"layernorm": True, "state_dependent_std": True}, {"dropout": 0.0}])
def test_captured_updates_equal_eager_ones(flags):
    """CUDA graphs of ten updates, replayed three times, give what thirty eager updates give."""
    args = make_args(num_seeds=2, learning_rate=1e-3, **flags)
    generators = [torch.Generator("cuda").manual_seed(s) for s in range(2)]
    examples = torch.cat([make_batch(args, seed=n)[0][0] for n in range(10)]).cuda()
    index = torch.randint(len(examples), (30, 2, 32), generator=torch.Generator().manual_seed(2)).cuda()
    kept = rvs.dropout_masks(generators, 32, args.hidden_sizes, args.dropout)[:30]
    agents = [make_agent(args, device="cuda") for _ in range(2)]
    learn = [partial(rvs.run_updates, agent, examples, args) for agent in agents]
    before = {name: x.clone() for name, x in agents[0].state_dict().items()}
    graph = rvs.cuda_graph(learn[0], agents[0], index[:10], kept[:10])
    assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
    for i in range(0, 30, 10):
        captured, eager = graph(index[i : i + 10], kept[i : i + 10]), learn[1](index[i : i + 10], kept[i : i + 10])
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-5)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-3, atol=1e-4)


@needs_gpu
def test_a_run_on_a_gpu_ends_as_one_without_graphs(run_main, data, monkeypatch, tmp_path):
    flags = "--dataset", data, *BLIND[:-4], "--device", "cuda", "--eval-episodes", 0, "--num-updates", 230
    run_main(*flags, "--run-dir", tmp_path / "graphs")
    monkeypatch.setattr(rvs, "cuda_graph", lambda step, agent, *inputs: step)
    run_main(*flags, "--run-dir", tmp_path / "eager")
    ours, theirs = (checkpoint_of(tmp_path / name)["agent"] for name in ("graphs", "eager"))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-4)
