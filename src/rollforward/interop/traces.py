"""Whether a folder without manifests is one of ours whose `commits/` is gone.

MindRLHF's folders have no manifests, and ours without manifests look much like them. Mistaking one of ours
for one of theirs would train on unverified bytes and start its history over. So before a folder counts as
foreign it is searched for traces of ours, and one that has them is refused: the user must put `commits/`
back.

The evidence is the tensor file that `meta.json` names, since `meta.json` is written after the commit: only we
lay files out this way. Our own export for MindRLHF has the same layout, but its tensors have the names of
MindRLHF's trainer. Files left by a start that was killed before its first commit are not named by any
`meta.json`, and do not count.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rollforward.errors import CheckpointInvalid, NothingToResume, StorageError
from rollforward.inputs import read_input
from rollforward.interop.role_folders import CheckpointFolders
from rollforward.storage import LocalStorage, Storage, read_lines
from rollforward.storage.failures import storage_error
from rollforward.store.catalog import named_positions
from rollforward.store.journal.frames import read_frames
from rollforward.store.journal.reading import journal_ranks, list_segments
from rollforward.store.layout import COMMITS, JOURNAL, META, MODEL, TABLES
from rollforward.store.meta import MAX_META_BYTES, parse_meta
from rollforward.store.tensorfile import ALIGNMENT, DTYPES, Header, read_header

TRAINER_PREFIX = "grpo_model_train."
"""What MindRLHF's trainer puts before the names of policy and optimizer."""

_METRICS = "metrics.jsonl"
_MAX_METRICS = 1 << 30
_MAX_LINE = 1 << 18
_FIELDS = {"epoch", "step", "global_step", "incarnation", "time"}
"""The fields that every line of our metrics has."""


def lost_commits(source: CheckpointFolders) -> list[str]:
    """Evidence that checkpoints were committed here and their manifests are gone; empty when there is none.

    A line for each kind of trace, the strongest first. StorageError when it cannot be determined.
    """
    storage = LocalStorage(source.run)
    if named_positions(storage):
        return []
    ours = next(_committed_files(source), None)
    return [] if ours is None else [f"{ours} was written by Rollforward", *finished_work(storage)]


def finished_work(storage: Storage) -> list[str]:
    """Traces, besides checkpoints, of steps that one of our runs did here; a line for each kind."""
    found = []
    count = _lines_of_metrics(storage)
    if count:
        found.append(f"{_METRICS} has the metrics of {count} steps")
    ranks = [rank for rank in journal_ranks(storage) if _has_records(storage, rank)]
    if ranks:
        found.append(f"{JOURNAL}/ has records of rank {', '.join(map(str, ranks))}")
    return found


def refuse_lost_commits(source: CheckpointFolders) -> None:
    """NothingToResume when the manifests of one of our runs are gone; nothing is changed."""
    found = lost_commits(source)
    if found:
        lines = [
            f"{source.run} is a Rollforward run whose manifests are gone: there is none in {COMMITS}/, so "
            "nothing proves which files belong together and whether they are whole",
            *(f"  {trace}" for trace in found),
            "  nothing was changed: tensor files, journal and figures are as they were",
        ]
        raise NothingToResume("\n".join(lines), hint=what_to_try(source))


def what_to_try(source: CheckpointFolders) -> str:
    """The hint for a user whose manifests are gone."""
    hint = (
        f"put {COMMITS}/ back from a copy of this folder, and {TABLES}/ if it is gone too: small JSON files, "
        "and all that is missing"
    )
    policy = [path for path in _committed_files(source) if path.parent.parent == source.policy]
    if len(policy) != 1:
        return hint
    return (
        f"{hint}. Without one, a new run can start from weights that nothing proves: copy {policy[0]} as "
        f"model.safetensors, and the files of {source.run / MODEL}, to a new folder, and name that with "
        "--actor_checkpoint_path, without --resume_training, and another --save_checkpoint_dir"
    )


def _committed_files(source: CheckpointFolders) -> Iterator[Path]:
    """The files that each `meta.json` of policy and optimizer names, if they have our layout."""
    for folder in (source.policy, source.optimizer):
        try:
            named = [path for rank in sorted(folder.glob("rank_*")) if (path := _named_in(rank)) is not None]
        except OSError as error:
            raise storage_error("looking into", str(folder), error) from error
        yield from (path for path in named if _is_ours(path))


def _named_in(rank: Path) -> Path | None:
    if not (rank / META).is_file():
        return None
    try:
        return rank / parse_meta(read_input(rank / META, MAX_META_BYTES)).file
    except ValueError:
        return None


def _is_ours(path: Path) -> bool:
    place = Path(os.path.realpath(path))
    try:
        with LocalStorage(place.parent).open(place.name) as handle:
            return _has_our_layout(read_header(handle, str(path)))
    except CheckpointInvalid:
        return False
    except StorageError as error:
        if error.settled:
            return False
        raise


def _has_our_layout(header: Header) -> bool:
    records = header.tensors
    sizes = [DTYPES[record.dtype].itemsize for record in records]
    return (
        dict(header.metadata) == {"format": "pt"}
        and bool(records)
        and records[0].begin % ALIGNMENT == 0
        and sizes == sorted(sizes, reverse=True)
        and not any(TRAINER_PREFIX in record.name for record in records)
    )


def _lines_of_metrics(storage: Storage) -> int:
    entry = storage.stat(_METRICS)
    if entry is None or entry.kind != "file" or entry.size > _MAX_METRICS:
        return 0
    lines = read_lines(storage, _METRICS, limit=_MAX_METRICS, longest=_MAX_LINE)
    return sum(map(_is_record, lines))


def _is_record(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() >= _FIELDS


def _has_records(storage: Storage, rank: int) -> bool:
    """Whether there is more than a segment's first frame, which says who started it."""
    for segment in list_segments(storage, rank):
        with storage.open(segment.name.path) as handle:
            if sum(1 for _ in islice(read_frames(handle), 2)) > 1:
                return True
    return False
