"""A run whose model is cut over two workers: killed in an update, resumed cut alike, and in one piece."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command import CUT, PROGRAM, UNCUT, Command
from safetensors import safe_open

from rollforward.models.config import ModelConfig
from rollforward.models.shapes import parameter_shapes
from rollforward.models.weights import load_weights
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage
from rollforward.store import find
from rollforward.store.contents import contents

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, whole_cut: Command) -> Command:
    """Killed in the update of the last step: the first checkpoint is there, the second may be."""
    command = Command(tmp_path_factory.mktemp("killed"), workers=2, settings=CUT)
    command.take_graphs(whole_cut)
    command.with_a_worker_that_dies(1, "update", "0_5")
    return command


def test_a_run_killed_in_an_update_ends_with_the_same_bits(
    whole_cut: Command, killed: Command, tmp_path: Path
) -> None:
    resumed = killed.copied(tmp_path)
    resumed.finish(resume=True)
    assert resumed.newest()["digests"] == whole_cut.newest()["digests"]
    assert resumed.figures() == whole_cut.figures()
    for report in recovery_report.read(LocalStorage(resumed.run)):
        assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)
        assert report.updates_repeated == report.updates_replayed >= 1


def test_it_resumes_in_one_piece_too_and_makes_nothing_finished_again(
    whole: Command, killed: Command, tmp_path: Path
) -> None:
    resumed = killed.copied(tmp_path, workers=1, settings=UNCUT)
    resumed.take_graphs(whole)
    said = resumed.finish(resume=True)
    assert "model_parallel changed from 2 to 1" in said
    for report in recovery_report.read(LocalStorage(resumed.run)):
        assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)
        assert report.updates_replayed >= 1
    assert resumed.newest()["position"] == "0_6"


def test_each_workers_files_hold_its_part_and_an_export_puts_them_together(
    whole_cut: Command, tmp_path: Path
) -> None:
    storage = LocalStorage(whole_cut.run)
    tensors = contents(storage, find(storage).manifest).tensors
    query = tensors["policy_model", "model.layers.0.self_attn.q_proj.weight"]
    parts = {part.piece.offset: part for part in query.parts}
    assert {offset: part.piece.record.shape for offset, part in parts.items()} == {
        (0, 0): (64, 128),
        (64, 0): (64, 128),
    }
    for rank, offset in enumerate([(0, 0), (64, 0)]):
        assert parts[offset].file.record.path.startswith(f"train/rank_{rank}/policy_model_rank_{rank}-")
    out = tmp_path / "exported"
    export = [*PROGRAM, "export", str(whole_cut.run), "--format", "huggingface", "--to", str(out)]
    subprocess.run(export, check=True, capture_output=True)
    whole = whole_policy(out)
    for offset, part in parts.items():
        with safe_open(whole_cut.run / part.file.record.path, "np") as file:
            found = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
        expected = whole["model.layers.0.self_attn.q_proj.weight"][offset[0] : offset[0] + 64]
        assert found.tobytes() == expected.tobytes()


def whole_policy(folder: Path) -> dict[str, np.ndarray]:
    config = ModelConfig.parse(json.loads((folder / "config.json").read_text()))
    arrays = {name: np.empty(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    load_weights(folder, config, arrays)
    return arrays
