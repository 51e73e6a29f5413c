"""MindSpore itself, on both sides: it opens our files, and we resume what its save_checkpoint writes."""

import json

import numpy as np
import pytest
from held import Holding, spread
from lockstep import LockStep

from rollforward.interop.files import read_arrays
from rollforward.interop.folders import find_foreign
from rollforward.interop.names import Heads, to_ours, to_theirs
from rollforward.position import Position
from rollforward.store import CheckpointStore, find

ms = pytest.importorskip("mindspore")


def model(value):
    return {
        "model.embed_tokens.weight": np.full((6, 4), value, np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.full((4, 4), value + 1, np.float32),
        "model.norm.weight": np.full(4, value + 2, np.float32),
    }


def test_mindspore_opens_our_tensor_files(tmp_path):
    store = CheckpointStore(tmp_path)
    tensors = {"policy_model": model(3), "optimizer": {"global_step": np.array([7], np.int32)}}
    saved = store.save(Position(0, 7), tensors, global_step=7, run_id="r", incarnation=1, state={})
    for file in saved.manifest.files:
        found = ms.load_checkpoint(str(tmp_path / file.path), format="safetensors")
        expected = tensors["policy_model" if "policy" in file.path else "optimizer"]
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name].asnumpy(), expected[name]) for name in expected)


def test_mindspore_opens_each_rank_s_files_of_pieces(tmp_path):
    tensors = {"policy_model": model(3)}
    pieces = [spread(tensors, rank, 2, ["policy_model"]) for rank in range(2)]

    def work(rank, exchange):
        store = CheckpointStore(tmp_path, rank=rank, world_size=2, exchange=exchange)
        about = {"global_step": 7, "run_id": "r", "incarnation": 1, "state": {}}
        return store.save(Position(0, 7), Holding(tensors, rank, pieces[rank]), **about)

    saved, _ = LockStep(2).run(work)
    for rank, file in enumerate(saved.manifest.files):
        found = ms.load_checkpoint(str(tmp_path / file.path), format="safetensors")
        expected = Holding(tensors, rank, pieces[rank]).tensors()["policy_model"]
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name].asnumpy(), expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_folder_of_mindformers_resumes_under_our_names(tmp_path, form):
    for role, prefix in (("policy_model", "policy_model."), ("optimizer", "adam_m.policy_model.")):
        for rank in range(2):
            folder = tmp_path / role / f"rank_{rank}"
            folder.mkdir(parents=True)
            for step in (10, 20):
                name = f"{role}_rank_{rank}-1_{step}.{form}"
                theirs = to_theirs(model(step)).tensors
                records = [{"name": prefix + key, "data": ms.Tensor(array)} for key, array in theirs.items()]
                ms.save_checkpoint(records, str(folder / name), format=form)
                meta = {"last_epoch": 1, "last_step": step, "last_ckpt_file": name}
                # MindRLHF writes over the longer text of the epoch before.
                (folder / "meta.json").write_text(json.dumps(meta) + 'kpt"}')
    found = find_foreign({role: tmp_path / role for role in ("policy_model", "optimizer")}, world_size=2)
    assert found.position == Position(1, 20)
    read = {role: dict(read_arrays(paths[1])) for role, paths in found.files.items()}
    policy = to_ours(read["policy_model"], Heads(query_rows=4, key_rows=4, groups=1))
    moments = to_ours(read["optimizer"], Heads(query_rows=4, key_rows=4, groups=1))
    assert (policy.unmapped, moments.unmapped) == ((), ())
    for name, array in model(20).items():
        assert np.array_equal(policy.tensors[name], array)
        assert np.array_equal(moments.tensors[f"adam_m.{name}"], array)


def test_mindformers_rule_finds_our_newest_checkpoint(tmp_path):
    """The newest position that every rank's meta.json and file agree on."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        tensors = {"policy_model": model(step), "optimizer": {"m": np.array([step])}, "ref": model(0)}
        store.save(Position(0, step), tensors, global_step=step, run_id="r", incarnation=1, state={})
        store.previous = find(store.storage).manifest
    folders = {
        "policy_model": tmp_path / "train",
        "optimizer": tmp_path / "optimizer",
        "ref": tmp_path / "ref",
    }
    found = find_foreign(folders, world_size=1)
    assert found.position == Position(0, 3)
    assert found.files["ref"][0].name == "ref_rank_0-0_1.safetensors"
