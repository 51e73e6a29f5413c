"""What the store needs from a disk, as two small protocols.

`Storage` is what the store builds on: whole files, made durable before they are visible,
named by paths relative to one folder. `FileOps` is what a storage builds on: one method per
system call. It exists so that tests can put a simulated disk under the same code that runs
in production, record each operation, and crash between any two.

Paths of a `Storage` are relative, `/`-separated and checked (`check_path`): no name read
from a disk can lead out of the folder. Left out: changing written data in place, permissions,
and links of any kind; a symbolic link below the root is rejected.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, runtime_checkable

from rollforward.storage.failures import settled_error

_NO_NAMES = frozenset({"", ".", ".."})
_REFUSED = re.compile("[\\\\\x00-\x1f\x7f\ud800-\udfff]")

Buffer = bytes | bytearray | memoryview

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One name in a folder."""

    name: str
    kind: Literal["file", "folder", "link", "other"]
    size: int
    """A file's size in bytes; 0 for everything else."""


class ReadHandle(Protocol):
    """An open file. `size` was taken when it was opened."""

    size: int
    chunk_bytes: int
    """How much to ask for at once when all of it is read, and digested meanwhile."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer from `offset`; StorageError when the file ends before that."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...

    def __enter__(self) -> "ReadHandle": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Appender(Protocol):
    """A file that only grows, and that nothing else writes."""

    size: int
    """Bytes that are known to be durable."""

    def append(self, buffers: Iterable[Buffer]) -> None:
        """Add to the end, durably: `write`, then `sync`."""
        ...

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Add to the end. After an error every further call raises StorageError.

        On a file system the bytes survive the death of the process; a crash of the machine, and in an object
        store anything, only after the next `sync`.
        """
        ...

    def sync(self) -> None:
        """Make everything that was written durable. Errors as from `write`."""
        ...

    def close(self) -> None:
        """Close the file; what was appended stays."""
        ...


class Storage(Protocol):
    """A folder of files, each complete and durable from the moment its name exists.

    Every method raises StorageError, with operation, path, cause and what to try.
    """

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        """Write a file; returns its size.

        When this returns, the content, the name and the folders above it survive a crash.
        Until then, and after an error, an existing file of that name is unchanged, unless the
        error came from the very last step (the sync of the folder): then the new content is
        complete and visible, but may not survive a crash.
        """
        ...

    def open(self, path: str) -> ReadHandle:
        """Open a file for reading."""
        ...

    def appender(self, path: str) -> Appender:
        """Create a new file that grows; StorageError when the name is taken.

        The file itself is durable after the first `append`.
        """
        ...

    def rewrite(self, path: str, buffers: Iterable[Buffer]) -> Appender:
        """Replace a file as `write` does, and continue at its end.

        When this returns, the new content is durable under the name; appended bytes follow it.
        Anyone still appending to the replaced file does not write to this one.
        """
        ...

    def stat(self, path: str) -> Entry | None:
        """The entry with this name; None when there is none."""
        ...

    def scan(self, folder: str) -> list[Entry]:
        """The entries of a folder (`""` is the root), by name; empty when there is no such folder."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file; no error when it is already gone. Durable after `sync_folder`."""
        ...

    def sync_file(self, path: str) -> None:
        """Make durable what an appender wrote, whether or not it synced, and whichever process it was in."""
        ...

    def sync_folder(self, path: str) -> None:
        """Make the folder's names durable."""
        ...


@runtime_checkable
class Conditional(Protocol):
    """A storage that writes on a condition: of several writers at the same moment, one gets through.

    Both raise StorageError as the methods of `Storage` do.
    """

    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        """A small file's content, and the tag that changes with each write; None when there is no file."""
        ...

    def put_if(self, path: str, content: bytes, tag: str | None) -> str | None:
        """Write the file if it still has this tag; None: if there is none. Returns its new tag.

        Returns None, with nothing written, when that does not hold. A write whose answer was lost is
        recognised by its content, so the content must be the writer's own.
        """
        ...


