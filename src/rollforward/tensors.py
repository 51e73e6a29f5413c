"""Words for tensors that all rooms share: what there is (`Tensors`), and what it would be (`Layout`).

A layout says dtype, shape and place of every tensor and holds none of them, so that it can be asked
of an engine whose memory lies on a device, or of a configuration before any engine exists.
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
    """A box of a global tensor. A whole tensor is the box that is all of it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Of the box."""
    global_shape: tuple[int, ...]
    """Of the tensor that it is a part of."""
    offset: tuple[int, ...]
    """Where the box begins, along each axis of the global tensor."""

    @classmethod
    def whole(cls, dtype: DTypeLike, shape: tuple[int, ...]) -> "TensorSpec":
        """A tensor that is not split."""
        return cls(np.dtype(dtype), tuple(shape), tuple(shape), (0,) * len(shape))

    @property
    def is_whole(self) -> bool:
        """Whether the box is all of its tensor."""
        return self.shape == self.global_shape

    @property
    def size(self) -> int:
        """Elements of the box."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements of the box take."""
        return self.size * self.dtype.itemsize


Layout: TypeAlias = Mapping[str, Mapping[str, TensorSpec]]
"""role -> tensor name -> what it is."""


def layout_of(tensors: Tensors) -> Layout:
    """The layout of arrays that are whole tensors.

    It looks at every array. Where that copies them (`grpo.ports.Engine.tensors`), ask the engine instead.
    """
    return {
        role: {name: TensorSpec.whole(array.dtype, array.shape) for name, array in named.items()}
        for role, named in tensors.items()
    }
