"""Whether the pieces of all ranks cover every tensor evenly, found out with one number a rank.

Each rank adds up a mark for each of its pieces; the sum over the ranks is 0 (modulo a prime) when every
element of a tensor is in as many pieces as its first one. Otherwise it is something else, but for a chance of
less than one in a billion. So ranks that exchange a number of fixed size know what would take a list of all
pieces to see; that list is looked at only to say what is wrong (`boxes.cover_fault`). That the first element
is in one piece, not in two, no number of fixed size can tell: see `gathering`.

The mark is the value of a polynomial. With a random number r_a for each axis of a tensor, element (i_0, i_1,
...) stands for r_0^i_0 * r_1^i_1 * ..., and a box for the sum over its elements, which is a product of
geometric series. Boxes that cover the tensor exactly once have the sum of the whole tensor, which the piece
that holds the first element takes off again. (That polynomials are equal is seen from their values at a
random point: the lemma of Schwartz and Zippel.) The numbers are random in that they come from a digest of
the tensor's name and shape.
"""

import xxhash

from rollforward.boxes import Box, Shape, whole
from rollforward.store import strictjson
from rollforward.store.table import StoredPiece

PRIME = (1 << 61) - 1


def mark(role: str, tensor: str, dtype: str, global_shape: Shape, box: Box) -> int:
    """What a piece adds to the sum, modulo PRIME."""
    if box.size == 0:
        return 0
    seed = strictjson.dump([role, tensor, dtype, list(global_shape)]).encode()
    bases = [_random(seed, axis) for axis in range(len(global_shape))]
    value = _value(bases, box)
    if not any(box.offset):
        value -= _value(bases, whole(global_shape))
    return _random(seed, -1) * value % PRIME


def mark_of(piece: StoredPiece) -> int:
    """`mark` of a piece in a table."""
    return mark(piece.role, piece.tensor, piece.record.dtype, piece.global_shape, piece.box)


def _value(bases: list[int], box: Box) -> int:
    value = 1
    for base, begin, size in zip(bases, box.offset, box.shape, strict=True):
        series = (pow(base, size, PRIME) - 1) * pow(base - 1, -1, PRIME)
        value = value * pow(base, begin, PRIME) * series % PRIME
    return value


def _random(seed: bytes, number: int) -> int:
    """From 2 to PRIME - 1: 0 and 1 would tell no two elements apart."""
    found = xxhash.xxh3_128_intdigest(seed + number.to_bytes(8, "little", signed=True))
    return 2 + found % (PRIME - 2)
