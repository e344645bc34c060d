"""rem_atari.py against numpy and numbers by hand: mixtures, network, optimiser, loss, updates, the files of the
DQN Replay Dataset with all their traps, evaluation, resume, and learning on Catch.

The logs here are written by a circular memory of this file's own, as Dopamine's is described. Every frame carries the
number of its episode and step, so that the truth about a drawn transition can be read from its pixels.
"""

import gzip
import json
import math
import os
import pickle
import subprocess
import sys
import time

import harness
import numpy as np
import pytest
import torch

rem = harness.load("rem_atari")

A = 3  # actions of the small agents below
SMALL = {"channels": (2, 3, 2), "hidden_size": 5, "batch_size": 3, "num_heads": 4, "device": "cpu"}
TINY = "--channels 2 3 2 --hidden-size 8 --batch-size 4 --padding valid --device cpu".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT / "tests")}


def make_agent(spread=None, **flags):
    """Args and agent. With `spread` all parameters are drawn anew: targets and online networks differ."""
    args = rem.Args(**{**SMALL, **flags})
    agent = rem.Agent(A, args)
    generator = torch.Generator().manual_seed(7)
    for parameter in agent.parameters() if spread else ():
        parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return args, agent


def make_batch(S=1, B=3, seed=0):
    """obs, action, reward, next_obs, not_terminated: random frames, a third of the transitions terminal."""
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (S, B, 5, 84, 84), dtype=np.uint8))
    action = torch.from_numpy(rng.integers(0, A, (S, B)))
    reward = torch.from_numpy(np.float32(rng.choice([-1.0, 0.0, 1.0], (S, B))))
    return frames[:, :, :4], action, reward, frames[:, :, 1:], (torch.arange(B) % 3 > 0).expand(S, B).float()


# The method ---------------------------------------------------------------------------------------
def test_mixtures():
    """They sum to 1, differ from update to update, are each seed's own, and have 13.1's distribution."""
    mixtures = rem.draw_mixtures([5, 6], 40, 2)
    assert mixtures.shape == (rem.CHUNK, 2, 2) and mixtures.dtype == torch.float32
    torch.testing.assert_close(mixtures.sum(-1), torch.ones(rem.CHUNK, 2))
    assert torch.equal(mixtures[:, 1:], rem.draw_mixtures([6], 40, 2))
    assert len(torch.unique(torch.cat([mixtures, rem.draw_mixtures([5, 6], 60, 2)])[..., 0])) == 4 * rem.CHUNK
    many = torch.cat([rem.draw_mixtures(range(40), step, 2) for step in range(0, 400, 20)])[..., 0]
    assert abs((many < 0.25).float().mean() - 1 / 6) < 0.01 and abs(many.mean() - 0.5) < 0.01
    wide = 200 * rem.draw_mixtures(range(40), 0, 200)
    assert abs(wide.std() - 0.578) < 0.01 and abs(wide.mean() - 1) < 1e-4


def numpy_network(frames, weights, biases, padding, num_heads):
    """One network on frames (B, 4, 84, 84), patch by patch."""
    x = frames / 255.0
    pads = {"same": ((2, 2), (1, 2), (1, 1)), "valid": ((0, 0),) * 3}[padding]  # written out in the spec
    for weight, bias, (low, high), stride in zip(weights, biases, pads, (4, 2, 1)):
        x = np.pad(x, ((0, 0), (0, 0), (low, high), (low, high)))
        kernel = weight.shape[-1]
        patches = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
        x = np.maximum(np.einsum("bihwkl,oikl->bohw", patches, weight) + bias.reshape(-1, 1, 1), 0)
    x = np.moveaxis(x, 1, -1).reshape(len(x), -1)
    x = np.maximum(x @ weights[3] + biases[3], 0) @ weights[4] + biases[4]
    return x.reshape(len(x), -1, num_heads)


