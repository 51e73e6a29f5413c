"""Folders as MindRLHF and MindFormers leave them."""

import json

import numpy as np
import pytest
import safetensors.numpy
from ckpt_writer import ckpt_bytes

from rollforward.errors import CheckpointInvalid, NothingToResume
from rollforward.interop.files import read_arrays
from rollforward.interop.folders import find_foreign
from rollforward.position import Position
from rollforward.store.meta import parse_meta

PREFIX = {"policy_model": "policy_model", "optimizer": "optimizer", "ref": "ref"}


def put(root, role, rank, position, *, meta=True, ext="safetensors", content=None, garbage=""):
    folder = root / role / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{PREFIX[role]}_rank_{rank}-{position}.{ext}"
    if content is not None:
        (folder / name).write_bytes(content)
    else:
        value = float(position.replace("_", ""))
        safetensors.numpy.save_file({"w": np.full(3, value, np.float32)}, folder / name)
    if meta:
        epoch, step = map(int, position.split("_"))
        text = json.dumps({"last_epoch": epoch, "last_step": step, "last_ckpt_file": name})
        (folder / "meta.json").write_text(text + garbage)
    return folder / name


def folders(root, *roles):
    return {role: root / role for role in roles or PREFIX}


def read(found, rank=0):
    return {role: dict(read_arrays(paths[rank])) for role, paths in found.files.items()}


def test_the_newest_position_that_is_complete_everywhere_is_taken(tmp_path):
    for role in PREFIX:
        for rank in range(2):
            put(tmp_path, role, rank, "0_10")
            put(tmp_path, role, rank, "0_20")
    put(tmp_path, "policy_model", 0, "0_30")
    found = find_foreign(folders(tmp_path), world_size=2)
    assert found.position == Position(0, 20)
    assert any("digest" in line for line in found.warnings)
    assert any("0_30 is not complete everywhere" in line for line in found.warnings)
    tensors = read(found, 1)
    assert tensors.keys() == PREFIX.keys()
    assert all(np.array_equal(named["w"], np.full(3, 20, np.float32)) for named in tensors.values())


def test_policy_and_optimizer_stand_at_equal_positions_even_where_the_newest_differ(tmp_path):
    for position in ("0_10", "0_20", "0_30"):
        put(tmp_path, "policy_model", 0, position)
    for position in ("0_10", "0_20", "0_25"):
        put(tmp_path, "optimizer", 0, position)
    put(tmp_path, "ref", 0, "0_10")
    found = find_foreign(folders(tmp_path), world_size=1)
    assert found.position == Position(0, 20)
    assert found.files["ref"][0].name == "ref_rank_0-0_10.safetensors"


def test_a_file_newer_than_its_meta_says_does_not_count(tmp_path):
    put(tmp_path, "policy_model", 0, "0_10")
    put(tmp_path, "policy_model", 0, "0_20", meta=False, content=b"half a fi")
    assert find_foreign(folders(tmp_path, "policy_model"), world_size=1).position == Position(0, 10)


def test_an_epoch_that_rolled_over_leaves_garbage_behind_meta_json(tmp_path):
    put(tmp_path, "policy_model", 0, "1_5", garbage='fetensors"}')
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1)
    assert found.position == Position(1, 5)
    assert any("more follows after its JSON" in line for line in found.warnings)


def test_nothing_complete_is_told_rank_by_rank(tmp_path):
    put(tmp_path, "policy_model", 0, "0_10")
    put(tmp_path, "policy_model", 1, "0_20", meta=False)
    put(tmp_path, "policy_model", 3, "0_10")
    with pytest.raises(NothingToResume) as caught:
        find_foreign(folders(tmp_path, "policy_model"), world_size=3)
    message = caught.value.message
    assert "rank_0: meta.json names policy_model_rank_0-0_10.safetensors (0_10); files of: 0_10" in message
    assert "rank_1: no meta.json; it holds policy_model_rank_1-0_20.safetensors" in message
    assert "rank_2: there is no such folder" in message
    assert "saved by more workers" in message


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(NothingToResume, match="absent does not exist"):
        find_foreign({"policy_model": tmp_path / "absent"}, world_size=1)


def test_ckpt_files_are_read_too(tmp_path):
    content = ckpt_bytes({"w": np.ones(2, np.float32)})
    path = put(tmp_path, "policy_model", 0, "0_10", ext="ckpt", content=content)
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1)
    assert found.files["policy_model"] == (path,)
    assert np.array_equal(read(found)["policy_model"]["w"], np.ones(2))


def test_bfloat16_is_widened_without_loss(tmp_path):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + np.array([0x3FC0, 0xC000], "<u2").tobytes()
    put(tmp_path, "policy_model", 0, "0_1", content=content)
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1)
    array = read(found)["policy_model"]["w"]
    assert array.dtype == np.float32
    assert array.tolist() == [1.5, -2.0]


def test_a_truncated_safetensors_file_is_rejected(tmp_path):
    path = put(tmp_path, "policy_model", 0, "0_10")
    path.write_bytes(path.read_bytes()[:-1])
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1)
    with pytest.raises(CheckpointInvalid):
        read(found)


def test_a_file_linked_into_place_is_read(tmp_path):
    path = put(tmp_path, "policy_model", 0, "0_10")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1)
    assert read(found)["policy_model"].keys() == {"w"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"last_epoch": 1, "last_step": 2}',
        b'{"last_epoch": "1", "last_step": 2, "last_ckpt_file": "f"}',
        b'{"last_epoch": true, "last_step": 2, "last_ckpt_file": "f"}',
        b'{"last_epoch": -1, "last_step": 2, "last_ckpt_file": "f"}',
        b'{"last_epoch": 1, "last_step": 2, "last_ckpt_file": "../f"}',
        b'{"last_epoch": 1, "last_step": 2, "last_ckpt_file": ""}',
        b"[" * 5000,
        b" " * 70000,
    ],
)
def test_a_meta_json_that_cannot_be_understood_is_told_in_one_line(content):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_meta(content)


def test_a_prefix_of_a_later_start_of_mindformers_counts_before_the_first_one(tmp_path):
    first = put(tmp_path, "policy_model", 0, "0_10")
    later = first.with_name("policy_model_rank_0_1-0_10.safetensors")
    later.write_bytes(first.read_bytes())
    first.with_name("meta.json").write_text('{"last_epoch": 0, "last_step": 10, "last_ckpt_file": "gone"}')
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1)
    assert found.files["policy_model"] == (later,)


def test_a_position_that_was_rejected_is_passed_over(tmp_path):
    for position in ("0_10", "0_20"):
        put(tmp_path, "policy_model", 0, position)
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1, skip=[Position(0, 20)])
    assert found.position == Position(0, 10)


def test_a_checkpoint_of_ours_that_was_never_committed_does_not_count(tmp_path):
    theirs = put(tmp_path, "policy_model", 0, "0_10")
    (theirs.parent / "policy_model.1_rank_0-0_10.safetensors").write_bytes(b"ours, unfinished")
    put(tmp_path, "policy_model", 0, "0_20")
    found = find_foreign(folders(tmp_path, "policy_model"), world_size=1, skip=[Position(0, 20)])
    assert found.files["policy_model"] == (theirs,)
