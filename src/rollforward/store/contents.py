"""What a checkpoint holds: the tables of its ranks, read and verified as they are needed.

A rank that resumes wants some boxes of some tensors. Its own table comes first, then those of its neighbours,
until all that it wants has been found: on as many ranks as before, cut as before, that is one table.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rollforward.boxes import Box, cover_fault, intersection, whole
from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.storage import Storage, read_small
from rollforward.store import strictjson, table
from rollforward.store.digests import digest
from rollforward.store.manifest import Manifest
from rollforward.store.sealing import own_digest
from rollforward.store.table import MAX_TABLE_BYTES, FileRecord, StoredPiece, Table
from rollforward.store.tensorfile import Block, blocks_of, dtype_code
from rollforward.store.unreadable import rejection
from rollforward.tensors import Layout

_DIGEST_SPACE = 1 << 128


@dataclass(frozen=True)
class StoredFile:
    """A tensor file, and what its table says is in it."""

    record: FileRecord
    pieces: list[StoredPiece]
    """In the order of their data."""


class Part(NamedTuple):
    """A piece, and the file that it is in."""

    piece: StoredPiece
    file: StoredFile

    @property
    def blocks(self) -> list[Block]:
        """Its blocks, in order."""
        return blocks_of(self.piece.record, self.piece.box)

    def __str__(self) -> str:
        return f"{self.file.record.path}: tensor {self.piece.record.name!r}"


@dataclass(frozen=True)
class StoredTensor:
    """One of a checkpoint's tensors, whichever ranks hold it."""

    role: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: list[Part] = field(default_factory=list)

    @property
    def content(self) -> list[tuple[Box, str]]:
        """Its blocks, each with its digest: the same for the same bytes, if they are cut alike."""
        return sorted((block.box, block.digest) for part in self.parts for block in part.blocks)

    @property
    def is_cut(self) -> bool:
        """Whether some of its blocks are others than if it were in one piece."""
        return any(part.piece.is_cut for part in self.parts)


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint, and the files that they are in."""

    tensors: dict[tuple[str, str], StoredTensor]
    """By (role, name), in the order of ranks and of their data."""
    files: list[StoredFile]


def read_table(storage: Storage, manifest: Manifest, rank: int) -> Table:
    """A rank's table; CheckpointInvalid when it is not the one that the manifest names."""
    if manifest.tables:
        return manifest.tables[rank]
    path, record = manifest.table_file(rank).path, manifest.ranks[rank]
    try:
        content = read_small(storage, path, limit=min(record.size, MAX_TABLE_BYTES))
    except StorageError as error:
        raise rejection(error) from error
    found = table.parse(content, path)
    if len(content) != record.size or own_digest(content) != record.digest:
        raise CheckpointInvalid(f"{path} does not have its recorded digest")
    expected = [
        (manifest.tensor_file(role, rank).path, size)
        for role, size in zip(manifest.roles, record.sizes, strict=True)
    ]
    if [(file.path, file.size) for file in found.files.values()] != expected:
        raise CheckpointInvalid(f"{path} lists other files than the manifest")
    return found


def tables(storage: Storage, manifest: Manifest, *, near: int = 0) -> Iterator[Table]:
    """Every rank's table, the one of rank `near` first and those farthest from it last."""
    for rank in sorted(range(manifest.world_size), key=lambda rank: (abs(rank - near), rank)):
        yield read_table(storage, manifest, rank)


def contents(storage: Storage, manifest: Manifest, roles: Collection[str] | None = None) -> Contents:
    """Every tensor of the roles (None: all). CheckpointInvalid when one is not covered exactly once."""
    found: dict[tuple[str, str], StoredTensor] = {}
    files: list[StoredFile] = []
    totals = Totals()
    for each in tables(storage, manifest):
        files += files_of(each, roles)
    for part in parts_of(files):
        piece = part.piece
        key = (piece.role, piece.tensor)
        tensor = found.setdefault(key, StoredTensor(*key, piece.record.dtype, piece.global_shape))
        _check_alike(manifest, piece, tensor.dtype, tensor.shape)
        tensor.parts.append(part)
        totals.add(piece)
    for tensor in found.values():
        held = [part.piece.box for part in tensor.parts]
        _check_cover(manifest, tensor.role, tensor.name, whole(tensor.shape), held)
    totals.check(manifest, roles)
    return Contents(found, files)


def files_of(each: Table, roles: Collection[str] | None = None) -> list[StoredFile]:
    """The files of a rank, of the roles (None: all)."""
    named = [role for role in each.files if roles is None or role in roles]
    return [StoredFile(each.files[role], each.of_role(role)) for role in named]


def parts_of(files: Iterable[StoredFile]) -> Iterator[Part]:
    """All pieces in some files, in order."""
    return (Part(piece, file) for file in files for piece in file.pieces)


