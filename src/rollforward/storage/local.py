"""Files on a POSIX file system, and the one durable-write primitive.

`LocalStorage._replace` is the only place in the product that makes a whole file durable, and the
order of its calls is the promise: create a temporary file in the same folder, write, fsync
it, rename it to its name, fsync the folder. The folders above are synced in their parents
the first time this process uses them, even if they already exist: an earlier process may
have created them and died before they were durable.

A failed fsync is never retried. The kernel marks the pages clean when it reports the error,
so a second fsync on the same descriptor would succeed without having written anything.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rollforward.errors import StorageError
from rollforward.storage.appending import FileAppender, write_all
from rollforward.storage.base import Appender, Buffer, Entry, FileOps, ReadHandle, check_path
from rollforward.storage.failures import NOT_REGULAR
from rollforward.storage.failures import storage_error as storage_error

WRITE_BACK_BYTES = 8 << 20
"""Write-back is started each time this much was written, so that fsync has little left to do."""

_sync_content = getattr(os, "fdatasync", os.fsync)
"""Does not sync a file's times, which halves the cost of an append. Not every system has it."""


class OsFiles:
    """`FileOps` of the operating system."""

    def create(self, path: str) -> int:
        """O_EXCL: never opens an existing file."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_read(self, path: str) -> int:
        """O_NONBLOCK: a named pipe that someone put there must not block us."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, fd: int, data: memoryview) -> int:
        """At the descriptor's offset, which is the end."""
        return os.write(fd, data)

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Straight into the caller's memory."""
        return os.preadv(fd, [buffer], offset)

    def size(self, fd: int) -> int:
        """Regular files only: anything else is reported as an invalid argument."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, NOT_REGULAR)
        return status.st_size

    def start_write_back(self, fd: int, offset: int, size: int) -> None:
        """Linux starts writing dirty pages that are declared unneeded, and keeps them cached."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)

    def fsync(self, fd: int) -> None:
        """Syncs content and what is needed to read it back (size, extents); a file's times may be lost."""
        _sync_content(fd)

    def close(self, fd: int) -> None:
        """Close."""
        os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Atomic within a file system."""
        os.rename(source, target)  # noqa: PTH104 - one system call per method

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)  # noqa: PTH108 - one system call per method

    def mkdir(self, path: str) -> None:
        """Make one folder."""
        os.mkdir(path, 0o777)  # noqa: PTH102 - one system call per method

    def fsync_folder(self, path: str) -> None:
        """A folder has a descriptor, like a file."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lstat(self, path: str) -> Entry:
        """Links not followed."""
        return _entry(path.rpartition("/")[2], os.lstat(path))

    def scan(self, path: str) -> list[Entry]:
        """A name that disappears in the meantime is left out."""
        found = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    found.append(_entry(entry.name, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue
        return found


def _entry(name: str, status: os.stat_result) -> Entry:
    if stat.S_ISREG(status.st_mode):
        return Entry(name, "file", status.st_size)
    if stat.S_ISDIR(status.st_mode):
        return Entry(name, "folder", 0)
    return Entry(name, "link" if stat.S_ISLNK(status.st_mode) else "other", 0)


def same_folder(one: str | Path, other: str | Path) -> bool:
    """Whether two paths are the same place, following links; a loop of links equals only itself."""
    return os.path.realpath(one) == os.path.realpath(other)


def open_to_append(path: str | Path) -> TextIO:
    """Open a text file for appending lines, creating it if missing. For logs: nothing is durable.

    OSError at once when it is neither a file nor a device: a named pipe would block until it has a reader.
    """
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
        os.close(fd)
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace", buffering=1)


class LocalStorage:
    """`Storage` in a folder of a POSIX file system. The first write creates the folder."""

    def __init__(self, root: str | Path, ops: FileOps | None = None) -> None:
        self.root = str(Path(root).absolute())
        self._ops: FileOps = ops if ops is not None else OsFiles()
        self._durable_folders: set[str] = set()
        self._temporary = secrets.token_hex(4)

    def __repr__(self) -> str:
        return f"LocalStorage({self.root!r})"

    def __str__(self) -> str:
        return str(self.root)

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        _, size = self._replace(self._full(path), buffers)
        return size

    def make_root(self) -> None:
        """Create the root folder, durably, if it is missing."""
        self._make_durable_folder(self.root)

    def open(self, path: str) -> ReadHandle:
        """See `Storage.open`. No component below the root may be a symbolic link."""
        target = self._full(path)
        self._refuse_links(path)
        fd = -1
        try:
            fd = self._ops.open_read(target)
            return _LocalHandle(self._ops, fd, self._ops.size(fd), target)
        except OSError as error:
            self._close_quietly(fd)
            raise storage_error("opening", target, error) from error

    def appender(self, path: str) -> Appender:
        target = self._full(path)
        self._make_durable_folder(target.rpartition("/")[0])
        try:
            fd = self._ops.create(target)
        except OSError as error:
            raise storage_error("creating", target, error) from error
        return FileAppender(self._ops, target, fd)

    def rewrite(self, path: str, buffers: Iterable[Buffer]) -> Appender:
        target = self._full(path)
        fd, size = self._replace(target, buffers, stays_open=True)
        return FileAppender(self._ops, target, fd, size=size, named=True)

    def stat(self, path: str) -> Entry | None:
        target = self._full(path)
        try:
            return self._ops.lstat(target)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error("looking at", target, error) from error

    def scan(self, folder: str) -> list[Entry]:
        target = self._full(folder) if folder else self.root
        try:
            return sorted(self._ops.scan(target), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise storage_error("listing", target, error) from error

    def remove(self, path: str) -> None:
        """See `Storage.remove`. Never removes anything through a symbolic link to a folder."""
        target = self._full(path)
        self._refuse_links(path)
        try:
            self._ops.unlink(target)
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error("removing", target, error) from error

    def sync_file(self, path: str) -> None:
        target, fd = self._full(path), -1
        self._refuse_links(path)
        try:
            fd = self._ops.open_read(target)
            self._ops.fsync(fd)
        except OSError as error:
            raise storage_error("syncing", target, error) from error
        finally:
            self._close_quietly(fd)

    def sync_folder(self, path: str) -> None:
        self._sync(self._full(path) if path else self.root)

    def _replace(
        self, target: str, buffers: Iterable[Buffer], *, stays_open: bool = False
    ) -> tuple[int, int]:
        """The durable write: the order of the calls below is the promise.

        Returns the file's descriptor, if it stays open, and its size.
        """
        folder, _, name = target.rpartition("/")
        self._make_durable_folder(folder)
        temporary = f"{folder}/.{name[:200]}.{self._temporary}.tmp"
        operation, fd = "creating", -1
        try:
            fd = self._create(temporary)
            operation = "writing"
            size = self._write_early(fd, buffers)
            operation = "syncing"
            self._ops.fsync(fd)
            if not stays_open:
                written, fd = fd, -1
                self._ops.close(written)
            operation = "renaming"
            self._ops.rename(temporary, target)
        except BaseException as error:
            self._close_quietly(fd)
            self._discard(temporary)
            if isinstance(error, OSError):
                raise storage_error(operation, target, error) from error
            raise
        try:
            self._sync(folder)
        except BaseException:
            self._close_quietly(fd)
            raise
        return fd, size

    def _close_quietly(self, fd: int) -> None:
        """For use after an error that says more than an error from closing would."""
        if fd >= 0:
            with contextlib.suppress(OSError):
                self._ops.close(fd)

    def _full(self, path: str) -> str:
        try:
            return f"{self.root}/{check_path(path)}"
        except ValueError as error:
            raise StorageError(
                f"refusing a path that leaves {self.root}: {error}",
                hint="a file of this run was edited or is damaged: names in it must stay inside the folder",
            ) from error

    def _refuse_links(self, path: str) -> None:
        parts = path.split("/")
        for count in range(1, len(parts)):
            folder = "/".join(parts[:count])
            entry = self.stat(folder)
            if entry is not None and entry.kind == "link":
                raise storage_error(
                    "opening", self._full(path), OSError(errno.ELOOP, f"{folder} is a symbolic link")
                )

    def _create(self, temporary: str) -> int:
        try:
            return self._ops.create(temporary)
        except FileExistsError:
            # The same name twice: an earlier write by this object failed and could not clean up.
            self._ops.unlink(temporary)
            return self._ops.create(temporary)

    def _write_early(self, fd: int, buffers: Iterable[Buffer]) -> int:
        """Write everything, letting the disk start while the rest is still being computed and copied."""
        size = started = 0
        for buffer in buffers:
            size += write_all(self._ops, fd, [buffer])
            if size - started >= WRITE_BACK_BYTES:
                self._ops.start_write_back(fd, started, size - started)
                started = size
        return size

    def _discard(self, temporary: str) -> None:
        try:
            self._ops.unlink(temporary)
        except OSError:
            # Whatever stopped the write may stop this too. The next save's cleanup tries again.
            return

    def _make_durable_folder(self, folder: str) -> None:
        """Create the folder and those above it, and sync each in its parent."""
        if folder in self._durable_folders:
            return
        parent = folder.rpartition("/")[0]
        # Above the root, only missing folders are created and synced: existing ones are not ours.
        if folder.startswith(self.root + "/"):
            self._make_durable_folder(parent)
        made = self._make_folder(folder)
        if made or folder.startswith(self.root + "/"):
            self._sync(parent)
        elif folder == self.root:
            self._sync_foreign(parent or "/")
        self._durable_folders.add(folder)

    def _sync_foreign(self, folder: str) -> None:
        """Sync the parent of a root that someone else created: we may lack permission to read it."""
        try:
            self._ops.fsync_folder(folder)
        except PermissionError:
            return
        except OSError as error:
            raise storage_error("syncing folder", folder, error) from error

    def _make_folder(self, folder: str) -> bool:
        try:
            entry = self._ops.lstat(folder)
        except FileNotFoundError:
            parent = folder.rpartition("/")[0]
            if parent and parent not in self._durable_folders:
                self._make_durable_folder(parent)
            try:
                self._ops.mkdir(folder)
            except FileExistsError:
                return False  # another rank was faster
            except OSError as error:
                raise storage_error("making folder", folder, error) from error
            return True
        except OSError as error:
            raise storage_error("looking at", folder, error) from error
        inside = folder.startswith(self.root + "/")
        if entry.kind == "file" or entry.kind == "other" or (entry.kind == "link" and inside):
            code = errno.ELOOP if entry.kind == "link" else errno.ENOTDIR
            raise storage_error("making folder", folder, OSError(code, f"a {entry.kind} is in the way"))
        return False

    def _sync(self, folder: str) -> None:
        try:
            self._ops.fsync_folder(folder)
        except OSError as error:
            raise storage_error("syncing folder", folder, error) from error


class _LocalHandle:
    """`ReadHandle` on a descriptor."""

    chunk_bytes = 256 << 10
    """What was read is digested while it is still in the core's own cache."""

    def __init__(self, ops: FileOps, fd: int, size: int, path: str) -> None:
        self.size = size
        self._ops = ops
        self._fd = fd
        self._path = path

    def read_into(self, buffer: memoryview, offset: int) -> None:
        left = buffer.cast("B")
        while left.nbytes:
            try:
                count = self._ops.pread(self._fd, left, offset)
            except OSError as error:
                raise storage_error("reading", self._path, error) from error
            if count == 0:
                raise StorageError(
                    f"reading {self._path}: the file ends at byte {offset}, {left.nbytes} bytes too early",
                    hint="the file was cut short; an older checkpoint may still be whole",
                )
            offset += count
            left = left[count:]

    def close(self) -> None:
        """See `ReadHandle.close`; closing twice does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            # What was read is already in memory; an error now says nothing about it.
            with contextlib.suppress(OSError):
                self._ops.close(fd)

    def __enter__(self) -> "_LocalHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
