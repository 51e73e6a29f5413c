"""Finding checkpoints: what there is, newest first, and why something does not count.

Nothing is changed on disk and no rank is needed. A checkpoint is looked at in two depths:
`check_files` sees that every file is there with its size (a thousand ranks take milliseconds),
`restoring.verify` reads and digests every byte. Whoever restores verifies every byte anyway, so
`find` does the first only.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rollforward.errors import CheckpointInvalid, NothingToResume, StorageError
from rollforward.position import Position
from rollforward.storage import ReadHandle, Storage, read_whole
from rollforward.store import manifest as manifests
from rollforward.store.layout import (
    COMMITS,
    ROLE_FOLDERS,
    TensorFileName,
    in_order,
    manifest_path,
    parse_manifest_name,
    parse_rank,
    role_folder,
    role_of_folder,
)
from rollforward.store.manifest import Manifest
from rollforward.store.restoring import verify
from rollforward.store.summary import Summary, listed_files, summarise

_PEEK_BYTES = 512


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that does not count."""

    position: Position
    reason: str
    """One line."""


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that counts, and the newer ones that do not."""

    manifest: Manifest
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of a listing."""

    position: Position
    created: str
    """UTC; empty when the manifest cannot be read."""
    size: int
    """Bytes of all its files, those shared with other checkpoints included."""
    valid: bool
    reason: str
    """Why it is not valid; empty when it is."""
    manifest: Manifest | None


def positions(storage: Storage) -> list[Position]:
    """The positions of all manifests, whole or not, newest first."""
    found = peek_incarnations(storage)
    latest = max((number for number in found.values() if number), default=0)
    # One that cannot be read is put where its position belongs, in the timeline of the latest start.
    return sorted(found, key=lambda position: (found[position] or latest, position), reverse=True)


def named_positions(storage: Storage) -> list[Position]:
    """The positions of all manifests, whole or not; by their names, nothing is opened."""
    named = (parse_manifest_name(entry.name) for entry in storage.scan(COMMITS))
    return [position for position in named if position is not None]


def oldest_position(storage: Storage) -> Position:
    """The least position of all manifests, whole or not; by their names, nothing is opened.

    For whoever has just committed one: StorageError when there is none.
    """
    found = named_positions(storage)
    if not found:
        raise StorageError(
            f"looking for the oldest checkpoint: there is no manifest in {storage}/{COMMITS}",
            hint="the run's folder was moved, emptied or replaced while the run was training: put it back",
        )
    return min(found)


def peek_incarnations(storage: Storage) -> dict[Position, int]:
    """The incarnation that each manifest claims to be of, 0 when it cannot be read; nothing is verified."""
    return {position: _peek(storage, position) for position in named_positions(storage)}


def _peek(storage: Storage, position: Position) -> int:
    try:
        with storage.open(manifest_path(position)) as handle:
            front = bytearray(min(handle.size, _PEEK_BYTES))
            handle.read_into(memoryview(front), 0)
    except StorageError:
        return 0
    return manifests.peek_incarnation(bytes(front))


def load_manifest(storage: Storage, position: Position) -> Manifest:
    """The manifest of a position; CheckpointInvalid when it cannot be read or does not prove intact."""
    return manifests.parse(_content(storage, position), f"{position}.json")


def load_summary(storage: Storage, position: Position) -> Summary:
    """The manifest of a position in short; CheckpointInvalid as from `load_manifest`."""
    return summarise(_content(storage, position), f"{position}.json")


def is_valid(storage: Storage, position: Position) -> bool:
    """Whether `find` would take this checkpoint: its manifest keeps every rule and its files are there."""
    try:
        check_files(storage, load_manifest(storage, position))
    except CheckpointInvalid:
        return False
    return True


def is_intact(storage: Storage, position: Position) -> bool:
    """`is_valid`, and every byte has its digest."""
    try:
        manifest = load_manifest(storage, position)
        check_files(storage, manifest)
        verify(storage, manifest)
    except CheckpointInvalid:
        return False
    return True


def is_there(storage: Storage, position: Position) -> bool:
    """`is_valid` but for rules that a manifest keeps unless somebody forged it; a hundred times as fast."""
    try:
        _check_files(storage, position, listed_files(_content(storage, position), f"{position}.json"))
    except CheckpointInvalid:
        return False
    return True


def _content(storage: Storage, position: Position) -> bytes:
    """The bytes of a manifest; CheckpointInvalid when they cannot be read, or its ends are not a manifest's.

    The ends are looked at first: a large file of something else is not read.
    """
    path = manifest_path(position)
    try:
        with storage.open(path) as handle:
            if not manifests.looks_whole(*_ends(handle, _PEEK_BYTES)):
                raise CheckpointInvalid(f"manifest {position}.json: {manifests.NOT_WHOLE}")
            return read_whole(handle, path, limit=manifests.MAX_MANIFEST_BYTES)
    except StorageError as error:
        raise CheckpointInvalid(f"manifest {position}: {error.message}") from error


def _ends(handle: ReadHandle, size: int) -> tuple[bytes, bytes]:
    """Up to so many bytes of a file's front, and of its end."""
    size = min(size, handle.size)
    front, back = bytearray(size), bytearray(size)
    handle.read_into(memoryview(front), 0)
    handle.read_into(memoryview(back), handle.size - size)
    return bytes(front), bytes(back)


