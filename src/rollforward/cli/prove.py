"""`rollforward prove`: kill any trainer, start it again, and compare what it left with an undisturbed run."""

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from rollforward.cli.arguments import ARGS, Parser, count
from rollforward.cli.output import cell, print_json, print_line
from rollforward.errors import ConfigError
from rollforward.inspection.comparing import TensorDifference
from rollforward.processes import stopping
from rollforward.processes.family import ENDING_ALL
from rollforward.proving.comparing import Compared
from rollforward.proving.proof import Plan, Proof, Verdict
from rollforward.proving.prove import REPORT, prove
from rollforward.proving.report import as_json
from rollforward.proving.series import SeriesCompared, told, told_steps
from rollforward.proving.tensors import NEWEST, ONLY_A, ONLY_B, UNREADABLE
from rollforward.proving.trial import Command, Trial
from rollforward.wording import counted, plain_lines

NAME = "prove"
COMMAND = "-- COMMAND"
SUMMARY = "kill any trainer, start it again, and compare the result"
DESCRIPTION = """\
Find out whether a trainer resumes: run it undisturbed, run it again and kill it on the way, and
compare what both left. Any command will do; nothing of Rollforward is needed in it.

  rollforward prove --out proof --resume_args --resume -- python train.py --output_dir {out}

{out} stands for the folder of each run. A kill is SIGKILL to all that the command started, children
in sessions of their own included. Afterwards the command is started again with --resume_args behind
it, or as at first if nothing was saved yet, and so on until it comes to its end.

Compared are the tensors of the newest checkpoint, to the bit (.safetensors, .ckpt; .pt, .pth and .bin
where torch is installed; runs of Rollforward), and what was logged, step by step (*.jsonl,
trainer_state.json), but for time and the machine. What differs first names the cause.

On a terminal the findings are tables, elsewhere lines with tabs between their fields.

The exit code is 0 when nothing differs, 1 when something does or a start after a kill fails or hangs,
2 when it could not be tried: the undisturbed run fails, no start resumes, there is nothing to compare.
DIR keeps everything: what each run left, the output of every start, what was found (proof.json)."""

Row = tuple[str, str, str]
"""What was compared, how much of it or which part, and what was found."""
EQUAL = "equal"
_SHOWN_FIELDS = 8


