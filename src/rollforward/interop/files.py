"""Tensors in files that other trainers wrote, `.safetensors` or `.ckpt`: what is there, and the values.

Names are kept as they are in the files. BF16 is widened to float32, which loses nothing. There are no
digests, so what the file has is taken as it is; a `.ckpt` file's CRC is checked if it was saved with one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.interop.ckptfile import ForeignTensor, check_crc, read_ckpt_header
from rollforward.storage import LocalStorage, ReadHandle
from rollforward.store.tensorfile import DTYPES, read_header


def read_layout(path: Path) -> dict[str, NDArray[Any]]:
    """Name -> an array of the dtype and shape that `read_arrays` will give, backed by one element.

    From the header alone. CheckpointInvalid when it cannot be read.
    """
    return {tensor.name: np.broadcast_to(hollow(tensor), tensor.shape) for tensor in tensors_of(path)}


def read_arrays(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the name and array of each tensor. CheckpointInvalid when one cannot be read."""
    tensors = tensors_of(path)
    # This reads every byte, so the header, which says how many there should be, is read first.
    check_file(path)
    for tensor in tensors:
        yield tensor.name, read_tensor(path, tensor)


def check_file(path: Path) -> None:
    """CheckpointInvalid when the file has a CRC of the whole and does not match it."""
    if path.suffix == ".ckpt":
        with _opened(path) as handle:
            check_crc(handle, str(path))


def tensors_of(path: Path) -> list[ForeignTensor]:
    """The tensors in a file, from its header. CheckpointInvalid when it cannot be read."""
    with _opened(path) as handle:
        if path.suffix == ".ckpt":
            return read_ckpt_header(handle, str(path))
        return [
            ForeignTensor(
                record.name,
                DTYPES[record.dtype],
                record.shape,
                ((record.begin, record.end),),
                bfloat16=record.dtype == "BF16",
            )
            for record in read_header(handle, str(path)).tensors
        ]


def read_tensor(path: Path, tensor: ForeignTensor) -> NDArray[Any]:
    """One of `tensors_of(path)`. CheckpointInvalid when it cannot be read."""
    data = np.empty(sum(end - begin for begin, end in tensor.pieces), np.uint8)
    filled = 0
    with _opened(path) as handle:
        for begin, end in tensor.pieces:
            if begin < end:
                handle.read_into(data[filled : filled + end - begin].data, begin)
            filled += end - begin
    return _widened(tensor, data.view(tensor.dtype).reshape(tensor.shape))


def hollow(tensor: ForeignTensor) -> NDArray[Any]:
    """A scalar of the dtype that `read_tensor` gives."""
    return _widened(tensor, np.zeros((), tensor.dtype))


@contextmanager
def _opened(path: Path) -> Iterator[ReadHandle]:
    """An open file; storage errors become CheckpointInvalid."""
    # A user may have symlinked large files into place, and no manifest says here where they must be.
    path = Path(os.path.realpath(path))
    try:
        with LocalStorage(path.parent).open(path.name) as handle:
            yield handle
    except StorageError as error:
        raise CheckpointInvalid(f"{path}: {error.message}") from error


def _widened(tensor: ForeignTensor, bits: NDArray[Any]) -> NDArray[Any]:
    if not tensor.bfloat16:
        return bits
    flat = bits.reshape(-1).view(np.uint16).astype(np.uint32) << 16
    return flat.view(np.float32).reshape(bits.shape)
