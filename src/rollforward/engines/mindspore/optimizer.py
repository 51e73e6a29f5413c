"""AdamW, one fused kernel for each tensor.

With gradient g, learning rate a, decay d, at step t = 1, 2, ... (Loshchilov and Hutter, "Decoupled
Weight Decay Regularization", arXiv:1711.05101, with the schedule folded into a):

    p <- p (1 - a d)                        tensors of two axes or more; not biases and norms
    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - a (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

MindSpore's Adam kernel computes p <- p - a sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps'), which is
the last line for eps' = eps sqrt(1 - b2^t). Everything that depends on t is computed on the host
in double precision, so the graph holds no state except m, v and p.

All of this goes element by element, whatever else is in the array, so the rows of a tensor may be updated by
one worker and other rows by another (`grpo.spreading`). `FromOwners` then brings the new values to all.
"""

import math
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from rollforward.boxes import Box
from rollforward.engines.mindspore.model import Named
from rollforward.engines.mindspore.shards import FromReplica
from rollforward.grpo.group import Replicas
from rollforward.grpo.types import OptimizerSettings


class _AdamW(Named):
    """The step of one tensor, and the first of its arguments again when that is done.

    A cell of its own: in a loop over all tensors, the graph compiler of MindSpore 2.10 nests whatever follows
    an `if`, and gives up at 1,000 levels. A model of 30 layers has more.
    """

    def __init__(
        self,
        whole: ms.Parameter,
        gradient: ms.Parameter,
        moments: tuple[ms.Parameter, ms.Parameter],
        rows: ms.Parameter | None,
        cut: tuple[int, ...],
        settings: OptimizerSettings,
    ) -> None:
        super().__init__()
        self.whole = whole
        self.gradient = gradient
        self.first, self.second = moments
        self.updated = whole if rows is None else rows
        self.cut = cut
        self.decays = settings.weight_decay > 0 and whole.ndim >= 2
        self.beta1 = ms.Tensor(settings.adam_beta1, ms.float32)
        self.beta2 = ms.Tensor(settings.adam_beta2, ms.float32)
        self.adam = ops.Adam()

    def construct(
        self,
        done: ms.Tensor,
        scale: ms.Tensor,
        learning_rate: ms.Tensor,
        keep: ms.Tensor,
        beta1_power: ms.Tensor,
        beta2_power: ms.Tensor,
        epsilon: ms.Tensor,
    ) -> ms.Tensor:
        """`done`, when this tensor is."""
        gradient = self.gradient
        if self.cut:
            begin, end = self.cut
            done = ops.depend(done, ops.assign(self.updated, ops.depend(self.whole, done)[begin:end]))
            gradient = gradient[begin:end]
        if self.decays:
            done = ops.depend(done, ops.assign(self.updated, self.updated * ops.depend(keep, done)))
        gradient = gradient * ops.depend(scale, done)
        updated = self.adam(
            self.updated,
            self.first,
            self.second,
            beta1_power,
            beta2_power,
            learning_rate,
            self.beta1,
            self.beta2,
            epsilon,
            gradient,
        )
        return ops.depend(done, updated)


class _AllAdamW(Named, nn.CellList):
    """That of every tensor."""


