"""Tells whether the scripts do on a GPU what they should, and how fast. gpu.md says how to get there.

    python tests/benchmark/gpu.py --out OUT                        everything, under 8 minutes
    python tests/benchmark/gpu.py --out OUT --parts 3 --seconds 240
    python tests/benchmark/gpu.py --out OUT --device cpu --toy     a rehearsal without a GPU

Part 1: CUDA graphs end as eager updates do, nothing in a chunk waits for the GPU, a run is resumed there.
Part 2: updates per second with 1, 5 and 20 seeds, beside what kernels take and what their launches allow.
Part 3: iql_red.py with ReD and with uniform draws, 5 seeds, all evaluations on the CPU cores beside it.
Part 4: TF32 on and off, chunks of 10 to 100 updates, torch.compile of the losses inside the graph.

Every script has a process of its own, so that one that fails or hangs harms no other. A result is a line of
results.jsonl as soon as it is there; section.md has the newest ones as tables, log.txt what was printed.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU does not start CUDA: forks need that
os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}  # or profiles of graphs may crash
import h5py
import numpy as np
import torch
import tyro

os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or harness makes it one
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "algorithms"), str(ROOT / "tests")]  # where evaluation workers look, too
import harness  # noqa: E402
from watched import Enough, drive, emulated, flags_of, look_inside, wait  # noqa: E402

GOALS = ["iql_red", "rem_atari", "dqn_atari"]  # there are goals for their speed: they come first
SCRIPTS = [path.stem for path in harness.SCRIPTS if "\nclass CudaGraph" in path.read_text()]
SCRIPTS = GOALS + [script for script in SCRIPTS if script not in GOALS]
SHARES = {1: 0.25, 2: 0.35, 3: 0.25, 4: 0.15}  # of the time; what a part leaves is for the next
HALF = 120  # updates of part 1 until a run is resumed: three ordinary chunks, then three in a graph
TOLERANCE = 1e-3  # of ||graphs - eager|| / ||eager||, for every tensor of a checkpoint
FOREVER = 10**8  # updates
HIDDEN = "part", "took"  # of part 3, in results.jsonl, but not in section.md
VARIANTS = [f"iql_red {S} {kind}" for S in (5, 20) for kind in ("as is", "tf32 on")]
VARIANTS += ["iql_red 1 as is", *(f"iql_red {S} chunk {n}" for S in (1, 5) for n in (50, 100, 10))]
VARIANTS += ["rem_atari 1 as is", "rem_atari 1 tf32 on", "rem_atari 1 tf32 off"]  # as is: on in convolutions
VARIANTS += ["iql_red 5 compile losses"]


@dataclass
class Args:
    out: Path  # folder of the results; those of earlier calls stay
    device: str = "cuda"  # cuda, or cpu
    toy: bool = False  # tiny networks and data, moments instead of minutes
    parts: tuple[int, ...] = (1, 2, 3, 4)  # what to do
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # of parts 1 and 2
    variants: tuple[str, ...] = tuple(VARIANTS)  # of part 4
    seconds: float = 450.0  # for all of it
    jobs: int = 6  # scripts of part 1 side by side
    folder: tyro.conf.Suppress[str] = ""  # of temporary files


# Part 0 -------------------------------------------------------------------------------------------
def prepare(name, args, folder):
    """What this machine is; Hopper's replay as a D4RL file, which is read in no time."""
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    yield {"gpu": gpu, "torch": torch.__version__, "threads": torch.get_num_threads(), "toy": args.toy}
    path = f"{args.folder}/hopper.hdf5"
    if args.toy:
        harness.write_d4rl(path, harness.hopper_episodes())
        return
    iql = import_module("iql_red")
    data = iql.load_data(iql.Args(device="cpu"))
    ended = np.isin(np.arange(len(data.obs)), np.cumsum(data.lengths) - 1)
    names = "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    with h5py.File(path, "w") as file:
        file.update(zip(names, (*data[:5], ended)))


