"""The mathematics of iql_red.py against what shares no code with it: numbers worked by hand,
torch.distributions, and whole updates in float64."""

import itertools
import math
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from reference import IQL, adams_with, check_updates, random_batch, randomize

iql = harness.load("iql_red")

OBS_DIM = 4
ACTION_DIM = 2
RETURN_OF = np.repeat([0, 5, 10], [2, 3, 5])  # the worked example: of ten transitions in three episodes


def make_args(**flags):
    return iql.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.0, target_q=0.0, value=0.0):
    """An agent of random numbers of this size; without size, networks give these numbers for any input."""
    agent = iql.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    agent.target_critic.biases[-1].data += target_q
    agent.value.biases[-1].data += value
    return agent


def make_batch(S=1, B=32, seed=0, dtype=torch.float32):
    """Random obs, action, reward, next_obs, not_terminated."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, 0, seed, dtype)[:-1]


def make_data(lengths=(2, 3, 5), returns=(0, 5, 10)):
    """Transitions whose rewards count them."""
    columns = [x[0].numpy() for x in make_batch(B=sum(lengths))]
    columns[2] = np.arange(sum(lengths))
    return iql.Data(*columns, np.array(returns, np.float64), np.array(lengths), None, (math.nan, math.nan))


# Probabilities and draws --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sampler, alpha, p_base, weights",
    [
        ("uniform", 2, 0.5, np.ones(10)),
        ("red", 1, 0, RETURN_OF),
        ("red", 1, 0.2, RETURN_OF + 2),
        ("red", 2, 0, RETURN_OF**2),
        ("red", 0, 0, np.ones(10)),
        ("red", 1e300, 5, RETURN_OF == 10),  # nothing overflows
        ("reward", 1, 0, np.arange(10)),
        ("reward", 2, 0, np.arange(10) ** 2),
        ("reward", 1, 1, np.arange(10) + 9),
    ],
)
def test_samplers(sampler, alpha, p_base, weights):
    """Their P(i), and a million draws that follow it."""
    P = iql.sampling_probabilities(make_data(), make_args(sampler=sampler, red_alpha=alpha, p_base=p_base))
    np.testing.assert_allclose(P, weights / weights.sum(), rtol=1e-12)
    drawn = iql.Sampler(P, "cpu").draw([0, 1], 0, 500_000 // iql.CHUNK)
    share = np.bincount(drawn.flatten(), minlength=10) / 1e6
    assert np.all(np.abs(share - P) <= 5 * np.sqrt(P * (1 - P) / 1e6))  # 5 sigma, and none where P = 0


def test_top10():
    """The tenth is one of transitions, not of episodes: it reaches into the third best of these."""
    data = make_data([460, 20, 460, 60], [1, 9, 2, 8])
    P = iql.sampling_probabilities(data, make_args(sampler="top10"))
    np.testing.assert_allclose(P, np.repeat([0, 1 / 540, 1 / 540, 1 / 540], data.lengths), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0, 1, 5])
def test_returns_that_are_equal_up_to_rounding(alpha):
    for equal in ([3.0], [0.0, 0.0], [-2.5] * 4, [0.1 + 0.2, 0.3], [1e9, 1e9 + 1e-6]):
        np.testing.assert_allclose(iql.red_probabilities(np.array(equal), alpha, 0), 1 / len(equal))
    for different in ([0.0, 1e-12], [1000.0, 1000.001], [-1e15, -1e12]):
        assert iql.red_probabilities(np.array(different), 1, 0).tolist() == [0, 1]


def test_draws_among_a_million_are_exact(monkeypatch):
    """Each tenth of the transitions gets its share, which a cumulative sum in float32 misses by percents;
    none of P = 0 is drawn, though the first random number is 0."""
    grid = np.arange(1_000_000) / 1_000_000
    generator = SimpleNamespace(random=lambda size: grid.reshape(size))
    monkeypatch.setattr(np.random, "default_rng", lambda entropy: generator)
    P = np.linspace(0, 2, 1_000_000) / 1_000_000
    drawn = iql.Sampler(P, "cpu").draw([0], 0, 1_000_000 // iql.CHUNK).flatten().numpy()
    shares = np.bincount(drawn // 100_000, minlength=10) / 1_000_000
    np.testing.assert_allclose(shares, P.reshape(10, -1).sum(1), atol=2e-6)
    assert P[drawn].min() > 0


# Networks -----------------------------------------------------------------------------------------
def test_first_weights():
    """Orthogonal with gain sqrt(2), no two alike."""
    agent = iql.Agent(OBS_DIM, ACTION_DIM, make_args(num_seeds=3))
    weights = [*agent.actor.net.weights, *agent.value.weights, *agent.critic.weights]
    for weight in itertools.chain(*weights):
        square = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(square, 2 * torch.eye(len(square)), rtol=0, atol=1e-5)
        assert sum(x.shape == weight.shape and x.allclose(weight) for x in itertools.chain(*weights)) == 1
    assert not any(x.any() for name, x in agent.named_parameters() if "weights" not in name)


def test_dropout_is_for_the_actor_in_training():
    """Units that stay make up for those that go; evaluations, V and the critics have no dropout."""
    agent = make_agent(make_args(dropout=0.25, hidden_sizes=(1000,)))
    for net in (agent.actor.net, agent.value, agent.critic):
        net.biases[0].data += 1  # all units are on, and each adds 1 / 1000
        net.weights[1].data += 1 / 1000
    obs, action, *_ = make_batch(B=500)
    out = agent.actor.net(obs)[..., 0]
    assert out.mean().item() == pytest.approx(1, abs=0.005)
    assert out.var().item() == pytest.approx(0.25 / 0.75 / 1000, rel=0.4)
    for out in (agent.value(obs), agent.critic(torch.cat([obs, action], -1)), agent.eval().actor.net(obs)):
        torch.testing.assert_close(out, torch.ones_like(out))


# The update ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("p, expectile, best", [(0.5, 0.7, 0.7), (0.1, 0.9, 0.5), (0.25, 0.9, 0.75)])
def test_value_is_the_expectile_of_a_coin(p, expectile, best):
    """min Q is 1 in a share p of the batch, else 0. V rises below its expectile and falls above it."""
    args = make_args(expectile=expectile, hidden_sizes=())
    obs, action, *rest = make_batch(B=100)
    action[..., 0] = torch.arange(100) < 100 * p
    for value, step in ((best - 0.01, 3e-4), (best + 0.01, -3e-4)):
        agent = make_agent(args, value=value)
        agent.target_critic.weights[0].data[:, OBS_DIM] = 1  # Q(s, a) is the action's first number,
        agent.target_critic.biases[0].data[1] = 0.5  # and one half more in the second critic
        iql.update(agent, obs, action, *rest, args)
        assert agent.value.biases[0].item() - value == pytest.approx(step, rel=1e-3)


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: what is logged, and all parameters; weights beyond their cap."""
    exact = {"learning_rate": 2**-5, "target_update_rate": 0.25, "expectile": 0.75}  # also in float32
    args = make_args(num_seeds=2, beta=8, **exact)
    agent = make_agent(args, size=0.7).double()
    agent.actor.log_std.data[0, 0] = torch.tensor([-7.0, 4.0])  # to be kept within [-5, 2]
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [IQL(agent, s, args) for s in range(2)]
    batches = [make_batch(S=2, seed=seed, dtype=torch.float64) for seed in range(3)]
    check_updates(iql, agent, references, batches, args)
    assert all(x.weight.min() < 1 < 100 == x.weight.max() for x in references)
