"""What the scripts are compared with, and shares no code with them: networks as torch.nn has them, networks and Adam
by hand, and an environment that keeps a log of its own."""

import gymnasium as gym
import numpy as np
import pytest
import torch


# Networks, Adam -----------------------------------------------------------------------------------
def randomize(module, size):
    """Gives all parameters, those of targets too, random numbers of this size."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def copies(net, s, S):
    """Seed s's share of a network's parameters."""
    return [x.detach().chunk(S)[s].clone().requires_grad_() for x in net.parameters()]


def forward(layers, *inputs):
    """Inputs (B, ...) side by side -> (networks, B, out); layers: all weights, then all biases."""
    depth = len(layers) // 2
    x = torch.cat(inputs, 1) @ layers[0] + layers[depth]
    for i in range(1, depth):
        x = x.clamp(min=0) @ layers[i] + layers[depth + i]
    return x


def pessimistic(q, pessimism):
    """Q_bar (B,) of q (C, B, 1), by its definition."""
    C = len(q)
    penalty = sum((q[i] - q[j]).abs() for i in range(C) for j in range(C)) / (C**2 - C)
    return (q.mean(0) - pessimism * penalty).squeeze(1)


class Learner:
    """One seed's networks {name: all weights, then all biases} and Adam by hand. `adams_with` gives both the same eps:
    with 1, steps tell a mean from a sum too."""

    def __init__(self, agent, s, args, eps=1.0):
        self.args = args
        self.eps = eps
        self.moments = {}
        self.nets = {name: copies(net, s, args.num_seeds) for name, net in agent.named_children()}

    def rate(self, name):
        return self.args.learning_rate

    def minimize(self, **losses):
        """A step of each of these networks down its loss, all at the parameters as they are now."""
        gradients = [torch.autograd.grad(loss, self.nets[name], retain_graph=True) for name, loss in losses.items()]
        for name, of_net in zip(losses, gradients):
            for x, gradient in zip(self.nets[name], of_net):
                self.step(x, gradient, self.rate(name))

    def step(self, x, gradient, rate):
        n, first, second = self.moments.get(x, (0, 0, 0))
        n = n + 1
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        self.moments[x] = n, first, second
        x.data -= rate * first / (1 - 0.9**n) / ((second / (1 - 0.999**n)) ** 0.5 + self.eps)

    def move_targets(self, *names):
        for name in names:
            for target, online in zip(self.nets[f"target_{name}"], self.nets[name]):
                target.data += self.args.target_update_rate * (online.data - target.data)

    def assert_same(self, agent, s, atol):
        for name, net in self.nets.items():
            for x, y in zip(copies(getattr(agent, name), s, self.args.num_seeds), net):
                torch.testing.assert_close(x, y, rtol=0, atol=atol)


def adams_with(agent, eps=1.0):
    for optimizer in agent.optimizers.values():
        optimizer.param_groups[0]["eps"] = eps


def check_updates(script, agent, references, batches, args, atol=1e-7):
    """Updates of all seeds in float64 against a reference of each: what is logged, and all parameters. Seeds do
    not mix: a reference sees its own share of a batch, and what the seeds have in common."""
    for batch in batches:
        metrics = script.update(agent, *batch, args)
        for s, reference in enumerate(references):
            own = [x[s] if torch.is_tensor(x) and x.dim() else x for x in batch]
            logged = {name: x[s].mean().item() for name, x in metrics.items()}
            assert logged == pytest.approx(reference.update(*own), rel=1e-6)
    assert not any(x.requires_grad for x in metrics.values())
    for s, reference in enumerate(references):
        reference.assert_same(agent, s, atol)


class IQL(Learner):
    """One seed of IQL, written from the equations."""

    def update(self, obs, action, reward, next_obs, not_terminated):
        args = self.args
        obs_action = torch.cat([obs, action], 1)
        target_q = torch.minimum(*forward(self.nets["target_critic"], obs_action)).squeeze(1)  # (B,)

        u = target_q - forward(self.nets["value"], obs).squeeze()
        value_loss = torch.mean(abs(args.expectile - 1.0 * (u < 0)) * u**2)
        self.minimize(value=value_loss)
        assert u.min() < 0 < u.max()  # the batch has both sides of the expectile

        value = forward(self.nets["value"], obs).squeeze()
        self.weight = torch.exp(args.beta * (target_q - value)).clamp(max=100)
        log_std, *layers = self.nets["actor"]
        policy = torch.distributions.Normal(forward(layers, obs)[0].tanh(), log_std[0].clamp(-5, 2).exp())
        actor_loss = -torch.mean(self.weight * policy.log_prob(action).sum(1))
        self.minimize(actor=actor_loss)

        backup = reward + args.gamma * not_terminated * forward(self.nets["value"], next_obs).squeeze()
        q1, q2 = forward(self.nets["critic"], obs_action).squeeze(2)
        critic_loss = torch.mean((q1 - backup) ** 2) + torch.mean((q2 - backup) ** 2)
        self.minimize(critic=critic_loss)
        self.move_targets("critic")
        losses = {"loss/value": value_loss, "loss/actor": actor_loss, "loss/critic": critic_loss}
        values = {"value/v": value, "value/q": (q1 + q2) / 2, "value/advantage_weight": self.weight}
        return {name: x.mean().item() for name, x in (losses | values).items()}


class Scaled(Learner):
    """What one seed of asac.py, awac.py, iql_scaled.py and td3_bc_scaled.py has in common: Normal policies of
    deviation 0.2, ensembles of critics, Q_bar."""

    def mean(self, obs):
        return forward(self.nets["actor"], obs)[0].tanh()

    def sample(self, obs, noise, bound=np.inf):
        return (self.mean(obs) + (0.2 * noise).clamp(-bound, bound)).clamp(-1, 1)

    def log_prob(self, obs, action):
        return torch.distributions.Normal(self.mean(obs), 0.2).log_prob(action).sum(1)

    def q(self, obs, action):
        return forward(self.nets["critic"], obs, action).squeeze(2)  # (C, B)

    def q_bar(self, obs, action, critic="critic"):
        return pessimistic(forward(self.nets[critic], obs, action), self.args.pessimism)

    def learn_critics(self, obs, action, reward, not_terminated, next_value):
        """Towards these values of the next states; returns what to log."""
        q = self.q(obs, action)
        y = reward + self.args.gamma * not_terminated * next_value.detach()
        loss = ((q - y) ** 2).mean(1).sum() / 2
        self.minimize(critic=loss)
        return {"loss/critic": loss, "value/q": q}

    def smoothed_next_value(self, next_obs, noise):
        """Q_bar of targets at an action with noise, which is bounded twice."""
        next_action = self.sample(next_obs, noise, bound=0.3)
        assert (0.2 * noise.abs() > 0.3).any() and (next_action.abs() == 1).any()
        return self.q_bar(next_obs, next_action, "target_critic")

    def learn_weighted_actor(self, obs, action, noise):
        """Clones the logged actions by a softmax of their advantages, which have an upper bound."""
        args = self.args
        advantage = self.q(obs, action).mean(0) - self.q_bar(obs, self.sample(obs, noise))
        assert 0 < (advantage > args.max_advantage).sum() < len(obs)
        weight = (advantage.minimum(torch.tensor(args.max_advantage)) / args.beta).exp().detach()
        weight = weight / weight.sum()
        loss = -(weight * self.log_prob(obs, action)).sum()
        self.minimize(actor=loss)
        effective_batch = 1 / (weight**2).sum()
        return {"loss/actor": loss, "value/advantage": advantage, "value/effective_batch": effective_batch}


def linear_layers(mlp, i):
    """The i-th network of an MLP as torch.nn has it, in float64."""
    layers = []
    for weight, bias in zip(mlp.weights, mlp.biases):
        linear = torch.nn.Linear(*weight.shape[1:], dtype=torch.float64)
        linear.weight.data = weight[i].detach().T.clone()
        linear.bias.data = bias[i, 0].detach().clone()
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def assert_same_layers(mlp, i, expected, atol):
    for x, y in zip(linear_layers(mlp, i).parameters(), expected.parameters()):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def nature_network(parameters, frames, padding="valid"):
    """The Nature article's network, five weights and five biases, on frames (B, 4, 84, 84), patch by patch."""
    weights, biases = parameters[:5], parameters[5:]
    x = np.float64(frames) / 255
    pads = {"same": ((2, 2), (1, 2), (1, 1)), "valid": ((0, 0),) * 3}[padding]  # TensorFlow's, written out
    for weight, bias, pad, stride in zip(weights, biases, pads, (4, 2, 1)):
        x = np.pad(x, ((0, 0), (0, 0), pad, pad))
        patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-2:], (2, 3))[:, :, ::stride, ::stride]
        x = np.maximum(np.einsum("bihwkl,oikl->bohw", patches, weight) + bias.reshape(-1, 1, 1), 0)
    x = np.moveaxis(x, 1, -1).reshape(len(x), -1)
    return np.maximum(x @ weights[3] + biases[3], 0) @ weights[4] + biases[4]


