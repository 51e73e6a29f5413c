"""Boxes of tensors: cutting, sharing, and covering every element exactly once."""

import numpy as np
import pytest
from cuttings import cuttings
from hypothesis import given
from hypothesis import strategies as st

import rollforward.boxes as boxes_module
from rollforward.boxes import (
    Box,
    block_rows,
    blocks,
    cover_fault,
    cut_rows,
    intersection,
    is_aligned,
    whole,
    within,
)


def counted(shape, boxes):
    """How often each element is covered."""
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[within(box, whole(shape))] += 1
    return counts


@given(cuttings())
def test_boxes_that_cover_a_tensor_have_no_fault(cutting):
    shape, boxes = cutting
    assert cover_fault(whole(shape), boxes) is None
    assert (counted(shape, boxes) == 1).all()


@given(cuttings(), st.data())
def test_a_fault_is_found_exactly_where_an_element_is_not_covered_once(cutting, data):
    """A box is dropped, doubled, moved or resized."""
    shape, boxes = cutting
    boxes = list(boxes)
    number = data.draw(st.integers(0, len(boxes) - 1))
    action = data.draw(st.sampled_from(["drop", "double", "move"]))
    if action == "drop":
        del boxes[number]
    elif action == "double":
        boxes.append(boxes[number])
    else:
        begins = [data.draw(st.integers(0, size - 1)) for size in shape]
        sizes = [data.draw(st.integers(0, size - begin)) for size, begin in zip(shape, begins, strict=True)]
        boxes[number] = Box(tuple(begins), tuple(sizes))
    right = bool((counted(shape, boxes) == 1).all())
    assert (cover_fault(whole(shape), boxes) is None) == right


@given(cuttings(), cuttings())
def test_what_two_boxes_share_is_what_both_hold(one, other):
    shape = tuple(map(max, one[0], other[0])) if len(one[0]) == len(other[0]) else None
    if shape is None:
        return
    for a in one[1]:
        for b in other[1]:
            shared = intersection(a, b)
            both = (counted(shape, [a]) + counted(shape, [b])) == 2
            assert (counted(shape, [shared] if shared else []) == both).all()


@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.integers(1, 12), st.integers(1, 4))
def test_rows_are_cut_evenly_and_cover_the_tensor(shape, parts, grain):
    boxes = cut_rows(shape, parts, grain=grain)
    assert 1 <= len(boxes) <= parts
    assert cover_fault(whole(shape), boxes) is None
    assert all(box.shape[1:] == shape[1:] for box in boxes)
    if shape:
        rows = [box.shape[0] for box in boxes]
        assert max(rows[:-1], default=0) - min(rows[:-1], default=0) <= grain
        assert min(rows) > 0 or shape[0] == 0
        assert all(count % grain == 0 for count in rows[:-1])


@given(cuttings(), st.integers(1, 200))
def test_a_box_is_aligned_exactly_where_its_blocks_are_those_of_its_tensor(cutting, size):
    shape, boxes = cutting
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(boxes_module, "BLOCK_BYTES", size)
        whole_ones = set(blocks(whole(shape), 4))
        for box in boxes:
            assert is_aligned(box, shape, 4) == (set(blocks(box, 4)) <= whole_ones)


@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.integers(1, 3), st.integers(1, 200))
def test_blocks_cover_a_box_and_are_those_of_the_tensor_where_it_is_cut_between_them(shape, parts, size):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(boxes_module, "BLOCK_BYTES", size)
        all_blocks = blocks(whole(shape), 4)
        pieces = cut_rows(shape, parts, grain=block_rows(shape, 4))
        cut = [block for piece in pieces for block in blocks(piece, 4)]
        assert cut == all_blocks or 0 in shape
    assert cover_fault(whole(shape), all_blocks) is None
    row = 4 * int(np.prod(shape[1:], dtype=int))
    assert all(block.size * 4 <= max(size, row) for block in all_blocks)


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([], "6 of 6 elements are in no piece"),
        ([Box((0, 0), (2, 2))], "2 of 6 elements are in no piece"),
        (
            [Box((0, 0), (2, 3)), Box((1, 2), (1, 1))],
            "the pieces [2, 3] at [0, 0] and [1, 1] at [1, 2] overlap",
        ),
        ([Box((0, 0), (2, 4))], "the piece [2, 4] at [0, 0] reaches beyond it"),
        ([Box((-1, 0), (2, 3))], "the piece [2, 3] at [-1, 0] reaches beyond it"),
        ([Box((0,), (2,))], "the piece at [0] has another number of axes"),
    ],
)
def test_a_fault_says_what_is_wrong(boxes, fault):
    assert cover_fault(whole((2, 3)), boxes) == fault


def test_a_scalar_is_covered_by_one_box():
    assert cover_fault(whole(()), [Box((), ())]) is None
    assert cover_fault(whole(()), []) == "1 of 1 elements are in no piece"
    assert "overlap" in cover_fault(whole(()), [Box((), ())] * 2)
