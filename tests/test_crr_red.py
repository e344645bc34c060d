"""crr_red.py against computations that share no code with it: numbers by hand, numpy, torch.distributions.

The samplers, the data and the plumbing are the same text as in iql_red.py, and are tested there.
"""

import functools
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import harness
import numpy as np
import pytest
import torch

crr = harness.load("crr_red")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below


def make_args(**flags):
    return crr.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, "num_updates": 1000, "beta": 1.0, **flags})


def make_agent(args, obs_dim=O, action_dim=A, device="cpu", spread=None):
    """A CRRAgent. With `spread`, all parameters are drawn anew: larger ones, and targets unlike online networks."""
    agent = crr.CRRAgent(obs_dim, action_dim, args, torch.device(device))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(S=1, B=32, seed=0, obs_dim=O, action_dim=A):
    """(S, B, O + A + 1 + O + 1) random transitions, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, S, B, obs_dim))
    action, reward = rng.uniform(-1, 1, size=(S, B, action_dim)), rng.normal(size=(S, B, 1))
    not_terminated = np.float64(rng.random((S, B, 1)) > 0.25)
    return torch.from_numpy(np.concatenate([obs, action, reward, next_obs, not_terminated], -1)).float()


def make_noise(S=1, B=32, m=4, seed=0, action_dim=A):
    """Standard normal noise of one update: (S, m, B, A) for the advantage and (S, B, A) for the target."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (S, m, B, action_dim), (S, B, action_dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    named = list(mlp.named_parameters())
    return list(zip(*([p for name, p in named if kind in name] for kind in ("weight", "bias"))))


def constant_agent(args, target_q=0.0, q=0.0):
    """An agent whose networks ignore their inputs: the given outputs, and a standard normal around 0 as policy."""
    agent = make_agent(args)
    with torch.no_grad():
        for p in agent.parameters():
            p.zero_()
        for net, output in ((agent.target_critic, target_q), (agent.critic, q)):
            layers_of(net)[-1][1].copy_(torch.as_tensor(output).view(-1, 1, 1))
    return agent


