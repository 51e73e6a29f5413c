"""What the command line makes of `rebuild` and `--resume_position`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_session import Place

from rollforward.cli import computing
from rollforward.cli.main import build_parser, main
from rollforward.position import Position
from rollforward.run.request import Request

Computed = list[tuple[Request, dict[str, Any]]]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """What would have been computed, instead of computing it: MindSpore takes seconds to load."""
    found: Computed = []

    class Noted:
        def __init__(self, given: Sequence[tuple[str, Any]]) -> None:
            self.given = dict(given)

        def compute(self, request: Request) -> int:
            found.append((request, self.given))
            return 0

    monkeypatch.setattr(computing, "start_of", lambda _options, given, _arguments: Noted(given))
    return found


def test_a_rebuild_resumes_from_the_run_at_the_position_into_a_new_folder(
    tmp_path: Path, computed: Computed
) -> None:
    run = tmp_path / "run"
    (run / "commits").mkdir(parents=True)
    out = tmp_path / "new"
    given = ["--set", "actor_config.save=elsewhere", "--verifier-function", "accuracy_reward"]
    assert main(["rebuild", str(run), "--to", "0_137", "--out", str(out), *given]) == 0
    ((asked, settings),) = computed
    assert asked == Request(
        resume=True,
        actor_checkpoint_path=str(run / "train"),
        ref_checkpoint_path=str(run / "ref"),
        position=Position(0, 137),
        rebuild=True,
    )
    assert settings["actor_config.save"] == str(out), "whatever the configuration says"
    assert settings["reward_config.verifier_function"] == ["accuracy_reward"]
    assert settings["rl_config.tensorboard"] is False, "the run's own event files are left alone"
    assert Path(settings["rl_config.save_strategy_dir"]).parent == out


def test_a_branch_names_its_position(computed: Computed) -> None:
    arguments = ["--resume_training", "--resume-position", "0_137", "--actor_checkpoint_path", "run/train"]
    assert main(["train", *arguments]) == 0
    assert computed[0][0] == Request(
        resume=True, actor_checkpoint_path="run/train", position=Position(0, 137)
    )


def test_a_rebuild_takes_what_the_run_was_trained_with() -> None:
    """Whatever option of `train` influences the numbers is one of `rebuild` too."""
    options = ["--config", "--dataset_file", "--tokenizer_dir", "--verifier_function", "--verifier_weight"]
    options += ["--set", "--workers"]
    known = build_parser().parse_args(["rebuild", "run", "--to", "0_1", "--out", "new"])
    help_text = known.verb_parser.format_help()
    assert [option for option in options if option not in help_text] == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rebuild", str(tmp_path), "--to", "0_1", "--out", str(tmp_path / "new")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_rebuild_with_the_verb_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the checkpoint, with the engine of the tests."""
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    place.train("run")
    settings = [
        f"--set={key}={value}"
        for key, value in place.overrides("run")
        if not isinstance(value, list) and key not in ("actor_config.load", "rl_config.save_strategy_dir")
    ]
    settings += ["--verifier_function", "toy_session:shortness", "--set", "context.engine=toy"]
    capsys.readouterr()
    assert main(["rebuild", "run", "--to", "0_4", "--out", "new", *settings]) == 0
    said = capsys.readouterr().out
    assert "recovery: 1 step to replay, up to 0_4" in said
    assert "done: 4 steps, the last checkpoint is 0_4 in new" in said
    assert main(["verify", "--deep", "new"]) == 0
    assert capsys.readouterr().out.startswith("checkpoint\t0_4\tvalid\njournal\t")
