"""What a journal's files need besides appending: torn ends are cut, segments copied, and old ones removed.

For the holder of the run's lock. Each rank looks after its own folder; the folders of ranks that have no
worker any more, since an earlier start had more, are shared among the ranks there are (`looked_after`).
"""

from collections.abc import Iterator, Sequence

from rollforward.position import Position
from rollforward.storage import ReadHandle, Storage
from rollforward.store.journal.reading import JournalView, journal_ranks, list_segments
from rollforward.store.journal.timeline import Lineage, removable
from rollforward.store.layout import SegmentName, is_temporary, journal_folder

_COPY_BYTES = 4 << 20


def looked_after(*storages: Storage, rank: int, world_size: int) -> list[int]:
    """The ranks whose folders are the business of this one."""
    return sorted({rank, *(other for other in journal_ranks(*storages) if other % world_size == rank)})


def prune_folder(storage: Storage, rank: int, lineage: Lineage, oldest: Position) -> list[str]:
    """Remove a rank's segments that no replay from `oldest` or later needs; returns their paths.

    Leftovers of a killed repair are removed too. `lineage`: of the newest start.
    """
    for entry in storage.scan(journal_folder(rank)):
        if entry.kind == "file" and is_temporary(entry.name):
            storage.remove(f"{journal_folder(rank)}/{entry.name}")
    removed = removable([segment.name for segment in list_segments(storage, rank)], lineage, oldest)
    remove_segments(storage, removed)
    return [name.path for name in removed]


def remove_segments(storage: Storage, names: Sequence[SegmentName]) -> None:
    """Durably remove segments of one rank, given oldest first, and what was cut off their ends."""
    for name in names:
        storage.remove(name.path)
        storage.remove(name.torn_path)
        # One by one, oldest first: a crash in between must not look like a lost segment.
        storage.sync_folder(journal_folder(name.rank))


def repair(storage: Storage, view: JournalView) -> list[str]:
    """Cut off torn ends of segments in `storage`, copying each aside first; returns what was done, by line.

    Torn ends in other storages are left as they are.
    """
    done = []
    for segment, ending in view.torn:
        if segment.storage is not storage:
            continue
        with storage.open(segment.name.path) as handle:
            if handle.size:
                storage.write(segment.name.torn_path, _bytes(handle, ending.offset, handle.size))
            if ending.offset:
                storage.write(segment.name.path, _bytes(handle, 0, ending.offset))
            else:
                storage.remove(segment.name.path)
                storage.sync_folder(journal_folder(segment.name.rank))
            cut = handle.size - ending.offset
        done.append(
            f"{segment}: its last write was cut off ({ending.problem}); "
            f"{cut} bytes moved to {segment.name.torn_path}"
        )
    return done


def settle(storage: Storage, inherited: JournalView) -> None:
    """Make durable what is inherited from segments in `storage`.

    Their writer may have been killed before it synced: then the records are there, and a crash of the machine
    could still take them, after they were used.
    """
    places = [*inherited.rollouts.values(), *inherited.outcomes.values()]
    newest: dict[tuple[int, int], SegmentName] = {}
    for name in sorted({place.segment.name for place in places if place.segment.storage is storage}):
        newest[name.rank, name.incarnation] = name
    for name in newest.values():
        storage.sync_file(name.path)


def adopt(storage: Storage, inherited: JournalView) -> None:
    """Copy segments with inherited records from other folders, so that `storage` needs no other folder.

    They are copied as they are, except for torn ends, which are left out.
    """
    torn = {segment.name: ending.offset for segment, ending in inherited.torn}
    places = [*inherited.rollouts.values(), *inherited.outcomes.values()]
    for segment in sorted({place.segment for place in places}, key=lambda segment: segment.name):
        if segment.storage is not storage:
            with segment.storage.open(segment.name.path) as handle:
                end = torn.get(segment.name, handle.size)
                storage.write(segment.name.path, _bytes(handle, 0, end))


def _bytes(handle: ReadHandle, begin: int, end: int) -> Iterator[bytearray]:
    for offset in range(begin, end, _COPY_BYTES):
        piece = bytearray(min(_COPY_BYTES, end - offset))
        handle.read_into(memoryview(piece), offset)
        yield piece
