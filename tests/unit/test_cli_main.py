"""What `rollforward` makes of errors that nobody expected."""

import errno

import pytest

from rollforward.cli import inspect
from rollforward.cli.main import main


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "checkpoints_of", fail)
    return main(["inspect", "run"])


def test_trouble_of_the_system_with_a_file_says_what_to_try(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble = OSError(errno.EROFS, "Read-only file system", "/data/run/log")
    assert fail_with(trouble, monkeypatch) == 1
    told = capsys.readouterr().err
    assert told.startswith(
        "using /data/run/log: Read-only file system (EROFS)\nTry: the file system is read-only"
    )


@pytest.mark.parametrize(
    "error", [OSError("of no file"), RuntimeError("of no file"), ValueError("of no file")]
)
def test_any_other_error_is_told_by_its_class(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(error, monkeypatch) == 1
    assert capsys.readouterr().err == (
        f"{type(error).__name__}: of no file\nTry: --debug for where it happened\n"
    )
