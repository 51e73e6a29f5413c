"""The trainer's `Checkpoints`: in the shadow of generation, each with what its steps were rewarded with.

A checkpoint carries what the steps since the one before were rewarded with, on average, so that the
best can be told and kept. The completions of a step are those of the policy before its update, so
the figures are about policies that lie shortly before the one that is saved.
"""

import math
from collections.abc import Callable, Mapping

from rollforward.grpo.ports import Engine
from rollforward.position import Position
from rollforward.replay.saving import JournaledCheckpoints
from rollforward.run.metrics import SaveTrouble
from rollforward.store import CheckpointStore
from rollforward.store.journal.writing import Journal
from rollforward.store.saved import About

REWARD = "reward"
"""The name of the figure that is always there; `reward/<verifier>` are its parts."""


class RunCheckpoints:
    """`grpo.ports.Checkpoints`; an `Observer`, so that it hears of rewards.

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
    ) -> None:
        self._state = about.state
        self._rewards: list[dict[str, float]] = []
        """Of each step since the last checkpoint began."""
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
        )

    def save_now(self, position: Position, global_step: int) -> None:
        """Save and commit before this returns. StorageError on all workers when one cannot."""
        self._saving.save_now(position, global_step, self._state)

    def begin(self, position: Position, global_step: int) -> None:
        """Start to save the state as it is now, with the mean rewards of the steps since the last one."""
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
        """Remember what a step was rewarded with; the same on every worker."""
        self._rewards.append(
            {name: value for name, value in metrics.items() if name.partition("/")[0] == REWARD}
        )

    def close(self) -> None:
        """Commit what is under way. StorageError when the newest state could not be saved."""
        self._saving.close()
