"""A rank's table: what it holds of a checkpoint, piece by piece.

Promises: `parse(dump(t)) == t`; a table that is damaged, or that names a byte range outside a file, a
box outside a tensor, or the same thing twice, is rejected. Reading one allocates memory in proportion to its
size on disk. The format is described in the docstring of `rollforward.store`.

A table is trusted only when the manifest names its digest; what its paths may be, the manifest says too
(`contents.read_table`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rollforward.boxes import Box, Shape, blocks, is_aligned, whole
from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.store import strictjson
from rollforward.store.digests import DIGEST_HEX, digest, is_digest
from rollforward.store.layout import TensorFileName, in_order
from rollforward.store.sealing import check_own_digest, dump_lines, need, seal, text
from rollforward.store.tensorfile import (
    DTYPES,
    TensorRecord,
    check_digest,
    check_span,
    is_count,
    parse_shape,
)

FORMAT = "rollforward table"
VERSION = 3
MAX_TABLE_BYTES = 64 << 20
_MOST_VALUES = 4_000_000
"""Room for 300,000 pieces."""
_NAME_DIGITS = 16
_PIECES = b',\n"pieces":['
"""The text just before the pieces; never inside a string, where JSON has no line breaks."""


@dataclass(frozen=True)
class FileRecord:
    """One of a checkpoint's files."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class StoredPiece:
    """A box of a tensor, and where its bytes are."""

    role: str
    record: TensorRecord
    """Its entry in the rank's file of that role."""
    tensor: str
    """The name of the tensor; that of the entry may be another."""
    global_shape: Shape
    offset: Shape

    @property
    def box(self) -> Box:
        """The elements that it holds."""
        return Box(self.offset, self.record.shape)

    @property
    def begins(self) -> bool:
        """Whether it holds the tensor's first element, or all of a tensor that has none."""
        return not any(self.offset) and (self.box.size > 0 or self.record.shape == self.global_shape)

    @property
    def is_cut(self) -> bool:
        """Whether its blocks are others than those of its tensor in one piece, and so are its digests."""
        itemsize = DTYPES[self.record.dtype].itemsize
        return not is_aligned(self.box, self.global_shape, itemsize) or not has_all_digests(self)

    @classmethod
    def of_whole(cls, role: str, record: TensorRecord) -> "StoredPiece":
        """The only piece of a tensor."""
        return cls(role, record, record.name, record.shape, whole(record.shape).offset)


def has_all_digests(piece: StoredPiece) -> bool:
    """Whether it has a digest for each block; earlier versions have one for all of a large tensor."""
    itemsize = DTYPES[piece.record.dtype].itemsize
    return len(piece.record.digest) == DIGEST_HEX * len(blocks(piece.box, itemsize))


@dataclass(frozen=True)
class Table:
    """What one rank holds of a checkpoint."""

    rank: int
    position: Position
    """The checkpoint's."""
    files: Mapping[str, FileRecord]
    """role -> this rank's file, in the order of manifests."""
    pieces: tuple[StoredPiece, ...]
    """By role in that order, then in the order of their data."""

    @property
    def begun(self) -> list[str]:
        """For each tensor whose first element is here, 16 digits of a digest of its role and name."""
        named = sorted((piece.role, piece.tensor) for piece in self.pieces if piece.begins)
        return [digest(strictjson.dump(list(name)).encode())[:_NAME_DIGITS] for name in named]

    def of_role(self, role: str) -> list[StoredPiece]:
        """The pieces in this rank's file of a role, in the order of their data."""
        return [piece for piece in self.pieces if piece.role == role]


def make(
    rank: int, position: Position, files: Mapping[str, FileRecord], pieces: Iterable[StoredPiece]
) -> Table:
    """A table with its files and pieces in order."""
    roles = in_order(files)
    number = {role: place for place, role in enumerate(roles)}
    ordered = sorted(pieces, key=lambda piece: (number[piece.role], piece.record.place))
    return Table(rank, position, {role: files[role] for role in roles}, tuple(ordered))


def dump(table: Table) -> bytes:
    """The table's bytes, ending with its own digest; ValueError when it is too large."""
    head = {"format": FORMAT, "version": VERSION, "rank": table.rank, "position": str(table.position)}
    number = {role: place for place, role in enumerate(table.files)}
    files = [[file.path, file.size, file.digest] for file in table.files.values()]
    pieces = [_dump_piece(number[piece.role], piece) for piece in table.pieces]
    lines = [strictjson.dump(head)[:-1], f'"files":{dump_lines(files)}']
    lines += [f'"begun":"{"".join(table.begun)}"', f'"pieces":{dump_lines(pieces)}']
    content = seal(",\n".join(lines).encode())
    if len(content) > MAX_TABLE_BYTES:
        raise ValueError(
            f"the table of rank {table.rank} takes {len(content)} bytes for {len(pieces)} pieces; "
            f"{MAX_TABLE_BYTES} are the most"
        )
    return content


def _dump_piece(number: int, piece: StoredPiece) -> list[Any]:
    record = piece.record
    row = [number, record.name, record.dtype, list(record.shape), record.begin, record.end, record.digest]
    if piece == StoredPiece.of_whole(piece.role, record):
        return row
    return [*row, piece.tensor, list(piece.global_shape), list(piece.offset)]


