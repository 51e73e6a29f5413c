"""Opening a checkpoint's tensor files and reading their blocks: nothing unverified is handed out.

A file is first compared with its table: its size, and its header. Then each block is digested as it is read.
"""

from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.boxes import Box, intersection, within
from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.storage import ReadHandle, Storage
from rollforward.store.contents import Part, StoredFile
from rollforward.store.tensorfile import (
    Block,
    file_digest,
    new_array,
    read_header,
    read_verified,
)
from rollforward.store.unreadable import rejection

OPEN_FILES = 64
"""Files open at once: a thousand ranks have more files than a process may open."""


class OpenFiles:
    """Tensor files, opened when needed; the header of each is checked once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._handles: OrderedDict[str, ReadHandle] = OrderedDict()
        self._checked: set[str] = set()

    def open(self, file: StoredFile) -> ReadHandle:
        """The file; good until OPEN_FILES others have been asked for. CheckpointInvalid."""
        path = file.record.path
        handle = self._handles.get(path)
        if handle is None:
            while len(self._handles) >= OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
            handle = self._handles[path] = _open(self._storage, file, check=path not in self._checked)
            self._checked.add(path)
        self._handles.move_to_end(path)
        return handle

    def check_empty(self, files: Iterable[StoredFile]) -> None:
        """Check those that hold no piece, and are not read otherwise."""
        for file in files:
            if not file.pieces:
                self.open(file)

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            handle.close()


def _open(storage: Storage, file: StoredFile, *, check: bool) -> ReadHandle:
    path, size = file.record.path, file.record.size
    try:
        handle = storage.open(path)
    except StorageError as error:
        raise rejection(error) from error
    try:
        if handle.size != size:
            raise CheckpointInvalid(f"{path}: {handle.size} bytes instead of {size}")
        if check:
            _check_header(handle, file)
    except StorageError as error:
        handle.close()
        raise rejection(error) from error
    except CheckpointInvalid:
        handle.close()
        raise
    return handle


def _check_header(handle: ReadHandle, file: StoredFile) -> None:
    path, records = file.record.path, [piece.record for piece in file.pieces]
    header = read_header(handle, path)
    if file_digest(header.digest, records) != file.record.digest:
        raise CheckpointInvalid(f"{path}: its header does not have its recorded digest")
    found = [(item.name, item.dtype, item.shape, item.begin, item.end) for item in header.tensors]
    if found != [(item.name, item.dtype, item.shape, item.begin, item.end) for item in records]:
        raise CheckpointInvalid(f"{path}: its header does not agree with its table")


def read_block(handle: ReadHandle, part: Part, block: Block, array: NDArray[Any], target: Box) -> None:
    """Read a block, verify it, and put what `target` shares with it into `array`, which holds that box.

    Where the block is a stretch of the array's own memory, it is read straight into it.
    """
    shared = intersection(block.box, target)
    if shared is None:
        return
    place = array[within(shared, target)] if shared != target else array
    straight = shared == block.box and place.flags.c_contiguous and place.flags.writeable
    if straight and place.dtype.byteorder != ">":
        read_verified(handle, block, str(part), place.reshape(-1).view(np.uint8))
        return
    found, data = new_array(part.piece.record.dtype, block.box.shape)
    read_verified(handle, block, str(part), data)
    # Bits, not values: a framework may have its own bfloat16.
    same_bits = found if array.dtype.byteorder == ">" else found.view(array.dtype)
    place[...] = same_bits[within(shared, block.box)]
