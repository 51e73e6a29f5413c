"""Workers live and die together, and their exit code is everyone's."""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rollforward.engines.base import find_engine
from rollforward.errors import WorkerFailed
from rollforward.position import Position
from rollforward.processes import reports
from rollforward.processes.environment import LAUNCHED, is_alive, start_time
from rollforward.processes.launch import Ending, Team, exit_code, launch
from rollforward.store.lock import is_taken

SCRIPT = """\
import os, signal, sys, time
from pathlib import Path
if os.environ["MS_ROLE"] == "MS_SCHED":
    time.sleep(100)
from rollforward.processes.environment import LAUNCHED
from rollforward.processes.reports import join, report
join()
rank, folder = int(os.environ["RANK_ID"]), Path(os.environ[LAUNCHED])
print("[INFO] DISTRIBUTED(1,2): chatter", flush=True)
print(f"worker {rank} of {os.environ['MS_WORKER_NUM']} got {sys.argv[1:]}", flush=True)
written = Path(sys.argv[1], f"writing_{rank}")
written.write_text(str(os.getpid()))
written.rename(Path(sys.argv[1], f"pid_{rank}"))
while len(list(Path(sys.argv[1]).glob("pid_*"))) < 2:
    time.sleep(0.02)
if sys.argv[2] == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "refused" and rank == 1:
    report(folder, rank, code=2, error="rank 1 cannot read it", kind="DataError")
    sys.exit(2)
if sys.argv[2] == "stopped":
    from rollforward.position import Position
    from rollforward.processes.heartbeat import Heartbeat
    from rollforward.processes.stalls import CollectiveWatch
    from rollforward.processes.stopping import end_at_once
    run = Path(sys.argv[1], "run")
    heart = Heartbeat(run, rank=rank, incarnation=1, start=Position(0, 0))
    heart.phase(Position(0, 7), "generate" if rank else "update")
    watch = CollectiveWatch(1, end=end_at_once)
    watch.follow(heart, run, rank=rank, world_size=2, incarnation=1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    other = Path("/proc", Path(sys.argv[1], "pid_1").read_text(), "stat")
    while other.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.02)
    with watch.meeting():
        heard, _ = os.pipe()
        os.read(heard, 1)
time.sleep(100)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    return path


def ending_of(script: Path, fate: str) -> Ending:
    """Of two workers that `msrun` starts."""
    folder = script.parent
    return launch(team(script, [str(folder), fate], workers=2))


def team(script: Path, arguments: Sequence[str] = (), *, workers: int = 1) -> Team:
    return Team(
        script=script,
        arguments=arguments,
        package=find_engine("mindspore"),
        engine="mindspore",
        workers=workers,
        log_folder=script.parent / "log",
        run_folder=script.parent / "run",
    )


def started(script: Path, fate: str) -> int:
    return exit_code(ending_of(script, fate))


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid_*")]


def all_gone(folder: Path) -> bool:
    """Whether both workers have ended; the kernel may take a moment to tear them down."""
    deadline = time.monotonic() + 300
    while any(is_alive(pid) for pid in pids(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids(folder)) == 2 and not any(is_alive(pid) for pid in pids(folder))


@pytest.mark.engine
def test_a_killed_worker_ends_the_others_and_is_named(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        WorkerFailed, match=r"worker 1 \(process \d+\) was killed; the other workers"
    ) as caught:
        started(script, "killed")
    assert "worker 1 of 2 got" in str(caught.value)
    assert "--resume_training" in str(caught.value)
    assert all_gone(script.parent)
    assert capsys.readouterr().out.startswith("worker 0 of 2 got")


@pytest.mark.engine
def test_a_workers_own_error_is_shown_and_its_code_returned(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(script, "refused") == 2
    assert "rank 1 cannot read it" in capsys.readouterr().err
    assert all_gone(script.parent)


@pytest.mark.engine
def test_a_module_in_the_working_folder_takes_no_installed_ones_place(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = script.parent / "elsewhere"
    trap.mkdir()
    for name in ("json", "argparse", "mindspore", "inspect"):
        (trap / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')\n")
    monkeypatch.chdir(trap)
    assert started(script, "refused") == 2
    assert "rank 1 cannot read it" in capsys.readouterr().err


@pytest.mark.engine
def test_a_worker_that_does_not_come_is_named_and_ends_all(script: Path) -> None:
    ending = ending_of(script, "stopped")
    assert (ending.code, ending.kind, ending.position) == (1, "CollectiveTimeout", Position(0, 7))
    assert re.search(
        r"waited 1 s for the other workers, since .*: worker 1 \(process \d+\) is late, in phase generate "
        r"of step 0_7 since .* UTC, without a sign of life for \d+ s; "
        r"worker 0 waits in phase update of step 0_7",
        ending.error,
    )
    assert all_gone(script.parent)


def test_a_process_that_nobody_waited_for_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    assert is_alive(os.getpid())
    deadline = time.monotonic() + 300
    while is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(process.pid)
    process.wait()
    assert not is_alive(process.pid)


def test_a_process_that_ends_while_it_is_looked_at_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel says it when the process goes between opening and reading."""

    def gone(_: Path) -> bytes:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(Path, "read_bytes", gone)
    assert not is_alive(os.getpid())


FIRST_THREAD_ENDS = """\
import ctypes, os, sys, threading
from rollforward.store import RunLock
lock = RunLock.acquire(sys.argv[1])
threading.Thread(target=lambda: os._exit(len(sys.stdin.read()))).start()
print("locked", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit(2) of this thread alone
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of that system call is another one")
def test_a_process_is_alive_until_its_last_thread_has_ended_and_its_lock_is_free(tmp_path: Path) -> None:
    """As after SIGKILL, when a thread is still in fsync: what takes over must not find the run locked."""
    command = [sys.executable, "-c", FIRST_THREAD_ENDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"locked\n"
        state = Path(f"/proc/{process.pid}/stat")
        deadline = time.monotonic() + 60
        while b") Z " not in state.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert b") Z " in state.read_bytes()
        assert is_alive(process.pid)
        assert is_taken(tmp_path)
        process.stdin.close()
        while is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not is_alive(process.pid)
        assert not is_taken(tmp_path)


def test_another_process_that_got_the_number_is_not_taken_for_the_first() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), started - 1)


def test_who_was_started_keeps_its_number_until_all_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it waited for earlier, its number could be another process group's when all are ended."""
    script = tmp_path / "short.py"
    script.write_text("")
    signalled: list[bool] = []
    kill = os.killpg

    def note(group: int, number: int) -> None:
        signalled.append(Path(f"/proc/{group}").exists())
        kill(group, number)

    monkeypatch.setattr(os, "killpg", note)
    ending = launch(team(script))
    assert "ended with code 0" in ending.error
    assert ending.code == 1, "a process that has not reported its end has not come to it"
    assert signalled == [True], "the number was still its own, and was used once"


def test_what_a_worker_started_in_a_session_of_its_own_ends_with_it(tmp_path: Path) -> None:
    """As workers that a launcher has just started, which have not reported yet."""
    script = tmp_path / "starts.py"
    script.write_text(
        "import os, signal, subprocess, sys\n"
        "sleeps = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(sleeps, start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert "was killed by SIGKILL" in launch(team(script, [str(tmp_path / "pid")])).error
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_an_ending_that_the_disk_does_not_take_is_said_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCHED, str(tmp_path))
    monkeypatch.setattr(reports, "_own_rank", 0)
    (tmp_path / "rank_0.json").mkdir()
    reports.tell_ending(7, error="the reason", kind="DataError")
    assert "ended with code 7, which could not be reported: " in capsys.readouterr().err
