"""The mathematics of awac.py against what shares no code with it: numbers worked by hand, and whole updates in
float64. Networks and acting, which its siblings share, are tested in theirs, Replay and Environments in test_sac.py,
its two stages in test_stages.py."""

import math
from functools import partial

import harness
import numpy as np
import pytest
import torch
from reference import Scaled, adams_with, check_updates, random_batch, randomize

awac = harness.load("awac")

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return awac.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def test_weights_by_hand():
    """A softmax over the batch; A_max is a bound from above only, and before the division by beta."""

    def weights(advantage, max_advantage=math.inf, beta=0.5):
        return awac.advantage_weights(torch.tensor([advantage], dtype=torch.float64), max_advantage, beta)[0]

    near = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    near(weights([1.0, 0.0, -1.0]), [0.8668, 0.1173, 0.0159])
    near(weights([1.0, 0.0, -1.0], max_advantage=0), [0.4683, 0.4683, 0.0634])
    near(weights([1.0, 0.0, -1.0], beta=1e9), [1 / 3] * 3)
    near(weights([8.0, 7.0, 6.0]), weights([1.0, 0.0, -1.0]))
    for extreme in ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]):
        assert weights(extreme).isfinite().all() and weights(extreme).sum().item() == pytest.approx(1)
    two = awac.advantage_weights(torch.tensor([[1.0, 0.0], [5.0, 5.0]]), math.inf, 1.0)  # of each seed by itself
    torch.testing.assert_close(two, torch.tensor([[0.7311, 0.2689], [0.5, 0.5]]), rtol=0, atol=1e-4)


def test_online_actions_are_drawn_from_the_policy():
    agent = awac.Agent(OBS_DIM, ACTION_DIM, make_args(num_seeds=2))
    obs = torch.randn(2, OBS_DIM, generator=torch.Generator().manual_seed(0))
    noise = torch.tensor([[[9.0, 0.0]], [[-0.5, -9.0]]])
    mean = agent.actor(obs[:, None])[:, 0]
    expected = torch.tensor([[1.0, mean[0, 1].item()], [mean[1, 0].item() - 0.1, -1.0]])
    torch.testing.assert_close(agent.explore(obs, noise), expected)
    assert mean.abs().max() < 0.8 and not agent.explore(obs, noise).requires_grad


class Reference(Scaled):
    """One seed of AWAC, written from the equations."""

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        next_value = self.smoothed_next_value(next_obs, noise[: len(obs)])
        logs = self.learn_critics(obs, action, reward, not_terminated, next_value)
        logs |= self.learn_weighted_actor(obs, action, noise[len(obs) :])
        self.move_targets("critic")
        return {name: x.mean().item() for name, x in logs.items()}


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: logs and all parameters, with some advantages at their bound.
    With 1 for Adam's eps, its steps tell a mean from a sum too."""
    args = make_args(num_seeds=2, num_critics=3, learning_rate=2**-4, target_update_rate=0.25, gamma=0.875,
                     pessimism=0.75, beta=0.5, max_advantage=1.0)  # fmt: skip
    agent = awac.Agent(OBS_DIM, ACTION_DIM, args).double()
    randomize(agent, 0.5)
    adams_with(agent, eps=1)
    references = [Reference(agent, s, args) for s in range(2)]
    batches = [random_batch(2, 24, OBS_DIM, ACTION_DIM, (2, 48, ACTION_DIM), seed, torch.float64) for seed in range(3)]
    check_updates(awac, agent, references, batches, args)


def test_presets():
    """Tables 7 and 8, Figure 7; beta 2 online; what is given comes first."""
    args = awac.Args(preset="antmaze", beta=0.3)
    expected = ["modern", 5, 0, 0.3, 1, 2_000_000, 0]
    assert [getattr(args, name) for name in awac.AWAC_TESTBEDS["preset"]] == expected
    assert awac.Args(preset="online").beta == 2 and awac.Args(preset="online").online_steps == 250_000
