"""The tensors in a checkpoint of any trainer, and how far those of two runs are apart.

`.safetensors` and `.ckpt` are read here, one tensor at a time; `.pt`, `.pth` and `.bin` by `torch.load` with
`weights_only=True`, which runs no code, where torch is installed; runs of ours by their manifests. What is
nested (an optimizer's state, a scheduler's) is compared leaf by leaf, and numbers and words in it too. Equal
means the same bits. What cannot be read is named, with the reason, and not compared.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import RollforwardError
from rollforward.inputs import open_input
from rollforward.inspection.comparing import TensorDifference, as_numbers, compare, compare_values, stored
from rollforward.inspection.folder import checkpoint_at, open_run
from rollforward.interop.files import read_tensor, tensors_of
from rollforward.proving.fields import kind_of
from rollforward.proving.leavings import Leavings
from rollforward.store.tensorfile import as_bytes

_CHUNK_BYTES = 1 << 20

ONLY_A, ONLY_B, OTHER = "only in A", "only in B", "other"
NEWEST = "another is the newest"
"""The name is that of the newest in B."""
UNREADABLE = "cannot be read in B"
"""The name is the reason."""

Leaf = Callable[[], Any]
"""Reads one tensor, as an array; or gives a number, a word, anything that can be compared."""


class NotCompared(Exception):
    """A file cannot be compared; the message says why."""


@dataclass
class TensorsCompared:
    """What a comparison of two runs' newest checkpoints found."""

    checkpoints: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Family -> the file or position in the first run and in the second, that were compared."""
    names: list[tuple[str, str]] = field(default_factory=list)
    """Family or role, and name, of every tensor or other leaf that was compared."""
    differences: list[TensorDifference] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Path -> why it was not compared."""


def compare_tensors(a: Leavings, b: Leavings) -> TensorsCompared:
    """Compare the newest checkpoints of two runs, family by family."""
    found = TensorsCompared()
    for run in sorted({*a.runs, *b.runs}):
        _compare_runs(run, a, b, found)
    for family in sorted(a.tensors.keys() - b.tensors.keys()):
        found.differences.append(TensorDifference(a.tensors[family].label, "", ONLY_A))
    for family in sorted(b.tensors.keys() - a.tensors.keys()):
        # A kill may leave what was being written; nothing that was to be there is missing.
        found.skipped[b.tensors[family].label] = "only in the second of the two runs"
    for family in sorted(a.tensors.keys() & b.tensors.keys()):
        _compare_family(a, b, family, found)
    _compare_named(a, b, found)
    return found


def _compare_named(a: Leavings, b: Leavings, found: TensorsCompared) -> None:
    """Files that the user named, of a kind that is not known: byte by byte."""
    for path in sorted({*a.named, *b.named}):
        if path not in a.named or path not in b.named:
            found.differences.append(TensorDifference(path, "", ONLY_A if path in a.named else ONLY_B))
        else:
            found.names.append((path, ""))
            if not _same_bytes(a.folder / path, b.folder / path):
                found.differences.append(TensorDifference(path, "", OTHER))


def _same_bytes(a: Path, b: Path) -> bool:
    with open_input(a) as one, open_input(b) as other:
        while chunk := one.read(_CHUNK_BYTES):
            if chunk != other.read(len(chunk)):
                return False
        return not other.read(1)


def _compare_runs(run: str, a: Leavings, b: Leavings, found: TensorsCompared) -> None:
    """Runs of ours, in the same place in both folders."""
    name = "checkpoint" if run == "." else f"{run}/checkpoint"
    try:
        storage_a = open_run(a.folder / run)
        one = checkpoint_at(storage_a, None).manifest
    except RollforwardError as error:
        found.skipped[name] = error.message.splitlines()[0]
        return
    try:
        storage_b = open_run(b.folder / run)
        other = checkpoint_at(storage_b, None).manifest
        found.checkpoints[name] = (str(one.position), str(other.position))
        if one.position != other.position:
            found.differences.append(TensorDifference(name, str(other.position), NEWEST))
        # A role may hold what no two runs have in common, such as the seconds that training took.
        held = stored(storage_a, one)
        differences = compare(held, stored(storage_b, other))
        found.differences += [item for item in differences if kind_of(item.role) is not None]
        found.names += [key for key in held.tensors if kind_of(key[0]) is not None]
    except RollforwardError as error:
        found.differences.append(TensorDifference(name, error.message.splitlines()[0], UNREADABLE))


