"""Online REM: Q-learning on random mixtures of four networks; as a baseline, Bootstrapped DQN.

Papers: R. Agarwal, D. Schuurmans, M. Norouzi, "An Optimistic Perspective on Offline Reinforcement
Learning", 2020, arXiv:1907.04543 (REM, offline and online); V. Mnih et al., "Playing Atari with Deep
Reinforcement Learning", 2013, arXiv:1312.5602 (DQN; its numbers), and its Nature article of 2015;
I. Osband, C. Blundell, A. Pritzel, B. Van Roy, "Deep Exploration via Bootstrapped DQN", 2016,
arXiv:1602.04621 (the baseline).

Idea. A replay memory holds one agent's play, as a log does; so what helps offline may help online. Four
separate networks value the actions. Every minibatch draws a random convex combination of them and takes
DQN's step on the mixed values. Every episode is played by a combination of its own, so that the agent
tries different opinions. In the baseline each network learns by itself from the same minibatch, and a
random one of them plays the episode.

Objectives. Shapes: S seeds, C networks per seed, B batch, A actions, K values per action (one of each
network, so that K = C), J losses a minibatch, M rows of replay memory.
    mixture   alpha_k = u_k / sum_j u_j, u uniform on [0, 1], J = 1; baseline: J = K, each network alone
    loss      mean huber(Q(s, a) - y) over B and J,  Q = sum_k alpha_k Q_k,                         DQN (2)
              y = r + gamma (1 - terminal) max over a' of Q_target(s', a'), with the same alpha
    gradient  that of Q alone, y being a constant; huber(u) = u^2 / 2 if |u| <= 1, else |u| - 1/2   DQN (3)
    targets   Q_target <- Q after every --target-every updates

What differs from the papers and their code, and why.
    - Normalised uniform numbers, as in both: not uniform over all mixtures, but closer to the mean.
    - One Adam for all networks: its steps are elementwise, so nothing changes. The place of its epsilon,
      padding and first weights, one network at a time, are those of the code's TensorFlow.
    - The baseline has separate networks and no masks on the data, as in Agarwal et al.; Osband et al. share
      the convolutions. An evaluation is greedy by the mean of the networks, in both agents.
    - Environment, replay memory, log, clock and random actions are those of dqn_atari.py, whose docstring
      says what differs there. A diff of the two shows the method.

Run:        python algorithms/rem_online_atari.py --env-id ALE/Pong-v5
Baseline:   --bootstrapped
Catch:      PYTHONPATH=tests python algorithms/rem_online_atari.py --env-id catch:Catch-v0 --num-steps 6000
            --learning-starts 1000 --epsilon-steps 3000 --epsilon 0 --replay-size 8000 --channels 8 16 16
            --hidden-size 64 --padding valid --learning-rate 1e-3 --adam-eps 1e-6 --target-every 50
            --update-every 2 --eval-every 1000 --log-every 1000
Expected:   by this command a return of 1.0, the best there is, from step 3,000 on (one seed)
"""

import copy
import gzip
import json
import math
import multiprocessing
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
torch.backends.cudnn.benchmark = True  # the fastest convolutions for these shapes

# Random numbers are a function of (seed, purpose, update, ...), so that no generator's state has to be saved.
# Purposes start at 1, because numpy takes (s, u, 0) for (s, u)
DRAWS = 1
EVALUATION = 2
EXPLORATION = 3
BLACK_ROW = np.zeros((84, 84), np.uint8), 0, 0.0, False


