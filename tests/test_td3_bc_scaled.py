"""The mathematics of td3_bc_scaled.py against what shares no code with it: numbers worked by hand and whole updates in
float64. Q_bar and acting are those of asac.py, iql_scaled.py and awac.py too."""

import math
import pickle
import sys

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, assert_goes_on, forward, four_states, pessimistic, random_batch, randomize

td3 = harness.load("td3_bc_scaled")
update = td3.update

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return td3.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.5):
    """An agent of random numbers of this size."""
    agent = td3.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, (S, 2 * B, ACTION_DIM), seed)


def set_linear(net, i, slope, biases=(0.0,)):
    """Makes networks of two hidden layers slope * input i + bias, as relu(z) - relu(-z)."""
    for x in [*net.parameters()]:
        x.data.zero_()
    net.weights[0].data[:, i, 0] = slope
    net.weights[0].data[:, i, 1] = -slope
    net.weights[1].data[:, 0, 0] = net.weights[1].data[:, 1, 1] = 1
    net.weights[2].data[:, 0] = 1
    net.weights[2].data[:, 1] = -1
    net.biases[2].data[:] = torch.tensor(biases).view(-1, 1, 1)


# Ensemble and acting ------------------------------------------------------------------------------
def test_pessimism():
    """0.5: the mean over pairs of the smaller one; two critics: the minimum; 0: the mean."""
    q = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def q_bar(q, pessimism):
        return td3.q_bar(lambda obs_action: q[..., None], torch.zeros(3, 40, 1), torch.zeros(3, 40, 1), pessimism)

    torch.testing.assert_close(q_bar(q[:, :2], 0.5), q[:, :2].amin(1))
    torch.testing.assert_close(q_bar(q[:, :2], 1.0), q[:, :2].mean(1) - (q[:, 0] - q[:, 1]).abs())
    torch.testing.assert_close(q_bar(q, 0.0), q.mean(1))
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(q_bar(q, 0.5), (q.sort(1).values * weights).sum(1))
    with pytest.raises(SystemExit):
        make_args(num_critics=1)


def best_of(q, **flags):
    """A policy whose mean is (0.5, 0.5), as a worker has it, with critics q(action) that give (S, C, M)."""

    class Critics(torch.nn.Module):
        def forward(self, obs_action):
            return q(obs_action[..., OBS_DIM:])[..., None]

    agent = make_agent(make_args(**flags))
    set_linear(agent.actor.net, 0, 0.0, [math.atanh(0.5)])
    agent.critic = Critics()
    return td3.BestOfSamples(agent, make_args(**flags))


def test_best_of_samples():
    """Algorithm 1: of 2,000 draws the nearest to what the critics like, at every step of other draws."""
    liked = torch.tensor([0.3, 0.6])
    policy = best_of(lambda a: -(a - liked).square().sum(-1)[:, None].expand(-1, 2, -1), num_seeds=2, eval_samples=2000)
    obs = make_batch(S=2, B=1)[0]
    first, second = policy(obs), policy(obs)
    torch.testing.assert_close(first, liked.expand(2, 1, 2), rtol=0, atol=0.02)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    policy = best_of(lambda a: -a[..., 0][:, None].expand(-1, 2, -1), eval_samples=2000)
    assert -0.5 < policy(obs[:1])[0, 0, 0] < 0  # 3.4 +- 0.3 standard deviations below the mean
    policy = best_of(lambda a: a[..., 0][:, None].expand(-1, 2, -1), eval_samples=2000)
    assert policy(obs[:1])[0, 0, 0] == 1  # clipped


def test_best_of_samples_is_pessimistic():
    """Critics 2 a and -a, less 0.6: the largest a has the largest mean, the one nearest to 0.6 the largest Q_bar."""
    slopes = torch.tensor([2.0, -1.0])[:, None]
    for pessimism, low, high in ((0.0, 1, 1), (0.5, 0.59, 0.61)):
        policy = best_of(lambda a: slopes * (a[..., 0][:, None] - 0.6), eval_samples=2000, pessimism=pessimism)
        assert low <= policy(torch.zeros(1, 1, OBS_DIM))[0, 0, 0] <= high


