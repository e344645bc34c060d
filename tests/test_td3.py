"""The mathematics of td3.py against what shares no code with it: whole updates in float64 by torch.nn, an
environment with a log of its own, dm_control's own rewards in the states that were logged, and Minari's reader."""

import harness
import minari
import numpy as np
import pytest
import torch
from reference import LoggedEnv, assert_same_layers, linear_layers, logged_rows, random_batch, randomize

td3 = harness.load("td3")

OBS_DIM = 4
ACTION_DIM = 2


def make_args(hidden_sizes=(16, 16), **flags):
    return td3.Args(hidden_sizes=hidden_sizes, device="cpu", **flags)


def make_agent(args, size=0.0):
    """An agent of random numbers of this size, so that targets and online networks differ."""
    agent = td3.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    batch = random_batch(S, B, OBS_DIM, ACTION_DIM, (S, B, ACTION_DIM), seed)
    batch[0][0, 0, 0] = 40  # so that RND's clip at 5 standard deviations counts
    return batch


# The update ---------------------------------------------------------------------------------------
class Reference:
    """One seed in float64: torch.nn modules, plain Adam, a loop over critics, moments of all errors at once."""

    def __init__(self, agent, s, args):
        self.args = args
        self.C = 2 if args.algorithm == "td3" else 1
        self.actor, self.target_actor = (linear_layers(x[0], s) for x in (agent.actor, agent.target_actor))
        mlps = agent.critic, agent.target_critic
        self.critics, self.targets = ([linear_layers(x, self.C * s + c) for c in range(self.C)] for x in mlps)
        critics = [x for critic in self.critics for x in critic.parameters()]
        trained = [critics, list(self.actor.parameters())]
        if args.objective == "rnd":
            self.predictor = linear_layers(agent.rnd.predictor, s)
            self.random = linear_layers(agent.rnd.target, s)
            self.whiten = torch.nn.BatchNorm1d(OBS_DIM, affine=False, dtype=torch.float64)
            self.errors = []
            trained += [list(self.predictor.parameters())]
        self.optimizers = [torch.optim.Adam(x, lr=args.learning_rate, foreach=False, fused=False) for x in trained]

    def step(self, optimizer, loss):
        for x in self.optimizers:
            x.zero_grad()
        loss.backward()
        self.optimizers[optimizer].step()

    def error(self, obs):
        x = torch.clip(self.whiten(obs), -5, 5)
        return ((self.predictor(x) - self.random(x)) ** 2).sum(1) / 512

    def novelty(self, obs):
        self.step(2, self.error(obs).mean())
        self.errors.append(self.error(obs).detach().numpy())
        errors = np.array(self.errors)
        variance = errors.var(axis=1, ddof=1).mean() + errors.mean(axis=1).var()  # within batches and between
        return torch.from_numpy(errors[-1] / np.sqrt(variance))

    def q(self, critic, obs, action):
        return critic(torch.cat([obs, action], 1))[:, 0]

    def update(self, obs, action, reward, next_obs, not_terminated, noise, actor_turn):
        args = self.args
        if args.objective == "rnd":
            reward = self.novelty(obs)
        with torch.no_grad():
            next_action = torch.tanh(self.target_actor(next_obs))
            if args.algorithm == "td3":
                next_action += torch.clip(noise * args.policy_noise, -args.noise_clip, args.noise_clip)
                next_action = torch.clip(next_action, -1, 1)
            next_q = np.min([self.q(x, next_obs, next_action).numpy() for x in self.targets], axis=0)
            y = torch.where(not_terminated > 0, reward + args.gamma * torch.from_numpy(next_q), reward)
        critic_loss = sum(((self.q(x, obs, action) - y) ** 2).mean() for x in self.critics)
        self.step(0, critic_loss)
        if not actor_turn:
            return critic_loss.item(), reward.mean().item()
        actor_loss = -self.q(self.critics[0], obs, torch.tanh(self.actor(obs))).mean()
        self.step(1, actor_loss)
        for target, online in (*zip(self.targets, self.critics), (self.target_actor, self.actor)):
            for x, new_x in zip(target.parameters(), online.parameters()):
                x.data = (1 - args.target_update_rate) * x.data + args.target_update_rate * new_x.data
        return critic_loss.item(), reward.mean().item(), actor_loss.item()


