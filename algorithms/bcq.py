"""BCQ: batch-constrained Q-learning, which takes actions that the data might hold; it can go on learning online.

Papers: S. Fujimoto, D. Meger, D. Precup, "Off-Policy Deep Reinforcement Learning without Exploration", 2019,
arXiv:1812.02900 (BCQ); S. Lee, Y. Seo, K. Lee, P. Abbeel, J. Shin, "Addressing Distribution Shift in Online
Reinforcement Learning with Offline Datasets", NeurIPS Workshop on Offline Reinforcement Learning, 2020 (BCQ-ft).

Idea. Q-learning on a fixed dataset asks its critics about actions that the data does not have, and nothing ever
corrects what they make up there. BCQ asks about likely actions only. A conditional VAE learns which actions the data
has in states like this one. The policy draws some of those, lets a perturbation network move each of them a little
towards higher Q, and takes the best; the Bellman backup does the same at the next state. Online (BCQ-ft), nothing
changes but the data: the same update goes on, with the agent's own steps among the logged ones.

Objectives (S seeds, C critics, B batch, O observation, A action, Z latent = 2 A; K draws at each next state; numbers
are of this file):
    vae       L = mean (decoder(s, mean + std * noise) - a)^2 + kl_weight mean KL(N(mean, std^2) || N(0, 1)),
              mean, std = encoder(s, a)                                                                              (1)
    action    pi(s, z) = clip(a~ + max_perturbation tanh(perturbation(s, a~)), -1, 1),
              a~ = decoder(s, clip(z, -latent_clip, latent_clip)),  z ~ N(0, 1)                                      (2)
    critic    y = r + gamma (1 - terminated) max over K draws of z of Q_soft(s', pi_target(s', z))
              Q_soft = min_weight min Q_target + (1 - min_weight) max Q_target, over the critics                     (3)
              L = sum over C of mean (y - Q(s, a))^2
    actor     L = -mean Q_1(s, pi(s, z)), minimised over the perturbation network alone                              (4)
    policy    argmax of Q_1(s, pi(s, z)) over num_candidates draws of z                                              (5)
    targets   Q_target, perturbation_target <- (1 - polyak) target + polyak online;  the VAE has none
Each update: VAE, critics, perturbation network, targets (the order of the BCQ authors' code); each sees what those
before it have just learned.

What differs from the papers and their code, and why.
    - (5) is random: other draws, another action. Evaluations take the same num_candidates draws at every step, which
      belong to the agent like its weights. So the policy that is evaluated is a function of the state, and gives the
      same returns with any number of workers and after a stop. Online, every step has draws of its own.
    - These draws are all the exploration that BCQ-ft has, as the BCQ code adds no noise to the action.
    - The squared error is a mean over action dimensions and the KL one over latent dimensions, as in the code.
    - The candidates at s' and the action at s come from one pass of the decoder, which does not change in between.
    - Online, an epoch of steps pays for as many updates, on batches that are uniform over the offline data and all own
      steps. The tenfold first epoch (--first-updates 10000) belongs to the BRED of the same paper, not to BCQ-ft.
    - Bootstrapping goes on through time limits (truncation) and stops at true ends (termination).
    - Weights, draws and noise come from generators of each seed's own (and stage), so that a seed gives the same run
      alone or among others.
    - evaluations.csv counts updates offline, and goes on counting with the steps of the environment.

Reading:  the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:      python algorithms/bcq.py --dataset hopper/replay-v0
BCQ-ft:   python algorithms/bcq.py --dataset hopper/replay-v0 --online-steps 250000
          python algorithms/bcq.py --resume runs/bcq/RUN --online-steps 250000
Expected: from 13 up to 37 ± 4 in the small setting of benchmarks.md's grid bred: 20,000 updates offline, as many steps
          online, networks of 2x64, a VAE of 2x128. With these defaults (grid bred_paper): not run yet.
"""

import contextlib
import copy
import csv
import ctypes
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
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise, takewhile
from pathlib import Path

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
    dataset: tuple[str, ...] = ("hopper/replay-v0",)
    """Minari ids, Minari folders or D4RL .hdf5 files, concatenated; `ID:0.1` takes a tenth of the episodes"""
    env_id: str | None = None
    """environment of the online stage and of evaluations; default: the dataset's own (D4RL: from the file's name)"""
    seed: int = 0
    """first seed; agent k uses seed + k"""
    num_seeds: int = 1
    """agents trained side by side in one batched computation (the axis S)"""
    num_updates: int = 1_000_000
    """gradient steps of the offline stage"""
    batch_size: int = 100
    """transitions per update and seed (the axis B)"""
    hidden_sizes: tuple[int, ...] = (400, 300)
    """widths of the hidden layers of critics and perturbation network"""
    vae_hidden_sizes: tuple[int, ...] = (750, 750)
    """widths of the hidden layers of encoder and decoder"""
    learning_rate: float = 1e-3
    """Adam step size of every network"""
    gamma: float = 0.99
    """discount factor"""
    max_perturbation: float = 0.05
    """Phi: how far an action may be moved from the VAE's (actions are in [-1, 1])"""
    min_weight: float = 0.75
    """lambda: weight of the smaller target critic in the backup; the larger one has the rest"""
    kl_weight: float = 0.5
    """weight of the VAE's KL divergence against its squared error"""
    latent_clip: float = 0.5
    """bound of the latent vectors that actions are drawn with"""
    num_next_actions: int = 10
    """actions that the backup takes the best of (K)"""
    num_candidates: int = 100
    """actions that the policy takes the best of"""
    polyak: float = 0.005
    """share of the online networks in their targets at every update (tau)"""
    online_steps: int = 0
    """environment steps per seed after the offline stage, rounded up to whole epochs"""
    steps_per_epoch: int = 1_000
    """online: environment steps before each block of updates"""
    updates_per_epoch: int = 1_000
    """online: gradient steps in an epoch"""
    first_updates: int = 1_000
    """online: gradient steps in the first epoch"""
    save_online: str | None = None
    """when done, write the online data of the first seed to this folder, as a Minari dataset"""
    eval_every: int = 5_000
    """offline: updates between evaluations"""
    online_eval_every: int = 1_000
    """online: environment steps between evaluations, which wait for the end of an epoch"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, with the best of fixed candidates; 0: never evaluate"""
    eval_workers: int | None = None
    """processes that evaluate beside training (0: inline; default: one per seed, as far as there are cores)"""
    checkpoint_every: int = 50_000
    """updates between checkpoints; the end of a stage and a stop by Ctrl-C or SIGTERM write one too"""
    log_every: int = 1_000
    """updates between entries in TensorBoard"""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    allow_tf32: bool = False
    """let a GPU multiply matrices in TF32: faster, 10 bits of mantissa"""
    run_dir: str | None = None
    """where the results go; default runs/bcq/<dataset>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos"""


# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_updates", "online_steps", "eval_episodes"}
RESUME_MAY_CHANGE |= {"eval_workers", "checkpoint_every", "log_every", "capture_video", "save_online"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: choose among actions that the data might hold
# ---------------------------------------------------------------------------------------------------------------------


def soft_minimum(q, min_weight):
    """Q_soft, (3): between the smaller and the larger critic, nearer to the smaller. q (S, C, B) -> (S, B)."""
    return min_weight * q.amin(1) + (1 - min_weight) * q.amax(1)


def best_action(actions, q):
    """The action of highest value at each state, (5): actions (S, K, B, A), q (S, K, B) -> (S, B, A)."""
    best = q.argmax(1)[:, None, :, None].expand(-1, -1, -1, actions.shape[-1])
    return actions.gather(1, best).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product.
# ---------------------------------------------------------------------------------------------------------------------


def fan_in_uniform(weight, bias, generator):
    """U(-1/sqrt(in), 1/sqrt(in)) for weight (in, out) and bias (out): what torch.nn.Linear does."""
    bound = weight.shape[0] ** -0.5
    weight.uniform_(-bound, bound, generator=generator)
    bias.uniform_(-bound, bound, generator=generator)


class MLP(nn.Module):
    """`lead` independent ReLU networks side by side: weights (*lead, in, out), one batched product per layer.

    lead: (S,) or (S, C); init(weight, bias, generator) fills one layer of one network in place;
    generators: one torch.Generator per seed, so that the weights of a seed do not depend on its neighbours.
    """

    def __init__(self, lead, sizes, init, generators, dropout=0.0):
        super().__init__()
        self.lead, self.dropout, self.layers = lead, dropout, []
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            weight, bias = torch.zeros(*lead, fan_in, fan_out), torch.zeros(*lead, 1, fan_out)
            for s, generator in enumerate(generators):
                for w, b in zip(weight[s].view(-1, fan_in, fan_out), bias[s].view(-1, fan_out)):
                    init(w, b, generator)
            self.layers.append((nn.Parameter(weight), nn.Parameter(bias)))
            self.register_parameter(f"weight{i}", self.layers[i][0])
            self.register_parameter(f"bias{i}", self.layers[i][1])

    def forward(self, x):
        """x (S, B, in) -> (*lead, B, out)."""
        if len(self.lead) > 1:  # every critic of a seed sees the same input
            x = x[:, None].expand(-1, self.lead[1], -1, -1).flatten(0, 1)
        for i, (weight, bias) in enumerate(self.layers):
            if len(self.lead) > 1:  # the batched product takes one leading axis
                weight, bias = weight.flatten(0, 1), bias.flatten(0, 1)
            if weight.shape[-1] > 1:
                x = torch.baddbmm(bias, x, weight)
            else:  # a matrix times a vector, which baddbmm is slow at
                x = (x * weight.mT).sum(-1, keepdim=True) + bias
            if i < len(self.layers) - 1:
                x = x.relu_()
                if self.dropout:
                    x = F.dropout(x, self.dropout, self.training)
        return x.unflatten(0, self.lead) if len(self.lead) > 1 else x


class Adam(nn.Module):
    """Adam (Kingma and Ba, 2015) by torch's fused kernel, with all of its state in fixed buffers.

    torch.optim.Adam computes the same, but its bookkeeping costs time that small networks notice, and state that is
    there from the start goes into CUDA graphs and checkpoints without further ado.
    """

    def __init__(self, parameters, learning_rate):
        super().__init__()
        self.params = list(parameters)
        device = self.params[0].device
        self.register_buffer("learning_rate", torch.tensor(learning_rate, device=device))  # may follow a schedule
        self.register_buffer("num_steps", torch.zeros((), device=device))
        for i, parameter in enumerate(self.params):
            self.register_buffer(f"mean{i}", torch.zeros_like(parameter))
            self.register_buffer(f"square{i}", torch.zeros_like(parameter))

    def minimize(self, loss):
        """One step on this optimiser's own parameters; no other parameter gets a gradient."""
        grads = torch.autograd.grad(loss, self.params)
        learning_rate, num_steps, *moments = self.buffers()
        with torch.no_grad():
            num_steps.add_(1)
            torch._fused_adam_(
                self.params, grads, moments[::2], moments[1::2], [], [num_steps] * len(grads), lr=learning_rate,
                beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip


class Encoder(MLP):
    """Half of the VAE: the Gaussian of the latent vectors that an action in a state stands for."""

    def forward(self, obs, action):
        """obs (S, B, O), action (S, B, A) -> mean, log_std, each (S, B, Z)."""
        mean, log_std = super().forward(torch.cat([obs, action], -1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-4, 15)


class Decoder(MLP):
    """The other half, the generative model G: an action like those that the data has in a state."""

    def forward(self, obs, latent):
        """obs (S, B, O), latent (S, B, Z) -> action (S, B, A) in [-1, 1]."""
        return super().forward(torch.cat([obs, latent], -1)).tanh()


class Perturbation(MLP):
    """xi: moves an action a little, to where Q_1 is higher."""

    def forward(self, obs, action, max_perturbation):
        """obs (S, B, O), action (S, B, A) -> action (S, B, A) in [-1, 1]."""
        offset = max_perturbation * super().forward(torch.cat([obs, action], -1)).tanh()
        return (action + offset).clamp(-1, 1)


def first_critic(critic):
    """Q_1 alone of critics (S, C): an MLP of lead (S,) on detached views of their weights; its input gets gradients."""
    first = copy.copy(critic)
    first.lead = critic.lead[:1]
    first.layers = [(weight[:, 0].detach(), bias[:, 0].detach()) for weight, bias in critic.layers]
    return first


class BestCandidate(nn.Module):
    """The policy (5), on networks that it shares with the agent."""

    def __init__(self, agent, args):
        super().__init__()
        self.decoder, self.perturbation, self.critic = agent.decoder, agent.perturbation, agent.critic
        self.latent_clip, self.max_perturbation = args.latent_clip, args.max_perturbation
        self.register_buffer("eval_noise", agent.eval_noise)

    def sample(self, obs, noise):
        """The best of K candidates: obs (S, B, O), standard normal noise (S, K, Z) for all B alike -> (S, B, A)."""
        K, B = noise.shape[1], obs.shape[1]
        obs = obs.repeat(1, K, 1)  # (S, K * B, O)
        latent = noise.clamp(-self.latent_clip, self.latent_clip).repeat_interleave(B, 1)  # (S, K * B, Z)
        actions = self.perturbation(obs, self.decoder(obs, latent), self.max_perturbation)
        q = first_critic(self.critic)(torch.cat([obs, actions], -1)).squeeze(-1)  # (S, K * B)
        return best_action(actions.unflatten(1, (K, B)), q.unflatten(1, (K, B)))

    def act(self, obs):
        """The action (S, B, A) in [-1, 1] that evaluations use: the candidates come from the same noise every time."""
        return self.sample(obs, self.eval_noise)


class BCQAgent(nn.Module):
    """Networks and optimisers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args, device):
        super().__init__()
        S, O, A, Z = args.num_seeds, obs_dim, action_dim, 2 * action_dim  # noqa: E741
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(S)]
        hidden, vae_hidden = args.hidden_sizes, args.vae_hidden_sizes
        self.args, self.widths = args, [O, A, 1, O, 1]  # of a packed transition: s, a, r, s', not terminated
        self.encoder = Encoder((S,), [O + A, *vae_hidden, 2 * Z], fan_in_uniform, generators)
        self.decoder = Decoder((S,), [O + Z, *vae_hidden, A], fan_in_uniform, generators)
        self.perturbation = Perturbation((S,), [O + A, *hidden, A], fan_in_uniform, generators)
        self.critic = MLP((S, 2), [O + A, *hidden, 1], fan_in_uniform, generators)
        self.target_perturbation = copy.deepcopy(self.perturbation).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        eval_noise = [torch.randn(args.num_candidates, Z, generator=generator) for generator in generators]
        self.register_buffer("eval_noise", torch.stack(eval_noise))
        self.to(device)
        vae = [*self.encoder.parameters(), *self.decoder.parameters()]
        networks = {"vae": vae, "critic": self.critic.parameters(), "perturbation": self.perturbation.parameters()}
        adams = {name: Adam(parameters, args.learning_rate) for name, parameters in networks.items()}
        self.optimizers = nn.ModuleDict(adams)

    @property
    def actor(self):
        """What acts and is evaluated; it shares memory with the agent's networks."""
        return BestCandidate(self, self.args)


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def update(agent, batch, posterior_noise, noise, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    batch: (S, B, O + A + 1 + O + 1) packed transitions; posterior_noise (S, B, Z), noise (S, K + 1, B, Z): standard
    normal, the latter for K actions at s' and one at s. Returns a dict of metrics, each (S,), on the device.
    """
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)
    reward, not_terminated = reward.squeeze(-1), not_terminated.squeeze(-1)  # (S, B)
    S, (K, B) = len(obs), (args.num_next_actions, args.batch_size)

    # VAE, (1): rebuild the logged action from a latent vector that is nearly standard normal
    mean, log_std = agent.encoder(obs, action)  # (S, B, Z) each
    rebuilt = agent.decoder(obs, mean + log_std.exp() * posterior_noise)
    reconstruction_loss = (rebuilt - action).square().mean((1, 2))  # (S,)
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).mean((1, 2))  # (S,)
    agent.optimizers["vae"].minimize((reconstruction_loss + args.kl_weight * kl).sum())  # sum over S: seeds never mix

    # actions that the data might hold, K at every s' and one at s, (2) before its perturbation
    with torch.no_grad():
        latent = noise.clamp(-args.latent_clip, args.latent_clip).flatten(1, 2)  # (S, (K + 1) * B, Z)
        next_obs = next_obs.repeat(1, K, 1)  # (S, K * B, O)
        likely = agent.decoder(torch.cat([next_obs, obs], 1), latent)  # (S, (K + 1) * B, A)
        next_action, sampled_action = likely.split([K * B, B], dim=1)

    # critics, (3): towards the best of the K; only a true end of the episode cuts the bootstrap
    with torch.no_grad():
        next_action = agent.target_perturbation(next_obs, next_action, args.max_perturbation)
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).squeeze(-1)  # (S, C, K * B)
        best_q = soft_minimum(next_q, args.min_weight).view(S, K, B).amax(1)  # (S, B)
        backup = reward + args.gamma * not_terminated * best_q
    q = agent.critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    agent.optimizers["critic"].minimize(critic_loss.sum())

    # perturbation network, (4): it climbs the critic that has just been improved
    policy_action = agent.perturbation(obs, sampled_action, args.max_perturbation)  # (S, B, A)
    policy_q = first_critic(agent.critic)(torch.cat([obs, policy_action], -1)).squeeze(-1)  # (S, B)
    actor_loss = -policy_q.mean(-1)  # (S,)
    agent.optimizers["perturbation"].minimize(actor_loss.sum())

    # targets
    with torch.no_grad():
        targets = [*agent.target_critic.parameters(), *agent.target_perturbation.parameters()]
        torch._foreach_lerp_(targets, [*agent.critic.parameters(), *agent.perturbation.parameters()], args.polyak)

    return {
        "loss/reconstruction": reconstruction_loss.detach(),
        "loss/kl": kl.detach(),
        "loss/critic": critic_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "value/q": q.detach().mean((1, 2)),
        "value/backup": backup.mean(-1),
        "policy/perturbation": (policy_action - sampled_action).detach().abs().mean((1, 2)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing of the offline scripts: the dataset
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Dataset:
    """N transitions in the order of their E episodes."""

    transitions: np.ndarray  # (N, O + A + 1 + O + 1) float32: s, a, r, s', not terminated
    episode_lengths: np.ndarray  # (E,) transitions of each episode
    episode_returns: np.ndarray  # (E,) float64, sum of all rewards of the episode as logged
    obs_dim: int
    action_dim: int
    environment: dict  # {"id": ..., "kwargs": {...}, "references": (random, expert) or None}


def flat_array(node):
    """An HDF5 array (T, ...), or a group of them (a Dict space), as (T, D) float32 in gymnasium.flatten's order."""
    if isinstance(node, h5py.Group):
        return np.concatenate([flat_array(node[key]) for key in sorted(node)], axis=1)
    return np.asarray(node, np.float32).reshape(len(node), -1)


def next_observations(obs, terminated):
    """s' (T or T - 1, O) from obs (T + 1 or T, O): without the last one, a truncated episode loses its last step."""
    missing = len(obs) == len(terminated) and terminated[-1]  # after a true end nothing bootstraps from s'
    return np.concatenate([obs[1:], obs[-1:]]) if missing else obs[1:]


def check_continuous(actions, path):
    """Discrete actions are logged as one integer per step, or as a group of them."""
    if isinstance(actions, h5py.Group) or actions.ndim == 1:
        fail(f"{path} has discrete actions", "use a dataset with continuous actions")


def minari_episodes(folder):
    """Episodes and environment of a Minari folder: reads its JSON and HDF5, and runs nothing that they name."""
    metadata = json.loads((folder / "metadata.json").read_text())
    episodes = []
    with h5py.File(folder / "main_data.hdf5") as file:
        for i in range(metadata["total_episodes"]):
            group = file[f"episode_{i}"]
            check_continuous(group["actions"], folder)
            obs, action = flat_array(group["observations"]), flat_array(group["actions"])
            reward, terminated = group["rewards"][()], group["terminations"][()]
            episodes.append((obs, action, reward, terminated, next_observations(obs, terminated)))
    spec = json.loads(metadata.get("env_spec") or "{}")
    if ":" in spec.get("id", ""):  # gymnasium would import the module before the colon
        fail(f"{folder} names an environment outside the registry ({spec['id']})", "give --env-id")
    kwargs = {**spec.get("kwargs", {}), "max_episode_steps": spec.get("max_episode_steps")}
    references = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None not in references and not references[0] < references[1]:
        raise ValueError(f"reference scores {references}")
    return episodes, {
        "id": spec.get("id"),
        "kwargs": {name: value for name, value in kwargs.items() if value is not None},
        "references": None if None in references else references,
    }


def d4rl_episodes(path):
    """Episodes and environment of a D4RL file: they end at `terminals` or `timeouts`; a trailing one is kept."""
    with h5py.File(path) as file:
        check_continuous(file["actions"], path)
        obs, action, reward = flat_array(file["observations"]), flat_array(file["actions"]), file["rewards"][()]
        terminated = file["terminals"][()].astype(bool)
        timeout = file["timeouts"][()].astype(bool) if "timeouts" in file else np.zeros_like(terminated)
        next_obs = flat_array(file["next_observations"]) if "next_observations" in file else None
    episodes = []
    for i, j in pairwise(sorted({0, len(reward), *(np.flatnonzero(terminated | timeout) + 1)})):
        s_next = next_observations(obs[i:j], terminated[i:j]) if next_obs is None else next_obs[i:j]
        episodes.append((obs[i:j], action[i:j], reward[i:j], terminated[i:j], s_next))
    names = {"halfcheetah": "HalfCheetah-v5", "hopper": "Hopper-v5", "walker2d": "Walker2d-v5"}
    env_id = next((env_id for name, env_id in names.items() if path.name.startswith(name)), None)
    return episodes, {"id": env_id, "kwargs": {}, "references": None}


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


def load_dataset(names, env_id=None, seed=0):
    """All values of --dataset as one Dataset; its environment is that of the first, unless `env_id` is given."""
    episodes, environments = [], []
    for name in names:
        base, _, fraction = name.rpartition(":")
        if not fraction.replace(".", "", 1).isdigit():
            base, fraction = name, "1"
        path = find_dataset(base)
        try:
            loaded, environment = minari_episodes(path) if path.is_dir() else d4rl_episodes(path)
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as e:
            fail(f"dataset {base} is broken ({type(e).__name__}: {e})", "download or write it again")
        if not 0 < float(fraction) <= 1:
            fail(f"fraction {fraction} of dataset {base} is out of range", "give a number in (0, 1]")
        kept = np.random.default_rng(seed).permutation(len(loaded))[: max(1, round(float(fraction) * len(loaded)))]
        episodes += [loaded[i] for i in sorted(kept)]
        environments.append(environment)
    episodes = [episode for episode in episodes if len(episode[4])]  # at least one transition
    widths = {(obs.shape[1], action.shape[1]) for obs, action, *_ in episodes}
    if len(widths) != 1:
        fail(f"the data is empty, or its (observation, action) dimensions differ: {sorted(widths)}", "check --dataset")
    rows = []
    for obs, action, reward, terminated, next_obs in episodes:
        T = len(next_obs)
        if not (T <= len(action) == len(reward) == len(terminated) <= len(obs)):
            fail("an episode has arrays of different lengths", "write the dataset again")
        columns = obs[:T], action[:T], reward[:T, None], next_obs, 1 - np.float32(terminated[:T, None])
        with np.errstate(over="ignore"):  # becomes infinite, and is told as such
            rows.append(np.concatenate(columns, axis=1, dtype=np.float32))
    transitions = np.concatenate(rows)
    episode_returns = np.array([np.sum(reward, dtype=np.float64) for _, _, reward, _, _ in episodes])
    if not (np.isfinite(transitions).all() and np.isfinite(episode_returns).all()):
        fail("the dataset has NaN or infinite values", "clean it first")
    environment = environments[0]
    if env_id and env_id != environment["id"]:
        environment = {"id": env_id, "kwargs": {}, "references": None}
    if environment["id"] and not environment["references"]:
        environment["references"] = D4RL_REFERENCES.get(environment["id"].split("-")[0].split("_")[0])
    return Dataset(transitions, np.array([len(row) for row in rows]), episode_returns, *widths.pop(), environment)


def actions_of(dataset):
    """View (N, A) of the actions in the packed transitions."""
    return dataset.transitions[:, dataset.obs_dim : dataset.obs_dim + dataset.action_dim]


def fit_to_environment(dataset):
    """Checks the dataset against its evaluation environment, and scales its actions to [-1, 1] in place."""
    environment = dataset.environment
    if not environment["id"]:
        fail("the dataset names no environment", "give --env-id, or --eval-episodes 0 to train without evaluation")
    env, dims = make_env(environment), (dataset.obs_dim, dataset.action_dim)
    if dims != (env.observation_space.shape[0], env.action_space.shape[0]):
        fail(f"the dataset's (observation, action) dimensions {dims} are not {environment['id']}'s", "give --env-id")
    low, high = env.unwrapped.action_space.low, env.unwrapped.action_space.high
    if not (np.all(low == -1) and np.all(high == 1)):
        actions_of(dataset)[:] = 2 * (actions_of(dataset) - low) / (high - low) - 1


def report_sampling(dataset, probabilities, writer, num_bins=50):
    """Prints the returns in the dataset and under the sampler; both distributions go to TensorBoard (ReD, Figure 1)."""
    returns, references = np.repeat(dataset.episode_returns, dataset.episode_lengths), dataset.environment["references"]
    for what, value in (
        (f"average of {len(dataset.episode_returns):,} episodes", dataset.episode_returns.mean()),
        ("best episode", returns.max()),
        ("average drawn transition's episode", returns @ probabilities),
    ):
        print(f"return of the {what}: {value:.1f}{score_text(normalized_score(value, references))}")
    never = probabilities == 0
    if never.any():
        share = f"{never.sum():,} of the {len(never):,} transitions ({never.mean():.1%})"
        print(f"warning: {share} have probability 0 and are never drawn", file=sys.stderr)
    edges = np.histogram_bin_edges(returns, num_bins)
    for tag, mass in (("transitions", np.ones(len(returns))), ("sampler_mass", probabilities * len(returns))):
        counts = np.histogram(returns, edges, weights=mass)[0]
        moments = dict(num=mass.sum(), sum=returns @ mass, sum_squares=returns**2 @ mass)
        buckets = dict(bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist())
        writer.add_histogram_raw(f"data/{tag}_by_return", returns.min(), returns.max(), **moments, **buckets)


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, the same text in every script: flags, environments, evaluation, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).stem

# D4RL's returns of a random and of an expert policy, the 0 and the 100 of a normalised score (Fu et al., 2020)
D4RL_REFERENCES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "AntMaze": (0.0, 1.0),
    "FrankaKitchen": (0.0, 4.0),
    "AdroitHandPen": (96.262799, 3076.8331),
    "AdroitHandHammer": (-274.856578, 12794.134825),
    "AdroitHandDoor": (-56.512833, 2880.569309),
    "AdroitHandRelocate": (-6.425911, 4233.877798),
}

# packages outside gymnasium that register environments, and what the ids of these begin with
ENV_PACKAGES = {
    "gymnasium_robotics": ("PointMaze", "AntMaze", "AdroitHand", "FrankaKitchen", "Fetch", "Hand"),
    "shimmy": ("dm_control/",),
    "ale_py": ("ALE/",),
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


def make_env(environment, **make_kwargs):
    """gym.make by registered id and plain keyword arguments; flat observations, actions in [-1, 1]."""
    env_id, kwargs = environment["id"], environment["kwargs"]
    package = next((name for name, prefixes in ENV_PACKAGES.items() if env_id.startswith(prefixes)), None)
    try:
        if package:
            gym.register_envs(__import__(package))
        env = gym.make(env_id, **kwargs, **make_kwargs)
    except ImportError as e:
        fail(f"environment {env_id} needs a package that is not installed ({e})", f"pip install {package or e.name}")
    except Exception as e:  # environments raise what they like on bad arguments
        fail(f"environment {env_id} cannot be made ({e})", "check the id against gymnasium.pprint_registry()")
    if not isinstance(env.action_space, gym.spaces.Box):
        fail(f"environment {env_id} has {type(env.action_space).__name__} actions", "use one with continuous actions")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if not (np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)):
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


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


def run_episodes(policy, environment, env_seeds, video_dir=None):
    """(return, length) of one episode per environment seed; policy.act maps (1, E, O) to (1, E, A) in [-1, 1].

    The episodes step side by side, and the batch keeps its size when some are over, so that nobody's rounding
    depends on when the others end.
    """
    policy = pickle.loads(policy) if isinstance(policy, bytes) else policy  # as workers get it
    envs = [make_env(environment, render_mode="rgb_array" if video_dir else None) for _ in env_seeds]
    if video_dir:
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(video_dir), name_prefix=f"episode-{env_seeds[0]}")
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, env_seeds)]).astype(np.float32)
    returns, lengths, running = np.zeros(len(envs)), np.zeros(len(envs), int), np.ones(len(envs), bool)
    while running.any():
        with torch.no_grad():
            actions = policy.act(torch.from_numpy(obs)[None])[0].numpy()
        for i in np.flatnonzero(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i], lengths[i], running[i] = returns[i] + reward, lengths[i] + 1, not (terminated or truncated)
    for env in envs:
        env.close()
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


