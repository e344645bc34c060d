"""Runs the cells of a grid, and appends their scores to tests/results/GRID.csv.

    python tests/benchmark/scores.py tests/benchmark/grids/red.toml --jobs 2
    python tests/benchmark/scores.py tests/benchmark/grids/red.toml --ray --ray-address auto
    python tests/benchmark/scores.py tests/benchmark/grids/red.toml --print

A cell is a row of the grid on one of its datasets. It runs as a process of its own in OUT/GRID/CELL, and
prints to CELL.log beside it. Who calls this again goes on: finished cells are never run twice, others go on
from their last checkpoint. A cell's name ends with a hash of its flags: who changes them gets another run.
Machines of a cluster share a disk, with OUT and this repository. grids/red.toml says what a grid can have.
"""

import csv
import ctypes
import fcntl
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
# of scripts that do not count in --num-updates
LENGTH = dict.fromkeys(["sac", "td3", "dqn_atari", "rem_online_atari"], "--num-steps") | {"bred": "--online-steps"}


@dataclass
class Args:
    grid: tyro.conf.Positional[Path]  # a file of grids/
    out: Path = ROOT / "runs" / "benchmark"  # run folders go to OUT/GRID/CELL
    results: Path = ROOT / "tests" / "results"  # scores are appended to RESULTS/GRID.csv
    only: str = ""  # only cells whose name matches this regular expression
    jobs: int = 2  # local processes at a time
    cpus: int | None = None  # threads of a cell, and what Ray reserves for it; default: the grid's, or 1
    gpus: float | None = None  # what Ray reserves for a cell, 0.5: two share one; default: the grid's, or 0
    ray: bool = False  # run on Ray instead of local processes
    ray_address: str | None = None  # of a running cluster, also `auto`; default: Ray on this machine
    print: bool = False  # print the commands that are left to run, one a line, run nothing


class Cell(NamedTuple):
    grid: str
    row: str
    dataset: str
    script: str
    flags: tuple[str, ...]  # all but the run folder; {ROW} is not filled in
    start: str  # row whose last checkpoint is the first of this run, or nothing
    needs: dict  # cells by row, whose folders this one reads

    @property
    def name(self):
        made_of = self.script, self.flags, self.start, [cell.name for cell in self.needs.values()]
        identity = hashlib.sha1(repr(made_of).encode()).hexdigest()[:6]
        return re.sub(r"[^a-z0-9]+", "-", f"{self.row} {self.dataset}".lower()).strip("-") + f"-{identity}"

    def folder(self, out):
        return Path(out) / self.grid / self.name

    def command(self, out):
        """How the cell is started, or goes on where there is a checkpoint."""
        folder = self.folder(out)
        flags = list(self.flags)
        for row, cell in self.needs.items():
            flags = [str(cell.folder(out)) if flag == f"{{{row}}}" else flag for flag in flags]
        where = "--run-dir"
        if self.start or (folder / "checkpoint.pt").exists():
            where = "--resume"
        return [f"algorithms/{self.script}.py", *flags, where, str(folder)]


def read_grid(path):
    """A grid file as a dict, and its cells by row and dataset, those that others need first."""
    grid = tomllib.loads(Path(path).read_text())
    cells = {}
    for dataset in grid["datasets"]:
        for row in grid["rows"]:
            if dataset["name"] not in row.get("datasets", [dataset["name"]]):
                continue
            settings = grid | dataset | row
            source = settings.get("source", f"--dataset {dataset['name']}")
            flags = [source, *(part.get("flags", "") for part in (grid, dataset, row))]
            flags.append(f"--seed {settings.get('first_seed', 0)} --num-seeds {settings['seeds']}")
            flags.append(f"{LENGTH.get(settings['script'], '--num-updates')} {settings['updates']}")
            flags = tuple(shlex.split(" ".join(flags)))
            start = row.get("start", "")
            needed = [flag[1:-1] for flag in flags if flag.startswith("{")]
            if start:
                needed.append(start)
            needs = {name: cells[name, dataset["name"]] for name in needed}
            key = row["name"], dataset["name"]
            cells[key] = Cell(Path(path).stem, *key, settings["script"], flags, start, needs)
    return grid, cells


# Scores -------------------------------------------------------------------------------------------
def read_scores(cell, folder):
    """A line a seed, a dict each, of a run's evaluations so far."""
    path = Path(folder) / "evaluations.csv"
    if not path.exists():
        return []
    rows = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
    rows.dtype.names = [name.rstrip("_") for name in rows.dtype.names]  # numpy makes `return` a `return_`
    kind = "normalized_score"
    if np.isnan(rows[kind]).any():
        kind = "return"
    lines = []
    for seed in np.unique(rows["seed"]):
        mine = rows[rows["seed"] == seed]
        updates = np.unique(mine["update"])
        scores = [mine[kind][mine["update"] == update].mean() for update in updates]  # over episodes
        curve = " ".join(f"{update:.0f}:{score:.5g}" for update, score in zip(updates, scores))
        line = {"row": cell.row, "dataset": cell.dataset, "cell": cell.name, "seed": int(seed)}
        line |= {"last10": f"{np.mean(scores[-10:]):.5g}", "best": f"{max(scores):.5g}"}
        lines.append(line | {"updates": int(updates[-1]), "score": kind, "curve": curve})
    return lines


