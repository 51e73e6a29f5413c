"""The folders a run writes to besides its own: logs, strategy files, TensorBoard events. One run each.

Several runs may be started in one working folder, or with one `$LOCAL_DEFAULT_PATH`: then their defaults
are the same, and a start would remove files of another run. So a folder that the user did not name
records its owner in `.rollforward.json`, and a start takes the first one that is its own or unowned:

    log/       of the first run                 strategy/
    log.1/     of the second                    strategy.1/

A folder without that file is unowned, unless it holds something that a start would remove: that belongs to
another program, such as the strategy files that MindFormers needs to merge its checkpoints.

A strategy folder that the user names is cleared, as in the MindRLHF workflow, but not while another live
run writes there.
"""

import fcntl
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rollforward.errors import ConfigError, StorageError
from rollforward.storage import LocalStorage, read_small

OWNER = ".rollforward.json"
_MOST_BYTES = 1 << 16

Holds = Callable[[Path], bool]
"""Whether a folder holds something that a start would remove."""


def claim_logs(folder: Path, run: Path) -> Path:
    """Where this run's logs go: `folder`, or one beside it."""
    return claim(_numbered(folder), run, _holds("*.log"))


def claim_strategies(folder: Path, run: Path) -> Path:
    """Where this run's strategy files go, when the user names no folder: `folder`, or one beside it."""
    return claim(_numbered(folder), run, _holds("*.ckpt"))


def claim_events(folder: Path, run: Path) -> Path:
    """Where this run's events go: `folder`, or one in it, which TensorBoard shows as another run."""
    inner = folder / (run.absolute().name or "run")
    return claim(itertools.chain([folder], _numbered(inner)), run, lambda _: False)


def claim(folders: Iterable[Path], run: Path, holds: Holds) -> Path:
    """The first of the folders that is this run's own, or unowned and now claimed.

    Where ownership cannot be determined, as on a read-only disk, the first one is taken.
    """
    own = os.path.realpath(run)
    first: Path | None = None
    for folder in folders:
        first = first or folder
        try:
            if _owner(folder) is None and not holds(folder):
                _mark(folder, own)
            if _owner(folder) == own:
                return folder
        except (StorageError, OSError):
            break
    assert first is not None
    return first


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Claim a folder that the user named for one live run; ConfigError when another run writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run that is training has its strategy files in {folder}, which a start clears",
                hint="name another folder with --save_strategy_dir, or leave it out",
            ) from None
        except OSError:
            pass  # a file system without locks: there is no way to tell
        yield
    finally:
        os.close(descriptor)


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(1):
        yield folder.with_name(f"{folder.name}.{number}")


def _holds(pattern: str) -> Holds:
    return lambda folder: any(folder.glob(pattern))


def _owner(folder: Path) -> str | None:
    """The run that owns a folder; None when unowned, "" when it cannot be determined."""
    storage = LocalStorage(folder)
    if storage.stat(OWNER) is None:
        return None
    try:
        value = json.loads(read_small(storage, OWNER, limit=_MOST_BYTES))
        return str(value["run"])
    except (StorageError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _mark(folder: Path, run: str) -> None:
    """Record the owner, unless another run was faster.

    The file gets its name with its content: other ranks look at the same moment, and a kill or a full disk
    must not leave an empty one, which would say that the owner cannot be determined.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unnamed = folder / f"{OWNER}.{secrets.token_hex(4)}.tmp"
    descriptor = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps({"run": run}).encode() + b"\n")
        with suppress(FileExistsError):
            os.link(unnamed, folder / OWNER)
    finally:
        unnamed.unlink()
