"""Checkpoints of every format version that was ever released go on being read, and are made the same."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from rollforward.storage import LocalStorage
from rollforward.store import find, list_checkpoints, read_attachments, read_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "store"
VERSIONS = [1, 2]


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_golden_store", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_is_a_golden_folder_for_every_version(make):
    assert sorted(make.TENSORS) == VERSIONS
    assert sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__") == [
        f"version_{version}" for version in VERSIONS
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_it_reads_back(make, version):
    storage = LocalStorage(GOLDEN / f"version_{version}")
    assert [(item.position.step, item.valid) for item in list_checkpoints(storage, deep=True)] == [
        (20, True),
        (10, True),
    ]
    manifest = find(storage).manifest
    assert manifest.version == version
    assert manifest.metrics == {}
    assert read_attachments(storage, manifest) == {"config.json": b'{"model_type": "qwen2"}\n'}
    expected = make.TENSORS[version](20)
    for role, name, array in read_tensors(storage, manifest):
        assert array.dtype == expected[role][name].dtype
        assert np.array_equal(array, expected[role].pop(name))
    assert not any(expected.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_written_byte_for_byte_as_before(make, tmp_path, monkeypatch, version):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.make(version)
    written = files_in(tmp_path / f"version_{version}")
    # Attachments lie there twice by now; what was there before is as it was.
    twice = {path: content for path, content in written.items() if path.parts[0].endswith(".copy")}
    assert {path: written[path] for path in written.keys() - twice} == files_in(GOLDEN / f"version_{version}")
    assert twice
    assert all(written[path.parent.with_suffix("") / path.name] == twice[path] for path in twice)
