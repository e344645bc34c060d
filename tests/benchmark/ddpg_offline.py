"""Offline DDPG, as R. Agarwal et al. (2020) trained it from a log of DDPG: td3_bc_red.py, flags and all, with DDPG's update:
one critic, no noise on the target's action, no delay, nothing that clones.

    python tests/benchmark/ddpg_offline.py --sampler uniform --dataset data/halfcheetah/ddpg-v0
"""

import os
import sys
from pathlib import Path

import torch

algorithms = str(Path(__file__).resolve().parents[2] / "algorithms")
sys.path.insert(0, algorithms)
os.environ["PYTHONPATH"] = os.pathsep.join([algorithms, os.environ.get("PYTHONPATH", "")])  # of evaluation workers

import td3_bc_red as td3  # noqa: E402

Args = td3.Args


def update(agent, obs, action, reward, next_obs, not_terminated, noise, actor_turn, args):
    """One gradient step of every agent's actor and first critic, and one of their targets; the second critic, the
    noise and whose turn it is are not used. Shapes as in td3_bc_red.py."""
    obs = agent.normalize(obs)
    next_obs = agent.normalize(next_obs)
    with torch.no_grad():
        next_q = td3.first_critic(agent.target_critic, torch.cat([next_obs, agent.target_actor(next_obs)], -1))
        backup = reward + args.gamma * not_terminated * next_q
    q = td3.first_critic(agent.critic, torch.cat([obs, action], -1))  # (S, B)
    critic_loss = (q - backup).square().mean(-1)  # (S,)
    td3.minimize(critic_loss.sum(), agent.optimizers["critic"])

    policy_q = td3.first_critic(agent.critic, torch.cat([obs, agent.actor(obs)], -1))
    actor_loss = -policy_q.mean(-1)  # (S,)
    td3.minimize(actor_loss.sum(), agent.optimizers["actor"])

    with torch.no_grad():  # targets
        targets = [*agent.target_critic.parameters(), *agent.target_actor.parameters()]
        for target, online in zip(targets, [*agent.critic.parameters(), *agent.actor.parameters()]):
            target.lerp_(online, args.target_update_rate)
    return {"loss/critic": critic_loss.detach(), "loss/actor": actor_loss.detach(), "value/q": q.detach()}


if __name__ == "__main__":
    td3.update = update
    td3.main()
