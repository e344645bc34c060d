"""offline_dqn_atari.py, ensemble_dqn_atari.py and qrdqn_atari.py against numpy and numbers by hand:
network, optimisers, losses, whole updates, targets, seeds, resume, learning.

The loader has its own tests in test_atari_data.py.
"""

import json
import math
import os
import pickle
import random
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
from test_atari_data import CircularMemory, make_episodes

def noise_of(module, args, seed=0):
    return ()


SCRIPTS = "offline_dqn_atari", "ensemble_dqn_atari", "qrdqn_atari"
dqn, ensemble, qr = map(harness.load, SCRIPTS)
every_script = pytest.mark.parametrize("script", SCRIPTS)

CPU = torch.device("cpu")
A = 3  # actions of the small agents below


def make_args(module, **flags):
    small = {"channels": (2, 3, 2), "hidden_size": 5, "batch_size": 3}
    heads = {} if module is dqn else {"num_heads": 4}
    return module.Args(**{**small, **heads, **flags})


def make_agent(module, args, spread=None, device="cpu"):
    """The script's agent. With `spread`, all parameters are drawn anew, so that targets and online networks differ."""
    agent = (module.DQNAgent if module is dqn else module.MultiHeadAgent)(A, args, torch.device(device))
    if spread:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in agent.parameters():
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return agent


def make_batch(S=1, B=3, seed=0):
    """obs, action, reward, next_obs, not_terminal: random frames, a third of the transitions terminal."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (S, B, 5, 84, 84), dtype=np.uint8)
    action, reward = rng.integers(0, A, (S, B)), rng.choice([-1.0, 0.0, 1.0], (S, B))
    mask = np.float32(np.arange(B) % 3 > 0) * np.ones((S, 1), np.float32)
    frames, action, reward, mask = map(torch.from_numpy, (frames, action, np.float32(reward), mask))
    return frames[:, :, :4], action, reward, frames[:, :, 1:], mask




def state_of(agent):
    """A copy of the state dict without the optimisers' step counters, which have no seed axis."""
    return {name: x.clone() for name, x in agent.state_dict().items() if not name.endswith("num_steps")}


def layers_of(network):
    """[(weight, bias), ...] of a network."""
    return [(getattr(network, f"weight{i}"), getattr(network, f"bias{i}")) for i in range(5)]


@torch.no_grad()
def set_constant(network, values):
    """Makes a network return values (A, K) for every state."""
    for p in network.parameters():
        p.zero_()
    network.bias4.copy_(torch.as_tensor(values).flatten().expand_as(network.bias4))


def main_of(monkeypatch, module, *flags):
    """main() in this process; the process's signal handlers are put back afterwards."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    try:
        module.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@pytest.fixture
def run_main(monkeypatch):
    """run_main(module, *flags)"""
    return partial(main_of, monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A log of random play, 402 rows in seven files."""
    folder = tmp_path_factory.mktemp("log") / "Pong" / "1" / "replay_logs"
    CircularMemory(folder).log(make_episodes())
    return folder


SMALL = "--channels", 2, 3, 2, "--hidden-size", 8, "--batch-size", 4, "--device", "cpu"
BLIND = *SMALL, "--eval-episodes", 0


def small_flags(script):
    return () if script == "offline_dqn_atari" else ("--num-heads", 4)


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same_checkpoint(run_dir, reference):
    """Bit-identical weights, targets, optimisers, generators; the same update."""
    ours, theirs = checkpoint_of(run_dir), checkpoint_of(reference)
    assert ours["num_updates"] == theirs["num_updates"] and ours["agent"].keys() == theirs["agent"].keys()
    assert not [name for name in ours["agent"] if not torch.equal(ours["agent"][name], theirs["agent"][name])]
    assert all(torch.equal(a, b) for a, b in zip(ours["generators"], theirs["generators"], strict=True))


