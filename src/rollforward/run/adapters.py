"""A run that trains adapters: which base they stand beside, and what they start from.

The base is no part of a checkpoint. It is named by where it was when the run began (in `adapter_config.json`
among a checkpoint's small files) and by the digest of its weights (a fact of the run): a resume reads it
again, and refuses another.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rollforward.boxes import whole, within
from rollforward.config.keys import Config
from rollforward.errors import CheckpointMismatch, ConfigError
from rollforward.grpo.randomness import adapter_values
from rollforward.grpo.types import Floats, LoraSettings
from rollforward.interop.adapters import BASE, digest_of_base
from rollforward.models.config import ModelConfig
from rollforward.models.lora import ADAPTER_CONFIG, A, AdapterConfig
from rollforward.models.weights import stored_weights
from rollforward.run.branching import facts_of
from rollforward.store import Manifest
from rollforward.tensors import TensorSpec


def lora_of(config: Config) -> LoraSettings | None:
    """The adapters that a configuration asks for."""
    lora = config.actor_config.lora
    if not lora.rank:
        return None
    return LoraSettings(rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules)


def about(lora: LoraSettings, base: Path) -> bytes:
    """The content of `adapter_config.json`."""
    found = AdapterConfig(
        base=str(base.absolute()), rank=lora.rank, alpha=lora.alpha, modules=lora.target_modules
    )
    return found.to_json()


def base_of_resumed(config: Config, lora: LoraSettings | None, files: Mapping[str, bytes]) -> Path | None:
    """Where the base of a resumed run is; None without adapters. `files`: those of its checkpoint.

    CheckpointMismatch when the checkpoint has other adapters than the configuration, ConfigError when the
    base is not there.
    """
    saved = AdapterConfig.parse(files[ADAPTER_CONFIG]) if ADAPTER_CONFIG in files else None
    then = None if saved is None else (saved.rank, saved.alpha, frozenset(saved.modules))
    now = None if lora is None else (lora.rank, lora.alpha, frozenset(lora.target_modules))
    if then != now:
        raise CheckpointMismatch(
            f"actor_config.lora: the checkpoint has {_in_words(then)}, the configuration {_in_words(now)}",
            hint="resume with the run's own actor_config.lora; for other adapters, start a new run from what "
            "rollforward export --merge writes",
        )
    if saved is None:
        return None
    base = Path(config.actor_config.load or saved.base)
    if not base.is_dir():
        raise ConfigError(
            f"the base of the run's adapters is not there: {base} is no folder",
            hint="name the folder of the model that the run began with: --set actor_config.load=FOLDER",
        )
    return base


def digest_of(base: Path, model_config: Mapping[str, Any]) -> str:
    """The digest of a base's weights. ModelError."""
    return digest_of_base(stored_weights(base, ModelConfig.parse(model_config)))


def check_base(saved: Manifest | None, base: Path, found: str) -> None:
    """CheckpointMismatch when a checkpoint's adapters were trained beside another base."""
    expected = None if saved is None else facts_of(saved).get(BASE)
    if saved is not None and expected != found:
        raise CheckpointMismatch(
            f"the adapters of checkpoint {saved.position} belong to another base: the digest of its weights "
            f"was {expected}, that of {base} is {found}",
            hint="name the folder of the model that the run began with: --set actor_config.load=FOLDER",
        )


def initial(trained: Mapping[str, TensorSpec], seed: int) -> Iterator[tuple[str, Floats]]:
    """What each A, or this worker's part of it, starts from.

    Every B starts at zero, so that the policy starts as the base.
    """
    for name, spec in trained.items():
        if name.endswith(A):
            rank, inputs = spec.global_shape
            values = adapter_values(seed, name, (rank, inputs))
            yield name, values[within(spec.box, whole(spec.global_shape))]


def _in_words(adapters: tuple[int, float, frozenset[str]] | None) -> str:
    if adapters is None:
        return "no adapters"
    rank, alpha, modules = adapters
    return f"rank {rank}, alpha {alpha:g}, target_modules {', '.join(sorted(modules))}"
