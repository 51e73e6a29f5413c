"""Starts as bars on a time axis, what each kill cost, and goodput: useful time over all time.

Told from what `inspection.history` reads, and from the figures of the steps. A step is useful when it is part
of the run as it stands; starting, loading, replaying, steps that were generated again, and the time between a
kill and the next start are not. How long a useful step took is the time between its line in `metrics.jsonl`
and the line before; where a replay has written that line again, or nothing was before it, the median of the
others stands in, and how many of those there are is said.

Where a journal was pruned, a start's end is not known: the last thing that it left behind stands in.
"""

import bisect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollforward.inspection.history import Entry, Past, What, entries_of
from rollforward.inspection.report.curves import Figures, seconds_of
from rollforward.position import Position
from rollforward.replay.report import RecoveryReport
from rollforward.store import CheckpointInfo
from rollforward.store.journal.records import SegmentHeader

_BEFORE = ("prepare", "framework", "engine", "journal", "find", "load")
"""The seconds of a recovery report that were over when it was first written."""
_STEP = "seconds/"

Number = Callable[[Position], int]
"""Position -> steps done before it, over all epochs."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """How much of the time of a run was of use."""

    wall: float
    """Seconds, from the first start to the end, or until now."""
    useful: float
    """Seconds of the steps that are part of the run as it stands."""
    steps: int
    estimated: int
    """Those of the steps whose own time is not known: the median of the others was taken."""


def as_json(past: Past, figures: Figures, now: float) -> dict[str, Any]:
    """The timeline of a run."""
    entries = entries_of(past)
    starts = _starts(past, figures, entries)
    running = bool(starts) and starts[-1]["ending"] == "running"
    number = numbering(past, figures)
    for start in starts:
        start["steps"] = [None if each is None else number(each) for each in start["steps"]]
        for name in ("from", "reached"):
            start[name] = None if start[name] is None else number(start[name])
    return {
        "starts": starts,
        "checkpoints": _checkpoints(past, number),
        "goodput": asdict(goodput(figures, past.reports, starts, now if running else None)),
        "entries": [
            [entry.time, entry.what, entry.start, _text(entry.position), entry.text] for entry in entries
        ],
        "running": running,
        "now": now if running else None,
        "began": figures.time[0] if len(figures) else None,
    }


def numbering(past: Past, figures: Figures) -> Number:
    """Position -> global step, as far as the run's folder tells: by the steps that it names."""
    per_epoch = next(
        (
            steps
            for info in past.checkpoints
            if info.manifest and type(steps := info.manifest.state.get("steps_per_epoch")) is int and steps
        ),
        None,
    )
    named = {figures.position(row): figures.global_step[row] for row in range(len(figures))}
    named |= {info.position: info.manifest.global_step for info in past.checkpoints if info.manifest}
    known = sorted(named.items())
    places = [position for position, _ in known]

    def number(position: Position) -> int:
        if per_epoch is not None:
            return position.global_step(per_epoch)
        at = bisect.bisect_right(places, position) - 1
        if at < 0:
            return position.step
        before, steps = known[at]
        return steps + (position.step - before.step if before.epoch == position.epoch else 1)

    return number


def goodput(
    figures: Figures,
    reports: Mapping[int, RecoveryReport],
    starts: Sequence[Mapping[str, Any]],
    now: float | None,
) -> Goodput:
    """Useful time over all time. `now`: of a run under way; None for one that ended."""
    took = _durations(figures, reports)
    known = [seconds for seconds in took if seconds is not None]
    typical = statistics.median(known) if known else 0.0
    ends = [start["ended"] for start in starts if start["ended"] is not None]
    begun = [start["began"] for start in starts if start["began"] is not None]
    wall = max(0.0, (max(ends, default=0.0) if now is None else now) - min(begun)) if begun else 0.0
    useful = sum(typical if seconds is None else seconds for seconds in took)
    return Goodput(
        wall=wall, useful=min(useful, wall), steps=len(took), estimated=sum(each is None for each in took)
    )


def _durations(figures: Figures, reports: Mapping[int, RecoveryReport]) -> list[float | None]:
    """How long each step took when it was first done; None where that is not known."""
    phases = [column for name, column in figures.columns.items() if name.startswith(_STEP)]
    took: list[float | None] = []
    for row in range(len(figures)):
        start = figures.incarnation[row]
        report = reports.get(start)
        if report is not None and figures.position(row) < report.next:
            took.append(None)
        elif row and figures.incarnation[row - 1] == start and figures.time[row] >= figures.time[row - 1]:
            took.append(figures.time[row] - figures.time[row - 1])
        elif phases:
            took.append(sum(column[row] for column in phases))
        else:
            took.append(None)
    return took


