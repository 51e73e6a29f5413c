"""`configurations.jsonl`: which configuration each start of a run had.

    {"incarnation": 1, "time": "...", "config": {"rl_config": {"seed": 7, ...}}}

One line for the first start, and one for each later start with a different configuration. What the keys mean
is up to the trainer that wrote them.
"""

import json
from collections.abc import Mapping
from typing import Any

from rollforward.errors import StorageError
from rollforward.storage import Storage, read_small

FILE = "configurations.jsonl"
_MOST_BYTES = 16 << 20

Tree = Mapping[str, Any]
"""Sections of keys, as in YAML."""


def read(storage: Storage) -> list[dict[str, Any]]:
    """The entries of the file, oldest first; invalid lines are skipped.

    StorageError when it cannot be read this time: taken for empty, it would be replaced by one line.
    """
    try:
        if storage.stat(FILE) is None:
            return []
        lines = read_small(storage, FILE, limit=_MOST_BYTES).splitlines()
    except StorageError as error:
        if error.settled:
            return []
        raise
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(value, dict)
            and type(value.get("incarnation")) is int
            and isinstance(value.get("config"), dict)
        ):
            found.append(value)
    return found


def flat(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
