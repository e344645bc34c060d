"""Soft actor-critic (SAC), online: the learner whose logs are this project's datasets.

Paper: T. Haarnoja, A. Zhou, K. Hartikainen et al., "Soft Actor-Critic Algorithms and Applications", 2018,
arXiv:1812.05905 (equation numbers below are that paper's).

Idea. An agent that maximises reward *and* the entropy of its own policy explores by itself and learns from every
transition it has ever seen. Two critics learn the soft Q-function by bootstrapping, and their minimum keeps
over-estimation down; the policy moves towards exp(Q / alpha); the temperature alpha is tuned so that the entropy stays
near a target. In this project SAC is the online baseline of BRED, and it makes the embedded datasets: its whole
training log, from the first random step to the last, has the long tail of returns that the ReD paper rebalances.

Objectives (S seeds, C critics, B batch, O observation, A action; `min` runs over the critics):
    critic       y = r + gamma (1 - terminated) [min Q_target(s', a') - alpha log pi(a'|s')],  a' ~ pi(.|s')    (5), (6)
                 L_Q = sum over C of mean (Q(s, a) - y)^2
    policy       L_pi = mean [alpha log pi(a~|s) - min Q(s, a~)],  a~ = tanh(mean + std * noise)                (7), (9)
    temperature  L_alpha = -mean log_alpha [log pi(a~|s) + target_entropy],  target_entropy = -A                (17), (18)
    targets      Q_target <- (1 - polyak) Q_target + polyak Q

What differs from the paper and its code, and why.
    - The temperature loss uses log_alpha in place of alpha, as all current implementations do: same sign, steadier.
    - 5,000 random steps before learning starts (the authors' code: 1,000 to 10,000, depending on the environment).
    - The replay buffer holds the whole run, since the log is what we are after; the paper keeps the last million.
    - Actions live in [-1, 1]; environments with other bounds are rescaled by gymnasium's own wrapper.
    - `--num-seeds 4` trains four agents at once, each with environments, replay and random numbers of its own.

Run:       python algorithms/sac.py --env-id Hopper-v5 --num-steps 500000
A dataset: python algorithms/sac.py --env-id Hopper-v5 --num-steps 500000 --save-replay my_data/replay-v0
Expected:  benchmarks.md has the curves of the runs that made tests/data.
"""

