"""Strategy files: how each tensor is laid out over the workers, in MindSpore's own format.

MindSpore writes `strategy_<rank>.ckpt` while it compiles, but on Ascend only. Here it is written
from what we know: every worker holds a tensor whole, or neighbours by rank hold equal parts of it
(`models.sharding`). MindSpore's tools (`ms.rank_list_for_transform`, `ms.transform_checkpoints`) read
these files.

The format is the protobuf message `ParallelStrategyMap` of MindSpore's node_strategy.proto, of which they
use one layout item for each tensor (the numbers are those of the fields):

    1  current stage             0: no pipeline
    3  layout item   1  name
                     2  layouts  1  dev_matrix     [workers], or [replicas, parts]: the workers as a grid
                                 2  tensor_map     [0, -1, ...]   for each axis of the tensor, the grid axis
                                                   that splits it, counted from the last; -1: none
                                 3  param_split_shape, 4  indices_offset: empty
                                 5  field          0: the tensor has no row-sliced halves
                                 6  opt_weight_shard_step, 7  its size    0: no optimizer parallelism

`strategies` reads those of others. The encoding: https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterable, Mapping

from rollforward.tensors import TensorSpec


def strategy_file(layout: Mapping[str, TensorSpec], world_size: int) -> bytes:
    """The content of `strategy_<rank>.ckpt` for what a worker holds.

    `layout` maps a tensor's name to what of it. The content is the same on all ranks, and the same
    bytes every time. Names may not contain "-": MindSpore's reader takes the part before it as the
    number of a pipeline stage.
    """
    splits = {name: _splits(spec) for name, spec in layout.items()}
    parts = max((max(each, default=1) for each in splits.values()), default=1)
    grid = [world_size] if parts == 1 else [world_size // parts, parts]
    return _number(1, 0) + b"".join(_item(name, split, grid) for name, split in sorted(splits.items()))


def _splits(spec: TensorSpec) -> list[int]:
    """Into how many parts each axis is cut."""
    return [size // part if part else 1 for size, part in zip(spec.global_shape, spec.shape, strict=True)]


def _item(name: str, split: Iterable[int], grid: Iterable[int]) -> bytes:
    if "-" in name:
        raise ValueError(f"MindSpore would misread the tensor name {name!r} in a strategy file")
    lists = [grid, [0 if each > 1 else -1 for each in split], [], []]
    layouts = b"".join(_content(number, _dims(values)) for number, values in enumerate(lists, start=1))
    layouts += _number(5, 0) + _number(6, 0) + _number(7, 0)
    return _content(3, _content(1, name.encode()) + _content(2, layouts))


def _dims(values: Iterable[int]) -> bytes:
    return b"".join(_number(1, value) for value in values)


def _number(field: int, value: int) -> bytes:
    """Negative numbers are written in 64-bit two's complement."""
    return _varint(field << 3) + _varint(value % (1 << 64))


def _content(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, least significant first."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
