"""The summary of a manifest: what retention and cleaning need to know about a checkpoint.

A folder may hold a thousand checkpoints, and what makes a manifest large is its ranks; of versions 1 and 2,
its tensors. They are skipped here: the manifest's own digest is checked over every byte, then only the part
before them is parsed, and only what is needed is kept. Whether the files are there, and whether the
rest of the manifest follows the rules, is another question (`catalog`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rollforward.position import Position
from rollforward.store import earlier, strictjson, versions
from rollforward.store import manifest as manifests
from rollforward.store.layout import Generation, TensorFileName
from rollforward.store.manifest import Attachment, Head, ListedFile
from rollforward.store.sealing import check_own_digest

_TENSORS = b',\n"tensors":['
"""The text just before the tensors; never inside a string, where JSON has no line breaks."""
_KEYS = earlier.KEYS - {"tensors", "digest"}
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
    """The tensor files and tables it needs, of all ranks."""
    attachments: Mapping[str, str]
    """Path -> digest."""

    @classmethod
    def of(cls, manifest: Head) -> "Summary":
        """The summary of a manifest, or of its head."""
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
        if _TENSORS not in content:
            return Summary.of(manifests.parse_front(content, name))
        front = _front(content, name)
    except (ValueError, TypeError, AttributeError):
        # Damaged, or laid out differently from ours: parsing all of it tells which.
        return Summary.of(versions.parse(content, name))
    return Summary(
        incarnation=front.head["incarnation"],
        position=front.head["position"],
        global_step=front.head["global_step"],
        world_size=front.head["world_size"],
        metrics=manifests.metrics_of(front.head["state"]),
        generations=front.generations,
        attachments={item.path: item.digest for item in front.head["attachments"]},
    )


def listed_files(content: bytes, name: str) -> tuple[list[ListedFile], list[Attachment]]:
    """Every tensor file and table, and every attachment; CheckpointInvalid as from `summarise`."""
    try:
        front = _front(content, name)
    except (ValueError, TypeError, AttributeError):
        manifest = versions.parse(content, name)
        return [*manifest.files, *manifest.table_files], list(manifest.attachments)
    return [ListedFile(path, size) for path, size, _ in front.files], list(front.head["attachments"])


class _Front(NamedTuple):
    """The part before the tensors."""

    head: Mapping[str, Any]
    generations: frozenset[Generation]
    files: list[_Entry]


def _front(content: bytes, name: str) -> _Front:
    before, tensors, _ = content.partition(_TENSORS)
    if not tensors:
        raise ValueError("no list of tensors")
    check_own_digest(content)
    value = strictjson.parse(before + b"}")
    head = manifests.parse_head(value, name, keys=_KEYS)
    files = value["files"]
    # A role has a file for every rank, so the first rank's files show all roles.
    first = [TensorFileName.parse(path) for path, _, _ in files if _FIRST_RANK in path]
    generations = frozenset(item.generation for item in first if item is not None)
    earlier.check_version(value, (role for role, _, _ in generations))
    if len(files) != head["world_size"] * len(generations):
        raise ValueError("its files are not those of every rank")
    return _Front(head, generations, files)
