"""sac.py against torch.distributions and a reference in float64; its datasets as Minari and our scripts read them."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

sac = harness.load("sac")
iql = harness.load("iql_red")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below


def make_args(**flags):
    return sac.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, **flags})


def make_agent(args, spread=None):
    """A SACAgent. With `spread`, all parameters are drawn anew, so that targets and critics differ."""
    agent = sac.SACAgent(O, A, args, torch.device("cpu"))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(S=1, B=32, seed=0):
    """(S, B, O + A + 1 + O + 1) random transitions, a quarter of them terminal, and noise (2, S, B, A)."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, S, B, O))
    action, reward = rng.uniform(-1, 1, size=(S, B, A)), rng.normal(size=(S, B, 1))
    not_terminated = np.float64(rng.random((S, B, 1)) > 0.25)
    batch = np.concatenate([obs, action, reward, next_obs, not_terminated], -1)
    return torch.from_numpy(batch).float(), torch.from_numpy(rng.normal(size=(2, S, B, A))).float()


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    named = list(mlp.named_parameters())
    return list(zip(*([p for name, p in named if kind in name] for kind in ("weight", "bias"))))


def constant_actor(agent, mean=0.0, log_std=0.0):
    """Makes the policy ignore its observation: this mean and log_std (before the tanh) in every dimension."""
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.zero_()
        bias = layers_of(agent.actor.net)[-1][1]
        bias.copy_(torch.tensor([mean] * A + [log_std] * A).expand_as(bias))


