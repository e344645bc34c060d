"""The mathematics of crr_red.py against what shares no code with it: numbers worked by hand,
torch.distributions, and whole updates in float64. Probabilities and draws are tested with iql_red.py."""

import harness
import pytest
import torch
from reference import Learner, adams_with, check_updates, forward, random_batch, randomize

crr = harness.load("crr_red")

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return crr.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


class Reference(Learner):
    """One seed of CRR, written from the equations, with Adam by hand."""

    def policy(self, name, obs):
        mean, log_std = forward(self.nets[name], obs)[0].chunk(2, -1)
        return torch.distributions.Normal(mean.tanh(), log_std.clamp(-20, 2).exp())

    def q(self, name, obs, action):
        return forward(self.nets[name], obs, action)[0, :, 0]

    def update(self, obs, action, reward, next_obs, not_terminated, noise, copied):
        args = self.args
        policy = self.policy("actor", obs)
        samples = [(policy.mean + policy.stddev * z).clamp(-1, 1) for z in noise[:-1]]
        values = torch.stack([self.q("critic", obs, sample) for sample in samples])  # (m, B)
        baseline = values.max(0).values if args.advantage == "max" else values.mean(0)
        advantage = (self.q("critic", obs, action) - baseline).detach()
        weight = torch.exp(advantage / args.beta).clamp(max=20)
        if args.weight == "binary":
            weight = torch.where(advantage > 0, 1.0, 0.0).to(weight.dtype)
        actor_loss = -torch.mean(weight * policy.log_prob(action).sum(-1))
        target_policy = self.policy("target_actor", next_obs)
        next_action = (target_policy.mean + target_policy.stddev * noise[-1]).clamp(-1, 1)
        backup = reward + args.gamma * not_terminated * self.q("target_critic", next_obs, next_action).detach()
        q = self.q("critic", obs, action)
        critic_loss = torch.mean((q - backup) ** 2)
        self.minimize(actor=actor_loss, critic=critic_loss)
        assert weight.min() < 1 <= weight.max() and (args.weight == "binary" or weight.max() == 20)
        if copied:
            for name in ("actor", "critic"):
                self.nets[f"target_{name}"] = [x.detach().clone() for x in self.nets[name]]
        logged = {"loss/actor": actor_loss, "loss/critic": critic_loss, "value/q": q, "value/advantage_weight": weight}
        return {name: x.mean().item() for name, x in logged.items()}


@pytest.mark.parametrize("flags", [{}, {"advantage": "max"}, {"weight": "binary"}], ids=str)
def test_updates_against_float64(flags):
    """Three updates of two seeds, which do not mix: logs and all parameters. Targets are copied when told."""
    args = make_args(num_seeds=2, learning_rate=2**-5, beta=0.1, **flags)  # exact in float32
    agent = crr.Agent(OBS_DIM, ACTION_DIM, args).double()
    randomize(agent, 0.6)  # targets too
    agent.actor.net.biases[-1].data[0, 0] = torch.tensor([0.0, 0.0, -30.0, 4.0])  # to be kept within [-20, 2]
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    batches = []
    for n in range(3):
        batch = random_batch(2, 32, OBS_DIM, ACTION_DIM, (2, 5, 32, ACTION_DIM), n, torch.float64)
        batches.append([*batch, torch.tensor(1.0 * (n == 1), dtype=torch.float64)])
    check_updates(crr, agent, references, batches, args)
