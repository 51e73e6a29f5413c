"""What is known of the samples when a number of theirs is not finite: what the trainer can tell.

Whoever finds the number (a verifier's caller, the engine) raises NonFinite with the rows at fault and
the arrays that it has computed. The trainer adds what only it knows: the step, the prompts, the texts,
and all that went into the computation. Writing it down is the business of others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import NonFinite
from rollforward.grpo.types import Floats, Prompt, TokenBatch
from rollforward.position import Position


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The samples that one worker computed on, one a row."""

    position: Position
    phase: str
    """As the observer is told: `verify`, `reference`, `update`."""
    chunk: int | None
    """The chunk that the rows are; None for those of all chunks, in order."""
    iteration: int | None
    """Of the optimizer steps on this experience, where it is about one."""
    prompts: Sequence[Prompt]
    completions: Sequence[str]
    at_fault: Sequence[int]
    """Rows; empty where the number is of all of them together."""
    facts: Mapping[str, Any]
    """Numbers and names."""
    arrays: Mapping[str, NDArray[Any]]
    """What went in and what was computed, [B, ...] each unless its name says otherwise."""


def arrays_of(tokens: TokenBatch) -> dict[str, NDArray[Any]]:
    """The tokens, by name."""
    return {
        "prompt_ids": tokens.prompt_ids,
        "prompt_mask": tokens.prompt_mask,
        "completion_ids": tokens.completion_ids,
        "completion_mask": tokens.completion_mask,
    }


@contextmanager
def known_of(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    position: Position,
    phase: str,
    arrays: Mapping[str, NDArray[Any]],
    chunk: int | None = None,
    iteration: int | None = None,
) -> Iterator[None]:
    """A NonFinite that is raised within it leaves it with its evidence; `arrays` are what goes in."""
    try:
        yield
    except NonFinite as error:
        error.evidence = Evidence(
            position=position,
            phase=phase,
            chunk=chunk,
            iteration=iteration,
            prompts=prompts,
            completions=completions,
            at_fault=error.samples,
            facts=error.facts,
            arrays={**arrays, **error.arrays},
        )
        raise


def check_finite(what: str, values: Floats, hint: str) -> Floats:
    """The values, [B, ...]; NonFinite, naming `what` and the rows, when not all of them are finite."""
    rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1)).tolist()
    if rows:
        name = f"computed.{what.replace(' ', '_')}"
        raise NonFinite(
            f"{what} of samples {rows}: not finite", hint=hint, samples=rows, arrays={name: values}
        )
    return values
