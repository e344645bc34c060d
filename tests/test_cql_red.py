"""The mathematics of cql_red.py against what shares no code with it: numbers worked by hand,
torch.distributions, and whole updates in float64."""

import itertools
import math

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, check_updates, copies, forward, randomize
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

cql = harness.load("cql_red")

OBS_DIM, ACTION_DIM = 4, 2
N = 3  # num_action_samples
OBS = np.random.default_rng(1).normal([0, 0.5, -1, 0], [1, 1.5, 0.5, 1], (200, OBS_DIM))  # the data's


def make_args(**flags):
    small = {"hidden_sizes": (16, 16), "num_action_samples": N, "batch_size": 32, "device": "cpu"}
    return cql.Args(**{**small, **flags})


def make_agent(args, size=0.0, action_dim=ACTION_DIM):
    """An agent whose parameters are random numbers of this size."""
    agent = cql.Agent(OBS, action_dim, args)
    randomize(agent, size)
    return agent


def make_batch(args, seed=0, action_dim=ACTION_DIM):
    """Random obs, action, reward, next_obs, not_terminated and noise."""
    rng = np.random.default_rng(seed)
    S, B = args.num_seeds, args.batch_size
    obs, next_obs = rng.choice(OBS, (2, S, B))
    action = rng.uniform(-1, 1, (S, B, action_dim))
    reward = rng.normal(size=(S, B))
    not_terminated = rng.random((S, B)) > 0.25
    noise = rng.normal(size=(S, 3 * args.num_action_samples + 2, B, action_dim))
    return [torch.from_numpy(np.float32(x)) for x in (obs, action, reward, next_obs, not_terminated, noise)]


# Networks -------------------------------------------------------------------------------------
def test_first_weights():
    """Hidden layers have variance 1 / in, cut at two deviations of the uncut normal, last layers are uniform in
    +-0.0108; no two networks are alike."""
    agent = cql.Agent(OBS, ACTION_DIM, make_args(hidden_sizes=(256, 256), num_seeds=3))
    for net in (agent.actor.net, agent.critic):
        for weight in net.weights[:-1]:
            std = weight.shape[1] ** -0.5
            assert weight.std().item() == pytest.approx(std, rel=0.03)
            assert 2.2 * std < weight.abs().max().item() < 2.28 * std
        assert 0.0105 < net.weights[-1].abs().max() <= 0.010826
        assert net.weights[-1].std().item() == pytest.approx(0.00625, rel=0.1)
        for one, other in itertools.chain(*(itertools.combinations(weight, 2) for weight in net.weights)):
            assert not one.isclose(other).all()
        assert not any(bias.any() for bias in net.biases)
    scalars = agent.actor.log_std_scale, agent.actor.log_std_shift, agent.log_alpha
    assert [x.unique().item() for x in scalars] == [1, -1, 0]


@pytest.mark.parametrize("K, hidden", [(1, (16, 16)), (5, (16, 16)), (3, (8,)), (2, (8, 12, 16)), (4, ())])
def test_many_actions_at_once_are_one_after_the_other(K, hidden):
    """Values and all gradients are those of plain networks on [s, a], action by action."""
    args = make_args(num_seeds=2, hidden_sizes=hidden)
    critic = make_agent(args, size=0.5).critic.double()
    obs = make_batch(args)[0].double()
    actions = torch.randn(2, K, 32, ACTION_DIM, dtype=torch.float64).requires_grad_()
    expected = []
    for s in range(2):
        layers = [x.chunk(2)[s] for x in critic.parameters()]
        expected.append(torch.stack([forward(layers, torch.cat([obs[s], a], 1))[..., 0] for a in actions[s]], 1))
    expected = torch.stack(expected)  # (S, C, K, B)
    q = critic(obs, actions)
    torch.testing.assert_close(q, expected)
    weight = torch.randn(q.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, [actions, *critic.parameters()], weight) for x in (q, expected)]
    torch.testing.assert_close(*gradients)


