"""bred.py: its three stages against numbers by hand, numpy and sac.py; what they hand on; runs stopped in each of them.

The critics' many actions, the samplers and the plumbing are the same text as in cql_red.py and are tested there.
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from old_helpers import LoggedEnv, NumpyCQL, backward, forward, is_termination, layers_of, tanh_normal

bred, sac = harness.load("bred"), harness.load("sac")

O, A = 4, 2  # noqa: E741  dimensions of the small agents below
CPU = torch.device("cpu")


def make_args(**flags):
    small = {"hidden_sizes": (16, 16), "batch_size": 32, "num_action_samples": 3, "num_agents": 3, "bc_updates": 0}
    return bred.Args(**{**small, **flags})


def make_agent(stage, args, spread=0.4, double=True):
    """The agents of a stage, all parameters drawn anew: non-zero biases, targets unlike critics, members unlike."""
    agent, generator = bred.STAGES[stage](O, A, args, CPU), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in agent.parameters():
            p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent.double() if double else agent


def make_batch(S, B=32, seed=0):
    """(S, B, O + A + 1 + O + 1) random transitions in float64, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(S, B, 2 * O + A + 2))
    rows[..., O : O + A] = rng.uniform(-0.999, 0.999, size=(S, B, A))
    rows[..., -1] = rng.random((S, B)) > 0.25
    return torch.from_numpy(rows)


def online_noise(agent, S, B=32, seed=0):
    """The two noises of finetune_update in float64: (S, P, 1, B, A) each."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(2, S, agent.num_policies, 1, B, A)))


def set_constant(policies, mean, log_std):
    """Makes policies ignore their observations: mean, log_std broadcast to (G, A), before the tanh."""
    with torch.no_grad():
        for p in policies.parameters():
            p.zero_()
        bias = policies.net.layers[-1][1][:, 0]
        bias[:, :A], bias[:, A:] = (torch.as_tensor(x, dtype=bias.dtype) for x in (mean, log_std))


def snapshot(agent):
    """Copies of all parameters and buffers but the optimisers'."""
    return {k: x.clone() for k, x in agent.state_dict().items() if "optimizers." not in k}


# ---------------------------------------------------------------------------------------------------------------------
# Moments of a mixture, eq. (9)
# ---------------------------------------------------------------------------------------------------------------------


def moments(means, stds):
    """mixture_moments of one number from each member."""
    x = [torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1) for x in (means, stds)]
    mean, std = bred.mixture_moments(*x)
    return mean.item(), std.item()


def test_moments_by_hand():
    """Spec g1, g2: identical members; means of 1 and -1; means of -1, 0 and 1; and a deviation no policy can have."""
    assert moments([0.3] * 5, [0.7] * 5) == (pytest.approx(0.3), pytest.approx(0.7))
    assert moments([1, -1], [0.5, 0.5]) == (0, pytest.approx(1.1180, abs=1e-4))
    mean, std = moments([-1, 0, 1], [0.5] * 3)
    assert mean == 0 and std**2 == pytest.approx(0.9167, abs=1e-4)
    assert moments([-20, 20], [1, 1]) == (0, pytest.approx(math.exp(2)))


def test_moments_of_a_mixture():
    """Mean and deviation of a sample from a random member each; in float32 no digits are lost far from 0."""
    rng, means, stds = np.random.default_rng(0), [0.5, -1.0, 2.0], [0.2, 1.0, 0.5]
    member = rng.integers(3, size=400_000)
    drawn = np.array(means)[member] + np.array(stds)[member] * rng.normal(size=len(member))
    assert moments(means, stds) == (pytest.approx(drawn.mean(), abs=0.01), pytest.approx(drawn.std(), abs=0.01))
    far = bred.mixture_moments(torch.full((1, 2, 1, 1), 1e3), torch.full((1, 2, 1, 1), 1e-3))
    assert far[1].item() == pytest.approx(1e-3)


@pytest.mark.parametrize("S, N", [(1, 1), (2, 3)])
def test_what_acts_is_the_mixture(S, N):
    """Evaluations take tanh of the mean of the means; exploring draws from N(mixture_mean, mixture_std), then tanh."""
    args = make_args(num_agents=N, num_seeds=S)
    agent = make_agent("offline", args)
    obs, noise = make_batch(S)[..., :O], make_batch(S, seed=1)[..., :A]
    actor = agent.actor
    for s in range(S):
        out = [forward(numpy_layers(agent.policies.net, s * N + i), obs[s].numpy())[0] for i in range(N)]
        mean, log_std = np.split(np.array(out), 2, axis=-1)
        log_std = np.clip(log_std, -20, 2)
        mixture_mean, second = mean.mean(0), (np.exp(2 * log_std) + mean**2).mean(0)
        std = np.minimum(np.sqrt(second - mixture_mean**2), math.exp(2))
        np.testing.assert_allclose(actor.act(obs)[s].detach(), np.tanh(mixture_mean), atol=1e-12)
        explored = np.tanh(mixture_mean + std * noise[s].numpy())
        np.testing.assert_allclose(actor.sample(obs, noise)[s].detach(), explored, atol=1e-9)
        alone = bred.policy_of_seed(actor, s)  # as evaluations get it
        torch.testing.assert_close(alone.act(obs[s : s + 1])[0], actor.act(obs)[s])
    with torch.no_grad():
        agent.policies.net.layers[-1][1].add_(1.0)
    assert not torch.allclose(actor.act(obs), bred.MixtureActor(make_agent("offline", args).policies, N).act(obs))
    torch.testing.assert_close(actor.act(obs), agent.actor.act(obs))  # it shares memory with the policies


def test_squashed_means_do_not_average():
    """Means of 0.5 and 2.5 before the tanh: tanh(1.5) = 0.905, where the mean of the squashed ones is 0.724."""
    agent = make_agent("offline", make_args(num_agents=2))
    set_constant(agent.policies, [[0.5, 0.5], [2.5, 2.5]], -1.0)
    act = agent.actor.act(make_batch(1)[..., :O])
    torch.testing.assert_close(act, torch.full_like(act, math.tanh(1.5)))


# ---------------------------------------------------------------------------------------------------------------------
# Replay and the pace of updates: eq. (7), spec g3 and g7
# ---------------------------------------------------------------------------------------------------------------------


def test_online_fraction_by_hand():
    args = make_args(initial_online_fraction=0.75)
    at = [bred.online_fraction(t, args) for t in (0, 62_500, 125_000, 250_000)]
    assert at == [0.75, 0.875, 1.0, 1.0]
    assert bred.online_fraction(1_000, make_args(initial_online_fraction=0.5)) == pytest.approx(0.504)


