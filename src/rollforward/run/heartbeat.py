"""What each worker is doing at this moment, for people, the supervisor and the demo.

`heartbeat/rank_N.json` in the run's folder holds one JSON object: phase, position, incarnation,
pid, and the time of the last change of phase. It is overwritten in place, one write of a fixed
size, never synced: it describes a living process and is worth nothing after a power cut. A
reader that comes in the middle of a write sees text that is not JSON, and looks again.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rollforward.position import Position

_SIZE = 256
"""Bytes of a heartbeat, blanks at its end."""


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """One heartbeat."""

    phase: str
    position: str
    incarnation: int
    pid: int
    time: float
    """Seconds since 1970, UTC."""


def file_of(run_folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return run_folder / "heartbeat" / f"rank_{rank}.json"


class Heartbeat:
    """Writes one rank's heartbeat; an `Observer`. Disk errors are not worth stopping for and are dropped."""

    def __init__(self, run_folder: Path, *, rank: int, incarnation: int) -> None:
        self._incarnation = incarnation
        path = file_of(run_folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def phase(self, position: Position, name: str) -> None:
        """Note the phase that begins."""
        pulse = {
            "phase": name,
            "position": str(position),
            "incarnation": self._incarnation,
            "pid": os.getpid(),
            "time": round(time.time(), 3),
        }
        line = json.dumps(pulse).ljust(_SIZE - 1) + "\n"
        with suppress(OSError):
            os.pwrite(self._descriptor, line.encode("ascii"), 0)

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Nothing: phases say it."""

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


def read(run_folder: Path, rank: int) -> Pulse | None:
    """A rank's newest heartbeat; None when there is none, or it cannot be read just now."""
    try:
        value = json.loads(file_of(run_folder, rank).read_bytes())
        return Pulse(**value)
    except (OSError, ValueError, TypeError):
        return None