@every_script
def test_defaults(script):
    """13.3: those of the paper and its code, in updates where they count agent steps."""
    args = vars(harness.load(script).Args())
    expected = {
        "gamma": 0.99, "batch_size": 32, "learning_rate": 5e-5, "optimizer_eps": 3.125e-4, "target_every": 2_000,
        "optimizer_style": "tensorflow", "padding": "same", "channels": (32, 64, 64), "hidden_size": 512,
        "num_updates": 12_500_000, "eval_every": 62_500, "window_updates": 62_500,
    }  # fmt: skip
    expected |= {"optimizer": "adam"} if script == "offline_dqn_atari" else {"num_heads": 200}
    expected |= {"averaged_target": False} if script == "ensemble_dqn_atari" else {}
    assert {name: args[name] for name in expected} == expected


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_heads, padding, expected", [(1, "same", 4_052_658), (1, "valid", 1_693_362), (200, "same", 5_890_224)]
)
def test_number_of_parameters(num_heads, padding, expected):
    """13.2, for 18 actions."""
    args, generators = dqn.Args(padding=padding), [torch.Generator().manual_seed(0)]
    network = dqn.NatureNetwork((1,), 18, num_heads, lambda *_: None, generators, args)
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network.weight3.shape == (1, 7744 if padding == "same" else 3136, 512)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("lead", [(1,), (2,), (2, 3)])
def test_network(padding, lead):
    """Every network beside the others is what torch.nn's layers compute, with TensorFlow's padding, channels last."""
    args = dqn.Args(padding=padding, channels=(3, 4, 5), hidden_size=6)
    network = dqn.NatureNetwork(
        lead, A, 2, dqn.glorot_uniform, [torch.Generator().manual_seed(s) for s in range(lead[0])], args
    )
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    frames = make_batch(S=lead[0], B=2)[0]
    values = network(frames)
    assert values.shape == (*lead, 2, A, 2)
    pads = {"same": ((2, 2), (1, 2), (1, 1)), "valid": ((0, 0),) * 3}[padding]  # written out in the spec
    for where in np.ndindex(lead):
        layers = [torch.nn.Conv2d(4, 3, 8, 4), torch.nn.Conv2d(3, 4, 4, 2), torch.nn.Conv2d(4, 5, 3, 1)]
        size = 11 if padding == "same" else 7
        layers += [torch.nn.Linear(5 * size**2, 6), torch.nn.Linear(6, 2 * A)]
        x = frames[where[0]].float() / 255
        for i, (layer, (weight, bias)) in enumerate(zip(layers, layers_of(network))):
            layer.weight.data, layer.bias.data = weight[where] if i < 3 else weight[where].T, bias[where]
            if i < 3:
                low, high = pads[i]
                x = layer(torch.nn.functional.pad(x, (low, high, low, high))).relu()
            else:
                x = layer(x if i == 4 else x.permute(0, 2, 3, 1).flatten(1))
                x = x.relu() if i == 3 else x
        torch.testing.assert_close(values[where].flatten(1), x, rtol=1e-4, atol=1e-5)


@every_script
def test_first_weights(script):
    """Glorot's bound for one head per action, sqrt(sqrt(3) / fan_in) for many; zero biases; the targets are a copy."""
    module = harness.load(script)
    args = make_args(module, channels=(32, 8, 8), hidden_size=64, num_seeds=2)
    agent = make_agent(module, args)
    fans = [(4 * 64, 32 * 64), (32 * 16, 8 * 16), (8 * 9, 8 * 9), (8 * 121, 64), (64, A * (1 if module is dqn else 4))]
    for (weight, bias), (fan_in, fan_out) in zip(layers_of(agent.network), fans):
        bound = math.sqrt(6 / (fan_in + fan_out)) if module is dqn else math.sqrt(math.sqrt(3) / fan_in)
        assert 0.97 * bound < weight.abs().max() <= 1.0001 * bound and not bias.any()
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not torch.equal(weight[0], weight[1])
    for name, x in agent.network.state_dict().items():
        assert torch.equal(x, agent.target_network.state_dict()[name])
    assert not any(p.requires_grad for p in agent.target_network.parameters())


@every_script
def test_act_is_greedy_in_the_mean_of_the_heads(script):
    module = harness.load(script)
    agent = make_agent(module, make_args(module, num_seeds=2), spread=0.3)
    frames = make_batch(S=2, B=8)[0]
    values = agent.network(frames)
    assert torch.equal(agent.network.act(frames), values.mean(-1).argmax(-1))
    policy = module.policy_of_seed(agent.network, 1)
    assert torch.equal(policy.act(frames[1:]), agent.network.act(frames)[1:])
    if module is not dqn:
        set_constant(agent.network, [[9.0, 0, 0, 0], [3, 3, 3, 3], [8, 0, 0, 1]])  # a vote would say another
        assert (agent.network.act(frames) == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers
# ---------------------------------------------------------------------------------------------------------------------


class NumpyOptimizer:
    """Adam and centred RMSProp as their TensorFlow and torch documentation has them, one array at a time."""

    def __init__(self, name, learning_rate, eps, style):
        self.name, self.learning_rate, self.eps, self.tensorflow = name, learning_rate, eps, style == "tensorflow"
        self.moments = {}

    def step(self, key, p, g):
        if self.name == "adam":
            m, v, t = self.moments.get(key, (0.0, 0.0, 0))
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
            self.moments[key] = m, v, t
            if self.tensorflow:
                rate = self.learning_rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                return p - rate * m / (np.sqrt(v) + self.eps)
            return p - self.learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + self.eps)
        m, v = self.moments.get(key, (0.0, 1.0 if self.tensorflow else 0.0))
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
        self.moments[key] = m, v
        if self.tensorflow:
            return p - self.learning_rate * g / np.sqrt(v - m**2 + self.eps)
        return p - self.learning_rate * g / (np.sqrt(v - m**2) + self.eps)


@pytest.mark.parametrize("style", ["tensorflow", "torch"])
@pytest.mark.parametrize("name, eps", [("adam", 3.125e-4), ("rmsprop", 1e-5)])
def test_optimizers(name, eps, style):
    """Ten steps on a quadratic with small gradients, where epsilon counts; the torch styles against torch.optim too."""
    start = torch.linspace(-1, 1, 12).view(3, 4) * 1e-3
    scale = 10.0 ** torch.arange(-4, 0)
    p, q = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours, reference = dqn.OPTIMIZERS[name]([p], 1e-3, eps, style), NumpyOptimizer(name, 1e-3, eps, style)
    theirs = {
        "adam": lambda: torch.optim.Adam([q], 1e-3, eps=eps),
        "rmsprop": lambda: torch.optim.RMSprop([q], 1e-3, alpha=0.95, eps=eps, centered=True),
    }[name]()
    expected = start.double().numpy()
    for n in range(10):
        shift = 0.3 * math.sin(n)
        expected = reference.step(0, expected, scale.double().numpy() * (expected - shift))
        ours.minimize((scale * (p - shift).square()).sum() / 2)
        theirs.zero_grad()
        ((scale * (q - shift).square()).sum() / 2).backward()
        theirs.step()
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-4, atol=1e-7)
    close = torch.allclose(p, q, rtol=2e-4, atol=1e-7)
    assert close == (style == "torch")