def rows(args, t, S=2, num_offline=1000, num_steps=200_000, u=None):
    if u is None:
        u = torch.rand(50, S, args.batch_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return bred.replay_rows(u, t, num_offline, num_steps, args).numpy()


@pytest.mark.parametrize("t, count", [(1, 192), (1_000, 193), (31_250, 208), (62_500, 224), (125_000, 256)])
def test_counts_of_a_balanced_batch(t, count):
    """Online rows are those of the right seed that are filled; together with the offline ones they make the batch."""
    drawn = rows(make_args(batch_size=256, initial_online_fraction=0.75), t)
    assert drawn.shape == (50, 2, 256) and np.all((drawn >= 1000).sum(-1) == count) and drawn.min() >= 0
    for s in range(2):
        online = drawn[:, s][drawn[:, s] >= 1000] - 1000 - 200_000 * s
        assert online.min() >= 0 and online.max() < t


def test_other_replays():
    """uniform: one buffer, whatever the batch's order; online-only: no offline row; both to the last row."""
    u = (torch.arange(400, dtype=torch.float64).view(1, 1, 400) + 0.5) / 400
    uniform = rows(make_args(batch_size=400, replay="uniform"), 100, 1, 300, 500, u)
    assert uniform.flatten().tolist() == list(range(400))  # 300 offline and 100 online ones, each as likely as any
    drawn = rows(make_args(batch_size=256, replay="uniform"), 500, 2, 300, 500)
    assert (drawn[:, 1] >= 300).mean() == pytest.approx(5 / 8, abs=0.02)
    assert drawn[:, 0].max() == 799 and drawn[:, 1][drawn[:, 1] >= 300].min() >= 800
    only = rows(make_args(replay="online-only", batch_size=256), 500, 2, 300, 500)
    assert only[:, 0].min() == 300 and only[:, 0].max() == 799 and only[:, 1].min() == 800 and only[:, 1].max() == 1299
    almost = torch.full((1, 2, 32), 1 - 2**-53, dtype=torch.float64)
    balanced = rows(make_args(), 500, 2, 300, 500, almost)
    assert set(balanced[0, 0]) == {299, 799} and set(balanced[0, 1]) == {299, 1299}


def test_balanced_draws_are_uniform_within_each_buffer():
    drawn = rows(make_args(batch_size=256, initial_online_fraction=0.5), 40, 1, 60, 1000)
    counts = np.bincount(drawn.flatten(), minlength=100)
    assert len(counts) == 100
    for part in counts[:60], counts[60:]:
        expected = part.mean()
        assert np.sum((part - expected) ** 2 / expected) < len(part) + 4 * math.sqrt(2 * len(part))  # chi-square


def test_updates_after():
    """Nothing before 1,000 steps, ten thousand after them, a thousand after every thousand more."""
    args = bred.Args()
    assert [bred.updates_after(t, args) for t in (0, 999, 1000, 1999, 2000, 3000)] == [
        0,
        0,
        10_000,
        10_000,
        11_000,
        12_000,
    ]
    assert bred.updates_after(250_000, args) == 259_000
    assert bred.updates_after(3000, bred.Args(first_updates=1000)) == 3000


# ---------------------------------------------------------------------------------------------------------------------
# Offline: CQL, against the numpy reference of test_cql_red.py
# ---------------------------------------------------------------------------------------------------------------------


def numpy_layers(mlp, *lead):
    return [tuple(p[lead].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]


def assert_same_layers(mlp, lead, layers):
    for ours, theirs in zip(layers_of(mlp), layers):
        for x, y in zip(ours, theirs):
            np.testing.assert_allclose(x[lead].detach().numpy(), y, rtol=0, atol=1e-7)


def cql_noises(args, G, seed=0):
    rng = np.random.default_rng(100 + seed)
    return [torch.from_numpy(rng.normal(size=(G, *shape))) for shape in bred.cql_noise_shapes(args, A)]


@pytest.mark.parametrize("flags", [{}, {"bc_updates": 2}], ids=["climbing", "cloning first"])
def test_cql_update_against_numpy(flags):
    """Four updates of two members of two seeds, each on a batch of its own."""
    rates = {"learning_rate": 2**-6, "policy_learning_rate": 2**-5, "cql_alpha": 3.0}  # float32 holds them exactly
    args = make_args(num_seeds=2, num_agents=2, polyak=0.3, gamma=0.9, **rates, **flags)
    more = {"backup_entropy": False, "importance_sampling": True, "cql_temperature": 1.0, "gap_floor": None}
    theirs = SimpleNamespace(**asdict(args), **more, lagrange_gap=None)
    agent = make_agent("offline", args)
    scalars = {"log_std_scale": torch.ones(4), "log_std_shift": torch.zeros(4)}  # of cql_red's policies, not of ours
    like_cql = SimpleNamespace(
        actor=SimpleNamespace(net=agent.policies.net, **scalars), critic=agent.critic, log_multiplier=torch.zeros(4),
        target_critic=agent.target_critic, log_alpha=agent.log_alpha,
    )  # fmt: skip
    references = [NumpyCQL(like_cql, g, theirs) for g in range(4)]
    for n in range(4):
        batch, noises = make_batch(4, seed=n), cql_noises(args, 4, seed=n)
        metrics = bred.cql_update(agent, batch, *noises, args)
        for g, reference in enumerate(references):
            losses = reference.update(*(x[g].numpy() for x in (batch, *noises)))
            reference.scale, reference.shift = 1.0, 0.0
            ours = [metrics[f"loss/{name}"][g].item() for name in ("actor", "critic", "conservative_gap")]
            np.testing.assert_allclose(ours, losses, rtol=1e-7)
    for g, reference in enumerate(references):
        np.testing.assert_allclose(agent.log_alpha[g].item(), reference.log_alpha, rtol=0, atol=1e-7)
        assert_same_layers(agent.policies.net, (g,), reference.actor)
        for c in range(2):
            assert_same_layers(agent.critic, (g, c), reference.critics[c])
            assert_same_layers(agent.target_critic, (g, c), reference.targets[c])


def test_offline_members_are_independent():
    """Whatever member 1 of seed 0 is fed, all others end bit-identical."""
    args, states = make_args(num_seeds=2, num_agents=2, learning_rate=0.01), []
    for factor in (1.0, 3.0):
        agent = make_agent("offline", args)
        for n in range(3):
            batch, noises = make_batch(4, seed=n), cql_noises(args, 4, seed=n)
            batch[1, :, O + A] *= factor
            for noise in noises:
                noise[1] *= factor
            bred.cql_update(agent, batch, *noises, args)
        states.append(snapshot(agent))
    for name, x in states[0].items():
        if name != "num_updates":
            assert [g for g in range(4) if not torch.equal(x[g], states[1][name][g])] == [1], name


def test_policy_against_torch_distributions():
    """Densities of sampled and of logged actions; and where tanh is 1 in float32."""
    agent = make_agent("offline", make_args(), spread=0.6)
    obs, logged = make_batch(3)[..., :O], make_batch(3)[..., O : O + A]
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 32, A)))
    mean, log_std = agent.policies(obs)
    policy = tanh_normal(mean[:, None], log_std[:, None].exp())
    action, log_prob = agent.policies.sample(obs, noise)
    torch.testing.assert_close(action, (mean[:, None] + log_std.exp()[:, None] * noise).tanh())
    inside = (1 - action.abs()).amin(-1) > 1e-6  # beyond, their way through atanh loses digits
    torch.testing.assert_close(log_prob[inside], policy.log_prob(action)[inside], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(agent.policies.log_prob(obs, logged), policy.log_prob(logged[:, None])[:, 0])
    set_constant(agent.policies, 30.0, 5.0)
    torch.testing.assert_close(agent.policies(obs)[1], torch.full((3, 32, A), 2.0, dtype=torch.float64))
    set_constant(agent.policies, 30.0, 0.0)
    action, log_prob = agent.policies.float().sample(obs.float(), torch.zeros(3, 1, 32, A))
    assert torch.all(action == 1)
    expected = A * (-0.5 * math.log(2 * math.pi) + 60 - 2 * math.log(2))
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, expected))


