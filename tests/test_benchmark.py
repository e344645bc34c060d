"""tests/benchmark: cells run once and go on after a kill, intervals are right, tables say what was measured.
The cells' script is a stand-in that makes fifteen evaluations in no time and notes how it was called."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness
import numpy as np
import pytest
import tyro

sys.path.insert(0, str(harness.ROOT / "tests" / "benchmark"))
import scores  # noqa: E402
import tables  # noqa: E402

STAND_IN = '''
import os, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags.get("--resume") or flags["--run-dir"])
how = "resume" if "--resume" in flags else "fresh"
os.chdir(Path(__file__).parent)
with open("journal", "a") as journal:
    journal.write(f"{how}\\n")
print(how, os.getpid(), os.environ.get("RAY_RAYLET_PID"), flush=True)
folder.mkdir(exist_ok=how == "resume")
first = int((folder / "checkpoint.pt").read_text()) if how == "resume" else 0
for update in range(first + 20, 301, 20):
    rows = [f"{u},{s},0,{u + s},9,{u + 1000 * s}" for u in range(20, update + 1, 20) for s in (0, 1)]
    rows.insert(0, "update,seed,episode,return,length,normalized_score")
    (folder / "evaluations.csv").write_text("\\n".join(rows))
    (folder / "checkpoint.pt").write_text(str(update))
    if update == 40 and os.path.exists("die"):
        os.unlink("die")
        os.kill(os.getpid(), 9)
    time.sleep(float(flags["--pause"]))
'''


class World:
    """A grid of three cells of the stand-in, and what becomes of it."""

    def __init__(self, folder, pause=0):
        self.folder = folder
        (folder / "stand_in.py").write_text(STAND_IN)
        script = os.path.relpath(folder / "stand_in", harness.ROOT / "algorithms")
        self.grid = folder / "toy.toml"
        self.grid.write_text(f'''
            title = "A title."
            claim = "A claim."
            script = "{script}"
            flags = "--pause {pause}"
            seeds = 2
            updates = 100
            pairs = [["b", "a"]]
            datasets = [{{name = "one"}}, {{name = "two"}}]
            rows = [{{name = "a"}}, {{name = "b", flags = "--from {{a}}", datasets = ["one"]}}]
        ''')
        self.args = scores.Args(self.grid, folder / "out", folder / "results", cpus=1)
        self.cells = scores.read_grid(self.grid)[1]
        self.a = self.cells["a", "one"]
        self.checkpoint = self.a.folder(self.args.out) / "checkpoint.pt"
        self.command = [sys.executable, scores.__file__, self.grid]
        self.command += ["--out", self.args.out, "--results", self.args.results]

    def journal(self):
        return (self.folder / "journal").read_text().split()

    def lines(self):
        return (self.folder / "results" / "toy.csv").read_text().splitlines()


def test_every_cell_runs_once(tmp_path):
    """Also where somebody else wants it at the same time, or a run was killed before its first checkpoint."""
    world = World(tmp_path, pause=0.02)
    world.checkpoint.parent.mkdir(parents=True)
    for _ in range(2):
        assert scores.run_cells([world.a, *world.cells.values()], world.args)
    assert world.journal() == ["fresh"] * 3 and len(world.lines()) == 1 + 3 * 2
    b = world.cells["b", "one"]
    assert str(world.checkpoint.parent) in b.command(world.args.out)  # {a} is filled in
    changed = world.a._replace(flags=(*world.a.flags, "--new", "1"))
    assert changed.name != world.a.name and b._replace(needs={"a": changed}).name != b.name


def test_a_killed_cell_goes_on(tmp_path):
    """And what needs it waits for it."""
    world = World(tmp_path)
    (tmp_path / "die").touch()
    a_and_b = [world.a, world.cells["b", "one"]]
    assert not scores.run_cells(a_and_b, world.args)
    assert world.journal() == ["fresh"] and not world.args.results.exists()
    assert scores.run_cells(a_and_b, world.args)
    assert world.journal() == ["fresh", "resume", "fresh"] and len(world.lines()) == 1 + 4
    assert ",1210,1300,300,normalized_score,20:1020 40:1040 60:1060 80:1080 " in world.lines()[2]


def test_scores_without_references_are_returns(tmp_path):
    (tmp_path / "evaluations.csv").write_text("update,seed,episode,return,length,normalized_score\n20,0,0,7,9,nan\n")
    (line,) = scores.read_scores(World(tmp_path).a, tmp_path)
    assert (line["score"], line["last10"], line["curve"]) == ("return", "7", "20:7")


def test_runs_end_with_their_parent(tmp_path):
    world = World(tmp_path, pause=60)
    runner = subprocess.Popen([*world.command, "--only", "^a-one"], start_new_session=True)
    harness.wait_for(world.checkpoint, lambda: runner.poll() is None)
    runner.kill()
    harness.assert_no_orphans(runner.pid)


def test_print(tmp_path):
    """Plain commands for what is left to do, each in the line of its cell."""
    world = World(tmp_path)
    scores.run_cells([world.a], world.args)
    done = subprocess.run([*world.command, "--print"], capture_output=True, text=True)
    lines = done.stdout.replace("python", sys.executable).splitlines()
    assert len(lines) == 3 and " : finished a-one" in lines[0]
    for line in lines:
        subprocess.run(line, shell=True, cwd=harness.ROOT, check=True)
    assert world.journal() == ["fresh"] * 3


def test_ray(tmp_path):
    """A node is killed with a cell on it: the cell goes on from its checkpoint on another node. What was finished
    there stays, also when all is asked for again."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    world = World(tmp_path, pause=0.5)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        node = cluster.add_node(num_cpus=1)  # for one cell at a time
        command = [*world.command, "--ray-address", cluster.address, "--ray"]
        runner = subprocess.Popen(command)
        while len([*world.args.out.glob("toy/*/checkpoint.pt")]) < 2:  # one is finished, the next under way
            assert runner.poll() is None
            time.sleep(0.01)
        assert world.journal() == ["fresh"] * 2 and len(world.lines()) == 1 + 2
        cluster.remove_node(node, allow_graceful=False)  # kill -9
        cluster.add_node(num_cpus=1)
        assert runner.wait(200) == 0
        subprocess.run(command, check=True, timeout=100)
    finally:
        cluster.shutdown()
    assert sorted(world.journal()) == ["fresh"] * 3 + ["resume"]  # none was begun anew, none ran twice
    seeds = [line.split(",")[2:4] for line in world.lines()[1:]]
    assert sorted(seeds) == sorted([cell.name, seed] for cell in world.cells.values() for seed in "01")
    logs = [path.read_text() for path in world.args.out.glob("toy/*.log")]
    (killed,) = [log for log in logs if "resume" in log]
    (_, process, first_node), (_, _, second_node) = [line.split() for line in killed.splitlines()]
    assert first_node != second_node and not os.path.exists(f"/proc/{process}")


