"""benchmark.py: cells are run, gone on with and tabled; every grid's cells name scripts and flags that exist."""

import re
import shlex
import shutil
from pathlib import Path
from threading import Lock

import benchmark
import harness
import numpy as np
import pytest


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """A cell of ten updates on synthetic data, with results in a folder of their own."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    data = harness.write_minari(tmp_path / "hopper", harness.hopper_episodes())
    flags = "--sampler", "red", "--hidden-sizes", "8", "8", "--batch-size", "16", "--eval-episodes", "1"
    cell = benchmark.Cell("tiny", "iql_red", str(data), "red", flags, num_seeds=2, num_updates=40)
    yield cell
    shutil.rmtree(harness.ROOT / "runs" / "benchmark" / cell.run, ignore_errors=True)


def test_a_stopped_cell_goes_on(cell, tmp_path):
    """A cell that finds its run folder resumes it; scores and curves are those of a run that was not stopped."""
    run_dir = harness.ROOT / "runs" / "benchmark" / cell.run
    benchmark.run_cell(cell, Lock())
    assert not run_dir.exists()
    whole = [benchmark.read(benchmark.RESULTS / name) for name in ("scores.csv", "curves.csv")]
    shutil.rmtree(benchmark.RESULTS)

    script, *flags = cell.command
    done = harness.run("iql_red", *flags, "--run-dir", run_dir)  # as if stopped when all but the tables was done
    assert done.returncode == 0, done.stderr
    before = harness.read_evaluations(run_dir)
    benchmark.run_cell(cell, Lock())
    resumed = [benchmark.read(benchmark.RESULTS / name) for name in ("scores.csv", "curves.csv")]
    for rows in (*whole, *resumed):
        for row in rows:
            row.pop("seconds", None)
    assert resumed == whole and len(whole[0]) == 2 and len(whole[1]) == 2 * 20

    for row in whole[0]:  # the mean of the last ten of the twenty evaluations, by hand
        mine = (before["seed"] == int(row["seed"])) & (before["update"] > 20)
        assert np.isclose(float(row["last10_score"]), before["normalized_score"][mine].mean(), atol=2e-3)
        assert np.isclose(float(row["last10_return"]), before["return"][mine].mean(), atol=2e-3)


def test_both_evaluations_of_a_run_are_scored(cell):
    """One run of a scaled script fills two cells: the mean action's and the best of 50's."""
    flags = "--hidden-sizes", "8", "8", "--batch-size", "16", "--eval-episodes", "1"
    cell = benchmark.replace(cell, script="asac", variant="small", flags=flags, num_seeds=1)
    best = cell.evaluated("_m50")
    assert (best.variant, best.run, best.command) == ("small, M=50", cell.run + "_m50", cell.command)
    benchmark.run_cell(cell, Lock())
    scores = {row["run"]: row for row in benchmark.read(benchmark.RESULTS / "scores.csv")}
    assert {run: row["variant"] for run, row in scores.items()} == {cell.run: "small", best.run: "small, M=50"}
    assert scores[cell.run]["last10_score"] != scores[best.run]["last10_score"]
    curves = [row["run"] for row in benchmark.read(benchmark.RESULTS / "curves.csv")]
    assert curves.count(cell.run) == curves.count(best.run) == 20


@pytest.mark.parametrize("grid", benchmark.GRIDS)
def test_grids_name_flags_that_exist(grid, monkeypatch):
    """Each cell's command line parses; hours are not the time to find a typo."""
    cells = benchmark.GRIDS[grid]
    for cell in [*cells, *(cell.members for cell in cells if cell.members)]:
        monkeypatch.setattr("sys.argv", cell.command)
        args = harness.load(cell.script).parse_args()
        if cell.script == "sac":
            assert args.num_steps == cell.num_updates and args.env_id.lower().startswith(cell.dataset.split("/")[0])
        else:
            assert args.num_updates == cell.num_updates and args.dataset == tuple(cell.dataset.split(" + "))
    assert grid in benchmark.TITLES


def test_online_curves_begin_with_the_first_step():
    """Two seeds, 100 updates and then steps: what came before is left out, the dip is found; sac.py begins at 0."""
    values = {50: 90, 100: 30, 110: 20, 120: 10, 130: 60}
    curves = [
        {"run": "ours", "seed": str(seed), "update": str(n), "normalized_score": str(x + 4 * seed)}
        for n, x in values.items()
        for seed in range(2)
    ]

    class Ours(benchmark.Cell):
        run = "ours"

    cell = Ours("tiny", "bred", "hopper/replay-v0", "BRED", (), 2, 100, online=True)
    assert [row["update"] for row in benchmark.online_curve(cell, curves)] == [0, 0, 10, 10, 20, 20, 30, 30]
    assert benchmark.online_summary(cell, curves) == " (from 32.0, lowest 12.0)"
    sac = Ours("tiny", "sac", "hopper/replay-v0", "SAC", (), 2, 130, online=True)
    assert benchmark.online_summary(sac, curves) == " (lowest 12.0)"
    offline = Ours("tiny", "bred", "hopper/replay-v0", "CQL", (), 2, 100)
    assert [row["update"] for row in benchmark.online_curve(offline, curves)][::2] == list(values)


@pytest.mark.parametrize("script", benchmark.UPDATE_PATHS)
def test_throughput_runs_the_real_updates(script):
    """The update path that is timed moves the agent as many steps as it says."""
    import torch

    benchmark.UPDATE_PATHS[script].products(11, 3, 256, (256, 256))
    module, device = harness.load(script), torch.device("cpu")
    steps = []
    original, module.update = module.update, lambda *args: steps.append(1) or original(*args)
    try:
        run, draw = benchmark.UPDATE_PATHS[script].start(script, "red", 1, device, num_transitions=1000)
        run(20)
        assert len(steps) == 20 and len(draw(100)[0]) == module.UPDATES_PER_BLOCK
    finally:
        module.update = original


@pytest.mark.parametrize("document", ["README.md", "tests/data/README.md"])
def test_commands_in_the_documents_parse(document, monkeypatch):
    """Every command line of a script that a document shows has flags and values that the script takes."""
    commands = re.findall(r"python (algorithms/\w+\.py[^\n`#|&]*)", (harness.ROOT / document).read_text())
    assert len(commands) > 5
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        harness.load(Path(command.split()[0]).stem).parse_args()
