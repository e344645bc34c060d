"""The mathematics of rvs_lds.py against what shares no code with it: numbers worked by hand, whole updates in
float64, and a task in which only who asks for the right return gets it. Data is read as in iql_red.py."""

import copy
import math
import pickle

import gymnasium as gym
import h5py
import harness
import numpy as np
import pytest
import torch
from reference import Learner, check_updates, randomize

rvs = harness.load("rvs_lds")

OBS_DIM = 5  # the condition included
ACTION_DIM = 2


def make_args(**flags):
    return rvs.Args(**{"hidden_sizes": (16, 12), "batch_size": 32, "device": "cpu", **flags})


def make_agent(args, size=0.0):
    """An agent of random numbers of this size."""
    obs = np.random.default_rng(3).normal(1, 2, size=(100, OBS_DIM))
    agent = rvs.Agent(obs, ACTION_DIM, args)
    randomize(agent, size)
    return agent


def make_batch(args, B=32, seed=0):
    """Random obs, action, weight, kept."""
    rng = np.random.default_rng(seed)
    S = args.num_seeds
    obs = rng.normal(1, 2, size=(S, B, OBS_DIM))
    action = rng.uniform(-1, 1, size=(S, B, ACTION_DIM))
    weight = rng.uniform(0, 3, size=(S, B))
    kept = torch.from_numpy(rng.random((S, B, sum(args.hidden_sizes))) > args.dropout)
    return [*(torch.from_numpy(np.float32(x)) for x in (obs, action, weight)), kept]


def make_data(rewards, returns=None):
    """Data of episodes with these rewards; observations are the time, actions tell the transition."""
    returns = np.array(returns or [sum(x) for x in rewards])
    lengths = np.array([len(x) for x in rewards])
    t = np.concatenate([np.arange(len(x)) for x in rewards])
    obs = np.column_stack([t, -t]).astype(np.float32)
    action = np.linspace(-1, 1, len(t))[:, None].repeat(ACTION_DIM, axis=1)
    return rvs.Data(obs, action, np.concatenate(rewards), obs + 1, 0 * t, returns, lengths, None, (0, 1))


# Returns ------------------------------------------------------------------------------------------
def test_returns_to_go_by_hand():
    """They are the last number of observations. The last episode returned 2.5 more than its rewards: those of
    a step that left no transition."""
    data = make_data([[1.0, 2, 3], [-1.0], [9.0, 9], [1.0, 1]], [6, -1, 18, 4.5])
    G = rvs.returns_to_go(data)
    assert G.tolist() == [6, 5, 3, -1, 18, 9, 4.5, 3.5]
    seen = rvs.conditioned(data, 18, average=False)
    np.testing.assert_array_equal(seen.obs, np.column_stack([data.obs, G]))
    assert data.obs.shape == (8, 2) and seen.spec is None
    seen = rvs.conditioned(make_data([[1.0, 2, 3], [9.0] * 5]), 45, average=True)
    np.testing.assert_allclose(seen.obs[:, -1], [6 / 5, 5 / 4, 3 / 3, 9, 9, 9, 9, 9])


def test_a_last_step_without_transition_is_a_step_of_the_average(tmp_path):
    """A D4RL file without next_observations: of four steps that a timeout ended, three are transitions. All
    four rewards count, over 4, 3, 2 steps, and evaluations ask for a quarter of the return."""
    path = str(tmp_path / "log.hdf5")
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((7, 3), np.float32)
        file["actions"] = np.zeros((7, 1), np.float32)
        file["rewards"] = np.float32([1, 2, 3, 4, 5, 5, 5])
        file["timeouts"] = np.arange(7) == 3
        file["terminals"] = np.arange(7) == 6
    data = rvs.load_data(make_args(dataset=(path,), eval_episodes=0))
    assert data.lengths.tolist() == [3, 3] and data.returns.tolist() == [10, 15]
    seen = rvs.conditioned(data._replace(spec=gym.spec("Pendulum-v1")), 15, average=True)
    np.testing.assert_allclose(seen.obs[:, -1], [10 / 4, 9 / 3, 7 / 2, 15 / 4, 10 / 3, 5 / 2], rtol=1e-6)
    (wrapper,) = seen.spec.additional_wrappers
    assert wrapper.kwargs == {"target_return": 15.0, "horizon": 4}
    assert gym.spec("Pendulum-v1").additional_wrappers == ()


