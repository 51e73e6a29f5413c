"""Only a rank's own share of what may have changed is read, and where reading copies, copied once."""

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from engine_case import SETTINGS, restore, snapshot, training_batch
from lockstep import LockStep
from toy_engine import CopiedToyEngine, create, create_copied, toy_model_config

from rollforward.errors import EngineError, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, OsFiles
from rollforward.store import CheckpointStore, ShadowCheckpoints, find, list_checkpoints, read_tensors
from rollforward.store.live import Guard, LiveSource, sources_of
from rollforward.store.saved import About, Description
from rollforward.tensors import TensorSpec

ABOUT = {"run_id": "r", "incarnation": 1, "state": {}}
DESCRIPTION = Description(
    position=Position(0, 9), global_step=9, fingerprint="", versions={}, attachments={}, **ABOUT
)
ROLES = ("policy_model", "optimizer", "ref")


def make(kind=create_copied):
    return kind(replace(SETTINGS, model_config=toy_model_config()))


def shadow(root, engine, *, store=None, **options):
    store = store or CheckpointStore(LocalStorage(root))
    told = []
    made = ShadowCheckpoints(
        store, engine, About(**ABOUT), saved=told.append, failed=told.append, warned=told.append, **options
    )
    return made, told


def all_of(engine, *roles):
    """Each tensor of the roles, once."""
    return Counter({(role, name): 1 for role in roles for name in engine.layout()[role]})


def update(engine):
    batch = training_batch(engine, 4)
    engine.update(batch, 1e-2)


def assert_saved(root, step, state):
    listed = {item.position.step: item for item in list_checkpoints(LocalStorage(root), deep=True)}
    assert listed[step].valid, listed[step].reason
    found = {(role, name): a for role, name, a in read_tensors(LocalStorage(root), listed[step].manifest)}
    assert found.keys() == {(role, name) for role, named in state.items() for name in named}
    for (role, name), array in found.items():
        assert array.tobytes() == state[role][name].tobytes(), (role, name)


class Slow(OsFiles):
    """A real disk that takes nothing before it is let."""

    def __init__(self):
        self.open = threading.Event()

    def write(self, fd, data):
        assert self.open.wait(300)
        return super().write(fd, data)