class Evaluator:
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
                jobs.append(self.pool.submit(run_episodes, *job) if self.pool else Future())
            if not self.pool:
                jobs[-1].set_result(run_episodes(*job))
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


def print_result(args, run_dir, num_updates, rate):
    """The last line of a run: what it reached, what the number means, how fast, and where the rest is."""
    text = ""
    if args.eval_episodes and (run_dir / "evaluations.csv").read_text().count("\n") > 1:
        update, seed, _, returns, _, scores = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1).T
        last = np.unique(update)[-10:]
        rows = [(seed == s) & np.isin(update, last) for s in np.unique(seed)]
        score, mean = ([x[of_seed].mean() for of_seed in rows] for x in (scores, returns))
        if not np.isnan(score).any():
            text = f"normalised score {np.mean(score):.1f} ± {np.std(score):.1f} (0: random policy, 100: expert), "
        text += f"return {np.mean(mean):.1f} ± {np.std(mean):.1f} (mean ± standard deviation over {args.num_seeds} "
        text += f"seed(s) of the mean over the last {len(last)} evaluations of {args.eval_episodes} episodes), "
    print(f"{text}{num_updates:,} updates, {rate:.0f} updates/s per seed, run folder {run_dir}")


def evaluate_run(args, agent_class):
    """--evaluate: fresh episodes of the policies in a run's checkpoint."""
    run_dir = Path(args.evaluate)
    environment = json.loads((run_dir / "config.json").read_text())["environment"]
    if not environment["id"]:
        fail(f"{run_dir} is a run without environment", "evaluate a run that has one")
    env = make_env(environment)
    agent = agent_class(env.observation_space.shape[0], env.action_space.shape[0], args, torch.device("cpu"))
    agent.load_state_dict(load_checkpoint(run_dir, "cpu")["agent"])
    video_dir = run_dir / "videos" if args.capture_video else None
    if video_dir and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    for s in range(args.num_seeds):
        env_seeds = [episode_seed(args.seed + s, 2**31, e) for e in range(args.eval_episodes or 10)]
        try:
            results = run_episodes(policy_of_seed(agent.actor, s), environment, env_seeds, video_dir)
        except Exception as e:  # each graphics library fails in its own way
            if not video_dir:
                raise
            with contextlib.suppress(OSError):
                video_dir.rmdir()  # if it is empty
            fail(f"no video can be rendered ({e})", "set MUJOCO_GL to egl or osmesa, or leave out --capture-video")
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
# Plumbing of the online scripts: environments to learn in, and what was seen there as a Minari dataset
# ---------------------------------------------------------------------------------------------------------------------


