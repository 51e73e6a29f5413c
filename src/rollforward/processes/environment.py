"""What this process knows about itself: how old it is, and whether our launcher started it."""

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

LAUNCHED = "ROLLFORWARD_WORKER_FILES"
"""Set for workers that `launch` started: the folder where they report being alive and how they ended."""
ENGINE = "ROLLFORWARD_ENGINE"
"""Set with it: the name of the engine, whose package knows which worker a process is."""


def age() -> float:
    """Seconds since this process started, imports included. Without /proc, CPU seconds only."""
    started = start_time(os.getpid())
    if started is None:
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None when that cannot be determined.

    Together with the pid it identifies a process for good: pids are reused.
    """
    fields = _stat(pid)
    # Field 22 of proc(5); the first one here is field 3.
    return int(fields[19]) if fields else None


def is_alive(pid: int, started: int | None = None) -> bool:
    """Whether a process is running; a zombie is not, once its last thread has ended.

    Of a process that was killed the first thread may be gone while another is still in a system call, such as
    fsync: until that returns, the files of the process are open, and its locks held.

    `started`: its `start_time`; another process that got the same pid later does not count.
    """
    try:
        fields = _stat(pid, missing_ok=False)
    except (FileNotFoundError, ProcessLookupError):  # the second: it went between opening and reading
        return False
    if not fields:
        return True
    if started is not None and int(fields[19]) != started:
        return False
    return fields[0] not in (b"Z", b"X") or int(fields[17]) > 1


def memory_in_use() -> int:
    """Bytes of memory that this process holds now; 0 when that cannot be determined."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def kill_processes_with(name: str, value: str) -> int:
    """SIGKILL to the processes that were started with this environment variable; how many. Linux only."""
    wanted, found = f"{name}={value}".encode(), 0
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, AttributeError):
            # Opened first: what is signalled is the process whose environment was read, whatever its number.
            process = os.pidfd_open(int(entry.name))
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    found += 1
            finally:
                os.close(process)
    return found


def wait_for_an_end(pids: Sequence[int], seconds: float) -> None:
    """Return when one of these processes ends, but after this many seconds at the latest.

    Where processes cannot be watched (not Linux), it is always that long.
    """
    with ExitStack() as opened:
        watched = []
        for pid in pids:
            with suppress(AttributeError, OSError):
                watched.append(os.pidfd_open(pid))
                opened.callback(os.close, watched[-1])
        select.select(watched, [], [], seconds)


def _stat(pid: int, *, missing_ok: bool = True) -> list[bytes]:
    """The fields of /proc/<pid>/stat, starting with the third; empty when they cannot be read."""
    expected = (OSError,) if missing_ok else (PermissionError,)
    with suppress(*expected):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []
