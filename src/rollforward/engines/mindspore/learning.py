"""Learning: the gradient of a batch, summed over micro-batches and workers, and one AdamW step.

    micro-batch 0, 1, ...   gradients added up in order            one graph, run for each
    all workers             gradients summed (AllReduce)           one graph
    global norm             squares summed for each tensor         one graph
    host                    norm, clipping scale, step's scalars
    AdamW                   parameters and moments                 one graph

A micro-batch has `samples_per_micro_batch` rows; rows that fill up the last one have weight 0.
Gradients live in buffers that each step overwrites: they are not part of the run's state. A step
whose loss or gradient is not finite changes nothing.

Left out: activation recomputation and mixed precision. Everything is float32.
"""

import math
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from rollforward.engines.mindspore.batches import columns, micro_batches
from rollforward.engines.mindspore.memory import Memory
from rollforward.engines.mindspore.objective import CompletionLogprobs, Objective
from rollforward.engines.mindspore.optimizer import ApplyAdamW, step_scalars
from rollforward.errors import NonFinite
from rollforward.grpo.ports import Group
from rollforward.grpo.types import EngineSettings, Floats, TrainingBatch, UpdateOutcome


class AddGradients(nn.Cell):
    """A micro-batch through `Objective`; its gradient is added to the buffers. Returns the [b, T] terms."""

    def __init__(
        self, objective: Objective, parameters: ms.ParameterTuple, buffers: ms.ParameterTuple
    ) -> None:
        super().__init__()
        self.objective = objective
        self.buffers = buffers
        self.gradient = ops.value_and_grad(objective, None, parameters, has_aux=True)

    def construct(self, *batch: ms.Tensor) -> tuple[ms.Tensor, ...]:
        """The arguments of `Objective`; its [b, T] results."""
        (_, *terms), gradients = self.gradient(*batch)
        for buffer, gradient in zip(self.buffers, gradients):  # noqa: B905 (the graph compiler has no strict)
            ops.assign_add(buffer, gradient)
        return tuple(terms)


class SquaredNorms(nn.Cell):
    """The sum of squares of each buffer, float32 [number of buffers].

    Rows first: one running float32 sum over millions of squares would lose the small ones.
    """

    def __init__(self, buffers: ms.ParameterTuple) -> None:
        super().__init__()
        self.buffers = buffers

    def construct(self) -> ms.Tensor:
        """A vector, in the order of the buffers."""
        sums: tuple[ms.Tensor, ...] = ()
        for buffer in self.buffers:
            sums = (*sums, ops.square(buffer).sum(-1).sum().reshape(1))
        return ops.concat(sums)


class SumOverWorkers(nn.Cell):
    """Each buffer becomes its sum over all workers. Collective."""

    def __init__(self, buffers: ms.ParameterTuple) -> None:
        super().__init__()
        self.buffers = buffers
        self.all_reduce = ops.AllReduce()

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for buffer in self.buffers:
            # One after the other: all workers must meet in the same order.
            done = ops.depend(done, ops.assign(buffer, self.all_reduce(ops.depend(buffer, done))))
        return done


