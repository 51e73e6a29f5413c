"""The curves of a page are the figures in metrics.jsonl: all of them, or their extremes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rollforward
from rollforward.inspection.report.curves import STRETCHES, charts, read_figures
from rollforward.replay.metrics import FILE, read
from rollforward.storage import LocalStorage


def line(step: int, **figures: float) -> dict[str, Any]:
    return {"epoch": 0, "step": step, "global_step": step, "incarnation": 1, "time": 100.0 + step, **figures}


def charts_of(folder: Path, lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Chart, or the figure where it has no chart of its own, -> JSON."""
    (folder / FILE).write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = charts(read_figures(LocalStorage(folder)))
    return {chart["chart"] or chart["figures"][0]: chart for chart in found}


def test_a_short_run_is_shown_point_by_point(tmp_path: Path) -> None:
    lines = [line(step, reward=step / 7, reward_std=0.5, zeal=1.0) for step in range(50)]
    found = charts_of(tmp_path, lines)
    assert list(found) == ["reward", "zeal"]
    assert found["reward"]["step"] == list(range(50))
    assert found["reward"]["time"] == [float(step) for step in range(50)], "from the first step on"
    assert found["reward"]["values"][0] == pytest.approx(
        [record["reward"] for record in read(tmp_path / FILE)]
    )
    assert found["reward"]["spread"] == [0.5] * 50
    assert "means" not in found["reward"]


def test_what_the_trainer_and_trl_call_differently_is_on_the_same_charts(tmp_path: Path) -> None:
    ours = {"reward": 1.0, "reward/exact": 1.0, "clip_fraction": 0.1, "completion_length": 9.0}
    trls = {
        "reward": 1.0,
        "rewards/exact/mean": 1.0,
        "rewards/exact/std": 0.1,
        "completions/mean_length": 9.0,
    }
    trls |= {"clip_ratio/region_mean": 0.1, "completions/clipped_ratio": 0.25}
    one, other = charts_of(tmp_path, [line(0, **ours)]), charts_of(tmp_path, [line(0, **trls)])
    both = ["reward", "verifiers", "clip_fraction", "completion_length"]
    assert list(one) == both
    assert list(other) == [*both, "stopped_fraction", "rewards/exact/std"]
    assert one["verifiers"]["labels"] == other["verifiers"]["labels"] == ["exact"]
    assert other["stopped_fraction"]["values"] == [[0.75]]


def test_of_two_lines_of_one_step_the_later_counts_and_steps_are_in_order(tmp_path: Path) -> None:
    lines = [line(1, reward=5.0), line(0, reward=1.0), line(1, reward=2.0, late=1.0)]
    found = charts_of(tmp_path, lines)
    assert found["reward"]["values"] == [[1.0, 2.0]]
    assert found["late"]["values"] == [[None, 1.0]], "a gap where there was no such figure yet"


def test_of_a_long_run_every_spike_stays(tmp_path: Path) -> None:
    steps = 20 * STRETCHES
    values = np.random.default_rng(1).normal(size=steps)
    spikes, gaps = range(7, steps, 1000), range(507, steps, 1000)
    values[spikes], values[gaps] = 1000.0, math.nan
    found = charts_of(tmp_path, [line(step, loss=float(value)) for step, value in enumerate(values)])["loss"]
    assert len(found["step"]) <= 3 * STRETCHES + 2
    shown = dict(zip(found["step"], found["values"][0], strict=True))
    assert [step for step, value in shown.items() if value == 1000.0] == list(spikes)
    assert [step for step, value in shown.items() if value is None] == list(gaps)
    assert found["summary"][0]["high"] == 1000.0
    assert np.nanmean(np.array(found["means"]["values"][0], dtype=float)) == pytest.approx(
        np.nanmean(values), rel=0.05
    )


def test_a_figure_too_many_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(line(0, **{f"f{n}": 1.0 for n in range(400)})) + "\n")
    figures = read_figures(LocalStorage(tmp_path))
    assert len(figures.columns) == 300
    assert len(figures.left_out) == 100


def test_a_loop_without_metrics_has_curves_of_its_outcomes(tmp_path: Path) -> None:
    tensors = {"policy": {"w": np.zeros(2, dtype=np.float32)}}
    with rollforward.open_run(tmp_path / "run", log=lambda _: None) as run:
        run.restore(tensors)
        for step in range(5):
            with run.updating(step):
                tensors["policy"]["w"] += 1
            run.outcome(step, loss=step / 2)
        run.checkpoint(5, tensors)
    (tmp_path / "run" / FILE).unlink(missing_ok=True)
    (chart,) = charts(read_figures(LocalStorage(tmp_path / "run")))
    assert (chart["chart"], chart["step"], chart["values"]) == (
        "loss",
        [0, 1, 2, 3, 4],
        [[0, 0.5, 1, 1.5, 2]],
    )
