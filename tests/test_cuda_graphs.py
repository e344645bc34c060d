"""The GPU path of the moved scripts without a GPU: CUDA graphs emulated on the CPU.

A CUDA graph is a fixed list of operations on fixed memory. Recording writes down every operation below
autograd, with the tensors that it read and wrote; Graph.replay runs them again and puts the results where
they stood. So whatever a real graph would freeze is frozen here too: Python branches, counters, numbers,
tensors that are replaced instead of written. A run through such graphs has to end with an eager one's bits.

What a graph cannot hold at all (waiting for the device, copies from the host, shapes that depend on data) is
looked for by a second device that computes nothing, torch's `meta`: the recorded step runs there.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import sys
import types

import harness
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

RUN = "--log-every", 40, "--eval-every", 80, "--eval-episodes", 0, "--num-seeds", 2


class Graph:
    """Stands in for torch.cuda.CUDAGraph: a list of operations on the tensors of the recording."""

    def __init__(self):
        self.operations = []
        self.num_replays = 0

    @torch.no_grad()
    def replay(self):
        self.num_replays += 1
        for function, args, kwargs, outputs in self.operations:
            for old, new in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Stands in for torch.cuda.graph: writes down what runs in it. A real one runs nothing, so that what was
    there before is put back at the end."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.before = {}
        self.rng_state = torch.get_rng_state()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.keep(given.get(argument.name))
        outputs = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, outputs))
        return outputs

    def keep(self, value):
        """Remembers the memory of tensors that are about to be written."""
        for tensor in tree_leaves(value):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, before in self.before.values():
            storage.copy_(before)
        torch.set_rng_state(self.rng_state)


class OnlyThere(TorchDispatchMode):
    """Fails on an operation that mixes devices: a graph neither copies from the host nor reads it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket == torch.ops.aten._fused_adam_:  # not on meta; what CUDA's insists on:
            outputs = None
            for like in zip(*args[:4]):  # parameter, gradient, two moments
                strides = {tuple(n for n, size in zip(x.stride(), x.shape) if size > 1) for x in like}
                assert len(strides) == 1 and like[0].is_contiguous()
                assert {x.dtype for x in like} == {torch.float32}
        else:
            outputs = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, outputs)) if torch.is_tensor(x)]
        copies = function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        devices = {x.device.type for x in tensors if copies or x.dim()}  # a number of the host may enter
        assert len(devices) < 2, f"{function} mixes {devices}"
        return outputs


def on_no_device(function, *inputs):
    """Calls function(*inputs) with copies on the device `meta` of every tensor that they can reach."""
    memo = {}

    def moved(tensor, memo):
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
        adam = sys.modules["torch.optim.adam"]
        patch.setattr(adam, "_device_dtype_check_for_fused", lambda *args: None)
        there = [copied(x) for x in (function, *inputs)]
        with OnlyThere():
            there[0](*there[1:])


@pytest.fixture
def emulated(monkeypatch):
    """emulated(script): its CudaGraph records on the CPU; returns the list of all that are made."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def switch(script):
        module = harness.load(script)
        source = inspect.getsource(module.CudaGraph)
        assert source.count(".is_cuda") == 1
        namespace = dict(vars(module))
        exec(source.replace(".is_cuda", ".is_cpu"), namespace)
        made = []

        class Watched(namespace["CudaGraph"]):
            def __init__(self, step):
                made.append(self)
                super().__init__(step)

            def __call__(self, *inputs):
                if self.num_calls == 3:  # the next one is recorded
                    on_no_device(self.step, *inputs)
                return super().__call__(*inputs)

        monkeypatch.setattr(module, "CudaGraph", Watched)
        return made

    return switch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


@pytest.mark.parametrize("script", harness.OFFLINE)
def test_a_run_in_graphs_ends_as_an_eager_one(script, data, emulated, tmp_path):
    """... one that is resumed, too. Every graph replays often enough to show what it froze."""
    length = 240 if script == "dered_iql" else 160  # its stages have graphs of their own
    flags = "--dataset", data, *harness.small(script, dropout=0.2), *harness.length(script, length, 120), *RUN
    harness.run_main(script, *flags, "--run-dir", tmp_path / "eager")
    made = emulated(script)
    harness.run_main(script, *flags, "--run-dir", tmp_path / "graphs")
    assert made and all(graph.graph.num_replays >= 3 for graph in made)
    assert all(graph.num_calls == graph.graph.num_replays + 3 for graph in made)
    assert harness.differing_leaves(tmp_path / "graphs", tmp_path / "eager") == []
    harness.run_main(script, "--resume", tmp_path / "eager", *harness.length(script, length + 100, 120))
    made.clear()
    harness.run_main(script, "--resume", tmp_path / "graphs", *harness.length(script, length + 100, 120))
    assert made and harness.differing_leaves(tmp_path / "graphs", tmp_path / "eager") == []


def sum_of_squares():
    total = torch.zeros(1)
    return lambda x: total.add_(x * x).clone()


def times_a_count():
    count = itertools.count(1)
    return lambda x: x * next(count)


SQUARES = [0, 1, 5, 14, 30, 55, 91, 140]
COUNTS = [0, 2, 6, 12, 20, 30, 42, 56], [0, 2, 6, 12, 16, 20, 24, 28]


@pytest.mark.parametrize("make_step, eager, in_graphs", [(sum_of_squares, SQUARES, SQUARES), (times_a_count, *COUNTS)])
def test_the_emulation_computes_and_freezes(emulated, make_step, eager, in_graphs):
    """Eight calls: numbers of Python are frozen."""
    (script, *_) = harness.OFFLINE
    emulated(script)
    CudaGraph = harness.load(script).CudaGraph.__bases__[0]
    for step, expected in ((make_step(), eager), (CudaGraph(make_step()), in_graphs)):
        assert [float(step(torch.tensor([float(i)]))) for i in range(8)] == expected


def test_what_a_graph_cannot_hold_is_found():
    waits = lambda x: x * x.sum().item(), lambda x: x[x > 0]
    for step in *waits, lambda x: x + torch.ones(1), lambda x: x.copy_(torch.ones(1)):
        with pytest.raises((AssertionError, RuntimeError)):
            on_no_device(step, torch.ones(1))
    on_no_device(lambda x: x + 1, torch.ones(1))