import copy
import csv
import io
import json
import math
import multiprocessing
import os
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
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
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
    """episodes per evaluation and seed, with the policy's deterministic action"""
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
        self.lead, self.dropout = lead, dropout
        self.weights = nn.ParameterList(torch.zeros(*lead, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(*lead, 1, o) for o in sizes[1:])
        with torch.no_grad():
            for seed, generator in enumerate(generators):
                for weight, bias in zip(self.weights, self.biases):
                    for w, b in zip(weight[seed].view(-1, *weight.shape[-2:]), bias[seed].view(-1, bias.shape[-1])):
                        init(w, b, generator)

    def forward(self, x):
        """x (S, B, in) -> (*lead, B, out)."""
        x = x.view(x.shape[0], *[1] * (len(self.lead) - 1), *x.shape[1:])  # every critic sees the same input
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.relu(torch.matmul(x, weight) + bias, inplace=True)
            if self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return torch.matmul(x, self.weights[-1]) + self.biases[-1]


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
        adam = dict(lr=args.learning_rate, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), **adam),
            "critic": torch.optim.Adam(self.critic.parameters(), **adam),
            "alpha": torch.optim.Adam([self.log_alpha], **adam),
        }


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
        target_q = reward + args.gamma * not_terminated * (next_q - alpha * next_log_prob)
    q = agent.critic(torch.cat([obs, action], -1)).squeeze(-1)  # (S, C, B)
    critic_loss = (q - target_q[:, None]).square().mean(-1).sum()  # sum over S: seeds never mix
    agent.optimizers["critic"].zero_grad()
    critic_loss.backward()
    agent.optimizers["critic"].step()

    # policy, eqs. (7), (9); `inputs` keeps this gradient out of the critics
    policy_action, log_prob = agent.actor.sample(obs, noise[1])
    policy_q = agent.critic(torch.cat([obs, policy_action], -1)).squeeze(-1).amin(1)  # (S, B)
    actor_loss = (alpha * log_prob - policy_q).mean(-1).sum()
    agent.optimizers["actor"].zero_grad()
    actor_loss.backward(inputs=list(agent.actor.parameters()))
    agent.optimizers["actor"].step()

    # temperature, eq. (18): alpha grows while the entropy -log_prob is below its target
    entropy_gap = log_prob.detach().mean(-1) + agent.target_entropy  # (S,)
    agent.optimizers["alpha"].zero_grad()
    (-agent.log_alpha * entropy_gap).sum().backward()
    agent.optimizers["alpha"].step()

    # targets
    with torch.no_grad():
        for target, online in zip(agent.target_critic.parameters(), agent.critic.parameters()):
            target.lerp_(online, args.polyak)

    return {
        "loss/critic": (q.detach() - target_q[:, None]).square().mean(-1).sum(1),
        "value/q": q.detach().mean((1, 2)),
        "policy/entropy": -log_prob.detach().mean(-1),
        "policy/alpha": alpha.squeeze(-1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, the same text in every script: errors, environments, evaluation, checkpoints, logging
# ---------------------------------------------------------------------------------------------------------------------

# D4RL's returns of a random and of an expert policy, the 0 and the 100 of a normalised score (Fu et al., 2020)
D4RL_REFERENCES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "AntMaze": (0.0, 1.0),
    "FrankaKitchen": (0.0, 4.0),
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
}

# environments that live outside gymnasium: what their ids begin with, and the package that registers them
ENV_PACKAGES = {
    ("PointMaze", "AntMaze", "AdroitHand", "FrankaKitchen", "Fetch", "Hand"): "gymnasium_robotics",
    ("dm_control/",): "shimmy",
    ("ALE/",): "ale_py",
}


def fail(problem, remedy):
    """Ends the program with exit status 2 and one line: what is wrong; what to do."""
    print(f"error: {problem}; {remedy}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id, env_kwargs=None, **make_kwargs):
    """gym.make by registered id, with flat observations and with actions in [-1, 1]."""
    package = next((p for prefixes, p in ENV_PACKAGES.items() if env_id.startswith(prefixes)), None)
    try:
        if package:
            gym.register_envs(__import__(package))
        env = gym.make(env_id, **(env_kwargs or {}), **make_kwargs)
    except ImportError as e:
        fail(f"environment {env_id} needs a package that is not installed ({e})", f"pip install {package or 'it'}")
    except (gym.error.Error, TypeError) as e:
        fail(f"environment {env_id} cannot be made ({e})", "check --env-id against gymnasium.pprint_registry()")
    if not isinstance(env.action_space, gym.spaces.Box):
        fail(f"environment {env_id} has {type(env.action_space).__name__} actions", "use one with continuous actions")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if not (np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)):
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def run_episodes(policy, env_id, env_kwargs, env_seeds, video_dir=None):
    """(return, length) of one episode per environment seed; policy.act maps (1, E, O) to (1, E, A) in [-1, 1].

    The episodes step side by side, and the batch keeps its size when some are over, so that nobody's rounding
    depends on when the others end.
    """
    render = [{"render_mode": "rgb_array"} if video_dir and i == 0 else {} for i in range(len(env_seeds))]
    envs = [make_env(env_id, env_kwargs, **kwargs) for kwargs in render]
    if video_dir:
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(video_dir), name_prefix=f"seed-{env_seeds[0]}")
    obs = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, env_seeds)]).astype(np.float32)
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
    """An evaluation worker computes on one thread, leaves Ctrl-C to its parent, and never outlives it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def evaluate_pickled(policy, *episode_args):
    """run_episodes in a worker, for a policy that came as bytes."""
    return run_episodes(torch.load(io.BytesIO(policy), weights_only=False), *episode_args)


def policy_of_seed(actor, s):
    """A copy on the CPU of the s-th of the policies that `actor` holds; its tensors keep a seed axis of length 1."""
    policy = copy.deepcopy(actor).cpu().eval()
    for tensor in [*policy.parameters(), *policy.buffers()]:
        tensor.data = tensor.data[s : s + 1].clone()
    return policy


def normalized_score(episode_return, references):
    """100 (return - random) / (expert - random); nan without references."""
    return 100 * (episode_return - references[0]) / (references[1] - references[0]) if references else math.nan


class Evaluator:
    """Evaluates snapshots of the policies in worker processes, beside training, in the order they were taken.

    The environment seeds depend on agent, update and episode alone, so neither the number of workers nor a stop
    and resume changes a result. Rows go to evaluations.csv as soon as a whole evaluation is there.
    """

    def __init__(self, args, env_id, env_kwargs, references, run_dir):
        self.args, self.env_id, self.env_kwargs, self.references = args, env_id, env_kwargs, references
        self.csv_path, self.pending, self.pool = run_dir / "evaluations.csv", [], None
        workers = args.eval_workers
        if workers is None:
            workers = max(1, min(args.num_seeds, (os.cpu_count() or 1) - 1))
        if workers:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
        if not self.csv_path.exists():
            self.csv_path.write_text("update,seed,episode,return,length,normalized_score\n")

    def submit(self, update, actor):
        """Starts the evaluation of every seed's policy as it is now."""
        snapshot = {name: tensor.cpu().clone() for name, tensor in actor.state_dict().items()}
        jobs = []
        for s in range(self.args.num_seeds):
            policy, seed = policy_of_seed(actor, s), self.args.seed + s
            env_seeds = [
                np.random.SeedSequence([seed, update, episode]).generate_state(1)[0]
                for episode in range(self.args.eval_episodes)
            ]
            if self.pool:
                torch.save(policy, pickled := io.BytesIO())
                job = self.pool.submit(
                    evaluate_pickled, pickled.getvalue(), self.env_id, self.env_kwargs, env_seeds
                )
            else:
                job = Future()
                job.set_result(run_episodes(policy, self.env_id, self.env_kwargs, env_seeds))
            jobs.append(job)
        self.pending.append((update, snapshot, jobs))

    def collect(self, wait=False):
        """Writes the evaluations that are done (all, if `wait`) and returns [(update, returns (S, E)), ...]."""
        finished = []
        while self.pending and (wait or all(job.done() for job in self.pending[0][2])):
            update, _, jobs = self.pending.pop(0)
            episodes = [job.result() for job in jobs]
            with self.csv_path.open("a", newline="") as file:
                for s, results in enumerate(episodes):
                    for episode, (episode_return, length) in enumerate(results):
                        score = normalized_score(episode_return, self.references)
                        row = [update, self.args.seed + s, episode, f"{episode_return:.6f}", length, f"{score:.4f}"]
                        csv.writer(file, lineterminator="\n").writerow(row)
            finished.append((update, np.array([[r for r, _ in results] for results in episodes])))
        return finished

    def resume(self, update, pending, actor):
        """Back to the state of a checkpoint: forgets what came after it, starts again what was under way."""
        header, *rows = self.csv_path.read_text().splitlines(keepends=True)
        keep = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= update]
        keep = [row for row in keep if int(row.split(",")[0]) not in pending]
        self.csv_path.write_text(header + "".join(keep))
        snapshot_actor = copy.deepcopy(actor)
        for pending_update, snapshot in sorted(pending.items()):
            snapshot_actor.load_state_dict(snapshot)
            self.submit(pending_update, snapshot_actor)

    def close(self):
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


