"""REM: Q-learning on random mixtures of an ensemble's values, on the logged frames of another agent.

Papers: R. Agarwal, D. Schuurmans, M. Norouzi, "An Optimistic Perspective on Offline Reinforcement Learning", 2020,
arXiv:1907.04543 (REM, its protocol, the DQN Replay Dataset); V. Mnih, K. Kavukcuoglu, D. Silver et al.,
"Playing Atari with Deep Reinforcement Learning", 2013, arXiv:1312.5602, and its Nature article of 2015 (DQN; the
equation numbers are those of 2013).

Idea. Offline, nothing corrects a value that is wrong; the more equations values must satisfy, the fewer wrong ones are
left. A network has 200 heads, each with a value for every action. Every minibatch draws a random convex combination,
mixes the heads of the online and of the target network by it, and takes DQN's step on the mixed values: there are as
many equations as mixtures, and all heads learn from each other's targets. The agent acts by the mean of the heads. That
is all of REM: `diff` this file and offline_dqn_atari.py.

Objectives (S seeds, B batch, A actions, K heads, C channels):
    mixture       alpha_k = u_k / sum_j u_j,  u uniform on [0, 1], anew for every minibatch;  Q = sum_k alpha_k Q_k
    Bellman       Q*(s, a) = E [r + gamma max over a' of Q*(s', a')]                                          DQN (1)
    loss          mean huber(Q(s, a) - y),  y = r + gamma (1 - terminal) max over a' of Q_target(s', a'),     DQN (2)
                  with the same alpha in Q and in Q_target, and the maximum over the mixed values
    gradient      that of Q alone, y being a constant; huber(u) = u^2 / 2 if |u| <= 1, else |u| - 1/2         DQN (3)
    targets       Q_target <- Q after every `target_every` updates

What differs from the papers and their code, and why.
    - Normalised uniform numbers, as in the paper and its code: not uniform over all mixtures, but closer to the mean.
    - The targets are copied after updates 2,000, 4,000, ... The REM code, whose target network starts with weights of
      its own, copies after updates 1, 2,001, ...; ours starts as a copy. Its "8,000" counts agent steps, 4 an update.
    - Adam, padding and first weights are those of the code's TensorFlow; `--optimizer-style torch` and `--padding
      valid` give torch's Adam and the Nature article's convolutions.
    - The code loads 5 random files of a million frames (35 GB) per 62,500 updates. Where the data is larger than
      `--memory-gb`, we load whole random episodes of 5 files that fill half of it (0.6 million frames of 8 GB), while
      the other half is being filled in the background; with memory for all of it, all of it is drawn from.
    - Batches and mixtures are drawn on the CPU, from one generator per seed: a seed draws the same on every device,
      alone or among others.
    - Huber's loss, as in the REM paper, where DQN (2) has the square.
    - Evaluation counts whole episodes, `--eval-episodes` of them, where the paper counts 125,000 steps.
    - A score of 0 is random play and one of 100 the best evaluation of the agent that logged the data, as in the paper,
      where the log names both (replay.json, which dqn_atari.py writes); elsewhere 100 is a human tester.
    - An episode that was cut after 27,000 steps is marked as terminal in the log, and cannot be told from a true end.

Reading:  the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:      python algorithms/rem_atari.py --dataset atari/mspacman
Expected: -4 ± 8, level with random play (0), on atari/mspacman by the flags of benchmarks.md's grid atari_longer,
          12,000 updates of a small network. The paper's millions of updates: not run yet.
"""

import contextlib
import copy
import csv
import ctypes
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    dataset: tuple[str, ...] = ("atari/mspacman",)
    """folders with files of the DQN Replay Dataset ($store$_..._ckpt.N.gz), their parents, or Minari ids or folders of
    Atari data; several are put together; `ID:0.1` takes a tenth of the episodes"""
    env_id: str | None = None
    """evaluation environment; default: the dataset's own (DQN Replay Dataset: the name of the game in its path)"""
    files: tuple[int, ...] | None = None
    """use only the files with these numbers N; the DQN Replay Dataset has 0 to 50, in the order of time"""
    first_fraction: float = 1.0
    """use only this first part of every log, its worst play: 0.1 is the paper's ablation of quality"""
    subsample: float = 1.0
    """use only this share of the episodes, drawn at random with --seed: the paper's ablation of size"""
    memory_gb: float = 8.0
    """memory for frames in gigabytes; a file of a million frames takes 7. Data that needs more is loaded in turns"""
    window_updates: int = 62_500
    """updates on one load of frames before the next, where the data is larger than the memory for it"""
    frames_dir: str | None = None
    """unpack all frames to a temporary file in this folder first, and read them from there, memory-mapped: 7 GB a file
    on disk, none of --memory-gb; what the system keeps of them in memory gives way to other programs"""
    seed: int = 0
    """first seed; agent k uses seed + k"""
    num_seeds: int = 1
    """agents trained side by side in one batched computation (the axis S)"""
    num_updates: int = 12_500_000
    """gradient steps; the paper's 1X; 5X: 62,500,000"""
    batch_size: int = 32
    """transitions per update and seed (the axis B)"""
    channels: tuple[int, ...] = (32, 64, 64)
    """channels of the three convolutions"""
    hidden_size: int = 512
    """width of the hidden layer behind them"""
    num_heads: int = 200
    """values per action that are mixed (K)"""
    padding: Literal["same", "valid"] = "same"
    """of the convolutions: same is the REM code's (7,744 features), valid the Nature article's (3,136)"""
    learning_rate: float = 5e-5
    """Adam step size"""
    optimizer_eps: float = 0.01 / 32
    """Adam's epsilon; every head has about a K-th of the gradient, so that short runs want it smaller (1e-6)"""
    optimizer_style: Literal["tensorflow", "torch"] = "tensorflow"
    """where Adam has its epsilon: as in the paper's TensorFlow, or as in torch"""
    gamma: float = 0.99
    """discount factor"""
    target_every: int = 2_000
    """updates between copies of the network to its target; multiples of 10 run fastest on a GPU"""
    eval_every: int = 62_500
    """updates between evaluations: the paper's iteration"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, greedy but for one random action in a thousand; 0: never evaluate"""
    eval_workers: int | None = None
    """processes that evaluate beside training (0: inline; default: one per seed, as far as there are cores)"""
    checkpoint_every: int = 62_500
    """updates between checkpoints; a stop by Ctrl-C or SIGTERM writes one too"""
    log_every: int = 1_000
    """updates between entries in TensorBoard"""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    allow_tf32: bool = False
    """let a GPU multiply matrices in TF32: faster, 10 bits of mantissa"""
    run_dir: str | None = None
    """where the results go; default runs/rem_atari/<dataset>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos"""


# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_updates", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: values that are consistent in every mixture of the heads
# ---------------------------------------------------------------------------------------------------------------------


def draw_mixtures(generators, num_heads):
    """Convex combinations alpha (n, S, K) of the heads for the next UPDATES_PER_BLOCK = n updates: uniform numbers over
    their sum. Every seed draws from its own generator."""
    u = [torch.rand(UPDATES_PER_BLOCK, num_heads, generator=g) for g in generators]
    u = 1 - torch.stack(u, 1)  # above 0, so that there is a sum to divide by
    return u / u.sum(-1, keepdim=True)


