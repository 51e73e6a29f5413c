"""What the first rank puts into the manifest about each rank: gathered from the tables that they wrote.

The tables are on the shared storage already, so nothing of them passes between ranks: the first rank reads
them there, and takes their digests and the sizes of files. The sum of all digests, which the ranks have
exchanged, says whether these are the tables that were written.

Each table also says which tensors it has the first element of. No tensor may begin in two of them: its pieces
would cover it twice, which `covering` cannot tell.
"""

from collections import Counter

from rollforward.boxes import cover_fault, whole
from rollforward.errors import CheckpointInvalid, EngineError, StorageError
from rollforward.storage import Storage, read_small
from rollforward.store import table
from rollforward.store.manifest import Head, RankRecord
from rollforward.store.sealing import own_digest
from rollforward.store.table import MAX_TABLE_BYTES, StoredPiece


def gather_ranks(storage: Storage, head: Head, digests: int) -> tuple[RankRecord, ...]:
    """What each rank wrote; `digests` is the sum of the tables' digests.

    StorageError when these are not the tables that were written, EngineError for a tensor that is held twice.
    """
    records: list[RankRecord] = []
    begun = Counter[str]()
    for rank in range(head.world_size):
        path = head.table_file(rank).path
        content = read_small(storage, path, limit=MAX_TABLE_BYTES)
        try:
            files, names = table.summarise(content, path)
        except CheckpointInvalid as error:
            raise _not_shared(head, error.message) from error
        if [file.path for file in files] != [head.tensor_file(role, rank).path for role in head.roles]:
            raise _not_shared(head, f"{path} lists other files")
        records.append(RankRecord(len(content), own_digest(content), tuple(file.size for file in files)))
        begun.update(names)
    if sum(int(record.digest, 16) for record in records) != digests:
        raise _not_shared(head, f"the tables in {storage} are others")
    if begun and max(begun.values()) > 1:
        _refuse_twice(storage, head)
    return tuple(records)


def _not_shared(head: Head, found: str) -> StorageError:
    return StorageError(
        f"checkpoint {head.position}: not what the ranks have just written: {found}",
        hint="all ranks must see the same folder, and at once what another has written to it",
    )


def _refuse_twice(storage: Storage, head: Head) -> None:
    """EngineError that names the first tensor whose pieces overlap."""
    pieces: dict[tuple[str, str], list[StoredPiece]] = {}
    for rank in range(head.world_size):
        path = head.table_file(rank).path
        for piece in table.parse(read_small(storage, path, limit=MAX_TABLE_BYTES), path).pieces:
            pieces.setdefault((piece.role, piece.tensor), []).append(piece)
    for (role, tensor), held in sorted(pieces.items()):
        fault = cover_fault(whole(held[0].global_shape), [piece.box for piece in held])
        if fault is not None:
            raise EngineError(
                f"checkpoint {head.position} was not saved: {role} {tensor}: {fault}",
                hint="the pieces of all ranks must cover a tensor exactly once",
            )
