"""A copy to a bucket that is killed, or whose requests go wrong: what is there is whole, and it ends.

The source has trained, or trains on between any two requests of the copy: checkpoints come and are removed,
the journal grows. After *every* change of the target it is opened with the real recovery code.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from bucket_run import BucketChecker, Troubles, open_bucket, record
from crash_run import Violation
from simulated_bucket import FATES, Change, Fate, Objects, SimulatedBucket, apply, instead_of_obstore
from simulated_disk import Killed

from rollforward.errors import StorageError
from rollforward.storage import read_small
from rollforward.store import Manifest, copying, list_checkpoints
from rollforward.store.copying import MARK, copy_run
from rollforward.store.layout import LOCK, manifest_path

JOURNAL = "journal/rank_0/1-0_0.journal"
FRAME = b"a frame of the journal, "
READS = ("get", "head", "list")
STRIDE = 5
"""In the suite one of so many requests of a copy; by name each."""
START = 150
"""Changes after which the copy begins."""


@pytest.fixture(autouse=True, scope="module")
def _simulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        instead_of_obstore(patch)
        yield


@cache
def history() -> tuple[Change, ...]:
    """Every change of a bucket in which a run trained, with a journal that grew meanwhile."""
    changes, size = [], 0
    for number, change in enumerate(change for change in record(Troubles()).bucket.log if change.key):
        changes.append(change)
        if number % 10 == 0:
            changes.append(Change(f"{JOURNAL}+0001-{size:016d}", FRAME))
            size += len(FRAME)
    return tuple(changes)


class Source(SimulatedBucket):
    """The bucket after so many changes; `pace` more happen before each request, if it trains on."""

    def __init__(self, changes: int, pace: int = 0) -> None:
        content: Objects = {}
        for change in history()[:changes]:
            apply(content, change)
        super().__init__(content)
        self._next = changes
        self._pace = pace

    def train(self, changes: int) -> None:
        for change in history()[self._next : self._next + changes]:
            self._did(change)
        self._next += changes

    def went_on(self) -> None:
        self.train(self._pace)


class Checked:
    """The states of targets in one test, each checked once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self._checker = BucketChecker()

    def look(self, target: SimulatedBucket) -> None:
        """At every content that it ever had."""
        content: Objects = {}
        for change in target.log:
            apply(content, change)
            key = hash(frozenset(content.items()))
            if key not in self.seen:
                self.seen.add(key)
                self._checker.check(content, None)
                for info in list_checkpoints(open_bucket(SimulatedBucket(content))):
                    if not info.valid:
                        raise Violation(f"{info.position} is there, and not whole: {info.reason}")
                # The journal is one object here, put at once: the beginning of what was recorded.
                assert content.get(JOURNAL, b"") == FRAME * (len(content.get(JOURNAL, b"")) // len(FRAME))
                assert LOCK not in content


def copy(
    source: Source, target: SimulatedBucket, *, before: Callable[[int, str], None] = lambda *_: None
) -> None:
    """`before` is called before each request to either, with its number; it may end the copy."""
    asked = 0

    def look(what: str, _key: str) -> str:
        nonlocal asked
        asked += 1
        source.went_on()
        before(asked, what)
        return "done"

    fate = target.fate
    source.fate = look  # type: ignore[assignment]
    target.fate = lambda what, key: (look(what, key), fate(what, key))[1]
    try:
        copy_run(open_bucket(source), open_bucket(target))
    finally:
        target.fate = fate
        assert {what for what, _ in source.asked} <= set(READS), "nothing of the source is changed"


def finish(source: Source, target: SimulatedBucket, checked: Checked) -> None:
    """Started again once nothing trains or goes wrong, it is a whole copy of what is there then.

    And remains one when what is still late arrives.
    """
    still, target.fate = Source(source._next), lambda *_: "done"
    done = copy_run(open_bucket(still), open_bucket(target))
    wanted = list_checkpoints(open_bucket(still), deep=True)
    assert wanted
    assert done.left_out == []
    assert done.checkpoints == [info.position for info in reversed(wanted)]
    assert MARK not in target.objects
    assert target.objects[JOURNAL] == b"".join(
        content for key, content in sorted(still.objects.items()) if key.startswith(JOURNAL)
    )
    target.land()
    there = {info.position: info for info in list_checkpoints(open_bucket(target), deep=True)}
    for info in wanted:
        assert there[info.position].valid
        assert there[info.position].manifest == info.manifest
    checked.look(target)


def undisturbed(pace: int, checked: Checked) -> tuple[int, SimulatedBucket]:
    """How many requests a copy takes, and what it leaves."""
    source, target = Source(START, pace), SimulatedBucket()
    copy(source, target)
    asked = list(target.asked)
    finish(source, target, checked)
    target.asked = asked
    return len(source.asked) + len(asked), target


def kill_at(last: int) -> Callable[[int, str], None]:
    def before(number: int, _what: str) -> None:
        if number == last:
            raise Killed

    return before


def kill_everywhere(stride: int, pace: int) -> tuple[int, int]:
    """A copy killed at each request and started again, which is killed further on: kills, and states."""
    checked, kills = Checked(), 0
    for last in range(1, undisturbed(pace, checked)[0], stride):
        source, target = Source(START, pace), SimulatedBucket()
        for more in (last, last + stride // 2):
            try:
                copy(source, target, before=kill_at(more))
            except Killed:
                kills += 1
        finish(source, target, checked)
    return kills, len(checked.seen)


@pytest.mark.parametrize("pace", [0, 1, 4], ids=["at rest", "training", "training fast"])
def test_killed_at_any_request_it_leaves_whole_checkpoints_and_ends_when_it_is_started_again(
    pace: int,
) -> None:
    kills, states = kill_everywhere(STRIDE, pace)
    assert kills > 20
    assert states > 20


@pytest.mark.slow
@pytest.mark.parametrize("pace", [0, 1, 4])
def test_killed_at_each_request(pace: int) -> None:
    print("{} kills, {} states".format(*kill_everywhere(1, pace)))


def fail_everywhere(stride: int, pace: int) -> tuple[int, int]:
    """Each request to the target meets each fate, late ones after the end: copies that failed, and states."""
    checked, failed = Checked(), 0
    asked = undisturbed(pace, checked)[1].asked
    for number, (what, _) in enumerate(asked, start=1):
        for fate in ("fails",) if what in READS else FATES:
            if number % stride:
                continue
            source, target = Source(START, pace), SimulatedBucket()
            target.fate = meets(target, number, fate)
            # During the copy that goes on where this one ended, or when that has ended too.
            target.delay = lambda number=number: 3 if number % 2 else 10**6
            try:
                copy(source, target)
            except StorageError:
                failed += 1
            finish(source, target, checked)
    return failed, len(checked.seen)


def meets(target: SimulatedBucket, number: int, fate: Fate) -> Callable[[str, str], Fate]:
    return lambda *_: fate if len(target.asked) == number else "done"


@pytest.mark.parametrize("pace", [0, 1], ids=["at rest", "training"])
def test_any_request_may_fail_or_be_carried_out_twice_or_when_the_copy_has_ended(pace: int) -> None:
    failed, states = fail_everywhere(STRIDE, pace)
    assert failed > 10
    assert states > 20


@pytest.mark.slow
@pytest.mark.parametrize("pace", [0, 1, 4])
def test_each_request_meets_each_fate(pace: int) -> None:
    print("{} failed, {} states".format(*fail_everywhere(1, pace)))


def test_a_manifest_that_is_sent_before_what_it_names_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bring = copying._Copy._bring_checkpoint

    def publish_and_bring(self: Any, manifest: Manifest) -> bool:
        path = manifest_path(manifest.position)
        self._put(path, read_small(self._source, path, limit=1 << 20))
        return bring(self, manifest)

    monkeypatch.setattr(copying._Copy, "_bring_checkpoint", publish_and_bring)
    with pytest.raises(Violation, match="is there, and not whole"):
        undisturbed(0, Checked())
