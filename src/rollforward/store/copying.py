"""A run, or one checkpoint of it, copied to another place: manifests last, every byte verified on both sides.

    1  what checkpoints need            tables, tensor files, attachments
    2  what else there is               journal, metrics, configurations, logs, evidence
    3  the copied checkpoints           read back and digested, as `verify --deep` does
    4  commits/*.json                   oldest first: only now the checkpoints exist there
    5  meta.json                        derived, as ever

A copy that was killed has no checkpoint that is not whole, and the next one goes on: what is there already is
compared, not sent again. The source may be training meanwhile. A checkpoint that it removes in the middle is
left out, as is one that is damaged; a journal is copied up to what was there when it was opened.

Left out: what is only of the machine where the run trains (lock, heartbeats, compiled graphs), unfinished
files, and tensor files that no checkpoint needs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

from rollforward.errors import CheckpointInvalid, ConfigError, StorageError
from rollforward.position import Position
from rollforward.storage import Storage, read_small
from rollforward.storage.failures import settled_error
from rollforward.store import strictjson, versions
from rollforward.store.attachments import copy_of
from rollforward.store.catalog import positions, roles_on_disk
from rollforward.store.judging import load_manifest
from rollforward.store.layout import (
    COMMITS,
    GUESTS,
    LOCK,
    TABLES,
    is_temporary,
    manifest_path,
    meta_path,
    role_folder,
)
from rollforward.store.manifest import MAX_MANIFEST_BYTES, Manifest
from rollforward.store.meta import write_meta
from rollforward.store.restoring import read_attachments, verify, verify_tensors

MARK = "copy.json"
"""In the target, until a copy is whole: which run is being copied there."""
_HERE = frozenset({"compile_cache", "heartbeat"})
_PIECE_BYTES = 8 << 20
_MARK_BYTES = 1 << 16

Progress = Callable[[int], None]
"""Called with the number of bytes read since its last call."""


@dataclass(kw_only=True)
class Copied:
    """What a copy did."""

    checkpoints: list[Position] = field(default_factory=list)
    """Those that are there now, oldest first."""
    files: int = 0
    """Sent; what was there already is not counted."""
    size: int = 0
    """Bytes sent."""
    left_out: list[str] = field(default_factory=list)
    """What was not copied, and why, one line each."""


def copy_run(source: Storage, target: Storage, *, progress: Progress = lambda _size: None) -> Copied:
    """Copy everything. ConfigError when the target holds something else; StorageError."""
    return _Copy(source, target, progress).whole()


def copy_checkpoint(
    source: Storage, target: Storage, position: Position, *, progress: Progress = lambda _size: None
) -> Copied:
    """Copy one checkpoint, which is enough to go on from: no journal, no metrics. Errors as `copy_run`."""
    return _Copy(source, target, progress).one(position)


def bytes_to_copy(source: Storage) -> int:
    """How much a copy has to read at the source, about."""
    return sum(size for _, size in _walk(source, "") if size)


class _Copy:
    def __init__(self, source: Storage, target: Storage, progress: Progress) -> None:
        self._source, self._target, self._progress = source, target, progress
        self._done = Copied()

    def whole(self) -> Copied:
        manifests = list(self._manifests(reversed(positions(self._source))))
        self._claim(manifests[-1].about.run_id if manifests else "")
        manifests = [each for each in manifests if self._bring_checkpoint(each.about)]
        theirs = {COMMITS, TABLES}
        if self._source.stat(GUESTS) is None:  # otherwise another trainer's files are among ours
            theirs |= {role_folder(role) for role in roles_on_disk(self._source)}
        for path, _ in _walk(self._source, ""):
            if path.partition("/")[0] not in theirs and not _is_of_here(path):
                self._bring_other(path)
        return self._publish(manifests)

    def one(self, position: Position) -> Copied:
        manifests = list(self._manifests([position]))
        if manifests:
            self._claim(manifests[0].about.run_id)
        return self._publish([each for each in manifests if self._bring_checkpoint(each.about)])

    def _manifests(self, wanted: Iterable[Position]) -> Iterator["_Named"]:
        for position in wanted:
            path = manifest_path(position)
            try:
                content = read_small(self._source, path, limit=MAX_MANIFEST_BYTES)
                yield _Named(content, versions.parse(content, path.rpartition("/")[2]))
            except (CheckpointInvalid, StorageError) as error:
                if isinstance(error, StorageError) and not error.settled:
                    raise
                self._done.left_out.append(error.message)

    def _claim(self, run_id: str) -> None:
        """ConfigError when something else is in the target than an earlier copy of this run."""
        there = self._target.scan("")
        if there and run_id not in _runs_in(self._target):
            raise ConfigError(
                f"{self._target}: something else is there: {', '.join(each.name for each in there[:5])}",
                hint="name a new place; what is there is only added to when it is a copy of the same run",
            )
        mark = {"format": "rollforward copy", "version": 1, "run_id": run_id, "from": str(self._source)}
        self._target.write(MARK, [json.dumps(mark).encode()])

    def _bring_checkpoint(self, manifest: Manifest) -> bool:
        """Copy the files it needs, and prove them intact at the target; False when it is left out."""
        small = {path for each in manifest.attachments for path in (each.path, copy_of(each.path))}
        # Either copy of a small file will do.
        paths = manifest.paths() - small | {path for path in small if self._source.stat(path)}
        try:
            for path in sorted(paths):
                self._bring(path, trust=True)
            if not self._is_intact(manifest):
                # Of the same size, yet not the same: an earlier copy's, or damaged there.
                for path in sorted(paths):
                    self._bring(path, trust=False)
                verify(self._target, manifest)
        except CheckpointInvalid as error:
            self._done.left_out.append(f"{error.message} (as it came to {self._target})")
            return False
        except StorageError as error:
            if not error.settled:
                raise
            self._done.left_out.append(f"checkpoint {manifest.position}: {error.message}")
            return False
        return True

    def _is_intact(self, manifest: Manifest) -> bool:
        try:
            for size in verify_tensors(self._target, manifest):
                self._progress(size)
            read_attachments(self._target, manifest)
        except CheckpointInvalid:
            return False
        return True

    def _bring_other(self, path: str) -> None:
        """Copy a file that has no manifest; it may be removed meanwhile."""
        try:
            sent = self._bring(path, trust=False)
        except StorageError as error:
            if not error.settled:
                raise
            self._done.left_out.append(error.message)
            return
        if sent != self._digest(self._target, path):
            raise StorageError(
                f"copying {path} to {self._target}: what came back is not what was sent",
                hint="try again; if it stays, the network or the service damages files",
            )

    def _bring(self, path: str, *, trust: bool) -> str:
        """Copy a file unless it is there; the digest of what was read at the source.

        `trust`: one of the same size is taken for it, since it is verified later; then no digest is returned.
        """
        there = self._target.stat(path)
        with self._source.open(path) as handle:
            if there is not None and there.kind == "file" and there.size == handle.size:
                if trust:
                    return ""
                found = self._digest(self._source, path, handle.size)
                if found == self._digest(self._target, path):
                    return found
            seen = xxhash.xxh3_128()

            def pieces() -> Iterator[bytes]:
                for offset in range(0, handle.size, _PIECE_BYTES):
                    piece = bytearray(min(_PIECE_BYTES, handle.size - offset))
                    handle.read_into(memoryview(piece), offset)
                    seen.update(piece)
                    self._progress(len(piece))
                    yield bytes(piece)

            self._done.size += self._target.write(path, pieces())
            self._done.files += 1
        return seen.hexdigest()

    def _digest(self, storage: Storage, path: str, size: int | None = None) -> str:
        seen = xxhash.xxh3_128()
        with storage.open(path) as handle:
            size = handle.size if size is None else size
            for offset in range(0, size, _PIECE_BYTES):
                piece = bytearray(min(_PIECE_BYTES, size - offset))
                handle.read_into(memoryview(piece), offset)
                seen.update(piece)
                self._progress(len(piece))
        return seen.hexdigest()

    def _publish(self, manifests: Sequence["_Named"]) -> Copied:
        for each in manifests:
            self._put(manifest_path(each.about.position), each.content)
            self._done.checkpoints.append(each.about.position)
        if manifests:
            newest = max((each.about for each in manifests), key=lambda about: about.order)
            for role in newest.roles:
                for rank in range(newest.world_size):
                    write_meta(self._target, meta_path(role, rank), newest.tensor_file(role, rank))
        if self._done.checkpoints:
            # Otherwise only the mark says of which run this is the beginning, and lets a copy go on.
            self._target.remove(MARK)
        self._target.sync_folder("")
        return self._done

    def _put(self, path: str, content: bytes) -> None:
        there = self._target.stat(path)
        if there is None or there.size != len(content) or self._content(path) != content:
            self._target.write(path, [content])

    def _content(self, path: str) -> bytes:
        return read_small(self._target, path, limit=MAX_MANIFEST_BYTES)


class _Named(NamedTuple):
    """A manifest, with the bytes that it was read from: a run that trains may replace the file."""

    content: bytes
    about: Manifest


def _walk(storage: Storage, folder: str) -> Iterator[tuple[str, int]]:
    """Every file below a folder, and its size."""
    for entry in storage.scan(folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.kind == "folder":
            yield from _walk(storage, path)
        elif entry.kind == "file":
            yield path, entry.size


def _is_of_here(path: str) -> bool:
    """Whether a file is only of the machine where the run trains, or not a finished one."""
    return path in (LOCK, MARK) or path.partition("/")[0] in _HERE or is_temporary(path.rpartition("/")[2])


def _runs_in(target: Storage) -> set[str]:
    """The runs whose checkpoints are in the target, or that are being copied there."""
    found = set()
    for position in positions(target):
        try:
            found.add(load_manifest(target, position).run_id)
        except CheckpointInvalid:
            continue
    if target.stat(MARK) is not None:
        try:
            found.add(strictjson.parse(read_small(target, MARK, limit=_MARK_BYTES))["run_id"])
        except (ValueError, TypeError, KeyError) as error:
            raise settled_error(
                f"{target}/{MARK} is not one that a copy left: {error}",
                hint="remove it, if nothing else is there",
            ) from error
    return found
