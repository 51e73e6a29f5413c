"""Learning: the gradient of a batch, summed over micro-batches, chunks and workers, and one AdamW step.

    each chunk              its micro-batches' gradients added up  one graph, run for each
    all chunks, workers     chunks' gradients added up             `adding`: a graph for each other worker
    model over workers      gradients in parts added up            one graph, where there are any
    global norm             squares summed for each tensor         one graph
    host                    norm, clipping scale, step's scalars
    AdamW                   parameters and moments                 one graph
    spread over workers     each updates what it keeps             and a few graphs that bring it to all

The samples of a chunk stand behind one another in micro-batches as `grpo.packing` has it; a graph is made for
each shape. With beta 0, samples without an advantage add exactly nothing, so they are left out; the
log-probabilities of these are reported as 0, like those of padding.

A model that is cut over workers has in each of them the gradient of its part, and that of what all have,
whole: the same bits in all. Only what `models.sharding.learns_in_parts` names gets a part of its gradient in
each, and these are added up.

Gradients live in buffers that each step overwrites: they are not part of the run's state. A step
whose loss or gradient is not finite changes nothing.

With `recompute` a layer keeps its input and its output only, and computes the rest again in the backward
pass: the same operations on the same numbers, so the same bits.

Left out: mixed precision. Everything is float32.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from rollforward.boxes import Box, whole
from rollforward.engines.mindspore.adding import TotalGradient
from rollforward.engines.mindspore.batches import chunk_of, ladder_of, laid_out, packed
from rollforward.engines.mindspore.compiling import ByShape, Graphs
from rollforward.engines.mindspore.memory import Memory
from rollforward.engines.mindspore.model import Decoder
from rollforward.engines.mindspore.objective import CompletionLogprobs, Objective, example
from rollforward.engines.mindspore.optimizer import ApplyAdamW, from_owners, step_scalars
from rollforward.engines.mindspore.shards import AddParts
from rollforward.errors import NonFinite
from rollforward.grpo.group import Replicas
from rollforward.grpo.spreading import spread
from rollforward.grpo.types import EngineSettings, Floats, TrainingBatch, UpdateOutcome
from rollforward.models.sharding import axis_of, learns_in_parts


class AddGradients(nn.Cell):
    """A micro-batch through `Objective`; its gradient is added to the buffers. Returns terms by token."""

    def __init__(
        self, objective: Objective, parameters: ms.ParameterTuple, buffers: ms.ParameterTuple
    ) -> None:
        super().__init__()
        self.objective = objective
        self.buffers = buffers
        self.gradient = ops.value_and_grad(objective, None, parameters, has_aux=True)

    def construct(self, *batch: ms.Tensor) -> tuple[ms.Tensor, ...]:
        """The arguments of `Objective`; its results for each token."""
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


class Learner:
    """The optimizer step of one worker: parameters, moments and buffers, and the graphs over them.

    Creating one is collective.
    """

    def __init__(
        self, decoder: Decoder, settings: EngineSettings, group: Replicas, memory: Memory, graphs: Graphs
    ) -> None:
        named = decoder.named_parameters()
        if settings.recompute:
            for layer in decoder.model.layers:
                layer.recompute()
        buffers = {
            name: ms.Parameter(np.zeros(parameter.shape, dtype=np.float32), name=f"gradient.{name}")
            for name, parameter in named.items()
        }
        tuples = ms.ParameterTuple(list(named.values())), ms.ParameterTuple(list(buffers.values()))
        self._group = group
        self._names = tuple(named)
        self._place = decoder.place
        self._settings = settings
        self._graphs = graphs

        self._ladder = ladder_of(settings)

        def make(rows: int, width: int) -> tuple[AddGradients, tuple[ms.Tensor, ...]]:
            temperature = settings.sampling.learning_temperature
            logprobs = CompletionLogprobs(
                decoder, rows, width, temperature, head_learns=settings.lora is None
            )
            cell = AddGradients(Objective(logprobs, settings.objective), *tuples)
            terms = ms.Tensor(np.zeros((rows, width), np.float32))
            own = ms.Tensor(np.ones(1, np.float32))
            return cell, (terms, terms, terms, terms, own, *example(rows, width))

        self._add: ByShape[AddGradients] = graphs.by_shape("learn", make)
        self._total = TotalGradient(tuples[1], settings.chunks, group, memory)
        in_parts = [buffers[name] for name in named if learns_in_parts(name)]
        self._add_parts = (
            AddParts(ms.ParameterTuple(in_parts), decoder.place)
            if in_parts and decoder.place.count > 1
            else None
        )
        self._squared_norms = SquaredNorms(tuples[1])
        self.spreads = settings.parallel_optimizer and group.world_size > 1
        """Whether each worker updates only its part."""
        kept = spread({name: tuple(each.shape) for name, each in named.items()}, group.world_size)
        everything = {name: whole(tuple(each.shape)) for name, each in named.items()}
        self.kept: Mapping[str, Box] = kept[group.rank] if self.spreads else everything
        """Parameter -> what this worker updates, and keeps the moments of."""
        self._apply = ApplyAdamW(named, buffers, settings.optimizer, self.kept)
        self._from_owners = from_owners(named, kept, self._apply.rows, group) if self.spreads else []
        self.global_step: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        """[1]; optimizer steps done. On the host: what depends on it is computed there."""

    def compile(self) -> None:
        """Compile every graph that has one shape only, always in this order."""
        self._total.compile(self._graphs)
        if self._add_parts is not None:
            self._graphs.compile("add_parts", self._add_parts)
        self._graphs.compile("squared_norms", self._squared_norms)
        scalars = step_scalars(1, 0.0, self._settings.optimizer)
        self._graphs.compile("adamw", self._apply, ms.Tensor(np.float32(1.0)), *scalars)
        for number, cell in enumerate(self._from_owners):
            self._graphs.compile(f"from_owners_{number}", cell)

    def moments(self) -> dict[str, ms.Parameter]:
        """`adam_m.<parameter>` and `adam_v.<parameter>`, of what this worker keeps."""
        return {parameter.name: parameter for parameter in (*self._apply.first, *self._apply.second)}

    def update(self, batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        """See `grpo.ports.Engine.update`. NonFinite, with nothing changed, if the loss or gradient is."""
        terms = self._add_up(batch)
        weights = batch.token_weights.astype(np.float64)
        sums = [
            [float((weights[rows] * terms[name][rows]).sum()) for name in ("loss", "kl", "clipped")]
            for rows in self._chunks(batch)
        ]
        bad = np.flatnonzero(~np.isfinite(terms["loss"]).all(axis=1)).tolist()
        squares = self._squares()
        norm = math.sqrt(squares.sum())
        everyone = self._group.all_gather([sums, bad])
        by_chunk = [each for told in everyone for each in told[0]]
        loss, kl, clip_fraction = (math.fsum(each[i] for each in by_chunk) for i in range(3))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = {replica * self._place.count: each[1] for replica, each in enumerate(everyone) if each[1]}
            raise not_finite(
                loss, norm, rows, own=bad, squares=dict(zip(self._names, squares, strict=True)), terms=terms
            )
        self._step(norm, learning_rate)
        return UpdateOutcome(
            loss=loss, grad_norm=norm, kl=kl, clip_fraction=clip_fraction, logprobs=terms["logprobs"]
        )

    def _squares(self) -> NDArray[np.float64]:
        """Of each parameter, the sum of squares of its gradient, over all its parts. Collective."""
        own = self._squared_norms().asnumpy().astype(np.float64)
        parts, place = self._place.count, self._place
        if parts == 1:
            return own
        told = self._group.all.all_gather(own.tolist())
        first = self._group.all.rank - place.index
        of_parts = np.array(told[first : first + parts], np.float64)
        whole_ones = np.array([axis_of(name) is None for name in self._names])
        total = of_parts[0].copy()
        for part in of_parts[1:]:
            total += np.where(whole_ones, 0.0, part)
        return total

    def _chunks(self, batch: TrainingBatch) -> list[slice]:
        """The rows of each chunk."""
        rows = len(batch.advantages) // self._settings.chunks
        return [slice(start, start + rows) for start in range(0, rows * self._settings.chunks, rows)]

    def _add_up(self, batch: TrainingBatch) -> dict[str, Floats]:
        """The whole step's gradient into the buffers; [B, T] each of loss, KL, clipped, log-probabilities."""
        # In the order in which `Objective` takes them.
        given: dict[str, NDArray] = {
            "weights": batch.token_weights,
            "advantages": batch.advantages,
            "reference": batch.reference_logprobs,
            "old": batch.reference_logprobs if batch.old_logprobs is None else batch.old_logprobs,
        }
        own = ms.Tensor(np.array([batch.old_logprobs is None], dtype=np.float32))
        counts = None if self._settings.objective.beta > 0 else batch.advantages != 0
        terms = {
            name: np.zeros(batch.token_weights.shape, np.float32)
            for name in ("loss", "kl", "clipped", "logprobs")
        }
        chunks = self._chunks(batch)

        def add_gradient(number: int) -> None:
            rows = chunks[number]
            chunk = chunk_of(batch.tokens, rows)
            for micro_batch in packed(chunk, self._ladder, None if counts is None else counts[rows]):
                shape = micro_batch.shape
                columns, places = laid_out(chunk, micro_batch)
                weighing = (places.take(each[rows], shape) for each in given.values())
                arguments = (*map(ms.Tensor, weighing), own, *map(ms.Tensor, columns.arrays()))
                cell = self._add.at(*shape)
                with self._sharing():
                    found = [each.asnumpy() for each in cell(*arguments)]
                for whole_array, computed in zip(terms.values(), found, strict=True):
                    places.put_back(whole_array[rows], computed)

        self._total.add_up(add_gradient)
        if self._add_parts is not None:
            with self._sharing():
                self._add_parts().asnumpy()
        return terms

    def _sharing(self) -> AbstractContextManager[None]:
        """Entered around graphs in which the workers that hold the model together meet."""
        return self._group.sharing() if self._place.count > 1 else nullcontext()

    def _step(self, norm: float, learning_rate: float) -> None:
        settings = self._settings.optimizer
        clip = 0 < settings.max_grad_norm < norm
        scale = np.float32(settings.max_grad_norm / norm if clip else 1.0)
        step = int(self.global_step[0]) + 1
        self._apply(ms.Tensor(scale), *step_scalars(step, learning_rate, settings)).asnumpy()
        for cell in self._from_owners:
            with self._group.sharing():
                cell().asnumpy()
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
