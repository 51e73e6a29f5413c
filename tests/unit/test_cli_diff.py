"""`rollforward diff` says which tensors of two checkpoints differ, and with the exit code whether any do."""

import json
import shutil
from pathlib import Path

import pytest
from toy_session import Place

from rollforward.cli.arguments import run_at
from rollforward.cli.main import main
from rollforward.position import Position


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("diff"))
        patch.chdir(place.root)
        place.train("one")
        place.train("twin")
        place.train("other", rl_config__seed=1)
    return place


def test_two_runs_alike_do_not_differ(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(trained.root / "one"), str(trained.root / "twin")]) == 0
    assert capsys.readouterr().out == ""


def test_the_trained_tensors_of_two_positions_differ_and_the_reference_does_not(
    trained: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained.root / "one"
    assert main(["diff", f"{run}:0_3", str(run), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["a"]["position"], said["b"]["position"]) == ("0_3", "2_0")
    assert {item["role"] for item in said["differences"]} == {"policy_model", "optimizer"}
    assert all(item["what"] == "values" and item["elements"] > 0 for item in said["differences"])
    assert all(item["largest"] > 0 for item in said["differences"])


def test_each_difference_is_a_line(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(trained.root / "one"), str(trained.root / "other")]) == 1
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {len(line) for line in lines} == {6}
    assert {line[0] for line in lines} == {"policy_model", "optimizer"}


def test_a_position_that_is_not_there_is_refused(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.root / "one"
    assert main(["diff", f"{run}:0_7", str(run)]) == 2
    assert "has no checkpoint 0_7; it has 0_0, 0_3, 1_1, 1_4, 2_0" in capsys.readouterr().err


def test_the_damaged_one_of_two_runs_is_named(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.root / "one", tmp_path / "hurt")
    path = tmp_path / "hurt/train/rank_0/policy_model_rank_0-0_3.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert main(["diff", str(trained.root / "one"), f"{tmp_path}/hurt:0_3"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/hurt: train/rank_0/policy_model_rank_0-0_3.safetensors: ")
    assert "Try: rollforward verify --deep" in said


def test_a_newer_one_that_is_passed_over_is_told(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.root / "one", tmp_path / "hurt")
    (tmp_path / "hurt/commits/2_0.json").write_text("{}")
    assert main(["diff", str(tmp_path / "hurt"), f"{trained.root}/one:1_4"]) == 0
    assert f"warning: {tmp_path}/hurt: 2_0 is passed over for 1_4: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "folder", "position"),
    [
        ("run", "run", None),
        ("run:0_20", "run", Position(0, 20)),
        ("a:b", "a:b", None),
        ("a:b:1_0", "a:b", Position(1, 0)),
        (":0_1", ":0_1", None),
    ],
)
def test_a_run_and_a_position_are_told_apart(text: str, folder: str, position: Position | None) -> None:
    assert run_at(text) == (folder, position)
