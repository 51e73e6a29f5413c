"""A run whose commits/ is gone is not taken for another trainer's, and nothing of it is touched."""

import json
import shutil
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.errors import NothingToResume, RunExists
from rollforward.interop.resuming import is_foreign
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.interop.traces import lost_commits
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import find, list_checkpoints
from rollforward.store.pruning import prune
from rollforward.store.retention import Retention


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was killed in step 1_2, with checkpoints 0_0, 0_3 and 1_1."""
    place = Place(tmp_path_factory.mktemp("lost"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        commit_at_once(patch)
        with pytest.raises(Killed):
            place.train("whole", ToyPackage(dies_at_update=8))
    return place


@pytest.fixture
def place(trained: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(trained.root)
    shutil.rmtree(trained.root / "run", ignore_errors=True)
    shutil.copytree(trained.root / "whole", trained.root / "run")
    return trained


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def lose_the_folder(run: Path) -> None:
    shutil.rmtree(run / "commits")


def lose_the_files(run: Path) -> None:
    for path in (run / "commits").iterdir():
        path.unlink()


def keep_tensors_alone(run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("train", "optimizer", "ref"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def link_to_them(run: Path) -> None:
    """The roles' folders are links to where the data went."""
    keep_tensors_alone(run)
    for name in ("train", "optimizer", "ref"):
        (run.parent / "elsewhere").mkdir(exist_ok=True)
        shutil.rmtree(run.parent / "elsewhere" / name, ignore_errors=True)
        (run / name).rename(run.parent / "elsewhere" / name)
        (run / name).symlink_to(run.parent / "elsewhere" / name)


LOSSES = [lose_the_folder, lose_the_files, keep_tensors_alone, link_to_them]


@pytest.mark.parametrize("lose", LOSSES)
class TestLost:
    def test_a_resume_is_refused_says_what_is_missing_and_changes_nothing(
        self, place: Place, lose: object
    ) -> None:
        run = place.root / "run"
        lose(run)  # type: ignore[operator]
        path = run / "train/rank_0/policy_model_rank_0-1_1.safetensors"
        damaged = bytearray(path.read_bytes())
        damaged[-5] ^= 0x40
        path.write_bytes(damaged)
        before = content(run)
        for how in ({}, {"source": "run"}):
            with pytest.raises(NothingToResume) as caught:
                place.train("run", resume=True, **how)
            assert "manifests are gone: there is none in commits/" in caught.value.message
            assert "nothing was changed" in caught.value.message
            assert "put commits/ back" in str(caught.value.hint)
        with pytest.raises(NothingToResume, match="manifests are gone"):
            place.train("new", resume=True, source="run")
        assert not (place.root / "new").exists()
        assert content(run) == before

    def test_a_new_run_in_its_folder_is_refused(self, place: Place, lose: object) -> None:
        run = place.root / "run"
        lose(run)  # type: ignore[operator]
        before = content(run)
        with pytest.raises(RunExists, match="manifests are gone") as caught:
            place.train("run")
        assert "name another folder with --save_checkpoint_dir, or put commits/ back" in str(
            caught.value.hint
        )
        assert content(run) == before

    def test_the_doctor_finds_it_and_prune_removes_nothing(
        self, place: Place, lose: object, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = place.root / "run"
        lose(run)  # type: ignore[operator]
        before = content(run)
        capsys.readouterr()
        assert main(["doctor", "--actor-checkpoint-path", str(run / "train")]) == 1
        said = capsys.readouterr().out
        assert "PROBLEM  checkpoints: the manifests of" in said
        assert "put commits/ back" in said
        for verb in ("verify", "inspect", "prune"):
            assert main([verb, str(run)]) == 2
            assert "manifests are gone" in capsys.readouterr().err
        warnings = prune(LocalStorage(run), Retention(newest=1))
        assert any("has no valid checkpoint" in line for line in warnings)
        assert content(run) == before

    def test_putting_commits_and_tables_back_is_all_that_it_takes(self, place: Place, lose: object) -> None:
        run = place.root / "run"
        lose(run)  # type: ignore[operator]
        if any((run / name).is_symlink() for name in ("train", "ref")):
            return
        shutil.copytree(place.root / "whole/commits", run / "commits", dirs_exist_ok=True)
        for name in ("tables", "model"):
            if not (run / name).exists():
                shutil.copytree(place.root / f"whole/{name}", run / name)
        place.train("run", resume=True)
        assert find(LocalStorage(run)).manifest.position == Position(2, 0)


def test_the_figures_and_the_journal_of_a_run_without_checkpoints_are_not_overwritten(place: Place) -> None:
    run = place.root / "run"
    for name in ("commits", "train", "optimizer", "ref"):
        shutil.rmtree(run / name)
    before = content(run)
    with pytest.raises(RunExists, match=r"metrics\.jsonl has the metrics of 8 steps; journal/ has records"):
        place.train("run")
    with pytest.raises(NothingToResume, match=r"no such folder"):
        place.train("run", resume=True)
    assert content(run) == before


@pytest.mark.parametrize(
    "how", [{}, {"resume": True, "source": "run"}], ids=["a new run", "a run that moved"]
)
def test_what_was_killed_before_its_first_checkpoint_may_be_started_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, how: dict[str, object]
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    shutil.rmtree(place.root / "fresh", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr("rollforward.store.checkpoints.Attempt.publish", die)
        with pytest.raises(Killed):
            place.train("fresh", **how)
    assert (place.root / "fresh/journal/rank_0").is_dir()
    assert not (place.root / "fresh/commits").exists()
    place.train("fresh", **how)
    assert list_checkpoints(LocalStorage(place.root / "fresh"))[0].position == Position(2, 0)


def test_what_we_export_for_mindrlhf_is_not_ours(tmp_path: Path) -> None:
    from test_cli_export import QWEN2, state

    from rollforward.store import CheckpointStore

    files = {"config.json": json.dumps(QWEN2).encode()}
    CheckpointStore(tmp_path / "run").save(
        Position(0, 2), state(2), global_step=2, run_id="r", incarnation=1, state={}, attachments=files
    )
    out = tmp_path / "theirs"
    assert main(["export", str(tmp_path / "run"), "--to", str(out), "--format", "mindrlhf"]) == 0
    folders = name_checkpoint_folders(str(out / "train"), str(out / "ref"), out)
    assert lost_commits(folders) == []
    assert is_foreign(folders)
    shutil.rmtree(tmp_path / "run/commits")
    folders = name_checkpoint_folders(str(tmp_path / "run"), "", out)
    assert len(lost_commits(folders)) == 1


@pytest.mark.parametrize("copy", ["model", "model.copy"])
def test_one_damaged_byte_of_a_file_that_all_checkpoints_share_costs_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], copy: str
) -> None:
    path = place.root / "run" / copy / "tokenizer.json"
    whole = path.read_bytes()
    path.write_bytes(b" " + whole[1:])
    capsys.readouterr()
    place.train("run", resume=True)
    said = capsys.readouterr().out
    assert ("model/tokenizer.json does not have its recorded digest; its copy is whole" in said) == (
        copy == "model"
    )
    assert path.read_bytes() == whole, "the next checkpoint writes it again"
    assert find(LocalStorage(place.root / "run")).manifest.position == Position(2, 0)
