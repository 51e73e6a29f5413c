"""What a journal says about a run's past: each start, how far it got, and what became of it.

For people inspecting a run, not for training: every segment is read, including those of abandoned
histories. Nothing on disk is changed.
"""

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.journal.frames import NO_SALT, Ending, Frame, examine, read_frame, read_frames
from rollforward.store.journal.reading import JournalView, Key, journal_ranks, list_segments
from rollforward.store.journal.records import Record, SegmentHeader, decode_header, decode_record
from rollforward.store.journal.segments import Place, Records, Segment
from rollforward.store.layout import SegmentName


@dataclass
class StartOfRun:
    """One incarnation of one rank, according to its segments."""

    incarnation: int
    header: SegmentHeader | None = None
    """From its first readable segment; None when there is none."""
    chunks: int = 0
    updates: int = 0
    first: Position | None = None
    """Earliest step for which it wrote a record."""
    last: Position | None = None
    """Latest step for which it wrote a record."""
    last_time: str = ""
    """Time of its last write, UTC: if it was killed, that was shortly after."""
    size: int = 0
    """Bytes of its segments."""
    events: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Torn and damaged places, one line each."""
    abandoned_from: Position | None = None
    """Where a later start continued, abandoning what this one had done beyond; None when none did."""
    _marks: "array[int]" = field(default_factory=lambda: array("q"))
    """Of each step: epoch, step, which of `_segments`, and where in it the step's records begin."""
    _segments: list[tuple[Segment, bytes]] = field(default_factory=list)
    """With their salts."""

    def steps(self) -> Iterator[tuple[Position, Place]]:
        """The steps that it did and that the newest history has, and where the records of each begin.

        They follow each other in one segment.
        """
        marks = (self._marks[at::4] for at in range(4))
        for epoch, step, number, offset in zip(*marks, strict=True):
            position = Position(epoch, step)
            if self.abandoned_from is None or position < self.abandoned_from:
                segment, salt = self._segments[number]
                yield position, Place(segment, offset, salt)

    def add(self, record: Record, place: Place) -> None:
        """Add one more record, in the order of writing."""
        self.last_time = record.time
        if record.kind == "segment":
            return
        if record.kind == "event":
            self.events.append(record)
            return
        self.chunks += record.kind == "rollouts"
        self.updates += record.kind == "outcome"
        if self.last != record.position or not self._segments or self._segments[-1][0] != place.segment:
            self._mark(record.position, place)
        self.first = record.position if self.first is None else min(self.first, record.position)
        self.last = record.position if self.last is None else max(self.last, record.position)

    def _mark(self, position: Position, place: Place) -> None:
        if not self._segments or self._segments[-1][0] != place.segment:
            self._segments.append((place.segment, place.salt))
        self._marks.extend((*position, len(self._segments) - 1, place.offset))


@dataclass(frozen=True)
class Extent:
    """How much journal there is, over all ranks; from names and sizes alone, no file is read."""

    segments: int
    size: int
    """Bytes."""
    reaches_back_to: Position | None
    """The earliest step that every rank's segments cover; None without segments."""


def extent(storage: Storage) -> Extent:
    """The journal of a run's folder, at a glance."""
    by_rank = [list_segments(storage, rank) for rank in journal_ranks(storage)]
    segments = [segment for found in by_rank for segment in found]
    firsts = [min(segment.name.first for segment in found) for found in by_rank if found]
    return Extent(len(segments), sum(segment.size for segment in segments), max(firsts, default=None))


def history(storage: Storage, rank: int) -> list[StartOfRun]:
    """Every start that still has segments, oldest first."""
    starts: dict[int, StartOfRun] = {}
    segments = list_segments(storage, rank)
    for segment in segments:
        start = starts.setdefault(segment.name.incarnation, StartOfRun(segment.name.incarnation))
        start.size += segment.size
        try:
            _read(segment, start)
        except StorageError as error:
            start.problems.append(f"{segment}: {error.message}")
    _mark_abandoned(list(starts.values()))
    return list(starts.values())


def _read(segment: Segment, start: StartOfRun) -> None:
    frame: Frame | None = None
    salt = NO_SALT
    with segment.open() as handle:
        for frame in read_frames(handle):
            try:
                if frame.offset == 0:
                    salt = frame.digest
                    header = decode_header(frame.payload, segment.name)
                    start.header = start.header or header
                start.add(decode_record(frame.payload), Place(segment, frame.offset, salt))
            except ValueError as error:
                start.problems.append(f"{segment}, byte {frame.offset}: {error}")
                return
        ending = examine(handle, frame, salt)
    if ending.problem:
        start.problems.append(f"{segment}: {_said(ending)}")


def index_steps(starts: Sequence[StartOfRun], positions: Collection[Position]) -> JournalView:
    """Where one rank's records of some steps of the newest history are: no others are read again."""
    rollouts: dict[Key, Place] = {}
    outcomes: dict[Key, Place] = {}
    headers: dict[SegmentName, SegmentHeader] = {}
    problems = []
    wanted = [
        (start.header, position, begin)
        for start in starts
        if start.header is not None
        for position, begin in start.steps()
        if position in positions
    ]
    with Records() as records:
        for header, position, begin in wanted:
            # Who wrote them is the same for all segments of a start.
            headers[begin.segment.name] = header
            try:
                for record, place in _records_of_step(position, begin, records):
                    if record.kind == "rollouts":
                        rollouts[position, record.number("chunk")] = place
                    elif record.kind == "outcome":
                        outcomes[position, record.number("iteration")] = place
            except (StorageError, ValueError) as error:
                problems.append(f"{begin.segment}, step {position}: {error}")
                records.forget(begin.segment)
    return JournalView(rollouts=rollouts, outcomes=outcomes, headers=headers, problems=tuple(problems))


def _records_of_step(position: Position, begin: Place, records: Records) -> Iterator[tuple[Record, Place]]:
    segment, offset, salt = begin.segment, begin.offset, begin.salt
    handle = records.opened(segment)
    while offset < handle.size:
        frame = read_frame(handle, offset, salt)
        record = decode_record(frame.payload)
        if record.position != position:
            return
        yield record, Place(segment, offset, salt)
        offset = frame.end


def _said(ending: Ending) -> str:
    return f"{'damaged' if ending.damaged else 'cut off'} at byte {ending.offset}: {ending.problem}"


def _mark_abandoned(starts: Sequence[StartOfRun]) -> None:
    """Mark what the last start's history left behind of each earlier start."""
    newest = next((start.header for start in reversed(starts) if start.header is not None), None)
    if newest is None:
        return
    lineage = newest.whole_lineage
    for start in starts:
        if start.last is None or start.incarnation > newest.identity.incarnation:
            continue
        if start.incarnation not in lineage:
            start.abandoned_from = start.first
            continue
        before = lineage[start.incarnation]
        if before is not None and start.last >= before:
            start.abandoned_from = before
