"""The manifest: the file that makes a checkpoint exist, and the single source of truth about it.

Promises: `parse(dump(m)) == m`; a manifest that was edited, truncated or hit by a bit flip is
rejected because of its own digest; an intact one that names a path outside the run's folder, a byte
range outside a file, or the same thing twice is rejected too. Reading a manifest allocates memory in
proportion to its size on disk and no more. The format is described in the docstring of
`rollforward.store`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.storage.base import check_path
from rollforward.store import strictjson
from rollforward.store.digests import DIGEST_HEX, digest
from rollforward.store.layout import MODEL, ROLE_FOLDERS, TensorFileName, is_role, parse_manifest_name
from rollforward.store.tensorfile import (
    TensorRecord,
    WrittenFile,
    as_bytes,
    check_span,
    dtype_code,
    is_count,
    parse_shape,
)

FORMAT = "rollforward checkpoint"
VERSIONS = (1, 2)
"""Version 2 allows roles outside the contract; nothing else differs."""
MAX_MANIFEST_BYTES = 64 << 20
MAX_ATTACHMENT_BYTES = 1 << 28
_MOST_VALUES = 4_000_000
"""Room for 300,000 tensors."""
MAX_INCARNATION = 10**18 - 1
"""The highest that fits into the names of journal segments."""
NOT_WHOLE = "cut short or overwritten: it does not end with its digest"
_LARGEST = 10**300
_FRONT = re.compile(rb'{"format":"%b","version":[12],"incarnation":(\d{1,18}),' % FORMAT.encode())
_TAIL = len(',"digest":""}\n') + DIGEST_HEX
KEYS = frozenset(
    {"format", "version", "incarnation", "position", "run_id", "global_step", "created", "world_size"}
    | {"fingerprint", "journal", "versions", "state", "roles", "attachments", "files", "tensors", "digest"}
)

Generation = tuple[str, Position, int]
"""(role, position, attempt): a role's files that were written together, one by each rank."""

TensorPart = tuple[str, str, tuple[int, ...], str]
"""(name, dtype, shape, digest): what a tensor contributes to the digest of its role."""


@dataclass(frozen=True)
class FileRecord:
    """One of a checkpoint's tensor files."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Attachment(FileRecord):
    """A small file that a run needs to start, such as the model's `config.json`."""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class StoredTensor:
    """One of a checkpoint's tensors, and where its bytes are."""

    role: str
    file: str
    """Path of the file that holds it."""
    record: TensorRecord
    layout: str = "replicated"
    """How it is distributed over the ranks: version 1 has only `replicated` (the same on every rank)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about one checkpoint."""

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
    files: tuple[FileRecord, ...]
    tensors: tuple[StoredTensor, ...]
    attachments: tuple[Attachment, ...] = ()
    digest: str = field(default="", compare=False)
    """The manifest's own digest: set by `parse` and by the store, not by hand."""

    @property
    def roles(self) -> set[str]:
        """Every role in it, including roles without tensors."""
        return {generation[0] for generation in self.generations()} | {item.role for item in self.tensors}

    @property
    def version(self) -> int:
        """The format version."""
        return version_of(self.roles)

    @property
    def order(self) -> tuple[int, Position]:
        """Sort key: newer checkpoints have greater values."""
        return self.incarnation, self.position

    @property
    def size(self) -> int:
        """Bytes of all files that it lists, including shared ones."""
        return sum(file.size for file in self.files) + sum(file.size for file in self.attachments)

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> value, for retention and for people; empty when the trainer gave none."""
        return metrics_of(self.state)

    def role_digests(self) -> dict[str, str]:
        """One digest per role, over its tensors by name; independent of world size and files."""
        parts: dict[str, list[TensorPart]] = {}
        for tensor in self.tensors:
            record = tensor.record
            part = (record.name, record.dtype, record.shape, record.digest)
            parts.setdefault(tensor.role, []).append(part)
        return {role: _role_digest(found) for role, found in sorted(parts.items())}

    def generations(self) -> set[Generation]:
        """The files it needs, one entry for all ranks: their role and the position they were written at."""
        parsed = [TensorFileName.parse(file.path) for file in self.files]
        return {(name.role, name.position, name.attempt) for name in parsed if name is not None}

    def paths(self) -> set[str]:
        """Every file that this checkpoint needs."""
        return {file.path for file in self.files} | {file.path for file in self.attachments}


def metrics_of(state: Mapping[str, Any]) -> dict[str, float]:
    """See `Manifest.metrics`."""
    given = state.get("metrics")
    found = given.items() if isinstance(given, dict) else ()
    # An integer may be too large for a float.
    return {
        name: float(value)
        for name, value in found
        if type(value) is float or (type(value) is int and abs(value) < _LARGEST)
    }


def tensors_of(role: str, written: WrittenFile) -> list[StoredTensor]:
    """The manifest's records for the tensors in a file that was just written."""
    return [StoredTensor(role, written.path, record) for record in written.tensors]


