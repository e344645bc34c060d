"""ASAC: advantage sampled actor-critic, which draws what the actor clones from a tree of advantages.

Papers: E. Cetin, A. Tirinzoni, M. Pirotta, A. Lazaric, Y. Ollivier, A. Touati, "Simple Ingredients for Offline
Reinforcement Learning", 2024, arXiv:2403.13097; modern networks: J. Bjorck, C. P. Gomes, K. Q. Weinberger, "Towards
Deeper Deep Reinforcement Learning with Spectral Normalization", 2021, arXiv:2106.01151.

Idea. AWAC clones logged actions with weights exp(A / beta), normalised over the batch: an estimate that is biased, and
of high variance where few transitions are good. ASAC draws the actor's batch with those probabilities instead, and
clones what it has drawn without weights. To draw in O(log N) from probabilities that change with every update and span
hundreds of orders of magnitude, it keeps log-probabilities in a tree in which every node holds the logsumexp of its
children. The paper's larger finding is that scale matters more than the algorithm: hence --architecture, --num-critics
and --eval-samples.

Objectives (S seeds, C critics, B batch, O observation, A action, N transitions; a~ is drawn from pi(.|s)):
    ensemble  Q_bar = mean over i of Q_i - pessimism / (C^2 - C) sum over i, j of |Q_i - Q_j|                  section 4
    critic    a' = clip(mean of pi(.|s') + clip(std * normal noise, -noise_clip, noise_clip), -1, 1)
              L_Q = 1/2 sum over C of mean (r + gamma (1 - terminated) Q_bar_target(s', a') - Q(s, a))^2             (1)
    advantage A(s, a) = mean over i of Q_i(s, a) - Q_bar(s, a~)                                                      (3)
    sampler   P(i) = exp(A(s_i, a_i) / beta) / sum_k exp(A(s_k, a_k) / beta)                                         (6)
    actor     L_pi = -mean log pi(a|s) over a batch drawn from P                                                     (7)
    targets   Q_target <- (1 - polyak) Q_target + polyak Q
Each update: a uniform batch and one from the tree; critics on the first, actor on the second, targets; then the new
advantages of both batches go into the tree (Algorithm 2, with critics before the actor as in the authors' code). A leaf
is 0 at first and keeps its last advantage until its transition is drawn again, by either batch: P lags behind the
critics (the paper's footnote 3).

What differs from the paper and its code, and why.
    - Algorithm 3 as printed sets a node to m + log1p(e^(a-m) + e^(b-m)), m = max(a, b), which counts the larger child
      twice and biases all draws. Here a node is the logsumexp of its children (the authors' code is right, too).
    - A node has 8 children instead of 2, and there is no node above a level of at most 16,384, which is searched in its
      cumulative sums: 2 levels for a million leaves instead of 20, the same distribution, all on the device. A draw
      takes a fresh uniform number at each level instead of Algorithm 4's subtraction in log space.
    - If a transition is drawn more than once in an update, the last of its advantages counts.
    - The advantage subtracts the pessimistic Q_bar at the policy's action from the plain mean at the logged one, as the
      authors' code does; eq. (3) has Q_1 in both places. (6) has no A_max, and no preset sets one; the paper's Figure 7
      lists 1 for AntMaze among the common settings, which is --max-advantage 1.
    - From the authors' code, as the paper does not say: the policy's constant deviation, the bound of its noise, the
      factor 1/2 in (1), and Q_bar instead of Q in the targets of Algorithm 1.
    - log pi sums over action dimensions; the authors' code averages. Adam does not notice the factor.
    - Spectral norms are updated once per gradient step; in the authors' code at every forward pass in training mode.
      Targets take over the vectors of power iteration, and evaluation leaves them alone.
    - The paper searched grids (Table 8) and reports the best cell of each task. A preset sets beta to a middle value.
    - beta is in units of return, and a middle value for the paper's tasks is none for every reward: on hopper/replay-v0
      the preset's 0.5 clones next to nothing (a score of 3), and 20 learns.
    - Bootstrapping goes on through time limits (truncation) and stops at true ends (termination).
    - Weights, draws and noise come from generators of each seed's own, so that a seed gives the same run alone or
      among others.

Reading:  the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:      python algorithms/asac.py --beta 20 --polyak 0.02 --batch-size 256 --hidden-sizes 64 64 --num-updates 8000
Scaled:   python algorithms/asac.py --dataset hopper/replay-v0 --preset locomotion
Expected: 20 ± 1 by the first command (three seeds; benchmarks.md, scaled); the data's average episode: 12.
          The paper's million updates: not run yet.
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
from types import SimpleNamespace
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
    dataset: tuple[str, ...] = ("hopper/replay-v0",)
    """Minari ids, Minari folders or D4RL .hdf5 files, concatenated; `ID:0.1` takes a tenth of the episodes"""
    env_id: str | None = None
    """evaluation environment; default: the dataset's own (D4RL files: from the file's name)"""
    seed: int = 0
    """first seed; agent k uses seed + k"""
    num_seeds: int = 1
    """agents trained side by side in one batched computation (the axis S)"""
    preset: Literal["small", "mood", "antmaze", "locomotion", "locomotion-0.1"] = "small"
    """what the paper does on its testbeds: defaults of architecture, num_critics, pessimism, beta and num_updates.
    small: the networks of its Table 1 and the updates common elsewhere; locomotion-0.1: nine tenths of random data"""
    architecture: Literal["simple-small", "simple-large", "modern"] | None = None
    """actor and critics: 2x256 and 2x256, 5x1024 and 3x256, or the latter with residual blocks, LayerNorm and spectral
    normalisation (Table 7, Figure 6)"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers of every network; default: the architecture's. modern: all equal,
    one for the first layer and two for each residual block"""
    num_critics: int | None = None
    """critics in the ensemble (the axis C)"""
    pessimism: float | None = None
    """lambda: how far Q_bar is below the critics' mean, in units of their mean distance; 0.5 with 2 critics is their
    minimum"""
    num_updates: int | None = None
    """gradient steps; MOOD's humanoid: 5,000,000"""
    batch_size: int = 512
    """transitions per update and seed (the axis B), for the critics and again for the actor"""
    learning_rate: float = 3e-4
    """Adam step size of actor and critics; the paper tries 1e-4, too"""
    gamma: float = 0.99
    """discount factor"""
    beta: float | None = None
    """temperature of the advantages, in units of return; the paper tries 0.1 to 3 (MOOD, locomotion), 0.1 to 20
    (locomotion-0.1) and 0.03 to 0.5 (AntMaze)"""
    max_advantage: float = math.inf
    """A_max: bound of the advantages in the tree; no preset sets it"""
    policy_std: float = 0.2
    """standard deviation of the policy in every action dimension (actions are in [-1, 1])"""
    noise_clip: float = 0.3
    """bound of the policy's noise where the critics bootstrap"""
    polyak: float = 0.005
    """share of the online critics in their targets at every update (1 - rho in the paper)"""
    reward_transform: Literal["auto", "none", "scale", "shift"] = "auto"
    """what the learner sees: scale: r * 1000 / (R_max - R_min); shift: r - 1; auto: shift for AntMaze and PointMaze,
    else none"""
    eval_every: int = 5_000
    """updates between evaluations; AntMaze: 100,000"""
    eval_episodes: int = 10
    """episodes per evaluation and seed; AntMaze: 100; 0: never evaluate"""
    eval_samples: int = 50
    """M: beside the policy's mean action (evaluations.csv), evaluate the best of so many draws by Q_bar (Algorithm 1;
    evaluations_m50.csv); 1: the mean action only"""
    eval_workers: int | None = None
    """processes that evaluate beside training (0: inline; default: one per seed, as far as there are cores)"""
    checkpoint_every: int = 50_000
    """updates between checkpoints; a stop by Ctrl-C or SIGTERM writes one too"""
    log_every: int = 1_000
    """updates between entries in TensorBoard"""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    allow_tf32: bool = False
    """let a GPU multiply matrices in TF32: faster, 10 bits of mantissa"""
    run_dir: str | None = None
    """where the results go; default runs/asac/<dataset>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos"""

    def __post_init__(self):
        """Flags that the user has left open take the preset's value."""
        for name, value in TESTBEDS[self.preset].items():
            if getattr(self, name, 0) is None:
                setattr(self, name, value)


