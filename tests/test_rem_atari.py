"""rem_atari.py against numpy: mixtures, network, Adam, the files of the DQN Replay Dataset with their traps, evaluation,
resume. Its updates and runs are tested beside those of the other offline scripts, in test_offline_atari.py. The loader's logs are written by a circular memory of this file's own; every frame
carries the number of its episode and step, so that the truth about a transition can be read from its pixels."""

import gzip
import json
import math
import pickle

import harness
import numpy as np
import pytest
import torch
from reference import nature_network, random_frames

rem = harness.load("rem_atari")

A = 3  # actions of the small agents below
SMALL = {"channels": (2, 3, 2), "hidden_size": 5, "batch_size": 3, "num_heads": 4, "device": "cpu"}
TINY = "--channels 2 3 2 --hidden-size 8 --batch-size 4 --padding valid --device cpu".split()


def make_agent(spread=None, **flags):
    """Args and agent. With `spread` all parameters are drawn anew: targets and online networks differ."""
    args = rem.Args(**{**SMALL, **flags})
    agent = rem.Agent(A, args)
    torch.manual_seed(7)
    for parameter in agent.parameters() if spread else ():
        parameter.data.normal_(0, spread)
    return args, agent


# The method ---------------------------------------------------------------------------------------
def test_mixtures():
    mixtures = rem.draw_mixtures([5, 6], 40, 2)
    torch.testing.assert_close(mixtures.sum(-1), torch.ones(rem.CHUNK, 2))
    assert torch.equal(mixtures[:, 1:], rem.draw_mixtures([6], 40, 2))
    assert len(torch.unique(torch.cat([mixtures, rem.draw_mixtures([5, 6], 60, 2)])[..., 0])) == 4 * rem.CHUNK
    many = torch.cat([rem.draw_mixtures(range(40), step, 2) for step in range(0, 400, 20)])[..., 0]
    assert abs((many < 0.25).float().mean() - 1 / 6) < 0.01 and abs(many.mean() - 0.5) < 0.01
    assert abs((200 * rem.draw_mixtures(range(40), 0, 200)).std() - 0.578) < 0.01


@pytest.mark.parametrize("padding, C", [("same", 1), ("valid", 2)])
def test_network(padding, C):
    _, agent = make_agent(0.1, padding=padding, num_networks=C, num_seeds=2)
    frames = random_frames(S=2, B=2)[0]
    layers = [*agent.network.weights, *agent.network.biases]
    values = agent.network(frames).detach().numpy()
    assert values.shape == (2, 2, A, 4 * C)
    for s in range(2):
        networks = [[np.float64(p[i].detach()) for p in layers] for i in range(s * C, (s + 1) * C)]
        slow = [nature_network(network, frames[s], padding).reshape(2, A, 4) for network in networks]
        np.testing.assert_allclose(values[s], np.concatenate(slow, -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rem.GreedyPolicy(agent.network)(frames), values.mean(-1).argmax(-1))


def numpy_adam(p, gradients, rate, eps):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + eps)
    return p


def test_adam_of_tensorflow():
    start = np.linspace(-1, 1, 12).reshape(3, 4) * 1e-3
    gradients = [10.0 ** np.arange(-4, 0) * np.sin(n + start * 1e3) for n in range(10)]
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    adam = rem.TensorFlowAdam([p], 1e-3, 1e-3)
    for gradient in gradients:
        rem.minimize((torch.tensor(gradient, dtype=torch.float32) * p).sum(), adam)
    np.testing.assert_allclose(p.detach(), numpy_adam(start, gradients, 1e-3, 1e-3), rtol=2e-4, atol=1e-7)


# The files ----------------------------------------------------------------------------------------
CAPACITY = 60  # rows of a file
LENGTHS = 30, 7, 41, 150, 1, 2, 3, 25, 60, 12, 38  # the fourth episode reaches over three files


def frame(episode, step):
    pixels = np.random.default_rng([episode, step]).integers(0, 256, (84, 84), dtype=np.uint8)
    pixels[0, :2] = episode, step + 1  # never black
    return pixels


