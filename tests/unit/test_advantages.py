"""Advantages compare siblings only, and say nothing when siblings agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rollforward.grpo.advantages import centred_advantages, standardised_advantages

rewards = arrays(np.float32, st.integers(1, 6).map(lambda n: 4 * n), elements=st.floats(-10, 10, width=32))


def test_the_published_formula() -> None:
    got = standardised_advantages(np.array([1, 0, 0, 1, 2, 2, 2, 6], dtype=np.float32), 4)
    spread = np.sqrt(3.0)
    expected = [0.5 / 0.5001, -0.5 / 0.5001, -0.5 / 0.5001, 0.5 / 0.5001]
    expected += [-1 / (spread + 1e-4)] * 3 + [3 / (spread + 1e-4)]
    assert got == pytest.approx(expected, rel=1e-6)


@given(rewards)
def test_a_groups_advantages_sum_to_zero(values: np.ndarray) -> None:
    sums = centred_advantages(values, 4).reshape(-1, 4).sum(axis=1)
    assert np.abs(sums).max() < 1e-4


@given(rewards, st.floats(-5, 5))
def test_a_reward_that_all_siblings_get_changes_nothing(values: np.ndarray, bonus: float) -> None:
    moved = (values + np.float32(bonus)).astype(np.float32)
    assert np.allclose(centred_advantages(values, 4), centred_advantages(moved, 4), atol=1e-4)


def test_siblings_that_agree_teach_nothing() -> None:
    agreed = np.full(8, 0.3, dtype=np.float32)
    assert not standardised_advantages(agreed, 8).any()


@given(rewards)
def test_groups_do_not_touch_each_other(values: np.ndarray) -> None:
    alone = [standardised_advantages(values[i : i + 4], 4) for i in range(0, len(values), 4)]
    assert np.array_equal(standardised_advantages(values, 4), np.concatenate(alone))
