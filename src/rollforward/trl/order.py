"""The order of the data, by epoch.

TRL's `RepeatSampler` shuffles with a generator that lives as long as the process: its second pass has the
second order. A resumed process makes its first pass in a later epoch and would repeat the order of epoch 0.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class OrderOfEpoch(Sampler):
    """A `RepeatSampler` whose pass for an epoch has the order that an uninterrupted process would give it."""

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self._sampler = sampler
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        if sampler.shuffle:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(self._epoch()):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return iter(sampler)

    def __len__(self) -> int:
        return len(self._sampler)
