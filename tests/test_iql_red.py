"""The mathematics of iql_red.py against what shares no code with it: numbers worked by hand,
torch.distributions, and whole updates in float64."""

import itertools
import math
import sys
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, assert_goes_on, forward, four_states, random_batch, randomize

iql = harness.load("iql_red")
update = iql.update

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


def make_batch(S=1, B=32, seed=0):
    """Random obs, action, reward, next_obs, not_terminated."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, seed=seed)[:-1]


def make_data(lengths=(2, 3, 5), returns=(0, 5, 10)):
    """Transitions numbered by their rewards and by the first number of their observations."""
    obs, action, _, next_obs, terminated = [x[0].numpy() for x in make_batch(B=sum(lengths))]
    reward = np.arange(len(obs), dtype=np.float32)
    obs[:, 0] = reward
    columns = obs, action.round(), reward, next_obs, terminated > 0  # actions -1, 0 and 1
    episodes = np.array(returns, np.float64), np.array(lengths)
    return iql.Data(*columns, *episodes, spec=None, references=(math.nan, math.nan))


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


@pytest.mark.parametrize("p_base", [0, 0.2, 1, 50])
def test_red_mean_has_its_closed_form(p_base):
    """E[x] = (m2 + p_base m1) / (m1 + p_base) for x between 0 and 1, whatever unit returns have."""
    x = np.append(np.random.default_rng(0).random(100), [0, 1])
    m1 = np.mean(x)
    mean = iql.red_probabilities(7 * x - 3, 1, p_base) @ x
    assert mean == pytest.approx((np.mean(x**2) + p_base * m1) / (m1 + p_base), abs=1e-12)


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


def test_draws_are_a_function_of_seed_and_update():
    """Neighbours, earlier draws and global generators have no say; no two draws are alike."""
    seeds = 0, 20, 40  # as far apart as the updates, lest a sum of both goes unseen
    sampler = iql.Sampler(np.full(1000, 0.001), "cpu")
    drawn = []
    for num_updates in (0, 20, 40):
        together = sampler.draw(seeds, num_updates, 64)
        for s, seed in enumerate(seeds):
            torch.manual_seed(seed)
            np.random.seed(seed)
            assert torch.equal(together[:, s], sampler.draw([seed], num_updates, 64)[:, 0])
        drawn += together.flatten(0, 1)
    for one, other in itertools.combinations(drawn, 2):
        assert (one == other).sum() < 16


# Networks -----------------------------------------------------------------------------------------
def test_first_weights():
    """Orthogonal with gain sqrt(2), no two alike; a seed's do not depend on its neighbours."""
    agent = iql.Agent(OBS_DIM, ACTION_DIM, make_args(seed=3, num_seeds=3))
    alone = iql.Agent(OBS_DIM, ACTION_DIM, make_args(seed=4))
    for x, y in zip(agent.parameters(), alone.parameters()):
        assert torch.equal(x.chunk(3)[1], y)
    for target, online in zip(agent.target_critic.parameters(), agent.critic.parameters()):
        assert torch.equal(target, online)
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
        update(agent, obs, action, *rest, args)
        assert agent.value.biases[0].item() - value == pytest.approx(step, rel=1e-3)


@pytest.mark.parametrize("q, v, weight", [(1.5, 0.5, 20.085537), (-1.5, -0.5, 0.049787), (3, 0.5, 100)])
def test_an_update_by_hand(q, v, weight):
    """V steps from 0 to v, which the actor sees, and the critics too where s' is no true end."""
    args = make_args(learning_rate=0.5, gamma=0.75)
    obs, action, reward, next_obs, mask = make_batch()
    action[:] = torch.tensor([0.5, -0.5])  # whose log-density is -2.087877
    mask[:] = torch.arange(32) < 16
    metrics = update(make_agent(args, target_q=q), obs, action, reward.fill_(1), next_obs, mask, args)
    assert metrics["value/advantage_weight"].mean().item() == pytest.approx(weight, rel=1e-5)
    assert metrics["loss/actor"].mean().item() == pytest.approx(weight * 2.087877, rel=1e-5)
    assert metrics["loss/critic"].mean().item() == pytest.approx(1 + (1 + 0.75 * v) ** 2, rel=1e-5)


