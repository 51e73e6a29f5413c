"""The verbs that look at runs work on the folder of a loop of one's own."""

import json
from pathlib import Path

import numpy as np
import pytest
from loop_run import Work, run_loop, write_at_once
from simulated_disk import Killed

from rollforward.cli.main import main
from rollforward.storage import LocalStorage


class Dying(Work):
    """Work that is over when the sixth step has made its rollouts."""

    def __init__(self) -> None:
        super().__init__(kept=self.count)

    def count(self, key: object) -> None:
        if key == (0, (1, 2), "rollouts"):
            raise Killed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in step 1_2, resumed, and come to its end: checkpoints at 1_3 and 3_0 are left of all."""
    folder = tmp_path_factory.mktemp("verbs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        write_at_once(patch)
        with pytest.raises(Killed):
            run_loop(LocalStorage(folder), Dying())
        run_loop(LocalStorage(folder), Work())
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_history_tells_the_resume_and_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(said(capsys, "history", run, "--json"))
    assert [entry["what"] for entry in entries["entries"]][-1] == "finished"
    (report,) = entries["recoveries"]
    assert (report["checkpoint"], report["replayed_until"]) == ("1_0", "1_2")
    assert (report["steps_replayed"], report["updates_repeated"], report["lost"]) == (2, 2, [])
    assert report["over"]


def test_inspect_and_verify_find_every_byte_intact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split("\t") for line in said(capsys, "inspect", run).splitlines()]
    assert [(line[0], line[3]) for line in lines] == [("1_3", "valid"), ("3_0", "valid")]
    assert all(line[4] != "-" for line in lines), "the reward that the loop gave as a metric"
    deep = said(capsys, "verify", run, "--deep").splitlines()
    assert {line.split("\t")[-1] for line in deep} == {"valid"}
    assert any(line.startswith("journal") for line in deep)


def test_diff_names_the_tensors_that_training_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", f"{run}:1_3", f"{run}:3_0"]) == 1
    lines = [line.split("\t")[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["policy", "w", "values"] in lines
    assert ["optimizer_state", "count", "values"] in lines


def test_prune_keeps_what_it_is_told_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "prune", run, "--save_max_ckpt_num", 1, "--dry_run").splitlines()
    assert [line.split("\t")[:2] for line in lines if line.startswith("checkpoint")] == [
        ["checkpoint", "1_3"]
    ]


def test_rollouts_lists_what_was_made_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split("\t") for line in said(capsys, "rollouts", run, "--step", "2_1").splitlines()]
    assert ["0", "0", "rollouts", "x", "float32 [5]"] in lines
    assert ["0", "1", "rewards", "info", '{"tries": 1}'] in lines
    assert lines[-1][:2] == ["0", "outcome"]
    found = json.loads(said(capsys, "rollouts", run, "--step", "2_1", "--json"))
    assert [made["name"] for made in found["made"]] == ["rollouts", "rewards"]
    assert np.isfinite(found["outcome"]["0"]["loss"])
    assert main(["rollouts", str(run), "--step", "7_0"]) == 2
    assert "has no record of step 7_0" in capsys.readouterr().err
