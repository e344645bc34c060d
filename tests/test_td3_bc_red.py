"""td3_bc_red.py against numpy, numbers by hand and its own runs: losses, updates, turns, normaliser, resume."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import harness
import numpy as np
import pytest
import torch

td3 = harness.load("td3_bc_red")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
CPU = torch.device("cpu")


def make_args(**flags):
    return td3.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, **flags})


def make_agent(args, spread=None, obs_mean=0.0, obs_std=1.0, device="cpu"):
    """A TD3BCAgent. With `spread`, all parameters are drawn anew, so that targets and online networks differ."""
    agent = td3.TD3BCAgent(O, A, args, torch.device(device), obs_mean, obs_std)
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(S=1, B=32, seed=0):
    """(S, B, O + A + 1 + O + 1) random transitions, a quarter of them terminal, and noise (S, B, A)."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, S, B, O))
    action, reward = rng.uniform(-1, 1, size=(S, B, A)), rng.normal(size=(S, B, 1))
    not_terminated = np.float64(rng.random((S, B, 1)) > 0.25)
    batch = np.concatenate([obs, action, reward, next_obs, not_terminated], -1)
    return torch.from_numpy(batch).float(), torch.from_numpy(rng.normal(size=(S, B, A))).float()


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    named = list(mlp.named_parameters())
    return list(zip(*([p for name, p in named if kind in name] for kind in ("weight", "bias"))))


@torch.no_grad()
def set_linear(mlp, coefficients, bias=0.0):
    """Makes every network of an MLP the linear function x @ coefficients + bias, as relu(z) - relu(-z)."""
    for p in mlp.parameters():
        p.zero_()
    (first, _), *middle, (last, last_bias) = layers_of(mlp)
    for i, c in coefficients.items():
        first[..., i, 0], first[..., i, 1] = c, -c
    for weight, _ in middle:
        weight[..., 0, 0] = weight[..., 1, 1] = 1
    last[..., 0, :], last[..., 1, :] = 1, -1
    last_bias.copy_(torch.as_tensor(bias).view(-1, 1, 1).expand_as(last_bias))


