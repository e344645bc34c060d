"""The given cases, where they lie beside the checkout: odd datasets, environments and places, each with what is right.

By default the first script runs those that no other test has: its process and output (13, 22, 23, 35), environments
(14, 18), names and broken files (27, 29, 30). CASES=1 runs all of them for all offline scripts, in a quarter of an hour.
"""

import os
import subprocess
import sys

import harness
import pytest

CASES = harness.ROOT.parent / "shared" / "cases"
SCRIPTS, NUMBERS = harness.OFFLINE[:1], "13 14 18 22 23 27a 27b 27c 29a 29b 30a 30b 35".split()
if os.environ.get("CASES"):
    SCRIPTS, NUMBERS = harness.OFFLINE, []


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not beside this checkout")
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_cases_do_what_is_right(script, tmp_path):
    subprocess.run([sys.executable, CASES / "make.py", tmp_path / "cases"], check=True, capture_output=True)
    path = harness.ROOT / "algorithms" / f"{script}.py"
    command = [sys.executable, CASES / "run.py", tmp_path / "cases", sys.executable, path, *NUMBERS, "-j", "2"]
    if script != "iql_red":
        command.append("--other")  # it may normalise observations
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
