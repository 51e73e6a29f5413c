"""The graphs of generation: prompts into the cache, and one more token for each row.

    Prefill    the tokens of a few prompts -> keys and values, into pages of the cache
    Decode     a token of each row -> keys and values, into the cache -> attention -> the next token

Decode ends in the sampler, so that only token ids leave it.

Promises: what a row gives has the same bits in a batch of any size, at any place in it, beside any others,
and however many columns are looked at beyond its own. Measured on MindSpore 2.10's CPU kernels, which is what
decides the form of some operations here; `kernels` has the sizes that this goes for, by processor.

- `x @ W.T` has other bits for 1, for 2 to 15 and for 16 rows and more, and others again from about 40 on;
  and with 16 to 32 rows it takes 2 to 4 times as long as with 15. `W @ x.T` has the same bits for any number
  of rows from 2 on where there is AVX-512, and is as fast as the best of them. So `linear` computes that, and
  transposes.
- BatchMatMul has the same bits for any number of matrices from 2 on, and of columns, whether they are masked
  columns of weight 0 at the end of a sum or results beside.
- Softmax has them for any number of columns that is a multiple of 16; masked columns weigh exactly 0.
- Everything else works row by row or element by element.

The rows of a matrix within BatchMatMul are not free: so a prompt runs at a width that its own length gives.

Where the model is cut over workers, each runs its part of every step; they share the logits, and so all draw
the same tokens.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from rollforward.engines.mindspore.model import MASKED, Angles, Decoder, Layer, Linear, Named
from rollforward.engines.mindspore.pages import PAGE
from rollforward.engines.mindspore.sampling import Sampler
from rollforward.engines.mindspore.shards import Gathered


class Cache:
    """Keys and values of every layer: scratch memory, not part of the engine's tensors. See `pages`.

    Rows of [rows, head_dim], since ScatterUpdate, which works along the first axis only, replaces them in
    place; seen as blocks of PAGE rows without a copy.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        config = decoder.config

        def buffers(name: str) -> ParameterTuple:
            zeros = np.zeros((rows, config.head_dim), np.float32)
            return ParameterTuple(
                [
                    Parameter(Tensor(zeros), name=f"cache.{name}.{layer}", requires_grad=False)
                    for layer in range(config.layers)
                ]
            )

        self.keys, self.values = buffers("keys"), buffers("values")


class _Step(Named):
    """What both graphs share: the model's parts, with products whose rows do not depend on each other."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        super().__init__()
        self.decoder = decoder
        self.keys, self.values = cache.keys, cache.values
        self.layers = decoder.config.layers
        self.kv_heads, self.head_dim = decoder.config.kv_heads, decoder.config.head_dim
        self.scatter = ops.ScatterUpdate()
        self.product = ops.MatMul(transpose_b=True)
        self.add_bias = ops.BiasAdd()

    def linear(self, part: Linear, x: Tensor) -> Tensor:
        """What `part` computes, [N, inputs] -> [N, outputs]."""
        y = self.product(part.weight, x).transpose(1, 0)
        if part.adapted:
            y = y + self.adapter(part, x) * part.scale
        if part.is_part:
            y = part.added(y)
        if part.has_bias:
            y = self.add_bias(y, part.bias)
        return y

    def adapter(self, part: Linear, x: Tensor) -> Tensor:
        """`B (A x)` of a part that has an adapter, in products of the same form."""
        narrow = self.product(part.lora_A.weight, x).transpose(1, 0)
        return self.product(part.lora_B.weight, narrow).transpose(1, 0)

    def project(self, layer: Layer, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """`Attention.project` of the normed x."""
        attention, x = layer.self_attn, layer.input_layernorm(x)
        q, k = self.linear(attention.q_proj, x), self.linear(attention.k_proj, x)
        return attention.turned(q, k, self.linear(attention.v_proj, x), angles)

    def finished(self, layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer, from what attention mixed: [N, hidden] -> [N, hidden]."""
        x = x + self.linear(layer.self_attn.o_proj, mixed)
        mlp, normed = layer.mlp, layer.post_attention_layernorm(x)
        gated = mlp.gated(self.linear(mlp.gate_proj, normed), self.linear(mlp.up_proj, normed))
        return x + self.linear(mlp.down_proj, gated)


