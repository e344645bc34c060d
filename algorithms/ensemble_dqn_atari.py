"""Ensemble-DQN: many Q-functions on one network, on the logged frames of another agent.

Papers: R. Agarwal, D. Schuurmans, M. Norouzi, "An Optimistic Perspective on Offline Reinforcement
Learning", 2020, arXiv:1907.04543 (this baseline, the DQN Replay Dataset); V. Mnih et al., "Playing Atari with
Deep Reinforcement Learning", 2013, arXiv:1312.5602 (DQN; its numbers), and its Nature article of 2015;
O. Anschel, N. Baram, N. Shimkin, "Averaged-DQN", 2017, arXiv:1611.01929.

Idea. A network has 200 heads, each with a value for every action and first weights of its own. Every head
is a DQN: it learns from the same minibatch, towards the target of the same head in the frozen network. The
agent acts by the mean of the heads. This is what REM is measured against: an ensemble whose members do not
mix. With --averaged-target all heads learn one target, from the mean of the frozen heads.

Objectives. Shapes: S seeds, C networks per seed (one here), B batch, A actions, K values per action, the
heads, R rows of a file of the log.
    loss      mean over k of mean huber(Q_k(s, a) - y_k),                                      DQN (2)
              y_k = r + gamma (1 - terminal) max over a' of Q_target,k(s', a'), or the same of
              mean over j of Q_target,j(s', a') for all heads: Averaged Ensemble-DQN
    gradient  that of Q alone, y being a constant;                                             DQN (3)
              huber(u) = u^2 / 2 if |u| <= 1, else |u| - 1/2
    targets   Q_target <- Q after every --target-every updates

What differs from the papers and their code, and why.
    - The averaged target is the maximum of the mean, as in Averaged-DQN; the paper's words allow the mean
      of the maxima too, and its code has neither.
    - Targets are copied after updates 2,000, 4,000, ... The REM code, whose target network starts with
      weights of its own, copies after 1, 2,001, ... Its "8,000" counts agent steps, 4 an update.
    - Padding, first weights and the place of Adam's epsilon are those of the code's TensorFlow.
    - As in the code, 5 random files of a million frames lie in memory for 62,500 updates at a time.
      Ours are the same for all seeds, and a batch is drawn uniformly from all their rows.
    - An evaluation is --eval-episodes whole episodes (the paper: 125,000 steps). The paper's score is
      that of the best evaluation, ours the mean of the last ten; the last line has both.
    - Random play scores 0, the agent that logged scores 100 at its best, as in the paper. Both returns
      stand in replay.json beside the log, {"env_id": , "random": , "dqn": }; without it: no scores.
    - An episode that was cut after 27,000 steps is logged as terminal: nothing tells it from a true end.
    - The public logs come from older ROMs than ale-py's, which for 29 of the 60 games are different ones:
      returns in these do not compare. tests/benchmark/atari.md marks them, and has both returns of all.

Run:      python algorithms/ensemble_dqn_atari.py --dataset dqn/Pong/1 --env-id ALE/Pong-v5
Catch:    PYTHONPATH=tests python algorithms/ensemble_dqn_atari.py --dataset atari/catch
          --env-id catch:Catch-v0 --channels 8 16 16 --hidden-size 64 --padding valid --learning-rate 1e-3
          --adam-eps 1e-6 --target-every 100 --num-updates 2000 --eval-every 100 --num-seeds 3
Expected: by this command a return of 1.0, the best there is, from update 700 on; the log's is -0.3
"""

import contextlib
import copy
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
torch.backends.cudnn.benchmark = True  # the fastest convolutions for these shapes

CHUNK = 20  # updates whose batches are drawn together, and which a GPU replays as one CUDA graph
# Random numbers are a function of (seed, purpose, update, ...), so that no generator's state has to be saved.
# Purposes start at 1, because numpy takes (s, u, 0) for (s, u)
DRAWS = 1
EVALUATION = 2
FILES = 4

NAME = re.compile(r"(.*?)(?::(0\.\d*[1-9]\d*|1\.0))?")  # of a dataset: `ID:0.1` is ID and the share 0.1


