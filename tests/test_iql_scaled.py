"""iql_scaled.py against numpy, numbers by hand and its own runs. Networks, ensemble, policy and evaluation sampling
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

iql = harness.load("iql_scaled")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
CPU = torch.device("cpu")
MODERN = {"architecture": "modern", "hidden_sizes": (16,) * 3}


def make_args(**flags):
    return iql.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, **flags})


def make_agent(args, spread=None, device="cpu"):
    """A ScaledIQLAgent. With `spread`, all parameters are drawn anew, so that targets and online networks differ."""
    agent = iql.ScaledIQLAgent(O, A, args, torch.device(device))
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


def differing(agent, other):
    """The networks that are not the same, bit by bit, in two agents."""
    theirs = state_of(other)
    return {name.split(".")[0] for name, x in state_of(agent).items() if not torch.equal(x, theirs[name])}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): the script's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["iql_scaled.py", *map(str, flags)])
        try:
            iql.main()
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
# Value, critics, weights: the numbers of the spec, 5(g) and 3(g)
# ---------------------------------------------------------------------------------------------------------------------


def metrics_of(rewards=1.5, not_terminated=1.0, learning_rate=0.0, target_q=0.0, value=0.0, q=0.0, **flags):
    """Metrics of an update whose target critics, V and critics are constants (one for each critic, if a list), on a
    batch of two transitions."""
    args = make_args(learning_rate=learning_rate, gamma=0.5, **flags)
    agent = make_agent(args, spread=0.5)
    for network, output in ((agent.target_critic, target_q), (agent.value, value), (agent.critic, q)):
        set_linear(network, {}, bias=output)
    batch, noise = make_batch(B=2)
    batch[..., O + A], batch[..., -1] = rewards, not_terminated
    return {name: x.item() for name, x in iql.update(agent, batch, noise, args).items()}


@pytest.mark.parametrize("expectile, loss", [(0.5, 1.25), (0.7, 1.55), (0.9, 1.85)])
def test_value_loss(expectile, loss):
    """u = (2, -1): tau where it is positive; tau = 0.5 is half the squared error."""
    args = make_args(expectile=expectile, learning_rate=0.0)
    agent = make_agent(args, spread=0.5)
    set_linear(agent.target_critic, {0: 1.0})
    set_linear(agent.value, {})
    batch, noise = make_batch(B=2)
    batch[0, :, 0] = torch.tensor([2.0, -1.0])
    assert iql.update(agent, batch, noise, args)["loss/value"].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "critics, pessimism, u",
    [([1.0, 3.0], 0.5, 1.0), ([1.0, 3.0], 0.0, 2.0), ([1.0, 3.0], 1.0, 0.0), ([1.0, 2.0, 6.0], 0.5, 4 / 3)],
)
def test_value_follows_the_pessimistic_ensemble(critics, pessimism, u):
    """The minimum of two at 0.5, the mean at 0 (AntMaze), the mean of all pairs' minima of three; +10: V is below."""
    target_q = [q + 10 for q in critics]
    flags = {"num_critics": len(critics), "pessimism": pessimism, "expectile": 0.7}
    assert metrics_of(target_q=target_q, **flags)["loss/value"] == pytest.approx(0.7 * (u + 10) ** 2, rel=1e-5)


def test_expectile_of_three_actions():
    """One state, three logged actions with Q = -1, 0, 2: V goes above their mean of 1/3, to the best at tau -> 1."""
    for expectile, expected in ((0.7, 11 / 13), (0.999, 1.995)):
        args = make_args(expectile=expectile, learning_rate=0.02, polyak=0.0, num_critics=1, hidden_sizes=(8, 8))
        agent = make_agent(args, spread=0.3)
        set_linear(agent.target_critic, {O: 2.0})
        batch, noise = make_batch(B=3)
        batch[..., :O] = 0.5
        batch[..., O] = torch.tensor([-0.5, 0.0, 1.0])
        for _ in range(250):
            iql.update(agent, batch, noise, args)
        # tau (2 - v) = (1 - tau) (2 v + 1) where 0 < v < 2
        assert agent.value(batch[..., :O])[0, 0].item() == pytest.approx(expected, abs=0.01), expectile


