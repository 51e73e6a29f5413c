"""One start of the command that is put to the proof: its output kept, and a kill at its place.

Output is watched as it comes, so that a kill follows the line that calls for it within milliseconds. The
trainer is asked not to buffer it (`PYTHONUNBUFFERED`); one that buffers by itself shows its lines late.
"""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollforward.processes.family import LOOK_EVERY, Family, FamilyEnding

_LINE_BYTES = 1 << 16
"""The longest line that is looked at as one."""


@dataclass(frozen=True)
class AfterSeconds:
    """A kill at a moment, counted from when the start begins: see `run_start`."""

    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s after it began"


@dataclass(frozen=True)
class AfterLine:
    """A kill right after the first line of the start's output that matches."""

    pattern: re.Pattern[str]

    def __str__(self) -> str:
        return f"after a line that matches {self.pattern.pattern!r}"


KillPlace = AfterSeconds | AfterLine


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of the command, and how it ended."""

    number: int
    """From 1."""
    command: tuple[str, ...]
    log: Path
    """All of its output."""
    seconds: float
    begun: float | None
    """Seconds until it began; None when it never did."""
    code: int | None
    """Its own exit code, negative for a signal that was not sent from here; None when it was killed."""
    place: KillPlace | None
    """Where it was to be killed."""
    line: str
    """The last line of its output that was seen before it was killed, or before it ended."""
    hung: bool = False
    """Killed because it took too long."""
    left: tuple[str, ...] = ()
    """Processes that it left behind when it ended by itself; they were ended."""

    @property
    def killed(self) -> bool:
        """Whether it was killed where it was to be."""
        return self.code is None and not self.hung


def run_start(
    number: int,
    command: Sequence[str],
    log: Path,
    *,
    begin: re.Pattern[str] | None,
    place: KillPlace | None = None,
    limit: float | None = None,
) -> Start:
    """Run the command until it ends, is killed at `place`, or has taken `limit` seconds.

    It has begun with the first line of output that matches `begin`; None: at once. InputError when it cannot
    be started.
    """
    watch = _Watch(begin, place, limit)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # Not buffered: it can be followed while the start runs.
    with log.open("xb", buffering=0) as file, Family(command, environment) as family:
        while (output := family.read(watch.patience())) is not None:
            file.write(output)
            if watch.look(output):
                family.kill()
        ending = family.ending
    assert ending is not None
    return watch.start(number, tuple(command), log, ending)


class _Watch:
    """Looks at a start's output and at the clock."""

    def __init__(self, begin: re.Pattern[str] | None, place: KillPlace | None, limit: float | None) -> None:
        self._started = time.monotonic()
        self._begin = begin
        self._place = place
        self._deadline = None if limit is None else self._started + limit
        self._begun = self._started if begin is None else None
        self._reached = self._hung = False
        self._unfinished, self._line = b"", ""

    def patience(self) -> float:
        """Seconds until there is something to do without output."""
        times = [] if self._over() else [at for at in (self._moment(), self._deadline) if at is not None]
        return min([LOOK_EVERY, *(max(at - time.monotonic(), 0.0) for at in times)])

    def _moment(self) -> float | None:
        """When it is to be killed, where that is known."""
        if self._begun is None or not isinstance(self._place, AfterSeconds):
            return None
        return self._begun + self._place.seconds

    def look(self, output: bytes) -> bool:
        """Whether it is to be killed now, once."""
        if self._over():
            return False
        # Progress bars write a line over the last one.
        *lines, unfinished = re.split(rb"[\r\n]+", self._unfinished + output)
        self._unfinished = unfinished[-_LINE_BYTES:]
        for line in lines:
            if line and self._calls(line.decode(errors="replace")):
                self._reached = True
                return True
        now, moment = time.monotonic(), self._moment()
        self._reached = moment is not None and now >= moment
        self._hung = not self._reached and self._deadline is not None and now >= self._deadline
        return self._over()

    def _over(self) -> bool:
        return self._reached or self._hung

    def _calls(self, line: str) -> bool:
        self._line = line
        if self._begun is None and self._begin is not None and self._begin.search(line):
            self._begun = time.monotonic()
        return isinstance(self._place, AfterLine) and self._place.pattern.search(line) is not None

    def start(self, number: int, command: tuple[str, ...], log: Path, ending: FamilyEnding) -> Start:
        """What is known about the start now that it has ended."""
        return Start(
            number=number,
            command=command,
            log=log,
            seconds=time.monotonic() - self._started,
            begun=None if self._begun is None else self._begun - self._started,
            code=ending.code,
            place=self._place,
            line=self._line,
            # It may have ended by itself just before.
            hung=self._hung and ending.code is None,
            left=ending.left,
        )
