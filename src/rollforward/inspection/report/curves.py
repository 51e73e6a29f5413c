"""The charts of a run, from `metrics.jsonl`; of a loop that writes none, from the outcomes in its journal.

Figures of the trainer and of TRL have different names for the same things; `CHARTS` says which belong on one
chart. A figure that it does not know gets a chart of its own, behind the others.

Charts are JSON: `step` and `time` (seconds since the run's first step) of each point, and the values of each
series. A run of many steps is thinned so that the extremes of every series stay (`thinning`), and has beside
them the means of the stretches, from which a smoothed curve is drawn: of extremes alone it would be wrong.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from rollforward.errors import CheckpointInvalid
from rollforward.inspection.report.thinning import Floats, extremes, means, stretches
from rollforward.position import Position
from rollforward.replay import metrics
from rollforward.replay.metrics import PLACE, Record, place_of
from rollforward.storage import Storage
from rollforward.store.journal.reading import journal_ranks, read_journal
from rollforward.store.journal.segments import Records

STRETCHES = 600
"""A curve of more than three times as many steps is thinned to about two points for each stretch."""
_MOST_NAMES = 300
_DIGITS = 7


def seconds_of(time: str) -> float | None:
    """Seconds since 1970 of a UTC time as it is written in a run's folder; None when it is none."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return None


class Chart(NamedTuple):
    """Which figures are on one chart: the first name that a run has."""

    name: str
    figures: tuple[str, ...]
    spread: str = ""
    """The figure that is drawn as a band around the first."""


CHARTS = (
    Chart("reward", ("reward",), spread="reward_std"),
    Chart("verifiers", ("reward/", "rewards/")),
    Chart("kl", ("kl",)),
    Chart("loss", ("loss",)),
    Chart("grad_norm", ("grad_norm",)),
    Chart("clip_fraction", ("clip_fraction", "clip_ratio/region_mean")),
    Chart("completion_length", ("completion_length", "completions/mean_length")),
    Chart("stopped_fraction", ("stopped_fraction",)),
    Chart("tokens_per_second", ("tokens_per_second",)),
)
_CUT = "completions/clipped_ratio"
"""TRL's name for the share of completions that did not stop by themselves."""


@dataclass
class Figures:
    """All figures of a run as columns, a row a step, in the order of steps."""

    epoch: "array[int]" = field(default_factory=lambda: array("q"))
    step: "array[int]" = field(default_factory=lambda: array("q"))
    global_step: "array[int]" = field(default_factory=lambda: array("q"))
    incarnation: "array[int]" = field(default_factory=lambda: array("q"))
    time: "array[float]" = field(default_factory=lambda: array("d"))
    """Seconds since 1970, when the step was finished."""
    columns: "dict[str, array[float]]" = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    """Names beyond those that fit a page."""

    def __len__(self) -> int:
        return len(self.time)

    def position(self, row: int) -> Position:
        """The step that a row is about."""
        return Position(self.epoch[row], self.step[row])


def read_figures(storage: Storage) -> Figures:
    """The figures of a run; no record is held in memory as it stands in the file."""
    found = _in_columns(metrics.each(storage))
    return found if len(found) else _in_columns(_outcomes(storage))


def _in_columns(records: Iterable[Record]) -> Figures:
    read, rows = Figures(), dict[Position, int]()
    for record in records:
        # Of two records of one step the later counts.
        row = rows.setdefault(place_of(record), len(rows))
        for name in PLACE:
            _put(getattr(read, name), row, record[name])
        for name, value in record.items():
            if name in PLACE:
                continue
            if name not in read.columns and len(read.columns) >= _MOST_NAMES:
                read.left_out.add(name[:80])
                continue
            column = read.columns.setdefault(name, array("d"))
            column.extend([math.nan] * (row - len(column)))
            _put(column, row, value)
    for column in read.columns.values():
        column.extend([math.nan] * (len(rows) - len(column)))
    order = [rows[position] for position in sorted(rows)]
    if order == list(range(len(order))):
        return read
    inner = {name: array("d", [column[row] for row in order]) for name, column in read.columns.items()}
    places = {name: getattr(read, name) for name in PLACE}
    ordered = {
        name: array(column.typecode, [column[row] for row in order]) for name, column in places.items()
    }
    return Figures(columns=inner, left_out=read.left_out, **ordered)