@pytest.mark.parametrize("objective", ["task", "rnd"])
@pytest.mark.parametrize("algorithm", ["td3", "ddpg"])
def test_update_against_reference(algorithm, objective):
    """Four updates of two seeds, which do not mix, with steps large enough that every question of order shows."""
    args = make_args(algorithm=algorithm, objective=objective, num_seeds=2, learning_rate=0.02,
                     target_update_rate=0.3, gamma=0.9, policy_noise=0.4)  # fmt: skip
    agent = make_agent(args, size=0.4).double()
    references = [Reference(agent, s, args) for s in range(2)]
    for n in range(4):
        batch = [x.double() for x in make_batch(S=2, seed=n)]
        actor_turn = n % 2 == 1
        names = ["loss/critic", "value/reward"] + ["loss/actor"] * actor_turn
        metrics = td3.update(agent, *batch, actor_turn, args)
        assert ("loss/actor" in metrics) == actor_turn
        for s, reference in enumerate(references):
            expected = reference.update(*(x[s] for x in batch), actor_turn)
            np.testing.assert_allclose([metrics[name][s].mean().item() for name in names], expected, rtol=1e-6)
    for s, reference in enumerate(references):
        pairs = [(agent.actor[0], s, reference.actor), (agent.target_actor[0], s, reference.target_actor)]
        for c in range(reference.C):
            pairs += [(agent.critic, reference.C * s + c, reference.critics[c])]
            pairs += [(agent.target_critic, reference.C * s + c, reference.targets[c])]
        if objective == "rnd":
            pairs += [(agent.rnd.predictor, s, reference.predictor), (agent.rnd.target, s, reference.random)]
        for mlp, i, expected in pairs:
            assert_same_layers(mlp, i, expected, atol=1e-6)


# Novelty ------------------------------------------------------------------------------------------
def test_novelty_is_zero_where_the_predictor_is_right():
    agent, obs = td3.Agent(OBS_DIM, ACTION_DIM, make_args(objective="rnd")), make_batch()[0]
    assert agent.rnd.reward(obs).min() > 0
    agent.rnd.predictor.load_state_dict(agent.rnd.target.state_dict())
    assert (agent.rnd.reward(obs) == 0).all()


def test_novelty_has_a_running_scale_of_one():
    """Rewards of 20 batches, whose errors differ in size, and all of them again in units of the final scale."""
    agent = td3.Agent(OBS_DIM, ACTION_DIM, make_args(objective="rnd", num_seeds=2))
    errors = []
    for n in range(20):
        obs = make_batch(S=2, B=512, seed=n)[0]
        obs[1] = obs[1].sign() * obs[1].abs() ** (1 + n / 10)
        errors.append(agent.rnd.error(obs).detach())
        agent.rnd.reward(obs)
    errors = torch.cat(errors, dim=1)  # (S, 10,240)
    scale = errors / agent.rnd.var.sqrt()
    np.testing.assert_allclose(scale.std(dim=1), [1, 1], rtol=1e-3)
    np.testing.assert_allclose(agent.rnd.mean[:, 0], errors.mean(1), rtol=1e-5)


def test_novelty_falls_where_the_agent_has_been():
    """... to a fraction, and stays where it has not been."""
    args = make_args(objective="rnd")
    agent, batch = td3.Agent(OBS_DIM, ACTION_DIM, args), make_batch(B=64)
    batch[0][..., 1:] = batch[0][..., :1]
    elsewhere = batch[0] * torch.tensor([1, -1, 1, -1])
    before = agent.rnd.error(batch[0]).mean().item(), agent.rnd.error(elsewhere).mean().item()
    novelty = [td3.update(agent, *batch, True, args)["value/reward"].mean().item() for _ in range(150)]
    after = agent.rnd.error(batch[0]).mean().item(), agent.rnd.error(elsewhere).mean().item()
    assert novelty[-1] < 0.2 * novelty[0] and after[0] < 0.1 * before[0] and after[1] > 0.3 * before[1]


# Episodes, logs -----------------------------------------------------------------------------------
LOGGED = "--env-id Logged-v0 --hidden-sizes 8 --batch-size 8 --eval-episodes 0 --device cpu".split()


