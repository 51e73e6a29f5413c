"""Rotary position embedding: how fast each pair of dimensions turns, and how long contexts slow it.

A head's dimensions `i` and `i + head_dim/2` form a pair that turns by `position * frequency[i]`
(Su et al., "RoFormer", 2021), with `frequency[i] = theta ** (-2 i / head_dim)`. Scaling forms
change the frequencies so that a model reaches past the length it was trained on:

    default   as above
    linear    all frequencies divided by `factor` (position interpolation, Chen et al., 2023)
    dynamic   theta grows with the sequence once it passes `max_position_embeddings` (NTK-aware)
    llama3    long waves divided by `factor`, short ones kept, a ramp between (Llama 3.1)
    yarn      the same idea by turns per context, and attention scaled (Peng et al., 2023)

Both forms of `config.json` are read: `rope_theta` with `rope_scaling`, and the `rope_parameters` of
transformers 5. Loads no framework. Left out: `longrope` and partial rotation, which none of the
supported families use.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import ModelError
from rollforward.models.values import flag, number, shown, whole

_ORIGINAL = "original_max_position_embeddings"

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The parameters of a rotary embedding; those that a kind does not use keep their defaults."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    max_positions: int = 0
    """`max_position_embeddings`: where `dynamic` begins to scale."""
    original_max_positions: int = 0
    """The length before scaling, for `llama3` and `yarn`."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """The factor for cosines and sines (`yarn`)."""
    truncate: bool = True
    """Whether `yarn` rounds the ends of its ramp to whole dimensions."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Read it from a parsed `config.json`; ModelError names what is missing or not supported."""
        values = _merged(config)
        kind = values.get("rope_type", values.get("type")) or "default"
        if kind not in KINDS:
            raise ModelError(
                f"config.json: rotary scaling {shown(kind)} is not supported",
                hint=f"supported: {', '.join(KINDS)}",
            )
        theta = _number(values, "rope_theta", kind, default=10000.0)
        max_positions = whole(config, "max_position_embeddings", default=2048, most=1 << 31)
        if kind == "default":
            return cls(theta=theta, max_positions=max_positions)
        named = config if config.get(_ORIGINAL) is not None else values
        original = whole(named, _ORIGINAL, default=max_positions, most=1 << 31)
        factor = values.get("factor")
        if factor is None and kind == "yarn":
            factor = max_positions / original
        ramp_default = (None, None) if kind == "llama3" else (cls.low_freq_factor, cls.high_freq_factor)
        values = {**values, "factor": factor}
        found = cls(
            kind=kind,
            theta=theta,
            factor=_number(values, "factor", kind),
            max_positions=max_positions,
            original_max_positions=original,
            low_freq_factor=_number(values, "low_freq_factor", kind, default=ramp_default[0]),
            high_freq_factor=_number(values, "high_freq_factor", kind, default=ramp_default[1]),
            beta_fast=_number(values, "beta_fast", kind, default=32.0),
            beta_slow=_number(values, "beta_slow", kind, default=1.0),
            attention_factor=_yarn_attention_factor(values) if kind == "yarn" else 1.0,
            truncate=flag(values, "truncate", default=True),
        )
        _check_ramp(found)
        return found


def _check_ramp(rope: RopeConfig) -> None:
    """ModelError if the ramp between kept and stretched waves has no width to divide by."""
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ModelError(
            f"config.json: low_freq_factor ({rope.low_freq_factor:g}) is not below high_freq_factor "
            f"({rope.high_freq_factor:g})",
            hint="take the config.json that the model came with",
        )
    if rope.kind == "yarn" and rope.theta <= 1:
        raise ModelError(
            f"config.json: rope_theta is {rope.theta:g}", hint="with yarn scaling it must be above 1"
        )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """[head_dim / 2]: radians per position of each pair. For `dynamic`, those of short sequences."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain: NDArray[np.float64] = np.power(rope.theta, -exponents)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn(rope, plain, head_dim)
    return plain.astype(np.float32)


def _llama3(rope: RopeConfig, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    turns = rope.original_max_positions * plain / (2 * math.pi)  # in the original context
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept: NDArray[np.float64] = np.clip(ramp, 0.0, 1.0)
    return plain * kept + plain / rope.factor * (1.0 - kept)


def _yarn(rope: RopeConfig, plain: NDArray[np.float64], head_dim: int) -> NDArray[np.float64]:
    def dimension_with(turns: float) -> float:
        """The pair, as a real number, that makes this many turns in the original context."""
        wave = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain / rope.factor * interpolated + plain * (1.0 - interpolated)


def _yarn_attention_factor(values: Mapping[str, Any]) -> float:
    """Section 3.4 of the YaRN paper: `0.1 ln(factor) + 1`; with DeepSeek's two weights on it if given."""
    given = values.get("attention_factor")
    if given is not None:
        return _number(values, "attention_factor", "yarn")
    factor = _number(values, "factor", "yarn")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        top, bottom = (number(key, values[key]) for key in ("mscale", "mscale_all_dim"))
        return scale(top) / scale(bottom)
    return scale(1.0)


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both forms as one: the keys of `rope_parameters` or `rope_scaling`, and `rope_theta`."""
    values: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            raise ModelError(f"config.json: {key} is {shown(part)}", hint="it must be an object or null")
        if any(isinstance(value, Mapping) for value in part.values()):
            raise ModelError(
                f"config.json: {key} differs from layer to layer, which is not supported",
                hint="supported are models that rotate all layers alike",
            )
        values.update({name: value for name, value in part.items() if value is not None})
    fraction = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        raise ModelError(
            f"config.json: partial_rotary_factor {shown(fraction)} is not supported",
            hint="it must be 1, or absent",
        )
    return values


def _number(values: Mapping[str, Any], key: str, kind: str, *, default: float | None = None) -> float:
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(
            f"config.json: rotary scaling {kind!r} needs {key}", hint=f"add {key} to rope_parameters"
        )
    return number(key, value)