# widths of the hidden layers (Table 7); the modern networks are as large: two layers to a block, after the first
ARCHITECTURES = {
    "simple-small": {"actor": (256,) * 2, "critic": (256,) * 2, "value": (256,) * 2},
    "simple-large": {"actor": (1024,) * 5, "critic": (256,) * 3, "value": (1024,) * 2},
}
ARCHITECTURES |= {"modern": ARCHITECTURES["simple-large"]}

# the paper's settings (Tables 7 and 8, Figure 7); beta is a middle value of the grid
TESTBEDS = {
    "small": {
        "architecture": "simple-small",
        "num_critics": 2,
        "pessimism": 0.5,
        "beta": 0.5,
        "max_advantage": math.inf,
        "num_updates": 1_000_000,
    },
    "mood": {
        "architecture": "simple-large",
        "num_critics": 5,
        "pessimism": 0.5,
        "beta": 0.5,
        "max_advantage": math.inf,
        "num_updates": 1_500_000,
    },
    "antmaze": {
        "architecture": "modern",
        "num_critics": 5,
        "pessimism": 0.0,
        "beta": 0.1,
        "max_advantage": 1.0,
        "num_updates": 2_000_000,
    },
    "locomotion": {
        "architecture": "modern",
        "num_critics": 5,
        "pessimism": 0.5,
        "beta": 0.5,
        "max_advantage": math.inf,
        "num_updates": 2_000_000,
    },
    "locomotion-0.1": {
        "architecture": "modern",
        "num_critics": 10,
        "pessimism": 0.5,
        "beta": 1.5,
        "max_advantage": math.inf,
        "num_updates": 2_000_000,
    },
}

# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_updates", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video", "eval_samples"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: draw what the actor clones from the advantages themselves
# ---------------------------------------------------------------------------------------------------------------------


class LogSumExpTree(torch.nn.Module):
    """Draws leaf i of N with probability exp(logit_i) / sum_k exp(logit_k), where logits may change, in O(log N).

    Every node holds the logsumexp of its FAN_OUT children: the logarithm of the mass below it, which never overflows,
    however large the logits are. A level of at most TOP nodes is the last; above it would be the root, `total`.
    One tree per seed, side by side: level l is (S * nodes,), and node n of tree s stands at s * nodes + n. Leaves start
    at 0, all alike; what fills up the last level's last node is -inf, and is never drawn.
    """

    FAN_OUT, TOP = 8, 16_384

    def __init__(self, num_seeds, num_leaves, device):
        super().__init__()
        self.num_seeds, self.num_leaves, self.depth = num_seeds, num_leaves, 0
        while num_leaves > self.TOP * self.FAN_OUT**self.depth:
            self.depth += 1
        width = -(-num_leaves // self.FAN_OUT**self.depth) * self.FAN_OUT**self.depth
        leaves = torch.full((num_seeds, width), -math.inf, dtype=torch.float64, device=device)
        leaves[:, :num_leaves] = 0
        self.levels = [leaves.flatten()]
        for _ in range(self.depth):
            self.levels.append(self.siblings(-1).logsumexp(-1))
        for i, level in enumerate(self.levels):
            self.register_buffer(f"level{i}", level)  # for checkpoints; the list is quicker to reach
        trees = torch.arange(num_seeds, device=device)[:, None]
        self.first_nodes = [trees * (level.numel() // num_seeds) for level in self.levels]  # (S, 1) each

    def siblings(self, i):
        """Level i with the children of one node in a row: (S * nodes of level i + 1, FAN_OUT)."""
        return self.levels[i].view(-1, self.FAN_OUT)

    @property
    def total(self):
        """(S,) logsumexp of all leaves."""
        return self.levels[-1].view(self.num_seeds, -1).logsumexp(1)

    def update(self, index, logit):
        """Sets leaves `index` (S, K) to `logit` (S, K); of several writes to one leaf, the last counts."""
        node, leaves = (index + self.first_nodes[0]).flatten(), self.levels[0]
        rank = torch.arange(len(node), dtype=leaves.dtype, device=leaves.device)
        leaves.scatter_reduce_(0, node, rank, "amax", include_self=False)  # each leaf holds who comes last ...
        last = leaves[node].long()
        leaves.scatter_(0, node, logit.flatten()[last])  # ... and then gets, from all who come, that logit
        for i in range(self.depth):  # level by level: a node after all of its children
            node = node // self.FAN_OUT
            self.levels[i + 1].scatter_(0, node, self.siblings(i).index_select(0, node).logsumexp(-1))

    def sample(self, u):
        """Draws leaves. u (S, K, depth + 1): uniform on [0, 1), float64, one number for each level. Returns (S, K)."""
        cdf = self.levels[-1].view(self.num_seeds, -1).softmax(1).cumsum(1)
        node = torch.searchsorted(cdf, u[..., 0] * cdf[:, -1:], right=True)  # right: never where the mass is 0
        node = node.clamp(max=cdf.shape[1] - 1) + self.first_nodes[-1]  # among nan, any node, but one that exists
        for i in reversed(range(self.depth)):
            log_share = F.embedding(node, self.siblings(i)) - self.levels[i + 1][node].unsqueeze(-1)
            cdf = log_share.exp_().cumsum(-1)  # (S, K, FAN_OUT)
            child = torch.searchsorted(cdf, u[..., self.depth - i, None] * cdf[..., -1:], right=True).squeeze(-1)
            node = node * self.FAN_OUT + child.clamp(max=self.FAN_OUT - 1)
        return (node - self.first_nodes[0]).clamp(max=self.num_leaves - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product.
# ---------------------------------------------------------------------------------------------------------------------


def orthogonal(weight, bias, generator):
    """Orthogonal weight (in, out) with gain sqrt(2), which suits a ReLU behind it; zero bias (out)."""
    nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=generator)
    bias.zero_()


def unit_orthogonal(weight, bias, generator):
    """Orthogonal weight (in, out) with gain 1, zero bias (out): what the scaled actors start from."""
    nn.init.orthogonal_(weight, generator=generator)
    bias.zero_()


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


class ModernMLP(MLP):
    """Residual blocks x + W2 relu(W1 LayerNorm(x)) between a first and a last layer, W1 and W2 divided by their largest
    singular values (Bjorck et al., 2021; Figure 6).

    Arguments and result as those of MLP, and all of its weights; the widths are equal, and their number is odd.
    Power iteration runs, one step at a time, where gradients are taken in training mode, and 15 steps in __init__.
    """

    def __init__(self, lead, sizes, init, generators):
        super().__init__(lead, sizes, init, generators)
        width = sizes[1]
        for i in range(1, len(sizes) - 2):  # every layer of a block
            u = torch.stack([torch.randn(*lead[1:], 1, width, generator=generator) for generator in generators])
            self.register_buffer(f"u{i}", u)  # left and right singular vectors
            self.register_buffer(f"v{i}", torch.zeros(*lead, 1, width))
            for _ in range(15):
                self.power_iteration(i)
            if i % 2:  # the first of its block
                self.register_parameter(f"norm_weight{i}", nn.Parameter(torch.ones(*lead, 1, width)))
                self.register_parameter(f"norm_bias{i}", nn.Parameter(torch.zeros(*lead, 1, width)))

    @torch.no_grad()
    def power_iteration(self, i):
        """Brings u and v closer to the singular vectors of the weight's largest singular value."""
        weight, u, v = self.layers[i][0], self.get_buffer(f"u{i}"), self.get_buffer(f"v{i}")
        v.copy_(F.normalize(u @ weight, dim=-1))
        u.copy_(F.normalize(v @ weight.mT, dim=-1))

    def normalized_weight(self, i):
        """weight / sigma with sigma = u W v, which has a gradient, too."""
        if self.training and torch.is_grad_enabled():
            self.power_iteration(i)
        weight, u, v = self.layers[i][0], self.get_buffer(f"u{i}").clone(), self.get_buffer(f"v{i}").clone()
        return weight / (u @ weight * v).sum(-1, keepdim=True)

    def forward(self, x):
        """x (S, B, in) -> (*lead, B, out)."""
        if len(self.lead) > 1:  # every critic of a seed sees the same input
            x = x[:, None].expand(-1, self.lead[1], -1, -1)
        (first, first_bias), *_, (last, last_bias) = self.layers
        x = (x @ first + first_bias).relu_()
        for i in range(1, len(self.layers) - 1, 2):
            h = F.layer_norm(x, x.shape[-1:]) * self.get_parameter(f"norm_weight{i}")
            h = h + self.get_parameter(f"norm_bias{i}")
            h = (h @ self.normalized_weight(i) + self.layers[i][1]).relu_()
            x = x + (h @ self.normalized_weight(i + 1) + self.layers[i + 1][1])
        return x @ last + last_bias if last.shape[-1] > 1 else (x * last.mT).sum(-1, keepdim=True) + last_bias


def make_network(args, role, lead, in_dim, out_dim, init, generators):
    """The network of --architecture for a role: actor or critic."""
    sizes = [in_dim, *(args.hidden_sizes or ARCHITECTURES[args.architecture][role]), out_dim]
    return (ModernMLP if args.architecture == "modern" else MLP)(lead, sizes, init, generators)


class ConstantStdActor(nn.Module):
    """pi(a|s) = Normal(tanh(net(s)), std) with the same std everywhere; what is drawn is clipped to [-1, 1]."""

    def __init__(self, net, std):
        super().__init__()
        self.net, self.std = net, std

    def forward(self, obs):
        """The mean (S, B, A) in [-1, 1] of the policy at obs (S, B, O)."""
        return self.net(obs).tanh()

    def sample(self, mean, noise, noise_clip=None):
        """Actions (S, ..., A) from standard normal noise; no further than noise_clip from the mean, if given."""
        offset = self.std * noise
        return (mean + (offset if noise_clip is None else offset.clamp(-noise_clip, noise_clip))).clamp(-1, 1)

    def log_prob(self, mean, action):
        """log of the unclipped Gaussian's density, summed over the action dimensions: (S, B, A) each -> (S, B)."""
        z = (action - mean) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi)).sum(-1)

    def act(self, obs):
        """The deterministic action (S, B, A) in [-1, 1] that evaluations use."""
        return self(obs)


class BestOfSamples(nn.Module):
    """Evaluation sampling (Algorithm 1): acts as the best, by Q_bar, of num_samples actions drawn from the policy."""

    def __init__(self, agent, args):
        super().__init__()
        self.actor, self.critic = agent.actor, agent.critic
        self.num_samples, self.pessimism, self.generators = args.eval_samples, args.pessimism, None
        seeds = torch.arange(args.seed, args.seed + args.num_seeds, device=next(agent.parameters()).device)
        self.register_buffer("noise_seeds", seeds)  # of the draws, which start anew with every evaluation

    def act(self, obs):
        """obs (S, B, O) -> actions (S, B, A) in [-1, 1]."""
        self.critic.lead = len(obs), *self.critic.lead[1:]  # policy_of_seed may have left one seed of many
        if self.generators is None:
            self.generators = [torch.Generator().manual_seed(int(seed)) for seed in self.noise_seeds]
        mean = self.actor(obs)[:, None]  # (S, 1, B, A)
        shape = self.num_samples, *mean.shape[2:]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
        actions = self.actor.sample(mean, noise.to(obs.device))  # (S, M, B, A)
        repeated_obs = obs[:, None].expand(-1, self.num_samples, -1, -1)
        q = self.critic(torch.cat([repeated_obs, actions], -1).flatten(1, 2)).squeeze(-1)  # (S, C, M * B)
        best = pessimistic(q, self.pessimism).view(actions.shape[:3]).argmax(1)  # (S, B)
        return actions.gather(1, best[:, None, :, None].expand(-1, -1, -1, actions.shape[-1])).squeeze(1)


class ASACAgent(nn.Module):
    """Networks, optimisers and trees of S independent agents that learn from num_transitions transitions."""

    def __init__(self, obs_dim, action_dim, args, device, num_transitions):
        super().__init__()
        S, C = args.num_seeds, args.num_critics
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(S)]
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]  # of a packed transition: s, a, r, s', not terminated
        actor_net = make_network(args, "actor", (S,), obs_dim, action_dim, unit_orthogonal, generators)
        self.actor = ConstantStdActor(actor_net, args.policy_std)
        self.critic = make_network(args, "critic", (S, C), obs_dim + action_dim, 1, orthogonal, generators)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False).eval()
        self.to(device)
        self.tree = LogSumExpTree(S, num_transitions, device)
        networks = {"actor": self.actor, "critic": self.critic}
        adams = {name: Adam(network.parameters(), args.learning_rate) for name, network in networks.items()}
        self.optimizers = nn.ModuleDict(adams)


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def pessimistic(q, pessimism):
    """Q_bar: the critics' mean less `pessimism` times their mean distance from each other. q (S, C, B) -> (S, B)."""
    C = q.shape[1]
    if C == 1:
        return q.squeeze(1)
    distance = (q[:, :, None] - q[:, None]).abs().sum((1, 2))  # over ordered pairs, of which C (C - 1) are no zeros
    return q.mean(1) - pessimism / (C * C - C) * distance


