"""What a trainer logged, step by step, and where two runs part.

A series is a file of JSON Lines, or the `log_history` of a `trainer_state.json`: rows with a step (`STEPS`)
and other fields. Of a step that was logged again after a resume the last rows count, since the run went on
from there. All fields are compared, numbers exactly, but for those about time or the machine
(`fields.kind_of`).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from rollforward.errors import StorageError
from rollforward.inputs import parse_json, read_input
from rollforward.proving.fields import Kind, kind_of
from rollforward.storage import LocalStorage, read_lines

TRAINER_STATE = "trainer_state.json"
"""Where transformers' trainers keep what they logged."""
STEPS = ("global_step", "step", "iteration", "iter", "update", "train/global_step", "_step")
"""Names of a row's step, the best first."""

_MOST_BYTES, _LONGEST_LINE = 1 << 32, 1 << 26

Step = tuple[int, ...]
"""`(step,)`; or `(epoch, step)` where each epoch counts its steps anew."""
Row = Mapping[str, Any]
"""Field -> value; nested names are joined by `/`."""


@dataclass(frozen=True)
class Series:
    """The rows of a file that have a step, in its order."""

    rows: tuple[Row, ...] = ()
    damaged: int = 0
    """Lines that are not JSON: a kill cut them off."""

    @cached_property
    def by_step(self) -> Mapping[Step, list[Row]]:
        """The rows of each step, in order."""
        found: dict[Step, list[Row]] = {}
        for row in self.rows:
            found.setdefault(self.step(row), []).append(row)
        return found

    def step(self, row: Row) -> Step:
        """The step of a row, as this file counts."""
        epoch, count = _epoch_and_count(row)
        return (epoch, count) if self._counts_anew and epoch is not None else (count,)

    @property
    def last(self) -> Step | None:
        """The step of the last row."""
        return self.step(self.rows[-1]) if self.rows else None

    @cached_property
    def _counts_anew(self) -> bool:
        """Whether the count falls back where an epoch begins. (After a resume the epoch does not rise.)"""
        places = [_epoch_and_count(row) for row in self.rows]
        return any(
            before[0] is not None and now[0] is not None and before[0] < now[0] and before[1] >= now[1]
            for before, now in pairwise(places)
        )


@dataclass(frozen=True)
class FieldDifference:
    """A field whose values differ."""

    name: str
    step: Step
    """The first step at which they do."""
    a: Any
    b: Any
    largest: float
    """The largest absolute difference over all steps; infinite for what is not a number."""


@dataclass(frozen=True, kw_only=True)
class SeriesCompared:
    """Where two runs' series part."""

    path: str
    steps: int = 0
    """How many steps were compared."""
    fields: tuple[str, ...] = ()
    """Which fields were compared."""
    left_out: tuple[str, ...] = ()
    """Which were not: they are about time or the machine."""
    differences: tuple[FieldDifference, ...] = ()
    """In the order of their first steps, and within a step causes before effects."""
    missing: tuple[Step, ...] = ()
    """Steps that only the first run logged."""
    extra: tuple[Step, ...] = ()
    """Steps that only the second run logged."""
    again: tuple[Step, ...] = ()
    """Steps that the second run logged more often than the first: they were done again."""
    damaged: int = 0
    """Lines of the second run that are not JSON."""


