"""What was journaled is found again; what was abandoned or is damaged is left out, and damage is reported."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journal_case import assert_same_chunk, chunk, identity, open_log, outcome, run_step
from lockstep import LockStep
from safetensors.numpy import load
from simulated_disk import SimulatedDisk

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.replay.rollout_log import LogSettings
from rollforward.storage import LocalStorage
from rollforward.store.journal.history import history, index_steps
from rollforward.store.journal.reading import JournalView, list_segments, read_journal
from rollforward.store.journal.segments import read_record
from rollforward.store.journal.writing import Journal
from rollforward.store.layout import SegmentName

ROOT = "/run"
START = Position(0, 0)


def step(number: int) -> Position:
    return Position(0, number)


@pytest.fixture
def disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.mkdir(ROOT)
    return disk


@pytest.fixture
def storage(disk: SimulatedDisk) -> LocalStorage:
    return LocalStorage(ROOT, disk)


def steps_found(view: JournalView) -> set[tuple[int, int]]:
    return {(position.step, number) for position, number in view.rollouts}


def segments(storage: LocalStorage) -> list[str]:
    return [segment.name.path.rpartition("/")[2] for segment in list_segments(storage, 0)]


def damage(disk: SimulatedDisk, name: str, at: int, length: int = 1) -> None:
    path = f"{ROOT}/journal/rank_0/{name}"
    content = bytearray(disk.tree()[path] or b"")
    at = at if at >= 0 else len(content) + at
    for offset in range(at, at + length):
        content[offset] ^= 0xFF
    replace(disk, path, bytes(content))


def replace(disk: SimulatedDisk, path: str, content: bytes) -> None:
    disk.unlink(path)
    fd = disk.create(path)
    disk.write(fd, memoryview(content))
    disk.close(fd)


def test_a_resumed_run_finds_whole_steps_and_the_finished_chunks_of_the_unfinished_one(
    storage: LocalStorage,
) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(4):
        run_step(log, step(number))
    log.append(step(4), 0, chunk(40))

    log, report = open_log(storage, 2, step(2), (1, step(2)))
    assert (report.until, report.replayed_steps, report.reused_chunks) == (step(4), 2, 1)
    assert log.find(step(1), 0) is None, "before the checkpoint"
    for number in (2, 3):
        assert_same_chunk(log.find(step(number), 1), chunk(10 * number + 1))
    assert_same_chunk(log.find(step(4), 0), chunk(40))
    assert log.find(step(4), 1) is None


def test_replaying_writes_nothing_and_going_on_writes_to_a_new_segment(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(3):
        run_step(log, step(number))
    log, _ = open_log(storage, 2, START, (1, START))
    before = log.journal.bytes_written
    for number in range(3):
        run_step(log, step(number))
    assert log.journal.bytes_written == before
    assert log.replayed_updates == 3
    run_step(log, step(3))
    assert segments(storage) == ["1-0_0.journal", "2-0_0.journal"]


def test_a_future_that_was_abandoned_is_never_found_again(storage: LocalStorage) -> None:
    """Start 2 has another configuration: nothing from step 2 on is its own, now or later."""
    log, _ = open_log(storage, 1, START)
    for number in range(6):
        run_step(log, step(number))
    log, report = open_log(storage, 2, step(2), (1, step(2)), fingerprint="other")
    assert not report.compatible
    assert report.replayed_steps == 0
    assert log.find(step(3), 0) is None
    run_step(log, step(2), seed=72)
    run_step(log, step(3), seed=73)

    log, report = open_log(storage, 3, step(2), (1, step(2)), fingerprint="other")
    assert report.until == step(4)
    assert_same_chunk(log.find(step(3), 0), chunk(730))
    assert log.find(step(4), 0) is None


def test_chunks_of_one_step_come_from_all_the_starts_that_worked_on_it(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.append(START, 0, chunk(1))
    log, report = open_log(storage, 2, START, (1, START))
    assert report.reused_chunks == 1
    log.append(START, 1, chunk(2))
    log, report = open_log(storage, 3, START, (1, START))
    assert report.until == step(1)
    assert_same_chunk(log.find(START, 0), chunk(1))
    assert_same_chunk(log.find(START, 1), chunk(2))


def test_a_torn_end_is_copied_aside_and_cut_and_the_rest_is_used(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    log, _ = open_log(storage, 1, START)
    run_step(log, START)
    whole = disk.tree()[f"{ROOT}/journal/rank_0/1-0_0.journal"]
    log.append(step(1), 0, chunk(10))
    longer = disk.tree()[f"{ROOT}/journal/rank_0/1-0_0.journal"]
    assert whole is not None
    assert longer is not None
    replace(disk, f"{ROOT}/journal/rank_0/1-0_0.journal", longer[:-3])

    _, report = open_log(storage, 2, START, (1, START))
    assert report.until == step(1)
    assert not report.problems
    assert "moved to journal/rank_0/1-0_0.journal.torn" in report.repaired[0]
    tree = disk.tree()
    assert tree[f"{ROOT}/journal/rank_0/1-0_0.journal"] == whole
    assert tree[f"{ROOT}/journal/rank_0/1-0_0.journal.torn"] == longer[len(whole) : -3]
    _, report = open_log(storage, 3, START, (2, START))
    assert report.until == step(1)
    assert not report.repaired


def test_a_segment_whose_first_frame_was_torn_is_put_aside(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    log, _ = open_log(storage, 1, START)
    run_step(log, START)
    open_log(storage, 2, START, (1, START))
    content = disk.tree()[f"{ROOT}/journal/rank_0/2-0_0.journal"]
    assert content is not None
    replace(disk, f"{ROOT}/journal/rank_0/2-0_0.journal", content[:100])
    _, report = open_log(storage, 3, START, (1, START))
    assert report.until == step(1)
    assert not report.problems
    assert segments(storage) == ["1-0_0.journal", "3-0_0.journal"]
    assert disk.tree()[f"{ROOT}/journal/rank_0/2-0_0.journal.torn"] == content[:100]


def test_damage_in_the_middle_is_reported_and_nothing_behind_it_is_replayed(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(4):
        run_step(log, step(number))
    place = read_journal([storage], rank=0, since=START).rollouts[step(1), 1]
    damage(disk, "1-0_0.journal", place.offset + 60)
    before = disk.tree()

    log, report = open_log(storage, 2, START, (1, START))
    assert report.until == step(1)
    assert report.reused_chunks == 1
    assert len(report.problems) == 1
    assert f"damaged at byte {place.offset}" in report.problems[0]
    assert log.find(step(2), 0) is None
    assert before.items() <= disk.tree().items(), "damage is evidence: it stays as it is"


def test_damage_before_the_checkpoint_does_not_cost_what_comes_after_it(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(4):
        run_step(log, step(number))
        log.journal.checkpoint_begun()
    damage(disk, "1-0_1.journal", 200)
    _, report = open_log(storage, 2, step(2), (1, step(2)))
    assert report.until == step(4)
    assert not report.problems


def test_a_torn_end_with_a_later_segment_behind_it_is_damage(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    """A segment is begun only when every frame of the one before it is durable."""
    log, _ = open_log(storage, 1, START)
    run_step(log, START)
    log.journal.checkpoint_begun()
    run_step(log, step(1))
    damage(disk, "1-0_0.journal", -1)
    _, report = open_log(storage, 2, START, (1, START))
    assert "damaged at byte" in report.problems[0]
    assert "frames 3 to 3 before it are missing" in report.problems[1]
    assert not report.repaired


def test_a_missing_segment_is_noticed(storage: LocalStorage, disk: SimulatedDisk) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(3):
        run_step(log, step(number))
        log.journal.checkpoint_begun()
    disk.unlink(f"{ROOT}/journal/rank_0/1-0_1.journal")
    _, report = open_log(storage, 2, START, (1, START))
    assert report.until == step(1)
    assert "1-0_2.journal: frames 4 to 7 before it are missing" in report.problems[0]


@pytest.mark.parametrize("other", ["journal/rank_1/1-0_0.journal", "journal/rank_0/2-0_0.journal"])
def test_exchanged_files_are_not_believed(storage: LocalStorage, disk: SimulatedDisk, other: str) -> None:
    log, _ = open_log(storage, 1, START)
    run_step(log, START)
    content = disk.tree()[f"{ROOT}/journal/rank_0/1-0_0.journal"]
    assert content is not None
    if "rank_1" in other:
        disk.mkdir(f"{ROOT}/journal/rank_1")
    disk.close(disk.create(f"{ROOT}/{other}"))
    replace(disk, f"{ROOT}/{other}", content)
    rank = int("rank_1" in other)
    view = read_journal([storage], rank=rank, since=START)
    assert any("files were exchanged or renamed" in problem for problem in view.problems)
    assert steps_found(view) == (set() if rank else {(0, 0), (0, 1)})


def test_segments_of_another_run_are_passed_over(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START, run_id="another")
    run_step(log, START)
    log, report = open_log(storage, 2, START, None)
    assert report.until == START
    run_step(log, START, seed=5)
    log, report = open_log(storage, 3, START, (2, START))
    assert_same_chunk(log.find(START, 0), chunk(50))


def test_what_is_before_the_oldest_checkpoint_is_removed_and_nothing_else(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(4):
        run_step(log, step(number))
        log.journal.checkpoint_begun()
    log, _ = open_log(storage, 2, step(3), (1, step(3)))
    run_step(log, step(3))
    run_step(log, step(4))
    assert log.journal.prune(step(2)) == ["journal/rank_0/1-0_0.journal", "journal/rank_0/1-0_1.journal"]
    assert log.journal.prune(step(2)) == []
    _, report = open_log(storage, 3, step(2), (1, step(2)))
    assert report.until == step(5)
    assert not report.problems, "what is missing was removed on purpose"


def test_folders_of_ranks_without_a_worker_are_pruned_like_the_others(storage: LocalStorage) -> None:
    """Three ranks did two steps; the one that goes on needs what they did until its checkpoints are later."""

    settings = LogSettings(chunks_per_step=3, steps_per_epoch=10)

    def three(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        about = {"rank": rank, "world_size": 3, "all_gather": exchange, "settings": settings}
        log, _ = open_log(storage, 1, START, **about)
        for number in range(2):
            run_step(log, step(number), chunks=[rank])
            log.journal.checkpoint_begun()

    LockStep(3).run(three)
    log, report = open_log(storage, 2, START, (1, START), settings=settings)
    assert report.until == step(2)
    log.journal.checkpoint_begun()
    assert log.journal.prune(START) == []
    assert log.journal.prune(step(1)) == [f"journal/rank_{rank}/1-0_0.journal" for rank in range(3)]
    assert [chunk for chunk in range(3) if log.find(step(1), chunk) is None] == []
    later = SegmentName(2, 9, START).path
    storage.write(later, [b"of a start that has replaced this one"])
    run_step(log, step(2), chunks=range(3))
    log.journal.checkpoint_begun()
    run_step(log, step(3), chunks=range(3))
    assert set(log.journal.prune(step(3))) >= {f"journal/rank_{rank}/1-0_1.journal" for rank in range(3)}
    assert [segment.name.path for segment in list_segments(storage, 2)] == [later]


def test_pruning_on_another_thread_takes_no_record_that_is_still_needed(tmp_path: Path) -> None:
    """As the trainer does it: one thread appends and begins segments, the other removes old ones."""
    storage = LocalStorage(tmp_path)
    journal = Journal(storage, identity(1), start=START, inherited=JournalView(), segment_bytes=1)
    steps, keep = 120, 5
    done, removed, pruned = [0], [], threading.Event()

    def prune() -> None:
        while done[0] < steps:
            removed.extend(journal.prune(step(max(0, done[0] - keep))))
            pruned.set()

    thread = threading.Thread(target=prune)
    thread.start()
    for number in range(steps):
        if number % 10 == 9:
            # However the threads take turns, one does not get far ahead of the other.
            pruned.clear()
            assert pruned.wait(300)
        journal.append(step(number), 0, {}, {})
        done[0] = number + 1
    thread.join()
    journal.close()
    view = read_journal([storage], rank=0, since=step(steps - keep))
    assert {position.step for position, _ in view.rollouts} >= set(range(steps - keep, steps))
    assert not view.problems
    assert len(removed) > steps // 2, "it did prune meanwhile"


def test_a_segment_that_is_full_ends_with_its_step(storage: LocalStorage) -> None:
    journal = Journal(storage, identity(1), start=START, inherited=JournalView(), segment_bytes=1)
    for number in range(3):
        for part in range(2):
            journal.append(step(number), part, {}, {})
    assert segments(storage) == ["1-0_0.journal", "1-0_1.journal", "1-0_2.journal"]
    assert steps_found(read_journal([storage], rank=0, since=START)) == {
        (n, c) for n in range(3) for c in (0, 1)
    }


def test_a_checkpoint_begun_before_the_first_record_begins_no_empty_segment(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.journal.checkpoint_begun()
    run_step(log, START)
    assert segments(storage) == ["1-0_0.journal"]


def test_resuming_into_a_new_folder_leaves_the_old_one_and_needs_it_no_more(disk: SimulatedDisk) -> None:
    disk.mkdir("/new")
    old, new = LocalStorage(ROOT, disk), LocalStorage("/new", disk)
    log, _ = open_log(old, 1, START)
    for number in range(4):
        run_step(log, step(number))
    log.append(step(4), 0, chunk(40))
    fd_path = f"{ROOT}/journal/rank_0/1-0_0.journal"
    torn = (disk.tree()[fd_path] or b"") + b"torn"
    replace(disk, fd_path, torn)
    before = {path: content for path, content in disk.tree().items() if path.startswith(ROOT)}

    log, report = open_log(new, 2, step(2), (1, step(2)), sources=(old, new))
    assert (report.replayed_steps, report.reused_chunks) == (2, 1)
    for number in range(2, 6):
        run_step(log, step(number))
    assert {path: content for path, content in disk.tree().items() if path.startswith(ROOT)} == before

    _, report = open_log(new, 3, step(2), (2, step(2)))
    assert report.replayed_steps == 4


@pytest.mark.parametrize(("branch", "replayed"), [(2, 0), (3, 1), (4, 2), (5, 3), (9, 3)])
def test_a_branch_replays_up_to_its_beginning_and_takes_nothing_beyond(
    storage: LocalStorage, branch: int, replayed: int
) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(5):
        run_step(log, step(number))
    log.append(step(5), 0, chunk(50))
    log, report = open_log(storage, 2, step(2), (1, step(2)), inherit_before=step(branch))
    assert report.replayed_steps == replayed
    assert report.reused_chunks == int(branch == 9)
    assert (log.find(step(4), 0) is not None) == (branch > 4)
    last = min(branch, 5)
    for number in range(2, last + 1):
        run_step(log, step(number))
    _, report = open_log(storage, 3, step(2), (1, step(2)))
    assert report.replayed_steps == last - 1, "the abandoned part stays abandoned"


def test_a_start_that_only_looked_leaves_the_next_one_everything(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(5):
        run_step(log, step(number))
    _, slip = open_log(storage, 2, step(2), (1, step(2)), fingerprint="slip")
    assert (slip.compatible, slip.replayed_steps) == (False, 0)
    _, report = open_log(storage, 3, step(2), (1, step(2)))
    assert (report.replayed_steps, report.lost_steps, report.passed_over) == (3, 0, ())


def test_a_start_with_another_configuration_leaves_the_next_one_what_it_can_use(
    storage: LocalStorage,
) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(5):
        run_step(log, step(number))
    other, _ = open_log(storage, 2, step(2), (1, step(2)), fingerprint="other")
    run_step(other, step(2))
    _, report = open_log(storage, 3, step(2), (1, step(2)))
    assert (report.replayed_steps, report.lost_steps, report.passed_over) == (3, 0, (2,))
    _, report = open_log(storage, 4, step(2), (1, step(2)), fingerprint="other")
    assert (report.replayed_steps, report.passed_over) == (1, ()), "start 3 did nothing"


def test_reading_a_stretch_reads_that_stretch_only(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(6):
        run_step(log, step(number))
        log.journal.checkpoint_begun()
    view = read_journal([storage], rank=0, since=step(2), before=step(4))
    assert {number for number, _ in steps_found(view)} == {2, 3}
    assert [name.first.step for name in view.headers] == [2, 3]


def test_a_segment_that_is_replaced_while_steps_are_looked_up_costs_one_step_and_not_those_behind_it(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = open_log(storage, 1, START)
    for number in range(3):
        run_step(log, step(number))
    starts = history(storage, 0)
    opened: list[str] = []
    plain = LocalStorage.open

    class Gone:
        """What the file is to whoever opened it before it was replaced."""

        size, chunk_bytes = 1 << 20, 1 << 18

        def read_into(self, *_: object) -> None:
            raise StorageError("it was replaced")

        def close(self) -> None:
            opened.append("closed")

    def open_once_too_early(self: LocalStorage, path: str) -> object:
        opened.append(path)
        return plain(self, path) if len(opened) > 1 else Gone()

    monkeypatch.setattr(LocalStorage, "open", open_once_too_early)
    view = index_steps(starts, [step(number) for number in range(3)])
    assert opened[1] == "closed"
    assert len(view.problems) == 1
    assert steps_found(view) == {(1, 0), (1, 1), (2, 0), (2, 1)}


def test_a_record_lifted_out_of_the_journal_opens_with_the_safetensors_library(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.append(START, 0, chunk(3))
    place = read_journal([storage], rank=0, since=START).rollouts[START, 0]
    with storage.open(place.segment.name.path) as handle:
        front = bytearray(40)
        handle.read_into(memoryview(front), place.offset)
        payload = bytearray(int.from_bytes(front[8:16], "little"))
        handle.read_into(memoryview(payload), place.offset + 40)
    arrays = load(bytes(payload))
    assert arrays["rewards"].tobytes() == chunk(3).rewards.tobytes()
    assert read_record(place).metadata["chunk"] == "0"


def test_ids_take_two_bytes_and_padding_none(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    rollouts = chunk(3, prompts=16, generations=8, width=64, length=256)
    before = log.journal.bytes_written
    log.append(START, 0, rollouts)
    tokens = int(rollouts.tokens.completion_mask.sum())
    assert (log.journal.bytes_written - before) / tokens < 6.5


def test_events_are_kept_for_the_history(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.journal.note(START, "resumed", {"checkpoint": "0_0"})
    view = read_journal([storage], rank=0, since=START)
    record = read_record(view.events[0])
    assert (record.kind, record.metadata["event"], record.metadata["detail"]) == (
        "event",
        "resumed",
        '{"checkpoint":"0_0"}',
    )


def test_after_a_failed_write_nothing_is_written_any_more(storage: LocalStorage, disk: SimulatedDisk) -> None:
    """A part of the frame may be on the disk: going on behind it would bury it."""
    log, _ = open_log(storage, 1, START)

    def fail(call: str, _: str) -> None:
        if call == "fsync":
            raise OSError(5, "Input/output error")

    disk.fail = fail
    with pytest.raises(StorageError, match="syncing"):
        log.append(START, 0, chunk(1))
    disk.fail = lambda _call, _path: None
    with pytest.raises(StorageError, match="earlier append failed"):
        log.append(START, 0, chunk(1))


def test_positions_only_grow_and_incarnations_too(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 5, step(2))
    log.append(step(3), 0, chunk(1))
    with pytest.raises(ValueError, match="after one of 0_3"):
        log.append(step(2), 0, chunk(1))
    with pytest.raises(ValueError, match="does not follow 5"):
        open_log(storage, 5, step(2))


def test_a_closed_journal_takes_nothing(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.journal.close()
    log.journal.close()
    with pytest.raises(StorageError, match="was closed"):
        log.record(START, 0, outcome(1), 1e-3)


def test_the_index_holds_places_and_no_rollouts(storage: LocalStorage, disk: SimulatedDisk) -> None:
    """A chunk is read when it is asked for: one that spoils in between is generated again, and said so."""
    log, _ = open_log(storage, 1, START)
    run_step(log, START)
    said: list[str] = []
    log, _ = open_log(storage, 2, START, (1, START), notice=said.append)
    damage(disk, "1-0_0.journal", log.journal.inherited.rollouts[START, 1].offset + 100)
    assert_same_chunk(log.find(START, 0), chunk(0))
    assert log.find(START, 1) is None
    assert "chunk 1 is generated again" in said[0]
