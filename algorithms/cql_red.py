"""CQL + ReD: conservative Q-learning on a dataset rebalanced by return.

Papers: Y. Yue, B. Kang, X. Ma, Z. Xu, G. Huang, S. Yan, "Boosting Offline Reinforcement Learning via Data Rebalancing",
2022, arXiv:2210.09241 (ReD); A. Kumar, A. Zhou, G. Tucker, S. Levine, "Conservative Q-Learning for Offline
Reinforcement Learning", 2020, arXiv:2006.04779 (CQL); Z.-W. Hong et al., "Harnessing Mixed Offline Reinforcement
Learning Datasets via Trajectory Weighting", 2023 (the samplers aw and rw).

Idea. Offline algorithms are held close to the policy that logged the data, the bad parts of it included. ReD draws each
transition with a probability that grows with the return of its episode. That leaves the support of the data as it is
and raises its average: the algorithm is held close to a better policy, at no cost. CQL is soft actor-critic with
pessimistic critics: beside the Bellman error they minimise the gap between a soft maximum of Q over all actions and Q
of the logged action, so that no action looks good merely because nobody tried it. This is CQL(H), the soft maximum
being estimated by importance sampling.

Objectives (S seeds, C critics, B batch, O observation, A action, N transitions; `min Q`: smallest of the critics; a~
and a' are drawn from the policy at s and s'; alpha is ReD's exponent in the first line, then SAC's temperature):
    sampler      p(i) = (R_i - R_min) / (R_max - R_min) + p_base,  P(i) = p(i)^alpha / sum_k p(k)^alpha   ReD (2), (1)
    temperature  L_alpha = -mean log_alpha (log pi(a~|s) + target_entropy),  target_entropy = -A
    policy       L_pi = mean (alpha log pi(a~|s) - min Q(s, a~))
    critic       y = r + gamma (1 - terminated) min Q_target(s', a')
                 L_Q = sum over C of mean (y - Q(s, a))^2 + cql_alpha gap                                 CQL (4)
                 gap = mean (T log sum_k exp((Q(s, a_k) - log mu(a_k)) / T) - Q(s, a)), where 3 n actions a_k are
                 sampled: n uniformly, n from pi(.|s), n from pi(.|s'); log mu is their log-density      CQL, Appendix F
    multiplier   with --lagrange-gap G: multiplier cql_alpha (gap - G) takes the place of cql_alpha gap, and
                 L_multiplier = -multiplier cql_alpha (gap - G), mean over C                              CQL (30)
    targets      Q_target <- (1 - polyak) Q_target + polyak Q
In each update all gradients belong to the same old parameters (the order of JaxCQL).

What differs from the papers and their code, and why.
    - The ReD paper used JaxCQL (Geng's reimplementation) and reports none of its settings: --preset jaxcql has that
      code's defaults. --preset corl has CORL's for MuJoCo, where its code makes nothing of two of its own flags
      (orthogonal weights of the policy, depth of the second critic); here they hold for all networks.
    - The Bellman error has no factor 1/2, as in JaxCQL, CORL and the authors' code: cql_alpha is twice the paper's.
    - The soft maximum has no -log(3 n), as in these three: the gap is T log(3 n) larger than an estimate of it would
      be, which matters to --lagrange-gap and --gap-floor alone. With the former cql_alpha multiplies G too, as in
      JaxCQL and CORL.
    - Actions drawn for s' are used at s, as in the authors' code: they are but one more proposal distribution.
    - Log-probabilities come from the actions before the tanh, where atanh would have lost their digits; only for logged
      actions (--bc-updates) atanh is needed, and therefore these are clipped to +-0.999.
    - R_i is the return of the whole episode as logged, before any reward transformation. The ReD code drops the last
      step of every timed-out episode; we keep its reward, and its transition where the data has its next observation.
    - With p_base = 0 the worst episode leaves the support of the data; the run says how many transitions that are.
    - Drawing from a cached cumulative sum instead of numpy.random.choice: the same distribution, O(log N) per draw.
    - Bootstrapping goes on through time limits (truncation) and stops at true ends (termination).
    - Weights and draws come from generators of each seed's own, so that a seed gives the same run alone or with others.

Reading:  the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:      python algorithms/cql_red.py --dataset hopper/replay-v0 --sampler red
Expected: 72 ± 6 with --dataset hopper/medium-expert-v0 --num-updates 5000 --preset corl --policy-learning-rate 1e-4
          --hidden-sizes 128 128 --num-seeds 3; uniform sampling: 31 ± 12; the data's average episode: 45
          (benchmarks.md, cql). The paper's million updates: not run yet.
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
    dataset: tuple[str, ...] = ("hopper/replay-v0",)
    """Minari ids, Minari folders or D4RL .hdf5 files, concatenated; `ID:0.1` takes a tenth of the episodes"""
    env_id: str | None = None
    """evaluation environment; default: the dataset's own (D4RL files: from the file's name)"""
    seed: int = 0
    """first seed; agent k uses seed + k"""
    num_seeds: int = 1
    """agents trained side by side in one batched computation (the axis S)"""
    sampler: Literal["uniform", "red", "reward", "top10", "aw", "rw"] = "red"
    """uniform: plain CQL; red: by episode return, ReD eqs. (1)-(2); reward: the same with the transition's own reward;
    top10: the tenth of the transitions with the best episode return; rw, aw: softmax of the episode's return, or of its
    advantage over a linear fit (Hong et al., 2023)"""
    alpha: float = 1.0
    """ReD's exponent: 0 is uniform, infinity draws the best episode only (sampler red, reward)"""
    p_base: float = 0.0
    """ReD's floor under the normalised return, infinity being uniform; AntMaze and other tasks with 0/1 returns: 0.2
    (sampler red, reward)"""
    temperature: float = 0.1
    """softmax temperature of the samplers rw and aw"""
    num_updates: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """transitions per update and seed (the axis B)"""
    preset: Literal["jaxcql", "corl"] = "jaxcql"
    """whose settings the flags below take that say so: the code behind the ReD paper's results, or CORL's for MuJoCo"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers of every network; jaxcql: 256 256, corl: 256 256 256 (Kitchen: 512 512 512; CORL's
    critics for AntMaze have five layers)"""
    init: Literal["lecun", "orthogonal"] | None = None
    """how weights begin; jaxcql: lecun, corl: orthogonal"""
    normalize_obs: bool | None = None
    """observations scaled to mean 0, deviation 1 over the data; jaxcql: False, corl: True (AntMaze, Kitchen: False)"""
    learning_rate: float = 3e-4
    """Adam step size of the critics (and of --lagrange-gap's multiplier)"""
    policy_learning_rate: float | None = None
    """Adam step size of policy and SAC's temperature; jaxcql: 3e-4, corl: 3e-5 (AntMaze, Adroit: 1e-4)"""
    gamma: float = 0.99
    """discount factor"""
    cql_alpha: float | None = None
    """weight of the conservative gap, twice the paper's alpha; jaxcql: 5, corl: 10 (AntMaze: 5, Adroit: 1)"""
    cql_temperature: float = 1.0
    """T: the soft maximum's temperature"""
    num_action_samples: int = 10
    """actions at each state from each of the three sources of the soft maximum (n)"""
    importance_sampling: bool = True
    """divide by the density of each sampled action; if not, the logged action is one more term of the soft maximum
    (Kitchen, after Hong et al.: not)"""
    gap_floor: float | None = None
    """a state's gap counts as no less than this; AntMaze (corl): -200; default: no floor"""
    lagrange_gap: float | None = None
    """tune a multiplier of cql_alpha that keeps the gap here; AntMaze (corl): 0.8; default: no multiplier"""
    max_target_backup: bool = False
    """bootstrap from the best of num_action_samples actions at s'; AntMaze (corl): on"""
    backup_entropy: bool = False
    """bootstrap from soft values, as SAC does: minus alpha log pi(a'|s')"""
    bc_updates: int = 0
    """in the first updates the policy clones logged actions instead of climbing Q; the authors' code: 40,000"""
    polyak: float = 0.005
    """share of the online critics in their targets at every update"""
    reward_transform: Literal["auto", "none", "stretch"] = "auto"
    """what the learner sees: stretch: 10 r - 5; auto: stretch for AntMaze and PointMaze, else none"""
    eval_every: int = 5_000
    """updates between evaluations; AntMaze: 100,000"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, with the policy's deterministic action; AntMaze: 100; 0: never evaluate"""
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
    """where the results go; default runs/cql_red/<dataset>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos"""

    def __post_init__(self):
        """Flags that the user has left open take the preset's value."""
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


