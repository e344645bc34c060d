"""The offline scripts side by side: what main() makes of data before an update sees it, random numbers, and
whether they learn what cloning does not. What is one script's own is tested in that script's file."""

import math

import harness
import numpy as np
import pytest
import torch
from torch.distributions import Normal

NO_REFERENCES = (math.nan, math.nan)


# Inputs of updates --------------------------------------------------------------------------------
# Of each script its transformations of rewards, as factor and shift, and how far actions may go. asac.py and
# rvs_lds.py have tests of their own, awac.py and bcq.py in test_stages.py
TRANSFORMS = {
    "dered_iql": ({"scale": (500, 0), "shift": (1, -1), "none": (1, 0)}, 1 - 1e-5),
    "iql_red": ({"scale": (500, 0), "shift": (1, -1), "none": (1, 0)}, 1 - 1e-5),
    "cql_red": ({"none": (1, 0), "stretch": (10, -5)}, 0.999),
    "td3_bc_red": ({"none": (1, 0), "shift": (1, -1)}, 1),
    "crr_red": ({"none": (1, 0), "shift": (1, -1)}, 1),
    "iql_scaled": ({"none": (1, 0), "shift": (1, -1)}, 1),
    "td3_bc_scaled": ({"none": (1, 0), "shift": (1, -1)}, 1),
}
OWN = {"crr_red": "--sampler red --target-period 7".split(), "dered_iql": []}  # flags
CASES = [(script, name) for script, (transforms, _) in TRANSFORMS.items() for name in transforms]
PERIODS = {"crr_red": {"copied": 7}, "td3_bc_red": {"actor_turn": 2}}  # of what happens in some updates only


@pytest.mark.parametrize("script, transform", CASES)
def test_what_the_learner_sees(script, transform):
    """Rewards transformed, actions clipped, the rest as logged; ReD, which DeReD begins after 20 updates, ranks
    by returns as logged. Every update has noise of its own, which is normal."""
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, 63, 4)).astype(np.float32)
    obs[:, 0] = np.arange(63)  # numbers of transitions
    reward = np.arange(63, dtype=np.uint8)[::-1]
    action = rng.choice([-1.0, -0.3, 0.5, 1.0], (63, 2))
    terminated = rng.random(63) < 0.25
    returns, lengths = np.array([-1, 1, -0.5, 0]), np.array([3, 40, 8, 12])
    columns = obs, action, reward, next_obs, terminated
    data = harness.load(script).Data(*columns, returns, lengths, None, NO_REFERENCES)
    flags = "--hidden-sizes 8 --num-seeds 2 --batch-size 64 --reward-transform", transform
    flags = *" ".join(flags).split(), *harness.length(script, 80, 20), *OWN.get(script, ["--sampler", "red"])
    inputs, _ = harness.run_on(script, data, *flags)
    for name, period in PERIODS.get(script, {}).items():
        assert inputs[name].tolist() == [n % period == 0 for n in range(1, 81)]

    inputs = {name: x[20:] for name, x in inputs.items()}
    transforms, bound = TRANSFORMS[script]
    factor, shift = transforms[transform]
    i = inputs["obs"][..., 0].astype(int)
    np.testing.assert_array_equal(inputs["obs"], obs[i])
    np.testing.assert_allclose(inputs["action"], action.clip(-bound, bound)[i], rtol=1e-6)
    np.testing.assert_allclose(inputs["reward"], factor * (62 - obs[i, 0]) + shift, rtol=1e-6)
    np.testing.assert_array_equal(inputs["next_obs"], next_obs[i])
    np.testing.assert_array_equal(inputs["not_terminated"], 1 - terminated[i])
    P = np.repeat(returns + 1, lengths) / ((returns + 1) @ lengths)
    share = np.bincount(i.ravel(), minlength=63) / i.size
    assert np.all(np.abs(share - P) <= 5 * np.sqrt(P * (1 - P) / i.size))  # five sigma, none of P = 0
    if "noise" in inputs:
        noise = inputs["noise"]
        assert len(np.unique(noise)) > 0.99 * noise.size
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