def test_backup():
    """y = r + gamma V(s'), whatever the target critics say; y = r at a true end; half the sum of squared errors."""
    for critics in (1, 2, 5):
        for target_q in (0.0, 70.0):
            loss = metrics_of(value=3.0, q=1.0, target_q=target_q, num_critics=critics)["loss/critic"]
            assert loss == pytest.approx(0.5 * critics * (1.5 + 0.5 * 3 - 1) ** 2, rel=1e-5)
    assert metrics_of(value=3.0, not_terminated=0.0)["loss/critic"] == pytest.approx(0.5 * 2 * 1.5**2, rel=1e-5)
    halves = metrics_of(value=3.0, not_terminated=torch.tensor([0.0, 1.0]))["loss/critic"]
    assert halves == pytest.approx(0.5 * 2 * (1.5**2 + 3**2) / 2, rel=1e-5)


def test_advantage_weights():
    """Spec 3, g1 to g4, g6: a softmax over the batch of the clipped advantage over beta, seed by seed."""
    advantage = torch.tensor([[1.0, 0.0, -1.0], [10.0, 0.0, 0.0]])
    weight = iql.advantage_weights(advantage, math.inf, 0.5)
    torch.testing.assert_close(weight[0], torch.tensor([0.8668, 0.1173, 0.0159]), rtol=0, atol=5e-5)
    clipped = iql.advantage_weights(advantage, 0.0, 0.5)
    torch.testing.assert_close(clipped[0], torch.tensor([0.4683, 0.4683, 0.0634]), rtol=0, atol=5e-5)
    torch.testing.assert_close(clipped[1], torch.full((3,), 1 / 3))
    torch.testing.assert_close(iql.advantage_weights(advantage, math.inf, 1e9), torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(iql.advantage_weights(advantage + 7, math.inf, 0.5), weight)
    huge = iql.advantage_weights(1e4 * advantage, math.inf, 0.03)
    assert huge.isfinite().all() and (huge >= 0).all() and torch.equal(huge.sum(1), torch.ones(2))


def test_which_advantage():
    """policy: the mean of Q at the logged action less Q_bar at the policy's; value: Q_bar_target less V."""
    networks = {"q": [1.0, 4.0], "target_q": [7.0, 9.0], "value": 5.0}
    assert metrics_of(**networks)["value/advantage"] == pytest.approx(2.5 - 1)
    assert metrics_of(advantage="value", **networks)["value/advantage"] == pytest.approx(7 - 5)
    assert metrics_of(pessimism=0.0, **networks)["value/advantage"] == pytest.approx(0, abs=1e-6)
    assert metrics_of(advantage="value", pessimism=0.0, **networks)["value/advantage"] == pytest.approx(8 - 5)


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
    """Gradients [(dW, db), ...] from the gradient at the output."""
    grads = []
    for i in reversed(range(len(layers))):
        grads.append((inputs[i].T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ layers[i][0].T) * (inputs[i] > 0)
    return grads[::-1]


def lower_mean(q, pessimism):
    """Q_bar of a list of C >= 2 arrays, by its definition."""
    C = len(q)
    return sum(q) / C - pessimism / (C * C - C) * sum(np.abs(q[i] - q[j]) for i in range(C) for j in range(C))


class NumpyIQL:
    """One seed of iql_scaled.py in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.moments, self.errors = args, {}, []
        self.actor, self.value = layers(agent.actor.net), layers(agent.value)
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

    def ensemble(self, critics, s, a):
        return [forward(layers, np.concatenate([s, a], 1))[0] for layers in critics]

    def update(self, batch, noise):
        args, B = self.args, len(batch)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)

        target_q = lower_mean(self.ensemble(self.target_critics, s, a), args.pessimism)
        v, inputs = forward(self.value, s)
        u = target_q - v
        tau = np.where(u > 0, args.expectile, 1 - args.expectile)
        value_loss = np.mean(tau * u**2)
        self.value = self.adam("value", self.value, backward(self.value, inputs, -2 * tau * u / B))
        self.errors.append(u)

        y, critic_loss = r + args.gamma * mask * forward(self.value, s_next)[0], 0
        for c in range(args.num_critics):
            q, inputs = forward(self.critics[c], np.concatenate([s, a], 1))
            critic_loss += 0.5 * np.mean((q - y) ** 2)
            grads = backward(self.critics[c], inputs, (q - y) / B)
            self.critics[c] = self.adam(("critic", c), self.critics[c], grads)

        out, inputs = forward(self.actor, s)
        mu = np.tanh(out)
        if args.advantage == "policy":
            policy_action = np.clip(mu + args.policy_std * noise, -1, 1)
            baseline = lower_mean(self.ensemble(self.critics, s, policy_action), args.pessimism)
            advantage = sum(self.ensemble(self.critics, s, a)) / args.num_critics - baseline
        else:
            advantage = target_q - forward(self.value, s)[0]
        logit = np.minimum(advantage, args.max_advantage) / args.beta
        weight = np.exp(logit - logit.max())
        weight = weight / weight.sum()
        z = (a - mu) / args.policy_std
        log_prob = np.sum(-0.5 * z**2 - np.log(args.policy_std * np.sqrt(2 * np.pi)), 1)
        actor_loss = -np.sum(weight[:, 0] * log_prob)
        grads = backward(self.actor, inputs, -weight * z / args.policy_std * (1 - mu**2))
        self.actor = self.adam("actor", self.actor, grads)

        for c in range(args.num_critics):
            pairs = zip(self.target_critics[c], self.critics[c])
            rho = args.polyak
            self.target_critics[c] = [tuple((1 - rho) * x + rho * y for x, y in zip(*pair)) for pair in pairs]
        return [value_loss, critic_loss, actor_loss, advantage.mean()]


def in_double(agent, args):
    """The agent in float64, its learning rates not rounded to float32."""
    for optimizer in agent.double().optimizers.values():
        assert optimizer.learning_rate.item() == pytest.approx(args.learning_rate)
        optimizer.learning_rate.fill_(args.learning_rate)
    return agent


@pytest.mark.parametrize(
    "flags", [{}, {"advantage": "value"}, {"max_advantage": 0.1, "num_critics": 2}], ids=["policy", "value", "clipped"]
)
def test_update_against_numpy(flags):
    """Six updates of two seeds, in float64, with steps so large that every question of order shows."""
    args = make_args(**{
        "num_seeds": 2, "num_critics": 3, "learning_rate": 0.02, "polyak": 0.3, "gamma": 0.9, "pessimism": 0.7,
        "expectile": 0.75, "beta": 0.4, **flags,
    })  # fmt: skip
    agent = in_double(make_agent(args, spread=0.5), args)
    references = [NumpyIQL(agent, s, args) for s in range(2)]
    for n in range(6):
        batch, noise = (x.double() for x in make_batch(S=2, seed=n))
        metrics = iql.update(agent, batch, noise, args)
        names = "loss/value", "loss/critic", "loss/actor", "value/advantage"
        for s, reference in enumerate(references):
            expected = reference.update(batch[s].numpy(), noise[s].numpy())
            np.testing.assert_allclose([metrics[name][s].item() for name in names], expected, rtol=1e-8, atol=1e-10)
    for s, reference in enumerate(references):
        errors = np.concatenate(reference.errors)
        assert errors.min() < 0 < errors.max()  # both sides of the expectile are taken
        nets = [(agent.actor.net, (), reference.actor), (agent.value, (), reference.value)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(args.num_critics)]
        nets += [(agent.target_critic, (c,), reference.target_critics[c]) for c in range(args.num_critics)]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-9)


class Recorder:
    """Stands in for an optimiser: notes which networks its loss depends on, and steps nothing."""

    def __init__(self, agent, name, notes):
        self.agent, self.name, self.notes = agent, name, notes

    def minimize(self, loss):
        self.agent.zero_grad()
        loss.backward()
        reached = {n.split(".")[0] for n, p in self.agent.named_parameters() if p.grad is not None}
        self.notes.append((self.name, reached))


@pytest.mark.parametrize("flags", [{}, {"advantage": "value"}, MODERN], ids=["policy", "value", "modern"])
def test_losses_leave_other_networks_alone(flags):
    """Each loss reaches its own network alone, in the order value, critics, actor; each optimiser owns one network."""
    args, notes = make_args(**flags), []
    agent = make_agent(args, spread=0.5)
    owned = {name: [id(p) for p in optimizer.params] for name, optimizer in agent.optimizers.items()}
    assert owned == {name: [id(p) for p in getattr(agent, name).parameters()] for name in ("value", "critic", "actor")}
    agent.requires_grad_()  # targets too: only the code keeps gradients away from them
    del agent.optimizers
    agent.optimizers = {name: Recorder(agent, name, notes) for name in owned}
    iql.update(agent, *make_batch(), args)
    assert notes == [("value", {"value"}), ("critic", {"critic"}), ("actor", {"actor"})]


@pytest.mark.parametrize("advantage", ["policy", "value"])
def test_what_an_action_of_the_policy_can_change(advantage):
    """Another actor, other noise: never V, critics or targets; of the actor's step only with the policy's advantage."""
    args, agents = make_args(advantage=advantage, learning_rate=0.01), []
    for shift, actor_shift in ((0, 0), (1, 0), (0, 1)):
        agent = make_agent(args, spread=0.5)
        with torch.no_grad():
            layers_of(agent.actor.net)[-1][1].add_(actor_shift)
        for n in range(3):
            batch, noise = make_batch(seed=n)
            iql.update(agent, batch, noise + shift, args)
        agents.append(agent)
    assert differing(agents[0], agents[1]) == ({"actor"} if advantage == "policy" else set())
    assert differing(agents[0], agents[2]) == {"actor"}


def test_beta_without_end_is_behaviour_cloning():
    """The actor moves as if the mean of -log pi alone had been minimised."""
    args = make_args(beta=1e9, learning_rate=0.01)
    agent, clone = make_agent(args, spread=0.5), make_agent(args, spread=0.5)
    batch, noise = make_batch()
    iql.update(agent, batch, noise, args)
    policy = torch.distributions.Normal(clone.actor(batch[..., :O]), 0.2)
    clone.optimizers["actor"].minimize(-policy.log_prob(batch[..., O : O + A]).sum(-1).mean())
    for ours, theirs in zip(agent.actor.parameters(), clone.actor.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_value_network():
    """One simple network in every architecture (Table 7), with torch.nn.Linear's initialisation; no target."""
    args = make_args(num_seeds=2, num_critics=3, **MODERN)
    agent = make_agent(args)
    assert type(agent.value) is iql.MLP and type(agent.critic) is type(agent.actor.net) is iql.ModernMLP
    assert agent.critic.lead == (2, 3) and agent.value.lead == (2,)
    for weight, bias in layers_of(agent.value):
        bound = weight.shape[-2] ** -0.5
        assert 0 < weight.abs().max() <= bound and 0 < bias.abs().max() <= bound
    with torch.device("meta"):  # nothing but shapes: orthogonal matrices of 1024 take a second
        for architecture, parameters in (("simple-small", 72_449), ("simple-large", 1_076_225), ("modern", 1_076_225)):
            sizes = [24, *iql.ARCHITECTURES[architecture]["value"], 1]
            value = iql.MLP((1,), sizes, lambda *_: None, [None])
            assert sum(p.numel() for p in value.parameters()) == parameters
    assert not [name for name in state_of(agent) if name.startswith("target") and "critic" not in name]


def test_networks_have_the_widths_of_the_architecture(monkeypatch):
    """Each network its own entry of Table 7, or --hidden-sizes."""
    sizes = {"actor": (8,) * 4, "critic": (12,) * 3, "value": (20,) * 2}
    monkeypatch.setitem(iql.ARCHITECTURES, "simple-large", sizes)
    agent = make_agent(iql.Args(architecture="simple-large"))
    for role, network in (("actor", agent.actor.net), ("critic", agent.critic), ("value", agent.value)):
        assert tuple(weight.shape[-1] for weight, _ in layers_of(network)[:-1]) == sizes[role]
    agent = make_agent(iql.Args(architecture="simple-large", hidden_sizes=(6, 7)))
    for network in (agent.actor.net, agent.critic, agent.value):
        assert [weight.shape[-1] for weight, _ in layers_of(network)[:-1]] == [6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01, **MODERN), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(6):
            batch, noise = make_batch(S=2, seed=n)
            batch[1] *= factor
            iql.update(agent, batch, noise, args)
        states.append(state_of(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_five_is_the_run_with_seed_k(run_main, data, monkeypatch, tmp_path):
    """Through main(): the same first weights, batches and noise, and the same agents after 50 updates."""
    update, runs, modern = iql.update, {}, ("--architecture", "modern", "--hidden-sizes", 16, 16, 16)

    def recorder(agent, batch, noise, args):
        note = runs.setdefault((args.seed, args.num_seeds), {"draws": [], "first": state_of(agent)})
        note["draws"].append(torch.cat([batch, noise], -1))
        return update(agent, batch, noise, args)

    monkeypatch.setattr(iql, "update", recorder)
    for seed, num_seeds in ((3, 5), (3, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        more = "--num-updates", 50, "--seed", seed, "--num-seeds", num_seeds, "--learning-rate", 0.001
        run_main("--dataset", data, *BLIND, *modern, *more, "--run-dir", run_dir)
        last = {k: x for k, x in checkpoint_of(run_dir)["agent"].items() if not k.startswith("optimizers.")}
        runs[seed, num_seeds] |= {"last": last, "draws": torch.stack(runs[seed, num_seeds]["draws"])}
    five = runs[3, 5]
    assert five["draws"].shape == (50, 5, 16, 30)
    for k in (0, 4):
        alone = runs[3 + k, 1]
        assert torch.equal(five["draws"][:, k], alone["draws"][:, 0])
        for name in five["first"]:
            torch.testing.assert_close(five["first"][name][k], alone["first"][name][0], rtol=0, atol=1e-6)
            torch.testing.assert_close(five["last"][name][k], alone["last"][name][0], rtol=2e-3, atol=2e-3)
        assert not torch.equal(five["draws"][:, k], five["draws"][:, 1])
    for name in ("actor.net.weight0", "critic.weight0", "value.weight0"):
        assert (five["last"][name] - five["first"][name]).abs().max() > 0.01  # all learned


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a first action that costs at once and pays one step later
# ---------------------------------------------------------------------------------------------------------------------


def learned_policy(**flags):
    """pi and Q(first, 1) of two seeds in the first state, after 250 updates on a log of uniformly random actions.

    The first action a costs 0.5 a; the second step pays 2 a, whatever is done there, and is the end. So
    Q(first, a) = (2 gamma - 0.5) a.
    """
    defaults = {"hidden_sizes": (32, 32), "num_seeds": 2, "learning_rate": 4e-3, "polyak": 0.05, "beta": 0.2}
    args = make_args(**{**defaults, "batch_size": 128, **flags})
    a, b = np.random.default_rng(0).uniform(-1, 1, size=(2, 4000, 1))
    zero, one = np.zeros_like(a), np.ones_like(a)
    first = np.concatenate([one, zero, a, -0.5 * a, zero, a, one], 1)  # s = (is first, last action), a, r, s', mask
    second = np.concatenate([zero, a, b, 2 * a, one, zero, zero], 1)
    transitions = torch.from_numpy(np.float32(np.concatenate([first, second])))
    agent, generator = iql.ScaledIQLAgent(2, 1, args, CPU), torch.Generator().manual_seed(0)
    for _ in range(250):
        index = torch.randint(len(transitions), (2, 128), generator=generator)
        iql.update(agent, transitions[index], torch.randn(2, 128, 1, generator=generator), args)
    start = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    with torch.no_grad():
        return agent.actor(start).flatten(), agent.critic(torch.cat([start, torch.ones(2, 1, 1)], -1))[:, 0].flatten()


@pytest.mark.parametrize("advantage", ["policy", "value"])
def test_iql_looks_ahead(advantage):
    """The mean of exp(1.48 a / 0.2) on [-1, 1] is 1 - 0.2 / 1.48 = 0.86."""
    action, q = learned_policy(advantage=advantage)
    assert action.min() > 0.7 and action.max() < 0.95, action
    torch.testing.assert_close(q, torch.full((2,), 2 * 0.99 - 0.5), rtol=0, atol=0.3)


def test_the_learning_test_is_a_test():
    """One who sees no further than the next reward, or who clones what is there, does something else."""
    assert learned_policy(gamma=0.0)[0].max() < -0.3
    assert learned_policy(beta=1e6)[0].abs().max() < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# Flags, runs
# ---------------------------------------------------------------------------------------------------------------------


def test_presets_and_defaults():
    """What the paper does on its testbeds (spec 7), unless a flag says otherwise."""
    for preset, expected in {
        "small": ("simple-small", 2, 0.5, 0.7, 0.5, math.inf, 1_000_000),
        "mood": ("simple-large", 5, 0.5, 0.7, 0.5, math.inf, 1_500_000),
        "antmaze": ("modern", 5, 0.0, 0.9, 0.1, 1.0, 2_000_000),
        "locomotion": ("modern", 5, 0.5, 0.7, 0.5, math.inf, 2_000_000),
        "locomotion-0.1": ("modern", 10, 0.5, 0.7, 1.5, math.inf, 2_000_000),
    }.items():
        args = iql.Args(preset=preset)
        ours = args.architecture, args.num_critics, args.pessimism, args.expectile, args.beta
        assert (*ours, args.max_advantage, args.num_updates) == expected, preset
    args = iql.Args(preset="antmaze", num_critics=10, expectile=0.7)
    assert (args.num_critics, args.expectile, args.pessimism) == (10, 0.7, 0.0)
    assert iql.Args(pessimism=0.0).pessimism == 0 and iql.Args(max_advantage=2.0).max_advantage == 2
    args = iql.Args()
    assert (args.batch_size, args.learning_rate, args.gamma, args.polyak) == (512, 3e-4, 0.99, 0.005)
    assert (args.policy_std, args.eval_samples, args.reward_transform, args.advantage) == (0.2, 50, "auto", "policy")


@pytest.mark.parametrize(
    "flags",
    [
        ("--pessimism", -1), ("--num-critics", 0), ("--beta", 0), ("--expectile", 1.5), ("--policy-std", 0),
        ("--eval-samples", 0), ("--max-advantage", "nan"), ("--hidden-sizes", 8, 8, "--architecture", "modern"),
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
    process = subprocess.Popen(harness.command("iql_scaled", *flags, "--run-dir", victim), env=env, **pipes)
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
@pytest.mark.parametrize("flags", [{}, {"advantage": "value"}, MODERN])
def test_captured_updates_equal_eager_ones(flags):
    """CUDA graphs of ten updates, replayed, give what as many eager updates give: networks and singular vectors."""
    args = make_args(num_seeds=2, learning_rate=1e-3, **flags)
    transitions, generator = make_batch(B=500)[0][0].cuda(), torch.Generator().manual_seed(2)
    index = torch.randint(500, (60, 2, 32), generator=generator).cuda()
    noise = torch.randn(60, 2, 32, A, generator=generator).cuda()
    agents = [make_agent(args, device="cuda") for _ in range(2)]
    learn = [partial(iql.run_updates, agent, transitions, args) for agent in agents]
    before = {name: x.clone() for name, x in agents[0].state_dict().items()}
    graph = iql.cuda_graph(learn[0], agents[0], index[:10], noise[:10])
    assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
    for i in range(0, 60, 10):
        captured, eager = (f(index[i : i + 10], noise[i : i + 10]) for f in (graph, learn[1]))
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-3)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-2, atol=1e-3)
