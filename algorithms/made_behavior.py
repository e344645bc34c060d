"""MADE: an autoregressive density model of the policy that logged the data, and what AWAC makes of it.

Papers: M. Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", 2015, arXiv:1502.03509
(sections 3 and 4); E. Cetin et al., "Simple Ingredients for Offline Reinforcement Learning", 2024,
arXiv:2403.13097 (the model of appendix E.1 and Table 27, Figures 3 and 8, and the equation numbers).

Idea. A log of several policies is not Gaussian: in one state they do different things. Here the density of
logged actions is a product over the action's dimensions; each has a mixture of Gaussians of its own, given the
observation and the dimensions before it. Masked weights give all of them in one pass. So one sees what an
algorithm is held close to: AWAC's target is this density tilted by exp(A / beta), and AWAC fits a Gaussian
to it. Where the target has two modes, the Gaussian's mean is between them, where nobody acts.

Objectives. Shapes: S seeds, B batch, O observation, H latent of s, A action, K components, N transitions,
E episodes, C critics; x = atanh(a), and a_<d are the dimensions of a before a_d.
    density     log pi_b(a|s) = sum over d of log p(a_d | s, a_<d)
    mixture     log p(a_d|.) = log sum over k of softmax(logits)_k N(x_d; mean_k, std_k) - log(1 - a_d^2)
    masks       a weight from a unit of degree m to one of degree n is used where m <= n; degrees are d of
                the input a_d, 0 of the latent, 0 to A - 1 of hidden units, d - 1 of outputs for p(a_d|.)
    loss        L = -mean log pi_b(a|s), kept where it is lowest on held-out episodes
    bits        mean log2 pi_b(a|s) / A on held-out episodes; -1 if actions are even in [-1, 1]
    target      pi*(a|s) = pi_b(a|s) exp(min(A(s, a), A_max) / beta) / Z          Figure 3, (3), (8)
    advantage   A(s, a) = mean of Q_i(s, a) - mean of Q_bar(s, a~), a~ from AWAC's policy        (3)
    projection  the Gaussian of AWAC's std nearest to pi* in KL(pi*||.): it has the mean of pi*  (5)

What differs from the papers and their code, and why.
    - The code of this model is not released: bounds of log std (-7 and 2), the clip of actions at 1 - 1e-4,
      where the latent goes, and one split for all seeds are ours. MADE's units have degrees at random.
    - Actions on their bounds have a density as high as the least std allows: much of that makes bits large.
    - All updates are made, and the best model is kept; looks at held-out episodes need not be once an epoch.
    - Figure 3 is from samples of pi_b, weighted, a histogram for each dimension with the others summed out.
      The mean of Q_bar is over as many draws, in awac.py over one; without A_max it cancels in Z anyway.
    - AWAC's modern networks are refused, because they would have to be repeated here.

Run:      python algorithms/made_behavior.py --num-updates 2000 --eval-every 200
Expected: 0.076 bits per dimension after two minutes, 0.059 with --num-components 1 (one seed each)
Figure 3: python algorithms/made_behavior.py --evaluate RUN --awac RUN-OF-AWAC --state 500
Paper, for a million transitions (100 epochs):  --num-updates 332000 --eval-every 3320
Fixed stds, as in appendix E:  --std 0.2
"""

import json
import math
import multiprocessing
import os
import re
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHUNK_UPDATES = 20  # whose batches are drawn together
# Random numbers are a function of (seed, purpose, update, ...), so that no generator's state has to be saved.
# Purposes start at 1, because numpy takes (s, u, 0) for (s, u)
DRAWS = 1
EVALUATION = 2
NAME = re.compile(r"(.*?)(?::(0\.\d*[1-9]\d*|1\.0))?")  # of a dataset: `ID:0.1` is ID and the share 0.1
POLICY_STD = 0.2  # of every action, in every state
NUM_CELLS = 50  # of Figure 3
ACTION_BOUND = 1 - 1e-4  # of |a|, because atanh(1) is infinite
UNITS = 64  # in each of the decoder's two hidden layers, for every action dimension
NUM_SAMPLES = 100_000  # of Figure 3: actions drawn from the model
HELD_OUT = 0.15  # share of the episodes that say when training was best


