"""Small files that belong to a checkpoint: the model's `config.json`, `tokenizer.json` and the like.

All checkpoints share one copy in the run's `model/` folder and a second one in `model.copy/`: with a single
copy, one damaged byte would cost every checkpoint. The digests in a manifest apply to both copies; either
one that matches them can be used. Earlier releases made no second copy: the next checkpoint adds it.

Content that differs from what is already there goes to `model.1/` (and `model.1.copy/`), `model.2/` and so
on: a file that a manifest lists is never replaced, and a file that no manifest lists may not be ours.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rollforward.errors import CheckpointInvalid, CheckpointUnreadable, StorageError
from rollforward.storage import Storage, read_small
from rollforward.storage.base import check_path
from rollforward.store.digests import digest
from rollforward.store.layout import MODEL, is_temporary
from rollforward.store.manifest import MAX_ATTACHMENT_BYTES, Attachment
from rollforward.store.unreadable import rejection

_COPY = ".copy"


@dataclass(frozen=True)
class FoundAttachments:
    """The attachments of a checkpoint, verified."""

    contents: Mapping[str, bytes]
    """File name -> content."""
    folder: str
    """The folder that holds all of them with this content; relative to the run's folder."""
    damaged: tuple[str, ...] = ()
    """Problems with the copy that was not used, one line each."""


def copy_of(path: str) -> str:
    """The path of an attachment's second copy."""
    folder, _, name = path.rpartition("/")
    return f"{folder}{_COPY}/{name}"


def find_attachments(
    storage: Storage, attachments: Sequence[Attachment], *, both: bool = False
) -> FoundAttachments:
    """The first of the two copies that is intact; with `both`, the other one is checked too.

    CheckpointInvalid, without the checkpoint's name, when neither is intact: CheckpointUnreadable when one
    of them could not be read.
    """
    try:
        found = _read_all(storage, attachments, [item.path for item in attachments])
    except CheckpointInvalid as first:
        try:
            found = _read_all(storage, attachments, [copy_of(item.path) for item in attachments])
        except CheckpointInvalid as second:
            unknown = any(isinstance(error, CheckpointUnreadable) for error in (first, second))
            raise (CheckpointUnreadable if unknown else CheckpointInvalid)(first.message) from second
        return FoundAttachments(found.contents, found.folder, (first.message,))
    return FoundAttachments(found.contents, found.folder, _wrong_copies(storage, attachments) if both else ())


def _wrong_copies(storage: Storage, attachments: Sequence[Attachment]) -> tuple[str, ...]:
    """Problems with second copies; a missing one is not a problem, since older releases made none."""
    wrong = []
    for item in attachments:
        try:
            if storage.stat(copy_of(item.path)) is not None:
                _read(storage, item, copy_of(item.path))
        except StorageError as error:
            wrong.append(error.message)
        except CheckpointInvalid as error:
            wrong.append(error.message)
    return tuple(wrong)


def _read_all(storage: Storage, attachments: Sequence[Attachment], paths: Sequence[str]) -> FoundAttachments:
    contents: dict[str, bytes] = {}
    for item, path in zip(attachments, paths, strict=True):
        contents.setdefault(item.name, _read(storage, item, path))
    return FoundAttachments(contents, paths[0].rpartition("/")[0] if paths else MODEL)


def _read(storage: Storage, item: Attachment, path: str) -> bytes:
    try:
        entry = storage.stat(path)
        if entry is None:
            raise CheckpointInvalid(f"{path} is missing")
        if entry.kind == "file" and entry.size != item.size:
            raise CheckpointInvalid(f"{path} has {entry.size} bytes instead of {item.size}")
        content = read_small(storage, path, limit=min(item.size, MAX_ATTACHMENT_BYTES))
    except StorageError as error:
        raise rejection(error) from error
    if digest(content) != item.digest:
        raise CheckpointInvalid(f"{path} does not have its recorded digest")
    return content


def write_attachments(
    storage: Storage, contents: Mapping[str, bytes], named: Mapping[str, str], written: set[str]
) -> tuple[Attachment, ...]:
    """Make both copies of the files durable and return where they are; skips files that are already there.

    `named` is path -> digest of everything that existing manifests list. `written` holds the paths that this
    process wrote itself, whether or not a manifest was published; new ones are added. ValueError for a
    name that is not a plain file name, and for content that could not be read back.
    """
    for name, content in contents.items():
        if len(content) > MAX_ATTACHMENT_BYTES:
            raise ValueError(f"the attachment {name} has {len(content)} bytes, which is too much")
        if "/" in check_path(name) or is_temporary(name):
            raise ValueError(f"an attachment cannot be named {name!r}")
    found = _in_free_folder(storage, contents, named, written)
    for item in found:
        # The second copy first: it distinguishes what a killed save left from files that are not ours.
        for path in (copy_of(item.path), item.path):
            # Only what a manifest lists is known to be durable, and it may have been damaged since.
            if not (named.get(item.path) == item.digest and _is_whole(storage, item, path)):
                storage.write(path, [contents[item.name]])
        written.add(item.path)
    return found


def _in_free_folder(
    storage: Storage, contents: Mapping[str, bytes], named: Mapping[str, str], written: Collection[str]
) -> tuple[Attachment, ...]:
    """The attachments, in the first folder where they would replace nothing else."""
    for number in itertools.count():
        folder = f"{MODEL}.{number}" if number else MODEL
        found = tuple(
            Attachment(f"{folder}/{name}", len(content), digest(content))
            for name, content in sorted(contents.items())
        )
        if _can_be_folder(storage, folder) and all(_is_free(storage, item, named, written) for item in found):
            return found
    raise AssertionError("there is always another number")


def _can_be_folder(storage: Storage, folder: str) -> bool:
    entries = (storage.stat(folder), storage.stat(f"{folder}{_COPY}"))
    return all(entry is None or entry.kind == "folder" for entry in entries)


def _is_free(storage: Storage, item: Attachment, named: Mapping[str, str], written: Collection[str]) -> bool:
    if item.path in named:
        return named[item.path] == item.digest
    if item.path in written:
        return True
    first, second = storage.stat(item.path), storage.stat(copy_of(item.path))
    if second is None:
        # A file without a second copy was not written by us.
        return first is None
    return _is_whole(storage, item, copy_of(item.path)) and (
        first is None or _is_whole(storage, item, item.path)
    )


def _is_whole(storage: Storage, item: Attachment, path: str) -> bool:
    try:
        _read(storage, item, path)
    except CheckpointInvalid:
        return False
    return True