class TestCopies:
    """How often each tensor is copied from a device to the host."""

    def test_planning_copies_nothing(self, tmp_path):
        engine, disk = make(), Slow()
        checkpoints, _ = shadow(tmp_path, engine, store=CheckpointStore(LocalStorage(tmp_path, disk)))
        checkpoints.begin(Position(0, 1), 1)
        assert engine.copied.total() == 0
        disk.open.set()
        checkpoints.close()

    def test_a_save_copies_each_tensor_once(self, tmp_path):
        engine = make()
        checkpoints, told = shadow(tmp_path, engine)
        state = snapshot(engine)
        engine.copied.clear()
        checkpoints.begin(Position(0, 1), 1)
        checkpoints._job.idle.wait(300)
        checkpoints.before_update()
        assert engine.copied == all_of(engine, *ROLES)
        assert checkpoints.copied_bytes == 0, "the caller did not wait for any of it"
        update(engine)
        checkpoints.close()
        assert len(told) == 1
        assert_saved(tmp_path, 1, state)

    def test_what_a_slow_disk_has_not_taken_is_copied_before_the_update_and_not_again(self, tmp_path):
        engine, disk = make(), Slow()
        checkpoints, told = shadow(tmp_path, engine, store=CheckpointStore(LocalStorage(tmp_path, disk)))
        state = snapshot(engine)
        engine.copied.clear()
        checkpoints.begin(Position(0, 1), 1)
        checkpoints.before_update()
        assert engine.copied == all_of(engine, *ROLES)
        assert checkpoints.copied_bytes == sum(
            spec.nbytes for named in engine.layout().values() for spec in named.values()
        )
        engine.copied.clear()
        engine.revisions.update(ROLES)
        for named in engine.roles.values():
            for array in named.values():
                array += 1
        checkpoints.before_update()
        disk.open.set()
        checkpoints.close()
        assert engine.copied.total() == 0
        assert len(told) == 1
        assert_saved(tmp_path, 1, state)

    def test_while_the_writer_keeps_up_copies_need_the_memory_of_two_tensors(self, tmp_path):
        """Over any number of saves: the one being written, and the one that proved that there is a change."""
        engine = make()
        checkpoints, told = shadow(tmp_path, engine)
        sizes = [spec.nbytes for named in engine.layout().values() for spec in named.values()]
        allocated = []
        for step in (1, 2, 3):
            state = snapshot(engine)
            checkpoints.begin(Position(0, step), step)
            checkpoints._settle()
            assert_saved(tmp_path, step, state)
            allocated.append(checkpoints._buffers.allocated)
            update(engine)
        checkpoints.close()
        assert len(told) == 3
        held = [len(piece) for piece in checkpoints._buffers._free]
        assert max(sizes) <= sum(held) <= 2 * max(sizes) < sum(sizes)
        assert allocated[2] == allocated[1] <= 3 * max(sizes)

    def test_what_is_copied_aside_uses_the_memory_of_the_save_before(self, tmp_path):
        engine, disk = make(), Slow()
        checkpoints, _ = shadow(tmp_path, engine, store=CheckpointStore(LocalStorage(tmp_path, disk)))
        allocated = []
        for step in (1, 2, 3):
            disk.open.clear()
            state = snapshot(engine)
            checkpoints.begin(Position(0, step), step)
            checkpoints.before_update()
            update(engine)
            allocated.append(checkpoints._buffers.allocated)
            disk.open.set()
            checkpoints._settle()
            assert_saved(tmp_path, step, state)
        checkpoints.close()
        sizes = [spec.nbytes for named in engine.layout().values() for spec in named.values()]
        assert allocated == [sum(sizes)] * 3

    def test_a_role_that_did_not_change_is_not_copied_again(self, tmp_path):
        engine = make()
        checkpoints, told = shadow(tmp_path, engine)
        states = []
        for step, work, changed in (
            (1, lambda: None, ROLES),
            (2, lambda: update(engine), ("policy_model", "optimizer")),
            (3, lambda: None, ()),
            (4, engine.sync_reference, ("ref",)),
        ):
            work()
            states.append(snapshot(engine))
            engine.copied.clear()
            checkpoints.begin(Position(0, step), step)
            checkpoints._settle()
            assert engine.copied == all_of(engine, *changed), step
        checkpoints.close()
        assert len(told) == 4
        for step in (3, 4):
            assert_saved(tmp_path, step, states[step - 1])

    def test_a_rank_copies_its_own_share_only(self, tmp_path):
        def work(rank, exchange):
            engine = make()
            store = CheckpointStore(tmp_path, rank=rank, world_size=3, exchange=exchange)
            checkpoints, _ = shadow(tmp_path, engine, store=store)
            found = []
            for step in (1, 2):
                engine.copied.clear()
                checkpoints.begin(Position(0, step), step)
                checkpoints._settle()
                found.append(Counter(engine.copied))
                update(engine)
            checkpoints.close()
            return found

        engine, ranks = make(), LockStep(3).run(work)
        first, second = (sum((rank[save] for rank in ranks), Counter()) for save in (0, 1))
        assert first == all_of(engine, *ROLES)
        assert second == all_of(engine, "policy_model", "optimizer")
        sizes = [sum(engine.layout()[role][name].nbytes for role, name in rank[0]) for rank in ranks]
        assert max(sizes) < sum(sizes) / 2

    def test_a_save_that_blocks_copies_no_more(self, tmp_path):
        engine, store = make(), CheckpointStore(tmp_path)
        for step, changed in ((1, ROLES), (2, ("policy_model", "optimizer"))):
            engine.copied.clear()
            store.save(Position(0, step), engine, global_step=step, **ABOUT)
            assert engine.copied == all_of(engine, *changed)
            update(engine)

    def test_a_resumed_run_does_not_copy_what_it_has_just_restored(self, tmp_path):
        engine = make()
        CheckpointStore(tmp_path).save(Position(0, 1), engine, global_step=1, **ABOUT)
        resumed = make()
        restore(resumed, snapshot(engine))
        store = CheckpointStore(tmp_path, previous=find(LocalStorage(tmp_path)).manifest)
        store.restored(resumed)
        update(resumed)
        state = snapshot(resumed)
        resumed.copied.clear()
        store.save(Position(0, 2), resumed, global_step=2, **ABOUT)
        assert resumed.copied == all_of(resumed, "policy_model", "optimizer")
        assert_saved(tmp_path, 2, state)

    def test_a_role_is_copied_where_the_checkpoint_before_is_of_other_ranks(self, tmp_path):
        engine = make()
        CheckpointStore(tmp_path).save(Position(0, 1), engine, global_step=1, **ABOUT)
        manifest = find(LocalStorage(tmp_path)).manifest

        def work(rank, exchange):
            own = make()
            store = CheckpointStore(tmp_path, rank=rank, world_size=2, exchange=exchange, previous=manifest)
            store.restored(own)
            store.save(Position(0, 2), own, global_step=2, **ABOUT)
            return own.copied

        assert sum(LockStep(2).run(work), Counter()) == all_of(engine, *ROLES)

    def test_a_failed_save_leaves_the_next_one_to_copy_again(self, tmp_path):
        engine, disk = make(), OsFiles()
        store = CheckpointStore(LocalStorage(tmp_path, disk))
        checkpoints, told = shadow(tmp_path, engine, store=store)
        real, disk.write = disk.write, lambda _fd, _data: (_ for _ in ()).throw(OSError(28, "full"))
        checkpoints.begin(Position(0, 1), 1)
        checkpoints._settle()
        disk.write = real
        engine.copied.clear()
        checkpoints.begin(Position(0, 2), 2)
        checkpoints.close()
        assert engine.copied == all_of(engine, *ROLES)
        assert [type(item).__name__ for item in told] == ["StorageError", "Saved"]
        assert_saved(tmp_path, 2, snapshot(engine))


