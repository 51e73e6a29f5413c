"""What a start takes over from the journal: all ranks agree where the replay ends, then continue from there.

    newest checkpoint at S      S, S+1, ... T-1: whole: replayed
                                T: the first step that is not: its finished chunks are used again
                                beyond T: nothing is taken over

Only the run knows how steps are counted and when one is whole: `Steps` says so. Nothing here knows what the
records contain.

A run may have had another number of workers before: then a rank's records lie in folders of other ranks.
Each rank reads the folders that it looks after, all tell what they found, and then each reads, of the other
folders, those that have something that it needs (`Steps.needed`).

Left out: choosing the checkpoint to start from, and the incarnation; `recovery` and the store do that.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from rollforward.agreement import AllGather, together
from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.journal.reading import JournalView, merged, read_journal, read_starts
from rollforward.store.journal.records import Identity
from rollforward.store.journal.timeline import Start, choose_history, of_all_ranks
from rollforward.store.journal.upkeep import adopt, looked_after, repair, settle
from rollforward.store.journal.writing import Journal

FAILED = "failed"
"""The journal event that says which error ended a start."""
FINISHED = "finished"
"""The journal event that says that a start reached the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far the ranks have come together."""

    until: Position
    """T: the first step that is not whole on every rank."""
    finished: Position
    """The first step that no rank has finished or begun to finish: `until`, or a later one."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What is taken over and what is not. Steps count for the run, chunks for one rank: those it works on."""

    replayed_steps: int
    replayed_chunks: int
    reused_chunks: int
    """Finished chunks of step `until`."""
    lost_steps: int
    lost_chunks: int
    """Finished chunks that are not used again."""


class Steps(Protocol):
    """How a run counts its steps, and when one is whole."""

    def told(self, view: JournalView) -> Any:
        """What the ranks tell each other about one folder of the journal: anything JSON can hold."""
        ...

    def reach(self, told: Mapping[int, Any], *, compatible: bool) -> Reach:
        """The conclusion from what was told of each rank's folder; nothing is replayed unless compatible."""
        ...

    def needed(self, told: Mapping[int, Any], reach: Reach) -> set[int]:
        """The ranks whose folders have something that this rank will replay or use again."""
        ...

    def behind(self, position: Position) -> Position:
        """A position after every record of this step, and not after any record of a later step."""
        ...

    def tally(self, view: JournalView, inherited: JournalView, reach: Reach) -> Tally:
        """Count: `view` is what this rank has read, `inherited` the part that is taken over."""
        ...


@dataclass(frozen=True, kw_only=True)
class JournalReport:
    """What a start takes over; the same on all ranks except for `repaired`."""

    start: Position
    until: Position
    """T: the steps from `start` up to this one, not including it, are replayed."""
    finished: Position
    """The first step that is new: `until`, or a later one if finished steps are lost."""
    replayed_steps: int
    replayed_chunks: int
    """Chunks of the steps that are replayed, on all ranks."""
    reused_chunks: int
    """Finished chunks of step `until`, on all ranks."""
    lost_steps: int
    """Finished steps that cannot be replayed: those from `until` up to, not including, `finished`."""
    lost_chunks: int
    """Finished chunks that are not used again, on all ranks: of lost steps, and of step `finished`."""
    compatible: bool
    """False when the records were made with another configuration: none are used."""
    repaired: tuple[str, ...]
    """Torn ends that were cut, one line each."""
    problems: tuple[str, ...]
    """Damage, on all ranks, one line each."""
    passed_over: tuple[int, ...] = ()
    """Newer starts from the same checkpoint with another configuration: nothing they did is used."""


