"""What a user can get wrong: exit status 2 and one line on stderr, `error: what is wrong; what to do`.

A few rows run as a user would run them; all others in processes forked from one that has imported torch already
(this file, run as a program, is that one), which costs milliseconds instead of seconds each.
"""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import h5py
import harness
import numpy as np
import pytest

TINY = "--num-updates", 4, "--hidden-sizes", 8, "--batch-size", 4, "--eval-workers", 0, "--eval-episodes", 1
TINY_SAC = "--num-steps", 20, "--learning-starts", 10, "--hidden-sizes", 8, "--batch-size", 4, "--eval-workers", 0


def fork_server():
    """Reads lines [script, flags, stdout, stderr] of JSON; answers each with the exit status of a forked process."""
    modules = {script: harness.load(script) for script in ("iql_red", "sac")}
    for env_id in "Hopper-v5", "Pendulum-v1":  # import once for all what they and the first optimiser import late
        modules["sac"].make_env({"id": env_id, "kwargs": {}}).close()
    importlib.import_module("torch._dynamo")
    for line in sys.stdin:
        script, flags, stdout, stderr = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for path, descriptor in (os.devnull, 0), (stdout, 1), (stderr, 2):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
            sys.argv, status = [modules[script].__file__, *flags], 0
            try:
                modules[script].main()
            except SystemExit as e:
                status = e.code
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status or 0)
        deadline = time.time() + 60
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.time() < deadline:
            time.sleep(0.01)
        if ended[0] == 0:
            os.kill(pid, 9), os.waitpid(pid, 0)
        print(json.dumps("no end" if ended[0] == 0 else os.waitstatus_to_exitcode(ended[1])), flush=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, *flags) as harness.run does it, but forked from a process that has imported the scripts."""
    if not hasattr(os, "fork"):
        yield harness.run
        return
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = tmp_path_factory.mktemp("outputs")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=folder)
    with subprocess.Popen([sys.executable, __file__], **pipes) as server:

        def forked(script, *flags):
            out, err = (folder / f"{len(list(folder.glob('*.*')))}.{name}" for name in ("out", "err"))
            out.touch(), err.touch()
            server.stdin.write(json.dumps([script, [str(x) for x in flags], str(out), str(err)]) + "\n")
            server.stdin.flush()
            status = json.loads(server.stdout.readline())
            return SimpleNamespace(returncode=status, stdout=out.read_text(), stderr=err.read_text())

        yield forked
        server.stdin.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A good Minari folder of Hopper's shape, shared by all tests that break something else."""
    return harness.write_minari(tmp_path_factory.mktemp("good") / "hopper", harness.hopper_episodes(4, 5))


@pytest.fixture(scope="module")
def runs(run, data, tmp_path_factory):
    """A finished run of either script."""
    folder = tmp_path_factory.mktemp("runs")
    for script, flags in ("iql_red", ("--dataset", data, *TINY)), ("sac", ("--env-id", "Pendulum-v1", *TINY_SAC)):
        done = run(script, *flags, "--eval-episodes", 1, "--run-dir", folder / script)
        assert done.returncode == 0, done.stderr
    return folder


