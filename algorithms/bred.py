"""BRED: offline-to-online RL by balanced replay and ensemble distillation.

Papers: S. Lee, Y. Seo, K. Lee, P. Abbeel, J. Shin, "Addressing Distribution Shift in Online Reinforcement Learning with
Offline Datasets", NeurIPS Workshop on Offline Reinforcement Learning, 2020 (BRED; equation numbers below are that
paper's); A. Kumar, A. Zhou, G. Tucker, S. Levine, "Conservative Q-Learning for Offline Reinforcement Learning", 2020,
arXiv:2006.04779 (CQL).

Idea. An agent that was trained offline meets states online that its data does not have, believes wrong values there,
and may lose its good policy before it learns better ones. BRED has two remedies. Offline and online transitions stay in
separate buffers, and an annealed share of every batch comes from either: new states are learned at once, old ones are
not forgotten. And N agents are trained offline, independent of each other; their policies are distilled into one, which
online climbs the mean of all N critics, whose errors in unknown states differ. So there are three stages: CQL (soft
actor-critic with critics that are pessimistic about actions outside the data), N times; distillation; and fine-tuning
by soft actor-critic, without pessimism.

Objectives (S seeds, N members of the ensemble, B batch, O observation, A action; P policies per seed: N offline, 1 when
distilled; G = S P policies in all, with the critics of M = N / P members each; Q is either of a member's two critics,
min Q the smaller, min Q_i member i's; a~ and a' are drawn from the policy at s and s'; alpha is SAC's temperature):
  offline, for every member
    critic       y = r + gamma (1 - terminated) min Q_target(s', a')                                               (5)
                 L = sum over both critics of mean (y - Q(s, a))^2 + cql_alpha gap                                 (4)
                 gap = mean (log sum_k exp(Q(s, a_k) - log mu(a_k)) - Q(s, a)), where 3 n actions a_k are sampled:
                 n uniformly, n from pi(.|s), n from pi(.|s'); log mu is their log-density               (6), CQL (4)
    policy       L = mean (alpha log pi(a~|s) - min Q(s, a~))                                                      (3)
                 in the first bc_updates updates with log pi(a|s) of the logged action in place of min Q
  distillation, of Gaussians before the tanh
    policy       L = mean (|mean(s) - mixture_mean(s)|^2 + |std(s) - mixture_std(s)|^2)                            (8)
                 mixture_mean, mixture_std: those of the members' N Gaussians, drawn from with equal chance        (9)
  online, after every 1,000 steps of the environment: 1,000 updates, the first time 10,000 (t: steps so far)
    replay       a share rho_t = rho_0 + (1 - rho_0) min(t, t_final) / t_final of the batch is online data         (7)
    critic       y_i = r + gamma (1 - terminated) (min Q_target_i(s', a') - alpha log pi(a'|s'))                   (2)
                 L = sum over members and both critics of mean (y_i - Q(s, a))^2                                   (1)
    policy       L = mean (alpha log pi(a~|s) - mean over the policy's members of min Q_i(s, a~))            (10), (11)
  offline and online
    temperature  L = -mean log_alpha (log pi(a~|s) + target_entropy),  target_entropy = -A
    targets      Q_target <- (1 - polyak) Q_target + polyak Q
In each update all gradients belong to the same old parameters.

What differs from the papers and their code, and why.
    - The paper does not say in which space the means and deviations of (8) and (9) live. Here it is before the tanh,
      where the policies are Gaussian. Deviations stay below e^2, as every policy's do.
    - (9) is computed as the mean variance plus the variance of the means: the same number, which rounding cannot make
      negative. Where members disagree the distilled policy explores more; that is intended.
    - The paper does not print CQL's weight, the patience of early stopping, its validation data, or which rho_0 and
      which step size belong to which task: the defaults are choices, for Hopper and Walker2d. One state in ten
      validates (at most about 10,000); every seed stops for itself and keeps its best student.
    - The Bellman error has no factor 1/2, as in CQL's code: cql_alpha is twice the paper's alpha.
    - Every member has twin critics and takes the smaller one, as SAC and CQL do; the paper writes one Q per member.
    - Temperatures go on from the geometric mean of the members' trained ones; alpha = 1 (--init-alpha 1) is a large
      bonus for entropy, which moves a trained policy away.
    - From CQL's code: the policy's first updates clone (--bc-updates), for which logged actions are clipped to +-0.999;
      online actions are not clipped.
    - N = 1 has nothing to distil: its policy goes on as it is, as in the paper.
    - `--policy independent` is the paper's ensemble without distillation: a step is drawn from N(mixture_mean,
      mixture_std), and every policy climbs its own member's critics, all on the same batch.
    - Bootstrapping goes on through time limits (truncation) and stops at true ends (termination).
    - Every member draws weights and batches from its own generator, which depends on its number and seed alone: the two
      members of `--num-agents 2` are the first two of five, and a seed gives the same run alone or with others.
    - evaluations.csv counts updates offline, and goes on counting with the steps of the environment. The row at
      num_updates is the distilled policy, before any online step; the rows before it are the members' mixture.

Reading:  the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:      python algorithms/bred.py --dataset hopper/replay-v0
CQL-ft:   python algorithms/bred.py --num-agents 1 --replay uniform --first-updates 1000
Ablation: python algorithms/bred.py --offline runs/bred/RUN --replay online-only
Expected: from 20 to 23 ± 9, and from 4 to 26 ± 3 on halfcheetah/replay-v0, in the small setting of benchmarks.md's grid
          bred: 20,000 updates offline, as many steps online, networks of 2x64, N = 2. With these defaults (grid
          bred_paper): not run yet.
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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Literal

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
    """first seed; run k uses seed + k"""
    num_seeds: int = 1
    """runs, each with its own ensemble, side by side in one batched computation (the axis S)"""
    num_agents: int = 5
    """members of the ensemble (N); 1 is plain CQL, with nothing to distil"""
    batch_size: int = 256
    """transitions per update: of each member offline, of each seed afterwards (the axis B)"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of every network (halfcheetah-medium-expert: 256 256 256)"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.005
    """share of the online critics in their targets at every update (tau)"""
    learning_rate: float = 3e-4
    """Adam step size of the critics, offline and online, and of distillation"""
    num_updates: Annotated[int, tyro.conf.arg(aliases=["--offline-updates"])] = 1_000_000
    """gradient steps of the offline stage"""
    offline: str | None = None
    """start from the trained members of this run (the first num_agents of them); takes its offline flags over"""
    policy_learning_rate: float = 1e-4
    """offline: Adam step size of policies and temperatures"""
    cql_alpha: float = 5.0
    """offline: weight of the conservative gap, twice the paper's alpha (CQL's code: 5 or 10)"""
    num_action_samples: int = 10
    """offline: actions at each state from each of the three sources of the gap (n)"""
    bc_updates: int = 40_000
    """offline: in the first updates the policy clones logged actions instead of climbing Q, as in CQL's code"""
    distil_epochs: int = 1_000
    """distillation: at most so many epochs, of updates_per_epoch gradient steps each"""
    distil_patience: int = 20
    """distillation: it is over after so many epochs in a row without a better validation loss"""
    online_steps: int = 250_000
    """online: environment steps per seed, rounded up to whole epochs"""
    steps_per_epoch: int = 1_000
    """online: environment steps before each block of updates"""
    updates_per_epoch: int = 1_000
    """gradient steps in an epoch"""
    first_updates: int = 10_000
    """online: gradient steps in the first epoch (baselines like CQL-ft: 1,000)"""
    replay: Literal["balanced", "uniform", "online-only"] = "balanced"
    """online: batches by eq. (7), uniform over offline and online data together, or online data alone"""
    initial_online_fraction: float = 0.5
    """online data's share of a batch at first (rho_0); halfcheetah: 0.75"""
    anneal_steps: int = 125_000
    """environment steps until batches are all online data (t_final)"""
    policy: Literal["distilled", "independent"] = "distilled"
    """online: one policy that climbs the mean of all members, or N policies that climb one member each"""
    online_policy_learning_rate: float = 3e-5
    """online: Adam step size of policy and temperature; halfcheetah: 3e-4, medium-expert data: 5e-6"""
    init_alpha: float | None = None
    """online: first temperature; default: the members' geometric mean after the offline stage"""
    save_online: str | None = None
    """when done, write the online data of the first seed to this folder, as a Minari dataset"""
    eval_every: int = 5_000
    """offline: updates between evaluations"""
    online_eval_every: int = 1_000
    """online: environment steps between evaluations, which wait for the end of an epoch"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, with the policy's deterministic action; 0: never evaluate"""
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
    """where the results go; default runs/bred/<dataset>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos"""


# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "online_steps", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video", "save_online"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: one policy from many, and batches that move from offline to online data
# ---------------------------------------------------------------------------------------------------------------------


def mixture_moments(mean, std):
    """Mean and deviation of the mixture of a seed's policies, eq. (9): (S, P, B, A) each -> (S, B, A) each."""
    mixture_mean = mean.mean(1)
    variance = (std.square() + (mean - mixture_mean[:, None]).square()).mean(1)
    return mixture_mean, variance.sqrt().clamp(max=math.exp(2))


def online_fraction(t, args):
    """rho_t, the share of online data in a batch after t environment steps, eq. (7)."""
    rho_0 = args.initial_online_fraction
    return rho_0 + (1 - rho_0) * min(t, args.anneal_steps) / args.anneal_steps


def replay_rows(u, t, num_offline, num_steps, args):
    """Rows for batches: u (n, S, B) float64, uniform on [0, 1) -> (n, S, B) int64.

    The table has num_offline rows for all seeds; behind these, num_steps rows of each seed, of which t are filled.
    """
    if args.replay == "uniform":
        row = (u * (num_offline + t)).long()
    else:
        share = 1 if args.replay == "online-only" else online_fraction(t, args)
        is_online = torch.arange(args.batch_size, device=u.device) < round(args.batch_size * share)
        row = torch.where(is_online, num_offline + (u * t).long(), (u * num_offline).long())
    seed_offset = num_steps * torch.arange(u.shape[1], device=u.device)[:, None]  # (S, 1)
    return row + seed_offset * (row >= num_offline)


