"""REM online, with separate networks: Q-learning on random mixtures of several networks; and Bootstrapped DQN.

Papers: R. Agarwal, D. Schuurmans and M. Norouzi, "An Optimistic Perspective on Offline Reinforcement Learning", 2020,
arXiv:1907.04543 (REM, online and offline). I. Osband, C. Blundell, A. Pritzel and B. Van Roy, "Deep Exploration via
Bootstrapped DQN", 2016, arXiv:1602.04621 (the baseline, `--agent bootstrapped`).

Idea. Four separate networks each map the last four frames of the screen to the value of every action. Every minibatch
draws a random convex combination of them, and the mixed values, the same in the online and the target networks, are
made consistent. An episode is played with a random combination of its own, so that the agent explores with different
opinions from episode to episode, and evaluations use the mean of the networks. In the baseline each network is trained
by itself, on the same minibatch, and a random one plays each episode.

Objectives (S seeds, E environments per seed, B batch, A actions, K networks, J mixtures; the numbers are this file's):
    mixture       alpha_k = u_k / sum_j u_j,  u uniform on [0, 1];  Q = sum_k alpha_k Q_k; bootstrapped: Q = Q_k  (1)
    backup        y = r + gamma (1 - terminal) max over a' of Q_target(s', a'), with the same alpha               (2)
    loss          L = mean of huber(Q(s, a) - y); huber(u) = u^2 / 2 if |u| <= 1, else |u| - 1/2                  (3)
    targets       Q_target <- Q after every `target_every` updates

What differs from the papers and their code, and why.
    - Normalised uniform numbers, as in the paper and its code: not uniform over all mixtures, but closer to the mean.
    - "One optimiser per network on the joint loss" is one Adam here: its steps are elementwise, so nothing changes.
    - Bootstrapped DQN as in Agarwal et al.: separate networks and no masks on the data, where Osband et al. share the
      convolutions. Its loss is the mean over the networks, as that of Agarwal et al.'s Ensemble-DQN is over heads.
    - The first weights are those of plain DQN, one network at a time (Glorot).
    - Environment, replay memory, files and schedules are those of dqn_atari.py, which says what is different in them:
      `diff` the two.

Reading:   the method stands above the first `# Plumbing`; below are common parts and, last, the training loop.
Run:       python algorithms/rem_online_atari.py --env-id ALE/Pong-v5 --num-steps 2000000
Baseline:  python algorithms/rem_online_atari.py --env-id ALE/Pong-v5 --num-steps 2000000 --agent bootstrapped
Expected:  no score was measured yet: a game takes millions of steps, and so a GPU.
"""

import contextlib
import copy
import csv
import ctypes
import gzip
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
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import distributions
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    agent: Literal["rem", "bootstrapped"] = "rem"
    """rem: random mixtures of the networks; bootstrapped: Bootstrapped DQN, each network by itself"""
    num_networks: int = 4
    """separate networks of each agent (K)"""
    env_id: str = "ALE/Pong-v5"
    """an Atari game of ale_py, by its id in Gymnasium; the smallest set of actions the game understands"""
    seed: int = 0
    """first seed; agent k uses seed + k"""
    num_seeds: int = 1
    """agents trained side by side in one batched computation (the axis S)"""
    num_envs: int = 1
    """environments per seed, stepped side by side (the axis E); every step of one counts"""
    num_steps: int = 50_000_000
    """agent steps per seed, of 4 frames each"""
    learning_starts: int = 20_000
    """agent steps per seed with uniformly random actions, before the first update"""
    update_every: int = 4
    """agent steps per update"""
    batch_size: int = 32
    """transitions per update and seed (the axis B)"""
    replay_size: int = 1_000_000
    """agent steps per seed that the replay memory holds, 7 KB each"""
    gamma: float = 0.99
    """discount factor"""
    target_every: int = 2_000
    """updates between copies of the network to its target (8,000 agent steps)"""
    epsilon: float = 0.01
    """share of random actions in the end; evaluations use 0.001"""
    epsilon_steps: int = 250_000
    """agent steps after learning_starts in which that share falls from 1 to epsilon"""
    channels: tuple[int, ...] = (32, 64, 64)
    """channels of the three convolutions"""
    hidden_size: int = 512
    """width of the hidden layer behind them"""
    padding: Literal["same", "valid"] = "same"
    """of the convolutions: same is Dopamine's (7,744 features), valid the Nature article's (3,136)"""
    learning_rate: float = 5e-5
    """Adam step size"""
    optimizer_eps: float = 0.001 / 32
    """Adam's epsilon"""
    optimizer_style: Literal["tensorflow", "torch"] = "tensorflow"
    """where Adam has its epsilon: as in the paper's TensorFlow, or as in torch"""
    save_replay: str | None = None
    """when done, write the log of the first seed to this folder, as files of the DQN Replay Dataset"""
    replay_transitions: int | None = None
    """thin the log by whole, evenly spaced episodes to about this many transitions"""
    rows_per_file: int = 1_000_000
    """rows of a file of the log at most; a smaller log makes a smaller file"""
    eval_every: int = 250_000
    """agent steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation and seed, of unclipped rewards; 0: never evaluate"""
    eval_workers: int | None = None
    """processes that evaluate beside training (0: inline; default: one per seed, as far as there are cores)"""
    checkpoint_every: int = 1_000_000
    """agent steps between checkpoints; a stop by Ctrl-C or SIGTERM writes one too"""
    log_every: int = 10_000
    """agent steps between entries in TensorBoard"""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    allow_tf32: bool = False
    """let a GPU multiply matrices in TF32: faster, 10 bits of mantissa"""
    run_dir: str | None = None
    """where the results go; default runs/rem_online_atari/<environment>/<seeds>-<time>"""
    resume: str | None = None
    """continue the run in this folder, exactly where its last checkpoint stands"""
    evaluate: str | None = None
    """evaluate the policies of the run in this folder, train nothing"""
    capture_video: bool = False
    """with --evaluate: record each seed's first episode, as the agent sees it, to RUN_DIR/videos"""


