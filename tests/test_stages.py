"""The offline and the online stage of awac.py and bcq.py, on random data and in an environment that keeps a log of its
own: what updates learn from, who acts, what a run that goes on keeps."""

import math

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch
from reference import LoggedEnv, logged_rows, random_columns

# Flags; what is added to rewards; random numbers of every update for the actions before it, and all of them
STAGES = {
    "awac": (["--eval-samples", 1, "--reward-transform", "shift"], -1, 1, (1 + 2 * 32, 2)),
    "bcq": (["--vae-hidden-sizes", 8, "--num-candidates", 5, "--num-next-actions", 3], 0, 5, (5 + 5 * 32, 4)),
}
FLAGS = "--hidden-sizes 8 --batch-size 32 --num-updates 40 --eval-every 20 --device cpu --num-seeds 2 --eval-episodes 1"
scripts = pytest.mark.parametrize("script", STAGES)


@pytest.fixture
def main(script, monkeypatch, tmp_path):
    """main(*flags): a run on random data; returns what update() saw, and how often each of its graphs was called.
    Evaluations are of no length."""
    module = harness.load(script)
    update = module.update
    obs, action, reward, next_obs, not_terminated = [x.numpy() for x in random_columns()]
    ends = np.array([30.0, 3.0]), np.array([40, 20]), gym.spec("Logged-v0"), (math.nan, math.nan)
    data = module.Data(obs, action, reward, next_obs, not_terminated < 1, *ends)
    seen = []
    calls = []

    def recorder(agent, *inputs):
        seen.append([x.numpy().copy() for x in inputs[:-1]])
        return update(agent, *inputs)

    class Counted(module.CudaGraph):
        def __call__(self, *inputs):
            calls.append(id(self))
            return super().__call__(*inputs)

    monkeypatch.setattr(module, "update", recorder)
    monkeypatch.setattr(module, "CudaGraph", Counted)
    monkeypatch.setattr(module, "load_data", lambda args: data)
    monkeypatch.setattr(module, "run_episode", lambda *job: np.zeros((len(job[4]), 6)))

    def call(*flags):
        seen.clear()
        calls.clear()
        LoggedEnv.logs.clear()
        new = [*FLAGS.split(), *STAGES[script][0], "--run-dir", tmp_path / "run"]
        harness.run_main(script, *(flags if "--resume" in flags else [*new, *flags]))
        return [np.stack(x) for x in zip(*seen)], {i: calls.count(i) for i in calls}

    return call


@scripts
def test_what_each_stage_learns_from(script, main):
    """Offline, batches are even over the data. Online, a step with an action of the policy comes before each update,
    whose batch is even over the data and the seed's own steps so far, rewards transformed. A graph a stage."""
    _, shift, num_acting, noise_shape = STAGES[script]
    (*columns, noise), calls = main("--online-steps", 60)
    assert list(calls.values()) == [2, 60, 60]
    rewards = 1.0 * (np.arange(12) == 6)
    rows = np.concatenate([x.reshape(100, 2, 32, -1) for x in columns], -1)
    drawn = np.zeros((100, 2, 32), int)
    for s in range(2):
        own = logged_rows(s)
        assert len(own) == 60 and 0 < sum(own[:, -1] == 0) < 10
        table = np.concatenate([np.column_stack([x.numpy() for x in random_columns()]), own]) + shift * rewards
        distance = np.abs(rows[:, s, :, None, :4] - table[:, :4]).max(-1)
        drawn[:, s] = distance.argmin(-1)
        np.testing.assert_allclose(rows[:, s], table[drawn[:, s]], atol=1e-5)
    steps = np.arange(-39, 61).clip(min=0)[:, None, None]  # so far
    assert np.all(drawn < 60 + steps) and np.any(drawn == 59 + steps, where=steps > 0)
    share = (drawn >= 60).mean((1, 2))
    expected = steps.ravel() / (60 + steps.ravel())
    assert abs((share - expected).sum()) < 5 * np.sqrt((expected * (1 - expected) / 64).sum())
    counts = np.bincount(drawn[:40].ravel(), minlength=60)
    assert np.all(np.abs(counts - 2560 / 60) < 5 * np.sqrt(2560 / 60))

    chunk = harness.load(script).CHUNK
    for step in range(0, 100, chunk):  # the first rows of the noise are for acting
        _, expected = harness.load(script).draw_uniforms_and_noise([0, 1], 32, noise_shape, "cpu", step)
        np.testing.assert_array_equal(noise[step : step + chunk], expected[:, :, num_acting:])


@scripts
def test_first_online_action_and_resume(script, main, tmp_path, capsys):
    """The first action is the offline policy's. A resumed run keeps its steps, begins a new episode and says so; it
    does not go back to the offline stage."""
    module = harness.load(script)
    _, _, num_acting, noise_shape = STAGES[script]
    main("--online-steps", 0)
    assert not LoggedEnv.logs
    resume = "--resume", tmp_path / "run"
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    sizes = {"hidden_sizes": (8,)} | ({"vae_hidden_sizes": (8,)} if script == "bcq" else {})
    args = module.Args(num_seeds=2, device="cpu", **sizes)
    agent = module.Agent(4, 2, args)
    agent.load_state_dict({name: x for name, x in weights.items() if not name.startswith("replay")})
    main(*resume, "--online-steps", 20)
    _, noise = module.draw_uniforms_and_noise([0, 1], 32, noise_shape, "cpu", 40)
    first = np.stack([logged_rows(s)[0] for s in range(2)])
    act = agent.explore if script == "awac" else module.BestOfCandidates(agent, args).best
    action = act(torch.from_numpy(np.float32(first[:, :4])), noise[0, :, :num_acting])
    np.testing.assert_allclose(first[:, 4:6], action, atol=1e-5)

    before = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    capsys.readouterr()
    _, calls = main(*resume, "--online-steps", 60)
    assert "from step 20 on, with a new episode" in capsys.readouterr().out and list(calls.values()) == [40, 40]
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (before["num_updates"], after["num_updates"]) == (60, 100)
    steps = after["agent"]["replay._extra_state"]
    assert steps.shape[1] == 60 and torch.equal(steps[:, :20], before["agent"]["replay._extra_state"])
    assert steps[0, 20:28, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    for flags in (["--num-updates", 60], ["--num-updates", 20], ["--online-steps", 40]):
        assert main(*resume, *flags) == ([], {})
    assert main(*resume, "--num-updates", 60, "--online-steps", 80)[1].popitem()[1] == 20
    for flags in ({"online_steps": 20, "eval_episodes": 0}, {"online_steps": 30}):
        with pytest.raises(SystemExit, match="^error: "):
            module.Args(**flags)
