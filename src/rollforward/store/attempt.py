"""A save in progress, on one rank: write, gather, publish, conclude.

What a rank writes is its files of each role, and then its table: it lists what is in them, or in those of an
older checkpoint where a role has not changed. `checkpoints` makes the attempts, and says what they promise.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any

from rollforward.agreement import Failure, kind_of, tallied
from rollforward.channel import Channel
from rollforward.errors import EngineError, StorageError
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store import cleaning
from rollforward.store import manifest as manifests
from rollforward.store import table as tables
from rollforward.store.attachments import write_attachments
from rollforward.store.contents import Totals, as_digest
from rollforward.store.gathering import gather_ranks
from rollforward.store.layout import MAX_ATTEMPT, TableName, TensorFileName, manifest_path
from rollforward.store.manifest import Attachment, Head, Manifest, RoleRecord
from rollforward.store.parts import Previous, Sources, copy_part, pieces_of, write_part
from rollforward.store.retention import Retention
from rollforward.store.saved import Committed, Description
from rollforward.store.sealing import own_digest
from rollforward.store.table import FileRecord, StoredPiece, Table
from rollforward.store.tensorfile import WrittenFile
from rollforward.tensors import Layout

_BREAK = "\n"
_TRIES = 16
"""Saves of one position by one start, where each must have names of its own."""
_NUMBERS = 4
"""How many numbers of a role `Attempt.numbers` has."""


def attempts_of(incarnation: int) -> range:
    """The attempt numbers of a start, where no two starts may use the same; none when they have run out."""
    return range(MAX_ATTEMPT + 1)[(incarnation - 1) * _TRIES : incarnation * _TRIES]


class Folder:
    """A run's folder as one of its ranks sees it: what a save needs, and leaves for the next."""

    def __init__(
        self,
        storage: Storage,
        rank: int,
        world_size: int,
        channel: Channel,
        retention: Retention,
        previous: Manifest | None,
        fence: Callable[[], None],
        remote: bool,
    ) -> None:
        self.storage = storage
        self.remote = remote
        self.rank = rank
        self.world_size = world_size
        self.channel = channel
        self.retention = retention
        self.fence = fence
        self.previous: Head | None = previous
        self.table: Table | None = None
        """This rank's table of `previous`, once it has been read or written."""
        self.inventory: cleaning.Inventory | None = None
        """Set on rank 0, from its first save on; see `look`."""
        self.tries = Counter[Position]()
        """How often rank 0 has planned a save of each position."""
        self.attached: set[str] = set()
        """Paths of the attachments that this process wrote."""
        self.revisions: Mapping[str, int] = {}
        """role -> revision of the live tensors at the time when they equalled `previous`."""

    def look(self, incarnation: int) -> cleaning.Inventory:
        """Rank 0: what is in the folder, unless that is known; this start is still its owner.

        Asks the storage, which in a service may take long: there `publish` does it, in a folder `plan`.
        """
        self.fence()
        if self.inventory is None:
            later = attempts_of(incarnation).stop if self.remote else MAX_ATTEMPT + 1
            self.inventory = cleaning.Inventory(self.storage, later=later)
        return self.inventory

    def tallied(
        self, position: Position, doing: str, work: Callable[[], tuple[Any, list[int]]], count: int = 0
    ) -> tuple[Any, list[int]]:
        """Do this rank's work; the first rank's value, and sums, as from `agreement.tallied`. Collective."""

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

        return tallied(work, count, self.channel, policy=policy)