# ---------------------------------------------------------------------------------------------------------------------
# Distillation, eq. (8)
# ---------------------------------------------------------------------------------------------------------------------


def test_identical_members_are_learned_already():
    """Spec g1: a student that equals all members has loss 0."""
    args = make_args(num_seeds=2)
    agent = make_agent("distil", args)
    with torch.no_grad():
        for mine, theirs in zip(agent.student.parameters(), agent.members.policies.parameters()):
            theirs.copy_(mine.repeat_interleave(3, 0))
    loss = bred.distil_loss(agent, make_batch(2)[..., :O])
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


def adam(moments, name, p, grad, t, lr):
    m, v = moments.get(name, (0.0, 0.0))
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
    moments[name] = m, v
    return p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def adam_layers(moments, name, layers, grads, t, lr):
    return [
        tuple(adam(moments, (name, i, j), p, g, t, lr) for j, (p, g) in enumerate(zip(*pair)))
        for i, pair in enumerate(zip(layers, grads))
    ]


def test_distil_update_against_numpy():
    """Three updates of two seeds: |mean - mixture_mean|^2 + |std - mixture_std|^2, and gradients by hand. Nothing but
    the student moves."""
    args = make_args(num_seeds=2, learning_rate=2**-6)
    agent = make_agent("distil", args)
    before = snapshot(agent)
    students, moments = [numpy_layers(agent.student.net, s) for s in range(2)], [{}, {}]
    members = [[numpy_layers(agent.members.policies.net, 3 * s + i) for i in range(3)] for s in range(2)]
    for n in range(1, 4):
        batch = make_batch(2, seed=n)
        metrics = bred.distil_update(agent, batch, args)
        for s in range(2):
            obs = batch[s, :, :O].numpy()
            mean, log_std = np.split(np.array([forward(m, obs)[0] for m in members[s]]), 2, axis=-1)
            mixture_mean, log_std = mean.mean(0), np.clip(log_std, -20, 2)
            mixture_std = np.sqrt((np.exp(2 * log_std) + mean**2).mean(0) - mixture_mean**2).clip(max=math.exp(2))
            out, inputs = forward(students[s], obs)
            mu, std, free = out[:, :A], np.exp(np.clip(out[:, A:], -20, 2)), np.abs(out[:, A:] + 9) < 11
            loss = np.mean(np.sum((mu - mixture_mean) ** 2 + (std - mixture_std) ** 2, 1))
            assert metrics["loss/distillation"][s].item() == pytest.approx(loss, rel=1e-9)
            d_out = np.concatenate([2 * (mu - mixture_mean), 2 * (std - mixture_std) * std * free], 1) / 32
            grads = backward(students[s], inputs, d_out)[0]
            students[s] = adam_layers(moments[s], "student", students[s], grads, n, args.learning_rate)
    for s in range(2):
        assert_same_layers(agent.student.net, (s,), students[s])
    moved = {name for name, x in snapshot(agent).items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if name.startswith("student.")}


def test_early_stopping_of_each_seed_by_itself(monkeypatch):
    """The best student so far is kept; two epochs without a better one end it for good, others go on."""
    args = make_args(num_seeds=3, distil_patience=2)
    agent = bred.STAGES["distil"](O, A, args, CPU)
    losses = [[3, 3, 3], [2, 4, 4], [1, 5, 2], [2, 1, 3], [2, 1, 3], [9, 9, 1]]
    kept = [[0, 0, 0], [1, 0, 0], [2, 0, 2], [2, 0, 2], [2, 0, 2], [2, 0, 2]]
    over = [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]]
    for epoch, of_seed in enumerate(losses):
        with torch.no_grad():
            for p in agent.student.parameters():
                p.fill_(epoch)
        monkeypatch.setattr(bred, "distil_loss", lambda agent, obs, x=of_seed: torch.tensor(x, dtype=torch.float32))
        assert bred.keep_best(agent, None, args).tolist() == of_seed
        for p in agent.best.parameters():
            assert torch.equal(p, torch.tensor(kept[epoch]).view(3, 1, 1).expand_as(p)), epoch
        assert (agent.stale_epochs >= 2).tolist() == [bool(x) for x in over[epoch]], epoch
    assert agent.best_loss.tolist() == [1, 3, 2]


def test_a_student_learns_the_mixture():
    """In 300 updates its loss falls to a few per cent, and it acts as the mixture does."""
    args = make_args(hidden_sizes=(32, 32), learning_rate=3e-3, batch_size=64)
    agent = make_agent("distil", args, spread=0.3, double=False)
    obs = torch.randn(1, 500, O, generator=torch.Generator().manual_seed(1))
    first = bred.distil_loss(agent, obs).item()
    for n in range(300):
        bred.distil_update(agent, make_batch(1, 64, seed=n).float(), args)
    assert bred.keep_best(agent, obs, args).item() < 0.05 * first
    members = bred.MixtureActor(agent.members.policies, 3)
    assert (bred.MixtureActor(agent.best, 1).act(obs) - members.act(obs)).abs().mean() < 0.1
    assert torch.equal(agent.actor.act(obs), members.act(obs))  # what --evaluate sees in this stage


# ---------------------------------------------------------------------------------------------------------------------
# What the online stage begins with
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["distilled", "independent"])
def test_start_of_the_online_stage(policy):
    """Members' critics, targets that are copies of them, the best student or the members' policies, alphas."""
    args = make_args(num_seeds=2, policy=policy)
    distillation = make_agent("distil", args, double=False)
    members, agent = distillation.members, bred.STAGES["online"](O, A, args, CPU)
    bred.start_finetuning(agent, distillation, args)
    distilled = policy == "distilled"
    for online, offline in zip(agent.critic.parameters(), members.critic.parameters()):
        for s, i, twin in np.ndindex(2, 3, 2):
            ours = online[s, 2 * i + twin] if distilled else online[3 * s + i, twin]
            assert torch.equal(ours, offline[3 * s + i, twin])
    for target, online in zip(agent.target_critic.parameters(), agent.critic.parameters()):
        assert torch.equal(target, online) and target.data_ptr() != online.data_ptr() and not target.requires_grad
    source = distillation.best if distilled else members.policies
    for ours, theirs in zip(agent.policies.parameters(), source.parameters()):
        assert torch.equal(ours, theirs) and ours.requires_grad
    alphas = members.log_alpha.view(2, 3)
    torch.testing.assert_close(agent.log_alpha, alphas.mean(1) if distilled else alphas.flatten())
    assert all(not adam.num_steps for adam in agent.optimizers.values())
    rates = [adam.learning_rate.item() for adam in agent.optimizers.values()]
    assert rates == pytest.approx([3e-5, 3e-5, 3e-4])
    owned = [id(p) for o in agent.optimizers.values() for p in o.params]
    assert len(owned) == len(set(owned)) and {id(p) for p in agent.parameters() if p.requires_grad} == set(owned)
    args.init_alpha = 1.0
    bred.start_finetuning(agent, distillation, args)
    assert torch.all(agent.log_alpha == 0)


