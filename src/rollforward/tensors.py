"""Tensor types that all packages share: the tensors (`Tensors`), and their description (`Layout`).

A layout gives the dtype, shape and place of every tensor without holding any of them, so it can come
from an engine whose memory is on a device, or from a configuration before any engine exists.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Tensors: TypeAlias = Mapping[str, Mapping[str, NDArray[Any]]]
"""role -> tensor name -> array."""


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

    @classmethod
    def whole(cls, dtype: DTypeLike, shape: tuple[int, ...]) -> "TensorSpec":
        """A tensor that is not split."""
        return cls(np.dtype(dtype), tuple(shape), tuple(shape), (0,) * len(shape))

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
"""role -> tensor name -> its description."""


def layout_of(tensors: Tensors) -> Layout:
    """The layout of arrays, each a whole tensor.

    It accesses every array. If that copies them (`grpo.ports.Engine.tensors`), ask the engine instead.
    """
    return {
        role: {name: TensorSpec.whole(array.dtype, array.shape) for name, array in named.items()}
        for role, named in tensors.items()
    }
