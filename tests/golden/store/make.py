"""Make the golden checkpoints of today's format version: python tests/golden/store/make.py

They are committed. A later version of the store must go on reading them; when the format
changes, its version goes up and a folder is added here, and these stay as they are. Those of versions 1
and 2 were made by releases that wrote them; what they hold is still here.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance"))

from lockstep import Exchange, LockStep

from rollforward.boxes import Box, cut_rows, whole
from rollforward.position import Position
from rollforward.store import CheckpointStore
from rollforward.store.manifest import VERSION
from rollforward.tensors import Layout, TensorSpec

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


def tensors_3(step: int) -> Tensors:
    """For three ranks: some tensors whole, one cut by rows, one into columns, one of more than a block."""
    bits = (np.arange(40, dtype=np.uint16) + 0x3F80 + step).reshape(8, 5)
    large = np.zeros((70, 16384), np.float32)
    large[::7, 3] = np.arange(10)
    return {
        "policy_model": {
            "model.embed_tokens.weight": bits.view(ml_dtypes.bfloat16),
            "model.norm.weight": np.full(4, step / 4, np.float32),
        },
        "optimizer": {
            "adam_m.model.embed_tokens.weight": bits.astype(np.float32) / 3,
            "adam_v.model.norm.weight": np.full(4, step / 8, np.float32),
            "columns": np.arange(30, dtype=np.int32).reshape(3, 10) * step,
            "global_step": np.array(step, np.int64),
        },
        "frozen": {"large": large, "head.weight": np.ones(4, np.float32)},
    }


def layout_3(rank: int) -> Layout:
    """What rank 0, 1 or 2 holds of `tensors_3`."""
    whole_ones = {
        role: {name: TensorSpec.whole(array.dtype, array.shape) for name, array in named.items()}
        for role, named in tensors_3(0).items()
    }
    optimizer = whole_ones["optimizer"]
    rows = "adam_m.model.embed_tokens.weight"
    optimizer[rows] = TensorSpec.piece(rows, np.float32, (8, 5), cut_rows((8, 5), 3)[rank])
    columns = [Box((0, 0), (3, 4)), Box((0, 4), (2, 6)), Box((2, 4), (1, 6))]
    optimizer["columns"] = TensorSpec.piece("columns", np.int32, (3, 10), columns[rank])
    moments = optimizer.pop("adam_v.model.norm.weight")
    if rank == 1:
        optimizer["second moment"] = TensorSpec.piece(
            "adam_v.model.norm.weight", np.float32, moments.shape, whole(moments.shape)
        )
    return whole_ones


TENSORS = {1: tensors_1, 2: tensors_2, 3: tensors_3}


class Holding:
    """What a rank holds: `store.live.Live`."""

    views = True

    def __init__(self, rank: int, step: int) -> None:
        self._rank = rank
        self._step = step

    def layout(self) -> Layout:
        return layout_3(self._rank)

    def tensors(self) -> Tensors:
        full = tensors_3(self._step)
        return {
            role: {
                name: full[role][spec.piece_of or name][
                    tuple(slice(o, o + n) for o, n in zip(spec.offset, spec.shape, strict=True))
                ]
                for name, spec in named.items()
            }
            for role, named in self.layout().items()
        }

    def revision(self, role: str) -> int | None:  # noqa: ARG002 - required by the protocol
        return None


def main() -> None:
    """Two checkpoints by three ranks; one role of the second is that of the first."""
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)

    def work(rank: int, exchange: Exchange) -> None:
        folder = FOLDER / f"version_{VERSION}"
        store = CheckpointStore(folder, rank=rank, world_size=3, exchange=exchange, now=lambda: noon)
        for step in (10, 20):
            store.save(
                Position(0, step),
                Holding(rank, step),
                global_step=step,
                run_id="golden",
                incarnation=1,
                state={"steps_per_epoch": 30, "note": f"checkpoint of format version {VERSION}"},
                fingerprint="0123456789abcdef",
                versions={"rollforward": "0.1.0"},
                attachments={"config.json": b'{"model_type": "qwen2"}\n'},
            )

    for ended in LockStep(3).run(work):
        if isinstance(ended, BaseException):
            raise ended


if __name__ == "__main__":
    main()
