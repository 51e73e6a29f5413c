"""Manifests of versions 1 and 2, which are read for good and written no more.

They have no tables: the manifest itself lists every file and every tensor. A tensor is whole, with one digest
for all its bytes. Version 2 differs from version 1 only in that it may have roles outside the contract.
What they say is turned into what a manifest of today and its tables would say.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rollforward.position import Position
from rollforward.storage.base import check_path
from rollforward.store.contents import role_digest
from rollforward.store.digests import is_digest
from rollforward.store.layout import ROLE_FOLDERS, TensorFileName, in_order, is_role
from rollforward.store.manifest import (
    Manifest,
    RankRecord,
    RoleRecord,
    digest_of_tensors,
    parse_head,
)
from rollforward.store.sealing import need, text
from rollforward.store.table import FileRecord, StoredPiece, Table, make, parse_file
from rollforward.store.tensorfile import TensorRecord, check_digest, check_span, is_count, parse_shape

KEYS = frozenset(
    {"format", "version", "incarnation", "position", "run_id", "global_step", "created", "world_size"}
    | {"fingerprint", "journal", "versions", "state", "roles", "attachments", "files", "tensors", "digest"}
)

_Files = dict[tuple[str, int], FileRecord]
"""(role, rank) -> file."""


def parse(value: Mapping[str, Any], name: str, own: str) -> Manifest:
    """The manifest in the file `commits/<name>`, of version 1 or 2; ValueError says why it is not one."""
    head = parse_head(value, name, keys=KEYS)
    need(isinstance(value["files"], list) and isinstance(value["tensors"], list), "not a list of files")
    named = [_parse_named(entry, head["world_size"]) for entry in value["files"]]
    files = check_files(named, head["world_size"])
    pieces = [_parse_tensor(entry, named) for entry in value["tensors"]]
    _check_tensors([piece for _, piece in pieces])
    roles = in_order({role for role, _ in files})
    check_version(value, roles)
    digests = _digests(piece for _, piece in pieces)
    need(value["roles"] == digests, "the digests of its roles are not those of its tensors")
    tables = [
        make(
            rank,
            head["position"],
            {role: files[role, rank] for role in roles},
            (piece for at, piece in pieces if at == rank),
        )
        for rank in range(head["world_size"])
    ]
    return Manifest(
        **head,
        roles={role: _role(role, named, tables) for role in roles},
        ranks=tuple(RankRecord(0, "", tuple(f.size for f in table.files.values())) for table in tables),
        tables=tuple(tables),
        version=value["version"],
        digest=own,
    )


def version_of(roles: Iterable[str]) -> int:
    """The version of a manifest with these roles: 1 unless one of them is outside the contract."""
    return 1 if ROLE_FOLDERS.keys() >= set(roles) else 2


def check_version(value: Mapping[str, Any], roles: Iterable[str]) -> None:
    """ValueError unless a manifest has exactly the version that its roles require."""
    given, asked = value["version"], version_of(roles)
    need(given == asked, f"it says version {given}, and with its roles it would be version {asked}")


def check_files(named: Iterable[tuple[TensorFileName, FileRecord]], world_size: int) -> _Files:
    """The files by role and rank; ValueError unless each role has one of every rank, written together."""
    files: _Files = {}
    written: dict[str, tuple[Position, int]] = {}
    for name, file in named:
        need((name.role, name.rank) not in files, f"{file.path[:80]!r} is listed twice")
        together = written.setdefault(name.role, (name.position, name.attempt))
        need(together == (name.position, name.attempt), "a role is listed from two positions")
        files[name.role, name.rank] = file
    for role in written:
        count = sum(1 for other, _ in files if other == role)
        need(count == world_size, f"{role} is listed for {count} of {world_size} ranks")
    return files


def _role(role: str, named: list[tuple[TensorFileName, FileRecord]], tables: list[Table]) -> RoleRecord:
    name = next(name for name, _ in named if name.role == role)
    pieces = [piece for table in tables for piece in table.of_role(role)]
    cut = sum(piece.is_cut for piece in pieces)
    return RoleRecord(name.position, name.attempt, len(pieces), role_digest(pieces), cut)


def _digests(pieces: Iterable[StoredPiece]) -> dict[str, str]:
    """The digests of roles as these versions have them."""
    parts: dict[str, list[tuple[str, str, tuple[int, ...], str]]] = {}
    for piece in pieces:
        record = piece.record
        parts.setdefault(piece.role, []).append((record.name, record.dtype, record.shape, record.digest))
    return {role: digest_of_tensors(found) for role, found in parts.items()}


def _parse_named(entry: Any, world_size: int) -> tuple[TensorFileName, FileRecord]:
    path, size, found = parse_file(entry)
    name = TensorFileName.parse(check_path(path))
    if name is None or name.rank >= world_size:
        raise ValueError(f"{path[:80]!r} is not a tensor file of this run")
    return name, FileRecord(path, size, found)


def _parse_tensor(entry: Any, files: list[tuple[TensorFileName, FileRecord]]) -> tuple[int, StoredPiece]:
    """The rank that holds a tensor, and the tensor."""
    need(isinstance(entry, list) and len(entry) == 9, "an entry of its tensors is malformed")
    role, name, dtype, shape, layout, number, begin, end, found = entry
    name = text(name, "a tensor's name")
    short = repr(name[:60])
    need(isinstance(role, str) and is_role(role), f"{short} has an unknown role")
    need(layout == "replicated", f"{short} has an unknown layout")
    need(is_count(number) and number < len(files), f"{short} is in a file that is not listed")
    need(is_count(begin) and is_count(end) and begin <= end, f"{short} has a malformed byte range")
    parsed = parse_shape(shape, name)
    check_span(name, dtype, parsed, begin, end)
    file, record = files[number]
    need(end <= record.size, f"{short} lies beyond the end of its file")
    need(file.role == role, f"{short} is in another role's file")
    need(is_digest(found), "a digest is malformed")
    check_digest(name, end - begin, found)
    piece = StoredPiece.of_whole(role, TensorRecord(name, dtype, parsed, begin, end, found))
    return file.rank, piece


def _check_tensors(pieces: list[StoredPiece]) -> None:
    names: set[tuple[str, str]] = set()
    for piece in pieces:
        key = (piece.role, piece.record.name)
        need(key not in names, f"the tensor {piece.record.name[:60]!r} is listed twice")
        names.add(key)
