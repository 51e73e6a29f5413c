"""Messages for disk errors: which operation failed, on what, why, and what to try."""

import errno

from rollforward.errors import StorageError

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, lower save_max_ckpt_num, or save to another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, ask for more, or save to another disk",
    errno.EROFS: "the file system is read-only, often after a disk error: see dmesg, or save elsewhere",
    errno.EIO: "the disk failed to read or write: see dmesg, and save to another disk",
    errno.EACCES: "permission denied: change the folder's owner or mode, or save elsewhere",
    errno.EPERM: "permission denied: change the folder's owner or mode, or save elsewhere",
    errno.ENOENT: "check that the path exists and is spelled as it is on disk",
    errno.ENOTDIR: "there is a file where a folder is needed: move it away",
    errno.ELOOP: "there is a symbolic link where a real file is needed: put the file itself there",
    errno.EINVAL: "something else has the name of a file of the run (a named pipe, a device?): move it away",
    errno.ENXIO: "something else has the name of a file of the run (a named pipe, a socket?): move it away",
    errno.EISDIR: "a folder has the name of a file of the run: move it away",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "the path is too long: save to a folder with a shorter path",
}


NOT_REGULAR = "not a regular file"
"""What `EINVAL` means when something other than a file was opened; the system has other uses for it."""

_SETTLED = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}
)
"""These say what is there. Any other (EIO, ESTALE, EMFILE, ENOMEM, EACCES, ...): we could not look."""


def storage_error(operation: str, path: str, error: OSError) -> StorageError:
    """A StorageError that says which operation failed, on what, why, and what to try."""
    cause = error.strerror or str(error)
    name = errno.errorcode.get(error.errno or 0, "no errno")
    hint = _HINTS.get(error.errno or 0, "see dmesg for what the system says about the disk")
    found = StorageError(f"{operation} {path}: {cause} ({name})", hint=hint)
    found.settled = error.errno in _SETTLED or cause.endswith(NOT_REGULAR)
    return found


def settled_error(message: str, *, hint: str) -> StorageError:
    """A StorageError that says what is there, and would be the same next time."""
    found = StorageError(message, hint=hint)
    found.settled = True
    return found