def state_of(agent):
    """A copy of the state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x.clone() for name, x in agent.state_dict().items() if not name.startswith("optimizers.")}


def changed(agent, before):
    """The networks of which anything has changed."""
    return {name.split(".")[0] for name, x in state_of(agent).items() if not torch.equal(x, before[name])}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): td3_bc_red's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags, module=td3):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["td3_bc_red.py", *map(str, flags)])
        try:
            module.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


SMALL = "--hidden-sizes", 16, 16, "--batch-size", 16, "--device", "cpu"
BLIND = *SMALL, "--eval-episodes", 0


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same_checkpoint(run_dir, reference):
    """Bit-identical weights, targets, optimisers, normaliser, generators; the same update."""
    ours, theirs = checkpoint_of(run_dir), checkpoint_of(reference)
    assert ours["num_updates"] == theirs["num_updates"] and ours["agent"].keys() == theirs["agent"].keys()
    assert not [name for name in ours["agent"] if not torch.equal(ours["agent"][name], theirs["agent"][name])]
    assert all(torch.equal(a, b) for a, b in zip(ours["generators"], theirs["generators"], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The actor's loss: the numbers of the spec, 6(g)
# ---------------------------------------------------------------------------------------------------------------------


def actor_loss(q, action, bc_alpha=2.5, factor=1.0):
    """Metrics of an update where Q_1(s, .) = factor * q, Q_2 is far below it, pi = 0, and `action` was logged."""
    args = make_args(bc_alpha=bc_alpha, learning_rate=0.0)
    agent = make_agent(args, spread=0.5)
    set_linear(agent.critic, {0: factor}, bias=[0.0, -50.0])
    set_linear(agent.actor.net, {})
    batch, noise = make_batch(B=len(q))
    batch[0, :, 0], batch[0, :, O : O + A] = torch.tensor(q), torch.tensor(action)
    return {name: x.item() for name, x in td3.update(agent, batch, noise, True, args).items()}


def test_actor_loss():
    """Q_1 = [1, -3]: mean |Q_1| = 2, lambda = 1.25; -lambda mean Q_1 = 1.25; with a squared error of 0.25, 1.5.

    It is a mean over action dimensions; and neither Q_2 nor a minimum has a part in it.
    """
    metrics = actor_loss(q=[1.0, -3.0], action=0.5)
    assert metrics["value/lambda"] == pytest.approx(1.25) and metrics["value/policy_q"] == pytest.approx(-1)
    assert metrics["loss/behaviour_cloning"] == pytest.approx(0.25) and metrics["loss/actor"] == pytest.approx(1.5)
    uneven = actor_loss(q=[1.0, -3.0], action=[[1.0, 0.5], [-0.5, 0.0]])
    assert uneven["loss/behaviour_cloning"] == pytest.approx((1 + 0.25 + 0.25 + 0) / 4)


def test_actor_loss_does_not_know_the_scale_of_q():
    reference = actor_loss(q=[1.0, -3.0, 0.5], action=0.3)
    for factor in (10.0, 0.01):
        metrics = actor_loss(q=[1.0, -3.0, 0.5], action=0.3, factor=factor)
        assert metrics["loss/actor"] == pytest.approx(reference["loss/actor"], rel=1e-5)
        assert metrics["value/lambda"] == pytest.approx(reference["value/lambda"] / factor, rel=1e-5)


def test_bc_alpha_0_is_behaviour_cloning():
    """The loss is the squared error, and the actor moves as if it alone had been minimised."""
    assert actor_loss(q=[1.0, -3.0], action=0.5, bc_alpha=0.0)["loss/actor"] == pytest.approx(0.25)
    args = make_args(bc_alpha=0.0, learning_rate=0.01)
    agent, clone = make_agent(args, spread=0.5), make_agent(args, spread=0.5)
    batch, noise = make_batch()
    td3.update(agent, batch, noise, True, args)
    error = clone.actor(batch[..., :O]) - batch[..., O : O + A]
    clone.optimizers["actor"].minimize(error.square().mean())
    for ours, theirs in zip(agent.actor.parameters(), clone.actor.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_first_critic():
    """Q_1 of every seed, not Q_2, as it stands now; gradients reach the action, but no critic."""
    agent = make_agent(make_args(num_seeds=3), spread=0.5)
    x = torch.randn(3, 8, O + A, generator=torch.Generator().manual_seed(0)).requires_grad_()
    first, both = td3.first_critic(agent.critic)(x), agent.critic(x)
    torch.testing.assert_close(first, both[:, 0])
    assert not torch.allclose(first, both[:, 1])
    first.sum().backward()
    gradient = torch.autograd.grad(both[:, 0].sum(), x)[0]
    torch.testing.assert_close(x.grad, gradient)
    assert all(p.grad is None for p in agent.critic.parameters())
    with torch.no_grad():
        layers_of(agent.critic)[-1][1].add_(1)
    torch.testing.assert_close(td3.first_critic(agent.critic)(x), first + 1)
    assert agent.critic.lead == (3, 2) and agent.critic(x).shape == (3, 2, 8, 1)  # itself it stays as it was


# ---------------------------------------------------------------------------------------------------------------------
# Turns of the actor and its targets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 2, 3, 7, 1000])
def test_actor_turns(delay):
    """Updates number delay, 2 delay, ..., counted from 1 over the whole run, in every block."""
    turns = torch.cat([td3.actor_turns(100 * block, delay) for block in range(12)])
    assert turns.device == CPU and turns.dtype == torch.bool and len(turns) == 1200
    assert (turns.nonzero().squeeze(1) + 1).tolist() == list(range(delay, 1201, delay))


def test_three_updates_move_the_actor_once():
    """(g): after 3 updates one of the actor, three of the critics; targets and actor move in the second one only."""
    args = make_args(num_seeds=2, learning_rate=0.01)
    agent = make_agent(args, spread=0.5)
    targets = {"target_actor", "target_critic"}
    for n, turn in enumerate(td3.actor_turns(0, 2)[:3]):
        before = state_of(agent)
        metrics = td3.update(agent, *make_batch(S=2, seed=n), turn, args)
        assert changed(agent, before) == ({"critic", "actor", *targets} if n == 1 else {"critic"})
        assert ("loss/actor" in metrics) == (n == 1) and all(x.shape == (2,) for x in metrics.values())
    assert agent.optimizers["critic"].num_steps == 3 and agent.optimizers["actor"].num_steps == 1


@pytest.mark.parametrize("delay, actor_steps", [(1, 137), (2, 68), (3, 45)])
def test_turns_through_main(run_main, data, tmp_path, delay, actor_steps):
    flags = "--dataset", data, *BLIND, "--num-updates", 137, "--policy-delay", delay, "--checkpoint-every", 31
    run_main(*flags, "--run-dir", tmp_path / "run")
    agent = checkpoint_of(tmp_path / "run")["agent"]
    assert agent["optimizers.critic.num_steps"] == 137 and agent["optimizers.actor.num_steps"] == actor_steps


def test_resume_at_an_odd_update(run_main, data, tmp_path):
    """A run that ended after 137 updates goes on with the right turns and draws, and ends like one of 250 at once."""
    flags = "--dataset", data, *BLIND, "--num-seeds", 2
    run_main(*flags, "--num-updates", 250, "--run-dir", tmp_path / "whole")
    run_main(*flags, "--num-updates", 137, "--run-dir", tmp_path / "parts")
    run_main("--resume", tmp_path / "parts", "--num-updates", 250)
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Bellman targets
# ---------------------------------------------------------------------------------------------------------------------


def bellman_target(noise, not_terminated=1.0, mean_action=0.5, biases=(0.0, 0.0), **flags):
    """y of a transition with r = 1.5, gamma = 0.5 and Q_target(s', a') = 3 a'_0 + biases, from the loss at Q = 0."""
    args = make_args(learning_rate=0.0, gamma=0.5, **flags)
    agent = make_agent(args, spread=0.5)
    set_linear(agent.target_critic, {O: 3.0}, bias=biases)
    set_linear(agent.critic, {})
    set_linear(agent.target_actor.net, {}, bias=math.atanh(mean_action))
    batch, _ = make_batch(B=1)
    batch[..., O + A], batch[..., -1] = 1.5, not_terminated
    loss = td3.update(agent, batch, torch.full((1, 1, A), noise), False, args)["loss/critic"].item()
    return math.sqrt(loss / 2)


