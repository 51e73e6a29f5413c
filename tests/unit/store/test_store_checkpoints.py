"""Saving, finding, reading back, going on after failures; one rank and several."""

import errno
import json
from dataclasses import fields
from datetime import UTC, datetime

import numpy as np
import pytest
from lockstep import LockStep
from simulated_disk import SimulatedDisk

from rollforward.errors import CheckpointInvalid, CheckpointMismatch, NothingToResume, RunLocked, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import (
    CheckpointStore,
    Retention,
    check_layout,
    find,
    list_checkpoints,
    load_manifest,
    read_attachments,
    read_tensors,
    reading,
    restore_into,
    restoring,
)
from rollforward.store.manifest import Head
from rollforward.tensors import layout_of


def tensors(step: int, *, reference: int = 0):
    random = np.random.default_rng(step)
    return {
        "policy_model": {f"w{i}": random.normal(size=(5, i + 1)).astype(np.float32) for i in range(4)},
        "optimizer": {"adam_m.w0": random.normal(size=20).astype(np.float32), "global_step": np.array(step)},
        "ref": {f"w{i}": np.full((5, i + 1), reference, np.float32) for i in range(4)},
    }


def save(store, step, *, epoch=0, incarnation=1, attachments=None, reference=0, content=None):
    return store.save(
        Position(epoch, step),
        tensors(step if content is None else content, reference=reference),
        global_step=step,
        run_id="run",
        incarnation=incarnation,
        state={"step": step},
        fingerprint="f",
        versions={"numpy": np.__version__},
        attachments={"config.json": b"{}"} if attachments is None else attachments,
    )


def assert_holds(storage, manifest, expected):
    found = {(role, name): array for role, name, array in read_tensors(storage, manifest)}
    assert found.keys() == {(role, name) for role, named in expected.items() for name in named}
    for (role, name), array in found.items():
        assert array.dtype == expected[role][name].dtype
        assert np.array_equal(array, expected[role][name])


def no_trouble(_call, _path):
    pass


def files(storage, folder):
    return [entry.name for entry in storage.scan(folder)]


@pytest.fixture
def storage():
    return LocalStorage("/data/run", SimulatedDisk())


def ranks(storage, world_size, work, **options):
    """Run `work(store)` on every rank; returns results or exceptions in rank order."""

    def body(rank, exchange):
        return work(CheckpointStore(storage, rank=rank, world_size=world_size, exchange=exchange, **options))

    return LockStep(world_size).run(body)


def test_what_is_saved_is_found_and_reads_back_bit_for_bit(storage):
    saved = save(CheckpointStore(storage), 20)
    found = find(storage)
    assert found.manifest == saved.manifest
    assert found.rejected == ()
    assert found.manifest.digest == saved.manifest.digest
    assert found.manifest.state == {"step": 20}
    assert_holds(storage, found.manifest, tensors(20))
    assert read_attachments(storage, found.manifest) == {"config.json": b"{}"}


def test_it_works_on_a_real_disk_too(tmp_path):
    store = CheckpointStore(tmp_path / "deep" / "run", retention=Retention(newest=2))
    for step in (1, 2, 3):
        save(store, step)
    storage = LocalStorage(tmp_path / "deep" / "run")
    assert [item.position.step for item in list_checkpoints(storage, deep=True)] == [3, 2]
    assert_holds(storage, find(storage).manifest, tensors(3))


def test_the_layout_is_the_one_that_mindrlhf_users_know(storage):
    store = CheckpointStore(storage)
    save(store, 100)
    save(store, 5, epoch=1)
    for folder, role in (("train", "policy_model"), ("optimizer", "optimizer")):
        name = f"{role}_rank_0-1_5.safetensors"
        assert name in files(storage, f"{folder}/rank_0")
        content = storage._ops.tree()[f"/data/run/{folder}/rank_0/meta.json"]
        assert json.loads(content) == {"last_epoch": 1, "last_step": 5, "last_ckpt_file": name}
    assert files(storage, "commits") == ["0_100.json", "1_5.json"]


