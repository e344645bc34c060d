"""RvS + LDS: return-conditioned cloning, its examples weighted by the rarity of their returns.

Papers: A. Khalil, O. Ismaili, A. A. Hmamouchi, "Developing a Weighted Sampling Approach for Offline Reinforcement
Learning Using Imbalanced Regression Techniques", 2025 (IR); S. Emmons, B. Eysenbach, I. Kostrikov, S. Levine, "RvS:
What is Essential for Offline RL via Supervised Learning?", 2021, arXiv:2112.10751 (RvS); Y. Yang, K. Zha, Y.-C. Chen,
H. Wang, D. Katabi, "Delving into Deep Imbalanced Regression", 2021, arXiv:2102.09554 (LDS).

Idea. A policy that clones a mixture of good and bad episodes acts like their average. Here it is told, as one more
input, the return that the episode went on to collect: it learns what was done on the way to which return, and acting
well is asking for much. But the data has few examples of the returns one wants to ask for. Label distribution smoothing
(LDS) estimates the density of the returns, smoothed because neighbouring returns teach each other, and weighs each
example by its inverse: rare returns, high or low, count as much as frequent ones.

Objectives (S seeds, B batch, O observation, A action, N examples; the papers number none of these, so we do):
    condition  G_t = sum over k of gamma^k r_{t+k} to the end of the episode, gamma = 1; an input beside s      (1)
    weight     w_i = 1 / p(y_i), scaled to an average of 1; p: histogram of y = G, Gaussian kernel over it      (2)
    actor      L_pi = -mean w_i log pi(a_i | s_i, G_i)                                                          (3)
    acting     a_t = mean of pi(. | s_t, g_t); g_0 = target return, g_{t+1} = (g_t - r_t) / gamma               (4)
The IR paper's names: BC is --condition none --weighting none (10 % BC: also --top-fraction 0.1), Own Return is
--weighting none, IR is the default. RvS-R is --condition average --weighting none; as its authors run it also
--learning-rate 1e-3 --weight-decay 0 --dropout 0 --batch-size 16384 (there without normalised inputs).

What differs from the papers and their code, and why.
    - The IR paper calls G a trajectory return but prints the return to go; we condition on the latter. It normalises
      states and says nothing of G; we normalise both, or thousands beside units would drown the state.
    - It does not say what it asks for in an evaluation. We ask for the best return in the data and count down, (4).
      When training ends, other --target-return give the curve of asked against achieved.
    - It does not say what y is, nor bins and kernel. We take G, 100 bins and the kernel of the LDS code (5 bins, sigma
      2), which folds the tails of the Gaussian back into its window; --kernel plain cuts them off. As there, nothing
      lies beyond the smallest and largest y: an outermost bin weighs up to 1.6 times an inner one of the same count.
    - It does not say whether IR is conditioned. Its scores follow Own Return's, not BC's, so here it is.
    - Its title says sampling, its formula weighs the loss. The formula is the default; --weighting lds_sampling draws
      with probability w / sum of w: the same expected gradient.
    - Weights have no bound, as printed: one isolated return among many examples can rule its batch. See --max-weight.
    - Layer normalisation is in its text but not in its list of layers: a flag, off.
    - log_std stays in [-5, 2], as in iql_red.py; RvS leaves it free.
    - A truncated episode may have lost its last transition (D4RL files), but not that step's reward, which is in G.
    - --condition average: G over the steps that the longest episode has left, and a constant to ask for (RvS).
    - Actions outside [-1, 1] are clipped when acting, not in the likelihood (RvS leaves that to the environment).
    - Weights, draws and dropout masks come from generators of each seed's own, so that a seed gives the same run alone
      or among others.

Reading:  the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:      python algorithms/rvs_lds.py --dataset halfcheetah/replay-v0 --weighting lds
Expected: 44 ± 0 with --num-updates 10000 --hidden-sizes 256 256 --num-seeds 3, also without --weighting; BC: 2;
          the data's average episode: 27 (benchmarks.md, rvs).
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
from typing import Literal

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
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
    condition: Literal["none", "return", "average"] = "return"
    """what the policy sees beside the state: none: behaviour cloning; return: the return to go (1); average: that
    divided by the steps that the longest episode in the data has left, as RvS-R has it"""
    target_return: tuple[float, ...] = ()
    """returns to ask for; the first: in evaluations.csv; all: when training ends and in --evaluate. Default: the best
    return in the data, then 1/4, 1/2, 3/4 and 5/4 of the way from the worst to it"""
    weighting: Literal["none", "lds", "lds_sampling"] = "lds"
    """lds: weights 1 / smoothed density in the loss (2), (3); lds_sampling: as sampling probabilities instead"""
    lds_target: Literal["return_to_go", "episode_return"] = "return_to_go"
    """y: whose density it is (like the next six flags, only with --weighting lds or lds_sampling)"""
    num_bins: int = 100
    """bins of equal width between the smallest and the largest y"""
    kernel_size: int = 5
    """bins under the smoothing kernel, an odd number; 1: plain inverse frequencies"""
    sigma: float = 2.0
    """standard deviation of the Gaussian kernel, in bins"""
    kernel: Literal["folded", "plain"] = "folded"
    """folded: tails outside the window are folded back into it, as in the LDS authors' code; plain: they are cut off"""
    density_power: float = 1.0
    """exponent of the counts before smoothing; 0.5: LDS's square-root inverse, which weighs less steeply"""
    max_weight: float = math.inf
    """bound of the weights where their average is 1; they are then scaled to that average again, and may exceed it"""
    top_fraction: float = 1.0
    """learn from the best episodes only, that hold this share of the transitions; 0.1: 10 % BC"""
    num_updates: int = 200_000
    """gradient steps; 100 epochs of D4RL's million transitions are 195,000"""
    batch_size: int = 512
    """transitions per update and seed (the axis B)"""
    hidden_sizes: tuple[int, ...] = (1024, 1024)
    """widths of the policy's hidden layers"""
    dropout: float = 0.1
    """dropout rate after each hidden layer"""
    layernorm: bool = False
    """layer normalisation before the ReLU of each hidden layer"""
    state_dependent_std: bool = False
    """the standard deviation is an output of the network (else one learned number per action dimension)"""
    learning_rate: float = 5e-4
    """Adam step size; RvS: 1e-3"""
    weight_decay: float = 1e-4
    """L2 regularisation, in the gradient that Adam sees; RvS: 0"""
    gamma: float = 1.0
    """discount factor of the return to go"""
    eval_every: int = 5_000
    """updates between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, with the mean action; 0: never evaluate"""
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
    """where the results go; default runs/rvs_lds/<dataset>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos, asking for the first target of training"""


# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_updates", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video", "target_return"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: tell the policy the return of what it clones, and count rare returns more
# ---------------------------------------------------------------------------------------------------------------------


def returns_to_go(rewards, episode_lengths, episode_returns, gamma=1.0):
    """G_t = r_t + gamma G_{t+1} of every transition, (1): (N,) float64.

    rewards: (N,); episode_lengths, episode_returns: (E,). What a return has beyond the sum of its rewards belongs to a
    last step that gave no transition.
    """
    ends = np.cumsum(episode_lengths)
    G = np.array(rewards, np.float64)
    G[ends - 1] += gamma * (episode_returns - np.add.reduceat(G, ends - episode_lengths))
    for k in range(2, max(episode_lengths) + 1):  # the k-th step from the end, of all episodes that have one
        i = ends[episode_lengths >= k] - k
        G[i] += gamma * G[i + 1]
    return G


def conditions_of(G, episode_lengths, condition):
    """What the policy is told beside the state: nothing (N, 0), or (N, 1) of G, or of G divided by the steps that the
    longest episode has left."""
    if condition == "none":
        return np.empty((len(G), 0))
    if condition == "average":
        t = np.arange(len(G)) - np.repeat(np.cumsum(episode_lengths) - episode_lengths, episode_lengths)
        G = G / (max(episode_lengths) - t)
    return G[:, None]


