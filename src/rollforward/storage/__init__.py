"""Bytes and durability. Everything that must survive a crash is written through this room.

`base` says what a storage promises, `local` keeps the promise on a POSIX file system (`appending`
for files that grow, `failures` for the words when it cannot), and `filelock` keeps two trainers
out of one folder. Nothing here knows what a checkpoint is.
"""

from rollforward.storage.base import (
    Appender,
    Buffer,
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