PRESETS = {
    "jaxcql": {
        "hidden_sizes": (256, 256),
        "init": "lecun",
        "normalize_obs": False,
        "policy_learning_rate": 3e-4,
        "cql_alpha": 5.0,
    },
    "corl": {
        "hidden_sizes": (256, 256, 256),
        "init": "orthogonal",
        "normalize_obs": True,
        "policy_learning_rate": 3e-5,
        "cql_alpha": 10.0,
    },
}

# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_updates", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: draw good episodes more often
# ---------------------------------------------------------------------------------------------------------------------


def red_probabilities(episode_returns, episode_lengths, alpha=1.0, p_base=0.0):
    """Sampling probability of every transition under ReD, eqs. (1)-(2).

    episode_returns: (E,) undiscounted returns R; episode_lengths: (E,) numbers of transitions.
    Returns (N,) float64 that sums to 1, N = sum(episode_lengths).
    """
    return rebalance(np.repeat(np.float64(episode_returns), episode_lengths), alpha, p_base)


def rebalance(goodness, alpha, p_base):
    """P(i) = p_i^alpha / sum_k p_k^alpha with p = (x - x_min) / (x_max - x_min) + p_base; x = goodness (N,)."""
    span = goodness.max() - goodness.min()
    if span == 0 or alpha == 0 or p_base == math.inf:  # everything equally good, or no preference
        return np.full(len(goodness), 1 / len(goodness))
    p = (goodness - goodness.min()) / span + p_base
    p = (p / p.max()) ** alpha  # at most 1, so that no exponent overflows; alpha = inf leaves the best only
    return p / p.sum()


