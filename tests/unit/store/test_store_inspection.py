"""Verifying, comparing and pruning by hand."""

import numpy as np
import pytest
from simulated_disk import SimulatedDisk

from rollforward.inspection.comparing import diff
from rollforward.inspection.verifying import bytes_to_verify, verify_checkpoints
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, list_checkpoints, load_manifest
from rollforward.store.pruning import plan, prune


@pytest.fixture
def storage():
    return LocalStorage("/run", SimulatedDisk())


def save(storage, step, tensors, **options):
    return (
        CheckpointStore(storage, retention=Retention(newest=0), **options)
        .save(Position(0, step), tensors, global_step=step, run_id="r", incarnation=1, state={})
        .manifest
    )


def arrays(value, size=4):
    return {"policy_model": {"w": np.full(size, value, np.float32)}, "ref": {"w": np.ones(3, np.float32)}}


def test_verify_reads_every_byte_and_names_what_is_wrong(storage):
    for step in (1, 2, 3):
        save(storage, step, arrays(step))
    path = "/run/train/rank_0/policy_model_rank_0-0_2.safetensors"
    content = bytearray(storage._ops.tree()[path])
    content[-1] ^= 1
    storage.write(path.removeprefix("/run/"), [content])
    seen = []
    verdicts = list(verify_checkpoints(storage, progress=seen.append))
    assert [(item.position.step, bool(item.reason)) for item in verdicts] == [
        (3, False),
        (2, True),
        (1, False),
    ]
    assert "policy_model_rank_0-0_2.safetensors: tensor 'w'" in verdicts[1].reason
    assert sum(seen) == sum(item.bytes_read for item in verdicts)
    assert bytes_to_verify(storage) >= sum(seen)
    assert [item.position.step for item in verify_checkpoints(storage, only=Position(0, 1))] == [1]


def test_equal_checkpoints_do_not_differ(storage):
    one, other = save(storage, 1, arrays(1)), save(storage, 2, arrays(1))
    assert diff(storage, one, storage, other) == []


def test_every_kind_of_difference_is_told(storage):
    a = {
        "policy_model": {
            "same": np.ones(2),
            "values": np.array([3.0, 4.0, 0.0, np.nan, np.inf]),
            "shape": np.ones(2),
            "gone": np.ones(1),
        }
    }
    b = {
        "policy_model": {
            "same": np.ones(2),
            "values": np.array([3.0, 4.5, 0.0, np.nan, np.inf]),
            "shape": np.ones((1, 2)),
            "new": np.ones(1),
        }
    }
    found = {item.name: item for item in diff(storage, save(storage, 1, a), storage, save(storage, 2, b))}
    assert {name: item.what for name, item in found.items()} == {
        "gone": "only in A",
        "new": "only in B",
        "shape": "dtype or shape",
        "values": "values",
    }
    assert (found["values"].elements, found["values"].largest) == (1, 0.5)
    assert found["values"].relative == pytest.approx(0.1)


def test_a_new_nan_is_a_difference(storage):
    one = save(storage, 1, {"policy_model": {"w": np.array([1.0, 2.0])}})
    other = save(storage, 2, {"policy_model": {"w": np.array([1.0, np.nan])}})
    (found,) = diff(storage, one, storage, other)
    assert found.elements == 1
    assert np.isnan(found.largest)


def every_file(storage):
    """What of a run's folder takes most of its space; manifests and meta.json are left out."""
    kinds = ("train", "optimizer", "ref", "tables")
    folders = [f"{kind}/rank_{rank}" for kind in kinds for rank in (0, 1)]
    return [entry for folder in folders for entry in storage.scan(folder) if entry.name != "meta.json"]


def test_pruning_does_what_it_said_and_clears_what_was_left(storage):
    for step in range(1, 6):
        save(storage, step, arrays(step))
    storage.write("optimizer/rank_1/optimizer_rank_1-0_9.safetensors", [b"half"])
    before = sum(entry.size for entry in every_file(storage))
    planned = plan(storage, Retention(newest=2, every=2))
    assert [(item.what, item.name) for item in planned] == [
        ("checkpoint", "0_1"),
        ("checkpoint", "0_3"),
        ("file", "optimizer/rank_1/optimizer_rank_1-0_9.safetensors"),
    ]
    assert len(list_checkpoints(storage)) == 5
    assert prune(storage, Retention(newest=2, every=2)) == []
    assert [item.position.step for item in list_checkpoints(storage, deep=True) if item.valid] == [5, 4, 2]
    names = [entry.name for entry in storage.scan("train/rank_0") if entry.name.startswith("policy")]
    assert names == [f"policy_model_rank_0-0_{step}.safetensors" for step in (2, 4, 5)]
    assert storage.scan("optimizer/rank_1") == []
    freed = before - sum(entry.size for entry in every_file(storage))
    assert freed == sum(item.size for item in planned)
    assert plan(storage, Retention(newest=2, every=2)) == []


def test_pruning_keeps_what_a_kept_checkpoint_took_over(storage):
    first = save(storage, 1, arrays(1))
    save(storage, 2, arrays(2), previous=first)
    prune(storage, Retention(newest=1))
    assert [item.valid for item in list_checkpoints(storage, deep=True)] == [True]
    assert load_manifest(storage, Position(0, 2)).generations() == {
        ("policy_model", Position(0, 2), 0),
        ("ref", Position(0, 1), 0),
        ("tables", Position(0, 2), 0),
    }
