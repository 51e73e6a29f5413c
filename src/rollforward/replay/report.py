"""What a run resumed from, how long that took, and what could not be recovered.

A start that resumes makes one report and writes it twice: when training continues, with what is
going to be replayed, and when the replay is over, with what was replayed. People read it in the
log. Programs read `recoveries.jsonl` in the run's folder, beside the metrics: one JSON object per
start, newest last, with the fields of `RecoveryReport`; the file is replaced as a whole, durably.
`rollforward history` shows it too.

Counts are totals over all ranks, seconds are the first rank's.

Left out: resuming from another trainer's folder, which has no journal and no digests to report on.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from rollforward.grpo.ports import Group
from rollforward.position import Position
from rollforward.replay.inheriting import JournalReport
from rollforward.replay.recovery import Restored
from rollforward.storage import Storage, read_lines
from rollforward.store import strictjson
from rollforward.store.journal.writing import utc_now
from rollforward.store.shipping import in_behind
from rollforward.store.tensorfile import is_count
from rollforward.wording import counted, in_bytes

FILE = "recoveries.jsonl"
_MAX_BYTES = 64 << 20
_MAX_LINE = 1 << 20
_KEPT = 1000
"""How many reports are kept, the newest ones; a supervised run may start often."""


@dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """One recovery."""

    incarnation: int
    """Which start of the run."""
    time: str
    """When training continued, UTC."""
    checkpoint: Position
    """The one that was loaded."""
    saved_by: int
    """The incarnation that saved it."""
    saved: str
    """When it was saved, UTC."""
    rejected: Mapping[str, str]
    """Newer checkpoints that did not prove intact: position -> one-line reason."""
    bytes: int
    """Read and verified."""
    replayed_until: Position
    """The steps from `checkpoint` up to this one, not including it, are replayed."""
    next: Position
    """The first step that is new: neither replayed nor finished by an earlier start."""
    steps_replayed: int
    chunks_reused: int
    """Taken from the journal: those of the replayed steps, and those already finished for step `next`."""
    chunks_generated_again: int
    """Finished before, but not taken from the journal."""
    steps_lost: int
    """Finished before, but not replayed: from `replayed_until` up to, not including, `next`."""
    lost: tuple[str, ...]
    """In words, what could not be recovered, and why; empty when nothing is lost."""
    workers: int = 0
    """Of this start; 0 in reports of earlier versions, which do not say it."""
    standby: bool = False
    """Whether a standby took over: `prepare` then is the time to check that what it has ready is still true,
    `framework` and `engine` are 0, and `total` counts from the moment when it was called."""
    over: bool = False
    """Whether the replay is over. Until then, its figures say what is going to be done."""
    updates_replayed: int = 0
    """Replayed updates whose outcome was compared with a recorded one."""
    updates_repeated: int = 0
    """Those of them that gave the same bits."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """`prepare`: from the start of the process until configuration and data are read; `framework`: loading
    it and meeting the other workers; `engine`: model and graphs; `find` and `load` the checkpoint, where
    verifying is part of loading; `journal`: reading it; and once it is over `replay`, and `total`: from the
    start of the process until step `next` begins. A loop of `open_run` does not have the first three, and its
    `total` counts from there."""

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it; positions as text."""
        value = asdict(self)
        for name in ("checkpoint", "replayed_until", "next"):
            value[name] = str(value[name])
        return value

    @classmethod
    def from_json(cls, value: Any) -> "RecoveryReport":
        """The report that `as_json` gave; ValueError for anything else."""
        try:
            given = {
                item.name: _READERS[item.type](value[item.name])
                for item in fields(cls)
                if item.name in value or item.default is item.default_factory is MISSING
            }
            return cls(**given)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a report of a recovery: {error}") from None

    def lines(self) -> list[str]:
        """For the log, when training continues; damage has already been reported by then."""
        rejected = f"{counted(len(self.rejected), 'newer one')} rejected; " if self.rejected else ""
        until = f", up to {self.replayed_until}" if self.steps_replayed else ""
        again = self.chunks_generated_again
        more = f"; {counted(again, 'chunk')} to generate again" if again else ""
        return [
            f"from checkpoint {self.checkpoint} of start {self.saved_by}, saved {self.saved}; {rejected}"
            f"{in_bytes(self.bytes)} found in {self.seconds['find']:.2f} s, loaded and verified in "
            f"{self.seconds['load']:.2f} s",
            f"{counted(self.steps_replayed, 'step')} to replay{until}, with "
            f"{counted(self.chunks_reused, 'chunk')} from the journal, read in "
            f"{self.seconds['journal']:.2f} s{more}",
            f"lost: {self.lost[0] if self.lost else 'nothing'}",
        ]

    def last_line(self) -> str:
        """For the log, when the replay is over."""
        proof = ""
        if self.updates_replayed:
            proof = f", {self.updates_repeated} of {self.updates_replayed} updates equal to the last bit"
        since = "the process started" if "prepare" in self.seconds else "the run was opened"
        since = "the standby was called" if self.standby else since
        return (
            f"over {self.seconds['total']:.2f} s after {since}, {self.seconds['replay']:.2f} s "
            f"of it for replaying {counted(self.steps_replayed, 'step')}{proof}; "
            f"{counted(self.chunks_reused, 'chunk')} from the journal, "
            f"{counted(self.chunks_generated_again, 'chunk')} generated again; next is step {self.next}"
        )


