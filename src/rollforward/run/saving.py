"""The trainer's `Checkpoints`: saved during generation, each with the mean rewards of its steps.

A checkpoint carries the mean rewards of the steps since the previous one, so that the best can be
identified and kept. The completions of a step come from the policy before its update, so the
figures describe policies slightly older than the one that is saved.
"""

import math
from collections.abc import Callable, Mapping

from rollforward.grpo.ports import Engine
from rollforward.position import Position
from rollforward.replay.cadence import Cadence, Every
from rollforward.replay.saving import JournaledCheckpoints
from rollforward.run.metrics import SaveTrouble
from rollforward.store import CheckpointStore
from rollforward.store.journal.writing import Journal
from rollforward.store.saved import About

REWARD = "reward"
"""The figure that is always present; its parts are `reward/<verifier>`."""


class RunCheckpoints:
    """`grpo.ports.Checkpoints`; also an `Observer`, to get the rewards.

    `about` goes to every checkpoint; `say`, `warn` and `committed` are as for `JournaledCheckpoints`.
    `trouble` counts what goes wrong, for the metrics.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        journal: Journal,
        about: About,
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        committed: Callable[[Position], None],
        trouble: SaveTrouble,
        prove_unchanged: bool = False,
        cadence: Cadence | None = None,
    ) -> None:
        self._state = about.state
        self._rewards: list[dict[str, float]] = []
        """One entry per step since the last checkpoint began."""
        self._saving = JournaledCheckpoints(
            store,
            journal,
            engine,
            about,
            say=say,
            warn=lambda text: warn(f"warning: {text}"),
            committed=committed,
            failed=trouble.count_failed,
            suspicious=trouble.count_suspicious,
            prove_unchanged=prove_unchanged,
            cadence=cadence,
        )

    def due(self, global_step: int, every: Every) -> bool:
        """Whether a checkpoint should begin now."""
        return self._saving.due(global_step, every)

    def save_now(self, position: Position, global_step: int) -> None:
        """Save and commit before this returns. StorageError on all workers when one cannot."""
        self._saving.save_now(position, global_step, self._state)

    def begin(self, position: Position, global_step: int) -> None:
        """Start saving the current state, with the mean rewards of the steps since the last one."""
        metrics = {
            name: math.fsum(rewards[name] for rewards in self._rewards) / len(self._rewards)
            for name in (self._rewards[0] if self._rewards else ())
        }
        self._rewards.clear()
        self._saving.begin(position, global_step, {**self._state, "metrics": metrics})

    def before_update(self) -> None:
        """Weights may change once this returns."""
        self._saving.before_update()

    def boundary(self) -> None:
        """Commit what all workers have written."""
        self._saving.boundary()

    def phase(self, position: Position, name: str) -> None:
        """Phases do not matter here."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:  # noqa: ARG002 - as the protocol has it
        """Remember a step's rewards; the same on every worker."""
        self._rewards.append(
            {name: value for name, value in metrics.items() if name.partition("/")[0] == REWARD}
        )

    def close(self) -> None:
        """Commit the save in progress. StorageError when the newest state could not be saved."""
        self._saving.close()