def top_probabilities(episode_returns, episode_lengths, fraction=0.1):
    """Uniform over the best episodes: from the best downwards while they hold less than `fraction` of the
    transitions, one at least. Arrays (E,) of episodes; the result (N,), one for each transition, sums to 1."""
    best_first = np.argsort(-np.float64(episode_returns), kind="stable")
    best_first = best_first[episode_lengths[best_first] > 0]
    num_kept = max(1, np.searchsorted(np.cumsum(episode_lengths[best_first]), fraction * sum(episode_lengths)))
    kept = np.isin(np.arange(len(episode_returns)), best_first[:num_kept])
    p = np.repeat(kept.astype(np.float64), episode_lengths)
    return p / p.sum()


def softmax_probabilities(episode_goodness, episode_lengths, temperature):
    """Hong et al.'s RW and AW: P(i) ~ exp(x / temperature), x being the goodness (E,) of i's episode, in [0, 1]."""
    x = np.float64(episode_goodness) - np.min(episode_goodness)
    x = np.repeat(x / (x.max() or 1.0), episode_lengths)
    p = np.exp((x - x.max()) / temperature)
    return p / p.sum()


def sampling_probabilities(dataset, args):
    """P(i) of every transition (N,) float64 for --sampler, from the rewards as logged."""
    returns, lengths = dataset.episode_returns, dataset.episode_lengths
    rewards = dataset.transitions[:, dataset.obs_dim + dataset.action_dim]
    if args.sampler == "red":
        return red_probabilities(returns, lengths, args.alpha, args.p_base)
    if args.sampler == "reward":
        return rebalance(np.float64(rewards), args.alpha, args.p_base)
    if args.sampler == "top10":
        return top_probabilities(returns, lengths)
    if args.sampler == "rw":
        return softmax_probabilities(returns, lengths, args.temperature)
    if args.sampler == "aw":  # advantage over what the first observation predicts, by least squares with intercept
        first_obs = dataset.transitions[np.cumsum(lengths) - lengths, : dataset.obs_dim]
        features = np.c_[np.float64(first_obs), np.ones(len(returns))]
        fit = np.linalg.lstsq(features, returns, rcond=None)[0]
        return softmax_probabilities(returns - features @ fit, lengths, args.temperature)
    return np.full(sum(lengths), 1 / sum(lengths))


