"""Curves with fewer points that look the same: lowest and highest of every stretch stay. Pure functions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


def stretches(count: int, most: int) -> Rows:
    """Where each of at most `most` equal stretches of `count` rows begins, and at the end `count`."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).astype(np.intp))


def extremes(columns: Sequence[Floats], edges: Rows) -> Rows:
    """The rows to keep, in order: of each stretch, for each column, one with its lowest and one with its
    highest finite value, and one with a value that is not finite; and the first and the last row of all.
    """
    count = int(edges[-1])
    if not count:
        return np.array([], dtype=np.intp)
    kept = [np.array([0, count - 1], dtype=np.intp)]
    for column in columns:
        finite = np.isfinite(column)
        kept.append(_first_of_each(~finite, edges))
        lowest = np.minimum.reduceat(np.where(finite, column, np.inf), edges[:-1])
        highest = np.maximum.reduceat(np.where(finite, column, -np.inf), edges[:-1])
        lengths = np.diff(edges)
        kept.append(_first_of_each(finite & (column == np.repeat(lowest, lengths)), edges))
        kept.append(_first_of_each(finite & (column == np.repeat(highest, lengths)), edges))
    rows: Rows = np.unique(np.concatenate(kept))
    return rows


def means(column: Floats, edges: Rows) -> Floats:
    """The mean of the finite values of each stretch; NaN where there are none."""
    finite = np.isfinite(column)
    sums = np.add.reduceat(np.where(finite, column, 0.0), edges[:-1])
    counts = np.add.reduceat(finite.astype(np.float64), edges[:-1])
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _first_of_each(chosen: NDArray[np.bool_], edges: Rows) -> Rows:
    """The first chosen row of each stretch that has one."""
    rows = np.flatnonzero(chosen)
    _, first = np.unique(np.searchsorted(edges, rows, side="right"), return_index=True)
    chosen_rows: Rows = rows[first]
    return chosen_rows
