"""The mathematics of awac.py against what shares no code with it: numbers worked by hand, whole updates in float64,
an environment that keeps a log of its own. Networks and acting, which its siblings share, are tested in theirs,
Replay and Environments in test_sac.py."""

import itertools
import math
from functools import partial

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch

awac = harness.load("awac")
update = awac.update

OBS_DIM = 4
ACTION_DIM = 2


def make_args(**flags):
    return awac.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_columns():
    """Random obs, action, reward, next_obs, not_terminated of 60 transitions, in float64."""
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, 60, OBS_DIM))
    action = rng.uniform(-1, 1, size=(60, ACTION_DIM))
    return [torch.from_numpy(x) for x in (obs, action, rng.normal(size=60), next_obs, 1.0 * (rng.random(60) > 0.25))]


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
def copies(net, s, S):
    """Seed s's share of a network's parameters."""
    return [x.detach().chunk(S)[s].clone().requires_grad_() for x in net.parameters()]


def forward(layers, *inputs):
    """Inputs (B, ...) side by side -> (networks, B, out); layers: all weights, then all biases."""
    depth = len(layers) // 2
    x = torch.cat(inputs, 1) @ layers[0] + layers[depth]
    for i in range(1, depth):
        x = x.clamp(min=0) @ layers[i] + layers[depth + i]
    return x


def pessimistic(q, pessimism):
    """Q_bar (B,) of q (C, B, 1), by its definition."""
    C = len(q)
    penalty = sum((q[i] - q[j]).abs() for i in range(C) for j in range(C)) / (C**2 - C)
    return (q.mean(0) - pessimism * penalty).squeeze(1)


class Reference:
    """One seed of AWAC, written from the equations, with Adam by hand."""

    def __init__(self, agent, s, args):
        self.args = args
        self.num_updates = 0
        self.moments = {}
        self.clipped = []
        nets = {"actor": agent.actor, "critic": agent.critic, "target": agent.target_critic}
        self.nets = {name: copies(net, s, args.num_seeds) for name, net in nets.items()}

    def minimize(self, loss, name):
        for x, gradient in zip(self.nets[name], torch.autograd.grad(loss, self.nets[name])):
            first, second = self.moments.get(x, (0, 0))
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            self.moments[x] = first, second
            scale = (second / (1 - 0.999**self.num_updates)) ** 0.5 + 1
            x.data -= self.args.learning_rate * first / (1 - 0.9**self.num_updates) / scale

    def mean(self, obs):
        return forward(self.nets["actor"], obs)[0].tanh()

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        """What the script logs of this seed."""
        args = self.args
        self.num_updates += 1
        B = len(obs)
        next_action = (self.mean(next_obs) + (0.2 * noise[:B]).clamp(-0.3, 0.3)).clamp(-1, 1).detach()
        next_q = pessimistic(forward(self.nets["target"], next_obs, next_action), args.pessimism).detach()
        y = torch.where(not_terminated > 0, reward + args.gamma * next_q, reward)
        q = forward(self.nets["critic"], obs, action).squeeze(2)  # (C, B)
        critic_loss = ((q - y) ** 2).mean(1).sum() / 2
        self.minimize(critic_loss, "critic")

        policy_action = (self.mean(obs) + 0.2 * noise[B:]).clamp(-1, 1)
        policy_q = pessimistic(forward(self.nets["critic"], obs, policy_action), args.pessimism)
        advantage = (forward(self.nets["critic"], obs, action).mean(0).squeeze(1) - policy_q).detach()
        self.clipped.append(advantage > args.max_advantage)
        weight = (advantage.minimum(torch.tensor(args.max_advantage)) / args.beta).exp()
        weight = weight / weight.sum()
        log_prob = torch.distributions.Normal(self.mean(obs), 0.2).log_prob(action).sum(1)
        actor_loss = -(weight * log_prob).sum()
        self.minimize(actor_loss, "actor")
        for target, online in zip(self.nets["target"], self.nets["critic"]):
            target.data += args.target_update_rate * (online.data - target.data)
        logs = {"loss/critic": critic_loss, "loss/actor": actor_loss, "value/q": q, "value/advantage": advantage}
        logs["value/effective_batch"] = 1 / (weight**2).sum()
        return {name: x.mean().item() for name, x in logs.items()}


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: logs and all parameters, with some advantages at their bound.
    With 1 for Adam's eps, its steps tell a mean from a sum too."""
    args = make_args(num_seeds=2, num_critics=3, learning_rate=2**-4, target_update_rate=0.25, gamma=0.875,
                     pessimism=0.75, beta=0.5, max_advantage=3.0)  # fmt: skip
    agent = awac.Agent(OBS_DIM, ACTION_DIM, args).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in itertools.chain(*[net.parameters() for net in (agent.actor, agent.critic, agent.target_critic)]):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for optimizer in agent.optimizers.values():
        optimizer.param_groups[0]["eps"] = 1
    references = [Reference(agent, s, args) for s in range(2)]
    columns = make_columns()
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
        for net, name in ((agent.actor, "actor"), (agent.critic, "critic"), (agent.target_critic, "target")):
            for x, y in zip(copies(net, s, 2), reference.nets[name]):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


