"""How long the parts of a start take, for the report of a recovery."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollforward.processes.environment import age


class Stopwatch:
    """Seconds of each part, by name. `prepare` is what passed before this was made, imports included."""

    def __init__(self) -> None:
        self.seconds = {"prepare": age()}

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """What is done within it belongs to that part."""
        began = age()
        try:
            yield
        finally:
            self.seconds[part] = age() - began
