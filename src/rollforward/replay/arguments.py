"""Checks what the caller of the library passes in: every misuse raises a clear InputError."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from rollforward.errors import InputError
from rollforward.position import Position
from rollforward.replay.facts import changes
from rollforward.store import layouts, strictjson
from rollforward.store.layout import check_roles
from rollforward.tensors import Held, TensorSpec, arrays_of, layout_of

Step = int | tuple[int, int]
"""A step's number, or its epoch and its number in the epoch."""

_SHOWN = 8
_LIMIT = 10**18
"""File names hold 18 digits."""


def misuse(message: str) -> NoReturn:
    """Raise InputError for a call that makes no sense."""
    raise InputError(message, hint="the docstring of rollforward.library has the order of the calls")


def other_loop(message: str) -> NoReturn:
    """Raise InputError for a loop that differs from the recorded one."""
    raise InputError(
        f"{message}: this is not the loop that recorded the run",
        hint="continue with that loop; or change a fact, and nothing recorded with the old ones is replayed",
    )


def as_position(step: Step) -> Position:
    """The position of a step; the epoch is 0 when the step is only a number."""
    match step:
        case int() | np.integer():
            position = Position(0, int(step))
        case (int() | np.integer() as epoch, int() | np.integer() as number):
            position = Position(int(epoch), int(number))
        case _:
            misuse(f"{step!r} is not a step: a number, or a pair (epoch, step)")
    if min(position) < 0 or max(position) >= _LIMIT:
        misuse(f"step {position} is negative, or has more than 18 digits")
    return position


def as_number(name: str, value: Any) -> float:
    """An outcome as float64."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        misuse(f"outcome {name} is {value!r}, not a number")
    if isinstance(value, int) and number != value:
        misuse(f"outcome {name} is {value}, which float64 cannot hold")
    return number


def as_json(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it would come back from a file."""
    try:
        parsed: dict[str, Any] = strictjson.parse(strictjson.dump(dict(value)).encode())
    except ValueError as error:
        raise InputError(
            f"{what}: {error}", hint="strings, finite numbers, lists and mappings can be kept"
        ) from None
    return parsed


def check_tensors(held: Held, *, writeable: bool) -> None:
    """Raise InputError unless these are arrays that a checkpoint can store and be read into."""
    try:
        check_roles(held)
    except ValueError as error:
        misuse(str(error))
    for role, named in arrays_of(held).items():
        for name, array in named.items():
            if not isinstance(array, np.ndarray):
                misuse(f"{role} {name} is of {type(array).__name__}, not a NumPy array")
            if writeable and not array.flags.writeable:
                misuse(f"{role} {name} is read-only; a checkpoint has to be read into it")
    try:
        layouts.check(layout_of(held))
    except ValueError as error:
        misuse(str(error))


def check_same_layout(now: Held, before: Held) -> None:
    """Raise InputError unless roles, names, dtypes and shapes are those that were restored."""
    given, was = _layout(now), _layout(before)
    differing = [
        f"{name} is {given.get(name, 'missing')} and was {was.get(name, 'missing')}"
        for name in sorted(given.keys() | was.keys())
        if given.get(name) != was.get(name)
    ]
    if differing:
        misuse("not the tensors of restore: " + "; ".join(differing[:_SHOWN]))


def check_alike(answers: Sequence[Any], world_size: int) -> None:
    """Raise InputError unless all processes opened the same run alike: (rank, world size, facts, ...)."""
    told = [(rank, size) for rank, size, *_ in answers]
    if told != [(rank, world_size) for rank in range(world_size)]:
        misuse(f"the processes call themselves (rank, world_size) {told}, in the order of all_gather")
    first = answers[0][2]
    for rank, (_, _, facts, *_) in enumerate(answers):
        if facts != first:
            misuse(f"rank {rank} has other facts: {'; '.join(changes(first, facts))}")


def _layout(held: Held) -> dict[str, str]:
    return {
        f"{role} {name}": f"{spec.dtype} {list(spec.shape)}" + _place(spec)
        for role, named in layout_of(held).items()
        for name, spec in named.items()
    }


def _place(spec: TensorSpec) -> str:
    return f" at {list(spec.offset)} of {spec.piece_of} {list(spec.global_shape)}" if spec.piece_of else ""
