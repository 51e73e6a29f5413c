"""Checkpoints written while the next step generates, from arrays that then change."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from lockstep import LockStep

from rollforward.errors import EngineError, RunLocked, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, OsFiles
from rollforward.store import CheckpointStore, ShadowCheckpoints, find, list_checkpoints, read_tensors
from rollforward.store.saved import About
from rollforward.store.tensorfile import CHUNK_BYTES

ABOUT = {"run_id": "r", "incarnation": 1, "state": {"n": 1}}


class Gate(OsFiles):
    """A real disk that can be held up, or fail, at writing into some folder."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.broken = False

    def write(self, fd, data):
        self.reached.set()
        assert self.open.wait(300)
        if self.broken:
            raise OSError(28, "No space left on device")
        return super().write(fd, data)


class Engine:
    """Three tensors that every update changes in place."""

    def __init__(self, size=1000):
        self.arrays = {
            "policy_model": {"w": np.zeros(size, np.float32), "v": np.zeros((3, size), np.float32)},
            "optimizer": {"m": np.zeros(size, np.float64)},
            "ref": {"w": np.zeros(size, np.float32)},
        }

    def update(self):
        for role in ("policy_model", "optimizer"):
            for array in self.arrays[role].values():
                array += 1


class Told:
    def __init__(self):
        self.saved, self.failed, self.warned = [], [], []


def shadow(root, engine, *, ops=None, told=None, store=None, **options):
    told = told or Told()
    store = store or CheckpointStore(LocalStorage(root, ops))
    checkpoints = ShadowCheckpoints(
        store,
        lambda: engine.arrays,
        About(**ABOUT),
        saved=told.saved.append,
        failed=told.failed.append,
        warned=told.warned.append,
        **options,
    )
    return checkpoints, told


def step(checkpoints, engine):
    checkpoints.before_update()
    engine.update()
    checkpoints.boundary()


def assert_holds(root, position, value):
    storage = LocalStorage(root)
    listed = {item.position: item for item in list_checkpoints(storage, deep=True)}
    assert listed[position].valid, listed[position].reason
    for role, name, array in read_tensors(storage, listed[position].manifest):
        assert (array == (0 if role == "ref" else value)).all(), (role, name)


def test_nothing_is_visible_before_the_boundary_and_it_is_told_when_it_is_durable(tmp_path):
    engine = Engine()
    checkpoints, told = shadow(tmp_path, engine)
    checkpoints.begin(Position(0, 1), 1)
    checkpoints._job.idle.wait(300)
    assert list_checkpoints(LocalStorage(tmp_path)) == []
    step(checkpoints, engine)
    checkpoints._job.idle.wait(300)
    assert find(LocalStorage(tmp_path)).manifest.position == Position(0, 1)
    assert told.saved == []
    step(checkpoints, engine)
    assert [saved.manifest.position for saved in told.saved] == [Position(0, 1)]
    assert checkpoints.copied_bytes == 0
    assert_holds(tmp_path, Position(0, 1), 0)
    checkpoints.close()
    assert (tmp_path / "train/rank_0/meta.json").exists()


