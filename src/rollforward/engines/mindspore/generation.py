"""Sampling completions with a static-shape key-value cache: one prefill graph, one decoding graph.

    prompts, aligned left-padded -> prefill -> token 0 -> decode -> token 1 -> decode -> ...
                                      |                     |
                                      +---- keys, values ---+---- updated in place

Both graphs end in the sampler, so that only token ids leave them: temperature, then top-k, then
top-p, then inversion of the cumulative distribution at the given uniform number. The host checks
the ids for stop tokens, and ends the loop when every row is done.

Promises: no randomness except the uniforms; a row's tokens depend on its own prompt and uniforms
only (every operation here works row by row, and shapes never change, so neither do the kernels).
Left out: beams, repetition penalties, and removing finished rows from the batch, which would change
shapes.
"""

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from numpy.typing import NDArray

from rollforward.engines.mindspore.model import MASKED, Decoder, attention_mask, positions_of
from rollforward.errors import EngineError
from rollforward.grpo.types import Bools, EngineSettings, Floats, Generation, Ints, SamplingSettings

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
        self.largest = ops.TopK(sorted=True)

    def weights(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B, V]: probabilities up to a factor, 0 where filtered."""
        highest = logits.max(-1, keepdims=True)
        weights = ops.exp((logits - highest) * self.inverse_temperature)
        if self.filters_k or self.filters_p:
            descending, _ = self.largest(weights, self.top_k)
            least = descending[:, -1:]
            if self.filters_p:
                before = ops.cumsum(descending, -1) - descending
                kept = before < descending.sum(-1, keepdims=True) * self.top_p
                # The kept ones come first, so their minimum is the minimum with dropped ones counted as 1.
                least = ops.select(kept, descending, ops.ones_like(descending)).min(-1, keepdims=True)
            weights = weights * (weights >= least).astype(ms.float32)
        return weights

    def construct(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """float32 [B, V] and [B] -> int32 [B]."""
        if self.greedy:
            return ops.argmax(logits, -1).astype(ms.int32)
        cumulative = ops.cumsum(self.weights(logits), -1)
        target = uniforms.expand_dims(-1) * BELOW_ONE * cumulative[:, -1:]
        return (cumulative <= target).astype(ms.int32).sum(-1).astype(ms.int32)


class Cache:
    """Keys and values of every layer: scratch memory, not part of the engine's tensors.

    Each is [B * kv_heads * S, head_dim] with S = P + T: rows that ScatterUpdate, which works along
    the first axis only, can replace in place; seen as [B, kv_heads, S, head_dim] without a copy.
    """

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        config = decoder.config
        self.shape = (rows, config.kv_heads, length, config.head_dim)

        def buffers(name: str) -> ParameterTuple:
            zeros = np.zeros((rows * config.kv_heads * length, config.head_dim), np.float32)
            return ParameterTuple(
                [
                    Parameter(Tensor(zeros), name=f"cache.{name}.{layer}", requires_grad=False)
                    for layer in range(config.layers)
                ]
            )

        self.keys, self.values = buffers("keys"), buffers("values")
        self.starts = np.arange(rows * config.kv_heads, dtype=np.int32) * length
        """The first row of each (sample, head)."""


class _Step(nn.Cell):
    """What prefill and decoding share: the parts, and the last steps from hidden states to tokens."""

    def __init__(self, decoder: Decoder, cache: Cache, sampler: Sampler) -> None:
        super().__init__()
        self.decoder = decoder
        self.head_weight = decoder.head_weight
        self.sampler = sampler
        self.keys, self.values = cache.keys, cache.values
        self.cache_shape = cache.shape
        self.layers = decoder.config.layers
        self.head_dim = decoder.config.head_dim
        self.scatter = ops.ScatterUpdate()
        self.head = ops.MatMul(transpose_b=True)

    def sample(self, x: Tensor, uniforms: Tensor) -> Tensor:
        """[B, hidden] before the final norm, and [B] -> token ids [B]."""
        return self.sampler(self.head(self.decoder.model.norm(x), self.head_weight), uniforms)


class Prefill(_Step):
    """Runs the prompts, fills the cache's first P columns, and samples each row's first token."""

    def __init__(self, decoder: Decoder, cache: Cache, sampler: Sampler, prompt_length: int) -> None:
        super().__init__(decoder, cache, sampler)
        self.places = Tensor((cache.starts[:, None] + np.arange(prompt_length, dtype=np.int32)).reshape(-1))

    def construct(self, ids: Tensor, mask: Tensor, uniforms: Tensor) -> Tensor:
        """ids int32 and mask bool [B, P], left-padded; uniforms float32 [B] -> int32 [B]."""
        batch, length = ids.shape
        angles = self.decoder.rotary(positions_of(mask))
        added = self.decoder.mask_of_heads(attention_mask(mask))
        x = self.decoder.model.embed_tokens(ids.reshape(-1))
        for index in range(self.layers):
            layer = self.decoder.model.layers[index]
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), angles)
            self.scatter(self.keys[index], self.places, k.reshape(-1, self.head_dim))
            self.scatter(self.values[index], self.places, v.reshape(-1, self.head_dim))
            x = x + layer.self_attn.attend(q, k, v, added)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.sample(x.reshape(batch, length, -1)[:, -1], uniforms)


class Decode(_Step):
    """Runs one token of each row against the cache, adds it there, and samples the next."""

    def __init__(self, decoder: Decoder, cache: Cache, sampler: Sampler) -> None:
        super().__init__(decoder, cache, sampler)
        self.starts = Tensor(cache.starts)

    def construct(
        self, tokens: Tensor, positions: Tensor, column: Tensor, mask: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Tokens int32 [B], at positions int32 [B, 1] and cache column int32 [] -> the next, int32 [B].

        mask is float32 [B, 1, 1, S], added to the scores; uniforms float32 [B].
        """
        angles = self.decoder.rotary(positions)
        mask = self.decoder.mask_of_heads(mask)
        places = self.starts + column
        x = self.decoder.model.embed_tokens(tokens)
        for index in range(self.layers):
            layer = self.decoder.model.layers[index]
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), angles)
            # ScatterUpdate returns the updated buffer itself: using that orders the read after the write.
            keys = self.scatter(self.keys[index], places, k.reshape(-1, self.head_dim))
            values = self.scatter(self.values[index], places, v.reshape(-1, self.head_dim))
            keys, values = keys.reshape(self.cache_shape), values.reshape(self.cache_shape)
            x = x + layer.self_attn.attend(q, keys, values, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.sample(x, uniforms)


class Generator:
    """Samples completions from a decoder, whose parameters it shares and never changes."""

    def __init__(self, decoder: Decoder, settings: EngineSettings) -> None:
        self._rows = settings.samples_per_generation
        self._prompt_length = settings.prompt_length
        self._sampling = settings.sampling
        self._columns = settings.prompt_length + settings.sampling.max_tokens
        cache = Cache(decoder, self._rows, self._columns)
        sampler = Sampler(settings.sampling, decoder.config.vocab_size)
        self._prefill = Prefill(decoder, cache, sampler, settings.prompt_length)
        self._decode = Decode(decoder, cache, sampler)

    def compile(self) -> None:
        """Compile both graphs."""
        rows, length = self._rows, self._prompt_length
        ids, mask = np.zeros((rows, length), np.int32), np.ones((rows, length), np.bool_)
        uniforms = Tensor(np.zeros(rows, np.float32))
        self._prefill.compile(Tensor(ids), Tensor(mask), uniforms)
        added = Tensor(np.zeros((rows, 1, 1, self._columns), np.float32))
        tokens, positions = Tensor(ids[:, 0]), Tensor(ids[:, :1])
        self._decode.compile(tokens, positions, Tensor(np.int32(length)), added, uniforms)

    def generate(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> Generation:
        """See `grpo.ports.Engine.generate`. EngineError for other shapes, and for a prompt without tokens."""
        self._check(prompt_ids, prompt_mask, uniforms)
        samples, tokens = uniforms.shape
        ids, mask = left_aligned(prompt_ids, prompt_mask, self._sampling.pad_token_id)
        completions = np.full((samples, tokens), self._sampling.pad_token_id, np.int32)
        lengths = np.full(samples, tokens, np.int32)
        stopped = np.zeros(samples, np.bool_)
        for first in range(0, samples, self._rows):
            part = slice(first, min(first + self._rows, samples))
            self._generate_batch(
                (ids[part], mask[part], uniforms[part]), (completions[part], lengths[part], stopped[part])
            )
        return Generation(completion_ids=completions, lengths=lengths, stopped=stopped)

    def _check(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> None:
        expected = (len(uniforms), self._prompt_length)
        if prompt_ids.shape != expected or prompt_mask.shape != expected:
            raise EngineError(
                f"prompts of shape {prompt_ids.shape} with a mask of {prompt_mask.shape}; "
                f"this engine was built for {expected}"
            )
        if uniforms.shape[1:] != (self._sampling.max_tokens,):
            raise EngineError(
                f"uniforms of shape {uniforms.shape}; "
                f"this engine was built for {self._sampling.max_tokens} tokens"
            )
        empty = np.flatnonzero(~prompt_mask.any(axis=1))
        if empty.size:
            raise EngineError(
                f"the prompt of sample {empty[0]} has no token", hint="begin it with a BOS token"
            )

    def _generate_batch(
        self, given: tuple[Ints, Bools, Floats], result: tuple[Ints, NDArray[np.int32], Bools]
    ) -> None:
        """Fill the result's views with up to `samples_per_generation` completions."""
        completions, lengths, stopped = result
        samples, last = completions.shape[0], completions.shape[1] - 1
        pad, stops = self._sampling.pad_token_id, np.array(self._sampling.stop_token_ids, np.int32)
        done = np.arange(self._rows) >= samples
        for token, drawn in enumerate(self._tokens(*_filled_up(*given, self._rows, pad))):
            drawn[done] = pad
            completions[:, token] = drawn[:samples]
            ends = np.isin(drawn, stops) & ~done
            done |= ends
            lengths[ends[:samples]] = token + 1
            stopped[ends[:samples]] = True
            if token == last or done.all():
                return

    def _tokens(self, ids: Ints, mask: Bools, uniforms: Floats) -> Iterator[Ints]:
        """Yield the next token of every row; what the consumer writes over it is fed back."""
        drawn = self._prefill(Tensor(ids), Tensor(mask), Tensor(uniforms[:, 0])).asnumpy().copy()
        positions = mask.sum(axis=1, dtype=np.int32)
        hidden = np.full((self._rows, 1, 1, self._columns), MASKED, np.float32)
        hidden[:, 0, 0, : self._prompt_length][mask] = 0.0
        for token in range(1, uniforms.shape[1]):
            yield drawn
            column = self._prompt_length + token - 1
            hidden[..., column] = 0.0
            drawn = (
                self._decode(
                    Tensor(drawn),
                    Tensor(positions[:, None]),
                    Tensor(np.int32(column)),
                    Tensor(hidden),
                    Tensor(uniforms[:, token]),
                )
                .asnumpy()
                .copy()
            )
            positions = positions + np.int32(1)
        yield drawn


def left_aligned(ids: Ints, mask: Bools, pad: int) -> tuple[Ints, Bools]:
    """The same prompts with all padding moved to the left."""
    order = np.argsort(mask, axis=1, kind="stable")
    mask = np.take_along_axis(mask, order, axis=1)
    ids = np.where(mask, np.take_along_axis(ids, order, axis=1), pad).astype(np.int32)
    return ids, mask


def _filled_up(ids: Ints, mask: Bools, uniforms: Floats, rows: int, pad: int) -> tuple[Ints, Bools, Floats]:
    """Rows of one pad token each after the given ones, up to the batch that the graphs were built for."""
    more = rows - len(ids)
    return (
        np.pad(ids, ((0, more), (0, 0)), constant_values=pad),
        np.pad(mask, ((0, more), (0, 0)), mode="constant") | (np.arange(rows) >= len(ids))[:, None],
        np.pad(uniforms, ((0, more), (0, 0))),
    )
