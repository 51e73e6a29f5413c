"""Killed anywhere, any number of times, a run ends with the same bytes and does nothing finished twice."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lockstep import LockStep
from simulated_disk import Killed, SimulatedDisk
from toy_run import CHUNKS, END, STEPS_PER_EPOCH, State, Work, run_rank, same

from rollforward.position import Position
from rollforward.storage import LocalStorage

ROOT = "/run"


def start(disk: SimulatedDisk, work: Work, world_size: int, **changes: Any) -> list[State]:
    """One start on every rank; Killed when the process was."""

    def body(rank: int, exchange: Callable[[Any], list[Any]]) -> State:
        return run_rank(LocalStorage(ROOT, disk), rank, world_size, exchange, work, **dict(changes))

    results = LockStep(world_size).run(body)
    if any(isinstance(result, Killed) for result in results):
        raise Killed
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def run_killed(seed: int, kills: int, world_size: int, **changes: Any) -> tuple[list[State], Work, int]:
    """A run that is killed so many times, between or in the middle of any two operations on the disk."""
    disk, work, rng = SimulatedDisk(), Work(), random.Random(seed)
    done = 0
    while True:
        disk.kill_after = len(disk.log) + rng.randint(1, 90) if done < kills else None
        disk.short_write = rng.choice([None, 300, 1000])
        try:
            return start(disk, work, world_size, **changes), work, done
        except Killed:
            done += 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2, "ref_model_sync_steps": 3, "save_ckpt_interval": 5}],
    ids=["plain", "two iterations, reference synchronised"],
)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    world_size: int, changes: dict[str, Any]
) -> None:
    whole = start(SimulatedDisk(), Work(), world_size, **changes)
    killed, work, kills = run_killed(world_size, 25, world_size, **changes)
    assert kills >= 10
    assert all(same(one, other) for one, other in zip(whole, killed, strict=True))
    assert any(report.replayed_steps for report in work.reports)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_five_hundred_kills(world_size: int) -> None:
    changes = {"end": Position(100, 0), "ref_model_sync_steps": 7}
    whole = start(SimulatedDisk(), Work(), world_size, **changes)
    killed, work, kills = run_killed(world_size, 500, world_size, **changes)
    print(f"{kills} kills, {sum(report.replayed_steps for report in work.reports)} steps replayed")
    assert kills == 500
    assert all(same(one, other) for one, other in zip(whole, killed, strict=True))


def test_no_finished_chunk_is_generated_again() -> None:
    """A chunk may be generated twice only where the kill came before its append returned."""
    _, work, kills = run_killed(7, 25, 1)
    steps = END.epoch * STEPS_PER_EPOCH
    assert sum(work.generated.values()) <= steps * CHUNKS + kills
    assert set(work.generated) == {(0, Position(*divmod(number, STEPS_PER_EPOCH))) for number in range(steps)}


def test_replay_generates_nothing_and_goes_on_where_the_journal_ends() -> None:
    disk, work = SimulatedDisk(), Work()
    disk.kill_after = 210
    with pytest.raises(Killed):
        start(disk, work, 1)
    disk.kill_after = None
    before = work.generated.copy()
    start(disk, work, 1)
    report = work.reports[-1]
    assert report.replayed_steps >= 2
    assert not work.notices
    assert {key: work.generated[key] for key in before if key[1] < report.until} == {
        key: count for key, count in before.items() if key[1] < report.until
    }


def test_a_checkpoint_lost_to_damage_costs_replay_and_no_rollout() -> None:
    """The newest checkpoint is damaged: the older one and the journal give back every step."""
    disk, work = SimulatedDisk(), Work()
    whole = start(SimulatedDisk(), Work(), 1)
    start(disk, work, 1, end=Position(1, 3))
    path = f"{ROOT}/commits/1_3.json"
    content = bytearray(disk.tree()[path] or b"")
    content[100] ^= 1
    disk.unlink(path)
    fd = disk.create(path)
    disk.write(fd, memoryview(content))
    disk.close(fd)
    before = work.generated.copy()
    ended = start(disk, work, 1)
    assert work.reports[-1].start == Position(1, 2)
    assert work.reports[-1].until == Position(1, 3)
    assert {key: work.generated[key] for key in before} == before
    assert same(ended[0], whole[0])
    assert np.isfinite(ended[0]["policy_model"]["head.bias"]).all()
