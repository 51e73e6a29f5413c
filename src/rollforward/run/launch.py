"""Several workers on this machine: started through `msrun`, watched, and ended together.

`msrun` starts a scheduler and the workers and sets the variables by which they find each other.
It is slow to notice a death (a worker killed during a collective leaves the others waiting, and
the scheduler takes some 25 s to give up), so workers are watched from here: each says in a file
that it lives and, when it can, how it ended. The first that fails, or is gone without a word,
ends all: within two seconds, by SIGKILL, which a run survives by design.

Left out: several machines. There the user's own `msrun` starts `examples/grpo/main.py`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from rollforward.errors import RollforwardError, WorkerFailed
from rollforward.run import heartbeat, reports, stopping
from rollforward.run.environment import LAUNCHED
from rollforward.run.reports import Report, alive, die_with_parent

_LOOK_EVERY = 0.2
"""Seconds between two looks at the workers."""
_ENDING = 10.0
"""Seconds that `msrun` has to end after the last worker has."""
_PATIENCE = stopping.GRACE + 1.0
"""Seconds that workers have to end by themselves after SIGTERM."""
_ENDING_ALL = _PATIENCE + 1.0
"""Seconds that this process has, after a signal, to end all others and itself."""
_NO_WORKER = "-2"
"""For `msrun --tail_worker_log`: the number of no worker, since the log is shown from here."""
_SHOWN_LINES = 15
_FRAMEWORK_LINE = re.compile(r"\[(?:DEBUG|INFO|WARNING)\] [A-Z_]+\(\d+")
"""What MindSpore logs of itself; it stays in the worker's log."""


def launch(
    script: Path, arguments: Sequence[str], *, workers: int, log_folder: Path, run_folder: Path
) -> int:
    """Run a script as `workers` workers and return the exit code for all of them.

    The first rank's output is shown on standard output. Raises WorkerFailed when a worker is
    killed or ends with an error that it had no chance to show; an error of its own making
    (exit code 2, for one) is shown and its code returned.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    stopping.allow(_ENDING_ALL)
    with tempfile.TemporaryDirectory(prefix="rollforward-") as folder:
        reports.prepare(Path(folder))
        # A log of an earlier run would be shown as if it were of this one.
        for stale in log_folder.glob("worker_*.log"):
            stale.unlink()
        with (log_folder / "msrun.log").open("wb") as output:
            msrun = _start(script, arguments, workers, log_folder, Path(folder), output)
            watch = _Watch(msrun, Path(folder), workers, log_folder, run_folder)
            try:
                return watch.until_the_end()
            except RollforwardError:
                raise
            except BaseException:
                watch.ask_to_end()
                raise
            finally:
                watch.end_all()


def _start(
    script: Path,
    arguments: Sequence[str],
    workers: int,
    log_folder: Path,
    folder: Path,
    output: IO[bytes],
) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    environment[LAUNCHED] = str(folder)
    # msrun starts `python`, whichever that is: it must be this one.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    command = [sys.executable, "-m", "mindspore.parallel.cluster.run"]
    command += [f"--worker_num={workers}", f"--local_worker_num={workers}", "--join=True"]
    command += [f"--master_port={free_port()}", f"--log_dir={log_folder}"]
    command += [f"--tail_worker_log={_NO_WORKER}", str(script), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # A session of its own: the terminal's Ctrl-C reaches the workers through us, once.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


class _Watch:
    """Looks after `msrun` and its workers until they end."""

    def __init__(
        self,
        msrun: "subprocess.Popen[bytes]",
        folder: Path,
        workers: int,
        log_folder: Path,
        run_folder: Path,
    ) -> None:
        self._msrun = msrun
        self._folder = folder
        self._workers = workers
        self._log_folder = log_folder
        self._run_folder = run_folder
        self._reports: dict[int, Report] = {}
        self._shown = 0

    def until_the_end(self) -> int:
        """Look until all workers ended well, or one failed."""
        while True:
            self._read_reports()
            self._show_first_worker()
            # msrun is asked before the workers are: if it is gone and a worker has not said
            # how it ended, it is not going to.
            gone = self._msrun.poll() is not None
            self._read_reports()
            failed = self._first_failure(gone)
            if failed is not None:
                return self._fail(failed)
            if len(self._reports) == self._workers and all(
                known.code == 0 for known in self._reports.values()
            ):
                with suppress(subprocess.TimeoutExpired):
                    self._msrun.wait(_ENDING)
                self._show_first_worker()
                return 0
            time.sleep(_LOOK_EVERY)

    def end_all(self) -> None:
        """SIGKILL to whatever still runs: workers (each leads a group), scheduler and `msrun`."""
        for known in self._reports.values():
            if alive(known.pid):
                _kill_group(known.pid, signal.SIGKILL)
        _kill_group(self._msrun.pid, signal.SIGKILL)
        self._msrun.wait()

    def _read_reports(self) -> None:
        for rank in range(self._workers):
            found = reports.read(self._folder, rank)
            if found is not None:
                self._reports[rank] = found

    def _first_failure(self, msrun_gone: bool) -> int | None:
        """The rank that failed; -1 when `msrun` is gone although workers have not ended."""
        for rank, known in self._reports.items():
            if known.code:
                return rank
        for rank, known in self._reports.items():
            if known.code is None and not alive(known.pid):
                self._read_reports()
                if self._reports[rank].code is None:
                    return rank
        if msrun_gone and any(
            rank not in self._reports or self._reports[rank].code is None for rank in range(self._workers)
        ):
            return -1
        return None

    def _fail(self, rank: int) -> int:
        self.end_all()
        self._show_first_worker()
        if rank < 0:
            raise WorkerFailed(
                "msrun ended before the workers did\n" + _tail(self._log_folder / "msrun.log"),
                hint=f"see {self._log_folder / 'msrun.log'} and scheduler.log beside it",
            )
        known, log = self._reports[rank], self._log_folder / f"worker_{rank}.log"
        if known.error is not None:
            sys.stderr.write(known.error + "\n")
            return known.code or 1
        pulse = heartbeat.read(self._run_folder, rank)
        doing = (
            f" in phase {pulse.phase} of step {pulse.position}" if pulse and pulse.pid == known.pid else ""
        )
        how = "was killed" if known.code is None else f"ended with code {known.code}"
        raise WorkerFailed(
            f"worker {rank} (process {known.pid}) {how}{doing}; the other workers were ended\n{_tail(log)}",
            hint=f"resume with --resume_training; the worker's log is {log}",
        )

    def ask_to_end(self) -> None:
        """SIGTERM to the workers, and a moment for them to end in good order."""
        for known in self._reports.values():
            if known.code is None:
                with suppress(ProcessLookupError):
                    os.kill(known.pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and any(alive(known.pid) for known in self._reports.values()):
            time.sleep(_LOOK_EVERY)
        self._show_first_worker()

    def _show_first_worker(self) -> None:
        """Relay what the first rank has written since the last time, whole lines only."""
        with suppress(FileNotFoundError), (self._log_folder / "worker_0.log").open("rb") as log:
            log.seek(self._shown)
            text = log.read()
            text = text[: text.rfind(b"\n") + 1]
            self._shown += len(text)
            lines = text.decode(errors="replace").splitlines(keepends=True)
            sys.stdout.writelines(line for line in lines if not _FRAMEWORK_LINE.match(line))
            sys.stdout.flush()


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _kill_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _tail(path: Path) -> str:
    """The last lines of a log, indented; a note when there are none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    except OSError:
        lines = []
    return "\n".join(f"  | {line}" for line in lines) or f"  | (nothing in {path})"
