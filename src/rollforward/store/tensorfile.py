"""Tensor files: safetensors, written straight from live arrays and verified while being read.

Promises: no copy on the way out (non-contiguous arrays excepted), digests of each tensor's blocks
computed while it is written, data that starts on a page boundary. On the way in nothing is trusted:
before any memory is allocated, the header's length and its number of entries are bounded by the file's
size and by what real models need, and each entry is checked against the data region. Format: the docstring
of `rollforward.store`, and https://github.com/huggingface/safetensors#format.

Element types are those of safetensors. BF16 and the FP8 types are the dtypes of `ml_dtypes`.

Left out: memory mapping, which would hand out unverified bytes; and types whose elements share
bytes (F4, F6_E2M3, F6_E3M2), which are rejected.
"""

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

from rollforward.boxes import Box, blocks, whole
from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.storage import Buffer, ReadHandle, Storage
from rollforward.store import strictjson
from rollforward.store.digests import DIGEST_HEX, digest, digest_of_digests
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

_OF_NOTHING = digest(b"")

CHUNK_BYTES = 4 << 20
"""Small enough that a chunk is still cached when it is copied after being digested."""

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
    """XXH3-128 of each of its blocks (`boxes.blocks`), one after the other; versions 1 and 2 have one for all
    its bytes. Empty when read from a header, which holds no digests."""

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
    box: Box
    """The elements of its tensor that it holds."""

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
        self.box = whole(tuple(array.shape))
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
            source = tensors[record.name]
            digester = BlockDigester(source.dtype, source.box)
            with closing(source.chunks()) as chunks:
                for chunk in chunks:
                    digester.update(chunk)
                    yield chunk
            source.release()
            digests.append(digester.digest(record.name))

    # Closed, since a failed write would otherwise hold the last chunk's guard as long as the error lives.
    with closing(content()) as buffers:
        size = storage.write(path, buffers)
    pairs = zip(planned, digests, strict=True)
    records = tuple(
        sorted((replace(record, digest=found) for record, found in pairs), key=lambda record: record.place)
    )
    return WrittenFile(path, size, file_digest(digest(header), records), records)


class BlockDigester:
    """The digests of a box's blocks, from its bytes in order."""

    def __init__(self, dtype: str, box: Box) -> None:
        itemsize = DTYPES[dtype].itemsize
        self._left = [block.size * itemsize for block in reversed(blocks(box, itemsize))]
        """Bytes that each block still lacks, the current one last."""
        self._planned, self._given = sum(self._left), 0
        self._hasher = xxhash.xxh3_128()
        self._done: list[str] = []

    def update(self, chunk: memoryview) -> None:
        """The next bytes."""
        self._given += chunk.nbytes
        while chunk.nbytes and self._left:
            part = chunk[: self._left[-1]]
            self._hasher.update(part)
            self._left[-1] -= part.nbytes
            if not self._left[-1]:
                self._end_block()
            chunk = chunk[part.nbytes :]

    def digest(self, name: str) -> str:
        """One after the other; ValueError when there were more bytes than the box takes, or fewer."""
        if self._given != self._planned:
            raise ValueError(f"tensor {name!r} gave {self._given} bytes where {self._planned} were planned")
        if self._left:  # The block of a box without elements.
            self._end_block()
        return "".join(self._done)

    def _end_block(self) -> None:
        self._done.append(self._hasher.hexdigest())
        self._hasher = xxhash.xxh3_128()
        self._left.pop()


def digest_of(source: TensorSource, name: str) -> str:
    """The digests of a tensor's blocks, as `write_tensors` records them."""
    digester = BlockDigester(source.dtype, source.box)
    with closing(source.chunks()) as chunks:
        for chunk in chunks:
            digester.update(chunk)
    return digester.digest(name)


class Block(NamedTuple):
    """Part of a tensor in a file, with a digest of its own."""

    box: Box
    """Of the tensor that the file has a piece of."""
    begin: int
    """Offset of its first byte in the file."""
    size: int
    """Bytes."""
    digest: str


def blocks_of(record: TensorRecord, box: Box) -> list[Block]:
    """The blocks of an entry that holds this box; ValueError when there is not a digest for each.

    A single digest is that of all its bytes.
    """
    found = [record.digest[begin : begin + DIGEST_HEX] for begin in range(0, len(record.digest), DIGEST_HEX)]
    itemsize = DTYPES[record.dtype].itemsize
    boxes = [box] if len(found) == 1 else blocks(box, itemsize)
    if len(found) != len(boxes):
        raise ValueError(f"{record.name[:60]!r} has {len(found)} digests for {len(boxes)} blocks")
    begin, listed = record.begin, []
    for part, expected in zip(boxes, found, strict=True):
        listed.append(Block(part, begin, part.size * itemsize, expected))
        begin += part.size * itemsize
    return listed


def file_digest(header_digest: str, tensors: Iterable[TensorRecord]) -> str:
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
        end = offset + source.box.size * DTYPES[source.dtype].itemsize
        entries[name] = {
            "dtype": source.dtype,
            "shape": list(source.box.shape),
            "data_offsets": [offset, end],
        }
        spans.append((name, offset, end))
        offset = end
    text = strictjson.dump(entries).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors in one file: their names and shapes take {len(text)} bytes")
    padded = text.ljust(-(-(8 + len(text)) // alignment) * alignment - 8)
    start = 8 + len(padded)
    records = [
        TensorRecord(name, tensors[name].dtype, tensors[name].box.shape, start + begin, start + end)
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


def check_digest(name: str, size: int, found: str) -> None:
    """ValueError for no bytes with a digest other than theirs: nobody would read them to find out."""
    if size == 0 and found != _OF_NOTHING:
        raise ValueError(f"{name[:60]!r} has no bytes, and not the digest of none")


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


def read_verified(handle: ReadHandle, block: Block, what: str, into: NDArray[np.uint8]) -> None:
    """Read a block's bytes into `into` (uint8 [block.size]) and verify them.

    CheckpointInvalid, which begins with `what`, when they cannot be read or do not have the recorded digest:
    then `into` holds bytes that must not be used.
    """
    view, step = into.data, handle.chunk_bytes
    chunks = (view[begin : begin + step] for begin in range(0, block.size, step))
    _read_verified(handle, block, what, chunks)


def verify_block(handle: ReadHandle, block: Block, what: str) -> None:
    """Like `read_verified`, and keeps nothing of what it reads."""
    step = handle.chunk_bytes
    view = memoryview(bytearray(min(block.size, step)))
    chunks = (view[: block.size - begin] for begin in range(0, block.size, step))
    _read_verified(handle, block, what, chunks)


def _read_verified(handle: ReadHandle, block: Block, what: str, chunks: Iterable[memoryview]) -> None:
    hasher, begin = xxhash.xxh3_128(), block.begin
    for chunk in chunks:
        try:
            handle.read_into(chunk, begin)
        except StorageError as error:
            raise rejection(error, what) from error
        hasher.update(chunk)
        begin += chunk.nbytes
    if hasher.hexdigest() != block.digest:
        raise CheckpointInvalid(f"{what} does not have its recorded digest")


def new_array(dtype: str, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """An empty array, and its bytes."""
    array = np.empty(shape, DTYPES[dtype])
    return array, array.reshape(-1).view(np.uint8)
