"""A run that fails is started again by its supervisor, and ends as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import toy_trainer
from toy_session import Place

from rollforward.cli.main import main
from rollforward.engines.base import find_engine
from rollforward.errors import WorkerFailed
from rollforward.inspection.history import timeline
from rollforward.position import Position
from rollforward.processes.environment import is_alive
from rollforward.processes.launch import Ending, Team, launch
from rollforward.processes.supervision import next_start, on_workers, supervise, unsupervised
from rollforward.storage import LocalStorage
from rollforward.store import RunLock

TRAINER = Path(toy_trainer.__file__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("whole"))
    place.train("run")
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(toy_trainer.FATES, str(tmp_path / "fates"))
    (tmp_path / "fates").write_text("")
    return Place(tmp_path)


class Supervised:
    """A run with a supervisor, its waits left out."""

    def __init__(self, place: Place, *fates: str, run: str = "run") -> None:
        (place.root / "fates").write_text("\n".join(fates))
        self.place, self.run = place, place.root / run
        self.given: list[list[str]] = []
        self.waits: list[float] = []
        self.said: list[str] = []

    def start(self, arguments: Sequence[str], workers: int) -> Ending:
        self.given.append(list(arguments))
        return launch(
            Team(
                script=TRAINER,
                arguments=arguments,
                package=find_engine("fated"),
                engine="fated",
                workers=workers,
                log_folder=self.place.root / "log",
                run_folder=self.run,
            )
        )

    def __call__(self, arguments: Sequence[str], max_restarts: int = 5) -> Ending:
        return supervise(
            self.start,
            arguments,
            run=self.run,
            max_restarts=max_restarts,
            say=self.said.append,
            wait=self.waits.append,
        )


def test_killed_before_and_after_its_first_checkpoint_it_ends_with_the_same_bits(
    place: Place, whole: Place
) -> None:
    supervised = Supervised(place, "-1 killed", "2 killed", "3 broke")
    arguments = [*toy_trainer.arguments(place, "run"), "--max-restarts=3"]
    assert supervised(arguments).code == 0
    assert place.digests("run") == whole.digests("run")
    assert supervised.given[0] == supervised.given[1] == arguments[:-1]
    assert all("--resume_training" in given for given in supervised.given[2:])
    assert supervised.waits[:2] == [0.0, 0.0]
    first, second, third = supervised.said
    assert first.startswith(
        "restart 1 of 5, as at first, since there is no checkpoint yet, at once, because "
    )
    assert "was killed by SIGKILL" in first
    assert "from checkpoint 0_0 and the journal" in second
    assert "was killed by SIGKILL in phase update of step 0_2" in second
    assert "because EngineError: the device broke (at step 0_" in third
    told = [entry.what for entry in timeline(LocalStorage(place.root / "run")) if entry.what != "checkpoint"]
    assert told.count("resumed") == 2
    assert told[-1] == "finished"


def test_a_resume_into_a_new_folder_goes_on_from_there_once_it_has_a_checkpoint(
    place: Place, whole: Place
) -> None:
    place.train("old", rl_config__max_steps=4, actor_config__lr_schedule__decay_steps=10)
    # The old run's end is part of its configuration, which goes on to the new one unless it is changed.
    changes = {"actor_config__lr_schedule__decay_steps": 10, "rl_config__max_steps": 0}
    arguments = toy_trainer.arguments(place, "new", **changes)
    arguments += ["--resume_training", "--actor_checkpoint_path", str(place.root / "old" / "train")]
    arguments += ["--resume-position", "0_3"]
    supervised = Supervised(place, "-1 killed", "1 killed", run="new")
    assert supervised(arguments).code == 0
    assert supervised.given[1] == arguments
    assert "--resume-position" not in supervised.given[2]
    assert supervised.given[2][-3:] == [
        str(place.root / "new" / "train"),
        "--ref_checkpoint_path",
        str(place.root / "new" / "ref"),
    ]
    assert place.digests("new") == whole.digests("run")


class Endings:
    """Starts that end as they are told to, without a process."""

    def __init__(self, *endings: Ending) -> None:
        self.left = list(endings)
        self.said: list[str] = []
        self.workers: list[int] = []

    def __call__(self, run: Path, max_restarts: int = 5, workers: Sequence[int] = (1,)) -> Ending:
        def start(_arguments: Sequence[str], count: int) -> Ending:
            self.workers.append(count)
            return self.left.pop(0)

        return supervise(
            start,
            ["train"],
            run=run,
            max_restarts=max_restarts,
            workers=workers,
            say=self.said.append,
            wait=lambda _: None,
        )


def ended(error: str, at: str, kind: str | None = None, slots: Sequence[int] = ()) -> Ending:
    position = Position.parse(at) if at else None
    return Ending(code=1, error=error, kind=kind, position=position, slots=frozenset(slots))


def test_a_run_goes_on_with_fewer_workers_and_tries_the_usual_number_again(tmp_path: Path) -> None:
    endings = Endings(
        ended("worker 3 was killed", "0_2", slots=[3]),
        ended("worker 3 has no device", "", slots=[3]),
        ended("worker 0 was killed", "0_9", slots=[0]),
        ended("worker 1 was killed", "1_0", slots=[1]),
        Ending(code=0),
    )
    assert endings(tmp_path, workers=(4, 2)).code == 0
    assert endings.workers == [4, 4, 2, 4, 4]
    assert [re.split(", in |, at once", line)[0].partition("yet")[2] for line in endings.said] == [
        "",
        ", on 2 workers instead of 4, since worker 3 failed twice running",
        ", on 4 workers again instead of 2",
        "",
    ]


def test_the_arguments_of_a_start_with_fewer_keep_its_step() -> None:
    given = ["train", "--workers=4", "--set", "rl_config.num_rollouts=1", "--resume_training"]
    assert on_workers(given, 2, 2) == [
        *["train", "--set", "rl_config.num_rollouts=1", "--resume_training"],
        *["--workers", "2", "--set", "rl_config.num_rollouts=2"],
    ]


def test_three_failures_of_one_step_are_shown(tmp_path: Path) -> None:
    endings = Endings(
        ended("it broke", "0_2", "EngineError"), ended("it was killed", "0_2"), ended("it melted", "0_2")
    )
    with pytest.raises(WorkerFailed) as caught:
        endings(tmp_path)
    told = str(caught.value)
    assert "step 0_2 failed 3 times running" in told
    assert told.index("1. it broke") < told.index("2. it was killed") < told.index("3. it melted")


def test_an_error_that_would_come_again_is_not_tried_again(tmp_path: Path) -> None:
    diverged = ended("other bits", "0_2", "ReplayDiverged")
    endings = Endings(diverged)
    assert endings(tmp_path) == diverged
    assert endings.said == ["not restarted: a restart would not fix it"]


def test_when_all_restarts_are_used_up_the_last_error_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"\(1\) are used up\n1. it was killed again"):
        Endings(ended("it was killed", "0_1"), ended("it was killed again", "0_2"))(tmp_path, max_restarts=1)
    broke = ended("it broke", "0_2", "EngineError")
    assert Endings(ended("it was killed", "0_1"), broke)(tmp_path, max_restarts=1) == broke


def test_only_the_run_that_is_supervised_is_told_about_restarts() -> None:
    for spelling in (["--max_restarts", "3"], ["--max-restarts=3"], ["--max_restarts=3"]):
        given = ["train", *spelling, "--workers", "2", "--min-workers=1"]
        assert unsupervised(given) == ["train", "--workers", "2"]


def test_where_every_checkpoint_is_damaged_it_is_resumed_to_be_told_so(place: Place) -> None:
    place.train("run")
    for path in (place.root / "run" / "commits").iterdir():
        path.write_text("{}")
    given, source = next_start(["train"], place.root / "run")
    assert "--resume_training" in given
    assert source == "from checkpoint 2_0 and the journal"


def command(place: Place) -> "subprocess.Popen[bytes]":
    """The whole command, as a user starts it."""
    path = os.pathsep.join([str(TRAINER.parent), os.environ.get("PYTHONPATH", "")])
    with (place.root / "said").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(TRAINER), *toy_trainer.arguments(place, "run"), "--max_restarts", "3"],
            env=os.environ | {"PYTHONPATH": path, "LOCAL_DEFAULT_PATH": str(place.root)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def trainer_that_hangs(place: Place, process: "subprocess.Popen[bytes]") -> int:
    """The process of the newest start, once the run has done its first step."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if "step 0_0 (1/10)" in said(place):
            return int((place.root / "fates.met").read_text().splitlines()[-1])
        time.sleep(0.02)
    raise AssertionError(said(place))


