"""What `rollforward` makes of errors that nobody expected."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from rollforward.cli import inspect
from rollforward.cli.main import VERBS, build_parser, main
from rollforward.config.elsewhere import KEYS, OPTIONS
from rollforward.config.keys import Config
from rollforward.config.schema import walk


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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--resume_from_checkpoint", "out/checkpoint-5"], "did you mean --resume_training?"),
        (["--resume-from-checkpoint=out"], "did you mean --resume_training?"),
        (["--output_dir", "out"], "did you mean --save_checkpoint_dir?"),
        (["--save_steps", "5"], "did you mean --set rl_config.save_ckpt_interval=...?"),
        (["--save_total_limit", "5"], "did you mean --set rl_config.save_max_ckpt_num=...?"),
        (["--model_name_or_path", "m"], "did you mean --actor_checkpoint_path?"),
        (["--resume_trainin"], "did you mean --resume_training?"),
    ],
)
def test_what_other_trainers_call_an_option_is_understood(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *given])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"unknown argument {given[0]}; {said}\n")
    assert told.count("unknown argument") == 1, "its value is not another mistake"


def test_each_spelling_leads_to_an_option_or_a_key_that_there_is() -> None:
    keys = {path for path, _, _ in walk(Config)}
    options = build_parser().parse_args(["train"]).verb_parser.format_help()
    assert set(KEYS.values()) <= keys
    for option in OPTIONS.values():
        name, _, rest = option.partition(" ")
        assert name in options
        assert name != "--set" or rest.removesuffix("=...") in keys


@pytest.mark.parametrize("verb", ["inspect", "history", "verify"])
def test_the_home_folder_is_meant_wherever_a_path_stands(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell expands `~` at the beginning of a word only, not in `--out=~/new`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main([verb, "~/run_7"]) == 2
    assert str(tmp_path / "home/run_7") in capsys.readouterr().err
    options = build_parser().parse_args(["rebuild", "~/run", "--to", "0_1", "--out=~/new"])
    assert options.out == str(tmp_path / "home/new")
    options = build_parser().parse_args(["train", "--save_checkpoint_dir=~/run_7", "--config=~/c.yaml"])
    assert vars(options)["actor_config.save"] == str(tmp_path / "home/run_7")
    assert options.config == str(tmp_path / "home/c.yaml")


def test_a_home_that_there_is_not_is_an_error_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--save_checkpoint_dir=~nobody_of_this_name/run"])
    assert ended.value.code == 2
    assert "no such home folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_start_imports_neither_other_verbs_nor_what_only_some_runs_need() -> None:
    program = (
        "import sys; from rollforward.cli.main import parse; parse(['train', '--resume_training']); "
        "import rollforward.run.starting; print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "rollforward.run.session" in loaded
    assert {f"rollforward.cli.{verb}" for verb in VERBS} & loaded == {"rollforward.cli.train"}
    assert not loaded & {"tensorboardX", "rollforward.proving.prove", "rollforward.inspection.doctor"}