def updates_after(t, args):
    """Gradient steps that t environment steps pay for: none until the first epoch is full, then first_updates."""
    epochs = t // args.steps_per_epoch
    return args.first_updates + (epochs - 1) * args.updates_per_epoch if epochs else 0


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


class ManyActionCritic(MLP):
    """Q(s, a) for K actions at each state. The first layer is linear in [s, a]: its state part is made once for all."""

    def forward(self, obs, actions):
        """obs (S, B, O), actions (S, K, B, A) -> (S, C, K, B)."""
        (S, C), (K, B) = self.lead, actions.shape[1:3]
        obs, actions = (x[:, None].expand(-1, C, -1, -1).flatten(0, 1) for x in (obs, actions.flatten(1, 2)))
        layers = [(weight.flatten(0, 1), bias.flatten(0, 1)) for weight, bias in self.layers]  # (S * C, in, out)
        weight, bias = layers[0]
        obs_weight, action_weight = weight.split([obs.shape[-1], actions.shape[-1]], dim=1)
        x = torch.baddbmm(bias, obs, obs_weight).repeat(1, K, 1)
        x = x.baddbmm_(actions, action_weight)  # (S * C, K * B, hidden units): this is where the memory goes
        for weight, bias in layers[1:-1]:
            x = torch.baddbmm(bias, x.relu_(), weight)
        weight, bias = layers[-1]
        return ((x.relu_() * weight.mT).sum(-1) + bias.squeeze(-1)).view(S, C, K, B)


class ManyActionActor(nn.Module):
    """pi(a|s): a = tanh(mean(s) + std(s) * noise), as many actions at each state as there is noise for."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, init, generators):
        super().__init__()
        self.net = MLP((len(generators),), [obs_dim, *hidden_sizes, 2 * action_dim], init, generators)

    def forward(self, obs):
        """obs (S, B, O) -> mean, log_std, each (S, B, A), before the tanh."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs, noise):
        """obs (S, B, O), standard normal noise (S, K, B, A) -> K actions at each state (S, K, B, A), log-probabilities
        (S, K, B)."""
        mean, log_std = (x[:, None] for x in self(obs))  # (S, 1, B, A) each
        pre_tanh = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # log(1 - tanh^2), stable
        return pre_tanh.tanh(), log_prob.sum(-1)

    def log_prob(self, obs, action):
        """log pi(a|s): obs (S, B, O), action (S, B, A) inside (-1, 1) -> (S, B)."""
        mean, log_std = self(obs)
        z = (action.atanh() - mean) * (-log_std).exp()
        log_prob = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi) - torch.log1p(-(action**2))
        return log_prob.sum(-1)


class MixtureActor(nn.Module):
    """What acts for a seed: its P policies as one Gaussian with the moments of their mixture, eq. (9), then tanh."""

    def __init__(self, policies, num_policies):
        super().__init__()
        self.net = copy.deepcopy(policies.net)
        self.net.lead = (-1, num_policies)  # (S, P): all policies of a seed see the same observations
        for mine, theirs in zip(self.net.parameters(), policies.net.parameters()):
            mine.data = theirs.data.unflatten(0, self.net.lead)  # shares memory with the policies

    def forward(self, obs):
        """obs (S, B, O) -> mean, std, each (S, B, A), before the tanh."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)  # (S, P, B, A) each
        return mixture_moments(mean, log_std.clamp(-20, 2).exp())

    def sample(self, obs, noise):
        """obs (S, B, O), standard normal noise (S, B, A) -> action (S, B, A) to explore with."""
        mean, std = self(obs)
        return (mean + std * noise).tanh()

    def act(self, obs):
        """The deterministic action (S, B, A) in [-1, 1] that evaluations use."""
        return self(obs)[0].tanh()


class EnsembleAgent(nn.Module):
    """Networks, temperatures and optimisers of S seeds, with P policies each and M = N / P members' critics per policy.

    All G = S * P policies stand side by side along the first axis, which the networks above call S; policy p of seed s
    is at s * P + p.
    """

    def __init__(self, obs_dim, action_dim, args, device, num_policies, policy_learning_rate):
        super().__init__()
        hidden, num_members = args.hidden_sizes, args.num_agents // num_policies
        generators = [torch.Generator().manual_seed(seed) for seed in member_seeds(args, num_policies)]
        self.num_policies = num_policies
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]  # of a packed transition: s, a, r, s', not terminated
        self.policies = ManyActionActor(obs_dim, action_dim, hidden, fan_in_uniform, generators)
        lead = len(generators), 2 * num_members
        self.critic = ManyActionCritic(lead, [obs_dim + action_dim, *hidden, 1], fan_in_uniform, generators)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(len(generators)))
        self.target_entropy = -float(action_dim)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.float64))
        self.to(device)
        self.optimizers = nn.ModuleDict({
            "alpha": Adam([self.log_alpha], policy_learning_rate),
            "actor": Adam(self.policies.parameters(), policy_learning_rate),
            "critic": Adam(self.critic.parameters(), args.learning_rate),
        })  # fmt: skip

    @property
    def actor(self):
        """What acts and is evaluated; it shares memory with the policies."""
        return MixtureActor(self.policies, self.num_policies)


class Distillation(nn.Module):
    """The members as they are, a student of their policies for each seed, and what early stopping must remember."""

    def __init__(self, obs_dim, action_dim, args, device):
        super().__init__()
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        self.members = offline_agent(obs_dim, action_dim, args, device).requires_grad_(False)
        self.student = ManyActionActor(obs_dim, action_dim, args.hidden_sizes, fan_in_uniform, generators)
        self.best = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("best_loss", torch.full((args.num_seeds,), math.inf))
        self.register_buffer("stale_epochs", torch.zeros(args.num_seeds))
        self.to(device)
        self.optimizers = nn.ModuleDict({"student": Adam(self.student.parameters(), args.learning_rate)})

    @property
    def actor(self):
        """What --evaluate sees of a run that stopped in this stage: the members, as there may be no student yet."""
        return self.members.actor


def member_seeds(args, num_members):
    """A seed for every member of every seed's ensemble, which depends on these two numbers only."""
    return [episode_seed(args.seed + s, 0, i) for s in range(args.num_seeds) for i in range(num_members)]


