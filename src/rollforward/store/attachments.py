"""Small files that go with a checkpoint: the model's `config.json`, `tokenizer.json` and the like.

They lie in the run's `model/` folder, once for all checkpoints. Content that differs from what
an earlier checkpoint names under the same path goes to `model.1/`, `model.2/` and so on, since
a file that a manifest names is never replaced by another. Nor is one that none names: a folder `model/` may
have been there before the run.
"""

import itertools
from collections.abc import Collection, Mapping

from rollforward.errors import StorageError
from rollforward.storage import Storage, read_small
from rollforward.storage.base import check_path
from rollforward.store.digests import digest
from rollforward.store.layout import MODEL, is_temporary
from rollforward.store.manifest import Attachment


def write_attachments(
    storage: Storage, contents: Mapping[str, bytes], named: Mapping[str, str], written: set[str]
) -> tuple[Attachment, ...]:
    """Make the files durable and say where they are; what is there already is not written again.

    `named` is path -> digest of everything that existing manifests name. `written` are the paths that this
    process wrote itself, be the manifest published or not; what is written now is added. ValueError for a
    name that is not a plain file name.
    """
    digests = {name: digest(content) for name, content in sorted(contents.items())}
    for name in digests:
        if "/" in check_path(name) or is_temporary(name):
            raise ValueError(f"an attachment cannot be named {name!r}")
    folder = _free_folder(storage, digests, named, written)
    found = []
    for name, own in digests.items():
        path = f"{folder}/{name}"
        # Only what a manifest names is known to be durable, and it may have been damaged since.
        if not (named.get(path) == own and _content_digest(storage, path, len(contents[name])) == own):
            storage.write(path, [contents[name]])
            written.add(path)
        found.append(Attachment(path, len(contents[name]), own))
    return tuple(found)


def _free_folder(
    storage: Storage, digests: Mapping[str, str], named: Mapping[str, str], written: Collection[str]
) -> str:
    def is_free(path: str, own: str) -> bool:
        if path in named:
            return named[path] == own
        return path in written or storage.stat(path) is None

    for number in itertools.count():
        folder = f"{MODEL}.{number}" if number else MODEL
        at = storage.stat(folder)
        if (at is None or at.kind == "folder") and all(
            is_free(f"{folder}/{name}", own) for name, own in digests.items()
        ):
            return folder
    raise AssertionError("there is always another number")


def _content_digest(storage: Storage, path: str, size: int) -> str:
    try:
        return digest(read_small(storage, path, limit=size))
    except StorageError:
        return ""
