"""rem_online_atari.py where it differs from dqn_atari.py: mixtures, loss, how episodes are played.

test_dqn_atari.py has the games, the replay memory and the files, which are the same text (test_copies.py).
"""

import harness
import numpy as np
import pytest
import torch
from old_atari_helpers import BLIND, CPU, SMALL, A, checkpoint_of, differences, make_batch, play_main

rem = harness.load("rem_online_atari")
dqn = harness.load("dqn_atari")

both_agents = pytest.mark.parametrize("agent", ["rem", "bootstrapped"])


def make_args(module=rem, **flags):
    return module.Args(**{"channels": (2, 3, 4), "hidden_size": 8, "padding": "valid", "batch_size": 4, **flags})


@pytest.fixture
def run_main(monkeypatch):
    return lambda *flags: play_main(monkeypatch, rem, *flags)




# ---------------------------------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------------------------------


def test_mixtures_of_rem():
    """Normalised uniforms: they sum to 1, and of two the first is below 1/4 with probability 1/6, not 1/4 (13.1)."""
    args = make_args(num_networks=2)
    u = torch.rand(60_000, 2, generator=torch.Generator().manual_seed(0))
    to_learn, to_act = rem.mixtures_to_learn(u, args), rem.mixture_to_act(u, args)
    assert to_learn.shape == (60_000, 2, 1)
    for alpha in to_learn[..., 0], to_act:
        torch.testing.assert_close(alpha.sum(-1), torch.ones(60_000))
        assert (alpha[:, 0] < 0.25).float().mean().item() == pytest.approx(1 / 6, abs=0.01)
    assert torch.equal(rem.mixture_to_act(torch.zeros(3), make_args()), torch.full((3,), 1 / 3))