@dataclass
class Args:
    num_networks: int = 4  # separate networks per seed
    bootstrapped: bool = False  # the baseline: each network learns by itself, one plays an episode
    env_id: str = "ALE/Pong-v5"  # an Atari game, or `module:Env-v0` whose observations are (84, 84) uint8
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation, each in a game of its own
    num_steps: int = 50_000_000  # agent steps of each seed, of 4 frames each
    learning_starts: int = 20_000  # steps with random actions, before the first update
    update_every: int = 4  # steps per update
    batch_size: int = 32  # transitions per update and seed
    replay_size: int = 1_000_000  # rows of replay memory of each seed, 7 KB each; also of a file of the log
    epsilon: float = 0.01  # share of random actions in the end
    epsilon_steps: int = 250_000  # steps after learning_starts in which that share falls from 1 to epsilon
    channels: tuple[int, int, int] = (32, 64, 64)  # of the three convolutions
    hidden_size: int = 512  # width of the layer after them
    padding: Literal["same", "valid"] = "same"  # same: the logging code's; valid: the Nature article's
    learning_rate: float = 5e-5  # Adam's step size
    adam_eps: float = 3.125e-5  # Adam's epsilon
    gamma: float = 0.99  # discount factor
    target_every: int = 2_000  # updates between copies of the network to its target
    save_replay: str | None = None  # write the first seed's log to this folder
    eval_every: int = 250_000  # steps between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed, one action in a thousand at random; 0: never
    log_every: int = 10_000  # steps between entries in TensorBoard
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/ENVIRONMENT/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint, with a new episode
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing

    def __post_init__(self):
        self.channels = tuple(self.channels)  # of which JSON makes a list
        if not (0 <= self.gamma <= 1 and 0 <= self.epsilon <= 1):
            sys.exit("error: gamma and epsilon are shares; give numbers in [0, 1]")


# Random numbers -----------------------------------------------------------------------------------
def random_generators(seeds, purpose, step):
    """One a seed, whose numbers do not depend on its neighbours."""
    return [np.random.default_rng((seed, purpose, step)) for seed in seeds]


# The idea: values that are consistent in every mixture of the networks ----------------------------
def random_mixtures(generators, args):
    """Weights (S, 1, K, J) of the networks: a random convex combination alpha (J = 1), or for the baseline
    each network alone, in random order (J = K)."""
    u = [1 - generator.random((1, args.num_networks)) for generator in generators]
    u = torch.from_numpy(np.float32(u))  # 0 < u <= 1
    mixtures = (u / u.sum(2, keepdim=True))[..., None]
    if args.bootstrapped:
        mixtures = torch.eye(args.num_networks)[u.argsort()]
    return mixtures.to(args.device)


# The idea of DQN: random minibatches of what was seen, and a loss that no single error dominates --
class FrameMemory(nn.Module):
    """The newest M rows of play of every seed, circular: a frame, and the action, reward and end that came of
    it. The frame after it is in the next row. Three black rows come before every episode, as the past of its
    first stacks."""

    def __init__(self, num_seeds, size, device):
        super().__init__()
        self.size = size
        self.register_buffer("frame", torch.zeros(num_seeds, size, 84, 84, dtype=torch.uint8, device=device))
        for name, dtype in (("action", torch.int64), ("reward", torch.float32), ("terminal", torch.bool)):
            self.register_buffer(name, torch.zeros(num_seeds, size, dtype=dtype))
        self.register_buffer("add_count", torch.zeros(num_seeds, dtype=torch.int64))  # rows ever added
        self.register_buffer("random_play", torch.zeros(2))  # the first seed's random episodes, their returns

    def add(self, s, *values):
        """One row of seed s: frame (84, 84), action, reward, terminal."""
        row = self.add_count[s] % self.size
        columns = self.frame, self.action, self.reward, self.terminal
        for column, value in zip(columns, values):
            column[s, row] = torch.as_tensor(value)
        self.add_count[s] += 1

    def draw_rows(self, s, generator, batch_size):
        """Rows t (B,) of seed s to learn from, counted since the start: frames t - 3 to t + 1 are there, and
        no end is in rows t - 3 to t - 1. That leaves out stacks of two episodes and the rows between them."""
        newest = self.add_count[s].item()
        oldest = max(0, newest - self.size)
        terminal = self.terminal[s].numpy()
        valid = np.empty(0, int)
        while len(valid) < batch_size:
            rows = generator.integers(oldest + 3, newest - 1, batch_size)
            past = rows[:, None] - [1, 2, 3]
            crosses = terminal[past % self.size].any(1)
            valid = np.append(valid, rows[~crosses])
        return valid[:batch_size]

    def draw(self, generators, batch_size):
        """Frames t - 3 to t + 1 (S, B, 5, 84, 84), action, reward and not_terminated (S, B)."""
        rows = [self.draw_rows(s, generator, batch_size) for s, generator in enumerate(generators)]
        rows = torch.from_numpy(np.stack(rows))  # (S, B)
        near = rows[..., None] + torch.arange(-3, 2)
        s = torch.arange(len(rows))[:, None]
        frames = self.frame[s[..., None], near % self.size]
        rows %= self.size
        not_terminated = 1 - self.terminal[s, rows].float()
        columns = frames, self.action[s, rows], self.reward[s, rows], not_terminated
        return [column.to(frames.device) for column in columns]


