"""The loader of offline_dqn_atari.py (the same text in its sisters): files of the DQN Replay Dataset, and Minari's.

The logs here are written by a circular memory of this file's own, as Dopamine's is described, with every trap that the
public files have; every frame carries the number of its episode and step, so that the truth about a drawn transition
can be read from its pixels.
"""

import gzip
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import harness
import numpy as np
import pytest
import torch

dqn = harness.load("offline_dqn_atari")

CAPACITY = 60  # rows of a file


def frame(episode, step):
    """A frame with the numbers of its episode and step (plus one: never black) in its first pixels, noise below."""
    pixels = np.random.default_rng([episode, step]).integers(0, 256, (84, 84), dtype=np.uint8)
    pixels[0, :4] = episode // 256, episode % 256, (step + 1) // 256, (step + 1) % 256
    return pixels


def identities(frames):
    """(episode, step) of frames (..., 84, 84); (0, -1) for a black one."""
    pixels = np.int64(frames[..., 0, :4])
    return np.stack([256 * pixels[..., 0] + pixels[..., 1], 256 * pixels[..., 2] + pixels[..., 3] - 1], -1)


def make_episodes(lengths=(30, 7, 41, 150, 1, 2, 3, 25, 60, 12, 38), seed=0):
    """[(actions, rewards), ...]; the fourth reaches over three files, three are shorter than a stack."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 6, T), rng.choice([-1.0, 0.0, 1.0], T)) for T in lengths]


class CircularMemory:
    """A replay memory that is dumped before its last row is written, in every round, and once at the end."""

    def __init__(self, folder, capacity=CAPACITY):
        self.folder, self.capacity, self.add_count, self.number = folder, capacity, 0, 0
        folder.mkdir(parents=True)
        self.rows = {
            "observation": np.zeros((capacity, 84, 84), np.uint8),
            "action": np.zeros(capacity, np.int32),
            "reward": np.zeros(capacity, np.float32),
            "terminal": np.zeros(capacity, np.uint8),
        }
        self.written = []  # (episode, step) by add count; None for padding

    def add(self, identity, *row):
        for name, x in zip(self.rows, row):
            self.rows[name][self.add_count % self.capacity] = x
        self.written.append(identity)
        self.add_count += 1
        if self.add_count % self.capacity == self.capacity - 1:
            self.dump()

    def dump(self):
        arrays = {f"$store$_{name}": x for name, x in self.rows.items()}
        arrays |= {"add_count": np.array(self.add_count), "invalid_range": np.zeros(5, np.int64)}
        for name, x in arrays.items():
            with gzip.open(self.folder / f"{name}_ckpt.{self.number}.gz", "wb", 1) as file:
                np.save(file, x)
        self.number += 1

    def log(self, episodes):
        for e, (actions, rewards) in enumerate(episodes):
            for _ in range(3):
                self.add(None, np.zeros((84, 84), np.uint8), 0, 0, 0)
            for t, (action, reward) in enumerate(zip(actions, rewards)):
                self.add((e, t), frame(e, t), action, reward, t == len(actions) - 1)
        self.dump()
        return self


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The log of make_episodes() and its folder, .../dqn/Pong/1/replay_logs: six whole files and a partial one."""
    folder = tmp_path_factory.mktemp("dqn") / "Pong" / "1" / "replay_logs"
    memory = CircularMemory(folder).log(make_episodes())
    assert memory.number == 7 and 3 < memory.add_count % CAPACITY < CAPACITY - 3
    return memory


def truth(memory, files=None):
    """{(episode, step): (action, reward, terminal)} of all transitions that can be rebuilt: by the order in which rows
    were added, nothing else. Rows t - 3 to t + 1 must be in one dump, and its last row is not: it is overwritten."""
    found, episodes = {}, make_episodes()
    for n, identity in enumerate(memory.written):
        number, row = divmod(n, memory.capacity)
        last = min(memory.add_count - number * memory.capacity, memory.capacity - 1) - 1
        if identity is not None and 3 <= row < last and (files is None or number in files):
            (actions, rewards), (_, t) = episodes[identity[0]], identity
            found[identity] = actions[t], rewards[t], t == len(actions) - 1
    return found


def replay_of(*dataset, device="cpu", **flags):
    args = dqn.Args(**{"dataset": tuple(map(str, dataset)), "env_id": "ALE/Pong-v5", **flags})
    files, environment = dqn.load_replay(args)
    return dqn.Replay(files, args, torch.device(device)), files, environment


