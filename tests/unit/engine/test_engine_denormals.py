"""Whichever thread MindSpore computes on, denormals count as zero, and nowhere else."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from rollforward.engines.mindspore.denormals import flushed

TINY = np.array([1, 5, 1 << 20], np.uint32).view(np.float32)


class Doubled(nn.Cell):
    def construct(self, values: ms.Tensor) -> ms.Tensor:
        return ops.add(values, values)


def test_a_graph_gives_the_same_bits_in_its_first_runs_and_later() -> None:
    """Seen in 2.10: zeros in the first run, denormals from the second on."""
    cell, values = Doubled(), ms.Tensor(TINY)
    with flushed():
        found = [cell(values).asnumpy() for _ in range(10)]
    assert all(not array.view(np.uint32).any() for array in found)


def test_numpy_agrees_within_and_is_as_before_behind() -> None:
    with flushed():
        assert not (TINY + TINY).view(np.uint32).any()
    assert (TINY + TINY).view(np.uint32).tolist() == [2, 10, 1 << 21]


def test_an_error_puts_it_back_too() -> None:
    with pytest.raises(KeyError), flushed():
        raise KeyError
    assert (TINY + TINY).view(np.uint32).tolist() == [2, 10, 1 << 21]
