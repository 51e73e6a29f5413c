"""One rank's part of a checkpoint: which tensors it writes, and writing them.

`assign` is a pure function, so every rank knows what each of the others writes without asking.
A role whose tensors are byte for byte the same as in the previous checkpoint is not written
again; that is known only after every rank has checked its part, so a rank that skipped a role
may have to write it after all (`copy_part`).
"""

import heapq
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from rollforward.errors import StorageError
from rollforward.storage import ReadHandle, Storage
from rollforward.store.layout import TensorFileName
from rollforward.store.manifest import FileRecord, Manifest
from rollforward.store.tensorfile import (
    CHUNK_BYTES,
    TensorRecord,
    TensorSource,
    WrittenFile,
    dtype_code,
    write_tensors,
)
from rollforward.tensors import TensorSpec

Sources = Mapping[str, Mapping[str, TensorSource]]
"""role -> tensor name -> where its bytes come from."""


def assign(sizes: Mapping[str, Mapping[str, int]], world_size: int) -> dict[str, list[list[str]]]:
    """Who writes what: role -> rank -> names, for tensors that are the same on all ranks.

    `sizes` is role -> name -> bytes. Largest first, each to the rank with the fewest bytes of this
    role so far, then the fewest in total: no rank gets more than the average plus one tensor.
    """
    totals = [0] * world_size
    assigned: dict[str, list[list[str]]] = {}
    for role in sorted(sizes):
        names: list[list[str]] = [[] for _ in range(world_size)]
        heap = [(0, totals[rank], rank) for rank in range(world_size)]
        heapq.heapify(heap)
        for name in sorted(sizes[role], key=lambda name: (-sizes[role][name], name)):
            of_role, total, rank = heap[0]
            size = sizes[role][name]
            heapq.heapreplace(heap, (of_role + size, total + size, rank))
            names[rank].append(name)
            totals[rank] += size
        assigned[role] = names
    return assigned


@dataclass(frozen=True)
class Previous:
    """What one rank needs to know of the previous checkpoint to see what has not changed."""

    files: Mapping[str, FileRecord]
    """role -> this rank's file."""
    tensors: Mapping[str, Mapping[str, TensorRecord]]
    """role -> name -> the record of what this rank wrote then."""

    @classmethod
    def of(cls, manifest: Manifest | None, rank: int, world_size: int) -> "Previous":
        """From the manifest; empty when there is none or it was saved with a different number of ranks."""
        if manifest is None or manifest.world_size != world_size:
            return cls({}, {})
        files: dict[str, FileRecord] = {}
        for file in manifest.files:
            name = TensorFileName.parse(file.path)
            if name is not None and name.rank == rank:
                files[name.role] = file
        tensors: dict[str, dict[str, TensorRecord]] = {role: {} for role in files}
        for tensor in manifest.tensors:
            if tensor.role in files and files[tensor.role].path == tensor.file:
                tensors[tensor.role][tensor.record.name] = tensor.record
        return cls(files, tensors)

    def has(self, role: str, specs: Mapping[str, TensorSpec]) -> bool:
        """Whether exactly these tensors were written then, regardless of their bytes."""
        known = self.tensors.get(role)
        return known is not None and {name: (r.dtype, r.shape) for name, r in known.items()} == {
            name: (dtype_code(spec.dtype), spec.shape) for name, spec in specs.items()
        }

    def unchanged(self, role: str, sources: Mapping[str, TensorSource]) -> bool:
        """Whether these tensors equal the ones written then; stops at the first difference."""
        known = self.tensors.get(role)
        if known is None or known.keys() != sources.keys():
            return False
        for name in sorted(sources, key=lambda name: known[name].size):
            source, record = sources[name], known[name]
            if (source.dtype, source.shape) != (record.dtype, record.shape):
                return False
            hasher = xxhash.xxh3_128()
            for chunk in source.chunks():
                hasher.update(chunk)
            if hasher.hexdigest() != record.digest:
                return False
        return True


def write_part(
    storage: Storage, target: TensorFileName, sources: Mapping[str, TensorSource], previous: Previous
) -> WrittenFile | None:
    """Write this rank's part of one role; None when nothing changed, so nothing was written."""
    if previous.unchanged(target.role, sources):
        for source in sources.values():
            source.release()
        return None
    return write_tensors(storage, target.path, sources)


def copy_part(storage: Storage, target: TensorFileName, previous: Previous) -> WrittenFile:
    """Write the role again by copying its file of the previous checkpoint."""
    file = previous.files[target.role]
    records = previous.tensors[target.role]
    with storage.open(file.path) as handle:
        sources = {name: _StoredSource(handle, record) for name, record in records.items()}
        written = write_tensors(storage, target.path, sources)
    for record in written.tensors:
        if record.digest != records[record.name].digest:
            raise StorageError(
                f"copying {file.path}: tensor {record.name!r} does not have its recorded digest",
                hint="the older checkpoint is damaged; its disk may be failing",
            )
    return written


class _StoredSource:
    """A tensor in a file."""

    def __init__(self, handle: ReadHandle, record: TensorRecord) -> None:
        self.dtype = record.dtype
        self.shape = record.shape
        self._handle = handle
        self._record = record

    def chunks(self) -> Generator[memoryview, None, None]:
        for begin in range(self._record.begin, self._record.end, CHUNK_BYTES):
            chunk = memoryview(bytearray(min(CHUNK_BYTES, self._record.end - begin)))
            self._handle.read_into(chunk, begin)
            yield chunk

    def release(self) -> None:
        """Whoever opened the handle closes it."""


def part_to_json(written: WrittenFile | None) -> Any:
    """What a rank sends to the others about one role."""
    if written is None:
        return None
    tensors = [
        [item.name, item.dtype, list(item.shape), item.begin, item.end, item.digest]
        for item in written.tensors
    ]
    return [written.path, written.size, written.digest, tensors]


def part_from_json(value: Any) -> WrittenFile | None:
    """What another rank sent about one role."""
    if value is None:
        return None
    path, size, digest, tensors = value
    records = tuple(TensorRecord(n, d, tuple(s), begin, end, found) for n, d, s, begin, end, found in tensors)
    return WrittenFile(path, size, digest, records)