@dataclass
class Wanted:
    """A box that a rank wants, and what has been found of it."""

    role: str
    tensor: str
    dtype: str
    global_shape: tuple[int, ...]
    box: Box
    parts: list[Part] = field(default_factory=list)
    left: int = 0
    """Elements not found yet."""


@dataclass(frozen=True)
class Located:
    """Where the boxes that a rank wants are."""

    wanted: dict[tuple[str, str], Wanted]
    """By (role, name) of the layout."""
    files: list[StoredFile]
    """All of every table that was read."""


def locate(storage: Storage, manifest: Manifest, layout: Layout, *, near: int) -> Located:
    """The pieces that hold some of the boxes in a layout.

    CheckpointInvalid when an element is in no piece, or in two. Tables are read until all is found.
    """
    wanted = {
        (role, name): Wanted(
            role, spec.piece_of or name, dtype_code(spec.dtype), spec.global_shape, spec.box, left=spec.size
        )
        for role, named in layout.items()
        for name, spec in named.items()
    }
    by_tensor: dict[tuple[str, str], list[Wanted]] = {}
    for item in wanted.values():
        by_tensor.setdefault((item.role, item.tensor), []).append(item)
    files: list[StoredFile] = []
    for each in tables(storage, manifest, near=near):
        found = files_of(each, layout.keys())
        files += found
        for part in parts_of(found):
            for item in by_tensor.get((part.piece.role, part.piece.tensor), ()):
                _check_alike(manifest, part.piece, item.dtype, item.global_shape)
                shared = intersection(part.piece.box, item.box)
                if shared is not None:
                    item.parts.append(part)
                    item.left -= shared.size
        if all(item.left <= 0 for item in wanted.values()):
            break
    for item in wanted.values():
        shares = (intersection(part.piece.box, item.box) for part in item.parts)
        held = [share for share in shares if share is not None]
        _check_cover(manifest, item.role, item.tensor, item.box, held)
    if len(files) == manifest.world_size * len(layout.keys() & manifest.roles.keys()):
        totals = Totals()
        for part in parts_of(files):
            totals.add(part.piece)
        totals.check(manifest, layout.keys())
    return Located(wanted, files)


def _check_alike(manifest: Manifest, piece: StoredPiece, dtype: str, shape: tuple[int, ...]) -> None:
    if (piece.record.dtype, piece.global_shape) != (dtype, shape):
        raise CheckpointInvalid(
            f"checkpoint {manifest.position}: {piece.role} {piece.tensor} is {dtype} {list(shape)} in one "
            f"place and {piece.record.dtype} {list(piece.global_shape)} in another"
        )


def _check_cover(manifest: Manifest, role: str, tensor: str, target: Box, held: list[Box]) -> None:
    fault = cover_fault(target, held)
    if fault is not None:
        raise CheckpointInvalid(f"checkpoint {manifest.position}: {role} {tensor}: {fault}")


class Total(NamedTuple):
    """What the pieces of a role add up to."""

    tensors: int = 0
    cut: int = 0
    """Pieces that are cut within a block."""
    content: int = 0
    """The sum of `content_of`, modulo 2**128."""


class Totals:
    """What pieces add up to, by role."""

    def __init__(self) -> None:
        self._of: dict[str, Total] = {}

    def add(self, piece: StoredPiece) -> None:
        """One more piece."""
        tensors, cut, content = self.of(piece.role)
        content = (content + content_of(piece)) % _DIGEST_SPACE
        self._of[piece.role] = Total(tensors + piece.begins, cut + piece.is_cut, content)

    def of(self, role: str) -> Total:
        """Of the pieces that were added."""
        return self._of.get(role, Total())

    def check(self, manifest: Manifest, roles: Collection[str] | None) -> None:
        """CheckpointInvalid unless this is what the manifest says of these roles (None: all)."""
        for role, record in manifest.roles.items():
            total = self.of(role)
            found = (total.tensors, total.cut, as_digest(total.content))
            if (roles is None or role in roles) and found != (record.tensors, record.cut, record.digest):
                raise CheckpointInvalid(
                    f"checkpoint {manifest.position}: the tables do not hold what the manifest says of {role}"
                )


def content_of(piece: StoredPiece) -> int:
    """What a piece adds to the digest of its role: a sum, since it does not matter which rank holds what."""
    about = [piece.tensor, piece.record.dtype, list(piece.global_shape)]
    total = 0
    if piece.record.size == 0 and not piece.begins:
        return total
    for block in blocks_of(piece.record, piece.box):
        line = strictjson.dump([*about, list(block.box.offset), list(block.box.shape), block.digest])
        total += int(digest(line.encode()), 16)
    return total


def as_digest(content: int) -> str:
    """The digest of a role, from the sum over its pieces."""
    return f"{content % _DIGEST_SPACE:032x}"


def role_digest(pieces: Iterable[StoredPiece]) -> str:
    """The digest of a role with these pieces."""
    return as_digest(sum(map(content_of, pieces)))
