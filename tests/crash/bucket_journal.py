"""The journals of `journal_run` in a bucket whose requests go wrong.

A journal that cannot be written or read ends the start, and the next one begins with what is there: so a
request that fails, is lost or late kills its start, and one that is carried out twice goes unnoticed.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bucket_run import Troubles, open_bucket
from journal_run import Driver, JournalRun, Open, Promise, random_script, step
from simulated_bucket import FATES, Objects, SimulatedBucket, apply
from simulated_disk import Killed, SimulatedDisk

from rollforward.errors import RollforwardError
from rollforward.storage import LocalStorage, Storage
from rollforward.store.shipping import Shipping, bring_up


class JournalBucket(SimulatedBucket):
    """A bucket where the driver expects a disk."""

    def mkdir(self, path: str) -> None:
        """There are no folders."""

    def fsync_folder(self, path: str) -> None:
        """Nor is there anything to sync."""


class BucketDriver(Driver):
    """Runs a script; what goes wrong on the way ends the start, and the script goes on with another."""

    def do(self, script: list[str]) -> JournalRun:
        for word in script:
            with self._ending_a_start():
                super().do([word])
        return self.run

    def _start(self, *, inherits: int) -> None:
        before = self.run.promise
        try:
            super()._start(inherits=inherits)
        except (Killed, RollforwardError):
            # It did nothing, so nothing that was promised may go; but its number is used up.
            self.run.promise = before
            self.run.promised(incarnation=before.incarnation + 1)
            self._killed = True
            raise

    def back(self) -> None:
        """As there; the checkpoints stay, however it ends."""
        checkpoints = list(self._checkpoints)
        try:
            super().back()
        finally:
            self._checkpoints = checkpoints

    def _kill(self, _short_write: int | None) -> None:
        """Before the request of an append, or after it."""
        bucket = self.run.disk
        with self._ending_a_start():
            while self._log.find(step(self._next), 0) is not None:
                self.step()
            bucket.kill_after = len(bucket.asked) + len(bucket.log) % 2
            self._append(step(self._next), 0)
        bucket.kill_after = None
        self._killed = True

    @contextmanager
    def _ending_a_start(self) -> Iterator[None]:
        try:
            yield
        except (Killed, RollforwardError):
            self._killed = True


def record(troubles: Troubles, storage: Open = open_bucket) -> JournalRun:
    """Run a script made by chance; `storage` is what mutants replace."""
    bucket = JournalBucket()
    bucket.delay = troubles.delay
    driver = BucketDriver(storage, 0, JournalRun(disk=bucket))
    bucket.fate = lambda what, key: troubles.fate(len(bucket.asked), what, key)
    run = driver.do(random_script(troubles.seed))
    bucket.land()
    return run


def states(run: JournalRun) -> Iterator[tuple[Objects, Promise]]:
    """Every distinct content that the bucket had, with what was promised before it."""
    content: Objects = {}
    promise = Promise()
    seen: set[tuple[int, Promise]] = set()
    for change in run.disk.log:
        if change.key:
            apply(content, change)
        else:
            promise = change.note
        key = (hash(frozenset(content.items())), promise)
        if key not in seen:
            seen.add(key)
            yield dict(content), promise


class ShippingDriver(BucketDriver):
    """The same with journals that are local first and shipped behind, each record before it is reported.

    A start is on the machine of the one before, and ships what that one left there; or on another, which has
    nothing of it.
    """

    def __init__(self, far: Open, run: JournalRun, chance: random.Random) -> None:
        self._far = far
        self._chance = chance
        self._machine = SimulatedDisk()
        self._shipping: Shipping | None = None
        super().__init__(self._on_a_machine, 0, run)

    def end(self) -> None:
        """The process ends; what could not be shipped stays on its machine."""
        if self._shipping is not None:
            with suppress(RollforwardError):
                self._shipping.close()

    def _on_a_machine(self, bucket: SimulatedBucket) -> Storage:
        self.end()
        if self._chance.random() < 0.5:
            self._machine = SimulatedDisk()
        far, spool = self._far(bucket), LocalStorage("/spool", self._machine)
        bring_up(spool, far, aside=LocalStorage("/aside", self._machine), say=lambda _: None)
        self._shipping = Shipping(
            far, spool, incarnation=self.run.promise.incarnation + 1, remote=True, retry_seconds=0.0
        )
        return self._shipping

    def _kill(self, _short_write: int | None) -> None:
        """The request of an append is not answered."""
        bucket = self.run.disk
        fate, bucket.fate = (
            bucket.fate,
            lambda what, _: "done" if what != "put" else self._chance.choice(FATES),
        )
        with self._ending_a_start():
            while self._log.find(step(self._next), 0) is not None:
                self.step()
            self._append(step(self._next), 0)
        bucket.fate = fate
        self._killed = True


def record_shipped(troubles: Troubles) -> JournalRun:
    """`record`, with journals that are shipped."""
    bucket = JournalBucket()
    bucket.delay = troubles.delay
    driver = ShippingDriver(open_bucket, JournalRun(disk=bucket), random.Random(troubles.seed))
    bucket.fate = lambda what, key: troubles.fate(len(bucket.asked), what, key)
    run = driver.do(random_script(troubles.seed))
    driver.end()
    bucket.land()
    return run
