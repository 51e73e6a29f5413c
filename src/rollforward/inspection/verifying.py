"""Whether what a run's folder holds is intact: its checkpoints, its journal, the list of guests.

`verify_checkpoints` and `check_journals` read and digest every byte that a start could ever use, including
records of abandoned futures; `check_checkpoints` checks manifests, attachments, and the presence and size of
tensor files. `store.judging` decides what counts as valid, as for a resume. Nothing is changed on disk. The
run may be training meanwhile: what it removes is skipped.

When a journal's newest segment is missing, there is no gap to notice. Other files give it away: a start that
`metrics.jsonl`, `recoveries.jsonl` or a manifest names and that has no segment, or steps in `metrics.jsonl`
beyond the last record. What was lost after the last finished step leaves no trace.

Not checked, since nothing reads it again or it is derived: `*.torn`, which a crash cut off; `meta.json`;
metrics, logs and evidence, which have no digests.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.position import Position
from rollforward.replay import report as recovery_report
from rollforward.storage import Storage
from rollforward.store.catalog import load_manifest, peek_incarnations, positions
from rollforward.store.guests import read_guests
from rollforward.store.journal.reading import (
    SegmentsChecked,
    check_segments,
    journal_ranks,
    list_segments,
    read_starts,
)
from rollforward.store.judging import Judge
from rollforward.store.layout import GUESTS, journal_folder
from rollforward.store.lock import without_successor
from rollforward.store.tensorfile import is_count

Progress = Callable[[int], None]
"""Called with the number of bytes read since its last call."""

_METRICS = "metrics.jsonl"
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """The result of verifying a checkpoint."""

    position: Position
    bytes_read: int
    reason: str
    """Why it is not intact, in one line; empty when it is."""


@dataclass(frozen=True, kw_only=True)
class JournalVerdict:
    """The result of reading one rank's journal."""

    rank: int
    segments: int
    size: int
    """Bytes in its segments, including those of abandoned futures."""
    problems: tuple[str, ...]
    """Damage, one line each."""
    torn: tuple[str, ...]
    """Ends that a crash cut off, one line each: not damage, the run's next start truncates them."""


@dataclass(frozen=True, kw_only=True)
class FileVerdict:
    """Another file, neither checkpoint nor journal, that has something wrong with it."""

    file: str
    reason: str


class Checkpoints:
    """Checks the checkpoints in a folder, newest first, and then reports what else was found."""

    def __init__(self, storage: Storage, *, deep: bool, progress: Progress = lambda _size: None) -> None:
        self._storage = storage
        self._judge = Judge(storage, deep=deep, progress=progress)

    def verdicts(self, *, only: Position | None = None) -> Iterator[Verdict]:
        """One for each checkpoint that is still there when its turn comes."""
        for position in positions(self._storage):
            info = self._judge.judge(position) if only in (None, position) else None
            if info is not None:
                yield Verdict(position, info.bytes_read, info.reason)

    def other_files(self) -> list[FileVerdict]:
        """Attachments with one of two copies damaged, and a list of guests that cannot be used."""
        found = [
            FileVerdict(file=line.partition(" ")[0], reason=f"{line}; its other copy is whole")
            for line in self._judge.damaged_copies
        ]
        return [*found, *check_guests(self._storage)]


def check_guests(storage: Storage) -> list[FileVerdict]:
    """What is wrong with the list of another trainer's files, if it exists."""
    try:
        read_guests(storage)
    except StorageError as error:
        return [FileVerdict(file=GUESTS, reason=error.message)]
    return []


def bytes_to_verify(storage: Storage) -> int:
    """How much `verify_checkpoints` has to read, counting shared files once per checkpoint."""
    total = 0
    for position in positions(storage):
        try:
            total += load_manifest(storage, position).size
        except CheckpointInvalid:
            continue
    return total


def bytes_to_check(storage: Storage) -> int:
    """How much a check of every byte has to read, checkpoints and journals."""
    journals = (list_segments(storage, rank) for rank in journal_ranks(storage))
    return bytes_to_verify(storage) + sum(segment.size for found in journals for segment in found)


def check_checkpoints(storage: Storage) -> Iterator[Verdict]:
    """Newest first: whether the manifest is intact and all files are there with the right sizes."""
    yield from Checkpoints(storage, deep=False).verdicts()


def verify_checkpoints(
    storage: Storage, *, progress: Progress = lambda _size: None, only: Position | None = None
) -> Iterator[Verdict]:
    """Read and digest every byte, newest checkpoint first; `progress` is called with bytes read."""
    yield from Checkpoints(storage, deep=True, progress=progress).verdicts(only=only)


