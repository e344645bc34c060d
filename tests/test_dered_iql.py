"""dered_iql.py: what its second stage adds to iql_red.py, against numbers by hand, numpy, and iql_red.py itself.

The samplers, IQL's losses one by one and the plumbing are the same text as in iql_red.py and are tested there.
"""

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from test_iql_red import chain_returns, chain_transitions

dered = harness.load("dered_iql")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
NETWORKS = "value", "actor", "critic"


def make_args(**flags):
    sizes = {"hidden_sizes": (16, 16), "batch_size": 32, "num_updates": 1000, "stage2_updates": 200}
    return dered.Args(**{**sizes, **flags})


def make_agent(args, obs_dim=O, action_dim=A, spread=None):
    """An agent in stage 1. With `spread`, all parameters are drawn anew: biases, log_std, targets unlike critics."""
    agent = dered.IQLAgent(obs_dim, action_dim, args, torch.device("cpu"))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(S=1, B=32, seed=0):
    """(S, B, O + A + 1 + O + 1) random transitions, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(S, B, 2 * O + A + 2))
    rows[..., O : O + A] = np.tanh(rows[..., O : O + A])
    rows[..., -1] = rng.random((S, B)) > 0.25
    return torch.from_numpy(rows).float()


def weights(agent):
    """Copies of all parameters by name, targets included."""
    return {name: p.detach().clone() for name, p in agent.named_parameters()}


def is_target(name):
    return name.startswith("target_critic")


def is_head(name, num_layers=3):
    """The last layers of V, Q and the actor, and log_std: what the paper and its code freeze."""
    return not is_target(name) and name.endswith((f"weight{num_layers - 1}", f"bias{num_layers - 1}", "log_std"))


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------------------------------------
# What each stage is: draws, lengths, step sizes
# ---------------------------------------------------------------------------------------------------------------------


def test_stages_by_default():
    """Stage 1: 1M uniform updates at 3e-4. Stage 2: 500k drawn by ReD at 3e-5. All else is the same."""
    args = dered.Args()
    stage1, stage2 = dered.args_of_stages(args)
    assert (stage1.num_updates, stage1.sampler, stage1.learning_rate, stage1.warm_up) == (10**6, "uniform", 3e-4, 0)
    assert (stage2.num_updates, stage2.sampler, stage2.warm_up) == (500_000, "red", 0.05)
    assert stage2.learning_rate == pytest.approx(3e-5) and args.finetune == "trunk"
    ours = {"num_updates", "sampler", "learning_rate", "warm_up"}
    for stage in stage1, stage2:
        assert all(getattr(stage, name) == getattr(args, name) for name in args.__dict__.keys() - ours)


def step_sizes(args, stage, updates):
    """What the optimisers use at these updates of a stage: [(value, actor, critic), ...]."""
    agent = make_agent(args)
    if stage == 2:
        dered.start_stage2(agent, dered.args_of_stages(args)[1])
    found = []
    for n in updates:
        agent.num_updates.fill_(n)
        dered.update(agent, make_batch(seed=n), dered.args_of_stages(args)[stage - 1])
        found.append([float(agent.optimizers[name].learning_rate) for name in NETWORKS])
    return found


def test_warm_up_of_stage_2():
    """The spec's values for 200,000 updates: 3e-7, half way up, 3e-5 at 5 %, half way down, 0. V and Q: constant."""
    expected = {0: 3e-7, 5_000: 1.515e-5, 10_000: 3e-5, 105_000: 1.5e-5, 200_000: 0.0}
    found = step_sizes(make_args(stage2_updates=200_000), 2, expected)
    for (value, actor, critic), lr in zip(found, expected.values()):
        assert actor == pytest.approx(lr, rel=1e-5, abs=1e-12)
        assert value == critic == pytest.approx(3e-5, rel=1e-6)
    progress = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    factor = dered.warm_up_cosine(progress, 0.05)
    assert factor.diff()[:500].min() > 0 > factor.diff()[500:].max() and factor.max() == 1  # up, then down


