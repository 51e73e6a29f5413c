"""Workers on this machine: started, watched, and ended together.

A single worker is a child process. Several are started through the engine's launcher
(`engines.base.Launch`), which sets the variables by which they find each other. A launcher may be slow to
notice a death (a worker killed during a collective leaves the others waiting, for 25 s with `msrun`), so
workers are watched from here: each reports in a file that it is alive and, if it can, how it ended. When one
fails, or is gone without a report, all are ended: within two seconds, by SIGKILL, which a run survives by
design. Workers may also be started as a `Standby`, which only makes everything ready until it is called.

Only these workers are ever signalled. A pid can be reused once its process has been waited for, so the
process that was started is waited for last, and a worker is identified by its pid and start time, or by the
folder for its report in its environment.

Not handled: several machines. There the user's own launcher starts `examples/grpo/main.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rollforward.engines.base import EnginePackage, Launch
from rollforward.errors import WorkerFailed
from rollforward.position import Position
from rollforward.processes import heartbeat, reports, stopping
from rollforward.processes.environment import ENGINE, LAUNCHED, kill_processes_with, wait_for_an_end
from rollforward.processes.outputs import Logs, Output, clear_logs
from rollforward.processes.reports import Report, die_with_parent
from rollforward.processes.standby import Call
from rollforward.wording import plain_lines

_LOOK_EVERY = 0.2
"""Seconds between two looks at the workers."""
_BRIEFLY = 0.02
"""Seconds between two looks at processes that were killed."""
_ENDING = 10.0
"""Seconds that the launcher has to end after the last worker did."""
_PATIENCE = stopping.GRACE + 1.0
"""Seconds that workers have to exit by themselves after SIGTERM."""
_ENDING_ALL = _PATIENCE + 1.0
"""Seconds that this process has, after a signal, to end all others and itself."""


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
    slots: frozenset[int] = frozenset()
    """The workers that failed; empty when it is not known which."""


def exit_code(ending: Ending) -> int:
    """The exit code for all; shows a worker's own error. WorkerFailed if it had no chance to report one."""
    if ending.code and ending.kind is None:
        raise WorkerFailed(ending.error, hint=ending.hint)
    if ending.code and not ending.shown:
        sys.stderr.write(plain_lines(ending.error) + "\n")
    return ending.code


@dataclass(frozen=True, kw_only=True)
class Team:
    """Workers that can be started."""

    script: Path
    """What each of them runs, with the arguments."""
    arguments: Sequence[str]
    package: EnginePackage
    engine: str
    """The name of the engine, whose package that is."""
    workers: int
    """How many."""
    log_folder: Path
    """A single worker writes to this process's output; with several, the first one's output is shown there,
    and each has a log here."""
    run_folder: Path
    """What is only of this machine: heartbeats."""
    address: str = ""
    """Of a run in object storage; "": it is in that folder."""


def launch(team: Team) -> Ending:
    """Run the workers until all are done or one fails, and none is left."""
    with starting(team) as workers:
        return workers.until_the_end()


@contextmanager
def starting(team: Team) -> Iterator["Workers"]:
    """Start the workers; whatever still runs of them afterwards is ended. So is it when this process ends."""
    with _folder_of_reports() as folder, _started(team, folder) as workers:
        yield workers


@contextmanager
def starting_standby(team: Team) -> Iterator["Standby"]:
    """The same for workers that only make everything ready until they are called."""
    with _folder_of_reports() as folder, closing(Call(folder, team.workers)) as call:
        # The logs of the workers that train are in use.
        own = replace(team, log_folder=team.log_folder / f"standby_{folder.name}")
        try:
            with _started(own, folder) as workers:
                yield Standby(workers, call, team.log_folder)
        finally:
            shutil.rmtree(own.log_folder, ignore_errors=True)


@contextmanager
def _folder_of_reports() -> Iterator[Path]:
    stopping.allow(_ENDING_ALL)
    with tempfile.TemporaryDirectory(prefix="rollforward-") as folder:
        reports.prepare(Path(folder))
        yield Path(folder)


