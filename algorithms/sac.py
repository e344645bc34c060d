"""Soft actor-critic (SAC), online: the learner whose logs are this project's datasets.

Paper: T. Haarnoja, A. Zhou, K. Hartikainen et al., "Soft Actor-Critic Algorithms and Applications", 2018,
arXiv:1812.05905 (equation numbers below are that paper's).

Idea. An agent that maximises reward *and* the entropy of its own policy explores by itself and learns from every
transition it has ever seen. Two critics learn the soft Q-function by bootstrapping, and their minimum keeps
over-estimation down; the policy moves towards exp(Q / alpha); the temperature alpha is tuned so that the entropy stays
near a target. In this project SAC is the online baseline of BRED, and it makes the embedded datasets: its whole
training log, from the first random step to the last, has the long tail of returns that the ReD paper rebalances.

Objectives (S seeds, C critics, B batch, O observation, A action; `min Q`: the smallest of the critics):
    critic       y = r + gamma (1 - terminated) [min Q_target(s', a') - alpha log pi(a'|s')],  a' ~ pi(.|s')    (5), (6)
                 L_Q = sum over C of mean (Q(s, a) - y)^2
    policy       L_pi = mean [alpha log pi(a~|s) - min Q(s, a~)],  a~ = tanh(mean + std * noise)                (7), (9)
    temperature  L_alpha = -mean log_alpha [log pi(a~|s) + target_entropy],  target_entropy = -A              (17), (18)
    targets      Q_target <- (1 - polyak) Q_target + polyak Q
Each update: critics, policy with the new critics, temperature, targets.

What differs from the paper and its code, and why.
    - The critics' loss has no factor 1/2, which Adam does not notice.
    - evaluations.csv and TensorBoard count environment steps; the column is called update, as in every script.
    - The temperature loss uses log_alpha in place of alpha, as all current implementations do: same sign, steadier.
    - 5,000 random steps before learning starts (the authors' code: 1,000 to 10,000, depending on the environment).
    - The replay buffer holds the whole run, since the log is what we are after; the paper keeps the last million.
    - Actions live in [-1, 1]; environments with other bounds are rescaled by gymnasium's own wrapper.
    - `--num-seeds 4` trains four agents at once, each with environments, replay and random numbers of its own.

Reading:   the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:       python algorithms/sac.py --env-id Hopper-v5 --num-steps 500000
A dataset: python algorithms/sac.py --env-id Hopper-v5 --num-steps 500000 --save-replay my-data/replay-v0
Expected:  9 after 20,000 steps with networks of 2x64 (benchmarks.md, grid bred). The run above, with --batch-size
           128 --seed 1, thinned and behind a random start, is hopper/replay-v0: its best episode has a score of 102.
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
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
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
    env_id: str = "Hopper-v5"
    """a Gymnasium environment with continuous actions"""
    seed: int = 0
    """first seed; agent k uses seed + k"""
    num_seeds: int = 1
    """agents trained side by side in one batched computation (the axis S)"""
    num_envs: int = 1
    """environments per seed, stepped side by side; every step of one still pays for one update"""
    num_steps: int = 1_000_000
    """environment steps per seed"""
    learning_starts: int = 5_000
    """environment steps per seed with uniformly random actions, before the first update"""
    batch_size: int = 256
    """transitions per update and seed (the axis B)"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers, critics and policy alike"""
    learning_rate: float = 3e-4
    """Adam step size of critics, policy and temperature"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.005
    """share of the online critics in their targets at every update (tau in the paper)"""
    save_replay: str | None = None
    """when done, write the training log of the first seed to this folder, as a Minari dataset"""
    replay_transitions: int | None = None
    """thin the log by whole, evenly spaced episodes to about this many transitions"""
    save_rollouts: str | None = None
    """when done, write episodes of the first seed's (stochastic) policy to this folder, as a Minari dataset"""
    num_rollout_steps: int = 100_000
    """transitions in --save-rollouts, rounded up to whole episodes"""
    eval_every: int = 5_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, with the policy's deterministic action; 0: never evaluate"""
    eval_workers: int | None = None
    """processes that evaluate beside training (0: inline; default: one per seed, as far as there are cores)"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints; a stop by Ctrl-C or SIGTERM writes one too"""
    log_every: int = 1_000
    """environment steps between entries in TensorBoard"""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    allow_tf32: bool = False
    """let a GPU multiply matrices in TF32: faster, 10 bits of mantissa"""
    run_dir: str | None = None
    """where the results go; default runs/sac/<environment>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode to RUN_DIR/videos"""


# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_steps", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video"}
RESUME_MAY_CHANGE |= {"save_replay", "replay_transitions", "save_rollouts", "num_rollout_steps"}


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


class TanhGaussianActor(nn.Module):
    """pi(a|s): a = tanh(mean(s) + std(s) * noise), with a state-dependent standard deviation."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, init, generators):
        super().__init__()
        self.net = MLP((len(generators),), [obs_dim, *hidden_sizes, 2 * action_dim], init, generators)

    def forward(self, obs):
        """obs (S, B, O) -> mean, log_std, each (S, B, A), before the tanh."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs, noise):
        """obs (S, B, O), standard normal noise (S, B, A) -> action (S, B, A), log-probability (S, B)."""
        mean, log_std = self(obs)
        pre_tanh = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # log(1 - tanh^2), stable
        return pre_tanh.tanh(), log_prob.sum(-1)

    def act(self, obs):
        """The deterministic action (S, B, A) in [-1, 1] that evaluations use."""
        return self(obs)[0].tanh()


class SACAgent(nn.Module):
    """Networks, temperatures and optimisers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args, device):
        super().__init__()
        seeds = range(args.seed, args.seed + args.num_seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        S = args.num_seeds
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]  # of a packed transition: s, a, r, s', not terminated
        self.actor = TanhGaussianActor(obs_dim, action_dim, args.hidden_sizes, fan_in_uniform, generators)
        self.critic = MLP((S, 2), [obs_dim + action_dim, *args.hidden_sizes, 1], fan_in_uniform, generators)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(S))
        self.target_entropy = -float(action_dim)
        self.to(device)
        trained = {"critic": self.critic.parameters(), "actor": self.actor.parameters(), "alpha": [self.log_alpha]}
        self.optimizers = nn.ModuleDict({name: Adam(params, args.learning_rate) for name, params in trained.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def update(agent, batch, noise, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    batch: (S, B, O + A + 1 + O + 1) packed transitions; noise: (2, S, B, A) standard normal.
    Returns a dict of metrics, each (S,), on the device.
    """
    obs, action, reward, next_obs, not_terminated = batch.split(agent.widths, dim=-1)
    reward, not_terminated = reward.squeeze(-1), not_terminated.squeeze(-1)  # (S, B)
    alpha = agent.log_alpha.detach().exp()[:, None]  # (S, 1)

    # critics, eqs. (5)-(6): only a true end of the episode cuts the bootstrap
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(next_obs, noise[0])
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).squeeze(-1).amin(1)  # (S, B)
        backup = reward + args.gamma * not_terminated * (next_q - alpha * next_log_prob)
    q = agent.critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    agent.optimizers["critic"].minimize(critic_loss.sum())  # sum over S: seeds never mix

    # policy, eqs. (7), (9)
    policy_action, log_prob = agent.actor.sample(obs, noise[1])
    policy_q = agent.critic(torch.cat([obs, policy_action], -1)).squeeze(-1).amin(1)  # (S, B)
    actor_loss = (alpha * log_prob - policy_q).mean(-1)  # (S,)
    agent.optimizers["actor"].minimize(actor_loss.sum())

    # temperature, eq. (18): alpha grows while the entropy -log_prob is below its target
    entropy_gap = log_prob.detach().mean(-1) + agent.target_entropy  # (S,)
    agent.optimizers["alpha"].minimize((-agent.log_alpha * entropy_gap).sum())

    # targets
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_critic.parameters()), list(agent.critic.parameters()), args.polyak)

    return {
        "loss/critic": critic_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "value/q": q.detach().mean((1, 2)),
        "policy/entropy": -log_prob.detach().mean(-1),
        "policy/alpha": alpha.squeeze(-1),
    }


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
# Plumbing of the online scripts: writing what was seen as a Minari dataset
# ---------------------------------------------------------------------------------------------------------------------


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


def thin(episodes, num_transitions):
    """Evenly spaced whole episodes that hold about num_transitions, or all of them."""
    share = min(1, num_transitions / sum(len(reward) for _, _, reward, _, _ in episodes))
    return [e for i, e in enumerate(episodes) if math.floor((i + 1) * share) > math.floor(i * share)]


