"""Removing what is no longer needed, in an order that makes it safe to crash at any point.

Manifests go first and their folder is synced; only then the files that no other manifest
lists. A file whose name is not one of ours is never touched, and the only folders searched are those
of tables and of roles that a manifest has listed or that this process saves (`Kept.roles`). Every function
returns warnings instead of raising: by then the new checkpoint is committed, and a leftover file does no
harm.

Nothing is removed because of an error. A manifest that could not be read this time (`unknown`) may list
any file, so as long as there is one, no tensor file, attachment or journal segment is removed; each commit
tries to read it again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from rollforward.errors import CheckpointInvalid, CheckpointUnreadable, StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.attachments import copy_of
from rollforward.store.catalog import rank_files
from rollforward.store.guests import read_guests
from rollforward.store.judging import is_gone, load_summary, verdict_of, why_not_there, why_not_valid
from rollforward.store.layout import (
    COMMITS,
    MAX_ATTEMPT,
    MODEL,
    ROLE_FOLDERS,
    TABLES,
    Generation,
    TableName,
    TensorFileName,
    in_order,
    is_temporary,
    manifest_path,
    meta_path,
    parse_manifest_name,
    parse_rank,
    parse_rank_file,
    rank_folder,
    role_folder,
)
from rollforward.store.manifest import Manifest
from rollforward.store.retention import Candidate, Retention, Verdict, keep_mask
from rollforward.store.summary import Summary

Look = Callable[[Storage, Position], CheckpointInvalid | None]
"""Why a checkpoint is not valid; None when it is."""


@dataclass(frozen=True)
class Kept:
    """What must stay; every other file of ours may be removed."""

    generations: frozenset[Generation]
    unreadable: frozenset[Position]
    """Positions whose manifest is damaged: their own files stay as long as the manifest does."""
    unknown: frozenset[Position]
    """Positions whose manifest could not be read this time: while there are any, everything stays."""
    roles: frozenset[str]
    """Whose folders may hold our files: the contract's roles, all that a manifest has listed, and TABLES."""
    later: int = MAX_ATTEMPT + 1
    """Files of this attempt or a higher one are of later starts (`attempt.attempts_of`): they stay."""

    def as_json(self) -> Any:
        """For other ranks."""
        return {
            "generations": [[kind, str(at), number] for kind, at, number in sorted(self.generations)],
            "unreadable": [str(position) for position in sorted(self.unreadable)],
            "unknown": [str(position) for position in sorted(self.unknown)],
            "roles": sorted(self.roles),
            "later": self.later,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Kept":
        """From another rank's `as_json`."""
        return cls(
            frozenset((kind, Position.parse(at), number) for kind, at, number in value["generations"]),
            frozenset(map(Position.parse, value["unreadable"])),
            frozenset(map(Position.parse, value["unknown"])),
            frozenset(value["roles"]),
            value["later"],
        )

    def keeps(self, name: TensorFileName | TableName) -> bool:
        """Whether a tensor file or a table must stay."""
        if self.unknown or name.attempt >= self.later:
            return True
        return name.generation in self.generations or name.position in self.unreadable


class Inventory:
    """Summaries of all manifests in a folder. One rank keeps it, from its first save on.

    `look` says why a checkpoint is not intact; without it, a checkpoint is intact when its manifest and its
    files are there. StorageError when the manifests, or what else must stay, cannot be determined.
    `seen`: where files are looked for, if not in the storage itself. `later` is as in `Kept`.
    """

    def __init__(
        self,
        storage: Storage,
        look: Look | None = None,
        *,
        seen: Storage | None = None,
        later: int = MAX_ATTEMPT + 1,
    ) -> None:
        self._storage = storage
        self._look = look
        self._seen = seen or storage
        self._later = later
        self._summaries: dict[Position, Summary | None] = {}
        """None for a manifest that is damaged or could not be read."""
        self._unknown: dict[Position, str] = {}
        """Manifests that could not be read this time, and why."""
        self._unchecked: dict[Position, str] = {}
        """Checkpoints whose files could not be checked this time, and why."""
        self._verdicts: dict[Position, Verdict] = {}
        """Results so far; only definite ones."""
        self._roles = {*ROLE_FOLDERS, TABLES}
        """Includes those of checkpoints removed since: their files go after their manifest."""
        self._guests = read_guests(storage)
        named = (parse_manifest_name(entry.name) for entry in storage.scan(COMMITS))
        for position in (position for position in named if position is not None):
            self._read(position)

    def _read(self, position: Position) -> None:
        self._unknown.pop(position, None)
        try:
            self._note(position, load_summary(self._storage, position))
        except CheckpointUnreadable as error:
            self._summaries[position], self._unknown[position] = None, error.message
        except CheckpointInvalid:
            if is_gone(self._storage, position):
                self._summaries.pop(position, None)
            else:
                self._summaries[position], self._verdicts[position] = None, Verdict.INVALID

    def add(self, manifest: Manifest) -> None:
        """A checkpoint was committed."""
        self._unknown.pop(manifest.position, None)
        self._note(manifest.position, Summary.of(manifest))
        self._verdicts[manifest.position] = Verdict.VALID

    def _note(self, position: Position, summary: Summary) -> None:
        self._summaries[position] = summary
        self._roles |= {role for role, _, _ in summary.generations}

    def remove(self, position: Position) -> None:
        """A checkpoint's manifest was removed."""
        del self._summaries[position]
        self._verdicts.pop(position, None)

    def without(self, doomed: Iterable[Position]) -> "Inventory":
        """A copy without these checkpoints; this one stays as it is."""
        left = copy(self)
        left._summaries, left._verdicts = dict(self._summaries), dict(self._verdicts)
        for position in doomed:
            left.remove(position)
        return left

    def kept(self) -> Kept:
        """What the manifests list, and what was there before the folder became ours."""
        damaged = {position for position, summary in self._summaries.items() if summary is None}
        named = frozenset(name for summary in self._readable() for name in summary.generations)
        return Kept(
            generations=named | self._guests,
            unreadable=frozenset(damaged - self._unknown.keys()),
            unknown=frozenset(self._unknown),
            roles=frozenset(self._roles),
            later=self._later,
        )

    def attachments(self) -> dict[str, str]:
        """Path -> digest of every attachment that a manifest lists."""
        return {path: found for summary in self._readable() for path, found in summary.attachments.items()}

    def metrics(self) -> set[str]:
        """The names of all metrics in the checkpoints."""
        return {name for summary in self._readable() for name in summary.metrics}

    def holds_a_valid_one(self) -> bool:
        """Whether there is a checkpoint to resume from, so that files no manifest lists are leftovers."""
        order = sorted(self._readable(), key=lambda item: (item.incarnation, item.position), reverse=True)
        return any(self._judge_at(summary.position) is Verdict.VALID for summary in order)

    def free_attempt(self, roles: Iterable[str], position: Position) -> int:
        """The lowest attempt number that would replace no committed file of this position.

        `roles` includes TABLES, as everywhere in this module.
        """
        roles, kept = list(roles), self.kept()
        taken = set(kept.generations)
        if kept.unknown:
            # Any existing file may be listed by a manifest.
            folders = map(role_folder, roles)
            taken |= {name.generation for folder in folders for name in rank_files(self._storage, folder)}
        attempt = 1 if position in kept.unreadable | kept.unknown else 0
        while any((role, position, attempt) in taken for role in roles):
            attempt += 1
        return attempt

    def removable(self, retention: Retention) -> list[tuple[Position, Summary | None]]:
        """The checkpoints that the policy does not keep."""
        for position in list(self._unknown):
            self._read(position)
        self._unchecked.clear()
        order = list(self._summaries)
        found = [self._candidate(position, retention.metric) for position in order]
        mask = keep_mask(found, retention, lambda item: self._judge_at(item.position))
        return [
            (position, self._summaries[position])
            for position, keep in zip(order, mask, strict=True)
            if not keep
        ]

    def warnings(self) -> list[str]:
        """What `removable` could not check, and therefore keeps."""
        return [
            *(
                f"nothing is removed that checkpoint {position} may need: {reason}"
                for position, reason in sorted(self._unknown.items())
            ),
            *(
                f"not known to be whole, and kept where a whole one would be: {reason}"
                for position, reason in sorted(self._unchecked.items())
                if position in self._summaries
            ),
        ]

    def _readable(self) -> Iterator[Summary]:
        return (summary for summary in self._summaries.values() if summary is not None)

    def _candidate(self, position: Position, metric: str) -> Candidate:
        summary = self._summaries[position]
        if summary is None:
            latest = max((found.incarnation for found in self._readable()), default=0)
            return Candidate(incarnation=latest, position=position, readable=position not in self._unknown)
        return Candidate(
            incarnation=summary.incarnation,
            position=position,
            global_step=summary.global_step,
            metric=summary.metrics.get(metric),
        )

    def _judge_at(self, position: Position) -> Verdict:
        if position in self._unknown:
            return Verdict.UNKNOWN
        if position not in self._verdicts:
            # The newest one that is proved intact always stays. For the others it is enough to check for
            # what happens by accident: damage and missing files.
            quick = Verdict.VALID in self._verdicts.values()
            look = self._look or (why_not_there if quick else why_not_valid)
            problem = look(self._seen, position)
            verdict = verdict_of(problem)
            if problem is not None and verdict is Verdict.UNKNOWN:
                self._unchecked[position] = problem.message
                return verdict
            self._verdicts[position] = verdict
        return self._verdicts[position]


def remove_manifests(storage: Storage, inventory: Inventory, retention: Retention) -> list[str]:
    """Durably remove the checkpoints that the policy does not keep, and their attachments."""
    doomed = inventory.removable(retention)
    return [*inventory.warnings(), *take_back(storage, inventory, doomed)]


def take_back(
    storage: Storage, inventory: Inventory, doomed: Sequence[tuple[Position, Summary | None]]
) -> list[str]:
    """Durably remove these checkpoints' manifests, and then attachments that no other manifest lists."""
    if not doomed:
        return []
    try:
        for position, _ in doomed:
            storage.remove(manifest_path(position))
        storage.sync_folder(COMMITS)
        # Only now may their files be removed. After an error they stay listed, and the next save tries again.
        for position, _ in doomed:
            inventory.remove(position)
        if inventory.kept().unknown:
            return []
        removed = {path for _, summary in doomed if summary for path in summary.attachments}
        for path in removed - inventory.attachments().keys():
            storage.remove(path)
            storage.remove(copy_of(path))
    except StorageError as error:
        return [f"an old checkpoint could not be removed: {error.message}"]
    return []


def remove_files(storage: Storage, kept: Kept, rank: int) -> list[str]:
    """Remove a rank's tensor files that no manifest lists, and leftovers of unfinished writes."""
    warnings: list[str] = []
    for role in in_order(kept.roles):
        try:
            for path, _ in unneeded_files(storage, kept, role, rank):
                storage.remove(path)
        except StorageError as error:
            warnings.append(f"an old file could not be removed: {error.message}")
    return warnings


def unneeded_files(storage: Storage, kept: Kept, role: str, rank: int) -> list[tuple[str, int]]:
    """Path and size of the files that `remove_files` removes in one folder."""
    folder, found = rank_folder(role, rank), []
    for entry in storage.scan(folder):
        path = f"{folder}/{entry.name}"
        name = parse_rank_file(path)
        if entry.kind == "file" and (is_temporary(entry.name) or (name and not kept.keeps(name))):
            found.append((path, entry.size))
    return found


def remove_files_of_stray_ranks(storage: Storage, kept: Kept, world_size: int) -> list[str]:
    """The same for ranks that have folders but no longer a worker: an earlier start had more workers."""
    try:
        strays = [rank for rank in ranks_with_files(storage, kept.roles) if rank >= world_size]
    except StorageError as error:
        return [f"an old file could not be removed: {error.message}"]
    return [warning for rank in strays for warning in remove_files(storage, kept, rank)]


def remove_meta_of_stray_ranks(storage: Storage, kept: Kept, world_size: int) -> list[str]:
    """Remove their `meta.json`: it is derived from the newest checkpoint, which does not have them."""
    try:
        for role in in_order(kept.roles):
            for rank in ranks_with_files(storage, [role]):
                if rank >= world_size:
                    storage.remove(meta_path(role, rank))
    except StorageError as error:
        return [f"meta.json of a rank that is gone could not be removed: {error.message}"]
    return []


def ranks_with_files(storage: Storage, roles: Iterable[str]) -> list[int]:
    """The ranks that have a folder for one of the roles."""
    names = (entry.name for role in roles for entry in storage.scan(role_folder(role)))
    return sorted({rank for name in names if (rank := parse_rank(name)) is not None})


def remove_temporaries(storage: Storage) -> list[str]:
    """Remove leftovers of unfinished writes in the folders that all ranks share."""
    try:
        for path, _ in temporaries(storage):
            storage.remove(path)
    except StorageError as error:
        return [f"a temporary file could not be removed: {error.message}"]
    return []


def temporaries(storage: Storage) -> list[tuple[str, int]]:
    """Path and size of the files that `remove_temporaries` removes."""
    models = [entry.name for entry in storage.scan("") if entry.name.partition(".")[0] == MODEL]
    return [
        (f"{folder}/{entry.name}", entry.size)
        for folder in (COMMITS, *models)
        for entry in storage.scan(folder)
        if entry.kind == "file" and is_temporary(entry.name)
    ]


def remove_strays(storage: Storage) -> None:
    """Remove files that killed starts left half-written in the run's folder: metrics, recovery reports.

    For a start that holds the lock and has not yet written there. What cannot be removed stays.
    """
    with suppress(StorageError):
        for entry in storage.scan(""):
            if entry.kind == "file" and is_temporary(entry.name):
                storage.remove(entry.name)