def check_transitions(replay, episodes=None):
    """Every row that the replay can draw, against the truth; returns {(episode, step): (action, reward, terminal)}."""
    episodes, found = episodes or make_episodes(), {}
    frames, action, reward, not_terminal = replay.batches(replay.valid[None, None])
    assert frames.dtype == torch.uint8 and frames.shape == (1, 1, len(replay.valid), 5, 84, 84)
    for stack, a, r, mask in zip(frames[0, 0].numpy(), action[0, 0], reward[0, 0], not_terminal[0, 0]):
        identity = identities(stack)
        e, t = map(int, identity[3])
        assert (e, t) not in found
        found[e, t] = int(a), float(r), mask == 0
        assert found[e, t] == (episodes[e][0][t], episodes[e][1][t], t == len(episodes[e][0]) - 1)
        np.testing.assert_array_equal(stack[3], frame(e, t))  # whole, not only its number
        for ago in (1, 2, 3):  # black before the episode began
            assert tuple(identity[3 - ago]) == ((e, t - ago) if t >= ago else (0, -1))
        if mask:
            assert tuple(identity[4]) == (e, t + 1)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which rows can be drawn, and what they are
# ---------------------------------------------------------------------------------------------------------------------


def test_valid_rows():
    """A toy file by hand: padding, an episode of 3, padding, one of 1, padding, one that is not over; row 14 is old."""
    terminal = np.array([0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0], bool)
    assert np.flatnonzero(dqn.valid_rows(terminal, 15)).tolist() == [3, 4, 5, 9, 13]
    assert np.flatnonzero(dqn.valid_rows(terminal, 14)).tolist() == [3, 4, 5, 9]  # row 13 has no next frame
    assert not dqn.valid_rows(terminal, 3).any() and not dqn.valid_rows(np.zeros(2, bool), 2).any()


def test_valid_rows_equal_the_rule_spelled_out():
    rng = np.random.default_rng(0)
    for _ in range(20):
        terminal, n = rng.random(80) < 0.1, int(rng.integers(1, 81))
        slow = [i for i in range(80) if 3 <= i <= n - 2 and not any(terminal[j] for j in (i - 3, i - 2, i - 1))]
        assert np.flatnonzero(dqn.valid_rows(terminal, n)).tolist() == slow


def test_every_transition_of_a_log(log):
    """All that can be rebuilt is drawn and nothing else: no padding, no stack over two episodes, no stale last row,
    nothing that the last file still holds of the round before."""
    replay, files, _ = replay_of(log.folder)
    replay.use(0, prefetch=False)
    found, expected = check_transitions(replay), truth(log)
    assert found == expected and len(files) == 7
    lost = sum(len(actions) for actions, _ in make_episodes()) - len(found)
    assert 0 < lost <= 7 * 5  # five rows of a file, at most
    assert {(4, 0), (5, 1), (6, 2)} & found.keys()  # the ends of episodes of 1 to 3 steps


def test_the_original_limits():
    """A file of a million rows, full: rows 3 to 999,997."""
    valid = np.flatnonzero(dqn.valid_rows(np.zeros(1_000_000, bool), 999_999))
    assert valid[0] == 3 and valid[-1] == 999_997 and len(valid) == 999_995


def without_frames(folder, terminal, reward, add_count, number=0):
    """Writes a file that has no frames, only what says how many there are."""
    arrays = {"$store$_action": np.int32(terminal), "$store$_reward": np.float32(reward)}
    for name, x in (arrays | {"$store$_terminal": np.uint8(terminal), "add_count": np.array(add_count)}).items():
        rewrite(folder / f"{name}_ckpt.{number}.gz", x)
    with gzip.open(folder / f"$store$_observation_ckpt.{number}.gz", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(terminal), 84, 84)}
        np.lib.format.write_array_header_1_0(file, header)


@pytest.mark.parametrize("add_count, last", [(19, 17), (20, 18), (0, 18), (5, 3), (39, 17), (40, 18), (45, 3)])
def test_which_rows_are_of_the_last_round(tmp_path, add_count, last):
    """By how many rows were ever added, or, in the last file of the public logs, by the cursor: 0 where the round is
    complete. A row can be drawn if the one after it is of this round, too."""
    without_frames(tmp_path, np.zeros(20), np.zeros(20), add_count)
    assert np.flatnonzero(dqn.replay_file(tmp_path, 0).valid).tolist() == list(range(3, last + 1))


