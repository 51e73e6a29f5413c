"""The rollouts and outcomes of one step, for inspecting a run: a GRPO run, or an `open_run` loop.

Reads the newest history from the folders of all ranks, and changes nothing on disk. What could not be read is
reported and left out. Texts are not made here: that takes the run's tokenizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollforward.errors import CheckpointInvalid, NothingToResume
from rollforward.grpo.types import RolloutChunk
from rollforward.position import Position
from rollforward.replay import once
from rollforward.replay.codec import RecordedOutcome, unpack, unpack_outcome
from rollforward.replay.recorded_steps import CHUNKS
from rollforward.storage import Storage
from rollforward.store import strictjson
from rollforward.store.journal.history import history
from rollforward.store.journal.reading import JournalView, Key, journal_ranks, read_journal, read_starts
from rollforward.store.journal.records import Identity, Record
from rollforward.store.journal.segments import Place, Records
from rollforward.store.journal.timeline import choose_history


@dataclass(frozen=True, kw_only=True)
class JournaledChunk:
    """A chunk as one rank journaled it."""

    rank: int
    chunk: int
    """Its number in the step; in journals of format version 1, among the rank's own."""
    rollouts: RolloutChunk
    identity: Identity
    """Who wrote it; its `about` has what the run said about itself, such as the names of its verifiers."""
    time: str
    """UTC."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A summary of what `Run.once` recorded."""

    rank: int
    chunk: int
    """Which call in the step it was."""
    name: str
    arrays: Mapping[str, str]
    """Name -> dtype and shape."""
    info: Any
    """The JSON value that was given with them, or None."""


@dataclass(frozen=True, kw_only=True)
class JournaledStep:
    """What the journal has about a step."""

    position: Position
    chunks: tuple[JournaledChunk, ...]
    """In order; for a GRPO run."""
    outcomes: Mapping[int, RecordedOutcome]
    """By iteration. They cover all ranks together, so one rank's are enough."""
    made: tuple[Made, ...]
    """By rank and chunk; for an `open_run` loop."""
    numbers: Mapping[int, Mapping[str, float]]
    """Rank -> what the loop gave as the outcome of the step."""
    problems: tuple[str, ...]
    """What could not be read, one line each."""


def read_step(storage: Storage, position: Position) -> JournaledStep:
    """All chunks and outcomes of a step; NothingToResume, listing what there is, if the journal has none."""
    return step_in(storage, index_step(storage, position), position)


def index_step(storage: Storage, position: Position) -> dict[int, JournalView]:
    """Where the records of a step are, by rank."""
    ranks, behind = journal_ranks(storage), Position(position.epoch, position.step + 1)
    newest = choose_history(read_starts([storage], ranks=ranks), None)
    return {
        rank: read_journal([storage], rank=rank, since=position, before=behind, history=newest)
        for rank in ranks
    }


def step_in(storage: Storage, index: Mapping[int, JournalView], position: Position) -> JournaledStep:
    """One of the steps of an index, which has the places of its records by rank; like `read_step`."""
    chunks: list[JournaledChunk] = []
    outcomes: dict[int, RecordedOutcome] = {}
    made: list[Made] = []
    numbers: dict[int, dict[str, float]] = {}
    problems: list[str] = []
    for rank, view in index.items():
        problems += view.problems
        for (_, number), place, record in _records(view.rollouts, position, problems):
            try:
                if once.FORM in record.metadata:
                    made.append(_made(rank, number, record))
                else:
                    chunks.append(_chunk(rank, number, record, place, view))
            except ValueError as error:
                problems.append(f"{place.segment}, byte {place.offset}: {error}")
        for (_, iteration), place, record in _records(view.outcomes, position, problems):
            try:
                if CHUNKS in record.metadata:
                    numbers[rank] = {name: float(array) for name, array in record.arrays.items()}
                else:
                    outcomes.setdefault(iteration, unpack_outcome(record))
            except ValueError as error:
                problems.append(f"{place.segment}, byte {place.offset}: {error}")
    if not (chunks or outcomes or made or numbers):
        lines = [f"the journal in {storage} has no record of step {position}"]
        raise NothingToResume(
            "\n".join([*lines, *(f"  {line}" for line in (*problems, *_what_there_is(storage)))]),
            hint="name one of the steps above; the journal reaches back to the oldest kept checkpoint, and "
            "rl_config.save_max_ckpt_num (keep, of open_run) says how many are kept",
        )
    return JournaledStep(
        position=position,
        chunks=tuple(_each_once(chunks)),
        outcomes=outcomes,
        made=tuple(made),
        numbers=numbers,
        problems=tuple(problems),
    )


def _records(
    places: Mapping[Key, Place], position: Position, problems: list[str]
) -> Iterator[tuple[Key, Place, Record]]:
    of_step = ((key, place) for key, place in places.items() if key[0] == position)
    with Records() as records:
        for key, place in sorted(of_step, key=lambda item: item[0]):
            try:
                yield key, place, records.read(place)
            except CheckpointInvalid as error:
                problems.append(error.message)


def _each_once(chunks: Sequence[JournaledChunk]) -> list[JournaledChunk]:
    """Where two ranks have a chunk, since a start with fewer workers made it again, the newer one counts."""
    found: dict[tuple[int, int], JournaledChunk] = {}
    for chunk in sorted(chunks, key=lambda chunk: chunk.identity.incarnation):
        of_step = chunk.identity.chunks_per_step is not None
        found[0 if of_step else chunk.rank, chunk.chunk] = chunk
    return [found[key] for key in sorted(found)]


def _chunk(rank: int, number: int, record: Record, place: Place, view: JournalView) -> JournaledChunk:
    return JournaledChunk(
        rank=rank,
        chunk=number,
        rollouts=unpack(record),
        identity=view.headers[place.segment.name].identity,
        time=record.time,
    )


def _made(rank: int, number: int, record: Record) -> Made:
    info = record.metadata.get(once.INFO)
    return Made(
        rank=rank,
        chunk=number,
        name=record.metadata.get(once.NAME, ""),
        arrays={name: f"{array.dtype} {list(array.shape)}" for name, array in record.arrays.items()},
        info=None if info is None else strictjson.parse(info.encode()),
    )


def _what_there_is(storage: Storage) -> list[str]:
    """The steps in the journal, one line for each start of each rank."""
    lines = []
    for rank in journal_ranks(storage):
        for start in history(storage, rank):
            reach = f"steps {start.first} to {start.last}" if start.first is not None else "no step"
            lines.append(f"rank {rank}, start {start.incarnation}: {reach}")
    return lines or ["there is no journal"]
