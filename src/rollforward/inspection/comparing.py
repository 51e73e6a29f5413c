"""Comparing two checkpoints, tensor by tensor.

Equal digests mean equal tensors, so only those that differ are read, and each is verified as it is read.
Nothing here trains, nothing needs a rank, and nothing on disk is changed.
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
from rollforward.store.judging import is_gone, is_replaced
from rollforward.store.manifest import Manifest, StoredTensor
from rollforward.store.restoring import read_tensors


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
        left = _values(storage_a, manifest_a, a[key])
        right = _values(storage_b, manifest_b, b[key])
        found.append(_compare(key, left, right))
    return sorted(found, key=lambda item: (item.role, item.name))


def _by_name(manifest: Manifest) -> Mapping[tuple[str, str], StoredTensor]:
    return {(tensor.role, tensor.record.name): tensor for tensor in manifest.tensors}


def _values(storage: Storage, manifest: Manifest, tensor: StoredTensor) -> NDArray[Any]:
    """The tensor's elements, flat, in a dtype that NumPy computes with: integers, float64, complex128."""
    with _telling_what_is_gone(storage, manifest), telling_where(storage):
        for _, _, array in read_tensors(storage, manifest, only={(tensor.role, tensor.record.name)}):
            flat = array.reshape(-1)
            if flat.dtype.kind in "iu":
                return flat
            return flat.astype(np.complex128 if flat.dtype.kind == "c" else np.float64)
        raise CheckpointInvalid(f"checkpoint {manifest.position} has no {tensor.role} {tensor.record.name}")


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


def _compare(key: tuple[str, str], a: NDArray[Any], b: NDArray[Any]) -> TensorDifference:
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