def assert_one_error_line(done, *words):
    """The contract; `words` have to be in the line, so that it is *this* error that is told."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "; " in lines[0], done.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.fixture
def refuses(run, tmp_path):
    """refuses(script, *flags, words=(...)): the script ends with this error and leaves no run folder behind."""

    def check(script, *flags, words=()):
        assert_one_error_line(run(script, *flags, "--run-dir", tmp_path / "run"), *words)
        assert not (tmp_path / "run").exists()

    return check


def broken(tmp_path, breakage, episodes=None):
    """A Minari folder in which breakage(open HDF5 file) has changed something."""
    folder = harness.write_minari(tmp_path / "broken", episodes or harness.hopper_episodes(4, 5))
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        breakage(file)
    return folder


# -- as a user runs it ------------------------------------------------------------------------------------------------


def real_run(tmp_path, *flags, **env):
    done = harness.run("iql_red", *flags, "--run-dir", tmp_path / "run", timeout=60, **env)
    assert not (tmp_path / "run").exists()
    return done


def test_unknown_dataset_without_network(tmp_path):
    """A proxy where nobody listens: no network, on any machine."""
    done = real_run(tmp_path, "--dataset", "no/such-v0", HTTPS_PROXY="http://127.0.0.1:9", https_proxy="")
    assert_one_error_line(done, "no/such-v0", "network")


def test_unknown_dataset_and_a_server_that_never_answers(tmp_path):
    """The network takes the connection and stays silent: an error within seconds, no hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(server.accept()), daemon=True)
        thread.start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = real_run(tmp_path, "--dataset", "no/such-v0", HTTPS_PROXY=proxy, https_proxy=proxy, NO_PROXY="")
        thread.join(1)
        assert accepted, "the script did not use the proxy: this test shows nothing"
    assert_one_error_line(done, "no/such-v0", "network")


def test_truncated_file_as_a_user(tmp_path):
    path = harness.write_d4rl(tmp_path / "hopper-test-v2.hdf5", harness.hopper_episodes(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_one_error_line(real_run(tmp_path, "--dataset", path), "hopper-test-v2.hdf5", "broken")


def test_absent_package_as_a_user(data, tmp_path):
    done = real_run(tmp_path, "--dataset", data, "--env-id", "dm_control/hopper-hop-v0")
    assert_one_error_line(done, "dm_control/hopper-hop-v0", "pip install", "shimmy")


def test_flag_out_of_range_as_a_user(data, tmp_path):
    assert_one_error_line(real_run(tmp_path, "--dataset", data, "--gamma", 1.5), "--gamma", "1.5")


def test_device_that_is_not_there_as_a_user(data, tmp_path):
    assert_one_error_line(real_run(tmp_path, "--dataset", data, "--device", "cuda"), "cuda")


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["there/is/no.hdf5", "/there/is/no/folder", "hopper-nonsense-v2.hdf5"])
def test_path_that_is_not_there(refuses, name):
    refuses("iql_red", "--dataset", name, words=[name])


def test_folder_without_a_dataset(refuses, tmp_path):
    refuses("iql_red", "--dataset", tmp_path, words=[tmp_path])


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"not HDF5 at all" * 100])
@pytest.mark.parametrize("kind", ["d4rl", "minari"])
def test_empty_or_garbage_file(refuses, tmp_path, content, kind):
    path = tmp_path / "hopper-test-v2.hdf5"
    if kind == "minari":
        path = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 3)) / "data" / "main_data.hdf5"
    path.write_bytes(content)
    given = path if kind == "d4rl" else tmp_path / "m"
    refuses("iql_red", "--dataset", given, words=[given, "broken"])


@pytest.mark.parametrize("kind", ["d4rl", "minari"])
def test_truncated_file(refuses, tmp_path, kind):
    if kind == "d4rl":
        given = path = harness.write_d4rl(tmp_path / "a.hdf5", harness.hopper_episodes(20))
    else:
        given = harness.write_minari(tmp_path / "m", harness.hopper_episodes(20))
        path = given / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refuses("iql_red", "--dataset", given, words=[given, "broken"])


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_d4rl_file_without_an_array(refuses, tmp_path, key):
    path = harness.write_d4rl(tmp_path / "a.hdf5", harness.hopper_episodes(2, 3))
    with h5py.File(path, "a") as file:
        del file[key]
    refuses("iql_red", "--dataset", path, words=["broken", key])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"total_episodes": "4"}', "\x00\x01"])
def test_garbage_metadata(refuses, tmp_path, content):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(4, 5))
    (folder / "data" / "metadata.json").write_text(content)
    refuses("iql_red", "--dataset", folder, words=[folder, "broken"])