def add_arguments(parser: Parser) -> None:
    """The options of `prove`."""
    parser.add_option("--out", metavar="DIR", required=True, help="a new folder, for all runs")
    parser.add_option(
        "--resume_args",
        metavar=ARGS,
        default="",
        help="what goes behind the command after a kill, as one word: '--resume {out}'",
    )
    parser.add_option("--kills", metavar="N", type=count, help="kills at random moments (default: 3)")
    parser.add_option(
        "--kill_after",
        metavar="REGEX",
        type=_pattern,
        action="append",
        default=[],
        help="instead: a kill right after a line of output matches; once for each kill",
    )
    parser.add_option(
        "--begin",
        metavar="REGEX",
        type=_pattern,
        default=re.compile(""),
        help="random moments count from the first line that matches, in each start (default: any line)",
    )
    parser.add_option("--seed", metavar="N", type=int, help="repeats the random moments of an earlier proof")
    parser.add_option(
        "--twice",
        action="store_true",
        help="run undisturbed twice; what differs then may differ as much after a kill",
    )
    parser.add_option(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        help="the longest that a start may take (default: for the first run, any time; for others, three "
        "times as long and a minute)",
    )
    parser.add_option(
        "--compare",
        metavar="GLOB",
        action="append",
        default=[],
        help="other files to compare, byte by byte, by their paths below {out}; may be repeated",
    )
    parser.add_option("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Prove, and print what was found."""
    if not options.command:
        raise ConfigError(
            "there is no command to prove",
            hint="it goes behind --, as in: rollforward prove --out proof -- python train.py {out}",
        )
    if options.kills and options.kill_after:
        raise ConfigError(
            "--kills and --kill_after both say where the kills come",
            hint="--kills N for random moments, or --kill_after REGEX once for each kill",
        )
    stopping.allow(ENDING_ALL)
    plan = Plan(
        command=Command(words=tuple(options.command), resume_args=options.resume_args, begin=options.begin),
        out=Path(options.out),
        kills=options.kills or Plan.kills,
        kill_after=tuple(options.kill_after),
        twice=options.twice,
        seed=random.SystemRandom().randrange(2**32) if options.seed is None else options.seed,
        timeout=options.timeout,
        compare=tuple(options.compare),
    )
    if not plan.kill_after:
        _say(f"{counted(plan.kills, 'kill')} at random moments; --seed {plan.seed} repeats them")
    proof = prove(plan, _say)
    if options.json:
        print_json(as_json(proof))
    elif sys.stdout.isatty():
        _tables(proof)
    else:
        _lines(proof)
    return proof.verdict.exit_code


def _say(line: str) -> None:
    """Progress goes to standard error, beside the report."""
    sys.stderr.write(plain_lines(line) + "\n")
    sys.stderr.flush()


def _tables(proof: Proof) -> None:
    """For a terminal."""
    console = Console()
    if kills := list(_kill_rows(proof.trials[-1])):
        table = Table("kill", "after", Column("place", overflow="fold"), "logged", "checkpoint", "then")
        for kill in kills:
            table.add_row(*map(cell, kill))
        console.print(table)
    if rows := list(_rows(proof.compared)):
        columns = ("compared", "what", "undisturbed and killed")
        table = Table(*(Column(name, overflow="fold") for name in columns))
        above = ""
        for where, what, found in rows:
            style = "" if found == EQUAL else "bold red"
            table.add_row(cell("" if where == above else where), cell(what), cell(found, style))
            above = where
        console.print(table)
    for note in proof.notes:
        console.print(cell(f"note: {note}"), soft_wrap=True)
    for cause in proof.causes:
        console.print(cell(f"cause: {cause.text}", "bold"), soft_wrap=True)
    style = "bold green" if proof.verdict is Verdict.EQUAL else "bold red"
    console.print(cell(_verdict(proof), style), soft_wrap=True)


def _lines(proof: Proof) -> None:
    """For a file or a pipe: fields with tabs between, and the verdict last."""
    for kill in _kill_rows(proof.trials[-1]):
        print_line("kill", *kill)
    for row in _rows(proof.compared):
        print_line("compared", *row)
    for note in proof.notes:
        print_line("note", note)
    for cause in proof.causes:
        print_line("cause", cause.name, cause.text)
    sys.stdout.write(plain_lines(_verdict(proof)) + "\n")


def _verdict(proof: Proof) -> str:
    kept = proof.plan.out / REPORT
    if proof.reason:
        return f"{proof.verdict}: {proof.reason}"
    after = f"after {counted(len(proof.trials[-1].kills), 'kill')} the run ended"
    if proof.verdict is Verdict.EQUAL:
        return f"equal: {after} as the undisturbed one did; {kept}"
    return f"different: {after} otherwise than the undisturbed one; {kept}"


def _kill_rows(killed: Trial) -> Iterator[tuple[str, ...]]:
    """Number, seconds, place, last step in the log, newest checkpoint, how the next start was started."""
    for kill in killed.kills:
        checkpoint = "_".join(map(str, kill.checkpoint))
        then = "resumed" if kill.resumes else "as at first"
        yield str(kill.start), f"{kill.seconds:.1f} s", kill.where, kill.logged, checkpoint, then


def _rows(compared: Compared | None) -> Iterator[Row]:
    """A row for each file or role of the checkpoint, and for each field of a series that differs."""
    if compared is not None:
        yield from _tensor_rows(compared)
        for one in compared.series:
            yield from _series_rows(one)


def _tensor_rows(compared: Compared) -> Iterator[Row]:
    tensors = compared.tensors
    counts: dict[str, int] = {}
    for role, _ in tensors.names:
        counts[role] = counts.get(role, 0) + 1
    differing: dict[str, list[TensorDifference]] = {}
    for item in tensors.differences:
        differing.setdefault(item.role, []).append(item)
    for role in dict.fromkeys([*counts, *differing]):
        found = differing.get(role)
        told = EQUAL if found is None else _told_tensors(found)
        yield role, counted(counts[role], "tensor") if role in counts else "", told


def _told_tensors(found: Sequence[TensorDifference]) -> str:
    values = [item for item in found if item.what == "values"]
    if values:
        worst = max(values, key=lambda item: item.largest)
        differ = "1 differs" if len(found) == 1 else f"{len(found)} differ"
        return f"{differ}, by up to {worst.largest:.3g} ({worst.name})"
    name, what = found[0].name, found[0].what
    words = {
        ONLY_A: f"{name} only undisturbed",
        ONLY_B: f"{name} only killed",
        NEWEST: f"the newest of the killed run is {name}",
        UNREADABLE: f"that of the killed run cannot be read: {name}",
    }.get(what, f"{name} differs: {what}")
    return words.strip() + (f", and {len(found) - 1} more differ" if len(found) > 1 else "")


def _series_rows(one: SeriesCompared) -> Iterator[Row]:
    what = f"{counted(one.steps, 'step')} of {counted(len(one.fields), 'field')}"
    if not (one.differences or one.missing or one.extra):
        yield one.path, what, EQUAL
    for item in one.differences[:_SHOWN_FIELDS]:
        yield one.path, f"{item.name} from {told(item.step)}", _told_values(item.a, item.b)
    if len(one.differences) > _SHOWN_FIELDS:
        yield one.path, counted(len(one.differences) - _SHOWN_FIELDS, "more field"), "differ"
    if one.missing:
        yield one.path, told_steps(one.missing), "only undisturbed"
    if one.extra:
        yield one.path, told_steps(one.extra), "only killed"


def _told_values(a: Any, b: Any) -> str:
    """Both, as short as tells them apart."""
    if isinstance(a, float) and isinstance(b, float) and f"{a:.6g}" != f"{b:.6g}":
        return f"{a:.6g} and {b:.6g}"
    return " and ".join(text if len(text) <= 60 else f"{text[:57]}..." for text in (repr(a), repr(b)))


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value
