"""Strategy files are read by MindSpore's own tools."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from rollforward.engines.mindspore.strategy_format import strategy_file

WEIGHTS = {
    "model.embed_tokens.weight": np.arange(32, dtype=np.float32).reshape(8, 4),
    "model.norm.weight": np.arange(4, dtype=np.float32),
    "global_step": np.array([7], dtype=np.int32),
}
SHAPES = {name: array.shape for name, array in WEIGHTS.items()}


@pytest.fixture
def replicated(tmp_path: Path) -> str:
    """A strategy file of two data-parallel workers, and a checkpoint of each."""
    for rank in range(2):
        folder = tmp_path / "source" / f"rank_{rank}"
        folder.mkdir(parents=True)
        parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in WEIGHTS.items()]
        ms.save_checkpoint(parameters, str(folder / "policy.ckpt"))
    path = tmp_path / "strategy_0.ckpt"
    path.write_bytes(strategy_file(SHAPES, world_size=2))
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
    backwards = dict(reversed(SHAPES.items()))
    assert strategy_file(SHAPES, world_size=4) == strategy_file(backwards, world_size=4)


def test_a_name_that_mindspore_would_misread_is_refused() -> None:
    with pytest.raises(ValueError, match="1-model"):
        strategy_file({"1-model.weight": (2,)}, world_size=1)
