"""A run of each moved script as its user sees it: folder, stopping, going on, evaluating, seeds side by side.

Runs are compared on the CPU, bit by bit. Most start in processes forked from one that has imported the
scripts; where a test looks into a run, main() runs in this process, evaluations too.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import harness
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

torch = pytest.importorskip("torch")

HEADER = "update,seed,episode,return,length,normalized_score"
KILLS = int(os.environ.get("KILLS", 5))  # of the first script's run; 20 to be thorough
SHORT = "--eval-every", 60, "--log-every", 40, "--eval-episodes", 2

scripts = pytest.mark.parametrize("script", harness.OFFLINE, scope="module")
first_script = pytest.mark.parametrize("script", harness.OFFLINE[:1], scope="module")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "hopper"
    return harness.write_minari(folder, harness.hopper_episodes(), references=(5, 25))


def succeed(script, *flags, **options):
    done = harness.forked(script, *flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(script, data, tmp_path_factory):
    """A finished run of two seeds, not to be changed: its folder, flags, output."""
    folder = tmp_path_factory.mktemp(script) / "run"
    flags = "--dataset", data, *harness.small(script, dropout=0.2), *harness.length(script, 140), *SHORT
    flags += "--num-seeds", 2, "--seed", 5
    done = succeed(script, *flags, "--run-dir", folder)
    return folder, flags, done.stdout


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of it that may change."""
    return shutil.copytree(finished[0], tmp_path / "run")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def numbers(line):
    return [float(x) for x in re.findall(r"-?\d+\.\d", line)]


def events_of(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "histograms": 0}).Reload()


