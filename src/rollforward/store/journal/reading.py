"""Reading a journal: what a rank's folder has of one history, indexed without holding it in memory.

`read_journal` picks a history that contains the checkpoint to resume from (`timeline.choose_history`
decides which), and builds an index of its records: where each one is, not what it says. `merged` makes one
view of several folders, and `read_journals` of all: a run may have had more workers before, or fewer.
Every frame is verified here, and again when it is read. Nothing on disk is changed, so anyone may
read at any time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.position import Position
from rollforward.storage import ReadHandle, Storage
from rollforward.store.journal.frames import (
    NO_SALT,
    Ending,
    Frame,
    examine,
    read_frame,
    read_frames,
)
from rollforward.store.journal.records import (
    Identity,
    Record,
    SegmentHeader,
    decode_header,
    decode_record,
)
from rollforward.store.journal.segments import Place, Segment
from rollforward.store.journal.timeline import (
    Lineage,
    Start,
    choose_history,
    ends,
    inherit,
    is_live,
    of_all_ranks,
)
from rollforward.store.layout import JOURNAL, SegmentName, journal_folder, parse_rank
from rollforward.store.unreadable import rejection

_WORK = ("rollouts", "outcome")

Key = tuple[Position, int]
"""(position, chunk) of rollouts, (position, iteration) of outcomes.

A chunk's number is the one in the step where chunks are numbered over all ranks, else its rank's own.
"""


@dataclass(frozen=True)
class JournalView:
    """Records of one history, from one rank's folder or from several."""

    header: SegmentHeader | None = None
    """From the newest segment of the history's newest start; None when there is none."""
    lineage: Lineage = field(default_factory=dict)
    """Which incarnations' records belong to the history, and up to where."""
    rollouts: Mapping[Key, Place] = field(default_factory=dict)
    outcomes: Mapping[Key, Place] = field(default_factory=dict)
    events: Sequence[Place] = ()
    headers: Mapping[SegmentName, SegmentHeader] = field(default_factory=dict)
    """The header of every segment that was read."""
    problems: tuple[str, ...] = ()
    """Problems found, one line each."""
    torn: tuple[tuple[Segment, Ending], ...] = ()
    """Segments whose last write was cut off by a crash."""
    newest_incarnation: int = 0
    """Of all existing segments, including those of other histories."""

    def first_incomplete(self, start: Position, *, chunks_per_step: int, steps_per_epoch: int) -> Position:
        """The first step, from `start` on, with a missing chunk: how far updates can be replayed."""
        position = start
        while all((position, chunk) in self.rollouts for chunk in range(chunks_per_step)):
            position = position.following(steps_per_epoch)
        return position

    @property
    def writers(self) -> list[Identity]:
        """The starts that wrote the records, oldest first; those that recorded nothing are not included."""
        places = (*self.rollouts.values(), *self.outcomes.values())
        names = sorted({place.segment.name for place in places})
        return [self.headers[name].identity for name in names]

    def inherited(self, before: Position) -> "JournalView":
        """The part that a new start inherits if it takes over nothing from `before` or later."""
        return replace(
            self,
            lineage=inherit(self.lineage, before),
            rollouts={key: place for key, place in self.rollouts.items() if key[0] < before},
            outcomes={key: place for key, place in self.outcomes.items() if key[0] < before},
        )


def merged(views: Sequence[JournalView]) -> JournalView:
    """One view of several folders with one history; where two have a record, the newer start's counts."""
    rollouts: dict[Key, Place] = {}
    outcomes: dict[Key, Place] = {}
    for view in views:
        for found, places in ((rollouts, view.rollouts), (outcomes, view.outcomes)):
            for key, place in places.items():
                if key not in found or place.segment.name.incarnation > found[key].segment.name.incarnation:
                    found[key] = place
    first = next((view for view in views if view.header is not None), views[0] if views else JournalView())
    return replace(
        first,
        rollouts=rollouts,
        outcomes=outcomes,
        events=[place for view in views for place in view.events],
        headers={name: header for view in views for name, header in view.headers.items()},
        problems=tuple(problem for view in views for problem in view.problems),
        torn=tuple(torn for view in views for torn in view.torn),
        newest_incarnation=max((view.newest_incarnation for view in views), default=0),
    )


