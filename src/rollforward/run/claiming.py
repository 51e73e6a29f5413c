"""The run's folder, or its place in a bucket, becomes this start's: locked by the first worker, for all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rollforward.agreement import together
from rollforward.run.plan import Plan, look_again
from rollforward.run.worker import Worker
from rollforward.storage import Storage
from rollforward.store.cleaning import remove_strays
from rollforward.store.guests import read_guests
from rollforward.store.place import Hold, begin_together


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The run's folder is ours while the worker is at work."""

    incarnation: int
    storage: Storage
    """Where this worker writes, and reads what the run has."""
    fence: Callable[[], None]
    """Raises when the folder is no longer ours."""
    left_behind: Mapping[str, float]
    """What an earlier start had not shipped from its machine."""


def claim_folder(plan: Plan, worker: Worker) -> Claim:
    """Lock the run's folder on the first rank, for all. Collective: a failure there fails on all ranks.

    Another start may have come first and ended by now, so the folder is checked again under the lock.
    """
    place = plan.place

    def acquire() -> Hold | None:
        if not worker.is_first:
            return None
        lock = place.hold(
            after=plan.source.newest_incarnation(),
            say=worker.log.line,
            seconds=plan.config.rl_config.lease_seconds,
        )
        worker.closing.callback(lock.release)
        if lock.taken_over is not None:
            worker.log.line(f"lock: taken over, its owner ended without releasing it: {lock.taken_over}")
        look_again(plan)
        remove_strays(place.storage)
        # Otherwise only the first save would notice that it cannot be read, after hours of training.
        read_guests(place.storage)
        return lock

    lock, incarnations = together(
        acquire, worker.group.all_gather, tell=lambda lock: None if lock is None else lock.incarnation
    )
    if place.remote:
        worker.log.line(f"run: in {place.storage}; what is only of this machine is in {place.folder}")
    storage = begin_together(
        place,
        lock,
        rank=worker.group.rank,
        world_size=plan.world_size,
        incarnation=incarnations[0],
        all_gather=worker.group.all_gather,
        closing=worker.closing,
        durable_there=plan.config.rl_config.journal_durability == "remote",
        say=worker.log.warn,
        warn=worker.log.warn,
    )
    return Claim(
        incarnation=incarnations[0],
        storage=storage,
        fence=_no_fence if lock is None else lock.check,
        left_behind={} if lock is None else lock.left_behind,
    )


def _no_fence() -> None:
    """Only the first rank publishes, so only it is fenced."""