@pytest.mark.parametrize(
    "noise, next_action",
    [(0.0, 0.6), (1.0, 0.8), (-1.0, 0.4), (1.9, 0.98), (2.1, 1.0), (9.0, 1.0), (-2.4, 0.12), (-9.0, 0.1)],
)
def test_target_policy_smoothing(noise, next_action):
    """About an action of 0.6, or -0.6: sigma 0.2, clipped at 0.5; the action stays in [-1, 1]."""
    above = bellman_target(noise, mean_action=0.6)
    below = bellman_target(-noise, mean_action=-0.6, biases=(9.0, 9.0))
    assert above == pytest.approx(1.5 + 0.5 * 3 * next_action, rel=1e-5)
    assert below == pytest.approx(1.5 + 0.5 * (9 - 3 * next_action), rel=1e-5)


def test_noise_flags():
    assert bellman_target(1.0, policy_noise=0.1) == pytest.approx(1.5 + 1.5 * 0.6, rel=1e-5)
    assert bellman_target(1.0, policy_noise=0.4, noise_clip=0.25) == pytest.approx(1.5 + 1.5 * 0.75, rel=1e-5)
    assert bellman_target(9.0, policy_noise=0.0) == pytest.approx(1.5 + 1.5 * 0.5, rel=1e-5)


def test_the_smaller_target_counts():
    assert bellman_target(0.0, biases=(4.0, 1.0)) == pytest.approx(1.5 + 0.5 * (1.5 + 1), rel=1e-5)
    assert bellman_target(0.0, biases=(1.0, 4.0)) == pytest.approx(1.5 + 0.5 * (1.5 + 1), rel=1e-5)


