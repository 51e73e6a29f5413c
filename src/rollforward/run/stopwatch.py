"""How long the parts of a start take, for the report of a recovery."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollforward.processes.environment import age


class Stopwatch:
    """Seconds of each part, by name. `prepare` is the time before this was created, imports included."""

    def __init__(self) -> None:
        self.seconds = {"prepare": age()}

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Time the enclosed block as that part."""
        began = age()
        try:
            yield
        finally:
            self.seconds[part] = age() - began
