"""The tiny harness that all tests share: import a script, run it, make small datasets, read what a run wrote.

import harness (pytest puts this folder on sys.path)
    iql = harness.load("iql_red")                            a script as a module
    done = harness.run("iql_red", "--num-updates", 20)       as a user would; .returncode, .stdout, .stderr
    done = harness.forked("iql_red", "--num-updates", 20)    the same, started in milliseconds
    harness.run_main("iql_red", "--num-updates", 20)         main() in this process, evaluations too
    harness.write_minari(folder, harness.hopper_episodes())  a Minari folder, written with h5py
"""

import concurrent.futures.process
import contextlib
import copy
import importlib.util
import inspect
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: a second thread only costs here

import gymnasium as gym  # noqa: E402
import h5py  # noqa: E402
import minari.serialization  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
DATA = ROOT / "tests" / "data"
sys.path.append(str(ROOT / "algorithms"))  # where evaluation workers find the modules, too

# The offline scripts for continuous actions, which the shared tests are run for (awac and bcq without their
# online stage), and what makes their runs small beside COMMON
OFFLINE = ["iql_red", "cql_red", "td3_bc_red", "crr_red", "dered_iql", "rvs_lds"]
OFFLINE += ["asac", "iql_scaled", "td3_bc_scaled", "awac", "bcq"]
COMMON = "--hidden-sizes", 8, 8, "--batch-size", 8, "--device", "cpu"
SMALL = {
    "cql_red": ("--num-action-samples", 2),
    "asac": ("--eval-samples", 3),
    "iql_scaled": ("--eval-samples", 3),
    "td3_bc_scaled": ("--eval-samples", 3),
    "awac": ("--eval-samples", 3),
    "bcq": ("--vae-hidden-sizes", 8, 8, "--num-candidates", 5, "--num-next-actions", 3),
}


# Scripts ------------------------------------------------------------------------------------------
@cache
def load(script):
    """algorithms/<script>.py as a module."""
    return importlib.import_module(script)


def small(script, dropout=0.0):
    """Flags of a small run; with dropout, where the script has it."""
    flags = [*COMMON, *SMALL.get(script, ())]
    if "dropout" in load(script).Args.__dataclass_fields__:
        flags += ["--dropout", dropout]
    return flags


def length(script, num_updates, stage1=60):
    """Flags of a run of so many updates, of which a script with two stages makes stage1 in the first."""
    if "stage2_updates" in load(script).Args.__dataclass_fields__:
        return "--num-updates", stage1, "--stage2-updates", num_updates - stage1
    return "--num-updates", num_updates


def command(script, *flags):
    """The command line of a script with these flags, for subprocess."""
    return [sys.executable, str(ROOT / "algorithms" / f"{script}.py"), *map(str, flags)]


def run(script, *flags, timeout=300, cwd=None, **env):
    """Runs a script as a user would, on one thread; keyword arguments are environment variables."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    options = dict(capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)
    return subprocess.run(command(script, *flags), **options)


@cache
def server():
    """Starts a process that has imported what a run imports, and from which runs are forked."""
    context = multiprocessing.get_context("forkserver")
    late = ["pytest", "torch._dynamo", "gymnasium.envs.mujoco.hopper_v5", "PIL.Image"]
    context.set_forkserver_preload(late + OFFLINE)
    path = os.pathsep.join(sys.path)
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    return context


def forked_main(script, flags, cwd, output, before):
    """What a forked process does."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    if cwd:
        os.chdir(cwd)
    os.setsid()  # so that `members` finds its workers
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: context  # workers are forked too, not spawned
    module = load(script)
    sys.argv = [module.__file__, *map(str, flags)]
    if before:
        before()
    try:
        module.main()
    finally:
        with contextlib.suppress(OSError):  # of a pool that is closing already
            concurrent.futures.process._python_exit()  # ends idle workers, which this process would wait for


def fork(script, *flags, cwd=None, before=None):
    """Starts a script in a forked process, after a call of before(); see `finish`."""
    output = tempfile.TemporaryDirectory()
    process = server().Process(target=forked_main, args=(script, flags, cwd, output.name, before))
    process.output = output  # goes when the process is forgotten
    process.start()
    return process


