"""The past of a run as a timeline: starts, resumes, replays, checkpoints, and how each start ended.

Derived from what the run's folder holds: the journal of the first rank, the manifests, the recovery
reports, and the lock. Nothing is changed on disk. What was pruned is not shown: checkpoints that are
gone, and what a start did if no journal segment of it is left.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollforward.position import Position
from rollforward.replay import report as recovery_report
from rollforward.replay.inheriting import FAILED, FINISHED
from rollforward.replay.report import RecoveryReport
from rollforward.storage import LocalStorage, Storage
from rollforward.store import CheckpointInfo, list_checkpoints, strictjson
from rollforward.store.journal.history import StartOfRun, history
from rollforward.store.journal.reading import journal_ranks
from rollforward.store.journal.records import Record
from rollforward.store.lock import Owner, is_taken, read_owner, this_host
from rollforward.wording import counted, in_bytes

What = Literal[
    "started", "resumed", "checkpoint", "finished", "failed", "stopped", "killed", "running", "damage"
]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the timeline."""

    time: str
    """UTC; empty when not known."""
    what: What
    start: int
    """Which start of the run (incarnation) it belongs to; 0 when not known."""
    position: Position | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Past:
    """What the timeline is told from. Reading it takes one pass over the journals."""

    by_rank: Mapping[int, Sequence[StartOfRun]]
    """The starts that each rank's journal still knows, oldest first."""
    checkpoints: Sequence[CheckpointInfo]
    """Newest first."""
    reports: Mapping[int, RecoveryReport]
    """By the start that made it."""
    owner: Owner | None
    held: bool
    """Whether a process on this machine holds the run's lock."""

    @property
    def starts(self) -> Sequence[StartOfRun]:
        """Those of the first rank."""
        return next(iter(self.by_rank.values()), [])


def read_past(storage: Storage) -> Past:
    """Everything that the run's folder says about what happened to it."""
    return Past(
        by_rank={rank: history(storage, rank) for rank in journal_ranks(storage)},
        checkpoints=list_checkpoints(storage),
        reports={report.incarnation: report for report in recovery_report.read(storage)},
        owner=read_owner(storage),
        held=isinstance(storage, LocalStorage) and is_taken(storage.root),
    )


def timeline(storage: Storage) -> list[Entry]:
    """Everything that is known, in the order of starts; entries whose start is not known come last."""
    return entries_of(read_past(storage))


def entries_of(past: Past) -> list[Entry]:
    """The timeline of a past.

    Within a start: how it began, its checkpoints, how it ended, damage. Clocks are not used: they may have
    been set back between two starts, or differ between two machines.
    """
    entries = [_checkpoint(info) for info in past.checkpoints]
    failures = _failures(past.by_rank.values())
    for start in past.starts:
        if start.incarnation not in past.reports:
            entries += _beginning(start)
        newest = start is past.starts[-1]
        failure = failures.get(start.incarnation)
        owner, held = (past.owner, past.held) if newest else (None, False)
        entries.append(_ending(start, owner, failure, later=not newest, held=held))
    entries += [_recovered(report) for report in past.reports.values()]
    for rank, found in past.by_rank.items():
        for start in found:
            entries += [
                Entry(
                    time="",
                    what="damage",
                    start=start.incarnation,
                    position=None,
                    text=f"rank {rank}: {line}",
                )
                for line in start.problems
            ]
    return sorted(entries, key=_place_in_time)


def _place_in_time(entry: Entry) -> tuple[bool, int, int, Position]:
    known = entry.start > 0 and entry.what != "damage"
    stage = {"started": 0, "resumed": 0, "checkpoint": 1}.get(entry.what, 2)
    return not known, entry.start, stage, entry.position or Position(0, 0)


