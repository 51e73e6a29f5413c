"""Workers on this machine: started, watched, and ended together.

A single worker is a child process. Several are started through the engine's launcher
(`engines.base.Launch`), which sets the variables by which they find each other. A launcher may be slow to
notice a death (a worker killed during a collective leaves the others waiting, for 25 s with `msrun`), so
workers are watched from here: each reports in a file that it is alive and, if it can, how it ended. When one
fails, or is gone without a report, all are ended: within two seconds, by SIGKILL, which a run survives by
design.

Only these workers are ever signalled. A pid can be reused once its process has been waited for, so the
process that was started is waited for last, and a worker is identified by its pid and start time.

Not handled: several machines. There the user's own launcher starts `examples/grpo/main.py`.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rollforward.engines.base import EnginePackage, Launch
from rollforward.errors import WorkerFailed
from rollforward.inputs import open_input
from rollforward.position import Position
from rollforward.processes import heartbeat, reports, stopping
from rollforward.processes.environment import ENGINE, LAUNCHED
from rollforward.processes.reports import Report, die_with_parent
from rollforward.wording import plain_lines

_LOOK_EVERY = 0.2
"""Seconds between two looks at the workers."""
_ENDING = 10.0
"""Seconds that the launcher has to end after the last worker did."""
_PATIENCE = stopping.GRACE + 1.0
"""Seconds that workers have to exit by themselves after SIGTERM."""
_ENDING_ALL = _PATIENCE + 1.0
"""Seconds that this process has, after a signal, to end all others and itself."""
_SHOWN_LINES = 15
_SHOWN_BYTES = 1 << 16
_RELAYED_BYTES = 1 << 22
"""Most bytes read from a log at once."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How launched workers ended."""

    code: int
    """0 when all is done, the worker's own if it could report it, else 1."""
    error: str = ""
    """What was wrong."""
    hint: str | None = None
    kind: str | None = None
    """The class of the worker's own error; None when it had no chance to report it."""
    shown: bool = False
    """Whether the worker has already told the user."""
    position: Position | None = None
    """The step that the worker was at; None before its first step."""


def exit_code(ending: Ending) -> int:
    """The exit code for all; shows a worker's own error. WorkerFailed if it had no chance to report one."""
    if ending.code and ending.kind is None:
        raise WorkerFailed(ending.error, hint=ending.hint)
    if ending.code and not ending.shown:
        sys.stderr.write(plain_lines(ending.error) + "\n")
    return ending.code


def launch(
    script: Path,
    arguments: Sequence[str],
    *,
    package: EnginePackage,
    engine: str,
    workers: int,
    log_folder: Path,
    run_folder: Path,
) -> Ending:
    """Run a script as `workers` workers until all are done or one fails, and none is left.

    `package` is that of the engine named `engine`. A single worker writes to this process's output; with
    several, the first one's output is shown there, and each has a log in `log_folder`. Whatever ends this
    process ends the workers.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    stopping.allow(_ENDING_ALL)
    with tempfile.TemporaryDirectory(prefix="rollforward-") as folder:
        reports.prepare(Path(folder))
        environment = os.environ | {LAUNCHED: folder, ENGINE: engine}
        output: _Output
        if workers == 1:
            output, started = _Output(), _start([sys.executable, str(script), *arguments], environment)
        else:
            how = package.launch(workers, log_folder, environment)
            output = _Logs(how, log_folder)
            started = _start_several([*how.command, str(script), *arguments], how, log_folder)
        watch = _Watch(started, Path(folder), workers, run_folder, output)
        try:
            return watch.until_the_end()
        except BaseException:
            watch.ask_to_end()
            raise
        finally:
            watch.end_all()


def _start(
    command: Sequence[str], environment: Mapping[str, str], output: int | None = None
) -> "subprocess.Popen[bytes]":
    # A session of its own: the terminal's Ctrl-C reaches the worker through us, once.
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _start_several(command: Sequence[str], how: Launch, log_folder: Path) -> "subprocess.Popen[bytes]":
    # A log of an earlier run would be shown as if it belonged to this one.
    for stale in log_folder.glob(how.worker_log.format(rank="*")):
        stale.unlink()
    # Whatever has that name: opening a named pipe would wait for a reader.
    (log_folder / how.own_log).unlink(missing_ok=True)
    with (log_folder / how.own_log).open("xb") as output:
        return _start(command, how.environment, output.fileno())


class _Output:
    """Where a single worker's output goes: directly to this process's own output."""

    shown = True
    """Whether the user has already seen an error that the worker has reported."""
    starter = "the worker"
    """What was started, for messages."""

    def show(self) -> None:
        """Nothing to relay."""

    def tail(self, _rank: int | None) -> str:
        """The last lines of a worker; None: of the launcher."""
        return ""

    def where(self, _rank: int | None) -> str:
        """Where to read more, for messages."""
        return ""


class _Logs(_Output):
    """Where the output of several workers goes: to one log each; the first worker's is shown."""

    shown = False

    def __init__(self, how: Launch, folder: Path) -> None:
        self.starter = how.name
        self._how = how
        self._folder = folder
        self._shown = 0

    def show(self) -> None:
        """Relay what the first worker has written since the last call, whole lines only."""
        while text := self._unshown():
            self._shown += len(text)
            lines = text.decode(errors="replace").splitlines(keepends=True)
            noise = self._how.noise
            sys.stdout.writelines(line for line in lines if noise is None or not noise.match(line))
            sys.stdout.flush()

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


