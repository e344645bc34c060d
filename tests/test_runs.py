"""A run of iql_red.py as its user sees it: the run folder, the last line, stopping, going on, evaluating.

Runs are compared on the CPU, bit by bit. One that was killed and resumed has to end like one that never stopped.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import harness
import numpy as np
import pytest

torch = pytest.importorskip("torch")

SMALL = "--hidden-sizes", 32, 32, "--batch-size", 32, "--eval-episodes", 2
HEADER = "update,seed,episode,return,length,normalized_score"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


def finish(*flags, **env):
    """A run that has to end well."""
    done = harness.run("iql_red", *flags, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def in_parallel(*calls):
    with ThreadPoolExecutor() as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two runs of two seeds that differ in --eval-workers only: {workers: (run folder, finished process)}."""
    folder = tmp_path_factory.mktemp("runs")
    flags = "--dataset", data, *SMALL, "--num-updates", 130, "--num-seeds", 2, "--eval-every", 50
    flags += "--checkpoint-every", 70, "--log-every", 25, "--seed", 5

    def run(workers):
        return folder / str(workers), finish(*flags, "--eval-workers", workers, "--run-dir", folder / str(workers))

    return dict(zip((0, 2), in_parallel(lambda: run(0), lambda: run(2))))


def weights(run_dir):
    """All tensors of a checkpoint that training goes on from, by a path of keys."""

    def walk(node, path):
        if isinstance(node, dict):
            return {k: v for key, value in node.items() for k, v in walk(value, f"{path}/{key}").items()}
        if isinstance(node, (list, tuple)):
            return {k: v for i, value in enumerate(node) for k, v in walk(value, f"{path}/{i}").items()}
        return {path: node}

    return walk(torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True), "")


def assert_same_end(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators; the same evaluations.csv."""
    ours, theirs = weights(run_dir), weights(reference)
    assert ours.keys() == theirs.keys()
    differ = [
        k for k in ours if not (torch.equal(ours[k], theirs[k]) if torch.is_tensor(ours[k]) else ours[k] == theirs[k])
    ]
    assert not differ, differ
    assert (Path(run_dir) / "evaluations.csv").read_text() == (Path(reference) / "evaluations.csv").read_text()


# -- the run folder ---------------------------------------------------------------------------------------------------


def test_config_says_how_the_run_was_made(runs, data):
    run_dir, _ = runs[0]
    config = json.loads((run_dir / "config.json").read_text())
    iql = harness.load("iql_red")
    assert config["script"] == "iql_red" and set(config["args"]) == set(iql.Args.__dataclass_fields__)
    assert config["args"]["num_updates"] == 130 and config["args"]["seed"] == 5 and config["args"]["num_seeds"] == 2
    assert config["args"]["dataset"] == [str(data)] and config["args"]["gamma"] == 0.99
    assert {"python", "torch", "numpy", "gymnasium", "mujoco"} <= set(config["versions"])
    assert config["versions"]["torch"] in torch.__version__
    assert "iql_red.py --dataset" in config["command"] and "--num-updates 130" in config["command"]
    assert config["environment"]["id"] == "Hopper-v5"
    git = subprocess.run(["git", "-C", harness.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert config["git_commit"] == (git.stdout.strip() if git.returncode == 0 else None)


def test_evaluations_csv(runs):
    """Every 50 updates and at the end, each seed, each episode; scores from the dataset's references (0 and 100)."""
    run_dir, _ = runs[0]
    assert (run_dir / "evaluations.csv").read_text().splitlines()[0] == HEADER
    rows = harness.read_evaluations(run_dir)
    expected = [(update, seed, e) for update in (50, 100, 130) for seed in (5, 6) for e in (0, 1)]
    assert list(zip(rows["update"], rows["seed"], rows["episode"])) == expected
    assert np.allclose(rows["normalized_score"], rows["return"], atol=1e-4)
    assert (rows["length"] >= 1).all() and (rows["length"] == rows["length"].astype(int)).all()
    assert len(set(rows["return"])) == len(expected)  # no two episodes start alike


def test_results_do_not_depend_on_the_number_of_workers(runs):
    """... and two runs with the same seed are bit-identical: these two differ in --eval-workers only (0 and 2; a run
    with 1 is compared with one of 0 where it is killed)."""
    assert_same_end(runs[2][0], runs[0][0])


def test_tensorboard_has_losses_values_evaluations_and_both_histograms(runs):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for run_dir in (runs[0][0], runs[2][0]):
        events = accumulator.EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "histograms": 0})
        events.Reload()
        for tag in "loss/value", "loss/actor", "loss/critic", "value/v", "value/q", "value/advantage_weight":
            scalars = events.Scalars(tag)
            assert [s.step for s in scalars] == [25, 50, 75, 100, 125], tag
            assert all(np.isfinite(s.value) for s in scalars), tag
        rows = harness.read_evaluations(run_dir)
        for tag, column in ("evaluation/return", "return"), ("evaluation/normalized_score", "normalized_score"):
            assert [s.step for s in events.Scalars(tag)] == [50, 100, 130]
            for s in events.Scalars(tag):
                assert s.value == pytest.approx(rows[column][rows["update"] == s.step].mean(), rel=1e-5)
        dataset = harness.load("iql_red").load_dataset(
            [json.loads((run_dir / "config.json").read_text())["args"]["dataset"][0]]
        )
        returns = np.repeat(dataset.episode_returns, dataset.episode_lengths)
        mass = (returns - returns.min()) / (returns - returns.min()).sum()
        for tag, weight in (
            ("data/transitions_by_return", np.full(len(returns), 1.0)),
            ("data/sampler_mass_by_return", mass),
        ):
            (histogram,) = events.Histograms(tag)
            counts, limits = (
                np.array(x) for x in (histogram.histogram_value.bucket, histogram.histogram_value.bucket_limit)
            )
            assert counts.sum() == pytest.approx(len(returns))  # both on one scale: they can be laid over each other
            bins = np.searchsorted(limits, returns - 1e-9)
            assert counts == pytest.approx(
                np.bincount(bins, weight, len(limits)) * len(returns) / weight.sum(), abs=1e-6
            )


