"""The trainer's `RolloutLog` over the journal.

Replay is not a mode of the trainer: it finds the chunks in the log instead of generating them, and the
outcome of an update is compared with the recorded one, to the last bit. `inheriting`, which is
collective, agrees on what a start takes over; `comparing` decides whether an update repeats its record.
This module has what both need to know about GRPO: a step is a fixed number of chunks, an epoch a fixed
number of steps, and an outcome a few numbers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rollforward.agreement import AllGather
from rollforward.errors import CheckpointInvalid
from rollforward.grpo.types import RolloutChunk, UpdateOutcome
from rollforward.position import Position
from rollforward.replay.codec import (
    ChunkShape,
    RecordedOutcome,
    pack,
    pack_outcome,
    unpack,
    unpack_outcome,
)
from rollforward.replay.comparing import Comparing, Notice, OnDivergence
from rollforward.replay.inheriting import JournalReport, Reach, Tally, note_failure, take_over
from rollforward.storage import Storage
from rollforward.store.journal.reading import JournalView
from rollforward.store.journal.records import Identity
from rollforward.store.journal.writing import Journal

COMPARED = ("loss", "grad_norm", "kl", "learning_rate")
"""The numbers of an outcome that a replay must repeat."""

Uninterrupted = Callable[[], AbstractContextManager[None]]
"""Entered around each write, so that a signal takes effect only when the record is whole."""


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """How the journal is used."""

    chunks_per_step: int
    steps_per_epoch: int
    on_divergence: OnDivergence = "stop"
    shape: ChunkShape | None = None
    """Of every chunk; a record with another shape is damaged. None: any shape that is consistent."""
    weights_digest_every: int = 0
    """Every this many steps, the outcome includes a digest of the policy; 0: never."""


class JournaledRollouts:
    """`grpo.ports.RolloutLog`. `weights_digest` returns a digest of the current policy."""

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
        self.unreadable_chunks = 0
        """Chunks that the journal had, but that could not be read intact when needed."""
        self._comparing = Comparing(journal.identity, notice=notice, on_divergence=settings.on_divergence)
        self._settings = settings
        self._notice = notice
        self._weights_digest = weights_digest
        self._uninterrupted = uninterrupted

    @property
    def replayed_updates(self) -> int:
        """Updates whose outcome was compared with a recorded one."""
        return self._comparing.replayed

    @property
    def repeated_updates(self) -> int:
        """Those of them that gave the same bits."""
        return self._comparing.repeated

    def find(self, position: Position, chunk: int) -> RolloutChunk | None:
        """The chunk, if an earlier start finished it and it can still be read intact."""
        try:
            record = self.journal.find_rollouts(position, chunk)
            return None if record is None else unpack(record, self._settings.shape)
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
        """Compare with the recorded outcome, or record it; ReplayDiverged when it differs."""
        every = self._settings.weights_digest_every
        due = every > 0 and (position.global_step(self._settings.steps_per_epoch) + 1) % every == 0
        weights = self._weights_digest() if due else ""
        arrays, metadata = pack_outcome(outcome, learning_rate, weights)
        found = self._recorded(position, iteration)
        if found is not None:
            recorded, by = found
            given = RecordedOutcome(**{name: float(array) for name, array in arrays.items()}, weights=weights)
            # Digests are compared only if both have one.
            digests = bool(weights and recorded.weights)
            where = f"step {position}, update {iteration}"
            if self._comparing.repeats(where, _values(given, digests), _values(recorded, digests), by):
                return
        with self._uninterrupted():
            self.journal.record(position, iteration, arrays, metadata)

    def failed(self, error: Exception) -> None:
        """Record which error ends this start, for the history of the run."""
        with self._uninterrupted():
            note_failure(self.journal, error)

    def _recorded(self, position: Position, iteration: int) -> tuple[RecordedOutcome, Identity] | None:
        try:
            record = self.journal.find_outcome(position, iteration)
            if record is None:
                return None
            place = self.journal.inherited.outcomes[position, iteration]
            return unpack_outcome(record), self.journal.inherited.headers[place.segment.name].identity
        except (CheckpointInvalid, ValueError) as error:
            self._notice(f"step {position}, update {iteration} is replayed without proof: {error}")
            return None


def _values(outcome: RecordedOutcome, digests: bool) -> dict[str, float | str]:
    values: dict[str, float | str] = {name: getattr(outcome, name) for name in COMPARED}
    return values | {"weights": outcome.weights} if digests else values


@dataclass(frozen=True, kw_only=True)
class FixedSteps:
    """`inheriting.Steps` of GRPO: fixed numbers of chunks per step and of steps per epoch."""

    settings: LogSettings
    start: Position
    finished: Position
    """Steps before it are known to have been finished, whatever the journal says."""

    def told(self, view: JournalView) -> Any:
        """How far a rank's whole steps reach, and how far it had come."""
        chunks, steps = self.settings.chunks_per_step, self.settings.steps_per_epoch
        until = view.first_incomplete(self.start, chunks_per_step=chunks, steps_per_epoch=steps)
        done = [position.following(steps) for position, _ in view.outcomes]
        # A step begins only when those before it are finished.
        done += [position for position, _ in view.rollouts]
        return {"until": str(until), "finished": str(max([self.finished, self.start, *done]))}

    def reach(self, told: Sequence[Any], *, compatible: bool) -> Reach:
        """What all ranks have, and the furthest that any had come."""
        until = min(Position.parse(each["until"]) for each in told) if compatible else self.start
        finished = max(Position.parse(each["finished"]) for each in told)
        return Reach(until=until, finished=max(until, finished))

    def behind(self, position: Position) -> Position:
        """The position of the next step."""
        return position.following(self.settings.steps_per_epoch)

    def tally(self, view: JournalView, inherited: JournalView, reach: Reach) -> Tally:
        """Counts steps by position: lost steps are lost whether or not the journal still has them."""
        chunks, steps = self.settings.chunks_per_step, self.settings.steps_per_epoch
        replayed = reach.until.global_step(steps) - self.start.global_step(steps)
        lost = reach.finished.global_step(steps) - reach.until.global_step(steps)
        reused = sum((reach.until, chunk) in inherited.rollouts for chunk in range(chunks))
        under_way = sum(key[0] >= reach.finished for key in view.rollouts.keys() - inherited.rollouts)
        return Tally(
            replayed_steps=replayed,
            replayed_chunks=replayed * chunks,
            reused_chunks=reused,
            lost_steps=lost,
            # What is left of the first lost step is used again.
            lost_chunks=under_way + (lost * chunks - reused if lost else 0),
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
    all_gather: AllGather,
    notice: Notice,
    weights_digest: Callable[[], str] = lambda: "",
    uninterrupted: Uninterrupted = nullcontext,
) -> tuple[JournaledRollouts, JournalReport]:
    """The log of a start, and what it takes over: see `inheriting.take_over`. Collective.

    `finished`: steps before it are known to have been finished, whatever the journal says.
    """
    journal, report = take_over(
        sources=sources,
        storage=storage,
        identity=identity,
        start=start,
        checkpoint=checkpoint,
        steps=FixedSteps(settings=settings, start=start, finished=finished or start),
        all_gather=all_gather,
        inherit_before=inherit_before,
    )
    log = JournaledRollouts(
        journal, settings, notice=notice, weights_digest=weights_digest, uninterrupted=uninterrupted
    )
    return log, report
