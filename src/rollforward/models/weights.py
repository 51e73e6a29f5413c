"""Weights of a Hugging Face folder, read into a model's own arrays as fp32.

Understands `model.safetensors`, and several shards with `model.safetensors.index.json`; F32, F16
and BF16. Everything is checked before the first value is stored: headers are compared with their
file's size before memory is allocated, shards stay inside the folder, and the names and shapes must
be those of the model. Mismatches are listed, with the nearest names.

The format: https://github.com/huggingface/safetensors#format. Loads no framework. Left out:
pickled weights (`pytorch_model.bin`), which could run code, and quantised ones.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.boxes import Box, within
from rollforward.errors import ModelError
from rollforward.inputs import (
    LFS_HINT,
    LFS_POINTER,
    is_lfs_pointer,
    is_there,
    open_input,
    parse_json,
    read_input,
)
from rollforward.models.config import ModelConfig
from rollforward.tensors import TensorSpec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER_BYTES = 1 << 23
"""Room for some 50,000 tensors. What the safetensors library allows (100 MB) takes gigabytes to parse."""
_MAX_DIMENSIONS, _MAX_INDEX_BYTES = 8, 1 << 24
_LISTED = 5
"""How many names of a kind an error lists."""


@dataclass(frozen=True)
class _Entry:
    """Where one tensor is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte, from the beginning of the file."""


def load_weights(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    parameters: Mapping[str, NDArray[Any]],
    layout: Mapping[str, TensorSpec] | None = None,
) -> None:
    """Fill `parameters` (Hugging Face name -> float32 array) from a folder.

    `layout` says which part of each tensor an array has; None: all of it.
    ModelError, with nothing changed, when files are missing or damaged or tensors do not fit the
    model; with some values already in place when a value is not finite or a read fails.
    """
    found, head = _of_model(Path(folder), config)
    specs = layout or {name: TensorSpec.whole(array.dtype, array.shape) for name, array in parameters.items()}
    _check_fit(Path(folder), config, found, specs)
    for name, entry in found.items():
        np.copyto(parameters[name], _part(name, entry, specs[name]))
    if head is not None and not np.array_equal(_part(HEAD, head, specs[EMBEDDING]), parameters[EMBEDDING]):
        raise ModelError(
            f"{head.file}: {HEAD} differs from {EMBEDDING}, but config.json ties them",
            hint="set tie_word_embeddings to false if the model has a head of its own",
        )


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a folder's files, read when it is asked for; ModelError when that fails."""

    name: str
    dtype: str
    """F32, F16 or BF16."""
    shape: tuple[int, ...]
    _entry: _Entry

    def content(self) -> NDArray[np.uint8]:
        """Its bytes."""
        size = math.prod(self.shape) * _DTYPES[self.dtype].itemsize
        return _stored(self.name, self._entry, np.dtype(np.uint8), size)

    def values(self) -> NDArray[np.float32]:
        """As float32."""
        return _values(self.name, self._entry)


def stored_weights(folder: str | os.PathLike[str], config: ModelConfig) -> dict[str, StoredWeight]:
    """The tensors that `load_weights` reads. ModelError when files are missing or damaged."""
    found, _ = _of_model(Path(folder), config)
    return {name: StoredWeight(name, each.dtype, each.shape, each) for name, each in found.items()}


def _of_model(folder: Path, config: ModelConfig) -> tuple[dict[str, _Entry], _Entry | None]:
    """The tensors of the model, and the head that a file has although it is tied."""
    found = _entries(folder)
    head = found.pop(HEAD, None) if config.tied else None
    # Written by old versions of transformers; computed from the configuration, never learned.
    found = {name: entry for name, entry in found.items() if not name.endswith("rotary_emb.inv_freq")}
    return found, head


def _entries(folder: Path) -> dict[str, _Entry]:
    """Every tensor of the folder's files."""
    if is_there(folder / SINGLE):
        return _read_header(folder / SINGLE)
    if not is_there(folder / INDEX):
        raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}", hint=_what_to_do_without(folder))
    placed = _weight_map(folder / INDEX)
    shards = {file: _read_header(folder / file) for file in sorted(set(placed.values()))}
    strays = [f"{name} (not in {file})" for name, file in placed.items() if name not in shards[file]]
    if strays:
        raise ModelError(
            f"{folder / INDEX} names tensors that its shards do not have: {_shortened(strays)}",
            hint="the download may be incomplete: fetch the shards and the index again",
        )
    return {name: shards[file][name] for name, file in placed.items()}


