"""Power loss at every point of a run that writes metrics: every step that counts has just one line."""

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from crash_states import DiskModel, Tree, crash_states
from simulated_disk import Killed, SimulatedDisk

from rollforward.errors import NothingToResume
from rollforward.position import Position
from rollforward.replay.metrics import FILE, before, read_from
from rollforward.run.metrics import Metrics, SaveTrouble
from rollforward.storage import FileOps, LocalStorage
from rollforward.store import CheckpointStore, Retention, find

ROOT = "/data/run"
SAVE_EVERY = 2
STEPS = 60
KILLED_AFTER = (2, 60, 9, 100, 7, 45, 33, 21, 80, 70, 5, 64, 15)
"""Operations on the disk, start by start."""
Open = Callable[[SimulatedDisk], LocalStorage]


def open_storage(disk: SimulatedDisk) -> LocalStorage:
    return LocalStorage(ROOT, disk)


def newest(storage: LocalStorage) -> Position:
    try:
        return find(storage).manifest.position
    except NothingToResume:
        return Position(0, 0)


def start(storage: LocalStorage, incarnation: int, end: int) -> None:
    """One start of a run: it goes on at its newest checkpoint, and saves after every second step."""
    position = newest(storage)
    kept = before(read_from(storage), position)
    metrics = Metrics(
        storage,
        kept=kept,
        incarnation=incarnation,
        steps_per_epoch=1000,
        tensorboard=None,
        trouble=SaveTrouble(),
    )
    store = CheckpointStore(storage, retention=Retention(newest=2))
    for step in range(position.step, end):
        metrics.step(Position(0, step), {"reward": incarnation + step / 8, "tokens": 1.0})
        if (step + 1) % SAVE_EVERY == 0:
            tensors = {"policy_model": {"w": np.full(3, step, np.float32)}}
            about = {"run_id": "r", "incarnation": incarnation, "state": {}}
            store.save(Position(0, step + 1), tensors, global_step=step + 1, **about)
    metrics.close()


def record(open_storage: Open = open_storage) -> SimulatedDisk:
    """Starts that are killed, at the beginning and in the middle, and one that comes to its end."""
    disk = SimulatedDisk()
    disk.mkdir("/data")
    disk.fsync_folder("/")
    for incarnation, operations in enumerate(KILLED_AFTER, start=1):
        disk.kill_after = len(disk.log) + operations
        with pytest.raises(Killed):
            start(open_storage(disk), incarnation, STEPS)
    disk.kill_after = None
    start(open_storage(disk), len(KILLED_AFTER) + 1, STEPS)
    return disk


def states(disk: SimulatedDisk) -> Iterator[Tree]:
    """Every distinct crash state of the run."""
    model, seen = DiskModel(), set()
    for number, op in enumerate(disk.log):
        model.apply(op)
        for tree in crash_states(model, seed=number):
            key = hash(frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                yield tree


def whole_lines(tree: Tree) -> list[int]:
    """The steps that the file has lines of, as any reader of JSON lines finds them."""
    found = []
    for line in (tree.get(f"{ROOT}/{FILE}") or b"").split(b"\n"):
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


class Violation(AssertionError):
    """A step that a checkpoint holds has no line, or several."""


def check(tree: Tree) -> int:
    """The number of steps that the newest checkpoint of a crash state holds; each has one line."""
    steps = newest(open_storage(SimulatedDisk.of(tree))).step
    lines = [step for step in whole_lines(tree) if step < steps]
    if lines != list(range(steps)):
        raise Violation(f"the checkpoint holds {steps} steps, the file has lines of {lines}")
    return steps


def test_after_any_power_loss_each_step_before_the_newest_checkpoint_has_one_line():
    disk = record()
    reached = set()
    for count, tree in enumerate(states(disk)):
        reached.add(check(tree))
        if count % 20 == 0:
            going_on = SimulatedDisk.of(tree)
            start(open_storage(going_on), 99, STEPS + 2)
            assert whole_lines(going_on.tree()) == list(range(STEPS + 2))
    assert reached == set(range(0, STEPS + 1, SAVE_EVERY))
    assert count > 500


class Careless:
    """`FileOps` that leave out what makes the metrics durable."""

    def __init__(self, disk: SimulatedDisk, call: str) -> None:
        self._disk = disk
        self._call = call

    def __getattr__(self, name: str) -> object:
        original = getattr(self._disk, name)
        if name != self._call:
            return original

        def sync(given: object) -> None:
            path = self._disk._open[given][1] if isinstance(given, int) else given
            if FILE not in path and path != ROOT:
                original(given)

        return sync


@pytest.mark.parametrize("call", ["fsync", "fsync_folder"])
def test_a_sync_that_is_left_out_is_found(call):
    def careless(disk: SimulatedDisk) -> LocalStorage:
        ops: FileOps = Careless(disk, call)  # type: ignore[assignment]
        return LocalStorage(ROOT, ops)

    disk = record(careless)

    def crash_everywhere() -> None:
        for tree in states(disk):
            check(tree)

    with pytest.raises(Violation):
        crash_everywhere()
