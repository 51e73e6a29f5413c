"""The group of a run that has one process, which needs no communication."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rollforward.errors import EngineError


class OneProcess:
    """`grpo.ports.Group` of one."""

    rank: int = 0
    world_size: int = 1

    def all_gather(self, value: Any) -> list[Any]:
        """The value, passed through JSON, so that one process sees what each of many would."""
        return [json.loads(encoded(value))]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Nothing to wait for."""
        yield


def encoded(value: Any) -> bytes:
    """What processes send each other: the value as JSON. EngineError when JSON cannot hold it."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=True).encode()
    except (TypeError, ValueError) as error:
        raise EngineError(f"workers exchange JSON values, and this is not one: {error}") from error
