"""Comparing two checkpoints, tensor by tensor.

Equal digests mean equal tensors, so only those that differ, or are cut into other pieces, are read, and each
is verified as it is read. What is compared is the content of tensors, whichever ranks hold which pieces of
it. Nothing here trains, nothing needs a rank, and nothing on disk is changed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid
from rollforward.inspection.folder import telling_where
from rollforward.storage import Storage
from rollforward.store.contents import StoredTensor, contents
from rollforward.store.judging import is_gone, is_replaced
from rollforward.store.manifest import Manifest
from rollforward.store.restoring import read_tensor
from rollforward.store.tensorfile import as_bytes


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
    """The L2 norm of the difference divided by that of A."""


class CheckpointGone(CheckpointInvalid):
    """The run removed a checkpoint, or saved its position again, while it was being read: not damage."""


def diff(
    storage_a: Storage, manifest_a: Manifest, storage_b: Storage, manifest_b: Manifest
) -> list[TensorDifference]:
    """Every tensor that differs between two checkpoints, and by how much, whatever its dtype.

    CheckpointInvalid when one of the tensors to compare is not intact; CheckpointGone when that is because
    the checkpoint no longer exists.
    """
    return compare(stored(storage_a, manifest_a), stored(storage_b, manifest_b))


@dataclass(frozen=True)
class Stored:
    """A checkpoint, and the tensors that it holds."""

    storage: Storage
    manifest: Manifest
    tensors: Mapping[tuple[str, str], StoredTensor]


def stored(storage: Storage, manifest: Manifest) -> Stored:
    """What a checkpoint holds; nothing of the tensors is read. CheckpointInvalid, CheckpointGone."""
    with _telling_what_is_gone(storage, manifest), telling_where(storage):
        return Stored(storage, manifest, contents(storage, manifest).tensors)


def compare(one: Stored, other: Stored) -> list[TensorDifference]:
    """`diff` of what is known already."""
    a, b = one.tensors, other.tensors
    found = [TensorDifference(*key, "only in A") for key in a.keys() - b.keys()]
    found += [TensorDifference(*key, "only in B") for key in b.keys() - a.keys()]
    differing = set()
    for key in a.keys() & b.keys():
        if (a[key].dtype, a[key].shape) != (b[key].dtype, b[key].shape):
            found.append(TensorDifference(*key, "dtype or shape"))
        elif a[key].content != b[key].content:
            differing.add(key)
    for key in sorted(differing):
        left, right = _bytes_of(one, key), _bytes_of(other, key)
        # Of other pieces, the digests say nothing.
        if not np.array_equal(as_bytes(left), as_bytes(right)):
            found.append(compare_values(key, as_numbers(left), as_numbers(right)))
    return sorted(found, key=lambda item: (item.role, item.name))


def _bytes_of(checkpoint: Stored, key: tuple[str, str]) -> NDArray[Any]:
    """The tensor's elements, verified."""
    with _telling_what_is_gone(checkpoint.storage, checkpoint.manifest), telling_where(checkpoint.storage):
        return read_tensor(checkpoint.storage, checkpoint.tensors[key])


def as_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """Its elements, flat, in a dtype that NumPy computes with: integers, float64, complex128."""
    flat = array.reshape(-1)
    if flat.dtype.kind in "iu":
        return flat
    return flat.astype(np.complex128 if flat.dtype.kind == "c" else np.float64)


@contextmanager
def _telling_what_is_gone(storage: Storage, manifest: Manifest) -> Iterator[None]:
    try:
        yield
    except CheckpointInvalid as error:
        if is_gone(storage, manifest.position) or is_replaced(storage, manifest):
            raise CheckpointGone(
                f"{storage}: checkpoint {manifest.position} was removed by the run while it was read",
                hint="name one that stays, or compare again",
            ) from error
        raise


def compare_values(key: tuple[str, str], a: NDArray[Any], b: NDArray[Any]) -> TensorDifference:
    """How far two tensors of the same dtype and shape are apart, given `as_numbers`."""
    if a.dtype.kind in "iu":
        differ = a != b
        # Modulo 2**64, which is exact: float64 cannot distinguish all 64-bit integers.
        greater, less = np.maximum(a, b)[differ], np.minimum(a, b)[differ]
        distance = (greater.astype(np.uint64) - less.astype(np.uint64)).astype(np.float64)
        finite = np.abs(a.astype(np.float64))
    else:
        differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        # Infinities of the same sign are equal, and must not give a NaN here.
        distance = np.abs(a[differ] - b[differ])
        finite = np.abs(a[np.isfinite(a)])
    norm = float(np.sqrt(np.sum(finite * finite)))
    apart = float(np.sqrt(np.sum(distance * distance)))
    largest = float(np.max(distance)) if distance.size else 0.0
    return TensorDifference(
        *key, "values", int(differ.sum()), largest, apart / norm if norm else float("inf")
    )
