"""The GPU path of every script without a GPU: CUDA graphs emulated on the CPU.

A CUDA graph is a fixed list of operations on fixed memory. Recording writes down every operation below autograd, with
the tensors that it read and wrote; Graph.replay runs them again and puts the results where they stood. So whatever a
real graph would freeze is frozen here too: Python branches, counters and numbers, tensors that are replaced instead of
written. A run of main() through such graphs has to end with the bits of an eager one.

What a graph cannot hold at all (waiting for the device, copies from the host, shapes that depend on data) is looked
for by a second device that computes nothing, torch's `meta`: the captured function runs there, with all its tensors.
"""

import contextlib
import copy
import functools
import signal
import sys
import types

import harness
import pytest
from test_atari_data import CircularMemory, make_episodes

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

SMALL = "--eval-episodes 0 --device cpu --num-seeds 2"
OFFLINE = f"{SMALL} --hidden-sizes 8 8 --batch-size 8 --num-updates 43 --log-every 15"
MODERN = f"{OFFLINE.replace('8 8', '8 8 8')} --architecture modern --num-critics 3"
FINETUNED = f"{OFFLINE} --online-steps 40 --steps-per-epoch 20 --first-updates 23 --updates-per-epoch 13"
ATARI = f"{SMALL} --channels 2 3 2 --hidden-size 8 --batch-size 4"
LOGGED_ATARI = f"{ATARI} --num-updates 33 --log-every 20"

# name: (script, flags, how many graphs main() captures)
RUNS = {
    "iql_red": ("iql_red", OFFLINE, 1),
    "cql_red": ("cql_red", f"{OFFLINE} --num-action-samples 2", 1),
    "cql_red, other terms": ("cql_red", f"{OFFLINE} --num-action-samples 2 --lagrange-gap 1 --max-target-backup", 1),
    "td3_bc_red": ("td3_bc_red", OFFLINE, 2),  # one that begins with the actor's turn, one that does not
    "crr_red": ("crr_red", OFFLINE, 1),
    "crr_red, max, binary": ("crr_red", f"{OFFLINE} --advantage max --weight binary", 1),
    "dered_iql": ("dered_iql", f"{OFFLINE} --stage2-updates 33", 2),
    "rvs_lds": ("rvs_lds", f"{OFFLINE} --dropout 0", 1),
    "asac": ("asac", OFFLINE, 1),
    "asac, modern": ("asac", MODERN, 1),
    "awac": ("awac", f"{OFFLINE} --online-steps 25", 2),
    "awac, modern": ("awac", MODERN, 1),
    "iql_scaled": ("iql_scaled", OFFLINE, 1),
    "td3_bc_scaled": ("td3_bc_scaled", OFFLINE, 1),
    "bred": ("bred", f"{FINETUNED} --num-agents 2 --num-action-samples 2 --distil-epochs 3", 3),
    "bcq": ("bcq", f"{FINETUNED} --vae-hidden-sizes 8 --num-candidates 3", 1),
    "offline_dqn_atari": ("offline_dqn_atari", LOGGED_ATARI, 1),
    "offline_dqn_atari, rmsprop": ("offline_dqn_atari", f"{LOGGED_ATARI} --optimizer rmsprop", 1),
    "rem_atari": ("rem_atari", f"{LOGGED_ATARI} --num-heads 4", 1),
    "qrdqn_atari": ("qrdqn_atari", f"{LOGGED_ATARI} --num-heads 4", 1),
    "ensemble_dqn_atari": ("ensemble_dqn_atari", f"{LOGGED_ATARI} --num-heads 4", 1),
    "sac": ("sac", f"{SMALL} --hidden-sizes 8 --env-id Pendulum-v1 --num-steps 60 --learning-starts 20", 1),
    "dqn_atari": ("dqn_atari", f"{ATARI} --env-id ALE/Pong-v5 --num-steps 90 --learning-starts 40 --replay-size 80", 1),
    "rem_online_atari": ("rem_online_atari", f"{ATARI} --env-id ALE/Pong-v5 --num-steps 90 --learning-starts 40", 1),
}


def test_every_script_is_here():
    assert {script for script, _, _ in RUNS.values()} == {path.stem for path in harness.SCRIPTS}