def mix(values, mixture):
    """sum_k alpha_k Q_k(s, a): values (S, B, A, K), mixture alpha (S, K) -> (S, B, A)."""
    return (values @ mixture[:, None, :, None]).squeeze(-1)


def huber(u):
    """u^2 / 2 where |u| <= 1, beyond that |u| - 1/2, elementwise: a slope of 1 at most."""
    size = u.abs()
    return torch.where(size <= 1, 0.5 * u.square(), size - 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Networks. Every tensor starts with the seed axis S, so that all agents share each convolution and matrix product.
# ---------------------------------------------------------------------------------------------------------------------


def fan_in_scaled_uniform(weight, fan_in, fan_out, generator):
    """Uniform weights of variance 1 / (sqrt(3) in): the REM code's choice for networks with several heads."""
    bound = math.sqrt(math.sqrt(3) / fan_in)
    weight.uniform_(-bound, bound, generator=generator)


class NatureNetwork(nn.Module):
    """`lead` independent networks of the Nature article, side by side, with num_heads values for each action.

    Four frames go through three convolutions with ReLUs, all networks' in one grouped convolution, then through a
    hidden layer to the values. lead: (S,) or (S, networks per seed); those of one seed see the same frames.
    init(weight, fan_in, fan_out, generator) fills one layer of one network in place, biases are zero;
    generators: one torch.Generator per seed, so that the weights of a seed do not depend on its neighbours.
    """

    KERNELS, STRIDES = (8, 4, 3), (4, 2, 1)

    def __init__(self, lead, num_actions, num_heads, init, generators, args):
        super().__init__()
        self.num_heads, self.pads, self.layers = num_heads, [], []
        layers, size = [], 84  # (shape, fan-in, fan-out) of every weight; size of what the next convolution sees
        for (fan_in, fan_out), kernel, stride in zip(pairwise((4, *args.channels)), self.KERNELS, self.STRIDES):
            layers.append(((fan_out, fan_in, kernel, kernel), fan_in * kernel**2, fan_out * kernel**2))
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) if args.padding == "same" else 0
            self.pads.append((missing // 2, missing - missing // 2))  # TensorFlow's: the odd one behind
            size = (size + missing - kernel) // stride + 1
        for fans in pairwise((args.channels[-1] * size**2, args.hidden_size, num_actions * num_heads)):
            layers.append((fans, *fans))
        for i, (shape, *fans) in enumerate(layers):
            weight = torch.zeros(*lead, *shape)
            bias = torch.zeros(*lead, fans[1] // math.prod(shape[2:]))
            for s, generator in enumerate(generators):
                for w in weight[s].view(-1, *shape):
                    init(w, *fans, generator)
            self.layers.append((nn.Parameter(weight), nn.Parameter(bias)))
            self.register_parameter(f"weight{i}", self.layers[i][0])
            self.register_parameter(f"bias{i}", self.layers[i][1])

    def forward(self, frames):
        """frames (S, B, 4, 84, 84) uint8 -> (*lead, B, A, K)."""
        x = frames.transpose(0, 1).flatten(1, 2)  # (B, S * 4, 84, 84)
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
        for (weight, bias), stride, (before, behind) in zip(self.layers, self.STRIDES, self.pads):
            if before != behind:
                x, before = F.pad(x, (before, behind, before, behind)), 0
            groups = x.shape[1] // weight.shape[-3]  # S in the first convolution, then as many as there are networks
            x = F.conv2d(x, weight.flatten(0, -4), bias.flatten(), stride, before, groups=groups).relu_()
        lead = self.weight0.shape[:-4]
        x = x.permute(2, 3, 0, 1).unflatten(3, (math.prod(lead), -1))  # (height, width, B, lead, C)
        x = x.permute(3, 2, 0, 1, 4).flatten(2)  # (lead, B, height * width * C)
        for i, (weight, bias) in enumerate(self.layers[len(self.pads) :]):
            x = torch.baddbmm(bias.flatten(0, -2)[:, None], x, weight.flatten(0, -3))
            x = x.relu_() if i == 0 else x
        return x.unflatten(-1, (-1, self.num_heads)).unflatten(0, lead)

    def act(self, frames):
        """The greedy actions (S, B) of one network per seed, by the mean of its heads."""
        return self(frames).mean(-1).argmax(-1)


class AdamWithEps(nn.Module):
    """Adam (Kingma and Ba, 2015) for the large epsilons of Atari agents, with all of its state in fixed buffers.

    p <- p - learning_rate m_hat / (sqrt(v_hat) + eps), with m_hat = m / (1 - 0.9^t), v_hat = v / (1 - 0.999^t): torch;
    TensorFlow adds eps to sqrt(v), before v is corrected: its first steps are smaller.
    """

    def __init__(self, parameters, learning_rate, eps, style):
        super().__init__()
        self.params, self.learning_rate, self.eps, self.style = list(parameters), learning_rate, eps, style
        device = self.params[0].device
        self.register_buffer("num_steps", torch.zeros((), device=device))
        for i, parameter in enumerate(self.params):
            self.register_buffer(f"mean{i}", torch.zeros_like(parameter))
            self.register_buffer(f"square{i}", torch.zeros_like(parameter))

    def minimize(self, loss):
        """One step on this optimiser's own parameters; no other parameter gets a gradient."""
        grads = torch.autograd.grad(loss, self.params)
        grads = [grad.contiguous() for grad in grads]  # convolutions' are not, and the kernel goes by memory
        num_steps, *moments = self.buffers()
        with torch.no_grad():
            num_steps.add_(1)
            learning_rate, t = torch.full_like(num_steps, self.learning_rate), num_steps
            if self.style == "tensorflow":  # the step size has the corrections; after infinite steps none are left
                learning_rate.mul_((1 - 0.999 ** t.double()).sqrt() / (1 - 0.9 ** t.double()))
                t = torch.full_like(num_steps, math.inf)
            torch._fused_adam_(
                self.params, grads, moments[::2], moments[1::2], [], [t] * len(grads), lr=learning_rate,
                beta1=0.9, beta2=0.999, eps=self.eps, weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip


class MultiHeadAgent(nn.Module):
    """Networks with `num_heads` values per action, and the optimiser, of S independent agents."""

    def __init__(self, num_actions, args, device):
        super().__init__()
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        lead, heads = (args.num_seeds,), args.num_heads
        self.network = NatureNetwork(lead, num_actions, heads, fan_in_scaled_uniform, generators, args)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)
        self.to(device)
        adam = AdamWithEps(self.network.parameters(), args.learning_rate, args.optimizer_eps, args.optimizer_style)
        self.optimizers = nn.ModuleDict({"network": adam})


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def update(agent, batch, mixture, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    batch: obs (S, B, 4, 84, 84) uint8, action, reward (S, B), next_obs as obs, not_terminal (S, B); mixture: (S, K).
    Returns a dict of metrics, each (S,), on the device.
    """
    obs, action, reward, next_obs, not_terminal = batch

    # the target, DQN (2): the frozen network's best action in the next state, by the mixed values
    with torch.no_grad():
        next_q = mix(agent.target_network(next_obs), mixture).amax(-1)  # (S, B)
        target_q = reward + args.gamma * not_terminal * next_q

    # a gradient step on the same mixture of the logged actions' values, DQN (3)
    q = mix(agent.network(obs), mixture).gather(-1, action[..., None]).squeeze(-1)  # (S, B)
    loss = huber(q - target_q).mean(-1)  # (S,)
    agent.optimizers["network"].minimize(loss.sum())  # sum over S: seeds never mix

    return {"loss/td": loss.detach(), "value/q": q.detach().mean(-1), "value/target_q": target_q.mean(-1)}


def synchronize(agent):
    """Q_target <- Q."""
    with torch.no_grad():
        torch._foreach_copy_(list(agent.target_network.parameters()), list(agent.network.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing of the offline Atari scripts: the files of the DQN Replay Dataset
# ---------------------------------------------------------------------------------------------------------------------

FRAME_BYTES = 84 * 84
FILES_PER_WINDOW = 5  # as many as the REM code loads at a time


@dataclass
class ReplayFile:
    """R rows of logged play in the order of time: a frame, and the action, reward and end that came of it. The frame
    after it is in the next row. An episode starts with three black rows, the past of its first stacks."""

    path: Path  # of the frames: $store$_observation_ckpt.N.gz, or a Minari folder's main_data.hdf5
    action: np.ndarray  # (R,) uint8
    reward: np.ndarray  # (R,) float32, clipped to [-1, 1]
    terminal: np.ndarray  # (R,) bool
    valid: np.ndarray  # (R,) bool: rows that have a whole stack of frames, and a next one
    starts: np.ndarray  # (E + 1,) first rows of the episodes, and R


def valid_rows(terminal, num_rows):
    """Rows t (bool) to draw from: no end in rows t - 3 to t - 1, and rows t - 3 to t + 1 among the first num_rows.

    This leaves out stacks that reach over two episodes, and the black rows between them, three after every end.
    """
    valid = np.zeros(len(terminal), bool)
    valid[3 : max(num_rows - 1, 3)] = True
    for ago in (1, 2, 3):
        valid[ago:] &= ~terminal[:-ago]
    return valid


def read_array(folder, name, number):
    """An array of file number N of the DQN Replay Dataset, whole; nothing that it holds is run."""
    with gzip.open(folder / f"{name}_ckpt.{number}.gz") as file:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)  # to the end, where the checksum is


def frames_shape(file):
    """Shape of the .npy array of frames that begins here; the file is left at its first byte of data."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if shape[1:] != (84, 84) or dtype != np.uint8 or fortran_order:
        raise ValueError(f"frames of shape {shape[1:]} and type {dtype}")
    return shape


def replay_file(folder, number):
    """File number N of a folder of the DQN Replay Dataset, all but its frames."""
    path = folder / f"$store$_observation_ckpt.{number}.gz"
    action, reward, terminal = (read_array(folder, f"$store$_{x}", number) for x in ("action", "reward", "terminal"))
    with gzip.open(path) as file:
        lengths = {frames_shape(file)[0], len(action), len(reward), len(terminal)}
    if len(lengths) > 1 or not (0 <= action.min() <= action.max() < 18 and np.isfinite(reward).all()):
        raise ValueError(f"arrays of lengths {sorted(lengths)}, actions beyond 0 to 17, or rewards that are no numbers")
    # a snapshot of a circular memory: rows that its last round had not reached yet are one round old
    num_rows = (int(read_array(folder, "add_count", number)) - 1) % len(action) + 1
    reward, terminal = np.clip(np.float32(reward[:num_rows]), -1, 1), terminal[:num_rows].astype(bool)
    starts = np.unique([0, *(np.flatnonzero(terminal) + 1), num_rows])
    return ReplayFile(path, np.uint8(action[:num_rows]), reward, terminal, valid_rows(terminal, num_rows), starts)


def minari_replay_file(folder):
    """A Minari folder of Atari data in the same form, with the black rows and a row for each episode's last frame."""
    columns, starts = {"action": [], "reward": [], "terminal": [], "valid": []}, [0]
    with h5py.File(folder / "main_data.hdf5") as file:
        for i in range(json.loads((folder / "metadata.json").read_text())["total_episodes"]):
            group = file[f"episode_{i}"]
            action, reward = group["actions"][()], np.clip(np.float32(group["rewards"][()]), -1, 1)
            if action.ndim != 1 or not len(action) == len(reward) == len(group["observations"]) - 1:
                raise ValueError("its actions are no single integers, or an episode's arrays differ in length")
            if not (0 <= action.min() <= action.max() < 18 and np.isfinite(reward).all()):
                raise ValueError("actions beyond 0 to 17, or rewards that are no numbers")
            values = action, reward, group["terminations"][()], np.ones(len(action), bool)
            for column, x in zip(columns.values(), values):
                column.append(np.pad(x, (3, 1)))
            starts.append(starts[-1] + len(action) + 4)
    columns = {name: np.concatenate(column) for name, column in columns.items()}
    columns["action"] = np.uint8(columns["action"])
    return ReplayFile(folder / "main_data.hdf5", **columns, starts=np.array(starts))


def grey_frames(obs):
    """Observations (T, ...) as single grey frames (T, 84, 84): of stacks the last one, colour frames by luminance and
    area (without the maximum over two frames that other logs have)."""
    if obs.ndim == 4 and obs.shape[-1] == 3:
        overlap = []  # of each of 84 equal parts of an axis with each of its pixels
        for n in obs.shape[1:3]:
            edge, pixel = np.arange(85)[:, None] * n / 84, np.arange(n)
            overlap.append(np.clip(np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel), 0, None) * 84 / n)
        grey = np.float32(obs) @ np.float32([0.299, 0.587, 0.114])
        obs = np.uint8(np.rint(overlap[0] @ grey @ overlap[1].T))
    elif obs.ndim == 4:
        obs = obs[:, -1] if obs.shape[2:] == (84, 84) else obs[..., -1]
    if obs.shape[1:] != (84, 84) or obs.dtype != np.uint8:
        raise ValueError(f"observations of shape {obs.shape[1:]} and type {obs.dtype}")
    return obs


def find_dataset(name):
    """Path of a D4RL file or Minari data folder: given as such, embedded here, local to Minari, or downloaded by it."""
    local = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets") / name
    for path in (Path(name), Path(__file__).resolve().parent.parent / "tests" / "data" / name, local):
        if path.is_file():
            return path
        for folder in (path / "data", path):
            if (folder / "metadata.json").exists():
                return folder
    if Path(name).exists() or Path(name).is_absolute() or name.endswith(".hdf5"):
        fail(f"{name} is neither a D4RL file nor a folder with a Minari dataset", "check --dataset")
    try:
        urllib.request.urlopen("https://huggingface.co", timeout=5).close()  # fails at once where Minari would hang
        import minari

        minari.download_dataset(name)
    except Exception as e:  # whatever the layers below raise, the user wants one line
        fail(f"dataset {name} is not on this machine and cannot be downloaded ({e})", "check its name and the network")
    return local / "data"


def find_replay(name):
    """Folder of replay files or of Minari data: given as such, embedded here, local to Minari, or downloaded by it."""
    for path in (Path(name), Path(__file__).resolve().parent.parent / "tests" / "data" / name):
        for folder in (path, path / "replay_logs"):
            if list(folder.glob("$store$_*_ckpt.*.gz")):
                return folder
    if not Path(name).exists() or list(Path(name).glob("**/metadata.json")):
        path = find_dataset(name)
        if path.is_dir():
            return path
    fail(f"{name} has no files $store$_..._ckpt.N.gz, nor is it Minari data", "give a folder that has, say dqn/Pong/1")


def replay_environment(folder):
    """The game of a log and its references, returns of random play and of the best evaluation of the DQN that logged
    it (the worse of the two first: REM's normalised score), from replay.json beside the log, or from its path."""
    references, kwargs, description = None, {}, folder.parent / "replay.json"
    if (folder / "metadata.json").exists():
        spec = json.loads(json.loads((folder / "metadata.json").read_text()).get("env_spec") or "{}")
        env_id = spec.get("id")
        if (spec.get("kwargs") or {}).get("full_action_space"):  # the numbers of its actions mean others
            kwargs = {"full_action_space": True}
    elif description.exists():
        description = json.loads(description.read_text())
        env_id, references = description["env_id"], (description["random"], description["dqn"])
        references = None if None in references or references[0] == references[1] else sorted(references)
    else:  # .../dqn/Pong/1/replay_logs
        game = next((x for x in reversed(folder.resolve().parts) if x != "replay_logs" and not x.isdigit()), "")
        env_id = f"ALE/{game}-v5" if game.isalnum() and game[:1].isupper() else None
    if env_id and not env_id.startswith("ALE/"):
        fail(f"{folder} is data of {env_id}, no environment of ale_py", "give a log of an Atari game")
    return {"id": env_id, "kwargs": kwargs, "references": references or ATARI_REFERENCES.get(env_id)}


def keep_random_episodes(files, share, seed):
    """Leaves this share of the episodes of some files, one at least, in their valid rows."""
    episodes = [(file, i, j) for file in files for i, j in pairwise(file.starts) if file.valid[i:j].any()]
    order = np.random.default_rng(seed).permutation(len(episodes))
    for dropped in order[max(1, round(share * len(order))) :]:
        file, i, j = episodes[dropped]
        file.valid[i:j] = False


def load_replay(args):
    """All values of --dataset as a list of ReplayFile, reduced as asked for, and the environment of the first."""
    files, environments = [], []
    for name in args.dataset:
        base, _, fraction = name.rpartition(":")
        if not fraction.replace(".", "", 1).isdigit():
            base, fraction = name, "1"
        if not 0 < float(fraction) <= 1:
            fail(f"fraction {fraction} of dataset {base} is out of range", "give a number in (0, 1]")
        folder = find_replay(base)
        try:
            environments.append(replay_environment(folder))
            if (folder / "main_data.hdf5").exists():
                if args.files:
                    fail(f"{base} is Minari data, which has no numbered files", "leave out --files")
                log = [minari_replay_file(folder)]
            else:
                numbers = {int(path.name.split(".")[-2]) for path in folder.glob("$store$_*_ckpt.*.gz")}
                if missing := set(args.files or ()) - numbers:
                    fail(f"{base} has no files number {sorted(missing)}", f"choose from {sorted(numbers)}")
                log = [replay_file(folder, number) for number in sorted(args.files or numbers)]
        except (OSError, LookupError, ValueError, TypeError, AttributeError, EOFError, zlib.error) as e:
            fail(f"dataset {base} is broken ({type(e).__name__}: {e})", "download or write it again")
        left = math.ceil(args.first_fraction * sum(len(file.valid) for file in log))
        for file in log:
            file.valid[max(left, 0) :] = False
            left -= len(file.valid)
        keep_random_episodes(log, float(fraction), args.seed)
        files += log
    keep_random_episodes(files, args.subsample, args.seed)
    if not any(file.valid.any() for file in files):
        fail("the data holds no transition", "check --dataset, --files, --first-fraction and --subsample")
    games = {environment["id"] for environment in environments if environment["id"]}
    if len(games) > 1 and not args.env_id:
        fail(f"the data is of {len(games)} games, {sorted(games)}", "give logs of one, or --env-id")
    environment = environments[0]
    if args.env_id and args.env_id != environment["id"]:
        environment = {"id": args.env_id, "kwargs": {}, "references": ATARI_REFERENCES.get(args.env_id)}
    return files, environment


def unpack_frames(path, runs, frames, cancelled):
    """Copies rows i to j of the replay file's frames to frames[k:], for all (i, j, k) in runs, in ascending order."""
    with gzip.open(path) as file:
        frames_shape(file)
        row = 0
        for i, j, k in runs:
            while row < j and not cancelled.is_set():
                n = min(256, (i if row < i else j) - row)  # what comes before i is read, too, and forgotten
                content = file.read(n * FRAME_BYTES)
                if len(content) < n * FRAME_BYTES:
                    raise EOFError(f"it ends after {row} frames")
                if row >= i:
                    frames[k + row - i :][:n] = np.frombuffer(content, np.uint8).reshape(n, 84, 84)
                row += n
        while not cancelled.is_set() and file.read(256 * FRAME_BYTES):  # to the end, where the checksum is
            pass


def unpack_minari(path, starts, runs, frames, cancelled):
    """The same for a Minari file, where a run is one episode: three black rows, then its frames."""
    with h5py.File(path) as file:
        for i, j, k in runs:
            obs = file[f"episode_{np.searchsorted(starts, i)}/observations"]
            frames[k : k + 3] = 0
            for t in range(0, len(obs), 256):
                if not cancelled.is_set():
                    frames[k + 3 + t : k + j - i][:256] = grey_frames(obs[t : t + 256])


class Replay:
    """What batches are drawn from: single frames in memory, and threads that unpack the next ones.

    Frames that all fit into --memory-gb are loaded once. Else half of that memory holds a window of them, whole random
    episodes of up to FILES_PER_WINDOW random files, and the other half is being filled with the next window. Windows
    depend on their number alone, so that all seeds see the same, and a resumed run what it would have seen. Frames are
    on the device where they fit; if not, batches go there through pinned memory.
    """

    def __init__(self, files, args, device):
        self.files, self.device, self.cancelled = files, device, threading.Event()
        self.episodes = [[(i, j) for i, j in pairwise(file.starts) if file.valid[i:j].any()] for file in files]
        num_rows = sum(j - i for episodes in self.episodes for i, j in episodes)
        memory = int(args.memory_gb * 1e9) // FRAME_BYTES
        self.whole = bool(args.frames_dir) or num_rows < memory
        self.num_rows = num_rows if self.whole else memory // 2 - 1  # of a window
        longest = max(j - i for episodes in self.episodes for i, j in episodes)
        if self.num_rows < longest:
            needed = 2 * (longest + 2) * FRAME_BYTES / 1e9
            fail(f"--memory-gb {args.memory_gb} has no room for whole episodes", f"give {needed:.2g} or more")
        self.files_per_window = min(FILES_PER_WINDOW, self.num_rows // longest)
        size = (self.num_rows + 1) * FRAME_BYTES  # the last row is no frame, but what follows an end
        room = 0.8 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        self.on_device = size < room and not args.frames_dir
        num_buffers = 1 if self.whole or self.on_device else 2
        shape = (self.num_rows + 1, 84, 84)
        try:
            if args.frames_dir:
                file = tempfile.TemporaryFile(dir=args.frames_dir)  # gone with the process
                free = shutil.disk_usage(args.frames_dir).free
                if size > free:  # the file would be made all the same, and end the program where the disk is full
                    raise OSError(f"{free / 1e9:.1f} GB are free in {args.frames_dir}")
                self.buffers = [np.memmap(file, np.uint8, "w+", shape=shape)]
            else:
                self.buffers = [np.empty(shape, np.uint8) for _ in range(num_buffers)]
        except (OSError, MemoryError) as e:
            fail(f"no room for {num_buffers * size / 1e9:.1f} GB of frames ({e})", "change --memory-gb or --frames-dir")
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=device) if self.on_device else None
        self.number = self.next_number = None  # of the window in use, and of the one being loaded

    def plan(self, number):
        """Episodes (file, i, j) of a window, in the order of the files."""
        if self.whole:
            return [(f, i, j) for f, episodes in enumerate(self.episodes) for i, j in episodes]
        rng, plan = np.random.default_rng(number), []
        candidates = [f for f, episodes in enumerate(self.episodes) if episodes]
        chosen = rng.permutation(candidates)[: self.files_per_window]
        for f in chosen:
            order = rng.permutation(len(self.episodes[f]))
            lengths = np.array([j - i for i, j in self.episodes[f]])[order]
            kept = order[np.cumsum(lengths) <= self.num_rows // len(chosen)]
            plan += [(int(f), *self.episodes[f][e]) for e in sorted(kept)]
        return sorted(plan)

    def start_loading(self, number):
        """Begins to unpack window `number` into the buffer that is free, in one thread per file."""
        self.next_number, self.next_plan, self.jobs = number, self.plan(number), []
        runs, k = {}, 0
        for f, i, j in self.next_plan:
            runs.setdefault(f, []).append((i, j, k))
            k += j - i

        def unpack(file, runs, done):
            arguments = runs, self.buffers[number % len(self.buffers)], self.cancelled
            try:
                if file.path.suffix == ".gz":
                    done.set_result(unpack_frames(file.path, *arguments))
                else:
                    done.set_result(unpack_minari(file.path, file.starts, *arguments))
            except Exception as e:  # told where the window is waited for
                done.set_exception(e)

        for f, runs_of_file in runs.items():
            self.jobs.append((self.files[f].path, Future()))
            arguments = self.files[f], runs_of_file, self.jobs[-1][1]
            threading.Thread(target=unpack, args=arguments, daemon=True).start()

    def use(self, number, prefetch):
        """Waits for window `number` and draws from it from now on; if `prefetch`, starts to load the one after it."""
        number = 0 if self.whole else number
        if number != self.number:
            if self.next_number != number:
                self.start_loading(number)
            for path, job in self.jobs:
                try:
                    job.result()
                except Exception as e:  # gzip, zlib, numpy and h5py each raise their own
                    fail(f"{path} is broken ({type(e).__name__}: {e})", "download or write it again")
            self.number = number
            columns = ("action", "reward", "terminal", "valid")
            rows = [[getattr(self.files[f], x)[i:j] for f, i, j in self.next_plan] for x in columns]
            action, reward, terminal, valid = (np.append(np.concatenate(x), np.zeros(1, x[0].dtype)) for x in rows)
            columns = np.int64(action), reward, 1 - np.float32(terminal)
            self.columns = [torch.from_numpy(x).to(self.device) for x in columns]
            buffer = torch.from_numpy(self.buffers[number % len(self.buffers)])
            if self.on_device:
                self.frames[: len(valid)] = buffer[: len(valid)]
                self.buffers = [] if self.whole else self.buffers
            else:
                self.frames = buffer
            self.valid = torch.from_numpy(np.flatnonzero(valid)).to(self.frames.device)
        if prefetch and not self.whole and self.next_number != number + 1:
            self.start_loading(number + 1)

    def __call__(self, u):
        """u: float64 uniform on [0, 1), any shape -> int64 rows of that shape, where the frames are."""
        return self.valid[(u * len(self.valid)).long().to(self.valid.device)]

    def batches(self, index):
        """Rows (n, S, B) -> frames t - 3 to t + 1 (n, S, B, 5, 84, 84); action, reward, not_terminal (n, S, B)."""
        near = (index[..., None] + torch.arange(-3, 2, device=index.device)).flatten()
        if self.on_device or self.device.type == "cpu":
            frames = self.frames.index_select(0, near)
        else:
            frames = torch.empty(len(near), 84, 84, dtype=torch.uint8, pin_memory=True)
            torch.index_select(self.frames, 0, near, out=frames)
            frames, index = (x.to(self.device, non_blocking=True) for x in (frames, index))
        return [frames.view(*index.shape, 5, 84, 84), *(x[index] for x in self.columns)]

    def close(self):
        self.cancelled.set()


def fit_to_game(files, environment, args):
    """Number of actions in the evaluation environment, which has to know all that the log has; without one, the
    log's."""
    num_logged = 1 + max(int(file.action.max()) for file in files)
    if not environment["id"]:
        if args.eval_episodes:
            fail("the dataset names no game", "give --env-id, or --eval-episodes 0 to train without evaluation")
        return num_logged
    num_actions = int(make_atari(environment, 1).single_action_space.n)
    if num_logged > num_actions:
        fail(f"the log has {num_logged} actions, {environment['id']} has {num_actions}", "give its game as --env-id")
    return num_actions


def report_replay(files, replay, args, writer):
    """Prints what there is to learn from and how it is held; the returns of the episodes go to TensorBoard."""
    spans = [(file, i, j) for file, episodes in zip(files, replay.episodes) for i, j in episodes]
    whole = [span for span in spans if span[0].terminal[span[2] - 1] or span[0].path.suffix == ".hdf5"]
    returns = np.array([file.reward[i:j].sum() for file, i, j in whole] or [0.0])
    print(
        f"{sum(file.valid.sum() for file in files):,} transitions in {len(spans):,} episodes of {len(files)} file(s); "
        f"return of the average episode, rewards clipped: {returns.mean():.1f}, of the best: {returns.max():.1f}"
    )
    if not replay.whole:
        gigabytes = replay.num_rows * FRAME_BYTES / 1e9
        print(f"frames do not fit into --memory-gb: {gigabytes:.1f} GB at a time, for {args.window_updates:,} updates")
    writer.add_histogram("data/episode_returns", returns)


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, the same text in every script: flags, environments, evaluation, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).stem

# returns of random play and of a human tester, the 0 and the 100 of a normalised score (van Hasselt et al., 2016)
ATARI_REFERENCES = {
    "ALE/Asterix-v5": (210.0, 8503.3),
    "ALE/Boxing-v5": (0.1, 12.1),
    "ALE/Breakout-v5": (1.7, 30.5),
    "ALE/Freeway-v5": (0.0, 29.6),
    "ALE/MsPacman-v5": (307.3, 6951.6),
    "ALE/Pong-v5": (-20.7, 14.6),
    "ALE/Qbert-v5": (163.9, 13455.0),
    "ALE/Seaquest-v5": (68.4, 42054.7),
    "ALE/SpaceInvaders-v5": (148.0, 1668.7),
}


def fail(problem, remedy):
    """Ends the program with exit status 2 and one line: what is wrong; what to do."""
    print(" ".join(f"error: {problem}; {remedy}".split()), file=sys.stderr)
    raise SystemExit(2)


def parse_flags(**tyro_options):
    """Args from the command line; tyro's box around an error becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, **tyro_options)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]
        fail(" ".join(takewhile(lambda line: line.strip("─"), lines)), "see --help")


def parse_args():
    """Args from the command line; with --resume or --evaluate, the run's own flags are the defaults."""
    args = parse_flags(description=__doc__.split("\n")[0])
    run_dir = args.resume or args.evaluate
    if not run_dir:
        return args
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        script, stored, _ = config["script"], config["args"], config["environment"]
        stored |= {"resume": None, "evaluate": None}  # they belong to the call, not to the run
    except (OSError, ValueError, LookupError, TypeError):
        fail(f"{run_dir} holds no run (no readable config.json)", "give the folder that a run's last line names")
    if script != SCRIPT:
        fail(f"{run_dir} is a run of {script}.py, not of {SCRIPT}.py", f"use {script}.py")
    try:
        stored = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
    except (TypeError, AttributeError) as e:
        fail(f"{run_dir} was made by another version of {SCRIPT}.py ({e})", "check out the commit in its config.json")
    args = parse_flags(default=stored)
    for name, value in asdict(args).items():
        if value != getattr(stored, name) and name not in RESUME_MAY_CHANGE:
            fail(f"--{name.replace('_', '-')} differs from the run in {run_dir}", "leave it out, or start a new run")
    return args


def check_range(args, low, high, *names):
    """Fails unless low <= value <= high for each of these flags."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (value != () and low <= np.min(value) and np.max(value) <= high):
            fail(f"--{name.replace('_', '-')} {value} is out of range", f"give a value between {low} and {high}")


def choose_device(name):
    """torch.device for --device: auto, cpu, cuda, cuda:1, ..."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("these scripts know cpu and cuda")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        fail(f"device {name} is not there ({str(e).splitlines()[0]})", "use --device cpu or --device auto")


def keep_freed_memory():
    """Tells glibc to keep freed activations: pages that go back to the system are faulted in again at every update."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: up to a gigabyte stays
        mallopt(-4, 0)  # M_MMAP_MAX: large activations come from the heap too


def make_atari(environment, num_envs):
    """Games side by side, as the DQN Replay Dataset was logged: steps of 4 frames, the maximum of the last two kept,
    grey, 84 x 84, 4 of them stacked (zeros before an episode begins), sticky actions, unclipped rewards.

    An episode ends with the game, not with a life, or after 27,000 steps; the caller resets what has ended.
    """
    try:
        import ale_py
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as e:
        fail(f"environment {environment['id']} needs a package that is not installed ({e})", "pip install ale-py")
    gym.register_envs(ale_py)
    try:
        game = gym.spec(environment["id"]).kwargs["game"]
    except (gym.error.Error, KeyError):
        fail(f"{environment['id']} is no Atari game", "give an id like ALE/Pong-v5, see ale_py.roms.get_all_rom_ids()")
    return AtariVectorEnv(
        game,
        num_envs,
        num_threads=min(num_envs, torch.get_num_threads()),
        max_num_frames_per_episode=108_000,
        repeat_action_probability=0.25,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
        **environment["kwargs"],
    )


def normalized_score(episode_return, references):
    """100 (return - random) / (expert - random); nan without references."""
    return 100 * (episode_return - references[0]) / (references[1] - references[0]) if references else math.nan


def score_text(score):
    """ ", normalised score ..." for a line of output; empty where there are no reference scores."""
    return "" if np.isnan(score) else f", normalised score {score:.1f}"


def policy_of_seed(actor, s):
    """A copy on the CPU of the s-th of the policies that `actor` holds; its tensors keep a seed axis, of length 1."""
    policy = copy.deepcopy(actor).cpu().eval()
    for tensor in [*policy.parameters(), *policy.buffers()]:
        tensor.data = tensor.data[s : s + 1].clone()
    return policy


def episode_seed(*numbers):
    """An environment seed that depends on agent seed, update and episode, and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def run_atari_episodes(policy, environment, env_seeds, video_dir=None, epsilon=0.001):
    """(return, length) of one episode per environment seed; policy.act maps (1, E, 4, 84, 84) bytes to actions (1, E).

    The episodes step side by side, and the batch keeps its size when some are over, so that nobody's rounding
    depends on when the others end.
    """
    policy = pickle.loads(policy) if isinstance(policy, bytes) else policy  # as workers get it
    envs, rng = make_atari(environment, len(env_seeds)), np.random.default_rng(env_seeds)
    obs, _ = envs.reset(seed=np.array(env_seeds) % 2**31)  # the emulator's seeds have 31 bits
    returns, lengths, running = np.zeros(len(obs)), np.zeros(len(obs), int), np.ones(len(obs), bool)
    frames = []
    while running.any():
        if video_dir and running[0]:
            frames.append(np.tile(obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None], 3))
        with torch.no_grad():
            greedy = policy.act(torch.from_numpy(obs)[None])[0].numpy()
        random = rng.integers(envs.single_action_space.n, size=len(obs))
        actions = np.where(rng.random(len(obs)) < epsilon, random, greedy)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        returns, lengths = returns + running * rewards, lengths + running
        running &= ~(terminated | truncated)
    envs.close()
    if video_dir:
        from gymnasium.utils.save_video import save_video

        save_video(frames, str(video_dir), lambda episode: True, fps=15, name_prefix=f"episode-{env_seeds[0]}")
    return [(float(r), int(n)) for r, n in zip(returns, lengths)]


def start_worker():
    """An evaluation worker computes on one thread, leaves Ctrl-C and SIGTERM to its parent, and never outlives it."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def stop_signals_blocked():
    """Ctrl-C and SIGTERM wait until the end of the block (Windows, which cannot do that, takes its chances)."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    yield
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


class AtariEvaluator:
    """Evaluates snapshots of the policies in worker processes, beside training, and reports in the order of updates.

    Neither the number of workers nor a stop and resume changes a result. Scripts that evaluate one policy in several
    ways have an evaluator for each, whose `variant` is in the names of its results.
    """

    def __init__(self, args, environment, run_dir, writer, variant=""):
        self.args, self.environment, self.writer = args, environment, writer
        self.name, self.csv_path = f"evaluation{variant}", run_dir / f"evaluations{variant}.csv"
        self.pending = {}  # update: (state of the actor then, one job per seed)
        workers = args.eval_workers
        if workers is None:
            workers = max(1, min(args.num_seeds, (os.cpu_count() or 1) - 1))
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, spawn, start_worker) if workers and args.eval_episodes else None
        if not self.csv_path.exists():
            self.csv_path.write_text("update,seed,episode,return,length,normalized_score\n")

    def submit(self, update, actor):
        """Starts the evaluation of every seed's policy as it is now."""
        jobs = []
        for s in range(self.args.num_seeds if self.args.eval_episodes else 0):
            env_seeds = [episode_seed(self.args.seed + s, update, e) for e in range(self.args.eval_episodes)]
            job = pickle.dumps(policy_of_seed(actor, s)), self.environment, env_seeds
            with stop_signals_blocked():  # a worker that starts here inherits that
                jobs.append(self.pool.submit(run_atari_episodes, *job) if self.pool else Future())
            if not self.pool:
                jobs[-1].set_result(run_atari_episodes(*job))
        if jobs:
            self.pending[update] = {name: x.cpu().clone() for name, x in actor.state_dict().items()}, jobs

    def collect(self, wait=False):
        """Writes and prints the evaluations that are done (all, if `wait`)."""
        for update, (_, jobs) in list(self.pending.items()):
            if not (wait or all(job.done() for job in jobs)):
                return
            results = [(self.args.seed + s, e, *r) for s, job in enumerate(jobs) for e, r in enumerate(job.result())]
            returns = np.array([episode_return for _, _, episode_return, _ in results])
            scores = normalized_score(returns, self.environment["references"]) * np.ones(len(returns))
            with self.csv_path.open("a", newline="") as file:
                rows = [(update, *result, f"{score:.4f}") for result, score in zip(results, scores)]
                csv.writer(file, lineterminator="\n").writerows(rows)
            self.writer.add_scalar(f"{self.name}/return", returns.mean(), update)
            self.writer.add_scalar(f"{self.name}/normalized_score", scores.mean(), update)
            mean, score = returns.mean(), scores.mean()
            print(f"{self.name} at {update:,}: return {mean:.1f}{score_text(score)}", flush=True)
            del self.pending[update]

    def resume(self, update, pending, actor):
        """Back to the state of a checkpoint: forgets what came after it, starts again what was under way."""
        header, *rows = self.csv_path.read_text().splitlines(keepends=True)
        rows = [(int(row.split(",")[0]), row) for row in rows if row.endswith("\n")]  # a kill may tear the last one
        kept = [row for n, row in rows if n <= update and n not in pending]
        write_atomically(self.csv_path, lambda path: path.write_text(header + "".join(kept)))
        for past_update, state in sorted(pending.items()):
            past_actor = copy.deepcopy(actor)
            past_actor.load_state_dict(state)
            self.submit(past_update, past_actor)

    def close(self):
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


def print_atari_result(args, run_dir, num_updates, rate):
    """The last line of a run: what it reached, what the number means, how fast, and where the rest is."""
    text = ""
    if args.eval_episodes and (run_dir / "evaluations.csv").read_text().count("\n") > 1:
        update, seed, _, returns, _, scores = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1).T
        last = np.unique(update)[-10:]
        rows = [(seed == s) & np.isin(update, last) for s in np.unique(seed)]
        score, mean = ([x[of_seed].mean() for of_seed in rows] for x in (scores, returns))
        hundred = "the agent that logged the data, else a human"
        if not np.isnan(score).any():
            text = f"normalised score {np.mean(score):.1f} ± {np.std(score):.1f} (0: random policy, 100: {hundred}), "
        text += f"return {np.mean(mean):.1f} ± {np.std(mean):.1f} (mean ± standard deviation over {args.num_seeds} "
        text += f"seed(s) of the mean over the last {len(last)} evaluations of {args.eval_episodes} episodes), "
    print(f"{text}{num_updates:,} updates, {rate:.1f} updates/s per seed, run folder {run_dir}")


