"""cql_red.py against computations that share no code with it: numbers by hand, numpy, torch.distributions."""

import functools
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

cql = harness.load("cql_red")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below


def make_args(**flags):
    small = {"hidden_sizes": (16, 16), "batch_size": 32, "num_updates": 1000, "num_action_samples": 3}
    return cql.Args(**{**small, **flags})


def make_agent(args, spread=None, obs_dim=O, action_dim=A, device="cpu"):
    """A CQLAgent. With `spread`, all parameters are drawn anew: non-zero biases, targets unlike critics."""
    agent = cql.CQLAgent(obs_dim, action_dim, args, torch.device(device))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(args, seed=0, obs_dim=O, action_dim=A):
    """Packed transitions (S, B, O + A + 1 + O + 1), a quarter of them terminal, and the three noises of `update`."""
    rng, S, B = np.random.default_rng(seed), args.num_seeds, args.batch_size
    obs, next_obs = rng.normal(size=(2, S, B, obs_dim))
    action, reward = rng.uniform(-0.999, 0.999, size=(S, B, action_dim)), rng.normal(size=(S, B, 1))
    not_terminated = np.float64(rng.random((S, B, 1)) > 0.25)
    batch = np.concatenate([obs, action, reward, next_obs, not_terminated], -1)
    noises = [rng.normal(size=(S, *shape)) for shape in cql.noise_shapes(args, action_dim)]
    return [torch.from_numpy(x).float() for x in (batch, *noises)]


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    named = list(mlp.named_parameters())
    return list(zip(*([p for name, p in named if kind in name] for kind in ("weight", "bias"))))


def constant_actor(agent, mean=0.0, log_std=0.0):
    """Makes the policy ignore its observation: this mean and log_std (before the tanh) in every dimension."""
    with torch.no_grad():
        for p in agent.actor.net.parameters():
            p.zero_()
        layers_of(agent.actor.net)[-1][1][..., :A] = mean
        agent.actor.log_std_shift.fill_(log_std)


def without_moments(state):
    """A state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x for name, x in state.items() if not name.startswith("optimizers.")}


def snapshot(agent):
    return {name: x.clone() for name, x in without_moments(agent.state_dict()).items()}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): cql_red's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["cql_red.py", *map(str, flags)])
        try:
            cql.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


TINY = "--eval-episodes", 0, "--batch-size", 8, "--hidden-sizes", 8, "--device", "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# The conservative gap: the worked examples of the spec, 5(g)
# ---------------------------------------------------------------------------------------------------------------------


def gap_of(logged_q, sampled_q, log_density=None, **flags):
    """conservative_gap of one state and one critic."""
    q = torch.tensor([logged_q, *sampled_q], dtype=torch.float64).view(1, 1, -1, 1)
    log_density = torch.tensor(log_density or [0.0] * len(sampled_q), dtype=torch.float64).view(1, -1, 1)
    return cql.conservative_gap(q, log_density, make_args(**flags)).item()


SAMPLED_Q = [1, 2, 2, 3, 0, 1]  # A = 1, n = 2: random, from pi(.|s), from pi(.|s')
LOG_DENSITY = [math.log(0.5), math.log(0.5), 0.2, 0.1, -1.0, -0.5]


def test_gap_by_hand():
    """(3), and (2): with importance weights the gap may be negative."""
    assert gap_of(2.5, SAMPLED_Q, LOG_DENSITY) == pytest.approx(1.444266, abs=1e-6)
    assert gap_of(20, SAMPLED_Q, LOG_DENSITY) == pytest.approx(-16.0557, abs=1e-4)
    assert gap_of(2.5, SAMPLED_Q, importance_sampling=False) == pytest.approx(1.479358, abs=1e-6)


def test_gap_floor():
    """It cuts each state's gap, not their mean."""
    assert gap_of(20, SAMPLED_Q, LOG_DENSITY, gap_floor=-3.0) == -3
    assert gap_of(2.5, SAMPLED_Q, LOG_DENSITY, gap_floor=-3.0) == pytest.approx(1.444266, abs=1e-6)


@pytest.mark.parametrize("dims, gap", [(1, 4.09434), (3, 5.48064), (6, 7.56008)])
def test_gap_of_a_constant_q(dims, gap):
    """(4): log(30 2^A) when every density is the uniform one; there is no -log(3 n)."""
    assert gap_of(7.0, [7.0] * 30, [-dims * math.log(2)] * 30) == pytest.approx(gap, abs=1e-5)


