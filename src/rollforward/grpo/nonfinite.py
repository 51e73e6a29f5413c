"""What the trainer knows about the samples when one of their numbers is not finite.

Whoever finds the number (a verifier's caller, the engine) raises NonFinite with the rows at fault and
the arrays it has computed. The trainer adds what only it knows: the step, the prompts, the texts, and
all inputs of the computation. Writing it to disk happens elsewhere.
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
    """The samples that one worker computed on, one per row."""

    position: Position
    phase: str
    """As reported to the observer: `verify`, `reference`, `update`."""
    chunk: int | None
    """The chunk that the rows belong to; None for the rows of all chunks, in order."""
    iteration: int | None
    """Which optimizer step on this experience, if it is about one."""
    prompts: Sequence[Prompt]
    completions: Sequence[str]
    at_fault: Sequence[int]
    """Row numbers; empty when the number is over all rows together."""
    facts: Mapping[str, Any]
    """Numbers and names."""
    arrays: Mapping[str, NDArray[Any]]
    """Inputs and results, [B, ...] each unless the name says otherwise."""


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
    """Attaches evidence to a NonFinite raised inside it; `arrays` are the inputs."""
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
    """The values, [B, ...]; NonFinite, naming `what` and the rows, unless all of them are finite."""
    rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1)).tolist()
    if rows:
        name = f"computed.{what.replace(' ', '_')}"
        raise NonFinite(
            f"{what} of samples {rows}: not finite", hint=hint, samples=rows, arrays={name: values}
        )
    return values
