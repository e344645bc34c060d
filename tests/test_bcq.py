"""bcq.py against numpy, torch.distributions and numbers by hand; what it learns; its runs, stopped in both stages.

The networks' MLP, the optimiser and the plumbing are the same text as in the other scripts and are tested there.
"""

import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from old_helpers import LoggedEnv, backward, forward, is_termination, layers_of

bcq = harness.load("bcq")

O, A, Z, K = 4, 2, 4, 3  # noqa: E741  dimensions of the small agents below, and their actions at each next state
CPU = torch.device("cpu")
NETWORKS = "encoder", "decoder", "perturbation", "critic", "target_perturbation", "target_critic"


def make_args(**flags):
    small = {"hidden_sizes": (16, 12), "vae_hidden_sizes": (16, 16), "batch_size": 32, "num_next_actions": K}
    return bcq.Args(**{**small, "num_candidates": 7, **flags})


def make_agent(args, spread=0.5, double=True, device="cpu"):
    """An agent, all parameters drawn anew: non-zero biases, targets unlike online networks."""
    agent, generator = bcq.BCQAgent(O, A, args, torch.device(device)), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in agent.parameters():
            p.copy_(spread * torch.randn(p.shape, generator=generator))
    if double:
        agent.double()
        for optimizer in agent.optimizers.values():
            optimizer.learning_rate.fill_(args.learning_rate)  # it was rounded to float32
    return agent


def make_batch(S=1, B=32, seed=0):
    """(S, B, O + A + 1 + O + 1) random transitions in float64, a quarter of them terminal; then the two noises of
    update: (S, B, Z), (S, K + 1, B, Z)."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(S, B, 2 * O + A + 2))
    rows[..., O : O + A] = rng.uniform(-1, 1, size=(S, B, A))
    rows[..., -1] = rng.random((S, B)) > 0.25
    return [torch.from_numpy(x) for x in (rows, rng.normal(size=(S, B, Z)), rng.normal(size=(S, K + 1, B, Z)))]


@torch.no_grad()
def set_linear(mlp, coefficients, bias=0.0):
    """Makes every network of an MLP the linear function x @ coefficients + bias, as relu(x) - relu(-x)."""
    for p in mlp.parameters():
        p.zero_()
    (first, _), *middle, (last, last_bias) = layers_of(mlp)
    for i, c in coefficients.items():
        first[..., i, 0], first[..., i, 1] = c, -c
    for weight, _ in middle:
        weight[..., 0, 0] = weight[..., 1, 1] = 1
    last[..., 0, :], last[..., 1, :] = 1, -1
    bias = torch.as_tensor(bias)
    last_bias.copy_(bias.view(-1, 1, 1) if last_bias.ndim == 4 else bias)  # one number per critic, or per output


def snapshot(agent):
    """Copies of all parameters and buffers but the optimisers', whose step counters have no seed axis."""
    return {k: x.clone() for k, x in agent.state_dict().items() if "optimizers." not in k}


# ---------------------------------------------------------------------------------------------------------------------
# Bellman targets, the numbers of the spec
# ---------------------------------------------------------------------------------------------------------------------


