"""A resumed run says what it went on from and what that cost; what it says is what happened."""

import json
import shutil
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.replay import report as recovery_report
from rollforward.replay.report import FILE, RecoveryReport
from rollforward.storage import LocalStorage
from rollforward.store.journal.history import history
from rollforward.store.journal.reading import read_journal

STEPS, CHUNKS = 10, 2


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """`whole` was never killed; `run` was, in the update of 1_2: checkpoints 0_0, 0_3 and 1_1."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("report"))
        patch.chdir(place.root)
        commit_at_once(patch)
        place.train("whole")
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=7))
    return place


@pytest.fixture
def place(killed: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """With a copy of the killed run to go on with, or to spoil."""
    monkeypatch.chdir(killed.root)
    commit_at_once(monkeypatch)
    for name in ("copy", "two", "new"):
        shutil.rmtree(killed.root / name, ignore_errors=True)
    shutil.copytree(killed.root / "run", killed.root / "copy")
    return killed


def reports(place: Place, run: str = "copy") -> list[RecoveryReport]:
    return recovery_report.read(LocalStorage(place.root / run))


def resumed(place: Place, run: str = "copy", **how: object) -> RecoveryReport:
    """Go on to the end, which is that of the run that was never killed; the newest report."""
    place.train(run, resume=True, **how)
    assert place.digests(run) == place.digests("whole")
    return reports(place, run)[-1]


def generated(place: Place, run: str = "copy", rank: int = 0) -> int:
    """Chunks that the newest start generated, as its journal has them."""
    return history(LocalStorage(place.root / run), rank)[-1].chunks


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def numbers(report: RecoveryReport) -> tuple[int, ...]:
    """Steps replayed and lost, chunks reused and generated again, updates replayed and repeated."""
    return (
        report.steps_replayed,
        report.steps_lost,
        report.chunks_reused,
        report.chunks_generated_again,
        report.updates_replayed,
        report.updates_repeated,
    )


def test_after_a_kill_everything_is_replayed_and_nothing_is_lost(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    report = resumed(place)
    assert (report.checkpoint, report.saved_by, report.rejected) == (Position(1, 1), 1, {})
    assert (report.replayed_until, report.next, report.lost) == (Position(1, 3), Position(1, 3), ())
    # The update of 1_2 had no outcome yet when the run was killed.
    assert numbers(report) == (2, 0, 4, 0, 1, 1)
    assert generated(place) == CHUNKS * 2
    assert report.over
    stages = {"prepare", "framework", "engine", "find", "load", "journal", "replay", "total"}
    assert set(report.seconds) == stages
    assert 0 < report.seconds["replay"] < report.seconds["total"]
    size = sum(
        (place.root / f"copy/{role}/rank_0/{prefix}_rank_0-{position}.safetensors").stat().st_size
        for role, prefix, position in (
            ("train", "policy_model", "1_1"),
            ("optimizer", "optimizer", "1_1"),
            ("ref", "ref", "0_0"),
        )
    )
    assert 0 < report.bytes < size, "headers are no tensors"
    lines = capsys.readouterr().out.splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith("recovery: ")]
    goes_on = lines.index("training: resumes at step 1_1 (7 of 10)")
    assert [goes_on - number for number in said[:3]] == [3, 2, 1], "one block, before training goes on"
    assert lines[said[2]] == "recovery: lost: nothing"
    assert lines[said[3]].endswith("; next is step 1_3")
    assert lines[said[3] - 1].startswith("step 1_2 ")
    assert lines[said[3] + 1].startswith("step 1_3 ")


def test_a_damaged_checkpoint_is_named_and_costs_a_longer_replay(place: Place) -> None:
    flip_a_bit(place.root / "copy/train/rank_0/policy_model_rank_0-1_1.safetensors", -1)
    report = resumed(place)
    assert report.checkpoint == Position(0, 3)
    assert list(report.rejected) == ["1_1"]
    assert "policy_model_rank_0-1_1.safetensors" in report.rejected["1_1"]
    assert (numbers(report), report.lost) == ((5, 0, 10, 0, 4, 4), ())


def test_a_damaged_journal_loses_exactly_the_steps_behind_the_damage(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(place.root / "copy/train/rank_0/policy_model_rank_0-1_1.safetensors", -1)
    segment = place.root / "copy/journal/rank_0/1-0_3.journal"
    # Within step 0_4, the second of three; the next segment, of 1_1 and 1_2, stays intact.
    flip_a_bit(segment, segment.stat().st_size // 2)
    report = resumed(place)
    # The update of 1_2 had no outcome yet, but its chunks were finished.
    assert (report.replayed_until, report.next) == (Position(0, 4), Position(1, 2))
    assert (report.steps_lost, report.chunks_generated_again) == (3, CHUNKS * 4)
    assert "1-0_3.journal: damaged at byte" in report.lost[1]
    assert generated(place) == report.chunks_generated_again + CHUNKS * 2
    assert report.chunks_generated_again + report.chunks_reused == CHUNKS * 5
    said = capsys.readouterr().out
    told = "3 finished steps from 0_4 on, 8 finished chunks in all: the journal is damaged, generated again"
    assert f"recovery: lost: {told}\n" in said


def test_damage_in_the_step_that_was_under_way_loses_no_finished_step(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = LocalStorage(place.root / "copy")
    under_way = read_journal([storage], rank=0, since=Position(1, 1)).rollouts[Position(1, 2), 0]
    flip_a_bit(place.root / "copy" / under_way.segment.name.path, under_way.offset + 100)
    report = resumed(place)
    assert (report.replayed_until, report.next) == (Position(1, 2), Position(1, 2))
    assert numbers(report) == (1, 0, 2, 0, 1, 1)
    assert "no finished step; chunks of 1_2 that were finished may be generated again" in report.lost[0]
    assert f"recovery: lost: {report.lost[0]}\n" in capsys.readouterr().out


def test_without_its_journal_a_run_loses_what_its_metrics_remember(place: Place) -> None:
    shutil.rmtree(place.root / "copy/journal")
    report = resumed(place)
    assert (report.replayed_until, report.next) == (Position(1, 1), Position(1, 2))
    assert numbers(report) == (0, 1, 0, CHUNKS, 0, 0)
    (lost,) = report.lost
    assert lost.startswith("1 finished step from 1_1 on, 2 finished chunks in all: the journal does not have")
    assert generated(place) == CHUNKS * (STEPS - 6)


def test_steps_of_another_configuration_are_given_up_and_counted(place: Place) -> None:
    place.train("copy", resume=True, rl_config__beta=0.5)
    (report,) = reports(place)
    assert (report.steps_replayed, report.steps_lost, report.next) == (0, 1, Position(1, 2))
    assert "made with another configuration" in report.lost[0]


def test_a_start_that_is_killed_while_it_replays_has_told_what_it_was_about_to_do(place: Place) -> None:
    with pytest.raises(Killed):
        place.train("copy", ToyPackage(dies_at_update=1), resume=True)
    (report,) = reports(place)
    assert (report.over, report.steps_replayed, report.updates_replayed) == (False, 2, 0)
    assert resumed(place).incarnation == 3
    first, second = reports(place)
    assert (first, second.over, second.steps_replayed) == (report, True, 2)


def test_a_run_that_goes_on_in_a_new_folder_reports_there(place: Place) -> None:
    assert resumed(place, "new", source="copy").steps_replayed == 2
    assert reports(place) == []


def test_with_nothing_to_do_there_is_a_report_too(place: Place) -> None:
    resumed(place)
    place.train("copy", resume=True)
    report = reports(place)[-1]
    assert (report.incarnation, report.over, report.next) == (3, True, Position(2, 0))
    assert numbers(report) == (0, 0, 0, 0, 0, 0)


def test_two_workers_report_together_what_either_of_them_lost(place: Place) -> None:
    died = place.train_by_two("two", ToyPackage(dies_at_update=2), ToyPackage(dies_at_update=2))
    assert [type(error) for error in died] == [Killed, Killed]
    (segment,) = (place.root / "two/journal/rank_1").glob("1-0_0.journal")
    flip_a_bit(segment, segment.stat().st_size // 2)
    alone = restored_bytes(place)
    assert place.train_by_two("two", resume=True) == [None, None]
    (report,) = reports(place, "two")
    assert report.bytes == 2 * alone, "each reads the whole model"
    assert report.next == Position(1, 0), "rank 0 finished both steps, and began none"
    assert report.steps_lost == 2 - report.steps_replayed > 0
    assert "rank 1: journal segment journal/rank_1/1-0_0.journal: damaged" in report.lost[1]
    made = generated(place, "two", 0) + generated(place, "two", 1)
    # What was finished of step 1_0 is told from the segments behind the damage.
    assert made == report.chunks_generated_again + 2 * CHUNKS


def restored_bytes(place: Place) -> int:
    place.train("copy", resume=True)
    return reports(place)[-1].bytes


def test_lines_that_are_no_reports_are_passed_over_and_old_ones_dropped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, report = LocalStorage(place.root / "copy"), resumed(place)
    good = json.dumps(report.as_json())
    other = json.dumps(report.as_json() | {"checkpoint": "nowhere"})
    (place.root / "copy" / FILE).write_text(f"torn{good}\n[]\n{other}\n{{}}\n{good}\n")
    assert recovery_report.read(storage) == [report]
    monkeypatch.setattr(recovery_report, "_KEPT", 2)
    for incarnation in (7, 8, 9):
        recovery_report.keep(
            storage, RecoveryReport.from_json(report.as_json() | {"incarnation": incarnation})
        )
    assert [each.incarnation for each in recovery_report.read(storage)] == [8, 9]


def test_a_report_that_cannot_be_kept_stops_the_run(place: Place) -> None:
    (place.root / "copy" / FILE).mkdir()
    with pytest.raises(StorageError, match=FILE):
        place.train("copy", resume=True)
