"""What every storage promises, for each there is here; and what only a file system can get wrong.

`scripts/test-objects` holds real object stores against the same suite.
"""

import os
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from simulated_disk import SimulatedDisk
from storage_case import StorageCase

from rollforward.errors import StorageError
from rollforward.storage import LocalStorage, OsFiles, Storage, read_small
from rollforward.storage.objects import ObjectStorage


class TestLocal(StorageCase):
    @pytest.fixture
    def storage(self, tmp_path) -> Storage:
        return LocalStorage(tmp_path / "run", OsFiles())


class TestSimulated(StorageCase):
    @pytest.fixture
    def storage(self) -> Storage:
        return LocalStorage("/data/run", SimulatedDisk())


class TestBucketInMemory(StorageCase):
    @pytest.fixture
    def storage(self) -> Storage:
        return ObjectStorage(MemoryStore(), "memory://run")


@pytest.fixture(params=["local", "simulated"])
def storage(request, tmp_path) -> Storage:
    """A file system, for the tests of what only these have."""
    if request.param == "local":
        return LocalStorage(tmp_path / "run", OsFiles())
    return LocalStorage("/data/run", SimulatedDisk())


def link(storage: LocalStorage, path: str, target: str) -> None:
    if isinstance(storage._ops, SimulatedDisk):
        storage._ops.symlink(f"{storage.root}/{path}", target)
    else:
        Path(storage.root, path).symlink_to(target)


def test_a_symbolic_link_is_never_read_through(storage):
    storage.write("real/f", [b"secret"])
    link(storage, "real/file_link", f"{storage.root}/real/f")
    link(storage, "folder_link", f"{storage.root}/real")
    assert storage.stat("folder_link").kind == "link"
    for path in ("real/file_link", "folder_link/f"):
        with pytest.raises(StorageError):
            storage.open(path)


def test_a_symbolic_link_is_never_written_through(storage):
    storage.write("real/f", [b"kept"])
    link(storage, "folder_link", f"{storage.root}/real")
    with pytest.raises(StorageError):
        storage.write("folder_link/f", [b"changed"])
    assert read_small(storage, "real/f", limit=7) == b"kept"


def test_nothing_is_removed_through_a_symbolic_link(storage):
    storage.write("real/f", [b"kept"])
    link(storage, "folder_link", f"{storage.root}/real")
    with pytest.raises(StorageError, match="symbolic link"):
        storage.remove("folder_link/f")
    assert storage.stat("real/f")


def test_a_file_in_the_place_of_a_folder_is_named(storage):
    storage.write("train", [b""])
    with pytest.raises(StorageError, match="a file is in the way"):
        storage.write("train/rank_0/f", [b""])


def test_a_named_pipe_does_not_hang_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        LocalStorage(tmp_path).open("pipe")


def test_the_durable_write_makes_its_calls_in_the_promised_order():
    disk = SimulatedDisk()
    LocalStorage("/run", disk).write("train/f", [b"one", b"two"])
    kinds = [(op.kind, op.path.rpartition("/")[2] if op.kind != "fsync" else "") for op in disk.log]
    temporary = next(name for kind, name in kinds if kind == "create")
    assert kinds == [
        ("mkdir", "run"),
        ("fsync_folder", ""),
        ("mkdir", "train"),
        ("fsync_folder", "run"),
        ("create", temporary),
        ("write", temporary),
        ("write", temporary),
        ("fsync", ""),
        ("rename", temporary),
        ("fsync_folder", "train"),
    ]


def test_a_failed_fsync_is_not_tried_again():
    disk = SimulatedDisk()
    calls = []

    def fail(call, path):
        if call == "fsync":
            calls.append(path)
            raise OSError(5, "Input/output error")

    disk.fail = fail
    with pytest.raises(StorageError, match="syncing"):
        LocalStorage("/run", disk).write("f", [b"data"])
    assert len(calls) == 1
    assert [path for path, content in disk.tree().items() if content is not None] == []


def test_short_writes_are_continued():
    disk = SimulatedDisk()
    disk.short_write = 3
    storage = LocalStorage("/run", disk)
    storage.write("f", [b"0123456789"])
    assert read_small(storage, "f", limit=10) == b"0123456789"


def test_what_another_process_appended_and_did_not_sync_can_be_made_durable(storage):
    """As when its writer was killed: the file is there, and its bytes are the system's to lose."""
    appender = storage.appender("journal/a")
    appender.append([b"synced, "])
    appender.write([b"not synced"])
    storage.sync_file("journal/a")
    assert read_small(storage, "journal/a", limit=100) == b"synced, not synced"
    if isinstance(storage._ops, SimulatedDisk):
        *_, last = storage._ops.log
        assert (last.kind, last.path) == ("fsync", "/data/run/journal/a")
    with pytest.raises(StorageError, match="missing"):
        storage.sync_file("journal/missing")
