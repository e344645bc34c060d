"""The given cases, where they lie beside the checkout: odd datasets, environments and places, each with what is right.

Takes a minute and a half on two cores, for the first moved script; CASES=1 runs them for all.
"""

import os
import subprocess
import sys

import harness
import pytest

CASES = harness.ROOT.parent / "shared" / "cases"
SCRIPTS = harness.OFFLINE if os.environ.get("CASES") else harness.OFFLINE[:1]


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not beside this checkout")
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_cases_do_what_is_right(script, tmp_path):
    subprocess.run([sys.executable, CASES / "make.py", tmp_path / "cases"], check=True, capture_output=True)
    path = harness.ROOT / "algorithms" / f"{script}.py"
    command = [sys.executable, CASES / "run.py", tmp_path / "cases", sys.executable, path, "-j", "2"]
    if script != "iql_red":
        command.append("--other")  # it may normalise observations
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
