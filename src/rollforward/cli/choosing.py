"""What verbs that take the newest valid checkpoint tell of those that are newer but not valid.

On standard error, since what the verb prints then is about older weights.
"""

from pathlib import Path

from rollforward.cli.output import warn
from rollforward.store import Found, Manifest


def chosen(folder: Path, found: Found) -> Manifest:
    """The manifest that was found in a run's folder, after telling what was passed over for it."""
    for newer in found.rejected:
        warn(f"{folder}: {newer.position} is passed over for {found.manifest.position}: {newer.reason}")
    return found.manifest