class Interaction:
    """One environment per seed, stepped side by side, and the log of all that they gave."""

    def __init__(self, environment, replay, args, checkpoint=None):
        """replay (S, T, O + A + 1 + O + 1): where the packed steps go; checkpoint: has a state() to go on from."""
        self.seed, self.replay, self.t = args.seed, replay, 0
        self.ends = np.zeros(replay.shape[:2], np.uint8)  # 0 not at all, 1 terminated, 2 truncated
        self.envs = [make_env(environment) for _ in replay]
        self.episode_number, self.episode_return = np.zeros(len(replay), int), np.zeros(len(replay))
        if checkpoint:
            self.t, self.episode_number = checkpoint["t"], checkpoint["episode_number"].numpy()
            replay[:, : self.t], self.ends[:, : self.t] = checkpoint["replay"], checkpoint["ends"].numpy()
        self.obs = np.float32([self.reset(s) for s in range(len(replay))])  # (S, O)
        # an environment's state is the seed of its episode and the actions since: a resumed run plays them again
        obs_dim, action_dim = self.obs.shape[1], self.envs[0].action_space.shape[0]
        for s, env in enumerate(self.envs):
            start = np.flatnonzero(np.r_[1, self.ends[s, : self.t]])[-1]
            for action in replay[s, start : self.t, obs_dim : obs_dim + action_dim].cpu().numpy():
                self.obs[s], reward, *_ = env.step(action)
                self.episode_return[s] += reward

    def reset(self, s):
        """First observation of the episode that the environment of seed s is at."""
        return self.envs[s].reset(seed=episode_seed(self.seed + s, 0, int(self.episode_number[s]), 1))[0]

    def step(self, actor, noise):
        """One step of every environment, with actor.sample(obs, noise); noise (S, ...): standard normal, as it wants.

        Returns [(seed, return), ...] of the episodes that end with it."""
        with torch.no_grad():
            obs = torch.from_numpy(self.obs[:, None]).to(self.replay.device)
            actions = actor.sample(obs, noise)[:, 0].cpu().numpy()
        rows, finished = [], []
        for s, (env, action) in enumerate(zip(self.envs, actions)):
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(np.concatenate([self.obs[s], action, [reward], next_obs, [not terminated]], dtype=np.float32))
            self.obs[s], self.episode_return[s] = next_obs, self.episode_return[s] + reward
            if terminated or truncated:
                self.ends[s, self.t] = 1 if terminated else 2
                finished.append((self.seed + s, self.episode_return[s]))
                self.episode_number[s] += 1
                self.obs[s], self.episode_return[s] = self.reset(s), 0
        self.replay[:, self.t] = torch.from_numpy(np.stack(rows)).to(self.replay.device)
        self.t += 1
        return finished

    def state(self):
        """What an exact continuation needs beside t."""
        return {
            "episode_number": torch.from_numpy(self.episode_number),
            "replay": self.replay[:, : self.t].clone(),
            "ends": torch.from_numpy(self.ends[:, : self.t].copy()),
        }


