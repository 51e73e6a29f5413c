"""Low-rank adapters without a framework: their names and shapes, their file about themselves, and merging.

    y = W x + b + alpha / rank * B (A x)        A [rank, inputs], B [outputs, rank]

(Hu et al., "LoRA", arXiv:2106.09685.) Names are those of PEFT's files: the base's own, behind
`base_model.model.`, with `lora_A.weight` or `lora_B.weight` in place of `weight`.

Left out of what PEFT can do: adapters of embeddings and of the head, dropout, rank-stabilised scaling, biases
that are trained, ranks that differ from part to part. A file that says so is refused, not misread.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import ModelError
from rollforward.inputs import parse_json
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import Shapes, parameter_shapes

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The parts of a layer that can have an adapter: its matrices."""
PREFIX, A, B = "base_model.model.", "lora_A.weight", "lora_B.weight"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PLAIN: Mapping[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Keys of an adapter_config.json, with the values under which an adapter is one of ours."""


def adapted_weights(config: ModelConfig, modules: Collection[str]) -> Shapes:
    """Name -> shape of every weight of the base that has an adapter; `modules` are some of `MODULES`."""
    return {
        name: shape
        for name, shape in parameter_shapes(config).items()
        if name.endswith(".weight") and name.split(".")[-2] in modules and len(shape) == 2
    }


def adapter_names(weight: str) -> tuple[str, str]:
    """The names of A and B of the adapter beside a weight of the base."""
    part = PREFIX + weight.removesuffix("weight")
    return part + A, part + B


def adapter_shapes(config: ModelConfig, rank: int, modules: Collection[str]) -> Shapes:
    """Name -> shape of every adapter's A and B."""
    shapes: Shapes = {}
    for weight, (outputs, inputs) in adapted_weights(config, modules).items():
        first, second = adapter_names(weight)
        shapes[first], shapes[second] = (rank, inputs), (outputs, rank)
    return shapes


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter_config.json says."""

    base: str
    """The folder, or the name, of the base."""
    rank: int
    alpha: float
    modules: tuple[str, ...]

    def to_json(self) -> bytes:
        """As PEFT reads it."""
        content = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "target_modules": list(self.modules),
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "inference_mode": True,
            "bias": "none",
            "fan_in_fan_out": False,
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes) -> "AdapterConfig":
        """ModelError for what is not an adapter as this program has them."""
        hint = "use the adapter_config.json that the run wrote"
        try:
            found = parse_json(content)
        except ValueError as error:
            raise ModelError(f"{ADAPTER_CONFIG}: not JSON: {error}", hint=hint) from None
        if not isinstance(found, dict) or found.get("peft_type") != "LORA":
            raise ModelError(f"{ADAPTER_CONFIG} does not describe LoRA adapters", hint=hint)
        for key, value in _PLAIN.items():
            if found.get(key) not in (value, None):
                raise ModelError(f"{ADAPTER_CONFIG}: {key} is {found[key]!r}, not {value!r}", hint=hint)
        base, modules = found.get("base_model_name_or_path"), found.get("target_modules")
        rank, alpha = found.get("r"), found.get("lora_alpha")
        if (
            not isinstance(base, str)
            or not isinstance(modules, list)
            or not set(map(str, modules)) <= set(MODULES)
            or isinstance(rank, bool)
            or not isinstance(rank, int)
            or rank < 1
            or isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
        ):
            raise ModelError(
                f"{ADAPTER_CONFIG}: base_model_name_or_path, r, lora_alpha or target_modules is missing or "
                "not of its kind",
                hint=hint,
            )
        return cls(base=base, rank=rank, alpha=float(alpha), modules=tuple(modules))


def merged(
    weight: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32], scale: float
) -> NDArray[np.float32]:
    """`W + scale * B A`, rounded to float32 once for each of its operations: [outputs, inputs]."""
    return np.asarray(weight + np.float32(scale) * (b @ a), dtype=np.float32)
