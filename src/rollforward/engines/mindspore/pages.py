"""Where the keys and values of a sample are: in pages of one cache, those of its prompt shared with others.

    a layer's keys    [pages * kv_heads * PAGE, head_dim]; its values likewise
    a sample sees     the pages of its prompt, then its own, one after the other

A prompt's tokens fill an area of pages from its beginning; a sample's own begin on a new page, with the last
token of the prompt, which the decoding step runs once more: that is how the first token is drawn. What is
left of the prompt's last page is hidden. So where a column lies among those that a sample sees is a function
of its own prompt's length and of its own tokens, whoever is in the batch; and siblings share a prompt's pages
without a copy. (The idea of pages is PagedAttention's: Kwon et al., 2023.)

There are as many areas for prompts as slots for samples, so that every sample may have its own, and one more
area and one more page, in which rows that fill up a batch write, and from which nothing that counts is read.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollforward.grpo.types import Bools, Ints

PAGE = 16
"""Columns of a page. The last digits of softmax were the same for all widths that are multiples of it."""


@dataclass(frozen=True)
class Seen:
    """What the rows of one decoding step see, and where they write."""

    positions: Ints
    """[B, 1]; in the sequence, for the rotary embedding."""
    places: Ints
    """[B * kv_heads]; the row of the cache that takes each key."""
    blocks: Ints
    """[B * kv_heads * pages]; the block of PAGE rows of the cache for each page that is looked at."""
    hidden: Bools
    """[B, pages * PAGE]"""


class Pages:
    """The layout of a cache for `slots` samples at a time. Slot `slots` is the one of nobody."""

    def __init__(self, *, slots: int, prompt_length: int, max_tokens: int, kv_heads: int) -> None:
        self.slots = slots
        self.of_prompt, self.own = -(-prompt_length // PAGE), -(-max_tokens // PAGE)
        self.most = -(-(prompt_length - 1) // PAGE) + self.own
        """That a sample looks at."""
        self._first_own = (slots + 1) * self.of_prompt
        self._nowhere = self._first_own + slots * self.own
        self._heads = np.arange(kv_heads, dtype=np.int32)
        self.rows = (self._nowhere + 1) * kv_heads * PAGE
        """Of the cache."""

    def needed(self, lengths: Ints, drawn: Ints) -> int:
        """Pages that samples look at whose prompts have these lengths, after these numbers of tokens."""
        return int((shown(lengths) + drawn // PAGE + 1).max())

    def of_prompts(self, areas: Ints, width: int) -> Ints:
        """The rows of the cache for `width` columns of prompts in these areas: [areas * kv_heads * width]."""
        columns = np.arange(width, dtype=np.int32)
        pages = areas[:, None] * self.of_prompt + columns // PAGE
        return self._rows_of(pages, columns % PAGE).reshape(-1)

    def seen(self, slots: Ints, areas: Ints, lengths: Ints, drawn: Ints, pages: int) -> Seen:
        """For samples in these slots, with prompts in these areas, of these lengths.

        `drawn`: tokens before the one that is drawn now; `pages`: how many are looked at, at least `needed`.
        """
        prompt = shown(lengths)[:, None]
        numbers = np.arange(pages, dtype=np.int32)
        own = numbers - prompt
        exists = (own < self.own) & (slots < self.slots)[:, None]
        own = np.where(exists, self._first_own + slots[:, None] * self.own + own, self._nowhere)
        table = np.where(numbers < prompt, areas[:, None] * self.of_prompt + numbers, own).astype(np.int32)
        columns = np.arange(pages * PAGE, dtype=np.int32)
        begin, last = prompt * PAGE, prompt * PAGE + drawn[:, None]
        visible = (columns < lengths[:, None] - 1) | ((columns >= begin) & (columns <= last))
        current = np.take_along_axis(table, last // PAGE, axis=1)
        blocks = table[:, None, :] * len(self._heads) + self._heads[:, None]
        return Seen(
            positions=(lengths - 1 + drawn)[:, None].astype(np.int32),
            places=self._rows_of(current, (drawn % PAGE)[:, None]).reshape(-1),
            blocks=blocks.astype(np.int32).reshape(-1),
            hidden=~visible,
        )

    def _rows_of(self, pages: NDArray[np.int32], offsets: NDArray[np.int32]) -> Ints:
        """[B, n] and [B or 1, n] -> [B, kv_heads, n]."""
        blocks = pages[:, None, :] * len(self._heads) + self._heads[:, None]
        return (blocks * PAGE + np.atleast_2d(offsets)[:, None, :]).astype(np.int32)


def shown(lengths: Ints) -> Ints:
    """Pages of a prompt that its samples see: all tokens but the last, which the decoding step runs."""
    return -(-(lengths - 1) // PAGE)
