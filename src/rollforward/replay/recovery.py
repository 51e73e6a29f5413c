"""Loads the newest checkpoint that proves intact into the engine, the same one on all workers.

Every byte is verified as it is loaded. Where the host sees the engine's memory, bytes are read
straight into it, several tensors at once, and verified in place; elsewhere each tensor is verified
first and then passed to the engine.

A checkpoint that turns out to be damaged, on any worker, is rejected with its reason and the next
older one is loaded over whatever had been loaded; all workers take the same one. When none is left,
the engine's contents are meaningless: an error that says so ends the run. A checkpoint of another
model or another number of workers is not damaged: that is an error which an older checkpoint would
not fix.

Left out: rolling the journal forward from there, which `rollout_log` prepares and the trainer does.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from rollforward.agreement import together
from rollforward.errors import CheckpointInvalid, NothingToResume
from rollforward.grpo.ports import Group
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import Manifest, check_layout, find, read_tensors, restore_into
from rollforward.tensors import Layout, Tensors, layout_of


class Target(Protocol):
    """What a checkpoint is loaded into; a `grpo.ports.Engine` is one."""

    group: Group
    views: bool
    """Whether `tensors()` are the memory itself, so that bytes can be read straight into it."""

    def layout(self) -> Layout:
        """What tensors there are, without reading any."""
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
    """Bytes restored, by role."""
    find_seconds: float
    """Time to find it."""
    seconds: float
    """Time to read, verify and load, including rejected checkpoints."""


class Arrays:
    """A `Target` of plain arrays."""

    views = True

    def __init__(self, tensors: Tensors, group: Group) -> None:
        self.group = group
        self._tensors = tensors

    def layout(self) -> Layout:
        """The layout of the arrays, which are not split."""
        return layout_of(self._tensors)

    def tensors(self) -> Tensors:
        """The arrays themselves."""
        return self._tensors

    def load(self, role: str, name: str, array: NDArray[Any]) -> None:
        """Put one tensor in place."""
        self._tensors[role][name][...] = array


def restore(storage: Storage, engine: Target, *, until: Position | None = None) -> Restored:
    """Load the newest checkpoint, not after `until`, that proves intact on every worker. Collective.

    Raises NothingToResume, with all reasons, when none does, and CheckpointMismatch for an
    intact one that does not fit this engine; what one worker raises, all raise.
    """
    rejected: dict[Position, str] = {}
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
        check_layout(found.manifest, engine.layout(), world_size=engine.group.world_size)
        try:
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
                role_bytes=_role_bytes(manifest),
                find_seconds=finding,
                seconds=time.perf_counter() - began - finding,
            )
        # If workers found different ones, the newest is dropped, since some could not use it.
        newest = max(Position.parse(answer["position"]) for answer in answers)
        rejected[newest] = reason


def _put_in_place(storage: Storage, manifest: Manifest, engine: Target) -> None:
    """Load all tensors into the engine. After CheckpointInvalid its contents must not be used."""
    if engine.views:
        restore_into(storage, manifest, engine.tensors())
        return
    for role, name, array in read_tensors(storage, manifest):
        engine.load(role, name, array)


def _role_bytes(manifest: Manifest) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in manifest.tensors:
        sizes[tensor.role] = sizes.get(tensor.role, 0) + tensor.record.size
    return sizes


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
