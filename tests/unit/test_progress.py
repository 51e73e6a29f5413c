"""What a person sees, on a terminal and off it; and the heartbeat that machines look at."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from rollforward.position import Position
from rollforward.processes import heartbeat
from rollforward.run.progress import (
    LiveDisplay,
    ObserverList,
    Pace,
    PlainLines,
    Silent,
    open_display,
    tokens_per_second,
)
from rollforward.wording import in_bytes, in_minutes

FIGURES = {
    "reward": 0.25,
    "kl": 0.0125,
    "loss": -0.5,
    "completion_length": 7.5,
    "tokens": 300.0,
    "seconds/generate": 2.0,
    "seconds/update": 1.0,
}


def test_off_a_terminal_each_step_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainLines(steps_per_epoch=10, total_steps=20)
    display.saved(Position(1, 0))
    display.phase(Position(1, 1), "update")
    display.step(Position(1, 1), FIGURES)
    display.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1_1 (12/20)  reward 0.2500  kl 0.01250")
    assert "100 tokens/s" in line
    assert line.endswith("checkpoint 1_0")


def test_on_a_terminal_the_newest_figures_are_shown() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    display = LiveDisplay(console, steps_per_epoch=10, total_steps=20)
    display.line("[a line] with brackets")
    display.phase(Position(0, 3), "generate")
    display.saved(Position(0, 3))
    display.step(Position(0, 3), FIGURES)
    display.close()
    shown = out.getvalue()
    assert "[a line] with brackets" in shown
    assert "0_3 generate" in shown
    assert "reward 0.250" in shown
    assert "4/20" in shown
    assert "checkpoint 0_3" in shown


def test_only_the_first_rank_shows_anything() -> None:
    assert isinstance(open_display(rank=1, steps_per_epoch=1, total_steps=1), Silent)
    assert isinstance(open_display(rank=0, steps_per_epoch=1, total_steps=1), PlainLines)


def test_the_time_left_is_unknown_until_two_steps_are_done() -> None:
    pace = Pace(steps_per_epoch=10, total_steps=10)
    assert pace.left(pace.done(Position(0, 0))) == "?"
    assert pace.left(pace.done(Position(0, 1))) == "0:00"
    assert pace.left(10) == "0:00"


def test_everyone_who_watches_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    displays = [PlainLines(steps_per_epoch=10, total_steps=20) for _ in range(2)]
    ObserverList(displays).step(Position(0, 0), FIGURES)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_units() -> None:
    assert tokens_per_second(FIGURES) == 100.0
    assert tokens_per_second({"tokens": 5.0}) == 0.0
    assert (in_minutes(62.4), in_minutes(3723)) == ("1:02", "1:02:03")
    assert [in_bytes(n) for n in (12, 3_140_000, 2_000_000_000)] == ["12 B", "3.1 MB", "2.00 GB"]


def test_a_heartbeat_says_phase_position_and_who(tmp_path: Path) -> None:
    beat = heartbeat.Heartbeat(tmp_path, rank=3, incarnation=2, start=Position(0, 9))
    beat.phase(Position(0, 9), "generate")
    beat.phase(Position(0, 10), "update")
    beat.step(Position(0, 10), {})
    pulse = heartbeat.read(tmp_path, 3)
    beat.close()
    assert pulse is not None
    assert (pulse.phase, pulse.position, pulse.incarnation, pulse.pid) == ("update", "0_10", 2, os.getpid())


def test_a_heartbeat_that_is_shorter_leaves_nothing_of_the_longer_before(tmp_path: Path) -> None:
    for incarnation, phase in ((1000, "a rather long phase"), (1, "x")):
        beat = heartbeat.Heartbeat(tmp_path, rank=0, incarnation=incarnation, start=Position(0, 0))
        beat.phase(Position(0, 0), phase)
        beat.close()
    pulse = heartbeat.read(tmp_path, 0)
    assert pulse is not None
    assert pulse.phase == "x"


def test_no_heartbeat_and_a_torn_one_are_none(tmp_path: Path) -> None:
    assert heartbeat.read(tmp_path, 0) is None
    path = heartbeat.file_of(tmp_path, 0)
    path.parent.mkdir()
    path.write_text('{"phase": "gen')
    assert heartbeat.read(tmp_path, 0) is None
