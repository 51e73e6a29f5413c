"""Which sizes of a batch may stand for each other: with them a row has the same bits, at any place.

Of the product `W @ x.T`, which decides (see `decoding`), in MindSpore 2.10 on the CPU:

    AVX-512     any number of rows from 2 on
    AVX2        any place, where there are up to 16 rows or a multiple of 16. The bits are those of others for
                multiples up to 64; below, 1, 2 to 8 and 9 to 16 rows have different ones
    others      not tried: only a batch of one size is taken to repeat itself

So a step has as few rows as it can where that is free, and always the same number where it is not.
"""

from dataclasses import dataclass

from rollforward.inputs import read_input

_MOST_BYTES = 1 << 24
_BLOCK, _BLOCKS = 16, 4
"""Rows that AVX2's kernels compute together, and up to how many such blocks have the same bits."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Those of a processor."""

    avx512: bool
    avx2: bool

    @classmethod
    def here(cls) -> "Kernels":
        """This machine's."""
        try:
            told = read_input("/proc/cpuinfo", _MOST_BYTES)
        except OSError:
            told = b""
        flags = told.partition(b"\nflags")[2].partition(b"\n")[0].split()
        return cls(avx512=b"avx512bw" in flags, avx2=b"avx2" in flags)

    def rows(self, most: int) -> tuple[int, ...]:
        """Of a decoding step, for up to `most` samples; ascending."""
        if self.avx512:
            return ladder(max(most, 2), 4, least=2)
        if most <= _BLOCK:
            return (max(most, 2),)
        blocks = -(-most // _BLOCK)
        free = self.avx2 and blocks <= _BLOCKS
        return tuple(_BLOCK * each for each in (ladder(blocks, 4) if free else (blocks,)))

    def prompts(self, alone: int, together: int) -> tuple[int, int]:
        """Of a prefill, for few and for many."""
        return (alone, max(alone, together)) if self.avx512 else (alone, alone)


def ladder(most: int, factor: int, least: int = 1) -> tuple[int, ...]:
    """`most`, and it divided by the powers of the factor and rounded up, not below `least`; ascending."""
    found = [most]
    while -(-found[-1] // factor) >= least and found[-1] > 1:
        found.append(-(-found[-1] // factor))
    return tuple(reversed(found))


def rung(number: int, rungs: tuple[int, ...]) -> int:
    """The lowest that is not below the number, which is at most the highest."""
    return next(each for each in rungs if each >= number)
