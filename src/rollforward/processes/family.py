"""A command and everything that it starts: their output is read together, and they are ended together.

Between this process and the command stands a small one, the `warden`, so that it is certain what belongs to
the command: all that is below the warden. It ends all of it when told to, and when this process is gone.
"""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rollforward.errors import InputError, RollforwardError
from rollforward.processes import warden

ENDING_ALL = warden.ENDING + 5.0
"""Seconds within which the warden reports after it was told to end all."""

LOOK_EVERY = 1.0
"""Longest wait in one call, in seconds: a signal that arrives just before it does not interrupt it."""


@dataclass(frozen=True, kw_only=True)
class FamilyEnding:
    """How a command ended; nothing of it runs any more, but for what `left` says."""

    code: int | None
    """Its exit code, negative for a signal; None when it was killed from here."""
    left: tuple[str, ...]
    """Processes that it left behind, which were ended; after a kill, those that could not be ended."""


class Family:
    """A running command. As a context manager it ends all of it on the way out.

    Standard output and standard error are read together, in the order in which they were written.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = tuple(command)
        self._control, theirs = socket.socketpair()
        self._output, output = os.pipe()
        self.ending: FamilyEnding | None = None
        """None while it runs."""
        try:
            self._warden = subprocess.Popen(
                [sys.executable, "-I", "-S", warden.__file__, str(theirs.fileno()), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # A session of its own: the terminal's Ctrl-C reaches the command through us, once.
                start_new_session=True,
            )
        except BaseException:
            self._close()
            raise
        finally:
            os.close(output)
            theirs.close()

    def read(self, seconds: float = LOOK_EVERY) -> bytes | None:
        """Output: `b""` when there was none within `seconds`, None when all has ended and all is read.

        InputError when the command could not be started.
        """
        both: list[Any] = [self._output, self._control]
        ready = select.select(both, [], [], seconds)[0]
        if self._output in ready and (chunk := os.read(self._output, 1 << 16)):
            return chunk
        if not ready:
            return b""
        if self.ending is not None:
            return None
        self.ending = self._report()
        return b""  # what is still to be read comes with the next calls

    def kill(self) -> None:
        """SIGKILL to everything, at once; `read` goes on until it is None."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def _report(self) -> FamilyEnding:
        text = b""
        while chunk := self._control.recv(1 << 16):
            text += chunk
        self._warden.wait()
        if not text:
            raise RollforwardError(
                f"the process that watches {self._command[0]} was killed from outside",
                hint="look for what kills processes here: dmesg says whether memory ran out",
            )
        report = json.loads(text)
        if "error" in report:
            raise InputError(f"the command cannot be started: {report['error']}", hint="try it by hand")
        return FamilyEnding(code=report["code"], left=tuple(report["left"]))

    def __enter__(self) -> "Family":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The end of the control socket says it, whatever else was said before.
        self._close()
        self._warden.wait()

    def _close(self) -> None:
        self._control.close()
        os.close(self._output)
