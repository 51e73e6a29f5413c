"""Checkpoints of every format version that was ever released go on being read, and are made the same."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from rollforward.storage import LocalStorage
from rollforward.store import find, list_checkpoints, read_attachments, read_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "store"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_golden_store", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_1_reads_back(make):
    storage = LocalStorage(GOLDEN / "version_1")
    assert [(item.position.step, item.valid) for item in list_checkpoints(storage, deep=True)] == [
        (20, True),
        (10, True),
    ]
    manifest = find(storage).manifest
    assert manifest.metrics == {}
    assert read_attachments(storage, manifest) == {"config.json": b'{"model_type": "qwen2"}\n'}
    expected = make.tensors(20)
    for role, name, array in read_tensors(storage, manifest):
        assert array.dtype == expected[role][name].dtype
        assert np.array_equal(array, expected[role].pop(name))
    assert not any(expected.values())


def test_version_1_is_written_byte_for_byte_as_before(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    committed = {
        path.relative_to(GOLDEN / "version_1"): path.read_bytes()
        for path in (GOLDEN / "version_1").rglob("*")
        if path.is_file()
    }
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert made == committed
