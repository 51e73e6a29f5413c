"""The trainer's `Checkpoints`: the store's, in the shadow of generation, with the journal kept in step.

A checkpoint carries what the steps since the one before were rewarded with, on average, so that the
best can be told and kept. The completions of a step are those of the policy before its update, so
the figures are about policies that lie shortly before the one that is saved.

A checkpoint that begins begins a journal segment too, so that old segments can go when old
checkpoints do: on the thread that writes checkpoints, while the one that trains appends to the
newest segment, which always stays. What comes of a checkpoint is told at the next step boundary, a
line each; one that fails does not end the run, unless nothing newer succeeds until the run is over.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rollforward.errors import StorageError
from rollforward.grpo.ports import Engine
from rollforward.position import Position
from rollforward.run.metrics import SaveTrouble
from rollforward.store import CheckpointStore, Saved, ShadowCheckpoints
from rollforward.store.catalog import oldest_position
from rollforward.store.journal.writing import Journal
from rollforward.wording import in_bytes

REWARD = "reward"
"""The name of the figure that is always there; `reward/<verifier>` are its parts."""


class RunCheckpoints:
    """See `grpo.ports.Checkpoints`; an `Observer`, so that it hears of rewards."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        journal: Journal,
        about: Mapping[str, Any],
        *,
        run: Path,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        committed: Callable[[Position], None],
        trouble: SaveTrouble,
        prove_unchanged: bool = False,
    ) -> None:
        """`about` goes to every checkpoint; `committed` is told the position of each that exists.

        `trouble` counts what goes wrong, for the metrics; `prove_unchanged` goes to `ShadowCheckpoints`.
        """
        self._store = store
        self._engine = engine
        self._journal = journal
        self._about = about
        self._run = run
        self._say = say
        self._warn_here = warn
        self._committed = committed
        self._trouble = trouble
        self._rewards: list[dict[str, float]] = []
        """Of each step since the last checkpoint began."""
        store.restored(engine)
        self._shadow = ShadowCheckpoints(
            store,
            engine,
            about,
            saved=self._saved,
            failed=self._failed,
            warned=self._warn,
            tidied=self._prune_journal,
            prove_unchanged=prove_unchanged,
        )

    def save_now(self, position: Position, global_step: int) -> None:
        """Save and commit before this returns. StorageError on all workers when one cannot."""
        self._journal.checkpoint_begun()
        self._saved(self._store.save(position, self._engine, global_step=global_step, **self._about))
        for warning in self._prune_journal():
            self._warn(warning)

    def begin(self, position: Position, global_step: int) -> None:
        """See `grpo.ports.Checkpoints.begin`."""
        self._journal.checkpoint_begun()
        metrics = {
            name: math.fsum(rewards[name] for rewards in self._rewards) / len(self._rewards)
            for name in (self._rewards[0] if self._rewards else ())
        }
        self._rewards.clear()
        self._shadow.begin(position, global_step, state={**self._about["state"], "metrics": metrics})

    def before_update(self) -> None:
        """See `grpo.ports.Checkpoints.before_update`."""
        self._shadow.before_update()

    def boundary(self) -> None:
        """See `grpo.ports.Checkpoints.boundary`."""
        self._shadow.boundary()

    def phase(self, position: Position, name: str) -> None:
        """Phases do not matter here."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:  # noqa: ARG002 - as the protocol has it
        """Remember what a step was rewarded with; the same on every worker."""
        self._rewards.append(
            {name: value for name, value in metrics.items() if name.partition("/")[0] == REWARD}
        )

    def close(self) -> None:
        """See `grpo.ports.Checkpoints.close`. StorageError when the newest state could not be saved."""
        self._shadow.close()

    def _saved(self, result: Saved) -> None:
        position = result.manifest.position
        self._committed(position)
        self._say(
            f"checkpoint: {position} saved to {self._run}, {in_bytes(result.bytes_written)} written "
            f"in {result.seconds:.2f} s, training waited {result.blocked:.3f} s"
        )
        for warning in result.warnings:
            self._warn(warning)
        if result.suspicion is not None:
            self._trouble.suspicious += 1
            self._say(f"warning: {result.suspicion}")

    def _prune_journal(self) -> list[str]:
        """Remove what no replay from a checkpoint that is left can need; returns warnings."""
        try:
            self._journal.prune(oldest_position(self._store.storage))
        except StorageError as error:
            return [f"an old journal segment could not be removed: {error.message}"]
        return []

    def _failed(self, error: StorageError) -> None:
        self._trouble.failed += 1
        # All ranks fail together, so the first one speaks for all.
        self._say(
            f"warning: {error.message}. Try: {error.hint}" if error.hint else f"warning: {error.message}"
        )

    def _warn(self, text: str) -> None:
        """Of this rank alone."""
        self._warn_here(f"warning: {text}")
