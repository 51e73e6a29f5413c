"""The doctor names each trouble of the contract's list, and says what to do."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from ckpt_writer import ckpt_bytes

import rollforward
from rollforward.cli.main import main
from rollforward.engines.base import Finding
from rollforward.inspection.doctor import (
    compare_names,
    examine,
    examine_environment,
    next_checkpoint_bytes,
)
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.position import Position
from rollforward.store import CheckpointStore

TENSORS = {
    "policy_model": {"a.weight": np.ones((3, 2), np.float32)},
    "optimizer": {"adam_m.a.weight": np.zeros((3, 2), np.float32)},
    "ref": {"a.weight": np.ones((3, 2), np.float32)},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two checkpoints."""
    store = CheckpointStore(tmp_path / "run")
    for step in (5, 10):
        for role in ("policy_model", "optimizer"):
            for array in TENSORS[role].values():
                array[0, 0] = step
        store.save(
            Position(0, step), TENSORS, global_step=step, run_id="r", incarnation=1, state={}, versions={}
        )
    return tmp_path / "run"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder as MindRLHF writes it: two ranks, no manifests."""
    for role, prefix in (("train", "policy_model"), ("optimizer", "optimizer"), ("ref", "ref")):
        for rank in range(2):
            folder = tmp_path / "foreign" / role / f"rank_{rank}"
            folder.mkdir(parents=True)
            write_foreign(folder, prefix, rank, 0, 20)
    return tmp_path / "foreign"


def write_foreign(folder: Path, prefix: str, rank: int, epoch: int, step: int) -> None:
    name = f"{prefix}_rank_{rank}-{epoch}_{step}.ckpt"
    (folder / name).write_bytes(ckpt_bytes({"a": np.ones(2, np.float32)}))
    meta = {"last_epoch": epoch, "last_step": step, "last_ckpt_file": name}
    (folder / "meta.json").write_text(json.dumps(meta))


def problems(findings: Sequence[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.level == "problem"]


def look(folder: Path) -> list[Finding]:
    return examine(name_checkpoint_folders(str(folder / "train"), str(folder / "ref"), folder))


def test_a_run_in_order_has_no_problem(run: Path, foreign: Path) -> None:
    for folder in (run, foreign):
        findings = look(folder)
        assert findings
        assert problems(findings) == []


def test_no_meta_json_shows_what_is_there_rank_by_rank(foreign: Path) -> None:
    (foreign / "train/rank_1/meta.json").unlink()
    (told,) = problems(look(foreign))
    assert told.startswith("policy, rank 1: no meta.json")
    assert "policy_model_rank_1-0_20.ckpt" in told


def test_meta_json_that_names_a_file_that_is_gone(foreign: Path) -> None:
    (foreign / "optimizer/rank_0/optimizer_rank_0-0_20.ckpt").unlink()
    (told,) = problems(look(foreign))
    assert "names optimizer_rank_0-0_20.ckpt, which is not there" in told


def test_meta_json_with_garbage_behind_it_is_a_note_and_no_problem(foreign: Path) -> None:
    path = foreign / "train/rank_0/meta.json"
    path.write_text(path.read_text() + '.ckpt"}')
    findings = look(foreign)
    assert problems(findings) == []
    assert any(finding.level == "note" and "ignored" in finding.text for finding in findings)


def test_a_missing_rank_and_a_missing_folder(foreign: Path) -> None:
    shutil.rmtree(foreign / "train/rank_0")
    shutil.rmtree(foreign / "ref")
    told = problems(look(foreign))
    assert any("has no folder for rank 0" in text for text in told)
    assert any("reference: " in text and "does not exist" in text for text in told)


def test_unequal_steps_between_ranks_and_roles(foreign: Path) -> None:
    write_foreign(foreign / "optimizer/rank_1", "optimizer", 1, 0, 15)
    (told,) = problems(look(foreign))
    assert "0_15: optimizer of rank 1" in told
    assert "0_20: policy of rank 0, policy of rank 1, optimizer of rank 0" in told


def test_a_reference_from_the_future(foreign: Path) -> None:
    write_foreign(foreign / "ref/rank_0", "ref", 0, 1, 3)
    (told,) = problems(look(foreign))
    assert "the reference (rank 0) stands at a later step" in told


def test_files_that_do_not_open(run: Path, foreign: Path) -> None:
    (foreign / "train/rank_0/policy_model_rank_0-0_20.ckpt").write_bytes(b"")
    assert any("an empty file" in text for text in problems(look(foreign)))
    path = run / "train/rank_0/policy_model_rank_0-0_10.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert any("policy, rank 0: " in text for text in problems(look(run)))


def test_one_flipped_bit_is_found_and_the_older_checkpoint_is_fine(run: Path) -> None:
    path = run / "train/rank_0/policy_model_rank_0-0_10.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    findings = look(run)
    (told,) = problems(findings)
    assert told.startswith("0_10: ")
    assert any(finding.text.startswith("0_5, saved") for finding in findings if finding.level == "ok")


def test_names_that_do_not_match_are_shown_with_the_nearest() -> None:
    text = compare_names("the policy", ["a.weight", "b.bias"], "the reference", ["a.weights", "b.bias"])
    assert "only in the policy: a.weight (nearest: a.weights)" in text
    assert "only in the reference: a.weights (nearest: a.weight)" in text
    assert compare_names("x", ["a"], "y", ["a"]) == ""


def test_the_names_that_mindrlhf_s_trainers_give_to_one_model_match(tmp_path: Path) -> None:
    layer = "model.layers.0.attention.wq.weight"
    for role, folder, names in (
        ("policy_model", "train", [f"policy_model.model.{layer}", "policy_model.kl_loss", "epoch_num"]),
        ("optimizer", "optimizer", [f"adam_m.policy_model.model.{layer}"]),
        ("ref", "ref", [f"model.{layer}"]),
    ):
        where = tmp_path / "run" / folder / "rank_0"
        where.mkdir(parents=True)
        file = f"{role}_rank_0-0_2.safetensors"
        safetensors.numpy.save_file({name: np.ones(2, np.float32) for name in names}, where / file)
        meta = {"last_epoch": 0, "last_step": 2, "last_ckpt_file": file}
        (where / "meta.json").write_text(json.dumps(meta))
    findings = look(tmp_path / "run")
    assert problems(findings) == []
    assert "policy and reference have the same 1 parameters" in [finding.text for finding in findings]


def test_mindformers_trainer_saves_the_optimizer_with_the_policy(foreign: Path) -> None:
    shutil.rmtree(foreign / "optimizer")
    assert any("optimizer does not exist" in text for text in problems(look(foreign)))
    for rank in range(2):
        path = foreign / f"train/rank_{rank}/policy_model_rank_{rank}-0_20.ckpt"
        path.write_bytes(ckpt_bytes({"a": np.ones(2, np.float32), "adam_m.a": np.ones(2, np.float32)}))
    findings = look(foreign)
    assert problems(findings) == []
    assert any("holds policy and optimizer in one file" in finding.text for finding in findings)


def test_policy_and_reference_of_two_models(run: Path, tmp_path: Path) -> None:
    other = dict(TENSORS, ref={"b.weight": np.ones(2, np.float32)})
    CheckpointStore(tmp_path / "other").save(
        Position(0, 10), other, global_step=10, run_id="r", incarnation=1, state={}, versions={}
    )
    source = name_checkpoint_folders(str(run / "train"), str(tmp_path / "other/ref"), run)
    assert any(
        "parameter names of the policy and the reference" in text for text in problems(examine(source))
    )


def test_too_little_disk_for_the_next_checkpoint(tmp_path: Path, run: Path) -> None:
    assert next_checkpoint_bytes(run) > 72
    assert any(
        "the next checkpoint takes about" in t
        for t in problems(examine_environment(tmp_path, 1 << 60, [], {}))
    )
    assert not any(
        "next checkpoint" in t for t in problems(examine_environment(tmp_path / "new/run", 1, [], {}))
    )


def test_the_exit_code_tells_scripts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["doctor", "--actor-checkpoint-path", str(run / "train"), "--json"]
    (run / "train/rank_0/meta.json").unlink()
    assert main(command) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] >= 1
    assert main(command[:-1]) == 1
    assert "PROBLEM  meta.json: policy, rank 0: no meta.json" in capsys.readouterr().out


@pytest.mark.parametrize("roles", [("policy_model", "optimizer"), ("weights",)])
def test_a_loop_needs_no_folders_of_roles_that_it_does_not_have(
    tmp_path: Path, roles: tuple[str, ...]
) -> None:
    tensors = {role: {"w": np.zeros(2, dtype=np.float32)} for role in roles}
    with rollforward.open_run(tmp_path / "run", log=lambda _: None) as loop:
        loop.restore(tensors)
        loop.checkpoint(0, tensors)
    found = look(tmp_path / "run")
    assert problems(found) == []
    assert any("every byte is intact" in finding.text for finding in found)