def dump(manifest: Manifest) -> bytes:
    """The manifest's bytes, ending with its own digest; ValueError for a state that JSON cannot hold."""
    index = {file.path: number for number, file in enumerate(manifest.files)}
    files = [[file.path, file.size, file.digest] for file in manifest.files]
    attachments = [[file.path, file.size, file.digest] for file in manifest.attachments]
    tensors = [
        [
            tensor.role,
            tensor.record.name,
            tensor.record.dtype,
            list(tensor.record.shape),
            tensor.layout,
            index[tensor.file],
            tensor.record.begin,
            tensor.record.end,
            tensor.record.digest,
        ]
        for tensor in manifest.tensors
    ]
    head = {"format": FORMAT, "version": manifest.version, "incarnation": manifest.incarnation}
    middle = {
        "position": str(manifest.position),
        "run_id": manifest.run_id,
        "global_step": manifest.global_step,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "fingerprint": manifest.fingerprint,
        # Reserved: incarnation and position say where replay starts.
        "journal": None,
        "versions": dict(manifest.versions),
        "state": dict(manifest.state),
        "roles": manifest.role_digests(),
    }
    lines = [strictjson.dump(head)[:-1]]
    lines += [f'"{key}":{strictjson.dump(value)}' for key, value in middle.items()]
    lines += [f'"attachments":{_dump_lines(attachments)}', f'"files":{_dump_lines(files)}']
    lines += [f'"tensors":{_dump_lines(tensors)}']
    body = ",\n".join(lines).encode()
    if len(body) + _TAIL > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(body) + _TAIL} bytes; {MAX_MANIFEST_BYTES} are the most")
    return seal(body)


def seal(body: bytes) -> bytes:
    """Close a JSON object that lacks its closing brace with the digest of its bytes."""
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def _dump_lines(entries: list[list[Any]]) -> str:
    return "[\n" + ",\n".join(map(strictjson.dump, entries)) + "\n]"


def own_digest(content: bytes) -> str:
    """The digest at the end of a dumped manifest."""
    return content[-_TAIL:][11 : 11 + DIGEST_HEX].decode()


def peek_incarnation(front: bytes) -> int:
    """The incarnation that a manifest's first bytes claim, for sorting manifests; 0 when unreadable."""
    match = _FRONT.match(front)
    return int(match[1]) if match else 0


def looks_whole(front: bytes, tail: bytes) -> bool:
    """Whether these first and last bytes may be a manifest's: if not, the file is not worth reading."""
    return front[:1] == b"{" and _is_tail(tail[-_TAIL:])


def parse(content: bytes, name: str) -> Manifest:
    """Parse the manifest in the file `commits/<name>`; CheckpointInvalid says why it is not one."""
    try:
        own = check_own_digest(content)
        value = strictjson.parse(content, most=_MOST_VALUES)
        return _parse(value, name, own)
    except ValueError as error:
        raise CheckpointInvalid(f"manifest {name}: {error}") from None