def test_every_rank_mends_its_meta_json_from_the_manifest(storage):
    def crashing(store):
        save(store, 10)
        store.tidy = lambda _: []  # killed when the manifest was there and meta.json was not yet written
        save(store, 20)

    def names():
        return {
            path: json.loads(content)["last_ckpt_file"]
            for path, content in storage._ops.tree().items()
            if path.endswith("meta.json")
        }

    ranks(storage, 3, crashing)
    before = names()
    assert len(before) == 9
    ranks(storage, 3, lambda store: store.derive_meta())
    assert names() == before, "there is nothing to say before a checkpoint is restored"
    manifest = find(storage).manifest
    ranks(storage, 3, lambda store: store.derive_meta(), previous=manifest)
    assert set(names().values()) == {file.path.rpartition("/")[2] for file in manifest.files}
    assert sum("-0_20." in name for name in names().values()) == 6, "all but the reference, which is shared"


def test_an_unchanged_reference_is_written_once_and_kept_while_it_is_needed(storage):
    store = CheckpointStore(storage, retention=Retention(newest=2))
    for step in (10, 20, 30, 40):
        saved = save(store, step)
    assert files(storage, "ref/rank_0") == ["meta.json", "ref_rank_0-0_10.safetensors"]
    meta = json.loads(storage._ops.tree()["/data/run/ref/rank_0/meta.json"])
    assert meta["last_ckpt_file"] == "ref_rank_0-0_10.safetensors"
    assert_holds(storage, saved.manifest, tensors(40))
    save(store, 50, reference=1)
    assert "ref_rank_0-0_10.safetensors" in files(storage, "ref/rank_0")
    saved = save(store, 60, reference=1)
    assert files(storage, "ref/rank_0") == ["meta.json", "ref_rank_0-0_50.safetensors"]
    assert_holds(storage, saved.manifest, tensors(60, reference=1))


def test_a_store_that_did_not_restore_from_here_takes_nothing_over(storage):
    save(CheckpointStore(storage), 10)
    save(CheckpointStore(storage), 20)
    assert "ref_rank_0-0_20.safetensors" in files(storage, "ref/rank_0")
    save(CheckpointStore(storage, previous=find(storage).manifest), 30)
    assert "ref_rank_0-0_30.safetensors" not in files(storage, "ref/rank_0")


def test_old_checkpoints_go_and_foreign_files_stay(storage):
    store = CheckpointStore(storage, retention=Retention(newest=2))
    kept = ["train/rank_0/notes.txt", "train/rank_0/policy_model_rank_1-0_3.safetensors", "commits/README.md"]
    for path in kept:
        storage.write(path, [b"mine"])
    for step in range(1, 6):
        save(store, step)
    assert [item.position.step for item in list_checkpoints(storage)] == [5, 4]
    assert all(storage.stat(path) for path in kept)
    named = [name for name in files(storage, "train/rank_0") if name.startswith("policy_model_rank_0")]
    assert named == ["policy_model_rank_0-0_4.safetensors", "policy_model_rank_0-0_5.safetensors"]


def test_what_an_interrupted_start_left_is_cleaned_up(storage):
    save(CheckpointStore(storage), 1)
    left = ["train/rank_0/policy_model_rank_0-0_9.safetensors", "train/rank_0/.x.safetensors.0123abcd.tmp"]
    left += ["commits/.0_9.json.0123abcd.tmp", "train/rank_5/policy_model_rank_5-0_9.safetensors"]
    for path in left:
        storage.write(path, [b"half"])
    save(CheckpointStore(storage), 2)
    assert [path for path in left if storage.stat(path)] == []


def test_saving_a_position_again_never_replaces_committed_files(storage):
    first = save(CheckpointStore(storage), 7).manifest
    second = save(CheckpointStore(storage), 7, incarnation=2, content=8).manifest
    assert first.paths() & second.paths() == {"model/config.json"}
    assert find(storage).manifest == second
    assert_holds(storage, second, tensors(8))
    assert files(storage, "train/rank_0") == ["meta.json", "policy_model.1_rank_0-0_7.safetensors"]


def test_a_later_start_that_went_back_is_the_newest(storage):
    store = CheckpointStore(storage)
    save(store, 10)
    save(store, 40)
    save(CheckpointStore(storage), 25, incarnation=2)
    assert [item.position.step for item in list_checkpoints(storage)] == [25, 40, 10]
    assert find(storage).manifest.position == Position(0, 25)


