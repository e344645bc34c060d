"""TD3 and DDPG: online learners, for a task or for novelty, whose logs are offline data.

Papers: S. Fujimoto, H. van Hoof, D. Meger, "Addressing Function Approximation Error in Actor-Critic
Methods", 2018, arXiv:1802.09477 (TD3); T. P. Lillicrap et al., "Continuous Control with Deep
Reinforcement Learning", 2015, arXiv:1509.02971 (DDPG); Y. Burda et al., "Exploration by Random
Network Distillation", 2018, arXiv:1810.12894 (RND).

Idea. DDPG's actor climbs the Q of a critic that bootstraps from slow copies of both. TD3 keeps this Q
from growing too large: the smaller of two critics, a little noise on the action it is taken at, and an
actor that waits for its critics. RND rewards what is new: a network learns to predict the features
that a random network gives to observations, and its error is small where the agent has been. Logs of
such agents, joined over tasks and RND, are the MOOD data of E. Cetin et al., 2024, arXiv:2403.13097;
DDPG with much noise made the logs of R. Agarwal et al., 2020, arXiv:1907.04543.

Objectives. Shapes: S seeds, C critics, B batch, O observation, A action, P physics; pi' and Q' are the
targets, min is over C = 2 (TD3) or C = 1 (DDPG), n is standard normal.
    acting   a = clip(pi(s) + exploration_noise n, -1, 1)                                DDPG (7)
    critics  a' = clip(pi'(s') + clip(policy_noise n, -noise_clip, noise_clip), -1, 1); DDPG: pi'(s')
             L_Q = sum over C of mean (r + gamma (1 - terminated) min Q'(s', a') - Q(s, a))^2
                                                                     TD3 (10), (15); DDPG (4), (5)
    actor    L_pi = -mean Q_1(s, pi(s))                                        TD3 (1), DDPG (6)
    targets  Q' <- (1 - target_update_rate) Q' + target_update_rate Q, and pi' likewise
    rnd      e = mean over features of (g(s) - f(s))^2, L_g = mean e, r = e / std of all e so far
                                                                                 RND, section 2.2
Every --policy-delay updates of its critics TD3 moves actor and targets too (Algorithm 1).

What differs from the papers and their code, and why.
    - Defaults are those of MOOD's Table 5, with its code's --noise-clip 0.3. TD3's code has --noise-clip
      0.5 --batch-size 256 --exploration-noise 0.1 --learning-starts 25000.
    - DDPG without weight decay, batch normalisation and Ornstein-Uhlenbeck noise, as TD3's authors run it.
    - RND as M. Laskin et al., 2021, arXiv:2110.15191 have it: s, not s', normalised by its batch; reward
      anew for each batch; nothing of the task's. The log has the task's reward.
    - Every step is kept to learn from, and bootstrapping goes on through time limits.
    - The clock counts environment steps, one per seed. A resumed run goes on from its last checkpoint
      with a new episode, so that it is not bit for bit the run that never stopped.
    - dm_control's logs name no environment, because a dataset may name classes only: give --env-id.

Run:       python algorithms/td3.py --env-id Pendulum-v1 --num-steps 4000 --learning-starts 400
           --batch-size 64 --hidden-sizes 64 64 --learning-rate 2e-3 --target-update-rate 0.02
Expected:  return -127 after half a minute, with --algorithm ddpg -130; at random -1,200
MOOD:      --env-id dm_control/walker-run-v0 --num-seeds 5 --save-replay data/walker/run-v0
           and with --objective rnd --num-steps 2000000
DDPG log:  --algorithm ddpg --exploration-noise 0.5 --hidden-sizes 400 300 --batch-size 100
           --learning-rate 1e-3 --save-replay data/hopper/ddpg-v0
"""

