"""What the operating system keeps of files in memory: synced, counted, and dropped to measure the disk."""

import ctypes
import gc
import mmap
import os
from pathlib import Path

import numpy as np


def sync(paths: list[Path]) -> None:
    """fsync files and their folders."""
    for path in {*paths, *(path.parent for path in paths)}:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(paths: list[Path]) -> bool:
    """Drop files from the page cache, so that the next read comes from the disk; whether all are gone."""
    # Some peers hand out arrays that are mapped files, and a page that is mapped stays.
    gc.collect()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return all(cached_share(path) < 0.01 for path in paths)


def cached_share(path: Path) -> float:
    """How much of a file is in the page cache, 0 to 1."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        if ctypes.CDLL(None).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        ):
            raise OSError("mincore failed")
        del view
    return float((pages & 1).mean())
