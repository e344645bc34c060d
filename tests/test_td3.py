"""The mathematics of td3.py against what shares no code with it: whole updates in float64 by torch.nn, dm_control's own
rewards in the states that were logged. Its runs are tested in test_online.py."""

import harness
import minari
import numpy as np
import pytest
import torch
from reference import assert_same_layers, check_updates, linear_layers, random_batch, randomize
from test_online import main, read

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
        q = torch.stack([self.q(x, obs, action) for x in self.critics])
        critic_loss = ((q - y) ** 2).mean(1).sum()
        self.step(0, critic_loss)
        logs = {"loss/critic": critic_loss, "value/q": q, "value/reward": reward}
        logs = {name: x.mean().item() for name, x in logs.items()}
        if not actor_turn:
            return logs
        actor_loss = -self.q(self.critics[0], obs, torch.tanh(self.actor(obs))).mean()
        self.step(1, actor_loss)
        for target, online in (*zip(self.targets, self.critics), (self.target_actor, self.actor)):
            for x, new_x in zip(target.parameters(), online.parameters()):
                x.data = (1 - args.target_update_rate) * x.data + args.target_update_rate * new_x.data
        return logs | {"loss/actor": actor_loss.item()}

    def assert_same(self, agent, s, atol):
        pairs = [(agent.actor[0], s, self.actor), (agent.target_actor[0], s, self.target_actor)]
        for c in range(self.C):
            pairs += [(agent.critic, self.C * s + c, self.critics[c])]
            pairs += [(agent.target_critic, self.C * s + c, self.targets[c])]
        if self.args.objective == "rnd":
            pairs += [(agent.rnd.predictor, s, self.predictor), (agent.rnd.target, s, self.random)]
        for mlp, i, expected in pairs:
            assert_same_layers(mlp, i, expected, atol)


@pytest.mark.parametrize("objective", ["task", "rnd"])
@pytest.mark.parametrize("algorithm", ["td3", "ddpg"])
def test_update_against_reference(algorithm, objective):
    """Four updates of two seeds, which do not mix, with steps large enough that every question of order shows."""
    args = make_args(algorithm=algorithm, objective=objective, num_seeds=2, learning_rate=0.02,
                     target_update_rate=0.3, gamma=0.9, policy_noise=0.4)  # fmt: skip
    agent = make_agent(args, size=0.4).double()
    references = [Reference(agent, s, args) for s in range(2)]
    batches = [[*(x.double() for x in make_batch(S=2, seed=n)), n % 2 == 1] for n in range(4)]
    check_updates(td3, agent, references, batches, args, atol=1e-6)


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


# dm_control ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["walker-run", "quadruped-walk", "humanoid-stand"])
def test_physics_and_control_give_the_logged_rewards_again(tmp_path, task):
    """... in a fresh environment that is set to each state, and the logged observations, to float32's precision."""
    pytest.importorskip("shimmy")
    suite = pytest.importorskip("dm_control.suite")
    folder = tmp_path / "log" / "of-v0"
    flags = "--env-id", f"dm_control/{task}-v0", "--num-steps", 1040, "--learning-starts", 1035
    main("td3", *flags, "--run-dir", tmp_path / "run", "--save-replay", folder)
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
