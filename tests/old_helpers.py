"""What the tests of scripts that still have their old form share; it goes with them."""

from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from types import SimpleNamespace
import gymnasium as gym
import math
import numpy as np
import time
O, A = 4, 2  # noqa: E741  dimensions of the small agents below


def layers_of(mlp):
    """[(weight, bias), ...] of an MLP, first layer first."""
    named = list(mlp.named_parameters())
    return list(zip(*([p for name, p in named if kind in name] for kind in ("weight", "bias"))))


def tanh_normal(mean, std):
    return TransformedDistribution(Independent(Normal(mean, std), 1), [TanhTransform()])


def forward(layers, x):
    """Output of a ReLU network [(W, b), ...] and the input of each layer."""
    inputs = []
    for i, (w, b) in enumerate(layers):
        inputs.append(x if i == 0 else np.maximum(x, 0))
        x = inputs[-1] @ w + b
    return x, inputs


def backward(layers, inputs, grad):
    """Gradients [(dW, db), ...] from the gradient at the output, and the gradient at the input."""
    grads = []
    for i, ((w, _), x) in reversed(list(enumerate(zip(layers, inputs)))):
        grads.append((x.T @ grad, grad.sum(0, keepdims=True)))
        grad = (grad @ w.T) * ((x > 0) if i else 1)
    return grads[::-1], grad


