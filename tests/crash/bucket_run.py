"""Trainers that save in a bucket whose requests go wrong, and what must hold whatever became of them.

Each start takes the lease, finds the newest checkpoint, and saves every step on two ranks whose requests are
interleaved; two checkpoints are kept, a reference is shared. Some requests fail, are lost, are carried out
twice, or late; a start may be killed between any two; it may be frozen there while a rival takes over, and
wake up when that one is done; listings may lag while a start takes over. A save that fails is no reason to
stop, and a start that fails is followed by another: as it is with the trainer.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from crash_run import RETENTION, Violation, save, state
from lockstep import LockStep
from simulated_bucket import FATES, Fate, Objects, SimulatedBucket, apply
from simulated_disk import Killed, SimulatedDisk

from rollforward.errors import CheckpointInvalid, NothingToResume, RollforwardError, StorageError
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage
from rollforward.storage.objects import ObjectStorage
from rollforward.store import CheckpointStore, Manifest, find, list_checkpoints, read_tensors
from rollforward.store.layout import LOCK
from rollforward.store.lease import Follower, Lease
from rollforward.store.restoring import verify
from rollforward.store.shipping import Fences, Shipping

WORLD = 2
STARTS = 3
"""Of those that nothing kills."""
STEPS = 4
"""Of each start, but for a rival's."""
LEASE_SECONDS = 3600.0
SECONDS_A_REQUEST = 12.0
"""So a lease runs out within a few hundred requests, and its thread never wakes up."""

DAY = datetime(2026, 1, 1, tzinfo=UTC)
"""Of every checkpoint, so that runs in which the same happens have the same bytes."""

Order = tuple[int, Position]
Open = Callable[[SimulatedBucket], ObjectStorage]


