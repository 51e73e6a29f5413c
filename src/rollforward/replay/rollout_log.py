"""The trainer's `RolloutLog` over the journal, and what a start of the run takes over from it.

    newest checkpoint at S      S, S+1, ... T-1: every chunk is in the journal of every rank: replayed
                                T: the first step that is not whole: its finished chunks are used again
                                beyond T: nothing is taken over

Replay is no mode of the trainer: it finds the chunks in the log instead of generating them, and
what an update gives is compared with what is recorded, to the last bit. `open_rollout_log` is
collective, because all ranks have to agree on T.

Left out: deciding which checkpoint to start from, and the incarnation; `recovery` and the store
do that.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

from rollforward.agreement import together
from rollforward.errors import CheckpointInvalid, ReplayDiverged, StorageError
from rollforward.grpo.types import RolloutChunk, UpdateOutcome
from rollforward.position import Position
from rollforward.replay.codec import (
    RecordedOutcome,
    pack,
    pack_outcome,
    same_bits,
    unpack,
    unpack_outcome,
)
from rollforward.storage import Storage
from rollforward.store.journal.reading import JournalView, adopt, read_journal, repair
from rollforward.store.journal.records import Identity
from rollforward.store.journal.writing import Journal
from rollforward.store.layout import SegmentName

COMPARED = ("loss", "grad_norm", "kl", "learning_rate")
"""The numbers of an outcome that a replay has to repeat."""

FAILED = "failed"
"""The event of the journal that says which error ended a start."""

RELATIVE_TOLERANCE = 1e-3
ABSOLUTE_TOLERANCE = 1e-5
"""How far a replay on other versions, another device or world size may be from the recorded numbers."""

Notice = Callable[[str], None]
Uninterrupted = Callable[[], AbstractContextManager[None]]
"""Entered around each write, so that a signal takes effect only when the record is whole."""


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """How the journal is used."""

    chunks_per_step: int
    steps_per_epoch: int
    on_divergence: Literal["stop", "accept"] = "stop"
    weights_digest_every: int = 0
    """A digest of the policy goes with the outcomes of every so many steps; 0: never."""


@dataclass(frozen=True, kw_only=True)
class JournalReport:
    """What a start takes over; the same on all ranks but for `repaired`."""

    start: Position
    until: Position
    """T: the steps from `start` up to this one, not including it, are replayed."""
    finished: Position
    """The first step that is new: `until`, or beyond it where finished steps are lost."""
    replayed_steps: int
    replayed_chunks: int
    """Chunks of the steps that are replayed, of all ranks."""
    reused_chunks: int
    """Finished chunks of step `until`, of all ranks."""
    lost_steps: int
    """Finished steps that cannot be replayed: those from `until` up to, not including, `finished`."""
    lost_chunks: int
    """Finished chunks that are not used again, of all ranks: of lost steps, and of step `finished`."""
    compatible: bool
    """False when the records were made with another configuration or world size: none are used."""
    repaired: tuple[str, ...]
    """Torn ends that were cut, a line each."""
    problems: tuple[str, ...]
    """Damage, of all ranks, a line each."""


class JournaledRollouts:
    """`grpo.ports.RolloutLog`. `weights_digest` gives a digest of the policy as it is now."""

    def __init__(
        self,
        journal: Journal,
        settings: LogSettings,
        *,
        notice: Notice,
        weights_digest: Callable[[], str],
        uninterrupted: Uninterrupted = nullcontext,
    ) -> None:
        self.journal = journal
        self.replayed_updates = 0
        """Updates whose outcome was compared with a recorded one."""
        self.repeated_updates = 0
        """Those of them that gave the same bits."""
        self.unreadable_chunks = 0
        """Chunks that the journal had, and that could not be read intact when they were wanted."""
        self._settings = settings
        self._notice = notice
        self._weights_digest = weights_digest
        self._uninterrupted = uninterrupted

    def find(self, position: Position, chunk: int) -> RolloutChunk | None:
        """The chunk, if an earlier start finished it and it can still be read intact."""
        try:
            record = self.journal.find_rollouts(position, chunk)
            return None if record is None else unpack(record)
        except (CheckpointInvalid, ValueError) as error:
            self.unreadable_chunks += 1
            self._notice(f"step {position}, chunk {chunk} is generated again: {error}")
            return None

    def append(self, position: Position, chunk: int, rollouts: RolloutChunk) -> None:
        """Returns when the chunk is on stable storage."""
        arrays, metadata = pack(rollouts)
        with self._uninterrupted():
            self.journal.append(position, chunk, arrays, metadata)

    def record(
        self, position: Position, iteration: int, outcome: UpdateOutcome, learning_rate: float
    ) -> None:
        """Compare with the recorded outcome, or write it; ReplayDiverged when it differs."""
        every = self._settings.weights_digest_every
        due = every > 0 and (position.global_step(self._settings.steps_per_epoch) + 1) % every == 0
        weights = self._weights_digest() if due else ""
        arrays, metadata = pack_outcome(outcome, learning_rate, weights)
        found = self._recorded(position, iteration)
        if found is not None:
            given = RecordedOutcome(**{name: float(array) for name, array in arrays.items()}, weights=weights)
            self.replayed_updates += 1
            if self._repeats(position, iteration, given, *found):
                return
        with self._uninterrupted():
            self.journal.record(position, iteration, arrays, metadata)

    def failed(self, error: Exception) -> None:
        """Note which error ends this start, for the history of the run."""
        # The journal itself may be what failed.
        with suppress(StorageError), self._uninterrupted():
            self.journal.note(None, FAILED, {"kind": type(error).__name__, "error": str(error)})

    def _recorded(self, position: Position, iteration: int) -> tuple[RecordedOutcome, SegmentName] | None:
        try:
            record = self.journal.find_outcome(position, iteration)
            if record is None:
                return None
            place = self.journal.inherited.outcomes[position, iteration]
            return unpack_outcome(record), place.segment.name
        except (CheckpointInvalid, ValueError) as error:
            self._notice(f"step {position}, update {iteration} is replayed without proof: {error}")
            return None

    def _repeats(
        self,
        position: Position,
        iteration: int,
        given: RecordedOutcome,
        recorded: RecordedOutcome,
        segment: SegmentName,
    ) -> bool:
        """Whether the bits are the same. Not, but acceptable: says so and returns False; else raises."""
        differing = _differing(given, recorded)
        if not differing:
            self.repeated_updates += 1
            return True
        where = f"step {position}, update {iteration}"
        values = "; ".join(
            f"{name} {getattr(given, name)!r} where {getattr(recorded, name)!r} was recorded"
            for name in differing
        )
        circumstances = _circumstances(
            self.journal.identity, self.journal.inherited.headers[segment].identity
        )
        if circumstances and _close(given, recorded):
            self._notice(f"{where}: replayed within tolerance, with {'; '.join(circumstances)}: {values}")
            return False
        reason = "; ".join(circumstances) or "versions, device and world size are those of the recording"
        if self._settings.on_divergence == "accept":
            self._notice(f"{where}: the replay diverged, and goes on as asked: {values} ({reason})")
            return False
        raise ReplayDiverged(
            f"{where}: the replay gave {values} ({reason})",
            hint="with the environment of the recording the replay repeats it; "
            "--on_divergence accept goes on with the new values, "
            "and an older checkpoint can tell where the difference begins",
        )


def open_rollout_log(
    *,
    sources: Sequence[Storage],
    storage: Storage,
    identity: Identity,
    start: Position,
    checkpoint: tuple[int, Position] | None,
    inherit_before: Position | None = None,
    finished: Position | None = None,
    settings: LogSettings,
    all_gather: Callable[[Any], list[Any]],
    notice: Notice,
    weights_digest: Callable[[], str] = lambda: "",
    uninterrupted: Uninterrupted = nullcontext,
) -> tuple[JournaledRollouts, JournalReport]:
    """What earlier starts left beyond `start`, agreed on by all ranks, and a journal that goes on from there.

    `sources`: the folders whose journals count, oldest first; empty for a new run. Those besides
    `storage` are only read. `checkpoint`: incarnation and position of the checkpoint that was restored.
    `inherit_before`: take over nothing of this position or later, to branch off there; None takes all.
    `finished`: steps before it are known to have been finished, whatever the journal says of them.
    Collective: what one rank raises, such as StorageError when it cannot read its journal, all raise.
    """

    def look() -> JournalView:
        return read_journal(
            sources,
            rank=identity.rank,
            since=start,
            before=inherit_before,
            checkpoint=checkpoint,
            run_id=identity.run_id,
        )

    view, answers = together(
        look, all_gather, tell=lambda view: _reach(view, identity, start, finished or start, settings)
    )
    agreed = _agree(answers, start, settings.steps_per_epoch, inherit_before)
    inherited = view.inherited(agreed.before)

    def begin() -> tuple[Journal, list[str]]:
        repaired = repair(storage, view)
        # Before the first checkpoint of this folder: from then on it is resumed by itself.
        adopt(storage, inherited)
        journal = Journal(storage, identity, start=start, inherited=inherited)
        if checkpoint is not None:
            journal.note(start, "resumed", _resumed(checkpoint[0], agreed, repaired, view.problems))
        return journal, repaired

    def chunks(_: tuple[Journal, list[str]]) -> list[int]:
        """Of the step that was under way: those that are used again, and those that are not."""
        reused = sum((agreed.until, chunk) in inherited.rollouts for chunk in range(settings.chunks_per_step))
        lost = sum(position >= agreed.finished for position, _ in view.rollouts.keys() - inherited.rollouts)
        return [reused, lost]

    (journal, repaired), counts = together(begin, all_gather, tell=chunks)
    log = JournaledRollouts(
        journal, settings, notice=notice, weights_digest=weights_digest, uninterrupted=uninterrupted
    )
    reused, lost = (sum(count) for count in zip(*counts, strict=True))
    return log, _report(agreed, start, reused, lost, repaired, settings, len(answers))


def _reach(
    view: JournalView, identity: Identity, start: Position, finished: Position, settings: LogSettings
) -> dict[str, Any]:
    """What a rank tells the others of its journal."""
    steps = settings.steps_per_epoch
    until = view.first_incomplete(start, chunks_per_step=settings.chunks_per_step, steps_per_epoch=steps)
    done = [position.following(steps) for position, _ in view.outcomes]
    # A step begins when those before it are finished.
    done += [position for position, _ in view.rollouts]
    return {
        "until": str(until),
        "finished": str(max([finished, start, *done])),
        "compatible": _compatible(view, identity),
        "problems": list(view.problems),
    }


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know after they have told each other what they have."""

    compatible: bool
    until: Position
    """Up to where steps are replayed."""
    before: Position
    """Before where records are inherited."""
    finished: Position
    problems: tuple[str, ...]