@pytest.mark.parametrize("padding, num_networks", [("same", 1), ("valid", 2)])
def test_network(padding, num_networks):
    args, agent = make_agent(0.1, padding=padding, num_networks=num_networks, num_seeds=2)
    frames = make_batch(S=2, B=2)[0]
    values = agent.network(frames).detach().numpy()
    assert values.shape == (2, 2, A, 4 * num_networks)
    for s in range(2):
        networks = range(s * num_networks, (s + 1) * num_networks)
        parts = [[np.float64(p[i].detach()) for p in agent.network.weights] for i in networks]
        biases = [[np.float64(p[i].detach()) for p in agent.network.biases] for i in networks]
        slow = [numpy_network(np.float64(frames[s]), w, b, padding, 4) for w, b in zip(parts, biases)]
        np.testing.assert_allclose(values[s], np.concatenate(slow, -1), rtol=1e-4, atol=1e-5)
    greedy = values.mean(-1).argmax(-1)
    np.testing.assert_array_equal(rem.GreedyPolicy(agent.network)(frames), greedy)


def test_sizes_and_first_weights():
    """13.2's numbers of parameters, bounds of the uniform weights, zero biases, targets that are copies."""
    for heads, padding, count in ((1, "same", 4_052_658), (1, "valid", 1_693_362), (200, "same", 5_890_224)):
        network = rem.NatureNetwork(18, heads, lambda *_: None, [None], rem.Args(padding=padding))
        assert sum(p.numel() for p in network.parameters()) == count
    _, agent = make_agent(num_seeds=2, channels=(32, 8, 8), hidden_size=64)
    for weight, bias, fan_in in zip(agent.network.weights, agent.network.biases, (256, 512, 72, 8 * 121, 64)):
        bound = math.sqrt(math.sqrt(3) / fan_in)
        assert 0.95 * bound < weight.abs().max() <= 1.0001 * bound and not bias.any()
        assert not torch.equal(weight[0], weight[1])
    for target, online in zip(agent.target_network.parameters(), agent.network.parameters()):
        assert torch.equal(target, online) and not target.requires_grad


def numpy_adam(p, gradients, rate, eps):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + eps)
    return p


def test_adam_of_tensorflow():
    """Ten steps with small gradients, where epsilon counts, saved and loaded after four of them."""
    start = np.linspace(-1, 1, 12).reshape(3, 4) * 1e-3
    gradients = [10.0 ** np.arange(-4, 0) * np.sin(n + start * 1e3) for n in range(10)]
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    adam = rem.TensorFlowAdam([p], 1e-3, 1e-3)
    for n, gradient in enumerate(gradients):
        if n == 4:
            state = {"state": adam.state_dict()["state"]}
            adam = rem.TensorFlowAdam([p], 1e-3, 1e-3)
            adam.load_state_dict(adam.state_dict() | state)
        rem.minimize((torch.tensor(gradient, dtype=torch.float32) * p).sum(), adam)
    np.testing.assert_allclose(p.detach(), numpy_adam(start, gradients, 1e-3, 1e-3), rtol=2e-4, atol=1e-7)


def constant(network, values):
    """Makes a network return values (A, K) for every state."""
    for parameter in network.parameters():
        parameter.data.zero_()
    network.biases[-1].data.copy_(torch.tensor(values).reshape(1, 1, -1))


