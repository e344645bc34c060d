"""BRED: offline-to-online RL by balanced replay and ensemble distillation.

Papers: S. Lee et al., "Addressing Distribution Shift in Online Reinforcement Learning with Offline
Datasets", NeurIPS workshop on offline RL, 2020 (BRED); A. Kumar et al., "Conservative Q-Learning for
Offline Reinforcement Learning", 2020, arXiv:2006.04779 (CQL, which cql_red.py explains).

Idea. An agent that was trained offline meets states online that its data does not have, believes
wrong values there, and may lose its good policy before it learns better ones. BRED has two remedies.
Offline and online data stay apart, and an annealed share of every batch comes from either: what is
new is learned at once, what is old is not forgotten. And the policies of N members, trained offline
by cql_red.py, are distilled into one, which then climbs the mean of all N critics by soft
actor-critic, without CQL's pessimism, because the critics' errors in unknown states differ and cancel in part.

Objectives, by BRED's equation numbers. Shapes: S seeds, C critics, B batch, O observation, A action.
A seed has one ensemble: N members, P policies (1, or N independent ones); G = S P. min Q_i is the
smaller of member i's two critics; a~ and a' are fresh actions of the policy at s and s'.
    distil       L = mean (|mean(s) - mixture mean(s)|^2 + |std(s) - mixture std(s)|^2)         (8)
                 where the mixture draws from the members' N Gaussians with equal chance        (9)
    replay       rho_t = rho_0 + (1 - rho_0) min(t, t_final) / t_final of a batch is online     (7)
    critic       y_i = r + gamma (1 - terminated) (min Q_target_i(s', a') - alpha log pi(a'|s'))
                 L_Q = sum over members and both critics of mean (y_i - Q(s, a))^2         (1), (2)
    actor        L_pi = mean (alpha log pi(a~|s) - mean over members of min Q_i(s, a~))  (10), (11)
    temperature  L_alpha = -mean log alpha (log pi(a~|s) + target entropy), the target is -A
    targets      Q_target <- (1 - target_update_rate) Q_target + target_update_rate Q

What differs from the paper, or is not in it.
    - Distillation is before the tanh, where policies are Gaussian. One state in a hundred validates; each seed
      stops for itself. Temperatures start at the members' geometric mean. All gradients of an update are of
      the same old networks, as in rlkit. The first epoch's 9,000 more updates are a share of --online-steps.
    - Seeds share the members in order: ten members and --num-seeds 2 are two ensembles of five,
      --num-seeds 10 plain CQL agents, which keep their policies. cql_alpha is twice the paper's (cql_red.py).
    - `update` in evaluations.csv, and on the screen, counts environment steps.

Members:  python algorithms/cql_red.py --sampler uniform --policy-learning-rate 1e-4 --num-seeds 5
Run:      python algorithms/bred.py --offline runs/cql_red/hopper/replay-v0/RUN
CQL-ft:   --num-seeds 5 --uniform-replay --warm-up 0
Expected: score 57 +- 12 (CQL-ft: 46 +- 16) as in tests/benchmark/grids/bred.toml; 8 +- 1 by README's small command
Figure 4:   --initial-online-fraction 1
Figure 5:   --independent
Figure 10:  --num-seeds 5 --uniform-replay --warm-up 0 --conservative-online
"""

import copy
import ctypes
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

CHUNK_STEPS = 20  # steps whose random numbers are drawn together
# Random numbers are a function of (seed, purpose, update, ...), so that no generator's state has to be saved.
# Purposes start at 1, because numpy takes (s, u, 0) for (s, u)
DRAWS = 1
EVALUATION = 2
EXPLORATION = 3
DISTILLATION = 4
NAME = re.compile(r"(.*?)(?::(0\.\d*[1-9]\d*|1\.0))?")  # of a dataset: `ID:0.1` is ID and the share 0.1
# flags of cql_red.py that hold for fine-tuning too, and what others must be, as in the paper
MEMBER_FLAGS = [
    "dataset",
    "hidden_sizes",
    "gamma",
    "cql_alpha",
    "num_action_samples"
]
FIXED_FLAGS = {
    "normalize_obs": False, "reward_transform": "none", "importance_sampling": True
}


