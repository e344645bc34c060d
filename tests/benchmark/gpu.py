"""Tells whether the scripts do on a GPU what they should, and how fast. gpu.md says how to get there.

    python tests/benchmark/gpu.py --out OUT                         everything, under 8 minutes
    python tests/benchmark/gpu.py --out OUT --parts 3 --seconds 240
    python tests/benchmark/gpu.py --out OUT --device cpu --toy      a rehearsal without a GPU, on tiny data

Part 1: CUDA graphs end as eager updates do, nothing in a chunk waits for the GPU, a run is resumed there.
Part 2: updates per second with 1, 5 and 20 seeds, beside what kernels take and what their launches allow.
Part 3: iql_red.py with ReD and with uniform draws, five seeds, all evaluations on the CPU cores beside it.
Part 4: TF32 on and off, chunks of 10 to 100 updates, torch.compile of the losses inside the graph.

Every script has a process of its own: one that fails or hangs harms no other. A result is a line of results.jsonl as
soon as it is there; section.md has the newest ones as tables, log.txt what the scripts printed. A part that is over
early leaves its time to the next; what a part has not done in its time is left out.
"""

import contextlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "algorithms"), str(ROOT / "tests")]  # evaluation workers look there too, for catch.py
import harness  # noqa: E402  after torch, whose number of threads it would change

GOALS = ["iql_red", "rem_atari", "dqn_atari"]  # there are goals for their speed: these come first
SCRIPTS = GOALS + [path.stem for path in harness.SCRIPTS if path.stem not in GOALS]
SHARES = {1: 0.25, 2: 0.35, 3: 0.25, 4: 0.15}  # of the time
FOREVER = 10**8  # updates
HALF = 120  # updates of part 1 before a run is resumed, six chunks: three ordinary ones, then three in a graph
TOLERANCE = 1e-3  # of ||graphs - eager|| / ||eager||, for every tensor of a checkpoint
TOY = {"batch_size": 8, "hidden_sizes": (8, 8), "vae_hidden_sizes": (8, 8), "channels": (2, 2, 2), "hidden_size": 8}
TOY |= {"num_action_samples": 2, "num_candidates": 5, "num_heads": 4, "policy_hidden_sizes": (8, 8)}
VARIANTS = [f"iql_red {S} {kind}" for S in (5, 20) for kind in ("as is", "tf32 on")]
VARIANTS += [f"rem_atari 1 {kind}" for kind in ("as is", "tf32 on", "tf32 off")]  # as is: only in convolutions
VARIANTS += ["iql_red 1 as is"] + [f"iql_red {S} chunk {n}" for S in (1, 5) for n in (10, 50, 100)]
VARIANTS += ["iql_red 5 compile losses", "iql_red 1 compile losses"]
COLUMNS = {  # of the tables in section.md
    1: "name right updates_in_graphs difference of eager_again resumed waits",
    2: "name seeds speed seed_speed share alone launch_limit kernels",
    3: "name updates minutes minutes_a_million score low high waited last_wait",
    4: "name speed seed_speed alone launch_limit kernels",
}


@dataclass
class Args:
    out: Path  # folder of the results; those of earlier calls stay
    device: str = "cuda"  # cuda, or cpu
    toy: bool = False  # tiny networks and data, moments instead of minutes
    parts: tuple[int, ...] = (1, 2, 3, 4)  # what to do
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # of parts 1 and 2
    seconds: float = 450.0  # for all of it
    jobs: int = 6  # scripts of part 1 side by side


class Enough(BaseException):
    """Ends main() of a script from within."""


class Eager:
    """Stands in for a script's CudaGraph."""

    def __init__(self, step):
        self.step = step

    def __call__(self, *inputs):
        return self.step(*inputs)