def test_loss_and_step_by_hand():
    """Heads that are constant: the mixed targets are 0.25 (4, 0, 0) + 0.75 (0, 4, 2) = (1, 3, 1.5). So y = 1 + 0.5 * 3
    against Q(s, 0) = 1.75, and y = -1 against Q(s, 2) = 0 at an end; the gradients of the last layer's biases are
    alpha times the slopes of Huber's loss, and Adam's first step is known."""
    args, agent = make_agent(gamma=0.5, num_heads=2)
    constant(agent.network, [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    constant(agent.target_network, [[4.0, 0.0], [0.0, 4.0], [0.0, 2.0]])
    obs, _, _, next_obs, _ = make_batch(B=2)
    columns = torch.tensor([[0, 2]]), torch.tensor([[1.0, -1.0]]), next_obs, torch.tensor([[1.0, 0.0]])
    metrics = rem.update(agent, obs, *columns, torch.tensor([[0.25, 0.75]]), args)
    assert metrics["loss/td"].item() == pytest.approx((0.75**2 / 2 + 0.5) / 2)
    assert metrics["value/target_q"].item() == pytest.approx((2.5 - 1) / 2)
    slopes = np.array([[-0.75], [0.0], [1.0]]) / 2 * [0.25, 0.75]
    before = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    after = agent.network.biases[-1].detach().reshape(3, 2)
    np.testing.assert_allclose(after, numpy_adam(before, [slopes], 5e-5, 0.01 / 32), rtol=1e-6)
    assert not any(p.any() for p in agent.network.weights)  # dead layers in front
    rem.synchronize(agent)
    assert torch.equal(agent.target_network.biases[-1], agent.network.biases[-1])


@pytest.mark.parametrize("mixture, head", [([0.0, 1.0, 0.0, 0.0], 1), ([0.1, 0.2, 0.3, 0.4], None)])
def test_one_hot_mixtures_and_equal_heads(mixture, head):
    """g2, g4: one head alone, or any mixture of equal heads, is plain DQN, here in numpy."""
    args, agent = make_agent(0.3)
    if head is None:
        for network in (agent.network, agent.target_network):
            for last in (network.weights[-1], network.biases[-1]):
                last.data = last.data.unflatten(-1, (A, 4))[..., :1].expand(-1, -1, A, 4).flatten(-2).clone()
    obs, action, reward, next_obs, mask = make_batch()
    q, next_q = [net(x)[0, :, :, head or 0].detach().numpy() for net, x in
                 ((agent.network, obs), (agent.target_network, next_obs))]  # fmt: skip
    y = reward[0].numpy() + 0.99 * mask[0].numpy() * next_q.max(-1)
    u = np.abs(q[np.arange(3), action[0]] - y)
    metrics = rem.update(agent, obs, action, reward, next_obs, mask, torch.tensor([mixture]), args)
    assert metrics["loss/td"].item() == pytest.approx(np.where(u <= 1, u**2 / 2, u - 0.5).mean(), rel=1e-5)


def test_seeds_do_not_see_each_other():
    """Seed 1 among three starts, draws and learns as it does alone."""
    args, agent = make_agent(num_seeds=3, learning_rate=1e-3)
    alone_args, alone = make_agent(seed=1, learning_rate=1e-3)
    for step in range(10):
        batch = make_batch(3, seed=step)
        rem.update(agent, *batch, rem.draw_mixtures(range(3), step, 4)[0], args)
        one = [x[1:2] for x in batch]
        rem.update(alone, *one, rem.draw_mixtures([1], step, 4)[0], alone_args)
    for ours, theirs in zip(alone.network.parameters(), agent.network.parameters()):
        torch.testing.assert_close(ours[0], theirs[1], rtol=1e-4, atol=1e-6)


# The files ----------------------------------------------------------------------------------------
CAPACITY = 60  # rows of a file
LENGTHS = 30, 7, 41, 150, 1, 2, 3, 25, 60, 12, 38  # the fourth episode reaches over three files


def frame(episode, step):
    pixels = np.random.default_rng([episode, step]).integers(0, 256, (84, 84), dtype=np.uint8)
    pixels[0, :4] = episode // 256, episode % 256, (step + 1) // 256, (step + 1) % 256  # never black
    return pixels


def identity(pixels):
    """(episode, step) of a frame; (0, -1) of a black one."""
    a, b, c, d = map(int, pixels[0, :4])
    return 256 * a + b, 256 * c + d - 1


def write(folder, number, frames, action, reward, terminal, add_count):
    names = "$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal", "add_count"
    types = np.uint8, np.int32, np.float32, np.uint8, np.int64
    for name, x, kind in zip(names, (frames, action, reward, terminal, add_count), types):
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb", 1) as file:
            np.save(file, np.asarray(x, kind))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Six whole files, dumped before their last row is written, and a final one with the cursor as its add_count.
    Returns the folder and {(episode, step): (action, reward, terminal)} of all transitions that can be rebuilt."""
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
        if (n + 1) % CAPACITY == CAPACITY - 1:
            write(folder, n // CAPACITY, *columns, n + 1)
    write(folder, len(rows) // CAPACITY, *columns, len(rows) % CAPACITY)
    truth = {}
    for n, (name, _, *values) in enumerate(rows):
        first = n // CAPACITY * CAPACITY
        end = min(first + CAPACITY - 1, len(rows))  # of what this file has of its own round
        if name and n - 3 >= first and n + 1 < end:
            truth[name] = tuple(map(float, values))
    return folder, truth


def replay_of(*datasets, first=0, **flags):
    args = rem.Args(**{**SMALL, "dataset": tuple(map(str, datasets)), "num_updates": 1000, **flags})
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
    """All that can be rebuilt is drawn and nothing else: no padding, no stack of two episodes, no stale last row,
    nothing that the last file still holds of the round before."""
    folder, truth = log
    replay = replay_of(folder, files_in_memory=9)
    assert transitions(replay) == truth and len(truth) > 0.9 * sum(LENGTHS)
    action, reward, mask, *frames = replay.draw([4, 5], 20, 7)
    assert len(frames) == 20 and frames[0].shape == (2, 7, 5, 84, 84) and frames[0].dtype == torch.uint8
    for i in np.ndindex(20, 2, 7):
        assert truth[identity(frames[i[0]][i[1:]][3])] == (action[i], reward[i], 1 - mask[i])
    assert torch.equal(replay.draw([5], 20, 7)[3], frames[0][1:])
    assert not torch.equal(replay.draw([5], 40, 7)[3], frames[0][1:])


@pytest.mark.parametrize("add_count, last", [(19, 17), (39, 17), (59, 17), (5, 3), (45, 3), (20, 18), (0, None)])
def test_rows_of_the_last_round(tmp_path, add_count, last):
    """add_count modulo rows; 0 is a memory that holds nothing new."""
    write(tmp_path, 0, np.zeros((20, 84, 84)), np.zeros(20), [0] * 17 + [200, -3, 0.5], np.zeros(20), add_count)
    file = rem.read_file(tmp_path, 0)
    expected = [] if last is None else list(range(3, last + 1))
    assert np.flatnonzero(file.valid).tolist() == expected
    assert file.reward[17:].tolist() == [1, -1, 0.5][: len(file.reward[17:])]


def check_as_authors_read(folder, number, valid, capacity):
    """Dopamine's rule, row by row: its add_count decides whether the memory was full, and where its cursor is."""
    names = "$store$_terminal", "add_count", "invalid_range"
    terminal, add_count, spoilt = [np.load(gzip.open(folder / f"{x}_ckpt.{number}.gz")) for x in names]
    cursor = add_count % capacity
    rows = []
    for row in range(3 if add_count < capacity else 0, capacity if add_count >= capacity else cursor - 1):
        if row not in spoilt and not terminal[[row - 3, row - 2, row - 1]].any():
            rows.append(row)
    assert rows == valid.tolist() and len(list(folder.glob(f"*_ckpt.{number}.gz"))) == 6


def test_valid_rows_of_random_files():
    rng = np.random.default_rng(0)
    for _ in range(20):
        terminal = rng.random(int(rng.integers(0, 81))) < 0.1
        slow = [i for i in range(3, len(terminal) - 1) if not terminal[i - 3 : i].any()]
        assert np.flatnonzero(rem.valid_rows(terminal)).tolist() == slow
    valid = np.flatnonzero(rem.valid_rows(np.zeros(999_999, bool)))  # a public file
    assert (valid[0], valid[-1]) == (3, 999_997)


def test_parts_of_a_log(log):
    """Whole episodes, the same ones for every seed; the beginning; several datasets; files in the order of time."""
    folder, truth = log
    tenth = transitions(replay_of(f"{folder}:0.3", files_in_memory=9))
    assert transitions(replay_of(f"{folder}:0.3", files_in_memory=9, seed=8)) == tenth
    episodes = {episode for episode, _ in tenth}
    assert tenth == {name: x for name, x in truth.items() if name[0] in episodes} and len(episodes) == 3
    start = transitions(replay_of(folder, first_fraction=0.25, files_in_memory=9))
    assert list(start) == list(truth)[: len(start)] and 0.2 < len(start) / len(truth) < 0.3
    files, returns = rem.load_replay(rem.Args(dataset=(str(folder), str(folder.parent)), **SMALL))
    assert len(files) == 14 and len(returns) == 2 * (len(LENGTHS) - 1)  # the last episode is not over
    for number in (10, 9):
        write(folder, number, np.zeros((9, 84, 84)), np.full(9, number), np.zeros(9), np.zeros(9), 8)
    numbers = [file.action[0] for file in rem.load_replay(rem.Args(dataset=(str(folder),)))[0][7:]]
    [path.unlink() for number in (9, 10) for path in folder.glob(f"*.{number}.gz")]
    assert numbers == [9, 10]
    for wrong in (f"{folder}:0", f"{folder}:1.5", folder.parent / "nowhere", "dqn/Pong/1", "1"):
        with pytest.raises(SystemExit, match="error: no"):
            replay_of(wrong)


def test_files_change_and_resume_finds_them_again(log):
    folder, truth = log
    replay = replay_of(folder, files_in_memory=2, files_every=20)
    seen = []
    for period in range(30):
        seen.append(transitions(replay))
        later = replay_of(folder, files_in_memory=2, files_every=20, first=20 * period)
        assert torch.equal(later.draw([0], 20 * period, 4)[3], replay.draw([0], 20 * period, 4)[3])
        replay.change()
    assert all(truth[name] == x for found in seen for name, x in found.items())
    assert {name for found in seen for name in found} == truth.keys() and len(set(map(len, seen))) > 5


@pytest.mark.parametrize("kind", ["NaN", "action", "negative", "frames", "short", "torn", "missing"])
def test_broken_files(tmp_path, kind):
    """Also where only a late row is wrong, and where only the frames are."""
    action, reward = np.zeros(20), np.zeros(20)
    action[17] = {"action": 18, "negative": -1}.get(kind, 0)
    reward[17] = np.nan if kind == "NaN" else 0
    shape = {"frames": (20, 80, 80), "short": (9, 84, 84)}.get(kind, (20, 84, 84))
    write(tmp_path, 0, np.random.default_rng(0).integers(0, 256, shape), action, reward, np.zeros(20), 19)
    path = tmp_path / "$store$_observation_ckpt.0.gz"
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:-2000])
    if kind == "missing":
        (tmp_path / "$store$_reward_ckpt.0.gz").unlink()
    with pytest.raises((SystemExit, OSError)) as error:
        replay_of(tmp_path)
    assert "ckpt.0.gz" in str(error.value) or "file 0 in" in str(error.value)


