"""One file that one process holds, with a few words inside that say who.

The lock is `flock(2)`: the kernel lets go of it when the process ends, however it ends, so a
stale lock cannot outlive its owner and a paused owner keeps it. The content is written in
place (a rename would leave the lock on a file that no longer has the name), always 512 bytes
at offset 0, so that a crash leaves the old words or the new ones: a disk writes a sector whole.

Left out: file systems where `flock` works on one machine only. There the caller's fencing
(it reads the content again before it commits) is what keeps an older writer out.
"""

import errno
import fcntl
import os
from pathlib import Path

from rollforward.errors import StorageError
from rollforward.storage.failures import storage_error
from rollforward.storage.inplace import open_in_place

RECORD_BYTES = 512

_LOCKS = Path("/proc/locks")
"""What Linux tells of the locks that are held: `1: FLOCK ADVISORY WRITE <pid> 08:01:<inode> 0 EOF`."""


class FileLock:
    """A held lock. Made by `acquire`; let go by `release` or by the end of the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path) -> "FileLock | None":
        """Hold the file, making it when it is missing; None when another process holds it.

        The folder must exist. StorageError when the file cannot be opened, or is a link or no file at all.
        """
        fd = open_in_place(str(path.parent), path.name)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise storage_error("locking", str(path), error) from error
        return cls(path, fd)

    def read(self) -> bytes:
        """What the file holds now, trailing spaces removed. StorageError when it is larger than a record."""
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
        """Let go; releasing twice does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def is_held(path: Path) -> bool:
    """Whether a process holds the file now; nothing is taken to find out, so nobody is disturbed.

    A look ahead, not a proof: False too where the system does not tell, as of other machines.
    """
    return bool(_holders(path))


def holds(path: Path, pid: int) -> bool:
    """Whether the system says that the process of this number took the lock that is held now.

    A number means one process in one pid namespace only, and the system tells nothing of locks that were
    taken in others: False may mean a container beside this one.
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
