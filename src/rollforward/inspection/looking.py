"""Looking at what is stored: verifying every byte, and comparing two checkpoints.

Nothing here trains, nothing needs a rank, and nothing on disk is changed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.catalog import check_files, load_manifest, positions
from rollforward.store.manifest import Manifest, StoredTensor
from rollforward.store.restoring import read_attachment, read_tensors

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Verdict:
    """What verifying a checkpoint found."""

    position: Position
    bytes_read: int
    reason: str
    """Why it is not intact, in one line; empty when it is."""


@contextmanager
def telling_where(storage: Storage) -> Iterator[None]:
    """A CheckpointInvalid from within names the run's folder too, and says what to try."""
    try:
        yield
    except CheckpointInvalid as error:
        raise CheckpointInvalid(
            f"{storage}: {error.message}",
            hint="rollforward verify --deep tells which checkpoints are whole: name one, as in RUN:0_20",
        ) from error


def bytes_to_verify(storage: Storage) -> int:
    """How much `verify_checkpoints` has to read, files that checkpoints share counted each time."""
    total = 0
    for position in positions(storage):
        try:
            total += load_manifest(storage, position).size
        except CheckpointInvalid:
            continue
    return total


def verify_checkpoints(
    storage: Storage, *, progress: Progress = lambda _size: None, only: Position | None = None
) -> Iterator[Verdict]:
    """Read and digest every byte, newest checkpoint first; `progress` is told of bytes as they pass."""
    for position in positions(storage):
        if only is not None and position != only:
            continue
        done = 0
        try:
            manifest = load_manifest(storage, position)
            check_files(storage, manifest)
            for _, _, array in read_tensors(storage, manifest):
                done += array.nbytes
                progress(array.nbytes)
            for attachment in manifest.attachments:
                done += len(read_attachment(storage, manifest, attachment.name))
        except CheckpointInvalid as error:
            yield Verdict(position, done, error.message)
        else:
            yield Verdict(position, done, "")


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs between two checkpoints."""

    role: str
    name: str
    what: str
    """`only in A`, `only in B`, `dtype or shape`, or `values`."""
    elements: int = 0
    """How many elements differ; for `values` only."""
    largest: float = 0.0
    """The largest absolute difference; NaN where a value is NaN on one side only."""
    relative: float = 0.0
    """The L2 norm of the difference over that of A."""


def diff(
    storage_a: Storage, manifest_a: Manifest, storage_b: Storage, manifest_b: Manifest
) -> list[TensorDifference]:
    """Every tensor in which two checkpoints differ, and by how much.

    Equal digests are equal tensors, so only those that differ are read; all of them are verified.
    BF16 tensors are compared as numbers.
    """
    a, b = _by_name(manifest_a), _by_name(manifest_b)
    found = [TensorDifference(*key, "only in A") for key in a.keys() - b.keys()]
    found += [TensorDifference(*key, "only in B") for key in b.keys() - a.keys()]
    differing = set()
    for key in a.keys() & b.keys():
        one, other = a[key].record, b[key].record
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            found.append(TensorDifference(*key, "dtype or shape"))
        elif one.digest != other.digest:
            differing.add(key)
    for key in sorted(differing):
        left = _numbers(storage_a, manifest_a, a[key])
        right = _numbers(storage_b, manifest_b, b[key])
        found.append(_compare(key, left, right))
    return sorted(found, key=lambda item: (item.role, item.name))


def _by_name(manifest: Manifest) -> Mapping[tuple[str, str], StoredTensor]:
    return {(tensor.role, tensor.record.name): tensor for tensor in manifest.tensors}


def _numbers(storage: Storage, manifest: Manifest, tensor: StoredTensor) -> NDArray[np.float64]:
    with telling_where(storage):
        for _, _, array in read_tensors(storage, manifest, only={(tensor.role, tensor.record.name)}):
            if tensor.record.dtype == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            return array.astype(np.float64).reshape(-1)
        raise CheckpointInvalid(f"checkpoint {manifest.position} has no {tensor.role} {tensor.record.name}")


def _compare(key: tuple[str, str], a: NDArray[np.float64], b: NDArray[np.float64]) -> TensorDifference:
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    # Infinities of equal sign are equal, and must not make a NaN here.
    distance = np.abs(a[differ] - b[differ])
    finite = a[np.isfinite(a)]
    norm = float(np.sqrt(np.sum(finite * finite)))
    apart = float(np.sqrt(np.sum(distance * distance)))
    largest = float(np.max(distance)) if distance.size else 0.0
    return TensorDifference(
        *key, "values", int(differ.sum()), largest, apart / norm if norm else float("inf")
    )
