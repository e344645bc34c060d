"""What dered_iql.py adds to iql_red.py: two stages, their draws, step sizes and what they move; whole updates
in each against float64; runs that stop in either. Networks and losses one by one: see test_iql_red.py."""

import math
import types

import harness
import numpy as np
import pytest
import torch
from reference import IQL, adams_with, check_updates, random_batch, randomize

dered = harness.load("dered_iql")
update = dered.update

OBS_DIM = 4
ACTION_DIM = 2
NETWORKS = "value", "actor", "critic"


def make_args(**flags):
    return dered.Args(**{"hidden_sizes": (16, 16), "device": "cpu", **flags})


def make_agent(args, size=0.5):
    """An agent of random numbers of this size: biases, log_std and targets, too."""
    agent = dered.Agent(OBS_DIM, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(S=1, B=32, seed=0, dtype=torch.float32):
    """Random obs, action, reward, next_obs, not_terminated."""
    return random_batch(S, B, OBS_DIM, ACTION_DIM, 0, seed, dtype)[:-1]


def tensors(agent):
    return {name: x.detach().clone() for name, x in agent.named_parameters()}


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def heads(num_layers):
    """Names of what rests in stage 2: last layers, and log_std."""
    last = num_layers - 1
    nets = "value", "critic", "actor.net"
    return {f"{net}.{kind}.{last}" for net in nets for kind in ("weights", "biases")} | {"actor.log_std"}


# The stages ---------------------------------------------------------------------------------------
def test_stages_of_the_paper():
    """A million uniform updates of everything at 3e-4, then half a million by ReD of backbones at 3e-5."""
    one, two = dered.stages_of(make_args())
    assert one == ("stage 1", 0, 1_000_000, "uniform", "all", 3e-4, 0)
    assert two[:5] == ("stage 2", 1_000_000, 1_500_000, "red", "backbone")
    assert two[5:] == pytest.approx((3e-5, 0.05))
    assert dered.stages_of(make_args(finetune="all"))[1] == two._replace(moving="all")


def test_step_size_of_the_actor():
    """Stage 1: a cosine. Stage 2 of 200,000 updates, worked by hand: up for 10,000, then a cosine."""
    one, two = dered.stages_of(make_args(num_updates=1_000_000, stage2_updates=200_000))
    for n, rate in ((0, 3e-4), (250_000, 2.560660e-4), (500_000, 1.5e-4), (1_000_000, 0)):
        assert one.actor_rate(n) == pytest.approx(rate, rel=1e-6, abs=1e-12)
    for n, rate in ((0, 3e-7), (5_000, 1.515e-5), (10_000, 3e-5), (105_000, 1.5e-5), (200_000, 0)):
        assert two.actor_rate(1_000_000 + n) == pytest.approx(rate, rel=1e-6, abs=1e-12)
    _, two = dered.stages_of(make_args(warm_up=0))
    assert two.actor_rate(1_000_000) == pytest.approx(3e-5)
    assert two.actor_rate(1_250_000) == pytest.approx(1.5e-5)
    _, two = dered.stages_of(make_args(warm_up=1))
    assert two.actor_rate(1_250_000) == pytest.approx(0.505 * 3e-5)


def test_probabilities():
    """Of ten transitions in three episodes; p_base and alpha are stage 2's."""
    columns = [x[0].numpy() for x in make_batch(B=10)]
    data = dered.Data(*columns, np.array([0.0, 5, 10]), np.array([2, 3, 5]), None, (math.nan, math.nan))
    args = make_args(red_alpha=2, p_base=0.1)
    one, two = [dered.stage_probabilities(data, stage, args) for stage in dered.stages_of(args)]
    weights = np.repeat([0.1, 0.6, 1.1], [2, 3, 5]) ** 2
    np.testing.assert_allclose(one, np.full(10, 0.1), rtol=1e-12)
    np.testing.assert_allclose(two, weights / weights.sum(), rtol=1e-12)


def test_numbers_of_parameters():
    """Hopper's networks, 2 x 256, by hand: backbones; with `all` heads of 1, 3 and 1 outputs, and log_std."""
    for finetune, extra in (("backbone", (0, 0, 0)), ("all", (257, 3 * 257 + 3, 2 * 257))):
        args = make_args(hidden_sizes=(256, 256), finetune=finetune, num_seeds=2)
        agent = dered.Agent(11, 3, args)
        for name, backbone, head in zip(NETWORKS, (68_864, 68_864, 139_264), extra):
            moving = agent.optimizers[name, "stage 2"].param_groups[0]["params"]
            assert sum(x.numel() for x in moving) == 2 * (backbone + head)
            everything = agent.optimizers[name, "stage 1"].param_groups[0]["params"]
            assert list(map(id, everything)) == list(map(id, getattr(agent, name).parameters()))


@pytest.mark.parametrize("hidden_sizes", [(16,), (16, 12, 8)])
@pytest.mark.parametrize("finetune", ["backbone", "all"])
def test_heads_rest_to_the_bit_in_stage_2(hidden_sizes, finetune):
    """... and everything else moves, targets too, also those of heads. No parameter keeps a gradient."""
    args = make_args(num_seeds=2, finetune=finetune, hidden_sizes=hidden_sizes, learning_rate=0.01)
    agent = make_agent(args)
    resting = heads(len(hidden_sizes) + 1)
    assert resting <= tensors(agent).keys()
    for stage, still in zip(dered.stages_of(args), (set(), resting if finetune == "backbone" else set())):
        before = tensors(agent)
        for n in range(5):
            update(agent, *make_batch(S=2, seed=n), stage, args)
        assert before.keys() - differing(before, tensors(agent)) == still
    assert all(x.grad is None for x in agent.parameters())


# The update in either stage against float64 -------------------------------------------------------
class Reference(IQL):
    """One seed of DeReD: IQL, some of whose layers rest."""

    def begin(self, rate, heads_rest):
        """New Adams. Heads are the last of all weights and of all biases; the actor's log_std comes before them."""
        self.moments = {}
        self.stage_rate = rate
        self.resting = []
        if heads_rest:
            self.resting = [id(x) for net in self.nets.values() for x in (*net[:-6], net[-4], net[-1])]

    def step(self, x, gradient, rate):
        if id(x) not in self.resting:
            super().step(x, gradient, self.stage_rate)

    def update(self, *columns_and_stage):
        return super().update(*columns_and_stage[:-1])


@pytest.mark.parametrize("finetune", ["backbone", "all"])
def test_both_stages_against_float64(finetune):
    """Three updates of stage 1, then three of stage 2, of two seeds that do not mix: logs, parameters."""
    exact = {"learning_rate": 2**-5, "stage2_rate": 0.5, "target_update_rate": 0.25, "expectile": 0.75}
    args = make_args(num_seeds=2, finetune=finetune, **exact)
    agent = make_agent(args).double()
    adams_with(agent, eps=1)  # with 1e-8, Adam's steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    for stage, rate, resting in zip(dered.stages_of(args), (2**-5, 2**-6), (False, finetune == "backbone")):
        for reference in references:
            reference.begin(rate, resting)
        batches = [make_batch(S=2, seed=seed, dtype=torch.float64) + [stage] for seed in range(3)]
        check_updates(dered, agent, references, batches, args)


# Runs ---------------------------------------------------------------------------------------------
RUN = "--hidden-sizes", 8, 8, "--batch-size", 8, "--device", "cpu", "--dropout", 0.2, "--num-seeds", 2
STAGES = "--num-updates", 100, "--stage2-updates", 80, "--eval-every", 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


def run(monkeypatch, *flags, stop_at=None):
    """Runs main(); returns (stage, rates) of every update; interrupts it at update `stop_at`."""
    calls = []

    def recorder(agent, *columns_stage_args):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        stage = columns_stage_args[-2].name
        rates = [agent.optimizers[name, stage].param_groups[0]["lr"].item() for name in NETWORKS]
        calls.append((stage, rates))
        return update(agent, *columns_stage_args)

    with monkeypatch.context() as patch:
        patch.setattr(dered, "update", recorder)
        try:
            harness.run_main("dered_iql", *flags)
        except KeyboardInterrupt:
            assert stop_at is not None
    return calls


def test_a_run(monkeypatch, data, tmp_path, capsys):
    """Step sizes by stage, the one clock, the last lines. Stopped in either stage, or where one ends, and
    resumed, a run ends with the same bits."""
    flags = "--dataset", data, *RUN, *STAGES, "--eval-episodes", 1
    stages, rates = zip(*run(monkeypatch, *flags, "--run-dir", tmp_path / "whole"))
    assert stages == ("stage 1",) * 100 + ("stage 2",) * 80
    rows = harness.read_evaluations(tmp_path / "whole")
    assert sorted(set(rows["update"])) == [40, 80, 100, 120, 160, 180]
    for line, first, last in zip(capsys.readouterr().out.splitlines()[-2:], (1, 101), (100, 180)):
        mean = rows["return"][(first <= rows["update"]) & (rows["update"] <= last)].mean()
        assert line.startswith(f"stage {1 + (first > 1)}: return {mean:.1f}, ")
    assert "; 180 updates, " in line

    value, actor, critic = np.array(rates).T
    np.testing.assert_allclose(value, [3e-4] * 100 + [3e-5] * 80, rtol=1e-6)
    np.testing.assert_array_equal(value, critic)
    one, two = dered.stages_of(make_args(num_updates=100, stage2_updates=80))
    expected = [one.actor_rate(n) for n in range(0, 100, 20)]
    expected += [two.actor_rate(n) for n in range(100, 180, 20)]
    np.testing.assert_allclose(actor, np.repeat(expected, 20), rtol=1e-6)

    for stop_at in (50, 110, 150):  # resumed from 40, from 100 where stage 2 begins, and from 120
        stopped = tmp_path / str(stop_at)
        run(monkeypatch, *flags, "--run-dir", stopped, stop_at=stop_at)
        assert len(run(monkeypatch, "--resume", stopped)) == 180 - {50: 40, 110: 100, 150: 120}[stop_at]
        harness.assert_same_end(stopped, tmp_path / "whole")

    for other in (["--num-updates", 200], ["--num-updates", 80], ["--finetune", "all"]):
        with pytest.raises(SystemExit, match="^error: stage 1 .* --stage2-updates"):
            run(monkeypatch, "--resume", tmp_path / "whole", *other)
    assert len(run(monkeypatch, "--resume", tmp_path / "whole", "--stage2-updates", 60)) == 0
    assert len(run(monkeypatch, "--resume", tmp_path / "whole", "--stage2-updates", 120)) == 40


def test_stage_1_is_iql(monkeypatch, data, tmp_path):
    """... of iql_red.py on uniform draws, to the bit; with steps of no size stage 2 leaves it as it is."""
    flags = "--dataset", data, *RUN, "--num-updates", 60, "--eval-episodes", 0
    run(monkeypatch, *flags, "--stage2-updates", 40, "--stage2-rate", 0, "--run-dir", tmp_path / "dered")
    harness.run_main("iql_red", *flags, "--sampler", "uniform", "--run-dir", tmp_path / "iql")
    different = harness.differing_leaves(tmp_path / "dered", tmp_path / "iql", "/agent")
    assert different and all(path.startswith("/agent/target_critic.") for path in different)  # which go on


# Learning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("finetune", ["backbone", "all"])
def test_stage_2_turns_to_the_good_episodes(finetune):
    """One episode in five does the opposite of the others and gets all the reward. Cloning (beta 0) follows
    the many in stage 1 and the few in stage 2, which gets there with a resting head, too."""
    rng = np.random.default_rng(0)
    obs = np.float32(rng.normal(size=(1000, OBS_DIM)))
    good = np.repeat(np.arange(20) % 5 == 0, 50)
    action = np.repeat(np.where(good, 0.5, -0.5)[:, None], ACTION_DIM, 1)
    columns = [torch.from_numpy(np.float32(x)) for x in (obs, action, good, obs, np.ones(1000))]
    data = types.SimpleNamespace(returns=50.0 * good[::50], lengths=np.full(20, 50))
    flags = {"num_updates": 200, "stage2_updates": 300, "learning_rate": 3e-3, "stage2_rate": 0.3}
    args = make_args(beta=0, finetune=finetune, **flags)
    agent = dered.Agent(OBS_DIM, ACTION_DIM, args)
    reached = []
    for stage in dered.stages_of(args):
        sampler = dered.Sampler(dered.stage_probabilities(data, stage, args), "cpu")
        for num_updates in stage.steps(0):
            for batch in sampler.draw([0], num_updates, 64):
                update(agent, *[column[batch] for column in columns], stage, args)
        reached.append(agent.actor(columns[0][None]).mean().item())
    assert reached[0] < -0.15 and reached[1] > 0.3, reached
