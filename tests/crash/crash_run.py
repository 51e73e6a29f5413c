"""The run that the crash tests crash, and what must hold after every crash.

Three ranks, their operations interleaved, save every step, keep two checkpoints, and share an
unchanged reference. Starts are killed at the very beginning and in the middle of a save, with
their unsynced operations still in the air; others take over, change the reference, save a
position twice, and go on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from crash_states import DiskModel, Tree, crash_states
from held import Holding, spread
from lockstep import LockStep
from simulated_disk import Killed, SimulatedDisk

from rollforward.errors import CheckpointInvalid, NothingToResume, RollforwardError
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage
from rollforward.store import CheckpointStore, Manifest, Retention, find, list_checkpoints, read_tensors
from rollforward.store.catalog import check_files, load_manifest, positions
from rollforward.store.manifest import Head
from rollforward.store.restoring import verify

ROOT = "/data/run"
EARLY, MIDDLE = 3, 45
"""After how many operations the first and the fourth save are killed."""
RETENTION = Retention(newest=2)

Tensors = dict[str, dict[str, np.ndarray]]
Build = Callable[..., CheckpointStore]
Open = Callable[[SimulatedDisk], Storage]
Hold = Callable[[int, int, int, int], Holding]
"""(incarnation, step, rank, ranks) -> what the rank has."""


def open_storage(disk: SimulatedDisk) -> LocalStorage:
    return LocalStorage(ROOT, disk)


def state(incarnation: int, step: int) -> Tensors:
    """A small state; the reference changes once, at step 5, and every start trains differently.

    One of the roles is not of the contract, so that crashes find nothing that treats it differently. Its
    tensors are in pieces.
    """
    base = np.arange(200, dtype=np.float32) + 1000 * step + 100_000 * incarnation
    return {
        "policy_model": {"a": base, "b": base[:3] * 2},
        "critic": {"m": base[:5] / 3, "global_step": np.array(step)},
        "ref": {"a": np.full(6, step >= 5, np.float32), "b": np.ones(3, np.float32)},
    }


@dataclass
class Run:
    """A finished run: its disk with the log, and what was saved in it."""

    disk: SimulatedDisk
    saved: dict[tuple[int, Position], Tensors] = field(default_factory=dict)
    """Every save that was tried, by (incarnation, position)."""
    error: RollforwardError | None = None
    """Why it ended early; only mutants do."""


def holding(incarnation: int, step: int, rank: int, world_size: int) -> Holding:
    """What a rank has of it."""
    whole = state(incarnation, step)
    return Holding(whole, rank, spread(whole, rank, world_size, ["critic"]))


def save(store: CheckpointStore, incarnation: int, step: int, hold: Hold = holding) -> Head:
    return store.save(
        Position(0, step),
        hold(incarnation, step, store.rank, store.world_size),
        global_step=step,
        run_id="run",
        incarnation=incarnation,
        state={},
        attachments={"config.json": b"{}"},
    ).manifest


def record(
    build: Build = CheckpointStore,
    storage: Open = open_storage,
    *,
    world_size: int = 3,
    hold: Hold = holding,
) -> Run:
    """Run it all on a simulated disk. `build` and `storage` are what the mutants replace."""
    run = Run(SimulatedDisk())
    run.disk.mkdir("/data")
    run.disk.fsync_folder("/")

    def process(incarnation: int, steps: list[int], previous: Manifest | None = None) -> list[Any]:
        def body(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
            own = storage(run.disk)
            store = build(
                own,
                rank=rank,
                world_size=world_size,
                exchange=exchange,
                retention=RETENTION,
                previous=previous,
            )
            for step in steps:
                run.saved[incarnation, Position(0, step)] = hold(incarnation, step, rank, world_size).state
                save(store, incarnation, step, hold)
                if rank == 0:
                    run.disk.mark((incarnation, Position(0, step)))

        ranks = LockStep(world_size)
        run.disk.switch = ranks.switch
        return ranks.run(body)

    try:
        _live(run, process)
    except RollforwardError as error:
        run.error = error
    return run


def _live(run: Run, process: Callable[..., list[Any]]) -> None:
    # Killed when the first folders are made and not yet durable: the next start must not trust them.
    run.disk.kill_after = len(run.disk.log) + EARLY
    process(1, [1])
    run.disk.kill_after = None
    _must_end_well(process(1, [1, 2, 3]))
    previous = find(open_storage(run.disk)).manifest
    run.disk.kill_after = len(run.disk.log) + MIDDLE
    ended = process(1, [4], previous)
    assert any(isinstance(result, Killed) for result in ended)
    run.disk.kill_after = None
    _must_end_well(process(2, [4, 5], find(open_storage(run.disk)).manifest))
    _must_end_well(process(3, [5, 6, 7], find(open_storage(run.disk)).manifest))


def _must_end_well(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


class Violation(AssertionError):
    """A crash cost something that was promised."""


class Checker:
    """Opens disks that crashes left with the real recovery code; raises Violation for a broken promise.

    Every checkpoint that is visible must be whole, to the last byte, and the newest must not be
    older than what was reported. Checkpoints with the same bytes in all their files are read once.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._intact: set[tuple[int, str]] = set()

    def check(self, tree: Tree, reported: tuple[int, Position] | None) -> None:
        """Check one crash state."""
        storage = open_storage(SimulatedDisk.of(tree))
        try:
            newest: Manifest | None = find(storage).manifest
        except NothingToResume:
            newest = None
        if reported is not None and (newest is None or newest.order < reported):
            raise Violation(f"{reported} was reported as committed, found is {newest and newest.order}")
        for position in positions(storage):
            try:
                if newest is not None and position == newest.position:
                    manifest = newest
                else:
                    manifest = load_manifest(storage, position)
                    check_files(storage, manifest)
                key = hash(tuple(tree[f"{ROOT}/{path}"] for path in sorted(manifest.paths())))
                if (key, manifest.digest) not in self._intact:
                    self._compare(storage, manifest)
                    self._intact.add((key, manifest.digest))
            except CheckpointInvalid as error:
                raise Violation(f"a visible checkpoint is not whole: {error.message}") from error

    def _compare(self, storage: Storage, manifest: Manifest) -> None:
        verify(storage, manifest)
        expected = self._run.saved[manifest.order]
        found = {(role, name): array for role, name, array in read_tensors(storage, manifest)}
        if found.keys() != {(role, name) for role, named in expected.items() for name in named}:
            raise Violation(f"{manifest.order} holds other tensors")
        for (role, name), array in found.items():
            if not np.array_equal(array, expected[role][name]):
                raise Violation(f"{manifest.order}: {role} {name} holds something else")