def check_own_digest(content: bytes) -> str:
    """The digest at the end of a manifest; ValueError when it does not match the bytes before it."""
    body, tail = content[:-_TAIL], content[-_TAIL:]
    if not _is_tail(tail):
        raise ValueError(NOT_WHOLE)
    own = tail[11 : 11 + DIGEST_HEX].decode("ascii", "replace")
    if own != digest(body):
        raise ValueError("edited or damaged: it does not have the digest that it ends with")
    return own


def _is_tail(tail: bytes) -> bool:
    return tail.startswith(b',"digest":"') and tail.endswith(b'"}\n')


def _parse(value: Any, name: str, own: str) -> Manifest:
    _need(isinstance(value, dict), "not a JSON object")
    head = parse_head(value, name, keys=KEYS)
    files = tuple(FileRecord(*_file_entry(entry)) for entry in _list(value["files"], "files"))
    attachments = tuple(
        Attachment(*_file_entry(entry)) for entry in _list(value["attachments"], "attachments")
    )
    tensors = tuple(_tensor_entry(entry, files) for entry in _list(value["tensors"], "tensors"))
    _check_files(files, attachments, value["world_size"])
    _check_tensors(tensors)
    manifest = Manifest(**head, files=files, tensors=tensors, attachments=attachments, digest=own)
    check_version(value, manifest.roles)
    _need(value["roles"] == manifest.role_digests(), "the digests of its roles are not those of its tensors")
    return manifest


def parse_head(value: Mapping[str, Any], name: str, *, keys: frozenset[str]) -> dict[str, Any]:
    """The fields of a `Manifest` except files, attachments and tensors; ValueError says what is wrong.

    `value` is the content of the file `commits/<name>`, or the part of it with exactly these keys.
    """
    _need(value.get("format") == FORMAT, f"its format is not {FORMAT!r}")
    version = value.get("version")
    _need(
        type(version) is int and version in VERSIONS,
        f"its version is {str(version)[:20]}; this program reads versions {' and '.join(map(str, VERSIONS))}",
    )
    _need(value.keys() == keys, f"unexpected or missing keys: {sorted(value.keys() ^ keys)[:5]}")
    position = Position.parse(_text(value["position"], "position"))
    _need(parse_manifest_name(name) == position, f"it is about {position}, not what its file name says")
    for key in ("incarnation", "global_step", "world_size"):
        _need(is_count(value[key]), f"{key} is not a count")
    _need(value["world_size"] >= 1, "a world size of 0")
    _need(value["incarnation"] <= MAX_INCARNATION, "its incarnation is absurd")
    versions, state = value["versions"], value["state"]
    _need(isinstance(versions, dict) and isinstance(state, dict), "versions or state is not an object")
    return {
        "incarnation": value["incarnation"],
        "position": position,
        "run_id": _text(value["run_id"], "run_id"),
        "global_step": value["global_step"],
        "created": _text(value["created"], "created"),
        "world_size": value["world_size"],
        "fingerprint": _text(value["fingerprint"], "fingerprint"),
        "versions": {str(key): _text(item, "a version") for key, item in versions.items()},
        "state": state,
    }


def version_of(roles: Iterable[str]) -> int:
    """The version of a manifest with these roles: 1 unless one of them is outside the contract."""
    return 1 if ROLE_FOLDERS.keys() >= set(roles) else 2


def check_version(value: Mapping[str, Any], roles: Iterable[str]) -> None:
    """ValueError unless a manifest has exactly the version that its roles require."""
    given, asked = value["version"], version_of(roles)
    _need(given == asked, f"it says version {given}, and with its roles it would be version {asked}")


def digest_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """What `Manifest.role_digests` would give for a role with these tensors."""
    return _role_digest(
        (name, dtype_code(array.dtype), tuple(array.shape), digest(as_bytes(array).data))
        for name, array in arrays.items()
    )