class Sampler:
    """Draws transition indices by inverting the cumulative distribution: O(log N) per draw, on the device."""

    def __init__(self, probabilities, device):
        self.num_transitions = len(probabilities)
        uniform = np.all(probabilities == probabilities[0])
        # in float64: in float32 the sum of a million probabilities is off by 1 %
        self.cdf = None if uniform else torch.from_numpy(np.cumsum(probabilities)).to(device)

    def __call__(self, u):
        """u: float64 uniform on [0, 1), any shape. Returns int64 indices of that shape."""
        if self.cdf is None:
            return (u * self.num_transitions).long()
        index = torch.searchsorted(self.cdf, u * self.cdf[-1], right=True)  # right: never where P is 0
        return index.clamp_(max=self.num_transitions - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product.
# ---------------------------------------------------------------------------------------------------------------------


def lecun_normal(weight, bias, generator):
    """Normal weight (in, out) of variance 1 / in, cut at two deviations, zero bias (out): what flax does."""
    std = weight.shape[0] ** -0.5 / 0.87962566  # the cut takes the rest of the deviation
    nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std, generator=generator)
    bias.zero_()


def small_uniform(weight, bias, generator):
    """Uniform weight (in, out) of variance 0.01 / in, zero bias (out): JaxCQL's last layers."""
    bound = math.sqrt(3 * 0.01 / weight.shape[0])
    weight.uniform_(-bound, bound, generator=generator)
    bias.zero_()


def orthogonal(weight, bias, generator):
    """Orthogonal weight (in, out) with gain sqrt(2), which suits a ReLU behind it; zero bias (out)."""
    nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=generator)
    bias.zero_()


def small_orthogonal(weight, bias, generator):
    """Orthogonal weight (in, out) with gain 0.01, zero bias (out): CORL's last layers."""
    nn.init.orthogonal_(weight, gain=0.01, generator=generator)
    bias.zero_()


def init_last_layer(mlp, init, generators):
    """Draws the last layer of every network in `mlp` anew."""
    weight, bias = (x.detach() for x in mlp.layers[-1])
    for s, generator in enumerate(generators):
        for w, b in zip(weight[s].view(-1, *weight.shape[-2:]), bias[s].view(-1, bias.shape[-1])):
            init(w, b, generator)


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


class ScaledTanhGaussianActor(nn.Module):
    """pi(a|s): a = tanh(mean(s) + std(s) * noise), where two learned scalars scale and shift log std, as in JaxCQL."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, init, generators, obs_mean, obs_scale):
        super().__init__()
        S = len(generators)
        self.net = MLP((S,), [obs_dim, *hidden_sizes, 2 * action_dim], init, generators)
        self.log_std_scale = nn.Parameter(torch.ones(S, 1, 1))
        self.log_std_shift = nn.Parameter(-torch.ones(S, 1, 1))
        self.register_buffer("obs_mean", torch.as_tensor(obs_mean).expand(S, 1, obs_dim).clone())
        self.register_buffer("obs_scale", torch.as_tensor(obs_scale).expand(S, 1, obs_dim).clone())

    def forward(self, obs):
        """obs (S, B, O) -> mean, log_std, each (S, B, A), before the tanh."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (self.log_std_scale * log_std + self.log_std_shift).clamp(-20, 2)

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

    def act(self, obs):
        """The deterministic action (S, B, A) in [-1, 1] that evaluations use, for observations as they come, not yet
        normalised as the learner's are."""
        return self((obs - self.obs_mean) / self.obs_scale)[0].tanh()


