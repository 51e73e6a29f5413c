"""What this process knows of itself: how old it is, and whether a launcher of ours started it."""

import os
import time
from contextlib import suppress
from pathlib import Path

LAUNCHED = "ROLLFORWARD_WORKER_FILES"
"""Set for workers that `launch` started: the folder where they report that they live, and how they ended."""
ENGINE = "ROLLFORWARD_ENGINE"
"""Set with it: the name of the engine, whose package knows which of the workers a process is."""


def age() -> float:
    """Seconds since this process was started, imports included. Of computing only where there is no /proc."""
    started = start_time(os.getpid())
    if started is None:
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None when that cannot be told.

    With its number it names a process for good: numbers are used again.
    """
    fields = _stat(pid)
    # Field 22 of proc(5); the first one here is field 3.
    return int(fields[19]) if fields else None


def is_alive(pid: int, started: int | None = None) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not.

    `started`: its `start_time`; another process that was given the number later does not count.
    """
    try:
        fields = _stat(pid, missing_ok=False)
    except FileNotFoundError:
        return False
    if not fields:
        return True
    if started is not None and int(fields[19]) != started:
        return False
    return fields[0] not in (b"Z", b"X")


def _stat(pid: int, *, missing_ok: bool = True) -> list[bytes]:
    """The fields of /proc/<pid>/stat from the third on; empty when they cannot be read."""
    expected = (OSError,) if missing_ok else (PermissionError,)
    with suppress(*expected):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []
