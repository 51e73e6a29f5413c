"""Saving a checkpoint, by all ranks together.

    rank 0: plan ──exchange──> every rank: write its part, durably ──exchange──>
    rank 0: publish the manifest, remove what is too old ──exchange──> every rank: meta.json, clean up

Promises: a checkpoint exists when its manifest does, and the manifest is published last, after every
file it lists is durable. A failure on any rank reaches all of them through the next exchange: all
raise, none hangs, what the attempt wrote is removed, and the previous checkpoint remains valid.
Problems after the manifest is published (meta.json, removing old files) no longer fail the
save: they become warnings.

Left out: threads, and deciding when to save. `exchange` is an all-gather of small JSON values.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rollforward.agreement import Failure, kind_of, together
from rollforward.errors import EngineError, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage
from rollforward.store import cleaning
from rollforward.store import manifest as manifests
from rollforward.store.attachments import write_attachments
from rollforward.store.layout import TensorFileName, check_roles, in_order, manifest_path, meta_path
from rollforward.store.live import Guard, Live, as_live, revisions_of, sources_of
from rollforward.store.manifest import Attachment, FileRecord, Manifest, StoredTensor, tensors_of
from rollforward.store.meta import write_meta
from rollforward.store.parts import (
    Previous,
    Sources,
    assign,
    copy_part,
    part_from_json,
    part_to_json,
    write_part,
)
from rollforward.store.retention import Retention
from rollforward.store.saved import About, Committed, Description, Saved
from rollforward.store.tensorfile import WrittenFile, dtype_code
from rollforward.tensors import Layout, Tensors

Exchange = Callable[[Any], list[Any]]

_BREAK = "\n"


class CheckpointStore:
    """The checkpoints in one run's folder, as seen by one of its ranks.

    `previous` is the checkpoint *in this folder* that was just restored, with every byte
    verified: roles that have not changed since are not written again. Without it the first save
    writes everything. Rank 0 calls `fence` before it publishes; it raises when this process no
    longer owns the folder.
    """

    def __init__(
        self,
        root: Storage | str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange = lambda value: [value],
        retention: Retention = Retention(),  # noqa: B008 - frozen
        previous: Manifest | None = None,
        fence: Callable[[], None] = lambda: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.storage: Storage = LocalStorage(root) if isinstance(root, str | Path) else root
        self.previous = previous
        self.rank = rank
        self.world_size = world_size
        self.retention = retention
        self.fence = fence
        self._exchange = exchange
        self._now = now
        self.inventory: cleaning.Inventory | None = None
        """Set on rank 0, from its first save on."""
        self.attached: set[str] = set()
        """Paths of the attachments that this process wrote."""
        self.revisions: Mapping[str, int] = {}
        """role -> revision of the live tensors at the time when they equalled `previous`."""

    def save(
        self,
        position: Position,
        live: Live | Tensors,
        *,
        global_step: int,
        run_id: str,
        incarnation: int,
        state: Mapping[str, Any],
        fingerprint: str = "",
        versions: Mapping[str, str] | None = None,
        attachments: Mapping[str, bytes] | None = None,
    ) -> Saved:
        """Save and commit a checkpoint; returns when it is durable. Collective.

        `live` is the same on every rank: arrays, or their owner; each tensor is read by one rank only.
        `state` and `versions` must be JSON-serializable; `attachments` is file name -> content,
        kept in the run's `model/` folder. Raises StorageError naming the ranks that failed.
        """
        about = About(
            run_id=run_id,
            incarnation=incarnation,
            state=state,
            fingerprint=fingerprint,
            versions=versions or {},
            attachments=attachments or {},
        )
        return self.save_described(about.at(position, global_step), live)

    def save_described(self, description: Description, live: Live | Tensors) -> Saved:
        """`save` with a ready-made description. Collective."""
        live = as_live(live)
        attempt = self.plan(description, live.layout(), revisions_of(live))
        attempt.sources = sources_of(live, attempt.share(), Guard())
        error = None
        try:
            attempt.write()
        except Exception as caught:
            error = caught
        committed = attempt.commit(error)
        seconds = time.perf_counter() - attempt.started
        warnings = (*committed.warnings, *self.tidy(committed))
        blocked = time.perf_counter() - attempt.started
        return Saved(
            committed.manifest, attempt.bytes_written, seconds, blocked, warnings, committed.suspicion
        )

    def restored(self, live: Live) -> None:
        """`previous` was just loaded into `live`, so roles that keep their revisions need not be read."""
        self.revisions = revisions_of(live) if self.previous is not None else {}

    def plan(
        self, description: Description, layout: Layout, revisions: Mapping[str, int] | None = None
    ) -> "Attempt":
        """Agree on who writes what, and where: the first part of `save`. Collective; no reads or writes.

        ValueError for tensors that cannot be stored. A role with the same revision as in `previous` is
        left out.
        """
        started = time.perf_counter()
        revisions = revisions or {}
        check_roles(layout)
        shares = assign(_sizes(layout), self.world_size)

        def agree() -> Any:
            if self.rank != 0:
                return None
            self.fence()
            if self.inventory is None:
                self.inventory = cleaning.Inventory(self.storage)
            number = self.inventory.free_attempt(layout, description.position)
            created = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            return {"number": number, "created": created}

        planned = self.together(description.position, "planning", agree)[0]
        return Attempt(
            self,
            description=description,
            number=planned["number"],
            created=planned["created"],
            roles=in_order(layout),
            shares=shares,
            revisions=revisions,
            unchanged=frozenset(self._unchanged(layout, shares, revisions)),
            started=started,
        )

    def _unchanged(
        self, layout: Layout, shares: Mapping[str, list[list[str]]], revisions: Mapping[str, int]
    ) -> Iterator[str]:
        """Roles with the same revision as in `previous`, which holds this rank's share of them."""
        previous = Previous.of(self.previous, self.rank, self.world_size)
        for role, named in layout.items():
            mine = {name: named[name] for name in shares[role][self.rank]}
            known = self.revisions.get(role)
            if known is not None and revisions.get(role) == known and previous.has(role, mine):
                yield role

    def tidy(self, committed: Committed) -> list[str]:
        """Update this rank's meta.json and remove its old files; returns warnings, never fails the save.

        Not collective, so it may run on another thread, but not while the next part is being written.
        """
        warnings = self._derive_meta(committed.manifest)
        warnings += cleaning.remove_files(self.storage, committed.kept, self.rank)
        if self.rank == 0:
            warnings += cleaning.remove_files_of_stray_ranks(self.storage, committed.kept, self.world_size)
            warnings += cleaning.remove_journals_of_stray_ranks(
                self.storage, committed.kept, self.world_size, committed.manifest.incarnation
            )
            warnings += cleaning.remove_temporaries(self.storage)
        return warnings

    def derive_meta(self) -> list[str]:
        """Make this rank's meta.json match the restored checkpoint; returns warnings.

        An earlier process may have been killed after publishing a manifest but before updating meta.json.
        Not collective; without `previous` there is nothing to do.
        """
        return [] if self.previous is None else self._derive_meta(self.previous)

    def all_ready(self, ready: bool) -> bool:
        """Whether every rank is ready. Collective."""
        return all(self._exchange(ready))

    def _derive_meta(self, manifest: Manifest) -> list[str]:
        warnings: list[str] = []
        for file in manifest.files:
            name = TensorFileName.parse(file.path)
            if name is not None and name.rank == self.rank:
                try:
                    write_meta(self.storage, meta_path(name.role, name.rank), name)
                except StorageError as error:
                    warnings.append(f"meta.json of {name.role} could not be written: {error.message}")
        return warnings

    def together(self, position: Position, doing: str, work: Callable[[], Any]) -> list[Any]:
        """Do this rank's work, then learn the other ranks' results; all raise if any failed."""

        def policy(failures: Sequence[Failure], own: Exception | None, _: int) -> Exception:
            if own is not None and not isinstance(own, StorageError):
                return own
            told = "; ".join(
                f"rank {failure.rank}: {failure.message.partition(_BREAK)[0]}" for failure in failures[:8]
            )
            # A storage error while saving is survivable. Anything else stops the run, so it must not look
            # like a storage error on any rank.
            return kind_of(failures)(
                f"checkpoint {position} was not saved, {doing} it failed on {told}", hint=failures[0].hint
            )

        return together(work, self._exchange, policy=policy)[1]


