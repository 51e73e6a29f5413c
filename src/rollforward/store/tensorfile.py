"""Tensor files: safetensors, written straight from live arrays and verified while being read.

Promises: no copy on the way out (non-contiguous arrays excepted), a digest of each tensor
computed while it is written, data that starts on a page boundary. On the way in nothing is trusted:
before any memory is allocated, the header's length and its number of entries are bounded by the file's
size and by what real models need, and each entry is checked against the data region. Format: the docstring
of `rollforward.store`, and https://github.com/huggingface/safetensors#format.

Element types are those of safetensors. BF16 and the FP8 types are the dtypes of `ml_dtypes`.

Left out: memory mapping, which would hand out unverified bytes; and types whose elements share
bytes (F4, F6_E2M3, F6_E3M2), which are rejected.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.storage import Buffer, ReadHandle, Storage
from rollforward.store import strictjson
from rollforward.store.digests import digest, digest_of_digests
from rollforward.store.unreadable import rejection

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    # NumPy itself has no such numbers: ml_dtypes registers these dtypes with it.
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""safetensors' names for element types, and the NumPy type of each."""

PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""safetensors types whose elements share bytes. NumPy cannot hold them, so they are rejected."""

_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
"""By name: a framework may have its own `bfloat16`, with the same bits."""

CHUNK_BYTES = 4 << 20
"""Small enough that a chunk is still cached when it is copied after being digested."""

READ_CHUNK_BYTES = 256 << 10
"""Smaller, so that what was read is digested while it is still in the core's own cache."""

ALIGNMENT = 4096
MAX_HEADER_BYTES = 32 << 20
"""Room for more tensors than `strictjson.MOST_VALUES` allows. The safetensors library's limit of 100 MB
would take gigabytes to parse."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor in a file."""

    name: str
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte in the file."""
    end: int
    digest: str = ""
    """XXH3-128 of its bytes; empty when read from a header, which holds no digests."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    @property
    def place(self) -> tuple[int, int, str]:
        """Sort key: tensors in the order of their data, empty ones at the same place by name."""
        return self.begin, self.end, self.name


@dataclass(frozen=True)
class WrittenFile:
    """What `write_tensors` wrote, and what a manifest records about it."""

    path: str
    size: int
    digest: str
    tensors: tuple[TensorRecord, ...]
    """In the order of their data."""


@dataclass(frozen=True)
class Header:
    """The front of a tensor file."""

    metadata: Mapping[str, str]
    tensors: tuple[TensorRecord, ...]
    """In the order of their data."""
    digest: str
    """Of every byte before the data."""


class TensorSource(Protocol):
    """Where a tensor's bytes come from when they are written."""

    dtype: str
    shape: tuple[int, ...]

    def chunks(self) -> Generator[memoryview, None, None]:
        """The bytes in order. A chunk may change once the next one is requested, or after `close`."""
        ...

    def release(self) -> None:
        """Its bytes will not be needed again."""
        ...


