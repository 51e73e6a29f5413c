"""Compares the outcome of an update, bit by bit, with the one recorded in the journal.

Exact repetition is promised on the same versions and the same device. There a difference of one bit stops
the run, unless it was asked to accept that. Elsewhere the numbers must be within a tolerance, and what has
changed is reported. A different number of workers never gets here: its records are not taken over.
"""

import math
import struct
from collections.abc import Callable, Mapping
from typing import Literal

from rollforward.errors import ReplayDiverged
from rollforward.store.journal.records import Identity

RELATIVE_TOLERANCE = 1e-3
ABSOLUTE_TOLERANCE = 1e-5
"""How far a replay on other versions or another device may deviate from the recorded numbers."""

Notice = Callable[[str], None]
OnDivergence = Literal["stop", "accept"]
Values = Mapping[str, float | str]
"""Name -> float64, or the digest of something."""


class Comparing:
    """Compares replayed updates with their records, and counts them. `here` says who replays."""

    def __init__(
        self,
        here: Identity,
        *,
        notice: Notice,
        on_divergence: OnDivergence = "stop",
        to_accept: str = "--on_divergence accept",
    ) -> None:
        """`to_accept`: how the user sets `on_divergence="accept"`, for the hint."""
        self.replayed = 0
        """Updates that were compared."""
        self.repeated = 0
        """Those of them that gave the same bits."""
        self._here = here
        self._notice = notice
        self._on_divergence = on_divergence
        self._to_accept = to_accept

    def repeats(self, where: str, given: Values, recorded: Values, by: Identity) -> bool:
        """Whether the bits are the same as `by` recorded. If not, but acceptable: logs it and returns False.

        Otherwise raises ReplayDiverged, which names the values and what has changed since the recording.
        """
        self.replayed += 1
        differing = [
            name for name in (*given, *sorted(recorded.keys() - given)) if not _same(name, given, recorded)
        ]
        if not differing:
            self.repeated += 1
            return True
        values = "; ".join(
            f"{name} {given.get(name, 'none')!r} where {recorded.get(name, 'none')!r} was recorded"
            for name in differing
        )
        circumstances = _circumstances(self._here, by)
        if circumstances and _close(given, recorded):
            self._notice(f"{where}: replayed within tolerance, with {'; '.join(circumstances)}: {values}")
            return False
        reason = "; ".join(circumstances) or "versions, device and world size are those of the recording"
        if self._on_divergence == "accept":
            self._notice(f"{where}: the replay diverged, and continues as configured: {values} ({reason})")
            return False
        raise ReplayDiverged(
            f"{where}: the replay gave {values} ({reason})",
            hint="in the environment of the recording, the replay is exact; "
            f"{self._to_accept} continues with the new values, "
            "and an older checkpoint can tell where the difference starts",
        )


def same_bits(first: float, second: float) -> bool:
    """Whether two float64 are the same to the last bit."""
    return struct.pack("<d", first) == struct.pack("<d", second)


def _same(name: str, given: Values, recorded: Values) -> bool:
    first, second = given.get(name), recorded.get(name)
    if isinstance(first, float) and isinstance(second, float):
        return same_bits(first, second)
    return first == second


def _close(given: Values, recorded: Values) -> bool:
    """Whether all numbers are within tolerance; a changed digest never is."""
    numbers = {name for name, value in (*given.items(), *recorded.items()) if isinstance(value, float)}
    return all(_near(given.get(name), recorded.get(name)) for name in numbers)


def _near(first: float | str | None, second: float | str | None) -> bool:
    if not (isinstance(first, float) and isinstance(second, float)):
        return False
    return same_bits(first, second) or math.isclose(
        first, second, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
    )


def _circumstances(here: Identity, there: Identity) -> list[str]:
    """What has changed since the recording; exact repetition is promised if this is empty."""
    was, now = there.versions, here.versions
    found = [
        f"{name} {now.get(name, 'none')} instead of {was.get(name, 'none')}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]
    if here.device != there.device:
        found.append(f"device {here.device} instead of {there.device}")
    return found
