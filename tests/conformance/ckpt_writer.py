"""`.ckpt` files as MindSpore lays them out, written without it: for tests that must not wait for a framework.

That MindSpore's own files are laid out so is the matter of tests/unit/store/test_store_ckptfile.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"f4": "Float32", "f2": "Float16", "i4": "Int32", "i8": "Int64"}


def ckpt_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A whole file."""
    return b"".join(_field(1, _value(name, array)) for name, array in arrays.items())


def _value(name: str, array: NDArray[Any]) -> bytes:
    dims = b"".join(b"\x08" + _varint(size) for size in array.shape or (0,))
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
