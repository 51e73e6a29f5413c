"""Where the output of workers goes, how it is shown, and what an error quotes from it."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from rollforward.engines.base import Launch
from rollforward.inputs import open_input

_SHOWN_LINES = 15
_SHOWN_BYTES = 1 << 16
_RELAYED_BYTES = 1 << 22
"""Most bytes read from a log at once."""


class Output:
    """Where a single worker's output goes: directly to this process's own output."""

    shown = True
    """Whether the user has already seen an error that the worker has reported."""
    starter = "the worker"
    """What was started, for messages."""

    def show(self) -> None:
        """Nothing to relay."""

    def move_to(self, folder: Path) -> None:
        """There are no files."""

    def tail(self, _rank: int | None) -> str:
        """The last lines of a worker; None: of the launcher."""
        return ""

    def where(self, _rank: int | None) -> str:
        """Where to read more, for messages."""
        return ""


class Logs(Output):
    """Where the output of several workers goes: to one log each; the first worker's is shown."""

    shown = False

    def __init__(self, how: Launch, folder: Path) -> None:
        self.starter = how.name
        self._how = how
        self._folder = folder
        self._left: Path | None = None
        self._shown = 0

    def show(self) -> None:
        """Relay what the first worker has written since the last call, whole lines only."""
        self._follow()
        while text := self._unshown():
            self._shown += len(text)
            lines = text.decode(errors="replace").splitlines(keepends=True)
            noise = self._how.noise
            sys.stdout.writelines(line for line in lines if noise is None or not noise.match(line))
            sys.stdout.flush()

    def move_to(self, folder: Path) -> None:
        """Let the logs lie in another folder, in place of those there; also those yet to be written."""
        clear_logs(self._how, folder)
        self._left, self._folder = self._folder, folder
        self._follow()

    def _follow(self) -> None:
        """Move what has appeared in the folder that was left; who has a log open goes on writing to it."""
        for path in self._left.iterdir() if self._left is not None else ():
            with suppress(OSError):
                (self._folder / path.name).unlink(missing_ok=True)
                (self._folder / path.name).hardlink_to(path)
                path.unlink()

    def _unshown(self) -> bytes:
        """Whole lines from the first worker, or a piece of a line too long to be read at once."""
        text = b""
        with suppress(OSError), open_input(self._log(0)) as log:
            log.seek(self._shown)
            text = log.read(_RELAYED_BYTES)
        return text if len(text) == _RELAYED_BYTES and b"\n" not in text else text[: text.rfind(b"\n") + 1]

    def tail(self, rank: int | None) -> str:
        """Indented; a note when there are none."""
        path = self._log(rank)
        try:
            with open_input(path) as log:
                log.seek(max(log.seek(0, os.SEEK_END) - _SHOWN_BYTES, 0))
                lines = log.read(_SHOWN_BYTES).decode(errors="replace").splitlines()[-_SHOWN_LINES:]
        except OSError:
            lines = []
        return "\n" + ("\n".join(f"  | {line}" for line in lines) or f"  | (nothing in {path})")

    def where(self, rank: int | None) -> str:
        """The log."""
        if rank is None:
            also = f" and {self._how.see_also} beside it" if self._how.see_also else ""
            return f"; see {self._log(None)}{also}"
        return f"; the worker's log is {self._log(rank)}"

    def _log(self, rank: int | None) -> Path:
        return self._how.log_of(self._folder, rank)


def clear_logs(how: Launch, folder: Path) -> None:
    """Remove the logs of an earlier start, which would be shown as if they belonged to this one."""
    for stale in folder.glob(how.worker_log.format(rank="*")):
        stale.unlink()
    # Whatever has that name: opening a named pipe would wait for a reader.
    (folder / how.own_log).unlink(missing_ok=True)