def test_soft_minimum():
    """0.75 of the smaller and 0.25 of the larger, at every action by itself."""
    q = torch.tensor([[[1.0, 8.0], [5.0, -4.0]]])  # (S, C, B)
    torch.testing.assert_close(bcq.soft_minimum(q, 0.75), torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(bcq.soft_minimum(q, 1.0), torch.tensor([[1.0, -4.0]]))


def bellman_target(next_actions, not_terminated=1.0, biases=(0.0, 0.0), target_offset=0.0, **flags):
    """y of a transition with r = 1.5, gamma = 0.5 and Q_target(s', a') = 3 a'_0 + biases where the decoder gives
    next_actions at s', and 0.9 at s; found from the loss at Q = 0. target_offset: of the target perturbation network,
    before the tanh."""
    args = make_args(learning_rate=0.0, gamma=0.5, batch_size=1, num_next_actions=len(next_actions), **flags)
    agent = make_agent(args)
    set_linear(agent.target_critic, {O: 3.0}, bias=biases)
    set_linear(agent.critic, {})
    set_linear(agent.target_perturbation, {}, bias=[target_offset] * A)
    set_linear(agent.decoder, {O: 1.0})  # tanh of the first latent number, in all dimensions
    batch, posterior_noise, _ = make_batch(B=1)
    batch[..., O + A], batch[..., -1] = 1.5, not_terminated
    noise = torch.tensor([*next_actions, 0.9]).double().atanh().view(1, -1, 1, 1).expand(-1, -1, -1, Z)
    loss = bcq.update(agent, batch, posterior_noise, noise, args)["loss/critic"].item()
    return math.sqrt(loss / 2)


def test_the_best_of_the_next_actions_counts():
    for actions in ((0.1, 0.4, 0.3), (0.4, -0.2), (-0.9, -0.2, 0.1, 0.4)):
        assert bellman_target(actions) == pytest.approx(1.5 + 0.5 * 3 * 0.4)
    assert bellman_target((-0.1, -0.3)) == pytest.approx(1.5 - 0.5 * 3 * 0.1)


def test_next_actions_are_perturbed_and_clipped():
    """... by the target network, up to Phi in either direction; latent numbers are clipped at 0.5 before."""
    assert bellman_target((0.4,), target_offset=50.0) == pytest.approx(1.5 + 1.5 * 0.45)
    assert bellman_target((0.4,), target_offset=-50.0) == pytest.approx(1.5 + 1.5 * 0.35)
    assert bellman_target((0.4,), target_offset=math.atanh(0.5)) == pytest.approx(1.5 + 1.5 * 0.425)
    assert bellman_target((0.4,), target_offset=50.0, max_perturbation=0.9) == pytest.approx(1.5 + 1.5 * 1)
    assert bellman_target((0.8,)) == pytest.approx(1.5 + 1.5 * math.tanh(0.5))
    assert bellman_target((0.8,), latent_clip=9.0) == pytest.approx(1.5 + 1.5 * 0.8)


def test_the_softly_smaller_target_counts():
    for biases in ((4.0, 2.0), (2.0, 4.0)):
        assert bellman_target((0.4,), biases=biases) == pytest.approx(1.5 + 0.5 * (1.2 + 0.75 * 2 + 0.25 * 4))
    assert bellman_target((0.4,), biases=(4.0, 2.0), min_weight=1.0) == pytest.approx(1.5 + 0.5 * (1.2 + 2))


def test_targets_bootstrap_through_truncation_only():
    """y = r at a true end, whatever Q(s') is."""
    assert bellman_target((0.4, 0.1), not_terminated=0.0, biases=(70.0, 70.0)) == pytest.approx(1.5)


# ---------------------------------------------------------------------------------------------------------------------
# The VAE
# ---------------------------------------------------------------------------------------------------------------------


def test_vae_against_torch_distributions():
    """The KL divergence, per latent dimension, and the squared error, per action dimension, at the given noise."""
    args = make_args(num_seeds=2, learning_rate=0.0)
    agent = make_agent(args)
    batch, posterior_noise, noise = make_batch(S=2)
    metrics = bcq.update(agent, batch, posterior_noise, noise, args)
    obs, action = batch[..., :O], batch[..., O : O + A]
    mean, log_std = agent.encoder(obs, action)
    posterior = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(metrics["loss/kl"], kl.mean((1, 2)))
    rebuilt = agent.decoder(obs, posterior.mean + posterior.stddev * posterior_noise)
    torch.testing.assert_close(metrics["loss/reconstruction"], ((rebuilt - action) ** 2).mean((1, 2)))
    assert rebuilt.abs().max() <= 1 and mean.shape == (2, 32, Z)


def test_a_standard_normal_posterior_costs_nothing():
    agent = make_agent(make_args(learning_rate=0.0))
    set_linear(agent.encoder, {})
    assert bcq.update(agent, *make_batch(), make_args())["loss/kl"].item() == 0
    set_linear(agent.encoder, {}, bias=[-99.0] * 2 * Z)  # mean -99; the deviation stays at e^-4
    kl = bcq.update(agent, *make_batch(), make_args())["loss/kl"].item()
    assert kl == pytest.approx(0.5 * (99**2 + math.exp(-8) - 1 + 8))


# ---------------------------------------------------------------------------------------------------------------------
# The whole update against numpy: forward, hand-derived gradients, Adam, order, targets
# ---------------------------------------------------------------------------------------------------------------------


class NumpyBCQ:
    """One seed of BCQ in numpy, float64, written from the equations: one next action at a time."""

    def __init__(self, agent, s, args):
        def layers(name, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(agent_nets[name])]

        agent_nets = {name: getattr(agent, name) for name in NETWORKS}
        self.args, self.moments, self.seen = args, {}, {name: [] for name in "log_std z moved best gap".split()}
        self.nets = {name: layers(name) for name in NETWORKS if "critic" not in name}
        for c in range(2):
            self.nets |= {f"critic{c}": layers("critic", c), f"target_critic{c}": layers("target_critic", c)}

    def adam(self, name, grads):
        stepped = []
        for i, pair in enumerate(zip(self.nets[name], grads)):
            new = []
            for j, (p, g) in enumerate(zip(*pair)):
                m, v, t = self.moments.get((name, i, j), (0.0, 0.0, 0))
                m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
                self.moments[name, i, j] = m, v, t
                step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                new.append(p - self.args.learning_rate * step)
            stepped.append(tuple(new))
        self.nets[name] = stepped

    def vae_step(self, s, a, noise):
        B, weight = len(s), self.args.kl_weight
        out, encoder_inputs = forward(self.nets["encoder"], np.c_[s, a])
        mean, raw = out[:, :Z], out[:, Z:]
        std = np.exp(np.clip(raw, -4, 15))
        out, decoder_inputs = forward(self.nets["decoder"], np.c_[s, mean + std * noise])
        rebuilt = np.tanh(out)
        kl = -0.5 * (1 + np.log(std**2) - mean**2 - std**2)
        grad = 2 * (rebuilt - a) / (B * A) * (1 - rebuilt**2)
        decoder_grads, grad = backward(self.nets["decoder"], decoder_inputs, grad)
        grad_z = grad[:, O:]
        grad_mean = grad_z + weight * mean / (B * Z)
        grad_raw = (grad_z * std * noise + weight * (std**2 - 1) / (B * Z)) * ((raw > -4) & (raw < 15))
        encoder_grads, _ = backward(self.nets["encoder"], encoder_inputs, np.c_[grad_mean, grad_raw])
        self.adam("encoder", encoder_grads)
        self.adam("decoder", decoder_grads)
        self.seen["log_std"].append(raw)
        return np.mean((rebuilt - a) ** 2), np.mean(kl)

    def perturbed(self, name, s, z):
        """The decoder's action, moved by a perturbation network; whether it stays inside, and what backward needs."""
        likely = np.tanh(forward(self.nets["decoder"], np.c_[s, np.clip(z, *self.clip)])[0])
        out, inputs = forward(self.nets[name], np.c_[s, likely])
        moved = likely + self.args.max_perturbation * np.tanh(out)
        self.seen["z"].append(z), self.seen["moved"].append(moved)
        return np.clip(moved, -1, 1), np.abs(moved) < 1, np.tanh(out), inputs

    def update(self, batch, posterior_noise, noise):
        args, B = self.args, len(batch)
        self.clip = -args.latent_clip, args.latent_clip
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        reconstruction, kl = self.vae_step(s, a, posterior_noise)

        values = []
        for k in range(K):
            action = self.perturbed("target_perturbation", s_next, noise[k])[0]
            q = [forward(self.nets[f"target_critic{c}"], np.c_[s_next, action])[0] for c in range(2)]
            values.append(args.min_weight * np.minimum(*q) + (1 - args.min_weight) * np.maximum(*q))
            self.seen["gap"].append(q[0] - q[1])
        y = r + args.gamma * mask * np.max(values, 0)
        self.seen["best"].append(np.argmax(values, 0))
        critic_loss = 0
        for c in range(2):
            q, inputs = forward(self.nets[f"critic{c}"], np.c_[s, a])
            critic_loss += np.mean((q - y) ** 2)
            self.adam(f"critic{c}", backward(self.nets[f"critic{c}"], inputs, 2 * (q - y) / B)[0])

        action, inside, tanh, inputs = self.perturbed("perturbation", s, noise[K])
        q, q_inputs = forward(self.nets["critic0"], np.c_[s, action])
        _, grad = backward(self.nets["critic0"], q_inputs, np.full((B, 1), -1 / B))
        grad = grad[:, O:] * inside * args.max_perturbation * (1 - tanh**2)
        self.adam("perturbation", backward(self.nets["perturbation"], inputs, grad)[0])

        for name in ("perturbation", "critic0", "critic1"):
            pairs = zip(self.nets[f"target_{name}"], self.nets[name])
            rho = args.polyak
            moved = [tuple((1 - rho) * old + rho * new for old, new in zip(*pair)) for pair in pairs]
            self.nets[f"target_{name}"] = moved
        return reconstruction, kl, critic_loss, -np.mean(q)


def test_update_against_numpy():
    """Six updates of two seeds, in float64, with steps large enough that every question of order shows."""
    flags = {"learning_rate": 0.02, "polyak": 0.3, "gamma": 0.9, "max_perturbation": 0.6, "kl_weight": 0.3}
    args = make_args(num_seeds=2, min_weight=0.7, latent_clip=0.8, **flags)
    agent = make_agent(args, spread=0.6)
    references = [NumpyBCQ(agent, s, args) for s in range(2)]
    for n in range(6):
        inputs = make_batch(S=2, seed=n)
        metrics = bcq.update(agent, *inputs, args)
        for s, reference in enumerate(references):
            losses = reference.update(*(x[s].numpy() for x in inputs))
            ours = [metrics[f"loss/{name}"][s].item() for name in ("reconstruction", "kl", "critic", "actor")]
            np.testing.assert_allclose(ours, losses, rtol=1e-9)
    for s, reference in enumerate(references):
        seen = {name: np.concatenate(x) for name, x in reference.seen.items()}  # every branch is taken
        assert seen["log_std"].min() < -4 < seen["log_std"].max() and set(np.unique(seen["best"])) == set(range(K))
        assert 0 < np.mean(np.abs(seen["z"]) > 0.8) < 1 and 0 < np.mean(np.abs(seen["moved"]) > 1) < 1
        assert seen["gap"].min() < 0 < seen["gap"].max()
        for name, expected in reference.nets.items():
            mlp, lead = getattr(agent, name.rstrip("01")), (int(name[-1]),) if name[-1] in "01" else ()
            for ours, theirs in zip(layers_of(mlp), expected):
                for x, y in zip(ours, theirs):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-9, err_msg=name)


