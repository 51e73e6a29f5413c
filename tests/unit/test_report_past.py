"""The timeline of a page: each start, what its end cost, and goodput."""

import time
from pathlib import Path
from typing import Any

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.inspection.history import read_past
from rollforward.inspection.report import past
from rollforward.inspection.report.curves import Figures, read_figures
from rollforward.position import Position
from rollforward.replay.report import RecoveryReport
from rollforward.storage import LocalStorage


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two runs that were killed in step 0_4 and in 1_3; `short` keeps two checkpoints only."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("past"))
        patch.chdir(place.root)
        commit_at_once(patch)
        for run, kept in (("run", 9), ("short", 2)):
            options = {"rl_config__save_max_ckpt_num": kept}
            with pytest.raises(Killed):
                place.train(run, ToyPackage(dies_at_update=4), **options)
            with pytest.raises(Killed):
                place.train(run, ToyPackage(dies_at_update=5), resume=True, **options)
            place.train(run, resume=True, **options)
    return place


def told(place: Place, run: str) -> dict[str, Any]:
    storage = LocalStorage(place.root / run)
    return past.as_json(read_past(storage), read_figures(storage), time.time())


@pytest.mark.parametrize("run", ["run", "short"])
def test_each_start_says_how_far_it_came_and_what_its_end_cost(place: Place, run: str) -> None:
    starts = told(place, run)["starts"]
    assert [start["number"] for start in starts] == [1, 2, 3]
    assert [start["ending"] for start in starts] == ["stopped", "stopped", "finished"]
    assert [start["from"] for start in starts] == [0, 3, 6]
    # The step of the kill; where the journal is gone, the step after those that the next start had to replay.
    assert [start["reached"] for start in starts[:2]] == [4 if run == "run" else 5, 8]
    assert [start["end_known"] for start in starts] == ([True] * 3 if run == "run" else [False, True, True])
    back = starts[1]["recovery"]
    assert (back["checkpoint"], back["steps_replayed"], back["lost"]) == ("0_3", 2, ())
    for start in starts[1:]:
        replay, fresh = start["ready"]
        assert start["began"] <= replay <= fresh <= start["ended"] + 0.01


def test_checkpoints_that_only_a_recovery_names_are_pruned(place: Place) -> None:
    points = {
        point["position"]: (point["step"], point["state"]) for point in told(place, "short")["checkpoints"]
    }
    assert points == {
        "0_3": (3, "pruned"),
        "1_1": (6, "pruned"),
        "1_4": (9, "valid"),
        "2_0": (10, "valid"),
    }


def test_goodput_is_of_a_run_that_took_as_long_as_it_did(place: Place) -> None:
    found = told(place, "run")["goodput"]
    assert found["steps"] == 10
    # Replayed by the two resumes: steps 3 and 4, and 6 to 8.
    assert found["estimated"] == 5
    assert 0 < found["useful"] < found["wall"]


def test_goodput_of_hand_made_figures() -> None:
    """Three steps of 10 s; 60 s until the next start; one replayed in a second; two more steps of 10 s."""
    figures = Figures()
    for step, (start, when) in enumerate([(1, 110), (1, 120), (2, 191), (2, 201), (2, 211)]):
        figures.epoch.append(0)
        figures.step.append(step)
        figures.global_step.append(step)
        figures.incarnation.append(start)
        figures.time.append(when)
    report = recovery(incarnation=2, checkpoint=Position(0, 2), following=Position(0, 3))
    starts = [{"began": 100.0, "ended": 130.0}, {"began": 190.0, "ended": 211.0}]
    found = past.goodput(figures, {2: report}, starts, None)
    # The first step has no line before it, the replayed one a line of its replay: both count as the median.
    assert (found.wall, found.useful, found.steps, found.estimated) == (111.0, 50.0, 5, 2)
    assert past.goodput(figures, {2: report}, starts, 300.0).wall == 200.0
    assert past.goodput(Figures(), {}, [], None) == past.Goodput(wall=0, useful=0, steps=0, estimated=0)


def test_positions_are_numbered_over_epochs_of_any_length() -> None:
    figures = Figures()
    named = [Position(0, 0), Position(0, 1), Position(0, 2), Position(1, 0), Position(1, 1)]
    for number, position in enumerate(named):
        figures.epoch.append(position.epoch)
        figures.step.append(position.step)
        figures.global_step.append(number)
        figures.time.append(number)
    nothing = read_past(LocalStorage(Path("/nowhere")))
    number = past.numbering(nothing, figures)
    assert [number(position) for position in named] == [0, 1, 2, 3, 4]
    assert number(Position(1, 5)) == 8, "beyond what is named, by the step"
    assert number(Position(2, 0)) == 5
    assert past.numbering(nothing, Figures())(Position(0, 7)) == 7


def recovery(*, incarnation: int, checkpoint: Position, following: Position) -> RecoveryReport:
    return RecoveryReport(
        incarnation=incarnation,
        time="2026-11-26T11:06:54.045054Z",
        checkpoint=checkpoint,
        saved_by=1,
        saved="",
        rejected={},
        bytes=1,
        replayed_until=following,
        next=following,
        steps_replayed=following.step - checkpoint.step,
        chunks_reused=1,
        chunks_generated_again=0,
        steps_lost=0,
        lost=(),
    )
