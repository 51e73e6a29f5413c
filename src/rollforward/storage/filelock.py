"""A lock file held by one process, with a short text inside that says who.

The lock is `flock(2)`: the kernel releases it when the process ends, however it ends, so a
stale lock cannot outlive its owner and a paused owner keeps it. The content is written in
place (a rename would leave the lock on a file that no longer has the name), always 512 bytes
at offset 0, so a crash leaves either the old text or the new one: disks write sectors atomically.

Left out: file systems where `flock` only works within one machine. There the caller's fencing
(it rereads the content before it commits) keeps an older writer out.
"""

import errno
import fcntl
import os
import weakref
from pathlib import Path

from rollforward.errors import StorageError
from rollforward.storage.failures import storage_error
from rollforward.storage.inplace import open_in_place

RECORD_BYTES = 512

_HELD: "weakref.WeakSet[FileLock]" = weakref.WeakSet()
"""The locks of this process."""
_LOCKS = Path("/proc/locks")
"""Linux's list of held locks: `1: FLOCK ADVISORY WRITE <pid> 08:01:<inode> 0 EOF`."""


class FileLock:
    """A held lock. Created by `acquire`; released by `release` or when the process ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path) -> "FileLock | None":
        """Lock the file, creating it if it is missing; None when another process holds it.

        The folder must exist. StorageError when the file cannot be opened, or is a link or not a file.
        """
        fd = open_in_place(str(path.parent), path.name)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise storage_error("locking", str(path), error) from error
        lock = cls(path, fd)
        _HELD.add(lock)
        return lock

    @property
    def held(self) -> bool:
        """Whether this process has it: not once it was released, and not in a forked child."""
        return self._fd >= 0

    def read(self) -> bytes:
        """The current content without trailing spaces. StorageError when it is larger than a record."""
        try:
            size = os.fstat(self._fd).st_size
            content = os.pread(self._fd, RECORD_BYTES, 0)
        except OSError as error:
            raise storage_error("reading", str(self.path), error) from error
        if size > RECORD_BYTES:
            raise StorageError(
                f"{self.path} has {size} bytes, and a run's lock has {RECORD_BYTES}: it is something else",
                hint=f"move it away when no trainer runs in {self.path.parent}, or save to another folder",
            )
        return content.rstrip(b" \n\0")

    def write(self, record: bytes) -> None:
        """Replace the content, durably. At most 511 bytes."""
        if len(record) >= RECORD_BYTES:
            raise ValueError(
                f"a lock record of {len(record)} bytes; at most {RECORD_BYTES - 1} fit one sector"
            )
        try:
            os.pwrite(self._fd, record.ljust(RECORD_BYTES - 1) + b"\n", 0)
            os.fsync(self._fd)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise storage_error("writing", str(self.path), error) from error

    def release(self) -> None:
        """Release the lock; releasing twice does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _leave_to_parent() -> None:
    """In a forked child, such as a worker that loads data: it must not hold the lock when its parent is gone.

    Closing a child's copy of the descriptor does not release the parent's lock.
    """
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)


def is_held(path: Path) -> bool:
    """Whether a process holds the file now; no lock is taken to find out, so nobody is disturbed.

    An early check, not a proof: also False when the system cannot tell, as for other machines.
    """
    return bool(_holders(path))


def holds(path: Path, pid: int) -> bool:
    """Whether the system says that the process with this pid took the lock that is held now.

    A pid is unique only within its pid namespace, and the system does not report locks taken in
    other namespaces: False may mean another container on this machine.
    """
    return pid in _holders(path)


def _holders(path: Path) -> list[int]:
    try:
        status = path.stat()
        held = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return []
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found = [words for words in held if "FLOCK" in words and place in words]
    return [int(words[words.index(place) - 1]) for words in found if words[words.index(place) - 1].isdigit()]
