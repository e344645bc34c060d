"""The mathematics of asac.py against what shares no code with it: numpy, numbers worked by hand, and whole updates in
float64. Networks and acting, which its siblings share, are tested in theirs."""

import itertools
import math

import harness
import numpy as np
import pytest
import torch
from reference import Scaled, adams_with, check_updates, random_columns, randomize

asac = harness.load("asac")

OBS_DIM = 4
ACTION_DIM = 2
INF = math.inf


def make_args(**flags):
    return asac.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


# The tree -----------------------------------------------------------------------------------------
SHAPES = [(8, 16_384), (8, 1), (2, 1), (4, 3)]  # (FAN_OUT, TOP): the script's own, deep ones, the paper's
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def tree_of(monkeypatch):
    def build(leaves, shape=SHAPES[0]):  # (S, N)
        monkeypatch.setattr(asac, "FAN_OUT", shape[0])
        monkeypatch.setattr(asac, "TOP", shape[1])
        leaves = torch.from_numpy(np.array(leaves, np.float64))
        tree = asac.LogSumExpTree(*leaves.shape)
        tree.write(torch.arange(leaves.shape[1]).expand(leaves.shape), leaves)
        return tree

    return build


def logsumexp(x):
    with np.errstate(divide="ignore"):
        return np.logaddexp.reduce(x, -1)


