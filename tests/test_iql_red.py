"""iql_red.py against computations that share no code with it: numbers by hand, numpy, torch.distributions."""

import functools
import itertools
import json
import math
import signal
import sys

import harness
import numpy as np
import pytest
import torch

iql = harness.load("iql_red")

LENGTHS, RETURNS = np.array([2, 3, 5]), np.array([0.0, 5.0, 10.0])  # the worked examples' dataset, 10 transitions
RETURN_OF = np.repeat(RETURNS, LENGTHS)
O, A = 4, 2  # noqa: E741  dimensions of the small agents below


def make_args(**flags):
    return iql.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, "num_updates": 1000, **flags})


def make_agent(args, obs_dim=O, action_dim=A, device="cpu", spread=None):
    """An IQLAgent. With `spread`, all parameters are drawn anew: non-zero biases, log_std, targets unlike critics."""
    agent = iql.IQLAgent(obs_dim, action_dim, args, torch.device(device))
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


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    named = list(mlp.named_parameters())
    return list(zip(*([p for name, p in named if kind in name] for kind in ("weight", "bias"))))


def constant_agent(args, target_q=0.0, value=0.0, q=0.0):
    """An agent whose networks ignore their inputs: the given outputs, and a standard normal around 0 as policy."""
    agent = make_agent(args)
    with torch.no_grad():
        for p in agent.parameters():
            p.zero_()
        for net, output in ((agent.target_critic, target_q), (agent.value, value), (agent.critic, q)):
            layers_of(net)[-1][1].fill_(output)
    return agent


def without_moments(state):
    """A state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x for name, x in state.items() if not name.startswith("optimizers.")}


def snapshot(agent):
    return {name: x.clone() for name, x in without_moments(agent.state_dict()).items()}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): iql_red's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["iql_red.py", *map(str, flags)])
        try:
            iql.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Sampling probabilities: the worked examples of the spec, 2.7
# ---------------------------------------------------------------------------------------------------------------------


def per_episode(p):
    """Probability of one transition of each of the three episodes; all transitions of an episode must have the same."""
    assert p.dtype == np.float64 and len(p) == 10 and p.sum() == pytest.approx(1, abs=1e-12)
    parts = np.split(p, np.cumsum(LENGTHS)[:-1])
    assert all(np.all(part == part[0]) for part in parts)
    return np.array([part[0] for part in parts])


@pytest.mark.parametrize(
    "alpha, p_base, expected, mean_return",
    [
        (0, 0, [0.1, 0.1, 0.1], 6.5),
        (0, 0.2, [0.1, 0.1, 0.1], 6.5),
        (1, 0, [0, 1 / 13, 2 / 13], 8.846154),
        (1, 0.2, [0.2 / 8.5, 0.7 / 8.5, 1.2 / 8.5], 8.294118),
        (2, 0, [0, 1 / 23, 4 / 23], 9.347826),
        (1, 1, [1 / 16.5, 1.5 / 16.5, 2 / 16.5], 7.424242),
        (math.inf, 0, [0, 0, 0.2], 10),
        (math.inf, 0.2, [0, 0, 0.2], 10),
        (1e6, 0, [0, 0, 0.2], 10),  # no overflow ...
        (1e300, 5.0, [0, 0, 0.2], 10),  # ... though the weights exceed 1
        (1e-6, 0, [0, 0.125, 0.125], 8.125),  # 0 to any positive power is 0: no continuity at alpha = 0
    ],
)
def test_red_probabilities(alpha, p_base, expected, mean_return):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        p = iql.red_probabilities(RETURNS, LENGTHS, alpha, p_base)
    np.testing.assert_allclose(per_episode(p), expected, rtol=1e-5 if alpha == 1e-6 else 1e-12)
    assert p @ RETURN_OF == pytest.approx(mean_return, abs=2e-6)


def test_red_mean_has_its_closed_form():
    """E_ReD[x] = (m2 + b m1) / (m1 + b), and on 0/1 returns with success share f it is f (1 + b) / (f + b)."""
    x = RETURN_OF / 10
    m1, m2 = x.mean(), np.square(x).mean()
    assert (m1, m2) == pytest.approx((0.65, 0.575))
    for b in (0, 0.2, 1, 50):
        mean = iql.red_probabilities(RETURNS, LENGTHS, 1, b) @ x
        assert mean == pytest.approx((m2 + b * m1) / (m1 + b), abs=1e-12) and mean > m1
    for f, b, expected in ((0.1, 0.2, 0.4), (0.05, 0.2, 0.24), (0.1, 0, 1)):
        success = np.float64(np.arange(100) < 100 * f)
        assert iql.red_probabilities(success, np.full(100, 7), 1, b) @ np.repeat(success, 7) == pytest.approx(expected)
    for b, odds in ((0.2, 6), (0.5, 3), (1, 2)):
        failure, success = iql.red_probabilities(np.array([0.0, 1.0]), np.array([1, 1]), 1, b)
        assert success / failure == pytest.approx(odds)


def test_red_scale_but_not_shift_of_rewards():
    """Seven times the rewards leave P as it is; a constant per step does only when all episodes have one length."""
    p = iql.red_probabilities(RETURNS, LENGTHS)
    np.testing.assert_allclose(iql.red_probabilities(7 * RETURNS, LENGTHS), p, rtol=1e-12)
    assert not np.allclose(iql.red_probabilities(RETURNS + 2 * LENGTHS, LENGTHS), p)
    equal = np.array([4, 4, 4])
    shifted = iql.red_probabilities(RETURNS + 2 * equal, equal)
    np.testing.assert_allclose(shifted, iql.red_probabilities(RETURNS, equal), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0, 1, 5, math.inf])
def test_red_without_differences_is_uniform(alpha):
    """All returns equal (zero and negative too), a single episode, a single transition: uniform, no division by 0."""
    with np.errstate(all="raise"):
        for value in (3.0, 0.0, -2.5):
            np.testing.assert_allclose(iql.red_probabilities(np.full(3, value), LENGTHS, alpha), 0.1)
        np.testing.assert_allclose(iql.red_probabilities(np.array([4.0]), np.array([8]), alpha), 1 / 8)
        np.testing.assert_allclose(iql.red_probabilities(np.array([4.0]), np.array([1]), alpha), 1)


def test_red_with_an_infinite_floor_is_uniform():
    """The last column of the paper's Table 3: p_base = inf, at every alpha."""
    for alpha in (0.5, 1, math.inf):
        np.testing.assert_allclose(iql.red_probabilities(RETURNS, LENGTHS, alpha, p_base=math.inf), 0.1)


