"""Every random number of a run, from a counter instead of a state.

Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) maps a key and
a counter to random bits. The key says what the numbers are for, `(seed, purpose)`; the counter
says where, `(epoch, step, sample)`; the lowest counter word increments by itself. So any number
can be computed again at any time, in any order, on any worker, and there is nothing to save.

Only the generator's raw 64-bit words are used, which NumPy keeps stable across versions. It does
not do so for its distributions, so floats and permutations are made here.
"""

import hashlib
import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from rollforward.grpo.types import Floats
from rollforward.position import Position


class Purpose(IntEnum):
    """What a stream is for. The values are part of the run's meaning: never reuse or renumber one."""

    ORDER = 1
    SAMPLING = 2
    ADAPTERS = 3


def _words(seed: int, purpose: Purpose, counter: Sequence[int], count: int) -> NDArray[np.uint64]:
    key = np.array([seed, purpose], dtype=np.uint64)
    start = np.array([0, *counter], dtype=np.uint64)
    return np.asarray(np.random.Philox(counter=start, key=key).random_raw(count), dtype=np.uint64)


def sampling_uniforms(seed: int, position: Position, samples: Sequence[int], tokens: int) -> Floats:
    """Uniform numbers in [0, 1) for sampling: float32 [len(samples), tokens].

    `samples` are places in the step over all workers, so a sample draws the same numbers
    whichever worker generates it. The upper 24 bits of a word fill float32 exactly.
    """
    rows = [
        _words(seed, Purpose.SAMPLING, (sample, position.step, position.epoch), tokens) for sample in samples
    ]
    bits = np.stack(rows) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A random order of `range(count)`, a function of (seed, epoch): int64 [count]."""
    return np.argsort(_words(seed, Purpose.ORDER, (0, 0, epoch), count), kind="stable")


def adapter_values(seed: int, name: str, shape: tuple[int, int]) -> Floats:
    """What an adapter's A [rank, inputs] starts from: float32, uniform within 1 / sqrt(inputs) of 0.

    As PEFT draws it (Kaiming, a = sqrt(5)), but a function of (seed, name): whatever else has an adapter.
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = _words(seed, Purpose.ADAPTERS, (place, 0, 0), math.prod(shape)) >> np.uint64(40)
    centred = bits.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return (centred * np.float32(1.0 / math.sqrt(shape[1]))).reshape(shape)