@dataclass
class Args:
    offline: tuple[str, ...] = ()  # run folders of cql_red.py: all of their agents are members
    members: tyro.conf.Suppress[dict | None] = None  # their flags, which hold here too; no flag itself
    env_id: str | None = None  # environment to fine-tune in, also `module:Env-v0`; default: the members'
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents fine-tuned side by side, each with an environment and members of its own
    batch_size: int = 256  # transitions per update and seed
    learning_rate: float = 3e-4  # Adam's step size for the critics, and for distillation
    distil_epochs: int = 1_000  # distillation: at most so many epochs
    distil_patience: int = 20  # distillation: over after so many epochs without a better validation loss
    online_steps: int = 250_000  # environment steps of each seed
    epoch_length: int = 1_000  # environment steps of an epoch, updates after it, and of an epoch of distillation
    warm_up: float = 0.036  # more updates after the first epoch, as a share of online_steps: 9,000 of 250,000
    uniform_replay: bool = False  # uniform draws from all data, offline and online, instead of (7); Figure 4
    initial_online_fraction: float = 0.5  # rho_0: share of online data in the first batches; 1: no other data
    anneal_steps: int = 125_000  # t_final: environment steps until batches are all online data
    independent: bool = False  # each member keeps its policy, instead of one distilled from all
    policy_learning_rate: float = 3e-4  # Adam's step size for actor and temperature
    target_update_rate: float = 0.005  # how far targets move to the critics at every update
    conservative_online: bool = False  # critics go on with CQL's loss, (4) to (6), at temperature 1
    eval_every: int = 1_000  # environment steps between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed, with the deterministic action
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/DATASET/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint, with a new episode
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing
    capture_video: bool = False  # film the evaluations (on a machine without screen: MUJOCO_GL=egl)

    def __post_init__(self):
        self.offline = tuple(os.path.abspath(run) for run in self.offline)  # to go on from anywhere
        shares = self.target_update_rate, self.initial_online_fraction
        if not all(0 <= share <= 1 for share in shares):
            sys.exit("error: target_update_rate and initial_online_fraction are shares; give values in [0, 1]")
        for name in ("online_steps", "epoch_length", "eval_every"):
            if getattr(self, name) <= 0 or getattr(self, name) % CHUNK_STEPS:
                sys.exit(f"error: {name} counts in steps of {CHUNK_STEPS}; give a multiple of it")

    def chunks_of_epoch(self, start, end):
        """Numbers of the chunks of updates after the epoch of environment steps from `start` to `end`."""
        extra = round(self.warm_up * self.online_steps)
        if start > 0:
            start += extra
        return range(start // CHUNK_STEPS, (end + extra) // CHUNK_STEPS)


# The idea: batches that move from offline to online data, and one policy from many -----------------
class BalancedReplay(nn.Module):
    """Rows to draw batches from, on one device: the data (N, width), which all seeds share, then the online
    steps of each seed, none of which is forgotten. Checkpoints have these steps."""

    def __init__(self, data, args):
        super().__init__()
        self.args = args
        self.num_data = len(data)
        self.num_steps = 0  # t
        self.place = torch.arange(args.batch_size, device=data.device)  # in a batch
        steps = data.new_zeros(args.num_seeds * args.online_steps, data.shape[1])
        self.rows = torch.cat([data, steps])
        self.steps = self.rows[len(data) :].unflatten(0, (args.num_seeds, -1))  # the same memory
        self.offset = args.online_steps * torch.arange(args.num_seeds, device=data.device)[:, None]

    def add(self, columns):
        """One step of every seed, in columns (S, width of the column)."""
        row = np.concatenate(columns, axis=1, dtype=np.float32)
        self.steps[:, self.num_steps] = torch.from_numpy(row)
        self.num_steps += 1

    def online_fraction(self):
        """rho_t, the share of online data in a batch, (7)."""
        rho_0 = self.args.initial_online_fraction
        progress = min(self.num_steps / self.args.anneal_steps, 1)
        return rho_0 + (1 - rho_0) * progress

    def index(self, uniform):
        """Where in `rows` batches are, from random numbers in [0, 1), (..., S, B) each."""
        if self.args.uniform_replay:
            index = (uniform * (self.num_data + self.num_steps)).long()
        else:
            is_online = self.place < round(len(self.place) * self.online_fraction())
            online = self.num_data + (uniform * self.num_steps).long()
            index = torch.where(is_online, online, (uniform * self.num_data).long())
        return index + self.offset * (index >= self.num_data)

    def get_extra_state(self):
        return self.steps[:, : self.num_steps].cpu()

    def set_extra_state(self, steps):
        self.num_steps = steps.shape[1]
        self.steps[:, : self.num_steps] = steps


class Mixture(nn.Module):
    """The P policies of each seed as one: a Gaussian with the moments of their mixture, then tanh."""

    def __init__(self, actor, num_policies):
        super().__init__()
        self.actor = actor
        self.num_policies = num_policies

    def moments(self, obs):
        """Mean and deviation (S, B, A) before the tanh, (9)."""
        mean, log_std = self.actor.gaussian(obs.repeat_interleave(self.num_policies, 0))  # (G, B, A) each
        mean = mean.unflatten(0, (-1, self.num_policies))  # (S, P, B, A)
        std = log_std.exp().view_as(mean)
        mixture_mean = mean.mean(1)
        # mean variance and variance of the means: the same as (9), which rounding cannot make negative here
        variance = std.square().mean(1) + mean.var(1, correction=0)
        return mixture_mean, variance.sqrt().clamp(max=math.exp(2))  # as every policy's deviation

    def distance(self, members, obs):
        """The loss of distillation (S,): how far from the mixture of members this one is, (8)."""
        with torch.no_grad():
            target_mean, target_std = members.moments(obs)
        mean, std = self.moments(obs)
        error = (mean - target_mean).square() + (std - target_std).square()
        return error.sum(-1).mean(-1)

    def forward(self, obs):
        mean, _ = self.moments(obs)
        return mean.tanh()  # (S, B, A)


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def lecun_normal(weight, bias, generator):
    """Initial values of a layer, weight (in, out) and bias (1, out): variance 1 / in, cut at two deviations."""
    std = weight.shape[0] ** -0.5 / 0.87962566  # the cut takes the rest of the deviation
    nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std, generator=generator)
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


