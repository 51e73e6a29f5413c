"""Reads the files of a checkpoint once while something else is done, so that they are in memory afterwards.

A start loads its framework for a second or more before it can load a checkpoint, and the disk is idle. What
is read here is thrown away: the kernel keeps it, as it keeps any file that was read, in memory that nobody
needs. So this takes no memory from the model, decides nothing, and cannot do damage: restoring reads the
same bytes again, from memory then, and verifies them where it puts them.
"""

import threading
from contextlib import suppress

from rollforward.errors import StorageError
from rollforward.storage import Storage
from rollforward.store.manifest import Manifest

_AT_ONCE = 4 << 20
"""Bytes. Python's lock is free while they are read."""


def read_ahead(storage: Storage, manifest: Manifest, *, near: int) -> threading.Thread:
    """Begin to read what rank `near` saved; returns the thread, for which nobody has to wait."""
    paths = [manifest.tensor_file(role, near).path for role in manifest.roles]
    thread = threading.Thread(target=_read, args=(storage, paths), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(storage: Storage, paths: list[str]) -> None:
    buffer = memoryview(bytearray(_AT_ONCE))
    for path in paths:
        # Whatever is wrong with it is found, and told, when it is restored.
        with suppress(StorageError), storage.open(path) as file:
            for offset in range(0, file.size, _AT_ONCE):
                file.read_into(buffer[: min(_AT_ONCE, file.size - offset)], offset)
