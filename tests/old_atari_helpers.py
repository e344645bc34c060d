"""What the tests of scripts that still have their old form share; it goes with them."""

from pathlib import Path
import gymnasium as gym
import numpy as np
import random
import signal
import sys
import torch
CPU = torch.device("cpu")
A = 4  # actions of FakeGames


class FakeGames:
    """What the scripts use of AtariVectorEnv. Frames, rewards from -3 to 3 and lengths of 3 to 11 steps are random, and
    depend on the last seed and on all actions since; `episodes` has what was played: per environment a list of lists of
    (frame, action, reward)."""

    made = []
    single_action_space = gym.spaces.Discrete(A)

    def __init__(self, environment, num_envs):
        self.rngs, self.left = [None] * num_envs, np.zeros(num_envs, int)
        self.obs = np.zeros((num_envs, 4, 84, 84), np.uint8)
        self.episodes, self.seeds = [[] for _ in range(num_envs)], [[] for _ in range(num_envs)]
        FakeGames.made.append(self)

    def begin(self, i):
        self.obs[i], self.left[i] = 0, self.rngs[i].integers(3, 12)
        self.obs[i, -1] = self.rngs[i].integers(0, 256, (84, 84))
        self.episodes[i].append([])

    def reset(self, *, seed, options=None):
        which = np.flatnonzero(options["reset_mask"]) if options else np.arange(len(self.obs))
        assert len(seed) == len(which)
        for i, number in zip(which, seed):
            if number >= 0:
                self.rngs[i] = np.random.default_rng(number)
                self.seeds[i].append(int(number))
            self.begin(i)
        return self.obs.copy(), {}

    def step(self, action):
        assert action.shape == (len(self.obs),) and action.dtype == np.int64
        reward, over = np.zeros(len(self.obs), np.int32), self.left == 1
        for i, rng in enumerate(self.rngs):
            if self.left[i] == 0:  # as AtariVectorEnv does when nobody has reset it
                self.begin(i)
                continue
            rng.random(1 + action[i])  # what happens from here on depends on the action
            reward[i] = rng.integers(-3, 4)
            self.episodes[i][-1].append((self.obs[i, -1].copy(), int(action[i]), int(reward[i])))
            self.left[i] -= 1
            self.obs[i] = np.concatenate([self.obs[i, 1:], rng.integers(0, 256, (1, 84, 84))])
        cut = over & (reward > 1)
        return self.obs.copy(), reward, over & ~cut, cut, {}

    def close(self):
        pass


def make_batch(S=1, B=4, seed=0):
    """A batch as `update` wants it, a quarter of the transitions terminal."""
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (S, B, 5, 84, 84), dtype=np.uint8))
    action = torch.from_numpy(rng.integers(0, A, (S, B)))
    reward, not_terminal = rng.integers(-1, 2, (S, B)), rng.random((S, B)) > 0.25
    return (
        frames[:, :, :4],
        action,
        *map(torch.from_numpy, (np.float32(reward), frames[:, :, 1:].numpy(), np.float32(not_terminal))),
    )
SMALL = """--env-id ALE/Pong-v5 --channels 2 3 4 --hidden-size 8 --padding valid --batch-size 4 --device cpu
    --eval-workers 0""".split()


def play_main(monkeypatch, module, *flags, games=FakeGames):
    """main() of a script on FakeGames, or with games=None the real ones, in this process; returns the FakeGames."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    if games:
        monkeypatch.setattr(module, "make_atari", games)
    first = len(FakeGames.made)
    try:
        module.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return FakeGames.made[first] if games else None


def checkpoint_of(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def differences(ours, theirs, name="checkpoint"):
    """Names of what is not bit-identical in two checkpoints."""
    if isinstance(ours, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [name]
    if isinstance(ours, dict):
        keys = [] if ours.keys() == theirs.keys() else [f"{name}: {sorted(ours.keys() ^ theirs.keys())}"]
        return keys + sum((differences(ours[k], theirs[k], f"{name}.{k}") for k in ours.keys() & theirs.keys()), [])
    if isinstance(ours, list | tuple):
        parts = (differences(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return sum(parts, [])
    return [] if ours == theirs else [name]
BLIND = *SMALL, "--eval-episodes", 0
