"""One writer by conditional puts: who gets the lease, when it is taken over, what who lost it can do."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from rollforward.errors import RunLocked, StorageError
from rollforward.storage import LocalStorage
from rollforward.storage.objects import ObjectStorage
from rollforward.store.layout import LOCK
from rollforward.store.lease import Follower, Lease, honours_conditions
from rollforward.store.lock import read_owner


class Clock:
    """Of one machine; it goes on only when somebody waits for it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


class Unsure(ObjectStorage):
    """Answers get lost: the next put is done, and its writer is told that it failed."""

    lose = False

    def put_if(self, path: str, content: bytes, tag: str | None) -> str | None:
        done = super().put_if(path, content, tag)
        if self.lose:
            self.lose = False
            raise StorageError("the answer did not come")
        return done


@pytest.fixture
def bucket() -> Unsure:
    return Unsure(MemoryStore(), "memory://run")


def take(bucket: ObjectStorage, place: str, clock: Clock | None = None, **options: object) -> Lease:
    clock = clock or Clock()
    # The thread would renew in its own time; here each renewal is asked for.
    return Lease.acquire(bucket, place=place, seconds=3000.0, clock=clock, wait=clock.wait, **options)  # type: ignore[arg-type]


def test_each_start_has_a_higher_incarnation(bucket: Unsure) -> None:
    for number in (1, 2, 3):
        with take(bucket, f"machine {number}") as lease:
            assert lease.incarnation == number
            assert lease.taken_over is None
    owner = read_owner(bucket)
    assert owner is not None
    assert not owner.held


def test_one_that_is_renewed_is_not_taken(bucket: Unsure) -> None:
    lease, clock = take(bucket, "a"), Clock()
    clock.meanwhile = lease.check
    with pytest.raises(RunLocked, match="incarnation 1") as caught:
        take(bucket, "b", clock)
    assert caught.value.hint
    lease.check()


def test_one_that_is_not_renewed_is_taken_when_it_has_run_out_and_not_before(bucket: Unsure) -> None:
    lost, clock, said = take(bucket, "a"), Clock(), []
    lease = take(bucket, "b", clock, say=said.append)
    assert clock.now - 1000 >= 3000
    assert (lease.incarnation, lease.taken_over) == (2, lost.owner)
    assert "held by process" in said[0]
    for attempt in (lost.check, lost.check):
        with pytest.raises(RunLocked, match=r"taken over by .*incarnation 2"):
            attempt()
    lost.release()
    lease.check()


def test_a_released_one_is_taken_at_once(bucket: Unsure) -> None:
    take(bucket, "a").release()
    clock = Clock()
    assert take(bucket, "b", clock).taken_over is None
    assert clock.now == 1000


def test_one_released_while_it_is_watched_is_taken(bucket: Unsure) -> None:
    lease, clock = take(bucket, "a"), Clock()
    clock.meanwhile = lease.release
    assert take(bucket, "b", clock).incarnation == 2
    assert clock.now < 1500


def test_the_same_working_folder_takes_its_own_at_once(bucket: Unsure) -> None:
    """Whoever asks holds that folder's lock, so the earlier owner has ended."""
    take(bucket, "a")
    clock = Clock()
    lease = take(bucket, "a", clock)
    assert clock.now == 1000
    assert lease.taken_over is not None


def test_of_two_that_take_over_at_once_one_gets_it(bucket: Unsure) -> None:
    take(bucket, "a")
    clock, won = Clock(), []

    def other() -> None:
        if clock.now - 1000 > 3300 and not won:
            won.append(take(bucket, "c"))

    clock.meanwhile = other
    with pytest.raises(RunLocked, match="incarnation 2"):
        take(bucket, "b", clock)
    won[0].check()


def test_a_renewal_whose_answer_was_lost_does_not_cost_the_lease(bucket: Unsure) -> None:
    lease = take(bucket, "a")
    bucket.lose = True
    with pytest.raises(StorageError):
        lease.check()
    lease.check()
    lease.check()


def test_a_young_lease_is_trusted_and_an_old_one_is_asked_for(bucket: Unsure) -> None:
    clock = Clock()
    lease = take(bucket, "a", clock)
    other = take(bucket, "b")
    lease.holds()  # by its own clock nobody can have taken it
    clock.now += 2900
    with pytest.raises(RunLocked):
        lease.holds()
    other.holds()