def test_each_optimiser_owns_its_networks():
    """Targets are in no optimiser, no parameter is in two; targets start as the online networks."""
    agent = bcq.BCQAgent(O, A, make_args(num_seeds=2), CPU)
    owners = {"vae": ("encoder", "decoder"), "critic": ("critic",), "perturbation": ("perturbation",)}
    assert set(agent.optimizers) == set(owners)
    for name, networks in owners.items():
        owned = [id(p) for network in networks for p in getattr(agent, network).parameters()]
        assert [id(p) for p in agent.optimizers[name].params] == owned
    for name in ("critic", "perturbation"):
        for frozen, online in zip(getattr(agent, f"target_{name}").parameters(), getattr(agent, name).parameters()):
            assert not frozen.requires_grad and torch.equal(frozen, online) and frozen.data_ptr() != online.data_ptr()


def test_losses_leave_other_networks_alone():
    """The order of the three losses, and that each reaches its own networks only: none the targets, the actor's neither
    critics nor the VAE."""
    args, gradients = make_args(), {}
    agent = make_agent(args).requires_grad_()  # targets too: only the code keeps gradients away from them

    class Recorder:
        """Stands in for an optimiser: notes which networks its loss depends on, and steps nothing."""

        def __init__(self, name):
            self.name = name

        def minimize(self, loss):
            loss.backward()
            gradients[self.name] = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
            agent.zero_grad()

    del agent.optimizers
    agent.optimizers = {name: Recorder(name) for name in ("vae", "critic", "perturbation")}
    bcq.update(agent, *make_batch(), args)
    expected = {"vae": {"encoder", "decoder"}, "critic": {"critic"}, "perturbation": {"perturbation"}}
    assert gradients == expected and list(gradients) == list(expected)


