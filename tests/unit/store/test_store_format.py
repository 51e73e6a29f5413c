"""docs/reference/format.md is enough to write a reader from: this one imports nothing of ours."""

import json
from pathlib import Path

import numpy as np
import xxhash

GOLDEN = Path(__file__).parents[2] / "golden" / "store"
RUN = GOLDEN / "version_1"
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "BOOL": "?", "I8": "i1", "U8": "u1"}
DTYPES |= {"BF16": "<u2", "F8_E4M3": "u1"}
"""The last two as raw bits."""


def digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def newest(run: Path) -> dict:
    manifests = [path.read_bytes() for path in (run / "commits").iterdir()]
    for content in manifests:
        assert content[-46:-35] == b',"digest":"'
        assert content[-35:-3].decode() == digest(content[:-46])
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