def test_an_episode_of_best_of_samples_is_repeatable():
    """Pickled as for a worker: the same draws again, other draws where an episode begins elsewhere; a seed acts as if
    alone; M = 1 is the mean; acting changes nothing."""
    flags = {"architecture": "modern", "hidden_sizes": (16,) * 3}
    agent = make_agent(make_args(num_seeds=3, **flags), size=0.1)  # means far from the bounds
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    frozen = pickle.dumps(td3.BestOfSamples(agent, make_args(num_seeds=3, eval_samples=20, **flags)))
    obs = torch.stack([make_batch(S=3, B=1, seed=n)[0] for n in range(4)])
    with torch.no_grad():
        policies = [pickle.loads(frozen) for _ in range(3)]
        once, again = [torch.stack([policy(x) for x in obs]) for policy in policies[:2]]
        policies[2](obs[0] + 1)
        assert torch.equal(once, again) and (policies[2](obs[1]) != once[1]).all()
        alone = td3.BestOfSamples(make_agent(make_args(**flags)), make_args(eval_samples=20, **flags))
        for name, x in alone.state_dict().items():
            x.copy_(agent.state_dict()[name].chunk(3)[1])
        torch.testing.assert_close(torch.cat([alone(x) for x in obs[:, 1:2]]), once[:, 1])
        mean = td3.BestOfSamples(agent, make_args(num_seeds=3, eval_samples=1, **flags))(obs[0])
        assert torch.equal(mean, agent.actor(obs[0]))
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


# The update ---------------------------------------------------------------------------------------
def bellman_target(noise, mean_action=0.5, not_terminated=1.0, biases=(0.0, 0.0), **flags):
    """y of a transition with r = 1.5, gamma = 0.5 and Q_target(s', a') = 3 a'_0 + biases, from the loss at Q = 0."""
    args = make_args(gamma=0.5, num_critics=len(biases), **flags)
    agent = make_agent(args)
    set_linear(agent.target_critic, OBS_DIM, 3.0, biases)
    set_linear(agent.critic, 0, 0.0)
    set_linear(agent.actor.net, 0, 0.0, [math.atanh(mean_action)])
    obs, action, reward, next_obs, mask, _ = make_batch(B=1)
    noise = torch.tensor([[[noise] * 2, [5.0] * 2]])
    metrics = update(agent, obs, action, reward.fill_(1.5), next_obs, mask.fill_(not_terminated), noise, args)
    return math.sqrt(2 * metrics["loss/critic"].item() / len(biases))


@pytest.mark.parametrize(
    "noise, next_action", [(0, 0.5), (1, 0.7), (-1, 0.3), (1.45, 0.79), (1.55, 0.8), (9, 0.8), (-9, 0.2)]
)
def test_next_action(noise, next_action):
    """The online actor's mean of 0.5, noise of 0.2 clipped at 0.3; the same about 0.9, where 1 is the bound."""
    assert bellman_target(noise) == pytest.approx(1.5 + 0.5 * 3 * next_action, rel=1e-5)
    near_the_bound = min(next_action + 0.4, 1)
    assert bellman_target(noise, mean_action=0.9) == pytest.approx(1.5 + 0.5 * 3 * near_the_bound, rel=1e-5)


@pytest.mark.parametrize(
    "biases, pessimism, q",
    [((4.0, 1.0), 0.5, 1), ((1.0, 4.0), 0, 2.5), ((1.0, 4.0), 1, -0.5), ((6.0, 1.0, 2.0), 0.5, 4 / 3)],
)
def test_bootstrap_from_the_pessimistic_ensemble(biases, pessimism, q):
    """The minimum of two critics at 0.5, as in TD3; nothing is left of Q at a true end."""
    y = bellman_target(0, biases=biases, pessimism=pessimism)
    assert y == pytest.approx(1.5 + 0.5 * (3 * 0.5 + q), rel=1e-5)
    assert bellman_target(0, not_terminated=0.0, biases=biases) == pytest.approx(1.5, rel=1e-5)


