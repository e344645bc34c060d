"""The mathematics of iql_scaled.py against what shares no code with it: numpy, numbers worked by hand, whole updates
in float64. The networks are those of asac.py, td3_bc_scaled.py and awac.py too."""

import math

import harness
import numpy as np
import pytest
import torch
from reference import Scaled, adams_with, check_updates, forward, random_batch, randomize

iql = harness.load("iql_scaled")

OBS_DIM = 4
ACTION_DIM = 2
LENGTHS = np.array([2, 3, 5])  # the worked example: three episodes, ten transitions
RETURNS = np.array([0.0, 5.0, 10.0])
MODERN = {"architecture": "modern", "hidden_sizes": (16,) * 5}


def make_args(**flags):
    return iql.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.5):
    """An agent of random numbers of this size."""
    agent = iql.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, seed=0, dtype=torch.float32):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, (S, B, ACTION_DIM), seed, dtype)


def make_data(lengths=LENGTHS, returns=RETURNS, obs=None):
    """Transitions numbered by their rewards and by the first number of their observations."""
    columns = [x[0].numpy() for x in make_batch(B=sum(lengths))]
    columns[2] = columns[0][:, 0] = np.arange(sum(lengths))
    columns[4] = columns[4] < 1
    if obs is not None:
        columns[0] = obs
    return iql.Data(*columns[:5], np.array(returns, np.float64), np.array(lengths), None, (math.nan, math.nan))


@pytest.mark.parametrize(
    "sampler, temperature, mean",
    [("uniform", 0.1, 6.5), ("red", 0.1, 8.846154), ("rw", 0.1, 9.979687), ("rw", 1, 7.822001), ("rw", 1e-5, 10)],
)
def test_mean_return_of_draws(sampler, temperature, mean):
    """The worked example; the unit of returns does not matter, nor do temperatures overflow."""
    args = make_args(sampler=sampler, temperature=temperature)
    for returns in (RETURNS, 7 * RETURNS - 100):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            P = iql.trajectory_probabilities(make_data(returns=returns), args)
        assert P.dtype == np.float64 and P.sum() == pytest.approx(1, abs=1e-12)
        assert P @ np.repeat(RETURNS, LENGTHS) == pytest.approx(mean, abs=1e-6)


