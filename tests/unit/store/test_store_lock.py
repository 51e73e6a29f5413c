import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollforward.errors import RunLocked, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, filelock
from rollforward.store import CheckpointStore, RunLock, list_checkpoints
from rollforward.store.lock import check_free, read_owner

HOLDER = """
import sys, time
from rollforward.store import RunLock
print(RunLock.acquire(sys.argv[1]).incarnation, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_trainer_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(RunLocked, match=rf"held by process {holder.pid} on .*incarnation 1"):
        RunLock.acquire(tmp_path)


def test_a_second_trainer_is_told_before_it_takes_anything(tmp_path, holder):
    if f" {holder.pid} " not in Path("/proc/locks").read_text():
        pytest.skip("this machine does not tell which locks are held")
    before = (tmp_path / "run.lock").read_bytes()
    with pytest.raises(RunLocked, match=rf"held by process {holder.pid} on .*incarnation 1"):
        check_free(tmp_path)
    assert (tmp_path / "run.lock").read_bytes() == before
    holder.kill()
    holder.wait()
    check_free(tmp_path)
    check_free(tmp_path / "missing")


def test_a_paused_owner_keeps_it(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(RunLocked):
        RunLock.acquire(tmp_path)


def test_a_killed_owner_is_taken_over_with_the_next_number(tmp_path, holder):
    holder.kill()
    holder.wait()
    with RunLock.acquire(tmp_path) as lock:
        assert lock.incarnation == 2
        assert lock.taken_over.pid == holder.pid
    with RunLock.acquire(tmp_path) as lock:
        assert (lock.incarnation, lock.taken_over) == (3, None)


def test_the_number_is_greater_than_any_that_was_seen(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(Position(0, 1), {"ref": {"a": np.ones(1)}}, global_step=1, run_id="r", incarnation=6, state={})
    with RunLock.acquire(tmp_path) as lock:
        assert lock.incarnation == 7
    (tmp_path / "journal" / "rank_3").mkdir(parents=True)
    (tmp_path / "journal" / "rank_3" / "11-0_40.journal").touch()
    with RunLock.acquire(tmp_path) as lock:
        assert lock.incarnation == 12


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"garbage", b'{"incarnation": -1}', b"[" * 400])
def test_a_torn_record_does_not_stop_anyone(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with RunLock.acquire(tmp_path) as lock:
        assert lock.incarnation == 1


def test_the_record_fits_one_sector_and_is_json(tmp_path):
    with RunLock.acquire(tmp_path) as lock:
        assert (tmp_path / "run.lock").stat().st_size == 512
        assert read_owner(LocalStorage(tmp_path)) == lock.owner
        assert lock.owner.pid == os.getpid()
    assert read_owner(LocalStorage(tmp_path)).held is False


def test_a_writer_whose_lock_was_taken_over_cannot_commit(tmp_path):
    """Where flock does not reach other machines, the number in the file is what keeps it out."""
    lock = RunLock.acquire(tmp_path)
    store = CheckpointStore(tmp_path, fence=lock.check)
    arrays = {"ref": {"a": np.ones(1)}}
    store.save(Position(0, 1), arrays, global_step=1, run_id="r", incarnation=1, state={})
    (tmp_path / "run.lock").unlink()
    other = RunLock.acquire(tmp_path)
    with pytest.raises(RunLocked, match="must not commit any more"):
        store.save(Position(0, 2), arrays, global_step=2, run_id="r", incarnation=1, state={})
    assert [item.position.step for item in list_checkpoints(LocalStorage(tmp_path))] == [1]
    lock.release()
    assert read_owner(LocalStorage(tmp_path)) == other.owner
    other.release()


def test_a_file_that_is_no_lock_is_refused_before_anything_is_done(tmp_path):
    """Not after the training up to the first checkpoint, as "taken over by someone unknown"."""
    (tmp_path / "run.lock").write_bytes(b"x" * 513)
    with pytest.raises(StorageError, match=r"run\.lock has 513 bytes"):
        RunLock.acquire(tmp_path)
    assert (tmp_path / "run.lock").read_bytes() == b"x" * 513


@pytest.mark.parametrize("place", ["lock", "segment", "source"])
def test_a_number_that_nothing_can_follow_is_refused_before_anything_is_done(tmp_path, place):
    after = 0
    if place == "lock":
        record = {"incarnation": 10**18 - 1, "host": "a", "pid": 1, "since": "", "held": False}
        (tmp_path / "run.lock").write_text(json.dumps(record))
    elif place == "segment":
        (tmp_path / "journal/rank_0").mkdir(parents=True)
        (tmp_path / "journal/rank_0/999999999999999999-0_0.journal").touch()
    else:
        after = 10**18 - 1
    with pytest.raises(StorageError, match="start 999999999999999999 of the run, and no number follows"):
        RunLock.acquire(tmp_path, after=after)


def test_a_name_of_a_host_that_is_not_ascii_fits_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "\N{SNOWMAN}" * 64)
    with RunLock.acquire(tmp_path) as lock:
        lock.check()


@pytest.mark.usefixtures("holder")
@pytest.mark.parametrize("seen", [True, False])
def test_an_owner_in_another_container_is_not_said_to_have_ended(tmp_path, monkeypatch, seen):
    """Its number means nothing here, and the system tells nothing of its lock."""
    owner = json.loads((tmp_path / "run.lock").read_bytes())
    (tmp_path / "run.lock").write_text(json.dumps(owner | {"pid": 2**22 + 1}).ljust(511) + "\n")
    status = (tmp_path / "run.lock").stat()
    locks = tmp_path / "locks"
    line = f"1: FLOCK ADVISORY WRITE {2**22 + 1} {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    locks.write_text(f"{line}:{status.st_ino} 0 EOF\n" if seen else "")
    monkeypatch.setattr(filelock, "_LOCKS", locks)
    with pytest.raises(RunLocked) as caught:
        RunLock.acquire(tmp_path)
    assert ("has ended" in caught.value.hint) == seen
    assert ("another container" in caught.value.hint) != seen