@pytest.fixture
def main(monkeypatch):
    """main(*flags): main() in this process; returns the checkpoint."""

    def call(*flags):
        LoggedEnv.logs.clear()
        monkeypatch.setenv("MINARI_DATASETS_PATH", "what main() sets ends with the test")
        harness.run_main("td3", *flags if "--resume" in flags else [*LOGGED, *flags])
        folder = flags[flags.index("--run-dir" if "--run-dir" in flags else "--resume") + 1]
        return torch.load(f"{folder}/checkpoint.pt", weights_only=True)

    return call


def read(folder):
    """Episodes of a dataset as Minari loads it."""
    return list(minari.MinariDataset(folder / "data").iterate_episodes())


def test_log_is_what_the_environments_saw(main, tmp_path):
    """All episodes of all seeds in order, in the environment's own units, terminations and truncations apart, also
    the last ones, which the run cuts; actions are random at first, then the policy's with its noise."""
    folder = tmp_path / "logged" / "log-v3"
    checkpoint = main("--num-steps", 60, "--num-seeds", 2, "--learning-starts", 30, "--learning-rate", 0,
                      "--run-dir", tmp_path / "run", "--save-replay", folder)  # fmt: skip
    replay = checkpoint["agent"]["replay._extra_state"].numpy()
    agent = td3.Agent(OBS_DIM, 2, make_args(hidden_sizes=(8,), num_seeds=2))  # has learned nothing
    for s in range(2):
        rows = logged_rows(s)
        np.testing.assert_allclose(replay[s, :, :12], rows, atol=1e-6)
        obs, action = np.float32(rows[:, :4]), rows[:, 4:6]
        draws = [td3.draw((0, 1), td3.EXPLORATION, n, 2, (2,), "cpu") for n in range(60)]
        uniform, noise = (np.array([x[s].numpy() for x in column]) for column in zip(*draws))
        mean = agent.actor(torch.from_numpy(obs).expand(2, -1, -1))[s].detach().numpy()
        np.testing.assert_allclose(action[:30], 2 * uniform[:30] - 1, atol=1e-5)
        np.testing.assert_allclose(action[30:], np.clip(mean + 0.2 * noise, -1, 1)[30:], atol=1e-5)
    assert [len(episode) for episode in LoggedEnv.logs[0]] == [7, 7, 5] * 3 + [3]

    episodes = read(folder)
    assert len(episodes) == 20
    for n, (episode, steps) in enumerate(zip(episodes, LoggedEnv.logs[0] + LoggedEnv.logs[1])):
        obs, action, reward, next_obs = map(np.array, zip(*steps))
        np.testing.assert_array_equal(episode.observations, np.concatenate([obs, next_obs[-1:]]))
        np.testing.assert_allclose(episode.actions, action, atol=1e-6)
        np.testing.assert_allclose(episode.rewards, reward, rtol=1e-6)
        ended = n % 10 % 3 == 2
        assert [*episode.terminations.nonzero()[0], *episode.truncations.nonzero()[0]] == [len(steps) - 1]
        assert episode.terminations[-1] == ended


@pytest.mark.parametrize("algorithm, actor_steps", [("td3", (11, 21)), ("ddpg", (21, 41))])
def test_resume_goes_on_with_a_new_episode(main, capsys, tmp_path, algorithm, actor_steps):
    """... that the log keeps apart from the one the stop has cut. TD3's actor learns in every second update."""
    flags = "--algorithm", algorithm, "--objective", "rnd", "--learning-starts", 10
    before = main("--num-steps", 30, *flags, "--run-dir", tmp_path / "run")
    after = main("--resume", tmp_path / "run", "--num-steps", 50, "--save-replay", tmp_path / "all" / "log-v0")
    assert "from step 30 on, with a new episode" in capsys.readouterr().out
    for name, expected in (("critic", (21, 41)), ("rnd", (21, 41)), ("actor", actor_steps)):
        assert tuple(x["optimizers"][name][0]["step"].item() for x in (before, after)) == expected, name
    assert after["agent"]["rnd.count"].item() == 41
    assert torch.equal(after["agent"]["replay._extra_state"][:, :30], before["agent"]["replay._extra_state"])
    assert [len(episode) for episode in read(tmp_path / "all" / "log-v0")] == [7, 7, 5, 7, 4] + [7, 7, 5, 1]


