"""A checkpoint exported from a run, in another program's folder layout.

    huggingface    model.safetensors with config.json, tokenizer.json, ...: the policy, for serving it
    mindrlhf       train/rank_0/policy_model_rank_0-0_20.safetensors, optimizer/..., ref/..., meta.json:
                   what MindRLHF resumes from, in MindFormers' names with its trainer's prefixes; for more
                   than one rank the slice of each, and strategy/..., which says how they were cut

Every byte is verified on its way out, and each file is durable in the new folder before the next is started;
only one role is in memory at a time. The file that lets others open the folder is written last: config.json,
adapter_config.json, or meta.json, the policy's after the others. So an export that was killed is not mistaken
for a complete one. config.json names the element type of the file beside it, whatever type the model was
loaded in. For MindRLHF, tensors are in float32, and cut as `models.sharding` cuts them. The run itself is not
changed.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.boxes import whole, within
from rollforward.errors import CheckpointMismatch
from rollforward.interop.names import Mapped, to_theirs
from rollforward.interop.strategies import FOLDERS
from rollforward.interop.strategy_format import strategy_file
from rollforward.models import sharding
from rollforward.models.config import CONFIG_FILE, ModelConfig, parse_model_config
from rollforward.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rollforward.models.sharding import Shard
from rollforward.models.weights import SINGLE
from rollforward.storage import Storage
from rollforward.store.layout import META, TensorFileName, rank_folder
from rollforward.store.manifest import Manifest
from rollforward.store.meta import write_meta
from rollforward.store.restoring import read_attachments, read_tensors
from rollforward.store.tensorfile import ArraySource, write_tensors
from rollforward.tensors import TensorSpec

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


def export_mindrlhf(storage: Storage, manifest: Manifest, out: Storage, ranks: int = 1) -> list[str]:
    """Write all roles as MindRLHF does; returns the files.

    `ranks`: over how many the model is cut. ModelError when it cannot be cut so; StorageError,
    CheckpointInvalid; CheckpointMismatch for a tensor that MindRLHF has no name for.
    """
    position, attachments = manifest.position, read_attachments(storage, manifest)
    if ADAPTER_CONFIG in attachments:
        raise CheckpointMismatch(
            f"checkpoint {position} holds adapters, for which MindRLHF has no names",
            hint="--format huggingface writes them for PEFT, and with --merge the whole model",
        )
    if ranks > 1:
        config = parse_model_config(attachments.get(CONFIG_FILE, b""), Path(CONFIG_FILE))
        sharding.check(ModelConfig.parse(config), ranks)
    written = []
    for role, prefix in _PREFIXES.items():
        arrays = _role(storage, manifest, role)
        if role == "optimizer":
            # MindRLHF's file holds the trained parameters too. Without them MindSpore would look for the
            # nearest names, and load moments into the weights.
            arrays |= _role(storage, manifest, "policy_model")
            arrays["global_step"] = arrays["global_step"].astype(np.int32)
        named = _renamed(role, arrays, prefix)
        for rank in range(ranks):
            layout = _layout(named, Shard(rank, ranks))
            part = {
                name: named.tensors[name][within(spec.box, whole(spec.global_shape))]
                for name, spec in layout.items()
            }
            if role == "policy_model":
                # Where MindRLHF looks for the progress.
                part["epoch_num"] = np.array(position.epoch, np.int64)
                part["step_num"] = np.array(position.step, np.int64)
            written.append(_write(out, TensorFileName(role, rank, position).path, part))
            if ranks > 1 and role != "policy_model":  # whose tensors the optimizer has, too
                written.append(f"strategy/{FOLDERS[role]}/strategy_{rank}.ckpt")
                out.write(written[-1], [strategy_file(layout, ranks)])
    for role in reversed(_PREFIXES):
        for rank in range(ranks):
            write_meta(out, f"{rank_folder(role, rank)}/{META}", TensorFileName(role, rank, position))
    return written


def _renamed(role: str, arrays: Mapping[str, NDArray[Any]], prefix: str) -> Mapped:
    mapped = to_theirs(arrays, prefix=prefix)
    if mapped.unmapped:
        raise CheckpointMismatch(
            f"MindFormers has no names for {len(mapped.unmapped)} tensors of {role}: "
            + ", ".join(mapped.unmapped[:5]),
            hint="it has models of the families Llama and Qwen2",
        )
    return mapped


def _layout(named: Mapped, shard: Shard) -> dict[str, TensorSpec]:
    """What of each tensor a rank has; our names say how they are cut."""
    return {
        name: TensorSpec.piece(name, array.dtype, array.shape, shard.box(named.origins[name], array.shape))
        for name, array in named.tensors.items()
    }


EXPORTS: Mapping[str, Export] = {"huggingface": export_huggingface, "mindrlhf": export_mindrlhf}


def _role(storage: Storage, manifest: Manifest, role: str) -> dict[str, NDArray[Any]]:
    return {name: array for _, name, array in read_tensors(storage, manifest, [role])}


def _write(out: Storage, path: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    write_tensors(out, path, {name: ArraySource(array) for name, array in arrays.items()})
    return path
