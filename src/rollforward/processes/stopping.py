"""Ctrl-C and SIGTERM: both end the command in good order and in time, with an exit code of their own.

    a signal comes      most commands      Stopped is raised in the main thread and unwinds
                        a trainer          what it holds is let go of, and the process ends there (`ending`)
                        within `finishing` either waits until the block is done
    GRACE later         whatever still hangs in a long call is cut off: the process ends
    a second signal     the same, at once

A trainer is not unwound: an exception that passes through a framework while it compiles may leave litter
and be taken for an error of the model, and a process that runs into Python's own exit after that may be
aborted (an engine's package says what was seen of its framework). Being cut off is safe: a run survives
SIGKILL at any instant.

Python runs a signal's handler in the main thread, between two of its bytecodes, so never during a
call into the framework. A thread therefore watches the time; it hears of a signal through
`signal.set_wakeup_fd`, which is written to where the signal arrives.

A framework that gives its group up may send this process SIGTERM too. Then `ending` is given the error that
is behind it.

Left out: a call that keeps the interpreter lock for longer than GRACE, as a framework may while the
workers find each other (seconds) and, in pieces, while it compiles (up to 2.5 s at a time for 12
layers of 512 columns). Nothing in the process runs then. A supervisor or launcher ends its
workers from outside in any case.
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
    """A signal came. Not an Exception, so that nothing on the way takes it for an error to handle."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number

    def __str__(self) -> str:
        told = "Ctrl-C" if self.exit_code == 128 + signal.SIGINT else "SIGTERM"
        return f"stopped by {told}; {_ADVICE}"


class _State:
    """What the handler, which is one for the whole process, has to know."""

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        """Ctrl-C, not SIGTERM."""
        self.came = False
        self.waits = False
        """It came within `finishing`, and is still to be acted upon."""
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
    """A signal is from outside."""


_state = _State()


def take_signals() -> None:
    """From now on SIGTERM and SIGINT stop this process. To be called before NumPy is imported.

    A framework may take SIGINT over while it compiles or runs a graph, and turn it into
    SIGTERM, so Ctrl-C could not be told from a termination. Here the signal is blocked in every
    thread but one, which waits for it; libraries that start threads of their own must therefore
    be imported later. A process that ignores SIGINT (under nohup) goes on to.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _handle)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # First of all: a thread inherits what is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=_wait_for_interrupt, name="interrupts", daemon=True).start()
    threading.Thread(target=_watch_the_time, args=(heard,), name="stopping", daemon=True).start()


@contextmanager
def finishing() -> Iterator[None]:
    """What is begun within it is brought to its end before a stop takes effect. For the main thread.

    For moments: the process is cut off after GRACE all the same.
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

    `cause` says what is behind a signal that is not from outside; it may be called on a thread.
    """
    before, _state.end, _state.cause = (_state.end, _state.cause), end, cause
    try:
        yield
    finally:
        _state.end, _state.cause = before


def allow(seconds: float) -> None:
    """Let this process have so long to end after a signal, instead of GRACE: it has others to end first."""
    _state.grace = seconds


def end_at_once(reason: Stopped | RollforwardError) -> NoReturn:
    """From any thread: say why, to the user and to the launcher if there is one, and end this process."""
    # Straight to the descriptor: the program may be in the middle of a write of its own.
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
        return  # the thread that watches sees to it
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
    """Come back when SIGTERM, or what Ctrl-C became, arrives; or after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if select.select([heard], [], [], left)[0] and signal.SIGTERM in os.read(heard, 1):
            return