def test_a_slow_disk_costs_a_copy_and_saves_the_state_of_the_beginning(tmp_path):
    engine, gate = Engine(size=CHUNK_BYTES // 2), Gate()
    checkpoints, told = shadow(tmp_path, engine, ops=gate)
    gate.open.clear()
    checkpoints.begin(Position(0, 1), 1)
    assert gate.reached.wait(300)
    # The header is held up, before any tensor is read: everything is copied aside.
    checkpoints.before_update()
    engine.update()
    total = sum(array.nbytes for named in engine.arrays.values() for array in named.values())
    assert checkpoints.copied_bytes == total
    checkpoints.boundary()
    assert told.saved == []
    gate.open.set()
    for _ in range(3):
        step(checkpoints, engine)
    checkpoints.close()
    assert [saved.manifest.position for saved in told.saved] == [Position(0, 1)]
    assert_holds(tmp_path, Position(0, 1), 0)


def test_an_update_in_the_middle_of_a_tensor_does_not_tear_it(tmp_path):
    engine, gate = Engine(size=CHUNK_BYTES), Gate()
    checkpoints, _ = shadow(tmp_path, engine, ops=gate)

    chunks, caught_up = [], threading.Event()
    real, copying = gate.write, checkpoints._guard.copying

    def slow(fd, data):
        chunks.append(data.nbytes)
        if len(chunks) == 3:
            gate.reached.set()
            # The writer goes on when the caller has begun to copy what is left.
            assert caught_up.wait(300)
        threading.Event().wait(0.005)
        return real(fd, data)

    @contextmanager
    def copying_and_telling():
        with copying():
            caught_up.set()
            yield

    gate.write = slow
    checkpoints._guard.copying = copying_and_telling
    gate.reached.clear()
    checkpoints.begin(Position(0, 1), 1)
    assert gate.reached.wait(300)
    step(checkpoints, engine)
    step(checkpoints, engine)
    checkpoints.close()
    assert checkpoints.copied_bytes > 0
    assert_holds(tmp_path, Position(0, 1), 0)


def test_every_step_saved_is_the_state_of_its_step(tmp_path):
    engine = Engine()
    checkpoints, told = shadow(tmp_path, engine)
    for number in range(6):
        checkpoints.begin(Position(0, number), number)
        step(checkpoints, engine)
    checkpoints.close()
    assert [saved.manifest.position.step for saved in told.saved] == list(range(6))
    for number in range(2, 6):
        assert_holds(tmp_path, Position(0, number), number)
    assert told.failed == []
    assert told.warned == []


def test_a_failure_in_the_background_is_told_at_the_boundary_and_training_goes_on(tmp_path):
    engine, gate = Engine(), Gate()
    checkpoints, told = shadow(tmp_path, engine, ops=gate)
    checkpoints.begin(Position(0, 1), 1)
    step(checkpoints, engine)
    checkpoints._settle()
    gate.broken = True
    checkpoints.begin(Position(0, 2), 2)
    checkpoints._job.idle.wait(300)
    assert told.failed == []
    step(checkpoints, engine)
    assert "0_2 was not saved" in told.failed[0].message
    assert find(LocalStorage(tmp_path)).manifest.position == Position(0, 1)
    gate.broken = False
    checkpoints.begin(Position(0, 3), 3)
    checkpoints.close()
    assert find(LocalStorage(tmp_path)).manifest.position == Position(0, 3)


class Full(OsFiles):
    """A real disk that is full after so many writes."""

    def __init__(self, writes):
        self.left = writes

    def write(self, fd, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return super().write(fd, data)


@pytest.mark.parametrize("writes", range(10))
def test_a_disk_that_fills_up_in_the_middle_of_a_file_holds_nobody_up(tmp_path, writes):
    engine, full = Engine(size=CHUNK_BYTES // 2), Full(1000)
    checkpoints, told = shadow(tmp_path, engine, ops=full)
    checkpoints.begin(Position(0, 1), 1)
    step(checkpoints, engine)
    checkpoints._settle()
    full.left = writes
    checkpoints.begin(Position(0, 2), 2)
    assert checkpoints._job.idle.wait(300)
    full.left = 1000
    step(checkpoints, engine)
    assert "0_2 was not saved" in told.failed[0].message
    assert find(LocalStorage(tmp_path)).manifest.position == Position(0, 1)
    checkpoints.begin(Position(0, 3), 3)
    checkpoints.close()
    assert_holds(tmp_path, Position(0, 3), 2)


def test_a_state_that_was_never_saved_is_an_error_at_the_end(tmp_path):
    engine, gate = Engine(), Gate()
    checkpoints, told = shadow(tmp_path, engine, ops=gate)
    gate.broken = True
    checkpoints.begin(Position(0, 1), 1)
    with pytest.raises(StorageError, match=r"0_1 was not saved.*; none was saved before it"):
        checkpoints.close()
    assert len(told.failed) == 1


def test_the_error_at_the_end_says_which_checkpoint_stands(tmp_path):
    engine, gate = Engine(), Gate()
    checkpoints, _ = shadow(tmp_path, engine, ops=gate)
    checkpoints.begin(Position(0, 1), 1)
    checkpoints.close()
    gate.broken = True
    checkpoints.begin(Position(0, 2), 2)
    with pytest.raises(StorageError, match=r"0_2 was not saved.*; the newest in the folder is 0_1") as caught:
        checkpoints.close()
    assert caught.value.hint


def test_an_engine_that_changes_its_tensors_too_early_is_caught(tmp_path):
    engine, gate = Engine(), Gate()
    checkpoints, _ = shadow(tmp_path, engine, ops=gate, prove_unchanged=True)
    gate.open.clear()
    checkpoints.begin(Position(0, 1), 1)
    assert gate.reached.wait(300)
    engine.arrays["policy_model"]["w"][500] = 7
    gate.open.set()
    with pytest.raises(EngineError, match="policy_model w changed while it was written"):
        checkpoints.close()
    assert list_checkpoints(LocalStorage(tmp_path)) == []


def test_one_rank_that_changes_its_tensors_too_early_stops_all(tmp_path):
    gates = [Gate(), Gate()]

    def work(rank, exchange):
        engine = Engine()
        store = CheckpointStore(
            LocalStorage(tmp_path, gates[rank]), rank=rank, world_size=2, exchange=exchange
        )
        checkpoints, _ = shadow(tmp_path, engine, store=store, prove_unchanged=True)
        gates[rank].open.clear()
        checkpoints.begin(Position(0, 1), 1)
        assert gates[rank].reached.wait(300)
        if rank == 1:
            for named in engine.arrays.values():
                for array in named.values():
                    array += 7
        gates[rank].open.set()
        checkpoints.close()

    other, own = LockStep(2).run(work)
    assert isinstance(own, EngineError)
    assert "changed while it was written" in str(own)
    assert not isinstance(other, StorageError), "a run goes on after trouble with the storage"
    assert "rank 1" in str(other)
    assert "changed while it was written" in str(other)


def test_an_engine_that_waits_is_proved_right(tmp_path):
    engine, gate = Engine(), Gate()
    checkpoints, told = shadow(tmp_path, engine, ops=gate, prove_unchanged=True)
    gate.open.clear()
    checkpoints.begin(Position(0, 1), 1)
    checkpoints.before_update()
    engine.update()
    gate.open.set()
    checkpoints.close()
    assert len(told.saved) == 1
    assert_holds(tmp_path, Position(0, 1), 0)


def test_steps_that_leave_the_policy_as_it_was_are_suspicious_whatever_the_optimizer_did(tmp_path):
    engine = Engine()
    checkpoints, told = shadow(tmp_path, engine)
    for number in (1, 3, 4):
        checkpoints.begin(Position(0, number), number)
        checkpoints.before_update()
        engine.arrays["optimizer"]["m"] += 1
        if number == 3:
            engine.arrays["policy_model"]["w"][7] += 1
        checkpoints.boundary()
        checkpoints._settle()
    checkpoints.close()
    first, second, third = (saved.suspicion for saved in told.saved)
    assert first is None
    assert second is not None
    assert "the policy of checkpoint 0_3 is byte for byte that of 0_1, 2 steps earlier" in second
    assert third is None


def test_a_folder_that_was_taken_over_stops_the_trainer(tmp_path):
    def fence():
        raise RunLocked("taken over")

    engine = Engine()
    checkpoints, _ = shadow(tmp_path, engine, store=CheckpointStore(tmp_path, fence=fence))
    with pytest.raises(RunLocked):
        checkpoints.begin(Position(0, 1), 1)


def test_ranks_commit_together_and_only_when_all_have_written(tmp_path):
    gates = [Gate(), Gate()]
    tolds = [Told(), Told()]

    def work(rank, exchange):
        engine = Engine()
        store = CheckpointStore(
            LocalStorage(tmp_path, gates[rank]), rank=rank, world_size=2, exchange=exchange
        )
        checkpoints, told = shadow(tmp_path, engine, store=store, told=tolds[rank])
        gates[1].open.clear()
        checkpoints.begin(Position(0, 0), 0)
        step(checkpoints, engine)
        early = list(told.saved)
        exchange(None)
        gates[1].open.set()
        for number in range(1, 4):
            step(checkpoints, engine)
            checkpoints.begin(Position(0, number), number)
        checkpoints.close()
        return early

    assert LockStep(2).run(work) == [[], []]
    for told in tolds:
        assert [saved.manifest.position.step for saved in told.saved] == [0, 1, 2, 3]
    assert_holds(tmp_path, Position(0, 0), 0)


def test_the_time_of_writing_leaves_out_the_wait_for_step_boundaries(tmp_path):
    engine = Engine()
    checkpoints, told = shadow(tmp_path, engine)
    began = time.perf_counter()
    checkpoints.begin(Position(0, 1), 1)
    for _ in range(2):
        assert checkpoints._job.idle.wait(300)
        time.sleep(0.2)
        step(checkpoints, engine)
    passed = time.perf_counter() - began
    (saved,) = told.saved
    assert 0 < saved.seconds <= passed - 0.4
    checkpoints.close()


def test_waiting_for_a_checkpoint_that_is_still_under_way_is_counted(tmp_path):
    engine, gate = Engine(), Gate()
    checkpoints, told = shadow(tmp_path, engine, ops=gate)
    gate.open.clear()
    checkpoints.begin(Position(0, 1), 1)
    wait = checkpoints._job.idle.wait

    def begin_to_wait():
        threading.Timer(0.2, gate.open.set).start()
        return wait()

    checkpoints._job.idle.wait = begin_to_wait
    checkpoints.close()
    (saved,) = told.saved
    assert saved.blocked >= 0.2


def test_what_is_removed_after_a_commit_holds_up_nobody_and_its_warnings_are_told(tmp_path):
    engine, go_on = Engine(), threading.Event()
    threads = []

    def tidied():
        threads.append(threading.current_thread())
        assert go_on.wait(300)
        return ["an old file is still there"]

    checkpoints, told = shadow(tmp_path, engine, tidied=tidied)
    checkpoints.begin(Position(0, 1), 1)
    while not told.saved:
        step(checkpoints, engine)
    # The thread is held up in removing, and training takes steps.
    step(checkpoints, engine)
    assert told.warned == []
    go_on.set()
    checkpoints.close()
    assert told.warned == ["an old file is still there"]
    assert threads != [threading.current_thread()]
