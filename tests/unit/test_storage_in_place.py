"""What is written in place reaches no other file, and no pipe makes anybody wait."""

import os
from pathlib import Path

import pytest

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.processes import heartbeat
from rollforward.storage.inplace import open_in_place
from rollforward.store import RunLock

PRECIOUS = b"precious\n" * 100


def put(kind: str, name: Path) -> Path:
    """Something else in the place of a file; returns the file that must stay as it is."""
    name.parent.mkdir(parents=True, exist_ok=True)
    precious = name.parents[1] / "precious"
    precious.write_bytes(PRECIOUS)
    if kind == "link":
        name.symlink_to(precious)
    elif kind == "hard link":
        os.link(precious, name)
    elif kind == "pipe":
        os.mkfifo(name)
    else:
        name.mkdir()
    return precious


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_what_is_not_a_file_of_its_own_is_not_opened(tmp_path: Path, kind: str) -> None:
    name = tmp_path / "run/run.lock"
    precious = put(kind, name)
    with pytest.raises(StorageError) as caught:
        open_in_place(str(tmp_path / "run"), "run.lock")
    assert str(name) in caught.value.message
    assert {"link": "a symbolic link", "pipe": "a named pipe"}.get(kind, f"a {kind}") in caught.value.message
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_lock_is_not_written_through_a_link(tmp_path: Path, kind: str) -> None:
    precious = put(kind, tmp_path / "run/run.lock")
    with pytest.raises(StorageError, match=r"run\.lock"):
        RunLock.acquire(tmp_path / "run")
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_a_heartbeat_takes_its_name_back(tmp_path: Path, kind: str) -> None:
    name = heartbeat.file_of(tmp_path / "run", 0)
    precious = put(kind, name)
    if kind == "pipe":
        assert heartbeat.read(tmp_path / "run", 0) is None, "and nobody waits"
    beat = heartbeat.Heartbeat(tmp_path / "run", rank=0, incarnation=1, start=Position(0, 3))
    beat.close()
    pulse = heartbeat.read(tmp_path / "run", 0)
    assert pulse is not None
    assert pulse.position == "0_3"
    assert name.is_file()
    assert not name.is_symlink()
    assert precious.read_bytes() == PRECIOUS


def test_a_folder_that_is_a_link_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/heartbeat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="heartbeat: it is a symbolic link"):
        heartbeat.Heartbeat(tmp_path / "run", rank=0, incarnation=1, start=Position(0, 0))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_run_itself_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with RunLock.acquire(tmp_path / "run") as lock:
        assert lock.incarnation == 1
    heartbeat.Heartbeat(tmp_path / "run", rank=0, incarnation=1, start=Position(0, 0)).close()
    assert (tmp_path / "disk/heartbeat/rank_0.json").is_file()


@pytest.mark.parametrize(
    "content",
    [b"[" * 300, b'{"phase": "a"}', b'{"phase":1,"position":"0_0","incarnation":1,"pid":1,"time":1.0}'],
)
def test_a_heartbeat_from_somebody_else_is_none(tmp_path: Path, content: bytes) -> None:
    name = heartbeat.file_of(tmp_path, 0)
    name.parent.mkdir()
    name.write_bytes(content)
    assert heartbeat.read(tmp_path, 0) is None