class CQLAgent(nn.Module):
    """Networks, temperatures, multipliers and optimisers of S independent agents.

    obs_mean, obs_scale: what the learner's observations have been normalised by, if they have.
    """

    def __init__(self, obs_dim, action_dim, args, device, obs_mean=0.0, obs_scale=1.0):
        super().__init__()
        S, hidden = args.num_seeds, args.hidden_sizes
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(S)]
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]  # of a packed transition: s, a, r, s', not terminated
        inits = {"lecun": (lecun_normal, small_uniform), "orthogonal": (orthogonal, small_orthogonal)}
        init, last_init = inits[args.init]
        self.actor = ScaledTanhGaussianActor(obs_dim, action_dim, hidden, init, generators, obs_mean, obs_scale)
        self.critic = ManyActionCritic((S, 2), [obs_dim + action_dim, *hidden, 1], init, generators)
        for mlp in (self.actor.net, self.critic):
            init_last_layer(mlp, last_init, generators)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(S))
        self.log_multiplier = nn.Parameter(torch.ones(S))  # with --lagrange-gap
        self.target_entropy = -float(action_dim)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.float64))
        self.to(device)
        self.optimizers = nn.ModuleDict({
            "alpha": Adam([self.log_alpha], args.policy_learning_rate),
            "actor": Adam(self.actor.parameters(), args.policy_learning_rate),
            "critic": Adam(self.critic.parameters(), args.learning_rate),
            "multiplier": Adam([self.log_multiplier], args.learning_rate),
        })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def conservative_gap(q, log_density, args):
    """How far a soft maximum of Q over sampled actions is above Q of the logged action, CQL (4).

    q (S, C, 1 + K, B): of the logged action, then of the K sampled ones; log_density (S, K, B) of these -> (S, C, B).
    """
    terms = q[:, :, 1:] - log_density[:, None] if args.importance_sampling else q
    soft_maximum = args.cql_temperature * (terms / args.cql_temperature).logsumexp(2)
    gap = soft_maximum - q[:, :, 0]
    return gap if args.gap_floor is None else gap.clamp(min=args.gap_floor)


def noise_shapes(args, action_dim):
    """Shapes of the standard normal noise that `update` takes for one seed: for n random actions, for 1 + n of the
    policy's at s, and for n + 1 at s' (n + n with max_target_backup)."""
    n = args.num_action_samples
    counts = n, 1 + n, n + (n if args.max_target_backup else 1)
    return [(count, args.batch_size, action_dim) for count in counts]


