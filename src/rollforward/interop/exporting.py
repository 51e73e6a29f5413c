"""A checkpoint exported from a run, in another program's folder layout.

    huggingface    model.safetensors with config.json, tokenizer.json, ...: the policy, for serving it
    mindrlhf       train/rank_0/policy_model_rank_0-0_20.safetensors, optimizer/..., ref/..., meta.json:
                   what MindRLHF resumes from, in MindFormers' names with its trainer's prefixes

Every byte is verified on its way out, and each file is durable in the new folder before the next is started;
only one role is in memory at a time. The file that lets others open the folder is written last: config.json,
adapter_config.json, or meta.json, the policy's after the others. So an export that was killed is not mistaken
for a complete one. config.json names the element type of the file beside it, whatever type the model was
loaded in. For MindRLHF, tensors are whole and in float32: use MindSpore's `ms.transform_checkpoints` to split
them over ranks. The run itself is not changed.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointMismatch
from rollforward.interop.names import to_theirs
from rollforward.models.config import CONFIG_FILE
from rollforward.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rollforward.models.weights import SINGLE
from rollforward.storage import Storage
from rollforward.store.layout import META, TensorFileName, rank_folder
from rollforward.store.manifest import Manifest
from rollforward.store.meta import write_meta
from rollforward.store.restoring import read_attachments, read_tensors
from rollforward.store.tensorfile import ArraySource, write_tensors

_PREFIXES = {
    "policy_model": "grpo_model_train.policy_model.model.",
    "optimizer": "grpo_model_train.policy_model.model.",
    "ref": "model.",
}
"""The prefix of MindRLHF's trainer for the parameter names of each role."""

_OF_ADAPTER = re.compile(
    r"\.modules_to_save\.[^.]+(?=\.)|(?<=\.)((?:lora|vera|ia3)_\w+)\.(?!weight$|bias$)[^.]+(?=\.|$)"
)
"""In memory, PEFT names a tensor after its kind and its adapter; its files and our runs leave that out."""
_DTYPE_KEYS = ("torch_dtype", "dtype")

Export = Callable[[Storage, Manifest, Storage], list[str]]


def export_huggingface(storage: Storage, manifest: Manifest, out: Storage) -> list[str]:
    """Write the policy as a Hugging Face folder; returns the files. StorageError, CheckpointInvalid.

    A policy that is an adapter becomes a PEFT folder, which names the model that it belongs to; see
    `adapters.export_merged` for both in one.
    """
    attachments = dict(read_attachments(storage, manifest))
    config, adapter = attachments.pop(CONFIG_FILE, None), attachments.pop(ADAPTER_CONFIG, None)
    if adapter is not None:
        policy, name, last = policy_as_adapter(storage, manifest), ADAPTER_WEIGHTS, {ADAPTER_CONFIG: adapter}
    else:
        policy, name = _role(storage, manifest, "policy_model"), SINGLE
        last = {} if config is None else {CONFIG_FILE: with_dtype(config, policy)}
    _write(out, name, policy)
    small = {**attachments, **last}
    for file, content in small.items():
        out.write(file, [content])
    return [name, *small]


def policy_as_adapter(storage: Storage, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The policy's tensors by the names that PEFT's files have."""
    policy = _role(storage, manifest, "policy_model")
    return {_OF_ADAPTER.sub(lambda found: found[1] or "", name): array for name, array in policy.items()}


def with_dtype(config: bytes, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A config.json that names the dtype of most of these tensors' bytes; otherwise unchanged.

    transformers 5 writes `dtype`, older versions `torch_dtype`; both read either.
    """
    sizes: dict[str, int] = {}
    for array in arrays.values():
        sizes[array.dtype.name] = sizes.get(array.dtype.name, 0) + array.nbytes
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return config
    if not sizes or not isinstance(values, dict):
        return config
    name = max(sizes, key=lambda dtype: sizes[dtype])
    keys = [key for key in _DTYPE_KEYS if key in values] or [_DTYPE_KEYS[0]]
    if all(values.get(key) == name for key in keys):
        return config
    return (json.dumps(values | dict.fromkeys(keys, name), indent=2, ensure_ascii=False) + "\n").encode()


def export_mindrlhf(storage: Storage, manifest: Manifest, out: Storage) -> list[str]:
    """Write all roles as MindRLHF does; returns the files.

    StorageError, CheckpointInvalid; CheckpointMismatch for a tensor that MindRLHF has no name for.
    """
    position = manifest.position
    if ADAPTER_CONFIG in read_attachments(storage, manifest):
        raise CheckpointMismatch(
            f"checkpoint {position} holds adapters, for which MindRLHF has no names",
            hint="--format huggingface writes them for PEFT, and with --merge the whole model",
        )
    written = []
    for role, prefix in _PREFIXES.items():
        arrays = _role(storage, manifest, role)
        if role == "optimizer":
            # MindRLHF's file holds the trained parameters too. Without them MindSpore would look for the
            # nearest names, and load moments into the weights.
            arrays |= _role(storage, manifest, "policy_model")
        mapped = to_theirs(arrays, prefix=prefix)
        if mapped.unmapped:
            raise CheckpointMismatch(
                f"MindFormers has no names for {len(mapped.unmapped)} tensors of {role}: "
                + ", ".join(mapped.unmapped[:5]),
                hint="it has models of the families Llama and Qwen2",
            )
        arrays = dict(mapped.tensors)
        if role == "policy_model":
            # Where MindRLHF looks for the progress.
            arrays["epoch_num"] = np.array(position.epoch, np.int64)
            arrays["step_num"] = np.array(position.step, np.int64)
        if "global_step" in arrays:
            arrays["global_step"] = arrays["global_step"].astype(np.int32)
        name = TensorFileName(role, 0, position)
        written.append(_write(out, name.path, arrays))
    for role in reversed(_PREFIXES):
        write_meta(out, f"{rank_folder(role, 0)}/{META}", TensorFileName(role, 0, position))
    return written


EXPORTS: Mapping[str, Export] = {"huggingface": export_huggingface, "mindrlhf": export_mindrlhf}


def _role(storage: Storage, manifest: Manifest, role: str) -> dict[str, NDArray[Any]]:
    return {name: array for _, name, array in read_tensors(storage, manifest, [role])}


def _write(out: Storage, path: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    write_tensors(out, path, {name: ArraySource(array) for name, array in arrays.items()})
    return path
