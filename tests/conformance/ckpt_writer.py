"""`.ckpt` and strategy files as MindSpore lays them out, for tests that must not wait for a framework.

That MindSpore's own are laid out so is the matter of tests/unit/store/test_store_ckptfile.py and
test_store_joining.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"f4": "Float32", "f2": "Float16", "i4": "Int32", "i8": "Int64"}


def ckpt_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A whole file."""
    return b"".join(_field(1, _value(name, array)) for name, array in arrays.items())


Split = tuple[Sequence[int], Sequence[int] | Sequence[Sequence[int]], int, int]
"""Devices, tensor map (a number, or several, for each axis of the tensor), step and size of the shards."""


def strategy_bytes(splits: Mapping[str, Split], *, stage: int = 0) -> bytes:
    """A whole strategy file; `stage` is that of the pipeline."""
    item = _field(1, b"an operator") + _field(2, _number(1, stage))
    return _number(1, stage) + _field(2, item) + b"".join(_layout(*entry) for entry in splits.items())


def _layout(name: str, split: Split) -> bytes:
    devices, axes, step, size = split
    maps = [[axes]] if not axes or isinstance(axes[0], int) else [[axis] for axis in axes]
    content = _field(1, _numbers(devices))
    content += b"".join(_field(2, _numbers(found)) for (found,) in maps)
    content += _field(3, b"") + _field(4, b"") + _number(5, 0) + _number(6, step) + _number(7, size)
    return _field(3, _field(1, name.encode()) + _field(2, content))


def _numbers(values: Any) -> bytes:
    return b"".join(_number(1, value) for value in values)


def _number(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _varint(value % (1 << 64))


def _value(name: str, array: NDArray[Any]) -> bytes:
    dims = _numbers(array.shape or (0,))
    kind = _TYPES[array.dtype.str[1:]].encode()
    tensor = dims + _field(2, kind) + _field(3, np.ascontiguousarray(array).tobytes())
    return _field(1, name.encode()) + _field(2, tensor)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
