"""What grows is on this machine's disk first, then where the run is: in order, whole, after every failure."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from rollforward.errors import RunLocked, StorageError
from rollforward.storage import LocalStorage, read_small
from rollforward.storage.base import Appender
from rollforward.storage.objects import ObjectStorage
from rollforward.store.shipping import Fences, Shipping, bring_up

SEGMENT = "journal/rank_0/1-0_0.journal"


class Bucket(ObjectStorage):
    """A service that can be away, slow, or answer nothing although it did what was asked."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(), "memory://run")
        self.away = False
        self.lost_answers = 0
        self.open_door = threading.Event()
        self.open_door.set()
        self.puts: list[str] = []

    def create(self, key: str, content: bytes) -> None:
        self.open_door.wait(300)
        if self.away:
            raise StorageError(f"writing {key}: the service is away")
        super().create(key, content)
        self.puts.append(key)
        if self.lost_answers:
            self.lost_answers -= 1
            raise StorageError(f"writing {key}: the answer did not come")


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def spool(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "spool")


@pytest.fixture
def ship(bucket: Bucket, spool: LocalStorage) -> Iterator[Callable[..., Shipping]]:
    """Makes a `Shipping`; all of them end with the test."""
    made: list[Shipping] = []

    def make(**options: Any) -> Shipping:
        made.append(Shipping(bucket, spool, **{"incarnation": 1, "retry_seconds": 0.01, **options}))
        return made[-1]

    yield make
    bucket.away = False
    bucket.open_door.set()
    for each in made:
        try:
            each.close()
        except (StorageError, RunLocked):
            continue


def content(storage: Any, path: str = SEGMENT) -> bytes:
    return read_small(storage, path, limit=1 << 28)


def write(appender: Appender, *records: bytes) -> None:
    for record in records:
        appender.append([record])


def test_what_was_synced_comes_to_the_storage_and_leaves_the_spool(
    ship: Any, bucket: Bucket, spool: Any
) -> None:
    shipping = ship()
    appender = shipping.appender(SEGMENT)
    write(appender, b"one", b"two")
    appender.close()
    shipping.close()
    assert content(bucket) == b"onetwo"
    assert [entry.name for entry in spool.scan("journal/rank_0")] == []


def test_it_is_on_this_disk_while_the_service_is_away_and_nobody_waits(
    ship: Any, bucket: Bucket, spool: LocalStorage
) -> None:
    shipping, bucket.away = ship(), True
    appender = shipping.appender(SEGMENT)
    write(appender, b"one", b"two")
    assert content(spool) == b"onetwo"
    assert shipping.behind()["records"] == 2
    assert shipping.behind()["bytes"] == 6
    bucket.away = False
    wait_until(lambda: not shipping.behind())
    assert content(bucket) == b"onetwo"


def test_what_waits_goes_together(ship: Any, bucket: Bucket) -> None:
    shipping = ship()
    bucket.open_door.clear()
    appender = shipping.appender(SEGMENT)
    write(appender, *(bytes([number]) for number in range(50)))
    bucket.open_door.set()
    shipping.settle()
    assert content(bucket) == bytes(range(50))
    assert len(bucket.puts) <= 3


