"""Whether a checkpoint is valid: the one place that decides, for resuming and for inspection.

There are two depths. `files`: the manifest is intact, every tensor file and table is a regular file of the
right size, no folder on its path is a link, and every attachment has its digest; a thousand ranks take
milliseconds. `bytes`: every byte of every table and tensor is also read and digested. Restoring verifies
every byte that it uses anyway, so `find` checks at depth `files`.

There are three possible answers. A checkpoint that could not be read this time (`CheckpointUnreadable`) is
not resumed from, but is not invalid either: nothing may be deleted because of it.

A run may save and prune during a check: the files that a manifest lists may vanish once the manifest is
gone. So before a checkpoint is reported as bad, its manifest is checked again. In a bucket the sizes of all
files come from listings (`storage.listing`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rollforward.errors import CheckpointInvalid, CheckpointUnreadable, StorageError
from rollforward.position import Position
from rollforward.storage import ReadHandle, Storage, read_whole
from rollforward.storage.listing import listed
from rollforward.store import manifest as manifests
from rollforward.store import versions
from rollforward.store.attachments import FoundAttachments, find_attachments
from rollforward.store.layout import manifest_path
from rollforward.store.manifest import Attachment, ListedFile, Manifest
from rollforward.store.restoring import verify_tensors
from rollforward.store.retention import Verdict
from rollforward.store.sealing import NOT_WHOLE
from rollforward.store.summary import Summary, listed_files, summarise
from rollforward.store.unreadable import rejection

_ENDS_BYTES = 512

Progress = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What was found out about one checkpoint."""

    position: Position
    verdict: Verdict
    reason: str
    """Why it is not valid, in one line; empty when it is valid."""
    manifest: Manifest | None
    bytes_read: int = 0
    """Bytes read of tensors and of attachments."""

    @property
    def valid(self) -> bool:
        """Whether a run may resume from it."""
        return self.verdict is Verdict.VALID

    @property
    def created(self) -> str:
        """UTC; empty when the manifest cannot be read."""
        return self.manifest.created if self.manifest else ""

    @property
    def size(self) -> int:
        """Bytes of all its files, including those shared with other checkpoints."""
        return self.manifest.size if self.manifest else 0


class Judge:
    """Judges the checkpoints in one folder; shared attachments are read once."""

    def __init__(
        self, storage: Storage, *, deep: bool = False, progress: Progress = lambda _size: None
    ) -> None:
        self.damaged_copies: dict[str, None] = {}
        """Attachments with one damaged and one intact copy, one line each, in order."""
        self._storage = storage
        self._listed = listed(storage)
        self._deep = deep
        self._progress = progress
        self._attachments: dict[tuple[Attachment, ...], FoundAttachments | CheckpointInvalid] = {}

    def judge(self, position: Position) -> CheckpointInfo | None:
        """The verdict; None when the checkpoint was removed in the meantime."""
        while True:
            manifest, read = None, 0
            try:
                manifest = load_manifest(self._storage, position)
                for size in self._look(manifest):
                    read += size
                    self._progress(size)
                damaged = self._check_attachments(manifest).damaged
            except CheckpointInvalid as error:
                if is_gone(self._storage, position):
                    return None
                if manifest is not None and is_replaced(self._storage, manifest):
                    continue
                return CheckpointInfo(
                    position=position,
                    verdict=verdict_of(error),
                    reason=error.message,
                    manifest=manifest,
                    bytes_read=read,
                )
            if damaged and is_gone(self._storage, position):
                return None
            self.damaged_copies |= dict.fromkeys(damaged)
            return CheckpointInfo(
                position=position, verdict=Verdict.VALID, reason="", manifest=manifest, bytes_read=read
            )

    def _look(self, manifest: Manifest) -> Iterator[int]:
        _check_sizes(self._listed, manifest.position, [*manifest.files, *manifest.table_files])
        self._check_attachments(manifest)
        if self._deep:
            yield from verify_tensors(self._storage, manifest)
            yield sum(item.size for item in manifest.attachments)

    def _check_attachments(self, manifest: Manifest) -> FoundAttachments:
        found = self._attachments.get(manifest.attachments)
        if found is None:
            try:
                found = find_attachments(self._listed, manifest.attachments, both=self._deep)
            except CheckpointInvalid as error:
                found = error
            if not isinstance(found, CheckpointUnreadable):
                self._attachments[manifest.attachments] = found
        if isinstance(found, CheckpointInvalid):
            raise type(found)(f"checkpoint {manifest.position}: {found.message}")
        return found


