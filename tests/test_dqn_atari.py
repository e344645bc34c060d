"""dqn_atari.py against references that are written row by row, its files as the offline scripts read them, its runs.

Most tests play FakeGames, which keep a log of their own and cost nothing; a few play the real ones.
"""

import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch

dqn = harness.load("dqn_atari")
offline = harness.load("offline_dqn_atari")

CPU = torch.device("cpu")
A = 4  # actions of FakeGames


class FakeGames:
    """What the scripts use of AtariVectorEnv. Frames, rewards from -3 to 3 and lengths of 3 to 11 steps are random, and
    depend on the last seed and on all actions since; `episodes` has what was played: per environment a list of lists of
    (frame, action, reward)."""

    made = []
    single_action_space = gym.spaces.Discrete(A)

    def __init__(self, environment, num_envs):
        self.rngs, self.left = [None] * num_envs, np.zeros(num_envs, int)
        self.obs = np.zeros((num_envs, 4, 84, 84), np.uint8)
        self.episodes, self.seeds = [[] for _ in range(num_envs)], [[] for _ in range(num_envs)]
        FakeGames.made.append(self)

    def begin(self, i):
        self.obs[i], self.left[i] = 0, self.rngs[i].integers(3, 12)
        self.obs[i, -1] = self.rngs[i].integers(0, 256, (84, 84))
        self.episodes[i].append([])

    def reset(self, *, seed, options=None):
        which = np.flatnonzero(options["reset_mask"]) if options else np.arange(len(self.obs))
        assert len(seed) == len(which)
        for i, number in zip(which, seed):
            if number >= 0:
                self.rngs[i] = np.random.default_rng(number)
                self.seeds[i].append(int(number))
            self.begin(i)
        return self.obs.copy(), {}

    def step(self, action):
        assert action.shape == (len(self.obs),) and action.dtype == np.int64
        reward, over = np.zeros(len(self.obs), np.int32), self.left == 1
        for i, rng in enumerate(self.rngs):
            if self.left[i] == 0:  # as AtariVectorEnv does when nobody has reset it
                self.begin(i)
                continue
            rng.random(1 + action[i])  # what happens from here on depends on the action
            reward[i] = rng.integers(-3, 4)
            self.episodes[i][-1].append((self.obs[i, -1].copy(), int(action[i]), int(reward[i])))
            self.left[i] -= 1
            self.obs[i] = np.concatenate([self.obs[i, 1:], rng.integers(0, 256, (1, 84, 84))])
        cut = over & (reward > 1)
        return self.obs.copy(), reward, over & ~cut, cut, {}

    def close(self):
        pass


def make_args(**flags):
    small = {"channels": (2, 3, 4), "hidden_size": 8, "padding": "valid", "batch_size": 4}
    return dqn.Args(**{**small, **flags})


def test_defaults():
    """13.3: DQN (Nature) as it logged the dataset."""
    args = vars(dqn.Args())
    expected = {
        "gamma": 0.99, "batch_size": 32, "optimizer": "rmsprop", "learning_rate": 2.5e-4, "optimizer_eps": 1e-5,
        "optimizer_style": "tensorflow", "padding": "same", "channels": (32, 64, 64), "hidden_size": 512,
        "replay_size": 1_000_000, "learning_starts": 20_000, "update_every": 4, "target_every": 2_000, "epsilon": 0.01,
        "epsilon_steps": 250_000, "num_steps": 50_000_000, "num_envs": 1, "rows_per_file": 1_000_000,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def make_batch(S=1, B=4, seed=0):
    """A batch as `update` wants it, a quarter of the transitions terminal."""
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (S, B, 5, 84, 84), dtype=np.uint8))
    action = torch.from_numpy(rng.integers(0, A, (S, B)))
    reward, not_terminal = rng.integers(-1, 2, (S, B)), rng.random((S, B)) > 0.25
    return (
        frames[:, :, :4],
        action,
        *map(torch.from_numpy, (np.float32(reward), frames[:, :, 1:].numpy(), np.float32(not_terminal))),
    )


SMALL = """--env-id ALE/Pong-v5 --channels 2 3 4 --hidden-size 8 --padding valid --batch-size 4 --device cpu
    --eval-workers 0""".split()


