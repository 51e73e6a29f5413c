"""The MindSpore engine on a model small enough to compile in seconds."""

from typing import Any

from numpy.typing import NDArray
from small_model import QWEN2

from rollforward.engines.mindspore.engine import MindSporeEngine, create
from rollforward.engines.mindspore.memory import Copied, Slot
from rollforward.grpo.ports import Group
from rollforward.grpo.types import EngineSettings

__all__ = ["MODEL", "ONE_LAYER", "create", "create_copied"]


class CountedCopies(Copied):
    """Notes the bytes of every tensor that is copied to the host."""

    def __init__(self) -> None:
        self.copied: list[int] = []

    def read_into(self, slot: Slot, target: NDArray[Any]) -> None:
        super().read_into(slot, target)
        self.copied.append(target.nbytes)


def create_copied(settings: EngineSettings, group: Group | None = None) -> MindSporeEngine:
    """The engine as it is on a device whose memory the host does not see. What it copies is counted."""
    return create(settings, group, memory=CountedCopies())


MODEL = QWEN2 | {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
"""A parsed `config.json`: grouped queries, biases, tied embeddings."""
ONE_LAYER = MODEL | {"num_hidden_layers": 1}
"""The same, compiled in less time. Logits and gradients through two layers: `test_engine_golden.py`,
`test_engine_packed.py`."""
