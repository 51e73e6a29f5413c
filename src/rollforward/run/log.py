"""What a run tells people: on the screen, in `train.log`, and from every worker.

A *line* is about the run; all workers have the same to say, so the first one says it. A *warning* is about
one worker, and is heard whichever worker it is: it is printed there, for that worker's own log, and
travels to the first worker with the next value that the workers exchange, which shows it and keeps it.
Nothing is exchanged for its sake. Both may hold what files brought: control characters are escaped.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rollforward.grpo.ports import Group
from rollforward.storage.local import open_to_append
from rollforward.wording import plain_lines


class LogFile:
    """Lines for people, also kept in a file, each with its time (UTC), from when the file is known."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._file: TextIO | None = None
        self._early: list[str] = []
        """Lines from before the file was known."""
        self._lost = False

    def keep(self, path: Path) -> None:
        """Append to this file from now on, what was said before included; its folder exists."""
        try:
            self._file = open_to_append(path)
        except OSError as error:
            self._lose(error)
        for line in self._early:
            self._write(line)
        self._early.clear()

    def line(self, text: str) -> None:
        """Show a line, and keep it."""
        text = plain_lines(text)
        self._show(text)
        line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n"
        if self._file is not None:
            self._write(line)
        elif not self._lost:
            self._early.append(line)

    def close(self) -> None:
        """Give the file back."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            self.close()
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """A log that cannot be written is no reason to stop."""
        self._lost = True
        self._show(f"warning: the log file is lost ({error.strerror or error}); output continues here")


class WorkerLog:
    """What one worker of a run has to say."""

    def __init__(self, show: Callable[[str], None], rank: int) -> None:
        self._file = LogFile(show)
        self._rank = rank
        self._unheard: list[str] = []
        """What the first worker has not heard yet."""

    def line(self, text: str) -> None:
        """About the run: the same on every worker."""
        self._file.line(text)

    def warn(self, text: str) -> None:
        """About this worker: reaches the screen and the file from every one."""
        if self._rank == 0:
            self._file.line(text)
            return
        sys.stdout.write(f"rank {self._rank}: {plain_lines(text)}\n")
        sys.stdout.flush()
        self._unheard.append(text)

    def keep(self, path: Path) -> None:
        """Append to this file from now on; for the first worker."""
        self._file.keep(path)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def heard_over(self, group: Group) -> Group:
        """The group, whose exchanges from now on carry the warnings of the other workers to the first."""
        return group if group.world_size == 1 else _Carrying(group, self)

    def take_unheard(self) -> list[str]:
        """What is to travel with the next exchange."""
        taken, self._unheard = self._unheard, []
        return taken

    def hear(self, rank: int, texts: list[str]) -> None:
        """As the first worker: show and keep what another one has to say."""
        for text in texts:
            self._file.line(f"rank {rank}: {text}")


class _Carrying:
    """`Group` whose exchanges carry warnings."""

    def __init__(self, group: Group, log: WorkerLog) -> None:
        self.rank = group.rank
        self.world_size = group.world_size
        self._group = group
        self._log = log

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value; its warnings go along."""
        answers = self._group.all_gather([value, self._log.take_unheard()])
        if self.rank == 0:
            for rank, (_, texts) in enumerate(answers):
                self._log.hear(rank, texts)
        return [value for value, _ in answers]

    def sharing(self) -> AbstractContextManager[None]:
        """Around collectives that are not ours."""
        return self._group.sharing()
