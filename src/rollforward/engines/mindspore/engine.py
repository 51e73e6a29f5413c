"""The engine on MindSpore: `grpo.ports.Engine`, joined from model, generation and learning.

Two decoders live here, policy and reference; generation and the updates share the policy's
parameters. Graphs are compiled when they are first run, one for each of: prefill, one decoding
step, reference log-probabilities, a micro-batch's gradient, the norm, the optimizer's step.

`tensors()` are views that share memory with the parameters: on the CPU, `Parameter.asnumpy()` is
one, its address stays the same from step to step, and what is written through it is what the next
step computes with (MindSpore 2.10). Other devices have their own memory, so this engine refuses
them instead of handing out copies that would never be updated.
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
from rollforward.engines.mindspore.model import Decoder, ModelConfig
from rollforward.engines.mindspore.objective import CompletionLogprobs, ReferenceLogprobs
from rollforward.engines.mindspore.parallel import SingleProcess
from rollforward.engines.mindspore.weights import load_weights
from rollforward.errors import EngineError
from rollforward.grpo.ports import Group, Tensors
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


class MindSporeEngine:
    """`grpo.ports.Engine`; made by `create`."""

    def __init__(self, settings: EngineSettings, group: Group) -> None:
        config = ModelConfig.parse(settings.model_config)
        policy, reference = Decoder(config), Decoder(config, prefix="reference.")
        rows, tokens = settings.samples_per_micro_batch, settings.sampling.max_tokens
        self.group = group
        self._settings = settings
        self._generator = Generator(policy, settings)
        self._learner = Learner(
            CompletionLogprobs(policy, rows, settings.prompt_length, tokens), settings, group
        )
        self._reference_logprobs = ReferenceLogprobs(
            CompletionLogprobs(reference, rows, settings.prompt_length, tokens)
        )
        self._tensors: dict[str, dict[str, NDArray[Any]]] = {
            "policy_model": _views(policy),
            "optimizer": {**self._learner.moments(), "global_step": self._learner.global_step},
            "ref": _views(reference),
        }

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
        """See `grpo.ports.Engine.generate`."""
        return self._generator.generate(prompt_ids, prompt_mask, uniforms)

    def reference_logprobs(self, tokens: TokenBatch) -> Floats:
        """See `grpo.ports.Engine.reference_logprobs`."""
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
        """See `grpo.ports.Engine.update`. NonFinite, and nothing changed, where the loss is no number."""
        return self._learner.update(batch, learning_rate)

    def sync_reference(self) -> None:
        """See `grpo.ports.Engine.sync_reference`."""
        for name, values in self._tensors["policy_model"].items():
            np.copyto(self._tensors["ref"][name], values)

    def tensors(self) -> Tensors:
        """See `grpo.ports.Engine.tensors`.

        `policy_model` and `ref` carry Hugging Face names; a tied head is not listed. `optimizer`
        holds `adam_m.<name>`, `adam_v.<name>` and `global_step` (int64 [1]).
        """
        return self._tensors

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        """See `grpo.ports.Engine.load`. EngineError for an unknown name, another shape or dtype."""
        target = self._tensors.get(role, {}).get(name)
        if target is None:
            raise EngineError(f"this model has no tensor {name!r} in {role!r}")
        if target.shape != array.shape or target.dtype != array.dtype:
            raise EngineError(
                f"tensor {name!r} of {role!r} is {target.dtype}{list(target.shape)}; "
                f"{array.dtype}{list(array.shape)} cannot be put there"
            )
        np.copyto(target, array)


def create(settings: EngineSettings, group: Group | None = None) -> MindSporeEngine:
    """An engine with the weights of `settings.policy_folder` and `settings.reference_folder`.

    A folder that is None leaves its parameters to be loaded. ModelError for a model that is not
    supported or weights that do not fit; EngineError for a device that is not.
    """
    if settings.device_target != "CPU":
        raise EngineError(
            f"device target {settings.device_target!r} is not supported by the mindspore engine yet",
            hint="set context.device_target: CPU",
        )
    ms.set_context(mode=ms.GRAPH_MODE, device_target=settings.device_target)
    group = group or SingleProcess()
    engine = MindSporeEngine(settings, group)
    config = ModelConfig.parse(settings.model_config)
    for role, folder in (("policy_model", settings.policy_folder), ("ref", settings.reference_folder)):
        if folder is not None:
            load_weights(folder, config, engine.tensors()[role])
    if settings.compile_cache_folder is not None:
        # Last, since it writes: a model that does not fit leaves nothing behind.
        with kept_graphs(settings, group, Path(settings.compile_cache_folder)):
            engine.compile()
    return engine


def _views(decoder: Decoder) -> dict[str, NDArray[Any]]:
    return {name: parameter.asnumpy() for name, parameter in decoder.named_parameters().items()}