def make_dataset(returns=RETURNS, lengths=LENGTHS, rewards=None, first_obs=None, env_id=None):
    """A Dataset with O = 1 and A = 1: rewards spread evenly over the episode, unless given."""
    rewards = np.repeat(returns / lengths, lengths) if rewards is None else rewards
    obs = np.zeros(len(rewards)) if first_obs is None else np.repeat(first_obs, lengths)
    columns = obs, np.zeros(len(rewards)), rewards, obs, np.ones(len(rewards))
    environment = {"id": env_id, "kwargs": {}, "references": None}
    return iql.Dataset(np.float32(np.stack(columns, 1)), lengths, np.float64(returns), 1, 1, environment)


def test_every_sampler_of_the_flag():
    """--sampler reaches the right formula: reward, rw, aw, top10 and uniform with the spec's numbers."""

    def mean_return(sampler, **flags):
        return iql.sampling_probabilities(make_dataset(), make_args(sampler=sampler, **flags)) @ RETURN_OF

    assert mean_return("uniform") == pytest.approx(6.5)
    assert mean_return("red") == pytest.approx(8.846154, abs=1e-6)
    assert mean_return("red", p_base=0.2) == pytest.approx(8.294118, abs=1e-6)
    assert mean_return("red", alpha=2) == pytest.approx(9.347826, abs=1e-6)
    assert mean_return("rw", temperature=0.1) == pytest.approx(9.979687, abs=1e-6)
    assert mean_return("rw", temperature=1) == pytest.approx(7.822001, abs=1e-6)
    assert mean_return("aw", temperature=1) == pytest.approx(7.822001, abs=1e-6)  # all first observations equal
    assert mean_return("rw", temperature=1e-6) == pytest.approx(10)
    rewards = make_dataset(np.array([3.0]), np.array([4]), rewards=np.array([-1.0, 0, 1, 3]))
    reward = iql.sampling_probabilities(rewards, make_args(sampler="reward"))
    np.testing.assert_allclose(reward, [0, 1 / 7, 2 / 7, 4 / 7], rtol=1e-12)
    uniform = iql.sampling_probabilities(rewards, make_args(sampler="uniform"))
    np.testing.assert_allclose(uniform, 0.25)


def test_aw_subtracts_what_the_first_observation_predicts():
    """Returns 1 + 2 s0 + advantage, advantages orthogonal to s0 and 1: AW ranks by the advantage, not the return."""
    s0, advantage = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, -1.0, -1.0, 1.0])
    lengths = np.array([1, 2, 3, 4])
    dataset = make_dataset(1 + 2 * s0 + advantage, lengths, first_obs=s0)
    p = iql.sampling_probabilities(dataset, make_args(sampler="aw", temperature=0.5))
    w = np.repeat(np.exp(np.array([1, 0, 0, 1]) / 0.5), lengths)  # advantages scaled to [0, 1]
    np.testing.assert_allclose(p, w / w.sum(), rtol=1e-6)


