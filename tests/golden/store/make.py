"""Make the golden checkpoints of every format version: python tests/golden/store/make.py

They are committed. A later version of the store must go on reading them; when the format
changes, its version goes up and a folder is added here, and these stay as they are.
"""

from datetime import UTC, datetime
from pathlib import Path

import ml_dtypes
import numpy as np

from rollforward.position import Position
from rollforward.store import CheckpointStore

FOLDER = Path(__file__).parent

Tensors = dict[str, dict[str, np.ndarray]]


def tensors_1(step: int) -> Tensors:
    """What the checkpoint of a step holds; plain arithmetic, so that every machine agrees."""
    return {
        "policy_model": {
            "model.embed_tokens.weight": (np.arange(24, dtype=np.float32) * step).reshape(6, 4),
            "model.norm.weight": np.full(4, 1 / 4, np.float16),
        },
        "optimizer": {
            "adam_m.model.norm.weight": np.linspace(0, step, 5),
            "global_step": np.array(step, np.int64),
            "flags": np.array([True, False]),
        },
        "ref": {
            "model.embed_tokens.weight": np.ones((6, 4), np.float32),
            "empty": np.zeros((0, 4), np.float32),
        },
    }


def tensors_2(step: int) -> Tensors:
    """Without an optimizer or a reference, but with roles of its own, one of which never changes."""
    bits = np.arange(8, dtype=np.uint16) + 0x3F80 + step
    return {
        "value_head": {"w": np.full((2, 2), step, np.int8), "scales": bits[:3].astype(np.uint8)},
        "policy_model": {"model.norm.weight": bits.view(ml_dtypes.bfloat16)},
        "critic": {"head.weight": np.ones(4, ml_dtypes.float8_e4m3fn), "head.bias": np.zeros((), np.float32)},
    }


TENSORS = {1: tensors_1, 2: tensors_2}


def main() -> None:
    """For each version two checkpoints; one role of the second is that of the first."""
    for version in TENSORS:
        make(version)


def make(version: int) -> None:
    """The folder of one version."""
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    store = CheckpointStore(FOLDER / f"version_{version}", now=lambda: noon)
    for step in (10, 20):
        store.save(
            Position(0, step),
            TENSORS[version](step),
            global_step=step,
            run_id="golden",
            incarnation=1,
            state={"steps_per_epoch": 30, "note": f"checkpoint of format version {version}"},
            fingerprint="0123456789abcdef",
            versions={"rollforward": "0.1.0"},
            attachments={"config.json": b'{"model_type": "qwen2"}\n'},
        )


if __name__ == "__main__":
    main()