def verdict_of(problem: CheckpointInvalid | None) -> Verdict:
    """The verdict for an answer from `why_not_valid` or its variants."""
    if problem is None:
        return Verdict.VALID
    return Verdict.UNKNOWN if isinstance(problem, CheckpointUnreadable) else Verdict.INVALID


def why_not_valid(storage: Storage, position: Position) -> CheckpointInvalid | None:
    """Why `find` would reject this checkpoint; None when it would accept it."""
    try:
        check_files(storage, load_manifest(storage, position))
    except CheckpointInvalid as error:
        return error
    return None


def why_not_intact(storage: Storage, position: Position) -> CheckpointInvalid | None:
    """`why_not_valid`, checking every byte."""
    try:
        manifest = load_manifest(storage, position)
        check_files(storage, manifest)
        for _ in verify_tensors(storage, manifest):
            pass
    except CheckpointInvalid as error:
        return error
    return None


def why_not_there(storage: Storage, position: Position) -> CheckpointInvalid | None:
    """`why_not_valid` without rules that only a forged manifest would break; 100 times as fast."""
    try:
        files, attachments = listed_files(_content(storage, position), f"{position}.json")
        _check_sizes(storage, position, files)
        _about(position, storage, attachments)
    except CheckpointInvalid as error:
        return error
    return None


def load_manifest(storage: Storage, position: Position) -> Manifest:
    """The manifest of a position; CheckpointInvalid when it cannot be read or is not intact."""
    return versions.parse(_content(storage, position), f"{position}.json")


def load_summary(storage: Storage, position: Position) -> Summary:
    """The summary of a position's manifest; CheckpointInvalid as from `load_manifest`."""
    return summarise(_content(storage, position), f"{position}.json")


def is_gone(storage: Storage, position: Position) -> bool:
    """Whether there is no manifest for this position."""
    try:
        return storage.stat(manifest_path(position)) is None
    except StorageError:
        return False


def is_replaced(storage: Storage, manifest: Manifest) -> bool:
    """Whether this manifest was replaced by another intact one of the same position: it was saved again."""
    try:
        return load_manifest(storage, manifest.position).digest != manifest.digest
    except CheckpointInvalid:
        return False


def check_files(storage: Storage, manifest: Manifest) -> None:
    """CheckpointInvalid unless every file has its size and every attachment its digest."""
    _check_sizes(storage, manifest.position, [*manifest.files, *manifest.table_files])
    _about(manifest.position, storage, manifest.attachments)


def _content(storage: Storage, position: Position) -> bytes:
    """A manifest's bytes; CheckpointInvalid when they cannot be read or the ends are not a manifest's.

    The ends are checked first, so that a large file of some other kind is not read.
    """
    path = manifest_path(position)
    try:
        with storage.open(path) as handle:
            if not manifests.looks_whole(*_ends(handle)):
                raise CheckpointInvalid(f"manifest {position}.json: {NOT_WHOLE}")
            return read_whole(handle, path, limit=manifests.MAX_MANIFEST_BYTES)
    except StorageError as error:
        raise rejection(error, f"manifest {position}") from error


def _ends(handle: ReadHandle) -> tuple[bytes, bytes]:
    """A file's first bytes and last bytes."""
    size = min(_ENDS_BYTES, handle.size)
    front, back = bytearray(size), bytearray(size)
    handle.read_into(memoryview(front), 0)
    handle.read_into(memoryview(back), handle.size - size)
    return bytes(front), bytes(back)


def _about(position: Position, storage: Storage, attachments: Sequence[Attachment]) -> None:
    try:
        find_attachments(storage, attachments)
    except CheckpointInvalid as error:
        raise type(error)(f"checkpoint {position}: {error.message}") from error


def _check_sizes(storage: Storage, position: Position, files: Sequence[ListedFile]) -> None:
    folders: set[str] = set()
    try:
        for path, size in files:
            # Opening refuses links anywhere on the path, so a check must not follow them either.
            parts = path.split("/")
            for folder in ("/".join(parts[:count]) for count in range(1, len(parts))):
                if folder not in folders:
                    folders.add(folder)
                    entry = storage.stat(folder)
                    if entry is not None and entry.kind == "link":
                        raise CheckpointInvalid(f"checkpoint {position}: {folder} is a link, not a folder")
            entry = storage.stat(path)
            if entry is None:
                raise CheckpointInvalid(f"checkpoint {position}: {path} is missing")
            if entry.kind != "file":
                raise CheckpointInvalid(f"checkpoint {position}: {path} is a {entry.kind}, not a file")
            if entry.size != size:
                raise CheckpointInvalid(
                    f"checkpoint {position}: {path} has {entry.size} bytes instead of {size}"
                )
    except StorageError as error:
        raise rejection(error, f"checkpoint {position}") from error
