"""Files of another trainer in a folder that became ours: never replaced, never removed."""

import numpy as np
import pytest

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, list_checkpoints
from rollforward.store.guests import adopt, read_guests
from rollforward.store.pruning import prune

STATE = {"policy_model": {"w": np.arange(6, dtype=np.float32)}, "optimizer": {"m": np.ones(2, np.float32)}}


def theirs(root):
    """What MindRLHF left: two positions, files named as ours are."""
    for folder, role in (("train", "policy_model"), ("optimizer", "optimizer")):
        for rank in range(2):
            where = root / folder / f"rank_{rank}"
            where.mkdir(parents=True)
            (where / "meta.json").write_text("{}")
            for position in ("0_10", "0_20"):
                (where / f"{role}_rank_{rank}-{position}.safetensors").write_text(f"{role} {rank} {position}")
    return {path: path.read_bytes() for path in root.rglob("*.safetensors")}


def save(store, step):
    STATE["policy_model"]["w"] += 1
    return store.save(
        Position(0, step), STATE, global_step=step, run_id="r", incarnation=1, state={}, fingerprint=""
    )


def test_they_are_neither_replaced_nor_removed_whatever_is_saved_and_pruned(tmp_path):
    before = theirs(tmp_path)
    assert adopt(LocalStorage(tmp_path)) == 4
    store = CheckpointStore(tmp_path, retention=Retention(newest=1))
    saved = save(store, 20)
    assert saved.manifest.files[0].path == "train/rank_0/policy_model.1_rank_0-0_20.safetensors"
    save(store, 21)
    save(CheckpointStore(tmp_path, retention=Retention(newest=1)), 22)
    prune(LocalStorage(tmp_path), Retention(newest=1))
    assert {path: path.read_bytes() for path in before} == before
    assert [str(info.position) for info in list_checkpoints(LocalStorage(tmp_path)) if info.valid] == ["0_22"]
    ours = [path.name for path in (tmp_path / "train/rank_0").glob("*.safetensors") if path not in before]
    assert ours == ["policy_model_rank_0-0_22.safetensors"]


def test_without_the_list_they_would_go(tmp_path):
    before = theirs(tmp_path)
    save(CheckpointStore(tmp_path), 20)
    assert not all(path.exists() for path in before)


def test_what_was_never_committed_is_no_guest(tmp_path):
    folder = tmp_path / "train/rank_0"
    folder.mkdir(parents=True)
    (folder / "policy_model_rank_0-0_0.safetensors").write_text("unfinished")
    assert adopt(LocalStorage(tmp_path)) == 0
    assert not (tmp_path / "guests.json").exists()


def test_the_list_is_made_once(tmp_path):
    theirs(tmp_path)
    adopt(LocalStorage(tmp_path))
    before = read_guests(LocalStorage(tmp_path))
    (tmp_path / "train/rank_0/policy_model_rank_0-0_30.safetensors").write_text("ours")
    adopt(LocalStorage(tmp_path))
    assert read_guests(LocalStorage(tmp_path)) == before


@pytest.mark.parametrize(
    "content", ["", "{}x", "[1]", '[["policy_model"]]', '[["policy_model", "x"]]', "[[1, 2]]"]
)
def test_a_list_that_cannot_be_understood_stops_before_anything_is_removed(tmp_path, content):
    before = theirs(tmp_path)
    (tmp_path / "guests.json").write_text(content)
    with pytest.raises(StorageError, match=r"guests\.json cannot be understood"):
        save(CheckpointStore(tmp_path), 30)
    assert {path: path.read_bytes() for path in before} == before
