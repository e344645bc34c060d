"""asac.py against numpy, numbers by hand and its own runs: tree, ensemble, networks, evaluation sampling, update."""

import copy
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import harness
import numpy as np
import pytest
import torch

asac = harness.load("asac")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
CPU = torch.device("cpu")
INF = math.inf


def make_args(**flags):
    return asac.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, **flags})


def make_agent(args, num_transitions=100, spread=None, device="cpu"):
    """An ASACAgent. With `spread`, all parameters are drawn anew, so that targets and online networks differ."""
    agent = asac.ASACAgent(O, A, args, torch.device(device), num_transitions)
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_transitions(N=100, seed=0):
    """(N, O + A + 1 + O + 1) random transitions, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, N, O))
    action, reward = rng.uniform(-1, 1, size=(N, A)), rng.normal(size=(N, 1))
    not_terminated = np.float64(rng.random((N, 1)) > 0.25)
    return torch.from_numpy(np.concatenate([obs, action, reward, next_obs, not_terminated], -1)).float()


def make_draws(args, agent, N=100, seed=0):
    """What one update reads at random: index (S, B), u (S, B, depth + 1), next_noise (S, B, A), noise (S, 2 B, A)."""
    generator, (S, B) = torch.Generator().manual_seed(seed), (args.num_seeds, args.batch_size)
    index = torch.randint(N, (S, B), generator=generator)
    u = torch.rand(S, B, agent.tree.depth + 1, generator=generator, dtype=torch.float64)
    return index, u, torch.randn(S, B, A, generator=generator), torch.randn(S, 2 * B, A, generator=generator)


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    return [(getattr(mlp, f"weight{i}"), getattr(mlp, f"bias{i}")) for i in range(len(mlp.layers))]


def state_of(agent):
    """A copy of the state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x.clone() for name, x in agent.state_dict().items() if not name.startswith("optimizers.")}


@pytest.fixture
def run_main(monkeypatch):
    """run_main(*flags): asac's main() in this process; it puts the process's signal handlers back afterwards."""

    def call(*flags):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["asac.py", *map(str, flags)])
        try:
            asac.main()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


SMALL = "--hidden-sizes", 16, 16, "--batch-size", 16, "--device", "cpu", "--eval-workers", 0
BLIND = *SMALL, "--eval-episodes", 0


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same_checkpoint(run_dir, reference):
    """Bit-identical weights, targets, optimisers, trees, generators; the same update; the same evaluations."""
    ours, theirs = checkpoint_of(run_dir), checkpoint_of(reference)
    assert ours["num_updates"] == theirs["num_updates"] and ours["agent"].keys() == theirs["agent"].keys()
    assert not [name for name in ours["agent"] if not torch.equal(ours["agent"][name], theirs["agent"][name])]
    assert all(torch.equal(a, b) for a, b in zip(ours["generators"], theirs["generators"], strict=True))
    names = sorted(path.name for path in Path(reference).glob("*.csv"))
    assert names == sorted(path.name for path in Path(run_dir).glob("*.csv"))
    assert all((Path(run_dir) / n).read_text() == (Path(reference) / n).read_text() for n in names)


# ---------------------------------------------------------------------------------------------------------------------
# The tree
# ---------------------------------------------------------------------------------------------------------------------


def new_tree(num_seeds, num_leaves, fan_out, top):
    kind = type("Tree", (asac.LogSumExpTree,), {"FAN_OUT": fan_out, "TOP": top})
    return kind(num_seeds, num_leaves, CPU)


def tree_of(leaves, fan_out=8, top=16_384):
    """A LogSumExpTree with these leaves (S, N), with another shape if asked for."""
    leaves = torch.from_numpy(np.array(leaves, np.float64))
    tree = new_tree(*leaves.shape, fan_out, top)
    tree.update(torch.arange(leaves.shape[1]).expand(leaves.shape), leaves)
    return tree


def leaves_of(tree):
    return tree.level0.view(tree.num_seeds, -1)[:, : tree.num_leaves].numpy()


def frequencies(tree, num_draws, seed=0):
    """(S, N) shares of the leaves in independent draws."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(tree.num_seeds, num_draws, tree.depth + 1, generator=generator, dtype=torch.float64)
    index = tree.sample(u)
    assert index.shape == u.shape[:2] and index.dtype == torch.int64
    return np.stack([np.bincount(row, minlength=tree.num_leaves) for row in index.numpy()]) / num_draws


def logsumexp(x):
    with np.errstate(divide="ignore", invalid="ignore"):
        m = np.max(x, -1, keepdims=True)
        m = np.where(np.isfinite(m), m, 0)
        return np.log(np.exp(x - m).sum(-1)) + m[..., 0]


def assert_chi_square(share, p, num_draws):
    """Pearson's statistic within six standard deviations of its mean; what has probability 0 is never drawn."""
    assert np.all(share[p == 0] == 0)
    share, p = share[p > 0], p[p > 0]
    rare = p * num_draws < 5
    if rare.any():
        share, p = (np.append(x[~rare], x[rare].sum()) for x in (share, p))
    statistic, freedom = num_draws * np.sum((share - p) ** 2 / p), max(1, len(p) - 1)
    assert statistic < freedom + 6 * math.sqrt(2 * freedom), (statistic, freedom)


SHAPES = [(8, 16_384), (8, 1), (2, 1), (4, 3)]  # (fan-out, top): the script's own; deep ones, binary as in the paper