class Reference(Learner):
    """One seed of IQL, written from the equations, with Adam by hand."""

    def update(self, obs, action, reward, next_obs, not_terminated):
        """What the script logs of this seed."""
        args = self.args
        obs_action = torch.cat([obs, action], 1)
        target_q = torch.minimum(*forward(self.nets["target_critic"], obs_action)).squeeze(1)  # (B,)

        u = target_q - forward(self.nets["value"], obs).squeeze()
        value_loss = torch.mean(abs(args.expectile - 1.0 * (u < 0)) * u**2)
        self.minimize(value=value_loss)

        value = forward(self.nets["value"], obs).squeeze()
        weight = torch.exp(args.beta * (target_q - value)).clamp(max=100)
        log_std, *layers = self.nets["actor"]
        policy = torch.distributions.Normal(forward(layers, obs)[0].tanh(), log_std[0].clamp(-5, 2).exp())
        actor_loss = -torch.mean(weight * policy.log_prob(action).sum(1))
        self.minimize(actor=actor_loss)

        backup = reward + args.gamma * not_terminated * forward(self.nets["value"], next_obs).squeeze()
        q1, q2 = forward(self.nets["critic"], obs_action).squeeze(2)
        critic_loss = torch.mean((q1 - backup) ** 2) + torch.mean((q2 - backup) ** 2)
        self.minimize(critic=critic_loss)
        self.move_targets("critic")
        assert u.min() < 0 < u.max()  # the batch has both sides of the expectile,
        assert weight.min() < 1 < 100 == weight.max()  # and of the cap
        losses = {"loss/value": value_loss, "loss/actor": actor_loss, "loss/critic": critic_loss}
        values = {"value/v": value, "value/q": (q1 + q2) / 2, "value/advantage_weight": weight}
        return {name: x.mean().item() for name, x in (losses | values).items()}


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: what is logged, and all parameters."""
    exact = {"learning_rate": 2**-5, "target_update_rate": 0.25, "expectile": 0.75}  # also in float32
    args = make_args(num_seeds=2, beta=8, **exact)
    agent = make_agent(args, size=0.7).double()
    agent.actor.log_std.data[0, 0] = torch.tensor([-7.0, 4.0])  # to be kept within [-5, 2]
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    for n in range(3):
        batch = [column.double() for column in make_batch(S=2, seed=n)]
        metrics = update(agent, *batch, args)
        for s, reference in enumerate(references):
            logged = {name: x[s].mean().item() for name, x in metrics.items()}
            assert logged == pytest.approx(reference.update(*[column[s] for column in batch]), rel=1e-7)
    for s, reference in enumerate(references):
        reference.assert_same(agent, s, atol=1e-7)
    assert not any(x.requires_grad for x in metrics.values())


# The method's own lines in main() -----------------------------------------------------------------
def run(monkeypatch, run_dir, data, *flags):
    """The agent of main() on this data, its batches' columns (updates, S, B, ...), its rates (updates, 3)."""
    calls = []

    def recorder(agent, *batch_and_args):
        adams = [agent.optimizers[name] for name in ("value", "actor", "critic")]
        rates = torch.tensor([adam.param_groups[0]["lr"] for adam in adams])
        calls.append((agent, *[x.clone() for x in batch_and_args[:-1]], rates))
        return update(agent, *batch_and_args)

    monkeypatch.setattr(iql, "update", recorder)
    monkeypatch.setattr(iql, "load_data", lambda args: data)
    small = "--num-updates 80 --hidden-sizes 16 16 --eval-episodes 0 --device cpu"
    monkeypatch.setattr(sys, "argv", ["iql_red.py", "--run-dir", str(run_dir), *small.split(), *flags])
    iql.main()
    agents, *columns, rates = zip(*calls)
    return agents[0], [torch.stack(column).numpy() for column in columns], torch.stack(rates).numpy()


@pytest.mark.parametrize(
    "transform, span, factor, shift",
    [("scale", 2, 500, 0), ("scale", 0, 1, 0), ("shift", 2, 1, -1), ("none", 2, 1, 0)],
)
def test_what_the_learner_sees(monkeypatch, tmp_path, transform, span, factor, shift):
    """Rewards transformed, actions clipped, the rest as logged; ReD ranks by returns as logged."""
    data = make_data([3, 40, 8, 12], span * np.array([0, 1, 0.25, 0.5]) - 1)
    _, columns, rates = run(monkeypatch, tmp_path / "run", data, "--reward-transform", transform)
    obs, action, reward, next_obs, not_terminated = columns
    i = obs[..., 0].astype(int)
    np.testing.assert_allclose(reward, factor * data.reward[i] + shift, rtol=1e-6)
    np.testing.assert_allclose(action, data.action[i] * (1 - 1e-5), rtol=1e-7)
    np.testing.assert_array_equal(obs, data.obs[i])
    np.testing.assert_array_equal(next_obs, data.next_obs[i])
    np.testing.assert_array_equal(not_terminated, 1 - data.terminated[i])
    P = iql.red_probabilities(np.repeat(data.returns, data.lengths), 1, 0)
    share = np.bincount(i.flatten(), minlength=len(P)) / i.size
    assert np.all(np.abs(share - P) <= 5 * np.sqrt(P * (1 - P) / i.size))
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(0, 80, iql.CHUNK) / 80))
    np.testing.assert_allclose(rates[:: iql.CHUNK, 1], 3e-4 * cosine, rtol=1e-6)  # the actor's
    np.testing.assert_allclose(rates[:, [0, 2]], 3e-4, rtol=1e-6)


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [{}, {"beta": 0.0}, {"beta": -3.0}, {"gamma": 0.0}], ids=str)
def test_a_chain_of_four_states(flags):
    """Its end pays 5, a step costs 0.1. Most of the data quits, for 0.5 at once, and so does who clones it,
    flips the advantage, or sees the next reward only. IQL goes on."""
    columns = four_states()
    args = make_args(num_seeds=3, learning_rate=0.005, target_update_rate=0.1, expectile=0.9, **flags)
    agent = iql.Agent(4, 1, args)
    sampler = iql.Sampler(np.full(3000, 1 / 3000), "cpu")
    for num_updates in range(0, 300, iql.CHUNK):
        for batch in sampler.draw(range(3), num_updates, 64):
            update(agent, *[column[batch] for column in columns], args)
    assert_goes_on(agent.actor, right=not flags)