def _resumed(
    saved_by: int, agreed: _Agreed, repaired: Sequence[str], problems: Sequence[str]
) -> dict[str, Any]:
    """What the journal says of this start."""
    return {
        "saved_by": saved_by,
        "replay_until": str(agreed.until),
        "compatible": agreed.compatible,
        "repaired": list(repaired),
        "problems": list(problems),
    }


def _agree(
    answers: Sequence[dict[str, Any]], start: Position, steps_per_epoch: int, inherit_before: Position | None
) -> _Agreed:
    compatible = all(answer["compatible"] for answer in answers)
    until = min(Position.parse(answer["until"]) for answer in answers) if compatible else start
    before = until.following(steps_per_epoch) if compatible else start
    finished = max(Position.parse(answer["finished"]) for answer in answers)
    if inherit_before is not None:
        until, before = min(until, inherit_before), min(before, inherit_before)
        finished = min(finished, inherit_before)
    problems = tuple(
        f"rank {rank}: {problem}" if len(answers) > 1 else problem
        for rank, answer in enumerate(answers)
        for problem in answer["problems"]
    )
    return _Agreed(compatible, until, before, max(until, finished), problems)


def _report(
    agreed: _Agreed,
    start: Position,
    reused: int,
    lost_chunks: int,
    repaired: Sequence[str],
    settings: LogSettings,
    world_size: int,
) -> JournalReport:
    steps, chunks = settings.steps_per_epoch, settings.chunks_per_step * world_size
    replayed = agreed.until.global_step(steps) - start.global_step(steps)
    lost = agreed.finished.global_step(steps) - agreed.until.global_step(steps)
    return JournalReport(
        start=start,
        until=agreed.until,
        finished=agreed.finished,
        replayed_steps=replayed,
        replayed_chunks=replayed * chunks,
        reused_chunks=reused,
        lost_steps=lost,
        # What of the first lost step is left is used again.
        lost_chunks=lost_chunks + (lost * chunks - reused if lost else 0),
        compatible=agreed.compatible,
        repaired=tuple(repaired),
        problems=agreed.problems,
    )