# flags that may differ when a run goes on or is evaluated: they do not change what an update computes
RESUME_MAY_CHANGE = {"resume", "evaluate", "run_dir", "device", "num_steps", "eval_episodes", "eval_workers"}
RESUME_MAY_CHANGE |= {"checkpoint_every", "log_every", "capture_video"}
RESUME_MAY_CHANGE |= {"save_replay", "replay_transitions", "rows_per_file"}


# ---------------------------------------------------------------------------------------------------------------------
# The idea: values that are consistent in every mixture of the networks
# ---------------------------------------------------------------------------------------------------------------------


def mixtures_to_learn(u, args):
    """Columns (S, K, J) of weights, (1): one mixture alpha for REM (J = 1), or each network by itself (J = K).

    u: uniform on [0, 1), (S, K), anew for every minibatch.
    """
    if args.agent == "rem":
        u = 1 - u  # above 0, so that there is a sum to divide by
        return (u / u.sum(-1, keepdim=True))[..., None]
    return torch.eye(args.num_networks, device=u.device).expand(len(u), -1, -1)


def mixture_to_act(u, args):
    """Weights (..., K) for an episode of exploration: a mixture of the networks for REM, or one of them.

    u: uniform on [0, 1), (..., K).
    """
    if args.agent == "rem":
        u = 1 - u
        return u / u.sum(-1, keepdim=True)
    return F.one_hot(u.argmax(-1), args.num_networks).float()


# ---------------------------------------------------------------------------------------------------------------------
# The idea of DQN: random minibatches of a replay memory, and a loss that no single error dominates
# ---------------------------------------------------------------------------------------------------------------------


def new_memory(S, M, E, device):
    """An empty replay memory: M steps of E environments for each of S agents, one frame a step."""
    frame = torch.zeros(S, M, E, 84, 84, dtype=torch.uint8, device=device)
    kinds = {"action": torch.int64, "reward": torch.float32, "terminal": torch.float32, "age": torch.int64}
    return {"frame": frame} | {name: torch.zeros(S, M, E, dtype=dtype, device=device) for name, dtype in kinds.items()}


def valid_steps(t, M):
    """Range of steps, after t of them, whose next frame is stored and whose stack of 4 is not overwritten yet."""
    return (0 if t <= M else t - M + 3), t - 1


def transitions(memory, step, e):
    """The batch for `update`: transitions of environments e (S, B) at these steps (S, B), counted from the first."""
    M = memory["frame"].shape[1]
    s = torch.arange(len(step), device=step.device)[:, None]
    action, reward, terminal, age = (memory[name][s, step % M, e] for name in ("action", "reward", "terminal", "age"))
    ago = torch.arange(3, -2, -1, device=step.device)  # the four frames of a state, oldest first, and the next one
    frames = memory["frame"][s[..., None], (step[..., None] - ago) % M, e[..., None]]  # (S, B, 5, 84, 84)
    frames *= (ago <= age[..., None])[..., None, None]  # zeros where the episode had not begun yet
    return frames[:, :, :4], action, reward, frames[:, :, 1:], 1 - terminal


def huber(u):
    """u^2 / 2 where |u| <= 1, beyond that |u| - 1/2, elementwise: a slope of 1 at most."""
    size = u.abs()
    return torch.where(size <= 1, 0.5 * u.square(), size - 0.5)


