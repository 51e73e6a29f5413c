"""What each worker is doing at this moment, for people, the supervisor, the other workers and the demo.

`heartbeat/rank_N.json` in the run's folder holds one JSON object: phase, position, incarnation,
pid, the time of the last change of phase, and how many collectives the worker has come to. It is
overwritten in place, one write of a fixed size, never synced: it describes a living process and is
worth nothing after a power cut. A reader that comes in the middle of a write sees text that is not
JSON, and looks again. A link or a pipe in its place is replaced, never written through. One of several
workers writes it again every few seconds, whatever it is at: the file's own time says when it last lived.
"""

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, read_small
from rollforward.storage.inplace import open_in_place

_SIZE = 256
"""Bytes of a heartbeat, blanks at its end."""
_LARGEST = 4096
"""Bytes that are read of one: the file may be from anybody."""


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """One heartbeat."""

    phase: str
    position: str
    incarnation: int
    pid: int
    time: float
    """When the phase began: seconds since 1970, UTC."""
    meetings: int = 0
    """Collectives come to since the start."""


def file_of(run_folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return run_folder / _name_of(rank)


def _name_of(rank: int) -> str:
    return f"heartbeat/rank_{rank}.json"


class Heartbeat:
    """Writes one rank's heartbeat; an `Observer`. Disk errors are not worth stopping for and are dropped."""

    def __init__(self, run_folder: Path, *, rank: int, incarnation: int, start: Position) -> None:
        self._pulse = Pulse(
            phase="start",
            position=str(start),
            incarnation=incarnation,
            pid=os.getpid(),
            time=round(time.time(), 3),
        )
        # Reentrant: the process may be told to end, and close this, in the middle of a write.
        self._lock = threading.RLock()
        run_folder.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = open_in_place(str(run_folder), _name_of(rank), replace=True)
        self.beat()

    def phase(self, position: Position, name: str) -> None:
        """Note the phase that begins."""
        now = round(time.time(), 3)
        with self._lock:
            self._pulse = replace(self._pulse, phase=name, position=str(position), time=now)
            self.beat()

    def meeting(self) -> None:
        """Note that a collective is come to."""
        with self._lock:
            self._pulse = replace(self._pulse, meetings=self._pulse.meetings + 1)
            self.beat()

    def beat(self) -> None:
        """Show that this process lives. From any thread."""
        with self._lock:
            if self._descriptor is None:
                return
            line = json.dumps(asdict(self._pulse)).ljust(_SIZE - 1) + "\n"
            with suppress(OSError):
                os.pwrite(self._descriptor, line.encode("ascii"), 0)

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Nothing: phases say it."""

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None


def read(run_folder: Path, rank: int) -> Pulse | None:
    """A rank's newest heartbeat; None when there is none, or it cannot be read just now."""
    try:
        value = json.loads(read_small(LocalStorage(run_folder), _name_of(rank), limit=_LARGEST))
        pulse = Pulse(**value)
        Position.parse(pulse.position)
        # What a clock of people can show, or an error.
        datetime.fromtimestamp(pulse.time, UTC)
    except (StorageError, ValueError, TypeError, AttributeError, RecursionError, OverflowError, OSError):
        return None
    kinds = [type(found) for found in asdict(pulse).values()]
    return pulse if kinds == [str, str, int, int, float, int] else None


def last_sign(run_folder: Path, rank: int) -> float | None:
    """When a rank's heartbeat was written last, by the clock of the file system; None when there is none."""
    try:
        return file_of(run_folder, rank).stat().st_mtime
    except OSError:
        return None