def test_one_agent_is_not_distilled():
    """N = 1 keeps its policy: the student, which has learned nothing, is not used."""
    args = make_args(num_agents=1)
    distillation, agent = make_agent("distil", args), bred.STAGES["online"](O, A, args, CPU).double()
    bred.start_finetuning(agent, distillation, args)
    for ours, theirs in zip(agent.policies.parameters(), distillation.members.policies.parameters()):
        assert torch.equal(ours, theirs)
    assert not bred.distils(args) and not bred.distils(make_args(policy="independent")) and bred.distils(make_args())


def test_members_of_a_smaller_ensemble_are_the_first_of_a_larger_one():
    """Weights depend on the seed and the member's number only."""
    five = bred.STAGES["offline"](O, A, make_args(num_seeds=2, num_agents=5, seed=3), CPU)
    two = bred.STAGES["offline"](O, A, make_args(num_seeds=1, num_agents=2, seed=4), CPU)
    for name, x in two.named_parameters():
        assert torch.equal(x, dict(five.named_parameters())[name][5:7]), name
    weight = five.policies.net.layers[0][0]
    assert all(not torch.equal(weight[i], weight[j]) for i, j in itertools.combinations(range(10), 2))


# ---------------------------------------------------------------------------------------------------------------------
# Online: SAC with an ensemble, eqs. (1)-(2), (10)-(11)
# ---------------------------------------------------------------------------------------------------------------------