def test_a_large_one_goes_in_bounded_pieces(
    ship: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollforward.store.shipping.PIECE_BYTES", 1000)
    shipping = ship()
    write(shipping.appender(SEGMENT), bytes(4500))
    shipping.settle()
    assert content(bucket) == bytes(4500)
    assert len(bucket.puts) == 5


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_lost_answer_is_neither_a_gap_nor_a_repetition(ship: Any, bucket: Bucket, lost: int) -> None:
    shipping = ship()
    appender = shipping.appender(SEGMENT)
    write(appender, b"one")
    shipping.settle()
    bucket.lost_answers = lost
    write(appender, b"two")
    wait_until(lambda: not shipping.behind())
    write(appender, b"three")
    shipping.settle()
    assert content(bucket) == b"onetwothree"


def test_a_first_piece_whose_answer_was_lost_is_not_taken_for_another_writers(
    ship: Any, bucket: Bucket
) -> None:
    shipping = ship()
    bucket.lost_answers = 1
    write(shipping.appender(SEGMENT), b"one")
    wait_until(lambda: not shipping.behind())
    assert content(bucket) == b"one"


def test_with_remote_a_record_returns_when_the_service_has_it(ship: Any, bucket: Bucket) -> None:
    appender = ship(remote=True).appender(SEGMENT)
    for number in range(5):
        write(appender, bytes([number]))
        assert content(bucket) == bytes(range(number + 1))


def test_with_remote_a_service_that_is_away_is_an_error(ship: Any, bucket: Bucket) -> None:
    appender, bucket.away = ship(remote=True).appender(SEGMENT), True
    with pytest.raises(StorageError, match="away"):
        write(appender, b"one")


@pytest.mark.parametrize("path", ["tables/rank_0/table_rank_0-0_3.json", "commits/0_3.json"])
def test_a_checkpoint_is_not_there_before_the_journal_that_it_holds(
    ship: Any, bucket: Bucket, path: str
) -> None:
    shipping, seen = ship(), []
    bucket.open_door.clear()
    write(shipping.appender(SEGMENT), b"one")
    writing = threading.Thread(target=lambda: seen.append(shipping.write(path, [b"x"])))
    writing.start()
    time.sleep(0.1)
    assert bucket.stat(path) is None
    bucket.open_door.set()
    writing.join(300)
    assert seen == [1]
    assert content(bucket) == b"one"


def test_a_checkpoint_fails_when_the_journal_cannot_be_shipped_and_the_run_goes_on(
    ship: Any, bucket: Bucket
) -> None:
    shipping, bucket.away = ship(), True
    appender = shipping.appender(SEGMENT)
    write(appender, b"one")
    with pytest.raises(StorageError, match="away"):
        shipping.write("commits/0_3.json", [b"x"])
    write(appender, b"two")
    bucket.away = False
    wait_until(lambda: not shipping.behind())
    assert shipping.write("commits/0_3.json", [b"x"]) == 1


def test_a_manifest_does_not_replace_one_that_it_has_not_seen(ship: Any, bucket: Bucket) -> None:
    path = "commits/0_3.json"

    def commit() -> None:
        bucket.write(path, [b"the successor's"])

    shipping = ship(fences=Fences(commit=commit))
    with pytest.raises(StorageError, match="another trainer"):
        shipping.write(path, [b"mine"])
    assert content(bucket, path) == b"the successor's"


def test_a_replaced_trainer_ships_publishes_and_removes_nothing(ship: Any, bucket: Bucket) -> None:
    def fence() -> None:
        raise RunLocked("taken over")

    bucket.write("train/rank_0/f", [b"the successor's"])
    shipping = ship(fences=Fences(ship=fence, commit=fence))
    appender = shipping.appender(SEGMENT)
    appender.append([b"late"])
    wait_until(lambda: shipping._fatal is not None)
    with pytest.raises(RunLocked):
        appender.append([b"later"])
    for act in (
        lambda: shipping.write("commits/0_3.json", [b"x"]),
        lambda: shipping.write("train/rank_0/f", [b"x"]),
        lambda: shipping.remove("train/rank_0/f"),
        lambda: shipping.rewrite("metrics.jsonl", [b""]),
    ):
        with pytest.raises(RunLocked):
            act()
    assert [entry.name for entry in bucket.scan("")] == ["train"]
    assert content(bucket, "train/rank_0/f") == b"the successor's"


def test_the_metrics_go_on_where_they_were_kept(ship: Any, bucket: Bucket) -> None:
    bucket.write("metrics.jsonl", [b"old\nlost\n"])
    shipping = ship()
    appender = shipping.rewrite("metrics.jsonl", [b"old\n"])
    assert content(bucket, "metrics.jsonl") == b"old\n"
    write(appender, b"new\n")
    shipping.settle()
    assert content(bucket, "metrics.jsonl") == b"old\nnew\n"


def test_being_late_is_told_once_and_so_is_catching_up(
    ship: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollforward.store.shipping._LATE_SECONDS", 0.05)
    told: list[str] = []
    shipping, bucket.away = ship(warn=told.append), True
    write(shipping.appender(SEGMENT), b"one")
    wait_until(lambda: bool(told))
    time.sleep(0.1)
    bucket.away = False
    wait_until(lambda: len(told) == 2)
    assert "lacks 1 record of the journal" in told[0]
    assert "lost with this machine" in told[0]
    assert "has everything again" in told[1]


def test_a_service_that_does_not_answer_at_all_is_told_too(
    ship: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollforward.store.shipping._LATE_SECONDS", 0.05)
    told: list[str] = []
    appender = ship(warn=told.append).appender(SEGMENT)
    bucket.open_door.clear()
    write(appender, b"one")
    time.sleep(0.1)
    assert told == []
    write(appender, b"two")
    assert "lacks 2 records of the journal" in told[0]
    bucket.open_door.set()
    wait_until(lambda: len(told) == 2)


def test_an_end_that_leaves_something_behind_says_where_it_is(
    ship: Any, bucket: Bucket, spool: LocalStorage
) -> None:
    shipping, bucket.away = ship(), True
    write(shipping.appender(SEGMENT), b"one")
    with pytest.raises(StorageError, match=r"1 record of the journal.*stays in") as caught:
        shipping.close()
    assert str(spool.root) in str(caught.value)
    assert content(spool) == b"one"


class TestTheNextStart:
    """What is in the spool when a process was killed."""

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def killed(self, ship: Any, bucket: Bucket) -> Shipping:
        """It had shipped the first record, and not the second."""
        shipping: Shipping = ship(retry_seconds=1000)
        appender = shipping.appender(SEGMENT)
        write(appender, b"one")
        shipping.settle()
        bucket.away = True
        write(appender, b"two")
        wait_until(lambda: shipping._tries > 0)
        bucket.away = False
        return shipping

    def bring(self, bucket: Bucket, spool: LocalStorage, said: list[str]) -> LocalStorage:
        aside = LocalStorage(Path(spool.root).parent / "aside")
        bring_up(spool, bucket, aside=aside, say=said.append)
        return aside

    @pytest.mark.usefixtures("killed")
    def test_on_the_same_machine_it_is_shipped(
        self, bucket: Bucket, spool: LocalStorage, said: list[str]
    ) -> None:
        self.bring(bucket, spool, said)
        assert content(bucket) == b"onetwo"
        assert len(said) == 1
        assert "3 bytes" in said[0].replace("3 B", "3 bytes")
        self.bring(bucket, spool, said)
        assert len(said) == 1

    @pytest.mark.usefixtures("killed")
    def test_it_is_put_aside_when_a_start_elsewhere_went_on(
        self, bucket: Bucket, spool: LocalStorage, said: list[str]
    ) -> None:
        bucket.appender("journal/rank_0/2-0_3.journal").append([b"elsewhere"])
        aside = self.bring(bucket, spool, said)
        assert content(bucket) == b"one"
        assert content(aside) == b"onetwo"
        assert "start 2 went on elsewhere" in said[0]

    @pytest.mark.usefixtures("killed")
    def test_what_the_killed_one_still_sends_does_not_count(
        self, bucket: Bucket, spool: LocalStorage, said: list[str]
    ) -> None:
        self.bring(bucket, spool, said)
        # Its append was on the way all the time.
        bucket.create(f"{SEGMENT}+0001-{3:016d}", b"two, and more that nobody has seen")
        assert content(bucket) == b"onetwo"

    def test_nothing_is_said_where_all_was_shipped(
        self, ship: Any, bucket: Bucket, spool: LocalStorage, said: list[str]
    ) -> None:
        shipping = ship()
        write(shipping.appender(SEGMENT), b"one")
        shipping.settle()
        self.bring(bucket, spool, said)
        assert content(bucket) == b"one"
        assert said == []


def wait_until(holds: Callable[[], object]) -> None:
    limit = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.005)