def test_targets_bootstrap_through_truncation_only():
    """y = r at a true end, whatever Q(s') is."""
    assert bellman_target(0.0, not_terminated=0.0, biases=(70.0, 70.0)) == pytest.approx(1.5, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The whole update against numpy: forward, hand-derived gradients, Adam, order, turns, Polyak
# ---------------------------------------------------------------------------------------------------------------------


def forward(layers, x):
    """Output of a ReLU network [(W, b), ...] and the input of each layer."""
    inputs = []
    for i, (w, b) in enumerate(layers):
        inputs.append(np.maximum(x, 0) if i else x)
        x = inputs[-1] @ w + b
    return x, inputs


def backward(layers, inputs, grad):
    """Gradients [(dW, db), ...] and that of the network's input, from the gradient at the output."""
    grads = []
    for i in reversed(range(len(layers))):
        grads.append((inputs[i].T @ grad, grad.sum(0, keepdims=True)))
        grad = grad @ layers[i][0].T
        if i:
            grad = grad * (inputs[i] > 0)
    return grads[::-1], grad


class NumpyTD3BC:
    """One seed of TD3+BC in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.moments, self.seen = args, {}, {"noise": [], "next_action": [], "gap": [], "q": []}
        self.actor, self.target_actor = layers(agent.actor.net), layers(agent.target_actor.net)
        self.critics = [layers(agent.critic, c) for c in range(2)]
        self.target_critics = [layers(agent.target_critic, c) for c in range(2)]

    def adam(self, name, layers, grads):
        stepped = []
        for i, pair in enumerate(zip(layers, grads)):
            new = []
            for j, (p, g) in enumerate(zip(*pair)):
                m, v, t = self.moments.get((name, i, j), (0.0, 0.0, 0))
                m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
                self.moments[name, i, j] = m, v, t
                m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
                new.append(p - self.args.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8))
            stepped.append(tuple(new))
        return stepped

    def polyak(self, target, online):
        rho = self.args.polyak
        return [tuple((1 - rho) * old + rho * new for old, new in zip(*pair)) for pair in zip(target, online)]

    def update(self, batch, noise, turn):
        args, B = self.args, len(batch)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        sa = np.concatenate([s, a], 1)

        smoothing = np.clip(args.policy_noise * noise, -args.noise_clip, args.noise_clip)
        unclipped = np.tanh(forward(self.target_actor, s_next)[0]) + smoothing
        sa_next = np.concatenate([s_next, np.clip(unclipped, -1, 1)], 1)
        next_q = [forward(layers, sa_next)[0] for layers in self.target_critics]
        y = r + args.gamma * mask * np.minimum(*next_q)
        critic_loss = 0
        for c in range(2):
            q, inputs = forward(self.critics[c], sa)
            critic_loss += np.mean((q - y) ** 2)
            grads, _ = backward(self.critics[c], inputs, 2 * (q - y) / B)
            self.critics[c] = self.adam(("critic", c), self.critics[c], grads)
        self.seen["noise"].append(args.policy_noise * noise), self.seen["next_action"].append(unclipped)
        self.seen["gap"].append(next_q[0] - next_q[1])
        if not turn:
            return [critic_loss]

        out, inputs = forward(self.actor, s)
        pi = np.tanh(out)
        q, q_inputs = forward(self.critics[0], np.concatenate([s, pi], 1))
        weight = args.bc_alpha / np.mean(np.abs(q))
        actor_loss = -weight * np.mean(q) + np.mean((pi - a) ** 2)
        _, grad = backward(self.critics[0], q_inputs, np.full((B, 1), -weight / B))
        grad_pi = grad[:, O:] + 2 * (pi - a) / (B * A)
        grads, _ = backward(self.actor, inputs, grad_pi * (1 - pi**2))
        self.actor = self.adam("actor", self.actor, grads)
        self.target_actor = self.polyak(self.target_actor, self.actor)
        self.target_critics = [self.polyak(*pair) for pair in zip(self.target_critics, self.critics)]
        self.seen["q"].append(q)
        return [critic_loss, actor_loss]


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_update_against_numpy(delay):
    """Six updates of two seeds, in float64, with steps large enough that every question of order shows."""
    args = make_args(
        num_seeds=2, learning_rate=0.02, polyak=0.3, gamma=0.9, policy_noise=0.6, noise_clip=0.7, policy_delay=delay
    )
    agent = make_agent(args, spread=0.5).double()
    for optimizer in agent.optimizers.values():
        optimizer.learning_rate.fill_(args.learning_rate)  # it was rounded to float32
    references = [NumpyTD3BC(agent, s, args) for s in range(2)]
    for n, turn in enumerate(td3.actor_turns(0, delay)[:6]):
        batch, noise = (x.double() for x in make_batch(S=2, seed=n))
        metrics = td3.update(agent, batch, noise, turn, args)
        for s, reference in enumerate(references):
            losses = reference.update(batch[s].numpy(), noise[s].numpy(), turn)
            ours = [metrics[name][s].item() for name in ("loss/critic", "loss/actor") if name in metrics]
            np.testing.assert_allclose(ours, losses, rtol=1e-9)
    for s, reference in enumerate(references):
        seen = {name: np.concatenate(x) for name, x in reference.seen.items()}  # every branch is taken
        for name, bound in (("noise", 0.7), ("next_action", 1)):
            assert 0 < np.mean(np.abs(seen[name]) > bound) < 1, name
        assert seen["gap"].min() < 0 < seen["gap"].max() and seen["q"].min() < 0 < seen["q"].max()
        nets = [(agent.actor.net, (), reference.actor), (agent.target_actor.net, (), reference.target_actor)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(2)]
        nets += [(agent.target_critic, (c,), reference.target_critics[c]) for c in range(2)]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-9)


def test_polyak():
    """Both targets move to (1 - polyak) target + polyak online, with the online networks as the update leaves them."""
    for polyak in (0.0, 0.005, 1.0):
        args = make_args(polyak=polyak, learning_rate=0.01)
        agent = make_agent(args, spread=0.5)
        before = state_of(agent)
        td3.update(agent, *make_batch(), True, args)
        after = state_of(agent)
        for name in (name for name, _ in agent.named_parameters() if name.startswith("target_")):
            online = after[name.removeprefix("target_")]
            assert not torch.equal(online, before[name.removeprefix("target_")])
            expected = (1 - polyak) * before[name].double() + polyak * online.double()
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_each_optimiser_owns_one_network():
    """Targets and normaliser are in no optimiser, no parameter is in two; targets start as the online networks."""
    agent = make_agent(make_args(num_seeds=2))
    owned = {name: set(map(id, o.params)) for name, o in agent.optimizers.items()}
    for name, ids in owned.items():
        assert ids == {id(p) for p in getattr(agent, name).parameters()}
    assert set(owned) == {"actor", "critic"} and not owned["actor"] & owned["critic"]
    for name in owned:
        target = getattr(agent, f"target_{name}")
        assert not any(p.requires_grad for p in target.parameters())
        for frozen, online in zip(target.parameters(), getattr(agent, name).parameters()):
            assert torch.equal(frozen, online) and frozen.data_ptr() != online.data_ptr()


def test_losses_leave_other_networks_alone():
    """The critics' loss reaches the critics alone (no target, no actor), and the actor's the actor alone."""
    args, gradients = make_args(), {}
    agent = make_agent(args, spread=0.5).requires_grad_()  # targets too: only the code keeps gradients away from them

    class Recorder:
        """Stands in for an optimiser: notes which networks its loss depends on, and steps nothing."""

        def __init__(self, name):
            self.name = name

        def minimize(self, loss):
            loss.backward()
            gradients[self.name] = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
            agent.zero_grad()

    del agent.optimizers
    agent.optimizers = {name: Recorder(name) for name in ("actor", "critic")}
    td3.update(agent, *make_batch(), True, args)
    assert gradients == {"critic": {"critic"}, "actor": {"actor"}}
    assert list(gradients) == ["critic", "actor"]  # the actor climbs the critic that has just been improved


def test_initial_weights_are_those_of_torch_linear():
    """Weights and biases uniform on +-1/sqrt(in): extremes and variance, over all networks and layers."""
    agent = td3.TD3BCAgent(11, 3, td3.Args(num_seeds=3), CPU)
    linear = torch.nn.Linear(256, 256)
    assert linear.weight.abs().max() <= 1 / 16 and linear.bias.abs().max() <= 1 / 16  # what torch does, as of today
    for mlp in (agent.actor.net, agent.critic):
        for weight, bias in layers_of(mlp):
            bound = weight.shape[-2] ** -0.5
            for x in (weight, bias):
                assert x.abs().max() <= bound
                if x.numel() > 500:
                    assert x.abs().max() > 0.98 * bound and x.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Normalised observations
# ---------------------------------------------------------------------------------------------------------------------


def make_dataset(rows=500, env_id=None):
    """A Dataset with O = 4, A = 2, observations of four scales, the last of them constant."""
    rng = np.random.default_rng(1)
    scale, shift = np.array([1, 100, 0.01, 0]), np.array([0, -300, 5, 7])
    obs, next_obs = (scale * rng.normal(size=(rows, O)) + shift for _ in range(2))
    next_obs += 0.5 * scale  # their own mean is another one
    columns = obs, rng.uniform(-1, 1, (rows, A)), rng.normal(size=(rows, 1)), next_obs, np.ones((rows, 1))
    environment = {"id": env_id, "kwargs": {}, "references": None}
    return td3.Dataset(np.float32(np.concatenate(columns, 1)), np.array([rows]), np.zeros(1), O, A, environment)


def test_normalize_observations():
    """(s - mean) / (std + 0.001) with the statistics of s alone, for s and s'; a constant column becomes 0."""
    dataset = make_dataset()
    before = dataset.transitions.astype(np.float64)
    mean, std = td3.normalize_observations(dataset)
    np.testing.assert_allclose(mean, before[:, :O].mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, before[:, :O].std(0), rtol=1e-6)
    assert mean.dtype == std.dtype == dataset.transitions.dtype == np.float32
    after = dataset.transitions
    for s in (slice(0, O), slice(O + A + 1, O + A + 1 + O)):
        expected = (before[:, s] - before[:, :O].mean(0)) / (before[:, :O].std(0) + 1e-3)
        np.testing.assert_allclose(after[:, s], expected, atol=1e-4)
    assert np.all(after[:, 3] == 0) and np.all(after[:, O + A + 1 + 3] == 0)
    np.testing.assert_allclose(after[:, :3].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(after[:, :2].std(0), 1, atol=2e-3)
    assert after[:, 2].std() == pytest.approx(0.01 / 0.011, abs=0.01)  # 0.001 is not nothing beside 0.01
    others = [*range(O, O + A + 1), -1]
    np.testing.assert_array_equal(after[:, others], before[:, others])


def test_raw_and_normalised_observations_give_the_same_action():
    """act(raw) is bit-identical to what the update computes from the packed transitions, for every seed."""
    dataset = make_dataset()
    raw = torch.from_numpy(dataset.transitions[:, :O].copy())
    mean, std = td3.normalize_observations(dataset)
    agent = make_agent(make_args(num_seeds=3), obs_mean=mean, obs_std=std)
    normalised = torch.from_numpy(dataset.transitions[:, :O].copy())
    assert agent.actor.obs_mean.shape == agent.actor.obs_std.shape == (3, 1, O)
    actions = agent.actor.act(raw.expand(3, -1, -1))
    assert torch.equal(actions, agent.actor(normalised.expand(3, -1, -1)))
    for s in range(3):
        x = np.float64(normalised.numpy())
        x = forward([(w[s].detach().double().numpy(), b[s].detach().double().numpy()) for w, b in
                     layers_of(agent.actor.net)], x)[0]  # fmt: skip
        np.testing.assert_allclose(actions[s].detach().numpy(), np.tanh(x), atol=1e-5)
        alone = td3.policy_of_seed(agent.actor, s)
        torch.testing.assert_close(alone.act(raw[None])[0], actions[s])


def test_an_agent_without_statistics_cannot_act():
    """... as a forgotten normaliser would; a state dict brings the statistics along."""
    args = make_args()
    agent = td3.TD3BCAgent(O, A, args, CPU)
    obs = torch.ones(1, 5, O)
    assert agent.actor.act(obs).isnan().all()
    trained = make_agent(args, spread=0.5, obs_mean=np.float32([1, 2, 3, 4]), obs_std=np.float32([4, 3, 2, 1]))
    agent.load_state_dict(trained.state_dict())
    assert torch.equal(agent.actor.act(obs), trained.actor.act(obs)) and not agent.actor.act(obs).isnan().any()


@pytest.mark.parametrize("sampler", ["uniform", "red", "top10"])
def test_the_saved_policy_acts_as_in_training(run_main, data, monkeypatch, tmp_path, sampler):
    """Through main(), then --evaluate: both run the same function of raw observations, with statistics of the whole
    dataset, whatever the sampler draws; and the learner saw normalised states with the rewards as logged."""
    run_episodes, update, policies, batches = td3.run_episodes, td3.update, [], []

    def recorder(policy, *rest):
        policies.append(td3.pickle.loads(policy) if isinstance(policy, bytes) else policy)
        return run_episodes(policy, *rest)

    monkeypatch.setattr(td3, "run_episodes", recorder)
    monkeypatch.setattr(td3, "update", lambda agent, batch, *rest: batches.append(batch) or update(agent, batch, *rest))
    flags = "--dataset", data, *SMALL, "--num-updates", 20, "--num-seeds", 2, "--sampler", sampler
    run_main(*flags, "--eval-episodes", 1, "--eval-workers", 0, "--run-dir", tmp_path / "run")
    run_main("--evaluate", tmp_path / "run")
    assert len(policies) == 4

    episodes = harness.hopper_episodes()
    states = np.concatenate([obs[:-1] for obs, *_ in episodes]).astype(np.float64)
    mean, std = states.mean(0), states.std(0)
    raw = np.float32(3 * np.random.default_rng(0).normal(size=(50, 11)) + 1)
    saved = checkpoint_of(tmp_path / "run")["agent"]
    layers = [(saved[f"actor.net.weight{i}"], saved[f"actor.net.bias{i}"]) for i in range(3)]
    for s in range(2):
        in_training, evaluated = (policies[i].act(torch.from_numpy(raw)[None]) for i in (s, 2 + s))
        assert torch.equal(in_training, evaluated)
        out = forward([(w[s].double().numpy(), b[s].double().numpy()) for w, b in layers], (raw - mean) / (std + 1e-3))
        np.testing.assert_allclose(evaluated[0].detach().numpy(), np.tanh(out[0]), atol=1e-5)
    logged = {}
    for obs, _, reward, *_ in episodes:
        logged |= {tuple(np.round((o - mean) / (std + 1e-3), 3)): r for o, r in zip(np.float64(obs), reward)}
    for row in batches[-1][1].double().numpy():
        assert row[14] == pytest.approx(logged[tuple(np.round(row[:11], 3))], rel=1e-5)


@pytest.mark.parametrize(
    "env_id, mode, change",
    [
        ("Hopper-v5", "auto", 0),
        ("AntMaze_UMaze-v4", "auto", -1),
        ("PointMaze_UMaze-v3", "auto", -1),
        ("FrankaKitchen-v1", "auto", 0),
        ("AdroitHandPen-v1", "auto", 0),
        (None, "auto", 0),
        ("AntMaze_UMaze-v4", "none", 0),
        ("Hopper-v5", "shift", -1),
    ],
)
def test_reward_transforms(env_id, mode, change):
    """As logged, but for the mazes: r - 1."""
    dataset = make_dataset(env_id=env_id)
    before = dataset.transitions.copy()
    td3.transform_rewards(dataset, mode, td3.TD3_BC_TRANSFORMS)
    before[:, O + A] += change
    np.testing.assert_array_equal(dataset.transitions, before)


@pytest.mark.parametrize(
    "flag, value",
    [("--bc-alpha", -1), ("--policy-noise", -0.1), ("--noise-clip", "nan"), ("--policy-delay", 0), ("--polyak", 2)],
)
def test_flag_out_of_range(run_main, data, capsys, tmp_path, flag, value):
    with pytest.raises(SystemExit) as ended:
        run_main("--dataset", data, flag, value, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {flag} ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n, turn in enumerate(td3.actor_turns(0, 2)[:6]):
            batch, noise = make_batch(S=2, seed=n)
            batch[1] *= factor
            noise[1] *= factor
            td3.update(agent, batch, noise, turn, args)
        states.append(state_of(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        if "obs_" not in name:
            assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_five_is_the_run_with_seed_k(run_main, data, monkeypatch, tmp_path):
    """Through main(): the same first weights, batches and noise, and the same agents after 50 updates."""
    update, runs = td3.update, {}

    def recorder(agent, batch, noise, turn, args):
        record = runs.setdefault((args.seed, args.num_seeds), {"draws": [], "first": state_of(agent)})
        record["draws"].append(torch.cat([batch, noise], -1))
        return update(agent, batch, noise, turn, args)

    monkeypatch.setattr(td3, "update", recorder)
    for seed, num_seeds in ((3, 5), (3, 1), (5, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        flags = "--num-updates", 50, "--seed", seed, "--num-seeds", num_seeds, "--learning-rate", 0.003
        run_main("--dataset", data, *BLIND, *flags, "--run-dir", run_dir)
        last = {k: x for k, x in checkpoint_of(run_dir)["agent"].items() if not k.startswith("optimizers.")}
        runs[seed, num_seeds] |= {"last": last, "draws": torch.stack(runs[seed, num_seeds]["draws"])}
    five = runs[3, 5]
    assert five["draws"].shape == (50, 5, 16, 30)
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
# Learning: a first action that costs at once and pays one step later
# ---------------------------------------------------------------------------------------------------------------------


def learned_policy(**flags):
    """pi and Q_1 of two seeds in the first state, after 500 updates on a log of uniformly random actions.

    The first action a costs 0.5 a; the second step pays 2 a, whatever is done there, and is the end, at an observation
    that looks like the first. So Q(first, a) = (2 gamma - 0.5) a, and best is a = 1; a = -1 for one who does not look
    ahead; 0 is the average action of the log.
    """
    defaults = {"hidden_sizes": (32, 32), "num_seeds": 2, "learning_rate": 3e-3, "polyak": 0.05, "batch_size": 128}
    args = make_args(**{**defaults, **flags})
    a, b = np.random.default_rng(0).uniform(-1, 1, size=(2, 4000, 1))
    zero, one = np.zeros_like(a), np.ones_like(a)
    first = np.concatenate([one, zero, a, -0.5 * a, zero, a, one], 1)  # s = (is first, last action), a, r, s', mask
    second = np.concatenate([zero, a, b, 2 * a, one, zero, zero], 1)
    transitions = torch.from_numpy(np.float32(np.concatenate([first, second])))
    agent, generator = td3.TD3BCAgent(2, 1, args, CPU, 0.0, 1.0), torch.Generator().manual_seed(0)
    for turn in torch.cat([td3.actor_turns(100 * block, args.policy_delay) for block in range(5)]):
        index = torch.randint(len(transitions), (2, 128), generator=generator)
        noise = torch.randn(2, 128, 1, generator=generator)
        td3.update(agent, transitions[index], noise, turn, args)
    start = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    with torch.no_grad():
        action = agent.actor(start)
        q = agent.critic(torch.cat([start, torch.ones(2, 1, 1)], -1))[:, 0]
    return action.flatten(), q.flatten()


def test_td3_bc_looks_ahead():
    action, q = learned_policy()
    assert action.min() > 0.8, action
    torch.testing.assert_close(q, torch.full((2,), 2 * 0.99 - 0.5), rtol=0, atol=0.3)


def test_the_learning_test_is_a_test():
    """One who sees no further than the next reward, or who only clones, does something else."""
    assert learned_policy(gamma=0.0)[0].max() < -0.5
    assert learned_policy(bc_alpha=0.0)[0].abs().max() < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_graph_repeats_its_turns_only_where_they_are_due(run_main, data, tmp_path, delay):
    """main() with its GPU branch taken on the CPU: graphs that ignore the turns they are given, as real ones do, and
    replay those of their capture. The run, resumed at an odd update, must end like one without graphs."""
    source = Path(td3.__file__).read_text()
    assert source.count('if device.type == "cuda" and') == 1
    path = tmp_path / "td3_bc_red.py"
    path.write_text(source.replace('if device.type == "cuda" and', "if True and"))
    spec = importlib.util.spec_from_file_location("td3_bc_red_captured", path)
    captured = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(captured)
    graphs, replays = [], []

    def fake_graph(step, agent, *inputs):
        turns = inputs[-1].clone()
        graphs.append(turns)
        return lambda *new_inputs: replays.append(len(turns)) or step(*new_inputs[:-1], turns)

    captured.cuda_graph = fake_graph
    flags = "--dataset", data, *BLIND, "--policy-delay", delay, "--log-every", 25
    run_main(*flags, "--num-updates", 230, "--run-dir", tmp_path / "eager")
    run_main(*flags, "--num-updates", 37, "--run-dir", tmp_path / "run", module=captured)
    run_main("--resume", tmp_path / "run", "--num-updates", 230, module=captured)
    assert_same_checkpoint(tmp_path / "run", tmp_path / "eager")
    assert set(replays) == {td3.UPDATES_PER_GRAPH} and sum(replays) > 150  # nearly all updates
    assert len(graphs) <= 2 * delay


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("delay", [2, 3])
def test_captured_updates_equal_eager_ones(delay):
    """CUDA graphs of ten updates, one for each phase of the turns, replayed, give what as many eager updates give."""
    args = make_args(num_seeds=2, learning_rate=1e-3, policy_delay=delay)
    generator = torch.Generator().manual_seed(2)
    transitions = make_batch(S=1, B=500, seed=1)[0][0].cuda()
    index = torch.randint(500, (60, 2, 32), generator=generator).cuda()
    noise = torch.randn(60, 2, 32, A, generator=generator).cuda()
    turns = td3.actor_turns(0, delay)[:60]
    agents = [make_agent(args, device="cuda") for _ in range(2)]
    learn = [partial(td3.run_updates, agent, transitions, args) for agent in agents]
    graphs = {}
    for i in range(0, 60, 10):
        inputs = index[i : i + 10], noise[i : i + 10], turns[i : i + 10]
        if i % delay not in graphs:
            before = {name: x.clone() for name, x in agents[0].state_dict().items()}
            graphs[i % delay] = td3.cuda_graph(learn[0], agents[0], *inputs)
            assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
        captured, eager = graphs[i % delay](*inputs), learn[1](*inputs)
        assert captured.keys() == eager.keys()
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-5)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-3, atol=1e-4)


@needs_gpu
def test_a_run_on_a_gpu_ends_as_one_without_graphs(run_main, data, monkeypatch, tmp_path):
    flags = "--dataset", data, *BLIND, "--device", "cuda", "--policy-delay", 3, "--num-updates", 230
    run_main(*flags, "--run-dir", tmp_path / "graphs")
    monkeypatch.setattr(td3, "cuda_graph", lambda step, agent, *inputs: step)
    run_main(*flags, "--run-dir", tmp_path / "eager")
    ours, theirs = (checkpoint_of(tmp_path / name)["agent"] for name in ("graphs", "eager"))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume
# ---------------------------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_ends_like_one_never_stopped(data, tmp_path):
    """kill -9 at a random moment after a checkpoint at an odd update, --resume: the same bits, the same csv."""
    rng, victim, path = random.Random(3), tmp_path / "victim", tmp_path / "victim" / "checkpoint.pt"
    flags = "--dataset", data, *SMALL, "--num-updates", 900, "--eval-every", 370, "--eval-episodes", 1
    flags += "--eval-workers", 0, "--checkpoint-every", 111
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    process = run(harness.command("td3_bc_red", *flags, "--run-dir", victim))
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
    done = [run(harness.command("td3_bc_red", "--resume", victim))]
    done.append(run(harness.command("td3_bc_red", *flags, "--run-dir", tmp_path / "unbroken")))
    for process in done:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    assert_same_checkpoint(victim, tmp_path / "unbroken")
    assert (victim / "evaluations.csv").read_text() == (tmp_path / "unbroken" / "evaluations.csv").read_text()
    assert json.loads((victim / "config.json").read_text())["script"] == "td3_bc_red"
