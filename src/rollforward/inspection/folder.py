"""What a run's folder holds, for the verbs that look at it from outside."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rollforward.errors import CheckpointInvalid, ConfigError, NothingToResume, RunLocked
from rollforward.interop.role_folders import name_checkpoint_folders, what_is_near
from rollforward.interop.traces import refuse_lost_commits
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage
from rollforward.storage.address import is_remote, local_path, open_storage
from rollforward.storage.failures import storage_error
from rollforward.store import CheckpointInfo, Found, find, list_checkpoints, load_manifest
from rollforward.store.catalog import positions
from rollforward.store.journal.history import extent
from rollforward.store.layout import COMMITS
from rollforward.store.lock import is_taken, read_owner
from rollforward.store.restoring import content_digests


def open_run(address: str | Path) -> Storage:
    """The storage of a run's folder, or of a run in object storage; NothingToResume when no run is there."""
    if is_remote(address):
        storage = open_storage(address)
        if storage.stat(COMMITS) is None:
            raise NothingToResume(
                f"{address} holds no run: there is no {COMMITS}/ in it",
                hint="name the place that rollforward copy was given",
            )
        return storage
    folder = local_path(address)
    try:
        if folder.is_dir():
            refuse_lost_commits(name_checkpoint_folders("", "", folder))
        if (folder / COMMITS).is_dir():
            return LocalStorage(folder)
        if folder.is_dir():
            why = f"{folder} holds no run: there is no {COMMITS}/ in it"
        else:
            why = f"{folder} is a file, not a folder" if folder.exists() else f"{folder}: no such folder"
        raise NothingToResume(f"{why}; {what_is_near(folder)}", hint=_where_a_run_may_be(folder))
    except OSError as error:
        raise storage_error("looking at", str(folder), error) from error


def _where_a_run_may_be(folder: Path) -> str:
    before, colon, behind = str(folder).rpartition(":")
    if colon and (Path(before) / COMMITS).is_dir():
        try:
            Position.parse(behind)
        except ValueError as error:
            return str(error)
        return f"name the run's folder alone: {before}"
    near = next((above for above in folder.absolute().parents[:2] if (above / COMMITS).is_dir()), None)
    return f"the run's folder is {near}" if near else "name the folder that --save_checkpoint_dir named"


def new_place(address: str | Path) -> Storage:
    """Where a copy of a run goes: a folder, or a place in object storage. It may hold an earlier copy."""
    if is_remote(address):
        storage = open_storage(address)
        owner = read_owner(storage)
        if owner is not None and owner.held:
            raise RunLocked(
                f"{address} is held by {owner}, or was not released by it", hint="copy to another place"
            )
        return storage
    folder = local_path(address)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder", hint="name a new folder")
    if is_taken(folder):
        raise RunLocked(f"{folder}: a trainer is running there", hint="copy to another place")
    storage = LocalStorage(folder)
    storage.make_root()
    return storage


def new_folder(folder: Path) -> LocalStorage:
    """The storage of a new or empty folder; ConfigError when something is there already."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: something is there already", hint="name a new folder")
    except OSError as error:
        raise storage_error("looking at", str(folder), error) from error
    return LocalStorage(folder)


@contextmanager
def telling_where(storage: Storage) -> Iterator[None]:
    """A CheckpointInvalid raised inside also names the run's folder, and says what to try."""
    try:
        yield
    except CheckpointInvalid as error:
        raise CheckpointInvalid(
            f"{storage}: {error.message}",
            hint="rollforward verify --deep shows which checkpoints are intact: name one, as in RUN:0_20",
        ) from error


def checkpoints_of(folder: str | Path, *, deep: bool) -> list[CheckpointInfo]:
    """The checkpoints of a run, oldest first; `deep` reads and digests every byte.

    Raises NothingToResume when the folder is not a run's.
    """
    return list_checkpoints(open_run(folder), deep=deep)[::-1]


def checkpoint_at(storage: Storage, position: Position | None) -> Found:
    """The checkpoint at a position; or the newest valid one, and the newer ones that are not valid.

    Raises NothingToResume, listing those that exist, when there is none at the position, and
    CheckpointInvalid when its manifest is not intact.
    """
    if position is None:
        return find(storage)
    there = positions(storage)
    if position not in there:
        raise NothingToResume(
            f"{storage} has no checkpoint {position}; it has {', '.join(map(str, sorted(there))) or 'none'}",
            hint="rollforward rebuild makes a checkpoint of any step that the journal reaches",
        )
    with telling_where(storage):
        return Found(load_manifest(storage, position), ())


def as_json(storage: Storage, info: CheckpointInfo, *, deep: bool) -> dict[str, Any]:
    """A checkpoint as JSON, with the digest of each role if the manifest can be read.

    The same tensors have the same digest, however they are cut into pieces over ranks. That of a role that is
    cut within blocks takes reading it: without `deep` it is null.
    """
    about: dict[str, Any] = {
        "position": str(info.position),
        "created": info.created,
        "size": info.size,
        "valid": info.valid,
        "reason": info.reason,
    }
    manifest = info.manifest
    if manifest is not None:
        about |= {
            "global_step": manifest.global_step,
            "run_id": manifest.run_id,
            "incarnation": manifest.incarnation,
            "world_size": manifest.world_size,
            "fingerprint": manifest.fingerprint,
            "versions": dict(manifest.versions),
            "metrics": manifest.metrics,
            "digests": {
                role: None if manifest.roles[role].cut else found
                for role, found in manifest.role_digests().items()
            },
        }
        if deep and info.valid:
            with suppress(CheckpointInvalid):  # The run may have removed it by now.
                about["digests"] = content_digests(storage, manifest)
    return about


def journal_as_json(storage: Storage) -> dict[str, Any]:
    """How much journal there is, and how far back it reaches, as JSON."""
    found = extent(storage)
    back = found.reaches_back_to
    return {
        "segments": found.segments,
        "size": found.size,
        "reaches_back_to": None if back is None else str(back),
    }