def huber(u):
    """u^2 / 2 where |u| <= 1, beyond that |u| - 1/2, elementwise: a slope of 1 at most."""
    size = u.abs()
    return torch.where(size <= 1, 0.5 * u.square(), size - 0.5)


def share_of_random_actions(step, args):
    """Epsilon at a step: 1 until learning starts, then a line down to its last value."""
    progress = (step - args.learning_starts) / args.epsilon_steps
    return 1 - (1 - args.epsilon) * min(1, max(0, progress))


# Networks. Every tensor starts with the seed axis S, so that all agents share each matrix product -
def glorot_uniform(weight, fan_in, fan_out, generator):
    """Uniform weights of variance 2 / (in + out): TensorFlow's default, and so the logging code's."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight.uniform_(-bound, bound, generator=generator)


class NatureNetwork(nn.Module):
    """S * C independent networks of the Nature article side by side; those of a seed see the same frames.
    Three convolutions, each one for all networks; a hidden layer; num_heads values an action."""

    KERNELS = 8, 4, 3
    STRIDES = 4, 2, 1

    def __init__(self, num_actions, num_heads, init, generators, args, C=1):
        super().__init__()
        self.C = C
        self.num_heads = num_heads
        self.pads = []  # pixels before and after the input of each convolution
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()

        def add_layer(shape, fan_in, fan_out, num_outputs):
            weight = torch.empty(len(generators) * C, *shape)
            for i in range(len(weight)):
                init(weight[i], fan_in, fan_out, generators[i // C])
            self.weights.append(weight)
            self.biases.append(torch.zeros(len(weight), 1, num_outputs))

        num_inputs = 4
        size = 84
        for num_outputs, kernel, stride in zip(args.channels, self.KERNELS, self.STRIDES):
            missing = 0
            if args.padding == "same":
                missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            self.pads.append((missing // 2, missing - missing // 2))  # TensorFlow's: the odd one after
            size = (size + missing - kernel) // stride + 1
            shape = num_outputs, num_inputs, kernel, kernel
            add_layer(shape, num_inputs * kernel**2, num_outputs * kernel**2, num_outputs)
            num_inputs = num_outputs
        num_inputs *= size**2
        for num_outputs in (args.hidden_size, num_actions * num_heads):
            add_layer((num_inputs, num_outputs), num_inputs, num_outputs, num_outputs)
            num_inputs = num_outputs

    def forward(self, frames):
        """frames (S, B, 4, 84, 84) uint8 -> (S, B, A, K), the values of a seed's networks side by side."""
        x = frames.transpose(0, 1).flatten(1, 2)  # (B, S * 4, 84, 84)
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
        *convolutions, hidden, last = zip(self.weights, self.biases)
        for (weight, bias), stride, (pad, after) in zip(convolutions, self.STRIDES, self.pads):
            if pad != after:
                x = nn.functional.pad(x, (pad, after, pad, after))
                pad = 0
            groups = x.shape[1] // weight.shape[2]  # S in the first convolution, then S * C
            weight = weight.flatten(0, 1)
            x = nn.functional.conv2d(x, weight, bias.flatten(), stride, pad, groups=groups)
            x = x.relu_()
        x = x.unflatten(1, (len(self.weights[0]), -1))  # (B, S * C, channels, height, width)
        x = x.permute(1, 0, 3, 4, 2).flatten(2)
        weight, bias = hidden
        x = torch.baddbmm(bias, x, weight).relu_()
        weight, bias = last
        x = torch.baddbmm(bias, x, weight)
        x = x.unflatten(-1, (-1, self.num_heads)).unflatten(0, (-1, self.C))  # (S, C, B, A, heads)
        return x.permute(0, 2, 3, 1, 4).flatten(3)


