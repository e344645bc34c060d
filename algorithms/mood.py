"""MOOD: offline data of mixed objectives, made of logs of other tasks, and the fifteen tasks themselves.

Paper: E. Cetin et al., "Simple Ingredients for Offline Reinforcement Learning", 2024, arXiv:2403.13097 (section
3.1, appendix A, Table 6).

Idea. A robot's reward is a function of its state, so a log of one task is data for every other task of the same
robot, as soon as its rewards are computed anew. MOOD joins logs of agents that learned different tasks, or
looked for novelty, and relabels all of them for one target task: data of which a part shows the target and the
rest something else. The paper finds that small networks learn less from the mixture than from that part alone.
It is made of dm_control's tasks, of which four robots have fifteen here: ids like `mood:walker-run-v0`, for
every script that runs from this folder.

Objectives. v_x is the forward speed of the body, L_y its angular momentum about the axis of a somersault, z the
height of its centre of mass, u in [-1, 1] the upward part of the torso's own upward axis; clip is to [0, 1].
    cheetah     walk, walk_backward, run_backward     clip(v_x / speed), speed 2, -2, -10                   (1)
    walker      spin                                  clip(L_y / 10)                                        (2)
    quadruped   stand                                 (1 + u) / 2                                           (3)
                jump                                  (1 + u) / 2 * clip((1 + z) / 2)                       (4)
    relabelled  reward of step t = R(state t + 1, action t), of which only the humanoid's R has an action   (5)
    score       100 * return / target of Table 6                                                            (6)
All others are dm_control's own. Shapes: T steps of an episode, O observation, A action, P physics.

What differs from the paper and its code, and why; and what to know.
    - Collected by td3.py, which keeps the physics of every observation; shares are of whole episodes, the same
      ones whatever the target, so that a mixture contains its parts.
    - The humanoid's reward falls with the size of its action. What resets the physics also forgets the action:
      it is put back, or else rewards come out up to a quarter too high.
    - Observations are ordered by name, as in shimmy's dm_control/walker-run-v0, and actions in dm_control's units,
      [-1, 1] but for the quadruped; ExoRL's are put in that form. Episodes have 1,000 steps and no true end.
    - A dataset may name environments of known packages only. So this one names none, and who learns from it does.

Collect:   python algorithms/td3.py --env-id mood:walker-spin-v0 --num-seeds 5 --save-replay data/walker/spin-v0
Run:       python algorithms/mood.py --domain walker --target run --sources data/walker/run-v0 data/walker/spin-v0
           --out data/walker-run/mixed-v0
Learn:     python algorithms/awac.py --dataset data/walker-run/mixed-v0 --env-id mood:walker-run-v0
Expected:  the score of each source's episodes; 12,000 states a second on a CPU core, 6,000 of the humanoid
ExoRL:     --domain walker --target run --exorl walker/rnd/buffer --out data/walker-run/exorl-v0
Paper:     sources walk, run, stand, spin of 5 seeds with a million steps each and RND of two million; humanoid
           ten million and no RND
"""

import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import tyro
from tqdm import tqdm


@dataclass
class Args:
    out: str  # new folder for the dataset, like data/walker-run/mixed-v0
    domain: Literal["cheetah", "walker", "quadruped", "humanoid"] = "walker"  # robot
    target: str = "run"  # task of this robot that the rewards are to be of
    sources: tuple[str, ...] = ()  # folders that td3.py has written by --save-replay, of any task of this robot
    exorl: tuple[str, ...] = ()  # folders with ExoRL's logs, one .npz an episode, also of any task
    share: float = 0.1  # of each source's episodes

    def __post_init__(self):
        if self.target not in TARGET_RETURNS[self.domain]:
            sys.exit(f"error: {self.domain} has the tasks {list(TARGET_RETURNS[self.domain])}; give --target")
        if not 0 < self.share <= 1:
            sys.exit("error: share is what to take of each source; give a number in (0, 1]")
        if not DATASET_ID.fullmatch(dataset_id(self.out)):
            sys.exit(f"error: Minari cannot name {self.out}; give a folder like data/walker-run/mixed-v0")


# The idea: any task's reward of any state ---------------------------------------------------------
TARGET_RETURNS = {  # of each robot's tasks: what scores 100, Table 6
    "cheetah": {"walk": 990, "run": 800, "walk_backward": 990, "run_backward": 550},
    "walker": {"walk": 970, "run": 730, "stand": 990, "spin": 990},
    "quadruped": {"walk": 940, "run": 800, "stand": 970, "jump": 870},
    "humanoid": {"walk": 900, "run": 400, "stand": 960},
}