# Part 1 -------------------------------------------------------------------------------------------
def compare(ours, theirs):
    """Largest ||a - b|| / ||b|| of the tensors in two checkpoints, evaluations aside, and which it is."""
    ours = harness.leaves(ours)
    theirs = harness.leaves(theirs)
    found = [(0.0, "")]
    for path in (ours.keys() | theirs.keys()) - {"/rows"}:
        a, b = (torch.as_tensor(x[path], dtype=torch.float64, device="cpu") for x in (ours, theirs))
        if a.shape != b.shape:  # a memory that has grown
            found.append((1.0, path))
        elif not torch.equal(a, b):
            difference = (a - b).norm() / b.norm().clamp(min=1e-12)
            found.append((difference.nan_to_num(np.inf).item(), path))
    return max(found)


def check(script, args, folder):
    """A run in graphs that is stopped half way and resumed, against an eager one that is not stopped."""
    fields = import_module(script).Args.__dataclass_fields__
    flags = {"num_updates": 2 * HALF, "num_steps": 2 * HALF, "online_steps": 2 * HALF, "stage2_updates": HALF}
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
    run, eager, again = (folder / name for name in ("graphs", "eager", "again"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        graphs = drive(script, flags | {"run_dir": run}, graph, stop=HALF)
        drive(script, {"resume": run, "device": args.device}, graph)
    waits = {f"{x.filename}:{x.lineno}" for x in seen if "synchronizing CUDA" in str(x.message)}
    drive(script, flags | {"run_dir": eager}, eager=True)
    middle, end = str(HALF), str(2 * HALF)
    difference, where = compare(run / middle, eager / middle)
    resumed, _ = compare(run / end, eager / end)
    noise = 0.0
    if difference > 0:  # then how far apart are two eager runs?
        drive(script, flags | {"run_dir": again}, eager=True, stop=HALF)
        noise, _ = compare(again / middle, eager / middle)
    allowed = max(TOLERANCE, min(2 * noise, 10 * TOLERANCE))
    goes_on = resumed <= 10 * allowed
    if "dataset" not in fields:  # in a new episode: it has to move, and to stay finite
        resumed = "in a new episode"
        goes_on = 0 < compare(run / end, run / middle)[0] < np.inf
    in_graphs = sum(max(0, x.num_watched - 3) * x.updates for x in graphs)
    right = not waits and in_graphs >= 60 and difference <= allowed and goes_on
    result = {"right": right, "updates in graphs": in_graphs, "difference": difference, "of": where}
    yield result | {"of two eager runs": noise, "resumed": resumed, "waits": ", ".join(sorted(waits))}


# Parts 2 and 4 ------------------------------------------------------------------------------------
def measure(script, args, folder, num_seeds, **changes):
    """Updates per second of main() without evaluations: draws, gathers and updates; online: steps too."""
    done = []  # updates of the calls that are timed
    result = {}
    started = None

    def after_call(graph, learners):
        nonlocal started
        if started is None:
            if min(x.num_watched for x in learners) >= 5:  # all are recorded
                wait(args)
                started = time.perf_counter()
            return
        done.append(graph.updates)
        if len(done) % 20 == 0:
            wait(args)  # or the host would be far ahead of the GPU
        if time.perf_counter() - started > (0.03 if args.toy else 0.8):
            wait(args)
            speed = sum(done) / (time.perf_counter() - started)
            inside = look_inside(learners, args)
            result.update({"seeds": num_seeds, "updates/s": speed, "of all seeds": num_seeds * speed})
            result.update({"share in kernels": speed * inside["seconds in kernels"]} | inside)
            raise Enough

    flags = {"num_updates": FOREVER, "num_steps": 50_000, "stage2_updates": FOREVER, "online_steps": 0}
    flags |= {"eval_every": FOREVER, "learning_starts": 100, "run_dir": folder / "run"}
    if script == "bred":  # 100 steps, then endless updates
        flags |= {"online_steps": 100, "epoch_length": 100, "warm_up": 1e6, "distil_epochs": 1}
        flags |= {"eval_every": 100, "eval_episodes": 1}
    drive(script, flags_of(script, args, folder, num_seeds, **flags), after_call=after_call, **changes)
    return result


def throughput(script, args, folder):
    for num_seeds in (2,) if args.toy else (1, 5, 20):
        yield measure(script, args, folder / str(num_seeds), num_seeds)


def variant(name, args, folder):
    script, num_seeds, kind, value = name.split()
    changes = {}
    if kind == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = value == "on"
        torch.backends.cudnn.allow_tf32 = value == "on"
    elif kind == "chunk":
        changes["CHUNK"] = int(value)
    elif kind == "compile":  # all of `update` but the optimizers' steps
        module = import_module(script)
        backend = "aot_eager" if args.device == "cpu" else "inductor"
        changes["minimize"] = torch.compiler.disable(module.minimize)
        changes["update"] = torch.compile(module.update, backend=backend, dynamic=False)
    yield measure(script, args, folder, int(num_seeds), **changes)


# Part 3 -------------------------------------------------------------------------------------------
def main_job(sampler, args, folder):
    """As many updates as the time allows, a million at most, with all that a run of a user has."""
    deadline = time.time() + args.seconds - 10
    every = 20 if args.toy else 5_000
    speeds = [x["updates/s"] for x in results(args) if (x["name"], x.get("seeds")) == ("iql_red", 5)]
    most = int(0.7 * args.seconds * [1_000, *speeds][-1])
    num_updates = 60 if args.toy else min(10**6, max(1, most // every) * every)
    module = import_module("iql_red")
    report_as_is = module.report
    clock = {}
    waits = []

    def report(*inputs):
        started = time.time()
        rows = report_as_is(*inputs)
        waits.append(time.time() - started)
        return rows

    class Bar(module.tqdm):
        def __iter__(self):
            clock["start"] = time.time()
            for clock["step"] in super().__iter__():
                yield clock["step"]
                if time.time() > deadline:
                    return

    flags = {"sampler": sampler, "num_updates": num_updates, "eval_every": every, "run_dir": folder / "run"}
    flags = flags_of("iql_red", args, folder, 5, **flags, eval_episodes=2 if args.toy else 10)
    if not args.toy:
        del flags["env_id"]
        flags["dataset"] = "hopper/replay-v0"
    drive("iql_red", flags, tqdm=Bar, report=report, ProcessPoolExecutor=ProcessPoolExecutor)
    minutes = (time.time() - clock["start"]) / 60
    updates = clock["step"] + module.CHUNK
    found = harness.read_evaluations(folder / "run")
    last = np.isin(found["update"], np.unique(found["update"])[-10:])
    scores = [found["normalized_score"][last & (found["seed"] == seed)].mean() for seed in range(5)]
    means = np.random.default_rng(0).choice(scores, (10_000, 5)).mean(1)  # bootstrap over seeds
    result = {"updates": updates, "minutes": minutes, "minutes a million": minutes / updates * 1e6}
    low, high = np.quantile(means, [0.025, 0.975])
    result |= {"score": np.mean(scores), "95 % from": low, "to": high}
    yield result | {"seconds waited": sum(waits[:-1]), "and at the end": waits[-1]}


# Processes and results ----------------------------------------------------------------------------
def results(args):
    path = args.out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(args, part, name, **result):
    with open(args.out / "results.jsonl", "a") as file:
        file.write(json.dumps({"part": part, "name": name, **result}, default=float) + "\n")


def table(columns, rows, width=1):
    """Rows as a table, `width` of them side by side."""
    height = -(-len(rows) // width)
    beside = [sum(rows[i::height], []) for i in range(height)]
    lines = [columns * width, ["---"] * len(columns) * width, *beside]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)]


def section(args):
    """The newest results in short."""
    newest = {(x["part"], x["name"], x.get("seeds")): x for x in results(args)}.values()
    found = [[x for x in newest if x["part"] == part and "error" not in x] for part in range(5)]
    lines = ["## On a GPU", *(f"{x['gpu']}, PyTorch {x['torch']}." for x in found[0])]
    if found[1]:
        wrong = [x["name"] for x in found[1] if not x["right"]]
        far = max(found[1], key=lambda x: x["difference"])
        lines += ["", f"Right: {len(found[1]) - len(wrong)} of {len(found[1])} scripts; wrong: {wrong or 'none'}. "]
        lines[-1] += f"Farthest from its eager run: `{far['name']}.py`, {far['difference']:.1g}; "
        lines[-1] += f"two eager runs of it differ by {far['of two eager runs']:.1g}."
    speeds = {}
    for x in found[2]:
        speeds.setdefault(x["name"], [f"`{x['name']}.py`", f"{x['share in kernels']:.2f}"])
        speeds[x["name"]].append(f"{x['updates/s']:,.0f}")
    if speeds:
        seeds = [f"seeds: {x['seeds']}" for x in found[2][: len(speeds[found[2][0]["name"]]) - 2]]
        lines += table(["updates/s", "in kernels", *seeds], list(speeds.values()), 2)
    if found[3]:
        names = [name for name in found[3][0] if name not in HIDDEN]
        cells = [[f"{x[n]:,.4g}" if isinstance(x[n], float) else str(x[n]) for n in names] for x in found[3]]
        lines += table(names, cells)
    variants = {}
    for x in found[4]:
        script, num_seeds, kind = x["name"].split(" ", 2)
        variants.setdefault(f"`{script}.py`, seeds: {num_seeds}", []).append(f"{kind} {x['updates/s']:,.0f}")
    lines += ["", *(f"- {what}; updates/s {', '.join(kinds)}" for what, kinds in variants.items())]
    lines += ["", *(f"Part {x['part']}, {x['name']}: {x['error']}  " for x in newest if "error" in x)]
    return "\n".join(lines).rstrip() + "\n"


def child(function, part, name, args):
    """A process that does one name of a part."""
    log = open(args.out / "log.txt", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]) if part in (0, 3) else 1)  # part 3: workers
    try:
        if args.device == "cuda" and part in (2, 4):
            with torch.profiler.profile():  # it has to be there before a graph is recorded
                torch.zeros(1, device="cuda")
        started = time.time()
        for result in function(name, args, Path(tempfile.mkdtemp(dir=args.folder))):
            record(args, part, name, **result, took=time.time() - started)
    except BaseException as error:
        traceback.print_exc()
        record(args, part, name, error=f"{type(error).__name__}: {error}"[-500:])
    os._exit(0)  # its evaluation workers end with it


def main():
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("torch._dynamo", "torch.utils.tensorboard", "gymnasium.envs.mujoco.hopper_v5"):
        import_module(name)  # here, so that no process has to
    parts = {1: (check, args.scripts), 2: (throughput, args.scripts), 3: (main_job, ["red", "uniform"])}
    parts[4] = variant, args.variants[-5::2] if args.toy else args.variants

    def do(part, function, name, end, share):
        seconds = (end - time.time()) * share
        if seconds < 5:
            record(args, part, name, error="no time was left")
            return
        context = multiprocessing.get_context(method)
        process = context.Process(target=child, args=(function, part, name, replace(args, seconds=seconds)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            record(args, part, name, error="stopped at the end of its time")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as args.folder:
        end = time.time() + args.seconds
        for method in ("fork", "spawn"):  # forks start sooner, but are of no use where CUDA has been started
            do(0, prepare, "machine", end, 1)
            if "error" not in results(args)[-1]:
                break
        left = end - time.time()
        end -= left
        for part in args.parts:
            function, names = parts[part]
            end += left * SHARES[part] / sum(SHARES[x] for x in args.parts)
            with ThreadPoolExecutor(args.jobs if part == 1 else 1) as pool:
                jobs = []
                for i, name in enumerate(names):
                    share = 1 / (len(names) - i) if part == 3 else 1  # half for the first of two
                    jobs.append(pool.submit(do, part, function, name, end, share))
            for job in jobs:
                job.result()
            (args.out / "section.md").write_text(section(args))
            print(f"part {part} is done", flush=True)
    print(section(args))


if __name__ == "__main__":
    main()
