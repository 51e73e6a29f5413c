"""Curves are thinned so that nothing that stands out is lost."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rollforward.inspection.report.thinning import extremes, means, stretches

VALUES = st.floats(width=32) | st.just(np.nan) | st.just(np.inf)
COLUMNS = st.integers(1, 300).flatmap(
    lambda count: st.lists(arrays(np.float64, count, elements=VALUES), min_size=1, max_size=3)
)


@given(COLUMNS, st.integers(1, 40))
def test_of_every_stretch_and_every_column_lowest_highest_and_gaps_stay(
    columns: list[np.ndarray], most: int
) -> None:
    edges = stretches(len(columns[0]), most)
    kept = extremes(columns, edges)
    assert (np.diff(kept) > 0).all()
    assert {0, len(columns[0]) - 1} <= set(kept.tolist())
    for begin, end in itertools.pairwise(edges):
        rows = kept[(kept >= begin) & (kept < end)]
        for column in columns:
            whole, finite = column[begin:end], column[begin:end][np.isfinite(column[begin:end])]
            left = column[rows]
            if finite.size:
                assert left[np.isfinite(left)].min() == finite.min()
                assert left[np.isfinite(left)].max() == finite.max()
            assert np.isfinite(left).all() == np.isfinite(whole).all()


@given(COLUMNS, st.integers(1, 40))
def test_no_more_is_kept_than_three_rows_for_each_column_of_each_stretch(
    columns: list[np.ndarray], most: int
) -> None:
    edges = stretches(len(columns[0]), most)
    assert len(edges) - 1 == min(most, len(columns[0])), "as many stretches as asked for, none empty"
    assert len(extremes(columns, edges)) <= 3 * len(columns) * most + 2


@given(arrays(np.float64, st.integers(1, 200), elements=VALUES), st.integers(1, 40))
def test_the_mean_of_a_stretch_is_that_of_its_finite_values(column: np.ndarray, most: int) -> None:
    edges = stretches(len(column), most)
    for (begin, end), mean in zip(itertools.pairwise(edges), means(column, edges), strict=True):
        finite = column[begin:end][np.isfinite(column[begin:end])]
        if finite.size:
            np.testing.assert_allclose(mean, finite.mean(), rtol=1e-9, atol=1e-6)
        else:
            assert np.isnan(mean)


def test_nothing_has_no_rows() -> None:
    assert extremes([np.array([])], stretches(0, 10)).tolist() == []
