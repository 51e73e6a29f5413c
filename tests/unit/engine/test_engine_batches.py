"""Batches are cut, padded and moved without losing or weighing a token wrongly."""

import numpy as np
import pytest

from rollforward.engines.mindspore.batches import left_padded, micro_batches
from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess


def test_left_padding_keeps_the_order_of_real_tokens() -> None:
    ids = np.array([[5, 6, 0, 0], [0, 7, 8, 9], [0, 1, 0, 2], [3, 4, 5, 6]], dtype=np.int32)
    mask = ids > 0
    moved, moved_mask = left_padded(ids, mask)
    assert moved.tolist() == [[0, 0, 5, 6], [0, 7, 8, 9], [0, 0, 1, 2], [3, 4, 5, 6]]
    np.testing.assert_array_equal(moved_mask, moved > 0)


def test_every_row_is_in_one_micro_batch_and_the_fill_weighs_nothing() -> None:
    arrays = {"ids": np.arange(10).reshape(5, 2), "weights": np.ones((5, 2), dtype=np.float32)}
    pieces = micro_batches(5, 3, arrays, "weights")
    assert [piece["ids"].shape for piece in pieces] == [(3, 2), (3, 2)]
    weighted = np.concatenate([piece["ids"][piece["weights"][:, 0] > 0] for piece in pieces])
    np.testing.assert_array_equal(weighted, arrays["ids"])
    np.testing.assert_array_equal(pieces[1]["ids"][2], arrays["ids"][3])
    np.testing.assert_array_equal(arrays["weights"], 1)


def test_one_process_sees_values_as_many_would() -> None:
    group = OneProcess()
    assert group.all_gather({"a": (1, 2.5), "b": "é"}) == [{"a": [1, 2.5], "b": "é"}]
    with pytest.raises(EngineError, match="JSON"):
        group.all_gather({"array": np.zeros(2)})
