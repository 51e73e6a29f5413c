"""The past of a run as a timeline: starts, resumes, replays, checkpoints, and how each start ended.

Derived from what the run's folder holds: the journal of the first rank, the manifests, and the
lock. Nothing is changed on disk. What was pruned is not told: checkpoints that are gone, and starts
of which no journal segment is left.
"""

import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollforward.position import Position
from rollforward.run.progress import in_bytes
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointInfo, list_checkpoints
from rollforward.store.journal_history import StartOfRun, history, journal_ranks
from rollforward.store.journal_records import Record, SegmentHeader
from rollforward.store.lock import Owner, read_owner

What = Literal["started", "resumed", "checkpoint", "finished", "stopped", "killed", "running", "damage"]
RESUMED, FINISHED = "resumed", "finished"
"""Events of the journal that are told of in words of their own."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the timeline."""

    time: str
    """UTC; empty where it is not known."""
    what: What
    start: int
    """Which start of the run (incarnation) it belongs to; 0 where that is not known."""
    position: Position | None
    text: str


def timeline(storage: LocalStorage) -> list[Entry]:
    """Everything that is known, the earliest first; entries without a time come last."""
    ranks = journal_ranks(storage)
    starts = history(storage, ranks[0]) if ranks else []
    checkpoints = list_checkpoints(storage)
    steps_per_epoch = _steps_per_epoch(checkpoints)
    entries = [_checkpoint(info) for info in checkpoints]
    owner = read_owner(storage)
    for start in starts:
        entries += _beginning(start, steps_per_epoch)
        entries.append(_ending(start, owner if start is starts[-1] else None, later=start is not starts[-1]))
    for rank in ranks:
        for start in history(storage, rank) if rank else starts:
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
    # Of two things at one instant the checkpoint came before what followed from it.
    return sorted(entries, key=lambda entry: (not entry.time, entry.time, entry.what != "checkpoint"))


def _beginning(start: StartOfRun, steps_per_epoch: int) -> Iterator[Entry]:
    header = start.header
    if header is not None and not any(_event(record) == RESUMED for record in start.events):
        went_on = bool(header.lineage) or header.start > Position(0, 0)
        yield Entry(
            time=header.created,
            what="resumed" if went_on else "started",
            start=start.incarnation,
            position=header.start,
            text=_what_the_header_says(header, went_on=went_on),
        )
    for record in start.events:
        if _event(record) == RESUMED:
            yield Entry(
                time=record.time,
                what="resumed",
                start=start.incarnation,
                position=record.position,
                text=_what_was_taken_over(record, steps_per_epoch),
            )


def _what_the_header_says(header: SegmentHeader, *, went_on: bool) -> str:
    """How a start began whose journal has no word of it, or not any more."""
    who = header.identity
    workers = f"{who.world_size} worker{'s' if who.world_size > 1 else ''} on {who.device}"
    text = f"at step {header.start}, {workers}" if went_on else f"a new run, {workers}"
    if header.first > header.start:
        text += f"; it began before this: its journal from before {header.first} is gone"
    return text


def _what_was_taken_over(record: Record, steps_per_epoch: int) -> str:
    detail = _detail(record)
    text = f"from checkpoint {record.position} of start {detail.get('saved_by')}"
    if not detail.get("compatible", True):
        return f"{text}; with another configuration, so nothing is replayed"
    try:
        until = Position.parse(str(detail.get("replay_until")))
    except ValueError:
        return text
    if until == record.position:
        return f"{text}; no whole step to replay"
    count = f"{until.global_step(steps_per_epoch) - record.position.global_step(steps_per_epoch)} "
    return f"{text}; {count if steps_per_epoch else ''}steps replayed, up to {until}"


def _ending(start: StartOfRun, owner: Owner | None, *, later: bool) -> Entry:
    did = f"{start.chunks} chunks generated, {start.updates} updates"
    if start.first is None:
        did = "nothing new was done"
    elif start.last is not None:
        did += f", steps {start.first} to {start.last}"
    if start.abandoned_from is not None:
        did += f"; what it did from {start.abandoned_from} on was abandoned"
    finished = next((record for record in start.events if _event(record) == FINISHED), None)
    if finished is not None:
        how: tuple[What, str] = "finished", "came to its end"
    elif later or owner is None or owner.incarnation != start.incarnation:
        how = "stopped", "killed or stopped before its end"
    else:
        how = _by_its_lock(owner)
    return Entry(
        time=start.last_time,
        what=how[0],
        start=start.incarnation,
        position=finished.position if finished else start.last,
        text=f"{how[1]}: {did}",
    )


def _by_its_lock(owner: Owner) -> tuple[What, str]:
    """How the newest start ended, if it did."""
    process = f"process {owner.pid} on {owner.host}"
    if not owner.held:
        return "stopped", f"{process} let go of the folder before the run's end"
    if owner.host != socket.gethostname()[:64]:
        return "running", f"{process} did not let go of the folder: it runs, or was killed"
    if Path(f"/proc/{owner.pid}").exists():
        return "running", f"{process} is at it"
    return "killed", f"{process} ended without letting go of the folder"


def _checkpoint(info: CheckpointInfo) -> Entry:
    return Entry(
        time=info.created,
        what="checkpoint",
        start=info.manifest.incarnation if info.manifest else 0,
        position=info.position,
        text=f"saved, {in_bytes(info.size)}" if info.valid else f"not valid: {info.reason}",
    )


def _steps_per_epoch(checkpoints: Sequence[CheckpointInfo]) -> int:
    """As the newest checkpoint says; 0 when none does."""
    for info in checkpoints:
        found = info.manifest.state.get("steps_per_epoch") if info.manifest else None
        if isinstance(found, int):
            return found
    return 0


def _event(record: Record) -> str:
    return record.metadata.get("event", "")


def _detail(record: Record) -> dict[str, Any]:
    try:
        value = json.loads(record.metadata.get("detail", ""))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