@dataclass
class Args:
    dataset: tuple[str, ...] = ("hopper/replay-v0",)  # Minari ids or folders, D4RL files; `ID:0.1`: a tenth of them
    seed: int = 0  # first seed; model s uses seed + s
    num_seeds: int = 1  # models trained side by side in one batched computation
    num_updates: int = 100_000  # gradient steps
    batch_size: int = 256  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = (512, 512)  # widths of the encoder's layers, the last one of its latent
    num_components: int = 10  # K: Gaussians in the mixture of an action dimension
    std: float | None = None  # of every component, before tanh; default: learned
    learning_rate: float = 1e-3  # Adam's step size
    eval_every: int = 1_000  # updates between looks at what is held out, each with a checkpoint
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/DATASET/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint
    evaluate: str | None = None  # bits per dimension of the best models in this folder; train nothing
    awac: str | None = None  # draw Figure 3 from the first seeds of this run and of that of awac.py in this folder
    state: int = 0  # of Figure 3: transition whose observation it is

    def __post_init__(self):
        self.hidden_sizes = tuple(self.hidden_sizes)  # JSON makes a list of it
        self.dataset = tuple(  # files by their full path, so that a run goes on from anywhere
            os.path.abspath(name) if os.path.exists(NAME.fullmatch(name)[1]) else name
            for name in self.dataset
        )
        periods = self.num_updates, self.eval_every
        if any(period <= 0 or period % CHUNK_UPDATES for period in periods):
            sys.exit(f"error: num_updates and eval_every are multiples of {CHUNK_UPDATES}; give such numbers")


# The idea: one pass gives the density of every dimension, given those before it -------------------
def degree_masks(action_dim, latent_dim, num_outputs):
    """Which weights of the decoder's three layers are used, (in, out) each: those that never lower the degree.
    The latent of s comes first in every input, has degree 0, and so is seen by all."""
    degree = torch.arange(action_dim)
    hidden = degree.repeat_interleave(UNITS)
    outputs = degree.repeat_interleave(num_outputs)
    latent = torch.zeros(latent_dim)
    masks = []
    inputs = degree + 1
    for low, high in zip([inputs, hidden, hidden], [hidden, hidden, outputs]):
        low = torch.cat([latent, low])
        masks.append(1.0 * (low[:, None] <= high))
    return masks


def mixture_log_prob(action, logits, mean, std):
    """log p(a_d | s, a_<d), (..., A), of actions (..., A) under K Gaussians (..., A, K) that tanh squashes."""
    x = action.atanh()[..., None]
    gaussians = torch.distributions.Normal(mean, std, validate_args=False)  # checks would wait for a GPU
    log_prob = logits.log_softmax(-1) + gaussians.log_prob(x)
    return log_prob.logsumexp(-1) - torch.log1p(-action.square())  # da = (1 - a^2) dx


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def fan_in_uniform(weight, bias, generator):
    """Initial values of a layer, weight (in, out) and bias (1, out), as torch.nn.Linear draws them."""
    bound = weight.shape[0] ** -0.5
    weight.uniform_(-bound, bound, generator=generator)
    bias.uniform_(-bound, bound, generator=generator)


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


class MaskedLayer(MLP):
    """One layer, whose weights are used where the mask (in, out) is 1."""

    def __init__(self, mask, generators):
        super().__init__(mask.shape, fan_in_uniform, generators)
        self.register_buffer("mask", mask)

    def forward(self, x):
        return torch.baddbmm(self.biases[0], x, self.weights[0] * self.mask)


class MADE(nn.Module):
    """pi_b(a|s): an encoder of s, then a decoder with masked weights. Actions share obs where it has one row."""

    def __init__(self, obs_dim, action_dim, args, generators):
        super().__init__()
        self.std = args.std
        self.shape = action_dim, 3, args.num_components
        self.encoder = MLP([obs_dim, *args.hidden_sizes], fan_in_uniform, generators)
        masks = degree_masks(action_dim, args.hidden_sizes[-1], 3 * args.num_components)
        self.decoder = nn.ModuleList(MaskedLayer(mask, generators) for mask in masks)

    def forward(self, obs, action):
        """Logits, means and stds (S, B, A, K) of each dimension, given those of action (S, B, A) before it."""
        latent = self.encoder(obs).relu()
        latent = latent.expand(-1, action.shape[1], -1)  # (S, B, H)
        first, second, last = self.decoder
        x = first(torch.cat([latent, action], -1)).relu()
        x = second(torch.cat([latent, x], -1)).relu()
        x = last(torch.cat([latent, x], -1))
        logits, mean, log_std = x.unflatten(-1, self.shape).unbind(-2)
        std = log_std.clamp(-7, 2).exp()
        if self.std:
            std = torch.full_like(std, self.std)
        return logits, mean, std

    def log_prob(self, obs, action):
        log_prob = mixture_log_prob(action, *self(obs, action))  # (S, B, A)
        return log_prob.sum(-1)

    @torch.no_grad()
    def sample(self, obs, uniform, noise):
        """Actions (S, B, A), one dimension after the other, from numbers in [0, 1) and standard normal ones."""
        action = torch.zeros_like(noise)
        for d in range(noise.shape[-1]):
            logits, mean, std = [x[:, :, d] for x in self(obs, action)]
            cdf = logits.softmax(-1).cumsum(-1)[..., :-1]  # (S, B, K - 1)
            k = (cdf < uniform[..., d, None]).sum(-1, keepdim=True)
            x = mean + std * noise[..., d, None]
            a = x.gather(-1, k).squeeze(-1).tanh()
            action[..., d] = a.clamp(-ACTION_BOUND, ACTION_BOUND)
        return action