def update(agent, batch, random_noise, noise, next_noise, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    batch: (S, B, O + A + 1 + O + 1) packed transitions; random_noise, noise, next_noise: (S, *shape) of noise_shapes.
    Returns a dict of metrics, each (S,), on the device.
    """
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)
    reward, not_terminated = reward.squeeze(-1), not_terminated.squeeze(-1)  # (S, B)
    n, A = args.num_action_samples, action.shape[-1]

    # every action of this update comes from the policy as it is now
    policy_action, log_prob = agent.actor.sample(obs, noise)  # (S, 1 + n, B, A), (S, 1 + n, B)
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(next_obs, next_noise)
        random_action = torch.erf(random_noise / math.sqrt(2))  # uniform on [-1, 1]: 2 Phi(noise) - 1

    # temperature: alpha grows while the entropy -log_prob is below its target; this update still has the old alpha
    alpha = agent.log_alpha.detach().exp()[:, None]  # (S, 1)
    entropy_gap = log_prob[:, 0].detach().mean(-1) + agent.target_entropy  # (S,)
    agent.optimizers["alpha"].minimize((-agent.log_alpha * entropy_gap).sum())

    # policy: it climbs the critics before these move
    policy_q = agent.critic(obs, policy_action[:, :1]).amin(1).squeeze(1)  # (S, B)
    if args.bc_updates:  # a tensor decides, so that one CUDA graph fits all updates
        cloning = agent.num_updates < args.bc_updates
        policy_q = torch.where(cloning, agent.actor.log_prob(obs, action), policy_q)
    actor_loss = (alpha * log_prob[:, 0] - policy_q).mean(-1)  # (S,)
    agent.optimizers["actor"].minimize(actor_loss.sum())  # sum over S: seeds never mix

    # critics: towards the Bellman backup; only a true end of the episode cuts the bootstrap
    with torch.no_grad():
        next_q, best = agent.target_critic(next_obs, next_action[:, n:]).amin(1).max(1)  # (S, B); over one action, or n
        if args.backup_entropy:
            next_q = next_q - alpha * next_log_prob[:, n:].gather(1, best[:, None]).squeeze(1)
        backup = reward + args.gamma * not_terminated * next_q  # (S, B)
        actions = torch.cat([action[:, None], random_action, policy_action[:, 1:], next_action[:, :n]], 1)
        log_uniform = torch.full_like(log_prob[:, 1:], -A * math.log(2))
        log_density = torch.cat([log_uniform, log_prob[:, 1:], next_log_prob[:, :n]], 1)  # (S, 3 n, B)
    q = agent.critic(obs, actions)  # (S, C, 1 + 3 n, B)
    critic_loss = (q[:, :, 0] - backup[:, None]).square().mean(-1)  # (S, C)

    # ... and lower at other actions than at the logged ones, CQL (4); the multiplier grows while the gap is above its
    # target, CQL (30)
    gap = conservative_gap(q, log_density, args).mean(-1)  # (S, C)
    penalty = args.cql_alpha * gap
    if args.lagrange_gap is not None:
        multiplier = agent.log_multiplier.exp().clamp(max=1e6)[:, None]  # (S, 1)
        excess = args.cql_alpha * (gap - args.lagrange_gap)
        penalty = multiplier.detach() * excess
        agent.optimizers["multiplier"].minimize(-(multiplier * excess.detach()).mean(1).sum())
    agent.optimizers["critic"].minimize((critic_loss + penalty).sum())

    # targets
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_critic.parameters()), list(agent.critic.parameters()), args.polyak)
        agent.num_updates.add_(1)

    metrics = {
        "loss/actor": actor_loss.detach(),
        "loss/critic": critic_loss.detach().sum(1),
        "loss/conservative_gap": gap.detach().mean(1),
        "value/q": q[:, :, 0].detach().mean((1, 2)),
        "value/q_random": q[:, :, 1 : 1 + n].detach().mean((1, 2, 3)),
        "policy/entropy": -log_prob[:, 0].detach().mean(-1),
        "policy/alpha": alpha.squeeze(-1),
    }
    if args.lagrange_gap is not None:
        metrics["policy/multiplier"] = multiplier.detach().squeeze(-1)
    return metrics


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


def stretch_rewards(dataset, mode):
    """Rewards as the learner sees them, in place; returns and sampling probabilities come from the logged ones."""
    is_maze = (dataset.environment["id"] or "").startswith(("AntMaze", "PointMaze"))
    if mode == "stretch" or (mode == "auto" and is_maze):  # 0 and 1 become -5 and 5
        reward = dataset.transitions[:, dataset.obs_dim + dataset.action_dim]
        reward[:] = 10 * reward - 5


def scale_observations(dataset):
    """Normalises s and s' in place by mean and standard deviation (+ 0.001) of s over the whole dataset, whatever the
    sampler; returns these two, (O,) each."""
    obs, next_obs = dataset.transitions[:, : dataset.obs_dim], dataset.transitions[:, -1 - dataset.obs_dim : -1]
    mean, scale = np.float32(obs.mean(0, np.float64)), np.float32(obs.std(0, np.float64) + 1e-3)
    obs[:], next_obs[:] = (obs - mean) / scale, (next_obs - mean) / scale
    return mean, scale


def main():
    args = parse_args()
    check_range(args, 1, math.inf, "num_seeds", "num_updates", "batch_size", "hidden_sizes", "eval_every")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 1, math.inf, "checkpoint_every", "log_every", "num_action_samples")
    check_range(args, 0, math.inf, "alpha", "p_base", "cql_alpha", "bc_updates", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "learning_rate", "policy_learning_rate", "gamma", "polyak")
    check_range(args, 1e-6, math.inf, "temperature", "cql_temperature")
    check_range(args, -math.inf, math.inf, "gap_floor", "lagrange_gap")
    if args.evaluate:
        return evaluate_run(args, CQLAgent)
    device, S = choose_device(args.device), args.num_seeds
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # data, on the device; the sampler sees the rewards as logged, the learner transformed ones
    dataset = load_dataset(args.dataset, args.env_id, args.seed)
    if args.eval_episodes or dataset.environment["id"]:
        fit_to_environment(dataset)
    probabilities = sampling_probabilities(dataset, args)
    stretch_rewards(dataset, args.reward_transform)
    obs_mean, obs_scale = scale_observations(dataset) if args.normalize_obs else (0.0, 1.0)
    actions_of(dataset).clip(-0.999, 0.999, out=actions_of(dataset))  # atanh stays finite
    transitions, sampler = torch.from_numpy(dataset.transitions).to(device), Sampler(probabilities, device)

    # agents, in a run folder that is new or goes on from its checkpoint
    agent = CQLAgent(dataset.obs_dim, dataset.action_dim, args, device, obs_mean, obs_scale)
    generators = [torch.Generator(device).manual_seed(args.seed + s) for s in range(S)]
    checkpoint = load_checkpoint(args.resume, device) if args.resume else {"num_updates": 0}
    num_updates = first_update = checkpoint["num_updates"]
    if num_updates > args.num_updates:
        fail(f"{args.resume} has {num_updates} updates already", "give a larger --num-updates, or leave it out")
    name = "+".join(args.dataset).replace("/", "-").replace(":", "-").strip("-.")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, name, dataset.environment)
    writer = SummaryWriter(run_dir, purge_step=num_updates + 1)
    evaluator = Evaluator(args, dataset.environment, run_dir, writer)
    report_sampling(dataset, probabilities, writer)
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        for generator, state in zip(generators, checkpoint["generators"]):
            if len(state) == len(generator.get_state()):  # else it comes from another kind of device: new draws
                generator.set_state(state.cpu())
        evaluator.resume(num_updates, checkpoint["pending_evaluations"], agent.actor)

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
    learn, graph = partial(run_updates, agent, transitions, args), None
    started, printed, block_start, stopped, rate = time.time(), time.time(), -1, False, 0
    while num_updates < args.num_updates and not stopped:
        # draw, a block of updates at a time; a resumed run draws the block it is in again
        if block_start != num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK:
            block_start = num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK
            generator_states = [generator.get_state() for generator in generators]
            block = draw_block(sampler, generators, args.batch_size, *noise_shapes(args, dataset.action_dim))
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
        if num_updates % args.eval_every == 0 or done:
            evaluator.submit(num_updates, agent.actor)
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
    writer.close()
    if num_updates < args.num_updates:
        print(f"stopped at update {num_updates:,}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    print_result(args, run_dir, num_updates, rate)


if __name__ == "__main__":
    main()
