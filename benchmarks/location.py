"""Checkpoints of a thousand ranks: python benchmarks/location.py [--ranks 1024] [--tensors 1000]

Every tensor is cut by rows over all ranks. Makes a run's folder with as many manifests as asked for. The
newest checkpoint has its tables, and tensor files of the right sizes (sparse); the one before has files of
the right sizes only; the others have none, since nobody looks at them. Then measures

- what a resuming run does to find the newest: order all manifests, read one, see that every file is there;
- what one rank reads to know where its own pieces are, and what a rank of half as many ranks reads;
- what the first rank does at a commit to gather what all have written;
- what a rank exchanges for a commit, by saving with real stores: threads that add numbers up.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rollforward.boxes import cut_rows
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, find
from rollforward.store import manifest as manifests
from rollforward.store import table as tables
from rollforward.store.contents import Totals, as_digest, locate
from rollforward.store.digests import digest
from rollforward.store.gathering import gather_ranks
from rollforward.store.layout import ROLE_FOLDERS, TensorFileName
from rollforward.store.manifest import Manifest, RankRecord, RoleRecord
from rollforward.store.sealing import own_digest, seal
from rollforward.store.table import FileRecord, StoredPiece, Table
from rollforward.store.tensorfile import TensorRecord
from rollforward.tensors import Layout, Piece, TensorSpec

ROWS, COLUMNS = 8, 64
"""Of a rank's piece."""
HEADER = 4096
PIECE = 4 * ROWS * COLUMNS
T = TypeVar("T")


def names_of(tensors: int) -> list[str]:
    """As models have them."""
    return [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(tensors)]


def table_of(position: Position, rank: int, ranks: int, names: list[str]) -> Table:
    """What a rank would have written."""
    files, pieces = {}, []
    shape = (ROWS * ranks, COLUMNS)
    for role in ROLE_FOLDERS:
        path = TensorFileName(role, rank, position).path
        files[role] = FileRecord(path, HEADER + len(names) * PIECE, digest(path.encode()))
        for number, name in enumerate(sorted(names)):
            begin = HEADER + number * PIECE
            found = digest(f"{role}{name}{rank}".encode())
            record = TensorRecord(name, "F32", (ROWS, COLUMNS), begin, begin + PIECE, found)
            pieces.append(StoredPiece(role, record, name, shape, (ROWS * rank, 0)))
    return tables.make(rank, position, files, pieces)


def make_newest(root: Path, position: Position, ranks: int, names: list[str]) -> Manifest:
    """Tables and tensor files of a checkpoint that nobody saved."""
    totals, records = Totals(), []
    for rank in range(ranks):
        table = table_of(position, rank, ranks, names)
        for piece in table.pieces:
            totals.add(piece)
        content = tables.dump(table)
        sizes = tuple(file.size for file in table.files.values())
        records.append(RankRecord(len(content), own_digest(content), sizes))
        put(root / f"tables/rank_{rank}/table_rank_{rank}-{position}.json", content)
    roles = {}
    for role in ROLE_FOLDERS:
        total = totals.of(role)
        roles[role] = RoleRecord(position, 0, total.tensors, as_digest(total.content), total.cut)
    manifest = Manifest(
        incarnation=1,
        position=position,
        run_id="synthetic",
        global_step=position.step,
        created="2026-01-31T12:00:00.000000Z",
        world_size=ranks,
        fingerprint="",
        versions={},
        state={},
        roles=roles,
        ranks=tuple(records),
    )
    for file in manifest.files:
        put(root / file.path, b"", file.size)
    return manifest


