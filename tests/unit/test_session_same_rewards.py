"""A run says, once, that a verifier gives every sample the same reward."""

import sys
from pathlib import Path

import pytest
from toy_session import Place

from rollforward.verifiers import sameness

TOLD = "gave every sample of 4 steps in a row the same reward, 0"


def flat(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sameness, "STEPS", 4)
    monkeypatch.setitem(sys.modules, "flat_verifier", sys.modules[__name__])
    return Place(tmp_path)


def test_one_worker_says_it_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.train("run", reward_config__verifier_function=["flat_verifier:flat"])
    assert capsys.readouterr().out.count(TOLD) == 1
    assert (place.root / "output" / "log" / "train.log").read_text().count(TOLD) == 1


def test_of_two_workers_the_first_says_it(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.train_by_two("run", reward_config__verifier_function=["flat_verifier:flat"]) == [None, None]
    assert capsys.readouterr().out.count(TOLD) == 1


def test_rewards_that_differ_are_no_reason_to_say_anything(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("run")
    assert "gave every sample" not in capsys.readouterr().out
