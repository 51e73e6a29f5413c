"""Runs of cut models on more workers than two, and such as come from another trainer: by name."""

import json
import shutil
import subprocess
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from command import ARITHMETIC, CUT, PROGRAM, UNCUT, Command, assert_nothing_finished_was_lost

from rollforward.interop.strategies import FOLDERS
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import parameter_shapes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ONE_CHUNK_EACH = CUT | {"rl_config.num_rollouts": 1}
"""For two groups, which make the two chunks of a step of one."""
SAVED = "0_4"
ROLES = {"policy_model": "train", "optimizer": "optimizer", "ref": "ref"}
REWARDS = """\
def digits(completions, **_):
    return [sum(map(str.isdigit, text)) / 8 for text in completions]
"""
"""For a model that has learnt nothing: its samples differ in this."""


def test_two_groups_of_two_killed_in_an_update_end_with_the_bits_of_one_group(
    whole_cut: Command, tmp_path: Path
) -> None:
    four = Command(tmp_path / "four", workers=4, settings=ONE_CHUNK_EACH)
    four.with_a_worker_that_dies(3, "update", "0_5")
    four.finish(resume=True)
    assert_nothing_finished_was_lost(four)
    assert four.newest()["digests"] == whole_cut.newest()["digests"]
    assert four.figures() == whole_cut.figures()


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory, whole_cut: Command) -> Path:
    """The run as MindRLHF would have left it on two ranks, cut by MindSpore out of the whole."""
    root = tmp_path_factory.mktemp("slices")
    for ranks in (1, 2):
        command = [*PROGRAM, "export", f"{whole_cut.run}:{SAVED}", "--format", "mindrlhf"]
        command += ["--model_parallel", str(ranks), "--to", str(root / f"of_{ranks}")]
        subprocess.run(command, check=True, capture_output=True)
    whole, cut, theirs = root / "of_1", root / "of_2", root / "theirs"
    for role, folder in ROLES.items():
        strategy = str(cut / "strategy" / FOLDERS[role] / "strategy_0.ckpt")
        ms.transform_checkpoints(
            str(whole / folder), str(theirs / folder), "part", None, strategy, output_format="ckpt"
        )
        for rank in range(2):
            there = theirs / folder / f"rank_{rank}"
            (there / f"part{rank}.ckpt").rename(there / f"{role}_rank_{rank}-{SAVED}.ckpt")
            shutil.copy(cut / folder / there.name / "meta.json", there)
    shutil.copytree(cut / "strategy", theirs / "strategy")
    return theirs


def resumed(slices: Path, folder: Path, workers: int, settings: dict[str, object]) -> tuple[Command, str]:
    program = [*PROGRAM, "train", f"--set=actor_config.load={ARITHMETIC / 'model'}"]
    command = Command(folder, program=program, workers=workers, settings=settings)
    shutil.copytree(slices, command.run)
    return command, command.finish(resume=True)


@pytest.mark.parametrize(("workers", "settings"), [(2, CUT), (4, ONE_CHUNK_EACH)], ids=["one group", "two"])
def test_slices_of_mindrlhf_are_trained_on_cut_alike_with_the_bits_of_the_run_they_are_of(
    whole_cut: Command, slices: Path, tmp_path: Path, workers: int, settings: dict[str, object]
) -> None:
    command, said = resumed(slices, tmp_path, workers, settings)
    assert "tensors split over 2 ranks are merged by the strategy files in" in said
    assert f"training: resumes at step {SAVED} (5 of 6)" in said
    assert command.newest()["digests"] == whole_cut.newest()["digests"]
    assert command.figures() == whole_cut.figures()[4:]


def test_slices_of_mindrlhf_are_trained_on_in_one_piece(
    whole_cut: Command, slices: Path, tmp_path: Path
) -> None:
    command, _ = resumed(slices, tmp_path, 1, UNCUT)
    (ours,) = (each for each in command.checkpoints() if each["position"] == SAVED)
    (before,) = (each for each in whole_cut.checkpoints() if each["position"] == SAVED)
    assert ours["digests"] == before["digests"], "what was read is saved at once"
    assert command.newest()["position"] == "0_6"


def model_with_three_key_value_heads(folder: Path) -> Path:
    """Random weights, and the example's tokenizer."""
    shutil.copytree(ARITHMETIC / "model", folder)
    changes = {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
    }
    values = json.loads((folder / "config.json").read_text()) | changes | {"vocab_size": 18}
    (folder / "config.json").write_text(json.dumps(values))
    source = np.random.default_rng(1)
    weights = {
        name: source.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)
        for name, shape in parameter_shapes(ModelConfig.parse(values)).items()
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def test_over_three_workers_killed_in_an_update_it_ends_with_the_same_bits_and_goes_on_in_one_piece(
    tmp_path: Path,
) -> None:
    settings = CUT | {
        "actor_config.parallel_config.model_parallel": 3,
        "reward_config.verifier_function": "[rewards:digits]",
    }
    model = model_with_three_key_value_heads(tmp_path / "model")
    undisturbed = Command(tmp_path / "undisturbed", workers=3, settings=settings, model=model)
    killed = Command(tmp_path / "killed", workers=3, settings=settings, model=model)
    for command in (undisturbed, killed):
        command.folder.mkdir()
        (command.folder / "rewards.py").write_text(REWARDS)
    undisturbed.finish()
    killed.take_graphs(undisturbed)
    killed.with_a_worker_that_dies(2, "update", "0_5")
    uncut = settings | {"actor_config.parallel_config.model_parallel": 1}
    (tmp_path / "one").mkdir()
    shutil.copy(killed.folder / "rewards.py", tmp_path / "one")
    one = killed.copied(tmp_path / "one", workers=1, settings=uncut)

    killed.finish(resume=True)
    assert_nothing_finished_was_lost(killed)
    assert killed.newest()["digests"] == undisturbed.newest()["digests"]
    assert killed.figures() == undisturbed.figures()

    assert "model_parallel changed from 3 to 1" in one.finish(resume=True)
    assert one.newest()["position"] == "0_6"
