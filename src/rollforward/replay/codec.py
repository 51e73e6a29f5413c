"""Chunks of rollouts and outcomes of updates, as the arrays that a journal record holds.

Lossless: `unpack(pack(chunk))` has the same bits. Padding is not stored, a prompt is stored once
for all its completions, and ids take two bytes if the vocabulary allows it. That is 6 bytes per
completion token (id and reference log-probability), or 8 with four-byte ids.

    prompt_indices      int32 [B]           completion_ids        uint16 or int32 [sum of lengths]
    prompt_ids          uint16 or int32     completion_lengths    int32 [B]
    prompt_lengths      int32 [prompts]     reference_logprobs    float32 [sum of lengths]
    prompt_of           int32 [B]           rewards               float32 [B, verifiers]
                                            stopped               bool [B]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.grpo.types import Bools, Ints, RolloutChunk, TokenBatch, UpdateOutcome
from rollforward.store.journal.records import Record

Arrays = dict[str, NDArray[Any]]

_MAX_CELLS = 1 << 25
"""Limit for a padded array, 9 bytes per cell, when reading a record whose proper width is unknown."""
_ARRAYS = {
    "prompt_indices": ("i4",),
    "prompt_ids": ("u2", "i4"),
    "prompt_lengths": ("i4",),
    "prompt_of": ("i4",),
    "completion_ids": ("u2", "i4"),
    "completion_lengths": ("i4",),
    "reference_logprobs": ("f4",),
    "rewards": ("f4",),
    "stopped": ("b1",),
}
"""Name -> the allowed dtypes."""


@dataclass(frozen=True, kw_only=True)
class RecordedOutcome:
    """What the journal records about an update."""

    loss: float
    grad_norm: float
    kl: float
    clip_fraction: float
    learning_rate: float
    weights: str
    """Digest of the policy after the update; empty if none was taken."""


@dataclass(frozen=True, kw_only=True)
class ChunkShape:
    """What the trainer that will use a chunk knows about it."""

    samples: int
    prompt_width: int
    completion_width: int
    verifiers: int
    prompts: int
    """In the dataset."""
    vocabulary: int
    """Token ids are below it."""


def pack(chunk: RolloutChunk) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of a rollouts record.

    ValueError when prompts are not left-padded or completions not right-padded with one value each,
    or when a masked log-probability is not 0: that could not be restored exactly.
    """
    tokens = chunk.tokens
    prompt_of, firsts = _distinct_prompts(tokens)
    prompt_mask = tokens.prompt_mask[firsts]
    if (np.diff(tokens.prompt_mask.astype(np.int8), axis=1) < 0).any():
        raise ValueError("a prompt that is not left-padded")
    if (np.diff(tokens.completion_mask.astype(np.int8), axis=1) > 0).any():
        raise ValueError("a completion that is not right-padded")
    if chunk.reference_logprobs[~tokens.completion_mask].view(np.uint32).any():
        raise ValueError("a masked reference log-probability that is not 0")
    arrays: Arrays = {
        "prompt_indices": chunk.prompt_indices,
        "prompt_ids": _compact(tokens.prompt_ids[firsts][prompt_mask]),
        "prompt_lengths": prompt_mask.sum(axis=1, dtype=np.int32),
        "prompt_of": prompt_of,
        "completion_ids": _compact(tokens.completion_ids[tokens.completion_mask]),
        "completion_lengths": tokens.completion_mask.sum(axis=1, dtype=np.int32),
        "reference_logprobs": chunk.reference_logprobs[tokens.completion_mask],
        "rewards": chunk.rewards,
        "stopped": chunk.stopped,
    }
    metadata = {
        "prompt_width": str(tokens.prompt_ids.shape[1]),
        "prompt_pad": str(_pad_value(tokens.prompt_ids, tokens.prompt_mask)),
        "completion_width": str(tokens.completion_ids.shape[1]),
        "completion_pad": str(_pad_value(tokens.completion_ids, tokens.completion_mask)),
    }
    return arrays, metadata


def unpack(record: Record, expected: ChunkShape | None = None) -> RolloutChunk:
    """The chunk that `pack` was given; ValueError when the record holds none, or an unexpected one.

    This finds what a digest cannot: arrays that contradict each other. Padding may take
    much more memory than the record, so nothing is padded until all of them agree.
    """
    _check(record, expected)
    arrays = record.arrays
    prompt_of = arrays["prompt_of"]
    distinct_mask = _mask(arrays["prompt_lengths"], record.number("prompt_width"))[:, ::-1]
    completion_mask = _mask(arrays["completion_lengths"], record.number("completion_width"))
    prompt_ids = _spread(arrays["prompt_ids"], distinct_mask, record.number("prompt_pad"))[prompt_of]
    tokens = TokenBatch(
        prompt_ids=np.ascontiguousarray(prompt_ids),
        prompt_mask=np.ascontiguousarray(distinct_mask[prompt_of]),
        completion_ids=_spread(arrays["completion_ids"], completion_mask, record.number("completion_pad")),
        completion_mask=completion_mask,
    )
    logprobs = np.zeros(completion_mask.shape, dtype=np.float32)
    logprobs[completion_mask] = arrays["reference_logprobs"]
    return RolloutChunk(
        prompt_indices=arrays["prompt_indices"].astype(np.int32),
        tokens=tokens,
        stopped=arrays["stopped"].astype(np.bool_),
        rewards=arrays["rewards"].astype(np.float32),
        reference_logprobs=logprobs,
    )


