"""Which trainers resume: `rollforward prove` on each, in cases where people lose hours.

    python benchmarks/does_it_resume.py [--only TEXT] [--out DIR] [--json FILE]

Every row is one `rollforward prove`; the command is printed, so that anyone can repeat it. A kill follows the
line of output that the case names, or comes at a random moment. TRL's and transformers' rows need .venv-trl
(scripts/test-trl makes it), those of `rollforward train` .venv; what is not there is left out.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TRL, MINDSPORE = REPOSITORY / ".venv-trl" / "bin", REPOSITORY / ".venv" / "bin"

LATER = ["max_steps=45"]
ITERATIONS = ["num_iterations=2"]
PARTS = [
    "gradient_accumulation_steps=2",
    "per_device_train_batch_size=4",
    "steps_per_generation=4",
    "num_iterations=2",
    "max_steps=20",
    "save_steps=3",
]
REFERENCE = ["sync_ref_model=true", "ref_model_sync_steps=4", "beta=0.1"]


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    arguments: tuple[str, ...]
    kills: tuple[str, ...]
    """As options of `prove`."""
    processes: int = 1


def after(*epochs: str) -> tuple[str, ...]:
    """A kill after the log line of each of these epochs, in its own start."""
    return tuple(f"--kill_after='epoch': '{epoch}'" for epoch in epochs)


def at_random(count: int, seed: int = 7) -> tuple[str, ...]:
    """Kills at random moments, from the first step on."""
    return (f"--kills={count}", f"--seed={seed}", "--begin='loss'")


CASES = (
    Case("within epoch 0", ("max_steps=20",), after("0.2333", "0.4667")),
    Case("in epoch 1", tuple(LATER), after("1.233", "1.4")),
    Case("`num_iterations=2`", tuple(ITERATIONS), after("0.1167", "0.45")),
    Case("within accumulation and a generation's parts", tuple(PARTS), after("0.1333", "0.3333")),
    Case("`sync_ref_model=True`", tuple(REFERENCE), after("0.2333", "0.7")),
    Case("LoRA", ("beta=0.05", "--lora"), after("0.2333", "0.7")),
    Case("two processes", ("per_device_train_batch_size=4",), after("0.2333", "0.7"), processes=2),
    Case("random moments", tuple(LATER), at_random(10)),
    Case("random moments, parts", tuple(PARTS), at_random(10)),
    Case("random moments, reference", tuple(REFERENCE), at_random(10)),
    Case("random moments, two processes", ("per_device_train_batch_size=4",), at_random(6), processes=2),
)


def main() -> None:
    """Prove in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose trainer or case contains this")
    parser.add_argument("--out", type=Path, help="keep what the runs leave there")
    parser.add_argument("--json", type=Path, help="write the rows there, as they are found")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="does-it-resume-") as folder:
        out = options.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for number, (trainer, case, command) in enumerate(proofs()):
            if options.only in f"{trainer}: {case}":
                rows.append(row(trainer, case, command, out / f"{number:02}"))
                print(json.dumps(rows[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def proofs() -> list[tuple[str, str, list[str]]]:
    """(trainer, case, the arguments of `rollforward prove` after --out) of every row."""
    found: list[tuple[str, str, list[str]]] = []
    if TRL.exists():
        script = "examples/trl/train.py"
        for case in CASES:
            start = [str(TRL / "python")]
            if case.processes > 1:
                start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
            stock = [*case.kills, "--resume_args=--resume", "--", *start, script, "--stock", "{out}"]
            found.append(("TRL", case.name, [*stock, *case.arguments]))
            ours = [*case.kills, "--", *start, script, "{out}", *case.arguments]
            found.append(("rollforward.trl", case.name, ours))
        python = str(TRL / "python")
        for name, kills in (("in epoch 1", after("1.267", "2.4")), ("random moments", at_random(10))):
            command = ["--", python, "examples/trl/finetune.py", "{out}"]
            found.append(("transformers' Trainer", name, [*kills, "--resume_args=--resume", *command]))
        own = ["--", python, "examples/own_loop_torch/train.py", "{out}"]
        found.append(("a loop with rollforward.torch", "random moments", ["--kills=10", "--seed=7", *own]))
    if (MINDSPORE / "rollforward").exists():
        train = [str(MINDSPORE / "rollforward"), "train", "--config", "examples/arithmetic/grpo.yaml"]
        train += ["--save_checkpoint_dir", "{out}", "--set", "rl_config.max_steps=30"]
        resumed = ["--kills=6", "--seed=7", "--resume_args=--resume_training", "--", *train]
        found.append(("rollforward train", "random moments", resumed))
    return found


def row(trainer: str, case: str, arguments: list[str], out: Path) -> dict[str, Any]:
    """What one proof found."""
    command = [sys.executable, "-m", "rollforward.cli.main", "prove", f"--out={out}", "--json", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    shown = shlex.join(["rollforward", "prove", "--out=DIR", *arguments]).replace(f"{REPOSITORY}/", "")
    try:
        proof = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"{shown}\nended with {done.returncode}:\n{done.stderr[-2000:]}") from None
    kills = [kill for run in proof["runs"] for kill in run["kills"]]
    return {
        "trainer": trainer,
        "case": case,
        "verdict": proof["verdict"],
        "kills": len(kills),
        "first_difference": proof["first_difference"],
        "causes": [cause["text"] for cause in proof["causes"]],
        "reason": proof["reason"],
        "command": shown,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| trainer | case | kills | verdict | what differs first |", "|---|---|---|---|---|"]
    for found in rows:
        first, told = found["first_difference"], found["reason"].partition("\n")[0]
        if first:
            told = f"step {first['step']}: {', '.join(first['fields'][:3])}"
        cells = (found["trainer"], found["case"], str(found["kills"]), found["verdict"], told)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