@contextmanager
def _started(team: Team, folder: Path) -> Iterator["Workers"]:
    team.log_folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {LAUNCHED: str(folder), ENGINE: team.engine}
    output: Output
    if team.workers == 1:
        output = Output()
        started = _start([sys.executable, str(team.script), *team.arguments], environment)
    else:
        how = team.package.launch(team.workers, team.log_folder, environment)
        output = Logs(how, team.log_folder)
        started = _start_several([*how.command, str(team.script), *team.arguments], how, team.log_folder)
    workers = Workers(started, folder, team, output)
    try:
        yield workers
    except BaseException:
        workers.ask_to_end()
        raise
    finally:
        workers.end_all()


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
    clear_logs(how, log_folder)
    with (log_folder / how.own_log).open("xb") as output:
        return _start(command, how.environment, output.fileno())


class Workers:
    """Workers that were started, and the process that was: the only worker, or their launcher."""

    def __init__(self, started: "subprocess.Popen[bytes]", folder: Path, team: Team, output: Output) -> None:
        self._started = started
        self._folder = folder
        self._workers = team.workers
        self._run_folder = team.run_folder
        self._output = output
        self._reports = {0: Report(pid=started.pid)} if team.workers == 1 else {}

    def until_the_end(self, meanwhile: Callable[[], None] = lambda: None) -> Ending:
        """Watch until all workers have succeeded, or one has failed; call `meanwhile` again and again."""
        while (ending := self.look()) is None:
            meanwhile()
            self._rest()
        return ending

    def look(self) -> Ending | None:
        """How they ended, once all are gone; None while none has failed and not all are done."""
        self._read_reports()
        self._output.show()
        # The started process is checked before the workers: if it is gone and a worker has not
        # reported how it ended, that worker never will.
        gone = self._starter_code() is not None
        self._read_reports()
        ending = self._bad_ending(gone)
        if ending is not None or not self._all_have_ended():
            return ending
        deadline = time.monotonic() + _ENDING
        while self._starter_code() is None and time.monotonic() < deadline:
            self._rest()
        self._output.show()
        return Ending(code=0)

    @property
    def step(self) -> Position | None:
        """The step that the first worker is in; None before its first."""
        pulse = self._pulse(0) if 0 in self._reports else None
        return None if pulse is None or pulse.phase == heartbeat.START else _position(pulse)

    @property
    def memory(self) -> int | None:
        """Bytes of a standby, all workers together, when all are ready; None until then."""
        found = [known.ready for known in self._reports.values() if known.ready is not None]
        return sum(found) if len(found) == self._workers else None

    def move_logs_to(self, folder: Path) -> None:
        """From now on their logs are there."""
        self._output.move_to(folder)

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
            self._rest()
        self._output.show()

    def end_all(self) -> None:
        """SIGKILL to whatever still runs: workers (each leads a group), and the launcher with its own.

        When it returns they are gone, so the run's folder is free. A second call does nothing. Workers that
        the launcher has started, but that have not reported yet, are known by their environment.
        """
        self._read_reports()
        for known in self._reports.values():
            if known.lives:
                _kill_group(known.pid, signal.SIGKILL)
        if self._started.returncode is None:
            # Not waited for yet, so its process group id is still its own, whether it runs or not.
            _kill_group(self._started.pid, signal.SIGKILL)
            self._started.wait()
            while kill_processes_with(LAUNCHED, str(self._folder)):
                self._rest(_BRIEFLY)
        while self._some_live():
            self._rest(_BRIEFLY)

    def _rest(self, seconds: float = _LOOK_EVERY) -> None:
        """Until one of those that run ends, but not longer than this."""
        live = [known.pid for known in self._reports.values() if known.lives]
        wait_for_an_end([*live, *([self._started.pid] if self._starter_code() is None else [])], seconds)

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
            slots=frozenset({rank}),
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
            slots=frozenset(gone),
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


class Standby:
    """Workers that make everything ready, and then wait to be called."""

    def __init__(self, workers: Workers, call: Call, log_folder: Path) -> None:
        self.workers = workers
        self._call = call
        self._log_folder = log_folder

    def take_over(self) -> Workers:
        """Call them; from now on they are workers as any others."""
        self.workers.move_logs_to(self._log_folder)
        self._call.now()
        return self.workers


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
