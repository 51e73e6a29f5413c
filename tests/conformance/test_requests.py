"""In a bucket, what looks at every file of a run lists them, and does not ask for each."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
from held import Holding
from lockstep import LockStep
from simulated_bucket import SimulatedBucket, instead_of_obstore

from rollforward.inspection.verifying import Checkpoints
from rollforward.position import Position
from rollforward.storage.objects import RANGE_BYTES, ObjectStorage
from rollforward.store import CheckpointStore, Retention, find, list_checkpoints, restore_into
from rollforward.store.journal.reading import JournalView, check_segments, read_journals
from rollforward.store.journal.records import Identity
from rollforward.store.journal.writing import Journal
from rollforward.store.pruning import Pruning
from rollforward.store.restoring import verify as deep

CHECKPOINTS = 4
ROLES = 3
START = Position(0, 0)


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_obstore(monkeypatch)


def storage_of(bucket: SimulatedBucket) -> ObjectStorage:
    return ObjectStorage(bucket, "s3://bucket/run")  # type: ignore[arg-type]


def saved(ranks: int) -> SimulatedBucket:
    """Checkpoints of so many ranks."""
    bucket = SimulatedBucket()

    def body(rank: int, exchange: Callable[[object], list[object]]) -> None:
        store = CheckpointStore(
            storage_of(bucket),
            rank=rank,
            world_size=ranks,
            exchange=exchange,
            retention=Retention(newest=CHECKPOINTS),
            remote=True,
        )
        for step in range(1, CHECKPOINTS + 1):
            tensors = {
                role: {f"t{number}": np.full(50, step + number, np.float32) for number in range(ranks)}
                for role in ("policy_model", "optimizer", "ref")
            }
            store.save(
                Position(0, step),
                Holding(tensors, rank, {}),
                global_step=step,
                run_id="run",
                incarnation=1,
                state={},
                attachments={"config.json": b"{}"},
            )

    assert LockStep(ranks).run(body) == [None] * ranks
    bucket.asked.clear()
    return bucket


def asked(bucket: SimulatedBucket, look: Callable[[ObjectStorage], object]) -> Counter[str]:
    """How many requests of each kind it takes."""
    bucket.asked.clear()
    look(storage_of(bucket))
    return Counter(what for what, _ in bucket.asked)


def verify(storage: ObjectStorage) -> None:
    looking = Checkpoints(storage, deep=False)
    assert [found.reason for found in looking.verdicts()] == [""] * CHECKPOINTS
    assert looking.other_files() == []


def plan_pruning(storage: ObjectStorage) -> None:
    assert len(Pruning(storage, Retention(newest=1)).removals) == CHECKPOINTS - 1


@pytest.mark.parametrize("look", [verify, plan_pruning, list_checkpoints])
def test_the_number_of_requests_does_not_grow_with_the_number_of_files(look) -> None:
    few, many = asked(saved(2), look), asked(saved(8), look)
    assert few == many
    assert sum(many.values()) < 40, many
    assert sum(many.values()) < CHECKPOINTS * (ROLES + 1) * 8, "the files there are"


def test_pruning_asks_for_what_it_removes_and_for_little_else() -> None:
    bucket = saved(8)
    there = len(bucket.objects)

    def prune(storage: ObjectStorage) -> None:
        assert Pruning(storage, Retention(newest=1)).carry_out() == []

    found = asked(bucket, prune)
    removed = there - len(bucket.objects)
    assert removed == (CHECKPOINTS - 1) * ((ROLES + 1) * 8 + 1)
    assert found["delete"] == removed


def test_a_large_tensor_is_read_and_verified_in_large_ranges() -> None:
    bucket, weights = SimulatedBucket(), np.arange(5 << 20, dtype=np.float32)
    store = CheckpointStore(storage_of(bucket), remote=True)
    tensors = {"policy_model": {"w": weights}}
    store.save(Position(0, 1), tensors, global_step=1, run_id="run", incarnation=1, state={})
    found = np.zeros_like(weights)

    def read_it(storage: ObjectStorage) -> None:
        restore_into(storage, find(storage).manifest, {"policy_model": {"w": found}})

    ranges = weights.nbytes / RANGE_BYTES
    few = 20
    assert ranges <= asked(bucket, read_it)["get"] < ranges + few
    assert found.tobytes() == weights.tobytes()
    assert (
        ranges <= asked(bucket, lambda storage: deep(storage, find(storage).manifest))["get"] < ranges + few
    )


STEPS = 50
CHUNKS = 4


def start_of(incarnation: int) -> Identity:
    return Identity(
        rank=0,
        world_size=1,
        run_id="run",
        fingerprint="f",
        incarnation=incarnation,
        versions={},
        device="CPU",
    )


def journaled(records: int) -> SimulatedBucket:
    """A journal of some steps, as it is shipped: an object for each so many records."""
    bucket = SimulatedBucket()
    spool = SimulatedBucket()
    with closing(Journal(storage_of(spool), start_of(1), start=START, inherited=JournalView())) as journal:
        for step in range(STEPS):
            for chunk in range(CHUNKS):
                journal.append(Position(0, step), chunk, {"tokens": np.full(5000, step, np.int32)})
            journal.record(Position(0, step), 0, {"loss": np.full((), step, np.float32)})
    (path,) = {key.partition("+")[0] for key in spool.objects}
    shipped = storage_of(bucket).appender(path)
    pieces = [spool.objects[key] for key in sorted(spool.objects)]
    for begin in range(0, len(pieces), records):
        shipped.append(pieces[begin : begin + records])
    return bucket


def check(storage: ObjectStorage) -> None:
    assert check_segments(storage, 0).problems == ()


def replay(storage: ObjectStorage) -> None:
    """As a start does it: what there is, and then each record, the outcome of a step first."""
    view = read_journals([storage], since=START)
    journal = Journal(storage, start_of(2), start=START, inherited=view.inherited(Position(0, STEPS)))
    for step in range(STEPS):
        outcome = journal.find_outcome(Position(0, step), 0)
        chunks = [journal.find_rollouts(Position(0, step), chunk) for chunk in range(CHUNKS)]
        assert None not in [outcome, *chunks]
    journal.close()


@pytest.mark.parametrize(("look", "times"), [(check, 1), (replay, 2)])
def test_a_journal_is_read_in_few_requests(look: Callable[[ObjectStorage], object], times: int) -> None:
    """One at least for each object; where many records are in one, few for all of them."""
    each, together = journaled(1), journaled(STEPS * CHUNKS)
    objects, few = len(each.objects), 60
    assert objects > STEPS * CHUNKS
    assert asked(each, look)["get"] < times * objects + few
    assert asked(together, look)["get"] < few


def test_a_checkpoint_that_is_saved_during_a_look_is_not_taken_for_damaged() -> None:
    bucket = saved(2)
    storage = storage_of(bucket)
    looking = Checkpoints(storage, deep=False)
    verdicts = looking.verdicts()
    assert next(verdicts).reason == ""
    # The listing has been made: what comes now is not in it.
    newest = {key: content for key, content in bucket.objects.items() if "0_3" in key}
    for key in newest:
        del bucket.objects[key]
    looking = Checkpoints(storage, deep=False)
    verdicts = looking.verdicts()
    next(verdicts)
    bucket.objects.update(newest)
    assert [found.reason for found in verdicts] == [""] * (CHECKPOINTS - 2)
    assert looking._judge.judge(Position(0, 3)).valid  # type: ignore[union-attr]


def test_a_file_that_is_missing_is_told_all_the_same() -> None:
    bucket = saved(2)
    lost = next(key for key in bucket.objects if key.startswith("train/rank_1/") and "0_2" in key)
    del bucket.objects[lost]
    reasons = [found.reason for found in Checkpoints(storage_of(bucket), deep=False).verdicts()]
    assert [reason for reason in reasons if reason] == [f"checkpoint 0_2: {lost} is missing"]
