"""`.ckpt` files, as MindSpore's `save_checkpoint` writes them: what is in them, and where.

Each is a `Checkpoint` message of MindSpore's checkpoint.proto, its values one after another:

    1  value       1  tag       the parameter's name
                   2  tensor    1  dims         [0] for a scalar
                                2  type         "Float32", ...; "str" for text
                                3  content      little-endian, in C order
                   3  maptensor

A large parameter is several values with the same name, each with the dims of the whole and a piece of
the content. With `crc_check`, `crc_num` and ten bytes follow: the CRC-32 of everything before, big-endian.

Not supported, and refused: encrypted files and map parameters.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rollforward.errors import CheckpointInvalid
from rollforward.interop.protobuf import Field, Wire
from rollforward.storage import ReadHandle

_TYPES: dict[str, np.dtype[Any]] = {
    "Bool": np.dtype("?"),
    "Int8": np.dtype("i1"),
    "UInt8": np.dtype("u1"),
    "Int16": np.dtype("<i2"),
    "UInt16": np.dtype("<u2"),
    "Int32": np.dtype("<i4"),
    "UInt32": np.dtype("<u4"),
    "Int64": np.dtype("<i8"),
    "UInt64": np.dtype("<u8"),
    "Float16": np.dtype("<f2"),
    "Float32": np.dtype("<f4"),
    "Float64": np.dtype("<f8"),
    "BFloat16": np.dtype("<u2"),
}
_CRC_MARK, _CRC_BYTES = b"crc_num", 10
_CHUNK = 1 << 20
_MAX_STR = 1 << 16
_MAX_DIMS = 32


@dataclass(frozen=True)
class ForeignTensor:
    """Where a tensor lies in a file."""

    name: str
    dtype: np.dtype[Any]
    """The dtype of the stored bits."""
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    """Start and end of each range of its bytes, in order."""
    bfloat16: bool = False
    """Whether the bits are bfloat16, a type that NumPy lacks."""


def read_ckpt_header(handle: ReadHandle, path: str) -> list[ForeignTensor]:
    """Every parameter, without its bytes. CheckpointInvalid when it is not a complete `.ckpt` file."""
    wire = Wire(handle)
    found: dict[str, ForeignTensor] = {}
    pieces: dict[str, list[tuple[int, int]]] = {}
    last = ""
    if handle.size == 0:
        raise CheckpointInvalid(f"{path}: an empty file")
    try:
        for field in wire.fields(0, _trailer(wire)[0]):
            if field.number != 1 or field.value is not None:
                raise ValueError(f"there is no parameter at byte {field.begin}")
            tensor = _parse_value(wire, field)
            if tensor.name != last and tensor.name in found:
                raise ValueError(f"{tensor.name[:60]!r} is there twice")
            pieces.setdefault(tensor.name, []).extend(tensor.pieces)
            found[tensor.name], last = tensor, tensor.name
        whole = [replace(tensor, pieces=tuple(pieces[name])) for name, tensor in found.items()]
        for tensor in whole:
            _check_size(tensor)
    except ValueError as error:
        raise CheckpointInvalid(f"{path} is not a whole .ckpt file, or it is encrypted: {error}") from None
    return whole


def check_crc(handle: ReadHandle, path: str) -> None:
    """CheckpointInvalid when the file was saved with a CRC and no longer matches it."""
    end, expected = _trailer(Wire(handle))
    if expected is None:
        return
    found = 0
    for begin in range(0, end, _CHUNK):
        chunk = bytearray(min(_CHUNK, end - begin))
        handle.read_into(memoryview(chunk), begin)
        found = zlib.crc32(chunk, found)
    if found != expected:
        raise CheckpointInvalid(f"{path} does not have the CRC that it was saved with")


def _trailer(wire: Wire) -> tuple[int, int | None]:
    """Where the message ends, and the CRC after it."""
    begin = wire.size - len(_CRC_MARK) - _CRC_BYTES
    if begin < 0 or wire.content(begin, begin + len(_CRC_MARK)) != _CRC_MARK:
        return wire.size, None
    return begin, int.from_bytes(wire.content(wire.size - _CRC_BYTES, wire.size), "big")


def _parse_value(wire: Wire, value: Field) -> ForeignTensor:
    fields = {field.number: field for field in wire.fields(value.begin, value.end)}
    if set(fields) != {1, 2}:
        raise ValueError(f"the value at byte {value.begin} is not a tensor")
    name = wire.text(fields[1])
    kind, content = "", None
    dims: list[int] = []
    for field in wire.fields(fields[2].begin, fields[2].end):
        if field.number == 1:
            dims += wire.integers(field, _MAX_DIMS)
            if len(dims) > _MAX_DIMS:
                raise ValueError(f"{name[:60]!r} has too many dimensions")
        elif field.number == 2:
            kind = wire.text(field)
        elif field.number == 3:
            content = field
    if content is None or math.prod(max(size, 1) for size in dims) >= 1 << 59:
        raise ValueError(f"{name[:60]!r} is malformed")
    size = content.end - content.begin
    if kind == "str" and size <= _MAX_STR:
        dtype, dims = np.dtype(f"<U{size // 4}"), []
    elif kind in _TYPES:
        dtype = _TYPES[kind]
    else:
        raise ValueError(f"{name[:60]!r} is of type {kind[:20]!r}, which is not read")
    shape = () if dims == [0] and size else tuple(dims)
    return ForeignTensor(name, dtype, shape, ((content.begin, content.end),), bfloat16=kind == "BFloat16")


def _check_size(tensor: ForeignTensor) -> None:
    held = sum(end - begin for begin, end in tensor.pieces)
    if held != math.prod(tensor.shape) * tensor.dtype.itemsize:
        raise ValueError(f"{tensor.name[:60]!r} of shape {list(tensor.shape)} has {held} bytes")
