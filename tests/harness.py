"""The tiny harness that all tests share: import a script, run it as a user would, make small datasets.

import harness (pytest puts this folder on sys.path)
    iql = harness.load("iql_red")                            a script as a module, by path
    done = harness.run("iql_red", "--num-updates", 20)       a subprocess; .returncode, .stdout, .stderr
    harness.write_minari(folder, harness.hopper_episodes())  a Minari folder, written with h5py alone
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import h5py
import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: at the tests' sizes a second thread only costs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
DATA = ROOT / "tests" / "data"


@cache
def load(script):
    """algorithms/<script>.py as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "algorithms" / f"{script}.py")
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(script, *flags):
    """The command line of a script with these flags, for subprocess."""
    return [sys.executable, str(ROOT / "algorithms" / f"{script}.py"), *map(str, flags)]


def run(script, *flags, timeout=300, cwd=None, **env):
    """Runs a script as a user would, on one thread; keyword arguments are environment variables."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(command(script, *flags), capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)


def read_evaluations(run_dir):
    """evaluations.csv of a run folder as columns: {"update": array, "seed": array, ...}."""
    path = Path(run_dir) / "evaluations.csv"
    names = path.read_text().split("\n", 1)[0].split(",")
    return dict(zip(names, np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T))


def hopper_episodes(num_episodes=6, length=40, obs_dim=11, action_dim=3, seed=0):
    """Synthetic episodes [(obs (T + 1, O), action (T, A), reward (T,), terminated (T,), truncated (T,)), ...] of
    Hopper's shape; every other one ends in a terminal state, the rest in a truncation; returns grow with the index."""
    rng, episodes = np.random.default_rng(seed), []
    for i in range(num_episodes):
        T = length + 3 * i
        ends = np.zeros((2, T), bool)
        ends[i % 2, -1] = True
        obs, action = rng.normal(size=(T + 1, obs_dim)), rng.uniform(-0.9, 0.9, size=(T, action_dim))
        reward = rng.normal(i, 0.1, size=T)
        episodes.append((np.float32(obs), np.float32(action), reward, *ends))
    return episodes


def write_minari(folder, episodes, env_id="Hopper-v5", env_kwargs=None, references=(0.0, 100.0), **metadata):
    """Writes folder/data/{metadata.json, main_data.hdf5} in Minari's layout; a dict observation becomes a group."""
    data = Path(folder) / "data"
    data.mkdir(parents=True)
    spec = {"id": env_id, "entry_point": "nowhere:Never", "kwargs": env_kwargs or {}, "max_episode_steps": None}
    metadata = {
        "total_episodes": len(episodes),
        "env_spec": json.dumps(spec),
        "ref_min_score": references[0] if references else None,
        "ref_max_score": references[1] if references else None,
        **metadata,
    }
    (data / "metadata.json").write_text(json.dumps(metadata))

    def write(group, name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                write(group.require_group(name), key, part)
        else:
            group[name] = value

    with h5py.File(data / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            names = "observations", "actions", "rewards", "terminations", "truncations"
            for name, value in zip(names, episode):
                write(file.require_group(f"episode_{i}"), name, value)
    return Path(folder)


def write_d4rl(path, episodes, next_observations=True):
    """Writes the same episodes as a D4RL .hdf5 file."""
    obs, action, reward, terminated, truncated = zip(*episodes)
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([o[:-1] for o in obs])
        if next_observations:
            file["next_observations"] = np.concatenate([o[1:] for o in obs])
        for name, value in (
            ("actions", action),
            ("rewards", reward),
            ("terminals", terminated),
            ("timeouts", truncated),
        ):
            file[name] = np.concatenate(value)
    return Path(path)
