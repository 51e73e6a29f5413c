"""Several ranks in one process, one running at a time: deterministic, so a run can be replayed.

Each rank is a thread. A rank runs until it exchanges or ends; then the next one goes on.
"""

import threading
from collections.abc import Callable
from typing import Any

Exchange = Callable[[Any], list[Any]]


class LockStep:
    """`run` calls `work(rank, exchange)` for every rank and returns the results, or the exceptions."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._turn = 0
        self._changed = threading.Condition()
        self._posted: dict[int, list[Any]] = {}
        self._rounds = [0] * world_size
        self._ended: set[int] = set()

    def run(self, work: Callable[[int, Exchange], Any]) -> list[Any]:
        results: list[Any] = [None] * self._world_size

        def body(rank: int) -> None:
            self._wait_for_turn(rank)
            try:
                results[rank] = work(rank, lambda value: self._exchange(rank, value))
            except BaseException as error:
                results[rank] = error
            with self._changed:
                self._ended.add(rank)
                self._pass_on(rank)

        threads = [
            threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self._world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a rank hangs in an exchange"
        return results

    def _exchange(self, rank: int, value: Any) -> list[Any]:
        number = self._rounds[rank]
        self._rounds[rank] += 1
        with self._changed:
            values = self._posted.setdefault(number, [None] * self._world_size)
            values[rank] = (value,)
            self._pass_on(rank)
        self._wait_for_turn(rank)
        assert all(found is not None for found in values), "another rank ended before this exchange"
        return [found[0] for found in values]

    def _wait_for_turn(self, rank: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn == rank, 60)

    def _pass_on(self, rank: int) -> None:
        for step in range(1, self._world_size + 1):
            following = (rank + step) % self._world_size
            if following not in self._ended:
                self._turn = following
                break
        self._changed.notify_all()
