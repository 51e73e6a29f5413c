"""Ctrl-C and SIGTERM: both end the command in good order, with an exit code of their own."""

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

_interrupted = threading.Event()


class Stopped(BaseException):
    """A signal came. Not an Exception, so that nothing on the way takes it for an error to handle."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.told = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"


def take_signals() -> None:
    """From now on SIGTERM and SIGINT raise Stopped in the main thread. To be called before NumPy is imported.

    MindSpore (2.10) takes SIGINT over while it compiles or runs a graph, and turns it into
    SIGTERM, so Ctrl-C could not be told from a termination. Here the signal is blocked in every
    thread but one, which waits for it; libraries that start threads of their own must therefore
    be imported later. A process that ignores SIGINT (under nohup) goes on to.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=_wait_for_interrupt, name="interrupts", daemon=True).start()


def _wait_for_interrupt() -> None:
    signal.sigwait({signal.SIGINT})
    _interrupted.set()
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(signal.SIGINT if _interrupted.is_set() else signal.SIGTERM)
