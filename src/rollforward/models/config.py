"""What a Hugging Face `config.json` says about a decoder, checked and made explicit.

Three families are known: Llama, Qwen2 and Qwen3. They share one skeleton (RMS norms before
attention and MLP, rotary positions, grouped-query attention, a gated SiLU MLP) and differ in
where biases are and in whether queries and keys are normalised. `ModelConfig` states those
differences as fields, so that the model need not know its family.

Loads no framework: a configuration can be refused before anything slow is imported. Unsupported
features are refused by name and never ignored: sliding windows in use, other activations, quantised
weights, partial rotation, mixtures of experts (other families).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rollforward.errors import ModelError
from rollforward.inputs import LFS_HINT, is_lfs_pointer, parse_json
from rollforward.models.rope import RopeConfig
from rollforward.models.values import flag, number, shown, whole

CONFIG_FILE = "config.json"
FAMILIES = ("llama", "qwen2", "qwen3")

# Far beyond any real model, but small enough that shapes and loops made from them stay harmless.
_MOST_LAYERS = 4096
_MOST_HEADS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder."""

    family: str
    """One of `FAMILIES`."""
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; each serves `heads // kv_heads` query heads."""
    head_dim: int
    intermediate: int
    """Width of the MLP."""
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    """A bias on attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMS norms over `head_dim` on queries and keys, before rotation (Qwen3)."""
    tied: bool
    """The head is the embedding."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json`; ModelError names what is missing, wrong or not supported."""
        family = _family(config)
        _refuse_unsupported(config)
        hidden = whole(config, "hidden_size")
        heads = whole(config, "num_attention_heads", most=_MOST_HEADS)
        kv_heads = whole(config, "num_key_value_heads", default=heads, most=_MOST_HEADS)
        head_dim = _head_dim(config, family, hidden, heads)
        if heads % kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads ({heads}) is not a multiple of "
                f"num_key_value_heads ({kv_heads})",
                hint="each key-value head must serve the same number of query heads",
            )
        attention_bias = flag(config, "attention_bias")
        epsilon = config.get("rms_norm_eps")
        return cls(
            family=family,
            vocab_size=whole(config, "vocab_size"),
            hidden_size=hidden,
            layers=whole(config, "num_hidden_layers", most=_MOST_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=whole(config, "intermediate_size"),
            rms_norm_eps=number("rms_norm_eps", 1e-6 if epsilon is None else epsilon),
            rope=RopeConfig.parse(config),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=family == "llama" and flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            tied=flag(config, "tie_word_embeddings"),
        )


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if family in FAMILIES:
        return str(family)
    known = ", ".join(FAMILIES)
    if family is None:
        raise ModelError("config.json has no model_type", hint=f"supported families: {known}")
    near = get_close_matches(str(family)[:60], FAMILIES, n=1)
    nearest = f"; the nearest is {near[0]}" if near else ""
    raise ModelError(
        f"config.json: model_type {shown(family)} is not supported{nearest}",
        hint=f"supported families: {known}",
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(
            f"config.json: hidden_act {shown(activation)} is not supported",
            hint="the activation must be silu",
        )
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ModelError(
            f"config.json: layer_types is {shown(layer_types)}",
            hint="it must be a list, an entry for each layer",
        )
    other = sorted({str(kind)[:60] for kind in layer_types} - {"full_attention"})[:5]
    if other:
        raise ModelError(
            f"config.json: layer_types has {', '.join(other)}, which is not supported",
            hint="every layer must be full_attention",
        )
    if flag(config, "use_sliding_window") and _window_reaches_a_layer(config):
        raise ModelError(
            "config.json: use_sliding_window is true, and sliding-window attention is not supported",
            hint="use a model with full attention; with sequences shorter than the window, "
            "setting use_sliding_window to false changes nothing",
        )
    if config.get("quantization_config"):
        raise ModelError(
            "config.json has a quantization_config, and quantised weights cannot be trained here",
            hint="use the model's float weights (F32, F16 or BF16)",
        )


def _window_reaches_a_layer(config: Mapping[str, Any]) -> bool:
    if config.get("layer_types"):
        return False  # they were just checked to be full attention, and they take precedence
    if config.get("sliding_window", 4096) is None:
        return False
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise ModelError(
            f"config.json: max_window_layers is {shown(first)}", hint="it must be a whole number from 0"
        )
    return first < whole(config, "num_hidden_layers", most=_MOST_LAYERS)


def _head_dim(config: Mapping[str, Any], family: str, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})",
            hint="give head_dim where it is not hidden_size / num_attention_heads",
        )
    # Without the key, transformers uses 128 for Qwen3 and the quotient for the others.
    head_dim = whole(
        config, "head_dim", most=_MOST_HEADS, default=128 if family == "qwen3" else hidden // heads
    )
    if head_dim % 2:
        raise ModelError(
            f"config.json: head_dim {head_dim} is odd", hint="rotary positions rotate pairs: it must be even"
        )
    return head_dim


def parse_model_config(content: bytes, path: Path) -> dict[str, Any]:
    """A parsed `config.json`; ModelError, naming `path`, when it is not a JSON object."""
    if is_lfs_pointer(content):
        raise ModelError(f"{path} is a pointer of Git LFS, not the file itself", hint=LFS_HINT)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}", hint="download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", hint="is it a model's config.json?")
    return value