def actor_metrics(q, action, bc_coef, biases=(0.0, 2.0)):
    """Metrics of an update where Q_c(s, .) = q + biases[c], pi = 0 without noise, and `action` was logged."""
    args = make_args(bc_coef=bc_coef, learning_rate=0.0)
    agent = make_agent(args)
    set_linear(agent.critic, 0, 1.0, biases)
    set_linear(agent.actor.net, 0, 0.0)
    obs, logged, *rest, noise = make_batch(B=len(q))
    obs[0, :, 0] = torch.tensor(q)
    logged[0] = torch.tensor(action)
    return {name: x.item() for name, x in update(agent, obs, logged, *rest, 0 * noise, args).items()}


def test_actor_loss_by_hand():
    """Q_bar = (1, -3): mean 1 without, 2 with the absolute value; squared error 0.25: 1 + bc_coef * 2 * 0.25."""
    for bc_coef in (0.0, 0.1, 3.0):
        metrics = actor_metrics([1.0, -3.0], 0.5, bc_coef)
        assert metrics["value/policy_q"] == pytest.approx(-1)
        assert metrics["loss/behaviour_cloning"] == pytest.approx(0.25)
        assert metrics["loss/actor"] == pytest.approx(1 + bc_coef * 2 * 0.25, rel=1e-6)
    uneven = actor_metrics([1.0, -3.0], [[1.0, 0.5], [-0.5, 0.0]], 1.0)  # a mean over action dimensions too
    assert uneven["loss/behaviour_cloning"] == pytest.approx((1 + 0.25 + 0.25 + 0) / 4)
    below = actor_metrics([1.0, -3.0], 0.5, 1.0, biases=(0.0, -2.0))  # |Q_bar| is averaged after aggregation
    assert below["loss/actor"] == pytest.approx(3 + (1 + 5) / 2 * 0.25)


class Reference(Learner):
    """One seed of TD3+BC at scale, written from the equations, with Adam by hand."""

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        """What the script logs of this seed."""
        args = self.args
        offset = (0.2 * noise[: len(obs)]).clamp(-0.3, 0.3)
        next_action = (forward(self.nets["actor"], next_obs)[0].tanh() + offset).clamp(-1, 1).detach()
        next_q = pessimistic(forward(self.nets["target_critic"], next_obs, next_action), args.pessimism).detach()
        q = forward(self.nets["critic"], obs, action).squeeze(2)  # (C, B)
        critic_loss = ((q - reward - args.gamma * not_terminated * next_q) ** 2).mean(1).sum() / 2
        self.minimize(critic=critic_loss)

        drawn = (forward(self.nets["actor"], obs)[0].tanh() + 0.2 * noise[len(obs) :]).clamp(-1, 1)
        policy_q = pessimistic(forward(self.nets["critic"], obs, drawn), args.pessimism)
        bc_loss = ((drawn - action) ** 2).mean()
        actor_loss = args.bc_coef * policy_q.abs().mean().item() * bc_loss - policy_q.mean()
        self.minimize(actor=actor_loss)
        self.move_targets("critic")

        assert (offset.abs() == 0.3).any() and (drawn.abs() == 1).any()
        logs = {"loss/critic": critic_loss, "loss/actor": actor_loss, "loss/behaviour_cloning": bc_loss}
        logs |= {"value/q": q, "value/policy_q": policy_q}
        return {name: x.mean().item() for name, x in logs.items()}


