"""Throughput and scores, the two kinds of numbers in benchmarks.md.

python tests/benchmark.py throughput                     updates per second beside the matrix-product floor
python tests/benchmark.py scores                         runs what is missing from the grids, then writes the tables
python tests/benchmark.py scores --grids p_base --jobs 2 one grid, two runs at a time
python tests/benchmark.py tables                         tables in benchmarks.md and pictures, from what is there

`scores` appends to results/scores.csv and results/curves.csv after every run; a run that is there is not made again,
so an interrupted grid goes on where it stopped.
"""

import csv
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from threading import Lock
from typing import Annotated

import harness
import numpy as np
import torch
import tyro

RESULTS = Path(__file__).resolve().parent / "results"

# ---------------------------------------------------------------------------------------------------------------------
# Throughput
# ---------------------------------------------------------------------------------------------------------------------


def mlp_products(sizes, batch, backward, copies=1):
    """Matrix products (m, k, n) of `copies` MLPs on a batch: forward, and backward but for the input's gradient."""
    products = []
    for layer, (i, o) in enumerate(pairwise(sizes)):
        products.append((batch, i, o))
        if backward:
            products.append((i, batch, o))  # weights
            if layer > 0:
                products.append((batch, o, i))  # input of the layer
    return products * copies


def iql_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one IQL update of one seed cannot do without."""
    return [
        *mlp_products([O, *H, 1], B, backward=True),  # V step
        *mlp_products([O, *H, 1], 2 * B, backward=False),  # V(s), V(s') after it
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # target critics
        *mlp_products([O + A, *H, 1], B, backward=True, copies=2),  # critics
        *mlp_products([O, *H, A], B, backward=True),  # actor
    ]


def td3_bc_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one TD3+BC update of one seed cannot do without, on average: the actor's turn is every
    other update, so its products have half of the batch."""
    return [
        *mlp_products([O, *H, A], B, backward=False),  # target actor
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # target critics
        *mlp_products([O + A, *H, 1], B, backward=True, copies=2),  # critics
        *mlp_products([O, *H, A], B // 2, backward=True),  # actor
        *mlp_products([O + A, *H, 1], B // 2, backward=False),  # Q_1 at its actions
        *((B // 2, o, i) for i, o in pairwise([O + A, *H, 1])),  # and back to these
    ]


def crr_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one CRR update of one seed cannot do without."""
    return [
        *mlp_products([O + A, *H, 1], B, backward=True),  # critic at the logged actions
        *mlp_products([O, *H, 2 * A], B, backward=True),  # actor
        *mlp_products([O + A, *H, 1], 4 * B, backward=False),  # critic at 4 actions of the policy
        *mlp_products([O, *H, 2 * A], B, backward=False),  # target actor
        *mlp_products([O + A, *H, 1], B, backward=False),  # target critic
    ]


def cql_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one CQL update of one seed cannot do without, at 10 actions from each source."""
    K = 31  # actions at each state that the critics learn from; the first layer's part for the state is made once
    return [
        *mlp_products([O, *H, 2 * A], B, backward=True),  # actor at s
        *mlp_products([O, *H, 2 * A], B, backward=False),  # actor at s'
        *mlp_products([O + A, *H, 1], B, backward=False, copies=4),  # target critics, critics at the policy's action
        *[(B, o, i) for i, o in pairwise([A, *H, 1])] * 2,  # their gradient towards that action
        *[(B, O, H[0]), (O, B, H[0])] * 2,  # critics: the state's part of the first layer
        *mlp_products([A, *H, 1], K * B, backward=True, copies=2),  # all the rest of the critics
    ]


def dered_iql_products(O, A, B, H):  # noqa: E741
    """Those of stage 2: an IQL update without the weight gradients of the frozen heads."""
    products = iql_products(O, A, B, H)
    for head in [(H[-1], B, 1), (H[-1], B, A), *[(H[-1], B, 1)] * 2]:
        products.remove(head)
    return products


def rvs_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one update of the conditioned policy of one seed cannot do without."""
    return mlp_products([O, *H, A], B, backward=True)


@dataclass
class UpdatePath:
    """What `throughput` must know of an offline script to run its updates as its main loop does."""

    agent: str
    """name of the agent's class"""
    products: Callable
    """(O, A, B, hidden_sizes) -> the matrix products (m, k, n) of one update of one seed"""
    noise_shapes: Callable = lambda args, A: ()
    """what main() asks of draw_block"""
    more: Callable = lambda module, args, generators: ()
    """what main() appends to its block"""
    flags: Callable = lambda sampler: {"sampler": sampler}
    """flags that make the sampler uniform, or red"""
    probabilities: Callable = lambda module, dataset, args: module.sampling_probabilities(dataset, args)
    """P(i) as main() has it"""
    rows: Callable = lambda rows, input_and_action: rows
    """packed rows as update() reads them, from packed transitions"""

    def start(self, script, sampler, num_seeds, device, num_transitions=200_000, O=11, A=3):  # noqa: E741
        """Functions run(n), which makes n updates on synthetic transitions, and draw(n), which only draws for them."""
        module = harness.load(script)
        args = module.Args(**self.flags(sampler), num_seeds=num_seeds)
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(num_transitions, 2 * O + A + 2)).astype(np.float32)
        rows[:, O : O + A] = np.tanh(rows[:, O : O + A])
        rows[:, -1] = rng.random(num_transitions) > 0.01
        lengths = np.full(num_transitions // 100, 100)
        dataset = module.Dataset(rows, lengths, rng.normal(size=len(lengths)), O, A, {"id": None})
        draws = module.Sampler(self.probabilities(module, dataset, args), device)
        agent = getattr(module, self.agent)(O, A, args, device)
        generators = [torch.Generator(device).manual_seed(s) for s in range(num_seeds)]
        packed = torch.from_numpy(self.rows(rows, O + A)).to(device)
        learn, m = partial(module.run_updates, agent, packed, args), module.UPDATES_PER_GRAPH

        def draw(n):
            for _ in range(max(1, n // module.UPDATES_PER_BLOCK)):
                block = module.draw_block(draws, generators, args.batch_size, *self.noise_shapes(args, A))
            return [*block, *self.more(module, args, generators)]

        def chunks():
            """A block after the other, in the pieces that the main loop hands to run_updates."""
            while True:
                block = draw(1)
                for i in range(0, module.UPDATES_PER_BLOCK, m):
                    yield [x[i : i + m] for x in block]

        def run(n):
            for inputs in islice(endless, n // m):
                step(*inputs)

        endless = chunks()
        step = module.cuda_graph(learn, agent, *(x[:m] for x in draw(1))) if device.type == "cuda" else learn
        return run, draw


def lds_probabilities(module, targets, args):
    """P(i) of rvs_lds.py with --weighting lds_sampling; uniform with none."""
    weights = module.density_weights(targets, args)
    return weights / weights.sum()


UPDATE_PATHS = {
    "iql_red": UpdatePath("IQLAgent", iql_products),
    "td3_bc_red": UpdatePath(
        "TD3BCAgent",
        td3_bc_products,
        lambda args, A: ((args.batch_size, A),),
        lambda module, args, generators: [module.actor_turns(0, args.policy_delay)],
    ),
    "dered_iql": UpdatePath("stage2_agent", dered_iql_products),
    "rvs_lds": UpdatePath(
        "RvSAgent",
        rvs_products,
        more=lambda module, args, generators: [
            module.dropout_masks(generators, args.batch_size, args.hidden_sizes, args.dropout)
        ],
        flags=lambda sampler: {"weighting": {"uniform": "none", "red": "lds_sampling"}[sampler]},
        probabilities=lambda module, dataset, args: lds_probabilities(
            module, dataset.transitions[:, dataset.obs_dim + dataset.action_dim], args
        ),
        rows=lambda rows, input_and_action: np.abs(rows[:, : input_and_action + 1]),  # input, action, and a weight
    ),
    "cql_red": UpdatePath("CQLAgent", cql_products, lambda args, A: harness.load("cql_red").noise_shapes(args, A)),
    "crr_red": UpdatePath(
        "CRRAgent", crr_products, lambda args, A: ((args.num_action_samples, args.batch_size, A), (args.batch_size, A))
    ),
}


def seconds_of(run, n, device, threads):
    """Time of run(n): CPU-seconds on one CPU thread, which other processes hardly disturb; else wall time."""
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    start = clock()
    run(n)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


@dataclass
class Throughput:
    """Updates per second of a script's update path, beside the same matrix products and nothing else."""

    scripts: tuple[str, ...] = tuple(UPDATE_PATHS)
    """which scripts"""
    threads: int = 1
    """CPU threads"""
    rounds: int = 7
    """rounds; each measures every variant once, in turn, so that ratios compare neighbours in time"""
    updates: int = 200
    """updates per variant and round"""
    device: str = "auto"
    """as in the scripts"""

    def run(self):
        torch.set_num_threads(self.threads)
        harness.load(self.scripts[0]).keep_freed_memory()
        for script in self.scripts:
            path = UPDATE_PATHS[script]
            device = harness.load(script).choose_device(self.device)
            args = harness.load(script).Args()
            products = path.products(11, 3, args.batch_size, args.hidden_sizes)
            operands = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device)) for m, k, n in products]
            outs = [torch.empty(m, n, device=device) for m, _, n in products]

            def floor(n, operands=operands, outs=outs):
                for _ in range(n):
                    for (a, b), out in zip(operands, outs):
                        torch.mm(a, b, out=out)

            uniform, draw_uniform = path.start(script, "uniform", 1, device)
            red, draw_red = path.start(script, "red", 1, device)
            five, _ = path.start(script, "red", 5, device)
            n = self.updates if script != "cql_red" else max(20, self.updates // 10)  # CQL is ten times as dear
            variants = {
                "floor": (floor, n),
                "uniform, 1 seed": (uniform, n),
                "red, 1 seed": (red, n),
                "red, 5 seeds": (five, n // 2),
                "sampler uniform": (draw_uniform, 100),
                "sampler red": (draw_red, 100),
            }
            times = defaultdict(list)  # seconds per update, one entry a round
            for round_number in range(self.rounds + 1):
                for name, (run, n) in variants.items():
                    seconds = seconds_of(run, n, device, self.threads) / n
                    if round_number:  # the first round warms up
                        times[name].append(seconds)
            rate = {name: 1 / np.median(t) for name, t in times.items()}
            ratio = {name: np.median(np.array(times["floor"]) / times[name]) for name in times}
            flops = 2 * sum(m * k * n for m, k, n in products) * rate["floor"] / 1e9
            print(
                f"{script} on {hardware(device)}, {self.threads} thread(s), B={args.batch_size}, {self.rounds} rounds"
            )
            print(f"  matrix products alone, 1 seed {rate['floor']:8.1f} updates/s ({flops:.0f} GFLOP/s)")
            for name in ("uniform, 1 seed", "red, 1 seed"):
                print(f"  {name:29s} {rate[name]:8.1f} updates/s = {ratio[name]:.0%} of that floor")
            per_seed = np.median(5 * np.array(times["red, 1 seed"]) / times["red, 5 seeds"])
            print(f"  {'red, 5 seeds':29s} {5 * rate['red, 5 seeds']:8.1f} seed-updates/s = {per_seed:.2f} x one seed")
            share = {
                name: np.median(times[f"sampler {name}"]) / np.median(times[f"{name}, 1 seed"])
                for name in ("uniform", "red")
            }
            slower = np.median(np.array(times["red, 1 seed"]) / times["uniform, 1 seed"]) - 1
            print(f"  sampler's share: uniform {share['uniform']:.2%}, red {share['red']:.2%}; red costs {slower:+.1%}")


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One run: a script on a dataset, several seeds side by side."""

    grid: str
    script: str
    dataset: str
    variant: str
    """name of the column"""
    flags: tuple[str, ...]
    num_seeds: int
    num_updates: int

    @property
    def run(self):
        """Names the run: cells of two grids with the same command line share it."""
        return hashlib.sha1(" ".join(self.command).encode()).hexdigest()[:10]

    @property
    def command(self):
        """The command line that fills this cell."""
        every = max(1, self.num_updates // 20)
        return [
            f"algorithms/{self.script}.py", "--dataset", self.dataset, *self.flags, "--num-seeds", str(self.num_seeds),
            "--num-updates", str(self.num_updates), "--eval-every", str(every), "--eval-workers", "0",
        ]  # fmt: skip


SMALL = ("--hidden-sizes", "128", "128")  # a quarter of the arithmetic, for grids that a CPU could not finish otherwise


MEDIUM = ("--hidden-sizes", "256", "256")  # a fifteenth of the arithmetic of 2x1024
TINY = ("--hidden-sizes", "64", "64")
FAST = ("--polyak", "0.02")  # V learns its level in a quarter of the updates, see benchmarks.md
# PointMaze: IQL with its AntMaze settings; ReD with the p_base that its paper gives 0/1 returns
MAZE_FLAGS = {"iql_red": ("--expectile", "0.9", "--beta", "10")}


def sampler_cells(grid, script, dataset, samplers, num_seeds, num_updates, extra=()):
    """A script under several samplers on one dataset."""
    maze = MAZE_FLAGS.get(script, ()) if "maze" in dataset else ()
    cells = []
    for sampler in samplers:
        p_base = ("--p-base", "0.2") if "maze" in dataset and sampler == "red" else ()
        flags = ("--sampler", sampler, *p_base, *maze, *extra)
        cells.append(Cell(grid, script, dataset, sampler, flags, num_seeds, num_updates))
    return cells


def dered_cells(grid, dataset, num_seeds, num_updates, extra=()):
    """DeReD and DeReD-A; stage 1 is the uniform run of iql_red.py, bit by bit, so that its cell is their stage 1."""
    maze = (*MAZE_FLAGS["iql_red"], "--p-base", "0.2") if "maze" in dataset else ()
    cells = sampler_cells(grid, "iql_red", dataset, ("uniform", "red"), num_seeds, num_updates, extra)
    for variant, finetune in (("DeReD", "trunk"), ("DeReD-A", "all")):
        flags = ("--finetune", finetune, "--stage2-updates", str(num_updates // 2), *maze, *extra)
        cells.append(Cell(grid, "dered_iql", dataset, variant, flags, num_seeds, num_updates))
    return cells


def p_base_cells(grid, p_bases, num_seeds, num_updates, extra):
    """The ReD paper's Table 3 on the 0/1-return maze; p_base = infinity is the uniform sampler."""
    maze = "pointmaze/sparse-v0"
    uniform, red = sampler_cells(grid, "iql_red", maze, ("uniform", "red"), num_seeds, num_updates, extra)
    cells = [replace(uniform, variant="p_base inf (uniform)")]
    for p_base in p_bases:
        flags = tuple(p_base if f == "0.2" else f for f in red.flags)
        cells.append(replace(red, variant=f"p_base {p_base}", flags=flags))
    return cells


ALL = ("uniform", "red", "reward", "top10")
DATASETS = ("hopper/replay-v0", "hopper/medium-expert-v0", "halfcheetah/replay-v0", "pointmaze/sparse-v0")
RVS = {  # the IR paper's Table 2, and 10 % BC
    "BC": ("--condition", "none", "--weighting", "none"),
    "10 % BC": ("--condition", "none", "--weighting", "none", "--top-fraction", "0.1"),
    "Own Return": ("--weighting", "none"),
    "IR": ("--weighting", "lds"),
}


def rvs_cells(grid, datasets, num_seeds, num_updates, extra=()):
    """rvs_lds.py as each of the methods that the IR paper compares."""
    return [
        Cell(grid, "rvs_lds", dataset, variant, (*flags, *extra), num_seeds, num_updates)
        for dataset in datasets
        for variant, flags in RVS.items()
    ]


GRIDS = {
    "rvs": rvs_cells("rvs", DATASETS[:3], 3, 10_000, MEDIUM),
    "red_vs_uniform": sampler_cells("red_vs_uniform", "iql_red", DATASETS[0], ALL[:2], 5, 100_000, SMALL),
    "red_vs_uniform_40k": sampler_cells("red_vs_uniform_40k", "iql_red", DATASETS[0], ALL[:2], 5, 40_000, SMALL),
    "samplers": [c for d in DATASETS for c in sampler_cells("samplers", "iql_red", d, ALL, 3, 40_000, SMALL)],
    "p_base": p_base_cells("p_base", ("0", "0.2", "0.5", "1"), 3, 40_000, SMALL),
    "p_base_fast": p_base_cells("p_base_fast", ("0", "0.2"), 3, 40_000, (*SMALL, *FAST)),
    "fast": sampler_cells("fast", "iql_red", DATASETS[0], ALL[:2], 3, 40_000, (*SMALL, *FAST)),
    "td3_bc": [c for d in DATASETS for c in sampler_cells("td3_bc", "td3_bc_red", d, ALL[:2], 3, 40_000, SMALL)],
    "crr": [c for d in DATASETS for c in sampler_cells("crr", "crr_red", d, ALL[:2], 3, 40_000, SMALL)],
    "cql": [c for d in DATASETS for c in sampler_cells("cql", "cql_red", d, ALL, 3, 40_000, TINY)],
    "dered": [c for d in DATASETS for c in dered_cells("dered", d, 3, 40_000, SMALL)],
    # the protocol of the paper, for a GPU
    "paper": [c for d in DATASETS for c in sampler_cells("paper", "iql_red", d, ALL, 5, 1_000_000)],
}


TITLES = {
    "rvs": "Cloning given the return, and LDS weights; networks 2x256, batch 512 (the IR paper's Table 2).",
    "red_vs_uniform": "ReD against uniform sampling on the replay data, networks 2x128.",
    "red_vs_uniform_40k": "The same with 40,000 updates.",
    "samplers": "Four samplers, networks 2x128; the maze with expectile 0.9, beta 10, p_base 0.2.",
    "p_base": "The ReD paper's Table 3 on 0/1 returns, networks 2x128.",
    "p_base_fast": "Part of the same with target critics that move four times as fast.",
    "fast": "IQL on the replay data with target critics that move four times as fast.",
    "td3_bc": "TD3+BC, networks 2x128 (the ReD paper's Table 1).",
    "crr": "CRR, networks 2x128 (Table 1).",
    "cql": "CQL, networks 2x64, which is what a CPU can afford (Tables 1 and 4).",
    "dered": "DeReD on IQL, networks 2x128 (Tables 2 and 5): stage 1 is uniform, stage 2 adds half as many updates.",
    "paper": "IQL in the ReD paper's protocol, networks 2x256; for a GPU.",
}


def hardware(device=None):
    """A short name of the processor or GPU that numbers were made on."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{os.cpu_count()}-core {names[0] if names else platform.processor() or platform.machine()}"


def append(path, rows):
    """Adds rows (dicts of one shape) to a csv file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path):
    """Rows of a csv file as dicts, none if there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def spread_over_episodes(rows):
    """Standard deviation of the score over the episodes of an evaluation, mean of the last ten, for each seed."""
    found = []
    for seed in np.unique(rows["seed"]):
        stds = [
            rows["normalized_score"][(rows["seed"] == seed) & (rows["update"] == update)].std()
            for update in np.unique(rows["update"])[-10:]
        ]
        found.append({"seed": int(seed), "last10_std_over_episodes": round(np.mean(stds), 3)})
    return found


def run_cell(cell, lock):
    """Makes the run of one cell, or goes on with it where it was stopped, and appends its scores and curves."""
    run_dir, start = harness.ROOT / "runs" / "benchmark" / cell.run, time.time()
    flags = "--checkpoint-every", str(max(1, cell.num_updates // 20))
    if (run_dir / "checkpoint.pt").exists():
        command = [sys.executable, cell.command[0], "--resume", str(run_dir), *flags]
    else:
        shutil.rmtree(run_dir, ignore_errors=True)  # killed before its first checkpoint
        command = [sys.executable, *cell.command, "--run-dir", str(run_dir), *flags]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"FAILED {' '.join(command)}\n{done.stderr}", flush=True)
        return
    seconds, rows = time.time() - start, harness.read_evaluations(run_dir)
    commit = json.loads((run_dir / "config.json").read_text())["git_commit"]
    shared = {"run": cell.run}
    curves = [
        {
            **shared,
            "seed": int(seed),
            "update": int(update),
            "return": round(rows["return"][mine].mean(), 3),
            "normalized_score": round(rows["normalized_score"][mine].mean(), 3),
        }
        for seed in np.unique(rows["seed"])
        for update in np.unique(rows["update"])
        for mine in [(rows["seed"] == seed) & (rows["update"] == update)]
    ]
    scores = []
    for seed in np.unique(rows["seed"]):
        curve = [point for point in curves if point["seed"] == seed]
        last = [point["normalized_score"] for point in curve[-10:]]
        scores.append(
            {
                **shared,
                "seed": int(seed),
                "last10_score": round(np.mean(last), 3),
                "last_score": last[-1],
                "best_score": max(point["normalized_score"] for point in curve),
                "last10_return": round(np.mean([point["return"] for point in curve[-10:]]), 3),
                "script": cell.script,
                "dataset": cell.dataset,
                "variant": cell.variant,
                "num_updates": cell.num_updates,
                "seconds": round(seconds),
                "hardware": hardware(),
                "commit": (commit or "")[:10],
                "command": "python " + " ".join(cell.command),
            }
        )
    swept = [{**shared, **row} for row in read(run_dir / "target_returns.csv")]  # of conditioned policies
    with lock:
        if swept:
            append(RESULTS / "targets.csv", swept)
        if cell.script == "rvs_lds":  # its paper compares stability
            append(RESULTS / "spread.csv", [{**shared, **row} for row in spread_over_episodes(rows)])
        append(RESULTS / "curves.csv", curves)
        append(RESULTS / "scores.csv", scores)
    shutil.rmtree(run_dir)
    mean = np.mean([row["last10_score"] for row in scores])
    print(f"{cell.grid:15s} {cell.dataset:24s} {cell.variant:20s} score {mean:6.1f} ({seconds:.0f} s)", flush=True)


@dataclass
class Scores:
    """Runs what is missing from the grids; then tables and pictures."""

    grids: tuple[str, ...] = ("red_vs_uniform", "p_base", "samplers")
    """which of the grids, in this order (paper: 1M updates, 5 seeds, for a GPU)"""
    datasets: tuple[str, ...] = ()
    """only cells on these datasets; default: all"""
    jobs: int = 1
    """runs at a time; each takes one CPU thread unless OMP_NUM_THREADS says otherwise"""
    dry_run: bool = False
    """print the commands, run nothing"""

    def run(self):
        there, lock = {row["run"] for row in read(RESULTS / "scores.csv")}, Lock()
        cells = {cell.run: cell for grid in self.grids for cell in GRIDS[grid]}.values()
        cells = [cell for cell in cells if cell.run not in there and cell.dataset in (self.datasets or cell.dataset)]
        if self.dry_run:
            for cell in cells:
                print("python", *cell.command)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda cell: run_cell(cell, lock), cells))
        Tables().run()


@dataclass
class Tables:
    """The score tables in benchmarks.md, open rows included, and learning curves (results/*.svg)."""

    def run(self):
        scores, curves = read(RESULTS / "scores.csv"), read(RESULTS / "curves.csv")
        lines = []
        for grid, cells in GRIDS.items():
            columns = list(dict.fromkeys(cell.variant for cell in cells))
            lines += [f"### {grid}", "", TITLES[grid], ""]
            lines += [f"| dataset | seeds | updates | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
            pictures = []
            for dataset in dict.fromkeys(cell.dataset for cell in cells):
                in_row = {cell.variant: cell for cell in cells if cell.dataset == dataset}
                values = []
                for column in columns:
                    cell = in_row.get(column)
                    found = [float(row["last10_score"]) for row in scores if cell and row["run"] == cell.run]
                    values.append(f"{np.mean(found):.1f} ± {np.std(found):.1f}" if found else "open" if cell else "")
                first = next(iter(in_row.values()))
                lines.append(f"| {dataset} | {first.num_seeds} | {first.num_updates:,} | {' | '.join(values)} |")
                picture = plot(grid, dataset, list(in_row.values()), curves)
                pictures += [f"![{grid}, {dataset}](tests/results/{picture})"] if picture else []
                picture = plot_targets(grid, dataset, list(in_row.values()))
                pictures += [f"![{grid}, {dataset}, asked for](tests/results/{picture})"] if picture else []
            lines += ["", f"`python tests/benchmark.py scores --grids {grid}`", "", *pictures, ""]
        document = harness.ROOT / "benchmarks.md"
        before, _, rest = document.read_text().partition("<!-- scores -->\n")
        _, _, after = rest.partition("<!-- end of scores -->")
        text = "\n".join(lines)
        document.write_text(f"{before}<!-- scores -->\n{text}\n<!-- end of scores -->{after}")
        print(text)


def plot(grid, dataset, cells, curves):
    """One picture: mean over seeds, and one standard deviation about it, of every cell that has been run."""
    runs = {cell.variant: [row for row in curves if row["run"] == cell.run] for cell in cells}
    runs = {variant: rows for variant, rows in runs.items() if rows}
    if not runs:
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fixed", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for variant, mine in runs.items():
        updates = sorted({int(row["update"]) for row in mine})
        values = [[float(r["normalized_score"]) for r in mine if int(r["update"]) == u] for u in updates]
        mean, std = np.array([np.mean(v) for v in values]), np.array([np.std(v) for v in values])
        axes.plot(updates, mean, label=variant)
        axes.fill_between(updates, mean - std, mean + std, alpha=0.2, linewidth=0)
    seeds = cells[0].num_seeds
    axes.set(
        xlabel="updates", ylabel="normalised score", title=f"{cells[0].script} on {dataset}, {seeds} seeds, mean ± std"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    name = f"{grid}_{dataset.replace('/', '-')}.svg"
    figure.savefig(RESULTS / name, metadata={"Date": None})
    plt.close(figure)
    return name


def plot_targets(grid, dataset, cells):
    """One picture: achieved return against the return asked for, mean and standard deviation over seeds, of every
    conditioned cell that has been run."""
    swept = read(RESULTS / "targets.csv")
    runs = {cell.variant: [row for row in swept if row["run"] == cell.run] for cell in cells}
    runs = {variant: rows for variant, rows in runs.items() if rows}
    if not runs:
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fixed", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for variant, mine in runs.items():
        asked = sorted({float(row["target_return"]) for row in mine})
        of_seeds = [
            [
                np.mean([float(r["return"]) for r in mine if float(r["target_return"]) == target and r["seed"] == seed])
                for seed in sorted({row["seed"] for row in mine})
            ]
            for target in asked
        ]
        mean, std = np.mean(of_seeds, 1), np.std(of_seeds, 1)
        axes.plot(asked, mean, marker=".", label=variant)
        axes.fill_between(asked, mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.axline((asked[0], asked[0]), slope=1, color="gray", linewidth=0.8, linestyle=":", label="as asked")
    axes.set(xlabel="return asked for", ylabel="return achieved", title=f"{dataset}, {cells[0].num_seeds} seeds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    name = f"{grid}_{dataset.replace('/', '-')}_targets.svg"
    figure.savefig(RESULTS / name, metadata={"Date": None})
    plt.close(figure)
    return name


if __name__ == "__main__":
    tyro.cli(
        Annotated[Throughput, tyro.conf.subcommand("throughput")]
        | Annotated[Scores, tyro.conf.subcommand("scores")]
        | Annotated[Tables, tyro.conf.subcommand("tables")],
        description=__doc__,
    ).run()