def without_moments(state):
    """A state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x for name, x in state.items() if not name.startswith("optimizers.")}


def snapshot(agent):
    return {name: x.clone() for name, x in without_moments(agent.state_dict()).items()}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): crr_red's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["crr_red.py", *map(str, flags)])
        try:
            crr.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Advantage and weight: the worked examples of the spec, 7 (g)
# ---------------------------------------------------------------------------------------------------------------------


def weight_of(q, policy_q, **flags):
    """Advantage and weight of one logged action with value q, against policy actions of the values policy_q."""
    args = make_args(**flags)
    policy_q = torch.tensor(policy_q, dtype=torch.float64)[None, :, None]  # (S, m, B)
    advantage = crr.estimated_advantage(torch.tensor([[float(q)]]).double(), policy_q, args.advantage)
    assert advantage.shape == (1, 1)
    return advantage.item(), crr.regression_weight(advantage, args).item()


def test_worked_examples():
    """Q(s, a) = 3, policy actions worth 1, 2, 3, 2: mean A = 1 -> e or 1; max A = 0 -> 1 or 0: A > 0 is strict."""
    policy_q = [1.0, 2, 3, 2]
    assert weight_of(3, policy_q, advantage="mean", weight="exp") == pytest.approx((1, 2.718282), abs=1e-6)
    assert weight_of(3, policy_q, advantage="mean", weight="binary") == (1, 1)
    assert weight_of(3, policy_q, advantage="max", weight="exp") == (0, 1)
    assert weight_of(3, policy_q, advantage="max", weight="binary") == (0, 0)
    assert weight_of(2.5, policy_q, advantage="max", weight="binary") == (-0.5, 0)


def test_weights_are_capped_without_overflow():
    """min(exp(A / beta), 20), for any A in float32; beta divides; the cap is a flag."""
    assert weight_of(4, [0.0])[1] == pytest.approx(20)
    assert weight_of(4, [0.0], max_weight=100.0)[1] == pytest.approx(math.exp(4))
    assert weight_of(4, [0.0], beta=2.0)[1] == pytest.approx(math.exp(2))
    assert weight_of(-1, [0.0], beta=0.5)[1] == pytest.approx(math.exp(-2))
    assert weight_of(1000, [0.0], beta=math.inf)[1] == 1
    extreme = crr.regression_weight(torch.tensor([1e30, 1e4, 0, -1e4, -1e30]), make_args())
    torch.testing.assert_close(extreme, torch.tensor([20.0, 20, 1, 0, 0]))


def test_maximum_is_at_least_the_mean():
    """A_max <= A_mean, whatever the values; equal for a single action."""
    q, policy_q = torch.randn(3, 8), torch.randn(3, 5, 8)
    mean, maximum = (crr.estimated_advantage(q, policy_q, kind) for kind in ("mean", "max"))
    assert (maximum < mean).all() and mean.shape == (3, 8)
    one = (crr.estimated_advantage(q, policy_q[:, :1], kind) for kind in ("mean", "max"))
    assert torch.equal(*one)


def test_many_actions_compare_with_the_mean_action():
    """With Q linear in the action and nothing to clip, A_mean -> Q(s, a) - Q(s, mean action) as m grows."""
    args = make_args(hidden_sizes=(16,), num_action_samples=20_000)
    agent, batch = make_agent(args), make_batch(B=8)
    (w0, b0), (w1, _) = layers_of(agent.critic)
    with torch.no_grad():
        b0.fill_(10)  # every unit stays active: Q is linear
        layers_of(agent.actor.net)[-1][1][..., A:] = -3  # std e^-3 at most: no sample reaches the bounds
        for p in layers_of(agent.actor.net)[-1]:
            p[..., A:].clamp_(max=0)
        action, mean = batch[..., O : O + A], agent.actor.act(batch[..., :O])
        slope = (w0 @ w1)[0, 0, O:]  # dQ/da (A, 1)
        expected = ((action - mean) @ slope).mean()
    assert mean.abs().max() < 0.5 and slope.abs().max() > 0.05
    metrics = crr.update(agent, batch, *make_noise(B=8, m=20_000), args)
    assert metrics["value/advantage"].item() == pytest.approx(expected.item(), abs=2e-3)


@pytest.mark.parametrize("flags", [{"beta": math.inf}, {"beta": 1e12, "advantage": "max"}])
def test_weight_1_is_behaviour_cloning(flags):
    """beta -> infinity: f = 1, and the actor's loss is the plain negative log-likelihood."""
    args = make_args(**flags)
    agent, batch = make_agent(args, spread=0.5), make_batch()
    nll = -crr.gaussian_log_prob(*agent.actor(batch[..., :O]), batch[..., O : O + A]).mean(-1)
    torch.testing.assert_close(crr.update(agent, batch, *make_noise(), args)["loss/actor"], nll.detach())


