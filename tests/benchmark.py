"""Throughput and scores, the two kinds of numbers in benchmarks.md.

python tests/benchmark.py throughput                     updates per second beside the matrix-product floor
python tests/benchmark.py tree                           draws from and writes to asac.py's tree, beside a binary one
python tests/benchmark.py authors --code FOLDER          the same, and whole updates, beside the authors' own code
python tests/benchmark.py members                        what an update of bred.py's five members costs beside one
python tests/benchmark.py atari                          updates of the offline Atari agents; memory of their loader
python tests/benchmark.py scores                         runs what is missing from the grids, then writes the tables
python tests/benchmark.py scores --grids p_base --jobs 2 one grid, two runs at a time
python tests/benchmark.py tables                         tables in benchmarks.md and pictures, from what is there

`scores` appends to results/scores.csv and results/curves.csv after every run; a run that is there is not made again,
so an interrupted grid goes on where it stopped.
"""

import csv
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, pairwise
from multiprocessing import get_context
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


def asac_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one ASAC update of one seed, with two critics, cannot do without."""
    return [
        *mlp_products([O, *H, A], B, backward=False),  # actor at s'
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # target critics
        *mlp_products([O + A, *H, 1], B, backward=True, copies=2),  # critics
        *mlp_products([O, *H, A], B, backward=True),  # actor, on the batch from the tree
        *mlp_products([O, *H, A], 2 * B, backward=False),  # new advantages of both batches: actor,
        *mlp_products([O + A, *H, 1], 4 * B, backward=False, copies=2),  # critics at logged and drawn actions
    ]


def awac_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one AWAC update of one seed, with two critics, cannot do without."""
    return [
        *mlp_products([O, *H, A], B, backward=False),  # actor at s'
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # target critics
        *mlp_products([O + A, *H, 1], B, backward=True, copies=2),  # critics
        *mlp_products([O, *H, A], B, backward=True),  # actor
        *mlp_products([O + A, *H, 1], 2 * B, backward=False, copies=2),  # critics at logged and drawn actions
    ]