def shares(tree, num_draws=20_000):
    """Shares (S, N) of the leaves in independent draws."""
    S, N = len(tree.levels[0]), tree.levels[0].shape[1]
    uniforms = torch.rand(S, num_draws, tree.depth + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return np.stack([np.bincount(row, minlength=N) for row in tree.draw(uniforms).numpy()]) / num_draws


@pytest.mark.parametrize(
    "N, shape", [*itertools.product([1, 2, 3, 5, 8, 1000, 1001], SHAPES), (300_000, SHAPES[0])], ids=str
)
def test_tree_after_random_writes(tree_of, shape, N):
    """Duplicates, ties, huge numbers, -inf: a leaf is its last write, a node the logsumexp of its children."""
    rng = np.random.default_rng(N)
    expected = np.zeros((2, N))
    tree = tree_of(expected, shape)
    for _ in range(10):
        index = rng.integers(N, size=(2, 64)).repeat(4, 1)
        logit = rng.choice([0.0, 700.0, -5000.0, 5000.0, -INF, 1.5], size=(2, 256)) + rng.normal(size=(2, 1))
        tree.write(torch.from_numpy(index), torch.from_numpy(logit))
        for s in range(2):
            for i, x in zip(index[s], logit[s]):
                expected[s, i] = x
    levels = [level.numpy() for level in tree.levels]
    np.testing.assert_array_equal(levels[0][:, :N], expected)
    assert np.all(levels[0][:, N:] == -INF) and levels[-1].shape[1] <= shape[1] and len(levels) == tree.depth + 1
    for children, parents in zip(levels, levels[1:]):
        families = children.reshape(2, -1, shape[0])
        np.testing.assert_allclose(parents[:, : families.shape[1]], logsumexp(families), rtol=0, atol=1e-10)
        assert np.all(parents[:, families.shape[1] :] == -INF)


def test_writes_do_not_race(tree_of, monkeypatch):
    """scatter_ leaves open which of several writes to one place counts, so all of them must be of one value."""
    scatter = torch.Tensor.scatter_
    num_doubles = []

    def checked(tensor, dim, index, value):
        last = dict(zip(index[0].tolist(), value[0].tolist()))
        assert [last[i] for i in index[0].tolist()] == value[0].tolist()
        num_doubles.append(index.shape[1] - len(last))
        return scatter(tensor, dim, index, value)

    tree = tree_of(np.zeros((1, 30)), (4, 3))
    monkeypatch.setattr(torch.Tensor, "scatter_", checked)
    tree.write(torch.arange(40)[None] % 23, torch.linspace(-1, 1, 40, dtype=torch.float64)[None])
    assert len(num_doubles) == 1 + tree.depth and min(num_doubles) > 0


@shapes
@pytest.mark.parametrize("kind", ["normal", "huge", "half -inf", "ties", "one"])
def test_draws_follow_the_softmax(tree_of, shape, kind):
    rng = np.random.default_rng(1)
    normal = rng.normal(size=(2, 37))
    leaves = {
        "normal": normal,
        "huge": normal + rng.choice([-5000, 5000], size=(2, 37)),
        "half -inf": np.where(rng.permutation(37) < 18, -INF, normal),
        "ties": np.full((2, 37), -5000.0),
        "one": np.where(np.arange(37) == [[0], [36]], 3, -INF),
    }[kind]
    tree = tree_of(leaves, shape)
    P = np.exp(leaves - logsumexp(leaves)[:, None])
    share = shares(tree)
    assert np.all(np.abs(share[:, :37] - P) <= 5 * np.sqrt(P * (1 - P) / 20_000))  # five sigma, none of P = 0
    assert not share[:, 37:].any()
    np.testing.assert_allclose(tree.effective_size(), 1 / np.sum(P**2, 1), rtol=1e-10)


@shapes
def test_extremes(tree_of, shape):
    """0 draws the first leaf that has mass, the largest number below 1 the last one, whatever -inf is around; the tree
    of a diverged agent draws leaves that exist."""
    leaves = np.full((2, 41), -INF)
    leaves[:, [9, 10, 31]] = [[0.0, -2.0, 1.0], [-5000.0, -5000.0, -5001.0]]
    tree = tree_of(leaves, shape)
    for u, leaf in ((0.0, 9), (1 - 2**-53, 31)):
        assert (tree.draw(torch.full((2, 3, tree.depth + 1), u, dtype=torch.float64)) == leaf).all()
    for value in (math.nan, -INF, INF):
        leaves = np.where(np.arange(1001) == 77, value, [[0.0], [value]])
        tree = tree_of(leaves, shape)
        drawn = tree.draw(torch.linspace(0, 0.99, 50, dtype=torch.float64)[:, None].expand(2, 50, tree.depth + 1))
        assert drawn.min() >= 0 and drawn.max() < 1001


def test_seeds_have_trees_of_their_own(tree_of):
    """S trees do what S single ones do, and are saved."""
    leaves = np.random.default_rng(1).normal(size=(3, 20_000))
    uniforms = torch.from_numpy(np.random.default_rng(2).random((3, 300, 2)))
    tree = tree_of(leaves)
    empty = tree_of(np.zeros((3, 20_000)))
    empty.load_state_dict(tree.state_dict())
    drawn = tree.draw(uniforms)
    assert torch.equal(empty.draw(uniforms), drawn) and tree.depth == 1 and tree.levels[0].dtype == torch.float64
    for s in range(3):
        assert torch.equal(tree_of(leaves[s : s + 1]).draw(uniforms[s : s + 1])[0], drawn[s])


# The update ---------------------------------------------------------------------------------------
class Reference(Scaled):
    """One seed of ASAC, written from the equations; `both` has the uniform batch and then the tree's."""

    def __init__(self, agent, s, args):
        super().__init__(agent, s, args)
        self.nets.pop("tree")
        self.logits = {}

    def update(self, obs, action, reward, next_obs, not_terminated, both_obs, both_action, index, noise):
        B = len(obs)
        next_value = self.smoothed_next_value(next_obs, noise[:B])
        logs = self.learn_critics(obs, action, reward, not_terminated, next_value)
        actor_loss = -self.log_prob(both_obs[B:], both_action[B:]).mean()
        self.minimize(actor=actor_loss)
        self.move_targets("critic")
        policy_q = self.q_bar(both_obs, self.sample(both_obs, noise[B:]))
        advantage = self.q(both_obs, both_action).mean(0) - policy_q
        for i, x in zip(index.tolist(), advantage.tolist()):
            self.logits[i] = x / self.args.beta
        logs |= {"loss/actor": actor_loss, "value/advantage": advantage}
        return {name: x.mean().item() for name, x in logs.items()}


def test_updates_against_float64():
    """Three updates of two seeds, which do not mix: logs, all parameters, all leaves. With 1 for Adam's eps, its steps
    tell a mean from a sum too."""
    args = make_args(
        num_seeds=2, num_critics=3, learning_rate=2**-4, target_update_rate=0.25, gamma=0.875, pessimism=0.75, beta=0.5
    )
    agent = asac.Agent(OBS_DIM, ACTION_DIM, 60, args).double()
    randomize(torch.nn.ModuleList([agent.actor, agent.critic, agent.target_critic]), 0.5)
    adams_with(agent, eps=1)
    references = [Reference(agent, s, args) for s in range(2)]
    columns = random_columns()
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(3):
        index = torch.from_numpy(rng.integers(50, size=(2, 48)))  # many twice
        noise = torch.from_numpy(rng.normal(size=(2, 72, ACTION_DIM)))
        uniform = [column[index[:, :24]] for column in columns]
        batches.append([*uniform, columns[0][index], columns[1][index], index, noise])
    check_updates(asac, agent, references, batches, args)
    for s, reference in enumerate(references):
        leaves = torch.tensor([reference.logits.get(i, 0) for i in range(60)], dtype=torch.float64)
        torch.testing.assert_close(agent.tree.levels[0][s], leaves, rtol=0, atol=1e-6)


# The method's own lines in main() -----------------------------------------------------------------
@pytest.mark.parametrize("transform, shift", [("shift", -1), ("none", 0)])
def test_what_the_learner_sees(transform, shift):
    """The critics' batch is even, the actor's from the tree as it was; both are where `index` says."""
    obs, action, reward, next_obs, not_terminated = [x.numpy() for x in random_columns()]
    ends = np.array([30.0, 3.0]), np.array([40, 20])
    data = asac.Data(obs, action, reward, next_obs, not_terminated < 1, *ends, None, (math.nan, math.nan))
    flags = "--num-updates 80 --hidden-sizes 16 --num-seeds 2 --beta 0.01 --reward-transform", transform
    leaves_of = lambda agent: agent.tree.levels[0]
    inputs, _ = harness.run_on("asac", data, *" ".join(flags).split(), watch=leaves_of)
    *batch, both_obs, both_action, index, noise, leaves = inputs.values()  # (updates, S, ...)
    uniform = index[..., :512]
    for column, logged in zip(batch, (obs, action, reward + shift, next_obs, not_terminated)):
        np.testing.assert_array_equal(column, np.float32(logged[uniform]))
    np.testing.assert_array_equal(both_obs, np.float32(obs[index]))
    np.testing.assert_array_equal(both_action, np.float32(action[index]))
    share = np.bincount(uniform.ravel(), minlength=60) / uniform.size
    assert np.all(np.abs(share - 1 / 60) < 5 * (1 / 60 / uniform.size) ** 0.5)
    for step in range(0, 80, asac.CHUNK):
        uniforms, drawn_noise = asac.draw_numbers([0, 1], step, 512, 0, ACTION_DIM, "cpu")
        for n in range(asac.CHUNK):
            np.testing.assert_array_equal(noise[step + n], drawn_noise[n])
            for s in range(2):
                P = np.exp(leaves[step + n, s] - logsumexp(leaves[step + n, s]))
                drawn = np.searchsorted(np.cumsum(P), uniforms[n, s, :, 1], side="right")
                assert np.mean(index[step + n, s, 512:] == drawn) > 0.99  # rounding
    assert np.abs(leaves[-1]).max() > 5  # the draws were not even