@dataclass
class Attempt:
    """A save in progress on one rank, created by `CheckpointStore.plan`; its methods are the phases.

    `write` and `publish` are not collective, so they may run on another thread; the others are.
    """

    _store: Folder
    _: KW_ONLY
    description: Description
    number: int
    """Added to the names of files when this position already had a checkpoint."""
    created: str
    specs: Layout
    """What this rank writes, by role in the order of manifests."""
    previous: Previous
    revisions: Mapping[str, int]
    """role -> revision of what is saved, if known."""
    unchanged: frozenset[str]
    """Roles that have not changed since the previous checkpoint, going by their revisions."""
    started: float
    aside: Callable[[Callable[[], object]], object] = lambda work: work()
    """Does what nobody has to wait for: removing what a failed attempt has written."""
    sources: Sources = field(default_factory=dict)
    """What this rank writes, from `share`; set before writing starts."""
    written: dict[str, WrittenFile | None] = field(default_factory=dict)
    """role -> what this rank wrote; None where nothing changed."""
    table: Table | None = None
    """Set once it has been written."""
    numbers: list[int] = field(default_factory=list)
    """What this rank has written: the digest of its table; then for each role whether it was left out, and a
    `contents.Total`."""
    digests: int = 0
    """The sum of the digests of all ranks' tables, once gathered."""
    manifest: Manifest | None = None
    """On rank 0, once it has been written."""

    def target(self, role: str) -> TensorFileName:
        """This rank's file of a role."""
        return TensorFileName(role, self._store.rank, self.description.position, self.number)

    @property
    def table_path(self) -> str:
        """Of this rank's table."""
        return TableName(self._store.rank, self.description.position, self.number).path

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor files that this rank wrote; unchanged roles are not written."""
        return sum(file.size for file in self.written.values() if file is not None)

    def share(self) -> Iterator[tuple[str, str]]:
        """(role, name) of the tensors that this rank reads and, unless unchanged, writes."""
        return (
            (role, name) for role in self.specs if role not in self.unchanged for name in self.specs[role]
        )

    def left_out(self) -> Iterator[tuple[str, str]]:
        """(role, name) of the tensors that this rank would write if their role's revision had changed."""
        return ((role, name) for role in sorted(self.unchanged) for name in self.specs[role])

    def check_unchanged(self, digests: Mapping[tuple[str, str], str]) -> None:
        """EngineError when the digests of what is left out differ from those in `previous`."""
        for role, name in self.left_out():
            if digests[role, name] != self.previous.pieces[role][name].record.digest:
                raise EngineError(
                    f"checkpoint {self.description.position}: {role} {name} has changed since the "
                    f"checkpoint before, but the revision of {role} is the same",
                    hint="Engine.revision must change whenever the role's tensors may have changed",
                )

    def write(self) -> None:
        """Write this rank's part, durably. Not collective, so it may run on another thread."""
        for role, specs in self.specs.items():
            if role in self.unchanged:
                self.written[role] = None
                continue
            mine = {name: self.sources[role][name] for name in specs}
            self.written[role] = write_part(
                self._store.storage, self.target(role), mine, specs, self.previous
            )
        self._write_table()

    def _write_table(self) -> None:
        files: dict[str, FileRecord] = {}
        pieces: list[StoredPiece] = []
        totals = Totals()
        for role, written in self.written.items():
            if written is None:
                files[role] = self.previous.files[role]
                pieces += self.previous.pieces[role].values()
            else:
                files[role] = FileRecord(written.path, written.size, written.digest)
                pieces += pieces_of(role, written, self.specs[role])
        for piece in pieces:
            totals.add(piece)
        self.table = tables.make(self._store.rank, self.description.position, files, pieces)
        content = tables.dump(self.table)
        self._store.storage.write(self.table_path, [content])
        self.numbers = [int(own_digest(content), 16)]
        for role, written in self.written.items():
            self.numbers += [int(written is None), *totals.of(role)]

    def commit(self, error: Exception | None = None) -> Committed:
        """`gather`, `publish` and `conclude` in one. Collective.

        `error` is what `write` raised on this rank, if anything: then every rank raises.
        """
        head = self.gather(error)
        verdict, failure = None, None
        try:
            verdict = self.publish(head)
        except Exception as caught:
            failure = caught
        return self.conclude(head, verdict, failure)

    def gather(self, error: Exception | None = None) -> Head:
        """The manifest of what all ranks have written, but for their tables. Collective.

        Nothing is visible yet.
        """

        def report() -> list[int]:
            if error is not None:
                raise error
            return self.numbers

        try:
            sums = self._sums(report)
            mixed = [role for role, (skipped, *_) in sums.items() if 0 < skipped < self._store.world_size]
            if mixed:
                sums = self._sums(lambda: self._fill(mixed))
        except Exception:
            self.aside(self._withdraw)
            raise
        return self._head(sums)

    def _sums(self, work: Callable[[], list[int]]) -> dict[str, list[int]]:
        """Do this rank's work and add up `numbers`: what the ranks have written, by role. Collective."""
        roles = list(self.specs)
        _, (self.digests, *sums) = self._store.tallied(
            self.description.position, "writing", lambda: (None, work()), 1 + _NUMBERS * len(roles)
        )
        return {role: sums[_NUMBERS * at : _NUMBERS * (at + 1)] for at, role in enumerate(roles)}

    def _fill(self, mixed: list[str]) -> list[int]:
        """Reuse a role on all ranks or on none: a rank that skipped one that others wrote writes it now."""
        skipped = [role for role in mixed if self.written[role] is None]
        for role in skipped:
            self.written[role] = copy_part(self._store.storage, self.target(role), self.previous)
        if skipped:
            self._write_table()
        return self.numbers

    def _head(self, sums: Mapping[str, list[int]]) -> Head:
        """The same on every rank."""
        about, before = self.description, self._store.previous
        roles = {}
        for role, (skipped, tensors, cut, content) in sums.items():
            reused = before.roles[role] if skipped and before else None
            written = (reused.position, reused.attempt) if reused else (about.position, self.number)
            roles[role] = RoleRecord(*written, tensors, as_digest(content), cut)
        return Head(
            incarnation=about.incarnation,
            position=about.position,
            run_id=about.run_id,
            global_step=about.global_step,
            created=self.created,
            world_size=self._store.world_size,
            fingerprint=about.fingerprint,
            versions=dict(about.versions),
            state=dict(about.state),
            roles=roles,
            attempt=self.number,
        )

    def publish(self, head: Head) -> Any:
        """Rank 0 publishes the checkpoint, then removes those that are too old; other ranks do nothing.

        Not collective, so it may run on another thread; pass what it returns or raises to `conclude`.
        """
        store = self._store
        if store.rank != 0:
            return None
        inventory = store.inventory
        if inventory is None or store.remote:
            inventory = store.look(head.incarnation)
        ranks = gather_ranks(store.storage, head, self.digests)
        attachments = write_attachments(
            store.storage, self.description.attachments, inventory.attachments(), store.attached
        )
        known = {each.name: getattr(head, each.name) for each in fields(Head)}
        manifest = Manifest(**known | {"attachments": attachments}, ranks=ranks)
        content = manifests.dump(manifest)
        self.manifest = replace(manifest, digest=own_digest(content))
        store.fence()
        store.storage.write(manifest_path(manifest.position), [content])
        inventory.add(manifest)
        warnings = cleaning.remove_manifests(store.storage, inventory, store.retention)
        return {
            "digest": self.manifest.digest,
            "attachments": [[item.path, item.size, item.digest] for item in attachments],
            "kept": inventory.kept().as_json(),
            "warnings": warnings,
        }

    def conclude(
        self, head: Head, verdict: Any, failure: Exception | None, *, advice: Any = None
    ) -> Committed:
        """Share the result of rank 0's `publish` with every rank, and act on it. Collective.

        With it goes rank 0's `advice`, whatever JSON that is.
        """
        store, position = self._store, self.description.position

        def tell() -> tuple[Any, list[int]]:
            if failure is not None:
                raise failure
            return (verdict and {**verdict, "advice": advice}), []

        try:
            verdict, _ = store.tallied(position, "publishing", tell)
        except Exception:
            # The manifest may be visible without being known to be durable: then its files must stay.
            store.inventory = None
            self.aside(self._withdraw_unless_visible)
            raise
        attachments = tuple(Attachment(*item) for item in verdict["attachments"])
        told = replace(head, attachments=attachments, digest=verdict["digest"])
        head = told if self.manifest is None else self.manifest
        warnings = tuple(verdict["warnings"] if store.rank == 0 else ())
        suspicion = _suspicion(store.previous, head)
        store.previous, store.table, store.revisions = head, self.table, self.revisions
        return Committed(
            head, cleaning.Kept.from_json(verdict["kept"]), warnings, suspicion, verdict["advice"]
        )

    def _withdraw_unless_visible(self) -> None:
        with suppress(StorageError):
            if self._store.storage.stat(manifest_path(self.description.position)) is None:
                self._withdraw()

    def _withdraw(self) -> None:
        """Free the disk space of a failed attempt."""
        for path in [self.table_path, *(self.target(role).path for role in self.specs)]:
            try:
                self._store.storage.remove(path)
            except StorageError:  # the next save's cleanup tries again
                if self._store.remote:
                    return  # the service may be away, and each try takes minutes


def _suspicion(before: Head | None, now: Head) -> str | None:
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