def make_report(
    restored: Restored,
    journal: JournalReport,
    *,
    incarnation: int,
    workers: int,
    end: Position,
    bytes_restored: int,
    seconds: Mapping[str, float],
    standby: bool = False,
    left_behind: Mapping[str, float] | None = None,
) -> RecoveryReport:
    """What is known when training continues. `end`: of the run. `bytes_restored`: of all ranks.

    `left_behind`: what an earlier start had not shipped from its machine (`store.shipping`).
    """
    manifest = restored.manifest
    return RecoveryReport(
        incarnation=incarnation,
        time=utc_now(),
        checkpoint=manifest.position,
        saved_by=manifest.incarnation,
        saved=manifest.created,
        rejected={str(position): reason for position, reason in restored.rejected},
        bytes=bytes_restored,
        replayed_until=journal.until,
        next=min(journal.finished, end),
        steps_replayed=journal.replayed_steps,
        chunks_reused=journal.replayed_chunks + journal.reused_chunks,
        chunks_generated_again=journal.lost_chunks,
        steps_lost=journal.lost_steps,
        lost=(*_lost(journal, end), *_left_behind(left_behind or {})),
        workers=workers,
        standby=standby,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


class Replayed(Protocol):
    """What is counted while a run replays."""

    @property
    def replayed_updates(self) -> int:
        """Updates whose outcome was compared with a recorded one."""

    @property
    def repeated_updates(self) -> int:
        """Those of them that gave the same bits."""

    unreadable_chunks: int
    """Chunks that the journal had, but that could not be read intact when needed."""


class Recovering:
    """Watches a resumed run until its replay is over; an `Observer`, on every rank.

    `say` and `keep` get the report: once when this is created, and once when step `next` begins. `following`
    returns the step after a given one. `age` returns the seconds since the process started.
    """

    def __init__(
        self,
        report: RecoveryReport,
        log: Replayed,
        group: Group,
        *,
        following: Callable[[Position], Position],
        say: Callable[[str], None],
        keep: Callable[[RecoveryReport], None],
        age: Callable[[], float],
    ) -> None:
        self.report = report
        self._log = log
        self._group = group
        self._following = following
        self._say = say
        self._keep = keep
        self._age = age
        self._began = self._age()
        for line in report.lines():
            say(f"recovery: {line}")
        keep(report)
        if report.next == report.checkpoint:
            self._finish()

    def phase(self, position: Position, name: str) -> None:
        """Nothing: ranks enter phases at different times, but the counts are over all ranks."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:  # noqa: ARG002 (an Observer's)
        """The replay is over after the last step that had been finished before. Collective."""
        if not self.report.over and self._following(position) == self.report.next:
            self._finish()

    def begins(self, position: Position) -> None:
        """Like `step`, for a run that cannot name the next step: called when a step begins. Collective."""
        if not self.report.over and position >= self.report.next:
            self._finish()

    def _finish(self) -> None:
        log, now = self._log, self._age()
        own = [log.replayed_updates, log.repeated_updates, log.unreadable_chunks]
        replayed, repeated, unreadable = zip(*self._group.all_gather(own), strict=True)
        report = self.report
        self.report = replace(
            report,
            over=True,
            # Outcomes are over all ranks: each rank compares the same ones.
            updates_replayed=min(replayed),
            updates_repeated=min(repeated),
            chunks_reused=report.chunks_reused - sum(unreadable),
            chunks_generated_again=report.chunks_generated_again + sum(unreadable),
            seconds={**report.seconds, "replay": round(now - self._began, 3), "total": round(now, 3)},
        )
        self._say(f"recovery: {self.report.last_line()}")
        self._keep(self.report)


def keep(storage: Storage, report: RecoveryReport) -> None:
    """Append the report durably; it replaces an earlier one of the same start."""
    others = [other for other in read(storage) if other.incarnation != report.incarnation]
    lines = [json.dumps(each.as_json()) + "\n" for each in [*others, report][-_KEPT:]]
    storage.write(FILE, ["".join(lines).encode()])


def read(storage: Storage) -> list[RecoveryReport]:
    """The reports in a run's folder, newest last; invalid lines are skipped."""
    if storage.stat(FILE) is None:
        return []
    found = []
    for line in read_lines(storage, FILE, limit=_MAX_BYTES, longest=_MAX_LINE):
        try:
            found.append(RecoveryReport.from_json(strictjson.parse(line)))
        except ValueError:
            continue
    return found


def _is(holds: bool, value: Any) -> Any:
    if not holds:
        raise TypeError(f"{str(value)[:60]!r} is of another kind")
    return value


def _text(value: Any) -> str:
    return str(_is(isinstance(value, str), value))


def _number(value: Any) -> float:
    return float(_is(type(value) is float or is_count(value), value))


def _object(value: Any, reader: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: reader(item) for name, item in _is(isinstance(value, dict), value).items()}


_READERS: Mapping[Any, Callable[[Any], Any]] = {
    int: lambda value: _is(is_count(value), value),
    str: _text,
    bool: lambda value: _is(isinstance(value, bool), value),
    Position: lambda value: Position.parse(_text(value)),
    Mapping[str, str]: lambda value: _object(value, _text),
    Mapping[str, float]: lambda value: _object(value, _number),
    tuple[str, ...]: lambda value: tuple(map(_text, _is(isinstance(value, list | tuple), value))),
}
"""How a field of a report is parsed, by its type; TypeError or ValueError for anything else."""


def _lost(journal: JournalReport, end: Position) -> tuple[str, ...]:
    """What is not taken over from earlier starts, and why; the most important first. `end`: of the run."""
    return (*_lost_here(journal, end), *_passed_over(journal))


def _lost_here(journal: JournalReport, end: Position) -> tuple[str, ...]:
    """The same, for the history that is resumed."""
    if journal.lost_chunks:
        which = (
            f"{counted(journal.lost_steps, 'finished step')} from {journal.until} on, "
            f"{counted(journal.lost_chunks, 'finished chunk')} in all: "
        )
        if not journal.compatible:
            instead = "generated again with the present one" if journal.until < end else "kept, not used"
            return (f"{which}made with another configuration, {instead}",)
        why = "the journal is damaged" if journal.problems else "the journal does not have them"
        return (f"{which}{why}, generated again", *journal.problems)
    if journal.problems:
        return (
            f"no finished step; chunks of {journal.until} that were finished may be generated again, since "
            "the journal is damaged",
            *journal.problems,
        )
    return ()


def _left_behind(behind: Mapping[str, float]) -> tuple[str, ...]:
    if not behind:
        return ()
    return (
        f"what was on a lost machine only when it was last heard of: {in_behind(behind)}; it is made again",
    )


def _passed_over(journal: JournalReport) -> tuple[str, ...]:
    return tuple(
        f"what start {incarnation} did from {journal.start} on: it had another configuration"
        for incarnation in journal.passed_over
    )
