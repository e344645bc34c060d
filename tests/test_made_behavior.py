"""The mathematics of made_behavior.py against torch.distributions, integrals over grids, and awac.py."""

import json
import math
import sys
from dataclasses import asdict

import harness
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch.distributions import Categorical, MixtureSameFamily, Normal, TanhTransform, TransformedDistribution

made = harness.load("made_behavior")
awac = harness.load("awac")

OBS_DIM = 3


def make_args(**flags):
    return made.Args(**{"hidden_sizes": (16, 8), "device": "cpu", **flags})


def make_model(A, **flags):
    """A float64 model whose densities have several bumps, none of them narrow."""
    model = made.Agent(OBS_DIM, A, make_args(num_components=4, **flags)).model.double().requires_grad_(False)
    for parameter in model.decoder[-1].parameters():
        parameter *= 4
    logits, mean, log_std = model.decoder[-1].biases[0].unflatten(-1, model.shape).unbind(-2)
    mean += torch.linspace(-1, 1, 4)
    log_std -= 1
    return model


def grid(A, n=250):
    """Actions (n**A, A) and the volume of each, even before tanh: fine where densities of a may be steep."""
    x = torch.linspace(-9, 9, n + 1, dtype=torch.float64)
    middles = torch.cartesian_prod(*[((x[1:] + x[:-1]) / 2).tanh()] * A).reshape(-1, A)
    return middles, torch.cartesian_prod(*[x.tanh().diff()] * A).reshape(-1, A).prod(-1)


def test_each_dimension_depends_on_those_before_it():
    """... and on the observation, the first one too; on nothing else."""
    model = make_model(A=4)
    obs = torch.randn(1, 1, OBS_DIM, dtype=torch.float64, requires_grad=True)
    action = torch.full((1, 1, 4), 0.3, dtype=torch.float64, requires_grad=True)
    for d in range(4):
        for x in model(obs, action):
            by_obs, by_action = torch.autograd.grad(x[..., d, :].sum(), [obs, action], retain_graph=True)
            assert by_obs.abs().min() > 0
            assert torch.equal(by_action[0, 0] != 0, torch.arange(4) < d)


def test_mixture_against_torch():
    generator = torch.Generator().manual_seed(0)
    logits, mean, std = torch.randn(3, 5, 2, 4, generator=generator, dtype=torch.float64)
    action = 2 * torch.rand(5, 2, generator=generator, dtype=torch.float64) - 1
    mixture = MixtureSameFamily(Categorical(logits=logits), Normal(mean, std.exp()))
    expected = TransformedDistribution(mixture, [TanhTransform()]).log_prob(action)
    torch.testing.assert_close(made.mixture_log_prob(action, logits, mean, std.exp()), expected)


def test_stds_have_bounds():
    zeros = torch.zeros(1, 1, OBS_DIM, dtype=torch.float64)
    for bias, bound in ((99, 2), (-99, -7)):
        model = make_model(A=OBS_DIM)
        model.decoder[-1].biases[0] += bias
        assert torch.all(model(zeros, zeros)[2].log() == bound)


@pytest.mark.parametrize("A", [1, 2])
def test_densities_integrate_to_one(A):
    model = make_model(A)
    action, volume = grid(A)
    for obs in (-1, 0, 1):
        total = model.log_prob(torch.full((1, 1, OBS_DIM), obs).double(), action[None]).exp() @ volume
        assert total.item() == pytest.approx(1, abs=1e-3)


