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
from rollforward.store.journal import records
from rollforward.store.journal.reading import JournalView, read_journal, read_journals
from rollforward.store.journal.segments import read_record
from rollforward.store.journal.writing import Journal

GOLDEN = Path(__file__).parents[1] / "golden" / "journal"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden_journal", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_content(view: JournalView, make: ModuleType) -> None:
    """What all versions hold."""
    assert not view.problems
    assert not view.torn
    assert len(view.rollouts) == 6
    for (position, number), place in view.rollouts.items():
        assert_same_chunk(unpack(read_record(place)), make.chunk(2 * position.step + number))
    assert len(view.outcomes) == 2
    for (position, _), place in view.outcomes.items():
        found, expected = unpack_outcome(read_record(place)), make.outcome(position.step)
        assert (found.loss, found.grad_norm, found.kl) == (expected.loss, expected.grad_norm, expected.kl)
        assert (found.learning_rate, found.weights) == (1e-3, "feed" * 8)
    assert view.lineage == {1: Position(0, 3), 2: None}


@pytest.mark.parametrize("chunks_per_step", [None, 2])
def test_version_1_reads_back(make: ModuleType, chunks_per_step: int | None) -> None:
    storages = [LocalStorage(GOLDEN / "version_1")]
    view = read_journals(storages, since=Position(0, 0), chunks_per_step=chunks_per_step)
    assert_content(view, make)
    assert view.header is not None
    assert view.header.identity == make.identity(2, chunks=None)


@pytest.mark.parametrize("version", [2, 3])
def test_later_versions_read_back_from_the_folders_of_two_ranks(make: ModuleType, version: int) -> None:
    view = read_journals(
        [LocalStorage(GOLDEN / f"version_{version}")], since=Position(0, 0), chunks_per_step=2
    )
    assert_content(view, make)
    assert view.header is not None
    assert view.header.identity == make.identity(2)
    others = [header.identity for name, header in view.headers.items() if name.rank == 1]
    assert others == [make.identity(1, rank=1, world_size=2)] * 2


def test_version_3_is_written_byte_for_byte_as_before(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    golden = {
        path.relative_to(GOLDEN / "version_3"): path for path in (GOLDEN / "version_3").rglob("*.journal")
    }
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*.journal")}
    assert made.keys() == golden.keys()
    assert len(made) == 5
    for name, path in made.items():
        assert path.read_bytes() == golden[name].read_bytes(), name


def test_a_version_that_is_not_known_yet_is_said_to_be_so(make: ModuleType, tmp_path: Path) -> None:
    """And its segments stay as they are: no part of them counts as a torn write."""
    storage = LocalStorage(tmp_path)
    nothing = read_journal([storage], rank=0, since=Position(0, 0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(records, "FORMAT", 4)
        Journal(storage, make.identity(1), start=Position(0, 0), inherited=nothing).close()
    view = read_journal([storage], rank=0, since=Position(0, 0))
    assert "its format version is 4; the newest known here is 3" in view.problems[0]
    assert (view.torn, view.rollouts) == ((), {})


def read_as_described(path: Path) -> list[tuple[dict[str, str], dict[str, np.ndarray], int]]:
    """A reader written from docs/reference/journal.md, with none of our code."""
    content, found, salt, offset = path.read_bytes(), [], bytes(16), 0
    while offset < len(content):
        assert content[offset : offset + 8] == b"\x93RFWDJ1\n"
        length, _, unsynced = struct.unpack_from("<QII", content, offset + 8)
        digest = content[offset + 24 : offset + 40]
        payload = content[offset + 40 : offset + 40 + length]
        covered = salt + content[offset + 8 : offset + 24] + payload
        assert xxhash.xxh3_128_digest(covered) == digest
        salt = digest if offset == 0 else salt
        offset += 40 + length
        header = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + header])["__metadata__"]
        found.append((metadata, safetensors.numpy.load(payload), unsynced))
    return found


def test_the_description_of_the_format_is_enough_to_read_it() -> None:
    folder = GOLDEN / "version_3" / "journal"
    found = read_as_described(folder / "rank_1" / "1-0_0.journal")
    assert [metadata["kind"] for metadata, *_ in found] == ["segment", "rollouts", "outcome"]
    header = json.loads(found[0][0]["segment"])
    assert (header["run_id"], header["format"], header["chunks_per_step"]) == ("golden", 3, 2)
    arrays = found[1][1]
    assert (found[1][0]["position"], found[1][0]["chunk"]) == ("0_0", "1")
    ends = np.cumsum(arrays["completion_lengths"])
    assert arrays["completion_ids"][ends[1] : ends[2]].tolist() == [160_001, 180_001, 200_001, 220_001]
    assert arrays["prompt_lengths"][arrays["prompt_of"]].tolist() == [3, 3, 1, 1]
    assert found[2][1]["learning_rate"] == 1e-3
    header = json.loads(read_as_described(folder / "rank_0" / "2-0_1.journal")[0][0]["segment"])
    assert header["inherits"] == [[1, "0_3"]]
    behind = read_as_described(folder / "rank_0" / "1-0_1.journal")
    assert [metadata["kind"] for metadata, *_ in behind] == ["segment", "rollouts", "outcome", "rollouts"]
    assert [unsynced for *_, unsynced in behind] == [0, 0, 0, 1]
