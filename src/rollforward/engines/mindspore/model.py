"""A decoder-only language model in fp32, built from a `ModelConfig`: Llama, Qwen2 and Qwen3.

Parameters carry Hugging Face names (`model.layers.0.self_attn.q_proj.weight`), behind a prefix
where two models live in one graph. Cells work on tokens laid out flat, `[B * L, features]`, so
that every projection is one matrix product; only attention looks at `[B, heads, L, head_dim]`.

`Decoder.hidden` ends at the final norm and does not touch the vocabulary: code that needs logits
multiplies by `head_weight`, in slices if necessary. What generation also needs (projection and
attention separately, to put a cache between them) is public on `Attention`.

Where the model is cut over workers (`models.sharding`), a decoder has this worker's part: its `config` is
that of the part, and collectives stand where the parts meet (`shards`).

Element-wise operations here take operands of one shape, or a scalar: see `spread`. And SiLU is
written out, since the CPU kernel of `SiLU` keeps a buffer of its input's size forever.

Left out: dropout, which the supported families do not train with; and half precision.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from rollforward.engines.mindspore.shards import WHOLE, Added, Place, Shared
from rollforward.models.config import ModelConfig
from rollforward.models.rope import RopeConfig, inverse_frequencies
from rollforward.models.sharding import part_of

__all__ = ["Attention", "Decoder", "Layer", "ModelConfig", "attention_mask", "initialise"]

MASKED = -1e9
"""Added to the scores of keys that must not be seen. Finite, so that a row of only padding is not NaN."""


def spread(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` broadcast to `shape`, as an operator of its own.

    Where the shapes of their operands differ, the CPU kernels of MindSpore 2.10 (Add, Sub, Mul, Div,
    Select) make lists of element indices when they are built, and keep them forever: 16 bytes for each
    element of the result, for each operator of the graph. That was most of a training step's memory.
    Operands of one shape need no such lists, and the spread copy is freed after use.
    """
    return ops.broadcast_to(x, shape)


def attention_mask(groups: Tensor, samples: Tensor) -> Tensor:
    """float32 [B, 1, L, L], to be added to scores: 0 where a query may see a key, `MASKED` elsewhere.

    A query sees the columns at and before its own that are of its group: those of the prompt, whose sample
    is 0, and those of its own sample. `groups` and `samples` are int32 [B, L]; see `batches.Rows`.
    """
    rows, width = groups.shape
    square = (rows, width, width)
    columns = Tensor(np.arange(width, dtype=np.int32).reshape(1, width))
    earlier = _of_keys(columns, square) <= _of_queries(columns, square)
    same_group = _of_keys(groups, square) == _of_queries(groups, square)
    sample = _of_keys(samples, square)
    same_sample = ops.logical_or(sample == 0, sample == _of_queries(samples, square))
    seen = ops.logical_and(earlier, ops.logical_and(same_group, same_sample))
    return ((1.0 - seen.astype(ms.float32)) * MASKED).expand_dims(1)


def _of_keys(x: Tensor, square: tuple[int, int, int]) -> Tensor:
    return spread(x.expand_dims(1), square)


def _of_queries(x: Tensor, square: tuple[int, int, int]) -> Tensor:
    return spread(x.expand_dims(2), square)