@dataclass
class Attempt:
    """A save in progress on one rank, created by `CheckpointStore.plan`; its methods are the phases.

    `write` and `publish` are not collective, so they may run on another thread; the others are.
    """

    _store: "CheckpointStore"
    _: KW_ONLY
    description: Description
    number: int
    """Added to the file prefix when this position already had a checkpoint."""
    created: str
    roles: list[str]
    shares: Mapping[str, list[list[str]]]
    """role -> rank -> names, from `parts.assign`."""
    revisions: Mapping[str, int]
    """role -> revision of what is saved, if known."""
    unchanged: frozenset[str]
    """Roles that have not changed since the previous checkpoint, going by their revisions."""
    started: float
    sources: Sources = field(default_factory=dict)
    """What this rank writes, from `share`; set before writing starts."""
    written: dict[str, WrittenFile | None] = field(default_factory=dict)
    """role -> what this rank wrote; None where nothing changed."""

    def target(self, role: str, rank: int) -> TensorFileName:
        """The file for a role and rank."""
        return TensorFileName(role, rank, self.description.position, self.number)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor files that this rank wrote; unchanged roles are not written."""
        return sum(file.size for file in self.written.values() if file is not None)

    def share(self) -> Iterator[tuple[str, str]]:
        """(role, name) of the tensors that this rank reads and, unless unchanged, writes."""
        for role in self.roles:
            if role not in self.unchanged:
                yield from ((role, name) for name in self.shares[role][self._store.rank])

    def left_out(self) -> Iterator[tuple[str, str]]:
        """(role, name) of the tensors that this rank would write if their role's revision had changed."""
        for role in sorted(self.unchanged):
            yield from ((role, name) for name in self.shares[role][self._store.rank])

    def check_unchanged(self, digests: Mapping[tuple[str, str], str]) -> None:
        """EngineError when the digests of what is left out differ from those in `previous`."""
        previous = Previous.of(self._store.previous, self._store.rank, self._store.world_size)
        for role, name in self.left_out():
            if digests[role, name] != previous.tensors[role][name].digest:
                raise EngineError(
                    f"checkpoint {self.description.position}: {role} {name} has changed since the "
                    f"checkpoint before, but the revision of {role} is the same",
                    hint="Engine.revision must change whenever the role's tensors may have changed",
                )

    def write(self) -> None:
        """Write this rank's part, durably. Not collective, so it may run on another thread."""
        previous = Previous.of(self._store.previous, self._store.rank, self._store.world_size)
        for role in self.roles:
            if role in self.unchanged:
                self.written[role] = None
                continue
            names = self.shares[role][self._store.rank]
            mine = {name: self.sources[role][name] for name in names}
            self.written[role] = write_part(
                self._store.storage, self.target(role, self._store.rank), mine, previous
            )

    def commit(self, error: Exception | None = None) -> Committed:
        """`gather`, `publish` and `conclude` in one. Collective.

        `error` is what `write` raised on this rank, if anything: then every rank raises.
        """
        manifest = self.gather(error)
        verdict, failure = None, None
        try:
            verdict = self.publish(manifest)
        except Exception as caught:
            failure = caught
        return self.conclude(manifest, verdict, failure)

    def gather(self, error: Exception | None = None) -> Manifest:
        """The manifest of what all ranks have written; nothing is visible yet. Collective."""
        try:
            parts = self._store.together(self.description.position, "writing", lambda: self._report(error))
            parts = self._settle_roles(parts)
        except Exception:
            self._withdraw()
            raise
        return self._build(parts)

    def conclude(self, manifest: Manifest, verdict: Any, failure: Exception | None) -> Committed:
        """Share the result of rank 0's `publish` with every rank, and act on it. Collective."""
        position = self.description.position

        def tell() -> Any:
            if failure is not None:
                raise failure
            return verdict

        try:
            verdict = self._store.together(position, "publishing", tell)[0]
        except Exception:
            # The manifest may be visible without being known to be durable: then its files must stay.
            self._store.inventory = None
            if not self._may_be_visible(position):
                self._withdraw()
            raise
        attachments = tuple(Attachment(path, size, found) for path, size, found in verdict["attachments"])
        manifest = replace(manifest, attachments=attachments, digest=verdict["digest"])
        kept = cleaning.Kept(
            frozenset((role, Position.parse(text), number) for role, text, number in verdict["generations"]),
            frozenset(Position.parse(text) for text in verdict["unreadable"]),
            frozenset(Position.parse(text) for text in verdict["unknown"]),
            verdict["world_size"],
            frozenset(verdict["roles"]),
        )
        warnings = tuple(verdict["warnings"] if self._store.rank == 0 else ())
        suspicion = _suspicion(self._store.previous, manifest)
        self._store.previous, self._store.revisions = manifest, self.revisions
        return Committed(manifest, kept, warnings, suspicion)

    def _report(self, error: Exception | None) -> Any:
        if error is not None:
            raise error
        return {role: part_to_json(self.written[role]) for role in self.roles}

    def _settle_roles(self, parts: list[Any]) -> list[Any]:
        """Reuse a role on all ranks or on none: a rank that skipped one that others wrote writes it now."""
        mixed = [role for role in self.roles if len({part[role] is None for part in parts}) > 1]
        if not mixed:
            return parts

        def fill() -> Any:
            previous = Previous.of(self._store.previous, self._store.rank, self._store.world_size)
            for role in mixed:
                if self.written[role] is None:
                    self.written[role] = copy_part(
                        self._store.storage, self.target(role, self._store.rank), previous
                    )
            return self._report(None)

        return self._store.together(self.description.position, "writing", fill)

    def _build(self, parts: list[Any]) -> Manifest:
        """The manifest of what all ranks wrote; the same on every rank."""
        files: list[FileRecord] = []
        tensors: list[StoredTensor] = []
        for role in self.roles:
            for part in parts:
                written = part_from_json(part[role])
                if written is not None:
                    files.append(FileRecord(written.path, written.size, written.digest))
                    tensors += tensors_of(role, written)
            if parts[0][role] is None and self._store.previous is not None:
                paths = {file.path for file in self._store.previous.files if _role_of(file) == role}
                files += [file for file in self._store.previous.files if file.path in paths]
                tensors += [tensor for tensor in self._store.previous.tensors if tensor.file in paths]
        about = self.description
        return Manifest(
            incarnation=about.incarnation,
            position=about.position,
            run_id=about.run_id,
            global_step=about.global_step,
            created=self.created,
            world_size=self._store.world_size,
            fingerprint=about.fingerprint,
            versions=dict(about.versions),
            state=dict(about.state),
            files=tuple(files),
            tensors=tuple(tensors),
        )

    def publish(self, manifest: Manifest) -> Any:
        """Rank 0 publishes the checkpoint, then removes those that are too old; other ranks do nothing.

        Not collective, so it may run on another thread; pass what it returns or raises to `conclude`.
        """
        store, inventory = self._store, self._store.inventory
        if store.rank != 0 or inventory is None:
            return None
        named = inventory.attachments()
        given = self.description.attachments
        attachments = write_attachments(store.storage, given, named, store.attached)
        manifest = replace(manifest, attachments=attachments)
        content = manifests.dump(manifest)
        store.fence()
        store.storage.write(manifest_path(manifest.position), [content])
        inventory.add(manifest)
        warnings = cleaning.remove_manifests(store.storage, inventory, store.retention)
        kept = inventory.kept()
        return {
            "digest": manifests.own_digest(content),
            "attachments": [[item.path, item.size, item.digest] for item in attachments],
            "generations": [
                [role, str(position), number] for role, position, number in sorted(kept.generations)
            ],
            "unreadable": [str(position) for position in sorted(kept.unreadable)],
            "unknown": [str(position) for position in sorted(kept.unknown)],
            "world_size": kept.world_size,
            "roles": sorted(kept.roles),
            "warnings": warnings,
        }

    def _may_be_visible(self, position: Position) -> bool:
        try:
            return self._store.storage.stat(manifest_path(position)) is not None
        except StorageError:
            return True

    def _withdraw(self) -> None:
        """Free the disk space of a failed attempt."""
        for role in self.roles:
            try:
                self._store.storage.remove(self.target(role, self._store.rank).path)
            except StorageError:
                continue  # the next save's cleanup tries again


