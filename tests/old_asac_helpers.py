"""What the tests of scripts that still have their old form share; it goes with them."""

import copy
import numpy as np
import pytest
import random
import torch
O, A = 4, 2  # noqa: E741  dimensions of the small agents below


def make_transitions(N=100, seed=0):
    """(N, O + A + 1 + O + 1) random transitions, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, N, O))
    action, reward = rng.uniform(-1, 1, size=(N, A)), rng.normal(size=(N, 1))
    not_terminated = np.float64(rng.random((N, 1)) > 0.25)
    return torch.from_numpy(np.concatenate([obs, action, reward, next_obs, not_terminated], -1)).float()


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    return [(getattr(mlp, f"weight{i}"), getattr(mlp, f"bias{i}")) for i in range(len(mlp.layers))]


def state_of(agent):
    """A copy of the state dict without the optimisers, whose step counters have no seed axis."""
    return {name: x.clone() for name, x in agent.state_dict().items() if not name.startswith("optimizers.")}


def leaves_of(tree):
    return tree.level0.view(tree.num_seeds, -1)[:, : tree.num_leaves].numpy()


def forward(layers, x):
    """Output of a ReLU network [(W, b), ...] and the input of each layer."""
    inputs = []
    for i, (w, b) in enumerate(layers):
        inputs.append(np.maximum(x, 0) if i else x)
        x = inputs[-1] @ w + b
    return x, inputs


def backward(layers, inputs, grad):
    """Gradients [(dW, db), ...] from the gradient at the output."""
    grads = []
    for i in reversed(range(len(layers))):
        grads.append((inputs[i].T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ layers[i][0].T) * (inputs[i] > 0)
    return grads[::-1]


def lower_mean(q, pessimism):
    """Q_bar of a list of C >= 2 arrays, by its definition."""
    C = len(q)
    return sum(q) / C - pessimism / (C * C - C) * sum(np.abs(q[i] - q[j]) for i in range(C) for j in range(C))


class NumpyActorCritic:
    """One seed of asac.py, in numpy, float64, written from the equations."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.moments, self.critics_range = args, {}, range(args.num_critics)
        self.actor = layers(agent.actor.net)
        self.critics = [layers(agent.critic, c) for c in self.critics_range]
        self.target_critics = [layers(agent.target_critic, c) for c in self.critics_range]

    def adam(self, name, layers, grads):
        stepped = []
        for i, pair in enumerate(zip(layers, grads)):
            new = []
            for j, (p, g) in enumerate(zip(*pair)):
                m, v, t = self.moments.get((name, i, j), (0.0, 0.0, 0))
                m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
                self.moments[name, i, j] = m, v, t
                m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
                new.append(p - self.args.learning_rate * m_hat / (np.sqrt(v_hat) + 1e-8))
            stepped.append(tuple(new))
        return stepped

    def critic_step(self, batch, next_noise):
        args, (s, a, r, s_next, mask) = self.args, np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        offset = np.clip(args.policy_std * next_noise, -args.noise_clip, args.noise_clip)
        sa_next = np.concatenate([s_next, np.clip(np.tanh(forward(self.actor, s_next)[0]) + offset, -1, 1)], 1)
        next_q = [forward(layers, sa_next)[0] for layers in self.target_critics]
        y, loss = r + args.gamma * mask * lower_mean(next_q, args.pessimism), 0
        for c in self.critics_range:
            q, inputs = forward(self.critics[c], np.concatenate([s, a], 1))
            loss += 0.5 * np.mean((q - y) ** 2)
            self.critics[c] = self.adam(
                ("critic", c), self.critics[c], backward(self.critics[c], inputs, (q - y) / len(q))
            )
        return loss

    def actor_step(self, s, a, weight):
        """One step on -sum of weight * log pi; returns that loss."""
        out, inputs = forward(self.actor, s)
        z = (a - np.tanh(out)) / self.args.policy_std
        log_prob = np.sum(-0.5 * z**2 - np.log(self.args.policy_std * np.sqrt(2 * np.pi)), 1)
        grad = -weight[:, None] * z / self.args.policy_std * (1 - np.tanh(out) ** 2)
        self.actor = self.adam("actor", self.actor, backward(self.actor, inputs, grad))
        return -np.sum(weight * log_prob)

    def advantage(self, s, a, noise):
        policy_action = np.clip(np.tanh(forward(self.actor, s)[0]) + self.args.policy_std * noise, -1, 1)
        q, policy_q = (
            [forward(layers, np.concatenate([s, x], 1))[0][:, 0] for layers in self.critics] for x in (a, policy_action)
        )
        return sum(q) / len(q) - lower_mean(policy_q, self.args.pessimism)

    def target_step(self):
        rho = self.args.polyak
        for c in self.critics_range:
            pairs = zip(self.target_critics[c], self.critics[c])
            self.target_critics[c] = [tuple((1 - rho) * x + rho * y for x, y in zip(*pair)) for pair in pairs]

    def assert_same(self, agent, s):
        nets = [(agent.actor.net, (), self.actor)]
        nets += [(agent.critic, (c,), self.critics[c]) for c in self.critics_range]
        nets += [(agent.target_critic, (c,), self.target_critics[c]) for c in self.critics_range]
        for mlp, lead, layers in nets:
            for ours, expected in zip(layers_of(mlp), layers):
                for x, y in zip(ours, expected):
                    np.testing.assert_allclose(x[(s, *lead)].detach().numpy(), y, rtol=0, atol=1e-9)


def in_double(agent, args):
    """The agent in float64, its learning rates not rounded to float32."""
    for optimizer in agent.double().optimizers.values():
        assert optimizer.learning_rate.item() == pytest.approx(args.learning_rate)
        optimizer.learning_rate.fill_(args.learning_rate)
    return agent


class Recorder:
    """Stands in for an optimiser: notes which networks its loss depends on and the actor's gradient; steps nothing."""

    def __init__(self, agent, name, notes):
        self.agent, self.name, self.notes = agent, name, notes

    def minimize(self, loss):
        self.agent.zero_grad()
        loss.backward()
        named = [(n.split(".")[0], p.grad) for n, p in self.agent.named_parameters() if p.grad is not None]
        self.notes.append((self.name, {n for n, _ in named}, torch.cat([g.flatten() for _, g in named])))


def record(agent):
    """Takes the agent's optimisers away; returns the list that notes what they would have seen."""
    notes = []
    del agent.optimizers
    agent.optimizers = {name: Recorder(agent, name, notes) for name in ("actor", "critic")}
    return notes


def two_steps():
    """A log of uniformly random actions: the first action a costs 0.5 a; the second step pays 2 a, whatever is done
    there, and is the end. So Q(first, a) = (2 gamma - 0.5) a."""
    a, b = np.random.default_rng(0).uniform(-1, 1, size=(2, 4000, 1))
    zero, one = np.zeros_like(a), np.ones_like(a)
    first = np.concatenate([one, zero, a, -0.5 * a, zero, a, one], 1)  # s = (is first, last action), a, r, s', mask
    second = np.concatenate([zero, a, b, 2 * a, one, zero, zero], 1)
    return torch.from_numpy(np.float32(np.concatenate([first, second])))
