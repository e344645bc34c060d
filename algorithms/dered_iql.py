"""DeReD on IQL: learn from all data, then fine-tune the backbones on data rebalanced by return.

Papers: Y. Yue et al., "Boosting Offline Reinforcement Learning via Data Rebalancing", 2022,
arXiv:2210.09241 (ReD, DeReD); I. Kostrikov et al., "Offline Reinforcement Learning with Implicit
Q-Learning", 2021, arXiv:2110.06169 (IQL).

Idea. ReD draws every transition with a probability that grows with the return of its episode. Where
rewards are sparse and late, this takes from the critics the failures that make a success stand out.
DeReD (section 4.2, appendix A.1) decouples the two. Stage 1 is IQL on uniform draws. Stage 2 goes on
with ReD's draws, at a tenth of the step size, and moves only the backbone of each network, which is
all layers but the last: features adapt to good episodes, heads keep what they learned from all.

Objectives, by the papers' equation numbers. Shapes: S seeds (agents side by side), C critics,
B batch, O observation, A action, N transitions, E episodes. min Q is the smaller of two critics.
    stage 1   P(i) = 1 / N; every parameter moves
    stage 2   p(i) = (R_i - R_min) / (R_max - R_min) + p_base,  P(i) = p(i)^alpha / sum_k p(k)^alpha
              where R_i is the return of i's episode; backbones move             ReD (2), (1)
    both      value, actor, critic, targets as in iql_red.py                     IQL (5), (7), (6)

What differs from the papers and their code, and why.
    - The paper says "0.1x learning rate". As in the authors' code, stage 2 has new Adams; V and Q keep
      a constant step size; the actor's rises from a hundredth of its peak over the first 5 % of the
      stage and falls to 0 along a cosine (stage 1's is 0 by then). --warm-up 0 is the cosine alone.
    - log_std is part of no layer and rests in stage 2, as in their code. Target critics are carried
      over and go on as before: their heads still close in on the critics' resting ones.
    - --finetune all is the paper's DeReD-A. It moves log_std too, and at the same step sizes.
    - R_i is the return of the whole episode as logged, and bootstrapping goes on through time limits:
      see iql_red.py, of which stage 1 is a copy with uniform draws, bit by bit.
    - The scores printed last are means of a stage's last ten evaluations; the papers' AntMaze scores
      are the last evaluation alone. Minari's AntMaze, PointMaze and Kitchen go on after success, so
      their returns are not D4RL's 0/1.

Run:      python algorithms/dered_iql.py --num-seeds 5 --num-updates 25000 --stage2-updates 15000
          --hidden-sizes 128 128
Expected: score 22 +- 2 over both stages, no more than uniform IQL in 40,000 updates (23 +- 1): too short
AntMaze:  --dataset D4RL/antmaze/medium-play-v1 --stage2-updates 200000 --p-base 0.2 --expectile 0.9
          --beta 10 --reward-transform shift --eval-every 100000 --eval-episodes 100
Kitchen and Adroit:  --stage2-updates 200000 --beta 0.5 --dropout 0.1 --reward-transform none
"""

