import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollforward.errors import RunLocked
from rollforward.position import Position
from rollforward.storage import LocalStorage
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
