"""A run of adapters beside a model that is cut over two workers: killed, resumed, and merged."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from command import ARITHMETIC, CUT, PROGRAM, Command
from safetensors import safe_open

from rollforward.boxes import Box, whole, within
from rollforward.models.lora import ADAPTER_WEIGHTS, adapter_names
from rollforward.models.weights import SINGLE
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage
from rollforward.store import find
from rollforward.store.contents import contents

pytestmark = pytest.mark.engine

RANK = 4
LORA = CUT | {"actor_config.lora.rank": RANK, "actor_config.recompute_config.recompute": "true"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Command:
    command = Command(tmp_path_factory.mktemp("cut") / "undisturbed", workers=2, settings=LORA)
    said = command.finish()
    assert "adapters: rank 4" in said
    assert "1 group of 2 workers, which hold the model together" in said
    return command


def exported(run: Path, to: Path, *more: str) -> Path:
    command = [*PROGRAM, "export", str(run), "--to", str(to), *more]
    subprocess.run(command, check=True, capture_output=True)
    return to


@pytest.mark.slow
def test_killed_in_an_update_it_ends_with_the_same_bits(undisturbed: Command, tmp_path: Path) -> None:
    """By name: a cut model, and adapters, each without the other, are killed in the suite."""
    killed = replace(undisturbed, folder=tmp_path)
    killed.take_graphs(undisturbed)
    killed.with_a_worker_that_dies(1, "update", "0_5")
    killed.finish(resume=True)
    assert killed.newest()["digests"] == undisturbed.newest()["digests"]
    assert killed.figures() == undisturbed.figures()
    (report,) = recovery_report.read(LocalStorage(killed.run))
    assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)
    assert report.updates_repeated == report.updates_replayed >= 1


def test_what_it_exports_is_made_of_the_parts_in_its_workers_files(
    undisturbed: Command, tmp_path: Path
) -> None:
    adapters = safetensors.numpy.load_file(exported(undisturbed.run, tmp_path / "adapters") / ADAPTER_WEIGHTS)
    storage, seen = LocalStorage(undisturbed.run), {}
    for (role, name), tensor in contents(storage, find(storage).manifest).tensors.items():
        if role == "policy_model":
            seen[name] = len(tensor.parts)
            for part in tensor.parts:
                box = Box(part.piece.offset, part.piece.record.shape)
                with safe_open(undisturbed.run / part.file.record.path, "np") as file:
                    found = file.get_tensor(part.piece.record.name)
                assert found.tobytes() == adapters[name][within(box, whole(tensor.shape))].tobytes(), name
    assert seen.keys() == adapters.keys()
    assert sorted(set(seen.values())) == [1, 2], "of each adapter one factor is cut, and one is whole"

    base = safetensors.numpy.load_file(ARITHMETIC / "model" / SINGLE)
    merged = safetensors.numpy.load_file(exported(undisturbed.run, tmp_path / "merged", "--merge") / SINGLE)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        first, second = (adapters.get(each) for each in adapter_names(name))
        if first is None:
            assert merged[name].tobytes() == weight.tobytes(), name
        else:
            assert abs(second).max() > 1e-3, "learnt: it starts from zero"
            expected = weight + 16 / RANK * (second @ first)
            np.testing.assert_allclose(merged[name], expected, atol=1e-6, rtol=0, err_msg=name)