class Agent(nn.Module):
    """S independent models as they are, as they were when they were best, and their optimizer."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        self.model = MADE(obs_dim, action_dim, args, generators)
        self.best = deepcopy(self.model)
        self.register_buffer("best_bits", torch.full([args.num_seeds], -math.inf))
        self.to(args.device)
        adam = torch.optim.Adam(self.model.parameters(), args.learning_rate, fused=True)
        self.optimizers = {"model": adam}

    @torch.no_grad()
    def keep_best(self, bits):
        """Early stopping: a seed whose bits (S,) are its best so far is copied."""
        better = bits > self.best_bits
        self.best_bits[better] = bits[better]
        for kept, x in zip(self.best.parameters(), self.model.parameters()):
            kept[better] = x[better]


def draw_transitions(seeds, step, batch_size, candidates):
    """Transitions (CHUNK_UPDATES, S, B) for the updates from `step` on; each seed draws its own, uniformly."""
    drawn = []
    for seed in seeds:
        generator = np.random.default_rng((seed, DRAWS, step))
        draw = generator.choice(candidates, (CHUNK_UPDATES, batch_size))
        drawn.append(draw)
    return torch.from_numpy(np.stack(drawn, 1))


# The update ---------------------------------------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def update(agent, obs, action):
    """One gradient step of every model on obs (S, B, O) and action (S, B, A), inside of (-1, 1). Returns what
    to log the mean of, still on the device: nothing here waits for a GPU."""
    log_prob = agent.model.log_prob(obs, action)
    loss = -log_prob.mean(-1)  # (S,)
    minimize(loss.sum(), agent.optimizers["model"])  # sum over S: seeds never mix
    return {"loss/nats": loss.detach()}


@torch.no_grad()
def bits_per_dimension(model, transitions, S):
    """Mean log2 pi_b(a|s) / A of every seed, (S,), on transitions (N, O + A)."""
    action_dim = model.shape[0]
    total = 0
    for part in transitions.expand(S, -1, -1).split(10_000, 1):
        obs = part[..., :-action_dim]
        action = part[..., -action_dim:]
        log_prob = model.log_prob(obs, action)
        total = total + log_prob.sum(-1)
    return total / (len(transitions) * action_dim * math.log(2))


def held_out_transitions(lengths):
    """True for transitions (N,) of some episodes of these lengths (E,), the same ones for every seed."""
    num_held_out = max(1, round(HELD_OUT * len(lengths)))
    if num_held_out == len(lengths):
        sys.exit("error: one episode cannot be split into what is learned and what is held out")
    held_out = np.arange(len(lengths)) < num_held_out
    held_out = np.random.default_rng(0).permutation(held_out)
    return np.repeat(held_out, lengths)


# Figure 3: what AWAC is held close to, what it aims at, and what it gets --------------------------
def q_bar(critic, obs, action, pessimism=0.0):
    """Q_bar(s, a), (S, B): the critics' mean, less `pessimism` times their mean distance from each other."""
    q = critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    C = q.shape[1]
    difference = q[:, :, None] - q[:, None]  # (S, C, C, B), of which C are 0
    penalty = difference.abs().sum((1, 2)) / (C * C - C)
    return q.mean(1) - pessimism * penalty


def advantage_weights(advantage, max_advantage, beta):
    """How much each logged action of a batch counts, (8): a softmax over the batch of advantages (S, B)."""
    return (advantage.clamp(max=max_advantage) / beta).softmax(-1)


