"""What each worker is doing right now, for users, the supervisor, the other workers and the demo.

`heartbeat/rank_N.json` in the run's folder holds one JSON object: phase, position, incarnation,
pid, the time of the last change of phase, and how many collectives the worker has reached. It is
overwritten in place with one write of a fixed size and never synced: it describes a live process and
is worth nothing after a power cut. A reader that arrives during a write sees text that is not JSON,
and looks again. A link or a pipe in its place is replaced, never written through. With several workers,
each rewrites its file every few seconds, whatever it is doing: the mtime says when it was last alive.
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
from rollforward.inputs import parse_json
from rollforward.position import Position
from rollforward.storage import LocalStorage, read_small
from rollforward.storage.inplace import open_in_place

START = "start"
"""The phase before the first step."""
_SIZE = 256
"""Size of a heartbeat in bytes, padded with spaces."""
_LARGEST = 4096
"""Most bytes read from one: anyone may have written the file."""


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
    """Collectives reached since the start."""


def file_of(run_folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return run_folder / _name_of(rank)


def _name_of(rank: int) -> str:
    return f"heartbeat/rank_{rank}.json"


class Heartbeat:
    """Writes one rank's heartbeat; an `Observer`. Disk errors are not worth stopping for and are ignored."""

    def __init__(self, run_folder: Path, *, rank: int, incarnation: int, start: Position) -> None:
        self._pulse = Pulse(
            phase=START,
            position=str(start),
            incarnation=incarnation,
            pid=os.getpid(),
            time=round(time.time(), 3),
        )
        # Reentrant: a signal may stop the process, and close this, in the middle of a write.
        self._lock = threading.RLock()
        run_folder.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = open_in_place(str(run_folder), _name_of(rank), replace=True)
        self.beat()

    def phase(self, position: Position, name: str) -> None:
        """Note that a phase begins."""
        now = round(time.time(), 3)
        with self._lock:
            self._pulse = replace(self._pulse, phase=name, position=str(position), time=now)
            self.beat()

    def meeting(self) -> None:
        """Note that a collective has been reached."""
        with self._lock:
            self._pulse = replace(self._pulse, meetings=self._pulse.meetings + 1)
            self.beat()

    def beat(self) -> None:
        """Show that this process is alive. From any thread."""
        with self._lock:
            if self._descriptor is None:
                return
            line = json.dumps(asdict(self._pulse)).ljust(_SIZE - 1) + "\n"
            with suppress(OSError):
                os.pwrite(self._descriptor, line.encode("ascii"), 0)

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Does nothing: the phases already say it."""

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None


def read(run_folder: Path, rank: int) -> Pulse | None:
    """A rank's newest heartbeat; None when there is none, or it cannot be read just now."""
    try:
        pulse = Pulse(**parse_json(read_small(LocalStorage(run_folder), _name_of(rank), limit=_LARGEST)))
        Position.parse(pulse.position)
        # ValueError for a time that no calendar can show.
        datetime.fromtimestamp(pulse.time, UTC)
    except (StorageError, ValueError, TypeError, AttributeError, OverflowError, OSError):
        return None
    kinds = [type(found) for found in asdict(pulse).values()]
    return pulse if kinds == [str, str, int, int, float, int] else None


def last_sign(run_folder: Path, rank: int) -> float | None:
    """When a rank's heartbeat was last written, by the file system's clock; None when there is none."""
    try:
        return file_of(run_folder, rank).stat().st_mtime
    except OSError:
        return None
