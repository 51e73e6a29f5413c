"""Any cutting of any shape, for property tests."""

from typing import Any

from hypothesis import strategies as st

from rollforward.boxes import Box, whole

shapes = st.lists(st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def cuttings(draw: Any, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes that cover it: cut in two again and again, anywhere along any axis."""
    shape = draw(shapes) if shape is None else shape
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        number = draw(st.integers(0, len(boxes) - 1))
        box = boxes[number]
        axes = [axis for axis, size in enumerate(box.shape) if size > 1]
        if not axes:
            continue
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(1, box.shape[axis] - 1))
        boxes[number : number + 1] = _halves(box, axis, at)
    return shape, draw(st.permutations(boxes))


@st.composite
def boxes_in(draw: Any, shape: tuple[int, ...]) -> Box:
    """Any box of a shape, which may be empty."""
    begins = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - begin)) for size, begin in zip(shape, begins, strict=True)]
    return Box(tuple(begins), tuple(sizes))


def _halves(box: Box, axis: int, at: int) -> list[Box]:
    def put(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:axis], value, *values[axis + 1 :])

    return [
        Box(box.offset, put(box.shape, at)),
        Box(put(box.offset, box.offset[axis] + at), put(box.shape, box.shape[axis] - at)),
    ]
