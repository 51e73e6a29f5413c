"""`rollforward prune` removes what it said it would, and never what a resume needs."""

import json
import shutil
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.inspection.folder import checkpoints_of
from rollforward.store import RunLock


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was killed in its step 1_2 and has checkpoints 0_0, 0_3, 1_1; and its twin that was not."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("prune"))
        patch.chdir(place.root)
        commit_at_once(patch)
        with pytest.raises(Killed):
            place.train("killed", ToyPackage(dies_at_update=8))
        place.train("whole")
    return place


@pytest.fixture
def run(trained: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained.root)
    shutil.rmtree(trained.root / "run", ignore_errors=True)
    shutil.copytree(trained.root / "killed", trained.root / "run")
    return trained.root / "run"


def size_of(folder: Path) -> int:
    names = ("*.safetensors", "table_*.json", "*.journal", "*.tmp")
    return sum(path.stat().st_size for name in names for path in folder.rglob(name))


def test_a_dry_run_says_what_would_go_and_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["prune", str(run), "--dry_run", "--save_max_ckpt_num", "1"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["checkpoint", "0_0"],
        ["checkpoint", "0_3"],
        *(["journal", f"journal/rank_0/1-{first}.journal"] for first in ("0_0", "0_1", "0_3")),
    ]
    assert lines[0][3] == "not among the newest 1"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_pruning_gives_back_what_it_says_and_the_run_goes_on(
    trained: Place, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = size_of(run)
    assert main(["prune", str(run), "--save-max-ckpt-num=1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == before - size_of(run) > 0
    assert [str(info.position) for info in checkpoints_of(run, deep=True) if info.valid] == ["1_1"]
    package = ToyPackage()
    trained.train("run", package, resume=True)
    assert trained.digests("run") == trained.digests("whole")
    assert len(package.updates) == 4, "from 1_1 on"


def test_multiples_are_kept_as_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(run), "--save_max_ckpt_num", "1", "--every", "3"]) == 0
    assert capsys.readouterr().out == ""
    assert [str(info.position) for info in checkpoints_of(run, deep=True)] == ["0_0", "0_3", "1_1"]


def test_the_best_are_kept_as_asked_and_the_reason_names_the_figure(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = {
        str(info.position): info.manifest.metrics.get("reward")
        for info in checkpoints_of(run, deep=False)
        if info.manifest
    }
    assert rewards["0_0"] is None
    newest, other = rewards["1_1"], rewards["0_3"]
    assert newest is not None
    assert other is not None
    best = "0_3" if other > newest else "1_1"
    assert main(["prune", str(run), "--dry_run", "--save_max_ckpt_num", "1", "--best", "1"]) == 0
    reasons = {
        line[1]: line[3]
        for line in (text.split("\t") for text in capsys.readouterr().out.splitlines())
        if line[0] == "checkpoint"
    }
    assert reasons["0_0"] == "not among the newest 1, it carries no reward"
    assert ("0_3" in reasons) == (best == "1_1")
    assert main(["prune", str(run), "--save_max_ckpt_num", "1", "--best", "2"]) == 0
    assert [str(info.position) for info in checkpoints_of(run, deep=True)] == ["0_3", "1_1"]


def test_a_metric_that_no_checkpoint_carries_costs_none(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", str(run), "--save_max_ckpt_num", "1", "--best", "1", "--metric", "revard"]
    assert main(arguments) == 2
    assert main([*arguments, "--dry_run"]) == 2
    assert "they carry reward, reward/toy_session:shortness" in capsys.readouterr().err
    assert len(checkpoints_of(run, deep=True)) == 3


def test_what_an_unfinished_save_left_goes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run / "train/rank_0/policy_model_rank_0-1_3.safetensors"
    left.write_bytes(b"half")
    assert main(["prune", str(run)]) == 0
    assert capsys.readouterr().out == (
        "file\ttrain/rank_0/policy_model_rank_0-1_3.safetensors\t4\tno checkpoint names it\n"
    )
    assert not left.exists()


def test_damage_that_sizes_do_not_show_saves_the_one_before_with_deep(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "train/rank_0/policy_model_rank_0-1_1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    arguments = ["prune", str(run), "--save_max_ckpt_num", "1"]
    assert main([*arguments, "--dry_run"]) == 0
    assert "checkpoint\t0_3\t" in capsys.readouterr().out
    assert main([*arguments, "--deep"]) == 0
    assert "checkpoint\t0_0\t" in capsys.readouterr().out
    left = [(str(info.position), info.valid) for info in checkpoints_of(run, deep=True)]
    assert left == [("0_3", True), ("1_1", False)]


def test_a_run_that_trains_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock.acquire(run):
        assert main(["prune", str(run)]) == 1
    assert "is held by process" in capsys.readouterr().err