@pytest.mark.parametrize(
    "entries",
    [
        {"env_spec": "{"},
        {"env_spec": "[]"},
        {"env_spec": 7},
        {"env_spec": '{"id": "Hopper-v5", "kwargs": 3}'},
        {"total_episodes": 9},
        {"ref_min_score": "low"},
    ],
    ids=str,
)
def test_garbage_in_one_entry_of_the_metadata(refuses, tmp_path, entries):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(4, 5), **entries)
    refuses("iql_red", "--dataset", folder, words=[folder])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_nan_or_infinite_value(refuses, tmp_path, key, value):
    def spoil(file):
        file[f"episode_2/{key}"][3] = value

    refuses("iql_red", "--dataset", broken(tmp_path, spoil), words=["NaN or infinite"])


def test_nan_in_the_last_observation(refuses, tmp_path):
    def spoil(file):
        file["episode_1/observations"][-1] = np.nan

    refuses("iql_red", "--dataset", broken(tmp_path, spoil), words=["NaN or infinite"])


def test_nan_reward_of_a_step_that_gives_no_transition(refuses, tmp_path):
    """It is in no row, but in its episode's return, and so in every sampling probability."""
    episodes = harness.hopper_episodes(4, 5)
    episodes[1][2][-1] = np.nan  # truncated; without next_observations this step is dropped
    path = harness.write_d4rl(tmp_path / "hopper-test-v2.hdf5", episodes, next_observations=False)
    refuses("iql_red", "--dataset", path, words=["NaN or infinite"])


def test_number_too_large_for_float32(refuses, tmp_path):
    """Finite in the file, infinite in the tensor; numpy's warning does not reach the user."""

    def spoil(file):
        file["episode_2/rewards"][3] = 1e300

    refuses("iql_red", "--dataset", broken(tmp_path, spoil), words=["NaN or infinite"])


@pytest.mark.parametrize(
    "lengths",
    [(8, 5, 5, 5), (4, 5, 5, 5), (6, 4, 5, 5), (6, 6, 5, 5), (6, 5, 4, 5), (6, 5, 5, 4), (6, 5, 5, 6)],
    ids=str,
)
def test_arrays_of_one_episode_that_differ_in_length(refuses, tmp_path, lengths):
    """observations, actions, rewards, terminations; right would be 6 or 5, 5, 5, 5."""
    episode = [np.float32(x) for x in (np.ones((9, 11)), np.zeros((9, 3)), np.ones(9))] + [np.zeros(9, bool)] * 2
    episode = [array[:n] for array, n in zip(episode, (*lengths, 5))]
    folder = harness.write_minari(tmp_path / "m", [episode, *harness.hopper_episodes(2, 5)])
    refuses("iql_red", "--dataset", folder)


@pytest.mark.parametrize("fraction", ["0", "0.0", "1.5", "2"])
def test_fraction_out_of_range(refuses, data, fraction):
    refuses("iql_red", "--dataset", f"{data}:{fraction}", words=[fraction])


def test_no_episodes(refuses, tmp_path):
    refuses("iql_red", "--dataset", harness.write_minari(tmp_path / "m", [[np.zeros(0)] * 5], total_episodes=0))


def test_only_steps_without_transitions(refuses, tmp_path):
    episodes = [(np.ones((1, 11)), np.zeros((1, 3)), np.ones(1), np.zeros(1, bool), np.ones(1, bool))] * 3
    refuses("iql_red", "--dataset", harness.write_minari(tmp_path / "m", episodes), words=["empty"])


def test_datasets_of_different_shapes(refuses, data, tmp_path):
    other = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 5, obs_dim=17, action_dim=6))
    refuses("iql_red", "--dataset", data, other, words=["(11, 3)", "(17, 6)"])


# -- dataset and environment ------------------------------------------------------------------------------------------


def test_dataset_and_environment_that_do_not_fit(refuses, data):
    refuses("iql_red", "--dataset", data, "--env-id", "Walker2d-v5", words=["(11, 3)", "Walker2d-v5", "--env-id"])