def test_sizes_and_initial_weights():
    """BCQ's: 400-300 and 750-750, a latent vector twice as long as the action; uniform on +-1/sqrt(in)."""
    agent = bcq.BCQAgent(11, 3, bcq.Args(), CPU)
    sizes = {name: [w.shape[-2] for w, _ in layers_of(getattr(agent, name))] for name in NETWORKS[:4]}
    assert sizes == {
        "encoder": [14, 750, 750],
        "decoder": [17, 750, 750],
        "perturbation": [14, 400, 300],
        "critic": [14, 400, 300],
    }
    assert [layers_of(getattr(agent, n))[-1][1].shape for n in NETWORKS[:4]] == [(1, 1, n) for n in (12, 3, 3)] + [
        (1, 2, 1, 1)
    ]
    assert agent.eval_noise.shape == (1, 100, 6)
    for name in NETWORKS[:4]:
        for weight, bias in layers_of(getattr(agent, name)):
            bound = weight.shape[-2] ** -0.5
            for x in (weight, bias):
                assert x.abs().max() <= bound
                if x.numel() > 500:
                    assert x.abs().max() > 0.98 * bound and x.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------------


def test_best_action_by_hand():
    actions = torch.arange(12.0).view(1, 3, 2, 2)  # three actions at two states
    q = torch.tensor([[[0.0, 5.0], [2.0, 4.0], [1.0, 6.0]]])
    assert bcq.best_action(actions, q).tolist() == [[[4.0, 5.0], [10.0, 11.0]]]


@pytest.mark.parametrize("s", [0, 1])
def test_the_policy_against_numpy(s):
    """The candidate of highest Q_1, from a loop over states and candidates; alone as among other seeds."""
    args = make_args(num_seeds=2, max_perturbation=0.4)
    agent, reference = make_agent(args), NumpyBCQ(make_agent(args), s, args)
    reference.clip = -0.5, 0.5
    rng = np.random.default_rng(3)
    obs, noise = torch.from_numpy(rng.normal(size=(2, 14, O))), torch.from_numpy(rng.normal(size=(2, 7, Z)))
    expected, chosen, by_second = [], set(), []
    for x in obs[s].numpy():
        actions = [reference.perturbed("perturbation", x[None], z[None])[0] for z in noise[s].numpy()]
        q = [[forward(reference.nets[f"critic{c}"], np.c_[x[None], a])[0].item() for a in actions] for c in range(2)]
        chosen.add(int(np.argmax(q[0])))
        expected.append(actions[np.argmax(q[0])][0]), by_second.append(actions[np.argmax(q[1])][0])
    assert len(chosen) > 1 and not np.allclose(expected, by_second)
    np.testing.assert_allclose(agent.actor.sample(obs, noise)[s].detach(), expected, atol=1e-12)
    alone = bcq.policy_of_seed(agent.actor, s)
    torch.testing.assert_close(alone.sample(obs[s : s + 1], noise[s : s + 1])[0], agent.actor.sample(obs, noise)[s])
    torch.testing.assert_close(alone.act(obs[s : s + 1])[0], agent.actor.act(obs)[s])
    agent.eval_noise.copy_(noise)
    torch.testing.assert_close(agent.actor.act(obs), agent.actor.sample(obs, noise))


def test_evaluations_are_reproducible():
    """The evaluated policy is a function of the state: again, out of a pickle as workers get it, after a state dict,
    in other company; and training moves it, but not its candidates' noise."""
    args = make_args(num_seeds=2)
    agent = make_agent(args, double=False)
    obs = torch.randn(2, 6, O, generator=torch.Generator().manual_seed(1))
    first = agent.actor.act(obs)
    torch.randn(5)
    assert torch.equal(agent.actor.act(obs), first)
    policy = bcq.policy_of_seed(agent.actor, 1)
    assert torch.equal(pickle.loads(pickle.dumps(policy)).act(obs[1:]), policy.act(obs[1:]))
    torch.testing.assert_close(policy.act(obs[1:, 2:3]), first[1:, 2:3])
    other = bcq.BCQAgent(O, A, make_args(num_seeds=2, seed=9), CPU)
    assert not torch.equal(other.eval_noise, agent.eval_noise)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.actor.act(obs), first)
    actor, noise = agent.actor, agent.eval_noise.clone()
    bcq.update(agent, *(x.float() for x in make_batch(S=2)), args)
    assert not torch.equal(actor.act(obs), first) and torch.equal(actor.act(obs), agent.actor.act(obs))
    assert torch.equal(agent.eval_noise, noise)


