"""Adapters and the base that they stand beside: which base it is, and both as one model.

A merged weight is `W + alpha / rank * B A`, computed in float32 from the base as it is stored. The run itself
computes `W x` and `B (A x)` apart, so a merged model is the same function but for rounding.
"""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.boxes import whole
from rollforward.errors import CheckpointMismatch
from rollforward.interop.exporting import policy_as_adapter, with_dtype
from rollforward.models.config import CONFIG_FILE, ModelConfig, parse_model_config
from rollforward.models.lora import ADAPTER_CONFIG, AdapterConfig, adapter_names, merged
from rollforward.models.weights import SINGLE, StoredWeight, stored_weights
from rollforward.storage import Storage
from rollforward.store.digests import digest
from rollforward.store.manifest import Manifest, digest_of_tensors
from rollforward.store.restoring import read_attachments
from rollforward.store.tensorfile import ArraySource, TensorSource, write_tensors

BASE = "base"
"""The fact of a run: `digest_of_base`."""
_HINT = "name the folder of the model that the run began with: --base FOLDER"


def digest_of_base(weights: Mapping[str, StoredWeight]) -> str:
    """XXH3-128 over a base's weights as they are stored, however they are cut into files. ModelError."""
    return digest_of_tensors(
        (name, each.dtype, each.shape, digest(each.content().data)) for name, each in weights.items()
    )


def export_merged(storage: Storage, manifest: Manifest, out: Storage, base: Path | None = None) -> list[str]:
    """Write base and adapters as one Hugging Face folder, in float32; returns the files.

    `base`: where the base is; None: where it was. CheckpointMismatch for a checkpoint without adapters, and
    for another base; ModelError for one that cannot be read; StorageError, CheckpointInvalid.
    """
    attachments = dict(read_attachments(storage, manifest))
    about, config = attachments.pop(ADAPTER_CONFIG, None), attachments.pop(CONFIG_FILE, None)
    if about is None or config is None:
        raise CheckpointMismatch(
            f"checkpoint {manifest.position} has no adapters to merge: it holds the whole policy",
            hint="leave --merge out",
        )
    adapter = AdapterConfig.parse(about)
    folder = base or Path(adapter.base)
    if not folder.is_dir():
        raise CheckpointMismatch(f"the base of the adapters is not there: {folder} is no folder", hint=_HINT)
    model = ModelConfig.parse(parse_model_config(config, Path(CONFIG_FILE)))
    weights = stored_weights(folder, model)
    _check(manifest, folder, weights)
    factors = policy_as_adapter(storage, manifest)
    sources: dict[str, TensorSource] = {}
    for name, weight in weights.items():
        first, second = (factors.pop(each, None) for each in adapter_names(name))
        beside = None if first is None or second is None else (first, second, adapter.alpha / adapter.rank)
        sources[name] = _Merged(weight, beside)
    if factors:
        raise CheckpointMismatch(
            f"{len(factors)} tensors of checkpoint {manifest.position} belong to no weight of {folder}: "
            + ", ".join(sorted(factors)[:5]),
            hint=_HINT,
        )
    write_tensors(out, SINGLE, sources)
    for name, content in attachments.items():
        out.write(name, [content])
    out.write(CONFIG_FILE, [with_dtype(config, {SINGLE: np.zeros(1, np.float32)})])
    return [SINGLE, *attachments, CONFIG_FILE]


def _check(manifest: Manifest, folder: Path, weights: Mapping[str, StoredWeight]) -> None:
    """CheckpointMismatch unless this is the base that the run recorded."""
    facts = manifest.state.get("facts")
    expected = facts.get(BASE) if isinstance(facts, dict) else None
    found = digest_of_base(weights)
    if expected is not None and found != expected:
        raise CheckpointMismatch(
            f"the adapters of checkpoint {manifest.position} belong to another base: the digest of its "
            f"weights was {expected}, that of {folder} is {found}",
            hint=_HINT,
        )


class _Merged:
    """A weight with its adapter; a `store.tensorfile.TensorSource` that reads the base when it is written."""

    dtype = "F32"

    def __init__(self, weight: StoredWeight, beside: tuple[NDArray[Any], NDArray[Any], float] | None) -> None:
        self.box = whole(weight.shape)
        self._weight = weight
        self._beside = beside

    def chunks(self) -> Generator[memoryview, None, None]:
        values = self._weight.values()
        if self._beside is not None:
            first, second, scale = self._beside
            values = merged(values, first.astype(np.float32), second.astype(np.float32), scale)
        yield from ArraySource(values).chunks()

    def release(self) -> None:
        self._beside = None