def test_adam_is_the_same_in_all_four():
    """... and TensorFlow's first step is smaller by far: eps is not divided by sqrt(1 - 0.999)."""
    steps = {}
    for style in ("tensorflow", "torch"):
        p = torch.nn.Parameter(torch.zeros(1))
        dqn.AdamWithEps([p], 1.0, 1e-2, style).minimize((1e-2 * p).sum())
        steps[style] = -p.item()
    assert steps["torch"] == pytest.approx(0.5, rel=1e-4)  # 1e-2 / (1e-2 + 1e-2)
    assert steps["tensorflow"] == pytest.approx(1e-2 / (1e-2 + 1e-2 / math.sqrt(0.001)), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Losses: the numbers of the spec, 13 (g)
# ---------------------------------------------------------------------------------------------------------------------


def loss_of(module, values, target_values, batch=None, mixture=None, **flags):
    """The loss of an update where the network returns values (A, K) everywhere, and its target target_values (A, K)."""
    K = np.shape(values)[1]
    flags = {"learning_rate": 0.0, "gamma": 0.5, **({} if module is dqn else {"num_heads": K}), **flags}
    args = make_args(module, **flags)
    agent = make_agent(module, args)
    set_constant(agent.network, values)
    set_constant(agent.target_network, target_values)
    noise = () if mixture is None else (torch.tensor(mixture)[None],)
    metrics = module.update(agent, batch or make_batch(), *noise, args)
    assert all(x.shape == (1,) for x in metrics.values())
    return metrics["loss/quantile" if module is qr else "loss/td"].item()


def transition(action, reward, not_terminal=1.0):
    obs, _, _, next_obs, _ = make_batch(B=1)
    return obs, torch.tensor([[action]]), torch.tensor([[reward]]), next_obs, torch.tensor([[not_terminal]])


def test_huber():
    u = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    for module in (dqn, ensemble):
        torch.testing.assert_close(module.huber(u), torch.tensor([2.5, 0.5, 0.125, 0.0, 0.125, 0.5, 2.5]))


def test_dqn_loss():
    """y = 1 + 0.5 max(2, 4, 3) = 3 against Q = 2.25: 0.75^2 / 2; against Q = 0: 3 - 1/2; at an end y = 1."""
    values, targets = [[0.0], [2.25], [7.0]], [[2.0], [4.0], [3.0]]
    assert loss_of(dqn, values, targets, transition(1, 1.0)) == pytest.approx(0.75**2 / 2)
    assert loss_of(dqn, values, targets, transition(0, 1.0)) == pytest.approx(2.5)
    assert loss_of(dqn, values, targets, transition(0, 1.0, 0.0)) == pytest.approx(0.5)






def test_identical_heads():
    """g2, g3: REM and Ensemble-DQN, averaged target or not, with K copies of a head are DQN."""
    values, targets = np.random.default_rng(1).normal(size=(2, A, 1)).astype(np.float32)
    alone = loss_of(dqn, values, targets)
    copies = values.repeat(4, 1), targets.repeat(4, 1)
    assert loss_of(ensemble, *copies) == pytest.approx(alone, rel=1e-5)
    assert loss_of(ensemble, *copies, averaged_target=True) == pytest.approx(alone, rel=1e-5)


def test_ensemble_heads_have_their_own_targets():
    """y_k = 0.5 max_a Q_k = 2, 1; averaged: 0.5 max_a mean = 0.5 * 1.5, the maximum of the mean."""
    targets, values = [[4.0, -1.0], [0.0, 2.0], [0.0, 0.0]], [[1.5, 1.5]] + 2 * [[0.0, 0.0]]
    batch = transition(0, 0.0)
    assert loss_of(ensemble, values, targets, batch) == pytest.approx((0.5**2 / 2 + 0.5**2 / 2) / 2)
    averaged = loss_of(ensemble, values, targets, batch, averaged_target=True)
    assert averaged == pytest.approx((1.5 - 0.5 * 1.5) ** 2 / 2)


def test_one_quantile_is_half_of_dqn():
    """g5: tau = 1/2, so |tau - 1[u < 0]| is 1/2 on both sides."""
    values, targets = np.random.default_rng(2).normal(size=(2, A, 1)).astype(np.float32)
    assert loss_of(qr, values, targets) == pytest.approx(loss_of(dqn, values, targets) / 2, rel=1e-5)


def test_quantile_loss():
    """g5: all theta = q, all y at a distance of 1/2, N = 200: N u^2 / 4 = 12.5. And the sides: low quantiles that are
    too high weigh most, high ones that are too low."""
    q = torch.full((1, 2, 200), 3.0)
    torch.testing.assert_close(qr.quantile_huber(q, q + 0.5), torch.full((1, 2), 12.5))
    torch.testing.assert_close(qr.quantile_huber(q, q - 0.5), torch.full((1, 2), 12.5))
    low_too_high = qr.quantile_huber(torch.tensor([[[0.5, 0.0]]]), torch.zeros(1, 1, 2)).item()  # tau = 1/4
    high_too_high = qr.quantile_huber(torch.tensor([[[0.0, 0.5]]]), torch.zeros(1, 1, 2)).item()  # tau = 3/4
    assert (low_too_high, high_too_high) == (pytest.approx(0.75 * 0.125), pytest.approx(0.25 * 0.125))
    sums = qr.quantile_huber(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 4.0]]]))  # by hand: i first, then j
    expected = 0.5 * (0 + 0.25 * 2.5) + 0.5 * (0.25 * 0.5 + 0.75 * 1.5)
    assert sums.item() == pytest.approx(expected)


