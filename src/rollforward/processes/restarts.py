"""Whether a failed run is restarted, when, and on how many workers. Pure: failures in, a decision out.

    the user's input, or the numbers, are wrong     give up: it would happen again
    the same step failed three times in a row       give up, and show all three
    all restarts are used up                        give up
    anything else                                   again, at once, then after 1, 2, 4, ... seconds, at most
                                                    LONGEST_WAIT

A failure at a later step than any before it is progress, and the waits start over. Replay is
bit-exact, so a run that fails at the same step after a restart has come only as far as before, and a
restart that dies earlier has made no progress.

Where fewer workers are allowed, a worker that fails twice running, of the usual number of them, counts as
one that cannot be started: a machine or device is gone. The run then goes on with the next smaller number,
and the next restart tries the usual number again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollforward.position import Position

SAME_STEP = 3
"""Consecutive failures of one step after which there is no point in continuing."""
LONGEST_WAIT = 60.0
"""Seconds."""
INPUT_ERROR = 2
"""The exit code of errors that only the user can fix."""
FINAL = frozenset({"RunLocked", "ReplayDiverged", "NonFinite", "DeviceUnavailable"})
"""Errors that a restart would repeat: another trainer is running; the numbers, or devices, stay the same."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one start of the run ended."""

    code: int
    """The exit code."""
    kind: str | None
    """The class of the worker's error; None when it could not report it, as when it was killed."""
    error: str
    """The message, for the user."""
    position: Position | None
    """The step that it was at; None before its first step."""
    workers: int = 1
    """How many there were."""
    slots: frozenset[int] = frozenset()
    """The ranks of those that failed first."""


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Start again."""

    number: int
    """Which restart this is, from 1."""
    seconds: float
    """How long to wait first."""
    workers: int = 1
    """On how many."""


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Do not start again."""

    reason: str
    failures: tuple[Failure, ...]
    """Those that explain why."""


def decide(
    failures: Sequence[Failure], *, max_restarts: int, workers: Sequence[int] = (1,)
) -> Restart | GiveUp:
    """What to do after the last of `failures`, which are all the run's failures so far, in order.

    `workers`: the numbers of workers that it may have, the usual one first, then fewer and fewer.
    """
    last, same = failures[-1], failures[-SAME_STEP:]
    # One device of several may be gone, and the others still be there.
    final = FINAL if len(workers) == 1 else FINAL - {"DeviceUnavailable"}
    if last.code == INPUT_ERROR or last.kind in final:
        return GiveUp(reason="a restart would not fix it", failures=(last,))
    if len(same) == SAME_STEP and all(failure.position == last.position for failure in same):
        where = "the way to its first step" if last.position is None else f"step {last.position}"
        return GiveUp(reason=f"{where} failed {SAME_STEP} times running", failures=tuple(same))
    if len(failures) > max_restarts:
        return GiveUp(reason=f"all restarts that were allowed ({max_restarts}) are used up", failures=(last,))
    again = _without_progress(failures) - 1
    wait = min(2.0 ** (again - 1), LONGEST_WAIT) if again else 0.0
    return Restart(number=len(failures), seconds=wait, workers=_how_many(failures, workers))


def _how_many(failures: Sequence[Failure], workers: Sequence[int]) -> int:
    """The usual number; where one of its workers failed twice running, the largest of which none did."""
    if failures[-1].workers != workers[0]:
        return workers[0]
    return next((number for number in workers if not fails_again(failures, number)), workers[-1])


def fails_again(failures: Sequence[Failure], workers: int) -> frozenset[int]:
    """The workers that failed in both of the last two starts with this number of them."""
    last = [failure.slots for failure in failures if failure.workers == workers][-2:]
    return last[0] & last[1] if len(last) == 2 else frozenset()


def _without_progress(failures: Sequence[Failure]) -> int:
    """How many failures there were since the run last got further than before, that one included."""
    count = 0
    furthest: Position | None = None
    for failure in failures:
        further = failure.position is not None and (furthest is None or failure.position > furthest)
        count = 1 if further else count + 1
        furthest = failure.position if further else furthest
    return count