def _beginning(start: StartOfRun) -> Iterator[Entry]:
    """As its journal has it, when there is no recovery report."""
    header = start.header
    if header is None:
        return
    who = header.identity
    workers = f"{counted(who.world_size, 'worker')} on {who.device}"
    resumed = bool(header.lineage) or header.start > Position(0, 0)
    text = f"at step {header.start}, {workers}" if resumed else f"a new run, {workers}"
    if header.first > header.start:
        text += f"; it started before this: its journal before {header.first} is gone"
    yield Entry(
        time=header.created,
        what="resumed" if resumed else "started",
        start=start.incarnation,
        position=header.start,
        text=text,
    )


def _recovered(report: RecoveryReport) -> Entry:
    """As the start itself reported it."""
    by = f", by {counted(report.workers, 'worker')}" if report.workers else ""
    text = f"from checkpoint {report.checkpoint} of start {report.saved_by}{by}"
    text += ", a standby" if report.standby else ""
    if report.rejected:
        text += f", {len(report.rejected)} newer rejected"
    if report.steps_replayed:
        how = "replayed" if report.over else "to be replayed"
        text += f"; {counted(report.steps_replayed, 'step')} {how}, up to {report.replayed_until}"
    else:
        text += "; no whole step to replay"
    return Entry(
        time=report.time,
        what="resumed",
        start=report.incarnation,
        position=report.checkpoint,
        text="; ".join([text, f"lost: {report.lost[0] if report.lost else 'nothing'}"]),
    )


def _failures(starts_by_rank: Iterable[Sequence[StartOfRun]]) -> dict[int, str]:
    """The error that ended each start, from the rank that failed first: the others fail because of it."""
    found = [
        (record.time, start.incarnation, _detail(record))
        for starts in starts_by_rank
        for start in starts
        for record in start.events
        if _event(record) == FAILED
    ]
    first: dict[int, str] = {}
    for _, incarnation, detail in sorted(found, key=lambda item: item[:2]):
        line, *_ = str(detail.get("error", "")).splitlines() or [""]
        first.setdefault(incarnation, f"{detail.get('kind', 'an error')}: {line}")
    return first


def _ending(start: StartOfRun, owner: Owner | None, failure: str | None, *, later: bool, held: bool) -> Entry:
    did = f"{start.chunks} chunks generated, {start.updates} updates"
    if start.first is None:
        did = "nothing new was done"
    elif start.last is not None:
        did += f", steps {start.first} to {start.last}"
    if start.abandoned_from is not None:
        did += f"; its work from {start.abandoned_from} on was abandoned"
    finished = next((record for record in start.events if _event(record) == FINISHED), None)
    if finished is not None:
        how: tuple[What, str] = "finished", "came to its end"
    elif failure is not None:
        how = "failed", failure
    elif later or owner is None or owner.incarnation != start.incarnation:
        how = "stopped", "killed or stopped before its end"
    else:
        how = _by_its_lock(owner, held=held)
    return Entry(
        time=start.last_time,
        what=how[0],
        start=start.incarnation,
        position=finished.position if finished else start.last,
        text=f"{how[1]}: {did}",
    )


def _by_its_lock(owner: Owner, *, held: bool) -> tuple[What, str]:
    """How the newest start ended, if it did."""
    process = f"process {owner.pid} on {owner.host}"
    if not owner.held:
        return "stopped", f"{process} released the folder before the run's end"
    if owner.host != this_host():
        return "running", f"{process} did not release the folder: it is running, or was killed"
    if held or Path(f"/proc/{owner.pid}").exists():
        return "running", f"{process} is running"
    return "killed", f"{process} ended without releasing the folder, as far as can be seen from here"


def _checkpoint(info: CheckpointInfo) -> Entry:
    return Entry(
        time=info.created,
        what="checkpoint",
        start=info.manifest.incarnation if info.manifest else 0,
        position=info.position,
        text=f"saved, {in_bytes(info.size)}" if info.valid else f"not valid: {info.reason}",
    )


def _detail(record: Record) -> Mapping[str, Any]:
    try:
        value = strictjson.parse(record.metadata.get("detail", "{}").encode())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _event(record: Record) -> str:
    return record.metadata.get("event", "")
