"""Steps that only their records tell: how long one is, and which comes next, is up to the loop.

Each record says which step came `after` which, and the outcome of a step says how many chunks it has. So
a step is whole when its outcome is there, with all its chunks, and comes after a whole step: a gap is
noticed, and steps may be counted by epochs of any length.

    rollouts    chunk (numbered in the order of the calls), after, and what `once` says
    outcome     chunks, after; arrays: the numbers, float64
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.replay.inheriting import Reach, Tally
from rollforward.store.journal.reading import JournalView, read_record

AFTER = "after"
CHUNKS = "chunks"


def said(position: Position | None) -> str:
    """A position as records have it; empty for none."""
    return "" if position is None else str(position)


@dataclass(kw_only=True)
class RecordedSteps:
    """`inheriting.Steps` from `start` on, which is the step that comes after `after`."""

    start: Position
    after: Position | None
    """None where the run begins."""
    replayed: list[Position] = field(default_factory=list)
    """Once all have agreed: the steps that are whole on every rank, in their order."""
    under_way: Position | None = None
    """And the one behind them, where its name is known."""

    def told(self, view: JournalView) -> dict[str, Any]:
        """The steps in their order, how many of them are whole, and how far the rank had come."""
        steps: list[Position] = []
        whole, last = 0, self.after
        for position in sorted({key[0] for key in (*view.rollouts, *view.outcomes)}):
            after, is_whole = _look(view, position)
            if after != said(last) or (not steps and position != self.start):
                break
            steps.append(position)
            if not is_whole:
                break
            whole, last = whole + 1, position
        done = [self.behind(position) for position, _ in view.outcomes]
        done += [position for position, _ in view.rollouts]
        furthest = max([self.start, *done])
        return {"steps": [str(step) for step in steps], "whole": whole, "furthest": str(furthest)}

    def reach(self, told: Sequence[Any], *, compatible: bool) -> Reach:
        """As many steps as all have; who has more knows the name of the next."""
        furthest = max(Position.parse(each["furthest"]) for each in told)
        if compatible:
            whole = min(each["whole"] for each in told)
            steps = [Position.parse(step) for step in max((each["steps"] for each in told), key=len)]
            self.replayed, self.under_way = steps[:whole], next(iter(steps[whole:]), None)
        until = self.under_way or (self.behind(self.replayed[-1]) if self.replayed else self.start)
        return Reach(until=until, finished=max(until, furthest))

    def behind(self, position: Position) -> Position:
        """Whatever the next step is called, it is not before this."""
        return Position(position.epoch, position.step + 1)

    def tally(self, view: JournalView, inherited: JournalView, reach: Reach) -> Tally:
        """As many as there are records."""
        taken = [position for position, _ in inherited.rollouts]
        return Tally(
            replayed_steps=len(self.replayed),
            replayed_chunks=sum(position < reach.until for position in taken),
            reused_chunks=sum(position >= reach.until for position in taken),
            lost_steps=len({position for position, _ in view.outcomes if position >= reach.until}),
            lost_chunks=len(view.rollouts.keys() - inherited.rollouts),
        )


def _look(view: JournalView, position: Position) -> tuple[str | None, bool]:
    """After which step this one came, None where no record of it says so; and whether it is whole."""
    outcome = view.outcomes.get((position, 0))
    first = next((place for key, place in sorted(view.rollouts.items()) if key[0] == position), None)
    for place in (outcome, first):
        try:
            if place is None:
                continue
            record = read_record(place)
            chunks = record.number(CHUNKS) if place is outcome else None
        except (CheckpointInvalid, ValueError):
            continue
        is_whole = chunks is not None and all((position, n) in view.rollouts for n in range(chunks))
        return record.metadata.get(AFTER), is_whole
    return None, False