def test_rewards_are_clipped(tmp_path):
    without_frames(tmp_path, np.zeros(7), [0, 0, 0, 200, -3, 0.5, -1], 7)
    assert dqn.replay_file(tmp_path, 0).reward.tolist() == [0, 0, 0, 1, -1, 0.5, -1]


def test_files_in_the_order_of_time(tmp_path):
    """Number 10 comes after number 9, by default and when they are chosen."""
    for number in (0, 1, 2, 9, 10, 33):
        without_frames(tmp_path, np.zeros(20), np.full(20, number / 100), 19, number)
    for files in (None, (33, 10, 9, 0, 2, 1)):
        args = dqn.Args(dataset=(str(tmp_path),), env_id="ALE/Pong-v5", files=files)
        rewards = [round(100 * float(file.reward[0])) for file in dqn.load_replay(args)[0]]
        assert rewards == [0, 1, 2, 9, 10, 33]


def test_an_episode_cut_after_27000_steps(tmp_path):
    """It is logged as an end: its last step is drawn and does not bootstrap, the next episode begins with black."""
    terminal = np.zeros(27_100, np.uint8)
    terminal[3 + 26_999] = 1
    without_frames(tmp_path, terminal, terminal, 27_099)
    file = dqn.replay_file(tmp_path, 0)
    assert np.flatnonzero(~file.valid).tolist() == [0, 1, 2, 27_003, 27_004, 27_005, 27_098]
    assert np.flatnonzero(file.terminal).tolist() == [27_002] and file.starts.tolist() == [0, 27_003, 27_099]


def test_sampling(log):
    """A uniform number picks a row; every row has its turn, none twice, and indices keep their shape."""
    replay, *_ = replay_of(log.folder)
    replay.use(0, prefetch=False)
    N = len(replay.valid)
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    assert torch.equal(replay(u), replay.valid)
    assert replay(torch.zeros(2, 3, 4, dtype=torch.float64)).shape == (2, 3, 4)
    assert replay(torch.tensor(1 - 2**-53, dtype=torch.float64)) == replay.valid[-1]
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    (index,) = dqn.draw_block(replay, generators, 7)
    assert index.shape == (100, 2, 7) and torch.isin(index, replay.valid).all()
    frames, action, reward, mask = replay.batches(index[:10])
    assert frames.shape == (10, 2, 7, 5, 84, 84) and action.shape == reward.shape == mask.shape == (10, 2, 7)
    assert action.dtype == torch.int64 and reward.dtype == mask.dtype == torch.float32
    alone = replay.batches(index[3:4, 1:, 2:3])
    assert all(torch.equal(x[3, 1, 2], y[0, 0, 0]) for x, y in zip((frames, action, reward, mask), alone))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a log
# ---------------------------------------------------------------------------------------------------------------------


def drawn(replay):
    replay.use(0, prefetch=False)
    return check_transitions(replay)


def test_files(log):
    assert drawn(replay_of(log.folder, files=(1, 4))[0]) == truth(log, files=(1, 4))
    assert drawn(replay_of(log.folder, files=(6,))[0]) == truth(log, files=(6,))  # the partial one