def test_checkpoint_loads_as_plain_weights(runs):
    """weights_only=True: what anybody may open without trusting its author; nothing else is left in the folder."""
    run_dir, _ = runs[0]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["num_updates"] == 130
    assert {"agent", "generators"} <= set(checkpoint)
    assert any(name.startswith("target_critic") for name in checkpoint["agent"])
    assert not list(run_dir.glob("*.tmp"))


def test_last_line_says_what_was_reached(runs):
    """Mean over the last evaluations per seed, mean and spread over seeds; updates, their rate, and the folder."""
    for run_dir, done in runs.values():
        last, rows = done.stdout.splitlines()[-1], harness.read_evaluations(run_dir)
        per_seed = [rows["normalized_score"][rows["seed"] == seed].mean() for seed in (5, 6)]
        assert f"normalised score {np.mean(per_seed):.1f} ± {np.std(per_seed):.1f}" in last
        assert f"return {np.mean(per_seed):.1f} ± {np.std(per_seed):.1f}" in last  # the references are 0 and 100
        assert "random policy" in last and "expert" in last and "2 seed" in last
        assert re.search(r"\d updates/s", last) and str(run_dir) in last
        assert re.search(r"\b130 updates\b", last)


def test_one_evaluation_of_one_episode(data, tmp_path):
    """The smallest result, a single row, is summed up as any other; the default run folder is named after the data."""
    flags = "--dataset", data, *SMALL, "--num-updates", 10, "--eval-episodes", 1, "--eval-workers", 0
    done = finish(*flags, cwd=tmp_path)
    (run_dir,) = tmp_path.glob("runs/iql_red/*/0-*")
    (score,) = harness.read_evaluations(run_dir)["normalized_score"]
    assert f"normalised score {score:.1f} ± 0.0" in done.stdout.splitlines()[-1]


def test_without_references_there_are_raw_returns_only(data, tmp_path):
    """Pendulum is not in D4RL: its data without reference scores gives returns, and no score that is not a number."""
    episodes = harness.hopper_episodes(3, 8, obs_dim=3, action_dim=1)
    folder = harness.write_minari(tmp_path / "m", episodes, "Pendulum-v1", references=None)
    done = finish("--dataset", folder, *SMALL, "--num-updates", 10, "--eval-workers", 0, "--run-dir", tmp_path / "run")
    assert "return -" in done.stdout.splitlines()[-1] and "nan" not in done.stdout


def test_run_without_environment(tmp_path):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(), env_spec=None)
    flags = "--dataset", folder, *SMALL, "--eval-episodes", 0, "--num-updates", 60, "--eval-every", 20
    done = finish(*flags, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "evaluations.csv").read_text() == HEADER + "\n"
    assert str(tmp_path / "run") in done.stdout.splitlines()[-1] and "score" not in done.stdout.splitlines()[-1]
    assert weights(tmp_path / "run")["/num_updates"] == 60