def cheetah_speed(physics, speed):
    """1 from this speed on, which is negative where the way is back, (1)."""
    return np.clip(physics.speed() / speed, 0, 1)


def walker_spin(physics):
    """1 from an angular momentum of 10 on, upright or not, (2)."""
    momentum = physics.named.data.subtree_angmom["torso"]  # of the whole body, whose root is the torso
    return np.clip(momentum[1] / 10, 0, 1)


def quadruped_stand(physics):
    """1 where the torso is upright, 0 on its back, (3)."""
    return (1 + physics.torso_upright()) / 2


def quadruped_jump(physics):
    """Upright, with the centre of mass a metre high, (4)."""
    height = physics.named.data.subtree_com["torso", "z"]
    return quadruped_stand(physics) * np.clip((1 + height) / 2, 0, 1)


CUSTOM_REWARDS = {  # of tasks that dm_control does not have
    ("cheetah", "walk"): partial(cheetah_speed, speed=2),
    ("cheetah", "walk_backward"): partial(cheetah_speed, speed=-2),
    ("cheetah", "run_backward"): partial(cheetah_speed, speed=-10),
    ("walker", "spin"): walker_spin,
    ("quadruped", "stand"): quadruped_stand,
    ("quadruped", "jump"): quadruped_jump,
}


class SuiteTask(gym.Env):
    """One of the tasks, for td3.py to log and for every script to evaluate in. Its class, unlike what shimmy
    registers, can be sent to workers."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, domain, task, render_mode=None):
        if not find_spec("dm_control"):
            sys.exit("error: MOOD needs dm_control; run: pip install dm-control==1.0.44")
        from dm_control import suite  # here, because it takes seconds

        self.render_mode = render_mode
        custom = CUSTOM_REWARDS.get((domain, task))
        name = "run" if custom else task  # custom tasks are dm_control's run but for the reward
        self.suite = suite.load(domain, name, {"time_limit": np.inf})  # Gymnasium's limit ends episodes
        if custom:
            self.suite.task.get_reward = custom
        self.physics = self.suite.physics
        obs = self.observe(self.suite.task.get_observation(self.physics))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        action_spec = self.suite.action_spec()  # [-1, 1], but for the quadruped
        self.action_space = gym.spaces.Box(np.float32(action_spec.minimum), np.float32(action_spec.maximum))

    def observe(self, parts):
        """The parts of an observation as one array, (O,), ordered by name."""
        parts = [np.ravel(parts[name]) for name in sorted(parts)]
        return np.concatenate(parts, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.suite.task.random.seed(seed)
        return self.observe(self.suite.reset().observation), {}

    def step(self, action):
        step = self.suite.step(action)
        return self.observe(step.observation), float(step.reward), False, False, {}

    def render(self):
        return self.physics.render(camera_id=0)


for domain, tasks in TARGET_RETURNS.items():
    for task in tasks:
        names = {"domain": domain, "task": task}
        gym.register(f"{domain}-{task}-v0", SuiteTask, max_episode_steps=1000, kwargs=names)


def relabel(env, states, action):
    """The task's rewards (T,) from physics states (T + 1, P) and the actions between them (T, A), (5)."""
    rewards = []
    for state, control in zip(states[1:], action, strict=True):
        with env.physics.reset_context():  # which forgets the control
            env.physics.set_state(state)
        env.physics.set_control(control)
        rewards.append(env.suite.task.get_reward(env.physics))
    return np.float32(rewards)


# Logs: episodes of observations (T + 1, O), actions (T, A) and physics (T + 1, P) -----------------
def some(episodes, share):
    """A share of the episodes, the same ones for every target, so that a mixture contains its parts."""
    num_kept = max(1, round(share * len(episodes)))
    kept = np.random.default_rng(0).permutation(len(episodes))[:num_kept]
    return [episodes[i] for i in sorted(kept)]


def read_log(folder, share, env):
    """Some episodes of what td3.py has written."""
    dataset = minari.MinariDataset(Path(folder) / "data")
    kept = some(range(len(dataset)), share)
    for episode in tqdm(dataset.iterate_episodes(kept), "relabelling", len(kept), disable=None):
        if "physics" not in (episode.infos or {}):
            sys.exit(f"error: {folder} has no physics to relabel; make it with td3.py in one of mood.py's tasks")
        yield episode.observations, episode.actions, episode.infos["physics"]


