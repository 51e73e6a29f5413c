"""The trainer's `RolloutLog` over the journal.

Replay is not a mode of the trainer: it finds the chunks in the log instead of generating them, and the
outcome of an update is compared with the recorded one, to the last bit. `inheriting`, which is
collective, agrees on what a start takes over; `comparing` decides whether an update repeats its record.
This module has what both need to know about GRPO: a step is a fixed number of chunks, an epoch a fixed
number of steps, and an outcome a few numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from rollforward.agreement import AllGather
from rollforward.errors import CheckpointInvalid
from rollforward.grpo.addition import share
from rollforward.grpo.ports import Group
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
"""The numbers of an outcome that a replay must repeat, where the objective has a KL term."""

WITHOUT_KL = tuple(name for name in COMPARED if name != "kl")
"""Where it has none: earlier versions measured the KL nevertheless."""

Uninterrupted = Callable[[], AbstractContextManager[None]]
"""Entered around each write, so that a signal takes effect only when the record is whole."""


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """How the journal is used."""

    chunks_per_step: int
    """Over all workers; they are numbered so."""
    steps_per_epoch: int
    on_divergence: OnDivergence = "stop"
    shape: ChunkShape | None = None
    """Of every chunk; a record with another shape is damaged. None: any shape that is consistent."""
    compared: Sequence[str] = COMPARED
    """The numbers of an outcome that a replay must repeat."""
    weights_digest_every: int = 0
    """Every this many steps, the outcome includes a digest of the policy; 0: never."""
    model_parallel: int = 1
    """Workers, neighbours by rank, that hold the model together and work on the same chunks."""


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
            if self._comparing.repeats(
                where, self._values(given, digests), self._values(recorded, digests), by
            ):
                return
        with self._uninterrupted():
            self.journal.record(position, iteration, arrays, metadata)

    def failed(self, error: Exception) -> None:
        """Record which error ends this start, for the history of the run."""
        with self._uninterrupted():
            note_failure(self.journal, error)

    def _values(self, outcome: RecordedOutcome, digests: bool) -> dict[str, float | str]:
        values: dict[str, float | str] = {name: getattr(outcome, name) for name in self._settings.compared}
        return values | {"weights": outcome.weights} if digests else values

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


class TeamRollouts:
    """`grpo.ports.RolloutLog` of workers that make the same samples together: the first keeps the chunks.

    All read them, from its folder, and each compares and records outcomes. `find` is collective for the team.
    """

    def __init__(self, log: JournaledRollouts, team: Group) -> None:
        self._log = log
        self._team = team

    def find(self, position: Position, chunk: int) -> RolloutChunk | None:
        """The chunk, if all can read it: what one does not find, all make again."""
        found = self._log.find(position, chunk)
        return found if all(self._team.all_gather(found is not None)) else None

    def append(self, position: Position, chunk: int, rollouts: RolloutChunk) -> None:
        """Returns, on the first, when the chunk is on stable storage: no update is done without it."""
        if self._team.rank == 0:
            self._log.append(position, chunk, rollouts)

    def record(
        self, position: Position, iteration: int, outcome: UpdateOutcome, learning_rate: float
    ) -> None:
        """On all: compare with the recorded outcome, or record it."""
        self._log.record(position, iteration, outcome, learning_rate)


@dataclass(kw_only=True)
class FixedSteps:
    """`inheriting.Steps` of GRPO: fixed numbers of chunks per step and of steps per epoch."""

    settings: LogSettings
    own: range
    """The chunks that this rank works on."""
    counts: bool = True
    """Whether they are this rank's in the report; no other rank that works on them may count them too."""
    start: Position
    finished: Position
    """Steps before it are known to have been finished, whatever the journal says."""
    have: dict[Position, set[int]] = field(default_factory=dict)
    """Once all have told: the chunks of each step that are in some folder."""

    def told(self, view: JournalView) -> dict[str, Any]:
        """The chunks and updates of each step, and how far the writer had come."""
        chunks: dict[Position, list[int]] = {}
        for position, chunk in sorted(view.rollouts):
            chunks.setdefault(position, []).append(chunk)
        updates = sorted({position for position, _ in view.outcomes})
        done = [position.following(self.settings.steps_per_epoch) for position in updates]
        # A step begins only when those before it are finished.
        done += chunks
        return {
            "chunks": [[str(position), _as_ranges(found)] for position, found in chunks.items()],
            "updates": [str(position) for position in updates],
            "finished": str(max([self.finished, self.start, *done])),
        }

    def reach(self, told: Mapping[int, Any], *, compatible: bool) -> Reach:
        """A step is whole when all its chunks are there, whoever's folders they are in."""
        for each in told.values():
            for position, chunks in _chunks_of(each).items():
                self.have.setdefault(position, set()).update(chunks)
        until, whole = self.start, set(range(self.settings.chunks_per_step))
        while compatible and whole <= self.have.get(until, set()):
            until = until.following(self.settings.steps_per_epoch)
        finished = max(Position.parse(each["finished"]) for each in told.values())
        return Reach(until=until, finished=max(until, finished))

    def needed(self, told: Mapping[int, Any], reach: Reach) -> set[int]:
        """Folders with chunks of this rank's, and for every update one that has its outcome."""
        found = {
            rank
            for rank, each in told.items()
            for position, chunks in _chunks_of(each).items()
            if position <= reach.until and not chunks.isdisjoint(self.own)
        }
        proved = {text for rank in found for text in told[rank]["updates"]}
        for rank, each in sorted(told.items()):
            updates = {text for text in each["updates"] if Position.parse(text) < reach.until}
            if not updates <= proved:
                found.add(rank)
                proved |= updates
        return found

    def behind(self, position: Position) -> Position:
        """The position of the next step."""
        return position.following(self.settings.steps_per_epoch)

    def tally(self, view: JournalView, inherited: JournalView, reach: Reach) -> Tally:  # noqa: ARG002
        """Counts steps by position: lost steps are lost whether or not the journal still has them."""
        own = self.own if self.counts else range(0)
        steps = self.settings.steps_per_epoch
        replayed = reach.until.global_step(steps) - self.start.global_step(steps)
        lost = reach.finished.global_step(steps) - reach.until.global_step(steps)
        reused = sum((reach.until, chunk) in inherited.rollouts for chunk in own)
        under_way = sum(
            (position, chunk) not in inherited.rollouts
            for position, chunks in self.have.items()
            for chunk in chunks.intersection(own)
            if position >= reach.finished
        )
        return Tally(
            replayed_steps=replayed,
            replayed_chunks=replayed * len(own),
            reused_chunks=reused,
            lost_steps=lost,
            # What is left of the first lost step is used again.
            lost_chunks=under_way + (lost * len(own) - reused if lost else 0),
        )


def _as_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [first, end] of each run without a gap: workers have many chunks side by side."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found


def _chunks_of(told: Any) -> dict[Position, set[int]]:
    return {
        Position.parse(text): {chunk for first, end in ranges for chunk in range(first, end)}
        for text, ranges in told["chunks"]
    }


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
    identity = replace(identity, chunks_per_step=settings.chunks_per_step)
    replica, part = divmod(identity.rank, settings.model_parallel)
    own = share(settings.chunks_per_step, identity.world_size // settings.model_parallel, replica)
    journal, report = take_over(
        sources=sources,
        storage=storage,
        identity=identity,
        start=start,
        checkpoint=checkpoint,
        steps=FixedSteps(
            settings=settings, own=own, counts=part == 0, start=start, finished=finished or start
        ),
        all_gather=all_gather,
        inherit_before=inherit_before,
    )
    log = JournaledRollouts(
        journal, settings, notice=notice, weights_digest=weights_digest, uninterrupted=uninterrupted
    )
    return log, report
