"""BCQ: batch-constrained Q-learning, offline and then, if asked, online (BCQ-ft).

Papers: S. Fujimoto, D. Meger, D. Precup, "Off-Policy Deep Reinforcement Learning without Exploration",
2019, arXiv:1812.02900 (BCQ); S. Lee et al., "Addressing Distribution Shift in Online Reinforcement
Learning with Offline Datasets", NeurIPS Workshop on Offline Reinforcement Learning, 2020 (BCQ-ft).

Idea. Q-learning on a fixed dataset asks its critics about actions that the data does not have, and
nothing corrects what they make up there. BCQ asks about likely actions only. A conditional VAE learns
which actions the data has in states like this one. The policy draws some of them, lets a perturbation
network move each a little towards higher Q, and takes the best; so does the backup at the next state.
Online (BCQ-ft) the same update goes on, with the agent's own steps among the logged ones.

Objectives, numbered here. Shapes: S seeds, C critics, B batch, O observation, A action, Z = 2 A latent,
N transitions, E episodes, K draws at each next state, M candidates; z ~ N(0, 1), clipped at 0.5.
    vae       L = mean (decoder(s, mean + std * noise) - a)^2 + 1/2 mean KL(N(mean, std^2) || N(0, 1)),
              mean, std = encoder(s, a)                                                           (1)
    action    pi(s, z) = clip(a~ + max_perturbation tanh(perturbation(s, a~)), -1, 1),
              a~ = decoder(s, z)                                                                  (2)
    critic    y = r + gamma (1 - terminated) max over K draws of z of Q_soft(s', pi_target(s', z)),
              Q_soft = min_weight min Q_target + (1 - min_weight) max Q_target, over the critics
              L_Q = sum over C of mean (Q(s, a) - y)^2                                            (3)
    actor     L_pi = -mean Q_1(s, pi(s, z)), for the perturbation network alone                   (4)
    targets   target <- (1 - target_update_rate) target + target_update_rate online, of the critics
              and the perturbation network; the VAE has none
    acting    the best by Q_1 of M draws pi(s, z)                                                 (5)
Each update: VAE, critics, perturbation network, targets, each with what those before it have learned.

What differs from the papers and their code, and why.
    - Squared errors are means over action dimensions, KL divergences over latent ones, as in the code.
    - The K actions at s' and the one at s come from one pass of the decoder, which does not change in
      between. All seeds' draws are their own; those of an evaluation are a function of its episode.
    - The draws of (5) are all the exploration of BCQ-ft, for the code adds no noise to the action.
    - Online, each step in the environment pays for one update on a batch that is uniform over the data
      and the agent's own steps; Lee et al. make 1,000 updates after 1,000 steps. Steps go on in the
      count of updates. A resumed run goes on from its last checkpoint with a new episode.
    - Bootstrapping goes on through time limits (truncation) and ends at true ends (termination).

Run:      python algorithms/bcq.py --dataset hopper/replay-v0
Online:   --online-steps 250000 --eval-every 1000
Expected: no number yet from these commands
"""

import copy
import json
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
from typing import NamedTuple

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
KL_WEIGHT = 0.5  # of the VAE's divergence against its squared error
LATENT_CLIP = 0.5  # bound of the latent vectors that actions are drawn with


@dataclass
class Args:
    dataset: tuple[str, ...] = ("hopper/replay-v0",)  # Minari ids, folders, D4RL files; `ID:0.1`: a tenth of it
    env_id: str | None = None  # evaluation environment, also `module:Env-v0`; default: of the first dataset
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation
    num_updates: int = 1_000_000  # gradient steps offline
    online_steps: int = 0  # environment steps of each seed after these, with one update each
    batch_size: int = 100  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = (400, 300)  # widths of the hidden layers of critics and perturbation
    vae_hidden_sizes: tuple[int, ...] = (750, 750)  # the same of encoder and decoder
    learning_rate: float = 1e-3  # Adam's step size for every network
    gamma: float = 0.99  # discount factor
    target_update_rate: float = 0.005  # how far targets move to the networks at every update
    max_perturbation: float = 0.05  # Phi: how far an action may be moved from the VAE's
    min_weight: float = 0.75  # lambda: weight of the smaller target critic in a backup; the rest is the larger's
    num_next_actions: int = 10  # K: actions that the backup takes the best of
    num_candidates: int = 100  # M: actions that the policy takes the best of
    eval_every: int = 5_000  # updates between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed; 0: never evaluate
    log_every: int = 1_000  # updates between entries in TensorBoard
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/DATASET/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint, online in a new episode
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing
    capture_video: bool = False  # film the evaluations (on a machine without screen: MUJOCO_GL=egl)

    def __post_init__(self):
        self.hidden_sizes = tuple(self.hidden_sizes)  # JSON makes a list of it
        self.vae_hidden_sizes = tuple(self.vae_hidden_sizes)
        self.dataset = tuple(  # files by their full path, so that a run goes on from anywhere
            os.path.abspath(name) if os.path.exists(NAME.fullmatch(name)[1]) else name
            for name in self.dataset
        )
        rates = self.gamma, self.target_update_rate, self.min_weight
        if not all(0 <= rate <= 1 for rate in rates):
            sys.exit("error: gamma, target_update_rate and min_weight are rates; give numbers in [0, 1]")
        if self.online_steps and not self.eval_episodes:
            sys.exit("error: the online stage is in the environment of the evaluations; give --eval-episodes 1")
        periods = self.num_updates, self.eval_every, self.log_every
        if any(period <= 0 or period % CHUNK for period in periods) or self.online_steps % CHUNK:
            sys.exit(f"error: updates, steps, eval_every and log_every count in {CHUNK}s; give multiples of it")


# The idea: choose among actions that the data might hold -------------------------------------------
class VAE(nn.Module):
    """Which actions the data has in a state: latent vectors that stand for an action, and the way back."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, generators):
        super().__init__()
        self.latent_dim = 2 * action_dim
        encoder_sizes = [obs_dim + action_dim, *hidden_sizes, 2 * self.latent_dim]
        decoder_sizes = [obs_dim + self.latent_dim, *hidden_sizes, action_dim]
        self.encoder = MLP(encoder_sizes, fan_in_uniform, generators)
        self.decoder = MLP(decoder_sizes, fan_in_uniform, generators)

    def encode(self, obs, action):
        """Mean and log_std, (S, B, Z) each."""
        obs_action = torch.cat([obs, action], -1)
        mean, log_std = self.encoder(obs_action).chunk(2, dim=-1)
        return mean, log_std.clamp(-4, 15)  # bounds of the authors' code

    def decode(self, obs, latent):
        """Action (S, B, A) in [-1, 1]."""
        return self.decoder(torch.cat([obs, latent], -1)).tanh()

    def draw(self, obs, noise):
        """Actions (S, B, A) that the data might hold, a~ of (2), from standard normal noise (S, B, Z)."""
        return self.decode(obs, noise.clamp(-LATENT_CLIP, LATENT_CLIP))


class BestOfCandidates(nn.Module):
    """Acts as the best by Q_1 of M likely actions, (5). An episode's noise is a function of its first
    observation, and so of seed, update and episode."""

    def __init__(self, agent, args):
        super().__init__()
        self.vae = agent.vae
        self.perturbation = agent.perturbation
        self.critic = agent.critic
        self.num_candidates = args.num_candidates
        self.generators = None

    @torch.no_grad()
    def best(self, obs, noise):
        """The action at obs (S, O) -> (S, A), its candidates from standard normal noise (S, M, Z)."""
        obs = obs[:, None].expand(-1, noise.shape[1], -1)
        likely_action = self.vae.draw(obs, noise)
        action = self.perturbation(obs, likely_action)  # (S, M, A)
        q = first_critic(self.critic, torch.cat([obs, action], -1))  # (S, M)
        best = q.argmax(1)
        return action.take_along_dim(best[:, None, None], 1).squeeze(1)

    def forward(self, obs):  # (S, 1, O)
        obs = obs.squeeze(1)
        if self.generators is None:  # the episode begins
            bits = obs.numpy().view(np.uint32)
            self.generators = [np.random.default_rng(entropy) for entropy in bits]
        shape = self.num_candidates, self.vae.latent_dim
        noise = [generator.standard_normal(shape, np.float32) for generator in self.generators]
        noise = torch.from_numpy(np.stack(noise))
        return self.best(obs, noise)[:, None]


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


class Perturbation(nn.Module):
    """xi: moves an action by up to max_perturbation, to where Q_1 is higher, (2)."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, generators, max_perturbation):
        super().__init__()
        sizes = [obs_dim + action_dim, *hidden_sizes, action_dim]
        self.net = MLP(sizes, fan_in_uniform, generators)
        self.max_perturbation = max_perturbation

    def forward(self, obs, action):
        offset = self.net(torch.cat([obs, action], -1)).tanh()
        return (action + self.max_perturbation * offset).clamp(-1, 1)


