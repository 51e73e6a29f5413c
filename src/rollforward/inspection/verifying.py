"""Whether what a run's folder holds is intact: its checkpoints, and the journal of each rank.

`verify_checkpoints` and `check_journals` read and digest every byte; `check_checkpoints` looks at
manifests, and at the presence and size of files. Nothing is changed on disk, and a run that is
training may be looked at: a checkpoint that it removes meanwhile is reported as missing.

Left out of the journal: records of futures that were abandoned, which nothing will ever read again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import list_checkpoints
from rollforward.store.catalog import check_files, load_manifest, positions
from rollforward.store.journal.history import journal_ranks
from rollforward.store.journal.reading import list_segments, read_journal
from rollforward.store.layout import journal_folder
from rollforward.store.lock import without_successor
from rollforward.store.restoring import read_attachment, read_tensors

Progress = Callable[[int], None]
"""Is told how many bytes were read since it was last called."""


@dataclass(frozen=True)
class Verdict:
    """What verifying a checkpoint found."""

    position: Position
    bytes_read: int
    reason: str
    """Why it is not intact, in one line; empty when it is."""


@dataclass(frozen=True, kw_only=True)
class JournalVerdict:
    """What reading the journal of one rank found."""

    rank: int
    segments: int
    size: int
    """Bytes of its segments, those of abandoned futures included."""
    problems: tuple[str, ...]
    """Damage, a line each."""
    torn: tuple[str, ...]
    """Ends that a crash cut off, a line each: no damage, the next start of the run cuts them."""


def bytes_to_verify(storage: Storage) -> int:
    """How much `verify_checkpoints` has to read, files that checkpoints share counted each time."""
    total = 0
    for position in positions(storage):
        try:
            total += load_manifest(storage, position).size
        except CheckpointInvalid:
            continue
    return total


def bytes_to_check(storage: Storage) -> int:
    """How much a look at every byte has to read, checkpoints and journals."""
    journals = (list_segments(storage, rank) for rank in journal_ranks(storage))
    return bytes_to_verify(storage) + sum(segment.size for found in journals for segment in found)


def check_checkpoints(storage: Storage) -> Iterator[Verdict]:
    """Newest first: whether the manifest proves intact and all files are there with their sizes."""
    for info in list_checkpoints(storage):
        yield Verdict(info.position, 0, info.reason)


def verify_checkpoints(
    storage: Storage, *, progress: Progress = lambda _size: None, only: Position | None = None
) -> Iterator[Verdict]:
    """Read and digest every byte, newest checkpoint first; `progress` is told of bytes as they pass."""
    for position in positions(storage):
        if only is not None and position != only:
            continue
        done = 0
        try:
            manifest = load_manifest(storage, position)
            check_files(storage, manifest)
            for _, _, array in read_tensors(storage, manifest):
                done += array.nbytes
                progress(array.nbytes)
            for attachment in manifest.attachments:
                done += len(read_attachment(storage, manifest, attachment.name))
        except CheckpointInvalid as error:
            yield Verdict(position, done, error.message)
        else:
            yield Verdict(position, done, "")


def check_journals(storage: Storage, progress: Progress) -> Iterator[JournalVerdict]:
    """Read and digest every record of the newest history, rank by rank; `progress` is told of bytes."""
    odd = without_successor(storage)
    for rank in journal_ranks(storage):
        segments = list_segments(storage, rank)
        view = read_journal([storage], rank=rank, since=Position(0, 0))
        size = sum(segment.size for segment in segments)
        progress(size)
        yield JournalVerdict(
            rank=rank,
            segments=len(segments),
            size=size,
            problems=(*view.problems, *(line for line in odd if line.startswith(f"{journal_folder(rank)}/"))),
            torn=tuple(f"{segment}: {ending.problem}" for segment, ending in view.torn),
        )
