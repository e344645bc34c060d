"""The mathematics of bcq.py against what shares no code with it: torch.distributions, whole updates in float64 with
one candidate at a time. Replay and Environments are tested in test_sac.py, random numbers in test_awac.py, its two
stages in test_stages.py."""

import harness
import numpy as np
import pytest
import torch
from reference import Learner, adams_with, check_updates, forward, random_batch, randomize
from torch.distributions import Normal, kl_divergence

bcq = harness.load("bcq")

OBS_DIM = 4
ACTION_DIM = 2
LATENT_DIM = 4
K = 3


def make_args(**flags):
    small = {"hidden_sizes": (16, 12), "vae_hidden_sizes": (16, 16), "num_next_actions": K, "num_candidates": 7}
    return bcq.Args(**{**small, "device": "cpu", **flags})


def make_agent(args, size=0.6):
    """An agent in float64 of random numbers of this size, so that targets differ from online networks. With 1 for
    Adam's eps, its steps tell a mean from a sum too."""
    agent = bcq.Agent(OBS_DIM, ACTION_DIM, args).double()
    randomize(agent, size)
    adams_with(agent, eps=1)
    return agent


class Reference(Learner):
    """One seed of BCQ, written from the equations, one candidate at a time, with Adam by hand."""

    def __init__(self, agent, s, args):
        super().__init__(agent, s, args)
        self.seen = {name: [] for name in ("log_std", "z", "moved", "best", "gap")}
        modules = agent.vae.encoder, agent.vae.decoder, agent.perturbation.net, agent.target_perturbation.net
        self.modules = {name: (net, s) for name, net in zip(("encoder", "decoder", "xi", "target_xi"), modules)}
        for c in range(2):
            self.modules |= {f"q{c}": (agent.critic, 2 * s + c), f"target_q{c}": (agent.target_critic, 2 * s + c)}
        self.nets = {k: [x[i].detach().clone() for x in net.parameters()] for k, (net, i) in self.modules.items()}

    def act(self, xi, obs, z):
        """pi(s, z), (2)."""
        self.likely = forward(self.nets["decoder"], obs, z.clamp(-0.5, 0.5)).tanh().detach()
        moved = self.likely + self.args.max_perturbation * forward(self.nets[xi], obs, self.likely).tanh()
        self.seen["z"].append(z.ravel())
        self.seen["moved"].append(moved.ravel().detach())
        return torch.clip(moved, -1, 1)

    def update(self, obs, action, reward, next_obs, not_terminated, noise):
        """What the script logs of this seed."""
        args = self.args
        for layer in sum(self.nets.values(), []):
            layer.requires_grad_()
        noise = noise.unflatten(0, (K + 2, len(obs)))
        mean, raw = forward(self.nets["encoder"], obs, action).split(LATENT_DIM, dim=1)
        posterior = Normal(mean, torch.clip(raw, -4, 15).exp())
        self.seen["log_std"].append(raw.ravel().detach())
        rebuilt = forward(self.nets["decoder"], obs, posterior.mean + posterior.stddev * noise[0]).tanh()
        squared_error = ((rebuilt - action) ** 2).mean()
        kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean()
        vae_loss = squared_error + 0.5 * kl
        self.minimize(encoder=vae_loss, decoder=vae_loss)

        values = []
        for z in noise[1:-1]:
            next_action = self.act("target_xi", next_obs, z)
            q = [forward(self.nets[f"target_q{c}"], next_obs, next_action)[:, 0].detach() for c in range(2)]
            values.append(args.min_weight * torch.minimum(*q) + (1 - args.min_weight) * torch.maximum(*q))
            self.seen["gap"].append(q[0] - q[1])
        best = torch.stack(values).max(0)
        self.seen["best"].append(best.indices)
        y = torch.where(not_terminated > 0, reward + args.gamma * best.values, reward)
        q = torch.stack([forward(self.nets[f"q{c}"], obs, action)[:, 0] for c in range(2)])
        critic_loss = ((q - y) ** 2).mean(1).sum()
        self.minimize(q0=critic_loss, q1=critic_loss)

        policy_action = self.act("xi", obs, noise[-1])
        actor_loss = -forward(self.nets["q0"], obs, policy_action).mean()
        self.minimize(xi=actor_loss)
        self.move_targets("q0", "q1", "xi")
        losses = {"reconstruction": squared_error, "kl": kl, "critic": critic_loss, "actor": actor_loss}
        logs = {f"loss/{name}": loss for name, loss in losses.items()}
        logs |= {"value/q": q, "policy/perturbation": (policy_action - self.likely).abs()}
        return {name: x.mean().item() for name, x in logs.items()}

    def assert_same(self, agent, s, atol):
        for name, (net, i) in self.modules.items():
            for x, y in zip(net.parameters(), self.nets[name]):
                torch.testing.assert_close(x[i].detach(), y.detach(), rtol=0, atol=atol)


def test_updates_against_float64():
    """Four updates of two seeds, which do not mix: logs and all parameters; every branch is taken."""
    args = make_args(num_seeds=2, learning_rate=2**-4, target_update_rate=0.25, gamma=0.875, max_perturbation=0.6,
                     min_weight=0.7)  # fmt: skip
    agent = make_agent(args)
    references = [Reference(agent, s, args) for s in range(2)]
    shape = 2, (K + 2) * 24, LATENT_DIM
    batches = [random_batch(2, 24, OBS_DIM, ACTION_DIM, shape, seed, torch.float64) for seed in range(4)]
    check_updates(bcq, agent, references, batches, args)
    for reference in references:
        seen = {name: torch.cat(x) for name, x in reference.seen.items()}
        assert seen["log_std"].min() < -4 < seen["log_std"].max() and len(seen["best"].unique()) == K
        assert seen["gap"].min() < 0 < seen["gap"].max() and (seen["z"].abs() > 0.5).double().mean() > 0.2
        assert 0 < (seen["moved"].abs() > 1).double().mean() < 1


