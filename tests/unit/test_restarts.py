"""When a failed run is started again."""

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
    assert waits("0_3", "0_2", "0_3", "0_1", "0_2") == [1, 2, 4, 8, 16]
    assert waits(None, None, "0_0", None, "0_0", None) == [1, 2, 1, 2, 4, 8]


def test_they_are_bounded() -> None:
    assert waits("0_9", *(["0_1", "0_2"] * 5))[-3:] == [LONGEST_WAIT] * 3


def test_progress_begins_the_waiting_anew() -> None:
    assert waits("0_3", "0_2", "0_4", "0_4", "1_0") == [1, 2, 1, 2, 1]


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
    assert decide([failed(kind)], max_restarts=1) == Restart(number=1, seconds=1.0)


def test_restarts_are_counted() -> None:
    failures = [killed("0_1"), killed("0_2"), killed("0_3")]
    assert isinstance(decide(failures[:2], max_restarts=2), Restart)
    decision = decide(failures, max_restarts=2)
    assert isinstance(decision, GiveUp)
    assert "(2) are used up" in decision.reason
