"""The golden models of `tests/golden/models`, ready to compute with."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.engines.mindspore.generation import Generator
from rollforward.engines.mindspore.model import Decoder, ModelConfig, attention_mask
from rollforward.grpo.group import OneProcess
from rollforward.grpo.types import (
    EngineSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SamplingSettings,
)
from rollforward.models.weights import load_weights

FOLDER = Path(__file__).parents[2] / "golden" / "models"
FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class GoldenModel:
    """One folder: its configuration, the model loaded from it, and what transformers says of it."""

    family: str
    config: dict[str, Any]
    decoder: Decoder
    prompts: NDArray[np.int32]
    """[4, P], right-padded with 0."""
    lengths: NDArray[np.int32]
    logits: NDArray[np.float32]
    """[4, P, vocabulary]; 0 on padding."""
    greedy: NDArray[np.int32]
    """[4, T]"""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[4, P]; True on real tokens."""
        return np.arange(self.prompts.shape[1]) < self.lengths[:, None]

    def left_padded(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The same prompts, padded at the other side."""
        ids, mask = np.zeros_like(self.prompts), np.zeros(self.prompts.shape, np.bool_)
        for row, length in enumerate(self.lengths):
            ids[row, ids.shape[1] - length :] = self.prompts[row, :length]
            mask[row, ids.shape[1] - length :] = True
        return ids, mask

    def settings(self, *, rows: int, sampling: SamplingSettings) -> EngineSettings:
        """Of an engine for these prompts."""
        return EngineSettings(
            model_config=self.config,
            policy_folder=None,
            reference_folder=None,
            prompt_length=self.prompts.shape[1],
            samples_per_generation=rows,
            samples_per_micro_batch=rows,
            sampling=sampling,
            objective=ObjectiveSettings(),
            optimizer=OptimizerSettings(),
        )

    def generator(self, *, rows: int, sampling: SamplingSettings) -> Generator:
        """With so many slots."""
        settings = self.settings(rows=rows, sampling=sampling)
        return Generator(self.decoder, settings, Graphs(settings, OneProcess()))


@cache
def golden_model(family: str) -> GoldenModel:
    """Load a folder once for all tests; none of them changes a parameter."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    folder = FOLDER / family
    config = json.loads((folder / "config.json").read_text())
    parsed = ModelConfig.parse(config)
    decoder = Decoder(parsed)
    views = {name: parameter.asnumpy() for name, parameter in decoder.named_parameters().items()}
    load_weights(folder, parsed, views)
    with np.load(folder / "expected.npz") as expected:
        return GoldenModel(family=family, config=config, decoder=decoder, **expected)


class Logits(nn.Cell):
    """All logits of a batch, without a cache: int32 [B, L] each -> float32 [B, L, vocabulary]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.head_weight = decoder.head_weight
        self.head = ops.MatMul(transpose_b=True)

    def construct(self, ids, positions, groups, samples):
        hidden = self.decoder.hidden(ids, positions, attention_mask(groups, samples))
        logits = self.head(hidden.reshape(-1, hidden.shape[-1]), self.head_weight)
        return logits.reshape(ids.shape[0], ids.shape[1], -1)


@cache
def _logits_cell(family: str) -> Logits:
    return Logits(golden_model(family).decoder)


def logits_of(family: str, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """All logits [B, L, vocabulary] of a batch, computed without a cache; compiled once for each shape."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) * mask
    # Each row is one sample; padding is of no group.
    given = (ids, positions, mask.astype(np.int32) - 1, mask.astype(np.int32) - 1)
    found: NDArray[np.float32] = _logits_cell(family)(
        *(Tensor(each.astype(np.int32)) for each in given)
    ).asnumpy()
    return found