def said(place: Place) -> str:
    return (place.root / "said").read_text()


def test_a_signal_to_the_supervisor_ends_both_in_good_order(place: Place) -> None:
    (place.root / "fates").write_text("0 killed\n2 hangs\n")
    process = command(place)
    trainer = trainer_that_hangs(place, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143, said(place)
    assert not is_alive(trainer)
    with RunLock.acquire(place.root / "run") as lock:
        assert lock.taken_over is None
    kept = (place.root / "log" / "train.log").read_text()
    assert "restart 1 of 3, from checkpoint 0_0 and the journal, at once, because worker 0" in kept


def test_a_supervisor_that_is_killed_leaves_no_trainer_behind(place: Place) -> None:
    (place.root / "fates").write_text("2 hangs\n")
    process = command(place)
    trainer = trainer_that_hangs(place, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while is_alive(trainer) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(trainer)


@pytest.mark.engine
@pytest.mark.parametrize("role", ["MS_WORKER", "MS_SCHED"])
def test_under_the_users_own_msrun_it_is_refused(
    place: Place, role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MS_ROLE", role)
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    assert (
        main([*toy_trainer.arguments(place, "run"), "--set=context.engine=mindspore", "--max_restarts", "3"])
        == 2
    )
    told = capsys.readouterr().err
    assert "--max_restarts 3 under msrun" in told
    assert "rollforward train --workers N --max_restarts N" in told
