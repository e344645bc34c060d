"""SAC: soft actor-critic, the online learner whose logs are this project's datasets.

Paper: T. Haarnoja, A. Zhou, K. Hartikainen et al., "Soft Actor-Critic Algorithms and Applications",
2018, arXiv:1812.05905.

Idea. The agent maximises reward and the entropy of its own policy, so that it explores by itself, and
it learns from all that it has seen. Two critics learn the soft Q by bootstrapping; the smaller of
them keeps over-estimation down. The policy moves towards exp(Q / alpha), and the temperature alpha is
tuned so that the policy's entropy stays at a target. In this project SAC is the baseline without
offline data, and its log, from the first random step to the last, has the long tail of returns that
ReD rebalances.

Objectives. Shapes: S seeds, C critics, B batch, O observation, A action. min Q is the smaller of the
two critics; a' and a~ are fresh actions tanh(mean + std * noise) of the policy at s' and at s.
    critic       y = r + gamma (1 - terminated) (min Q_target(s', a') - alpha log pi(a'|s'))  (3), (5)
                 L_Q = sum over C of mean (Q(s, a) - y)^2                                     (5), (6)
    actor        L_pi = mean (alpha log pi(a~|s) - min Q(s, a~))                              (7), (9)
    temperature  L_alpha = -mean log alpha (log pi(a~|s) + target entropy), the target is -A  (18)
    targets      Q_target <- (1 - target_update_rate) Q_target + target_update_rate Q

What differs from the paper and its code, and why.
    - L_Q has no factor 1/2, which Adam does not notice, and L_alpha has log alpha in place of alpha,
      as all current implementations have: same sign, steadier.
    - 5,000 random steps before the first update (the authors' code: 1,000 to 10,000 by environment).
    - Bootstrapping goes on through time limits (truncation) and ends at true ends (termination).
    - The clock counts environment steps, one per seed; so does the column `update` of evaluations.csv.
      From --learning-starts on, each step pays for one update.
    - A resumed run goes on from its last checkpoint with a new episode, so that it is not bit for bit
      the run that never stopped.

Run:       python algorithms/sac.py --env-id Hopper-v5 --num-steps 500000
A dataset: python algorithms/sac.py --env-id Hopper-v5 --num-steps 500000 --save-replay data/hopper/log-v0
Expected:  the best episode of a log of 500,000 steps with --batch-size 128 --seed 1 scores 102
"""

import copy
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHUNK_STEPS = 20  # steps whose random numbers are drawn together
# Random numbers are a function of (seed, purpose, update, ...), so that no generator's state has to be saved.
# Purposes start at 1, because numpy takes (s, u, 0) for (s, u)
DRAWS = 1
EVALUATION = 2
EXPLORATION = 3


@dataclass
class Args:
    env_id: str = "Hopper-v5"  # a Gymnasium environment with bounded actions, also `module:Env-v0`
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation, each in an environment of its own
    num_steps: int = 1_000_000  # environment steps of each seed
    learning_starts: int = 5_000  # steps with random actions; the last of them comes with the first update
    batch_size: int = 256  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of every network
    learning_rate: float = 3e-4  # Adam's step size for critics, actor and temperature
    gamma: float = 0.99  # discount factor
    target_update_rate: float = 0.005  # how far targets move to the critics at every update
    replay_size: int = 1_000_000  # steps of each seed that are kept to learn from, the newest ones
    save_replay: str | None = None  # write the first seed's log to this folder, as a Minari dataset
    replay_transitions: int | None = None  # thin that log by whole episodes to about so many transitions
    save_rollouts: str | None = None  # write episodes of the first seed's last policy, with its noise, to this folder
    num_rollout_steps: int = 100_000  # transitions of --save-rollouts, up to the end of an episode
    eval_every: int = 5_000  # steps between evaluations, each of which comes with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and seed, with the deterministic action; 0: never evaluate
    log_every: int = 1_000  # steps between entries in TensorBoard
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where training runs
    run_dir: str | None = None  # where the results go; default: runs/SCRIPT/ENVIRONMENT/SEED-TIME-PROCESS
    resume: str | None = None  # continue the run in this folder from its last checkpoint, with a new episode
    evaluate: str | None = None  # evaluate the policies of the run in this folder, train nothing
    capture_video: bool = False  # film the evaluations (on a machine without screen: MUJOCO_GL=egl)

    def __post_init__(self):
        self.hidden_sizes = tuple(self.hidden_sizes)  # JSON makes a list of it
        if not (0 <= self.gamma <= 1 and 0 <= self.target_update_rate <= 1):
            sys.exit("error: gamma and target_update_rate are rates; give numbers in [0, 1]")
        if self.save_replay and self.replay_size < self.num_steps:
            sys.exit("error: --save-replay writes all steps; give a --replay-size that holds them")
        for folder in (self.save_replay, self.save_rollouts):
            if folder and not DATASET_ID.fullmatch(dataset_id(folder)):
                sys.exit(f"error: Minari cannot name {folder}; give a folder like data/hopper/log-v0")


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


