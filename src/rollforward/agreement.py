"""Each rank works, then all agree: the one way a failure on some ranks reaches the others.

`together` runs this rank's work and reports the result to the others, over an all-gather of small JSON
values. If it failed anywhere, every rank raises, and none waits for one that has given up:

    a rank with its own error             raises it unchanged
    the others, for a RollforwardError    raise the same class, with the rank before the message, and the hint
    the others, for anything else         raise RollforwardError
    if ranks failed differently           those without their own error raise RollforwardError

`tallied` does the same where only the first rank's result and some sums are needed by all: what it exchanges
has the same size for any number of ranks, unless one fails.

Left out: a process that exits (SystemExit, KeyboardInterrupt, a signal) reports nothing. The transport
of the all-gather must detect that.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rollforward import errors
from rollforward.channel import AllGather as AllGather
from rollforward.channel import Channel
from rollforward.errors import RollforwardError

T = TypeVar("T")

_SHOWN = 8
"""Maximum number of ranks named in a message; a thousand may have hit the same full disk."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a rank reports to the others about its error."""

    rank: int
    kind: type[RollforwardError]
    """The error's own class, or its nearest base class in `errors`."""
    message: str
    hint: str | None


Policy = Callable[[Sequence[Failure], Exception | None, int], Exception]
"""What a rank raises: from all failures, its own error if it has one, and the number of ranks."""


def together(
    work: Callable[[], T],
    all_gather: AllGather,
    *,
    tell: Callable[[T], Any] | None = None,
    policy: Policy | None = None,
) -> tuple[T, list[Any]]:
    """Do this rank's work; returns its result, and what each rank reports about its own. Collective.

    `tell` turns the result into what is reported to the others, which must be JSON-serializable; by
    default that is the result itself. Raises on every rank if any rank failed.
    """
    own: Exception | None = None
    result: Any = None
    message: dict[str, Any]
    try:
        result = work()
        message = {"value": result if tell is None else tell(result)}
        # A result that cannot be sent must not leave the others waiting for it.
        json.dumps(message, allow_nan=False)
    except Exception as error:
        own = error
        message = {"error": _as_json(error)}
    answers = all_gather(message)
    failures = [_failure(rank, told["error"]) for rank, told in enumerate(answers) if "error" in told]
    if failures:
        raised = (policy or _as_it_was)(failures, own, len(answers))
        if raised is own or own is None:
            raise raised
        raise raised from own
    return result, [told["value"] for told in answers]


def tallied(
    work: Callable[[], tuple[Any, Sequence[int]]],
    count: int,
    channel: Channel,
    *,
    policy: Policy | None = None,
) -> tuple[Any, list[int]]:
    """Do this rank's work; returns the first rank's value, and the sums of all ranks' numbers. Collective.

    `work` returns a value, which the others do not get unless this is the first rank, and `count` numbers, as
    for `Channel.tally`. Raises on every rank if any rank failed, as `together` does.
    """
    own: Exception | None = None
    value: Any = None
    numbers: Sequence[int] = [0] * count
    try:
        value, numbers = work()
        json.dumps(value, allow_nan=False)
    except Exception as error:
        own, value, numbers = error, None, [0] * count
    first, (failed, *sums) = channel.tally(value, [int(own is not None), *numbers])
    if failed:

        def fail() -> None:
            if own is not None:
                raise own

        together(fail, channel.all_gather, policy=policy)
    return first, sums


def kind_of(failures: Sequence[Failure]) -> type[RollforwardError]:
    """The common class of all failures; RollforwardError when they differ."""
    kinds = {failure.kind for failure in failures}
    return kinds.pop() if len(kinds) == 1 else RollforwardError


def in_words(failures: Sequence[Failure], world_size: int) -> str:
    """Every failure, with its rank if there are several ranks."""
    if world_size == 1:
        return failures[0].message
    told = [f"rank {failure.rank}: {failure.message}" for failure in failures[:_SHOWN]]
    more = [f"and {len(failures) - _SHOWN} more ranks"] if len(failures) > _SHOWN else []
    return "; ".join([*told, *more])


def _as_it_was(failures: Sequence[Failure], own: Exception | None, world_size: int) -> Exception:
    if own is not None:
        return own
    return kind_of(failures)(in_words(failures, world_size), hint=failures[0].hint)


def _as_json(error: Exception) -> dict[str, Any]:
    if isinstance(error, RollforwardError):
        known = (
            kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind
        )
        return {"kind": next(known), "message": error.message, "hint": error.hint}
    return {"kind": RollforwardError.__name__, "message": f"{type(error).__name__}: {error}", "hint": None}


def _failure(rank: int, told: dict[str, Any]) -> Failure:
    return Failure(rank=rank, kind=getattr(errors, told["kind"]), message=told["message"], hint=told["hint"])