def test_schedules_without_warm_up():
    """Stage 1's is IQL's cosine; --warm-up 0 gives stage 2 the same, from a tenth; all of it is a linear rise."""
    args = make_args(num_updates=1_000_000, stage2_updates=500_000, warm_up=0)
    for stage, peak, n in ((1, 3e-4, 1_000_000), (2, 3e-5, 500_000)):
        for (value, actor, critic), share in zip(
            step_sizes(args, stage, (0, n // 4, n // 2, n)), (1, 0.853553, 0.5, 0)
        ):
            assert actor == pytest.approx(peak * share, rel=1e-5, abs=1e-12)
            assert value == critic == pytest.approx(peak, rel=1e-6)
    assert step_sizes(make_args(num_updates=1000), 1, [500]) == step_sizes(replace(args, num_updates=1000), 1, [500])
    assert dered.warm_up_cosine(torch.tensor([0, 0.5], dtype=torch.float64), 1.0).tolist() == [0.01, 0.505]


# ---------------------------------------------------------------------------------------------------------------------
# What learns in stage 2
# ---------------------------------------------------------------------------------------------------------------------


def test_numbers_of_parameters():
    """Spec 4(g), Hopper with 2x256: what learns in stage 2, and what is frozen; --finetune all freezes nothing."""
    args = dered.Args(num_seeds=2)
    agent = dered.start_stage2(make_agent(args, 11, 3), dered.args_of_stages(args)[1])
    learning = {name: sum(p.numel() for p in agent.optimizers[name].params) // 2 for name in NETWORKS}
    assert learning == {"value": 68_864, "actor": 68_864, "critic": 139_264}
    frozen = {
        name: sum(p.numel() for p in getattr(agent, name).parameters() if not p.requires_grad) // 2 for name in NETWORKS
    }
    assert frozen == {"value": 257, "actor": 771 + 3, "critic": 514}
    agent = dered.start_stage2(make_agent(args, 11, 3), replace(args, finetune="all"))
    learning = {name: sum(p.numel() for p in agent.optimizers[name].params) // 2 for name in NETWORKS}
    assert learning == {"value": 68_864 + 257, "actor": 68_864 + 774, "critic": 139_264 + 514}


@pytest.mark.parametrize("hidden_sizes", [(16, 16), (16,), (16, 12, 8)])
def test_heads_stay_and_trunks_move(hidden_sizes):
    """After 20 updates heads and log_std are bit-identical, all else has moved; with --finetune all, everything has."""
    for finetune in "trunk", "all":
        args = make_args(num_seeds=2, finetune=finetune, hidden_sizes=hidden_sizes)
        agent, stage2 = make_agent(args, spread=0.3), dered.args_of_stages(args)[1]
        dered.start_stage2(agent, stage2)
        before = weights(agent)
        for n in range(20):
            dered.update(agent, make_batch(S=2, seed=n), stage2)
        heads = {name for name in before if is_head(name, len(hidden_sizes) + 1)}
        assert len(heads) == 7
        assert differing(before, weights(agent)) == before.keys() - (heads if finetune == "trunk" else set())


def test_optimisers_are_new():
    """Stage 2 begins with Adams that have made no step, a tenth of the step size, and a schedule at its beginning."""
    args = make_args()
    agent, (stage1, stage2) = make_agent(args, spread=0.3), dered.args_of_stages(args)
    for n in range(3):
        dered.update(agent, make_batch(seed=n), stage1)
    before = weights(agent)
    assert dered.start_stage2(agent, stage2) is agent and not differing(before, weights(agent))
    assert agent.num_updates == 0 and list(agent.optimizers) == list(NETWORKS)
    owned = [id(p) for optimizer in agent.optimizers.values() for p in optimizer.params]
    names = {id(p): name for name, p in agent.named_parameters()}
    assert len(owned) == len(set(owned))
    assert {names[i] for i in owned} == {name for name in before if not is_target(name) and not is_head(name)}
    for optimizer in agent.optimizers.values():
        state = dict(optimizer.named_buffers())
        assert float(state.pop("learning_rate")) == pytest.approx(3e-5) and len(state) == 1 + 2 * len(optimizer.params)
        assert all(not x.any() for x in state.values())


def test_gradients_pass_through_the_frozen_heads():
    """A trunk's gradient is what it would be if the head learned too; a frozen head's is none at all."""
    gradients = {}
    for finetune in "trunk", "all":
        args = make_args(finetune=finetune)
        agent = dered.start_stage2(make_agent(args, spread=0.5), args)
        for name in NETWORKS:  # records each loss's gradient, steps nothing
            agent.optimizers[name].minimize = lambda loss: loss.backward()
        dered.update(agent, make_batch(), args)
        gradients[finetune] = {name: p.grad for name, p in agent.named_parameters()}
    for name, gradient in gradients["all"].items():
        if is_target(name):
            assert gradient is None and gradients["trunk"][name] is None
        elif is_head(name):
            assert gradient.any() and gradients["trunk"][name] is None
        else:
            assert gradient.any()
            torch.testing.assert_close(gradients["trunk"][name], gradient)


def test_targets_are_carried_over():
    """Stage 2 does not reset the target critics; a target's head closes in on the frozen head by 1 - polyak a step."""
    args = make_args(polyak=0.005)
    agent, stage2 = make_agent(args, spread=0.3), dered.args_of_stages(args)[1]
    target, head = agent.target_critic.layers[-1][0], agent.critic.layers[-1][0]
    gap = (target - head).detach().clone()
    before = weights(agent)
    dered.start_stage2(agent, stage2)
    assert not differing(before, weights(agent)) and gap.abs().min() > 0
    for n in range(100):
        dered.update(agent, make_batch(seed=n), stage2)
    torch.testing.assert_close((target - head).detach(), gap * 0.995**100, rtol=1e-4, atol=1e-6)
    assert 0.995**1000 == pytest.approx(0.00665, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Both stages against numpy: forward, hand-derived gradients, Adam, freezing, schedules, targets
# ---------------------------------------------------------------------------------------------------------------------


class NumpyDeReD:
    """One seed in numpy, float64, from the equations. self.p: {"value": [W0, b0, W1, b1, W2, b2], ...}."""

    def __init__(self, agent, s):
        def arrays(mlp, *lead):
            return [p[(s, *lead)].detach().numpy().copy() for layer in mlp.layers for p in layer]

        self.p = {"value": arrays(agent.value), "actor": arrays(agent.actor.net)}
        self.p["actor"].append(agent.actor.log_std[s].detach().numpy().copy())
        for c in range(2):
            self.p[f"critic{c}"], self.p[f"target{c}"] = arrays(agent.critic, c), arrays(agent.target_critic, c)
        self.moments, self.frozen, self.t = {}, set(), 0

    def begin_stage2(self, finetune):
        self.moments, self.t = {}, 0
        self.frozen = {4, 5, 6} if finetune == "trunk" else set()  # positions of the head, and of log_std

    def forward(self, name, x):
        w0, b0, w1, b1, w2, b2 = self.p[name][:6]
        h0 = np.maximum(x @ w0 + b0, 0)
        h1 = np.maximum(h0 @ w1 + b1, 0)
        return h1 @ w2 + b2, (x, h0, h1)

    def step(self, name, hidden, grad, lr, *more_gradients):
        """Adam on one network, from the gradient at its output (B, out)."""
        (x, h0, h1), (w1, w2) = hidden, self.p[name][2:5:2]
        d1 = (grad @ w2.T) * (h1 > 0)
        d0 = (d1 @ w1.T) * (h0 > 0)
        gradients = [x.T @ d0, d0.sum(0), h0.T @ d1, d1.sum(0), h1.T @ grad, grad.sum(0), *more_gradients]
        for i, g in enumerate(gradients):
            if i in self.frozen:
                continue
            m, v = self.moments.get((name, i), (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.moments[name, i] = m, v
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            self.p[name][i] = self.p[name][i] - lr * m_hat / (np.sqrt(v_hat) + 1e-8)

    def update(self, batch, lr, actor_lr, args):
        self.t += 1
        B = len(batch)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        sa = np.concatenate([s, a], 1)

        target_q = np.minimum(self.forward("target0", sa)[0], self.forward("target1", sa)[0])
        v, hidden = self.forward("value", s)
        u = target_q - v
        tau = np.where(u < 0, 1 - args.expectile, args.expectile)
        self.step("value", hidden, -2 * tau * u / B, lr)

        weight = np.minimum(np.exp(args.beta * (target_q - self.forward("value", s)[0])), 100)
        out, hidden = self.forward("actor", s)
        mean, log_std = np.tanh(out), self.p["actor"][6]
        z = (a - mean) / np.exp(log_std)
        log_prob = np.sum(-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi), 1, keepdims=True)
        grad_log_std = -np.mean(weight * (z**2 - 1), 0, keepdims=True)
        self.step("actor", hidden, -weight * z / np.exp(log_std) * (1 - mean**2) / B, actor_lr, grad_log_std)

        y, critic_loss = r + args.gamma * mask * self.forward("value", s_next)[0], 0
        for c in range(2):
            q, hidden = self.forward(f"critic{c}", sa)
            critic_loss += np.mean((q - y) ** 2)
            self.step(f"critic{c}", hidden, 2 * (q - y) / B, lr)
            targets, critics = self.p[f"target{c}"], self.p[f"critic{c}"]
            self.p[f"target{c}"] = [(1 - args.polyak) * old + args.polyak * new for old, new in zip(targets, critics)]
        return np.mean(tau * u**2), -np.mean(weight * log_prob), critic_loss


@pytest.mark.parametrize("finetune", ["trunk", "all"])
def test_both_stages_against_numpy(finetune):
    """Three updates of stage 1, then five of stage 2, of two seeds, in float64: losses and every parameter."""
    args = make_args(num_seeds=2, finetune=finetune, learning_rate=0.02, stage2_rate=0.5, warm_up=0.4)
    args = replace(args, num_updates=3, stage2_updates=5, polyak=0.3, gamma=0.9, expectile=0.8)
    agent = make_agent(args, spread=0.5).double()
    references, batch_number = [NumpyDeReD(agent, s) for s in range(2)], itertools.count()

    def update_both(stage, lr, actor_lr):
        batch = make_batch(S=2, seed=next(batch_number)).double()
        metrics = dered.update(agent, batch, stage)
        for s, reference in enumerate(references):
            losses = reference.update(batch[s].numpy(), lr, actor_lr, args)
            ours = [metrics[f"loss/{name}"][s].item() for name in NETWORKS]
            np.testing.assert_allclose(ours, losses, rtol=1e-6)

    def assert_same_parameters():
        for s, reference in enumerate(references):
            ours = NumpyDeReD(agent, s).p
            for name, arrays in reference.p.items():
                for x, y in zip(ours[name], arrays):
                    np.testing.assert_allclose(x, y.reshape(x.shape), rtol=0, atol=1e-7, err_msg=name)

    stage1, stage2 = dered.args_of_stages(args)
    for n in range(3):
        update_both(stage1, 0.02, 0.02 * (1 + np.cos(np.pi * n / 3)) / 2)
    assert_same_parameters()
    dered.start_stage2(agent, stage2).double()
    for reference in references:
        reference.begin_stage2(finetune)
    for n in range(5):  # two updates up, three down
        rise, fall = 0.01 + 0.99 * n / 2, (1 + np.cos(np.pi * (n - 2) / 3)) / 2
        update_both(stage2, 0.01, 0.01 * (rise if n < 2 else fall))
    assert_same_parameters()


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing_in_stage_2():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args = make_args(num_seeds=2, learning_rate=0.05)
    states = []
    for factor in (1.0, 3.0):
        agent = dered.start_stage2(make_agent(args), args)
        for n in range(5):
            batch = make_batch(S=2, seed=n)
            batch[1] *= factor
            dered.update(agent, batch, args)
        states.append(weights(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        frozen = is_head(name.removeprefix("target_"))  # and with it the target's, which starts as its copy
        assert torch.equal(states[0][name][1], states[1][name][1]) == frozen, name


# ---------------------------------------------------------------------------------------------------------------------
# Runs: main() in this process
# ---------------------------------------------------------------------------------------------------------------------

SMALL = "--hidden-sizes", 16, 16, "--batch-size", 16, "--eval-episodes", 2, "--eval-workers", 0, "--device", "cpu"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


def main(script, *flags):
    """A script's main() in this process, whose signal handlers are put back afterwards; returns its exit status."""
    handlers, argv = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, sys.argv
    sys.argv = [f"{script}.py", *map(str, flags)]
    try:
        harness.load(script).main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def load(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def tensors(node, path=""):
    """Everything in a checkpoint, by a path of keys."""
    if isinstance(node, (dict, list, tuple)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, value in items for k, v in tensors(value, f"{path}/{key}").items()}
    return {path: node}


def assert_same_end(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators; the same evaluations.csv."""
    ours, theirs = tensors(load(run_dir)), tensors(load(reference))
    assert ours.keys() == theirs.keys()
    differ = [k for k in ours if not torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k]))]
    assert not differ, differ
    assert (Path(run_dir) / "evaluations.csv").read_text() == (Path(reference) / "evaluations.csv").read_text()


# a boundary inside a block of 100 updates, and dropout, whose masks come from the global generator
IQL_FLAGS = "--num-updates", 130, "--eval-every", 60, "--log-every", 20, "--num-seeds", 2, "--seed", 3
IQL_FLAGS += "--dropout", 0.1, "--learning-rate", 0.003
STAGE2_FLAGS = "--stage2-updates", 150, "--p-base", 0.1


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of a run of both stages that was never stopped."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert main("dered_iql", "--dataset", data, *SMALL, *IQL_FLAGS, *STAGE2_FLAGS, "--run-dir", run_dir) is None
    return run_dir


@pytest.fixture(scope="module")
def stage1_run(data, tmp_path_factory):
    """A finished run of iql_red.py --sampler uniform with the same flags."""
    run_dir = tmp_path_factory.mktemp("stage1") / "run"
    flags = *SMALL, *IQL_FLAGS, "--sampler", "uniform", "--run-dir", run_dir
    assert main("iql_red", "--dataset", data, *flags) is None
    return run_dir


def stop_after(num_updates, monkeypatch):
    """Lets a SIGTERM come in the update of this number, counted from now."""
    update, calls = dered.update, itertools.count(1)

    def stopping_update(*inputs):
        if next(calls) == num_updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*inputs)

    monkeypatch.setattr(dered, "update", stopping_update)


def test_a_stop_exactly_at_the_boundary(data, unbroken, stage1_run, monkeypatch, tmp_path, capsys):
    """Stage 1 is iql_red.py --sampler uniform, bit by bit: parameters, optimisers, generators, evaluations. Resumed,
    the run ends as if it had never been stopped."""
    flags = "--dataset", data, *SMALL, *IQL_FLAGS, *STAGE2_FLAGS, "--run-dir", tmp_path / "run"
    stop_after(130, monkeypatch)
    assert main("dered_iql", *flags) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert "stopped at update 130" in capsys.readouterr().out.splitlines()[-1]
    assert load(tmp_path / "run")["num_updates"] == 130
    assert_same_end(tmp_path / "run", stage1_run)
    assert main("dered_iql", "--resume", tmp_path / "run") is None
    assert_same_end(tmp_path / "run", unbroken)


@pytest.mark.parametrize("num_updates", [50, 131, 200])
def test_stops_about_the_boundary(data, unbroken, num_updates, monkeypatch, tmp_path):
    """... and so for stops in stage 1, in the first update of stage 2, and where a block ends in stage 2."""
    flags = "--dataset", data, *SMALL, *IQL_FLAGS, *STAGE2_FLAGS, "--run-dir", tmp_path / "run"
    stop_after(num_updates, monkeypatch)
    assert main("dered_iql", *flags) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert 0 <= load(tmp_path / "run")["num_updates"] - num_updates < 20  # where something is due next
    assert main("dered_iql", "--resume", tmp_path / "run") is None
    assert_same_end(tmp_path / "run", unbroken)


def test_stage1_from_a_run_of_iql_red(unbroken, stage1_run, tmp_path, capsys):
    """--stage1: its flags are taken over, its evaluations too, and the run ends like one of both stages, bit by bit."""
    before = {path.name: path.read_bytes() for path in stage1_run.iterdir()}
    assert main("dered_iql", "--stage1", stage1_run, *STAGE2_FLAGS, "--run-dir", tmp_path / "run") is None
    assert_same_end(tmp_path / "run", unbroken)
    assert before == {path.name: path.read_bytes() for path in stage1_run.iterdir()}
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert config["stage1"] == str(stage1_run) and config["sampler"] == "red" and config["dropout"] == 0.1
    shutil.move(stage1_run, f"{stage1_run}-elsewhere")  # from here on nothing more is read from it
    try:
        capsys.readouterr()
        assert main("dered_iql", "--resume", tmp_path / "run", "--stage2-updates", 190) is None
        assert main("dered_iql", "--evaluate", tmp_path / "run", "--eval-episodes", 1) is None
    finally:
        shutil.move(f"{stage1_run}-elsewhere", stage1_run)
    assert "320 updates" in capsys.readouterr().out and load(tmp_path / "run")["num_updates"] == 320
    assert set(harness.read_evaluations(tmp_path / "run")["update"]) == {60, 120, 130, 180, 240, 280, 300, 320}


def test_stage1_at_the_end_of_a_block(data, tmp_path):
    """The same when the boundary lies between two blocks of draws."""
    flags = "--dataset", data, *SMALL, "--num-updates", 100, "--eval-every", 50
    assert main("iql_red", *flags, "--sampler", "uniform", "--run-dir", tmp_path / "stage1") is None
    assert main("dered_iql", *flags, "--stage2-updates", 20, "--run-dir", tmp_path / "both") is None
    assert (
        main("dered_iql", "--stage1", tmp_path / "stage1", "--stage2-updates", 20, "--run-dir", tmp_path / "2") is None
    )
    assert_same_end(tmp_path / "2", tmp_path / "both")


def test_stage1_from_another_kind_of_device(stage1_run, tmp_path):
    """The state of a GPU's generator means nothing to a CPU's: the weights go on, with new draws."""
    shutil.copytree(stage1_run, tmp_path / "gpu")
    checkpoint = load(stage1_run)
    checkpoint["generators"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    torch.save(checkpoint, tmp_path / "gpu" / "checkpoint.pt")
    assert main("dered_iql", "--stage1", tmp_path / "gpu", "--stage2-updates", 5, "--run-dir", tmp_path / "run") is None
    assert load(tmp_path / "run")["num_updates"] == 135


def test_step_size_0_reproduces_stage_1(stage1_run, tmp_path, capsys):
    """Spec 4(g): with step size 0, stage 2 evaluates exactly as stage 1, and only the target critics have moved."""
    flags = "--stage1", stage1_run, "--stage2-updates", 20, "--stage2-rate", 0
    for finetune in "trunk", "all":
        assert main("dered_iql", *flags, "--finetune", finetune, "--run-dir", tmp_path / finetune) is None
        before, after = ({k: v for k, v in load(run)["agent"].items()} for run in (stage1_run, tmp_path / finetune))
        parameters = {name: x for name, x in before.items() if name.startswith((*NETWORKS, "target_critic"))}
        moved = differing(parameters, after)
        assert moved and all(is_target(name) for name in moved)
        outputs = []
        for script, run_dir in ("iql_red", stage1_run), ("dered_iql", tmp_path / finetune):
            capsys.readouterr()
            assert main(script, "--evaluate", run_dir, "--eval-episodes", 3) is None
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1] and outputs[0].count("seed ") == 2


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import harness
dered, (run_dir, *flags) = harness.load("dered_iql"), sys.argv[1:]
dered.make_env({"id": "Hopper-v5", "kwargs": {}}).close()  # imported once for all
update, path, rng = dered.update, Path(run_dir) / "checkpoint.pt", random.Random(5)

def start(argv, kill_in_update=None):
    pid = os.fork()
    if pid == 0:
        calls = iter(range(1, 10**6))
        def killed_update(*inputs):
            if next(calls) == kill_in_update:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*inputs)
        dered.update, sys.argv = killed_update, [dered.__file__, *argv]
        try:
            dered.main()
        finally:
            sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
    return pid

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def num_updates():
    return dered.load_checkpoint(run_dir, "cpu")["num_updates"]

assert end(start([*flags, "--run-dir", run_dir], 128)) == -9 and num_updates() == 70
assert end(start(["--resume", run_dir], 61)) == -9 and num_updates() == 130  # in update 131, the first of stage 2
pid, before = start(["--resume", run_dir]), path.stat().st_mtime_ns
while path.stat().st_mtime_ns == before:
    time.sleep(0.001)
time.sleep(rng.uniform(0, 0.05))
os.kill(pid, signal.SIGKILL)
assert end(pid) in (-9, 0) and num_updates() > 130
assert end(start(["--resume", run_dir])) == 0 and num_updates() == 280
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_about_the_boundary(data, unbroken, tmp_path):
    """kill -9 shortly before the boundary, in the first update after it, and at a random moment of stage 2."""
    flags = "--dataset", data, *SMALL, *IQL_FLAGS, *STAGE2_FLAGS, "--checkpoint-every", 70
    command = [sys.executable, "-c", KILLED, tmp_path / "run", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(tmp_path / "run", unbroken)


def test_draws_of_both_stages(data, unbroken, monkeypatch, tmp_path):
    """Stage 1 draws floor(u N); stage 2 inverts ReD's distribution, from the first update on, by the same stream of u:
    a block of 100 x B numbers per seed, drawn at updates 0, 100, 200."""
    dataset, update, batches = dered.load_dataset([str(data)]), dered.update, []
    index_of = {row[:11].tobytes(): i for i, row in enumerate(dataset.transitions)}
    monkeypatch.setattr(dered, "update", lambda agent, batch, args: batches.append(batch) or update(agent, batch, args))
    flags = "--dataset", data, *SMALL, *IQL_FLAGS, *STAGE2_FLAGS, "--run-dir", tmp_path / "run"
    assert main("dered_iql", *flags) is None
    drawn = np.array([[[index_of[row[:11].numpy().tobytes()] for row in seed] for seed in b] for b in batches])
    generators = [torch.Generator().manual_seed(3 + s) for s in range(2)]
    u = [[torch.rand(100, 16, generator=g, dtype=torch.float64) for g in generators] for _ in range(3)]
    u = torch.cat([torch.stack(block, 1) for block in u]).numpy()[:280]
    returns = np.repeat(dataset.episode_returns, dataset.episode_lengths)
    p = (returns - returns.min()) / np.ptp(returns) + 0.1
    cdf = np.cumsum(p / p.sum())
    np.testing.assert_array_equal(drawn[:130], np.floor(u[:130] * len(returns)))
    np.testing.assert_array_equal(drawn[130:], np.searchsorted(cdf, u[130:] * cdf[-1], side="right"))
    assert returns[drawn[130:]].mean() > returns[drawn[:130]].mean()


def test_seed_k_among_three_is_the_run_with_seed_k(data, tmp_path):
    """Through main() and the boundary, 50 updates: float tolerance, as batched products round differently."""
    flags = "--dataset", data, *SMALL, "--num-updates", 30, "--stage2-updates", 20, "--eval-episodes", 0
    flags += "--learning-rate", 0.003
    for seed, num_seeds in (5, 3), (5, 1), (7, 1):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        assert main("dered_iql", *flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir) is None
    together = load(tmp_path / "5-3")["agent"]
    for k in 0, 2:
        alone = load(tmp_path / f"{5 + k}-1")["agent"]
        for name in alone:
            if name.startswith((*NETWORKS, "target_critic")):
                torch.testing.assert_close(together[name][k], alone[name][0], rtol=1e-4, atol=1e-5)
                assert not torch.allclose(together[name][1], alone[name][0]), name


# -- what is reported -------------------------------------------------------------------------------------------------


def test_evaluations_and_curves_go_on_counting(unbroken):
    """An evaluation on the boundary and one at the end; the scalar `stage` steps from 1 to 2 at the boundary."""
    assert sorted(set(harness.read_evaluations(unbroken)["update"])) == [60, 120, 130, 180, 240, 280]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(unbroken), size_guidance={"scalars": 0})
    events.Reload()
    stage = [(s.step, s.value) for s in events.Scalars("stage")]
    assert stage == [(n, 1) for n in range(20, 121, 20)] + [(130, 2)] + [(n, 2) for n in range(140, 281, 20)]
    assert [s.step for s in events.Scalars("evaluation/return")] == [60, 120, 130, 180, 240, 280]
    assert [s.step for s in events.Scalars("loss/actor")] == list(range(20, 281, 20))


def test_what_a_run_prints(data, tmp_path, capsys):
    """Stage 1's result where it ends, then what stage 2 does, and in the last line the scores of both."""
    flags = "--dataset", data, *SMALL, "--num-updates", 20, "--stage2-updates", 10, "--run-dir", tmp_path / "run"
    assert main("dered_iql", *flags) is None
    lines, rows = capsys.readouterr().out.splitlines(), harness.read_evaluations(tmp_path / "run")
    score = [rows["normalized_score"][rows["update"] == n].mean() for n in (20, 30)]
    (at_boundary,) = [i for i, line in enumerate(lines) if line.startswith("stage 2: ")]
    assert lines[at_boundary - 1].startswith(f"stage 1: normalised score {score[0]:.1f} ± 0.0")
    assert "20 updates" in lines[at_boundary - 1] and "by red" in lines[at_boundary]
    assert "1,952 parameters" in lines[at_boundary]  # V and actor: 12 x 16 + 17 x 16 each; two Q: 15 x 16 + 17 x 16
    assert f"stage 1: normalised score {score[0]:.1f} ± 0.0" in lines[-1]
    assert f"stage 2: normalised score {score[1]:.1f} ± 0.0" in lines[-1]
    assert "30 updates" in lines[-1] and str(tmp_path / "run") in lines[-1]


@pytest.mark.parametrize("num_evaluations", [(30, 30), (30, 3), (2, 1), (0, 3)])
def test_each_stage_has_its_own_last_ten_evaluations(num_evaluations, tmp_path, capsys):
    """Two seeds, score 2 x update + 10 x seed: few evaluations of stage 2 are not eked out with some of stage 1."""
    args, per_stage = dered.Args(num_updates=100, stage2_updates=100, num_seeds=2, eval_episodes=1), []
    lines = ["update,seed,episode,return,length,normalized_score"]
    for n, end in zip(num_evaluations, (100, 200)):
        updates = range(end - n + 1, end + 1)
        lines += [f"{update},{seed},0,{update},1,{2 * update + 10 * seed}" for update in updates for seed in (0, 1)]
        per_stage.append(np.mean(updates[-10:]) if n else None)
    (tmp_path / "evaluations.csv").write_text("\n".join(lines) + "\n")
    dered.print_stages(args, tmp_path, 200, 7.0)
    (line,) = capsys.readouterr().out.splitlines()
    for stage, update in enumerate(per_stage, 1):
        expected = f"stage {stage}: normalised score {2 * (update or 0) + 5:.1f} ± 5.0, return {update or 0:.1f} ± 0.0 "
        expected += f"(last {min(10, num_evaluations[stage - 1])} evaluations);"
        assert (expected in line) == (update is not None), line
        assert (f"stage {stage}: " in line) == (update is not None)


def test_last_line_without_scores_and_without_evaluations(tmp_path, capsys):
    (tmp_path / "evaluations.csv").write_text("update,seed,episode,return,length,normalized_score\n5,0,0,3.0,1,nan\n")
    dered.print_stages(dered.Args(num_updates=2, stage2_updates=3), tmp_path, 5, 7.0)
    assert capsys.readouterr().out.startswith("stage 2: return 3.0 ± 0.0 (last 1 evaluations); ")
    dered.print_stages(dered.Args(eval_episodes=0), tmp_path, 5, 7.0)
    assert capsys.readouterr().out.startswith("5 updates, ")


def test_evaluate_a_run_in_any_stage(data, unbroken, monkeypatch, tmp_path, capsys):
    """A run stopped in stage 1, and one that has ended: each is evaluated, and nothing in its folder changes."""
    stop_after(50, monkeypatch)
    assert main("dered_iql", "--dataset", data, *SMALL, *IQL_FLAGS, "--run-dir", tmp_path / "1") == 128 + signal.SIGTERM
    monkeypatch.undo()
    for run_dir in tmp_path / "1", unbroken:
        before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
        capsys.readouterr()
        assert main("dered_iql", "--evaluate", run_dir, "--eval-episodes", 2) is None
        assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["seed 3:", "seed 4:"]
        assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(tmp_path, capsys):
    """refuses(*flags, words=(...)): exit status 2, one line on stderr with these words, no run folder."""

    def check(*flags, words=()):
        capsys.readouterr()
        assert main("dered_iql", "--stage2-updates", 1, *flags, "--run-dir", tmp_path / "refused") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "; " in line and all(str(word) in line for word in words), line
        assert not (tmp_path / "refused").exists()

    return check


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--stage2-updates", 0),
        ("--stage2-rate", -0.1),
        ("--stage2-rate", "nan"),
        ("--warm-up", 1.1),
        ("--num-updates", 0),
        ("--finetune", "head"),
    ],
)
def test_flags_out_of_range(refuses, data, flag, value):
    refuses("--dataset", data, *SMALL, "--num-updates", 1, flag, value, words=[value if flag == "--finetune" else flag])


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--seed", 0), "--seed"),
        (("--num-seeds", 1), "--num-seeds"),
        (("--hidden-sizes", 8, 8), "--hidden-sizes"),
        (("--dataset", "hopper/replay-v0"), "--dataset"),
        (("--num-updates", 100), "--num-updates"),
        (("--gamma", 2), "--gamma"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_stage1(refuses, stage1_run, flags, word):
    refuses("--stage1", stage1_run, *flags, words=[word])


def test_folders_that_are_no_stage1(refuses, stage1_run, unbroken, tmp_path):
    """No run; a run of another script; drawn by ReD; unfinished; damaged in its config or checkpoint."""

    def altered(name, text=None, **args):
        shutil.copytree(stage1_run, tmp_path / name)
        config = json.loads((stage1_run / "config.json").read_text())
        config["args"] |= args
        (tmp_path / name / "config.json").write_text(json.dumps(config) if text is None else text)
        return tmp_path / name

    refuses("--stage1", tmp_path, words=[tmp_path, "no run"])
    refuses("--stage1", tmp_path / "absent", words=["absent", "no run"])
    refuses("--stage1", unbroken, words=[unbroken, "dered_iql.py", "iql_red.py"])
    refuses("--stage1", altered("red", sampler="red"), words=["red", "--sampler uniform"])
    refuses("--stage1", altered("unfinished", num_updates=500), words=["not finished", "--resume"])
    refuses("--stage1", altered("other", no_such_flag=1), words=["another version", "no_such_flag"])
    for i, text in enumerate(["", "[]", "{", '{"script": "iql_red", "args": 3}', '{"script": "iql_red"}']):
        refuses("--stage1", altered(f"config{i}", text), words=["no run"])
    refuses("--stage1", altered("empty", '{"script": "iql_red", "args": {}}'), words=["another version"])
    (altered("truncated") / "checkpoint.pt").write_bytes((stage1_run / "checkpoint.pt").read_bytes()[:999])
    refuses("--stage1", tmp_path / "truncated", words=["truncated", "no readable checkpoint"])


def test_flags_that_differ_when_a_run_goes_on(unbroken, stage1_run, capsys):
    """The boundary cannot be moved any more, nor anything else of either stage; stage 2 cannot end before now."""
    flags = ("--num-updates", 200), ("--finetune", "all"), ("--stage1", stage1_run), ("--warm-up", 0)
    for flag, value in *flags, ("--stage2-rate", 1), ("--sampler", "uniform"), ("--stage2-updates", 100):
        capsys.readouterr()
        assert main("dered_iql", "--resume", unbroken, flag, value) == 2, flag
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and flag in line and str(unbroken) in line
    assert main("dered_iql", "--resume", unbroken, "--stage2-updates", 150) is None


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def learn_chain(beta):
    """Returns of three seeds on test_iql_red's chain: after stage 1 as behaviour cloning, and after a stage 2 with
    this beta, in which only trunks move."""
    args = make_args(num_seeds=3, hidden_sizes=(32, 32), batch_size=128, learning_rate=3e-3, stage2_rate=1.0)
    args = replace(args, num_updates=300, stage2_updates=300, polyak=0.05, expectile=0.9, beta=beta)
    transitions, _ = chain_transitions()
    agent, generator = make_agent(args, 4, 1), torch.Generator().manual_seed(0)
    sampler, found = dered.Sampler(np.full(len(transitions), 1 / len(transitions)), "cpu"), []
    stage1, stage2 = dered.args_of_stages(args)
    for stage in replace(stage1, beta=0.0), stage2:
        if found:
            dered.start_stage2(agent, stage2)
        for _ in range(300):
            u = torch.rand(3, args.batch_size, dtype=torch.float64, generator=generator)
            dered.update(agent, transitions[sampler(u)], stage)
        found.append(chain_returns(agent.actor, 3))
    return found


def test_stage_2_learns_the_chain():
    """Cloning quits at once, as most of the data does (0.5). Moving trunks alone is enough to go on to the end."""
    cloned, finetuned = learn_chain(beta=3.0)
    assert cloned.max() <= 0.5 and np.all(finetuned == pytest.approx(5 - 3 * 0.1)), (cloned, finetuned)
    assert learn_chain(beta=-3.0)[1].max() <= 0.5  # a flipped advantage fails


@pytest.mark.parametrize("finetune", ["trunk", "all"])
def test_stage_2_turns_to_the_good_episodes(finetune, monkeypatch, tmp_path):
    """Through main(): one episode in five does the opposite of the others and gets all the reward. Cloning (beta 0) of
    uniform draws follows the many, of ReD's draws the few; stage 2 gets there with frozen heads."""
    rng, episodes = np.random.default_rng(0), []
    for i in range(20):
        good = i % 5 == 0
        action = np.full((10, 3), 0.5 if good else -0.5)
        ends = np.zeros(10, bool), np.arange(10) == 9
        episodes.append((rng.normal(size=(11, 11)), action, np.full(10, float(good)), *ends))
    data = harness.write_minari(tmp_path / "data", episodes)
    flags = "--dataset", data, *SMALL, "--hidden-sizes", 32, 32, "--batch-size", 64, "--eval-episodes", 0
    flags += "--beta", 0, "--learning-rate", 3e-3, "--stage2-rate", 0.3, "--dropout", 0.2, "--finetune", finetune
    run_dir, actor = tmp_path / "run", make_agent(dered.Args(hidden_sizes=(32, 32)), 11, 3).actor
    obs = torch.from_numpy(rng.normal(size=(1, 500, 11))).float()

    def mean_action():
        state = load(run_dir)["agent"]
        actor.load_state_dict({k.removeprefix("actor."): x for k, x in state.items() if k.startswith("actor.")})
        return actor.act(obs).mean().item()

    stop_after(200, monkeypatch)
    main("dered_iql", *flags, "--num-updates", 200, "--stage2-updates", 300, "--run-dir", run_dir)
    after_stage1 = mean_action()
    main("dered_iql", "--resume", run_dir)
    assert after_stage1 < -0.15 and mean_action() > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("finetune", ["trunk", "all"])
def test_captured_stages_equal_eager_ones(finetune):
    """Each stage captured on its own, ten updates a graph, replayed twice: what eager updates give, no trace left."""
    args = make_args(num_seeds=2, num_updates=20, stage2_updates=20, learning_rate=1e-3, warm_up=0.5, finetune=finetune)
    transitions = make_batch(S=1, B=500, seed=1)[0].cuda()
    blocks = torch.randint(500, (2, 2, 10, 2, 32), generator=torch.Generator().manual_seed(2)).cuda()
    agents = [make_agent(args).cuda() for _ in range(2)]
    for n, stage, of_stage in zip((1, 2), dered.args_of_stages(args), blocks):
        if n == 2:
            agents = [dered.start_stage2(agent, stage) for agent in agents]
        learn = [functools.partial(dered.run_updates, agent, transitions, stage) for agent in agents]
        first = {name: x.clone() for name, x in agents[0].state_dict().items()}
        replay = dered.cuda_graph(learn[0], agents[0], torch.zeros_like(of_stage[0]))
        assert not differing(first, agents[0].state_dict())
        for block in of_stage:
            captured, eager = replay(block), learn[1](block)
        assert agents[0].num_updates == agents[1].num_updates == 20
        for name, x in agents[1].state_dict().items():
            torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-6)
        for name in eager:
            torch.testing.assert_close(captured[name], eager[name], rtol=1e-4, atol=1e-5)
