"""Whatever starts, kills and branches a run has seen: each start replays its own past, and no other's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.position import Position
from rollforward.store.journal.timeline import (
    Lineage,
    choose_history,
    ends,
    holds_checkpoint,
    inherit,
    is_live,
    removable,
)
from rollforward.store.journal.timeline import (
    Start as Started,
)
from rollforward.store.layout import SegmentName

STEPS = 8


def at(step: int) -> Position:
    return Position(*divmod(step, 5))


@dataclass
class Start:
    """One incarnation, told twice: by its lineage, and by the records that it really builds on."""

    lineage: Lineage
    past: set[tuple[int, int]]
    """(incarnation, step) of all records it inherited or wrote."""
    segments: dict[int, range] = field(default_factory=dict)
    """First step -> steps that the segment holds."""


@st.composite
def runs(draw: st.DrawFn) -> dict[int, Start]:
    """A run started up to six times: on from the newest state, or back to an older one, or to another's."""
    starts: dict[int, Start] = {}
    for incarnation in range(1, draw(st.integers(1, 6)) + 1):
        past: set[tuple[int, int]] = set()
        lineage: Lineage = {}
        first = 0
        if starts:
            parent = draw(st.sampled_from(sorted(starts)))
            reach = max((step for _, step in starts[parent].past), default=0)
            before = draw(st.integers(0, reach + 1))
            past = {record for record in starts[parent].past if record[1] < before}
            lineage = inherit({**starts[parent].lineage, parent: None}, at(before))
            # A new start writes from the step that was not whole, the last that it inherits.
            first = max(before - draw(st.integers(0, 1)), 0)
        count = draw(st.integers(0, STEPS))
        cuts = sorted({first} | draw(st.sets(st.integers(first, first + count))))
        own = range(first, first + count)
        segments = {cut: range(cut, end) for cut, end in zip(cuts, [*cuts[1:], first + count], strict=True)}
        starts[incarnation] = Start(lineage, past | {(incarnation, step) for step in own}, segments)
    return starts


def whole(starts: dict[int, Start], incarnation: int) -> Lineage:
    return {**starts[incarnation].lineage, incarnation: None}


def names(starts: dict[int, Start]) -> list[SegmentName]:
    return [
        SegmentName(0, incarnation, at(first))
        for incarnation, start in starts.items()
        for first in start.segments
    ]


@given(runs())
@settings(max_examples=150)
def test_live_records_are_those_that_a_start_builds_on(starts: dict[int, Start]) -> None:
    written = [(i, step) for i, start in starts.items() for held in start.segments.values() for step in held]
    for incarnation, start in starts.items():
        live = {record for record in written if is_live(whole(starts, incarnation), record[0], at(record[1]))}
        assert live == start.past


@given(runs(), st.integers(0, 3 * STEPS), st.data())
@settings(max_examples=150)
def test_what_is_removed_is_not_needed_and_what_is_not_needed_is_removed(
    starts: dict[int, Start], oldest: int, data: st.DataObject
) -> None:
    own = data.draw(st.sampled_from(sorted(starts)))
    lineage = whole(starts, own)
    removed = removable(names(starts), lineage, at(oldest))
    kept = set(names(starts)) - set(removed)
    for name in removed:
        held = starts[name.incarnation].segments[name.first.epoch * 5 + name.first.step]
        assert not [s for s in held if s >= oldest and (name.incarnation, s) in starts[own].past]
        assert name.incarnation <= own, "a successor's segment"
    for name in kept:
        steps = sorted(starts[name.incarnation].segments)
        later = [s for s in steps if at(s) > name.first]
        not_needed = later and later[0] <= oldest and name.incarnation in lineage
        assert not not_needed, f"{name} ends before {oldest} and stays"


def started(incarnation: int, lineage: Lineage, *, worked: bool = True, fingerprint: str = "f") -> Started:
    return Started(
        incarnation=incarnation, fingerprint=fingerprint, world_size=1, lineage=lineage, worked=worked
    )


def tip_of(lineages: Mapping[int, Lineage], checkpoint: tuple[int, Position] | None) -> int | None:
    """The start whose history is resumed, when all have worked with the same configuration."""
    starts = [started(incarnation, lineage) for incarnation, lineage in lineages.items()]
    found = choose_history(starts, checkpoint)
    return None if found is None else found.incarnation


@given(runs(), st.data())
def test_the_newest_start_is_gone_on_from_unless_its_past_lacks_the_checkpoint(
    starts: dict[int, Start], data: st.DataObject
) -> None:
    lineages = {incarnation: whole(starts, incarnation) for incarnation in starts}
    assert tip_of(lineages, None) == max(starts)
    incarnation = data.draw(st.sampled_from(sorted(starts)))
    steps = [step for writer, step in starts[incarnation].past if writer == incarnation]
    if not steps:
        return
    saved = data.draw(st.sampled_from(steps)) + 1
    tip = tip_of(lineages, (incarnation, at(saved)))
    assert tip is not None
    past_of_checkpoint = {(i, s) for i, s in starts[incarnation].past if i == incarnation and s < saved}
    assert past_of_checkpoint <= starts[tip].past
    for newer in range(tip + 1, max(starts) + 1):
        assert not holds_checkpoint(lineages[newer], incarnation, at(saved))


def test_going_back_abandons_the_future_and_going_on_keeps_it_abandoned() -> None:
    first: Lineage = {1: None}
    second = {**inherit(first, at(3)), 2: None}
    third = {**inherit(second, at(9)), 3: None}
    assert not is_live(third, 1, at(5))
    assert is_live(third, 2, at(5))
    assert is_live(third, 1, at(2))
    assert third == {1: at(3), 2: at(9), 3: None}


def test_a_killed_branch_does_not_hide_the_history_of_the_checkpoint_that_is_gone_on_from() -> None:
    """Start 3 went back to step 2 of start 1 and was killed; start 4 goes on from start 2's checkpoint."""
    lineages: dict[int, Lineage] = {
        1: {1: None},
        2: {1: at(6), 2: None},
        3: {1: at(2), 3: None},
    }
    assert tip_of(lineages, (2, at(8))) == 2
    assert tip_of(lineages, (1, at(2))) == 3
    assert tip_of(lineages, (9, at(2))) is None


def test_the_end_of_a_segment_is_its_successor_or_the_lineage_whichever_is_earlier() -> None:
    segments = [SegmentName(0, 1, at(0)), SegmentName(0, 1, at(6)), SegmentName(0, 2, at(3))]
    lineage: Lineage = {1: at(4), 2: None}
    assert ends(segments, lineage) == {
        segments[0]: at(4),
        segments[1]: at(4),
        segments[2]: None,
    }


def test_a_start_that_did_nothing_hides_nothing_of_those_before_it() -> None:
    starts = [started(1, {1: None}), started(2, {1: at(5), 2: None}, worked=False, fingerprint="slip")]
    for fingerprint in ("f", "slip", "third"):
        chosen = choose_history(starts, None, fingerprint=fingerprint, world_size=1)
        assert chosen is not None
        assert chosen.incarnation == 1


def test_a_start_that_did_something_else_does_not_hide_records_that_can_be_used() -> None:
    starts = [started(1, {1: None}), started(2, {1: at(5), 2: None}, fingerprint="other")]
    chosen = [
        choose_history(starts, None, fingerprint=name, world_size=1) for name in ("f", "other", "third")
    ]
    assert [start.incarnation for start in chosen if start is not None] == [1, 2, 2]
    assert choose_history([], None, fingerprint="f") is None