@pytest.mark.parametrize("fan_out, top", SHAPES)
@pytest.mark.parametrize("N", [1, 2, 3, 5, 8, 1000, 1001, 1_000_000])
def test_tree_after_random_updates(N, fan_out, top):
    """Duplicates, ties, -inf: every leaf is its last write, every node the logsumexp of its children, and the root
    that of all leaves, to 1e-10."""
    if N == 1_000_000 and (fan_out, top) != SHAPES[0]:
        pytest.skip("large trees in the script's own shape only")
    rng, S = np.random.default_rng(N), 2
    tree = new_tree(S, N, fan_out, top)
    expected, K = np.zeros((S, N)), 1024 if N > 5000 else 64
    for _ in range(20):
        index = rng.integers(N, size=(S, K)) if N < 5000 else rng.integers(N, size=(S, K // 4)).repeat(4, 1)
        logit = rng.choice([0.0, 700.0, -5000.0, 5000.0, -INF, 1.5], size=(S, K)) + rng.normal(size=(S, 1))
        tree.update(torch.from_numpy(index), torch.from_numpy(logit))
        for s in range(S):
            for i, x in zip(index[s], logit[s]):
                expected[s, i] = x
    np.testing.assert_array_equal(leaves_of(tree), expected)
    np.testing.assert_allclose(tree.total.numpy(), logsumexp(expected), rtol=0, atol=1e-10)
    for i in range(tree.depth):
        children, parents = getattr(tree, f"level{i}").view(-1, fan_out), getattr(tree, f"level{i + 1}")
        np.testing.assert_allclose(parents.numpy(), logsumexp(children.numpy()), rtol=0, atol=1e-10)
    assert (tree.level0.view(S, -1)[:, N:] == -INF).all() and not any(x.isnan().any() for x in tree.buffers())
    if N == 1_000_000:
        assert tree.depth == 2


@pytest.mark.parametrize("fan_out, top", SHAPES)
def test_duplicate_writes_do_not_race(monkeypatch, fan_out, top):
    """scatter_ leaves open which of several writes to one place counts, so all of them must be of one value."""
    scatter, writes = torch.Tensor.scatter_, []

    def checked(tensor, dim, index, value):
        last = dict(zip(index.tolist(), value.tolist()))
        assert [last[i] for i in index.tolist()] == value.tolist()
        writes.append(len(index) - len(last))
        return scatter(tensor, dim, index, value)

    tree, rng = new_tree(2, 30, fan_out, top), np.random.default_rng(0)
    monkeypatch.setattr(torch.Tensor, "scatter_", checked)
    for _ in range(5):
        tree.update(torch.from_numpy(rng.integers(30, size=(2, 40))), torch.from_numpy(rng.normal(size=(2, 40))))
    assert len(writes) == 5 * (1 + tree.depth) and min(writes) > 0


@pytest.mark.parametrize("fan_out, top", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "huge", "half -inf", "ties", "one"])
def test_tree_draws_from_the_softmax(fan_out, top, kind):
    rng, N, num_draws = np.random.default_rng(1), 37, 20_000
    leaves = rng.normal(size=(2, N))
    if kind == "huge":
        leaves += rng.choice([-5000, 5000], size=leaves.shape)
    if kind == "half -inf":
        leaves[:, rng.permutation(N)[: N // 2]] = -INF
    if kind == "ties":
        leaves = np.full((2, N), -5000.0)
    if kind == "one":
        leaves = np.full((2, N), -INF)
        leaves[[0, 1], [0, N - 1]] = 3.0
    share = frequencies(tree_of(leaves, fan_out, top), num_draws)
    for s in range(2):
        assert_chi_square(share[s], np.exp(leaves[s] - logsumexp(leaves[s])), num_draws)


@pytest.mark.parametrize("fan_out, top", SHAPES)
def test_tree_by_hand(fan_out, top):
    """The numbers of the spec, 4.1."""
    tree = tree_of([[-INF, 0, -INF, math.log(3)]], fan_out, top)
    np.testing.assert_allclose(frequencies(tree, 40_000)[0], [0, 0.25, 0, 0.75], atol=0.01)
    tree = tree_of([[1000, 1000, -1000]], fan_out, top)
    assert tree.total.item() == pytest.approx(1000 + math.log(2), abs=1e-10)
    np.testing.assert_allclose(frequencies(tree, 40_000)[0], [0.5, 0.5, 0], atol=0.012)
    tree = tree_of([[-5000] * 3], fan_out, top)
    assert tree.total.item() == pytest.approx(-5000 + math.log(3), abs=1e-10)
    assert tree_of([[-INF] * 5], fan_out, top).total.item() == -INF


def test_tree_draws_by_stratified_numbers_to_1e5():
    """A level that is searched whole has no noise but the rounding of 2e5 evenly spaced numbers."""
    leaves = np.random.default_rng(0).normal(size=(1, 50))
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5).view(1, -1, 1) / 200_000
    share = np.bincount(tree_of(leaves).sample(u)[0], minlength=50) / 200_000
    assert np.abs(share - np.exp(leaves[0] - logsumexp(leaves[0]))).max() < 1e-5


@pytest.mark.parametrize("fan_out, top", SHAPES)
def test_tree_at_the_ends_of_the_unit_interval(fan_out, top):
    """u = 0 draws the first leaf that has mass, the largest u below 1 the last one, whatever -inf is around them."""
    leaves = np.full((2, 41), -INF)
    leaves[:, [9, 10, 31]] = [[0.0, -2.0, 1.0], [-5000.0, -5000.0, -5001.0]]
    tree = tree_of(leaves, fan_out, top)
    for u, leaf in ((0.0, 9), (1 - 2**-53, 31)):
        assert (tree.sample(torch.full((2, 3, tree.depth + 1), u, dtype=torch.float64)) == leaf).all()


def printed_tree(leaves):
    """A perfect binary tree by Algorithm 3 as printed, as {node: value} with the root at 1."""
    value = {len(leaves) + i: x for i, x in enumerate(leaves)}
    for n in reversed(range(1, len(leaves))):
        a, b = value[2 * n], value[2 * n + 1]
        m = max(a, b)
        value[n] = m + math.log1p(math.exp(a - m) + math.exp(b - m))
    return value


def printed_draws(leaves, num_draws=50_000):
    """Shares of the leaves under Algorithm 4 on that tree, with evenly spaced u."""
    value, counts = printed_tree(leaves), np.zeros(len(leaves))
    for k in range(num_draws):
        r, n = math.log((k + 0.5) / num_draws) + value[1], 1
        while n < len(leaves):
            v, n = value[2 * n], 2 * n
            if r >= v:
                r, n = r + math.log1p(-math.exp(v - r)) if r > v else -INF, n + 1
        counts[n - len(leaves)] += 1
    return counts / num_draws


@pytest.mark.parametrize(
    "p, printed", [([0.25] * 4, [0.111, 0.222, 0.111, 0.556]), ([0.1, 0.2, 0.3, 0.4], [0.037, 0.148, 0.111, 0.704])]
)
def test_the_printed_algorithm_is_biased_and_ours_is_not(p, printed):
    """Algorithm 3 counts the larger child twice: its root is ln 3 for ln 2, and its draws lean to the right."""
    assert printed_tree([0.0, 0.0])[1] == pytest.approx(math.log(3))
    assert printed_tree([0.0] * 8)[1] == pytest.approx(3 * math.log(3))
    assert tree_of([[0.0, 0.0]], 2, 1).total.item() == pytest.approx(math.log(2), abs=1e-12)
    assert tree_of([[0.0] * 8], 2, 1).total.item() == pytest.approx(3 * math.log(2), abs=1e-12)
    np.testing.assert_allclose(printed_draws(np.log(p)), printed, atol=1e-3)
    np.testing.assert_allclose(frequencies(tree_of([np.log(p)], 2, 1), 100_000)[0], p, atol=0.006)
    np.testing.assert_allclose(frequencies(tree_of([np.log(p)]), 100_000)[0], p, atol=0.006)


def test_trees_of_seeds_are_apart():
    """S trees do what S single ones do, bit by bit; an update of one leaves the others alone."""
    rng, leaves = np.random.default_rng(0), np.random.default_rng(1).normal(size=(3, 20_000))
    trees = tree_of(leaves)
    index, logit = torch.from_numpy(rng.integers(20_000, size=(3, 500))), torch.from_numpy(rng.normal(size=(3, 500)))
    u = torch.from_numpy(rng.random((3, 300, 2)))
    trees.update(index, logit)
    drawn = trees.sample(u)
    for s in range(3):
        alone = tree_of(leaves[s : s + 1])
        alone.update(index[s : s + 1], logit[s : s + 1])
        assert alone.depth == 1 and torch.equal(trees.total[s], alone.total[0])
        assert torch.equal(drawn[s], alone.sample(u[s : s + 1])[0])


def test_a_tree_and_its_checkpoint_are_one():
    """What a state dict or a deep copy holds is what is updated and drawn from; loading works in place."""
    tree, index = tree_of(np.zeros((1, 40_000))), torch.tensor([[7]])
    other = copy.deepcopy(tree)
    tree.update(index, torch.full((1, 1), 100.0, dtype=torch.float64))
    assert tree.state_dict()["level0"][7] == 100 and tree.state_dict()["level1"].max() == 100
    u = torch.rand(1, 100, 2, dtype=torch.float64)
    assert (tree.sample(u) == 7).all() and not (other.sample(u) == 7).any()
    other.load_state_dict(tree.state_dict())
    assert torch.equal(other.sample(u), tree.sample(u)) and other.total == tree.total
    other.update(index, torch.zeros(1, 1, dtype=torch.float64))
    assert copy.deepcopy(other).state_dict()["level1"].max().item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("fan_out, top", SHAPES)
def test_nan_is_drawn_from_inside(fan_out, top):
    """A diverged agent goes on with indices of transitions that exist."""
    for leaves in (np.full((2, 1001), math.nan), np.full((2, 3), -INF), np.full((2, 1001), INF)):
        tree = tree_of(leaves, fan_out, top)
        index = tree.sample(torch.rand(2, 50, tree.depth + 1, dtype=torch.float64))
        assert index.min() >= 0 and index.max() < leaves.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Ensemble, policy, networks
# ---------------------------------------------------------------------------------------------------------------------


def test_pessimism_identities():
    q = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(asac.pessimistic(q[:, :2], 0.5), q[:, :2].amin(1), rtol=0, atol=1e-15)
    torch.testing.assert_close(asac.pessimistic(q[:, :2], 1.0), q[:, :2].mean(1) - (q[:, 0] - q[:, 1]).abs())
    torch.testing.assert_close(asac.pessimistic(q, 0.0), q.mean(1))
    assert torch.equal(asac.pessimistic(q[:, :1], 0.5), q[:, 0])
    rank_weights = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(asac.pessimistic(q, 0.5), (q.sort(1).values * rank_weights).sum(1))
    pairs = [torch.minimum(q[:, i], q[:, j]) for i in range(5) for j in range(i)]
    torch.testing.assert_close(asac.pessimistic(q, 0.5), torch.stack(pairs).mean(0))
    torch.testing.assert_close(asac.pessimistic(q[:, [3, 1, 4, 0, 2]], 0.7), asac.pessimistic(q, 0.7))
    assert (asac.pessimistic(q, 0.7) < asac.pessimistic(q, 0.3)).all()
    ties = torch.ones(1, 3, 2, requires_grad=True)
    asac.pessimistic(ties, 0.5).sum().backward()
    torch.testing.assert_close(ties.grad, torch.full((1, 3, 2), 1 / 3))


def test_policy():
    """Density of the plain Gaussian; draws clipped to [-1, 1], with gradient 1 inside and 0 on the bounds."""
    actor = make_agent(make_args(num_seeds=2), spread=0.5).actor
    obs, generator = (
        torch.randn(2, 500, O, generator=torch.Generator().manual_seed(0)),
        torch.Generator().manual_seed(1),
    )
    mean = actor(obs)
    action = torch.rand(2, 500, A, generator=generator) * 2 - 1
    expected = torch.distributions.Normal(mean, 0.2).log_prob(action).sum(-1)
    torch.testing.assert_close(actor.log_prob(mean, action), expected)
    assert torch.equal(actor.act(obs), mean) and mean.abs().max() <= 1

    noise = torch.randn(2, 500, A, generator=generator)
    mean = mean.detach().requires_grad_()
    drawn = actor.sample(mean, noise)
    torch.testing.assert_close(drawn, (mean + 0.2 * noise).clamp(-1, 1))
    drawn.sum().backward()
    inside = (mean + 0.2 * noise).abs() < 1
    assert 0 < inside.float().mean() < 1 and torch.equal(mean.grad, inside.float())
    clipped = actor.sample(torch.zeros(2, 500, A), noise, noise_clip=0.3)
    torch.testing.assert_close(clipped, (0.2 * noise).clamp(-0.3, 0.3))
    assert clipped.abs().max().item() == pytest.approx(0.3)


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    "architecture, actor, critic",
    [("simple-small", 73_734, 73_985), ("simple-large", 4_230_150, 139_777), ("modern", 4_234_246, 140_289)],
)
def test_capacity(monkeypatch, architecture, actor, critic):
    """Numbers of parameters on Walker (24 observations, 6 actions): modern has LayerNorms more than simple-large."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, **kwargs: weight)  # slow, and not the question
    args = asac.Args(architecture=architecture, num_critics=2)
    generators = [torch.Generator()]
    build = partial(asac.make_network, args)
    assert num_parameters(build("actor", (1,), 24, 6, asac.unit_orthogonal, generators)) == actor
    assert num_parameters(build("critic", (1, 2), 30, 1, asac.orthogonal, generators)) == 2 * critic
    sizes = [24, *asac.ARCHITECTURES[architecture]["value"], 1]
    assert sum(i * o + o for i, o in zip(sizes, sizes[1:])) == (72_449 if "small" in architecture else 1_076_225)


MODERN = {"architecture": "modern", "hidden_sizes": (16,) * 5}


def test_modern_network_against_numpy():
    """in - relu - two blocks x + W2 relu(W1 LN(x)) - out, W1 and W2 over their largest singular values."""
    args = make_args(num_seeds=2, num_critics=3, **MODERN)
    agent = make_agent(args, spread=0.5).double()
    for _ in range(300):  # the weights have been drawn anew: let power iteration catch up
        for i in range(1, 5):
            agent.critic.power_iteration(i)
    x = torch.randn(2, 8, O + A, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = agent.critic(x)
    assert out.shape == (2, 3, 8, 1)
    for s in range(2):
        for c in range(3):
            parameter = {name: p[s, c].detach().numpy() for name, p in agent.critic.named_parameters()}
            h = np.maximum(x[s].numpy() @ parameter["weight0"] + parameter["bias0"], 0)
            for i in (1, 3):
                z = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
                z = z * parameter[f"norm_weight{i}"] + parameter[f"norm_bias{i}"]
                for j in (i, i + 1):
                    w = parameter[f"weight{j}"]
                    z = z @ (w / np.linalg.svd(w)[1][0]) + parameter[f"bias{j}"]
                    z = np.maximum(z, 0) if j == i else z
                h = h + z
            expected = h @ parameter["weight5"] + parameter["bias5"]
            np.testing.assert_allclose(out[s, c].detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_spectral_norm():
    """sigma converges to the largest singular value, one step for each pass with gradients; its gradient is that of
    W / sigma(W); one start alone has it exactly: orthogonal weights."""
    net = make_agent(make_args(num_seeds=2, num_critics=2, **MODERN)).critic
    for i in range(1, 5):
        torch.testing.assert_close(net.normalized_weight(i) * math.sqrt(2), net.layers[i][0])
    net = net.double()
    with torch.no_grad():
        for weight, _ in layers_of(net):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(2, 4, O + A, dtype=torch.float64)
    before = {name: b.clone() for name, b in net.named_buffers()}
    with torch.no_grad():
        net(x)
    copy.deepcopy(net).eval()(x)
    net.eval()
    net(x)
    net.train()
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    reference = copy.deepcopy(net)
    net(x), [reference.power_iteration(i) for i in range(1, 5)]
    for (name, b), expected in zip(net.named_buffers(), reference.buffers()):
        assert torch.equal(b, expected) and not torch.equal(b, before[name])
    for _ in range(500):
        net(x)
    for i in range(1, 5):
        weight = net.layers[i][0]
        true = torch.linalg.matrix_norm(weight, 2)[..., None, None]
        torch.testing.assert_close(net.normalized_weight(i), weight / true, rtol=1e-6, atol=1e-9)
        probe = torch.randn(weight.shape, dtype=torch.float64)
        ours, theirs = (
            torch.autograd.grad((x * probe).sum(), weight)[0] for x in (net.normalized_weight(i), weight / true)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_initial_weights():
    """Orthogonal, gain 1 for the actor and sqrt(2) for all critics, each its own; biases 0; targets are copies."""
    agent = asac.ASACAgent(O, A, make_args(num_seeds=2, num_critics=3, hidden_sizes=(32, 32)), CPU, 10)
    for mlp, gain in ((agent.actor.net, 1), (agent.critic, math.sqrt(2))):
        for weight, bias in layers_of(mlp):
            small = min(weight.shape[-2:])
            gram = weight.mT @ weight if weight.shape[-1] == small else weight @ weight.mT
            torch.testing.assert_close(gram, (gain**2 * torch.eye(small)).expand_as(gram), rtol=0, atol=1e-5)
            assert (bias == 0).all()
    first = agent.critic.weight0.flatten(0, 1)
    assert not any(torch.equal(first[i], first[j]) for i in range(6) for j in range(i))
    for frozen, online in zip(agent.target_critic.parameters(), agent.critic.parameters()):
        assert torch.equal(frozen, online) and frozen.data_ptr() != online.data_ptr() and not frozen.requires_grad


@pytest.mark.parametrize("flags", [{}, MODERN])
def test_move_target(flags):
    """Parameters by polyak; what power iteration has found is taken over."""
    agent = make_agent(make_args(**flags))
    target, online = agent.target_critic, agent.critic
    with torch.no_grad():
        for x in [*online.parameters(), *online.buffers()]:
            x.add_(1)
        before = [p.clone() for p in target.parameters()]
        asac.move_target(target, online, 0.005)
    for old, new in zip(before, target.parameters()):
        torch.testing.assert_close(new, old + 0.005)
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), online.buffers()))
    assert not target.training and online.training and len(list(online.buffers())) == (8 if flags else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation sampling
# ---------------------------------------------------------------------------------------------------------------------


class NearestTo(torch.nn.Module):
    """Critics (S, C) with Q = -|a - c|^2 for all c = target."""

    def __init__(self, lead, target):
        super().__init__()
        self.lead, self.target = lead, target

    def forward(self, x):
        q = -(x[..., O:] - self.target).square().sum(-1, keepdim=True)
        return q[:, None].expand(-1, self.lead[1], -1, -1)


def noise_of(seed, num_samples, B):
    return torch.randn(num_samples, B, A, generator=torch.Generator().manual_seed(seed))


def test_best_of_samples_takes_the_best():
    """Algorithm 1, of every state by itself: the nearest of M = 50 clipped draws to the critics' favourite."""
    args = make_args(num_seeds=2, seed=5, eval_samples=50)
    agent = make_agent(args, spread=0.5)
    agent.critic = NearestTo((2, 2), torch.tensor([0.9, -0.3]))
    obs = torch.randn(2, 7, O, generator=torch.Generator().manual_seed(0))
    action, mean = asac.BestOfSamples(agent, args).act(obs), agent.actor(obs)
    for s in range(2):
        draws = (mean[s] + 0.2 * noise_of(5 + s, 50, 7)).clamp(-1, 1)  # (M, B, A)
        best = (draws - agent.critic.target).norm(dim=-1).argmin(0)
        torch.testing.assert_close(action[s], draws[best, torch.arange(7)])
    assert not torch.allclose(action, mean, atol=1e-3)


def test_best_of_samples_is_pessimistic():
    """Critics 2 a and -a, a the action's first number: their mean is for the largest a, Q_bar for the one next to 0."""
    args = make_args(num_seeds=1, eval_samples=50)
    agent = make_agent(args, spread=0.5)
    agent.critic = NearestTo((1, 2), None)
    agent.critic.forward = lambda x: x[:, None, :, O : O + 1] * torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
    obs = torch.zeros(1, 5, O)
    action, draws = asac.BestOfSamples(agent, args).act(obs)[0], agent.actor(obs) + 0.2 * noise_of(0, 50, 5)
    nearest = draws[..., 0].abs().argmin(0)
    torch.testing.assert_close(action, draws.clamp(-1, 1)[nearest, torch.arange(5)])


def test_more_samples_are_no_worse_and_nothing_changes():
    """Q_bar of the chosen action grows with M; one draw is one draw; acting leaves parameters and buffers alone."""
    args = make_args(num_seeds=1, num_critics=3, **MODERN)
    agent = make_agent(args, spread=0.5)
    obs = torch.randn(1, 20, O, generator=torch.Generator().manual_seed(0))
    before, values = state_of(agent), []
    for num_samples in (1, 10, 100):
        args.eval_samples = num_samples
        action = asac.policy_of_seed(asac.BestOfSamples(agent, args), 0).act(obs)
        with torch.no_grad():
            values.append(asac.pessimistic(agent.critic(torch.cat([obs, action], -1)).squeeze(-1), 0.5).mean())
    assert values[0] < values[1] < values[2]
    assert all(torch.equal(x, before[name]) for name, x in state_of(agent).items())


@pytest.mark.parametrize("flags", [{}, MODERN])
def test_one_policy_of_many(flags):
    """What evaluations get: seed s of S agents acts as an agent of that seed alone, time and again the same."""
    args = make_args(num_seeds=3, seed=4, num_critics=2, eval_samples=20, **flags)
    agent, obs = make_agent(args), torch.randn(1, 6, O)
    for s in (0, 2):
        alone_args = make_args(seed=4 + s, num_critics=2, eval_samples=20, **flags)
        alone = asac.BestOfSamples(make_agent(alone_args), alone_args)
        policies = [asac.policy_of_seed(asac.BestOfSamples(agent, args), s) for _ in range(2)]
        first, second = ([policy.act(obs) for _ in range(2)] for policy in policies)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert not torch.equal(first[0], first[1])  # fresh noise at every step
        torch.testing.assert_close(first[0], alone.act(obs), rtol=1e-4, atol=1e-5)
    assert agent.critic.lead == (3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def forward(layers, x):
    """Output of a ReLU network [(W, b), ...] and the input of each layer."""
    inputs = []
    for i, (w, b) in enumerate(layers):
        inputs.append(np.maximum(x, 0) if i else x)
        x = inputs[-1] @ w + b
    return x, inputs


def backward(layers, inputs, grad):
    """Gradients [(dW, db), ...] from the gradient at the output."""
    grads = []
    for i in reversed(range(len(layers))):
        grads.append((inputs[i].T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ layers[i][0].T) * (inputs[i] > 0)
    return grads[::-1]


def lower_mean(q, pessimism):
    """Q_bar of a list of C >= 2 arrays, by its definition."""
    C = len(q)
    return sum(q) / C - pessimism / (C * C - C) * sum(np.abs(q[i] - q[j]) for i in range(C) for j in range(C))


class NumpyActorCritic:
    """One seed of asac.py, in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.moments, self.critics_range = args, {}, range(args.num_critics)
        self.actor = layers(agent.actor.net)
        self.critics = [layers(agent.critic, c) for c in self.critics_range]
        self.target_critics = [layers(agent.target_critic, c) for c in self.critics_range]

    def adam(self, name, layers, grads):
        stepped = []
        for i, pair in enumerate(zip(layers, grads)):
            new = []
            for j, (p, g) in enumerate(zip(*pair)):
                m, v, t = self.moments.get((name, i, j), (0.0, 0.0, 0))
                m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
                self.moments[name, i, j] = m, v, t
                m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
                new.append(p - self.args.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8))
            stepped.append(tuple(new))
        return stepped

    def critic_step(self, batch, next_noise):
        args, (s, a, r, s_next, mask) = self.args, np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        offset = np.clip(args.policy_std * next_noise, -args.noise_clip, args.noise_clip)
        sa_next = np.concatenate([s_next, np.clip(np.tanh(forward(self.actor, s_next)[0]) + offset, -1, 1)], 1)
        next_q = [forward(layers, sa_next)[0] for layers in self.target_critics]
        y, loss = r + args.gamma * mask * lower_mean(next_q, args.pessimism), 0
        for c in self.critics_range:
            q, inputs = forward(self.critics[c], np.concatenate([s, a], 1))
            loss += 0.5 * np.mean((q - y) ** 2)
            self.critics[c] = self.adam(
                ("critic", c), self.critics[c], backward(self.critics[c], inputs, (q - y) / len(q))
            )
        return loss

    def actor_step(self, s, a, weight):
        """One step on -sum of weight * log pi; returns that loss."""
        out, inputs = forward(self.actor, s)
        z = (a - np.tanh(out)) / self.args.policy_std
        log_prob = np.sum(-0.5 * z**2 - np.log(self.args.policy_std * np.sqrt(2 * np.pi)), 1)
        grad = -weight[:, None] * z / self.args.policy_std * (1 - np.tanh(out) ** 2)
        self.actor = self.adam("actor", self.actor, backward(self.actor, inputs, grad))
        return -np.sum(weight * log_prob)

    def advantage(self, s, a, noise):
        policy_action = np.clip(np.tanh(forward(self.actor, s)[0]) + self.args.policy_std * noise, -1, 1)
        q, policy_q = (
            [forward(layers, np.concatenate([s, x], 1))[0][:, 0] for layers in self.critics] for x in (a, policy_action)
        )
        return sum(q) / len(q) - lower_mean(policy_q, self.args.pessimism)

    def target_step(self):
        rho = self.args.polyak
        for c in self.critics_range:
            pairs = zip(self.target_critics[c], self.critics[c])
            self.target_critics[c] = [tuple((1 - rho) * x + rho * y for x, y in zip(*pair)) for pair in pairs]

    def assert_same(self, agent, s):
        nets = [(agent.actor.net, (), self.actor)]
        nets += [(agent.critic, (c,), self.critics[c]) for c in self.critics_range]
        nets += [(agent.target_critic, (c,), self.target_critics[c]) for c in self.critics_range]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-9)


def in_double(agent, args):
    """The agent in float64, its learning rates not rounded to float32."""
    for optimizer in agent.double().optimizers.values():
        assert optimizer.learning_rate.item() == pytest.approx(args.learning_rate)
        optimizer.learning_rate.fill_(args.learning_rate)
    return agent


@pytest.mark.parametrize("max_advantage", [INF, 0.2])
def test_update_against_numpy(max_advantage):
    """Six updates of two seeds with three critics, in float64, with steps so large that every question of order shows:
    all networks, the leaves of the tree, the losses."""
    args = make_args(
        num_seeds=2, num_critics=3, learning_rate=0.02, polyak=0.3, gamma=0.9, pessimism=0.7, beta=0.4, batch_size=24,
        max_advantage=max_advantage,
    )  # fmt: skip
    N = 60
    agent, transitions = in_double(make_agent(args, N, spread=0.5), args), make_transitions(N).double()
    references, logits = [NumpyActorCritic(agent, s, args) for s in range(2)], np.zeros((2, N))
    duplicates = 0
    for n in range(6):
        index, u, next_noise, noise = (
            x.double() if x.is_floating_point() else x for x in make_draws(args, agent, N, n)
        )
        metrics = asac.update(agent, transitions, index, u, next_noise, noise, args)
        for s, reference in enumerate(references):
            p = np.exp(logits[s] - logsumexp(logits[s]))
            drawn = np.searchsorted(np.cumsum(p), u[s, :, 0].numpy(), side="right")
            uniform, cloned = transitions[index[s]].numpy(), transitions[drawn].numpy()
            critic_loss = reference.critic_step(uniform, next_noise[s].numpy())
            actor_loss = reference.actor_step(cloned[:, :O], cloned[:, O : O + A], np.full(24, 1 / 24))
            reference.target_step()
            both = np.concatenate([uniform, cloned])
            advantage = reference.advantage(both[:, :O], both[:, O : O + A], noise[s].numpy())
            everything = [*index[s].tolist(), *drawn]
            duplicates += len(everything) - len(set(everything))
            for i, x in zip(everything, np.minimum(advantage, max_advantage) / 0.4):
                logits[s, i] = x
            losses = [metrics["loss/critic"][s].item(), metrics["loss/actor"][s].item()]
            np.testing.assert_allclose(losses, [critic_loss, actor_loss], rtol=1e-9)
            total = metrics["policy/log_mean_weight"][s].item() + math.log(N)
            assert total == pytest.approx(logsumexp(logits[s]), abs=1e-9)
    np.testing.assert_allclose(leaves_of(agent.tree), logits, rtol=0, atol=1e-8)
    for s, reference in enumerate(references):
        reference.assert_same(agent, s)
    assert duplicates > 50 and np.mean(logits != 0) > 0.8  # nearly every leaf was drawn, many twice
    assert (logits == 0.5).any() == (max_advantage == 0.2)


class Recorder:
    """Stands in for an optimiser: notes which networks its loss depends on and the actor's gradient; steps nothing."""

    def __init__(self, agent, name, notes):
        self.agent, self.name, self.notes = agent, name, notes

    def minimize(self, loss):
        self.agent.zero_grad()
        loss.backward()
        named = [(n.split(".")[0], p.grad) for n, p in self.agent.named_parameters() if p.grad is not None]
        self.notes.append((self.name, {n for n, _ in named}, torch.cat([g.flatten() for _, g in named])))


def record(agent):
    """Takes the agent's optimisers away; returns the list that notes what they would have seen."""
    notes = []
    del agent.optimizers
    agent.optimizers = {name: Recorder(agent, name, notes) for name in ("actor", "critic")}
    return notes


def test_losses_leave_other_networks_alone():
    """The critics' loss reaches the critics alone, the actor's the actor alone; critics first."""
    args = make_args()
    agent = make_agent(args, spread=0.5).requires_grad_()  # targets too: only the code keeps gradients away from them
    notes = record(agent)
    asac.update(agent, make_transitions(), *make_draws(args, agent), args)
    assert [(name, reached) for name, reached, _ in notes] == [("critic", {"critic"}), ("actor", {"actor"})]


def test_critics_see_uniform_data_only():
    """A leaf of +50 fills the actor's batch, and changes nothing for the critics."""
    args, agents = make_args(learning_rate=0.01), []
    for logit in (0.0, 50.0):
        agent = make_agent(args, spread=0.5)
        agent.tree.update(torch.tensor([[17]]), torch.full((1, 1), logit, dtype=torch.float64))
        asac.update(agent, make_transitions(), *make_draws(args, agent), args)
        agents.append(agent)
    assert all(torch.equal(a, b) for a, b in zip(agents[0].critic.parameters(), agents[1].critic.parameters()))
    assert not torch.equal(agents[0].actor.net.weight0, agents[1].actor.net.weight0)
    assert (leaves_of(agents[1].tree) != 0).sum() < (leaves_of(agents[0].tree) != 0).sum()


def test_actor_gradient_is_that_of_awac_on_all_data():
    """With frozen advantages, ASAC's expected gradient is AWAC's over the whole dataset (spec 4, g2): the mean of many
    small batches within its standard error. Uniform draws, or a batch of AWAC's own, are somewhere else."""
    N, args = 40, make_args(beta=0.3, num_critics=3, batch_size=32)
    transitions, agent = make_transitions(N), make_agent(args, N, spread=0.5)
    obs, action = transitions[:, :O][None], transitions[:, O : O + A][None]
    with torch.no_grad():
        advantage = asac.advantages(agent.critic, obs, action, agent.actor(obs), args.pessimism)
    agent.tree.update(torch.arange(N)[None], advantage.double() / args.beta)
    agent.tree.update = lambda *_: None  # frozen
    weights = (advantage / args.beta).softmax(-1)  # AWAC (5) on the whole dataset
    loss = -(weights * agent.actor.log_prob(agent.actor(obs), action)).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.optimizers["actor"].params)])
    notes = record(agent)

    def z_scores(gradients):
        error = gradients.std(0) / math.sqrt(len(gradients))
        return ((gradients.mean(0) - exact) / error)[error > error.median()]  # not where one rare transition decides

    for n in range(400):
        asac.update(agent, transitions, *make_draws(args, agent, N, n), args)
    ours = z_scores(torch.stack([gradient for name, _, gradient in notes if name == "actor"]))
    assert ours.abs().max() < 4.5 and 0.4 < ours.square().mean() < 2, (ours.abs().max(), ours.square().mean())

    notes.clear()
    agent.tree.level0[:N] = 0
    for n in range(50):
        asac.update(agent, transitions, *make_draws(args, agent, N, n), args)
    uniform = z_scores(torch.stack([gradient for name, _, gradient in notes if name == "actor"]))
    assert uniform.square().mean() > 10


