"""A policy of low-rank adapters beside a base, which is the reference: one copy of the base in memory.

    base       a `Decoder`; its parameters are read and never written
    policy     the same decoder and the same parameters, but the parts that have an adapter are `Adapted`

Both are made of the same norms, embedding and weights, so the reference costs no memory, and switching the
adapters off is to use the other of the two. See `models.lora` for the formula and the names.

Beside a model that is cut over workers, adapters are cut too (`models.sharding`). Where each has a part of
the inputs, its `B (A x)` is a term of a sum, like its `W x`, and both are added up at once.

Nothing is merged: generation too computes `W x` and `B (A x)` apart. So no weight is rounded, the base has
the same bytes at the end as at the start, and completions come from the very function that is learnt.
"""

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from rollforward.engines.mindspore.model import Decoder, Linear, Named
from rollforward.grpo.types import LoraSettings
from rollforward.models.lora import PREFIX


class _Factor(nn.Cell):
    """A or B: a matrix with the name that PEFT gives it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.zeros((outputs, inputs), np.float32)), name="weight")


class Adapted(Linear):
    """`y = base(x) + scale * B (A x)`, with the base's own weight. A and B start at zero: load them."""

    def __init__(self, base: Linear, lora: LoraSettings) -> None:
        # Not Linear's, which would make a weight.
        nn.Cell.__init__(self)
        _take_over(self, base)
        outputs, inputs = base.weight.shape
        self.lora_A = _Factor(lora.rank, inputs)
        self.lora_B = _Factor(outputs, lora.rank)
        self.adapted = True
        self.scale = lora.scale

    def construct(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        y = self.product(x, self.weight)
        adapter = self.product(self.product(x, self.lora_A.weight), self.lora_B.weight) * self.scale
        if self.is_part:
            y = self.added(y + adapter)
        if self.has_bias:
            y = self.add(y, self.bias)
        return y if self.is_part else y + adapter


class _Layers(Named, nn.CellList):
    """Layers whose parameters keep their names."""


def adapted(base: Decoder, lora: LoraSettings) -> Decoder:
    """The policy. Its `named_parameters` are the adapters, by PEFT's names; the base's stay the base's."""

    def with_adapters(part: nn.Cell) -> nn.Cell:
        found = {
            name: Adapted(getattr(part, name), lora)
            for name in lora.target_modules
            if isinstance(getattr(part, name, None), Linear)
        }
        return _twin(part, **found)

    layers = [
        _twin(layer, self_attn=with_adapters(layer.self_attn), mlp=with_adapters(layer.mlp))
        for layer in base.model.layers
    ]
    policy = _twin(base, model=_twin(base.model, layers=_Layers(layers)))
    assert isinstance(policy, Decoder)
    trained = {
        PREFIX + name: parameter for name, parameter in policy.parameters_and_names() if ".lora_" in name
    }
    # A cell that a parameter becomes part of renames it.
    for name, parameter in {**base.named_parameters(), **trained}.items():
        parameter.name = name
    policy._named = trained
    return policy


def _twin(cell: nn.Cell, **parts: nn.Cell) -> nn.Cell:
    """A cell of the same class, with the same parts and parameters, but for those that are given."""
    kind: Any = type(cell)
    twin: nn.Cell = kind.__new__(kind)
    nn.Cell.__init__(twin)
    _take_over(twin, cell)
    for name, part in parts.items():
        setattr(twin, name, part)
    return twin


def _take_over(twin: nn.Cell, cell: nn.Cell) -> None:
    """Everything that the cell has and a new one has not."""
    known = vars(nn.Cell())
    for name, value in vars(cell).items():
        if name not in known:
            setattr(twin, name, value)
    for name, part in (*cell._params.items(), *cell._cells.items()):
        setattr(twin, name, part)