class FileOps(Protocol):
    """System calls, with absolute paths; each raises OSError like the system."""

    def create(self, path: str) -> int:
        """Create a new file, open for writing; FileExistsError when the name is taken."""
        ...

    def open_read(self, path: str) -> int:
        """Open an existing file for reading; never through a symbolic link."""
        ...

    def write(self, fd: int, data: memoryview) -> int:
        """Write at the end; returns the number of bytes written, which may be fewer than given."""
        ...

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read into the buffer; returns the number of bytes read, 0 at the end of the file."""
        ...

    def size(self, fd: int) -> int:
        """Size of an open file in bytes."""
        ...

    def start_write_back(self, fd: int, offset: int, size: int) -> None:
        """Hint that these bytes may go to the disk now; promises nothing and never fails."""
        ...

    def fsync(self, fd: int) -> None:
        """Make the file's content durable."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Rename a file within its folder, replacing any file of the new name."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        ...

    def mkdir(self, path: str) -> None:
        """Make one folder."""
        ...

    def fsync_folder(self, path: str) -> None:
        """Make a folder's names durable."""
        ...

    def lstat(self, path: str) -> Entry:
        """The entry with this name, without following links."""
        ...

    def scan(self, path: str) -> list[Entry]:
        """The entries of a folder."""
        ...


def check_path(path: str) -> str:
    """Return the path if it is relative and stays inside; otherwise ValueError says what is wrong."""
    if not path:
        raise ValueError("an empty path")
    if path.startswith("/"):
        raise ValueError(f"{path!r} is an absolute path")
    parts = path.split("/")
    if not _NO_NAMES.isdisjoint(parts):
        raise ValueError(f"{path!r} has an empty component, or one that is a dot or two")
    if _REFUSED.search(path):
        raise ValueError(f"{path!r} holds a backslash, a control character, or what UTF-8 has no form for")
    if any(len(part.encode()) > 255 for part in parts):
        raise ValueError(f"{path[:40]!r}... has a component longer than 255 bytes")
    return path


def read_small(storage: Storage, path: str, *, limit: int) -> bytes:
    """Read a whole file that should be small; StorageError when it is larger than `limit` bytes."""
    with storage.open(path) as handle:
        return read_whole(handle, path, limit=limit)


def read_whole(handle: ReadHandle, path: str, *, limit: int) -> bytes:
    """`read_small` for a file that is already open."""
    if handle.size > limit:
        raise settled_error(
            f"reading {path}: {handle.size} bytes, where at most {limit} are expected",
            hint="this is not what its name says; check what wrote it",
        )
    content = bytearray(handle.size)
    if handle.size:
        handle.read_into(memoryview(content), 0)
    return bytes(content)


def read_lines(storage: Storage, path: str, *, limit: int, longest: int) -> Iterator[bytes]:
    """The lines of a file, without line endings, holding one piece of it in memory at a time.

    Lines of more than `longest` bytes are skipped. StorageError as from `read_small`.
    """
    with storage.open(path) as handle:
        if handle.size > limit:
            raise settled_error(
                f"reading {path}: {handle.size} bytes, where at most {limit} are expected",
                hint="this is not what its name says; check what wrote it",
            )
        begun, too_long = b"", False
        for offset in range(0, handle.size, _PIECE_BYTES):
            piece = bytearray(min(_PIECE_BYTES, handle.size - offset))
            handle.read_into(memoryview(piece), offset)
            first, *others = bytes(piece).split(b"\n")
            for line in others:
                if not too_long and len(begun) + len(first) <= longest:
                    yield begun + first
                begun, first, too_long = b"", line, False
            if too_long or len(begun) + len(first) > longest:
                begun, too_long = b"", True
            else:
                begun += first
        if begun and not too_long:
            yield begun