def distils(args):
    """Whether there is anything to distil."""
    return args.policy == "distilled" and args.num_agents > 1


def offline_agent(obs_dim, action_dim, args, device):
    """The offline stage's agents: S * N independent ones."""
    return EnsembleAgent(obs_dim, action_dim, args, device, args.num_agents, args.policy_learning_rate)


def online_agent(obs_dim, action_dim, args, device):
    """The online stage's agents: S policies with N members' critics each, or again S * N independent ones."""
    num_policies = 1 if args.policy == "distilled" else args.num_agents
    return EnsembleAgent(obs_dim, action_dim, args, device, num_policies, args.online_policy_learning_rate)


STAGES = {"offline": offline_agent, "distil": Distillation, "online": online_agent}


# ---------------------------------------------------------------------------------------------------------------------
# The updates of the three stages
# ---------------------------------------------------------------------------------------------------------------------


def cql_noise_shapes(args, action_dim):
    """Shapes of the standard normal noise that `cql_update` takes for one member: for n random actions, for 1 + n of
    the policy's at s, and for n + 1 at s'."""
    n = args.num_action_samples
    return [(count, args.batch_size, action_dim) for count in (n, 1 + n, n + 1)]


def cql_update(agent, batch, random_noise, noise, next_noise, args):
    """Offline: one gradient step of every member; nothing in here waits for the GPU.

    batch: (S * N, B, O + A + 1 + O + 1) packed transitions; random_noise, noise, next_noise: (S * N, *shape) of
    cql_noise_shapes. Returns a dict of metrics, each (S * N,), on the device.
    """
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)
    reward, not_terminated = reward.squeeze(-1), not_terminated.squeeze(-1)  # (G, B), where G = S * N
    n, A = args.num_action_samples, action.shape[-1]

    # every action of this update comes from the policy as it is now
    policy_action, log_prob = agent.policies.sample(obs, noise)  # (G, 1 + n, B, A), (G, 1 + n, B)
    with torch.no_grad():
        next_action, next_log_prob = agent.policies.sample(next_obs, next_noise)
        random_action = torch.erf(random_noise / math.sqrt(2))  # uniform on [-1, 1]: 2 Phi(noise) - 1

    # temperature: alpha grows while the entropy -log_prob is below its target; this update still has the old alpha
    alpha = agent.log_alpha.detach().exp()[:, None]  # (G, 1)
    entropy_gap = log_prob[:, 0].detach().mean(-1) + agent.target_entropy  # (G,)
    agent.optimizers["alpha"].minimize((-agent.log_alpha * entropy_gap).sum())

    # policy, (3): it climbs the critics before these move
    policy_q = agent.critic(obs, policy_action[:, :1]).amin(1).squeeze(1)  # (G, B)
    if args.bc_updates:  # a tensor decides, so that one CUDA graph fits all updates
        cloning = agent.num_updates < args.bc_updates
        policy_q = torch.where(cloning, agent.policies.log_prob(obs, action), policy_q)
    actor_loss = (alpha * log_prob[:, 0] - policy_q).mean(-1)  # (G,)
    agent.optimizers["actor"].minimize(actor_loss.sum())  # sum over G: neither seeds nor members mix

    # critics, (5): towards the Bellman backup; only a true end of the episode cuts the bootstrap
    with torch.no_grad():
        next_q = agent.target_critic(next_obs, next_action[:, n:]).amin(1).squeeze(1)  # (G, B)
        backup = reward + args.gamma * not_terminated * next_q
        actions = torch.cat([action[:, None], random_action, policy_action[:, 1:], next_action[:, :n]], 1)
        log_uniform = torch.full_like(log_prob[:, 1:], -A * math.log(2))
        log_density = torch.cat([log_uniform, log_prob[:, 1:], next_log_prob[:, :n]], 1)  # (G, 3 n, B)
    q = agent.critic(obs, actions)  # (G, 2, 1 + 3 n, B)
    critic_loss = (q[:, :, 0] - backup[:, None]).square().mean(-1)  # (G, 2)

    # ... and lower at other actions than at the logged ones, (6)
    gap = ((q[:, :, 1:] - log_density[:, None]).logsumexp(2) - q[:, :, 0]).mean(-1)  # (G, 2)
    agent.optimizers["critic"].minimize((critic_loss + args.cql_alpha * gap).sum())

    # targets
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_critic.parameters()), list(agent.critic.parameters()), args.polyak)
        agent.num_updates.add_(1)

    return {
        "loss/actor": actor_loss.detach(),
        "loss/critic": critic_loss.detach().sum(1),
        "loss/conservative_gap": gap.detach().mean(1),
        "value/q": q[:, :, 0].detach().mean((1, 2)),
        "policy/entropy": -log_prob[:, 0].detach().mean(-1),
        "policy/alpha": alpha.squeeze(-1),
    }