def test_samples_have_the_density():
    """Cells of the first dimension, and of the second one given the first, get their shares of samples."""
    model = make_model(A=2)
    obs = torch.randn(1, 1, OBS_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    n = 60_000
    uniform = torch.rand(1, n, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (samples,) = model.sample(obs, uniform, noise)
    action, volume = grid(2)
    mass = model.log_prob(obs, action[None])[0].exp() * volume
    edges = [np.array([-1, -0.8, -0.4, -0.1, 0.2, 0.5, 0.8, 1])] * 2
    expected, *_ = np.histogram2d(*action.T.numpy(), edges, weights=mass.numpy())
    found, *_ = np.histogram2d(*samples.T.numpy(), edges)
    assert np.all(np.abs(found / n - expected) < 5 * np.sqrt(expected / n) + 0.005)  # 0.005: the grid's error
    assert found.max() < 0.3 * n and np.abs(samples).max() <= made.ACTION_BOUND


def test_two_modes_are_found():
    """Half of the actions are near (0.7, 0.7), half near (-0.7, -0.7), and the sign of s_0 says how near."""
    rng = np.random.default_rng(0)
    mode = rng.choice([-0.7, 0.7], size=(300, 128, 1))
    obs = rng.normal(size=(300, 128, OBS_DIM))
    width = np.where(obs[..., :1] > 0, 0.1, 0.02)
    batches = [mode + width * rng.normal(size=(300, 128, 2)), obs]
    action, obs = [torch.from_numpy(np.float32(x)).expand(2, -1, -1, -1) for x in batches]
    agent = made.Agent(OBS_DIM, 2, make_args(num_seeds=2, learning_rate=3e-3))
    for i in range(300):
        metrics = made.update(agent, obs[:, i], action[:, i].clamp(-0.999, 0.999))
    assert not metrics["loss/nats"].requires_grad
    sampled_obs = obs[:, :31].reshape(2, -1, OBS_DIM)
    noise = torch.from_numpy(np.float32(rng.normal(size=(2, sampled_obs.shape[1], 2))))
    samples = agent.model.sample(sampled_obs, torch.from_numpy(rng.random(noise.shape)), noise)
    for a in samples:
        up = a > 0
        assert up.float().mean().item() == pytest.approx(0.5, abs=0.1)
        assert (up[:, 0] == up[:, 1]).float().mean() > 0.98  # the second dimension follows the first
        assert (a.abs() - 0.7).abs().lt(0.35).float().mean() > 0.97
    distance = (samples.abs() - 0.7).abs()
    wide = sampled_obs[..., 0] > 0
    assert distance[wide].mean() > 2 * distance[~wide].mean()


def test_bits_by_hand():
    """A wide Gaussian that tanh squashes, of std 0.2: -log2 of what torch says, by dimension, in every chunk."""
    model = make_model(A=2, std=0.2, num_seeds=2)
    for parameter in model.decoder[-1].parameters():
        parameter *= 0
    action = torch.rand(12_345, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    transitions = torch.cat([torch.zeros(12_345, OBS_DIM), action], 1)
    log_prob = TransformedDistribution(Normal(torch.zeros(2), 0.2), [TanhTransform()]).log_prob(action)
    bits = made.bits_per_dimension(model, transitions, 2)
    torch.testing.assert_close(bits, (log_prob.mean() / math.log(2)).expand(2), rtol=1e-6, atol=0)


def test_episodes_are_held_out_whole():
    lengths = np.arange(1, 41)
    by_episode = np.split(made.held_out_transitions(lengths), np.cumsum(lengths)[:-1])
    held_out = [x.all() for x in by_episode]
    assert held_out == [x.any() for x in by_episode] and sum(held_out) == 6 > sum(held_out[:20])  # 15 % of 40
    with pytest.raises(SystemExit, match="one episode"):
        made.held_out_transitions(np.array([3]))


def test_draws():
    """... are of all candidates, and a function of seed and update, which are as far apart here."""
    candidates = np.array([3, 5, 8, 9])
    drawn = made.draw_transitions([0, 20, 40], 20, 500, candidates)
    assert np.unique(drawn).tolist() == candidates.tolist() and abs(drawn.double().mean() - 6.25) < 0.1
    assert torch.equal(drawn[:, 1], made.draw_transitions([20], 20, 500, candidates)[:, 0])
    for other in (drawn[:, 0], drawn[:, 2], made.draw_transitions([20], 40, 500, candidates)[:, 0]):
        assert (drawn[:, 1] == other).float().mean() < 0.3


def write_episodes(folder, highest=4):
    """A Minari folder of actions up to `highest` of 4, which s does not explain: soon learned by heart."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(12):
        obs = np.float32(rng.normal(size=(21, OBS_DIM)))
        action = np.float32(rng.uniform(0, highest, size=(20, 2)))
        episodes.append((obs, action, np.zeros(20), np.arange(20) == 19, np.arange(20) == 20))
    return harness.write_minari(folder, episodes, action_space=Box(0, 4, (2,), np.float32)), episodes


def run(monkeypatch, *flags):
    small = "--hidden-sizes 32 32 --batch-size 32 --learning-rate 0.01 --eval-every 20 --device cpu"
    monkeypatch.setattr(sys, "argv", ["made_behavior.py", *small.split(), *map(str, flags)])
    made.main()


def test_runs(monkeypatch, tmp_path, capsys):
    """The best of each seed is kept and restored, seeds never mix, and a stopped run goes on as it was."""
    data, _ = write_episodes(tmp_path / "data")
    flags = "--dataset", data, "--num-updates"
    run(monkeypatch, *flags, 120, "--num-seeds", 3, "--seed", 3, "--run-dir", tmp_path / "3")
    table = np.genfromtxt(tmp_path / "3" / "evaluations.csv", delimiter=",", names=True)
    bits = table["bits_per_dimension"].reshape(6, 3)
    assert table["update"][::3].tolist() == [20, 40, 60, 80, 100, 120] and table["seed"][:3].tolist() == [3, 4, 5]
    assert np.all(bits.argmax(0) < 5)  # later, it is learned by heart
    capsys.readouterr()
    run(monkeypatch, "--evaluate", tmp_path / "3")
    assert f"{bits.max(0).mean():.3f} bits" in capsys.readouterr().out

    run(monkeypatch, *flags, 120, "--seed", 4, "--run-dir", tmp_path / "4")
    run(monkeypatch, *flags, 60, "--seed", 4, "--run-dir", tmp_path / "part")
    run(monkeypatch, "--resume", tmp_path / "part", "--num-updates", 120)
    _, _, alone_bits = np.loadtxt(tmp_path / "4" / "evaluations.csv", delimiter=",", skiprows=1).T
    np.testing.assert_allclose(bits[:2, 1], alone_bits[:2], rtol=1e-4)  # later, rounding has grown
    files = [tmp_path / name / "checkpoint.pt" for name in ("4", "part")]
    alone, resumed = [torch.load(file, weights_only=True)["agent"] for file in files]
    assert all(torch.equal(resumed[name], x) for name, x in alone.items())
    assert (tmp_path / "part/evaluations.csv").read_text() == (tmp_path / "4/evaluations.csv").read_text()


def test_data(monkeypatch, tmp_path):
    """Actions by their bounds, episodes one after the other, a share of them; what fits nothing is refused."""
    load = lambda *names: made.load_actions(make_args(dataset=names))
    folder, episodes = write_episodes(tmp_path / "data")
    obs, action, lengths = load(str(folder))
    np.testing.assert_allclose(obs, np.concatenate([episode[0][:-1] for episode in episodes]))
    np.testing.assert_allclose(action, np.concatenate([episode[1] for episode in episodes]) / 2 - 1)
    assert lengths.tolist() == [20] * 12
    file = harness.write_d4rl(tmp_path / "log.hdf5", [(o, a / 2 - 1, *rest) for o, a, *rest in episodes])
    for x, y in zip(load(str(file)), (obs, action, lengths)):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert len(load(f"{folder}:0.5")[2]) == 6
    with pytest.raises(SystemExit, match="differ"):
        load(str(folder), "hopper/random-v0:0.01")
    outside, _ = write_episodes(tmp_path / "outside", highest=5)
    with pytest.raises(SystemExit, match="outside their bounds"):
        run(monkeypatch, "--dataset", outside, "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("clipped", [False, True])
def test_figure_3(tmp_path, capsys, clipped):
    """The target is pi_b exp(A / beta) / Z by integrals and by what awac.py computes, its first seed's."""
    flags = awac.Args(num_seeds=2, hidden_sizes=(8, 8), num_critics=3, pessimism=0.7, beta=0.05, device="cpu")
    agent = awac.Agent(OBS_DIM, 1, flags).requires_grad_(False)
    model = make_model(A=1, num_seeds=2).float()
    obs = torch.tensor([[[0.5, -1.0, 0.3]]])
    action, volume = grid(1, 4000)
    both = obs.expand(2, 4000, -1), action.float().expand(2, -1, -1)
    mean = agent.actor(obs.expand(2, -1, -1))
    noise = torch.randn(2, 20_000, 1, generator=torch.Generator().manual_seed(0))
    policy_action = agent.actor.sample(mean, noise)
    policy_q = awac.q_bar(agent.critic, obs.expand(2, 20_000, -1), policy_action, 0.7)
    advantage = (awac.q_bar(agent.critic, *both)[0] - policy_q[0].mean()).double()
    if clipped:
        flags.max_advantage = advantage.median().item()
    (tmp_path / "config.json").write_text(json.dumps({"args": asdict(flags)}))
    torch.save({"agent": agent.state_dict()}, tmp_path / "checkpoint.pt")

    made.figure_3(*made.sample_target(model, obs, make_args(awac=str(tmp_path))), tmp_path / "figure.csv")
    assert (tmp_path / "figure.svg").stat().st_size > 1000 and "of 100,000 samples" in capsys.readouterr().out
    table = np.genfromtxt(tmp_path / "figure.csv", delimiter=",", names=True)
    behavior = model.log_prob(*both)[0].double().exp() * volume
    target = behavior * (advantage.clamp(max=flags.max_advantage) / 0.05).exp()
    target /= target.sum()
    assert (target - behavior).abs().sum() > 0.2  # there is something to see
    edges = np.linspace(-1, 1, made.NUM_CELLS + 1)
    for name, mass in (("behavior", behavior), ("target", target)):
        expected, _ = np.histogram(action[:, 0], edges, weights=mass.numpy())
        np.testing.assert_allclose(table[name] * 0.04, expected, atol=0.004)
    for name, center, tolerance in (("projection", target @ action, 0.05), ("actor", mean[0, 0], 1e-4)):
        expected = Normal(center.item(), 0.2).log_prob(torch.from_numpy(table["action"])).exp()
        np.testing.assert_allclose(table[name], expected, atol=tolerance)
    flags.architecture = "modern"
    (tmp_path / "config.json").write_text(json.dumps({"args": asdict(flags)}))
    with pytest.raises(SystemExit, match="modern"):
        made.load_awac(tmp_path)
