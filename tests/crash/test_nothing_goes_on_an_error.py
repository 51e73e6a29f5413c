"""Every reading call of a removal fails, with each errno: whatever a removal keeps when all goes well stays.

The run has two starts, checkpoints that share a reference, attachments of two kinds, another trainer's
files, and a journal of two ranks. What is intact and wanted must survive retention at a save, and `prune`
by hand, whichever call is refused, once or for as long as the removal lasts.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from crash_run import ROOT, Tree, open_storage, state
from journal_case import identity
from simulated_disk import SimulatedDisk

from rollforward.errors import CheckpointUnreadable, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, find, list_checkpoints
from rollforward.store.catalog import oldest_position
from rollforward.store.guests import adopt
from rollforward.store.journal.reading import JournalView, read_journal
from rollforward.store.journal.writing import Journal
from rollforward.store.judging import Judge, load_manifest
from rollforward.store.lock import next_incarnation
from rollforward.store.pruning import Pruning, look_at_every_byte, prune
from rollforward.store.retention import Verdict

CODES = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.EACCES]
READING = {"open_read", "pread", "lstat", "scan"}
KEEP = Retention(newest=1, every=4, best=1)


def save(store: CheckpointStore, incarnation: int, step: int) -> None:
    store.save(
        Position(0, step),
        state(1, step),
        global_step=step,
        run_id="run",
        incarnation=incarnation,
        state={"metrics": {"reward": float(step == 3)}},
        attachments={"config.json": b"old" if step < 4 else b"new"},
    )


def write_journal(storage: LocalStorage) -> None:
    for rank in range(2):
        inherited = JournalView()
        for incarnation, steps in ((1, range(6)), (2, range(3, 9))):
            start = Position(0, steps[0])
            journal = Journal(storage, identity(incarnation, rank=rank), start=start, inherited=inherited)
            for step in steps:
                journal.append(Position(0, step), 0, {"a": np.full(3, step)})
                journal.checkpoint_begun()
            journal.close()
            view = read_journal([storage], rank=rank, since=Position(0, 0))
            inherited = view.inherited(Position(0, 3))


def whole_run() -> Tree:
    disk = SimulatedDisk()
    for folder in ("/data", ROOT, f"{ROOT}/critic", f"{ROOT}/critic/rank_0"):
        disk.mkdir(folder)
    storage = open_storage(disk)
    storage.write("critic/rank_0/critic_rank_0-0_1.safetensors", [b"theirs"])
    storage.write("critic/rank_0/meta.json", [b"{}"])
    adopt(storage)
    store = CheckpointStore(storage, retention=Retention(newest=0))
    for step in range(1, 9):
        save(store, 1 if step < 5 else 2, step)
    write_journal(storage)
    storage.write("train/rank_0/policy_model_rank_0-0_9.safetensors", [b"half"])
    return disk.tree()


WHOLE = whole_run()


def by_hand(disk: SimulatedDisk) -> None:
    prune(open_storage(disk), KEEP)


def by_hand_deep(disk: SimulatedDisk) -> None:
    prune(open_storage(disk), KEEP, look_at_every_byte())


def at_a_save(disk: SimulatedDisk) -> None:
    """A new process saves, and its retention and journal removal follow; then it saves once more."""
    storage = open_storage(disk)
    store = CheckpointStore(storage, retention=KEEP)
    for step in (9, 10):
        with contextlib.suppress(StorageError):
            save(store, 3, step)
            journal = Journal(
                storage,
                identity(3 + step),
                start=Position(0, step),
                inherited=read_journal([storage], rank=0, since=Position(0, 0)).inherited(Position(0, step)),
            )
            journal.prune(oldest_position(storage))


REMOVALS = [by_hand, by_hand_deep, at_a_save]


def files(disk: SimulatedDisk) -> Tree:
    return {path: content for path, content in disk.tree().items() if content is not None}


def calls_of(removal: Callable[[SimulatedDisk], None]) -> tuple[list[tuple[str, str]], set[str]]:
    """What it reads when nothing fails, and what of the run it leaves."""
    disk, calls = SimulatedDisk.of(dict(WHOLE)), []
    disk.fail = lambda call, path: calls.append((call, path))
    removal(disk)
    disk.fail = lambda _call, _path: None
    assert all(info.valid for info in list_checkpoints(open_storage(disk), deep=True))
    return calls, files(disk).keys() & WHOLE.keys()


def failing(at: int, code: int, *, lasting: bool) -> Callable[[str, str], None]:
    """The call numbered `at` fails; with `lasting` every later one of its kind on its path does too."""
    count, victim = iter(range(1 << 30)), []

    def fail(call: str, path: str) -> None:
        if next(count) == at:
            victim.append((call, path))
        elif not (lasting and (call, path) in victim):
            return
        raise OSError(code, os.strerror(code), path)

    return fail


def faults(removal: Callable[[SimulatedDisk], None]) -> Iterator[tuple[int, int, bool]]:
    calls, _ = calls_of(removal)
    for number, (call, _) in enumerate(calls):
        if call in READING:
            for code in CODES if number % 3 == 0 else CODES[:1]:
                yield number, code, number % 2 == 0


@pytest.mark.parametrize("removal", REMOVALS)
def test_whatever_cannot_be_read_stays_with_all_that_is_wanted(removal):
    _, wanted = calls_of(removal)
    assert wanted < WHOLE.keys(), "something goes when nothing fails"
    tried = 0
    for number, code, lasting in faults(removal):
        disk = SimulatedDisk.of(dict(WHOLE))
        disk.fail = failing(number, code, lasting=lasting)
        with contextlib.suppress(StorageError):
            removal(disk)
        disk.fail = lambda _call, _path: None
        left = files(disk)
        lost = {path for path in wanted if left.get(path) != WHOLE[path] and not path.endswith("meta.json")}
        assert not lost, (number, errno.errorcode[code], lasting, sorted(lost))
        assert all(info.valid for info in list_checkpoints(open_storage(disk), deep=True))
        tried += 1
    assert tried > 200


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_manifest_that_cannot_be_read_keeps_its_files_and_the_journal_and_is_warned_about(code, step):
    disk = SimulatedDisk.of(dict(WHOLE))

    def fail(call: str, path: str) -> None:
        if call == "open_read" and path == f"{ROOT}/commits/0_{step}.json":
            raise OSError(code, os.strerror(code), path)

    disk.fail = fail
    pruning = Pruning(open_storage(disk), KEEP)
    warnings = [*pruning.warnings, *pruning.carry_out()]
    assert any(f"0_{step}" in line and errno.errorcode[code] in line for line in warnings)
    assert not any(removal.what == "journal" for removal in pruning.removals)
    disk.fail = lambda _call, _path: None
    storage = open_storage(disk)
    assert Judge(storage, deep=True).judge(Position(0, step)).valid
    kept = {path for path in WHOLE if "/journal/" in path and WHOLE[path] is not None}
    assert kept <= files(disk).keys()
    # Once it can be read, the policy has its way.
    assert prune(storage, KEEP) == []
    assert [info.position.step for info in list_checkpoints(storage)] == [8, 4, 3]


@pytest.mark.parametrize("code", CODES)
def test_a_start_passes_over_what_it_cannot_read_and_its_retention_deletes_it_neither_then_nor_later(code):
    disk = SimulatedDisk.of(dict(WHOLE))

    def fail(call: str, path: str) -> None:
        if call == "open_read" and path == f"{ROOT}/commits/0_8.json":
            raise OSError(code, os.strerror(code), path)

    disk.fail = fail
    storage = open_storage(disk)
    found = find(storage)
    assert found.manifest.position == Position(0, 7)
    assert ["could not be read" in item.reason for item in found.rejected] == [True]
    store = CheckpointStore(storage, retention=Retention(newest=1), previous=found.manifest)
    for step in (9, 10, 11):
        save(store, 3, step)
    disk.fail = lambda _call, _path: None
    assert Judge(storage, deep=True).judge(Position(0, 8)).valid
    save(store, 3, 12)
    assert [info.position.step for info in list_checkpoints(storage, deep=True)] == [12]


def test_a_save_never_replaces_what_a_manifest_that_cannot_be_read_may_name():
    disk = SimulatedDisk.of(dict(WHOLE))
    disk.fail = lambda call, path: _refuse(path) if call == "open_read" and "/commits/" in path else None
    storage = open_storage(disk)
    store = CheckpointStore(storage, retention=Retention(newest=0))
    save(store, 3, 1)
    disk.fail = lambda _call, _path: None
    listed = {info.position.step: info for info in list_checkpoints(storage, deep=True)}
    assert all(info.valid for info in listed.values())
    assert listed[1].manifest.incarnation == 3
    assert len(listed) == 8


def _refuse(path: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), path)


def test_where_no_checkpoint_is_valid_prune_removes_nothing():
    tree = {path: content for path, content in WHOLE.items() if "/commits/0_" not in path}
    disk = SimulatedDisk.of(tree)
    before = files(disk)
    pruning = Pruning(open_storage(disk), Retention(newest=1))
    assert pruning.removals == []
    assert "has no valid checkpoint" in pruning.warnings[0]
    assert pruning.carry_out() == []
    assert files(disk) == before


def test_a_segment_of_the_newest_start_that_cannot_be_read_keeps_the_whole_journal_of_its_rank():
    disk = SimulatedDisk.of(dict(WHOLE))
    last = max(path for path in files(disk) if "/journal/rank_0/2-" in path)
    disk.fail = lambda call, path: _refuse(path) if call == "open_read" and path == last else None
    pruning = Pruning(open_storage(disk), Retention(newest=1))
    assert any("the journal of rank 0 stays as it is" in line for line in pruning.warnings)
    gone = {removal.name for removal in pruning.removals if removal.what == "journal"}
    assert gone, "rank 1 is of no checkpoint"
    assert not any("rank_0" in name for name in gone)


def test_a_start_does_not_guess_its_number_from_manifests_that_it_cannot_read():
    disk = SimulatedDisk.of(dict(WHOLE))
    disk.fail = lambda call, path: _refuse(path) if call == "open_read" and "0_8.json" in path else None
    with pytest.raises(StorageError, match="EIO"):
        next_incarnation(open_storage(disk), None)


@pytest.mark.parametrize("code", CODES)
def test_an_error_is_never_a_proof(code):
    disk = SimulatedDisk.of(dict(WHOLE))
    storage = open_storage(disk)
    calls: list[tuple[str, str]] = []
    disk.fail = lambda call, path: calls.append((call, path))
    Judge(storage, deep=True).judge(Position(0, 8))
    for number, (call, _) in enumerate(calls):
        if call in READING:
            disk.fail = failing(number, code, lasting=True)
            info = Judge(storage, deep=True).judge(Position(0, 8))
            assert info.verdict in (Verdict.UNKNOWN, Verdict.VALID), (number, call, info.reason)
            assert info.valid or errno.errorcode[code] in info.reason
    disk.fail = lambda call, _path: _refuse(_path) if call == "open_read" else None
    with pytest.raises(CheckpointUnreadable, match="could not be read"):
        load_manifest(storage, Position(0, 8))