def test_the_newest_that_is_not_intact_is_rejected_with_its_reason(storage):
    store = CheckpointStore(storage)
    for step in (1, 2, 3, 4):
        save(store, step)
    storage.remove("optimizer/rank_0/optimizer_rank_0-0_4.safetensors")
    storage.write("commits/0_3.json", [b"{}"])
    found = find(storage)
    assert found.manifest.position == Position(0, 2)
    assert [(item.position.step, "\n" in item.reason) for item in found.rejected] == [(4, False), (3, False)]
    assert "optimizer_rank_0-0_4.safetensors is missing" in found.rejected[0].reason
    assert find(storage, skip=[Position(0, 2)]).manifest.position == Position(0, 1)


def test_the_files_of_an_unreadable_manifest_are_left_alone(storage):
    store = CheckpointStore(storage, retention=Retention(newest=9))
    save(store, 1)
    save(store, 2)
    storage.write("commits/0_1.json", [b"hit by something"])
    save(CheckpointStore(storage, retention=Retention(newest=9)), 3)
    assert "policy_model_rank_0-0_1.safetensors" in files(storage, "train/rank_0")


def test_a_flipped_bit_is_found_before_the_tensor_is_handed_out(storage):
    saved = save(CheckpointStore(storage), 1)
    path = "train/rank_0/policy_model_rank_0-0_1.safetensors"
    content = bytearray(storage._ops.tree()[f"/data/run/{path}"])
    content[-1] ^= 0x10
    storage.write(path, [content])
    with pytest.raises(CheckpointInvalid, match="recorded digest"):
        list(read_tensors(storage, saved.manifest))
    assert [item.valid for item in list_checkpoints(storage)] == [True]
    assert [item.valid for item in list_checkpoints(storage, deep=True)] == [False]


@pytest.mark.parametrize("threads", [1, 3])
def test_restoring_puts_every_byte_straight_into_the_arrays(tmp_path, threads):
    saved = save(CheckpointStore(tmp_path), 3)
    arrays = {
        role: {name: np.full_like(array, 77) for name, array in named.items()}
        for role, named in tensors(3).items()
    }
    # A view that is not in C order is filled through a copy.
    arrays["policy_model"]["w2"] = np.zeros((3, 5), np.float32).T
    size = restore_into(LocalStorage(tmp_path), saved.manifest, arrays, threads=threads)
    assert size == sum(array.nbytes for named in arrays.values() for array in named.values())
    for role, named in tensors(3).items():
        assert all(np.array_equal(arrays[role][name], array) for name, array in named.items())


def test_restoring_from_many_ranks_opens_few_files_at_once(storage, monkeypatch):
    monkeypatch.setattr(restoring, "OPEN_FILES", 2)
    monkeypatch.setattr(reading, "OPEN_FILES", 2)
    disk = storage._ops
    manifest = ranks(storage, 5, lambda store: save(store, 3))[0].manifest
    arrays = {
        role: {name: np.zeros_like(array) for name, array in named.items()}
        for role, named in tensors(3).items()
    }
    most = []
    disk.fail = lambda call, _path: most.append(len(disk._open)) if call == "pread" else None
    restore_into(storage, manifest, arrays, threads=1)
    assert max(most) <= 2
    for role, named in tensors(3).items():
        assert all(np.array_equal(arrays[role][name], array) for name, array in named.items())


def test_restoring_some_roles_leaves_the_others_alone(storage):
    saved = save(CheckpointStore(storage), 3)
    arrays = {"ref": {name: np.ones_like(array) for name, array in tensors(3)["ref"].items()}}
    restore_into(storage, saved.manifest, arrays)
    assert not any(array.any() for array in arrays["ref"].values())


def test_restoring_damaged_bytes_is_an_error(storage):
    saved = save(CheckpointStore(storage), 1)
    path = "optimizer/rank_0/optimizer_rank_0-0_1.safetensors"
    content = bytearray(storage._ops.tree()[f"/data/run/{path}"])
    content[-3] ^= 1
    storage.write(path, [content])
    with pytest.raises(CheckpointInvalid, match="recorded digest"):
        restore_into(storage, saved.manifest, tensors(1))


def test_nothing_to_resume_says_what_was_looked_for_and_what_is_there(storage):
    with pytest.raises(NothingToResume, match=r"looked for commits/") as caught:
        find(storage)
    assert "train/: no rank folders" in caught.value.message
    save(CheckpointStore(storage), 1)
    storage.remove("commits/0_1.json")
    with pytest.raises(NothingToResume, match=r"train/rank_0: meta.json, policy_model_rank_0-0_1"):
        find(storage)


