"""`rollforward copy`: a run, or one checkpoint of it, to another place."""

import argparse
from collections.abc import Sequence

from rollforward.cli.arguments import Parser, position
from rollforward.cli.bars import reading_bar
from rollforward.cli.choosing import chosen
from rollforward.cli.output import print_json, print_line, warn
from rollforward.inspection.folder import checkpoint_at, new_place, open_run
from rollforward.store.copying import bytes_to_copy, copy_checkpoint, copy_run
from rollforward.wording import in_bytes

NAME = "copy"
SUMMARY = "copy a run, or one checkpoint, to another folder or to object storage"
_NEWEST = "newest"
DESCRIPTION = """\
Copy a run between any two places: folders, or object storage as s3://bucket/path.
  rollforward copy output/run s3://bucket/runs/17
  rollforward copy s3://bucket/runs/17 output/run --checkpoint newest

Every byte is verified on both sides: what checkpoints need against their digests, read back from where it
came to, everything else against what was sent. A checkpoint exists at the target only when all of it is
there. A copy that was killed goes on when it is started again; again later, it brings what is new. The run
may be training meanwhile.

Copied are checkpoints, journal, metrics, configurations, logs and evidence; not what is only of the machine
where it trains (run.lock, heartbeats, compiled graphs). With --checkpoint, one checkpoint alone.

S3 needs the extra s3, and takes credentials, region and endpoint from the usual AWS_* variables. Exit code 1
when something was left out, such as a damaged checkpoint: one line each says why."""


def add_arguments(parser: Parser) -> None:
    """The options of `copy`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder or address")
    parser.add_argument(
        "to", metavar="NEW", help="a new place, or one that has an earlier copy of the same run"
    )
    parser.add_option("--checkpoint", metavar="0_20", type=_position, help="one alone: a position, or newest")
    parser.add_option("--json", action="store_true", help="print what was copied as JSON")


def _position(text: str) -> object:
    return _NEWEST if text == _NEWEST else position(text)


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Copy, and print what came."""
    source = open_run(options.folder)
    one = None
    if options.checkpoint is not None:
        wanted = None if options.checkpoint == _NEWEST else options.checkpoint
        one = chosen(options.folder, checkpoint_at(source, wanted))
    target = new_place(options.to)
    with reading_bar(0 if one else bytes_to_copy(source)) as advance:
        if one:
            copied = copy_checkpoint(source, target, one.position, progress=advance)
        else:
            copied = copy_run(source, target, progress=advance)
    if options.json:
        value = {
            "from": options.folder,
            "to": options.to,
            "checkpoints": [str(each) for each in copied.checkpoints],
            "files": copied.files,
            "bytes": copied.size,
            "left_out": copied.left_out,
        }
        print_json(value)
    else:
        there = ", ".join(map(str, copied.checkpoints)) or "none"
        print_line(f"{copied.files} files sent, {in_bytes(copied.size)}; checkpoints there: {there}")
    for line in copied.left_out:
        warn(line)
    return 1 if copied.left_out else 0
