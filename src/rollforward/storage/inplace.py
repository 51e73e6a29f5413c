"""Files that are written in place: a run's lock, and heartbeats.

Everything else is written to a temporary file and renamed, which never follows a link. Writing in place
would: in a folder from someone else, a symbolic or hard link could redirect the write to any of the user's
files, and a named pipe would block forever. So such a file is opened without following links and without
blocking, and is used only if it is a regular file with no other name.
"""

import errno
import os
import stat
from contextlib import ExitStack, suppress

from rollforward.errors import StorageError
from rollforward.storage.failures import storage_error

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a regular file",
}
_IN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def open_in_place(root: str, path: str, *, replace: bool = False) -> int:
    """A descriptor of the file, open for reading and writing; the file is created if it is missing.

    `root` exists and may be reached through links; folders below it may not be links, and are created.
    StorageError for anything but a regular file with only this name; with `replace`, those are replaced.
    """
    *folders, name = path.split("/")
    with ExitStack() as stack:
        where = root
        try:
            inside = os.open(root, _IN_FOLDER)
            stack.callback(os.close, inside)
            for folder in folders:
                where = f"{where}/{folder}"
                inside = _enter(inside, folder)
                stack.callback(os.close, inside)
            where = f"{where}/{name}"
            if replace:
                _free_name(name, inside)
            return _open_plain(name, inside)
        except OSError as error:
            raise _refusal(where, error) from error


def _enter(inside: int, folder: str) -> int:
    try:
        return os.open(folder, _IN_FOLDER | os.O_NOFOLLOW, dir_fd=inside)
    except FileNotFoundError:
        with suppress(FileExistsError):  # another worker was faster
            os.mkdir(folder, dir_fd=inside)
        return os.open(folder, _IN_FOLDER | os.O_NOFOLLOW, dir_fd=inside)


def _open_plain(name: str, inside: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(name, flags, 0o666, dir_fd=inside)
    try:
        if not _is_plain(os.fstat(fd)):
            raise OSError(errno.ELOOP, "not a file of its own")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _free_name(name: str, inside: int) -> None:
    """Free the name if it is not a regular file with only this name; the target of a link stays."""
    with suppress(FileNotFoundError):
        if not _is_plain(os.stat(name, dir_fd=inside, follow_symlinks=False)):
            os.unlink(name, dir_fd=inside)


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def _refusal(where: str, error: OSError) -> StorageError:
    """The system reports a link as too many levels of links, and a pipe as a missing device."""
    if error.errno not in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR):
        return storage_error("opening", where, error)
    try:
        status = os.lstat(where)
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            found = "a hard link: the same file has another name too"
    except OSError:
        found = error.strerror or str(error)
    return StorageError(
        f"opening {where}: it is {found}, so writing to it would change another file",
        hint=f"a run's folder holds files of its own: remove {where}, when no trainer runs there",
    )
