"""Tensor files that were in a folder before it became a run of ours, and are named like ours.

MindRLHF names its files as we do. When a run continues in such a folder, its first checkpoint
makes the folder ours, and from then on a tensor file that no manifest lists counts as a
leftover. `guests.json` lists what was there before: we never replace or remove any of it.

    {"format":"rollforward guests","version":1,
    "guests":[["policy_model","0_20"],["optimizer","0_20"]],     role and position, all ranks
    "digest":"..."}                                              of every byte before, as in a manifest

It is written once, before the first checkpoint. Earlier releases wrote the inner list alone, without a
digest; that form will always be readable.
"""

from typing import Any

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import Storage, read_small
from rollforward.store import strictjson
from rollforward.store.catalog import roles_on_disk, tensor_files
from rollforward.store.layout import GUESTS, Generation, check_roles, meta_path, role_folder
from rollforward.store.sealing import check_own_digest, seal

_FORMAT = "rollforward guests"
_MAX_BYTES = 1 << 24


def adopt(storage: Storage) -> int:
    """Durably list the tensor files that are there now; returns the number of kinds (role and position).

    For folders in which we never committed anything. A rank's folder without `meta.json` has no
    guests: ours looks like that before the first commit. If there is already a list, nothing is
    written: files added since are ours. StorageError.
    """
    if storage.stat(GUESTS) is not None:
        return len(read_guests(storage))
    found = {
        (name.role, name.position)
        for role in roles_on_disk(storage)
        for name in tensor_files(storage, role_folder(role))
        if storage.stat(meta_path(role, name.rank)) is not None
    }
    if found:
        listed = [[role, str(position)] for role, position in sorted(found)]
        head = strictjson.dump({"format": _FORMAT, "version": 1})[:-1]
        storage.write(GUESTS, [seal(f'{head},\n"guests":{strictjson.dump(listed)}'.encode())])
    return len(found)


def read_guests(storage: Storage) -> frozenset[Generation]:
    """What must stay in addition to what manifests list. StorageError when the list cannot be read."""
    if storage.stat(GUESTS) is None:
        return frozenset()
    try:
        listed = _parse(read_small(storage, GUESTS, limit=_MAX_BYTES))
        found = [(role, Position.parse(text)) for role, text in listed]
        check_roles(role for role, _ in found)
        return frozenset((role, position, 0) for role, position in found)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise StorageError(
            f"{GUESTS} cannot be understood ({error}), and it lists files that must not be removed",
            hint=f"put back a copy of {GUESTS}; remove it only if no file of another trainer in this folder "
            "is needed any more",
        ) from error


def _parse(content: bytes) -> Any:
    """The list as it was written; ValueError when it is not one."""
    if content.startswith(b"["):
        return strictjson.parse(content)
    check_own_digest(content)
    value = strictjson.parse(content)
    if (value.get("format"), value.get("version")) != (_FORMAT, 1):
        raise ValueError(f"its format is not {_FORMAT!r}, version 1")
    return value["guests"]
