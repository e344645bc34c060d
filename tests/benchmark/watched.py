"""main() of a script in this process, watched: what gpu.py drives the scripts with."""

import contextlib
import inspect
import sys
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
    stays; the one of update `stop` ends the run. After every call that learns comes after_call(graph, all that
    learn). Changes: of the module."""
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
            if torch.cuda.is_available() and self.num_watched != 4:  # before it records, PyTorch waits by itself
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