class ApplyAdamW(nn.Cell):
    """(scale, then the scalars of `step_scalars`) -> updates parameters and moments in place.

    `gradients` are Parameters too, multiplied by `scale` (clipping) on the way. `boxes`: parameter -> what is
    updated here, all of it or some rows; the rows are updated in an array of their own, `rows`.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        gradients: Mapping[str, ms.Parameter],
        settings: OptimizerSettings,
        boxes: Mapping[str, Box],
    ) -> None:
        super().__init__()
        names = list(boxes)
        self.first = ms.ParameterTuple([_like_rows("adam_m.", name, boxes[name]) for name in names])
        self.second = ms.ParameterTuple([_like_rows("adam_v.", name, boxes[name]) for name in names])
        cuts = {name: _rows_of(boxes[name], parameters[name].shape) for name in names}
        self.rows = {name: _like_rows("rows.", name, boxes[name]) for name in names if cuts[name]}
        self.tensors = _AllAdamW(
            [
                _AdamW(parameters[name], gradients[name], moments, self.rows.get(name), cuts[name], settings)
                for name, moments in zip(names, zip(self.first, self.second, strict=True), strict=True)
            ]
        )

    def construct(
        self,
        scale: ms.Tensor,
        learning_rate: ms.Tensor,
        keep: ms.Tensor,
        beta1_power: ms.Tensor,
        beta2_power: ms.Tensor,
        epsilon: ms.Tensor,
    ) -> ms.Tensor:
        """Returns the scale, when all is done."""
        done = scale
        for tensor in self.tensors:
            done = tensor(done, scale, learning_rate, keep, beta1_power, beta2_power, epsilon)
        return done


def step_scalars(step: int, learning_rate: float, settings: OptimizerSettings) -> tuple[ms.Tensor, ...]:
    """What `ApplyAdamW` takes after `scale`, for step 1, 2, ...: float32 scalars."""
    beta1_power = settings.adam_beta1**step
    beta2_power = settings.adam_beta2**step
    values = (
        learning_rate,
        1.0 - learning_rate * settings.weight_decay,
        beta1_power,
        beta2_power,
        settings.eps * (1.0 - beta2_power) ** 0.5,
    )
    return tuple(ms.Tensor(np.float32(value)) for value in values)


class FromOwners(nn.Cell):
    """Each parameter gets its new value from the workers that updated it. Collective for these.

    `kept`: what each worker updates; `rows`: the arrays in which this one updates rows.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        kept: Sequence[Mapping[str, Box]],
        rows: Mapping[str, ms.Parameter],
        replicas: Replicas,
    ) -> None:
        super().__init__()
        names = list(parameters)
        self.parameters_ = ms.ParameterTuple([parameters[name] for name in names])
        self.sent = nn.CellList([FromReplica(replicas, owner) for owner in range(len(kept))])
        self.pieces = tuple(_pieces_of(name, parameters[name].shape, kept, replicas.rank) for name in names)
        self.own = ms.ParameterTuple([rows.get(name, parameters[name]) for name in names])

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for i in range(len(self.pieces)):
            value: tuple[ms.Tensor, ...] = ()
            for owner, cut, mine in self.pieces[i]:
                # One after the other: all workers must meet in the same order.
                piece = ops.depend(self.own[i] if mine else self.parameters_[i], done)
                if cut and not mine:
                    piece = piece[cut[0] : cut[1]]
                sent = self.sent[owner](piece)
                value = (*value, sent)
                if len(self.pieces[i]) > 1:
                    done = ops.depend(done, sent)
            new = ops.concat(value) if len(value) > 1 else value[0]
            done = ops.depend(done, ops.assign(self.parameters_[i], new))
        return done


def from_owners(
    parameters: Mapping[str, ms.Parameter],
    kept: Sequence[Mapping[str, Box]],
    rows: Mapping[str, ms.Parameter],
    replicas: Replicas,
) -> list[FromOwners]:
    """`FromOwners` of all parameters, to be run in this order: in groups no larger than the largest tensor.

    What a graph receives takes memory until it ends.
    """
    sizes = {name: math.prod(parameter.shape) for name, parameter in parameters.items()}
    groups: list[dict[str, ms.Parameter]] = []
    room = 0
    for name, parameter in parameters.items():
        if sizes[name] > room:
            groups.append({})
            room = max(sizes.values())
        groups[-1][name] = parameter
        room -= sizes[name]
    return [FromOwners(group, kept, rows, replicas) for group in groups]


def _pieces_of(
    name: str, shape: Sequence[int], kept: Sequence[Mapping[str, Box]], rank: int
) -> tuple[tuple[int, tuple[int, ...], bool], ...]:
    """(owner, rows, whether this worker is it) of each box of a tensor, in the order of its rows."""
    owners = sorted((boxes[name].offset, owner) for owner, boxes in enumerate(kept) if name in boxes)
    return tuple((owner, _rows_of(kept[owner][name], shape), owner == rank) for _, owner in owners)


def _rows_of(box: Box, shape: Sequence[int]) -> tuple[int, ...]:
    """First and end of the box's rows; empty for a whole tensor."""
    return () if tuple(box.shape) == tuple(shape) else (box.offset[0], box.offset[0] + box.shape[0])


def _like_rows(prefix: str, name: str, box: Box) -> ms.Parameter:
    return ms.Parameter(np.zeros(box.shape, dtype=np.float32), name=prefix + name)
