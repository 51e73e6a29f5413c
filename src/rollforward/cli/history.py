"""`rollforward history`: what happened to a run, as a timeline."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from rollforward.cli.arguments import Parser
from rollforward.cli.output import cell, print_json, print_line
from rollforward.inspection.folder import open_run
from rollforward.inspection.history import Entry, timeline
from rollforward.replay import report as recovery_report

NAME = "history"
SUMMARY = "tell what happened to a run: starts, kills, resumes, checkpoints"
DESCRIPTION = """\
Tell what happened to a run, the earliest first: each start, what a resume took over and replayed,
each checkpoint that is still there, and how each start ended. The journal and the manifests are
what it is told from, so what was pruned is not told. The time of a kill is that of the last thing
that was made durable before it.

On a terminal it is a table, elsewhere one line each: time (UTC), what, start, position, in words,
with tabs between. What is one of started, resumed, checkpoint, finished, failed, stopped, killed,
running, damage. With --json there is the report of each recovery too, as in RUN/recoveries.jsonl: which
checkpoint, bytes, seconds, steps replayed, chunks reused and generated again, what was lost."""

_STYLES = {
    "finished": "green",
    "failed": "bold red",
    "killed": "bold red",
    "stopped": "yellow",
    "damage": "bold red",
}


def add_arguments(parser: Parser) -> None:
    """The options of `history`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder (--save_checkpoint_dir)")
    parser.add_option("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the timeline."""
    storage = open_run(options.folder)
    entries = timeline(storage)
    if options.json:
        value = {
            "folder": options.folder,
            "entries": [_as_json(entry) for entry in entries],
            "recoveries": [report.as_json() for report in recovery_report.read(storage)],
        }
        print_json(value)
    elif sys.stdout.isatty():
        _table(entries)
    else:
        for entry in entries:
            print_line(entry.time, entry.what, entry.start, _place(entry), entry.text)
    return 0


def _place(entry: Entry) -> str:
    return "" if entry.position is None else str(entry.position)


def _as_json(entry: Entry) -> dict[str, object]:
    return asdict(entry) | {"position": None if entry.position is None else str(entry.position)}


def _table(entries: Sequence[Entry]) -> None:
    table = Table("time (UTC)", "start", "what", "position", "")
    for entry in entries:
        what = cell(entry.what, _STYLES.get(entry.what, ""))
        when = cell(entry.time[:19].replace("T", " "))
        table.add_row(when, str(entry.start or ""), what, _place(entry), cell(entry.text))
    Console().print(table)
