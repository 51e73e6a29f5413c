"""A run that is restarted when it fails: `rollforward train --max_restarts N`.

The supervisor is a process of its own, small and idle, so it survives whatever ends a worker (an error,
a SIGKILL, the OOM killer). `launch` starts and watches the workers, `restarts` decides, and this module
reports the decision and carries it out.

A restart runs the given command again, resuming from the run's own folder once that has a checkpoint.
Until then the command is simply repeated, which starts from the model, or from the run that it was told to
resume. Nothing has to be done by hand, and work that is in the journal is not redone.

Where fewer workers than usual are allowed, a run whose workers cannot be started again goes on with fewer: it
ends with the same bytes.

Conversely, when the supervisor ends, however it ends, it leaves no worker behind.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rollforward.errors import WorkerFailed
from rollforward.processes.launch import Ending
from rollforward.processes.restarts import Failure, GiveUp, Restart, decide, fails_again
from rollforward.storage import LocalStorage, Storage
from rollforward.store import list_checkpoints
from rollforward.store.layout import ROLE_FOLDERS
from rollforward.wording import counted

Start = Callable[[Sequence[str], int], Ending]
"""Run with these arguments, on so many workers, until all is done or something fails."""


def supervise(
    start: Start,
    arguments: Sequence[str],
    *,
    run: Path | Storage,
    max_restarts: int,
    workers: Sequence[int] = (1,),
    say: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> Ending:
    """Start the run, again if need be, until it is done, and return how it ended.

    `arguments` are those of the first start; `run` is the folder, or the storage, that it writes to.
    `workers`: the numbers of workers that it may have, see `restarts.decide`. Raises WorkerFailed, with the
    errors, when restarting has not helped.
    """
    failures: list[Failure] = []
    given, count = unsupervised(arguments), workers[0]
    while True:
        ending = start(given, count)
        if ending.code == 0:
            return ending
        _restore_terminal()
        failures.append(
            Failure(
                code=ending.code,
                kind=ending.kind,
                error=ending.error,
                position=ending.position,
                workers=count,
                slots=ending.slots,
            )
        )
        decision = decide(failures, max_restarts=max_restarts, workers=workers)
        if isinstance(decision, GiveUp):
            return _give_up(decision, ending, say)
        given, source = next_start(arguments, run)
        source += _on_how_many(decision.workers, count, failures)
        say(_told(decision, max_restarts, ending, source))
        count = decision.workers
        wait(decision.seconds)


def next_start(arguments: Sequence[str], run: Path | Storage) -> tuple[list[str], str]:
    """The arguments of a restart, and a description of where it resumes from.

    `arguments` are those of the first start.
    """
    checkpoints = list_checkpoints(LocalStorage(run) if isinstance(run, Path) else run)
    if not checkpoints:
        return unsupervised(arguments), "as at first, since there is no checkpoint yet"
    found = next((info for info in checkpoints if info.valid), checkpoints[0])
    return resuming(arguments, str(run)), f"from checkpoint {found.position} and the journal"


def resuming(arguments: Sequence[str], run: str) -> list[str]:
    """The arguments of a restart from the run's own folder or address, where there is a checkpoint."""
    # The run has already branched off once its folder has a checkpoint.
    given = _without(unsupervised(arguments), "resume_position")
    given += ["--resume_training", "--actor_checkpoint_path", f"{run}/{ROLE_FOLDERS['policy_model']}"]
    return [*given, "--ref_checkpoint_path", f"{run}/{ROLE_FOLDERS['ref']}"]


def unsupervised(arguments: Sequence[str]) -> list[str]:
    """The arguments for a process that is supervised and does not supervise."""
    given = _without(_without(arguments, "max_restarts"), "min_workers")
    return [argument for argument in given if argument != "--standby"]


def on_workers(arguments: Sequence[str], workers: int, num_rollouts: int) -> list[str]:
    """The arguments for another number of workers. Without a checkpoint, `num_rollouts` fixes the step."""
    rollouts = f"rl_config.num_rollouts={num_rollouts}"
    return [*_without(arguments, "workers"), "--workers", str(workers), "--set", rollouts]


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments without an option (which takes one value), in either spelling."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _value = argument.partition("=")
        if skip:
            skip = False
        elif name.startswith("--") and name[2:].replace("-", "_") == option:
            skip = not equals
        else:
            kept.append(argument)
    return kept


def _on_how_many(workers: int, before: int, failures: Sequence[Failure]) -> str:
    """What changes in the number of workers, and why; empty when it stays."""
    if workers == before:
        return ""
    if workers > before:
        return f", on {workers} workers again instead of {before}"
    slots = ", ".join(map(str, sorted(fails_again(failures, before))))
    return f", on {counted(workers, 'worker')} instead of {before}, since worker {slots} failed twice running"


def _told(decision: Restart, max_restarts: int, ending: Ending, source: str) -> str:
    what = ending.error if ending.kind is None else f"{ending.kind}: {ending.error}"
    at = "" if ending.position is None or ending.kind is None else f" (at step {ending.position})"
    when = f"in {decision.seconds:.0f} s" if decision.seconds else "at once"
    return (
        f"restart {decision.number} of {max_restarts}, {source}, {when}, because {what.splitlines()[0]}{at}"
    )


def _give_up(decision: GiveUp, ending: Ending, say: Callable[[str], None]) -> Ending:
    """Say why; an error that a restart would repeat is returned as it is."""
    say(f"not restarted: {decision.reason}")
    if ending.kind is not None and len(decision.failures) == 1:
        return ending
    lines = [f"the run failed, and was not restarted: {decision.reason}"]
    lines += [f"{number}. {failure.error}" for number, failure in enumerate(decision.failures, start=1)]
    raise WorkerFailed("\n".join(lines), hint=ending.hint or "fix that, then resume with --resume_training")


def _restore_terminal() -> None:
    """Show the cursor, which a killed display had hidden."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")
        sys.stdout.flush()
