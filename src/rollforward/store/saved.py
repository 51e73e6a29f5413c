"""What a save is given besides tensors, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollforward.position import Position
from rollforward.store.cleaning import Kept
from rollforward.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class About:
    """What every checkpoint of a run says besides its tensors, whatever step it is of."""

    run_id: str
    incarnation: int
    state: Mapping[str, Any]
    """JSON."""
    fingerprint: str = ""
    """Of what influences the numbers."""
    versions: Mapping[str, str] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    """File name -> content, kept in the run's `model/` folder."""

    def at(
        self, position: Position, global_step: int, state: Mapping[str, Any] | None = None
    ) -> "Description":
        """Of the checkpoint at a position; `state` stands in for that of all."""
        return Description(
            position=position,
            global_step=global_step,
            run_id=self.run_id,
            incarnation=self.incarnation,
            state=self.state if state is None else state,
            fingerprint=self.fingerprint,
            versions=self.versions,
            attachments=self.attachments,
        )


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
