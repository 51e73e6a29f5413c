"""When checkpoints begin: as asked, or as often as a share of the time pays for."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lockstep import LockStep
from loop_run import Work, run_loop, same
from simulated_disk import SimulatedDisk

from rollforward.replay.cadence import Cadence, interval
from rollforward.replay.saving import INTERVAL
from rollforward.storage import LocalStorage
from rollforward.store.catalog import load_manifest, positions
from rollforward.store.saved import Spent

SECONDS = st.floats(1e-3, 1e3)


@given(cost=SECONDS, step=SECONDS, replayed=SECONDS, share=st.floats(0.001, 0.5), other=st.integers(1, 10**6))
def test_no_interval_is_better_for_the_failure_rate_that_the_share_stands_for(
    cost: float, step: float, replayed: float, share: float, other: int
) -> None:
    """Young's and Daly's argument, to within the one step by which the interval is rounded up."""
    k = interval(cost=cost, step=step, writing=0.0, share=share)
    between_failures = cost * replayed / (2 * share**2 * step)

    def expected(steps: int) -> float:
        return cost / (steps * step) + steps * replayed / (2 * between_failures)

    assert cost / (k * step) <= share * (1 + 1e-9)
    assert k == 1 or cost / ((k - 1) * step) >= share * (1 - 1e-9)
    one_step = replayed / (2 * between_failures)
    assert expected(k) <= (expected(other) + one_step) * (1 + 1e-9)


@given(cost=SECONDS, step=SECONDS, writing=SECONDS)
def test_no_save_is_due_before_the_disk_has_taken_the_last(cost: float, step: float, writing: float) -> None:
    k = interval(cost=cost, step=step, writing=writing, share=0.02)
    assert k * step >= writing * (1 - 1e-9)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Loop:
    """Steps of a second, with saves that cost what they are told to."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.cadence = Cadence(now=self.clock, **options)
        self.done = 0
        self.changes: list[int] = []

    def run(self, steps: int, spent: Spent) -> list[int]:
        """Steps after which a save began; each is committed before the next step."""
        begun = []
        for _ in range(steps):
            self.clock.now += 1.0
            self.done += 1
            if self.cadence.due(self.done, "auto"):
                self.cadence.begun(self.done)
                begun.append(self.done)
                if self.cadence.follow(self.cadence.advise(spent)):
                    self.changes.append(self.cadence.interval)
        return begun


def test_auto_begins_at_once_and_then_as_often_as_its_share_pays_for() -> None:
    loop = Loop(share=0.02)
    spent = Spent(blocked=0.05, processor=0.03, seconds=0.5)
    # Before two steps nothing is known of how long one takes.
    assert loop.run(17, spent) == [1, 2, 6, 10, 14]
    assert loop.changes == [4]
    assert "costs 0.08 s (training waits 0.05 s, the writer computes 0.03 s)" in loop.cadence.why
    assert "a step takes 1 s, and saving may cost 0.02 of the time" in loop.cadence.why


def test_auto_follows_what_it_measures_but_not_every_tremor() -> None:
    loop = Loop(share=0.02)
    loop.run(50, Spent(0.1, 0.1, 0.1))
    assert loop.cadence.interval == 10
    loop.run(100, Spent(0.12, 0.12, 0.1))
    assert loop.cadence.interval == 10
    loop.run(100, Spent(0.3, 0.3, 0.1))
    assert loop.cadence.interval == 30
    assert loop.changes == [10, 30]


def test_auto_waits_for_a_slow_disk_and_says_that_it_is_the_disk() -> None:
    loop = Loop()
    assert loop.run(40, Spent(blocked=0.0, processor=0.001, seconds=12.0)) == [1, 2, 14, 26, 38]
    assert "takes 12 s to write" in loop.cadence.why


def test_auto_saves_what_retention_keeps() -> None:
    begun = Loop(kept=7).run(30, Spent(0.1, 0.1, 0.1))
    assert {7, 14, 21, 28} <= set(begun)
    assert begun == [1, 2, 7, 14, 21, 28]


def test_one_odd_save_or_step_does_not_decide() -> None:
    loop = Loop(share=0.02)
    loop.run(30, Spent(0.1, 0.1, 0.1))
    loop.clock.now += 1000.0
    loop.run(1, Spent(0.1, 0.1, 0.1))
    loop.cadence.follow(loop.cadence.advise(Spent(90.0, 0.1, 90.0)))
    assert loop.cadence.interval == 10


@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_number_is_kept_to(every: int) -> None:
    cadence = Cadence()
    due = [done for done in range(1, 40) if cadence.due(done, every) and cadence.begun(done) is None]
    assert due == list(range(every, 40, every))


def test_what_was_put_off_is_due_until_it_begins() -> None:
    cadence = Cadence()
    due = []
    for done in range(1, 12):
        if cadence.due(done, 5):
            due.append(done)
            if done < 7:
                cadence.put_off()
            else:
                cadence.begun(done)
    assert due == [5, 6, 7, 10]


@pytest.mark.parametrize(
    ("kept", "every", "awaited"), [(0, 5, []), (10, 5, [10, 20]), (4, 6, [12]), (10, "auto", [10, 20])]
)
def test_only_what_retention_counts_on_is_waited_for(kept: int, every: Any, awaited: list[int]) -> None:
    cadence = Cadence(kept=kept)
    assert [done for done in range(1, 21) if cadence.must(done, every)] == awaited


def test_what_is_said_of_a_slow_disk_has_the_figures() -> None:
    clock = Clock()
    cadence = Cadence(now=clock)
    for done in range(1, 6):
        cadence.due(done, 5)
        clock.now += 0.5
    line = cadence.slow(10, 5, 31.24, 4_200_000_000)
    assert line.startswith(
        "checkpoints come less often than every 5 steps: after 10 steps the one before was not"
    )
    assert "31.2 s after it began (4.20 GB on this worker), and 5 steps take 2.5 s" in line
    assert math.isfinite(cadence.advise(Spent(0, 0, 0))["interval"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_of_ones_own_may_leave_it_to_be_measured(world_size: int) -> None:
    """The bytes are the same; what was chosen, and why, is in the checkpoints and in the log."""
    ends, said = [], []
    for every in (3, "auto"):
        disk, work = SimulatedDisk(), Work()

        def body(rank: int, exchange: Any, disk: Any = disk, work: Any = work, every: Any = every) -> Any:
            storage = LocalStorage("/run", disk)
            return run_loop(storage, work, rank=rank, world_size=world_size, exchange=exchange, every=every)

        ends.append(LockStep(world_size).run(body))
        said.append([line for line in work.said if line.startswith("checkpoints: every")])
        storage = LocalStorage("/run", disk)
        assert (INTERVAL in load_manifest(storage, positions(storage)[0]).state) == (every == "auto")
    assert all(same(one, other) for one, other in zip(*ends, strict=True))
    assert not said[0]
    assert said[1]
    assert "saving may cost 0.02 of the time" in said[1][0]
