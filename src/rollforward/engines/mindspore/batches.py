"""Samples as the graphs take them: in rows, a prompt once for its completions, as `grpo.packing` has it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from rollforward.grpo.packing import Ladder, MicroBatch, micro_batches
from rollforward.grpo.types import Bools, EngineSettings, Floats, Ints, TokenBatch
from rollforward.models.config import ModelConfig

WEIGHTS_TO_A_SCORE = 128
"""Attention's cost: a score of one head takes as long as a column's products with so many weights.

Measured on a CPU with AVX-512, forward and backward: 110 with the demo's model, 170 with one of 26.8 M.
"""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Samples without their padding."""

    prompts: Sequence[Ints]
    completions: Sequence[Ints]
    groups: Sequence[int]
    """Of each sample; those of one number have the same prompt, and may share it."""


def chunk_of(tokens: TokenBatch, rows: slice = slice(None)) -> Chunk:
    """The real tokens of each sample, in order; of the samples in `rows` only."""
    prompts = [ids[mask] for ids, mask in zip(tokens.prompt_ids[rows], tokens.prompt_mask[rows], strict=True)]
    completions = zip(tokens.completion_ids[rows], tokens.completion_mask[rows], strict=True)
    numbers: dict[bytes, int] = {}
    return Chunk(
        prompts=prompts,
        completions=[ids[mask] for ids, mask in completions],
        groups=[numbers.setdefault(each.tobytes(), len(numbers)) for each in prompts],
    )


def packed(chunk: Chunk, ladder: Ladder, counts: Bools | None = None) -> tuple[MicroBatch, ...]:
    """The micro-batches of a chunk. Samples for which `counts` is false are left out."""
    return micro_batches(
        [len(each) for each in chunk.prompts],
        [len(each) for each in chunk.completions],
        chunk.groups,
        ladder,
        counts,
    )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The columns of a micro-batch, int32 [rows, width] each, and what they predict.

    Where there is nothing, ids and positions are 0, groups and samples -1: such columns see each other only.
    """

    ids: Ints
    positions: Ints
    """The place of a token in its own sample."""
    groups: Ints
    """Numbers within the row."""
    samples: Ints
    """0: of the prompt; else the number of the sample within the row, from 1."""
    predictors: Ints
    """For each token that is predicted, the column that does, counted through all rows."""
    targets: Ints
    """The token that is predicted; -1 where there is none."""

    def arrays(self) -> tuple[Ints, ...]:
        """In the order in which graphs take them."""
        return tuple(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which token of which sample is predicted where: index arrays, one entry for each such token."""

    samples: NDArray[np.intp]
    tokens: NDArray[np.intp]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]

    def take(self, array: Floats, shape: tuple[int, int]) -> Floats:
        """[B, T] or [B] as [rows, width]: 0, so that it does not count, where nothing is predicted."""
        found = np.zeros(shape, np.float32)
        found[self.rows, self.columns] = (
            array[self.samples] if array.ndim == 1 else array[self.samples, self.tokens]
        )
        return found

    def put_back(self, array: Floats, computed: Floats) -> None:
        """Write what was computed, [rows, width], to the samples that it is of, [B, T]."""
        array[self.samples, self.tokens] = computed[self.rows, self.columns]


def laid_out(chunk: Chunk, batch: MicroBatch) -> tuple[Rows, Places]:
    """The rows of a micro-batch."""
    height, width = batch.shape
    ids, positions, predictors = (np.zeros(batch.shape, np.int32) for _ in range(3))
    groups, samples, targets = (np.full(batch.shape, -1, np.int32) for _ in range(3))
    places: list[tuple[int, int, int, int]] = []

    def put(row: int, start: int, tokens: Ints, *, position: int, group: int, sample: int) -> int:
        end = start + len(tokens)
        ids[row, start:end] = tokens
        positions[row, start:end] = np.arange(position, position + len(tokens))
        groups[row, start:end] = group
        samples[row, start:end] = sample
        return end

    for row, members in enumerate(batch.rows):
        column = predicted = number = 0
        for group, inside in enumerate(members):
            prompt = chunk.prompts[inside[0]]
            column = put(row, column, prompt, position=0, group=group, sample=0)
            last = column - 1
            for sample in inside:
                completion, start = chunk.completions[sample], column
                number += 1
                # The last token predicts nothing.
                column = put(row, column, completion[:-1], position=len(prompt), group=group, sample=number)
                end = predicted + len(completion)
                predictors[row, predicted:end] = [last, *range(start, column)]
                targets[row, predicted:end] = completion
                places += [(sample, token, row, predicted + token) for token in range(len(completion))]
                predicted = end
    predictors += width * np.arange(height, dtype=np.int32)[:, None]
    index = np.array(places, np.intp).T
    return (
        Rows(
            ids=ids,
            positions=positions,
            groups=groups,
            samples=samples,
            predictors=predictors,
            targets=targets,
        ),
        Places(samples=index[0], tokens=index[1], rows=index[2], columns=index[3]),
    )


def ladder_of(settings: EngineSettings) -> Ladder:
    """The shapes of an engine's micro-batches."""
    model = ModelConfig.parse(settings.model_config)
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim * model.hidden_size
    weights = attention + 3 * model.hidden_size * model.intermediate
    longest = settings.prompt_length + settings.sampling.max_tokens
    return Ladder.of(
        prompt_length=settings.prompt_length,
        max_tokens=settings.sampling.max_tokens,
        samples=settings.samples_per_micro_batch,
        even=max(1, weights // model.heads // WEIGHTS_TO_A_SCORE),
        # All angles of a sample follow from its length then: not even a prompt can be shared.
        alone=model.rope.kind == "dynamic" and longest > model.rope.max_positions,
    )