def test_mixtures_of_bootstrapped_dqn():
    """Every network learns by itself; one of them plays, each as often as the others."""
    args = make_args(agent="bootstrapped", num_networks=3)
    u = torch.rand(6_000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rem.mixtures_to_learn(u[:2], args), torch.eye(3).expand(2, 3, 3))
    chosen = rem.mixture_to_act(u, args)
    assert set(chosen.unique().tolist()) == {0.0, 1.0} and (chosen.sum(-1) == 1).all()
    np.testing.assert_allclose(chosen.mean(0), 1 / 3, atol=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def numpy_loss(values, next_values, batch, mixtures, gamma):
    """Loss of one seed and its gradient by the biases of the last layer (K, A), one transition and mixture at a time.

    values, next_values: (B, A, K) of the networks and of their targets; mixtures: list of (K,).
    """
    _, action, reward, _, not_terminal = batch
    loss, gradient = 0, np.zeros(values.shape[:0:-1])
    for b, a in enumerate(action):
        for alpha in mixtures:
            next_q = max(sum(alpha[k] * next_values[b, i, k] for k in range(len(alpha))) for i in range(A))
            error = sum(alpha * values[b, a]) - (reward[b] + gamma * not_terminal[b] * next_q)
            loss += error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5
            gradient[:, a] += alpha * np.clip(error, -1, 1)
    n = len(action) * len(mixtures)
    return loss / n, gradient / n


@both_agents
def test_update_against_numpy(agent):
    """Loss and gradient of two seeds with mixtures of their own: the mixture is taken before the maximum, and is the
    same on both sides; then Adam moves the networks, and nothing moves their targets."""
    args = make_args(agent=agent, num_seeds=2, num_networks=3, gamma=0.9)
    agents = rem.MultiNetworkAgent(A, args, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*agents.network.parameters(), *agents.target_network.parameters()]:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    batch = make_batch(S=2, B=8)
    batch[2].mul_(2)  # errors on both sides of 1
    mixtures = rem.mixtures_to_learn(torch.rand(2, 3, generator=generator), args)
    adam, gradient, targets = agents.optimizers["network"], [], [p.clone() for p in agents.target_network.parameters()]
    minimize, before = adam.minimize, [p.detach().clone() for p in agents.network.parameters()]

    def spy(loss):
        gradient.append(torch.autograd.grad(loss, agents.network.bias4, retain_graph=True)[0])
        minimize(loss)

    adam.minimize = spy
    with torch.no_grad():
        values, next_values = agents.network(batch[0]).numpy(), agents.target_network(batch[3]).numpy()
    metrics = rem.update(agents, batch, mixtures, args)
    for s in range(2):
        of_seed = values[s], next_values[s], [x[s].numpy() for x in batch], mixtures[s].T.numpy(), 0.9
        loss, by_bias = numpy_loss(*of_seed)
        assert metrics["loss/td"][s].item() == pytest.approx(loss, rel=1e-4)
        np.testing.assert_allclose(gradient[0][s].reshape(by_bias.shape), by_bias, rtol=1e-3, atol=1e-6)
    assert not any(torch.equal(p, old) for p, old in zip(agents.network.parameters(), before))
    assert all(map(torch.equal, agents.target_network.parameters(), targets))




def test_networks_are_separate():
    """(S, B, A, K): first weights all differ, and moving network 1 of seed 0 changes its own values only."""
    agents = rem.MultiNetworkAgent(A, make_args(num_seeds=2, num_networks=3), CPU)
    weights = agents.network.weight0.flatten(0, 1)
    assert len({w.sum().item() for w in weights}) == 6
    frames = make_batch(S=2)[0]
    with torch.no_grad():
        before = agents.network(frames)
        agents.network.weight2[0, 1] += 1
        changed = (agents.network(frames) != before).any(1).any(1)  # (S, K)
    assert before.shape == (2, 4, A, 3)
    assert changed.tolist() == [[False, True, False], [False, False, False]]
    assert torch.equal(agents.network.act(frames), agents.network(frames).mean(-1).argmax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, on games that keep a log of their own
# ---------------------------------------------------------------------------------------------------------------------


@both_agents
def test_an_episode_has_one_mixture(run_main, monkeypatch, agent, tmp_path):
    """Network k is made to want action k: an episode repeats one action, the next ones other actions."""

    def forward(self, frames):
        assert self.weight0.requires_grad  # the networks that learn, not their targets
        return torch.eye(A).expand(*frames.shape[:2], A, A)

    monkeypatch.setattr(rem.NatureNetworks, "forward", forward)
    flags = "--learning-starts", 1, "--epsilon-steps", 1, "--epsilon", 0, "--update-every", 10**6, "--num-envs", 3
    games = run_main(*BLIND, *flags, "--agent", agent, "--num-steps", 900, "--run-dir", tmp_path / "run")
    for episodes in games.episodes:
        chosen = [{action for _, action, _ in steps} for steps in episodes[2:]]  # the first ones began at random
        assert {len(actions) for actions in chosen[:-1]} == {1}
        assert set.union(*chosen) == set(range(A))
    assert len({tuple(action for _, action, _ in sum(episodes[2:], []))[:60] for episodes in games.episodes}) == 3


def test_every_update_has_its_own_mixture(run_main, monkeypatch, tmp_path):
    """Through main(): each seed's, positive and of sum 1; targets are copied after every third update."""
    mixtures, copied = [], []
    update, synchronize = rem.update, rem.synchronize
    monkeypatch.setattr(rem, "update", lambda *inputs: mixtures.append(inputs[2].clone()) or update(*inputs))
    monkeypatch.setattr(rem, "synchronize", lambda agent: copied.append(len(mixtures)) or synchronize(agent))
    flags = "--num-seeds", 2, "--num-steps", 60, "--learning-starts", 20, "--target-every", 3
    run_main(*BLIND, *flags, "--run-dir", tmp_path / "run")
    drawn = torch.stack(mixtures)
    assert drawn.shape == (10, 2, 4, 1) and (drawn > 0).all() and copied == [3, 6, 9]
    torch.testing.assert_close(drawn.sum(2), torch.ones(10, 2, 1))
    assert len({alpha.numpy().tobytes() for alpha in drawn.flatten(0, 1)}) == 20


def test_seed_k_among_two_is_the_run_with_seed_k(run_main, tmp_path):
    """Through main(): the same games, mixtures and random actions, and the same agents after 50 updates."""
    flags = *BLIND, "--num-steps", 230, "--learning-starts", 30, "--num-envs", 2, "--epsilon", 1, "--target-every", 20
    run_main(*flags, "--seed", 3, "--num-seeds", 2, "--run-dir", tmp_path / "together")
    run_main(*flags, "--seed", 4, "--run-dir", tmp_path / "alone")
    together, alone = (checkpoint_of(tmp_path / name) for name in ("together", "alone"))
    assert together["num_updates"] == 50 == alone["num_updates"]
    assert torch.equal(together["mixture"][1], alone["mixture"][0])
    for name, rows in together["memory"].items():
        assert torch.equal(rows[1], alone["memory"][name][0]), name
    for name, x in alone["agent"].items():
        if not name.startswith("optimizers"):
            torch.testing.assert_close(together["agent"][name][1], x[0], rtol=1e-3, atol=1e-5)
    assert not torch.equal(together["mixture"][0], together["mixture"][1])


def test_resume(run_main, tmp_path):
    """A run that goes on in the middle of episodes, with their mixtures, ends as one that was never stopped."""
    flags = *SMALL, "--num-envs", 2, "--learning-starts", 20, "--epsilon-steps", 40, "--replay-size", 60
    flags += "--eval-every", 50, "--eval-episodes", 2, "--target-every", 5
    run_main(*flags, "--num-steps", 150, "--run-dir", tmp_path / "whole")
    run_main(*flags, "--num-steps", 100, "--run-dir", tmp_path / "parts")
    run_main("--resume", tmp_path / "parts", "--num-steps", 150)
    assert differences(checkpoint_of(tmp_path / "parts"), checkpoint_of(tmp_path / "whole")) == []
    ours, theirs = (tmp_path / name / "evaluations.csv" for name in ("parts", "whole"))
    assert ours.read_text() == theirs.read_text()


@pytest.mark.parametrize("flags", [("--num-networks", 0), ("--agent", "dqn"), ("--optimizer", "adam")])
def test_flags_out_of_range(run_main, capsys, flags, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_main(*BLIND, "--num-steps", 20, *flags, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and flags[0].strip("-") in error
    assert not (tmp_path / "run").exists()
