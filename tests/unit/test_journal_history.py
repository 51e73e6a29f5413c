"""What people are told of a run's journal is what happened, and looking changes nothing."""

import json

import pytest
from journal_case import assert_same_chunk, chunk, open_log, outcome, run_step
from lockstep import LockStep
from simulated_disk import SimulatedDisk

from rollforward.errors import NothingToResume
from rollforward.inspection.steps import read_step
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store.journal.history import Extent, extent, history
from rollforward.store.journal.reading import journal_ranks, list_segments

START = Position(0, 0)


def step(number: int) -> Position:
    return Position(0, number)


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def storage(disk: SimulatedDisk) -> LocalStorage:
    return LocalStorage("/run", disk)


def some_history(storage: LocalStorage) -> None:
    """Start 1 does four steps and is killed, 2 goes on, 3 goes back to step 3 with other settings."""
    log, _ = open_log(storage, 1, START)
    for number in range(4):
        run_step(log, step(number))
        log.journal.checkpoint_begun()
    log.append(step(4), 0, chunk(40))
    log, _ = open_log(storage, 2, step(4), (1, step(4)))
    log.journal.note(step(4), "looked at", {"by": "someone"})
    run_step(log, step(4))
    run_step(log, step(5))
    log, _ = open_log(storage, 3, step(3), (1, step(3)), fingerprint="other")
    run_step(log, step(3), seed=73)


def test_each_start_is_told_with_its_reach_and_what_became_of_it(storage: LocalStorage) -> None:
    some_history(storage)
    first, second, third = history(storage, 0)
    assert (first.incarnation, first.chunks, first.updates, first.first, first.last) == (
        1,
        9,
        4,
        START,
        step(4),
    )
    assert (second.chunks, second.updates, second.first, second.last) == (3, 2, step(4), step(5))
    assert [record.metadata["event"] for record in second.events] == ["resumed", "looked at"]
    assert json.loads(second.events[0].metadata["detail"])["replay_until"] == "0_4"
    assert (first.abandoned_from, second.abandoned_from, third.abandoned_from) == (step(3), step(3), None)
    assert third.header is not None
    assert (third.header.start, third.header.identity.fingerprint) == (step(3), "other")
    assert first.last_time > first.header.created if first.header else False
    assert not [problem for start in (first, second, third) for problem in start.problems]


def test_looking_changes_nothing_and_tells_of_damage(storage: LocalStorage, disk: SimulatedDisk) -> None:
    some_history(storage)
    path = "/run/journal/rank_0/2-0_4.journal"
    content = disk.tree()[path] or b""
    disk.unlink(path)
    fd = disk.create(path)
    disk.write(fd, memoryview(content[:-1]))
    disk.close(fd)
    before = disk.tree()
    _, second, _ = history(storage, 0)
    assert second.updates == 1
    assert "cut off at byte" in second.problems[0]
    read_step(storage, step(3))
    assert disk.tree() == before


def test_a_step_is_shown_as_the_newest_history_has_it(storage: LocalStorage) -> None:
    some_history(storage)
    found = read_step(storage, step(3))
    assert [(item.rank, item.chunk) for item in found.chunks] == [(0, 0), (0, 1)]
    assert_same_chunk(found.chunks[1].rollouts, chunk(731))
    assert found.outcomes[0].loss == outcome(73).loss
    assert found.chunks[0].identity.incarnation == 3


def test_a_step_of_all_ranks_is_shown(storage: LocalStorage, disk: SimulatedDisk) -> None:
    def work(rank: int, exchange: object) -> None:
        log, _ = open_log(LocalStorage("/run", disk), 1, START, rank=rank, world_size=2, all_gather=exchange)  # type: ignore[arg-type]
        run_step(log, START, chunks=[rank])

    LockStep(2).run(work)
    assert journal_ranks(storage) == [0, 1]
    assert [(item.rank, item.chunk) for item in read_step(storage, START).chunks] == [(0, 0), (1, 1)]


def test_a_chunk_that_a_start_with_fewer_ranks_made_again_is_shown_once(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    test_a_step_of_all_ranks_is_shown(storage, disk)
    (segment,) = list_segments(storage, 1)
    content = bytearray(disk.tree()[f"/run/{segment.name.path}"] or b"")
    content[-800] ^= 1
    storage.write(segment.name.path, [content])
    log, report = open_log(storage, 2, START, (1, START))
    assert report.until == START
    run_step(log, START)
    found = read_step(storage, START)
    shown = [(item.rank, item.chunk, item.identity.incarnation) for item in found.chunks]
    assert shown == [(0, 0, 1), (0, 1, 2)]
    assert found.problems


def test_a_step_that_is_not_there_says_what_is(storage: LocalStorage) -> None:
    with pytest.raises(NothingToResume, match="there is no journal"):
        read_step(storage, step(9))
    some_history(storage)
    with pytest.raises(NothingToResume) as raised:
        read_step(storage, step(9))
    assert "no record of step 0_9" in raised.value.message
    assert "rank 0, start 2: steps 0_4 to 0_5" in raised.value.message


def test_the_extent_is_what_is_on_disk(storage: LocalStorage, disk: SimulatedDisk) -> None:
    assert extent(storage) == Extent(0, 0, None)
    some_history(storage)
    content = [data for path, data in disk.tree().items() if path.endswith(".journal")]
    found = extent(storage)
    assert (found.segments, found.reaches_back_to) == (len(content), START)
    assert found.size == sum(len(data or b"") for data in content)