def check_going_on(tree: Tree, world_size: int = 3, hold: Hold = holding) -> None:
    """A new start on the disk that a crash left saves, commits and cleans up."""
    disk = SimulatedDisk.of(tree)
    storage = open_storage(disk)
    try:
        previous = find(storage).manifest
    except NothingToResume:
        previous = None

    def body(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        store = CheckpointStore(
            open_storage(disk),
            rank=rank,
            world_size=world_size,
            exchange=exchange,
            retention=RETENTION,
            previous=previous,
        )
        save(store, 9, 9, hold)

    _must_end_well(LockStep(world_size).run(body))
    listed = list_checkpoints(storage, deep=True)
    if listed[0].position != Position(0, 9) or not all(item.valid for item in listed):
        raise Violation(f"after going on: {[(str(item.position), item.reason) for item in listed]}")
    if any(path.endswith(".tmp") for path in disk.tree()):
        raise Violation("a temporary file was not cleaned up")


def states(run: Run) -> Iterator[tuple[Tree, tuple[int, Position] | None]]:
    """Every distinct crash state of the run, with the newest checkpoint reported before it."""
    model = DiskModel()
    reported: tuple[int, Position] | None = None
    seen: set[tuple[int, tuple[int, Position] | None]] = set()
    for number, op in enumerate(run.disk.log):
        model.apply(op)
        if op.kind == "mark":
            reported = op.note
        for tree in crash_states(model, seed=number):
            key = (hash(frozenset(tree.items())), reported)
            if key not in seen:
                seen.add(key)
                yield tree, reported
