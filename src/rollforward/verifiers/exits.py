"""A verifier cannot end the process: what would do so becomes an exception that the caller reports.

Reward functions run third-party code, and sometimes code that a model wrote. `exit()` there must
not look like the end of the run, least of all with exit code 0.

    exit(), sys.exit(), KeyboardInterrupt ...   an exception; `score` catches it as it does any other
    os._exit, os.execv and its variants         raise `Exited` while a verifier runs
    Ctrl-C of the user                          is not the verifier's: it passes through

The process's own code (a stop by SIGTERM, the forced end after it) and child processes that a
verifier has forked keep the real functions.

Left out, since nothing inside a process can stop them: signals that a verifier sends to its own
process, native code that calls `_exit`, and a reference to `os._exit` that was taken before the
verifier's module was imported. A supervisor or launcher sees those (`processes`). In a thread of the
verifier's own, `Exited` and `SystemExit` end that thread only, as in Python generally.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_WAYS_OUT = ("_exit", "execv", "execve")  # the others of the exec family call the last two


class Exited(BaseException):
    """A verifier tried to end the process. Not an Exception, so that few handlers swallow it."""


class Watch:
    """What `kept_alive` knows of the call that runs within it."""

    def __init__(self) -> None:
        self.interrupted = False
        """The user pressed Ctrl-C."""

    def passes(self, error: BaseException) -> bool:
        """Whether the exception is not from the verifier: the user's Ctrl-C, or a stop of the process."""
        if isinstance(error, Exception | Exited):
            return False
        if isinstance(error, KeyboardInterrupt):
            return self.interrupted
        return type(error).__module__.startswith("rollforward.")


@contextmanager
def kept_alive() -> Iterator[Watch]:
    """Within it, only the process's own code can end the process through `os`."""
    watch, pid = Watch(), os.getpid()
    real = {name: getattr(os, name) for name in _WAYS_OUT}
    for name, function in real.items():
        setattr(os, name, _raising(name, function, pid))
    # In a trainer SIGINT is blocked, and a thread waits for it; elsewhere Ctrl-C is distinguished from a
    # KeyboardInterrupt that the verifier raises itself by the signal that brings it.
    main = threading.current_thread() is threading.main_thread()
    heard = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, _noting(watch))
    try:
        yield watch
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, function in real.items():
            setattr(os, name, function)


def described(error: BaseException) -> str:
    """`ValueError: what it says`, also for exceptions that say nothing, or cannot."""
    kind = "SystemExit" if isinstance(error, SystemExit) else type(error).__name__
    try:
        said = "" if error.args in ((), (None,)) else str(error)
    except Exception:  # __str__ is third-party code too
        said = "(its message cannot be shown)"
    if isinstance(error, Exited):
        return f"called {said}, which would have ended the process"
    return f"raised {kind}: {said}" if said else f"raised {kind}"


def _raising(name: str, real: Callable[..., Any], pid: int) -> Callable[..., Any]:
    def instead(*arguments: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if os.getpid() != pid or caller.startswith("rollforward."):
            return real(*arguments)
        shown = repr(arguments[0]) if arguments else ""
        raise Exited(f"os.{name}({shown[:60]})")

    return instead


def _noting(watch: Watch) -> Callable[[int, FrameType | None], NoReturn]:
    def handle(_number: int, _frame: FrameType | None) -> NoReturn:
        watch.interrupted = True
        raise KeyboardInterrupt

    return handle