def iql_scaled_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one update of iql_scaled.py, one seed, two critics, cannot do without."""
    return [
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # target critics
        *mlp_products([O, *H, 1], B, backward=True),  # V step
        *mlp_products([O, *H, 1], B, backward=False),  # V(s') after it
        *mlp_products([O + A, *H, 1], B, backward=True, copies=2),  # critics
        *mlp_products([O, *H, A], B, backward=True),  # actor
        *mlp_products([O + A, *H, 1], 2 * B, backward=False, copies=2),  # critics at logged and drawn actions
    ]


def td3_bc_scaled_products(O, A, B, H):  # noqa: E741
    """Every matrix product that one update of td3_bc_scaled.py, one seed, two critics, cannot do without."""
    return [
        *mlp_products([O, *H, A], B, backward=False),  # actor at s'
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # target critics
        *mlp_products([O + A, *H, 1], B, backward=True, copies=2),  # critics
        *mlp_products([O, *H, A], B, backward=True),  # actor
        *mlp_products([O + A, *H, 1], B, backward=False, copies=2),  # critics at its actions
        *[(B, o, i) for i, o in pairwise([O + A, *H, 1])] * 2,  # and back to these
    ]


@dataclass
class UpdatePath:
    """What `throughput` must know of an offline script to run its updates as its main loop does."""

    agent: str
    """name of the agent's class"""
    products: Callable
    """(O, A, B, hidden_sizes) -> the matrix products (m, k, n) of one update of one seed"""
    noise_shapes: Callable = lambda args, A: ()
    """what main() asks of draw_block"""
    more: Callable = lambda module, args, generators, agent: ()
    """what main() appends to its block"""
    flags: Callable = lambda sampler: {"sampler": sampler}
    """flags that make the sampler uniform, or red"""
    samplers: tuple[str, ...] = ("uniform", "red")
    """those that the script has"""
    probabilities: Callable = lambda module, dataset, args: module.sampling_probabilities(dataset, args)
    """P(i) as main() has it"""
    rows: Callable = lambda rows, input_and_action: rows
    """packed rows as update() reads them, from packed transitions"""
    num_transitions: int = 200_000
    """in the synthetic data"""
    learner: Callable = lambda module, agent, packed, args: partial(module.run_updates, agent, packed, args)
    """the function of a block's parts that main() captures"""

    def start(self, script, sampler, num_seeds, device, num_transitions=None, O=11, A=3):  # noqa: E741
        """Functions run(n), which makes n updates on synthetic transitions, and draw(n), which only draws for them."""
        module, num_transitions = harness.load(script), num_transitions or self.num_transitions
        args = module.Args(**self.flags(sampler), num_seeds=num_seeds)
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(num_transitions, 2 * O + A + 2)).astype(np.float32)
        rows[:, O : O + A] = np.tanh(rows[:, O : O + A])
        rows[:, -1] = rng.random(num_transitions) > 0.01
        lengths = np.full(num_transitions // 100, 100)
        dataset = module.Dataset(rows, lengths, rng.normal(size=len(lengths)), O, A, {"id": None})
        if len(self.samplers) > 1:
            draws = module.Sampler(self.probabilities(module, dataset, args), device)
        else:
            draws = lambda u: (u * num_transitions).long()
        agent = getattr(module, self.agent)(O, A, args, device, *[num_transitions] * (script == "asac"))
        generators = [torch.Generator(device).manual_seed(s) for s in range(num_seeds)]
        packed = torch.from_numpy(self.rows(rows, O + A)).to(device)
        learn, m = self.learner(module, agent, packed, args), module.UPDATES_PER_GRAPH

        def draw(n):
            for _ in range(max(1, n // module.UPDATES_PER_BLOCK)):
                block = module.draw_block(draws, generators, args.batch_size, *self.noise_shapes(args, A))
            return [*block, *self.more(module, args, generators, agent)]

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


UNIFORM_ONLY = {"samplers": ("uniform",), "flags": lambda sampler: {}}
UPDATE_PATHS = {
    "iql_red": UpdatePath("IQLAgent", iql_products),
    "td3_bc_red": UpdatePath(
        "TD3BCAgent",
        td3_bc_products,
        lambda args, A: ((args.batch_size, A),),
        lambda module, args, generators, agent: [module.actor_turns(0, args.policy_delay)],
    ),
    "dered_iql": UpdatePath("stage2_agent", dered_iql_products),
    "rvs_lds": UpdatePath(
        "RvSAgent",
        rvs_products,
        more=lambda module, args, generators, agent: [
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
    "asac": UpdatePath(
        "ASACAgent",
        asac_products,
        lambda args, A: ((args.batch_size, A), (2 * args.batch_size, A)),
        lambda module, args, generators, agent: [
            module.draw_uniforms(generators, args.batch_size, agent.tree.depth + 1)
        ],
        num_transitions=1_000_000,
        learner=lambda module, agent, packed, args: (
            lambda index, next_noise, noise, u: module.run_updates_on(agent, packed, args, index, u, next_noise, noise)
        ),
        **UNIFORM_ONLY,
    ),
    "awac": UpdatePath("AWACAgent", awac_products, lambda args, A: ((args.batch_size, A),) * 2, **UNIFORM_ONLY),
    "iql_scaled": UpdatePath(
        "ScaledIQLAgent", iql_scaled_products, lambda args, A: ((args.batch_size, A),), **UNIFORM_ONLY
    ),
    "td3_bc_scaled": UpdatePath(
        "ScaledTD3BCAgent", td3_bc_scaled_products, lambda args, A: ((args.batch_size, A),) * 2, **UNIFORM_ONLY
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
            hidden_sizes = args.hidden_sizes or harness.load(script).ARCHITECTURES[args.architecture]["actor"]
            products = path.products(11, 3, args.batch_size, hidden_sizes)
            operands = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device)) for m, k, n in products]
            outs = [torch.empty(m, n, device=device) for m, _, n in products]

            def floor(n, operands=operands, outs=outs):
                for _ in range(n):
                    for (a, b), out in zip(operands, outs):
                        torch.mm(a, b, out=out)

            n = self.updates if script != "cql_red" else max(20, self.updates // 10)  # CQL is ten times as dear
            variants, last = {"floor": (floor, n)}, path.samplers[-1]
            for sampler in path.samplers:
                run, draw = path.start(script, sampler, 1, device)
                variants |= {f"{sampler}, 1 seed": (run, n), f"sampler {sampler}": (draw, 100)}
            variants[f"{last}, 5 seeds"] = path.start(script, last, 5, device)[0], n // 2
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
            for name in (f"{sampler}, 1 seed" for sampler in path.samplers):
                print(f"  {name:29s} {rate[name]:8.1f} updates/s = {ratio[name]:.0%} of that floor")
            five, alone = f"{last}, 5 seeds", f"{last}, 1 seed"
            per_seed = np.median(5 * np.array(times[alone]) / times[five])
            print(f"  {five:29s} {5 * rate[five]:8.1f} seed-updates/s = {per_seed:.2f} x one seed")
            for name in path.samplers:
                share = np.median(times[f"sampler {name}"]) / np.median(times[f"{name}, 1 seed"])
                print(f"  sampler's share: {name} {share:.2%}")
            if last == "red":
                slower = np.median(np.array(times["red, 1 seed"]) / times["uniform, 1 seed"]) - 1
                print(f"  red costs {slower:+.1%} over uniform")


class BinaryTree:
    """The paper's tree in plain numpy, Algorithms 3 (with logaddexp) and 4: the yardstick of `tree`."""

    def __init__(self, logits):
        self.first_leaf = 2 ** (len(logits) - 1).bit_length()  # the root is node 1, the children of k are 2k and 2k + 1
        self.logmass = np.full(2 * self.first_leaf, -np.inf)
        self.logmass[self.first_leaf :][: len(logits)] = logits
        for first in 2 ** np.arange(self.first_leaf.bit_length() - 1)[::-1]:
            self.logmass[first : 2 * first] = np.logaddexp(*self.logmass[2 * first : 4 * first].reshape(-1, 2).T)

    def update(self, index, logit):
        node = index + self.first_leaf
        self.logmass[node] = logit  # numpy keeps the last of several
        while node[0] > 1:
            node = np.unique(node // 2)
            self.logmass[node] = np.logaddexp(self.logmass[2 * node], self.logmass[2 * node + 1])

    def sample(self, u):
        node, rest = np.ones(len(u), int), np.log1p(-u) + self.logmass[1]
        while node[0] < self.first_leaf:
            node *= 2
            left = self.logmass[node]
            right = rest >= left
            with np.errstate(invalid="ignore", divide="ignore"):  # of those who go left
                rest = np.where(right, rest + np.log1p(-np.exp(left - rest)), rest)
            node += right
        return node - self.first_leaf


@dataclass
class Tree:
    """What asac.py's tree does in an update, draws and writes, beside a binary tree in numpy that does the same."""

    num_leaves: int = 1_000_000
    """transitions in the dataset"""
    batch_size: int = 512
    """leaves to draw; twice as many are written: these, and as many uniform ones"""
    rounds: int = 30
    """rounds; each measures both in turn"""
    times: int = 50
    """draws and writes per round"""
    device: str = "auto"
    """of asac.py's tree, as in the scripts"""

    def run(self):
        torch.set_num_threads(1)
        asac, N, B = harness.load("asac"), self.num_leaves, self.batch_size
        device, rng = asac.choose_device(self.device), np.random.default_rng(0)
        first, others, logit = 3 * rng.normal(size=N), rng.integers(N, size=B), 3 * rng.normal(size=2 * B)
        tree, binary = asac.LogSumExpTree(1, N, device), BinaryTree(first)
        tree.update(torch.arange(N, device=device)[None], torch.from_numpy(first)[None].to(device))

        def step(u, others, logit):
            tree.update(torch.cat([tree.sample(u), others], 1), logit)

        generator = torch.Generator(device).manual_seed(0)
        draw_u = lambda: torch.rand(1, B, tree.depth + 1, generator=generator, dtype=torch.float64, device=device)
        written = [torch.from_numpy(x)[None].to(device) for x in (others, logit)]
        if device.type == "cuda":
            step = asac.cuda_graph(step, tree, draw_u(), *written)

        def run_tree(n):
            for _ in range(n):
                step(draw_u(), *written)

        def run_binary(n):
            for _ in range(n):
                binary.update(np.concatenate([binary.sample(rng.random(B)), others]), logit)

        rates = np.array(
            [[self.times / seconds_of(run, self.times, device, 1) for run in (run_tree, run_binary)]
             for _ in range(self.rounds + 1)]
        )[1:]  # fmt: skip  # the first round warms up
        print(f"draw {B}, then write {2 * B}, of {N:,} leaves, on {hardware(device)}; median, and best round:")
        for name, rate in zip(("asac.py", "binary, numpy"), rates.T):
            print(f"  {name:14s} {np.median(rate):8.0f} {rate.max():8.0f} times a second")
        print(f"  {np.median(rates[:, 0] / rates[:, 1]):.1f} times as fast")


@dataclass
class Authors:
    """asac.py beside the code of its paper's authors: the tree, and a whole update with the same networks.

    Needs a clone of github.com/facebookresearch/offline_rl, and what it imports (pip install hydra-core scipy).
    """

    code: str
    """folder of the clone"""
    hidden_size: int = 256
    """width of both hidden layers of every network"""
    batch_size: int = 512
    """transitions per update, for the critics and again for the actor"""
    num_transitions: int = 1_000_000
    """in the dataset, and so in the tree"""
    rounds: int = 15
    """rounds; each measures all in turn, in CPU-seconds of one thread"""
    updates: int = 20
    """updates per round; of the trees, five times as many"""

    def run(self):
        torch.set_num_threads(1)
        harness.load("asac").keep_freed_memory()  # for both
        sys.path.insert(0, self.code)
        from src.agent import td3as
        from src.buffer import InMemoryBuffer
        from src.log_prioritized_buffer import LogPrioritizedBuffer

        (O, A), N, B, rng = (11, 3), self.num_transitions, self.batch_size, np.random.default_rng(0)  # noqa: E741
        data = InMemoryBuffer(O, A, "cpu", N, prioritized=False)
        for array in (data.state, data.action, data.next_state, data.reward):
            array[:] = np.tanh(rng.normal(size=array.shape))
        data.not_done[:], data.size = 1, N
        loader = LogPrioritizedBuffer(data)
        networks = td3as.ArchiConfig()
        networks.actor.hidden_dim = networks.critic.hidden_dim = self.hidden_size
        shapes = dict(obs_shape=(O,), action_shape=(A,), archi=networks, batch_size=B)
        agent = td3as.TD3asAgent(**shapes, device="cpu", obs_type="", num_expl_steps=0, discrete_action=False)

        def authors_update(n):
            for step in range(n):
                agent.update(loader, step)

        def authors_tree(n):
            tree = loader.priority_tree
            for _ in range(n):
                drawn, others = tree.sample_segments(B)[1], tree.sample_uniform(B)[1]
                tree.update(np.concatenate([drawn, others]), logit[0].numpy())

        flags = {"hidden_sizes": (self.hidden_size,) * 2, "batch_size": B}
        path = replace(UPDATE_PATHS["asac"], flags=lambda sampler: flags)
        update, _ = path.start("asac", "uniform", 1, torch.device("cpu"), N)
        mine = harness.load("asac").LogSumExpTree(1, N, torch.device("cpu"))
        logit = torch.from_numpy(rng.normal(size=(1, 2 * B)))

        def tree(n):
            for _ in range(n):
                drawn = mine.sample(torch.rand(1, B, mine.depth + 1, dtype=torch.float64))
                mine.update(torch.cat([drawn, torch.randint(N, (1, B))], 1), logit)

        print(f"on {hardware(torch.device('cpu'))}, 1 thread, B={B}, {N:,} leaves, networks 2x{self.hidden_size}")
        for what, n, run, theirs in (
            ("updates", self.updates, update, authors_update),
            ("tree: draw and write", 5 * self.updates, tree, authors_tree),
        ):
            rates = np.array(
                [[n / seconds_of(f, n, torch.device("cpu"), 1) for f in (run, theirs)] for _ in range(self.rounds + 1)]
            )[1:]  # the first round warms up
            ours, other = np.median(rates, 0)
            ratio = np.median(rates[:, 0] / rates[:, 1])
            print(f"  {what:21s} {ours:8.1f} per second, the authors' {other:8.1f}: {ratio:.2f} x")


@dataclass
class Members:
    """What an update of several members of bred.py costs beside one, offline and online, draws included."""

    num_agents: int = 5
    """members beside one"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """of every network"""
    rounds: int = 5
    """rounds; each measures both in turn"""
    updates: int = 20
    """updates per round; the cheaper online ones: five times as many"""
    device: str = "auto"
    """as in the scripts"""

    def run(self):
        torch.set_num_threads(1)
        bred = harness.load("bred")
        bred.keep_freed_memory()
        device = bred.choose_device(self.device)
        for stage, policy in (("offline", "distilled"), ("online", "distilled"), ("online", "independent")):
            n = self.updates if stage == "offline" else 5 * self.updates
            runs = [self.updates_of(bred, stage, policy, N, n, device) for N in (1, self.num_agents)]
            seconds = [[seconds_of(run, n, device, 1) / n for run in runs] for _ in range(self.rounds + 1)][1:]
            one, several = 1e3 * np.median(seconds, axis=0)
            ratio = np.median([b / a for a, b in seconds])
            print(f"{stage}, {policy}: 1 member {one:.1f} ms, {self.num_agents} {several:.1f} ms: {ratio:.2f} times")

    def updates_of(self, bred, stage, policy, num_agents, n, device, num_offline=150_000, O=11, A=3):  # noqa: E741
        """A function run(n) that draws for n updates of a stage and makes them, on random transitions."""
        args = bred.Args(num_agents=num_agents, policy=policy, hidden_sizes=self.hidden_sizes)
        agent, rng = bred.STAGES[stage](O, A, args, device), np.random.default_rng(0)
        rows = rng.normal(size=(num_offline + args.online_steps, 2 * O + A + 2)).astype(np.float32)
        rows[:, O : O + A] = np.tanh(rows[:, O : O + A])
        rows[:, -1] = 1
        rows = torch.from_numpy(rows).to(device)
        if stage == "offline":
            update, shapes = bred.cql_update, bred.cql_noise_shapes(args, A)
            sampler = lambda u: (u * num_offline).long()
        else:
            update, shapes = bred.finetune_update, [(agent.num_policies, 1, args.batch_size, A)] * 2
            of = {"t": 1_000, "num_offline": num_offline, "num_steps": args.online_steps, "args": args}
            sampler = partial(bred.replay_rows, **of)
        generators = [torch.Generator(device).manual_seed(s) for s in range(num_agents if stage == "offline" else 1)]
        learn, m = partial(bred.run_stage, update, agent, rows, args), bred.UPDATES_PER_GRAPH

        def draw():
            return bred.draw_block(sampler, generators, args.batch_size, *shapes)

        step = bred.cuda_graph(learn, agent, *(x[:m] for x in draw())) if device.type == "cuda" else learn

        def run(n):
            for start in range(0, n, m):
                if start % bred.UPDATES_PER_BLOCK == 0:
                    block = draw()
                at = start % bred.UPDATES_PER_BLOCK
                step(*(x[at : at + m] for x in block))

        return run


# ---------------------------------------------------------------------------------------------------------------------
# Atari
# ---------------------------------------------------------------------------------------------------------------------

ATARI = "offline_dqn_atari", "rem_atari", "ensemble_dqn_atari", "qrdqn_atari"
PONG = {"id": "ALE/Pong-v5", "kwargs": {}}


def pong_rows(num_rows):
    """Rows of random play as a replay file has them, with three rows of padding before every episode: (frame, action,
    reward, terminal)."""
    games, rng = harness.load("offline_dqn_atari").make_atari(PONG, 1), np.random.default_rng(0)
    rows, padding = [], (np.zeros((84, 84), np.uint8), 0, 0.0, 0)
    for seed in count():
        rows += 3 * [padding]
        obs, over = games.reset(seed=seed)[0], False
        while not over:
            if len(rows) == num_rows:
                return [np.stack(column) for column in zip(*rows)]
            frame, action = obs[0, -1].copy(), int(rng.integers(6))
            obs, reward, terminated, truncated, _ = games.step(np.array([action]))
            over = bool(terminated[0] or truncated[0])
            rows.append((frame, action, float(reward[0]), int(over)))


def write_pong(folder, num_rows, distinct=10_000):
    """File 0 of a replay: `distinct` rows of random play, again and again (too far apart for gzip to notice)."""
    columns = pong_rows(min(num_rows, distinct))
    folder.mkdir(parents=True)
    arrays = {"add_count": np.array(num_rows)}
    dtypes = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}
    for (name, dtype), x in zip(dtypes.items(), columns[1:]):
        arrays[f"$store$_{name}"] = np.resize(x.astype(dtype), num_rows)
    for name, x in arrays.items():
        with gzip.open(folder / f"{name}_ckpt.0.gz", "wb") as file:
            np.save(file, x)
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_rows, 84, 84)}
    with gzip.open(folder / "$store$_observation_ckpt.0.gz", "wb", 1) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, num_rows, distinct):
            file.write(columns[0][: num_rows - start].tobytes())


def atari_updates(script, folder, num_seeds, device, **flags):
    """A function run(n) that makes n updates as the main loop of an offline Atari script does, and its replay."""
    module = harness.load(script)
    args = module.Args(dataset=(str(folder),), env_id=PONG["id"], num_seeds=num_seeds, **flags)
    replay = module.Replay(module.load_replay(args)[0], args, device)
    replay.use(0, prefetch=False)
    agent = (module.DQNAgent if script == ATARI[0] else module.MultiHeadAgent)(6, args, device)
    generators = [torch.Generator().manual_seed(s) for s in range(num_seeds)]
    learn, m = partial(module.run_atari_updates, agent, args), module.UPDATES_PER_GRAPH

    def chunks():
        while True:
            index, *noise = module.draw_block(replay, generators, args.batch_size)
            if script == "rem_atari":
                noise.append(module.draw_mixtures(generators, args.num_heads).to(device))
            for i in range(0, module.UPDATES_PER_BLOCK, m):
                yield replay.batches(index[i : i + m]) + [x[i : i + m] for x in noise]

    def run(n):
        for inputs in islice(endless, n // m):
            step(*inputs)

    endless = chunks()
    step = module.cuda_graph(learn, agent, *next(endless)) if device.type == "cuda" else learn
    return run, replay


def gigabytes(name):
    """VmRSS, VmHWM (its peak), RssAnon or RssFile of this process."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024 / 1e9


def sample_replay(folder, flags, windows):
    """In a process of its own: draws 1,000 batches from each of so many windows of frames. Gigabytes and seconds."""
    module = harness.load("offline_dqn_atari")
    args = module.Args(dataset=(str(folder),), env_id=PONG["id"], **flags)
    files = module.load_replay(args)[0]
    before = {name: gigabytes(name) for name in ("VmRSS", "RssAnon")}
    replay, generator, waited = module.Replay(files, args, torch.device("cpu")), torch.Generator(), []
    for number in range(windows):
        start = time.perf_counter()
        replay.use(number, prefetch=False)
        waited.append(time.perf_counter() - start)
        start = time.process_time()
        for _ in range(10):
            (index,) = module.draw_block(replay, [generator], args.batch_size)
            for rows in index.split(module.UPDATES_PER_GRAPH):
                replay.batches(rows)
        batches = time.process_time() - start
    return {
        "held": sum(x.nbytes for x in replay.buffers) / 1e9,
        "peak": gigabytes("VmHWM") - before["VmRSS"],
        "own": gigabytes("RssAnon") - before["RssAnon"],
        "load": np.median(waited),
        "batch": batches,  # seconds for 1,000: milliseconds for one
    }


@dataclass
class Atari:
    """Updates and frames per second of the offline Atari agents; memory and time that a replay file takes."""

    scripts: tuple[str, ...] = ATARI
    """which agents"""
    num_seeds: tuple[int, ...] = (1, 3)
    """agents side by side"""
    threads: int = 1
    """CPU threads"""
    rounds: int = 5
    """rounds; each measures every variant once, in turn"""
    updates: int = 20
    """updates per variant and round; a multiple of 10"""
    device: str = "auto"
    """as in the scripts"""
    file_rows: int = 0
    """then write a file of so many rows to --folder, and sample from it with --memory-gb; the public files have a
    million, 7 GB unpacked"""
    memory_gb: float = 2.0
    """memory budget of that"""
    folder: str = tempfile.gettempdir()
    """for that file"""

    def run(self):
        torch.set_num_threads(self.threads)
        harness.load(ATARI[0]).keep_freed_memory()
        device = harness.load(ATARI[0]).choose_device(self.device)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            self.time_updates(Path(folder) / "small", device)
            if self.file_rows:
                self.measure_file(Path(folder) / "large", device)

    def time_updates(self, folder, device):
        write_pong(folder, 10_000)
        variants = {(s, S): atari_updates(s, folder, S, device)[0] for s in self.scripts for S in self.num_seeds}
        times = defaultdict(list)
        for round_number in range(self.rounds + 1):
            for variant, run in variants.items():
                seconds = seconds_of(run, self.updates, device, self.threads) / self.updates
                if round_number:  # the first round warms up
                    times[variant].append(seconds)
        batch = harness.load(ATARI[0]).Args().batch_size
        print(f"{hardware(device)}, {self.threads} thread(s), B={batch}, medians of {self.rounds} rounds")
        for (script, S), seconds in times.items():
            rate = S / np.median(seconds)
            print(f"  {script:20s} {S} seed(s): {rate:8.1f} updates/s of a seed, {5 * batch * rate:10,.0f} frames/s")

    def measure_file(self, folder, device):
        start = time.perf_counter()
        write_pong(folder, self.file_rows)
        packed = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        print(f"a file of {self.file_rows:,} rows: {packed:.2f} GB, written in {time.perf_counter() - start:.0f} s")
        kinds = {
            f"--memory-gb {self.memory_gb:g}": ({"memory_gb": self.memory_gb}, 3),
            f"--frames-dir {self.folder}": ({"memory_gb": self.memory_gb, "frames_dir": self.folder}, 1),
        }
        for name, job in kinds.items():
            with get_context("spawn").Pool(1) as pool:
                found = pool.apply(sample_replay, (folder, *job))
            taken = f"{found['load']:.0f} s to load, {found['batch']:.2f} ms a batch"
            print(
                f"  {name}: {found['held']:.2f} GB of frames, resident at most {found['peak']:.2f} GB above the start, "
                f"{found['own']:.2f} GB without mapped files; {taken}"
            )
        run, replay = atari_updates(ATARI[0], folder, 1, device, memory_gb=self.memory_gb)

        def rate(going_on):
            start, n = time.perf_counter(), 0
            while going_on(n):
                run(10)
                n += 10
            return f"{n} updates, {n / (time.perf_counter() - start):.1f} a second of wall time"

        run(10)
        alone = rate(lambda n: n < 50)
        replay.use(0, prefetch=True)
        beside = rate(lambda n: not all(job.done() for _, job in replay.jobs))
        print(f"  {ATARI[0]} while a window is loaded: {beside}; before that: {alone}")
        replay.close()


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
    """before any online steps, for which there are flags; of sac.py, which has no dataset: the online steps"""
    online: bool = False
    """whether the curve is that of the online steps, from the step that the updates end at"""
    members: "Cell | None" = None
    """the run of bred.py whose trained members this one starts from"""
    evaluations: str = ""
    """which of the run's evaluations: "_m50" for evaluations_m50.csv; such a cell is filled with the run's own"""

    @property
    def run(self):
        """Names the run: cells of two grids with the same command line share it."""
        return hashlib.sha1(" ".join(self.command).encode()).hexdigest()[:10] + self.evaluations

    def evaluated(self, evaluations):
        """The cell of other evaluations of the same run."""
        return replace(self, variant=self.variant + evaluations.replace("_m", ", M="), evaluations=evaluations)

    @property
    def command(self):
        """The command line that fills this cell."""
        every = max(1, self.num_updates // 20)
        source, length = ("--dataset", *self.dataset.split(" + ")), "--num-updates"
        if self.script == "sac":
            source, length = ("--env-id", ENVIRONMENTS[self.dataset.split("/")[0]]), "--num-steps"
        members = ("--offline", f"runs/benchmark/{self.members.run}") if self.members else ()
        return [
            f"algorithms/{self.script}.py", *source, *self.flags, *members, "--num-seeds", str(self.num_seeds),
            length, str(self.num_updates), "--eval-every", str(every), "--eval-workers", "0",
        ]  # fmt: skip

    @property
    def command_line(self):
        """The same as one types it, the members' run before it."""
        before = f"{self.members.command_line} --run-dir runs/benchmark/{self.members.run} && " if self.members else ""
        return f"{before}python {' '.join(self.command)}"

    @property
    def first_step(self):
        """Where the cell's curve begins, on the axis of evaluations.csv."""
        return self.num_updates if self.online and self.script != "sac" else 0


ENVIRONMENTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5"}  # of sac.py, by the beginning of a dataset


SMALL = ("--hidden-sizes", "128", "128")  # a quarter of the arithmetic, for grids that a CPU could not finish otherwise


MEDIUM = ("--hidden-sizes", "256", "256")  # a fifteenth of the arithmetic of 2x1024
TINY = ("--hidden-sizes", "64", "64")
SMALL_CORL = ("--preset", "corl", "--policy-learning-rate", "1e-4", *SMALL)  # its 3e-5 is for a million updates
FAST = ("--polyak", "0.02")  # V learns its level in a quarter of the updates, see benchmarks.md
# PointMaze: IQL with its AntMaze settings, CRR with its beta for 0/1 rewards; ReD with the p_base of its paper's mazes
MAZE_FLAGS = {"iql_red": ("--expectile", "0.9", "--beta", "10"), "crr_red": ("--beta", "1")}
SOFT = ("--beta", "1", "--polyak", "0.005", "--target-period", "1", "--num-critics", "2")  # of CRR, as SAC has them


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


# BRED's step size and first share of online data, as in bred.py's help
BRED_FLAGS = {
    "hopper": ("--online-policy-learning-rate", "3e-5", "--initial-online-fraction", "0.5"),
    "halfcheetah": ("--online-policy-learning-rate", "3e-4", "--initial-online-fraction", "0.75"),
}
FIGURE_3 = {"BRED": (), "CQL-ft": ("--num-agents", "1", "--replay", "uniform", "--first-updates", "1000")}
FIGURES_4_TO_6 = {  # replay; distillation; size of the ensemble
    "BRED": (),
    "uniform": ("--replay", "uniform"),
    "online-only": ("--replay", "online-only"),
    "independent": ("--policy", "independent"),
    "N = 2": ("--num-agents", "2"),
    "N = 1": ("--num-agents", "1"),
}
BRED_DATASETS = (DATASETS[0], DATASETS[2], "hopper/random-v0")
ON_CPU = {  # flags of each run: the members' offline stage, bred.py from there on, and the other scripts
    "members": (*TINY, "--num-action-samples", "4", "--bc-updates", "2000"),
    "bred": ("--distil-epochs", "20", "--distil-patience", "3", "--anneal-steps", "10000"),
    "awac": (*TINY, "--batch-size", "256"),
    "bcq": (*TINY, "--vae-hidden-sizes", "128", "128"),
    "sac": TINY,
}


def bred_cells(grid, dataset, variants, num_agents, num_seeds, num_updates, num_steps, extra):
    """bred.py under several flags, from the same members; --policy independent spares these a distillation."""
    flags = "--num-agents", str(num_agents), "--policy", "independent", "--online-steps", "0", "--eval-episodes", "0"
    members = Cell(grid, "bred", dataset, "members", (*flags, *extra.get("members", ())), num_seeds, num_updates)
    shared = (*BRED_FLAGS[dataset.split("/")[0]], "--online-steps", str(num_steps), *extra.get("bred", ()))
    return [
        Cell(grid, "bred", dataset, variant, (*shared, *flags), num_seeds, num_updates, online=True, members=members)
        for variant, flags in variants.items()
    ]


def online_cells(grid, dataset, num_agents, num_seeds, num_updates, num_steps, extra):
    """The methods of the BRED paper's Figure 3. extra: more flags of each run, as in ON_CPU."""
    steps = ("--online-steps", str(num_steps))
    awac_flags = ("--eval-samples", "1", *steps, *extra.get("awac", ()))
    awac_updates = min(num_updates, 50_000)  # all that AWAC's code makes before it goes online
    return [
        *bred_cells(grid, dataset, FIGURE_3, num_agents, num_seeds, num_updates, num_steps, extra),
        Cell(grid, "awac", dataset, "AWAC-ft", awac_flags, num_seeds, awac_updates, online=True),
        Cell(grid, "bcq", dataset, "BCQ-ft", (*steps, *extra.get("bcq", ())), num_seeds, num_updates, online=True),
        Cell(grid, "sac", dataset, "SAC", extra.get("sac", ()), num_seeds, num_steps, online=True),
    ]


# what a CPU can afford of the paper's small (2x256) and large networks (actor 5x1024 wide): a residual block, width 128
SCALES = {
    "small": ("--architecture", "simple-small", "--hidden-sizes", "64", "64", "--num-critics", "2"),
    "middle": ("--architecture", "modern", "--hidden-sizes", "128", "128", "128", "--num-critics", "2"),
    "5 critics": ("--architecture", "simple-small", "--hidden-sizes", "64", "64", "--num-critics", "5"),
}
LARGE_BETA = ("--beta", "20")  # the largest that the paper tries; its middle 0.5 is small beside Hopper's returns
UNBALANCED = "hopper/random-v0 + hopper/expert-v0"


def scaled_cells(grid, script, datasets, scales):
    """A script of the paper on scale with several networks; each run evaluates the mean action and the best of 50."""
    cells = []
    for dataset in datasets:
        preset = ("--preset", "antmaze") if "maze" in dataset else () if script == "td3_bc_scaled" else LARGE_BETA
        for scale in scales:
            flags = (*preset, *SCALES[scale], "--batch-size", "256", *FAST, "--eval-episodes", "5")
            cell = Cell(grid, script, dataset, scale, flags, 3, 8_000)
            cells += [cell, cell.evaluated("_m50")]
    return cells


def small_atari(learning_rate, optimizer_eps="1.5e-4"):
    """Flags for a CPU: a seventh of the arithmetic, and targets for thousands of updates in place of millions."""
    return (
        *("--channels", "16", "32", "32", "--hidden-size", "256", "--padding", "valid", "--gamma", "0.97"),
        *("--learning-rate", learning_rate, "--optimizer-eps", optimizer_eps, "--target-every", "250"),
        *("--eval-episodes", "3"),
    )


ATARI_DATA = "atari/mspacman"
ATARI_VARIANTS = {
    "DQN": ("offline_dqn_atari", ()),
    "Ensemble-DQN": ("ensemble_dqn_atari", ()),
    "REM": ("rem_atari", ()),
    "QR-DQN": ("qrdqn_atari", ()),
}


def atari_cells(grid, variants, num_seeds, num_updates, extra=()):
    """The offline Atari agents on the embedded log."""
    return [
        Cell(grid, script, ATARI_DATA, variant, (*flags, *extra), num_seeds, num_updates)
        for variant, (script, flags) in variants.items()
    ]


GRIDS = {
    "atari": atari_cells("atari", ATARI_VARIANTS, 3, 6_000, small_atari("2.5e-4")),  # the step size of the log's DQN
    "atari_large_steps": atari_cells("atari_large_steps", ATARI_VARIANTS, 3, 10_000, small_atari("1e-3"))[:2],
    "atari_small_eps": [
        cell
        for eps, step_size, variants in (("1e-6", "2.5e-4", ("REM", "Ensemble-DQN")), ("1.5e-4", "5e-5", ("QR-DQN",)))
        for cell in atari_cells("atari_small_eps", ATARI_VARIANTS, 3, 6_000, small_atari(step_size, eps))
        if cell.variant in variants
    ],
    "atari_longer": atari_cells("atari_longer", ATARI_VARIANTS, 3, 12_000, small_atari("2.5e-4", "1e-6"))[2:3],
    "atari_paper": atari_cells(
        "atari_paper",
        ATARI_VARIANTS
        | {
            "DQN (RMSProp)": (
                "offline_dqn_atari",
                ("--optimizer", "rmsprop", "--learning-rate", "2.5e-4", "--optimizer-eps", "1e-5"),
            ),
            "Averaged Ensemble-DQN": ("ensemble_dqn_atari", ("--averaged-target",)),
        },
        3,
        1_250_000,
    ),
    "scaled": [  # the most telling first
        *scaled_cells("scaled", "asac", DATASETS[:1], ("small", "5 critics", "middle")),
        *scaled_cells("scaled", "asac", (UNBALANCED,), ("small", "5 critics", "middle")),
        *scaled_cells("scaled", "asac", DATASETS[3:], ("small", "middle")),
    ],
    "scaled_beta": [
        replace(cell, variant=variant, flags=("--beta", beta, *cell.flags[2:]))
        for variant, beta in (("beta 0.5", "0.5"), ("beta 5", "5"), ("beta 20", "20"))
        for cell in scaled_cells("scaled_beta", "asac", DATASETS[:1], ("small",))[:1]
    ],
    "scaled_awac": scaled_cells("scaled_awac", "awac", DATASETS[:1], ("small", "middle")),
    "scaled_td3_bc": scaled_cells("scaled_td3_bc", "td3_bc_scaled", DATASETS[:1], ("small", "middle")),
    "scaled_iql": scaled_cells("scaled_iql", "iql_scaled", DATASETS[:1], ("small", "middle")),
    "rvs": rvs_cells("rvs", DATASETS[:3], 3, 10_000, MEDIUM),
    "rvs_dropout": rvs_cells("rvs_dropout", DATASETS[1:2], 3, 10_000, (*MEDIUM, "--dropout", "0")),
    "red_vs_uniform": sampler_cells("red_vs_uniform", "iql_red", DATASETS[0], ALL[:2], 5, 100_000, SMALL),
    "red_vs_uniform_40k": sampler_cells("red_vs_uniform_40k", "iql_red", DATASETS[0], ALL[:2], 5, 40_000, SMALL),
    "samplers": [c for d in DATASETS for c in sampler_cells("samplers", "iql_red", d, ALL, 3, 40_000, SMALL)],
    "p_base": p_base_cells("p_base", ("0", "0.2", "0.5", "1"), 3, 40_000, SMALL),
    "p_base_fast": p_base_cells("p_base_fast", ("0", "0.2"), 3, 40_000, (*SMALL, *FAST)),
    "fast": sampler_cells("fast", "iql_red", DATASETS[0], ALL[:2], 3, 40_000, (*SMALL, *FAST)),
    "td3_bc": [c for d in DATASETS for c in sampler_cells("td3_bc", "td3_bc_red", d, ALL[:2], 3, 40_000, SMALL)],
    "crr": [c for d in DATASETS for c in sampler_cells("crr", "crr_red", d, ALL[:2], 3, 20_000, SMALL)],
    "crr_beta": [
        replace(cell, variant=variant, flags=(*cell.flags, *flags))
        for variant, flags in (("beta 1", ("--beta", "1")), ("beta 10", ()), ("beta 1, soft targets", SOFT))
        for cell in sampler_cells("crr_beta", "crr_red", DATASETS[1], ALL[:1], 3, 10_000, SMALL)
    ],
    "cql": [c for d in DATASETS for c in sampler_cells("cql", "cql_red", d, ALL, 3, 5_000, SMALL_CORL)],
    "cql_narrow": sampler_cells("cql_narrow", "cql_red", DATASETS[1], ALL[:2], 3, 15_000, TINY),
    "dered": [c for d in DATASETS for c in dered_cells("dered", d, 3, 40_000, SMALL)],
    "bred": [c for d in BRED_DATASETS for c in online_cells("bred", d, 2, 3, 20_000, 20_000, ON_CPU)],
    # the protocols of the papers, for a GPU
    "bred_paper": [c for d in BRED_DATASETS for c in online_cells("bred_paper", d, 5, 4, 1_000_000, 250_000, {})],
    "bred_ablations": [
        cell
        for dataset in BRED_DATASETS[:2]
        for cell in bred_cells("bred_ablations", dataset, FIGURES_4_TO_6, 5, 4, 1_000_000, 250_000, {})
    ],
    "paper": [c for d in DATASETS for c in sampler_cells("paper", "iql_red", d, ALL, 5, 1_000_000)],
}


SCALED = "networks 2x64 (small) and modern ones of a residual block, 3x128 (middle; the paper: 2x256, and an actor of "
SCALED += "5x1024), 2 critics where nothing is said; M=50: the best of 50 actions instead of the mean, from the same "
SCALED += (
    "checkpoints. Batch 256, target critics four times as fast, evaluations of 5 episodes; beta 20 but for the maze."
)
TITLES = {
    "atari": "Offline agents on the embedded log, convolutions 16-32-32, 3 episodes an evaluation (REM's Table 1).",
    "atari_large_steps": "The same with a step size of 1e-3 instead of 2.5e-4.",
    "atari_small_eps": "As the grid atari, but REM and Ensemble-DQN with Adam's eps at 1e-6 (each of 200 heads has "
    "a 200th of the gradient), and QR-DQN with the REM code's step size of 5e-5.",
    "atari_longer": "As the grid atari_small_eps, with twice the updates.",
    "atari_paper": "The grid atari's agents with the paper's networks and flags, a tenth of its updates; for a GPU.",
    "scaled": f"ASAC; {SCALED}",
    "scaled_beta": "The small networks with three temperatures of the advantages.",
    "scaled_awac": "AWAC in the same setting.",
    "scaled_td3_bc": "TD3+BC in the same setting.",
    "scaled_iql": "IQL with AWAC's actor in the same setting.",
    "rvs": "Cloning given the return, and LDS weights; networks 2x256, batch 512 (the IR paper's Table 2).",
    "rvs_dropout": "The same without dropout.",
    "red_vs_uniform": "ReD against uniform sampling on the replay data, networks 2x128.",
    "red_vs_uniform_40k": "The same with 40,000 updates.",
    "samplers": "Four samplers, networks 2x128; the maze with expectile 0.9, beta 10, p_base 0.2.",
    "p_base": "The ReD paper's Table 3 on 0/1 returns, networks 2x128.",
    "p_base_fast": "Part of the same with target critics that move four times as fast.",
    "fast": "IQL on the replay data with target critics that move four times as fast.",
    "td3_bc": "TD3+BC, networks 2x128 (the ReD paper's Table 1).",
    "crr": "CRR, networks 2x128 (Table 1).",
    "crr_beta": "CRR with uniform sampling and two values of beta; soft targets: polyak 0.005 every update, 2 critics.",
    "cql": "CQL, the preset corl with networks 2x128 and a policy step size of 1e-4 (Tables 1 and 4).",
    "cql_narrow": "CQL, the preset jaxcql (observations as they are) with networks 2x64.",
    "dered": "DeReD on IQL, networks 2x128 (Tables 2 and 5): stage 1 is uniform, stage 2 adds half as many updates.",
    "bred": "BRED's Figure 3 on a CPU: networks 2x64, N = 2, 20,000 offline updates, 20,000 online steps.",
    "bred_paper": "BRED's Figure 3: networks 2x256, N = 5, 1M offline updates, 250,000 online steps; for a GPU.",
    "bred_ablations": "BRED's Figures 4 (replay), 5 (distillation) and 6 (N) in the same protocol; for a GPU.",
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


def csv_columns(path):
    """A csv file of numbers as columns: {"update": array, "seed": array, ...}."""
    rows = read(path)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def summary(cell, path):
    """Learning curves and scores, a dict for each row of curves.csv and scores.csv, from a csv file of evaluations."""
    rows, shared = csv_columns(path), {"run": cell.run}
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
            }
        )
    return curves, scores


MEMBERS_LOCK = Lock()  # cells that run side by side may want the same members


def make_run(cell):
    """Makes the run of one cell, or goes on with it where it was stopped; returns its folder, or None if it failed."""
    run_dir = harness.ROOT / "runs" / "benchmark" / cell.run
    if cell.members:  # made once, and kept for other cells
        with MEMBERS_LOCK:
            there = (run_dir.with_name(cell.members.run) / "offline.pt").exists()
            if not (there or make_run(cell.members)):
                return None
    flags = "--checkpoint-every", str(max(1, cell.num_updates // 20))
    if (run_dir / "checkpoint.pt").exists():
        command = [sys.executable, cell.command[0], "--resume", str(run_dir), *flags]
    else:
        shutil.rmtree(run_dir, ignore_errors=True)  # killed before its first checkpoint
        command = [sys.executable, *cell.command, "--run-dir", str(run_dir), *flags]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"FAILED {' '.join(command)}\n{done.stderr}", flush=True)
        return None
    return run_dir


def run_cell(cell, lock):
    """Makes the run of one cell and appends its scores and curves."""
    start, run_dir = time.time(), make_run(cell)
    if not run_dir:
        return
    seconds, commit = time.time() - start, json.loads((run_dir / "config.json").read_text())["git_commit"]
    shared, curves, scores = {"run": cell.run}, [], []
    for path in sorted(run_dir.glob("evaluations*.csv")):  # of the mean action; some scripts have the best of 50, too
        evaluations = path.stem.removeprefix("evaluations")
        more_curves, more_scores = summary(cell.evaluated(evaluations), path)
        for row in more_scores:
            row |= {"seconds": round(seconds), "hardware": hardware(), "commit": (commit or "")[:10]}
            row["command"] = cell.command_line
        curves, scores = curves + more_curves, scores + more_scores
    rows = csv_columns(run_dir / "evaluations.csv")
    swept = [{**shared, **row} for row in read(run_dir / "target_returns.csv")]  # of conditioned policies
    with lock:
        if swept:
            append(RESULTS / "targets.csv", swept)
        if cell.script == "rvs_lds":  # its paper compares stability
            append(RESULTS / "spread.csv", [{**shared, **row} for row in spread_over_episodes(rows)])
        append(RESULTS / "curves.csv", curves)
        append(RESULTS / "scores.csv", scores)
    shutil.rmtree(run_dir)
    for variant in dict.fromkeys(row["variant"] for row in scores):
        mean = np.mean([row["last10_score"] for row in scores if row["variant"] == variant])
        print(f"{cell.grid:15s} {cell.dataset:24s} {variant:20s} score {mean:6.1f} ({seconds:.0f} s)", flush=True)


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
        cells = [cell for grid in self.grids for cell in GRIDS[grid] if cell.run not in there and not cell.evaluations]
        cells = {cell.run: cell for cell in cells if cell.dataset in (self.datasets or cell.dataset)}.values()
        if self.dry_run:
            for cell in cells:
                print(cell.command_line)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda cell: run_cell(cell, lock), cells))
        Tables().run()


@dataclass
class Tables:
    """The score tables in benchmarks.md, open rows included, and learning curves (results/*.svg)."""

    def run(self):
        scores, curves, spreads = (read(RESULTS / f"{name}.csv") for name in ("scores", "curves", "spread"))
        lines = []
        for grid, cells in GRIDS.items():
            columns = list(dict.fromkeys(cell.variant for cell in cells))
            lines += [f"### {grid}", "", TITLES[grid], ""]
            lines += [f"| dataset | seeds | updates | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
            pictures = []
            for dataset in dict.fromkeys(cell.dataset for cell in cells):
                in_row = {cell.variant: cell for cell in cells if cell.dataset == dataset}
                values, over_episodes = [], []
                for column in columns:
                    cell = in_row.get(column)
                    found = [
                        float(row["last10_std_over_episodes"]) for row in spreads if cell and row["run"] == cell.run
                    ]
                    over_episodes.append(f"{np.mean(found):.1f} ± {np.std(found):.1f}" if found else "")
                    found = [float(row["last10_score"]) for row in scores if cell and row["run"] == cell.run]
                    values.append(f"{np.mean(found):.1f} ± {np.std(found):.1f}" if found else "open" if cell else "")
                    if found and cell.online:
                        values[-1] += online_summary(cell, curves)
                first = next(iter(in_row.values()))
                lines.append(f"| {dataset} | {first.num_seeds} | {first.num_updates:,} | {' | '.join(values)} |")
                if any(over_episodes):
                    lines.append(f"| ... its deviation over episodes | | | {' | '.join(over_episodes)} |")
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


def online_curve(cell, curves):
    """Rows of a cell's curve from its first online step on, with `update` counted from there."""
    rows = [{**row, "update": int(row["update"]) - cell.first_step} for row in curves if row["run"] == cell.run]
    return [row for row in rows if row["update"] >= 0]


def online_summary(cell, curves):
    """Where the online stage began, and its lowest point afterwards: both means over seeds."""
    rows = online_curve(cell, curves)
    mean = {
        t: np.mean([float(row["normalized_score"]) for row in rows if row["update"] == t])
        for t in sorted({row["update"] for row in rows})
    }
    begin = f"from {mean.pop(0):.1f}, " if 0 in mean else ""
    return f" ({begin}lowest {min(mean.values()):.1f})" if mean else ""


def plot(grid, dataset, cells, curves):
    """One picture: mean over seeds, and one standard deviation about it, of every cell that has been run."""
    runs = {cell.variant: online_curve(cell, curves) for cell in cells}
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
    xlabel = "environment steps" if cells[0].online else "updates"
    scripts = {cell.script for cell in cells}
    title = f"{cells[0].script if len(scripts) == 1 else grid} on {dataset}, {seeds} seeds, mean ± std"
    axes.set(xlabel=xlabel, ylabel="normalised score", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    name = f"{grid}_{dataset.replace(' ', '').replace('/', '-')}.svg"
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
        | Annotated[Tree, tyro.conf.subcommand("tree")]
        | Annotated[Authors, tyro.conf.subcommand("authors")]
        | Annotated[Members, tyro.conf.subcommand("members")]
        | Annotated[Atari, tyro.conf.subcommand("atari")]
        | Annotated[Scores, tyro.conf.subcommand("scores")]
        | Annotated[Tables, tyro.conf.subcommand("tables")],
        description=__doc__,
    ).run()
