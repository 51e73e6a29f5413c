"""What ranks exchange: small values from all of them, or sums that are the same size for any number of ranks.

`Channel.tally` gives every rank one value of the first rank and the sums of some numbers. Over `all_sum` (an
AllReduce of small integers) a rank sends and receives the same number of bytes however many ranks there are:

    word 0             length of the value in bytes
    16 words a number  8 bits each
    the rest           the value as JSON, 2 bytes a word; 0 on all ranks but the first

The sums stay below 2**24 for 65,793 ranks, so float32 holds them: not every framework sums integers.
What does not fit into the first frame follows in a second one, as long as needed. Lengths are powers of two,
since a framework may compile a graph for each.

Without `all_sum`, every rank gets the numbers of every other one over `all_gather`, and what it receives
grows with their number: an all-gather brings everybody everything, so no encoding changes that. A number has
41 bytes at most (39 digits). A commit adds up 6 numbers, and 4 for each role: a rank receives at most
41 x (6 + 4 x roles) bytes of each other rank.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

AllGather = Callable[[Any], list[Any]]
"""Every rank's value (anything JSON can hold), in rank order, on every rank. Collective."""

AllSum = Callable[[Sequence[int]], Sequence[int]]
"""The sums over the ranks of some counts, as many on each. None exceeds 2**24, for float32. Collective."""

FRAME_WORDS = 1024
_LIMBS = 16
_LIMB_BITS = 8


@runtime_checkable
class Sums(Protocol):
    """A group of ranks that can add numbers up."""

    def all_sum(self, numbers: Sequence[int]) -> Sequence[int]:
        """See `AllSum`."""
        ...


@dataclass(frozen=True)
class Channel:
    """How the ranks of a run talk to each other."""

    all_gather: AllGather
    all_sum: AllSum | None = None

    def tally(self, value: Any, numbers: Sequence[int]) -> tuple[Any, list[int]]:
        """The first rank's value, and the sum of each number over the ranks. Collective.

        The other ranks pass None. All pass equally many numbers, each from 0 to 2**128 - 1.
        """
        if self.all_sum is not None:
            return _over_sums(self.all_sum, value, numbers)
        answers = self.all_gather([value, list(numbers)])
        return answers[0][0], [sum(each) for each in zip(*(given for _, given in answers), strict=True)]


def all_sum_of(group: object) -> AllSum | None:
    """How a group of ranks adds numbers up; None when it cannot."""
    return group.all_sum if isinstance(group, Sums) else None


def _over_sums(all_sum: AllSum, value: Any, numbers: Sequence[int]) -> tuple[Any, list[int]]:
    payload = b"" if value is None else json.dumps(value, separators=(",", ":")).encode()
    text = [int.from_bytes(payload[begin : begin + 2], "little") for begin in range(0, len(payload), 2)]
    front = [len(payload), *(limb for number in numbers for limb in _limbs(number))]
    room = _power_of_two(len(front)) - len(front)
    total = list(map(int, all_sum([*front, *text[:room], *[0] * (room - len(text))])))
    length, begin = total[0], len(front)
    words = total[begin:]
    missing = -(-length // 2) - room
    if missing > 0:
        size = _power_of_two(missing)
        words += map(int, all_sum([*text[room:], *[0] * (size - max(0, len(text) - room))]))
    sums = [_number(total[place : place + _LIMBS]) for place in range(1, begin, _LIMBS)]
    received = b"".join(word.to_bytes(2, "little") for word in words)[:length]
    return json.loads(received) if length else None, sums


def _power_of_two(words: int) -> int:
    return max(FRAME_WORDS, 1 << (words - 1).bit_length())


def _limbs(number: int) -> list[int]:
    return list(number.to_bytes(_LIMBS, "little"))


def _number(limbs: Sequence[int]) -> int:
    return sum(limb << (_LIMB_BITS * place) for place, limb in enumerate(limbs))