def open_bucket(bucket: SimulatedBucket) -> ObjectStorage:
    return ObjectStorage(bucket, "s3://bucket/run")  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trainer is made of; mutants replace them."""

    storage: Open = open_bucket
    store: Callable[..., CheckpointStore] = CheckpointStore
    shipping: Callable[..., Shipping] = Shipping


@dataclass
class Troubles:
    """Which fate each request has: given ones by number, or drawn. `share`: how many go wrong."""

    fates: dict[int, Fate] = field(default_factory=dict)
    seed: int = 0
    share: float = 0.0
    reads: bool = True
    """Whether reads fail too."""
    kills: tuple[int, ...] = ()
    """After so many requests of each start; the starts that follow live."""
    rival: int | None = None
    """Before this request its trainer is frozen, until a rival has taken over and ended."""
    lag: int = 0
    """Of the listings that a start sees before its first checkpoint."""
    happened: list[tuple[int, str, str, Fate]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    @classmethod
    def drawn(cls, seed: int) -> "Troubles":
        """Anything, in any combination."""
        rng = random.Random(seed)
        kills = tuple(rng.randint(1, 250) for _ in range(rng.choice([0, 1, 2])))
        return cls(
            seed=seed,
            share=rng.choice([0.0, 0.02, 0.05]),
            kills=kills,
            rival=rng.choice([None, rng.randint(1, 800)]),
            lag=rng.choice([0, 0, 2, 9]),
        )

    def fate(self, number: int, what: str, key: str) -> Fate:
        """What becomes of a request."""
        found = self.fates.get(number, "done")
        if self.share and self._rng.random() < self.share:
            found = self._rng.choice(FATES)
        if what in ("get", "head", "list") and found != "done":
            found = "fails" if self.reads else "done"
        if found != "done":
            self.happened.append((number, what, key, found))
        return found

    def delay(self) -> int:
        """In how many requests a late one is carried out."""
        return self._rng.choice([1, 3, 10, 40, 200])


@dataclass
class BucketRun:
    """A finished run: its bucket, with the log."""

    bucket: SimulatedBucket = field(default_factory=SimulatedBucket)
    fenced: int = 0
    """Trainers that were told that they had been replaced."""


def record(troubles: Troubles, parts: Parts = Parts()) -> BucketRun:
    """Run it all in a simulated bucket."""
    run = BucketRun()
    bucket = run.bucket
    kills = list(troubles.kills)

    def fate(what: str, key: str) -> Fate:
        if troubles.rival is not None and len(bucket.asked) >= troubles.rival:
            troubles.rival = None
            with _frozen(bucket):
                _train(run, parts, steps=2)
        return troubles.fate(len(bucket.asked), what, key)

    bucket.fate, bucket.delay = fate, troubles.delay
    for _ in range(STARTS + len(kills)):
        bucket.kill_after = len(bucket.asked) + kills.pop(0) if kills else None
        _train(run, parts, steps=STEPS, lag=troubles.lag)
    bucket.kill_after = None
    bucket.land()
    return run


@contextmanager
def _frozen(bucket: SimulatedBucket) -> Iterator[None]:
    """What a trainer has set in the bucket is put aside meanwhile."""
    mine = bucket.switch, bucket.kill_after, bucket.lag
    bucket.switch, bucket.kill_after, bucket.lag = (lambda: None), None, 0
    try:
        yield
    finally:
        bucket.switch, bucket.kill_after, bucket.lag = mine


def _train(run: BucketRun, parts: Parts, *, steps: int, lag: int = 0) -> None:
    """One start, to its end or until something stops it."""
    bucket = run.bucket
    bucket.lag = lag
    try:
        far = parts.storage(bucket)
        with _leased(bucket, far) as lease:
            _save_steps(run, parts, lease, _newest(far), steps)
    except (Killed, RollforwardError) as error:
        run.fenced += "taken over" in str(error)


def _seconds(bucket: SimulatedBucket) -> float:
    return len(bucket.asked) * SECONDS_A_REQUEST


@contextmanager
def _leased(bucket: SimulatedBucket, far: ObjectStorage) -> Iterator[Lease]:
    lease = Lease.acquire(
        far,
        place=f"machine {len(bucket.asked)}",
        seconds=LEASE_SECONDS,
        clock=lambda: _seconds(bucket),
        wait=lambda _: None,
    )
    try:
        yield lease
    except Killed:
        lease._released.set()  # its thread ends with its process
        raise
    finally:
        if not lease._released.is_set():
            # As `release` does it, but here, where a kill that meets it ends the start.
            lease._released.set()
            lease._give_back()


def _newest(storage: Storage) -> Manifest | None:
    """What a start resumes from; RollforwardError when it could not look."""
    try:
        return find(storage).manifest
    except NothingToResume as error:
        if "could not be read" in str(error):
            raise
        return None


def _save_steps(run: BucketRun, parts: Parts, lease: Lease, previous: Manifest | None, steps: int) -> None:
    bucket, resumed = run.bucket, previous.position.step if previous is not None else 0
    # From the newest on: a position is saved again by another start.
    first = max(resumed, 1)

    def body(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        with _shipping(parts, bucket, lease, rank) as storage:
            store = parts.store(
                storage,
                rank=rank,
                world_size=WORLD,
                exchange=exchange,
                retention=RETENTION,
                previous=previous,
                fence=lease.check if rank == 0 else lambda: None,
                remote=True,
                now=lambda: DAY,
            )
            for step in range(first, first + steps):
                order = lease.incarnation, Position(0, step)
                try:
                    save(store, lease.incarnation, step)
                except StorageError:
                    continue
                if rank == 0:
                    bucket.mark(order)
                bucket.lag = 0

    ranks = LockStep(WORLD)
    bucket.switch = ranks.switch
    results = ranks.run(body)
    bucket.switch = lambda: None
    # Whoever waited for a rank that ended has an error that only says so.
    for kind in (Killed, RollforwardError, BaseException):
        for result in results:
            if isinstance(result, kind):
                raise result


@contextmanager
def _shipping(parts: Parts, bucket: SimulatedBucket, lease: Lease, rank: int) -> Iterator[Shipping]:
    far, spool = parts.storage(bucket), LocalStorage(f"/spool/rank_{rank}", SimulatedDisk())
    follower = Follower(far, lease.incarnation, clock=lambda: _seconds(bucket))
    fences = Fences(ship=lease.holds, commit=lease.check) if rank == 0 else Fences(ship=follower.holds)
    shipping = parts.shipping(far, spool, incarnation=lease.incarnation, fences=fences)
    try:
        yield shipping
    finally:
        shipping.close()


class BucketChecker:
    """Opens what is left with the real recovery code; raises Violation for a broken promise.

    The newest checkpoint that counts must not be older than what was reported, and every checkpoint that
    counts must hold, to the last byte, what was saved. What is the same in many runs is checked once.
    """

    def __init__(self) -> None:
        self._intact: set[int] = set()
        self._seen: set[tuple[int, Order | None]] = set()

    def new_states(self, run: BucketRun) -> Iterator[Objects]:
        """Every content, renewals of the lease aside, that the bucket had in no run before; checked."""
        content: Objects = {}
        reported: Order | None = None
        for change in run.bucket.log:
            if change.key:
                apply(content, change)
            else:
                reported = max(reported, change.note) if reported else change.note
            key = hash(frozenset(item for item in content.items() if item[0] != LOCK)), reported
            if key not in self._seen:
                self._seen.add(key)
                self.check(content, reported)
                yield dict(content)

    def check(self, content: Objects, reported: Order | None) -> None:
        """Check one state."""
        storage = open_bucket(SimulatedBucket(content))
        listed = [info.manifest for info in list_checkpoints(storage) if info.valid and info.manifest]
        newest = max((manifest.order for manifest in listed), default=None)
        if reported is not None and (newest is None or newest < reported):
            raise Violation(f"{reported} was reported as committed, found is {newest}")
        for manifest in listed:
            key = hash((manifest.digest, *(content.get(path) for path in sorted(manifest.paths()))))
            if key not in self._intact:
                self._compare(storage, manifest)
                self._intact.add(key)

    def _compare(self, storage: Storage, manifest: Manifest) -> None:
        try:
            verify(storage, manifest)
        except CheckpointInvalid as error:
            raise Violation(f"a checkpoint that counts is not whole: {error.message}") from error
        expected = state(manifest.incarnation, manifest.position.step)
        found = {(role, name): array for role, name, array in read_tensors(storage, manifest)}
        if found.keys() != {(role, name) for role, named in expected.items() for name in named}:
            raise Violation(f"{manifest.order} holds other tensors")
        for (role, name), array in found.items():
            if not np.array_equal(array, expected[role][name]):
                raise Violation(f"{manifest.order}: {role} {name} holds something else")


def check_going_on(content: Objects) -> None:
    """A new start in what is left takes over, saves and commits."""
    run = BucketRun(bucket=SimulatedBucket(content))
    before = _newest(open_bucket(run.bucket))
    with _leased(run.bucket, open_bucket(run.bucket)) as lease:
        _save_steps(run, Parts(), lease, before, STEPS)
    newest = list_checkpoints(open_bucket(run.bucket), deep=True)[: RETENTION.newest]
    made = {change.note for change in run.bucket.log if not change.key}
    if len(made) != STEPS:
        raise Violation("a save failed although nothing went wrong")
    if not all(info.valid and info.manifest and info.manifest.order in made for info in newest):
        raise Violation(f"after going on: {[(str(info.position), info.reason) for info in newest]}")
