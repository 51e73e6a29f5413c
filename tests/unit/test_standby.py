"""A spare has everything ready and takes over when its run fails, which ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toy_trainer
from toy_session import Place

from rollforward.cli.main import main
from rollforward.data import dataset
from rollforward.errors import StandbyOutdated
from rollforward.grpo.types import Prompt
from rollforward.inspection.history import timeline
from rollforward.processes.environment import is_alive
from rollforward.processes.spares import MOST_LOST
from rollforward.replay import report as recovery_report
from rollforward.run.standby import still_true
from rollforward.storage import LocalStorage

TRAINER = Path(toy_trainer.__file__)
PATIENCE = 300.0
"""Seconds after which a process hangs: a bound, however busy the machine is."""
KEPT = "rl_config:\n  save_max_ckpt_num: {}\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("whole"))
    place.train("run")
    return place


class Supervised:
    """`rollforward train --max_restarts 5 --standby` with the toy engine, and its processes."""

    def __init__(self, place: Place, *fates: str) -> None:
        self.place = place
        (place.root / "fates").write_text("\n".join(fates))
        (place.root / "config.yaml").write_text(KEPT.format(5))
        path = os.pathsep.join([str(TRAINER.parent), os.environ.get("PYTHONPATH", "")])
        variables = {toy_trainer.FATES: str(place.root / "fates"), "LOCAL_DEFAULT_PATH": str(place.root)}
        command = [sys.executable, str(TRAINER), *toy_trainer.arguments(place, "run")]
        command += ["--config", str(place.root / "config.yaml"), "--max_restarts", "5", "--standby"]
        with (place.root / "said").open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=place.root,
                env=os.environ | variables | {"PYTHONPATH": path},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def trainers(self) -> list[int]:
        """The processes of all starts and spares, in order."""
        met = self.place.root / "fates.met"
        return [int(line) for line in met.read_text().splitlines()] if met.exists() else []

    def said(self) -> str:
        return (self.place.root / "said").read_text()

    def wait_until_said(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.said().count(text) < times:
            assert time.monotonic() < deadline, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)

    def wait_for_trainers(self, count: int) -> None:
        """Until so many starts and spares have come to their model."""
        deadline = time.monotonic() + PATIENCE
        while len(self.trainers) < count:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def kill_with_a_spare_ready(self, start: int) -> None:
        """The start or spare of that number, once the spare that comes after it is ready."""
        self.wait_until_said("standby: ready", start + 1)
        os.kill(self.trainers[start], signal.SIGKILL)

    def ended(self) -> str:
        """Wait for the run's end; what was said."""
        assert self.process.wait(timeout=PATIENCE) == 0, self.said()
        self.none_is_left()
        return self.said()

    def none_is_left(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := [pid for pid in self.trainers if is_alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)

    def by_standby(self) -> list[bool]:
        """Of each start that resumed, whether it was a standby."""
        return [report.standby for report in recovery_report.read(LocalStorage(self.place.root / "run"))]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def start(place: Place) -> Iterator[Callable[..., Supervised]]:
    """A run of the place, which ends with the test, however that ends."""
    runs: list[Supervised] = []

    def started(*fates: str) -> Supervised:
        runs.append(Supervised(place, *fates))
        return runs[-1]

    yield started
    for run in runs:
        run.process.kill()
        run.process.wait()


def test_killed_twice_in_a_row_a_spare_takes_over_each_time_and_the_bits_are_the_same(
    start: Callable[..., Supervised], place: Place, whole: Place
) -> None:
    run = start("2 hangs", "4 hangs")
    run.kill_with_a_spare_ready(0)
    run.kill_with_a_spare_ready(1)
    said = run.ended()
    assert place.digests("run") == whole.digests("run")
    assert run.by_standby() == [True, True]
    assert said.count("standby: takes over\n") == 2
    assert "s after the standby was called" in said
    told = [entry.text for entry in timeline(LocalStorage(place.root / "run")) if entry.what == "resumed"]
    assert len(told) == 2
    assert all(", a standby" in text for text in told)


def test_a_run_that_fails_before_its_spare_is_ready_is_taken_over_when_it_is(
    start: Callable[..., Supervised], place: Place, whole: Place
) -> None:
    run = start("2 hangs")
    run.wait_for_trainers(2)
    os.kill(run.trainers[0], signal.SIGKILL)
    assert "standby: takes over" in run.ended()
    assert run.by_standby() == [True]
    assert place.digests("run") == whole.digests("run")


def test_spares_that_are_killed_are_replaced_a_few_times_and_the_run_goes_on(
    start: Callable[..., Supervised], place: Place, whole: Place
) -> None:
    run = start("2 hangs")
    for spare in range(1, MOST_LOST + 1):
        run.wait_for_trainers(spare + 1)
        os.kill(run.trainers[spare], signal.SIGKILL)
    run.wait_until_said("no other is started beside this start")
    assert run.said().count("standby: lost, another one is started: worker 0") == MOST_LOST - 1
    assert is_alive(run.trainers[0])
    os.kill(run.trainers[0], signal.SIGKILL)
    assert "takes over" not in run.ended().partition("restart 1 of 5")[2].partition("restart 2")[0]
    assert run.by_standby() == [False]
    assert place.digests("run") == whole.digests("run")


def test_a_spare_does_not_take_over_when_the_configuration_has_changed(
    start: Callable[..., Supervised], place: Place, whole: Place
) -> None:
    run = start("2 hangs")
    run.wait_until_said("standby: ready")
    (place.root / "config.yaml").write_text(KEPT.format(4))
    os.kill(run.trainers[0], signal.SIGKILL)
    said = run.ended()
    assert "standby: not used: the configuration changed after the standby was started" in said
    assert said.count("restart 1 of 5") == 1
    assert "restart 2 of 5" not in said
    assert run.by_standby() == [False]
    assert place.digests("run") == whole.digests("run")


def test_a_dataset_is_tokenized_again_only_when_something_changed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = dataset.RememberedDataset()
    loaded: list[str] = []
    load = dataset.load_dataset
    monkeypatch.setattr(
        dataset, "load_dataset", lambda *given, **how: loaded.append("") or load(*given, **how)
    )

    def plan() -> list[Prompt]:
        found = place.plan("run", dataset=remembered).prompts
        assert found == place.plan("run").prompts
        return list(found)

    first = plan()
    assert plan() == first
    assert len(loaded) == 1 + 2, "the twin without a memory loads each time"
    text = place.dataset.read_text()
    # The same size, and the same date: only the bytes say it.
    date = place.dataset.stat()
    place.dataset.write_text(text.replace('"answer": "0"', '"answer": "9"'))
    os.utime(place.dataset, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert plan() != first
    place.dataset.write_text(text)
    assert plan() == first
    tokenizer = place.model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    loaded.clear()
    assert plan() == first
    assert len(loaded) == 2


def test_nor_when_anything_else_that_it_read_has(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train("run", rl_config__max_steps=4)
    before = place.plan("run", resume=True)
    assert still_true(before, now := place.plan("run", resume=True)) is now
    text = place.dataset.read_text()
    place.dataset.write_text(text.replace('"answer": "0"', '"answer": "9"'))
    with pytest.raises(StandbyOutdated, match="the dataset, the model or a verifier changed"):
        still_true(before, place.plan("run", resume=True))
    place.dataset.write_text(text)
    monkeypatch.setenv("TOY_ARITHMETIC", "another")
    with pytest.raises(StandbyOutdated, match="the installed software changed"):
        still_true(before, place.plan("run", resume=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_waits_without_taking_processor_time_and_whatever_ends_the_supervisor_none_remains(
    start: Callable[..., Supervised], number: signal.Signals
) -> None:
    run = start("2 hangs")
    run.wait_until_said("standby: ready")
    deadline = time.monotonic() + 300
    while True:
        # It may still be on its way to where it waits.
        before = ticks(run.trainers[1])
        time.sleep(0.5)
        if ticks(run.trainers[1]) - before <= 1:
            break
        assert time.monotonic() < deadline, "it takes processor time"
    assert [is_alive(pid) for pid in run.trainers] == [True, True]
    run.process.send_signal(number)
    assert run.process.wait(timeout=PATIENCE) == {signal.SIGTERM: 143}.get(number, -number)
    run.none_is_left()


def ticks(pid: int) -> int:
    """Processor time that a process has taken, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_without_restarts_it_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*toy_trainer.arguments(place, "run"), "--standby"]) == 2
    assert "add --max_restarts" in capsys.readouterr().err
