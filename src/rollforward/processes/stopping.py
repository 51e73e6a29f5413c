"""Ctrl-C and SIGTERM: both end the command cleanly and in time, each with its own exit code.

    a signal arrives    most commands      Stopped is raised in the main thread and unwinds
                        a trainer          it releases what it holds, and the process ends there (`ending`)
                        within `finishing` either waits until the block is done
    GRACE later         whatever still hangs in a long call is cut off: the process ends
    a second signal     the same, at once

A trainer is not unwound: an exception that passes through a framework while it compiles may leave a mess
and be mistaken for an error in the model, and after that Python's own exit may abort the process (an
engine's package says what was observed with its framework). Being cut off is safe: a run survives SIGKILL
at any moment.

Python runs a signal handler in the main thread, between two bytecodes, so never during a call into the
framework. A thread therefore watches the time; it learns of a signal through `signal.set_wakeup_fd`, which
is written to when the signal arrives.

A framework that gives up its group may send this process SIGTERM too. `ending` can then name the error
behind it.

Not covered: a call that holds the GIL for longer than GRACE, as a framework may while the workers find
each other (seconds) and, in pieces, while it compiles (up to 2.5 s at a time for 12 layers of 512
columns). Nothing else in the process runs then. A supervisor or launcher ends its workers from outside in
any case.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from rollforward.errors import RollforwardError
from rollforward.processes import reports
from rollforward.wording import plain_lines

GRACE = 2.5
"""Seconds from a signal until the process is cut off."""

_ADVICE = "resume with --resume_training"


class Stopped(BaseException):
    """A signal arrived. Not an Exception, so that no code on the way handles it as an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number

    @property
    def told(self) -> str:
        """What happened, without advice for a trainer."""
        return f"stopped by {'Ctrl-C' if self.exit_code == 128 + signal.SIGINT else 'SIGTERM'}"

    def __str__(self) -> str:
        return f"{self.told}; {_ADVICE}"


class _State:
    """State for the signal handler; there is one for the whole process."""

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        """Ctrl-C, not SIGTERM."""
        self.came = False
        self.waits = False
        """It arrived within `finishing`, and has not been acted on yet."""
        self.finishing = 0
        self.grace = GRACE
        self.end: Callable[[], None] | None = None
        self.cause: Callable[[], RollforwardError | None] = _nobody_else

    def reason(self) -> Stopped | RollforwardError:
        stopped = Stopped(signal.SIGINT if self.interrupted.is_set() else signal.SIGTERM)
        try:
            return self.cause() or stopped
        except Exception:  # nothing may keep the process from ending
            return stopped


def _nobody_else() -> None:
    """The default cause, None: the signal came from outside."""


_state = _State()


def take_signals() -> None:
    """From now on SIGTERM and SIGINT stop this process. Must be called before NumPy is imported.

    A framework may take over SIGINT while it compiles or runs a graph, and turn it into SIGTERM, so
    Ctrl-C would look like a termination. So the signal is blocked in every thread but one, which
    waits for it; libraries that start their own threads must therefore be imported later. A process
    that ignores SIGINT (under nohup) still does.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _handle)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # First of all: threads inherit the signal mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=_wait_for_interrupt, name="interrupts", daemon=True).start()
    threading.Thread(target=_watch_the_time, args=(heard,), name="stopping", daemon=True).start()


@contextmanager
def finishing() -> Iterator[None]:
    """The block finishes before a stop takes effect. For the main thread.

    Keep it short: the process is still cut off after GRACE.
    """
    _state.finishing += 1
    try:
        yield
    finally:
        _state.finishing -= 1
        if _state.waits and not _state.finishing:
            _state.waits = False
            _act()


@contextmanager
def ending(
    end: Callable[[], None], *, cause: Callable[[], RollforwardError | None] = _nobody_else
) -> Iterator[None]:
    """Within it a stop unwinds nothing: `end` is called wherever the program is, and the process ends.

    `cause` returns the error behind a signal that is not from outside; it may be called on a thread.
    """
    before, _state.end, _state.cause = (_state.end, _state.cause), end, cause
    try:
        yield
    finally:
        _state.end, _state.cause = before


def allow(seconds: float) -> None:
    """Give this process this long to end after a signal, instead of GRACE: it has others to end first."""
    _state.grace = seconds


def end_at_once(reason: Stopped | RollforwardError) -> NoReturn:
    """From any thread: tell the user, and the launcher if there is one, why, and end this process."""
    # Straight to the file descriptor: the program may be in the middle of its own write.
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{plain_lines(str(reason))}\n".encode())
    with suppress(Exception):
        reports.tell_ending(reason.exit_code, error=str(reason), kind=type(reason).__name__)
    os._exit(reason.exit_code)


def leave(code: int) -> NoReturn:
    """End the process without Python's own exit, in which a framework's threads may abort it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(code)


def _handle(_number: int, _frame: FrameType | None) -> None:
    if _state.came:
        return  # the watching thread takes care of it
    _state.came = True
    if _state.finishing:
        _state.waits = True
    else:
        _act()


def _act() -> NoReturn:
    reason = _state.reason()
    if _state.end is None:
        raise reason
    with suppress(Exception):
        _state.end()
    with suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
    end_at_once(reason)


def _wait_for_interrupt() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        _state.interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)


def _watch_the_time(heard: int) -> None:
    """Cut the process off GRACE after the first signal, or at the second."""
    _hear(heard)
    _hear(heard, _state.grace)
    end_at_once(_state.reason())


def _hear(heard: int, seconds: float | None = None) -> None:
    """Return when SIGTERM, or what Ctrl-C became, arrives; or after this many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if select.select([heard], [], [], left)[0] and signal.SIGTERM in os.read(heard, 1):
            return
