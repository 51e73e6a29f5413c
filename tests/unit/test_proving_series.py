"""What trainers log is read step by step, whatever the form, and two runs are told where they part."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.proving.fields import Kind, kind_of
from rollforward.proving.series import (
    Series,
    compare_series,
    first_new_row,
    read_series,
    told_steps,
)


def series(*rows: dict[str, Any]) -> Series:
    return Series(rows)


def steps(*numbers: int, **fields: Any) -> Series:
    return Series(tuple({"step": number, **fields} for number in numbers))


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_lines_are_read_with_nested_fields_and_without_what_a_kill_cut_off(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl",
        '{"step": 1, "reward": {"mean": 0.5, "std": 0.1}}',
        '{"step": 2, "reward": {"me{"step": 2, "reward": {"mean": 1}}',
        '{"note": "no step"}',
        "",
        "[1]",
        '{"step": 2, "reward": {"mean": 1.0}}',
    )
    found = read_series(path)
    assert found.rows == ({"step": 1, "reward/mean": 0.5, "reward/std": 0.1}, {"step": 2, "reward/mean": 1.0})
    assert found.damaged == 1


def test_a_trainer_state_is_read(tmp_path: Path) -> None:
    state = {"global_step": 2, "log_history": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]}
    path = write(tmp_path / "trainer_state.json", json.dumps(state))
    assert [row["loss"] for row in read_series(path).rows] == [0.5, 0.25]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"log_history": 3}', '{"log_history": [1]}', "null"])
def test_a_state_that_is_none_has_no_rows(tmp_path: Path, content: str) -> None:
    assert read_series(write(tmp_path / "trainer_state.json", content)).rows == ()


def test_steps_that_each_epoch_counts_anew_are_told_apart() -> None:
    anew = series(*({"epoch": epoch, "step": step} for epoch in (0, 1) for step in (0, 1)))
    assert list(anew.by_step) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    going_on = series(*({"epoch": step // 2, "step": step} for step in range(4)))
    assert list(going_on.by_step) == [(0,), (1,), (2,), (3,)]


def test_a_resume_within_an_epoch_is_not_taken_for_a_count_that_begins_anew() -> None:
    killed = series(*({"epoch": step // 3, "step": step} for step in (0, 1, 2, 3, 4, 2, 3, 4, 5)))
    assert list(killed.by_step) == [(step,) for step in range(6)]


def test_of_a_step_done_again_the_later_rows_count() -> None:
    a = series({"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0})
    b = series({"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0})
    found = compare_series("log", a, b, {})
    assert (found.differences, found.again, found.steps) == ((), ((2,),), 2)
    assert compare_series("log", a, series(*b.rows[:2]), {}).differences[0].b == 9.0


def test_several_rows_of_a_step_are_compared_in_their_order() -> None:
    a = series({"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": 3.0})
    assert compare_series("log", a, a, {}).differences == ()
    other = series(a.rows[0], {"step": 1, "eval_loss": 4.0})
    (difference,) = compare_series("log", a, other, {}).differences
    assert (difference.name, difference.step, difference.largest) == ("eval_loss", (1,), 1.0)


def test_steps_that_one_run_did_not_log_are_named() -> None:
    found = compare_series("log", steps(1, 2, 3, 4), steps(1, 2, 4, 5), {})
    assert (found.missing, found.extra, found.again) == (((3,),), ((5,),), ())


def test_the_first_step_and_the_largest_difference_are_found() -> None:
    a = series(*({"step": step, "loss": 1.0, "lr": 0.1} for step in range(5)))
    b = series(*({"step": step, "loss": 1.0 + max(step - 2, 0), "lr": 0.1} for step in range(5)))
    (difference,) = compare_series("log", a, b, {}).differences
    assert (difference.name, difference.step, difference.a, difference.b) == ("loss", (3,), 1.0, 2.0)
    assert difference.largest == 2.0


def test_a_single_bit_is_a_difference_and_nan_is_itself() -> None:
    a = series({"step": 1, "loss": 0.1, "kl": math.nan})
    assert compare_series("log", a, series({"step": 1, "loss": 0.1, "kl": math.nan}), {}).differences == ()
    near = series({"step": 1, "loss": math.nextafter(0.1, 1), "kl": 1.0})
    found = compare_series("log", a, near, {}).differences
    assert {(item.name, math.isfinite(item.largest)) for item in found} == {("loss", True), ("kl", False)}


def test_what_noise_allows_is_not_a_difference_and_what_exceeds_it_is() -> None:
    a = series({"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0})
    b = series({"step": 1, "loss": 1.125}, {"step": 2, "loss": 1.25})
    assert compare_series("log", a, b, {"loss": 0.25}).differences == ()
    (difference,) = compare_series("log", a, b, {"loss": 0.125}).differences
    assert difference.step == (2,)


def test_time_and_the_machine_are_left_out_and_named() -> None:
    a = series({"step": 1, "loss": 1.0, "time": 1.0, "seconds/update": 2.0})
    b = series({"step": 1, "loss": 1.0, "time": 5.0, "seconds/update": 3.0})
    found = compare_series("log", a, b, {})
    assert (found.differences, found.fields, found.left_out) == ((), ("loss",), ("time", "seconds/update"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lr", Kind.RATE),
        ("train/learning_rate", Kind.RATE),
        ("success_rate", Kind.LOSS),
        ("ids", Kind.DATA),
        ("batch/prompt_ids", Kind.DATA),
        ("rewards/accuracy/mean", Kind.ROLLOUTS),
        ("completions/mean_length", Kind.ROLLOUTS),
        ("kl", Kind.REFERENCE),
        ("ref_logps", Kind.REFERENCE),
        ("loss", Kind.LOSS),
        ("total_loss", Kind.LOSS),
        ("grad_norm", Kind.LOSS),
        ("num_tokens", Kind.COUNTER),
        ("epoch", Kind.COUNTER),
        ("step_time", None),
        ("tokens_per_second", None),
        ("train_samples_per_second", None),
        ("train_runtime", None),
        ("timestamp", None),
        ("seconds/generate", None),
        ("incarnation", None),
        ("start", None),
    ],
)
def test_what_a_field_is_about_is_read_from_its_name(name: str, kind: Kind | None) -> None:
    assert kind_of(name) is kind


def test_the_first_row_of_a_start_is_found_in_a_file_that_was_continued() -> None:
    before = steps(1, 2, 3)
    assert first_new_row(before, Series((*before.rows, *steps(3, 4).rows))) == {"step": 3}
    assert first_new_row(Series(), before) == {"step": 1}


def test_the_first_row_of_a_start_is_found_in_a_file_that_was_cut_back() -> None:
    before = steps(1, 2, 3, time=1)
    after = Series((*before.rows[:1], *steps(2, 3, 4, time=2).rows))
    assert first_new_row(before, after) == {"step": 2, "time": 2}


def test_a_start_that_logged_nothing_has_no_first_row() -> None:
    before = steps(1, 2)
    assert first_new_row(before, before) is None
    assert first_new_row(before, Series(before.rows[:1])) is None


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ([(3,)], "step 3"),
        ([(3,), (4,), (5,)], "steps 3 to 5"),
        ([(1,), (3,), (4,)], "steps 1 and 3 to 4"),
        ([(0, 5), (1, 0), (1, 1)], "steps 5 of epoch 0 and 0 to 1 of epoch 1"),
        ([(0, 5)], "step 5 of epoch 0"),
    ],
)
def test_steps_are_told_as_ranges(numbers: list[tuple[int, ...]], told: str) -> None:
    assert told_steps(numbers) == told


@given(st.sets(st.integers(0, 200), min_size=1, max_size=60))
def test_many_steps_are_told_in_one_line(numbers: set[int]) -> None:
    told = told_steps([(number,) for number in sorted(numbers)])
    assert len(told) < 100
    assert str(min(numbers)) in told