def test_qr_takes_the_action_with_the_best_mean_in_the_target():
    """Action 2's mean is best, though action 0 has the best single quantile; its quantiles 1, 3 are the targets."""
    targets, values = [[5.0, -5.0], [0.0, 0.0], [1.0, 3.0]], [[0.0, 0.0], [99.0, 99.0], [-9.0, -9.0]]
    y, tau = np.array([0.5, 1.5]), np.array([0.25, 0.75])  # gamma = 0.5
    expected = sum(t * np.where(y <= 1, y**2 / 2, y - 0.5).mean() for t in tau)
    assert loss_of(qr, values, targets, transition(0, 0.0)) == pytest.approx(expected)






# ---------------------------------------------------------------------------------------------------------------------
# The whole update against numpy: convolutions and their gradients by hand, losses, optimisers, targets
# ---------------------------------------------------------------------------------------------------------------------

STRIDES, PADS = (4, 2, 1), ((2, 2), (1, 2), (1, 1))


def forward(layers, x):
    """Values (B, A * K) of the Nature network in numpy for frames (B, 4, 84, 84), and what going back needs."""
    x, past = x / 255.0, []
    for (w, b), stride, (low, high) in zip(layers, STRIDES, PADS):
        padded, k = np.pad(x, ((0, 0), (0, 0), (low, high), (low, high))), w.shape[-1]
        patches = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (2, 3))[:, :, ::stride, ::stride]
        out = np.einsum("bcijkl,ockl->boij", patches, w) + b[:, None, None]
        past.append((patches, padded.shape, out))
        x = np.maximum(out, 0)
    (w, b), (v, c) = layers[3:]
    flat = x.transpose(0, 2, 3, 1).reshape(len(x), -1)
    hidden = np.maximum(flat @ w + b, 0)
    return hidden @ v + c, (past, x.shape, flat, hidden)


def backward(layers, cache, grad):
    """Gradients [(dW, db), ...] from that of the values."""
    past, shape, flat, hidden = cache
    (w, _), (v, _) = layers[3:]
    grads = [(hidden.T @ grad, grad.sum(0))]
    grad = grad @ v.T * (hidden > 0)
    grads.append((flat.T @ grad, grad.sum(0)))
    B, C, H, W = shape
    grad = (grad @ w.T).reshape(B, H, W, C).transpose(0, 3, 1, 2)
    for (w, _), stride, (low, high), (patches, padded, out) in reversed(list(zip(layers, STRIDES, PADS, past))):
        grad = grad * (out > 0)
        grads.append((np.einsum("bcijkl,boij->ockl", patches, grad), grad.sum((0, 2, 3))))
        back = np.zeros(padded)
        for i, j in np.ndindex(w.shape[2:]):
            rows, columns = slice(i, i + stride * grad.shape[2], stride), slice(j, j + stride * grad.shape[3], stride)
            back[:, :, rows, columns] += np.einsum("boij,oc->bcij", grad, w[:, :, i, j])
        grad = back[:, :, low : back.shape[2] - high, low : back.shape[3] - high]
    return grads[::-1]


