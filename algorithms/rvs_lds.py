"""RvS + LDS: return-conditioned cloning, its examples weighted by the rarity of their returns.

Papers: A. Khalil, O. Ismaili, A. A. Hmamouchi, "Developing a Weighted Sampling Approach for Offline
Reinforcement Learning Using Imbalanced Regression Techniques", 2025 (IR); S. Emmons et al., "RvS: What is
Essential for Offline RL via Supervised Learning?", 2021, arXiv:2112.10751 (RvS); Y. Yang et al., "Delving
into Deep Imbalanced Regression", 2021, arXiv:2102.09554 (LDS).

Idea. Who clones a mixture of good and bad episodes acts like their average. Here the policy sees one more
input, the return that the episode went on to collect: it learns what was done on the way to which return,
and acting well is asking for much. But the data has few examples of the returns one wants to ask for.
Label distribution smoothing (LDS) estimates the density of the returns, smoothed because neighbouring
returns teach each other, and weighs each example by its inverse: rare returns, high or low, count more.

Objectives. The papers number none of these, so we do. Shapes: S seeds (agents side by side), B batch,
O observation, A action, N transitions, E episodes, U hidden units; return-to-go is part of O from (1) on.
    condition  G_t  = r_t + r_{t+1} + ... to the end of the episode, one more input beside s      (1)
    weight     w_i  = 1 / p(G_i), scaled to an average of 1; p: histogram, smoothed by a Gaussian (2)
    actor      L_pi = -mean w_i log pi(a_i | s_i, G_i)                                            (3)
    acting     a_t  = mean of pi(. | s_t, g_t);  g_0 = target return,  g_{t+1} = g_t - r_t        (4)

What differs from the papers and their code, and why.
    - The IR paper calls G a trajectory return, but prints the return-to-go, which is what we take. It
      normalises s and says nothing of G; we normalise both, or G's thousands would drown s.
    - It does not say what an evaluation asks for: here the best return of the data. Nor whether IR is
      conditioned: its scores follow Own Return's, not BC's, so here it is. Nor bins and kernel: 100
      bins, and the kernel of the LDS code, which folds the Gaussian's tails into its window.
    - Its title says sampling, its formula weighs the loss. So do we: the expected gradient is the same.
    - Weights have no bound, as printed: one isolated return among many can rule its batch.
    - Layer normalisation is in its text, but not in its list of layers: a flag, off.
    - log_std stays in [-5, 2], as in iql_red.py; RvS leaves it free. Actions outside [-1, 1] are
      clipped when acting, not in the likelihood.
    - RvS's --condition average is G over the steps that the longest episode has left; what is asked for
      then is constant. Only a change of the return tells of a last step that the data lost (D4RL).

Run:      python algorithms/rvs_lds.py --dataset hopper/replay-v0 --num-seeds 3
Expected: score 52 +- 8 with --num-updates 10000 --hidden-sizes 256 256 --eval-every 500 (without weights
          54 +- 6, cloning 14 +- 7); halfcheetah/replay-v0, one seed: 43 (its average episode: 27)
Asked against achieved:  python algorithms/rvs_lds.py --evaluate RUN --target-return 3000
BC:          --condition none --weighting none
10 % BC:     --condition none --weighting none --sampler top10
Own Return:  --weighting none
RvS-R:       --condition average --weighting none --dropout 0 --weight-decay 0 --learning-rate 1e-3
             --batch-size 16384
"""

import copy
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
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from gymnasium.envs.registration import EnvSpec, load_env_creator
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHUNK = 20  # updates whose batches are drawn together, and which a GPU replays as one CUDA graph
# Random numbers are a function of (seed, purpose, update, ...), so that no generator's state has to be saved.
# Purposes start at 1, because numpy takes (s, u, 0) for (s, u)
DRAWS = 1
EVALUATION = 2
NAME = re.compile(r"(.*?)(?::(0\.\d*[1-9]\d*|1\.0))?")  # of a dataset: `ID:0.1` is ID and the share 0.1