def play_main(monkeypatch, module, *flags, games=FakeGames):
    """main() of a script on FakeGames, or with games=None the real ones, in this process; returns the FakeGames."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    if games:
        monkeypatch.setattr(module, "make_atari", games)
    first = len(FakeGames.made)
    try:
        module.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return FakeGames.made[first] if games else None


@pytest.fixture
def run_main(monkeypatch):
    return lambda *flags, **games: play_main(monkeypatch, dqn, *flags, **games)


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def differences(ours, theirs, name="checkpoint"):
    """Names of what is not bit-identical in two checkpoints."""
    if isinstance(ours, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [name]
    if isinstance(ours, dict):
        keys = [] if ours.keys() == theirs.keys() else [f"{name}: {sorted(ours.keys() ^ theirs.keys())}"]
        return keys + sum((differences(ours[k], theirs[k], f"{name}.{k}") for k in ours.keys() & theirs.keys()), [])
    if isinstance(ours, list | tuple):
        parts = (differences(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return sum(parts, [])
    return [] if ours == theirs else [name]


# ---------------------------------------------------------------------------------------------------------------------
# The real games
# ---------------------------------------------------------------------------------------------------------------------

PONG = {"id": "ALE/Pong-v5", "kwargs": {}, "references": None}
BREAKOUT = {**PONG, "id": "ALE/Breakout-v5"}


def test_settings_of_the_games(monkeypatch):
    """What the environment is told; the names are those of ale_py 0.12."""
    import ale_py.vector_env

    told = {}
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", lambda *names, **flags: told.update(flags, names=names))
    dqn.make_atari(BREAKOUT, 3)
    assert told.pop("num_threads") >= 1
    assert told == {
        "names": ("breakout", 3), "max_num_frames_per_episode": 4 * 27_000, "repeat_action_probability": 0.25,
        "noop_max": 0, "use_fire_reset": False, "reward_clipping": False,
    }  # fmt: skip


def test_the_games():
    """Zeros before an episode begins; lost lives do not end it; unclipped rewards; the smallest set of actions; and all
    the replaying after a resume rests on: a seed, the actions since, and nothing else decide what happens."""
    games, alone = dqn.make_atari(BREAKOUT, 2), dqn.make_atari(BREAKOUT, 1)
    assert games.single_action_space.n == 4
    obs, info = games.reset(seed=np.array([7, 3]))
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
    assert not obs[:, :3].any() and obs[:, 3].any()
    actions, seen, ends = np.random.default_rng(0).integers(0, 4, 600), [obs[1]], []
    lives = info["lives"][1]
    for action in actions:
        obs, _, terminated, truncated, info = games.step(np.array([0, action]))
        seen.append(obs[1])
        if terminated[1] or truncated[1]:
            ends.append(len(seen))
            assert info["lives"][1] == 0 and lives == 1
            obs, info = games.reset(seed=np.array([-1]), options={"reset_mask": np.array([False, True])})
            seen.append(obs[1])
            assert not obs[1, :3].any() and obs[0, :3].any()  # the other game goes on
        lives = info["lives"][1]
    assert ends and len(np.unique(ends)) == len(ends)

    alone.reset(seed=np.array([99]))
    for action in actions[:50]:
        alone.step(np.array([action]))
    again = [alone.reset(seed=np.array([3]))[0][0]]
    for action in actions:
        obs, _, terminated, truncated, _ = alone.step(np.array([action]))
        again.append(obs[0])
        if terminated[0] or truncated[0]:
            again.append(alone.reset(seed=np.array([-1]))[0][0])
    np.testing.assert_array_equal(np.stack(seen), np.stack(again))
    games.close(), alone.close()


@pytest.mark.parametrize("env_id", ["Hopper-v5", "ALE/Nothing-v5", "Pong", "a/b/c"])
def test_no_atari_game(env_id, capsys):
    with pytest.raises(SystemExit) as stop:
        dqn.make_atari({"id": env_id, "kwargs": {}}, 1)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {env_id} is no Atari game; give an id like ALE/Pong-v5, see ale_py.roms.get_all_rom_ids()\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Always:
    """A policy that takes one action; it counts how often it was asked."""

    def __init__(self, action):
        self.action, self.asked = action, 0

    def act(self, obs):
        assert obs.shape[2:] == (4, 84, 84) and obs.dtype == torch.uint8
        self.asked += 1
        return torch.full(obs.shape[:2], self.action)


def test_evaluation_counts_one_whole_episode_each(monkeypatch):
    """Unclipped returns and lengths of the first episode of every game, whatever the games do after it."""
    monkeypatch.setattr(dqn, "make_atari", FakeGames)
    seeds = [5, 2**31 + 6, 7, 8]
    results = dqn.run_atari_episodes(Always(2), PONG, seeds, epsilon=0.0)
    games = FakeGames.made[-1]
    assert [s for (s,) in games.seeds] == [5, 6, 7, 8]
    played = [episodes[0] for episodes in games.episodes]
    assert results == [(sum(r for *_, r in steps), len(steps)) for steps in played]
    assert len({n for _, n in results}) > 1 and max(abs(r) for *_, r in sum(played, [])) == 3
    assert {a for _, a, _ in sum(played, [])} == {2}
    assert dqn.run_atari_episodes(Always(2), PONG, seeds, epsilon=0.0) == results
    assert dqn.run_atari_episodes(Always(1), PONG, seeds, epsilon=0.0) != results


@pytest.mark.parametrize("epsilon, low, high", [(0.0, 0, 0), (0.5, 0.28, 0.47), (1.0, 0.65, 0.85)])
def test_evaluation_is_epsilon_greedy(monkeypatch, epsilon, low, high):
    """A random action is one of all, the greedy one among them."""
    monkeypatch.setattr(dqn, "make_atari", FakeGames)
    dqn.run_atari_episodes(Always(0), PONG, list(range(40)), epsilon=epsilon)
    actions = np.array([a for episodes in FakeGames.made[-1].episodes for _, a, _ in episodes[0]])
    assert low <= np.mean(actions != 0) <= high
    assert set(actions) == ({0} if epsilon == 0 else set(range(A)))


def test_default_epsilon_of_evaluations():
    assert dqn.run_atari_episodes.__defaults__[-1] == 0.001


# ---------------------------------------------------------------------------------------------------------------------
# Replay memory
# ---------------------------------------------------------------------------------------------------------------------


def lifetime(T, E, seed=0):
    """What one agent sees in T steps of E environments, as rows that are never overwritten, and the ages of these."""
    rng = np.random.default_rng(seed)
    rows = {
        "frame": rng.integers(1, 256, (1, T, E, 84, 84)),
        "action": rng.integers(0, A, (1, T, E)),
        "reward": rng.integers(-1, 2, (1, T, E)),
        "terminal": rng.random((1, T, E)) < 0.2,
        "age": np.zeros((1, T, E), int),
    }
    for t in range(1, T):
        rows["age"][:, t] = np.where(rows["terminal"][:, t - 1], 0, rows["age"][:, t - 1] + 1)
    return rows


@pytest.mark.parametrize("M, E", [(12, 1), (9, 3), (40, 2)])
def test_transitions(M, E):
    """At every time all steps that may be drawn give the stacks of a memory that forgets nothing; the steps before and
    after them would not: their stack is overwritten, or their next frame is not there yet."""
    T = 30
    rows = lifetime(T, E)
    memory = dqn.new_memory(1, min(M, T), E, CPU)
    for t in range(1, T + 1):
        for name, x in rows.items():
            memory[name][:, (t - 1) % M] = torch.from_numpy(x[:, t - 1])
        first, end = dqn.valid_steps(t, M)
        assert first == max(0, t - M + 3) if t > M else first == 0
        assert end == t - 1
        if t % 7 and t < T or end <= first:
            continue
        steps, envs = (x.reshape(1, -1) for x in np.mgrid[first:end, :E])
        batch = dqn.transitions(memory, torch.from_numpy(steps), torch.from_numpy(envs))
        obs, action, reward, next_obs, not_terminal = (x[0].numpy() for x in batch)
        assert batch[0].dtype == torch.uint8
        for n, (step, e) in enumerate(zip(steps[0], envs[0])):
            began = step - rows["age"][0, step, e]
            frames = [rows["frame"][0, i, e] if i >= began else np.zeros((84, 84)) for i in range(step - 3, step + 1)]
            np.testing.assert_array_equal(obs[n], frames)
            assert (action[n], reward[n]) == (rows["action"][0, step, e], rows["reward"][0, step, e])
            assert not_terminal[n] == 1 - rows["terminal"][0, step, e]
            if not_terminal[n]:
                np.testing.assert_array_equal(next_obs[n], [*frames[1:], rows["frame"][0, step + 1, e]])


def test_memory_of_two_seeds():
    """Every seed draws from its own rows."""
    memory = dqn.new_memory(2, 10, 1, CPU)
    for s in range(2):
        for t in range(10):
            memory["frame"][s, t], memory["age"][s, t], memory["action"][s, t] = 100 * s + t, t, s
    obs, action, *_ = dqn.transitions(memory, torch.tensor([[5, 6], [5, 4]]), torch.zeros(2, 2, dtype=torch.long))
    assert obs[..., 0, 0].tolist() == [[[2, 3, 4, 5], [3, 4, 5, 6]], [[102, 103, 104, 105], [101, 102, 103, 104]]]
    assert action.tolist() == [[0, 0], [1, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Files of the DQN Replay Dataset
# ---------------------------------------------------------------------------------------------------------------------


class CircularMemory:
    """The replay memory that logged the dataset, a row at a time, with the snapshots it makes (13.5 of the spec)."""

    def __init__(self, num_rows):
        self.num_rows, self.add_count, self.snapshots = num_rows, 0, []
        self.store = {
            "observation": np.zeros((num_rows, 84, 84), np.uint8),
            "action": np.zeros(num_rows, np.int32),
            "reward": np.zeros(num_rows, np.float32),
            "terminal": np.zeros(num_rows, np.uint8),
        }
        self.ended = True

    def add(self, *row):
        if self.ended:
            self.ended = False
            for _ in range(3):
                self._add(0, 0, 0, 0)
        self._add(*row)
        self.ended = bool(row[-1])

    def _add(self, *row):
        for rows, value in zip(self.store.values(), row):
            rows[self.add_count % self.num_rows] = value
        self.add_count += 1
        if self.add_count % self.num_rows == self.num_rows - 1:
            self.snapshot()

    def snapshot(self):
        self.snapshots.append({name: rows.copy() for name, rows in self.store.items()} | {"add_count": self.add_count})


def some_episodes(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(1, 256, (n, 84, 84), dtype=np.uint8), rng.integers(0, A, n), rng.integers(-3, 4, n))
        for n in lengths
    ]


def read_file(folder, name, number):
    with gzip.open(folder / "replay_logs" / f"{name}_ckpt.{number}.gz") as file:
        return np.load(file, allow_pickle=False)


@pytest.mark.parametrize(
    "lengths, num_rows, num_files",
    [([5, 9, 6], 30, 1), ([5, 9, 6], 32, 1), ([20, 31, 7, 12], 25, 4), ([40], 43, 1), ([40], 20, 3), ([6, 7], 9, 3)],
)
def test_files(lengths, num_rows, num_files, tmp_path):
    """Row by row what the logging memory would have written: padding, terminals, clipping, a stale last row in every
    full file, leftovers in the last one."""
    episodes = some_episodes(lengths)
    dqn.write_replay(tmp_path / "pong", episodes, num_rows, {"env_id": "ALE/Pong-v5"})
    memory = CircularMemory(num_rows)
    for frames, actions, rewards in episodes:
        for t in range(len(rewards)):
            memory.add(frames[t], actions[t], max(-1, min(1, rewards[t])), t == len(rewards) - 1)
    if 0 < memory.add_count % num_rows < num_rows - 1:
        memory.snapshot()
    assert len(memory.snapshots) == num_files
    names = [f"$store$_{name}" for name in memory.store] + ["add_count", "invalid_range"]
    files = {path.name for path in (tmp_path / "pong" / "replay_logs").iterdir()}
    assert files == {f"{name}_ckpt.{number}.gz" for name in names for number in range(num_files)}
    for number, snapshot in enumerate(memory.snapshots):
        for name, rows in snapshot.items():
            ours = read_file(tmp_path / "pong", name if name == "add_count" else f"$store$_{name}", number)
            np.testing.assert_array_equal(ours, rows)
            assert ours.dtype == (np.int64 if name == "add_count" else rows.dtype)
        cursor = snapshot["add_count"] % num_rows
        invalid = [(cursor + k) % num_rows for k in (-1, 0, 1, 2, 3)]
        assert read_file(tmp_path / "pong", "invalid_range", number).tolist() == invalid
    assert json.loads((tmp_path / "pong" / "replay.json").read_text()) == {"env_id": "ALE/Pong-v5"}
    assert not (tmp_path / "pong.tmp").exists()


@pytest.mark.parametrize("lengths, num_rows", [([9, 14, 6], 39), ([20, 31, 7, 12], 25)])
def test_the_offline_scripts_read_the_files(lengths, num_rows, tmp_path):
    """Through their loader: the transitions it draws are transitions of the episodes, and nearly all of them."""
    episodes = some_episodes(lengths)
    metadata = {"env_id": "ALE/Pong-v5", "random": -20.5, "dqn": 3.0}
    dqn.write_replay(tmp_path / "pong", episodes, num_rows, metadata)
    args = offline.Args(dataset=(str(tmp_path / "pong"),), channels=(2, 2, 2))
    files, environment = offline.load_replay(args)
    assert environment == {"id": "ALE/Pong-v5", "kwargs": {}, "references": [-20.5, 3.0]}
    replay = offline.Replay(files, args, CPU)
    replay.use(0, prefetch=False)
    stacks, action, reward, not_terminal = replay.batches(replay.valid[None, :, None])
    stacks, rows = stacks[0, :, 0].numpy(), (x[0, :, 0].tolist() for x in (action, reward, not_terminal))
    known = {}
    for frames, actions, rewards in episodes:
        padded = np.concatenate([np.zeros((3, 84, 84), np.uint8), frames])
        for t in range(len(rewards)):
            last = t == len(rewards) - 1
            next_frame = frames[t + 1] if not last else None
            known[frames[t].tobytes()] = padded[t : t + 4], next_frame, actions[t], np.clip(rewards[t], -1, 1), 1 - last
    for stack, *row in zip(stacks, *rows):
        obs, next_frame, *expected = known.pop(stack[3].tobytes())
        np.testing.assert_array_equal(stack[:4], obs)
        assert row == expected
        if next_frame is not None:
            np.testing.assert_array_equal(stack[4], next_frame)
    assert len(known) <= 6 * len(files)


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


class ReferenceDQN:
    """One seed of DQN in float64: torch.nn modules, and the optimiser in numpy as TensorFlow has it (13.3)."""

    def __init__(self, agent, s, args):
        self.args, self.step = args, 0
        self.network, self.target = self.copy_of(agent.network, s), self.copy_of(agent.target_network, s)
        shapes = [p.shape for p in self.network.parameters()]
        self.m, self.v = [np.zeros(x) for x in shapes], [np.full(x, float(args.optimizer == "rmsprop")) for x in shapes]

    def copy_of(self, network, s):
        layers = []
        pads = ((2, 2, 2, 2), (1, 2, 1, 2), (1, 1, 1, 1)) if self.args.padding == "same" else ((0, 0, 0, 0),) * 3
        for i, stride in enumerate((4, 2, 1)):
            weight, bias = getattr(network, f"weight{i}")[s], getattr(network, f"bias{i}")[s]
            conv = torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], stride, dtype=torch.float64)
            conv.weight.data, conv.bias.data = weight.detach().double().clone(), bias.detach().double().clone()
            layers += [torch.nn.ZeroPad2d(pads[i]), conv, torch.nn.ReLU()]
        for i in (3, 4):
            weight, bias = getattr(network, f"weight{i}")[s], getattr(network, f"bias{i}")[s]
            rows = weight.detach().double()
            rows = rows if rows.shape[0] == bias.numel() else rows.T
            if i == 3:  # the network flattens (height, width, channels), torch (channels, height, width)
                C = layers[-2].out_channels
                side = math.isqrt(rows.shape[1] // C)
                rows = rows.unflatten(1, (side, side, C)).permute(0, 3, 1, 2).flatten(1)
            linear = torch.nn.Linear(*rows.shape[::-1], dtype=torch.float64)
            linear.weight.data, linear.bias.data = rows.clone(), bias.detach().double().flatten().clone()
            layers += [torch.nn.Flatten(), linear, torch.nn.ReLU()] if i == 3 else [linear]
        return torch.nn.Sequential(*layers)

    def values(self, network, frames):
        return network(frames.double() / 255)

    def update(self, obs, action, reward, next_obs, not_terminal):
        with torch.no_grad():
            best = self.values(self.target, next_obs).max(1).values
            y = torch.where(not_terminal > 0, reward + self.args.gamma * best, reward.double())
        q = self.values(self.network, obs)[torch.arange(len(action)), action]
        u = q - y
        loss = torch.where(u.abs() < 1, u**2 / 2, u.abs() - 0.5).mean()
        self.network.zero_grad()
        loss.backward()
        self.step += 1
        for p, m, v in zip(self.network.parameters(), self.m, self.v):
            g, lr, eps = p.grad.numpy(), self.args.learning_rate, self.args.optimizer_eps
            if self.args.optimizer == "rmsprop":
                m += 0.05 * (g - m)
                v += 0.05 * (g**2 - v)
                p.data -= torch.from_numpy(lr * g / np.sqrt(v - m**2 + eps))
            else:
                m += 0.1 * (g - m)
                v += 0.001 * (g**2 - v)
                size = lr * math.sqrt(1 - 0.999**self.step) / (1 - 0.9**self.step)
                p.data -= torch.from_numpy(size * m / (np.sqrt(v) + eps))
        return loss.item(), q.mean().item()

    def synchronize(self):
        self.target.load_state_dict(self.network.state_dict())


@pytest.mark.parametrize("padding, optimizer, eps", [("same", "rmsprop", 1e-5), ("valid", "adam", 3e-4)])
def test_update_against_reference(padding, optimizer, eps):
    """Four updates of two seeds and a copy to the target in between, with errors above and below 1."""
    args = make_args(
        num_seeds=2, padding=padding, optimizer=optimizer, learning_rate=1e-3, optimizer_eps=eps, gamma=0.9
    )
    agent = dqn.DQNAgent(A, args, CPU)
    with torch.no_grad():
        for p in agent.target_network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    references = [ReferenceDQN(agent, s, args) for s in range(2)]
    for n in range(4):
        batch = make_batch(S=2, B=6, seed=n)
        batch[2][0] *= 3
        metrics = dqn.update(agent, batch, args)
        for s, reference in enumerate(references):
            ours = [metrics[name][s].item() for name in ("loss/td", "value/q")]
            np.testing.assert_allclose(ours, reference.update(*(x[s] for x in batch)), rtol=1e-3, atol=1e-4)
        if n == 1:
            dqn.synchronize(agent)
            for reference in references:
                reference.synchronize()
    frames = make_batch(S=2, B=8, seed=9)[0]
    for s, reference in enumerate(references):
        for ours, theirs in (agent.network, reference.network), (agent.target_network, reference.target):
            values = ours(frames)[s, ..., 0].double()
            torch.testing.assert_close(values, reference.values(theirs, frames[s]), rtol=1e-3, atol=1e-3)


def test_a_target_is_a_constant():
    """No gradient reaches the target network, and nobody optimises it; the end of an episode cuts the bootstrap."""
    args = make_args(learning_rate=0.0, gamma=0.5)
    agent = dqn.DQNAgent(A, args, CPU)
    assert not any(p.requires_grad for p in agent.target_network.parameters())
    assert {id(p) for p in agent.optimizers["network"].params} == {id(p) for p in agent.network.parameters()}
    with torch.no_grad():
        for p in [*agent.network.parameters(), *agent.target_network.parameters()]:
            p.zero_()
        agent.target_network.bias4.copy_(torch.tensor([3.0, 8.0, 5.0, -9.0]))
    obs, action, reward, next_obs, _ = make_batch()
    reward.fill_(1)
    for not_terminal, y in (0.0, 1.0), (1.0, 1 + 0.5 * 8):
        batch = obs, action, reward, next_obs, torch.full_like(reward, not_terminal)
        assert dqn.update(agent, batch, args)["loss/td"].item() == pytest.approx(y - 0.5)


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01), []
    for reward in (0.0, 1.0):
        agent = dqn.DQNAgent(A, args, CPU)
        for n in range(4):
            batch = make_batch(S=2, seed=n)
            batch[2][1] += reward
            dqn.update(agent, batch, args)
        states.append({name: p.detach().clone() for name, p in agent.network.named_parameters()})
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
    assert any(not torch.equal(states[0][name][1], states[1][name][1]) for name in states[0])


def test_share_of_random_actions():
    """1 until learning starts, half-way down after half of the steps, then the last value (13.3)."""
    args = dqn.Args()
    steps = {0: 1, 20_000: 1, 145_000: 0.505, 270_000: 0.01, 10**7: 0.01}
    for step, share in steps.items():
        assert dqn.share_of_random_actions(step, args) == pytest.approx(share)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, on games that keep a log of their own
# ---------------------------------------------------------------------------------------------------------------------

BLIND = *SMALL, "--eval-episodes", 0


@pytest.mark.parametrize("num_envs, replay_size", [(1, 100), (3, 33)])
def test_the_memory_is_what_was_played(run_main, num_envs, replay_size, tmp_path):
    """Frames, actions, clipped rewards, ends and ages of the last steps, in every environment of every seed."""
    flags = "--num-steps", 60, "--num-envs", num_envs, "--replay-size", replay_size, "--learning-starts", 40
    games = run_main(*BLIND, *flags, "--num-seeds", 2, "--run-dir", tmp_path / "run")
    memory = checkpoint_of(tmp_path / "run")["memory"]
    T, M = 60 // num_envs, math.ceil(replay_size / num_envs)
    for i, episodes in enumerate(games.episodes):
        s, e = divmod(i, num_envs)
        rows = [
            (*step, t, steps is not episodes[-1] and t == len(steps) - 1)
            for steps in episodes
            for t, step in enumerate(steps)
        ]
        rows = rows[-T:]  # the first episode of all is that of the reset with which the environments are made
        assert len(rows) == T
        for t in range(max(0, T - M), T):
            frame, action, reward, age, over = rows[t]
            np.testing.assert_array_equal(memory["frame"][s, t % M, e], frame)
            stored = [memory[name][s, t % M, e].item() for name in ("action", "reward", "age", "terminal")]
            assert stored[:3] == [action, np.clip(reward, -1, 1), age] and (stored[3] == over or t == T - 1)


@pytest.mark.parametrize(
    "num_envs, starts, every, updates", [(1, 20, 4, 10), (3, 20, 4, 11), (4, 10, 1, 52), (2, 21, 7, 6)]
)
def test_number_of_updates(run_main, monkeypatch, num_envs, starts, every, updates, tmp_path):
    """One per `update_every` steps of a seed once there are more than learning_starts; targets after every third."""
    trained, copied = [], []
    update, synchronize = dqn.update, dqn.synchronize
    monkeypatch.setattr(dqn, "update", lambda *inputs: trained.append(0) or update(*inputs))
    monkeypatch.setattr(dqn, "synchronize", lambda agent: copied.append(len(trained)) or synchronize(agent))
    flags = "--num-envs", num_envs, "--learning-starts", starts, "--update-every", every, "--target-every", 3
    run_main(*BLIND, *flags, "--num-steps", 60, "--run-dir", tmp_path / "run")
    assert len(trained) == updates == checkpoint_of(tmp_path / "run")["num_updates"]
    assert copied == list(range(3, updates + 1, 3))


def test_what_is_drawn(run_main, monkeypatch, tmp_path):
    """All environments and all steps that may be, the newest and the oldest too, alike and anew for every update."""
    drawn, transitions = [], dqn.transitions
    monkeypatch.setattr(dqn, "transitions", lambda *inputs: drawn.append(inputs[1:]) or transitions(*inputs))
    flags = "--num-envs", 3, "--num-seeds", 2, "--learning-starts", 150, "--update-every", 3, "--replay-size", 60
    run_main(*BLIND, *flags, "--num-steps", 240, "--batch-size", 64, "--run-dir", tmp_path / "run")
    first_t, M = 51, 20
    assert len(drawn) == 30 and len({step.numpy().tobytes() for step, _ in drawn}) == 30
    for n, (step, e) in enumerate(drawn):
        t = first_t + n
        assert step.shape == e.shape == (2, 64) and t - M + 3 <= step.min() and step.max() <= t - 2
    ages = torch.stack([first_t + n - 2 - step for n, (step, _) in enumerate(drawn)])
    assert torch.bincount(ages.flatten(), minlength=M - 4).min() > 150  # of 240
    counts = torch.bincount(torch.stack([e for _, e in drawn]).flatten())
    assert len(counts) == 3 and counts.min() > 1100  # of 1280
    assert not torch.equal(drawn[0][0][0], drawn[0][0][1])


def test_exploration(run_main, monkeypatch, tmp_path):
    """All actions alike before learning starts, then the greedy one but for the last share of random ones."""

    def act(self, frames):
        assert self.weight0.requires_grad  # the network that learns, not its target
        return torch.full(frames.shape[:2], 2)

    monkeypatch.setattr(dqn.NatureNetwork, "act", act)
    flags = "--num-envs", 4, "--learning-starts", 400, "--epsilon-steps", 1, "--epsilon", 0.2, "--update-every", 10**6
    games = run_main(*BLIND, *flags, "--num-steps", 1600, "--run-dir", tmp_path / "run")
    for episodes in games.episodes:
        actions = [action for steps in episodes for _, action, _ in steps]
        assert np.bincount(actions[:100], minlength=A).min() > 10
        assert 0.76 < np.mean(np.array(actions[101:]) == 2) < 0.94  # 0.8 + 0.2 / 4


def test_learns_to_take_the_rewarded_action(run_main, tmp_path):
    """The frame shows which of the actions is rewarded: nearly all greedy actions are right after a few updates."""

    class Signals(FakeGames):
        def show(self, i):
            self.shown[i] = self.rngs[i].integers(0, A)
            self.obs[i, -1] = 0
            self.obs[i, -1, 42 * (self.shown[i] // 2) :, 42 * (self.shown[i] % 2) :][:42, :42] = 255

        def begin(self, i):
            super().begin(i)
            self.shown = getattr(self, "shown", {})
            self.show(i)

        def step(self, action):
            reward = [1 if self.shown[i] == a else -1 for i, a in enumerate(action)]
            _, _, terminated, truncated, info = super().step(action)
            for i in range(len(action)):
                self.show(i)
            return self.obs.copy(), np.array(reward), terminated, truncated, info

    flags = "--num-steps", 1000, "--num-envs", 4, "--learning-starts", 100, "--epsilon-steps", 300, "--update-every", 4
    flags += "--optimizer", "adam", "--learning-rate", 3e-3, "--target-every", 50, "--batch-size", 16, "--gamma", 0.5
    run_main(*BLIND, *flags, "--channels", 4, 4, 4, "--run-dir", tmp_path / "run", games=Signals)
    reward = checkpoint_of(tmp_path / "run")["memory"]["reward"][0]
    assert reward[:25].mean() < 0 < 0.8 < reward[-50:].mean()


def test_seed_k_among_three_is_the_run_with_seed_k(run_main, tmp_path):
    """Through main(): the same first weights, games and random actions, and the same agents after 50 updates."""
    flags = *BLIND, "--num-steps", 230, "--learning-starts", 30, "--num-envs", 2, "--epsilon", 1, "--target-every", 20
    runs = {}
    for seed, num_seeds in (3, 3), (3, 1), (5, 1):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        games = run_main(*flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir)
        runs[seed, num_seeds] = checkpoint_of(run_dir), games.seeds
    for k in (0, 2):
        (together, seeds), (alone, own_seeds) = runs[3, 3], runs[3 + k, 1]
        assert together["num_updates"] == 50 == alone["num_updates"]
        assert [s[1:] for s in seeds[2 * k : 2 * k + 2]] == [s[1:] for s in own_seeds]
        for name, rows in together["memory"].items():
            assert torch.equal(rows[k], alone["memory"][name][0]), name
        for name, x in alone["agent"].items():
            if not name.startswith("optimizers"):
                torch.testing.assert_close(together["agent"][name][k], x[0], rtol=1e-3, atol=1e-5)
    assert not torch.equal(runs[3, 3][0]["memory"]["action"][0], runs[3, 3][0]["memory"]["action"][2])


RESUMED = *SMALL, "--num-envs", 2, "--num-seeds", 2, "--learning-starts", 20, "--epsilon-steps", 60, "--replay-size", 90


@pytest.mark.parametrize("at", [40, 133])
def test_resume(run_main, monkeypatch, at, tmp_path):
    """A run that goes on in the middle of episodes, before and after emulators were seeded again, ends as one that was
    never stopped: checkpoint, evaluations, log."""
    monkeypatch.setattr(dqn, "SEED_EVERY", 4)
    flags = *RESUMED, "--eval-every", 60, "--eval-episodes", 2, "--target-every", 7, "--save-replay"
    run_main(*flags, tmp_path / "whole-data", "--num-steps", 240, "--run-dir", tmp_path / "whole")
    run_main(*flags, tmp_path / "parts-data", "--num-steps", at, "--run-dir", tmp_path / "parts")
    evaluations = tmp_path / "parts" / "evaluations.csv"  # without the one at the end of the first part
    kept = [
        row for row in evaluations.read_text().splitlines(True) if row[0] == "u" or int(row.split(",")[0]) % 60 == 0
    ]
    evaluations.write_text("".join(kept))
    flags = "--num-steps", 240, "--save-replay", tmp_path / "data"
    run_main("--resume", tmp_path / "parts", *flags)
    ours, theirs = checkpoint_of(tmp_path / "parts"), checkpoint_of(tmp_path / "whole")
    assert differences(ours, theirs) == []
    assert evaluations.read_text() == (tmp_path / "whole" / "evaluations.csv").read_text()
    for path in (tmp_path / "whole-data" / "replay_logs").iterdir():
        assert path.read_bytes() == (tmp_path / "data" / "replay_logs" / path.name).read_bytes()


def test_seeds_of_the_games(run_main, monkeypatch, tmp_path):
    """A new one with every SEED_EVERY-th episode of an environment, and with no other; they are all different."""
    monkeypatch.setattr(dqn, "SEED_EVERY", 3)
    games = run_main(*BLIND, "--num-steps", 200, "--num-envs", 2, "--num-seeds", 2, "--run-dir", tmp_path / "run")
    for episodes, seeds in zip(games.episodes, games.seeds):
        assert len(seeds) == 1 + math.ceil((len(episodes) - 1) / 3)  # one more: the environments are reset when made
    seeds = sum((seeds[1:] for seeds in games.seeds), [])
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < 2**31


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs, thinned", [(1, None), (3, 60), (1, 1)])
def test_the_log_is_what_was_played(run_main, monkeypatch, num_envs, thinned, tmp_path, capsys):
    """The first seed's finished episodes in the order of their ends, thinned evenly; random play and the best
    evaluation beside them."""
    flags = "--num-steps", 240, "--num-envs", num_envs, "--num-seeds", 2, "--eval-every", 100, "--eval-episodes", 3
    flags += ("--replay-transitions", thinned) if thinned else ()
    epsilons, play = [], dqn.run_atari_episodes

    def recorder(*inputs, **named):
        epsilons.append(named.get("epsilon"))
        return play(*inputs, **named)

    monkeypatch.setattr(dqn, "run_atari_episodes", recorder)
    games = run_main(*SMALL, *flags, "--run-dir", tmp_path / "run", "--save-replay", tmp_path / "data")
    finished = []
    for e in range(num_envs):
        t = 0
        for steps in games.episodes[e][1:-1]:
            t += len(steps)
            finished.append((t, e, steps))
    finished = [steps for *_, steps in sorted(finished, key=lambda episode: episode[:2])]
    share = min(1, (thinned or math.inf) / sum(map(len, finished)))
    kept = [x for i, x in enumerate(finished) if math.floor((i + 1) * share) > math.floor(i * share)]
    kept = kept or finished[-1:]  # one episode at least
    rows = []
    for steps in kept:
        rows += [(0, 0, 0, 0)] * 3
        rows += [(f, a, np.clip(r, -1, 1), t == len(steps) - 1) for t, (f, a, r) in enumerate(steps)]
    for name, column in zip(("observation", "action", "reward", "terminal"), zip(*rows)):
        stored = read_file(tmp_path / "data", f"$store$_{name}", 0)
        assert len(stored) == len(rows) + 1
        for value, expected in zip(stored, column):
            np.testing.assert_array_equal(value, np.broadcast_to(expected, value.shape))
    metadata = json.loads((tmp_path / "data" / "replay.json").read_text())
    evaluations = harness.read_evaluations(tmp_path / "run")
    update, returns = (evaluations[name][evaluations["seed"] == 0] for name in ("update", "return"))
    means = [returns[update == n].mean() for n in np.unique(update)]
    random_play = [sum(r for *_, r in episodes[0]) for episodes in FakeGames.made[-1].episodes]
    assert metadata["env_id"] == "ALE/Pong-v5" and metadata["dqn"] == pytest.approx(max(means))
    assert metadata["random"] == pytest.approx(np.mean(random_play)) and len(random_play) == 3
    assert epsilons == [None] * 6 + [1.0]  # evaluations at 100, 200 and 240 of two seeds, then random play
    assert metadata["episodes"] == len(kept) and metadata["transitions"] == sum(map(len, kept))
    assert metadata["flags"]["num_seeds"] == 2 and metadata["flags"].get("num_envs", 1) == num_envs
    assert f"{len(kept):,} episodes, {sum(map(len, kept)):,} transitions" in capsys.readouterr().out


def test_a_log_without_evaluations_or_episodes(run_main, tmp_path, capsys):
    run_main(*BLIND, "--num-steps", 40, "--run-dir", tmp_path / "run", "--save-replay", tmp_path / "data")
    assert json.loads((tmp_path / "data" / "replay.json").read_text())["dqn"] is None
    run_main(*BLIND, "--num-steps", 2, "--run-dir", tmp_path / "short", "--save-replay", tmp_path / "nothing")
    assert "no episode came to its end" in capsys.readouterr().out and not (tmp_path / "nothing").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What a user can get wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(run_main, capsys):
    """refuses(*flags, words=[...]): exit status 2 and one line on stderr that has these words."""

    def call(*flags, words):
        with pytest.raises(SystemExit) as stop:
            run_main(*flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert all(str(word) in error for word in words), error

    return call


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--channels", 8, 8), ["--channels"]),
        (("--batch-size", 0), ["--batch-size"]),
        (("--epsilon", 1.5), ["--epsilon"]),
        (("--seed", 10**20), ["--seed"]),
        (("--replay-size", 7), ["--replay-size"]),
        (("--replay-size", 16, "--num-envs", 3), ["--replay-size", "--num-envs"]),
        (("--rows-per-file", 4), ["--rows-per-file"]),
        (("--num-steps", 2**24, "--replay-size", 2**24, "--num-seeds", 100), ["--replay-size", "memory"]),
        (("--device", "abacus"), ["abacus"]),
        (("--optimizer", "sgd"), ["optimizer"]),
    ],
)
def test_flags_out_of_range(refuses, flags, words, tmp_path):
    refuses(*BLIND, "--num-steps", 20, *flags, "--run-dir", tmp_path / "run", words=words)
    assert not (tmp_path / "run").exists()


def test_runs_that_cannot_go_on(run_main, refuses, tmp_path):
    run_main(*BLIND, "--num-steps", 20, "--run-dir", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    refuses("--resume", tmp_path / "run", "--num-steps", 10, words=["--num-steps"])
    refuses("--resume", tmp_path / "run", "--save-replay", tmp_path / "data", words=["log", tmp_path / "run"])
    refuses("--resume", tmp_path / "run", "--num-steps", 30, "--batch-size", 5, words=["--batch-size"])
    new = *BLIND, "--num-steps", 20
    refuses(*new, "--run-dir", tmp_path / "run", words=[tmp_path / "run"])
    refuses(*new, "--run-dir", tmp_path / "new", "--save-replay", tmp_path / "run", words=["is there already"])
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before and not (tmp_path / "new").exists()


def test_evaluate(run_main, tmp_path, capsys):
    """--evaluate plays fresh episodes of every seed, and leaves the run as it is."""
    flags = "--num-steps", 20, "--num-seeds", 2, "--num-envs", 2
    run_main(*BLIND, *flags, "--run-dir", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    dqn_args = "--evaluate", tmp_path / "run", "--eval-episodes", 5
    run_main(*dqn_args)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines] == ["seed 0: ", "seed 1: "] and all("over 5 episodes" in line for line in lines)
    run_main(*dqn_args)
    assert capsys.readouterr().out.splitlines() == lines
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# A short real run, its files, and the same run killed and resumed
# ---------------------------------------------------------------------------------------------------------------------

PLAYED = """--env-id ALE/Breakout-v5 --num-steps 600 --num-envs 2 --learning-starts 200 --epsilon 0.5 --channels 2 3 4
    --epsilon-steps 100 --hidden-size 8 --padding valid --batch-size 2 --update-every 8 --target-every 10
    --eval-episodes 0 --checkpoint-every 50 --device cpu --save-replay""".split()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Folder with run/ and data/ of an uninterrupted run on a real game."""
    folder = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as monkeypatch:
        play_main(monkeypatch, dqn, *PLAYED, folder / "data", "--run-dir", folder / "run", games=None)
    return folder