def check_files(storage: Storage, manifest: Manifest) -> None:
    """CheckpointInvalid unless every file of the checkpoint is there with its size."""
    files = [(file.path, file.size) for file in (*manifest.files, *manifest.attachments)]
    _check_files(storage, manifest.position, files)


def _check_files(storage: Storage, position: Position, files: Sequence[tuple[str, int]]) -> None:
    for path, size in files:
        try:
            entry = storage.stat(path)
        except StorageError as error:
            raise CheckpointInvalid(f"checkpoint {position}: {error.message}") from error
        if entry is None:
            raise CheckpointInvalid(f"checkpoint {position}: {path} is missing")
        if entry.kind != "file":
            raise CheckpointInvalid(f"checkpoint {position}: {path} is a {entry.kind}, not a file")
        if entry.size != size:
            raise CheckpointInvalid(f"checkpoint {position}: {path} has {entry.size} bytes instead of {size}")


def candidates(storage: Storage) -> Iterator[Manifest | Rejected]:
    """Every checkpoint, newest first: its manifest when its files are there, else why not."""
    for position in positions(storage):
        try:
            manifest = load_manifest(storage, position)
            check_files(storage, manifest)
        except CheckpointInvalid as error:
            yield Rejected(position, error.message)
        else:
            yield manifest


def find(storage: Storage, *, skip: Collection[Position] = (), until: Position | None = None) -> Found:
    """The newest checkpoint whose manifest proves intact and whose files are all there.

    `skip` names positions that the caller has rejected already, because reading them failed. With
    `until`, checkpoints of later positions are passed over.
    Raises NothingToResume, which says what was looked for and what is there.
    """
    rejected: list[Rejected] = []
    later: list[Position] = []
    for candidate in candidates(storage):
        if until is not None and candidate.position > until:
            later.append(candidate.position)
        elif isinstance(candidate, Rejected):
            rejected.append(candidate)
        elif candidate.position in skip:
            rejected.append(
                Rejected(candidate.position, f"checkpoint {candidate.position}: rejected when it was read")
            )
        else:
            return Found(candidate, tuple(rejected))
    lines = [f"no checkpoint to resume from in {storage}: looked for {COMMITS}/<epoch>_<step>.json"]
    if until is not None:
        lines[0] += f" at or before {until}"
    lines += [f"  {item.reason}" for item in rejected]
    if later:
        lines.append(f"  the oldest checkpoint is {min(later)}")
    elif not rejected:
        lines.append(f"  there is no manifest in {COMMITS}/")
    lines += [f"  {line}" for line in describe(storage)]
    raise NothingToResume(
        "\n".join(lines),
        hint=_what_to_try(rejected=bool(rejected), later=bool(later)),
    )


def _what_to_try(*, rejected: bool, later: bool) -> str:
    if rejected:
        return (
            "put back what is missing, or start a new run in another folder; rollforward verify --deep "
            "tells what is whole"
        )
    if later:
        return "take the oldest checkpoint's position or a later one; nothing leads to what is before it"
    return "check the path; without --resume_training a new run is started"


def list_checkpoints(storage: Storage, *, deep: bool = False) -> list[CheckpointInfo]:
    """Every checkpoint, newest first; `deep` reads and digests every byte of each."""
    found = []
    for position in positions(storage):
        manifest = None
        reason = ""
        try:
            manifest = load_manifest(storage, position)
            check_files(storage, manifest)
            if deep:
                verify(storage, manifest)
        except CheckpointInvalid as error:
            reason = error.message
        created = manifest.created if manifest else ""
        size = manifest.size if manifest else 0
        found.append(CheckpointInfo(position, created, size, not reason, reason, manifest))
    return found


def tensor_files(storage: Storage, folder: str) -> Iterator[TensorFileName]:
    """What in the folder of a role has the name of a tensor file of ours."""
    for rank in storage.scan(folder):
        if parse_rank(rank.name) is not None and rank.kind == "folder":
            for entry in storage.scan(f"{folder}/{rank.name}"):
                name = TensorFileName.parse(f"{folder}/{rank.name}/{entry.name}")
                if name is not None:
                    yield name


def roles_on_disk(storage: Storage) -> list[str]:
    """The roles of which the folder seems to hold something, by names alone, and those of the contract.

    For listings, and for what must not be touched. A folder that looks like a role's may be anybody's.
    """
    folders = [entry.name for entry in storage.scan("") if entry.kind == "folder"]
    others = ((role_of_folder(folder), folder) for folder in folders)
    found = [role for role, folder in others if role and any(True for _ in tensor_files(storage, folder))]
    return in_order([*ROLE_FOLDERS, *found])


def describe(storage: Storage) -> list[str]:
    """What lies in the role folders, a line for each rank, for error messages."""
    lines = []
    for folder in map(role_folder, roles_on_disk(storage)):
        ranks = sorted(
            rank
            for entry in storage.scan(folder)
            if (rank := parse_rank(entry.name)) is not None and entry.kind == "folder"
        )
        if not ranks:
            lines.append(f"{folder}/: no rank folders")
        for rank in ranks:
            names = [entry.name for entry in storage.scan(f"{folder}/rank_{rank}")]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"{folder}/rank_{rank}: {shown or 'empty'}")
    return lines