def test_first_fraction(log):
    """The first tenth, and so on, of all rows in the order of time: 59 of every file, and those of the last one."""
    everything, rows_of_file = truth(log), CAPACITY - 1
    row = {x: n // CAPACITY * rows_of_file + n % CAPACITY for n, x in enumerate(log.written) if x}
    num_rows = 6 * rows_of_file + log.add_count % CAPACITY
    for fraction in (0.1, 0.37, 0.9):
        found = drawn(replay_of(log.folder, first_fraction=fraction)[0])
        assert found == {x: everything[x] for x in everything if row[x] < fraction * num_rows}


def test_first_fraction_of_several_logs(log, tmp_path):
    """The beginning of each of them, not the whole of the first."""
    files = dqn.load_replay(dqn.Args(dataset=(str(log.folder), str(log.folder.parent)), first_fraction=0.1))[0]
    drawable = [int(file.valid.sum()) for file in files]
    assert len(drawable) == 14 and drawable[:7] == drawable[7:] and drawable[0] > 0 == sum(drawable[1:7])


def test_subsample(log):
    """Whole episodes, that share of them, by seed; only their frames are kept."""
    everything, kept = truth(log), {}
    for seed in (0, 0, 1):
        replay, *_ = replay_of(log.folder, subsample=0.4, seed=seed)
        found = drawn(replay)
        kept.setdefault(seed, []).append(found.keys())
        assert found == {identity: everything[identity] for identity in found}
        for e in {e for e, _ in found}:  # an episode in one file is whole, or not there
            ids = [n for n, x in enumerate(log.written) if x and x[0] == e]
            if len({n // CAPACITY for n in ids}) == 1:
                assert {x for x in everything if x[0] == e} <= found.keys()
        assert replay.num_rows < 0.7 * log.add_count
    assert kept[0][0] == kept[0][1] != kept[1][0]
    for seed in range(6):  # one episode at least, with or without an end
        assert len(drawn(replay_of(log.folder, subsample=1e-6, seed=seed)[0])) > 0


def test_a_fraction_of_one_of_several_logs(log, tmp_path, capsys):
    """`ID:0.4` keeps that share of this log's episodes, those that --subsample would keep, and all of the other."""
    files = dqn.load_replay(dqn.Args(dataset=(f"{log.folder}:0.4", str(log.folder.parent)), seed=3))[0]
    reduced = dqn.load_replay(dqn.Args(dataset=(str(log.folder),), subsample=0.4, seed=3))[0]
    whole = dqn.load_replay(dqn.Args(dataset=(str(log.folder),)))[0]
    assert len(files) == 14
    for ours, theirs in zip(files, reduced + whole):
        np.testing.assert_array_equal(ours.valid, theirs.valid)
    assert sum(file.valid.sum() for file in reduced) < sum(file.valid.sum() for file in whole)
    for fraction in ("0", "1.5"):
        with pytest.raises(SystemExit) as ended:
            replay_of(f"{log.folder}:{fraction}")
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and f"error: fraction {fraction} of" in error


def test_several_folders_are_put_together(log):
    replay, files, _ = replay_of(log.folder, log.folder.parent)  # the same data, by two of its names
    replay.use(0, prefetch=False)
    assert len(files) == 14 and len(replay.valid) == 2 * len(truth(log))


def test_logs_of_several_games(log, tmp_path, capsys):
    other = tmp_path / "Breakout" / "1"
    other.mkdir(parents=True)
    other = copy_of(log, other / "replay_logs")
    with pytest.raises(SystemExit):
        replay_of(log.folder, other, env_id=None)
    assert "2 games, ['ALE/Breakout-v5', 'ALE/Pong-v5']" in capsys.readouterr().err
    assert len(replay_of(log.folder, other)[1]) == 9  # who names a game is free to


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

SMALL = 2 * 170 * 84 * 84 / 1e9  # gigabytes for two windows of 170 rows, of 402 that there are


def test_windows(log):
    """Data larger than the memory is loaded in turns: each window is right, in its half of the memory, the same for
    the same number, and with time everything has its turn about equally often."""
    replay, *_ = replay_of(log.folder, memory_gb=SMALL)
    assert not replay.whole and sum(x.nbytes for x in replay.buffers) <= SMALL * 1e9
    seen, counts = [], {}
    for number in range(40):
        replay.use(number, prefetch=number < 39)
        seen.append(check_transitions(replay))
        for identity in seen[-1]:
            counts[identity] = counts.get(identity, 0) + 1
    assert counts.keys() == truth(log).keys() and max(counts.values()) <= 40
    sizes = list(map(len, seen))
    assert min(sizes) > 0 and len({frozenset(x) for x in seen}) > 10
    again, *_ = replay_of(log.folder, memory_gb=SMALL)
    for number in (17, 18, 3):  # as a resumed run has it
        again.use(number, prefetch=number == 17)
        assert check_transitions(again) == seen[number]


def test_windows_smaller_than_a_file(tmp_path):
    """Two files of 40 short episodes, 13 rows each; memory for two windows of 65: two whole episodes of either file,
    others every time, each episode about as often as the others."""
    memory = CircularMemory(tmp_path / "replay_logs", capacity=520)
    episodes = make_episodes(80 * [10])
    memory.log(episodes)
    replay, *_ = replay_of(tmp_path, files=(0, 1), memory_gb=2 * 66.5 * 84 * 84 / 1e9)
    counts = np.zeros(80, int)
    for number in range(60):
        plan = replay.plan(number)
        assert [f for f, _, _ in plan] == [0, 0, 1, 1] and sum(j - i for _, i, j in plan) <= replay.num_rows == 65
        assert all((i, j) in replay.episodes[f] for f, i, j in plan) and len({(f, i) for f, i, _ in plan}) == 4
        for f, i, _ in plan:
            counts[40 * f + i // 13] += 1
        if number < 3:
            replay.use(number, prefetch=True)
            assert {e for e, _ in check_transitions(replay, episodes)} == {40 * f + i // 13 for f, i, _ in plan}
    assert (counts > 0).sum() > 70 and counts.max() <= 12


def test_a_window_is_loaded_beside_training_and_not_seen_before_its_time(log, monkeypatch):
    unpack, done = dqn.unpack_frames, []
    monkeypatch.setattr(dqn, "unpack_frames", lambda *args: (unpack(*args), done.append(args[0])))
    replay, *_ = replay_of(log.folder, memory_gb=SMALL)
    replay.use(0, prefetch=True)
    before, rows = check_transitions(replay), replay.valid
    deadline = time.time() + 30
    while not all(job.done() for _, job in replay.jobs) and time.time() < deadline:
        time.sleep(0.01)
    assert replay.next_number == 1 and check_transitions(replay) == before and replay.valid is rows
    loaded = len(done)
    replay.use(1, prefetch=False)
    assert len(done) == loaded and check_transitions(replay) != before
    replay.use(1, prefetch=False)
    assert len(done) == loaded


def test_no_room_for_a_single_episode(log, capsys):
    with pytest.raises(SystemExit):
        replay_of(log.folder, memory_gb=0.0003)
    error = capsys.readouterr().err
    assert error.startswith("error: --memory-gb") and error.count("\n") == 1
    needed = float(error.split("give ")[1].split()[0])
    replay, *_ = replay_of(log.folder, memory_gb=needed * 1.01)  # what it asks for is enough
    replay.use(0, prefetch=False)
    check_transitions(replay)


def test_frames_on_disk(log, tmp_path):
    """The same transitions; the file has no name, so that not even kill -9 leaves it behind."""
    replay, *_ = replay_of(log.folder, frames_dir=str(tmp_path), memory_gb=1e-9)
    assert drawn(replay) == truth(log) and not list(tmp_path.iterdir()) and isinstance(replay.buffers[0], np.memmap)


def test_no_room_on_the_disk(log, tmp_path, capsys, monkeypatch):
    """Told at once: a memory-mapped file that outgrows its disk ends the process without a word."""
    monkeypatch.setattr(dqn.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(SystemExit):
        replay_of(log.folder, frames_dir=str(tmp_path))
    assert "0.0 GB are free in" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_folder_for_frames_on_disk(log, tmp_path, capsys):
    with pytest.raises(SystemExit):
        replay_of(log.folder, frames_dir=str(tmp_path / "nowhere"))
    assert capsys.readouterr().err.startswith("error: no room for ")


MEASURE = """
import sys
sys.path.insert(0, {tests!r})
import harness, torch
dqn = harness.load("offline_dqn_atari")
args = dqn.Args(dataset=({folder!r},), env_id="ALE/Pong-v5", memory_gb={gigabytes})

def memory(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

before = memory("VmRSS")
replay = dqn.Replay(dqn.load_replay(args)[0], args, torch.device("cpu"))
for number in range(4):
    replay.use(number, prefetch=number < 3)
    for _ in range(3):
        replay.batches(dqn.draw_block(replay, [torch.Generator()], 32)[0][:10])
print(memory("VmHWM") - before, len(replay.valid), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures in /proc")
def test_the_memory_budget_is_kept(tmp_path):
    """The peak of a process that samples a file of 20,000 frames, 141 MB, with 60 MB: these, and a few batches."""
    kinds = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}
    arrays = {f"$store$_{name}": np.zeros(20_000, dtype) for name, dtype in kinds.items()}
    arrays["$store$_terminal"][99::100] = 1
    arrays |= {"$store$_observation": np.zeros((20_000, 84, 84), np.uint8), "add_count": np.array(19_999)}
    for name, x in arrays.items():
        with gzip.open(tmp_path / f"{name}_ckpt.0.gz", "wb", 1) as file:
            np.save(file, x)
    code = MEASURE.format(tests=str(harness.ROOT / "tests"), folder=str(tmp_path), gigabytes=0.06)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    growth, drawable = map(int, done.stdout.split())
    batches = 3 * 10 * 32 * 5 * 84 * 84  # rows being gathered, and the last batches
    assert 50e6 < growth < 60e6 + batches + 10e6
    assert 0.9 < drawable / (0.97 * 0.06e9 / 2 / 84 / 84) <= 1  # the window is full; 3 rows of 100 are padding


# ---------------------------------------------------------------------------------------------------------------------
# Minari
# ---------------------------------------------------------------------------------------------------------------------


def write_minari(folder, kind="stack", env_id="ALE/Pong-v5"):
    """The first three episodes of make_episodes() as Minari has them, one of them truncated, rewards times 5."""
    episodes = []
    for e, (actions, rewards) in enumerate(make_episodes()[:3]):
        T = len(actions)
        single = np.stack([frame(e, t) for t in range(T + 1)])
        stack = np.stack([np.stack([single[max(t - ago, 0)] for ago in (3, 2, 1, 0)]) for t in range(T + 1)])
        obs = {"stack": stack, "single": single, "last": np.moveaxis(stack, 1, -1)}[kind]
        ends = np.zeros((2, T), bool)
        ends[int(e == 1), -1] = True
        episodes.append((obs, actions, 5 * rewards, *ends))
    return harness.write_minari(folder, episodes, env_id)


@pytest.mark.parametrize("kind", ["stack", "single", "last"])
def test_minari(tmp_path, kind):
    """Every step is a transition, the last of the truncated episode too, whose next frame counts; clipped rewards."""
    replay, _, environment = replay_of(write_minari(tmp_path / "m", kind), env_id=None)
    replay.use(0, prefetch=False)
    episodes = make_episodes()[:3]
    found = {}
    frames, action, reward, mask = (x[0, 0].numpy() for x in replay.batches(replay.valid[None, None]))
    for i in range(len(frames)):
        ids = identities(frames[i])
        (e, t), T = ids[3], len(episodes[ids[3][0]][0])
        assert tuple(ids[0]) == ((e, t - 3) if t > 2 else (0, -1)) and tuple(ids[4]) == (e, t + 1)
        assert action[i] == episodes[e][0][t] and reward[i] == episodes[e][1][t]
        assert (mask[i] == 0) == (t == T - 1 and e != 1)
        found[e, t] = True
    assert len(found) == len(frames) == sum(len(a) for a, _ in episodes)
    assert environment["id"] == "ALE/Pong-v5" and environment["references"] == dqn.ATARI_REFERENCES["ALE/Pong-v5"]


def report_of(capsys, *dataset):
    """What report_replay prints about these, and the returns that it logs."""
    replay, files, _ = replay_of(*dataset)
    histograms = []
    writer = type("Writer", (), {"add_histogram": lambda self, tag, values: histograms.append((tag, values.tolist()))})
    dqn.report_replay(files, replay, dqn.Args(), writer())
    ((tag, returns),) = histograms
    assert tag == "data/episode_returns"
    return capsys.readouterr().out, returns


def test_report(tmp_path, capsys):
    """Returns of the episodes, of a log's those that came to an end in it; rewards clipped."""
    returns = [float(rewards.sum()) for _, rewards in make_episodes()]
    CircularMemory(tmp_path / "replay_logs", capacity=500).log(make_episodes())
    text, logged = report_of(capsys, tmp_path)
    assert logged == returns and text.startswith("368 transitions in 11 episodes of 1 file(s); ")
    assert f"average episode, rewards clipped: {np.mean(returns):.1f}, of the best: {max(returns):.1f}" in text
    text, logged = report_of(capsys, write_minari(tmp_path / "m"))
    assert logged == returns[:3] and text.startswith("78 transitions in 3 episodes of 1 file(s); ")


def test_minari_data_has_no_numbered_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        replay_of(write_minari(tmp_path / "m"), files=(0,))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "no numbered files" in error


def test_minari_data_with_the_full_set_of_actions(tmp_path):
    """Action 2 is another one there: the games are evaluated with that set, too."""
    folder = write_minari(tmp_path / "m")
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"]) | {"kwargs": {"full_action_space": True, "obs_type": "rgb"}}
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
    args = dqn.Args(dataset=(str(folder),))
    files, environment = dqn.load_replay(args)
    assert environment["kwargs"] == {"full_action_space": True} and dqn.fit_to_game(files, environment, args) == 18


def test_colour_frames():
    """By luminance and area: constant colours stay, and 2 x 2 blocks of a doubled image become their mean."""
    colour = np.full((3, 210, 160, 3), (10, 200, 30), np.uint8)
    np.testing.assert_array_equal(dqn.grey_frames(colour), np.full((3, 84, 84), round(2.99 + 117.4 + 3.42)))
    small = np.random.default_rng(0).integers(0, 256, (2, 84, 84), dtype=np.uint8)
    doubled = np.repeat(np.repeat(small, 2, 1), 2, 2)[..., None].repeat(3, -1)
    np.testing.assert_allclose(dqn.grey_frames(doubled).astype(int), small, atol=1)
    ramp = np.uint8(np.linspace(0, 255, 210))[None, :, None, None] * np.ones((1, 1, 160, 3), np.uint8)
    rows = [np.interp(np.linspace(210 * i / 84, 210 * (i + 1) / 84, 501) - 0.5, range(210), ramp[0, :, 0, 0]).mean()
            for i in range(1, 83)]  # fmt: skip
    np.testing.assert_allclose(dqn.grey_frames(ramp)[0, 1:83, 5], rows, atol=1.5)


@pytest.mark.parametrize("shape, dtype", [((5, 3), np.float32), ((5, 84, 84), np.float32), ((5, 80, 80), np.uint8)])
def test_other_observations(shape, dtype):
    with pytest.raises(ValueError, match="observations of shape"):
        dqn.grey_frames(np.zeros(shape, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Environment and references
# ---------------------------------------------------------------------------------------------------------------------


def test_normalised_score():
    """g6: the logged DQN is 1, random play 0; where DQN is worse than random (Skiing), the ends change places."""
    score = dqn.normalized_score
    assert score(18.0, (-20.7, 18.0)) == pytest.approx(100) and score(-20.7, (-20.7, 18.0)) == 0
    assert score(-16000, sorted((-17000, -20000))) == pytest.approx(133.33, abs=0.01)


@pytest.mark.parametrize(
    "random, best, references",
    [(-20.7, 18.0, [-20.7, 18.0]), (-17000.0, -20000.0, [-20000.0, -17000.0]), (0.0, None, None), (1.0, 1.0, None)],
)
def test_references_of_a_log(tmp_path, random, best, references):
    (tmp_path / "replay.json").write_text(json.dumps({"env_id": "ALE/Skiing-v5", "random": random, "dqn": best}))
    environment = dqn.replay_environment(tmp_path / "replay_logs")
    assert environment == {"id": "ALE/Skiing-v5", "kwargs": {}, "references": references}


def test_environment_by_path(log, tmp_path):
    assert replay_of(log.folder, env_id=None)[2]["id"] == "ALE/Pong-v5"
    assert replay_of(log.folder.parent, env_id=None)[2]["references"] == dqn.ATARI_REFERENCES["ALE/Pong-v5"]
    assert dqn.replay_environment(tmp_path / "SpaceInvaders" / "5" / "replay_logs")["id"] == "ALE/SpaceInvaders-v5"
    assert dqn.replay_environment(tmp_path / "my_log" / "replay_logs")["id"] is None


# ---------------------------------------------------------------------------------------------------------------------
# What is broken ends with one line
# ---------------------------------------------------------------------------------------------------------------------


def copy_of(log, folder, files=(0, 1)):
    folder.mkdir()
    for path in log.folder.iterdir():
        if int(path.name.split(".")[-2]) in files:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def rewrite(path, array):
    with gzip.open(path, "wb", 1) as file:
        np.save(file, array, allow_pickle=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


BREAKAGES = {
    "truncated frames": ("$store$_observation", cut),
    "garbled frames": ("$store$_observation", flip),
    "truncated actions": ("$store$_action", cut),
    "no gzip": ("$store$_reward", lambda path: path.write_bytes(b"not gzip at all")),
    "empty file": ("$store$_observation", lambda path: path.write_bytes(b"")),
    "no frames": ("$store$_observation", lambda path: path.unlink()),
    "no actions": ("$store$_action", lambda path: path.unlink()),
    "no add_count": ("add_count", lambda path: path.unlink()),
    "frames of 80 x 80": ("$store$_observation", lambda path: rewrite(path, np.zeros((CAPACITY, 80, 80), np.uint8))),
    "float frames": ("$store$_observation", lambda path: rewrite(path, np.zeros((CAPACITY, 84, 84), np.float32))),
    "too few rewards": ("$store$_reward", lambda path: rewrite(path, np.zeros(3, np.float32))),
    "rewards that are no numbers": ("$store$_reward", lambda path: rewrite(path, np.full(CAPACITY, np.nan))),
    "pickled actions": ("$store$_action", lambda path: rewrite(path, np.array([print] * CAPACITY, dtype=object))),
    "negative actions": ("$store$_action", lambda path: rewrite(path, np.full(CAPACITY, -1))),
    "actions of no game": ("$store$_action", lambda path: rewrite(path, np.full(CAPACITY, 256))),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_files(log, tmp_path, capsys, breakage):
    name, act = BREAKAGES[breakage]
    folder = copy_of(log, tmp_path / "log")
    act(folder / f"{name}_ckpt.1.gz")
    with pytest.raises(SystemExit) as ended:
        replay, *_ = replay_of(folder)
        replay.use(0, prefetch=False)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and str(folder) in error, error
    assert error.startswith("error: ") and "is broken (" in error and error.endswith("download or write it again\n")


def test_no_replay_at_all(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    hdf5 = harness.write_d4rl(tmp_path / "a.hdf5", harness.hopper_episodes(2, 3))
    for given in (tmp_path / "empty", hdf5, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as ended:
            replay_of(given)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and str(given) in error and error.count("\n") == 1


def test_minari_data_of_another_kind(tmp_path, capsys):
    continuous = harness.write_minari(tmp_path / "hopper", harness.hopper_episodes(2, 3))
    elsewhere = write_minari(tmp_path / "elsewhere", env_id="os:system")
    for given in (continuous, elsewhere):
        with pytest.raises(SystemExit) as ended:
            replay_of(given)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and str(given) in error and error.count("\n") == 1, error


def test_parts_that_are_not_there(log, capsys):
    for flags, word in (({"files": (0, 9, 12)}, "[9, 12]"), ({"first_fraction": 0.0}, "no transition")):
        with pytest.raises(SystemExit):
            replay_of(log.folder, **flags)
        assert word in capsys.readouterr().err


def test_actions_that_the_game_does_not_have(log, tmp_path, capsys):
    folder = copy_of(log, tmp_path / "log")
    rewrite(folder / "$store$_action_ckpt.0.gz", np.full(CAPACITY, 17))
    args = dqn.Args(dataset=(str(folder),), env_id="ALE/Pong-v5")
    with pytest.raises(SystemExit):
        dqn.fit_to_game(*dqn.load_replay(args), args)
    assert capsys.readouterr().err.startswith("error: the log has 18 actions, ALE/Pong-v5 has 6; ")
    args.env_id = "ALE/Seaquest-v5"
    assert dqn.fit_to_game(*dqn.load_replay(args), args) == 18
    files, environment = dqn.load_replay(args)
    assert dqn.fit_to_game(files, environment | {"id": None}, dqn.Args(eval_episodes=0)) == 18
    assert math.isfinite(args.gamma)


def test_a_window_that_turns_out_broken_leaves_the_run_as_it_was(log, tmp_path, capsys):
    """The error comes where the window is needed; what was drawn before is as it should be."""
    folder = copy_of(log, tmp_path / "log", files=range(7))
    replay, *_ = replay_of(folder, memory_gb=SMALL)
    for number in range(7):
        cut(folder / f"$store$_observation_ckpt.{number}.gz") if number else None
    with pytest.raises(SystemExit):
        for number in range(20):
            replay.use(number, prefetch=True)
    assert "is broken (EOFError" in capsys.readouterr().err


def test_closing_stops_the_threads(log, monkeypatch):
    """A run that ends does not wait for a window that nobody needs any more."""

    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, n):
            time.sleep(0.05)
            return self.file.read(n)

    opener = gzip.open
    replay, *_ = replay_of(log.folder, memory_gb=SMALL)
    monkeypatch.setattr(dqn.gzip, "open", lambda path: Slow(opener(path)))
    replay.start_loading(0)
    replay.close()
    for _, job in replay.jobs:
        job.result(timeout=20)