class ScaledTanhGaussianActor(nn.Module):
    """pi(a|s): a = tanh(mean(s) + std(s) * noise), where two learned numbers scale and shift log std, as in
    JaxCQL. The deterministic action is tanh(mean(s))."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, generators):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes, 2 * action_dim]
        self.net = MLP(sizes, lecun_normal, generators)
        self.log_std_scale = nn.Parameter(torch.ones(len(generators), 1, 1))
        self.log_std_shift = nn.Parameter(-torch.ones(len(generators), 1, 1))

    def forward(self, obs):
        mean, _ = self.gaussian(obs)
        return mean.tanh()  # (S, B, A)

    def gaussian(self, obs):
        """Mean and log std (S, B, A) of what the tanh takes."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = self.log_std_scale * log_std + self.log_std_shift
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs, noise):
        """Actions (S, K, B, A), K at each state, and their log-probabilities (S, K, B), from as much standard
        normal noise (S, K, B, A)."""
        mean, log_std = [x[:, None] for x in self.gaussian(obs)]  # (S, 1, B, A) each
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of x
        # tanh squeezes volumes by 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2, here without overflow
        log_prob = log_prob - 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        return x.tanh(), log_prob.sum(-1)


class Agent(nn.Module):
    """S agents with P policies each. All G = S P policies stand side by side, those of a seed together, each
    with its temperature and the critics of N / P members."""

    def __init__(self, obs_dim, action_dim, args, num_policies):
        super().__init__()
        # one generator per policy, so that its weights do not depend on its neighbours
        numbers = range(args.num_seeds * num_policies)
        generators = [torch.Generator().manual_seed(args.seed + g) for g in numbers]
        self.actor = ScaledTanhGaussianActor(obs_dim, action_dim, args.hidden_sizes, generators)
        sizes = [obs_dim + action_dim, *args.hidden_sizes, 1]
        self.critic = MLP(sizes, lecun_normal, generators, C=2 * args.num_members // num_policies)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(len(generators)))
        self.target_entropy = -action_dim
        # of distillation: each seed's best policy so far, by a loss on states that are held out
        self.best_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.register_buffer("best_loss", torch.full((args.num_seeds,), math.inf))
        self.register_buffer("stale_epochs", torch.zeros(args.num_seeds))
        self.register_buffer("num_epochs", torch.tensor(0))
        self.to(args.device)
        adam = partial(torch.optim.Adam, fused=True, capturable=self.log_alpha.is_cuda)
        self.optimizers = {
            "distillation": adam(self.actor.parameters(), args.learning_rate),
            "policy": adam([*self.actor.parameters(), self.log_alpha], args.policy_learning_rate),
            "critic": adam(self.critic.parameters(), args.learning_rate),
        }

    def twin_q(self, critic, obs, action):
        """Both critics of each member, (G, members, 2, B), at obs (G, B, O) and action (G, B, A)."""
        return critic(torch.cat([obs, action], -1)).squeeze(-1).unflatten(1, (-1, 2))

    @torch.no_grad()
    def keep_best(self, loss, patience):
        """After an epoch of distillation with this loss (S,). Who is out of patience keeps his best."""
        better = (loss < self.best_loss) & (self.stale_epochs < patience)
        self.best_loss[better] = loss[better]
        self.stale_epochs += 1
        self.stale_epochs[better] = 0
        for best, now in zip(self.best_actor.parameters(), self.actor.parameters()):
            best[better] = now[better]
        self.num_epochs += 1


def load_members(agent, obs_dim, action_dim, args):
    """Gives the agent what cql_red.py trained: critics, temperatures, and policies where these need no
    distillation. Returns the mixture of the members' policies."""
    members = Agent(obs_dim, action_dim, args, args.num_members)
    states = []
    for run in args.offline:
        states.append(torch.load(Path(run, "checkpoint.pt"), "cpu")["agent"])
    state = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    members.load_state_dict(state, strict=False)  # it has nothing of distillation
    for critic in (agent.critic, agent.target_critic):  # a seed's critics stand in the same order in both
        critic.load_state_dict(members.critic.state_dict())
    num_policies = len(agent.log_alpha)
    agent.log_alpha.data.copy_(members.log_alpha.view(num_policies, -1).mean(1))
    if num_policies == len(members.log_alpha):
        agent.actor.load_state_dict(members.actor.state_dict())
    return Mixture(members.actor, args.num_members)


# The update: distillation, then fine-tuning -------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def distil(agent, members, obs, seeds, rows, run_dir, writer, args):
    """The first loop: each seed's policy learns the moments of its members' mixture at the obs (N, O)."""
    student = Mixture(agent.actor, 1)
    validation = obs[::100].expand(args.num_seeds, -1, -1)
    training = obs[torch.arange(len(obs)) % 100 > 0]

    @CudaGraph
    def learn(batches):  # one update for each batch of batches (CHUNK_STEPS, S, B)
        for batch in nn.functional.embedding(batches, training):
            loss = student.distance(members, batch)
            minimize(loss.sum(), agent.optimizers["distillation"])  # sum over S: seeds never mix

    num_chunks = args.epoch_length // CHUNK_STEPS
    for epoch in tqdm(range(agent.num_epochs, args.distil_epochs)):
        if (agent.stale_epochs >= args.distil_patience).all():
            break
        for chunk in range(epoch * num_chunks, (epoch + 1) * num_chunks):
            uniform, _ = draw_steps(seeds, DISTILLATION, chunk, args.batch_size, (), args.device)
            learn((uniform * len(training)).long())
        with torch.no_grad():
            loss = student.distance(members, validation)
        agent.keep_best(loss, args.distil_patience)
        log({"distillation/validation_loss": loss}, epoch, writer)
        save(run_dir / "checkpoint.pt", agent, rows, 0)
    agent.actor.load_state_dict(agent.best_actor.state_dict())
    print(f"{agent.num_epochs} epochs of distillation, validation loss {agent.best_loss.mean():.4f}")


def update(agent, obs, action, reward, next_obs, not_terminated, noise, args):
    """One gradient step of all policies and critics on obs (G, B, O), action (G, B, A), reward (G, B),
    next_obs (G, B, O), not_terminated (G, B), never (G, B, 1), which would broadcast, and normal noise
    (G, 3 n + 2, B, A), where n is 0 without CQL's penalty. Returns what to log the mean of, still on the
    device: nothing here waits for a GPU."""
    n = noise.shape[1] // 3
    random_noise, noise, next_noise = noise.split([n, 1 + n, 1 + n], dim=1)

    # all actions of this update are of the policies as they are now
    policy_action, log_prob = agent.actor.sample(obs, noise)  # (G, 1 + n, B, A), (G, 1 + n, B)
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(next_obs, next_noise)

    # actor: it climbs the smaller critic of each member, the mean over members, before these move, (10), (11)
    alpha = agent.log_alpha.detach().exp()[:, None]  # (G, 1)
    policy_q = agent.twin_q(agent.critic, obs, policy_action[:, 0]).amin(2)  # (G, members, B)
    actor_loss = (alpha * log_prob[:, 0] - policy_q.mean(1)).mean(-1)  # (G,)

    # temperature: it grows while the entropy, which is -log_prob on average, is below its target
    entropy = -log_prob[:, 0].detach().mean(-1)  # (G,)
    alpha_loss = agent.log_alpha * (entropy - agent.target_entropy)  # (G,)
    policy_loss = actor_loss + alpha_loss  # neither has the other's parameters in it: one step serves both
    minimize(policy_loss.sum(), agent.optimizers["policy"])  # sum over G: neither seeds nor policies mix

    # critics: each member bootstraps from its own target, but not through a true end, (1), (2)
    with torch.no_grad():
        next_value = agent.twin_q(agent.target_critic, next_obs, next_action[:, 0]).amin(2)  # (G, members, B)
        if n == 0:
            next_value -= alpha[:, None] * next_log_prob[:, :1]
        backup = reward[:, None] + args.gamma * not_terminated[:, None] * next_value
    q = agent.twin_q(agent.critic, obs, action)  # (G, members, 2, B)
    critic_loss = (q - backup[:, :, None]).square().mean(-1).sum((1, 2))  # (G,)
    if n > 0:  # a soft maximum over sampled actions less Q of the logged one, (4) to (6)
        random_action = torch.erf(random_noise / math.sqrt(2))  # uniform on [-1, 1]: 2 Phi(noise) - 1
        log_uniform = torch.full_like(log_prob[:, 1:], -action.shape[-1] * math.log(2))
        actions = [random_action, policy_action[:, 1:], next_action[:, 1:]]
        actions = torch.cat(actions, 1).detach()  # (G, 3 n, B, A)
        log_density = torch.cat([log_uniform, log_prob[:, 1:], next_log_prob[:, 1:]], 1).detach()
        sampled_q = agent.twin_q(agent.critic, obs.repeat(1, 3 * n, 1), actions.flatten(1, 2))
        sampled_q = sampled_q.unflatten(-1, (3 * n, -1))  # (G, members, 2, 3 n, B)
        soft_maximum = (sampled_q - log_density[:, None, None]).logsumexp(3)
        penalty = (soft_maximum - q).mean(-1).sum((1, 2))  # (G,)
        critic_loss += args.cql_alpha * penalty
    minimize(critic_loss.sum(), agent.optimizers["critic"])

    with torch.no_grad():  # targets
        targets = agent.target_critic.parameters()
        for target, online in zip(targets, agent.critic.parameters()):
            target.lerp_(online, args.target_update_rate)

    return {
        "loss/actor": actor_loss.detach(),
        "loss/critic": critic_loss.detach(),
        "value/q": q.detach(),
        "policy/entropy": entropy,
        "policy/alpha": alpha,
    }


# Random numbers -----------------------------------------------------------------------------------
def draw_steps(seeds, purpose, chunk, num_uniform, noise_shape, device):
    """Random numbers for CHUNK_STEPS steps or updates: uniform ones in [0, 1), (CHUNK_STEPS, S, num_uniform),
    and normal ones, (CHUNK_STEPS, S, *noise_shape). Each seed has generators of its own."""
    generators = [np.random.default_rng((seed, purpose, chunk)) for seed in seeds]
    uniform = [x.random((CHUNK_STEPS, num_uniform)) for x in generators]
    normal = [x.standard_normal((CHUNK_STEPS, *noise_shape), np.float32) for x in generators]
    return [torch.from_numpy(np.stack(x, axis=1)).to(device) for x in (uniform, normal)]


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


# Plumbing of the online scripts: environments ----------------------------------------------------
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


def take_flags_of_members(args):
    """The members' flags hold here too; config.json of a run has them."""
    if not args.members:
        if not args.offline:
            sys.exit("error: give --offline, one or more run folders of cql_red.py")
        runs = [json.loads(Path(run, "config.json").read_text())["args"] for run in args.offline]
        args.members = {name: runs[0][name] for name in MEMBER_FLAGS} | FIXED_FLAGS
        if not all(run | args.members == run for run in runs):
            sys.exit(f"error: each of --offline must have been trained with {args.members}")
        num_trained = sum(run["num_seeds"] for run in runs)
        if num_trained % args.num_seeds:
            sys.exit(f"error: there are {num_trained} members; give --num-seeds that share them evenly")
        args.members["num_members"] = num_trained // args.num_seeds
        args.env_id = args.env_id or runs[0]["env_id"]
    vars(args).update(args.members)


def main():
    args = tyro.cli(Args)
    if args.evaluate or args.resume:  # the run's flags, then those of this call
        config = json.loads(Path(args.evaluate or args.resume, "config.json").read_text())
        args = tyro.cli(Args, default=Args(**config["args"]))
    take_flags_of_members(args)
    seeds = range(args.seed, args.seed + args.num_seeds)
    data = load_data(args)
    if not data.spec:
        sys.exit("error: there is no environment to act in; give --env-id, and --eval-episodes above 0")

    # one row a transition, so that a batch is one gather; `learn` and the last loop know the columns
    columns = [
        data.obs,
        data.action.clip(-0.999, 0.999),  # as the members saw them
        data.reward[:, None],
        data.next_obs,
        1.0 - data.terminated[:, None],  # not terminated
    ]
    widths = [column.shape[1] for column in columns]
    transitions = np.concatenate(columns, axis=1, dtype=np.float32)
    transitions = torch.from_numpy(transitions).to(args.device)

    # agents, as they start or as they were
    obs_dim, action_dim, *_ = widths
    num_policies = 1
    if args.independent:
        num_policies = args.num_members
    agent = Agent(obs_dim, action_dim, args, num_policies)
    agent.replay = BalancedReplay(transitions, args)
    policy = Mixture(agent.actor, num_policies)  # what acts and is evaluated
    run_dir = run_folder(args)
    rows = np.empty((0, len(ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
    num_workers = max(1, torch.get_num_threads() - 1)  # knows what a job may use, unlike cpu_count
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)
    envs = Environments(data.spec, seeds)
    if args.capture_video:
        data.spec.kwargs["render_mode"] = "rgb_array"

    def start_evaluation(num_steps):
        frozen = pickle.dumps(copy.deepcopy(policy).cpu().eval())
        job = frozen, data.spec, data.references, run_dir, seeds, num_steps
        return [pool.submit(run_episode, *job, episode) for episode in range(args.eval_episodes)]

    if args.evaluate:
        jobs = start_evaluation(2**31)  # episodes that no run has seen
        rows = np.reshape([job.result() for job in jobs], (-1, len(ROW)))
        print(f"policies of step {first:,}: {summary(rows, args.num_seeds)}")
        return

    if first == 0:
        members = load_members(agent, obs_dim, action_dim, args)
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    print(f"{args.num_members} members; {data.spec.id} from step {first:,} on, with a new episode")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")
    if first == 0 and num_policies < args.num_members:
        distil(agent, members, transitions[:, :obs_dim], seeds, rows, run_dir, writer, args)

    @CudaGraph
    @torch.no_grad()
    def act(obs, noise):
        mean, std = policy.moments(obs[:, None])
        return (mean + std * noise).tanh().squeeze(1)

    @CudaGraph
    def learn(batches, noise):  # one update for each batch of batches (CHUNK_STEPS, S, B)
        batches = batches.repeat_interleave(num_policies, 1)  # policies of a seed learn from the same batch
        batches = nn.functional.embedding(batches, agent.replay.rows)  # a gather, faster than indexing
        obs, action, reward, next_obs, not_terminated = batches.split(widths, dim=-1)
        noise = noise.flatten(1, 2)  # (CHUNK_STEPS, G, 2, B, A)
        for batch in zip(obs, action, reward.squeeze(-1), next_obs, not_terminated.squeeze(-1), noise):
            metrics = update(agent, *batch, args)
        return metrics  # of the last update

    # the second loop: act for an epoch, then learn for as long
    num_actions = 2 + 3 * args.num_action_samples * args.conservative_online
    noise_shape = num_policies, num_actions, args.batch_size, action_dim
    jobs = start_evaluation(first)  # before the first step, or the one that was under way
    if sys.platform == "linux":
        # glibc would give freed activations back to the system, whose new pages take a fifth of an update
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: up to a gigabyte stays
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors come from the heap too
    started = time.time()
    for start in tqdm(range(first, args.online_steps, args.epoch_length)):
        num_steps = min(start + args.epoch_length, args.online_steps)
        for chunk in range(start // CHUNK_STEPS, num_steps // CHUNK_STEPS):
            _, noise = draw_steps(seeds, EXPLORATION, chunk, 0, (1, action_dim), args.device)
            for step_noise in noise:
                obs = envs.observe(agent.replay.num_steps)
                action = act(torch.from_numpy(obs).to(args.device), step_noise).cpu().numpy()
                reward, next_obs, terminated = envs.step(action)
                agent.replay.add([obs, action, reward[:, None], next_obs, 1.0 - terminated[:, None]])
        for chunk in args.chunks_of_epoch(start, num_steps):
            uniform, noise = draw_steps(seeds, DRAWS, chunk, args.batch_size, noise_shape, args.device)
            metrics = learn(agent.replay.index(uniform), noise)
        log(metrics, num_steps, writer)

        # report the evaluation before this one, which had time beside training; save; start it
        if num_steps // args.eval_every > start // args.eval_every or num_steps == args.online_steps:
            rows = report(rows, jobs, run_dir, writer)
            save(run_dir / "checkpoint.pt", agent, rows, num_steps)
            jobs = start_evaluation(num_steps)

    speed = (args.online_steps - first) / (time.time() - started)
    rows = report(rows, jobs, run_dir, writer)
    writer.close()
    result = summary(rows, args.num_seeds)
    print(f"{result}; {args.online_steps:,} steps, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
