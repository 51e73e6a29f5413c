"""Files that are written in place: the lock of a run, and heartbeats.

Everything else is written beside its name and renamed, which never reaches through a link. What is written
in place would: a symbolic or a hard link in a folder from somebody else would send it to any file of the
user's, and a named pipe would block for ever. So such a file is opened without following links and without
waiting, and is used only when it is a regular file that has no other name.
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
    """A descriptor of the file, open to read and write; it is made when it is missing.

    `root` exists and may be reached through links; folders below it may not, and are made. StorageError for
    anything but a regular file that has this one name; with `replace` the name is given to a new file.
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
    """Take the name from whatever is not a file of its own; what a link leads to stays."""
    with suppress(FileNotFoundError):
        if not _is_plain(os.stat(name, dir_fd=inside, follow_symlinks=False)):
            os.unlink(name, dir_fd=inside)


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def _refusal(where: str, error: OSError) -> StorageError:
    """The system says of a link that there are too many levels, and of a pipe that there is no device."""
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
        f"opening {where}: it is {found}, and what is written to it would change something else",
        hint=f"a run's folder holds files of its own: remove {where}, when no trainer runs there",
    )