class NumpyAgent:
    """One seed of any of the four in numpy, float64, written from the equations."""

    def __init__(self, script, agent, s, args):
        def layers(network):
            return [tuple(p[s].detach().double().numpy().copy() for p in pair) for pair in layers_of(network)]

        self.script, self.args = script, args
        self.online, self.target = layers(agent.network), layers(agent.target_network)
        name = getattr(args, "optimizer", "adam")
        self.optimizer = NumpyOptimizer(name, args.learning_rate, args.optimizer_eps, args.optimizer_style)

    def loss_and_gradient(self, q, next_q, action, reward, mask, alpha):
        """q, next_q (B, A, K) -> loss, gradient (B, A, K) of the loss with respect to q."""
        gamma, (B, _, K) = self.args.gamma, q.shape
        huber = lambda u: np.where(np.abs(u) <= 1, u**2 / 2, np.abs(u) - 0.5)
        grad, loss = np.zeros_like(q), 0.0
        for b in range(B):
            a, bootstrap = action[b], gamma * mask[b]
            if self.script == "offline_dqn_atari":
                weights = np.ones(1) if alpha is None else alpha
                u = weights @ q[b, a] - (reward[b] + bootstrap * max(weights @ next_q[b, other] for other in range(A)))
                loss, grad[b, a] = loss + huber(u) / B, weights * np.clip(u, -1, 1) / B
            elif self.script == "ensemble_dqn_atari":
                best = [max(next_q[b, :, k]) for k in range(K)]
                if self.args.averaged_target:
                    best = K * [max(next_q[b, other].mean() for other in range(A))]
                u = q[b, a] - (reward[b] + bootstrap * np.array(best))
                loss, grad[b, a] = loss + huber(u).mean() / B, np.clip(u, -1, 1) / K / B
            else:
                star = np.argmax([next_q[b, other].mean() for other in range(A)])
                for i in range(K):
                    u = reward[b] + bootstrap * next_q[b, star] - q[b, a, i]
                    w = np.abs((i + 0.5) / K - (u < 0))
                    loss, grad[b, a, i] = loss + (w * huber(u)).mean() / B, -(w * np.clip(u, -1, 1)).mean() / B
        return loss, grad

    def update(self, obs, action, reward, next_obs, mask, alpha=None):
        q, cache = forward(self.online, obs)
        next_q, _ = forward(self.target, next_obs)
        q, next_q = (x.reshape(len(obs), A, -1) for x in (q, next_q))
        loss, grad = self.loss_and_gradient(q, next_q, action, reward, mask, alpha)
        grads = backward(self.online, cache, grad.reshape(len(obs), -1))
        self.online = [
            tuple(self.optimizer.step((i, j), p, g) for j, (p, g) in enumerate(zip(*pair)))
            for i, pair in enumerate(zip(self.online, grads))
        ]
        return loss


VARIANTS = [
    ("offline_dqn_atari", {}),
    ("offline_dqn_atari", {"optimizer": "rmsprop", "optimizer_eps": 1e-5}),
    ("offline_dqn_atari", {"optimizer": "rmsprop", "optimizer_style": "torch", "optimizer_eps": 1e-2}),
    ("ensemble_dqn_atari", {}),
    ("ensemble_dqn_atari", {"averaged_target": True}),
    ("qrdqn_atari", {}),
]


@pytest.mark.parametrize("script, flags", VARIANTS)
def test_updates_equal_numpy(script, flags):
    """Five updates of two seeds, targets copied after the third: all weights of both networks, and the losses."""
    module = harness.load(script)
    args = make_args(module, num_seeds=2, learning_rate=3e-3, **flags)
    agent = make_agent(module, args, spread=0.15)
    numpy_agents = [NumpyAgent(script, agent, s, args) for s in range(2)]
    for n in range(5):
        batch, noise = make_batch(S=2, seed=n), noise_of(module, args, n)
        metrics = module.update(agent, batch, *noise, args)
        for s, numpy_agent in enumerate(numpy_agents):
            inputs = [x[s].double().numpy() if x.is_floating_point() else x[s].numpy() for x in (*batch, *noise)]
            loss = numpy_agent.update(*inputs)
            assert metrics["loss/quantile" if module is qr else "loss/td"][s].item() == pytest.approx(loss, rel=1e-4)
        if n == 2:
            module.synchronize(agent)
            for numpy_agent in numpy_agents:
                numpy_agent.target = [tuple(p.copy() for p in pair) for pair in numpy_agent.online]
        for s, numpy_agent in enumerate(numpy_agents):
            for network, expected in ((agent.network, numpy_agent.online), (agent.target_network, numpy_agent.target)):
                for pair, pair_expected in zip(layers_of(network), expected):
                    for p, p_expected in zip(pair, pair_expected):
                        np.testing.assert_allclose(p[s].detach().numpy(), p_expected, rtol=1e-4, atol=1e-6)


@every_script
def test_an_update_gets_its_row(monkeypatch, script):
    """Of every row: four frames as the state, the last four of the five as the next, the rest and its own mixture."""
    module, seen = harness.load(script), []
    monkeypatch.setattr(module, "update", lambda *inputs: seen.append(inputs) or {"n": len(seen)})
    rows = [torch.rand(3, 2, 4, 5, 7, 7), *(torch.rand(3, 2, 4) for _ in range(3))]
    noise = []
    assert module.run_atari_updates("agent", "args", *rows, *noise) == {"n": 3} and len(seen) == 3
    for m, (agent, (obs, action, reward, next_obs, mask), *rest) in enumerate(seen):
        assert torch.equal(obs, rows[0][m, :, :, :4]) and torch.equal(next_obs, rows[0][m, :, :, 1:])
        assert all(torch.equal(x, row[m]) for x, row in zip((action, reward, mask), rows[1:]))
        assert agent == "agent" and rest[-1] == "args" and len(rest) == 1 + len(noise)
        assert all(torch.equal(x, row[m]) for x, row in zip(rest, noise))


