"""Files that grow: the second way to make bytes durable, for the journal and the metrics.

An `Appender` adds to the end of a file that it alone writes: a new one, or one that has just replaced
an older file of the same name. When `append` or `sync` returns, all bytes so far are on stable storage, and
so are the file's name and the folders above it. Appended bytes are never changed, so a crash can only cost
bytes that were not synced: each part of them may be there or not, whichever was written first, and the
reader must be able to tell.

A failed write or sync ends the appender. The file may then hold part of the bytes, and after a failed
fsync it is unknown which: continuing after them on the same descriptor could report bytes as
durable that are not.
"""

import contextlib
import errno
from collections.abc import Iterable, Iterator

from rollforward.errors import StorageError
from rollforward.storage.base import Buffer, FileOps
from rollforward.storage.failures import storage_error


class FileAppender:
    """`Appender` on a descriptor at the end of a file. The file's folder is durable.

    `size`: bytes that are already durable. `named`: whether the file's name is durable.
    """

    def __init__(self, ops: FileOps, path: str, fd: int, *, size: int = 0, named: bool = False) -> None:
        self.size = size
        self._ops = ops
        self._path = path
        self._fd = fd
        self._named = named
        self._unsynced = 0

    def append(self, buffers: Iterable[Buffer]) -> None:
        self.write(buffers)
        self.sync()

    def write(self, buffers: Iterable[Buffer]) -> None:
        with self._ending_after_an_error("appending to"):
            self._unsynced += write_all(self._ops, self._fd, buffers)

    def sync(self) -> None:
        with self._ending_after_an_error("syncing"):
            self._ops.fsync(self._fd)
        if not self._named:
            with self._ending_after_an_error("syncing the folder of"):
                self._ops.fsync_folder(self._path.rpartition("/")[0])
            self._named = True
        self.size, self._unsynced = self.size + self._unsynced, 0

    def close(self) -> None:
        """See `Appender.close`; closing twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._ops.close(fd)
            except OSError as error:
                raise storage_error("closing", self._path, error) from error

    @contextlib.contextmanager
    def _ending_after_an_error(self, operation: str) -> Iterator[None]:
        if self._fd < 0:
            raise StorageError(
                f"{operation} {self._path}: an earlier append failed or the file was closed",
                hint="see the first error; resuming begins a new file",
            )
        try:
            yield
        except BaseException as error:
            # An interrupt may also have left part of the bytes behind.
            self._abandon()
            if isinstance(error, OSError):
                raise storage_error(operation, self._path, error) from error
            raise

    def _abandon(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            self._ops.close(fd)
        except OSError:
            # The first error says what happened; the descriptor is closed either way.
            return


def write_all(ops: FileOps, fd: int, buffers: Iterable[Buffer]) -> int:
    """Write every byte at the descriptor's offset, in as many calls as it takes; returns how many."""
    size = 0
    for buffer in buffers:
        left = memoryview(buffer).cast("B")
        while left.nbytes:
            count = ops.write(fd, left)
            if count <= 0:
                raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
            size += count
            left = left[count:]
    return size
