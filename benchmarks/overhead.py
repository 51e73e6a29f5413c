"""What being durable costs a run: python benchmarks/overhead.py [--steps 40] [--rounds 3] [--json FILE]

The demo's training (`examples/arithmetic`) by `rollforward train`, a process each, in turn: with
one checkpoint at the end, with one every ten steps, as often as `auto` finds worth it, and with one after
every step. The journal is always on. Each round's figure is taken from the time stamps of its metrics, so
nothing that a step does escapes it; the first steps, in which graphs are compiled or loaded, are left out.

    tokens/s    completion tokens over seconds, of the steps after the first
    ratio       to the run that saves once, of the best rounds: what other processes do only adds
    waited      seconds a step in which training waited for checkpoints
    journal     seconds a step in which it waited for the journal, and their share of the step

All rounds generate the same tokens; a benchmark that found otherwise would stop.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WAYS: dict[str, int | str] = {
    "one checkpoint at the end": 1_000_000,
    "every 10 steps": 10,
    "auto: 2 % of the time": "auto",
    "every step": 1,
}
LEFT_OUT = 5
"""Steps at the beginning that are not counted."""

Record = dict[str, Any]


def main() -> None:
    """Measure in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    rounds: dict[str, list[list[Record]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        for number in range(options.rounds):
            for way, interval in WAYS.items():
                run = Path(folder) / f"{number}_{interval}"
                rounds[way].append(train(run, interval, options.steps))
            print(f"round {number + 1} of {options.rounds}", flush=True)
    check_equal(rounds)
    rows = {way: figures(found) for way, found in rounds.items()}
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def train(run: Path, interval: int | str, steps: int) -> list[Record]:
    """One run; its metrics, a record a step."""
    command = [sys.executable, "-m", "rollforward.cli.main", "train"]
    command += ["--config", "examples/arithmetic/grpo.yaml", "--save_checkpoint_dir", str(run / "save_ckpt")]
    command += ["--save_strategy_dir", str(run / "strategy")]
    command += ["--set", f"rl_config.save_ckpt_interval={interval}", "--set", f"rl_config.max_steps={steps}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}")
    lines = (run / "save_ckpt" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_equal(rounds: dict[str, list[list[Record]]]) -> None:
    """Runs that did not do the same work cannot be compared."""
    work = {
        tuple((record["tokens"], record["loss"]) for record in records)
        for found in rounds.values()
        for records in found
    }
    if len(work) != 1:
        raise SystemExit("runs of one configuration generated different tokens")


def figures(rounds: list[list[Record]]) -> Record:
    """The best round's speed; medians over all counted steps of the others."""
    speeds = []
    for records in rounds:
        tokens = sum(record["tokens"] for record in records[LEFT_OUT:])
        speeds.append(tokens / (records[-1]["time"] - records[LEFT_OUT - 1]["time"]))
    counted = [record for records in rounds for record in records[LEFT_OUT:]]
    steps = [
        sum(value for name, value in record.items() if name.startswith("seconds/")) for record in counted
    ]
    journal = statistics.median(record["seconds/log"] for record in counted)
    return {
        "tokens_per_second": max(speeds),
        "rounds": [round(speed, 1) for speed in speeds],
        "step_s": statistics.median(steps),
        "waited_s": statistics.fmean(record["seconds/checkpoint"] for record in counted),
        "journal_s": journal,
        "journal_share": journal / statistics.median(steps),
    }


def table(rows: dict[str, Record]) -> str:
    """A line a way."""
    first = next(iter(rows.values()))["tokens_per_second"]
    lines = [f"{'checkpoints':<28}{'tokens/s':>10}{'ratio':>8}{'step s':>9}{'waited s':>10}{'journal':>18}"]
    for way, row in rows.items():
        journal = f"{row['journal_s']:.4f} ({row['journal_share']:.2%})"
        lines.append(
            f"{way:<28}{row['tokens_per_second']:>10.0f}{row['tokens_per_second'] / first:>8.3f}"
            f"{row['step_s']:>9.3f}{row['waited_s']:>10.4f}{journal:>18}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