def emulated(module):
    """A script's CudaGraph, but recording and replaying on the CPU."""
    from test_cuda_graphs import Graph, Recording

    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = Recording
    torch.cuda.device = lambda device: contextlib.nullcontext()
    namespace = dict(vars(module))
    exec(inspect.getsource(module.CudaGraph).replace(".is_cuda", ".is_cpu"), namespace)
    return namespace["CudaGraph"]


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def drive(script, flags, graph=None, strict=False, after_call=None, after_save=None, **changes):
    """main() of a script, with its graphs made by `graph`; returns them. After every update or chunk comes
    after_call(graph, all that learn), after every checkpoint after_save(path, num_updates). Changes: of the
    module."""
    module = import_module(script)
    before = dict(vars(module))
    graphs = []
    num_updates = 0
    one_update = changes.get("update", module.update)

    def update(*args):
        nonlocal num_updates
        num_updates += 1  # not in a replay, of which Python sees nothing
        return one_update(*args)

    class Watched(graph or module.CudaGraph):
        num_watched = 0  # calls
        updates = 0  # in a call; 0: it acts, or distils

        def __init__(self, step):
            super().__init__(step)
            graphs.append(self)

        def __call__(self, *inputs):
            self.num_watched += 1
            so_far = num_updates
            if strict and self.num_watched != 4:  # before it records, PyTorch waits by itself
                torch.cuda.set_sync_debug_mode("error")
            outputs = super().__call__(*inputs)
            if strict:
                torch.cuda.set_sync_debug_mode("default")
            if self.num_watched == 1:
                self.updates = num_updates - so_far
            if after_call and self.updates:
                self.last_inputs = inputs
                after_call(self, [x for x in graphs if x.updates])
            return outputs

    def save(path, agent, rows, num_updates):
        before["save"](path, agent, rows, num_updates)
        if after_save:
            after_save(path, num_updates)

    patches = {"tqdm": lambda steps, *args, **options: steps, "ProcessPoolExecutor": harness.Pool} | changes
    vars(module).update(patches | {"CudaGraph": Watched, "update": update, "save": save})
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    sys.argv = [module.__file__, *words]
    print("\n#", script, *words, flush=True)
    try:
        module.main()
    except Enough:
        pass
    except SystemExit as stop:
        raise RuntimeError(stop.code) from stop
    finally:
        vars(module).update(before)
    return graphs


def flags_of(script, args, folder, num_seeds, **wishes):
    """Flags of a run: those of all wishes that the script has."""
    fields = import_module(script).Args.__dataclass_fields__
    data = {"env_id": "Hopper-v5", "dataset": f"{args.folder}/hopper.hdf5"}
    if "channels" in fields:
        data = {"env_id": "catch:Catch-v0", "dataset": "atari/catch", "replay_size": 2000}
    wishes = {"num_seeds": num_seeds, "device": args.device, "eval_episodes": 0} | data | wishes
    if args.toy:
        wishes |= TOY
    if "offline" in fields:  # bred.py: two trained members for each seed
        wishes["offline"] = Path(folder, f"members-{num_seeds}")
        if not wishes["offline"].exists():
            length = {"num_updates": 20, "eval_every": 20, "log_every": 20, "run_dir": wishes["offline"]}
            drive("cql_red", flags_of("cql_red", args, folder, 2 * num_seeds, **length))
    return {name: value for name, value in wishes.items() if name in fields}


def prepare(name, args):
    """Part 0: where this runs; Hopper's replay as a D4RL file, which is read in no time."""
    facts = {"device": args.device, "torch": torch.__version__, "python": platform.python_version()}
    facts |= {"threads": torch.get_num_threads(), "toy": args.toy}
    if args.device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    path = f"{args.folder}/hopper.hdf5"
    if args.toy:
        harness.write_d4rl(path, harness.hopper_episodes())
    else:
        iql = import_module("iql_red")
        data = iql.load_data(iql.Args(device="cpu"))
        timeouts = np.zeros(len(data.obs), bool)
        timeouts[np.cumsum(data.lengths) - 1] = True
        names = "observations", "actions", "rewards", "next_observations", "terminals"
        with h5py.File(path, "w") as file:
            for name, column in zip((*names, "timeouts"), (*data[:5], timeouts)):
                file[name] = column
    yield facts


