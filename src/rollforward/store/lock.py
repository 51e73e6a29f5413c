"""Who trains here: one live trainer per run folder, and a number for each start.

`run.lock` is held with `flock`, so it is released the moment its owner exits, however that happens,
and stays held while the owner is merely paused. Its content says who holds it and the incarnation: one
more than the highest number seen in the lock, in a manifest or in the name of a journal segment.

`check` is the fence: rank 0 calls it just before it publishes a manifest. Where `flock` does not
work across machines, a second trainer may take over the lock; the first then finds another
incarnation in the file and can no longer commit.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rollforward.errors import RunLocked, StorageError
from rollforward.storage import LocalStorage, Storage, read_small
from rollforward.storage.filelock import FileLock, holds, is_held
from rollforward.store import strictjson
from rollforward.store.catalog import peek_incarnations
from rollforward.store.layout import JOURNAL, LOCK, manifest_path, parse_rank
from rollforward.store.manifest import MAX_INCARNATION

_SEGMENT = re.compile(r"(\d{1,18})-.*\.journal", re.ASCII)
_MOST_BYTES = 1 << 16
"""Of a lease; a file has `RECORD_BYTES`."""
_NO_SUCCESSOR = "is of start {} of the run, and no number follows that one"


@dataclass(frozen=True)
class Owner:
    """The content of `run.lock`."""

    incarnation: int
    host: str
    pid: int
    since: str
    """UTC."""
    held: bool = True
    """False when the owner released it cleanly."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}, incarnation {self.incarnation}"


