"""Checkpoints of every format version that was ever released go on being read, and are made the same."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import (
    CheckpointStore,
    Retention,
    find,
    list_checkpoints,
    read_attachments,
    read_tensors,
)
from rollforward.store.pruning import prune

GOLDEN = Path(__file__).parents[2] / "golden" / "store"
VERSIONS = [1, 2, 3]


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


def test_todays_version_is_written_byte_for_byte_as_before(make, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    assert [path.name for path in tmp_path.iterdir()] == ["version_3"], "earlier ones are read, not written"
    assert files_in(tmp_path / "version_3") == files_in(GOLDEN / "version_3")


@pytest.mark.parametrize(("version", "role"), [(1, "ref"), (2, "critic")])
def test_a_run_of_an_earlier_version_goes_on_in_its_folder(make, tmp_path, version, role):
    """What has not changed since is taken over; both checkpoints stay readable."""
    shutil.copytree(GOLDEN / f"version_{version}", tmp_path, dirs_exist_ok=True)
    storage = LocalStorage(tmp_path)
    store = CheckpointStore(storage, previous=find(storage).manifest, retention=Retention(newest=0))
    about = {"global_step": 30, "run_id": "golden", "incarnation": 2, "state": {}}
    saved = store.save(Position(0, 30), make.TENSORS[version](30), **about)
    assert (role, Position(0, 10), 0) in saved.manifest.generations()
    found = list_checkpoints(storage, deep=True)
    assert [(item.manifest.version, item.reason) for item in found] == [(3, ""), (version, ""), (version, "")]
    stored = {(role, name): array for role, name, array in read_tensors(storage, saved.manifest)}
    for each, named in make.TENSORS[version](30).items():
        assert all(np.array_equal(stored[each, name], array) for name, array in named.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_pruning_knows_what_an_earlier_version_needs(tmp_path, version):
    shutil.copytree(GOLDEN / f"version_{version}", tmp_path, dirs_exist_ok=True)
    storage = LocalStorage(tmp_path)
    assert prune(storage, Retention(newest=1)) == []
    assert [(item.position.step, item.reason) for item in list_checkpoints(storage, deep=True)] == [(20, "")]


def test_the_same_tensors_have_the_same_digest_in_every_version(make, tmp_path):
    for version in VERSIONS[:-1]:
        storage = LocalStorage(tmp_path / f"{version}")
        about = {"global_step": 20, "run_id": "golden", "incarnation": 1, "state": {}}
        saved = CheckpointStore(storage).save(Position(0, 20), make.TENSORS[version](20), **about)
        golden = find(LocalStorage(GOLDEN / f"version_{version}")).manifest
        assert saved.manifest.role_digests() == golden.role_digests()
