"""awac.py against numpy, numbers by hand and its own runs: weights, update, the online stage, resume.

What it shares with asac.py to the letter (ensemble, networks, evaluation sampling) is tested in test_asac.py.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch
from old_asac_helpers import NumpyActorCritic, in_double, leaves_of, make_transitions, record, state_of, two_steps

awac = harness.load("awac")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
CPU = torch.device("cpu")
INF = math.inf
TIME_LIMIT = 30  # steps of an online episode


def make_args(**flags):
    return awac.Args(**{"hidden_sizes": (16, 16), "batch_size": 32, **flags})


def make_agent(args, spread=None, device="cpu"):
    """An AWACAgent. With `spread`, all parameters are drawn anew, so that targets and online networks differ."""
    agent = awac.AWACAgent(O, A, args, torch.device(device))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_inputs(args, seed=0):
    """A batch (S, B, O + A + 1 + O + 1), next_noise and noise (S, B, A)."""
    S, B = args.num_seeds, args.batch_size
    generator = torch.Generator().manual_seed(seed)
    batch = make_transitions(S * B, seed).view(S, B, -1)
    return batch, *(torch.randn(S, B, A, generator=generator) for _ in range(2))


def call_main(monkeypatch, *flags):
    """awac's main() in this process; it puts the process's signal handlers back afterwards."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["awac.py", *map(str, flags)])
    try:
        awac.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@pytest.fixture
