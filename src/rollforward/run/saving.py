"""The trainer's `Checkpoints` and `RolloutLog`, over the store.

In this version a checkpoint is written while the trainer waits, and rollouts are not journaled:
after a kill the steps since the last checkpoint are generated and trained again, to the same bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rollforward.grpo.ports import Engine
from rollforward.grpo.types import RolloutChunk, UpdateOutcome
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


class NoRolloutLog:
    """Keeps no rollouts. See `grpo.ports.RolloutLog`."""

    def find(self, position: Position, chunk: int) -> RolloutChunk | None:  # noqa: ARG002 - nothing is kept
        """None: every chunk is generated."""
        return None

    def append(self, position: Position, chunk: int, rollouts: RolloutChunk) -> None:
        """Nothing."""

    def record(
        self, position: Position, iteration: int, outcome: UpdateOutcome, learning_rate: float
    ) -> None:
        """Nothing."""
