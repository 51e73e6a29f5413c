"""The manifest: the file that makes a checkpoint exist, and the single source of truth about it.

Promises: `parse(dump(m)) == m`; a manifest that was edited, truncated or hit by a bit flip is
rejected because of its own digest; an intact one that breaks a rule is rejected too. Reading a manifest
allocates memory in proportion to its size on disk and no more. The format is described in the docstring of
`rollforward.store`.

A manifest has a line for each rank and an entry for each role, so that its size does not depend on the
number of tensors. What the ranks' tables say is another matter (`table`, `contents`). Versions 1 and 2 had
the tensors in the manifest (`earlier`); `versions.parse` reads all of them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from rollforward.position import Position
from rollforward.storage.base import check_path
from rollforward.store import strictjson
from rollforward.store.digests import digest, is_digest
from rollforward.store.layout import (
    MODEL,
    Generation,
    TableName,
    TensorFileName,
    check_roles,
    in_order,
    parse_manifest_name,
)
from rollforward.store.sealing import check_own_digest, dump_lines, need, own_digest, seal, text
from rollforward.store.table import FileRecord, Table, parse_file
from rollforward.store.tensorfile import as_bytes, dtype_code, is_count

FORMAT = "rollforward checkpoint"
VERSION = 3
"""The one that is written."""
MAX_MANIFEST_BYTES = 64 << 20
MAX_ATTACHMENT_BYTES = 1 << 28
MAX_INCARNATION = 10**18 - 1
"""The highest that fits into the names of journal segments."""
_LARGEST = 10**300
_FRONT = re.compile(rb'{"format":"%b","version":[123],"incarnation":(\d{1,18}),' % FORMAT.encode())
_HEAD_KEYS = frozenset(
    {"format", "version", "incarnation", "position", "run_id", "global_step", "created", "world_size"}
    | {"fingerprint", "versions", "state", "attachments", "digest"}
)
_KEYS = _HEAD_KEYS | {"roles", "attempt", "tables"}
_TABLES = b',\n"tables":['
"""The text just before the tables; never inside a string, where JSON has no line breaks."""


@dataclass(frozen=True)
class Attachment(FileRecord):
    """A small file that a run needs to start, such as the model's `config.json`."""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class RoleRecord:
    """A role of a checkpoint: its files, one of each rank, and what is in them."""

    position: Position
    """Where its files were written; an older one than the checkpoint's when it has not changed since."""
    attempt: int
    tensors: int
    """The number of its tensors."""
    digest: str
    """Of their content, whichever ranks hold it (`contents.content_of`)."""
    cut: int = 0
    """The number of pieces that are cut within a block of their tensor: where there are any, the digest is
    another than that of the same tensors cut elsewhere."""


class ListedFile(NamedTuple):
    """A file that a checkpoint needs."""

    path: str
    size: int


class RankRecord(NamedTuple):
    """What a rank wrote of a checkpoint."""

    size: int
    """Bytes of its table; 0 in versions 1 and 2, which have none."""
    digest: str
    """The one that the table ends with."""
    sizes: tuple[int, ...]
    """Bytes of its tensor files, in the order of roles."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A manifest without the records of its ranks: the part that every rank knows after a commit."""

    incarnation: int
    position: Position
    run_id: str
    global_step: int
    created: str
    """UTC, such as 2026-01-31T12:00:00.000000Z."""
    world_size: int
    fingerprint: str
    """The configuration's."""
    versions: Mapping[str, str]
    state: Mapping[str, Any]
    """The trainer's own state, a small JSON object. Only `metrics` has a meaning here."""
    roles: Mapping[str, RoleRecord]
    """In the order of manifests."""
    attempt: int = 0
    """That of its tables."""
    attachments: tuple[Attachment, ...] = ()
    digest: str = field(default="", compare=False)
    """The manifest's own digest: set by `parse` and by the store, not by hand."""

    @property
    def order(self) -> tuple[int, Position]:
        """Sort key: newer checkpoints have greater values."""
        return self.incarnation, self.position

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> value, for retention and for people; empty when the trainer gave none."""
        return metrics_of(self.state)

    def role_digests(self) -> dict[str, str]:
        """One digest per role, over its tensors; independent of world size and files.

        Where tensors are cut within blocks (`RoleRecord.cut`), `restoring.content_digests` is that of others.
        """
        return {role: record.digest for role, record in sorted(self.roles.items())}

    def tensor_file(self, role: str, rank: int) -> TensorFileName:
        """A rank's file of a role."""
        record = self.roles[role]
        return TensorFileName(role, rank, record.position, record.attempt)

    def table_file(self, rank: int) -> TableName:
        """A rank's table; versions 1 and 2 have none."""
        return TableName(rank, self.position, self.attempt)

    def generations(self) -> set[Generation]:
        """The files it needs, one entry for all ranks."""
        return {self.table_file(0).generation, *(self.tensor_file(role, 0).generation for role in self.roles)}