def test_the_files_of_a_real_run(played):
    """Frames of Breakout, with returns and transitions as its loader counts them."""
    metadata = json.loads((played / "data" / "replay.json").read_text())
    files, environment = offline.load_replay(offline.Args(dataset=(str(played / "data"),)))
    assert environment["id"] == "ALE/Breakout-v5" and metadata["episodes"] >= 2
    assert metadata["transitions"] - 1 <= sum(file.valid.sum() for file in files) <= metadata["transitions"]
    frames = read_file(played / "data", "$store$_observation", 0)
    assert not frames[:3].any() and frames[3].any() and frames[:, 20:].max() > 100
    assert set(read_file(played / "data", "$store$_reward", 0)) <= {0, 1}


def test_killed_and_resumed_is_never_stopped(played, monkeypatch, tmp_path):
    """kill -9 at a random moment after a user's first checkpoint: everything ends the same, to the bit."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for longest_delay in (1.5, 0.7, 0.3, 0.1):  # less, should a fast machine have been done before the kill
        folder, delay = tmp_path / f"{longest_delay}", random.uniform(0, longest_delay)
        folder.mkdir()
        command = harness.command("dqn_atari", *PLAYED, folder / "data", "--run-dir", folder / "run")
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.time() + 120
            while not (folder / "run" / "checkpoint.pt").exists() and time.time() < deadline and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
        stopped_at = checkpoint_of(folder / "run")["t"]
        if process.returncode == -signal.SIGKILL and stopped_at < 300:
            break
    where = f"killed {delay:.2f} s after the first checkpoint, at step {stopped_at}"
    assert process.returncode == -signal.SIGKILL and stopped_at < 300, where
    play_main(monkeypatch, dqn, "--resume", folder / "run", games=None)
    assert differences(checkpoint_of(folder / "run"), checkpoint_of(played / "run")) == [], where
    for path in (played / "data" / "replay_logs").iterdir():
        assert path.read_bytes() == (folder / "data" / "replay_logs" / path.name).read_bytes(), where


def test_video(played, tmp_path):
    """--capture-video writes what the agent sees of the first episode, here with a policy that plays at random."""
    pytest.importorskip("moviepy")
    dqn.run_atari_episodes(Always(0), BREAKOUT, [0], tmp_path / "videos", epsilon=1.0)
    videos = list((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 1 and videos[0].stat().st_size > 1000


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_updates_equal_eager_ones():
    """Replays of a captured update give what eager updates give; capturing leaves no trace in the agent."""
    device, agents = torch.device("cuda"), []
    args = make_args(num_seeds=2, learning_rate=0.01)
    rows, M = lifetime(40, 2), 40
    memory = dqn.new_memory(2, M, 2, device)
    for name, x in rows.items():
        memory[name][:] = torch.from_numpy(np.concatenate([x, x[:, ::-1].copy()])).to(device)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(3, 38, (8, 2, 4), generator=generator).to(device)
    envs = torch.randint(0, 2, (8, 2, 4), generator=generator).to(device)
    for captured in (False, True):
        agent = dqn.DQNAgent(A, args, device)
        before = {name: x.clone() for name, x in agent.state_dict().items()}

        def learn(step, e, agent=agent):
            return dqn.update(agent, dqn.transitions(memory, step, e), args)

        if captured:
            learn = dqn.cuda_graph(learn, agent, steps[0], envs[0])
            assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())
        for step, e in zip(steps, envs):
            metrics = learn(step, e)
        agents.append(({name: x.clone() for name, x in agent.state_dict().items()}, metrics["loss/td"].clone()))
    for name, x in agents[0][0].items():
        torch.testing.assert_close(x, agents[1][0][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agents[0][1], agents[1][1], rtol=1e-4, atol=1e-5)
