"""A process that stands between a command and whoever started it, so that nothing of the command outlives it.

    python -I -S warden.py CONTROL COMMAND...

`CONTROL` is the number of an inherited socket. When the other side closes it or is gone, however it ended,
everything that the command has started gets SIGKILL, at once. When nothing is left, one line of JSON on the
socket says how the command ended:

    {"code": 0, "left": []}           by itself; what it left behind and had to be ended
    {"code": null, "left": []}        it was killed; what could not be ended
    {"error": "No such file ..."}     it could not be started

On Linux this process adopts what the command leaves behind (`PR_SET_CHILD_SUBREAPER`), so processes in
sessions of their own, daemons included, are its descendants, and all are gone when `waitpid` knows no child
any more. Elsewhere only the command's own process group is ended.

The standard library only, and nothing of this package: it starts in a few milliseconds.
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
GRACE = 5.0
"""Seconds that what a command leaves behind has to end by itself."""
ENDING = 20.0
"""Seconds after which a process that SIGKILL has not ended is given up."""


def main(control_number: int, command: list[str]) -> None:
    """Run the command until it ends or is to be ended, leave nothing behind, and report."""
    control = socket.socket(fileno=control_number)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    try:
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_before_the_command
        )
    except OSError as error:
        report: dict[str, Any] = {"error": f"{error.filename}: {error.strerror}"}
    else:
        report = _Family(started.pid, wake).run(control)
        started.returncode = 0  # it was waited for here
    with suppress(OSError):  # nobody may be left to read it
        control.sendall(json.dumps(report).encode() + b"\n")


def _before_the_command() -> None:
    """In the command's process: it dies with the warden, and hears Ctrl-C even if our caller does not."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _prctl(what: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


class _Family:
    """The command's process and all below it."""

    def __init__(self, first: int, wake: int) -> None:
        self._first = first
        self._wake = wake
        self._code: int | None = None
        self._all_ended = False

    def run(self, control: socket.socket) -> dict[str, Any]:
        """Wait for the command, or for the word to end it; what is reported."""
        both: list[Any] = [control, self._wake]
        while self._code is None:
            if control in select.select(both, [], [])[0]:
                return {"code": None, "left": self._end_all()}
            self._reap()
        deadline = time.monotonic() + GRACE
        while not self._all_ended and time.monotonic() < deadline:
            if control in select.select(both, [], [], max(deadline - time.monotonic(), 0))[0]:
                break
            self._reap()
        left = [] if self._all_ended else [_name(pid) for pid in _descendants()]
        self._end_all()
        return {"code": self._code, "left": left}

    def _reap(self) -> None:
        if select.select([self._wake], [], [], 0)[0]:
            os.read(self._wake, 4096)
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._first:
                    self._code = os.waitstatus_to_exitcode(status)
        self._all_ended = True

    def _end_all(self) -> list[str]:
        """SIGKILL to all until none is left; the names of those that cannot be ended."""
        deadline = time.monotonic() + ENDING
        found = _descendants()
        if self._code is None:
            # Not waited for yet, so the group is still its own.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._first, signal.SIGKILL)
        while not self._all_ended and time.monotonic() < deadline:
            for pid in found:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            select.select([self._wake], [], [], 0.05)
            self._reap()
            found = _descendants()
        return [_name(pid) for pid in found]


def _descendants() -> list[int]:
    """The processes below this one; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    with suppress(OSError):
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                children.setdefault(_parent(entry), []).append(int(entry.name))
    found: list[int] = []
    above = [os.getpid()]
    while above:
        below = children.get(above.pop(), [])
        found += below
        above += below
    return found


def _parent(process: Path) -> int:
    with suppress(OSError):
        return int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
    return 0


def _name(pid: int) -> str:
    words = ""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()[:200].replace(b"\0", b" ").decode(errors="replace")
    return f"process {pid} ({words.strip()})" if words else f"process {pid}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