def distil_loss(agent, obs):
    """Eq. (8) of every seed's student: obs (S, B, O) -> (S,)."""
    num_members = agent.members.num_policies
    with torch.no_grad():
        members_obs = obs[:, None].expand(-1, num_members, -1, -1).flatten(0, 1)  # (S * N, B, O)
        means, log_stds = (x.unflatten(0, (-1, num_members)) for x in agent.members.policies(members_obs))
        mixture_mean, mixture_std = mixture_moments(means, log_stds.exp())  # (S, B, A) each
    mean, log_std = agent.student(obs)
    error = (mean - mixture_mean).square() + (log_std.exp() - mixture_std).square()
    return error.sum(-1).mean(-1)


def distil_update(agent, batch, args):
    """Distillation: one gradient step of every seed's student on the observations of batch (S, B, ...)."""
    loss = distil_loss(agent, batch[..., : agent.members.widths[0]])  # (S,)
    agent.optimizers["student"].minimize(loss.sum())  # sum over S: seeds never mix
    return {"loss/distillation": loss.detach()}


@torch.no_grad()
def keep_best(agent, obs, args):
    """Early stopping of every seed's student by itself, on held-out obs (S, B, O); returns the validation loss (S,)."""
    loss = distil_loss(agent, obs)
    better = (loss < agent.best_loss) & (agent.stale_epochs < args.distil_patience)  # out of patience: keep the best
    agent.best_loss.copy_(torch.where(better, loss, agent.best_loss))
    agent.stale_epochs.copy_(torch.where(better, 0, agent.stale_epochs + 1))
    for best, now in zip(agent.best.parameters(), agent.student.parameters()):
        best.copy_(torch.where(better[:, None, None], now, best))
    return loss


def start_finetuning(agent, distillation, args):
    """The online stage begins: all members' critics, targets that are copies of these, and the distilled policy (or the
    members' own), with new optimisers."""
    members = distillation.members
    with torch.no_grad():
        for critic in (agent.critic, agent.target_critic):
            for mine, theirs in zip(critic.parameters(), members.critic.parameters()):
                mine.copy_(theirs.view_as(mine))  # (S * N, 2, ...) to (S * P, 2 M, ...)
        policies = distillation.best if distils(args) else members.policies
        agent.policies.load_state_dict(policies.state_dict())
        agent.log_alpha.copy_(members.log_alpha.view(len(agent.log_alpha), -1).mean(1))
        if args.init_alpha is not None:
            agent.log_alpha.fill_(math.log(args.init_alpha))


