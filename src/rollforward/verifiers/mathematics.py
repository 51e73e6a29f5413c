"""Whether two expressions are equal according to math-verify, within limits.

math-verify reads LaTeX and compares with SymPy. It runs in one child process (`judge`), which the
kernel ends after `SECONDS` of CPU time, or at 2 GiB of memory. (Its own time limit is a Python
signal handler, which works only in the main thread, and which a huge power never lets run.)

What it gives up on counts as not equal. A child that was killed from outside has given no verdict:
it is called once more, then an error is raised.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

SECONDS = 5.0
"""CPU time for one comparison."""
MEMORY = 2 << 30
_GAVE_UP = {-signal.SIGPROF, -signal.SIGALRM, -signal.SIGSEGV, -signal.SIGABRT, 1, 120}
"""Its limits, a stack overflow, running out of memory where Python cannot tell."""


class JudgeError(RuntimeError):
    """math-verify's process cannot be started, or is killed from outside each time."""


class GaveUp(Exception):
    """No verdict within the limits."""


def equal(given: str, expected: str) -> bool:
    """Whether the expressions, each LaTeX within dollars or prose with some, are equal. Raises GaveUp."""
    verdict = _verdict(given, expected)
    if verdict is None:
        raise GaveUp
    return verdict


@lru_cache(maxsize=4096)
def _verdict(given: str, expected: str) -> bool | None:
    return _judge.ask(given, expected)


class _Judge:
    """The child process: started at the first use, and again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, given: str, expected: str) -> bool | None:
        """Its verdict; None when it gave up."""
        with self._lock:
            for _ in range(2):
                child = self._running()
                answer = _exchange(child, json.dumps([given, expected]))
                if answer:
                    verdict = json.loads(answer)
                    return None if verdict is None else bool(verdict)
                self._child, code = None, _ended(child)
                if code in _GAVE_UP:
                    return None
        raise JudgeError(f"the process that runs math-verify was ended twice (exit code {code})")

    def close(self) -> None:
        """End it."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            _ended(child)

    def _running(self) -> "subprocess.Popen[str]":
        if self._child is None or self._owner != os.getpid():  # a fork must not use its parent's
            child = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("judge.py")), str(SECONDS), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            self._child, self._owner = child, os.getpid()
            if _exchange(child, None) != "ready\n":
                self._child, code = None, _ended(child)
                raise JudgeError(
                    f"the process that runs math-verify does not start (exit code {code}); "
                    f"does `{sys.executable} -c 'import math_verify'` work?"
                )
        return self._child


def _exchange(child: "subprocess.Popen[str]", line: str | None) -> str:
    """Its next line, after it was sent one; nothing if it has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        if line is not None:
            child.stdin.write(line + "\n")
            child.stdin.flush()
    return child.stdout.readline()


def _ended(child: "subprocess.Popen[str]") -> int:
    """Its exit code; the pipes to it are closed."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    return child.wait()


_judge = _Judge()
atexit.register(_judge.close)
