"""MindSpore's strategy files: how a trainer split its tensors over ranks.

    strategy/train_policy_strategy/strategy_<rank>.ckpt    MindRLHF, of policy and optimizer
    strategy/infer_ref_strategy/strategy_<rank>.ckpt       MindRLHF, of the reference
    strategy/ckpt_strategy_rank_<rank>.ckpt                MindFormers

Each is a `ParallelStrategyMap` message of MindSpore's node_strategy.proto. The parts used here:

    2  strategy item     2  1  stage              pipeline stage, the same in all items
    3  layout item       1     parameter's name   "<stage>-<name>" in a file merged from several
                         2  1  devices            the ranks of a stage as a grid
                            2  tensor map         for each axis of the tensor, the axis of the grid that
                                                  splits it, counted from the last; -1: none. If one is
                                                  split by several, there is a map for each axis
                            4  offsets            of pieces of unequal size
                            5  field              rows of an embedding that is split by fields
                            6  step, 7  size      optimizer parallelism: what the ranks that hold the
                                                  same piece split among them, along the first axis

Not supported, and refused when a tensor depends on them: unequal pieces and fields. JSON files are
ignored. Ours are written by `strategy_format`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rollforward.errors import CheckpointMismatch, StorageError
from rollforward.interop.protobuf import Field, Wire
from rollforward.storage import LocalStorage

FOLDERS = {
    "policy_model": "train_policy_strategy",
    "optimizer": "train_policy_strategy",
    "ref": "infer_ref_strategy",
}
"""role -> MindRLHF's folder of its strategy files."""

_MOST_DIMS = 32
_MOST_RANKS = 1 << 32

_NAME = re.compile(r"(?:ckpt_)?strategy(?:_rank)?_\d+\.ckpt", re.ASCII)


@dataclass(frozen=True)
class Layout:
    """How one tensor is laid out over the ranks of a stage."""

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    """For each axis of the tensor, the indices into `devices` that split it, coarsest first."""
    shards: int = 1
    """Optimizer parallelism: into how many pieces each piece is split again, along the first axis."""
    problem: str = ""
    """Why it cannot be reassembled; empty when it can."""

    @property
    def ranks(self) -> int:
        """The number of ranks in the stage."""
        return math.prod(self.devices)

    @property
    def splits(self) -> tuple[int, ...]:
        """Into how many pieces each axis of the tensor is split."""
        by_grid = [math.prod(self.devices[axis] for axis in axes) for axes in self.axes]
        return tuple(count * self.shards if i == 0 else count for i, count in enumerate(by_grid))

    def place(self, rank: int) -> tuple[int, ...]:
        """Which piece a rank of the stage has: its index along each axis of the tensor."""
        place = [self._index(rank, axes) for axes in self.axes]
        if self.shards > 1:
            # Ranks that hold the same piece are distinguished by the axes of the grid that split nothing.
            used = {axis for axes in self.axes for axis in axes}
            same = self._index(rank, [axis for axis in range(len(self.devices)) if axis not in used])
            place[0] = place[0] * self.shards + same % self.shards
        return tuple(place)

    def _index(self, rank: int, axes: Iterable[int]) -> int:
        """A rank's index along several axes of the grid, treated as one."""
        index = 0
        for axis in axes:
            behind = math.prod(self.devices[axis + 1 :])
            index = index * self.devices[axis] + rank // behind % self.devices[axis]
        return index


@dataclass(frozen=True)
class Strategy:
    """All layouts of a trainer."""

    folder: Path
    layouts: Mapping[str, Mapping[int, Layout]]
    """name -> stage -> its layout there."""

    def of(self, name: str, rank: int) -> Layout | None:
        """The layout of a tensor in this rank's file; None when the strategy files do not mention it."""
        stages = self.layouts.get(name)
        if stages is None:
            return None
        for stage, layout in stages.items():
            if rank // layout.ranks == stage:
                return layout
        raise CheckpointMismatch(
            f"rank {rank} holds {name}, which {self.folder} places on other ranks",
            hint="the strategy files are of another run: put those of this one there",
        )


