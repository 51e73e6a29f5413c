"""JSON from a disk, parsed strictly: anything that two parsers could understand differently is rejected.

Duplicate keys, NaN, Infinity and numbers that become infinite (`1e999`) are rejected; so is excessive
nesting, and so are absurd numbers. Every rejection is a ValueError whose text fits one line.

A value in memory takes up to a hundred times the bytes that it takes in the text (`[]` is two bytes), so
the number of values a text may hold is counted before it is parsed.
"""

import json
import math
from typing import Any, NoReturn

from rollforward.inputs import unique_keys

MOST_VALUES = 2_000_000
"""Room for 150,000 tensors in a manifest or header; some 300 MB once parsed."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ASCII = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def parse(content: bytes, *, most: int = MOST_VALUES) -> Any:
    """The parsed value; ValueError too when the text may hold more than `most` values."""
    # This also counts those within strings: it is an upper bound.
    values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if values > most:
        raise ValueError(f"JSON of up to {values} values, where at most {most} are expected")
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("JSON that nests too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None


def dump(value: Any) -> str:
    """JSON on one line, keys in their given order; ValueError for NaN and what JSON cannot represent.

    Text that UTF-8 cannot encode (a name on disk that is not UTF-8) is written with escapes.
    """
    try:
        text = _ENCODER.encode(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            return _ASCII.encode(value)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON: {error}") from error
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large for a float")
    return value
