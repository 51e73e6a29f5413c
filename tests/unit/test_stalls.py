"""Who does not come to a collective is found out, and named."""

import threading
from pathlib import Path

import pytest

from rollforward.errors import CollectiveTimeout
from rollforward.position import Position
from rollforward.processes import heartbeat
from rollforward.processes.heartbeat import Heartbeat, Pulse
from rollforward.processes.stalls import CollectiveWatch, Patience, Seen, late_workers

AT = 1_700_000_000.0


def seen(meetings: int, phase: str = "update", silent_for: float = 0.0) -> Seen:
    pulse = Pulse(phase=phase, position="0_7", incarnation=1, pid=4711, time=AT, meetings=meetings)
    return Seen(pulse=pulse, silent_for=silent_for)


def test_a_worker_that_has_come_to_fewer_collectives_is_late() -> None:
    assert late_workers([seen(5), seen(4, "generate", silent_for=9)], rank=0, silent=15) == [
        "worker 1 (process 4711) is late, in phase generate of step 0_7 since 2023-11-14 22:13:20 UTC",
        "worker 0 waits in phase update of step 0_7",
    ]


def test_so_is_one_that_gives_no_sign_of_life_wherever_it_is() -> None:
    told = late_workers([seen(5), seen(5, silent_for=16)], rank=0, silent=15)
    assert told[0].endswith(" 22:13:20 UTC, without a sign of life for 16 s")


def test_a_worker_that_is_ahead_is_not() -> None:
    told = late_workers([seen(5), seen(6), seen(4)], rank=0, silent=15)
    assert [text.partition(" (")[0] for text in told[:-1]] == ["worker 2"]


def test_one_without_a_heartbeat_is_named_too() -> None:
    told = late_workers([None, None], rank=0, silent=15)
    assert told == ["worker 1 has written no heartbeat since this start"]


def test_when_none_is_late_the_collective_itself_hangs() -> None:
    told = late_workers([seen(5), seen(5)], rank=1, silent=15)
    assert told[0] == "all workers have arrived, and it does not finish"


def test_heartbeats_of_an_earlier_start_tell_nothing(tmp_path: Path) -> None:
    for rank, incarnation in ((0, 2), (1, 1)):
        heart = Heartbeat(tmp_path, rank=rank, incarnation=incarnation, start=Position(0, 0))
        if rank == 0:
            own = heart
        else:
            heart.close()
    error = time_out(own, tmp_path, incarnation=2)
    assert "worker 1 has written no heartbeat since this start" in str(error)
    own.close()


def test_before_the_folder_is_locked_nobody_can_be_named(tmp_path: Path) -> None:
    assert "it is not known who is late" in str(time_out(None, tmp_path, incarnation=1))


def time_out(heart: Heartbeat | None, run: Path, *, incarnation: int) -> CollectiveTimeout:
    """What is said after a short wait for a worker that does not come."""
    found: list[CollectiveTimeout] = []
    ended = threading.Event()

    def end(error: CollectiveTimeout) -> None:
        found.append(error)
        ended.set()

    watch = CollectiveWatch(0.2, end=end)
    if heart is not None:
        watch.follow(heart, run, rank=0, world_size=2, incarnation=incarnation)
    with watch.meeting():
        assert ended.wait(300)
    watch.close()
    return found[0]


def test_only_waiting_for_one_collective_counts() -> None:
    patience = Patience(10)
    assert not any(patience.over(meeting, 9) for meeting in (1, 0, 2, 2, 0, 0, 3, 4, 4, 5, 0, 0))
    assert [patience.over(6, 4) for _ in range(4)] == [False, False, False, True]


def test_a_watch_that_is_off_counts_and_ends_nothing(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, rank=0, incarnation=1, start=Position(0, 0))
    watch = CollectiveWatch(0, end=lambda error: pytest.fail(str(error)))
    watch.follow(heart, tmp_path, rank=0, world_size=2, incarnation=1)
    for _ in range(3):
        with watch.meeting():
            assert [thread.name for thread in threading.enumerate()].count("stalls") == 0
    heart.close()
    pulse = heartbeat.read(tmp_path, 0)
    assert pulse is not None
    assert pulse.meetings == 3


def test_what_the_framework_gave_up_is_told_of_by_the_same_heartbeats(tmp_path: Path) -> None:
    watch = CollectiveWatch(60, end=lambda error: pytest.fail(str(error)))
    assert watch.lost() is None, "the group had not begun"
    heart = Heartbeat(tmp_path, rank=0, incarnation=1, start=Position(0, 0))
    late = Heartbeat(tmp_path, rank=1, incarnation=1, start=Position(0, 7))
    watch.follow(heart, tmp_path, rank=0, world_size=2, incarnation=1)
    with watch.meeting():
        told = str(watch.lost())
    assert "lost contact with a worker and ended the group: worker 1 (process" in told
    assert "is late, in phase start of step 0_7" in told
    watch.close()
    heart.close()
    late.close()
