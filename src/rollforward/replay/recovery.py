"""Loads the newest checkpoint that proves intact into the engine, the same one on all workers.

Each worker reads what it holds: whole tensors, and its own pieces, whichever workers saved them. Every byte
is verified as it is loaded. Where the host sees the engine's memory, bytes are read
straight into it, several tensors at once, and verified in place; elsewhere each tensor is verified
first and then passed to the engine.

A checkpoint that turns out to be damaged, on any worker, is rejected with its reason and the next
older one is loaded over whatever had been loaded; all workers take the same one. When none is left,
the engine's contents are meaningless: an error that says so ends the run. A checkpoint of another
model is not damaged: that is an error which an older checkpoint would not fix.

Left out: rolling the journal forward from there, which `rollout_log` prepares and the trainer does.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from rollforward.agreement import together
from rollforward.errors import CheckpointInvalid, CheckpointMismatch, NothingToResume
from rollforward.grpo.ports import Group
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import Manifest, check_layout, find, read_boxes, read_tensors, restore_into
from rollforward.tensors import Held, Layout, Tensors, arrays_of, layout_of


class Target(Protocol):
    """What a checkpoint is loaded into, on one worker; a `grpo.ports.Engine` is one."""

    group: Group
    views: bool
    """Whether `tensors()` are the memory itself, so that bytes can be read straight into it."""

    def layout(self) -> Layout:
        """What this worker holds, without reading any: whole tensors and pieces."""
        ...

    def tensors(self) -> Tensors:
        """role -> name -> array, with its current values."""
        ...

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        """Put one tensor in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a run resumes from."""

    manifest: Manifest
    rejected: tuple[tuple[Position, str], ...]
    """Newer checkpoints that did not prove intact, each with a one-line reason."""
    role_bytes: Mapping[str, int]
    """Bytes restored on this worker, by role."""
    find_seconds: float
    """Time to find it."""
    seconds: float
    """Time to read, verify and load, including rejected checkpoints."""
    free: Tensors = field(default_factory=dict)
    """The tensors of the roles that were asked for as `free`."""


class Arrays:
    """A `Target` of plain arrays, and pieces."""

    views = True

    def __init__(self, held: Held, group: Group) -> None:
        self.group = group
        self._layout = layout_of(held)
        self._tensors = arrays_of(held)

    def layout(self) -> Layout:
        """What each array is."""
        return self._layout

    def tensors(self) -> Tensors:
        """The arrays themselves."""
        return self._tensors

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        """Put one tensor in place."""
        self._tensors[role][name][...] = array


def restore(
    storage: Storage,
    engine: Target,
    *,
    until: Position | None = None,
    saved_by: int | None = None,
    free: Collection[str] = (),
) -> Restored:
    """Load the newest checkpoint, not after `until`, that proves intact on every worker. Collective.

    `saved_by`: the number of processes that it has to be of; None: any. Roles in `free` are not the engine's:
    whatever tensors the checkpoint has of them are returned.

    Raises NothingToResume, with all reasons, when none does, and CheckpointMismatch for an
    intact one that does not fit this engine; what one worker raises, all raise.
    """
    rejected: dict[Position, str] = {}
    freely: dict[str, dict[str, NDArray[Any]]] = {}
    in_pieces = {role for told in engine.group.all_gather(_in_pieces(engine.layout())) for role in told}
    began, finding = time.perf_counter(), 0.0

    def attempt() -> tuple[Manifest, str | None, float]:
        """Load the newest one left; returns it, what is wrong with it, and how long it took to find."""
        looking = time.perf_counter()
        try:
            found = find(storage, skip=rejected, until=until)
        except NothingToResume as error:
            raise NothingToResume(_with_reasons(error.message, rejected), hint=error.hint) from None
        seconds = time.perf_counter() - looking
        for item in found.rejected:
            rejected.setdefault(item.position, item.reason)
        _check_processes(found.manifest, saved_by)
        try:
            check_layout(storage, found.manifest, engine.layout(), in_pieces=in_pieces, free=free)
            freely.clear()
            for role, name, array in read_tensors(storage, found.manifest, free):
                freely.setdefault(role, {})[name] = array
            _put_in_place(storage, found.manifest, engine)
        except CheckpointInvalid as error:
            return found.manifest, error.message, seconds
        return found.manifest, None, seconds

    while True:
        (manifest, _, seconds), answers = together(
            attempt,
            engine.group.all_gather,
            tell=lambda found: {"position": str(found[0].position), "problem": found[1]},
        )
        finding += seconds
        reason = _disagreement(answers)
        if reason is None:
            return Restored(
                manifest=manifest,
                rejected=tuple(sorted(rejected.items(), reverse=True)),
                role_bytes=_role_bytes(engine.layout()),
                find_seconds=finding,
                seconds=time.perf_counter() - began - finding,
                free=freely,
            )
        # If workers found different ones, the newest is dropped, since some could not use it.
        newest = max(Position.parse(answer["position"]) for answer in answers)
        rejected[newest] = reason


def _in_pieces(layout: Layout) -> list[str]:
    """The roles of which this worker holds pieces."""
    return [role for role, named in layout.items() if any(spec.piece_of for spec in named.values())]


def _check_processes(manifest: Manifest, saved_by: int | None) -> None:
    if saved_by not in (None, manifest.world_size):
        raise CheckpointMismatch(
            f"checkpoint {manifest.position} was saved by {manifest.world_size} processes, and there are "
            f"{saved_by} now: what a process made once counts for that process only",
            hint=f"start it with {manifest.world_size} again",
        )


def _put_in_place(storage: Storage, manifest: Manifest, engine: Target) -> None:
    """Load all that the engine holds. After CheckpointInvalid its contents must not be used."""
    layout, group = engine.layout(), engine.group
    # Whoever saved what this worker wants has most likely the same place among the ranks of then.
    near = group.rank * manifest.world_size // group.world_size
    if engine.views:
        restore_into(storage, manifest, engine.tensors(), layout, near=near)
        return
    for role, name, array in read_boxes(storage, manifest, layout, near=near):
        engine.load(role, name, array)


def _role_bytes(layout: Layout) -> dict[str, int]:
    return {role: sum(spec.nbytes for spec in named.values()) for role, named in layout.items() if named}


def _disagreement(answers: list[dict[str, str | None]]) -> str | None:
    """Why the workers' checkpoint cannot be used; None when it can."""
    for rank, answer in enumerate(answers):
        if answer["problem"] is not None:
            return f"{answer['problem']} (worker {rank})" if len(answers) > 1 else answer["problem"]
    if len({answer["position"] for answer in answers}) > 1:
        return "not every worker finds it intact"
    return None


def _with_reasons(message: str, rejected: Mapping[Position, str]) -> str:
    missing = [reason for _, reason in sorted(rejected.items(), reverse=True) if reason not in message]
    return "\n".join([message, *(f"  {reason}" for reason in missing)])