# Part 1 -------------------------------------------------------------------------------------------
def compare(ours, theirs):
    """Largest ||a - b|| / ||b|| of the tensors of two checkpoints but their evaluations, and which it is."""
    ours, theirs = harness.leaves(ours), harness.leaves(theirs)
    if ours.keys() != theirs.keys():
        return math.inf, "names"
    found = [(0.0, "")]
    for path in ours.keys() - {"/rows"}:
        a, b = (torch.as_tensor(x[path], dtype=torch.float64, device="cpu") for x in (ours, theirs))
        if a.shape != b.shape or not a.isfinite().all():
            found.append((math.inf, path))
        elif not torch.equal(a, b):
            found.append(((a - b).norm().item() / max(b.norm().item(), 1e-12), path))
    return max(found)


def check(script, args):
    """A run in graphs that is stopped half way and resumed, against an eager one that is not stopped."""
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    fields = import_module(script).Args.__dataclass_fields__
    flags = {"num_updates": 2 * HALF, "num_steps": 2 * HALF, "stage2_updates": HALF, "online_steps": 2 * HALF}
    flags |= {"eval_every": HALF, "log_every": 60, "target_every": 40, "files_every": HALF, "dropout": 0.1}
    flags |= {"learning_starts": 40, "update_every": 1, "epoch_length": HALF, "distil_epochs": 2}
    if "num_updates" in fields and {"stage2_updates", "online_steps"} & set(fields):  # two stages
        flags |= {"num_updates": HALF, "online_steps": HALF}
    if "online_steps" in fields:
        flags["eval_episodes"] = 1  # they act in the environment of the evaluations
    if "offline" in fields:
        flags["warm_up"] = 0.0
    flags = flags_of(script, args, folder, 2, **flags)
    graph = emulated(import_module(script)) if args.device == "cpu" else None

    def keep(path, num_updates, stop=None):
        copy = path.parent / str(num_updates) / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        if num_updates == stop:
            raise Enough

    def keep_half(path, num_updates):
        keep(path, num_updates, stop=HALF)

    result = {"waits": "no"}
    for strict in (args.device == "cuda", False):
        run = folder / f"graphs-{strict}"
        try:
            graphs = drive(script, flags | {"run_dir": run}, graph, strict, after_save=keep_half)
            break
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode("default")
            if "synchroniz" not in str(error):
                raise
            result["waits"] = traceback.format_exc()[-1500:]  # where; once more, without minding it
    result["updates_in_graphs"] = sum(max(0, x.num_watched - 3) * x.updates for x in graphs)
    drive(script, {"resume": run, "device": args.device}, graph, strict, after_save=keep)
    drive(script, flags | {"run_dir": folder / "eager"}, Eager, after_save=keep)
    middle, end = str(HALF), str(2 * HALF)
    result["difference"], result["of"] = compare(run / middle, folder / "eager" / middle)
    result["resumed"], _ = compare(run / end, folder / "eager" / end)
    allowed = TOLERANCE
    if result["difference"] > 0:  # then how far apart are two eager runs?
        drive(script, flags | {"run_dir": folder / "again"}, Eager, after_save=keep_half)
        result["eager_again"], _ = compare(folder / "again" / middle, folder / "eager" / middle)
        allowed = max(TOLERANCE, 2 * result["eager_again"])
    goes_on = result["resumed"] <= 10 * allowed
    if "dataset" not in fields:  # resumed in a new episode: it has to move, and to stay finite
        result["resumed"] = "in a new episode"
        goes_on = 0 < compare(run / end, run / middle)[0] < math.inf
    in_graphs = result["updates_in_graphs"] >= 60
    result["right"] = result["waits"] == "no" and in_graphs and result["difference"] <= allowed and goes_on
    yield result


# Parts 2 and 4 ------------------------------------------------------------------------------------
def seconds_of(function, times=10):
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize()
    return (time.perf_counter() - start) / times


