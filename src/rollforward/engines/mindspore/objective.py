"""Log-probabilities of completions, and the clipped objective of `grpo.objective`, as graphs.

Every shape is static, and a cell is made for one: see `compiling.ByShape`. Tokens stand in rows, as
`batches.Rows` has it. What is predicted is [rows, width] too: as many places as there are columns.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from rollforward.engines.mindspore.model import Decoder, Named, attention_mask, spread
from rollforward.engines.mindspore.vocabulary import (
    FrozenShardedTokenLogprobs,
    FrozenTokenLogprobs,
    ShardedTokenLogprobs,
    TokenLogprobs,
)
from rollforward.grpo.types import ObjectiveSettings


class CompletionLogprobs(Named):
    """`batches.Rows`, int32 [rows, width] each -> log-probabilities of its targets; 0 where there is none.

    Of softmax(logits / temperature), as in `grpo.objective`. The head is linear, so the hidden states are
    divided instead: they are far fewer numbers than the logits. `head_learns`: whether the head's weight is
    among what is trained.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        width: int,
        temperature: float = 1.0,
        *,
        head_learns: bool = True,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.shape = (rows, width)
        self.divides = temperature != 1.0
        self.inverse_temperature = ms.Tensor([[1.0 / temperature]], ms.float32)
        tokens, vocabulary = rows * width, decoder.config.vocab_size
        if decoder.place.count > 1:
            sharded = ShardedTokenLogprobs if head_learns else FrozenShardedTokenLogprobs
            self.token_logprobs = sharded(tokens, vocabulary, decoder.place)
        else:
            kind = TokenLogprobs if head_learns else FrozenTokenLogprobs
            self.token_logprobs = kind(tokens, vocabulary)
        self.gather = ops.Gather()

    def construct(
        self,
        ids: ms.Tensor,
        positions: ms.Tensor,
        groups: ms.Tensor,
        samples: ms.Tensor,
        predictors: ms.Tensor,
        targets: ms.Tensor,
    ) -> ms.Tensor:
        """See the class."""
        hidden = self.decoder.hidden(ids, positions, attention_mask(groups, samples))
        # The last token of a prompt predicts the first one of each of its completions.
        flat = self.gather(hidden.reshape(-1, hidden.shape[-1]), predictors.reshape(-1), 0)
        if self.divides:
            flat = flat * spread(self.inverse_temperature, flat.shape)
        of_any = ops.maximum(targets.reshape(-1), 0)
        found = self.token_logprobs(flat, self.decoder.head_weight, of_any).reshape(self.shape)
        return ops.where(targets >= 0, found, ops.zeros_like(found))


def example(rows: int, width: int) -> tuple[ms.Tensor, ...]:
    """Arguments of this shape, to compile for."""
    return tuple(ms.Tensor(np.zeros((rows, width), np.int32)) for _ in range(6))


class Objective(Named):
    """The weighted loss of a micro-batch, a scalar; and of each token: loss, KL, clipped, log-probability.

    With beta 0 there is no reference: the KL is 0, whatever `reference` says.

    `own` [1] is 1 where the generating policy is the current one: its log-probabilities are then
    the ones computed here, as constants, and the ratio is 1.
    """

    def __init__(self, logprobs: CompletionLogprobs, settings: ObjectiveSettings) -> None:
        super().__init__()
        self.logprobs = logprobs
        self.low = 1.0 - settings.epsilon_low
        self.high = 1.0 + settings.epsilon_high
        self.beta = settings.beta

    def construct(
        self,
        weights: ms.Tensor,
        advantages: ms.Tensor,
        reference: ms.Tensor,
        old: ms.Tensor,
        own: ms.Tensor,
        *rows: ms.Tensor,
    ) -> tuple[ms.Tensor, ...]:
        """See the class. `rows` is what `CompletionLogprobs` takes; all are [rows, width] but `own`."""
        logprobs = self.logprobs(*rows)
        now = ops.stop_gradient(logprobs)
        ratio = ops.exp(logprobs - ops.where(own > 0, now, old))
        surrogate = ratio * advantages
        clipped_surrogate = ops.stop_gradient(ops.clamp(ratio, self.low, self.high)) * advantages
        # Where the clipped term is the smaller one, the ratio is out of range: its gradient is 0.
        clipped = clipped_surrogate < surrogate
        loss = -ops.where(clipped, clipped_surrogate, surrogate)
        kl = ops.zeros_like(logprobs)
        if self.beta > 0:
            difference = reference - logprobs
            kl = ops.exp(difference) - difference - 1.0
            loss = self.beta * kl + loss
        # Where nothing is predicted the difference is 0 and the weight 0, and so are all terms.
        total = (weights * loss).sum()
        return total, loss, kl, clipped.astype(ms.float32), now
