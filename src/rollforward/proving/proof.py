"""What is to be proven, and what was found."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rollforward.proving.causes import Cause
from rollforward.proving.comparing import Compared
from rollforward.proving.trial import Command, Trial


class Verdict(StrEnum):
    """Whether the trainer resumes."""

    EQUAL = "equal"
    DIFFERENT = "different"
    NOT_TRIED = "not tried"

    @property
    def exit_code(self) -> int:
        """0, 1 and 2."""
        return list(Verdict).index(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be proven, and how."""

    command: Command
    out: Path
    """A new folder."""
    kills: int = 3
    """At random moments."""
    kill_after: tuple[re.Pattern[str], ...] = ()
    """Instead: for each kill, a pattern; it follows the first line of its start that matches."""
    twice: bool = False
    seed: int = 0
    """Of the random moments."""
    timeout: float | None = None
    """The longest that one start may take, in seconds."""
    compare: tuple[str, ...] = ()
    """Globs of other files to compare."""


@dataclass(kw_only=True)
class Proof:
    """What was found."""

    plan: Plan
    verdict: Verdict = Verdict.NOT_TRIED
    reason: str = ""
    """Why it could not be tried, or why the run that was killed did not come to its end."""
    causes: list[Cause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    compared: Compared | None = None
    """The run that was killed with the one in peace; beyond the noise, if that was measured."""
    noise: Compared | None = None
    """Two runs in peace."""
