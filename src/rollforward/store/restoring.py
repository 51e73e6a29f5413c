"""Reading a checkpoint back: every byte is verified before it is handed out.

What is wanted are boxes of tensors, on as many ranks and cut as one likes, whatever they were when the
checkpoint was saved (`contents`). Only blocks that hold some of what is wanted are read. CheckpointInvalid
says, in one line, what is not intact; anything yielded before it was intact.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from numpy.typing import NDArray

from rollforward.boxes import Box, intersection, whole
from rollforward.errors import CheckpointInvalid, CheckpointMismatch
from rollforward.storage import Storage
from rollforward.store.attachments import FoundAttachments, find_attachments
from rollforward.store.contents import (
    Part,
    StoredTensor,
    Totals,
    as_digest,
    content_of,
    contents,
    files_of,
    locate,
    parts_of,
    tables,
)
from rollforward.store.covering import PRIME, mark_of
from rollforward.store.manifest import Manifest
from rollforward.store.reading import OPEN_FILES, OpenFiles, read_block
from rollforward.store.table import StoredPiece
from rollforward.store.tensorfile import (
    ArraySource,
    Block,
    TensorRecord,
    digest_of,
    dtype_code,
    new_array,
    verify_block,
)
from rollforward.tensors import Layout, Tensors, layout_of


def read_tensors(
    storage: Storage,
    manifest: Manifest,
    roles: Collection[str] | None = None,
    *,
    only: Collection[tuple[str, str]] | None = None,
) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Yield (role, name, array) for every tensor of the roles (None: all), whole, verified first.

    `only` selects single tensors by (role, name). BF16 and FP8 tensors have the dtypes of `ml_dtypes`.
    """
    found = contents(storage, manifest, roles)
    with OpenFiles(storage) as files:
        files.check_empty(found.files)
        for key, tensor in found.tensors.items():
            if only is None or key in only:
                yield *key, _joined(files, tensor.dtype, whole(tensor.shape), tensor.parts)


def read_tensor(storage: Storage, tensor: StoredTensor) -> NDArray[Any]:
    """One of `contents`, whole, verified."""
    with OpenFiles(storage) as files:
        return _joined(files, tensor.dtype, whole(tensor.shape), tensor.parts)


