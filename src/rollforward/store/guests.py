"""Tensor files that lay in a folder before it became a run of ours, and that bear names of ours.

MindRLHF names its files as we do. When a run goes on in such a folder, its first checkpoint
makes the folder ours, and from then on a tensor file that no manifest names counts as left
over. `guests.json` lists what was there before: none of it is ever replaced or removed by us.

    guests.json      [["policy_model","0_20"],["optimizer","0_20"]]      role and position, all ranks

It is written once, before the first checkpoint.
"""

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.storage import Storage, read_small
from rollforward.store import strictjson
from rollforward.store.catalog import roles_on_disk, tensor_files
from rollforward.store.layout import GUESTS, check_roles, meta_path, role_folder
from rollforward.store.manifest import Generation

_MAX_BYTES = 1 << 24


def adopt(storage: Storage) -> int:
    """List the tensor files that are there now, durably; returns how many kinds (role and position).

    For folders in which nothing of ours was ever committed. A rank's folder without `meta.json` has no
    guests: ours looks like that before the first commit. Nothing is written when a list is there
    already: what came since is ours. StorageError.
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
        storage.write(GUESTS, [strictjson.dump(listed).encode() + b"\n"])
    return len(found)


def read_guests(storage: Storage) -> frozenset[Generation]:
    """What must stay besides what manifests name. StorageError when the list cannot be read."""
    if storage.stat(GUESTS) is None:
        return frozenset()
    try:
        listed = strictjson.parse(read_small(storage, GUESTS, limit=_MAX_BYTES))
        found = [(role, Position.parse(text)) for role, text in listed]
        check_roles(role for role, _ in found)
        return frozenset((role, position, 0) for role, position in found)
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{GUESTS} cannot be understood ({error}), and it lists files that must not be removed",
            hint=f"remove {GUESTS} if no file of another trainer in this folder is needed any more",
        ) from error