def load_awac(run):
    """Flags of a run of awac.py, and the first seed's actor (before its tanh) and critics."""
    flags = json.loads(Path(run, "config.json").read_text())["args"]
    if flags["architecture"] == "modern":
        sys.exit(f"error: {run} has modern networks; give one with --architecture simple-small or -large")
    path = Path(run, "checkpoint.pt")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    nets = []
    for prefix in ("actor.net.", "critic."):
        tensors = {}
        for name, x in checkpoint["agent"].items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                tensors[name] = x.chunk(flags["num_seeds"])[0]
        weights = [x for name, x in tensors.items() if "weights" in name]
        widths = [weights[0].shape[1], *[x.shape[2] for x in weights]]
        net = MLP(widths, fan_in_uniform, [torch.Generator()], C=len(weights[0]))
        net.load_state_dict(tensors)
        nets.append(net)
    return flags, *nets


@torch.no_grad()
def sample_target(best, obs, args):
    """Actions (n, A) of the first seed's pi_b at one observation (1, 1, O), how much each of them counts
    under pi*, (n,), and the mean of AWAC's actor, (A,)."""
    flags, actor, critic = load_awac(args.awac)
    model = deepcopy(best).cpu()
    for parameter in model.parameters():
        parameter.data = parameter.data[:1]
    rng = np.random.default_rng((args.seed, EVALUATION, args.state + 1))
    shape = 2, 1, NUM_SAMPLES, model.shape[0]
    noise = rng.standard_normal(shape, np.float32)
    noise, policy_noise = torch.from_numpy(noise)
    uniform = torch.from_numpy(rng.random(noise.shape, np.float32))
    action = model.sample(obs, uniform, noise)

    # as awac.py: Q_bar only for the policy's actions, (3)
    mean = actor(obs).tanh()
    policy_action = (mean + POLICY_STD * policy_noise).clamp(-1, 1)
    obs = obs.expand(-1, NUM_SAMPLES, -1)
    policy_q = q_bar(critic, obs, policy_action, flags["pessimism"])
    advantage = q_bar(critic, obs, action) - policy_q.mean()
    weight = advantage_weights(advantage, flags["max_advantage"], flags["beta"])
    return action[0], weight[0], mean[0, 0]


def figure_3(action, weight, actor_mean, path):
    """Densities of every action dimension, the others summed out: to csv, and to svg where matplotlib is."""
    edges = np.linspace(-1, 1, NUM_CELLS + 1)
    center = torch.from_numpy(edges[1:] + edges[:-1]) / 2
    tables = []
    for d, x in enumerate(action.T):
        behavior, _ = np.histogram(x, edges, density=True)
        target, _ = np.histogram(x, edges, density=True, weights=weight)
        columns = [np.full(NUM_CELLS, d), center, behavior, target]
        for mean in (weight @ x, actor_mean[d]):
            gaussian = torch.distributions.Normal(mean, POLICY_STD)
            columns.append(gaussian.log_prob(center).exp())
        tables.append(np.stack(columns, axis=1))
    header = "dimension,action,behavior,target,projection,actor"
    np.savetxt(path, np.concatenate(tables), "%.6g", ",", header=header, comments="")
    print(f"{path}: the target rests on {1 / weight.square().sum():,.0f} of {len(weight):,} samples")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    picture = Figure((4 * len(tables), 3), layout="constrained")
    axes = picture.subplots(1, len(tables), squeeze=False)
    for axis, table in zip(axes[0], tables):
        for name, density in zip(header.split(",")[2:], table.T[2:]):
            axis.fill_between(center, density, label=name, alpha=0.3)
    axis.legend()
    picture.savefig(path.with_suffix(".svg"))


# Plumbing of the offline scripts: data ------------------------------------------------------------
# D4RL's returns of a random and of an expert policy (Fu et al., 2020)
REFERENCES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}
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


def bounds(space):
    """Lowest and highest values (2, ...) of a Box, and None of other spaces."""
    if isinstance(space, gym.spaces.Box):
        return np.float32([space.low, space.high])


