"""A worker that waits too long for the others in a collective ends, and says who is late.

A collective blocks inside the framework until all workers have reached it. If one is stopped, swaps,
or hangs in its device, the others would wait forever without knowing for whom. So a thread in each
worker watches how long it has waited. After the timeout it reads all workers' heartbeats, reports
which workers are late, in which phase and since when, and ends the process. The launcher, or `msrun`,
then ends the rest, and a supervisor restarts the run.

    absent      no heartbeat from this start: the worker is still starting, or never did
    behind      it has reached fewer collectives than we have
    silent      its heartbeat has stopped: it is stopped, or its machine is gone

The mechanism is the same under `rollforward train --workers` and the user's own `msrun`, over any
number of machines that share the run's folder; only the folder's clock is used. Time during which this
process itself was stopped does not count.

Not covered: the framework's own start, in which the workers find each other. It has timeouts of its
own, and holds the GIL, so no thread can watch it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rollforward.errors import CollectiveTimeout
from rollforward.processes import heartbeat
from rollforward.processes.heartbeat import Heartbeat, Pulse

_BEAT = 5.0
"""Seconds between two heartbeats, unless the timeout is short."""
_SILENT_BEATS = 3
"""A worker is silent when it has missed this many."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A worker's heartbeat from this start."""

    pulse: Pulse
    silent_for: float
    """Seconds by which its last heartbeat is older than ours."""


@dataclass(frozen=True, kw_only=True)
class _Company:
    """Who this worker is, and where all workers' heartbeats are."""

    heart: Heartbeat
    folder: Path
    rank: int
    world_size: int
    incarnation: int

    def look(self) -> list[Seen | None]:
        """The heartbeats of all ranks; None for a rank that has written none in this start."""
        self.heart.beat()
        now = heartbeat.last_sign(self.folder, self.rank) or 0.0
        found: list[Seen | None] = []
        for rank in range(self.world_size):
            pulse, sign = heartbeat.read(self.folder, rank), heartbeat.last_sign(self.folder, rank)
            if pulse is None or sign is None or pulse.incarnation != self.incarnation:
                found.append(None)
            else:
                found.append(Seen(pulse=pulse, silent_for=now - sign))
        return found


class Patience:
    """How long one collective has lasted, checked from time to time."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._meeting = 0
        self._waited = 0.0

    def over(self, meeting: int, passed: float) -> bool:
        """Whether time is up. `meeting`: the one in progress, 0 for none; `passed`: since the last check."""
        self._waited = self._waited + passed if meeting and meeting == self._meeting else 0.0
        self._meeting = meeting
        return self._waited >= self._timeout


class CollectiveWatch:
    """Watches the collectives of this worker. `timeout` in seconds; 0 watches nothing."""

    def __init__(self, timeout: float, *, end: Callable[[CollectiveTimeout], None]) -> None:
        """`end` is called, on a thread, when time is up; it must end the process."""
        self._timeout = timeout
        self._end = end
        self._every = min(_BEAT, timeout / 4)
        self._count = 0
        self._waiting = 0
        """The number of the collective in progress; 0 when there is none."""
        self._since = 0.0
        self._company: _Company | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, heart: Heartbeat, folder: Path, *, rank: int, world_size: int, incarnation: int) -> None:
        """From now on use heartbeats to say who is late; `folder` is the run's."""
        self._company = _Company(
            heart=heart, folder=folder, rank=rank, world_size=world_size, incarnation=incarnation
        )

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Wrap each collective in this, the same on all workers."""
        self._count += 1
        if self._company is not None:
            self._company.heart.meeting()
        if self._thread is None and self._timeout > 0:
            self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)
            self._thread.start()
        self._since, self._waiting = time.time(), self._count
        try:
            yield
        finally:
            self._waiting = 0

    def lost(self) -> CollectiveTimeout | None:
        """The error when the framework gave up on the others first; None before the first collective."""
        if not self._count:
            return None
        return CollectiveTimeout(
            f"the framework lost contact with a worker and ended the group: {self._who_is_late()}",
            hint="see that worker's log: was it stopped or killed, or did its machine fail? Resume with "
            "--resume_training",
        )

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        patience, before = Patience(self._timeout), time.monotonic()
        while not self._closed.wait(self._every):
            if self._company is not None:
                self._company.heart.beat()
            now, waiting = time.monotonic(), self._waiting
            # If the pause was longer than it should be, this process was stopped too.
            over = patience.over(waiting, min(now - before, 2 * self._every))
            before = now
            if over and not self._closed.is_set():
                self._end(
                    CollectiveTimeout(
                        f"waited {self._timeout:g} s for the other workers, since {_clock(self._since)}: "
                        f"{self._who_is_late()}",
                        hint="see that worker's log: is it stopped or swapping, or does its device hang? "
                        "Resume with --resume_training; if workers really differ by that much, raise "
                        "rl_config.collective_timeout",
                    )
                )
                return

    def _who_is_late(self) -> str:
        company = self._company
        if company is None:
            return "it is not known who is late, since the run's folder is not locked yet"
        silent = _SILENT_BEATS * self._every if self._timeout > 0 else float("inf")
        return "; ".join(late_workers(company.look(), rank=company.rank, silent=silent))


def late_workers(seen: Sequence[Seen | None], *, rank: int, silent: float) -> list[str]:
    """What to report about the late workers, and about this one, `rank`. None: no heartbeat.

    `silent`: seconds without a heartbeat after which a worker is late wherever it is. If none is late,
    the collective itself hangs, and the report says so.
    """
    own = seen[rank]
    told = []
    for other, found in enumerate(seen):
        if other == rank:
            continue
        if found is None:
            told.append(f"worker {other} has written no heartbeat since this start")
            continue
        pulse, still = found.pulse, found.silent_for > silent
        if still or (own is not None and pulse.meetings < own.pulse.meetings):
            text = f"worker {other} (process {pulse.pid}) is late, in phase {pulse.phase} of step "
            text += f"{pulse.position} since {_clock(pulse.time)}"
            told.append(text + (f", without a sign of life for {found.silent_for:.0f} s" if still else ""))
    if not told:
        told.append("all workers have arrived, and it does not finish")
    if own is not None:
        told.append(f"worker {rank} waits in phase {own.pulse.phase} of step {own.pulse.position}")
    return told


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