def test_another_model_is_told_tensor_by_tensor(storage):
    manifest = save(CheckpointStore(storage), 1).manifest
    check_layout(storage, manifest, layout_of(tensors(1)))
    other = tensors(1)
    other["policy_model"]["w0"] = np.zeros((5, 2), np.float32)
    other["policy_model"]["w1"] = other["policy_model"]["w1"].astype(np.float16)
    other["policy_model"]["new"] = other["policy_model"].pop("w3")
    with pytest.raises(CheckpointMismatch) as caught:
        check_layout(storage, manifest, layout_of(other))
    for line in (
        "not in the checkpoint: policy_model new",
        "only in the checkpoint: policy_model w3",
        "policy_model w0: F32 [5, 1] in the checkpoint, F32 [5, 2] in the model",
        "policy_model w1: F32 [5, 2] in the checkpoint, F16 [5, 2] in the model",
    ):
        assert line in caught.value.message


def test_attachments_of_an_older_checkpoint_are_never_replaced(storage):
    store = CheckpointStore(storage)
    first = save(store, 1, attachments={"config.json": b"old"}).manifest
    second = save(store, 2, attachments={"config.json": b"new", "tokenizer.json": b"t"}).manifest
    assert read_attachments(storage, first) == {"config.json": b"old"}
    assert read_attachments(storage, second) == {"config.json": b"new", "tokenizer.json": b"t"}


def test_a_damaged_attachment_is_mended_by_the_next_save(storage):
    store = CheckpointStore(storage)
    save(store, 1)
    for path in ("model/config.json", "model.copy/config.json"):
        storage.write(path, [b"??"])
    assert [item.valid for item in list_checkpoints(storage, deep=True)] == [False]
    save(store, 2)
    assert [item.valid for item in list_checkpoints(storage, deep=True)] == [True, True]


def test_the_clock_is_passed_in_and_written_in_utc(storage):
    store = CheckpointStore(storage, now=lambda: datetime(2026, 1, 31, 12, tzinfo=UTC))
    assert save(store, 1).manifest.created == "2026-01-31T12:00:00.000000Z"


def test_a_state_that_json_cannot_hold_fails_before_it_is_visible(storage):
    store = CheckpointStore(storage)
    nan = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        store.save(Position(0, 1), tensors(1), global_step=1, run_id="r", incarnation=1, state={"x": nan})
    assert list_checkpoints(storage) == []
    assert files(storage, "train/rank_0") == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_bytes_and_each_has_its_files(storage, world_size):
    results = ranks(storage, world_size, lambda store: [save(store, step) for step in (1, 2)][-1])
    manifest, *heads = [saved.manifest for saved in results]
    assert all(head == known(manifest) and head.digest == manifest.digest for head in heads)
    assert load_manifest(storage, Position(0, 2)) == manifest
    assert_holds(storage, manifest, tensors(2))
    for rank in range(world_size):
        assert f"policy_model_rank_{rank}-0_2.safetensors" in files(storage, f"train/rank_{rank}")
        for folder in ("train", "optimizer", "ref"):
            assert "meta.json" in files(storage, f"{folder}/rank_{rank}")
    sizes = {path: entry.size for path in manifest.paths() if (entry := storage.stat(path))}
    assert sizes == {file.path: file.size for file in [*manifest.files, *manifest.table_files]} | {
        file.path: file.size for file in manifest.attachments
    }


def known(manifest):
    """The part of a manifest that every rank has."""
    return Head(**{item.name: getattr(manifest, item.name) for item in fields(Head)})


def test_the_digests_of_roles_do_not_depend_on_the_number_of_ranks():
    found = []
    for world_size in (1, 2, 5):
        storage = LocalStorage("/run", SimulatedDisk())
        found.append(ranks(storage, world_size, lambda store: save(store, 3))[0].manifest.role_digests())
    assert found[0] == found[1] == found[2]


def test_a_role_that_changed_on_one_rank_only_is_written_by_all(storage):
    """Ranks that skipped theirs as unchanged copy it over, so a role is always of one position."""

    def work(store):
        save(store, 1)
        changed = tensors(2)
        changed["ref"]["w3"] += 1
        return store.save(Position(0, 2), changed, global_step=2, run_id="r", incarnation=1, state={})

    manifest = ranks(storage, 3, work)[0].manifest
    expected = tensors(2)
    expected["ref"]["w3"] += 1
    assert_holds(storage, manifest, expected)
    assert {name[1] for name in manifest.generations()} == {Position(0, 2)}


