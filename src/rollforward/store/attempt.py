"""A save under way, as one rank sees it, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollforward.position import Position
from rollforward.store.cleaning import Kept
from rollforward.store.layout import TensorFileName
from rollforward.store.manifest import Manifest
from rollforward.store.parts import Sources
from rollforward.store.tensorfile import WrittenFile


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint says besides its tensors; the same on all ranks."""

    position: Position
    global_step: int
    run_id: str
    incarnation: int
    state: Mapping[str, Any]
    fingerprint: str
    versions: Mapping[str, str]
    attachments: Mapping[str, bytes]


@dataclass
class Attempt:
    """A save under way on one rank."""

    description: Description
    number: int
    """Behind the file prefix, when this position had a checkpoint before."""
    created: str
    roles: list[str]
    shares: Mapping[str, list[list[str]]]
    """role -> rank -> names, as `parts.assign` says."""
    revisions: Mapping[str, int]
    """role -> revision of what is saved, where one is known."""
    unchanged: frozenset[str]
    """Roles that are, by their revisions, those of the checkpoint before."""
    started: float
    sources: Sources = field(default_factory=dict)
    """What this rank writes, as `CheckpointStore.share` says; set before it does."""
    written: dict[str, WrittenFile | None] = field(default_factory=dict)
    """role -> what this rank wrote; None where nothing changed."""

    def target(self, role: str, rank: int) -> TensorFileName:
        """The file of a role and rank."""
        return TensorFileName(role, rank, self.description.position, self.number)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor files that this rank wrote; what did not change was not written."""
        return sum(file.size for file in self.written.values() if file is not None)


@dataclass(frozen=True)
class Committed:
    """A checkpoint that exists."""

    manifest: Manifest
    kept: Kept
    """What must stay on disk now."""
    warnings: tuple[str, ...]
    suspicion: str | None
    """See `Saved.suspicion`."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, and what saving it took on this rank."""

    manifest: Manifest
    bytes_written: int
    """Tensor bytes written by this rank; what did not change was not written."""
    seconds: float
    """Spent on writing and publishing; waiting for a step boundary is not among them."""
    blocked: float
    """Seconds for which the caller had to wait."""
    warnings: tuple[str, ...]
    """What went wrong after it was committed; one line each."""
    suspicion: str | None
    """Why this checkpoint looks as if nothing had been learnt since the one before, in one line;
    None where it does not."""