import copy
import json
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
from functools import lru_cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from gymnasium.envs.registration import EnvSpec
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
    algorithm: Literal["td3", "ddpg"] = "td3"  # ddpg: one critic, no policy noise, no delay
    objective: Literal["task", "rnd"] = "task"  # what to maximise: the task's reward, or novelty without it
    env_id: str = "Hopper-v5"  # with bounded actions; also `module:Env-v0` and dm_control/walker-run-v0
    seed: int = 0  # first seed; agent s uses seed + s
    num_seeds: int = 1  # agents trained side by side in one batched computation, each in an environment of its own
    num_steps: int = 1_000_000  # environment steps of each seed
    learning_starts: int = 5_000  # steps with random actions; the last of them comes with the first update
    batch_size: int = 512  # transitions per update and seed
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of every network
    learning_rate: float = 3e-4  # Adam's step size for every network
    gamma: float = 0.99  # discount factor
    target_update_rate: float = 0.005  # how far targets move to the networks, whenever they do
    exploration_noise: float = 0.2  # standard deviation of what is added to actions in the environment
    policy_noise: float = 0.2  # td3: standard deviation of what is added to the targets' actions
    noise_clip: float = 0.3  # td3: the most that is added to them
    policy_delay: int = 2  # td3: updates of the critics for each of the actor and of all targets
    save_replay: str | None = None  # write the whole log, seed after seed, to this folder, as a Minari dataset
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
        if self.save_replay and not DATASET_ID.fullmatch(dataset_id(self.save_replay)):
            sys.exit(f"error: Minari cannot name {self.save_replay}; give a folder like data/hopper/log-v0")


# The idea of RND: new is what a predictor cannot guess yet -----------------------------------------
NUM_FEATURES = 512  # of an observation


def unit_orthogonal(weight, bias, generator):
    """Initial values of RND's layers, weight (in, out) and bias (1, out)."""
    nn.init.orthogonal_(weight, generator=generator)
    bias.zero_()


class RND(nn.Module):
    """A network that stays random, and one that learns to predict it where the agent has been."""

    def __init__(self, sizes, generators):
        super().__init__()
        self.target = MLP(sizes, unit_orthogonal, generators).requires_grad_(False)
        self.predictor = MLP(sizes, unit_orthogonal, generators)
        shape = len(generators), 1
        self.register_buffer("count", torch.zeros(shape))  # of batches, and mean and variance of all their errors
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))

    def error(self, obs):
        """Squared error of the predictor, (S, B), with every entry of obs (S, B, O) normalised over B."""
        obs = nn.functional.instance_norm(obs.mT).mT.clamp(-5, 5)
        return (self.predictor(obs) - self.target(obs)).square().mean(-1)

    @torch.no_grad()
    def reward(self, obs):
        """Error in units of its running standard deviation, (S, B)."""
        error = self.error(obs)
        var, mean = torch.var_mean(error, dim=1, keepdim=True)  # (S, 1) each
        self.count += 1
        share = 1 / self.count  # of this batch in all so far
        self.var.lerp_(var + (1 - share) * (mean - self.mean).square(), share)
        self.mean.lerp_(mean, share)
        return error / (self.var.sqrt() + 1e-8)


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