def _what_to_do_without(folder: Path) -> str:
    if not folder.is_dir():
        return "the folder does not exist: check the path"
    if list(folder.glob("*.bin")):
        return "pickled weights are not read: save the model again with transformers' save_pretrained"
    return "give the folder of a model that has safetensors weights"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        text = read_input(index, _MAX_INDEX_BYTES)
        if is_lfs_pointer(text):
            raise ModelError(f"{index} is a pointer of Git LFS, not the file itself", hint=LFS_HINT)
        content = parse_json(text, unique=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read: {error}", hint="fetch the index again") from error
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ModelError(f"{index} has no weight_map from names to files", hint="fetch the index again")
    for name, file in placed.items():
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index} places {name} in {file!r}, which is not a safetensors file of the same folder",
                hint="use an index whose shards lie beside it",
            )
    return placed


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(len(LFS_POINTER))
            if is_lfs_pointer(first):
                raise ModelError(f"{path} is a pointer of Git LFS, not the weights", hint=LFS_HINT)
            length = int.from_bytes(first[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            file.seek(8)
            header = parse_json(file.read(length), unique=True)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        return {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", hint=f"{INDEX} names it: fetch it again") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a safetensors file: {error}",
            hint="the download may be incomplete: fetch it again",
        ) from error


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> _Entry:
    """One entry of a header, checked against the file's size; ValueError."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or len(shape) > _MAX_DIMENSIONS or min(numbers) < 0 or begin > end or data + end > size:
        raise ValueError(f"the entry of {name} is malformed or points outside the file")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} is {dtype}; supported are {', '.join(_DTYPES)}")
    if max(shape, default=0) > size or math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} is {dtype}{list(shape)}, which does not fill its {end - begin} bytes")
    return _Entry(path, dtype, shape, data + begin)


def _check_fit(
    folder: Path, config: ModelConfig, found: Mapping[str, _Entry], parameters: Mapping[str, TensorSpec]
) -> None:
    """Check that every parameter is there, with its shape, and nothing else."""
    missing = [name for name in parameters if name not in found]
    unexpected = [name for name in found if name not in parameters]
    wrong = [
        f"{name} is {list(found[name].shape)} instead of {list(spec.global_shape)}"
        for name, spec in parameters.items()
        if name in found and found[name].shape != spec.global_shape
    ]
    if not (missing or unexpected or wrong):
        return
    parts = []
    if missing:
        nearest = [_with_nearest(name, unexpected) for name in missing[:_LISTED]]
        parts.append(f"missing: {_shortened([*nearest, *missing[_LISTED:]])}")
    if unexpected:
        parts.append(f"not part of the model: {_shortened(unexpected)}")
    if wrong:
        parts.append(f"of another shape: {_shortened(wrong)}")
    hint = "use the config.json that belongs to these weights"
    if missing == [HEAD]:
        hint = "set tie_word_embeddings to true if the head is the embedding"
    raise ModelError(
        f"the tensors of {folder} are not those of a {config.family} model with its config.json; "
        + "; ".join(parts),
        hint=hint,
    )


def _with_nearest(name: str, candidates: list[str]) -> str:
    near = get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f"{name} (nearest: {near[0]})" if near else name


def _shortened(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _part(name: str, entry: _Entry, spec: TensorSpec) -> NDArray[np.float32]:
    """What of a tensor a spec describes; only its rows are read."""
    if spec.is_whole:
        return _values(name, entry)
    first, below = spec.offset[0], entry.shape[1:]
    row = math.prod(below) * _DTYPES[entry.dtype].itemsize
    rows = replace(entry, shape=(spec.shape[0], *below), offset=entry.offset + first * row)
    held = Box((first, *(0 for _ in below)), rows.shape)
    return _values(name, rows)[within(spec.box, held)]


def _values(name: str, entry: _Entry) -> NDArray[np.float32]:
    """A tensor as float32; ModelError when it cannot be read or holds NaN or infinity."""
    stored = _stored(name, entry, _DTYPES[entry.dtype], math.prod(entry.shape)).reshape(entry.shape)
    if entry.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        values = stored.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ModelError(
            f"{entry.file}: {name} holds NaN or infinity", hint="the weights are damaged: fetch them again"
        )
    return values


def _stored(name: str, entry: _Entry, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """A tensor's bytes, as `count` elements; ModelError when they cannot be read."""
    try:
        stored = np.fromfile(entry.file, dtype, count, offset=entry.offset)
        if stored.size != count:
            raise OSError("the file ends early")
    except OSError as error:
        raise ModelError(f"{entry.file}: {name} cannot be read: {error}", hint="check the disk") from error
    return stored
