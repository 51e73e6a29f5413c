"""Two real workers: started by msrun, killed, taken over, left out; they end with the bits of one worker."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from command import (
    ROOT,
    SETTINGS,
    SPREAD,
    Command,
    assert_nothing_finished_was_lost,
    begun,
    figures_of,
    torn_down,
)
from msrun import msrun

from rollforward.inspection.history import timeline
from rollforward.processes import heartbeat
from rollforward.processes.environment import is_alive
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage

pytestmark = pytest.mark.engine


def of_two_workers(folder: Path) -> Command:
    """With the step of `whole`, and a spread optimizer."""
    return Command(folder, workers=2, settings=SETTINGS | {"rl_config.num_rollouts": 1, SPREAD: "true"})


def under_msrun(folder: Path) -> Command:
    """The same, started as the examples say."""
    command = of_two_workers(folder)
    started = msrun(2, folder.with_name(f"{folder.name}_logs"))
    command.workers, command.program = 1, [*started, str(ROOT / "examples/grpo/main.py")]
    return command


@pytest.fixture(scope="module")
def whole_of_two(whole: Command, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run of two workers that was never killed, under msrun and the script of the examples.

    It gets the graphs of one worker besides, for those that take its graphs.
    """
    command = under_msrun(tmp_path_factory.mktemp("two") / "whole")
    command.finish()
    command.take_graphs(whole)
    return command


def test_two_workers_under_msrun_learn_what_one_does(whole: Command, whole_of_two: Command) -> None:
    assert figures_of(whole_of_two) == figures_of(whole)


def test_two_workers_killed_and_taken_over_by_a_standby_end_with_the_same_bits(
    whole: Command, whole_of_two: Command, tmp_path: Path
) -> None:
    """With luck the standby is ready before the kill; if not, it takes over when it is."""
    killed = of_two_workers(tmp_path / "killed")
    killed.max_restarts, killed.standby = 2, True
    killed.take_graphs(whole_of_two)
    process = killed.start()
    killed.kill_inside(process, "update", 3, rank=1)
    said = killed.ended(process)
    assert said.count("standby: takes over") == 1
    assert "s after the standby was called" in said
    assert not list((killed.folder / "log").glob("standby*/worker*"))
    assert "recovery: over" in (killed.folder / "log" / "worker_0.log").read_text()
    assert re.search(
        r"restart 1 of 2, from checkpoint 0_[024] and the journal, at once, because worker", said
    )
    assert re.search(r"worker 1 \(process \d+\) was killed in phase update of step 0_[345]", said)
    assert "restart 2 of 2" not in said
    assert figures_of(killed) == figures_of(whole)
    assert {path.name for path in (killed.folder / "strategy").iterdir()} == {
        "strategy_0.ckpt",
        "strategy_1.ckpt",
    }


@pytest.mark.slow
def test_two_workers_outlive_a_full_disk_under_their_output_and_say_so(
    whole_of_two: Command, tmp_path: Path
) -> None:
    """By name: without MindSpore the same is tried in `test_streams.py`."""
    run = of_two_workers(tmp_path / "full")
    run.settings["rl_config.max_steps"] = 1
    run.take_graphs(whole_of_two)
    code = run.start(log="/dev/full", errors="errors.txt").wait(timeout=600)
    said = (run.folder / "errors.txt").read_text()
    assert code == 0 or torn_down(said), said
    assert said.count("warning: standard output is lost (No space left on device)") == 1
    assert [line["step"] for line in run.figures()] == [0]


def test_two_one_and_two_workers_killed_in_between_are_as_one_that_was_not(
    whole: Command, whole_of_two: Command, tmp_path: Path
) -> None:
    """One kill inside generation, one inside an update; more of them by name in `test_engine_kills.py`."""
    killed = of_two_workers(tmp_path / "killed")
    killed.take_graphs(whole_of_two)
    for workers, phase, step in ((2, "generate", 1), (1, "update", 3)):
        killed.workers = workers
        process = killed.start(resume=begun(killed))
        killed.kill_inside(process, phase, step, rank=workers - 1)
        assert process.wait(timeout=600) != 0
    killed.workers = 2
    said = killed.finish(resume=True)
    assert figures_of(killed) == figures_of(whole)
    assert_nothing_finished_was_lost(killed)
    assert [report.workers for report in recovery_report.read(LocalStorage(killed.run))] == [1, 2]
    assert "updates equal to the last bit" in said


def test_a_worker_that_dies_twice_running_is_left_out(
    whole: Command, whole_of_two: Command, tmp_path: Path
) -> None:
    """Of two supervised ones, each time the second is killed; the run goes on with the first alone."""
    command = of_two_workers(tmp_path / "fewer")
    command.max_restarts, command.min_workers = 3, 1
    command.take_graphs(whole_of_two)
    process = command.start()
    killed: set[int] = set()
    while len(killed) < 2:
        pulse = command.wait_until_inside(process, "generate", 0, rank=1)
        if pulse.pid not in killed and is_alive(pulse.pid):
            os.kill(pulse.pid, signal.SIGKILL)
            killed.add(pulse.pid)
    said = command.ended(process)
    assert "on 1 worker instead of 2, since worker 1 failed twice running" in said
    assert figures_of(command) == figures_of(whole)
    told = [entry.text for entry in timeline(LocalStorage(command.run)) if entry.what == "resumed"]
    assert "by 1 worker;" in told[-1], told


@pytest.mark.slow
def test_a_worker_that_stops_answering_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """In a real collective: by our time-out under `--workers`, and by MindSpore's own under msrun."""
    stopped = of_two_workers(tmp_path / "stopped")
    stopped.max_restarts = 1
    stopped.settings["rl_config.collective_timeout"] = 12
    process = stopped.start()
    pulse = stopped.wait_until_inside(process, "generate", 3, rank=1)
    os.kill(pulse.pid, signal.SIGSTOP)
    said = stopped.ended(process)
    late = rf"worker 1 \(process {pulse.pid}\) is late, in phase \w+ of step 0_[345] since .* UTC, without"
    waits = r"a sign of life for \d+ s; worker 0 waits in phase \w+ of step 0_[345]"
    assert re.search(
        rf"because CollectiveTimeout: waited 12 s for the other workers, .*: {late} {waits}", said
    )

    outer = under_msrun(tmp_path / "outer")
    outer.take_graphs(stopped)
    process = outer.start()
    pulse = outer.wait_until_inside(process, "update", 3, rank=0)
    other = heartbeat.read(outer.run, 1)
    assert other is not None
    os.kill(pulse.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 300
    while is_alive(other.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(other.pid)
    os.kill(pulse.pid, signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    said = (tmp_path / "outer_logs" / "worker_1.log").read_text()
    assert re.search(rf"lost contact with a worker, .*: worker 0 \(process {pulse.pid}\) is late", said)
    outer.finish(resume=True)
    assert outer.newest()["digests"] == stopped.newest()["digests"]
