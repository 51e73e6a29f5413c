"""What is saved when a number is not finite: plain files for people who want to know why.

    evidence/0_7-3/rank_0.json           step 0_7, start 3: what was wrong, numbers, and every sample as text
    evidence/0_7-3/rank_0.safetensors    the input and output arrays, by name

A run stops before such an update is journaled, and a chunk with such a reward or log-probability
never reaches the journal. The weights are unchanged, and the run can be resumed. A run never reads
or removes anything here; the folder may be deleted.

Each worker writes its own samples. Numbers that JSON cannot represent are written as text.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import NonFinite, StorageError
from rollforward.grpo.nonfinite import Evidence
from rollforward.grpo.ports import Group
from rollforward.storage import Storage
from rollforward.store.layout import EVIDENCE
from rollforward.store.tensorfile import ArraySource, write_tensors
from rollforward.tensors import Tensors

_SHOWN = 5
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """The context that the trainer does not know."""

    storage: Storage
    """Of the run."""
    incarnation: int
    verifiers: Sequence[str]
    samples_per_chunk: int
    chunks: Sequence[int]
    """Those of this worker, in the order of its samples."""
    tensors: Tensors
    """The engine's, to check whether the weights are finite."""


def keep(error: NonFinite, group: Group, about: Circumstances) -> NonFinite:
    """Write this worker's evidence; returns the error to raise, which says what and where.

    Collective after an update, which fails on all workers alike: none exits before all have written.
    """
    evidence = error.evidence
    if not isinstance(evidence, Evidence):
        return error
    folder = f"{EVIDENCE}/{evidence.position}-{about.incarnation}"
    try:
        _write(error, evidence, group.rank, folder, about)
        kept = f"evidence: {about.storage}/{folder}"
    except StorageError as problem:
        kept = f"the evidence could not be kept: {problem.message}"
    lines = [f"step {evidence.position}, {_place(evidence)}: {error.message}"]
    if evidence.phase == "update":
        own = list(_in_words(evidence, group.rank, about))
        lines += [line for told in group.all_gather(own) for line in told]
    found = NonFinite("\n".join([*lines, kept]), hint=error.hint, samples=error.samples)
    found.evidence = evidence
    return found


def _write(error: NonFinite, evidence: Evidence, rank: int, folder: str, about: Circumstances) -> None:
    storage = about.storage
    arrays = {name: np.ascontiguousarray(array) for name, array in evidence.arrays.items()}
    name = f"rank_{rank}.safetensors"
    write_tensors(storage, f"{folder}/{name}", {key: ArraySource(array) for key, array in arrays.items()})
    value = {
        "what": error.message,
        "position": str(evidence.position),
        "phase": evidence.phase,
        "iteration": evidence.iteration,
        "incarnation": about.incarnation,
        "rank": rank,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "facts": evidence.facts,
        "weights_not_finite": dict(_not_finite(about.tensors)),
        "arrays": name,
        "samples": list(_samples(evidence, about)),
    }
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    storage.write(f"{folder}/rank_{rank}.json", [text.encode("utf-8", "replace")])


def _samples(evidence: Evidence, about: Circumstances) -> Iterator[dict[str, Any]]:
    rewards: NDArray[Any] | None = evidence.arrays.get("rewards")
    for row, (prompt, completion) in enumerate(zip(evidence.prompts, evidence.completions, strict=True)):
        chunk, sample = _chunk_of(evidence, row, about)
        found = {
            "row": row,
            "chunk": chunk,
            "sample": sample,
            "at_fault": row in evidence.at_fault,
            "prompt_index": prompt.index,
            "prompt": prompt.text,
            "answer": prompt.answer,
            "completion": completion,
        }
        if rewards is not None and rewards.ndim == 2:
            found["rewards"] = dict(zip(about.verifiers, rewards[row].tolist(), strict=False))
        yield found


def _in_words(evidence: Evidence, rank: int, about: Circumstances) -> Iterator[str]:
    for row in evidence.at_fault[:_SHOWN]:
        chunk, sample = _chunk_of(evidence, row, about)
        prompt = evidence.prompts[row]
        yield (
            f"  worker {rank}, sample {row} (sample {sample} of chunk {chunk}, prompt {prompt.index}): "
            f"{_cut(prompt.text)} -> {_cut(evidence.completions[row])}"
        )
    rest = len(evidence.at_fault) - _SHOWN
    if rest > 0:
        yield f"  worker {rank}: and {rest} more"


def _chunk_of(evidence: Evidence, row: int, about: Circumstances) -> tuple[int, int]:
    if evidence.chunk is not None:
        return evidence.chunk, row
    chunk, sample = divmod(row, about.samples_per_chunk)
    return about.chunks[chunk], sample


def _place(evidence: Evidence) -> str:
    if evidence.iteration is not None:
        return f"update {evidence.iteration}"
    return f"chunk {evidence.chunk}"


def _not_finite(tensors: Tensors) -> Iterator[tuple[str, int]]:
    """Role and name of each tensor with non-finite values, and how many there are."""
    for role, named in tensors.items():
        for name, array in named.items():
            # NumPy has no kind for BF16 and FP8; integers are always finite.
            count = 0 if array.dtype.kind in "biu" else int((~np.isfinite(array)).sum())
            if count:
                yield f"{role}/{name}", count


def _plain(value: Any) -> Any:
    """The value, with text in place of numbers that JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _cut(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 4] + "..." + shown[-1]