# Evaluation and runs ------------------------------------------------------------------------------
def test_environment_and_references(tmp_path, log):
    """A file's environment runs only if it is one of gymnasium's or ale_py's; its references count only there."""

    def found(name, dqn, **flags):
        description = {"env_id": name, "random": -17000, "dqn": dqn}
        (log[0].parent / "replay.json").write_text(json.dumps(description))
        env_id, references = rem.evaluation_environment(rem.Args(dataset=(str(log[0]),), **flags))
        return env_id, list(references)

    assert found("ALE/Skiing-v5", -20000) == ("ALE/Skiing-v5", [-20000, -17000])
    assert found("catch:Catch-v0", 1, env_id="catch:Catch-v0") == ("catch:Catch-v0", [-17000, 1])
    assert np.isnan(found("ALE/Skiing-v5", 1, env_id="ALE/Pong-v5")[1]).all()
    assert found("os:Evil-v0", 1, eval_episodes=0)[0] is None
    with pytest.raises(SystemExit, match="give --env-id"):
        found("os:Evil-v0", 1)


class BallChaser(torch.nn.Module):
    """Plays Catch by looking: the ball is above the last row, the paddle in it."""

    def forward(self, frames):
        newest = frames[:, :, -1].float()
        columns = torch.arange(84.0)
        ball = (newest[:, :, :72].sum(2) * columns).sum(-1) / newest[:, :, :72].sum((2, 3))
        paddle = (newest[:, :, 72:].sum(2) * columns).sum(-1) / newest[:, :, 72:].sum((2, 3))
        return 1 + (ball - paddle).sign().long()