def test_gap_without_importance_sampling_is_never_negative():
    """(1): the logged action is among the terms. And (7): at low temperatures the gap is max - Q of the logged one."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sampled, logged = (10 * rng.normal(size=6)).tolist(), 10 * rng.normal()
        assert gap_of(logged, sampled, importance_sampling=False) > 0
        cold = gap_of(logged, sampled, importance_sampling=False, cql_temperature=1e-4)
        assert cold == pytest.approx(max(*sampled, logged) - logged, abs=1e-3)


def test_gap_with_temperature():
    """T log sum exp(x / T), which for equal x is x + T log n."""
    assert gap_of(1.0, [3.0] * 4, cql_temperature=2.0) == pytest.approx(2 + 2 * math.log(4))
    assert gap_of(1.0, [3.0] * 4, [0.5] * 4, cql_temperature=2.0) == pytest.approx(1.5 + 2 * math.log(4))


# ---------------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------------


def tanh_normal(mean, std):
    return TransformedDistribution(Independent(Normal(mean, std), 1), [TanhTransform()])


def test_log_prob_by_hand():
    """(6): log pi(0.5) with mean 0 and log_std -1, which is what an untrained policy has."""
    agent = make_agent(make_args(), action_dim=1)
    with torch.no_grad():
        layers_of(agent.actor.net)[-1][0].zero_()
    log_prob = agent.actor.log_prob(torch.zeros(1, 1, O), torch.full((1, 1, 1), 0.5))
    assert log_prob.item() == pytest.approx(-0.746033, abs=1e-6)


def test_policy_against_torch_distributions():
    """Both log-probabilities, of sampled and of given actions, with scalars that differ from seed to seed."""
    args = make_args(num_seeds=3)
    agent = make_agent(args, spread=0.4).double()
    with torch.no_grad():
        agent.actor.log_std_scale.copy_(torch.tensor([0.5, 1.0, -2.0]).view(3, 1, 1))
        agent.actor.log_std_shift.copy_(torch.tensor([-1.0, 0.3, 2.0]).view(3, 1, 1))
    batch, _, noise, _ = (x.double() for x in make_batch(args))
    obs, logged = batch[..., :O], batch[..., O : O + A]
    x = obs
    for i, (w, b) in enumerate(layers_of(agent.actor.net)):
        x = (x.relu() if i else x) @ w + b
    mean = x[..., :A]
    log_std = agent.actor.log_std_scale * x[..., A:] + agent.actor.log_std_shift
    assert (log_std[2] > 2).any() and (log_std[2] < 2).any()  # the clamp has something to do
    policy = tanh_normal(mean, log_std.clamp(-20, 2).exp())
    torch.testing.assert_close(agent.actor.log_prob(obs, logged), policy.log_prob(logged))
    torch.testing.assert_close(agent.actor.act(obs), mean.tanh())
    action, log_prob = agent.actor.sample(obs, noise)
    assert action.shape == noise.shape and log_prob.shape == noise.shape[:-1] == (3, 4, 32)
    pre_tanh = mean[:, None] + log_std.clamp(-20, 2).exp()[:, None] * noise
    torch.testing.assert_close(action, pre_tanh.tanh())
    for k in range(4):
        moderate = pre_tanh[:, k].abs().amax(-1) < 6  # beyond, their way through atanh loses digits
        expected = policy.log_prob(action[:, k])[moderate]
        torch.testing.assert_close(log_prob[:, k][moderate], expected, rtol=1e-6, atol=1e-6)


def test_log_prob_of_saturated_actions():
    """Where tanh is 1 in float32, log(1 - tanh^2) of the sample is still exact: -2 |x| + 2 log 2."""
    agent = make_agent(make_args())
    constant_actor(agent, mean=30.0)
    action, log_prob = agent.actor.sample(torch.zeros(1, 1, O), torch.zeros(1, 1, 1, A))
    assert torch.equal(action, torch.ones(1, 1, 1, A))
    expected = A * (-0.5 * math.log(2 * math.pi) + 60 - 2 * math.log(2))
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The critics
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K, hidden", [(1, (16, 16)), (5, (16, 16)), (3, (8,)), (2, (8, 12, 16))])
def test_many_actions_at_once_are_one_after_the_other(K, hidden):
    """Values and all gradients are those of an ordinary MLP on [s, a], action by action."""
    args = make_args(num_seeds=2, hidden_sizes=hidden)
    agent = make_agent(args, spread=0.5).double()
    batch, *_ = (x.double() for x in make_batch(args))
    obs, actions = batch[..., :O], torch.randn(2, K, 32, A, dtype=torch.float64).requires_grad_()
    plain = cql.MLP((2, 2), [O + A, *hidden, 1], cql.orthogonal, [torch.Generator(), torch.Generator()]).double()
    plain.load_state_dict(agent.critic.state_dict())
    q = agent.critic(obs, actions)
    expected = torch.stack([plain(torch.cat([obs, a], -1)).squeeze(-1) for a in actions.unbind(1)], 2)
    assert q.shape == (2, 2, K, 32)
    torch.testing.assert_close(q, expected)
    weight = torch.randn(q.shape, dtype=torch.float64)
    ours = torch.autograd.grad(q, [actions, *agent.critic.parameters()], weight)
    theirs = torch.autograd.grad(expected, [actions, *plain.parameters()], weight)
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y)


def test_the_actions_that_the_critics_learn_from(monkeypatch):
    """The logged one, n uniform, n from pi(.|s), n from pi(.|s'), all at s; their densities follow the same order."""
    args = make_args(num_action_samples=400, batch_size=64)
    agent = make_agent(args, spread=0.3)
    batch, random_noise, noise, next_noise = make_batch(args)
    obs, logged, next_obs = batch[..., :O], batch[..., O : O + A], batch[..., O + A + 1 : -1]
    policy, next_policy = agent.actor.sample(obs, noise), agent.actor.sample(next_obs, next_noise)
    seen, forward, conservative_gap = {}, agent.critic.forward, cql.conservative_gap
    monkeypatch.setattr(agent.critic, "forward", lambda o, a: seen.update({a.shape[1]: (o, a)}) or forward(o, a))
    monkeypatch.setattr(
        cql, "conservative_gap", lambda q, d, args: seen.update(density=d) or conservative_gap(q, d, args)
    )
    cql.update(agent, batch, random_noise, noise, next_noise, args)
    o, a = seen[1201]
    assert torch.equal(o, obs) and not a.requires_grad and not seen["density"].requires_grad
    assert torch.equal(a[:, 0], logged)
    torch.testing.assert_close(a[:, 401:801], policy[0][:, 1:])
    torch.testing.assert_close(a[:, 801:], next_policy[0][:, :400])
    torch.testing.assert_close(seen["density"][:, 400:800], policy[1][:, 1:])
    torch.testing.assert_close(seen["density"][:, 800:], next_policy[1][:, :400])
    assert torch.all(seen["density"][:, :400] == torch.tensor(A * math.log(0.5)))
    torch.testing.assert_close(seen[1][1], policy[0][:, :1])  # the policy's own loss has an action of its own
    uniform = a[:, 1:401].flatten().sort().values  # Kolmogorov-Smirnov: 1.95 / sqrt(n) has probability 0.001
    distance = (uniform - torch.linspace(-1, 1, len(uniform))).abs().max() / 2
    assert uniform.min() >= -1 and uniform.max() <= 1 and distance < 1.95 / math.sqrt(len(uniform))


# ---------------------------------------------------------------------------------------------------------------------
# The whole update against numpy: forward, hand-derived gradients, Adam, order, Polyak
# ---------------------------------------------------------------------------------------------------------------------


def forward(layers, x):
    """Output of a ReLU network [(W, b), ...] and the input of each layer."""
    inputs = []
    for i, (w, b) in enumerate(layers):
        inputs.append(x if i == 0 else np.maximum(x, 0))
        x = inputs[-1] @ w + b
    return x, inputs


def backward(layers, inputs, grad):
    """Gradients [(dW, db), ...] from the gradient at the output, and the gradient at the input."""
    grads = []
    for i, ((w, _), x) in reversed(list(enumerate(zip(layers, inputs)))):
        grads.append((x.T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ w.T) * ((x > 0) if i else 1)
    return grads[::-1], grad


class NumpyCQL:
    """One seed of CQL in numpy, float64, written from the equations: one action at a time, all gradients by hand."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.t, self.moments = args, 0, {}
        self.actor = layers(agent.actor.net)
        self.critics = [layers(agent.critic, c) for c in range(2)]
        self.targets = [layers(agent.target_critic, c) for c in range(2)]
        scalars = agent.actor.log_std_scale, agent.actor.log_std_shift, agent.log_alpha, agent.log_multiplier
        self.scale, self.shift, self.log_alpha, self.log_multiplier = (x[s].item() for x in scalars)

    def adam(self, name, p, grad, lr):
        m, v = self.moments.get(name, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        self.moments[name] = m, v
        m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
        return p - lr * m_hat / (np.sqrt(v_hat) + 1e-8)

    def step(self, name, layers, grads, lr):
        return [
            tuple(self.adam((name, i, j), p, g, lr) for j, (p, g) in enumerate(zip(*pair)))
            for i, pair in enumerate(zip(layers, grads))
        ]

    def policy(self, obs):
        out, inputs = forward(self.actor, obs)
        raw = out[:, A:]
        return SimpleNamespace(
            mean=out[:, :A],
            raw=raw,
            log_std=np.clip(self.scale * raw + self.shift, -20, 2),
            free=(self.scale * raw + self.shift > -20) & (self.scale * raw + self.shift < 2),
            inputs=inputs,
        )

    @staticmethod
    def sample(policy, noise):
        """Action, its log-probability, the point before the tanh."""
        x = policy.mean + np.exp(policy.log_std) * noise
        log_det = 2 * np.log(2) - 2 * np.logaddexp(x, -x)  # 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2
        log_normal = -0.5 * noise**2 - policy.log_std - 0.5 * np.log(2 * np.pi)
        return np.tanh(x), np.sum(log_normal - log_det, 1, keepdims=True), x

    def update(self, batch, random_noise, noise, next_noise):
        args, B, n = self.args, len(batch), self.args.num_action_samples
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        cloning = self.t < args.bc_updates
        self.t += 1
        alpha, multiplier = np.exp(self.log_alpha), min(np.exp(self.log_multiplier), 1e6)
        now, nxt = self.policy(s), self.policy(s_next)
        ours, theirs = [self.sample(now, e) for e in noise], [self.sample(nxt, e) for e in next_noise]

        # temperature: L = -log_alpha mean(log pi - A)
        own_action, own_log_prob, x = ours[0]
        log_alpha = self.adam("alpha", self.log_alpha, -(own_log_prob.mean() - A), args.policy_learning_rate)

        # policy
        passes = [forward(critic, np.concatenate([s, own_action], 1)) for critic in self.critics]
        q_own = np.concatenate([q for q, _ in passes], 1)
        climbed, dq_da = q_own.min(1, keepdims=True), np.zeros((B, A))
        for c, (critic, (_, inputs)) in enumerate(zip(self.critics, passes)):
            chosen = np.float64(q_own.argmin(1) == c)[:, None]
            dq_da += backward(critic, inputs, chosen)[1][:, O:]
        std = np.exp(now.log_std)
        d_x = alpha * 2 * np.tanh(x)  # of -log(1 - tanh(x)^2)
        if cloning:
            z = (np.arctanh(a) - now.mean) / std
            log_normal = -0.5 * z**2 - now.log_std - 0.5 * np.log(2 * np.pi)
            climbed = np.sum(log_normal - np.log(1 - a**2), 1, keepdims=True)
            d_mean, d_log_std = d_x - z / std, d_x * std * noise[0] - alpha + 1 - z**2
        else:
            d_x = d_x - dq_da * (1 - np.tanh(x) ** 2)
            d_mean, d_log_std = d_x, d_x * std * noise[0] - alpha
        actor_loss = np.mean(alpha * own_log_prob - climbed)
        d_log_std = d_log_std * now.free
        d_out = np.concatenate([d_mean, d_log_std * self.scale], 1) / B
        actor = self.step("actor", self.actor, backward(self.actor, now.inputs, d_out)[0], args.policy_learning_rate)
        scale = self.adam("scale", self.scale, np.sum(d_log_std * now.raw) / B, args.policy_learning_rate)
        shift = self.adam("shift", self.shift, np.sum(d_log_std) / B, args.policy_learning_rate)

        # backup
        backups = []
        for next_action, next_log_prob, _ in theirs[n:]:
            sa = np.concatenate([s_next, next_action], 1)
            backups.append((np.minimum(*(forward(t, sa)[0] for t in self.targets)), next_log_prob))
        best = np.argmax([q for q, _ in backups], 0)
        next_q = np.choose(best, [q for q, _ in backups])
        if args.backup_entropy:
            next_q = next_q - alpha * np.choose(best, [log_prob for _, log_prob in backups])
        y = r + args.gamma * mask * next_q

        # critics
        uniform = [2 * (0.5 * (1 + np.vectorize(math.erf)(e / math.sqrt(2)))) - 1 for e in random_noise]
        proposals = [(u, np.full((B, 1), A * math.log(0.5))) for u in uniform]
        proposals += [(action, log_prob) for action, log_prob, _ in ours[1:] + theirs[:n]]
        critic_loss, gaps, new_critics, self.cut = 0, [], [], 0
        for c, critic in enumerate(self.critics):
            logged, logged_inputs = forward(critic, np.concatenate([s, a], 1))
            sampled = [forward(critic, np.concatenate([s, action], 1)) for action, _ in proposals]
            if args.importance_sampling:
                terms = np.concatenate([q - log_prob for (q, _), (_, log_prob) in zip(sampled, proposals)], 1)
            else:
                terms = np.concatenate([logged, *(q for q, _ in sampled)], 1)
            top = terms.max(1, keepdims=True)
            weights = np.exp((terms - top) / args.cql_temperature)
            soft_maximum = top + args.cql_temperature * np.log(weights.sum(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            gap = soft_maximum - logged
            floor = -np.inf if args.gap_floor is None else args.gap_floor
            above = np.float64(gap > floor)
            self.cut += np.sum(1 - above)
            gaps.append(np.mean(np.maximum(gap, floor)))
            critic_loss += np.mean((logged - y) ** 2)
            strength = args.cql_alpha * (1 if args.lagrange_gap is None else multiplier)
            on_logged = 2 * (logged - y) / B - strength * above / B
            if not args.importance_sampling:
                on_logged, weights = on_logged + strength * above * weights[:, :1] / B, weights[:, 1:]
            grads = backward(critic, logged_inputs, on_logged)[0]
            for k, (_, inputs) in enumerate(sampled):
                more = backward(critic, inputs, strength * above * weights[:, k : k + 1] / B)[0]
                grads = [tuple(g + m for g, m in zip(*pair)) for pair in zip(grads, more)]
            new_critics.append(self.step(("critic", c), critic, grads, args.learning_rate))
        if args.lagrange_gap is not None:
            excess = args.cql_alpha * (np.mean(gaps) - args.lagrange_gap)
            grad = -np.exp(self.log_multiplier) * excess if self.log_multiplier < np.log(1e6) else 0.0
            self.log_multiplier = self.adam("multiplier", self.log_multiplier, grad, args.learning_rate)

        # all at once: every gradient above was taken at the old values
        self.actor, self.scale, self.shift, self.log_alpha, self.critics = actor, scale, shift, log_alpha, new_critics
        self.targets = [
            [
                tuple((1 - args.polyak) * old + args.polyak * new for old, new in zip(*pair))
                for pair in zip(target, critic)
            ]
            for target, critic in zip(self.targets, self.critics)
        ]
        return actor_loss, critic_loss, np.mean(gaps)


CASES = {
    "default": {},
    "corl": {"preset": "corl", "hidden_sizes": (12, 16, 8)},
    "no importance sampling": {"importance_sampling": False, "cql_temperature": 0.5},
    "lagrange": {"lagrange_gap": 0.8, "gap_floor": 5.5, "cql_temperature": 2.0},
    "max backup": {"max_target_backup": True, "backup_entropy": True},
    "cloning first": {"bc_updates": 2, "backup_entropy": True},
}


@pytest.mark.parametrize("case", CASES)
def test_update_against_numpy(case):
    """Four updates of two seeds, in float64, with steps large enough that every question of order shows."""
    flags = {"learning_rate": 2**-6, "policy_learning_rate": 2**-5, **CASES[case]}  # float32 holds them exactly
    args = make_args(num_seeds=2, polyak=0.3, gamma=0.9, **flags)
    agent = make_agent(args, spread=0.4).double()
    references, cut = [NumpyCQL(agent, s, args) for s in range(2)], 0
    for n in range(4):
        inputs = [x.double() for x in make_batch(args, seed=n)]
        metrics = cql.update(agent, *inputs, args)
        for s, reference in enumerate(references):
            losses = reference.update(*(x[s].numpy() for x in inputs))
            ours = [metrics[f"loss/{name}"][s].item() for name in ("actor", "critic", "conservative_gap")]
            np.testing.assert_allclose(ours, losses, rtol=1e-7)
            cut += reference.cut / (2 * 32)
    assert (0 < cut < 8) == (args.gap_floor is not None)  # the floor cuts some gaps and leaves others
    for s, reference in enumerate(references):
        scalars = agent.actor.log_std_scale, agent.actor.log_std_shift, agent.log_alpha, agent.log_multiplier
        expected = reference.scale, reference.shift, reference.log_alpha, reference.log_multiplier
        np.testing.assert_allclose([x[s].item() for x in scalars], expected, rtol=0, atol=1e-7)
        nets = [(agent.actor.net, (), reference.actor)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(2)]
        nets += [(agent.target_critic, (c,), reference.targets[c]) for c in range(2)]
        for mlp, lead, layers in nets:
            for ours, theirs in zip(layers_of(mlp), layers):
                for x, y in zip(ours, theirs):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-7)


def test_without_the_gap_it_is_sac():
    """(1): cql_alpha = 0 leaves the Bellman error alone: the sampled actions change nothing."""
    args, states = make_args(cql_alpha=0.0, learning_rate=0.01), []
    for factor in (1, 2):
        agent = make_agent(args, spread=0.3)
        batch, random_noise, noise, next_noise = make_batch(args)
        noise[:, 1:] *= factor
        next_noise[:, :3] *= factor
        cql.update(agent, batch, random_noise * factor, noise, next_noise, args)
        states.append(snapshot(agent))
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


@pytest.mark.parametrize("max_target_backup", [False, True])
def test_targets_bootstrap_through_truncation_only(max_target_backup):
    """y = r at a true end whatever Q(s') is, else r + gamma min Q_target. Critics are 0, target critics 7 and 9."""
    args = make_args(learning_rate=0.0, polyak=0.0, max_target_backup=max_target_backup)
    agent = make_agent(args)
    with torch.no_grad():
        for p in [*agent.critic.parameters(), *agent.target_critic.parameters()]:
            p.zero_()
        layers_of(agent.target_critic)[-1][1].copy_(torch.tensor([7.0, 9.0]).view(1, 2, 1, 1))
    batch, *noises = make_batch(args)
    for not_terminated, y in ((0.0, 1.5), (1.0, 1.5 + 0.99 * 7)):
        batch[..., O + A], batch[..., -1] = 1.5, not_terminated
        loss = cql.update(agent, batch, *noises, args)["loss/critic"].item()
        assert loss == pytest.approx(2 * y**2, rel=1e-6)


@pytest.mark.parametrize("log_std, falls", [(-0.5, True), (-6.0, False)])
def test_temperature_moves_towards_the_target_entropy(log_std, falls):
    """(5): dL/d log_alpha = -(mean log pi + target_entropy) > 0, so alpha falls, while the entropy is above -A."""
    args = make_args()
    agent = make_agent(args)
    constant_actor(agent, log_std=log_std)
    metrics = cql.update(agent, *make_batch(args), args)
    gradient = metrics["policy/entropy"].item() + A
    assert agent.target_entropy == -A and (gradient > 0) == falls
    assert agent.optimizers["alpha"].mean0.item() == pytest.approx(0.1 * gradient, rel=1e-5)  # (1 - beta1) gradient
    assert agent.log_alpha.item() == pytest.approx(-3e-4 if falls else 3e-4, rel=1e-3)  # Adam's first step
    assert metrics["policy/alpha"].item() == 1  # what this update has used


@pytest.mark.parametrize("lagrange_gap, grows", [(0.1, True), (50.0, False)])
def test_multiplier_grows_while_the_gap_is_too_large(lagrange_gap, grows):
    args = make_args(lagrange_gap=lagrange_gap)
    agent = make_agent(args)
    metrics = cql.update(agent, *make_batch(args), args)
    assert metrics["policy/multiplier"].item() == pytest.approx(math.e)  # log_multiplier begins at 1
    gradient = -math.e * args.cql_alpha * (metrics["loss/conservative_gap"].item() - lagrange_gap)
    assert agent.optimizers["multiplier"].mean0.item() == pytest.approx(
        0.1 * gradient, rel=1e-5
    )  # (1 - beta1) gradient
    assert agent.log_multiplier.item() == pytest.approx(1 + 3e-4 if grows else 1 - 3e-4, rel=1e-6)
    agent = make_agent(make_args())
    assert "policy/multiplier" not in cql.update(agent, *make_batch(make_args()), make_args())
    assert agent.log_multiplier.item() == 1


def test_polyak_and_owners():
    """Targets move to (1 - polyak) target + polyak critic, and no optimiser has them; no parameter has two owners."""
    args = make_args(polyak=0.25, learning_rate=0.01, lagrange_gap=1.0)
    agent = make_agent(args)
    for target, online in zip(agent.target_critic.parameters(), agent.critic.parameters()):
        assert torch.equal(target, online) and target.data_ptr() != online.data_ptr() and not target.requires_grad
    agent = make_agent(args, spread=0.5)
    owned = [id(p) for o in agent.optimizers.values() for p in o.params]
    assert len(owned) == len(set(owned)) and not {id(p) for p in agent.target_critic.parameters()} & set(owned)
    assert {id(p) for p in agent.parameters() if p.requires_grad} == set(owned)
    before = snapshot(agent)
    cql.update(agent, *make_batch(args), args)
    for name, x in without_moments(agent.state_dict()).items():
        if name.startswith("actor.obs_"):
            assert torch.equal(x, before[name]), name
            continue
        assert not torch.equal(x, before[name]), name
        if name.startswith("target_critic"):
            online = agent.state_dict()[name.removeprefix("target_")]
            torch.testing.assert_close(x, 0.75 * before[name] + 0.25 * online, rtol=1e-5, atol=1e-6)


def test_losses_leave_other_networks_alone():
    """What each loss depends on: the critics' does not reach the policy through its actions and log-densities, nor
    the multiplier or the targets; the policy's reaches it through the critics, which do not step on it."""
    args = make_args(lagrange_gap=1.0)
    agent = make_agent(args, spread=0.5)
    gradients = {}

    class Recorder:
        """Stands in for an optimiser: notes which networks its loss depends on, and steps nothing."""

        def __init__(self, name):
            self.name = name

        def minimize(self, loss):
            loss.backward()
            gradients[self.name] = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
            agent.zero_grad()

    recorders = {name: Recorder(name) for name in agent.optimizers}
    del agent.optimizers
    agent.optimizers = recorders
    cql.update(agent, *make_batch(args), args)
    assert gradients == {
        "alpha": {"log_alpha"},
        "actor": {"actor", "critic"},
        "multiplier": {"log_multiplier"},
        "critic": {"critic"},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01, lagrange_gap=1.0), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(5):
            inputs = make_batch(args, seed=n)
            for x in inputs:
                x[1] *= factor
            cql.update(agent, *inputs, args)
        states.append(snapshot(agent))
    for name in states[0]:
        if name != "num_updates" and not name.startswith("actor.obs_"):
            assert torch.equal(states[0][name][0], states[1][name][0]), name
            assert not torch.equal(states[0][name][1], states[1][name][1]), name


@pytest.mark.parametrize("preset", ["jaxcql", "corl"])
def test_seed_k_among_three_is_the_run_with_seed_k(run_main, monkeypatch, tmp_path, data, preset):
    """Through main(): the same first weights, the same batches and noise, and the same agents after 50 updates."""
    update, runs = cql.update, {}

    def recorder(agent, *inputs):
        args = inputs[-1]
        record = runs.setdefault((args.seed, args.num_seeds), {"inputs": [], "first": snapshot(agent)})
        record["inputs"].append([x.clone() for x in inputs[:-1]])
        return update(agent, *inputs)

    monkeypatch.setattr(cql, "update", recorder)
    flags = *TINY, "--dataset", data, "--num-updates", 50, "--preset", preset, "--policy-learning-rate", 1e-3
    for seed, num_seeds in ((3, 3), (3, 1), (5, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        run_main(*flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir)
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        runs[seed, num_seeds]["last"] = without_moments(checkpoint["agent"])
    three = runs[3, 3]
    for k in (0, 2):
        alone = runs[3 + k, 1]
        for together, single in zip(three["inputs"], alone["inputs"]):
            assert len(together) == 4 and all(torch.equal(x[k], y[0]) for x, y in zip(together, single))
        for name in three["first"]:
            if name != "num_updates":
                assert torch.equal(three["first"][name][k], alone["first"][name][0]), name
                torch.testing.assert_close(three["last"][name][k], alone["last"][name][0], rtol=1e-4, atol=1e-5)
    for i, k in itertools.combinations(range(3), 2):  # and the three are three different agents
        assert not any(torch.equal(x[i], x[k]) for x in three["inputs"][0])
        assert not torch.allclose(three["first"]["actor.net.weight0"][i], three["first"]["actor.net.weight0"][k])
    moved = three["last"]["actor.net.weight0"] - three["first"]["actor.net.weight0"]
    assert moved.abs().max() > 1e-3  # they have learned something that could differ


# ---------------------------------------------------------------------------------------------------------------------
# Presets, first weights, what the learner sees
# ---------------------------------------------------------------------------------------------------------------------


def test_presets():
    """Each fills what the user has left open; what he gives wins, also 0 and False."""
    args = cql.Args()
    assert (args.preset, args.cql_alpha, args.hidden_sizes, args.init) == ("jaxcql", 5, (256, 256), "lecun")
    assert args.normalize_obs is False and (args.learning_rate, args.policy_learning_rate) == (3e-4, 3e-4)
    args = cql.Args(preset="corl")
    assert (args.cql_alpha, args.hidden_sizes, args.init) == (10, (256, 256, 256), "orthogonal")
    assert args.normalize_obs is True and (args.learning_rate, args.policy_learning_rate) == (3e-4, 3e-5)
    args = cql.Args(preset="corl", cql_alpha=0.0, normalize_obs=False, hidden_sizes=(8,))
    assert (args.cql_alpha, args.hidden_sizes, args.init, args.normalize_obs) == (0, (8,), "orthogonal", False)


def test_lecun_weights():
    """jaxcql: hidden weights of variance 1 / in, cut at two deviations of the uncut normal; last layers in +-0.0108."""
    agent = cql.CQLAgent(11, 3, cql.Args(num_seeds=2), torch.device("cpu"))
    for mlp in (agent.actor.net, agent.critic):
        *hidden, (last, _) = layers_of(mlp)
        for weight, _ in hidden:
            std = weight.shape[-2] ** -0.5
            assert weight.std().item() == pytest.approx(std, rel=0.02) and abs(weight.mean().item()) < 0.05 * std
            assert 1.9 * std / 0.87962566 < weight.abs().max().item() <= 2 * std / 0.87962566
        assert 0.0105 < last.abs().max() <= 0.010826 and last.std().item() == pytest.approx(0.00625, rel=0.1)
        assert all(torch.all(bias == 0) for _, bias in layers_of(mlp))
    assert torch.all(agent.actor.log_std_scale == 1) and torch.all(agent.actor.log_std_shift == -1)


def test_orthogonal_weights():
    """corl: gain sqrt(2), in the last layers 0.01."""
    agent = cql.CQLAgent(11, 3, cql.Args(preset="corl"), torch.device("cpu"))
    for mlp in (agent.actor.net, agent.critic):
        for i, (weight, bias) in enumerate(layers_of(mlp)):
            w = weight[0, 0] if mlp is agent.critic else weight[0]
            gram = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
            torch.testing.assert_close(gram, (2 if i < 3 else 1e-4) * torch.eye(len(gram)), rtol=1e-4, atol=2e-6)
            assert torch.all(bias == 0)


def test_the_two_critics_differ_from_the_start():
    """Also in their last layers, which are drawn anew, per seed and critic."""
    agent = make_agent(make_args(num_seeds=2))
    for weight, _ in layers_of(agent.critic):
        for i, k in itertools.combinations(range(4), 2):
            assert not torch.allclose(weight.flatten(0, 1)[i], weight.flatten(0, 1)[k])


@pytest.mark.parametrize(
    "env_id, mode, stretched",
    [
        ("AntMaze_UMaze-v4", "auto", True),
        ("PointMaze_UMaze-v3", "auto", True),
        ("Hopper-v5", "auto", False),
        ("FrankaKitchen-v1", "auto", False),
        (None, "auto", False),
        ("AntMaze_UMaze-v4", "none", False),
        ("Hopper-v5", "stretch", True),
    ],
)
def test_stretched_rewards(env_id, mode, stretched):
    """0 and 1 become -5 and 5, in mazes; nothing else of the data changes."""
    rows = np.float32(np.arange(15).reshape(3, 5))
    rows[:, 2] = 0, 1, 1
    before = rows.copy()
    environment = {"id": env_id, "kwargs": {}, "references": None}
    dataset = cql.Dataset(rows, np.array([1, 2]), np.array([0.0, 2.0]), 1, 1, environment)
    cql.stretch_rewards(dataset, mode)
    assert rows[:, 2].tolist() == ([-5, 5, 5] if stretched else [0, 1, 1])
    np.testing.assert_array_equal(np.delete(rows, 2, 1), np.delete(before, 2, 1))
    assert dataset.episode_returns.tolist() == [0, 2]


def test_what_the_learner_sees(run_main, monkeypatch, tmp_path):
    """Through main(), corl: normalised s and s', actions inside +-0.999, raw rewards; the policy in the checkpoint
    normalises raw observations itself; config.json has the preset's values."""
    episodes = harness.hopper_episodes()
    episodes = [(3 * o + 5, np.sign(a) if i == 2 else a, *rest) for i, (o, a, *rest) in enumerate(episodes)]
    folder, update, seen = harness.write_minari(tmp_path / "data", episodes), cql.update, []
    monkeypatch.setattr(cql, "update", lambda agent, batch, *rest: seen.append(batch) or update(agent, batch, *rest))
    flags = "--dataset", folder, *TINY, "--batch-size", 64, "--num-updates", 20, "--preset", "corl"
    run_main(*flags, "--sampler", "red", "--run-dir", tmp_path / "run")
    obs = np.concatenate([o[:-1] for o, *_ in episodes]).astype(np.float64)
    mean, scale = obs.mean(0), obs.std(0) + 1e-3
    logged = {tuple(np.float32((o - mean) / scale).round(3)): (r, a, o_next) for e in episodes
              for o, o_next, a, r in zip(e[0], e[0][1:], e[1], e[2])}  # fmt: skip
    rows = torch.cat(seen, 1)[0].numpy()
    for row in rows[:100]:
        reward, action, next_obs = logged[tuple(row[:11].round(3))]
        np.testing.assert_allclose(row[11:14], np.clip(action, -0.999, 0.999), rtol=1e-6)
        assert row[14] == pytest.approx(reward, rel=1e-6)
        np.testing.assert_allclose(row[15:26], (next_obs - mean) / scale, atol=1e-4)
    assert np.abs(rows[:, 11:14]).max() == np.float32(0.999)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert (config["cql_alpha"], config["policy_learning_rate"], config["hidden_sizes"]) == (10, 3e-5, [8])
    agent = cql.CQLAgent(11, 3, cql.Args(**{**config, "hidden_sizes": (8,)}), torch.device("cpu"))
    agent.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"])
    np.testing.assert_allclose(agent.actor.obs_mean[0, 0], mean, rtol=1e-5)
    np.testing.assert_allclose(agent.actor.obs_scale[0, 0], scale, rtol=1e-5)
    raw = torch.from_numpy(np.float32(obs[None, :50]))
    normalised = torch.from_numpy(np.float32((obs[None, :50] - mean) / scale))
    torch.testing.assert_close(agent.actor.act(raw), agent.actor(normalised)[0].tanh(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Learning: logged actions around 0; in state 0 a larger one costs more at once, but leads to the better of two states
# ---------------------------------------------------------------------------------------------------------------------


def game_transitions(num=4000, seed=0):
    """State 0: reward -a, then state 1 with probability 1 / (1 + exp(-8 a)), else state 2. States 1 and 2 are the last:
    reward 4 - 4 (a - 0.3)^2 and -4 (a + 0.3)^2. All actions are from Normal(0, 0.3).

    What follows the end looks like state 1, so a bootstrap through it would show. Packed (N, 3 + 1 + 1 + 3 + 1).
    """
    rng, eye, rows = np.random.default_rng(seed), np.eye(3), []
    for _ in range(num):
        state, a = rng.choice(3, p=[0.5, 0.25, 0.25]), np.clip(0.3 * rng.normal(), -0.999, 0.999)
        reward = (-a, 4 - 4 * (a - 0.3) ** 2, -4 * (a + 0.3) ** 2)[state]
        next_state = 1 if state or rng.random() < 1 / (1 + math.exp(-8 * a)) else 2
        rows.append([*eye[state], a, reward, *eye[next_state], state == 0])
    return torch.tensor(np.array(rows), dtype=torch.float32)


def learn_game(**flags):
    """What three seeds do in the three states after 300 updates (S, 3), and min Q there of an action (S, 3)."""
    small = {"hidden_sizes": (32, 32), "num_seeds": 3, "learning_rate": 3e-3, "policy_learning_rate": 3e-3}
    small |= {"polyak": 0.05, "batch_size": 64, "num_action_samples": 4, "cql_alpha": 1.0}
    args = cql.Args(**{**small, **flags})
    transitions, agent = game_transitions(), cql.CQLAgent(3, 1, args, torch.device("cpu"))
    sampler = cql.Sampler(np.full(len(transitions), 1 / len(transitions)), "cpu")
    generators = [torch.Generator().manual_seed(s) for s in range(3)]
    for _ in range(3):
        block = cql.draw_block(sampler, generators, args.batch_size, *cql.noise_shapes(args, 1))
        cql.run_updates(agent, transitions, args, *block)
    states = torch.eye(3).expand(3, 3, 3)

    def q(action):
        return agent.critic(states, torch.full((3, 1, 3, 1), action)).amin(1).squeeze(1).detach().numpy()

    return agent.actor.act(states)[..., 0].detach().numpy(), q


def test_cql_learns_the_game():
    """In state 0 it pays for the better state, in the others it takes the better actions, all well inside the data; and
    it knows actions that nobody has tried to be worse."""
    actions, q = learn_game()
    assert np.all((actions[:, 0] > 0.1) & (actions[:, 0] < 0.45)), actions
    assert np.all((actions[:, 1] > 0.05) & (actions[:, 2] < -0.05)), actions
    assert np.all(np.maximum(q(-0.95), q(0.95)) < np.maximum(q(-0.3), q(0.3)) - 0.5)
    assert np.all(q(0.3)[:, 1] < 6)  # no bootstrap through the end


@pytest.mark.parametrize(
    "wrong, low, high",
    [({"gamma": 0.0}, -1, 0), ({"cql_alpha": 0.0}, 0.48, 1), ({"bc_updates": 300}, -0.08, 0.08)],
    ids=["one-step rewards", "no conservatism", "cloning"],
)
def test_the_game_is_a_test(wrong, low, high):
    """In state 0, one that sees no further than the next reward goes down, one without the gap goes where hardly anyone
    has been, and a clone stays in the middle."""
    actions, _ = learn_game(**wrong)
    assert np.all((actions[:, 0] > low) & (actions[:, 0] < high)), actions


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

LONG = "--hidden-sizes", 16, 16, "--batch-size", 16, "--num-updates", 500, "--eval-every", 130, "--log-every", 90
LONG += "--eval-episodes", 1, "--eval-workers", 0, "--preset", "corl", "--lagrange-gap", 1, "--num-seeds", 2


def finish(*flags):
    """A run that has to end well."""
    done = harness.run("cql_red", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start(*flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    return subprocess.Popen(harness.command("cql_red", *flags), **pipes)


def tensors(node, path=""):
    """{path of keys: tensor or number} of a checkpoint."""
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in tensors(value, f"{path}/{key}").items()}
    if isinstance(node, (list, tuple)):
        return {k: v for i, value in enumerate(node) for k, v in tensors(value, f"{path}/{i}").items()}
    return {path: torch.as_tensor(node)}


def assert_same_end(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators; the same evaluations.csv."""
    ours, theirs = (tensors(torch.load(x / "checkpoint.pt", weights_only=True)) for x in (run_dir, reference))
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert (run_dir / "evaluations.csv").read_text() == (reference / "evaluations.csv").read_text()


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    finish("--dataset", data, *LONG, "--run-dir", run_dir)
    return run_dir


def test_a_killed_and_resumed_run_ends_like_one_never_stopped(data, unbroken, tmp_path):
    """kill -9 at a random moment after some checkpoints inside blocks of updates, --resume: same bits, same csv."""
    run_dir = tmp_path / "run"
    process = start("--dataset", data, *LONG, "--checkpoint-every", 70, "--run-dir", run_dir)
    path, deadline = run_dir / "checkpoint.pt", time.time() + 120
    for _ in range(3):
        before = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.002)
    time.sleep(random.Random(5).uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert 0 < torch.load(path, weights_only=True)["num_updates"] < 500
    finish("--resume", run_dir)
    assert_same_end(run_dir, unbroken)


def test_a_stop_saves_soon_and_resumes_exactly(run_main, monkeypatch, capsys, tmp_path, data):
    """A block of 100 updates may take a minute: a stop saves after the ten that are under way. Resumed, the run ends
    as if it had never been stopped."""
    run_updates, calls = cql.run_updates, []

    def stopped_run_updates(*inputs):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_updates(*inputs)

    flags = (
        "--dataset",
        data,
        *TINY,
        "--num-updates",
        220,
        "--bc-updates",
        150,
        "--max-target-backup",
        "--preset",
        "corl",
    )
    run_main(*flags, "--run-dir", tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(cql, "run_updates", stopped_run_updates)
        run_main(*flags, "--run-dir", tmp_path / "stopped")
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"stopped at update 130; continue with: python cql_red.py --resume {tmp_path}" in capsys.readouterr().out
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["num_updates"] == 130
    run_main("--resume", tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


def test_evaluate(run_main, capsys, unbroken):
    before = {path.name: path.read_bytes() for path in unbroken.iterdir()}
    run_main("--evaluate", unbroken, "--eval-episodes", 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed 0", "seed 1"] and "2 episodes" in lines[0]
    assert before == {path.name: path.read_bytes() for path in unbroken.iterdir()}


@pytest.mark.parametrize("flag, value", [("--preset", "jaxcql"), ("--cql-alpha", 5), ("--lagrange-gap", 2)])
def test_flags_that_a_preset_fills_hold_when_a_run_goes_on(run_main, capsys, unbroken, flag, value):
    with pytest.raises(SystemExit) as stop:
        run_main("--resume", unbroken, flag, value)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} differs from the run in")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--cql-alpha", -1),
        ("--cql-temperature", 0),
        ("--num-action-samples", 0),
        ("--policy-learning-rate", 2),
        ("--lagrange-gap", "nan"),
        ("--gap-floor", "nan"),
        ("--bc-updates", -1),
        ("--hidden-sizes", 0),
        ("--preset", "d3rlpy"),
        ("--init", "zero"),
    ],
)
def test_flag_out_of_range(run_main, capsys, tmp_path, data, flag, value):
    with pytest.raises(SystemExit) as stop:
        run_main("--dataset", data, flag, value, "--run-dir", tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and flag in lines[0], lines
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_captured_updates_equal_eager_ones(case):
    """A CUDA graph of ten updates, replayed twice, gives what twenty eager updates give; capturing leaves no trace.
    Cloning ends in the middle of the second replay."""
    flags = {**CASES[case], **({"bc_updates": 15} if "bc_updates" in CASES[case] else {})}
    args = make_args(**{"num_seeds": 2, "learning_rate": 1e-3, **flags, "policy_learning_rate": 1e-3})
    device = torch.device("cuda")
    transitions = make_batch(make_args(batch_size=500), seed=1)[0][0].to(device)
    sampler = cql.Sampler(np.full(500, 1 / 500), device)
    generators = [torch.Generator(device).manual_seed(s) for s in range(2)]
    block = cql.draw_block(sampler, generators, args.batch_size, *cql.noise_shapes(args, A))
    agents = [make_agent(args, device="cuda") for _ in range(2)]
    learn = [functools.partial(cql.run_updates, agent, transitions, args) for agent in agents]
    first = snapshot(agents[0])
    replay = cql.cuda_graph(learn[0], agents[0], *(torch.zeros_like(x[:10]) for x in block))
    for name, x in without_moments(agents[0].state_dict()).items():
        assert torch.equal(x, first[name]), name
    for i in (0, 10):
        captured = replay(*(x[i : i + 10] for x in block))
        eager = learn[1](*(x[i : i + 10] for x in block))
    assert agents[0].num_updates == agents[1].num_updates == 20
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-5)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-3, atol=1e-4)
