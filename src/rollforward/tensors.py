"""Tensor types that all packages share: the tensors (`Tensors`), and their description (`Layout`).

A layout gives the dtype, shape and place of every tensor without holding any of them, so it can come
from an engine whose memory is on a device, or from a configuration before any engine exists.

A tensor is either whole, and the same on every rank; or in pieces, each a box of it that one rank alone
holds, or some ranks alike. A rank's layout lists what this rank holds: the whole tensors, and its own pieces.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rollforward.boxes import Box

Tensors: TypeAlias = Mapping[str, Mapping[str, NDArray[Any]]]
"""role -> tensor name -> array; a piece has the shape of its box."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of a tensor, held by this process alone; those of all processes cover the tensor exactly once."""

    array: NDArray[Any]
    """The elements of the box."""
    global_shape: tuple[int, ...]
    """The shape of the tensor."""
    offset: tuple[int, ...]
    """Where the box starts, along each axis of the tensor."""
    of: str = ""
    """The tensor's name, where the piece goes by another, since the process holds several pieces of it."""


Held: TypeAlias = Mapping[str, Mapping[str, NDArray[Any] | Piece]]
"""What a rank holds: role -> name -> a whole tensor, the same on every rank, or a piece."""


@dataclass(frozen=True)
class TensorSpec:
    """A box within a global tensor. For a whole tensor, the box covers all of it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """The box's shape."""
    global_shape: tuple[int, ...]
    """The shape of the tensor that it is part of."""
    offset: tuple[int, ...]
    """Where the box starts, along each axis of the global tensor."""
    piece_of: str = ""
    """The name of the tensor that this is a piece of, which this rank alone holds. Empty: a whole tensor, the
    same on every rank."""
    copy: tuple[int, int] = (0, 1)
    """Of a piece that several ranks hold alike: which of them this one is, and how many there are. Ranks that
    have one such piece in common have all those of the role in common that so many hold."""

    @classmethod
    def whole(cls, dtype: DTypeLike, shape: tuple[int, ...]) -> "TensorSpec":
        """A tensor that is not split, and the same on every rank."""
        return cls(np.dtype(dtype), tuple(shape), tuple(shape), (0,) * len(shape))

    @classmethod
    def piece(
        cls,
        tensor: str,
        dtype: DTypeLike,
        global_shape: tuple[int, ...],
        box: Box,
        copy: tuple[int, int] = (0, 1),
    ) -> "TensorSpec":
        """A box of a tensor, held by this rank alone unless it is a `copy`; the box may be all of it."""
        return cls(np.dtype(dtype), tuple(box.shape), tuple(global_shape), tuple(box.offset), tensor, copy)

    @property
    def box(self) -> Box:
        """The elements that it covers."""
        return Box(self.offset, self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the box covers its whole tensor."""
        return self.shape == self.global_shape

    @property
    def size(self) -> int:
        """Number of elements in the box."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the box's elements in bytes."""
        return self.size * self.dtype.itemsize


Layout: TypeAlias = Mapping[str, Mapping[str, TensorSpec]]
"""role -> tensor name -> its description. A piece usually has the name of its tensor; a rank that holds
several pieces of a tensor gives each a name of its own."""


def layout_of(held: Held) -> Layout:
    """The layout of arrays and pieces; an array is a whole tensor.

    It accesses every array. If that copies them (`grpo.ports.Engine.tensors`), ask the engine instead.
    """
    return {
        role: {name: _spec_of(name, item) for name, item in named.items()} for role, named in held.items()
    }


def arrays_of(held: Held) -> Tensors:
    """The arrays alone."""
    return {
        role: {name: item.array if isinstance(item, Piece) else item for name, item in named.items()}
        for role, named in held.items()
    }


def _spec_of(name: str, item: NDArray[Any] | Piece) -> TensorSpec:
    if isinstance(item, Piece):
        box = Box(tuple(item.offset), item.array.shape)
        return TensorSpec.piece(item.of or name, item.array.dtype, tuple(item.global_shape), box)
    return TensorSpec.whole(item.dtype, item.shape)