class ArraySource:
    """A NumPy array, read in place."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.dtype = dtype_code(array.dtype)
        self.shape = tuple(array.shape)
        self._array = array

    def chunks(self) -> Generator[memoryview, None, None]:
        """Views; a copy only if the array is not C-contiguous or not little-endian."""
        data = as_bytes(self._array).data
        for begin in range(0, data.nbytes, CHUNK_BYTES):
            yield data[begin : begin + CHUNK_BYTES]

    def release(self) -> None:
        """Nothing to release."""


def dtype_code(dtype: np.dtype[Any]) -> str:
    """The safetensors name of an element type; ValueError when there is none."""
    code = _CODES.get(dtype.name)
    if code is None:
        raise ValueError(
            f"tensors of dtype {dtype} cannot be stored; {', '.join(DTYPES)} can (as safetensors names them)"
        )
    return code


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array's bytes, little-endian, in C order: a view wherever possible."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_tensors(storage: Storage, path: str, tensors: Mapping[str, TensorSource]) -> WrittenFile:
    """Write a tensor file durably, digesting it on the way. StorageError from the storage."""
    header, planned = lay_out(tensors, metadata={"format": "pt"}, alignment=ALIGNMENT)
    digests: list[str] = []

    def content() -> Generator[Buffer, None, None]:
        yield header
        for record in planned:
            hasher = xxhash.xxh3_128()
            written = 0
            with closing(tensors[record.name].chunks()) as chunks:
                for chunk in chunks:
                    hasher.update(chunk)
                    written += chunk.nbytes
                    yield chunk
            if written != record.size:
                raise ValueError(
                    f"tensor {record.name!r} gave {written} bytes where {record.size} were planned"
                )
            tensors[record.name].release()
            digests.append(hasher.hexdigest())

    # Closed, since a failed write would otherwise hold the last chunk's guard as long as the error lives.
    with closing(content()) as buffers:
        size = storage.write(path, buffers)
    pairs = zip(planned, digests, strict=True)
    records = tuple(
        sorted((replace(record, digest=found) for record, found in pairs), key=lambda record: record.place)
    )
    return WrittenFile(path, size, file_digest(digest(header), records), records)


def file_digest(header_digest: str, tensors: tuple[TensorRecord, ...]) -> str:
    """The digest of a whole file, from its parts; tensors in the order of their data."""
    return digest_of_digests([header_digest, *(record.digest for record in tensors)])


def lay_out(
    tensors: Mapping[str, TensorSource], *, metadata: Mapping[str, str], alignment: int
) -> tuple[bytes, list[TensorRecord]]:
    """The bytes before the data, and the tensors in the order of their data.

    Larger elements come first, so that each is aligned to its own size; the data starts at a
    multiple of `alignment`.
    """
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    spans: list[tuple[str, int, int]] = []
    offset = 0
    for name in order:
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named __metadata__")
        source = tensors[name]
        end = offset + math.prod(source.shape) * DTYPES[source.dtype].itemsize
        entries[name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [offset, end]}
        spans.append((name, offset, end))
        offset = end
    text = strictjson.dump(entries).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors in one file: their names and shapes take {len(text)} bytes")
    padded = text.ljust(-(-(8 + len(text)) // alignment) * alignment - 8)
    start = 8 + len(padded)
    records = [
        TensorRecord(name, tensors[name].dtype, tensors[name].shape, start + begin, start + end)
        for name, begin, end in spans
    ]
    return len(padded).to_bytes(8, "little") + padded, records


def read_header(handle: ReadHandle, path: str) -> Header:
    """Read and check the header of a tensor file; CheckpointInvalid says what is wrong with it."""
    if handle.size < 8:
        raise CheckpointInvalid(f"{path}: {handle.size} bytes, too short for a tensor file")
    length_bytes = bytearray(8)
    handle.read_into(memoryview(length_bytes), 0)
    length = int.from_bytes(length_bytes, "little")
    if length > min(handle.size - 8, MAX_HEADER_BYTES):
        raise CheckpointInvalid(f"{path}: claims a header of {length} bytes in a file of {handle.size}")
    text = bytearray(length)
    if length:
        handle.read_into(memoryview(text), 8)
    try:
        entries = strictjson.parse(bytes(text))
        if not isinstance(entries, dict):
            raise ValueError("the header is not a JSON object")
        metadata = _parse_metadata(entries.pop("__metadata__", {}))
        records = [_parse_entry(name, entry, 8 + length) for name, entry in entries.items()]
        records.sort(key=lambda record: record.place)
        _check_cover(records, 8 + length, handle.size)
    except ValueError as error:
        raise CheckpointInvalid(f"{path}: {error}") from None
    return Header(metadata, tuple(records), digest(bytes(length_bytes) + bytes(text)))


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("the header's metadata is not an object of strings")
    return value


def _parse_entry(name: str, entry: Any, data_begin: int) -> TensorRecord:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header's entry of {name[:60]!r} is malformed")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(value) for value in offsets):
        raise ValueError(f"the offsets of {name[:60]!r} are malformed")
    shape = parse_shape(entry["shape"], name)
    begin, end = offsets
    check_span(name, entry["dtype"], shape, begin, end)
    return TensorRecord(name, entry["dtype"], shape, data_begin + begin, data_begin + end)


def is_count(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer that fits into 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def parse_shape(value: Any, name: str) -> tuple[int, ...]:
    """A shape from JSON; ValueError when it is not one, or no array can have it."""
    if not isinstance(value, list) or len(value) > 32 or not all(is_count(size) for size in value):
        raise ValueError(f"the shape of {name[:60]!r} is malformed")
    if math.prod(max(size, 1) for size in value) >= 1 << 59:
        raise ValueError(f"the shape of {name[:60]!r} is absurd")
    return tuple(value)


def check_span(name: str, dtype: Any, shape: tuple[int, ...], begin: int, end: int) -> None:
    """ValueError unless the byte range has exactly the size that dtype and shape require."""
    if isinstance(dtype, str) and dtype in PACKED:
        raise ValueError(f"the dtype of {name[:60]!r} is {dtype}, a packed type, which is not supported")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"the dtype of {name[:60]!r} is {str(dtype)[:20]!r}, which is not known")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{name[:60]!r} has {end - begin} bytes, which is not what {dtype} {list(shape)} takes"
        )


def _check_cover(records: list[TensorRecord], begin: int, size: int) -> None:
    for record in records:
        if record.begin != begin:
            raise ValueError(f"a gap or an overlap before {record.name[:60]!r}")
        begin = record.end
    if begin != size:
        raise ValueError(f"{size} bytes where the header describes {begin}")


def read_verified(handle: ReadHandle, record: TensorRecord, path: str, into: NDArray[np.uint8]) -> None:
    """Read a tensor's bytes into `into` (uint8 [record.size]) and verify them.

    CheckpointInvalid when they cannot be read or do not have the recorded digest: then `into`
    holds bytes that must not be used.
    """
    hasher = xxhash.xxh3_128()
    view = into.data
    for begin in range(0, record.size, READ_CHUNK_BYTES):
        chunk = view[begin : begin + READ_CHUNK_BYTES]
        try:
            handle.read_into(chunk, record.begin + begin)
        except StorageError as error:
            raise rejection(error, f"{path}: tensor {record.name!r}") from error
        hasher.update(chunk)
    if hasher.hexdigest() != record.digest:
        raise CheckpointInvalid(f"{path}: tensor {record.name!r} does not have its recorded digest")


def new_array(record: TensorRecord) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """An empty array for a tensor, and its bytes."""
    data = np.empty(record.size, np.uint8)
    return data.view(DTYPES[record.dtype]).reshape(record.shape), data