def list_segments(storage: Storage, rank: int) -> list[Segment]:
    """A rank's segments, oldest first."""
    found = []
    for entry in storage.scan(journal_folder(rank)):
        name = SegmentName.parse(rank, entry.name)
        if name is not None and entry.kind == "file":
            found.append(Segment(storage, name, entry.size))
    return sorted(found, key=lambda segment: segment.name)


def odd_segments(storage: Storage, rank: int) -> list[str]:
    """Entries that are named like a segment but are not files, one line each."""
    return [
        f"journal segment {name.path}: it is a {entry.kind}, not a file"
        for entry in storage.scan(journal_folder(rank))
        if (name := SegmentName.parse(rank, entry.name)) is not None and entry.kind != "file"
    ]


def read_header_of(segment: Segment) -> SegmentHeader:
    """The first record of a segment; CheckpointInvalid says in one line why there is none."""
    try:
        with segment.open() as handle:
            return decode_header(read_frame(handle, 0, NO_SALT).payload, segment.name)
    except StorageError as error:
        raise rejection(error, str(segment)) from error
    except ValueError as error:
        raise CheckpointInvalid(f"{segment}: {error}") from None


def read_journal(
    storages: Sequence[Storage],
    *,
    rank: int,
    since: Position,
    before: Position | None = None,
    checkpoint: tuple[int, Position] | None = None,
    run_id: str | None = None,
    history: Start | None = None,
    chunks_per_step: int | None = None,
) -> JournalView:
    """What the journal of `rank` has for positions from `since` on and, if given, before `before`.

    `storages`: the folders of the run, those it was resumed from first; if several have the same segment,
    the first counts. `history`: the start whose history is read; None takes the newest one that did
    anything, among those that contain the `checkpoint`: incarnation and position of the one to resume from.
    `run_id`: segments of other runs are skipped. `chunks_per_step`: of the run, over all ranks; chunks that
    format version 1 numbered rank by rank get their numbers in the step. Damage is reported in `problems`
    and damaged records are never handed out.
    """
    segments = _segments(storages, rank)
    newest = max((segment.name.incarnation for segment in segments), default=0)
    headers, unreadable = _headers_of_starts(segments, run_id)
    chosen = history or choose_history(_starts(segments, headers), checkpoint)
    lineage: Lineage = {} if chosen is None else chosen.lineage
    tip = None if chosen is None else headers.get(chosen.incarnation)
    # A segment without a header may belong to any history, even to the newest.
    known = SegmentName(rank, tip.identity.incarnation, tip.first) if tip is not None else None
    unreadable = [segment for segment in unreadable if known is None or segment.name > known]
    if before is not None:
        lineage = inherit(lineage, before)
    reading = _Reading(run_id, lineage, since, chunks_per_step)
    reading.problems += [line for storage in storages for line in odd_segments(storage, rank)]
    until = ends((segment.name for segment in segments), lineage)
    for index, segment in enumerate(segments):
        following = segments[index + 1].name if index + 1 < len(segments) else None
        last = following is None or following.incarnation != segment.name.incarnation
        end = until[segment.name]
        needed = is_live(lineage, segment.name.incarnation, segment.name.first) and (
            end is None or end > since
        )
        if needed or segment in unreadable:
            reading.segment(segment, last=last)
    return JournalView(
        header=tip,
        lineage=lineage,
        rollouts=reading.rollouts,
        outcomes=reading.outcomes,
        events=tuple(reading.events),
        headers=reading.headers,
        problems=tuple(reading.problems),
        torn=tuple(reading.torn),
        newest_incarnation=newest,
    )


