"""A loop of `open_run`, killed anywhere or without power: the same bytes, and nothing durable made twice."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from crash_states import DiskModel, Tree, crash_states
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import LockStep
from loop_run import STEPS, Exchange, Key, State, Work, new_state, run_loop, same, write_at_once
from simulated_disk import Killed, SimulatedDisk

from rollforward.storage import LocalStorage
from rollforward.store import list_checkpoints

ROOT = "/run"


@pytest.fixture(autouse=True, scope="module")
def _at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        write_at_once(patch)
        yield


def start(disk: SimulatedDisk, work: Work, world_size: int = 1) -> list[State]:
    """One start on every rank; Killed when the process was."""

    def body(rank: int, exchange: Exchange) -> State:
        return run_loop(LocalStorage(ROOT, disk), work, rank=rank, world_size=world_size, exchange=exchange)

    ranks = LockStep(world_size)
    disk.switch = ranks.switch
    results = ranks.run(body)
    if any(isinstance(result, Killed) for result in results):
        raise Killed
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


WHOLE: dict[int, list[State]] = {}


def whole(world_size: int) -> list[State]:
    """What a run that is never killed ends with."""
    if world_size not in WHOLE:
        WHOLE[world_size] = start(SimulatedDisk(), Work(), world_size)
        assert not same(WHOLE[world_size][0], new_state())
    return WHOLE[world_size]


def until_it_ends(disk: SimulatedDisk, work: Work, world_size: int, kills: list[int], write: Any) -> int:
    """Killed after so many operations of each start, then never; how often it was."""
    left = list(kills)
    while True:
        disk.kill_after = len(disk.log) + left.pop(0) if left else None
        disk.short_write = write
        try:
            ended = start(disk, work, world_size)
        except Killed:
            continue
        assert all(same(one, other) for one, other in zip(ended, whole(world_size), strict=True))
        return len(kills) - len(left)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 160), max_size=6), st.sampled_from([None, 200, 700]), st.sampled_from([1, 2]))
def test_a_loop_killed_anywhere_ends_with_the_same_bytes(
    kills: list[int], write: int | None, world_size: int
) -> None:
    disk, work = SimulatedDisk(), Work()
    until_it_ends(disk, work, world_size, kills, write)
    assert not work.again
    assert not [line for line in work.said if line.startswith("warning")]
    assert set(work.made) == {
        (rank, step, name) for rank in range(world_size) for step in STEPS for name in ("rollouts", "rewards")
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_killed_again_and_again_makes_nothing_durable_again(world_size: int) -> None:
    disk, work, rng = SimulatedDisk(), Work(), random.Random(world_size)
    kills = until_it_ends(disk, work, world_size, [rng.randint(20, 120 * world_size) for _ in range(25)], 300)
    assert kills >= 5
    assert not work.again
    assert sum(work.made.values()) <= len(STEPS) * 2 * world_size + kills * world_size
    assert any(count > 1 for count in work.updated.values()), "it replays"
    assert all(info.valid for info in list_checkpoints(LocalStorage(ROOT, disk), deep=True)), (
        "every checkpoint is whole"
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_between_any_two_operations_of_its_first_start(world_size: int) -> None:
    """Every place, one after the other."""
    disk = SimulatedDisk()
    start(disk, Work(), world_size)
    stride = 1 if world_size == 1 else 3
    for place in range(1, len(disk.log), stride):
        killed, work = SimulatedDisk(), Work()
        until_it_ends(killed, work, world_size, [place], None)
        assert not work.again, place


@pytest.mark.parametrize(("world_size", "every"), [(1, 7), (2, 60)])
def test_no_power_cut_loses_what_once_has_returned(world_size: int, every: int) -> None:
    disk, work = SimulatedDisk(), Work()
    _marks(disk, work)
    start(disk, work, world_size)
    assert _ends_the_same(disk, world_size, every) > 300


@pytest.mark.parametrize(("world_size", "every"), [(1, 29), (2, 150)])
def test_no_power_cut_takes_what_a_killed_process_left_and_its_successor_used(
    world_size: int, every: int
) -> None:
    """What the process had written and not synced was there for the next start, in the system's memory."""
    for place in (70, 95, 120):
        disk, work = SimulatedDisk(), Work()
        _marks(disk, work)
        disk.kill_after = place * world_size
        with pytest.raises(Killed):
            start(disk, work, world_size)
        disk.kill_after = None
        start(disk, work, world_size)
        assert _ends_the_same(disk, world_size, every) > 300


def _marks(disk: SimulatedDisk, work: Work) -> None:
    """Note in the disk's log what `once` has returned."""
    durable: set[Key] = set()

    def kept(key: Key) -> None:
        durable.add(key)
        disk.mark(frozenset(durable))

    work.kept = kept


def _ends_the_same(disk: SimulatedDisk, world_size: int, every: int) -> int:
    """Start again from every so many crash states; how many states there are."""
    count = 0
    for tree, promised in _states(disk):
        count += 1
        if count % every:
            continue
        again = Work(durable=set(promised))
        ended = start(SimulatedDisk.of(tree), again, world_size)
        assert all(same(one, other) for one, other in zip(ended, whole(world_size), strict=True))
        assert not again.again
    return count


def _states(disk: SimulatedDisk) -> Iterator[tuple[Tree, frozenset[Key]]]:
    """Every distinct crash state of the run, with what was promised before it."""
    model, promise = DiskModel(), frozenset[Key]()
    seen: set[Any] = set()
    for number, op in enumerate(disk.log):
        model.apply(op)
        if op.kind == "mark":
            promise = op.note
        for tree in crash_states(model, seed=number):
            key = (hash(frozenset(tree.items())), promise)
            if key not in seen:
                seen.add(key)
                yield tree, promise


def test_the_harness_finds_a_loop_that_makes_again_what_was_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rollforward.replay.loop.Recording._find", lambda *_: None)
    disk, work = SimulatedDisk(), Work()
    until_it_ends(disk, work, 1, [120], None)
    assert work.again


def test_the_harness_finds_a_journal_that_is_not_synced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsync = SimulatedDisk.fsync

    def forgetful(self: SimulatedDisk, fd: int) -> None:
        if not self._open[fd][1].endswith(".journal"):
            fsync(self, fd)

    monkeypatch.setattr(SimulatedDisk, "fsync", forgetful)
    with pytest.raises(AssertionError):
        test_no_power_cut_loses_what_once_has_returned(1, 7)
