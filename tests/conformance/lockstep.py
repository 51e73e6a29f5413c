"""Several ranks in one process, one running at a time: deterministic, so a run can be replayed.

Each rank is a thread. The turn passes when a rank exchanges or ends, and wherever `switch` is
called: a disk that calls it before each operation interleaves what the ranks write.
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
        self._rounds: list[list[Any]] = [[] for _ in range(world_size)]
        self._ended: set[int] = set()
        self._own = threading.local()

    def run(self, work: Callable[[int, Exchange], Any]) -> list[Any]:
        results: list[Any] = [None] * self._world_size

        def body(rank: int) -> None:
            self._own.rank = rank
            self._wait_for_turn(rank)
            try:
                results[rank] = work(rank, lambda value: self._exchange(rank, value))
            except BaseException as error:
                results[rank] = error
            self._ended.add(rank)
            self._pass_on(rank)

        threads = [
            threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self._world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive(), "a rank hangs in an exchange"
        return results

    def switch(self) -> None:
        """Let another rank go on; nothing happens on a thread that is not a rank."""
        rank = getattr(self._own, "rank", None)
        if rank is not None:
            self._pass_on(rank)
            self._wait_for_turn(rank)

    def _exchange(self, rank: int, value: Any) -> list[Any]:
        self._rounds[rank].append(value)
        number = len(self._rounds[rank]) - 1
        while missing := [other for other in range(self._world_size) if len(self._rounds[other]) <= number]:
            assert not self._ended & set(missing), "another rank ended before this exchange"
            self.switch()
        return [self._rounds[other][number] for other in range(self._world_size)]

    def _wait_for_turn(self, rank: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn == rank, 600)

    def _pass_on(self, rank: int) -> None:
        with self._changed:
            for step in range(1, self._world_size + 1):
                following = (rank + step) % self._world_size
                if following not in self._ended:
                    self._turn = following
                    break
            self._changed.notify_all()