def test_before_any_refresh_and_at_infinite_beta_the_actor_clones_uniformly():
    """Spec 4, g1 and g3: leaves are all alike."""
    args = make_args(beta=1e9)
    agent = make_agent(args, spread=0.5)
    for _ in range(2):
        assert_chi_square(frequencies(agent.tree, 100_000)[0], np.full(100, 0.01), 100_000)
        for n in range(5):
            asac.update(agent, make_transitions(), *make_draws(args, agent, seed=n), args)
    assert np.ptp(leaves_of(agent.tree)) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_draws_change_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01, **MODERN), []
    for shift in (0, 1):
        agent = make_agent(args)
        for n in range(6):
            index, *draws = make_draws(args, agent, seed=n)
            index[1] = (index[1] + shift) % 100
            asac.update(agent, make_transitions(), index, *draws, args)
        states.append({name: x.view(2, -1) for name, x in state_of(agent).items()})
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        assert not torch.equal(states[0][name][1], states[1][name][1]), name


@pytest.mark.parametrize("flags", [(), ("--architecture", "modern", "--hidden-sizes", 16, 16, 16)])
def test_seed_k_among_five_is_the_run_with_seed_k(run_main, data, monkeypatch, tmp_path, flags):
    """Through main(): the same first weights and draws, and the same agents and trees after 50 updates."""
    update, runs = asac.update, {}

    def recorder(agent, transitions, index, u, next_noise, noise, args):
        drawn = [x.flatten(1).double() for x in (index, u, next_noise, noise)]
        note = runs.setdefault((args.seed, args.num_seeds), {"draws": [], "first": state_of(agent)})
        note["draws"].append(torch.cat(drawn, -1))
        return update(agent, transitions, index, u, next_noise, noise, args)

    monkeypatch.setattr(asac, "update", recorder)
    for seed, num_seeds in ((3, 5), (3, 1), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        more = "--num-updates", 50, "--seed", seed, "--num-seeds", num_seeds, "--learning-rate", 0.001
        run_main("--dataset", data, *BLIND, *flags, *more, "--run-dir", run_dir)
        last = {k: x for k, x in checkpoint_of(run_dir)["agent"].items() if not k.startswith("optimizers.")}
        runs[seed, num_seeds] |= {"last": last, "draws": torch.stack(runs[seed, num_seeds]["draws"])}
    five = runs[3, 5]
    for k in (0, 4):
        alone = runs[3 + k, 1]
        assert torch.equal(five["draws"][:, k], alone["draws"][:, 0])
        for name in five["first"]:
            ours, theirs = (x.view(5, -1)[k] for x in (five["first"][name], five["last"][name]))
            torch.testing.assert_close(ours, alone["first"][name].flatten(), rtol=0, atol=1e-6)
            torch.testing.assert_close(theirs, alone["last"][name].flatten(), rtol=2e-3, atol=2e-3)
        assert not torch.equal(five["draws"][:, k], five["draws"][:, 1])
    assert (five["last"]["actor.net.weight0"] - five["first"]["actor.net.weight0"]).abs().max() > 0.01  # all learned


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a first action that costs at once and pays one step later
# ---------------------------------------------------------------------------------------------------------------------


def two_steps():
    """A log of uniformly random actions: the first action a costs 0.5 a; the second step pays 2 a, whatever is done
    there, and is the end. So Q(first, a) = (2 gamma - 0.5) a."""
    a, b = np.random.default_rng(0).uniform(-1, 1, size=(2, 4000, 1))
    zero, one = np.zeros_like(a), np.ones_like(a)
    first = np.concatenate([one, zero, a, -0.5 * a, zero, a, one], 1)  # s = (is first, last action), a, r, s', mask
    second = np.concatenate([zero, a, b, 2 * a, one, zero, zero], 1)
    return torch.from_numpy(np.float32(np.concatenate([first, second])))


def learned_policy(**flags):
    """pi and Q(first, 1) of two seeds in the first state, after 300 updates on that log."""
    defaults = {"hidden_sizes": (32, 32), "num_seeds": 2, "learning_rate": 3e-3, "polyak": 0.07, "beta": 0.2}
    args = make_args(**{**defaults, "batch_size": 64, **flags})
    agent = asac.ASACAgent(2, 1, args, CPU, 8000)
    generator = torch.Generator().manual_seed(0)
    transitions = two_steps()
    for _ in range(300):
        index, u = torch.randint(8000, (2, 64), generator=generator), torch.rand(2, 64, 1, generator=generator)
        next_noise, noise = (torch.randn(2, n, 1, generator=generator) for n in (64, 128))
        asac.update(agent, transitions, index, u.double(), next_noise, noise, args)
    start = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    with torch.no_grad():
        return agent.actor(start).flatten(), agent.critic(torch.cat([start, torch.ones(2, 1, 1)], -1))[:, 0].flatten()


def test_asac_looks_ahead():
    """The mean of exp(1.48 a / 0.2) on [-1, 1] is 1 - 0.2 / 1.48 = 0.86; some leaves are still as at the start."""
    action, q = learned_policy()
    assert action.min() > 0.6 and action.max() < 0.95, action
    torch.testing.assert_close(q, torch.full((2,), 2 * 0.99 - 0.5), rtol=0, atol=0.3)


def test_the_learning_test_is_a_test():
    """One who sees no further than the next reward, or who clones what is there, does something else."""
    assert learned_policy(gamma=0.0)[0].max() < -0.3
    assert learned_policy(beta=1e6)[0].abs().max() < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# Flags, runs
# ---------------------------------------------------------------------------------------------------------------------


def test_presets():
    """What the paper does on its testbeds (spec 7), unless a flag says otherwise; no A_max in (6)."""
    for preset, expected in {
        "small": ("simple-small", 2, 0.5, 0.5, 1_000_000),
        "mood": ("simple-large", 5, 0.5, 0.5, 1_500_000),
        "antmaze": ("modern", 5, 0.0, 0.1, 2_000_000),
        "locomotion": ("modern", 5, 0.5, 0.5, 2_000_000),
        "locomotion-0.1": ("modern", 10, 0.5, 1.5, 2_000_000),
    }.items():
        args = asac.Args(preset=preset)
        assert (args.architecture, args.num_critics, args.pessimism, args.beta, args.num_updates) == expected, preset
        assert args.max_advantage == INF
    assert asac.Args(preset="antmaze", num_critics=10).num_critics == 10 and asac.Args().preset == "small"
    assert asac.Args(pessimism=0.0).pessimism == 0 and asac.Args(hidden_sizes=(8, 8)).hidden_sizes == (8, 8)


def test_defaults_are_the_papers():
    args = asac.Args()
    assert (args.batch_size, args.learning_rate, args.gamma, args.polyak) == (512, 3e-4, 0.99, 0.005)
    assert (args.policy_std, args.noise_clip, args.eval_samples, args.reward_transform) == (0.2, 0.3, 50, "auto")


@pytest.mark.parametrize(
    "flags",
    [
        ("--pessimism", -1), ("--num-critics", 0), ("--beta", 0), ("--policy-std", 0), ("--eval-samples", 0),
        ("--noise-clip", "nan"), ("--max-advantage", "nan"), ("--max-advantage", -10_000_000_000), ("--polyak", 2),
        ("--hidden-sizes", 16, 16, "--architecture", "modern"),
        ("--hidden-sizes", 8, 16, 8, "--architecture", "modern"),
    ],
)  # fmt: skip
def test_flag_out_of_range(run_main, data, capsys, tmp_path, flags):
    with pytest.raises(SystemExit) as ended:
        run_main("--dataset", data, *flags, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {flags[0]} ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_killed_and_resumed_run_ends_like_one_never_stopped(run_main, data, capsys, tmp_path):
    """kill -9 at a random moment after a checkpoint at an odd update, --resume: the same bits, both csv files; and
    --evaluate speaks of the mean action and of the best of the samples."""
    rng, victim, path = random.Random(3), tmp_path / "victim", tmp_path / "victim" / "checkpoint.pt"
    flags = "--dataset", data, *SMALL, "--num-updates", 450, "--eval-every", 190, "--eval-episodes", 1
    flags += "--checkpoint-every", 37, "--eval-samples", 3, "--architecture", "modern", "--hidden-sizes", 16, 16, 16
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(harness.command("asac", *flags, "--run-dir", victim), env=env, **pipes)
    saves, last, deadline = 0, None, time.time() + 120
    while saves < 2 + rng.randint(0, 2):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        now = path.stat().st_mtime_ns if path.exists() else None
        saves, last = saves + (now != last), now
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    assert process.poll() is None, "the run was over before it could be killed: make it longer"
    process.kill()
    process.communicate()
    assert 0 < checkpoint_of(victim)["num_updates"] < 450
    run_main("--resume", victim)
    unbroken = tmp_path / "unbroken"
    run_main(*flags, "--run-dir", unbroken)
    assert_same_checkpoint(victim, unbroken)
    assert sorted(path.name for path in victim.glob("*.csv")) == ["evaluations.csv", "evaluations_m3.csv"]
    assert (victim / "evaluations.csv").read_text() != (victim / "evaluations_m3.csv").read_text()
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in unbroken.iterdir()}
    run_main("--evaluate", unbroken, "--eval-samples", 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the policy's mean action:" and lines[2] == "the best of 4 samples, by Q_bar:"
    assert lines[1].startswith("seed 0: return ") and lines[3].startswith("seed 0: return ")
    assert before == {path.name: path.read_bytes() for path in unbroken.iterdir()}


def rewards_of(dataset):
    return dataset.transitions[:, dataset.obs_dim + dataset.action_dim]


@pytest.mark.parametrize("script", ["asac", "awac", "iql_scaled", "td3_bc_scaled"])
def test_what_main_gives_its_updates(script, data, monkeypatch, tmp_path):
    """Rewards as --reward-transform has them; for the critics indices that are uniform over all transitions; standard
    normal noise. No two rows of it are the same: next_noise is not noise, and no update's is another's."""
    module, given = harness.load(script), []
    logged = module.load_dataset([str(data)])
    reward, N = rewards_of(logged).copy(), len(logged.transitions)

    def note(agent, transitions, args, index, *draws):
        given.append((transitions, index, draws))
        return {}

    monkeypatch.setattr(module, "run_updates_on" if script == "asac" else "run_updates", note)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for mode, expected in (
        ("auto", reward), ("shift", reward - 1), ("scale", reward * 1000 / np.ptp(logged.episode_returns))
    ):  # fmt: skip
        flags = "--dataset", data, *BLIND, "--num-updates", 400, "--num-seeds", 2, "--reward-transform", mode
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags), "--run-dir", str(tmp_path / mode)])
        given.clear()
        module.main()
        np.testing.assert_allclose(given[0][0][:, 11 + 3].numpy(), expected, rtol=1e-6)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    index = torch.cat([index for _, index, _ in given])
    assert index.shape == (400, 2, 16)
    for s in range(2):
        counts = np.bincount(index[:, s].flatten(), minlength=N)
        assert_chi_square(counts / counts.sum(), np.full(N, 1 / N), counts.sum())
    draws = [torch.cat(x) for x in zip(*(draws for *_, draws in given))]
    if script == "asac":
        u = draws.pop(0)
        assert u.dtype == torch.float64 and 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
        assert u.mean().item() == pytest.approx(0.5, abs=0.02)
    assert [x.shape[2] for x in draws] == {"asac": [16, 32], "iql_scaled": [16]}.get(script, [16, 16])
    assert all(abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 for x in draws)
    rows = torch.cat([x.flatten(0, 2) for x in draws])
    assert len(rows.unique(dim=0)) == len(rows)


