"""The figures of each step: `metrics.jsonl` is authoritative, TensorBoard events are derived from it.

Promise: after any number of crashes and resumes there is exactly one line for each step that the
run's state went through. A resumed run first truncates the file to the steps before the position
it starts at; whatever a lost incarnation wrote after that is gone, and is written again when
those steps are run again. A torn line is cut with the rest. The same holds after a
power loss: the file is replaced as a whole, durably, before the first step, and each line is durable
before the step's checkpoint can be committed.

The fate of a checkpoint is in the record of the step at whose end it became known. If it becomes
known after the last step, that step's line is written once more; the later one counts.

Figures that do not depend on the clock or the disk are the same in a run and in its crashed and
resumed twin; the others are `time`, `incarnation`, `tokens_per_second`, all `seconds/...` and all
`saves_...`.

Left out: rotation (a line is about 600 bytes) and per-worker figures: the trainer has already
aggregated them.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.run.progress import tokens_per_second
from rollforward.storage import LocalStorage, Storage, read_lines

FILE = "metrics.jsonl"
_SUFFIX = ".rollforward"
"""Suffix of our event files, so that other programs' files are left alone."""
_PLACE = ("epoch", "step", "global_step", "incarnation", "time")
"""Keys of a record that say where and when; they are not curves."""
_COUNTS = ("epoch", "step", "global_step", "incarnation")
_MAX_COUNT = 10**18
_MAX_BYTES = 1 << 32
_MAX_LINE = 1 << 18

Record = dict[str, Any]
"""One line of the file."""


@dataclass
class SaveTrouble:
    """Checkpoint problems since the last record."""

    failed: int = 0
    """How many could not be saved."""
    suspicious: int = 0
    """How many hold the same policy as the previous one, although steps were taken."""

    def count_failed(self) -> None:
        """Count one that could not be saved."""
        self.failed += 1

    def count_suspicious(self) -> None:
        """Count one that looks as if nothing had been learned."""
        self.suspicious += 1

    def take(self) -> dict[str, int]:
        """The counts as figures of a record; resets them to 0."""
        taken = {"saves_failed": self.failed, "saves_suspicious": self.suspicious}
        self.failed = self.suspicious = 0
        return taken


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
    if storage.stat(name) is None:
        return []
    records: dict[Position, Record] = {}
    for line in read_lines(storage, name, limit=_MAX_BYTES, longest=_MAX_LINE):
        record = _parse(line)
        if record is not None:
            records[place_of(record)] = record
    return [records[position] for position in sorted(records)]


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


class TensorBoard:
    """TensorBoard events of a run, derived from the records of `metrics.jsonl`.

    A process never appends to another's event files. A resumed run removes those that an earlier
    incarnation of ours wrote, and writes their steps again.
    """

    def __init__(self, folder: Path, *, kept: Sequence[Record]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in sorted(folder.glob(f"events.out.tfevents.*{_SUFFIX}")):
            stale.unlink()
        self._writer = SummaryWriter(logdir=str(folder), filename_suffix=_SUFFIX)
        for record in kept:
            self._curves(record)
        self._writer.flush()

    def add(self, record: Record) -> None:
        """One point on each curve."""
        self._curves(record)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def _curves(self, record: Record) -> None:
        for name, value in record.items():
            if name not in _PLACE:
                self._writer.add_scalar(
                    name, value, global_step=record["global_step"], walltime=record["time"]
                )


class Metrics:
    """Writes each step's figures; an `Observer`, for the first rank."""

    def __init__(
        self,
        storage: Storage,
        *,
        kept: Sequence[Record],
        incarnation: int,
        steps_per_epoch: int,
        tensorboard: TensorBoard | None,
        trouble: SaveTrouble,
    ) -> None:
        """Atomically replace the run's `metrics.jsonl` with the `kept` records, and append from there.

        `trouble` is queried at each record.
        """
        self._incarnation = incarnation
        self._steps_per_epoch = steps_per_epoch
        self._tensorboard = tensorboard
        self._trouble = trouble
        self._last: Record | None = None
        self._appender = storage.rewrite(FILE, [b"".join(_line(record) for record in kept)])

    def phase(self, position: Position, name: str) -> None:
        """Phases are timed by the trainer."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Append a step's record; it is on stable storage when this returns.

        A checkpoint may be committed next, and steps before a checkpoint are not run again:
        a line lost then would be missing forever.
        """
        record: Record = {
            "epoch": position.epoch,
            "step": position.step,
            "global_step": position.global_step(self._steps_per_epoch),
            **metrics,
            **self._trouble.take(),
            "tokens_per_second": round(tokens_per_second(metrics), 3),
            "incarnation": self._incarnation,
            "time": round(time.time(), 3),
        }
        self._append(_line(record))
        self._last = record
        if self._tensorboard is not None:
            self._tensorboard.add(record)

    def close(self) -> None:
        """Add what became known after the last step, and close the files."""
        late = self._trouble.take()
        if self._last is not None and any(late.values()):
            late = {name: self._last[name] + count for name, count in late.items()}
            # The faulty disk may refuse this too; the log has already reported it.
            with contextlib.suppress(StorageError):
                self._append(_line(self._last | late))
            if self._tensorboard is not None:
                self._tensorboard.add({name: self._last[name] for name in _PLACE} | late)
        self._appender.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, line: bytes) -> None:
        self._appender.append([line])


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
