"""Strategy files: how each tensor is laid out over the workers, in MindSpore's own format.

MindSpore writes `strategy_<rank>.ckpt` while it compiles, but on Ascend only. Here it is written
from what we know: data-parallel training keeps every tensor whole on every worker. MindSpore's
tools (`ms.rank_list_for_transform`, `ms.transform_checkpoints`) read these files.

The format is the protobuf message `ParallelStrategyMap` (`mindspore.train.node_strategy_pb2`), of
which they use one `ParallelLayouts` for each tensor:

    dev_matrix   [workers]      the workers as a grid, here of one axis
    tensor_map   [-1, -1, ...]  for each axis of the tensor, the grid axis that splits it; -1: none
    field        0              the tensor has no row-sliced halves
    opt_weight_shard_step, _size  0: no optimizer parallelism
"""

from collections.abc import Mapping

from mindspore.train.node_strategy_pb2 import ParallelStrategyMap


def strategy_file(shapes: Mapping[str, tuple[int, ...]], world_size: int) -> bytes:
    """The content of `strategy_<rank>.ckpt` for tensors that every worker holds whole.

    `shapes` maps a tensor's name to its shape. The content is the same on all ranks, and the same
    bytes every time. Names may not contain "-": MindSpore's reader takes the part before it as the
    number of a pipeline stage.
    """
    strategy = ParallelStrategyMap(current_stage=0)
    for name, shape in sorted(shapes.items()):
        if "-" in name:
            raise ValueError(f"MindSpore would misread the tensor name {name!r} in a strategy file")
        item = strategy.parallel_layout_item.add(param_name=name)
        layout = item.parallel_layouts
        layout.dev_matrix.add(dim=[world_size])
        layout.tensor_map.add(dim=[-1] * len(shape))
        layout.param_split_shape.add()
        layout.indices_offset.add()
        layout.field = 0
        layout.opt_weight_shard_step = 0
        layout.opt_weight_shard_size = 0
    return bytes(strategy.SerializeToString(deterministic=True))