# ---------------------------------------------------------------------------------------------------------------------
# Learning: stay where the data is, take the best there, look ahead
# ---------------------------------------------------------------------------------------------------------------------


def learned_policy(**flags):
    """Actions of two seeds in the first state, and Q_1 of the action 0.5, after 300 updates on a log of actions between
    -0.5 and 0.5.

    The first action a costs 0.5 a; the second step pays 2 a, whatever is done there, and is the end, at an observation
    that looks like the first. So Q(first, a) = (2 gamma - 0.5) a: best in the data is a = 0.5, and a = -0.5 for one who
    does not look ahead; a critic that was asked anything would like a = 1.
    """
    defaults = {"hidden_sizes": (32, 32), "vae_hidden_sizes": (32, 32), "num_seeds": 2, "learning_rate": 5e-3}
    args = make_args(**{**defaults, "polyak": 0.05, "batch_size": 64, "kl_weight": 0.02, "latent_clip": 2.0, **flags})
    a, b = np.random.default_rng(0).uniform(-0.5, 0.5, size=(2, 4000, 1))
    zero, one = np.zeros_like(a), np.ones_like(a)
    first = np.concatenate([one, zero, a, -0.5 * a, zero, a, one], 1)  # s = (is first, last action), a, r, s', mask
    second = np.concatenate([zero, a, b, 2 * a, one, zero, zero], 1)
    transitions = torch.from_numpy(np.float32(np.concatenate([first, second])))
    agent, generator = bcq.BCQAgent(2, 1, args, CPU), torch.Generator().manual_seed(0)
    for _ in range(300):
        index = torch.randint(len(transitions), (2, 64), generator=generator)
        noise = torch.randn(2, 64, 2, generator=generator), torch.randn(2, K + 1, 64, 2, generator=generator)
        bcq.update(agent, transitions[index], *noise, args)
    start = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    with torch.no_grad():
        action = agent.actor.sample(start, torch.randn(2, 100, 2, generator=generator))
        q = agent.critic(torch.cat([start, torch.full((2, 1, 1), 0.5)], -1))[:, 0]
    return action.flatten(), q.flatten()