def read_journals(
    storages: Sequence[Storage],
    *,
    since: Position,
    before: Position | None = None,
    checkpoint: tuple[int, Position] | None = None,
    run_id: str | None = None,
    history: Start | None = None,
    chunks_per_step: int | None = None,
) -> JournalView:
    """What all ranks have: `read_journal` of each, `merged`, all of one history."""
    ranks = journal_ranks(*storages)
    chosen = history or choose_history(read_starts(storages, ranks=ranks, run_id=run_id), checkpoint)
    return merged(
        [
            read_journal(
                storages,
                rank=rank,
                since=since,
                before=before,
                checkpoint=checkpoint,
                run_id=run_id,
                history=chosen,
                chunks_per_step=chunks_per_step,
            )
            for rank in ranks
        ]
    )


def journal_ranks(*storages: Storage) -> list[int]:
    """The ranks that have a journal in one of the folders: those of the workers, and of earlier ones."""
    entries = (entry for storage in storages for entry in storage.scan(JOURNAL) if entry.kind == "folder")
    return sorted({rank for entry in entries if (rank := parse_rank(entry.name)) is not None})


def read_starts(
    storages: Sequence[Storage], *, ranks: Iterable[int], run_id: str | None = None
) -> list[Start]:
    """The starts for which one of the ranks has a journal, oldest first."""
    by_rank = (_segments(storages, rank) for rank in ranks)
    return of_all_ranks(_starts(each, _headers_of_starts(each, run_id)[0]) for each in by_rank)


def _segments(storages: Sequence[Storage], rank: int) -> list[Segment]:
    """The segments of all folders, each once, oldest first."""
    found: dict[SegmentName, Segment] = {}
    for storage in storages:
        for segment in list_segments(storage, rank):
            found.setdefault(segment.name, segment)
    return [found[name] for name in sorted(found)]


@dataclass(frozen=True)
class SegmentsChecked:
    """The result of reading every segment of a rank."""

    segments: Sequence[Segment]
    problems: tuple[str, ...]
    torn: tuple[tuple[Segment, Ending], ...]
    last: Position | None
    """Position of the newest record, of whatever history; None when there is none."""


def check_segments(storage: Storage, rank: int) -> SegmentsChecked:
    """Read and digest every record of a rank, including those of abandoned futures.

    A live run may remove segments in the meantime, oldest first: those are skipped.
    """
    segments = list_segments(storage, rank)
    reading = _Reading(
        None, {segment.name.incarnation: None for segment in segments}, Position(0, 0), vanishing=True
    )
    for segment, following in zip_longest(segments, segments[1:]):
        last = following is None or following.name.incarnation != segment.name.incarnation
        reading.segment(segment, last=last)
    places = [*reading.rollouts, *reading.outcomes]
    return SegmentsChecked(
        segments=segments,
        problems=(*odd_segments(storage, rank), *reading.problems),
        torn=tuple(reading.torn),
        last=max((position for position, _ in places), default=None),
    )


def _headers_of_starts(
    segments: Sequence[Segment], run_id: str | None
) -> tuple[dict[int, SegmentHeader], list[Segment]]:
    """The newest header of each start, by incarnation; and the segments without one."""
    headers: dict[int, SegmentHeader] = {}
    unreadable = []
    for segment in reversed(segments):
        if segment.name.incarnation in headers:
            continue
        try:
            header = read_header_of(segment)
        except CheckpointInvalid:
            unreadable.append(segment)
            continue
        if run_id is None or header.identity.run_id == run_id:
            headers[segment.name.incarnation] = header
    return headers, unreadable


def _starts(segments: Sequence[Segment], headers: Mapping[int, SegmentHeader]) -> list[Start]:
    """The starts that have a header, oldest first."""
    return [
        Start(
            incarnation=incarnation,
            fingerprint=header.identity.fingerprint,
            world_size=header.identity.world_size,
            lineage=header.whole_lineage,
            worked=any(_has_work(each) for each in segments if each.name.incarnation == incarnation),
        )
        for incarnation, header in sorted(headers.items())
    ]


def _has_work(segment: Segment) -> bool:
    """Whether it holds rollouts or an outcome: more than notes about the start itself.

    What cannot be read may be work too: no history is skipped because of an error.
    """
    try:
        with segment.open() as handle:
            end = 0
            for frame in read_frames(handle):
                if decode_record(frame.payload).kind in _WORK:
                    return True
                end = frame.end
            return end != handle.size
    except (StorageError, ValueError):
        return True


