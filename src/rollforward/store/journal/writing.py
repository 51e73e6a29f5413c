"""Writing the journal of one rank: `Journal` holds what it inherited and adds to it.

Promise: rollouts and events are on stable storage when the call that writes them returns; an outcome by the
time the next step's first record is, or a checkpoint that holds it begins. The package's docstring describes
the format and says why that is enough; `reading` reads it and repairs a torn end.
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from numpy.typing import NDArray

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import Appender, Storage
from rollforward.store import strictjson
from rollforward.store.journal.frames import FRONT_BYTES, MAX_UNSYNCED_BYTES, NO_SALT, encode_frame
from rollforward.store.journal.reading import JournalView
from rollforward.store.journal.records import Identity, Record, SegmentHeader, encode_header, encode_record
from rollforward.store.journal.segments import Place, Records
from rollforward.store.journal.upkeep import looked_after, prune_folder
from rollforward.store.layout import SegmentName

SEGMENT_BYTES = 64 << 20
"""Once a segment has reached this size, the next step starts a new one."""

Arrays = Mapping[str, NDArray[Any]]


def utc_now() -> str:
    """The current time in the format of records."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Journal:
    """What one rank inherited, and what it adds.

    `inherited` is the part of an earlier journal that this start takes over (`JournalView.inherited`);
    parts of it outside `storage`, the folder that is written to, are read where they are. The first
    segment is durable when the constructor returns. Any StorageError while writing ends the journal:
    records can no longer be made durable before they are used, so the run must stop.
    """

    def __init__(
        self,
        storage: Storage,
        identity: Identity,
        *,
        start: Position,
        inherited: JournalView,
        segment_bytes: int = SEGMENT_BYTES,
        now: Callable[[], str] = utc_now,
    ) -> None:
        if identity.incarnation <= inherited.newest_incarnation:
            raise ValueError(
                f"incarnation {identity.incarnation} does not follow {inherited.newest_incarnation}, "
                "the newest seen"
            )
        if None in inherited.lineage.values():
            raise ValueError("it has to be said before which position records are inherited")
        self.inherited = inherited
        self._inherited_records = Records()
        self.bytes_written = 0
        """Of frames, durable or not."""
        self.seconds_for_checkpoints = 0.0
        """Spent because checkpoints began: what was synced for them, and the segments begun after them."""
        self._storage = storage
        self.identity = identity
        self._start = start
        self._segment_bytes = segment_bytes
        self._now = now
        self._sequence = 0
        self._unsynced: list[int] = []
        """Lengths of the newest frames that are not known to be durable."""
        self._latest = start
        """Position of the newest record."""
        self._roll = False
        self._salt = NO_SALT
        self._appender: Appender | None = None
        self._begin_segment(start)

    def find_rollouts(self, position: Position, chunk: int) -> Record | None:
        """An inherited chunk; CheckpointInvalid when it can no longer be read intact."""
        return self._find(self.inherited.rollouts.get((position, chunk)))

    def find_outcome(self, position: Position, iteration: int) -> Record | None:
        """An inherited outcome; otherwise like `find_rollouts`."""
        return self._find(self.inherited.outcomes.get((position, iteration)))

    def append(
        self, position: Position, chunk: int, arrays: Arrays, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a chunk of rollouts; it is on stable storage when this returns."""
        self._inherited_records.close()  # what is new comes after all of these, as a rule
        self._write("rollouts", position, {**(metadata or {}), "chunk": str(chunk)}, arrays)
        self._sync()

    def record(
        self, position: Position, iteration: int, arrays: Arrays, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the outcome of an update. It survives the death of this process.

        It is on stable storage together with the next record that is not an outcome of this step, and by the
        time `checkpoint_begun` or `close` returns.
        """
        # Those of one step at most, so that a loop that records nothing but outcomes does not lose many.
        earlier = bool(self._unsynced) and position > self._latest
        self._write("outcome", position, {**(metadata or {}), "iteration": str(iteration)}, arrays)
        if earlier or sum(self._unsynced) > MAX_UNSYNCED_BYTES:
            self._sync()

    def note(self, position: Position | None, event: str, detail: Mapping[str, Any]) -> None:
        """Write a line for the history of the run, at the newest record's step by default.

        `detail` is a JSON object.
        """
        metadata = {"event": event, "detail": strictjson.dump(dict(detail))}
        self._write("event", position or self._latest, metadata, {})
        self._sync()

    def checkpoint_begun(self) -> None:
        """From the next step on, write to a new segment, so that the old one can be removed some day.

        All that was recorded is on stable storage when this returns: what a checkpoint holds is on record.
        """
        began = time.perf_counter()
        self._sync()
        self._roll = True
        self.seconds_for_checkpoints += time.perf_counter() - began

    def prune(self, oldest: Position) -> list[str]:
        """Remove segments that no replay from a position of `oldest` or later needs; returns their paths.

        In each folder that this rank looks after. This may run on a different thread from the one that
        appends: the newest segment of this start always stays, and nothing here touches an open file.
        """
        who = self.identity
        lineage = {**self.inherited.lineage, who.incarnation: None}
        ranks = looked_after(self._storage, rank=who.rank, world_size=who.world_size)
        return [path for rank in ranks for path in prune_folder(self._storage, rank, lineage, oldest)]

    def close(self) -> None:
        """Close the file; everything written is durable by then."""
        self._inherited_records.close()
        if self._appender is not None:
            try:
                self._sync()
            finally:
                self._appender.close()
                self._appender = None

    def _write(self, kind: str, position: Position, metadata: Mapping[str, str], arrays: Arrays) -> None:
        if position < self._latest:
            raise ValueError(f"a record of step {position} after one of {self._latest}")
        if self._appender is None:
            raise StorageError("the journal was closed", hint="see the first error; resume the run")
        # Only at the start of a step: a segment holds whole steps.
        if position > self._latest and (self._roll or self._appender.size >= self._segment_bytes):
            began, asked = time.perf_counter(), self._roll
            self._sync()
            self._appender.close()
            self._begin_segment(position)
            self.seconds_for_checkpoints += time.perf_counter() - began if asked else 0.0
        self._latest = position
        self._frame(encode_record(Record(kind, position, self._now(), metadata, arrays)))

    def _begin_segment(self, first: Position) -> None:
        header = SegmentHeader(
            identity=self.identity,
            first=first,
            start=self._start,
            created=self._now(),
            lineage=self.inherited.lineage,
        )
        name = SegmentName(self.identity.rank, self.identity.incarnation, first)
        self._appender = self._storage.appender(name.path)
        self._roll, self._salt = False, NO_SALT
        self._salt = self._frame(encode_header(header))
        self._sync()

    def _sync(self) -> None:
        """Make durable what is not."""
        if self._unsynced and self._appender is not None:
            # Cleared first: after an error, `close` has nothing that it could still make durable.
            self._unsynced.clear()
            self._appender.sync()

    def _frame(self, payload: bytes) -> bytes:
        """Write a frame; returns its digest."""
        assert self._appender is not None
        try:
            frame = encode_frame(self._sequence, len(self._unsynced), payload, self._salt)
        except ValueError as error:
            raise StorageError(f"the journal cannot hold {error}", hint="make chunks smaller") from None
        unsynced, self._unsynced = self._unsynced, []
        self._appender.write([frame])
        self._sequence += 1
        self._unsynced = [*unsynced, len(frame)]
        self.bytes_written += len(frame)
        return frame[FRONT_BYTES - 16 : FRONT_BYTES]

    def _find(self, place: Place | None) -> Record | None:
        return None if place is None else self._inherited_records.read(place)
