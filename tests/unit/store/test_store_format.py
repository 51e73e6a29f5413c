"""docs/reference/format.md is enough to write a reader from: this one imports nothing of ours."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

GOLDEN = Path(__file__).parents[2] / "golden" / "store"
RUN = GOLDEN / "version_1"
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "BOOL": "?", "I8": "i1", "U8": "u1"}
DTYPES |= {"I32": "<i4", "BF16": "<u2", "F8_E4M3": "u1"}
"""The last two as raw bits."""
BLOCK = 4 << 20


def digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def check_end(content: bytes) -> str:
    assert content[-46:-35] == b',"digest":"'
    assert content[-35:-3].decode() == digest(content[:-46])
    return content[-35:-3].decode()


def newest(run: Path) -> dict:
    manifests = [path.read_bytes() for path in (run / "commits").iterdir()]
    for content in manifests:
        check_end(content)
    values = [json.loads(content) for content in manifests]
    return max(values, key=lambda value: (value["incarnation"], *map(int, value["position"].split("_"))))


def read(run: Path, manifest: dict) -> dict:
    found = {}
    digests: dict[int, list] = {}
    for role, name, dtype, shape, layout, file, begin, end, expected in manifest["tensors"]:
        assert layout == "replicated"
        data = (run / manifest["files"][file][0]).read_bytes()[begin:end]
        assert digest(data) == expected
        found[role, name] = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
        digests.setdefault(file, []).append((begin, end, name, expected))
    for number, (path, size, expected) in enumerate(manifest["files"]):
        content = (run / path).read_bytes()
        front = content[: 8 + int.from_bytes(content[:8], "little")]
        assert (len(content), len(front) % 4096) == (size, 0)
        parts = [digest(front), *(item[3] for item in sorted(digests.get(number, [])))]
        assert digest(b"".join(map(bytes.fromhex, parts))) == expected
    for role, expected in manifest["roles"].items():
        rows = sorted(row for row in manifest["tensors"] if row[0] == role)
        lines = [json.dumps([row[1], row[2], row[3], row[8]], separators=(",", ":")) for row in rows]
        assert digest("\n".join(lines).encode()) == expected
    return found


def line_of(*items) -> bytes:
    return json.dumps(items, separators=(",", ":"), ensure_ascii=False).encode()


def blocks_of(shape: list[int], offset: list[int], size: int) -> list[tuple[int, int]]:
    """The first row of each block of a piece, and how many rows it has."""
    if not shape or 0 in shape:
        return [(offset[0] if offset else 0, shape[0] if shape else 1)]
    rows = max(1, BLOCK // (size * int(np.prod(shape[1:], dtype=int))))
    first, last = offset[0], offset[0] + shape[0]
    cuts = sorted({first, last, *(row for row in range(0, last, rows) if row > first)})
    return [(begin, end - begin) for begin, end in pairwise(cuts)]


def read_pieces(run: Path, manifest: dict) -> dict:
    """Version 3: every table, every piece, put together."""
    found, counts, sums, begun = {}, {}, dict.fromkeys(manifest["roles"], 0), []
    position = manifest["position"]
    for rank, (size, expected, sizes) in enumerate(manifest["tables"]):
        attempt = f".{manifest['attempt']}" if manifest["attempt"] else ""
        content = (run / f"tables/rank_{rank}/table{attempt}_rank_{rank}-{position}.json").read_bytes()
        assert (len(content), check_end(content)) == (size, expected)
        table = json.loads(content)
        assert (table["rank"], table["position"], table["version"]) == (rank, position, 3)
        digests = [[] for _ in sizes]
        for number, name, dtype, shape, begin, end, digits, *box in table["pieces"]:
            role = list(manifest["roles"])[number]
            tensor, whole, offset = box or (name, shape, [0] * len(shape))
            data = (run / table["files"][number][0]).read_bytes()[begin:end]
            array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
            into = found.setdefault((role, tensor), np.zeros(whole, DTYPES[dtype]))
            place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            into[place] = array
            counts.setdefault((role, tensor), np.zeros(whole, int))[place] += 1
            at, itemsize = 0, array.itemsize
            for first, rows in blocks_of(shape, offset, itemsize):
                part = [rows, *shape[1:]] if shape else []
                length = int(np.prod(part, dtype=int)) * itemsize
                one = digits[:32]
                digits = digits[32:]
                assert digest(data[at : at + length]) == one
                at += length
                digests[number].append(one)
                start = [first, *offset[1:]] if shape else []
                sums[role] += int(digest(line_of(tensor, dtype, whole, start, part, one)), 16)
            assert digits == ""
            if not any(offset):
                begun.append((rank, role, tensor))
        for number, (path, length, expected) in enumerate(table["files"]):
            content = (run / path).read_bytes()
            front = content[: 8 + int.from_bytes(content[:8], "little")]
            assert len(content) == length == sizes[number]
            parts = [digest(front), *digests[number]]
            assert digest(b"".join(map(bytes.fromhex, parts))) == expected
        mine = sorted((role, tensor) for other, role, tensor in begun if other == rank)
        assert table["begun"] == "".join(digest(line_of(*each))[:16] for each in mine)
    assert all((count == 1).all() for count in counts.values())
    for role, (_, _, tensors, expected, _) in manifest["roles"].items():
        assert tensors == sum(1 for _, other, _ in begun if other == role)
        assert f"{sums[role] % (1 << 128):032x}" == expected
    return found


def test_a_reader_written_from_the_page_reads_tensors_in_pieces():
    run = GOLDEN / "version_3"
    manifest = newest(run)
    assert (manifest["version"], manifest["position"], manifest["world_size"]) == (3, "0_20", 3)
    found = read_pieces(run, manifest)
    moments = found["optimizer", "adam_m.model.embed_tokens.weight"]
    bits = np.arange(40, dtype=np.float32) + 0x3F80 + 20
    assert np.array_equal(moments, (bits / 3).reshape(8, 5))
    assert np.array_equal(found["optimizer", "columns"], np.arange(30).reshape(3, 10) * 20)
    assert np.array_equal(found["optimizer", "adam_v.model.norm.weight"], np.full(4, 2.5))
    assert found["optimizer", "global_step"] == 20
    assert found["frozen", "large"].shape == (70, 16384), "of two blocks"
    assert found["frozen", "large"][63, 3] == 9
    assert manifest["roles"]["frozen"][0] == "0_10", "not written again"
    assert {role: entry[4] for role, entry in manifest["roles"].items()} == {
        "policy_model": 0,
        "optimizer": 6,
        "frozen": 0,
    }


def test_a_reader_written_from_the_page_reads_the_golden_checkpoint():
    manifest = newest(RUN)
    assert manifest["position"] == "0_20"
    found = read(RUN, manifest)
    assert found["optimizer", "global_step"] == 20
    assert found["policy_model", "model.embed_tokens.weight"].shape == (6, 4)
    assert np.array_equal(found["ref", "model.embed_tokens.weight"], np.ones((6, 4), np.float32))
    for path, size, expected in manifest["attachments"]:
        content = (RUN / path).read_bytes()
        assert (len(content), digest(content)) == (size, expected)


def test_it_reads_roles_that_have_any_name_too():
    manifest = newest(GOLDEN / "version_2")
    assert manifest["version"] == 2
    found = read(GOLDEN / "version_2", manifest)
    assert {role for role, _ in found} == {"policy_model", "critic", "value_head"}
    assert found["policy_model", "model.norm.weight"].tolist() == [0x3F80 + 20 + i for i in range(8)]
    for path, _, _ in manifest["files"]:
        folder, rank, name = path.split("/")
        role = "policy_model" if folder == "train" else folder
        assert name.startswith(f"{role}_{rank}-")


def test_meta_json_says_what_the_page_says():
    meta = json.loads((RUN / "ref" / "rank_0" / "meta.json").read_text())
    assert meta == {"last_epoch": 0, "last_step": 10, "last_ckpt_file": "ref_rank_0-0_10.safetensors"}
