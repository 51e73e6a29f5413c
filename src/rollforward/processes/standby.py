"""A set of workers that has everything ready and waits for a run to fail: how it is made to wait, and called.

    launcher                             worker of a standby
    makes a pipe for each worker         loads the framework, reads the input, builds the model
    reads that all are ready        <-   reports that it is ready, and its memory (`reports`)
    ...                                  blocks in a read of its pipe: it takes no processor time
    the run failed: writes a line   ->   takes the run's folder over

The pipes lie in the folder of `reports`, and a worker that finds one there is part of a standby. The launcher
keeps both ends open, so a line is not lost when it is written before a worker reads. When memory
runs out, the kernel ends a standby before it ends what trains.

Left out: which standby is started when, which is the business of `spares`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rollforward.errors import WorkerFailed
from rollforward.processes import reports
from rollforward.processes.environment import LAUNCHED, memory_in_use

_GO = b"go\n"
_SCORE = Path("/proc/self/oom_score_adj")
_ENDED_FIRST = 500
"""What is added to the kernel's score, from 0 to 1000, by which it chooses what to end for lack of memory."""


class Call:
    """As the launcher: pipes over which the workers of a standby are called."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._pipes = []
        for rank in range(workers):
            os.mkfifo(_pipe(folder, rank))
            # A reader too, so that opening does not wait for one.
            self._pipes.append(os.open(_pipe(folder, rank), os.O_RDWR | os.O_NONBLOCK))

    def now(self) -> None:
        """Call all workers, ready or not."""
        for pipe in self._pipes:
            os.write(pipe, _GO)

    def close(self) -> None:
        """Workers that were not called must have been ended before."""
        for pipe in self._pipes:
            os.close(pipe)


def in_standby(rank: int) -> bool:
    """Whether this process is worker `rank` of a standby."""
    folder = os.environ.get(LAUNCHED)
    return bool(folder) and _pipe(Path(str(folder)), rank).exists()


@contextmanager
def ended_first() -> Iterator[None]:
    """Within it this process is what the kernel ends first when memory runs out."""
    before = 0
    with suppress(OSError, ValueError):
        before = int(_SCORE.read_text())
    _set_score(before + _ENDED_FIRST)
    try:
        yield
    finally:
        _set_score(before)


def wait_to_be_called(rank: int) -> None:
    """As worker `rank` of a standby, with everything ready: return when the folder is to be taken over.

    WorkerFailed when the launcher is gone.
    """
    folder = Path(os.environ[LAUNCHED])
    reports.report(folder, rank, ready=memory_in_use())
    pipe = os.open(_pipe(folder, rank), os.O_RDONLY)
    try:
        said = os.read(pipe, len(_GO))
    finally:
        os.close(pipe)
    if said != _GO:
        raise WorkerFailed("the process that started this standby is gone", hint="start the run again")


def _pipe(folder: Path, rank: int) -> Path:
    return folder / f"call_{rank}"


def _set_score(score: int) -> None:
    with suppress(OSError):
        _SCORE.write_text(str(min(score, 1000)))
