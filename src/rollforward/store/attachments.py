"""Small files that go with a checkpoint: the model's `config.json`, `tokenizer.json` and the like.

They lie in the run's `model/` folder, once for all checkpoints. Content that differs from what
an earlier checkpoint names under the same path goes to `model.1/`, `model.2/` and so on, since
a file that a manifest names is never replaced by another.
"""

from collections.abc import Mapping

from rollforward.errors import StorageError
from rollforward.storage import Storage, read_small
from rollforward.storage.base import check_path
from rollforward.store.digests import digest
from rollforward.store.layout import MODEL, is_temporary
from rollforward.store.manifest import MAX_ATTACHMENT_BYTES, Attachment


def write_attachments(
    storage: Storage, contents: Mapping[str, bytes], named: Mapping[str, str]
) -> tuple[Attachment, ...]:
    """Make the files durable and say where they are; what is there already is not written again.

    `named` is path -> digest of everything that existing manifests name. ValueError for a name
    that is not a plain file name, and for content that would not be read again.
    """
    digests = {name: digest(content) for name, content in sorted(contents.items())}
    for name in digests:
        if len(contents[name]) > MAX_ATTACHMENT_BYTES:
            raise ValueError(f"the attachment {name} has {len(contents[name])} bytes, which is too much")
        if "/" in check_path(name) or is_temporary(name):
            raise ValueError(f"an attachment cannot be named {name!r}")
    folder = _free_folder(digests, named)
    found = []
    for name, own in digests.items():
        path = f"{folder}/{name}"
        # Only what a manifest names is known to be durable, and it may have been damaged since.
        if not (named.get(path) == own and _content_digest(storage, path, len(contents[name])) == own):
            storage.write(path, [contents[name]])
        found.append(Attachment(path, len(contents[name]), own))
    return tuple(found)


def _free_folder(digests: Mapping[str, str], named: Mapping[str, str]) -> str:
    number = 0
    while True:
        folder = f"{MODEL}.{number}" if number else MODEL
        if all(named.get(f"{folder}/{name}", own) == own for name, own in digests.items()):
            return folder
        number += 1


def _content_digest(storage: Storage, path: str, size: int) -> str:
    try:
        return digest(read_small(storage, path, limit=size))
    except StorageError:
        return ""
