"""Ours with several ranks, for `benchmarks/checkpoint.py --ranks N`: real processes, one state.

Every rank holds the same tensors, as data-parallel workers do; each writes its share, and each
reads all of them back. Memory and cores are shared by the ranks, as they would not be on as many
machines. The time of a column is that of the slowest rank.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one round, of the slowest rank."""

    blocked: float
    durable: float
    warm: float
    cold: float


def measure_ranks(
    make_state: Callable[[int], Any], size: int, folder: Path, ranks: int, rounds: int
) -> list[Timing]:
    """Save and restore `rounds` times in `ranks` processes."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_rank, args=(theirs, make_state, size, folder, rank, ranks, rounds), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    try:
        _serve(ends)
        timings = [end.recv() for end in ends]
    finally:
        for process in processes:
            process.join(10)
    return [
        Timing(*(max(own[number][column] for own in timings) for column in range(4)))
        for number in range(rounds)
    ]


def _serve(ends: list[Connection]) -> None:
    """All-gather for the ranks, until they say that they are done."""
    while True:
        values = [end.recv() for end in ends]
        if values[0] == "done":
            return
        for end in ends:
            end.send(values)


def _rank(
    end: Connection,
    make_state: Callable[[int], Any],
    size: int,
    folder: Path,
    rank: int,
    ranks: int,
    rounds: int,
) -> None:
    import time

    import numpy as np
    from page_cache import forget, sync

    from rollforward.position import Position
    from rollforward.storage import LocalStorage
    from rollforward.store import CheckpointStore, Retention, load_manifest, restore_into

    def exchange(value: Any) -> list[Any]:
        end.send(value)
        gathered: list[Any] = end.recv()
        return gathered

    def timed(work: Callable[[], Any]) -> float:
        exchange(None)
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    state = make_state(size)
    target = {"policy_model": {name: np.zeros_like(array) for name, array in state.items()}}
    root, storage = folder / "ranks", LocalStorage(folder / "ranks")
    store = CheckpointStore(
        root, rank=rank, world_size=ranks, exchange=exchange, retention=Retention(newest=1)
    )
    found = []
    for number in range(rounds):
        # Tensors that did not change would not be written again.
        for array in state.values():
            array += 1
        at = Position(0, number + 1)
        tensors = {"policy_model": state}
        began = time.perf_counter()
        saved = store.save(at, tensors, global_step=number, run_id="bench", incarnation=1, state={})
        durable = time.perf_counter() - began
        manifest = load_manifest(storage, at)
        restore_into(storage, manifest, target)
        warm = timed(lambda manifest=manifest: restore_into(storage, manifest, target))  # type: ignore[misc]
        exchange(None)
        if rank == 0:
            files = [path for path in root.rglob("*") if path.is_file()]
            sync(files)
            forget(files)
        cold = timed(lambda manifest=manifest: restore_into(storage, manifest, target))  # type: ignore[misc]
        assert all(np.array_equal(target["policy_model"][name], array) for name, array in state.items())
        found.append((saved.blocked, durable, warm, cold))
        exchange(None)
    end.send("done")
    end.send(found)
