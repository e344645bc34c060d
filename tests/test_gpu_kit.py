"""tests/benchmark/gpu.py without a GPU: all parts at toy size, with CUDA graphs emulated on the CPU."""

import json
import subprocess
import sys

import harness
import pytest

GPU = harness.ROOT / "tests" / "benchmark" / "gpu.py"
# Of the scripts whose offline runs in graphs test_cuda_graphs.py compares with eager ones only one, and those that
# have an online stage; of the agents on logged frames one
PROVED = {*harness.OFFLINE} - {"iql_red", "awac", "bcq"}
PROVED |= {f"{agent}_atari" for agent in ("offline_dqn", "ensemble_dqn", "qrdqn", "c51")}
SCRIPTS = [path.stem for path in harness.SCRIPTS if "class CudaGraph" in path.read_text()]
SCRIPTS = [script for script in SCRIPTS if script not in PROVED]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What it wrote: all parts, scripts of all kinds; most of a minute on two cores."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    command = [sys.executable, str(GPU), "--out", str(folder), *"--device cpu --toy --jobs 2 --seconds 900".split()]
    for flags in (f"--parts 1 --scripts {' '.join(SCRIPTS)}", "--parts 2 3 4 --scripts iql_red sac"):
        done = subprocess.run([*command, *flags.split()], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    section = (folder / "section.md").read_text()
    assert section.startswith("## On a GPU") and done.stdout.strip().endswith(section.strip())
    return folder


@pytest.fixture(scope="module")
def results(out):
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line], (out / "log.txt").read_text()[-3000:]
    return {(line["part"], line["name"]): line for line in lines}


def test_graphs_are_right(results):
    assert len(SCRIPTS) == 9
    for script in SCRIPTS:
        line = results[1, script]
        assert line["right"] and line["difference"] == 0 and line["updates in graphs"] >= 60
    assert results[1, "iql_red"]["resumed"] == 0  # the bits of a run that was not stopped


def test_speeds_are_measured(results):
    assert {"iql_red", "sac"} <= {name for part, name in results if part == 2}
    assert [name.split()[2] for part, name in results if part == 4][-3:] == ["chunk", "tf32", "compile"]
    for part, name in results:
        if part in (2, 4):
            line = results[part, name]
            assert min(line["updates/s"], line["replays alone"], line["empty kernels"], line["kernels"]) > 0


def test_main_job_is_scored(results):
    for sampler in ("red", "uniform"):
        line = results[3, sampler]
        assert line["updates"] == 60 and line["95 % from"] <= line["score"] <= line["to"]
        assert line["seconds waited"] > 0 and line["and at the end"] < 60 * line["minutes"]


def test_all_of_it_is_in_the_section(out, results):
    section = (out / "section.md").read_text()
    assert f"Right: {len(SCRIPTS)} of {len(SCRIPTS)} scripts; wrong: none." in section
    for (part, name), line in results.items():
        if part in (2, 4):
            assert f"{line['updates/s']:,.0f}" in section and name.split()[0] in section
        elif part == 3:
            assert f"| {name} | 60 |" in section
