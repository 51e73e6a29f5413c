"""Boxes of a tensor's elements: what a piece covers, as pure functions over offsets and shapes.

A box is an offset and a shape, a number for each axis; the box of a whole tensor starts at zero. A scalar
has no axes, and its only box holds its one element. A row is an index of the first axis.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

BLOCK_BYTES = 4 << 20
"""What a block holds at most, unless one row is larger. Part of the format of checkpoints."""


class Box(NamedTuple):
    """Part of a tensor."""

    offset: Shape
    """Where it starts, along each axis of the tensor."""
    shape: Shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def whole(shape: Shape) -> Box:
    """The box of all elements."""
    return Box((0,) * len(shape), shape)


def intersection(one: Box, other: Box) -> Box | None:
    """The elements that two boxes of a tensor share; None when there are none."""
    begins = tuple(map(max, one.offset, other.offset))
    ends = (
        min(a + n, b + m) for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    )
    shape = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return Box(begins, shape) if all(size > 0 for size in shape) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The index of a box in an array that holds the box `outer` around it."""
    return tuple(
        slice(begin - origin, begin - origin + size)
        for begin, size, origin in zip(box.offset, box.shape, outer.offset, strict=True)
    )


def cut_rows(shape: Shape, parts: int, *, grain: int = 1) -> list[Box]:
    """At most `parts` boxes of whole rows, of nearly the same number of rows, which cover the tensor.

    Every box but the last has a multiple of `grain` rows. There is always a box; where there is a row, none
    is empty.
    """
    grains = -(-shape[0] // grain) if shape else 1
    parts = max(1, min(parts, grains))
    if not shape or parts == 1:
        return [whole(shape)]
    cuts = [min(grains * part // parts * grain, shape[0]) for part in range(parts + 1)]
    return [_rows(whole(shape), begin, end) for begin, end in itertools.pairwise(cuts)]


def block_rows(shape: Shape, itemsize: int) -> int:
    """How many rows of a tensor make a block: what fits in BLOCK_BYTES, and at least one."""
    return max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))


def blocks(box: Box, itemsize: int) -> list[Box]:
    """The box, cut where a block of the tensor ends: each has a digest of its own.

    Blocks are counted from the tensor's first row, so a tensor that is cut at multiples of `block_rows` has
    the same blocks as when it is whole.
    """
    if not box.shape or box.size == 0:
        return [box]
    step = block_rows(box.shape, itemsize)
    first, last = box.offset[0], box.offset[0] + box.shape[0]
    cuts = [first, *range((first // step + 1) * step, last, step), last]
    return [_rows(box, begin, end) for begin, end in itertools.pairwise(cuts)]


def is_aligned(box: Box, shape: Shape, itemsize: int) -> bool:
    """Whether a box of a tensor is cut between blocks only, so that its blocks are the tensor's."""
    if box == whole(shape) or box.size == 0:
        return True
    rest = Box(box.offset[1:], box.shape[1:])
    step, last = block_rows(shape, itemsize), box.offset[0] + box.shape[0]
    return rest == whole(shape[1:]) and box.offset[0] % step == 0 and (last % step == 0 or last == shape[0])


def _rows(box: Box, begin: int, end: int) -> Box:
    """The part of a box that lies between two rows of the tensor."""
    return Box((begin, *box.offset[1:]), (end - begin, *box.shape[1:]))


def cover_fault(target: Box, boxes: Sequence[Box]) -> str | None:
    """Why these boxes do not cover the target, each element exactly once; None when they do."""
    last = tuple(begin + size for begin, size in zip(target.offset, target.shape, strict=True))
    for box in boxes:
        if len(box.offset) != len(last) or len(box.shape) != len(last):
            return f"the piece at {list(box.offset)} has another number of axes"
        ends = map(int.__add__, box.offset, box.shape)
        if any(b < o or e > n for b, o, e, n in zip(box.offset, target.offset, ends, last, strict=True)):
            return f"the piece {list(box.shape)} at {list(box.offset)} reaches beyond it"
    pair = _overlap([box for box in boxes if box.size], len(last))
    if pair is not None:
        one, other = (f"{list(box.shape)} at {list(box.offset)}" for box in pair)
        return f"the pieces {one} and {other} overlap"
    missing = target.size - sum(box.size for box in boxes)
    return f"{missing} of {target.size} elements are in no piece" if missing else None


def _overlap(boxes: Sequence[Box], axes: int) -> tuple[Box, Box] | None:
    """Two boxes that share an element. It sweeps along the axis with the most cuts, where few boxes meet."""
    if axes == 0:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    axis = max(range(axes), key=lambda axis: _cuts(boxes, axis))
    open_ones: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset[axis]):
        open_ones = [
            other for other in open_ones if other.offset[axis] + other.shape[axis] > box.offset[axis]
        ]
        for other in open_ones:
            if intersection(box, other) is not None:
                return other, box
        open_ones.append(box)
    return None


def _cuts(boxes: Iterable[Box], axis: int) -> int:
    return len({box.offset[axis] for box in boxes})