def test_dataset_without_environment(refuses, tmp_path):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 5), env_spec=None)
    refuses("iql_red", "--dataset", folder, words=["--env-id", "--eval-episodes 0"])


@pytest.mark.parametrize("kind", ["minari", "d4rl"])
def test_discrete_actions_in_the_dataset(refuses, tmp_path, kind):
    episodes = [(o, np.arange(len(a)) % 2, *rest) for o, a, *rest in harness.hopper_episodes(2, 5, obs_dim=4)]
    if kind == "minari":
        given = harness.write_minari(tmp_path / "m", episodes, "CartPole-v1")
    else:
        given = harness.write_d4rl(tmp_path / "cartpole.hdf5", episodes)
    refuses("iql_red", "--dataset", given, *TINY, "--eval-episodes", 0, words=["discrete"])


@pytest.mark.parametrize("script", ["iql_red", "sac"])
def test_discrete_actions_in_the_environment(refuses, data, script):
    flags = ("--dataset", data) if script == "iql_red" else ()
    refuses(script, *flags, "--env-id", "CartPole-v1", words=["CartPole-v1", "Discrete", "continuous"])


@pytest.mark.parametrize("env_id, package", [("ALE/Pong-v5", "ale_py"), ("dm_control/hopper-hop-v0", "shimmy")])
@pytest.mark.parametrize("script", ["iql_red", "sac"])
def test_environment_whose_package_is_not_installed(refuses, data, script, env_id, package):
    try:
        __import__(package)
        pytest.skip(f"{package} is installed")
    except ImportError:
        pass
    flags = ("--dataset", data) if script == "iql_red" else ()
    refuses(script, *flags, "--env-id", env_id, words=[env_id, "not installed", "pip install", package])


@pytest.mark.parametrize("env_id", ["NoSuchEnv-v0", "Hopper-v99", "no/such-v0", "nonsense", "", "no_module:Env-v0"])
@pytest.mark.parametrize("script", ["iql_red", "sac"])
def test_unknown_environment(refuses, data, script, env_id):
    if script == "iql_red" and not env_id:
        pytest.skip("means: the dataset's own")
    flags = ("--dataset", data) if script == "iql_red" else ()
    refuses(script, *flags, "--env-id", env_id, words=[env_id])


def test_environment_refuses_the_datasets_keyword_arguments(refuses, tmp_path):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 5), env_kwargs={"no_such_argument": 1})
    refuses("iql_red", "--dataset", folder, words=["Hopper-v5", "no_such_argument"])


# -- flags ------------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("--num-updates", "0"),
    ("--num-updates", "-5"),
    ("--batch-size", "0"),
    ("--num-seeds", "0"),
    ("--seed", "-1"),
    ("--seed", "99999999999999999999999"),
    ("--hidden-sizes", "0"),
    ("--gamma", "1.01"),
    ("--gamma", "nan"),
    ("--polyak", "-0.1"),
    ("--expectile", "1.5"),
    ("--alpha", "-1"),
    ("--alpha", "nan"),
    ("--p-base", "-0.2"),
    ("--p-base", "nan"),
    ("--temperature", "0"),
    ("--learning-rate", "-1"),
    ("--learning-rate", "nan"),
    ("--learning-rate", "inf"),
    ("--beta", "-1"),
    ("--dropout", "1.5"),
    ("--dropout", "-0.5"),
    ("--eval-every", "0"),
    ("--eval-episodes", "-1"),
    ("--eval-workers", "-1"),
    ("--checkpoint-every", "0"),
    ("--log-every", "0"),
]