def share_of_random_actions(step, args):
    """Epsilon after so many steps: 1 until learning starts, then a line down to its last value."""
    progress = (step - args.learning_starts) / args.epsilon_steps
    return 1 - (1 - args.epsilon) * min(1, max(0, progress))


# ---------------------------------------------------------------------------------------------------------------------
# Networks. Every tensor starts with the seed axis S, so that all agents share each convolution and matrix product.
# ---------------------------------------------------------------------------------------------------------------------


def glorot_uniform(weight, fan_in, fan_out, generator):
    """Uniform weights of variance 2 / (in + out): TensorFlow's default, for networks with one value per action."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight.uniform_(-bound, bound, generator=generator)


class NatureNetwork(nn.Module):
    """`lead` independent networks of the Nature article, side by side, with num_heads values for each action.

    Four frames go through three convolutions with ReLUs, all networks' in one grouped convolution, then through a
    hidden layer to the values. lead: (S,) or (S, networks per seed); those of one seed see the same frames.
    init(weight, fan_in, fan_out, generator) fills one layer of one network in place, biases are zero;
    generators: one torch.Generator per seed, so that the weights of a seed do not depend on its neighbours.
    """

    KERNELS, STRIDES = (8, 4, 3), (4, 2, 1)

    def __init__(self, lead, num_actions, num_heads, init, generators, args):
        super().__init__()
        self.num_heads, self.pads, self.layers = num_heads, [], []
        layers, size = [], 84  # (shape, fan-in, fan-out) of every weight; size of what the next convolution sees
        for (fan_in, fan_out), kernel, stride in zip(pairwise((4, *args.channels)), self.KERNELS, self.STRIDES):
            layers.append(((fan_out, fan_in, kernel, kernel), fan_in * kernel**2, fan_out * kernel**2))
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) if args.padding == "same" else 0
            self.pads.append((missing // 2, missing - missing // 2))  # TensorFlow's: the odd one behind
            size = (size + missing - kernel) // stride + 1
        for fans in pairwise((args.channels[-1] * size**2, args.hidden_size, num_actions * num_heads)):
            layers.append((fans, *fans))
        for i, (shape, *fans) in enumerate(layers):
            weight = torch.zeros(*lead, *shape)
            bias = torch.zeros(*lead, fans[1] // math.prod(shape[2:]))
            for s, generator in enumerate(generators):
                for w in weight[s].view(-1, *shape):
                    init(w, *fans, generator)
            self.layers.append((nn.Parameter(weight), nn.Parameter(bias)))
            self.register_parameter(f"weight{i}", self.layers[i][0])
            self.register_parameter(f"bias{i}", self.layers[i][1])

    def forward(self, frames):
        """frames (S, B, 4, 84, 84) uint8 -> (*lead, B, A, K)."""
        x = frames.transpose(0, 1).flatten(1, 2)  # (B, S * 4, 84, 84)
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
        for (weight, bias), stride, (before, behind) in zip(self.layers, self.STRIDES, self.pads):
            if before != behind:
                x, before = F.pad(x, (before, behind, before, behind)), 0
            groups = x.shape[1] // weight.shape[-3]  # S in the first convolution, then as many as there are networks
            x = F.conv2d(x, weight.flatten(0, -4), bias.flatten(), stride, before, groups=groups).relu_()
        lead = self.weight0.shape[:-4]
        x = x.permute(2, 3, 0, 1).unflatten(3, (math.prod(lead), -1))  # (height, width, B, lead, C)
        x = x.permute(3, 2, 0, 1, 4).flatten(2)  # (lead, B, height * width * C)
        for i, (weight, bias) in enumerate(self.layers[len(self.pads) :]):
            x = torch.baddbmm(bias.flatten(0, -2)[:, None], x, weight.flatten(0, -3))
            x = x.relu_() if i == 0 else x
        return x.unflatten(-1, (-1, self.num_heads)).unflatten(0, lead)

    def act(self, frames):
        """The greedy actions (S, B) of one network per seed, by the mean of its heads."""
        return self(frames).mean(-1).argmax(-1)


class AdamWithEps(nn.Module):
    """Adam (Kingma and Ba, 2015) for the large epsilons of Atari agents, with all of its state in fixed buffers.

    p <- p - learning_rate m_hat / (sqrt(v_hat) + eps), with m_hat = m / (1 - 0.9^t), v_hat = v / (1 - 0.999^t): torch;
    TensorFlow adds eps to sqrt(v), before v is corrected: its first steps are smaller.
    """

    def __init__(self, parameters, learning_rate, eps, style):
        super().__init__()
        self.params, self.learning_rate, self.eps, self.style = list(parameters), learning_rate, eps, style
        device = self.params[0].device
        self.register_buffer("num_steps", torch.zeros((), device=device))
        for i, parameter in enumerate(self.params):
            self.register_buffer(f"mean{i}", torch.zeros_like(parameter))
            self.register_buffer(f"square{i}", torch.zeros_like(parameter))

    def minimize(self, loss):
        """One step on this optimiser's own parameters; no other parameter gets a gradient."""
        grads = torch.autograd.grad(loss, self.params)
        grads = [grad.contiguous() for grad in grads]  # convolutions' are not, and the kernel goes by memory
        num_steps, *moments = self.buffers()
        with torch.no_grad():
            num_steps.add_(1)
            learning_rate, t = torch.full_like(num_steps, self.learning_rate), num_steps
            if self.style == "tensorflow":  # the step size has the corrections; after infinite steps none are left
                learning_rate.mul_((1 - 0.999 ** t.double()).sqrt() / (1 - 0.9 ** t.double()))
                t = torch.full_like(num_steps, math.inf)
            torch._fused_adam_(
                self.params, grads, moments[::2], moments[1::2], [], [t] * len(grads), lr=learning_rate,
                beta1=0.9, beta2=0.999, eps=self.eps, weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip


class NatureNetworks(NatureNetwork):
    """K separate networks (S, K) for each seed, with their values where one network has those of its heads."""

    def forward(self, frames):
        """frames (S, B, 4, 84, 84) uint8 -> (S, B, A, K)."""
        return super().forward(frames).squeeze(-1).movedim(1, -1)


class MultiNetworkAgent(nn.Module):
    """K networks and their optimiser for each of S independent agents."""

    def __init__(self, num_actions, args, device):
        super().__init__()
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        lead = args.num_seeds, args.num_networks
        self.network = NatureNetworks(lead, num_actions, 1, glorot_uniform, generators, args)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)
        self.to(device)
        adam = AdamWithEps(self.network.parameters(), args.learning_rate, args.optimizer_eps, args.optimizer_style)
        self.optimizers = nn.ModuleDict({"network": adam})


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def update(agent, batch, mixtures, args):
    """One gradient step of every agent; nothing in here waits for the GPU.

    batch: obs (S, B, 4, 84, 84) uint8, action, reward (S, B), next_obs as obs, not_terminal (S, B);
    mixtures: (S, K, J). Returns a dict of metrics, each (S,), on the device.
    """
    obs, action, reward, next_obs, not_terminal = batch

    # the targets, (2): the frozen networks' best action in the next state, by the mixed values
    with torch.no_grad():
        next_q = (agent.target_network(next_obs) @ mixtures[:, None]).amax(2)  # (S, B, J)
        target_q = reward[..., None] + args.gamma * not_terminal[..., None] * next_q

    # a gradient step on the same mixtures of the taken actions' values, (3)
    q = agent.network(obs).take_along_dim(action[..., None, None], 2).squeeze(2)  # (S, B, K)
    loss = huber(q @ mixtures - target_q).mean((1, 2))  # (S,)
    agent.optimizers["network"].minimize(loss.sum())  # sum over S: seeds never mix

    return {"loss/td": loss.detach(), "value/q": q.detach().mean((1, 2)), "value/target_q": target_q.mean((1, 2))}