@dataclass
class Args:
    dataset: tuple[str, ...] = ("atari/mspacman",)  # folders of DQN Replay files; `ID:0.1`: a tenth of its episodes
    env_id: str | None = None  # evaluation environment, also `module:Env-v0`; default: the one the log names
    first_fraction: float = 1.0  # learn from this first part of every log only, its worst play
    files_in_memory: int = 5  # files whose frames are in memory, 7 GB each; as much again for the next ones
    files_every: int = 62_500  # updates between changes of the files in memory, where the log has more
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation
    num_updates: int = 12_500_000  # gradient steps; the paper's 5X: 62,500,000
    batch_size: int = 32  # transitions per update and seed
    channels: tuple[int, int, int] = (32, 64, 64)  # of the three convolutions
    hidden_size: int = 512  # width of the layer after them
    padding: Literal["same", "valid"] = "same"  # same: the REM code's; valid: the Nature article's
    num_heads: int = 200  # values per action, each a Q-function
    averaged_target: bool = False  # one target for all heads, from the mean of the frozen ones
    learning_rate: float = 5e-5  # Adam's step size
    adam_eps: float = 0.01 / 32  # Adam's epsilon; short runs want 1e-6, for a head has a K-th of the gradient
    gamma: float = 0.99  # discount factor
    target_every: int = 2_000  # updates between copies of the network to its target
    eval_every: int = 62_500  # updates between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed, one action in a thousand at random; 0: never
    log_every: int = 1_000  # updates between entries in TensorBoard
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/DATASET/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing

    def __post_init__(self):
        # as tuples, of which JSON makes lists; files by full path, so that a run goes on from anywhere
        self.channels = tuple(self.channels)
        self.dataset = tuple(
            os.path.abspath(name) if os.path.exists(NAME.fullmatch(name)[1]) else name
            for name in self.dataset
        )
        if not (0 <= self.gamma <= 1 and 0 < self.first_fraction <= 1):
            sys.exit("error: gamma and first_fraction are shares; give numbers in [0, 1] and (0, 1]")
        periods = self.num_updates, self.files_every, self.target_every, self.eval_every, self.log_every
        if any(period <= 0 or period % CHUNK for period in periods):
            sys.exit(f"error: num_updates and all ..._every count in steps of {CHUNK}; give multiples of it")


# Random numbers -----------------------------------------------------------------------------------
def random_generators(seeds, purpose, step):
    """One a seed, whose numbers do not depend on its neighbours."""
    return [np.random.default_rng((seed, purpose, step)) for seed in seeds]


# The idea: every head is a DQN of its own ---------------------------------------------------------
def best_values(values, averaged):
    """Values (S, B, A, K) of the best action: of each head's own (S, B, K), or of the mean's (S, B, 1)."""
    if averaged:
        values = values.mean(-1, keepdim=True)
    return values.amax(2)


def huber(u):
    """u^2 / 2 where |u| <= 1, beyond that |u| - 1/2, elementwise: a slope of 1 at most."""
    size = u.abs()
    return torch.where(size <= 1, 0.5 * u.square(), size - 0.5)


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def fan_in_scaled_uniform(weight, fan_in, fan_out, generator):
    """Uniform weights of variance 1 / (sqrt(3) in): the REM code's choice for networks with several heads."""
    bound = math.sqrt(math.sqrt(3) / fan_in)
    weight.uniform_(-bound, bound, generator=generator)