# Random numbers -----------------------------------------------------------------------------------
EVEN = np.full(10**6, 1e-6)
DRAWS = {
    "iql_red": lambda script, seeds, step: [script.Sampler(EVEN, "cpu").draw(seeds, step, 64)],
    "cql_red": lambda script, seeds, step: [script.draw_noise(seeds, step, (50, 2), "cpu")],
    "awac": lambda script, seeds, step: script.draw_uniforms_and_noise(seeds, 8, (50, 2), "cpu", step),
    "asac": lambda script, seeds, step: script.draw_numbers(seeds, step, 8, 2, 2, "cpu"),
    "sac": lambda script, seeds, step: script.draw_chunk(tuple(seeds), 1, step // 20, 8, (9, 2), "cpu"),
}


@pytest.mark.parametrize("script", DRAWS)
def test_numbers_are_a_function_of_seed_and_update(script):
    """Neighbours, earlier draws and global generators have no say, and no two are alike. Uniform numbers are
    float64, noise is normal."""
    seen = []
    for step in (0, 20, 40):  # as far apart as the seeds, lest a sum of both goes unseen
        together = DRAWS[script](harness.load(script), (0, 20, 40), step)  # (CHUNK, S, ...) each
        for s, seed in enumerate((0, 20, 40)):
            torch.manual_seed(seed)
            np.random.seed(seed)
            alone = DRAWS[script](harness.load(script), [seed], step)
            assert all(torch.equal(x[:, s], y[:, 0]) for x, y in zip(together, alone))
        seen.append(together)
    for numbers in zip(*seen):
        x = torch.stack(numbers).flatten().sort().values
        assert len(x.unique()) > 0.98 * len(x)
        cumulative = x / (1 if x.max() < 1 else 10**6)
        if x.min() < 0:
            cumulative = Normal(0, 1).cdf(x)
        distance = (cumulative - torch.linspace(0, 1, len(x))).abs().max()  # Kolmogorov and Smirnov's
        assert distance < 1.95 / math.sqrt(len(x))  # more has probability 0.001
        assert x.dtype != torch.float64 or (x.float() != x).float().mean() > 0.9


# Learning -----------------------------------------------------------------------------------------
SCALED = "--target-update-rate 0.1 --learning-rate 5e-3 --eval-samples 1 --num-updates 300 --batch-size 128"
# Flags with which a script learns, and those by which each time it does not
LEARNERS = {
    "iql_red": (
        "--sampler uniform --learning-rate 0.005 --target-update-rate 0.1 --expectile 0.9 --num-updates 300",
        ["--beta=0", "--beta=-3", "--gamma=0"],
    ),
    "td3_bc_red": (
        "--sampler uniform --learning-rate 5e-3 --target-update-rate 0.1 --num-updates 300",
        ["--bc-alpha=0", "--gamma=0"],
    ),
    "crr_red": (
        "--sampler uniform --learning-rate 5e-3 --beta 0.5 --target-period 20 --num-updates 300",
        ["--beta=1e9", "--gamma=0"],
    ),
    "asac": (f"{SCALED} --beta 0.5", ["--beta=1e9", "--beta=-0.5", "--gamma=0"]),
    "iql_scaled": (f"{SCALED} --beta 0.5 --expectile 0.9", ["--beta=1e9", "--beta=-0.5", "--gamma=0"]),
    "td3_bc_scaled": (SCALED, ["--bc-coef=1e3", "--gamma=0"]),
    "awac": (f"{SCALED} --beta 0.5", ["--beta=1e9", "--beta=-0.5", "--gamma=0"]),
}


def four_states(script):
    """3,000 transitions of a chain whose end pays 5, while a step (an action above 0) costs 0.1. Most of the
    data quits, for 0.5 at once."""
    rng = np.random.default_rng(0)
    state = rng.integers(4, size=3000)
    go = rng.random(3000) < 0.3
    action = np.where(go, 0.5, -0.5) + 0.1 * rng.normal(size=3000)
    reward = np.where(go, np.where(state == 3, 5, -0.1), 0.5)
    terminated = ~go | (state == 3)
    next_state = np.where(terminated, 3, state + 1)  # ends look like the best state, lest anyone bootstrap
    columns = np.eye(4)[state], action[:, None], reward, np.eye(4)[next_state], terminated
    episodes = np.array([0.0, 1.0]), np.array([2000, 1000])
    return harness.load(script).Data(*columns, *episodes, None, NO_REFERENCES)


@pytest.mark.parametrize("script, wrong", [(x, flag) for x in LEARNERS for flag in [None, *LEARNERS[x][1]]])
def test_a_chain_of_four_states(script, wrong):
    """Who clones the data quits, and so does who flips the advantage, or sees the next reward only. The policy
    that a script evaluates goes on in all four states."""
    flags = "--reward-transform none --num-seeds 3 --hidden-sizes 16 16", LEARNERS[script][0], wrong or ""
    _, policy = harness.run_on(script, four_states(script), *" ".join(flags).split())
    states = torch.eye(4)[:, None, None].expand(4, 3, 1, 4)
    goes_on = torch.stack([policy(state) > 0 for state in states])  # (states, S, 1, 1)
    assert not goes_on[:3].any() if wrong else goes_on.all()