def read_series(path: Path) -> Series:
    """The rows of a file that have a step; empty when it is not a series, or cannot be read."""
    try:
        if path.name == TRAINER_STATE:
            found, damaged = parse_json(read_input(path, 1 << 30))["log_history"], 0
        else:
            storage = LocalStorage(path.parent)
            lines = read_lines(storage, path.name, limit=_MOST_BYTES, longest=_LONGEST_LINE)
            parsed = [_parsed(line) for line in lines if line.strip()]
            found = [row for row in parsed if row is not None]
            damaged = len(parsed) - len(found)
        rows = [_flat("", row) for row in found if isinstance(row, dict)]
    except (OSError, ValueError, TypeError, KeyError, StorageError):
        return Series()
    return Series(tuple(row for row in rows if _count_name(row)), damaged)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _flat(path: str, row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        here = f"{path}/{name}" if path else name
        found |= _flat(here, value) if isinstance(value, dict) else {here: value}
    return found


def _count_name(row: Row) -> str | None:
    """The field that says which step a row is about."""
    return next((name for name in STEPS if type(row.get(name)) is int), None)


def _epoch_and_count(row: Row) -> tuple[int | None, int]:
    name, epoch = _count_name(row), row.get("epoch")
    assert name is not None
    return (epoch if name == "step" and type(epoch) is int else None), row[name]


def _last(a: Sequence[Row], b: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    both = min(len(a), len(b))
    return zip(a[-both:], b[-both:], strict=True)


def compare_series(path: str, a: Series, b: Series, allowed: Mapping[str, float]) -> SeriesCompared:
    """Compare two runs; differences of a field up to `allowed` are not counted."""
    one, other = a.by_step, b.by_step
    both = [step for step in one if step in other]
    pairs = [
        (step, row_a, row_b)
        for step in both
        # The last ones: what was logged before a kill may have been done again.
        for row_a, row_b in _last(one[step], other[step])
    ]
    names = list(dict.fromkeys(name for _, row_a, row_b in pairs for name in (*row_a, *row_b)))
    fields = [name for name in names if name not in STEPS and kind_of(name) is not None]
    found = (_compare_field(name, pairs, allowed.get(name, 0.0)) for name in fields)
    order, kinds = {step: index for index, step in enumerate(both)}, list(Kind)
    differences = sorted(
        (item for item in found if item is not None),
        key=lambda item: (order[item.step], kinds.index(kind_of(item.name) or Kind.COUNTER)),
    )
    return SeriesCompared(
        path=path,
        steps=len(both),
        fields=tuple(fields),
        left_out=tuple(name for name in names if kind_of(name) is None),
        differences=tuple(differences),
        missing=tuple(step for step in one if step not in other),
        extra=tuple(step for step in other if step not in one),
        again=tuple(step for step in both if len(other[step]) > len(one[step])),
        damaged=b.damaged,
    )


def _compare_field(
    name: str, pairs: Iterable[tuple[Step, Row, Row]], allowed: float
) -> FieldDifference | None:
    first: tuple[Step, Any, Any] | None = None
    largest = 0.0
    for step, row_a, row_b in pairs:
        distance = _distance(row_a.get(name), row_b.get(name))
        if distance > allowed and first is None:
            first = (step, row_a.get(name), row_b.get(name))
        largest = max(largest, distance)
    return None if first is None else FieldDifference(name, *first, largest)


def _distance(a: Any, b: Any) -> float:
    """0 when they are the same; infinite when they are not both numbers."""
    if not (_is_number(a) and _is_number(b)):
        return 0.0 if a == b else math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    distance = abs(a - b)
    return math.inf if math.isnan(distance) else float(distance)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def first_new_row(before: Series, after: Series) -> Row | None:
    """The row that a start logged first, given the series before it and after it.

    The first one that was not there before: the file was continued, or cut back and continued.
    """
    same = (one == other for one, other in zip(before.rows, after.rows, strict=False))
    kept = next((index for index, is_same in enumerate(same) if not is_same), len(before.rows))
    return after.rows[kept] if kept < len(after.rows) else None


def told(step: Step) -> str:
    """`step 7`, or `step 3 of epoch 1`."""
    return f"step {step[0]}" if len(step) == 1 else f"step {step[1]} of epoch {step[0]}"


def told_steps(steps: Sequence[Step]) -> str:
    """`steps 5 to 7 and 13`; what follows the fifth range is counted only."""
    ranges: list[list[Step]] = []
    for step in steps:
        if ranges and ranges[-1][-1] == (*step[:-1], step[-1] - 1):
            ranges[-1].append(step)
        else:
            ranges.append([step])
    if len(ranges) == 1 and len(ranges[0]) == 1:
        return told(steps[0])
    words = [_told_range(one) for one in ranges[:5]]
    rest = sum(len(one) for one in ranges[5:])
    words += [f"{rest} more"] if rest else []
    return "steps " + (", ".join(words[:-1]) + " and " if len(words) > 1 else "") + words[-1]


def _told_range(steps: Sequence[Step]) -> str:
    first, last = steps[0], steps[-1]
    of = f" of epoch {first[0]}" if len(first) == 2 else ""
    return (f"{first[-1]} to {last[-1]}" if len(steps) > 1 else str(first[-1])) + of