def final_scores(csv_path, num_evaluations=10):
    """Per seed, the mean return and the mean normalised score over the last evaluations: two arrays (S,)."""
    with Path(csv_path).open() as file:
        rows = [(int(r["update"]), int(r["seed"]), float(r["return"]), float(r["normalized_score"])) for r in csv.DictReader(file)]
    last = set(sorted({row[0] for row in rows})[-num_evaluations:])
    rows = np.array([row[1:] for row in rows if row[0] in last]).reshape(-1, 3)
    seeds = np.unique(rows[:, 0])
    return tuple(np.array([rows[rows[:, 0] == seed, column].mean() for seed in seeds]) for column in (1, 2))


def choose_device(name):
    """torch.device for --device: auto, cpu, cuda, cuda:1, ..."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"device {name} is not there ({str(e).splitlines()[0]})", "use --device cpu or --device auto")
    return device


def parse_args(script):
    """Flags of the command line. With --resume or --evaluate the run's own flags are the defaults, and only those
    that do not change what is computed (and the length of the run) may differ from them."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    run_dir = args.resume or args.evaluate
    if not run_dir:
        return args
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        stored = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["args"].items()})
    except FileNotFoundError:
        fail(f"{run_dir} holds no run (no config.json)", "give the folder that the run's last line names")
    except (json.JSONDecodeError, KeyError, TypeError):
        config, stored = {"script": config.get("script") if "config" in locals() else None}, None
    if config["script"] != script or stored is None:
        fail(f"{run_dir} is a run of {config['script']}", f"continue it with algorithms/{config['script']}.py")
    stored.resume, stored.evaluate, stored.run_dir = args.resume, args.evaluate, run_dir
    args = tyro.cli(Args, default=stored)
    return args