def take_over(
    *,
    sources: Sequence[Storage],
    storage: Storage,
    identity: Identity,
    start: Position,
    checkpoint: tuple[int, Position] | None,
    steps: Steps,
    all_gather: AllGather,
    inherit_before: Position | None = None,
) -> tuple[Journal, JournalReport]:
    """What earlier starts left beyond `start`, agreed on by all ranks, and a journal to continue from there.

    `sources`: the folders whose journals count, oldest first; empty for a new run. Those besides
    `storage` are only read. `checkpoint`: incarnation and position of the checkpoint that was restored.
    `inherit_before`: take over nothing from this position on, to branch off there; None takes everything.
    Collective: what one rank raises, such as StorageError when it cannot read its journal, all raise.
    """
    own, starts = _survey(sources, identity, all_gather)
    chosen = choose_history(
        starts,
        checkpoint,
        fingerprint=identity.fingerprint,
        also=identity.fingerprints,
        world_size=identity.ranks_that_count,
    )
    look = partial(
        _look,
        sources,
        since=start,
        before=inherit_before,
        run_id=identity.run_id,
        checkpoint=checkpoint,
        history=chosen,
        chunks_per_step=identity.chunks_per_step,
    )

    def tell(views: Mapping[int, JournalView]) -> dict[str, Any]:
        return {
            "compatible": all(_compatible(view, identity) for view in views.values()),
            "problems": [problem for view in views.values() for problem in view.problems],
            "folders": [[rank, steps.told(view)] for rank, view in views.items()],
        }

    views, answers = together(lambda: look(own), all_gather, tell=tell)
    compatible = all(answer["compatible"] for answer in answers)
    told = {rank: each for answer in answers for rank, each in answer["folders"]}
    reach = steps.reach(told, compatible=compatible)
    before = steps.behind(reach.until) if compatible else start
    if inherit_before is not None:
        before = min(before, inherit_before)
        until = min(reach.until, inherit_before)
        reach = Reach(until=until, finished=max(until, min(reach.finished, inherit_before)))
    missing = steps.needed(told, reach) - views.keys() if compatible else set()
    # By all before any begins: a journal that has begun is not what was told of.
    of_others, _ = together(lambda: look(missing), all_gather, tell=lambda _: None)
    ours = merged(list(views.values()))
    view = merged([*views.values(), *of_others.values()])
    inherited = view.inherited(before)
    problems = _with_ranks([answer["problems"] for answer in answers])

    def begin() -> tuple[Journal, list[str]]:
        repaired = repair(storage, ours)
        settle(storage, ours.inherited(before))
        # Before the first checkpoint of this folder: from then on the folder alone is enough to resume.
        adopt(storage, ours.inherited(before))
        journal = Journal(storage, identity, start=start, inherited=inherited)
        if checkpoint is not None:
            detail = {
                "saved_by": checkpoint[0],
                "replay_until": str(reach.until),
                "compatible": compatible,
                "repaired": repaired,
                "problems": list(problems),
            }
            journal.note(start, "resumed", detail)
        return journal, repaired

    tally = steps.tally(view, inherited, reach)
    (journal, repaired), tallies = together(begin, all_gather, tell=lambda _: vars(tally))
    return journal, JournalReport(
        start=start,
        until=reach.until,
        finished=reach.finished,
        replayed_steps=max(each["replayed_steps"] for each in tallies),
        replayed_chunks=sum(each["replayed_chunks"] for each in tallies),
        reused_chunks=sum(each["reused_chunks"] for each in tallies),
        lost_steps=max(each["lost_steps"] for each in tallies),
        lost_chunks=sum(each["lost_chunks"] for each in tallies),
        compatible=compatible,
        repaired=tuple(repaired),
        problems=problems,
        passed_over=tuple(
            other.incarnation
            for other in starts
            if chosen is not None and other.worked and other.incarnation > chosen.incarnation
        ),
    )


def _survey(
    sources: Sequence[Storage], identity: Identity, all_gather: AllGather
) -> tuple[list[int], list[Start]]:
    """The ranks whose folders this one reads for all, and the starts that any rank knows of. Collective."""

    def survey() -> tuple[list[int], list[Start]]:
        ranks = [identity.rank]
        if identity.ranks_that_count is None:
            ranks = looked_after(*sources, rank=identity.rank, world_size=identity.world_size)
        return ranks, read_starts(sources, ranks=ranks, run_id=identity.run_id)

    (ranks, _), told = together(survey, all_gather, tell=lambda found: list(map(_as_json, found[1])))
    return ranks, of_all_ranks([_from_json(start) for start in starts] for starts in told)


def _look(sources: Sequence[Storage], ranks: Iterable[int], **how: Any) -> dict[int, JournalView]:
    return {rank: read_journal(sources, rank=rank, **how) for rank in ranks}


def note_failure(journal: Journal, error: Exception) -> None:
    """Record which error ends this start, for the history of the run."""
    # The journal itself may be what failed.
    with suppress(StorageError):
        journal.note(None, FAILED, {"kind": type(error).__name__, "error": str(error)})


def _compatible(view: JournalView, identity: Identity) -> bool:
    """Whether records of this history can be used here."""
    return all(identity.is_configured_as(writer) for writer in view.writers)


def _as_json(start: Start) -> list[Any]:
    lineage = [[number, None if end is None else str(end)] for number, end in start.lineage.items()]
    return [start.incarnation, start.fingerprint, start.world_size, lineage, start.worked]


def _from_json(told: Sequence[Any]) -> Start:
    incarnation, fingerprint, world_size, lineage, worked = told
    return Start(
        incarnation=incarnation,
        fingerprint=fingerprint,
        world_size=world_size,
        lineage={number: None if end is None else Position.parse(end) for number, end in lineage},
        worked=worked,
    )


def _with_ranks(problems: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(
        f"rank {rank}: {problem}" if len(problems) > 1 else problem
        for rank, found in enumerate(problems)
        for problem in found
    )
