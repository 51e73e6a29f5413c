"""The figures of each step: `metrics.jsonl` is authoritative, TensorBoard events are derived from it.

Promise: there is exactly one line for each step that the run's state went through. `replay.metrics` has the
file, and what makes it true after a crash; here each line is durable before the step's checkpoint can be
committed.

The fate of a checkpoint is in the record of the step at whose end it became known. If it becomes
known after the last step, that step's line is written once more; the later one counts.

Figures that do not depend on the clock or the disk are the same in a run and in its crashed and
resumed twin; the others are `time`, `incarnation`, `tokens_per_second`, all `seconds/...` and all
`saves_...`.

Left out: per-worker figures; the trainer has already aggregated them.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.replay.metrics import PLACE, MetricsFile, Record
from rollforward.run.progress import tokens_per_second
from rollforward.storage import Storage

_SUFFIX = ".rollforward"
"""Suffix of our event files, so that other programs' files are left alone."""


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


class TensorBoard:
    """TensorBoard events of a run, derived from the records of `metrics.jsonl`.

    A process never appends to another's event files. A resumed run removes those that an earlier
    incarnation of ours wrote, and writes their steps again.
    """

    def __init__(self, folder: Path, *, kept: Sequence[Record]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in sorted(folder.glob(f"events.out.tfevents.*{_SUFFIX}")):
            stale.unlink()
        # Imported only where it is wanted: it would take a tenth of a start's imports.
        from tensorboardX import SummaryWriter

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
            if name not in PLACE:
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
        self._file = MetricsFile(storage, kept)

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
        self._file.append(record)
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
                self._file.append(self._last | late)
            if self._tensorboard is not None:
                self._tensorboard.add({name: self._last[name] for name in PLACE} | late)
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
