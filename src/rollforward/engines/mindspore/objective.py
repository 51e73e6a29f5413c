"""Log-probabilities of completions, and the clipped objective of `grpo.objective`, as graphs.

Every shape is static. Rows are laid out as `batches.Columns` does: left-padded prompts, the
completions after them.
"""

import mindspore as ms
from mindspore import nn, ops

from rollforward.engines.mindspore.model import Decoder, attention_mask, positions_of, spread
from rollforward.engines.mindspore.vocabulary import TokenLogprobs
from rollforward.grpo.types import ObjectiveSettings


class CompletionLogprobs(nn.Cell):
    """(ids int32 [b, P+T], mask bool [b, P+T]) -> [b, T] of the last T tokens; meaningless where masked.

    Of softmax(logits / temperature), as in `grpo.objective`. The head is linear, so the hidden states are
    divided instead: they are far fewer numbers than the logits.
    """

    def __init__(
        self, decoder: Decoder, rows: int, prompt_length: int, max_tokens: int, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.prompt_length = prompt_length
        self.shape = (rows, max_tokens)
        self.divides = temperature != 1.0
        self.inverse_temperature = ms.Tensor([[1.0 / temperature]], ms.float32)
        self.token_logprobs = TokenLogprobs(rows * max_tokens, decoder.config.vocab_size)

    def construct(self, ids: ms.Tensor, mask: ms.Tensor) -> ms.Tensor:
        """See the class."""
        # The last token is predicted by the one before it, and predicts nothing itself.
        real = mask[:, :-1]
        hidden = self.decoder.hidden(ids[:, :-1], positions_of(real), attention_mask(real))
        hidden = hidden[:, self.prompt_length - 1 :]
        targets = ids[:, self.prompt_length :].reshape(-1)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.divides:
            flat = flat * spread(self.inverse_temperature, flat.shape)
        return self.token_logprobs(flat, self.decoder.head_weight, targets).reshape(self.shape)


class ReferenceLogprobs(nn.Cell):
    """`CompletionLogprobs` without a gradient, 0 where masked."""

    def __init__(self, logprobs: CompletionLogprobs) -> None:
        super().__init__()
        self.logprobs = logprobs

    def construct(self, ids: ms.Tensor, mask: ms.Tensor) -> ms.Tensor:
        """See the class."""
        completion = mask[:, self.logprobs.prompt_length :]
        logprobs = self.logprobs(ids, mask)
        return ops.where(completion, logprobs, ops.zeros_like(logprobs))


class Objective(nn.Cell):
    """The weighted loss of a micro-batch, a scalar; and [b, T] each: loss, KL, clipped, log-probabilities.

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
        ids: ms.Tensor,
        mask: ms.Tensor,
        weights: ms.Tensor,
        advantages: ms.Tensor,
        reference: ms.Tensor,
        old: ms.Tensor,
        own: ms.Tensor,
    ) -> tuple[ms.Tensor, ...]:
        """See the class. weights, reference and old [b, T]; advantages [b]."""
        completion = mask[:, self.logprobs.prompt_length :]
        logprobs = self.logprobs(ids, mask)
        logprobs = ops.where(completion, logprobs, ops.zeros_like(logprobs))
        now = ops.stop_gradient(logprobs)
        ratio = ops.exp(logprobs - ops.where(own > 0, now, old))
        advantage = advantages.expand_dims(1)
        surrogate = ratio * advantage
        clipped_surrogate = ops.stop_gradient(ops.clamp(ratio, self.low, self.high)) * advantage
        # Where the clipped term is the smaller one, the ratio is out of range: its gradient is 0.
        clipped = clipped_surrogate < surrogate
        difference = reference - logprobs
        kl = ops.exp(difference) - difference - 1.0
        loss = self.beta * kl - ops.where(clipped, clipped_surrogate, surrogate)
        # Masked tokens have difference 0 and weight 0, and so do all their terms.
        total = (weights * loss).sum()
        return total, loss, kl, clipped.astype(ms.float32), now
