"""Every call of a save fails once, and from some call on for good: the checkpoint before always stands."""

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from crash_run import ROOT, open_storage, save
from simulated_disk import SimulatedDisk

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, find, list_checkpoints

CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES]
CHANGING = {"create", "write", "fsync", "rename", "mkdir", "unlink", "fsync_folder", "close"}
STEPS = (1, 2, 3, 4)


class Faults:
    """Counts calls; the one numbered `at` fails, or with `lasting` all changes from it on do."""

    def __init__(self, at: int | None, code: int = errno.EIO, *, lasting: bool = False) -> None:
        self.calls: list[str] = []
        self._at = at
        self._code = code
        self._lasting = lasting

    def __call__(self, call: str, path: str) -> None:
        number = len(self.calls)
        self.calls.append(call)
        if self._at is None:
            return
        # A full disk still lets go of files.
        lasting = self._lasting and number > self._at and call in CHANGING - {"unlink", "close"}
        if number == self._at or lasting:
            raise OSError(self._code, os.strerror(self._code), path)


def new_store(disk: SimulatedDisk) -> CheckpointStore:
    return CheckpointStore(open_storage(disk), retention=Retention(newest=2))


def files(disk: SimulatedDisk) -> set[str]:
    return {path for path, content in disk.tree().items() if content is not None}


def all_calls() -> list[str]:
    disk = SimulatedDisk()
    disk.mkdir("/data")
    disk.fail = faults = Faults(None)
    store = new_store(disk)
    for step in STEPS:
        save(store, 1, step)
    return faults.calls


CALLS = all_calls()


def train_through(disk: SimulatedDisk, faults: Faults) -> None:
    """Save at every step, going on after failures as a trainer does, and check after each."""
    disk.mkdir("/data")
    disk.fail = faults
    store = new_store(disk)
    reported = None
    for step in STEPS:
        before = files(disk)
        failed = None
        try:
            save(store, 1, step)
            reported = Position(0, step)
        except StorageError as error:
            failed = error
        disk.fail = Faults(None)
        listed = list_checkpoints(open_storage(disk), deep=True)
        assert all(item.valid for item in listed), [item.reason for item in listed]
        if reported is not None:
            assert find(open_storage(disk)).manifest.position >= reported
        if failed is not None:
            assert failed.hint
            assert f"0_{step} was not saved" in failed.message
            assert isinstance(failed.__cause__, StorageError)
        if failed and not any(item.position == Position(0, step) for item in listed):
            left = {path for path in files(disk) - before if "/model" not in path}
            assert all(path.endswith(".tmp") for path in left), left
        disk.fail = faults


def go_on(disk: SimulatedDisk) -> None:
    """The disk is mended: the next save succeeds and clears up whatever was left."""
    disk.fail = Faults(None)
    store = new_store(disk)
    save(store, 2, 8)
    save(store, 2, 9)
    assert [item.position.step for item in list_checkpoints(open_storage(disk), deep=True)] == [9, 8]
    assert not [path for path in files(disk) if path.endswith(".tmp")]
    names = [path for path in files(disk) if "critic_rank_0-" in path]
    assert sorted(path[-len("0_8.safetensors") :] for path in names) == ["0_8.safetensors", "0_9.safetensors"]


@pytest.mark.parametrize("kind", sorted(set(CALLS)))
def test_a_call_that_fails_once_costs_at_most_its_own_checkpoint(kind):
    numbers = [number for number, call in enumerate(CALLS) if call == kind]
    for turn, number in enumerate(numbers):
        disk = SimulatedDisk()
        train_through(disk, Faults(number, CODES[turn % len(CODES)]))
        go_on(disk)


def test_a_disk_that_fails_for_good_leaves_the_last_checkpoint():
    for number in range(0, len(CALLS), 7):
        disk = SimulatedDisk()
        train_through(disk, Faults(number, CODES[number % len(CODES)], lasting=True))
        go_on(disk)


@pytest.mark.parametrize("size", [1, 7, 511])
def test_short_writes_lose_nothing(size):
    disk = SimulatedDisk()
    disk.mkdir("/data")
    disk.short_write = size
    save(new_store(disk), 1, 1)
    assert [item.valid for item in list_checkpoints(open_storage(disk), deep=True)] == [True]


@pytest.mark.parametrize("kind", ["open_read", "pread", "lstat", "scan"])
def test_reading_with_failures_never_raises_what_is_not_ours(kind):
    disk = SimulatedDisk()
    disk.mkdir("/data")
    store = new_store(disk)
    for step in STEPS:
        save(store, 1, step)
    disk.fail = counter = Faults(None)
    list_checkpoints(open_storage(disk), deep=True)
    for number in [number for number, call in enumerate(counter.calls) if call == kind]:
        disk.fail = Faults(number)
        with contextlib.suppress(StorageError):
            listed = list_checkpoints(open_storage(disk), deep=True)
            assert all(item.valid or "EIO" in item.reason for item in listed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small file system with")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let us mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_fills_up_keeps_the_checkpoint_before(small_disk: Path):
    store = CheckpointStore(small_disk / "run", retention=Retention(newest=1))

    def at(step: int, size: int) -> None:
        arrays = {"policy_model": {"a": np.full(size, step, np.float32)}}
        store.save(Position(0, step), arrays, global_step=step, run_id="r", incarnation=1, state={})

    at(1, 20_000)
    with pytest.raises(StorageError, match="ENOSPC") as caught:
        at(2, 60_000)
    assert "disk is full" in caught.value.hint
    storage = LocalStorage(small_disk / "run")
    assert [(item.position.step, item.valid) for item in list_checkpoints(storage, deep=True)] == [(1, True)]
    left = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file())
    assert left < 100_000
    at(3, 20_000)
    assert [(item.position.step, item.valid) for item in list_checkpoints(storage, deep=True)] == [(3, True)]


def test_the_faults_are_everywhere():
    assert set(CALLS) >= CHANGING
    assert len(CALLS) > 150
    assert ROOT.startswith("/")