def check_journals(storage: Storage, progress: Progress = lambda _size: None) -> Iterator[JournalVerdict]:
    """Read and digest every record of every start, rank by rank; `progress` is called with bytes read."""
    told, numbers = _told_of_starts(storage), without_successor(storage)
    workers, expected = _workers_of_starts(storage), _expected_ranks(storage, told)
    for rank in sorted({*journal_ranks(storage), *expected}):
        # A start with fewer workers left nothing in the folders of the others.
        own = [item for item in told if rank < workers.get(item.incarnation, len(expected))]
        checked = check_segments(storage, rank)
        size = sum(segment.size for segment in checked.segments)
        progress(size)
        yield JournalVerdict(
            rank=rank,
            segments=len(checked.segments),
            size=size,
            problems=(*checked.problems, *_missing(checked, own, rank), *_numbered(numbers, rank)),
            torn=tuple(f"{segment}: {ending.problem}" for segment, ending in checked.torn),
        )


def _numbered(lines: Sequence[str], rank: int) -> Iterator[str]:
    """The lines about one rank's journal."""
    return (line for line in lines if line.startswith(f"{journal_folder(rank)}/"))


class _Told(NamedTuple):
    """Evidence of a start, or of a step, whose journal must be there."""

    by: str
    incarnation: int
    step: Position | None = None
    """A finished one."""


def _told_of_starts(storage: Storage) -> list[_Told]:
    told = [_Told(recovery_report.FILE, report.incarnation) for report in recovery_report.read(storage)]
    last = _last_figures(storage, _steps_per_epoch(storage))
    oldest = min(positions(storage), default=None)
    if last is not None and oldest is not None:
        # The journal of steps before the oldest checkpoint is not kept.
        step = last.step if last.step is not None and last.step >= oldest else None
        told.append(last._replace(step=step))
    if journal_ranks(storage):
        newest = max(peek_incarnations(storage).values(), default=0)
        told += [_Told("a manifest", newest)] if newest else []
    return told


def _workers_of_starts(storage: Storage) -> dict[int, int]:
    """Start -> its number of workers, where that can be read."""
    found = {report.incarnation: report.workers for report in recovery_report.read(storage) if report.workers}
    starts = read_starts([storage], ranks=journal_ranks(storage))
    return found | {start.incarnation: start.world_size for start in starts}


def _steps_per_epoch(storage: Storage) -> int | None:
    """From the newest readable manifest; None when there is none."""
    for position in positions(storage):
        try:
            steps = load_manifest(storage, position).state.get("steps_per_epoch")
        except CheckpointInvalid:
            continue
        return steps if is_count(steps) else None
    return None


def _last_figures(storage: Storage, steps_per_epoch: int | None) -> _Told | None:
    """The start and step in the last complete line of metrics.jsonl whose counts agree with each other."""
    entry = storage.stat(_METRICS)
    if entry is None or entry.kind != "file" or not entry.size:
        return None
    with storage.open(_METRICS) as handle:
        tail = bytearray(min(handle.size, _TAIL_BYTES))
        handle.read_into(memoryview(tail), handle.size - len(tail))
    for line in reversed(bytes(tail).split(b"\n")):
        try:
            value = json.loads(line)
            counts = [value[name] for name in ("incarnation", "epoch", "step", "global_step")]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if all(type(count) is int and 0 <= count < 10**18 for count in counts):
            step = Position(counts[1], counts[2])
            if steps_per_epoch is None or counts[3] == step.global_step(steps_per_epoch):
                return _Told(_METRICS, counts[0], step)
    return None


def _expected_ranks(storage: Storage, told: Sequence[_Told]) -> range:
    """The ranks that must have a journal: the newest checkpoint's, if a start is known to have had one."""
    for position in positions(storage) if told else ():
        try:
            return range(load_manifest(storage, position).world_size)
        except CheckpointInvalid:
            continue
    return range(0)


def _missing(checked: SegmentsChecked, told: Sequence[_Told], rank: int) -> Iterator[str]:
    newest = max((segment.name.incarnation for segment in checked.segments), default=0)
    later = max(told, key=lambda item: item.incarnation, default=None)
    if later is not None and later.incarnation > newest:
        yield (
            f"the journal of start {later.incarnation}, which {later.by} mentions, is missing (rank {rank}); "
            + (f"the newest there is of start {newest}" if newest else "there is none")
        )
        return
    for item in told:
        if item.step is not None and (checked.last is None or checked.last < item.step):
            yield (
                f"{item.by} mentions step {item.step}, and the last record is of "
                f"{checked.last or 'no step'}: the newest segment is missing on rank {rank}"
            )