def load_actions(args):
    """obs (N, O), action (N, A) in [-1, 1] of all of --dataset, and the lengths (E,) of its episodes, which
    come one after the other. For arrays of your own return them here, and delete the readers above."""
    columns = []
    kinds = set()
    for name in args.dataset:
        name, share = NAME.fullmatch(name).groups()
        path = find_dataset(name)
        read = read_d4rl if path.suffix == ".hdf5" else read_minari
        episodes, _, action_space, _ = read(path)
        limits = bounds(action_space)
        if limits is None or not np.isfinite(limits).all():
            sys.exit(f"error: {name} has actions {action_space}; they must be a Box with bounds")
        low, high = limits.reshape(2, -1)  # (A,) each
        num_kept = max(1, round(float(share or 1) * len(episodes)))
        kept = np.random.default_rng(0).permutation(len(episodes))[:num_kept]
        for i in sorted(kept):
            obs, action, *_ = episodes[i]
            action = 2 * (np.float64(action) - low) / (high - low) - 1
            columns.append((obs, action))
            kinds.add(f"{obs.shape[1:]} {limits.tolist()}")
    if len(kinds) > 1:
        sys.exit(f"error: the datasets differ in observations or actions: {kinds}")
    obs, action = [np.concatenate(column) for column in zip(*columns)]
    return obs, action, np.array([len(obs) for obs, _ in columns])


# Plumbing of all scripts: run folder -------------------------------------------------------------
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
def main():
    args = tyro.cli(Args)
    if args.evaluate or args.resume:  # the run's flags, then those of this call
        config = json.loads(Path(args.evaluate or args.resume, "config.json").read_text())
        args = tyro.cli(Args, default=Args(**config["args"]))
    seeds = range(args.seed, args.seed + args.num_seeds)
    obs, action, lengths = load_actions(args)
    if not (np.abs(obs) < 1e18).all():  # squares must not overflow
        sys.exit("error: there are NaN, infinite or huge observations; clean the data first")
    if not (np.abs(action) <= 1 + 1e-6).all():
        sys.exit("error: there are actions that are NaN or outside their bounds; clip or rescale them")

    # the method's own lines, which a copied `update` needs too
    action = action.clip(-ACTION_BOUND, ACTION_BOUND)
    held_out = held_out_transitions(lengths)

    # one row a transition, so that a batch is one gather
    widths = [obs.shape[1], action.shape[1]]
    transitions = np.concatenate([obs, action], axis=1, dtype=np.float32)
    transitions = torch.from_numpy(transitions).to(args.device)
    unseen = transitions[held_out]
    seen = np.flatnonzero(~held_out)

    # models, as they start or as they were
    agent = Agent(*widths, args)
    run_dir = run_folder(args)
    rows = np.empty((0, 3))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        args.num_updates = max(args.num_updates, first)

    def finish():
        bits = bits_per_dimension(agent.best, unseen, args.num_seeds)
        print(f"{bits.mean():.3f} bits per dimension held out, {bits.tolist()} by seed; run folder {run_dir}")
        if args.awac:
            obs = transitions[args.state, : widths[0]].view(1, 1, -1)
            samples = sample_target(agent.best, obs.cpu(), args)
            figure_3(*samples, run_dir / f"figure3-{args.state}.csv")

    if args.evaluate:
        return finish()

    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    print(f"{len(held_out):,} transitions of {len(lengths):,} episodes, {len(unseen):,} of them held out")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    started = time.time()
    for step in tqdm(range(first, args.num_updates, CHUNK_UPDATES), mininterval=1, unit_scale=CHUNK_UPDATES):
        drawn = draw_transitions(seeds, step, args.batch_size, seen)
        for batch in transitions[drawn.to(args.device)]:
            obs, action = batch.split(widths, -1)
            metrics = update(agent, obs, action)
        num_updates = step + CHUNK_UPDATES
        if num_updates % args.eval_every == 0 or num_updates == args.num_updates:
            bits = bits_per_dimension(agent.model, unseen, args.num_seeds)
            log(metrics | {"bits/held_out": bits}, num_updates, writer)
            agent.keep_best(bits)
            for seed, x in zip(seeds, bits.tolist()):
                rows = np.vstack([rows, [num_updates, seed, x]])
            header = "update,seed,bits_per_dimension"
            np.savetxt(run_dir / "evaluations.csv", rows, "%.10g", ",", header=header, comments="")
            save(run_dir / "checkpoint.pt", agent, rows, num_updates)
            tqdm.write(f"update {num_updates:,}: {bits.mean():.3f} bits per dimension held out")

    seconds = time.time() - started
    writer.close()
    print(f"{args.num_updates:,} updates, {(args.num_updates - first) / seconds:.0f}/s per seed; the best of each:")
    finish()


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
