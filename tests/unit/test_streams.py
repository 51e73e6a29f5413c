"""Nothing that happens to log or screen ends a run, and exit code 0 means that a verb did its work."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from toy_session import Place

from rollforward.cli import computing
from rollforward.run.log import LogFile
from rollforward.storage import LocalStorage
from rollforward.store import list_checkpoints

STEPS = 10


def command(place: Place, run: str, *more: str) -> list[str]:
    given = [f"--set={key}={value}" for key, value in place.overrides(run, context__engine="toy")]
    return [sys.executable, str(computing.WORKER), "train", *given, *more]


def start(
    place: Place, arguments: list[str], stdout: int | IO[Any] | None, **how: Any
) -> subprocess.Popen[str]:
    conformance = Path(__file__).parents[1] / "conformance"
    path = os.pathsep.join([str(conformance), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **how.pop("environment", {})}
    return subprocess.Popen(
        arguments, cwd=place.root, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, **how
    )


def close_standard_output() -> None:
    os.close(1)


def leaving(process: "subprocess.Popen[str]") -> None:
    """As `head -1`."""
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ended_well(place: Place, process: "subprocess.Popen[str]") -> str:
    """Exit code 0, every step done, and all of it in the log file; what stood on standard error."""
    assert process.stderr is not None
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(timeout=300) == 0, errors
    kept = (place.root / "output" / "log" / "train.log").read_text()
    assert "data: 20 prompts" in kept, "what was said before the file was known is in it too"
    assert "done: 10 steps" in kept
    assert len((place.root / "run" / "metrics.jsonl").read_text().splitlines()) == STEPS
    return errors


KINDS = pytest.mark.parametrize("more", [(), ("--max_restarts", "2")], ids=["bare", "supervised"])


@KINDS
def test_training_outlives_the_reader_of_its_output(place: Place, more: tuple[str, ...]) -> None:
    process = start(place, command(place, "run", *more), subprocess.PIPE)
    leaving(process)
    assert "standard output is lost (Broken pipe)" in ended_well(place, process)


@KINDS
def test_training_outlives_a_full_disk_under_its_output(place: Place, more: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(place, command(place, "run", *more), full)
        assert "standard output is lost (No space left on device)" in ended_well(place, process)


def test_training_does_not_need_a_standard_output(place: Place) -> None:
    process = start(place, command(place, "run"), None, preexec_fn=close_standard_output)
    assert ended_well(place, process) == ""


def test_training_outlives_an_encoding_that_lacks_its_words(place: Place) -> None:
    named = place.root / "训练.jsonl"
    place.dataset.rename(named)
    place.dataset = named
    process = start(
        place,
        command(place, "run"),
        subprocess.PIPE,
        environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "\\u8bad\\u7ec3.jsonl" in shown


def test_a_verb_whose_reader_has_left_still_gives_its_verdict(place: Place) -> None:
    place.train("run")
    verify = [sys.executable, str(computing.WORKER), "verify", "--deep", "run"]
    for damaged in (False, True):
        if damaged:
            newest = list_checkpoints(LocalStorage(place.root / "run"))[0]
            assert newest.manifest is not None
            path = place.root / "run" / newest.manifest.files[0].path
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        reader, writer = os.pipe()
        os.close(reader)
        process = start(place, verify, writer)
        os.close(writer)
        process.communicate(timeout=300)
        assert process.returncode == (1 if damaged else 0)


def test_a_verb_whose_words_went_nowhere_has_not_succeeded(place: Place) -> None:
    place.train("run")
    with Path("/dev/full").open("w") as full:
        process = start(place, [sys.executable, str(computing.WORKER), "inspect", "run"], full)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "standard output: No space left on device" in errors


def test_a_log_file_that_cannot_be_written_is_reported_once_and_no_reason_to_stop(tmp_path: Path) -> None:
    shown: list[str] = []
    log = LogFile(shown.append)
    log.line("before")
    log.keep(Path("/dev/full"))
    log.line("after")
    log.close()
    assert [line for line in shown if "log file is lost" in line] == [
        "warning: the log file is lost (No space left on device); output continues here"
    ]
    other = LogFile(shown.append)
    other.keep(tmp_path / "no" / "such" / "folder.log")
    other.line("still shown")
    assert shown[-1] == "still shown"


def test_a_verb_that_somebody_elses_code_ends_is_not_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rollforward.cli import inspect
    from rollforward.cli.main import main

    def leave(*_: object, **__: object) -> None:
        raise SystemExit

    monkeypatch.setattr(inspect, "checkpoints_of", leave)
    assert main(["inspect", "run"]) == 1
    assert "exit() was called within rollforward inspect" in capsys.readouterr().err
