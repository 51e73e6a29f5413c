"""From where two runs part, the classic mistakes are told apart."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.proving.causes import (
    Cause,
    Evidence,
    Group,
    Resume,
    epoch_starts,
    find_shift,
    group_of,
    name_causes,
)
from rollforward.proving.series import Series, compare_series

EPOCH, STEPS, RESUMED = 4, 12, 7
"""Steps 1 to 12 in epochs of 4; the run was killed, and its second start did step 7 first."""

Row = dict[str, Any]


def peace(step: int) -> Row:
    """What the undisturbed run logs."""
    row: Row = {
        "step": step,
        "epoch": (step - 1) // EPOCH,
        "lr": 1 / step,
        "ids": [10 * step],
        "reward": step % 3,
    }
    return row | {"kl": 0.01 * step, "loss": 1.0 + 1 / step, "grad_norm": 2.0}


def named(
    change: Callable[[int, Row], Row],
    *,
    fields: Sequence[str] = (),
    checkpoint: int | None = RESUMED - 1,
    saved: Sequence[Group] = tuple(Group),
    differing: Sequence[Group] = (Group.WEIGHTS,),
    first: int = RESUMED,
) -> list[Cause]:
    """The causes, when rows after the resume are changed and only some fields are logged."""
    rows_a, rows_b = [], []
    for step in range(1, STEPS + 1):
        row = peace(step)
        kept = {"step", "epoch", *(fields or row)}
        rows_a.append({name: value for name, value in row.items() if name in kept})
        changed = change(step, row) if step >= first else row
        if changed:
            rows_b.append({name: value for name, value in changed.items() if name in kept})
    a, b = Series(tuple(rows_a)), Series(tuple(rows_b))
    resumed = next((row for row in rows_b if row["step"] >= first), None)
    return name_causes(
        Evidence(
            compared=compare_series("log.jsonl", a, b, {}),
            a=a,
            b=b,
            resumes=[Resume(checkpoint=checkpoint, first=resumed)],
            last_checkpoint=STEPS,
            differing=differing,
            saved=saved,
        )
    )


def only(causes: list[Cause], name: str) -> str:
    """The text of the one cause there is."""
    assert [cause.name for cause in causes] == [name]
    return causes[0].text


def off(**fields: float) -> Callable[[int, Row], Row]:
    """Fields that are too large by something."""
    return lambda _step, row: row | {name: row[name] + more for name, more in fields.items()}


def test_a_schedule_that_was_advanced_twice() -> None:
    text = only(named(lambda step, row: row | {"lr": 1 / (step + 3), "loss": 9.0 + step}), "learning_rate")
    assert text == (
        "lr and loss differ first, at step 7, the first step after a resume: the schedule is 3 steps ahead, "
        "advanced again for steps that were done"
    )


def test_a_schedule_that_starts_over_and_one_that_is_behind_and_one_that_fits_nothing() -> None:
    assert "starts from the beginning" in only(
        named(lambda step, row: row | {"lr": 1 / (step - 6)}), "learning_rate"
    )
    assert "is 2 steps behind" in only(named(lambda step, row: row | {"lr": 1 / (step - 2)}), "learning_rate")
    assert "is not restored" in only(named(off(lr=0.5)), "learning_rate")


def test_data_from_the_beginning_of_the_epoch_before_and_of_other_steps() -> None:
    def data_of(shift: int) -> str:
        return only(
            named(lambda step, row: row | {"ids": [10 * (step + shift)], "loss": 3.0 + step}), "data_order"
        )

    assert "the data start from the beginning" in data_of(-6)
    assert "the data are those of 1 epoch before" in data_of(-EPOCH)
    assert "the data of 3 steps are skipped" in data_of(3)
    assert "the data of 2 steps come again" in data_of(-2)
    assert "the order of the data is not restored" in only(
        named(lambda step, row: row | {"ids": [1000 + step * step]}), "data_order"
    )


def test_data_and_schedule_may_both_be_wrong() -> None:
    found = named(lambda step, row: row | {"ids": [10 * (step - 6)], "lr": 1 / (step - 6)})
    assert [cause.name for cause in found] == ["learning_rate", "data_order"]


def test_sampled_numbers_that_differ_at_once_are_random_state_or_weights() -> None:
    text = only(named(off(reward=1, kl=0.5, loss=0.5)), "random_state")
    assert "with the data and the learning rate the same" in text
    assert "the random state or the weights are not restored" in text


def test_a_checkpoint_without_random_state_is_said_to_have_none() -> None:
    text = only(named(off(loss=0.5), saved=[Group.WEIGHTS]), "random_state")
    assert "the random state (of which the checkpoint has nothing)" in text


def test_data_that_were_not_logged_are_suspected_too_more_so_in_a_later_epoch() -> None:
    text = only(named(off(loss=0.5), fields=["loss", "lr"]), "random_state")
    assert "with the learning rate the same" in text
    assert "the order of the data of a later epoch (which is not logged), the random state" in text
    early = only(named(off(loss=0.5), fields=["loss"], first=2, checkpoint=1), "random_state")
    assert "the order of the data (which is not logged), the random state" in early


def test_kl_that_differs_where_what_was_sampled_is_the_same_is_the_reference() -> None:
    text = only(named(off(kl=0.5, loss=0.5), saved=[Group.WEIGHTS]), "reference")
    assert "the reference model (of which the checkpoint has nothing) is not restored" in text
    assert only(named(off(kl=0.5), fields=["kl", "loss"]), "reference")
    # Without rewards in the log it may as well be the weights.
    assert only(named(off(kl=0.5, loss=0.5), fields=["kl", "loss"]), "random_state")


def test_a_first_step_that_is_right_and_a_second_that_is_not_is_the_optimizer() -> None:
    text = only(named(lambda step, row: row | ({"loss": 0.0} if step > RESUMED else {})), "optimizer")
    assert "at step 8, the second step after a resume" in text
    assert "the optimizer's state is not restored" in text


def test_what_differs_only_where_an_epoch_begins() -> None:
    text = only(named(lambda step, row: row | ({"loss": 0.0} if step >= 9 else {})), "epoch_boundary")
    assert "at step 9, step 3 after a resume" in text


def test_what_differs_later_acts_seldom() -> None:
    assert "acts seldom" in only(
        named(lambda step, row: row | ({"loss": 0.0} if step >= 11 else {})), "later"
    )


def test_a_counter_alone() -> None:
    assert only(named(lambda _step, row: row | {"epoch": 0}, fields=["loss"]), "counter")


def test_a_difference_before_any_resume_is_not_the_resumes() -> None:
    rows = tuple(peace(step) for step in range(1, STEPS + 1))
    a, b = Series(rows), Series((rows[0], rows[1] | {"loss": 0.0}, *rows[2:]))
    resumes = [Resume(checkpoint=6, first=rows[RESUMED - 1])]
    compared = compare_series("log", a, b, {})
    assert "--twice" in only(
        name_causes(Evidence(compared=compared, a=a, b=b, resumes=resumes)), "not_deterministic"
    )


def test_steps_skipped_up_to_an_epochs_end_are_found_from_the_checkpoint() -> None:
    """The steps in question were logged before the kill, so none is missing from the log."""
    text = only(named(lambda step, row: row if step >= 9 else {}, checkpoint=5, first=9), "steps_skipped")
    assert text == (
        "after kill 1 the newest checkpoint was of step 5, and the trainer continued at step 9, "
        "where an epoch begins: steps 6 to 8 were skipped"
    )


def test_steps_missing_from_the_log_count_as_skipped_unless_the_tensors_are_right() -> None:
    def without(step: int, row: Row) -> Row:
        return {} if step in (7, 8) else row

    text = only(named(without, checkpoint=None), "steps_skipped")
    assert text == "steps 7 to 8 were skipped, up to where an epoch begins or ends"
    assert named(without, checkpoint=None, differing=()) == []


def test_steps_that_the_undisturbed_run_never_did() -> None:
    rows = tuple(peace(step) for step in range(1, STEPS + 1))
    a, b = Series(rows), Series((*rows, peace(13), peace(14)))
    found = name_causes(Evidence(compared=compare_series("log", a, b, {}), a=a, b=b))
    assert "only the killed run did steps 13 to 14" in only(found, "steps_too_many")


@pytest.mark.parametrize(
    ("differing", "name"),
    [
        ([Group.OPTIMIZER], "optimizer"),
        ([Group.RANDOM], "random_state"),
        ([Group.REFERENCE], "reference"),
        ([Group.SCHEDULE], "learning_rate"),
        ([Group.WEIGHTS], "weights"),
        ([Group.WEIGHTS, Group.OPTIMIZER], "tensors"),
    ],
)
def test_without_a_log_that_differs_the_tensors_say_what(differing: list[Group], name: str) -> None:
    assert only(named(lambda _step, row: row, differing=differing), name)


@pytest.mark.parametrize(
    ("role", "name", "group"),
    [
        ("checkpoint-3/optimizer.pt", "state.0.exp_avg", Group.OPTIMIZER),
        ("checkpoint-3/scheduler.pt", "last_epoch", Group.SCHEDULE),
        ("checkpoint-3/rng_state.pth", "cpu", Group.RANDOM),
        ("checkpoint-3/model.safetensors", "model.norm.weight", Group.WEIGHTS),
        ("policy_model", "model.embed_tokens.weight", Group.WEIGHTS),
        ("optimizer", "adam_m.model.norm.weight", Group.OPTIMIZER),
        ("ref", "model.norm.weight", Group.REFERENCE),
        ("checkpoint-3/reference.safetensors", "weights", Group.REFERENCE),
        ("state.pt", "generator", Group.RANDOM),
        ("state.pt", "refiner.weight", Group.WEIGHTS),
    ],
)
def test_tensors_are_sorted_by_the_names_of_their_files_and_their_own(
    role: str, name: str, group: Group
) -> None:
    assert group_of(role, name) is group


@given(values=st.lists(st.integers(), min_size=4, max_size=40, unique=True), data=st.data())
def test_a_shift_that_was_planted_is_found(values: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values) - 2))
    stop = data.draw(st.integers(start + 2, len(values)))
    shift = (
        data.draw(st.integers(-start, len(values) - stop).filter(bool))
        if start or stop < len(values)
        else None
    )
    if shift is None:
        return
    shifted = [values[i + shift] if start <= i < stop else -1 for i in range(len(values))]
    assert find_shift(values, shifted, range(start, stop)) == shift


def test_values_that_are_all_the_same_tell_no_shift() -> None:
    assert find_shift([0.1] * 9, [0.1] * 9, range(3, 9)) is None
    assert find_shift([1, 2, 3], [9, 9, 9], range(3)) is None
    assert find_shift([1, 2, 3], [3, 9, 9], range(1)) is None


def test_epochs_begin_where_whole_numbers_rise_or_fractions_pass_one() -> None:
    whole = Series(tuple({"step": step, "epoch": step // 3} for step in range(7)))
    assert epoch_starts(whole) == {(3,), (6,)}
    fractions = Series(tuple({"step": step, "epoch": step / 3} for step in range(1, 8)))
    assert epoch_starts(fractions) == {(4,), (7,)}
