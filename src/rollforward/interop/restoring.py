"""A worker's part in resuming from another trainer's folder: read everything, agree, and only then load.

Every tensor is renamed and compared with the model before any is loaded into the engine, and then only
if every worker succeeded. Truncated files, or files with non-finite values, reject their position. One
rank's tensors are in memory once besides the engine's.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rollforward.agreement import together
from rollforward.boxes import whole, within
from rollforward.errors import CheckpointInvalid, CheckpointMismatch
from rollforward.grpo.ports import Engine
from rollforward.interop.files import read_arrays
from rollforward.interop.folders import ForeignCheckpoint
from rollforward.interop.joining import read_joined
from rollforward.interop.mapping import MappedTensors, fit
from rollforward.interop.resuming import ForeignPlan, all_ranks, newest, refuse_misfits
from rollforward.interop.strategies import Strategy
from rollforward.position import Position
from rollforward.store.manifest import digest_of_arrays
from rollforward.tensors import Layout


@dataclass(frozen=True, kw_only=True)
class RestoredForeign:
    """What a worker loaded into its engine."""

    position: Position
    """As the files say."""
    rejected: tuple[tuple[Position, str], ...]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]
    """What else the files hold and nothing here needs: the last parts of the names."""
    role_bytes: Mapping[str, int]
    seconds: float


def restore_foreign(source: ForeignPlan, engine: Engine, wanted: Layout) -> RestoredForeign:
    """Read, check and load the newest position that can be read. Collective.

    `wanted`: the whole tensors, of which the engine may hold pieces.
    """
    rejected: dict[Position, str] = {}
    group = engine.group
    state: dict[str, MappedTensors] = {}

    def read() -> tuple[ForeignCheckpoint, dict[str, Any]]:
        """Read the newest position not yet rejected; returns the outcome too."""
        found = newest(source.folders, source.ranks, rejected)
        answer: dict[str, Any] = {"position": str(found.position), "damage": None, "mismatch": None}
        state.clear()
        try:
            state.update(_read(source, found, wanted, group.rank))
            answer["digests"] = {role: digest_of_arrays(file.tensors) for role, file in state.items()}
        except CheckpointInvalid as error:
            answer["damage"] = error.message
        except CheckpointMismatch as error:
            # Not raised yet: damage on another rank comes first, since an older position may be intact.
            answer["mismatch"] = [error.message, error.hint]
        return found, answer

    while True:
        began = time.perf_counter()
        (found, _), answers = together(read, group.all_gather, tell=lambda found: found[1])
        reason = _verdict(answers)
        if reason is None:
            for role, file in state.items():
                for name, spec in engine.layout()[role].items():
                    array = file.tensors.get(spec.piece_of or name)
                    if array is not None:
                        engine.load(role, name, array[within(spec.box, whole(array.shape))])
            return RestoredForeign(
                position=found.position,
                rejected=tuple(sorted(rejected.items(), reverse=True)),
                warnings=(*source.warnings, *found.warnings, *_about_projections(state)),
                left_out=tuple(sorted({name for file in state.values() for name in file.left_out})),
                role_bytes={r: sum(a.nbytes for a in file.tensors.values()) for r, file in state.items()},
                seconds=time.perf_counter() - began,
            )
        rejected[found.position] = reason


def _about_projections(state: Mapping[str, MappedTensors]) -> list[str]:
    if not any(file.concatenated for file in state.values()):
        return []
    return [
        "w_qkv and w_gate_hidden are read in the order of MindFormers 1.5 and later; if this was "
        "written by 1.4.0-beta1 or older, split them with that version first"
    ]


def _verdict(answers: list[dict[str, Any]]) -> str | None:
    """None when all workers have the same intact state; else why the position is rejected.

    CheckpointMismatch when the files do not fit the model, or the workers' states differ.
    """
    where = [f"rank {rank}: " if len(answers) > 1 else "" for rank in range(len(answers))]
    for rank, answer in enumerate(answers):
        if answer["damage"] is not None:
            return f"{where[rank]}{answer['damage']}"
    for rank, answer in enumerate(answers):
        if answer["mismatch"] is not None:
            message, hint = answer["mismatch"]
            raise CheckpointMismatch(f"{where[rank]}{message}", hint=hint)
    for rank, answer in enumerate(answers):
        if (answer["position"], answer["digests"]) != (answers[0]["position"], answers[0]["digests"]):
            raise CheckpointMismatch(
                f"ranks 0 and {rank} hold different tensors of {answers[0]['position']}: "
                "that is not data-parallel training, where all hold the same",
                hint="if tensors are split over the ranks, put the strategy files of their trainer into "
                "strategy/ beside the files, as MindRLHF and MindFormers write it",
            )
    return None


def _read(
    source: ForeignPlan, found: ForeignCheckpoint, wanted: Layout, rank: int
) -> dict[str, MappedTensors]:
    """Every tensor under our names, in our dtypes; CheckpointMismatch lists what does not fit."""
    state: dict[str, MappedTensors] = {}
    names = []
    last: tuple[tuple[Path, ...], dict[str, NDArray[Any]]] = ((), {})
    for role, paths in found.files.items():
        strategy = source.strategies.get(role)
        if last[0] != paths:  # policy and optimizer may be in the same files
            last = paths, dict(_arrays(paths, strategy, rank))
        state[role] = fit(role, last[1], wanted, source.key_value_heads)
        names.append(all_ranks(paths) if strategy else paths[rank % len(paths)].name)
    refuse_misfits(found.position, zip(names, state.values(), strict=True))
    return state


def _arrays(
    paths: tuple[Path, ...], strategy: Strategy | None, rank: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The whole tensors that a worker uses."""
    if strategy is None:
        return read_arrays(paths[rank % len(paths)])
    return read_joined(paths, strategy, choice=rank)
