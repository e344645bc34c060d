"""The mathematics of sac.py against what shares no code with it: torch.distributions, whole updates in float64,
an environment that keeps a log of its own, and Minari's reader."""

import math

import harness
import minari
import numpy as np
import pytest
import torch
from reference import LoggedEnv, assert_same_layers, linear_layers, logged_rows, random_batch, randomize
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

sac = harness.load("sac")
update = sac.update

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


def constant_actor(agent, mean=0.0, log_std=0.0):
    """Makes the policy ignore its observation: this mean and log_std, before the tanh, in every dimension."""
    for parameter in agent.actor.parameters():
        parameter.data.zero_()
    agent.actor.net.biases[-1].data += torch.tensor([mean] * ACTION_DIM + [log_std] * ACTION_DIM)


# The policy's log-probability ---------------------------------------------------------------------
def test_log_prob_against_torch_distributions():
    agent = make_agent(make_args(num_seeds=3), size=0.3).double()
    obs, *_, noise = [x.double() for x in make_batch(S=3)]
    action, log_prob = agent.actor.sample(obs, noise)
    mean, log_std = agent.actor.net(obs).split(ACTION_DIM, dim=-1)
    policy = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    torch.testing.assert_close(action, (mean + log_std.exp() * noise).tanh())
    torch.testing.assert_close(log_prob, policy.log_prob(action), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(agent.actor(obs), mean.tanh())
    assert log_std.min() < -0.5 and log_std.max() > 0.5  # the part that depends on the state was there


@pytest.mark.parametrize("mean", [-60.0, -9.0, 0.5, 9.0, 60.0])
def test_log_prob_where_tanh_saturates(mean):
    """In float32 tanh(9) is 1 and log(1 - tanh^2) would be -inf; the density and its gradient stay right."""
    agent = make_agent(make_args())
    constant_actor(agent, mean)
    _, log_prob = agent.actor.sample(torch.zeros(1, 1, OBS_DIM), torch.full((1, 1, ACTION_DIM), 0.25))
    x = mean + 0.25
    log_slope = 2 * math.log(2) - 2 * np.logaddexp(x, -x)  # 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2
    expected = ACTION_DIM * (-0.5 * 0.25**2 - 0.5 * math.log(2 * math.pi) - log_slope)
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    log_prob.sum().backward()
    gradient = agent.actor.net.biases[-1].grad.flatten()[:ACTION_DIM]
    torch.testing.assert_close(gradient, torch.full((ACTION_DIM,), 2 * math.tanh(x)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("raw, clamped", [(-50.0, -20.0), (0.3, 0.3), (9.0, 2.0)])
def test_log_std_is_clamped(raw, clamped):
    agent = make_agent(make_args())
    constant_actor(agent, log_std=raw)
    action, _ = agent.actor.sample(torch.zeros(1, 1, OBS_DIM), torch.full((1, 1, ACTION_DIM), 1e-3))
    torch.testing.assert_close(action.atanh(), torch.full((1, 1, ACTION_DIM), 1e-3 * math.exp(clamped)))


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
        normal = Normal(mean, torch.clip(log_std, -20, 2).exp())
        x = normal.mean + normal.stddev * noise
        log_slope = 2 * math.log(2) - 2 * torch.logaddexp(x, -x)
        return x.tanh(), (normal.log_prob(x) - log_slope).sum(1)

    def smaller(self, critics, obs, action):
        return torch.minimum(*(critic(torch.cat([obs, action], 1))[:, 0] for critic in critics))

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self, obs, action, reward, next_obs, not_terminated, next_noise, noise):
        critic_step, actor_step, alpha_step = self.optimizers
        alpha = math.exp(self.log_alpha.item())
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, next_noise)
            soft_value = self.smaller(self.targets, next_obs, next_action) - alpha * next_log_prob
            y = torch.where(not_terminated > 0, reward + self.args.gamma * soft_value, reward)
        critic_loss = sum(((critic(torch.cat([obs, action], 1))[:, 0] - y) ** 2).mean() for critic in self.critics)
        self.step(critic_step, critic_loss)
        policy_action, log_prob = self.sample(obs, noise)
        actor_loss = (alpha * log_prob - self.smaller(self.critics, obs, policy_action)).mean()
        self.step(actor_step, actor_loss)
        self.step(alpha_step, -self.log_alpha * (log_prob.detach().mean() - ACTION_DIM))
        for target, online in zip(self.targets.parameters(), self.critics.parameters()):
            rate = self.args.target_update_rate
            target.data = (1 - rate) * target.data + rate * online.data
        return critic_loss.item(), actor_loss.item(), -log_prob.mean().item(), alpha


def test_update_against_reference():
    """Three updates of two seeds, which do not mix, with steps large enough that every question of order shows."""
    args = make_args(num_seeds=2, learning_rate=0.02, target_update_rate=0.3, gamma=0.9)
    agent = make_agent(args, size=0.4).double()
    references = [Reference(agent, s, args) for s in range(2)]
    names = "loss/critic", "loss/actor", "policy/entropy", "policy/alpha"
    for n in range(3):
        batch = [x.double() for x in make_batch(S=2, seed=n)]
        metrics = update(agent, *batch, args)
        for s, reference in enumerate(references):
            expected = reference.update(*(x[s] for x in batch))
            np.testing.assert_allclose([metrics[name][s].item() for name in names], expected, rtol=1e-6)
    for s, reference in enumerate(references):
        torch.testing.assert_close(agent.log_alpha[s], reference.log_alpha, rtol=0, atol=1e-7)
        assert_same_layers(agent.actor.net, s, reference.actor, atol=1e-7)
        for c in range(2):
            assert_same_layers(agent.critic, 2 * s + c, reference.critics[c], atol=1e-7)
            assert_same_layers(agent.target_critic, 2 * s + c, reference.targets[c], atol=1e-7)


@pytest.mark.parametrize("not_terminated", [0.0, 1.0])
def test_targets_by_hand(not_terminated):
    """y = r at a true end, else r + gamma (7 - alpha log pi). The critics say 0, their targets 7 and 9."""
    args = make_args(learning_rate=0.0, target_update_rate=0.0)
    agent = make_agent(args)
    agent.target_critic.biases[-1].data += torch.tensor([7.0, 9.0])[:, None, None]
    agent.log_alpha.data += math.log(0.5)
    batch = make_batch()
    batch[2].fill_(1.5)
    batch[4].fill_(not_terminated)
    batch[5].fill_(0.4)  # one action at every s'
    log_prob = ACTION_DIM * (-0.5 * 0.4**2 - 0.5 * math.log(2 * math.pi) + 2 * math.log(math.cosh(0.4)))
    y = 1.5 + not_terminated * 0.99 * (7 - 0.5 * log_prob)
    assert update(agent, *batch, args)["loss/critic"].item() == pytest.approx(2 * y**2, rel=1e-5)


@pytest.mark.parametrize("log_std, falls", [(-0.5, True), (-6.0, False)])
def test_temperature_moves_towards_the_target_entropy(log_std, falls):
    """alpha falls while the entropy is above -A, and grows while it is below."""
    args = make_args()
    agent = make_agent(args)
    constant_actor(agent, log_std=log_std)
    entropy = update(agent, *make_batch(), args)["policy/entropy"].item()
    assert (entropy > -ACTION_DIM) == falls
    assert agent.log_alpha.item() == pytest.approx(-3e-4 if falls else 3e-4, rel=1e-3)  # as Adam begins


# Random numbers, replay ---------------------------------------------------------------------------
def test_draws_are_a_function_of_seed_purpose_and_step():
    """Neighbours and earlier draws have no say, and no two draws are alike, next to each other or not."""
    seeds = 0, 1, 20, 40
    steps = 0, 1, 19, 20, 21, 40
    draws = {}
    for purpose in (sac.DRAWS, sac.EXPLORATION):
        for step in steps:
            uniform, noise = sac.draw(seeds, purpose, step, 5, (2, 3), "cpu")
            assert uniform.shape == (4, 5) and noise.shape == (4, 2, 3)
            for s, seed in enumerate(seeds):
                draws[seed, purpose, step] = uniform[s].tolist(), noise[s].tolist()
    for kind in range(2):
        numbers = [x for draw in draws.values() for x in np.ravel(draw[kind])]
        assert len(set(numbers)) == len(numbers)
    for step in reversed(steps):
        alone = sac.draw((20,), sac.EXPLORATION, step, 5, (2, 3), "cpu")
        assert tuple(x[0].tolist() for x in alone) == draws[20, sac.EXPLORATION, step]
    uniform, noise = sac.draw((0,), sac.DRAWS, 0, 10_000, (10_000,), "cpu")
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


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
LOGGED = "--env-id Logged-v0 --hidden-sizes 8 --batch-size 8 --eval-episodes 0 --device cpu".split()


@pytest.fixture
def main(monkeypatch):
    """main(*flags): main() in this process; returns its checkpoint."""

    def call(*flags):
        LoggedEnv.logs.clear()
        monkeypatch.setenv("MINARI_DATASETS_PATH", "what main() sets ends with the test")
        harness.run_main("sac", *flags if "--resume" in flags else [*LOGGED, *flags])
        folder = flags[flags.index("--run-dir" if "--run-dir" in flags else "--resume") + 1]
        return torch.load(f"{folder}/checkpoint.pt", weights_only=True)

    return call


def read(monkeypatch, root, name):
    """Episodes of a dataset as Minari lists and loads it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    assert name in minari.list_local_datasets()
    return list(minari.load_dataset(name).iterate_episodes())


def test_log_is_what_the_environment_saw(main, monkeypatch, tmp_path):
    """Every episode in order, in the environment's own units, terminations and truncations apart, also the last,
    which the run cuts; updates see no step across episodes, and a mask that is 0 at terminations only."""
    folder = tmp_path / "logged" / "log-v3"
    checkpoint = main("--num-steps", 60, "--num-seeds", 2, "--learning-starts", 30,
                      "--run-dir", tmp_path / "run", "--save-replay", folder)  # fmt: skip
    replay = checkpoint["agent"]["replay._extra_state"].numpy()
    for s in range(2):
        np.testing.assert_allclose(replay[s, :, :12], logged_rows(s), atol=1e-6)
    log = LoggedEnv.logs[0]
    assert len(replay[0]) == 60 and [len(episode) for episode in log] == [7, 7, 5] * 3 + [3]

    episodes = read(monkeypatch, tmp_path, "logged/log-v3")
    assert len(episodes) == 10
    for n, (episode, steps) in enumerate(zip(episodes, log)):
        obs, action, reward, next_obs = map(np.array, zip(*steps))
        np.testing.assert_array_equal(episode.observations, np.concatenate([obs, next_obs[-1:]]))
        np.testing.assert_allclose(episode.actions, action, atol=1e-6)
        np.testing.assert_allclose(episode.rewards, reward, rtol=1e-6)
        ended = n % 3 == 2
        assert episode.terminations.tolist() == [False] * (len(steps) - 1) + [ended]
        assert episode.truncations.tolist() == [False] * (len(steps) - 1) + [not ended]


def test_resume_goes_on_with_a_new_episode(main, monkeypatch, capsys, tmp_path):
    """... that the log keeps apart from the one the stop has cut."""
    before = main("--num-steps", 30, "--learning-starts", 10, "--run-dir", tmp_path / "run")
    resume = "--resume", tmp_path / "run", "--num-steps", 50, "--learning-rate", 0, "--save-replay"
    after = main(*resume, tmp_path / "all" / "log-v0")
    assert "from step 30 on, with a new episode" in capsys.readouterr().out
    assert after["num_updates"] == 50
    for name in ("actor.net.weights.0", "critic.weights.1", "log_alpha"):
        assert torch.equal(after["agent"][name], before["agent"][name])
    steps = before["optimizers"]["critic"][0]["step"], after["optimizers"]["critic"][0]["step"]
    assert [x.item() for x in steps] == [21, 41]
    assert torch.equal(after["agent"]["replay._extra_state"][:, :30], before["agent"]["replay._extra_state"])
    episodes = read(monkeypatch, tmp_path, "all/log-v0")
    assert [len(episode) for episode in episodes] == [7, 7, 5, 7, 4] + [7, 7, 5, 1]


def test_a_thinned_log_has_whole_episodes_at_even_distances(main, monkeypatch, tmp_path):
    """... with all that belongs to them, of both parts of a resumed run; about as many transitions as told."""
    main("--num-steps", 60, "--learning-starts", 1000, "--run-dir", tmp_path / "run")
    main("--resume", tmp_path / "run", "--num-steps", 300, "--save-replay", tmp_path / "all" / "log-v0")
    all_episodes = read(monkeypatch, tmp_path, "all/log-v0")
    assert [len(episode) for episode in all_episodes[:12]] == [7, 7, 5] * 3 + [3, 7, 7]
    for num_transitions in (30, 100, 210, 299, 300, 999):
        folder = tmp_path / f"log{num_transitions}" / "log-v0"
        main("--resume", tmp_path / "run", "--save-replay", folder, "--replay-transitions", num_transitions)
        kept = read(monkeypatch, tmp_path, f"log{num_transitions}/log-v0")
        starts = [episode.observations[0].tolist() for episode in all_episodes]
        indices = [starts.index(episode.observations[0].tolist()) for episode in kept]
        share = min(1, num_transitions / 300)
        assert len(kept) == int(share * len(all_episodes))
        assert set(np.diff(indices)) <= {math.floor(1 / share), math.ceil(1 / share)}
        for i, episode in zip(indices, kept):
            for name in ("observations", "actions", "rewards", "terminations", "truncations"):
                np.testing.assert_array_equal(getattr(episode, name), getattr(all_episodes[i], name))
        assert abs(sum(map(len, kept)) - min(300, num_transitions)) < 10


def test_rollouts_are_whole_episodes_of_the_last_policy(main, monkeypatch, tmp_path):
    main("--num-steps", 30, "--learning-starts", 10, "--run-dir", tmp_path / "run",
         "--save-rollouts", tmp_path / "some" / "rollouts-v0", "--num-rollout-steps", 20)  # fmt: skip
    episodes = read(monkeypatch, tmp_path, "some/rollouts-v0")
    assert [len(episode) for episode in episodes] == [5, 7, 7, 5]


def test_seed_k_among_three_is_the_run_with_seed_k(main, tmp_path):
    """The same random steps, to the bit, and the same agents after 50 updates."""
    runs = {}
    for seed, num_seeds in ((3, 3), (3, 1), (5, 1)):
        flags = "--seed", seed, "--num-seeds", num_seeds, "--run-dir", tmp_path / f"{seed}-{num_seeds}"
        runs[seed, num_seeds] = main("--num-steps", 69, "--learning-starts", 20, *flags)["agent"]
    together = runs[3, 3]
    for k in (0, 2):
        alone = runs[3 + k, 1]
        for name, x in alone.items():
            torch.testing.assert_close(together[name][k * len(x) : (k + 1) * len(x)], x, rtol=1e-3, atol=1e-4)
        assert torch.equal(together["replay._extra_state"][k, :20], alone["replay._extra_state"][0, :20])
    assert not torch.allclose(together["replay._extra_state"][0], together["replay._extra_state"][2])


def test_what_would_be_wrong_in_silence():
    for flags in ({"save_replay": "a/log-v0", "replay_size": 10}, {"save_replay": "log"}, {"gamma": 1.5}):
        with pytest.raises(SystemExit, match="^error: "):
            sac.Args(**flags)


def test_learns_to_swing_up(tmp_path):
    """Pendulum from about -1,200 of a random policy to -250 or more in 3,000 steps."""
    flags = "--env-id Pendulum-v1 --num-steps 3000 --learning-starts 400 --batch-size 64 --hidden-sizes 64 64"
    flags += " --learning-rate 2e-3 --target-update-rate 0.01 --eval-every 3000 --device cpu"
    done = harness.run("sac", *flags.split(), "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = harness.read_evaluations(tmp_path / "run")
    assert len(rows["return"]) == 10 and rows["return"].mean() > -250
