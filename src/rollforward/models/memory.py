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

Left out: the copies that saving makes of what has not been written when an update begins (at most policy and
moments once more), and fragmentation. Tests compare this with what is measured.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

from rollforward.models.config import ModelConfig
from rollforward.models.lora import adapter_shapes
from rollforward.models.shapes import Shapes, parameter_shapes

_FLOAT = 4
_SLICES = 4 * (32 << 20)
"""Of logits that are alive at a time, in bytes: an engine computes them slice by slice."""
FRAMEWORK = 400 << 20
"""Bytes of a process that has imported its framework and compiled its graphs, on the CPU."""


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
    workers: int = 1,
    tensor_parallel: int = 1,
    parallel_optimizer: bool = False,
    recompute: bool = False,
    rank: int = 0,
    modules: Collection[str] = (),
) -> Memory:
    """What one of the workers needs.

    `workers` hold the same part of the model, which is cut over `tensor_parallel` devices: matrices by rows
    or columns, embedding and head by vocabulary; norms and hidden states are on all. `rank` and `modules`:
    of adapters; 0: there are none.
    """
    base = _numbers(parameter_shapes(config), tensor_parallel)
    adapters = _numbers(adapter_shapes(config, rank, modules), tensor_parallel) if rank else 0
    trained = adapters or base
    return Memory(
        weights=_FLOAT * (base + adapters),
        reference=0 if rank else _FLOAT * base,
        gradients=_FLOAT * trained * (1 + work.sums),
        moments=math.ceil(2 * _FLOAT * trained / (workers if parallel_optimizer else 1)),
        new_gradients=_FLOAT * trained,
        activations=_activations(config, work, tensor_parallel, recompute=recompute, whole=not rank),
        cache=2 * _FLOAT * config.layers * work.cache_rows * config.head_dim // tensor_parallel,
    )


def _numbers(shapes: Shapes, tensor_parallel: int) -> int:
    """On one device: matrices are cut, vectors are not."""
    return sum(
        math.prod(shape) if len(shape) < 2 else math.ceil(math.prod(shape) / tensor_parallel)
        for shape in shapes.values()
    )


def _activations(
    config: ModelConfig, work: Work, tensor_parallel: int, *, recompute: bool, whole: bool
) -> int:
    """Bytes. `whole`: whether the head's gradient is computed too, before all others."""
    cut = (
        2 * config.heads * config.head_dim
        + 2 * config.kv_heads * config.head_dim
        + 5 * config.intermediate
        + config.heads * work.width
    )
    layer = 6 * config.hidden_size + math.ceil(cut / tensor_parallel)
    kept = config.layers * config.hidden_size + layer if recompute else config.layers * layer
    tokens = work.rows * work.width
    mask = config.heads * work.width
    head = math.ceil(config.vocab_size * config.hidden_size / tensor_parallel) if whole else 0
    ends = 4 * config.hidden_size + math.ceil(mask / tensor_parallel)
    return _FLOAT * (tokens * (kept + ends) + head) + _SLICES