@every_script
def test_no_gradient_reaches_the_target(script):
    """An update leaves the target as it is, bit by bit; and y is a constant: Q_target's size does not move Q(s')."""
    module = harness.load(script)
    args = make_args(module, learning_rate=1e-2)
    agent = make_agent(module, args, spread=0.15)
    before = state_of(agent)
    module.update(agent, make_batch(), *noise_of(module, args), args)
    changed = {name.split(".")[0] for name, x in state_of(agent).items() if not torch.equal(x, before[name])}
    assert changed == {"network", "optimizers"} and all(p.grad is None for p in agent.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Targets, through main()
# ---------------------------------------------------------------------------------------------------------------------


@every_script
def test_targets_are_copied_after_every_so_many_updates(run_main, data, monkeypatch, tmp_path, script):
    """g10: exactly there, whatever else is due in between and wherever a run stops and goes on; by default 2,000."""
    module = harness.load(script)
    update, before = module.update, []

    def recorder(agent, *rest):
        before.append((agent.target_network.bias4.clone(), agent.network.bias4.clone()))
        return update(agent, *rest)

    monkeypatch.setattr(module, "update", recorder)
    flags = "--dataset", data, *BLIND, *small_flags(script), "--target-every", 7, "--learning-rate", 0.01
    run_main(module, *flags, "--log-every", 5, "--num-updates", 18, "--run-dir", tmp_path / "run")
    run_main(module, "--resume", tmp_path / "run", "--num-updates", 32)
    last = checkpoint_of(tmp_path / "run")["agent"]
    before.append((last["target_network.bias4"], last["network.bias4"]))
    assert len(before) == 33 and module.Args().target_every == 2000
    for n in range(1, 33):
        target, network = before[n]
        if n % 7 == 0:
            assert torch.equal(target, network)  # after update n
        else:
            assert torch.equal(target, before[n - 1][0]) and not torch.equal(target, network)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


@every_script
def test_another_seeds_batch_changes_nothing(script):
    """Seed 0 is bit-identical whatever seed 1 is trained on, and seed 1 is not."""
    module = harness.load(script)
    args, states = make_args(module, num_seeds=2, learning_rate=0.01), []
    for other in (0, 50):
        agent = make_agent(module, args)
        for n in range(3):
            batch, others = make_batch(S=2, seed=n), make_batch(S=2, seed=n + other)
            batch = [torch.stack([x[0], y[1]]) for x, y in zip(batch, others)]
            module.update(agent, batch, *noise_of(module, args, n), args)
        states.append(state_of(agent))
    for name in states[0]:
        assert torch.equal(states[0][name][0], states[1][name][0]), name
        if not name.startswith("target"):
            assert not torch.equal(states[0][name][1], states[1][name][1]), name


@every_script
def test_seed_k_among_five_is_the_run_with_seed_k(run_main, data, monkeypatch, tmp_path, script):
    """Through main(), with frames that are loaded in turns: the same first weights, batches and mixtures, and the same
    agents after 50 updates."""
    module = harness.load(script)
    update, runs = module.update, {}

    def recorder(agent, batch, *rest):
        record = runs.setdefault((rest[-1].seed, rest[-1].num_seeds), {"draws": [], "first": state_of(agent)})
        noise = [x.clone() for x in rest[:-1]]
        record["draws"].append([batch[0][:, :, -1, 0, :4].clone(), *(x.clone() for x in batch[1:3]), *noise])
        return update(agent, batch, *rest)

    monkeypatch.setattr(module, "update", recorder)
    for seed, num_seeds in ((3, 5), (7, 1)):
        run_dir = tmp_path / f"{seed}-{num_seeds}"
        flags = "--seed", seed, "--num-seeds", num_seeds, "--learning-rate", 1e-3, "--num-updates", 50
        flags = "--dataset", data, *BLIND, *small_flags(script), *flags, "--memory-gb", 0.0024, "--target-every", 20
        run_main(module, *flags, "--run-dir", run_dir)
        agent = checkpoint_of(run_dir)["agent"]
        runs[seed, num_seeds]["last"] = {k: x for k, x in agent.items() if not k.endswith("num_steps")}
    five = runs[3, 5]
    for k in (4,):
        alone = runs[3 + k, 1]
        for ours, theirs in zip(five["draws"], alone["draws"], strict=True):
            assert all(torch.equal(x[k], y[0]) for x, y in zip(ours, theirs, strict=True))
        for name in five["first"]:
            assert torch.equal(five["first"][name][k], alone["first"][name][0]), name
            torch.testing.assert_close(five["last"][name][k], alone["last"][name][0], rtol=1e-3, atol=1e-5)
    draws = five["draws"]
    assert not any(torch.equal(x[0], x[4]) for x in (draws[0][0], draws[0][1]))
    for i in {0, *range(3, len(draws[0]))}:  # frames and mixtures: new ones in every update
        assert len({draw[i].numpy().tobytes() for draw in draws}) == 50
    moved = (five["last"]["network.weight4"] - five["first"]["network.weight4"]).abs().amax((1, 2))
    assert (moved > 1e-3).all()  # all learned


# ---------------------------------------------------------------------------------------------------------------------
# Learning: to give up half a point now for a whole one later
# ---------------------------------------------------------------------------------------------------------------------


DARK = 60  # pixels of the first state's frames


def learned_values(script, **flags):
    """Values (S, A) of two seeds in the first state after 120 updates on a log of uniformly random play.

    In the dark first state action 0 pays 0.5 and is the end; action 1 pays nothing and leads to a bright state, where
    every action pays 1, and is the end; action 2 costs 1 and is the end.
    """
    module = harness.load(script)
    size = {"channels": (8, 8, 8), "hidden_size": 32, "padding": "valid"}
    args = make_args(module, **{**size, "num_seeds": 2, "learning_rate": 1e-2, **flags})
    agent, rng, B = make_agent(module, args), np.random.default_rng(0), 8
    for n in range(120):
        bright, action = rng.random((2, B)) < 0.5, rng.integers(0, A, (2, B))
        reward = np.where(bright, 1.0, np.array([0.5, 0.0, -1.0])[action])
        mask = np.float32(~bright & (action == 1))
        obs, next_obs = (np.uint8(DARK + 150 * x)[..., None, None, None] for x in (bright, mask))
        obs, next_obs = (torch.from_numpy(x).expand(2, B, 4, 84, 84) for x in (obs, next_obs))
        batch = obs, torch.from_numpy(action), torch.from_numpy(np.float32(reward)), next_obs, torch.from_numpy(mask)
        module.update(agent, batch, *noise_of(module, args, n % 100), args)
        if n % 20 == 19:
            module.synchronize(agent)
    with torch.no_grad():
        return agent.network(torch.full((2, 1, 4, 84, 84), DARK, dtype=torch.uint8)).mean(-1)[:, 0]


@every_script
def test_the_agents_look_ahead(script):
    values = learned_values(script)
    assert (values.argmax(-1) == 1).all() and (values[:, 1] > 0.7).all(), values
    assert (values[:, 2] < values[:, 0] - 0.3).all(), values


def test_the_learning_test_is_a_test():
    """One who sees no further than the next reward does something else."""
    assert (learned_values("offline_dqn_atari", gamma=0.0).argmax(-1) == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


@every_script
def test_inputs_of_a_graph(run_main, data, tmp_path, monkeypatch, script):
    """main() with its GPU branch taken on the CPU: what goes into a graph has one shape, and the run ends the same."""
    module = harness.load(script)
    flags = "--dataset", data, *BLIND, *small_flags(script), "--num-updates", 33, "--log-every", 20
    run_main(module, *flags, "--run-dir", tmp_path / "eager")
    source, shapes = Path(module.__file__).read_text(), []
    assert source.count('if device.type == "cuda" and not graph') == 1
    path = tmp_path / f"{script}.py"
    path.write_text(source.replace('if device.type == "cuda" and not graph', "if not graph"))
    spec = harness.importlib.util.spec_from_file_location(f"{script}_captured", path)
    captured = sys.modules[spec.name] = harness.importlib.util.module_from_spec(spec)
    spec.loader.exec_module(captured)

    def fake_graph(step, agent, *inputs):
        shapes.append([x.shape for x in inputs])
        return lambda *new: shapes.append([x.shape for x in new]) or step(*new)

    captured.cuda_graph = fake_graph
    run_main(captured, *flags, "--run-dir", tmp_path / "captured")
    assert_same_checkpoint(tmp_path / "captured", tmp_path / "eager")
    assert len(shapes) == 1 + 3 and all(x == shapes[0] for x in shapes)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@every_script
def test_captured_updates_equal_eager_ones(script):
    """CUDA graphs of ten updates, replayed, give what as many eager updates give."""
    module = harness.load(script)
    args = make_args(module, num_seeds=2, learning_rate=1e-3)
    agents = [make_agent(module, args, device="cuda") for _ in range(2)]
    learn = [partial(module.run_atari_updates, agent, args) for agent in agents]
    graph = None
    for i in range(3):
        frames = torch.randint(
            0, 256, (10, 2, 3, 5, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)
        )
        batches = [make_batch(S=2, seed=10 * i + n) for n in range(10)]
        inputs = [frames, *(torch.stack([b[j] for b in batches]) for j in (1, 2, 4))]
        inputs = [x.cuda() for x in inputs]
        graph = graph or module.cuda_graph(learn[0], agents[0], *inputs)
        captured, eager = graph(*inputs), learn[1](*inputs)
        for agent in agents:
            module.synchronize(agent)
    for name, x in agents[1].state_dict().items():
        torch.testing.assert_close(agents[0].state_dict()[name], x, rtol=1e-3, atol=1e-4)
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_run_on_a_gpu_ends_as_one_on_the_cpu(run_main, data, monkeypatch, tmp_path, where):
    """The same draws, graphs or not, frames on the GPU or in pinned memory of the host."""
    if where == "host":
        monkeypatch.setattr(ensemble.torch.cuda, "mem_get_info", lambda device: (0, 0))
    flags = "--dataset", data, *BLIND, "--num-heads", 4, "--num-updates", 60, "--memory-gb", 0.0024
    run_main(ensemble, *flags, "--run-dir", tmp_path / "cpu")
    run_main(ensemble, *flags, "--device", "cuda", "--run-dir", tmp_path / "cuda")
    ours, theirs = (checkpoint_of(tmp_path / name)["agent"] for name in ("cuda", "cpu"))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name].cpu(), x, rtol=1e-2, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: exact resume, evaluation, errors
# ---------------------------------------------------------------------------------------------------------------------


def test_resume_in_the_middle_of_a_window(run_main, data, tmp_path):
    """Runs that stop where nothing ends, and go on, draw and load what they would have, and end like one at once."""
    flags = "--dataset", data, *BLIND, "--num-heads", 4, "--memory-gb", 0.0024, "--window-updates", 100
    flags += "--target-every", 30
    run_main(ensemble, *flags, "--num-updates", 150, "--run-dir", tmp_path / "whole")
    run_main(ensemble, *flags, "--num-updates", 57, "--run-dir", tmp_path / "parts")
    run_main(ensemble, "--resume", tmp_path / "parts", "--num-updates", 100)  # a window's end
    run_main(ensemble, "--resume", tmp_path / "parts", "--num-updates", 150)
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """rem_atari.py killed with -9 at a random moment after its second checkpoint and resumed; the same at once."""
    folder, rng = tmp_path_factory.mktemp("runs"), random.Random(3)
    victim, path = folder / "victim", folder / "victim" / "checkpoint.pt"
    flags = "--dataset", data, *SMALL, "--num-heads", 4, "--num-updates", 250, "--eval-every", 250
    flags += "--eval-episodes", 1, "--eval-workers", 0, "--checkpoint-every", 23, "--target-every", 50
    flags += "--memory-gb", 0.0024, "--window-updates", 100
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = harness.command("ensemble_dqn_atari", *flags, "--run-dir", victim)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    saves, last, deadline = 0, None, time.time() + 120
    while saves < 2 + rng.randint(0, 3):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        now = path.stat().st_mtime_ns if path.exists() else None
        saves, last = saves + (now != last), now
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    assert process.poll() is None, "the run was over before it could be killed: make it longer"
    process.kill()
    process.communicate()
    assert checkpoint_of(victim)["num_updates"] < 250
    with pytest.MonkeyPatch.context() as patch:
        main_of(patch, ensemble, "--resume", victim)
        main_of(patch, ensemble, *flags, "--run-dir", folder / "unbroken")
    return victim, folder / "unbroken"


def test_a_killed_and_resumed_run_ends_like_one_never_stopped(runs):
    victim, unbroken = runs
    assert_same_checkpoint(victim, unbroken)
    assert (victim / "evaluations.csv").read_text() == (unbroken / "evaluations.csv").read_text()
    assert json.loads((victim / "config.json").read_text())["script"] == "ensemble_dqn_atari"
    rows = harness.read_evaluations(unbroken)
    assert rows["update"].tolist() == [250] and -21 <= rows["return"][0] <= 21 and rows["length"][0] > 500


def test_evaluate(runs, run_main, capsys):
    _, unbroken = runs
    before = {path.name: path.read_bytes() for path in unbroken.iterdir()}
    run_main(ensemble, "--evaluate", unbroken, "--eval-episodes", 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("seed 0: return -") and "normalised score" in line
    assert before == {path.name: path.read_bytes() for path in unbroken.iterdir()}


@every_script
def test_what_is_evaluated(run_main, data, monkeypatch, tmp_path, script):
    """Every seed's own network, as it is at that update; not its target."""
    module, policies = harness.load(script), []

    def play(policy, environment, env_seeds):
        policies.append((pickle.loads(policy), env_seeds))
        return [(1.0, 10)] * len(env_seeds)

    monkeypatch.setattr(module, "run_atari_episodes", play)
    flags = "--dataset", data, *SMALL, *small_flags(script), "--num-seeds", 2, "--learning-rate", 0.01
    flags += "--target-every", 2, "--eval-every", 3, "--eval-workers", 0, "--eval-episodes", 4
    run_main(module, *flags, "--num-updates", 5, "--run-dir", tmp_path / "run")
    last = checkpoint_of(tmp_path / "run")["agent"]
    assert len(policies) == 4 and len({seed for _, env_seeds in policies for seed in env_seeds}) == 16
    for s, (policy, _) in enumerate(policies[2:]):
        assert all(torch.equal(x[0], last[f"network.{name}"][s]) for name, x in policy.state_dict().items())
    assert not torch.equal(last["network.bias4"], last["target_network.bias4"])
    assert not torch.equal(policies[0][0].bias4, policies[2][0].bias4)


def test_another_scripts_run(runs, run_main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(qr, "--resume", runs[1])
    assert ended.value.code == 2 and "is a run of ensemble_dqn_atari.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--memory-gb", -1),
        ("--window-updates", 150),
        ("--first-fraction", 1.5),
        ("--gamma", 1.01),
        ("--seed", 2**32),
        ("--subsample", "nan"),
        ("--target-every", 0),
        ("--num-heads", 0),
        ("--optimizer-eps", -1e-3),
        ("--channels", 8),
        ("--memory-gb", 0.0001),
        ("--files", 77),
        ("--dataset", "no/such-log"),
    ],
)
def test_what_a_user_can_get_wrong(run_main, data, capsys, monkeypatch, tmp_path, flag, value):
    """One line, exit status 2, no run folder."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    with pytest.raises(SystemExit) as ended:
        run_main(ensemble, "--dataset", data, flag, value, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert str(value) in error and not (tmp_path / "run").exists()


def test_broken_frames_leave_no_run_folder(run_main, data, capsys, tmp_path):
    """They are found while the first frames are loaded, before the run folder is made."""
    folder = tmp_path / "log"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    broken = folder / "$store$_observation_ckpt.3.gz"
    broken.write_bytes(broken.read_bytes()[:-3000])
    with pytest.raises(SystemExit) as ended:
        run_main(ensemble, "--dataset", folder, "--env-id", "ALE/Pong-v5", "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and str(broken) in error and "is broken" in error and not (tmp_path / "run").exists()
