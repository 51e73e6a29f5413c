"""The objective's formulas, held against finite differences and against worked cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.grpo.objective import sequence_mean_weights, token_mean_weights, token_terms
from rollforward.grpo.types import ObjectiveSettings

OBJECTIVE = ObjectiveSettings(beta=0.3, epsilon_low=0.2, epsilon_high=0.28)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_the_gradient_is_what_finite_differences_measure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    now, old, reference = rng.normal(-2, 0.4, (3, 4, 5))
    advantages = rng.normal(size=4)
    step = 1e-6
    terms = token_terms(now, old, reference, advantages, OBJECTIVE)
    above = token_terms(now + step, old, reference, advantages, OBJECTIVE)
    below = token_terms(now - step, old, reference, advantages, OBJECTIVE)
    smooth = above.clipped == below.clipped  # at the edge of the clip there is no derivative
    measured = (above.loss - below.loss) / (2 * step)
    assert np.allclose(terms.gradient[smooth], measured[smooth], atol=1e-5)


def _terms(ratio: float, advantage: float) -> tuple[float, bool, float]:
    at = np.array([[np.log(ratio)]])
    zero = np.zeros((1, 1))
    terms = token_terms(at, zero, at, np.array([advantage]), OBJECTIVE)
    return float(terms.loss[0, 0]), bool(terms.clipped[0, 0]), float(terms.gradient[0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.56, True),  # good and already much likelier: 1 + epsilon_high
        (1.5, -2.0, 3.0, False),  # bad and likelier: pushed down in full
        (0.5, -2.0, 1.6, True),  # bad and already much less likely: 1 - epsilon_low
        (0.5, 2.0, -1.0, False),  # good and less likely: pulled up in full
    ],
)
def test_the_clip_holds_on_the_side_where_it_should(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    got_loss, got_clipped, gradient = _terms(ratio, advantage)
    assert got_loss == pytest.approx(loss)
    assert got_clipped is clipped
    assert (gradient == 0.0) is clipped


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_the_kl_estimate_is_never_negative_and_zero_only_when_equal(now: float, reference: float) -> None:
    shape = (1, 1)
    terms = token_terms(
        np.full(shape, now), np.full(shape, now), np.full(shape, reference), np.zeros(1), OBJECTIVE
    )
    assert terms.kl[0, 0] >= -1e-15, "no further below zero than exp() rounds"
    if abs(now - reference) > 1e-3:
        assert terms.kl[0, 0] > 0.0


def test_token_mean_and_sequence_mean_weigh_a_long_sample_differently() -> None:
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=np.bool_)
    by_token = token_mean_weights(mask, tokens_in_step=5)
    by_sequence = sequence_mean_weights(mask, samples_in_step=2)
    assert by_token.dtype == by_sequence.dtype == np.float32
    assert by_token.sum(axis=1) == pytest.approx([0.8, 0.2])
    assert by_sequence.sum(axis=1) == pytest.approx([0.5, 0.5])
    assert not by_token[~mask].any()
    assert not by_sequence[~mask].any()


def test_weights_of_split_batches_are_those_of_the_whole() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=np.bool_)
    tokens = int(mask.sum())
    whole = token_mean_weights(mask, tokens)
    halves = [token_mean_weights(part, tokens) for part in (mask[:2], mask[2:])]
    assert np.array_equal(np.concatenate(halves), whole)
    assert whole.sum() == pytest.approx(1.0)