def run_main(monkeypatch):
    return partial(call_main, monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Hopper, with a time limit that it reaches now and then; its reward is shifted in the runs below, so that the
    online stage has a transformation to do."""
    spec = json.dumps({"id": "Hopper-v5", "max_episode_steps": TIME_LIMIT})
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes(), env_spec=spec)


SMALL = "--hidden-sizes", 16, 16, "--batch-size", 16, "--device", "cpu", "--eval-workers", 0
ONLINE = *SMALL, "--reward-transform", "shift", "--num-seeds", 2, "--num-updates", 130, "--online-steps", 170
ONLINE += "--eval-every", 110, "--eval-episodes", 1, "--eval-samples", 3, "--checkpoint-every", 19, "--seed", 3


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def differences(run_dir, reference):
    """Names of what is not bit-identical: weights, targets, optimisers, own steps, generators, evaluations."""

    def walk(node, path=""):
        if isinstance(node, dict):
            return {k: v for key, value in node.items() for k, v in walk(value, f"{path}/{key}").items()}
        if isinstance(node, list):
            return {k: v for i, value in enumerate(node) for k, v in walk(value, f"{path}/{i}").items()}
        return {path: node}

    ours, theirs = walk(checkpoint_of(run_dir)), walk(checkpoint_of(reference))
    names = ours.keys() ^ theirs.keys()
    names |= {k for k in ours.keys() & theirs.keys() if not torch.equal(*map(torch.as_tensor, (ours[k], theirs[k])))}
    for path in Path(reference).glob("*.csv"):
        if path.read_text() != (Path(run_dir) / path.name).read_text():
            names |= {path.name}
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Weights: the numbers of the spec, 3(g)
# ---------------------------------------------------------------------------------------------------------------------


def weights(advantage, max_advantage=INF, beta=0.5):
    return awac.advantage_weights(torch.tensor([advantage], dtype=torch.float64), max_advantage, beta)[0]


def test_weights():
    near = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    near(weights([1.0, 0.0, -1.0]), [0.8668, 0.1173, 0.0159])
    near(weights([1.0, 0.0, -1.0], max_advantage=0), [0.4683, 0.4683, 0.0634])  # the bound is above only, before / beta
    near(weights([1.0, 0.0, -1.0], beta=1e9), [1 / 3] * 3)
    near(weights([8.0, 7.0, 6.0]), weights([1.0, 0.0, -1.0]))
    for extreme in ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]):
        w = weights(extreme)
        assert w.isfinite().all() and (w >= 0).all() and w.sum().item() == pytest.approx(1)
    two = awac.advantage_weights(torch.tensor([[1.0, 0.0], [5.0, 5.0]]), INF, 1.0)  # of each seed by itself
    torch.testing.assert_close(two.sum(1), torch.ones(2))
    torch.testing.assert_close(two[1], torch.full((2,), 0.5))


def test_advantage_is_pessimistic_about_the_policy_alone():
    """Mean of Q at the logged action, Q_bar at the policy's; with one critic or equal ones an ordinary advantage."""
    agent = make_agent(make_args(num_critics=3, num_seeds=2), spread=0.5)
    batch, noise, _ = make_inputs(make_args(num_seeds=2))
    obs, action = batch[..., :O], batch[..., O : O + A]
    ours = awac.advantages(agent.critic, obs, action, noise, 0.7)
    q, policy_q = (agent.critic(torch.cat([obs, a], -1)).squeeze(-1) for a in (action, noise))
    torch.testing.assert_close(ours, q.mean(1) - awac.pessimistic(policy_q, 0.7), rtol=1e-5, atol=1e-5)
    assert (ours > q.mean(1) - policy_q.mean(1)).all()
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.copy_(p[:, :1].expand_as(p))
    q, policy_q = (agent.critic(torch.cat([obs, a], -1)).squeeze(-1)[:, 0] for a in (action, noise))
    ours = awac.advantages(agent.critic, obs, action, noise, 0.7)
    torch.testing.assert_close(ours, q - policy_q, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_advantage, pessimism, num_critics", [(INF, 0.5, 2), (0.2, 0.7, 3)])
def test_update_against_numpy(max_advantage, pessimism, num_critics):
    """Six updates of two seeds, in float64, with steps so large that every question of order shows."""
    args = make_args(
        num_seeds=2, num_critics=num_critics, learning_rate=0.02, polyak=0.3, gamma=0.9, pessimism=pessimism, beta=0.4,
        max_advantage=max_advantage,
    )  # fmt: skip
    agent = in_double(make_agent(args, spread=0.5), args)
    references, clipped = [NumpyActorCritic(agent, s, args) for s in range(2)], []
    for n in range(6):
        batch, next_noise, noise = (x.double() for x in make_inputs(args, n))
        metrics = awac.update(agent, batch, next_noise, noise, args)
        for s, reference in enumerate(references):
            rows, action = batch[s].numpy(), batch[s, :, O : O + A].numpy()
            critic_loss = reference.critic_step(rows, next_noise[s].numpy())
            advantage = reference.advantage(rows[:, :O], action, noise[s].numpy())  # new critics, old actor
            weight = np.exp(np.minimum(advantage, max_advantage) / 0.4)
            weight /= weight.sum()
            actor_loss = reference.actor_step(rows[:, :O], action, weight)
            reference.target_step()
            clipped.append(advantage > max_advantage)
            losses = [metrics["loss/critic"][s].item(), metrics["loss/actor"][s].item()]
            np.testing.assert_allclose(losses, [critic_loss, actor_loss], rtol=1e-9)
            assert metrics["value/effective_batch"][s].item() == pytest.approx(1 / np.sum(weight**2), rel=1e-9)
    for s, reference in enumerate(references):
        reference.assert_same(agent, s)
    assert (0 < np.mean(clipped) < 1) == (max_advantage < INF)


def test_critic_loss_of_two_critics_is_clipped_double_q():
    """n = 2 and lambda = 1/2: the target is r + gamma (1 - d) min Q_target(s', a'), and r alone at true ends."""
    args = make_args(learning_rate=0.0)
    agent = make_agent(args, spread=0.5)
    batch, next_noise, noise = make_inputs(args)
    obs, action, reward, next_obs, mask = batch.split(agent.widths, -1)
    with torch.no_grad():
        offset = (0.2 * next_noise).clamp(-0.3, 0.3)
        next_action = (agent.actor(next_obs) + offset).clamp(-1, 1)
        next_q = agent.target_critic(torch.cat([next_obs, next_action], -1)).amin(1)
        target, q = reward + 0.99 * mask * next_q, agent.critic(torch.cat([obs, action], -1))
    expected = 0.5 * (q - target[:, None]).square().mean((2, 3)).sum(1)
    torch.testing.assert_close(awac.update(agent, batch, next_noise, noise, args)["loss/critic"], expected)
    assert 0 < mask.mean() < 1


def test_infinite_beta_is_behaviour_cloning():
    """The loss is the mean negative log-likelihood, and the gradient that of cloning."""
    args = make_args(beta=1e9)
    agent = make_agent(args, spread=0.5)
    batch, *noise = make_inputs(args)
    expected = -agent.actor.log_prob(agent.actor(batch[..., :O]), batch[..., O : O + A]).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(agent.actor.parameters()))])
    notes = record(agent)
    loss = awac.update(agent, batch, *noise, args)["loss/actor"]
    torch.testing.assert_close(loss, expected.detach()[None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(notes[1][2], gradient, rtol=1e-4, atol=1e-5)


def test_losses_leave_other_networks_alone():
    """The critics' loss reaches the critics alone, the actor's the actor alone; critics first."""
    args = make_args()
    agent = make_agent(args, spread=0.5).requires_grad_()  # targets too: only the code keeps gradients away from them
    notes = record(agent)
    awac.update(agent, *make_inputs(args), args)
    assert [(name, reached) for name, reached, _ in notes] == [("critic", {"critic"}), ("actor", {"actor"})]


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(6):
            inputs = make_inputs(args, n)
            for x in inputs:
                x[1] *= factor
            awac.update(agent, *inputs, args)
        states.append(state_of(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        assert not torch.equal(states[0][name][1], states[1][name][1]), name


def test_seed_k_among_three_is_seed_k_alone():
    """The same first weights; on the same batches the same agent after 50 updates."""
    flags = {"hidden_sizes": (16,) * 3, "architecture": "modern", "batch_size": 16, "learning_rate": 1e-3}
    args, alone_args = make_args(num_seeds=3, seed=7, **flags), make_args(seed=9, **flags)
    together, alone = make_agent(args), make_agent(alone_args)
    first = state_of(together)
    for name, x in state_of(alone).items():
        torch.testing.assert_close(first[name][2], x[0], rtol=0, atol=1e-6)
    for n in range(50):
        inputs = make_inputs(args, n)
        awac.update(together, *inputs, args)
        awac.update(alone, *(x[2:] for x in inputs), alone_args)
    for name, x in state_of(alone).items():
        torch.testing.assert_close(state_of(together)[name][2], x[0], rtol=2e-3, atol=2e-3)
    assert (state_of(together)["actor.net.weight1"] - first["actor.net.weight1"]).abs().max() > 0.01


def learned_policy(**flags):
    """pi and Q(first, 1) of two seeds in the first state, after 300 updates on test_asac.py's log of two steps."""
    defaults = {"hidden_sizes": (32, 32), "num_seeds": 2, "learning_rate": 3e-3, "polyak": 0.07, "beta": 0.2}
    args = make_args(**{**defaults, "batch_size": 64, **flags})
    agent, generator, transitions = awac.AWACAgent(2, 1, args, CPU), torch.Generator().manual_seed(0), two_steps()
    for _ in range(300):
        index = torch.randint(len(transitions), (2, 64), generator=generator)
        noise = (torch.randn(2, 64, 1, generator=generator) for _ in range(2))
        awac.update(agent, transitions[index], *noise, args)
    start = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    with torch.no_grad():
        return agent.actor(start).flatten(), agent.critic(torch.cat([start, torch.ones(2, 1, 1)], -1))[:, 0].flatten()


def test_awac_looks_ahead():
    """The mean of exp(1.48 a / 0.2) on [-1, 1] is 1 - 0.2 / 1.48 = 0.86; one without foresight, or without weights,
    does something else."""
    action, q = learned_policy()
    assert action.min() > 0.75 and action.max() < 0.97, action
    torch.testing.assert_close(q, torch.full((2,), 2 * 0.99 - 0.5), rtol=0, atol=0.3)
    assert learned_policy(gamma=0.0)[0].max() < -0.3
    assert learned_policy(beta=1e6)[0].abs().max() < 0.3


def test_a_wide_policy_between_two_modes_and_the_best_of_samples():
    """Spec 15.2: actions of -0.8 and 0.8 in equal numbers, Q a little in favour of the latter. The Gaussian's mean
    stays between them; the best of 50 samples is on the better side of it."""
    args = make_args(
        num_seeds=1, beta=10.0, learning_rate=3e-3, gamma=0.0, polyak=0.05, eval_samples=50, hidden_sizes=(32,)
    )
    generator, agent = torch.Generator().manual_seed(0), None
    agent = awac.AWACAgent(1, 1, args, CPU)
    for _ in range(250):
        action = 0.8 * torch.randint(2, (1, 64, 1), generator=generator) * 2 - 0.8
        batch = torch.cat([torch.ones_like(action), action, action, torch.ones_like(action), 0 * action], -1)  # r = a
        awac.update(agent, batch, torch.zeros(1, 64, 1), torch.randn(1, 64, 1, generator=generator), args)
    obs = torch.ones(1, 1, 1)
    mean, best = agent.actor.act(obs).item(), awac.BestOfSamples(agent, args).act(obs).item()
    assert abs(mean) < 0.35 and best > mean + 0.25


def test_presets_and_defaults():
    """What the paper does on its testbeds (spec 7), unless a flag says otherwise: A_max and lambda = 0 for AntMaze."""
    for preset, expected in {
        "small": ("simple-small", 2, 0.5, 0.5, INF, 1_000_000),
        "mood": ("simple-large", 5, 0.5, 0.5, INF, 1_500_000),
        "antmaze": ("modern", 5, 0.0, 0.1, 1.0, 2_000_000),
        "locomotion": ("modern", 5, 0.5, 0.5, INF, 2_000_000),
        "locomotion-0.1": ("modern", 10, 0.5, 1.5, INF, 2_000_000),
    }.items():
        args = awac.Args(preset=preset)
        ours = args.architecture, args.num_critics, args.pessimism, args.beta, args.max_advantage, args.num_updates
        assert ours == expected, preset
    assert awac.Args(preset="antmaze", max_advantage=INF).max_advantage == INF
    args = awac.Args()
    assert (args.batch_size, args.learning_rate, args.gamma, args.polyak) == (512, 3e-4, 0.99, 0.005)
    assert (args.policy_std, args.noise_clip, args.eval_samples, args.reward_transform) == (0.2, 0.3, 50, "auto")


# ---------------------------------------------------------------------------------------------------------------------
# The online stage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run of two seeds, offline and online; and what its updates, in both stages, have been given."""
    run_dir, update, seen = tmp_path_factory.mktemp("online") / "run", awac.update, []

    def recorder(agent, batch, *rest):
        seen.append(batch.clone())
        return update(agent, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awac, "update", recorder)
        call_main(patch, "--dataset", data, *ONLINE, "--run-dir", run_dir)
    return run_dir, seen


def test_online_steps_are_logged_as_the_environment_gives_them(unbroken):
    """Each seed's rows, played again in a fresh environment: states, rewards less 1, true ends, fresh starts."""
    run_dir, _ = unbroken
    online = checkpoint_of(run_dir)["online"]
    rows, ends = online["rows"].numpy(), online["ends"].numpy()
    assert rows.shape == (2, 170, 11 + 3 + 1 + 11 + 1) and (ends == 1).sum() >= 2 and (ends == 2).sum() >= 2
    assert checkpoint_of(run_dir)["num_updates"] == 300
    for s in range(2):
        env, number = gym.make("Hopper-v5", max_episode_steps=TIME_LIMIT), 0
        obs = env.reset(seed=awac.episode_seed(3 + s, 0, 0, 1))[0]
        for row, end in zip(rows[s], ends[s]):
            np.testing.assert_array_equal(row[:11], np.float32(obs))
            obs, reward, terminated, truncated, _ = env.step(row[11:14])
            np.testing.assert_array_equal(row[15:26], np.float32(obs))
            assert row[14] == np.float32(np.float32(reward) - 1) and row[26] == (not terminated)
            assert end == (1 if terminated else 2 if truncated else 0) and np.abs(row[11:14]).max() <= 1
            if end:
                number += 1
                obs = env.reset(seed=awac.episode_seed(3 + s, 0, number, 1))[0]
        env.close()
    assert not np.array_equal(rows[0, :5], rows[1, :5])


def test_online_batches_are_uniform_over_the_data_and_own_steps(unbroken, data):
    """Update by update: rows of the dataset or of the seed's own steps so far, never of another seed's or from later;
    and as many of these as their share of all."""
    run_dir, seen = unbroken
    rows, N = checkpoint_of(run_dir)["online"]["rows"], len(awac.load_dataset([str(data)]).transitions)
    assert len(seen) == 300
    own = [{row.numpy().tobytes(): t for t, row in enumerate(rows[s])} for s in range(2)]
    share, expected, newest = 0, 0, 0
    for t, batch in enumerate(seen[130:], 1):
        for s in range(2):
            steps = [own[s].get(row.numpy().tobytes()) for row in batch[s]]
            assert all(step is None or step < t for step in steps)
            assert not any(row.numpy().tobytes() in own[1 - s] for row in batch[s])
            share, expected = share + sum(step is not None for step in steps), expected + 16 * t / (N + t)
            newest += steps.count(t - 1)
    assert newest and abs(share - expected) < 4 * math.sqrt(expected), (newest, share, expected)
    assert not any(row.numpy().tobytes() in own[0] for batch in seen[:130] for row in batch[0])


def test_curves_go_on_along_the_updates(unbroken):
    """Evaluations every 110 updates of both stages, at the end of each; the returns of online episodes in between."""
    run_dir, _ = unbroken
    for name in ("evaluations.csv", "evaluations_m3.csv"):
        updates = np.loadtxt(run_dir / name, delimiter=",", skiprows=1)[:, 0]
        assert sorted(set(updates)) == [110, 130, 220, 300]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir))
    events.Reload()
    ends = checkpoint_of(run_dir)["online"]["ends"]
    for s in range(2):
        steps = [e.step for e in events.Scalars(f"train/return_seed{3 + s}")]
        assert steps == (131 + ends[s].nonzero().flatten()).tolist()


def test_a_seed_alone_does_the_same(run_main, data, unbroken, tmp_path):
    """Seed 4 as a run of its own: the same own steps, up to rounding, for a while, and the same first ones exactly."""
    flags = [*ONLINE]
    flags[flags.index("--num-seeds") + 1], flags[flags.index("--seed") + 1] = 1, 4
    flags[flags.index("--online-steps") + 1], flags[flags.index("--eval-episodes") + 1] = 30, 0
    run_main("--dataset", data, *flags, "--run-dir", tmp_path / "run")
    ours, theirs = checkpoint_of(tmp_path / "run")["online"]["rows"][0], checkpoint_of(unbroken[0])["online"]["rows"][1]
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=1e-2, atol=1e-2)
    assert torch.equal(ours[0, :11], theirs[0, :11])


def test_killed_in_the_online_stage_and_resumed(run_main, data, unbroken, tmp_path):
    """kill -9 after a checkpoint within an online episode, --resume: the episode is played again, and the run ends like
    one that never stopped, bit by bit."""
    victim = tmp_path / "victim"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = harness.command("awac", "--dataset", data, *ONLINE, "--run-dir", victim)
    process, t, deadline = subprocess.Popen(command, env=env, **pipes), 0, time.time() + 120
    while t == 0:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        if (victim / "checkpoint.pt").exists():
            t = checkpoint_of(victim)["online"]["rows"].shape[1]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    stopped = checkpoint_of(victim)["online"]["ends"]
    assert 0 < stopped.shape[1] < 170, "the run was over before it could be killed: make it longer"
    run_main("--resume", victim)
    assert differences(victim, unbroken[0]) == set()


def test_offline_first_online_later(run_main, data, unbroken, capsys, tmp_path):
    """A finished offline run goes on online and ends like one that was asked for both; --evaluate and a longer offline
    stage, which is too late."""
    run_dir, flags = tmp_path / "run", [*ONLINE]
    flags[flags.index("--online-steps") + 1] = 0
    run_main("--dataset", data, *flags, "--run-dir", run_dir)
    assert checkpoint_of(run_dir)["num_updates"] == 130
    run_main("--resume", run_dir, "--online-steps", 170)
    assert differences(run_dir, unbroken[0]) == set()
    for more in ("--num-updates", 500), ("--num-updates", 100), ("--online-steps", 100):
        with pytest.raises(SystemExit) as ended:
            run_main("--resume", run_dir, *more)
        assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {run_dir} has 130 offline updates")
    assert differences(run_dir, unbroken[0]) == set()
    run_main("--evaluate", unbroken[0])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "the policy's mean action", "seed 3", "seed 4", "the best of 3 samples, by Q_bar", "seed 3", "seed 4"
    ]  # fmt: skip


