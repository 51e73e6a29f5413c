"""The engine on MindSpore: `grpo.ports.Engine`, joined from model, generation and learning.

Where the model is cut over workers, each has an engine of its part, and all of them do everything together:
the same samples, the same shapes, the same order. `layout` says which part it is.

There are two decoders, policy and reference; generation and the updates share the policy's parameters. With
adapters, the reference is the base that they stand beside (`adapters`). Graphs: the norm, the optimizer's
step; for each shape of a batch prefill and a decoding step; and for each shape of a micro-batch its reference
log-probabilities and its gradient. See `compiling` for when they are compiled, `generation` and
`grpo.packing` for the shapes.

How the host reaches the parameters, as views or by copies, depends on the device: see `memory`.
All computing is `flushed`, so that bits do not depend on the thread that computes.
"""

from contextlib import nullcontext
from typing import Any

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

from rollforward.boxes import Box
from rollforward.engines.mindspore.adapters import adapted
from rollforward.engines.mindspore.batches import chunk_of, ladder_of, laid_out, packed
from rollforward.engines.mindspore.compiling import ByShape, Graphs
from rollforward.engines.mindspore.denormals import flushed
from rollforward.engines.mindspore.generation import Generator
from rollforward.engines.mindspore.learning import Learner
from rollforward.engines.mindspore.memory import Memory, Slots, layout_of_slots, memory_of, use_device
from rollforward.engines.mindspore.model import Decoder, ModelConfig
from rollforward.engines.mindspore.objective import CompletionLogprobs, example
from rollforward.engines.mindspore.shards import place_of
from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess, Replicas
from rollforward.grpo.ports import Group, Meeting
from rollforward.grpo.types import (
    Bools,
    EngineSettings,
    Floats,
    Generation,
    Ints,
    TokenBatch,
    TrainingBatch,
    UpdateOutcome,
)
from rollforward.models.sharding import part_of
from rollforward.models.weights import load_weights
from rollforward.tensors import Layout, Tensors, TensorSpec