def test_policy_by_hand():
    """log pi(0.5) with log std -1; and log pi(1), in float32, where log(1 - tanh^2) of x is 2 log 2 - 2 |x|."""
    actor = make_agent(make_args(), action_dim=1).actor
    actor.log_std_shift.data -= 1
    for mean, x, log_prob in ((0, math.atanh(0.5), -0.746033), (30, 30, 58.694767)):
        actor.net.biases[-1].data[..., 0] = mean
        noise = torch.full((1, 1, 1, 1), (x - mean) * math.e)
        found = actor.sample(torch.zeros(1, 1, OBS_DIM), noise)
        assert [y.item() for y in found] == pytest.approx([math.tanh(x), log_prob], rel=1e-5)


# The update ---------------------------------------------------------------------------------------
class Reference(Learner):
    """One seed of CQL, written from the equations, one action at a time, with Adam by hand."""

    def __init__(self, agent, s, args, eps):
        super().__init__(agent, s, args, eps)
        self.nets["log_alpha"] = [agent.log_alpha.detach()[s].clone().requires_grad_()]

    def assert_same(self, agent, s, atol):
        for name in ("actor", "critic", "target_critic"):
            torch.testing.assert_close(copies(getattr(agent, name), s, 2), self.nets[name], rtol=0, atol=atol)
        torch.testing.assert_close(agent.log_alpha[s], self.nets["log_alpha"][0], rtol=0, atol=atol)

    def rate(self, name):
        return self.args.learning_rate if name == "critic" else self.args.policy_learning_rate

    def sample(self, obs, noise):
        """Actions and their log-probabilities, a pair for each row of noise."""
        scale, shift, *layers = self.nets["actor"]
        mean, raw = forward(layers, obs)[0].chunk(2, 1)
        log_std = scale[0] * raw + shift[0]
        clamped = (log_std < -20) | (log_std > 2)
        assert 0 < clamped.sum() < clamped.numel()
        normal = Independent(Normal(mean, log_std.clamp(-20, 2).exp()), 1)
        for row in noise:
            tanh = TanhTransform(cache_size=1)  # inverts by memory, not by atanh
            action = tanh(mean + normal.stddev * row)
            yield action, TransformedDistribution(normal, [tanh]).log_prob(action)

    def q(self, obs, action, name="critic"):
        return forward(self.nets[name], obs, action).squeeze(2)  # (C, B)

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        """What the script logs of this seed."""
        args = self.args
        if args.normalize_obs:
            mean, std = torch.from_numpy(np.float32([OBS.mean(0), OBS.std(0) + 0.001])).double()
            obs, next_obs = (obs - mean) / std, (next_obs - mean) / std
        random_noise, noise, next_noise = noise.split([N, 1 + N, 1 + N])
        (policy_action, log_prob), *samples = self.sample(obs, noise)
        (next_action, _), *next_samples = self.sample(next_obs, next_noise)

        log_alpha = self.nets["log_alpha"][0]
        alpha = log_alpha.exp().detach()
        alpha_loss = -torch.mean(log_alpha * (log_prob.detach() - ACTION_DIM))
        policy_q = self.q(obs, policy_action)
        actor_loss = torch.mean(alpha * log_prob - torch.minimum(*policy_q))

        next_q = torch.minimum(*self.q(next_obs, next_action, "target_critic"))
        backup = (reward + args.gamma * not_terminated * next_q).detach()
        logged_q = self.q(obs, action)
        bellman_error = torch.mean((backup - logged_q) ** 2, 1).sum()
        log_uniform = torch.full((len(obs),), -ACTION_DIM * math.log(2))
        uniform = [(2 * Normal(0, 1).cdf(row) - 1, log_uniform) for row in random_noise]
        sampled_q = []
        soft_sum = torch.exp(logged_q / args.cql_temperature) * (not args.importance_sampling)
        for sampled, log_density in uniform + samples + next_samples:
            q = self.q(obs, sampled.detach())
            sampled_q.append(q)
            if args.importance_sampling:
                q = q - log_density.detach()
            soft_sum = soft_sum + torch.exp(q / args.cql_temperature)
        penalty = torch.mean(args.cql_temperature * soft_sum.log() - logged_q, 1).sum()

        self.minimize(log_alpha=alpha_loss, actor=actor_loss, critic=bellman_error + args.cql_alpha * penalty)
        self.move_targets("critic")

        assert 0 < (policy_q[0] < policy_q[1]).sum() < len(obs)  # either critic is the smaller one somewhere
        logged = {"loss/actor": actor_loss, "loss/bellman_error": bellman_error, "loss/conservative_penalty": penalty}
        logged |= {"value/q": logged_q, "policy/entropy": -log_prob, "policy/alpha": alpha}
        logged["value/q_random"] = torch.stack(sampled_q[:N])
        return {name: x.mean().item() for name, x in logged.items()}


