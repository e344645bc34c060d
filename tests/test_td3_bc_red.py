"""The mathematics of td3_bc_red.py against what shares no code with it: numbers worked by hand and whole
updates in float64; and offline DDPG, of tests/benchmark. Samplers are those of iql_red.py, whose test checks them."""

import sys

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, check_updates, forward, random_batch, randomize

sys.path.insert(0, str(harness.ROOT / "tests" / "benchmark"))
ddpg = harness.load("ddpg_offline")
td3 = harness.load("td3_bc_red")

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return td3.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.0, obs=None):
    """An agent of random numbers of this size, targets apart from their networks."""
    if obs is None:
        obs = np.random.default_rng(3).normal(1, 2, size=(100, OBS_DIM))
    agent = td3.Agent(obs, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def test_observations_are_normalised_by_all_of_the_data():
    """TD3+BC (4); what is saved has mean and deviation, so that a policy takes observations as they come."""
    obs = np.random.default_rng(0).normal(5, 3, size=(1000, OBS_DIM))
    agent = make_agent(make_args(), obs=obs)
    normalised = agent.normalize(torch.from_numpy(np.float32(obs)))
    expected = (obs - obs.mean(0)) / (obs.std(0) + 0.001)
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert {"normalize.mean", "normalize.std"} <= agent.state_dict().keys()


def test_first_weights():
    """Those of torch.nn.Linear: uniform within 1 / sqrt(in)."""
    agent = td3.Agent(np.zeros((9, OBS_DIM)), ACTION_DIM, make_args(num_seeds=3, hidden_sizes=(64, 64)))
    for mlp in (agent.actor[0], agent.critic):
        for weight, bias in zip(mlp.weights, mlp.biases):
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound
            assert bias.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


class Reference(Learner):
    """One seed of TD3+BC, written from the equations, with Adam by hand."""

    def __init__(self, agent, s, args):
        super().__init__(agent, s, args)
        self.mean, self.std = agent.normalize.mean, agent.normalize.std

    def update(self, obs, action, reward, next_obs, not_terminated, noise, actor_turn):
        args = self.args
        obs, next_obs = (obs - self.mean) / self.std, (next_obs - self.mean) / self.std
        offset = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        assert (offset.abs() == args.noise_clip).any() and (offset.abs() < args.noise_clip).any()
        next_action = (forward(self.nets["target_actor"], next_obs)[0].tanh() + offset).clamp(-1, 1)
        assert (next_action.abs() == 1).any()
        next_q = torch.minimum(*forward(self.nets["target_critic"], torch.cat([next_obs, next_action], 1)))
        backup = reward + args.gamma * not_terminated * next_q.squeeze(1).detach()
        q1, q2 = forward(self.nets["critic"], torch.cat([obs, action], 1)).squeeze(2)
        critic_loss = torch.mean((q1 - backup) ** 2) + torch.mean((q2 - backup) ** 2)
        self.minimize(critic=critic_loss)
        logged = {"loss/critic": critic_loss, "value/q": (q1 + q2) / 2}
        if actor_turn:
            policy_action = forward(self.nets["actor"], obs)[0].tanh()
            q1, _ = forward(self.nets["critic"], torch.cat([obs, policy_action], 1)).squeeze(2)
            weight = args.bc_alpha / torch.mean(abs(q1.detach()))
            cloning = torch.mean((policy_action - action) ** 2)
            actor_loss = -weight * torch.mean(q1) + cloning
            self.minimize(actor=actor_loss)
            self.move_targets("actor", "critic")
            logged |= {"loss/actor": actor_loss, "loss/behaviour_cloning": cloning, "value/lambda": weight}
        return {name: x.mean().item() for name, x in logged.items()}


class DDPG(Reference):
    """One seed of DDPG: the first critic alone, no noise, everything moves at every update."""

    def update(self, obs, action, reward, next_obs, not_terminated, noise, actor_turn):
        obs, next_obs = (obs - self.mean) / self.std, (next_obs - self.mean) / self.std
        next_action = forward(self.nets["target_actor"], next_obs)[0].tanh()
        next_q = forward(self.nets["target_critic"], torch.cat([next_obs, next_action], 1))[0, :, 0]
        q = forward(self.nets["critic"], torch.cat([obs, action], 1))[0, :, 0]
        critic_loss = torch.mean((q - reward - self.args.gamma * not_terminated * next_q.detach()) ** 2)
        self.minimize(critic=critic_loss)
        policy_action = forward(self.nets["actor"], obs)[0].tanh()
        actor_loss = -torch.mean(forward(self.nets["critic"], torch.cat([obs, policy_action], 1))[0])
        self.minimize(actor=actor_loss)
        self.move_targets("actor", "critic")
        logged = {"loss/critic": critic_loss, "loss/actor": actor_loss, "value/q": q}
        return {name: x.mean().item() for name, x in logged.items()}


@pytest.mark.parametrize("script, Reference", [(td3, Reference), (ddpg, DDPG)])
def test_updates_against_float64(script, Reference):
    """Four updates of two seeds, which do not mix: what is logged, and all parameters."""
    args = make_args(num_seeds=2, learning_rate=2**-5, target_update_rate=0.25)  # exact in float32
    agent = make_agent(args, size=0.6).double()
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    batches = []
    for n in range(1, 5):
        *batch, noise = random_batch(2, 32, OBS_DIM, ACTION_DIM, (2, 32, ACTION_DIM), n, torch.float64)
        batches.append([*batch, 2 * noise, n % 2 == 0])
    check_updates(script, agent, references, batches, args)
