"""The trainer's `Checkpoints`, over the store: a checkpoint is written while the trainer waits."""

from collections.abc import Callable, Mapping
from typing import Any

from rollforward.grpo.ports import Engine
from rollforward.position import Position
from rollforward.store import CheckpointStore, Saved


class BlockingCheckpoints:
    """Saves and commits a checkpoint within `begin`. See `grpo.ports.Checkpoints`."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        about: Mapping[str, Any],
        saved: Callable[[Saved], None],
    ) -> None:
        """`about` goes to every `CheckpointStore.save`; `saved` is told of each checkpoint."""
        self._store = store
        self._engine = engine
        self._about = about
        self._saved = saved

    def begin(self, position: Position, global_step: int) -> None:
        """Save the state as it is now; StorageError when a worker cannot."""
        self._saved(
            self._store.save(position, self._engine.tensors(), global_step=global_step, **self._about)
        )

    def before_update(self) -> None:
        """Nothing is still to be read."""

    def boundary(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is under way."""