class MindSporeEngine:
    """`grpo.ports.Engine`; made by `create`."""

    def __init__(self, settings: EngineSettings, group: Group, memory: Memory) -> None:
        config = ModelConfig.parse(settings.model_config)
        # First: a model that cannot be cut, so that nothing waits for others.
        part_of(config, settings.model_parallel)
        self.place = place = place_of(group, settings.model_parallel)
        self._replicas = Replicas(group, place.count)
        if settings.lora is None:
            policy = Decoder(config, place=place)
            reference = Decoder(config, prefix="reference.", place=place)
        else:
            reference = Decoder(config, place=place)
            policy = adapted(reference, settings.lora)
        self.policy = policy
        """Its decoder, or this worker's part of it."""
        self.graphs = Graphs(settings, group)
        self.group = group
        self.views = memory.views
        self._settings = settings
        self._sharing: Meeting = group.sharing if place.count > 1 else nullcontext
        self._generator = Generator(policy, settings, self.graphs, self._sharing)
        self._learner = Learner(policy, settings, self._replicas, memory, self.graphs)

        self._ladder = ladder_of(settings)

        def make(rows: int, width: int) -> tuple[CompletionLogprobs, tuple[ms.Tensor, ...]]:
            temperature = settings.sampling.learning_temperature
            return CompletionLogprobs(reference, rows, width, temperature), example(rows, width)

        self._reference_logprobs: ByShape[CompletionLogprobs] = self.graphs.by_shape("reference", make)
        self._memory = memory
        self._slots: Slots = {
            "policy_model": policy.named_parameters(),
            "optimizer": {**self._learner.moments(), "global_step": self._learner.global_step},
            "ref": reference.named_parameters() if settings.lora is None else {},
        }
        self._base = reference.named_parameters() if settings.lora is not None else {}
        self._part_shapes = {name: tuple(each.shape) for name, each in policy.named_parameters().items()}
        self._layout = self._described()
        self._tensors = memory.tensors(self._slots)
        self._revisions = dict.fromkeys(self._slots, 0)

    @flushed()
    def compile(self) -> None:
        """Compile every graph that is known to be needed, the kept ones first: see `compiling`."""
        self.graphs.compile_kept()
        self._learner.compile()

    @flushed()
    def generate(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> Generation:
        return self._generator.generate(prompt_ids, prompt_mask, uniforms)

    @flushed()
    def reference_logprobs(self, tokens: TokenBatch) -> Floats:
        chunk = chunk_of(tokens)
        found = np.zeros(tokens.completion_mask.shape, np.float32)
        for micro_batch in packed(chunk, self._ladder):
            columns, places = laid_out(chunk, micro_batch)
            logprobs = self._reference_logprobs.at(*micro_batch.shape)
            with self._sharing():
                computed = logprobs(*map(ms.Tensor, columns.arrays())).asnumpy()
            places.put_back(found, computed)
        return found

    @flushed()
    def update(self, batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        """See `grpo.ports.Engine.update`. NonFinite, with nothing changed, if the loss is not finite."""
        self._changing("policy_model", "optimizer")
        return self._learner.update(batch, learning_rate)

    def load_base(self, folder: str, config: ModelConfig) -> None:
        """Read the weights that adapters stand beside, this worker's part. ModelError if they do not fit."""
        held = layout_of_slots({"base": self._base})["base"]
        specs = {name: self._spec(name, spec) for name, spec in held.items()}
        if self.views:
            load_weights(folder, config, self._memory.tensors({"base": self._base})["base"], specs)
            return
        weights = {name: np.empty(each.shape, np.float32) for name, each in self._base.items()}
        load_weights(folder, config, weights, specs)
        for name, array in weights.items():
            self._memory.write(self._base[name], array)

    def sync_reference(self) -> None:
        """See `grpo.ports.Engine.sync_reference`. EngineError with adapters, whose reference is the base."""
        if self._base:
            raise EngineError("the reference of a policy of adapters is its base, which never changes")
        self._changing("ref")
        for name, values in self._tensors["policy_model"].items():
            self._memory.write(self._slots["ref"][name], values)

    def layout(self) -> Layout:
        return self._layout

    def tensors(self) -> Tensors:
        """See `grpo.ports.Engine.tensors`.

        `policy_model` and `ref` carry Hugging Face names; a tied head is not listed. `optimizer`
        holds `adam_m.<name>`, `adam_v.<name>` and `global_step` (int64 [1]); of an optimizer that is spread
        over the workers, what this one keeps. Of a model that is cut over workers, this one's part. With
        adapters, `policy_model` holds them, by PEFT's names, and `ref` nothing.
        """
        return self._tensors

    def revision(self, role: str) -> int:
        return self._revisions[role]

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        """See `grpo.ports.Engine.load`. EngineError for an unknown name, another shape or dtype."""
        spec = self._layout.get(role, {}).get(name)
        if spec is None:
            raise EngineError(f"this model has no tensor {name!r} in {role!r}")
        if (spec.shape, spec.dtype) != (array.shape, array.dtype):
            raise EngineError(
                f"tensor {name!r} of {role!r} is {spec.dtype}{list(spec.shape)}; "
                f"{array.dtype}{list(array.shape)} cannot be put there"
            )
        self._changing(role)
        self._memory.write(self._slots[role][name], array)

    def _described(self) -> Layout:
        """The layout: what the slots hold, of which tensors, and who else holds it."""
        found: dict[str, dict[str, TensorSpec]] = {}
        for role, named in layout_of_slots(self._slots).items():
            kept = self._learner.kept if role == "optimizer" and self._learner.spreads else {}
            parameters = {moment: name for name in kept for moment in (f"adam_m.{name}", f"adam_v.{name}")}
            found[role] = {
                name: self._spread_spec(name, spec, kept[parameters[name]])
                if name in parameters
                else self._spec(name, spec)
                for name, spec in named.items()
            }
        return found

    def _spec(self, name: str, held: TensorSpec) -> TensorSpec:
        """Of a tensor that is like a parameter: all replicas have the same part of it."""
        shape = self.place.whole_shape(name, held.shape)
        if shape == held.shape:
            return held
        copy = (self._replicas.rank, self._replicas.world_size)
        return TensorSpec.piece(name, held.dtype, shape, self.place.box(name, shape), copy)

    def _spread_spec(self, name: str, held: TensorSpec, kept: Box) -> TensorSpec:
        """Of a moment that this replica keeps: `kept` is its box in this worker's part of the parameter."""
        part = self._part_shapes[name.partition(".")[2]]
        shape = self.place.whole_shape(name, part)
        offset = tuple(map(int.__add__, self.place.box(name, shape).offset, kept.offset))
        copy = (self.place.index, self.place.count) if shape == part else (0, 1)
        return TensorSpec.piece(name, held.dtype, shape, Box(offset, kept.shape), copy)

    def _changing(self, *roles: str) -> None:
        for role in roles:
            self._revisions[role] += 1


def create(
    settings: EngineSettings, group: Group | None = None, *, memory: Memory | None = None
) -> MindSporeEngine:
    """An engine with the weights of `settings.policy_folder` and `settings.reference_folder`.

    If a folder is None, its parameters must be loaded later. With `settings.lora` the base is read from
    `settings.base_folder`; adapters start at zero and must be loaded. `memory` is chosen by the device
    unless it is given. Devices other than the CPU are supported as far as `memory` says. ModelError
    for a model that is not supported or weights that do not fit; EngineError for a device that this
    MindSpore does not support.
    """
    use_device(settings.device_target)
    group = group or OneProcess()
    engine = MindSporeEngine(settings, group, memory or memory_of(settings.device_target))
    config = ModelConfig.parse(settings.model_config)
    for role, folder in (("policy_model", settings.policy_folder), ("ref", settings.reference_folder)):
        if folder is not None:
            _load_folder(engine, role, folder, config)
    if settings.base_folder is not None:
        engine.load_base(settings.base_folder, config)
    if settings.compile_cache_folder is not None:
        # Last, since it writes: a model that does not fit must leave nothing behind.
        engine.compile()
    return engine


def _load_folder(engine: MindSporeEngine, role: str, folder: str, config: ModelConfig) -> None:
    """Weights of a Hugging Face folder: straight into the parameters where the host sees them."""
    specs = engine.layout()[role]
    if engine.views:
        load_weights(folder, config, engine.tensors()[role], specs)
        return
    weights = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}
    load_weights(folder, config, weights, specs)
    for name, array in weights.items():
        engine.load(role, name, array)
