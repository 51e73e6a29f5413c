"""What a worker and the process that launched it tell each other.

The launcher makes a folder and names it in `$ROLLFORWARD_WORKER_FILES`. It writes its own pid there, and
each worker reports in `rank_N.json` that it is alive and, if it can, how it ended. When the launcher is
gone, the kernel kills its workers, however the launcher ended.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
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
"""Largest report, in bytes: an error may be long."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker reports about itself."""

    pid: int
    started: int | None = None
    """See `environment.start_time`."""
    code: int | None = None
    """How it ended; None while it runs, or when it was killed."""
    error: str | None = None
    """The message of the error that ended it."""
    kind: str | None = None
    """The class of that error."""
    ready: int | None = None
    """In a standby: it waits to be called, and this is its memory in bytes. See `standby`."""

    @property
    def lives(self) -> bool:
        """Whether exactly this process is running."""
        return is_alive(self.pid, self.started)


def prepare(folder: Path) -> None:
    """As the launcher: write our pid into the folder."""
    (folder / _LAUNCHER).write_text(str(os.getpid()))


_own_rank: int | None = None
"""This process's rank, once it has joined as a worker."""


def join() -> None:
    """In a launched process: end when the launcher does; in a worker, also report that it is alive."""
    global _own_rank
    folder = os.environ.get(LAUNCHED)
    if not folder:
        return
    # Imported here because it imports NumPy, and the signal handlers must be set up before that.
    from rollforward.engines.base import find_engine

    die_with_parent()
    if not is_alive(int((Path(folder) / _LAUNCHER).read_text())):
        # It ended before the kernel knew that this process must end with it.
        os.kill(os.getpid(), signal.SIGKILL)
    process = find_engine(os.environ[ENGINE]).this_process(os.environ)
    if process.role != "scheduler":
        _own_rank = process.rank
        report(Path(folder), process.rank)


def tell_ending(code: int, *, error: str | None = None, kind: str | None = None) -> None:
    """In a launched worker, report how it ends; does nothing in any other process.

    If the report cannot be written, it goes to standard error.
    """
    folder = os.environ.get(LAUNCHED)
    if folder and _own_rank is not None:
        try:
            report(Path(folder), _own_rank, code=code, error=error, kind=kind)
        except StorageError as problem:
            told = plain_lines(str(problem))
            sys.stderr.write(f"ended with code {code}, which could not be reported: {told}\n")


def report(
    folder: Path,
    rank: int,
    *,
    code: int | None = None,
    error: str | None = None,
    kind: str | None = None,
    ready: int | None = None,
) -> None:
    """Report, as worker `rank`, that this process is alive, that it stands by, or how it ends."""
    own = Report(pid=os.getpid(), code=code, error=error, kind=kind, ready=ready)
    value = asdict(replace(own, started=start_time(own.pid)))
    LocalStorage(folder).write(f"rank_{rank}.json", [json.dumps(value).encode()])


def read(folder: Path, rank: int) -> Report | None:
    """A worker's report; None when there is none yet."""
    try:
        return Report(**parse_json(read_input(folder / f"rank_{rank}.json", _MOST_BYTES)))
    except (OSError, ValueError, TypeError):
        return None


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def as_ours(error: Exception) -> Exception:
    """An OSError that names a file as a StorageError, which says what to try; anything else unchanged.

    For errors that no caller expected: a folder that cannot be created, a log that cannot be written.
    """
    if isinstance(error, OSError) and error.errno and isinstance(error.filename, str):
        return storage_error("using", error.filename, error)
    return error


def error_text(error: BaseException) -> str:
    """The text shown for an error: ours as they are, others with their class."""
    return str(error) if isinstance(error, RollforwardError) else f"{type(error).__name__}: {error}"