# Data ---------------------------------------------------------------------------------------------
def random_batch(S, B, obs_dim, action_dim, noise_shape=0, seed=0, dtype=torch.float32):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, S, B, obs_dim))
    action = rng.uniform(-1, 1, size=(S, B, action_dim))
    reward = rng.normal(size=(S, B))
    not_terminated = rng.random((S, B)) > 0.25
    noise = rng.normal(size=noise_shape)
    columns = obs, action, reward, next_obs, not_terminated, noise
    return [torch.from_numpy(np.float32(x)).to(dtype) for x in columns]


def random_columns():
    """Random obs, action, reward, next_obs, not_terminated of 60 transitions, in float64."""
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, 60, 4))
    action = rng.uniform(-1, 1, size=(60, 2))
    return [torch.from_numpy(x) for x in (obs, action, rng.normal(size=60), next_obs, 1.0 * (rng.random(60) > 0.25))]


def random_frames(S=1, B=3, seed=0):
    """Random obs, action, reward, next_obs, not_terminated of Atari games; a third of them is terminal."""
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (S, B, 5, 84, 84), dtype=np.uint8))
    action = torch.from_numpy(rng.integers(0, 3, (S, B)))
    reward = torch.from_numpy(np.float32(rng.choice([-1.0, 0.0, 1.0], (S, B))))
    return frames[:, :, :4], action, reward, frames[:, :, 1:], (torch.arange(B) % 3 > 0).expand(S, B).float()


