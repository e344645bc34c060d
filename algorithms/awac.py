"""AWAC: advantage weighted actor-critic, offline and then, if asked, online (AWAC-ft).

Papers: A. Nair et al., "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets", 2020,
arXiv:2006.09359; E. Cetin et al., "Simple Ingredients for Offline Reinforcement Learning", 2024,
arXiv:2403.13097 (the form that is here, and the equation numbers); J. Bjorck et al., "Towards Deeper Deep
Reinforcement Learning with Spectral Normalization", 2021, arXiv:2106.01151 (the modern networks).

Idea. The best policy that stays close to the one that logged the data is that one tilted by exp(A / beta).
AWAC fits a Gaussian to it: it clones logged actions with these weights, normalised over the batch, and
never climbs Q. Nothing ties this to a fixed dataset, so the same update goes on online, where the agent's
own steps join the logged ones. Cetin et al. find that scale matters more than the algorithm, hence
--architecture, --num-critics and --eval-samples.

Objectives. Shapes: S seeds, C critics, B batch, O observation, A action, N transitions, E episodes, M
samples; a~ is drawn from pi(.|s), a' from pi(.|s') with its noise clipped at 0.3.
    ensemble  Q_bar = mean of Q_i - pessimism / (C^2 - C) sum over i, j of |Q_i - Q_j|      section 4
    critic    L_Q  = 1/2 sum over C of mean (r + gamma (1 - terminated) Q_bar_target(s', a')
                     - Q(s, a))^2                                                                 (1)
    advantage A(s, a) = mean of Q_i(s, a) - Q_bar(s, a~)                                          (3)
    weights   w_i = exp(min(A_i, A_max) / beta) / sum over the batch of exp(min(A_k, A_max) / beta)  (8)
    actor     L_pi = -sum over the batch of w_i log pi(a_i|s_i)                                   (5)
    targets   Q_target <- (1 - target_update_rate) Q_target + target_update_rate Q
    acting    the best by Q_bar of M actions drawn from pi(.|s); M = 1: the mean of pi   Algorithm 1

What differs from the papers and their code, and why.
    - From Cetin et al.'s code, as their paper is silent: critics before the actor, 1/2 in (1), Q_bar in
      targets and Algorithm 1, the policy's constant deviation, and (3), which has Q_1 twice. Nair et al.
      learn the deviation.
    - (5) as printed; the code takes means over batch and action dimensions, which Adam does not notice.
    - Power iteration goes one step per gradient step, in the code one per forward pass.
    - Cetin et al. report the best cell of a grid (Table 8); a preset's beta is a middle value, in units of
      return: on hopper/replay-v0 0.5 clones next to nothing, and 20 is close to cloning. Online, beta
      is 2, as Nair et al. have it, with Cetin et al.'s small networks in place of 4x256.
    - Online, each step in the environment, with an action drawn from pi, pays for one update on a batch
      that is uniform over the data and the agent's own steps. Steps go on in the count of updates.
    - A run that is resumed online goes on from its last checkpoint with a new episode.

Run:      python algorithms/awac.py --beta 5 --target-update-rate 0.02 --batch-size 256
          --hidden-sizes 256 256 --num-updates 20000 --eval-every 1000 --eval-samples 1
Expected: score 46 +- 7 (five seeds); cloning, by asac.py's command, 19 +- 5
Online:   --preset online --batch-size 1024
Paper:    --preset locomotion
Nine tenths of the data random:  --preset locomotion-0.1
MOOD:     --preset mood --dataset mood/walker-run-v0 --env-id mood:walker-run-v0
AntMaze:  --preset antmaze --reward-transform shift --eval-every 100000 --eval-episodes 100
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
EXPLORATION = 3
NAME = re.compile(r"(.*?)(?::(0\.\d*[1-9]\d*|1\.0))?")  # of a dataset: `ID:0.1` is ID and the share 0.1
POLICY_STD = 0.2  # of every action, in every state
NOISE_CLIP = 1.5  # standard deviations, 0.3: bound of the policy's noise where critics bootstrap


# The paper's testbeds (Tables 7 and 8, Figure 7), beta in the middle of its grid; small: as in its Table 1;
# online: as Nair et al., in Lee et al.'s comparison (2020)
AWAC_TESTBEDS = {
    "preset": (
        "architecture",
        "num_critics",
        "pessimism",
        "beta",
        "max_advantage",
        "num_updates",
        "online_steps",
    ),
    "small": ("simple-small", 2, 0.5, 0.5, math.inf, 1_000_000, 0),
    "mood": ("simple-large", 5, 0.5, 0.5, math.inf, 1_500_000, 0),
    "antmaze": ("modern", 5, 0.0, 0.1, 1.0, 2_000_000, 0),
    "locomotion": ("modern", 5, 0.5, 0.5, math.inf, 2_000_000, 0),
    "locomotion-0.1": ("modern", 10, 0.5, 1.5, math.inf, 2_000_000, 0),
    "online": ("simple-small", 2, 0.5, 2.0, math.inf, 50_000, 250_000),
}


@dataclass
class Args:
    dataset: tuple[str, ...] = ("hopper/replay-v0",)  # Minari ids, folders, D4RL files; `ID:0.1`: a tenth of it
    env_id: str | None = None  # evaluation environment, also `module:Env-v0`; default: of the first dataset
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation
    preset: Literal["small", "mood", "antmaze", "locomotion", "locomotion-0.1", "online"] = "small"  # of the next 7
    architecture: Literal["simple-small", "simple-large", "modern"] | None = None  # networks of Table 7
    num_critics: int | None = None  # critics in the ensemble
    pessimism: float | None = None  # lambda: how far Q_bar is below the mean; 0.5 of 2 critics: their minimum
    beta: float | None = None  # temperature of the advantages, in units of return
    max_advantage: float | None = None  # A_max: bound of the advantages before they are divided by beta
    num_updates: int | None = None  # gradient steps offline
    online_steps: int | None = None  # environment steps of each seed after these, with one update each
    batch_size: int = 512  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = ()  # widths of the hidden layers of every network; default: Table 7
    learning_rate: float = 3e-4  # Adam's step size; the paper tries 1e-4 too
    gamma: float = 0.99  # discount factor
    target_update_rate: float = 0.005  # how far targets move to the critics at every update
    reward_transform: Literal["shift", "none"] = "none"  # shift: r - 1
    eval_every: int = 5_000  # updates between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed; 0: never evaluate
    eval_samples: int = 50  # M: act as the best by Q_bar of so many draws, Algorithm 1; 1: as the mean
    log_every: int = 1_000  # updates between entries in TensorBoard
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/DATASET/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint, online in a new episode
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing
    capture_video: bool = False  # film the evaluations (on a machine without screen: MUJOCO_GL=egl)

    def __post_init__(self):
        for name, value in zip(AWAC_TESTBEDS["preset"], AWAC_TESTBEDS[self.preset]):
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.hidden_sizes = tuple(self.hidden_sizes)  # JSON makes a list of it
        self.dataset = tuple(  # files by their full path, so that a run goes on from anywhere
            os.path.abspath(name) if os.path.exists(NAME.fullmatch(name)[1]) else name
            for name in self.dataset
        )
        rates = self.gamma, self.target_update_rate
        if not all(0 <= rate <= 1 for rate in rates):
            sys.exit("error: gamma and target_update_rate are rates; give numbers in [0, 1]")
        if self.num_critics < 2:
            sys.exit("error: Q_bar compares critics with each other; give --num-critics 2 or more")
        if self.online_steps and not self.eval_episodes:
            sys.exit("error: the online stage is in the environment of the evaluations; give --eval-episodes 1")
        periods = self.num_updates, self.eval_every, self.log_every
        if any(period <= 0 or period % CHUNK for period in periods) or self.online_steps % CHUNK:
            sys.exit(f"error: updates, steps, eval_every and log_every count in {CHUNK}s; give multiples of it")


# The idea: clone logged actions, the better the more ----------------------------------------------
def advantage_weights(advantage, max_advantage, beta):
    """How much each logged action of a batch counts, (8): a softmax over the batch of advantages (S, B)."""
    return (advantage.clamp(max=max_advantage) / beta).softmax(-1)


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def orthogonal_with_gain(gain, weight, bias, generator):
    """Initial values of any layer: weight (in, out), bias (1, out)."""
    nn.init.orthogonal_(weight, gain, generator)
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


class ModernMLP(MLP):
    """Residual blocks x + W2 relu(W1 LayerNorm(x)) between a first and a last layer, W1 and W2 divided by
    their largest singular values (Bjorck et al.; Figure 6). An odd number of equal hidden sizes."""

    def __init__(self, sizes, init, generators, C=1):
        super().__init__(sizes, init, generators, C)
        assert len(sizes) % 2, "hidden sizes: one for the first layer and two for each block"
        _, width, *inner, _ = sizes
        shape = len(generators) * C, len(inner), 1, width
        self.register_buffer("stretched", torch.full(shape, width**-0.5))  # unit vectors, see inner_layer
        self.scale = nn.Parameter(torch.ones(shape)[:, ::2].clone())  # of LayerNorm, one for each block
        self.shift = nn.Parameter(torch.zeros_like(self.scale))

    def inner_layer(self, i, x):
        """x times weight i over its largest singular value, plus bias i. Power iteration, which turns
        `stretched` to where the weight stretches most, goes one step where gradients are taken."""
        weight = self.weights[i]
        v = self.stretched[:, i - 1]
        if torch.is_grad_enabled():
            constant = weight.detach()
            v.copy_(nn.functional.normalize(v @ constant.mT @ constant, dim=-1))
        sigma = (v.clone() @ weight.mT).norm(dim=-1, keepdim=True)  # has a gradient too
        return torch.baddbmm(self.biases[i], x / sigma, weight)

    def forward(self, x):
        """As MLP's."""
        x = x.repeat_interleave(self.C, 0)  # all critics of a seed see the same input
        x = torch.baddbmm(self.biases[0], x, self.weights[0]).relu_()
        for i in range(1, len(self.weights) - 1, 2):
            h = nn.functional.layer_norm(x, x.shape[-1:])
            h = h * self.scale[:, i // 2] + self.shift[:, i // 2]
            h = self.inner_layer(i, h).relu_()
            x = x + self.inner_layer(i + 1, h)
        x = torch.baddbmm(self.biases[-1], x, self.weights[-1])
        return x.unflatten(0, (-1, self.C)).squeeze(1)


# Table 7: what is between the layers, hidden sizes of the actor, of a critic
ARCHITECTURES = {
    "simple-small": (MLP, [256] * 2, [256] * 2),
    "simple-large": (MLP, [1024] * 5, [256] * 3),
    "modern": (ModernMLP, [1024] * 5, [256] * 3),
}


class ConstantStdActor(nn.Module):
    """pi(a|s) = Normal(tanh(net(s)), POLICY_STD); what is drawn is clipped to [-1, 1]."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, obs):
        return self.net(obs).tanh()  # (S, B, A), the mean

    def sample(self, mean, noise):
        """Actions from standard normal noise."""
        return (mean + POLICY_STD * noise).clamp(-1, 1)


class BestOfSamples(nn.Module):
    """Acts as the best by Q_bar of M draws from the policy, Algorithm 1; where M is 1, as its mean. An
    episode's noise is a function of its first observation, and so of seed, update and episode."""

    def __init__(self, agent, args):
        super().__init__()
        self.actor = agent.actor
        self.critic = agent.critic
        self.args = args
        self.generators = None

    def forward(self, obs):  # (S, 1, O)
        mean = self.actor(obs)
        if self.args.eval_samples == 1:
            return mean
        if self.generators is None:  # the episode begins
            bits = obs.squeeze(1).numpy().view(np.uint32)
            self.generators = [np.random.default_rng(entropy) for entropy in bits]
        shape = self.args.eval_samples, mean.shape[-1]
        noise = [generator.standard_normal(shape, np.float32) for generator in self.generators]
        noise = torch.from_numpy(np.stack(noise))
        action = self.actor.sample(mean, noise)  # (S, M, A)
        obs = obs.expand(-1, self.args.eval_samples, -1)
        q = q_bar(self.critic, obs, action, self.args.pessimism)  # (S, M)
        best = q.argmax(1)
        return action.take_along_dim(best[:, None, None], 1)


class Agent(nn.Module):
    """Networks and optimizers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        network, actor_hidden, critic_hidden = ARCHITECTURES[args.architecture]
        actor_sizes = [obs_dim, *(args.hidden_sizes or actor_hidden), action_dim]
        critic_sizes = [obs_dim + action_dim, *(args.hidden_sizes or critic_hidden), 1]
        actor_net = network(actor_sizes, partial(orthogonal_with_gain, 1), generators)
        self.actor = ConstantStdActor(actor_net)
        init = partial(orthogonal_with_gain, math.sqrt(2))
        self.critic = network(critic_sizes, init, generators, C=args.num_critics)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(args.device)
        self.optimizers = {}
        for name in ("critic", "actor"):
            parameters = getattr(self, name).parameters()
            rate = torch.tensor(args.learning_rate, device=args.device)  # a number would be recorded
            self.optimizers[name] = torch.optim.Adam(parameters, rate, fused=True, capturable=rate.is_cuda)

    @torch.no_grad()
    def explore(self, obs, noise):
        """What the online stage does at obs (S, O): actions (S, A) drawn with noise (S, 1, A)."""
        mean = self.actor(obs[:, None])
        return self.actor.sample(mean, noise).squeeze(1)


# Random numbers and replay ------------------------------------------------------------------------
def draw_uniforms_and_noise(seeds, batch_size, noise_shape, device, step):
    """What CHUNK updates from `step` on take at random, (CHUNK, S, ...): float64 numbers in [0, 1), for their
    batches, and standard normal noise; each seed draws its own."""
    uniforms = []
    noise = []
    for seed in seeds:
        entropy = np.random.SeedSequence((seed, DRAWS, step)).generate_state(1).item()
        generator = torch.Generator(device).manual_seed(entropy)
        options = {"generator": generator, "device": device}
        uniforms.append(torch.rand(CHUNK, batch_size, dtype=torch.float64, **options))
        noise.append(torch.randn(CHUNK, *noise_shape, **options))
    return torch.stack(uniforms, 1), torch.stack(noise, 1)


class Replay(nn.Module):
    """Rows to draw batches from, on one device: first `data` (N, width), which all seeds share and which may be
    empty, then the newest `size` steps of each seed. Checkpoints have the steps, the oldest first."""

    def __init__(self, data, num_seeds, size):
        super().__init__()
        self.num_data = len(data)
        self.size = size
        self.num_added = 0
        steps = data.new_zeros(num_seeds * size, data.shape[1])
        self.rows = torch.cat([data, steps])
        self.steps = self.rows[len(data) :].unflatten(0, (num_seeds, size))  # the same memory
        self.offset = size * torch.arange(num_seeds, device=data.device)[:, None]

    def add(self, columns):
        """One step of every seed, in columns (S, width of the column)."""
        row = np.concatenate(columns, axis=1, dtype=np.float32)
        self.steps[:, self.num_added % self.size] = torch.from_numpy(row)
        self.num_added += 1

    def index(self, uniform):
        """Where in `rows` a batch is, (S, B): each seed draws uniformly from the data and its own steps."""
        num_rows = self.num_data + min(self.num_added, self.size)
        index = (uniform * num_rows).long()
        return index + self.offset * (index >= self.num_data)

    def get_extra_state(self):
        kept = torch.arange(max(0, self.num_added - self.size), self.num_added)
        return self.steps[:, kept % self.size].cpu()

    def set_extra_state(self, steps):
        steps = steps[:, -self.size :]
        self.num_added = steps.shape[1]
        self.steps[:, : self.num_added] = steps


# The update ---------------------------------------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def q_bar(critic, obs, action, pessimism=0.0):
    """Q_bar(s, a), (S, B): the critics' mean, less `pessimism` times their mean distance from each other."""
    q = critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    C = q.shape[1]
    difference = q[:, :, None] - q[:, None]  # (S, C, C, B), of which C are 0
    penalty = difference.abs().sum((1, 2)) / (C * C - C)
    return q.mean(1) - pessimism * penalty


def update(agent, obs, action, reward, next_obs, not_terminated, noise, args):
    """One gradient step of every agent on obs (S, B, O), action (S, B, A), reward (S, B), next_obs (S, B, O),
    not_terminated (S, B), never (S, B, 1), which would broadcast, and standard normal noise (S, 2 B, A).
    Returns what to log the mean of, still on the device: nothing here waits for a GPU."""
    next_noise, noise = noise.chunk(2, dim=1)

    # critics, (1): Q_bar(s', a') bootstraps through a time limit, but not through a true end
    with torch.no_grad():
        next_noise = next_noise.clamp(-NOISE_CLIP, NOISE_CLIP)
        next_action = agent.actor.sample(agent.actor(next_obs), next_noise)
        next_q = q_bar(agent.target_critic, next_obs, next_action, args.pessimism)  # (S, B)
        backup = reward + args.gamma * not_terminated * next_q
    q = agent.critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = 0.5 * (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    minimize(critic_loss.sum(), agent.optimizers["critic"])  # sum over S: seeds never mix

    # advantages, (3), by the new critics: Q_bar only for the policy's action
    mean = agent.actor(obs)
    with torch.no_grad():
        policy_action = agent.actor.sample(mean, noise)
        policy_q = q_bar(agent.critic, obs, policy_action, args.pessimism)  # (S, B)
        logged_q = q_bar(agent.critic, obs, action)
        advantage = logged_q - policy_q
        weight = advantage_weights(advantage, args.max_advantage, args.beta)

    # actor, (5): clone the logged actions, the better the more
    z = (action - mean) / POLICY_STD
    log_prob = -0.5 * z.square() - math.log(POLICY_STD * math.sqrt(2 * math.pi))
    actor_loss = -(weight * log_prob.sum(-1)).sum(-1)  # (S,)
    minimize(actor_loss.sum(), agent.optimizers["actor"])

    with torch.no_grad():  # targets
        targets = agent.target_critic.parameters()
        for target, online in zip(targets, agent.critic.parameters()):
            target.lerp_(online, args.target_update_rate)
        for target, online in zip(agent.target_critic.buffers(), agent.critic.buffers()):
            target.copy_(online)  # what power iteration has found

    return {
        "loss/critic": critic_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "value/q": q.detach(),
        "value/advantage": advantage,
        "value/effective_batch": 1 / weight.square().sum(-1),
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


# Plumbing of the scripts with an online stage: environments ---------------------------------------
class Environments:
    """One environment a seed, stepped side by side, with actions in [-1, 1]. Not a vector environment of Gymnasium's:
    that one begins an episode with a step that ignores its action, and such a step is no transition."""

    def __init__(self, spec, seeds):
        self.envs = [gym.wrappers.RescaleAction(gym.make(spec), -1, 1) for _ in seeds]
        self.seeds = seeds
        self.ended = np.ones(len(seeds), bool)
        self.returns = np.zeros(len(seeds))  # of the episodes so far
        self.obs = np.zeros((len(seeds), *self.envs[0].observation_space.shape), np.float32)

    def observe(self, step):
        """What the actions of this step are to follow, (S, O). Seed and step say how episodes begin."""
        self.began = self.ended
        for s in np.flatnonzero(self.began):
            entropy = self.seeds[s], EXPLORATION, step, 1
            env_seed = np.random.SeedSequence(entropy).generate_state(1).item()
            self.obs[s], _ = self.envs[s].reset(seed=env_seed)
            self.returns[s] = 0
        return self.obs

    def step(self, action):
        """action (S, A) -> reward (S,), next_obs (S, O), also of an episode's last step, and terminated (S,)."""
        action = action.reshape(-1, *self.envs[0].action_space.shape)
        steps = [env.step(x) for env, x in zip(self.envs, action)]
        obs, reward, terminated, truncated, _ = map(np.array, zip(*steps))
        self.obs = np.float32(obs)
        reward = reward.reshape(len(steps))  # some give an array of one number
        self.returns += reward
        self.ended = terminated | truncated
        return reward, self.obs, terminated


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

    # the method's own line, which a copied `update` needs too
    shift = {"shift": 1, "none": 0}[args.reward_transform]

    # one row a transition, so that a batch is one gather; this, `learn` and the online loop know the columns
    columns = data.obs, data.action, data.reward[:, None] - shift, data.next_obs, 1.0 - data.terminated[:, None]
    widths = [column.shape[1] for column in columns]
    transitions = np.concatenate(columns, axis=1, dtype=np.float32)
    transitions = torch.from_numpy(transitions).to(args.device)

    # agents, as they start or as they were
    obs_dim, action_dim, *_ = widths
    agent = Agent(obs_dim, action_dim, args)
    agent.replay = Replay(transitions, args.num_seeds, args.online_steps)
    policy = BestOfSamples(agent, args)  # what is evaluated
    run_dir = run_folder(args)
    rows = np.empty((0, len(ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        if agent.replay.num_added or first > args.num_updates:  # the offline stage is over
            args.num_updates = first - agent.replay.num_added
    last = args.num_updates + args.online_steps
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
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    writer.add_histogram("data/return_of_transitions", transition_returns, 0)
    writer.add_histogram("data/return_of_draws", transition_returns, 0)  # uniform
    print(f"{len(transition_returns):,} transitions of {len(data.returns):,} episodes")
    print(f"mean return {transition_returns.mean():.1f} by uniform draws")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    def learn(index, noise):  # one update for each batch of index (CHUNK, S, B)
        batches = nn.functional.embedding(index, agent.replay.rows)  # a gather, faster than indexing
        obs, action, reward, next_obs, not_terminated = batches.split(widths, dim=-1)
        for batch in zip(obs, action, reward.squeeze(-1), next_obs, not_terminated.squeeze(-1), noise):
            metrics = update(agent, *batch, args)
        return metrics  # of the last update

    def after_chunk(num_updates, metrics):  # reports the evaluation before this one, saves, starts this one
        nonlocal rows, jobs
        evaluation_due = num_updates % args.eval_every == 0 or num_updates in (args.num_updates, last)
        if evaluation_due or num_updates % args.log_every == 0:
            log(metrics, num_updates, writer)
        if evaluation_due:
            rows = report(rows, jobs, run_dir, writer)
            save(run_dir / "checkpoint.pt", agent, rows, num_updates)
            jobs = start_evaluation(num_updates)

    noise_shape = 1 + 2 * args.batch_size, action_dim  # for online actions, then for `update`
    draw = partial(draw_uniforms_and_noise, seeds, args.batch_size, noise_shape, args.device)
    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    started = time.time()
    learn_offline = CudaGraph(learn)
    for step in tqdm(range(first, args.num_updates, CHUNK), mininterval=1, unit_scale=CHUNK):
        uniforms, noise = draw(step)
        metrics = learn_offline(agent.replay.index(uniforms), noise[:, :, 1:])
        after_chunk(step + CHUNK, metrics)

    if args.online_steps:
        envs = Environments(data.spec, seeds)
        act = CudaGraph(agent.explore)
        learn_online = CudaGraph(learn)
        print(f"online in {data.spec.id} from step {agent.replay.num_added:,} on, with a new episode")
        for step in tqdm(range(max(first, args.num_updates), last, CHUNK), mininterval=1, unit_scale=CHUNK):
            uniforms, noise = draw(step)
            for i in range(CHUNK):
                obs = envs.observe(step + i)
                action = act(torch.from_numpy(obs).to(args.device), noise[i, :, :1]).cpu().numpy()
                reward, next_obs, terminated = envs.step(action)
                columns = obs, action, reward[:, None] - shift, next_obs, 1.0 - terminated[:, None]
                agent.replay.add(columns)
                for s in np.flatnonzero(envs.ended):
                    writer.add_scalar(f"exploration/return_of_seed_{seeds[s]}", envs.returns[s], step + i + 1)
                metrics = learn_online(agent.replay.index(uniforms[i : i + 1]), noise[i : i + 1, :, 1:])
            after_chunk(step + CHUNK, metrics)

    speed = (last - first) / (time.time() - started)
    rows = report(rows, jobs, run_dir, writer)
    writer.close()
    result = summary(rows, args.num_seeds)
    print(f"{result}; {last:,} updates, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