def identity(pixels):
    """(episode, step) of a frame; (0, -1) of a black one."""
    return int(pixels[0, 0]), int(pixels[0, 1]) - 1


def write(folder, number, frames, action, reward, terminal, add_count):
    names = "$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal", "add_count"
    types = np.uint8, np.int32, np.float32, np.uint8, np.int64
    for name, x, kind in zip(names, (frames, action, reward, terminal, add_count), types):
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb", 1) as file:
            np.save(file, np.asarray(x, kind))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Folder of six files and a partial one; {(episode, step): (action, reward, terminal)} of what they hold whole."""
    folder = tmp_path_factory.mktemp("dqn") / "Pong" / "1" / "replay_logs"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    columns = [np.zeros((CAPACITY, 84, 84)), *np.zeros((3, CAPACITY))]
    rows = []
    for episode, length in enumerate(LENGTHS):
        rows += 3 * [(None, np.zeros((84, 84)), 0, 0, 0)]
        for t in range(length):
            rows.append(((episode, t), frame(episode, t), rng.integers(6), rng.integers(-1, 2), t == length - 1))
    for n, (_, *values) in enumerate(rows):
        for column, value in zip(columns, values):
            column[n % CAPACITY] = value
        if (n + 1) % CAPACITY == CAPACITY - 1:  # before the last row is written
            write(folder, n // CAPACITY, *columns, n + 1)
    write(folder, len(rows) // CAPACITY, *columns, len(rows) % CAPACITY)
    whole = [n for n in range(len(rows) - 1) if 3 <= n % CAPACITY < CAPACITY - 2]  # rows n - 3 to n + 1 in a file
    return folder, {rows[n][0]: tuple(map(float, rows[n][2:])) for n in whole if rows[n][0]}


def replay_of(*datasets, first=0, **flags):
    args = rem.Args(tuple(map(str, datasets)), **{**SMALL, "files_in_memory": 9, "num_updates": 1000, **flags})
    return rem.LoggedFrames(rem.load_replay(args)[0], args, first)


def transitions(replay):
    """All that a replay can draw, checked frame by frame: {(episode, step): (action, reward, terminal)}."""
    found = {}
    for row in replay.valid.tolist():
        pixels = replay.frames[row - 3 : row + 2].numpy()
        episode, t = identity(pixels[3])
        action, reward, not_terminated = [column[row].item() for column in replay.columns]
        assert (episode, t) not in found and np.array_equal(pixels[3], frame(episode, t))
        assert [identity(x) for x in pixels[2::-1]] == [(episode, t - k) if t >= k else (0, -1) for k in (1, 2, 3)]
        assert identity(pixels[4]) == (episode, t + 1) or not not_terminated
        found[episode, t] = action, reward, 1 - not_terminated
    return found


def test_every_transition_of_a_log(log):
    """All that can be rebuilt is drawn and nothing else: no padding, no stack of two episodes, no stale row. Files
    change, and a resumed run finds the same ones."""
    folder, truth = log
    replay = replay_of(folder)
    assert transitions(replay) == truth and len(truth) > 0.9 * sum(LENGTHS)
    action, reward, mask, *frames = replay.draw([4, 5], 20, 7)
    assert len(frames) == 20 and frames[0].shape == (2, 7, 5, 84, 84) and frames[0].dtype == torch.uint8
    for i in np.ndindex(20, 2, 7):
        assert truth[identity(frames[i[0]][i[1:]][3])] == (action[i], reward[i], 1 - mask[i])
    assert torch.equal(replay.draw([5], 20, 7)[3], frames[0][1:])
    assert not torch.equal(replay.draw([5], 40, 7)[3], frames[0][1:])
    replay = replay_of(folder, files_in_memory=2, files_every=20)
    seen = []
    for first in range(0, 600, 20):
        seen.append(transitions(replay))
        later = replay_of(folder, files_in_memory=2, files_every=20, first=first)
        assert torch.equal(later.draw([0], first, 4)[3], replay.draw([0], first, 4)[3])
        replay.change()
    found = {name: x for part in seen for name, x in part.items()}
    assert found == truth and len(set(map(len, seen))) > 5


@pytest.mark.parametrize("add_count, last", [(19, 17), (39, 17), (59, 17), (5, 3), (45, 3), (20, 18), (0, 2)])
def test_rows_of_the_last_round(tmp_path, add_count, last):
    """add_count modulo rows; 0 is a memory that holds nothing new. Rewards are clipped."""
    write(tmp_path, 0, np.zeros((20, 84, 84)), np.zeros(20), [0.5, 200, -3, *17 * [0]], np.zeros(20), add_count)
    file = rem.read_file(tmp_path, 0)
    assert np.flatnonzero(file.valid).tolist() == list(range(3, last + 1))
    assert file.reward[:3].tolist() == ([0.5, 1, -1] if add_count else [])
    assert np.flatnonzero(rem.valid_rows(np.zeros(999_999, bool)))[[0, -1]].tolist() == [3, 999_997]  # a public file


def test_parts_of_a_log(log):
    """Whole episodes, the same ones for every seed; the beginning; several datasets; files in the order of time."""
    folder, truth = log
    part = transitions(replay_of(f"{folder}:0.3"))
    assert transitions(replay_of(f"{folder}:0.3", seed=8)) == part
    episodes = {episode for episode, _ in part}
    assert part == {name: x for name, x in truth.items() if name[0] in episodes} and len(episodes) == 3
    start = transitions(replay_of(folder, first_fraction=0.25))
    assert list(start) == list(truth)[: len(start)] and 0.2 < len(start) / len(truth) < 0.3
    for number in (10, 9):
        write(folder, number, np.zeros((9, 84, 84)), np.full(9, number), np.zeros(9), np.zeros(9), 8)
    files, _ = rem.load_replay(rem.Args(dataset=(str(folder), str(folder.parent)), **SMALL))
    [path.unlink() for number in (9, 10) for path in folder.glob(f"*.{number}.gz")]
    assert len(files) == 18 and [file.action[0] for file in files[7:9]] == [9, 10]
    for wrong in (f"{folder}:0", f"{folder}:1.5", folder.parent / "nowhere", "dqn/Pong/1", "1"):
        with pytest.raises(SystemExit, match="error: no"):
            replay_of(wrong)


@pytest.mark.parametrize("action, reward, rows, side, torn", [(18, 0, 20, 84, 0), (-1, 0, 20, 84, 0),
    (0, np.nan, 20, 84, 0), (0, 0, 20, 99, 0), (0, 0, 9, 84, 0), (0, 0, 20, 84, 2000)])  # fmt: skip
def test_broken_files(tmp_path, action, reward, rows, side, torn):
    late = np.arange(20) == 17
    frames = np.random.default_rng(0).integers(0, 256, (rows, side, side))
    write(tmp_path, 0, frames, action * late, np.where(late, reward, 0), 0 * late, 19)
    path = tmp_path / "$store$_observation_ckpt.0.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size - torn])
    with pytest.raises((SystemExit, OSError), match=r"ckpt\.0\.gz|file 0 in"):
        replay_of(tmp_path)


# Evaluation and runs ------------------------------------------------------------------------------
def test_environment_and_references(log):
    """A file's environment runs only if it is one of gymnasium's or ale_py's; its references count only there."""

    def found(named, given):
        description = {"env_id": named, "random": -17000, "dqn": -20000}
        (log[0].parent / "replay.json").write_text(json.dumps(description))
        return rem.evaluation_environment(rem.Args(dataset=(str(log[0]),), env_id=given))

    assert found("ALE/Skiing-v5", None) == ("ALE/Skiing-v5", [-20000, -17000])
    assert found("a:B-v0", "a:B-v0") == ("a:B-v0", [-20000, -17000])
    assert np.isnan(found("ALE/Skiing-v5", "ALE/Pong-v5")[1]).all()
    with pytest.raises(SystemExit, match="give --env-id"):
        found("os:Evil-v0", None)