class GreedyPolicy(nn.Module):
    """Frames (S, B, 4, 84, 84) -> best actions (S, B) by the mean over K of their values."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, frames):
        return self.network(frames).mean(-1).argmax(-1)


class TensorFlowAdam(torch.optim.Adam):
    """Adam as in TensorFlow, which adds epsilon to sqrt(v) before v's bias is corrected: smaller first steps.
    p <- p - learning_rate sqrt(1 - 0.999^t) / (1 - 0.9^t) m / (sqrt(v) + eps)"""

    def __init__(self, parameters, learning_rate, eps):
        rate = torch.zeros((), device=parameters[0].device)
        super().__init__(parameters, rate, eps=eps, fused=True, capturable=rate.is_cuda)
        self.learning_rate = learning_rate
        for parameter in parameters:
            self.state[parameter] = {
                "num_steps": torch.zeros_like(rate),
                "step": torch.full_like(rate, math.inf),  # after so many, torch corrects no bias
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self):
        group = self.param_groups[0]
        first = self.state[group["params"][0]]
        t = first["num_steps"].add_(1).double()
        group["lr"].copy_(self.learning_rate * (1 - 0.999**t).sqrt() / (1 - 0.9**t))
        super().step()


class Agent(nn.Module):
    """Networks, optimizers and replay memories of S independent agents."""

    def __init__(self, num_actions, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        self.network = NatureNetwork(num_actions, 1, glorot_uniform, generators, args, args.num_networks)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)
        self.to(args.device)
        adam = TensorFlowAdam(list(self.network.parameters()), args.learning_rate, args.adam_eps)
        self.optimizers = {"network": adam}
        self.replay = FrameMemory(args.num_seeds, args.replay_size, args.device)


# The update ---------------------------------------------------------------------------------------
def minimize(loss, optimizer):
    """One step on the optimizer's own parameters; no other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]
    loss.backward(inputs=parameters)
    optimizer.step.__wrapped__(optimizer)  # 3 % faster without hooks; with a scheduler or hooks: optimizer.step()
    for parameter in parameters:
        parameter.grad = None  # faster than zero_grad


def update(agent, obs, action, reward, next_obs, not_terminated, mixtures, args):
    """One gradient step of every agent on obs and next_obs (S, B, 4, 84, 84), action, reward and
    not_terminated (S, B), and mixtures (S, 1, K, J). Returns what to log, (S,) each, still on the device:
    nothing here waits for a GPU."""
    # the targets, DQN (2): the best mixed values of the frozen networks in the next state
    with torch.no_grad():
        next_q = (agent.target_network(next_obs) @ mixtures).amax(2)  # (S, B, J)
        target_q = reward[..., None] + args.gamma * not_terminated[..., None] * next_q
        target_q = target_q.flatten(1)  # (S, B * J)

    # a gradient step on the same mixtures of the logged actions' values, DQN (3)
    q = agent.network(obs) @ mixtures  # (S, B, A, J)
    q = q.take_along_dim(action[..., None, None], 2).flatten(1)  # (S, B * J)
    loss = huber(q - target_q).mean(1)  # (S,)
    minimize(loss.sum(), agent.optimizers["network"])  # sum over S: seeds never mix

    return {
        "loss/td": loss.detach(),
        "value/q": q.detach().mean(1),
        "value/target_q": target_q.mean(1),
    }


def synchronize(agent):
    """Q_target <- Q."""
    with torch.no_grad():
        targets = agent.target_network.parameters()
        for target, online in zip(targets, agent.network.parameters()):
            target.copy_(online)