@dataclass(frozen=True, kw_only=True)
class Manifest(Head):
    """Everything about one checkpoint, except what each rank's table says."""

    ranks: tuple[RankRecord, ...]
    tables: tuple[Table, ...] = ()
    """Only in versions 1 and 2: what tables would say, since these have none."""
    version: int = VERSION

    @property
    def files(self) -> list[ListedFile]:
        """Every tensor file, by role, then by rank."""
        return [
            ListedFile(self.tensor_file(role, rank).path, record.sizes[place])
            for place, role in enumerate(self.roles)
            for rank, record in enumerate(self.ranks)
        ]

    @property
    def table_files(self) -> list[ListedFile]:
        """Every rank's table; versions 1 and 2 have none."""
        if self.version != VERSION:
            return []
        return [ListedFile(self.table_file(rank).path, record.size) for rank, record in enumerate(self.ranks)]

    @property
    def size(self) -> int:
        """Bytes of all files that it lists, including shared ones."""
        listed = [*self.files, *self.table_files]
        return sum(file.size for file in listed) + sum(file.size for file in self.attachments)

    def generations(self) -> set[Generation]:
        """Without tables in versions 1 and 2."""
        tables = {self.table_file(0).generation} if self.version != VERSION else set()
        return super().generations() - tables

    def paths(self) -> set[str]:
        """Every file that this checkpoint needs."""
        return {file.path for file in [*self.files, *self.table_files]} | {
            file.path for file in self.attachments
        }


def metrics_of(state: Mapping[str, Any]) -> dict[str, float]:
    """See `Head.metrics`."""
    given = state.get("metrics")
    found = given.items() if isinstance(given, dict) else ()
    # An integer may be too large for a float.
    return {
        name: float(value)
        for name, value in found
        if type(value) is float or (type(value) is int and abs(value) < _LARGEST)
    }


def dump(manifest: Manifest) -> bytes:
    """The manifest's bytes, ending with its own digest; ValueError for a state that JSON cannot hold."""
    head = {"format": FORMAT, "version": VERSION, "incarnation": manifest.incarnation}
    roles = {
        role: [str(record.position), record.attempt, record.tensors, record.digest, record.cut]
        for role, record in manifest.roles.items()
    }
    middle = {
        "position": str(manifest.position),
        "run_id": manifest.run_id,
        "global_step": manifest.global_step,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "fingerprint": manifest.fingerprint,
        "versions": dict(manifest.versions),
        "state": dict(manifest.state),
        "roles": roles,
        "attempt": manifest.attempt,
    }
    attachments = [[file.path, file.size, file.digest] for file in manifest.attachments]
    tables = [[record.size, record.digest, list(record.sizes)] for record in manifest.ranks]
    lines = [strictjson.dump(head)[:-1]]
    lines += [f'"{key}":{strictjson.dump(value)}' for key, value in middle.items()]
    lines += [f'"attachments":{dump_lines(attachments)}', f'"tables":{dump_lines(tables)}']
    content = seal(",\n".join(lines).encode())
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(content)} bytes; {MAX_MANIFEST_BYTES} are the most")
    return content


def peek_incarnation(front: bytes) -> int:
    """The incarnation that a manifest's first bytes claim, for sorting manifests; 0 when unreadable."""
    match = _FRONT.match(front)
    return int(match[1]) if match else 0


def looks_whole(front: bytes, tail: bytes) -> bool:
    """Whether these first and last bytes may be a manifest's: if not, the file is not worth reading."""
    try:
        own_digest(tail)
    except ValueError:
        return False
    return front[:1] == b"{"


def parse_current(value: Mapping[str, Any], name: str, own: str) -> Manifest:
    """The manifest in the file `commits/<name>`, of today's version; ValueError says why it is not one.

    `versions.parse` reads every version.
    """
    known = _parse_roles(value, name, _KEYS)
    need(isinstance(value["tables"], list), "its tables are not a list")
    ranks = tuple(_parse_rank(entry, len(known["roles"])) for entry in value["tables"])
    need(len(ranks) == known["world_size"], f"it lists {len(ranks)} tables of {known['world_size']} ranks")
    return Manifest(**known, ranks=ranks, digest=own)