def _sizes(layout: Layout) -> dict[str, dict[str, int]]:
    """role -> name -> size in a file; ValueError for tensors that cannot be stored."""
    for role, named in layout.items():
        for name, spec in named.items():
            dtype_code(spec.dtype)
            if not spec.is_whole:
                raise ValueError(
                    f"{role} {name} is the part {list(spec.shape)} of {list(spec.global_shape)}; "
                    "only whole tensors can be stored"
                )
    return {role: {name: spec.nbytes for name, spec in named.items()} for role, named in layout.items()}


def _suspicion(before: Manifest | None, now: Manifest) -> str | None:
    """Reports steps that changed no trained byte; compares digests, nothing is read.

    Only the policy matters: the optimizer counts its steps, so its bytes always change.
    """
    if before is None or before.run_id != now.run_id or now.global_step <= before.global_step:
        return None
    policy = now.role_digests().get("policy_model")
    if policy is None or before.role_digests().get("policy_model") != policy:
        return None
    steps = now.global_step - before.global_step
    return (
        f"suspicious: the policy of checkpoint {now.position} is byte for byte that of {before.position}, "
        f"{steps} step{'s' * (steps > 1)} earlier; that is as it should be only with a learning rate of 0, "
        "or where no rewards differed within a group"
    )


def _role_of(file: FileRecord) -> str | None:
    name = TensorFileName.parse(file.path)
    return name.role if name else None
