"""The mathematics of crr_red.py against what shares no code with it: numbers worked by hand,
torch.distributions, and whole updates in float64. Probabilities and draws are tested with iql_red.py."""

import sys

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, forward, random_batch, randomize

crr = harness.load("crr_red")
update = crr.update

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return crr.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.0):
    """An agent of random numbers of this size, targets apart from their networks."""
    agent = crr.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, m=4, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, (S, m + 1, B, ACTION_DIM), seed)


@pytest.mark.parametrize(
    "flags, weight",
    [
        ({}, 2.7182818),  # exp((20 - 10) / 10)
        ({"beta": 5.0}, 7.3890561),
        ({"beta": 1.0}, 20),  # at most
        ({"advantage": "max"}, 1.3498588),  # exp((20 - 17) / 10)
        ({"weight": "binary"}, 1),
        ({"weight": "binary", "q": 9.0}, 0),
        ({"weight": "binary", "advantage": "max", "q": 12.0}, 0),
        ({"q": 0.0}, 0.3678794),
    ],
    ids=str,
)
def test_weights_by_hand(flags, weight):
    """Q is 100 times the action's first number, the policy is Normal(0, exp(-2)) and its four samples have
    Q of 17, 13, 7 and 3: their mean is 10, their maximum 17."""
    flags = dict(flags)
    q = flags.pop("q", 20.0)
    args = make_args(hidden_sizes=(), **flags)
    agent = make_agent(args)
    agent.critic.weights[0].data[:, OBS_DIM] = 100
    agent.actor.net.biases[0].data[..., ACTION_DIM:] = -2
    obs, action, reward, next_obs, mask, noise = make_batch()
    action[..., 0] = q / 100
    noise[:, :4, :, 0] = torch.tensor([17.0, 13, 7, 3])[:, None] / 100 / np.exp(-2)
    metrics = update(agent, obs, action, reward, next_obs, mask, noise, torch.tensor(0.0), args)
    assert metrics["value/advantage_weight"].mean().item() == pytest.approx(weight, rel=1e-4)


def test_targets_are_copied_when_told():
    args = make_args(num_seeds=2)
    agent = make_agent(args, size=0.5)
    before = [x.clone() for x in agent.target_actor.parameters()]
    update(agent, *make_batch(S=2), torch.tensor(0.0), args)
    assert all(torch.equal(x, y) for x, y in zip(agent.target_actor.parameters(), before))
    update(agent, *make_batch(S=2), torch.tensor(1.0), args)
    for target, online in ((agent.target_actor, agent.actor), (agent.target_critic, agent.critic)):
        assert all(torch.equal(x, y) for x, y in zip(target.parameters(), online.parameters()))


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
        if copied:
            for name in ("actor", "critic"):
                self.nets[f"target_{name}"] = [x.detach().clone() for x in self.nets[name]]
        logged = {"loss/actor": actor_loss, "loss/critic": critic_loss, "value/q": q, "value/advantage_weight": weight}
        return {name: x.mean().item() for name, x in logged.items()}


@pytest.mark.parametrize("flags", [{}, {"advantage": "max"}, {"weight": "binary"}], ids=str)
def test_updates_against_float64(flags):
    """Three updates of two seeds, which do not mix: what is logged, and all parameters."""
    args = make_args(num_seeds=2, learning_rate=2**-5, beta=0.5, **flags)  # exact in float32
    agent = make_agent(args, size=0.6).double()
    agent.actor.net.biases[-1].data[0, 0] = torch.tensor([0.0, 0.0, -30.0, 4.0])  # to be kept within [-20, 2]
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    for n in range(3):
        batch = [column.double() for column in make_batch(S=2, seed=n)]
        copied = torch.tensor(float(n == 1), dtype=torch.float64)
        metrics = update(agent, *batch, copied, args)
        for s, reference in enumerate(references):
            logged = {name: x[s].mean().item() for name, x in metrics.items()}
            expected = reference.update(*[x[s] for x in batch], copied)
            assert logged == pytest.approx(expected, rel=1e-7)
    for s, reference in enumerate(references):
        reference.assert_same(agent, s, atol=1e-7)
    assert not any(x.requires_grad for x in metrics.values())


def test_main_copies_targets_at_every_target_period(monkeypatch, tmp_path):
    """... and gives `update` the columns of the data, with noise of its own each time."""
    rng = np.random.default_rng(0)
    columns = [np.float32(rng.uniform(-1, 1, size=(60, d))) for d in (OBS_DIM, ACTION_DIM, 1, OBS_DIM)]
    columns[0][:, 0] = np.arange(60)
    columns[2] = columns[2][:, 0]
    data = crr.Data(*columns, rng.random(60) < 0.2, np.array([1.0, 2.0]), np.array([20, 40]), None, (0, 1))
    calls = []

    def recorder(agent, *inputs):
        calls.append([x.clone() for x in inputs[:-1]])
        return update(agent, *inputs)

    monkeypatch.setattr(crr, "update", recorder)
    monkeypatch.setattr(crr, "load_data", lambda args: data)
    flags = "--num-updates 60 --hidden-sizes 8 --eval-episodes 0 --reward-transform shift --target-period 7"
    monkeypatch.setattr(sys, "argv", ["crr_red.py", *flags.split(), "--run-dir", str(tmp_path / "run")])
    crr.main()
    obs, action, reward, next_obs, not_terminated, noise, copied = [torch.stack(x) for x in zip(*calls)]
    assert [n for n, x in enumerate(copied, 1) if x] == [7, 14, 21, 28, 35, 42, 49, 56]
    i = obs[..., 0].long().numpy()
    for seen, logged in ((action, data.action), (reward, data.reward - 1), (next_obs, data.next_obs)):
        np.testing.assert_array_equal(seen.numpy(), logged[i])
    np.testing.assert_array_equal(not_terminated.numpy(), 1 - data.terminated[i])
    assert noise.shape[2] == 5
    assert noise.std().item() == pytest.approx(1, abs=0.01) and noise.mean().item() == pytest.approx(0, abs=0.01)
    assert len({x.sum().item() for x in noise.flatten(0, 2)}) == 60 * 5


@pytest.mark.parametrize("beta, reached", [(0.1, True), (1e9, False)], ids=["CRR", "cloning"])
def test_a_bandit_with_poor_data(beta, reached):
    """Reward is highest at action 0.5; the data is around -0.4. Cloning stays there, CRR climbs out."""
    rng = np.random.default_rng(0)
    args = make_args(num_seeds=2, learning_rate=3e-3, beta=beta, hidden_sizes=(32, 32), gamma=0.0)
    obs = rng.normal(size=(1000, OBS_DIM))
    action = np.clip(rng.normal(-0.4, 0.6, size=(1000, 1)), -1, 1)
    reward = -((action[:, 0] - 0.5) ** 2)
    agent = crr.Agent(OBS_DIM, 1, args)
    columns = [torch.from_numpy(np.float32(x)) for x in (obs, action, reward, obs, np.zeros(1000))]
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 401):
        i = torch.randint(1000, (2, 64), generator=generator)
        noise = torch.randn(2, 5, 64, 1, generator=generator)
        update(agent, *[column[i] for column in columns], noise, torch.tensor(1.0 * (n % 20 == 0)), args)
    mean = agent.actor(columns[0].expand(2, -1, -1)).mean((1, 2))
    assert torch.all((mean > 0.1) == reached), mean