# Environments -------------------------------------------------------------------------------------
class LoggedEnv(gym.Env):
    """Actions between -2 and 3 and -1 and 0; every third episode ends in step 5, the rest at a limit of 7 steps.
    `logs` has a list per environment of a list per episode of (obs, action, reward, next_obs)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(np.float32([-2, -1]), np.float32([3, 0]))
    logs = []

    def __init__(self):
        self.episodes = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if not self.episodes:
            LoggedEnv.logs.append(self.episodes)
        self.episodes.append([])
        self.obs = np.float32([len(self.episodes), 0, *self.np_random.normal(size=2)])
        return self.obs.copy(), {}

    def step(self, action):
        assert np.all(action >= [-2.00001, -1.00001]) and np.all(action <= [3.00001, 0.00001])
        before = self.obs
        self.obs = before + np.float32([0, 1, *action])
        reward = float(action[0] - 2 * action[1])
        self.episodes[-1].append((before, action.copy(), reward, self.obs.copy()))
        return self.obs.copy(), reward, len(self.episodes) % 3 == 0 and self.obs[1] == 5, False, {}


gym.register("Logged-v0", f"{__name__}:LoggedEnv", max_episode_steps=7)


def logged_rows(s):
    """All steps of environment s, (steps, 11): obs, action in [-1, 1], reward, next_obs, not terminated."""
    rows = []
    for n, episode in enumerate(LoggedEnv.logs[s], 1):
        for t, (obs, action, reward, next_obs) in enumerate(episode, 1):
            terminated = n % 3 == 0 and t == 5
            rows.append(np.hstack([obs, action * [0.4, 2] + [-0.2, 1], reward, next_obs, not terminated]))
    return np.array(rows)
