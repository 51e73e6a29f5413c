"""Saving a checkpoint, by all ranks together.

    rank 0: plan ──tally──> every rank: write its part and its table, durably ──tally──>
    rank 0: publish the manifest, remove what is too old ──tally──> every rank: meta.json, clean up

Promises: a checkpoint exists when its manifest does, and the manifest is published last, after every
file it lists is durable. A failure on any rank reaches all of them through the next exchange: all
raise, none hangs, what the attempt wrote is removed, and the previous checkpoint remains valid.
Problems after the manifest is published (meta.json, removing old files) no longer fail the
save: they become warnings.

What ranks exchange is the same size for any number of ranks and of tensors, given a channel that can add up
(`channel`): what each has written is in its table, on the storage that all share, and from there rank 0
takes what the manifest needs (`gathering`). Only when something fails does every rank hear from every other.

Left out: threads, and deciding when to save.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rollforward.channel import AllGather, AllSum, Channel
from rollforward.errors import CheckpointInvalid, EngineError, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage
from rollforward.store import cleaning, layouts
from rollforward.store.attempt import Attempt, Folder, attempts_of
from rollforward.store.contents import read_table
from rollforward.store.covering import PRIME
from rollforward.store.layout import TABLES, in_order, meta_path
from rollforward.store.live import Guard, Live, as_live, revisions_of, sources_of
from rollforward.store.manifest import Head, Manifest
from rollforward.store.meta import write_meta
from rollforward.store.parts import Previous, assign, pieces_written
from rollforward.store.retention import Retention
from rollforward.store.saved import About, Committed, Description, Saved
from rollforward.tensors import Held, Layout


class CheckpointStore(Folder):
    """The checkpoints in one run's folder, as seen by one of its ranks.

    `previous` is the checkpoint *in this folder* that was just restored, with every byte
    verified: roles that have not changed since are not written again. Without it the first save
    writes everything. Rank 0 calls `fence` before it publishes; it raises when this process no
    longer owns the folder. `remote`: the storage is a service to which a replaced trainer may still be
    writing, late. Then each start has names of its own for its files, and nobody waits for a network.
    `exchange` and `all_sum` are how the ranks talk to each other (`channel`).
    """

    def __init__(
        self,
        root: Storage | str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        exchange: AllGather = lambda value: [value],
        all_sum: AllSum | None = None,
        retention: Retention = Retention(),  # noqa: B008 - frozen
        previous: Manifest | None = None,
        fence: Callable[[], None] = lambda: None,
        remote: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        storage: Storage = LocalStorage(root) if isinstance(root, str | Path) else root
        channel = Channel(exchange, all_sum)
        super().__init__(storage, rank, world_size, channel, retention, previous, fence, remote)
        self._now = now
        self._last_layout: tuple[Layout, tuple[int, int]] | None = None

    def save(
        self,
        position: Position,
        live: Live | Held,
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

        `live` is what this rank holds: arrays and pieces, or their owner. A tensor that is whole, and so the
        same on every rank, is read by one of them only.
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

    def save_described(self, description: Description, live: Live | Held) -> Saved:
        """`save` with a ready-made description. Collective."""
        live = as_live(live)
        attempt = self.plan(description, live.layout(), revisions_of(live))
        attempt.sources = sources_of(live, attempt.share(), Guard(), copied=self.remote)
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
    ) -> Attempt:
        """Agree on who writes what, and where: the first part of `save`. Collective; no reads or writes.

        ValueError for tensors that cannot be stored, EngineError when the ranks' layouts do not fit together.
        A role with the same revision as in `previous` is left out.
        """
        started = time.perf_counter()
        position = description.position

        def agree() -> tuple[Any, list[int]]:
            common, covered = self._described(layout)
            numbers = [common, covered]
            if self.rank != 0:
                return None, numbers
            number = self._free_number([*layout, TABLES], position, description.incarnation)
            created = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            return {"number": number, "created": created, "common": common}, numbers

        planned, (common, covered) = self.tallied(position, "planning", agree, 2)
        if common != planned["common"] * self.world_size or covered % PRIME:
            found = layouts.fault(self.channel.all_gather(layouts.as_json(layout)))
            raise EngineError(
                f"checkpoint {position} was not saved: {found}",
                hint="a tensor that is not in pieces must be whole and the same on every rank; pieces, those "
                "of all ranks together, must cover their tensor exactly once",
            )
        revisions = revisions or {}
        names, before = self._names(layout), self._before()
        return Attempt(
            self,
            description=description,
            number=planned["number"],
            created=planned["created"],
            specs={role: {name: layout[role][name] for name in names[role]} for role in in_order(layout)},
            previous=before,
            revisions=revisions,
            unchanged=frozenset(self._unchanged(layout, names, revisions, before)),
            started=started,
        )

    def _free_number(self, roles: list[str], position: Position, incarnation: int) -> int:
        """What this save adds to the names of its files, so that it replaces none that counts.

        Where a write that failed may still arrive, they are names that no start has ever used: by the time it
        arrives, a later one may have committed the same position.
        """
        if not self.remote:
            return self.look(incarnation).free_attempt(roles, position)
        own = attempts_of(incarnation)
        if self.tries[position] == len(own):
            raise StorageError(
                f"checkpoint {position} in {self.storage}: start {incarnation} has no file names left",
                hint="resume the run; if that does not help, copy it elsewhere first (rollforward copy)",
            )
        self.tries[position] += 1
        return own[self.tries[position] - 1]

    def _described(self, layout: Layout) -> tuple[int, int]:
        """What the ranks compare of their layouts; remembered, since a layout rarely changes."""
        if self._last_layout is None or self._last_layout[0] != layout:
            layouts.check(layout)
            numbers = layouts.common_digest(layout), layouts.cover(layout)
            copied = {role: dict(named) for role, named in layout.items()}
            self._last_layout = copied, numbers
        return self._last_layout[1]

    def _names(self, layout: Layout) -> dict[str, list[str]]:
        """role -> names of what this rank writes: its share of the whole tensors, and its pieces."""
        shared = {
            role: {name: spec.nbytes for name, spec in named.items() if not spec.piece_of}
            for role, named in layout.items()
        }
        shares = assign(shared, self.world_size)
        return {role: [*shares[role][self.rank], *pieces_written(named)] for role, named in layout.items()}

    def _before(self) -> Previous:
        """What this rank wrote of `previous`; nothing if that cannot be read: then all is written again."""
        previous = self.previous
        if self.table is None and isinstance(previous, Manifest) and previous.world_size == self.world_size:
            with suppress(CheckpointInvalid):
                self.table = read_table(self.storage, previous, self.rank)
        return Previous.of(self.table)

    def _unchanged(
        self,
        layout: Layout,
        names: Mapping[str, list[str]],
        revisions: Mapping[str, int],
        before: Previous,
    ) -> Iterator[str]:
        """Roles with the same revision as in `previous`, which holds this rank's share of them."""
        for role, named in layout.items():
            mine = {name: named[name] for name in names[role]}
            known = self.revisions.get(role)
            if known is not None and revisions.get(role) == known and before.has(role, mine):
                yield role

    def tidy(self, committed: Committed) -> list[str]:
        """Update this rank's meta.json and remove its old files; returns warnings, never fails the save.

        Not collective, so it may run on another thread, but not while the next part is being written.
        """
        warnings = self._derive_meta(committed.manifest)
        warnings += cleaning.remove_files(self.storage, committed.kept, self.rank)
        if self.rank == 0:
            warnings += cleaning.remove_files_of_stray_ranks(self.storage, committed.kept, self.world_size)
            warnings += cleaning.remove_meta_of_stray_ranks(self.storage, committed.kept, self.world_size)
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
        return self.channel.tally(None, [int(ready)])[1] == [self.world_size]

    def _derive_meta(self, head: Head) -> list[str]:
        warnings: list[str] = []
        for role in head.roles if self.rank < head.world_size else ():
            try:
                write_meta(self.storage, meta_path(role, self.rank), head.tensor_file(role, self.rank))
            except StorageError as error:
                warnings.append(f"meta.json of {role} could not be written: {error.message}")
        return warnings