def read_exorl(folder, share, env):
    """Some episodes of ExoRL's. The first row's action is none: that of row t, in [-1, 1], has led to its obs."""
    paths = sorted(Path(folder).rglob("*.npz"))
    if not paths:
        sys.exit(f"error: {folder} has no .npz files; unpack a buffer of ExoRL's in it")

    # ExoRL's observations have their parts in the order of dm_control's tasks, ours by name
    parts = env.suite.task.get_observation(env.physics)
    ends = np.cumsum([np.size(part) for part in parts.values()])
    places = np.split(np.arange(ends[-1]), ends[:-1])
    order = env.observe(dict(zip(parts, places))).astype(int)
    for path in tqdm(some(paths, share), "relabelling", disable=None):
        with np.load(path) as episode:
            obs = episode["observation"]
            if obs.shape[1] == len(order):  # or else `check` will tell
                obs = obs[:, order]
            share_of_range = (episode["action"][1:] + 1) / 2
            action = env.action_space.low + share_of_range * (env.action_space.high - env.action_space.low)
            yield obs, action, episode["physics"]


def check(folder, obs, action, states, env):
    """A log of another robot, or whose states are of other observations, would give wrong rewards in silence."""
    found = [x.shape[1:] for x in (obs, action, states)]
    wanted = [x.shape for x in (env.observation_space, env.action_space, env.physics.get_state())]
    if found != wanted:
        sys.exit(f"error: {folder} has observations, actions, physics of shapes {found}, not {wanted}; "
                 "give logs of this robot")  # fmt: skip
    relabel(env, states[-2:], action[-1:])  # sets the last state
    again = env.observe(env.suite.task.get_observation(env.physics))
    same = np.isclose(again, obs[-1], rtol=1e-3, atol=1e-3)
    if same.mean() < 0.6:  # forces and accelerations, 30 of the quadruped's 78 entries, need more than a state
        sys.exit(f"error: the observations of {folder} are not those of its physics; give a log in which they are")


# Plumbing: the result as a Minari dataset ---------------------------------------------------------
DATASET_ID = re.compile(r"([-\w]{2,}/)?[-\w]+-v\d+")


def dataset_id(folder):
    """The last parts of a folder's path, as Minari names what is in it."""
    return "/".join(Path(folder).parts[-2:])


def write(folder, episodes, env, target_return):
    """Writes episodes of observations, actions and rewards to a new folder, whose target scores 100, (6)."""
    buffers = []
    for obs, action, reward in episodes:
        ends = np.zeros(len(reward), bool)
        truncated = ends.copy()
        truncated[-1] = True
        episode = minari.data_collector.EpisodeBuffer(
            id=len(buffers),
            observations=obs,
            actions=action,
            rewards=reward,
            terminations=ends,
            truncations=truncated,
        )
        buffers.append(episode)
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        dataset = minari.create_dataset_from_buffers(
            dataset_id(folder),
            buffers,
            observation_space=env.observation_space,
            action_space=env.action_space,
            algorithm_name=Path(__file__).stem,
            author="unknown",
            author_email="unknown",
            code_permalink="unknown",
            description=" ".join(sys.argv),
        )
        # not among the arguments above, of which Minari forgets them where there is no environment
        dataset.storage.update_metadata({"ref_min_score": 0, "ref_max_score": target_return})
        shutil.move(Path(root, dataset_id(folder)), folder)


# Making a dataset ---------------------------------------------------------------------------------
def main():
    args = tyro.cli(Args)
    if Path(args.out).exists():
        sys.exit(f"error: {args.out} is there already; give another folder to write to")
    env = SuiteTask(args.domain, args.target)
    target_return = TARGET_RETURNS[args.domain][args.target]
    logs = [(folder, read_log) for folder in args.sources]
    logs += [(folder, read_exorl) for folder in args.exorl]
    if not logs:
        sys.exit("error: nothing to make data of; give --sources or --exorl")

    episodes = []
    for folder, read in logs:
        returns = []
        for obs, action, states in read(folder, args.share, env):
            check(folder, obs, action, states, env)
            reward = relabel(env, states, action)
            episodes.append((obs, action, reward))
            returns.append(reward.sum())
        scores = 100 * np.array(returns) / target_return  # (6)
        print(f"{folder}: {len(scores):,} episodes, score {scores.mean():.1f}, of the best {scores.max():.1f}")
    write(args.out, episodes, env, target_return)
    num_steps = sum(len(reward) for _, _, reward in episodes)
    flags = f"--dataset {args.out} --env-id mood:{args.domain}-{args.target}-v0"
    print(f"{num_steps:,} transitions; learn from them with {flags}")


if __name__ == "__main__":
    main()