@pytest.mark.parametrize("call", ["create", "write", "fsync", "rename", "fsync_folder"])
def test_one_ranks_failure_reaches_every_rank_and_the_next_save_succeeds(storage, call):
    disk = storage._ops

    def work(store):
        save(store, 1)

        def fail(kind, path):
            if kind == call and "train/rank_1" in path:
                raise OSError(errno.ENOSPC, "No space left on device")

        disk.fail = fail
        with pytest.raises(StorageError, match=r"0_2 was not saved.* rank 1: .*ENOSPC") as caught:
            save(store, 2)
        assert "free some space" in caught.value.hint
        store.channel.all_gather(None)
        disk.fail = no_trouble
        held = [name for name in disk.tree() if "0_2" in name]
        return held, save(store, 3)

    results = ranks(storage, 3, work)
    assert all(not isinstance(result, BaseException) for result in results), results
    assert [held for held, _ in results] == [[], [], []]
    assert [item.position.step for item in list_checkpoints(storage, deep=True)] == [3, 1]
    assert not [name for name in disk.tree() if "0_2" in name or name.endswith(".tmp")]


def test_a_manifest_that_cannot_be_published_leaves_the_one_before(storage):
    disk = storage._ops

    def work(store):
        save(store, 1)
        disk.fail = broken
        with pytest.raises(StorageError, match=r"publishing it failed on rank 0"):
            save(store, 2)

    def broken(call, path):
        if call == "rename" and "/commits/" in path:
            raise OSError(errno.EIO, "Input/output error")

    ranks(storage, 2, work)
    assert find(storage).manifest.position == Position(0, 1)
    assert not [name for name in disk.tree() if "0_2" in name]


def test_a_manifest_that_may_not_be_durable_keeps_its_files(storage):
    store = CheckpointStore(storage)
    save(store, 1)

    def fail(call, path):
        if call == "fsync_folder" and path.endswith("/commits"):
            raise OSError(errno.EIO, "Input/output error")

    storage._ops.fail = fail
    with pytest.raises(StorageError):
        save(store, 2)
    storage._ops.fail = no_trouble
    listed = list_checkpoints(storage, deep=True)
    assert [(item.position.step, item.valid) for item in listed] == [(2, True), (1, True)]
    save(store, 3)
    assert [item.position.step for item in list_checkpoints(storage, deep=True)] == [3, 2, 1]


def test_what_fails_after_the_commit_is_a_warning(storage):
    store = CheckpointStore(storage, retention=Retention(newest=1))
    save(store, 1)

    def fail(call, path):
        if call == "unlink" or (call == "create" and "meta.json" in path):
            raise OSError(errno.EIO, "Input/output error")

    storage._ops.fail = fail
    saved = save(store, 2)
    assert len(saved.warnings) >= 2
    storage._ops.fail = no_trouble
    save(store, 3)
    assert [item.position.step for item in list_checkpoints(storage)] == [3]
    assert not [
        name for name in storage._ops.tree() if "0_2" in name or "0_1." in name.replace("ref_rank_0-0_1.", "")
    ]


def test_an_older_writer_that_wakes_up_cannot_commit(storage):
    def fenced():
        raise RunLocked("taken over by incarnation 2")

    store = CheckpointStore(storage, fence=fenced)
    with pytest.raises(RunLocked):
        save(store, 1)
    assert list_checkpoints(storage) == []


def test_finding_reads_the_front_of_every_manifest_and_all_of_one(storage):
    store = CheckpointStore(storage, retention=Retention(newest=0))
    for step in range(30):
        saved = save(store, step)
    disk = storage._ops
    read: dict[str, int] = {}
    real = disk.pread

    def counting(fd, buffer, offset):
        path = disk._open[fd][1]
        read[path] = read.get(path, 0) + buffer.nbytes
        return real(fd, buffer, offset)

    disk.pread = counting
    assert find(storage).manifest == saved.manifest
    whole = [path for path, size in read.items() if size > 512]
    assert [path.rpartition("/")[2] for path in whole] == ["0_29.json"]
    assert {path.partition("/run/")[2] for path in read if "/commits/" not in path} == {"model/config.json"}
    assert len(read) == 30 + 1
