"""When a failed run is started again."""

from dataclasses import replace

import pytest

from rollforward.position import Position
from rollforward.processes.restarts import FINAL, LONGEST_WAIT, Failure, GiveUp, Restart, decide


def killed(at: str | None) -> Failure:
    position = None if at is None else Position.parse(at)
    return Failure(code=1, kind=None, error=f"killed at {at}", position=position)


def failed(kind: str, code: int = 1) -> Failure:
    return Failure(code=code, kind=kind, error=f"{kind}!", position=Position(0, 1))


def waits(*places: str | None) -> list[float]:
    failures = [killed(place) for place in places]
    found = []
    for count in range(1, len(failures) + 1):
        decision = decide(failures[:count], max_restarts=100)
        assert isinstance(decision, Restart), decision
        assert decision.number == count
        found.append(decision.seconds)
    return found


def test_waits_grow_while_the_run_gets_no_further() -> None:
    assert waits("0_3", "0_2", "0_3", "0_1", "0_2") == [0, 1, 2, 4, 8]
    assert waits(None, None, "0_0", None, "0_0", None) == [0, 1, 0, 1, 2, 4]


def test_they_are_bounded() -> None:
    assert waits("0_9", *(["0_1", "0_2"] * 6))[-3:] == [LONGEST_WAIT] * 3


def test_progress_begins_the_waiting_anew() -> None:
    assert waits("0_3", "0_2", "0_4", "0_4", "1_0") == [0, 1, 0, 1, 0]


def test_the_same_step_three_times_running_is_enough() -> None:
    failures = [killed("0_2"), killed("0_7"), killed("0_7"), failed("EngineError"), killed("0_7")]
    assert isinstance(decide(failures, max_restarts=100), Restart)
    decision = decide([killed("0_2"), *[killed("0_7")] * 3], max_restarts=100)
    assert isinstance(decision, GiveUp)
    assert "step 0_7 failed 3 times running" in decision.reason
    assert [failure.error for failure in decision.failures] == ["killed at 0_7"] * 3


def test_so_is_never_reaching_the_first_step() -> None:
    decision = decide([killed(None)] * 3, max_restarts=100)
    assert isinstance(decision, GiveUp)
    assert "the way to its first step failed 3 times running" in decision.reason


@pytest.mark.parametrize("kind", sorted(FINAL))
def test_what_would_come_again_is_not_tried_again(kind: str) -> None:
    decision = decide([killed("0_0"), failed(kind)], max_restarts=100)
    assert isinstance(decision, GiveUp)
    assert decision.failures == (failed(kind),)


@pytest.mark.parametrize("kind", ["ConfigError", "NothingToResume", "anything"])
def test_neither_is_what_the_user_has_to_mend(kind: str) -> None:
    assert isinstance(decide([failed(kind, code=2)], max_restarts=100), GiveUp)


@pytest.mark.parametrize("kind", ["EngineError", "StorageError", "VerifierError", "Stopped", "MemoryError"])
def test_other_errors_are(kind: str) -> None:
    assert decide([failed(kind)], max_restarts=1) == Restart(number=1, seconds=0.0)


def test_restarts_are_counted() -> None:
    failures = [killed("0_1"), killed("0_2"), killed("0_3")]
    assert isinstance(decide(failures[:2], max_restarts=2), Restart)
    decision = decide(failures, max_restarts=2)
    assert isinstance(decision, GiveUp)
    assert "(2) are used up" in decision.reason


def numbers(*failed: tuple[int, str | None, list[int]], workers: tuple[int, ...] = (4, 2, 1)) -> list[int]:
    """How many workers each restart has; `failed`: how many there were, the step, which failed."""
    failures = [replace(killed(at), workers=count, slots=frozenset(slots)) for count, at, slots in failed]
    found = []
    for count in range(1, len(failures) + 1):
        decision = decide(failures[:count], max_restarts=100, workers=workers)
        assert isinstance(decision, Restart), decision
        found.append(decision.workers)
    return found


def test_a_worker_that_fails_twice_running_makes_them_fewer_once() -> None:
    assert numbers((4, "0_1", [3]), (4, None, [3]), (2, "0_5", [0]), (4, None, [3])) == [4, 2, 4, 2]


def test_workers_that_take_turns_failing_stay_as_many() -> None:
    assert numbers((4, "0_1", [3]), (4, "0_2", [0]), (4, "0_3", [3]), (4, "0_4", [1, 2])) == [4] * 4


def test_one_of_several_that_fail_together_is_enough() -> None:
    assert numbers((4, "0_1", [0, 3]), (4, "0_2", [3])) == [4, 2]


def test_the_smaller_number_may_fail_too() -> None:
    again = (4, None, [3])
    failures = [(4, "0_1", [3]), again, (2, "0_2", [1]), again, (2, "0_3", [1]), again]
    assert numbers(*failures) == [4, 2, 4, 2, 4, 1]
    assert numbers(*failures, workers=(4, 2)) == [4, 2, 4, 2, 4, 2], "as few as are allowed"


def test_without_leave_they_stay_as_many() -> None:
    assert numbers((4, "0_1", [3]), (4, "0_2", [3]), (4, "0_3", [3]), workers=(4,)) == [4] * 3


def test_a_device_that_is_gone_is_final_only_where_no_fewer_workers_are_allowed() -> None:
    gone = Failure(code=1, kind="DeviceUnavailable", error="", position=None, workers=4, slots=frozenset({2}))
    assert isinstance(decide([gone], max_restarts=5, workers=(4,)), GiveUp)
    decision = decide([gone, gone], max_restarts=5, workers=(4, 2))
    assert isinstance(decision, Restart)
    assert decision.workers == 2
