"""Whether what a run's folder holds is intact: its checkpoints, and the journal of each rank.

Nothing is changed on disk, and a run that is training may be looked at: a checkpoint that it
removes meanwhile is told as missing.

Left out of the journal: records of futures that were abandoned, which nothing will ever read again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rollforward.inspection.looking import Progress, Verdict, bytes_to_verify
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import list_checkpoints
from rollforward.store.journal.history import journal_ranks
from rollforward.store.journal.reading import list_segments, read_journal


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


def check_checkpoints(storage: Storage) -> Iterator[Verdict]:
    """Newest first: whether the manifest proves intact and all files are there with their sizes."""
    for info in list_checkpoints(storage):
        yield Verdict(info.position, 0, info.reason)


def check_journals(storage: Storage, progress: Progress) -> Iterator[JournalVerdict]:
    """Read and digest every record of the newest history, rank by rank; `progress` is told of bytes."""
    for rank in journal_ranks(storage):
        segments = list_segments(storage, rank)
        view = read_journal([storage], rank=rank, since=Position(0, 0))
        size = sum(segment.size for segment in segments)
        progress(size)
        yield JournalVerdict(
            rank=rank,
            segments=len(segments),
            size=size,
            problems=view.problems,
            torn=tuple(f"{segment}: {ending.problem}" for segment, ending in view.torn),
        )


def bytes_to_check(storage: Storage) -> int:
    """How much a look at every byte has to read."""
    journals = (list_segments(storage, rank) for rank in journal_ranks(storage))
    return bytes_to_verify(storage) + sum(segment.size for found in journals for segment in found)