@dataclass
class Args:
    dataset: tuple[str, ...] = ("hopper/replay-v0",)  # Minari ids, folders, D4RL files; `ID:0.1`: a tenth of it
    env_id: str | None = None  # evaluation environment, also `module:Env-v0`; default: the data's
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation
    condition: Literal["none", "return", "average"] = "return"  # none: cloning; average: per step left
    target_return: float | None = None  # return that evaluations ask for; default: the best in the data
    weighting: Literal["none", "lds"] = "lds"  # of the loss; lds: by 1 / smoothed density of the return-to-go
    num_bins: int = 100  # bins of equal width between the least and the largest return-to-go
    kernel_size: int = 5  # bins under the smoothing kernel, an odd number; 1: plain inverse frequencies
    sigma: float = 2.0  # standard deviation of the kernel, in bins
    sampler: Literal["uniform", "top10"] = "uniform"  # top10: only the best tenth, by return
    num_updates: int = 200_000  # gradient steps; 100 epochs of D4RL's million transitions are 195,000
    batch_size: int = 512  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = (1024, 1024)  # widths of the hidden layers
    dropout: float = 0.1  # dropout rate behind each hidden layer
    layernorm: bool = False  # layer normalisation before each ReLU
    learning_rate: float = 5e-4  # Adam's step size
    weight_decay: float = 1e-4  # L2 regularisation, in the gradient that Adam sees
    eval_every: int = 5_000  # updates between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed, with the deterministic action; 0: never evaluate
    log_every: int = 1_000  # updates between entries in TensorBoard
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/DATASET/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing
    capture_video: bool = False  # film the evaluations (on a machine without screen: MUJOCO_GL=egl)

    def __post_init__(self):
        self.hidden_sizes = tuple(self.hidden_sizes)  # JSON makes a list of it
        self.dataset = tuple(  # files by their full path, so that a run goes on from anywhere
            os.path.abspath(name) if os.path.exists(NAME.fullmatch(name)[1]) else name
            for name in self.dataset
        )
        if not 0 <= self.dropout < 1:
            sys.exit("error: dropout is a rate; give a number in [0, 1)")
        if self.kernel_size % 2 == 0:
            sys.exit("error: the kernel has a middle; give an odd kernel_size")
        periods = self.num_updates, self.eval_every, self.log_every
        if any(period <= 0 or period % CHUNK for period in periods):
            sys.exit(f"error: num_updates, eval_every and log_every count in steps of {CHUNK}; give multiples of it")


# The idea: show the return that follows, and count rare returns more -------------------------------
def returns_to_go(data):
    """G of every transition, (N,): the return of its episode less what came before (1). The reward of a last
    step that left no transition counts."""
    G = []
    episodes = np.split(data.reward, np.cumsum(data.lengths)[:-1])
    for reward, episode_return in zip(episodes, data.returns):
        received = np.cumsum(reward, dtype=np.float64) - reward
        G.append(episode_return - received)
    return np.concatenate(G)


class ReturnToGo(gym.Wrapper):
    """Observations end with the return that is still to be collected (4) or, with a horizon, with that of the
    whole episode per step of it."""

    def __init__(self, env, target_return, horizon):
        super().__init__(env)
        self.target_return = target_return
        self.horizon = horizon
        (obs_dim,) = env.observation_space.shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim + 1,), np.float64)

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.return_to_go = self.target_return
        return self.conditioned(obs), info

    def step(self, action):
        obs, reward, *ends_and_info = self.env.step(action)
        self.return_to_go -= np.sum(reward)  # some give an array of one number
        return self.conditioned(obs), reward, *ends_and_info

    def conditioned(self, obs):
        condition = self.return_to_go
        if self.horizon:
            condition = self.target_return / self.horizon
        return np.append(obs, condition)


def conditioned(data, target_return, average):
    """The data and its environment as the policy sees them: obs (N, O + 1) end with the return-to-go or, on
    average, with that per step which the longest episode has left."""
    condition = returns_to_go(data)  # (N,)
    horizon = None
    if average:
        # a last step that left no transition counts; it shows by its reward, which is part of the return
        ends = np.cumsum(data.lengths)
        unseen = condition[ends - 1] - data.reward[ends - 1]  # (E,), rewards behind the last transition
        lost = np.abs(unseen) > 1e-6 * np.abs(data.reward).max()  # more than rounding
        horizon = int((data.lengths + lost).max())
        t = np.concatenate([np.arange(length) for length in data.lengths])
        condition = condition / (horizon - t)
    spec = copy.deepcopy(data.spec)
    if spec:
        asking = ReturnToGo.wrapper_spec(target_return=float(target_return), horizon=horizon)
        spec.additional_wrappers += (asking,)
    return data._replace(obs=np.column_stack([data.obs, condition]), spec=spec)