def append(path, lines):
    """Adds lines to a csv file in one write, so that nobody sees or leaves half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.DictWriter(text, lines[0], lineterminator="\n")
        if os.fstat(file.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerows(lines)
        os.write(file.fileno(), text.getvalue().encode())


def circumstances(cell):
    """Commit (+: with changes), hardware, date and command of a cell that ends now."""

    def output_of(command):
        return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = output_of("git rev-parse --short=10 HEAD")
    if output_of("git status --porcelain algorithms"):
        commit += "+"
    gpu = output_of("nvidia-smi --query-gpu=name --format=csv,noheader").replace("\n", ", ")
    cpu = output_of("grep -m 1 'model name' /proc/cpuinfo").partition(": ")[2]
    hardware = gpu or f"{os.cpu_count()} cores of {cpu or os.uname().machine}"
    command = shlex.join([f"algorithms/{cell.script}.py", *cell.flags])
    return {"commit": commit, "hardware": hardware, "date": time.strftime("%Y-%m-%d"), "command": command}


# Running ------------------------------------------------------------------------------------------
def copy_policies(source, folder):
    """A run folder with the last checkpoint of another one, but none of its evaluations."""
    import torch

    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    checkpoint = torch.load(source / "checkpoint.pt", "cpu", weights_only=True)
    checkpoint["rows"] = checkpoint["rows"][:0]
    torch.save(checkpoint, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def run_cell(cell, args, *needs):
    """Runs a cell or goes on with it, after those that it needs. Returns whether it is finished."""
    folder = cell.folder(args.out)
    if not all(needs):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # whose run inherits it: two of them would spoil each other
        if (folder / "finished").exists():
            return True
        if not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)  # killed before its first one
            if cell.start:
                copy_policies(cell.needs[cell.start].folder(args.out), folder)
        end_with_parent = None
        if sys.platform == "linux":  # or a killed worker of Ray would leave its run behind
            end_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": str(args.cpus), "PYTHONPATH": path.strip(os.pathsep)}
        command = [sys.executable, *cell.command(args.out)]
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=end_with_parent)
        done = subprocess.run(command, cwd=ROOT, env=env, **options)
        if done.returncode:
            print(f"FAILED {folder}.log says why; then call this again", flush=True)
            return False
        lines = [line | circumstances(cell) for line in read_scores(cell, folder)]
        if lines:
            append(args.results / f"{cell.grid}.csv", lines)
        (folder / "finished").touch()
    print(f"finished {cell.name}", *(line["last10"] for line in lines), flush=True)
    return True


def run_cells(cells, args):
    """Runs all cells, side by side but after those that they need. Returns whether all are finished."""

    def run_here(cell, args, *needed):  # these came before it, so that they are running or over
        return pool.submit(lambda: run_cell(cell, args, *(job.result() for job in needed)))

    pool = ThreadPoolExecutor(args.jobs)
    submit = run_here
    result = Future.result
    if args.ray:
        import ray

        # without `local` it waits minutes for any cluster that once ran here, and is no more
        ray.init(address=args.ray_address or "local")
        # a task whose worker or node dies is started again elsewhere, and goes on from the checkpoint
        submit = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=10)(run_cell).remote
        result = ray.get
    jobs = {}
    for cell in cells:
        needed = [jobs[x.name] for x in cell.needs.values() if x.name in jobs]
        jobs[cell.name] = submit(cell, args, *needed)
    try:
        return all([result(job) for job in jobs.values()])
    except KeyboardInterrupt:
        os._exit(130)  # at once: threads would begin what is queued


def main():
    args = tyro.cli(Args, description=__doc__)
    args.out = args.out.resolve()
    args.results = args.results.resolve()
    grid, cells = read_grid(args.grid)
    args.cpus = args.cpus or grid.get("cpus", 1)
    args.gpus = args.gpus or grid.get("gpus", 0)
    cells = [cell for cell in cells.values() if re.search(args.only, cell.name)]
    if not args.print:
        sys.exit(not run_cells(cells, args))
    for cell in cells:
        command = ["python", *cell.command(args.out)]
        if cell.start:
            command[1:] = ["tests/benchmark/scores.py", args.grid, "--out", args.out, "--only", cell.name]
        if (cell.folder(args.out) / "finished").exists():
            command = [":", "finished", cell.name]  # does nothing, but the others keep their numbers
        print(f"OMP_NUM_THREADS={args.cpus} PYTHONPATH=tests", shlex.join(map(str, command)))


if __name__ == "__main__":
    main()