def test_minimum_over_critics_in_target_and_advantage():
    """Targets that say 3 and 7 count as 3, and the loss sums over both critics. In the advantage, the smaller Q counts
    of each action, as it does in Q(s, a): not the smaller advantage, nor the smaller mean."""
    args = make_args(num_critics=2, learning_rate=0.0, gamma=0.5)
    batch, noise = make_batch(), make_noise()
    batch[..., O + A], batch[..., -1] = 1, 1
    metrics = crr.update(constant_agent(args, target_q=[7.0, 3.0], q=[2.0, 4.0]), batch, *noise, args)
    assert metrics["loss/critic"].item() == pytest.approx((2 - 2.5) ** 2 + (4 - 2.5) ** 2)

    agent = constant_agent(args)  # Q_1 = a_0 + 3 and Q_2 = 3 - 2 a_0, in the first unit of each layer
    weights, biases = zip(*layers_of(agent.critic))
    with torch.no_grad():
        weights[0][0, :, O, 0] = torch.tensor([1.0, -2.0])
        biases[0][..., 0] = 3
        weights[1][..., 0, 0] = weights[2][..., 0, 0] = 1

    def smaller(a):
        return torch.minimum(a + 3, 3 - 2 * a)

    policy_q = smaller(noise[0][..., 0].clamp(-1, 1)).mean(1)  # the policy is a standard normal
    expected = (smaller(batch[..., O]) - policy_q).mean()
    metrics = crr.update(agent, batch, *noise, args)
    assert metrics["value/advantage"].item() == pytest.approx(expected.item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------------


def test_log_prob():
    """torch.distributions on random networks: Normal around tanh, log_std of the state, clamped to [-20, 2]."""
    agent = make_agent(make_args(num_seeds=3), spread=0.7)
    with torch.no_grad():
        layers_of(agent.actor.net)[-1][1][:2, 0, A:] = torch.tensor([[-60.0], [30.0]])
    obs, action = make_batch(S=3)[..., :O], make_batch(S=3)[..., O : O + A]
    out = torch.zeros(3, 32, 2 * A)
    for s in range(3):
        x = obs[s]
        for i, (w, b) in enumerate(layers_of(agent.actor.net)):
            x = torch.addmm(b[s], x.relu() if i else x, w[s])
        out[s] = x
    assert (out[0, :, A:] < -20).all() and (out[1, :, A:] > 2).all()  # both ends of the clamp
    assert out[2, :, A:].std(0).min() > 0.3  # log_std depends on the state
    mean, std = out[..., :A].tanh(), out[..., A:].clamp(-20, 2).exp()
    action[0] = agent.actor.act(obs)[0].detach()  # anything else has a density of 0 where std is e^-20
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    ours = crr.gaussian_log_prob(*agent.actor(obs), action)
    assert ours.shape == (3, 32)
    torch.testing.assert_close(ours, normal.log_prob(action), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(agent.actor.act(obs), mean)


def test_logged_actions_at_the_bounds_have_a_log_density():
    agent = constant_agent(make_args())
    ours = crr.gaussian_log_prob(*agent.actor(torch.zeros(1, 1, O)), torch.tensor([[[1.0, -1.0]]]))
    assert ours.item() == pytest.approx(-1 - math.log(2 * math.pi))


def test_samples_are_clipped():
    """mean + std * noise, inside [-1, 1]; a policy that reaches over the bounds puts mass on them."""
    mean, log_std, noise = torch.tensor([0.5, -0.9]), torch.tensor([-1.0, 0.5]), torch.randn(20_000, 2)
    action = crr.clipped_sample(mean, log_std, noise)
    inside = (action.abs() < 1).all(-1)
    torch.testing.assert_close(action[inside], mean + torch.tensor([math.exp(-1), math.exp(0.5)]) * noise[inside])
    assert action.abs().max() == 1 and (~inside).any()
    normal = torch.distributions.Normal(mean, log_std.exp())
    for bound, mass in ((-1, normal.cdf(-torch.ones(2))), (1, 1 - normal.cdf(torch.ones(2)))):
        torch.testing.assert_close((action == bound).float().mean(0), mass, rtol=0, atol=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The whole update against numpy: forward, hand-derived gradients, Adam, order, targets
# ---------------------------------------------------------------------------------------------------------------------


def test_targets_bootstrap_through_truncation_only():
    """y = r at a true end whatever Q(s', a') is, y = r + gamma Q(s', a') elsewhere. Q = 0, so the loss is y^2."""
    args = make_args(learning_rate=0.0)
    batch = make_batch()
    for not_terminated, target in ((0.0, 1.5), (1.0, 1.5 + 0.99 * 7)):
        batch[..., O + A], batch[..., -1] = 1.5, not_terminated
        metrics = crr.update(constant_agent(args, target_q=7.0), batch, *make_noise(), args)
        assert metrics["loss/critic"].item() == pytest.approx(target**2, rel=1e-6)


def forward(layers, x):
    """Output of a ReLU network [(W, b), ...] and the input of each layer."""
    inputs = []
    for i, (w, b) in enumerate(layers):
        inputs.append(x if i == 0 else np.maximum(x, 0))
        x = inputs[-1] @ w + b
    return x, inputs


def backward(layers, inputs, grad):
    """Gradients [(dW, db), ...] from the gradient at the output."""
    grads = []
    for (w, _), x in zip(reversed(layers), reversed(inputs)):
        grads.append((x.T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ w.T) * (x > 0)
    return grads[::-1]


class NumpyCRR:
    """One seed of CRR in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.t, self.moments, self.C = args, 0, {}, range(args.num_critics)
        self.actor, self.target_actor = layers(agent.actor.net), layers(agent.target_actor.net)
        self.critics = [layers(agent.critic, c) for c in self.C]
        self.target_critics = [layers(agent.target_critic, c) for c in self.C]
        self.seen = {"weight": [], "sample": [], "log_std": []}

    def adam(self, name, layers, grads):
        """Layers after one step with these gradients."""

        def step(key, p, grad):
            m, v = self.moments.get(key, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            self.moments[key] = m, v
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            return p - self.args.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8)

        return [
            tuple(step((name, i, j), p, g) for j, (p, g) in enumerate(zip(*pair)))
            for i, pair in enumerate(zip(layers, grads))
        ]

    def policy(self, layers, s):
        """Mean and standard deviation, and what backpropagation needs."""
        out, inputs = forward(layers, s)
        mean, raw = np.tanh(out[:, :A]), out[:, A:]
        self.seen["log_std"].extend(raw.ravel())
        return mean, np.exp(np.clip(raw, -20, 2)), raw, inputs

    def sample(self, mean, std, noise):
        self.seen["sample"].extend((mean + std * noise).ravel())
        return np.clip(mean + std * noise, -1, 1)

    def min_q(self, critics, s, a):
        return np.min([forward(layers, np.concatenate([s, a], 1))[0] for layers in critics], axis=0)

    def update(self, batch, noise, next_noise):
        args, B = self.args, len(batch)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        self.t += 1

        # what the policy would get, one sampled action after the other
        mean, std, raw, inputs = self.policy(self.actor, s)
        values = [self.min_q(self.critics, s, self.sample(mean, std, e)) for e in noise]
        value = np.max(values, 0) if args.advantage == "max" else sum(values) / len(values)
        advantage = self.min_q(self.critics, s, a) - value
        weight = np.minimum(np.exp(np.minimum(advantage / args.beta, 700)), args.max_weight)
        weight = np.where(advantage > 0, 1.0, 0.0) if args.weight == "binary" else weight
        self.seen["weight"].extend(weight.ravel())

        # actor: gradients of -mean f log pi by hand; the clamp of log_std lets none through
        z, log_std = (a - mean) / std, np.log(std)
        log_prob = np.sum(-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi), 1, keepdims=True)
        actor_loss = -np.mean(weight * log_prob)
        grad_mean = -weight * z / std * (1 - mean**2) / B
        grad_log_std = -weight * (z**2 - 1) / B * ((raw >= -20) & (raw <= 2))
        actor_grads = backward(self.actor, inputs, np.concatenate([grad_mean, grad_log_std], 1))

        # critics, with the same old parameters
        next_mean, next_std, _, _ = self.policy(self.target_actor, s_next)
        next_action = self.sample(next_mean, next_std, next_noise)
        y = r + args.gamma * mask * self.min_q(self.target_critics, s_next, next_action)
        critic_loss, critic_grads = 0, []
        for c in self.C:
            q, inputs = forward(self.critics[c], np.concatenate([s, a], 1))
            critic_loss += np.mean((q - y) ** 2)
            critic_grads.append(backward(self.critics[c], inputs, 2 * (q - y) / B))

        self.actor = self.adam("actor", self.actor, actor_grads)
        self.critics = [self.adam(("critic", c), self.critics[c], critic_grads[c]) for c in self.C]
        if self.t % args.target_period == 0:

            def move(target, online):
                mix = [zip(*pair) for pair in zip(target, online)]
                return [tuple((1 - args.polyak) * old + args.polyak * new for old, new in pairs) for pairs in mix]

            self.target_actor = move(self.target_actor, self.actor)
            self.target_critics = [move(*pair) for pair in zip(self.target_critics, self.critics)]
        return actor_loss, critic_loss


@pytest.mark.parametrize(
    "flags",
    [
        {"max_weight": 3.0},  # the default variant, CRR exp; a hard copy after updates 2 and 4
        {"weight": "binary", "advantage": "max"},  # CRR binary max
        {"num_critics": 2, "beta": 0.5, "max_weight": 4.0, "polyak": 0.3, "num_action_samples": 3},
        {"num_critics": 3, "weight": "binary", "target_period": 1, "polyak": 0.1},
        {"advantage": "max", "max_weight": 2.0, "target_period": 3, "num_action_samples": 1},
    ],
    ids=" ".join,
)
def test_update_against_numpy(flags):
    """Five updates of two seeds, in float64, with steps large enough that every question of order shows."""
    args = make_args(**{"num_seeds": 2, "learning_rate": 1 / 64, "gamma": 0.9, "target_period": 2, **flags})
    agent = make_agent(args, spread=0.5).double()
    references = [NumpyCRR(agent, s, args) for s in range(2)]
    for n in range(5):
        batch = make_batch(S=2, seed=n).double()
        noise = [x.double() for x in make_noise(S=2, m=args.num_action_samples, seed=n)]
        metrics = crr.update(agent, batch, *noise, args)
        for s, reference in enumerate(references):
            losses = reference.update(batch[s].numpy(), *(x[s].numpy() for x in noise))
            ours = [metrics[f"loss/{name}"][s].item() for name in ("actor", "critic")]
            np.testing.assert_allclose(ours, losses, rtol=1e-7)
            np.testing.assert_allclose(
                metrics["value/advantage_weight"][s], np.mean(reference.seen["weight"][-32:]), rtol=1e-7
            )

    seen = {name: np.concatenate([r.seen[name] for r in references]) for name in references[0].seen}
    assert seen["sample"].min() < -1 and seen["sample"].max() > 1  # every branch is taken: samples clipped and not,
    assert seen["log_std"].max() > 2 and np.mean(np.abs(seen["sample"]) < 1) > 0.1  # log_std clamped and not,
    highest = 1 if args.weight == "binary" else args.max_weight  # weights at the cap and below
    assert seen["weight"].max() == highest and np.mean(seen["weight"] < highest) > 0.1
    for s, reference in enumerate(references):
        nets = [(agent.actor.net, (), reference.actor), (agent.target_actor.net, (), reference.target_actor)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(args.num_critics)]
        nets += [(agent.target_critic, (c,), reference.target_critics[c]) for c in range(args.num_critics)]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-7)


def test_hard_copies_fall_on_every_target_period():
    """Bit by bit: online networks into both targets after updates 3, 6 and 9, nothing in between."""
    args = make_args(target_period=3, learning_rate=0.01)
    agent = make_agent(args, spread=0.5)
    for n in range(1, 10):
        before = snapshot(agent)
        crr.update(agent, make_batch(seed=n), *make_noise(seed=n), args)
        after = snapshot(agent)
        assert after["num_updates"] == n
        targets = [name for name in before if name.startswith("target_")]
        assert {name.split(".")[0] for name in targets} == {"target_actor", "target_critic"}
        for name in targets:
            online = name.removeprefix("target_")
            assert not torch.equal(after[online], before[online]), online
            assert torch.equal(after[name], after[online] if n % 3 == 0 else before[name]), (n, name)


def test_phase_of_the_targets_is_in_the_state():
    """An agent that takes over another's state between two copies copies when the other one does."""
    args = make_args(target_period=5, learning_rate=0.01)
    agent, other = make_agent(args), make_agent(make_args(seed=9))
    for n in range(12):
        if n == 7:
            other.load_state_dict(agent.state_dict())
        for learner in (agent, other) if n >= 7 else (agent,):
            crr.update(learner, make_batch(seed=n), *make_noise(seed=n), args)
    for name, x in agent.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


def test_each_optimiser_owns_one_network():
    """The targets are in no optimiser, and no parameter is in two; targets start as the networks they follow."""
    agent = make_agent(make_args(num_seeds=2, num_critics=2))
    owned = {name: set(map(id, o.params)) for name, o in agent.optimizers.items()}
    assert set(owned) == {"actor", "critic"}
    for name, ids in owned.items():
        assert ids == {id(p) for p in getattr(agent, name).parameters()}
        for target, online in zip(getattr(agent, f"target_{name}").parameters(), getattr(agent, name).parameters()):
            assert torch.equal(target, online) and target.data_ptr() != online.data_ptr()
            assert not target.requires_grad and id(target) not in set().union(*owned.values())
    assert not owned["actor"] & owned["critic"]
    weights = layers_of(agent.critic)[0][0]
    for (s, c), (t, d) in itertools.combinations(itertools.product(range(2), range(2)), 2):
        assert not torch.equal(weights[s, c], weights[t, d])  # four different critics


def test_losses_leave_other_networks_alone():
    """The critic sees no gradient of the actor's loss though it sets the weights, the actor none of the critic's though
    it acts at s', the targets none at all."""
    args = make_args(num_critics=2)
    agent = make_agent(args, spread=0.5)
    gradients = {}

    class Recorder:
        """Stands in for an optimiser: notes which networks its loss depends on, and steps nothing."""

        def __init__(self, name):
            self.name = name

        def minimize(self, loss):
            loss.backward(retain_graph=True)
            gradients[self.name] = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
            agent.zero_grad()

    recorders = {name: Recorder(name) for name in agent.optimizers}
    del agent.optimizers
    agent.optimizers = recorders
    agent.requires_grad_(True)  # the targets too: they must be detached, not only frozen
    crr.update(agent, make_batch(), *make_noise(), args)
    assert gradients == {"actor": {"actor"}, "critic": {"critic"}}


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_and_noise_change_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args = make_args(num_seeds=2, num_critics=2, learning_rate=0.01, target_period=2)
    states = []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(5):
            inputs = make_batch(S=2, seed=n), *make_noise(S=2, seed=n)
            for x in inputs:
                x[1] *= factor
            crr.update(agent, *inputs, args)
        states.append(snapshot(agent))
    for name in states[0]:
        if name != "num_updates":
            assert torch.equal(states[0][name][0], states[1][name][0]), name
            assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_five_is_the_run_with_seed_k(run_main, monkeypatch, tmp_path):
    """Through main(): the same first weights, batches and noise, and the same agents after 50 updates."""
    folder, update, runs = harness.write_minari(tmp_path / "data", harness.hopper_episodes()), crr.update, {}

    def recorder(agent, batch, noise, next_noise, args):
        record = runs.setdefault((args.seed, args.num_seeds), {"inputs": [], "first": snapshot(agent)})
        record["inputs"].append([x.clone() for x in (batch, noise, next_noise)])
        return update(agent, batch, noise, next_noise, args)

    monkeypatch.setattr(crr, "update", recorder)
    flags = "--eval-episodes", 0, "--num-updates", 50, "--batch-size", 16, "--hidden-sizes", 32, 32, "--device", "cpu"
    flags += "--num-action-samples", 3, "--target-period", 20
    for seed, num_seeds in ((3, 5), (3, 1), (5, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        run_main("--dataset", folder, *flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir)
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        assert checkpoint["num_updates"] == 50
        runs[seed, num_seeds]["last"] = without_moments(checkpoint["agent"])
        runs[seed, num_seeds]["inputs"] = [torch.stack(x) for x in zip(*runs[seed, num_seeds]["inputs"])]
    five = runs[3, 5]
    assert [x.shape for x in five["inputs"]] == [(50, 5, 16, 27), (50, 5, 3, 16, 3), (50, 5, 16, 3)]
    for k in (0, 2, 4):
        alone = runs[3 + k, 1]
        for ours, theirs in zip(five["inputs"], alone["inputs"]):
            assert torch.equal(ours[:, k], theirs[:, 0])
        for name in five["first"]:
            if name != "num_updates":
                assert torch.equal(five["first"][name][k], alone["first"][name][0]), name
                torch.testing.assert_close(five["last"][name][k], alone["last"][name][0], rtol=1e-4, atol=1e-5)
    name = "target_actor.net.weight0"
    for i, k in itertools.combinations(range(5), 2):  # and the five are five different agents
        assert not torch.allclose(five["first"][name][i], five["first"][name][k])
        assert not any(torch.equal(x[:, i], x[:, k]) for x in five["inputs"])
    assert (five["last"][name] - five["first"][name]).abs().max() > 1e-3  # they have learned what could differ
    noise = torch.cat([x.flatten() for x in five["inputs"][1:]])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise.unique()) > 0.99 * len(noise)  # no noise is used twice


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, mode, expected",
    [
        ("Hopper-v5", "auto", [2, 3]),
        ("AntMaze_UMaze-v4", "auto", [1, 2]),
        ("PointMaze_UMaze-v3", "auto", [1, 2]),
        ("AdroitHandPen-v1", "auto", [2, 3]),
        (None, "auto", [2, 3]),
        ("Hopper-v5", "scale", [2000, 3000]),
        ("Hopper-v5", "shift", [1, 2]),
    ],
)
def test_rewards_are_as_logged_but_for_mazes(env_id, mode, expected):
    """Two episodes of one step, returns 2 and 3: CRR's auto does not scale locomotion, as IQL's does."""
    rows, environment = np.zeros((2, 5), np.float32), {"id": env_id, "kwargs": {}, "references": None}
    rows[:, 2] = 2, 3
    dataset = crr.Dataset(rows, np.array([1, 1]), np.array([2.0, 3.0]), 1, 1, environment)
    crr.transform_rewards(dataset, mode, crr.CRR_TRANSFORMS)
    np.testing.assert_allclose(dataset.transitions[:, 2], expected)
    np.testing.assert_array_equal(dataset.episode_returns, [2, 3])


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--num-critics", 0),
        ("--num-action-samples", 0),
        ("--target-period", 0),
        ("--polyak", 1.5),
        ("--beta", 0),
        ("--beta", "nan"),
        ("--max-weight", 0),
        ("--advantage", "median"),
        ("--weight", "linear"),
        ("--expectile", 0.7),  # IQL's
    ],
)
def test_bad_flags_are_one_line(run_main, capsys, tmp_path, flag, value):
    with pytest.raises(SystemExit) as stopped:
        run_main(flag, value, "--run-dir", tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "; " in lines[0] and flag in lines[0], lines


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a chain where most of the data quits early, and quitting pays at once
# ---------------------------------------------------------------------------------------------------------------------

STATES, QUIT, GO, GOAL = 4, 0.5, -0.1, 5.0


def chain_transitions(num_episodes=1500, go_share=0.3, seed=0):
    """Logged episodes: an action above 0 goes on (a small cost, 5 at the end), one below 0 quits with 0.5 at once.

    Seven of ten actions quit. What follows a quit looks like the best state, so a bootstrap through it would show.
    Returns packed transitions (N, 4 + 1 + 1 + 4 + 1).
    """
    rng, eye, rows = np.random.default_rng(seed), np.eye(STATES), []
    for _ in range(num_episodes):
        state, over = rng.integers(STATES), False
        while not over:
            go = rng.random() < go_share
            action = np.clip((0.5 if go else -0.5) + 0.1 * rng.normal(), -1, 1)
            last = state == STATES - 1
            reward, over = (GOAL if last else GO) if go else QUIT, last or not go
            next_state = STATES - 1 if over else state + 1
            rows.append(np.concatenate([eye[state], [action, reward], eye[next_state], [1 - over]]))
            state = next_state
    return torch.tensor(np.array(rows), dtype=torch.float32)


def chain_returns(actor, S):
    """Return of each seed's deterministic policy from the first state, by the rules of the chain."""
    actions, returns = actor.act(torch.eye(STATES).expand(S, STATES, STATES))[..., 0], []
    for s in range(S):
        goes = list(itertools.takewhile(lambda state: actions[s, state] > 0, range(STATES)))  # noqa: B023
        returns.append(GO * (STATES - 1) + GOAL if len(goes) == STATES else GO * len(goes) + QUIT)
    return np.array(returns)


def learn_chain(module=crr, **flags):
    """Returns of three seeds after 600 updates on the chain's log."""
    defaults = {"hidden_sizes": (32, 32), "num_seeds": 3, "learning_rate": 3e-3, "target_period": 20, "batch_size": 128}
    args = module.Args(**{**defaults, "beta": 1.0, **flags})
    transitions, m, B = chain_transitions(), args.num_action_samples, args.batch_size
    agent = module.CRRAgent(STATES, 1, args, torch.device("cpu"))
    sampler = module.Sampler(np.full(len(transitions), 1 / len(transitions)), "cpu")
    generators = [torch.Generator().manual_seed(s) for s in range(3)]
    for _ in range(6):
        block = module.draw_block(sampler, generators, B, (m, B, 1), (B, 1))
        module.run_updates(agent, transitions, args, *block)
    return chain_returns(agent.actor, 3)


@pytest.mark.parametrize("weight", ["exp", "binary"])
@pytest.mark.parametrize("advantage", ["mean", "max"])
def test_crr_learns_the_chain(advantage, weight):
    """Each variant goes on to the end, in every seed, though most of the data quits."""
    returns = learn_chain(advantage=advantage, weight=weight, num_critics=2 if advantage == "max" else 1)
    assert np.all(returns == pytest.approx(GO * (STATES - 1) + GOAL)), returns


@pytest.mark.parametrize(
    "wrong",
    [{"beta": -1.0}, {"gamma": 0.0}, {"beta": math.inf}],
    ids=["flipped advantage", "one-step rewards", "cloning"],
)
def test_the_chain_is_a_test(wrong):
    """A flipped advantage fails on the chain; so does a learner that sees only the next reward, or only clones."""
    returns = learn_chain(**wrong)
    assert returns.max() <= QUIT, returns


# ---------------------------------------------------------------------------------------------------------------------
# Runs: exact resume, evaluation
# ---------------------------------------------------------------------------------------------------------------------

RUN = "--hidden-sizes", 32, 32, "--batch-size", 32, "--eval-episodes", 2, "--num-updates", 700, "--eval-every", 130
RUN += "--num-seeds", 2, "--num-critics", 2, "--target-period", 30, "--eval-workers", 0, "--log-every", 90


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(dataset, folder of a run of RUN that was never stopped)."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = harness.write_minari(folder / "data", harness.hopper_episodes())
    done = harness.run("crr_red", "--dataset", data, *RUN, "--run-dir", folder / "run")
    assert done.returncode == 0 and "over 2 seed(s)" in done.stdout.splitlines()[-1], done.stdout + done.stderr
    return data, folder / "run"


def flat(node, path=""):
    """All values of nested dicts and lists, by path."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    return {path: node} if items is None else {k: v for i, x in items for k, v in flat(x, f"{path}/{i}").items()}


def assert_same_end(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators; the same evaluations.csv."""
    ours, theirs = (flat(torch.load(folder / "checkpoint.pt", weights_only=True)) for folder in (run_dir, reference))
    assert ours.keys() == theirs.keys() and ours["/num_updates"] == 700
    assert any("target_actor" in k for k in ours) and any("target_critic" in k for k in ours)
    equal = {k: torch.equal(x, theirs[k]) if torch.is_tensor(x) else x == theirs[k] for k, x in ours.items()}
    assert all(equal.values()), [k for k, same in equal.items() if not same]
    assert (run_dir / "evaluations.csv").read_text() == (reference / "evaluations.csv").read_text()


def start(*flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    return subprocess.Popen(harness.command("crr_red", *flags), **pipes)


def wait_for_a_checkpoint(run_dir, process):
    """Waits until there is a checkpoint, or a newer one than now."""
    path, deadline = run_dir / "checkpoint.pt", time.time() + 120
    now = path.stat().st_mtime_ns if path.exists() else None
    while not path.exists() or path.stat().st_mtime_ns == now:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_stopped_and_resumed_run_ends_like_one_never_stopped(unbroken, tmp_path, how):
    """Killed at a random moment after one of the first checkpoints, which fall inside a block and between two copies of
    the targets; or stopped by Ctrl-C, which saves where no checkpoint was due."""
    data, reference = unbroken
    rng, run_dir = random.Random(5), tmp_path / "run"
    every = 70 if how == "SIGKILL" else 10**6
    process = start("--dataset", data, *RUN, "--checkpoint-every", every, "--run-dir", run_dir)
    for _ in range(rng.randint(2, 4) if how == "SIGKILL" else 1):  # the first is that of no update
        wait_for_a_checkpoint(run_dir, process)
    time.sleep(rng.uniform(0, 0.05) if how == "SIGKILL" else 0.3)
    process.send_signal(getattr(signal, how))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130), output
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["num_updates"]
    assert 0 < saved < 700 and (how == "SIGKILL" or f"--resume {run_dir}" in output.splitlines()[-1])
    done = harness.run("crr_red", "--resume", run_dir)
    assert done.returncode == 0, done.stderr
    assert_same_end(run_dir, reference)


def test_evaluate_trains_nothing(unbroken):
    _, run_dir = unbroken
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    done = harness.run("crr_red", "--evaluate", run_dir, "--eval-episodes", 3)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stdout + done.stderr
    for seed, line in enumerate(lines):
        assert re.match(rf"seed {seed}: return -?\d.* 3 episodes .* normalised score -?\d", line), line
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_what_the_log_shows(unbroken):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(unbroken[1]), size_guidance={"scalars": 0})
    events.Reload()
    for tag in "loss/actor", "loss/critic", "value/q", "value/advantage", "value/advantage_weight":
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == list(range(90, 700, 90)), tag
        assert all(np.isfinite(s.value) for s in scalars), tag


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_updates_equal_eager_ones():
    """A CUDA graph of ten updates, replayed three times, gives what thirty eager updates give, though the targets move
    at other places in each replay; capturing leaves no trace."""
    args = make_args(num_seeds=2, num_critics=2, target_period=7, learning_rate=1e-3)
    device, m, B = torch.device("cuda"), args.num_action_samples, args.batch_size
    transitions = make_batch(S=1, B=500, seed=1)[0].to(device)
    generator = torch.Generator().manual_seed(2)
    blocks = [
        (
            torch.randint(500, (10, 2, B), generator=generator).to(device),
            torch.randn(10, 2, m, B, A, generator=generator).to(device),
            torch.randn(10, 2, B, A, generator=generator).to(device),
        )
        for _ in range(3)
    ]
    agents = [make_agent(args, device="cuda") for _ in range(2)]

    learn = [functools.partial(crr.run_updates, agent, transitions, args) for agent in agents]
    first = snapshot(agents[0])
    replay = crr.cuda_graph(learn[0], agents[0], *map(torch.zeros_like, blocks[0]))
    for name, x in without_moments(agents[0].state_dict()).items():
        assert torch.equal(x, first[name]), name
    for block in blocks:
        captured = replay(*block)
        eager = learn[1](*block)
    assert agents[0].num_updates == agents[1].num_updates == 30
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-6)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-4, atol=1e-5)
