"""td3_bc_scaled.py against numpy, numbers by hand and its own runs. Networks, ensemble, policy and evaluation sampling
are asac.py's, to the letter, and are tested there."""

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

td3 = harness.load("td3_bc_scaled")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
CPU = torch.device("cpu")
MODERN = {"architecture": "modern", "hidden_sizes": (16,) * 3}


def make_args(**flags):
    return td3.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, **flags})


def make_agent(args, spread=None, device="cpu"):
    """A ScaledTD3BCAgent. With `spread`, all parameters are drawn anew, so that targets and online networks differ."""
    agent = td3.ScaledTD3BCAgent(O, A, args, torch.device(device))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(S=1, B=32, seed=0):
    """(S, B, O + A + 1 + O + 1) random transitions, a quarter of them terminal, next_noise and noise (S, B, A)."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, S, B, O))
    action, reward = rng.uniform(-1, 1, size=(S, B, A)), rng.normal(size=(S, B, 1))
    not_terminated = np.float64(rng.random((S, B, 1)) > 0.25)
    batch = np.concatenate([obs, action, reward, next_obs, not_terminated], -1)
    return [torch.from_numpy(x).float() for x in (batch, *rng.normal(size=(2, S, B, A)))]


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    return [(getattr(mlp, f"weight{i}"), getattr(mlp, f"bias{i}")) for i in range(len(mlp.layers))]


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


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): the script's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["td3_bc_scaled.py", *map(str, flags)])
        try:
            td3.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


SMALL = "--hidden-sizes", 16, 16, "--batch-size", 16, "--device", "cpu", "--eval-workers", 0
BLIND = *SMALL, "--eval-episodes", 0


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same_checkpoint(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators; the same update; the same evaluations."""
    ours, theirs = checkpoint_of(run_dir), checkpoint_of(reference)
    assert ours["num_updates"] == theirs["num_updates"] and ours["agent"].keys() == theirs["agent"].keys()
    assert not [name for name in ours["agent"] if not torch.equal(ours["agent"][name], theirs["agent"][name])]
    assert all(torch.equal(a, b) for a, b in zip(ours["generators"], theirs["generators"], strict=True))
    names = sorted(path.name for path in Path(reference).glob("*.csv"))
    assert names == sorted(path.name for path in Path(run_dir).glob("*.csv"))
    assert all((Path(run_dir) / n).read_text() == (Path(reference) / n).read_text() for n in names)


# ---------------------------------------------------------------------------------------------------------------------
# Critics and actor: the numbers of the spec, 2(g)
# ---------------------------------------------------------------------------------------------------------------------


def bellman_target(noise, mean_action=0.5, not_terminated=1.0, biases=(0.0, 0.0), **flags):
    """y of a transition with r = 1.5, gamma = 0.5 and Q_target(s', a') = 3 a'_0 + biases, from the loss at Q = 0."""
    args = make_args(learning_rate=0.0, gamma=0.5, num_critics=len(biases), **flags)
    agent = make_agent(args, spread=0.5)
    set_linear(agent.target_critic, {O: 3.0}, bias=biases)
    set_linear(agent.critic, {})
    set_linear(agent.actor.net, {}, bias=math.atanh(mean_action))
    batch, _, other_noise = make_batch(B=1)
    batch[..., O + A], batch[..., -1] = 1.5, not_terminated
    loss = td3.update(agent, batch, torch.full((1, 1, A), noise), other_noise, args)["loss/critic"].item()
    return math.sqrt(2 * loss / len(biases))


@pytest.mark.parametrize(
    "noise, next_action",
    [(0.0, 0.5), (1.0, 0.7), (-1.0, 0.3), (1.45, 0.79), (1.55, 0.8), (9.0, 0.8), (-9.0, 0.2)],
)
def test_next_action(noise, next_action):
    """The online actor's mean of 0.5, noise of 0.2 clipped at 0.3; the same about 0.9, where 1 is the bound."""
    assert bellman_target(noise) == pytest.approx(1.5 + 0.5 * 3 * next_action, rel=1e-5)
    near_the_bound = min(next_action + 0.4, 1)
    assert bellman_target(noise, mean_action=0.9) == pytest.approx(1.5 + 0.5 * 3 * near_the_bound, rel=1e-5)
    free = bellman_target(noise, noise_clip=9.0, policy_std=0.1)
    assert free == pytest.approx(1.5 + 0.5 * 3 * np.clip(0.5 + 0.1 * noise, -1, 1), rel=1e-5)