def first_critic(critic, x):
    """Q_1 (S, B) alone of x (S, B, O + A): the actor climbs no other."""
    for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
        if i > 0:
            x = critic.activation(x)
        x = torch.baddbmm(bias[:: critic.C], x, weight[:: critic.C])
    return x.squeeze(-1)


class Agent(nn.Module):
    """Networks and optimizers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        hidden = args.hidden_sizes
        self.vae = VAE(obs_dim, action_dim, args.vae_hidden_sizes, generators)
        self.perturbation = Perturbation(obs_dim, action_dim, hidden, generators, args.max_perturbation)
        self.critic = MLP([obs_dim + action_dim, *hidden, 1], fan_in_uniform, generators, C=2)
        self.target_perturbation = copy.deepcopy(self.perturbation).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(args.device)
        self.optimizers = {}
        for name in ("vae", "critic", "perturbation"):
            parameters = getattr(self, name).parameters()
            rate = torch.tensor(args.learning_rate, device=args.device)  # changes; a CUDA graph would keep a number
            self.optimizers[name] = torch.optim.Adam(parameters, rate, fused=True, capturable=rate.is_cuda)


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


def update(agent, obs, action, reward, next_obs, not_terminated, noise, args):
    """One gradient step of every agent on obs (S, B, O), action (S, B, A), reward (S, B), next_obs (S, B, O),
    not_terminated (S, B), never (S, B, 1), which would broadcast, and noise (S, (K + 2) B, Z), standard normal.
    Returns what to log the mean of, still on the device: nothing here waits for a GPU."""
    B = obs.shape[1]
    K = args.num_next_actions
    posterior_noise, noise = noise.split([B, (K + 1) * B], dim=1)

    # VAE, (1): rebuild the logged action from a latent vector that is nearly standard normal
    mean, log_std = agent.vae.encode(obs, action)  # (S, B, Z) each
    rebuilt = agent.vae.decode(obs, mean + log_std.exp() * posterior_noise)
    reconstruction_loss = (rebuilt - action).square().mean((1, 2))  # (S,)
    log_variance = 2 * log_std
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    kl_loss = divergence.mean((1, 2))  # (S,)
    vae_loss = reconstruction_loss + KL_WEIGHT * kl_loss
    minimize(vae_loss.sum(), agent.optimizers["vae"])  # sum over S: seeds never mix

    with torch.no_grad():
        # actions that the data might hold, K at every s' and one at s
        next_obs = next_obs.repeat(1, K, 1)  # (S, K * B, O)
        likely = agent.vae.draw(torch.cat([next_obs, obs], 1), noise)
        next_action, likely_action = likely.split([K * B, B], dim=1)

        # the best of the K bootstraps through a time limit, but not through a true end
        next_action = agent.target_perturbation(next_obs, next_action)
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).squeeze(-1)  # (S, C, K * B)
        soft_minimum = args.min_weight * next_q.amin(1) + (1 - args.min_weight) * next_q.amax(1)
        best_q = soft_minimum.unflatten(1, (K, B)).amax(1)  # (S, B)
        backup = reward + args.gamma * not_terminated * best_q

    # critics, (3)
    q = agent.critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    minimize(critic_loss.sum(), agent.optimizers["critic"])

    # perturbation network, (4): it climbs the first of the new critics
    policy_action = agent.perturbation(obs, likely_action)
    policy_q = first_critic(agent.critic, torch.cat([obs, policy_action], -1))  # (S, B)
    actor_loss = -policy_q.mean(-1)  # (S,)
    minimize(actor_loss.sum(), agent.optimizers["perturbation"])

    with torch.no_grad():  # targets
        targets = [*agent.target_critic.parameters(), *agent.target_perturbation.parameters()]
        for target, online in zip(targets, [*agent.critic.parameters(), *agent.perturbation.parameters()]):
            target.lerp_(online, args.target_update_rate)

    return {
        "loss/reconstruction": reconstruction_loss.detach(),
        "loss/kl": kl_loss.detach(),
        "loss/critic": critic_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "value/q": q.detach(),
        "policy/perturbation": (policy_action - likely_action).detach().abs(),
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

    # one row a transition, so that a batch is one gather; this, `learn` and the online loop know the columns
    columns = data.obs, data.action, data.reward[:, None], data.next_obs, 1.0 - data.terminated[:, None]
    widths = [column.shape[1] for column in columns]
    transitions = np.concatenate(columns, axis=1, dtype=np.float32)
    transitions = torch.from_numpy(transitions).to(args.device)

    # agents, as they start or as they were
    obs_dim, action_dim, *_ = widths
    agent = Agent(obs_dim, action_dim, args)
    agent.replay = Replay(transitions, args.num_seeds, args.online_steps)
    policy = BestOfCandidates(agent, args)  # what is evaluated
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

    num_candidates = args.num_candidates
    num_latents = num_candidates + (args.num_next_actions + 2) * args.batch_size  # to act, then for `update`
    noise_shape = num_latents, agent.vae.latent_dim
    draw = partial(draw_uniforms_and_noise, seeds, args.batch_size, noise_shape, args.device)
    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    started = time.time()
    learn_offline = CudaGraph(learn)
    for step in tqdm(range(first, args.num_updates, CHUNK), mininterval=1, unit_scale=CHUNK):
        uniforms, noise = draw(step)
        metrics = learn_offline(agent.replay.index(uniforms), noise[:, :, num_candidates:])
        after_chunk(step + CHUNK, metrics)

    if args.online_steps:
        envs = Environments(data.spec, seeds)
        act = CudaGraph(policy.best)
        learn_online = CudaGraph(learn)
        print(f"online in {data.spec.id} from step {agent.replay.num_added:,} on, with a new episode")
        for step in tqdm(range(max(first, args.num_updates), last, CHUNK), mininterval=1, unit_scale=CHUNK):
            uniforms, noise = draw(step)
            for i in range(CHUNK):
                obs = envs.observe(step + i)
                action = act(torch.from_numpy(obs).to(args.device), noise[i, :, :num_candidates]).cpu().numpy()
                reward, next_obs, terminated = envs.step(action)
                columns = obs, action, reward[:, None], next_obs, 1.0 - terminated[:, None]
                agent.replay.add(columns)
                for s in np.flatnonzero(envs.ended):
                    writer.add_scalar(f"exploration/return_of_seed_{seeds[s]}", envs.returns[s], step + i + 1)
                index = agent.replay.index(uniforms[i : i + 1])
                metrics = learn_online(index, noise[i : i + 1, :, num_candidates:])
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
