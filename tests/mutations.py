"""Do the tests notice? Puts one mistake at a time into a copy of the scripts, and runs a test that has to fail.

python tests/mutations.py                all of them, in ten minutes
python tests/mutations.py iql_red sac    those of some scripts
python tests/mutations.py --check        only: every text to be replaced is there, once
"""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Script, its text, what takes its place, and -k of tests in test_SCRIPT.py, or with FILE: in test_FILE.py
MUTATIONS = [
    ("iql_red", "1.0 * (u < 0)", "1.0 * (u > 0)", "updates_against"),
    ("iql_red", "agent.target_critic(obs_action)", "agent.critic(obs_action)", "updates_against"),
    ("iql_red", "args.beta * (target_q - value)", "args.beta * u.detach()", "updates_against"),  # the old V
    ("iql_red", "exponent.clamp(max=math.log(100)).exp()", "exponent.exp()", "updates_against"),
    ("iql_red", "(x - x.min()) / spread(x)", "(x.max() - x) / spread(x)", "test_samplers"),
    ("iql_red", "obs[1:], episode.terminations", "obs[1:], episode.truncations", "data:truncation and iql_red"),
    ("iql_red", "end - start == limit", "end - start > limit", "data:ends_of_d4rl and iql_red"),
    ("iql_red", "float(share or 1)", "1", "data:a_share and iql_red"),
    ("iql_red", "jobs = start_evaluation(first)", "jobs = []", "runs:resume_a_finished and iql_red"),
    ("iql_red", "range(first, args.num", "range(0, args.num", "runs:resume_a_finished and iql_red"),
    ("cql_red", "log_uniform, log_prob[:, 1:]", "log_uniform, next_log_prob[:, 1:]", "updates_against"),
    ("cql_red", "next_action[:, :1]).amin(1)", "next_action[:, :1]).amax(1)", "updates_against"),
    ("cql_red", "log_std.clamp(-20, 2)", "log_std", "updates_against"),
    ("td3_bc_red", "policy_q.detach().abs()", "policy_q.abs()", "updates_against"),
    ("td3_bc_red", "i % POLICY_DELAY == 0", "i % POLICY_DELAY == 1", "learners:what_the_learner and td3_bc_red"),
    ("crr_red", "agent.target_actor.distribution", "agent.actor.distribution", "updates_against"),
    ("crr_red", "updates = step + 1 + torch", "updates = step + torch", "learners:what_the_learner and crr"),
    ("dered_iql", "[*mlp.weights[:-1], *mlp.biases[:-1]]", "[*mlp.weights, *mlp.biases]", "heads_rest"),
    ("dered_iql", "max(first, self.start), self.end", "self.start, self.end", "test_a_run"),
    ("rvs_lds", "np.cumsum(reward, dtype=np.float64) - reward", "np.cumsum(reward)", "returns_to_go_by_hand"),
    ("rvs_lds", "self.return_to_go -=", "self.return_to_go +=", "evaluation_asks"),
    ("asac", '"amax", include_self', '"amin", include_self', "random_writes"),
    ("asac", "advantage.double() / args.beta", "-advantage.double() / args.beta", "updates_against"),
    ("iql_scaled", ").softmax(-1)\n", ").softmax(0)\n", "updates_against"),  # over seeds
    ("iql_scaled", "target.copy_(online)", "pass", "singular_vectors"),
    ("td3_bc_scaled", "next_noise.clamp(-NOISE_CLIP, NOISE_CLIP)", "next_noise", "updates_against"),
    ("td3_bc_scaled", "q.mean(1) - pessimism", "q.mean(1) + pessimism", "test_pessimism"),
    ("awac", "q_bar(agent.target_critic, next_obs", "q_bar(agent.critic, next_obs", "updates_against"),
    ("awac", "args.num_updates = first - agent.replay.num_added", "pass", "stages:and_resume"),
    ("bcq", ".unflatten(1, (K, B)).amax(1)", ".unflatten(1, (B, K)).amax(2)", "updates_against"),
    ("bcq", "1.0 - terminated[:, None]", "1.0 - envs.ended[:, None]", "stages:each_stage"),
    ("bred", "next_value -= alpha[:, None]", "next_value += alpha[:, None]", "updates_against"),
    ("bred", "self.place < round", "self.place <= round", "balanced_batches"),
    ("bred", "better] = now[better]", "better] = now[0]", "early_stopping"),
    ("sac", "next_q - alpha * next_log_prob", "next_q + alpha * next_log_prob", "against_reference"),
    ("sac", "min(self.num_added, self.size)\n", "self.size\n", "draws_evenly"),
    ("sac", "1.0 - terminated[:, None]", "1.0 - envs.ended[:, None]", "online:what_the_environments and sac"),
    ("sac", "int((i + 1) * share) == int(i * share)", "int((i + 1) * share) != int(i * share)", "thinned"),
    ("td3", "agent.target_actor(next_obs)", "agent.actor(next_obs)", "against_reference"),
    ("td3", "num_steps % args.policy_delay == 0", "step % args.policy_delay == 0", "online:new_episode and td3"),
    ("made_behavior", "low[:, None] <= high", "low[:, None] < high", "each_dimension"),
    ("made_behavior", "better = bits > self.best_bits", "better = bits < self.best_bits", "test_runs"),
    ("mood", "np.clip((1 + height) / 2, 0, 1)", "np.clip(height, 0, 1)", "quadruped_by_hand"),
    ("mood", "zip(states[1:], action", "zip(states[:-1], action", "relabelled"),
    ("rem_atari", "valid[3:-1] = True", "valid[3:] = True", "last_round"),
    ("rem_atari", "(1 - 0.9**t)", "(1 - 0.9 ** (t + 1))", "adam_of_tensorflow"),
    ("offline_dqn_atari", "agent.target_network(next_obs)", "agent.network(next_obs)", "offline_atari:equal_numpy"),
    ("offline_dqn_atari", "mean, mean, value=-1", "mean, mean, value=0", "rem_online_atari:rmsprop"),
    ("qrdqn_atari", "1 - tau, tau", "tau, 1 - tau", "offline_atari:quantile_huber"),
    ("qrdqn_atari", "next_quantiles.mean(-1).argmax", "next_quantiles.amax(-1).argmax", "offline_atari:equal_numpy"),
    ("c51_atari", "returns.clamp(atoms[0], atoms[-1])", "returns", "offline_atari:projection"),
    ("c51_atari", "num_updates % args.target_every", "step % args.target_every", "offline_atari:feeds and c51"),
    ("ensemble_dqn_atari", "return values.amax(2)", "return values.mean(2)", "offline_atari:equal_numpy"),
    ("ensemble_dqn_atari", "if averaged:", "if not averaged:", "offline_atari:equal_numpy"),
    ("dqn_atari", "obs = frames[:, :, :4]", "obs = frames[:, :, 1:]", "rem_online_atari:updates_of_a_run"),
    ("dqn_atari", "generator.random() < share_of", "generator.random() > share_of", "rem_online_atari:random_actions"),
    ("rem_online_atari", "reward.clip(-1, 1)", "reward", "stored_and_logged"),
    ("rem_online_atari", "mixtures[s] = random_mixtures([generators[s]], args)", "pass", "played_by_one"),
]  # fmt: skip