def test_statistics():
    """Intervals against all resamples that there are, probabilities counted by hand."""
    x, y = np.array([1.0, 4.0, 10.0]), np.array([2.0, 3.0])
    of_x = [np.mean(drawn) for drawn in itertools.product(x, repeat=3)]
    of_y = [np.mean(drawn) for drawn in itertools.product(y, repeat=2)]
    of_both = [(a + b) / 2 for a in of_x for b in of_y]  # each stratum by itself
    for strata, exact in ([x], of_x), ([x, y], of_both):
        exact = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
        np.testing.assert_allclose(tables.interval(strata, tables.mean), exact)
    assert tables.improvement([[3, 1], [2, 2, 0]]) == pytest.approx((3 + 1) / 6)
    assert tables.improvement([[1], [1]]) == 0.5 and tables.improvement([[0], [1], [1], [0]]) == 0.5


def test_tables(tmp_path, monkeypatch):
    """From finished cells, one under way, one that was not begun."""
    world = World(tmp_path)
    monkeypatch.setattr(tables, "data_scores", lambda cells: (1.5, 9.0))
    (tmp_path / "die").touch()
    scores.run_cell(world.cells["a", "two"], world.args)
    scores.run_cell(world.a, world.args)
    shutil.rmtree(world.checkpoint.parent)  # the csv file is enough
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table: toy -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", [*map(str, world.command[1:]), "--write", str(document)])
    tables.main()
    text = document.read_text()
    assert text.startswith("before\n<!-- table: toy -->\nA title. A claim.\n")
    assert text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| the data | mean 1.5 | best 9.0 | mean 1.5 | best 9.0 |" in text
    of_one = "710.0 [210.0, 1210.0] | 800.0 [300.0, 1300.0]"  # seeds: 20, 40, ..., 300, and 1000 more
    assert f"| a | {of_one} | 530.0 [30.0, 1030.0] (to 40) | 540.0 [40.0, 1040.0] |" in text
    assert "| b |" not in text and "cells are open" in text and "P(b > a)" not in text
    picture = (world.args.results / "toy_one.svg").read_text()
    assert "toy on one: mean of 2 seeds" in picture and "the data's best" in picture


def test_a_run_that_starts_from_another(tmp_path):
    """The last policies of one run, evaluated anew."""
    (tmp_path / "real.toml").write_text('''
        script = "iql_red"
        flags = "--hidden-sizes 8 8 --batch-size 8 --eval-every 20 --log-every 20 --device cpu"
        seeds = 2
        updates = 40
        datasets = [{name = "hopper/expert-v0"}]
        rows = [{name = "run", flags = "--eval-episodes 1"},
                {name = "again", start = "run", flags = "--eval-episodes 2"}]
    ''')
    first, again = scores.read_grid(tmp_path / "real.toml")[1].values()
    harness.run_main("iql_red", *first.command(tmp_path)[1:])
    scores.copy_policies(first.folder(tmp_path), again.folder(tmp_path))
    harness.run_main("iql_red", *again.command(tmp_path)[1:])
    assert harness.read_evaluations(again.folder(tmp_path))["update"].tolist() == [40] * 4
    assert harness.differing_leaves(first.folder(tmp_path), again.folder(tmp_path), "/agent") == []
    assert 70 < tables.data_scores([first])[0] < tables.data_scores([first])[1] < 100


@pytest.mark.parametrize("grid", [path.stem for path in harness.ROOT.glob("tests/benchmark/grids/*.toml")])
def test_scripts_accept_the_flags_of_grids(grid):
    content, cells = scores.read_grid(harness.ROOT / "tests" / "benchmark" / "grids" / f"{grid}.toml")
    assert all({*pair} <= {row for row, _ in cells} for pair in content.get("pairs", []))
    assert content["title"] and content["claim"] and len({x.name for x in cells.values()}) == len(cells)
    for cell in cells.values():
        tyro.cli(harness.load(Path(cell.script).name).Args, args=list(cell.flags))