class Prefill(_Step):
    """Runs `prompts` prompts of up to `width` tokens, and puts their keys and values into the cache."""

    def __init__(self, decoder: Decoder, cache: Cache, prompts: int, width: int) -> None:
        super().__init__(decoder, cache)
        # What pads a prompt comes after it, where no token of it looks.
        later = np.triu(np.full((width, width), MASKED, np.float32), 1)
        heads = decoder.config.heads
        self.mask = Tensor(np.broadcast_to(later, (prompts, heads, width, width)).copy())

    def construct(self, ids: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """ids and positions int32 [prompts, width], right-padded, and `Pages.of_prompts`.

        Of the last layer only keys and values are needed. What it returns is of no use.
        """
        angles = self.decoder.rotary(positions)
        x = self.decoder.model.embed_tokens(ids.reshape(-1))
        for index in range(self.layers):
            layer = self.decoder.model.layers[index]
            q, k, v = self.project(layer, x, angles)
            self.scatter(self.keys[index], places, k.reshape(-1, self.head_dim))
            self.scatter(self.values[index], places, v.reshape(-1, self.head_dim))
            if index + 1 < self.layers:
                x = self.finished(layer, x, layer.self_attn.mixed(q, k, v, self.mask))
        return x[:1, :1]


class Decode(_Step):
    """Runs one token of each of `rows` rows against `pages` pages each, and samples the next."""

    def __init__(self, decoder: Decoder, cache: Cache, sampler: Sampler, rows: int, pages: int) -> None:
        super().__init__(decoder, cache)
        self.head_weight = decoder.head_weight
        self.sampler = sampler
        self.vocabulary = decoder.vocabulary
        self.is_part = decoder.place.count > 1
        if self.is_part:
            self.gathered = Gathered(decoder.place)
        self.block = PAGE * self.head_dim
        self.seen = (rows, self.kv_heads, pages * PAGE, self.head_dim)

    def logits(
        self, tokens: Tensor, positions: Tensor, places: Tensor, blocks: Tensor, hidden: Tensor
    ) -> Tensor:
        """Tokens int32 [B] and `Seen`; `hidden` as float32 [B, 1, 1, columns], added to scores -> [B, V]."""
        angles = self.decoder.rotary(positions)
        mask = self.decoder.mask_of_heads(hidden)
        x = self.decoder.model.embed_tokens(tokens)
        for index in range(self.layers):
            layer = self.decoder.model.layers[index]
            q, k, v = self.project(layer, x, angles)
            keys = self.with_new(self.keys[index], places, blocks, k)
            values = self.with_new(self.values[index], places, blocks, v)
            x = self.finished(layer, x, layer.self_attn.mixed(q, keys, values, mask))
        found = self.product(self.head_weight, self.decoder.model.norm(x))
        if self.is_part:
            found = self.gathered(found).reshape(self.vocabulary, -1)
        return found.transpose(1, 0)

    def with_new(self, buffer: Parameter, places: Tensor, blocks: Tensor, new: Tensor) -> Tensor:
        """Put the new keys or values into the cache; all that are looked at, [B, kv_heads, columns, D]."""
        # ScatterUpdate returns the updated buffer itself: using that orders the read after the write.
        updated = self.scatter(buffer, places, new.reshape(-1, self.head_dim))
        return ops.gather(updated.reshape(-1, self.block), blocks, 0).reshape(self.seen)

    def construct(
        self,
        tokens: Tensor,
        positions: Tensor,
        places: Tensor,
        blocks: Tensor,
        hidden: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        """`logits`, and the token that the uniform numbers, float32 [B], draw from them: int32 [B]."""
        return self.sampler(self.logits(tokens, positions, places, blocks, hidden), uniforms)


def zeros(*shape: int) -> Tensor:
    """An int32 argument to compile with."""
    return Tensor(np.zeros(shape, np.int32))


def prefill_example(prompts: int, width: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Arguments of the shapes that Prefill takes."""
    return zeros(prompts, width), zeros(prompts, width), zeros(prompts * kv_heads * width)


def decode_example(rows: int, pages: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Arguments of the shapes that Decode takes."""
    hidden = Tensor(np.zeros((rows, 1, 1, pages * PAGE), np.float32))
    places, blocks = zeros(rows * kv_heads), zeros(rows * kv_heads * pages)
    return zeros(rows), zeros(rows, 1), places, blocks, hidden, Tensor(np.zeros(rows), ms.float32)