def test_training_does_not_depend_on_whether_it_is_evaluated(tmp_path):
    """Actions are scaled to the environment's bounds also when nothing is evaluated (Pendulum: torques up to 2)."""
    episodes = [(o, 2 * a, *rest) for o, a, *rest in harness.hopper_episodes(3, 8, obs_dim=3, action_dim=1)]
    folder = harness.write_minari(tmp_path / "m", episodes, "Pendulum-v1", references=(0, 1))
    flags = "--dataset", folder, *SMALL, "--num-updates", 10, "--eval-workers", 0
    in_parallel(
        lambda: finish(*flags, "--eval-episodes", 1, "--run-dir", tmp_path / "with"),
        lambda: finish(*flags, "--eval-episodes", 0, "--run-dir", tmp_path / "without"),
    )
    with_, without = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(with_[k], without[k]) for k in with_ if k.startswith("/agent"))


# -- evaluating, going on after the end -------------------------------------------------------------------------------


def test_evaluate_trains_nothing(runs):
    run_dir, _ = runs[0]
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    lines = finish("--evaluate", run_dir, "--eval-episodes", 3).stdout.splitlines()
    for seed, line in zip((5, 6), lines):
        assert line.startswith(f"seed {seed}: ") and "3 episodes" in line
        assert re.search(r"normalised score -?\d", line) and re.search(r"return -?\d", line), line
    assert len(lines) == 2
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_evaluation_may_be_turned_on_when_a_run_is_over(data, tmp_path):
    """A run without evaluations has nothing to average; going on from its end prints the last line all the same."""
    flags = "--dataset", data, *SMALL, "--num-updates", 10, "--eval-episodes", 0, "--run-dir", tmp_path / "run"
    finish(*flags)
    done = finish("--resume", tmp_path / "run", "--eval-episodes", 2)
    assert "10 updates" in done.stdout.splitlines()[-1] and "Traceback" not in done.stderr


def test_capture_video(runs, tmp_path):
    """One film per seed where the machine can render; where it cannot, one line says so and no folder stays."""
    run_dir = tmp_path / "run"
    shutil.copytree(runs[0][0], run_dir)
    flags = "--evaluate", run_dir, "--eval-episodes", 1, "--capture-video"
    done = harness.run("iql_red", *flags, MUJOCO_GL="nonsense")
    assert done.returncode == 2 and not (run_dir / "videos").exists()
    assert re.fullmatch(r"error: .*MUJOCO_GL.*; .*\n", done.stderr), done.stderr
    done = harness.run("iql_red", *flags)
    if done.returncode == 2 and "no video can be rendered" in done.stderr:
        pytest.skip("this machine renders nothing")
    assert done.returncode == 0, done.stderr
    assert len(list((run_dir / "videos").glob("*.mp4"))) == 2


def test_resume_of_a_finished_run_changes_nothing(runs, tmp_path):
    """It says the last line again: the mean of the last 10 of these 30 evaluations, per seed, then over seeds."""
    run_dir, csv = tmp_path / "run", tmp_path / "run" / "evaluations.csv"
    shutil.copytree(runs[0][0], run_dir)
    rows = [f"{update},{seed},0,{update + 10 * seed},1,{2 * update}" for update in range(1, 31) for seed in (5, 6)]
    csv.write_text("\n".join([HEADER, *rows]) + "\n")
    before = csv.read_text()
    last = finish("--resume", run_dir).stdout.splitlines()[-1]
    assert "normalised score 51.0 ± 0.0" in last and "return 80.5 ± 5.0" in last, last
    assert csv.read_text() == before
    shutil.copy(runs[0][0] / "evaluations.csv", csv)
    assert_same_end(run_dir, runs[0][0])