# Asking -------------------------------------------------------------------------------------------
class Paying(gym.Env):
    """Pays 1, 2, 3, as arrays, and ends; the observation is the time."""

    observation_space = gym.spaces.Box(-5, 5, (1,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    seen = []

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.seen.append(action.item())
        self.t += 1
        return np.full(1, self.t, np.float32), np.array([float(self.t)]), self.t == 3, False, {}


gym.register("test/Paying-v0", Paying)


@pytest.mark.parametrize("horizon, conditions", [(None, [6, 5, 3]), (4, [1.5, 1.5, 1.5])])
def test_an_evaluation_asks(horizon, conditions):
    """Asked for 6, paid 1, 2, 3. run_episode, which knows nothing of it, shows every seed what is left."""
    spec = copy.deepcopy(gym.spec("test/Paying-v0"))
    spec.additional_wrappers += (rvs.ReturnToGo.wrapper_spec(target_return=6.0, horizon=horizon),)
    policy = torch.nn.Linear(2, 1, bias=False)  # acts a tenth of the last number
    policy.weight.data = torch.tensor([[0.0, 0.1]])
    Paying.seen.clear()
    rows = rvs.run_episode(pickle.dumps(policy), spec, (0, 12), None, range(2), 100, 0)
    assert rows[:, 3:].tolist() == [[6, 3, 50]] * 2
    assert Paying.seen == pytest.approx(np.repeat(conditions, 2) / 10 * 2)  # scaled to [-2, 2]


# LDS ----------------------------------------------------------------------------------------------
def lds_kernel(size, sigma):
    """The LDS code's: an impulse, reflected at the ends, under a Gaussian that stops at 4 sigma."""
    impulse = np.zeros(size)
    impulse[size // 2] = 1
    reach = int(4 * sigma + 0.5)
    padded = np.pad(impulse, reach, mode="symmetric")
    gaussian = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]
    return np.array([np.dot(gaussian, padded[i : i + 2 * reach + 1]) for i in range(size)])


@pytest.mark.parametrize("num_bins, size, sigma", [(100, 5, 2), (37, 9, 1), (3, 7, 2), (20, 21, 3), (5, 1, 2)])
def test_lds_weights_against_a_plain_convolution(num_bins, size, sigma):
    """On a long tail with empty bins: bins by their edges, sums over the window by a loop. A kernel without a
    middle is refused."""
    with pytest.raises(SystemExit, match="^error: "):
        make_args(kernel_size=4)
    y = np.random.default_rng(0).lognormal(3, 1.5, size=500)
    edges = np.linspace(y.min(), y.max(), num_bins + 1)
    bins = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    kernel = lds_kernel(size, sigma)
    density = np.zeros(num_bins)
    for b, j in np.ndindex(num_bins, size):
        if 0 <= b + j - size // 2 < num_bins:
            density[b] += kernel[j] * counts[b + j - size // 2]
    expected = 1 / density[bins] / np.mean(1 / density[bins])
    np.testing.assert_allclose(rvs.lds_weights(y, num_bins, size, sigma), expected, rtol=1e-9)


@pytest.mark.parametrize("y", [[3.0], [7.0] * 50, [0, 0, 1e9], [-1e-300, 0, 1e-300], [0] * 10**5 + [1]])
def test_lds_weights_of_degenerate_returns(y):
    weight = rvs.lds_weights(np.array(y), 100, 5, 2.0)
    assert np.isfinite(weight).all() and weight.min() > 0 and weight.mean() == pytest.approx(1)
    assert np.all(weight == 1) or np.ptp(y) > 0


# Draws --------------------------------------------------------------------------------------------
def test_sampling_probabilities():
    """Uniform, or only the episodes from the one on that the best tenth of the transitions begins in."""
    data = make_data([[0.01 * i] * 50 for i in range(20)])
    p = rvs.uniform_or_top10(data, make_args())
    assert p.tolist() == [1 / 1000] * 1000
    p = rvs.uniform_or_top10(data, make_args(sampler="top10"))
    assert p.tolist() == [0] * 900 + [1 / 100] * 100


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.99])
def test_units_that_dropout_leaves(dropout):
    """A share of them, each on its own; a seed's are not its neighbours' business; no two alike."""
    args = make_args(dropout=dropout)
    kept = rvs.draw_kept(range(4, 7), 40, args)
    assert kept.shape == (rvs.CHUNK, 3, 32, 28) and kept.dtype == torch.bool
    tolerance = 6 * math.sqrt(dropout * (1 - dropout) / kept.numel())
    assert abs((~kept).double().mean().item() - dropout) < tolerance
    assert torch.equal(kept[:, 1:2], rvs.draw_kept([5], 40, args))
    masks = [*kept.flatten(0, 1), *rvs.draw_kept([5], 60, args).flatten(0, 1)]
    assert len({x.numpy().tobytes() for x in masks}) == 4 * rvs.CHUNK
    x = kept.double() - kept.double().mean()
    for axis in (0, 1, 2, 3):  # neighbours in each direction have nothing in common
        assert abs((x * x.roll(1, axis)).mean().item()) < tolerance * math.sqrt(dropout * (1 - dropout))
    assert rvs.draw_kept([5], 40, make_args(dropout=0.0)).shape == (rvs.CHUNK, 1, 32, 0)


# Networks -----------------------------------------------------------------------------------------
def test_first_weights():
    """Orthogonal with gain sqrt(2), 0.01 at the output."""
    agent = rvs.Agent(np.zeros((9, OBS_DIM)), ACTION_DIM, make_args(num_seeds=3, layernorm=True))
    for weight, gain in zip(agent.actor.weights, (2**0.5, 2**0.5, 0.01)):
        for w in weight.detach():
            small = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), rtol=1e-4, atol=1e-5)
    assert all((x == 1).all() for x in agent.actor.gains)
    assert not any(x.any() for x in [*agent.actor.biases, *agent.actor.shifts, agent.actor.log_std])