def test_evaluation_on_catch_and_atari():
    frozen = pickle.dumps(BallChaser())
    job = frozen, "catch:Catch-v0", (-0.6, 1.0), range(3, 7), 40
    rows = np.stack([rem.run_atari_episode(*job, episode) for episode in range(5)])
    assert rows.shape == (5, 4, 7) and (rows[..., 3] == 1).mean() > 0.9 and (rows[..., 4] == 6).all()
    np.testing.assert_allclose(rows[..., 5], 100 * (rows[..., 3] + 0.6) / 1.6)
    assert (rows[..., 6] >= 1 / 3).all() and rows[..., 6].std() > 0
    alone = rem.run_atari_episode(*job[:3], [5], 40, 2)
    np.testing.assert_array_equal(alone[0], rows[2, 2])
    envs = rem.make_games("ALE/Pong-v5", 2)
    obs, _ = envs.reset(seed=np.array([1, 2], object))
    assert obs.shape == (2, 4, 84, 84) and not obs[:, :3].any() and obs[:, 3].any()
    assert envs.single_action_space.n == 6
    envs.close()


def command(script, *flags):
    return [sys.executable, harness.ROOT / "algorithms" / f"{script}.py", *map(str, flags)]


def run(script, *flags):
    done = subprocess.run(command(script, *flags), env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_log_of_dqn_atari_and_a_killed_run_on_it(tmp_path):
    """dqn_atari's files, several and a partial one, are Catch's transitions; the authors' reader would draw the same
    rows. A run on two files at a time that is killed with -9 ends as one that is not."""
    tiny = [*TINY, "--env-id", "catch:Catch-v0", "--eval-episodes", 2]
    run("dqn_atari", *tiny, "--num-steps", 400, "--learning-starts", 60, "--replay-size", 150, "--eval-every", 200,
        "--run-dir", tmp_path / "dqn", "--save-replay", tmp_path / "log")  # fmt: skip
    folder = tmp_path / "log" / "replay_logs"
    replay = replay_of(folder)
    assert 0.9 * 400 < len(replay.valid) < 400 and len(replay.files) == 4
    for number, file in enumerate(replay.files):
        check_as_authors_read(folder, number, np.flatnonzero(file.valid), capacity=150)
    balls = replay.frames[:, :72, 12:72].amax((1, 2)) > 0  # no ball in padding
    for row in replay.valid.tolist():
        heights = [int(x[:, 12:72].amax(1).nonzero()[0]) // 12 for x in replay.frames[row - 3 : row + 2] if x.any()]
        action, reward, not_terminated = [column[row].item() for column in replay.columns]
        assert balls[row] and heights == list(range(heights[0], heights[0] + len(heights)))
        assert (not_terminated == 0) == (reward != 0) == (heights[-1] == 5 and len(heights) <= 4)

    flags = [*tiny, "--num-heads", 4, "--dataset", folder, "--files-in-memory", 2, "--files-every", 60]
    flags += ["--num-updates", 1000, "--eval-every", 100, "--target-every", 40, "--num-seeds", 2]
    run("rem_atari", *flags, "--run-dir", tmp_path / "whole")
    killed = subprocess.Popen(command("rem_atari", *flags, "--run-dir", tmp_path / "killed"), env=ENVIRONMENT)
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    run("rem_atari", "--resume", tmp_path / "killed")
    ours, theirs = [torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in ("killed", "whole")]
    assert ours["num_updates"] == 1000 and all(torch.equal(x, theirs["agent"][k]) for k, x in ours["agent"].items())
    csv = [(tmp_path / x / "evaluations.csv").read_text() for x in ("killed", "whole")]
    assert csv[0] == csv[1] and csv[0].count("\n") == 1 + 10 * 2 * 2
    assert "policies of update 1,000" in run("rem_atari", "--evaluate", tmp_path / "killed")


def test_rem_learns_catch(tmp_path):
    """From a log whose average return is -0.31 and whose best play is half random."""
    flags = "--channels 8 16 16 --hidden-size 64 --padding valid --learning-rate 1e-3 --adam-eps 1e-6".split()
    flags += "--target-every 100 --num-updates 1000 --eval-every 1000 --eval-episodes 40 --device cpu".split()
    text = run("rem_atari", "--dataset", "atari/catch", "--env-id", "catch:Catch-v0", *flags, "--run-dir", tmp_path / "r")
    rows = np.loadtxt(tmp_path / "r" / "evaluations.csv", delimiter=",", skiprows=1)
    assert rows[:, 3].mean() >= 0.8 and "mean return -0.3" in text
