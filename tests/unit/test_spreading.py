"""Every element of an optimizer belongs to one worker, and no worker has much more than its share."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward import boxes
from rollforward.boxes import cover_fault, whole
from rollforward.grpo.spreading import spread

shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)
models = st.dictionaries(st.text("abc", min_size=1, max_size=4), shapes, min_size=1, max_size=12)


@given(models, st.integers(1, 9))
def test_every_element_has_one_owner(model: dict[str, tuple[int, ...]], workers: int) -> None:
    kept = spread(model, workers)
    assert len(kept) == workers
    for name, shape in model.items():
        assert cover_fault(whole(shape), [mine[name] for mine in kept if name in mine]) is None


@given(models, st.integers(1, 9))
def test_no_worker_has_more_than_a_fair_share_and_one_box(
    model: dict[str, tuple[int, ...]], workers: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(boxes, "BLOCK_BYTES", 16)
        kept = spread(model, workers)
    fair = sum(map(math.prod, model.values())) / workers
    for mine in kept:
        sizes = [box.size for box in mine.values()]
        assert sum(sizes) <= fair + max(sizes, default=0)


def test_a_large_tensor_is_cut_by_rows_where_its_blocks_end() -> None:
    kept = spread({"embedding": (50_000, 256), "norm": (256,)}, 4)
    found = [mine["embedding"] for mine in kept]
    assert sorted(box.offset[0] for box in found) == [0, 12 * 4096 // 4, 24 * 4096 // 4, 36 * 4096 // 4]
    assert sum("norm" in mine for mine in kept) == 1


def test_it_is_the_same_whatever_the_order_of_the_tensors() -> None:
    model = {"b": (7, 3), "a": (7, 3), "c": (2,), "d": (30, 3)}
    turned = dict(reversed(model.items()))
    assert [sorted(mine.items()) for mine in spread(model, 3)] == [
        sorted(mine.items()) for mine in spread(turned, 3)
    ]


def test_more_workers_than_tensors_leave_some_without() -> None:
    assert spread({"a": (3,)}, 3) == [{"a": whole((3,))}, {}, {}]