def test_automatic_reward_transform():
    """Mazes pay -1 for each step before the goal; nothing else is touched."""
    dataset = asac.load_dataset(["pointmaze/sparse-v0"])
    for env_id, shift in (("PointMaze_Medium-v3", -1), ("AntMaze_UMaze-v4", -1), ("Hopper-v5", 0), (None, 0)):
        rows = dataset.transitions.copy()
        one = replace(dataset, transitions=rows, environment={**dataset.environment, "id": env_id})
        asac.transform_rewards(one, "auto", asac.MAZE_TRANSFORMS)
        np.testing.assert_array_equal(rewards_of(one), rewards_of(dataset) + shift)


def test_mixed_data(run_main, tmp_path):
    """Unbalanced data from two datasets: fractions of episodes, each drawn with the seed."""
    poor = harness.write_minari(tmp_path / "poor", harness.hopper_episodes(20, 10, seed=1))
    good = harness.write_minari(tmp_path / "good", harness.hopper_episodes(10, 30, seed=2))
    run_main("--dataset", f"{poor}:0.9", f"{good}:0.1", *BLIND, "--num-updates", 3, "--run-dir", tmp_path / "run")
    loaded = asac.load_dataset([f"{poor}:0.9", f"{good}:0.1"])
    assert len(loaded.episode_lengths) == 18 + 1
    assert len(checkpoint_of(tmp_path / "run")["agent"]["tree.level0"]) == loaded.episode_lengths.sum()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("flags", [{}, MODERN])
def test_captured_updates_equal_eager_ones(flags):
    """CUDA graphs of ten updates, replayed, give what as many eager updates give: networks, singular vectors, trees."""
    args = make_args(num_seeds=2, learning_rate=1e-3, **flags)
    N, transitions = 30_000, make_transitions(30_000).cuda()
    agents = [make_agent(args, N, device="cuda") for _ in range(2)]
    assert agents[0].tree.depth == 1
    draws = [torch.stack(x).cuda() for x in zip(*(make_draws(args, agents[0], N, n) for n in range(60)))]
    learn = [partial(asac.run_updates_on, agent, transitions, args) for agent in agents]
    before = {name: x.clone() for name, x in agents[0].state_dict().items()}
    graph = asac.cuda_graph(learn[0], agents[0], *(x[:10] for x in draws))
    assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
    for i in range(0, 60, 10):
        captured, eager = (f(*(x[i : i + 10] for x in draws)) for f in (graph, learn[1]))
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-3)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-2, atol=1e-3)
