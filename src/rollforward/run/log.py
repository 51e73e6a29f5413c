"""What a run reports to people: on the screen, in `train.log`, and from every worker.

A *line* is about the run; it is the same on all workers, so only the first one reports it. A *warning* is
about one worker, and is reported whichever worker it is: it is printed there, for that worker's own log, and
sent along with the next value that the workers exchange to the first worker, which shows and keeps it.
It causes no exchange of its own. Both may contain text from files: control characters are escaped.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rollforward.channel import AllSum, all_sum_of
from rollforward.grpo.ports import Group
from rollforward.storage.local import open_to_append
from rollforward.wording import plain_lines


class LogFile:
    """Lines for people, each with its time (UTC); also kept in a file, once the file is known."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._file: TextIO | None = None
        self._early: list[str] = []
        """Lines from before the file was known."""
        self._lost = False

    def keep(self, path: Path) -> None:
        """Append to this file from now on, starting with the earlier lines; its folder exists."""
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
        """Close the file."""
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
        """A log that cannot be written does not stop the run."""
        self._lost = True
        self._show(f"warning: the log file is lost ({error.strerror or error}); output continues here")


class WorkerLog:
    """The log of one worker of a run."""

    def __init__(self, show: Callable[[str], None], rank: int) -> None:
        self._file = LogFile(show)
        self._rank = rank
        self._unheard: list[str] = []
        """Warnings that the first worker has not received yet."""

    def line(self, text: str) -> None:
        """Log a line about the run: the same on every worker."""
        self._file.line(text)

    def warn(self, text: str) -> None:
        """Log a warning about this worker: from any worker, it reaches the screen and the file."""
        if self._rank == 0:
            self._file.line(text)
            return
        sys.stdout.write(f"rank {self._rank}: {plain_lines(text)}\n")
        sys.stdout.flush()
        self._unheard.append(text)

    def keep(self, path: Path) -> None:
        """Append to this file from now on; first worker only."""
        self._file.keep(path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def heard_over(self, group: Group) -> Group:
        """The group, wrapped so that its exchanges carry the other workers' warnings to the first."""
        if group.world_size == 1:
            return group
        all_sum = all_sum_of(group)
        return _Carrying(group, self) if all_sum is None else _CarryingSums(group, self, all_sum)

    def take_unheard(self) -> list[str]:
        """The warnings to send with the next exchange."""
        taken, self._unheard = self._unheard, []
        return taken

    def hear(self, rank: int, texts: list[str]) -> None:
        """On the first worker: show and keep another worker's warnings."""
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
        """Each rank's value; its warnings are sent along."""
        answers = self._group.all_gather([value, self._log.take_unheard()])
        if self.rank == 0:
            for rank, (_, texts) in enumerate(answers):
                self._log.hear(rank, texts)
        return [value for value, _ in answers]

    def sharing(self) -> AbstractContextManager[None]:
        """Entered around collectives that are not ours."""
        return self._group.sharing()


class _CarryingSums(_Carrying):
    """The same for a group that can add up, which stays one that can. Sums carry nothing."""

    def __init__(self, group: Group, log: WorkerLog, all_sum: AllSum) -> None:
        super().__init__(group, log)
        self._all_sum = all_sum

    def all_sum(self, numbers: Sequence[int]) -> Sequence[int]:
        """See `channel.AllSum`."""
        return self._all_sum(numbers)
