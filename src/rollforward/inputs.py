"""Files that a user names or brings: opened without blocking, size-limited before they are read.

A dataset, a configuration or a file in a model's folder may be anything: a named pipe would block the
program forever, `/dev/zero` would fill its memory, and a Git LFS pointer may stand in for gigabytes.
Symbolic links are followed, since Hugging Face's cache consists of them. Errors are OSError or ValueError
that fit one line; callers, who know what the file should be, turn them into errors with a hint.

Left out: files in a run's own folder, which go through `storage`.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_HINT = "run `git lfs pull` where it was cloned, or download the file itself"

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_input(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; OSError at once for anything else."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # what opening a socket raises
            raise OSError(errno.EINVAL, "not a regular file") from None
        raise
    kind = stat.S_IFMT(os.fstat(file).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(file, "rb")
    os.close(file)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'something else')}, not a regular file")


def read_input(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; OSError otherwise."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        # The file may grow while it is being read, and files in /proc have no size.
        content = file.read(min(size + 65536, most) + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes")
    return content


def is_there(path: Path) -> bool:
    """Whether the path exists; also True when that is unknown, so that reading it says why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def is_lfs_pointer(content: bytes) -> bool:
    """Whether this is the pointer that Git LFS leaves in place of a large file."""
    return content.startswith(LFS_POINTER)


def parse_json(content: bytes, *, unique: bool = False) -> Any:
    """Parse a JSON text; with `unique`, no object may have a key twice. ValueError in one line."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys if unique else None)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{error.msg} at {where}") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("it has a whole number of too many digits") from None
        raise


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: a JSON object from its pairs; ValueError when a key appears twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:60]!r} appears twice in one JSON object")
            seen.add(key)
    return found