def advantages(critic, obs, action, policy_action, pessimism):
    """A(s, a) (S, B) of logged actions over one drawn from the policy, eq. (3): pessimistic about the latter only."""
    logged, drawn = torch.cat([obs, action], -1), torch.cat([obs, policy_action], -1)
    q, policy_q = critic(torch.cat([logged, drawn], 1)).squeeze(-1).chunk(2, dim=-1)  # (S, C, B) each
    return q.mean(1) - pessimistic(policy_q, pessimism)


def move_target(target, online, polyak):
    """target <- (1 - polyak) target + polyak online; singular vectors are taken over."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), polyak)
    for old, new in zip(target.buffers(), online.buffers()):
        old.copy_(new)


def update(agent, transitions, index, u, next_noise, noise, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    transitions: (N, O + A + 1 + O + 1), packed; index (S, B): those that the critics learn from; u (S, B, depth + 1):
    uniform numbers that draw the actor's from the tree; next_noise (S, B, A), noise (S, 2 B, A): standard normal.
    Returns a dict of metrics, each (S,), on the device.
    """
    B = args.batch_size
    index = torch.cat([index, agent.tree.sample(u)], 1)  # (S, 2 B): uniform ones for the critics, then the actor's
    batch = F.embedding(index, transitions)  # one gather of whole rows
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)

    # critics, eq. (1), on the uniform batch: only a true end of the episode cuts the bootstrap
    with torch.no_grad():
        next_obs, reward, not_terminated = next_obs[:, :B], reward[:, :B, 0], not_terminated[:, :B, 0]
        next_action = agent.actor.sample(agent.actor(next_obs), next_noise, args.noise_clip)
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).squeeze(-1)  # (S, C, B)
        backup = reward + args.gamma * not_terminated * pessimistic(next_q, args.pessimism)  # (S, B)
    q = agent.critic(torch.cat([obs[:, :B], action[:, :B]], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = 0.5 * (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    agent.optimizers["critic"].minimize(critic_loss.sum())  # sum over S: seeds never mix

    # actor, eq. (7): clone what the tree has drawn, without weights
    actor_loss = -agent.actor.log_prob(agent.actor(obs[:, B:]), action[:, B:]).mean(-1)  # (S,)
    agent.optimizers["actor"].minimize(actor_loss.sum())

    # targets, then the tree: what the new networks say of both batches, eq. (6)
    with torch.no_grad():
        move_target(agent.target_critic, agent.critic, args.polyak)
        policy_action = agent.actor.sample(agent.actor(obs), noise)
        advantage = advantages(agent.critic, obs, action, policy_action, args.pessimism)  # (S, 2 B)
        agent.tree.update(index, advantage.clamp(max=args.max_advantage).double() / args.beta)

    return {
        "loss/critic": critic_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "value/q": q.detach().mean((1, 2)),
        "value/advantage": advantage[:, :B].mean(-1),
        "value/advantage_drawn": advantage[:, B:].mean(-1),
        "policy/log_mean_weight": agent.tree.total - math.log(len(transitions)),
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
# Training
# ---------------------------------------------------------------------------------------------------------------------

UPDATES_PER_BLOCK = 100  # random numbers are drawn for so many updates at a time
UPDATES_PER_GRAPH = 10  # a GPU replays so many updates as one CUDA graph


# what --reward-transform auto means, by the beginning of the environment's id; elsewhere none
MAZE_TRANSFORMS = dict.fromkeys(("AntMaze", "PointMaze"), "shift")


def draw_block(sampler, generators, batch_size, *noise_shapes):
    """What the next UPDATES_PER_BLOCK = n updates read at random: transition indices (n, S, B), then standard normal
    noise (n, S, *shape) for each of the shapes. Every seed draws from its own generator."""
    n, device = UPDATES_PER_BLOCK, generators[0].device
    u = [torch.rand(n, batch_size, generator=g, dtype=torch.float64, device=device) for g in generators]
    noise = ([torch.randn(n, *shape, generator=g, device=device) for g in generators] for shape in noise_shapes)
    return [sampler(torch.stack(u, 1)), *(torch.stack(x, 1) for x in noise)]


def draw_uniforms(generators, *shape):
    """Uniform numbers on [0, 1), float64, for the next UPDATES_PER_BLOCK = n updates: (n, S, *shape)."""
    size, device = (UPDATES_PER_BLOCK, *shape), generators[0].device
    return torch.stack([torch.rand(size, generator=g, dtype=torch.float64, device=device) for g in generators], 1)


def run_updates_on(agent, transitions, args, index, *draws):
    """One update per row of index (m, S, B) and of the other draws (m, S, ...), which are given all transitions, as the
    tree may draw any; returns the metrics of the last."""
    for row in zip(index, *draws):
        metrics = update(agent, transitions, *row, args)
    return metrics


def transform_rewards(dataset, mode, auto_modes):
    """Rewards as the learner sees them, in place; returns and sampling probabilities come from the logged ones."""
    if mode == "auto":
        mode = auto_modes.get((dataset.environment["id"] or "").split("-")[0].split("_")[0], "none")
    reward = dataset.transitions[:, dataset.obs_dim + dataset.action_dim]
    if mode == "scale":
        reward *= 1000 / (np.ptp(dataset.episode_returns) or 1000)
    elif mode == "shift":
        reward -= 1


def check_architecture(args):
    """Fails where --hidden-sizes makes no residual blocks."""
    sizes = args.hidden_sizes
    if sizes and args.architecture == "modern" and (len(set(sizes)) > 1 or len(sizes) % 2 == 0):
        fail(f"--hidden-sizes {sizes} makes no residual blocks", "give 1, 3, 5, ... equal widths")


def evaluate_both(args, agent_class):
    """--evaluate with the mean action, then with the best of --eval-samples."""

    def sampling_agent(*given):
        agent = agent_class(*given)
        return SimpleNamespace(actor=BestOfSamples(agent, args), load_state_dict=agent.load_state_dict)

    print("the policy's mean action:")
    evaluate_run(args, agent_class)
    if args.eval_samples > 1:
        print(f"the best of {args.eval_samples} samples, by Q_bar:")
        evaluate_run(replace(args, capture_video=False), sampling_agent)


def main():
    args = parse_args()
    check_range(args, 1, math.inf, "num_seeds", "num_updates", "batch_size", "hidden_sizes", "num_critics")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 1, math.inf, "eval_every", "checkpoint_every", "log_every", "eval_samples")
    check_range(args, 0, math.inf, "pessimism", "noise_clip", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "learning_rate", "gamma", "polyak")
    check_range(args, 1e-6, math.inf, "beta", "policy_std")
    check_range(args, -1e9, math.inf, "max_advantage")
    check_architecture(args)
    if args.evaluate:
        leaves = load_checkpoint(args.evaluate, "cpu")["agent"]["tree.level0"]
        return evaluate_both(args, partial(ASACAgent, num_transitions=len(leaves) // args.num_seeds))
    device, S = choose_device(args.device), args.num_seeds
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # data, on the device; what is printed are the returns as logged, what is learned from are transformed rewards
    dataset = load_dataset(args.dataset, args.env_id, args.seed)
    if args.eval_episodes or dataset.environment["id"]:
        fit_to_environment(dataset)
    transform_rewards(dataset, args.reward_transform, MAZE_TRANSFORMS)
    transitions, N = torch.from_numpy(dataset.transitions).to(device), len(dataset.transitions)
    sampler = lambda u: (u * N).long()

    # agents, in a run folder that is new or goes on from its checkpoint
    agent = ASACAgent(dataset.obs_dim, dataset.action_dim, args, device, N)
    generators = [torch.Generator(device).manual_seed(args.seed + s) for s in range(S)]
    checkpoint = load_checkpoint(args.resume, device) if args.resume else {"num_updates": 0}
    num_updates = first_update = checkpoint["num_updates"]
    if num_updates > args.num_updates:
        fail(f"{args.resume} has {num_updates} updates already", "give a larger --num-updates, or leave it out")
    name = "+".join(args.dataset).replace("/", "-").replace(":", "-").strip("-.")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, name, dataset.environment)
    writer = SummaryWriter(run_dir, purge_step=num_updates + 1)
    policies = {"": agent.actor}  # by the variant of their evaluation
    if args.eval_samples > 1:
        policies[f"_m{args.eval_samples}"] = BestOfSamples(agent, args)
    evaluators = {variant: Evaluator(args, dataset.environment, run_dir, writer, variant) for variant in policies}
    report_sampling(dataset, np.full(N, 1 / N), writer)
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        for generator, state in zip(generators, checkpoint["generators"]):
            if len(state) == len(generator.get_state()):  # else it comes from another kind of device: new draws
                generator.set_state(state.cpu())
        for variant, evaluator in evaluators.items():
            evaluator.resume(num_updates, checkpoint["pending_evaluations"].get(variant, {}), policies[variant])

    generator_states = [generator.get_state() for generator in generators]

    def save():
        """Everything that an exact continuation needs; generator_states are those before the current block."""
        state = {
            "num_updates": num_updates,
            "agent": agent.state_dict(),
            "generators": generator_states,
            "pending_evaluations": {
                variant: {update: past for update, (past, _) in evaluator.pending.items()}
                for variant, evaluator in evaluators.items()
            },
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    if not args.resume:
        save()
    keep_freed_memory()
    learn, graph = partial(run_updates_on, agent, transitions, args), None
    B, A = args.batch_size, dataset.action_dim
    started, printed, block_start, stopped, rate = time.time(), time.time(), -1, False, 0
    while num_updates < args.num_updates and not stopped:
        # draw, a block of updates at a time; a resumed run draws the block it is in again
        if block_start != num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK:
            block_start = num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK
            generator_states = [generator.get_state() for generator in generators]
            index, *noise = draw_block(sampler, generators, B, (B, A), (2 * B, A))
            block = [index, draw_uniforms(generators, B, agent.tree.depth + 1), *noise]
            if device.type == "cuda" and not graph:
                graph = cuda_graph(learn, agent, *(x[:UPDATES_PER_GRAPH] for x in block))

        # learn, until the block ends or something else is due
        due = [n - num_updates % n for n in (args.eval_every, args.checkpoint_every, args.log_every)]
        end = num_updates + min(*due, block_start + UPDATES_PER_BLOCK - num_updates, args.num_updates - num_updates)
        while num_updates < end:
            n = min(UPDATES_PER_GRAPH, end - num_updates)
            inputs = [x[num_updates - block_start :][:n] for x in block]
            metrics = graph(*inputs) if graph and n == UPDATES_PER_GRAPH else learn(*inputs)
            num_updates += n
            if stop:
                break
        done, stopped = num_updates == args.num_updates, bool(stop)

        # evaluate, log, save
        for variant, evaluator in evaluators.items():
            if num_updates % args.eval_every == 0 or done:
                evaluator.submit(num_updates, policies[variant])
        for evaluator in evaluators.values():
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

    for evaluator in evaluators.values():
        evaluator.close()
    writer.close()
    if num_updates < args.num_updates:
        print(f"stopped at update {num_updates:,}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    print_result(args, run_dir, num_updates, rate)


if __name__ == "__main__":
    main()
