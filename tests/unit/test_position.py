"""Positions are written, read and counted in one way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.position import Position

counts = st.integers(0, 10**9)


@given(counts, counts)
def test_what_is_written_is_read_back(epoch: int, step: int) -> None:
    assert Position.parse(str(Position(epoch, step))) == Position(epoch, step)


@pytest.mark.parametrize(
    "text", ["", "1", "0_", "_2", "0_-1", "00_1", "0_01", " 0_1", "0_1\n", "0_1_2", "٠_1", "a_b"]
)
def test_anything_else_is_not_a_position(text: str) -> None:
    with pytest.raises(ValueError, match="is not a position"):
        Position.parse(text)


@given(st.integers(0, 50), st.integers(1, 20), st.data())
def test_following_counts_one_step_and_rolls_over_at_the_end_of_an_epoch(
    epoch: int, steps: int, data: st.DataObject
) -> None:
    position = Position(epoch, data.draw(st.integers(0, steps - 1)))
    following = position.following(steps)
    assert following > position
    assert following.step < steps
    assert following.global_step(steps) == position.global_step(steps) + 1