def _check(record: Record, expected: ChunkShape | None) -> None:
    """Raise a one-line ValueError unless all arrays and numbers of a record agree with each other."""
    arrays = record.arrays
    if arrays.keys() != _ARRAYS.keys():
        raise ValueError(f"not a record of rollouts: its arrays are {sorted(arrays)[:12]}")
    for name, dtypes in _ARRAYS.items():
        ndim = 2 if name == "rewards" else 1
        if arrays[name].dtype.str.lstrip("<|") not in dtypes or arrays[name].ndim != ndim:
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
    samples, prompts = len(arrays["prompt_of"]), len(arrays["prompt_lengths"])
    _need(samples > 0, "it has no samples")
    for name in ("prompt_indices", "completion_lengths", "rewards", "stopped"):
        _need(len(arrays[name]) == samples, f"{samples} samples, and {len(arrays[name])} of {name}")
    _within(arrays, "prompt_of", 0, prompts)
    _within(arrays, "prompt_indices", 0, expected.prompts if expected else 1 << 31)
    for name in ("prompt", "completion"):
        width, lengths = record.number(f"{name}_width"), arrays[f"{name}_lengths"]
        _within(arrays, f"{name}_lengths", 1, width + 1)
        tokens = int(lengths.sum(dtype=np.int64))
        _need(len(arrays[f"{name}_ids"]) == tokens, f"{name}_ids are not as many as {name}_lengths say")
        _within(arrays, f"{name}_ids", 0, expected.vocabulary if expected else 1 << 31)
        _need(record.number(f"{name}_pad") < 1 << 31, f"{name}_pad is not a token id")
        if expected is None:
            _need(max(samples, prompts) * width <= _MAX_CELLS, f"{samples} samples of {width} tokens")
    _need(
        len(arrays["reference_logprobs"]) == len(arrays["completion_ids"]),
        "reference_logprobs are not as many as completion_ids",
    )
    for name in ("reference_logprobs", "rewards"):
        _need(bool(np.isfinite(arrays[name]).all()), f"{name} are not all finite")
    if expected is not None:
        found = (samples, record.number("prompt_width"), record.number("completion_width"))
        wanted = (expected.samples, expected.prompt_width, expected.completion_width)
        _need(found == wanted, f"samples and widths are {found}, where this run has {wanted}")
        _need(prompts <= samples, f"{prompts} prompts of {samples} samples")
        _need(arrays["rewards"].shape[1] == expected.verifiers, "rewards of other verifiers")


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _within(arrays: Mapping[str, NDArray[Any]], name: str, low: int, high: int) -> None:
    values = arrays[name]
    _need(
        values.size == 0 or (int(values.min()) >= low and int(values.max()) < high),
        f"{name} are not all from {low} to {high - 1}",
    )


def pack_outcome(outcome: UpdateOutcome, learning_rate: float, weights: str) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of an outcome record."""
    values = {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "kl": outcome.kl,
        "clip_fraction": outcome.clip_fraction,
        "learning_rate": learning_rate,
    }
    arrays: Arrays = {name: np.array(value, dtype=np.float64) for name, value in values.items()}
    return arrays, {"weights": weights} if weights else {}


def unpack_outcome(record: Record) -> RecordedOutcome:
    """What `pack_outcome` was given; ValueError when the record does not hold it."""
    names = ("loss", "grad_norm", "kl", "clip_fraction", "learning_rate")
    try:
        values = {name: float(record.arrays[name]) for name in names}
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of an outcome: {error}") from None
    return RecordedOutcome(**values, weights=record.metadata.get("weights", ""))


def _distinct_prompts(tokens: TokenBatch) -> tuple[Ints, NDArray[np.intp]]:
    """The prompt number of each sample, and the first sample of each prompt; only neighbours are merged."""
    ids, mask = tokens.prompt_ids, tokens.prompt_mask
    new = np.ones(len(ids), dtype=np.bool_)
    new[1:] = (ids[1:] != ids[:-1]).any(axis=1) | (mask[1:] != mask[:-1]).any(axis=1)
    return (np.cumsum(new) - 1).astype(np.int32), np.flatnonzero(new)


def _compact(ids: Ints) -> NDArray[Any]:
    if ids.size == 0 or (ids.min() >= 0 and ids.max() < 1 << 16):
        return ids.astype(np.uint16)
    return ids


def _pad_value(ids: Ints, mask: Bools) -> int:
    padding = ids[~mask]
    if padding.size == 0:
        return 0
    if (padding != padding[0]).any() or padding[0] < 0:
        raise ValueError("padding of more than one value, or a negative one")
    return int(padding[0])


def _mask(lengths: NDArray[Any], width: int) -> Bools:
    """[rows, width]; True on the first `length` of each row."""
    mask: Bools = np.arange(width) < lengths[:, None]
    return mask


def _spread(flat: NDArray[Any], mask: Bools, pad: int) -> Ints:
    """Put values into the True cells of a mask, row by row, and padding elsewhere."""
    out = np.full(mask.shape, pad, dtype=np.int32)
    out[mask] = flat
    return out
