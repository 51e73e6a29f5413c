"""What a worker and the process that launched it tell each other.

The launcher makes a folder and names it in `$ROLLFORWARD_WORKER_FILES`. There it leaves its own
process number, and each worker reports in `rank_N.json` that it lives and, when it can, how it ended.
A worker whose launcher is gone ends: the kernel kills it, however the launcher went.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rollforward.errors import RollforwardError, StorageError
from rollforward.inputs import parse_json, read_input
from rollforward.processes.environment import ENGINE, LAUNCHED, is_alive, start_time
from rollforward.storage.failures import storage_error
from rollforward.storage.local import LocalStorage
from rollforward.wording import plain_lines

_LAUNCHER = "launcher"
_PR_SET_PDEATHSIG = 1
_MOST_BYTES = 1 << 24
"""Of a report: an error may be long."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker reports of itself."""

    pid: int
    started: int | None = None
    """See `environment.start_time`."""
    code: int | None = None
    """How it ended; None while it runs, or when it was killed."""
    error: str | None = None
    """The message of the error that ended it."""
    kind: str | None = None
    """The class of that error."""

    @property
    def lives(self) -> bool:
        """Whether this very process runs."""
        return is_alive(self.pid, self.started)


def prepare(folder: Path) -> None:
    """As the launcher: leave our process number in the folder."""
    (folder / _LAUNCHER).write_text(str(os.getpid()))


_own_rank: int | None = None
"""Of this process, once it has joined as a worker."""


def join() -> None:
    """As a process that was launched: end when the launcher does; as a worker, report that we live."""
    global _own_rank
    folder = os.environ.get(LAUNCHED)
    if not folder:
        return
    # Imported here: it imports NumPy, and signals have to be taken before.
    from rollforward.engines.base import find_engine

    die_with_parent()
    if not is_alive(int((Path(folder) / _LAUNCHER).read_text())):
        # It went before the kernel knew that this process is to follow.
        os.kill(os.getpid(), signal.SIGKILL)
    process = find_engine(os.environ[ENGINE]).this_process(os.environ)
    if process.role != "scheduler":
        _own_rank = process.rank
        report(Path(folder), process.rank)


def tell_ending(code: int, *, error: str | None = None, kind: str | None = None) -> None:
    """As a worker that was launched, report how it ends; nothing in any other process.

    When the disk does not take it, standard error has it.
    """
    folder = os.environ.get(LAUNCHED)
    if folder and _own_rank is not None:
        try:
            report(Path(folder), _own_rank, code=code, error=error, kind=kind)
        except StorageError as problem:
            told = plain_lines(str(problem))
            sys.stderr.write(f"ended with code {code}, which could not be reported: {told}\n")


def report(
    folder: Path, rank: int, *, code: int | None = None, error: str | None = None, kind: str | None = None
) -> None:
    """Say, as worker `rank`, that this process lives or how it ends."""
    pid = os.getpid()
    value = {"pid": pid, "started": start_time(pid), "code": code, "error": error, "kind": kind}
    LocalStorage(folder).write(f"rank_{rank}.json", [json.dumps(value).encode()])


def read(folder: Path, rank: int) -> Report | None:
    """What a worker has said; None when it has said nothing yet."""
    try:
        return Report(**parse_json(read_input(folder / f"rank_{rank}.json", _MOST_BYTES)))
    except (OSError, ValueError, TypeError):
        return None


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone, however it went. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def as_ours(error: Exception) -> Exception:
    """The system's error with a file as a StorageError, which says what to try; anything else as it is.

    For what no room expected: a folder that cannot be made, a log that cannot be written.
    """
    if isinstance(error, OSError) and error.errno and isinstance(error.filename, str):
        return storage_error("using", error.filename, error)
    return error


def error_text(error: BaseException) -> str:
    """What is said of an error: ours as they are, others by their class."""
    return str(error) if isinstance(error, RollforwardError) else f"{type(error).__name__}: {error}"
