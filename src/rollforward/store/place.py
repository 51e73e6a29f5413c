"""Where a run is: the storage with everything that lasts, and a folder for what is only of this machine.

    a run in a folder        storage and folder are the same
    a run in object storage  s3://bucket/run, and a working folder on this machine:

        run.lock             one trainer at a time works in this folder
        place.json           its name, by which a lease is known to be from here
        spool/rank_0/...     what is not shipped yet
        unshipped/...        what was never shipped, since another start had gone on without it
        heartbeat/, ...      whatever others keep in a run's folder that nobody needs elsewhere

Losing the working folder of a run in object storage costs what was in the spool, and nothing else.

A start holds the place (`hold`, the first rank), then each rank begins to work in it (`begin`).
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rollforward.agreement import AllGather, together
from rollforward.errors import RunLocked, StorageError
from rollforward.storage import LocalStorage, Storage, read_small
from rollforward.storage.address import default_work_dir, is_remote, local_path, open_storage
from rollforward.storage.filelock import FileLock
from rollforward.storage.local import same_folder
from rollforward.store import strictjson
from rollforward.store.layout import LOCK
from rollforward.store.lease import SECONDS, Follower, Lease
from rollforward.store.lock import Owner, RunLock, read_owner, this_host
from rollforward.store.shipping import Fences, Shipping, bring_up

_NAME = "place.json"
_SPOOL = "spool"
_ASIDE = "unshipped"


class Hold(Protocol):
    """A run that this process trains in: a `RunLock`, or a lease."""

    taken_over: Owner | None
    left_behind: Mapping[str, float]
    """What that one had not shipped when it was last heard of, and this machine does not have."""

    @property
    def incarnation(self) -> int:
        """The number of this start."""
        ...

    def check(self) -> None:
        """RunLocked when it is no longer ours; before each commit."""
        ...

    def release(self) -> None:
        """Give it back."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Where a run is."""

    storage: Storage
    """What lasts. To be read; a start that writes gets its own from `begin`."""
    folder: Path
    """What is only of this machine: the run's own folder, or a working folder."""
    remote: bool
    """Whether these are two places."""

    @classmethod
    def at(
        cls, address: str | Path, *, work_dir: str | Path = "", options: Mapping[str, str] | None = None
    ) -> "RunPlace":
        """The place at a path or an address; a service is asked at once (`open_storage`, errors as from
        there).

        `work_dir`: the working folder of a run in object storage; `default_work_dir` when left out.
        """
        if not is_remote(address):
            folder = local_path(address)
            return cls(storage=LocalStorage(folder), folder=folder, remote=False)
        storage = open_storage(address, options)
        work = Path(work_dir).expanduser() if work_dir else default_work_dir(str(address))
        return cls(storage=storage, folder=work, remote=True)

    def is_at(self, storage: Storage) -> bool:
        """Whether that is the storage of this same run."""
        return same_place(self.storage, storage)

    def hold(self, *, after: int = 0, say: Callable[[str], None], seconds: float = SECONDS) -> Hold:
        """Lock the run for this process, the first rank's, creating it if it is missing; RunLocked says who
        has it.

        `after`: the newest incarnation of the run that is resumed, if that is a different one. `seconds`: how
        long a lease stands.
        """
        if not self.remote:
            return RunLock.acquire(self.folder, after=after)
        return LeasedHold(self, after=after, say=say, seconds=seconds)

    @contextlib.contextmanager
    def held(self, *, say: Callable[[str], None] = lambda _: None) -> Iterator[Hold]:
        """`hold`, for as long as the block runs."""
        hold = self.hold(say=say)
        try:
            yield hold
        finally:
            hold.release()

    def bring_up(self, *, rank: int, world_size: int, say: Callable[[str], None]) -> None:
        """Ship what earlier starts left in this machine's spool. On each rank, once the run is held.

        All ranks must be done before any of them reads a journal or begins.
        """
        if not self.remote:
            return
        spools = LocalStorage(self.folder / _SPOOL)
        for entry in spools.scan(""):
            number = entry.name.removeprefix("rank_")
            if entry.kind == "folder" and number.isdecimal() and int(number) % world_size == rank:
                bring_up(
                    LocalStorage(self.folder / _SPOOL / entry.name),
                    self.storage,
                    aside=LocalStorage(self.folder / _ASIDE / f"{entry.name}-{secrets.token_hex(4)}"),
                    say=say,
                )

    def begin(
        self,
        *,
        rank: int,
        incarnation: int,
        hold: Hold | None,
        durable_there: bool = False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Storage:
        """The storage that a rank of this start writes to; `close_storage` it at the end.

        `hold` is the first rank's; the others follow its lease. `durable_there`: a record of the journal is
        durable only when the run's storage has it. `warn` gets lines about shipping that falls behind.
        """
        if not self.remote:
            return self.storage
        follower = Fences(ship=Follower(self.storage, incarnation).holds)
        shipping = Shipping(
            self.storage,
            LocalStorage(self.folder / _SPOOL / f"rank_{rank}"),
            incarnation=incarnation,
            remote=durable_there,
            fences=hold.fences if isinstance(hold, LeasedHold) else follower,
            warn=warn,
        )
        if isinstance(hold, LeasedHold):
            hold.lease.behind = shipping.behind
        return shipping


def begin_together(
    place: RunPlace,
    hold: Hold | None,
    *,
    rank: int,
    world_size: int,
    incarnation: int,
    all_gather: AllGather,
    closing: contextlib.ExitStack,
    durable_there: bool,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Storage:
    """`bring_up` and then `begin` on every rank. Collective: what fails on one rank fails on all.

    `hold` is the first rank's; `closing` will `close_storage` what is returned.
    """

    def begin() -> Storage:
        storage = place.begin(
            rank=rank, incarnation=incarnation, hold=hold, durable_there=durable_there, warn=warn
        )
        closing.callback(close_storage, storage)
        return storage

    if not place.remote:
        return begin()
    together(
        lambda: place.bring_up(rank=rank, world_size=world_size, say=say),
        all_gather,
        tell=lambda _: None,
    )
    return together(begin, all_gather, tell=lambda _: None)[0]


def settle_storage(storage: Storage) -> None:
    """Wait until everything that was written is where the run is. StorageError when it cannot be."""
    if isinstance(storage, Shipping):
        storage.settle()


def close_storage(storage: Storage) -> None:
    """End what `RunPlace.begin` gave. StorageError when what was written is not where it should be."""
    if isinstance(storage, Shipping):
        storage.close()


class LeasedHold:
    """`Hold` of a run in object storage: its lease, and the lock of the working folder."""

    def __init__(self, place: RunPlace, *, after: int, say: Callable[[str], None], seconds: float) -> None:
        here = LocalStorage(place.folder)
        here.make_root()
        file = FileLock.acquire(place.folder / LOCK)
        if file is None:
            raise RunLocked(
                f"{place.storage}: {read_owner(here) or 'another trainer'} works on this machine, in "
                f"{place.folder}",
                hint="wait for it to end, end it, or name another working folder for another run",
            )
        try:
            name = _name_of(here, str(place.storage))
            self.lease = Lease.acquire(place.storage, place=name, after=after, seconds=seconds, say=say)
            try:
                file.write(json.dumps(vars(self.lease.owner)).encode())
            except BaseException:
                self.lease.release()
                raise
        except BaseException:
            file.release()
            raise
        self.taken_over = self.lease.taken_over
        self.left_behind = self.lease.left_behind
        self.fences = Fences(ship=self.lease.holds, commit=self.lease.check)
        self._file = file

    @property
    def incarnation(self) -> int:
        """The number of this start."""
        return self.lease.incarnation

    def check(self) -> None:
        """See `Lease.check`."""
        self.lease.check()

    def release(self) -> None:
        """Give back the lease, then the folder. A forked child has neither."""
        if self._file.held:
            try:
                self.lease.release()
            finally:
                self._file.release()


def same_place(one: Storage, other: Storage) -> bool:
    """Whether two storages are the same folder, or the same place in a service."""
    if isinstance(one, LocalStorage) and isinstance(other, LocalStorage):
        return same_folder(Path(one.root), Path(other.root))
    return str(one) == str(other)


def _name_of(here: LocalStorage, address: str) -> str:
    """The name of a working folder, which it keeps; StorageError when it belongs to another run."""
    if here.stat(_NAME) is None:
        here.write(_NAME, [json.dumps({"place": secrets.token_hex(16), "run": address}).encode()])
    try:
        value = strictjson.parse(read_small(here, _NAME, limit=1 << 16))
        name, run = str(value["place"]), str(value["run"])
    except (ValueError, TypeError, KeyError):
        name, run = "", ""
    if run != address:
        raise StorageError(
            f"{here.root} is the working folder of {run or 'something else'}, not of {address}",
            hint="name another one with --work_dir",
        )
    # A working folder that is copied, or seen from several machines, is another one on each.
    return f"{name}@{this_host()}"