# Plumbing of the online Atari scripts: play, logs -------------------------------------------------
class Games:
    """One game a seed, stepped side by side. What happens goes to the replay memory; whenever that of the
    first seed is full, it becomes a file of --save-replay, as in the DQN Replay Dataset's own code."""

    def __init__(self, envs, agent, args, first):
        self.envs = envs
        self.replay = agent.replay
        self.args = args
        seeds = range(args.seed, args.seed + args.num_seeds)
        entropy = [(seed, EXPLORATION, first, 1) for seed in seeds]
        env_seeds = [int(np.random.default_rng(x).integers(2**31)) for x in entropy]
        self.obs, _ = envs.reset(seed=np.array(env_seeds, object))  # as all kinds of environments take them
        self.ended = np.ones(len(seeds), bool)
        self.returns = np.zeros(len(seeds))  # of the episodes so far
        last = self.replay.add_count % self.replay.size - 1
        self.replay.terminal[range(len(seeds)), last] = first > 0  # a stop cuts the episodes under way

    def step(self, action):
        """Plays action (S,) in all games; one that has ended gives way to the next at once."""
        frames = self.obs[:, -1]
        began = self.ended
        self.obs, reward, terminated, truncated, _ = self.envs.step(action)
        self.ended = terminated | truncated
        self.returns = self.returns * ~began + reward
        rows = zip(frames, action, reward.clip(-1, 1), self.ended)
        for s, row in enumerate(rows):
            for values in [BLACK_ROW] * (3 * began[s]) + [row]:
                self.replay.add(s, *values)
                if s == 0 and (self.replay.add_count[0] + 1) % self.replay.size == 0:
                    self.save_rows()
        if self.ended.any():
            self.obs, _ = self.envs.reset(options={"reset_mask": self.ended})

    def save_rows(self):
        """Writes the first seed's memory as a file of the DQN Replay Dataset. The rows before the cursor, which
        is the number of rows added modulo M, are of the last round, and the others a round old."""
        if not self.args.save_replay:
            return
        add_count = self.replay.add_count[0].item()
        number, cursor = divmod(add_count, self.replay.size)
        rows = slice(add_count + 1)  # all, or those of the first round and a stale one
        arrays = {
            "$store$_observation": self.replay.frame[0, rows].cpu().numpy(),
            "$store$_action": np.int32(self.replay.action[0, rows]),
            "$store$_reward": self.replay.reward[0, rows].numpy(),
            "$store$_terminal": np.uint8(self.replay.terminal[0, rows]),
            "add_count": np.array(cursor),
            "invalid_range": np.arange(cursor - 1, cursor + 4) % self.replay.size,  # what a new row spoils
        }
        folder = Path(self.args.save_replay, "replay_logs")
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            with gzip.GzipFile(folder / f"{name}_ckpt.{number}.gz", "wb", mtime=0) as file:
                np.save(file, array)

    def save_rest(self, rows):
        """Writes the rows that are in no file yet, and replay.json, for the offline scripts' scores."""
        if (self.replay.add_count[0] + 1) % self.replay.size > 1:
            self.save_rows()
        num_episodes, total = self.replay.random_play.tolist()
        rows = rows[rows[:, 1] == self.args.seed]
        evaluated = [rows[rows[:, 0] == update, 3].mean() for update in np.unique(rows[:, 0])]
        description = {
            "env_id": self.args.env_id,
            "random": total / num_episodes if num_episodes else np.nan,
            "dqn": max(evaluated, default=np.nan),
        }
        path = Path(self.args.save_replay, "replay.json")
        path.write_text(json.dumps(description, indent=2))


# Plumbing of all Atari scripts: evaluation, run folder --------------------------------------------
ATARI_ROW = "update", "seed", "episode", "return", "length", "normalized_score", "most_frequent_action"


def make_games(env_id, num_envs):
    """Environments side by side that show the last 4 frames, (num_envs, 4, 84, 84), black before an episode
    begins. Atari's as in the DQN Replay Dataset: the maximum of the last two of 4 frames, sticky actions,
    27,000 steps at most; neither no-ops nor fire at the start, and losing a life ends nothing."""
    if env_id.startswith("ALE/"):
        flags = {"noop_max": 0, "use_fire_reset": False, "reward_clipping": False, "num_threads": num_envs}
        return gym.make_vec(env_id, num_envs, "vector_entry_point", **flags)
    stack = partial(gym.wrappers.FrameStackObservation, stack_size=4, padding_type="zero")
    return gym.make_vec(env_id, num_envs, "sync", wrappers=[stack])


