"""What each step measured: `metrics.jsonl`, the truth, and TensorBoard events, derived from it.

Promise: after any number of kills and resumes there is exactly one line for each step that the
run's state went through. A resumed run first cuts the file back to the steps before the position
that it starts at; whatever a lost incarnation wrote after that is gone, and is written again by
the steps that are run again. A line that a kill tore is cut with the rest.

Figures that do not depend on the clock are equal between a run and its killed and resumed twin;
the others are `time`, `incarnation`, `tokens_per_second` and all `seconds/...`.

Left out: rotation (a line is some 600 bytes) and figures of single workers: the trainer has
gathered them already.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.run.progress import tokens_per_second
from rollforward.storage.local import LocalStorage, storage_error

FILE = "metrics.jsonl"
_SUFFIX = ".rollforward"
"""Ends the names of our event files, so that other people's are left alone."""
_PLACE = ("epoch", "step", "global_step", "incarnation", "time")
"""Keys of a record that say where and when, and are no curves."""

Record = dict[str, Any]
"""One line of the file."""


def place_of(record: Mapping[str, Any]) -> Position:
    """The position of the step that a record is about."""
    return Position(record["epoch"], record["step"])


def read(path: Path) -> list[Record]:
    """The records of a file, one for each step, in order; empty when there is no file.

    Lines that are not records (torn by a kill) are passed over. Of two records of one step,
    the later counts: the earlier belongs to an incarnation that was lost.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error("reading", str(path), error) from error
    records: dict[Position, Record] = {}
    for line in lines:
        try:
            record = json.loads(line)
            position = place_of(record)
        except (ValueError, TypeError, KeyError):
            continue
        records[position] = record
    return [records[position] for position in sorted(records)]


def before(records: Iterable[Record], position: Position) -> list[Record]:
    """The records of steps before a position."""
    return [record for record in records if place_of(record) < position]


class TensorBoard:
    """TensorBoard events of a run, derived from the records of `metrics.jsonl`.

    Event files are never appended to by another process. A resumed run removes those that an
    earlier incarnation of ours wrote and writes their steps again.
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
        run_folder: Path,
        *,
        kept: Sequence[Record],
        incarnation: int,
        steps_per_epoch: int,
        tensorboard: TensorBoard | None,
    ) -> None:
        """Replace `metrics.jsonl`, in one step, by the `kept` records, and open it for appending."""
        self.path = run_folder / FILE
        self._incarnation = incarnation
        self._steps_per_epoch = steps_per_epoch
        self._tensorboard = tensorboard
        LocalStorage(run_folder).write(FILE, [b"".join(_line(record) for record in kept)])
        # O_DSYNC: a write returns when its bytes, and the file's new length, are on stable storage.
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_DSYNC | os.O_CLOEXEC)

    def phase(self, position: Position, name: str) -> None:
        """Phases are timed by the trainer."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Append a step's record, on stable storage before this returns.

        A checkpoint may be committed next, and steps before a checkpoint are not run again:
        a line lost then would be missing for ever.
        """
        record: Record = {
            "epoch": position.epoch,
            "step": position.step,
            "global_step": position.global_step(self._steps_per_epoch),
            **metrics,
            "tokens_per_second": round(tokens_per_second(metrics), 3),
            "incarnation": self._incarnation,
            "time": round(time.time(), 3),
        }
        self._append(_line(record))
        if self._tensorboard is not None:
            self._tensorboard.add(record)

    def close(self) -> None:
        """Give the files back."""
        os.close(self._descriptor)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise storage_error("appending to", str(self.path), error) from error
        if written != len(line):
            raise StorageError(
                f"appending to {self.path}: {written} of {len(line)} bytes were taken",
                hint="the disk is nearly full: free some space, then resume",
            )


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