def test_actions_are_means_without_dropout_within_the_box():
    args = make_args(dropout=0.5)
    agent = make_agent(args, size=0.5)
    obs = make_batch(args)[0]
    mean = agent.actor.mean(obs)
    assert torch.equal(agent.actor(obs), mean.clamp(-1, 1)) and mean.abs().max() > 1 > mean.abs().min()
    obs = np.random.default_rng(3).normal(1, 2, size=(100, OBS_DIM))
    normalised = agent.normalize(torch.from_numpy(np.float32(obs))).numpy()
    np.testing.assert_allclose(normalised, (obs - obs.mean(0)) / (obs.std(0) + 0.001), atol=1e-5)


# The update ---------------------------------------------------------------------------------------
class Reference(Learner):
    """One seed, written from the equations, with Adam by hand."""

    def __init__(self, agent, s, args):
        super().__init__(agent, s, args)
        self.mean, self.std = agent.normalize.mean, agent.normalize.std
        self.net = {name: x[s].detach().clone() for name, x in agent.actor.named_parameters()}

    def update(self, obs, action, weight, kept):
        args = self.args
        net = {name: x.requires_grad_() for name, x in self.net.items()}
        x = (obs - self.mean) / self.std
        for i, units in enumerate(kept.split(args.hidden_sizes, 1)):
            x = x @ net[f"weights.{i}"] + net[f"biases.{i}"]
            if args.layernorm:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                x = x * net[f"gains.{i}"] + net[f"shifts.{i}"]
            x = torch.where(units, x.clamp(min=0) / (1 - args.dropout), 0)
        mean = x @ net["weights.2"] + net["biases.2"]
        std = net["log_std"].clamp(-5, 2).exp().expand_as(mean)
        log_prob = torch.distributions.Normal(mean, std).log_prob(action).sum(1)
        loss = -torch.mean(weight * log_prob)
        for x, gradient in zip(net.values(), torch.autograd.grad(loss, list(net.values()))):
            self.step(x, gradient + args.weight_decay * x.detach(), args.learning_rate)
        logs = {"loss/actor": loss, "loss/negative_log_likelihood": -log_prob, "policy/log_std": net["log_std"]}
        return {name: x.mean().item() for name, x in logs.items()}

    def assert_same(self, agent, s, atol):
        for name, x in agent.actor.named_parameters():
            torch.testing.assert_close(x[s], self.net[name], rtol=0, atol=atol)


