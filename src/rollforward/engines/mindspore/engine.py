"""The engine on MindSpore: `grpo.ports.Engine`, joined from model, generation and learning.

There are two decoders, policy and reference; generation and the updates share the policy's
parameters. Graphs are compiled when they are first run, one for each of: prefill, one decoding
step, reference log-probabilities, a micro-batch's gradient, the norm, the optimizer's step.

How the host reaches the parameters, as views or by copies, depends on the device: see `memory`.
"""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

from rollforward.engines.mindspore.batches import columns, micro_batches
from rollforward.engines.mindspore.compiling import kept_graphs
from rollforward.engines.mindspore.generation import Generator
from rollforward.engines.mindspore.learning import Learner
from rollforward.engines.mindspore.memory import Memory, Slots, layout_of_slots, memory_of, use_device
from rollforward.engines.mindspore.model import Decoder, ModelConfig
from rollforward.engines.mindspore.objective import CompletionLogprobs, ReferenceLogprobs
from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess
from rollforward.grpo.ports import Group
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
from rollforward.models.weights import load_weights
from rollforward.tensors import Layout, Tensors


class MindSporeEngine:
    """`grpo.ports.Engine`; made by `create`."""

    def __init__(self, settings: EngineSettings, group: Group, memory: Memory) -> None:
        config = ModelConfig.parse(settings.model_config)
        policy, reference = Decoder(config), Decoder(config, prefix="reference.")
        self.group = group
        self.views = memory.views
        self._settings = settings
        self._generator = Generator(policy, settings)
        self._learner = Learner(_completion_logprobs(policy, settings), settings, group, memory)
        self._reference_logprobs = ReferenceLogprobs(_completion_logprobs(reference, settings))
        self._memory = memory
        self._slots: Slots = {
            "policy_model": policy.named_parameters(),
            "optimizer": {**self._learner.moments(), "global_step": self._learner.global_step},
            "ref": reference.named_parameters(),
        }
        self._layout = layout_of_slots(self._slots)
        self._tensors = memory.tensors(self._slots)
        self._revisions = dict.fromkeys(self._slots, 0)

    def compile(self) -> None:
        """Compile every graph, always in this order: see `compiling`."""
        settings = self._settings
        rows, columns = (
            settings.samples_per_micro_batch,
            settings.prompt_length + settings.sampling.max_tokens,
        )
        self._generator.compile()
        self._reference_logprobs.compile(
            ms.Tensor(np.zeros((rows, columns), np.int32)), ms.Tensor(np.ones((rows, columns), np.bool_))
        )
        self._learner.compile()

    def generate(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> Generation:
        return self._generator.generate(prompt_ids, prompt_mask, uniforms)

    def reference_logprobs(self, tokens: TokenBatch) -> Floats:
        rows = len(tokens.prompt_ids)
        side_by_side = columns(tokens)
        pieces = micro_batches(
            rows,
            self._settings.samples_per_micro_batch,
            {"ids": side_by_side.ids, "mask": side_by_side.mask},
        )
        found = [
            self._reference_logprobs(ms.Tensor(piece["ids"]), ms.Tensor(piece["mask"])).asnumpy()
            for piece in pieces
        ]
        return np.concatenate(found)[:rows]

    def update(self, batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        """See `grpo.ports.Engine.update`. NonFinite, with nothing changed, if the loss is not finite."""
        self._changing("policy_model", "optimizer")
        return self._learner.update(batch, learning_rate)

    def sync_reference(self) -> None:
        self._changing("ref")
        for name, values in self._tensors["policy_model"].items():
            self._memory.write(self._slots["ref"][name], values)

    def layout(self) -> Layout:
        return self._layout

    def tensors(self) -> Tensors:
        """See `grpo.ports.Engine.tensors`.

        `policy_model` and `ref` carry Hugging Face names; a tied head is not listed. `optimizer`
        holds `adam_m.<name>`, `adam_v.<name>` and `global_step` (int64 [1]).
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

    def _changing(self, *roles: str) -> None:
        for role in roles:
            self._revisions[role] += 1


def create(
    settings: EngineSettings, group: Group | None = None, *, memory: Memory | None = None
) -> MindSporeEngine:
    """An engine with the weights of `settings.policy_folder` and `settings.reference_folder`.

    If a folder is None, its parameters must be loaded later. `memory` is chosen by the device
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
    if settings.compile_cache_folder is not None:
        # Last, since it writes: a model that does not fit must leave nothing behind.
        with kept_graphs(settings, group, Path(settings.compile_cache_folder)):
            engine.compile()
    return engine


def _completion_logprobs(decoder: Decoder, settings: EngineSettings) -> CompletionLogprobs:
    return CompletionLogprobs(
        decoder,
        settings.samples_per_micro_batch,
        settings.prompt_length,
        settings.sampling.max_tokens,
        settings.sampling.learning_temperature,
    )


def _load_folder(engine: MindSporeEngine, role: str, folder: str, config: ModelConfig) -> None:
    """Weights of a Hugging Face folder: straight into the parameters where the host sees them."""
    if engine.views:
        load_weights(folder, config, engine.tensors()[role])
        return
    weights = {name: np.empty(spec.shape, spec.dtype) for name, spec in engine.layout()[role].items()}
    load_weights(folder, config, weights)
    for name, array in weights.items():
        engine.load(role, name, array)
