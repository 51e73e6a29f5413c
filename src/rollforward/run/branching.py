"""Going back to an earlier step of a run, to branch off there or to rebuild its checkpoint.

    checkpoint at S      the newest valid one at or before the step asked for
    S ... P-1            replayed from the journal: every chunk must be there, in whichever rank's folder
    P                    reached, bit for bit as a run that stopped there would have saved it

All of this is checked before anything is written, so an unreachable step is refused instead of
half built. Nothing of P or later is taken over.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rollforward.errors import CheckpointMismatch, ConfigError, NothingToResume
from rollforward.position import Position
from rollforward.run.facts import differences, fingerprints
from rollforward.storage import Storage
from rollforward.store import Manifest
from rollforward.store.journal.reading import journal_ranks, read_journals, read_starts
from rollforward.store.journal.timeline import choose_history

_SHOWN = 8


def check_named(position: Position, steps_per_epoch: int, end: Position) -> None:
    """Raise ConfigError for a position that this run does not have."""
    if position.step >= steps_per_epoch:
        raise ConfigError(
            f"there is no step {position}: an epoch has {steps_per_epoch} steps",
            hint=f"the last one of epoch {position.epoch} is {position.epoch}_{steps_per_epoch - 1}, "
            f"and after it comes {position.epoch + 1}_0",
        )
    if position > end:
        raise ConfigError(
            f"position {position} is after the run's end, {end}",
            hint="rl_config.epochs and rl_config.max_steps say where a run ends",
        )


def check_reach(
    storage: Storage,
    manifest: Manifest,
    position: Position,
    *,
    fingerprint: str,
    also: Collection[str],
    chunks_per_step: int,
    steps_per_epoch: int,
) -> None:
    """Raise NothingToResume unless the journals of all ranks lead from the checkpoint to the position.

    CheckpointMismatch when records on the way were made with a different configuration than that of
    `fingerprint`; `also` holds digests of the same configuration as earlier versions computed them.
    """
    names = {fingerprint, *also}
    starts = read_starts([storage], ranks=journal_ranks(storage), run_id=manifest.run_id)
    view = read_journals(
        [storage],
        since=manifest.position,
        before=position,
        run_id=manifest.run_id,
        checkpoint=manifest.order,
        history=choose_history(starts, manifest.order, fingerprint=fingerprint, also=also),
        chunks_per_step=chunks_per_step,
    )
    others = [writer.incarnation for writer in view.writers if writer.fingerprint not in names]
    if others:
        raise CheckpointMismatch(
            f"steps between checkpoint {manifest.position} and {position} were made with another "
            f"configuration (by start {min(others)}), so they cannot be replayed with this one",
            hint="use the configuration of that start",
        )
    reached = view.first_incomplete(
        manifest.position, chunks_per_step=chunks_per_step, steps_per_epoch=steps_per_epoch
    )
    if reached < position:
        missing = [chunk for chunk in range(chunks_per_step) if (reached, chunk) not in view.rollouts]
        lines = [
            f"step {position} cannot be reached: from checkpoint {manifest.position} in {storage} the "
            f"journal leads up to {reached} only, where {_chunks(missing, chunks_per_step)} missing",
            *(f"  {problem}" for problem in view.problems),
            *(f"  {segment}: cut off at byte {end.offset}: {end.problem}" for segment, end in view.torn),
        ]
        raise NothingToResume("\n".join(lines), hint=f"{reached} and every step before it can be reached")


def _chunks(missing: Sequence[int], chunks_per_step: int) -> str:
    if len(missing) == chunks_per_step:
        return "all chunks are"
    named = ", ".join(map(str, missing[:_SHOWN])) + ", ..." * (len(missing) > _SHOWN)
    return f"chunk {named} is" if len(missing) == 1 else f"chunks {named} are"


def facts_of(manifest: Manifest) -> Mapping[str, Any]:
    """The facts of the run when a checkpoint was saved; empty when the checkpoint has none."""
    found = manifest.state.get("facts")
    return found if isinstance(found, dict) else {}


def check_same_facts(manifest: Manifest, facts: Mapping[str, Any], position: Position) -> None:
    """Raise CheckpointMismatch if what affects the numbers has changed: the steps would not repeat."""
    before = facts_of(manifest)
    if manifest.fingerprint in fingerprints(facts, before):
        return
    lines = differences(before, facts)
    raise CheckpointMismatch(
        "\n".join(
            [
                f"step {position} is reached by replaying steps from checkpoint {manifest.position} on, "
                "which takes the configuration that they were made with; since then",
                *(f"  {line}" for line in lines),
            ]
        ),
        hint=f"rollforward rebuild RUN --to {position} --out NEW, with the run's own configuration, makes a "
        "checkpoint of that step; a run that is resumed from NEW may have another configuration",
    )