def evaluate_atari_run(args, agent_class):
    """--evaluate: fresh episodes of the policies in a run's checkpoint."""
    run_dir = Path(args.evaluate)
    environment = json.loads((run_dir / "config.json").read_text())["environment"]
    if not environment["id"]:
        fail(f"{run_dir} is a run without environment", "evaluate a run that has one")
    num_actions = int(make_atari(environment, 1).single_action_space.n)
    agent = agent_class(num_actions, args, torch.device("cpu"))
    agent.load_state_dict(load_checkpoint(run_dir, "cpu")["agent"])
    video_dir = run_dir / "videos" if args.capture_video else None
    for s in range(args.num_seeds):
        env_seeds = [episode_seed(args.seed + s, 2**31, e) for e in range(args.eval_episodes or 10)]
        results = run_atari_episodes(policy_of_seed(agent.network, s), environment, env_seeds, video_dir)
        returns, lengths = np.array(results).T
        score = np.mean(normalized_score(returns, environment["references"]))
        print(
            f"seed {args.seed + s}: return {returns.mean():.1f} ± {returns.std():.1f} (standard deviation over "
            f"{len(returns)} episodes of {lengths.mean():.0f} steps on average){score_text(score)}"
        )


def open_run_dir(args, name, environment):
    """The run folder, new or --resume's; config.json: all flags, versions, git commit, command line, environment."""
    if args.resume:
        run_dir = Path(args.resume)
        config = json.loads((run_dir / "config.json").read_text()) | {"args": asdict(args)}
    else:
        seeds = f"{args.seed}" if args.num_seeds == 1 else f"{args.seed}-{args.seed + args.num_seeds - 1}"
        run_dir = Path(args.run_dir or f"runs/{SCRIPT}/{name}/{seeds}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            run_dir.mkdir(parents=True)
        except OSError as e:
            fail(f"run folder {run_dir} cannot be made ({e.strerror})", "give another --run-dir, or --resume it")
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "-q", "--verify", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None
        config = {
            "script": SCRIPT,
            "args": asdict(args),
            "environment": environment,
            "versions": {"python": sys.version.split()[0], **{d.name: d.version for d in distributions()}},
            "git_commit": commit or None,
            "command": shlex.join([sys.executable, *sys.argv]),
        }
    write_atomically(run_dir / "config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
    return run_dir


def write_atomically(path, write):
    """Calls write(temporary path), then renames: a kill leaves the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(run_dir, device):
    """checkpoint.pt of a run folder, as it was saved."""
    try:
        checkpoint = torch.load(Path(run_dir) / "checkpoint.pt", map_location=device, weights_only=True)
        if not checkpoint.keys() >= {"agent", "generators", "pending_evaluations"}:
            raise KeyError("parts are missing")
        return checkpoint
    except Exception as e:  # torch.load raises many kinds of error on a damaged file
        fail(f"{run_dir} has no readable checkpoint ({type(e).__name__})", "start a new run")


def on_stop_signal():
    """A list that stays empty until Ctrl-C or SIGTERM asks the loop to stop; a second one stops at once."""
    stop = []

    def handler(signum, frame):
        stop.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return stop


def cuda_graph(step, agent, *inputs):
    """`step` captured as one CUDA graph: returns a function of inputs that are shaped like these.

    Capturing needs a few real steps first; whatever they change in the agent is put back.
    """
    inputs = [x.clone() for x in inputs]  # the graph reads them where they stand
    before = copy.deepcopy(agent.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
    agent.load_state_dict(before)  # in place

    def replay(*new_inputs):
        for old, new in zip(inputs, new_inputs):
            old.copy_(new)
        graph.replay()
        return outputs

    return replay


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

UPDATES_PER_BLOCK = 100  # random numbers are drawn for so many updates at a time
UPDATES_PER_GRAPH = 10  # a GPU replays so many updates as one CUDA graph


def draw_block(sampler, generators, batch_size, *noise_shapes):
    """What the next UPDATES_PER_BLOCK = n updates read at random: transition indices (n, S, B), then standard normal
    noise (n, S, *shape) for each of the shapes. Every seed draws from its own generator."""
    n, device = UPDATES_PER_BLOCK, generators[0].device
    u = [torch.rand(n, batch_size, generator=g, dtype=torch.float64, device=device) for g in generators]
    noise = ([torch.randn(n, *shape, generator=g, device=device) for g in generators] for shape in noise_shapes)
    return [sampler(torch.stack(u, 1)), *(torch.stack(x, 1) for x in noise)]


def run_atari_updates(agent, args, frames, action, reward, not_terminal, *noise):
    """One update per row of frames (m, S, B, 5, 84, 84), the rest (m, S, ...); returns the metrics of the last."""
    for stack, a, r, mask, *row_noise in zip(frames, action, reward, not_terminal, *noise):
        metrics = update(agent, (stack[:, :, :4], a, r, stack[:, :, 1:], mask), *row_noise, args)
    return metrics


def main():
    args = parse_args()
    check_range(args, 1, math.inf, "num_seeds", "num_updates", "batch_size", "channels", "hidden_size")
    check_range(args, 1, math.inf, "num_heads", "target_every")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 1, math.inf, "window_updates", "eval_every", "checkpoint_every", "log_every")
    check_range(args, 0, math.inf, "memory_gb", "learning_rate", "optimizer_eps", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "first_fraction", "subsample", "gamma")
    if len(args.channels) != 3:
        fail(f"--channels {args.channels} are not three", "give one number for each convolution")
    if args.window_updates % UPDATES_PER_BLOCK:
        fail(f"--window-updates {args.window_updates} is out of range", f"give a multiple of {UPDATES_PER_BLOCK}")
    if args.evaluate:
        return evaluate_atari_run(args, MultiHeadAgent)
    device, S = choose_device(args.device), args.num_seeds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for these shapes

    # data: everything but the frames, then as many of these as there is memory for
    files, environment = load_replay(args)
    num_actions, replay = fit_to_game(files, environment, args), Replay(files, args, device)

    # agents, in a run folder that is new or goes on from its checkpoint
    agent = MultiHeadAgent(num_actions, args, device)
    generators = [torch.Generator().manual_seed(args.seed + s) for s in range(S)]
    checkpoint = load_checkpoint(args.resume, device) if args.resume else {"num_updates": 0}
    num_updates = first_update = checkpoint["num_updates"]
    if num_updates > args.num_updates:
        fail(f"{args.resume} has {num_updates} updates already", "give a larger --num-updates, or leave it out")

    def fetch():
        """The frames for the block of updates that is next; those for later ones are loaded in the background."""
        window = num_updates // args.window_updates
        replay.use(window, prefetch=(window + 1) * args.window_updates < args.num_updates)

    fetch()
    name = "+".join(args.dataset).replace("/", "-").replace(":", "-").strip("-.")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, name, environment)
    writer = SummaryWriter(run_dir, purge_step=num_updates + 1)
    evaluator = AtariEvaluator(args, environment, run_dir, writer)
    report_replay(files, replay, args, writer)
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        for generator, state in zip(generators, checkpoint["generators"]):
            generator.set_state(state.cpu())
        evaluator.resume(num_updates, checkpoint["pending_evaluations"], agent.network)

    generator_states = [generator.get_state() for generator in generators]

    def save():
        """Everything that an exact continuation needs; generator_states are those before the current block."""
        state = {
            "num_updates": num_updates,
            "agent": agent.state_dict(),
            "generators": generator_states,
            "pending_evaluations": {update: past for update, (past, _) in evaluator.pending.items()},
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    if not args.resume:
        save()
    keep_freed_memory()
    learn, graph = partial(run_atari_updates, agent, args), None
    started, printed, block_start, stopped, rate = time.time(), time.time(), -1, False, 0
    while num_updates < args.num_updates and not stopped:
        # draw, a block of updates at a time; a resumed run draws the block it is in again
        if block_start != num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK:
            block_start = num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK
            fetch()
            generator_states = [generator.get_state() for generator in generators]
            (index,) = draw_block(replay, generators, args.batch_size)
            mixtures = draw_mixtures(generators, args.num_heads).to(device)
            if device.type == "cuda" and not graph:
                batches = replay.batches(index[:UPDATES_PER_GRAPH])
                graph = cuda_graph(learn, agent, *batches, mixtures[:UPDATES_PER_GRAPH])

        # learn, until the block ends or something else is due
        every = args.target_every, args.eval_every, args.checkpoint_every, args.log_every
        due = [n - num_updates % n for n in every]
        end = num_updates + min(*due, block_start + UPDATES_PER_BLOCK - num_updates, args.num_updates - num_updates)
        while num_updates < end:
            n = min(UPDATES_PER_GRAPH, end - num_updates)
            rows, mixture = (x[num_updates - block_start :][:n] for x in (index, mixtures))
            inputs = [*replay.batches(rows), mixture]
            metrics = graph(*inputs) if graph and n == UPDATES_PER_GRAPH else learn(*inputs)
            num_updates += n
            if stop:
                break
        if num_updates % args.target_every == 0:
            synchronize(agent)
        done, stopped = num_updates == args.num_updates, bool(stop)

        # evaluate, log, save
        if num_updates % args.eval_every == 0 or done:
            evaluator.submit(num_updates, agent.network)
        evaluator.collect(wait=done)
        if num_updates % args.log_every == 0:
            for tag, value in metrics.items():
                writer.add_scalar(tag, value.mean().item(), num_updates)
        rate = (num_updates - first_update) / (time.time() - started)
        if time.time() - printed > 5 or done:
            printed = time.time()
            left = timedelta(seconds=int((args.num_updates - num_updates) / rate))
            print(f"update {num_updates:,}/{args.num_updates:,}, {rate:.0f} updates/s, {left} left", flush=True)
        if num_updates % args.checkpoint_every == 0 or done or stopped:
            if num_updates % UPDATES_PER_BLOCK == 0:  # the next block is still to be drawn
                generator_states = [generator.get_state() for generator in generators]
            save()

    evaluator.close()
    replay.close()
    writer.close()
    if num_updates < args.num_updates:
        print(f"stopped at update {num_updates:,}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    print_atari_result(args, run_dir, num_updates, rate)


if __name__ == "__main__":
    main()
