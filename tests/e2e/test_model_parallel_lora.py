"""A run of adapters beside a model that is cut over two workers: killed, resumed, and merged."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from command import PROGRAM, SETTINGS, Command

from rollforward.models.lora import ADAPTER_WEIGHTS
from rollforward.models.weights import SINGLE
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage

pytestmark = pytest.mark.engine

UNCUT = SETTINGS | {
    "actor_config.lora.rank": 4,
    "actor_config.recompute_config.recompute": "true",
    # So large that AdamW does not make a whole step of the last digits of a gradient that is nearly 0.
    "actor_config.optimizer.eps": 1e-4,
}
CUT = UNCUT | {"actor_config.parallel_config.model_parallel": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Command:
    command = Command(tmp_path_factory.mktemp("cut") / "undisturbed", workers=2, settings=CUT)
    said = command.finish()
    assert "adapters: rank 4" in said
    assert "1 group of 2 workers, which hold the model together" in said
    return command


def exported(run: Path, to: Path, *more: str) -> Path:
    command = [*PROGRAM, "export", str(run), "--to", str(to), *more]
    subprocess.run(command, check=True, capture_output=True)
    return to


def test_killed_in_an_update_it_ends_with_the_same_bits(undisturbed: Command, tmp_path: Path) -> None:
    killed = replace(undisturbed, folder=tmp_path)
    killed.take_graphs(undisturbed)
    killed.with_a_worker_that_dies(1, "update", "0_5")
    killed.finish(resume=True)
    assert killed.newest()["digests"] == undisturbed.newest()["digests"]
    assert killed.figures() == undisturbed.figures()
    (report,) = recovery_report.read(LocalStorage(killed.run))
    assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)
    assert report.updates_repeated == report.updates_replayed >= 1


def test_what_it_exports_is_what_a_run_in_one_piece_exports(undisturbed: Command, tmp_path: Path) -> None:
    one = Command(tmp_path / "one", settings=UNCUT)
    one.finish()
    for file, how in ((ADAPTER_WEIGHTS, ()), (SINGLE, ("--merge",))):
        name = file.partition(".")[0]
        found, expected = (
            safetensors.numpy.load_file(exported(run.run, tmp_path / f"{name}_{number}", *how) / file)
            for number, run in enumerate((undisturbed, one))
        )
        assert found.keys() == expected.keys()
        learnt = [abs(array).max() for tensor, array in expected.items() if ".lora_B." in tensor]
        assert all(each > 1e-3 for each in learnt), "hundred times the tolerance"
        for tensor, array in expected.items():
            np.testing.assert_allclose(found[tensor], array, atol=1e-5, rtol=0, err_msg=tensor)
