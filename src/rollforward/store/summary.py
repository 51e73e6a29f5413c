"""The summary of a manifest: what retention and cleaning need to know about a checkpoint.

A folder may hold a thousand checkpoints, and what makes a manifest large is its tensors. They are
skipped here: the manifest's own digest is checked over every byte, then only the part before the
tensors is parsed, and only what is needed is kept. Whether the files are there, and whether the
rest of the manifest follows the rules, is another question (`catalog`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rollforward.position import Position
from rollforward.storage.base import check_path
from rollforward.store import manifest as manifests
from rollforward.store import strictjson
from rollforward.store.layout import TensorFileName
from rollforward.store.manifest import Attachment, Generation, Manifest

_TENSORS = b',\n"tensors":['
"""The text just before the tensors; never inside a string, where JSON has no line breaks."""
_KEYS = manifests.KEYS - {"tensors", "digest"}
_FIRST_RANK = "/rank_0/"

_Entry = tuple[str, int, str]
"""Path, size, digest."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The essentials of one checkpoint."""

    incarnation: int
    position: Position
    global_step: int
    world_size: int
    metrics: Mapping[str, float]
    generations: frozenset[Generation]
    """The tensor files it needs, of all ranks."""
    attachments: Mapping[str, str]
    """Path -> digest."""

    @classmethod
    def of(cls, manifest: Manifest) -> "Summary":
        """The summary of a full manifest."""
        return cls(
            incarnation=manifest.incarnation,
            position=manifest.position,
            global_step=manifest.global_step,
            world_size=manifest.world_size,
            metrics=manifest.metrics,
            generations=frozenset(manifest.generations()),
            attachments={item.path: item.digest for item in manifest.attachments},
        )


def summarise(content: bytes, name: str) -> Summary:
    """The summary of the manifest in the file `commits/<name>`; CheckpointInvalid when it is not one."""
    try:
        front = _front(content, name)
    except (ValueError, TypeError, AttributeError):
        # Damaged, or laid out differently from ours: parsing all of it tells which.
        return Summary.of(manifests.parse(content, name))
    return Summary(
        incarnation=front.head["incarnation"],
        position=front.head["position"],
        global_step=front.head["global_step"],
        world_size=front.head["world_size"],
        metrics=manifests.metrics_of(front.head["state"]),
        generations=front.generations,
        attachments={path: digest for path, _, digest in front.attachments},
    )


def listed_files(content: bytes, name: str) -> tuple[list[tuple[str, int]], list[Attachment]]:
    """Path and size of every tensor file, and every attachment; CheckpointInvalid as from `summarise`."""
    try:
        front = _front(content, name)
    except (ValueError, TypeError, AttributeError):
        manifest = manifests.parse(content, name)
        return [(file.path, file.size) for file in manifest.files], list(manifest.attachments)
    return [(path, size) for path, size, _ in front.files], [Attachment(*item) for item in front.attachments]


class _Front(NamedTuple):
    """The part before the tensors."""

    head: Mapping[str, Any]
    generations: frozenset[Generation]
    files: list[_Entry]
    attachments: list[_Entry]


def _front(content: bytes, name: str) -> _Front:
    manifests.check_own_digest(content)
    value = strictjson.parse(content.partition(_TENSORS)[0] + b"}")
    head = manifests.parse_head(value, name, keys=_KEYS)
    files, attachments = value["files"], value["attachments"]
    for path, _, _ in attachments:
        check_path(path)
    # A role has a file for every rank, so the first rank's files show all roles.
    first = [TensorFileName.parse(path) for path, _, _ in files if _FIRST_RANK in path]
    generations = frozenset((item.role, item.position, item.attempt) for item in first if item is not None)
    manifests.check_version(value, (role for role, _, _ in generations))
    if len(files) != head["world_size"] * len(generations):
        raise ValueError("its files are not those of every rank")
    return _Front(head, generations, files, attachments)
