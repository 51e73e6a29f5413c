"""A layout says what tensors are, and takes none of their memory."""

import numpy as np

from rollforward.tensors import TensorSpec, layout_of


def test_a_whole_tensor_is_the_box_that_is_all_of_it() -> None:
    spec = TensorSpec.whole("float32", (3, 4))
    assert spec == TensorSpec(np.dtype(np.float32), (3, 4), (3, 4), (0, 0))
    assert (spec.is_whole, spec.size, spec.nbytes) == (True, 12, 48)


def test_a_part_of_a_tensor_takes_its_own_bytes_only() -> None:
    spec = TensorSpec(np.dtype(np.int64), (3, 2), (3, 4), (0, 2))
    assert (spec.is_whole, spec.size, spec.nbytes) == (False, 6, 48)


def test_a_scalar_has_one_element() -> None:
    assert TensorSpec.whole(np.int64, ()).nbytes == 8


def test_the_layout_of_arrays_is_theirs_whatever_their_strides() -> None:
    tensors = {"a": {"x": np.zeros((4, 6), np.float16)[::2].T}, "b": {}}
    assert layout_of(tensors) == {"a": {"x": TensorSpec.whole(np.float16, (6, 2))}, "b": {}}