def test_fewer_updates_than_the_run_already_has(runs, tmp_path):
    """An error, no traceback, and no harm to the run: not even its flags change."""
    shutil.copytree(runs[0][0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    done = harness.run("iql_red", "--resume", tmp_path / "run", "--num-updates", 60)
    assert "Traceback" not in done.stderr and done.returncode == 2
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_extend_a_finished_run(runs, tmp_path):
    """--resume with more --num-updates: the old evaluations stay, new ones follow, and the end is saved."""
    shutil.copytree(runs[0][0], tmp_path / "run")
    before = (tmp_path / "run" / "evaluations.csv").read_text()
    finish("--resume", tmp_path / "run", "--num-updates", 260)
    after = (tmp_path / "run" / "evaluations.csv").read_text()
    assert after.startswith(before)
    assert sorted(set(harness.read_evaluations(tmp_path / "run")["update"])) == [50, 100, 130, 150, 200, 250, 260]
    assert weights(tmp_path / "run")["/num_updates"] == 260
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # nor does TensorBoard forget the evaluation in between
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [s.step for s in events.Scalars("evaluation/return")] == [50, 100, 130, 150, 200, 250, 260]


def test_evaluating_a_resumed_run_leaves_it_to_go_on(runs, tmp_path):
    """--resume and --evaluate belong to the call: the one that wrote config.json last does not decide for the next."""
    run_dir, config = tmp_path / "run", tmp_path / "run" / "config.json"
    shutil.copytree(runs[0][0], run_dir)
    finish("--resume", run_dir)
    before = config.read_text()
    finish("--evaluate", run_dir, "--eval-episodes", 1)
    assert config.read_text() == before
    poisoned = json.loads(before)
    poisoned["args"]["evaluate"] = str(run_dir)  # as earlier versions of these scripts left it
    config.write_text(json.dumps(poisoned))
    finish("--resume", run_dir, "--num-updates", 140)
    assert weights(run_dir)["/num_updates"] == 140 and json.loads(config.read_text())["args"]["eval_episodes"] == 2


def test_resume_forgets_a_row_that_was_cut_off(tmp_path):
    """A kill in the middle of a write can leave `1` of a row that began with update 150: it is no row of update 1."""
    iql = harness.load("iql_red")
    args = iql.Args(eval_workers=0)
    row = "100,0,0,1.0,5,1.0000\n"
    (tmp_path / "evaluations.csv").write_text(HEADER + "\n" + row + "150,0,0,1.0,5,1.0000\n1")
    iql.Evaluator(args, {"id": "Hopper-v5", "kwargs": {}, "references": None}, tmp_path, None).resume(120, {}, None)
    assert (tmp_path / "evaluations.csv").read_text() == HEADER + "\n" + row


# -- stopping ---------------------------------------------------------------------------------------------------------


def start(*flags, **env):
    """A run in a session of its own, so that a signal can go to its process group as Ctrl-C does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    return subprocess.Popen(harness.command("iql_red", *flags), start_new_session=True, **pipes)


def members(session):
    """Processes of this session that are neither over nor zombies."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended while we looked
            continue
        if int(sid) == session and state != "Z":
            alive.append(int(stat.parent.name))
    return alive


def wait_until(condition, process, seconds=120):
    """Waits for condition() while the process runs."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.005)


def wait_for_a_checkpoint(run_dir, process):
    """Waits until there is a checkpoint, or a newer one than now."""
    path = Path(run_dir) / "checkpoint.pt"
    now = path.stat().st_mtime_ns if path.exists() else None
    wait_until(lambda: path.exists() and path.stat().st_mtime_ns != now, process)


def has_evaluations(run_dir):
    path = Path(run_dir) / "evaluations.csv"
    return path.exists() and len(path.read_text().splitlines()) > 1


def assert_no_orphans(process, seconds=30):
    deadline = time.time() + seconds
    while members(process.pid) and time.time() < deadline:
        time.sleep(0.05)
    left = members(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


LONG = "--num-updates", 1200, "--eval-every", 130, "--log-every", 90


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """unbroken(num_seeds, dropout): the folder of a LONG run that was never stopped."""

    @cache
    def run(num_seeds, dropout):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        flags = "--dataset", data, *SMALL, *LONG, "--num-seeds", num_seeds, "--dropout", dropout, "--eval-workers", 0
        finish(*flags, "--run-dir", folder)
        return folder

    return run


@needs_proc
@pytest.mark.parametrize(
    "num_seeds, workers, checkpoint_every, dropout, num_kills, seed",
    [
        (1, 0, 70, 0.0, 2, 11),  # checkpoints inside a block of 100 updates, killed twice
        (1, 0, 200, 0.0, 1, 22),  # checkpoints at the ends of blocks
        (2, 1, 140, 0.2, 1, 33),  # killed at the first checkpoint, when the evaluation at 130 is still under way
        (1, 0, 10**6, 0.0, 1, 44),  # killed when there is but the checkpoint that every run begins with
    ],
)
def test_a_killed_and_resumed_run_ends_like_one_never_stopped(
    data, unbroken, tmp_path, num_seeds, workers, checkpoint_every, dropout, num_kills, seed
):
    """kill -9 at a random moment after the first checkpoints, --resume: same bits, same csv, no orphans."""
    rng, victim = random.Random(seed), tmp_path / "victim"
    flags = "--dataset", data, *SMALL, *LONG, "--num-seeds", num_seeds, "--dropout", dropout, "--eval-workers", workers
    process = start(*flags, "--checkpoint-every", checkpoint_every, "--run-dir", victim)
    wait_for_a_checkpoint(victim, process)  # of no update
    for _ in range(num_kills):
        for _ in range(0 if checkpoint_every > 1200 else 1 if workers else rng.randint(1, 3)):
            wait_for_a_checkpoint(victim, process)
        time.sleep(0 if workers else rng.uniform(0, 0.1))
        assert process.poll() is None, "the run was over before it could be killed: make it longer"
        process.kill()
        process.wait()  # not communicate(): an orphan would hold the pipes open
        assert_no_orphans(process)
        state = torch.load(victim / "checkpoint.pt", weights_only=True)
        assert (0 if checkpoint_every > 1200 else 1) <= state["num_updates"] < 1200
        assert bool(state["pending_evaluations"]) == bool(workers)
        process = start("--resume", victim)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert_same_end(victim, unbroken(num_seeds, dropout))


def test_stop_and_resume_is_exact(data, unbroken, tmp_path):
    """A stop lands where no checkpoint was planned; resumed, the run ends as if it had never been stopped."""
    flags, stopped = ("--dataset", data, *SMALL, *LONG, "--eval-workers", 0), tmp_path / "stopped"
    process = start(*flags, "--checkpoint-every", 10**6, "--run-dir", stopped)
    wait_until(lambda: has_evaluations(stopped), process)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert 0 < torch.load(stopped / "checkpoint.pt", weights_only=True)["num_updates"] < 1200
    finish("--resume", stopped)
    assert_same_end(stopped, unbroken(1, 0.0))


STOPPED_IN_COLLECT = """
import os, signal, sys, harness
iql = harness.load("iql_red")
collect = iql.Evaluator.collect
def stopped_collect(self, wait=False):
    collect(self, wait)
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 2:
        os.kill(os.getpid(), signal.SIGTERM)
iql.Evaluator.collect = stopped_collect
sys.argv = [iql.__file__, *sys.argv[1:]]
iql.main()
"""


def test_a_stop_that_comes_between_two_blocks_saves_too(data, tmp_path):
    """A signal may come while the loop evaluates, logs or prints; also then nothing is lost and the message is true."""
    flags = "--dataset", data, *SMALL, *LONG, "--eval-workers", 0, "--run-dir", tmp_path / "run"
    command = [sys.executable, "-c", STOPPED_IN_COLLECT, *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["num_updates"]
    assert f"stopped at update {saved:,}" in done.stdout.splitlines()[-1]


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_first_and_says_how_to_go_on(data, tmp_path, number):
    """Ctrl-C, which reaches the workers too, and SIGTERM to all processes, as job schedulers send it: a checkpoint, a
    line that says how to go on, exit status 128 + signal, no orphans."""
    flags, stopped = ("--dataset", data, *SMALL, *LONG, "--eval-workers", 1), tmp_path / "stopped"
    flags += (
        "--checkpoint-every",
        10**6,
        "--num-updates",
        10**6,
        "--eval-every",
        10,
    )  # an evaluation is always under way
    process = start(*flags, "--run-dir", stopped)
    wait_until(lambda: has_evaluations(stopped), process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, out + err
    assert "Traceback" not in out + err and "BrokenProcessPool" not in out + err
    assert_no_orphans(process)
    last = out.splitlines()[-1]
    assert f"--resume {stopped}" in last
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert f"stopped at update {state['num_updates']:,}" in last


@needs_proc
def test_ctrl_c_while_the_workers_are_starting(data, tmp_path):
    """A worker imports torch for seconds before it can leave Ctrl-C to its parent; until then it must not die of it."""
    flags = "--dataset", data, *SMALL, "--num-updates", 10**6, "--eval-every", 50, "--eval-workers", 2
    process = start(*flags, "--run-dir", tmp_path / "run")
    wait_until(lambda: len(members(process.pid)) >= 4, process)  # itself, multiprocessing's tracker, two workers
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, (process.returncode, out + err)
    assert f"--resume {tmp_path / 'run'}" in out.splitlines()[-1]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["num_updates"] > 0
    assert_no_orphans(process)
