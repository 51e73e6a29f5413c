"""What one of several ranks holds of a state: some tensors whole, others in pieces."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollforward.boxes import Box, cut_rows, whole, within
from rollforward.models.sharding import Shard
from rollforward.tensors import Layout, Tensors, TensorSpec

Held = Mapping[str, list[tuple[str, Box]]]
"""Tensor -> the names and boxes of the pieces that a rank holds of it."""


@dataclass
class Holding:
    """`store.live.Live` of a rank, out of the whole tensors of all."""

    state: Tensors
    rank: int
    pieces: Mapping[str, Held]
    """role -> what this rank holds of it; tensors that are not in here are whole on every rank."""
    views: bool = False
    copy: tuple[int, int] = (0, 1)
    """Which of the ranks that hold these pieces alike this one is, and how many there are."""

    def layout(self) -> Layout:
        return layout(self.state, self.pieces, self.copy)

    def tensors(self) -> Tensors:
        return {
            role: {name: self._box(role, spec.piece_of or name, spec.box) for name, spec in named.items()}
            for role, named in self.layout().items()
        }

    def revision(self, role: str) -> int | None:  # noqa: ARG002 - required by the protocol
        return None

    def _box(self, role: str, tensor: str, box: Box) -> np.ndarray[Any, Any]:
        array = self.state[role][tensor]
        return np.array(array[within(box, whole(array.shape))])


def layout(state: Tensors, pieces: Mapping[str, Held], copy: tuple[int, int] = (0, 1)) -> Layout:
    """The layout of a rank that holds these pieces, and all other tensors whole."""
    found: dict[str, dict[str, TensorSpec]] = {}
    for role, named in state.items():
        found[role] = {}
        for tensor, array in named.items():
            if tensor not in pieces.get(role, {}):
                found[role][tensor] = TensorSpec.whole(array.dtype, array.shape)
            for name, box in pieces.get(role, {}).get(tensor, ()):
                found[role][name] = TensorSpec.piece(tensor, array.dtype, array.shape, box, copy)
    return found


def spread(state: Tensors, rank: int, world_size: int, roles: Collection[str]) -> dict[str, Held]:
    """The tensors of some roles, each cut by rows into more pieces than there are ranks, dealt in turn."""
    found: dict[str, dict[str, list[tuple[str, Box]]]] = {}
    for role in roles:
        found[role] = {}
        for turn, (tensor, array) in enumerate(sorted(state[role].items())):
            boxes = cut_rows(array.shape, world_size + 1)
            mine = [box for number, box in enumerate(boxes) if (number + turn) % world_size == rank]
            found[role][tensor] = [(f"{tensor}.{n}" if n else tensor, box) for n, box in enumerate(mine)]
    return found


def sliced(state: Tensors, shard: Shard) -> dict[str, Held]:
    """The part of a cut model that a worker has, as `models.sharding` cuts it."""
    found: dict[str, dict[str, list[tuple[str, Box]]]] = {}
    for role, named in state.items():
        boxes = {name: shard.box(name, array.shape) for name, array in named.items()}
        found[role] = {name: [(name, box)] for name, box in boxes.items() if box != whole(named[name].shape)}
    return found
