"""The mathematics of sac.py against what shares no code with it: whole updates in float64; its replay and its logs. Its
runs are tested in test_online.py."""

import itertools
import math

import harness
import numpy as np
import pytest
import torch
from reference import assert_same_layers, check_updates, linear_layers, random_batch, randomize
from test_online import main, read
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

sac = harness.load("sac")

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return sac.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.0):
    """An agent of random numbers of this size, so that targets and critics differ."""
    agent = sac.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, next_noise, noise."""
    *columns, noise = random_batch(S, B, OBS_DIM, ACTION_DIM, (2, S, B, ACTION_DIM), seed)
    return [*columns, *noise]


# The policy's log-probability ---------------------------------------------------------------------
@pytest.mark.parametrize("mean", [-60.0, -9.0, 0.5, 9.0, 60.0])
def test_log_prob_where_tanh_saturates(mean):
    """In float32 tanh(9) is 1 and log(1 - tanh^2) would be -inf; the density and its gradient stay right."""
    actor = make_agent(make_args()).actor
    actor.net.biases[-1].data[..., :ACTION_DIM] += mean
    _, log_prob = actor.sample(torch.zeros(1, 1, OBS_DIM), torch.full((1, 1, ACTION_DIM), 0.25))
    x = mean + 0.25
    log_slope = 2 * math.log(2) - 2 * np.logaddexp(x, -x)  # 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2
    expected = ACTION_DIM * (-0.5 * 0.25**2 - 0.5 * math.log(2 * math.pi) - log_slope)
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    log_prob.sum().backward()
    gradient = actor.net.biases[-1].grad.flatten()[:ACTION_DIM]
    torch.testing.assert_close(gradient, torch.full((ACTION_DIM,), 2 * math.tanh(x)), rtol=1e-5, atol=0)


# The update ---------------------------------------------------------------------------------------
class Reference:
    """One seed in float64: torch.nn modules, torch.distributions, plain Adam, one full loss per network."""

    def __init__(self, agent, s, args):
        self.args = args
        self.actor = linear_layers(agent.actor.net, s)
        self.critics = torch.nn.ModuleList(linear_layers(agent.critic, 2 * s + c) for c in range(2))
        self.targets = torch.nn.ModuleList(linear_layers(agent.target_critic, 2 * s + c) for c in range(2))
        self.log_alpha = agent.log_alpha[s].detach().clone().requires_grad_()
        trained = self.critics.parameters(), self.actor.parameters(), [self.log_alpha]
        self.optimizers = [torch.optim.Adam(x, lr=args.learning_rate, foreach=False, fused=False) for x in trained]

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).split(ACTION_DIM, dim=1)
        assert log_std.min() < -20 and log_std.max() > 2
        normal = Independent(Normal(mean, torch.clip(log_std, -20, 2).exp()), 1)
        tanh = TanhTransform(cache_size=1)  # inverts by memory, not by atanh
        action = tanh(normal.mean + normal.stddev * noise)
        return action, TransformedDistribution(normal, [tanh]).log_prob(action)

    def q(self, critics, obs, action):
        return torch.stack([critic(torch.cat([obs, action], 1))[:, 0] for critic in critics])

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self, obs, action, reward, next_obs, not_terminated, next_noise, noise):
        critic_step, actor_step, alpha_step = self.optimizers
        alpha = math.exp(self.log_alpha.item())
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, next_noise)
            soft_value = self.q(self.targets, next_obs, next_action).amin(0) - alpha * next_log_prob
            y = torch.where(not_terminated > 0, reward + self.args.gamma * soft_value, reward)
        q = self.q(self.critics, obs, action)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        self.step(critic_step, critic_loss)
        policy_action, log_prob = self.sample(obs, noise)
        actor_loss = (alpha * log_prob - self.q(self.critics, obs, policy_action).amin(0)).mean()
        self.step(actor_step, actor_loss)
        self.step(alpha_step, -self.log_alpha * (log_prob.detach().mean() - ACTION_DIM))
        for target, online in zip(self.targets.parameters(), self.critics.parameters()):
            rate = self.args.target_update_rate
            target.data = (1 - rate) * target.data + rate * online.data
        logs = {"loss/critic": critic_loss.item(), "loss/actor": actor_loss.item(), "value/q": q.mean().item()}
        return logs | {"policy/entropy": -log_prob.mean().item(), "policy/alpha": alpha}

    def assert_same(self, agent, s, atol):
        torch.testing.assert_close(agent.log_alpha[s], self.log_alpha, rtol=0, atol=atol)
        assert_same_layers(agent.actor.net, s, self.actor, atol)
        for c in range(2):
            assert_same_layers(agent.critic, 2 * s + c, self.critics[c], atol)
            assert_same_layers(agent.target_critic, 2 * s + c, self.targets[c], atol)


def test_update_against_reference():
    """Three updates of two seeds, which do not mix, with steps large enough that every question of order shows."""
    args = make_args(num_seeds=2, learning_rate=0.02, target_update_rate=0.3, gamma=0.9)
    agent = make_agent(args, size=0.4).double()
    agent.actor.net.biases[-1].data[:, 0, ACTION_DIM:] = torch.tensor([-20.0, 2.0])  # the bounds of log std
    references = [Reference(agent, s, args) for s in range(2)]
    batches = [[x.double() for x in make_batch(S=2, seed=seed)] for seed in range(3)]
    check_updates(sac, agent, references, batches, args)


# Random numbers, replay ---------------------------------------------------------------------------
def test_draws_of_steps_and_purposes():
    """Each step has a row of its chunk; no two steps or purposes draw alike."""
    numbers = []
    for purpose, step in itertools.product((sac.DRAWS, sac.EXPLORATION), (0, 1, 19, 20, 21, 40)):
        drawn = sac.draw((0, 20), purpose, step, 5, (2, 3), "cpu")
        chunk = sac.draw_chunk((0, 20), purpose, step // 20, 5, (2, 3), "cpu")
        assert all(torch.equal(x, y[step % 20]) for x, y in zip(drawn, chunk))
        numbers += [*drawn[0].flatten().tolist(), *drawn[1].flatten().tolist()]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("num_data", [0, 3])
@pytest.mark.parametrize("num_added", [1, 4, 5, 11])
def test_replay_draws_evenly_from_data_and_own_newest_steps(num_data, num_added):
    """Row n of seed s is (10 n + s), data are negative; the replay holds 5 steps."""
    replay = sac.Replay(-torch.ones(num_data, 2), 2, 5)
    for n in range(num_added):
        replay.add([np.array([[10.0 * n], [10.0 * n + 1]]), np.zeros((2, 1), bool)])
    kept = range(max(0, num_added - 5), num_added)
    uniform = (torch.arange(2 * 840, dtype=torch.float64) / 1680).expand(2, -1)
    drawn = replay.rows[replay.index(uniform)][..., 0]
    for s in range(2):
        values, counts = drawn[s].unique(return_counts=True)
        assert values.tolist() == [-1.0] * (num_data > 0) + [10.0 * n + s for n in kept]
        each = 1680 / (num_data + len(kept))
        expected = [num_data * each] * (num_data > 0) + [each] * len(kept)
        np.testing.assert_allclose(counts, expected, atol=1)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_replay_comes_back_oldest_first(size):
    """... into one of the same size, a larger or a smaller one, which keeps the newest, and goes on in this order."""
    replay = sac.Replay(torch.empty(0, 1), 1, 5)
    for n in range(7):
        replay.add([np.array([[n]])])
    again = sac.Replay(torch.empty(0, 1), 1, size)
    again.load_state_dict(replay.state_dict())
    again.add([np.array([[7]])])
    drawn = again.rows[again.index(torch.arange(100.0, dtype=torch.float64)[None] / 100)].unique()
    assert drawn.tolist() == list(range(8))[-min(size, 6) :]


# Episodes, logs -----------------------------------------------------------------------------------
def test_a_thinned_log_has_whole_episodes_at_even_distances(tmp_path):
    """... with all that belongs to them, of both parts of a resumed run; about as many transitions as told."""
    main("sac", "--num-steps", 60, "--learning-starts", 1000, "--run-dir", tmp_path / "run")
    main("sac", "--resume", tmp_path / "run", "--num-steps", 300, "--save-replay", tmp_path / "all" / "log-v0")
    all_episodes = read(tmp_path / "all" / "log-v0")
    assert [len(episode) for episode in all_episodes[:12]] == [7, 7, 5] * 3 + [3, 7, 7]
    for num_transitions in (30, 100, 210, 299, 300, 999):
        folder = tmp_path / f"log{num_transitions}" / "log-v0"
        main("sac", "--resume", tmp_path / "run", "--save-replay", folder, "--replay-transitions", num_transitions)
        kept = read(folder)
        starts = [episode.observations[0].tolist() for episode in all_episodes]
        indices = [starts.index(episode.observations[0].tolist()) for episode in kept]
        share = min(1, num_transitions / 300)
        assert len(kept) == int(share * len(all_episodes))
        assert set(np.diff(indices)) <= {math.floor(1 / share), math.ceil(1 / share)}
        for i, episode in zip(indices, kept):
            for name in ("observations", "actions", "rewards", "terminations", "truncations"):
                np.testing.assert_array_equal(getattr(episode, name), getattr(all_episodes[i], name))
        assert abs(sum(map(len, kept)) - min(300, num_transitions)) < 10


def test_rollouts_are_whole_episodes_of_the_last_policy(tmp_path):
    main("sac", "--num-steps", 30, "--learning-starts", 10, "--run-dir", tmp_path / "run",
         "--save-rollouts", tmp_path / "some" / "rollouts-v0", "--num-rollout-steps", 20)  # fmt: skip
    episodes = read(tmp_path / "some" / "rollouts-v0")
    assert [len(episode) for episode in episodes] == [5, 7, 7, 5]


def test_what_would_be_wrong_in_silence():
    for flags in ({"save_replay": "a/log-v0", "replay_size": 10}, {"save_replay": "log"}, {"gamma": 1.5}):
        with pytest.raises(SystemExit, match="^error: "):
            sac.Args(**flags)
