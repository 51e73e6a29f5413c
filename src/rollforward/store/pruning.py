"""Pruning a run's folder by hand: what would go and why, and letting it go.

`plan` changes nothing. `prune` removes what `plan` names, in the order of `cleaning`: manifests
first and their folder synced, then files, then journal segments. Who prunes must hold the run's
lock. Both refuse to keep the best by a figure that no checkpoint carries: a slip of the pen would
cost the best ones. Whatever the policy says, the newest valid checkpoint stays, and so does the
journal from the oldest kept checkpoint on. What is valid `look` says; without it one is when its
manifest proves intact and all its files are there with their sizes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rollforward.errors import ConfigError, StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.catalog import is_intact, positions
from rollforward.store.cleaning import (
    Inventory,
    Kept,
    Look,
    ranks_with_files,
    remove_files_of_stray_ranks,
    remove_manifests,
    remove_temporaries,
    temporaries,
    unneeded_files,
)
from rollforward.store.journal.history import journal_ranks
from rollforward.store.journal.reading import Segment, list_segments, read_journal, remove_segments
from rollforward.store.journal.timeline import removable
from rollforward.store.layout import TensorFileName, is_temporary
from rollforward.store.retention import Retention
from rollforward.store.summary import Summary


@dataclass(frozen=True)
class Removal:
    """What pruning would remove."""

    what: Literal["checkpoint", "file", "journal"]
    name: str
    """The position of a checkpoint; the path of anything else."""
    size: int
    """Bytes that it gives back; files that kept checkpoints share are not among them."""
    reason: str


def plan(storage: Storage, retention: Retention, look: Look | None = None) -> list[Removal]:
    """What `prune` would remove, and why; changes nothing."""
    inventory = Inventory(storage, look)
    _check_metric(inventory, retention)
    doomed = sorted(inventory.removable(retention), key=lambda item: item[0])
    for position, _ in doomed:
        inventory.remove(position)
    kept = inventory.kept()
    unnamed = dict(temporaries(storage))
    for rank in ranks_with_files(storage, kept.roles):
        for role in kept.roles:
            unnamed.update(unneeded_files(storage, kept, role, rank))
    removals = []
    for position, summary in doomed:
        size = sum(unnamed.pop(path) for path in _files_of(summary, unnamed))
        removals.append(Removal("checkpoint", str(position), size, _reason(summary, retention)))
    for path, size in sorted(unnamed.items()):
        left = (
            "an unfinished write left it"
            if is_temporary(path.rpartition("/")[2])
            else "no checkpoint names it"
        )
        removals.append(Removal("file", path, size, left))
    stay = [position for position in positions(storage) if position not in dict(doomed)]
    for segment, reason in _unneeded_segments(storage, kept, min(stay)) if stay else ():
        removals.append(Removal("journal", segment.name.path, segment.size, reason))
    return removals


def prune(storage: Storage, retention: Retention, look: Look | None = None) -> list[str]:
    """Remove what the policy lets go, and what interrupted saves left; returns warnings, a line each."""
    inventory = Inventory(storage, look)
    _check_metric(inventory, retention)
    warnings = remove_manifests(storage, inventory, retention)
    warnings += remove_files_of_stray_ranks(storage, inventory.kept(), world_size=0)
    warnings += remove_temporaries(storage)
    stay = positions(storage)
    try:
        for segment, _ in _unneeded_segments(storage, inventory.kept(), min(stay)) if stay else ():
            remove_segments(storage, [segment.name])
    except StorageError as error:
        warnings.append(f"an old journal segment could not be removed: {error.message}")
    return warnings


def look_at_every_byte() -> Look:
    """A look for `plan` and then for `prune`: it reads every byte of what it is asked about, once."""
    known: dict[Position, bool] = {}

    def look(storage: Storage, position: Position) -> bool:
        if position not in known:
            known[position] = is_intact(storage, position)
        return known[position]

    return look


def _unneeded_segments(storage: Storage, kept: Kept, oldest: Position) -> Iterator[tuple[Segment, str]]:
    """Segments that no replay from `oldest` or later needs, and why; of each rank the oldest first."""
    for rank in journal_ranks(storage):
        segments = {segment.name: segment for segment in list_segments(storage, rank)}
        if not kept.may_need_journal_of(rank):
            yield from ((segment, f"no kept checkpoint has a rank {rank}") for segment in segments.values())
            continue
        lineage = read_journal([storage], rank=rank, since=oldest).lineage
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
    """Those of the paths that a checkpoint needs."""
    if summary is None:
        return []
    parsed = ((path, TensorFileName.parse(path)) for path in paths)
    return [
        path
        for path, name in parsed
        if name is not None and (name.role, name.position, name.attempt) in summary.generations
    ]


def _reason(summary: Summary | None, retention: Retention) -> str:
    if summary is None:
        return "its manifest cannot be read, and there are newer ones"
    wanted = [f"not among the newest {retention.newest}"]
    if retention.every > 0:
        wanted.append(f"{summary.global_step} steps are no multiple of {retention.every}")
    if retention.best > 0:
        value = summary.metrics.get(retention.metric)
        wanted.append(
            f"it carries no {retention.metric}"
            if value is None
            else f"a {retention.metric} of {value:.4g} is not among the best {retention.best}"
        )
    return ", ".join(wanted)
