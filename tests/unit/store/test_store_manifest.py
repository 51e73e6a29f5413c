import json
from dataclasses import replace

import pytest

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.store import manifest as manifests
from rollforward.store.digests import digest
from rollforward.store.manifest import Attachment, FileRecord, Manifest, StoredTensor
from rollforward.store.tensorfile import TensorRecord

D = "0" * 32
NAME = "0_20.json"


def example() -> Manifest:
    paths = [f"train/rank_{rank}/policy_model_rank_{rank}-0_20.safetensors" for rank in range(2)]
    paths += [f"ref/rank_{rank}/ref.1_rank_{rank}-0_10.safetensors" for rank in range(2)]
    return Manifest(
        incarnation=3,
        position=Position(0, 20),
        run_id="run",
        global_step=20,
        created="2026-01-31T12:00:00.000000Z",
        world_size=2,
        fingerprint="f",
        versions={"numpy": "1.26"},
        state={"n": [1, 2.5, None], "名": "é"},
        files=tuple(FileRecord(path, 4112, D) for path in paths),
        tensors=(
            StoredTensor("policy_model", paths[0], TensorRecord("a", "F32", (2,), 4096, 4104, D)),
            StoredTensor("policy_model", paths[1], TensorRecord("b", "F32", (), 4096, 4100, D)),
            StoredTensor("ref", paths[2], TensorRecord("a", "BF16", (4,), 4096, 4104, D)),
        ),
        attachments=(Attachment("model/config.json", 2, D), Attachment("model.1/tokenizer.json", 2, D)),
    )


def seal(body: bytes) -> bytes:
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def test_what_is_dumped_parses_to_the_same():
    content = manifests.dump(example())
    found = manifests.parse(content, NAME)
    assert found == example()
    assert found.digest == manifests.own_digest(content)
    assert manifests.peek_incarnation(content[:512]) == 3


def test_it_is_plain_json_for_everyone_else():
    value = json.loads(manifests.dump(example()))
    assert (value["position"], value["global_step"]) == ("0_20", 20)
    assert set(value["roles"]) == {"policy_model", "ref"}
    assert value["journal"] is None


def test_every_single_flipped_bit_is_found():
    content = manifests.dump(example())
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << (index % 8)
        with pytest.raises(CheckpointInvalid):
            manifests.parse(bytes(damaged), NAME)


def test_every_truncation_is_found():
    content = manifests.dump(example())
    for length in range(len(content)):
        with pytest.raises(CheckpointInvalid):
            manifests.parse(content[:length], NAME)


def test_a_manifest_under_another_positions_name_is_rejected():
    with pytest.raises(CheckpointInvalid, match="not what its file name says"):
        manifests.parse(manifests.dump(example()), "0_21.json")


def test_the_digests_of_roles_do_not_depend_on_how_tensors_lie_over_files():
    one = example()
    moved = tuple(
        replace(item, file=one.files[1].path) if item.role == "policy_model" else item for item in one.tensors
    )
    assert replace(one, tensors=moved, world_size=1).role_digests() == one.role_digests()


def edited(change) -> bytes:
    """A manifest that someone edited and sealed with a fresh digest, as only our checks can tell."""
    value = json.loads(manifests.dump(example()))
    del value["digest"]
    change(value)
    return seal(json.dumps(value).encode()[:-1])


def set_path(value, path):
    value["files"][0][0] = path


EDITS = {
    "a path upwards": lambda v: set_path(v, "train/rank_0/../../../etc/passwd"),
    "an absolute path": lambda v: set_path(v, "/etc/passwd"),
    "another rank's file": lambda v: set_path(v, v["files"][1][0]),
    "a file of a rank that is not there": lambda v: set_path(v, v["files"][0][0].replace("_0", "_7")),
    "a file that is not of tensors": lambda v: set_path(v, "run.lock"),
    "a path that is a number": lambda v: set_path(v, 7),
    "a negative size": lambda v: v["files"][0].__setitem__(1, -1),
    "a missing rank": lambda v: (v["files"].pop(3), v["tensors"].pop(2)),
    "an attachment outside": lambda v: v["attachments"].append(["commits/0_20.json", 1, D]),
    "an attachment upwards": lambda v: v["attachments"].append(["model/../x", 1, D]),
    "an attachment twice": lambda v: v["attachments"].append(v["attachments"][0]),
    "a tensor twice": lambda v: v["tensors"].append(v["tensors"][0]),
    "a tensor beyond its file": lambda v: v["tensors"][0].__setitem__(slice(6, 8), [4108, 4116]),
    "a tensor of another size": lambda v: v["tensors"][0].__setitem__(3, [3]),
    "a tensor of unknown dtype": lambda v: v["tensors"][0].__setitem__(2, "F33"),
    "a tensor in no file": lambda v: v["tensors"][0].__setitem__(5, 4),
    "a tensor in file -1": lambda v: v["tensors"][0].__setitem__(5, -1),
    "a tensor in another role's file": lambda v: v["tensors"][0].__setitem__(5, 2),
    "a tensor of unknown role": lambda v: v["tensors"][0].__setitem__(0, "reward"),
    "a tensor of unknown layout": lambda v: v["tensors"][0].__setitem__(4, "sharded"),
    "a digest that is none": lambda v: v["tensors"][0].__setitem__(8, "z" * 32),
    "another tensor's digest": lambda v: v["tensors"][0].__setitem__(8, "1" * 32),
    "a newer version": lambda v: v.__setitem__("version", 2),
    "another format": lambda v: v.__setitem__("format", "x"),
    "a key too many": lambda v: v.__setitem__("extra", 1),
    "a key too few": lambda v: v.pop("journal"),
    "a world of nobody": lambda v: v.__setitem__("world_size", 0),
    "a step that is a bool": lambda v: v.__setitem__("global_step", True),
    "a state that is a list": lambda v: v.__setitem__("state", []),
    "tensors that are an object": lambda v: v.__setitem__("tensors", {}),
    "a position that is none": lambda v: v.__setitem__("position", "0_020"),
}


@pytest.mark.parametrize("why", EDITS)
def test_an_edited_manifest_with_a_fresh_digest_is_rejected(why):
    with pytest.raises(CheckpointInvalid) as caught:
        manifests.parse(edited(EDITS[why]), NAME)
    assert "\n" not in caught.value.message


def test_the_edits_are_rejected_for_the_edit():
    manifests.parse(edited(len), NAME)


def test_what_the_reserved_key_holds_does_not_matter():
    assert manifests.parse(edited(lambda v: v.__setitem__("journal", {"segment": 1})), NAME) == example()


def test_a_duplicate_key_with_a_fresh_digest_is_rejected():
    body = manifests.dump(example())[:-46] + b',"position":"0_20"'
    with pytest.raises(CheckpointInvalid, match="appears twice"):
        manifests.parse(seal(body), NAME)


def test_peeking_at_anything_else_gives_nothing():
    for front in (b"", b"{", b'{"format":"rollforward checkpoint","version":1,"incarnation":', b"\xff" * 512):
        assert manifests.peek_incarnation(front) == 0


@pytest.mark.parametrize(
    ("state", "metrics"),
    [
        ({}, {}),
        ({"metrics": None}, {}),
        ({"metrics": [1.0]}, {}),
        ({"metrics": {"reward": 1, "kl": 0.5, "name": "x", "flag": True}}, {"reward": 1.0, "kl": 0.5}),
    ],
)
def test_only_numbers_are_metrics_and_there_need_be_none(state, metrics):
    assert replace(example(), state=state).metrics == metrics