class NumpyCQL:
    """One seed of CQL in numpy, float64, written from the equations: one action at a time, all gradients by hand."""

    def __init__(self, agent, s, args):
        def layers(mlp, *lead):
            return [tuple(p[(s, *lead)].detach().numpy().copy() for p in pair) for pair in layers_of(mlp)]

        self.args, self.t, self.moments = args, 0, {}
        self.actor = layers(agent.actor.net)
        self.critics = [layers(agent.critic, c) for c in range(2)]
        self.targets = [layers(agent.target_critic, c) for c in range(2)]
        scalars = agent.actor.log_std_scale, agent.actor.log_std_shift, agent.log_alpha, agent.log_multiplier
        self.scale, self.shift, self.log_alpha, self.log_multiplier = (x[s].item() for x in scalars)

    def adam(self, name, p, grad, lr):
        m, v = self.moments.get(name, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        self.moments[name] = m, v
        m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
        return p - lr * m_hat / (np.sqrt(v_hat) + 1e-8)

    def step(self, name, layers, grads, lr):
        return [
            tuple(self.adam((name, i, j), p, g, lr) for j, (p, g) in enumerate(zip(*pair)))
            for i, pair in enumerate(zip(layers, grads))
        ]

    def policy(self, obs):
        out, inputs = forward(self.actor, obs)
        raw = out[:, A:]
        return SimpleNamespace(
            mean=out[:, :A],
            raw=raw,
            log_std=np.clip(self.scale * raw + self.shift, -20, 2),
            free=(self.scale * raw + self.shift > -20) & (self.scale * raw + self.shift < 2),
            inputs=inputs,
        )

    @staticmethod
    def sample(policy, noise):
        """Action, its log-probability, the point before the tanh."""
        x = policy.mean + np.exp(policy.log_std) * noise
        log_det = 2 * np.log(2) - 2 * np.logaddexp(x, -x)  # 1 - tanh(x)^2 = 4 / (e^x + e^-x)^2
        log_normal = -0.5 * noise**2 - policy.log_std - 0.5 * np.log(2 * np.pi)
        return np.tanh(x), np.sum(log_normal - log_det, 1, keepdims=True), x

    def update(self, batch, random_noise, noise, next_noise):
        args, B, n = self.args, len(batch), self.args.num_action_samples
        s, a, r, s_next, mask = np.split(batch, np.cumsum([O, A, 1, O]), axis=1)
        cloning = self.t < args.bc_updates
        self.t += 1
        alpha, multiplier = np.exp(self.log_alpha), min(np.exp(self.log_multiplier), 1e6)
        now, nxt = self.policy(s), self.policy(s_next)
        ours, theirs = [self.sample(now, e) for e in noise], [self.sample(nxt, e) for e in next_noise]

        # temperature: L = -log_alpha mean(log pi - A)
        own_action, own_log_prob, x = ours[0]
        log_alpha = self.adam("alpha", self.log_alpha, -(own_log_prob.mean() - A), args.policy_learning_rate)

        # policy
        passes = [forward(critic, np.concatenate([s, own_action], 1)) for critic in self.critics]
        q_own = np.concatenate([q for q, _ in passes], 1)
        climbed, dq_da = q_own.min(1, keepdims=True), np.zeros((B, A))
        for c, (critic, (_, inputs)) in enumerate(zip(self.critics, passes)):
            chosen = np.float64(q_own.argmin(1) == c)[:, None]
            dq_da += backward(critic, inputs, chosen)[1][:, O:]
        std = np.exp(now.log_std)
        d_x = alpha * 2 * np.tanh(x)  # of -log(1 - tanh(x)^2)
        if cloning:
            z = (np.arctanh(a) - now.mean) / std
            log_normal = -0.5 * z**2 - now.log_std - 0.5 * np.log(2 * np.pi)
            climbed = np.sum(log_normal - np.log(1 - a**2), 1, keepdims=True)
            d_mean, d_log_std = d_x - z / std, d_x * std * noise[0] - alpha + 1 - z**2
        else:
            d_x = d_x - dq_da * (1 - np.tanh(x) ** 2)
            d_mean, d_log_std = d_x, d_x * std * noise[0] - alpha
        actor_loss = np.mean(alpha * own_log_prob - climbed)
        d_log_std = d_log_std * now.free
        d_out = np.concatenate([d_mean, d_log_std * self.scale], 1) / B
        actor = self.step("actor", self.actor, backward(self.actor, now.inputs, d_out)[0], args.policy_learning_rate)
        scale = self.adam("scale", self.scale, np.sum(d_log_std * now.raw) / B, args.policy_learning_rate)
        shift = self.adam("shift", self.shift, np.sum(d_log_std) / B, args.policy_learning_rate)

        # backup
        backups = []
        for next_action, next_log_prob, _ in theirs[n:]:
            sa = np.concatenate([s_next, next_action], 1)
            backups.append((np.minimum(*(forward(t, sa)[0] for t in self.targets)), next_log_prob))
        best = np.argmax([q for q, _ in backups], 0)
        next_q = np.choose(best, [q for q, _ in backups])
        if args.backup_entropy:
            next_q = next_q - alpha * np.choose(best, [log_prob for _, log_prob in backups])
        y = r + args.gamma * mask * next_q

        # critics
        uniform = [2 * (0.5 * (1 + np.vectorize(math.erf)(e / math.sqrt(2)))) - 1 for e in random_noise]
        proposals = [(u, np.full((B, 1), A * math.log(0.5))) for u in uniform]
        proposals += [(action, log_prob) for action, log_prob, _ in ours[1:] + theirs[:n]]
        critic_loss, gaps, new_critics, self.cut = 0, [], [], 0
        for c, critic in enumerate(self.critics):
            logged, logged_inputs = forward(critic, np.concatenate([s, a], 1))
            sampled = [forward(critic, np.concatenate([s, action], 1)) for action, _ in proposals]
            if args.importance_sampling:
                terms = np.concatenate([q - log_prob for (q, _), (_, log_prob) in zip(sampled, proposals)], 1)
            else:
                terms = np.concatenate([logged, *(q for q, _ in sampled)], 1)
            top = terms.max(1, keepdims=True)
            weights = np.exp((terms - top) / args.cql_temperature)
            soft_maximum = top + args.cql_temperature * np.log(weights.sum(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            gap = soft_maximum - logged
            floor = -np.inf if args.gap_floor is None else args.gap_floor
            above = np.float64(gap > floor)
            self.cut += np.sum(1 - above)
            gaps.append(np.mean(np.maximum(gap, floor)))
            critic_loss += np.mean((logged - y) ** 2)
            strength = args.cql_alpha * (1 if args.lagrange_gap is None else multiplier)
            on_logged = 2 * (logged - y) / B - strength * above / B
            if not args.importance_sampling:
                on_logged, weights = on_logged + strength * above * weights[:, :1] / B, weights[:, 1:]
            grads = backward(critic, logged_inputs, on_logged)[0]
            for k, (_, inputs) in enumerate(sampled):
                more = backward(critic, inputs, strength * above * weights[:, k : k + 1] / B)[0]
                grads = [tuple(g + m for g, m in zip(*pair)) for pair in zip(grads, more)]
            new_critics.append(self.step(("critic", c), critic, grads, args.learning_rate))
        if args.lagrange_gap is not None:
            excess = args.cql_alpha * (np.mean(gaps) - args.lagrange_gap)
            grad = -np.exp(self.log_multiplier) * excess if self.log_multiplier < np.log(1e6) else 0.0
            self.log_multiplier = self.adam("multiplier", self.log_multiplier, grad, args.learning_rate)

        # all at once: every gradient above was taken at the old values
        self.actor, self.scale, self.shift, self.log_alpha, self.critics = actor, scale, shift, log_alpha, new_critics
        self.targets = [
            [
                tuple((1 - args.polyak) * old + args.polyak * new for old, new in zip(*pair))
                for pair in zip(target, critic)
            ]
            for target, critic in zip(self.targets, self.critics)
        ]
        return actor_loss, critic_loss, np.mean(gaps)


class LoggedEnv(gym.Env):
    """Actions between -2 and 3 and -1 and 0; every third episode ends in step 5, the rest at a time limit of 7 steps.

    LoggedEnv.logs has one list per environment made, of one list per episode, of (obs, action, reward, next_obs).
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(np.float32([-2, -1]), np.float32([3, 0]))
    logs = []

    def __init__(self):
        self.episodes = []
        LoggedEnv.logs.append(self.episodes)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes.append([])
        self.obs = np.float32([len(self.episodes), 0, self.np_random.normal()])
        return self.obs.copy(), {}

    def step(self, action):
        assert np.all(action >= self.action_space.low - 1e-6) and np.all(action <= self.action_space.high + 1e-6)
        before, self.obs = self.obs, self.obs + np.float32([0, 1, action.sum()])
        reward = float(action[0] - 2 * action[1])
        self.episodes[-1].append((before, np.array(action), reward, self.obs.copy()))
        return self.obs.copy(), reward, len(self.episodes) % 3 == 0 and self.obs[1] == 5, False, {}


def is_termination(number, length):
    """By LoggedEnv's rules: does its episode `number` (from 1) of this length end in a terminal state?"""
    return number % 3 == 0 and length == 5


gym.register("harness/Logged-v0", f"{__name__}:LoggedEnv", max_episode_steps=7)
