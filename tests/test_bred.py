"""The mathematics of bred.py against what shares no code with it: numbers by hand, whole updates in float64,
cql_red.py's own agents, and an environment that is stepped again."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch
from reference import assert_same_layers, check_updates, linear_layers, random_batch, randomize
from torch.distributions import Normal

bred = harness.load("bred")
cql = harness.load("cql_red")
update = bred.update

OBS_DIM = 4
ACTION_DIM = 2
MEMBERS = {"hidden_sizes": [16, 16], "gamma": 0.9, "cql_alpha": 3.0, "num_action_samples": 2, "num_members": 3}


def make_args(num_members=3, **flags):
    args = bred.Args(**{"batch_size": 32, "device": "cpu", **flags})
    vars(args).update(MEMBERS | {"num_members": num_members})
    return args


def make_agent(args, size=0.0):
    """An agent of random numbers of this size, so that targets and critics differ."""
    num_policies = args.num_members if args.independent else 1
    agent = bred.Agent(OBS_DIM, ACTION_DIM, args, num_policies)
    randomize(agent, size)
    agent.actor.log_std_scale.data += 1
    return agent


def make_batch(G=1, n=0, B=32, seed=0):
    """Random obs, action, reward, next_obs, not_terminated, noise."""
    return random_batch(G, B, OBS_DIM, ACTION_DIM, (G, 3 * n + 2, B, ACTION_DIM), seed)


# Mixture and distillation -------------------------------------------------------------------------
def moments(means, stds):
    """Those of one-dimensional Gaussians, one number of each member."""
    gaussian = torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64).log()
    actor = SimpleNamespace(gaussian=lambda obs: [x.view(-1, 1, 1) for x in gaussian])
    mixture = SimpleNamespace(actor=actor, num_policies=len(means))
    mean, std = bred.Mixture.moments(mixture, torch.zeros(1, 1, 1))
    return mean.item(), std.item()


def test_moments_by_hand():
    """Equal members; means of 1 and -1; of -1, 0 and 1; a deviation that no policy can have."""
    assert moments([0.3] * 5, [0.7] * 5) == pytest.approx((0.3, 0.7))
    assert moments([1, -1], [0.5, 0.5]) == pytest.approx((0, math.sqrt(1.25)))
    assert moments([-1, 0, 1], [0.5] * 3) == pytest.approx((0, math.sqrt(0.25 + 2 / 3)))
    assert moments([-20, 20], [1, 1]) == pytest.approx((0, math.exp(2)))


def policy_of(actor, g, obs):
    """Mean and deviation (B, A) of policy g, computed from its weights."""
    x = obs
    for i, (weight, bias) in enumerate(zip(actor.net.weights, actor.net.biases)):
        x = (x.relu() if i > 0 else x) @ weight[g] + bias[g]
    mean, log_std = x.chunk(2, dim=-1)
    return mean, (actor.log_std_scale[g] * log_std + actor.log_std_shift[g]).clamp(-20, 2).exp()


def test_distillation_step():
    """The loss is (8) of each seed; a step moves the student only, seed by seed."""
    args = make_args(num_seeds=2)
    agent = make_agent(args, size=0.4).double()
    teachers = make_agent(make_args(num_seeds=2, independent=True), size=0.5).double().actor
    members = bred.Mixture(teachers, 3)
    obs = make_batch(2)[0].double()
    expected = []
    for s in range(2):
        mean, std = map(torch.stack, zip(*[policy_of(teachers, 3 * s + i, obs[s]) for i in range(3)]))
        mixture_std = ((std**2 + mean**2).mean(0) - mean.mean(0) ** 2).sqrt().clamp(max=math.exp(2))
        student_mean, student_std = policy_of(agent.actor, s, obs[s])
        error = (student_mean - mean.mean(0)) ** 2 + (student_std - mixture_std) ** 2
        expected.append(error.sum(1).mean())
    loss = bred.Mixture(agent.actor, 1).distance(members, obs)
    torch.testing.assert_close(loss, torch.stack(expected))
    gradients = torch.autograd.grad(sum(expected), list(agent.actor.parameters()))
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    bred.minimize(loss.sum(), agent.optimizers["distillation"])
    for (name, x), gradient in zip(agent.actor.named_parameters(), gradients):
        step = args.learning_rate * gradient / (gradient.abs() + 1e-8)  # Adam's first
        torch.testing.assert_close(x, before[f"actor.{name}"] - step, rtol=0, atol=1e-9)
    moved = {name.split(".")[0] for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"actor"}


def test_early_stopping_of_each_seed_by_itself():
    """The best student so far is kept; two epochs without a better one end it for good, others go on."""
    agent = make_agent(make_args(num_seeds=3))
    losses = [[3, 3, 3], [2, 4, 4], [1, 5, 2], [2, 1, 3], [2, 1, 3], [9, 9, 1]]
    kept = [[0, 0, 0], [1, 0, 0], [2, 0, 2], [2, 0, 2], [2, 0, 2], [2, 0, 2]]
    over = [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]]
    for epoch, of_seed in enumerate(losses):
        for parameter in agent.actor.parameters():
            parameter.data[:] = epoch + 10 * torch.arange(3).view(3, 1, 1)  # each seed's own
        agent.keep_best(torch.tensor(of_seed, dtype=torch.float32), 2)
        for best in agent.best_actor.parameters():
            expected = torch.tensor(kept[epoch]) + 10 * torch.arange(3)
            assert torch.equal(best, expected.view(3, 1, 1).expand_as(best)), epoch
        assert (agent.stale_epochs >= 2).tolist() == [bool(x) for x in over[epoch]], epoch
    assert agent.best_loss.tolist() == [1, 3, 2] and agent.num_epochs == 6


def test_the_distillation_loop(monkeypatch, tmp_path):
    """It ends when the student is the mixture, gives the best student, trains on no state that validates, and
    goes on from its checkpoint to the same end, bit by bit."""
    seen, losses = [], []
    distance = bred.Mixture.distance
    monkeypatch.setattr(bred.Mixture, "distance", lambda *x: (seen.append(x[2][..., 0]), distance(*x))[1])
    flags = {"learning_rate": 0.01, "epoch_length": 40, "num_seeds": 2}
    members = bred.Mixture(make_agent(make_args(num_seeds=2, independent=True), size=0.3).actor, 3)
    obs = torch.randn(500, OBS_DIM, generator=torch.Generator().manual_seed(0))
    obs[:, 0] = torch.arange(500) / 500

    def distil(agent, **more):
        args = make_args(**flags, **more)
        writer = SimpleNamespace(add_scalar=lambda name, x, epoch: losses.append(x))
        rows = np.empty((0, len(bred.ROW)))
        bred.distil(agent, members, obs, range(2), rows, tmp_path, writer, args)

    agent = bred.Agent(OBS_DIM, ACTION_DIM, make_args(**flags), 1)
    distil(agent, distil_epochs=12)
    validation = [x for x in seen if x.shape == (2, 5)]
    training = torch.stack([x for x in seen if x.shape == (2, 32)])
    assert len(validation) == len(losses) == 12 and len(training) == 12 * 40
    assert not set(training.flatten().tolist()) & set(validation[0].flatten().tolist())
    assert len(training.unique()) == 495 and not torch.equal(training[:, 0], training[:, 1])
    assert losses[-1] < 0.3 * losses[0] and losses[-1] < 0.02
    for actor, best in zip(agent.actor.parameters(), agent.best_actor.parameters()):
        assert torch.equal(actor, best)

    distil(bred.Agent(OBS_DIM, ACTION_DIM, make_args(**flags), 1), distil_epochs=5)
    resumed = bred.Agent(OBS_DIM, ACTION_DIM, make_args(**flags), 1)
    bred.load(tmp_path / "checkpoint.pt", resumed)
    distil(resumed, distil_epochs=12)
    for name, x in agent.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name
    resumed.stale_epochs += 20  # as much as its patience
    distil(resumed, distil_epochs=1000)
    assert resumed.num_epochs == 12


# Replay and the pace of updates -------------------------------------------------------------------
def make_replay(num_data, num_added, online_steps=200, num_seeds=2, **flags):
    """Row n of seed s is 10 n + s, data are negative."""
    args = make_args(num_seeds=num_seeds, online_steps=online_steps, **flags)
    replay = bred.BalancedReplay(-1.0 - torch.arange(num_data)[:, None], args)
    for n in range(num_added):
        replay.add([10.0 * n + np.arange(num_seeds)[:, None]])
    return replay


@pytest.mark.parametrize("t, count", [(20, 200), (40, 208), (120, 240), (200, 256)])
def test_counts_of_balanced_batches(t, count):
    """rho_0 is 0.75, t_final 160. Online rows are the seed's own that are filled, each as likely as any."""
    replay = make_replay(60, t, initial_online_fraction=0.75, anneal_steps=160, batch_size=256)
    uniform = torch.rand(400, 2, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = replay.rows[replay.index(uniform)][..., 0]
    assert torch.all((drawn >= 0).sum(-1) == count)
    for s in range(2):
        values, counts = drawn[:, s].unique(return_counts=True)
        offline = [-1.0 - n for n in range(60)] if count < 256 else []
        assert values.tolist() == sorted(offline) + [10 * n + s for n in range(t)]
        for part in counts.double().split([len(offline), t]):
            assert ((part - part.mean()) ** 2 / part.mean()).sum() < t + 60 + 5 * math.sqrt(2 * (t + 60))


def test_uniform_replay():
    """Every row is as likely as any, wherever it stands in the batch."""
    grid = (torch.arange(400, dtype=torch.float64) + 0.5).expand(2, -1) / 400
    replay = make_replay(300, 100, uniform_replay=True, batch_size=400)
    drawn = replay.rows[replay.index(grid)][..., 0]
    for s in range(2):
        assert drawn[s].tolist() == [-1.0 - n for n in range(300)] + [10.0 * n + s for n in range(100)]


def test_replay_comes_back():
    """... also into a longer run, in which it goes on."""
    replay = make_replay(7, 20)
    longer = make_replay(7, 0, online_steps=300)
    longer.load_state_dict(replay.state_dict())
    assert torch.equal(longer.steps[:, :20], replay.steps[:, :20])
    longer.add([np.array([[200.0], [201.0]])])
    almost = torch.full((2, 32), 1 - 2**-53, dtype=torch.float64)
    assert longer.rows[longer.index(almost)].amax((1, 2)).tolist() == [200, 201]


def test_updates_of_epochs():
    """10,000 after the first thousand steps, a thousand after every other; no chunk of draws comes twice."""
    args = bred.Args()
    chunks = [args.chunks_of_epoch(start, start + 1000) for start in range(0, 250_000, 1000)]
    assert [20 * len(x) for x in chunks] == [10_000] + [1000] * 249
    assert [n for x in chunks for n in x] == list(range(259_000 // 20))
    assert len(bred.Args(online_steps=5000, warm_up=0.1).chunks_of_epoch(0, 1000)) == 75
    assert len(bred.Args(warm_up=0).chunks_of_epoch(0, 1000)) == 50


# The update ---------------------------------------------------------------------------------------
class Reference:
    """One policy and the critics of its members in float64: torch.nn, torch.distributions, one loss a network."""

    def __init__(self, agent, g, args):
        self.args = args
        C = agent.critic.C
        self.actor = linear_layers(agent.actor.net, g)
        scalars = agent.actor.log_std_scale[g], agent.actor.log_std_shift[g]
        self.scale, self.shift = [x.detach().clone().requires_grad_() for x in scalars]
        self.critics = [linear_layers(agent.critic, C * g + c) for c in range(C)]
        self.targets = [linear_layers(agent.target_critic, C * g + c) for c in range(C)]
        self.log_alpha = agent.log_alpha[g].detach().clone().requires_grad_()
        policy = [*self.actor.parameters(), self.scale, self.shift]
        trained = [[self.log_alpha], policy, *[x.parameters() for x in self.critics]]
        rates = [args.policy_learning_rate] * 2 + [args.learning_rate] * C
        plain = {"foreach": False, "fused": False}
        self.optimizers = [torch.optim.Adam(x, lr=rate, **plain) for x, rate in zip(trained, rates)]

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).chunk(2, dim=1)
        std = torch.clip(self.scale * log_std + self.shift, -20, 2).exp()
        x = mean + std * noise
        log_slope = 2 * math.log(2) - 2 * torch.logaddexp(x, -x)  # of the tanh
        return x.tanh(), (Normal(mean, std).log_prob(x) - log_slope).sum(1)

    @staticmethod
    def q(critic, obs, action):
        return critic(torch.cat([obs, action], 1))[:, 0]

    def smaller(self, critics, obs, action):
        """Of each member's two critics, (members, B)."""
        q = [self.q(critic, obs, action) for critic in critics]
        return torch.stack([torch.minimum(*q[i : i + 2]) for i in range(0, len(q), 2)])

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        """All losses first, then all steps."""
        args = self.args
        n = args.num_action_samples if args.conservative_online else 0
        alpha = self.log_alpha.detach().exp()
        own, log_prob = self.sample(obs, noise[n])
        alpha_loss = -self.log_alpha * (log_prob.detach().mean() - ACTION_DIM)
        actor_loss = (alpha * log_prob - self.smaller(self.critics, obs, own).mean(0)).mean()
        critic_losses, logged_q = [], []
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, noise[2 * n + 1])
            next_value = self.smaller(self.targets, next_obs, next_action)
            if n == 0:
                next_value = next_value - alpha * next_log_prob
            y = torch.where(not_terminated > 0, reward + args.gamma * next_value, reward)
            others = [(torch.special.ndtr(x) * 2 - 1, -ACTION_DIM * math.log(2)) for x in noise[:n]]
            others += [self.sample(obs, x) for x in noise[n + 1 : 2 * n + 1]]
            others += [self.sample(next_obs, x) for x in noise[2 * n + 2 :]]
        for c, critic in enumerate(self.critics):
            q = self.q(critic, obs, action)
            logged_q.append(q)
            loss = ((q - y[c // 2]) ** 2).mean()
            if n > 0:
                terms = torch.stack([self.q(critic, obs, a) - log_density for a, log_density in others])
                loss = loss + args.cql_alpha * (terms.exp().sum(0).log() - q).mean()
            critic_losses.append(loss)
        losses = [alpha_loss, actor_loss, *critic_losses]
        parameters = [optimizer.param_groups[0]["params"] for optimizer in self.optimizers]
        gradients = [torch.autograd.grad(*x, retain_graph=True) for x in zip(losses, parameters)]
        for optimizer, xs, of_xs in zip(self.optimizers, parameters, gradients):
            for x, gradient in zip(xs, of_xs):
                x.grad = gradient
            optimizer.step()
        for target, online in zip(self.targets, self.critics):
            for x, y in zip(target.parameters(), online.parameters()):
                x.data += args.target_update_rate * (y.data - x.data)
        logs = {"loss/actor": actor_loss, "loss/critic": sum(critic_losses), "policy/entropy": -log_prob}
        logs |= {"value/q": torch.stack(logged_q), "policy/alpha": alpha}
        return {name: x.mean().item() for name, x in logs.items()}

    def assert_same(self, agent, g, atol):
        ours = agent.log_alpha[g], agent.actor.log_std_scale[g], agent.actor.log_std_shift[g]
        torch.testing.assert_close(ours, (self.log_alpha, self.scale, self.shift), rtol=0, atol=atol)
        assert_same_layers(agent.actor.net, g, self.actor, atol)
        for c in range(agent.critic.C):
            assert_same_layers(agent.critic, agent.critic.C * g + c, self.critics[c], atol)
            assert_same_layers(agent.target_critic, agent.critic.C * g + c, self.targets[c], atol)


@pytest.mark.parametrize("num_members, flag", [(3, None), (1, None), (2, "independent"), (2, "conservative_online")])
def test_updates_against_reference(num_members, flag):
    """Three updates of two seeds, with steps large enough that every question of order shows."""
    rates = {"learning_rate": 0.02, "policy_learning_rate": 0.03, "target_update_rate": 0.3}
    args = make_args(num_members, num_seeds=2, **rates, **({flag: True} if flag else {}))
    agent = make_agent(args, size=0.4).double()
    G = 2 * num_members if args.independent else 2
    references = [Reference(agent, g, args) for g in range(G)]
    batches = [[x.double() for x in make_batch(G, 2 * args.conservative_online, seed=n)] for n in range(3)]
    check_updates(bred, agent, references, batches, args, atol=1e-6)


def test_fine_tuning_learns():
    """One-step episodes of reward -4 |a - (0.6, -0.6)|^2 turn the policy there, which cloning the data would not."""
    args = make_args(2, learning_rate=0.01, policy_learning_rate=0.01)
    agent = bred.Agent(OBS_DIM, ACTION_DIM, args, 1)
    agent.log_alpha.data -= 3
    best = torch.tensor([0.6, -0.6])
    for n in range(150):
        batch = make_batch(seed=n)
        batch[2] = -4 * (batch[1] - best).square().sum(-1)
        batch[4].fill_(0)
        update(agent, *batch, args)
    acts = bred.Mixture(agent.actor, 1)(make_batch()[0]).mean((0, 1))
    assert (acts - best).abs().max() < 0.35, acts


# Members, runs ------------------------------------------------------------------------------------
def write_members(folder, seed, num_seeds, obs_dim=OBS_DIM, action_dim=ACTION_DIM, **flags):
    """A run folder of cql_red.py, whose agents are random; returns them."""
    args = cql.Args(seed=seed, num_seeds=num_seeds, hidden_sizes=(8, 8), device="cpu", **flags)
    agent = cql.Agent(np.zeros((1, obs_dim)), action_dim, args)
    generator = torch.Generator().manual_seed(seed)
    for parameter in agent.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"args": asdict(args)}))
    torch.save({"agent": agent.state_dict()}, folder / "checkpoint.pt")
    return agent


@pytest.mark.parametrize("num_seeds, independent", [(2, False), (2, True), (6, False)])
def test_members_are_those_of_cql_red_in_their_order(num_seeds, independent, tmp_path):
    """Two and four agents: critics, also as targets; policies and their mixture; temperatures."""
    trained = [write_members(tmp_path / str(n), seed=n, num_seeds=n) for n in (2, 4)]
    runs = str(tmp_path / "2"), str(tmp_path / "4")
    args = bred.Args(runs, num_seeds=num_seeds, independent=independent, device="cpu")
    bred.take_flags_of_members(args)
    N = 6 // num_seeds
    assert args.num_members == N and args.gamma == 0.99 and list(args.dataset) == ["hopper/replay-v0"]
    agent = bred.Agent(OBS_DIM, ACTION_DIM, args, N if independent else 1)
    before = [x.clone() for x in agent.actor.parameters()]
    mixture = bred.load_members(agent, OBS_DIM, ACTION_DIM, args)
    obs, action, *_ = make_batch()
    with torch.no_grad():
        q = [x.critic(obs.expand(n, -1, -1), action.expand(n, 1, -1, -1)) for n, x in zip((2, 4), trained)]
        means = [x.actor.gaussian(obs.expand(n, -1, -1))[0] for n, x in zip((2, 4), trained)]
        G = len(agent.log_alpha)
        for critic in (agent.critic, agent.target_critic):
            ours = agent.twin_q(critic, obs.expand(G, -1, -1), action.expand(G, -1, -1))
            torch.testing.assert_close(ours.reshape(6, 2, 32), torch.cat(q).reshape(6, 2, 32))
        means = torch.cat(means).unflatten(0, (num_seeds, N)).mean(1).tanh()
        torch.testing.assert_close(mixture(obs.expand(num_seeds, -1, -1)), means)
        own = bred.Mixture(agent.actor, G // num_seeds)(obs.expand(num_seeds, -1, -1))
    if G == 6:  # nothing to distil
        torch.testing.assert_close(own, means)
    else:
        assert all(map(torch.equal, before, agent.actor.parameters()))
    log_alpha = torch.cat([x.log_alpha.detach() for x in trained]).unflatten(0, (G, -1)).mean(1)
    torch.testing.assert_close(agent.log_alpha.detach(), log_alpha)


def test_members_that_do_not_fit_are_refused(tmp_path):
    write_members(tmp_path / "a", 0, 2)
    write_members(tmp_path / "b", 0, 2, gamma=0.9)
    write_members(tmp_path / "c", 0, 2, reward_transform="stretch")
    for runs, num_seeds in (("ab", 1), ("c", 1), ("aa", 3), ("", 1)):
        args = bred.Args(tuple(str(tmp_path / run) for run in runs), num_seeds=num_seeds)
        with pytest.raises(SystemExit, match="error: "):
            bred.take_flags_of_members(args)


def test_a_run(monkeypatch, tmp_path):
    """What updates learn from, how many there are, what the environments saw; and a run that goes on."""
    data = harness.write_minari(tmp_path / "data", harness.hopper_episodes())
    write_members(tmp_path / "members", 0, 4, 11, 3, dataset=(str(data),))
    batches = []
    monkeypatch.setattr(bred, "update", lambda agent, *x: (batches.append(x[:5]), update(agent, *x))[1])
    monkeypatch.setattr(bred, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bred.py", *map(str, flags)])
        bred.main()
        return torch.load(tmp_path / "run" / "checkpoint.pt")["agent"]

    small = "--epoch-length 40 --eval-every 80 --warm-up 0.5 --anneal-steps 160 --batch-size 8 --distil-epochs 2"
    small += " --eval-episodes 1 --num-seeds 2 --seed 3 --policy-learning-rate 0 --device cpu"
    before = run("--offline", tmp_path / "members", *small.split(), "--online-steps", 80, "--run-dir", tmp_path / "run")
    after = run("--resume", tmp_path / "run", "--online-steps", 120)
    assert len(batches) == len({str(batch[1]) for batch in batches}) == (40 + 40) + 40 + 40
    assert harness.read_evaluations(tmp_path / "run")["update"].tolist() == [0, 0, 80, 80, 120, 120]
    steps = after["replay._extra_state"]
    assert steps.shape == (2, 120, 27) and torch.equal(steps[:, :80], before["replay._extra_state"])

    logged = np.concatenate([episode[1] for episode in harness.hopper_episodes()])
    for i, batch in enumerate(batches):
        t = 40 if i < 80 else 80 if i < 120 else 120
        num_online = round(8 * (0.5 + 0.5 * t / 160))
        for s in range(2):
            row = torch.cat([x.view(2, 8, -1)[s] for x in batch], 1)
            is_own = (row[:, None] == steps[s, :t]).all(-1).any(1)
            assert is_own.tolist() == [True] * num_online + [False] * (8 - num_online)
            distances = np.abs(row[num_online:, None, 11:14].numpy() - logged).max(-1)
            assert distances.min(1).max() < 1e-6

    agent = bred.Agent(11, 3, SimpleNamespace(**vars(make_args(2, num_seeds=2)) | {"hidden_sizes": [8, 8]}), 1)
    agent.load_state_dict({name: x for name, x in after.items() if "replay" not in name})
    policy = bred.Mixture(agent.actor, 1)  # which has not moved since its distillation
    for s in range(2):
        env = gym.make("Hopper-v5")
        ended = True
        for t, row in enumerate(steps[s]):
            if ended or t == 80:
                seed = np.random.SeedSequence((3 + s, bred.EXPLORATION, t, 1)).generate_state(1).item()
                obs, _ = env.reset(seed=seed)
            np.testing.assert_allclose(row[:11], obs, atol=1e-5)
            noise = bred.draw_steps((3 + s,), bred.EXPLORATION, t // 20, 0, (1, 3), "cpu")[1][t % 20]
            with torch.no_grad():
                mean, std = policy.moments(row[:11].expand(2, 1, -1))
            torch.testing.assert_close(row[11:14], (mean + std * noise).tanh()[s, 0])
            obs, reward, ended, _, _ = env.step(row[11:14].numpy())
            np.testing.assert_allclose(row[14:26], [reward, *obs], atol=1e-4)
            assert row[26] == 1 - ended