def run(root, file, expression):
    """Exit status of pytest in a forked process: 1 where a test fails."""
    process = os.fork()
    if process == 0:
        os.chdir(root)
        sys.stdout = open(os.devnull, "w")
        options = "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "-k", expression
        os._exit(pytest.main([f"tests/test_{file}.py", *options]))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(chosen):
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # bytecode may be that of another mutation
    sys.dont_write_bytecode = True
    for package in ("torch._dynamo", "torch.utils.tensorboard", "minari", "tyro", "gymnasium.envs.mujoco.hopper_v5"):
        importlib.import_module(package)  # once, not in every forked process
    survivors = 0
    with tempfile.TemporaryDirectory() as root:
        for folder in ("algorithms", "tests"):
            shutil.copytree(ROOT / folder, Path(root, folder))
        shutil.copy(ROOT / "pyproject.toml", root)
        for script, old, new, test in chosen:
            path = Path(root, f"algorithms/{script}.py")
            text = path.read_text()
            path.write_text(text.replace(old, new))
            *file, expression = test.split(":")
            caught = run(root, *(file or [script]), expression) == 1
            path.write_text(text)
            survivors += not caught
            print("caught  " if caught else "SURVIVED", script, repr(old), "->", repr(new), flush=True)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    chosen = [mutation for mutation in MUTATIONS if mutation[0] in sys.argv] or MUTATIONS
    for script, old, *_ in chosen:
        if (ROOT / f"algorithms/{script}.py").read_text().count(old) != 1:
            sys.exit(f"{script}.py does not have this once: {old}")
    if "--check" not in sys.argv:
        main(chosen)