def test_bcq_looks_ahead_and_stays_in_the_data():
    action, q = learned_policy()
    assert action.min() > 0.3 and action.max() < 0.6, action
    torch.testing.assert_close(q, torch.full((2,), 0.5 * (2 * 0.99 - 0.5)), rtol=0, atol=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_another_seeds_batch_changes_nothing():
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    args, states = make_args(num_seeds=2, learning_rate=0.01), []
    for factor in (1.0, 3.0):
        agent = make_agent(args)
        for n in range(5):
            inputs = make_batch(S=2, seed=n)
            for x in inputs:
                x[1] *= factor
            bcq.update(agent, *inputs, args)
        states.append(snapshot(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        assert torch.equal(states[0][name][1], states[1][name][1]) == (name == "eval_noise"), name


# ---------------------------------------------------------------------------------------------------------------------
# Online data in batches
# ---------------------------------------------------------------------------------------------------------------------


def test_union_rows():
    """Uniform over 40 offline rows and the 10 filled ones of the own 25, which begin at 40 and 65; 0.5 is row 25."""
    u = torch.rand(400, 2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = bcq.union_rows(u, t=10, num_offline=40, num_steps=25)
    for s, begin in ((0, 40), (1, 65)):
        values, counts = rows[:, s].unique(return_counts=True)
        assert values.tolist() == [*range(40), *range(begin, begin + 10)]
        assert 300 < counts.min() and counts.max() < 500  # 400 each, deviation 20
    assert bcq.union_rows(torch.tensor([[[0.5]]], dtype=torch.float64), 10, 40, 25).item() == 25
    assert bcq.union_rows(u, t=0, num_offline=40, num_steps=25).max() == 39


def test_a_step_pays_for_an_update():
    """The default: as many updates as steps, in blocks of 1,000; the tenfold first block is a flag."""
    assert [bcq.updates_after(t, bcq.Args()) for t in (0, 999, 1000, 2999, 250_000)] == [0, 0, 1000, 2000, 250_000]
    assert bcq.updates_after(2000, bcq.Args(first_updates=10_000)) == 11_000


# ---------------------------------------------------------------------------------------------------------------------
# Runs of both stages
# ---------------------------------------------------------------------------------------------------------------------

# offline 70 updates; online 2 epochs of 40 steps with 120 and 30 updates
SMALL = "--hidden-sizes", 8, "--vae-hidden-sizes", 8, "--batch-size", 8, "--num-candidates", 5, "--device", "cpu"
SMALL += "--eval-workers", 0, "--eval-every", 40, "--eval-episodes", 1, "--log-every", 25, "--num-updates", 70
ONLINE = "--steps-per-epoch", 40, "--first-updates", 120, "--updates-per-epoch", 30, "--online-eval-every", 40
TWO = "--num-seeds", 2, "--seed", 3


def main(*flags):
    """bcq's main() in this process, whose signal handlers are put back afterwards; returns its exit status."""
    handlers, argv = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, sys.argv
    minari_path = os.environ.get("MINARI_DATASETS_PATH")
    sys.argv = ["bcq.py", *map(str, flags)]
    try:
        bcq.main()
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
        os.environ.pop("MINARI_DATASETS_PATH", None)
        if minari_path is not None:
            os.environ["MINARI_DATASETS_PATH"] = minari_path
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


def assert_same_end(run_dir, reference, evaluations=True):
    """Bit-identical weights, targets, optimisers, generators, replay; the same evaluations.csv."""
    ours, theirs = tensors(load(run_dir)), tensors(load(reference))
    assert ours.keys() == theirs.keys()
    equal = {k: torch.equal(x, theirs[k]) if isinstance(x, torch.Tensor) else x == theirs[k] for k, x in ours.items()}
    assert all(equal.values()), [k for k in equal if not equal[k]]
    if evaluations:
        assert (Path(run_dir) / "evaluations.csv").read_text() == (Path(reference) / "evaluations.csv").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.write_minari(tmp_path_factory.mktemp("data") / "hopper", harness.hopper_episodes())


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of a run of both stages that was never stopped."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert main("--dataset", data, *SMALL, *ONLINE, *TWO, "--online-steps", 75, "--run-dir", run_dir) is None
    return run_dir


def test_both_stages_in_the_curves(unbroken):
    """Evaluations go on counting from updates to steps, once per update or step and seed; each seed has its replay."""
    evaluations = harness.read_evaluations(unbroken)
    assert evaluations["update"].tolist() == [n for n in (40, 70, 110, 150) for _ in range(2)]
    checkpoint = load(unbroken)
    assert (checkpoint["t"], checkpoint["num_updates"], checkpoint["offline_updates"]) == (80, 220, 70)
    assert checkpoint["replay"].shape == (2, 80, 2 * 11 + 3 + 2) and not checkpoint["pending_evaluations"]
    assert not torch.equal(*checkpoint["replay"])
    assert checkpoint["agent"]["optimizers.vae.num_steps"] == 220


def test_going_online_later(data, unbroken, tmp_path, capsys):
    """A run that ended offline, before that even in the middle of a block, and went online by --resume ends like one
    that did both at once; it can be evaluated."""
    flags = "--dataset", data, *SMALL, *ONLINE, *TWO, "--run-dir", tmp_path / "run"
    assert main(*flags, "--num-updates", 37) is None and load(tmp_path / "run")["num_updates"] == 37
    assert main("--resume", tmp_path / "run", "--num-updates", 70) is None
    assert main("--resume", tmp_path / "run", "--online-steps", 40) is None
    assert main("--resume", tmp_path / "run", "--online-steps", 80) is None
    assert_same_end(tmp_path / "run", unbroken, evaluations=False)
    ours, theirs = ((Path(run) / "evaluations.csv").read_text().splitlines() for run in (tmp_path / "run", unbroken))
    assert [line for line in ours if not line.startswith("37,")] == theirs
    capsys.readouterr()
    assert main("--evaluate", tmp_path / "run") is None
    first = capsys.readouterr().out
    assert main("--evaluate", tmp_path / "run") is None
    assert capsys.readouterr().out == first and [line[:7] for line in first.splitlines()] == ["seed 3:", "seed 4:"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import harness
bcq, (run_dir, *flags) = harness.load("bcq"), sys.argv[1:]
bcq.make_env({"id": "Hopper-v5", "kwargs": {}}).close()  # imported once for all
path, rng = Path(run_dir) / "checkpoint.pt", random.Random(5)

def start(argv, name="", kill_in_call=None):
    pid = os.fork()
    if pid == 0:
        calls, owner = iter(range(1, 10**6)), bcq.Interaction if name == "step" else bcq
        function = getattr(owner, name, None)
        def killed(*inputs):
            if next(calls) == kill_in_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*inputs)
        if name:
            setattr(owner, name, killed)
        sys.argv = [bcq.__file__, *argv]
        try:
            bcq.main()
        finally:
            sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
    return pid

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def where():
    checkpoint = bcq.load_checkpoint(run_dir, "cpu")
    return checkpoint["num_updates"], checkpoint["t"]

resume = ["--resume", run_dir]
assert end(start([*flags, "--run-dir", run_dir], "update", 60)) == -9 and where() == (50, 0), where()
assert end(start(resume, "step", 1)) == -9 and where() == (70, 0), where()
assert end(start(resume, "step", 15)) == -9 and where() == (70, 0), where()
assert end(start(resume, "update", 45)) == -9 and where() == (100, 40), where()
# after the epoch's evaluation is written, back to the middle of the epoch: it is not written twice
assert end(start(resume, "step", 5)) == -9 and where() == (150, 40), where()
pid, before = start(resume), path.stat().st_mtime_ns
while path.stat().st_mtime_ns == before:
    time.sleep(0.001)
time.sleep(rng.uniform(0, 0.05))
os.kill(pid, signal.SIGKILL)
assert end(pid) in (-9, 0) and where()[0] > 150
assert end(start(resume)) == 0 and where() == (220, 80)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_in_both_stages(data, unbroken, tmp_path):
    """kill -9 offline, in the first and a later online step, in the updates after these, in the next epoch, and at a
    random moment: the end is the same, bit by bit."""
    flags = "--dataset", data, *SMALL, *ONLINE, *TWO, "--online-steps", 75, "--checkpoint-every", 50
    command = [sys.executable, "-c", KILLED, tmp_path / "run", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(tmp_path / "run", unbroken)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["script"] == "bcq"


@pytest.mark.parametrize(
    "name, call, where",
    [
        ("update", 65, (70, 0)),  # together with the end of the stage
        ("step", 55, (190, 55)),  # in the middle of an epoch's steps
        ("step", 80, (190, 80)),  # with the last of them
        ("update", 188, (190, 40)),  # with the end of an epoch's updates
    ],
)
def test_a_stop_saves_soon_and_resumes_exactly(data, unbroken, name, call, where, monkeypatch, tmp_path, capsys):
    """A stop in the middle of an epoch of steps saves at once; updates end where something is due, or after ten."""
    owner = bcq.Interaction if name == "step" else bcq
    function, calls = getattr(owner, name), itertools.count(1)

    def stopping(*inputs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # until the handler has run
                time.sleep(0.001)
        return function(*inputs)

    flags = "--dataset", data, *SMALL, *ONLINE, *TWO, "--online-steps", 75, "--run-dir", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        assert main(*flags) == 128 + signal.SIGTERM
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped at") and f"--resume {tmp_path}" in last
    checkpoint = load(tmp_path / "run")
    assert (checkpoint["num_updates"], checkpoint["t"]) == where
    assert main("--resume", tmp_path / "run") is None
    assert_same_end(tmp_path / "run", unbroken)


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


LOGGED = "--hidden-sizes", 8, "--vae-hidden-sizes", 8, "--batch-size", 8, "--device", "cpu", "--eval-episodes", 0
LOGGED += "--num-updates", 50, "--steps-per-epoch", 20, "--first-updates", 30, "--updates-per-epoch", 20


def test_saved_online_data_is_what_the_environment_saw(logged_data, tmp_path):
    """Every episode in order, in the environment's own units; terminations and truncations apart, as in the mask that
    learning sees; observations and rewards in the replay are the environment's."""
    LoggedEnv.logs.clear()
    flags = "--dataset", logged_data, *LOGGED, "--online-steps", 60, "--save-online", tmp_path / "online"
    assert main(*flags, "--run-dir", tmp_path / "run") is None
    (log,) = [[e for e in log if e] for log in LoggedEnv.logs if sum(map(len, log)) == 60]
    back = bcq.load_dataset([str(tmp_path / "online")])
    assert back.episode_lengths.tolist() == [len(steps) for steps in log]
    assert back.environment["id"] == "harness/Logged-v0"
    obs, action, reward, next_obs = (np.array(x) for x in zip(*(step for steps in log for step in steps)))
    ends = [is_termination(number, len(steps)) for number, steps in enumerate(log, 1)]
    assert any(ends) and not all(ends)
    mask = np.concatenate([np.r_[np.ones(len(steps) - 1), 1 - end] for steps, end in zip(log, ends)])
    np.testing.assert_allclose(back.transitions, np.c_[obs, action, reward, next_obs, mask], atol=1e-5)
    bcq.fit_to_environment(back)
    np.testing.assert_allclose(load(tmp_path / "run")["replay"][0], back.transitions, atol=1e-5)


def test_online_steps_take_the_best_of_fresh_candidates(logged_data, monkeypatch, tmp_path):
    """The policy's own sample, with other noise at every step and for every seed, never the noise of evaluations."""
    sample, seen = bcq.BestCandidate.sample, []

    def recorder(actor, obs, noise):
        seen.append((noise, actor.eval_noise.clone(), sample(actor, obs, noise)))
        return seen[-1][-1]

    monkeypatch.setattr(bcq.BestCandidate, "sample", recorder)
    flags = "--dataset", logged_data, *LOGGED, "--num-seeds", 2, "--online-steps", 40
    assert main(*flags, "--run-dir", tmp_path / "run") is None
    noise, eval_noise, action = (torch.stack(x) for x in zip(*seen))
    assert noise.shape == (40, 2, 100, 4) and eval_noise.shape == noise.shape
    assert len(noise.view(80, -1).unique(dim=0)) == 80 and not torch.isin(noise, eval_noise).any()
    assert noise.mean().abs() < 0.03 and noise.std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(load(tmp_path / "run")["replay"][..., 3:5], action[:, :, 0].transpose(0, 1))


def test_what_each_stage_draws(data, monkeypatch, tmp_path):
    """Offline every logged row; online all of these and the seed's own steps so far, with the same chance each. An
    epoch that ends where no evaluation is due has none."""
    run_updates, drawn, tables = bcq.run_updates, [], []

    def drawing(agent, transitions, args, index, *noise):
        drawn.append(index), tables.append(transitions)
        return run_updates(agent, transitions, args, index, *noise)

    monkeypatch.setattr(bcq, "run_updates", drawing)
    flags = *SMALL, "--batch-size", 64, "--num-updates", 60, "--num-seeds", 2, "--online-eval-every", 200
    flags += "--online-steps", 150, "--steps-per-epoch", 100, "--first-updates", 80, "--updates-per-epoch", 60
    assert main("--dataset", data, *flags, "--run-dir", tmp_path / "run") is None
    drawn, N = torch.cat(drawn), 285
    assert drawn.shape == (200, 2, 64) and drawn[:60].unique().tolist() == list(range(N))
    for s in range(2):
        for t, index in ((100, drawn[60:140, s]), (200, drawn[140:, s])):
            assert index[index >= N].unique().tolist() == list(range(N + 200 * s, N + 200 * s + t))
            assert (index >= N).double().mean().item() == pytest.approx(t / (N + t), abs=0.03)
        assert drawn[60:, s][drawn[60:, s] < N].unique().tolist() == list(range(N))
    assert torch.equal(tables[-1][N:].view(2, 200, -1), load(tmp_path / "run")["replay"])
    assert sorted(set(harness.read_evaluations(tmp_path / "run")["update"])) == [40, 60, 260]


def test_seed_k_among_three_is_the_run_with_seed_k(logged_data, monkeypatch, tmp_path):
    """Through main(): the same first weights and draws, the same agents after 50 updates and after going online; to
    float tolerance, as batched products round differently."""
    update, runs = bcq.update, {}

    def recorder(agent, batch, posterior_noise, noise, args):
        record = runs.setdefault((args.seed, args.num_seeds), {"draws": [], "first": snapshot(agent)})
        draws = torch.cat([x.flatten(1) for x in (batch, posterior_noise, noise)], 1)
        record["draws"].append(draws)
        metrics = update(agent, batch, posterior_noise, noise, args)
        if len(record["draws"]) == 50:
            record["last"] = snapshot(agent)
        return metrics

    monkeypatch.setattr(bcq, "update", recorder)
    flags = "--dataset", logged_data, *LOGGED, "--online-steps", 20, "--learning-rate", 0.003
    for seed, num_seeds in (5, 3), (5, 1), (7, 1):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        assert main(*flags, "--seed", seed, "--num-seeds", num_seeds, "--run-dir", run_dir) is None
    together, three = load(tmp_path / "5-3"), runs[5, 3]
    assert len(three["draws"]) == 80
    for k in 0, 2:
        alone, one = load(tmp_path / f"{5 + k}-1"), runs[5 + k, 1]
        assert all(torch.equal(x[k], y[0]) for x, y in zip(three["draws"][:50], one["draws"][:50]))
        assert not torch.equal(three["draws"][0][k], three["draws"][0][1])
        for name in three["first"]:
            assert torch.equal(three["first"][name][k], one["first"][name][0]), name
            torch.testing.assert_close(three["last"][name][k], one["last"][name][0], rtol=1e-3, atol=1e-4)
            end = together["agent"][name][k], alone["agent"][name][0]
            torch.testing.assert_close(*end, rtol=1e-3, atol=1e-3)
            if name != "eval_noise":
                assert not torch.equal(three["first"][name][k], three["last"][name][k])
        torch.testing.assert_close(together["replay"][k], alone["replay"][0], rtol=1e-3, atol=1e-3)
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
        ("--min-weight", 1.1),
        ("--max-perturbation", -0.1),
        ("--kl-weight", "nan"),
        ("--latent-clip", -1),
        ("--num-next-actions", 0),
        ("--num-candidates", 0),
        ("--vae-hidden-sizes", 0),
        ("--steps-per-epoch", 0),
        ("--online-steps", -1),
    ],
)
def test_flags_out_of_range(refuses, data, flag, value):
    refuses("--dataset", data, *SMALL, flag, value, words=[flag])


def test_other_errors(refuses, unbroken, data, tmp_path, capsys):
    """An existing folder for the online data, or none to come; a dataset without environment; flags that a run that
    is online cannot change."""
    online = "--online-steps", 40
    refuses("--dataset", data, *SMALL, *online, "--save-online", data, words=[data])
    refuses("--dataset", data, *SMALL, "--save-online", tmp_path / "none", words=["--online-steps"])
    nowhere = harness.write_minari(tmp_path / "m", harness.hopper_episodes(), env_spec=None)
    refuses("--dataset", nowhere, *SMALL, *online, "--eval-episodes", 0, words=["--env-id"])
    config = (unbroken / "config.json").read_text()
    for flag, value in ("--online-steps", 40), ("--num-updates", 200), ("--num-updates", 50), ("--latent-clip", 1):
        capsys.readouterr()
        assert main("--resume", unbroken, flag, value) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and flag in line and str(unbroken) in line
        assert (unbroken / "config.json").read_text() == config


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_updates_equal_eager_ones():
    """A CUDA graph of ten updates, replayed twice, gives what twenty eager updates give; capturing leaves no trace."""
    args = make_args(num_seeds=2, learning_rate=1e-3)
    transitions = make_batch(B=500)[0][0].float().cuda()
    generators = [torch.Generator("cuda").manual_seed(s) for s in range(2)]
    sampler = partial(bcq.union_rows, t=0, num_offline=500, num_steps=0)
    block = bcq.draw_block(sampler, generators, 32, (32, Z), (K + 1, 32, Z))
    agents = [make_agent(args, double=False, device="cuda") for _ in range(2)]
    learn = [partial(bcq.run_updates, agent, transitions, args) for agent in agents]
    before = {name: x.clone() for name, x in agents[0].state_dict().items()}
    graph = bcq.cuda_graph(learn[0], agents[0], *(x[:10] for x in block))
    assert all(torch.equal(x, before[name]) for name, x in agents[0].state_dict().items())
    for i in (0, 10):
        captured, eager = graph(*(x[i : i + 10] for x in block)), learn[1](*(x[i : i + 10] for x in block))
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-4, atol=1e-5)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-3, atol=1e-4)