def parse_front(content: bytes, name: str) -> Head:
    """What precedes the tables in a manifest of today's version; ValueError when it is not one.

    Its own digest is checked, so that this is as reliable as all of it.
    """
    front, tables, _ = content.partition(_TABLES)
    need(bool(tables), "no list of tables")
    own = check_own_digest(content)
    value = strictjson.parse(front + b"}")
    return Head(**_parse_roles(value, name, _KEYS - {"tables", "digest"}), digest=own)


def _parse_roles(value: Mapping[str, Any], name: str, keys: frozenset[str]) -> dict[str, Any]:
    """The fields of a `Head`, but for its digest."""
    need(value.get("version") == VERSION, f"not version {VERSION}")
    head = parse_head(value, name, keys=keys)
    need(isinstance(value["roles"], dict), "its roles are not an object")
    roles = {role: _parse_role(entry) for role, entry in value["roles"].items()}
    check_roles(roles)
    need(list(roles) == in_order(roles), "its roles are not in order")
    need(_is_attempt(value["attempt"]), "its attempt is not a count")
    return {**head, "roles": roles, "attempt": value["attempt"]}


def _is_attempt(value: Any) -> bool:
    return is_count(value) and value < 10**6


def _parse_role(entry: Any) -> RoleRecord:
    need(isinstance(entry, list) and len(entry) == 5, "an entry of its roles is malformed")
    position, attempt, tensors, found, cut = entry
    good = _is_attempt(attempt) and is_count(tensors) and is_digest(found) and is_count(cut)
    need(good, "an entry of its roles is malformed")
    return RoleRecord(Position.parse(text(position, "position")), attempt, tensors, found, cut)


def _parse_rank(entry: Any, roles: int) -> RankRecord:
    need(isinstance(entry, list) and len(entry) == 3, "an entry of its tables is malformed")
    size, found, sizes = entry
    need(is_count(size) and is_digest(found), "an entry of its tables is malformed")
    good = isinstance(sizes, list) and len(sizes) == roles and all(map(is_count, sizes))
    need(good, "the sizes of a rank's files are malformed")
    return RankRecord(size, found, tuple(sizes))


def parse_head(value: Mapping[str, Any], name: str, *, keys: frozenset[str]) -> dict[str, Any]:
    """The fields of a `Head` except roles and attempt; ValueError says what is wrong.

    `value` is the content of the file `commits/<name>`, or the part of it with exactly these keys.
    """
    need(value.keys() == keys, f"unexpected or missing keys: {sorted(value.keys() ^ keys)[:5]}")
    position = Position.parse(text(value["position"], "position"))
    need(parse_manifest_name(name) == position, f"it is about {position}, not what its file name says")
    for key in ("incarnation", "global_step", "world_size"):
        need(is_count(value[key]), f"{key} is not a count")
    need(value["world_size"] >= 1, "a world size of 0")
    need(value["incarnation"] <= MAX_INCARNATION, "its incarnation is absurd")
    versions, state = value["versions"], value["state"]
    need(isinstance(versions, dict) and isinstance(state, dict), "versions or state is not an object")
    need(isinstance(value["attachments"], list), "attachments is not a list")
    attachments = tuple(Attachment(*parse_file(entry)) for entry in value["attachments"])
    _check_attachments(attachments)
    return {
        "incarnation": value["incarnation"],
        "position": position,
        "run_id": text(value["run_id"], "run_id"),
        "global_step": value["global_step"],
        "created": text(value["created"], "created"),
        "world_size": value["world_size"],
        "fingerprint": text(value["fingerprint"], "fingerprint"),
        "versions": {str(key): text(item, "a version") for key, item in versions.items()},
        "state": state,
        "attachments": attachments,
    }


def _check_attachments(attachments: Iterable[Attachment]) -> None:
    paths: set[str] = set()
    for attachment in attachments:
        folder, _, name = check_path(attachment.path).partition("/")
        ours = folder.partition(".")[0] == MODEL and name and "/" not in name
        need(bool(ours), f"{attachment.path[:80]!r} is not an attachment of this run")
        need(attachment.path not in paths, f"{attachment.path[:80]!r} is listed twice")
        paths.add(attachment.path)


def digest_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """A digest of whole tensors: their names, dtypes, shapes and bytes."""
    return digest_of_tensors(
        (name, dtype_code(array.dtype), tuple(array.shape), digest(as_bytes(array).data))
        for name, array in arrays.items()
    )


def digest_of_tensors(parts: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The digest of tensors by (name, dtype, shape, digest of the bytes)."""
    lines = [
        strictjson.dump([name, dtype, list(shape), found]) for name, dtype, shape, found in sorted(parts)
    ]
    return digest("\n".join(lines).encode())