def parse(content: bytes, path: str) -> Table:
    """Parse the table in the file `path`; CheckpointInvalid says why it is not one."""
    try:
        check_own_digest(content)
        value = strictjson.parse(content, most=_MOST_VALUES)
        return _parse(value)
    except ValueError as error:
        raise CheckpointInvalid(f"{path}: {error}") from None


def summarise(content: bytes, path: str) -> tuple[list[FileRecord], list[str]]:
    """`files` and `begun` of a table, without parsing its pieces; CheckpointInvalid."""
    try:
        check_own_digest(content)
        value = strictjson.parse(content.partition(_PIECES)[0] + b"}")
        _, _, files = _parse_head(value, {"pieces", "digest"})
        return list(files.values()), _parse_begun(value["begun"])
    except ValueError as error:
        raise CheckpointInvalid(f"{path}: {error}") from None


def _parse(value: Any) -> Table:
    rank, position, files = _parse_head(value, set())
    need(isinstance(value["pieces"], list), "its pieces are not a list")
    listed = [(role, file.size) for role, file in files.items()]
    pieces = tuple(_parse_piece(entry, listed) for entry in value["pieces"])
    table = make(rank, position, files, pieces)
    need(table.pieces == pieces, "its pieces are not in the order of their data")
    names = {(piece.role, piece.record.name) for piece in pieces}
    need(len(names) == len(pieces), "a name is listed twice")
    need(_parse_begun(value["begun"]) == table.begun, "what it says to begin are not its first pieces")
    return table


def _parse_begun(value: Any) -> list[str]:
    need(isinstance(value, str) and len(value) % _NAME_DIGITS == 0, "what it says to begin is malformed")
    return [value[at : at + _NAME_DIGITS] for at in range(0, len(value), _NAME_DIGITS)]


def _parse_head(value: Any, missing: set[str]) -> tuple[int, Position, dict[str, FileRecord]]:
    """Rank, position and files of a table, or of the part of it that lacks some keys."""
    need(isinstance(value, dict), "not a JSON object")
    need(value.get("format") == FORMAT, f"its format is not {FORMAT!r}")
    version = value.get("version")
    need(type(version) is int and version == VERSION, f"its version is {str(version)[:20]}, not {VERSION}")
    keys = {"format", "version", "rank", "position", "files", "begun", "pieces", "digest"} - missing
    need(value.keys() == keys, f"unexpected or missing keys: {sorted(value.keys() ^ keys)[:5]}")
    need(is_count(value["rank"]), "its rank is not a count")
    position = Position.parse(text(value["position"], "position"))
    need(isinstance(value["files"], list), "its files are not a list")
    files: dict[str, FileRecord] = {}
    for entry in value["files"]:
        path, size, found = parse_file(entry)
        name = TensorFileName.parse(path)
        if name is None or name.rank != value["rank"]:
            raise ValueError(f"{path[:80]!r} is not a tensor file of rank {value['rank']}")
        need(name.role not in files, f"two files of {name.role}")
        files[name.role] = FileRecord(path, size, found)
    need(list(files) == in_order(files), "its files are not in the order of their roles")
    return value["rank"], position, files


def parse_file(entry: Any) -> tuple[str, int, str]:
    """Path, size and digest; ValueError when the entry is malformed."""
    need(isinstance(entry, list) and len(entry) == 3, "an entry of its files is malformed")
    path, size, found = entry
    need(is_count(size), "the size of a file is malformed")
    need(is_digest(found), "a digest is malformed")
    return text(path, "a path"), size, found


def _parse_piece(entry: Any, files: list[tuple[str, int]]) -> StoredPiece:
    need(isinstance(entry, list) and len(entry) in (7, 10), "an entry of its pieces is malformed")
    number, name, dtype, shape, begin, end, found = entry[:7]
    name = text(name, "a name")
    short = repr(name[:60])
    need(is_count(number) and number < len(files), f"{short} is in a file that is not listed")
    need(is_count(begin) and is_count(end) and begin <= end, f"{short} has a malformed byte range")
    parsed = parse_shape(shape, name)
    check_span(name, dtype, parsed, begin, end)
    role, size = files[number]
    need(end <= size, f"{short} lies beyond the end of its file")
    good = isinstance(found, str) and len(found) % DIGEST_HEX == 0
    need(good and is_digest(found, len(found)), f"{short} has a malformed digest")
    record = TensorRecord(name, dtype, parsed, begin, end, found)
    piece = StoredPiece.of_whole(role, record)
    if len(entry) == 10:
        piece = _parse_box(entry[7:], role, record)
    need(has_all_digests(piece), f"{short} has not a digest for each block")
    check_digest(name, record.size, found)
    return piece


def _parse_box(entry: list[Any], role: str, record: TensorRecord) -> StoredPiece:
    short = repr(record.name[:60])
    tensor = text(entry[0], "the name of a tensor")
    need(bool(tensor), f"{short} is a piece of no tensor")
    global_shape = parse_shape(entry[1], tensor)
    offset = parse_shape(entry[2], tensor)
    need(len(global_shape) == len(offset) == len(record.shape), f"{short} has another number of axes")
    inside = all(o + n <= size for o, n, size in zip(offset, record.shape, global_shape, strict=True))
    need(inside, f"{short} reaches beyond its tensor")
    return StoredPiece(role, record, tensor, global_shape, offset)
