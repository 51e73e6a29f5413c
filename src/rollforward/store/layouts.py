"""Whether the layouts of all ranks fit together, before anything is saved.

All ranks must have the same roles and the same whole tensors, and their pieces must cover each of the other
tensors exactly once. Two numbers a rank tell (`common_digest`, `cover`); only if they tell of a fault are
the layouts gathered, to say what it is (`fault`). Pieces that cover a tensor twice over are left to
`gathering`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rollforward.boxes import Box, cover_fault, whole
from rollforward.store import strictjson
from rollforward.store.covering import PRIME, mark
from rollforward.store.digests import digest
from rollforward.store.layout import check_roles, in_order
from rollforward.store.parts import pieces_written
from rollforward.store.tensorfile import dtype_code
from rollforward.tensors import Layout


def check(layout: Layout) -> None:
    """ValueError for a layout that no rank can save."""
    check_roles(layout)
    for role, named in layout.items():
        whole_ones = {name for name, spec in named.items() if not spec.piece_of}
        for name, spec in named.items():
            dtype_code(spec.dtype)
            if not spec.piece_of and not spec.is_whole:
                raise ValueError(
                    f"{role} {name} is the part {list(spec.shape)} of {list(spec.global_shape)}, and is not "
                    "said to be a piece of a tensor (TensorSpec.piece)"
                )
            if spec.piece_of in whole_ones:
                raise ValueError(f"{role} {name} is a piece of {spec.piece_of}, which is whole on every rank")
            if fault := _misplaced(spec.global_shape, spec.box):
                raise ValueError(f"{role} {name}: {fault}")


def _misplaced(global_shape: tuple[int, ...], box: Box) -> str | None:
    """Why a box is not one of a tensor with this shape."""
    if not len(global_shape) == len(box.offset) == len(box.shape):
        return "its offset, its shape and its tensor's shape have different numbers of axes"
    inside = (
        o >= 0 and o + n <= size for o, n, size in zip(box.offset, box.shape, global_shape, strict=True)
    )
    return None if all(inside) else f"{list(box.shape)} at {list(box.offset)} is not in {list(global_shape)}"


def common_digest(layout: Layout) -> int:
    """Of what must be the same on all ranks: the roles, and the whole tensors."""
    return int(digest(strictjson.dump(_common(layout)).encode()), 16)


def cover(layout: Layout) -> int:
    """What this rank's pieces add to the sum that is 0 (modulo covering.PRIME) when nothing is missing.

    Of a piece that several ranks hold alike, what the one adds that writes it.
    """
    marks = (
        mark(role, spec.piece_of, dtype_code(spec.dtype), spec.global_shape, spec.box)
        for role, named in layout.items()
        for spec in (named[name] for name in pieces_written(named))
    )
    return sum(marks) % PRIME


def as_json(layout: Layout) -> Any:
    """What a rank sends to the others for `fault`."""
    pieces = [
        [role, spec.piece_of, dtype_code(spec.dtype), list(spec.global_shape), *map(list, spec.box)]
        for role, named in sorted(layout.items())
        for spec in (named[name] for name in sorted(pieces_written(named)))
    ]
    return {"common": _common(layout), "pieces": pieces}


def fault(layouts: Sequence[Mapping[str, Any]]) -> str:
    """What does not fit together, from `as_json` of all ranks."""
    first = layouts[0]["common"]
    for rank, each in enumerate(layouts):
        if each["common"] != first:
            mine, theirs = ({str(item) for item in common} for common in (first, each["common"]))
            shown = ", ".join(sorted(mine ^ theirs)[:3])
            return f"ranks 0 and {rank} do not hold the same roles and whole tensors; they differ in {shown}"
    boxes: dict[str, list[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for each in layouts:
        for role, tensor, dtype, shape, offset, size in each["pieces"]:
            name = f"{role} {tensor} ({dtype} {shape})"
            shapes[name] = tuple(shape)
            boxes.setdefault(name, []).append(Box(tuple(offset), tuple(size)))
    for name, held in sorted(boxes.items()):
        found = cover_fault(whole(shapes[name]), held)
        if found is not None:
            return f"the pieces of {name}: {found}"
    return "the pieces that the ranks hold do not cover every tensor exactly once"


def _common(layout: Layout) -> list[Any]:
    tensors = [
        [role, name, dtype_code(spec.dtype), list(spec.shape)]
        for role, named in sorted(layout.items())
        for name, spec in sorted(named.items())
        if not spec.piece_of
    ]
    return [*in_order(layout), *tensors]
