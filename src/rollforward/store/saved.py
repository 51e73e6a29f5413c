"""What a save takes in addition to tensors, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollforward.position import Position
from rollforward.store.cleaning import Kept
from rollforward.store.manifest import Head


@dataclass(frozen=True, kw_only=True)
class About:
    """What every checkpoint of a run contains besides its tensors, at whatever step."""

    run_id: str
    incarnation: int
    state: Mapping[str, Any]
    """JSON."""
    fingerprint: str = ""
    """Covers everything that influences the numbers."""
    versions: Mapping[str, str] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    """File name -> content, kept in the run's `model/` folder."""

    def at(
        self, position: Position, global_step: int, state: Mapping[str, Any] | None = None
    ) -> "Description":
        """The description of the checkpoint at a position; `state` replaces the common one."""
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
    """What a checkpoint contains besides its tensors; the same on all ranks."""

    position: Position
    global_step: int
    run_id: str
    incarnation: int
    state: Mapping[str, Any]
    fingerprint: str
    versions: Mapping[str, str]
    attachments: Mapping[str, bytes]


@dataclass(frozen=True)
class Spent:
    """What a save took on this rank, in seconds."""

    blocked: float
    """That the caller had to wait."""
    processor: float
    """Of the processor, on the thread that writes."""
    seconds: float
    """Spent on writing and publishing, not counting the wait for a step boundary."""


@dataclass(frozen=True)
class Committed:
    """A checkpoint that exists."""

    manifest: Head
    """The whole manifest on the first rank; what does not grow with the number of ranks on the others."""
    kept: Kept
    """What must now stay on disk."""
    warnings: tuple[str, ...]
    suspicion: str | None
    """See `Saved.suspicion`."""
    advice: Any = None
    """What the first rank had to say to all; see `ShadowCheckpoints`."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, and what saving it cost on this rank."""

    manifest: Head
    """As in `Committed`."""
    bytes_written: int
    """Tensor bytes written by this rank; unchanged roles are not written."""
    seconds: float
    """Spent on writing and publishing, not counting the wait for a step boundary."""
    blocked: float
    """Seconds that the caller had to wait."""
    warnings: tuple[str, ...]
    """What went wrong after the commit; one line each."""
    suspicion: str | None
    """Why it looks as if nothing was learned since the previous checkpoint, in one line;
    None when it does not."""
    advice: Any = None
    """As in `Committed`."""
