"""What reaches the numbers of a run, and the versions that compute them.

Arguments that only say where, when and how much is written or shown are left out, so that they may change
between two starts; any argument that is not known here counts.
"""

import functools
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import accelerate
import datasets
import torch
import transformers
import trl
import xxhash

from rollforward.store.manifest import digest_of_arrays
from rollforward.torch import as_array

_SHOWN_OR_STORED = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "disable_tqdm",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "resume_from_checkpoint",
        "restore_callback_states_from_checkpoint",
        "run_name",
        "project",
        "local_rank",
        "ddp_backend",
        "ddp_timeout",
        "skip_memory_metrics",
        "debug",
        "enable_jit_checkpoint",
        "num_completions_to_print",
        "include_num_input_tokens_seen",
        "torch_empty_cache_steps",
    }
)
_FROM_THE_CHECKPOINT = frozenset(
    {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
)
"""An optimizer's numbers: a resumed run has those that the checkpoint has, as TRL does, and says so."""
_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "hub_",
    "push_to_hub",
    "report_to",
    "trackio_",
    "do_",
    "dataloader_",
)
_LARGE = 1 << 30
"""Data sets of more bytes are known by the fingerprint of `datasets`, not by their content."""


def facts_of(
    trainer: Any, frozen: Iterable[tuple[str, torch.Tensor]], tokenizer: Mapping[str, bytes]
) -> dict[str, Any]:
    """The facts; `frozen` are tensors that reach the numbers and are in no checkpoint.

    `tokenizer`: its files.
    """
    found: dict[str, Any] = {f"args.{name}": value for name, value in _arguments(trainer.args).items()}
    found["model"] = _digest(_model_config(trainer).encode())
    found["frozen tensors"] = digest_of_arrays({name: as_array(tensor) for name, tensor in frozen})
    text = trainer.processing_class
    spoken = [getattr(text, name, None) for name in ("chat_template", "padding_side", "special_tokens_map")]
    found["tokenizer"] = _digest(f"{sorted(tokenizer.items())} {spoken}".encode())
    found["data"] = _data_digest(trainer.train_dataset)
    if trainer.eval_dataset is not None:
        found["evaluation data"] = _data_digest(trainer.eval_dataset)
    for name, function in zip(trainer.reward_func_names, trainer.reward_funcs, strict=True):
        found[f"reward.{name}"] = _reward_digest(function)
    return found


def versions_of() -> dict[str, str]:
    """The versions of the libraries that compute."""
    found = {module.__name__: str(module.__version__) for module in (torch, transformers, trl, accelerate)}
    try:
        import peft
    except ModuleNotFoundError:
        return found
    return found | {"peft": str(peft.__version__)}


def _model_config(trainer: Any) -> str:
    """Without where it was loaded from and by what."""
    config = trainer.model.config.to_dict()
    kept = {name: config[name] for name in config.keys() - {"_name_or_path", "transformers_version"}}
    return json.dumps(kept, sort_keys=True, default=str)


def _arguments(args: Any) -> dict[str, Any]:
    return {
        name: _plain(value)
        for name, value in args.to_dict().items()
        if name not in _SHOWN_OR_STORED | _FROM_THE_CHECKPOINT
        and (name == "dataloader_drop_last" or not name.startswith(_PREFIXES))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.loads(json.dumps(value, default=str))


def _data_digest(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(name): _data_digest(each) for name, each in data.items()}
    if not isinstance(data, datasets.Dataset):
        return type(data).__name__
    if data.data.nbytes > _LARGE:
        return str(data._fingerprint)
    hasher = xxhash.xxh3_128(json.dumps(data.column_names).encode())
    for batch in data.with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            hasher.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return hasher.hexdigest()


def _reward_digest(function: Any) -> str:
    """Of a function's source, and of what is bound to it; of a reward model's tensors."""
    if isinstance(function, torch.nn.Module):
        return digest_of_arrays({name: as_array(each) for name, each in function.state_dict().items()})
    if isinstance(function, functools.partial):
        bound = _told((function.args, sorted(function.keywords.items())))
        return _digest(f"{_reward_digest(function.func)} {bound}".encode())
    written = inspect.unwrap(function) if inspect.isroutine(function) else type(function)
    try:
        return _digest(inspect.getsource(written).encode())
    except (OSError, TypeError):
        return str(getattr(written, "__qualname__", written))


def _told(value: Any) -> str:
    """A value as text, without the address of an object in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