def start_worker():
    """An evaluation worker has one thread, and never outlives its parent."""
    torch.set_num_threads(1)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run_atari_episode(policy, env_id, references, seeds, num_updates, episode):
    """One episode of every seed, rows (S, 7). policy: any module (S, 1, 4, 84, 84) -> (S, 1), pickled."""
    policy = pickle.loads(policy)
    envs = make_games(env_id, len(seeds))
    num_actions = envs.single_action_space.n
    generators = [np.random.default_rng((seed, EVALUATION, num_updates, episode + 1)) for seed in seeds]
    env_seeds = [int(generator.integers(2**31)) for generator in generators]
    obs, _ = envs.reset(seed=np.array(env_seeds, object))  # as all kinds of environments take them
    returns = np.zeros(len(seeds))
    counts = np.zeros((len(seeds), num_actions))
    running = np.ones(len(seeds), bool)  # what comes after a seed's first episode does not count
    while running.any():
        with torch.no_grad():
            action = policy(torch.from_numpy(obs)[:, None])[:, 0].numpy()
        for s, generator in enumerate(generators):
            if generator.random() < 0.001:
                action[s] = generator.integers(num_actions)
        counts[range(len(seeds)), action] += running
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    lengths = counts.sum(1)
    low, high = references
    scores = 100 * (returns - low) / (high - low)
    shares = counts.max(1) / lengths
    columns = np.broadcast_arrays(num_updates, seeds, episode, returns, lengths, scores, shares)
    return np.stack(columns, axis=1)


def atari_summary(rows, num_seeds):
    """Mean of the last ten evaluations, +- its standard deviation over seeds, and the best evaluation."""
    if len(rows) == 0:
        return "nothing was evaluated"
    evaluations = np.unique(rows[:, 0])
    last = rows[np.isin(rows[:, 0], evaluations[-10:])]
    means = last.reshape(-1, num_seeds, len(ATARI_ROW)).mean(0)  # (S, 7)
    _, _, _, returns, _, scores, shares = means.T
    best = max(rows[rows[:, 0] == evaluation, 3].mean() for evaluation in evaluations)
    text = f"return {returns.mean():.2f}, normalised score {scores.mean():.1f}"
    if num_seeds > 1:
        text += f" (+- {returns.std():.2f} and {scores.std():.1f} over seeds)"
    return f"{text}, best return {best:.2f}, most frequent action {shares.mean():.2f}"


def atari_report(rows, jobs, run_dir, writer):
    """Rows of all evaluations, those of `jobs` being new: to screen, TensorBoard, evaluations.csv."""
    if not jobs:
        return rows
    new_rows = np.concatenate([job.result() for job in jobs])
    num_updates, _, _, *means = new_rows.mean(0)
    text = f"update {num_updates:,.0f}:"
    for name, mean in zip(ATARI_ROW[3:], means):
        text += f" {name} {mean:.2f}"
        writer.add_scalar(f"evaluation/{name}", mean, num_updates)
    tqdm.write(text)
    rows = np.concatenate([rows, new_rows])
    np.savetxt(run_dir / "evaluations.csv", rows, "%.10g", ",", header=",".join(ATARI_ROW), comments="")
    return rows


def log(metrics, num_updates, writer):
    """Metrics to TensorBoard. A loss that is not finite ends the run, before its agent is saved."""
    for name, metric in metrics.items():
        if not metric.isfinite().all():
            sys.exit(f"error: {name} is not finite at update {num_updates}; see the last checkpoint")
        writer.add_scalar(name, metric.mean().item(), num_updates)