def synchronize(agent):
    """Q_target <- Q."""
    with torch.no_grad():
        torch._foreach_copy_(list(agent.target_network.parameters()), list(agent.network.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, the same text in every script: flags, environments, evaluation, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).stem

# returns of random play and of a human tester, the 0 and the 100 of a normalised score (van Hasselt et al., 2016)
ATARI_REFERENCES = {
    "ALE/Asterix-v5": (210.0, 8503.3),
    "ALE/Boxing-v5": (0.1, 12.1),
    "ALE/Breakout-v5": (1.7, 30.5),
    "ALE/Freeway-v5": (0.0, 29.6),
    "ALE/MsPacman-v5": (307.3, 6951.6),
    "ALE/Pong-v5": (-20.7, 14.6),
    "ALE/Qbert-v5": (163.9, 13455.0),
    "ALE/Seaquest-v5": (68.4, 42054.7),
    "ALE/SpaceInvaders-v5": (148.0, 1668.7),
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


def make_atari(environment, num_envs):
    """Games side by side, as the DQN Replay Dataset was logged: steps of 4 frames, the maximum of the last two kept,
    grey, 84 x 84, 4 of them stacked (zeros before an episode begins), sticky actions, unclipped rewards.

    An episode ends with the game, not with a life, or after 27,000 steps; the caller resets what has ended.
    """
    try:
        import ale_py
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as e:
        fail(f"environment {environment['id']} needs a package that is not installed ({e})", "pip install ale-py")
    gym.register_envs(ale_py)
    try:
        game = gym.spec(environment["id"]).kwargs["game"]
    except (gym.error.Error, KeyError):
        fail(f"{environment['id']} is no Atari game", "give an id like ALE/Pong-v5, see ale_py.roms.get_all_rom_ids()")
    return AtariVectorEnv(
        game,
        num_envs,
        num_threads=min(num_envs, torch.get_num_threads()),
        max_num_frames_per_episode=108_000,
        repeat_action_probability=0.25,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
        **environment["kwargs"],
    )


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


def run_atari_episodes(policy, environment, env_seeds, video_dir=None, epsilon=0.001):
    """(return, length) of one episode per environment seed; policy.act maps (1, E, 4, 84, 84) bytes to actions (1, E).

    The episodes step side by side, and the batch keeps its size when some are over, so that nobody's rounding
    depends on when the others end.
    """
    policy = pickle.loads(policy) if isinstance(policy, bytes) else policy  # as workers get it
    envs, rng = make_atari(environment, len(env_seeds)), np.random.default_rng(env_seeds)
    obs, _ = envs.reset(seed=np.array(env_seeds) % 2**31)  # the emulator's seeds have 31 bits
    returns, lengths, running = np.zeros(len(obs)), np.zeros(len(obs), int), np.ones(len(obs), bool)
    frames = []
    while running.any():
        if video_dir and running[0]:
            frames.append(np.tile(obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None], 3))
        with torch.no_grad():
            greedy = policy.act(torch.from_numpy(obs)[None])[0].numpy()
        random = rng.integers(envs.single_action_space.n, size=len(obs))
        actions = np.where(rng.random(len(obs)) < epsilon, random, greedy)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        returns, lengths = returns + running * rewards, lengths + running
        running &= ~(terminated | truncated)
    envs.close()
    if video_dir:
        from gymnasium.utils.save_video import save_video

        save_video(frames, str(video_dir), lambda episode: True, fps=15, name_prefix=f"episode-{env_seeds[0]}")
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


class AtariEvaluator:
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
                jobs.append(self.pool.submit(run_atari_episodes, *job) if self.pool else Future())
            if not self.pool:
                jobs[-1].set_result(run_atari_episodes(*job))
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


def print_atari_result(args, run_dir, num_updates, rate):
    """The last line of a run: what it reached, what the number means, how fast, and where the rest is."""
    text = ""
    if args.eval_episodes and (run_dir / "evaluations.csv").read_text().count("\n") > 1:
        update, seed, _, returns, _, scores = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1).T
        last = np.unique(update)[-10:]
        rows = [(seed == s) & np.isin(update, last) for s in np.unique(seed)]
        score, mean = ([x[of_seed].mean() for of_seed in rows] for x in (scores, returns))
        hundred = "the agent that logged the data, else a human"
        if not np.isnan(score).any():
            text = f"normalised score {np.mean(score):.1f} ± {np.std(score):.1f} (0: random policy, 100: {hundred}), "
        text += f"return {np.mean(mean):.1f} ± {np.std(mean):.1f} (mean ± standard deviation over {args.num_seeds} "
        text += f"seed(s) of the mean over the last {len(last)} evaluations of {args.eval_episodes} episodes), "
    print(f"{text}{num_updates:,} updates, {rate:.1f} updates/s per seed, run folder {run_dir}")


