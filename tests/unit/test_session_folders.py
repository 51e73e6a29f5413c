"""What is not the run's own is never written, replaced or removed."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.errors import ConfigError, NonFinite, RunExists
from rollforward.run import output_folders


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DEFAULTS = {"rl_config__save_strategy_dir": "", "rl_config__tensorboard": True}


class TestTheRunsFolder:
    @pytest.mark.parametrize("same", [True, False])
    def test_a_folder_model_of_the_users_stays_as_it_is(self, place: Place, same: bool) -> None:
        mine = place.root / "project/model"
        mine.mkdir(parents=True)
        text = (place.model / "config.json").read_text() if same else '{"the only": "copy"}'
        (mine / "config.json").write_text(text)
        before = everything_in(mine)
        place.train("project", rl_config__save_max_ckpt_num=1)
        place.train("project", resume=True, rl_config__epochs=3, rl_config__tokenizer_dir=str(place.model))
        assert everything_in(mine) == before
        assert (place.root / "project/model.1/config.json").is_file()

    def test_a_model_that_lies_in_the_runs_folder_is_not_taken_for_the_runs(self, place: Place) -> None:
        """`--actor_checkpoint_path RUN/model`: its files are the user's, and stay when checkpoints go."""
        (place.root / "run").mkdir()
        place.model.rename(place.root / "run/model")
        place.model = place.root / "run/model"
        before = everything_in(place.model)
        place.train("run", rl_config__save_max_ckpt_num=1)
        assert everything_in(place.model) == before

    @pytest.mark.parametrize("name", ["metrics.jsonl", "recoveries.jsonl"])
    def test_a_file_that_a_run_would_replace_is_refused(self, place: Place, name: str) -> None:
        (place.root / "run").mkdir()
        (place.root / "run" / name).write_text("mine")
        with pytest.raises(RunExists, match=f"holds {name} without being a run's folder"):
            place.train("run")
        assert everything_in(place.root / "run") == {name: b"mine"}

    def test_a_run_that_died_before_its_first_checkpoint_is_begun_again(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def dies(*_: object, **__: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr("rollforward.run.saving.RunCheckpoints.save_now", dies)
            with pytest.raises(Killed):
                place.train("run")
        assert (place.root / "run/metrics.jsonl").is_file()
        place.train("run")


class TestFoldersBesideIt:
    def test_two_runs_with_default_folders_leave_each_other_alone(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("one", **DEFAULTS)
        (place.root / "output/log/worker_0.log").write_text("of one")
        before = everything_in(place.root / "output"), everything_in(place.root / "one")
        capsys.readouterr()
        place.train("other", **DEFAULTS)
        said = capsys.readouterr().out
        assert "0 old files cleared from output/strategy.1," in said
        assert "logs: output/log.1" in said
        now = everything_in(place.root / "output"), everything_in(place.root / "one")
        assert {name: now[0].get(name) for name in before[0]} == before[0]
        assert now[1] == before[1]

    def test_a_resume_finds_the_folders_of_its_run(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("one", **DEFAULTS)
        with pytest.raises(Killed):
            place.train("other", ToyPackage(dies_at_update=4), **DEFAULTS)
        place.train("one", resume=True, **DEFAULTS)
        capsys.readouterr()
        place.train("other", resume=True, **DEFAULTS)
        assert "logs: output/log.1" in capsys.readouterr().out
        assert (place.root / "output/log.1/train.log").read_text().count("training: ") == 2
        assert {path.name for path in (place.root / "output").iterdir()} == {
            "log",
            "log.1",
            "strategy",
            "strategy.1",
        }

    def test_strategy_files_of_another_trainer_are_left_to_it(self, place: Place) -> None:
        theirs = place.root / "output/strategy/ckpt_strategy_rank_0.ckpt"
        theirs.parent.mkdir(parents=True)
        theirs.write_text("how its tensors lie")
        place.train("run", **DEFAULTS)
        assert theirs.read_text() == "how its tensors lie"
        assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]
        assert (place.root / "output/strategy.1/strategy_0.ckpt").is_file()

    def test_a_folder_that_is_named_is_cleared_but_not_under_a_live_run(self, place: Place) -> None:
        folder = place.root / "strategy"
        folder.mkdir()
        (folder / "strategy_7.ckpt").write_text("of a run that lives")
        code = (
            "import sys, time; from pathlib import Path; from rollforward.run.output_folders import alone\n"
            "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
        )
        holder = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match="another run that is training has its strategy files"):
                place.train("run")
            assert (folder / "strategy_7.ckpt").is_file()
        finally:
            holder.kill()
            holder.communicate()
        place.train("run")
        assert [path.name for path in folder.iterdir()] == ["strategy_0.ckpt"]

    def test_two_runs_with_one_folder_for_events_get_one_each(self, place: Place) -> None:
        named = {"rl_config__tensorboard": True, "rl_config__tensorboard_dir": str(place.root / "board")}
        place.train("one", **named)
        first = list((place.root / "board").glob("events*"))
        place.train("other", **named)
        assert all(path.is_file() for path in first)
        assert list((place.root / "board/other").glob("events*"))
        place.train("one", resume=True, rl_config__epochs=3, **named)
        assert {path.parent.name for path in (place.root / "board").rglob("events*")} == {"board", "other"}

    @pytest.mark.parametrize("text", ["", "[", '{"run": 1}', '["run"]'])
    def test_whose_folder_cannot_be_told_is_not_taken(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / output_folders.OWNER).write_text(text)
        assert output_folders.claim_logs(tmp_path / "log", tmp_path / "run") == tmp_path / "log.1"
        value = json.loads((tmp_path / "log.1" / output_folders.OWNER).read_text())
        assert value == {"run": str(tmp_path / "run")}


def test_the_page_on_the_format_lists_every_file_of_a_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_at_once(monkeypatch)
    for dies in (5, 2):
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=dies), resume=dies == 2, rl_config__tensorboard=True)
    # Another tokenizer, and with it attachments of another content; then numbers that are not finite.
    tokenizer = place.model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    changed = {"rl_config__tokenizer_dir": str(place.model), "rl_config__tensorboard": True}
    place.train("run", resume=True, **changed)
    with pytest.raises(NonFinite):
        place.train(
            "run",
            resume=True,
            rl_config__epochs=3,
            reward_config__verifier_function=[f"{__name__}:not_a_number"],
        )
    page = Path(__file__).parents[2] / "docs/reference/format.md"
    tree = page.read_text(encoding="utf-8").partition("<run>/\n")[2].partition("```")[0]
    listed = {line.split()[1].partition("/")[0] for line in tree.splitlines() if line.startswith(("├", "└"))}
    written = {path.name for path in (place.root / "run").iterdir()}
    assert {"model.1", "evidence", "configurations.jsonl", "tensorboard", "recoveries.jsonl"} <= written
    assert {name.partition(".")[0] if name.startswith("model.") else name for name in written} <= listed


def not_a_number(completions: list[str]) -> list[float]:
    return [float("nan") for _ in completions]


def test_workers_that_claim_a_folder_at_the_same_moment_get_the_same_one(tmp_path: Path) -> None:
    """A mark that is seen before its content is written would send the other rank to the next folder."""
    for number in range(50):
        folder, together = tmp_path / str(number) / "strategy", threading.Barrier(4)

        def claim(folder: Path = folder, together: threading.Barrier = together) -> Path:
            together.wait()
            return output_folders.claim_strategies(folder, tmp_path / "run")

        with ThreadPoolExecutor(4) as pool:
            found = [each.result() for each in [pool.submit(claim) for _ in range(4)]]
        assert found == [folder] * 4
        assert [path.name for path in folder.iterdir()] == [output_folders.OWNER]


def test_a_full_disk_leaves_no_mark_that_names_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "link", no_room)
        assert output_folders.claim_logs(tmp_path / "log", tmp_path / "run") == tmp_path / "log"
    assert list((tmp_path / "log").iterdir()) == []
    assert output_folders.claim_logs(tmp_path / "log", tmp_path / "run") == tmp_path / "log"
