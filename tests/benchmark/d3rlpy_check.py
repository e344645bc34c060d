"""IQL, TD3+BC, CRR, BCQ and CQL of d3rlpy beside ours on hopper/replay-v0: scores, and updates per second.

    python -m venv d3venv && d3venv/bin/pip install d3rlpy==2.8.1 torch==2.13.0 numpy==2.4.6 mujoco==3.11.0 imageio
    python tests/benchmark/d3rlpy_check.py --d3rlpy d3venv/bin/python --only IQL TD3PlusBC CRR --updates 5000
    python tests/benchmark/d3rlpy_check.py --d3rlpy d3venv/bin/python --speed

It runs in our environment and calls our scripts, and itself in d3rlpy's, which gets the same transitions as an .npz
(with each method's reward and clip of actions), in the batches that ours draws (BCQ: others, as evenly), and the same
settings where both have them. Scores (ours, d3rlpy's): mean of the last three of ten evaluations. Speeds (ours;
d3rlpy's as fit() makes them; without its sampler; first over second): updates per second of CPU, one thread, in turns.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARED = "--hidden-sizes 128 128 --batch-size 256 --gamma 0.99 --device cpu"
OURS = {
    "IQL": "iql_red --sampler uniform --beta 3 --expectile 0.7",
    "TD3PlusBC": "td3_bc_red --sampler uniform --bc-alpha 2.5",
    "CRR": "crr_red --sampler uniform --beta 10 --num-action-samples 4",
    "BCQ": "bcq --vae-hidden-sizes 128 128 --learning-rate 1e-3 --num-next-actions 10 --num-candidates 10",
    "CQL": "cql_red --sampler uniform --cql-alpha 5 --num-action-samples 10",
}
THEIRS = {
    "IQL": dict(expectile=0.7, weight_temp=3.0, max_weight=100.0),
    "TD3PlusBC": dict(alpha=2.5, target_smoothing_sigma=0.2, target_smoothing_clip=0.5, update_actor_interval=2),
    "CRR": dict(n_critics=1, beta=10.0, n_action_samples=4, advantage_type="mean", weight_type="exp", max_weight=20.0)
    | dict(target_update_type="hard", target_update_interval=100),
    "BCQ": dict(lam=0.75, beta=0.5, action_flexibility=0.05, n_action_samples=10, imitator_learning_rate=1e-3),
    "CQL": dict(conservative_weight=5.0, n_action_samples=10, temp_learning_rate=3e-4)
    | dict(alpha_learning_rate=0.0, initial_alpha=1.0),  # alpha stays
}


def make_theirs(name, num_updates, obs):
    """d3rlpy's algorithm with the settings of ours; this and the next two run in its environment."""
    from d3rlpy import algos, models, optimizers, preprocessing

    net = models.VectorEncoderFactory([128, 128])
    rate = 1e-3 if name == "BCQ" else 3e-4
    settings = dict(actor_encoder_factory=net, critic_encoder_factory=net, batch_size=256, gamma=0.99, tau=0.005)
    settings |= dict(actor_learning_rate=rate, critic_learning_rate=rate, n_critics=2) | THEIRS[name]
    config = getattr(algos, f"{name}Config")(**settings)
    config.value_encoder_factory = config.imitator_encoder_factory = net  # of IQL, of BCQ
    if name == "IQL":
        cosine = optimizers.lr_schedulers.CosineAnnealingLRFactory(T_max=num_updates)
        config.actor_optim_factory = optimizers.AdamFactory(lr_scheduler_factory=cosine)
    if name == "TD3PlusBC":
        moments = obs.mean(0, np.float64), obs.std(0, np.float64)
        config.observation_scaler = preprocessing.StandardObservationScaler(*moments, eps=1e-3)
    algo = config.create()
    algo.create_impl((obs.shape[1],), 3)
    return algo


