"""`rollforward verify` says what is wrong with a run's folder, and with the exit code whether anything is."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli import verify
from rollforward.cli.main import main
from rollforward.inspection.verifying import Verdict
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store.guests import adopt, read_guests


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that has ended: 0_0, 0_3, 1_1, 1_4, 2_0."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("verify"))
        patch.chdir(place.root)
        place.train("run")
    return place


@pytest.fixture
def run(trained: Place) -> object:
    """Its folder, put right again afterwards."""
    folder = trained.root / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    for path, content in before.items():
        path.write_bytes(content)


def flip_the_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_intact_run_is_said_to_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--deep", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"checkpoint\t{position}\tvalid" for position in ("2_0", "1_4", "1_1", "0_3", "0_0")),
        "journal\trank_0\tvalid",
    ]


def test_a_flipped_bit_is_found_with_deep_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_the_last_bit(run / "train/rank_0/policy_model_rank_0-1_1.safetensors")
    assert main(["verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["verify", str(run), "--deep"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if not line.endswith("\tvalid")]
    assert len(bad) == 1
    assert bad[0].startswith("checkpoint\t1_1\t")
    assert "policy_model_rank_0-1_1.safetensors" in bad[0]


def test_a_missing_file_is_found_without_deep(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "optimizer/rank_0/optimizer_rank_0-0_3.safetensors").unlink()
    assert main(["verify", str(run), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["problems"] == 1
    assert [found["position"] for found in said["checkpoints"] if not found["valid"]] == ["0_3"]


def test_damage_in_the_middle_of_the_journal_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segment = run / "journal/rank_0/1-0_3.journal"
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    assert main(["verify", str(run), "--deep", "--json"]) == 1
    (journal,) = json.loads(capsys.readouterr().out)["journal"]
    assert "1-0_3.journal" in journal["problems"][0]


def test_a_torn_end_of_the_journal_is_no_damage(
    trained: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.root)
    with pytest.raises(Killed):
        trained.train("torn", ToyPackage(dies_at_update=4))
    segment = max((trained.root / "torn/journal/rank_0").glob("1-*.journal"))
    segment.write_bytes(segment.read_bytes()[:-3])
    capsys.readouterr()
    assert main(["verify", str(trained.root / "torn"), "--deep"]) == 0
    assert "journal\trank_0\tvalid, its end was cut off by a kill: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was killed in step 1_4, resumed from 0_3 with another configuration, and ended."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("twice"))
        patch.chdir(place.root)
        commit_at_once(patch)
        with pytest.raises(Killed):
            place.train("first", ToyPackage(dies_at_update=6), rl_config__save_max_ckpt_num=99)
        place.train("first", resume=True, rl_config__beta=0.3, rl_config__save_max_ckpt_num=99)
    return place


@pytest.fixture
def second(twice: Place, tmp_path: Path) -> Path:
    shutil.copytree(twice.root / "first", tmp_path / "run")
    return tmp_path / "run"


def problems_of(capsys: pytest.CaptureFixture[str], run: Path) -> list[str]:
    capsys.readouterr()
    code = main(["verify", str(run), "--deep", "--json"])
    said = json.loads(capsys.readouterr().out)
    found = [problem for journal in said["journal"] for problem in journal["problems"]]
    found += [file["reason"] for file in said["files"]]
    assert said["problems"] == len(found)
    assert code == bool(found)
    return found


def test_records_that_a_later_start_abandoned_are_read_too(
    second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems_of(capsys, second) == []
    for segment in sorted((second / "journal/rank_0").glob("*.journal")):
        before = segment.read_bytes()
        content = bytearray(before)
        content[len(content) // 2] ^= 1
        segment.write_bytes(content)
        assert any(segment.name in problem for problem in problems_of(capsys, second))
        segment.write_bytes(before)
    assert problems_of(capsys, second) == []


def test_a_newest_segment_that_is_gone_is_noticed_by_the_figures(
    second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = max((second / "journal/rank_0").glob("2-*.journal"))
    while b"rollouts" not in last.read_bytes():
        last.unlink()
        last = max((second / "journal/rank_0").glob("2-*.journal"))
    last.unlink()
    for path in (second / "commits").glob("2_0.json"):
        path.unlink()
    (problem,) = [line for line in problems_of(capsys, second) if "newest segment" in line]
    assert problem.startswith("metrics.jsonl mentions step 1_4, and the last record is of ")


@pytest.mark.parametrize("left", ["1-*.journal", "none"])
def test_a_start_whose_segments_are_all_gone_is_noticed(
    second: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    for segment in (second / "journal/rank_0").iterdir():
        if not segment.match(left):
            segment.unlink()
    (problem,) = problems_of(capsys, second)
    assert "the journal of start 2, which" in problem
    assert problem.endswith("the newest there is of start 1" if left != "none" else "there is none")
    shutil.rmtree(second / "journal")
    assert "the journal of start 2" in problems_of(capsys, second)[0]


@pytest.mark.parametrize("copy", ["model", "model.copy"])
def test_a_damaged_copy_of_a_small_file_is_told_and_costs_no_checkpoint(
    second: Path, capsys: pytest.CaptureFixture[str], copy: str
) -> None:
    flip_the_last_bit(second / copy / "tokenizer.json")
    assert problems_of(capsys, second) == [
        f"{copy}/tokenizer.json does not have its recorded digest; its other copy is whole"
    ]
    assert main(["verify", "--deep", str(second)]) == 1
    assert f"file\t{copy}/tokenizer.json\t" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_list_of_guests_is_found(
    second: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    (second / "theirs/rank_0").mkdir(parents=True)
    (second / "theirs/rank_0/theirs_rank_0-0_1.safetensors").write_bytes(b"x")
    (second / "theirs/rank_0/meta.json").write_text("{}")
    assert adopt(LocalStorage(second)) > 0
    guests = second / "guests.json"
    whole = read_guests(LocalStorage(second))
    assert problems_of(capsys, second) == []
    content = guests.read_bytes()
    changed = content.replace(b'"0_1"', b'"0_2"') if damage == "flip" else content[:-2]
    guests.write_bytes(b"" if damage == "empty" else changed)
    (problem,) = problems_of(capsys, second)
    assert "guests.json cannot be understood" in problem
    before = content_of(second)
    assert main(["prune", str(second), "--save_max_ckpt_num", "1"]) == 1
    assert content_of(second) == before
    # As earlier releases wrote it.
    listed = sorted([role, str(position)] for role, position, _ in whole)
    guests.write_text(json.dumps(listed))
    assert read_guests(LocalStorage(second)) == whole
    assert problems_of(capsys, second) == []


def content_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_the_table_shows_reasons_with_brackets_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "tensor 'a' is [2, 3] there, [bold] here"
    verdict = Verdict(Position(0, 3), 0, reason)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(verify.verifying.Checkpoints, "verdicts", lambda _self: [verdict])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["verify", str(run)]) == 1
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "said", "tried"),
    [
        ("missing", "missing: no such folder", "--save_checkpoint_dir"),
        ("", "holds no run: there is no commits/ in it", "--save_checkpoint_dir"),
        ("a_file", "a_file is a file, not a folder", "--save_checkpoint_dir"),
        ("run/train", "holds no run", "the run's folder is "),
        ("run:0_3", "no such folder", "name the run's folder alone: "),
        ("run:0_x", "no such folder", "'0_x' is not a position"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str, said: str, tried: str
) -> None:
    (tmp_path / "run/commits").mkdir(parents=True)
    (tmp_path / "run/train").mkdir()
    (tmp_path / "a_file").touch()
    assert main(["verify", str(tmp_path / named)]) == 2
    message, _, hint = capsys.readouterr().err.partition("\nTry: ")
    assert said in message
    assert tried in hint


def test_a_folder_that_may_not_be_looked_into_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert main(["verify", str(tmp_path)]) == 1
    assert f"looking at {tmp_path}: Permission denied (EACCES)\nTry: " in capsys.readouterr().err
