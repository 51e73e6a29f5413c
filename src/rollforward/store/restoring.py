"""Reading a checkpoint back: every byte is verified before it is handed out.

Each file is first compared with the manifest (size, header, digests of its tensors), then each
tensor is read and digested on the way. CheckpointInvalid says, in one line, what is not intact;
anything yielded before it was intact.
"""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid, CheckpointMismatch, StorageError
from rollforward.storage import ReadHandle, Storage
from rollforward.store.attachments import FoundAttachments, find_attachments
from rollforward.store.layout import TensorFileName
from rollforward.store.manifest import FileRecord, Manifest
from rollforward.store.tensorfile import (
    TensorRecord,
    dtype_code,
    file_digest,
    new_array,
    read_header,
    read_verified,
)
from rollforward.store.unreadable import rejection
from rollforward.tensors import Layout, Tensors

_OPEN_FILES = 64
"""Files open at once while restoring: a thousand ranks have more files than a process may open."""


def read_tensors(
    storage: Storage,
    manifest: Manifest,
    roles: Collection[str] | None = None,
    *,
    only: Collection[tuple[str, str]] | None = None,
) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Yield (role, name, array) for every tensor of the roles (None: all), verified first.

    `only` selects single tensors by (role, name). BF16 and FP8 tensors have the dtypes of `ml_dtypes`.
    """
    for file, role, records in _by_file(manifest, roles):
        with open_checked(storage, file, records) as handle:
            for record in records:
                if only is not None and (role, record.name) not in only:
                    continue
                array, data = new_array(record)
                read_verified(handle, record, file.path, data)
                yield role, record.name, array


def restore_into(
    storage: Storage,
    manifest: Manifest,
    tensors: Tensors,
    *,
    threads: int = 4,
) -> int:
    """Read a checkpoint's tensors straight into arrays, several at once; returns the number of bytes.

    `tensors` is role -> name -> writable array, with the dtypes and shapes that `check_layout` checks;
    roles that are not in it are skipped. Every byte is verified, but only after it is in place:
    after CheckpointInvalid the arrays hold bytes that must not be used until an older checkpoint has
    been restored over them.
    """
    files = list(_by_file(manifest, tensors.keys()))
    size = 0
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for begin in range(0, len(files), _OPEN_FILES):
            with ExitStack() as opened:
                reads = []
                for file, role, records in files[begin : begin + _OPEN_FILES]:
                    handle = opened.enter_context(open_checked(storage, file, records))
                    reads += [(record, handle, file.path, tensors[role][record.name]) for record in records]
                # The largest first, so that no single thread is left with a large one at the end.
                reads.sort(key=lambda read: -read[0].size)
                _wait_for_all([pool.submit(_read_into, *read) for read in reads])
                size += sum(read[0].size for read in reads)
    return size


def _wait_for_all(waiting: list[Future[None]]) -> None:
    """Raise the first error, after cancelling what has not started and waiting for what has."""
    try:
        for done in waiting:
            done.result()
    except BaseException:
        wait([left for left in waiting if not left.cancel()])
        raise


def _read_into(record: TensorRecord, handle: ReadHandle, path: str, array: NDArray[Any]) -> None:
    if array.flags.c_contiguous and array.flags.writeable and array.dtype.byteorder != ">":
        read_verified(handle, record, path, array.reshape(-1).view(np.uint8))
        return
    found, data = new_array(record)
    read_verified(handle, record, path, data)
    # Bits, not values: a framework may have its own bfloat16.
    array[...] = found if array.dtype.byteorder == ">" else found.view(array.dtype)


def verify(storage: Storage, manifest: Manifest) -> None:
    """Read and digest every byte of a checkpoint; CheckpointInvalid for the first mismatch."""
    for _ in read_tensors(storage, manifest):
        pass
    read_attachments(storage, manifest)


def read_attachments(storage: Storage, manifest: Manifest) -> Mapping[str, bytes]:
    """File name -> content of every attachment, verified; CheckpointInvalid when neither copy is intact."""
    return locate_attachments(storage, manifest).contents


def locate_attachments(storage: Storage, manifest: Manifest) -> FoundAttachments:
    """Every attachment, verified, and the folder that holds them all."""
    try:
        return find_attachments(storage, manifest.attachments)
    except CheckpointInvalid as error:
        raise type(error)(f"checkpoint {manifest.position}: {error.message}") from error


def check_layout(manifest: Manifest, layout: Layout, *, world_size: int) -> None:
    """CheckpointMismatch unless the checkpoint has these tensors and this many workers."""
    if manifest.world_size != world_size:
        raise CheckpointMismatch(
            f"checkpoint {manifest.position} was saved by {manifest.world_size} workers and this run has "
            f"{world_size}: resuming on another number of workers is not supported yet",
            hint=f"start with --workers {manifest.world_size}",
        )
    stored = {(item.role, item.record.name): item.record for item in manifest.tensors}
    wanted = {(role, name): spec for role, named in layout.items() for name, spec in named.items()}
    lines = [
        f"  not in the checkpoint: {role} {name}" for role, name in sorted(wanted.keys() - stored.keys())
    ]
    lines += [
        f"  only in the checkpoint: {role} {name}" for role, name in sorted(stored.keys() - wanted.keys())
    ]
    for key in sorted(stored.keys() & wanted.keys()):
        record, spec = stored[key], wanted[key]
        if (record.dtype, record.shape) != (dtype_code(spec.dtype), spec.shape):
            lines.append(
                f"  {key[0]} {key[1]}: {record.dtype} {list(record.shape)} in the checkpoint, "
                f"{dtype_code(spec.dtype)} {list(spec.shape)} in the model"
            )
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise CheckpointMismatch(
            "\n".join([f"checkpoint {manifest.position} is of another model:", *lines[:20], *more]),
            hint="resume with the model that the run was started with",
        )


def _by_file(
    manifest: Manifest, roles: Collection[str] | None
) -> Iterator[tuple[FileRecord, str, list[TensorRecord]]]:
    grouped: dict[str, list[TensorRecord]] = {file.path: [] for file in manifest.files}
    for tensor in manifest.tensors:
        grouped[tensor.file].append(tensor.record)
    for file in manifest.files:
        parsed = TensorFileName.parse(file.path)
        if parsed is not None and (roles is None or parsed.role in roles):
            yield file, parsed.role, sorted(grouped[file.path], key=lambda record: record.place)


def open_checked(storage: Storage, file: FileRecord, records: list[TensorRecord]) -> ReadHandle:
    """Open a tensor file whose header matches the manifest; the data is not read yet.

    `records` are the manifest's tensors in this file, in the order of their data.
    """
    try:
        handle = storage.open(file.path)
    except StorageError as error:
        raise rejection(error) from error
    try:
        if handle.size != file.size:
            raise CheckpointInvalid(f"{file.path}: {handle.size} bytes instead of {file.size}")
        header = read_header(handle, file.path)
        if file_digest(header.digest, tuple(records)) != file.digest:
            raise CheckpointInvalid(f"{file.path}: its header does not have its recorded digest")
        found = [(item.name, item.dtype, item.shape, item.begin, item.end) for item in header.tensors]
        if found != [(item.name, item.dtype, item.shape, item.begin, item.end) for item in records]:
            raise CheckpointInvalid(f"{file.path}: its header does not agree with the manifest")
    except StorageError as error:
        handle.close()
        raise rejection(error) from error
    except CheckpointInvalid:
        handle.close()
        raise
    return handle
