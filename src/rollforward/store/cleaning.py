"""Removing what no longer counts, in the order that a crash cannot turn into a loss.

Manifests go first and their folder is synced; only then the files that no other manifest
names. What a name of ours does not fit is never touched, and the only folders that are looked into
are those of roles that a manifest has named or this process saves (`Kept.roles`). Every function
returns warnings instead of raising: by then the new checkpoint is committed, and a file too many
harms nobody.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.catalog import is_there, is_valid, load_summary
from rollforward.store.guests import read_guests
from rollforward.store.journal.history import journal_ranks
from rollforward.store.journal.reading import list_segments, remove_segments
from rollforward.store.layout import (
    COMMITS,
    MODEL,
    ROLE_FOLDERS,
    TensorFileName,
    in_order,
    is_temporary,
    manifest_path,
    parse_manifest_name,
    parse_rank,
    rank_folder,
    role_folder,
)
from rollforward.store.manifest import Generation, Manifest
from rollforward.store.retention import Candidate, Retention, keep_mask
from rollforward.store.summary import Summary

Look = Callable[[Storage, Position], bool]
"""Whether a checkpoint is valid."""


@dataclass(frozen=True)
class Kept:
    """What must stay; everything of ours that is not here may go."""

    generations: frozenset[Generation]
    unreadable: frozenset[Position]
    """Positions whose manifest cannot be read: their own files stay as long as it does."""
    world_size: int
    """The greatest number of ranks that any of the readable manifests is of."""
    roles: frozenset[str]
    """In whose folders files of ours may lie: those of the contract, and all that a manifest has named."""

    def keeps(self, name: TensorFileName) -> bool:
        """Whether a tensor file must stay."""
        return (
            name.role,
            name.position,
            name.attempt,
        ) in self.generations or name.position in self.unreadable

    def may_need_journal_of(self, rank: int) -> bool:
        """Whether steps may be replayed, from some kept checkpoint on, for which this rank is needed."""
        return rank < self.world_size or bool(self.unreadable)


class Inventory:
    """All manifests of a folder, in short. One rank keeps it, from its first save on.

    `look` says whether a checkpoint is whole; without it one is when its manifest and its files are there.
    """

    def __init__(self, storage: Storage, look: Look | None = None) -> None:
        self._storage = storage
        self._look = look
        self._summaries: dict[Position, Summary | None] = {}
        """None for a manifest that cannot be read."""
        self._valid: dict[Position, bool] = {}
        """As far as it was asked."""
        self._roles = set(ROLE_FOLDERS)
        """Also those of checkpoints that were removed since: their files go after their manifest."""
        self._guests = read_guests(storage)
        named = (parse_manifest_name(entry.name) for entry in storage.scan(COMMITS))
        for position in (position for position in named if position is not None):
            try:
                self._note(position, load_summary(storage, position))
            except CheckpointInvalid:
                self._summaries[position], self._valid[position] = None, False

    def add(self, manifest: Manifest) -> None:
        """A checkpoint was committed."""
        self._note(manifest.position, Summary.of(manifest))
        self._valid[manifest.position] = True

    def _note(self, position: Position, summary: Summary) -> None:
        self._summaries[position] = summary
        self._roles |= {role for role, _, _ in summary.generations}

    def remove(self, position: Position) -> None:
        """A checkpoint's manifest was removed."""
        del self._summaries[position]
        self._valid.pop(position, None)

    def kept(self) -> Kept:
        """What the manifests name, and what was there before the folder became ours."""
        unreadable = frozenset(position for position, summary in self._summaries.items() if summary is None)
        named = frozenset(name for summary in self._readable() for name in summary.generations)
        world_size = max((summary.world_size for summary in self._readable()), default=0)
        return Kept(named | self._guests, unreadable, world_size, frozenset(self._roles))

    def attachments(self) -> dict[str, str]:
        """Path -> digest of every attachment that a manifest names."""
        return {path: found for summary in self._readable() for path, found in summary.attachments.items()}

    def metrics(self) -> set[str]:
        """The names of all figures that checkpoints carry."""
        return {name for summary in self._readable() for name in summary.metrics}

    def free_attempt(self, roles: Iterable[str], position: Position) -> int:
        """The least attempt number under which no committed file of this position would be replaced."""
        kept = self.kept()
        attempt = 1 if position in kept.unreadable else 0
        while any((role, position, attempt) in kept.generations for role in roles):
            attempt += 1
        return attempt

    def removable(self, retention: Retention) -> list[tuple[Position, Summary | None]]:
        """The checkpoints that the policy lets go."""
        order = list(self._summaries)
        found = [self._candidate(position, retention.metric) for position in order]
        mask = keep_mask(found, retention, self._is_valid)
        return [
            (position, self._summaries[position])
            for position, keep in zip(order, mask, strict=True)
            if not keep
        ]

    def _readable(self) -> Iterator[Summary]:
        return (summary for summary in self._summaries.values() if summary is not None)

    def _candidate(self, position: Position, metric: str) -> Candidate:
        summary = self._summaries[position]
        if summary is None:
            latest = max((found.incarnation for found in self._readable()), default=0)
            return Candidate(incarnation=latest, position=position)
        return Candidate(
            incarnation=summary.incarnation,
            position=position,
            global_step=summary.global_step,
            metric=summary.metrics.get(metric),
        )

    def _is_valid(self, candidate: Candidate) -> bool:
        position = candidate.position
        if position not in self._valid:
            # One that is proved to be whole always stays, the newest of them. For the rest it will do to look
            # at what happens by itself: damage, and files that are missing.
            look = self._look or (is_there if any(self._valid.values()) else is_valid)
            self._valid[position] = look(self._storage, position)
        return self._valid[position]


