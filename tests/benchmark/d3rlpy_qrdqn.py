"""QR-DQN of d3rlpy beside ours on the log of Catch: one update from equal weights, scores, updates per second.

    d3venv/bin/pip install tyro tqdm tensorboard ale-py==0.12.1        # an environment as d3rlpy_check.py says
    PYTHONPATH=algorithms:tests d3venv/bin/python tests/benchmark/d3rlpy_qrdqn.py 1000 0 1 2 3 4   # updates, seeds

Both run in one process, on the same batches, and play the same episodes: a score is the mean of ten evaluations of 50.
What differs: the first weights (ours as in the REM code; d3rlpy's are torch's), and the place of Adam's epsilon, which
is left as each has it. In the comparison of one update it is moved to where it means the same.
"""

import pickle
import sys
import time

import catch  # noqa: F401, registers the game
import numpy as np
import qrdqn_atari
import tables
import torch
from d3rlpy import algos, models, optimizers, preprocessing
from d3rlpy.dataset import TransitionMiniBatch

CHANNELS = (8, 16, 16)
ARGS = qrdqn_atari.Args(
    dataset=("atari/catch",), env_id="catch:Catch-v0", channels=CHANNELS, hidden_size=64, padding="valid",
    learning_rate=1e-3, adam_eps=1e-6, target_every=100, num_updates=100_000, device="cpu",
)  # fmt: skip


def make_theirs(eps):
    filters = [[n, kernel, stride] for n, kernel, stride in zip(CHANNELS, (8, 4, 3), (4, 2, 1))]
    config = algos.DQNConfig(
        encoder_factory=models.PixelEncoderFactory(filters, feature_size=ARGS.hidden_size),
        q_func_factory=models.QRQFunctionFactory(n_quantiles=ARGS.num_quantiles),
        observation_scaler=preprocessing.PixelObservationScaler(),
        optim_factory=optimizers.AdamFactory(eps=eps),
        learning_rate=ARGS.learning_rate,
        batch_size=ARGS.batch_size,
        gamma=ARGS.gamma,
        target_update_interval=ARGS.target_every,
    )
    algo = config.create()
    algo.create_impl((4, 84, 84), 3)
    return algo


def batches(replay, seed, num_updates):
    """obs and next_obs (1, B, 4, 84, 84), action, reward and not_terminated (1, B) of one update after the other."""
    for step in range(0, num_updates, qrdqn_atari.CHUNK):
        action, reward, not_terminated, *frames = replay.draw([seed], step, ARGS.batch_size)
        for near, *columns in zip(frames, action, reward, not_terminated):
            yield near[:, :, :4], *columns, near[:, :, 1:]


def update_ours(agent, batch, i):
    obs, action, reward, not_terminated, next_obs = batch
    qrdqn_atari.update(agent, obs, action, reward, next_obs, not_terminated, ARGS)
    if i % ARGS.target_every == 0:
        qrdqn_atari.synchronize(agent)


def update_theirs(algo, batch, i):  # which counts its updates itself
    obs, *columns, next_obs = [np.float32(x[0]) for x in batch]
    action, reward, not_terminated = [column[:, None] for column in columns]
    ones = np.ones_like(reward)
    algo.update(TransitionMiniBatch(obs, action, reward, next_obs, action, 1 - not_terminated, ones, []))


class Ours(torch.nn.Module):
    """Frames (episodes, 1, 4, 84, 84) -> best actions (episodes, 1)."""

    def __init__(self, agent):
        super().__init__()
        self.policy = qrdqn_atari.GreedyPolicy(agent.network)

    def forward(self, frames):
        return self.policy(frames.transpose(0, 1)).T


class Theirs(torch.nn.Module):
    def __init__(self, algo):
        super().__init__()
        self.q_function = algo.impl.q_function[0]

    def forward(self, frames):
        return self.q_function(frames[:, 0] / 255).q_value.argmax(-1, keepdim=True)


def swap_pixels_and_channels(weight):
    """Of the hidden layer, (64, channels * pixels), as in d3rlpy, to (64, pixels * channels), as in ours."""
    return weight.unflatten(1, (CHANNELS[-1], -1)).transpose(1, 2).flatten(1)


@torch.no_grad()
def copy_weights(algo, agent):
    """d3rlpy's network into ours, and ours into the target. Returns a function that gives d3rlpy's, in our layout."""
    layers = [x for x in algo.impl.q_function.modules() if isinstance(x, (torch.nn.Conv2d, torch.nn.Linear))]

    def as_ours():
        weights = [layer.weight for layer in layers]
        weights[3:] = [swap_pixels_and_channels(weights[3]).T, weights[4].T]
        return [x.detach().clone() for x in weights], [layer.bias.detach().clone() for layer in layers]

    for ours, theirs in zip((agent.network.weights, agent.network.biases), as_ours()):
        for x, y in zip(ours, theirs, strict=True):
            x[0].copy_(y)
    qrdqn_atari.synchronize(agent)
    return as_ours


def main():
    num_updates, *seeds = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    files, _ = qrdqn_atari.load_replay(ARGS)
    env_id, references = qrdqn_atari.evaluation_environment(ARGS)
    replay = qrdqn_atari.LoggedFrames(files, ARGS, 0)

    # one update: sqrt(1 - 0.999) is between the places of epsilon at the first step
    torch.manual_seed(0)
    agent = qrdqn_atari.Agent(3, ARGS)
    algo = make_theirs(ARGS.adam_eps / (1 - 0.999) ** 0.5)
    as_ours = copy_weights(algo, agent)
    before = sum(as_ours(), [])
    batch = next(batches(replay, 0, qrdqn_atari.CHUNK))
    update_ours(agent, batch, 1)
    update_theirs(algo, batch, 1)
    after = sum(as_ours(), [])
    ours = [x[0] for x in [*agent.network.weights, *agent.network.biases]]
    difference = max((x - y).abs().max().item() for x, y in zip(ours, after, strict=True))
    moved = max((x - y).abs().max().item() for x, y in zip(before, after))
    print(f"one update: largest difference {difference:.1e}, largest step {moved:.1e}", flush=True)

    scores, speeds = np.zeros((2, len(seeds), 10)), np.zeros((2, len(seeds)))
    for s, seed in enumerate(seeds):
        torch.manual_seed(seed)
        agent = qrdqn_atari.Agent(3, qrdqn_atari.Args(**{**vars(ARGS), "seed": seed}))
        algo = make_theirs(ARGS.adam_eps)
        learners = (update_ours, agent, Ours), (update_theirs, algo, Theirs)
        for i, batch in enumerate(batches(replay, seed, num_updates), 1):
            for k, (update, learner, policy) in enumerate(learners):
                started = time.process_time()
                update(learner, batch, i)
                speeds[k, s] += time.process_time() - started
                if i % (num_updates // 10) == 0:
                    pickled = pickle.dumps(policy(learner).eval())
                    rows = qrdqn_atari.run_atari_episode(pickled, env_id, references, range(50), i, seed)
                    scores[k, s, i // (num_updates // 10) - 1] = rows[:, 5].mean()
    for k, name in enumerate(("ours", "d3rlpy")):
        interval = tables.with_interval(list(scores[k][None].mean(-1)), tables.mean)
        speed = num_updates / np.median(speeds[k])
        print(f"{name}: score {interval}, last evaluation {scores[k, :, -1].mean():.1f}, {speed:.3g} updates/s")


if __name__ == "__main__":
    main()