@pytest.mark.parametrize("eps", [1e-8, 1.0])
@pytest.mark.parametrize("importance, temperature, normalize", [(True, 1, False), (False, 0.5, False), (True, 2, True)])
def test_updates_against_float64(importance, temperature, normalize, eps):
    """Three updates of two seeds, which do not mix: logs and all parameters. With 1 for Adam's eps, its steps tell
    a mean from a sum too."""
    rates = {"learning_rate": 0.015, "policy_learning_rate": 0.03, "target_update_rate": 0.3, "gamma": 0.9}
    flags = {"importance_sampling": importance, "cql_temperature": temperature, "normalize_obs": normalize}
    args = make_args(num_seeds=2, **rates, **flags)
    agent = make_agent(args, size=0.4).double()
    agent.actor.log_std_scale.data[:, 0, 0] = torch.tensor([3.0, -3.0])
    agent.actor.log_std_shift.data[:, 0, 0] = torch.tensor([-20.0, 2.0])  # the bounds of log std
    adams_with(agent, eps)
    references = [Reference(agent, s, args, eps) for s in range(2)]
    batches = [[column.double() for column in make_batch(args, seed=seed)] for seed in range(3)]
    check_updates(cql, agent, references, batches, args)


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, low, high",
    [("--cql-alpha 1", 0.1, 0.45), ("--cql-alpha 1 --gamma 0", -1, 0), ("--cql-alpha 0", 0.48, 1)],
)
def test_a_game_of_three_states(flags, low, high):
    """Logged actions are around 0, which is what cloning finds. In the first state a larger one costs more at once,
    but leads to the better of two states. CQL pays for it, and stays among logged actions (5 % are above 0.49)."""
    rng = np.random.default_rng(0)
    state = rng.choice(3, p=[0.5, 0.25, 0.25], size=4000)
    a = (0.3 * rng.normal(size=4000)).clip(-0.999, 0.999)
    reward = np.select([state == 0, state == 1], [-a, 4 - 4 * (a - 0.3) ** 2], -4 * (a + 0.3) ** 2)
    good = rng.random(4000) < 1 / (1 + np.exp(-8 * a))
    next_state = np.where((state > 0) | good, 1, 2)  # ends look like the best state, lest anyone bootstrap
    columns = np.eye(3)[state], a[:, None], reward, np.eye(3)[next_state], state > 0
    data = cql.Data(*columns, np.array([0.0, 1.0]), np.array([2000, 2000]), None, (math.nan, math.nan))
    small = "--hidden-sizes 32 32 --num-seeds 3 --batch-size 64 --learning-rate 3e-3 --policy-learning-rate 3e-3"
    small += " --target-update-rate 0.05 --num-action-samples 3 --num-updates 300 --sampler uniform --normalize-obs"
    _, policy = harness.run_on("cql_red", data, *small.split(), *flags.split())
    action = policy(torch.eye(3).expand(3, 3, 3))[..., 0]  # (S, states), of observations as logged
    assert ((action[:, 0] > low) & (action[:, 0] < high)).all(), action
    if flags == "--cql-alpha 1":
        assert (action[:, 1] > 0.05).all() and (action[:, 2] < -0.05).all(), action