def finish(process, timeout=120):
    """Waits for a forked process, as subprocess.run does."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"still running after {timeout} s")
    texts = [Path(process.output.name, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(process.name, process.exitcode, *texts)


def forked(script, *flags, **options):
    return finish(fork(script, *flags, **options))


class Pool:
    """Evaluation workers of `run_main`: this process."""

    def __init__(self, *args):
        pass

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future

    def shutdown(self):
        pass


def run_main(script, *flags):
    """Runs main() of a script in this process, where its functions can be patched."""
    module = load(script)
    argv = [module.__file__, *map(str, flags)]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(module, "ProcessPoolExecutor", Pool):
        module.main()


def plumbing(script):
    """The part of a script that reads data and evaluates."""
    text = (ROOT / "algorithms" / f"{script}.py").read_text()
    return re.search(r"\n# Plumbing.*?(?=\n# Training)", text, re.DOTALL)[0]


def distinct():
    """Of all moved scripts with the same plumbing the first."""
    return list({plumbing(script): script for script in reversed(OFFLINE)}.values())[::-1]


def load_data(script, *names, eval_episodes=0, **flags):
    """The Data that a script makes of these datasets."""
    module = load(script)
    return module.load_data(module.Args(dataset=tuple(map(str, names)), eval_episodes=eval_episodes, **flags))


def refused(script, *flags):
    """The line with which a script refuses flags or data, before it makes a run folder."""
    with tempfile.TemporaryDirectory() as folder:
        flags = *small(script), "--num-updates", 20, *flags, "--run-dir", f"{folder}/run"
        try:
            run_main(script, *flags)
            message = "nothing was refused"
        except SystemExit as stop:
            message = str(stop.code)
        assert message.startswith("error: ") and not os.path.exists(f"{folder}/run"), message
    return message


def record_updates(script, *flags, watch=None):
    """The agent's tensors before the first update of a run, and the inputs of all updates by name, on top
    of each other: (updates, S, B, ...); as "watched" what watch(agent) was before each."""
    module = load(script)
    update = module.update
    names = list(inspect.signature(update).parameters)
    first = {}
    inputs = {}

    def recording(agent, *args):
        if not first:
            first.update({name: x.clone() for name, x in agent.state_dict().items()})
        for name, x in zip(names[1:], args):
            if hasattr(x, "numpy") or isinstance(x, bool):
                inputs.setdefault(name, []).append(np.array(x))
        if watch:
            inputs.setdefault("watched", []).append(np.array(watch(agent)))
        return update(agent, *args)

    with mock.patch.object(module, "update", recording):
        run_main(script, *flags)
    return first, {name: np.stack(x) for name, x in inputs.items()}


def run_on(script, data, *flags, watch=None):
    """Runs a script on this Data, evaluations taking no time; returns the inputs of all updates by name, and
    the policy that it evaluates last."""
    module = load(script)
    policies = []

    def run_episode(policy, spec, references, run_dir, seeds, *job):
        policies.append(pickle.loads(policy))
        return np.zeros((len(seeds), 6))

    data = data._replace(spec=gym.spec("Hopper-v5"))
    patch = mock.patch.object
    with patch(module, "load_data", lambda args: data), patch(module, "run_episode", run_episode):
        with tempfile.TemporaryDirectory() as folder:
            flags = *flags, "--eval-episodes", 1, "--device", "cpu", "--run-dir", f"{folder}/run"
            _, inputs = record_updates(script, *flags, watch=watch)
    return inputs, policies[-1]


# Processes ----------------------------------------------------------------------------------------
def members(session):
    """Processes of this session, that of a forked process for instance, which are not over."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended while we looked
            continue
        if state != "Z" and int(sid) == session:
            alive.append(int(stat.parent.name))
    return alive


def assert_no_orphans(session, seconds=30):
    deadline = time.time() + seconds
    while members(session) and time.time() < deadline:
        time.sleep(0.02)
    left = members(session)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def wait_for(path, is_running, since=0.0, seconds=120):
    """Waits until something is written to a file (after `since`), or a run is over."""
    deadline = time.time() + seconds
    while is_running() and time.time() < deadline:
        if path.exists() and path.stat().st_size > 0 and path.stat().st_mtime > since:
            return
        time.sleep(0.002)
    assert time.time() < deadline, "waited in vain"


# Run folders --------------------------------------------------------------------------------------
def read_evaluations(run_dir):
    """evaluations.csv of a run folder as columns: {"update": array, "seed": array, ...}."""
    path = Path(run_dir) / "evaluations.csv"
    names = path.read_text().split("\n", 1)[0].split(",")
    return dict(zip(names, np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T))


def leaves(run_dir):
    """All that a checkpoint holds, by the path of its keys."""
    import torch

    def walk(node, path):
        if isinstance(node, dict):
            items = node.items()
        elif isinstance(node, (list, tuple)):
            items = enumerate(node)
        else:
            return {path: node}
        found = {}
        for key, value in items:
            found |= walk(value, f"{path}/{key}")
        return found

    return walk(torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True), "")


