"""The command `rollforward` with the toy engine, as a program of its own: for tests that kill it.

`toy_trainer.py train ...` is `rollforward train ...` with the engine `fated`, which is installed where
this file is. `$TOY_FATES` names a file: each start of a trainer takes a line from it, says beside it who it
is, and meets that end: `3 killed` after three updates, `-1 killed` before its first step. Starts for
which there is no line live.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from rollforward.processes import stopping

if __name__ == "__main__":
    # Before NumPy is imported.
    stopping.take_signals()

from toy_session import Place, ToyPackage

from rollforward.cli import main
from rollforward.errors import EngineError, ReplayDiverged
from rollforward.grpo.ports import Engine, Group
from rollforward.grpo.types import EngineSettings, TrainingBatch, UpdateOutcome

FATES = "TOY_FATES"


def arguments(place: Place, run: str, **changes: Any) -> list[str]:
    """The command line of a run of the place."""
    changes = {"context__engine": "fated", **changes}
    return ["train", *(f"--set={key}={value}" for key, value in place.overrides(run, **changes))]


class Fated(ToyPackage):
    """The toy engine, until its end: the engine `fated`."""

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        updates, how = _fate()
        engine = super().create(settings, group)
        update = engine.update
        if updates < 0:
            _meet(how)

        def fated(batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
            if len(self.updates) == updates:
                _meet(how)
            return update(batch, learning_rate)

        engine.update = fated  # type: ignore[method-assign]
        return engine


def _fate() -> tuple[int, str]:
    path = Path(os.environ[FATES])
    fates = path.read_text().splitlines()
    met = path.with_suffix(".met")
    number = len(met.read_text().splitlines()) if met.exists() else 0
    with met.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if number >= len(fates):
        return 1 << 30, "lives"
    updates, how = fates[number].split()
    return int(updates), how


def _meet(how: str) -> NoReturn:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(600)
    if how == "diverged":
        raise ReplayDiverged("the replay gave loss 1.0 where 2.0 was recorded")
    raise EngineError(f"the device {how}")


if __name__ == "__main__":
    # What it starts finds the engine too.
    found = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)
    stopping.leave(main.main())