def _role_digest(parts: Iterable[TensorPart]) -> str:
    lines = [
        strictjson.dump([name, dtype, list(shape), found]) for name, dtype, shape, found in sorted(parts)
    ]
    return digest("\n".join(lines).encode())


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _text(value: Any, what: str) -> str:
    _need(isinstance(value, str), f"{what} is not a text")
    return str(value)


def _list(value: Any, what: str) -> list[Any]:
    _need(isinstance(value, list), f"{what} is not a list")
    return list(value)


def _digest(value: Any) -> str:
    good = isinstance(value, str) and len(value) == DIGEST_HEX and set(value) <= set("0123456789abcdef")
    _need(good, "a digest is malformed")
    return str(value)


def _file_entry(entry: Any) -> tuple[str, int, str]:
    _need(isinstance(entry, list) and len(entry) == 3, "an entry of its files is malformed")
    path, size, found = entry
    _need(is_count(size), "the size of a file is malformed")
    return check_path(_text(path, "a path")), size, _digest(found)


def _tensor_entry(entry: Any, files: tuple[FileRecord, ...]) -> StoredTensor:
    _need(isinstance(entry, list) and len(entry) == 9, "an entry of its tensors is malformed")
    role, name, dtype, shape, layout, number, begin, end, found = entry
    name = _text(name, "a tensor's name")
    _need(isinstance(role, str) and is_role(role), f"{name[:60]!r} has an unknown role")
    _need(layout == "replicated", f"{name[:60]!r} has an unknown layout")
    _need(is_count(number) and number < len(files), f"{name[:60]!r} is in a file that is not listed")
    _need(is_count(begin) and is_count(end) and begin <= end, f"{name[:60]!r} has a malformed byte range")
    parsed = parse_shape(shape, name)
    check_span(name, dtype, parsed, begin, end)
    _need(end <= files[number].size, f"{name[:60]!r} lies beyond the end of its file")
    return StoredTensor(
        role, files[number].path, TensorRecord(name, dtype, parsed, begin, end, _digest(found)), layout
    )


def _check_files(files: Iterable[FileRecord], attachments: Iterable[Attachment], world_size: int) -> None:
    ranks: dict[Generation, set[int]] = {}
    for file in files:
        parsed = TensorFileName.parse(file.path)
        if parsed is None or parsed.rank >= world_size:
            raise ValueError(f"{file.path[:80]!r} is not a tensor file of this run")
        found = ranks.setdefault((parsed.role, parsed.position, parsed.attempt), set())
        _need(parsed.rank not in found, f"{file.path[:80]!r} is listed twice")
        found.add(parsed.rank)
    for (role, position, _), found in ranks.items():
        _need(
            len(found) == world_size, f"{role} of {position} is listed for {len(found)} of {world_size} ranks"
        )
    _need(len({key[0] for key in ranks}) == len(ranks), "a role is listed from two positions")
    paths: set[str] = set()
    for attachment in attachments:
        folder, _, name = attachment.path.partition("/")
        ours = folder.partition(".")[0] == MODEL and name and "/" not in name
        _need(bool(ours), f"{attachment.path[:80]!r} is not an attachment of this run")
        _need(attachment.path not in paths, f"{attachment.path[:80]!r} is listed twice")
        paths.add(attachment.path)


def _check_tensors(tensors: tuple[StoredTensor, ...]) -> None:
    names: set[tuple[str, str]] = set()
    files = {path: TensorFileName.parse(path) for path in {tensor.file for tensor in tensors}}
    for tensor in tensors:
        key = (tensor.role, tensor.record.name)
        _need(key not in names, f"the tensor {tensor.record.name[:60]!r} is listed twice")
        names.add(key)
        parsed = files[tensor.file]
        _need(
            parsed is not None and parsed.role == tensor.role,
            f"{tensor.record.name[:60]!r} is in another role's file",
        )