def without_moments(state):
    """A state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x for name, x in state.items() if not name.startswith("optimizers.")}


def snapshot(agent):
    return {name: x.clone() for name, x in without_moments(agent.state_dict()).items()}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): sac's main() in this process; it puts the process's signal handlers and variables back."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["sac.py", *map(str, flags)])
        monkeypatch.setenv("MINARI_DATASETS_PATH", os.environ.get("MINARI_DATASETS_PATH", ""))
        try:
            sac.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# The policy's log-probability
# ---------------------------------------------------------------------------------------------------------------------


def test_log_prob_against_torch_distributions():
    """a = tanh(mean + std * noise) and its density, on random networks in float64."""
    agent = make_agent(make_args(num_seeds=3), spread=0.3).double()
    obs, noise = make_batch(S=3)[0][..., :O].double(), make_batch(S=3)[1][0].double()
    action, log_prob = agent.actor.sample(obs, noise)
    mean, log_std = agent.actor(obs)
    policy = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
    torch.testing.assert_close(action, (mean + log_std.exp() * noise).tanh())
    torch.testing.assert_close(log_prob, policy.log_prob(action), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(agent.actor.act(obs), mean.tanh())
    assert log_std.min() < -0.5 and log_std.max() > 0.5  # the state-dependent part was there to be wrong


def test_log_prob_of_a_number_worked_out_by_hand():
    """log pi(0.5) with mean 0 and log_std -1, for each of two dimensions: -0.746033."""
    agent = make_agent(make_args())
    constant_actor(agent, log_std=-1.0)
    noise = torch.full((1, 1, A), math.atanh(0.5) * math.e)
    action, log_prob = agent.actor.sample(torch.zeros(1, 1, O), noise)
    torch.testing.assert_close(action, torch.full((1, 1, A), 0.5))
    assert log_prob.item() == pytest.approx(A * -0.746033, abs=2e-6)


@pytest.mark.parametrize("mean", [-60.0, -9.0, 9.0, 60.0])
def test_log_prob_where_tanh_saturates(mean):
    """In float32 tanh(9) is 1 and log(1 - tanh^2) would be -inf; the log-probability and its gradient stay right."""
    agent = make_agent(make_args())
    constant_actor(agent, mean=mean)
    noise = torch.full((1, 1, A), 0.25)
    _, log_prob = agent.actor.sample(torch.zeros(1, 1, O), noise)
    x = mean + 0.25  # 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2
    log_det = 2 * math.log(2) - 2 * np.logaddexp(x, -x)
    expected = A * (-0.5 * 0.25**2 - 0.5 * math.log(2 * math.pi) - log_det)
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)
    log_prob.sum().backward()
    gradient = layers_of(agent.actor.net)[-1][1].grad.flatten()[:A]  # d/dx of -log(1 - tanh(x)^2) = 2 tanh(x)
    torch.testing.assert_close(gradient, torch.full((A,), 2 * math.tanh(x)), rtol=1e-5, atol=0)


def test_log_std_is_clamped():
    for raw, clamped in ((-50.0, -20.0), (0.3, 0.3), (9.0, 2.0)):
        agent = make_agent(make_args())
        constant_actor(agent, log_std=raw)
        torch.testing.assert_close(agent.actor(torch.zeros(1, 1, O))[1], torch.full((1, 1, A), clamped))


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


class ReferenceSAC:
    """One seed of SAC in float64: torch.nn modules, torch.distributions, plain Adam, one full loss per network."""

    def __init__(self, agent, s, args):
        def network(mlp, *lead):
            layers = []
            for w, b in layers_of(mlp):
                linear = torch.nn.Linear(*w.shape[-2:], dtype=torch.float64)
                linear.weight.data, linear.bias.data = (
                    w[(s, *lead)].detach().T.clone(),
                    b[(s, *lead)][0].detach().clone(),
                )
                layers += [linear, torch.nn.ReLU()]
            return torch.nn.Sequential(*layers[:-1])

        self.args = args
        self.actor = network(agent.actor.net)
        self.critics = torch.nn.ModuleList(network(agent.critic, c) for c in range(2))
        self.targets = torch.nn.ModuleList(network(agent.target_critic, c) for c in range(2))
        self.log_alpha = agent.log_alpha[s].detach().clone().requires_grad_()
        self.optimizers = [
            torch.optim.Adam(x, lr=args.learning_rate, foreach=False, fused=False)
            for x in (self.actor.parameters(), self.critics.parameters(), [self.log_alpha])
        ]

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).split(A, dim=1)
        log_std = torch.clip(log_std, -20, 2)
        x = mean + log_std.exp() * noise
        log_det = 2 * math.log(2) - 2 * torch.logaddexp(x, -x)  # 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2
        return x.tanh(), (Normal(mean, log_std.exp()).log_prob(x) - log_det).sum(1)

    def smaller_q(self, critics, obs, action):
        return torch.minimum(*(critic(torch.cat([obs, action], 1))[:, 0] for critic in critics))

    def update(self, batch, noise):
        obs, action, reward, next_obs, mask = batch.split([O, A, 1, O, 1], dim=1)
        actor_step, critic_step, alpha_step = self.optimizers
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, noise[0])
            soft_value = self.smaller_q(self.targets, next_obs, next_action) - alpha * next_log_prob
            y = torch.where(mask[:, 0] > 0, reward[:, 0] + self.args.gamma * soft_value, reward[:, 0])
        critic_loss = sum(((critic(torch.cat([obs, action], 1))[:, 0] - y) ** 2).mean() for critic in self.critics)
        critic_step.zero_grad()
        critic_loss.backward()
        critic_step.step()

        policy_action, log_prob = self.sample(obs, noise[1])
        actor_loss = (alpha * log_prob - self.smaller_q(self.critics, obs, policy_action)).mean()
        actor_step.zero_grad()
        actor_loss.backward()
        actor_step.step()

        alpha_step.zero_grad()
        (-self.log_alpha * (log_prob.detach().mean() - A)).backward()
        alpha_step.step()
        with torch.no_grad():
            for target, online in zip(self.targets.parameters(), self.critics.parameters()):
                target.copy_((1 - self.args.polyak) * target + self.args.polyak * online)
        return critic_loss.item(), actor_loss.item()


def test_update_against_reference():
    """Three updates of two seeds, with steps large enough that every question of order shows."""
    args = make_args(num_seeds=2, learning_rate=0.02, polyak=0.3, gamma=0.9)
    agent = make_agent(args, spread=0.4).double()
    references = [ReferenceSAC(agent, s, args) for s in range(2)]
    for n in range(3):
        batch, noise = (x.double() for x in make_batch(S=2, seed=n))
        metrics = sac.update(agent, batch, noise, args)
        for s, reference in enumerate(references):
            losses = reference.update(batch[s], noise[:, s])
            ours = [metrics[name][s].item() for name in ("loss/critic", "loss/actor")]
            np.testing.assert_allclose(ours, losses, rtol=1e-6)
    for s, reference in enumerate(references):
        torch.testing.assert_close(agent.log_alpha[s], reference.log_alpha, rtol=0, atol=1e-7)
        nets = [(agent.actor.net, (), reference.actor)]
        nets += [(agent.critic, (c,), reference.critics[c]) for c in range(2)]
        nets += [(agent.target_critic, (c,), reference.targets[c]) for c in range(2)]
        for mlp, lead, expected in nets:
            for i, (w, b) in enumerate(layers_of(mlp)):
                torch.testing.assert_close(w[(s, *lead)], expected[2 * i].weight.T, rtol=0, atol=1e-7)
                torch.testing.assert_close(b[(s, *lead)][0], expected[2 * i].bias, rtol=0, atol=1e-7)


def test_targets_bootstrap_through_truncation_only():
    """y = r at a true end; else r + gamma (Q' - alpha log pi'). Critics are 0, target critics 7 and 9: loss 2 y^2."""
    args = make_args(learning_rate=0.0, polyak=0.0)
    batch, noise = make_batch()
    noise[0] = noise[0, :, :1]  # one draw for all, so that y is one number
    agent = make_agent(args)
    constant_actor(agent)
    with torch.no_grad():
        for p in [*agent.critic.parameters(), *agent.target_critic.parameters()]:
            p.zero_()
        layers_of(agent.target_critic)[-1][1].copy_(torch.tensor([7.0, 9.0]).view(1, 2, 1, 1))
        agent.log_alpha.fill_(math.log(0.5))
        log_prob = agent.actor.sample(batch[:, :1, :O], noise[0, :, :1])[1].item()
    soft_value = 7 - 0.5 * log_prob
    for not_terminated, y in ((0.0, 1.5), (1.0, 1.5 + 0.99 * soft_value)):
        batch[..., O + A], batch[..., -1] = 1.5, not_terminated
        loss = sac.update(agent, batch, noise, args)["loss/critic"].item()
        assert loss == pytest.approx(2 * y**2, rel=1e-5)


@pytest.mark.parametrize("log_std, falls", [(-0.5, True), (-6.0, False)])
def test_temperature_moves_towards_the_target_entropy(log_std, falls):
    """dL/d log_alpha = -(mean log pi + target) > 0, so alpha falls, while the entropy is above -A; else it grows."""
    args = make_args()
    agent = make_agent(args)
    constant_actor(agent, log_std=log_std)
    batch, noise = make_batch()
    metrics = sac.update(agent, batch, noise, args)
    assert agent.target_entropy == -A
    assert (metrics["policy/entropy"].item() > -A) == falls
    gradient = metrics["policy/entropy"].item() + A
    assert agent.optimizers["alpha"].mean0.item() == pytest.approx(0.1 * gradient, rel=1e-5)  # (1 - beta1) gradient
    assert agent.log_alpha.item() == pytest.approx(-3e-4 if falls else 3e-4, rel=1e-3)  # Adam's first step


def test_polyak_and_owners():
    """Targets move to (1 - polyak) target + polyak critic, and no optimiser has them; no parameter has two owners."""
    args = make_args(polyak=0.25, learning_rate=0.01)
    agent = make_agent(args, spread=0.5)
    owned = [id(p) for o in agent.optimizers.values() for p in o.params]
    assert len(owned) == len(set(owned)) and not {id(p) for p in agent.target_critic.parameters()} & set(owned)
    assert not any(p.requires_grad for p in agent.target_critic.parameters())
    before = snapshot(agent)
    sac.update(agent, *make_batch(), args)
    for name, x in without_moments(agent.state_dict()).items():
        assert not torch.equal(x, before[name]), name
        if name.startswith("target_critic"):
            online = agent.state_dict()[name.removeprefix("target_")]
            torch.testing.assert_close(x, 0.75 * before[name] + 0.25 * online, rtol=1e-5, atol=1e-6)


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(5):
            batch, noise = make_batch(S=2, seed=n)
            batch[1] *= factor
            noise[:, 1] *= factor
            sac.update(agent, batch, noise, args)
        states.append(snapshot(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        assert not torch.equal(states[0][name][1], states[1][name][1]), name


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, on an environment that keeps a log of its own
# ---------------------------------------------------------------------------------------------------------------------


class LoggedEnv(gym.Env):
    """Actions between -2 and 3 and -1 and 0; every third episode ends in step 5, the rest at a time limit of 7 steps.

    LoggedEnv.logs has one list per environment made, of one list per episode, of (obs, action, reward, next_obs).
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(np.float32([-2, -1]), np.float32([3, 0]))
    logs = []

    def __init__(self):
        self.episodes = []
        LoggedEnv.logs.append(self.episodes)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes.append([])
        self.obs = np.float32([len(self.episodes), 0, self.np_random.normal()])
        return self.obs.copy(), {}

    def step(self, action):
        assert np.all(action >= self.action_space.low - 1e-6) and np.all(action <= self.action_space.high + 1e-6)
        before, self.obs = self.obs, self.obs + np.float32([0, 1, action.sum()])
        reward = float(action[0] - 2 * action[1])
        self.episodes[-1].append((before, np.array(action), reward, self.obs.copy()))
        return self.obs.copy(), reward, len(self.episodes) % 3 == 0 and self.obs[1] == 5, False, {}