class RunLock:
    """A held run folder. Use it as a context manager, or call `release`."""

    def __init__(self, storage: LocalStorage, file: FileLock, owner: Owner, taken_over: Owner | None) -> None:
        self.owner = owner
        self.taken_over = taken_over
        """The previous owner, if it ended without releasing the lock."""
        self.left_behind: Mapping[str, float] = {}
        """Nothing: what was written is in the folder."""
        self._storage = storage
        self._file = file

    @property
    def incarnation(self) -> int:
        """The number of this start."""
        return self.owner.incarnation

    @classmethod
    def acquire(
        cls,
        root: str | Path,
        *,
        after: int = 0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> "RunLock":
        """Lock the folder, creating it if it is missing. RunLocked says who already holds it.

        `after`: the newest incarnation of the folder that the run resumes from, if that is a different one.
        """
        storage = LocalStorage(root)
        storage.make_root()
        file = FileLock.acquire(Path(storage.root) / LOCK)
        if file is None:
            raise _locked(storage)
        try:
            before = parse_owner(file.read())
            owner = Owner(
                incarnation=next_incarnation(storage, before, after),
                host=this_host(),
                pid=os.getpid(),
                since=now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
            file.write(json.dumps(asdict(owner)).encode())
        except BaseException:
            file.release()
            raise
        return cls(storage, file, owner, before if before is not None and before.held else None)

    def check(self) -> None:
        """RunLocked when the folder is no longer ours."""
        found = read_owner(self._storage)
        if found != self.owner:
            raise RunLocked(
                f"{self._storage.root} was taken over by {found or 'someone unknown'}: this process "
                f"(incarnation {self.incarnation}) must not commit any more",
                hint="end this process; the other one continues",
            )

    def release(self) -> None:
        """Release the lock, and record in the file that this was clean. A forked child has none."""
        if not self._file.held:
            return
        try:
            if read_owner(self._storage) == self.owner:
                self._file.write(json.dumps(asdict(self.owner) | {"held": False}).encode())
        finally:
            self._file.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_free(root: str | Path) -> None:
    """RunLocked when a live trainer is known to hold the folder; changes nothing.

    `RunLock.acquire` is what decides. This stops a second trainer early, before it loads a model.
    StorageError when the folder's numbers leave no room for another start.
    """
    if is_taken(root):
        raise _locked(LocalStorage(root))
    newest_incarnation(root)


def is_taken(root: str | Path) -> bool:
    """Whether a live trainer is known to hold the folder."""
    return is_held(Path(LocalStorage(root).root) / LOCK)


def read_owner(storage: Storage) -> Owner | None:
    """Who holds, or last held, the folder; None when unknown."""
    try:
        return parse_owner(read_small(storage, LOCK, limit=_MOST_BYTES).rstrip(b" \n\0"))
    except StorageError:
        return None


def newest_incarnation(root: str | Path | Storage) -> int:
    """The newest incarnation of the run in a folder or a storage; 0 when there was none."""
    storage: Storage = LocalStorage(root) if isinstance(root, str | Path) else root
    return next_incarnation(storage, read_owner(storage)) - 1


def next_incarnation(storage: Storage, before: Owner | None, after: int = 0) -> int:
    """One more than the highest number seen, `after` included.

    StorageError when that is unknown: neither the lock nor, this time, every manifest could be read. A
    number that was used before would sort new checkpoints among old ones, where retention removes them.
    StorageError too when a higher number would not fit into file names.
    """
    unread: list[StorageError] = []
    seen = dict(_numbers(storage, unread))
    if unread and before is None:
        raise unread[0]
    seen[LOCK] = before.incarnation if before else 0
    seen["the run that is resumed"] = after
    where = max(seen, key=lambda path: seen[path])
    if seen[where] >= MAX_INCARNATION:
        # No run is started that often. Raise now, not when the first checkpoint needs a name.
        raise StorageError(
            f"{storage}: {where} {_NO_SUCCESSOR.format(seen[where])}",
            hint="no run was started that often, so somebody made this file: move it away",
        )
    return seen[where] + 1


def without_successor(storage: Storage) -> list[str]:
    """What stops `next_incarnation` from finding a number, apart from the lock: one line each."""
    return [
        f"{path} {_NO_SUCCESSOR.format(number)}"
        for path, number in _numbers(storage, [])
        if number >= MAX_INCARNATION
    ]


def _numbers(storage: Storage, unread: list[StorageError]) -> Iterator[tuple[str, int]]:
    """Each file with a start's number in its name or first bytes, and that number."""
    for position, number in peek_incarnations(storage, unread).items():
        yield manifest_path(position), number
    for rank in storage.scan(JOURNAL):
        folder = f"{JOURNAL}/{rank.name}"
        # A name that is not valid in a path is not one of ours.
        if rank.kind != "folder" or parse_rank(rank.name) is None:
            continue
        for entry in storage.scan(folder):
            match = _SEGMENT.fullmatch(entry.name)
            if match:
                yield f"{folder}/{entry.name}", int(match[1])


def this_host() -> str:
    """The name of this machine, as written in the lock."""
    return socket.gethostname()[:64].encode("ascii", "replace").decode()


def parse_owner(content: bytes) -> Owner | None:
    """The owner in the content of `run.lock`, or in a lease (`lease`); None when there is none."""
    try:
        value = strictjson.parse(content)
        value.pop("lease", None)
        owner = Owner(**value)
    except (ValueError, TypeError, AttributeError):
        return None
    kinds = (type(owner.incarnation), type(owner.host), type(owner.pid), type(owner.since), type(owner.held))
    well_formed = kinds == (int, str, int, str, bool) and 0 <= owner.incarnation <= MAX_INCARNATION
    return owner if well_formed else None


def _locked(storage: LocalStorage) -> RunLocked:
    owner = read_owner(storage)
    hint = "wait for it to end, end it, or save to another folder"
    if owner is not None and owner.host == this_host() and not Path(f"/proc/{owner.pid}").exists():
        # The pid may belong to another pid namespace, such as a container's, where the process is alive.
        if holds(Path(storage.root) / LOCK, owner.pid):
            hint = (
                f"process {owner.pid} has ended, but one that it started still runs: end that one "
                "(lsof run.lock)"
            )
        else:
            hint += "; the process is not seen from here, as when it runs in another container"
    return RunLocked(
        f"{storage.root} is held by {owner or 'a trainer that could not be identified'}", hint=hint
    )
