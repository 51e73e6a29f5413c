"""Python values as bytes and back, without pickle: what schedulers, histories and groups consist of.

JSON. What JSON does not have becomes an object of one key: {"tuple": [...]}, {"float": "nan"},
{"counter": [[key, count]]}, and {"items": [[key, value]]} for a mapping whose keys are not all text, or that
has one of these four keys.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_KINDS = frozenset({"tuple", "items", "float", "counter"})


def dump(value: Any) -> bytes:
    """A value as bytes; TypeError names what cannot be written, and where it is."""
    return json.dumps(_encode(value, "the value"), allow_nan=False, separators=(",", ":")).encode()


def parse(content: bytes) -> Any:
    """The value of `dump`; ValueError when it is not one."""
    return _decode(json.loads(content))


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        return _encode(value.item(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Counter):
        return {"counter": [[_encode(key, where), count] for key, count in value.items()]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and value.keys() - _KINDS == value.keys():
            return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        return {
            "items": [
                [_encode(key, where), _encode(item, f"{where}[{key!r}]")] for key, item in value.items()
            ]
        }
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, f"{where}[{n}]") for n, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, f"{where}[{n}]") for n, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot be written without pickle")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tuple": items, **none} if not none:
            return tuple(_decode(item) for item in items)
        case {"items": items, **none} if not none:
            return {_decode(key): _decode(item) for key, item in items}
        case {"float": text, **none} if not none:
            return float(text)
        case {"counter": items, **none} if not none:
            return Counter({_decode(key): count for key, count in items})
    return {key: _decode(item) for key, item in value.items()}
