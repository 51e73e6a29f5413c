"""Strategy files: how each tensor is laid out over the workers, in MindSpore's own format.

MindSpore writes `strategy_<rank>.ckpt` while it compiles, but on Ascend only. Here it is written
from what we know: every worker holds a tensor whole, or neighbours by rank hold equal parts of it
(`models.sharding`). MindSpore's tools (`ms.rank_list_for_transform`, `ms.transform_checkpoints`) read
these files.

The format is the protobuf message `ParallelStrategyMap` (`mindspore.train.node_strategy_pb2`), of
which they use one `ParallelLayouts` for each tensor:

    dev_matrix   [workers], or [replicas, parts]: the workers as a grid
    tensor_map   [0, -1, ...]   for each axis of the tensor, the grid axis that splits it, counted from
                                the last; -1: none
    field        0              the tensor has no row-sliced halves
    opt_weight_shard_step, _size  0: no optimizer parallelism
"""

from collections.abc import Mapping

from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from rollforward.tensors import TensorSpec


def strategy_file(layout: Mapping[str, TensorSpec], world_size: int) -> bytes:
    """The content of `strategy_<rank>.ckpt` for what a worker holds.

    `layout` maps a tensor's name to what of it. The content is the same on all ranks, and the same
    bytes every time. Names may not contain "-": MindSpore's reader takes the part before it as the
    number of a pipeline stage.
    """
    strategy = ParallelStrategyMap(current_stage=0)
    splits = {name: _splits(spec) for name, spec in layout.items()}
    parts = max((max(each, default=1) for each in splits.values()), default=1)
    for name, split in sorted(splits.items()):
        if "-" in name:
            raise ValueError(f"MindSpore would misread the tensor name {name!r} in a strategy file")
        item = strategy.parallel_layout_item.add(param_name=name)
        placed = item.parallel_layouts
        placed.dev_matrix.add(dim=[world_size] if parts == 1 else [world_size // parts, parts])
        placed.tensor_map.add(dim=[0 if each > 1 else -1 for each in split])
        placed.param_split_shape.add()
        placed.indices_offset.add()
        placed.field = 0
        placed.opt_weight_shard_step = 0
        placed.opt_weight_shard_size = 0
    return bytes(strategy.SerializeToString(deterministic=True))


def _splits(spec: TensorSpec) -> list[int]:
    """Into how many parts each axis is cut."""
    return [size // part if part else 1 for size, part in zip(spec.global_shape, spec.shape, strict=True)]