def read_boxes(
    storage: Storage, manifest: Manifest, layout: Layout, *, near: int = 0
) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Yield (role, name, array) for everything in a layout, each array with the box that it describes.

    `near` is the rank whose table is read first.
    """
    located = locate(storage, manifest, layout, near=near)
    with OpenFiles(storage) as files:
        files.check_empty(located.files)
        for key, item in located.wanted.items():
            yield *key, _joined(files, item.dtype, item.box, item.parts)


def _joined(files: OpenFiles, dtype: str, box: Box, parts: list[Part]) -> NDArray[Any]:
    for part in parts:
        files.open(part.file)  # Their sizes are what the tables say: memory is taken only for what is there.
    array, _ = new_array(dtype, box.shape)
    for part in parts:
        for block in part.blocks:
            read_block(files.open(part.file), part, block, array, box)
    return array


class _Read(NamedTuple):
    """A block to read, and where its elements go."""

    part: Part
    block: Block
    array: NDArray[Any]
    box: Box
    """Which elements the array holds."""


def restore_into(
    storage: Storage,
    manifest: Manifest,
    tensors: Tensors,
    layout: Layout | None = None,
    *,
    near: int = 0,
    threads: int = 4,
) -> int:
    """Read a checkpoint's tensors straight into arrays, several at once; returns the number of bytes read.

    `tensors` is role -> name -> writable array, `layout` what each of them is (None: a whole tensor), with
    the dtypes and shapes that `check_layout` checks; roles that are not in it are skipped. Every byte is
    verified, but only after it is in place: after CheckpointInvalid the arrays hold bytes that must not be
    used until an older checkpoint has been restored over them. `near` is as for `read_boxes`.
    """
    located = locate(storage, manifest, layout_of(tensors) if layout is None else layout, near=near)
    reads: dict[str, list[_Read]] = {}
    for (role, name), item in located.wanted.items():
        for part in item.parts:
            reads.setdefault(part.file.record.path, []).extend(
                _Read(part, block, tensors[role][name], item.box)
                for block in part.blocks
                if intersection(block.box, item.box) is not None
            )
    with OpenFiles(storage) as files:
        files.check_empty(located.files)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for begin in range(0, len(reads), OPEN_FILES):
            paths = itertools.islice(reads, begin, begin + OPEN_FILES)
            _read_all(storage, pool, [read for path in paths for read in reads[path]])
    return sum(read.block.size for some in reads.values() for read in some)


def _read_all(storage: Storage, pool: ThreadPoolExecutor, reads: list[_Read]) -> None:
    """Read from at most OPEN_FILES files."""
    # The largest first, so that no single thread is left with a large one at the end.
    reads.sort(key=lambda read: -read.block.size)
    with OpenFiles(storage) as files:
        handles = [files.open(read.part.file) for read in reads]
        _wait_for_all(
            [pool.submit(read_block, handle, *read) for handle, read in zip(handles, reads, strict=True)]
        )


def _wait_for_all(waiting: list[Future[None]]) -> None:
    """Raise the first error, after cancelling what has not started and waiting for what has."""
    try:
        for done in waiting:
            done.result()
    except BaseException:
        wait([left for left in waiting if not left.cancel()])
        raise


def verify(storage: Storage, manifest: Manifest) -> None:
    """Read and digest every byte of a checkpoint; CheckpointInvalid for the first mismatch."""
    for _ in verify_tensors(storage, manifest):
        pass
    read_attachments(storage, manifest)


def verify_tensors(storage: Storage, manifest: Manifest) -> Iterator[int]:
    """Read and digest every byte of tables and tensors; yields the sizes of what was read.

    CheckpointInvalid too when the pieces do not cover every tensor exactly once. One table is in memory at a
    time.
    """
    totals, covered, begun = Totals(), 0, Counter[tuple[str, str]]()
    for each in tables(storage, manifest):
        found = files_of(each)
        with OpenFiles(storage) as files:
            for file in found:
                files.open(file)
            for part in parts_of(found):
                for block in part.blocks:
                    verify_block(files.open(part.file), block, str(part))
                    yield block.size
                totals.add(part.piece)
                covered += mark_of(part.piece)
        begun.update((piece.role, piece.tensor) for piece in each.pieces if piece.begins)
    if covered % PRIME or max(begun.values(), default=1) > 1:
        contents(storage, manifest)  # It says which tensor it is.
        raise CheckpointInvalid(f"checkpoint {manifest.position}: its pieces do not cover its tensors")
    totals.check(manifest, None)


def content_digests(storage: Storage, manifest: Manifest) -> dict[str, str]:
    """A digest for each role that is the same for the same tensors, however they are cut into pieces.

    It is the manifest's where tensors are cut only between blocks; any other tensor is read and joined.
    """
    digests = manifest.role_digests()
    for role in [role for role, record in manifest.roles.items() if record.cut]:
        found = contents(storage, manifest, [role]).tensors
        total = 0
        for tensor in found.values():
            if tensor.is_cut:
                total += content_of_array(role, tensor.name, read_tensor(storage, tensor))
            else:
                total += sum(content_of(part.piece) for part in tensor.parts)
        digests[role] = as_digest(total)
    return digests


def content_of_array(role: str, name: str, array: NDArray[Any]) -> int:
    """What a whole tensor adds to the digest of its role."""
    source = ArraySource(array)
    shape, found = source.box.shape, digest_of(source, name)
    record = TensorRecord(name, source.dtype, shape, 0, array.nbytes, found)
    return content_of(StoredPiece.of_whole(role, record))


def read_attachments(storage: Storage, manifest: Manifest) -> Mapping[str, bytes]:
    """File name -> content of every attachment, verified; CheckpointInvalid when neither copy is intact."""
    return locate_attachments(storage, manifest).contents


def locate_attachments(storage: Storage, manifest: Manifest) -> FoundAttachments:
    """Every attachment, verified, and the folder that holds them all."""
    try:
        return find_attachments(storage, manifest.attachments)
    except CheckpointInvalid as error:
        raise type(error)(f"checkpoint {manifest.position}: {error.message}") from error


def check_layout(
    storage: Storage,
    manifest: Manifest,
    layout: Layout,
    *,
    in_pieces: Collection[str] = (),
    free: Collection[str] = (),
) -> None:
    """CheckpointMismatch unless the checkpoint has the tensors of this layout.

    Tensors that it has besides are told of roles that the layout has whole. `in_pieces`: roles of which other
    ranks hold pieces, even if this one holds none. Of the roles in `free` it may have any tensors.
    CheckpointInvalid when a table that has to be read is damaged.
    """
    wanted = {
        (role, spec.piece_of or name): spec for role, named in layout.items() for name, spec in named.items()
    }
    # Of a role in pieces, the other ranks may have what this one has not.
    alone = {
        role
        for role in manifest.roles.keys() - {*in_pieces, *free}
        if not any(spec.piece_of for spec in layout.get(role, {}).values())
    }
    alike = all(manifest.roles[role].tensors == len(layout.get(role, {})) for role in alone)
    stored: dict[tuple[str, str], StoredPiece] = {}
    for each in tables(storage, manifest):
        stored |= {(piece.role, piece.tensor): piece for piece in each.pieces if piece.role not in free}
        if alike and wanted.keys() <= stored.keys():
            break
    lines = [
        f"  not in the checkpoint: {role} {name}" for role, name in sorted(wanted.keys() - stored.keys())
    ]
    others = sorted(key for key in stored.keys() - wanted.keys() if key[0] in alone)
    lines += [f"  only in the checkpoint: {role} {name}" for role, name in others]
    for key in sorted(stored.keys() & wanted.keys()):
        piece, spec = stored[key], wanted[key]
        if (piece.record.dtype, piece.global_shape) != (dtype_code(spec.dtype), spec.global_shape):
            lines.append(
                f"  {key[0]} {key[1]}: {piece.record.dtype} {list(piece.global_shape)} in the checkpoint, "
                f"{dtype_code(spec.dtype)} {list(spec.global_shape)} in the model"
            )
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise CheckpointMismatch(
            "\n".join([f"checkpoint {manifest.position} is of another model:", *lines[:20], *more]),
            hint="resume with the model that the run was started with",
        )