@pytest.mark.parametrize("layernorm", [False, True])
def test_updates_against_float64(layernorm):
    """Four updates of two seeds, which do not mix: both losses, and all parameters."""
    flags = dict(layernorm=layernorm, weight_decay=0.25, learning_rate=2**-5)
    args = make_args(num_seeds=2, dropout=0.5, **flags)
    agent = make_agent(args, size=0.6).double()
    agent.actor.log_std.data[0, 0] = torch.tensor([2.5, -0.5])  # one beyond its bound
    agent.optimizers["actor"].param_groups[0]["eps"] = 1  # with 1e-8, steps do not tell a mean from a sum
    references = [Reference(agent, s, args) for s in range(2)]
    batches = []
    for n in range(4):
        *batch, kept = make_batch(args, seed=n)
        batches.append([*(x.double() for x in batch), kept])
    check_updates(rvs, agent, references, batches, args)


@pytest.mark.parametrize("condition, weighting", [("return", "lds"), ("average", "none"), ("none", "lds")])
def test_what_update_gets(condition, weighting):
    """Logged steps: observation and condition, action, weight of the return-to-go; new masks each time."""
    data = make_data([np.arange(1.0, n) for n in (4, 7, 20)])
    flags = "--num-updates 40 --hidden-sizes 8 8 --condition", condition, "--weighting", weighting
    inputs, _ = harness.run_on("rvs_lds", data, *" ".join(flags).split())
    obs, action, weight, kept = inputs.values()
    i = np.rint((action[..., 0] + 1) / 2 * (len(data.obs) - 1)).astype(int)
    G = np.concatenate([np.cumsum(np.arange(n - 1.0, 0, -1))[::-1] for n in (4, 7, 20)])
    columns = {"return": [G], "average": [G / (19 - data.obs[:, 0])], "none": []}
    np.testing.assert_allclose(obs, np.column_stack([data.obs, *columns[condition]])[i], rtol=1e-6)
    weights = {"lds": rvs.lds_weights(G, 100, 5, 2.0), "none": np.ones(len(G))}
    np.testing.assert_allclose(weight, weights[weighting][i], rtol=1e-6)
    assert len({x.tobytes() for x in kept}) == 40 and abs(kept.mean() - 0.9) < 0.01


# Learning -----------------------------------------------------------------------------------------
BEHAVIOUR_CLONING = "--condition none --weighting none --run-dir bc"
MODULE = """
import gymnasium as gym, numpy as np
class Sign(gym.Env):
    observation_space = gym.spaces.Box(0, 1000, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.float32([999]), {}
    def step(self, action):
        return np.float32([999]), float(np.sign(action[0])), False, False, {}
gym.register("Sign-v0", Sign, max_episode_steps=10)
"""


def test_who_asks_for_more_gets_more(monkeypatch, tmp_path, capsys):
    """One episode in four acts 0.5 and is paid 1 a step, the others act -0.5 and are paid -1. Asked for the
    best, 10, the policy does what is paid; asked for -10, the contrary; cloning does what most did."""
    (tmp_path / "signs.py").write_text(MODULE)
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        good = np.arange(40) % 4 == 0
        action = np.where(good, 0.5, -0.5).repeat(10) + np.random.default_rng(0).normal(0, 0.05, size=400)
        for name in "observations", "next_observations":
            file[name] = np.full((400, 1), 999, np.float32)
        file["actions"] = np.float32(action)[:, None]
        file["rewards"] = np.sign(action)
        file["terminals"] = np.zeros(400, bool)
        file["timeouts"] = np.arange(400) % 10 == 9
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = "--dataset log.hdf5 --env-id signs:Sign-v0 --eval-episodes 1 --num-updates 200".split()
    flags += "--hidden-sizes 32 32 --batch-size 64 --learning-rate 0.005 --device cpu".split()
    done = harness.run("rvs_lds", *flags, "--run-dir", "rvs", PYTHONPATH=str(tmp_path))  # evaluates in other processes
    assert done.stdout.splitlines()[-1].startswith("return 10.0,"), done.stderr
    for other in "--evaluate rvs --target-return=-10".split(), flags + BEHAVIOUR_CLONING.split():
        harness.run_main("rvs_lds", *other)
        assert "return -10.0," in capsys.readouterr().out.splitlines()[-1]