class RMSNorm(nn.Cell):
    """`x / sqrt(mean(x^2) + eps) * weight` over rows (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(size, np.float32)), name="weight")
        self.eps = eps

    def construct(self, x: Tensor) -> Tensor:
        """[N, size] -> [N, size]."""
        scale = ops.rsqrt((x * x).mean(-1, keep_dims=True) + self.eps)
        # The outer product [N, 1] x [1, size] spreads both factors at once, and its gradients are products
        # too: half the time of two spreads and their sums.
        return x * ops.matmul(scale, self.weight.reshape(1, -1))


class Linear(nn.Cell):
    """`x @ weight.T + bias`; weight is [outputs, inputs] as in Hugging Face files.

    With a `place`, the worker has some of the inputs, and the products of all are added up before the bias.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, place: Place = WHOLE) -> None:
        super().__init__()
        self.is_part = place.count > 1
        if self.is_part:
            self.added = Added(place)
        self.weight = Parameter(Tensor(np.zeros((outputs, inputs), np.float32)), name="weight")
        self.has_bias = bias
        if bias:
            self.bias = Parameter(Tensor(np.zeros(outputs, np.float32)), name="bias")
            self.add = ops.BiasAdd()
        self.product = ops.MatMul(transpose_b=True)
        self.adapted = False
        """Whether it has an adapter beside it: see `adapters`."""

    def construct(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        y = self.product(x, self.weight)
        if self.is_part:
            y = self.added(y)
        if self.has_bias:
            y = self.add(y, self.bias)
        return y


class Embedding(nn.Cell):
    """Rows of a table; weight is [vocabulary, hidden], of which the worker at `place` has its part."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Place) -> None:
        super().__init__()
        self.is_part = place.count > 1
        if self.is_part:
            self.first, self.rows = place.index * vocab_size, vocab_size
            self.added = Added(place)
        self.weight = Parameter(Tensor(np.zeros((vocab_size, hidden_size), np.float32)), name="weight")
        self.gather = ops.Gather()

    def construct(self, ids: Tensor) -> Tensor:
        """int32 [N] -> float32 [N, hidden]."""
        if not self.is_part:
            return self.gather(self.weight, ids, 0)
        # A row is of one worker; the others add zeros.
        own = ids - self.first
        here = ops.logical_and(own >= 0, own < self.rows)
        found = self.gather(self.weight, ops.where(here, own, ops.zeros_like(own)), 0)
        return self.added(found * spread(here.astype(ms.float32).expand_dims(1), found.shape))


Angles = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines and sines for queries, [B, L, heads, head_dim], and for keys, [B, L, kv_heads, head_dim]."""


class Rotary(nn.Cell):
    """Cosines and sines of the angles at given positions, computed once for all layers.

    With `dynamic` scaling the angles of a row depend on the row's own last position, and on
    nothing else in the batch.
    """

    def __init__(self, rope: RopeConfig, *, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.frequencies = Tensor(inverse_frequencies(rope, head_dim).reshape(1, 1, -1))
        self.scale = rope.attention_factor
        self.dynamic = rope.kind == "dynamic"
        self.factor = rope.factor
        self.limit = float(rope.max_positions)
        # theta' = theta * growth ** (d / (d - 2)), and frequency[i] = theta' ** (-2 i / d).
        exponents = -np.arange(0, head_dim, 2, dtype=np.float64) / max(head_dim - 2, 1)
        self.growth_exponents = Tensor(exponents.astype(np.float32).reshape(1, 1, -1))

    def construct(self, positions: Tensor) -> Angles:
        """int32 [B, L] -> float32; the second half of a head's dimensions repeats the first."""
        places = positions.astype(ms.float32)
        frequencies = self.frequencies
        if self.dynamic:
            length = ops.maximum(places.max(axis=1, keepdims=True) + 1.0, self.limit)
            growth = self.factor * length / self.limit - (self.factor - 1.0)
            frequencies = frequencies * ops.pow(growth.expand_dims(-1), self.growth_exponents)
        angles = places.expand_dims(-1) * frequencies
        angles = ops.cat((angles, angles), -1).expand_dims(2)
        cos, sin = ops.cos(angles) * self.scale, ops.sin(angles) * self.scale
        batch, length, _, head_dim = angles.shape
        queries = (batch, length, self.heads, head_dim)
        keys = (batch, length, self.kv_heads, head_dim)
        return spread(cos, queries), spread(sin, queries), spread(cos, keys), spread(sin, keys)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair `(i, i + D/2)` of `x` by its angle; all [B, L, heads, D]."""
    # Split and concatenate are each other's gradients, which makes this form cheaper than slices.
    first, second = ops.split(x, x.shape[-1] // 2, -1)
    return x * cos + ops.cat((-second, first), -1) * sin


class Attention(nn.Cell):
    """Grouped-query attention (Ainslie et al., 2023), in steps that generation can take one by one."""

    def __init__(self, config: ModelConfig, place: Place = WHOLE) -> None:
        super().__init__()
        self.is_part = place.count > 1
        if self.is_part:
            self.shared = Shared(place)
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.output_bias, place=place)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.scale = 1.0 / math.sqrt(self.head_dim)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """[B * L, hidden] -> queries [B, heads, L, D], keys and values [B, kv_heads, L, D], rotated."""
        if self.is_part:
            x = self.shared(x)
        return self.turned(self.q_proj(x), self.k_proj(x), self.v_proj(x), angles)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """What the projections gave, [B * L, features] each, as `project` returns it."""
        cos, sin, key_cos, key_sin = angles
        v = v.reshape(key_cos.shape)
        if self.qk_norm:
            q, k = self.q_norm(q.reshape(-1, self.head_dim)), self.k_norm(k.reshape(-1, self.head_dim))
        q = rotate(q.reshape(cos.shape), cos, sin)
        k = rotate(k.reshape(key_cos.shape), key_cos, key_sin)
        return q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Values mixed by softmaxed scores, before the last projection: -> [B * L, heads * D].

        q [B, heads, L, D]; k, v [B, kv_heads, S, D]; mask [B, heads, L, S], added to the scores.
        """
        batch, length, seen = q.shape[0], q.shape[2], k.shape[2]
        # The queries that share a key-value head are stacked, so that keys are never repeated in memory.
        q = q.reshape(batch * self.kv_heads, -1, self.head_dim)
        scores = self.scores(q * self.scale, k.reshape(batch * self.kv_heads, seen, self.head_dim))
        scores = scores.reshape(batch, self.heads, length, seen) + mask
        weights = self.softmax(scores).reshape(batch * self.kv_heads, -1, seen)
        mixed = self.mix(weights, v.reshape(batch * self.kv_heads, seen, self.head_dim))
        mixed = mixed.reshape(batch, self.heads, length, self.head_dim).transpose(0, 2, 1, 3)
        return mixed.reshape(batch * length, self.heads * self.head_dim)

    def construct(self, x: Tensor, angles: Angles, mask: Tensor) -> Tensor:
        """[B * L, hidden] -> [B * L, hidden]."""
        q, k, v = self.project(x, angles)
        return self.o_proj(self.mixed(q, k, v, mask))


class MLP(nn.Cell):
    """The gated MLP: `down(silu(gate(x)) * up(x))` (Shazeer, "GLU Variants", 2020)."""

    def __init__(self, config: ModelConfig, place: Place = WHOLE) -> None:
        super().__init__()
        self.is_part = place.count > 1
        if self.is_part:
            self.shared = Shared(place)
        self.gate_proj = Linear(config.hidden_size, config.intermediate, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate, config.hidden_size, bias=config.mlp_bias, place=place)

    def construct(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        if self.is_part:
            x = self.shared(x)
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """`silu(gate) * up`."""
        return gate * ops.sigmoid(gate) * up


class Layer(nn.Cell):
    """Attention and MLP, each after its norm and with its residual."""

    def __init__(self, config: ModelConfig, place: Place = WHOLE) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, place)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, place)

    def construct(self, x: Tensor, angles: Angles, mask: Tensor) -> Tensor:
        """[B * L, hidden] -> [B * L, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Body(nn.Cell):
    """What is under `model.` in Hugging Face's names. The Decoder runs it."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, place)
        self.layers = nn.CellList([Layer(config, place) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Named(nn.Cell):
    """A cell whose parameters keep their names in whatever cell it becomes a part of.

    MindSpore would put the path of attributes in their place, for good: a kept graph finds its parameters by
    name, and those of a policy would depend on which cells have been made around it.
    """

    def update_parameters_name(self, prefix: str = "", recurse: bool = True) -> None:
        """Change nothing."""


class Decoder(Named):
    """The model without its loss. Parameters start at zero (norms at one): load or `initialise` them.

    `config` is that of the whole model; the decoder is the part of it at `place`. ModelError if it has none.
    """

    def __init__(self, config: ModelConfig, prefix: str = "", place: Place = WHOLE) -> None:
        super().__init__()
        self.vocabulary = config.vocab_size
        """Of the whole model."""
        self.place = place
        self.config = config = part_of(config, place.count)
        """Of this part."""
        self.model = _Body(config, place)
        self.rotary = Rotary(
            config.rope, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim
        )
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._named = dict(self.parameters_and_names())
        for name, parameter in self._named.items():
            parameter.name = prefix + name

    @property
    def head_weight(self) -> Parameter:
        """[vocabulary, hidden]; the embedding's own parameter where they are tied."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def named_parameters(self) -> dict[str, Parameter]:
        """Hugging Face name -> parameter, without the prefix. A tied head is not listed.

        Of a policy of adapters they are the adapters, which are all that is trained: see `adapters`.
        """
        return dict(self._named)

    def mask_of_heads(self, mask: Tensor) -> Tensor:
        """[B, 1, L, S] -> [B, heads, L, S], as `Attention.mixed` takes it."""
        batch, _, length, seen = mask.shape
        return spread(mask, (batch, self.config.heads, length, seen))

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """The final-normed hidden states, float32 [B, L, hidden].

        ids and positions int32 [B, L]; mask float32 [B, 1, L, L] (see `attention_mask`). May be called from
        another cell's `construct`.
        """
        batch, length = ids.shape
        angles = self.rotary(positions)
        mask = self.mask_of_heads(mask)
        x = self.model.embed_tokens(ids.reshape(-1))
        for layer in self.model.layers:
            x = layer(x, angles, mask)
        return self.model.norm(x).reshape(batch, length, -1)

    def construct(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`hidden`."""
        return self.hidden(ids, positions, mask)


def initialise(decoder: Decoder, seed: int, deviation: float = 0.02) -> None:
    """Draw fresh weights, as for a new model: normal with the given deviation; biases 0, norms 1.

    A function of (seed, name): NumPy's Philox, one stream for each parameter in the order of its name.
    """
    for number, (name, parameter) in enumerate(sorted(decoder.named_parameters().items())):
        values = parameter.asnumpy()
        if name.endswith("bias"):
            values[...] = 0.0
        elif "norm" in name:
            values[...] = 1.0
        else:
            stream = np.random.Generator(np.random.Philox(key=(seed, number)))
            values[...] = stream.standard_normal(values.shape, np.float32) * np.float32(deviation)