# Both stages --------------------------------------------------------------------------------------
class LoggedEnv(gym.Env):
    """Actions between -2 and 3 and -1 and 0; every third episode ends in step 5, the rest at a limit of 7 steps.
    `logs` has a list per environment of its steps, obs, action, reward, next_obs, not terminated side by side."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
    action_space = gym.spaces.Box(np.float32([-2, -1]), np.float32([3, 0]))
    logs = []

    def __init__(self):
        self.log = []
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.episode == 0:
            LoggedEnv.logs.append(self.log)
        self.episode += 1
        self.obs = np.float32([self.episode, 0, *self.np_random.normal(size=OBS_DIM - 2)])
        return self.obs.copy(), {}

    def step(self, action):
        before = self.obs
        self.obs = before + np.float32([0, 1, *action])
        reward = float(action[0] - 2 * action[1])
        terminated = bool(self.episode % 3 == 0 and self.obs[1] == 5)
        self.log.append(np.hstack([before, action * [0.4, 2] + [-0.2, 1], reward, self.obs, 1 - terminated]))
        return self.obs.copy(), reward, terminated, False, {}


gym.register("LoggedAWAC-v0", f"{__name__}:LoggedEnv", max_episode_steps=7)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*flags): a run on random data; returns what update() saw, and how often each of its graphs was called.
    Evaluations are of no length."""
    obs, action, reward, next_obs, not_terminated = [x.numpy() for x in make_columns()]
    ends = np.array([30.0, 3.0]), np.array([40, 20])
    spec = gym.spec("LoggedAWAC-v0")
    data = awac.Data(obs, action, reward, next_obs, not_terminated < 1, *ends, spec, (math.nan, math.nan))
    seen = []
    calls = []

    def recorder(agent, *inputs):
        seen.append([x.numpy().copy() for x in inputs[:-1]])
        return update(agent, *inputs)

    class Counted(awac.CudaGraph):
        def __call__(self, *inputs):
            calls.append(id(self))
            return super().__call__(*inputs)

    monkeypatch.setattr(awac, "update", recorder)
    monkeypatch.setattr(awac, "CudaGraph", Counted)
    monkeypatch.setattr(awac, "load_data", lambda args: data)
    monkeypatch.setattr(awac, "run_episode", lambda *job: np.zeros((len(job[4]), 6)))

    def call(*flags):
        seen.clear()
        calls.clear()
        LoggedEnv.logs.clear()
        harness.run_main("awac", *flags)
        return [np.stack(x) for x in zip(*seen)], {i: calls.count(i) for i in calls}

    call.data = obs, action, reward, next_obs, not_terminated
    return call


FLAGS = "--hidden-sizes 8 --batch-size 32 --num-updates 40 --eval-samples 1 --eval-every 20 --device cpu"
FLAGS = *FLAGS.split(), "--num-seeds", 2, "--reward-transform", "shift", "--eval-episodes", 1


def test_what_each_stage_learns_from(main, tmp_path):
    """Offline, batches are even over the data. Online, a step with an action of the policy comes before each update,
    whose batch is even over the data and the seed's own steps so far, with shifted rewards. A graph a stage."""
    (*columns, noise), calls = main(*FLAGS, "--online-steps", 60, "--run-dir", tmp_path / "run")
    assert list(calls.values()) == [2, 60, 60]
    obs, action, reward, next_obs, not_terminated = main.data
    table = [np.concatenate([x.reshape(60, -1) for x in (obs, action, reward - 1, next_obs, not_terminated)], 1)] * 2
    for s, log in enumerate(LoggedEnv.logs):
        own = log - 1.0 * (np.arange(12) == 6)  # the reward
        assert len(own) == 60 and 0 < sum(own[:, -1] == 0) < 10
        table[s] = np.concatenate([table[s], own])
    rows = np.concatenate([x.reshape(100, 2, 32, -1) for x in columns], -1)
    drawn = np.zeros((100, 2, 32), int)
    for s in range(2):
        distance = np.abs(rows[:, s, :, None, :OBS_DIM] - table[s][:, :OBS_DIM]).max(-1)
        drawn[:, s] = distance.argmin(-1)
        np.testing.assert_allclose(rows[:, s], table[s][drawn[:, s]], atol=1e-5)
    steps = np.arange(-39, 61).clip(min=0)[:, None, None]  # so far
    assert np.all(drawn < 60 + steps) and np.any(drawn == 59 + steps, where=steps > 0)
    share = (drawn >= 60).mean((1, 2))
    expected = steps.ravel() / (60 + steps.ravel())
    assert abs((share - expected).sum()) < 5 * np.sqrt((expected * (1 - expected) / 64).sum())
    counts = np.bincount(drawn[:40].ravel(), minlength=60)
    assert np.all(np.abs(counts - 2560 / 60) < 5 * np.sqrt(2560 / 60))

    for step in range(0, 100, awac.CHUNK):  # the first row of the noise is for acting
        _, expected = awac.draw_uniforms_and_noise([0, 1], 32, (65, ACTION_DIM), "cpu", step)
        np.testing.assert_array_equal(noise[step : step + awac.CHUNK], expected[:, :, 1:])