class TestViews:
    """Where the host sees the memory, what has not changed is not read."""

    def test_a_role_that_did_not_change_is_not_digested_again(self, tmp_path):
        engine = make(create)
        store = CheckpointStore(tmp_path)
        store.save(Position(0, 1), engine, global_step=1, **ABOUT)
        update(engine)
        layout, tensors = engine.layout(), engine.tensors
        engine.layout = lambda: layout
        engine.tensors = lambda: {role: named for role, named in tensors().items() if role != "ref"}
        store.save(Position(0, 2), engine, global_step=2, **ABOUT)
        assert (tmp_path / "ref/rank_0/ref_rank_0-0_1.safetensors").exists()
        assert not (tmp_path / "ref/rank_0/ref_rank_0-0_2.safetensors").exists()
        assert_saved(tmp_path, 2, snapshot(make(create)) | {r: dict(n) for r, n in engine.tensors().items()})

    def test_arrays_of_which_no_revision_is_known_are_compared_by_their_bytes(self, tmp_path):
        engine = make(create)
        store = CheckpointStore(tmp_path)
        store.save(Position(0, 1), engine.tensors(), global_step=1, **ABOUT)
        engine.roles["ref"]["head.bias"][3] = 7
        store.save(Position(0, 2), engine.tensors(), global_step=2, **ABOUT)
        store.save(Position(0, 3), engine.tensors(), global_step=3, **ABOUT)
        assert_saved(tmp_path, 3, snapshot(engine))
        assert [path.name for path in sorted((tmp_path / "ref/rank_0").glob("*.safetensors"))] == [
            "ref_rank_0-0_1.safetensors",
            "ref_rank_0-0_2.safetensors",
        ]

    def test_a_strided_view_is_read_as_its_values_and_copied_once(self):
        array = np.arange(12, dtype=np.float32).reshape(3, 4).T
        source = LiveSource(TensorSpec.whole(np.float32, (4, 3)), lambda: array, Guard(), in_place=True)
        array += 1
        assert source.keep_copy() == 0
        assert b"".join(map(bytes, source.chunks())) == (array - 1).tobytes()


class TestClaims:
    """A role with the revision that it had is taken to be unchanged; `prove_unchanged` looks."""

    @pytest.mark.parametrize("kind", [create, create_copied])
    def test_an_engine_that_changes_a_role_without_a_new_revision_is_caught(self, tmp_path, kind):
        engine = make(kind)
        checkpoints, told = shadow(tmp_path, engine, prove_unchanged=True)
        checkpoints.begin(Position(0, 1), 1)
        checkpoints._settle()
        engine.roles["ref"]["head.weight"][2, 1] += 1
        checkpoints.begin(Position(0, 2), 2)
        with pytest.raises(EngineError, match=r"checkpoint 0_2: ref head\.weight has changed since the"):
            checkpoints.close()
        assert len(told) == 1
        assert find(LocalStorage(tmp_path)).manifest.position == Position(0, 1)

    @pytest.mark.parametrize("kind", [create, create_copied])
    def test_an_honest_engine_is_proved_right(self, tmp_path, kind):
        engine = make(kind)
        checkpoints, told = shadow(tmp_path, engine, prove_unchanged=True)
        for step in (1, 2):
            checkpoints.begin(Position(0, step), step)
            checkpoints.before_update()
            state = snapshot(engine)
            update(engine)
            checkpoints.boundary()
        checkpoints.close()
        assert len(told) == 2
        assert_saved(tmp_path, 2, state)

    def test_when_another_rank_has_to_write_a_role_anew_who_left_it_out_fills_it_in(self, tmp_path):
        def work(rank, exchange):
            engine = make()
            store = CheckpointStore(tmp_path, rank=rank, world_size=2, exchange=exchange)
            store.save(Position(0, 1), engine, global_step=1, **ABOUT)
            attempt = store.plan(DESCRIPTION, engine.layout())
            share = [name for role, name in attempt.share() if role == "ref"]
            if rank == 1:
                for name in share:
                    engine.load("ref", name, engine.roles["ref"][name] + 1)
            store.save(Position(0, 2), engine, global_step=2, **ABOUT)
            return {name: engine.roles["ref"][name] for name in share}

        zero, one = LockStep(2).run(work)
        assert zero
        assert one
        engine = make()
        engine.roles["ref"] |= zero | one
        assert_saved(tmp_path, 2, engine.roles)


