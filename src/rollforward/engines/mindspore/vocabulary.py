"""The log-probability of given tokens, without the logits of all tokens at once.

The logits of N tokens are N x vocabulary numbers, and their gradient as many again: with a
vocabulary of 49,152 they fill the memory, not the model. So they are computed one slice of tokens
at a time, and computed again in the backward pass:

    l = h W^T - log sum exp(h W^T)       at the target's column; h [N, hidden], W [vocabulary, hidden]
    d l / d logits = onehot(target) - softmax(logits)

This costs one product with W more than keeping the logits would.
"""

from itertools import pairwise

import mindspore as ms
from mindspore import nn, ops

from rollforward.engines.mindspore.model import spread

SLICE_BYTES = 32 * 2**20
"""The logits of a slice take at most this much; about four such arrays are alive at a time."""


def slices_of(tokens: int, vocabulary: int, slice_bytes: int = SLICE_BYTES) -> tuple[tuple[int, int], ...]:
    """(start, end) of each slice of the tokens, as equal as possible."""
    most = max(1, slice_bytes // (4 * vocabulary))
    count = -(-tokens // most)
    edges = [tokens * i // count for i in range(count + 1)]
    return tuple(pairwise(edges))


class TokenLogprobs(nn.Cell):
    """(hidden [N, H], weight [V, H], targets int32 [N]) -> log-probabilities [N].

    N is `tokens`, V `vocabulary`. Differentiable in hidden and weight.
    """

    def __init__(self, tokens: int, vocabulary: int, slice_bytes: int = SLICE_BYTES) -> None:
        super().__init__()
        self.slices = slices_of(tokens, vocabulary, slice_bytes)
        self.vocabulary = vocabulary
        self.times_transposed = ops.MatMul(transpose_b=True)
        self.transposed_times = ops.MatMul(transpose_a=True)
        self.times = ops.MatMul()
        self.log_softmax = ops.LogSoftmax(-1)
        self.on = ms.Tensor(1.0, ms.float32)
        self.off = ms.Tensor(0.0, ms.float32)

    def construct(self, hidden: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor) -> ms.Tensor:
        """See the class."""
        pieces: tuple[ms.Tensor, ...] = ()
        after = hidden
        for start, end in self.slices:
            # Slices are independent, and would all be computed, and kept, at once.
            rows = ops.depend(hidden[start:end], after)
            all_logprobs = self.log_softmax(self.times_transposed(rows, weight))
            piece = ops.gather_elements(all_logprobs, 1, targets[start:end].expand_dims(1))
            pieces = (*pieces, piece)
            after = piece
        return ops.concat(pieces, 0).reshape(-1)

    def bprop(
        self, hidden: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor, _: ms.Tensor, dout: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
        """The gradients of hidden and weight; the targets have none."""
        # Scaled by dout here and at the end: the logits of a slice are then touched by no broadcast
        # (see `model.spread`).
        scale = spread(dout.expand_dims(1), hidden.shape)
        scaled = hidden * scale
        pieces: tuple[ms.Tensor, ...] = ()
        weight_gradient = ops.zeros_like(weight)
        for start, end in self.slices:
            rows = ops.depend(hidden[start:end], weight_gradient)
            probabilities = ops.exp(self.log_softmax(self.times_transposed(rows, weight)))
            # Made from `rows`, and so not made for all slices at once.
            chosen = ops.one_hot(ops.depend(targets[start:end], rows), self.vocabulary, self.on, self.off)
            difference = chosen - probabilities
            pieces = (*pieces, self.times(difference, weight))
            weight_gradient = weight_gradient + self.transposed_times(difference, scaled[start:end])
        return ops.concat(pieces, 0) * scale, weight_gradient, ops.zeros_like(targets)
