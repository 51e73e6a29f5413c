"""A run of somebody else's loop, replayed up to a step: `rollforward rebuild RUN ... -- COMMAND`.

The verb copies what a replay needs into a new folder and starts the loop's own command, with a variable in
its environment. When the loop opens RUN, `open_run` opens the new folder instead; where the step is reached,
the checkpoint is saved and the program ends. RUN is not changed, and nothing is made anew: what `once` does
not find in the journal is an error.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollforward.position import Position
from rollforward.replay.metrics import FILE as METRICS
from rollforward.storage import ReadHandle, Storage
from rollforward.storage.address import is_remote, local_path
from rollforward.store import Manifest, find
from rollforward.store.attachments import copy_of
from rollforward.store.journal.reading import journal_ranks, list_segments
from rollforward.store.layout import manifest_path

VARIABLE = "ROLLFORWARD_REBUILD"
_BLOCK = 1 << 22


class Rebuilt(SystemExit):
    """Ends the loop's program once the step's checkpoint is saved."""


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """What is asked of the loop."""

    run: str | Path
    """The folder that the loop opens, or the address."""
    out: Path
    """The folder that it gets."""
    until: Position
    """The state before this step."""

    def as_text(self) -> str:
        """The value of the variable."""
        return json.dumps([_resolved(self.run), str(self.out.resolve()), str(self.until)])


def asked_of(run: str | Path) -> Rebuild | None:
    """What is asked of a loop that opens this folder or address; None in an ordinary start."""
    if VARIABLE not in os.environ:
        return None
    asked, out, until = json.loads(os.environ[VARIABLE])
    if _resolved(run) != asked:
        return None
    return Rebuild(run=run, out=Path(out), until=Position.parse(until))


def _resolved(run: str | Path) -> str:
    if is_remote(run):
        return str(run).rstrip("/")
    return str(local_path(run).expanduser().resolve())


def copy_for_replay(source: Storage, out: Storage, until: Position) -> Position:
    """Copy the newest checkpoint at or before a position, the journal and the figures; returns its position.

    The manifest comes last: a copy that was interrupted is no run. NothingToResume, StorageError.
    """
    manifest = find(source, until=until).manifest
    for path in _paths(source, manifest):
        _copy(source, out, path)
    _copy(source, out, manifest_path(manifest.position))
    return manifest.position


def _paths(source: Storage, manifest: Manifest) -> Iterator[str]:
    copies = {copy_of(item.path) for item in manifest.attachments}
    # One of an attachment's two copies may be gone.
    yield from (path for path in sorted(manifest.paths() | copies) if source.stat(path) is not None)
    for rank in journal_ranks(source):
        yield from (segment.name.path for segment in list_segments(source, rank))
    if source.stat(METRICS) is not None:
        yield METRICS


def _copy(source: Storage, out: Storage, path: str) -> None:
    with source.open(path) as handle:
        sizes = ((begin, min(_BLOCK, handle.size - begin)) for begin in range(0, handle.size, _BLOCK))
        out.write(path, (_read(handle, begin, size) for begin, size in sizes))


def _read(handle: ReadHandle, begin: int, size: int) -> bytearray:
    block = bytearray(size)
    handle.read_into(memoryview(block), begin)
    return block