import copy
import itertools
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
    red_alpha: float = 1.0  # ReD's exponent alpha; 0 is uniform
    p_base: float = 0.0  # ReD's floor under the normalised return
    num_updates: int = 1_000_000  # gradient steps of stage 1
    stage2_updates: int = 500_000  # gradient steps of stage 2, which come after those of stage 1
    finetune: Literal["backbone", "all"] = "backbone"  # what stage 2 moves: all layers but the last, or everything
    stage2_rate: float = 0.1  # Adam's step size in stage 2, as a share of learning_rate
    warm_up: float = 0.05  # share of stage 2 in which the actor's step size rises, before it falls along a cosine
    batch_size: int = 256  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of every network
    learning_rate: float = 3e-4  # Adam's step size in stage 1; the actor's falls to 0 along a cosine
    gamma: float = 0.99  # discount factor
    expectile: float = 0.7  # IQL's tau: the expectile of Q that V estimates
    beta: float = 3.0  # inverse temperature of the advantage weights
    target_update_rate: float = 0.005  # how far targets move to the critics at every update
    dropout: float = 0.0  # dropout rate in the actor
    reward_transform: Literal["scale", "shift", "none"] = "scale"  # scale: r * 1000 / (R_max - R_min); shift: r - 1
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
        for name in ("gamma", "expectile", "target_update_rate", "dropout", "stage2_rate", "warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                sys.exit(f"error: {name} is a rate; give a number in [0, 1]")
        for name in ("num_updates", "stage2_updates", "eval_every", "log_every"):
            if getattr(self, name) <= 0 or getattr(self, name) % CHUNK:
                sys.exit(f"error: {name} counts in steps of {CHUNK}; give a multiple of it")

    def check_stages(self, before):
        """Exits where a run that goes on would have another stage 1, or move other layers in stage 2."""
        if self.num_updates != before["num_updates"] or self.finetune != before["finetune"]:
            sys.exit("error: stage 1 keeps its --num-updates, stage 2 its --finetune; give a larger --stage2-updates")


# The idea: learn from all data, then fine-tune the backbones on good episodes ---------------------
class Stage(NamedTuple):
    """One of the two stages, which share networks, targets and the count of updates."""

    name: str
    start: int  # updates before it
    end: int  # updates before it and in it
    sampler: str  # uniform or red
    moving: str  # all parameters, or the backbone of each network
    learning_rate: float  # Adam's step size; of the actor's the highest
    warm_up: float  # share of the stage in which the actor's rises

    def parameters(self, network):
        """Those of V, the critics or the actor that move. Gradients pass through a resting head."""
        if self.moving == "all":
            return list(network.parameters())
        mlp = getattr(network, "net", network)  # of the actor without log_std, which is part of no layer
        return [*mlp.weights[:-1], *mlp.biases[:-1]]  # all layers but the last

    def steps(self, first):
        """Counts of updates before each chunk, for a run that starts or goes on at `first`."""
        return range(max(first, self.start), self.end, CHUNK)

    def actor_rate(self, num_updates):
        """The actor's step size: up from a hundredth, then down to 0 along a cosine."""
        progress = (num_updates - self.start) / (self.end - self.start)
        if progress < self.warm_up:
            return self.learning_rate * (0.01 + 0.99 * progress / self.warm_up)
        progress = (progress - self.warm_up) / (1 - self.warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def summary(self, rows, args):
        """What was reached, by the evaluations of this stage alone."""
        own = rows[(self.start < rows[:, 0]) & (rows[:, 0] <= self.end)]
        return f"{self.name}: {summary(own, args.num_seeds)}"


def stages_of(args):
    """IQL on all data; then fewer and smaller steps on good episodes."""
    start = args.num_updates
    end = start + args.stage2_updates
    small_rate = args.stage2_rate * args.learning_rate
    return (
        Stage("stage 1", 0, start, "uniform", "all", args.learning_rate, 0.0),
        Stage("stage 2", start, end, "red", args.finetune, small_rate, args.warm_up),
    )


def red_probabilities(x, alpha=1.0, p_base=0.0):
    """P(i) of N transitions, (N,), from a value x of each, (N,): under ReD the return of its episode. Uniform
    where all x are equal."""
    if spread(x) == 0:
        return np.ones(len(x)) / len(x)
    p = (x - x.min()) / spread(x) + p_base  # ReD (2)
    p = (p / p.max()) ** alpha  # at most 1, so that no exponent overflows
    return p / p.sum()  # ReD (1)


def spread(x):
    """Largest less smallest of x, and 0 where they differ by rounding only."""
    span = np.ptp(x)
    return span if span > 1e-9 * np.abs(x).max() else 0.0


def stage_probabilities(data, stage, args):
    """P(i) of every transition, (N,), from returns as logged."""
    returns = np.repeat(data.returns, data.lengths)
    if stage.sampler == "red":
        return red_probabilities(returns, args.red_alpha, args.p_base)
    return np.ones(len(returns)) / len(returns)


def reward_and_action(data, args):
    """Both as learned from: rewards (N,), transformed, and actions (N, A), clipped."""
    reward = data.reward
    if args.reward_transform == "scale":
        reward = reward * (1000 / (spread(data.returns) or 1000))  # returns all equal: as they are
    elif args.reward_transform == "shift":
        reward = reward - 1.0  # not 1: unsigned integers would wrap around
    action = data.action.clip(-1 + 1e-5, 1 - 1e-5)  # as IQL's authors do: tanh never gets to 1
    return reward, action


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


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def orthogonal(weight, bias, generator):
    """Initial values of any layer, of the last one too: weight (in, out), bias (1, out), as in IQL's authors' code."""
    nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=generator)  # sqrt(2): ReLUs halve the variance
    bias.zero_()


class MLP(nn.Module):
    """S * C independent networks side by side: weights (S * C, in, out), one batched product a layer."""

    def __init__(self, sizes, init, generators, C=1):
        super().__init__()
        self.C = C
        self.activation = torch.relu_
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        num_networks = len(generators) * C
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            weight = torch.empty(num_networks, fan_in, fan_out)
            bias = torch.empty(num_networks, 1, fan_out)
            for i in range(num_networks):
                init(weight[i], bias[i], generators[i // C])  # views, filled in place
            self.weights.append(weight)  # which makes it a Parameter
            self.biases.append(bias)
        self.layers = list(zip(self.weights, self.biases))  # a list, because a ParameterList is slow to go through

    def forward(self, x):
        """x (S, B, in) -> (S, B, out), or (S, C, B, out) where a seed has several networks."""
        if self.C > 1:
            x = x.repeat_interleave(self.C, 0)  # all critics of a seed see the same input
        for i, (weight, bias) in enumerate(self.layers):
            if i > 0:
                x = self.activation(x)
            if weight.shape[-1] > 1:
                x = torch.baddbmm(bias, x, weight)
            else:  # a matrix times a vector, which baddbmm is slow at
                x = (x * weight.mT).sum(-1, keepdim=True) + bias
        return x.unflatten(0, (-1, self.C)).squeeze(1)  # (S * C, B, out) -> (S, C, B, out), no C where it is 1


class GaussianActor(nn.Module):
    """pi(a|s) = Normal(tanh(net(s)), exp(log_std)), with one learned log_std per action dimension."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, generators, dropout):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes, action_dim]
        self.net = MLP(sizes, orthogonal, generators)
        if dropout:
            self.net.activation = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.log_std = nn.Parameter(torch.zeros(len(generators), 1, action_dim))

    def forward(self, obs):
        return self.net(obs).tanh()  # (S, B, A), the mean, which is the deterministic action

    def log_prob(self, obs, action):
        log_std = self.log_std.clamp(-5, 2)  # bounds of the IQL authors' code
        z = (action - self(obs)) / log_std.exp()
        log_prob = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        return log_prob.sum(-1)  # (S, B)


class Agent(nn.Module):
    """Networks and optimizers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        hidden = args.hidden_sizes
        self.actor = GaussianActor(obs_dim, action_dim, hidden, generators, args.dropout)
        self.critic = MLP([obs_dim + action_dim, *hidden, 1], orthogonal, generators, C=2)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = MLP([obs_dim, *hidden, 1], orthogonal, generators)
        self.to(args.device)
        self.optimizers = {}  # of both stages, so that a checkpoint of either fits
        for stage, name in itertools.product(stages_of(args), ("value", "actor", "critic")):
            parameters = stage.parameters(getattr(self, name))
            rate = torch.tensor(stage.learning_rate, device=args.device)  # changes; a CUDA graph would keep a number
            adam = torch.optim.Adam(parameters, rate, fused=True, capturable=rate.is_cuda)
            self.optimizers[name, stage.name] = adam


# The update ---------------------------------------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def update(agent, obs, action, reward, next_obs, not_terminated, stage, args):
    """One gradient step of every agent on obs (S, B, O), action (S, B, A), reward (S, B), next_obs (S, B, O) and
    not_terminated (S, B), never (S, B, 1), which would broadcast. Returns what to log the mean of, still on the
    device: nothing here waits for a GPU."""
    obs_action = torch.cat([obs, action], -1)

    # value: an upper expectile of Q over the logged actions, IQL (5). Errors above V weigh `expectile`,
    # those below the rest: 0.5 gives the mean over the logged actions, towards 1 the best of them
    with torch.no_grad():
        target_q = agent.target_critic(obs_action).squeeze(-1).amin(1)  # (S, B)
    u = target_q - agent.value(obs).squeeze(-1)
    weight = (args.expectile - 1.0 * (u < 0)).abs()
    value_loss = (weight * u.square()).mean(-1)  # (S,)
    minimize(value_loss.sum(), agent.optimizers["value", stage.name])  # sum over S: seeds never mix
    with torch.no_grad():  # actor and critics see the new V
        values = agent.value(torch.cat([obs, next_obs], 1)).squeeze(-1)  # one product for both
        value, next_value = values.chunk(2, dim=1)  # (S, B) each

    # actor: clone the logged actions, the better the more, IQL (7)
    exponent = args.beta * (target_q - value)
    advantage_weight = exponent.clamp(max=math.log(100)).exp()  # at most 100, without overflow
    log_prob = agent.actor.log_prob(obs, action)  # (S, B)
    actor_loss = -(advantage_weight * log_prob).mean(-1)  # (S,)
    minimize(actor_loss.sum(), agent.optimizers["actor", stage.name])

    # critics: V(s') bootstraps through a time limit, but not through a true end, IQL (6)
    backup = reward + args.gamma * not_terminated * next_value  # (S, B)
    q = agent.critic(obs_action).squeeze(-1)  # (S, C, B)
    critic_loss = (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    minimize(critic_loss.sum(), agent.optimizers["critic", stage.name])

    with torch.no_grad():  # targets
        targets = agent.target_critic.parameters()
        for target, online in zip(targets, agent.critic.parameters()):
            target.lerp_(online, args.target_update_rate)

    return {
        "loss/value": value_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "loss/critic": critic_loss.detach(),
        "value/v": value,
        "value/q": q.detach(),
        "value/advantage_weight": advantage_weight,
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
        args.check_stages(config["args"])
    seeds = range(args.seed, args.seed + args.num_seeds)
    data = load_data(args)
    if not all((np.abs(column) < 1e18).all() for column in data[:7]):  # all arrays; squares must not overflow
        sys.exit("error: the data has NaN, infinite or huge values; clean it first")
    if np.abs(data.action).max() > 1 + 1e-6:
        sys.exit("error: there are actions outside their bounds; clip or rescale them")
    if args.eval_episodes and not data.spec:
        sys.exit("error: the data names no environment; give --env-id, or --eval-episodes 0")

    # the method's own lines, which a copied `update` needs too
    reward, action = reward_and_action(data, args)

    # one row a transition, so that a batch is one gather; only these lines and `learn` know the columns
    columns = [
        data.obs,
        action,
        reward[:, None],
        data.next_obs,
        1.0 - data.terminated[:, None],  # not terminated
    ]
    widths = [column.shape[1] for column in columns]
    transitions = np.concatenate(columns, axis=1, dtype=np.float32)
    transitions = torch.from_numpy(transitions).to(args.device)

    # agents, as they start or as they were
    obs_dim, action_dim, *_ = widths
    agent = Agent(obs_dim, action_dim, args)
    policy = agent.actor  # what is evaluated
    run_dir = run_folder(args)
    rows = np.empty((0, len(ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        args.stage2_updates = max(args.stage2_updates, first - args.num_updates)
    stages = stages_of(args)
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
    probabilities = stage_probabilities(data, stages[-1], args)
    drawn = np.random.default_rng(0).choice(transition_returns, 100_000, p=probabilities)  # for the histogram
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    writer.add_histogram("data/return_of_transitions", transition_returns, 0)
    writer.add_histogram("data/return_of_draws", drawn, 0)
    print(f"{len(transition_returns):,} transitions of {len(data.returns):,} episodes")
    print(f"mean return {transition_returns.mean():.1f} by uniform draws, {drawn.mean():.1f} by this run's")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    def learn(stage, batches):  # one update for each batch of batches (CHUNK, S, B)
        batches = nn.functional.embedding(batches, transitions)  # a gather, faster than indexing
        obs, action, reward, next_obs, not_terminated = batches.split(widths, dim=-1)
        for batch in zip(obs, action, reward.squeeze(-1), next_obs, not_terminated.squeeze(-1)):
            metrics = update(agent, *batch, stage, args)
        return metrics  # of the last update

    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    started = time.time()
    for stage in stages:
        sampler = Sampler(stage_probabilities(data, stage, args), args.device)
        learn_chunk = CudaGraph(partial(learn, stage))  # a graph of its own, because other parameters move
        for step in tqdm(stage.steps(first), stage.name, mininterval=1, unit_scale=CHUNK):
            batches = sampler.draw(seeds, step, args.batch_size)
            torch.manual_seed(10**9 * (args.seed + 1) + step)  # of dropout, one generator for all seeds
            agent.optimizers["actor", stage.name].param_groups[0]["lr"].fill_(stage.actor_rate(step))
            metrics = learn_chunk(batches)
            num_updates = step + CHUNK

            # report the evaluation before this one, which had time beside training; save; start it
            evaluation_due = num_updates % args.eval_every == 0 or num_updates == stage.end
            if evaluation_due or num_updates % args.log_every == 0:
                log(metrics, num_updates, writer)
            if evaluation_due:
                rows = report(rows, jobs, run_dir, writer)
                save(run_dir / "checkpoint.pt", agent, rows, num_updates)
                jobs = start_evaluation(num_updates)

    speed = (stage.end - first) / (time.time() - started)
    rows = report(rows, jobs, run_dir, writer)
    writer.close()
    print(stages[0].summary(rows, args))
    result = stage.summary(rows, args)
    print(f"{result}; {stage.end:,} updates, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