def test_aw_weighs_what_the_first_observation_does_not_predict():
    """Returns 3 + 2 x + u, where u is at right angles to 1 and x, the first observation: AW sees u only."""
    x = np.array([0.0, 1.0, 2.0, 1.0, 3.0, -1.0])
    u = np.array([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    lengths = np.array([1, 2, 3, 1, 2, 1])
    obs = np.full((10, 1), 50.0)  # what comes later is not looked at
    obs[np.cumsum(lengths) - lengths, 0] = x
    P = iql.trajectory_probabilities(make_data(lengths, 3 + 2 * x + u, obs), make_args(sampler="aw", temperature=0.5))
    weights = np.repeat(np.exp((u + 1) / 2 / 0.5), lengths)
    np.testing.assert_allclose(P, weights / weights.sum(), rtol=1e-9)
    alike = np.ones((10, 1))  # starts that say nothing: RW
    args = make_args(sampler="aw"), make_args(sampler="rw")
    aw, rw = [iql.trajectory_probabilities(make_data(obs=alike), x) for x in args]
    np.testing.assert_allclose(aw, rw, rtol=1e-9)


@pytest.mark.parametrize("sampler", ["red", "aw", "rw"])
@pytest.mark.parametrize("returns", [[3.0] * 3, [0.1 + 0.2, 0.3, 0.3], [0.0] * 3, [1e9, 1e9 + 1e-6, 1e9]])
def test_equal_returns_are_drawn_evenly(sampler, returns):
    with np.errstate(all="raise"):
        P = iql.trajectory_probabilities(make_data(returns=returns), make_args(sampler=sampler))
    np.testing.assert_allclose(P, 0.1)


def modern(x, weights, biases, scale, shift):
    """One modern network in numpy: x + W2 relu(W1 LN(x)), W1 and W2 over their largest singular values."""
    x = np.maximum(x @ weights[0] + biases[0], 0)
    for i in range(1, len(weights) - 1, 2):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        z = z * scale[i // 2] + shift[i // 2]
        z = np.maximum(z @ weights[i] / np.linalg.norm(weights[i], 2) + biases[i], 0)
        x = x + z @ weights[i + 1] / np.linalg.norm(weights[i + 1], 2) + biases[i + 1]
    return x @ weights[-1] + biases[-1]


def test_modern_network_and_its_gradient():
    """Power iteration ends at the largest singular value and goes on only where gradients are taken; the gradient of
    this value counts."""
    net = make_agent(make_args(num_seeds=2, num_critics=3, **MODERN)).critic.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, OBS_DIM + ACTION_DIM, generator=generator, dtype=torch.float64)
    before = net.stretched.clone()
    with torch.no_grad():
        net(x)
    assert torch.equal(net.stretched, before)
    for _ in range(500):
        out = net(x)  # (S, C, B, 1)
    out.sum().backward()
    for n, (s, c) in enumerate((s, c) for s in range(2) for c in range(3)):
        parts = [[x[n].detach().numpy().copy() for x in layers] for layers in (net.weights, net.biases)]
        parts += [x[n].detach().numpy() for x in (net.scale, net.shift)]
        expected = modern(x[s].numpy(), *parts)
        np.testing.assert_allclose(out[s, c].detach(), expected, rtol=1e-6, atol=1e-8)
        for i in (1, 2):
            parts[0][i][3, 5] += 1e-6
            slope = (modern(x[s].numpy(), *parts) - expected).sum() / 1e-6
            assert net.weights[i].grad[n, 3, 5].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)
            parts[0][i][3, 5] -= 1e-6


@pytest.mark.parametrize(
    "architecture, actor, critic, value",
    [
        ("simple-small", 73_734, 73_985, 72_449),
        ("simple-large", 4_230_150, 139_777, 1_076_225),
        ("modern", 4_234_246, 140_289, 1_076_225),
    ],
)
def test_sizes(monkeypatch, architecture, actor, critic, value):
    """Numbers of parameters on Walker (24 observations, 6 actions): modern has LayerNorms more than simple-large."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, *rest: weight)  # slow, and not the question
    agent = iql.Agent(24, 6, iql.Args(architecture=architecture, num_critics=3, device="cpu"))
    sizes = [sum(x.numel() for x in net.parameters()) for net in (agent.actor, agent.critic, agent.value)]
    assert sizes == [actor, 3 * critic, value]


@pytest.mark.parametrize("flags", [{}, MODERN], ids=str)
def test_first_weights(flags):
    """Orthogonal, gain 1 for the actor and sqrt(2) for the critics, V as torch.nn.Linear; no two alike."""
    agent = iql.Agent(OBS_DIM, ACTION_DIM, make_args(num_seeds=3, num_critics=3, **flags))
    for net, square in ((agent.actor.net, 1), (agent.critic, 2)):
        for weight in net.weights:
            small = weight.mT @ weight if weight.shape[1] > weight.shape[2] else weight @ weight.mT
            torch.testing.assert_close(small, square * torch.eye(small.shape[1]).expand_as(small), rtol=0, atol=1e-5)
            assert len(weight.unique(dim=0)) == len(weight)
        assert not any(bias.any() for bias in net.biases)
    for weight, bias in zip(agent.value.weights, agent.value.biases):
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound and 0 < bias.abs().max() <= bound
    with pytest.raises(AssertionError):
        iql.Agent(OBS_DIM, ACTION_DIM, make_args(architecture="modern"))  # two hidden layers


def test_targets_take_over_the_singular_vectors():
    args = make_args(**MODERN)
    agent = make_agent(args)
    first = agent.critic.stretched.clone()
    iql.update(agent, *make_batch(), args)
    assert torch.equal(agent.target_critic.stretched, agent.critic.stretched)
    assert not torch.equal(agent.critic.stretched, first)


class Reference(Scaled):
    """One seed of IQL at scale, written from the equations."""

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        args = self.args
        value = forward(self.nets["value"], obs).squeeze()
        u = self.q_bar(obs, action, "target_critic").detach() - value
        value_loss = torch.mean(abs(args.expectile - 1.0 * (u < 0)) * u**2)
        self.minimize(value=value_loss)
        assert u.min() < 0 < u.max()  # the batch has both sides of the expectile
        logs = {"loss/value": value_loss, "value/v": value}
        next_value = forward(self.nets["value"], next_obs).squeeze()
        logs |= self.learn_critics(obs, action, reward, not_terminated, next_value)
        logs |= self.learn_weighted_actor(obs, action, noise)
        self.move_targets("critic")
        return {name: x.mean().item() for name, x in logs.items()}


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: logs and all parameters. With 1 for Adam's eps, its steps tell a
    mean from a sum too."""
    flags = {"learning_rate": 2**-4, "target_update_rate": 0.25, "gamma": 0.875, "pessimism": 0.75, "expectile": 0.75}
    args = make_args(num_seeds=2, num_critics=3, beta=0.5, max_advantage=0.5, **flags)
    agent = make_agent(args).double()
    adams_with(agent, eps=1)
    references = [Reference(agent, s, args) for s in range(2)]
    batches = [make_batch(S=2, seed=seed, dtype=torch.float64) for seed in range(3)]
    check_updates(iql, agent, references, batches, args)
