"""How much memory a worker needs: a function of the model's shape and the configuration. No framework.

    weights       the policy, and with adapters these too
    reference     a second model; none with adapters, whose reference is the base
    gradients     the buffers in which a step's gradient is added up, and sums that are put aside
    moments       two of Adam for each number that is trained
    activations   what the forward pass of one micro-batch keeps for the backward pass, and logits
    cache         keys and values of the samples that are decoded together
    framework     program and libraries

Everything is float32. A step's peak is at the beginning of a backward pass, when all activations are there,
or at its end, when all new gradients are: `Memory.total` takes the larger of the two.

What a layer keeps is counted from the operations, for an engine that keeps what it must. For a token,
with hidden size h, query width q, key width k, MLP width m, `a` heads, in rows of w columns, that is
`6 h + 2 q + 2 k + 5 m + a w` numbers: x, its norm's factor and result, twice; queries and what attention
mixed; keys and values; gate, its sigmoid, their product, up, and what goes down; the weights of attention.
With recomputation it is h of every layer, and the whole of one.

Of a model that is cut over T workers (`models.sharding`), each needs all this for the decoder that is its
part; h is not cut. Where more than two add up hidden states, each has those of all for a moment, twice.

Left out: the copies that saving makes of what has not been written when an update begins (at most policy and
moments once more), and fragmentation. Tests compare this with what is measured.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

from rollforward.models.config import ModelConfig
from rollforward.models.lora import adapter_shapes
from rollforward.models.shapes import Shapes, parameter_shapes
from rollforward.models.sharding import part_of

_FLOAT = 4
_SLICE = 32 << 20
"""Bytes of logits in a slice, as an engine computes them. Four such arrays are alive at a time."""
FRAMEWORK = 600 << 20
"""Bytes of a worker that has imported its framework and compiled a small model's graphs, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is computed at a time."""

    rows: int
    """Of a micro-batch, the largest there is."""
    width: int
    """Columns of each."""
    cache_rows: int = 0
    """Of [head_dim] numbers, in the cache of one layer, for keys and for values each."""
    sums: int = 0
    """Sums of gradients that are put aside: see `grpo.addition`."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one worker needs, by what they are for."""

    weights: int
    reference: int
    gradients: int
    moments: int
    new_gradients: int
    """Those of one micro-batch, before they are added."""
    activations: int
    cache: int
    framework: int = FRAMEWORK

    @property
    def total(self) -> int:
        """At the peak."""
        both = self.new_gradients + self.activations
        everything: int = sum(getattr(self, each.name) for each in fields(self))
        return everything - both + max(self.new_gradients, self.activations)


def memory_of(
    config: ModelConfig,
    work: Work,
    *,
    replicas: int = 1,
    model_parallel: int = 1,
    parallel_optimizer: bool = False,
    recompute: bool = False,
    rank: int = 0,
    modules: Collection[str] = (),
) -> Memory:
    """What one of the workers needs.

    The model is cut over `model_parallel` workers, and `replicas` have the same part of it. `rank` and
    `modules`: of adapters; 0: there are none. ModelError for a model that cannot be cut so.
    """
    part = part_of(config, model_parallel)
    base = _numbers(parameter_shapes(part))
    adapters = _numbers(adapter_shapes(part, rank, modules)) if rank else 0
    trained = adapters or base
    gathered = 2 * model_parallel * work.rows * work.width * config.hidden_size if model_parallel > 2 else 0
    return Memory(
        weights=_FLOAT * (base + adapters),
        reference=0 if rank else _FLOAT * base,
        gradients=_FLOAT * trained * (1 + work.sums),
        moments=math.ceil(2 * _FLOAT * trained / (replicas if parallel_optimizer else 1)),
        new_gradients=_FLOAT * trained,
        activations=_activations(part, work, recompute=recompute, whole=not rank) + _FLOAT * gathered,
        cache=2 * _FLOAT * part.layers * work.cache_rows * part.head_dim,
    )


def _numbers(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def _activations(part: ModelConfig, work: Work, *, recompute: bool, whole: bool) -> int:
    """Bytes. `whole`: whether the head's gradient is computed too, before all others."""
    layer = (
        6 * part.hidden_size
        + 2 * part.heads * part.head_dim
        + 2 * part.kv_heads * part.head_dim
        + 5 * part.intermediate
        + part.heads * work.width
    )
    kept = part.layers * part.hidden_size + layer if recompute else part.layers * layer
    tokens = work.rows * work.width
    ends = 4 * part.hidden_size + part.heads * work.width
    # The head's gradient: what a slice adds, and the sum; where there are several, the sum before, and a zero
    # to begin with. Measured so, for one slice and for five.
    copies = 2 if _FLOAT * tokens * part.vocab_size <= _SLICE else 4
    head = copies * part.vocab_size * part.hidden_size if whole else 0
    return _FLOAT * (tokens * (kept + ends) + head) + 4 * _SLICE