def differing_leaves(run_dir, reference, prefix=""):
    """Paths below `prefix` at which two runs' checkpoints are not the same to the bit."""
    import torch

    ours = leaves(run_dir)
    theirs = leaves(reference)
    paths = sorted(path for path in ours.keys() | theirs.keys() if path.startswith(prefix))
    assert paths
    return [path for path in paths if not torch.equal(*(torch.as_tensor(x[path]) for x in (ours, theirs)))]


def assert_same_end(run_dir, reference):
    """Two runs ended alike: bit-identical checkpoints, the same evaluations.csv."""
    assert differing_leaves(run_dir, reference) == []
    csv, expected = (Path(x) / "evaluations.csv" for x in (run_dir, reference))
    assert csv.read_text() == expected.read_text()


# Datasets -----------------------------------------------------------------------------------------
def hopper_episodes(num_episodes=6, length=40, obs_dim=11, action_dim=3, seed=0):
    """Synthetic episodes [(obs (T + 1, O), action (T, A), reward (T,), terminated (T,), truncated (T,)), ...]
    of Hopper's shape: every other one ends truly, the rest at a time limit; returns grow with the index."""
    rng, episodes = np.random.default_rng(seed), []
    for i in range(num_episodes):
        T = length + 3 * i
        ends = np.zeros((2, T), bool)
        ends[i % 2, -1] = True
        obs, action = rng.normal(size=(T + 1, obs_dim)), rng.uniform(-0.9, 0.9, size=(T, action_dim))
        reward = rng.normal(i, 0.1, size=T)
        episodes.append((np.float32(obs), np.float32(action), reward, *ends))
    return episodes


def steps(rewards, terminated=False):
    """One episode with these rewards, whose observations are the time; it ends truly or at a time limit."""
    T = len(rewards)
    ends = np.zeros((2, T), bool)
    ends[0 if terminated else 1, -1] = True
    obs = np.arange(T + 1, dtype=np.float32)[:, None].repeat(2, axis=1)
    return obs, np.full((T, 1), 0.5, np.float32), np.float64(rewards), *ends


def env_spec(env_id, kwargs=None, **changes):
    """An environment as a dataset's metadata names it: gymnasium's own entry, some fields changed."""
    if env_id not in gym.registry:  # nothing could make it
        spec = {"id": env_id, "entry_point": "nowhere:Never", "kwargs": kwargs or {}}
        return json.dumps(spec | {"max_episode_steps": None})
    spec = copy.deepcopy(gym.spec(env_id))
    spec.kwargs.update(kwargs or {})
    for name, value in changes.items():
        setattr(spec, name, value)
    return spec.to_json()


def space_of(x):
    """A space for values stacked along time: boxes without bounds, by key where x is a dict."""
    if isinstance(x, dict):
        return gym.spaces.Dict({key: space_of(part) for key, part in x.items()})
    return gym.spaces.Box(-np.inf, np.inf, np.shape(x)[1:], np.float32)


def write_minari(
    folder,
    episodes,
    env_id="Hopper-v5",
    env_kwargs=None,
    references=(0.0, 100.0),
    obs_space=None,
    action_space=None,
    **metadata,
):
    """Writes folder/data/{metadata.json, main_data.hdf5} in Minari's layout; a dict observation becomes a
    group. Spaces: by default those of the arrays, actions in [-1, 1]."""
    data = Path(folder) / "data"
    data.mkdir(parents=True)
    obs_space = obs_space or space_of(episodes[0][0])
    action_space = action_space or gym.spaces.Box(-1, 1, np.shape(episodes[0][1])[1:], np.float32)
    low, high = references or (None, None)
    facts = {
        "dataset_id": "test/log-v0",
        "minari_version": minari.__version__,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "total_episodes": len(episodes),
        "total_steps": sum(len(episode[2]) for episode in episodes),
        "observation_space": minari.serialization.serialize_space(obs_space),
        "action_space": minari.serialization.serialize_space(action_space),
        "env_spec": env_spec(env_id, env_kwargs),
        "ref_min_score": low,
        "ref_max_score": high,
    }
    (data / "metadata.json").write_text(json.dumps(facts | metadata))

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


def write_d4rl(path, episodes, next_observations=True, timeouts=True, column=False):
    """Writes the same episodes as a D4RL .hdf5 file; column: rewards and ends as (N, 1)."""
    obs, action, reward, terminated, truncated = zip(*episodes)
    shape = (-1, 1) if column else (-1,)
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([o[:-1] for o in obs])
        if next_observations:
            file["next_observations"] = np.concatenate([o[1:] for o in obs])
        file["actions"] = np.concatenate(action)
        file["rewards"] = np.concatenate(reward).reshape(shape)
        file["terminals"] = np.concatenate(terminated).reshape(shape)
        if timeouts:
            file["timeouts"] = np.concatenate(truncated).reshape(shape)
    return Path(path)