def test_it_is_renewed_by_itself(bucket: Unsure) -> None:
    with Lease.acquire(bucket, place="a", seconds=3.0):
        first, limit = bucket.read_tagged(LOCK), time.monotonic() + 300
        while bucket.read_tagged(LOCK) == first:
            assert time.monotonic() < limit, "it was not renewed"
            time.sleep(0.01)


def test_what_was_not_shipped_is_told_to_a_successor_elsewhere_alone(bucket: Unsure) -> None:
    lease = take(bucket, "a")
    lease.behind = lambda: {"records": 3.0, "bytes": 1200.0, "seconds": 4.5}
    lease.check()
    assert take(bucket, "b").left_behind == {"records": 3.0, "bytes": 1200.0, "seconds": 4.5}
    again = take(bucket, "c")
    again.behind = lambda: {"records": 1.0}
    again.check()
    assert take(bucket, "c").left_behind == {}


class TestTheOtherRanks:
    """They do not hold the lease, and look whose it is."""

    def test_they_go_on_while_it_is_renewed_and_when_it_is_given_back(self, bucket: Unsure) -> None:
        clock = Clock()
        lease = take(bucket, "one", clock)
        follower = Follower(bucket, lease.incarnation, clock=clock)
        for _ in range(5):
            follower.holds()
            clock.wait(1001)
            lease.check()
        lease.release()
        follower.holds()

    def test_one_that_wakes_up_after_a_take_over_can_do_no_more(self, bucket: Unsure) -> None:
        clock = Clock()
        frozen = take(bucket, "one", clock)
        follower = Follower(bucket, frozen.incarnation, clock=clock)
        follower.holds()
        taken = take(bucket, "other", clock)
        for _ in range(2):
            with pytest.raises(RunLocked, match="taken over by") as caught:
                follower.holds()
            assert "incarnation 1" in str(caught.value)
        Follower(bucket, taken.incarnation, clock=clock).holds()

    def test_they_look_no_more_often_than_it_is_renewed(self, bucket: Unsure) -> None:
        clock = Clock()
        lease = take(bucket, "one", clock)
        follower = Follower(bucket, lease.incarnation, clock=clock)
        follower.holds()
        bucket.remove(LOCK)
        clock.wait(999)
        follower.holds()
        clock.wait(2)
        with pytest.raises(RunLocked):
            follower.holds()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"lease": 5}', b"\xff" * 600])
def test_one_that_cannot_be_understood_is_watched_and_then_replaced(bucket: Unsure, content: bytes) -> None:
    bucket.write(LOCK, [content])
    clock = Clock()
    assert take(bucket, "a", clock).incarnation == 1
    assert clock.now - 1000 >= 30


def test_a_duration_that_makes_no_sense_is_not_waited_for(bucket: Unsure) -> None:
    take(bucket, "a")
    value = json.loads(bucket.read_tagged(LOCK)[0])  # type: ignore[index]
    value["lease"]["seconds"] = 1e12
    bucket.write(LOCK, [json.dumps(value).encode()])
    clock = Clock()
    take(bucket, "b", clock)
    assert clock.now - 1000 < 60


class TestWithoutConditions:
    """A service that takes every put."""

    class Careless(ObjectStorage):
        def put_if(self, path: str, content: bytes, tag: str | None) -> str | None:  # noqa: ARG002
            self.write(path, [content])
            return "tag"

    def test_it_is_told_in_one_line_what_is_not_guaranteed(self) -> None:
        bucket, said = self.Careless(MemoryStore(), "memory://run"), []
        assert not honours_conditions(bucket, bucket)
        lease = take(bucket, "a", say=said.append)
        assert len(said) == 1
        assert "does not honour conditional writes" in said[0]
        lease.check()
        take(bucket, "b")
        with pytest.raises(RunLocked):
            lease.check()

    def test_trying_leaves_nothing_behind(self) -> None:
        for bucket in (self.Careless(MemoryStore(), "m"), ObjectStorage(MemoryStore(), "m")):
            honours_conditions(bucket, bucket)
            assert bucket.scan("") == []

    def test_a_folder_works_too(self, tmp_path: Path) -> None:
        storage = LocalStorage(tmp_path)
        storage.make_root()
        with take(storage, "a", say=lambda _: None) as lease:  # type: ignore[arg-type]
            lease.check()
