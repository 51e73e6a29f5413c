"""What happens once for workers that hold a model together, and what each of them must have in common."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest

from rollforward.errors import VerifierError
from rollforward.grpo.types import Prompt
from rollforward.position import Position
from rollforward.replay.rollout_log import TeamRollouts
from rollforward.run.team import scored_once

PROMPT = Prompt(index=0, text="1+1=", token_ids=(2,), answer="2")


class Teammate:
    """One of two threads that meet."""

    world_size = 2

    def __init__(self, rank: int, told: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self._told = told
        self._barrier = barrier

    def all_gather(self, value: Any) -> list[Any]:
        self._told[self.rank] = value
        self._barrier.wait(300)
        found = list(self._told)
        self._barrier.wait(300)
        return found

    def sharing(self) -> AbstractContextManager[None]:
        return nullcontext()


def both(work: Callable[[Teammate], Any]) -> list[Any]:
    """What each of two teammates comes to; an exception is a result too."""
    told, barrier = [None, None], threading.Barrier(2)

    def one(rank: int) -> Any:
        try:
            return work(Teammate(rank, told, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_a_verifier_is_asked_once_and_its_rewards_are_those_of_all() -> None:
    asked: list[int] = []

    def work(team: Teammate) -> Any:
        def score(*_: Any) -> Any:
            asked.append(team.rank)
            return np.array([[0.1, np.nan], [np.inf, -0.0], [1e-40, 3.0]], np.float32)

        return scored_once(score, team)([PROMPT] * 3, ["a", "b", "c"])

    first, second = both(work)
    assert asked == [0]
    assert first.tobytes() == second.tobytes()
    assert first.shape == (3, 2)
    assert first.dtype == np.float32


def test_a_verifier_that_fails_fails_for_all() -> None:
    def score(*_: Any) -> Any:
        raise VerifierError("it broke", hint="fix it")

    for found in both(lambda team: scored_once(score, team)([PROMPT], ["a"])):
        assert isinstance(found, VerifierError)
        assert "it broke" in found.message


class Log:
    """Remembers what is done to it; of some chunks it finds something."""

    def __init__(self, has: set[int]) -> None:
        self.has = has
        self.done: list[Any] = []

    def find(self, _: Position, chunk: int) -> Any:
        return f"chunk {chunk}" if chunk in self.has else None

    def append(self, _: Position, chunk: int, __: Any) -> None:
        self.done.append(chunk)

    def record(self, _: Position, iteration: int, *__: Any) -> None:
        self.done.append(("outcome", iteration))


@pytest.mark.parametrize(("second", "found"), [({0, 1}, ["chunk 0", "chunk 1"]), ({0}, ["chunk 0", None])])
def test_a_chunk_that_one_cannot_read_is_made_again_by_all(second: set[int], found: list[Any]) -> None:
    def work(team: Teammate) -> Any:
        log: Any = Log({0, 1} if team.rank == 0 else second)
        return [TeamRollouts(log, team).find(Position(0, 0), chunk) for chunk in (0, 1)]

    assert both(work) == [found, found]


def test_the_first_keeps_the_chunks_and_all_record_outcomes() -> None:
    def work(team: Teammate) -> Any:
        log: Any = Log(set())
        rollouts: Any = "rollouts"
        team_log = TeamRollouts(log, team)
        team_log.append(Position(0, 0), 3, rollouts)
        team_log.record(Position(0, 0), 0, rollouts, 0.1)
        return log.done

    assert both(work) == [[3, ("outcome", 0)], [("outcome", 0)]]
