"""Drawing a token: temperature, then top-k, then top-p, then inversion of the cumulative distribution."""

import mindspore as ms
from mindspore import Tensor, nn, ops

from rollforward.engines.mindspore.model import spread
from rollforward.grpo.types import SamplingSettings

BELOW_ONE = 1.0 - 2.0**-23
"""Keeps `uniform * total` below `total` after rounding to float32, so that inversion always finds a token."""


class Sampler(nn.Cell):
    """One token for each row of logits, by inverting the cumulative distribution.

    The token is the first whose cumulative probability, in the order of ids, exceeds the uniform
    number. Filters keep every token that ties with the last one kept. Top-p keeps the smallest set
    of most probable tokens that reaches `top_p` (Holtzman et al., 2020), after top-k.
    """

    def __init__(self, sampling: SamplingSettings, vocab_size: int) -> None:
        super().__init__()
        self.greedy = sampling.temperature == 0
        self.inverse_temperature = 1.0 if self.greedy else 1.0 / sampling.temperature
        self.top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size
        self.filters_k = self.top_k < vocab_size
        self.top_p = sampling.top_p
        self.filters_p = sampling.top_p < 1
        self.last = vocab_size - 1
        self.largest = ops.TopK(sorted=True)

    def weights(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B, V]: probabilities up to a factor, 0 where filtered."""
        highest = logits.max(-1, keepdims=True)
        weights = ops.exp((logits - spread(highest, logits.shape)) * self.inverse_temperature)
        if self.filters_k or self.filters_p:
            descending, _ = self.largest(weights, self.top_k)
            least = descending[:, -1:]
            if self.filters_p:
                before = ops.cumsum(descending, -1) - descending
                enough = descending.sum(-1, keepdims=True) * self.top_p
                kept = before < spread(enough, before.shape)
                # The kept ones come first, so their minimum is the minimum with dropped ones counted as 1.
                least = ops.select(kept, descending, ops.ones_like(descending)).min(-1, keepdims=True)
            weights = weights * (weights >= spread(least, weights.shape)).astype(ms.float32)
        return weights

    def construct(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """float32 [B, V] and [B] -> int32 [B]."""
        if self.greedy:
            return ops.argmax(logits, -1).astype(ms.int32)
        cumulative = ops.cumsum(self.weights(logits), -1)
        target = uniforms.expand_dims(-1) * BELOW_ONE * cumulative[:, -1:]
        # A binary search: to compare all took as long as the rest of the sampler.
        found = ops.searchsorted(cumulative, target, right=True).reshape(-1).astype(ms.int32)
        # Where nothing is a number, nothing is larger than the target either.
        return ops.minimum(found, self.last)