def rollout(policy, environment, num_steps, seed):
    """Whole episodes of one seed's stochastic policy, num_steps or just over, as split_episodes returns them."""
    env, generator, episodes, total = make_env(environment), torch.Generator().manual_seed(seed), [], 0
    while total < num_steps:
        obs, over = env.reset(seed=episode_seed(seed, 10**6, len(episodes), 1))[0], False
        observations, actions, rewards = [obs], [], []
        while not over:
            noise = torch.randn(1, 1, env.action_space.shape[0], generator=generator)
            with torch.no_grad():
                action = policy.sample(torch.tensor(obs, dtype=torch.float32).view(1, 1, -1), noise)[0].view(-1).numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            observations.append(obs), actions.append(action), rewards.append(reward)
        ends = np.zeros((2, len(rewards)), bool)
        ends[:, -1] = terminated, truncated and not terminated
        episodes.append((np.float32(observations), np.float32(actions), np.float32(rewards), *ends))
        total += len(rewards)
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


def main():
    args = parse_args()
    check_range(
        args, 1, math.inf, "num_seeds", "num_envs", "num_steps", "batch_size", "learning_starts", "hidden_sizes"
    )
    check_range(
        args, 1, math.inf, "eval_every", "checkpoint_every", "log_every", "replay_transitions", "num_rollout_steps"
    )
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 0, math.inf, "learning_rate", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "gamma", "polyak")
    if args.evaluate:
        return evaluate_run(args, SACAgent)
    for folder in (args.save_replay, args.save_rollouts):
        if folder and Path(folder).exists():
            fail(f"{folder} is there already", "give another folder to write the dataset to")
    device, S, E = choose_device(args.device), args.num_seeds, args.num_envs
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    references = D4RL_REFERENCES.get(args.env_id.split("-")[0].split("_")[0])
    environment = {"id": args.env_id, "kwargs": {}, "references": references}
    envs = [[make_env(environment) for _ in range(E)] for _ in range(S)]
    obs_dim, action_dim = envs[0][0].observation_space.shape[0], envs[0][0].action_space.shape[0]
    agent = SACAgent(obs_dim, action_dim, args, device)
    generators = [torch.Generator(device).manual_seed(args.seed + s) for s in range(S)]

    def draw(sampler, *shape):
        """One draw per seed, each from its own generator: (S, *shape)."""
        return torch.stack([sampler(*shape, device=device, generator=generator) for generator in generators])

    # the whole log stays on the device: T steps of E environments, and how each of them ended its episode
    T = -(-args.num_steps // E)
    replay = torch.zeros(S, T, E, sum(agent.widths), device=device)
    ends = np.zeros((S, T, E), np.uint8)  # 0 not at all, 1 terminated, 2 truncated
    flat_replay, seed_index = replay.view(S, T * E, -1), torch.arange(S, device=device)[:, None]
    t, episode_number = 0, np.zeros((S, E), int)

    checkpoint = load_checkpoint(args.resume, device) if args.resume else None
    if checkpoint and checkpoint["t"] > T:
        fail(f"the run is at step {checkpoint['t'] * E} already", "give a larger --num-steps")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, args.env_id.replace("/", "-"), environment)
    if checkpoint:
        t, episode_number = checkpoint["t"], checkpoint["episode_number"].cpu().numpy()
        replay[:, :t], ends[:, :t] = checkpoint["replay"], checkpoint["ends"].cpu().numpy()
        agent.load_state_dict(checkpoint["agent"])
        for generator, state in zip(generators, checkpoint["generators"]):
            if len(state) == len(generator.get_state()):  # else it comes from another kind of device: new draws
                generator.set_state(state.cpu())
    writer = SummaryWriter(run_dir, purge_step=t * E + 1)
    evaluator = Evaluator(args, environment, run_dir, writer)
    if checkpoint:
        evaluator.resume(t * E, checkpoint["pending_evaluations"], agent.actor)

    def reset(s, e):
        """First observation of the episode that environment e of seed s is at."""
        return envs[s][e].reset(seed=episode_seed(args.seed + s, e, int(episode_number[s, e]), 1))[0]

    # an environment's state is the seed of its episode and the actions since: a resumed run plays them again
    obs, episode_return = np.zeros((S, E, obs_dim), np.float32), np.zeros((S, E))
    for s, e in np.ndindex(S, E):
        obs[s, e] = reset(s, e)
        start = np.flatnonzero(np.r_[1, ends[s, :t, e]])[-1]
        for action in replay[s, start:t, e, obs_dim : obs_dim + action_dim].cpu().numpy():
            obs[s, e], reward, *_ = envs[s][e].step(action)
            episode_return[s, e] += reward

    def learn(index, noise):
        return update(agent, flat_replay[seed_index, index], noise, args)

    if device.type == "cuda":
        no_index = torch.zeros(S, args.batch_size, dtype=torch.long, device=device)
        learn = cuda_graph(learn, agent, no_index, torch.zeros(2, S, args.batch_size, action_dim, device=device))

    def save():
        """Everything that an exact continuation needs."""
        state = {
            "t": t,
            "agent": agent.state_dict(),
            "generators": [generator.get_state() for generator in generators],
            "episode_number": torch.from_numpy(episode_number),
            "replay": replay[:, :t].clone(),
            "ends": torch.from_numpy(ends[:, :t].copy()),
            "pending_evaluations": {update: past for update, (past, _) in evaluator.pending.items()},
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    if not args.resume:
        save()
    keep_freed_memory()
    started, printed, first_t, metrics, stopped, rate = time.time(), time.time(), t, {}, False, 0
    while t < T and not stopped:
        # act: at random first, then from the policy
        if t * E < args.learning_starts:
            action = draw(torch.rand, E, action_dim) * 2 - 1  # (S, E, A)
        else:
            with torch.no_grad():
                action = agent.actor.sample(torch.from_numpy(obs).to(device), draw(torch.randn, E, action_dim))[0]
        action = action.cpu().numpy()
        rows = np.zeros((S, E, sum(agent.widths)), np.float32)
        for s, e in np.ndindex(S, E):
            next_obs, reward, terminated, truncated, _ = envs[s][e].step(action[s, e])
            rows[s, e] = np.concatenate([obs[s, e], action[s, e], [reward], next_obs, [not terminated]])
            obs[s, e], episode_return[s, e] = next_obs, episode_return[s, e] + reward
            if terminated or truncated:
                ends[s, t, e] = 1 if terminated else 2
                episode_number[s, e] += 1
                writer.add_scalar(f"train/return_seed{args.seed + s}", episode_return[s, e], (t + 1) * E)
                obs[s, e], episode_return[s, e] = reset(s, e), 0
        replay[:, t] = torch.from_numpy(rows).to(device)
        t += 1

        # learn: one update per transition and seed
        for _ in range(E if t * E >= args.learning_starts else 0):
            index = (draw(torch.rand, args.batch_size) * (t * E)).long()
            noise = torch.stack([draw(torch.randn, args.batch_size, action_dim) for _ in range(2)])
            metrics = learn(index, noise)

        # evaluate, log, save
        done, stopped = t == T, bool(stop)
        passed = [t * E // n > (t - 1) * E // n for n in (args.eval_every, args.log_every, args.checkpoint_every)]
        if passed[0] or done:
            evaluator.submit(t * E, agent.actor)
        evaluator.collect(wait=done)
        if passed[1]:
            for tag, value in metrics.items():
                writer.add_scalar(tag, value.mean().item(), t * E)
        rate = (t - first_t) * E / (time.time() - started)
        if time.time() - printed > 5 or done:
            printed = time.time()
            left = timedelta(seconds=int((T - t) * E / rate))
            print(f"step {t * E:,}/{T * E:,}, {rate:.0f} steps/s, {left} left", flush=True)
        if passed[2] or done or stopped:
            save()

    evaluator.close()
    writer.close()
    if t < T:
        print(f"stopped at step {t * E:,}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stop[0])

    # the first seed's data, if asked for
    command = f"{shlex.join(sys.argv)} (SAC, {T * E} steps, seed {args.seed})"
    if args.save_replay:
        log = []  # (last step, environment, whether it came to its end, episode), to be put in the order of time
        for e in range(E):
            episodes = split_episodes(replay[0, :, e].cpu().numpy(), ends[0, :, e], agent.widths)
            last = np.cumsum([len(episode[2]) for episode in episodes])
            log += zip(last, [e] * len(last), ends[0, last - 1, e] > 0, episodes)
        log.sort(key=lambda item: item[:2])
        episodes = [episode for *_, episode in log]
        returns = [float(episode[2].sum()) for _, _, over, episode in log if over] or [0.0, 1.0]
        random = [
            float(episode[2].sum()) for last, _, over, episode in log if over and last * E <= args.learning_starts
        ]
        references = references or (float(np.mean(random or returns[:1])), max(returns))
        kept = thin(episodes, args.replay_transitions or T * E)
        save_minari(args.save_replay, kept, environment, references, f"Training log: {command}")
    if args.save_rollouts:
        episodes = rollout(policy_of_seed(agent.actor, 0), environment, args.num_rollout_steps, args.seed)
        returns = [float(reward.sum()) for _, _, reward, _, _ in episodes]
        references = references or (min(returns), max(returns))
        save_minari(args.save_rollouts, episodes, environment, references, f"Rollouts of the last policy: {command}")
    num_updates = E * sum(n * E >= args.learning_starts for n in range(1, T + 1))
    print_result(args, run_dir, num_updates, rate * num_updates / (T * E))


if __name__ == "__main__":
    main()
