"""Slices of a cut model and MindSpore's own tools: they read ours, and we read theirs."""

import json
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from held import Holding, sliced
from lockstep import LockStep
from numpy.typing import NDArray
from small_model import QWEN2

from rollforward.cli.main import main
from rollforward.interop.files import read_arrays
from rollforward.interop.folders import find_foreign
from rollforward.interop.joining import is_split, read_joined
from rollforward.interop.mapping import fit
from rollforward.interop.strategies import FOLDERS, find_strategy
from rollforward.interop.strategy_format import strategy_file
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import tensor_layout
from rollforward.models.sharding import Shard
from rollforward.position import Position
from rollforward.store import CheckpointStore

MODEL = QWEN2 | {"num_key_value_heads": 4}
LAYOUT = tensor_layout(ModelConfig.parse(MODEL))
ROLES = {"policy_model": "train", "optimizer": "optimizer", "ref": "ref"}
CUT = 2
SAVED, LATER = Position(0, 7), Position(0, 9)
Arrays = dict[str, NDArray[Any]]


def state_at(position: Position) -> dict[str, Arrays]:
    source = np.random.default_rng(position.step)
    found = {
        # A second moment is a mean of squares.
        role: {name: abs(source.normal(size=spec.shape).astype(spec.dtype)) for name, spec in named.items()}
        for role, named in LAYOUT.items()
    }
    found["optimizer"]["global_step"][:] = position.step
    return found


STATE = state_at(SAVED)


def holding(state: dict[str, Arrays], rank: int, parts: int, workers: int) -> Holding:
    """What a worker of a cut model has."""
    return Holding(
        state, rank, sliced(state, Shard(rank % parts, parts)), copy=(rank // parts, workers // parts)
    )


def run_of(folder: Path, workers: int) -> Path:
    """A run whose model is cut over two of its workers: two checkpoints."""

    def work(rank: int, exchange: Any) -> None:
        store = CheckpointStore(folder, rank=rank, world_size=workers, exchange=exchange)
        for position in (SAVED, LATER):
            store.save(
                position,
                holding(state_at(position), rank, CUT, workers),
                global_step=position.step,
                run_id="r",
                incarnation=1,
                state={},
                attachments={"config.json": json.dumps(MODEL).encode()},
            )

    assert LockStep(workers).run(work) == [None] * workers
    return folder


def strategy_of(path: Path, role: str, parts: int, workers: int) -> str:
    """As a start writes it into --save_strategy_dir."""
    path.write_bytes(strategy_file(holding(STATE, 0, parts, workers).layout()[role], workers))
    return str(path)


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


def the_file(folder: Path) -> Arrays:
    (path,) = (path for path in folder.iterdir() if path.suffix in (".ckpt", ".safetensors"))
    return dict(read_arrays(path))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # MindSpore leaves what it reads open
@pytest.mark.parametrize("workers", [2, 4])
def test_mindspore_makes_the_whole_of_our_rank_files_and_cuts_it_into_four(
    tmp_path: Path, workers: int
) -> None:
    """They are what MindSpore calls files without redundancy: what several ranks have is in one of them."""
    run = run_of(tmp_path / "run", workers)
    for role, folder in ROLES.items():
        ours = strategy_of(tmp_path / f"{role}_{CUT}.ckpt", role, CUT, workers)
        four = strategy_of(tmp_path / f"{role}_4.ckpt", role, 4, 4)
        whole, out = str(tmp_path / f"whole_{role}"), tmp_path / f"four_{role}"
        ms.parallel.unified_safetensors(
            str(run / folder), ours, whole, merge_with_redundancy=False, file_suffix=str(SAVED)
        )
        assert_same(the_file(Path(whole)), STATE[role])
        for rank in range(4):
            ms.load_distributed_checkpoint(
                None,
                predict_strategy=four,
                format="safetensors",
                unified_safetensors_dir=whole,
                dst_safetensors_dir=str(out),
                rank_id=rank,
            )
            assert_same(the_file(out / f"rank_{rank}"), holding(STATE, rank, 4, 4).tensors()[role])


def export(run: Path, out: Path, ranks: int) -> Path:
    command = ["export", f"{run}:{SAVED}", "--to", str(out), "--format", "mindrlhf"]
    assert main(command if ranks == 1 else [*command, "--model_parallel", str(ranks)]) == 0
    return out


def strategy_in(folder: Path, role: str) -> str | None:
    path = folder / "strategy" / FOLDERS[role] / "strategy_0.ckpt"
    return str(path) if path.exists() else None


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4)])
def test_mindspore_transforms_one_export_into_the_bytes_of_another(
    tmp_path: Path, before: int, after: int
) -> None:
    run = run_of(tmp_path / "run", CUT)
    source, target = (export(run, tmp_path / f"of_{ranks}", ranks) for ranks in (before, after))
    for role, folder in ROLES.items():
        strategies = strategy_in(source, role), strategy_in(target, role)
        assert sorted(ms.rank_list_for_transform(0, *strategies)) == list(range(before))
        ms.transform_checkpoints(
            str(source / folder), str(tmp_path / folder), "part", *strategies, output_format="ckpt"
        )
        for rank in range(after):
            assert_same(
                the_file(tmp_path / folder / f"rank_{rank}"), the_file(target / folder / f"rank_{rank}")
            )


def test_slices_that_mindspore_made_are_read_as_the_run_they_are_of(tmp_path: Path) -> None:
    whole, cut = (export(run_of(tmp_path / "run", CUT), tmp_path / f"of_{ranks}", ranks) for ranks in (1, 4))
    for role, folder in ROLES.items():
        strategy = find_strategy([cut / "strategy" / FOLDERS[role]])
        assert strategy is not None
        out = tmp_path / "theirs" / folder
        parts = strategy_in(cut, role)
        ms.transform_checkpoints(str(whole / folder), str(out), "part", None, parts, output_format="ckpt")
        for rank in range(4):
            path = out / f"rank_{rank}/part{rank}.ckpt"
            path.rename(path.with_name(f"{role}_rank_{rank}-{SAVED}.ckpt"))
            (out / f"rank_{rank}/meta.json").write_bytes(
                (cut / folder / f"rank_{rank}/meta.json").read_bytes()
            )
        found = find_foreign({role: out}, world_size=4)
        assert found.position == SAVED
        assert is_split(found.files[role], strategy)
        read = fit(role, dict(read_joined(found.files[role], strategy, choice=1)), LAYOUT, groups=4)
        assert read.problems == ()
        assert_same(dict(read.tensors), STATE[role])
