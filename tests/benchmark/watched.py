"""main() of a script in this process, watched, and what its CUDA graphs take alone: the tools of gpu.py."""

import contextlib
import inspect
import sys
import time
from collections import Counter
from importlib import import_module

import harness
import torch

TOY = {"batch_size": 4, "hidden_sizes": (8, 8), "vae_hidden_sizes": (8, 8), "channels": (2, 2, 2)}
TOY |= {"hidden_size": 8, "num_action_samples": 2, "num_candidates": 5, "num_heads": 4}


class Enough(BaseException):
    """Ends main() from within."""


def emulated(module):
    """A script's CudaGraph that records and replays on the CPU."""
    from test_cuda_graphs import Graph, Recording

    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = Recording
    torch.cuda.device = lambda device: contextlib.nullcontext()
    namespace = dict(vars(module))
    exec(inspect.getsource(module.CudaGraph).replace(".is_cuda", ".is_cpu"), namespace)
    return namespace["CudaGraph"]


def drive(script, flags, graph=None, eager=False, stop=None, after_call=None, **changes):
    """Runs main() with graphs of the class `graph`, or eager, and returns these. A copy of each checkpoint
    stays; the one of update `stop` ends the run. After every call that learns comes after_call(graph, all
    that learn). Changes: of the module."""
    module = import_module(script)
    before = dict(vars(module))
    graphs = []
    num_updates = 0
    update_as_is = changes.get("update", module.update)

    def update(*args):
        nonlocal num_updates
        num_updates += 1  # not in a replay, of which Python sees nothing
        return update_as_is(*args)

    class Watched(graph or module.CudaGraph):
        num_watched = 0  # calls
        updates = 0  # of one call; 0: it acts, or distils

        def __call__(self, *inputs):
            so_far = num_updates
            self.num_watched += 1
            if eager:
                self.num_calls = 0  # so that this call is an ordinary one
            if torch.cuda.is_available() and self.num_watched != 4:  # PyTorch waits before it records
                torch.cuda.set_sync_debug_mode("warn")
            outputs = super().__call__(*inputs)
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            if self.num_watched == 1:
                self.updates = num_updates - so_far
                graphs.append(self)
            if after_call and self.updates:
                self.again = self.graph.replay if hasattr(self, "graph") else lambda: self.step(*inputs)
                after_call(self, [x for x in graphs if x.updates])
            return outputs

    def save(path, agent, rows, num_updates):
        before["save"](path, agent, rows, num_updates)
        copy = path.parent / str(num_updates) / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        if num_updates == stop:
            raise Enough

    sys.argv = [module.__file__]
    for name, value in flags.items():
        sys.argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    print("\n#", *sys.argv, flush=True)
    patches = {"ProcessPoolExecutor": harness.Pool} | changes
    vars(module).update(patches | {"CudaGraph": Watched, "update": update, "save": save})
    try:
        module.main()
    except Enough:
        pass
    except SystemExit as stopped:
        raise RuntimeError(stopped.code) from stopped
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
        length = {"num_updates": 20, "eval_every": 20, "log_every": 20, "run_dir": folder / "members"}
        drive("cql_red", flags_of("cql_red", args, folder, 2 * num_seeds, **length))
        wishes["offline"] = folder / "members"
    return {name: value for name, value in wishes.items() if name in fields}


def wait(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def seconds_of(functions, args):
    """Of a call of all functions, after a first one."""
    times = 1 if args.toy else 10
    for i in range(1 + times):
        if i == 1:
            wait(args)
            start = time.perf_counter()
        for function in functions:
            function()
    wait(args)
    return (time.perf_counter() - start) / times


def look_inside(learners, args):
    """What a replay of all learners takes, alone; on a CPU, operations stand for kernels."""
    updates = sum(x.updates for x in learners)
    replays = [x.again for x in learners]
    alone = updates / seconds_of(replays, args)
    kind = args.device.upper()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.__members__[kind]]) as profile:
        for replay in replays:
            replay()
        wait(args)
    kernels = [x for x in profile.events() if x.device_type.name == kind]
    seconds = Counter()
    for kernel in kernels:
        seconds[kernel.name[:80]] += kernel.time_range.elapsed_us() / 1e6 / updates
    x = torch.zeros(1, device=args.device)

    def launch():  # as many kernels that do next to nothing, one after the other
        for _ in kernels:
            x.add_(1)

    launch()
    if args.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
    limit = updates / seconds_of([launch], args)
    result = {"seconds in kernels": seconds.total(), "replays alone": alone, "empty kernels": limit}
    return result | {"kernels": len(kernels) / updates, "top": seconds.most_common(6)}