class TanhGaussianActor(nn.Module):
    """pi(a|s): a = tanh(mean(s) + std(s) * noise). The deterministic action is tanh(mean(s))."""

    def __init__(self, obs_dim, action_dim, hidden_sizes, generators):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes, 2 * action_dim]
        self.net = MLP(sizes, fan_in_uniform, generators)

    def forward(self, obs):
        mean, _ = self.net(obs).chunk(2, dim=-1)
        return mean.tanh()  # (S, B, A)

    def sample(self, obs, noise):
        """Action (S, B, A) and its log-probability (S, B), from standard normal noise (S, B, A)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)  # bounds of the authors' code
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of x
        # tanh squeezes volumes by 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2, (21), without overflow
        log_prob = log_prob - 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        return x.tanh(), log_prob.sum(-1)


class Agent(nn.Module):
    """Networks, temperatures and optimizers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        hidden = args.hidden_sizes
        self.actor = TanhGaussianActor(obs_dim, action_dim, hidden, generators)
        self.critic = MLP([obs_dim + action_dim, *hidden, 1], fan_in_uniform, generators, C=2)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(args.num_seeds))
        self.target_entropy = -action_dim
        self.to(args.device)
        self.optimizers = {}
        policy = [*self.actor.parameters(), self.log_alpha]
        for name, parameters in ("critic", self.critic.parameters()), ("policy", policy):
            rate = torch.tensor(args.learning_rate, device=args.device)  # changes; a CUDA graph would keep a number
            self.optimizers[name] = torch.optim.Adam(parameters, rate, fused=True, capturable=rate.is_cuda)


# Random numbers and replay ------------------------------------------------------------------------
@lru_cache(maxsize=2)  # the draws of two purposes
def draw_chunk(seeds, purpose, chunk, num_uniform, noise_shape, device):
    """What `draw` returns, for CHUNK_STEPS steps, (CHUNK_STEPS, S, ...). Each seed has generators of its own."""
    generators = [np.random.default_rng((seed, purpose, chunk)) for seed in seeds]
    uniform = [x.random((CHUNK_STEPS, num_uniform)) for x in generators]
    normal = [x.standard_normal((CHUNK_STEPS, *noise_shape), np.float32) for x in generators]
    return [torch.from_numpy(np.stack(x, axis=1)).to(device) for x in (uniform, normal)]


def draw(seeds, purpose, step, num_uniform, noise_shape, device):
    """Random numbers for one step: uniform ones in [0, 1), (S, num_uniform), and normal ones, (S, *noise_shape)."""
    chunk = draw_chunk(seeds, purpose, step // CHUNK_STEPS, num_uniform, noise_shape, device)
    return [x[step % CHUNK_STEPS] for x in chunk]


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


def update(agent, obs, action, reward, next_obs, not_terminated, next_noise, noise, args):
    """One gradient step of every agent on obs (S, B, O), action (S, B, A), reward (S, B), next_obs (S, B, O) and
    not_terminated (S, B), never (S, B, 1), which would broadcast, with standard normal next_noise and noise
    (S, B, A). Returns what to log the mean of, still on the device: nothing here waits for a GPU."""
    alpha = agent.log_alpha.detach().exp()[:, None]  # (S, 1)

    # critics: bootstrapping goes on through a time limit, but not through a true end, (3), (5), (6)
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(next_obs, next_noise)
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).squeeze(-1).amin(1)
        next_value = next_q - alpha * next_log_prob  # (S, B)
        backup = reward + args.gamma * not_terminated * next_value
    q = agent.critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    minimize(critic_loss.sum(), agent.optimizers["critic"])  # sum over S: seeds never mix

    # actor: towards exp(Q / alpha), by the new critics, (7), (9)
    policy_action, log_prob = agent.actor.sample(obs, noise)
    policy_q = agent.critic(torch.cat([obs, policy_action], -1)).squeeze(-1).amin(1)  # (S, B)
    actor_loss = (alpha * log_prob - policy_q).mean(-1)  # (S,)

    # temperature: it grows while the entropy, which is -log_prob on average, is below its target, (18)
    entropy = -log_prob.detach().mean(-1)  # (S,)
    alpha_loss = agent.log_alpha * (entropy - agent.target_entropy)  # (S,)
    policy_loss = actor_loss + alpha_loss  # neither has the other's parameters in it: one step serves both
    minimize(policy_loss.sum(), agent.optimizers["policy"])

    with torch.no_grad():  # targets
        targets = agent.target_critic.parameters()
        for target, online in zip(targets, agent.critic.parameters()):
            target.lerp_(online, args.target_update_rate)

    return {
        "loss/critic": critic_loss.detach(),
        "loss/actor": actor_loss.detach(),
        "value/q": q.detach(),
        "policy/entropy": entropy,
        "policy/alpha": alpha,
    }