gym.register("harness/Logged-v0", f"{__name__}:LoggedEnv", max_episode_steps=7)

LOGGED = "--env-id harness/Logged-v0 --hidden-sizes 16 --batch-size 8 --eval-episodes 0 --device cpu".split()


def is_termination(number, length):
    """By LoggedEnv's rules: does its episode `number` (from 1) of this length end in a terminal state?"""
    return number % 3 == 0 and length == 5


@pytest.mark.parametrize("num_envs", [1, 2])
def test_saved_replay_is_what_the_environment_saw(num_envs, run_main, tmp_path):
    """Every episode in order, in the environment's own units, terminations and truncations apart, the unfinished last
    one kept; learning from them got the mask that stops bootstraps at terminations only."""
    LoggedEnv.logs.clear()
    run_main(*LOGGED, "--num-steps", 60, "--learning-starts", 30, "--num-envs", num_envs, "--run-dir", tmp_path / "run",
             "--save-replay", tmp_path / "replay")  # fmt: skip
    logs = [[episode for episode in log if episode] for log in LoggedEnv.logs[:num_envs]]
    logged = sorted(  # in the order of time: (last step, environment, number of the episode there, its steps)
        (sum(map(len, log[:number])), e, number, log[number - 1])
        for e, log in enumerate(logs)
        for number in range(1, len(log) + 1)
    )
    assert sum(len(steps) for *_, steps in logged) == 60

    import minari

    dataset = minari.MinariDataset(tmp_path / "replay" / "data")
    assert dataset.total_steps == 60 and dataset.total_episodes == len(logged)
    ends = []
    for episode, (_, _, number, steps) in zip(dataset.iterate_episodes(), logged):
        obs, action, reward, next_obs = map(np.array, zip(*steps))
        np.testing.assert_array_equal(episode.observations, np.concatenate([obs, next_obs[-1:]]))
        np.testing.assert_allclose(episode.actions, action, atol=1e-6)
        np.testing.assert_allclose(episode.rewards, reward, rtol=1e-6, atol=1e-6)
        terminated = is_termination(number, len(steps))
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
        assert (episode.terminations[-1], episode.truncations[-1]) == (terminated, not terminated)
        ends.append((terminated, len(steps)))
    assert {(True, 5), (False, 7)} <= set(ends) and ends[-1][1] < 7
    assert np.ptp([step[1][0] for *_, steps in logged for step in steps]) > 2  # beyond what [-1, 1] has room for

    replay = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["replay"][0]  # (T, E, width)
    rows = torch.cat([replay[last - len(steps) : last, e] for last, e, _, steps in logged]).numpy()
    stopped = rows[:, -1] == 0
    assert np.flatnonzero(stopped).tolist() == [
        last for last, (ended, _) in zip(np.cumsum([n for _, n in ends]) - 1, ends) if ended
    ]
    back = iql.load_dataset([str(tmp_path / "replay")])
    iql.fit_to_environment(back)  # our loader scales the actions back
    np.testing.assert_allclose(back.transitions, rows, atol=1e-6)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_references_of_a_replay(num_envs, run_main, tmp_path):
    """Environments without D4RL references: the mean return of the random episodes is 0, that of the best is 100."""
    LoggedEnv.logs.clear()
    run_main(*LOGGED, "--num-steps", 70, "--learning-starts", 35, "--num-envs", num_envs, "--run-dir", tmp_path / "run",
             "--save-replay", tmp_path / "replay")  # fmt: skip
    metadata = json.loads((tmp_path / "replay" / "data" / "metadata.json").read_text())
    random_returns, all_returns = [], []
    for log in LoggedEnv.logs[:num_envs]:
        ends = np.cumsum([len(steps) for steps in log])
        for number, (steps, end) in enumerate(zip(log, ends), 1):
            if len(steps) == 7 or is_termination(number, len(steps)):  # not the unfinished last one
                all_returns.append(sum(reward for _, _, reward, _ in steps))
                random_returns += all_returns[-1:] if end <= 35 // num_envs else []
    assert metadata["ref_min_score"] == pytest.approx(np.mean(random_returns), rel=1e-4)
    assert metadata["ref_max_score"] == pytest.approx(max(all_returns), rel=1e-4)