def online_run_folder(args):
    """Where the run is, or will be."""
    name = f"{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    new = Path("runs", Path(__file__).stem, args.env_id, name)
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
    envs = make_games(args.env_id, args.num_seeds)
    if envs.single_observation_space != gym.spaces.Box(0, 255, (4, 84, 84), np.uint8):
        sys.exit(f"error: {args.env_id} has no frames (84, 84) of uint8; give another --env-id")
    num_actions = int(envs.single_action_space.n)

    # agents, as they start or as they were
    agent = Agent(num_actions, args)
    policy = GreedyPolicy(agent.network)  # what is evaluated
    run_dir = online_run_folder(args)
    rows = np.empty((0, len(ATARI_ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        args.num_steps = max(args.num_steps, first)
    num_workers = max(1, torch.get_num_threads() - 1)  # knows what a job may use, unlike cpu_count
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)

    def start_evaluation(num_steps):
        frozen = pickle.dumps(copy.deepcopy(policy).cpu().eval())
        job = frozen, args.env_id, (np.nan, np.nan), seeds, num_steps
        return [pool.submit(run_atari_episode, *job, episode) for episode in range(args.eval_episodes)]

    if args.evaluate:
        jobs = start_evaluation(2**31)  # episodes that no run has seen
        rows = np.reshape([job.result() for job in jobs], (-1, len(ATARI_ROW)))
        print(f"policies of step {first:,}: {atari_summary(rows, args.num_seeds)}")
        return

    if args.save_replay:  # made now, so that no other run takes it
        os.makedirs(args.save_replay, exist_ok=bool(args.resume))
        args.save_replay = os.path.abspath(args.save_replay)
    open_run_dir(run_dir, args)
    games = Games(envs, agent, args, first)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    print(
        f"{args.env_id} from step {first:,} on, with a new episode\n"
        f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}"
    )

    @CudaGraph
    @torch.no_grad()
    def act(frames, mixtures):  # the greedy actions (S,) by the values of the first mixture
        values = agent.network(frames[:, None]) @ mixtures  # (S, 1, A, J)
        return values.argmax(2)[:, 0, 0]

    @CudaGraph
    def learn(mixtures, frames, action, reward, not_terminated):
        obs = frames[:, :, :4]
        next_obs = frames[:, :, 1:]
        return update(agent, obs, action, reward, next_obs, not_terminated, mixtures, args)

    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    metrics = {}
    mixtures = random_mixtures(random_generators(seeds, EXPLORATION, first), args)  # of the episodes under way
    started = time.time()
    for step in tqdm(range(first, args.num_steps)):
        # act by the first of the episode's mixtures, at random with probability epsilon
        action = act(torch.from_numpy(games.obs).to(args.device), mixtures).cpu().numpy()
        generators = random_generators(seeds, DRAWS, step)
        for s, generator in enumerate(generators):
            if generator.random() < share_of_random_actions(step, args):
                action[s] = generator.integers(num_actions)
        games.step(action)
        num_steps = step + 1
        for s in np.flatnonzero(games.ended):
            writer.add_scalar(f"exploration/return_of_seed_{seeds[s]}", games.returns[s], num_steps)
            mixtures[s] = random_mixtures([generators[s]], args)
        if games.ended[0] and num_steps <= args.learning_starts:
            agent.replay.random_play += torch.tensor([1, games.returns[0]])

        # learn
        if num_steps > args.learning_starts and num_steps % args.update_every == 0:
            batch = agent.replay.draw(generators, args.batch_size)
            metrics = learn(random_mixtures(generators, args), *batch)
            if num_steps % (args.update_every * args.target_every) == 0:
                synchronize(agent)

        # report the evaluation before this one, which had time beside training; save; start it
        evaluation_due = num_steps % args.eval_every == 0 or num_steps == args.num_steps
        if evaluation_due or num_steps % args.log_every == 0:
            log(metrics, num_steps, writer)
        if evaluation_due:
            rows = atari_report(rows, jobs, run_dir, writer)
            save(run_dir / "checkpoint.pt", agent, rows, num_steps)
            jobs = start_evaluation(num_steps)

    speed = (args.num_steps - first) / (time.time() - started)
    rows = atari_report(rows, jobs, run_dir, writer)
    writer.close()
    if args.save_replay:
        games.save_rest(rows)
    result = atari_summary(rows, args.num_seeds)
    print(f"{result}; {args.num_steps:,} steps, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
