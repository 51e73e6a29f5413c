"""An append is durable when it returns, and after one that failed there is no other."""

import errno
from pathlib import Path

import pytest
from simulated_disk import SimulatedDisk

from rollforward.errors import StorageError
from rollforward.storage import LocalStorage


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def storage(disk: SimulatedDisk) -> LocalStorage:
    return LocalStorage("/run", disk)


def kinds(disk: SimulatedDisk) -> list[str]:
    return [op.kind for op in disk.log]


def test_bytes_come_back_from_a_real_disk(tmp_path: Path) -> None:
    appender = LocalStorage(tmp_path).appender("journal/rank_0/a")
    appender.append([b"one", bytearray(b"two")])
    assert (tmp_path / "journal/rank_0/a").read_bytes() == b"onetwo"
    appender.append([memoryview(b"three")])
    appender.close()
    assert appender.size == 11
    assert (tmp_path / "journal/rank_0/a").read_bytes() == b"onetwothree"


def test_file_name_and_folders_are_durable_when_the_first_append_returns(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    appender = storage.appender("journal/rank_0/a")
    disk.log.clear()
    appender.append([b"x"])
    assert kinds(disk) == ["write", "fsync", "fsync_folder"]
    appender.append([b"y"])
    assert kinds(disk)[3:] == ["write", "fsync"], "the name is durable already"


def test_a_disk_that_takes_little_at_a_time_gets_everything(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    appender = storage.appender("a")
    disk.short_write = 3
    appender.append([b"0123456789"])
    assert disk.tree()["/run/a"] == b"0123456789"
    assert kinds(disk).count("fsync") == 1


def test_a_name_that_is_taken_is_refused(storage: LocalStorage) -> None:
    storage.write("a", [b"older"])
    with pytest.raises(StorageError, match=r"creating /run/a: File exists"):
        storage.appender("a")


@pytest.mark.parametrize("path", ["../a", "/a", "a/../b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(storage: LocalStorage, path: str) -> None:
    with pytest.raises(StorageError, match="leaves /run"):
        storage.appender(path)


def test_a_link_in_the_way_is_refused(storage: LocalStorage, disk: SimulatedDisk) -> None:
    disk.mkdir("/run")
    disk.mkdir("/elsewhere")
    disk.symlink("/run/journal", "/elsewhere")
    with pytest.raises(StorageError, match="a link is in the way"):
        storage.appender("journal/a")


@pytest.mark.parametrize("call", ["write", "fsync", "fsync_folder"])
def test_a_failed_append_is_the_last_and_its_fsync_is_not_tried_again(
    storage: LocalStorage, disk: SimulatedDisk, call: str
) -> None:
    appender = storage.appender("a")

    def fail(made: str, _: str) -> None:
        if made == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    disk.fail = fail
    with pytest.raises(StorageError, match="No space left on device") as raised:
        appender.append([b"x"])
    assert "the disk is full" in (raised.value.hint or "")
    disk.fail = lambda _call, _path: None
    disk.log.clear()
    with pytest.raises(StorageError, match="an earlier append failed"):
        appender.append([b"x"])
    assert not disk.log
    assert appender.size == 0


def test_an_interrupted_append_is_the_last(storage: LocalStorage, disk: SimulatedDisk) -> None:
    """Ctrl-C may come between write and fsync."""
    appender = storage.appender("a")

    def interrupt(made: str, _: str) -> None:
        if made == "fsync":
            raise KeyboardInterrupt

    disk.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        appender.append([b"x"])
    disk.fail = lambda _call, _path: None
    with pytest.raises(StorageError, match="an earlier append failed"):
        appender.append([b"x"])


def test_closing_twice_is_allowed_and_appending_then_is_not(storage: LocalStorage) -> None:
    appender = storage.appender("a")
    appender.append([b"x"])
    appender.close()
    appender.close()
    with pytest.raises(StorageError, match="was closed"):
        appender.append([b"y"])


def test_a_file_that_is_rewritten_is_replaced_durably_and_grows(
    storage: LocalStorage, disk: SimulatedDisk
) -> None:
    storage.write("a", [b"a longer first text"])
    disk.log.clear()
    appender = storage.rewrite("a", [b"one", b"two"])
    assert kinds(disk) == ["create", "write", "write", "fsync", "rename", "fsync_folder"]
    assert (appender.size, disk.tree()["/run/a"]) == (6, b"onetwo")
    disk.log.clear()
    appender.append([b"three"])
    assert kinds(disk) == ["write", "fsync"], "the name is durable already"
    appender.close()
    assert (appender.size, disk.tree()["/run/a"]) == (11, b"onetwothree")


def test_a_file_is_rewritten_on_a_real_disk(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "run")
    storage.rewrite("a", []).close()
    older = storage.rewrite("a", [b"1"])
    newer = storage.rewrite("a", [b"2"])
    older.append([b" of a writer that was replaced"])
    newer.append([b"3"])
    assert [entry.name for entry in storage.scan("")] == ["a"]
    assert (tmp_path / "run/a").read_bytes() == b"23"
    older.close()
    newer.close()


@pytest.mark.parametrize("call", ["create", "write", "fsync", "rename", "fsync_folder"])
def test_a_rewrite_that_fails_leaves_the_older_file_and_nothing_open(
    storage: LocalStorage, disk: SimulatedDisk, call: str
) -> None:
    storage.write("a", [b"older"])

    def fail(made: str, _: str) -> None:
        if made == call:
            raise OSError(errno.EIO, "Input/output error")

    disk.fail = fail
    with pytest.raises(StorageError, match="Input/output error"):
        storage.rewrite("a", [b"newer"])
    disk.fail = lambda _call, _path: None
    assert disk.tree()["/run/a"] == (b"newer" if call == "fsync_folder" else b"older")
    assert [entry.name for entry in storage.scan("")] == ["a"]
    assert not disk._open
