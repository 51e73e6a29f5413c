"""Tensors that a trainer split over the files of its ranks, reassembled as they are read.

Each piece is copied straight to its place in the whole tensor, so only one piece is in memory besides
it. When several ranks hold the same piece, one copy is read; `choice` says which, so that workers that
choose differently can tell from their digests whether the copies differ.

A tensor that the strategy files do not mention is whole on every rank that has it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointMismatch
from rollforward.interop.ckptfile import ForeignTensor
from rollforward.interop.files import check_file, hollow, read_tensor, tensors_of
from rollforward.interop.strategies import Layout, Strategy

Held = dict[str, list[tuple[int, ForeignTensor]]]
"""name -> the ranks that have a part of it, and which part."""


@dataclass(frozen=True)
class _Assembly:
    """How a tensor is reassembled."""

    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    pieces: dict[tuple[int, ...], list[tuple[int, ForeignTensor]]]
    """Which piece along each axis -> the ranks that have it."""


def is_split(paths: Sequence[Path], strategy: Strategy) -> bool:
    """Whether these files, one per rank, hold parts of tensors, or some tensors only on some ranks."""
    for name, copies in _held(paths).items():
        layout = strategy.of(name, copies[0][0])
        if len(copies) < len(paths) or (layout is not None and math.prod(layout.splits) > 1):
            return True
    return False


def joined_layout(paths: Sequence[Path], strategy: Strategy) -> dict[str, NDArray[Any]]:
    """`files.read_layout` of the reassembled tensors."""
    found = {}
    for name, copies in _held(paths).items():
        assembly = _assembly(name, copies, strategy)
        found[name] = np.broadcast_to(hollow(copies[0][1]), assembly.shape)
    return found


def read_joined(
    paths: Sequence[Path], strategy: Strategy, *, choice: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the name and array of each tensor in these files, one file per rank.

    CheckpointInvalid when a file cannot be read, CheckpointMismatch when pieces are missing or do not
    form a whole tensor.
    """
    held = _held(paths)
    for path in paths:
        check_file(path)
    for name, copies in held.items():
        assembly = _assembly(name, copies, strategy)
        whole = np.empty(assembly.shape, hollow(copies[0][1]).dtype)
        for place, ranks in assembly.pieces.items():
            rank, tensor = ranks[choice % len(ranks)]
            region = tuple(
                slice(index * size, (index + 1) * size)
                for index, size in zip(place, tensor.shape, strict=True)
            )
            whole[region] = read_tensor(paths[rank], tensor)
        yield name, whole


def _held(paths: Sequence[Path]) -> Held:
    found: Held = {}
    for rank, path in enumerate(paths):
        for tensor in tensors_of(path):
            found.setdefault(tensor.name, []).append((rank, tensor))
    return found


def _assembly(name: str, copies: Sequence[tuple[int, ForeignTensor]], strategy: Strategy) -> _Assembly:
    """Where each piece goes; CheckpointMismatch when some are missing or do not form one tensor."""
    shapes: set[tuple[int, ...]] = set()
    pieces: dict[tuple[int, ...], list[tuple[int, ForeignTensor]]] = {}
    count = 1
    for rank, tensor in copies:
        layout = _layout_of(name, rank, tensor, strategy)
        shapes.add(tuple(size * parts for size, parts in zip(tensor.shape, layout.splits, strict=True)))
        pieces.setdefault(layout.place(rank % layout.ranks), []).append((rank, tensor))
        count = math.prod(layout.splits)
    if len(shapes) > 1 or len({tensor.dtype for _, tensor in copies}) > 1:
        told = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise CheckpointMismatch(
            f"the pieces of {name} make up tensors of different shapes or types: {told}",
            hint="the files of the ranks are of different runs, or the strategy files are",
        )
    if len(pieces) != count:
        raise CheckpointMismatch(
            f"{name} is split into {count} pieces, and the files hold {len(pieces)} of them",
            hint="the files of some ranks are missing, or the strategy files are of another run",
        )
    return _Assembly(shapes.pop(), pieces)


def _layout_of(name: str, rank: int, tensor: ForeignTensor, strategy: Strategy) -> Layout:
    layout = strategy.of(name, rank) or Layout(devices=(1,), axes=((),) * len(tensor.shape))
    if layout.problem:
        raise CheckpointMismatch(
            f"{name} {layout.problem}, which cannot be merged",
            hint="merge the parts with MindSpore's ms.transform_checkpoints first",
        )
    if len(layout.axes) != len(tensor.shape):
        raise CheckpointMismatch(
            f"{name} has {len(tensor.shape)} axes, but {len(layout.axes)} in {strategy.folder}",
            hint="the strategy files are of another run: put those of this one there",
        )
    return layout
