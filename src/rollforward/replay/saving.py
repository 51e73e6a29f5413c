"""Checkpoints saved in the background, with the journal kept in step.

At most one is in progress. If one is due and the last is still being written, the disk is slower than the
steps. The loop waits `PATIENCE` seconds for it, once in a run; then it says so, and from there on what is due
begins after the first step that finds the last one written. Only for what retention counts on does it wait.

Starting a checkpoint also starts a journal segment, so that old segments can be removed along with
old checkpoints. The result of each checkpoint is logged at the next step boundary, one line each; a
failure does not end the run, unless nothing newer succeeds before the run is over.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.replay.cadence import Cadence, Every
from rollforward.store import CheckpointStore, Saved, ShadowCheckpoints
from rollforward.store.catalog import oldest_position
from rollforward.store.journal.writing import Journal
from rollforward.store.live import Live, as_live
from rollforward.store.saved import About, Spent
from rollforward.tensors import Held
from rollforward.wording import counted, in_bytes

PATIENCE = 5.0
"""Seconds that steps wait in all for saves that are still being written when the next is due."""
INTERVAL = "save_interval"
"""In a checkpoint's state: the interval that was chosen, and why."""


class JournaledCheckpoints:
    """`ShadowCheckpoints` over `store`, and the journal. Collective: all ranks call each method alike.

    `live` is what is saved, and `about` goes to every checkpoint, as for `ShadowCheckpoints`. `say` gets
    what is the same on all ranks, `warn` what went wrong on this one. `committed` is called for each
    committed checkpoint, `failed` when one could not be saved, `suspicious` when one seems to have learned
    nothing. `cadence` decides when one is due.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journal: Journal,
        live: Live | Callable[[], Held],
        about: About,
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        committed: Callable[[Position], None] = lambda _: None,
        failed: Callable[[], None] = lambda: None,
        suspicious: Callable[[], None] = lambda: None,
        cadence: Cadence | None = None,
        prove_unchanged: bool = False,
    ) -> None:
        self._store = store
        self._journal = journal
        self._live = as_live(live)
        self._about = about
        self._say = say
        self._warn = warn
        self._committed = committed
        self._failed = failed
        self._suspicious = suspicious
        self._cadence = cadence or Cadence()
        self._patience = PATIENCE
        self._counted = 0.0
        """Of the journal's seconds for checkpoints, how many have been charged to one."""
        self._auto = False
        """Whether the interval is chosen here."""
        store.restored(self._live)
        self._shadow = ShadowCheckpoints(
            store,
            self._live,
            about,
            saved=self._saved,
            failed=self._not_saved,
            warned=warn,
            tidied=self._prune_journal,
            advise=self._advise,
            prove_unchanged=prove_unchanged,
        )

    def due(self, global_step: int, every: Every) -> bool:
        """Whether a checkpoint should begin now; asked after each step. Collective."""
        cadence = self._cadence
        self._auto = every == "auto"
        if not cadence.due(global_step, every):
            return False
        patience = 0.0 if every == "auto" else self._patience
        if cadence.must(global_step, every) or self._shadow.can_begin(patience):
            return True
        cadence.put_off()
        if every != "auto" and self._patience:
            self._say(f"warning: {cadence.slow(global_step, every, *self._shadow.under_way())}")
            self._patience = 0.0
        return False

    def save_now(self, position: Position, global_step: int, state: Mapping[str, Any]) -> None:
        """Save and commit before this returns. StorageError on all ranks when one cannot."""
        self._journal.checkpoint_begun()
        description = self._about.at(position, global_step, state)
        self._saved(self._store.save_described(description, self._live))
        for warning in self._prune_journal():
            self._warn(warning)

    def begin(self, position: Position, global_step: int, state: Mapping[str, Any]) -> None:
        """Start saving the current state, and return."""
        self._journal.checkpoint_begun()
        self._cadence.begun(global_step)
        if self._auto:
            state = {**state, INTERVAL: {"steps": self._cadence.interval, "why": self._cadence.why}}
        self._shadow.begin(position, global_step, state=state)

    def before_update(self) -> None:
        """The tensors may change once this returns."""
        self._shadow.before_update()

    def boundary(self) -> None:
        """Commit what all ranks have written, and log it."""
        self._shadow.boundary()

    def close(self) -> None:
        """Commit the save in progress. StorageError when the newest state could not be saved."""
        self._shadow.close()

    def abandon(self) -> None:
        """Leave the save in progress uncommitted; nothing more is written once this returns."""
        self._shadow.abandon()

    def _advise(self, spent: Spent) -> dict[str, Any]:
        """What a save cost includes what the journal did for it."""
        before, self._counted = self._counted, self._journal.seconds_for_checkpoints
        return self._cadence.advise(replace(spent, blocked=spent.blocked + self._counted - before))

    def _saved(self, result: Saved) -> None:
        position = result.manifest.position
        self._committed(position)
        self._say(
            f"checkpoint: {position} saved to {self._store.storage}, "
            f"{in_bytes(result.bytes_written)} written in {result.seconds:.2f} s, "
            f"training waited {result.blocked:.3f} s"
        )
        for warning in result.warnings:
            self._warn(warning)
        if result.advice is not None and self._cadence.follow(result.advice) and self._auto:
            every = self._cadence.interval
            self._say(f"checkpoints: every {counted(every, 'step')} from now on: {self._cadence.why}")
        if result.suspicion is not None:
            self._suspicious()
            self._say(f"warning: {result.suspicion}")

    def _prune_journal(self) -> list[str]:
        """Remove what no replay from a remaining checkpoint can need; returns warnings."""
        try:
            self._journal.prune(oldest_position(self._store.storage))
        except StorageError as error:
            return [f"an old journal segment could not be removed: {error.message}"]
        return []

    def _not_saved(self, error: StorageError) -> None:
        self._failed()
        # All ranks fail together, so the first one reports for all.
        hint = f". Try: {error.hint}" if error.hint else ""
        self._say(f"warning: {error.message}{hint}")
