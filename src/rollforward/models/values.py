"""Single values of a `config.json`, checked: of the right type, and of a size that a model can have.

These values become a loop's length, an array's shape or a divisor. A number that no model has is refused
before that, and a value of the wrong type is reported here instead of raising wherever it is used.
"""

import math
from collections.abc import Mapping
from typing import Any

from rollforward.errors import ModelError

LARGEST_SIZE = 1 << 24
"""Of a vocabulary, a width, a context length."""
_SMALLEST, _LARGEST = 1e-30, 1e30


def whole(
    config: Mapping[str, Any], key: str, *, default: int | None = None, most: int = LARGEST_SIZE
) -> int:
    """A whole number from 1 to `most`; ModelError for anything else, or if missing without a default."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json has no {key}", hint="is this the config.json of a decoder model?")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ModelError(
            f"config.json: {key} is {shown(value)}", hint=f"it must be a whole number from 1 to {most}"
        )
    return value


def number(key: str, value: Any) -> float:
    """A number above 0, neither infinite nor beyond what arithmetic can use; ModelError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
        raise ModelError(
            f"config.json: {key} is {shown(value)}",
            hint=f"it must be a number above 0 (from {_SMALLEST:g} to {_LARGEST:g})",
        )
    return float(value)


def flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """True or false; ModelError for anything else. Without the key, `default`."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} is {shown(value)}", hint="it must be true or false")
    return value


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and not too long."""
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    text = repr(value) if not isinstance(value, list | dict) or len(value) < 50 else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