def smoothing_kernel(kernel_size, sigma, kernel="folded"):
    """A Gaussian around the middle of kernel_size bins, 1 at its peak: (K,).

    folded: tails outside of the window are folded back into it. That is the LDS code's kernel: an impulse of the
    window's size under scipy's gaussian_filter1d, which reflects at both ends and reaches to 4 sigma.
    """
    distance = np.arange(kernel_size) - kernel_size // 2
    if kernel == "plain":
        return np.exp(-0.5 * (distance / sigma) ** 2)
    reach = int(4 * sigma + 0.5)
    folds = np.arange(-(reach // kernel_size) - 1, reach // kernel_size + 2)
    distance = distance + kernel_size * folds[:, None]
    density = np.where(abs(distance) <= reach, np.exp(-0.5 * (distance / sigma) ** 2), 0).sum(0)
    return density / density.max()


def smoothed_density(targets, num_bins, kernel_size, sigma, kernel="folded", power=1.0):
    """Bin of every target (N,), examples in each bin (num_bins,), and these counts smoothed, up to a factor."""
    span = np.ptp(targets) or 1.0
    bins = np.minimum((targets - targets.min()) / span * num_bins, num_bins - 1).astype(int)
    counts = np.bincount(bins, minlength=num_bins)
    smoothed = np.convolve(counts**power, smoothing_kernel(kernel_size, sigma, kernel))
    return bins, counts, smoothed[kernel_size // 2 :][:num_bins]


def lds_weights(targets, num_bins, kernel_size, sigma, kernel="folded", power=1.0, max_weight=math.inf):
    """w = 1 / smoothed density of the targets (N,), scaled to an average of 1, (2): (N,) float64.

    A target's own bin holds at least itself, under the peak of the kernel, so that no weight is infinite.
    """
    bins, _, smoothed = smoothed_density(targets, num_bins, kernel_size, sigma, kernel, power)
    weights = 1 / smoothed[bins]
    weights = np.minimum(weights / weights.mean(), max_weight)
    return weights / weights.mean()


def density_weights(targets, args):
    """lds_weights as the flags say, or ones: (N,)."""
    if args.weighting == "none":
        return np.ones(len(targets))
    kernel = args.kernel_size, args.sigma, args.kernel
    return lds_weights(targets, args.num_bins, *kernel, args.density_power, args.max_weight)


def top_probabilities(episode_returns, episode_lengths, fraction=0.1):
    """Uniform over the best episodes: from the best downwards while they hold less than `fraction` of the
    transitions, one at least. Arrays (E,) of episodes; the result (N,), one for each transition, sums to 1."""
    best_first = np.argsort(-np.float64(episode_returns), kind="stable")
    best_first = best_first[episode_lengths[best_first] > 0]
    num_kept = max(1, np.searchsorted(np.cumsum(episode_lengths[best_first]), fraction * sum(episode_lengths)))
    kept = np.isin(np.arange(len(episode_returns)), best_first[:num_kept])
    p = np.repeat(kept.astype(np.float64), episode_lengths)
    return p / p.sum()


def best_episodes(dataset, fraction):
    """The dataset without the episodes that top_probabilities never draws: for 10 % BC."""
    if fraction == 1:
        return dataset
    lengths, returns = dataset.episode_lengths, dataset.episode_returns
    kept = top_probabilities(returns, lengths, fraction) > 0  # (N,)
    best = kept[np.cumsum(lengths) - lengths]  # (E,)
    rows = dataset.transitions[kept]
    return replace(dataset, transitions=rows, episode_lengths=lengths[best], episode_returns=returns[best])


class ReturnToGo(gym.Wrapper):
    """An environment whose observations end with the return that is still to be collected, (4).

    With a horizon, they end with target_return / horizon throughout: the average reward to go.
    """

    def __init__(self, env, target_return, gamma=1.0, horizon=None):
        super().__init__(env)
        self.target_return, self.gamma, self.horizon = target_return, gamma, horizon
        obs_dim = env.observation_space.shape[0]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim + 1,), env.observation_space.dtype)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.return_to_go = self.target_return
        return self.conditioned(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.return_to_go = (self.return_to_go - reward) / self.gamma
        return self.conditioned(obs), reward, terminated, truncated, info

    def conditioned(self, obs):
        return np.append(obs, self.target_return / self.horizon if self.horizon else self.return_to_go)


def make_return_to_go(env_id, env_kwargs, render_mode=None, **kwargs):
    return ReturnToGo(make_env({"id": env_id, "kwargs": env_kwargs}, render_mode=render_mode), **kwargs)


gym.register("ReturnToGo-v0", make_return_to_go, disable_env_checker=True)  # run_episodes then knows no difference


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


def orthogonal(weight, bias, generator):
    """Orthogonal weight (in, out) with gain sqrt(2), which suits a ReLU behind it; zero bias (out)."""
    nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=generator)
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


class RegularizedMLP(MLP):
    """An MLP with dropout after every hidden layer and, with layernorm, layer normalisation before its ReLU.

    The hidden units to keep come from outside, because random numbers have one generator per seed.
    """

    def __init__(self, lead, sizes, init, generators, dropout=0.0, layernorm=False):
        super().__init__(lead, sizes, init, generators, dropout)
        self.hidden_sizes, self.norms = list(sizes[1:-1]), []
        for i, size in enumerate(self.hidden_sizes if layernorm else ()):
            self.norms.append((nn.Parameter(torch.ones(*lead, 1, size)), nn.Parameter(torch.zeros(*lead, 1, size))))
            self.register_parameter(f"gain{i}", self.norms[i][0])
            self.register_parameter(f"shift{i}", self.norms[i][1])

    def forward(self, x, kept=None):
        """x (S, B, in) -> (S, B, out); kept: bools (S, B, sum of hidden sizes), None: no dropout."""
        if self.dropout and kept is not None:
            kept = kept.split(self.hidden_sizes, -1)
        for i, (weight, bias) in enumerate(self.layers[:-1]):
            x = torch.baddbmm(bias, x, weight)  # (S, B, H)
            if self.norms:
                gain, shift = self.norms[i]
                x = F.layer_norm(x, x.shape[-1:]) * gain + shift
            x = x.relu_()
            if self.dropout and kept is not None:
                x = x * (kept[i] * (1 / (1 - self.dropout)))  # on average, units count as much as without dropout
        weight, bias = self.layers[-1]
        return torch.baddbmm(bias, x, weight)


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


class AdamL2(Adam):
    """Adam with L2 regularisation: weight_decay * parameter joins the gradient, as in torch.optim.Adam (not AdamW)."""

    def __init__(self, parameters, learning_rate, weight_decay):
        super().__init__(parameters, learning_rate)
        self.weight_decay = weight_decay

    def minimize(self, loss):
        grads = torch.autograd.grad(loss, self.params)
        learning_rate, num_steps, *moments = self.buffers()
        with torch.no_grad():
            num_steps.add_(1)
            torch._fused_adam_(
                self.params, grads, moments[::2], moments[1::2], [], [num_steps] * len(grads), lr=learning_rate,
                beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=self.weight_decay, amsgrad=False, maximize=False,
            )  # fmt: skip


def normalize(obs, mean, std):
    """Observations as the networks see them: eq. (4) of TD3+BC (Fujimoto and Gu, 2021)."""
    return (obs - mean) / (std + 1e-3)


def gaussian_log_prob(mean, log_std, action):
    """log pi(a|s) of unclipped actions, summed over the action dimensions: (S, B, A) each -> (S, B)."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class DiagonalGaussianActor(nn.Module):
    """pi(a|x) = Normal(mean(x), exp(log_std)), where x is the state and, if conditioned, the return to go.

    log_std is one learned number per action dimension or, state-dependent, the network's second output. The statistics
    of the dataset's inputs, which make x of a raw observation, are part of it.
    """

    def __init__(self, obs_dim, action_dim, args, generators, obs_mean, obs_std):
        super().__init__()
        S = len(generators)
        sizes = [obs_dim, *args.hidden_sizes, (1 + args.state_dependent_std) * action_dim]
        self.net = RegularizedMLP((S,), sizes, orthogonal, generators, args.dropout, args.layernorm)
        with torch.no_grad():
            self.net.layers[-1][0].mul_(0.01 / math.sqrt(2))  # gain 0.01 at the output (RvS, from stable-baselines3)
        self.log_std = None if args.state_dependent_std else nn.Parameter(torch.zeros(S, 1, action_dim))
        self.register_buffer("obs_mean", torch.as_tensor(obs_mean).expand(S, 1, obs_dim).clone())
        self.register_buffer("obs_std", torch.as_tensor(obs_std).expand(S, 1, obs_dim).clone())

    def forward(self, obs, kept=None):
        """Normalised inputs (S, B, O) -> mean (S, B, A) and log_std, (S, B, A) or (S, 1, A)."""
        out = self.net(obs, kept)
        mean, log_std = out.chunk(2, dim=-1) if self.log_std is None else (out, self.log_std)
        return mean, log_std.clamp(-5, 2)

    def act(self, obs):
        """The mean action (S, B, A), clipped to [-1, 1], for inputs as the environment gives them."""
        return self(normalize(obs, self.obs_mean, self.obs_std))[0].clamp(-1, 1)


class RvSAgent(nn.Module):
    """Policies and optimiser of S independent agents.

    obs_dim: of the policy's input; obs_mean, obs_std: (obs_dim,), of the dataset; an agent made without them acts nan
    until load_state_dict brings them.
    """

    def __init__(self, obs_dim, action_dim, args, device, obs_mean=math.nan, obs_std=math.nan):
        super().__init__()
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        self.widths = [obs_dim, action_dim, 1]  # of a packed example: input, action, weight
        self.actor = DiagonalGaussianActor(obs_dim, action_dim, args, generators, obs_mean, obs_std)
        self.to(device)
        adam = AdamL2(self.actor.parameters(), args.learning_rate, args.weight_decay)
        self.optimizers = nn.ModuleDict({"actor": adam})


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def update(agent, batch, kept, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    batch: (S, B, O + A + 1) packed examples, inputs normalised; kept: bools (S, B, sum of hidden sizes), the units that
    dropout leaves. Returns a dict of metrics, each (S,), on the device.
    """
    obs, action, weight = batch.split(agent.widths, dim=-1)

    # clone the logged actions, given the return that followed them, the rarer it is the more, (3)
    mean, log_std = agent.actor(obs, kept)
    log_prob = gaussian_log_prob(mean, log_std, action)  # (S, B)
    actor_loss = -(weight.squeeze(-1) * log_prob).mean(-1)  # (S,)
    agent.optimizers["actor"].minimize(actor_loss.sum())  # sum over S: seeds never mix

    return {
        "loss/actor": actor_loss.detach(),
        "loss/negative_log_likelihood": -log_prob.detach().mean(-1),
        "policy/absolute_error": (mean.detach() - action).abs().mean((1, 2)),
        "policy/std": log_std.detach().exp().mean((1, 2)),
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
# Plumbing of this script: asked against achieved, and pictures for TensorBoard
# ---------------------------------------------------------------------------------------------------------------------


def conditioned_environment(environment, target_return, gamma, horizon):
    """The environment of a conditioned policy, asking for target_return."""
    kwargs = {"env_id": environment["id"], "env_kwargs": environment["kwargs"], "target_return": float(target_return)}
    return {**environment, "id": "ReturnToGo-v0", "kwargs": {**kwargs, "gamma": gamma, "horizon": horizon}}


def sweep_targets(args, actor, environment, number, stop=()):
    """Asks for each of --target-return in turn, prints what is achieved and returns it: one row (target, seed, episode,
    return, length, normalised score) per episode. number: as in episode_seed; stop: as from on_stop_signal."""
    rows = []
    for target in sorted(set(args.target_return)):
        if stop:
            break
        asking = {**environment, "kwargs": {**environment["kwargs"], "target_return": target}}
        returns = []
        for s in range(args.num_seeds):
            env_seeds = [episode_seed(args.seed + s, number, e) for e in range(args.eval_episodes or 10)]
            results = run_episodes(policy_of_seed(actor, s), asking, env_seeds)
            scores = [normalized_score(r, environment["references"]) for r, _ in results]
            rows += [(target, args.seed + s, e, *result, scores[e]) for e, result in enumerate(results)]
            returns.append([r for r, _ in results])
        mean, std = np.mean(returns), np.std(returns, 1).mean()  # of each seed's episodes
        score = score_text(normalized_score(mean, environment["references"]))
        text = f"return {mean:.1f} ± {std:.1f} (standard deviation over {len(results)} episodes){score}"
        print(f"asked for {target:.1f}: {text}", flush=True)
    return rows


def evaluate_targets(args):
    """--evaluate of a conditioned policy: fresh episodes for each of --target-return."""
    run_dir = Path(args.evaluate)
    environment = json.loads((run_dir / "config.json").read_text())["environment"]
    if not environment["id"]:
        fail(f"{run_dir} is a run without environment", "evaluate a run that has one")
    env = make_env(environment)
    agent = RvSAgent(env.observation_space.shape[0], env.action_space.shape[0], args, torch.device("cpu"))
    agent.load_state_dict(load_checkpoint(run_dir, "cpu")["agent"])
    sweep_targets(args, agent.actor, environment, 2**31)


def report_sweep(rows, num_updates, run_dir, writer):
    """Rows of sweep_targets as target_returns.csv and as the picture of asked against achieved."""
    lines = [",".join(map(str, row[:-1])) + f",{row[-1]:.4f}\n" for row in rows]
    header = "target_return,seed,episode,return,length,normalized_score\n"
    write_atomically(run_dir / "target_returns.csv", lambda path: path.write_text(header + "".join(lines)))
    targets = sorted({row[0] for row in rows})
    of_target = [[row[3] for row in rows if row[0] == target] for target in targets]
    mean, std = np.mean(of_target, 1), np.std(of_target, 1)
    curves = {"achieved": mean, "+ one standard deviation": mean + std, "- one": mean - std, "asked for": targets}
    picture = line_chart("achieved return against the return asked for", targets, curves)
    writer.add_image("evaluation/asked_against_achieved", picture, num_updates, dataformats="HWC")


def report_density(targets, weights, args, writer):
    """Prints what the weights do; the picture of LDS: how often each return is, smoothed, and as the loss sees it."""
    name = args.lds_target.replace("_", " ")
    print(f"average {name}: {targets.mean():.1f}, weighted: {np.average(targets, weights=weights):.1f}")
    print(f"weights: {weights.min():.3g} to {weights.max():.3g}, 1 on average")
    density = args.num_bins, args.kernel_size, args.sigma, args.kernel, args.density_power
    bins, counts, smoothed = smoothed_density(targets, *density)
    weighted = np.bincount(bins, weights, args.num_bins)
    curves = {"data": counts, "smoothed": smoothed, "weighted": weighted}
    curves = {name: curve / curve.sum() for name, curve in curves.items()}
    x = targets.min() + (np.arange(args.num_bins) + 0.5) / args.num_bins * np.ptp(targets)
    picture = line_chart(f"share of the examples by {name}", x, curves)
    writer.add_image("data/lds_density", picture, dataformats="HWC")


def report_spread(run_dir, writer):
    """Standard deviation over the episodes of each evaluation, which is how the paper measures stability."""
    if (run_dir / "evaluations.csv").read_text().count("\n") == 1:
        return
    update, seed, _, returns, _, scores = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1, ndmin=2).T
    spread = []
    for n in np.unique(update):
        episodes = [(update == n) & (seed == s) for s in np.unique(seed)]
        spread.append([np.mean([x[e].std() for e in episodes]) for x in (returns, scores)])
        writer.add_scalar("evaluation/std_over_episodes", spread[-1][0], n)
    std, score = np.mean(spread[-10:], 0)
    print(f"standard deviation over episodes, mean of the last 10 evaluations: return {std:.1f}{score_text(score)}")


def line_chart(title, x, curves, size=(640, 400), margin=50):
    """An RGB picture (H, W, 3) of curves {label: y} over x, by pillow, which TensorBoard's images need anyway."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    x, y = np.float64(x), np.float64(list(curves.values()))
    left, right, low, high = x.min(), x.max(), min(0, y.min()), max(0, y.max())
    left, low = left - (left == right), low - (low == high)  # nothing is divided by 0
    column = margin + (x - left) / (right - left) * (size[0] - 2 * margin)
    rows = size[1] - margin - (y - low) / (high - low) * (size[1] - 2 * margin)
    draw.rectangle([margin, margin, size[0] - margin, size[1] - margin], outline="lightgray")
    for position, text in (
        ((margin, 15), title),
        ((5, margin), f"{high:.4g}"),
        ((5, size[1] - margin - 10), f"{low:.4g}"),
        ((margin, size[1] - 40), f"{left:.4g}"),
        ((size[0] - margin - 30, size[1] - 40), f"{right:.4g}"),
    ):
        draw.text(position, text, fill="black")
    for i, (label, color, row) in enumerate(zip(curves, ("navy", "orange", "green", "gray"), rows)):
        draw.line(list(zip(column, row)), fill=color, width=2)
        draw.text((margin + 10, margin + 10 + 15 * i), label, fill=color)
    return np.asarray(image)


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


def dropout_masks(generators, batch_size, hidden_sizes, rate):
    """Which hidden units the next UPDATES_PER_BLOCK = n updates keep: bools (n, S, B, sum of hidden_sizes). Every seed
    draws from its own generator, 16 bits for a unit, which takes a fraction of bernoulli_'s time."""
    n, width = UPDATES_PER_BLOCK, sum(hidden_sizes) if rate else 0
    kept = torch.empty(len(generators), n, batch_size, width, dtype=torch.bool, device=generators[0].device)
    for mask, generator in zip(kept, generators):
        words = torch.empty(mask.numel() // 4, dtype=torch.int64, device=mask.device)  # n is a multiple of 4
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16).view_as(mask)
        torch.ge(bits, round((rate - 0.5) * 2**16), out=mask)
    return kept.transpose(0, 1)


def default_targets(dataset, G):
    """What --target-return is by default: the best return of an episode's start, then fractions of the way to it."""
    starts = G[np.cumsum(dataset.episode_lengths) - dataset.episode_lengths]
    worst, best = starts.min(), starts.max()
    return tuple(float(worst + fraction * (best - worst)) for fraction in (1, 0.25, 0.5, 0.75, 1.25))


def pack_examples(dataset, conditions, weights):
    """What the policy learns from: (N, O + A + 1) float32 of input, action and weight; and mean and standard deviation
    of the inputs, which are normalised. conditions (N, 0 or 1) are part of the input."""
    obs = np.concatenate([dataset.transitions[:, : dataset.obs_dim], conditions], 1)
    mean, std = (x.astype(np.float32) for x in (obs.mean(0, dtype=np.float64), obs.std(0, dtype=np.float64)))
    examples = [normalize(obs, mean, std), actions_of(dataset), weights[:, None]]
    return np.concatenate(examples, 1, dtype=np.float32), mean, std


def main():
    args = parse_args()
    check_range(args, 1, math.inf, "num_seeds", "num_updates", "batch_size", "hidden_sizes", "eval_every")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 1, math.inf, "checkpoint_every", "log_every", "num_bins", "max_weight")
    check_range(args, 0, math.inf, "eval_episodes", "eval_workers", "weight_decay")
    check_range(args, 0, 1, "learning_rate", "top_fraction")
    check_range(args, 0, 0.99, "dropout")
    check_range(args, 0, 10, "density_power")
    check_range(args, 1e-3, 1, "gamma")
    check_range(args, 1e-3, 1e3, "sigma")
    check_range(args, 1, 1e4, "kernel_size")
    if args.kernel_size % 2 == 0:
        fail(f"--kernel-size {args.kernel_size} has no middle", "give an odd number")
    if args.target_return:
        check_range(args, -1e9, 1e9, "target_return")
    if args.evaluate:
        conditioned = args.condition != "none" and not args.capture_video
        return evaluate_targets(args) if conditioned else evaluate_run(args, RvSAgent)
    device, S = choose_device(args.device), args.num_seeds
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # data: every transition is an example, with the return that followed it and a weight
    dataset = load_dataset(args.dataset, args.env_id, args.seed)
    if args.eval_episodes or dataset.environment["id"]:
        fit_to_environment(dataset)
    dataset = best_episodes(dataset, args.top_fraction)
    lengths, returns = dataset.episode_lengths, dataset.episode_returns
    G = returns_to_go(dataset.transitions[:, dataset.obs_dim + dataset.action_dim], lengths, returns, args.gamma)
    targets = G if args.lds_target == "return_to_go" else np.repeat(returns, lengths)
    weights, uniform = density_weights(targets, args), np.ones(len(G))
    in_loss, in_sampler = (uniform, weights) if args.weighting == "lds_sampling" else (weights, uniform)
    probabilities = in_sampler / in_sampler.sum()
    examples, obs_mean, obs_std = pack_examples(dataset, conditions_of(G, lengths, args.condition), in_loss)
    examples, sampler = torch.from_numpy(examples).to(device), Sampler(probabilities, device)
    if args.condition != "none" and dataset.environment["id"]:
        args.target_return = args.target_return or default_targets(dataset, G)
        horizon = int(lengths.max()) if args.condition == "average" else None
        dataset.environment = conditioned_environment(dataset.environment, args.target_return[0], args.gamma, horizon)

    # agents, in a run folder that is new or goes on from its checkpoint
    agent = RvSAgent(len(obs_mean), dataset.action_dim, args, device, obs_mean, obs_std)
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
    if args.weighting != "none":
        report_density(targets, weights, args, writer)
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
    learn, graph = partial(run_updates, agent, examples, args), None
    started, printed, block_start, stopped, rate = time.time(), time.time(), -1, False, 0
    while num_updates < args.num_updates and not stopped:
        # draw, a block of updates at a time; a resumed run draws the block it is in again
        if block_start != num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK:
            block_start = num_updates // UPDATES_PER_BLOCK * UPDATES_PER_BLOCK
            generator_states = [generator.get_state() for generator in generators]
            block = draw_block(sampler, generators, args.batch_size)
            block.append(dropout_masks(generators, args.batch_size, args.hidden_sizes, args.dropout))
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
    if num_updates == args.num_updates and args.eval_episodes:
        report_spread(run_dir, writer)
        if args.condition != "none":
            rows = sweep_targets(args, agent.actor, dataset.environment, num_updates, stop)
            if not stop:
                report_sweep(rows, num_updates, run_dir, writer)
    writer.close()
    if num_updates < args.num_updates or stop:
        print(f"stopped at update {num_updates:,}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    print_result(args, run_dir, num_updates, rate)


if __name__ == "__main__":
    main()