def split_episodes(rows, ends, widths):
    """One environment's packed transitions (T, width), cut after every end (T,) {0 none, 1 terminated, 2 truncated}.

    Returns [(observations (T_i + 1, O), actions, rewards, terminations, truncations), ...]; the unfinished last
    episode is kept and counts as truncated.
    """
    cuts = sorted({0, len(rows), *(np.flatnonzero(ends) + 1)})
    episodes = []
    for first, last in pairwise(cuts):
        obs, action, reward, next_obs, _ = np.split(rows[first:last], np.cumsum(widths)[:-1], axis=1)
        terminated, truncated = ends[first:last] == 1, ends[first:last] == 2
        truncated[-1] = not terminated[-1]
        episodes.append((np.concatenate([obs, next_obs[-1:]]), action, reward[:, 0], terminated, truncated))
    return episodes


def compact_hdf5(path):
    """Rewrites Minari's file in HDF5's newest layout and compressed: half the size where episodes are short."""
    with h5py.File(path) as old, h5py.File(path.with_suffix(".tmp"), "w", libver="latest") as new:

        def copy_item(name, item):
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[()], compression="gzip", shuffle=True)
            else:
                new.require_group(name).attrs.update(item.attrs)

        old.visititems(copy_item)
    os.replace(path.with_suffix(".tmp"), path)


