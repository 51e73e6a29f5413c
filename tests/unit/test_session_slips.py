"""A slip at the resume takes nothing away from the start that follows it."""

from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.inspection.rollouts import read_texts
from rollforward.position import Position
from rollforward.storage import LocalStorage


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run of checkpoints 0_0 and 0_3 that was killed in the update of step 1_0."""
    monkeypatch.chdir(tmp_path)
    commit_at_once(monkeypatch)
    place = Place(tmp_path)
    place.train("whole")
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=5))
    return place


def test_a_start_that_has_nothing_to_do(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.train("run", resume=True, rl_config__max_steps=2)
    assert "training: nothing to do" in capsys.readouterr().out
    step = read_texts(LocalStorage(place.root / "run"), Position(0, 4))
    assert step.samples, "looking at the run is not misled either"
    place.train("run", resume=True)
    told = capsys.readouterr().out
    assert "recovery: 3 steps to replay, up to 1_1" in told
    assert "recovery: lost: nothing" in told
    assert place.digests("run") == place.digests("whole")


def test_a_start_with_another_configuration_that_is_stopped_at_once(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=0), resume=True, rl_config__beta=0.5)
    capsys.readouterr()
    place.train("run", resume=True)
    told = capsys.readouterr().out
    assert "recovery: 3 steps to replay, up to 1_1" in told
    assert "recovery: lost: what start 2 did from 0_3 on: it had another configuration" in told
    assert place.digests("run") == place.digests("whole")


def test_what_a_start_that_has_nothing_to_do_cannot_use_is_not_said_to_be_generated_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("run", resume=True, rl_config__max_steps=2, rl_config__beta=0.5)
    told = capsys.readouterr().out
    assert "made with another configuration, kept, not used" in told
    assert "again with" not in told


def test_a_step_can_be_rebuilt_after_a_slip(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.train("run", resume=True, rl_config__max_steps=2)
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=0), resume=True, rl_config__beta=0.5)
    settings = [
        f"--set={key}={value}"
        for key, value in place.overrides("run", context__engine="toy")
        if not isinstance(value, list) and key not in ("actor_config.load", "rl_config.save_strategy_dir")
    ]
    given = ["rebuild", "run", "--to", "0_4", "--out", "new", *settings]
    assert main([*given, "--verifier_function", "toy_session:shortness"]) == 0, capsys.readouterr().err
    assert "recovery: 1 step to replay, up to 0_4" in capsys.readouterr().out
