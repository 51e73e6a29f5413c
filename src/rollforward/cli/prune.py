"""`rollforward prune`: remove old checkpoints by hand, or say what would be removed."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table

from rollforward.cli.arguments import Parser, count
from rollforward.cli.output import cell, print_json, print_line, warn
from rollforward.inspection.folder import open_run
from rollforward.store import Retention
from rollforward.store.place import RunPlace
from rollforward.store.pruning import Pruning, Removal, look_at_every_byte
from rollforward.wording import in_bytes

NAME = "prune"
SUMMARY = "remove old checkpoints, or say what would go"
DESCRIPTION = """\
Remove the checkpoints of a run that are neither among the newest, nor after a multiple of --every
steps, nor among the --best by a metric; files that unfinished saves left; and the journal before
the oldest kept checkpoint. The newest valid checkpoint always stays, and files that a kept
checkpoint shares do too. Valid is one whose manifest proves intact and whose files are all there with
their sizes; with --deep, one of which every byte proves intact, which takes reading those that stay.
With --dry_run nothing is removed.

What cannot be read this time stays, with everything that it may need: a warning says so and the exit
code is 1.

On a terminal what goes is a table, elsewhere one line each: checkpoint, file or journal, its
position or path, bytes, why, with tabs between. A run that is training is refused: it prunes by
itself (rl_config.save_max_ckpt_num)."""


def add_arguments(parser: Parser) -> None:
    """The options of `prune`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder or address (--save_checkpoint_dir)")
    parser.add_option(
        "--save_max_ckpt_num", metavar="N", type=count, default=5, help="keep the newest N (default: 5)"
    )
    parser.add_option(
        "--every", metavar="N", type=count, default=0, help="keep those after a multiple of N steps too"
    )
    parser.add_option(
        "--best", metavar="N", type=count, default=0, help="keep the N with the greatest metric too"
    )
    parser.add_option(
        "--metric",
        metavar="NAME",
        default="reward",
        help="what --best goes by: reward, or reward/VERIFIER (default: reward)",
    )
    parser.add_option(
        "--deep", action="store_true", help="only count checkpoints of which every byte was read and digested"
    )
    parser.add_option("--dry_run", action="store_true", help="only say what would go, and why")
    parser.add_option("--json", action="store_true", help="print what goes as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Prune, and print what was removed."""
    storage = open_run(options.folder)
    retention = Retention(
        newest=options.save_max_ckpt_num, every=options.every, best=options.best, metric=options.metric
    )
    look = look_at_every_byte() if options.deep else None
    if options.dry_run:
        pruning = Pruning(storage, retention, look)
        warnings = pruning.warnings
    else:
        with RunPlace.at(options.folder).held(say=warn):
            pruning = Pruning(storage, retention, look)
            warnings = [*pruning.warnings, *pruning.carry_out()]
    removals = pruning.removals
    freed = sum(item.size for item in removals)
    if options.json:
        value = {
            "folder": options.folder,
            "dry_run": options.dry_run,
            "bytes": freed,
            "removals": [asdict(item) for item in removals],
            "warnings": warnings,
        }
        print_json(value)
    elif sys.stdout.isatty():
        _table(removals, freed, dry_run=options.dry_run)
    else:
        for item in removals:
            print_line(item.what, item.name, item.size, item.reason)
    for warning in warnings:
        warn(warning)
    return 1 if warnings else 0


def _table(removals: Sequence[Removal], freed: int, *, dry_run: bool) -> None:
    console = Console()
    if not removals:
        console.print("there is nothing to remove")
        return
    table = Table("what", Column("which", overflow="fold"), "size", Column("why", overflow="fold"))
    for item in removals:
        table.add_row(item.what, cell(item.name), in_bytes(item.size), cell(item.reason))
    console.print(table)
    console.print(f"{in_bytes(freed)} {'would be' if dry_run else 'were'} given back")