def test_online_needs_an_environment(run_main, capsys, tmp_path):
    folder = harness.write_minari(tmp_path / "m", harness.hopper_episodes(), env_spec=None)
    flags = "--eval-episodes", 0, "--online-steps", 10, "--run-dir", tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        run_main("--dataset", folder, *SMALL, *flags)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: the dataset names no environment")
    assert not (tmp_path / "run").exists()




needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("flags", [{}, {"architecture": "modern", "hidden_sizes": (16,) * 3}])
def test_captured_updates_equal_eager_ones(flags):
    """CUDA graphs of ten updates, replayed, give what as many eager updates give."""
    args, generator = make_args(num_seeds=2, learning_rate=1e-3, **flags), torch.Generator().manual_seed(2)
    transitions = make_transitions(500).cuda()
    draws = [torch.randint(500, (60, 2, 32), generator=generator).cuda()]
    draws += [torch.randn(60, 2, 32, A, generator=generator).cuda() for _ in range(2)]
    agents = [make_agent(args, device="cuda") for _ in range(2)]
    learn = [partial(awac.run_updates, agent, transitions, args) for agent in agents]
    before = {name: x.clone() for name, x in agents[0].state_dict().items()}
    graph = awac.cuda_graph(learn[0], agents[0], *(x[:10] for x in draws))
    assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
    for i in range(0, 60, 10):
        captured, eager = (f(*(x[i : i + 10] for x in draws)) for f in (graph, learn[1]))
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-4)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-2, atol=1e-3)


@needs_gpu
def test_an_online_run_on_a_gpu_ends_as_one_without_graphs(run_main, data, monkeypatch, tmp_path):
    flags = [*ONLINE]
    flags[flags.index("--online-steps") + 1], flags[flags.index("--device") + 1] = 10, "cuda"
    run_main("--dataset", data, *flags, "--run-dir", tmp_path / "graphs")
    monkeypatch.setattr(awac, "cuda_graph", lambda step, agent, *inputs: step)
    run_main("--dataset", data, *flags, "--run-dir", tmp_path / "eager")
    ours, theirs = (checkpoint_of(tmp_path / name)["agent"] for name in ("graphs", "eager"))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-2, atol=1e-2)