def evaluate_atari_run(args, agent_class):
    """--evaluate: fresh episodes of the policies in a run's checkpoint."""
    run_dir = Path(args.evaluate)
    environment = json.loads((run_dir / "config.json").read_text())["environment"]
    if not environment["id"]:
        fail(f"{run_dir} is a run without environment", "evaluate a run that has one")
    num_actions = int(make_atari(environment, 1).single_action_space.n)
    agent = agent_class(num_actions, args, torch.device("cpu"))
    agent.load_state_dict(load_checkpoint(run_dir, "cpu")["agent"])
    video_dir = run_dir / "videos" if args.capture_video else None
    for s in range(args.num_seeds):
        env_seeds = [episode_seed(args.seed + s, 2**31, e) for e in range(args.eval_episodes or 10)]
        results = run_atari_episodes(policy_of_seed(agent.network, s), environment, env_seeds, video_dir)
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
# Plumbing of the online Atari scripts: the files of the DQN Replay Dataset
# ---------------------------------------------------------------------------------------------------------------------


def write_replay(folder, episodes, num_rows, metadata):
    """Writes episodes [(frames (T, 84, 84), actions (T,), rewards (T,)), ...] as files of the DQN Replay Dataset.

    These are snapshots of a circular memory of num_rows rows: one before its last row is written, in every round, and
    one at the end. So the last row of a file is a round old, and in the last file all rows are that add_count does not
    count. Three rows of zeros come before every episode; rewards are clipped to [-1, 1].
    """
    partial = Path(folder).with_name(Path(folder).name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "replay_logs").mkdir(parents=True)
    kinds = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}
    store = {"observation": np.zeros((num_rows, 84, 84), np.uint8)}
    store |= {name: np.zeros(num_rows, dtype) for name, dtype in kinds.items()}
    add_count, number = 0, 0

    def snapshot():
        arrays = {f"$store$_{name}": rows for name, rows in store.items()}
        arrays["add_count"] = np.array(add_count)
        arrays["invalid_range"] = np.arange(add_count - 1, add_count + 4) % num_rows  # what a new row spoils
        for name, array in arrays.items():
            with gzip.GzipFile(partial / "replay_logs" / f"{name}_ckpt.{number}.gz", "wb", mtime=0) as file:
                np.save(file, array)

    for frames, actions, rewards in episodes:
        terminal = np.zeros(len(rewards), np.uint8)
        terminal[-1] = 1
        columns = dict(zip(store, (frames, actions, np.clip(rewards, -1, 1), terminal)))
        rows = {name: np.concatenate([np.zeros((3, *x.shape[1:]), x.dtype), x]) for name, x in columns.items()}
        first = 0
        while first < len(rewards) + 3:
            cursor = add_count % num_rows
            n = min(len(rewards) + 3 - first, (num_rows - 1 if cursor < num_rows - 1 else num_rows) - cursor)
            for name, x in rows.items():
                store[name][cursor : cursor + n] = x[first : first + n]
            first, add_count = first + n, add_count + n
            if add_count % num_rows == num_rows - 1:
                snapshot()
                number += 1
    if 0 < add_count % num_rows < num_rows - 1:
        snapshot()
    (partial / "replay.json").write_text(json.dumps(metadata, indent=2))
    os.replace(partial, folder)