class NumpyFinetune:
    """One policy and its M members' critics in numpy, float64, all gradients by hand."""

    def __init__(self, agent, g, args):
        self.args, self.t, self.moments = args, 0, {}
        self.policy = numpy_layers(agent.policies.net, g)
        self.critics = [numpy_layers(agent.critic, g, c) for c in range(agent.critic.lead[1])]
        self.targets = [numpy_layers(agent.target_critic, g, c) for c in range(agent.critic.lead[1])]
        self.log_alpha = agent.log_alpha[g].item()

    def sample(self, obs, noise):
        out, inputs = forward(self.policy, obs)
        mean, log_std = out[:, :A], np.clip(out[:, A:], -20, 2)
        x = mean + np.exp(log_std) * noise
        log_det = 2 * np.log(2) - 2 * np.logaddexp(x, -x)
        log_prob = np.sum(-0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - log_det, 1, keepdims=True)
        return np.tanh(x), log_prob, x, log_std, out[:, A:], inputs

    def update(self, batch, noise, next_noise):
        self.t += 1
        args, B, M, alpha = self.args, len(batch), len(self.critics) // 2, np.exp(self.log_alpha)
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        own, log_prob, x, log_std, raw, inputs = self.sample(s, noise)
        next_action, next_log_prob, *_ = self.sample(s_next, next_noise)

        # temperature
        step = partial(adam, self.moments, t=self.t, lr=args.online_policy_learning_rate)
        log_alpha = step("alpha", self.log_alpha, -(log_prob.mean() - A))

        # policy: mean over members of the smaller twin
        passes = [forward(critic, np.concatenate([s, own], 1)) for critic in self.critics]
        climbed, dq_da = 0, 0
        for i in range(M):
            twins = np.concatenate([q for q, _ in passes[2 * i : 2 * i + 2]], 1)
            climbed = climbed + twins.min(1, keepdims=True) / M
            for c in range(2):
                chosen = np.float64(twins.argmin(1) == c)[:, None] / M
                dq_da = dq_da + backward(self.critics[2 * i + c], passes[2 * i + c][1], chosen)[1][:, O:]
        actor_loss = np.mean(alpha * log_prob - climbed)
        d_x = alpha * 2 * np.tanh(x) - dq_da * (1 - np.tanh(x) ** 2)
        d_log_std = (d_x * np.exp(log_std) * noise - alpha) * ((raw > -20) & (raw < 2))
        grads = backward(self.policy, inputs, np.concatenate([d_x, d_log_std], 1) / B)[0]
        policy = adam_layers(self.moments, "policy", self.policy, grads, self.t, args.online_policy_learning_rate)

        # critics, each member towards its own target
        critic_loss, critics, sa_next = 0, [], np.concatenate([s_next, next_action], 1)
        for c, critic in enumerate(self.critics):
            pair = self.targets[c // 2 * 2 : c // 2 * 2 + 2]
            next_q = np.minimum(*(forward(target, sa_next)[0] for target in pair))
            y = r + args.gamma * mask * (next_q - alpha * next_log_prob)
            q, q_inputs = forward(critic, np.concatenate([s, a], 1))
            critic_loss += np.mean((q - y) ** 2)
            grads = backward(critic, q_inputs, 2 * (q - y) / B)[0]
            critics.append(adam_layers(self.moments, ("critic", c), critic, grads, self.t, args.learning_rate))

        # all at once: every gradient above was taken at the old values
        self.policy, self.log_alpha, self.critics = policy, log_alpha, critics
        self.targets = [
            [tuple((1 - args.polyak) * x + args.polyak * y for x, y in zip(*pair)) for pair in zip(target, critic)]
            for target, critic in zip(self.targets, critics)
        ]
        return actor_loss, critic_loss


@pytest.mark.parametrize("policy, N", [("distilled", 3), ("independent", 2), ("distilled", 1)])
def test_finetune_update_against_numpy(policy, N):
    """Four updates of two seeds, in float64, with steps large enough that every question of order shows."""
    rates = {"learning_rate": 2**-6, "online_policy_learning_rate": 2**-5}  # float32 holds them exactly
    args = make_args(num_seeds=2, num_agents=N, policy=policy, polyak=0.3, gamma=0.9, **rates)
    agent = make_agent("online", args)
    P = agent.num_policies
    assert P == (N if policy == "independent" else 1) and agent.critic.lead == (2 * P, 2 * N // P)
    references = [NumpyFinetune(agent, g, args) for g in range(2 * P)]
    for n in range(4):
        batch, (noise, next_noise) = make_batch(2, seed=n), online_noise(agent, 2, seed=n)
        metrics = bred.finetune_update(agent, batch, noise, next_noise, args)
        for g, reference in enumerate(references):
            s, p = divmod(g, P)  # a seed's policies share its batch
            losses = reference.update(*(x.numpy() for x in (batch[s], noise[s, p, 0], next_noise[s, p, 0])))
            ours = [metrics[f"loss/{name}"][g].item() for name in ("actor", "critic")]
            np.testing.assert_allclose(ours, losses, rtol=1e-7)
    for g, reference in enumerate(references):
        np.testing.assert_allclose(agent.log_alpha[g].item(), reference.log_alpha, rtol=0, atol=1e-7)
        assert_same_layers(agent.policies.net, (g,), reference.policy)
        for c in range(2 * N // P):
            assert_same_layers(agent.critic, (g, c), reference.critics[c])
            assert_same_layers(agent.target_critic, (g, c), reference.targets[c])




def test_every_member_has_its_own_target():
    """Spec g5: another target of member j moves the critics of member j only; the policy does not see targets."""
    args, states = make_args(num_seeds=2, learning_rate=0.01), []
    for shift in (0.0, 1.0):
        agent = make_agent("online", args)
        with torch.no_grad():
            agent.target_critic.layers[-1][1][1, 2:4] += shift  # member 1 of seed 1
        bred.finetune_update(agent, make_batch(2), *online_noise(agent, 2), args)
        states.append(snapshot(agent))
    for name, x in states[0].items():
        if name.startswith("critic."):
            differ = (x != states[1][name]).flatten(2).any(2).nonzero().tolist()
            assert differ == [[1, 2], [1, 3]], name
        elif not name.startswith("target_critic."):
            assert torch.equal(x, states[1][name]), name


def test_the_policy_climbs_the_mean_of_the_members():
    """Spec g6: with Q_i(s, a) = c_i sum(a) and no temperature, the gradient at tanh(mean) is mean(c_i), not the
    smallest; both twins of a member are alike."""
    slopes, args = [1.0, -2.0, 4.0], make_args(hidden_sizes=(2,), online_policy_learning_rate=0.0)
    agent = make_agent("online", args)
    set_constant(agent.policies, 0.0, -20.0)  # no noise to speak of
    with torch.no_grad():
        agent.log_alpha.fill_(-100.0)
        (w1, b1), (w2, b2) = agent.critic.layers
        w1.zero_(), b1.fill_(10.0), b2.fill_(0.0)  # 10 + sum(a) > 0: relu is the identity
        w1[:, :, O:, 0] = 1.0
        w2.zero_()
        w2[0, :, 0, 0] = torch.tensor(slopes).repeat_interleave(2)
    bred.finetune_update(agent, make_batch(1), *online_noise(agent, 1), args)
    gradient = agent.optimizers["actor"].get_buffer("mean3")[0, 0, :A] / 0.1  # (1 - beta1) gradient of the last bias
    torch.testing.assert_close(gradient, torch.full_like(gradient, -np.mean(slopes)), rtol=1e-4, atol=1e-4)


def test_targets_bootstrap_through_truncation_only():
    """y = r at a true end; else r + gamma (Q' - alpha log pi'). Critics are 0, target critics 7 and 9."""
    args = make_args(num_agents=2, learning_rate=0.0, online_policy_learning_rate=0.0, polyak=0.0)
    agent = make_agent("online", args)
    set_constant(agent.policies, 0.0, 0.0)
    with torch.no_grad():
        for p in [*agent.critic.parameters(), *agent.target_critic.parameters()]:
            p.zero_()
        agent.target_critic.layers[-1][1].copy_(torch.tensor([7.0, 9.0, 9.0, 7.0]).view(1, 4, 1, 1))
        agent.log_alpha.fill_(math.log(0.5))
    batch, (noise, next_noise) = make_batch(1), online_noise(agent, 1)
    next_noise[:] = next_noise[:, :, :, :1]  # one draw for all, so that y is one number
    log_prob = agent.policies.sample(batch[:, :1, O + A + 1 : -1], next_noise[:, 0, :, :1])[1].item()
    for not_terminated, y in ((0.0, 1.5), (1.0, 1.5 + 0.99 * (7 - 0.5 * log_prob))):
        batch[..., O + A], batch[..., -1] = 1.5, not_terminated
        loss = bred.finetune_update(agent, batch, noise, next_noise, args)["loss/critic"].item()
        assert loss == pytest.approx(4 * y**2, rel=1e-6)


@pytest.mark.parametrize("policy", ["distilled", "independent"])
def test_finetuning_learns(policy):
    """One-step episodes of reward -4 |a - (0.6, -0.6)|^2 from data all over: 150 updates turn the policy there."""
    args = make_args(num_agents=2, policy=policy, learning_rate=0.01, online_policy_learning_rate=0.01, init_alpha=0.05)
    agent, best, generator = bred.STAGES["online"](O, A, args, CPU), torch.tensor([0.6, -0.6]), torch.Generator()
    bred.start_finetuning(agent, bred.STAGES["distil"](O, A, args, CPU), args)
    for n in range(150):
        batch = make_batch(1, seed=n).float()
        batch[..., O + A], batch[..., -1] = -4 * (batch[..., O : O + A] - best).square().sum(-1), 0
        noise = torch.randn(2, 1, agent.num_policies, 1, 32, A, generator=generator)
        bred.finetune_update(agent, batch, *noise, args)
    acts = agent.actor.act(make_batch(1)[..., :O].float()).mean((0, 1))
    assert (acts - best).abs().max() < 0.35, acts


# ---------------------------------------------------------------------------------------------------------------------
# Runs of all stages
# ---------------------------------------------------------------------------------------------------------------------

# offline 110 updates; distillation at most 2 epochs of 50; online 3 epochs of 40 steps with 120, 50 and 50 updates
STAGE_FLAGS = "--num-updates", 110, "--bc-updates", 50, "--distil-epochs", 2, "--updates-per-epoch", 50
ONLINE_FLAGS = "--online-steps", 110, "--steps-per-epoch", 40, "--first-updates", 120, "--online-eval-every", 80
ONLINE_FLAGS += "--online-policy-learning-rate", 0.001, "--anneal-steps", 100
SMALL = "--hidden-sizes", 8, "--batch-size", 8, "--num-action-samples", 2, "--device", "cpu", "--eval-workers", 0
SMALL += "--eval-every", 55, "--eval-episodes", 1, "--log-every", 50, "--policy-learning-rate", 0.001
MANY = "--num-agents", 3, "--num-seeds", 2, "--seed", 3


def main(*flags):
    """bred's main() in this process, whose signal handlers are put back afterwards; returns its exit status."""
    handlers, argv = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, sys.argv
    minari_path = os.environ.get("MINARI_DATASETS_PATH")
    sys.argv = ["bred.py", *map(str, flags)]
    try:
        bred.main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
        os.environ.pop("MINARI_DATASETS_PATH", None)
        if minari_path is not None:
            os.environ["MINARI_DATASETS_PATH"] = minari_path
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def load(run_dir, name="checkpoint.pt"):
    return torch.load(Path(run_dir) / name, weights_only=True)


def tensors(node, path=""):
    """Everything in a checkpoint, by a path of keys."""
    if isinstance(node, (dict, list, tuple)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, value in items for k, v in tensors(value, f"{path}/{key}").items()}
    return {path: list(bred.STAGES).index(node) if path == "/stage" else node}


def assert_same_end(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators, replay; the same evaluations.csv."""
    ours, theirs = tensors(load(run_dir)), tensors(load(reference))
    assert ours.keys() == theirs.keys()
    assert [k for k, x in ours.items() if not torch.equal(torch.as_tensor(x), torch.as_tensor(theirs[k]))] == []
    assert (Path(run_dir) / "evaluations.csv").read_text() == (Path(reference) / "evaluations.csv").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of a run of all three stages that was never stopped."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert main("--dataset", data, *SMALL, *MANY, *STAGE_FLAGS, *ONLINE_FLAGS, "--run-dir", run_dir) is None
    return run_dir


def scalars(folder, tag):
    """[(step, value), ...] of a tag in TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(s.step, s.value) for s in events.Scalars(tag)]


def test_stages_in_the_curves(unbroken):
    """Evaluations go on counting from updates to steps: at num_updates the distilled policy alone, then every other
    epoch of 40 steps and the last; the scalar `stage` tells them apart; distillation has an axis of its own."""
    updates = harness.read_evaluations(unbroken)["update"].tolist()
    assert updates == [n for n in (55, 110, 190, 230) for _ in range(2)]
    checkpoint = load(unbroken)
    assert (checkpoint["stage"], checkpoint["t"], checkpoint["num_updates"]) == ("online", 120, 220)
    assert checkpoint["replay"].shape == (2, 120, 2 * 11 + 3 + 2) and not checkpoint["pending_evaluations"]
    assert {value for _, value in scalars(unbroken, "stage")} == {1, 2, 3}
    assert [step for step, _ in scalars(unbroken, "loss/conservative_gap")] == [50, 100]
    assert [step for step, _ in scalars(unbroken, "value/disagreement")] == [150, 150, 190, 230]
    assert [step for step, _ in scalars(unbroken / "distil", "loss/validation")] == [50, 100]
    assert scalars(unbroken, "train/return_seed3") and scalars(unbroken, "train/return_seed4")
    fraction = dict(scalars(unbroken, "replay/online_fraction"))
    assert fraction == {150: 0.75, 190: 0.875, 230: 1.0}  # round(8 rho) of 8: rho = 0.7, 0.9 and 1


def test_what_each_stage_draws(monkeypatch, tmp_path):
    """Offline every logged row, other batches for every member, and actions that atanh can take; distillation all
    states but every tenth, and these validate; online the counts of eq. (7), logged rows and the seed's own steps,
    which are sampled from the policy, with other normal noise for each."""
    run_stage, keep_best, sample = bred.run_stage, bred.keep_best, bred.MixtureActor.sample
    drawn, tables, validation, acted = {}, {}, [], []

    def drawing(update, agent, transitions, args, index, *noise):
        drawn.setdefault(update.__name__, []).append(index)
        tables[update.__name__] = transitions
        return run_stage(update, agent, transitions, args, index, *noise)

    def validating(agent, obs, args):
        validation.append(obs)
        return keep_best(agent, obs, args)

    def sampling(actor, obs, noise):
        acted.append((noise, sample(actor, obs, noise)))
        return acted[-1][1]

    monkeypatch.setattr(bred.MixtureActor, "sample", sampling)
    monkeypatch.setattr(bred, "run_stage", drawing)
    monkeypatch.setattr(bred, "keep_best", validating)
    extreme = [(obs, np.sign(action), *rest) for obs, action, *rest in harness.hopper_episodes()]
    data, N = harness.write_minari(tmp_path / "data", extreme), 285
    flags = "--num-updates", 60, "--bc-updates", 30, "--distil-epochs", 1, "--updates-per-epoch", 80, "--num-agents", 2
    flags += "--online-steps", 30, "--steps-per-epoch", 20, "--first-updates", 50, "--anneal-steps", 100
    shared = *SMALL[:2], *SMALL[4:], "--batch-size", 64, "--eval-episodes", 0, "--num-seeds", 2
    assert main("--dataset", data, *shared, *flags, "--run-dir", tmp_path / "run") is None
    assert all(x.isfinite().all() for x in load(tmp_path / "run")["agent"].values())
    offline, distil, online = (torch.cat(drawn[f"{name}_update"]) for name in ("cql", "distil", "finetune"))
    assert offline.shape == (60, 4, 64) and distil.shape == (80, 2, 64) and online.shape == (130, 2, 64)
    assert offline.unique().tolist() == list(range(N))
    assert all(not torch.equal(offline[:, i], offline[:, j]) for i, j in itertools.combinations(range(4), 2))
    table = tables["cql_update"]
    torch.testing.assert_close(table[:, 11:14].abs(), torch.full((N, 3), 0.999))
    assert distil.unique().tolist() == [row for row in range(N) if row % 10]
    assert len(validation) == 1 and torch.equal(validation[0], table[::10, :11].expand(2, -1, -1))
    for s in range(2):
        for t, count, index in ((20, 38, online[:50, s]), (40, 45, online[50:, s])):  # 0.6 and 0.7 of 64
            assert torch.all((index >= N).sum(-1) == count)
            own = N + 40 * s  # 30 steps are rounded up to two epochs of 20
            assert index[index >= N].unique().tolist() == list(range(own, own + t))
        assert online[:, s][online[:, s] < N].unique().tolist() == list(range(N))
    replay, (noise, actions) = load(tmp_path / "run")["replay"], (torch.cat(x, 1) for x in zip(*acted))
    assert torch.equal(tables["finetune_update"][N:].view(2, 40, -1), replay)
    assert torch.equal(replay[..., 11:14], actions) and noise.shape == (2, 40, 3) and len(noise.unique()) == 240
    assert abs(noise.mean()) < 0.2 and noise.std().item() == pytest.approx(1, abs=0.15)


def test_distillation_ends_when_no_seed_gets_better(unbroken, monkeypatch, tmp_path):
    """With a patience of two epochs; the worse seed waits for the better one."""
    stale = iter([[0, 1], [1, 2], [0, 3], [1, 4], [2, 5], [3, 6]])

    def waiting(agent, obs, args):
        agent.stale_epochs.copy_(torch.tensor(next(stale)))
        return agent.best_loss

    monkeypatch.setattr(bred, "keep_best", waiting)
    flags = "--distil-epochs", 6, "--distil-patience", 2, "--updates-per-epoch", 5, "--online-steps", 0
    small = "--eval-episodes", 0, "--device", "cpu", "--run-dir", tmp_path / "run"
    assert main("--offline", unbroken, *flags, *small) is None and next(stale) == [3, 6]


def test_members_of_a_run(data, unbroken, tmp_path):
    """offline.pt has the trained members. Those of a run with fewer of them, or of one seed alone, are the same."""
    flags = "--dataset", data, *SMALL, *STAGE_FLAGS, "--online-steps", 0, "--eval-episodes", 0
    assert main(*flags, "--num-agents", 2, "--seed", 4, "--distil-epochs", 1, "--run-dir", tmp_path / "run") is None
    fewer, more = (load(run_dir, "offline.pt") for run_dir in (tmp_path / "run", unbroken))
    assert fewer.keys() == more.keys() and len(fewer["log_alpha"]) == 2 and len(more["log_alpha"]) == 6
    for name, x in fewer.items():
        torch.testing.assert_close(x, more[name][3:5], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(more[name][0], more[name][3]) or name.endswith("alpha"), name


def test_offline_from_a_run(data, unbroken, tmp_path, capsys):
    """--offline: its flags are taken over, and the run ends like one of all stages, bit by bit, also if it was first
    told to make no online steps. From then on nothing is read from it. A part of its members serves the ablations."""
    shutil.copytree(unbroken, tmp_path / "members")
    args = bred.Args(offline=str(tmp_path / "members"), num_agents=2, num_seeds=2, hidden_sizes=(8,))
    first_two = bred.trained_members(11, 3, args, CPU).state_dict()
    for name, x in load(unbroken, "offline.pt").items():
        assert torch.equal(first_two[name], x[[0, 1, 3, 4]]), name
    flags = *SMALL[-8:], "--device", "cpu", "--eval-workers", 0, *STAGE_FLAGS[4:], *ONLINE_FLAGS
    assert main("--offline", tmp_path / "members", *flags, "--online-steps", 0, "--run-dir", tmp_path / "run") is None
    assert load(tmp_path / "run")["stage"] == "online" and load(tmp_path / "run")["t"] == 0
    assert main("--resume", tmp_path / "run", "--online-steps", 110) is None
    both = (tmp_path / "run" / "evaluations.csv").read_text().splitlines()
    rows = (unbroken / "evaluations.csv").read_text().splitlines()
    assert both == [row for row in rows if row.startswith("u") or int(row.split(",")[0]) >= 110]
    ours, theirs = tensors(load(tmp_path / "run")), tensors(load(unbroken))
    assert ours.keys() == theirs.keys()
    assert [k for k, x in ours.items() if not torch.equal(torch.as_tensor(x), torch.as_tensor(theirs[k]))] == []
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert config["num_agents"] == 3 and config["hidden_sizes"] == [8] and config["bc_updates"] == 50
    ablation = "--num-agents", 1, "--replay", "uniform", "--first-updates", 60, "--online-steps", 40
    shared = "--offline", tmp_path / "members", *flags, "--eval-episodes", 0
    assert main(*shared, *ablation, "--run-dir", tmp_path / "cql-ft") is None
    independent = "--policy", "independent", "--replay", "online-only", "--online-steps", 40, "--first-updates", 20
    assert main(*shared, *independent, "--run-dir", tmp_path / "3") is None
    assert load(tmp_path / "cql-ft")["agent"]["critic.weight0"].shape == (2, 2, 14, 8)
    assert load(tmp_path / "3")["agent"]["critic.weight0"].shape == (6, 2, 14, 8)
    shutil.rmtree(tmp_path / "members")
    capsys.readouterr()
    assert main("--resume", tmp_path / "cql-ft", "--online-steps", 80) is None and load(tmp_path / "cql-ft")["t"] == 80
    for run_dir in tmp_path / "cql-ft", tmp_path / "3":
        assert main("--evaluate", run_dir, "--eval-episodes", 1) is None
    assert capsys.readouterr().out.count("seed 4: ") == 2


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import harness
bred, (run_dir, *flags) = harness.load("bred"), sys.argv[1:]
bred.make_env({"id": "Hopper-v5", "kwargs": {}}).close()  # imported once for all
path, rng = Path(run_dir) / "checkpoint.pt", random.Random(5)

def start(argv, name="", kill_in_call=None):
    pid = os.fork()
    if pid == 0:
        calls, owner = iter(range(1, 10**6)), bred.Interaction if name == "step" else bred
        function = getattr(owner, name, None)
        def killed(*inputs):
            if next(calls) == kill_in_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*inputs)
        if name:
            setattr(owner, name, killed)
        sys.argv = [bred.__file__, *argv]
        try:
            bred.main()
        finally:
            sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
    return pid

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def where():
    checkpoint = bred.load_checkpoint(run_dir, "cpu")
    return checkpoint["stage"], checkpoint["num_updates"], checkpoint["t"]

resume = ["--resume", run_dir]
assert end(start([*flags, "--run-dir", run_dir], "cql_update", 90)) == -9 and where() == ("offline", 50, 0), where()
assert end(start(resume, "distil_update", 1)) == -9 and where() == ("distil", 0, 0), where()
assert end(start(resume, "distil_update", 90)) == -9 and where() == ("distil", 50, 0), where()
assert end(start(resume, "step", 1)) == -9 and where() == ("online", 0, 0), where()
assert end(start(resume, "finetune_update", 90)) == -9 and where() == ("online", 50, 40), where()
assert end(start(resume, "step", 15)) == -9 and where() == ("online", 100, 40), where()
# after the epoch's evaluation is written, back to the middle of the epoch: it is not written twice
assert end(start(resume, "step", 45)) == -9 and where() == ("online", 150, 80), where()
pid, before = start(resume), path.stat().st_mtime_ns
while path.stat().st_mtime_ns == before:
    time.sleep(0.001)
time.sleep(rng.uniform(0, 0.05))
os.kill(pid, signal.SIGKILL)
assert end(pid) in (-9, 0) and where()[1] > 150
assert end(start(resume)) == 0 and where() == ("online", 220, 120)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_in_every_stage(data, unbroken, tmp_path):
    """kill -9 offline, in the first and a later update of the distillation, in the first online step, in the updates
    after these, in the middle of an epoch's steps, after an evaluation, and at a random moment: the end is the same,
    bit by bit."""
    flags = "--dataset", data, *SMALL, *MANY, *STAGE_FLAGS, *ONLINE_FLAGS, "--checkpoint-every", 50
    command = [sys.executable, "-c", KILLED, tmp_path / "run", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    "name, call, where",
    [
        ("distil_update", 45, ("distil", 50, 0)),  # with the end of an epoch of the distillation
        ("step", 55, ("online", 120, 55)),  # in the middle of an epoch's steps
        ("step", 80, ("online", 120, 80)),  # with the last of them
    ],
)
def test_a_stop_saves_soon_and_resumes_exactly(data, unbroken, name, call, where, monkeypatch, tmp_path, capsys):
    """A stop in the middle of an epoch of steps saves at once; updates end where something is due, or after ten."""
    owner = bred.Interaction if name == "step" else bred
    function, calls = getattr(owner, name), itertools.count(1)

    def stopping(*inputs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # until the handler has run
                time.sleep(0.001)
        return function(*inputs)

    flags = "--dataset", data, *SMALL, *MANY, *STAGE_FLAGS, *ONLINE_FLAGS, "--run-dir", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        assert main(*flags) == 128 + signal.SIGTERM
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped at") and f"--resume {tmp_path}" in last
    checkpoint = load(tmp_path / "run")
    assert (checkpoint["stage"], checkpoint["num_updates"], checkpoint["t"]) == where
    assert main("--evaluate", tmp_path / "run", "--eval-episodes", 1) is None
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["seed 3:", "seed 4:"]
    assert main("--resume", tmp_path / "run") is None
    assert_same_end(tmp_path / "run", unbroken)
    assert [step for step, _ in scalars(tmp_path / "run" / "distil", "loss/validation")] == [50, 100]


# ---------------------------------------------------------------------------------------------------------------------
# Online data, on an environment that keeps a log of its own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged_data(tmp_path_factory):
    """Episodes of LoggedEnv's shapes and units."""
    rng, episodes = np.random.default_rng(0), []
    for o, a, *rest in harness.hopper_episodes(4, 20, obs_dim=3, action_dim=2):
        episodes.append((o, np.float32(rng.uniform([-2, -1], [3, 0], a.shape)), *rest))
    folder = tmp_path_factory.mktemp("data") / "logged"
    return harness.write_minari(folder, episodes, "harness/Logged-v0", {"max_episode_steps": 7})


LOGGED = "--hidden-sizes", 8, "--batch-size", 8, "--num-action-samples", 2, "--device", "cpu", "--eval-episodes", 0
LOGGED += "--num-updates", 20, "--distil-epochs", 2, "--distil-patience", 1, "--updates-per-epoch", 20
LOGGED += "--num-agents", 2, "--steps-per-epoch", 20, "--first-updates", 30


def test_saved_online_data_is_what_the_environment_saw(logged_data, tmp_path):
    """Every episode in order, in the environment's own units; terminations and truncations apart, as in the mask that
    learning sees; observations and rewards in the replay are the environment's."""
    LoggedEnv.logs.clear()
    flags = "--dataset", logged_data, *LOGGED, "--online-steps", 60, "--save-online", tmp_path / "online"
    assert main(*flags, "--run-dir", tmp_path / "run") is None
    (log,) = [[e for e in log if e] for log in LoggedEnv.logs if sum(map(len, log)) == 60]
    back = bred.load_dataset([str(tmp_path / "online")])
    assert (
        back.episode_lengths.tolist() == [len(steps) for steps in log] and back.environment["id"] == "harness/Logged-v0"
    )
    obs, action, reward, next_obs = (np.array(x) for x in zip(*(step for steps in log for step in steps)))
    ends = [is_termination(number, len(steps)) for number, steps in enumerate(log, 1)]
    assert any(ends) and not all(ends)
    mask = np.concatenate([np.r_[np.ones(len(steps) - 1), 1 - end] for steps, end in zip(log, ends)])
    expected = np.c_[obs, action, reward, next_obs, mask]
    np.testing.assert_allclose(back.transitions, expected, atol=1e-5)
    bred.fit_to_environment(back)
    np.testing.assert_allclose(load(tmp_path / "run")["replay"][0], back.transitions, atol=1e-5)


def test_seed_k_among_three_is_the_run_with_seed_k(logged_data, tmp_path):
    """Through main() and all stages, early stopping of each seed included; float tolerance, as batched products round
    differently."""
    flags = "--dataset", logged_data, *LOGGED, "--online-steps", 40, "--learning-rate", 0.003
    for seed, num_seeds in (5, 3), (5, 1), (7, 1):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        assert main(*flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir) is None
    together = load(tmp_path / "5-3")
    assert together["num_updates"] == 50
    for k in 0, 2:
        alone = load(tmp_path / f"{5 + k}-1")
        torch.testing.assert_close(together["replay"][k], alone["replay"][0], rtol=1e-3, atol=1e-3)
        for name in ("policies.net.weight0", "critic.weight0", "target_critic.weight1", "log_alpha"):
            ours, theirs = together["agent"][name], alone["agent"][name]
            torch.testing.assert_close(ours[k], theirs[0], rtol=1e-3, atol=1e-4)
            assert not torch.allclose(ours[1], theirs[0]) or name == "log_alpha", name
    assert not torch.allclose(together["replay"][0], together["replay"][2])


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(tmp_path, capsys):
    """refuses(*flags, words=(...)): exit status 2, one line on stderr with these words, no run folder."""

    def check(*flags, words=()):
        capsys.readouterr()
        assert main(*flags, "--run-dir", tmp_path / "refused") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "; " in line and all(str(word) in line for word in words), line
        assert not (tmp_path / "refused").exists()

    return check


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--num-agents", 0),
        ("--initial-online-fraction", 1.1),
        ("--anneal-steps", 0),
        ("--steps-per-epoch", 0),
        ("--first-updates", 0),
        ("--distil-patience", 0),
        ("--init-alpha", 0),
        ("--online-steps", -1),
        ("--online-policy-learning-rate", "nan"),
        ("--replay", "half"),
        ("--policy", "both"),
    ],
)
def test_flags_out_of_range(refuses, data, flag, value):
    refuses("--dataset", data, *SMALL, flag, value, words=[value if flag in ("--replay", "--policy") else flag])


def test_offline_runs_that_do_not_fit(refuses, unbroken, tmp_path):
    """No run; a run of another script; other seeds, sizes, more members; no or a damaged offline.pt."""

    def altered(name, **config):
        shutil.copytree(unbroken, tmp_path / name)
        stored = json.loads((unbroken / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**stored, **config}))
        return tmp_path / name

    refuses("--offline", tmp_path, words=[tmp_path, "no run"])
    refuses("--offline", altered("sac", script="sac"), words=["sac.py", "bred.py"])
    refuses("--offline", altered("old", args={}), words=["another version"])
    for flag, value in (
        ("--seed", 1),
        ("--num-seeds", 1),
        ("--hidden-sizes", 9),
        ("--num-updates", 5),
        ("--cql-alpha", 1),
    ):
        refuses("--offline", unbroken, flag, value, words=[flag, unbroken])
    refuses("--offline", unbroken, "--num-agents", 4, words=["--num-agents", unbroken])
    (altered("damaged") / "offline.pt").write_bytes(b"nothing")
    refuses("--offline", tmp_path / "damaged", words=["no readable offline.pt"])
    (altered("unfinished") / "offline.pt").unlink()
    refuses("--offline", tmp_path / "unfinished", words=["no trained members", "--resume"])
    flags = json.loads((unbroken / "config.json").read_text())["args"]
    (altered("second", args={**flags, "offline": "first"}) / "offline.pt").unlink()
    refuses("--offline", tmp_path / "second", words=["second trained no members", "--offline first"])


def test_other_errors(refuses, unbroken, data, tmp_path, capsys):
    """An existing folder for the online data, or none to come; a dataset without environment; fewer steps than there
    are; flags that a run cannot change."""
    refuses("--dataset", data, *SMALL, "--save-online", data, words=[data])
    none = "--online-steps", 0, "--save-online", tmp_path / "none"
    refuses("--dataset", data, *SMALL, *none, words=["--online-steps"])
    nowhere = harness.write_minari(tmp_path / "m", harness.hopper_episodes(), env_spec=None)
    refuses("--dataset", nowhere, *SMALL, "--eval-episodes", 0, words=["--env-id"])
    for flag, value in ("--online-steps", 40), ("--replay", "uniform"), ("--num-agents", 2):
        capsys.readouterr()
        assert main("--resume", unbroken, flag, value) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and flag in line and str(unbroken) in line


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "stage, policy", [("offline", ""), ("distil", ""), ("online", "distilled"), ("online", "independent")]
)
def test_captured_updates_equal_eager_ones(stage, policy):
    """A CUDA graph of ten updates, replayed twice, gives what twenty eager updates give; capturing leaves no trace."""
    args = make_args(num_seeds=2, bc_updates=15, learning_rate=1e-3, policy=policy or "distilled")
    table, device = make_batch(1, 500)[0].float().cuda(), torch.device("cuda")
    agents = [bred.STAGES[stage](O, A, args, device) for _ in range(2)]
    lead = 6 if stage == "offline" else 2
    shapes = {"offline": bred.cql_noise_shapes(args, A), "distil": []}
    shapes = shapes.get(stage, [(getattr(agents[0], "num_policies", 1), 1, 32, A)] * 2)
    update = {"offline": bred.cql_update, "distil": bred.distil_update, "online": bred.finetune_update}[stage]
    generators = [torch.Generator(device).manual_seed(s) for s in range(lead)]
    block = bred.draw_block(lambda u: (u * 500).long(), generators, 32, *shapes)
    learn = [partial(bred.run_stage, update, agent, table, args) for agent in agents]
    first = {name: x.clone() for name, x in agents[0].state_dict().items()}
    replay = bred.cuda_graph(learn[0], agents[0], *(x[:10] for x in block))
    assert all(torch.equal(x, first[name]) for name, x in agents[0].state_dict().items())
    for i in (0, 10):
        captured, eager = replay(*(x[i : i + 10] for x in block)), learn[1](*(x[i : i + 10] for x in block))
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-5)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-3, atol=1e-4)
    actor = agents[0].actor  # made after capturing, and before: it shares memory with what the graph changes
    assert actor.act(table[None, :5, :O].expand(2, -1, -1)).isfinite().all()
