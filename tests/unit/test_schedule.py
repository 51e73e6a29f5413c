"""The learning rate warms up, decays, and stays."""

import pytest

from rollforward.grpo.schedule import LearningRate

RATE = LearningRate(lr=1.0, min_lr=0.1, warmup_steps=4, decay_steps=14)


def test_it_warms_up_in_even_steps_from_above_zero() -> None:
    assert [RATE.at(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_it_falls_along_half_a_cosine_and_stays_at_the_floor() -> None:
    assert RATE.at(4) == pytest.approx(1.0)
    assert RATE.at(9) == pytest.approx(0.55)
    assert RATE.at(14) == RATE.at(10_000) == 0.1
    rates = [RATE.at(step) for step in range(4, 15)]
    assert rates == sorted(rates, reverse=True)


def test_no_warm_up_and_no_decay_are_allowed() -> None:
    assert LearningRate(lr=1.0, min_lr=0.5, warmup_steps=0, decay_steps=0).at(0) == 0.5