def save_minari(path, episodes, environment, references, description):
    """Writes episodes, as split_episodes returns them, to a new folder `path` that Minari and our scripts can read.

    references: returns of a random and of the best policy. Actions are written in the environment's own units.
    """
    import minari

    space = make_env(environment).unwrapped.action_space
    if not (np.all(space.low == -1) and np.all(space.high == 1)):
        scaled = [(o, space.low + (a + 1) / 2 * (space.high - space.low), *rest) for o, a, *rest in episodes]
        episodes = [(o, np.float32(a), *rest) for o, a, *rest in scaled]
    keys = "observations", "actions", "rewards", "terminations", "truncations"
    buffers = [minari.data_collector.EpisodeBuffer(id=i, **dict(zip(keys, e))) for i, e in enumerate(episodes)]
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"] = root  # Minari writes below this folder only
        minari.create_dataset_from_buffers(
            "new-v0",
            buffers,
            env=environment["id"],
            eval_env=environment["id"],
            observation_space=gym.spaces.Box(-np.inf, np.inf, episodes[0][0].shape[1:], np.float32),
            action_space=gym.spaces.Box(space.low, space.high, dtype=np.float32),
            ref_min_score=references[0],
            ref_max_score=references[1],
            algorithm_name=SCRIPT,
            author=f"algorithms/{SCRIPT}.py",
            author_email="unknown",
            code_permalink="unknown",
            description=description,
        )
        compact_hdf5(Path(root) / "new-v0" / "data" / "main_data.hdf5")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(root) / "new-v0", path)
    returns = [e[2].sum() for e in episodes]
    print(
        f"{len(episodes):,} episodes, {sum(len(e[2]) for e in episodes):,} transitions, return "
        f"{np.mean(returns):.1f} ± {np.std(returns):.1f}, best {np.max(returns):.1f} -> {path}"
    )


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


