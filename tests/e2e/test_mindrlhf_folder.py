"""A folder in MindRLHF's layout, written by MindSpore's own `save_checkpoint`: training goes on from it."""

import json
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from command import ARITHMETIC, PROGRAM, Command
from numpy.typing import NDArray

from rollforward.interop.names import to_theirs
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import load_manifest, read_tensors

SAVED = Position(0, 4)
TRAINED = "grpo_model_train.policy_model.model."


def tensors_at(run: Path, position: Position) -> dict[str, dict[str, NDArray[Any]]]:
    """The tensors of a checkpoint of ours, under MindFormers' names, as MindRLHF has them in memory."""
    storage = LocalStorage(run)
    roles: dict[str, dict[str, NDArray[Any]]] = {"policy_model": {}, "optimizer": {}, "ref": {}}
    for role, name, array in read_tensors(storage, load_manifest(storage, position)):
        roles[role][name] = array
    found = {
        role: dict(to_theirs(named, prefix=TRAINED if role != "ref" else "model.").tensors)
        for role, named in roles.items()
    }
    # MindSpore's optimizers hold the parameters that they train, and count in int32.
    found["optimizer"] |= found["policy_model"]
    found["optimizer"]["global_step"] = roles["optimizer"]["global_step"].astype(np.int32)
    found["policy_model"]["grpo_model_train.policy_model.kl_loss"] = np.zeros((), np.float32)
    return found


def save(run: Path, role: str, folder: str, tensors: dict[str, NDArray[Any]], extension: str) -> Path:
    """One file and its `meta.json`, whose end is left over from a longer one."""
    where = run / folder / "rank_0"
    where.mkdir(parents=True)
    path = where / f"{role}_rank_0-{SAVED}.{extension}"
    parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in tensors.items()]
    counters = {"epoch_num": SAVED.epoch, "step_num": SAVED.step}
    ms.save_checkpoint(parameters, str(path), append_dict=counters, format=extension)
    meta = {"last_epoch": SAVED.epoch, "last_step": SAVED.step, "last_ckpt_file": path.name}
    (where / "meta.json").write_text(json.dumps(meta) + 't"}')
    return path


def test_it_goes_on_there_with_the_same_bits_as_the_run_that_was_never_moved(
    whole: Command, tmp_path: Path
) -> None:
    moved = Command(
        tmp_path / "moved", program=[*PROGRAM, "train", f"--set=actor_config.load={ARITHMETIC / 'model'}"]
    )
    moved.take_graphs(whole)
    tensors = tensors_at(whole.run, SAVED)
    kept = [
        save(moved.run, "policy_model", "train", tensors["policy_model"], "ckpt"),
        save(moved.run, "optimizer", "optimizer", tensors["optimizer"], "ckpt"),
        save(moved.run, "ref", "ref", tensors["ref"], "safetensors"),
    ]
    said = moved.finish(resume=True)

    assert f"{SAVED} in {moved.run} is the newest complete one; it has no manifest" in said
    assert "meta.json: more follows after its JSON" in said
    assert "computed again: epoch_num, kl_loss, step_num" in said
    assert f"training: resumes at step {SAVED} (5 of 6)" in said
    assert moved.newest()["digests"] == whole.newest()["digests"]
    assert moved.figures() == whole.figures()[4:]
    assert all(path.is_file() for path in kept)
