"""Verbs that take the newest valid checkpoint report newer ones that are not valid.

On standard error, since the verb's output is then about older weights.
"""

from rollforward.cli.output import warn
from rollforward.store import Found, Manifest


def chosen(folder: str, found: Found) -> Manifest:
    """The manifest found in a run's folder, after reporting the checkpoints that were skipped for it."""
    for newer in found.rejected:
        warn(f"{folder}: {newer.position} is passed over for {found.manifest.position}: {newer.reason}")
    return found.manifest