def _compare_family(a: Leavings, b: Leavings, family: str, found: TensorsCompared) -> None:
    """A file, or the shards of one, of the newest checkpoint in both folders."""
    one, other = a.tensors[family], b.tensors[family]
    role = one.label
    found.checkpoints[role] = (one.label, other.label)
    if one.numbers != other.numbers:
        found.differences.append(TensorDifference(role, other.label, NEWEST))
        return
    try:
        leaves_a = _leaves(a.folder, one.files)
    except NotCompared as error:
        del found.checkpoints[role]
        found.skipped[role] = str(error)
        return
    try:
        leaves_b = _leaves(b.folder, other.files)
        for name in sorted(leaves_a.keys() & leaves_b.keys()):
            found.names.append((role, name))
            difference = _compare_leaves((role, name), leaves_a[name](), leaves_b[name]())
            found.differences += [] if difference is None else [difference]
        for what, names in (
            (ONLY_A, leaves_a.keys() - leaves_b.keys()),
            (ONLY_B, leaves_b.keys() - leaves_a.keys()),
        ):
            found.differences += [TensorDifference(role, name, what) for name in sorted(names)]
    except (NotCompared, RollforwardError) as error:
        found.differences.append(TensorDifference(role, str(error).splitlines()[0], UNREADABLE))


def _compare_leaves(key: tuple[str, str], a: Any, b: Any) -> TensorDifference | None:
    """None when they are the same, to the bit."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return None if repr(a) == repr(b) else _compare_others(key, a, b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return TensorDifference(*key, "dtype or shape")
    if np.array_equal(as_bytes(a), as_bytes(b)):
        return None
    if a.dtype.kind == "U":
        return TensorDifference(*key, OTHER)
    return compare_values(key, as_numbers(a), as_numbers(b))


def _compare_others(key: tuple[str, str], a: Any, b: Any) -> TensorDifference:
    """Leaves that are not tensors, and differ: numbers, words, lists of them."""
    if all(type(one) in (int, float) for one in (a, b)):
        return TensorDifference(*key, "values", 1, float(abs(a - b)))
    return TensorDifference(*key, OTHER)


def _leaves(folder: Path, files: Sequence[str]) -> Mapping[str, Leaf]:
    """Every leaf of a file, or of the shards of one."""
    found: dict[str, Leaf] = {}
    for file in files:
        try:
            found |= _torch_leaves(folder / file) if _is_torchs(folder / file) else _own_leaves(folder / file)
        except (RollforwardError, OSError) as error:
            raise NotCompared(str(error).splitlines()[0]) from error
    return found


def _is_torchs(path: Path) -> bool:
    """`.ckpt` is what more than one framework calls its files; torch's are zip archives."""
    if path.suffix != ".ckpt":
        return path.suffix != ".safetensors"
    with open_input(path) as file:
        return zipfile.is_zipfile(file)


def _own_leaves(path: Path) -> dict[str, Leaf]:
    return {tensor.name: partial(read_tensor, path, tensor) for tensor in tensors_of(path)}


def _torch_leaves(path: Path) -> dict[str, Leaf]:
    try:
        import torch
    except ImportError:
        raise NotCompared("torch, which reads it, is not installed here") from None
    try:
        with open_input(path) as file, _numpy_state_allowed(torch):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it meets in a file that is not one of its own
        raise NotCompared(f"torch.load(weights_only=True) refuses it: {_reason(error)}") from error
    return {name: partial(_given, value) for name, value in _flat("", content, torch)}


def _reason(error: Exception) -> str:
    """What stands in the way, out of torch's long advice."""
    said = str(error).strip() or type(error).__name__
    other = re.search(r"GLOBAL ([\w.]+)", said)
    return f"it holds a {other[1]}" if other else said.splitlines()[0][:200]


def _given(value: Any) -> Any:
    return value


def _numpy_state_allowed(torch: Any) -> AbstractContextManager[Any]:
    """Let `torch.load` make arrays of numbers: NumPy's random state is one, and trainers save it.

    Only what makes an array is let in; what an array holds has to come through the same door.
    """
    allow = getattr(torch.serialization, "safe_globals", None)
    if allow is None:
        return nullcontext()
    multiarray = getattr(np, "_core", None) or np.core
    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    context: AbstractContextManager[Any] = allow(
        [multiarray.multiarray._reconstruct, np.ndarray, np.dtype, *kinds]
    )
    return context


def _flat(path: str, value: Any, torch: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, lists and tuples, each with its path."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), below, torch)
    elif isinstance(value, list | tuple) and not _is_plain(value):
        for index, below in enumerate(value):
            yield from _flat(f"{path}.{index}" if path else str(index), below, torch)
    elif isinstance(value, torch.Tensor):
        yield path, _as_array(value, torch)
    else:
        yield path, value


def _is_plain(value: Sequence[Any]) -> bool:
    """A long list of numbers (a random state is one) is one leaf."""
    return len(value) > 8 and all(isinstance(item, int | float) for item in value)


def _as_array(tensor: Any, torch: Any) -> NDArray[Any]:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise NotCompared(f"a tensor of layout {tensor.layout}, quantised or sparse, is not read")
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)  # NumPy lacks the type; nothing is lost
    array: NDArray[Any] = tensor.numpy(force=True)
    return array
