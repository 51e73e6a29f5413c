"""Tables: what is dumped is parsed, what is damaged or breaks a rule is rejected."""

import json
from dataclasses import replace

import pytest

from rollforward.boxes import BLOCK_BYTES
from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.store import table as tables
from rollforward.store.digests import digest
from rollforward.store.table import FileRecord, StoredPiece, Table
from rollforward.store.tensorfile import TensorRecord

D, E = "0" * 32, "1" * 32
PATH = "tables/rank_1/table_rank_1-0_20.json"
LARGE = BLOCK_BYTES // 4


def example() -> Table:
    files = {
        "policy_model": FileRecord("train/rank_1/policy_model_rank_1-0_20.safetensors", 1 << 26, D),
        "optimizer": FileRecord("optimizer/rank_1/optimizer.2_rank_1-0_10.safetensors", 5000, E),
        "critic": FileRecord("critic/rank_1/critic_rank_1-0_20.safetensors", 4096, D),
    }
    large = TensorRecord("large", "F32", (3, LARGE), 4096, 4096 + 12 * LARGE, D + E + D)
    rows = TensorRecord("m", "BF16", (2, 3), 4096, 4108, E)
    pieces = [
        StoredPiece.of_whole("policy_model", large),
        StoredPiece("optimizer", rows, "m", (5, 3), (1, 0)),
        StoredPiece("optimizer", replace(rows, name="again", begin=4108, end=4120), "m", (5, 3), (3, 0)),
        StoredPiece.of_whole("optimizer", TensorRecord("é", "F64", (), 4120, 4128, D)),
    ]
    return tables.make(1, Position(0, 20), files, reversed(pieces))


def seal(body: bytes) -> bytes:
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def test_what_is_dumped_parses_to_the_same():
    table = example()
    assert [piece.record.name for piece in table.pieces] == ["large", "m", "again", "é"]
    assert tables.parse(tables.dump(table), PATH) == table


def test_in_short_it_tells_its_files_and_the_tensors_that_begin_in_it():
    table = example()
    content = tables.dump(table)
    assert tables.summarise(content, PATH) == (list(table.files.values()), table.begun)
    assert len(table.begun) == 2, "large and é; of m it has rows 1 to 4"
    with pytest.raises(CheckpointInvalid):
        tables.summarise(content[:200], PATH)


def test_every_single_flipped_bit_is_found():
    content = tables.dump(example())
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << (index % 8)
        with pytest.raises(CheckpointInvalid):
            tables.parse(bytes(damaged), PATH)


def test_every_truncation_is_found():
    content = tables.dump(example())
    for length in range(len(content)):
        with pytest.raises(CheckpointInvalid):
            tables.parse(content[:length], PATH)


def edited(change) -> bytes:
    value = json.loads(tables.dump(example()))
    del value["digest"]
    change(value)
    return seal(json.dumps(value).encode()[:-1])


def put(kind, row, place, item):
    return lambda value: value[kind][row].__setitem__(place, item)


EDITS = {
    "a path upwards": put("files", 0, 0, "train/rank_1/../../../etc/passwd"),
    "an absolute path": put("files", 0, 0, "/etc/passwd"),
    "another rank's file": put("files", 0, 0, "train/rank_0/policy_model_rank_0-0_20.safetensors"),
    "a table": put("files", 0, 0, PATH),
    "two files of a role": lambda v: v["files"].append(v["files"][2]),
    "files out of order": lambda v: v["files"].reverse(),
    "a negative size": put("files", 0, 1, -1),
    "a digest of a file that is none": put("files", 0, 2, "z" * 32),
    "another rank": lambda v: v.__setitem__("rank", 0),
    "a rank below 0": lambda v: v.__setitem__("rank", -1),
    "another format": lambda v: v.__setitem__("format", "rollforward checkpoint"),
    "another version": lambda v: v.__setitem__("version", 2),
    "a version that is a bool": lambda v: v.__setitem__("version", True),
    "a position that is none": lambda v: v.__setitem__("position", "0_020"),
    "a key too many": lambda v: v.__setitem__("extra", 1),
    "a key too few": lambda v: v.pop("rank"),
    "pieces that are an object": lambda v: v.__setitem__("pieces", {}),
    "a piece in no file": put("pieces", 0, 0, 3),
    "a piece in file -1": put("pieces", 0, 0, -1),
    "a name that is none": put("pieces", 1, 1, 7),
    "an unknown dtype": put("pieces", 1, 2, "F33"),
    "another shape than its bytes": put("pieces", 1, 3, [3, 3]),
    "a negative begin": put("pieces", 1, 4, -4),
    "beyond the end of its file": lambda v: v["files"][1].__setitem__(1, 4127),
    "a digest too few": put("pieces", 0, 6, D + E),
    "a digest too many": put("pieces", 1, 6, D + E),
    "no digest": put("pieces", 1, 6, ""),
    "a digest that is none": put("pieces", 1, 6, "Z" * 32),
    "a piece of no tensor": put("pieces", 1, 7, ""),
    "a piece beyond its tensor": put("pieces", 1, 9, [4, 0]),
    "a piece before its tensor": put("pieces", 1, 9, [-1, 0]),
    "an offset of other axes": put("pieces", 1, 9, [1]),
    "a global shape of other axes": put("pieces", 1, 8, [5, 3, 1]),
    "an absurd global shape": put("pieces", 1, 8, [1 << 60, 3]),
    "an entry too short": lambda v: v["pieces"][1].pop(),
    "a tensor that it says to begin and does not": lambda v: v.__setitem__("begun", v["begun"] + "0" * 16),
    "a tensor that begins unsaid": lambda v: v.__setitem__("begun", v["begun"][16:]),
    "a name that is cut": lambda v: v.__setitem__("begun", v["begun"][1:]),
    "names that are none": lambda v: v.__setitem__("begun", []),
    "a name twice": put("pieces", 2, 1, "m"),
    "pieces out of order": lambda v: v["pieces"].reverse(),
}


@pytest.mark.parametrize("why", EDITS)
def test_an_edited_table_with_a_fresh_digest_is_rejected(why):
    with pytest.raises(CheckpointInvalid) as caught:
        tables.parse(edited(EDITS[why]), PATH)
    assert caught.value.message.startswith(f"{PATH}: ")
    assert "\n" not in caught.value.message


def test_the_edits_are_rejected_for_the_edit():
    assert tables.parse(edited(len), PATH) == example()


def test_a_table_of_too_many_pieces_is_refused_before_it_is_written(monkeypatch):
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 500)
    with pytest.raises(ValueError, match="the table of rank 1 takes"):
        tables.dump(example())