@pytest.mark.parametrize("bc_coef", [0.7, 0.0])
def test_updates_against_float64(bc_coef):
    """Three updates of two seeds, which do not mix: logs and all parameters. With 1 for Adam's eps, its steps tell a
    mean from a sum too."""
    flags = {"learning_rate": 2**-4, "target_update_rate": 0.25, "gamma": 0.875, "pessimism": 0.75, "num_critics": 3}
    args = make_args(num_seeds=2, bc_coef=bc_coef, **flags)
    agent = make_agent(args).double()
    adams_with(agent, eps=1)
    references = [Reference(agent, s, args) for s in range(2)]
    for n in range(3):
        batch = [column.double() for column in make_batch(S=2, seed=n)]
        metrics = update(agent, *batch, args)
        for s, reference in enumerate(references):
            logged = {name: x[s].item() for name, x in metrics.items()}
            assert logged == pytest.approx(reference.update(*[column[s] for column in batch]), rel=1e-7)
    assert not any(x.requires_grad for x in metrics.values())
    for s, reference in enumerate(references):
        reference.assert_same(agent, s, atol=1e-8)


# The method's own lines in main() -----------------------------------------------------------------
@pytest.mark.parametrize("transform, shift", [("shift", -1), ("none", 0)])
def test_what_the_learner_sees(monkeypatch, tmp_path, transform, shift):
    """Rewards transformed, the rest as logged; rw ranks by returns as logged."""
    obs, action, reward, next_obs, mask = [x[0].numpy() for x in make_batch(B=60)[:5]]
    ends = np.array([3.0, 2.0]), np.array([40, 20])
    data = td3.Data(obs, action, reward, next_obs, mask < 1, *ends, None, (math.nan, math.nan))
    calls = []
    monkeypatch.setattr(td3, "update", lambda *inputs: calls.append(inputs[1:7]) or update(*inputs))
    monkeypatch.setattr(td3, "load_data", lambda args: data)
    flags = f"--run-dir {tmp_path}/run --num-updates 80 --eval-episodes 0 --device cpu --hidden-sizes 16 --num-seeds 2"
    flags += f" --reward-transform {transform} --sampler rw --temperature 1 --batch-size 64"
    monkeypatch.setattr(sys, "argv", ["td3_bc_scaled.py", *flags.split()])
    td3.main()
    *batch, noise = [torch.stack(x).numpy() for x in zip(*calls)]
    i = td3.Sampler(td3.trajectory_probabilities(data, make_args(sampler="rw", temperature=1)), "cpu")
    i = torch.cat([i.draw([0, 1], step, 64) for step in range(0, 80, td3.CHUNK)]).numpy()
    for column, logged in zip(batch, (obs, action, reward + shift, next_obs, mask)):
        np.testing.assert_array_equal(column, logged[i])
    assert (i < 40).mean() == pytest.approx(40 * math.e / (40 * math.e + 20), abs=0.02)
    drawn = [td3.draw_noise([0, 1], step, (128, ACTION_DIM), "cpu") for step in range(0, 80, td3.CHUNK)]
    np.testing.assert_array_equal(noise, np.concatenate(drawn))


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [{}, {"bc_coef": 1e3}, {"gamma": 0.0}], ids=str)
def test_a_chain_of_four_states(flags):
    """Its end pays 5, a step costs 0.1. Most of the data quits, for 0.5 at once, and so does who clones it, who sees
    the next reward only. TD3+BC goes on."""
    columns = four_states()
    args = make_args(num_seeds=3, learning_rate=3e-3, target_update_rate=0.05, **flags)
    agent = td3.Agent(4, 1, args)
    sampler = td3.Sampler(np.full(3000, 1 / 3000), "cpu")
    for step in range(0, 600, td3.CHUNK):
        for batch, noise in zip(sampler.draw(range(3), step, 128), td3.draw_noise(range(3), step, (256, 1), "cpu")):
            update(agent, *[column[batch] for column in columns], noise, args)
    assert_goes_on(agent.actor, right=not flags)