class _Watch:
    """Watches a process, the only worker or a launcher, and its workers until they end."""

    def __init__(
        self,
        started: "subprocess.Popen[bytes]",
        folder: Path,
        workers: int,
        run_folder: Path,
        output: _Output,
    ) -> None:
        self._started = started
        self._folder = folder
        self._workers = workers
        self._run_folder = run_folder
        self._output = output
        self._reports = {0: Report(pid=started.pid)} if workers == 1 else {}

    def until_the_end(self) -> Ending:
        """Watch until all workers have succeeded, or one has failed."""
        while True:
            self._read_reports()
            self._output.show()
            # The started process is checked before the workers: if it is gone and a worker has not
            # reported how it ended, that worker never will.
            gone = self._starter_code() is not None
            self._read_reports()
            ending = self._bad_ending(gone)
            if ending is not None:
                return ending
            if self._all_have_ended():
                deadline = time.monotonic() + _ENDING
                while self._starter_code() is None and time.monotonic() < deadline:
                    time.sleep(_LOOK_EVERY / 4)
                self._output.show()
                return Ending(code=0)
            time.sleep(_LOOK_EVERY)

    def _bad_ending(self, starter_gone: bool) -> Ending | None:
        """How workers failed, once all have been ended; None while none has failed."""
        failed, gone = self._failed(), self._gone()
        if failed is None and not gone and (not starter_gone or self._all_have_ended()):
            return None
        self.end_all()
        self._output.show()
        if failed is not None:
            return self._failure(failed)
        if gone:
            return self._death(gone)
        return Ending(
            code=1,
            error=f"{self._output.starter} ended before the workers did" + self._output.tail(None),
            hint="resume with --resume_training" + self._output.where(None),
        )

    def ask_to_end(self) -> None:
        """SIGTERM to the workers, and a moment for them to exit cleanly."""
        for known in self._reports.values():
            if known.code is None and known.lives:
                with suppress(ProcessLookupError):
                    os.kill(known.pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and self._some_live():
            time.sleep(_LOOK_EVERY)
        self._output.show()

    def end_all(self) -> None:
        """SIGKILL to whatever still runs: workers (each leads a group), and the launcher with its own.

        When it returns they are gone, so the run's folder is free. A second call does nothing.
        """
        self._read_reports()
        for known in self._reports.values():
            if known.lives:
                _kill_group(known.pid, signal.SIGKILL)
        if self._started.returncode is None:
            # Not waited for yet, so its process group id is still its own, whether it runs or not.
            _kill_group(self._started.pid, signal.SIGKILL)
            self._started.wait()
        while self._some_live():
            time.sleep(_LOOK_EVERY)

    def _starter_code(self) -> int | None:
        """The started process's exit code, negative for a signal; None while it runs. Does not reap it."""
        if self._started.returncode is not None:
            return self._started.returncode
        ended = os.waitid(os.P_PID, self._started.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _some_live(self) -> bool:
        return any(known.lives for known in self._reports.values())

    def _all_have_ended(self) -> bool:
        return len(self._reports) == self._workers and all(
            known.code is not None for known in self._reports.values()
        )

    def _read_reports(self) -> None:
        for rank in range(self._workers):
            found = reports.read(self._folder, rank)
            if found is not None:
                self._reports[rank] = found

    def _failed(self) -> int | None:
        """A worker that reported that it failed."""
        return next((rank for rank, known in self._reports.items() if known.code), None)

    def _gone(self) -> list[int]:
        """Workers that ended without a report. More than one if the others did not survive the first."""
        gone = [rank for rank, known in self._reports.items() if known.code is None and not known.lives]
        self._read_reports()
        return [rank for rank in gone if self._reports[rank].code is None]

    def _failure(self, rank: int) -> Ending:
        """From the worker's own report."""
        known = self._reports[rank]
        who = f"worker {rank} (process {known.pid})"
        error = known.error or f"{who} {self._how(known)}"
        if known.kind == stopping.Stopped.__name__:
            error = f"{who} received a signal that was not sent from here: {error}"
        return Ending(
            code=known.code or 1,
            error=error,
            kind=known.kind,
            shown=self._output.shown,
            position=_position(self._pulse(rank)),
        )

    def _death(self, gone: Sequence[int]) -> Ending:
        """From what can be seen from outside."""
        told = []
        for rank in gone:
            known, pulse = self._reports[rank], self._pulse(rank)
            doing = f" in phase {pulse.phase} of step {pulse.position}" if pulse else ""
            told.append(f"worker {rank} (process {known.pid}) {self._how(known)}{doing}")
        others = "; the other workers were ended" if len(gone) < self._workers else ""
        return Ending(
            code=1,
            error=", ".join(told) + others + self._output.tail(gone[-1]),
            hint="resume with --resume_training; if nobody killed it, the kernel may have, for lack of "
            "memory (dmesg)" + self._output.where(gone[-1]),
            position=_position(self._pulse(gone[0])),
        )

    def _pulse(self, rank: int) -> heartbeat.Pulse | None:
        """A worker's heartbeat; None when it has written none since it was started."""
        pulse = heartbeat.read(self._run_folder, rank)
        return pulse if pulse is not None and pulse.pid == self._reports[rank].pid else None

    def _how(self, known: Report) -> str:
        code = known.code
        if code is None and self._workers == 1:
            code = self._starter_code()
        if code is None:
            return "was killed"
        return f"ended with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"


def _position(pulse: heartbeat.Pulse | None) -> Position | None:
    return None if pulse is None else Position.parse(pulse.position)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a signal without a name
        return f"signal {number}"


def _kill_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