@pytest.mark.parametrize("flag, value", OUT_OF_RANGE)
def test_flag_out_of_range(refuses, data, flag, value):
    refuses("iql_red", "--dataset", data, *TINY, flag, value, words=[flag])


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--num-envs", "0"),
        ("--num-steps", "0"),
        ("--learning-starts", "0"),
        ("--replay-transitions", "0"),
        ("--num-rollout-steps", "0"),
        ("--polyak", "2"),
        ("--gamma", "-1"),
        ("--seed", "-1"),
    ],
)
def test_flag_out_of_range_in_sac(refuses, flag, value):
    refuses("sac", "--env-id", "Pendulum-v1", *TINY_SAC, flag, value, words=[flag])


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--alpha", "foo"), "foo"),
        (("--num-updates", "1.5"), "1.5"),
        (("--sampler", "best"), "best"),
        (("--no-such-flag", "3"), "--no-such-flag"),
        (("--alpha",), "--alpha"),
        (("--hidden-sizes", "--alpha", "1"), "--hidden-sizes"),
        (("stray",), "stray"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_parsed(refuses, data, flags, word):
    """The flag parser's own errors keep the contract: one line, no box."""
    refuses("iql_red", "--dataset", data, *flags, words=[word])


def test_help_is_no_error(run):
    done = run("iql_red", "--help")
    assert done.returncode == 0 and "--p-base" in done.stdout and "error:" not in done.stderr


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "foo", "cpu:x"])
@pytest.mark.parametrize("script", ["iql_red", "sac"])
def test_device_that_is_not_there(refuses, data, script, device):
    flags = ("--dataset", data) if script == "iql_red" else ("--env-id", "Pendulum-v1")
    refuses(script, *flags, "--device", device, words=[device, "--device"])


# -- run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flags", [("iql_red", TINY), ("sac", ("--env-id", "Pendulum-v1", *TINY_SAC))])
def test_existing_run_folder_is_never_overwritten(run, runs, data, script, flags):
    flags = ("--dataset", data, *flags) if script == "iql_red" else flags
    before = {path: path.read_bytes() for path in (runs / script).iterdir()}
    assert_one_error_line(run(script, *flags, "--run-dir", runs / script), runs / script)
    assert before == {path: path.read_bytes() for path in (runs / script).iterdir()}


