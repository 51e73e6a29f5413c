"""What a report of a large run takes: python benchmarks/report.py FOLDER [--steps 100000] [--completions 16]

Makes a run in FOLDER with `open_run`, as a user's loop would, unless there is one: figures of every step, a
journal with the texts of every step, checkpoints, one failure on the way. Then makes its page in a process of
its own, and prints the seconds, the most memory that it had, and the page's size. Each step is made durable,
so a folder in memory (/dev/shm) is the quickest to fill; reading is measured as the folder's files lie in the
page cache, or on the disk after `echo 3 >/proc/sys/vm/drop_caches`.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import rollforward

VOCABULARY = ("so", "we", "add", "the", "next", "digit", "carry", "one", "and", "check", "it", "again")
WORDS = " ".join(random.Random(1).choices(VOCABULARY, k=9000))
CHARACTERS = 1200
"""Of a completion."""
MEASURED = """\
import resource, sys
from rollforward.cli.main import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


class Failure(Exception):
    """What ends the first start."""


def texts(step: int, completions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step's rollouts: token ids, and JSON in which the samples can be read."""
    chance = random.Random(step)
    begins = [chance.randrange(len(WORDS) - CHARACTERS) for _ in range(completions)]
    rewards = [float(chance.random() < step / 100_000) for _ in range(completions)]
    info = {
        "prompts": [f"problem {step % 5000}, part {number // 4}" for number in range(completions)],
        "completions": [WORDS[begin : begin + CHARACTERS] for begin in begins],
        "rewards": {"right": rewards},
        "tokens": [CHARACTERS // 4] * completions,
        "stopped": [chance.random() < 0.9 for _ in range(completions)],
    }
    return {"ids": np.arange(completions, dtype=np.int32)}, info


def train(folder: Path, steps: int, completions: int, *, fails_at: int | None) -> None:
    """The loop."""
    tensors = {"policy": {"weights": np.zeros(1000, dtype=np.float32)}}
    with rollforward.open_run(folder, facts={"seed": 1}, keep=1000, log=lambda _line: None) as run:
        start = run.restore(tensors)
        for step in range(start.step if start else 0, steps):
            if step == fails_at:
                raise Failure
            chance = random.Random(-step)
            run.once(step, "rollouts", lambda step=step: texts(step, completions))
            with run.updating(step):
                tensors["policy"]["weights"] += 1
            reward = step / steps + chance.gauss(0, 0.05)
            run.metrics(
                step, reward=reward, reward_std=0.2, kl=chance.random(), grad_norm=chance.expovariate(1)
            )
            run.outcome(step, loss=chance.gauss(0, 1))
            run.checkpoint(step + 1, tensors, every=max(1, steps // 20))


def main() -> None:
    """Make the run if it is not there; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not options.folder.exists():
        for fails_at in (options.steps // 3, None):
            try:
                train(options.folder, options.steps, options.completions, fails_at=fails_at)
            except Failure:
                print(f"failed at step {fails_at}, as planned", flush=True)
    journal = sum(path.stat().st_size for path in options.folder.glob("journal/*/*"))
    print(f"{options.steps} steps, a journal of {journal / 1e9:.2f} GB")
    page = options.folder.with_suffix(".html")
    for _ in range(options.rounds):
        command = [sys.executable, "-c", MEASURED, "report", str(options.folder), "--out", str(page)]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        most = int(done.stdout.split()[-1]) / 1024
        print(f"{seconds:.1f} s, {most:.0f} MiB, a page of {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