def _starts(past: Past, figures: Figures, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Each start that left anything behind, oldest first."""
    journals = {start.incarnation: start for start in past.starts}
    endings = {entry.start: entry for entry in entries if entry.what in _ENDINGS}
    lines: dict[int, list[int]] = {}
    for row in range(len(figures)):
        lines.setdefault(figures.incarnation[row], []).append(row)
    saved: dict[int, list[str]] = {}
    for info in past.checkpoints:
        if info.manifest:
            saved.setdefault(info.manifest.incarnation, []).append(info.created)
    for each in past.reports.values():
        saved.setdefault(each.saved_by, []).append(each.saved)
    numbers = sorted({*journals, *past.reports, *lines, *saved})
    found = []
    for number in numbers:
        journal, report, rows = journals.get(number), past.reports.get(number), lines.get(number, [])
        following = past.reports.get(number + 1)
        entry = endings.get(number)
        header = journal.header if journal is not None else None
        left = [figures.time[row] for row in rows] + [seconds_of(time) for time in saved.get(number, [])]
        left += [seconds_of(journal.last_time)] if journal is not None else []
        steps: list[Position | None] = [journal.first, journal.last] if journal is not None else [None, None]
        if steps[0] is None and rows:
            steps = [figures.position(rows[0]), figures.position(rows[-1])]
        found.append(
            {
                "number": number,
                "began": _began(report, header.created if header else "", figures, rows),
                "ready": _ready(report),
                "ended": max((time for time in left if time is not None), default=None),
                "end_known": journal is not None,
                "ending": entry.what if entry else "stopped",
                "text": entry.text if entry else "",
                "workers": header.identity.world_size if header else None,
                "device": header.identity.device if header else "",
                "from": _from(report, header, rows),
                "steps": steps,
                # Where it was when it ended; the next start says it where its own journal is gone.
                "reached": following.next
                if following and (journal is None or not journal.last)
                else steps[1],
                "recovery": report.as_json() if report else None,
            }
        )
    return found


def _from(
    report: RecoveryReport | None, header: SegmentHeader | None, rows: Sequence[int]
) -> Position | None:
    """Where a start began; None when nothing that is left says so."""
    if report is not None:
        return report.checkpoint
    if header is not None:
        return header.start
    return Position(0, 0) if rows and rows[0] == 0 else None


_ENDINGS: tuple[What, ...] = ("finished", "failed", "stopped", "killed", "running")


def _began(
    report: RecoveryReport | None, created: str, figures: Figures, rows: Sequence[int]
) -> float | None:
    """When the process of a start began, as far as is known."""
    if report is not None and (told := seconds_of(report.time)) is not None:
        return told - sum(report.seconds.get(name, 0.0) for name in _BEFORE)
    if (made := seconds_of(created)) is not None:
        return made
    if not rows:
        return None
    phases = [column[rows[0]] for name, column in figures.columns.items() if name.startswith(_STEP)]
    return figures.time[rows[0]] - sum(value for value in phases if value == value)


def _ready(report: RecoveryReport | None) -> list[float] | None:
    """When a resumed start began to replay, and when its first new step began."""
    told = seconds_of(report.time) if report is not None else None
    if report is None or told is None:
        return None
    return [told, told + report.seconds.get("replay", 0.0)]


def _checkpoints(past: Past, number: Number) -> list[dict[str, Any]]:
    """Those that are there, and those that only a recovery still names, oldest first."""
    there = {info.position for info in past.checkpoints}
    found = [_checkpoint(info, number) for info in past.checkpoints]
    gone: dict[Position, str] = {
        report.checkpoint: report.saved for report in past.reports.values() if report.checkpoint not in there
    }
    for start in past.starts:
        if start.header is not None and start.header.start not in there:
            gone.setdefault(start.header.start, "")
    found += [
        {
            "position": str(position),
            "step": number(position),
            "time": seconds_of(saved),
            "state": "pruned",
            "reason": "",
            "size": 0,
        }
        for position, saved in gone.items()
    ]
    return sorted(found, key=lambda item: int(item["step"]))


def _checkpoint(info: CheckpointInfo, number: Number) -> dict[str, Any]:
    return {
        "position": str(info.position),
        "step": info.manifest.global_step if info.manifest else number(info.position),
        "time": seconds_of(info.created),
        "state": "valid" if info.valid else "damaged",
        "reason": info.reason,
        "size": info.size,
    }


def _text(position: Position | None) -> str:
    return "" if position is None else str(position)
