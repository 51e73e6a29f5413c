"""Manifests: what is dumped is parsed, what is damaged or breaks a rule is rejected; of every version."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.store import manifest as manifests
from rollforward.store import versions
from rollforward.store.digests import digest
from rollforward.store.manifest import Attachment, Manifest, RankRecord, RoleRecord
from rollforward.store.sealing import own_digest

D = "0" * 32
NAME = "0_20.json"
GOLDEN = Path(__file__).parents[2] / "golden" / "store"


def example() -> Manifest:
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
        roles={
            "policy_model": RoleRecord(Position(0, 20), 0, 2, D, 4),
            "ref": RoleRecord(Position(0, 10), 1, 1, "1" * 32),
            "critic": RoleRecord(Position(0, 20), 0, 3, D),
        },
        attempt=2,
        ranks=(RankRecord(300, D, (4112, 4096, 5000)), RankRecord(301, "2" * 32, (4112, 4104, 0))),
        attachments=(Attachment("model/config.json", 2, D), Attachment("model.1/tokenizer.json", 2, D)),
    )


def seal(body: bytes) -> bytes:
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def test_what_is_dumped_parses_to_the_same():
    content = manifests.dump(example())
    found = versions.parse(content, NAME)
    assert found == example()
    assert found.digest == own_digest(content)
    assert manifests.peek_incarnation(content[:512]) == 3


def test_it_is_plain_json_for_everyone_else():
    value = json.loads(manifests.dump(example()))
    assert (value["version"], value["position"], value["global_step"]) == (3, "0_20", 20)
    assert value["roles"]["ref"] == ["0_10", 1, 1, "1" * 32, 0]
    assert value["tables"][1] == [301, "2" * 32, [4112, 4104, 0]]


def test_it_names_the_files_of_every_rank():
    assert [file.path for file in example().files] == [
        "train/rank_0/policy_model_rank_0-0_20.safetensors",
        "train/rank_1/policy_model_rank_1-0_20.safetensors",
        "ref/rank_0/ref.1_rank_0-0_10.safetensors",
        "ref/rank_1/ref.1_rank_1-0_10.safetensors",
        "critic/rank_0/critic_rank_0-0_20.safetensors",
        "critic/rank_1/critic_rank_1-0_20.safetensors",
    ]
    assert [file.path for file in example().table_files] == [
        "tables/rank_0/table.2_rank_0-0_20.json",
        "tables/rank_1/table.2_rank_1-0_20.json",
    ]
    assert example().size == 4112 + 4096 + 5000 + 4112 + 4104 + 601 + 4


def test_every_single_flipped_bit_is_found():
    content = manifests.dump(example())
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << (index % 8)
        with pytest.raises(CheckpointInvalid):
            versions.parse(bytes(damaged), NAME)


def test_every_truncation_is_found():
    content = manifests.dump(example())
    for length in range(len(content)):
        with pytest.raises(CheckpointInvalid):
            versions.parse(content[:length], NAME)


def test_a_manifest_under_another_positions_name_is_rejected():
    with pytest.raises(CheckpointInvalid, match="not what its file name says"):
        versions.parse(manifests.dump(example()), "0_21.json")


def edited(change) -> bytes:
    """A manifest that someone edited and sealed with a fresh digest, as only our checks can tell."""
    value = json.loads(manifests.dump(example()))
    del value["digest"]
    change(value)
    return seal(json.dumps(value).encode()[:-1])


def rename(value, role, name):
    value["roles"][name] = value["roles"].pop(role)


COMMON = {
    "an attachment outside": lambda v: v["attachments"].append(["commits/0_20.json", 1, D]),
    "an attachment upwards": lambda v: v["attachments"].append(["model/../x", 1, D]),
    "an attachment twice": lambda v: v["attachments"].extend([["model/a", 1, D]] * 2),
    "a newer version": lambda v: v.__setitem__("version", 4),
    "a version that is a bool": lambda v: v.__setitem__("version", True),
    "another format": lambda v: v.__setitem__("format", "x"),
    "a key too many": lambda v: v.__setitem__("extra", 1),
    "a key too few": lambda v: v.pop("run_id"),
    "a world of nobody": lambda v: v.__setitem__("world_size", 0),
    "a rank more": lambda v: v.__setitem__("world_size", 3),
    "a step that is a bool": lambda v: v.__setitem__("global_step", True),
    "a state that is a list": lambda v: v.__setitem__("state", []),
    "roles that are a list": lambda v: v.__setitem__("roles", []),
    "a position that is none": lambda v: v.__setitem__("position", "0_020"),
}
EDITS = COMMON | {
    "a role that is a folder of the run": lambda v: rename(v, "critic", "journal"),
    "a role upwards": lambda v: rename(v, "critic", "../x"),
    "roles out of order": lambda v: rename(v, "policy_model", "policy_model"),
    "a role of no position": lambda v: v["roles"]["ref"].__setitem__(0, "0_01"),
    "an attempt below 0": lambda v: v["roles"]["ref"].__setitem__(1, -1),
    "an attempt that no name has": lambda v: v.__setitem__("attempt", 10**6),
    "a number of tensors that is none": lambda v: v["roles"]["ref"].__setitem__(2, 1.0),
    "a digest of a role that is none": lambda v: v["roles"]["ref"].__setitem__(3, "z" * 32),
    "a number of cut pieces that is none": lambda v: v["roles"]["ref"].__setitem__(4, -1),
    "an entry too short": lambda v: v["roles"]["ref"].pop(),
    "a table less": lambda v: v["tables"].pop(),
    "tables that are an object": lambda v: v.__setitem__("tables", {}),
    "a negative size of a table": lambda v: v["tables"][0].__setitem__(0, -1),
    "a digest of a table that is none": lambda v: v["tables"][0].__setitem__(1, D[1:]),
    "a size too few": lambda v: v["tables"][0][2].pop(),
    "a size that is a text": lambda v: v["tables"][0][2].__setitem__(0, "1"),
}


@pytest.mark.parametrize("why", EDITS)
def test_an_edited_manifest_with_a_fresh_digest_is_rejected(why):
    with pytest.raises(CheckpointInvalid) as caught:
        versions.parse(edited(EDITS[why]), NAME)
    assert "\n" not in caught.value.message


def test_the_edits_are_rejected_for_the_edit():
    versions.parse(edited(len), NAME)


def test_a_duplicate_key_with_a_fresh_digest_is_rejected():
    body = manifests.dump(example())[:-46] + b',"position":"0_20"'
    with pytest.raises(CheckpointInvalid, match="appears twice"):
        versions.parse(seal(body), NAME)


def earlier(change=len, version=1) -> bytes:
    """The golden manifest of an earlier version, edited and sealed."""
    value = json.loads((GOLDEN / f"version_{version}" / "commits" / NAME).read_text())
    del value["digest"]
    change(value)
    return seal(json.dumps(value).encode()[:-1])


def set_path(value, path):
    value["files"][0][0] = path


def set_tensor(value, place, item):
    value["tensors"][0][place] = item


EARLIER = COMMON | {
    "a path upwards": lambda v: set_path(v, "train/rank_0/../../../etc/passwd"),
    "an absolute path": lambda v: set_path(v, "/etc/passwd"),
    "another role's file": lambda v: set_path(v, v["files"][1][0]),
    "a file of a rank that is not there": lambda v: set_path(v, v["files"][0][0].replace("_0", "_7")),
    "a file that is not of tensors": lambda v: set_path(v, "run.lock"),
    "a file of a folder that is no role's": lambda v: set_path(
        v, "journal/rank_0/journal_rank_0-0_20.safetensors"
    ),
    "a path that is a number": lambda v: set_path(v, 7),
    "a negative size": lambda v: v["files"][0].__setitem__(1, -1),
    "files that are an object": lambda v: v.__setitem__("files", {}),
    "tensors that are an object": lambda v: v.__setitem__("tensors", {}),
    "a tensor twice": lambda v: v["tensors"].append(v["tensors"][0]),
    "a tensor beyond its file": lambda v: v["files"][0].__setitem__(1, 4100),
    "a tensor of another size": lambda v: set_tensor(v, 3, [3]),
    "a tensor of unknown dtype": lambda v: set_tensor(v, 2, "F33"),
    "a tensor in no file": lambda v: set_tensor(v, 5, 4),
    "a tensor in file -1": lambda v: set_tensor(v, 5, -1),
    "a tensor in another role's file": lambda v: set_tensor(v, 5, 1),
    "a tensor of unknown role": lambda v: set_tensor(v, 0, "reward"),
    "a tensor of unknown layout": lambda v: set_tensor(v, 4, "sharded"),
    "a digest that is none": lambda v: set_tensor(v, 8, "z" * 32),
    "another tensor's digest": lambda v: set_tensor(v, 8, "1" * 32),
    "a version that its roles do not ask for": lambda v: v.__setitem__("version", 3 - v["version"]),
    "the keys of another version": lambda v: v.__setitem__("version", 3),
    "no reserved key": lambda v: v.pop("journal"),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("why", EARLIER)
def test_an_edited_manifest_of_an_earlier_version_is_rejected(why, version):
    with pytest.raises(CheckpointInvalid) as caught:
        versions.parse(earlier(EARLIER[why], version), NAME)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_reserved_key_holds_does_not_matter(version):
    found = versions.parse(earlier(version=version), NAME)
    assert versions.parse(earlier(lambda v: v.__setitem__("journal", {"segment": 1}), version), NAME) == found


def test_a_version_of_the_future_is_named():
    with pytest.raises(CheckpointInvalid, match="its version is 4; this program reads versions 1, 2, 3"):
        versions.parse(edited(EDITS["a newer version"]), NAME)


def test_peeking_at_anything_else_gives_nothing():
    for front in (b"", b"{", b'{"format":"rollforward checkpoint","version":3,"incarnation":', b"\xff" * 512):
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
