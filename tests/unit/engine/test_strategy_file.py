"""Strategy files are read by MindSpore's own tools."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from rollforward.boxes import whole, within
from rollforward.interop.strategy_format import strategy_file
from rollforward.models.sharding import Shard
from rollforward.tensors import TensorSpec

WEIGHTS = {
    "model.embed_tokens.weight": np.arange(32, dtype=np.float32).reshape(8, 4),
    "model.norm.weight": np.arange(4, dtype=np.float32),
    "global_step": np.array([7], dtype=np.int32),
}
WHOLE = {name: TensorSpec.whole(array.dtype, array.shape) for name, array in WEIGHTS.items()}
CUT = {
    "model.embed_tokens.weight": np.arange(32, dtype=np.float32).reshape(8, 4),
    "model.layers.0.self_attn.o_proj.weight": np.arange(32, 64, dtype=np.float32).reshape(4, 8),
    "model.layers.0.self_attn.q_proj.bias": np.arange(8, dtype=np.float32),
    "model.layers.0.self_attn.o_proj.bias": np.arange(4, dtype=np.float32),
    "adam_m.model.layers.0.self_attn.o_proj.weight": np.arange(64, 96, dtype=np.float32).reshape(4, 8),
}
"""Cut by rows, by columns, and not at all."""


@pytest.fixture
def replicated(tmp_path: Path) -> str:
    """A strategy file of two data-parallel workers, and a checkpoint of each."""
    for rank in range(2):
        folder = tmp_path / "source" / f"rank_{rank}"
        folder.mkdir(parents=True)
        parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in WEIGHTS.items()]
        ms.save_checkpoint(parameters, str(folder / "policy.ckpt"))
    path = tmp_path / "strategy_0.ckpt"
    path.write_bytes(strategy_file(WHOLE, world_size=2))
    return str(path)


def test_any_one_worker_holds_the_whole_of_a_replicated_model(replicated: str) -> None:
    assert len(ms.rank_list_for_transform(0, replicated, None)) == 1


def test_mindspore_merges_replicated_checkpoints_into_one(tmp_path: Path, replicated: str) -> None:
    ms.transform_checkpoints(str(tmp_path / "source"), str(tmp_path / "whole"), "policy", replicated, None)
    loaded = ms.load_checkpoint(str(tmp_path / "whole" / "rank_0" / "policy0.ckpt"))
    assert sorted(loaded) == sorted(WEIGHTS)
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), array)


def test_mindspore_splits_a_replicated_checkpoint_over_a_tensor_parallel_layout(
    tmp_path: Path, replicated: str
) -> None:
    split = ParallelStrategyMap.FromString(Path(replicated).read_bytes())
    for item in split.parallel_layout_item:
        if item.param_name == "model.embed_tokens.weight":
            item.parallel_layouts.tensor_map[0].dim[:] = [0, -1]
    split_file = tmp_path / "split.ckpt"
    split_file.write_bytes(split.SerializeToString())
    target = tmp_path / "split"
    ms.transform_checkpoints(str(tmp_path / "source"), str(target), "policy", replicated, str(split_file))
    for rank in range(2):
        loaded = ms.load_checkpoint(str(target / f"rank_{rank}" / f"policy{rank}.ckpt"))
        embedding = WEIGHTS["model.embed_tokens.weight"]
        np.testing.assert_array_equal(
            loaded["model.embed_tokens.weight"].asnumpy(), embedding[rank * 4 : rank * 4 + 4]
        )
        np.testing.assert_array_equal(loaded["model.norm.weight"].asnumpy(), WEIGHTS["model.norm.weight"])


def test_the_same_layout_is_the_same_bytes() -> None:
    backwards = dict(reversed(WHOLE.items()))
    assert strategy_file(WHOLE, world_size=4) == strategy_file(backwards, world_size=4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_mindspore_would_write_the_same_bytes(parts: int) -> None:
    content = strategy_file(layout_of(Shard(0, parts)), world_size=4)
    assert ParallelStrategyMap.FromString(content).SerializeToString(deterministic=True) == content


def test_a_name_that_mindspore_would_misread_is_refused() -> None:
    with pytest.raises(ValueError, match="1-model"):
        strategy_file({"1-model.weight": TensorSpec.whole("float32", (2,))}, world_size=1)


def layout_of(shard: Shard) -> dict[str, TensorSpec]:
    """What a worker holds of CUT."""
    return {
        name: TensorSpec.piece(name, array.dtype, array.shape, box)
        if (box := shard.box(name, array.shape)) != whole(array.shape)
        else TensorSpec.whole(array.dtype, array.shape)
        for name, array in CUT.items()
    }


def save_parts(folder: Path, workers: int, parts: int) -> str:
    """A checkpoint of each worker, with its part of CUT; the strategy file."""
    for rank in range(workers):
        layout = layout_of(Shard(rank % parts, parts))
        held = {name: CUT[name][within(spec.box, whole(spec.global_shape))] for name, spec in layout.items()}
        (folder / f"rank_{rank}").mkdir(parents=True)
        parameters = [{"name": name, "data": ms.Tensor(array.copy())} for name, array in held.items()]
        ms.save_checkpoint(parameters, str(folder / f"rank_{rank}" / "policy.ckpt"))
    return strategy_of(folder, workers, parts)


def strategy_of(folder: Path, workers: int, parts: int) -> str:
    path = folder.with_suffix(".ckpt")
    path.write_bytes(strategy_file(layout_of(Shard(0, parts)), world_size=workers))
    return str(path)


@pytest.mark.parametrize("workers", [2, 4])
def test_mindspore_puts_the_parts_of_a_cut_model_together(tmp_path: Path, workers: int) -> None:
    strategy = save_parts(tmp_path / "source", workers, 2)
    assert sorted(ms.rank_list_for_transform(0, strategy, None)) == [0, 1]
    ms.transform_checkpoints(str(tmp_path / "source"), str(tmp_path / "whole"), "policy", strategy, None)
    loaded = ms.load_checkpoint(str(tmp_path / "whole" / "rank_0" / "policy0.ckpt"))
    assert sorted(loaded) == sorted(CUT)
    for name, array in CUT.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), array, err_msg=name)


def test_mindspore_cuts_a_model_of_two_parts_into_four(tmp_path: Path) -> None:
    two = save_parts(tmp_path / "two", 2, 2)
    four = strategy_of(tmp_path / "four", 4, 4)
    ms.transform_checkpoints(str(tmp_path / "two"), str(tmp_path / "four"), "policy", two, four)
    for rank in range(4):
        loaded = ms.load_checkpoint(str(tmp_path / "four" / f"rank_{rank}" / f"policy{rank}.ckpt"))
        for name, spec in layout_of(Shard(rank, 4)).items():
            expected = CUT[name][within(spec.box, whole(spec.global_shape))]
            np.testing.assert_array_equal(loaded[name].asnumpy(), expected, err_msg=name)