@pytest.mark.parametrize(
    "biases, pessimism, q",
    [
        ((4.0, 1.0), 0.5, 1.0),
        ((1.0, 4.0), 0.5, 1.0),
        ((1.0, 4.0), 0.0, 2.5),
        ((1.0, 4.0), 1.0, -0.5),
        ((6.0, 1.0, 2.0), 0.5, 4 / 3),
        ((5.0,), 0.5, 5.0),
    ],
)
def test_bootstrap_from_the_pessimistic_ensemble(biases, pessimism, q):
    """The minimum of two critics at 0.5 (classic TD3); nothing is left of Q at a true end."""
    y = bellman_target(0.0, biases=biases, pessimism=pessimism)
    assert y == pytest.approx(1.5 + 0.5 * (3 * 0.5 + q), rel=1e-5)
    assert bellman_target(0.0, biases=biases, pessimism=pessimism, not_terminated=0.0) == pytest.approx(1.5, rel=1e-5)


def test_critic_loss_is_the_classic_one():
    """Spec g1, g4: with two critics and 0.5, clipped double Q-learning; half the sum of the critics' mean errors."""
    args = make_args(num_seeds=2, learning_rate=0.0)
    agent = make_agent(args, spread=0.5)
    batch, next_noise, noise = make_batch(S=2)
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)
    with torch.no_grad():
        next_action = (agent.actor.net(next_obs).tanh() + (0.2 * next_noise).clamp(-0.3, 0.3)).clamp(-1, 1)
        q1, q2 = agent.target_critic(torch.cat([next_obs, next_action], -1)).unbind(1)
        y = reward + 0.99 * not_terminated * torch.minimum(q1, q2)
        ours = agent.critic(torch.cat([obs, action], -1)).unbind(1)
        expected = sum(0.5 * (q - y).square().mean((1, 2)) for q in ours)
    loss = td3.update(agent, batch, next_noise, noise, args)["loss/critic"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def actor_metrics(q, action, bc_coef, biases=(0.0, 2.0)):
    """Metrics of an update where Q_c(s, .) = q + biases[c], pi = 0 without noise, and `action` was logged."""
    args = make_args(bc_coef=bc_coef, learning_rate=0.0)
    agent = make_agent(args, spread=0.5)
    set_linear(agent.critic, {0: 1.0}, bias=biases)
    set_linear(agent.actor.net, {})
    batch, next_noise, noise = make_batch(B=len(q))
    batch[0, :, 0], batch[0, :, O : O + A] = torch.tensor(q), torch.tensor(action)
    return {name: x.item() for name, x in td3.update(agent, batch, next_noise, 0 * noise, args).items()}


def test_actor_loss():
    """Q_bar = (1, -3): mean 1 without, 2 with the absolute value; squared error 0.25: 1 + alpha * 2 * 0.25."""
    for bc_coef in (0.0, 0.1, 3.0):
        metrics = actor_metrics([1.0, -3.0], 0.5, bc_coef)
        assert metrics["value/policy_q"] == pytest.approx(-1)
        assert metrics["loss/behaviour_cloning"] == pytest.approx(0.25)
        assert metrics["loss/actor"] == pytest.approx(1 + bc_coef * 2 * 0.25, rel=1e-6)
    uneven = actor_metrics([1.0, -3.0], [[1.0, 0.5], [-0.5, 0.0]], 1.0)  # a mean over action dimensions, too
    assert uneven["loss/behaviour_cloning"] == pytest.approx((1 + 0.25 + 0.25 + 0) / 4)
    below = actor_metrics([1.0, -3.0], 0.5, 1.0, biases=(0.0, -2.0))  # |Q_bar| is averaged after aggregation
    assert below["loss/actor"] == pytest.approx(3 + (1 + 5) / 2 * 0.25)


def test_cloning_weight():
    """alpha times the average size, seed by seed, and a constant to the gradient."""
    q = torch.tensor([[1.0, -3.0], [0.5, 0.5]], requires_grad=True)
    weight = td3.cloning_weight(q, 0.1)
    torch.testing.assert_close(weight, torch.tensor([0.2, 0.05]))
    assert not weight.requires_grad


class Recorder:
    """Stands in for an optimiser: notes which networks its loss depends on and the gradient; steps nothing."""

    def __init__(self, agent, name, notes):
        self.agent, self.name, self.notes = agent, name, notes

    def minimize(self, loss):
        self.agent.zero_grad()
        loss.backward()
        named = [(n.split(".")[0], p.grad) for n, p in self.agent.named_parameters() if p.grad is not None]
        own = [p.grad.clone() for p in getattr(self.agent, self.name).parameters()]
        self.notes.append((self.name, {n for n, _ in named}, own))


def record(agent):
    """Takes the agent's optimisers away; returns the list that notes what they would have seen."""
    notes = []
    del agent.optimizers
    agent.optimizers = {name: Recorder(agent, name, notes) for name in ("critic", "actor")}
    return notes


def actor_gradient(agent, batch, args):
    notes = record(agent)
    td3.update(agent, *batch, args)
    return notes[1][2]


def assert_same_gradient(ours, expected):
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_without_cloning_the_gradient_is_that_of_td3():
    """Spec g2: of -min Q at a drawn action alone; the logged actions have no part in it."""
    args = make_args(bc_coef=0.0)
    agent = make_agent(args, spread=0.5)
    batch, next_noise, noise = make_batch()
    obs = batch[..., :O]
    action = (agent.actor.net(obs).tanh() + 0.2 * noise).clamp(-1, 1)
    loss = -agent.critic(torch.cat([obs, action], -1)).amin(1).mean()
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    assert any(g.abs().max() > 0.01 for g in expected)
    assert_same_gradient(actor_gradient(agent, (batch, next_noise, noise), args), expected)
    batch[..., O : O + A] = 0.7
    assert_same_gradient(actor_gradient(make_agent(args, spread=0.5), (batch, next_noise, noise), args), expected)


@pytest.mark.parametrize("c", [3.0, -3.0])
def test_where_q_is_flat_the_gradient_is_that_of_cloning(c):
    """Spec g3: Q = c everywhere: alpha |c| times the gradient of the drawn action's squared error."""
    args = make_args(bc_coef=0.5)
    agent = make_agent(args, spread=0.5)
    set_linear(agent.critic, {}, bias=c)
    batch, next_noise, noise = make_batch()
    action = (agent.actor.net(batch[..., :O]).tanh() + 0.2 * noise).clamp(-1, 1)
    loss = 0.5 * 3.0 * (action - batch[..., O : O + A]).square().mean()
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    assert_same_gradient(actor_gradient(agent, (batch, next_noise, noise), args), expected)


def test_large_bc_coef_clones():
    """Spec g6: at 1e6 the mean goes to the logged actions of a fixed batch, noise or not."""
    args = make_args(bc_coef=1e6, learning_rate=0.01, hidden_sizes=(32, 32), batch_size=4)
    agent, generator = make_agent(args), torch.Generator().manual_seed(0)
    batch, _, _ = make_batch(B=4)
    batch[..., O : O + A] *= 0.5
    before = (agent.actor(batch[..., :O]) - batch[..., O : O + A]).abs().max()
    for n in range(200):
        agent.optimizers["actor"].learning_rate.fill_(0.01 / (1 + n / 20))
        td3.update(agent, batch, *torch.randn(2, 1, 4, A, generator=generator), args)
    error = (agent.actor(batch[..., :O]) - batch[..., O : O + A]).abs().max()
    assert error < 0.1 < 0.3 < before, (error, before)


def test_targets_move_by_polyak():
    """Spec g5: 0.005 of the way to the critics as the update leaves them; no other target, and it starts as a copy."""
    args = make_args(learning_rate=0.01)
    agent = make_agent(args)
    before = state_of(agent)
    td3.update(agent, *make_batch(), args)
    after = state_of(agent)
    targets = [name for name in before if name.startswith("target_")]
    assert {name.split(".")[0] for name in targets} == {"target_critic"}
    for name in targets:
        online = name.removeprefix("target_")
        assert torch.equal(before[name], before[online]) and not torch.equal(after[online], before[online])
        torch.testing.assert_close(after[name] - before[name], 0.005 * (after[online] - before[online]))


# ---------------------------------------------------------------------------------------------------------------------
# The whole update against numpy: forward, hand-derived gradients, Adam, order, Polyak
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


def lower_mean(q, pessimism):
    """Q_bar of a list of C >= 2 arrays, by its definition, and its derivatives by each of them."""
    C = len(q)
    penalty = pessimism / (C * C - C)
    value = sum(q) / C - penalty * sum(np.abs(q[i] - q[j]) for i in range(C) for j in range(C))
    slopes = [1 / C - 2 * penalty * sum(np.sign(q[i] - q[j]) for j in range(C)) for i in range(C)]
    return value, slopes


class NumpyTD3BC:
    """One seed of td3_bc_scaled.py in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.moments, self.seen = args, {}, {"next_offset": [], "unclipped": [], "gap": [], "q": []}
        self.actor = layers(agent.actor.net)
        self.critics = [layers(agent.critic, c) for c in range(args.num_critics)]
        self.target_critics = [layers(agent.target_critic, c) for c in range(args.num_critics)]

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

    def update(self, batch, next_noise, noise):
        args, B = self.args, len(batch)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)

        offset = args.policy_std * next_noise
        a_next = np.tanh(forward(self.actor, s_next)[0]) + np.clip(offset, -args.noise_clip, args.noise_clip)
        sa_next = np.concatenate([s_next, np.clip(a_next, -1, 1)], 1)
        next_q = [forward(layers, sa_next)[0] for layers in self.target_critics]
        y, critic_loss = r + args.gamma * mask * lower_mean(next_q, args.pessimism)[0], 0
        for c in range(args.num_critics):
            q, inputs = forward(self.critics[c], np.concatenate([s, a], 1))
            critic_loss += 0.5 * np.mean((q - y) ** 2)
            grads, _ = backward(self.critics[c], inputs, (q - y) / B)
            self.critics[c] = self.adam(("critic", c), self.critics[c], grads)

        out, inputs = forward(self.actor, s)
        unclipped = np.tanh(out) + args.policy_std * noise
        drawn = np.clip(unclipped, -1, 1)
        passes = [forward(layers, np.concatenate([s, drawn], 1)) for layers in self.critics]
        q, slopes = lower_mean([q for q, _ in passes], args.pessimism)
        weight = args.bc_coef * np.mean(np.abs(q))
        actor_loss = -np.mean(q) + weight * np.mean((drawn - a) ** 2)
        grad = weight * 2 * (drawn - a) / (B * A)
        for layers, (_, q_inputs), slope in zip(self.critics, passes, slopes):
            grad = grad + backward(layers, q_inputs, -slope / B)[1][:, O:]
        grads, _ = backward(self.actor, inputs, grad * (np.abs(unclipped) < 1) * (1 - np.tanh(out) ** 2))
        self.actor = self.adam("actor", self.actor, grads)

        for c in range(args.num_critics):
            pairs = zip(self.target_critics[c], self.critics[c])
            rho = args.polyak
            self.target_critics[c] = [tuple((1 - rho) * x + rho * y for x, y in zip(*pair)) for pair in pairs]
        for name, x in (("next_offset", offset), ("unclipped", unclipped), ("gap", next_q[0] - next_q[1]), ("q", q)):
            self.seen[name].append(x)
        return [critic_loss, actor_loss, q.mean()]


def in_double(agent, args):
    """The agent in float64, its learning rates not rounded to float32."""
    for optimizer in agent.double().optimizers.values():
        assert optimizer.learning_rate.item() == pytest.approx(args.learning_rate)
        optimizer.learning_rate.fill_(args.learning_rate)
    return agent


@pytest.mark.parametrize("flags", [{}, {"bc_coef": 0.0}, {"num_critics": 2, "pessimism": 0.5}])
def test_update_against_numpy(flags):
    """Six updates of two seeds, in float64, with steps so large that every question of order shows."""
    args = make_args(**{
        "num_seeds": 2, "num_critics": 3, "learning_rate": 0.02, "polyak": 0.3, "gamma": 0.9, "pessimism": 0.7,
        "policy_std": 0.5, "bc_coef": 0.7, **flags,
    })  # fmt: skip
    agent = in_double(make_agent(args, spread=0.5), args)
    references = [NumpyTD3BC(agent, s, args) for s in range(2)]
    for n in range(6):
        batch, next_noise, noise = (x.double() for x in make_batch(S=2, seed=n))
        metrics = td3.update(agent, batch, next_noise, noise, args)
        names = "loss/critic", "loss/actor", "value/policy_q"
        for s, reference in enumerate(references):
            expected = reference.update(batch[s].numpy(), next_noise[s].numpy(), noise[s].numpy())
            np.testing.assert_allclose([metrics[name][s].item() for name in names], expected, rtol=1e-8, atol=1e-10)
    for s, reference in enumerate(references):
        seen = {name: np.concatenate(x) for name, x in reference.seen.items()}  # every branch is taken
        for name, bound in (("next_offset", 0.3), ("unclipped", 1)):
            assert 0 < np.mean(np.abs(seen[name]) > bound) < 1, name
        assert seen["gap"].min() < 0 < seen["gap"].max() and seen["q"].min() < 0 < seen["q"].max()
        nets = [(agent.actor.net, (), reference.actor)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(args.num_critics)]
        nets += [(agent.target_critic, (c,), reference.target_critics[c]) for c in range(args.num_critics)]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flags", [{}, MODERN], ids=["simple", "modern"])
def test_losses_leave_other_networks_alone(flags):
    """The actor's step, though it climbs the critics, moves none of them; critics come first; the critics' loss reaches
    no target and no actor; each optimiser owns one network."""
    args = make_args(learning_rate=0.01, **flags)
    agent = make_agent(args, spread=0.5)
    owned = {name: [id(p) for p in optimizer.params] for name, optimizer in agent.optimizers.items()}
    assert owned == {name: [id(p) for p in getattr(agent, name).parameters()] for name in ("actor", "critic")}
    step = agent.optimizers["actor"].minimize
    at_actor = []
    agent.optimizers["actor"].minimize = lambda loss: (
        at_actor.append([p.clone() for p in agent.critic.parameters()]),
        step(loss),
    )
    first = [p.clone() for p in agent.critic.parameters()]
    td3.update(agent, *make_batch(), args)
    assert not any(torch.equal(a, b) for a, b in zip(first, at_actor[0]))
    assert all(torch.equal(a, b) for a, b in zip(at_actor[0], agent.critic.parameters()))
    agent.requires_grad_()  # targets too: only the code keeps gradients away from them
    notes = record(agent)
    td3.update(agent, *make_batch(), args)
    assert [(name, reached) for name, reached, _ in notes[:1]] == [("critic", {"critic"})]
    assert "target_critic" not in notes[1][1]


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01, **MODERN), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(6):
            batch, next_noise, noise = make_batch(S=2, seed=n)
            batch[1] *= factor
            td3.update(agent, batch, next_noise, noise, args)
        states.append(state_of(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_five_is_the_run_with_seed_k(run_main, data, monkeypatch, tmp_path):
    """Through main(): the same first weights, batches and noise, and the same agents after 50 updates."""
    update, runs, modern = td3.update, {}, ("--architecture", "modern", "--hidden-sizes", 16, 16, 16)

    def recorder(agent, batch, next_noise, noise, args):
        note = runs.setdefault((args.seed, args.num_seeds), {"draws": [], "first": state_of(agent)})
        note["draws"].append(torch.cat([batch, next_noise, noise], -1))
        return update(agent, batch, next_noise, noise, args)

    monkeypatch.setattr(td3, "update", recorder)
    for seed, num_seeds in ((3, 5), (3, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        more = "--num-updates", 50, "--seed", seed, "--num-seeds", num_seeds, "--learning-rate", 0.001
        run_main("--dataset", data, *BLIND, *modern, *more, "--run-dir", run_dir)
        last = {k: x for k, x in checkpoint_of(run_dir)["agent"].items() if not k.startswith("optimizers.")}
        runs[seed, num_seeds] |= {"last": last, "draws": torch.stack(runs[seed, num_seeds]["draws"])}
    five = runs[3, 5]
    assert five["draws"].shape == (50, 5, 16, 33)
    for k in (0, 4):
        alone = runs[3 + k, 1]
        assert torch.equal(five["draws"][:, k], alone["draws"][:, 0])
        for name in five["first"]:
            torch.testing.assert_close(five["first"][name][k], alone["first"][name][0], rtol=0, atol=1e-6)
            torch.testing.assert_close(five["last"][name][k], alone["last"][name][0], rtol=2e-3, atol=2e-3)
        assert not torch.equal(five["draws"][:, k], five["draws"][:, 1])
    for name in ("actor.net.weight0", "critic.weight0"):
        assert (five["last"][name] - five["first"][name]).abs().max() > 0.01  # all learned


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a first action that costs at once and pays one step later
# ---------------------------------------------------------------------------------------------------------------------


def learned_policy(**flags):
    """pi and Q(first, 1) of two seeds in the first state, after 250 updates on a log of uniformly random actions.

    The first action a costs 0.5 a; the second step pays 2 a, whatever is done there, and is the end. So
    Q(first, a) = (2 gamma - 0.5) a.
    """
    defaults = {"hidden_sizes": (32, 32), "num_seeds": 2, "learning_rate": 4e-3, "polyak": 0.05, "bc_coef": 0.1}
    args = make_args(**{**defaults, "batch_size": 128, **flags})
    a, b = np.random.default_rng(0).uniform(-1, 1, size=(2, 4000, 1))
    zero, one = np.zeros_like(a), np.ones_like(a)
    first = np.concatenate([one, zero, a, -0.5 * a, zero, a, one], 1)  # s = (is first, last action), a, r, s', mask
    second = np.concatenate([zero, a, b, 2 * a, one, zero, zero], 1)
    transitions = torch.from_numpy(np.float32(np.concatenate([first, second])))
    agent, generator = td3.ScaledTD3BCAgent(2, 1, args, CPU), torch.Generator().manual_seed(0)
    for _ in range(250):
        index = torch.randint(len(transitions), (2, 128), generator=generator)
        td3.update(agent, transitions[index], *torch.randn(2, 2, 128, 1, generator=generator), args)
    start = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    with torch.no_grad():
        return agent.actor(start).flatten(), agent.critic(torch.cat([start, torch.ones(2, 1, 1)], -1))[:, 0].flatten()


@pytest.mark.parametrize("bc_coef", [0.0, 0.1])
def test_td3_bc_looks_ahead(bc_coef):
    action, q = learned_policy(bc_coef=bc_coef)
    assert action.min() > 0.8, action
    torch.testing.assert_close(q, torch.full((2,), 2 * 0.99 - 0.5), rtol=0, atol=0.3)


def test_the_learning_test_is_a_test():
    """One who sees no further than the next reward, or who clones what is there, does something else."""
    assert learned_policy(gamma=0.0)[0].max() < -0.5
    assert learned_policy(bc_coef=1e6)[0].abs().max() < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# Flags, runs
# ---------------------------------------------------------------------------------------------------------------------


def test_presets_and_defaults():
    """What the paper does on its testbeds (spec 7), unless a flag says otherwise."""
    for preset, expected in {
        "small": ("simple-small", 2, 0.5, 1_000_000),
        "mood": ("simple-large", 5, 0.5, 1_500_000),
        "antmaze": ("modern", 5, 0.0, 2_000_000),
        "locomotion": ("modern", 5, 0.5, 2_000_000),
        "locomotion-0.1": ("modern", 10, 0.5, 2_000_000),
    }.items():
        args = td3.Args(preset=preset)
        assert (args.architecture, args.num_critics, args.pessimism, args.num_updates) == expected, preset
    assert td3.Args(preset="antmaze", num_critics=10).num_critics == 10 and td3.Args(pessimism=0.0).pessimism == 0
    args = td3.Args()
    assert (args.batch_size, args.learning_rate, args.gamma, args.polyak) == (512, 3e-4, 0.99, 0.005)
    assert (args.policy_std, args.noise_clip, args.bc_coef, args.eval_samples) == (0.2, 0.3, 1.0, 50)
    assert args.reward_transform == "auto"


@pytest.mark.parametrize(
    "flags",
    [
        ("--pessimism", -1), ("--num-critics", 0), ("--bc-coef", -0.1), ("--policy-std", 0), ("--noise-clip", "nan"),
        ("--eval-samples", 0), ("--hidden-sizes", 8, 8, "--architecture", "modern"),
    ],
)  # fmt: skip
def test_flag_out_of_range(run_main, data, capsys, tmp_path, flags):
    with pytest.raises(SystemExit) as ended:
        run_main("--dataset", data, *flags, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {flags[0]} ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_killed_and_resumed_run_ends_like_one_never_stopped(run_main, data, capsys, tmp_path):
    """kill -9 at a random moment after a checkpoint at an odd update, --resume: the same bits, both csv files; and
    --evaluate speaks of the mean action and of the best of the samples."""
    rng, victim, path = random.Random(3), tmp_path / "victim", tmp_path / "victim" / "checkpoint.pt"
    flags = "--dataset", data, *SMALL, "--num-updates", 400, "--eval-every", 190, "--eval-episodes", 1
    flags += "--checkpoint-every", 47, "--eval-samples", 3, "--architecture", "modern", "--hidden-sizes", 16, 16, 16
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(harness.command("td3_bc_scaled", *flags, "--run-dir", victim), env=env, **pipes)
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
    assert 0 < checkpoint_of(victim)["num_updates"] < 400
    run_main("--resume", victim)
    run_main(*flags, "--run-dir", tmp_path / "unbroken")
    assert_same_checkpoint(victim, tmp_path / "unbroken")
    assert sorted(path.name for path in victim.glob("*.csv")) == ["evaluations.csv", "evaluations_m3.csv"]
    assert (victim / "evaluations.csv").read_text() != (victim / "evaluations_m3.csv").read_text()
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in (tmp_path / "unbroken").iterdir()}
    run_main("--evaluate", tmp_path / "unbroken", "--eval-samples", 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the policy's mean action:" and lines[2] == "the best of 4 samples, by Q_bar:"
    assert lines[1].startswith("seed 0: return ") and lines[3].startswith("seed 0: return ")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "unbroken").iterdir()}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("flags", [{}, MODERN])
def test_captured_updates_equal_eager_ones(flags):
    """CUDA graphs of ten updates, replayed, give what as many eager updates give: networks and singular vectors."""
    args = make_args(num_seeds=2, learning_rate=1e-3, **flags)
    transitions, generator = make_batch(B=500)[0][0].cuda(), torch.Generator().manual_seed(2)
    index = torch.randint(500, (60, 2, 32), generator=generator).cuda()
    noise = torch.randn(2, 60, 2, 32, A, generator=generator).cuda()
    agents = [make_agent(args, device="cuda") for _ in range(2)]
    learn = [partial(td3.run_updates, agent, transitions, args) for agent in agents]
    before = {name: x.clone() for name, x in agents[0].state_dict().items()}
    graph = td3.cuda_graph(learn[0], agents[0], index[:10], *noise[:, :10])
    assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
    for i in range(0, 60, 10):
        captured, eager = (f(index[i : i + 10], *noise[:, i : i + 10]) for f in (graph, learn[1]))
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-3)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-2, atol=1e-3)