def test_sizes_and_first_weights():
    """BCQ's: 400-300 and 750-750, a latent vector twice as long as the action."""
    agent = bcq.Agent(11, 3, bcq.Args(device="cpu"))
    nets = agent.vae.encoder, agent.vae.decoder, agent.perturbation.net, agent.critic
    sizes = [[*(w.shape[1] for w in net.weights), net.weights[-1].shape[2]] for net in nets]
    assert sizes == [[14, 750, 750, 12], [17, 750, 750, 3], [14, 400, 300, 3], [14, 400, 300, 1]]
    assert 0.98 < agent.vae.decoder.weights[0].abs().max() * 17**0.5 <= 1.000001  # as torch.nn.Linear's


def test_the_policy_against_a_loop():
    """The candidate of highest Q_1, not Q_2; those of an evaluation are new at every step, and a function of the
    episode's first observation."""
    args = make_args(num_seeds=2, max_perturbation=0.4)
    agent = make_agent(args)
    policy = bcq.BestOfCandidates(agent, args)
    rng = np.random.default_rng(3)
    chosen = []  # by either critic
    for obs, noise in zip(rng.normal(size=(14, 2, OBS_DIM)), rng.normal(size=(14, 2, 7, LATENT_DIM))):
        action = policy.best(torch.from_numpy(obs), torch.from_numpy(noise))
        for s in range(2):
            reference = Reference(agent, s, args)
            x = torch.from_numpy(obs[s : s + 1])
            candidates = [reference.act("xi", x, torch.from_numpy(z[None])) for z in noise[s]]
            q = [[forward(reference.nets[f"q{c}"], x, a).item() for a in candidates] for c in range(2)]
            torch.testing.assert_close(action[s], candidates[np.argmax(q[0])][0])
            chosen.append(np.argmax(q, axis=1))
    assert len(set(np.ravel(chosen))) > 3 and any(first != second for first, second in chosen)

    agent.float()
    obs = torch.randn(2, 1, OBS_DIM, generator=torch.Generator().manual_seed(0))
    calls = []
    for x in (obs, obs, obs.flip(0)):  # an episode each
        policy = bcq.BestOfCandidates(agent, args)
        policy.best = lambda obs, noise, best=policy.best: calls.append(noise) or best(obs, noise)
        assert [policy(x).shape for _ in range(2)] == [(2, 1, ACTION_DIM)] * 2
    for now, then in ((calls[0], calls[2]), (calls[1], calls[3]), (calls[0], calls[4].flip(0))):
        assert torch.equal(now, then)
    numbers = torch.stack(calls[:2])
    assert numbers.shape == (2, 2, 7, LATENT_DIM) and len(numbers.unique()) == numbers.numel()


def test_a_share_is_a_share():
    with pytest.raises(SystemExit, match="^error: "):
        bcq.Args(min_weight=1.5)


@pytest.mark.parametrize("gamma", [0.99, 0.0])
def test_bcq_looks_ahead_and_stays_in_the_data(monkeypatch, gamma):
    """A log of actions a between -0.5 and 0.5, whose clone is 0. The first costs 0.5 a; the second step pays 2 a and
    is the end, at an observation that looks like the first. So Q(first, a) = (2 gamma - 0.5) a: best in the data is
    0.5, or -0.5 for who does not look ahead; a critic that was asked anything would like 1."""
    monkeypatch.setattr(bcq, "KL_WEIGHT", 0.02)
    monkeypatch.setattr(bcq, "LATENT_CLIP", 2.0)
    a, b = np.random.default_rng(0).uniform(-0.5, 0.5, size=(2, 4000, 1))
    zero, one = np.zeros_like([a, a]) + [[[0]], [[1]]]
    first = [one, zero, a, -0.5 * a, zero, a, one]  # s = (is first, last action), a, r, s', not terminated
    second = [zero, a, b, 2 * a, one, zero, zero]
    rows = torch.from_numpy(np.float32(np.concatenate([np.concatenate(x, 1) for x in (first, second)])))
    args = make_args(num_seeds=2, hidden_sizes=(32, 32), vae_hidden_sizes=(32, 32), learning_rate=5e-3,
                     target_update_rate=0.05, gamma=gamma)  # fmt: skip
    agent = bcq.Agent(2, 1, args)
    for step in range(0, 300, bcq.CHUNK):
        for u, noise in zip(*bcq.draw_uniforms_and_noise(range(2), 64, ((K + 2) * 64, 2), "cpu", step)):
            obs, action, reward, next_obs, mask = rows[(u * len(rows)).long()].split([2, 1, 1, 2, 1], dim=-1)
            bcq.update(agent, obs, action, reward.squeeze(-1), next_obs, mask.squeeze(-1), noise, args)
    noise = torch.randn(2, 100, 2, generator=torch.Generator().manual_seed(0))
    action = bcq.BestOfCandidates(agent, args).best(torch.tensor([[1.0, 0.0]] * 2), noise)
    action = action if gamma else -action
    assert 0.3 < action.min() and action.max() < 0.6
