"""A worker that waits for the others in a collective for too long ends, and says who is late.

A collective blocks inside the framework until all workers have come to it. When one is stopped,
swaps, or hangs in its device, the others would wait for ever, and nobody would know for whom. Here
a thread in each worker looks how long it has waited. After the time-out it reads the heartbeats
of all workers, tells of those that are late which phase they are in and since when, and ends
the process. The launcher, or `msrun`, then ends the rest, and a supervisor starts the run again.

    absent      no heartbeat of this start: the worker is still starting, or never did
    behind      it has come to fewer collectives than we have
    silent      its heartbeat stands still: it is stopped, or its machine is gone

The mechanism is the same under `rollforward train --workers` and the user's own `msrun`, over any
number of machines that share the run's folder, whose clock alone is asked. Time during which this
process itself was stopped does not count.

Left out: the framework's own start, in which the workers find each other. It has time-outs of its
own, and keeps the interpreter lock, so that no thread can look.
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
"""Seconds between two signs of life, unless the time-out is short."""
_SILENT_BEATS = 3
"""A worker is silent when so many have not come."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A worker's heartbeat in this start."""

    pulse: Pulse
    silent_for: float
    """Seconds by which its last sign of life is older than ours."""


@dataclass(frozen=True, kw_only=True)
class _Company:
    """Who this worker is, and where the heartbeats of all are."""

    heart: Heartbeat
    folder: Path
    rank: int
    world_size: int
    incarnation: int

    def look(self) -> list[Seen | None]:
        """The heartbeats of all ranks; None for a rank that has given none in this start."""
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
    """How long one collective has lasted, looked at from time to time."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._meeting = 0
        self._waited = 0.0

    def over(self, meeting: int, passed: float) -> bool:
        """Whether the time is up. `meeting`: the one under way, 0 for none; `passed`: since the last look."""
        self._waited = self._waited + passed if meeting and meeting == self._meeting else 0.0
        self._meeting = meeting
        return self._waited >= self._timeout


class CollectiveWatch:
    """Watches the collectives of this worker. `timeout` in seconds; 0 watches nothing."""

    def __init__(self, timeout: float, *, end: Callable[[CollectiveTimeout], None]) -> None:
        """`end` is called, on a thread, when the time is up; it is to end the process."""
        self._timeout = timeout
        self._end = end
        self._every = min(_BEAT, timeout / 4)
        self._count = 0
        self._waiting = 0
        """The number of the collective that is under way; 0 between two."""
        self._since = 0.0
        self._company: _Company | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, heart: Heartbeat, folder: Path, *, rank: int, world_size: int, incarnation: int) -> None:
        """From now on heartbeats say who is late; `folder` is the run's."""
        self._company = _Company(
            heart=heart, folder=folder, rank=rank, world_size=world_size, incarnation=incarnation
        )

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around each collective, on all workers alike."""
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
        """What to say when the framework gave the others up, before our time was up; None at the start."""
        if not self._count:
            return None
        return CollectiveTimeout(
            f"the framework lost contact with a worker and ended the group: {self._who_is_late()}",
            hint="see that worker's log: was it stopped or killed, or did its machine fail? Resume with "
            "--resume_training",
        )

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        patience, before = Patience(self._timeout), time.monotonic()
        while not self._closed.wait(self._every):
            if self._company is not None:
                self._company.heart.beat()
            now, waiting = time.monotonic(), self._waiting
            # After a longer pause than it should be, this process was stopped too.
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
    """What is said of the workers that are late, and of this one, `rank`. None: no heartbeat.

    `silent`: seconds without a sign of life after which a worker is late wherever it is. When none is
    late it is the collective itself that hangs, and that is said.
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
