"""Batches as the graphs take them: prompts and completions side by side, in pieces of one size."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollforward.grpo.types import Bools, Ints, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Token rows as the graphs take them: prompts left-padded, completions after them. [B, P+T] each."""

    ids: Ints
    mask: Bools


def left_padded(ids: Ints, mask: Bools) -> tuple[Ints, Bools]:
    """Rows with their real tokens moved to the right end, in order."""
    order = np.argsort(mask, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)


def columns(tokens: TokenBatch) -> Columns:
    """Prompts and completions side by side."""
    prompt_ids, prompt_mask = left_padded(tokens.prompt_ids, tokens.prompt_mask)
    return Columns(
        ids=np.concatenate([prompt_ids, tokens.completion_ids], axis=1).astype(np.int32, copy=False),
        mask=np.concatenate([prompt_mask, tokens.completion_mask], axis=1),
    )


def micro_batches(
    rows: int, size: int, arrays: Mapping[str, NDArray], weightless: str = ""
) -> list[dict[str, NDArray]]:
    """The rows cut into pieces of `size`; the last is filled up with its first row.

    A real row and not zeros, so that nothing undefined is computed; in the array named
    `weightless` the fill is 0, so that it counts for nothing.
    """
    pieces = []
    for start in range(0, rows, size):
        take = np.arange(start, start + size)
        missing = take >= rows
        take[missing] = start
        piece = {name: np.ascontiguousarray(array[take]) for name, array in arrays.items()}
        if weightless:
            piece[weightless][missing] = 0
        pieces.append(piece)
    return pieces
