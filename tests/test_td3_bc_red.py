"""The mathematics of td3_bc_red.py against what shares no code with it: numbers worked by hand and whole
updates in float64. Probabilities and draws are those of iql_red.py, whose test checks them."""

import sys

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, forward, randomize

td3 = harness.load("td3_bc_red")
update = td3.update

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


def make_batch(S=1, B=32, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(1, 2, size=(2, S, B, OBS_DIM))
    action = rng.uniform(-1, 1, size=(S, B, ACTION_DIM))
    reward = rng.normal(size=(S, B))
    not_terminated = rng.random((S, B)) > 0.25
    noise = 2 * rng.normal(size=(S, B, ACTION_DIM))
    columns = obs, action, reward, next_obs, not_terminated, noise
    return [torch.from_numpy(np.float32(x)) for x in columns]


# Networks -----------------------------------------------------------------------------------------
def test_observations_are_normalised_by_all_of_the_data():
    """TD3+BC (4); what is saved has mean and deviation, so that a policy takes observations as they come."""
    obs = np.random.default_rng(0).normal(5, 3, size=(1000, OBS_DIM))
    agent = make_agent(make_args(), obs=obs)
    normalised = agent.normalize(torch.from_numpy(np.float32(obs)))
    expected = (obs - obs.mean(0)) / (obs.std(0) + 0.001)
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert {"normalize.mean", "normalize.std"} <= agent.state_dict().keys()


def test_first_weights():
    """Those of torch.nn.Linear: uniform within 1 / sqrt(in); a seed's do not depend on its neighbours."""
    obs = np.zeros((9, OBS_DIM))
    agent = td3.Agent(obs, ACTION_DIM, make_args(seed=3, num_seeds=3, hidden_sizes=(64, 64)))
    alone = td3.Agent(obs, ACTION_DIM, make_args(seed=4, hidden_sizes=(64, 64)))
    for x, y in zip(agent.parameters(), alone.parameters()):
        assert torch.equal(x.chunk(3)[1], y)
    for target, online in ((agent.target_actor, agent.actor), (agent.target_critic, agent.critic)):
        assert all(torch.equal(x, y) for x, y in zip(target.parameters(), online.parameters()))
    for mlp in (agent.actor[0], agent.critic):
        for weight, bias in zip(mlp.weights, mlp.biases):
            bound = weight.shape[1] ** -0.5
            assert 0.9 * bound < weight.abs().max() <= bound
            assert bias.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_first_critic():
    """It is the first of each seed's two, with a gradient to its input."""
    agent = make_agent(make_args(num_seeds=3), size=0.5)
    x = torch.randn(3, 8, OBS_DIM + ACTION_DIM, requires_grad=True)
    q = td3.first_critic(agent.critic, x)
    torch.testing.assert_close(q, agent.critic(x)[:, 0].squeeze(-1))
    (gradient,) = torch.autograd.grad(q.sum(), x)
    (expected,) = torch.autograd.grad(agent.critic(x)[:, 0].sum(), x)
    torch.testing.assert_close(gradient, expected)


# The update ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("noise, noise_clip, action", [(1.0, 0.5, 0.2), (9.0, 0.5, 0.5), (-9.0, 0.3, -0.3)])
def test_target_noise_by_hand(noise, noise_clip, action):
    """Q' is the action's first number, pi' is 0: the backup shows the noise, bounded twice."""
    args = make_args(noise_clip=noise_clip, gamma=0.5, hidden_sizes=())
    agent = make_agent(args)
    agent.target_critic.weights[0].data[:, OBS_DIM] = 1
    obs, action_, reward, next_obs, mask, z = make_batch()
    metrics = update(agent, obs, action_, reward.fill_(2), next_obs, mask.fill_(1), z.fill_(noise), False, args)
    assert metrics["loss/critic"].item() == pytest.approx(2 * (2 + 0.5 * action) ** 2, rel=1e-5)
    agent.target_actor[0].biases[0].data[:] = 9.0  # tanh is 1, the bound of actions
    metrics = update(agent, obs, action_, reward, next_obs, mask, z.fill_(9), False, args)
    q = agent.critic.biases[0].data.abs().max().item()
    assert metrics["loss/critic"].item() == pytest.approx(2 * (2 + 0.5) ** 2, rel=0.01), q


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


def test_updates_against_float64():
    """Four updates of two seeds, which do not mix: what is logged, and all parameters."""
    args = make_args(num_seeds=2, learning_rate=2**-5, target_update_rate=0.25)  # exact in float32
    agent = make_agent(args, size=0.6).double()
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    for n in range(1, 5):
        batch = [column.double() for column in make_batch(S=2, seed=n)]
        metrics = update(agent, *batch, n % 2 == 0, args)
        for s, reference in enumerate(references):
            logged = {name: x[s].mean().item() for name, x in metrics.items()}
            assert logged == pytest.approx(reference.update(*[x[s] for x in batch], n % 2 == 0), rel=1e-7)
    for s, reference in enumerate(references):
        reference.assert_same(agent, s, atol=1e-7)
    assert not any(x.requires_grad for x in metrics.values())


def test_main_moves_the_actor_at_every_second_update(monkeypatch, tmp_path):
    """... and gives `update` the columns of the data, rewards transformed, with noise of its own each time."""
    rng = np.random.default_rng(0)
    columns = [np.float32(rng.uniform(-1, 1, size=(60, d))) for d in (OBS_DIM, ACTION_DIM, 1, OBS_DIM)]
    columns[0][:, 0] = np.arange(60)
    columns[2] = columns[2][:, 0]
    data = td3.Data(*columns, rng.random(60) < 0.2, np.array([1.0, 2.0]), np.array([20, 40]), None, (0, 1))
    calls = []

    def recorder(agent, *inputs):
        calls.append(inputs[:-1])
        return update(agent, *inputs)

    monkeypatch.setattr(td3, "update", recorder)
    monkeypatch.setattr(td3, "load_data", lambda args: data)
    flags = "--num-updates 40 --hidden-sizes 8 --eval-episodes 0 --reward-transform shift --sampler uniform"
    monkeypatch.setattr(sys, "argv", ["td3_bc_red.py", *flags.split(), "--run-dir", str(tmp_path / "run")])
    td3.main()
    assert [turn for *_, turn in calls] == [False, True] * 20
    obs, action, reward, next_obs, not_terminated, noise = [torch.stack(x) for x in list(zip(*calls))[:-1]]
    i = obs[..., 0].long().numpy()
    for seen, logged in ((action, data.action), (reward, data.reward - 1), (next_obs, data.next_obs)):
        np.testing.assert_array_equal(seen.numpy(), logged[i])
    np.testing.assert_array_equal(not_terminated.numpy(), 1 - data.terminated[i])
    assert noise.std().item() == pytest.approx(1, abs=0.02) and noise.mean().item() == pytest.approx(0, abs=0.02)
    assert len({x.sum().item() for x in noise.flatten(0, 1)}) == 40


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bc_alpha, reached", [(2.5, 0.3), (0.0, -0.3)], ids=["TD3+BC", "cloning"])
def test_a_bandit_with_poor_data(bc_alpha, reached):
    """Reward is highest at action 0.5; the data is around -0.5. Cloning stays there, TD3+BC climbs out."""
    rng = np.random.default_rng(0)
    args = make_args(num_seeds=2, learning_rate=3e-3, bc_alpha=bc_alpha, hidden_sizes=(32, 32))
    obs = rng.normal(size=(1000, OBS_DIM))
    action = np.clip(rng.normal(-0.5, 0.6, size=(1000, 1)), -1, 1)
    reward = -((action[:, 0] - 0.5) ** 2)
    agent = td3.Agent(obs, 1, args)
    columns = [torch.from_numpy(np.float32(x)) for x in (obs, action, reward, obs, np.zeros(1000))]
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 401):
        i = torch.randint(1000, (2, 64), generator=generator)
        noise = torch.randn(2, 64, 1, generator=generator)
        update(agent, *[column[i] for column in columns], noise, n % 2 == 0, args)
    policy = torch.nn.Sequential(agent.normalize, agent.actor)
    mean = policy(columns[0].expand(2, -1, -1)).mean((1, 2))
    assert torch.all((mean > reached) if reached > 0 else (mean < reached)), mean