def write_atomically(path, write):
    """Calls write(temporary path), then renames: a kill leaves the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    write(temporary)
    os.replace(temporary, path)


def create_run_dir(args, script, name):
    """A new run folder with config.json: all flags, versions, git commit and command line."""
    seeds = f"{args.seed}" if args.num_seeds == 1 else f"{args.seed}-{args.seed + args.num_seeds - 1}"
    run_dir = Path(args.run_dir or f"runs/{script}/{name}/{seeds}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        fail(f"{run_dir} is there already", "give another --run-dir, or --resume it")
    except OSError as e:
        fail(f"{run_dir} cannot be made ({e.strerror})", "give another --run-dir")
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "minari"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    config = {
        "script": script,
        "args": asdict(args),
        "versions": versions,
        "git_commit": git.stdout.strip() or None,
        "command": shlex.join([sys.executable, *sys.argv]),
    }
    write_atomically(run_dir / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    return run_dir


def on_stop_signal():
    """A list that stays empty until Ctrl-C or SIGTERM asks the loop to stop; a second Ctrl-C stops at once."""
    stop = []

    def handler(signum, frame):
        stop.append(signum)
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)
    return stop


def cuda_graph(step, agent, inputs):
    """`step(*inputs)` captured as one CUDA graph; call it after copying new values into `inputs`.

    Capturing needs a few real steps first; whatever they change in the agent is put back.
    """

    def persistent():
        moments = (t for o in agent.optimizers.values() for state in o.state.values() for t in state.values())
        return [*agent.parameters(), *agent.buffers(), *(t for t in moments if torch.is_tensor(t))]

    before = {id(t): t.detach().clone() for t in persistent()}
    rng_state = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    for optimizer in agent.optimizers.values():
        optimizer.zero_grad()  # gradients are made anew, inside the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
    with torch.no_grad():
        for t in persistent():
            t.copy_(before[id(t)]) if id(t) in before else t.zero_()  # fresh Adam moments start at zero
    torch.cuda.set_rng_state(rng_state)

    def replay():
        graph.replay()
        return outputs

    return replay


def duration(seconds):
    """75 -> '1:15'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing of the online scripts: interaction, and writing what was seen as a Minari dataset
# ---------------------------------------------------------------------------------------------------------------------


def episode_seed(seed, env_index, episode):
    """The seed that this episode's environment is reset with."""
    return int(np.random.SeedSequence([seed, env_index, episode, 1]).generate_state(1)[0])


