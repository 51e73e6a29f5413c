"""The simulated bucket passes the suite of all storages; and files that grow there, whatever goes wrong."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from simulated_bucket import FATES, Fate, SimulatedBucket, instead_of_obstore
from simulated_disk import Killed
from storage_case import StorageCase, all_bytes

from rollforward.errors import StorageError
from rollforward.storage import Storage
from rollforward.storage.objects import ObjectStorage
from rollforward.store.layout import is_temporary

JOURNAL = "journal/rank_0/1-0_0.journal"


def storage_of(bucket: SimulatedBucket) -> ObjectStorage:
    return ObjectStorage(bucket, "s3://bucket/run")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_obstore(monkeypatch)


class TestSimulatedBucket(StorageCase):
    @pytest.fixture
    def storage(self) -> Storage:
        return storage_of(SimulatedBucket())


def grown() -> SimulatedBucket:
    """A bucket with a file that was rewritten once, and has three parts."""
    bucket = SimulatedBucket()
    storage = storage_of(bucket)
    storage.appender(JOURNAL).append([b"older"])
    newer = storage.rewrite(JOURNAL, [b"one"])
    newer.append([b"two"])
    newer.append([b"three"])
    # As if the process had died before it could remove what was replaced.
    storage.create(f"{JOURNAL}+0001-0000000000000000", b"older")
    storage.create(f"{JOURNAL}+0001-0000000000000005", b"and more")
    return bucket


def interrupted(do: Callable[[Storage], object]) -> Iterator[SimulatedBucket]:
    """What is left of it after a kill between any two requests, and after each fate of each request."""
    undisturbed = grown()
    before = len(undisturbed.asked)
    do(storage_of(undisturbed))
    for number in range(before + 1, len(undisturbed.asked) + 1):
        for fate in ("killed", *FATES):
            bucket = grown()
            bucket.delay = lambda: 1 << 30  # until it is told to land
            if fate == "killed":
                bucket.kill_after = number - 1
            else:
                bucket.fate = lambda what, _, at=number, found=fate, bucket=bucket: (
                    ("fails" if what in ("head", "get", "list") else found)
                    if len(bucket.asked) == at
                    else "done"
                )
            try:
                do(storage_of(bucket))
            except (Killed, StorageError):
                yield bucket
            else:
                assert fate == "twice"


def content(bucket: SimulatedBucket) -> bytes | None:
    bucket.kill_after, bucket.fate = None, lambda _what, _key: "done"
    storage = storage_of(bucket)
    return None if storage.stat(JOURNAL) is None else all_bytes(storage, JOURNAL)


def test_a_file_that_grew_is_there_or_gone_wherever_its_removal_dies() -> None:
    seen = set()
    for bucket in interrupted(lambda storage: storage.remove(JOURNAL)):
        for _ in range(2):
            seen.add(content(bucket))
            bucket.land()
        listed = [entry.name for entry in storage_of(bucket).scan("journal/rank_0")]
        if content(bucket) is None:
            assert all(is_temporary(name) for name in listed)
    assert seen == {b"onetwothree", None}


def test_what_is_left_of_a_removed_file_is_removed_like_a_temporary_file() -> None:
    for bucket in interrupted(lambda storage: storage.remove(JOURNAL)):
        bucket.land()
        if content(bucket) is None:
            storage = storage_of(bucket)
            for entry in storage.scan("journal/rank_0"):
                storage.remove(f"journal/rank_0/{entry.name}")
            assert bucket.objects == {}


def test_what_is_left_of_a_removed_file_never_becomes_part_of_a_new_one() -> None:
    for bucket in interrupted(lambda storage: storage.remove(JOURNAL)):
        bucket.land()
        if content(bucket) is None:
            storage = storage_of(bucket)
            again = storage.appender(JOURNAL)
            again.append([b"new"])
            # Who has listed what was left before, and only now removes it, takes nothing of the new file.
            storage.remove("journal/rank_0/.1-0_0.journal.00000000.tmp")
            again.append([b"er"])
            assert content(bucket) == b"newer"


def test_a_file_that_is_rewritten_has_its_old_content_or_the_new_wherever_that_dies() -> None:
    seen = set()
    for bucket in interrupted(lambda storage: storage.rewrite(JOURNAL, [b"replaced"])):
        for _ in range(2):
            seen.add(content(bucket))
            bucket.land()
    assert seen == {b"onetwothree", b"replaced"}


def test_who_rewrites_again_after_an_error_goes_on_where_that_ended() -> None:
    for bucket in interrupted(lambda storage: storage.rewrite(JOURNAL, [b"replaced"])):
        content(bucket)
        storage_of(bucket).rewrite(JOURNAL, [b"again"]).append([b" and on"])
        assert content(bucket) == b"again and on"
        bucket.land()
        assert content(bucket) == b"again and on"


PATIENT: Any = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=300),
    "backoff": {"init_backoff": timedelta(0), "max_backoff": timedelta(0), "base": 2},
}


@pytest.mark.parametrize("fates", list(product(["fails", "lost", "late"], ["fails", "lost", "late", "done"])))
def test_a_conditional_put_that_breaks_off_is_repeated_and_done_once(fates: tuple[Fate, Fate]) -> None:
    bucket = SimulatedBucket()
    storage = ObjectStorage(bucket, "s3://bucket/run", PATIENT)  # type: ignore[arg-type]
    first = storage.put_if("f", b"1", None)

    def troubled(request: Callable[[], object]) -> object:
        left = list(fates)
        bucket.fate = lambda what, _: left.pop(0) if what == "put" and left else "done"
        return request()

    second = troubled(lambda: storage.put_if("f", b"2", first))
    assert storage.read_tagged("f") == (b"2", second)
    bucket.land()  # what was late is refused
    assert storage.read_tagged("f") == (b"2", second)
    growing = storage.appender(JOURNAL)
    troubled(lambda: growing.append([b"one"]))
    troubled(lambda: growing.append([b"two"]))
    bucket.land()
    assert all_bytes(storage, JOURNAL) == b"onetwo"


def test_a_conditional_put_that_breaks_off_for_ever_is_given_up() -> None:
    bucket = SimulatedBucket()
    storage = ObjectStorage(bucket, "s3://bucket/run", PATIENT)  # type: ignore[arg-type]
    bucket.fate = lambda _what, _key: "fails"
    with pytest.raises(StorageError, match="error sending request"):
        storage.put_if("f", b"1", None)
    assert [what for what, _ in bucket.asked] == ["put"] * 3


def test_listings_that_lag_show_what_was_there_before() -> None:
    bucket = SimulatedBucket()
    storage = storage_of(bucket)
    storage.write("a", [b"1"])
    storage.write("b", [b"2"])
    bucket.lag = 1
    assert [entry.name for entry in storage.scan("")] == ["a"]
    assert all_bytes(storage, "b") == b"2"
