"""Journals of every format version that was ever released go on being read, and are made the same."""

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from journal_case import assert_same_chunk

from rollforward.position import Position
from rollforward.replay.codec import unpack, unpack_outcome
from rollforward.storage import LocalStorage
from rollforward.store.journal.reading import read_journal, read_record

GOLDEN = Path(__file__).parents[1] / "golden" / "journal"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden_journal", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_1_reads_back(make: ModuleType) -> None:
    view = read_journal([LocalStorage(GOLDEN / "version_1")], rank=0, since=Position(0, 0))
    assert not view.problems
    assert not view.torn
    assert len(view.rollouts) == 6
    for (position, number), place in view.rollouts.items():
        assert_same_chunk(unpack(read_record(place)), make.chunk(2 * position.step + number))
    for (position, _), place in view.outcomes.items():
        found, expected = unpack_outcome(read_record(place)), make.outcome(position.step)
        assert (found.loss, found.grad_norm, found.kl) == (expected.loss, expected.grad_norm, expected.kl)
        assert (found.learning_rate, found.weights) == (1e-3, "feed" * 8)
    assert view.header is not None
    assert view.header.identity == make.identity(2)
    assert view.lineage == {1: Position(0, 3), 2: None}


def test_version_1_is_written_byte_for_byte_as_before(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    golden = {
        path.relative_to(GOLDEN / "version_1"): path for path in (GOLDEN / "version_1").rglob("*.journal")
    }
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*.journal")}
    assert made.keys() == golden.keys()
    assert len(made) == 4
    for name, path in made.items():
        assert path.read_bytes() == golden[name].read_bytes(), name


def read_as_described(path: Path) -> list[tuple[dict[str, str], dict[str, np.ndarray]]]:
    """A reader written from docs/reference/journal.md, with none of our code."""
    content, records, salt, offset = path.read_bytes(), [], bytes(16), 0
    while offset < len(content):
        assert content[offset : offset + 8] == b"\x93RFWDJ1\n"
        length, _ = struct.unpack_from("<QQ", content, offset + 8)
        digest = content[offset + 24 : offset + 40]
        payload = content[offset + 40 : offset + 40 + length]
        covered = salt + content[offset + 8 : offset + 24] + payload
        assert xxhash.xxh3_128_digest(covered) == digest
        salt = digest if offset == 0 else salt
        offset += 40 + length
        header = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + header])["__metadata__"]
        records.append((metadata, safetensors.numpy.load(payload)))
    return records


def test_the_description_of_the_format_is_enough_to_read_it() -> None:
    folder = GOLDEN / "version_1" / "journal" / "rank_0"
    records = read_as_described(folder / "1-0_0.journal")
    assert [metadata["kind"] for metadata, _ in records] == ["segment", "rollouts", "rollouts", "outcome"]
    assert json.loads(records[0][0]["segment"])["run_id"] == "golden"
    arrays = records[2][1]
    assert records[2][0]["position"] == "0_0"
    ends = np.cumsum(arrays["completion_lengths"])
    assert arrays["completion_ids"][ends[1] : ends[2]].tolist() == [160_001, 180_001, 200_001, 220_001]
    assert arrays["prompt_lengths"][arrays["prompt_of"]].tolist() == [3, 3, 1, 1]
    assert records[3][1]["learning_rate"] == 1e-3
    assert json.loads(read_as_described(folder / "2-0_1.journal")[0][0]["segment"])["inherits"] == [
        [1, "0_3"]
    ]