class Learner:
    """The optimizer step of one worker: parameters, moments and buffers, and the graphs over them."""

    def __init__(
        self, logprobs: CompletionLogprobs, settings: EngineSettings, group: Group, memory: Memory
    ) -> None:
        named = logprobs.decoder.named_parameters()
        buffers = {
            name: ms.Parameter(np.zeros(parameter.shape, dtype=np.float32), name=f"gradient.{name}")
            for name, parameter in named.items()
        }
        tuples = ms.ParameterTuple(list(named.values())), ms.ParameterTuple(list(buffers.values()))
        self._group = group
        self._names = tuple(named)
        self._settings = settings
        self._tokens = settings.sampling.max_tokens
        self._clear_gradients = memory.zeroing(tuples[1])
        self._add = AddGradients(Objective(logprobs, settings.objective), *tuples)
        self._sum_over_workers = SumOverWorkers(tuples[1]) if group.world_size > 1 else None
        self._squared_norms = SquaredNorms(tuples[1])
        self._apply = ApplyAdamW(named, buffers, settings.optimizer)
        self.global_step: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        """[1]; optimizer steps done. On the host: what depends on it is computed there."""

    def compile(self) -> None:
        """Compile every graph."""
        rows, tokens = self._settings.samples_per_micro_batch, self._tokens
        columns = self._settings.prompt_length + tokens
        weights = ms.Tensor(np.zeros((rows, tokens), np.float32))
        self._clear_gradients.compile()
        self._add.compile(
            ms.Tensor(np.zeros((rows, columns), np.int32)),
            ms.Tensor(np.ones((rows, columns), np.bool_)),
            weights,
            ms.Tensor(np.zeros(rows, np.float32)),
            weights,
            weights,
            ms.Tensor(np.ones(1, np.float32)),
        )
        if self._sum_over_workers is not None:
            self._sum_over_workers.compile()
        self._squared_norms.compile()
        scalars = step_scalars(1, 0.0, self._settings.optimizer)
        self._apply.compile(ms.Tensor(np.float32(1.0)), *scalars)

    def moments(self) -> dict[str, ms.Parameter]:
        """`adam_m.<parameter>` and `adam_v.<parameter>`."""
        return {parameter.name: parameter for parameter in (*self._apply.first, *self._apply.second)}

    def update(self, batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        """See `grpo.ports.Engine.update`. NonFinite, with nothing changed, if the loss or gradient is."""
        terms = self._accumulate(batch)
        if self._sum_over_workers is not None:
            with self._group.sharing():
                self._sum_over_workers().asnumpy()
        squares = self._squared_norms().asnumpy().astype(np.float64)
        norm = math.sqrt(squares.sum())
        weights = batch.token_weights.astype(np.float64)
        sums = [float((weights * terms[name]).sum()) for name in ("loss", "kl", "clipped")]
        bad = np.flatnonzero(~np.isfinite(terms["loss"]).all(axis=1)).tolist()
        everyone = self._group.all_gather([sums, bad])
        loss, kl, clip_fraction = (math.fsum(each[0][i] for each in everyone) for i in range(3))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = {rank: each[1] for rank, each in enumerate(everyone) if each[1]}
            raise not_finite(
                loss, norm, rows, own=bad, squares=dict(zip(self._names, squares, strict=True)), terms=terms
            )
        self._step(norm, learning_rate)
        return UpdateOutcome(
            loss=loss, grad_norm=norm, kl=kl, clip_fraction=clip_fraction, logprobs=terms["logprobs"]
        )

    def _accumulate(self, batch: TrainingBatch) -> dict[str, Floats]:
        """The batch's gradient into the buffers; [B, T] each of loss, KL, clipped and log-probabilities."""
        self._clear_gradients()
        rows = len(batch.advantages)
        side_by_side = columns(batch.tokens)
        own = batch.old_logprobs is None
        arrays: dict[str, NDArray] = {
            "ids": side_by_side.ids,
            "mask": side_by_side.mask,
            "weights": batch.token_weights,
            "advantages": batch.advantages,
            "reference": batch.reference_logprobs,
            "old": batch.reference_logprobs if batch.old_logprobs is None else batch.old_logprobs,
        }
        flag = ms.Tensor(np.array([own], dtype=np.float32))
        found: list[tuple[NDArray, ...]] = []
        for piece in micro_batches(rows, self._settings.samples_per_micro_batch, arrays, "weights"):
            tensors = [ms.Tensor(array) for array in piece.values()]
            found.append(tuple(term.asnumpy() for term in self._add(*tensors, flag)))
        names = ("loss", "kl", "clipped", "logprobs")
        return {name: np.concatenate([f[i] for f in found])[:rows] for i, name in enumerate(names)}

    def _step(self, norm: float, learning_rate: float) -> None:
        settings = self._settings.optimizer
        clip = 0 < settings.max_grad_norm < norm
        scale = np.float32(settings.max_grad_norm / norm if clip else 1.0)
        step = int(self.global_step[0]) + 1
        self._apply(ms.Tensor(scale), *step_scalars(step, learning_rate, settings)).asnumpy()
        self.global_step[0] = step


def not_finite(
    loss: float,
    norm: float,
    rows: Mapping[int, Sequence[int]],
    *,
    own: Sequence[int],
    squares: Mapping[str, float],
    terms: Mapping[str, Floats],
) -> NonFinite:
    """The error, with all that was computed. `rows`: rank -> samples at fault, `own` those of this rank.

    `squares`: parameter -> sum of squares of its gradient; `terms`: name -> [B, T].
    """
    where = "; ".join(f"samples {list(bad)} of worker {rank}" for rank, bad in rows.items())
    return NonFinite(
        f"loss {loss}, gradient norm {norm}: not finite" + (f" because of {where}" if where else ""),
        hint="the weights are unchanged, and the same configuration fails again in the same way; resume with "
        "--resume_training and a smaller learning rate, or a larger beta, which keeps the policy closer",
        samples=own,
        facts={
            "loss": loss,
            "grad_norm": norm,
            "squared_gradient_norms": {name: float(square) for name, square in squares.items()},
        },
        arrays={f"computed.{name}": array for name, array in terms.items()},
    )