def _put(column: "array[Any]", row: int, value: float) -> None:
    if row == len(column):
        column.append(value)
    else:
        column[row] = value


def _outcomes(storage: Storage) -> Iterator[Record]:
    """The numbers that the first rank's journal has of each step, as records."""
    for rank in journal_ranks(storage)[:1]:
        view = read_journal([storage], rank=rank, since=Position(0, 0))
        found = enumerate(sorted(view.outcomes.items(), key=lambda item: item[0]))
        with Records() as records:
            for number, ((position, _), place) in found:
                try:
                    record = records.read(place)
                except CheckpointInvalid:
                    continue
                numbers = {name: float(value) for name, value in record.arrays.items() if value.size == 1}
                yield numbers | {
                    "epoch": position.epoch,
                    "step": position.step,
                    "global_step": position.step if position.epoch == 0 else number,
                    "incarnation": place.segment.name.incarnation,
                    "time": seconds_of(record.time) or 0.0,
                }


def charts(figures: Figures, most: int = STRETCHES) -> list[dict[str, Any]]:
    """Every chart that the run has figures for, as JSON, in the order in which they are shown.

    `most`: into so many stretches a long run is divided.
    """
    columns = {name: np.frombuffer(column) for name, column in figures.columns.items() if len(column)}
    if _CUT in columns:
        columns.setdefault("stopped_fraction", 1 - columns[_CUT])
    found, used = [], set[str]()
    for chart in CHARTS:
        names = _names(chart, columns)
        if names:
            spread = chart.spread if chart.spread in columns else ""
            used |= {*names, spread}
            found.append(_as_json(figures, columns, chart.name, names, spread, most))
    others = sorted(columns.keys() - used - {_CUT})
    found += [_as_json(figures, columns, "", {name: name}, "", most) for name in others]
    return found


def _names(chart: Chart, columns: Mapping[str, Floats]) -> dict[str, str]:
    """Figure -> what it is called on the chart."""
    if chart.name == "verifiers":
        named = (
            (name, prefix, name.removeprefix(prefix).removesuffix("/mean"))
            for name in sorted(columns)
            for prefix in chart.figures
            if name.startswith(prefix)
        )
        # TRL logs the deviation of each function too; it stays a chart of its own.
        return {name: label for name, prefix, label in named if prefix == "reward/" or name.endswith("/mean")}
    first = next((name for name in chart.figures if name in columns), None)
    return {} if first is None else {first: first}


def _as_json(
    figures: Figures,
    columns: Mapping[str, Floats],
    chart: str,
    names: Mapping[str, str],
    spread: str,
    most: int,
) -> dict[str, Any]:
    series = {label: columns[name] for name, label in names.items()}
    drawn = [*series.values(), *([columns[spread]] if spread else [])]
    began = figures.time[0]
    steps, times = np.frombuffer(figures.global_step, dtype=np.int64), np.frombuffer(figures.time) - began
    value: dict[str, Any] = {"chart": chart, "figures": list(names), "labels": list(series)}
    if len(figures) <= 3 * most:
        rows = np.arange(len(figures))
    else:
        edges = stretches(len(figures), most)
        rows = extremes(drawn, edges)
        value["means"] = {
            "step": means(steps.astype(np.float64), edges).round().astype(int).tolist(),
            "time": _short(means(times, edges)),
            "values": [_short(means(column, edges)) for column in series.values()],
        }
    value |= {
        "step": steps[rows].tolist(),
        "time": _short(times[rows]),
        "values": [_short(column[rows]) for column in series.values()],
    }
    if spread:
        value["spread"] = _short(columns[spread][rows])
    value["summary"] = [_summary(column) for column in series.values()]
    return value


def _summary(column: Floats) -> dict[str, float | None]:
    finite = column[np.isfinite(column)]
    if not finite.size:
        return {"first": None, "last": None, "low": None, "high": None}
    named = {"first": finite[0], "last": finite[-1], "low": finite.min(), "high": finite.max()}
    return {name: _shortened(float(value)) for name, value in named.items()}


def _short(column: Floats) -> list[float | None]:
    return [_shortened(value) for value in column.tolist()]


def _shortened(value: float) -> float | None:
    """Rounded to what a chart can show; None, a gap in the curve, for what is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