def test_run_folder_that_cannot_be_made(run, data, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("iql_red", "--dataset", data, *TINY, "--run-dir", tmp_path / "file" / "run")
    assert_one_error_line(done, tmp_path / "file" / "run")


def test_save_replay_to_an_existing_folder(refuses, tmp_path):
    """... fails before the hours of training, not after."""
    for flag in "--save-replay", "--save-rollouts":
        refuses("sac", "--env-id", "Pendulum-v1", *TINY_SAC, flag, tmp_path, words=[tmp_path])


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("script, other", [("iql_red", "sac"), ("sac", "iql_red")])
def test_run_of_another_algorithm(run, runs, flag, script, other):
    before = {path: path.read_bytes() for path in (runs / other).iterdir()}
    assert_one_error_line(run(script, flag, runs / other), runs / other, f"{other}.py", f"{script}.py")
    assert before == {path: path.read_bytes() for path in (runs / other).iterdir()}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("script", ["iql_red", "sac"])
def test_folder_that_is_no_run(run, tmp_path, script, flag):
    assert_one_error_line(run(script, flag, tmp_path), tmp_path, "no run")
    assert_one_error_line(run(script, flag, tmp_path / "absent"), tmp_path / "absent", "no run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("config", ["", "[]", "{}", "{", '{"script": "iql_red", "args": {"no_such_flag": 1}}'])
def test_damaged_config(run, runs, tmp_path, flag, config):
    shutil.copytree(runs / "iql_red", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(config)
    assert_one_error_line(run("iql_red", flag, tmp_path / "run"), tmp_path / "run")


@pytest.mark.parametrize("flag, value", [("--batch-size", 5), ("--seed", 1), ("--alpha", 0.5), ("--gamma", 0.9)])
def test_flags_that_differ_when_a_run_goes_on(run, runs, flag, value):
    before = (runs / "iql_red" / "checkpoint.pt").read_bytes()
    assert_one_error_line(run("iql_red", "--resume", runs / "iql_red", flag, value), flag, runs / "iql_red")
    assert before == (runs / "iql_red" / "checkpoint.pt").read_bytes()


def test_flags_that_differ_when_a_sac_run_goes_on(run, runs):
    done = run("sac", "--resume", runs / "sac", "--env-id", "Hopper-v5")
    assert_one_error_line(done, "--env-id", runs / "sac")


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("script", ["iql_red", "sac"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "absent", "garbage", "other content"])
def test_damaged_checkpoint(run, runs, tmp_path, script, flag, damage):
    shutil.copytree(runs / script, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    if damage == "absent":
        path.unlink()
    elif damage == "other content":
        harness.load("iql_red").torch.save({"weights": {}}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 99}[damage])
    more = ("--num-steps", 40) if script == "sac" else ("--num-updates", 8)
    assert_one_error_line(run(script, flag, tmp_path / "run", *more), tmp_path / "run", "checkpoint")


def test_checkpoint_that_would_run_code(run, runs, tmp_path):
    """A checkpoint is data, too: torch's weights_only loader refuses what a pickle could call."""
    shutil.copytree(runs / "iql_red", tmp_path / "run")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    harness.load("iql_red").torch.save({"num_updates": 1, "agent": Trap()}, tmp_path / "run" / "checkpoint.pt")
    assert_one_error_line(run("iql_red", "--resume", tmp_path / "run", "--num-updates", 8), "checkpoint")
    assert not (tmp_path / "sprung").exists()


def test_evaluate_a_run_without_environment(run, tmp_path):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(2, 5), env_spec=None)
    done = run("iql_red", "--dataset", folder, *TINY, "--eval-episodes", 0, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_one_error_line(run("iql_red", "--evaluate", tmp_path / "run"), tmp_path / "run", "environment")


# -- degenerate data is no error --------------------------------------------------------------------------------------


def episodes_with_rewards(*episode_rewards):
    rng, episodes = np.random.default_rng(0), []
    for rewards in episode_rewards:
        T = len(rewards)
        ends = np.zeros((2, T), bool)
        ends[0, -1] = True
        episodes.append((rng.normal(size=(T + 1, 11)), rng.uniform(-1, 1, size=(T, 3)), np.float64(rewards), *ends))
    return episodes


DEGENERATE = {
    "all returns equal": [[1.0] * 6] * 4,
    "all rewards zero": [[0.0] * 6] * 4,
    "a single episode": [[1.0, 2.0, 3.0]],
    "a single transition": [[1.0]],
    "two transitions": [[1.0], [2.0]],
    "constant rewards": [[1.0] * 3, [1.0] * 9],
}


@pytest.mark.parametrize("sampler", ["red", "uniform", "reward", "top10", "aw", "rw"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_trains(run, tmp_path, name, sampler):
    folder = harness.write_minari(tmp_path / "m", episodes_with_rewards(*DEGENERATE[name]))
    flags = "--dataset", folder, *TINY, "--eval-episodes", 0, "--sampler", sampler, "--run-dir", tmp_path / "run"
    done = run("iql_red", *flags)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    torch = harness.load("iql_red").torch
    agent = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert agent["num_updates"] == 4 and all(x.isfinite().all() for x in agent.values())


def test_zero_return_episodes_with_p_base_0_get_a_warning(run, tmp_path):
    """2 of 3 episodes with 4 of 6 steps have return 0: the warning says what share can never be drawn; p_base heals."""
    folder = harness.write_minari(tmp_path / "m", episodes_with_rewards([0, 0, 0], [0, 0, 0, 0], [0, 0, 1]))
    flags = "--dataset", folder, *TINY, "--eval-episodes", 0
    done = run("iql_red", *flags, "--run-dir", tmp_path / "never")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: 7 of the 10 transitions (70.0%)") and "never drawn" in done.stderr
    healed = run("iql_red", *flags, "--p-base", 0.2, "--run-dir", tmp_path / "healed")
    assert healed.returncode == 0 and healed.stderr == ""


if __name__ == "__main__":
    fork_server()