def train_theirs(data, name, num_updates, seed):
    """Prints the mean return of ten episodes, of the last three evaluations."""
    import d3rlpy
    import gymnasium
    import torch

    d3rlpy.seed(seed)
    algo = make_theirs(name, num_updates, data["obs"])
    if name == "CRR":  # acts by the mean, as ours; d3rlpy's draws one of four samples, by their Q
        algo.predict = lambda obs: algo.impl.policy(torch.from_numpy(np.float32(obs))).squashed_mu.detach().numpy()
    env = gymnasium.make("Hopper-v5")
    env.reset(seed=seed)  # later resets go on from here
    columns = [data[key] for key in ("obs", "action", "reward", "next_obs", "action", "terminated")]
    returns = []
    uniforms = [np.random.default_rng((seed, 1, i)).random((20, 256)) for i in range(0, num_updates, 20)]
    for i, uniform in enumerate(np.concatenate(uniforms), 1):
        batch = [column[(uniform * len(column)).astype(int)] for column in columns]  # as our `Sampler` draws
        algo.update(d3rlpy.dataset.TransitionMiniBatch(*batch, np.ones((256, 1), np.float32), []))
        if i % (num_updates // 10) == 0 and i > 0.75 * num_updates:
            returns.append(d3rlpy.metrics.evaluate_qlearning_with_environment(algo, env, n_trials=10))
    print(np.mean(returns))


def time_theirs(data, name):
    """Prints updates per second of CPU time as fit() makes them, and without its sampler."""
    from d3rlpy.dataset import MDPDataset

    buffer = MDPDataset(*[data[key] for key in ("obs", "action", "reward", "terminated", "cut")])
    algo = make_theirs(name, 10**6, data["obs"])
    seconds = []
    while np.sum(seconds) < 4:
        times = [time.process_time()]
        batch = buffer.sample_transition_batch(256)
        times.append(time.process_time())
        algo.update(batch)
        seconds.append(np.diff([*times, time.process_time()]))
    sampling, updating = np.mean(seconds[1:], 0)  # the first prepares
    print(1 / (sampling + updating), 1 / updating)


def last_line(*command):
    """What a program prints last, word by word."""
    text = subprocess.check_output(["env", "OMP_NUM_THREADS=1", *map(str, command)], text=True)
    return text.splitlines()[-1].split()


def main(d3rlpy: Path, updates: int = 10_000, seeds: int = 3, only: tuple[str, ...] = (*OURS,), speed: bool = False):
    sys.path.append(str(ROOT / "algorithms"))
    import iql_red
    import tables

    data = iql_red.load_data(iql_red.Args())
    cut = np.isin(np.arange(len(data.obs)), data.lengths.cumsum() - 1) & (data.terminated == 0)
    low, high = data.references
    for name in only:
        limit = {"IQL": 1 - 1e-5, "CQL": 0.999}.get(name, 1)  # as main() of our scripts
        scale = 1000 / np.ptp(data.returns) if name == "IQL" else 1
        columns = {"obs": data.obs, "action": data.action.clip(-limit, limit), "reward": scale * data.reward[:, None]}
        columns |= {"next_obs": data.next_obs, "terminated": data.terminated[:, None], "cut": cut}
        path = ROOT / "runs" / "d3rlpy" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{key: np.float32(column) for key, column in columns.items()})
        theirs = d3rlpy, __file__, path, name
        script, *flags = f"{OURS[name]} {SHARED}".split()
        if speed:
            timer = [ROOT / "tests/benchmark/throughput.py", script, "--num-seeds", 1, "--rounds", 1, "--seconds", 4]
            timer.append(f"--flags={' '.join(flags)}")  # prints | script | 1 | speed | ...
            rounds = [(last_line(sys.executable, *timer)[5], *last_line(*theirs)) for _ in range(3)]
            ours, fit, update = np.float64(rounds).T
            cells = [f"{np.median(x):.3g} ({min(x):.3g} to {max(x):.3g})" for x in (ours, fit, update, ours / fit)]
        else:
            flags += ["--num-updates", updates, "--eval-every", updates // 10, "--log-every", updates // 10]
            flags += ["--num-seeds", seeds, "--run-dir", path.with_suffix("")]
            last_line(sys.executable, ROOT / f"algorithms/{script}.py", *flags)
            rows = np.genfromtxt(path.with_suffix("") / "evaluations.csv", delimiter=",", names=True)
            last = rows["update"] > 0.75 * updates
            ours = [rows["normalized_score"][last & (rows["seed"] == seed)].mean() for seed in range(seeds)]
            returns = np.array([float(*last_line(*theirs, updates, seed)) for seed in range(seeds)])
            cells = [tables.with_interval([x], tables.mean) for x in (ours, 100 * (returns - low) / (high - low))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1].endswith(".npz"):
        path, name, *numbers = sys.argv[1:]
        (train_theirs if numbers else time_theirs)(dict(np.load(path)), name, *map(int, numbers))
    else:
        import tyro

        tyro.cli(main, description=__doc__)
