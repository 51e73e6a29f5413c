"""Which records of a journal belong to one history of a run, and which segments may go. Pure functions.

A restarted run resumes from a checkpoint and from what the journal has beyond it. Whatever an
earlier start (incarnation) recorded at or after the point where the new one stops inheriting is a
future that did not happen: it stays on disk, and is never replayed again.

A **lineage** records this in each segment: incarnation -> the position before which its records
are part of this history. Incarnations that are not in it belong to other histories. None, for an
incarnation's own records, means no bound. So the newest segment alone gives the whole history,
whatever happened to the older ones.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rollforward.position import Position
from rollforward.store.layout import SegmentName

Lineage = Mapping[int, Position | None]


def is_live(lineage: Lineage, incarnation: int, position: Position) -> bool:
    """Whether a record with this incarnation and position is part of the history."""
    if incarnation not in lineage:
        return False
    before = lineage[incarnation]
    return before is None or position < before


def inherit(lineage: Lineage, before: Position) -> dict[int, Position | None]:
    """The lineage of a new start that inherits this one's records of positions before `before`."""
    return {
        incarnation: before if bound is None else min(bound, before) for incarnation, bound in lineage.items()
    }


def holds_checkpoint(lineage: Lineage, incarnation: int, position: Position) -> bool:
    """Whether the checkpoint that this incarnation saved at `position` is a state of the history.

    It is the state after the steps before `position`, so all of those must be inherited.
    """
    if incarnation not in lineage:
        return False
    before = lineage[incarnation]
    return before is None or position <= before


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of the run (incarnation), and the history that it continued."""

    incarnation: int
    fingerprint: str
    """Its configuration's."""
    world_size: int
    lineage: Lineage
    """Includes its own records."""
    worked: bool
    """Whether it recorded rollouts or an outcome, and not only that it started."""


def of_all_ranks(told: Iterable[Iterable[Start]]) -> list[Start]:
    """The starts that any rank knows of, oldest first; one has done work if it has on any rank."""
    found: dict[int, Start] = {}
    for start in (start for starts in told for start in starts):
        known = found.get(start.incarnation)
        found[start.incarnation] = replace(start, worked=start.worked or (known is not None and known.worked))
    return [found[number] for number in sorted(found)]


def with_idle(starts: Collection[Start]) -> list[Start]:
    """The starts, each history extended by later starts that continued it and recorded nothing.

    Such a start may still have saved a checkpoint: of what it had replayed.
    """
    idle = [start for start in starts if not start.worked]
    return [
        replace(
            start,
            lineage={
                **start.lineage,
                **{later.incarnation: None for later in idle if start.incarnation in later.lineage},
            },
        )
        for start in starts
    ]


def choose_history(
    starts: Collection[Start],
    checkpoint: tuple[int, Position] | None,
    *,
    fingerprint: str | None = None,
    also: Collection[str] = (),
    world_size: int | None = None,
) -> Start | None:
    """The start whose history is resumed, among those that contain the checkpoint; None without any.

    `checkpoint`: incarnation and position; None for any. `also`: other fingerprints of this configuration,
    made by earlier versions. Picks the newest start that did work and had this configuration and number
    of ranks: its records can be used. If there is none, picks the newest that did work, so that the caller
    can report what is not used. A start that did nothing (a mistake when resuming, a kill in its first
    second) does not hide the ones before it.
    """
    newest_first = [
        start
        for start in sorted(with_idle(starts), key=lambda start: -start.incarnation)
        if checkpoint is None or holds_checkpoint(start.lineage, *checkpoint)
    ]
    worked = [start for start in newest_first if start.worked]
    same = [
        start
        for start in worked
        if (fingerprint in (None, start.fingerprint) or start.fingerprint in also)
        and world_size in (None, start.world_size)
    ]
    return next(iter([*same, *worked, *newest_first]), None)


def ends(segments: Iterable[SegmentName], lineage: Lineage) -> dict[SegmentName, Position | None]:
    """The position before which each segment's records of this history end; None when unknown.

    A segment holds whole steps: from its first up to the first of the incarnation's next segment.
    A segment of another history gets its own first position: it holds nothing of this history.
    """
    found: dict[SegmentName, Position | None] = {}
    following: SegmentName | None = None
    for segment in sorted(segments, reverse=True):
        if segment.incarnation not in lineage:
            found[segment] = segment.first
        else:
            bounds = [lineage[segment.incarnation]]
            if following is not None and following.incarnation == segment.incarnation:
                bounds.append(following.first)
            known = [bound for bound in bounds if bound is not None]
            found[segment] = min(known) if known else None
        following = segment
    return found


def removable(segments: Sequence[SegmentName], lineage: Lineage, oldest: Position) -> list[SegmentName]:
    """Segments that no replay from a position of `oldest` or later needs, oldest first.

    Segments of an incarnation newer than any in the lineage stay: a writer that has been replaced
    must not remove what its successor wrote.
    """
    newest = max(lineage, default=0)
    return sorted(
        segment
        for segment, end in ends(segments, lineage).items()
        if end is not None and end <= oldest and segment.incarnation <= newest
    )