def finetune_update(agent, batch, noise, next_noise, args):
    """Online: one gradient step of every policy and of all members' critics; nothing in here waits for the GPU.

    batch: (S, B, O + A + 1 + O + 1) packed transitions; noise, next_noise: (S, P, 1, B, A) standard normal.
    Returns a dict of metrics, each (G,), on the device.
    """
    batch = batch[:, None].expand(-1, agent.num_policies, -1, -1).flatten(0, 1)  # a seed's policies share its batch
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)
    reward, not_terminated = reward.mT, not_terminated.mT  # (G, 1, B)

    # every action of this update comes from the policy as it is now
    policy_action, log_prob = agent.policies.sample(obs, noise.flatten(0, 1))  # (G, 1, B, A), (G, 1, B)
    with torch.no_grad():
        next_action, next_log_prob = agent.policies.sample(next_obs, next_noise.flatten(0, 1))

    # temperature: alpha grows while the entropy -log_prob is below its target; this update still has the old alpha
    alpha = agent.log_alpha.detach().exp()[:, None, None]  # (G, 1, 1)
    entropy_gap = log_prob.detach().mean((1, 2)) + agent.target_entropy  # (G,)
    agent.optimizers["alpha"].minimize((-agent.log_alpha * entropy_gap).sum())

    # policy, (10)-(11): the smaller critic of each member, the mean over members
    policy_q = agent.critic(obs, policy_action).squeeze(2).unflatten(1, (-1, 2)).amin(2)  # (G, M, B)
    actor_loss = (alpha * log_prob - policy_q.mean(1, keepdim=True)).mean((1, 2))  # (G,)
    agent.optimizers["actor"].minimize(actor_loss.sum())  # sum over G: neither seeds nor policies mix

    # critics, (1)-(2): each member bootstraps from its own target; only a true end of the episode cuts that
    with torch.no_grad():
        next_q = agent.target_critic(next_obs, next_action).squeeze(2).unflatten(1, (-1, 2)).amin(2)  # (G, M, B)
        backup = reward + args.gamma * not_terminated * (next_q - alpha * next_log_prob)
    q = agent.critic(obs, action[:, None]).squeeze(2).unflatten(1, (-1, 2))  # (G, M, 2, B)
    critic_loss = (q - backup[:, :, None]).square().mean(-1).sum((1, 2))  # (G,)
    agent.optimizers["critic"].minimize(critic_loss.sum())

    # targets
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_critic.parameters()), list(agent.critic.parameters()), args.polyak)

    return {
        "loss/actor": actor_loss.detach(),
        "loss/critic": critic_loss.detach(),
        "value/q": q.detach().mean((1, 2, 3)),
        "value/disagreement": q.detach().mean(2).std(1, correction=0).mean(-1),  # among the policy's members
        "policy/entropy": -log_prob.detach().mean((1, 2)),
        "policy/alpha": alpha.view(-1),
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


def run_stage(update, agent, transitions, args, index, *noise):
    """One update per row of index (m, S, B) and of what else it reads at random (m, ...); the metrics of the last."""
    for row, *row_noise in zip(index, *noise):
        metrics = update(agent, F.embedding(row, transitions), *row_noise, args)  # one gather of whole rows
    return metrics


# flags that --offline takes over from its run: those that made the members, and those that later stages use too
OFFLINE_FLAGS = {"dataset", "seed", "num_seeds", "hidden_sizes", "num_updates"}
OFFLINE_FLAGS |= {"policy_learning_rate", "cql_alpha", "num_action_samples", "bc_updates"}
SHARED_FLAGS = {"env_id", "num_agents", "batch_size", "learning_rate", "gamma", "polyak"}


def args_after_offline(args):
    """Args for --offline: that run has the defaults of OFFLINE_FLAGS, which may not change, and of SHARED_FLAGS."""
    run_dir = args.offline
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        script, flags = config["script"], config["args"]
        flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        fail(f"{run_dir} holds no run (no readable config.json)", "give the folder that a run's last line names")
    if script != SCRIPT:
        fail(f"{run_dir} is a run of {script}.py, not of {SCRIPT}.py", f"give one of {SCRIPT}.py")
    try:
        args = parse_flags(default=replace(Args(), **{name: flags[name] for name in OFFLINE_FLAGS | SHARED_FLAGS}))
        for name in sorted(OFFLINE_FLAGS):
            if getattr(args, name) != flags[name]:
                fail(f"--{name.replace('_', '-')} differs from the run in {run_dir}", "leave it out")
        if args.num_agents > flags["num_agents"]:
            fail(f"--num-agents {args.num_agents}, but {run_dir} has {flags['num_agents']}", "give no more than that")
    except (TypeError, LookupError) as e:
        fail(f"{run_dir} was made by another version of {SCRIPT}.py ({e})", "check out the commit in its config.json")
    if not (Path(run_dir) / "offline.pt").exists():
        if origin := flags.get("offline"):
            fail(f"{run_dir} trained no members, it has those of {origin}", f"give --offline {origin}")
        fail(f"{run_dir} has no trained members (no offline.pt)", f"finish its offline stage with --resume {run_dir}")
    return args


MEMBERS = "policies.", "critic.", "target_critic.", "log_alpha"  # what offline.pt has of the agents' state


def trained_members(obs_dim, action_dim, args, device):
    """Agents of the offline stage with the first num_agents members of every seed in --offline's run."""
    agent = offline_agent(obs_dim, action_dim, args, device)
    try:
        trained = torch.load(Path(args.offline) / "offline.pt", map_location=device, weights_only=True)
        kept = {name: x.unflatten(0, (args.num_seeds, -1))[:, : args.num_agents] for name, x in trained.items()}
        agent.load_state_dict({**agent.state_dict(), **{name: x.flatten(0, 1) for name, x in kept.items()}})
    except Exception as e:  # torch.load raises many kinds of error on a damaged file
        fail(f"{args.offline} has no readable offline.pt ({type(e).__name__})", "train its members again")
    return agent


def main():
    args = parse_args()
    if args.offline and not (args.resume or args.evaluate):
        args = args_after_offline(args)
    check_range(args, 1, math.inf, "num_seeds", "num_agents", "num_updates", "batch_size", "hidden_sizes")
    check_range(args, 1, math.inf, "num_action_samples", "distil_epochs", "distil_patience", "anneal_steps")
    check_range(args, 1, math.inf, "steps_per_epoch", "updates_per_epoch", "first_updates")
    check_range(args, 1, math.inf, "eval_every", "online_eval_every", "checkpoint_every", "log_every")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 0, math.inf, "cql_alpha", "bc_updates", "online_steps", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "learning_rate", "policy_learning_rate", "online_policy_learning_rate", "gamma", "polyak")
    check_range(args, 0, 1, "initial_online_fraction")
    check_range(args, 1e-6, math.inf, "init_alpha")
    begun, first_stage = args.evaluate or args.resume, "distil" if args.offline else "offline"
    checkpoint = load_checkpoint(begun, "cpu") if begun else {"stage": first_stage, "num_updates": 0, "t": 0}
    if args.evaluate:
        return evaluate_run(args, STAGES[checkpoint["stage"]])
    if args.save_online and not args.online_steps:
        fail("--save-online, but no step is made online", "give --online-steps")
    if args.save_online and Path(args.save_online).exists():
        fail(f"{args.save_online} is there already", "give another folder to write the dataset to")
    T = -(-args.online_steps // args.steps_per_epoch) * args.steps_per_epoch  # whole epochs
    if checkpoint["t"] > T:
        fail(f"{args.resume} has {checkpoint['t']} steps already", "give a larger --online-steps, or leave it out")
    device, S = choose_device(args.device), args.num_seeds
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # data, on the device; one state in ten, but at most about 10,000, is held out of the distillation
    dataset = load_dataset(args.dataset, args.env_id, args.seed)
    if args.eval_episodes or args.online_steps or dataset.environment["id"]:
        fit_to_environment(dataset)
    actions_of(dataset).clip(-0.999, 0.999, out=actions_of(dataset))  # atanh stays finite
    O, A, num_offline = dataset.obs_dim, dataset.action_dim, len(dataset.transitions)  # noqa: E741
    transitions, row = torch.from_numpy(dataset.transitions).to(device), torch.arange(num_offline, device=device)
    held_out = row % max(10, num_offline // 10_000) == 0
    held_out_obs, distil_rows = transitions[held_out, :O].expand(S, -1, -1), row[~held_out] if num_offline > 1 else row

    # a run folder that is new or goes on from its checkpoint
    agent = trained_members(O, A, args, device) if args.offline and not args.resume else None
    name = "+".join(args.dataset).replace("/", "-").replace(":", "-").strip("-.")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, name, dataset.environment)
    stage, num_updates, t = checkpoint["stage"], checkpoint["num_updates"], checkpoint["t"]
    distil_updates = args.distil_epochs * args.updates_per_epoch if distils(args) else 0
    last_update = {"offline": args.num_updates, "distil": distil_updates, "online": updates_after(T, args)}

    def is_over():
        """Whether the stage has come to its end: all of its updates, or no seed's student gets better any more."""
        stopped_early = stage == "distil" and (agent.stale_epochs >= args.distil_patience).all().item()
        return num_updates == last_update[stage] or stopped_early

    def axis():
        """Where the curves are: at an update of the offline stage, afterwards at a step of the environments."""
        return num_updates if stage == "offline" else args.num_updates + t

    def save():
        """Everything that an exact continuation needs; generator_states are those before the current block."""
        state = {
            "stage": stage,
            "num_updates": num_updates,
            "t": t,
            "agent": agent.state_dict(),
            "generators": generator_states,
            "pending_evaluations": {update: past for update, (past, _) in evaluator.pending.items()},
            **(interaction.state() if interaction else {}),
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    writer = SummaryWriter(run_dir, purge_step=axis() + 1)
    evaluator = Evaluator(args, dataset.environment, run_dir, writer)
    report_sampling(dataset, np.full(num_offline, 1 / num_offline), writer)
    keep_freed_memory()
    interaction, printed, stopped, rate = None, time.time(), False, 0
    stages_to_come = list(STAGES)[list(STAGES).index(stage) :]
    for stage in stages_to_come:
        # a stage begins: its agents, its update, what it learns from, its random numbers
        previous, agent = agent, STAGES[stage](O, A, args, device)
        resumed, stage_writer = bool(args.resume) and stage == checkpoint["stage"], writer
        stage_number = list(STAGES).index(stage)
        seeds = [episode_seed(args.seed + s, stage_number) for s in range(S)]
        if stage == "offline":
            update, noise_shapes, sampler = cql_update, cql_noise_shapes(args, A), lambda u: (u * num_offline).long()
            seeds = member_seeds(args, args.num_agents)
        elif stage == "distil":
            update, noise_shapes, sampler = distil_update, [], lambda u: distil_rows[(u * len(distil_rows)).long()]
        else:
            update, noise_shapes = finetune_update, [(agent.num_policies, 1, args.batch_size, A)] * 2
            transitions = torch.cat([transitions, transitions.new_zeros(S * T, sum(agent.widths))])  # rows to fill
            replay = transitions[num_offline:].view(S, T, sum(agent.widths))
            logged = checkpoint if resumed and t else None
            interaction = Interaction(dataset.environment, replay, args, logged) if T else None
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        if resumed:
            agent.load_state_dict(checkpoint["agent"])
            for generator, state in zip(generators, checkpoint["generators"]):
                if len(state) == len(generator.get_state()):  # else it comes from another kind of device: new draws
                    generator.set_state(state.cpu())
            within_epoch = stage == "online" and num_updates < updates_after(t, args)  # its evaluation is to come
            evaluator.resume(axis() - 1 if within_epoch else axis(), checkpoint["pending_evaluations"], agent.actor)
        else:
            num_updates = 0
            if stage == "distil":
                agent.members.load_state_dict(previous.state_dict())
            elif stage == "online":
                start_finetuning(agent, previous, args)
                evaluator.submit(axis(), agent.actor)
            writer.add_scalar("stage", 1 + stage_number, axis())
        if stage == "distil" and distils(args):  # an axis of its own
            stage_writer = SummaryWriter(run_dir / "distil", purge_step=num_updates + 1)
        generator_states = [generator.get_state() for generator in generators]
        if not resumed:
            save()

        learn, graph = partial(run_stage, update, agent, transitions, args), None
        started, first_update, block_start, actor = time.time(), num_updates, -1, agent.actor
        while not is_over() and not stopped:
            # act until the epoch is full; a resumed run draws the noise of the epoch it is in again
            if stage == "online" and num_updates == updates_after(t, args):
                generator_states = [generator.get_state() for generator in generators]
                noise = [torch.randn(args.steps_per_epoch, 1, A, generator=g, device=device) for g in generators]
                for step_noise in torch.stack(noise, 1)[t % args.steps_per_epoch :]:  # (S, 1, A)
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
            if stage == "offline":
                epoch_start, epoch_end = 0, args.num_updates
            elif stage == "distil":
                epoch_start = num_updates // args.updates_per_epoch * args.updates_per_epoch
                epoch_end = epoch_start + args.updates_per_epoch
            else:
                epoch_start, epoch_end = updates_after(t - 1, args), updates_after(t, args)
                sampler = partial(replay_rows, t=t, num_offline=num_offline, num_steps=T, args=args)
            in_block = (num_updates - epoch_start) % UPDATES_PER_BLOCK
            if block_start != num_updates - in_block:
                block_start = num_updates - in_block
                generator_states = [generator.get_state() for generator in generators]
                block = draw_block(sampler, generators, args.batch_size, *noise_shapes)
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
            if stage == "distil" and num_updates == epoch_end:
                validation_loss = keep_best(agent, held_out_obs, args)
                stage_writer.add_scalar("loss/validation", validation_loss.mean().item(), num_updates)
            done, stopped = is_over(), bool(stop)

            # evaluate, log, save
            if stage == "offline":
                evaluate = num_updates % args.eval_every == 0 and not done  # at the end, the distilled policy is
            else:
                since = t % args.online_eval_every  # environment steps since an evaluation was due
                evaluate = stage == "online" and num_updates == epoch_end and (done or since < args.steps_per_epoch)
            if evaluate:
                evaluator.submit(axis(), actor)
            evaluator.collect(wait=done)
            if num_updates % args.log_every == 0:
                step = num_updates if stage == "distil" else axis()
                for tag, value in metrics.items():
                    stage_writer.add_scalar(tag, value.mean().item(), step)
                if stage == "online":
                    writer.add_scalar("replay/online_fraction", (block[0] >= num_offline).double().mean().item(), step)
                writer.add_scalar("stage", 1 + stage_number, axis())
            rate = (num_updates - first_update) / (time.time() - started)
            if time.time() - printed > 5 or done:
                printed = time.time()
                left = timedelta(seconds=int((last_update[stage] - num_updates) / rate))
                place = f"update {num_updates:,}/{last_update[stage]:,}, {rate:.0f} updates/s, {left} left"
                print(f"{stage}: {place}" + f", step {t:,}/{T:,}" * (stage == "online"), flush=True)
            if num_updates % args.checkpoint_every == 0 or done or stopped:
                if num_updates in (epoch_end, block_start + UPDATES_PER_BLOCK):  # the next block is still to be drawn
                    generator_states = [generator.get_state() for generator in generators]
                save()

        stage_writer.flush()
        if not is_over():
            break
        if stage == "offline":  # for --offline
            trained = {name: x for name, x in agent.state_dict().items() if name.startswith(MEMBERS)}
            write_atomically(run_dir / "offline.pt", lambda path, trained=trained: torch.save(trained, path))

    evaluator.collect(wait=not stopped)
    evaluator.close()
    writer.close()
    if not (stage == "online" and is_over()):
        where = f"update {num_updates:,} of stage {stage}"
        print(f"stopped at {where}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    if args.save_online:
        episodes = split_episodes(replay[0].cpu().numpy(), interaction.ends[0], agent.widths)
        returns = [float(reward.sum()) for _, _, reward, _, _ in episodes]
        references = dataset.environment["references"] or (min(returns), max(returns))
        description = f"Online data: {shlex.join(sys.argv)} (BRED, {T} steps, seed {args.seed})"
        save_minari(args.save_online, episodes, dataset.environment, references, description)
    print_result(args, run_dir, args.num_updates + num_updates, rate)


if __name__ == "__main__":
    main()
