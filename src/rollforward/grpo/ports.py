"""The protocols through which the trainer reaches everything that is not GRPO.

The trainer owns the order of things. Computing, scoring, storing and observing each have a protocol of
their own, so that each can be replaced and tested alone. Only NumPy arrays and plain values cross the
boundary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray

from rollforward.grpo.types import (
    Bools,
    Floats,
    Generation,
    Ints,
    RolloutChunk,
    TokenBatch,
    TrainingBatch,
    UpdateOutcome,
)
from rollforward.position import Position
from rollforward.tensors import Layout, Tensors

Meeting = Callable[[], AbstractContextManager[None]]
"""Entered around whatever blocks until all workers reach it, so that it can be watched."""


class Group(Protocol):
    """The workers of this run. Every method is collective: all ranks call it, in the same order.

    A group that is also a `channel.Sums` makes what ranks exchange at a commit the same size for any number
    of ranks.
    """

    rank: int
    world_size: int

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value (anything JSON can hold), in rank order, on every rank."""
        ...

    def sharing(self) -> AbstractContextManager[None]:
        """Entered around a collective that is not one of these methods, such as an engine's sum of gradients.

        So a watcher knows that this rank is waiting for others, and a failure is an error that says so.
        """
        ...


@runtime_checkable
class Teams(Protocol):
    """A group of workers that can be shared out in smaller ones, which hold a model together."""

    def team(self, size: int) -> Group:
        """This worker and its neighbours by rank, `size` in all. Collective for these, as are its methods."""
        ...


class Engine(Protocol):
    """Does the computing. It has no randomness of its own and no state besides `tensors()`.

    `update` is a pure function of (tensors, all workers' batches, learning rate): the same input bits give
    the same output bits on the same versions and device, however many workers share the chunks. So each
    chunk's gradient is computed by itself, and `grpo.addition` says in which order they are added.
    """

    group: Group
    views: bool
    """Whether `tensors()` exposes the parameters' own memory: then values can be written there."""

    def generate(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> Generation:
        """Sample one completion for each row.

        `prompt_ids` [B, P] and `prompt_mask` [B, P] may be padded on either side.
        `uniforms` [B, max_tokens], in [0, 1): sample `b` draws its token `t` with `uniforms[b, t]`,
        by inverting the cumulative distribution; there is no other randomness. A row's result
        does not depend on the other rows.
        """
        ...

    def reference_logprobs(self, tokens: TokenBatch) -> Floats:
        """[B, T]: each completion token's log-probability under the reference model; 0 where masked.

        As in `update`, under the sampled distribution: see `grpo.objective` on temperature.
        """
        ...

    def update(self, batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        """One optimizer step. Collective: all ranks call it, each with its own samples.

        Raises NonFinite, and changes nothing, when the loss or the gradient norm is not finite.
        """
        ...

    def sync_reference(self) -> None:
        """Make the reference model a copy of the policy."""
        ...

    def layout(self) -> Layout:
        """dtype, shape and placement of everything in `tensors()`, without touching the device."""
        ...

    def tensors(self) -> Tensors:
        """Views of the live parameters, without a copy. What is not here is not saved.

        The roles are `policy_model`, `optimizer` and `ref`. With adapters (`EngineSettings.lora`) the
        policy's tensors are the adapters, and `ref` has none. A view keeps showing the newest values;
        `update` and `sync_reference` change them. On a device whose memory the host does not see
        (`views` is false), each tensor is copied whenever it is accessed, and the copy does not
        change later. Either way, values can be set with `load`, and another thread may read while
        the engine generates.
        """
        ...

    def revision(self, role: str) -> int:
        """A count that grows whenever the role's tensors may have changed.

        `update`, `sync_reference` and `load` may change them: the same count means the same bytes. Writes
        through a view are not counted.
        """
        ...

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        """Put a restored array in place; the shape and dtype are those of `layout()[role][name]`."""
        ...


class Verifier(Protocol):
    """A reward function with a name. Called on the samples of one chunk."""

    name: str

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
    ) -> Sequence[float]:
        """One reward for each completion."""
        ...


class RolloutLog(Protocol):
    """Where finished rollouts go before they are used."""

    def find(self, position: Position, chunk: int) -> RolloutChunk | None:
        """The chunk, if an earlier start of this run finished it."""
        ...

    def append(self, position: Position, chunk: int, rollouts: RolloutChunk) -> None:
        """Returns when the chunk is on stable storage."""
        ...

    def record(
        self, position: Position, iteration: int, outcome: UpdateOutcome, learning_rate: float
    ) -> None:
        """Record the outcome of an update."""
        ...


class Checkpoints(Protocol):
    """Where state goes. Collective: all ranks call each method at the same point."""

    def due(self, global_step: int, every: int | Literal["auto"]) -> bool:
        """Whether to begin now, after so many steps; asked after each step, and the same on all ranks.

        `auto`: as often as is worth it.
        """
        ...

    def begin(self, position: Position, global_step: int) -> None:
        """Start saving the current state. Weights may be read until `before_update` returns."""
        ...

    def before_update(self) -> None:
        """Weights are about to change: whatever must still be read from them is read now."""
        ...

    def boundary(self) -> None:
        """A step is done: commit what all ranks have finished, and report what failed."""
        ...

    def close(self) -> None:
        """Finish and commit the save in progress."""
        ...


class Observer(Protocol):
    """Watches a run. Nothing an observer does changes the run."""

    def phase(self, position: Position, name: str) -> None:
        """The run enters a phase: `generate`, `verify`, `reference`,
        `log`, `update` or `checkpoint`."""
        ...

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        ...
