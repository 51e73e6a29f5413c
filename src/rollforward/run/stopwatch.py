"""How long the parts of a start take, for the report of a recovery."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollforward.processes.environment import age


class Stopwatch:
    """Seconds of each part, by name. `prepare` is the time before this was created, imports included."""

    def __init__(self) -> None:
        self.seconds = {"prepare": age()}
        self._began = 0.0

    def age(self) -> float:
        """Seconds since this process was started, or since it took over as a standby."""
        return age() - self._began

    def take_over(self) -> None:
        """Count from now: what a standby had ready took no time."""
        self._began = age()
        self.seconds = {"prepare": 0.0, "framework": 0.0, "engine": 0.0}

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Time the enclosed block as that part."""
        began = age()
        try:
            yield
        finally:
            self.seconds[part] = age() - began