def look_inside(learners, device):
    """What one replay of every learner takes, alone; on a CPU the innermost operations stand for kernels."""

    def alone():
        for x in learners:
            step = x.graph.replay if device == "cuda" else partial(x.step, *x.last_inputs)
            step()

    updates = sum(x.updates for x in learners)
    result = {"alone": updates / seconds_of(alone)}
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        alone()
        synchronize()
    kernels = [x for x in profile.events() if x.device_type.name == device.upper()]
    if device == "cpu":
        kernels = [x for x in kernels if not x.cpu_children]
    seconds = Counter()
    for x in kernels:
        seconds[x.name[:80]] += x.time_range.elapsed_us() / 1e6
    if not kernels:  # the profiler does not work here
        return result
    result |= {"kernels": len(kernels) / updates, "kernel_seconds": seconds.total() / updates}
    result["top"] = seconds.most_common(6)

    # the limit: as many kernels that do next to nothing, one after the other
    x = torch.zeros(1, device=device)

    def launches():
        for _ in kernels:
            x.add_(1)

    if device == "cuda":
        launches()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        launches = graph.replay
    return result | {"launch_limit": updates / seconds_of(launches)}


def measure(script, args, num_seeds, **changes):
    """Updates per second of main() without evaluations: draws, gathers and updates; online: steps too."""
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    result = {"seeds": num_seeds}
    started = None
    num_updates = 0
    num_calls = 0

    def after_call(graph, learners):
        nonlocal started, num_updates, num_calls
        if started is None:
            if min(x.num_watched for x in learners) >= 5:  # all are recorded
                synchronize()
                started = time.perf_counter()
            return
        num_updates += graph.updates
        num_calls += 1
        if num_calls % 20 == 0:
            synchronize()  # or the host would be far ahead of the GPU
        if time.perf_counter() - started > (0.03 if args.toy else 0.8):
            synchronize()
            result["speed"] = num_updates / (time.perf_counter() - started)  # of a seed
            result["seed_speed"] = num_seeds * result["speed"]
            result.update(look_inside(learners, args.device))
            raise Enough

    flags = {"num_updates": FOREVER, "num_steps": 50_000, "stage2_updates": FOREVER, "online_steps": 0}
    flags |= {"eval_every": FOREVER, "learning_starts": 100, "run_dir": folder / "run"}
    if "offline" in import_module(script).Args.__dataclass_fields__:  # bred.py: 100 steps, then updates without end
        flags |= {"online_steps": 100, "epoch_length": 100, "warm_up": 1e6, "distil_epochs": 1}
        flags |= {"eval_every": 100, "eval_episodes": 1}
    drive(script, flags_of(script, args, folder, num_seeds, **flags), after_call=after_call, **changes)
    if "kernel_seconds" in result:
        result["share"] = result["speed"] * result["kernel_seconds"]  # of the time in kernels
    return result if "speed" in result else result | {"error": "over before it was timed"}


def throughput(script, args):
    for num_seeds in (1, 2) if args.toy else (1, 5, 20):
        yield measure(script, args, num_seeds)


def variant(name, args):
    script, num_seeds, kind, value = name.split()
    changes = {}
    if kind == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = value == "on"
        torch.backends.cudnn.allow_tf32 = value == "on"
    elif kind == "chunk":
        changes["CHUNK"] = int(value)
    elif kind == "compile":  # all of `update` but the steps of the optimizers, where the graph breaks
        module = import_module(script)
        backend = "aot_eager" if args.device == "cpu" else "inductor"
        changes["minimize"] = torch.compiler.disable(module.minimize)
        changes["update"] = torch.compile(module.update, backend=backend, dynamic=False)
    yield measure(script, args, int(num_seeds), **changes)