def test_top10():
    """Best episodes while they stay strictly under a tenth of the transitions, but one at least."""
    one = iql.top_probabilities(np.array([10.0, 5.0, 1.0]), np.array([900, 50, 50]))
    np.testing.assert_allclose(one, np.where(np.arange(1000) < 900, 1 / 900, 0))
    equal = iql.top_probabilities(np.arange(20.0), np.full(20, 50))  # 50 < 100; 100 is not
    np.testing.assert_allclose(equal, np.where(np.arange(1000) >= 950, 1 / 50, 0))
    two = iql.top_probabilities(np.array([1.0, 9, 2, 8]), np.array([460, 20, 460, 60]))  # 20, 80 < 100, 540
    np.testing.assert_allclose(two, np.repeat([0, 1 / 80, 0, 1 / 80], [460, 20, 460, 60]))


# ---------------------------------------------------------------------------------------------------------------------
# The sampler
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_base, alpha", [(0, 1), (0.2, 1), (0, 2), (0, 0)])
def test_a_million_draws_follow_the_probabilities(p_base, alpha):
    """Frequencies within 5 sigma of P; a transition of probability 0 never comes. alpha = 0 is uniform."""
    p = iql.red_probabilities(RETURNS, LENGTHS, alpha, p_base)
    u = torch.rand(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = np.bincount(iql.Sampler(p, "cpu")(u).numpy(), minlength=10)
    assert len(count) == 10 and count.sum() == 1_000_000
    assert np.all(np.abs(count / 1e6 - p) <= 5 * np.sqrt(p * (1 - p) / 1e6))
    assert np.all(count[p == 0] == 0)


def test_sampler_at_the_edges():
    """u = 0 and the largest u below 1, with probability 0 at both ends and inside; the shape is kept."""
    u = torch.tensor([[0.0, 1 - 2**-53], [0.4999, 0.5]], dtype=torch.float64)
    index = iql.Sampler(np.array([0, 0, 0.5, 0, 0.5, 0]), "cpu")(u)
    assert index.dtype == torch.int64 and index.tolist() == [[2, 4], [2, 4]]
    assert iql.Sampler(np.full(3, 1 / 3), "cpu")(u).tolist() == [[0, 2], [1, 1]]
    assert iql.Sampler(np.array([1.0]), "cpu")(u).tolist() == [[0, 0], [0, 0]]


def test_sampler_of_many_transitions_is_exact():
    """With a million transitions a float32 cumulative sum would drift by percents; each tenth must get its mass."""
    p = np.linspace(0, 2, 1_000_000)
    p /= p.sum()
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    drawn = np.bincount(iql.Sampler(p, "cpu")(u).numpy() // 100_000, minlength=10) / 1e6
    np.testing.assert_allclose(drawn, p.reshape(10, -1).sum(1), atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, weights, schedule: the numbers of the spec, 3(g)
# ---------------------------------------------------------------------------------------------------------------------


def test_expectile_loss():
    """(1): u = [2, -1]; at 0.5 it is half the squared error."""
    u = torch.tensor([2.0, -1.0])
    for expectile, loss in ((0.5, 1.25), (0.7, 1.55), (0.9, 1.85)):
        assert iql.expectile_loss(u, expectile).mean().item() == pytest.approx(loss, rel=1e-6)
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(iql.expectile_loss(u, 0.5), 0.5 * u**2)


@pytest.mark.parametrize("p, expectile, best", [(0.5, 0.7, 0.7), (0.1, 0.9, 0.5), (0.25, 0.9, 0.75)])
def test_expectile_of_a_coin(p, expectile, best):
    """(2): V fitted to 0/1 targets ends at tau p / (tau p + (1 - tau)(1 - p)), above the mean."""
    v = torch.linspace(0, 1, 1001, dtype=torch.float64)
    loss = p * iql.expectile_loss(1 - v, expectile) + (1 - p) * iql.expectile_loss(0 - v, expectile)
    assert v[loss.argmin()].item() == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("advantage, beta, weight", [(2, 3, 100), (0, 3, 1), (1, 3, 20.085537), (-1, 3, 0.049787068)])
def test_advantage_weight(advantage, beta, weight):
    """(3): exp(beta * advantage), never above 100."""
    agent = constant_agent(make_args(beta=beta, learning_rate=0.0), target_q=advantage + 5, value=5)
    metrics = iql.update(agent, make_batch(), make_args(beta=beta, learning_rate=0.0))
    assert metrics["value/advantage_weight"].item() == pytest.approx(weight, rel=1e-6)


def test_huge_advantages_stay_finite():
    args = make_args()
    agent = constant_agent(args, target_q=1e6)
    metrics = iql.update(agent, make_batch(), args)
    assert metrics["value/advantage_weight"].item() == pytest.approx(100, rel=1e-6)
    assert all(torch.isfinite(p).all() for p in agent.parameters())


def test_log_prob():
    """(4), and torch.distributions on random networks: mean tanh(net), one log_std per dimension in [-5, 2]."""
    agent = constant_agent(make_args())
    log_prob = agent.actor.log_prob(torch.zeros(1, 1, O), torch.tensor([[[0.5, -0.5]]]))
    assert log_prob.item() == pytest.approx(-2.087877, abs=1e-6)
    with torch.no_grad():
        agent.actor.log_std.fill_(-9)  # below the clamp
    log_prob = agent.actor.log_prob(torch.zeros(1, 1, O), torch.zeros(1, 1, A))
    assert log_prob.item() == pytest.approx(A * 4.081061, abs=1e-5)

    agent = make_agent(make_args(num_seeds=3), spread=0.5)
    with torch.no_grad():
        agent.actor.log_std[0, 0] = torch.tensor([-7.0, 4.0])
    obs, action = make_batch(S=3)[..., :O], make_batch(S=3)[..., O : O + A]
    mean = torch.zeros(3, 32, A)
    for s in range(3):
        x = obs[s]
        for i, (w, b) in enumerate(layers_of(agent.actor.net)):
            x = torch.addmm(b[s], x.relu() if i else x, w[s])
        mean[s] = x.tanh()
    std = agent.actor.log_std.detach().clamp(-5, 2).exp().expand_as(mean)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    # log-densities of thousands (std e^-5) carry float32's rounding of the mean
    torch.testing.assert_close(agent.actor.log_prob(obs, action), normal.log_prob(action), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(agent.actor.act(obs), mean)


def test_beta_0_is_behaviour_cloning():
    """(7): with beta = 0 the actor's loss is the plain negative log-likelihood, and nothing of Q gets into it."""
    args = make_args(beta=0.0)
    agent = make_agent(args, spread=0.5)
    batch = make_batch()
    nll = -agent.actor.log_prob(batch[..., :O], batch[..., O : O + A]).mean(-1)
    torch.testing.assert_close(iql.update(agent, batch, args)["loss/actor"], nll.detach())


def test_cosine_schedule_of_the_actor():
    """(5): what the actor's optimiser uses at updates 0, 250k, 500k, 1M; critics and V keep their step size."""
    args = make_args(num_updates=1_000_000)
    agent = make_agent(args)
    for n, lr in ((0, 3e-4), (250_000, 2.56066e-4), (500_000, 1.5e-4), (1_000_000, 0.0)):
        agent.num_updates.fill_(n)
        before = snapshot(agent)
        iql.update(agent, make_batch(seed=n), args)
        assert agent.num_updates == n + 1
        for name, expected in (("actor", lr), ("critic", 3e-4), ("value", 3e-4)):
            assert float(agent.optimizers[name].learning_rate) == pytest.approx(expected, rel=1e-5, abs=1e-12)
        for net in ("actor", "critic", "value"):
            moved = any(
                not torch.equal(x, before[name])
                for name, x in without_moments(agent.state_dict()).items()
                if net in name
            )
            assert moved == (lr > 0 or net != "actor")  # the optimiser really reads this lr
    assert float(iql.cosine(torch.tensor(1.7))) == 0  # past the end it stays at 0


# ---------------------------------------------------------------------------------------------------------------------
# Bellman targets
# ---------------------------------------------------------------------------------------------------------------------


def test_targets_bootstrap_through_truncation_only():
    """(6): y = r at a true end whatever V(s') is, y = r + gamma V(s') elsewhere. Q = 0, so the loss is 2 mean y^2."""
    args = make_args(learning_rate=0.0)
    batch = make_batch()
    for not_terminated, target in ((0.0, 1.5), (1.0, 1.5 + 0.99 * 7)):
        batch[..., O + A], batch[..., -1] = 1.5, not_terminated
        loss = iql.update(constant_agent(args, value=7.0), batch, args)["loss/critic"].item()
        assert loss == pytest.approx(2 * target**2, rel=1e-6)


@pytest.mark.parametrize("form", ["minari", "d4rl"])
def test_data_keeps_terminations_and_truncations_apart(form, tmp_path):
    """Each last step is in the data, with its own s'; only a terminated one carries the mask that stops bootstraps."""
    episodes = harness.hopper_episodes()  # odd ones end in a truncation, even ones in a terminal state
    if form == "minari":
        path = harness.write_minari(tmp_path / "data", episodes)
    else:
        path = harness.write_d4rl(tmp_path / "hopper.hdf5", episodes)
    dataset = iql.load_dataset([str(path)])
    last = np.cumsum(dataset.episode_lengths) - 1
    terminated = [bool(episode[3][-1]) for episode in episodes]
    assert len(set(terminated)) == 2 and sum(dataset.episode_lengths) == sum(len(e[2]) for e in episodes)
    assert dataset.transitions[last, -1].tolist() == [1.0 - t for t in terminated]
    assert np.all(np.delete(dataset.transitions[:, -1], last) == 1)
    np.testing.assert_array_equal(dataset.transitions[last, 15:26], [episode[0][-1] for episode in episodes])


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
    """Gradients [(dW, db), ...] from the gradient at the output."""
    grads = []
    for (w, _), x in zip(reversed(layers), reversed(inputs)):
        grads.append((x.T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ w.T) * (x > 0)
    return grads[::-1]


class NumpyIQL:
    """One seed of IQL in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.t, self.moments = args, 0, {}
        self.value, self.actor = layers(agent.value), layers(agent.actor.net)
        self.critics = [layers(agent.critic, c) for c in range(2)]
        self.targets = [layers(agent.target_critic, c) for c in range(2)]
        self.log_std = agent.actor.log_std[s].detach().numpy().copy()

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

    def update(self, batch):
        args, B = self.args, len(batch)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        sa = np.concatenate([s, a], 1)
        actor_lr = args.learning_rate * 0.5 * (1 + np.cos(np.pi * self.t / args.num_updates))
        self.t += 1

        target_q = np.minimum(*(forward(layers, sa)[0] for layers in self.targets))
        v, inputs = forward(self.value, s)
        u = target_q - v
        loss_weight = np.where(u < 0, 1 - args.expectile, args.expectile)
        value_loss = np.mean(loss_weight * u**2)
        grads = backward(self.value, inputs, -2 * loss_weight * u / B)
        self.value = self.step("value", self.value, grads, args.learning_rate)

        advantage = target_q - forward(self.value, s)[0]
        self.exponent = args.beta * advantage
        weight = np.minimum(np.exp(np.minimum(self.exponent, 700)), 100)
        out, inputs = forward(self.actor, s)
        mean, std = np.tanh(out), np.exp(self.log_std)
        z = (a - mean) / std
        log_prob = np.sum(-0.5 * z**2 - self.log_std - 0.5 * np.log(2 * np.pi), 1, keepdims=True)
        actor_loss = -np.mean(weight * log_prob)
        grad_log_std = -np.sum(weight * (z**2 - 1), 0, keepdims=True) / B
        grads = backward(self.actor, inputs, -weight * z / std * (1 - mean**2) / B)
        self.actor = self.step("actor", self.actor, grads, actor_lr)
        self.log_std = self.adam("log_std", self.log_std, grad_log_std, actor_lr)

        y = r + args.gamma * mask * forward(self.value, s_next)[0]
        critic_loss = 0
        for c in range(2):
            q, inputs = forward(self.critics[c], sa)
            critic_loss += np.mean((q - y) ** 2)
            grads = backward(self.critics[c], inputs, 2 * (q - y) / B)
            self.critics[c] = self.step(("critic", c), self.critics[c], grads, args.learning_rate)
        self.targets = [
            [
                tuple((1 - args.polyak) * old + args.polyak * new for old, new in zip(*pair))
                for pair in zip(target, critic)
            ]
            for target, critic in zip(self.targets, self.critics)
        ]
        self.u = u
        return value_loss, actor_loss, critic_loss


def test_update_against_numpy():
    """Three updates of two seeds, in float64, with steps large enough that every question of order shows."""
    args = make_args(num_seeds=2, learning_rate=0.02, polyak=0.3, num_updates=5, gamma=0.9, expectile=0.8)
    agent = make_agent(args, spread=0.7).double()
    references = [NumpyIQL(agent, s, args) for s in range(2)]
    errors, exponents = [], []
    for n in range(3):
        batch = make_batch(S=2, seed=n).double()
        metrics = iql.update(agent, batch, args)
        for s, reference in enumerate(references):
            losses = reference.update(batch[s].numpy())
            ours = [metrics[f"loss/{name}"][s].item() for name in ("value", "actor", "critic")]
            np.testing.assert_allclose(ours, losses, rtol=1e-7)
            errors, exponents = [*errors, *reference.u], [*exponents, *reference.exponent]
    assert min(errors) < 0 < max(errors) and min(map(abs, exponents)) < 2  # every branch is taken: both signs
    assert max(exponents) > math.log(100)  # of the value's error, weights at the cap and below it
    for s, reference in enumerate(references):
        np.testing.assert_allclose(agent.actor.log_std[s].detach().numpy(), reference.log_std, atol=1e-7)
        nets = [(agent.value, (), reference.value), (agent.actor.net, (), reference.actor)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(2)]
        nets += [(agent.target_critic, (c,), reference.targets[c]) for c in range(2)]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-7)


def test_polyak():
    """Targets move to (1 - polyak) target + polyak critic, with the critic as the update leaves it."""
    for polyak in (0.0, 0.005, 0.25, 1.0):
        args = make_args(polyak=polyak, learning_rate=0.01)
        agent = make_agent(args, spread=0.5)
        before = snapshot(agent)
        iql.update(agent, make_batch(), args)
        after = agent.state_dict()
        for name in (name for name in before if name.startswith("target_critic")):
            online = after[name.removeprefix("target_")]
            assert not torch.equal(online, before[name.removeprefix("target_")])
            expected = (1 - polyak) * before[name].double() + polyak * online.double()
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
            if polyak == 0:
                assert torch.equal(after[name], before[name])


def test_each_optimiser_owns_one_network():
    """The target critics are in no optimiser, and no parameter is in two; targets start as the critics."""
    agent = make_agent(make_args(num_seeds=2))
    owned = {name: set(map(id, o.params)) for name, o in agent.optimizers.items()}
    for name, ids in owned.items():
        assert ids == {id(p) for p in getattr(agent, name).parameters()}
    assert sum(map(len, owned.values())) == len(set().union(*owned.values()))
    targets = list(agent.target_critic.parameters())
    assert not {id(p) for p in targets} & set().union(*owned.values())
    assert not any(p.requires_grad for p in targets)
    for target, online in zip(targets, agent.critic.parameters()):
        assert torch.equal(target, online) and target.data_ptr() != online.data_ptr()


def test_losses_leave_other_networks_alone():
    """After an update each network's gradient is that of its own loss alone: no loss leaks into another network."""
    args = make_args()
    agent = make_agent(args, spread=0.5)
    gradients = {}

    class Recorder:
        """Stands in for an optimiser: notes which networks its loss depends on, and steps nothing."""

        def __init__(self, name, optimizer):
            self.name, self.learning_rate = name, optimizer.learning_rate

        def minimize(self, loss):
            loss.backward()
            gradients[self.name] = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
            agent.zero_grad()

    recorders = {name: Recorder(name, optimizer) for name, optimizer in agent.optimizers.items()}
    del agent.optimizers
    agent.optimizers = recorders
    iql.update(agent, make_batch(), args)
    assert gradients == {"value": {"value"}, "actor": {"actor"}, "critic": {"critic"}}
    assert list(gradients) == ["value", "actor", "critic"]  # the order of the authors' code


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args = make_args(num_seeds=2, learning_rate=0.01)
    states = []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(5):
            batch = make_batch(S=2, seed=n)
            batch[1] *= factor
            iql.update(agent, batch, args)
        states.append(snapshot(agent))
    for name in states[0]:
        if name != "num_updates":
            assert torch.equal(states[0][name][0], states[1][name][0]), name
            assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_five_is_the_run_with_seed_k(run_main, monkeypatch, tmp_path):
    """Through main(): the same first weights, the same batches, and the same agents after 50 updates."""
    folder, update, runs = harness.write_minari(tmp_path / "data", harness.hopper_episodes()), iql.update, {}

    def recorder(agent, batch, args):
        record = runs.setdefault((args.seed, args.num_seeds), {"batches": [], "first": snapshot(agent)})
        record["batches"].append(batch.clone())
        return update(agent, batch, args)

    monkeypatch.setattr(iql, "update", recorder)
    flags = "--eval-episodes", 0, "--num-updates", 50, "--batch-size", 16, "--hidden-sizes", 32, 32, "--device", "cpu"
    for seed, num_seeds in ((3, 5), (3, 1), (5, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        run_main("--dataset", folder, *flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir)
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        assert checkpoint["num_updates"] == 50
        runs[seed, num_seeds] |= {
            "last": without_moments(checkpoint["agent"]),
            "batches": torch.stack(runs[seed, num_seeds]["batches"]),
        }
    five = runs[3, 5]
    assert five["batches"].shape[:3] == (50, 5, 16)
    for k in (0, 2, 4):
        alone = runs[3 + k, 1]
        assert torch.equal(five["batches"][:, k], alone["batches"][:, 0])
        for name in five["first"]:
            if name != "num_updates":
                assert torch.equal(five["first"][name][k], alone["first"][name][0]), name
                torch.testing.assert_close(five["last"][name][k], alone["last"][name][0], rtol=1e-4, atol=1e-5)
    name = next(name for name in five["first"] if name.startswith("actor.net") and "weight" in name)
    first, moved = five["first"][name], five["last"][name]
    for i, k in itertools.combinations(range(5), 2):  # and the five are five different agents
        assert not torch.equal(five["batches"][:, i], five["batches"][:, k]) and not torch.allclose(first[i], first[k])
    assert (moved - first).abs().max() > 1e-3  # they have learned something that could differ


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and scores
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, mode, expected",
    [
        ("Hopper-v5", "auto", "scale"),
        ("HalfCheetah-v5", "auto", "scale"),
        ("Walker2d-v5", "auto", "scale"),
        ("AntMaze_UMaze-v4", "auto", "shift"),
        ("PointMaze_UMaze-v3", "auto", "shift"),
        ("AdroitHandPen-v1", "auto", "none"),
        ("FrankaKitchen-v1", "auto", "none"),
        (None, "auto", "none"),
        ("Hopper-v5", "none", "none"),
        ("Hopper-v5", "shift", "shift"),
        ("FrankaKitchen-v1", "scale", "scale"),
    ],
)
def test_reward_transforms(env_id, mode, expected):
    """What the learner sees; the returns that ReD ranks by stay as logged, and so does everything but the reward."""
    returns, lengths = np.array([-20.0, 1000.0, 3200.0]), np.array([2, 3, 5])
    dataset = make_dataset(returns, lengths, env_id=env_id)
    before = dataset.transitions.copy()
    iql.transform_rewards(dataset, mode, iql.IQL_TRANSFORMS)
    reward = {"scale": before[:, 2] * 0.310559, "shift": before[:, 2] - 1, "none": before[:, 2]}[expected]
    np.testing.assert_allclose(dataset.transitions[:, 2], reward, rtol=2e-6)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(dataset.transitions[:, others], before[:, others])
    np.testing.assert_array_equal(dataset.episode_returns, returns)


def test_reward_scale_without_a_span():
    dataset = make_dataset(np.full(3, 60.0), env_id="Hopper-v5")
    before = dataset.transitions.copy()
    iql.transform_rewards(dataset, "auto", iql.IQL_TRANSFORMS)
    np.testing.assert_array_equal(dataset.transitions, before)


def test_the_learner_sees_transformed_rewards_and_the_sampler_logged_ones(run_main, monkeypatch, tmp_path):
    """Through main(): batches carry scaled rewards; probabilities are those of the returns as logged."""
    episodes = harness.hopper_episodes()
    folder, update, seen = harness.write_minari(tmp_path / "data", episodes), iql.update, {}
    monkeypatch.setattr(
        iql, "update", lambda agent, batch, args: seen.update(batch=batch) or update(agent, batch, args)
    )
    original = iql.Sampler.__init__
    monkeypatch.setattr(
        iql.Sampler, "__init__", lambda self, p, device: seen.update(p=p.copy()) or original(self, p, device)
    )
    flags = (
        "--eval-episodes",
        0,
        "--num-updates",
        2,
        "--hidden-sizes",
        8,
        "--device",
        "cpu",
        "--run-dir",
        tmp_path / "r",
    )
    run_main("--dataset", folder, *flags, "--sampler", "red", "--reward-transform", "auto")
    returns = np.array([episode[2].sum() for episode in episodes])
    lengths = np.array([len(episode[2]) for episode in episodes])
    w = np.repeat((returns - returns.min()) / np.ptp(returns), lengths)
    np.testing.assert_allclose(seen["p"], w / w.sum(), rtol=1e-6)
    logged = {tuple(o): r for e in episodes for o, r in zip(e[0], e[2])}
    obs, reward = seen["batch"][0, :, :11].numpy(), seen["batch"][0, :, 14].numpy()
    np.testing.assert_allclose(reward, [logged[tuple(o)] * 1000 / np.ptp(returns) for o in obs], rtol=1e-5)
    assert json.loads((tmp_path / "r" / "config.json").read_text())["args"]["sampler"] == "red"


def test_normalized_scores():
    """Spec 1.10: the score of a return of 1000, with D4RL's references."""
    for name, score in (
        ("HalfCheetah", 10.3114),
        ("Hopper", 31.3489),
        ("Walker2d", 21.7478),
        ("AdroitHandPen", 30.3209),
    ):
        assert iql.normalized_score(1000, iql.D4RL_REFERENCES[name]) == pytest.approx(score, abs=1e-4)
    assert math.isnan(iql.normalized_score(1000, None))


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a chain where most of the data quits early, and quitting pays at once
# ---------------------------------------------------------------------------------------------------------------------

STATES, QUIT, GO, GOAL = 4, 0.5, -0.1, 5.0


def chain_transitions(num_episodes=1500, go_share=0.3, seed=0):
    """Logged episodes: an action above 0 goes on (a small cost, 5 at the end), one below 0 quits with 0.5 at once.

    Four of five actions quit. What follows a quit looks like the best state, so a bootstrap through it would show.
    Returns packed transitions (N, 4 + 1 + 1 + 4 + 1) and the average return of the log.
    """
    rng, eye, rows, returns = np.random.default_rng(seed), np.eye(STATES), [], []
    for _ in range(num_episodes):
        state, over, total = rng.integers(STATES), False, 0.0
        while not over:
            go = rng.random() < go_share
            action = np.clip((0.5 if go else -0.5) + 0.1 * rng.normal(), -1, 1)
            last = state == STATES - 1
            reward, over = (GOAL if last else GO) if go else QUIT, last or not go
            next_state = STATES - 1 if over else state + 1
            rows.append(np.concatenate([eye[state], [action, reward], eye[next_state], [1 - over]]))
            state, total = next_state, total + reward
        returns.append(total)
    return torch.tensor(np.array(rows), dtype=torch.float32), np.mean(returns)


def chain_returns(actor, S):
    """Return of each seed's deterministic policy from the first state, by the rules of the chain."""
    actions, returns = actor.act(torch.eye(STATES).expand(S, STATES, STATES))[..., 0], []
    for s in range(S):
        total = 0.0
        for state in range(STATES):
            if actions[s, state] <= 0:
                total += QUIT
                break
            total += GOAL if state == STATES - 1 else GO
        returns.append(total)
    return np.array(returns)


def learn_chain(module=iql, **flags):
    """Returns of three seeds after 600 updates on the chain's log, and the log's average return."""
    args = module.Args(
        **{
            "hidden_sizes": (32, 32),
            "num_seeds": 3,
            "learning_rate": 3e-3,
            "polyak": 0.05,
            "expectile": 0.9,
            "num_updates": 600,
            "batch_size": 128,
            **flags,
        }
    )
    transitions, average = chain_transitions()
    agent = module.IQLAgent(STATES, 1, args, torch.device("cpu"))
    sampler = module.Sampler(np.full(len(transitions), 1 / len(transitions)), "cpu")
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.num_updates):
        u = torch.rand(3, args.batch_size, dtype=torch.float64, generator=generator)
        module.update(agent, transitions[sampler(u)], args)
    return chain_returns(agent.actor, 3), average


def test_iql_learns_the_chain():
    """IQL goes on to the end, in every seed; behaviour cloning on the same data quits, as most of the data does."""
    best = GO * (STATES - 1) + GOAL
    returns, average = learn_chain()
    cloned, _ = learn_chain(beta=0.0)
    assert np.all(returns == pytest.approx(best)), returns
    assert returns.min() > average + 2 and returns.min() > cloned.max() + 2, (returns, average, cloned)


@pytest.mark.parametrize("wrong", [{"beta": -3.0}, {"gamma": 0.0}], ids=["flipped advantage", "one-step rewards"])
def test_the_chain_is_a_test(wrong):
    """A flipped advantage fails on the chain; so does a learner that sees no further than the next reward."""
    returns, _ = learn_chain(**wrong)
    assert returns.max() <= QUIT, returns


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_updates_equal_eager_ones():
    """A CUDA graph of ten updates, replayed twice, gives what twenty eager updates give; capturing leaves no trace."""
    args = make_args(num_seeds=2, num_updates=100, learning_rate=1e-3)
    device = torch.device("cuda")
    transitions = make_batch(S=1, B=500, seed=1)[0].to(device)
    blocks = torch.randint(500, (2, 10, 2, 32), generator=torch.Generator().manual_seed(2)).to(device)
    agents = [make_agent(args, device="cuda") for _ in range(2)]

    learn = [functools.partial(iql.run_updates, agent, transitions, args) for agent in agents]
    first = snapshot(agents[0])
    replay = iql.cuda_graph(learn[0], agents[0], torch.zeros_like(blocks[0]))
    for name, x in agents[0].state_dict().items():
        assert torch.equal(x, first[name]), name
    for block in blocks:
        captured = replay(block)
        eager = learn[1](block)
    assert agents[0].num_updates == agents[1].num_updates == 20
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-6)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-4, atol=1e-5)
