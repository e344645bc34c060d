"""The mathematics of td3_bc_scaled.py against what shares no code with it: numbers worked by hand and whole updates in
float64. Q_bar and acting are those of asac.py, iql_scaled.py and awac.py too."""

import math
import pickle

import harness
import pytest
import torch
from reference import Scaled, adams_with, check_updates, random_batch, randomize

td3 = harness.load("td3_bc_scaled")

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return td3.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.5):
    """An agent of random numbers of this size."""
    agent = td3.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, seed=0, dtype=torch.float32):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, (S, 2 * B, ACTION_DIM), seed, dtype)


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
    for parameter in agent.actor.net.parameters():
        parameter.data.zero_()
    agent.actor.net.biases[-1].data += math.atanh(0.5)
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


class Reference(Scaled):
    """One seed of TD3+BC at scale, written from the equations."""

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        next_value = self.smoothed_next_value(next_obs, noise[: len(obs)])
        logs = self.learn_critics(obs, action, reward, not_terminated, next_value)
        drawn = self.sample(obs, noise[len(obs) :])
        assert (drawn.abs() == 1).any()
        policy_q = self.q_bar(obs, drawn)
        bc_loss = ((drawn - action) ** 2).mean()
        actor_loss = self.args.bc_coef * policy_q.abs().mean().item() * bc_loss - policy_q.mean()
        self.minimize(actor=actor_loss)
        self.move_targets("critic")
        logs |= {"loss/actor": actor_loss, "loss/behaviour_cloning": bc_loss, "value/policy_q": policy_q}
        return {name: x.mean().item() for name, x in logs.items()}


@pytest.mark.parametrize("num_critics, bc_coef, pessimism", [(3, 0.7, 0.75), (3, 0.0, 0.0), (2, 3.0, 0.5)])
def test_updates_against_float64(num_critics, bc_coef, pessimism):
    """Three updates of two seeds, which do not mix: logs and all parameters. With 1 for Adam's eps, its steps tell a
    mean from a sum too."""
    flags = {"learning_rate": 2**-4, "target_update_rate": 0.25, "gamma": 0.875, "num_seeds": 2}
    args = make_args(num_critics=num_critics, bc_coef=bc_coef, pessimism=pessimism, **flags)
    agent = make_agent(args).double()
    adams_with(agent, eps=1)
    references = [Reference(agent, s, args) for s in range(2)]
    batches = [make_batch(S=2, seed=seed, dtype=torch.float64) for seed in range(3)]
    check_updates(td3, agent, references, batches, args)
