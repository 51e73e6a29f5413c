"""Pruning a run's folder by hand: what would be removed and why, and removing it.

`Pruning` looks once and changes nothing; `carry_out` removes what it found, in the order of `cleaning`:
manifests first and their folder synced, then files, then journal segments. The caller must hold the run's
lock. Pruning refuses to keep the best by a metric that no checkpoint has: a typo would cost the best
ones. Whatever the policy says, the newest valid checkpoint stays, and so does the journal from the
oldest kept checkpoint on. `look` decides what is valid; without it, a checkpoint is valid when its
manifest is intact and all its files are there with the right sizes.

A read error is no reason to remove anything: what could not be read stays, with everything it may need, and
`warnings` says so. If no checkpoint is valid, nothing is removed at all: the files that no manifest lists
may then be all that is left of the run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rollforward.errors import CheckpointInvalid, CheckpointUnreadable, ConfigError, StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.storage.listing import listed
from rollforward.store.catalog import positions
from rollforward.store.cleaning import (
    Inventory,
    Kept,
    Look,
    ranks_with_files,
    remove_files_of_stray_ranks,
    remove_temporaries,
    take_back,
    temporaries,
    unneeded_files,
)
from rollforward.store.journal.reading import journal_ranks, list_segments, read_header_of, read_starts
from rollforward.store.journal.segments import Segment
from rollforward.store.journal.timeline import Lineage, choose_history, removable
from rollforward.store.journal.upkeep import remove_segments
from rollforward.store.judging import why_not_intact
from rollforward.store.layout import is_temporary, parse_rank_file
from rollforward.store.retention import Retention
from rollforward.store.summary import Summary


@dataclass(frozen=True)
class Removal:
    """One thing that pruning would remove."""

    what: Literal["checkpoint", "file", "journal"]
    name: str
    """The position of a checkpoint; the path of anything else."""
    size: int
    """Bytes that this frees; files shared with kept checkpoints do not count."""
    reason: str


class Pruning:
    """What pruning would remove, determined once."""

    def __init__(self, storage: Storage, retention: Retention, look: Look | None = None) -> None:
        self.removals: list[Removal] = []
        self.warnings: list[str] = []
        """What is kept because it could not be read, one line each."""
        self._storage = storage
        self._listed = listed(storage)
        """To look at; removed is from the storage itself."""
        self._inventory = inventory = Inventory(storage, look, seen=self._listed)
        _check_metric(inventory, retention)
        self._doomed = sorted(inventory.removable(retention), key=lambda item: item[0])
        self._segments: list[Segment] = []
        self._kept: Kept | None = None
        """What stays; None when everything does."""
        if not inventory.holds_a_valid_one():
            self._doomed = []
            self.warnings = [
                f"nothing is removed: {storage} has no valid checkpoint, and what no manifest names may be "
                "all that is left",
                *inventory.warnings(),
            ]
            return
        self.warnings = inventory.warnings()
        self._kept = inventory.without(position for position, _ in self._doomed).kept()
        self._plan_files(retention)
        self._plan_journal()

    def carry_out(self) -> list[str]:
        """Remove what was found, and leftovers of interrupted saves; returns warnings, one line each."""
        if self._kept is None:
            return []
        warnings = take_back(self._storage, self._inventory, self._doomed)
        warnings += remove_files_of_stray_ranks(self._storage, self._inventory.kept(), world_size=0)
        warnings += remove_temporaries(self._storage)
        if warnings:
            # A manifest that could not be removed still needs its journal.
            return warnings
        try:
            for segment in self._segments:
                remove_segments(self._storage, [segment.name])
        except StorageError as error:
            warnings.append(f"an old journal segment could not be removed: {error.message}")
        return warnings

    def _plan_files(self, retention: Retention) -> None:
        assert self._kept is not None
        unnamed = dict(temporaries(self._listed))
        for rank in ranks_with_files(self._listed, self._kept.roles):
            for role in self._kept.roles:
                unnamed.update(unneeded_files(self._listed, self._kept, role, rank))
        for position, summary in self._doomed:
            size = sum(unnamed.pop(path) for path in _files_of(summary, unnamed))
            self.removals.append(Removal("checkpoint", str(position), size, _reason(summary, retention)))
        for path, size in sorted(unnamed.items()):
            left = (
                "an unfinished write left it"
                if is_temporary(path.rpartition("/")[2])
                else "no checkpoint names it"
            )
            self.removals.append(Removal("file", path, size, left))

    def _plan_journal(self) -> None:
        assert self._kept is not None
        if self._kept.unknown:
            return
        stay = [position for position in positions(self._storage) if position not in dict(self._doomed)]
        ranks = journal_ranks(self._listed) if stay else []
        newest = choose_history(read_starts([self._listed], ranks=ranks), None)
        lineage = newest.lineage if newest is not None else {}
        for rank in ranks:
            try:
                for segment, reason in _unneeded_segments(self._listed, rank, lineage, min(stay)):
                    self._segments.append(segment)
                    self.removals.append(Removal("journal", segment.name.path, segment.size, reason))
            except CheckpointInvalid as error:
                self.warnings.append(f"the journal of rank {rank} stays as it is: {error.message}")


def plan(storage: Storage, retention: Retention, look: Look | None = None) -> list[Removal]:
    """What `prune` would remove, and why; changes nothing."""
    return Pruning(storage, retention, look).removals


def prune(storage: Storage, retention: Retention, look: Look | None = None) -> list[str]:
    """Remove what the policy does not keep, and leftovers of interrupted saves; returns warnings."""
    pruning = Pruning(storage, retention, look)
    return [*pruning.warnings, *pruning.carry_out()]


def look_at_every_byte() -> Look:
    """A `Look` that reads every byte of a checkpoint, once."""
    known: dict[Position, CheckpointInvalid | None] = {}

    def look(storage: Storage, position: Position) -> CheckpointInvalid | None:
        if position not in known:
            known[position] = why_not_intact(storage, position)
        return known[position]

    return look


def _unneeded_segments(
    storage: Storage, rank: int, lineage: Lineage, oldest: Position
) -> Iterator[tuple[Segment, str]]:
    """Segments that no replay from `oldest` or later needs, and why; oldest first.

    `lineage`: of the newest start.

    CheckpointInvalid when the newest start's own record of what it inherits cannot be read: then it is
    unknown which steps of earlier starts belong to its history.
    """
    segments = {segment.name: segment for segment in list_segments(storage, rank)}
    if not segments:
        return
    newest = max(name.incarnation for name in segments)
    problem: CheckpointInvalid | None = None
    read = set()
    for segment in segments.values():
        try:
            read_header_of(segment)
            read.add(segment.name.incarnation)
        except CheckpointUnreadable:
            raise
        except CheckpointInvalid as error:
            problem = error
    if newest not in read and problem is not None:
        raise problem
    for name in removable(list(segments), lineage, oldest):
        yield segments[name], f"all its steps are before {oldest}, the oldest kept checkpoint"


def _check_metric(inventory: Inventory, retention: Retention) -> None:
    known = inventory.metrics()
    if retention.best > 0 and retention.metric not in known:
        raise ConfigError(
            f"no checkpoint carries a metric {retention.metric!r}; they carry "
            f"{', '.join(sorted(known)) or 'none'}",
            hint="name one of these, or keep none for being the best",
        )


def _files_of(summary: Summary | None, paths: Iterable[str]) -> list[str]:
    """The paths, of those given, that a checkpoint needs."""
    if summary is None:
        return []
    parsed = ((path, parse_rank_file(path)) for path in paths)
    return [path for path, name in parsed if name is not None and name.generation in summary.generations]


def _reason(summary: Summary | None, retention: Retention) -> str:
    if summary is None:
        return "its manifest is damaged, and there are newer ones"
    wanted = [f"not among the newest {retention.newest}"]
    if retention.every > 0:
        wanted.append(f"{summary.global_step} steps are not a multiple of {retention.every}")
    if retention.best > 0:
        value = summary.metrics.get(retention.metric)
        wanted.append(
            f"it carries no {retention.metric}"
            if value is None
            else f"a {retention.metric} of {value:.4g} is not among the best {retention.best}"
        )
    return ", ".join(wanted)