class Agent(nn.Module):
    """Networks and optimizers of S independent agents."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        # one generator per seed, so that its weights do not depend on its neighbours
        generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
        hidden = args.hidden_sizes
        num_critics = {"td3": 2, "ddpg": 1}[args.algorithm]
        sizes = [obs_dim + action_dim, *hidden, 1]
        self.actor = nn.Sequential(MLP([obs_dim, *hidden, action_dim], fan_in_uniform, generators), nn.Tanh())
        self.critic = MLP(sizes, fan_in_uniform, generators, C=num_critics)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        trained = {"actor": self.actor, "critic": self.critic}
        if args.objective == "rnd":
            self.rnd = RND([obs_dim, *hidden, NUM_FEATURES], generators)
            trained["rnd"] = self.rnd.predictor
        self.to(args.device)
        self.optimizers = {}
        for name, network in trained.items():
            rate = torch.tensor(args.learning_rate, device=args.device)  # changes; a CUDA graph would keep a number
            self.optimizers[name] = torch.optim.Adam(network.parameters(), rate, fused=True, capturable=rate.is_cuda)


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


class FullReplay(nn.Module):
    """Every step of every seed, the oldest first, on one device. They are part of a checkpoint."""

    def __init__(self, num_seeds, size, width, device):
        super().__init__()
        self.num_added = 0
        self.steps = torch.zeros(num_seeds, size, width, device=device)
        self.rows = self.steps.flatten(0, 1)  # the same memory
        self.offset = size * torch.arange(num_seeds, device=device)[:, None]

    def add(self, columns):
        """One step of every seed, in columns (S, width of the column)."""
        row = np.concatenate(columns, axis=1, dtype=np.float32)
        self.steps[:, self.num_added] = torch.from_numpy(row)
        self.num_added += 1

    def index(self, uniform):
        """Where in `rows` a batch is, (S, B): each seed draws uniformly from its own steps."""
        return (uniform * self.num_added).long() + self.offset

    def get_extra_state(self):
        return self.steps[:, : self.num_added].clone()  # a view would be saved with all that it is a view of

    def set_extra_state(self, steps):
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


def update(agent, obs, action, reward, next_obs, not_terminated, noise, actor_turn, args):
    """One gradient step of every agent's critics and, at the actor's turn, of its actor: obs (S, B, O), action
    (S, B, A), reward (S, B), next_obs (S, B, O), not_terminated (S, B), noise (S, B, A) standard normal.
    Returns what to log the mean of, still on the device: nothing here waits for a GPU."""
    if args.objective == "rnd":  # novelty as of now in place of the task's reward
        minimize(agent.rnd.error(obs).mean(-1).sum(), agent.optimizers["rnd"])
        reward = agent.rnd.reward(obs)

    # critics: the smaller target at a noisy action, which smooths Q, TD3 (10), (15); DDPG (4), (5) has one target
    # and no noise. Bootstrapping goes on through a time limit, but not through a true end
    shape = len(obs), agent.critic.C, -1  # (S, C, B), also where C is 1
    with torch.no_grad():
        next_action = agent.target_actor(next_obs)  # (S, B, A)
        if args.algorithm == "td3":
            clipped_noise = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
            next_action = (next_action + clipped_noise).clamp(-1, 1)
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).view(shape).amin(1)  # (S, B)
        backup = reward + args.gamma * not_terminated * next_q
    q = agent.critic(torch.cat([obs, action], -1)).view(shape)
    critic_loss = (q - backup[:, None]).square().mean(-1).sum(1)  # (S,)
    minimize(critic_loss.sum(), agent.optimizers["critic"])  # sum over S: seeds never mix
    metrics = {"loss/critic": critic_loss.detach(), "value/q": q.detach(), "value/reward": reward}
    if not actor_turn:
        return metrics

    # actor: climb Q_1, by the new critics, TD3 (1), DDPG (6)
    policy_q = agent.critic(torch.cat([obs, agent.actor(obs)], -1)).view(shape)
    actor_loss = -policy_q[:, 0].mean(-1)  # (S,)
    minimize(actor_loss.sum(), agent.optimizers["actor"])

    with torch.no_grad():  # targets
        targets = [*agent.target_critic.parameters(), *agent.target_actor.parameters()]
        for target, online in zip(targets, [*agent.critic.parameters(), *agent.actor.parameters()]):
            target.lerp_(online, args.target_update_rate)

    return metrics | {"loss/actor": actor_loss.detach()}


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


def dm_control_spec(env_id):
    """Spec of a task like dm_control/walker-run-v0 that can be sent to workers, unlike what shimmy registers;
    ids of other environments stay as they are."""
    if not env_id.startswith("dm_control/"):
        return env_id
    if not (find_spec("shimmy") and find_spec("dm_control")):
        sys.exit(f"error: {env_id} needs two packages: pip install dm-control==1.0.44 shimmy==2.0.1")
    return EnvSpec(env_id, partial(gym.make, f"shimmy:{env_id}"))


def physics_states(envs):
    """Positions, velocities and activations of dm_control's physics, (S, P); P is 0 in other environments."""
    physics = [getattr(env.unwrapped, "physics", None) for env in envs]
    return np.array([x.get_state() if x else [] for x in physics])


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


