"""Files that all checkpoints share: there twice, verified when one is chosen, and in nobody's way."""

import numpy as np
import pytest
from simulated_disk import SimulatedDisk

from rollforward.errors import CheckpointInvalid, NothingToResume
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import (
    CheckpointStore,
    Retention,
    find,
    list_checkpoints,
    locate_attachments,
    read_attachments,
)
from rollforward.store.judging import Judge

FILES = {"config.json": b"{}", "tokenizer.json": b"words"}
COPIES = ["model", "model.copy"]


@pytest.fixture
def disk():
    disk = SimulatedDisk()
    disk.mkdir("/data")
    return disk


@pytest.fixture
def storage(disk):
    return LocalStorage("/data/run", disk)


def save(storage, step, attachments=FILES, **policy):
    store = CheckpointStore(storage, retention=Retention(**policy))
    arrays = {"policy_model": {"a": np.full(3, step, np.float32)}}
    position = Position(0, step)
    return store.save(
        position,
        arrays,
        global_step=step,
        run_id="r",
        incarnation=1,
        state={},
        attachments=attachments,
    ).manifest


def hurt(storage, path, how):
    content = b"".join([_content(storage, path)])
    if how == "gone":
        storage.remove(path)
    else:
        storage.write(
            path, [{"flip": b"?" + content[1:], "cut": content[:-1], "longer": content + b" "}[how]]
        )


def _content(storage, path):
    with storage.open(path) as handle:
        found = bytearray(handle.size)
        handle.read_into(memoryview(found), 0)
    return bytes(found)


@pytest.mark.parametrize("how", ["flip", "cut", "longer", "gone"])
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_to_one_copy_costs_nothing_and_the_next_save_writes_it_anew(storage, copy, name, how):
    first = save(storage, 1)
    hurt(storage, f"{copy}/{name}", how)
    assert find(storage).manifest == first
    assert read_attachments(storage, first) == FILES
    whole = next(other for other in COPIES if other != copy)
    if copy == "model":
        assert locate_attachments(storage, first).folder == whole
    judge = Judge(storage, deep=True)
    assert judge.judge(Position(0, 1)).valid
    told = [] if (copy, how) == ("model.copy", "gone") else [f"{copy}/{name}"]
    assert [line.partition(" ")[0] for line in judge.damaged_copies] == told
    save(storage, 2)
    assert _content(storage, f"{copy}/{name}") == FILES[name]
    judge = Judge(storage, deep=True)
    assert judge.judge(Position(0, 1)).valid
    assert not judge.damaged_copies


@pytest.mark.parametrize("how", ["flip", "cut", "longer", "gone"])
def test_an_older_checkpoint_with_files_of_its_own_is_taken_when_both_copies_are_damaged(storage, how):
    save(storage, 1, {"config.json": b"old"})
    newest = save(storage, 2, {"config.json": b"new"})
    assert [item.path for item in newest.attachments] == ["model.1/config.json"]
    for copy in ("model.1", "model.1.copy"):
        hurt(storage, f"{copy}/config.json", how)
    found = find(storage)
    assert found.manifest.position == Position(0, 1)
    assert [item.position.step for item in found.rejected] == [2]
    assert "model.1/config.json" in found.rejected[0].reason
    assert "0_2" in found.rejected[0].reason
    assert read_attachments(storage, found.manifest) == {"config.json": b"old"}
    assert [info.valid for info in list_checkpoints(storage)] == [False, True]
    with pytest.raises(CheckpointInvalid, match=r"model\.1/config\.json"):
        read_attachments(storage, newest)


def test_when_all_share_the_damaged_file_nothing_is_left_and_it_is_named(storage):
    save(storage, 1)
    save(storage, 2)
    for copy in COPIES:
        hurt(storage, f"{copy}/tokenizer.json", "flip")
    with pytest.raises(NothingToResume, match=r"model/tokenizer\.json does not have its recorded digest"):
        find(storage)


def test_a_run_of_an_earlier_release_gets_its_second_copy_with_the_next_checkpoint(storage):
    first = save(storage, 1)
    for name in FILES:
        storage.remove(f"model.copy/{name}")
    judge = Judge(storage, deep=True)
    assert judge.judge(Position(0, 1)).valid
    assert not judge.damaged_copies, "older releases made none"
    assert save(storage, 2).attachments == first.attachments
    assert _content(storage, "model.copy/config.json") == FILES["config.json"]


def test_both_copies_go_with_the_last_checkpoint_that_names_them(storage, disk):
    save(storage, 1, {"config.json": b"old"}, newest=1)
    save(storage, 2, {"config.json": b"new"}, newest=1)
    left = sorted(path for path, content in disk.tree().items() if "/model" in path and content is not None)
    assert left == ["/data/run/model.1.copy/config.json", "/data/run/model.1/config.json"]


@pytest.mark.parametrize("theirs", [b"theirs", FILES["config.json"]])
def test_a_folder_of_the_user_s_is_neither_written_nor_removed(storage, theirs):
    storage.write("model/config.json", [theirs])
    first = save(storage, 1, newest=1)
    assert {item.path.partition("/")[0] for item in first.attachments} == {"model.1"}
    save(storage, 2, {"config.json": b"new"}, newest=1)
    assert _content(storage, "model/config.json") == theirs


def test_what_a_killed_save_left_is_used_again(storage, disk):
    disk.kill_after = None
    for path in ("model.copy/config.json", "model/config.json", "model.copy/tokenizer.json"):
        storage.write(path, [FILES[path.rpartition("/")[2]]])
    assert {item.path.partition("/")[0] for item in save(storage, 1).attachments} == {"model"}
