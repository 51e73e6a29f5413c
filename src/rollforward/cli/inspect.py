"""`rollforward inspect`: the checkpoints of a run."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollforward.cli.arguments import Parser
from rollforward.errors import NothingToResume
from rollforward.run.session import in_bytes
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointInfo, list_checkpoints

NAME = "inspect"
SUMMARY = "list the checkpoints of a run"
DESCRIPTION = """\
List the checkpoints of a run, the oldest first: position, time, size, and whether it is valid or why not.

Valid means here that the manifest proves intact and all files are there with their sizes.
With --deep every byte is read and digested too."""


def add_arguments(parser: Parser) -> None:
    """The options of `inspect`."""
    parser.add_argument("folder", metavar="DIR", help="the run's folder (--save_checkpoint_dir)")
    parser.add_option("--deep", action="store_true", help="read and digest every byte")
    parser.add_option("--json", action="store_true", help="print JSON, with the digest of each role")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the list; NothingToResume when there is no run."""
    folder = Path(options.folder)
    if not (folder / "commits").is_dir():
        raise NothingToResume(
            f"{folder} holds no run: there is no commits/ in it",
            hint="name the folder that --save_checkpoint_dir named",
        )
    listed = list_checkpoints(LocalStorage(folder), deep=options.deep)[::-1]
    if options.json:
        sys.stdout.write(
            json.dumps({"folder": str(folder), "checkpoints": [_json(i) for i in listed]}) + "\n"
        )
    elif sys.stdout.isatty():
        _table(listed)
    else:
        for info in listed:
            sys.stdout.write(f"{info.position}\t{info.created}\t{info.size}\t{info.reason or 'valid'}\n")
    return 0


def _json(info: CheckpointInfo) -> dict[str, Any]:
    manifest = info.manifest
    about: dict[str, Any] = {
        "position": str(info.position),
        "created": info.created,
        "size": info.size,
        "valid": info.valid,
        "reason": info.reason,
    }
    if manifest is not None:
        about |= {
            "global_step": manifest.global_step,
            "run_id": manifest.run_id,
            "incarnation": manifest.incarnation,
            "world_size": manifest.world_size,
            "fingerprint": manifest.fingerprint,
            "versions": dict(manifest.versions),
            "digests": manifest.role_digests(),
        }
    return about


def _table(listed: Sequence[CheckpointInfo]) -> None:
    table = Table("position", "steps", "saved (UTC)", "size", "valid")
    for info in listed:
        steps = str(info.manifest.global_step) if info.manifest else "?"
        table.add_row(
            str(info.position),
            steps,
            info.created[:19].replace("T", " "),
            in_bytes(info.size),
            "yes" if info.valid else f"no: {info.reason}",
        )
    Console().print(table)
