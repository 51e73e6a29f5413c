"""`rollforward inspect`: the checkpoints of a run."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from rollforward.cli.arguments import Parser
from rollforward.cli.output import cell, print_json, print_line
from rollforward.inspection.folder import as_json, checkpoints_of, journal_as_json, open_run
from rollforward.store import CheckpointInfo
from rollforward.wording import in_bytes

NAME = "inspect"
SUMMARY = "list the checkpoints of a run"
DESCRIPTION = """\
List the checkpoints of a run, the oldest first: position, time, size, whether it is valid or why
not, and the mean reward of the steps since the checkpoint before. Valid means that the manifest
proves intact and that all files are there with their sizes; with --deep every byte is read and
digested too.

On a terminal the list is a table, with size and reach of the journal below; elsewhere one line a
checkpoint: position, time, bytes, verdict, reward, with tabs between."""


def add_arguments(parser: Parser) -> None:
    """The options of `inspect`."""
    parser.add_argument("folder", metavar="DIR", help="the run's folder (--save_checkpoint_dir)")
    parser.add_option("--deep", action="store_true", help="read and digest every byte")
    parser.add_option("--json", action="store_true", help="print JSON, with the digest of each role")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the list."""
    folder = options.folder
    listed = checkpoints_of(folder, deep=options.deep)
    if options.json:
        value = {
            "folder": folder,
            "checkpoints": [as_json(open_run(folder), info, deep=options.deep) for info in listed],
            "journal": journal_as_json(open_run(folder)),
        }
        print_json(value)
    elif sys.stdout.isatty():
        _table(listed)
        _journal(journal_as_json(open_run(folder)))
    else:
        for info in listed:
            print_line(info.position, info.created, info.size, info.reason or "valid", _reward(info))
    return 0


def _table(listed: Sequence[CheckpointInfo]) -> None:
    table = Table("position", "steps", "saved (UTC)", "size", "reward", Column("valid", overflow="fold"))
    for info in listed:
        table.add_row(
            str(info.position),
            str(info.manifest.global_step) if info.manifest else "?",
            cell(info.created[:19].replace("T", " ")),
            in_bytes(info.size),
            _reward(info),
            cell("yes" if info.valid else f"no: {info.reason}"),
        )
    Console().print(table)


def _reward(info: CheckpointInfo) -> str:
    found = info.manifest.metrics.get("reward") if info.manifest else None
    return "-" if found is None else f"{found:.4f}"


def _journal(found: Mapping[str, Any]) -> None:
    if found["segments"]:
        Console().print(
            f"journal: {found['segments']} segments, {in_bytes(found['size'])}, every step from "
            f"{found['reaches_back_to']} on",
            highlight=False,
        )