def run_updates(agent, transitions, args, index, *noise):
    """One update per row of index (m, S, B) and of what else it reads at random (m, ...); the metrics of the last."""
    for row, *row_noise in zip(index, *noise):
        metrics = update(agent, F.embedding(row, transitions), *row_noise, args)  # one gather of whole rows
    return metrics


def updates_after(t, args):
    """Gradient steps that t environment steps pay for: none until the first epoch is full, then first_updates."""
    epochs = t // args.steps_per_epoch
    return args.first_updates + (epochs - 1) * args.updates_per_epoch if epochs else 0


def union_rows(u, t, num_offline, num_steps):
    """Rows of batches that are uniform over the offline data and t online steps: u (n, S, B) float64, uniform on [0, 1)
    -> (n, S, B) int64.

    The table has num_offline rows for all seeds; behind these, num_steps rows of each seed, of which t are filled.
    """
    row = (u * (num_offline + t)).long()
    seed_offset = num_steps * torch.arange(u.shape[1], device=u.device)[:, None]  # (S, 1)
    return row + seed_offset * (row >= num_offline)


def main():
    args = parse_args()
    check_range(args, 1, math.inf, "num_seeds", "num_updates", "batch_size", "hidden_sizes", "vae_hidden_sizes")
    check_range(args, 1, math.inf, "num_next_actions", "num_candidates", "steps_per_epoch", "updates_per_epoch")
    check_range(args, 1, math.inf, "first_updates", "eval_every", "online_eval_every", "checkpoint_every", "log_every")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 0, math.inf, "kl_weight", "latent_clip", "online_steps", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "learning_rate", "gamma", "polyak", "min_weight")
    check_range(args, 0, 2, "max_perturbation")
    if args.evaluate:
        return evaluate_run(args, BCQAgent)
    T = -(-args.online_steps // args.steps_per_epoch) * args.steps_per_epoch  # whole epochs
    if args.save_online and not T:
        fail("--save-online, but no step is made online", "give --online-steps")
    if args.save_online and Path(args.save_online).exists():
        fail(f"{args.save_online} is there already", "give another folder to write the dataset to")
    checkpoint = load_checkpoint(args.resume, "cpu") if args.resume else {"num_updates": 0, "t": 0}
    num_updates = first_update = checkpoint["num_updates"]  # offline and online together
    t = checkpoint["t"]  # environment steps
    if num_updates > args.num_updates and not t:
        fail(f"{args.resume} has {num_updates} updates already", "give a larger --num-updates, or leave it out")
    if t and args.num_updates != checkpoint["offline_updates"]:
        fail(f"{args.resume} went online after {checkpoint['offline_updates']} updates", "give this --num-updates")
    if t > T:
        fail(f"{args.resume} has {t} steps already", "give a larger --online-steps, or leave it out")
    device, S = choose_device(args.device), args.num_seeds
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # data, on the device, with room behind it for the online steps of every seed
    dataset = load_dataset(args.dataset, args.env_id, args.seed)
    if args.eval_episodes or args.online_steps or dataset.environment["id"]:
        fit_to_environment(dataset)
    num_offline, A, B = len(dataset.transitions), dataset.action_dim, args.batch_size
    transitions = torch.zeros(num_offline + S * T, dataset.transitions.shape[1], device=device)
    transitions[:num_offline] = torch.from_numpy(dataset.transitions)
    replay = transitions[num_offline:].view(S, T, transitions.shape[1])

    # agents, in a run folder that is new or goes on from its checkpoint
    agent = BCQAgent(dataset.obs_dim, A, args, device)
    name = "+".join(args.dataset).replace("/", "-").replace(":", "-").strip("-.")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, name, dataset.environment)

    def new_generators(stage):
        """A random generator for each seed, which has nothing to do with those of the other stage (0 or 1)."""
        seeds = [episode_seed(args.seed + s, stage) for s in range(S)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def axis():
        """Where the curves are: at an update of the offline stage, afterwards at a step of the environments."""
        return args.num_updates + t if t else num_updates

    def save():
        """Everything that an exact continuation needs; generator_states are those before the current block."""
        state = {
            "num_updates": num_updates,
            "t": t,
            "offline_updates": args.num_updates,
            "agent": agent.state_dict(),
            "generators": generator_states,
            "pending_evaluations": {update: past for update, (past, _) in evaluator.pending.items()},
            **(interaction.state() if interaction else {}),
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    writer = SummaryWriter(run_dir, purge_step=axis() + 1)
    evaluator = Evaluator(args, dataset.environment, run_dir, writer)
    report_sampling(dataset, np.full(num_offline, 1 / num_offline), writer)
    interaction = Interaction(dataset.environment, replay, args, checkpoint if t else None) if T else None
    generators = new_generators(1 if t else 0)
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        for generator, state in zip(generators, checkpoint["generators"]):
            if len(state) == len(generator.get_state()):  # else it comes from another kind of device: new draws
                generator.set_state(state.cpu())
        within_epoch = t > 0 and num_updates < args.num_updates + updates_after(t, args)  # its evaluation is to come
        evaluator.resume(axis() - within_epoch, checkpoint["pending_evaluations"], agent.actor)
    generator_states = [generator.get_state() for generator in generators]
    if not args.resume:
        save()

    keep_freed_memory()
    noise_shapes = (B, 2 * A), (args.num_next_actions + 1, B, 2 * A)
    learn, graph, actor = partial(run_updates, agent, transitions, args), None, agent.actor
    last_update = args.num_updates + updates_after(T, args)
    started, printed, block_start, stopped, rate = time.time(), time.time(), -1, False, 0
    while num_updates < last_update and not stopped:
        # act until the epoch is full; a resumed run draws the noise of the epoch it is in again
        if num_updates == args.num_updates + updates_after(t, args):
            generators = generators if t else new_generators(1)
            generator_states = [generator.get_state() for generator in generators]
            shape = args.steps_per_epoch, args.num_candidates, 2 * A
            noise = [torch.randn(shape, generator=generator, device=device) for generator in generators]
            for step_noise in torch.stack(noise, 1)[t % args.steps_per_epoch :]:  # (S, num_candidates, Z)
                finished, t = interaction.step(actor, step_noise), interaction.t
                for seed, episode_return in finished:
                    writer.add_scalar(f"train/return_seed{seed}", episode_return, axis())
                if stop:
                    break
            if t % args.steps_per_epoch == 0:
                generator_states = [generator.get_state() for generator in generators]
            if stop:
                stopped = True
                save()
            continue

        # draw, a block of updates at a time; a resumed run draws the block it is in again
        epoch_start, epoch_end = 0, args.num_updates
        if t:
            epoch_start, epoch_end = (args.num_updates + updates_after(n, args) for n in (t - 1, t))
        in_block = (num_updates - epoch_start) % UPDATES_PER_BLOCK
        if block_start != num_updates - in_block:
            block_start = num_updates - in_block
            generator_states = [generator.get_state() for generator in generators]
            sampler = partial(union_rows, t=t, num_offline=num_offline, num_steps=T)
            block = draw_block(sampler, generators, B, *noise_shapes)
            if device.type == "cuda" and not graph:
                graph = cuda_graph(learn, agent, *(x[:UPDATES_PER_GRAPH] for x in block))

        # learn, until the block ends or something else is due
        due = [n - num_updates % n for n in (args.eval_every, args.checkpoint_every, args.log_every)]
        end = num_updates + min(*due, block_start + UPDATES_PER_BLOCK - num_updates, epoch_end - num_updates)
        while num_updates < end:
            n = min(UPDATES_PER_GRAPH, end - num_updates)
            inputs = [x[num_updates - block_start :][:n] for x in block]
            metrics = graph(*inputs) if graph and n == UPDATES_PER_GRAPH else learn(*inputs)
            num_updates += n
            if stop:
                break
        done, stopped = num_updates == last_update, bool(stop)

        # evaluate, log, save
        stage_over = num_updates == args.num_updates or done
        since = t % args.online_eval_every  # environment steps since an evaluation was due
        evaluate = num_updates % args.eval_every == 0
        if t:
            evaluate = num_updates == epoch_end and since < args.steps_per_epoch
        if evaluate or stage_over:
            evaluator.submit(axis(), actor)
        evaluator.collect(wait=done)
        if num_updates % args.log_every == 0:
            for tag, value in metrics.items():
                writer.add_scalar(tag, value.mean().item(), axis())
        rate = (num_updates - first_update) / (time.time() - started)
        if time.time() - printed > 5 or done:
            printed = time.time()
            left = timedelta(seconds=int((last_update - num_updates) / rate))
            place = f"update {num_updates:,}/{last_update:,}, {rate:.0f} updates/s, {left} left"
            print(place + f", step {t:,}/{T:,}" * (T > 0), flush=True)
        if num_updates % args.checkpoint_every == 0 or stage_over or stopped:
            # the next block is still to be drawn
            if num_updates == block_start + UPDATES_PER_BLOCK or (t and num_updates == epoch_end):
                generator_states = [generator.get_state() for generator in generators]
            save()

    evaluator.collect(wait=not stopped)
    evaluator.close()
    writer.close()
    if num_updates < last_update:
        print(f"stopped at update {num_updates:,}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    if args.save_online:
        episodes = split_episodes(replay[0].cpu().numpy(), interaction.ends[0], agent.widths)
        returns = [float(reward.sum()) for _, _, reward, _, _ in episodes]
        references = dataset.environment["references"] or (min(returns), max(returns))
        description = f"Online data: {shlex.join(sys.argv)} (BCQ, {T} steps, seed {args.seed})"
        save_minari(args.save_online, episodes, dataset.environment, references, description)
    print_result(args, run_dir, num_updates, rate)


if __name__ == "__main__":
    main()
