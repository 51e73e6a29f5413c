"""Make the golden checkpoints of format version 1: python tests/golden/store/make.py

They are committed. A later version of the store must go on reading them; when the format
changes, its version goes up and a folder is added here, and this one stays as it is.
"""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from rollforward.position import Position
from rollforward.store import CheckpointStore

FOLDER = Path(__file__).parent / "version_1"


def tensors(step: int) -> dict[str, dict[str, np.ndarray]]:
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


def main() -> None:
    """Two checkpoints; the reference of the second is that of the first."""
    store = CheckpointStore(FOLDER, now=lambda: datetime(2026, 1, 31, 12, tzinfo=UTC))
    for step in (10, 20):
        store.save(
            Position(0, step),
            tensors(step),
            global_step=step,
            run_id="golden",
            incarnation=1,
            state={"steps_per_epoch": 30, "note": "checkpoint of format version 1"},
            fingerprint="0123456789abcdef",
            versions={"rollforward": "0.1.0"},
            attachments={"config.json": b'{"model_type": "qwen2"}\n'},
        )


if __name__ == "__main__":
    main()
