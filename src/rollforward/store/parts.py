"""One rank's part of a checkpoint: which tensors it writes, and writing them.

A rank writes its own pieces, its share of those that several ranks hold alike, and its share of the tensors
that are the same on all ranks. `assign` and `pieces_written` are pure functions, so every rank knows its
share without asking. A role whose tensors are byte for byte the same as in the previous checkpoint is not
written again; that is known only after every rank has checked its part, so a rank that skipped a role may
have to write it after all (`copy_part`).
"""

import heapq
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from rollforward.boxes import Box, Shape
from rollforward.errors import StorageError
from rollforward.storage import ReadHandle, Storage
from rollforward.store.layout import TensorFileName
from rollforward.store.table import FileRecord, StoredPiece, Table, has_all_digests
from rollforward.store.tensorfile import (
    CHUNK_BYTES,
    TensorSource,
    WrittenFile,
    digest_of,
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


def pieces_written(named: Mapping[str, TensorSpec]) -> list[str]:
    """The names of the pieces of a role that this rank writes.

    Those that several ranks hold alike are dealt out to them, the largest first.
    """
    found = [name for name, spec in named.items() if spec.piece_of and spec.copy[1] == 1]
    for copies in sorted({spec.copy[1] for spec in named.values()} - {1}):
        held = [name for name, spec in named.items() if spec.copy[1] == copies]
        held.sort(key=lambda name: (-named[name].nbytes, name))
        found += [name for turn, name in enumerate(held) if turn % copies == named[name].copy[0]]
    return found


@dataclass(frozen=True)
class Previous:
    """What one rank needs to know of the previous checkpoint to see what has not changed."""

    files: Mapping[str, FileRecord]
    """role -> this rank's file."""
    pieces: Mapping[str, Mapping[str, StoredPiece]]
    """role -> name of the entry -> what this rank wrote then."""

    @classmethod
    def of(cls, table: Table | None) -> "Previous":
        """From this rank's table of it; empty when there is none."""
        if table is None:
            return cls({}, {})
        pieces: dict[str, dict[str, StoredPiece]] = {role: {} for role in table.files}
        for piece in table.pieces:
            pieces[piece.role][piece.record.name] = piece
        # Earlier versions have one digest for a large tensor, where there is one for each block now.
        usable = [role for role, named in pieces.items() if all(map(has_all_digests, named.values()))]
        return cls({role: table.files[role] for role in usable}, {role: pieces[role] for role in usable})

    def has(self, role: str, specs: Mapping[str, TensorSpec]) -> bool:
        """Whether exactly these tensors were written then, regardless of their bytes."""
        known = self.pieces.get(role)
        return known is not None and {name: _described(piece) for name, piece in known.items()} == {
            name: (dtype_code(spec.dtype), spec.piece_of or name, spec.global_shape, spec.box)
            for name, spec in specs.items()
        }

    def unchanged(
        self, role: str, sources: Mapping[str, TensorSource], specs: Mapping[str, TensorSpec]
    ) -> bool:
        """Whether these tensors equal the ones written then; stops at the first difference."""
        known = self.pieces.get(role)
        if known is None or not self.has(role, specs):
            return False
        smallest_first = sorted(sources, key=lambda name: known[name].record.size)
        return all(digest_of(sources[name], name) == known[name].record.digest for name in smallest_first)


def _described(piece: StoredPiece) -> tuple[str, str, Shape, Box]:
    return piece.record.dtype, piece.tensor, piece.global_shape, piece.box


def pieces_of(role: str, written: WrittenFile, specs: Mapping[str, TensorSpec]) -> list[StoredPiece]:
    """What a table says of a file that was just written."""
    found = []
    for record in written.tensors:
        spec = specs[record.name]
        found.append(StoredPiece(role, record, spec.piece_of or record.name, spec.global_shape, spec.offset))
    return found


def write_part(
    storage: Storage,
    target: TensorFileName,
    sources: Mapping[str, TensorSource],
    specs: Mapping[str, TensorSpec],
    previous: Previous,
) -> WrittenFile | None:
    """Write this rank's part of one role; None when nothing changed, so nothing was written."""
    if previous.unchanged(target.role, sources, specs):
        for source in sources.values():
            source.release()
        return None
    return write_tensors(storage, target.path, sources)


def copy_part(storage: Storage, target: TensorFileName, previous: Previous) -> WrittenFile:
    """Write the role again by copying its file of the previous checkpoint."""
    file = previous.files[target.role]
    pieces = previous.pieces[target.role]
    with storage.open(file.path) as handle:
        sources = {name: _StoredSource(handle, piece) for name, piece in pieces.items()}
        written = write_tensors(storage, target.path, sources)
    for record in written.tensors:
        if record.digest != pieces[record.name].record.digest:
            raise StorageError(
                f"copying {file.path}: tensor {record.name!r} does not have its recorded digest",
                hint="the older checkpoint is damaged; its disk may be failing",
            )
    return written


class _StoredSource:
    """A piece in a file."""

    def __init__(self, handle: ReadHandle, piece: StoredPiece) -> None:
        self.dtype = piece.record.dtype
        self.box = piece.box
        self._handle = handle
        self._record = piece.record

    def chunks(self) -> Generator[memoryview, None, None]:
        for begin in range(self._record.begin, self._record.end, CHUNK_BYTES):
            chunk = memoryview(bytearray(min(CHUNK_BYTES, self._record.end - begin)))
            self._handle.read_into(chunk, begin)
            yield chunk

    def release(self) -> None:
        """Whoever opened the handle closes it."""