# Part 3 -------------------------------------------------------------------------------------------
def main_job(sampler, args):
    """As many updates as the time allows, a million at most, with all that a run of a user has."""
    deadline = time.time() + args.seconds
    run_dir = Path(tempfile.mkdtemp(dir=args.folder), "run")
    every = 20 if args.toy else 5_000
    speeds = [x["speed"] for x in read_results(args) if (x["name"], x.get("seeds")) == ("iql_red", 5) and "speed" in x]
    speed = 3 if args.toy else [1_500, *speeds][-1]
    num_updates = min(1_000_000, max(2, int(0.7 * args.seconds * speed) // every) * every)
    waits = []
    clock = {}

    def report(*inputs):
        start = time.time()
        rows = report_as_is(*inputs)
        waits.append(time.time() - start)
        return rows

    def bar(steps, *inputs, **options):
        clock["start"] = time.time()
        for step in steps:
            if isinstance(steps, range) and time.time() > deadline:
                break
            yield step
            clock["updates"] = step

    report_as_is = import_module("iql_red").report
    flags = {"sampler": sampler, "num_updates": num_updates, "eval_every": every, "log_every": every, "run_dir": run_dir}
    if args.toy:
        flags = flags_of("iql_red", args, None, 2, **flags) | {"eval_episodes": 2}
    else:
        flags |= {"num_seeds": 5, "device": args.device, "dataset": "hopper/replay-v0"}
    drive("iql_red", flags, tqdm=bar, report=report, ProcessPoolExecutor=ProcessPoolExecutor)
    minutes = (time.time() - clock["start"]) / 60
    done = clock["updates"] + import_module("iql_red").CHUNK
    evaluations = harness.read_evaluations(run_dir)
    last = np.isin(evaluations["update"], np.unique(evaluations["update"])[-10:])
    seeds = np.unique(evaluations["seed"])
    scores = [evaluations["normalized_score"][last & (evaluations["seed"] == seed)].mean() for seed in seeds]
    means = np.random.default_rng(0).choice(scores, (10_000, len(scores))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])  # bootstrap over seeds
    result = {"updates": done, "minutes": minutes, "minutes_a_million": minutes / done * 1e6, "scores": scores}
    result |= {"score": np.mean(scores), "low": low, "high": high}
    yield result | {"waited": sum(waits[:-1]), "last_wait": waits[-1]}  # seconds; the last one has no training beside


# Processes and results ----------------------------------------------------------------------------
def read_results(args):
    path = args.out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(args, part, name, result):
    line = json.dumps({"part": part, "name": name} | result, default=float)
    with open(args.out / "results.jsonl", "a") as file:
        file.write(line + "\n")
    print(line[:300], flush=True)


def child(function, part, name, args):
    """A process of its own: one script, or variant."""
    log = os.open(args.out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    screen = os.dup(1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if part != 3:  # where the number of threads is that of the evaluation workers, too
        torch.set_num_threads(1)
    try:
        if args.device == "cuda" and part in (2, 4):
            with torch.profiler.profile():  # it has to be there before a graph is recorded
                torch.zeros(1, device="cuda")
        for result in function(name, args):
            record(args, part, name, result)
    except BaseException as error:
        traceback.print_exc()
        record(args, part, name, {"error": f"{type(error).__name__}: {error}"[-600:]})
    os.write(screen, f"part {part}: {name} is done\n".encode())
    os._exit(0)  # evaluation workers end with it


def run(function, part, names, args, deadline, jobs=1):
    """Calls function(name, args) for all names in processes, as far as the time goes."""
    waiting = list(names)
    running = {}
    while waiting or running:
        late = time.time() > deadline
        for name in waiting if late else []:
            record(args, part, name, {"error": "no time was left"})
        waiting = [] if late else waiting
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            args.seconds = (deadline - time.time()) / (1 + len(waiting))
            running[name] = args.context.Process(target=child, args=(function, part, name, args))
            running[name].start()
        for name, process in list(running.items()):
            if late and process.is_alive():
                process.kill()
                record(args, part, name, {"error": "stopped at the end of its time"})
            if not process.is_alive():
                del running[name]
        time.sleep(0.02)


def main():
    args = tyro.cli(Args, description=__doc__)
    ...


if __name__ == "__main__":
    main()