def find_strategy(folders: Iterable[Path]) -> Strategy | None:
    """The strategy files of the first folder that has any. CheckpointMismatch when they cannot be read."""
    for folder in folders:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        files = [folder / name for name in names if _NAME.fullmatch(name)]
        if files:
            return Strategy(folder, _read_all(files))
    return None


def _read_all(files: Iterable[Path]) -> dict[str, dict[int, Layout]]:
    found: dict[str, dict[int, Layout]] = {}
    for path in files:
        try:
            with LocalStorage(path.parent).open(path.name) as handle:
                wire = Wire(handle)
                for name, stage, layout in _parse(wire):
                    found.setdefault(name, {})[stage] = layout
        except (ValueError, KeyError, StorageError) as error:
            told = error.message if isinstance(error, StorageError) else str(error)
            raise CheckpointMismatch(
                f"{path} is not a strategy file of MindSpore: {told}",
                hint="the parts cannot be merged without the strategy files of their trainer",
            ) from None
    return found


def _parse(wire: Wire) -> list[tuple[str, int, Layout]]:
    stage, found = 0, []
    for field in wire.fields(0, wire.size):
        if field.number == 2:
            inner = _messages(wire, _messages(wire, field)[2][0])
            stage = inner[1][0].value or 0
        elif field.number == 3:
            item = _messages(wire, field)
            name, layout = wire.text(item[1][0]), _parse_layout(wire, item[2][0])
            of_stage, dash, rest = name.partition("-")
            found.append((rest, int(of_stage), layout) if dash else (name, -1, layout))
    return [(name, stage if given < 0 else given, layout) for name, given, layout in found]


def _parse_layout(wire: Wire, field: Field) -> Layout:
    fields = _messages(wire, field)
    devices = _dims(wire, fields[1][0])
    if len(fields[2]) > _MOST_DIMS or math.prod(map(abs, devices)) > _MOST_RANKS:
        raise ValueError(f"a grid of {len(devices)} axes, split by {len(fields[2])} maps: it is absurd")
    maps = [dims for item in fields[2] if (dims := _dims(wire, item))]
    if len(maps) == 1:
        maps = [(axis,) for axis in maps[0]]
    axes = tuple(tuple(len(devices) - 1 - axis for axis in dims if axis >= 0) for dims in maps)
    used = [axis for found in axes for axis in found]
    if min(devices, default=0) < 1 or min(used, default=0) < 0 or len(set(used)) < len(used):
        raise ValueError(f"a grid {list(devices)} that is split by axes {list(maps)}")
    problem = ""
    if fields[5][0].value:
        problem = "is split by fields"
    elif any(_dims(wire, item) for item in fields.get(4, [])):
        problem = "is split into unequal pieces"
    step, size = (_signed(fields[number][0].value or 0) for number in (6, 7))
    if size < 0:
        size = math.prod(devices) // math.prod(devices[axis] for found in axes for axis in found)
    return Layout(devices, axes, size if axes and step and size else 1, problem)


def _messages(wire: Wire, field: Field) -> dict[int, list[Field]]:
    """The fields of a message, by number; ValueError when it is not a message."""
    if field.value is not None:
        raise ValueError(f"no message at byte {field.begin}")
    found: dict[int, list[Field]] = {}
    for inner in wire.fields(field.begin, field.end):
        found.setdefault(inner.number, []).append(inner)
    return found


def _dims(wire: Wire, field: Field) -> tuple[int, ...]:
    fields = _messages(wire, field)
    found: list[int] = []
    for item in fields.get(1, []):
        found += wire.integers(item, _MOST_DIMS)
        if len(found) > _MOST_DIMS:
            raise ValueError(f"more than {_MOST_DIMS} dimensions at byte {item.begin}")
    return tuple(map(_signed, found))


def _signed(value: int) -> int:
    """Negative numbers are written in 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
