"""Checkpoints in the shadow of what a run does besides, with the journal kept in step.

A checkpoint that begins begins a journal segment too, so that old segments can go when old
checkpoints do. What comes of a checkpoint is told at the next step boundary, a line each; one
that fails does not end the run, unless nothing newer succeeds until the run is over.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import CheckpointStore, Saved, ShadowCheckpoints
from rollforward.store.checkpoints import Tensors
from rollforward.store.journal.writing import Journal
from rollforward.store.layout import COMMITS, parse_manifest_name
from rollforward.wording import in_bytes


class JournaledCheckpoints:
    """`ShadowCheckpoints` over `store`, and the journal. Collective: all ranks call each method alike.

    `tensors` gives the live arrays, and `about` goes to every checkpoint, as for `ShadowCheckpoints`.
    `say` is told of each checkpoint, `warn` of what goes wrong, `failed` when one could not be saved.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journal: Journal,
        tensors: Callable[[], Tensors],
        about: Mapping[str, Any],
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._journal = journal
        self._tensors = tensors
        self._about = about
        self._say = say
        self._warn = warn
        self._failed = failed
        self._shadow = ShadowCheckpoints(
            store, tensors, about, saved=self._saved, failed=self._not_saved, warned=warn
        )

    def save_now(self, position: Position, global_step: int, state: Mapping[str, Any]) -> None:
        """Save and commit before this returns. StorageError on all ranks when one cannot."""
        self._journal.checkpoint_begun()
        about = {**self._about, "state": state}
        self._saved(self._store.save(position, self._tensors(), global_step=global_step, **about))

    def begin(self, position: Position, global_step: int, state: Mapping[str, Any]) -> None:
        """Start to save the state as it is now, and return."""
        self._journal.checkpoint_begun()
        self._shadow.begin(position, global_step, state=state)

    def before_update(self) -> None:
        """The arrays may change once this returns."""
        self._shadow.before_update()

    def boundary(self) -> None:
        """Commit what all ranks have written, and tell of it."""
        self._shadow.boundary()

    def close(self) -> None:
        """Commit what is under way. StorageError when the newest state could not be saved."""
        self._shadow.close()

    def abandon(self) -> None:
        """Leave what is under way uncommitted; nothing is written any more once this returns."""
        self._shadow.abandon()

    def _saved(self, result: Saved) -> None:
        self._say(
            f"checkpoint: {result.manifest.position} saved to {self._store.storage}, "
            f"{in_bytes(result.bytes_written)} written in {result.seconds:.2f} s, "
            f"training waited {result.blocked:.3f} s"
        )
        for warning in result.warnings:
            self._warn(warning)
        if result.suspicion is not None:
            self._warn(result.suspicion)
        try:
            self._journal.prune(min(named_positions(self._store.storage)))
        except StorageError as error:
            self._warn(f"an old journal segment could not be removed: {error.message}")

    def _not_saved(self, error: StorageError) -> None:
        self._warn(f"{error.message}. Try: {error.hint}" if error.hint else error.message)
        self._failed()


def named_positions(storage: Storage) -> list[Position]:
    """The positions of all manifests by their names, whatever is in them."""
    named = (parse_manifest_name(entry.name) for entry in storage.scan(COMMITS))
    return [position for position in named if position is not None]
