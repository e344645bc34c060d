"""Behaviour cloning of logged frames, the row to hold the offline Atari agents against: offline_dqn_atari.py, flags and
all, with the cross-entropy of the logged actions as its loss.

    PYTHONPATH=tests python tests/benchmark/cloning_atari.py --dataset atari/catch --env-id catch:Catch-v0
"""

import os
import sys
from pathlib import Path

from torch.nn.functional import cross_entropy

algorithms = str(Path(__file__).resolve().parents[2] / "algorithms")
sys.path.insert(0, algorithms)
os.environ["PYTHONPATH"] = os.pathsep.join([algorithms, os.environ.get("PYTHONPATH", "")])  # of evaluation workers

import offline_dqn_atari as dqn  # noqa: E402

Args = dqn.Args


def update(agent, obs, action, reward, next_obs, not_terminated, args):
    """One gradient step of every agent on obs (S, B, 4, 84, 84) and action (S, B)."""
    logits = agent.network(obs).squeeze(-1)  # (S, B, A)
    loss = cross_entropy(logits.flatten(0, 1), action.flatten(), reduction="none").view_as(action).mean(-1)  # (S,)
    dqn.minimize(loss.sum(), agent.optimizers["network"])
    return {"loss/cloning": loss.detach()}


if __name__ == "__main__":
    dqn.update = update
    dqn.main()
