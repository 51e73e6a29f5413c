"""The log-probability of given tokens, without the logits of all tokens at once.

The logits of N tokens are N x vocabulary numbers, and their gradient as many again: with a
vocabulary of 49,152 they fill the memory, not the model. So they are computed one slice of tokens
at a time, and computed again in the backward pass:

    l = h W^T - log sum exp(h W^T)       at the target's column; h [N, hidden], W [vocabulary, hidden]
    d l / d logits = onehot(target) - softmax(logits)

This costs one product with W more than keeping the logits would.

Where the vocabulary is cut over workers, each has the logits of its part. They tell each other two numbers
for each token, from which all compute the same l, and add up their parts of its gradient by h.
"""

from itertools import pairwise

import mindspore as ms
from mindspore import nn, ops

from rollforward.engines.mindspore.model import spread
from rollforward.engines.mindspore.shards import Gathered, Place, Total

SLICE_BYTES = 32 * 2**20
"""The logits of a slice take at most this much; about four such arrays are alive at a time."""


def slices_of(tokens: int, vocabulary: int, slice_bytes: int = SLICE_BYTES) -> tuple[tuple[int, int], ...]:
    """(start, end) of each slice of the tokens, as equal as possible."""
    most = max(1, slice_bytes // (4 * vocabulary))
    count = -(-tokens // most)
    edges = [tokens * i // count for i in range(count + 1)]
    return tuple(pairwise(edges))


def log_from_1(x: ms.Tensor) -> ms.Tensor:
    """log x, of float32 from 1 on, in any shape.

    `ops.log` gives the last few elements that a thread computes other bits than the same numbers elsewhere,
    and the number of threads changes in the first runs of a graph (MindSpore 2.10 on the CPU).
    """
    return ops.log1p(x - 1.0)


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


class ShardedTokenLogprobs(nn.Cell):
    """`TokenLogprobs` of the workers that have a part of the vocabulary each. Collective.

    `vocabulary` and the weight are of the part at `place`; targets are ids of the whole.
    """

    def __init__(self, tokens: int, vocabulary: int, place: Place, slice_bytes: int = SLICE_BYTES) -> None:
        super().__init__()
        self.slices = slices_of(tokens, vocabulary, slice_bytes)
        self.vocabulary = vocabulary
        self.first = place.index * vocabulary
        self.workers = place.count
        self.gathered, self.total = Gathered(place), Total(place)
        self.times_transposed = ops.MatMul(transpose_b=True)
        self.transposed_times = ops.MatMul(transpose_a=True)
        self.times = ops.MatMul()
        self.on = ms.Tensor(1.0, ms.float32)
        self.off = ms.Tensor(0.0, ms.float32)

    def terms(
        self, rows: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
        """Logits of this part [n, vocabulary]; of all parts log sum exp [n], and the targets' logits [n]."""
        logits = self.times_transposed(rows, weight)
        highest = logits.max(-1, keepdims=True)
        sums = ops.exp(logits - spread(highest, logits.shape)).sum(-1)
        own = targets - self.first
        here = ops.logical_and(own >= 0, own < self.vocabulary)
        chosen = ops.gather_elements(logits, 1, (own * here.astype(ms.int32)).expand_dims(1))
        chosen = chosen.reshape(-1) * here.astype(ms.float32)
        told = self.gathered(ops.stack((highest.reshape(-1) + log_from_1(sums), chosen)))
        most, found = told[0, 0], told[0, 1]
        for worker in range(1, self.workers):
            most = ops.maximum(most, told[worker, 0])
            found = found + told[worker, 1]
        exponentials = ops.exp(told[0, 0] - most)
        for worker in range(1, self.workers):
            exponentials = exponentials + ops.exp(told[worker, 0] - most)
        return logits, most + log_from_1(exponentials), found

    def difference(self, rows: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor) -> ms.Tensor:
        """This part of `onehot(target) - softmax(logits)`, [n, vocabulary]."""
        logits, total, _ = self.terms(rows, weight, targets)
        probabilities = ops.exp(logits - spread(total.expand_dims(1), logits.shape))
        # Nothing is chosen where the target is in another part.
        own = ops.depend(targets - self.first, rows)
        return ops.one_hot(own, self.vocabulary, self.on, self.off) - probabilities

    def construct(self, hidden: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor) -> ms.Tensor:
        """As `TokenLogprobs`; the same bits on all workers."""
        pieces: tuple[ms.Tensor, ...] = ()
        after = hidden
        for start, end in self.slices:
            rows = ops.depend(hidden[start:end], after)
            _, total, found = self.terms(rows, weight, targets[start:end])
            after = found - total
            pieces = (*pieces, after)
        return ops.concat(pieces, 0)

    def bprop(
        self, hidden: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor, _: ms.Tensor, dout: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
        """The gradients of hidden, the same on all workers, and of this part of the weight."""
        scale = spread(dout.expand_dims(1), hidden.shape)
        scaled = hidden * scale
        pieces: tuple[ms.Tensor, ...] = ()
        weight_gradient = ops.zeros_like(weight)
        for start, end in self.slices:
            rows = ops.depend(hidden[start:end], weight_gradient)
            difference = self.difference(rows, weight, targets[start:end])
            pieces = (*pieces, self.times(difference, weight))
            weight_gradient = weight_gradient + self.transposed_times(difference, scaled[start:end])
        # Last of all: every worker has its own products in the same order.
        summed = self.total(ops.depend(ops.concat(pieces, 0) * scale, weight_gradient))
        return summed, weight_gradient, ops.zeros_like(targets)


class FrozenTokenLogprobs(TokenLogprobs):
    """The same for a weight that is not trained: its gradient is neither computed nor held."""

    def bprop(
        self, hidden: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor, _: ms.Tensor, dout: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
        """The gradient of hidden."""
        pieces: tuple[ms.Tensor, ...] = ()
        after = hidden
        for start, end in self.slices:
            rows = ops.depend(hidden[start:end], after)
            probabilities = ops.exp(self.log_softmax(self.times_transposed(rows, weight)))
            chosen = ops.one_hot(ops.depend(targets[start:end], rows), self.vocabulary, self.on, self.off)
            piece = self.times(chosen - probabilities, weight)
            pieces = (*pieces, piece)
            after = piece
        scale = spread(dout.expand_dims(1), hidden.shape)
        # Not a constant: the graph compiler of MindSpore 2.10 fails on those here.
        nothing = ops.depend(ops.zeros_like(weight), after)
        return ops.concat(pieces, 0) * scale, nothing, ops.zeros_like(targets)


class FrozenShardedTokenLogprobs(ShardedTokenLogprobs):
    """The same for a part of a weight that is not trained."""

    def bprop(
        self, hidden: ms.Tensor, weight: ms.Tensor, targets: ms.Tensor, _: ms.Tensor, dout: ms.Tensor
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
        """The gradient of hidden, the same on all workers."""
        pieces: tuple[ms.Tensor, ...] = ()
        after = hidden
        for start, end in self.slices:
            rows = ops.depend(hidden[start:end], after)
            piece = self.times(self.difference(rows, weight, targets[start:end]), weight)
            pieces = (*pieces, piece)
            after = piece
        summed = self.total(ops.concat(pieces, 0) * spread(dout.expand_dims(1), hidden.shape))
        return summed, ops.depend(ops.zeros_like(weight), summed), ops.zeros_like(targets)