class Graph:
    """Stands in for torch.cuda.CUDAGraph: a list of operations on the tensors of the recording."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, outputs in self.operations:
            for old, new in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Stands in for torch.cuda.graph: writes down what runs in it. A real one runs nothing: state is put back after."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, outputs))
        return outputs


class OnlyThere(TorchDispatchMode):
    """Fails on an operation that mixes devices: a CUDA graph cannot copy from the host, and holds its numbers fixed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket == torch.ops.aten._fused_adam_:  # knows no meta; what its CUDA kernel insists on:
            outputs = None
            for like in zip(*args[:4]):  # parameter, gradient, two moments
                strides = {tuple(n for n, size in zip(x.stride(), x.shape) if size > 1) for x in like}
                assert len(strides) == 1 and like[0].is_contiguous() and {x.dtype for x in like} == {torch.float32}
        else:
            outputs = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, outputs)) if torch.is_tensor(x)]
        copies = function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        devices = {x.device.type for x in tensors if copies or x.dim()}  # a number on the host may enter a kernel
        assert len(devices) < 2, f"{function} mixes {devices}"
        return outputs


def on_no_device(function, *inputs):
    """Calls function(*inputs) with copies on the device `meta` of every tensor that they hold or can reach."""
    memo = {}

    def moved(tensor, memo):
        if tensor.dtype == torch.bool:  # td3_bc_red's turns of the actor, which the host knows
            return tensor
        if id(tensor) not in memo:
            there = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = torch.nn.Parameter(there) if isinstance(tensor, torch.nn.Parameter) else there
        return memo[id(tensor)]

    def copied(x):
        if isinstance(x, types.FunctionType) and x.__closure__:  # a function of main() sees its variables
            cells = tuple(types.CellType(copied(cell.cell_contents)) for cell in x.__closure__)
            return types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, cells)
        if isinstance(x, functools.partial):
            return functools.partial(copied(x.func), *map(copied, x.args), **x.keywords)
        return copy.deepcopy(x, memo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__deepcopy__", moved)
        patch.setattr(torch.nn.Parameter, "__deepcopy__", moved)
        there = [copied(x) for x in (function, *inputs)]
    with OnlyThere():
        there[0](*there[1:])


def captured_copy(script, folder):
    """The script as a module whose main() captures CUDA graphs on whatever device it runs."""
    lines = (harness.ROOT / "algorithms" / f"{script}.py").read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        if "cuda_graph(" in line and "def " not in line:
            j = next(j for j in range(i, 0, -1) if 'device.type == "cuda"' in lines[j])
            assert i - j <= 3
            lines[j] = lines[j].replace('device.type == "cuda"', "True")
    path = folder / f"{script}.py"
    path.write_text("".join(lines))
    spec = harness.importlib.util.spec_from_file_location(f"{script}_captured", path)
    module = sys.modules[spec.name] = harness.importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(node, path=""):
    """All leaves of a checkpoint, by their path of keys."""
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in weights(value, f"{path}/{key}").items()}
    if isinstance(node, (list, tuple)):
        return {k: v for i, value in enumerate(node) for k, v in weights(value, f"{path}/{i}").items()}
    return {path: node}


def run_main(module, monkeypatch, *flags):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    try:
        module.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small logs of Hopper and of Pong."""
    hopper = harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())
    pong = tmp_path_factory.mktemp("log") / "Pong" / "1" / "replay_logs"
    CircularMemory(pong).log(make_episodes())
    return {"hopper": hopper, "pong": pong}


@pytest.fixture
def emulated(monkeypatch):
    """torch.cuda's streams and graphs on the CPU."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_graphs_ends_as_an_eager_one(name, data, emulated, monkeypatch, tmp_path):
    script, flags, num_graphs = RUNS[name]
    flags = flags.split()
    if "--env-id" not in flags:
        flags += ["--dataset", data["pong" if "atari" in script else "hopper"]]
    run_main(harness.load(script), monkeypatch, *flags, "--run-dir", tmp_path / "eager")
    captured, calls = captured_copy(script, tmp_path), []
    capture = captured.cuda_graph

    def inspected(step, agent, *inputs):
        on_no_device(step, *inputs)
        replay = capture(step, agent, *inputs)
        calls.append([])
        return lambda *inputs, call=calls[-1]: call.append(1) or replay(*inputs)

    captured.cuda_graph = inspected
    run_main(captured, monkeypatch, *flags, "--run-dir", tmp_path / "captured")
    assert len(calls) == num_graphs and all(calls), calls
    ours, theirs = (
        weights(torch.load(tmp_path / where / "checkpoint.pt", weights_only=True)) for where in ("captured", "eager")
    )
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        assert torch.equal(ours[path], x) if torch.is_tensor(x) else ours[path] == x, path
