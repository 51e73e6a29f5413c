"""The facts that affect the numbers of a run, as JSON: whether they are the same, and what changed."""

import json
from collections.abc import Mapping
from typing import Any

from rollforward.store.digests import digest


def fingerprint(facts: Mapping[str, Any]) -> str:
    """XXH3-128, in hexadecimal, of facts that affect the numbers; independent of their order."""
    return digest(json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences, one line each."""
    return [
        f"{name} changed from {before.get(name)!r} to {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
