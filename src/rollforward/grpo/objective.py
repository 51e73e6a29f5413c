r"""The objective of GRPO, as formulas. Engines compute the same, and tests compare them with this.

A completion is drawn from softmax(logits / T), where T is the sampling temperature. Learning uses that
same distribution, for the policy and the reference alike, as in TRL:

    l = log softmax(logits / T) at the token

Greedy decoding (T = 0) does not draw from a distribution; learning then uses T = 1. top_k and top_p,
which remove tokens from the distribution, are ignored in learning, as in TRL.

For each token, with log-probability l under the policy, l_old under the policy that generated it,
l_ref under the reference, and the sample's advantage A:

    r    = exp(l - l_old)                                        the ratio
    clip = min(max(r, 1 - epsilon_low), 1 + epsilon_high)
    k3   = exp(l_ref - l) - (l_ref - l) - 1                      Schulman 2020, "Approximating KL Divergence"
    loss = -min(r A, clip A) + beta k3

With beta 0 there is no reference: k3 counts as 0, and l_ref is not looked at.

(PPO's clipped surrogate, arXiv:1707.06347; the KL term inside the loss, arXiv:2402.03300;
the two epsilons, DAPO, arXiv:2503.14476.) The loss of a step is the sum of `w * loss` over all
tokens, where the weights w carry the normalisation:

    token mean       w = 1 / (tokens of the step)                DAPO: every token counts the same
    sequence mean    w = 1 / (tokens of the sample * samples)    GRPO as published: every sample does

so that engines need not know which one is used, or how many workers there are.
"""

from dataclasses import dataclass

import numpy as np

from rollforward.grpo.types import Bools, Floats, ObjectiveSettings


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """The objective token by token; all [B, T]."""

    loss: Floats
    kl: Floats
    clipped: Bools
    gradient: Floats
    """d loss / d l."""


def token_terms(
    logprobs: Floats,
    old_logprobs: Floats,
    reference_logprobs: Floats,
    advantages: Floats,
    settings: ObjectiveSettings,
) -> TokenTerms:
    """Loss, KL, whether clipped, and the gradient with respect to `logprobs`.

    Log-probabilities are [B, T], advantages [B]. Any float dtype; computed in that dtype.
    A token counts as clipped when the clipped term is the smaller one: its gradient is then
    that of the KL alone.
    """
    advantage = advantages[:, None]
    ratio = np.exp(logprobs - old_logprobs)
    clipped_ratio = np.clip(ratio, 1 - settings.epsilon_low, 1 + settings.epsilon_high)
    surrogate, clipped_surrogate = ratio * advantage, clipped_ratio * advantage
    clipped = clipped_surrogate < surrogate
    difference = (reference_logprobs - logprobs) if settings.beta > 0 else np.zeros_like(logprobs)
    kl = np.exp(difference) - difference - 1
    return TokenTerms(
        loss=-np.minimum(surrogate, clipped_surrogate) + settings.beta * kl,
        kl=kl,
        clipped=clipped,
        gradient=np.where(clipped, 0, -surrogate) + settings.beta * (1 - np.exp(difference)),
    )


def token_mean_weights(mask: Bools, tokens_in_step: int) -> Floats:
    """Every token of the step counts the same. mask [B, T]; float32 [B, T]."""
    return np.divide(mask, tokens_in_step, dtype=np.float32)


def sequence_mean_weights(mask: Bools, samples_in_step: int) -> Floats:
    """Every sample of the step counts the same, whatever its length. mask [B, T]; float32 [B, T]."""
    tokens = np.maximum(mask.sum(axis=1, keepdims=True), 1) * samples_in_step
    return np.divide(mask, tokens, dtype=np.float32)
