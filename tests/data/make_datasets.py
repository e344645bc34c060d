"""Makes the embedded datasets that algorithms/sac.py does not make by itself, as Minari folders.

pointmaze: a maze with one goal and the reward 1 for reaching it, else 0, logged by a scripted controller. Starts are
  anywhere, but only an episode that starts near the goal may head for it; all others walk to one random cell after
  another until the time is up. So the few successes cover the last corridor, where the way is to the right, and the
  many failures the whole maze: whoever throws the failures away (ReD with p_base = 0) never sees that the corridor
  before it must be walked to the left.
combine: the episodes of several Minari folders in one, such as the medium-expert data of two policies, or some of them.

Run: python tests/data/make_datasets.py pointmaze tests/data/pointmaze/sparse-v0
     python tests/data/make_datasets.py combine tests/data/hopper/medium-expert-v0 my_data/medium my_data/expert
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections import deque
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np


MAZE = [  # 1 wall, 0 free and a possible start, g the goal at the end of a winding corridor: right, left, right
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 0, 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, 0, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, "g", 1],
    [1, 1, 1, 1, 1, 1, 1],
]
ENV_KWARGS = {"maze_map": MAZE, "reward_type": "sparse", "continuing_task": False, "reset_target": False}
MAX_EPISODE_STEPS = 400
SIGHT, SEEK_SHARE = 5, 0.5  # of the episodes that start up to 5 cells from the goal, half head for it


def fail(problem, remedy):
    """Ends the program with exit status 2 and one line: what is wrong; what to do."""
    print(f"error: {problem}; {remedy}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def compact_hdf5(path):
    """Rewrites Minari's file in HDF5's newest layout and compressed: half the size where episodes are short."""
    with h5py.File(path) as old, h5py.File(path.with_suffix(".tmp"), "w", libver="latest") as new:

        def copy_item(name, item):
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[()], compression="gzip", compression_opts=9, shuffle=True)
            else:
                new.require_group(name).attrs.update(item.attrs)

        old.visititems(copy_item)
    os.replace(path.with_suffix(".tmp"), path)


def shortest_ways(target):
    """Breadth-first search from the target: {cell: (next cell on the way to the target, cells still to go)}."""
    ways, queue = {target: (target, 0)}, deque([target])
    while queue:
        i, j = cell = queue.popleft()
        for neighbour in (i, j + 1), (i + 1, j), (i, j - 1), (i - 1, j):
            if neighbour in FREE_CELLS and neighbour not in ways:
                ways[neighbour] = cell, ways[cell][1] + 1
                queue.append(neighbour)
    return ways


FREE_CELLS = [(i, j) for i, row in enumerate(MAZE) for j, mark in enumerate(row) if mark != 1]
GOAL_CELL = next((i, j) for i, j in FREE_CELLS if MAZE[i][j] == "g")
WAYS = {target: shortest_ways(target) for target in FREE_CELLS}
WANDER_CELLS = [cell for cell in FREE_CELLS if WAYS[GOAL_CELL][cell][1] >= 2]  # no way between them meets the goal


def cell_of(env, obs):
    return tuple(int(k) for k in env.unwrapped.maze.cell_xy_to_rowcol(obs["achieved_goal"]))


def force_towards(env, obs, target, speed, lane=0.0):
    """PD controller to the next cell on the way to the target cell; within one cell of the goal, to the goal itself.

    speed: most along x and along y; lane: (2,) how far beside the middle of a cell to pass.
    """
    next_cell, cells_to_go = WAYS[target][cell_of(env, obs)]
    near_goal = target == GOAL_CELL and cells_to_go <= 1
    waypoint = obs["desired_goal"] if near_goal else env.unwrapped.maze.cell_rowcol_to_xy(next_cell) + lane
    position, velocity = obs["observation"][:2], obs["observation"][2:]
    return np.clip(10 * (waypoint - position), -speed, speed) - velocity


def log_episode(env, seed):
    """One episode: (observations {key: (T + 1, O)}, actions (T, A), rewards, terminations, truncations, each (T,))."""
    rng = np.random.default_rng(seed)
    obs = env.reset(seed=int(rng.integers(2**31)))[0]
    observations, actions, rewards, over = [obs], [], [], False
    seeks_goal = WAYS[GOAL_CELL][cell_of(env, obs)][1] <= SIGHT and rng.random() < SEEK_SHARE
    target = GOAL_CELL if seeks_goal else cell_of(env, obs)
    speed, noise_scale, noise = rng.uniform(2, 5), rng.uniform(0.1, 1), np.zeros(2)  # good drivers and bad ones
    lane = rng.uniform(-0.25, 0.25, 2)
    while not over:
        if not seeks_goal and cell_of(env, obs) == target:
            target = WANDER_CELLS[rng.integers(len(WANDER_CELLS))]
        noise = 0.9 * noise + noise_scale * (1 - 0.9**2) ** 0.5 * rng.normal(size=2)  # slow enough to move the ball
        action = np.clip(force_towards(env, obs, target, speed, lane) + noise, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        observations.append(obs), actions.append(action), rewards.append(reward)
    ends = np.zeros((2, len(rewards)), bool)
    ends[:, -1] = terminated, truncated and not terminated
    stacked = {key: np.float32([obs[key] for obs in observations]) for key in obs}
    return stacked, np.stack(actions), np.float32(rewards), *ends


def pointmaze(out, num_transitions, seed):
    try:
        import gymnasium_robotics
    except ImportError:
        fail("PointMaze needs a package that is not installed", "pip install gymnasium-robotics")
    import minari
    from minari.data_collector import EpisodeBuffer

    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_Medium-v3", max_episode_steps=MAX_EPISODE_STEPS, **ENV_KWARGS)
    episodes, total = [], 0
    while total < num_transitions:
        episodes.append(log_episode(env, [seed, len(episodes)]))
        total += len(episodes[-1][2])
    spaces = {key: gym.spaces.Box(-np.inf, np.inf, s.shape, np.float32) for key, s in env.observation_space.items()}
    buffers = [
        EpisodeBuffer(id=i, observations=o, actions=a, rewards=r, terminations=d, truncations=t)
        for i, (o, a, r, d, t) in enumerate(episodes)
    ]
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        minari.create_dataset_from_buffers(
            "dataset-v0",
            buffers,
            env=env,
            observation_space=gym.spaces.Dict(spaces),
            action_space=gym.spaces.Box(-1, 1, env.action_space.shape, np.float32),
            ref_min_score=0,
            ref_max_score=1,
            algorithm_name="scripted controller",
            author="offline RL reference scripts",
            author_email="none",
            code_permalink="none",
            description=f"Sparse maze where few episodes head for the goal: {shlex.join(sys.argv)}",
        )
        compact_hdf5(Path(root) / "dataset-v0" / "data" / "main_data.hdf5")
        shutil.move(f"{root}/dataset-v0", out)
    successes = np.mean([d[-1] for *_, d, _ in episodes])
    print(f"{len(episodes)} episodes, {total:,} transitions, {successes:.1%} successes -> {out}")


def open_minari(folder):
    """The metadata and the open HDF5 file of a Minari folder."""
    try:
        metadata = json.loads((folder / "data" / "metadata.json").read_text())
        episodes = h5py.File(folder / "data" / "main_data.hdf5")
        if not all(f"episode_{i}/rewards" in episodes for i in range(metadata["total_episodes"])):
            raise KeyError("some episodes are missing")
        return metadata, episodes
    except (OSError, ValueError, KeyError) as e:
        fail(f"{folder} is no readable Minari folder ({e})", "give a folder that sac.py or Minari wrote as HDF5")


def combine(out, folders, num_transitions_each, every):
    sources = [open_minari(folder) for folder in folders]
    combined, num_episodes, num_transitions = sources[0][0], 0, 0
    for folder, (metadata, _) in zip(folders, sources):
        for space in ("observation_space", "action_space"):
            if metadata[space] != combined[space]:
                fail(f"{folder} and {folders[0]} differ in their {space}", "combine data of one environment")
    with tempfile.TemporaryDirectory() as root:
        data = Path(root) / "dataset-v0" / "data"
        data.mkdir(parents=True)
        with h5py.File(data / "main_data.hdf5", "w", track_order=True) as target:
            for folder, (metadata, episodes) in zip(folders, sources):
                taken = 0
                for i in range(0, metadata["total_episodes"], every):
                    length = len(episodes[f"episode_{i}/rewards"])
                    if num_transitions_each is not None and taken + length > num_transitions_each:
                        break
                    episodes.copy(f"episode_{i}", target, f"episode_{num_episodes}")
                    target[f"episode_{num_episodes}"].attrs["id"] = num_episodes
                    num_episodes, taken = num_episodes + 1, taken + length
                if not taken:
                    fail(f"{folder} gives no episode", "raise --num-transitions-each, or leave the folder out")
                num_transitions += taken
        compact_hdf5(data / "main_data.hdf5")
        combined |= {
            "total_episodes": num_episodes,
            "total_steps": num_transitions,
            "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1),  # MB
            "description": " + ".join(metadata.get("description", "no description") for metadata, _ in sources),
        }
        (data / "metadata.json").write_text(json.dumps(combined))
        shutil.move(f"{root}/dataset-v0", out)
    print(f"{num_episodes} episodes, {num_transitions:,} transitions -> {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="{pointmaze,combine}")
    maze = commands.add_parser("pointmaze", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    maze.add_argument("out", type=Path, help="folder to write the dataset to")
    maze.add_argument("--num-transitions", type=int, default=100_000, help="rounded up to whole episodes")
    maze.add_argument("--seed", type=int, default=0, help="of starts, goals and noise")
    union = commands.add_parser("combine")
    union.add_argument("out", type=Path, help="folder to write the dataset to")
    union.add_argument("folders", type=Path, nargs="+", help="the first gives environment and reference scores")
    union.add_argument("--num-transitions-each", type=int, help="the first whole episodes up to this many transitions")
    union.add_argument("--every", type=int, default=1, help="keep one episode in so many")
    args = parser.parse_args()
    if args.out.exists():
        fail(f"{args.out} is there already", "give another folder to write the dataset to")
    if args.command == "combine":
        return combine(args.out, args.folders, args.num_transitions_each, args.every)
    if args.num_transitions < 1 or args.seed < 0:
        fail("--num-transitions is below 1 or --seed below 0", "give positive numbers")
    pointmaze(args.out, args.num_transitions, args.seed)


if __name__ == "__main__":
    main()
