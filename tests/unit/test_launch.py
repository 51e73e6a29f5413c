"""Workers live and die together, and their exit code is everyone's."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollforward.errors import WorkerFailed
from rollforward.position import Position
from rollforward.processes.environment import LAUNCHED, prepare, this_process, wait_for_others
from rollforward.processes.launch import exit_code, free_port, launch
from rollforward.processes.reports import alive, tell_ending

SCRIPT = """\
import os, signal, sys, time
from pathlib import Path
if os.environ["MS_ROLE"] == "MS_SCHED":
    time.sleep(100)
from rollforward.processes.environment import LAUNCHED
from rollforward.processes.reports import die_with_parent, report
die_with_parent()
rank, folder = int(os.environ["RANK_ID"]), Path(os.environ[LAUNCHED])
report(folder, rank)
print("[INFO] DISTRIBUTED(1,2): chatter", flush=True)
print(f"worker {rank} of {os.environ['MS_WORKER_NUM']} got {sys.argv[1:]}", flush=True)
Path(sys.argv[1], f"pid_{rank}").write_text(str(os.getpid()))
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


def started(script: Path, fate: str) -> int:
    folder = script.parent
    ending = launch(
        script, [str(folder), fate], workers=2, log_folder=folder / "log", run_folder=folder / "run"
    )
    return exit_code(ending)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid_*")]


def all_gone(folder: Path) -> bool:
    """Whether both workers have ended; the kernel may take a moment to tear them down."""
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids(folder)) == 2 and not any(alive(pid) for pid in pids(folder))


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


def test_a_workers_own_error_is_shown_and_its_code_returned(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(script, "refused") == 2
    assert "rank 1 cannot read it" in capsys.readouterr().err
    assert all_gone(script.parent)


def test_a_worker_that_does_not_come_is_named_and_ends_all(script: Path) -> None:
    folder = script.parent
    ending = launch(
        script, [str(folder), "stopped"], workers=2, log_folder=folder / "log", run_folder=folder / "run"
    )
    assert (ending.code, ending.kind, ending.position) == (1, "CollectiveTimeout", Position(0, 7))
    assert re.search(
        r"waited 1 s for the other workers, since .*: worker 1 \(process \d+\) is late, in phase generate "
        r"of step 0_7 since .* UTC, without a sign of life for \d+ s; "
        r"worker 0 waits in phase update of step 0_7",
        ending.error,
    )
    assert all_gone(folder)


def test_a_process_knows_what_msrun_made_it() -> None:
    assert this_process({}).role == "alone"
    assert this_process({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2"}).role == "scheduler"
    worker = this_process({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "3"})
    assert (worker.role, worker.rank, worker.world_size) == ("worker", 3, 4)


def test_mindspores_own_compile_cache_is_never_on() -> None:
    """It takes graphs for one another when they are compiled in another order."""
    environment = {"MS_COMPILER_CACHE_ENABLE": "1", "GLOG_v": "1"}
    prepare(environment)
    assert environment == {"GLOG_v": "1"}


def test_the_framework_waits_in_a_collective_for_longer_than_we_do_unless_it_is_told_otherwise() -> None:
    for seconds in (1800, 0):
        environment: dict[str, str] = {}
        wait_for_others(seconds, environment)
        assert int(environment["MS_CPU_COMM_OP_TIMEOUT"]) > 1800 + 60
    environment["MS_CPU_COMM_OP_TIMEOUT"] = "7"
    wait_for_others(1800, environment)
    assert environment["MS_CPU_COMM_OP_TIMEOUT"] == "7"


def test_a_process_that_nobody_waited_for_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    assert alive(os.getpid())
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(process.pid)
    process.wait()
    assert not alive(process.pid)


def test_a_free_port_is_one_that_msrun_takes() -> None:
    assert 1024 <= free_port() <= 65535


def test_an_ending_that_the_disk_does_not_take_is_said_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCHED, str(tmp_path))
    (tmp_path / "rank_0.json").mkdir()
    tell_ending(7, error="the reason", kind="DataError")
    assert "ended with code 7, which could not be told: " in capsys.readouterr().err
