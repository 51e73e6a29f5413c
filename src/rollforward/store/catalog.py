"""Finding checkpoints: which exist, newest first, and why one does not count.

Nothing is changed on disk and no rank is needed. `judging` decides whether a checkpoint counts. `find`
skips one that could not be read this time, just as it skips a damaged one: the run may resume from an older
one. But an unreadable checkpoint must never be deleted for that.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from rollforward.errors import NothingToResume, StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import manifest as manifests
from rollforward.store.judging import CheckpointInfo as CheckpointInfo
from rollforward.store.judging import Judge
from rollforward.store.judging import check_files as check_files
from rollforward.store.judging import load_manifest as load_manifest
from rollforward.store.layout import (
    COMMITS,
    ROLE_FOLDERS,
    TableName,
    TensorFileName,
    in_order,
    manifest_path,
    parse_manifest_name,
    parse_rank,
    parse_rank_file,
    role_folder,
    role_of_folder,
)
from rollforward.store.manifest import Manifest

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


def positions(storage: Storage) -> list[Position]:
    """The positions of all manifests, intact or not, newest first."""
    found = peek_incarnations(storage)
    latest = max((number for number in found.values() if number), default=0)
    # An unreadable one is sorted by its position, within the timeline of the latest start.
    return sorted(found, key=lambda position: (found[position] or latest, position), reverse=True)


def named_positions(storage: Storage) -> list[Position]:
    """The positions of all manifests, intact or not, from file names alone; nothing is opened."""
    named = (parse_manifest_name(entry.name) for entry in storage.scan(COMMITS))
    return [position for position in named if position is not None]


def oldest_position(storage: Storage) -> Position:
    """The lowest position of all manifests, intact or not, from file names alone; nothing is opened.

    For callers that have just committed one: StorageError when there is none.
    """
    found = named_positions(storage)
    if not found:
        raise StorageError(
            f"looking for the oldest checkpoint: there is no manifest in {storage}/{COMMITS}",
            hint="the run's folder was moved, emptied or replaced while the run was training: put it back",
        )
    return min(found)


def peek_incarnations(storage: Storage, unread: list[StorageError] | None = None) -> dict[Position, int]:
    """The incarnation that each manifest claims, 0 when unknown; nothing is verified.

    `unread` collects the errors of those that could not be read this time.
    """
    found = {}
    for position in named_positions(storage):
        try:
            found[position] = _peek(storage, position)
        except StorageError as error:
            found[position] = 0
            if unread is not None and not error.settled:
                unread.append(error)
    return found


def _peek(storage: Storage, position: Position) -> int:
    with storage.open(manifest_path(position)) as handle:
        front = bytearray(min(handle.size, _PEEK_BYTES))
        handle.read_into(memoryview(front), 0)
    return manifests.peek_incarnation(bytes(front))


def candidates(storage: Storage) -> Iterator[Manifest | Rejected]:
    """Every checkpoint, newest first: its manifest if it counts, otherwise why it does not."""
    judge = Judge(storage)
    for position in positions(storage):
        info = judge.judge(position)
        if info is not None:
            counts = info.valid and info.manifest
            yield counts or Rejected(position, info.reason)


def find(storage: Storage, *, skip: Collection[Position] = (), until: Position | None = None) -> Found:
    """The newest checkpoint whose manifest is intact and whose files are all there.

    `skip` lists positions that the caller has already rejected because reading them failed. With
    `until`, checkpoints of later positions are skipped.
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
            "shows what is intact"
        )
    if later:
        return "take the oldest checkpoint's position or a later one; steps before it cannot be rebuilt"
    return (
        f"check the path, and that {COMMITS}/ was copied with the rest; without --resume_training a new run "
        "starts"
    )


def list_checkpoints(storage: Storage, *, deep: bool = False) -> list[CheckpointInfo]:
    """Every checkpoint, newest first; `deep` reads and digests every byte of each.

    Checkpoints that a run removes in the meantime are left out.
    """
    judge = Judge(storage, deep=deep)
    found = (judge.judge(position) for position in positions(storage))
    return [info for info in found if info is not None]


def rank_files(storage: Storage, folder: str) -> Iterator[TensorFileName | TableName]:
    """Everything in a role's folder, or in that of tables, that is named like one of our files."""
    for rank in storage.scan(folder):
        if parse_rank(rank.name) is not None and rank.kind == "folder":
            for entry in storage.scan(f"{folder}/{rank.name}"):
                name = parse_rank_file(f"{folder}/{rank.name}/{entry.name}")
                if name is not None:
                    yield name


def tensor_files(storage: Storage, folder: str) -> Iterator[TensorFileName]:
    """Everything in a role's folder that is named like one of our tensor files."""
    return (name for name in rank_files(storage, folder) if isinstance(name, TensorFileName))


def roles_on_disk(storage: Storage) -> list[str]:
    """The contract's roles, and any others that the folder seems to hold, going by names alone.

    For listings, and for what must not be touched. A folder that looks like a role's may not be ours.
    """
    folders = [entry.name for entry in storage.scan("") if entry.kind == "folder"]
    others = ((role_of_folder(folder), folder) for folder in folders)
    found = [role for role, folder in others if role and any(True for _ in tensor_files(storage, folder))]
    return in_order([*ROLE_FOLDERS, *found])


def describe(storage: Storage) -> list[str]:
    """What is in the role folders, one line per rank, for error messages."""
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