def test_a_part_of_a_tensor_is_refused_before_anything_is_written(tmp_path):
    layout = {"ref": {"w": TensorSpec(np.dtype(np.float32), (2, 3), (4, 3), (2, 0))}}
    with pytest.raises(ValueError, match=r"ref w is the part \[2, 3\] of \[4, 3\], and is not said"):
        CheckpointStore(tmp_path).plan(DESCRIPTION, layout)
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_released_with_its_copy():
    engine = make()
    assert isinstance(engine, CopiedToyEngine)
    source = sources_of(engine, [("ref", "head.bias")], Guard())["ref"]["head.bias"]
    assert b"".join(map(bytes, source.chunks())) == engine.roles["ref"]["head.bias"].tobytes()
    source.release()
    assert source.keep_copy() == 0
    with pytest.raises(RuntimeError, match="after its part had been written"):
        list(source.chunks())


def test_nobody_waits_for_a_network_that_has_a_chunk():
    """`before_update` comes while the first chunk is on its way to a service, for as long as that takes."""
    array = np.zeros(3 << 20, np.float32)
    guard = Guard()
    source = LiveSource(
        TensorSpec.whole(np.float32, array.shape), lambda: array, guard, in_place=True, copied=True
    )
    chunks = source.chunks()
    first = next(chunks)
    free = threading.Event()

    def copy_aside():
        with guard.copying():
            source.keep_copy()
        free.set()

    threading.Thread(target=copy_aside, daemon=True).start()
    assert free.wait(300)
    array[...] = 1
    assert bytes(first) == bytes(len(first))
    assert b"".join(chunks) == bytes(array.nbytes - len(first))


def test_in_a_service_each_save_of_each_start_has_names_of_its_own(tmp_path):
    """So that what a replaced start still sends replaces nothing of its successor's."""
    storage = LocalStorage(tmp_path)
    state = {"policy_model": {"w": np.zeros(3, np.float32)}}
    for incarnation, names in ((1, ("", ".1", ".2")), (2, (".16", ".17")), (5, (".64",))):
        store = CheckpointStore(storage, remote=True)
        for name in names:
            state["policy_model"]["w"] += 1
            store.save(Position(0, 3), state, global_step=3, **ABOUT | {"incarnation": incarnation})
            assert storage.stat(f"train/rank_0/policy_model{name}_rank_0-0_3.safetensors") is not None


def test_in_a_service_a_start_without_names_left_saves_nothing_and_says_so(tmp_path):
    storage = LocalStorage(tmp_path)
    state = {"policy_model": {"w": np.zeros(3, np.float32)}}
    store = CheckpointStore(storage, remote=True)
    with pytest.raises(StorageError, match="start 70000 has no file names left") as caught:
        store.save(Position(0, 3), state, global_step=3, **ABOUT | {"incarnation": 70_000})
    assert "rollforward copy" in caught.value.hint
    assert storage.scan("") == []


def test_in_a_service_a_start_removes_nothing_of_a_later_one(tmp_path):
    """A trainer that was frozen and replaced, and wakes up to tidy, does not take them for leftovers."""
    storage = LocalStorage(tmp_path)
    frozen, rival = (CheckpointStore(storage, remote=True) for _ in range(2))
    state = {"policy_model": {"w": np.zeros(3, np.float32)}}
    frozen.save(Position(0, 1), state, global_step=1, **ABOUT)
    committed = []
    frozen.tidy = lambda what: committed.append(what) or []
    state["policy_model"]["w"] += 1
    frozen.save(Position(0, 2), state, global_step=2, **ABOUT)
    state["policy_model"]["w"] += 1
    rival.save(Position(0, 3), state, global_step=3, **ABOUT | {"incarnation": 2})
    assert CheckpointStore.tidy(frozen, committed[0]) == []
    assert [info.valid for info in list_checkpoints(storage, deep=True)] == [True, True, True]