def test_evaluation():
    """Rows of Catch; Atari's first observation is black but for its last frame."""
    _, agent = make_agent(0.3, num_seeds=4)
    job = "catch:Catch-v0", (-0.6, 1.0), range(3, 7), 40
    rows = [rem.run_atari_episode(pickle.dumps(rem.GreedyPolicy(agent.network)), *job, e) for e in range(25)]
    _, seed, episode, returns, length, score, share = np.concatenate(rows).T
    assert (length == 6).all() and (share >= 1 / 3).all() and set(returns) == {-1, 1}
    np.testing.assert_allclose(score, 100 * (returns + 0.6) / 1.6)
    obs, _ = rem.make_games("ALE/Pong-v5", 2).reset(seed=np.array([1, 2], object))
    assert obs.shape == (2, 4, 84, 84) and not obs[:, :3].any() and obs[:, 3].any()


def run(script, *flags, kill_at=None):
    """What a script prints; with `kill_at`, it is killed once that file is there."""
    process = harness.fork(script, *flags)
    if kill_at:
        harness.wait_for(kill_at, process.is_alive)
        process.kill()
        process.join()
        return harness.assert_no_orphans(process.pid)
    done = harness.finish(process)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_log_of_dqn_atari_and_a_killed_run_on_it(tmp_path):
    """The files of dqn_atari.py, itself killed and resumed, hold Catch's transitions; Dopamine's rule, by add_count
    and invalid_range, draws the same rows. A killed run on two of them at a time ends as one that was not killed."""
    tiny = [*TINY, "--env-id", "catch:Catch-v0", "--eval-episodes", 2]
    online = [*tiny, "--num-steps", 600, "--learning-starts", 60, "--replay-size", 150, "--eval-every", 100,
              "--run-dir", tmp_path / "dqn", "--save-replay", tmp_path / "log"]  # fmt: skip
    run("dqn_atari", *online, kill_at=tmp_path / "dqn" / "checkpoint.pt")
    done = harness.run("dqn_atari", "--resume", tmp_path / "dqn", PYTHONPATH=str(harness.ROOT / "tests"))  # as a user
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "log" / "replay_logs"
    replay = replay_of(folder)
    assert 0.9 * 600 < len(replay.valid) < 600 and len(replay.files) >= 6
    for number, file in enumerate(replay.files):
        names = "$store$_terminal", "add_count", "invalid_range"
        terminal, add_count, spoilt = [np.load(gzip.open(folder / f"{x}_ckpt.{number}.gz")) for x in names]
        rows = [i for i in range(3, add_count - 1) if i not in spoilt and not terminal[i - 3 : i].any()]
        assert rows == np.flatnonzero(file.valid).tolist() and add_count < 150
    cut = 0
    for row in replay.valid.tolist():
        near = [x for x in replay.frames[row - 3 : row + 2] if x.any()]
        heights = [int(x.amax(1).nonzero()[0]) // 12 for x in near]  # of the ball
        _, reward, not_terminated = [column[row].item() for column in replay.columns]
        assert heights == list(range(heights[0], heights[0] + len(heights))) and len(near) <= 4 + not_terminated
        cut += reward == not_terminated == 0  # in the episode that the kill has cut
        assert cut <= 1 and (reward != 0) == (heights[-1] == 5 and not not_terminated)

    flags = [*tiny, "--num-heads", 4, "--dataset", folder, "--files-in-memory", 2, "--files-every", 60]
    flags += ["--num-updates", 600, "--eval-every", 60, "--target-every", 40, "--num-seeds", 2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("rem_atari", *flags, "--run-dir", whole)
    run("rem_atari", *flags, "--run-dir", killed, kill_at=killed / "checkpoint.pt")
    run("rem_atari", "--resume", killed)
    ours, theirs = [torch.load(x / "checkpoint.pt", weights_only=True) for x in (killed, whole)]
    assert ours["num_updates"] == 600 and all(torch.equal(x, theirs["agent"][k]) for k, x in ours["agent"].items())
    csv = (killed / "evaluations.csv").read_text()
    assert csv == (whole / "evaluations.csv").read_text() and csv.count("\n") == 1 + 10 * 2 * 2
    assert "policies of update 600" in run("rem_atari", "--evaluate", killed)