# Plumbing of the online scripts: environments ----------------------------------------------------
# D4RL's returns of a random and of an expert policy (Fu et al., 2020)
REFERENCES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}


def find_environment(env_id):
    """Spec of the environment, its observations flat, and the returns that score 0 and 100."""
    env = gym.wrappers.FlattenObservation(gym.make(env_id))
    spec = env.spec  # a copy
    spec.max_episode_steps = spec.max_episode_steps or 10_000  # or an episode may never end
    return spec, REFERENCES.get(spec.id.split("-")[0], (np.nan, np.nan))


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


# Plumbing of the online scripts: logs as Minari datasets ------------------------------------------
DATASET_ID = re.compile(r"([-\w]{2,}/)?[-\w]+-v\d+")


def dataset_id(folder):
    """The last parts of a folder's path, as Minari names what is in it."""
    return "/".join(Path(folder).parts[-2:])


def save_minari(folder, replay, widths, spec, references, num_transitions=None):
    """Writes the first seed's steps to a new folder, with actions in the environment's own units.
    num_transitions: about so many, as whole episodes at even distances."""
    rows = replay.steps[0, : replay.num_added].cpu()
    columns = [column.numpy() for column in rows.split(widths, dim=-1)]
    obs, action, reward, next_obs, not_terminated, began = columns
    spec.kwargs.pop("render_mode", None)
    space = gym.make(spec).action_space
    action = action.reshape(-1, *space.shape)
    action = space.low + (action + 1) / 2 * (space.high - space.low)
    starts = np.flatnonzero(began)
    ends = [*starts[1:], len(rows)]
    share = min(1, (num_transitions or len(rows)) / len(rows))
    buffers = []
    for i, (start, end) in enumerate(zip(starts, ends)):
        if int((i + 1) * share) == int(i * share):
            continue
        steps = slice(start, end)
        terminated = not_terminated[steps, 0] == 0
        truncated = np.arange(start, end) == end - 1  # also where the log ends
        episode = minari.data_collector.EpisodeBuffer(
            id=len(buffers),
            observations=np.concatenate([obs[steps], next_obs[end - 1 : end]]),
            actions=np.float32(action[steps]),
            rewards=reward[steps, 0],
            terminations=terminated,
            truncations=truncated & ~terminated,
        )
        buffers.append(episode)
    if np.isnan(references).any():
        references = None, None
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        minari.create_dataset_from_buffers(
            dataset_id(folder),
            buffers,
            env=spec,
            eval_env=spec,
            observation_space=gym.spaces.Box(-np.inf, np.inf, obs.shape[1:]),
            action_space=space,
            ref_min_score=references[0],
            ref_max_score=references[1],
            algorithm_name=Path(__file__).stem,
            author="unknown",
            author_email="unknown",
            code_permalink="unknown",
            description=" ".join(sys.argv),
        )
        shutil.move(Path(root, dataset_id(folder)), folder)
    returns = [episode.rewards.sum() for episode in buffers]
    print(f"{folder}: {len(returns):,} episodes, mean return {np.mean(returns):.1f}")


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
    spec, references = find_environment(args.env_id)
    envs = Environments(spec, seeds)
    obs_dim = gym.spaces.flatdim(envs.envs[0].observation_space)
    action_dim = gym.spaces.flatdim(envs.envs[0].action_space)

    # one row a step, so that a batch is one gather; `interact` and `learn` know the columns, and `save_minari`
    widths = [obs_dim, action_dim, 1, obs_dim, 1, 1]
    no_data = torch.empty(0, sum(widths), device=args.device)

    # agents, as they start or as they were
    agent = Agent(obs_dim, action_dim, args)
    agent.replay = Replay(no_data, args.num_seeds, min(args.replay_size, args.num_steps))
    policy = agent.actor  # what is evaluated
    run_dir = online_run_folder(args)
    rows = np.empty((0, len(ROW)))
    first = 0
    if args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()):
        rows, first = load(run_dir / "checkpoint.pt", agent)
        args.num_steps = max(args.num_steps, first)
    num_workers = max(1, torch.get_num_threads() - 1)  # knows what a job may use, unlike cpu_count
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)
    if args.capture_video:
        spec.kwargs["render_mode"] = "rgb_array"

    def start_evaluation(num_steps):
        frozen = pickle.dumps(copy.deepcopy(policy).cpu().eval())
        job = frozen, spec, references, run_dir, seeds, num_steps
        return [pool.submit(run_episode, *job, episode) for episode in range(args.eval_episodes)]

    if args.evaluate:
        jobs = start_evaluation(2**31)  # episodes that no run has seen
        rows = np.reshape([job.result() for job in jobs], (-1, len(ROW)))
        print(f"policies of step {first:,}: {summary(rows, args.num_seeds)}")
        return

    for folder in (args.save_replay, args.save_rollouts):
        if folder and Path(folder).exists():
            sys.exit(f"error: {folder} is there already; give another folder to write to")
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    print(f"{spec.id} from step {first:,} on, with a new episode")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    @CudaGraph
    @torch.no_grad()
    def act(obs, noise):
        return agent.actor.sample(obs[:, None], noise)[0].squeeze(1)

    def interact(step, replay):  # one step of every seed's environment: at random first, then by its policy
        obs = envs.observe(step)
        uniform, noise = draw(seeds, EXPLORATION, step, action_dim, (1, action_dim), args.device)
        if step < args.learning_starts:
            action = 2 * uniform.float() - 1
        else:
            action = act(torch.from_numpy(obs).to(args.device), noise)
        action = action.cpu().numpy()
        reward, next_obs, terminated = envs.step(action)
        columns = obs, action, reward[:, None], next_obs, 1.0 - terminated[:, None], envs.began[:, None]
        replay.add(columns)

    @CudaGraph
    def learn(index, next_noise, noise):  # one update on the rows at index (S, B)
        batch = nn.functional.embedding(index, agent.replay.rows)  # a gather, faster than indexing
        obs, action, reward, next_obs, not_terminated, _ = batch.split(widths, dim=-1)
        columns = obs, action, reward.squeeze(-1), next_obs, not_terminated.squeeze(-1)
        return update(agent, *columns, next_noise, noise, args)

    noise_shape = 2, args.batch_size, action_dim  # for the actions at s' and at s
    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    metrics = {}
    started = time.time()
    for step in tqdm(range(first, args.num_steps), mininterval=1):
        interact(step, agent.replay)
        num_steps = step + 1
        for s in np.flatnonzero(envs.ended):
            writer.add_scalar(f"exploration/return_of_seed_{seeds[s]}", envs.returns[s], num_steps)
        if num_steps >= args.learning_starts:
            uniform, noise = draw(seeds, DRAWS, step, args.batch_size, noise_shape, args.device)
            metrics = learn(agent.replay.index(uniform), *noise.unbind(1))

        # report the evaluation before this one, which had time beside training; save; start it
        evaluation_due = num_steps % args.eval_every == 0 or num_steps == args.num_steps
        if evaluation_due or num_steps % args.log_every == 0:
            log(metrics, num_steps, writer)
        if evaluation_due:
            rows = report(rows, jobs, run_dir, writer)
            save(run_dir / "checkpoint.pt", agent, rows, num_steps)
            jobs = start_evaluation(num_steps)

    speed = (args.num_steps - first) / (time.time() - started)
    rows = report(rows, jobs, run_dir, writer)
    writer.close()
    if args.save_replay:
        save_minari(args.save_replay, agent.replay, widths, spec, references, args.replay_transitions)
    if args.save_rollouts:
        rollouts = Replay(no_data, args.num_seeds, args.num_rollout_steps + spec.max_episode_steps)
        envs.ended[:] = True
        while rollouts.num_added < args.num_rollout_steps or not envs.ended[0]:
            interact(args.num_steps + rollouts.num_added, rollouts)
        save_minari(args.save_rollouts, rollouts, widths, spec, references)
    result = summary(rows, args.num_seeds)
    print(f"{result}; {args.num_steps:,} steps, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