class _Reading:
    """Scans segments, oldest first, and notes where the records of a history are."""

    def __init__(
        self,
        run_id: str | None,
        lineage: Lineage,
        since: Position,
        chunks_per_step: int | None = None,
        *,
        vanishing: bool = False,
    ) -> None:
        self.rollouts: dict[Key, Place] = {}
        self.outcomes: dict[Key, Place] = {}
        self.events: list[Place] = []
        self.headers: dict[SegmentName, SegmentHeader] = {}
        self.torn: list[tuple[Segment, Ending]] = []
        self.problems: list[str] = []
        self._run_id = run_id
        self._lineage = lineage
        self._since = since
        self._chunks_per_step = chunks_per_step
        self._vanishing = vanishing
        """Whether listed segments may be gone by the time they are opened."""
        self._due: tuple[int, int] | None = None
        """Incarnation and sequence number of the next frame, if the next segment is of that incarnation."""

    def segment(self, segment: Segment, *, last: bool) -> None:
        """Read one segment; `last`: its incarnation has no later one, so its end may be torn."""
        try:
            with segment.open() as handle:
                self._frames(segment, handle, last=last)
        except StorageError as error:
            if self._vanishing and error.settled and segment.storage.stat(segment.name.path) is None:
                self._due = None
                return
            self._problem(segment, f"it cannot be read: {error.message}")

    def _frames(self, segment: Segment, handle: ReadHandle, *, last: bool) -> None:
        frame: Frame | None = None
        salt = NO_SALT
        for frame in read_frames(handle):
            try:
                if frame.offset == 0:
                    salt = frame.digest
                    self._header(segment, frame)
                else:
                    self._record(Place(segment, frame.offset, salt), decode_record(frame.payload))
            except ValueError as error:
                self._problem(segment, f"byte {frame.offset}: {error}")
                return
        if frame is not None:
            self._due = (segment.name.incarnation, frame.sequence + 1)
        ending = examine(handle, frame, salt)
        if not ending.problem:
            return
        if ending.damaged or not last:
            self._problem(
                segment,
                f"damaged at byte {ending.offset} of {handle.size}: {ending.problem}; not read beyond",
            )
        else:
            self.torn.append((segment, ending))

    def _header(self, segment: Segment, frame: Frame) -> None:
        header = decode_header(frame.payload, segment.name)
        if self._run_id is not None and header.identity.run_id != self._run_id:
            raise ValueError(f"it belongs to another run, {header.identity.run_id[:40]!r}")
        if (
            self._due is not None
            and self._due[0] == segment.name.incarnation
            and self._due[1] != frame.sequence
        ):
            self._problem(segment, f"frames {self._due[1]} to {frame.sequence - 1} before it are missing")
        self.headers[segment.name] = header

    def _record(self, place: Place, record: Record) -> None:
        name = place.segment.name
        if record.position < name.first:
            raise ValueError(f"a record of step {record.position} in a segment that begins at {name.first}")
        if record.position < self._since or not is_live(self._lineage, name.incarnation, record.position):
            return
        if record.kind == "rollouts":
            self.rollouts[record.position, self._chunk(name, record)] = place
        elif record.kind == "outcome":
            self.outcomes[record.position, record.number("iteration")] = place
        elif record.kind == "event":
            self.events.append(place)
        else:
            raise ValueError(f"a record of unknown kind {record.kind[:20]!r}")

    def _chunk(self, name: SegmentName, record: Record) -> int:
        """The number of a chunk, in the step where that can be said."""
        number, writer = record.number("chunk"), self.headers[name].identity
        if self._chunks_per_step is None or writer.chunks_per_step is not None:
            return number
        return writer.rank * (self._chunks_per_step // writer.world_size) + number

    def _problem(self, segment: Segment, text: str) -> None:
        self.problems.append(f"{segment}: {text}")