def put(path: Path, content: bytes, size: int | None = None) -> None:
    """Write a file, of `size` bytes if that is more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        opened.write(content)
        opened.truncate(len(content) if size is None else size)


def renumbered(content: bytes, old: Position, new: Position) -> bytes:
    """The same manifest for another position."""
    return seal(content[:-46].replace(f'"{old}"'.encode(), f'"{new}"'.encode()))


def timed(what: str, work: Callable[[], T]) -> T:
    """Do it, and print how long it took."""
    began, busy = time.perf_counter(), time.process_time()
    result = work()
    seconds, computing = time.perf_counter() - began, time.process_time() - busy
    print(f"{what}: {seconds:.3f} s, {computing:.3f} s of them computing", flush=True)
    return result


def wanted(ranks: int, rank: int, of: int, names: list[str]) -> Layout:
    """What a rank wants when there are `of` of them."""
    shape = (ROWS * ranks, COLUMNS)
    box = cut_rows(shape, of)[rank]
    return {
        role: {name: TensorSpec.piece(name, np.float32, shape, box) for name in names}
        for role in ROLE_FOLDERS
    }


def measure_finding(options: argparse.Namespace, root: Path) -> None:
    """Make the folder; find, locate, gather."""
    names = names_of(options.tensors)
    newest = Position(0, options.checkpoints - 1)
    manifest = make_newest(root, newest, options.ranks, names)
    content = manifests.dump(manifest)
    for step in range(options.checkpoints):
        put(root / f"commits/0_{step}.json", renumbered(content, newest, Position(0, step)))
    before = Position(0, options.checkpoints - 2)
    for file in [*manifest.files, *manifest.table_files]:
        put(root / file.path.replace(f"-{newest}.", f"-{before}."), b"", file.size)
    storage = LocalStorage(root)
    print(f"{options.checkpoints} checkpoints, {options.ranks} ranks, {options.tensors} tensors a role")
    sizes = sum(record.size for record in manifest.ranks)
    print(f"a manifest: {len(content) / 1e6:.3f} MB; a table: {sizes / options.ranks / 1e6:.3f} MB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what in ("newest", "newest, again"):
        found = timed(what, lambda: find(storage))
    assert found.manifest.position == newest
    rank = options.ranks // 2
    same = wanted(options.ranks, rank, options.ranks, names)
    located = timed("where a rank's own pieces are", lambda: locate(storage, manifest, same, near=rank))
    print(f"  read {len(located.files) // len(ROLE_FOLDERS)} tables")
    fewer = wanted(options.ranks, rank // 2, options.ranks // 2, names)
    located = timed("the same on half as many ranks", lambda: locate(storage, manifest, fewer, near=rank))
    print(f"  read {len(located.files) // len(ROLE_FOLDERS)} tables")
    digests = sum(int(record.digest, 16) for record in manifest.ranks)
    ranks = timed("gathering at a commit, on rank 0", lambda: gather_ranks(storage, manifest, digests))
    assert ranks == manifest.ranks
    (root / manifest.files[-1].path).unlink()
    found = timed("one file of the newest missing, the next one taken", lambda: find(storage))
    assert len(found.rejected) == 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    print(f"memory above what making them took: {grown / 1024:.0f} MB at most")


class Threads:
    """Ranks that are threads, and add numbers up or gather values; counts what one of them is passed."""

    def __init__(self, ranks: int) -> None:
        self.bytes = 0
        """What the last rank has received."""
        self._given: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks)

    def all_gather(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, as JSON."""
        gathered = self._exchange(rank, json.dumps(value))
        if rank == len(self._given) - 1:
            self.bytes += sum(map(len, gathered))
        return [json.loads(text) for text in gathered]

    def all_sum(self, rank: int, numbers: Sequence[int]) -> list[int]:
        """The sums, as float32."""
        total = np.sum(self._exchange(rank, np.array(numbers, np.float32)), axis=0)
        if rank == len(self._given) - 1:
            self.bytes += total.nbytes
        return [int(number) for number in total]

    def _exchange(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait()
        gathered = list(self._given)
        self._barrier.wait()
        return gathered


def exchanged(ranks: int, *, summing: bool) -> float:
    """Bytes that a rank receives for a commit."""
    threads = Threads(ranks)
    rows = cut_rows((ranks, 4), ranks)
    with tempfile.TemporaryDirectory(prefix="exchange-bench-") as name:

        def work(rank: int) -> None:
            store = CheckpointStore(
                name,
                rank=rank,
                world_size=ranks,
                exchange=lambda value: threads.all_gather(rank, value),
                all_sum=(lambda numbers: threads.all_sum(rank, numbers)) if summing else None,
            )
            array = np.full((1, 4), rank, np.float32)
            held = {role: {"w": Piece(array, (ranks, 4), rows[rank].offset)} for role in ROLE_FOLDERS}
            store.save(Position(0, 1), held, global_step=1, run_id="r", incarnation=1, state={})

        running = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    return threads.bytes


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=1000, help="tensors a role")
    parser.add_argument("--checkpoints", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="location-bench-") as name:
        measure_finding(options, Path(name))
    for ranks in (2, 16, 128):
        added, gathered = (exchanged(ranks, summing=summing) for summing in (True, False))
        print(f"{ranks} ranks, received by each for a commit: {added} bytes adding up, {gathered} gathering")


if __name__ == "__main__":
    main()
