"""The mathematics of awac.py against what shares no code with it: numbers worked by hand, and whole updates in
float64. Networks and acting, which its siblings share, are tested in theirs, Replay and Environments in test_sac.py,
its two stages in test_stages.py."""

import math
from functools import partial

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, assert_goes_on, forward, four_states, pessimistic, random_columns, randomize

awac = harness.load("awac")
update = awac.update

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return awac.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


# Weights, actions ---------------------------------------------------------------------------------
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


def test_numbers_are_a_function_of_seed_and_update():
    """Neighbours and global generators have no say, no two are alike, and the uniform ones are float64."""
    seen = []
    for step in (0, 20, 40):
        together = awac.draw_uniforms_and_noise((0, 20, 40), 8, (5, ACTION_DIM), "cpu", step)
        for s, seed in enumerate((0, 20, 40)):
            torch.manual_seed(seed)
            alone = awac.draw_uniforms_and_noise([seed], 8, (5, ACTION_DIM), "cpu", step)
            assert all(torch.equal(x[:, s], y[:, 0]) for x, y in zip(together, alone))
        seen.append(together[0].flatten())
    uniforms = torch.cat(seen)
    assert together[0].shape == (20, 3, 8) and together[1].shape == (20, 3, 5, ACTION_DIM)
    assert len(uniforms.unique()) == len(uniforms) and (uniforms.float() != uniforms).float().mean() > 0.9


# The update ---------------------------------------------------------------------------------------
class Reference(Learner):
    """One seed of AWAC, written from the equations, with Adam by hand."""

    def __init__(self, agent, s, args):
        super().__init__(agent, s, args)
        self.clipped = []

    def mean(self, obs):
        return forward(self.nets["actor"], obs)[0].tanh()

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        """What the script logs of this seed."""
        args = self.args
        B = len(obs)
        next_action = (self.mean(next_obs) + (0.2 * noise[:B]).clamp(-0.3, 0.3)).clamp(-1, 1).detach()
        next_q = pessimistic(forward(self.nets["target_critic"], next_obs, next_action), args.pessimism).detach()
        y = torch.where(not_terminated > 0, reward + args.gamma * next_q, reward)
        q = forward(self.nets["critic"], obs, action).squeeze(2)  # (C, B)
        critic_loss = ((q - y) ** 2).mean(1).sum() / 2
        self.minimize(critic=critic_loss)

        policy_action = (self.mean(obs) + 0.2 * noise[B:]).clamp(-1, 1)
        policy_q = pessimistic(forward(self.nets["critic"], obs, policy_action), args.pessimism)
        advantage = (forward(self.nets["critic"], obs, action).mean(0).squeeze(1) - policy_q).detach()
        self.clipped.append(advantage > args.max_advantage)
        weight = (advantage.minimum(torch.tensor(args.max_advantage)) / args.beta).exp()
        weight = weight / weight.sum()
        log_prob = torch.distributions.Normal(self.mean(obs), 0.2).log_prob(action).sum(1)
        actor_loss = -(weight * log_prob).sum()
        self.minimize(actor=actor_loss)
        self.move_targets("critic")
        logs = {"loss/critic": critic_loss, "loss/actor": actor_loss, "value/q": q, "value/advantage": advantage}
        logs["value/effective_batch"] = 1 / (weight**2).sum()
        return {name: x.mean().item() for name, x in logs.items()}


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: logs and all parameters, with some advantages at their bound.
    With 1 for Adam's eps, its steps tell a mean from a sum too."""
    args = make_args(num_seeds=2, num_critics=3, learning_rate=2**-4, target_update_rate=0.25, gamma=0.875,
                     pessimism=0.75, beta=0.5, max_advantage=3.0)  # fmt: skip
    agent = awac.Agent(OBS_DIM, ACTION_DIM, args).double()
    randomize(agent, 0.5)
    adams_with(agent, eps=1)
    references = [Reference(agent, s, args) for s in range(2)]
    columns = random_columns()
    rng = np.random.default_rng(0)
    for _ in range(3):
        index = rng.integers(60, size=(2, 24))
        noise = torch.from_numpy(rng.normal(size=(2, 48, ACTION_DIM)))
        inputs = [*[column[index] for column in columns], noise]
        metrics = update(agent, *inputs, args)
        for s, reference in enumerate(references):
            logged = {name: x[s].mean().item() for name, x in metrics.items()}
            assert logged == pytest.approx(reference.update(*[x[s] for x in inputs]), rel=1e-9)
    assert not any(x.requires_grad for x in metrics.values())
    for s, reference in enumerate(references):
        assert 0.1 < torch.cat(reference.clipped).double().mean() < 0.9
        reference.assert_same(agent, s, atol=1e-9)


def test_presets():
    """Tables 7 and 8, Figure 7; beta 2 online; what is given comes first."""
    args = awac.Args(preset="antmaze", beta=0.3)
    expected = ["modern", 5, 0, 0.3, 1, 2_000_000, 0]
    assert [getattr(args, name) for name in awac.AWAC_TESTBEDS["preset"]] == expected
    assert awac.Args(preset="online").beta == 2 and awac.Args(preset="online").online_steps == 250_000


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [{}, {"beta": 1e9}, {"beta": -0.5}, {"gamma": 0.0}], ids=str)
def test_a_chain_of_four_states(flags):
    """Its end pays 5, a step costs 0.1. Most of the data quits, for 0.5 at once, and so does who clones it, who
    flips the advantage, who sees the next reward only. AWAC goes on."""
    columns = four_states()
    args = make_args(num_seeds=3, learning_rate=3e-3, target_update_rate=0.05, **{"beta": 0.5, **flags})
    agent = awac.Agent(4, 1, args)
    for step in range(0, 600, awac.CHUNK):
        for u, noise in zip(*awac.draw_uniforms_and_noise(range(3), 128, (256, 1), "cpu", step)):
            index = (u * 3000).long()
            update(agent, *[column[index] for column in columns], noise, args)
    assert_goes_on(agent.actor, right=not flags)