def test_seed_k_among_three_is_the_run_with_seed_k(run_main, monkeypatch, tmp_path):
    """Through main(): the same first weights and random steps, and the same agents after 50 updates."""
    first, update, last = {}, sac.update, {}

    def recorder(agent, batch, noise, args):
        first.setdefault((args.seed, args.num_seeds), snapshot(agent))
        return update(agent, batch, noise, args)

    monkeypatch.setattr(sac, "update", recorder)
    flags = "--num-steps", 69, "--learning-starts", 20, "--num-envs", 1
    for seed, num_seeds in ((3, 3), (3, 1), (5, 1)):
        run_main(
            *LOGGED, *flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", tmp_path / f"{seed}-{num_seeds}"
        )
        last[seed, num_seeds] = torch.load(tmp_path / f"{seed}-{num_seeds}" / "checkpoint.pt", weights_only=True)
    for k in (0, 2):
        together, alone = last[3, 3], last[3 + k, 1]
        assert together["t"] == 69
        assert torch.equal(together["replay"][k, :20], alone["replay"][0, :20])
        torch.testing.assert_close(together["replay"][k], alone["replay"][0], rtol=1e-3, atol=1e-4)
        for name in without_moments(together["agent"]):
            assert torch.equal(first[3, 3][name][k], first[3 + k, 1][name][0]), name
            torch.testing.assert_close(together["agent"][name][k], alone["agent"][name][0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(last[3, 3]["replay"][0], last[3, 3]["replay"][2])


# ---------------------------------------------------------------------------------------------------------------------
# Episodes
# ---------------------------------------------------------------------------------------------------------------------


def packed(num_steps, ends):
    """Packed rows (T, 2 + 1 + 1 + 2 + 1) whose observations count the steps, with jumps after ends."""
    rows, obs = np.zeros((num_steps, 7), np.float32), 0.0
    for t in range(num_steps):
        rows[t] = obs, obs, t, 10 * t, obs + 1, obs + 1, ends[t] != 1
        obs = obs + 1 if ends[t] == 0 else 100.0 * (t + 1)
    return rows


@pytest.mark.parametrize(
    "ends, lengths, terminated",
    [
        ([0, 1, 0, 0, 2, 0], [2, 3, 1], [True, False, False]),  # the last one is unfinished: truncated
        ([0, 0, 0, 1], [4], [True]),
        ([0, 0], [2], [False]),
        ([1, 1, 2], [1, 1, 1], [True, True, False]),
    ],
)
def test_split_episodes(ends, lengths, terminated):
    rows = packed(len(ends), ends)
    episodes = sac.split_episodes(rows, np.array(ends, np.uint8), [2, 1, 1, 2, 1])
    assert [len(reward) for _, _, reward, _, _ in episodes] == lengths
    first = 0
    for (obs, action, reward, terminations, truncations), T, ended in zip(episodes, lengths, terminated):
        np.testing.assert_array_equal(
            obs, np.concatenate([rows[first : first + T, :2], rows[first + T - 1, None, 4:6]])
        )
        np.testing.assert_array_equal(action, rows[first : first + T, 2:3])
        np.testing.assert_array_equal(reward, rows[first : first + T, 3])
        assert terminations.tolist() == [False] * (T - 1) + [ended]
        assert truncations.tolist() == [False] * (T - 1) + [not ended]
        first += T


def test_thin():
    """Whole episodes, evenly spaced over the run and in order, with about as many transitions as asked for."""
    episodes = [(None, None, np.full(10, i), None, None) for i in range(100)]
    kept = [int(reward[0]) for _, _, reward, _, _ in sac.thin(episodes, 250)]
    assert len(kept) == 25 and np.all(np.diff(kept) == 4)
    assert len(sac.thin(episodes, 1000)) == len(sac.thin(episodes, 5000)) == 100
    kept = [int(reward[0]) for _, _, reward, _, _ in sac.thin(episodes, 700)]
    assert len(kept) == 70 and kept == sorted(set(kept)) and np.diff(kept).max() == 2


# ---------------------------------------------------------------------------------------------------------------------
# A short real run, its datasets, and the same run killed and resumed
# ---------------------------------------------------------------------------------------------------------------------

PENDULUM = """--env-id Pendulum-v1 --num-steps 650 --learning-starts 100 --hidden-sizes 32 32 --batch-size 32
    --eval-every 125 --eval-episodes 1 --eval-workers 0 --checkpoint-every 30 --device cpu""".split()


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """Folder with run/, replay/ and rollouts/ of an uninterrupted run as a user would start it."""
    folder = tmp_path_factory.mktemp("pendulum")
    done = harness.run("sac", *PENDULUM, "--run-dir", folder / "run", "--save-replay", folder / "replay",
                       "--save-rollouts", folder / "rollouts", "--num-rollout-steps", 300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(folder / "run") in done.stdout.splitlines()[-1]
    return folder


@pytest.mark.parametrize("name, lengths", [("replay", [200, 200, 200, 50]), ("rollouts", [200, 200])])
def test_a_run_written_for_minari_and_for_us(pendulum, name, lengths):
    """Both readers see the same episodes; Pendulum's torque goes to 2, and is not kept in [-1, 1]."""
    import minari

    ours = iql.load_dataset([str(pendulum / name)])
    assert ours.episode_lengths.tolist() == lengths and ours.environment["id"] == "Pendulum-v1"
    assert 1.5 < np.abs(iql.actions_of(ours)).max() <= 2
    theirs = minari.MinariDataset(pendulum / name / "data")
    assert theirs.env_spec.id == "Pendulum-v1" and theirs.action_space.high == [2]
    episodes = list(theirs.iterate_episodes())
    assert [len(e.rewards) for e in episodes] == lengths
    rows = [
        np.c_[e.observations[:-1], e.actions, e.rewards, e.observations[1:], 1 - np.float32(e.terminations)]
        for e in episodes
    ]
    np.testing.assert_array_equal(ours.transitions, np.float32(np.concatenate(rows)))
    np.testing.assert_allclose(ours.episode_returns, [e.rewards.sum() for e in episodes], rtol=1e-5)
    assert all(e.truncations[-1] and not e.terminations.any() for e in episodes)

    # the environment itself gives the same observations and rewards when it gets these actions
    env = gym.make("Pendulum-v1")
    for episode in episodes:
        env.reset(seed=0)
        cos, sin, speed = np.float64(episode.observations[0])
        env.unwrapped.state = np.array([np.arctan2(sin, cos), speed])
        for action, reward, obs in list(zip(episode.actions, episode.rewards, episode.observations[1:]))[:5]:
            ours_obs, ours_reward, *_ = env.step(action)
            np.testing.assert_allclose(ours_obs, obs, atol=1e-4)
            assert ours_reward == pytest.approx(reward, abs=1e-3)


def test_a_run_written_is_the_log_of_training(pendulum):
    """The dataset's transitions are those of the checkpoint's replay, step by step."""
    dataset = iql.load_dataset([str(pendulum / "replay")])
    iql.fit_to_environment(dataset)
    replay = torch.load(pendulum / "run" / "checkpoint.pt", weights_only=True)["replay"][0, :, 0].numpy()
    np.testing.assert_allclose(dataset.transitions, replay, atol=1e-6)


@pytest.mark.parametrize("name", ["replay", "rollouts"])
def test_an_existing_dataset_is_not_overwritten(pendulum, name, tmp_path):
    before = (pendulum / name / "data" / "main_data.hdf5").read_bytes()
    done = harness.run("sac", *PENDULUM, "--run-dir", tmp_path / "run", f"--save-{name}", pendulum / name)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert (pendulum / name / "data" / "main_data.hdf5").read_bytes() == before


def test_killed_and_resumed_is_never_stopped(pendulum, tmp_path):
    """kill -9 at a random moment after the first checkpoint: weights, optimisers, replay and evaluations end the same,
    and so does the dataset that is written at the end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for longest_delay in (1.2, 0.6, 0.3, 0.1):  # less, should a fast machine have been done before the kill
        run_dir, delay = tmp_path / f"run-{longest_delay}", random.uniform(0, longest_delay)
        command = harness.command("sac", *PENDULUM, "--run-dir", run_dir)
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.time() + 120
            while not (run_dir / "checkpoint.pt").exists() and time.time() < deadline and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
        stopped_at = torch.load(run_dir / "checkpoint.pt", weights_only=True)["t"]
        if process.returncode == -signal.SIGKILL and stopped_at < 650:
            break
    where = f"killed {delay:.2f} s after the first checkpoint, at step {stopped_at}"
    assert process.returncode == -signal.SIGKILL and stopped_at < 650, where

    done = harness.run("sac", "--resume", run_dir, "--save-replay", tmp_path / "replay")
    assert done.returncode == 0, (where, done.stderr)
    ours, theirs = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (run_dir, pendulum / "run"))

    def same(a, b, name):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), (name, where)
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), (name, where)
            for key in a:
                same(a[key], b[key], f"{name}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), (name, where)
            for i, (x, y) in enumerate(zip(a, b)):
                same(x, y, f"{name}.{i}")
        else:
            assert a == b, (name, where)

    same(ours, theirs, "checkpoint")
    assert (run_dir / "evaluations.csv").read_bytes() == (pendulum / "run" / "evaluations.csv").read_bytes(), where
    assert harness.read_evaluations(run_dir)["update"].tolist() == [125, 250, 375, 500, 625, 650]
    datasets = [iql.load_dataset([str(folder / "replay")]) for folder in (tmp_path, pendulum)]
    assert np.array_equal(datasets[0].transitions, datasets[1].transitions)
    assert np.array_equal(datasets[0].episode_lengths, datasets[1].episode_lengths)


def test_a_finished_run_still_gives_its_dataset(pendulum, tmp_path):
    """--resume of a run that has all its steps trains nothing, and writes the same log as the run itself would have."""
    shutil.copytree(pendulum / "run", tmp_path / "run")
    datasets = "--save-replay", tmp_path / "replay", "--save-rollouts", tmp_path / "rollouts"
    done = harness.run("sac", "--resume", tmp_path / "run", *datasets)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run") in done.stdout.splitlines()[-1]
    datasets = [iql.load_dataset([str(folder / "replay")]) for folder in (tmp_path, pendulum)]
    assert np.array_equal(datasets[0].transitions, datasets[1].transitions)


def test_resuming_with_fewer_steps_than_there_are(pendulum, tmp_path):
    before = (pendulum / "run" / "checkpoint.pt").read_bytes()
    datasets = "--save-replay", tmp_path / "replay", "--save-rollouts", tmp_path / "rollouts"
    done = harness.run("sac", "--resume", pendulum / "run", "--num-steps", 300, *datasets)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert (pendulum / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_that_wrote_datasets_can_be_evaluated(pendulum):
    """--evaluate writes no dataset, so one that is there is no obstacle."""
    done = harness.run("sac", "--evaluate", pendulum / "run")
    assert done.returncode == 0 and done.stdout.startswith("seed 0: "), done.stderr


@pytest.mark.parametrize("torn", ["2", "2000", "2000,0,1,-3", "2000,0,1,-3.5,7,0.12"])
def test_a_torn_row_is_forgotten(torn, tmp_path):
    """A kill in the middle of a long write leaves half a row, even half an update's number; resuming drops it."""
    args = make_args(eval_workers=0)
    evaluator = sac.Evaluator(args, {"references": None}, tmp_path, None)
    good = evaluator.csv_path.read_text() + "1000,0,0,-3.5,7,nan\n1000,0,1,-3.25,7,nan\n"
    evaluator.csv_path.write_text(good + "2000,0,0,-3.5,7,nan\n" + torn)
    evaluator.resume(1000, {}, None)
    assert evaluator.csv_path.read_text() == good


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_updates_equal_eager_ones():
    """Replays of a captured update give what eager updates give; capturing leaves no trace in the agent."""
    args, device = make_args(num_seeds=2), torch.device("cuda")
    agents = [sac.SACAgent(O, A, args, device) for _ in range(2)]
    batch, noise = (x.to(device) for x in make_batch(S=2))
    first = snapshot(agents[0])
    replay = sac.cuda_graph(lambda b, n: sac.update(agents[0], b, n, args), agents[0], batch, noise)
    for name, x in agents[0].state_dict().items():
        assert torch.equal(x, first[name]), name
    for n in range(10):
        new_batch, new_noise = (x.to(device) for x in make_batch(S=2, seed=n))
        replay(new_batch, new_noise)
        sac.update(agents[1], new_batch, new_noise, args)
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-5)