def remove_manifests(storage: Storage, inventory: Inventory, retention: Retention) -> list[str]:
    """Take back the checkpoints that the policy lets go, durably, and their attachments."""
    doomed = inventory.removable(retention)
    if not doomed:
        return []
    try:
        for position, _ in doomed:
            storage.remove(manifest_path(position))
        storage.sync_folder(COMMITS)
        # Only now may their files go. After an error they stay listed, and the next save tries again.
        for position, _ in doomed:
            inventory.remove(position)
        removed = {path for _, summary in doomed if summary for path in summary.attachments}
        for path in removed - inventory.attachments().keys():
            storage.remove(path)
    except StorageError as error:
        return [f"an old checkpoint could not be removed: {error.message}"]
    return []


def remove_files(storage: Storage, kept: Kept, rank: int) -> list[str]:
    """Remove a rank's tensor files that no manifest names, and what unfinished writes left."""
    warnings: list[str] = []
    for role in in_order(kept.roles):
        try:
            for path, _ in unneeded_files(storage, kept, role, rank):
                storage.remove(path)
        except StorageError as error:
            warnings.append(f"an old file could not be removed: {error.message}")
    return warnings


def unneeded_files(storage: Storage, kept: Kept, role: str, rank: int) -> list[tuple[str, int]]:
    """Path and size of what `remove_files` removes in one folder."""
    folder, found = rank_folder(role, rank), []
    for entry in storage.scan(folder):
        path = f"{folder}/{entry.name}"
        name = TensorFileName.parse(path)
        if entry.kind == "file" and (is_temporary(entry.name) or (name and not kept.keeps(name))):
            found.append((path, entry.size))
    return found


def remove_files_of_stray_ranks(storage: Storage, kept: Kept, world_size: int) -> list[str]:
    """The same for ranks that have folders but no worker any more: an earlier start had more workers."""
    try:
        strays = [rank for rank in ranks_with_files(storage, kept.roles) if rank >= world_size]
    except StorageError as error:
        return [f"an old file could not be removed: {error.message}"]
    return [warning for rank in strays for warning in remove_files(storage, kept, rank)]


def remove_journals_of_stray_ranks(
    storage: Storage, kept: Kept, world_size: int, incarnation: int
) -> list[str]:
    """Remove the journals of ranks that have no worker any more and that no kept checkpoint is of.

    Those of an earlier start with more workers. What a start after `incarnation` wrote stays: a writer
    that has been replaced must not remove it.
    """
    try:
        for rank in journal_ranks(storage):
            if rank >= world_size and not kept.may_need_journal_of(rank):
                segments = [segment.name for segment in list_segments(storage, rank)]
                remove_segments(storage, [name for name in segments if name.incarnation < incarnation])
    except StorageError as error:
        return [f"an old journal segment could not be removed: {error.message}"]
    return []


def ranks_with_files(storage: Storage, roles: Iterable[str]) -> list[int]:
    """The ranks that have a folder of one of the roles."""
    names = (entry.name for role in roles for entry in storage.scan(role_folder(role)))
    return sorted({rank for name in names if (rank := parse_rank(name)) is not None})


def remove_temporaries(storage: Storage) -> list[str]:
    """Remove what unfinished writes left in the folders that all ranks share."""
    try:
        for path, _ in temporaries(storage):
            storage.remove(path)
    except StorageError as error:
        return [f"a temporary file could not be removed: {error.message}"]
    return []


def temporaries(storage: Storage) -> list[tuple[str, int]]:
    """Path and size of what `remove_temporaries` removes."""
    models = [entry.name for entry in storage.scan("") if entry.name.partition(".")[0] == MODEL]
    return [
        (f"{folder}/{entry.name}", entry.size)
        for folder in (COMMITS, *models)
        for entry in storage.scan(folder)
        if entry.kind == "file" and is_temporary(entry.name)
    ]


def remove_strays(storage: Storage) -> None:
    """Remove what killed starts left of files in the run's folder itself: metrics, reports of recoveries.

    For a start that holds the lock and has not begun to write there. What cannot be removed stays.
    """
    with suppress(StorageError):
        for entry in storage.scan(""):
            if entry.kind == "file" and is_temporary(entry.name):
                storage.remove(entry.name)