def lds_weights(G, num_bins, kernel_size, sigma):
    """w (N,) = 1 / smoothed density of G (N,), 1 on average (2). None is infinite: the bin of a transition
    holds at least this one."""
    bins = (G - G.min()) / (np.ptp(G) or 1) * num_bins
    bins = bins.astype(int).clip(max=num_bins - 1)  # the largest G is in the last one
    counts = np.bincount(bins, minlength=num_bins)

    # a Gaussian around the middle of kernel_size bins, up to a factor. As in the LDS code, its tails end at
    # 4 sigma and are folded back into the window, as often as it takes
    reach = int(4 * sigma + 0.5)
    num_folds = reach // kernel_size + 1
    folds = np.arange(-num_folds, num_folds + 1)[:, None]
    distance = np.arange(kernel_size) - kernel_size // 2 + kernel_size * folds
    gaussian = np.exp(-0.5 * (distance / sigma) ** 2)
    kernel = np.where(np.abs(distance) <= reach, gaussian, 0).sum(0)  # (kernel_size,)

    density = np.convolve(counts, kernel)[kernel_size // 2 :]  # beyond the outermost bins there is nothing
    weight = 1 / density[bins]
    return weight / weight.mean()


def uniform_or_top10(data, args):
    """P(i) of every transition, (N,), from returns as logged."""
    returns = np.repeat(data.returns, data.lengths)
    if args.sampler == "top10":
        best = returns >= np.quantile(returns, 0.9)  # a tenth of the transitions, by their episodes
        return best / best.sum()
    return np.full(len(returns), 1 / len(returns))


class Sampler:
    """Draws transitions i with their P(i), by inverting the cumulative sum of P: O(log N) a draw."""

    def __init__(self, probabilities, device):
        cdf = np.cumsum(probabilities)  # in float64: float32 is off by 1 % after a million terms
        self.cdf = torch.from_numpy(cdf / cdf[-1]).to(device)

    def draw(self, seeds, step, batch_size):
        """Transitions (CHUNK, S, B) for the updates from `step` on; each seed draws its own."""
        generators = [np.random.default_rng((seed, DRAWS, step)) for seed in seeds]
        uniforms = [generator.random((CHUNK, batch_size)) for generator in generators]
        uniforms = torch.from_numpy(np.stack(uniforms, axis=1))
        if self.cdf.is_cuda:
            # from pinned memory, because copies from other memory wait for the GPU
            uniforms = uniforms.pin_memory().to(self.cdf.device, non_blocking=True)
        return torch.searchsorted(self.cdf, uniforms, right=True)  # right: never one of P(i) = 0


def draw_kept(seeds, step, args):
    """Which hidden units dropout leaves, bools (CHUNK, S, B, U), in the updates from `step` on; U is 0 where
    there is no dropout. Each seed draws its own, 16 bits a unit, which is faster than a float each."""
    num_units = 0
    if args.dropout:
        num_units = sum(args.hidden_sizes)
    shape = CHUNK, args.batch_size, num_units
    kept = []
    for seed in seeds:
        entropy = np.random.SeedSequence((seed, DRAWS, step)).generate_state(1).item()
        generator = torch.Generator(args.device).manual_seed(entropy)
        words = torch.empty(math.prod(shape) // 4, dtype=torch.int64, device=args.device)  # 4 divides CHUNK
        words.random_(-(2**63), None, generator=generator)
        bits = words.view(torch.int16).view(shape)
        kept.append(bits >= round((args.dropout - 0.5) * 2**16))
    return torch.stack(kept, 1)


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def orthogonal(weight, bias, generator):
    """Initial values of any layer, of the last one too: weight (in, out), bias (1, out), as in IQL's authors' code."""
    nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=generator)  # sqrt(2): ReLUs halve the variance
    bias.zero_()


class Normalize(nn.Module):
    """Observations (..., O) less their mean, divided by their standard deviation; part of what is saved."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32))

    def forward(self, obs):
        return (obs - self.mean) / self.std


class RegularizedActor(nn.Module):
    """pi(a|s) = Normal(mean(s), exp(log_std)), with one learned log_std per action dimension. Every hidden
    layer has dropout behind its ReLU and, with layernorm, layer normalisation before it."""

    def __init__(self, obs_dim, action_dim, args, generators):
        super().__init__()
        self.hidden_sizes = list(args.hidden_sizes)
        self.dropout = args.dropout
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        sizes = [obs_dim, *args.hidden_sizes, action_dim]
        S = len(generators)
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            weight = torch.empty(S, fan_in, fan_out)
            bias = torch.empty(S, 1, fan_out)
            for s, generator in enumerate(generators):
                orthogonal(weight[s], bias[s], generator)  # views, filled in place
            self.weights.append(weight)  # which makes it a Parameter
            self.biases.append(bias)
        self.weights[-1].data *= 0.01 / math.sqrt(2)  # gain 0.01 at the output, as in RvS
        self.gains = nn.ParameterList()
        self.shifts = nn.ParameterList()
        if args.layernorm:
            for size in args.hidden_sizes:
                self.gains.append(torch.ones(S, 1, size))
                self.shifts.append(torch.zeros(S, 1, size))
        self.log_std = nn.Parameter(torch.zeros(S, 1, action_dim))

    def mean(self, obs, kept=None):
        """(S, B, O) -> (S, B, A). kept: bools (S, B, U), the hidden units that dropout leaves; None: all."""
        x = obs
        if self.dropout and kept is not None:
            kept = kept.split(self.hidden_sizes, -1)
        for i in range(len(self.hidden_sizes)):
            x = torch.baddbmm(self.biases[i], x, self.weights[i])
            if self.gains:
                x = nn.functional.layer_norm(x, x.shape[-1:]) * self.gains[i] + self.shifts[i]
            x = torch.relu_(x)
            if self.dropout and kept is not None:
                x = x * (kept[i] * (1 / (1 - self.dropout)))  # on average as without dropout
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])

    def forward(self, obs):
        return self.mean(obs).clamp(-1, 1)  # (S, B, A), the deterministic action

    def log_prob(self, obs, action, kept):
        log_std = self.log_std.clamp(-5, 2)  # bounds of the IQL authors' code
        z = (action - self.mean(obs, kept)) / log_std.exp()
        log_prob = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        return log_prob.sum(-1)  # (S, B)


class Agent(nn.Module):
    """Policies and optimizer of S independent agents; obs (N, O) tells what the policy's inputs look like."""

    def __init__(self, obs, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        self.normalize = Normalize(obs.mean(0, dtype=np.float64), obs.std(0, dtype=np.float64) + 1e-3)
        self.actor = RegularizedActor(obs.shape[1], action_dim, args, generators)
        self.to(args.device)
        adam = torch.optim.Adam(
            self.actor.parameters(),
            args.learning_rate,
            weight_decay=args.weight_decay,
            fused=True,
            capturable="cuda" in args.device,
        )
        self.optimizers = {"actor": adam}


# The update ---------------------------------------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def update(agent, obs, action, weight, kept, args):
    """One gradient step of every agent on obs (S, B, O), whose end is the condition, action (S, B, A), weight
    (S, B), never (S, B, 1), which would broadcast, and kept (S, B, U), the hidden units that dropout leaves.
    Returns what to log the mean of, still on the device: nothing here waits for a GPU."""
    # actor: clone the logged action, given the return that followed, the rarer the more (3)
    log_prob = agent.actor.log_prob(agent.normalize(obs), action, kept)  # (S, B)
    actor_loss = -(weight * log_prob).mean(-1)  # (S,)
    minimize(actor_loss.sum(), agent.optimizers["actor"])  # sum over S: seeds never mix

    return {
        "loss/actor": actor_loss.detach(),
        "loss/negative_log_likelihood": -log_prob.detach(),
        "policy/log_std": agent.actor.log_std.detach().clone(),
    }


# Plumbing of the offline scripts: data ------------------------------------------------------------
class Data(NamedTuple):
    """N transitions of E episodes, one after the other; nothing changes them in place. For arrays of your own
    keep this class, put a `load_data(args)` that returns it in place of all below, down to the next heading,
    and delete the imports that are left over. The default of --dataset then only names the run folder."""

    obs: np.ndarray  # (N, O)
    action: np.ndarray  # (N, A), in [-1, 1]
    reward: np.ndarray  # (N,), as logged
    next_obs: np.ndarray  # (N, O)
    terminated: np.ndarray  # (N,), true where the episode really ended, false where it was cut
    returns: np.ndarray  # (E,), sums of all rewards as logged
    lengths: np.ndarray  # (E,), numbers of transitions, N together
    spec: EnvSpec | None  # gym.spec(ID) with a step limit, its module imported; None: no evaluations
    references: tuple[float, float]  # returns that score 0 and 100; (nan, nan): no score


# D4RL's returns of a random and of an expert policy (Fu et al., 2020)
REFERENCES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}
# packages whose environments a file may have us run
TRUSTED = {"gymnasium", "gymnasium_robotics", "shimmy", "ale_py"}


def find_dataset(name):
    """Path of a D4RL file, or of a Minari folder: given, embedded here, local, or downloaded."""
    if name.endswith(".hdf5"):
        return Path(name)
    embedded = Path(__file__).resolve().parent.parent / "tests" / "data"
    local = Path(minari.storage.get_dataset_path(name))
    for folder in (Path(name), embedded / name, local):
        if (folder / "data" / "metadata.json").exists():
            return folder / "data"
    try:
        minari.download_dataset(name)
    except Exception as e:  # each layer below has errors of its own
        known = [str(folder.relative_to(embedded)) for folder in embedded.glob("*/*-v*")]
        sys.exit(f"error: no dataset {name} here or at Minari ({e!r}); embedded are {known}")
    return local / "data"


def flatten(space, x):
    """Values x of a space, stacked along time (those of a Dict by key), as (T, D)."""
    steps = gym.vector.utils.iterate(gym.vector.utils.batch_space(space), x)
    flat = [gym.spaces.flatten(space, step) for step in steps]
    return np.reshape(flat, (-1, gym.spaces.flatdim(space)))


def read_minari(folder):
    """Episodes (obs, action, reward, next_obs, terminated), observation space, action space, metadata."""
    metadata = json.loads((folder / "metadata.json").read_text())
    if not {"observation_space", "action_space"} <= metadata.keys():  # Minari would make the environment
        sys.exit(f"error: {folder} does not tell its spaces; write both to metadata.json")
    dataset = minari.MinariDataset(folder)
    episodes = []
    for episode in tqdm(dataset.iterate_episodes(), "reading", len(dataset), disable=None):
        obs = flatten(dataset.observation_space, episode.observations)  # (T + 1, O)
        action = flatten(dataset.action_space, episode.actions)
        columns = obs[:-1], action, episode.rewards, obs[1:], episode.terminations
        episodes.append(columns)
    return episodes, dataset.observation_space, dataset.action_space, metadata


def read_d4rl(path):
    """The same of a D4RL file: episodes end at terminals, timeouts, or the step limit of the task."""
    with h5py.File(path) as file:
        columns = {key: x[()] for key, x in file.items() if isinstance(x, h5py.Dataset)}
    tasks = [task for task in REFERENCES if path.name.lower().startswith(task.lower())]
    needed = {"observations", "actions", "rewards", "terminals"}
    if not tasks:
        needed.add("timeouts")  # or nothing tells where episodes end
    if not needed <= columns.keys():
        sys.exit(f"error: {path} needs {sorted(needed)}; a Minari dataset is named by its folder")
    obs = columns["observations"]
    action = columns["actions"].reshape(len(obs), -1)
    if action.dtype.kind != "f":
        sys.exit(f"error: {path} has discrete actions; these scripts need continuous ones")
    terminated = columns["terminals"].ravel() > 0
    ended = terminated | (columns.get("timeouts", terminated).ravel() > 0)
    limit = len(obs) if "timeouts" in columns else 1000  # of the three tasks

    episodes = []
    start = 0
    for end in range(1, len(obs) + 1):
        if ended[end - 1] or end - start == limit or end == len(obs):
            steps = slice(start, end)
            next_obs = obs[start + 1 : end]  # the last one is not in the file
            if "next_observations" in columns:
                next_obs = columns["next_observations"][steps]
            elif terminated[end - 1]:
                next_obs = np.concatenate([next_obs, obs[end - 1 : end]])  # nothing reads it
            reward = columns["rewards"][steps]
            episodes.append((obs[steps], action[steps], reward, next_obs, terminated[steps]))
            start = end
    obs_space = gym.spaces.Box(-np.inf, np.inf, obs.shape[1:])
    action_space = gym.spaces.Box(-1, 1, action.shape[1:])
    return episodes, obs_space, action_space, {None: f"{task}-v5" for task in tasks}  # no JSON has this key


def sizes(space):
    """How many numbers a space flattens to, part by part where it has parts."""
    if isinstance(space, gym.spaces.Dict):
        return {key: sizes(part) for key, part in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return [sizes(part) for part in space]
    return gym.spaces.flatdim(space)


def bounds(space):
    """Lowest and highest values (2, ...) of a Box, and None of other spaces."""
    if isinstance(space, gym.spaces.Box):
        return np.float32([space.low, space.high])


def evaluation_spec(path, obs_space, action_space, metadata, args):
    """Spec of the environment that evaluations run in, flattened in the order of the data, and the
    returns that score 0 and 100."""
    if args.eval_episodes == 0:
        return None, None
    env_id = args.env_id or metadata.get(None)
    named = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "null")
    if env_id:
        env = gym.make(env_id)
    elif named:
        for part in [named, *named["additional_wrappers"]]:
            name = part["entry_point"]
            if name.partition(".")[0] not in TRUSTED or not issubclass(load_env_creator(name), gym.Env):
                sys.exit(f"error: {path} would run {name}; give --env-id")
        env = minari.MinariDataset(path).recover_environment(eval_env=True)
    else:
        return None, None

    same_bounds = np.array_equal(bounds(env.action_space), bounds(action_space))
    if sizes(env.observation_space) != sizes(obs_space) or not same_bounds:
        sys.exit(
            f"error: {env.spec.id} has {env.observation_space} and {env.action_space}, "
            f"the data {obs_space} and {action_space}; give another --env-id"
        )
    references = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in references:
        references = REFERENCES.get(env.spec.id.split("-")[0], (np.nan, np.nan))
    as_data = partial(gym.spaces.flatten, obs_space)
    flat_space = gym.spaces.flatten_space(obs_space)
    spec = gym.wrappers.TransformObservation(env, as_data, flat_space).spec  # a copy that lists all wrappers
    spec.kwargs.pop("render_mode", None)  # no window
    spec.max_episode_steps = spec.max_episode_steps or 10_000  # or an episode may never end
    return spec, references


def load_data(args):
    """All of --dataset, which must be of one environment. A last transition whose s' nobody
    knows is left out, but its reward is part of the return."""
    transitions = []
    returns = []
    kinds = set()
    for name in args.dataset:
        name, share = NAME.fullmatch(name).groups()
        path = find_dataset(name)
        read = read_d4rl if path.suffix == ".hdf5" else read_minari
        episodes, obs_space, action_space, metadata = read(path)
        limits = bounds(action_space)
        if limits is None or not np.isfinite(limits).all():
            sys.exit(f"error: {name} has actions {action_space}; they must be a Box with bounds")
        spec, references = evaluation_spec(path, obs_space, action_space, metadata, args)
        kinds.add(f"{sizes(obs_space)} {limits.tolist()} {spec and [spec.id, spec.kwargs, spec.max_episode_steps]}")
        low, high = limits.reshape(2, -1)  # (A,) each
        num_kept = max(1, round(float(share or 1) * len(episodes)))
        kept = np.random.default_rng(0).permutation(len(episodes))[:num_kept]
        for i in sorted(kept):
            obs, action, reward, next_obs, terminated = episodes[i]
            if len(next_obs) == 0:
                continue
            action = 2 * (np.float64(action) - low) / (high - low) - 1
            columns = obs, action, np.reshape(reward, len(obs)), next_obs, np.ravel(terminated)
            transitions.append([column[: len(next_obs)] for column in columns])
            returns.append(np.sum(reward, dtype=np.float64))
    if len(kinds) > 1:
        sys.exit(f"error: the datasets differ in observations, actions or environment: {kinds}")
    lengths = [len(obs) for obs, *_ in transitions]
    columns = [np.concatenate(column) for column in zip(*transitions)]
    return Data(*columns, np.array(returns), np.array(lengths), spec, references)


# Plumbing of all scripts: evaluation, run folder --------------------------------------------------
ROW = "update", "seed", "episode", "return", "length", "normalized_score"  # of evaluations.csv


def start_worker():
    """An evaluation worker has one thread, and never outlives its parent."""
    torch.set_num_threads(1)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run_episode(pickled, spec, references, run_dir, seeds, num_updates, episode):
    """One episode of every seed, rows (S, 6). The policy is any module (S, 1, O) -> (S, 1, A)."""
    policy = pickle.loads(pickled)
    wrappers = [
        lambda env: gym.wrappers.RescaleAction(env, -1, 1),
        lambda env: gym.wrappers.TransformReward(env, np.sum),  # some give an array of one number
    ]
    envs = gym.make_vec(spec, len(seeds), "sync", wrappers=wrappers)
    if envs.render_mode:
        folder = run_dir / "videos"
        envs = gym.wrappers.vector.RecordVideo(envs, folder, name_prefix=f"{num_updates}-{episode}")
    entropy = [(seed, EVALUATION, num_updates, episode + 1) for seed in seeds]
    env_seeds = [np.random.SeedSequence(x).generate_state(1).item() for x in entropy]
    obs, _ = envs.reset(seed=env_seeds)
    returns, lengths = np.zeros((2, len(seeds)))
    running = np.ones(len(seeds), bool)  # what comes after a seed's first episode does not count
    while running.any():
        with torch.no_grad():
            action = policy(torch.as_tensor(obs, dtype=torch.float32)[:, None])
        action = action.numpy().reshape(envs.action_space.shape)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    low, high = references
    scores = 100 * (returns - low) / (high - low)
    columns = np.broadcast_arrays(num_updates, seeds, episode, returns, lengths, scores)
    return np.stack(columns, axis=1)


def summary(rows, num_seeds):
    """Mean of the last ten evaluations, +- its standard deviation over seeds."""
    if len(rows) == 0:
        return "nothing was evaluated"
    evaluations = np.unique(rows[:, 0])
    last = rows[np.isin(rows[:, 0], evaluations[-10:])]
    means = last.reshape(-1, num_seeds, len(ROW)).mean(0)  # (S, 6); seeds are innermost
    _, _, _, returns, _, scores = means.T
    text = f"return {returns.mean():.1f}, normalised score {scores.mean():.1f}"
    if num_seeds > 1:
        text += f" (+- {returns.std():.1f} and {scores.std():.1f} over seeds)"
    return text


def report(rows, jobs, run_dir, writer):
    """Rows of all evaluations, those of `jobs` being new: to screen, TensorBoard, evaluations.csv."""
    if not jobs:
        return rows
    new_rows = np.concatenate([job.result() for job in jobs])
    num_updates, _, _, mean, _, score = new_rows.mean(0)
    tqdm.write(f"update {num_updates:,.0f}: return {mean:.1f}, normalised score {score:.1f}")
    writer.add_scalar("evaluation/return", mean, num_updates)
    writer.add_scalar("evaluation/normalized_score", score, num_updates)
    rows = np.concatenate([rows, new_rows])
    np.savetxt(run_dir / "evaluations.csv", rows, "%.10g", ",", header=",".join(ROW), comments="")
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
    data = load_data(args)
    if not all((np.abs(column) < 1e18).all() for column in data[:7]):  # all arrays; squares must not overflow
        sys.exit("error: the data has NaN, infinite or huge values; clean it first")
    if np.abs(data.action).max() > 1 + 1e-6:
        sys.exit("error: there are actions outside their bounds; clip or rescale them")
    if args.eval_episodes and not data.spec:
        sys.exit("error: the data names no environment; give --env-id, or --eval-episodes 0")

    # the method's own lines, which a copied `update` needs too
    probabilities = uniform_or_top10(data, args)
    weight = np.ones(len(data.reward))
    if args.weighting == "lds":
        weight = lds_weights(returns_to_go(data), args.num_bins, args.kernel_size, args.sigma)
    target_return = args.target_return
    if target_return is None:
        target_return = data.returns.max()
    if args.condition != "none":
        data = conditioned(data, target_return, args.condition == "average")

    # one row a transition, so that a batch is one gather; only these lines and `learn` know the columns
    columns = data.obs, data.action, weight[:, None]
    widths = [column.shape[1] for column in columns]
    transitions = np.concatenate(columns, axis=1, dtype=np.float32)
    transitions = torch.from_numpy(transitions).to(args.device)
    sampler = Sampler(probabilities, args.device)

    # agents, as they start or as they were
    agent = Agent(data.obs, data.action.shape[1], args)
    policy = nn.Sequential(agent.normalize, agent.actor)  # what is evaluated
    run_dir = run_folder(args)
    rows = np.empty((0, len(ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        args.num_updates = max(args.num_updates, first)
    num_workers = max(1, torch.get_num_threads() - 1)  # knows what a job may use, unlike cpu_count
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)
    if args.capture_video:
        data.spec.kwargs["render_mode"] = "rgb_array"

    def start_evaluation(num_updates):
        frozen = pickle.dumps(copy.deepcopy(policy).cpu().eval())
        job = frozen, data.spec, data.references, run_dir, seeds, num_updates
        return [pool.submit(run_episode, *job, episode) for episode in range(args.eval_episodes)]

    if args.evaluate:
        jobs = start_evaluation(2**31)  # episodes that no run has seen
        rows = np.reshape([job.result() for job in jobs], (-1, len(ROW)))
        print(f"policies of update {first:,}: {summary(rows, args.num_seeds)}")
        return

    transition_returns = np.repeat(data.returns, data.lengths)
    drawn = np.random.default_rng(0).choice(transition_returns, 100_000, p=probabilities)  # for the histogram
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    writer.add_histogram("data/return_of_transitions", transition_returns, 0)
    writer.add_histogram("data/return_of_draws", drawn, 0)
    print(f"{len(transition_returns):,} transitions of {len(data.returns):,} episodes")
    print(f"mean return {transition_returns.mean():.1f} by uniform draws, {drawn.mean():.1f} by this run's")
    if args.condition != "none":
        print(f"evaluations ask for a return of {target_return:.1f}")
    print(f"loss weights {weight.min():.3g} to {weight.max():.3g}, 1 on average")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    @CudaGraph
    def learn(batches, kept):  # one update for each batch of batches (CHUNK, S, B)
        batches = nn.functional.embedding(batches, transitions)  # a gather, faster than indexing
        obs, action, weight = batches.split(widths, dim=-1)
        for batch in zip(obs, action, weight.squeeze(-1), kept):
            metrics = update(agent, *batch, args)
        return metrics  # of the last update

    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    started = time.time()
    for step in tqdm(range(first, args.num_updates, CHUNK), mininterval=1, unit_scale=CHUNK):
        batches = sampler.draw(seeds, step, args.batch_size)
        kept = draw_kept(seeds, step, args)
        metrics = learn(batches, kept)
        num_updates = step + CHUNK

        # report the evaluation before this one, which had time beside training; save; start it
        evaluation_due = num_updates % args.eval_every == 0 or num_updates == args.num_updates
        if evaluation_due or num_updates % args.log_every == 0:
            log(metrics, num_updates, writer)
        if evaluation_due:
            rows = report(rows, jobs, run_dir, writer)
            save(run_dir / "checkpoint.pt", agent, rows, num_updates)
            jobs = start_evaluation(num_updates)

    speed = (args.num_updates - first) / (time.time() - started)
    rows = report(rows, jobs, run_dir, writer)
    writer.close()
    result = summary(rows, args.num_seeds)
    print(f"{result}; {args.num_updates:,} updates, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
