"""Updates per second of the scripts, on the device at hand.

    python tests/benchmark/throughput.py                              every script, 1, 5 and 20 seeds
    python tests/benchmark/throughput.py iql_red --against PLACE      beside its text at a commit, in a folder

What is timed is main() itself without evaluations: draws, gathers and updates (online: steps). Variants of a
script take turns in one process, each stopped at its progress bar, so that ratios compare neighbours in time.
Without a GPU there is one thread, and seconds are those that this process had the CPU, which other work
hardly disturbs. Of dered_iql.py it is stage 1; bred.py is left out, since it wants trained members.
"""

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from scores import ROOT

sys.path.append(str(ROOT / "tests"))  # where catch.py is
SCRIPTS = tuple(sorted({path.stem for path in (ROOT / "algorithms").glob("*.py")} - {"bred"}))
CATCH = f"--dataset {ROOT}/tests/data/atari/catch --env-id catch:Catch-v0"
HOPPER = f"--dataset {ROOT}/tests/data/hopper/replay-v0"
GAME = "--env-id catch:Catch-v0 --replay-size 2000"
ONLINE = {"sac": "", "dqn_atari": GAME, "rem_online_atari": GAME}
FOREVER = 10**8  # updates
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[str, ...]] = SCRIPTS
    num_seeds: tuple[int, ...] = (1, 5, 20)  # agents side by side
    against: str | None = None  # compare with the scripts of this folder or commit
    rounds: int = 5  # turns of each variant
    seconds: float = 2.0  # a turn, at least one chunk of updates
    flags: str = ""  # more flags of the scripts: --flags="--hidden-sizes 128 128"


class Variant:
    """main() of a script, in a thread that goes on only while `take` waits for it."""

    def __init__(self, path, flags):
        self.steps_left = 0
        self.go = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        self.error = None
        spec = importlib.util.spec_from_file_location(f"{path.stem}_{id(self)}", path)
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.module  # where dataclasses look
        spec.loader.exec_module(self.module)
        self.module.tqdm = self.bar
        sys.argv = [str(path), *flags]
        threading.Thread(target=self.run, daemon=True).start()
        self.wait()

    def run(self):
        try:
            self.module.main()
        except BaseException as error:  # also sys.exit
            self.error = error
        self.stopped.release()

    def wait(self):
        """Until it stands before a step."""
        self.stopped.acquire()
        if self.error:
            raise self.error

    def bar(self, steps, *args, **options):
        return self.in_turns(steps) if isinstance(steps, range) else steps  # the bar of reading data

    def in_turns(self, steps):
        for step in steps:
            if self.steps_left == 0:
                self.stopped.release()
                self.go.acquire()
            if self.steps_left < 0:
                raise EOFError
            self.steps_left -= 1
            yield step

    def take(self, num_steps):
        """Seconds of so many steps of the loop."""
        start = clock()
        self.steps_left = num_steps
        self.go.release()
        self.wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - start

    def end(self):
        self.steps_left = -1
        self.go.release()
        self.stopped.acquire()
        self.error = None  # whose traceback holds all of main()


def measure(script, paths, args, folder):
    """Seconds an update {(number of path, seeds): (rounds,)}, all variants in turns."""
    flags = f"--num-updates {FOREVER} {HOPPER}"
    if script in ONLINE:
        flags = f"--num-steps {FOREVER} --learning-starts 100 {ONLINE[script]}"
    elif script.endswith("_atari"):
        flags = f"--num-updates {FOREVER} {CATCH}"
    flags += f" --eval-every {FOREVER} --eval-episodes 0 {args.flags}"
    found = {}
    turns = {}
    for i, path in enumerate(paths):
        for S in args.num_seeds:
            where = f"--num-seeds {S} --run-dir {folder}/{script}-{len(found)}"
            variant = Variant(path, f"{flags} {where}".split())
            variant.take(120 if script in ONLINE else 4)  # to the first updates; to the CUDA graph
            turns[i, S] = variant, max(1, round(args.seconds / variant.take(1)))
            found[i, S] = []
    updates_a_step = 1 if script in ONLINE else 20
    for _ in range(args.rounds):
        for key, (variant, num_steps) in turns.items():
            found[key].append(variant.take(num_steps) / num_steps / updates_a_step)
    for variant, _ in turns.values():
        variant.end()
    return found


def other_text(script, against, folder):
    """The script in another folder or, copied to `folder`, as it was at a commit."""
    if Path(against).is_dir():
        return Path(against, f"{script}.py").absolute()
    show = "git", "show", f"{against}:algorithms/{script}.py"
    path = Path(folder, f"{script}.py")
    path.write_text(subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    return path


def main():
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    titles = ["script", "seeds", "updates/s of a seed", "of all seeds"]
    titles += [f"that over the speed of {args.against}"] * bool(args.against)
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for script in args.scripts:
            paths = [ROOT / "algorithms" / f"{script}.py"]
            if args.against:
                paths.append(other_text(script, args.against, folder))
            with contextlib.redirect_stdout(sys.stderr):  # what the scripts print
                found = measure(script, paths, args, folder)
            for S in args.num_seeds:
                seconds = np.array([found[i, S] for i in range(len(paths))])
                speed = 1 / np.median(seconds[0])
                text = f"| {script} | {S} | {speed:.4g} | {S * speed:.4g} |"
                if args.against:
                    ratios = seconds[1] / seconds[0]
                    text += f" {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f}) |"
                print(text, flush=True)


if __name__ == "__main__":
    main()