def split_episodes(rows, ends, widths):
    """Cuts one environment's packed transitions (T, width) with ends (T,) {0 no, 1 terminated, 2 truncated} into
    [(observations (T_i + 1, O), actions, rewards, terminations, truncations), ...]; an unfinished last episode is
    kept and counts as truncated."""
    cuts = [*(np.flatnonzero(ends) + 1), *([len(rows)] if len(rows) and not ends[-1] else [])]
    episodes = []
    for first, last in zip([0, *cuts], cuts):
        obs, action, reward, next_obs, _ = np.split(rows[first:last], np.cumsum(widths)[:-1], axis=1)
        terminated = ends[first:last] == 1
        truncated = ends[first:last] == 2
        truncated[-1] = not terminated[-1]
        episodes.append((np.concatenate([obs, next_obs[-1:]]), action, reward[:, 0], terminated, truncated))
    return episodes


def thin(episodes, num_transitions):
    """Every k-th episode, evenly spaced, so that about num_transitions are left."""
    share = num_transitions / sum(len(episode[2]) for episode in episodes)
    return [e for i, e in enumerate(episodes) if math.floor((i + 1) * share) > math.floor(i * share)]


def save_minari(path, episodes, env, references, description):
    """Writes episodes as a Minari dataset to the folder `path` (made; must not exist), float32 throughout."""
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(id=i, observations=o, actions=a, rewards=r, terminations=d, truncations=t)
        for i, (o, a, r, d, t) in enumerate(episodes)
    ]
    space = env.observation_space
    with tempfile.TemporaryDirectory() as root:
        before = os.environ.get("MINARI_DATASETS_PATH")
        os.environ["MINARI_DATASETS_PATH"] = root
        minari.create_dataset_from_buffers(
            "dataset-v0",
            buffers,
            env=env.spec.id,
            observation_space=gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32),
            action_space=gym.spaces.Box(-1, 1, env.action_space.shape, np.float32),
            ref_min_score=references[0],
            ref_max_score=references[1],
            algorithm_name="SAC",
            author="offline RL reference scripts",
            author_email="none",
            code_permalink="none",
            description=description,
        )
        os.environ.pop("MINARI_DATASETS_PATH")
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(str(Path(root) / "dataset-v0"), str(path))


def rollout(policy, env_id, num_steps, seed):
    """Episodes of the stochastic policy of one seed, as split_episodes returns them, until num_steps are there."""
    env, generator, episodes, total = make_env(env_id), torch.Generator().manual_seed(seed), [], 0
    while total < num_steps:
        obs, over = env.reset(seed=episode_seed(seed, 10**6, len(episodes)))[0], False
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


# ---------------------------------------------------------------------------------------------------------------------