def _compatible(view: JournalView, identity: Identity) -> bool:
    """Whether records of this history can be trained on here: same configuration, same number of ranks."""
    return all(
        header.identity.fingerprint == identity.fingerprint
        and header.identity.world_size == identity.world_size
        for header in view.headers.values()
    )


def _differing(given: RecordedOutcome, recorded: RecordedOutcome) -> list[str]:
    """The names whose bits are not the same; a digest counts where both have one."""
    names = [name for name in COMPARED if not same_bits(getattr(given, name), getattr(recorded, name))]
    if given.weights and recorded.weights and given.weights != recorded.weights:
        names.append("weights")
    return names


def _close(given: RecordedOutcome, recorded: RecordedOutcome) -> bool:
    return all(
        math.isclose(
            getattr(given, name),
            getattr(recorded, name),
            rel_tol=RELATIVE_TOLERANCE,
            abs_tol=ABSOLUTE_TOLERANCE,
        )
        for name in COMPARED
    )


def _circumstances(here: Identity, there: Identity) -> list[str]:
    """What is not as it was at the recording; exact repetition is promised where this is empty."""
    was, now = there.versions, here.versions
    found = [
        f"{name} {now.get(name, 'none')} instead of {was.get(name, 'none')}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if here.device != there.device:
        found.append(f"device {here.device} instead of {there.device}")
    if here.world_size != there.world_size:
        found.append(f"{here.world_size} workers instead of {there.world_size}")
    return found
