"""How the samples of a chunk are put together to be learnt from, so that the cost follows their tokens.

An engine computes in rectangles, and what is padding costs as much as what is not. So samples stand behind
one another in rows, as many as there is room for, and the prompt of a group stands once for all of its
completions that are in the row:

    prompt A  completion A1  completion A2  prompt B  completion B1  padding

Rows have one of a few widths, since an engine may have to build something for each shape, which takes time
and memory: the widest holds the longest sample that there can be, or several where samples are short
(`Ladder`), and each of the others is half of the one before. A row begins with the longest sample that waits,
and takes what still fits; of the widths that hold this one, it has the one with the most completion tokens
for its cost.

All of it is a function of the lengths and prompts of the chunk's samples and of the run's settings, and of
nothing else: not of who computes the chunk, nor of what other chunks there are. So the sums that an engine
makes in these shapes have the same bits on any number of workers, when resumed, and when replayed.

Left out: the best packing. Longest first is at most a few columns from it, and takes no time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

LEAST = 128
"""Columns of the narrowest row where there are several widths, and of the smallest shape of several rows."""
TOGETHER = 1024
"""More columns than these are computed together only where a sample has more: it would but cost memory."""
SHARING = 6
"""A row is made wider than one sample until attention among its columns is this part of all other cost."""

Lengths = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Ladder:
    """The shapes that micro-batches of a run may have, and what they cost."""

    widths: tuple[int, ...]
    """Of rows, descending."""
    columns: int
    """The most that are computed together, but for a single row."""
    even: int
    """The width of a row in which comparing all columns with each other costs as much as everything else."""
    alone: bool = False
    """Whether a row holds one sample only."""

    @classmethod
    def of(
        cls, *, prompt_length: int, max_tokens: int, samples: int, even: int, alone: bool = False
    ) -> "Ladder":
        """For samples of at most these lengths, and the memory that `samples` of the longest take.

        The widest row holds 1, 2, 4, 8 ... of the longest completions of one prompt.
        """
        # The last token of a sample predicts nothing: it needs no column.
        longest = prompt_length + max_tokens - 1
        columns = min(samples * longest, max(TOGETHER, longest))
        widest, wider = longest, 0 if alone or max_tokens == 1 else longest + max_tokens - 1
        while 0 < wider <= min(columns, even // SHARING):
            widest, wider = wider, 2 * wider - prompt_length
        return cls(widths=rungs(widest, LEAST), columns=columns, even=even, alone=alone)

    def rows(self, width: int) -> int:
        """The most rows of a micro-batch."""
        return max(1, self.columns // width)

    def height(self, rows: int, width: int) -> int:
        """That of the shape for so many rows: the most that there can be, a half of it, a quarter ..."""
        return rung(rows, self.rows(width), -(-LEAST // width))

    def cost(self, width: int) -> int:
        """Of a row; only ratios mean something."""
        return width * (width + self.even)


@dataclass(frozen=True)
class MicroBatch:
    """Samples that are computed together, and the shape in which they are."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    """Of each row its groups, of each group its samples, by their numbers in the chunk."""
    height: int
    """Rows of the shape: those that are here, and maybe empty ones."""
    width: int
    """Columns of a row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.height, self.width


def rungs(limit: int, least: int) -> tuple[int, ...]:
    """The limit, its half, its quarter ... down to `least`, rounded up."""
    found = [limit]
    while found[-1] > 1 and -(-found[-1] // 2) >= least:
        found.append(-(-found[-1] // 2))
    return tuple(found)


def rung(length: int, limit: int, least: int) -> int:
    """The smallest rung that holds `length`, which is at most `limit`."""
    return min(each for each in rungs(limit, least) if each >= length)


def micro_batches(
    prompts: Lengths,
    completions: Lengths,
    groups: Sequence[int],
    ladder: Ladder,
    counts: Sequence[bool] | NDArray[np.bool_] | None = None,
) -> tuple[MicroBatch, ...]:
    """The micro-batches of a chunk, in the order in which they are added up.

    `prompts` and `completions`: the lengths of each sample's; samples of one number in `groups` have the same
    prompt. Samples for which `counts` is false, and those without a token, are left out.
    """
    taken = [
        sample for sample, length in enumerate(completions) if length and (counts is None or counts[sample])
    ]
    taken.sort(key=lambda sample: -int(completions[sample]))
    packer = _Packer(prompts, completions, groups, ladder)
    found = []
    rows = sorted(packer.rows(taken), key=lambda row: -row.width)
    for width, of_width in groupby(rows, key=lambda row: row.width):
        equal = [row.groups for row in of_width]
        most = ladder.rows(width)
        for start in range(0, len(equal), most):
            part = tuple(equal[start : start + most])
            found.append(MicroBatch(rows=part, height=ladder.height(len(part), width), width=width))
    return tuple(found)


@dataclass(frozen=True)
class _Row:
    width: int
    groups: tuple[tuple[int, ...], ...]
    tokens: int
    """Of the completions in it."""


@dataclass(frozen=True)
class _Packer:
    prompts: Lengths
    completions: Lengths
    groups: Sequence[int]
    ladder: Ladder

    def rows(self, waiting: Sequence[int]) -> Iterator[_Row]:
        """Rows with all samples of `waiting`, which has the longest first."""
        while waiting:
            needed = int(self.prompts[waiting[0]]) + int(self.completions[waiting[0]]) - 1
            rows = [self._filled(width, waiting) for width in self.ladder.widths if width >= needed]
            # Exact, so that all workers agree; of equally good ones the narrowest.
            best = max(rows, key=lambda row: (Fraction(row.tokens, self.ladder.cost(row.width)), -row.width))
            yield best
            gone = {sample for group in best.groups for sample in group}
            waiting = [sample for sample in waiting if sample not in gone]

    def _filled(self, width: int, waiting: Sequence[int]) -> _Row:
        """A row of the first of `waiting`, and of what fits after it: its group, then the other groups."""
        by_group: dict[int, list[int]] = {}
        for sample in waiting[:1] if self.ladder.alone else waiting:
            by_group.setdefault(self.groups[sample], []).append(sample)
        columns = tokens = 0
        found = []
        for members in by_group.values():
            prompt = int(self.prompts[members[0]])
            inside: list[int] = []
            for sample in members:
                length = int(self.completions[sample])
                needed = columns + (0 if inside else prompt) + length - 1
                # As many places for what is predicted as there are columns.
                if needed <= width and tokens + length <= width:
                    inside.append(sample)
                    columns, tokens = needed, tokens + length
            if inside:
                found.append(tuple(inside))
        return _Row(width=width, groups=tuple(found), tokens=tokens)