def test_first_online_action_and_resume(main, tmp_path, capsys):
    """The first action is the offline policy's. A resumed run keeps its steps, begins a new episode and says so; it
    does not go back to the offline stage."""
    main(*FLAGS, "--online-steps", 0, "--run-dir", tmp_path / "run")
    assert not LoggedEnv.logs
    agent = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    actor = awac.Agent(OBS_DIM, ACTION_DIM, make_args(num_seeds=2, hidden_sizes=(8,))).actor
    actor.load_state_dict({name[6:]: x for name, x in agent.items() if name.startswith("actor.")})
    main("--resume", tmp_path / "run", "--online-steps", 20)
    _, noise = awac.draw_uniforms_and_noise([0, 1], 32, (65, ACTION_DIM), "cpu", 40)
    first = np.float32([log[0] for log in LoggedEnv.logs])
    mean = actor(torch.from_numpy(first[:, None, :OBS_DIM])).detach()  # (S, 1, A)
    np.testing.assert_allclose(first[:, OBS_DIM:6], (mean + 0.2 * noise[0, :, :1]).clamp(-1, 1)[:, 0], atol=1e-5)

    before = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    capsys.readouterr()
    _, calls = main("--resume", tmp_path / "run", "--online-steps", 60)
    assert "from step 20 on, with a new episode" in capsys.readouterr().out and list(calls.values()) == [40, 40]
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (before["num_updates"], after["num_updates"]) == (60, 100)
    steps = after["agent"]["replay._extra_state"]
    assert steps.shape[1] == 60 and torch.equal(steps[:, :20], before["agent"]["replay._extra_state"])
    assert steps[0, 20:28, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    for flags in (["--num-updates", 60], ["--num-updates", 20], ["--online-steps", 40]):
        assert main("--resume", tmp_path / "run", *flags) == ([], {})
    assert main("--resume", tmp_path / "run", "--num-updates", 60, "--online-steps", 80)[1].popitem()[1] == 20


def test_presets():
    """Tables 7 and 8, Figure 7; beta 2 online; what is given comes first."""
    args = awac.Args(preset="antmaze", beta=0.3)
    expected = ["modern", 5, 0, 0.3, 1, 2_000_000, 0]
    assert [getattr(args, name) for name in awac.AWAC_TESTBEDS["preset"]] == expected
    assert awac.Args(preset="online").beta == 2 and awac.Args(preset="online").online_steps == 250_000
    with pytest.raises(SystemExit, match="^error: "):
        awac.Args(online_steps=20, eval_episodes=0)
    with pytest.raises(SystemExit, match="^error: "):
        awac.Args(online_steps=30)


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [{}, {"beta": 1e9}, {"beta": -0.5}, {"gamma": 0.0}], ids=str)
def test_a_chain_of_four_states(flags):
    """Its end pays 5, a step costs 0.1. Most of the data quits, for 0.5 at once, and so does who clones it, who
    flips the advantage, who sees the next reward only. AWAC goes on."""
    rng = np.random.default_rng(0)
    eye = np.eye(4)
    state = rng.integers(4, size=3000)
    go = rng.random(3000) < 0.3
    action = np.where(go, 0.5, -0.5) + 0.1 * rng.normal(size=3000)
    reward = np.where(go, np.where(state == 3, 5, -0.1), 0.5)
    terminated = ~go | (state == 3)
    next_state = np.where(terminated, 3, state + 1)  # ends look like the best state, lest anyone bootstrap
    columns = eye[state], action[:, None], reward, eye[next_state], ~terminated
    columns = [torch.from_numpy(np.float32(column)) for column in columns]
    args = make_args(num_seeds=3, learning_rate=3e-3, target_update_rate=0.05, **{"beta": 0.5, **flags})
    agent = awac.Agent(4, 1, args)
    for step in range(0, 600, awac.CHUNK):
        for u, noise in zip(*awac.draw_uniforms_and_noise(range(3), 128, (256, 1), "cpu", step)):
            index = (u * 3000).long()
            update(agent, *[column[index] for column in columns], noise, args)
    goes_on = agent.actor(torch.eye(4).expand(3, -1, -1)) > 0  # (S, states, 1)
    if flags:
        assert not goes_on[:, :3].any()
    else:
        assert goes_on.all()
