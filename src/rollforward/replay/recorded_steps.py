"""Steps known only from their records: how long one is, and which comes next, is up to the loop.

Each record says which step it came `after`, and the outcome of a step says how many chunks it has. So a step
is whole when its outcome is known, all its chunks are present, and it comes after a whole step: gaps are
detected, and epochs may have any length.

    rollouts    chunk (numbered in the order of the calls), after, and what `once` says
    outcome     chunks, after; arrays: the numbers, float64
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.replay.inheriting import Reach, Tally
from rollforward.store.journal.reading import JournalView
from rollforward.store.journal.segments import Records

AFTER = "after"
CHUNKS = "chunks"


def said(position: Position | None) -> str:
    """A position as written in records; empty for none."""
    return "" if position is None else str(position)


@dataclass(kw_only=True)
class RecordedSteps:
    """`inheriting.Steps` from `start` on, which is the step that comes after `after`."""

    start: Position
    after: Position | None
    """None at the beginning of the run."""
    replayed: list[Position] = field(default_factory=list)
    """Once all have agreed: the whole steps, in order."""
    under_way: Position | None = None
    """The one after them, if its name is known."""

    def told(self, view: JournalView) -> dict[str, Any]:
        """[step, chunks present, chunks that its outcome requires], and how far the rank had come."""
        with Records() as records:
            steps = self._whole_steps(view, records)
        done = [self.behind(position) for position, _ in view.outcomes]
        done += [position for position, _ in view.rollouts]
        return {"steps": steps, "furthest": str(max([self.start, *done]))}

    def _whole_steps(self, view: JournalView, records: Records) -> list[list[Any]]:
        """Of the rank, up to the first that is not whole, which comes last."""
        steps: list[list[Any]] = []
        last = self.after
        for position in sorted({key[0] for key in (*view.rollouts, *view.outcomes)}):
            after, asked = _look(view, position, records)
            if after != said(last) or (not steps and position != self.start):
                break
            there = next(n for n in itertools.count() if (position, n) not in view.rollouts)
            steps.append([str(position), there, asked])
            if asked is None or there < asked:
                break
            last = position
        return steps

    def reach(self, told: Mapping[int, Any], *, compatible: bool) -> Reach:
        """A step is whole when one rank has its outcome and every rank has all its chunks.

        A rank that was killed before it wrote the outcome computes it again, so what another rank had
        already made of the next step is not lost.
        """
        furthest = max(Position.parse(each["furthest"]) for each in told.values())
        chains = [each["steps"] for each in told.values()] if compatible else [[]]
        for step in itertools.zip_longest(*chains):
            known = [each for each in step if each is not None]
            names = {name for name, _, _ in known}
            if len(names) > 1:
                break
            self.under_way = Position.parse(names.pop())
            asked = [count for _, _, count in known if count is not None]
            if not asked or len(known) < len(chains) or any(there < max(asked) for _, there, _ in known):
                break
            self.replayed.append(self.under_way)
            self.under_way = None
        until = self.under_way or (self.behind(self.replayed[-1]) if self.replayed else self.start)
        return Reach(until=until, finished=max(until, furthest))

    def needed(self, told: Mapping[int, Any], reach: Reach) -> set[int]:  # noqa: ARG002 - as the protocol has it
        """None but its own: what a process made is its own."""
        return set()

    def behind(self, position: Position) -> Position:
        """Whatever the next step is, it is not before this."""
        return Position(position.epoch, position.step + 1)

    def tally(self, view: JournalView, inherited: JournalView, reach: Reach) -> Tally:
        """Counts the records."""
        taken = [position for position, _ in inherited.rollouts]
        return Tally(
            replayed_steps=len(self.replayed),
            replayed_chunks=sum(position < reach.until for position in taken),
            reused_chunks=sum(position >= reach.until for position in taken),
            lost_steps=len({position for position, _ in view.outcomes if position >= reach.until}),
            lost_chunks=len(view.rollouts.keys() - inherited.rollouts),
        )


def _look(view: JournalView, position: Position, records: Records) -> tuple[str | None, int | None]:
    """The step before this one, and how many chunks its outcome says it has; None where unknown."""
    outcome = view.outcomes.get((position, 0))
    first = next((place for key, place in sorted(view.rollouts.items()) if key[0] == position), None)
    for place in (outcome, first):
        try:
            if place is not None:
                record = records.read(place)
                return record.metadata.get(AFTER), record.number(CHUNKS) if place is outcome else None
        except (CheckpointInvalid, ValueError):
            continue
    return None, None