class NatureNetwork(nn.Module):
    """S * C independent networks of the Nature article side by side; those of a seed see the same frames.
    Three convolutions, each one for all networks; a hidden layer; num_heads values an action."""

    KERNELS = 8, 4, 3
    STRIDES = 4, 2, 1

    def __init__(self, num_actions, num_heads, init, generators, args, C=1):
        super().__init__()
        self.C = C
        self.num_heads = num_heads
        self.pads = []  # pixels before and after the input of each convolution
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()

        def add_layer(shape, fan_in, fan_out, num_outputs):
            weight = torch.empty(len(generators) * C, *shape)
            for i in range(len(weight)):
                init(weight[i], fan_in, fan_out, generators[i // C])
            self.weights.append(weight)
            self.biases.append(torch.zeros(len(weight), 1, num_outputs))

        num_inputs = 4
        size = 84
        for num_outputs, kernel, stride in zip(args.channels, self.KERNELS, self.STRIDES):
            missing = 0
            if args.padding == "same":
                missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            self.pads.append((missing // 2, missing - missing // 2))  # TensorFlow's: the odd one after
            size = (size + missing - kernel) // stride + 1
            shape = num_outputs, num_inputs, kernel, kernel
            add_layer(shape, num_inputs * kernel**2, num_outputs * kernel**2, num_outputs)
            num_inputs = num_outputs
        num_inputs *= size**2
        for num_outputs in (args.hidden_size, num_actions * num_heads):
            add_layer((num_inputs, num_outputs), num_inputs, num_outputs, num_outputs)
            num_inputs = num_outputs

    def forward(self, frames):
        """frames (S, B, 4, 84, 84) uint8 -> (S, B, A, K), the values of a seed's networks side by side."""
        x = frames.transpose(0, 1).flatten(1, 2)  # (B, S * 4, 84, 84)
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
        *convolutions, hidden, last = zip(self.weights, self.biases)
        for (weight, bias), stride, (pad, after) in zip(convolutions, self.STRIDES, self.pads):
            if pad != after:
                x = nn.functional.pad(x, (pad, after, pad, after))
                pad = 0
            groups = x.shape[1] // weight.shape[2]  # S in the first convolution, then S * C
            weight = weight.flatten(0, 1)
            x = nn.functional.conv2d(x, weight, bias.flatten(), stride, pad, groups=groups)
            x = x.relu_()
        x = x.unflatten(1, (len(self.weights[0]), -1))  # (B, S * C, channels, height, width)
        x = x.permute(1, 0, 3, 4, 2).flatten(2)
        weight, bias = hidden
        x = torch.baddbmm(bias, x, weight).relu_()
        weight, bias = last
        x = torch.baddbmm(bias, x, weight)
        x = x.unflatten(-1, (-1, self.num_heads)).unflatten(0, (-1, self.C))  # (S, C, B, A, heads)
        return x.permute(0, 2, 3, 1, 4).flatten(3)


class GreedyPolicy(nn.Module):
    """Frames (S, B, 4, 84, 84) -> best actions (S, B) by the mean over K of their values."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, frames):
        return self.network(frames).mean(-1).argmax(-1)


class TensorFlowAdam(torch.optim.Adam):
    """Adam as in TensorFlow, which adds epsilon to sqrt(v) before v's bias is corrected: smaller first steps.
    p <- p - learning_rate sqrt(1 - 0.999^t) / (1 - 0.9^t) m / (sqrt(v) + eps)"""

    def __init__(self, parameters, learning_rate, eps):
        rate = torch.zeros((), device=parameters[0].device)
        super().__init__(parameters, rate, eps=eps, fused=True, capturable=rate.is_cuda)
        self.learning_rate = learning_rate
        for parameter in parameters:
            self.state[parameter] = {
                "num_steps": torch.zeros_like(rate),
                "step": torch.full_like(rate, math.inf),  # after so many, torch corrects no bias
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self):
        group = self.param_groups[0]
        first = self.state[group["params"][0]]
        t = first["num_steps"].add_(1).double()
        group["lr"].copy_(self.learning_rate * (1 - 0.999**t).sqrt() / (1 - 0.9**t))
        super().step()


class Agent(nn.Module):
    """Networks and optimizers of S independent agents."""

    def __init__(self, num_actions, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        init = fan_in_scaled_uniform
        self.network = NatureNetwork(num_actions, args.num_heads, init, generators, args)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)
        self.to(args.device)
        adam = TensorFlowAdam(list(self.network.parameters()), args.learning_rate, args.adam_eps)
        self.optimizers = {"network": adam}


# The update ---------------------------------------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def update(agent, obs, action, reward, next_obs, not_terminated, args):
    """One gradient step of every agent on obs and next_obs (S, B, 4, 84, 84), action, reward and
    not_terminated (S, B). Returns what to log, (S,) each, still on the device: nothing waits for a GPU."""
    # the targets, DQN (2): every frozen head's best value in the next state
    with torch.no_grad():
        next_q = best_values(agent.target_network(next_obs), args.averaged_target)  # (S, B, K or 1)
        target_q = reward[..., None] + args.gamma * not_terminated[..., None] * next_q

    # a gradient step on the logged actions' values, DQN (3)
    q = agent.network(obs).take_along_dim(action[..., None, None], 2).squeeze(2)  # (S, B, K)
    loss = huber(q - target_q).mean((1, 2))  # (S,)
    minimize(loss.sum(), agent.optimizers["network"])  # sum over S: seeds never mix

    return {
        "loss/td": loss.detach(),
        "value/q": q.detach().mean((1, 2)),
        "value/target_q": target_q.mean((1, 2)),
    }


def synchronize(agent):
    """Q_target <- Q."""
    with torch.no_grad():
        targets = agent.target_network.parameters()
        for target, online in zip(targets, agent.network.parameters()):
            target.copy_(online)


# Plumbing of the offline Atari scripts: data ------------------------------------------------------
class ReplayFile(NamedTuple):
    """R rows of logged play in the order of time; the frame that follows a row's is in the next row. Three
    black rows come before every episode, as the past of its first stacks."""

    path: Path  # of the frames, a gzip'ed .npy of (R or more, 84, 84) uint8
    action: np.ndarray  # (R,)
    reward: np.ndarray  # (R,), clipped to [-1, 1]
    terminal: np.ndarray  # (R,) bool
    valid: np.ndarray  # (R,) bool, rows to learn from


def find_replay(name):
    """Folder with the files of a log: given or embedded here."""
    embedded = Path(__file__).resolve().parent.parent / "tests" / "data"
    for folder in (Path(name), Path(name, "replay_logs"), Path(embedded, name, "replay_logs")):
        if list(folder.glob("$store$_observation_ckpt.*.gz")):
            return folder
    known = [str(folder.relative_to(embedded)) for folder in embedded.glob("atari/*")]
    sys.exit(f"error: no files $store$_..._ckpt.N.gz in {name}; embedded are {known}")


def valid_rows(terminal):
    """Rows t to learn from, (R,): frames t - 3 to t + 1 are there, and no end is in rows t - 3 to t - 1. That
    leaves out stacks of two episodes and the black rows between them, three after every end."""
    valid = np.zeros(len(terminal), bool)
    valid[3:-1] = True
    for ago in (1, 2, 3):
        valid[ago:] &= ~terminal[:-ago]
    return valid


def read_file(folder, number):
    """File number N of a log, all but its frames."""

    def read(name):
        content = gzip.decompress((folder / f"{name}_ckpt.{number}.gz").read_bytes())
        return np.load(io.BytesIO(content))

    # a snapshot of a circular memory: rows that its last round had not reached are a round old
    add_count = int(read("add_count"))
    action = read("$store$_action")
    num_rows = add_count % len(action) or min(add_count, len(action))
    action = action[:num_rows]
    reward = read("$store$_reward")[:num_rows]
    terminal = read("$store$_terminal")[:num_rows].astype(bool)
    if not (np.isfinite(reward) & (0 <= action) & (action < 18)).all():
        sys.exit(f"error: file {number} in {folder} has rewards that are not finite, or actions of no game")
    path = folder / f"$store$_observation_ckpt.{number}.gz"
    return ReplayFile(path, action, reward.clip(-1, 1), terminal, valid_rows(terminal))


def load_replay(args):
    """The files of --dataset that are to be learned from, in the order of time; returns of their episodes."""
    files = []
    returns = []
    for name in args.dataset:
        name, share = NAME.fullmatch(name).groups()
        folder = find_replay(name)
        paths = folder.glob("$store$_observation_ckpt.*.gz")
        numbers = sorted(int(path.name.split(".")[-2]) for path in paths)
        log = [read_file(folder, number) for number in tqdm(numbers, "reading", disable=None)]
        _, *columns = zip(*log)
        _, reward, terminal, valid = map(np.concatenate, columns)

        # the first part of the log, then a share of its episodes, which may go on in the next file
        valid[math.ceil(args.first_fraction * len(valid)) :] = False
        episode = np.cumsum(terminal) - terminal  # of every row
        episodes = np.random.default_rng(0).permutation(np.unique(episode[valid]))
        fraction = float(share or 1)
        if not (0 < fraction <= 1 and len(episodes)):
            sys.exit(f"error: nothing of {name} is left to learn from; give larger shares, in (0, 1]")
        kept = episodes[: max(1, round(fraction * len(episodes)))]
        valid &= np.isin(episode, kept)
        returns.append(np.bincount(episode[valid], reward[valid])[kept])
        ends = np.cumsum([len(file.valid) for file in log])
        for file, part in zip(log, np.split(valid, ends)):
            if part.any():
                files.append(file._replace(valid=part))
    return files, np.concatenate(returns)


def evaluation_environment(args):
    """Environment of the evaluations, and the returns that score 0 and 100, of random play and of the agent
    that logged at its best. The first log may name all three, in replay.json beside its files' folder."""
    path = find_replay(NAME.fullmatch(args.dataset[0])[1]).with_name("replay.json")
    log = {}
    if path.exists():
        log = json.loads(path.read_text())
    env_id = args.env_id
    if not env_id and log.get("env_id") in gym.registry:  # so that no file has us run foreign code
        env_id = log["env_id"]
    if args.eval_episodes and not env_id:
        sys.exit(f"error: the log names no environment of gymnasium or ale_py, {log}; give --env-id")
    references = np.nan, np.nan
    if log and log["env_id"] == env_id:
        references = sorted((log["random"], log["dqn"]))  # in Skiing it is DQN that is worse
    return env_id, references


def unpack(path, frames):
    """Fills frames (R, 84, 84) with the first R of a file, and reads on to its end, where the checksum is."""
    try:
        with gzip.open(path) as file:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if shape[1:] != (84, 84) or dtype != np.uint8 or fortran_order:
                raise ValueError(f"frames of shape {shape[1:]} and type {dtype}")
            for row in range(0, len(frames), 256):
                block = frames[row : row + 256]
                block[:] = np.frombuffer(file.read(block.nbytes), np.uint8).reshape(block.shape)
            while file.read(2**20):
                pass
    except Exception as error:  # gzip, zlib and numpy have errors of their own, none of which names the file
        raise OSError(f"{path} is broken") from error


def to_device(x, device):
    """x there; from pinned memory, because copies from other memory wait for the GPU."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class LoggedFrames:
    """Single frames of a few files in memory, on the device where they fit. Every --files-every updates
    others take their place, which threads have unpacked meanwhile."""

    def __init__(self, files, args, first):
        self.files = files
        self.args = args
        self.every = args.files_every
        if len(files) <= args.files_in_memory:
            self.every = args.num_updates  # they stay
        self.threads = ThreadPool(args.files_in_memory)
        self.start(first // self.every)
        self.change()

    def start(self, period):
        """Threads begin to unpack the files of a period, which depend on its number alone."""
        order = np.random.default_rng((period, FILES)).permutation(len(self.files))
        chosen = [self.files[i] for i in sorted(order[: self.args.files_in_memory])]
        paths, *columns = zip(*chosen)
        ends = np.cumsum([len(column) for column in columns[0]])
        frames = np.empty((ends[-1], 84, 84), np.uint8)
        job = self.threads.starmap_async(unpack, zip(paths, np.split(frames, ends)))
        self.coming = [(period, columns, frames, job)]

    def change(self):
        """Makes the files that were unpacked those to draw from, and starts with the next ones."""
        period, columns, frames, job = self.coming.pop()  # so that no other name keeps them in memory
        job.get()
        self.frames = None  # makes room
        self.frames = torch.from_numpy(frames)
        with contextlib.suppress(torch.OutOfMemoryError):
            self.frames = self.frames.to(self.args.device)
        action, reward, terminal, valid = map(np.concatenate, columns)
        columns = np.flatnonzero(valid), np.int64(action), reward, np.float32(~terminal)
        self.valid, *self.columns = [torch.from_numpy(x).to(self.frames.device) for x in columns]
        if (period + 1) * self.every < self.args.num_updates:
            self.start(period + 1)

    def draw(self, seeds, num_updates, batch_size):
        """action, reward, not_terminated (CHUNK, S, B) and frames t - 3 to t + 1, CHUNK tensors
        (S, B, 5, 84, 84), for the updates after num_updates; each seed draws its own."""
        generators = random_generators(seeds, DRAWS, num_updates)
        draws = [generator.integers(len(self.valid), size=(CHUNK, batch_size)) for generator in generators]
        draws = torch.from_numpy(np.stack(draws, axis=1))
        rows = self.valid[to_device(draws, self.valid.device)]
        near = rows[..., None] + torch.arange(-3, 2, device=rows.device)
        # one tensor an update, because large new ones cost a CPU time
        frames = [self.frames.index_select(0, x.flatten()).view(*x.shape, 84, 84) for x in near]
        columns = [column[rows] for column in self.columns]
        return [to_device(x, self.args.device) for x in columns + frames]


# Plumbing of all Atari scripts: evaluation, run folder --------------------------------------------
ATARI_ROW = "update", "seed", "episode", "return", "length", "normalized_score", "most_frequent_action"


def make_games(env_id, num_envs):
    """Environments side by side that show the last 4 frames, (num_envs, 4, 84, 84), black before an episode
    begins. Atari's as in the DQN Replay Dataset: the maximum of the last two of 4 frames, sticky actions,
    27,000 steps at most; neither no-ops nor fire at the start, and losing a life ends nothing."""
    if env_id.startswith("ALE/"):
        flags = {"noop_max": 0, "use_fire_reset": False, "reward_clipping": False, "num_threads": num_envs}
        return gym.make_vec(env_id, num_envs, "vector_entry_point", **flags)
    stack = partial(gym.wrappers.FrameStackObservation, stack_size=4, padding_type="zero")
    return gym.make_vec(env_id, num_envs, "sync", wrappers=[stack])


def start_worker():
    """An evaluation worker has one thread, and never outlives its parent."""
    torch.set_num_threads(1)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run_atari_episode(policy, env_id, references, seeds, num_updates, episode):
    """One episode of every seed, rows (S, 7). policy: any module (S, 1, 4, 84, 84) -> (S, 1), pickled."""
    policy = pickle.loads(policy)
    envs = make_games(env_id, len(seeds))
    num_actions = envs.single_action_space.n
    generators = [np.random.default_rng((seed, EVALUATION, num_updates, episode + 1)) for seed in seeds]
    env_seeds = [int(generator.integers(2**31)) for generator in generators]
    obs, _ = envs.reset(seed=np.array(env_seeds, object))  # as all kinds of environments take them
    returns = np.zeros(len(seeds))
    counts = np.zeros((len(seeds), num_actions))
    running = np.ones(len(seeds), bool)  # what comes after a seed's first episode does not count
    while running.any():
        with torch.no_grad():
            action = policy(torch.from_numpy(obs)[:, None])[:, 0].numpy()
        for s, generator in enumerate(generators):
            if generator.random() < 0.001:
                action[s] = generator.integers(num_actions)
        counts[range(len(seeds)), action] += running
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    lengths = counts.sum(1)
    low, high = references
    scores = 100 * (returns - low) / (high - low)
    shares = counts.max(1) / lengths
    columns = np.broadcast_arrays(num_updates, seeds, episode, returns, lengths, scores, shares)
    return np.stack(columns, axis=1)


def atari_summary(rows, num_seeds):
    """Mean of the last ten evaluations, +- its standard deviation over seeds, and the best evaluation."""
    if len(rows) == 0:
        return "nothing was evaluated"
    evaluations = np.unique(rows[:, 0])
    last = rows[np.isin(rows[:, 0], evaluations[-10:])]
    means = last.reshape(-1, num_seeds, len(ATARI_ROW)).mean(0)  # (S, 7)
    _, _, _, returns, _, scores, shares = means.T
    best = max(rows[rows[:, 0] == evaluation, 3].mean() for evaluation in evaluations)
    text = f"return {returns.mean():.2f}, normalised score {scores.mean():.1f}"
    if num_seeds > 1:
        text += f" (+- {returns.std():.2f} and {scores.std():.1f} over seeds)"
    return f"{text}, best return {best:.2f}, most frequent action {shares.mean():.2f}"


def atari_report(rows, jobs, run_dir, writer):
    """Rows of all evaluations, those of `jobs` being new: to screen, TensorBoard, evaluations.csv."""
    if not jobs:
        return rows
    new_rows = np.concatenate([job.result() for job in jobs])
    num_updates, _, _, *means = new_rows.mean(0)
    text = f"update {num_updates:,.0f}:"
    for name, mean in zip(ATARI_ROW[3:], means):
        text += f" {name} {mean:.2f}"
        writer.add_scalar(f"evaluation/{name}", mean, num_updates)
    tqdm.write(text)
    rows = np.concatenate([rows, new_rows])
    np.savetxt(run_dir / "evaluations.csv", rows, "%.10g", ",", header=",".join(ATARI_ROW), comments="")
    return rows


def log(metrics, num_updates, writer):
    """Metrics to TensorBoard. A loss that is not finite ends the run, before its agent is saved."""
    for name, metric in metrics.items():
        if not metric.isfinite().all():
            sys.exit(f"error: {name} is not finite at update {num_updates}; see the last checkpoint")
        writer.add_scalar(name, metric.mean().item(), num_updates)


def run_folder(args):
    """Where the run is, or will be."""
    dataset = args.dataset[0].split("/")[-2:]
    name = f"{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    new = Path("runs", Path(__file__).stem, *dataset, name)
    return Path(args.evaluate or args.resume or args.run_dir or new)


def open_run_dir(run_dir, args):
    """Makes the folder, if it is not --resume's, and its config.json: command line, flags, versions."""
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    versions = {package.name: package.version for package in distributions()}
    config = {"command": sys.argv, "args": asdict(args), "versions": versions}
    del config["args"]["device"]  # a run may go on elsewhere
    path = run_dir / "config.tmp"
    path.write_text(json.dumps(config, indent=2))
    os.replace(path, run_dir / "config.json")


def save(path, agent, rows, num_updates):
    """All that a run needs to go on: the old file or the new one, never half of it."""
    optimizers = {name: x.state_dict()["state"] for name, x in agent.optimizers.items()}
    checkpoint = {"agent": agent.state_dict(), "optimizers": optimizers}
    checkpoint |= {"rows": torch.from_numpy(rows), "num_updates": num_updates}
    torch.save(checkpoint, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path, agent):
    """Puts the agent back; returns rows and num_updates."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    agent.load_state_dict(checkpoint["agent"])
    for name, optimizer in agent.optimizers.items():
        state = {"state": checkpoint["optimizers"][name]}
        optimizer.load_state_dict(optimizer.state_dict() | state)  # with the settings of this device
    return checkpoint["rows"].numpy(), checkpoint["num_updates"]


# Training -----------------------------------------------------------------------------------------
class CudaGraph:
    """A step that a GPU replays as one CUDA graph. Its first three calls, in which PyTorch sets
    itself up, are ordinary ones; the fourth is recorded. On a CPU all calls are ordinary."""

    def __init__(self, step):
        self.step = step
        self.num_calls = 0

    def __call__(self, *inputs):
        self.num_calls += 1
        if self.num_calls <= 3 or not inputs[0].is_cuda:
            return self.step(*inputs)
        if self.num_calls == 4:
            self.inputs = [x.clone() for x in inputs]  # where the graph reads
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(inputs[0].device), torch.cuda.graph(self.graph):  # records, runs nothing
                self.outputs = self.step(*self.inputs)
        for x, new_x in zip(self.inputs, inputs):
            x.copy_(new_x)
        self.graph.replay()
        return self.outputs


def main():
    args = tyro.cli(Args)
    if args.evaluate or args.resume:  # the run's flags, then those of this call
        config = json.loads(Path(args.evaluate or args.resume, "config.json").read_text())
        args = tyro.cli(Args, default=Args(**config["args"]))
    seeds = range(args.seed, args.seed + args.num_seeds)
    files, returns = load_replay(args)
    env_id, references = evaluation_environment(args)
    num_actions = 1 + max(int(file.action.max()) for file in files)
    if env_id:
        envs = make_games(env_id, 1)
        envs.close()
        frames = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        fits = envs.single_observation_space == frames
        if not fits or getattr(envs.single_action_space, "n", 0) < num_actions:
            sys.exit(
                f"error: {env_id} has {envs.single_observation_space} and {envs.single_action_space}, "
                f"the log {frames} and {num_actions} actions; give another --env-id"
            )
        num_actions = int(envs.single_action_space.n)

    # agents, as they start or as they were
    agent = Agent(num_actions, args)
    policy = GreedyPolicy(agent.network)  # what is evaluated
    run_dir = run_folder(args)
    rows = np.empty((0, len(ATARI_ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        args.num_updates = max(args.num_updates, first)
    num_workers = max(1, torch.get_num_threads() - 1)  # knows what a job may use, unlike cpu_count
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)

    def start_evaluation(num_updates):
        frozen = pickle.dumps(copy.deepcopy(policy).cpu().eval())
        job = frozen, env_id, references, seeds, num_updates
        return [pool.submit(run_atari_episode, *job, episode) for episode in range(args.eval_episodes)]

    if args.evaluate:
        jobs = start_evaluation(2**31)  # episodes that no run has seen
        rows = np.reshape([job.result() for job in jobs], (-1, len(ATARI_ROW)))
        print(f"policies of update {first:,}: {atari_summary(rows, args.num_seeds)}")
        return

    replay = LoggedFrames(files, args, first)
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    num_valid = sum(np.count_nonzero(file.valid) for file in files)
    print(f"{num_valid:,} transitions of {len(returns):,} episodes in {len(files)} files")
    print(f"mean return {returns.mean():.2f}, rewards clipped; evaluated in {env_id}")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    @CudaGraph
    def learn(action, reward, not_terminated, *frames):  # one update for each of frames
        batches = zip(frames, action, reward, not_terminated)
        for near, a, r, mask in batches:
            obs = near[:, :, :4]
            next_obs = near[:, :, 1:]
            metrics = update(agent, obs, a, r, next_obs, mask, args)
        return metrics  # of the last update

    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    started = time.time()
    for step in tqdm(range(first, args.num_updates, CHUNK), mininterval=1, unit_scale=CHUNK):
        batches = replay.draw(seeds, step, args.batch_size)
        metrics = learn(*batches)
        num_updates = step + CHUNK
        if num_updates % args.target_every == 0:
            synchronize(agent)
        if num_updates % replay.every == 0 and num_updates < args.num_updates:
            replay.change()

        # report the evaluation before this one, which had time beside training; save; start it
        evaluation_due = num_updates % args.eval_every == 0 or num_updates == args.num_updates
        if evaluation_due or num_updates % args.log_every == 0:
            log(metrics, num_updates, writer)
        if evaluation_due:
            rows = atari_report(rows, jobs, run_dir, writer)
            save(run_dir / "checkpoint.pt", agent, rows, num_updates)
            jobs = start_evaluation(num_updates)

    speed = (args.num_updates - first) / (time.time() - started)
    rows = atari_report(rows, jobs, run_dir, writer)
    writer.close()
    result = atari_summary(rows, args.num_seeds)
    print(f"{result}; {args.num_updates:,} updates, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