def test_seed_k_among_three_is_the_run_with_seed_k(main, tmp_path):
    """The same random steps, to the bit, and the same agents after 50 updates."""
    runs = {}
    for seed, num_seeds in ((3, 3), (3, 1), (5, 1)):
        flags = "--seed", seed, "--num-seeds", num_seeds, "--run-dir", tmp_path / f"{seed}-{num_seeds}"
        runs[seed, num_seeds] = main("--num-steps", 69, "--learning-starts", 20, "--objective", "rnd", *flags)
    together = runs[3, 3]["agent"]
    for k in (0, 2):
        alone = runs[3 + k, 1]["agent"]
        for name, x in alone.items():
            torch.testing.assert_close(together[name][k * len(x) : (k + 1) * len(x)], x, rtol=1e-3, atol=1e-4)
        assert torch.equal(together["replay._extra_state"][k, :20], alone["replay._extra_state"][0, :20])
    assert not torch.allclose(together["replay._extra_state"][0], together["replay._extra_state"][2])


# dm_control ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["walker-run", "quadruped-walk", "humanoid-stand"])
def test_physics_and_control_give_the_logged_rewards_again(main, tmp_path, task):
    """... in a fresh environment that is set to each state, and the logged observations, to float32's precision."""
    pytest.importorskip("shimmy")
    suite = pytest.importorskip("dm_control.suite")
    folder = tmp_path / "log" / "of-v0"
    main("--env-id", f"dm_control/{task}-v0", "--num-steps", 1040, "--num-seeds", 1, "--learning-starts", 1035,
         "--run-dir", tmp_path / "run", "--save-replay", folder)  # fmt: skip
    env = suite.load(*task.split("-"))
    episodes = read(folder)
    assert [len(episode) for episode in episodes] == [1000, 40]
    for episode in episodes:
        assert not episode.terminations.any() and episode.truncations[-1]
        states, controls = episode.infos["physics"], episode.infos["control"]
        assert len(states) == len(controls) == len(episode) + 1 and (controls[0] == 0).all()
        np.testing.assert_array_equal(controls[1:], episode.actions)
        for t in [0, 1, 7, 30, 35, len(episode)]:
            env.physics.reset()
            env.physics.set_state(states[t])
            env.physics.forward()
            env.physics.set_control(controls[t])
            obs = np.concatenate([np.ravel(x) for _, x in sorted(env.task.get_observation(env.physics).items())])
            known = 44 if task == "quadruped-walk" else len(obs)  # its forces need more than a state
            np.testing.assert_allclose(episode.observations[t][:known], obs[:known], rtol=1e-4, atol=1e-4)
            if t > 0:
                assert episode.rewards[t - 1] == pytest.approx(env.task.get_reward(env.physics), abs=1e-6)


def test_dm_control_in_workers(tmp_path):
    """A run as a user starts it: the spec goes to workers, the dataset names no environment."""
    pytest.importorskip("dm_control")
    flags = "--env-id dm_control/cheetah-run-v0 --num-steps 20 --learning-starts 10 --batch-size 4 --hidden-sizes 4"
    flags = *flags.split(), "--eval-episodes", 1, "--device", "cpu", "--save-replay", tmp_path / "some" / "log-v0"
    done = harness.run("td3", *flags, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert harness.read_evaluations(tmp_path / "run")["length"].tolist() == [1000]
    assert minari.MinariDataset(tmp_path / "some" / "log-v0" / "data").spec.env_spec is None


def test_what_is_missing_or_wrong(monkeypatch):
    monkeypatch.setattr(td3, "find_spec", lambda name: name != "shimmy")
    with pytest.raises(SystemExit, match="^error: .*pip install dm-control==1.0.44 shimmy==2.0.1$"):
        td3.dm_control_spec("dm_control/walker-run-v0")
    assert td3.dm_control_spec("Hopper-v5") == "Hopper-v5"
    for flags in ({"save_replay": "log"}, {"gamma": 1.5}):
        with pytest.raises(SystemExit, match="^error: "):
            td3.Args(**flags)


@pytest.mark.parametrize("algorithm", ["td3", "ddpg"])
def test_learns_to_swing_up(tmp_path, algorithm):
    """Pendulum from about -1,200 of a random policy to -350 or more in 2,500 steps."""
    flags = "--env-id Pendulum-v1 --num-steps 2500 --learning-starts 400 --batch-size 64 --hidden-sizes 64 64"
    flags += " --learning-rate 2e-3 --target-update-rate 0.02 --eval-every 2500 --device cpu --algorithm"
    done = harness.run("td3", *flags.split(), algorithm, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert harness.read_evaluations(tmp_path / "run")["return"].mean() > -350
