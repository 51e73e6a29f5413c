"""`metrics.jsonl`: the figures of each step, one JSON object a line.

Promise: after any number of crashes and resumes there is at most one line for each step that the run's
state went through, and none of another future. A resumed run first cuts the file to the steps before the
position it starts at; whatever a lost incarnation wrote after that is gone, and is written again when those
steps are run again. A torn line is cut with the rest. The file is replaced as a whole, durably; each line is
durable when `append` returns.

Of two lines of one step the later counts. Left out: rotation (a line is about 600 bytes).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage, read_lines

FILE = "metrics.jsonl"
PLACE = ("epoch", "step", "global_step", "incarnation", "time")
"""Keys of a record that say where and when; they are not curves."""
_COUNTS = ("epoch", "step", "global_step", "incarnation")
_MAX_COUNT = 10**18
_MAX_BYTES = 1 << 32
_MAX_LINE = 1 << 18

Record = dict[str, Any]
"""One line of the file."""


def place_of(record: Mapping[str, Any]) -> Position:
    """The position of the step that a record is about."""
    return Position(record["epoch"], record["step"])


def read(path: Path) -> list[Record]:
    """`read_from` the folder of a `metrics.jsonl`."""
    return read_from(LocalStorage(path.parent), path.name)


def read_from(storage: Storage, name: str = FILE) -> list[Record]:
    """The records of a file, one for each step, in order; empty when there is no file. StorageError.

    Lines that are not records (torn, damaged, or another program's) are skipped. Of two records of one
    step, the later counts: the earlier belongs to a lost incarnation.
    """
    records = {place_of(record): record for record in each(storage, name)}
    return [records[position] for position in sorted(records)]


def each(storage: Storage, name: str = FILE) -> Iterator[Record]:
    """The records of a file as they stand in it, one at a time; of two of one step the later counts."""
    if storage.stat(name) is None:
        return
    for line in read_lines(storage, name, limit=_MAX_BYTES, longest=_MAX_LINE):
        record = _parse(line)
        if record is not None:
            yield record


def _parse(line: bytes) -> Record | None:
    """The record in a line; None when there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(_is_figure(value) for value in record.values()):
        return None
    counts = [record.get(name) for name in _COUNTS]
    if not all(type(count) is int and 0 <= count < _MAX_COUNT for count in counts):
        return None
    return record if math.isfinite(record.get("time", math.nan)) else None


def _is_figure(value: object) -> bool:
    """Whether it is a number: not a bool, and not an integer too large for a float."""
    return type(value) is float or (type(value) is int and abs(value) < _MAX_COUNT)


def consistent(records: Iterable[Record], steps_per_epoch: int) -> list[Record]:
    """The records whose three counts of steps agree: a flipped bit in one of them moves a step elsewhere."""
    return [
        record
        for record in records
        if record["step"] < steps_per_epoch
        and record["global_step"] == place_of(record).global_step(steps_per_epoch)
    ]


def before(records: Iterable[Record], position: Position) -> list[Record]:
    """The records of steps before a position."""
    return [record for record in records if place_of(record) < position]


class MetricsFile:
    """Appends to the run's `metrics.jsonl`, for the first rank."""

    def __init__(self, storage: Storage, kept: Iterable[Record]) -> None:
        """Atomically replace the file with the `kept` records, and append from there."""
        self._appender = storage.rewrite(FILE, [b"".join(_line(record) for record in kept)])

    def append(self, record: Record) -> None:
        """Append a record; it is on stable storage when this returns. StorageError."""
        self._appender.append([_line(record)])

    def close(self) -> None:
        """Close the file."""
        self._appender.close()


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
