"""What a process that was launched and the one that launched it tell each other.

The launcher makes a folder and names it in `$ROLLFORWARD_WORKER_FILES`. There it leaves its own
process number, and each worker says in `rank_N.json` that it lives and, when it can, how it ended.
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
from rollforward.processes.environment import LAUNCHED, this_process
from rollforward.storage.failures import storage_error
from rollforward.storage.local import LocalStorage

_LAUNCHER = "launcher"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker says of itself."""

    pid: int
    code: int | None = None
    """How it ended; None while it runs, or when it was killed."""
    error: str | None = None
    """Its last words."""
    kind: str | None = None
    """The class of the error that ended it."""


def prepare(folder: Path) -> None:
    """As the launcher: say in the folder who we are."""
    (folder / _LAUNCHER).write_text(str(os.getpid()))


def join() -> None:
    """As a process that was launched: end when the launcher does; as a worker, say that we live."""
    folder = os.environ.get(LAUNCHED)
    if not folder:
        return
    die_with_parent()
    if not alive(int((Path(folder) / _LAUNCHER).read_text())):
        # It went before the kernel knew that this process is to follow.
        os.kill(os.getpid(), signal.SIGKILL)
    process = this_process()
    if process.role != "scheduler":
        report(Path(folder), process.rank)


def tell_ending(code: int, *, error: str | None = None, kind: str | None = None) -> None:
    """As a worker that was launched, say how it ends; nothing in any other process.

    When the disk does not take it, it is said in the worker's output only.
    """
    folder, process = os.environ.get(LAUNCHED), this_process()
    if folder and process.role != "scheduler":
        try:
            report(Path(folder), process.rank, code=code, error=error, kind=kind)
        except StorageError as problem:
            sys.stderr.write(f"ended with code {code}, which could not be told: {problem}\n")


def report(
    folder: Path, rank: int, *, code: int | None = None, error: str | None = None, kind: str | None = None
) -> None:
    """Say, as worker `rank`, that this process lives or how it ends."""
    value = {"pid": os.getpid(), "code": code, "error": error, "kind": kind}
    LocalStorage(folder).write(f"rank_{rank}.json", [json.dumps(value).encode()])


def read(folder: Path, rank: int) -> Report | None:
    """What a worker has said; None when it has said nothing yet."""
    try:
        return Report(**json.loads((folder / f"rank_{rank}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone, however it went. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return state not in (b"Z", b"X")


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