def save_log(args, run_dir, environment, policy):
    """Writes the first seed's episodes in RUN_DIR/log, thinned if asked for, to --save-replay; prints what they are."""
    log = sorted((run_dir / "log").glob("*.npz"))  # by the steps they ended with
    if not log:
        print(f"no episode came to its end: nothing to write to {args.save_replay}")
        return
    env_seeds = [episode_seed(args.seed, 2**31 + 1, e) for e in range(args.eval_episodes or 10)]
    random = [r for r, _ in run_atari_episodes(policy, environment, env_seeds, epsilon=1.0)]
    evaluated = {}  # update: returns
    for row in csv.DictReader((run_dir / "evaluations.csv").open()):
        if int(row["seed"]) == args.seed:
            evaluated.setdefault(row["update"], []).append(float(row["return"]))
    rewards = [np.load(path)["rewards"] for path in log]
    share = min(1, (args.replay_transitions or math.inf) / sum(map(len, rewards)))
    kept = [i for i in range(len(log)) if math.floor((i + 1) * share) > math.floor(i * share)] or [len(log) - 1]
    returns, num_transitions = [float(rewards[i].sum()) for i in kept], sum(len(rewards[i]) for i in kept)
    metadata = {
        "env_id": environment["id"],
        "random": float(np.mean(random)),  # the two references of the offline scripts' normalised scores
        "dqn": max(map(np.mean, evaluated.values()), default=None),
        "episodes": len(kept),
        "transitions": num_transitions,
        "description": f"Training log of the first seed of {SCRIPT}.py with these flags",
        "flags": dict(sorted(asdict(args).items() - asdict(Args()).items())),
    }
    episodes = (tuple(np.load(log[i]).values()) for i in kept)
    num_rows = min(args.rows_per_file, num_transitions + 3 * len(kept) + 1)  # one more: the last row is never new
    write_replay(args.save_replay, episodes, num_rows, metadata)
    print(
        f"{len(kept):,} episodes, {num_transitions:,} transitions, return {np.mean(returns):.1f} ± "
        f"{np.std(returns):.1f}, best {np.max(returns):.1f} -> {args.save_replay}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

SEED_EVERY = 10  # episodes of an environment from one seed to the next: seeding takes the time of many steps


def main():
    args = parse_args()
    check_range(args, 1, math.inf, "num_seeds", "num_envs", "num_steps", "learning_starts", "update_every")
    check_range(args, 1, math.inf, "batch_size", "channels", "hidden_size", "epsilon_steps", "num_networks")
    check_range(args, 1, math.inf, "target_every", "eval_every", "checkpoint_every", "log_every", "replay_transitions")
    check_range(args, 8, 2**24, "replay_size", "rows_per_file")  # a float32 draw tells 2^24 rows apart
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 0, math.inf, "learning_rate", "optimizer_eps", "eval_episodes", "eval_workers")
    check_range(args, 0, 1, "gamma", "epsilon")
    if len(args.channels) != 3:
        fail(f"--channels {args.channels} are not three", "give one number for each convolution")
    if args.evaluate:
        return evaluate_atari_run(args, MultiNetworkAgent)
    if args.save_replay and Path(args.save_replay).exists():
        fail(f"{args.save_replay} is there already", "give another folder to write the dataset to")
    if args.save_replay and args.resume and not (Path(args.resume) / "log").exists():
        fail(f"{args.resume} has kept no log", "give --save-replay from the start of a run")
    if args.replay_size < 8 * args.num_envs:
        fail(f"--replay-size {args.replay_size} is out of range", "give at least 8 steps for each of --num-envs")
    device, S, E = choose_device(args.device), args.num_seeds, args.num_envs
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for these shapes

    environment = {"id": args.env_id, "kwargs": {}, "references": ATARI_REFERENCES.get(args.env_id)}
    envs = make_atari(environment, S * E)
    num_actions = int(envs.single_action_space.n)
    agent = MultiNetworkAgent(num_actions, args, device)
    generators = [torch.Generator(device).manual_seed(args.seed + s) for s in range(S)]

    def draw(sampler, *shape):
        """One draw per seed, each from its own generator: (S, *shape)."""
        return torch.stack([sampler(*shape, device=device, generator=generator) for generator in generators])

    T, M = -(-args.num_steps // E), -(-args.replay_size // E)  # steps of each environment, and how many are remembered
    try:
        memory = new_memory(S, min(M, T), E, device)
    except RuntimeError as e:
        fail(f"the replay memory does not fit ({str(e).splitlines()[0]})", "give a smaller --replay-size")
    t, num_updates = 0, 0

    checkpoint = load_checkpoint(args.resume, device) if args.resume else None
    if checkpoint and checkpoint["t"] > T:
        fail(f"the run is at step {checkpoint['t'] * E} already", "give a larger --num-steps")
    stop = on_stop_signal()  # from here on, a stop saves first
    run_dir = open_run_dir(args, args.env_id.split("/")[-1], environment)
    if checkpoint:
        t, num_updates = checkpoint["t"], checkpoint["num_updates"]
        for name, rows in checkpoint["memory"].items():
            memory[name][:, : rows.shape[1]] = rows
        agent.load_state_dict(checkpoint["agent"])
        for generator, state in zip(generators, checkpoint["generators"]):
            if len(state) == len(generator.get_state()):  # else it comes from another kind of device: new draws
                generator.set_state(state.cpu())
    writer = SummaryWriter(run_dir, purge_step=t * E + 1)
    evaluator = AtariEvaluator(args, environment, run_dir, writer)
    if checkpoint:
        evaluator.resume(t * E, checkpoint["pending_evaluations"], agent.network)

    # what the environments are at; number s * E + e is environment e of seed s
    episode_number, age, episode_return = np.zeros(S * E, int), np.zeros(S * E, int), np.zeros(S * E)
    mixture = checkpoint["mixture"] if checkpoint else mixture_to_act(draw(torch.rand, E, args.num_networks), args)
    actions_since_seed = [[] for _ in range(S * E)]
    episode_log = [[] for _ in range(E if args.save_replay else 0)]  # (frame, action, reward) since the episode began

    def begin(which):
        """Observations (S * E, 4, 84, 84) after a new episode began in these environments."""
        seeds = np.full(S * E, -1)  # -1: the emulator's random numbers go on
        for i in np.flatnonzero(which):
            if episode_number[i] % SEED_EVERY == 0:
                seeds[i] = episode_seed(args.seed + i // E, i % E, episode_number[i], 1) % 2**31
                actions_since_seed[i] = []
            if i < len(episode_log):
                episode_log[i] = []
        age[which], episode_return[which] = 0, 0
        return envs.reset(seed=seeds[which], options={"reset_mask": which})[0]

    def play(obs, action):
        """One step of all environments: the next observations, rewards, and which episodes are over, (S * E, ...)."""
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        over = terminated | truncated
        for i in range(S * E):
            actions_since_seed[i].append(int(action[i]))
        for i, log in enumerate(episode_log):
            log.append((obs[i, -1].copy(), action[i], reward[i]))
        age[:], episode_return[:], episode_number[:] = age + 1, episode_return + reward, episode_number + over
        return next_obs, reward, over

    # an emulator's state is its last seed and the actions since: a resumed run plays them again
    envs.reset(seed=np.zeros(S * E, int))
    past = [actions.tolist() for actions in checkpoint["actions_since_seed"]] if checkpoint else actions_since_seed
    for steps_left in range(max(map(len, past)), -1, -1):
        starts = np.array([len(actions) == steps_left for actions in past])
        if starts.any():
            episode_number[starts] = checkpoint["seeded_episode"].cpu().numpy()[starts] if checkpoint else 0
            obs = begin(starts)
        if steps_left:
            action = np.array([actions[-steps_left] if len(actions) >= steps_left else 0 for actions in past])
            obs, _, over = play(obs, action)
            if over.any():
                obs = begin(over)
    if args.save_replay:
        (run_dir / "log").mkdir(exist_ok=True)
        for path in (run_dir / "log").glob("*.npz"):  # episodes that came after the checkpoint
            if int(path.stem.split("-")[0]) > t:
                path.unlink()

    def learn(step, e, u):
        return update(agent, transitions(memory, step, e), mixtures_to_learn(u, args), args)

    if device.type == "cuda":
        no_index = torch.zeros(S, args.batch_size, dtype=torch.long, device=device)
        learn = cuda_graph(learn, agent, no_index, no_index, torch.zeros(S, args.num_networks, device=device))

    def save():
        """Everything that an exact continuation needs."""
        state = {
            "t": t,
            "num_updates": num_updates,
            "agent": agent.state_dict(),
            "generators": [generator.get_state() for generator in generators],
            "memory": {name: x[:, :t].clone() if t < x.shape[1] else x for name, x in memory.items()},
            "actions_since_seed": [torch.tensor(actions, dtype=torch.uint8) for actions in actions_since_seed],
            "mixture": mixture,
            "seeded_episode": torch.from_numpy(episode_number // SEED_EVERY * SEED_EVERY),
            "pending_evaluations": {update: past for update, (past, _) in evaluator.pending.items()},
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    if not args.resume:
        save()
    keep_freed_memory()
    started, printed, first_t, metrics, stopped, rate = time.time(), time.time(), t, {}, False, 0
    while t < T and not stopped:
        # act: at random with probability epsilon, which falls from 1 after learning_starts steps
        epsilon = share_of_random_actions(t * E, args)
        explores, action = draw(torch.rand, E) < epsilon, (draw(torch.rand, E) * num_actions).long()  # (S, E)
        if epsilon < 1:
            with torch.no_grad():
                values = agent.network(torch.from_numpy(obs).to(device).unflatten(0, (S, E)))  # (S, E, A, K)
                greedy = (values @ mixture[..., None]).squeeze(-1).argmax(-1)  # (S, E)
            action = torch.where(explores, action, greedy)
        action = action.flatten().cpu().numpy()
        row = {"frame": obs[:, -1], "action": action, "age": age.copy()}
        obs, reward, over = play(obs, action)
        row |= {"reward": np.clip(reward, -1, 1), "terminal": over}
        for name, x in row.items():
            memory[name][:, t % M] = torch.from_numpy(x).to(device).unflatten(0, (S, E))
        t += 1
        for i in np.flatnonzero(over):
            writer.add_scalar(f"train/return_seed{args.seed + i // E}", episode_return[i], t * E)
            if i < len(episode_log):
                columns = dict(zip(("frames", "actions", "rewards"), map(np.array, zip(*episode_log[i]))))
                np.savez_compressed(run_dir / "log" / f"{t:010}-{i}.npz", **columns)
        if over.any():
            obs = begin(over)
            for s in np.flatnonzero(over.reshape(S, E).any(1)):
                u = torch.rand(E, args.num_networks, device=device, generator=generators[s])
                new = torch.from_numpy(over).to(device).view(S, E)[s, :, None]
                mixture[s] = torch.where(new, mixture_to_act(u, args), mixture[s])

        # learn: one update per update_every steps of a seed
        first, end = valid_steps(t, M)
        due = t * E // args.update_every - (t - 1) * E // args.update_every
        for _ in range(due if t * E > args.learning_starts and end > first else 0):
            pick = (draw(torch.rand, args.batch_size) * ((end - first) * E)).long()  # (S, B)
            metrics = learn(first + pick // E, pick % E, draw(torch.rand, args.num_networks))
            num_updates += 1
            if num_updates % args.target_every == 0:
                synchronize(agent)

        # evaluate, log, save
        done, stopped = t == T, bool(stop)
        passed = [t * E // n > (t - 1) * E // n for n in (args.eval_every, args.log_every, args.checkpoint_every)]
        if passed[0] or done:
            evaluator.submit(t * E, agent.network)
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
    if args.save_replay:
        save_log(args, run_dir, environment, policy_of_seed(agent.network, 0))
    print_atari_result(args, run_dir, num_updates, rate / args.update_every)


if __name__ == "__main__":
    main()
