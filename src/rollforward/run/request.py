"""What is asked of a start of a run, besides its configuration."""

from dataclasses import dataclass

from rollforward.position import Position


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, besides the configuration."""

    resume: bool
    actor_checkpoint_path: str = ""
    ref_checkpoint_path: str = ""
    position: Position | None = None
    """With `resume`: continue from here, in a new folder, and take over nothing beyond; None: the newest."""
    rebuild: bool = False
    """With `position`: only build its checkpoint."""