# The run folder -----------------------------------------------------------------------------------
@scripts
def test_run_folder(script, finished, data):
    folder, _, output = finished
    assert {"config.json", "evaluations.csv", "checkpoint.pt"} <= contents(folder).keys()
    assert not list(folder.glob("*.tmp")) and str(folder) in output.splitlines()[-1]
    config = json.loads((folder / "config.json").read_text())
    assert set(config["args"]) == set(harness.load(script).Args.__dataclass_fields__) - {"device"}
    assert config["args"]["dataset"] == [str(data)] and config["args"]["num_seeds"] == 2
    assert torch.__version__.startswith(config["versions"]["torch"]) and "--num-seeds" in config["command"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["num_updates"] == 140


@scripts
def test_evaluations(script, finished):
    """Every 60 updates and at the end, each seed, each episode, scored by the dataset's own references."""
    assert (finished[0] / "evaluations.csv").read_text().splitlines()[0] == HEADER
    rows = harness.read_evaluations(finished[0])
    found = list(zip(rows["update"], rows["seed"], rows["episode"]))
    assert sorted(found) == [(update, s, e) for update in (60, 120, 140) for s in (5, 6) for e in (0, 1)]
    assert np.allclose(rows["normalized_score"], 5 * (rows["return"] - 5), atol=1e-6)
    assert (rows["length"] >= 1).all() and len(set(rows["return"])) == len(found)  # no two start alike


def three_workers():
    torch.get_num_threads = lambda: 4


@scripts
def test_results_depend_neither_on_workers_nor_on_evaluation(script, finished, tmp_path):
    """One worker, three, none (in this process); where nothing is evaluated, training is the same."""
    folder, flags, _ = finished
    succeed(script, *flags, "--run-dir", tmp_path / "three", before=three_workers)
    harness.assert_same_end(tmp_path / "three", folder)
    harness.run_main(script, *flags, "--run-dir", tmp_path / "none")
    harness.assert_same_end(tmp_path / "none", folder)
    harness.run_main(script, *flags, "--eval-episodes", 0, "--run-dir", tmp_path / "without")
    assert harness.differing_leaves(tmp_path / "without", folder, "/agent") == []


@scripts
def test_tensorboard(script, finished):
    """Losses as logged, evaluations, and what the data returns: by transition, as drawn."""
    events = events_of(finished[0])
    losses = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")]
    assert len(losses) >= 2
    for tag in losses:
        assert {40, 80, 120} <= {s.step for s in events.Scalars(tag)}
    rows = harness.read_evaluations(finished[0])
    for tag, column in (("evaluation/return", "return"), ("evaluation/normalized_score", "normalized_score")):
        means = {s.step: s.value for s in events.Scalars(tag)}
        expected = {u: rows[column][rows["update"] == u].mean() for u in (60, 120, 140)}
        assert means == pytest.approx(expected, rel=1e-5)

    returns = np.array([episode[2].sum() for episode in harness.hopper_episodes()])
    lengths = np.array([len(episode[2]) for episode in harness.hopper_episodes()])
    transitions, draws = (
        events.Histograms(f"data/return_of_{name}")[0].histogram_value for name in ("transitions", "draws")
    )
    assert (transitions.num, transitions.sum) == (lengths.sum(), pytest.approx((returns * lengths).sum()))
    assert returns.min() < draws.sum / draws.num < returns.max()


@scripts
def test_batches_are_logged_steps_drawn_as_the_histogram_shows(script, data, tmp_path):
    """What `update` sees are logged steps, whose actions tell which; whatever becomes of the rewards."""
    flags = "--dataset", data, *harness.small(script), *harness.length(script, 140), *SHORT
    flags += "--eval-episodes", 0, "--batch-size", 64
    _, inputs = harness.record_updates(script, *flags, "--run-dir", tmp_path / "run")
    if script == "dered_iql":  # which rebalances only in its second stage
        inputs = {name: x[60:] for name, x in inputs.items()}
    logged = {}
    for obs, action, reward, terminated, _ in harness.hopper_episodes():
        for t in range(len(reward)):
            logged[round(float(action[t, 0]), 5)] = obs[t], obs[t + 1], action[t], terminated[t], reward.sum()
    drawn = [logged[round(float(x), 5)] for x in inputs["action"][..., 0].ravel()]
    obs, next_obs, action, terminated, returns = map(np.array, zip(*drawn))
    assert np.allclose(inputs["action"].reshape(action.shape), action, atol=2e-5)
    if "not_terminated" in inputs:
        assert np.array_equal(inputs["not_terminated"].ravel(), 1.0 - terminated)
    pairs = [(inputs[name], x) for name, x in (("obs", obs), ("next_obs", next_obs)) if name in inputs]
    seen = np.concatenate([x.reshape(len(obs), -1) for x, _ in pairs])
    expected = np.concatenate([x for _, x in pairs])
    for column in range(obs.shape[1]):  # as logged or normalised, but now and next in the same way
        assert abs(np.corrcoef(seen[:, column], expected[:, column])[0, 1]) > 1 - 1e-5

    shown = events_of(tmp_path / "run").Histograms("data/return_of_draws")[0].histogram_value
    assert abs(returns.mean() - shown.sum / shown.num) < 5 * returns.std() / np.sqrt(len(returns))
    transforms = harness.load(script).Args.__annotations__.get("reward_transform")
    for name in getattr(transforms, "__args__", ()):
        transformed = "--reward-transform", name, "--run-dir", tmp_path / name
        _, again = harness.record_updates(script, *flags, *transformed)
        assert np.array_equal(again["action"][-len(inputs["action"]) :], inputs["action"])


@first_script
def test_summary(script):
    """Of 30 evaluations of two episodes the mean of the last 10, for each seed, then over seeds."""
    summary = harness.load(script).summary
    order = [(u, e, seed) for u in range(1, 31) for e in (0, 1) for seed in (5, 6)]
    rows = [(u, seed, e, u + 10 * seed + e, 1, 2 * u) for u, e, seed in order]
    assert sorted(numbers(summary(np.array(rows, float), 2))) == [0.0, 5.0, 51.0, 81.0]
    alone = [row for row in rows if row[1] == 5]
    assert sorted(numbers(summary(np.array(alone, float), 1))) == [51.0, 76.0]


def frozen_clock():
    """Two runs start in the same second."""
    time.strftime = lambda *args: "20260101-000000"


@first_script
def test_run_folders_never_collide(script, data, finished, run_dir, tmp_path):
    """Two runs in one second have two; one that is there is not overwritten."""
    flags = "--dataset", data, *harness.small(script), "--num-updates", 20, "--eval-episodes", 0
    runs = [harness.fork(script, *flags, cwd=tmp_path, before=frozen_clock) for _ in range(2)]
    assert [harness.finish(run).returncode for run in runs] == [0, 0]
    assert len(list(tmp_path.glob(f"runs/{script}/**/checkpoint.pt"))) == 2
    before = contents(run_dir)
    assert harness.forked(script, *finished[1], "--run-dir", run_dir).returncode != 0
    assert contents(run_dir) == before


@scripts
def test_flags_that_would_train_something_else_are_refused(script):
    """Rates outside [0, 1]; periods that end between two chunks of updates."""
    Args = harness.load(script).Args
    rates = {"gamma": 1.5, "target_update_rate": -0.1, "dropout": 2.0, "expectile": 7.0, "stage2_rate": -0.1, "warm_up": 1.1}
    periods = {"num_updates": 130, "eval_every": 50, "log_every": 10, "stage2_updates": 30}
    for name, value in (rates | periods).items():
        if name in Args.__dataclass_fields__:
            with pytest.raises(SystemExit, match="^error: "):
                Args(**{name: value})


# Going on -----------------------------------------------------------------------------------------
@scripts
def test_resume_a_finished_run(script, run_dir, finished):
    """It changes nothing, with fewer updates neither; with more, old evaluations stay and new ones follow."""
    succeed(script, "--resume", run_dir)
    harness.assert_same_end(run_dir, finished[0])
    before = contents(run_dir)
    done = succeed(script, "--resume", run_dir, *harness.length(script, 80))
    harness.assert_same_end(run_dir, finished[0])
    assert "140 updates, 0/s" in done.stdout
    succeed(script, "--resume", run_dir, *harness.length(script, 200))
    assert contents(run_dir)["evaluations.csv"].startswith(before["evaluations.csv"])
    updates = [60, 120, 140, 180, 200]
    assert sorted(set(harness.read_evaluations(run_dir)["update"])) == updates
    assert harness.leaves(run_dir)["/num_updates"] == 200
    args = json.loads((run_dir / "config.json").read_text())["args"]
    assert args["num_updates"] + args.get("stage2_updates", 0) == 200
    assert sorted({s.step for s in events_of(run_dir).Scalars("evaluation/return")}) == updates


@scripts
def test_a_killed_and_resumed_run_ends_like_one_never_stopped(script, data, tmp_path):
    """kill -9 at random moments, every second time soon after a checkpoint: same bits, same evaluations."""
    num_kills = KILLS if script == harness.OFFLINE[0] else 2
    flags = "--dataset", data, *harness.small(script, dropout=0.2), *harness.length(script, 200 * num_kills)
    flags += "--eval-every", 100, "--log-every", 60, "--eval-episodes", 1, "--num-seeds", 2, "--run-dir"
    harness.run_main(script, *flags, tmp_path / "unbroken")
    victim = tmp_path / "victim"
    process = harness.fork(script, *flags, victim)
    harness.wait_for(victim / "config.json", process.is_alive)
    for kill in range(num_kills):
        if kill % 2 == 0:
            harness.wait_for(victim / "checkpoint.pt", process.is_alive, since=time.time())
        time.sleep(random.uniform(0, 1 if kill % 2 else 0.2))
        process.kill()
        process.join()
        harness.assert_no_orphans(process.pid)
        process = harness.fork(script, "--resume", victim, cwd=tmp_path)
    done = harness.finish(process)
    assert done.returncode == 0, done.stdout + done.stderr
    harness.assert_same_end(victim, tmp_path / "unbroken")


@first_script
@pytest.mark.parametrize("send", [os.killpg, os.kill])
def test_ctrl_c_as_a_user(script, data, tmp_path, send):
    """A run as it is typed, its dataset named relative to here; Ctrl-C, which reaches all processes, or only
    the first, while 5,000 evaluations wait. It ends soon, leaves no process, and goes on from another folder."""
    shutil.copytree(data, tmp_path / "log")
    flags = "--dataset", "log", *harness.small(script, dropout=0.2), "--num-updates", 200, "--eval-every", 40
    stopped = harness.command(script, *flags, "--eval-episodes", 5000, "--run-dir", "stopped")
    options = dict(cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # where these tests ignore it, too
    process = subprocess.Popen(stopped, **options, **silent, **heard)
    harness.wait_for(tmp_path / "stopped" / "checkpoint.pt", lambda: process.poll() is None)
    time.sleep(3)  # until a worker is at it
    send(process.pid, signal.SIGINT)
    try:
        assert process.wait(60) != 0
    finally:
        harness.assert_no_orphans(process.pid)
    (tmp_path / "elsewhere").mkdir()
    succeed(script, "--resume", tmp_path / "stopped", "--eval-episodes", 1, cwd=tmp_path / "elsewhere")
    succeed(script, *flags, "--eval-episodes", 1, "--run-dir", "unbroken", cwd=tmp_path)
    harness.assert_same_end(tmp_path / "stopped", tmp_path / "unbroken")


@scripts
def test_a_loss_that_is_not_finite_stops_the_run(script, data, tmp_path, monkeypatch):
    """... before the next checkpoint: the last good one stays."""
    update = harness.load(script).update
    calls = []

    def poisoned(agent, *args):
        calls.append(args)
        if len(calls) == 70:
            for parameter in agent.parameters():
                parameter.data.fill_(np.nan)
        return update(agent, *args)

    monkeypatch.setattr(harness.load(script), "update", poisoned)
    flags = "--dataset", data, *harness.small(script), *harness.length(script, 400, 120), "--eval-every", 40
    flags += "--log-every", 400, "--eval-episodes", 0, "--run-dir", tmp_path / "run"
    with pytest.raises(SystemExit, match="^error: "):
        harness.run_main(script, *flags)
    saved = harness.leaves(tmp_path / "run")
    assert saved["/num_updates"] == 40 and len(calls) == 80
    assert all(torch.as_tensor(x).isfinite().all() for x in saved.values())


# Evaluating ---------------------------------------------------------------------------------------
@scripts
def test_evaluate_trains_nothing_and_is_repeatable(script, run_dir):
    before = contents(run_dir)
    flags = "--evaluate", run_dir, "--eval-episodes", 3
    first, second = (succeed(script, *flags).stdout.splitlines()[-1] for _ in range(2))
    assert first == second and len(numbers(first)) >= 2
    assert contents(run_dir) == before


@scripts
def test_a_run_without_environment_can_be_evaluated_in_one(script, tmp_path):
    """... with D4RL's references, because the dataset has none; and goes on with evaluations."""
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(), env_spec=None, references=None)
    flags = "--dataset", folder, *harness.small(script), *harness.length(script, 140), *SHORT
    flags += "--run-dir", tmp_path / "run"
    harness.run_main(script, *flags, "--eval-episodes", 0)
    environment = "--env-id", "Hopper-v5", "--eval-episodes", 2
    done = succeed(script, "--evaluate", tmp_path / "run", *environment)
    mean, score = numbers(done.stdout.splitlines()[-1])[:2]
    assert score == pytest.approx(100 * (mean + 20.272305) / (3234.3 + 20.272305), abs=0.06)
    harness.run_main(script, "--resume", tmp_path / "run", *environment, *harness.length(script, 200))
    assert 200 in harness.read_evaluations(tmp_path / "run")["update"]


# Seeds side by side -------------------------------------------------------------------------------
@scripts
def test_a_seed_alone_is_the_same_seed_among_others(script, data, tmp_path):
    """Seed 3 of 0 to 4: equal first weights, equal draws; after 60 updates equal weights up to float32, and
    moments of Adam, which show a gradient's scale. Targets begin as what they follow."""
    flags = "--dataset", data, *harness.small(script), *harness.length(script, 60, 20), "--eval-episodes", 0
    among = "--num-seeds", 5, "--run-dir", tmp_path / "among"
    alone = "--seed", 3, "--run-dir", tmp_path / "alone"
    first, drawn = harness.record_updates(script, *flags, *among)
    first_alone, drawn_alone = harness.record_updates(script, *flags, *alone)
    assert not np.array_equal(drawn["action"][:, 2], drawn["action"][:, 3])
    for name, x in drawn_alone.items():
        same = x[:, 0] == drawn[name][:, 3] if x.ndim > 1 else x == drawn[name]  # some inputs have no seeds
        assert np.all(same), name

    def of_seed_3(x, alone):
        return x if x.shape == alone.shape else x.unflatten(0, (5, -1))[3]  # all seeds share a normaliser

    for name, x in first_alone.items():
        assert torch.equal(of_seed_3(first[name], x), x), name
        if name.startswith("target_"):
            assert torch.equal(x, first_alone[name.removeprefix("target_")])
    last = harness.leaves(tmp_path / "among")
    last_alone = harness.leaves(tmp_path / "alone")
    for name, x in last_alone.items():
        if not re.match("/(agent|optimizers)/", name) or x.numel() == 0:  # replay of an online stage
            continue
        assert (of_seed_3(last[name], x) - x).abs().max() <= 1e-3 * x.abs().max(), name
    assert any(not torch.equal(x, last_alone[f"/agent/{name}"]) for name, x in first_alone.items())
