"""`rollforward verify`: whether everything that a run has saved is intact."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from rollforward.cli.arguments import Parser
from rollforward.cli.bars import reading_bar
from rollforward.cli.output import cell, print_json, print_line
from rollforward.inspection import verifying
from rollforward.inspection.folder import open_run
from rollforward.inspection.verifying import FileVerdict, JournalVerdict, Verdict
from rollforward.wording import in_bytes

NAME = "verify"
SUMMARY = "check that what a run has saved is intact"
DESCRIPTION = """\
Check every checkpoint of a run, the newest first: that its manifest proves intact, that all files are
there with their sizes, and that config.json and the tokenizer's files have their digests. With --deep
every byte that a start could ever use is read and digested too: every tensor, both copies of small
files, and the whole journal with what later starts left behind; with a progress bar when standard
error is a terminal. Left out: *.torn (what a crash cut off, never read again), meta.json (derived),
and metrics, logs and evidence, which have no digests.

On a terminal the verdicts are a table, elsewhere one line each: checkpoint, journal or file, position,
rank or name, verdict, with tabs between. What a run that trains removes meanwhile is passed over.
Nothing is changed on disk. The exit code is 0 when everything is intact, 1 when something is not. An
end of the journal that a kill cut off is not damage: the next start of the run cuts it."""


def add_arguments(parser: Parser) -> None:
    """The options of `verify`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder (--save_checkpoint_dir)")
    parser.add_option("--deep", action="store_true", help="read and digest every byte")
    parser.add_option("--json", action="store_true", help="print the verdicts as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the verdicts."""
    storage = open_run(options.folder)
    began = time.perf_counter()
    journals: list[JournalVerdict] = []
    with reading_bar(verifying.bytes_to_check(storage) if options.deep else 0) as advance:
        looking = verifying.Checkpoints(storage, deep=options.deep, progress=advance)
        checkpoints = list(looking.verdicts())
        files = looking.other_files()
        if options.deep:
            journals = list(verifying.check_journals(storage, advance))
    seconds = time.perf_counter() - began
    wrong = sum(bool(found.reason) for found in checkpoints) + sum(len(found.problems) for found in journals)
    wrong += len(files)
    if options.json:
        print_json(_as_json(options, checkpoints, journals, files, wrong, seconds))
    elif sys.stdout.isatty():
        _table(checkpoints, journals, files, seconds)
    else:
        for found in checkpoints:
            print_line("checkpoint", found.position, found.reason or "valid")
        for journal in journals:
            for line in _journal_lines(journal):
                print_line("journal", f"rank_{journal.rank}", line)
        for file in files:
            print_line("file", file.file, file.reason)
    return 1 if wrong else 0


def _journal_lines(journal: JournalVerdict) -> list[str]:
    torn = [f"valid, its end was cut off by a kill: {line}" for line in journal.torn]
    return [*journal.problems, *torn] or ["valid"]


def _table(
    checkpoints: Sequence[Verdict],
    journals: Sequence[JournalVerdict],
    files: Sequence[FileVerdict],
    seconds: float,
) -> None:
    console = Console()
    table = Table("what", Column("verdict", overflow="fold"))
    for found in checkpoints:
        table.add_row(
            f"checkpoint {found.position}", _verdict(found.reason or "valid", bad=bool(found.reason))
        )
    for journal in journals:
        for line in _journal_lines(journal):
            table.add_row(f"journal, rank {journal.rank}", _verdict(line, bad=line in journal.problems))
    for file in files:
        table.add_row(file.file, _verdict(file.reason, bad=True))
    console.print(table)
    read = sum(found.bytes_read for found in checkpoints) + sum(found.size for found in journals)
    if read:
        console.print(f"{in_bytes(read)} read and digested in {seconds:.2f} s, {in_bytes(read / seconds)}/s")


def _verdict(text: str, *, bad: bool) -> Text:
    return cell(text, "bold red" if bad else "")


def _as_json(
    options: argparse.Namespace,
    checkpoints: Sequence[Verdict],
    journals: Sequence[JournalVerdict],
    files: Sequence[FileVerdict],
    wrong: int,
    seconds: float,
) -> dict[str, object]:
    return {
        "folder": options.folder,
        "deep": options.deep,
        "problems": wrong,
        "seconds": round(seconds, 3),
        "checkpoints": [
            {
                "position": str(found.position),
                "valid": not found.reason,
                "reason": found.reason,
                "bytes_read": found.bytes_read,
            }
            for found in checkpoints
        ],
        "journal": [
            {
                "rank": found.rank,
                "segments": found.segments,
                "size": found.size,
                "problems": list(found.problems),
                "torn": list(found.torn),
            }
            for found in journals
        ],
        "files": [asdict(found) for found in files],
    }
