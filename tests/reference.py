"""What the scripts are compared with, and shares no code with them: networks as torch.nn has them, networks and Adam
by hand, and an environment that keeps a log of its own."""

import gymnasium as gym
import numpy as np
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


# Data ---------------------------------------------------------------------------------------------
def random_batch(S, B, obs_dim, action_dim, noise_shape=0, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, S, B, obs_dim))
    action = rng.uniform(-1, 1, size=(S, B, action_dim))
    reward = rng.normal(size=(S, B))
    not_terminated = rng.random((S, B)) > 0.25
    noise = rng.normal(size=noise_shape)
    return [torch.from_numpy(np.float32(x)) for x in (obs, action, reward, next_obs, not_terminated, noise)]


def random_columns():
    """Random obs, action, reward, next_obs, not_terminated of 60 transitions, in float64."""
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, 60, 4))
    action = rng.uniform(-1, 1, size=(60, 2))
    return [torch.from_numpy(x) for x in (obs, action, rng.normal(size=60), next_obs, 1.0 * (rng.random(60) > 0.25))]


def four_states():
    """3,000 transitions, the same columns, of a chain whose end pays 5, while a step (an action above 0) costs 0.1.
    Most of the data quits, for 0.5 at once, and so does who clones it or who sees the next reward only."""
    rng = np.random.default_rng(0)
    eye = np.eye(4)
    state = rng.integers(4, size=3000)
    go = rng.random(3000) < 0.3
    action = np.where(go, 0.5, -0.5) + 0.1 * rng.normal(size=3000)
    reward = np.where(go, np.where(state == 3, 5, -0.1), 0.5)
    terminated = ~go | (state == 3)
    next_state = np.where(terminated, 3, state + 1)  # ends look like the best state, lest anyone bootstrap
    columns = eye[state], action[:, None], reward, eye[next_state], ~terminated
    return [torch.from_numpy(np.float32(column)) for column in columns]


def assert_goes_on(actor, right):
    """Who is right goes on in all four states, who is not in none of the first three; seed by seed."""
    states = torch.eye(4).expand(len(next(actor.parameters())), -1, -1)
    goes_on = actor(states) > 0  # (S, states, 1)
    assert goes_on.all() if right else not goes_on[:, :3].any()


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
