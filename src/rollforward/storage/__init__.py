"""Bytes and durability. Everything that must survive a crash is written through this package.

`base` defines what a storage promises, `local` implements it on a POSIX file system (`appending`
for files that grow, `failures` for the error messages), `objects` in a bucket (`answers` for the error
messages; `listing` to look at many files there at once, `inorder` to read one in small pieces); `address`
makes one from text. `filelock` keeps two trainers out of one folder. Nothing here knows what a checkpoint is.
"""

from rollforward.storage.base import (
    Appender,
    Buffer,
    Conditional,
    Entry,
    FileOps,
    ReadHandle,
    Storage,
    read_lines,
    read_small,
    read_whole,
)
from rollforward.storage.local import LocalStorage, OsFiles

__all__ = [
    "Appender",
    "Buffer",
    "Conditional",
    "Entry",
    "FileOps",
    "LocalStorage",
    "OsFiles",
    "ReadHandle",
    "Storage",
    "read_lines",
    "read_small",
    "read_whole",
]