def save_log(folder, replay, widths, spec):
    """Writes the steps of all seeds to a new folder, with actions in the environment's own units. A dm_control
    task's episodes have infos: `physics` and `control`, as they were at each of the T + 1 observations."""
    spec.kwargs.pop("render_mode", None)
    space = gym.make(spec).action_space
    buffers = []
    for rows in replay.steps[:, : replay.num_added].cpu():
        columns = [column.numpy() for column in rows.split(widths, dim=-1)]
        obs, action, reward, next_obs, not_terminated, began, state, next_state = columns
        action = action.reshape(-1, *space.shape)
        action = np.float32(space.low + (action + 1) / 2 * (space.high - space.low))
        starts = np.flatnonzero(began)
        ends = [*starts[1:], len(rows)]
        for start, end in zip(starts, ends):
            steps = slice(start, end)
            last = slice(end - 1, end)
            terminated = not_terminated[steps, 0] == 0
            truncated = ~terminated  # at the last step, also where the log ends
            truncated[:-1] = False
            infos = {}
            if state.size:
                infos["physics"] = np.concatenate([state[steps], next_state[last]])
                infos["control"] = np.concatenate([0 * action[last], action[steps]])
            episode = minari.data_collector.EpisodeBuffer(
                id=len(buffers),
                observations=np.concatenate([obs[steps], next_obs[last]]),
                actions=action[steps],
                rewards=reward[steps, 0],
                terminations=terminated,
                truncations=truncated,
                infos=infos,
            )
            buffers.append(episode)
    if callable(spec.entry_point):  # datasets may not name functions: who learns from it gives --env-id
        spec = None
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        minari.create_dataset_from_buffers(
            dataset_id(folder),
            buffers,
            env=spec,
            eval_env=spec,
            observation_space=gym.spaces.Box(-np.inf, np.inf, obs.shape[1:]),
            action_space=space,
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
    spec, references = find_environment(dm_control_spec(args.env_id))
    envs = Environments(spec, seeds)
    obs_dim = gym.spaces.flatdim(envs.envs[0].observation_space)
    action_dim = gym.spaces.flatdim(envs.envs[0].action_space)

    # one row a step, so that a batch is one gather; `interact` and `learn` know the columns, and `save_log`
    state_dim = physics_states(envs.envs).shape[1]
    widths = [obs_dim, action_dim, 1, obs_dim, 1, 1, state_dim, state_dim]

    # agents, as they start or as they were
    agent = Agent(obs_dim, action_dim, args)
    agent.replay = FullReplay(args.num_seeds, args.num_steps, sum(widths), args.device)
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

    if args.save_replay and Path(args.save_replay).exists():
        sys.exit(f"error: {args.save_replay} is there already; give another folder to write to")
    open_run_dir(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=first + 1)
    print(f"{spec.id} from step {first:,} on, with a new episode")
    print(f"run folder {run_dir}; after a stop: python {sys.argv[0]} --resume {run_dir}")

    @CudaGraph
    @torch.no_grad()
    def act(obs, noise):
        action = agent.actor(obs[:, None]).squeeze(1)
        return (action + args.exploration_noise * noise).clamp(-1, 1)  # DDPG (7)

    def interact(step):  # one step of every seed's environment: at random first, then by its policy
        obs = envs.observe(step)
        state = physics_states(envs.envs)
        uniform, noise = draw(seeds, EXPLORATION, step, action_dim, (action_dim,), args.device)
        if step < args.learning_starts:
            action = 2 * uniform.float() - 1
        else:
            action = act(torch.from_numpy(obs).to(args.device), noise)
        action = action.cpu().numpy()
        reward, next_obs, terminated = envs.step(action)
        columns = [obs, action, reward[:, None], next_obs, 1.0 - terminated[:, None], envs.began[:, None]]
        agent.replay.add([*columns, state, physics_states(envs.envs)])

    def learn(actor_turn, index, noise):  # one update on the rows at index (S, B)
        batch = nn.functional.embedding(index, agent.replay.rows)  # a gather, faster than indexing
        obs, action, reward, next_obs, not_terminated, *_ = batch.split(widths, dim=-1)
        columns = obs, action, reward.squeeze(-1), next_obs, not_terminated.squeeze(-1)
        return update(agent, *columns, noise, actor_turn, args)

    learners = [CudaGraph(partial(learn, actor_turn)) for actor_turn in (False, True)]
    noise_shape = args.batch_size, action_dim  # for the actions at s'
    jobs = []
    if first:
        jobs = start_evaluation(first)  # the one that was under way
    metrics = {}
    started = time.time()
    for step in tqdm(range(first, args.num_steps), mininterval=1):
        interact(step)
        num_steps = step + 1
        for s in np.flatnonzero(envs.ended):
            writer.add_scalar(f"exploration/return_of_seed_{seeds[s]}", envs.returns[s], num_steps)
        if num_steps >= args.learning_starts:
            uniform, noise = draw(seeds, DRAWS, step, args.batch_size, noise_shape, args.device)
            actor_turn = args.algorithm == "ddpg" or num_steps % args.policy_delay == 0
            metrics |= learners[actor_turn](agent.replay.index(uniform), noise)

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
        save_log(args.save_replay, agent.replay, widths, spec)
    result = summary(rows, args.num_seeds)
    print(f"{result}; {args.num_steps:,} steps, {speed:.0f}/s per seed; run folder {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # also Ctrl-C; without this, it would wait for the evaluations that are queued
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