def main():
    args = parse_args("sac")
    device = choose_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    S, E = args.num_seeds, args.num_envs
    for folder in (args.save_replay, args.save_rollouts):
        if folder and Path(folder).exists():
            fail(f"{folder} is there already", "give another folder to write the dataset to")
    if min(S, E, args.num_steps, args.batch_size, args.learning_starts, args.eval_every) < 1:
        fail("a count is below 1", "give positive numbers of seeds, environments, steps and transitions")

    envs = [[make_env(args.env_id) for _ in range(E)] for _ in range(S)]
    obs_dim, action_dim = envs[0][0].observation_space.shape[0], envs[0][0].action_space.shape[0]
    references = D4RL_REFERENCES.get(args.env_id.split("-")[0].split("_")[0])
    agent = SACAgent(obs_dim, action_dim, args, device)

    # the whole log stays on the device: rows (S, T, E, width), and how each row ended its episode
    T = -(-args.num_steps // E)
    replay = torch.zeros(S, T, E, sum(agent.widths), device=device)
    ends = np.zeros((S, T, E), np.uint8)  # 0 goes on, 1 terminated, 2 truncated
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(args.seed, args.seed + S)]

    def draw(sampler, *shape):
        """One draw per seed from its own generator: (S, *shape)."""
        return torch.stack([sampler(*shape, device=device, generator=generator) for generator in generators])

    # what an update reads stands in fixed places, so that a CUDA graph can replay it
    index = torch.zeros(S, args.batch_size, dtype=torch.long, device=device)
    noise = torch.zeros(2, S, args.batch_size, action_dim, device=device)
    flat_replay, seed_index = replay.view(S, T * E, -1), torch.arange(S, device=device)[:, None]

    def step(index, noise):
        return update(agent, flat_replay[seed_index, index], noise, args)

    row, episode_number = 0, np.zeros((S, E), int)
    if args.resume or args.evaluate:
        run_dir = Path(args.run_dir)
        try:
            checkpoint = torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)
        except FileNotFoundError:
            fail(f"{run_dir} has no checkpoint yet", "start the run again in a new folder")
        agent.load_state_dict(checkpoint["agent"])
    if args.evaluate:
        for s in range(S):
            seeds = [episode_seed(args.seed + s, 10**6 + 1, e) for e in range(args.eval_episodes)]
            video_dir = run_dir / "videos" if args.capture_video else None
            episodes = np.array(run_episodes(policy_of_seed(agent.actor, s), args.env_id, None, seeds, video_dir))
            print(f"seed {args.seed + s}: return {episodes[:, 0].mean():.1f} ± {episodes[:, 0].std():.1f} over "
                  f"{len(episodes)} episodes of {episodes[:, 1].mean():.0f} steps")
        return
    if not args.resume:
        run_dir = create_run_dir(args, "sac", args.env_id.replace("/", "-"))
    evaluator = Evaluator(args, args.env_id, None, references, run_dir)
    obs = np.zeros((S, E, obs_dim), np.float32)
    if args.resume:
        for name, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        for generator, state in zip(generators, checkpoint["generators"]):
            generator.set_state(state.cpu())
        row, episode_number = checkpoint["row"], checkpoint["episode_number"].numpy()
        replay[:, :row], ends[:, :row] = checkpoint["replay"], checkpoint["ends"].numpy()
        evaluator.resume(row * E, checkpoint["pending_evaluations"], agent.actor)
    for s, e in np.ndindex(S, E):
        # an environment's state is its episode's seed and the actions since: play them again
        obs[s, e] = envs[s][e].reset(seed=episode_seed(args.seed + s, e, episode_number[s, e]))[0]
        first = row - next((k for k in range(row) if ends[s, row - 1 - k, e]), row)
        for action in replay[s, first:row, e, obs_dim : obs_dim + action_dim].cpu().numpy():
            obs[s, e] = envs[s][e].step(action)[0]

    if device.type == "cuda":
        replayed = cuda_graph(step, agent, (index, noise))
    writer = SummaryWriter(run_dir, purge_step=row * E)
    stop, started, first_row, printed, metrics = on_stop_signal(), time.time(), row, 0.0, {}
    episode_return, latest = np.zeros((S, E)), "no evaluation yet"

    def save_checkpoint():
        contents = {
            "agent": agent.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()},
            "generators": [generator.get_state() for generator in generators],
            "row": row,
            "episode_number": torch.from_numpy(episode_number),
            "replay": replay[:, :row].clone(),
            "ends": torch.from_numpy(ends[:, :row].copy()),
            "pending_evaluations": {update: snapshot for update, snapshot, _ in evaluator.pending},
        }
        write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(contents, path))

    def report(finished):
        nonlocal latest
        for evaluated_step, returns in finished:
            writer.add_scalar("evaluation/return", returns.mean(), evaluated_step)
            writer.add_scalar("evaluation/normalized_score", normalized_score(returns, references).mean(), evaluated_step)
            latest = f"evaluation at {evaluated_step:,}: return {returns.mean():.1f} (score {normalized_score(returns.mean(), references):.1f})"
            print(latest, flush=True)

    def every(n):
        """Whether the step that just ended passed a multiple of n environment steps."""
        return row * E // n > (row - 1) * E // n

    while row < T and not stop:
        # act
        if row * E < args.learning_starts:
            action = draw(torch.rand, E, action_dim) * 2 - 1  # (S, E, A)
        else:
            with torch.no_grad():
                action = agent.actor.sample(torch.from_numpy(obs).to(device), draw(torch.randn, E, action_dim))[0]
        actions = action.cpu().numpy()
        transitions = np.zeros((S, E, sum(agent.widths)), np.float32)
        for s, e in np.ndindex(S, E):
            next_obs, reward, terminated, truncated, _ = envs[s][e].step(actions[s, e])
            transitions[s, e] = np.concatenate([obs[s, e], actions[s, e], [reward], next_obs, [not terminated]])
            obs[s, e], episode_return[s, e] = next_obs, episode_return[s, e] + reward
            if terminated or truncated:
                ends[s, row, e] = 1 if terminated else 2
                episode_number[s, e] += 1
                obs[s, e] = envs[s][e].reset(seed=episode_seed(args.seed + s, e, episode_number[s, e]))[0]
                writer.add_scalar(f"train/return_seed{args.seed + s}", episode_return[s, e], row * E)
                episode_return[s, e] = 0
        replay[:, row] = torch.from_numpy(transitions).to(device)
        row += 1

        # learn: as many updates as transitions came in
        if row * E >= args.learning_starts:
            for _ in range(E):
                index.copy_((draw(torch.rand, args.batch_size) * (row * E)).long())
                noise.copy_(torch.stack([draw(torch.randn, args.batch_size, action_dim) for _ in range(2)]))
                metrics = replayed() if device.type == "cuda" else step(index, noise)

        # report
        report(evaluator.collect())
        if every(args.eval_every) or row == T:
            evaluator.submit(row * E, agent.actor)
        if every(args.log_every):
            for name, value in metrics.items():
                writer.add_scalar(name, value.mean().item(), row * E)
            rate = (row - first_row) * E / (time.time() - started)
            if time.time() - printed > 5:
                printed = time.time()
                print(f"step {row * E:,}/{T * E:,}  {rate:.0f} steps/s  {duration((T - row) * E / rate)} left", flush=True)
        if every(args.checkpoint_every) or row == T or stop:
            save_checkpoint()

    if stop:
        evaluator.close()
        print(f"stopped at step {row * E:,}; continue with: python algorithms/sac.py --resume {run_dir}")
        raise SystemExit(128 + stop[0])
    report(evaluator.collect(wait=True))
    save_checkpoint()
    evaluator.close()
    writer.close()

    if args.save_replay:
        episodes = [ep for e in range(E) for ep in split_episodes(replay[0, :, e].cpu().numpy(), ends[0, :, e], agent.widths)]
        best = max(float(ep[2].sum()) for ep in episodes)
        random_returns = [float(ep[2].sum()) for ep in episodes[: max(1, sum(ends[0, : args.learning_starts].flat > 0))]]
        if args.replay_transitions:
            episodes = thin(episodes, args.replay_transitions)
        description = f"Training log of SAC, {T * E} steps, seed {args.seed}: {shlex.join(sys.argv)}"
        save_minari(args.save_replay, episodes, envs[0][0], references or (float(np.mean(random_returns)), best), description)
        print(f"{len(episodes)} episodes, {sum(len(ep[2]) for ep in episodes):,} transitions -> {args.save_replay}")
    if args.save_rollouts:
        episodes = rollout(policy_of_seed(agent.actor, 0), args.env_id, args.num_rollout_steps, args.seed)
        returns = [float(ep[2].sum()) for ep in episodes]
        description = f"Rollouts of a SAC policy after {T * E} steps, seed {args.seed}: {shlex.join(sys.argv)}"
        save_minari(args.save_rollouts, episodes, envs[0][0], references or (min(returns), max(returns)), description)
        print(f"{len(episodes)} episodes, return {np.mean(returns):.1f} ± {np.std(returns):.1f} -> {args.save_rollouts}")

    returns, scores = final_scores(run_dir / "evaluations.csv")
    print(f"return {returns.mean():.1f} ± {returns.std():.1f}, normalised score {scores.mean():.1f} ± {scores.std():.1f} "
          f"(mean ± standard deviation over {S} seeds of the mean over the last 10 evaluations, "
          f"{args.eval_episodes} episodes each) after {T * E:,} steps, "
          f"{(T - first_row) * E / (time.time() - started):.0f} steps/s and seed; results in {run_dir}")


if __name__ == "__main__":
    main()
