"""A disk in memory that behaves as POSIX allows at its worst, and remembers every operation.

It implements `rollforward.storage.FileOps`, so the production code runs on it unchanged. The
log it keeps is what the crash tests replay. Three hooks make trouble: `fail` is asked before
every call and may raise OSError, `short_write` limits how much one write takes, and
`kill_after` raises `Killed` when that many operations have been done. `switch` is called after
each operation that is logged, and may let another rank go on.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rollforward.storage import Entry


class Killed(BaseException):
    """The process is gone: like SIGKILL, nothing after it runs (no cleaning up)."""


@dataclass(frozen=True)
class Op:
    """One operation that changed the disk, or made something durable, or a note of the test's."""

    kind: str
    """create, write, fsync, rename, unlink, mkdir, fsync_folder, or mark."""
    path: str = ""
    target: str = ""
    inode: int = 0
    data: bytes = b""
    note: Any = None


@dataclass
class _File:
    inode: int
    content: bytearray = field(default_factory=bytearray)


@dataclass
class _Folder:
    inode: int
    names: dict[str, "_File | _Folder | str"] = field(default_factory=dict)
    """A string is the target of a symbolic link."""


class SimulatedDisk:
    """Files and folders in memory, with absolute paths."""

    def __init__(self) -> None:
        self.root = _Folder(1)
        self.log: list[Op] = []
        self.fail: Callable[[str, str], None] = _nothing
        self.switch: Callable[[], None] = lambda: None
        self.short_write: int | None = None
        self.kill_after: int | None = None
        self._inodes = 1
        self._open: dict[int, tuple[_File, str]] = {}
        self._next_fd = 3

    # What tests use

    @classmethod
    def of(cls, tree: dict[str, bytes | None]) -> "SimulatedDisk":
        """A disk that holds these files (path -> content) and folders (path -> None)."""
        disk = cls()
        for path in sorted(tree):
            parts = path.strip("/").split("/")
            folder = disk.root
            for part in parts[:-1]:
                below = folder.names.setdefault(part, _Folder(disk._inode()))
                assert isinstance(below, _Folder)
                folder = below
            content = tree[path]
            if content is None:
                folder.names.setdefault(parts[-1], _Folder(disk._inode()))
            else:
                folder.names[parts[-1]] = _File(disk._inode(), bytearray(content))
        return disk

    def tree(self) -> dict[str, bytes | None]:
        """Path -> content of every file, None for folders."""
        found: dict[str, bytes | None] = {}

        def walk(folder: _Folder, prefix: str) -> None:
            for name, item in folder.names.items():
                if isinstance(item, _File):
                    found[f"{prefix}/{name}"] = bytes(item.content)
                elif isinstance(item, _Folder):
                    found[f"{prefix}/{name}"] = None
                    walk(item, f"{prefix}/{name}")

        walk(self.root, "")
        return found

    def mark(self, note: Any) -> None:
        """Put a note of the test's into the log."""
        self.log.append(Op("mark", note=note))

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link; opening it fails, as O_NOFOLLOW makes it."""
        folder, name = self._parent(path)
        folder.names[name] = target

    # FileOps

    def create(self, path: str) -> int:
        self._before("create", path)
        folder, name = self._parent(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        file = _File(self._inode())
        folder.names[name] = file
        self._did(Op("create", path, inode=file.inode))
        return self._descriptor(file, path)

    def open_read(self, path: str) -> int:
        self._before("open_read", path)
        folder, name = self._parent(path)
        item = folder.names.get(name)
        if item is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        if isinstance(item, str):
            raise OSError(errno.ELOOP, "Too many levels of symbolic links", path)
        if isinstance(item, _Folder):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        return self._descriptor(item, path)

    def write(self, fd: int, data: memoryview) -> int:
        file, path = self._open[fd]
        self._before("write", path)
        taken = bytes(data if self.short_write is None else data[: self.short_write])
        file.content += taken
        self._did(Op("write", path, inode=file.inode, data=taken))
        return len(taken)

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        file, path = self._open[fd]
        self._before("pread", path)
        part = file.content[offset : offset + buffer.nbytes]
        buffer[: len(part)] = part
        return len(part)

    def size(self, fd: int) -> int:
        return len(self._open[fd][0].content)

    def start_write_back(self, fd: int, offset: int, size: int) -> None:
        """A hint makes nothing durable."""

    def fsync(self, fd: int) -> None:
        file, path = self._open[fd]
        self._before("fsync", path)
        self._did(Op("fsync", path, inode=file.inode))

    def close(self, fd: int) -> None:
        self._before("close", self._open.pop(fd)[1])

    def rename(self, source: str, target: str) -> None:
        self._before("rename", source)
        folder, name = self._parent(source)
        other, new = self._parent(target)
        if name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", source)
        if isinstance(other.names.get(new), _Folder):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", target)
        other.names[new] = folder.names.pop(name)
        self._did(Op("rename", source, target))

    def unlink(self, path: str) -> None:
        self._before("unlink", path)
        folder, name = self._parent(path)
        if name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        if isinstance(folder.names[name], _Folder):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        del folder.names[name]
        self._did(Op("unlink", path))

    def mkdir(self, path: str) -> None:
        self._before("mkdir", path)
        folder, name = self._parent(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        made = _Folder(self._inode())
        folder.names[name] = made
        self._did(Op("mkdir", path, inode=made.inode))

    def fsync_folder(self, path: str) -> None:
        self._before("fsync_folder", path)
        self._folder(path)
        self._did(Op("fsync_folder", path))

    def lstat(self, path: str) -> Entry:
        self._before("lstat", path)
        if path == "/":
            return Entry("", "folder", 0)
        folder, name = self._parent(path)
        if name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return _entry(name, folder.names[name])

    def scan(self, path: str) -> list[Entry]:
        self._before("scan", path)
        return [_entry(name, item) for name, item in self._folder(path).names.items()]

    # Inside

    def _before(self, call: str, path: str) -> None:
        if self.kill_after is not None and len(self.log) >= self.kill_after:
            raise Killed
        self.fail(call, path)

    def _did(self, op: Op) -> None:
        self.log.append(op)
        self.switch()

    def _inode(self) -> int:
        self._inodes += 1
        return self._inodes

    def _descriptor(self, file: _File, path: str) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = (file, path)
        return self._next_fd

    def _folder(self, path: str) -> _Folder:
        folder = self.root
        for part in path.strip("/").split("/") if path.strip("/") else []:
            item = folder.names.get(part)
            if item is None:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
            if not isinstance(item, _Folder):
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
            folder = item
        return folder

    def _parent(self, path: str) -> tuple[_Folder, str]:
        above, _, name = path.rpartition("/")
        return self._folder(above), name


def _nothing(_call: str, _path: str) -> None:
    """No trouble."""


def _entry(name: str, item: _File | _Folder | str) -> Entry:
    if isinstance(item, _File):
        return Entry(name, "file", len(item.content))
    return Entry(name, "folder" if isinstance(item, _Folder) else "link", 0)
