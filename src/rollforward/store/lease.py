"""Who trains in a run that no lock of a system reaches: a lease, kept in the run's storage by conditional
writes.

    run.lock   {"incarnation": 3, "host": "a", "pid": 71, "since": "...", "held": true,
                "lease": {"seconds": 30.0, "place": "5f0c...", "renewed": 17, "behind": {...}}}

The owner writes it again every third of `seconds`, each time on the condition that nobody else has written
since: a conditional put, which the service decides. So there is one owner, whatever the clocks say, and the
incarnation goes up with each.

**Taking over.** A lease that was released is taken at once. So is one from this same working folder
(`place`), since whoever starts there holds that folder's own lock: its earlier owner has ended. Any other is
watched for `seconds`, and an eighth more for a clock that runs slow: if it changes meanwhile, its owner lives
and the start is refused; if it does not, it is replaced, on the condition that it is still the same. Clocks
of two machines are never compared: each measures how long something took on its own.

**The fence.** `check` renews the lease, which only its owner can; before a manifest is published. `holds`
asks the service only if the last renewal is too old by this machine's clock. An owner that was frozen, and
replaced meanwhile, finds that out in either, and can do no more. A service that is away costs nobody the
lease: what counts is whether somebody else has written.

The owner is the first rank. The others have read the lease, a third of `seconds` ago at most, when they ship,
write or remove anything (`Follower`): so a start that was replaced can do no more on any rank.

Where a service does not honour conditions (`honours_conditions`, tried at the start), the lease is looked at
and then written. That keeps out everybody but a trainer that starts at the same moment.

Left out: what was on its way to the service when the lease was lost. See `shipping` for what that can be.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rollforward.errors import RunLocked, StorageError
from rollforward.storage import Conditional, Storage, read_small
from rollforward.store import strictjson
from rollforward.store.digests import digest
from rollforward.store.layout import LOCK
from rollforward.store.lock import Owner, next_incarnation, parse_owner, this_host

SECONDS = 30.0
"""How long a lease stands without being renewed, before somebody else may take it."""
_SLOWER = 1.125
"""How much longer whoever watches a lease waits: no clock is an eighth too slow."""
_LOOKS = 8
"""How often a lease is looked at while it is watched."""
_RELEASE_SECONDS = 3.0
"""How long `release` waits for the service."""
_MOST_BYTES = 1 << 16

Say = Callable[[str], None]


def _clock() -> float:
    """Seconds that only go forward, and while this machine sleeps too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a lease says besides who holds it."""

    seconds: float = SECONDS
    place: str = ""
    """Names the working folder of its owner."""
    renewed: int = 0
    behind: Mapping[str, float] = field(default_factory=dict)
    """What the owner had not shipped when it wrote this; see `shipping.Shipping.behind`."""


class Lease:
    """A held lease; renewed on a thread until it is released. Made by `acquire`."""

    def __init__(
        self,
        storage: Conditional,
        owner: Owner,
        terms: Terms,
        tag: str,
        *,
        began: float,
        clock: Callable[[], float],
        taken_over: Owner | None,
        left_behind: Mapping[str, float],
    ) -> None:
        self.owner = owner
        self.taken_over = taken_over
        """The previous owner, if it ended without releasing it."""
        self.left_behind = left_behind
        """What that one had not shipped when it was last heard of; empty if it worked in this same folder."""
        self.behind: Callable[[], Mapping[str, float]] = dict
        """Asked at each renewal."""
        self._storage = storage
        self._terms = terms
        self._tag = tag
        self._until = began + terms.seconds
        self._clock = clock
        self._pid = os.getpid()
        self._lost: str | None = None
        self._unanswered: list[bytes] = []
        """What was written since the last answer: it may be there."""
        self._lock = threading.Lock()
        self._released = threading.Event()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        *,
        place: str,
        after: int = 0,
        seconds: float = SECONDS,
        say: Say = lambda _: None,
        clock: Callable[[], float] = _clock,
        wait: Callable[[float], object] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> "Lease":
        """Take the lease of the run in a storage; RunLocked says who holds it.

        `place` names this process's working folder, whose own lock it holds. `after` is as for
        `RunLock.acquire`. May take as long as the lease that is there says, and says so.
        """
        service: Conditional = storage if isinstance(storage, Conditional) else _Looking(storage)
        if not honours_conditions(storage, service):
            say(
                f"lock: warning: {storage} does not honour conditional writes, so it is not guaranteed that "
                "only one trainer writes there: do not start two at the same moment"
            )
            service = _Looking(storage)
        found = _read(service)
        before, terms = (None, None) if found is None else (found.owner, found.terms)
        if found is not None and not _is_free(found, place):
            say(
                f"lock: held by {before or 'a trainer that could not be identified'}; whether it is alive "
                f"shows within {found.terms.seconds * _SLOWER:.0f} s"
            )
            found = _watch(storage, service, found, wait)
            before, terms = found.owner, found.terms
        began = clock()
        owner = Owner(
            incarnation=next_incarnation(storage, before, after),
            host=this_host(),
            pid=os.getpid(),
            since=now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        ours = Terms(seconds=seconds, place=place)
        tag = service.put_if(LOCK, _dump(owner, ours), None if found is None else found.tag)
        if tag is None:
            raise _refused(storage, service)
        unclean = before if before is not None and before.held else None
        return cls(
            service,
            owner,
            ours,
            tag,
            began=began,
            clock=clock,
            taken_over=unclean,
            # What is in this machine's own spool is not lost.
            left_behind=terms.behind if unclean and terms and terms.place != place else {},
        )

    @property
    def incarnation(self) -> int:
        """The number of this start."""
        return self.owner.incarnation

    def check(self) -> None:
        """Renew it now. RunLocked when it is no longer ours; StorageError when the service is away."""
        with self._lock:
            self._renew()

    def holds(self) -> None:
        """As `check`, without asking the service while the last renewal is young enough."""
        with self._lock:
            if self._lost is not None or self._clock() > self._until - self._terms.seconds / 3:
                self._renew()

    @property
    def lost(self) -> str | None:
        """Who took it over, in words; None as far as is known here."""
        return self._lost

    def release(self) -> None:
        """Give it back, so that the next start need not wait. A forked child has none."""
        if os.getpid() != self._pid or self._released.is_set():
            return
        self._released.set()
        # A service that is away is not waited for: then whoever comes next waits until the lease has run out.
        giving = threading.Thread(target=self._give_back, name="lease", daemon=True)
        giving.start()
        giving.join(_RELEASE_SECONDS)

    def _give_back(self) -> None:
        with self._lock, suppress(StorageError, RunLocked):
            self.owner = replace(self.owner, held=False)
            self._renew()

    def _keep(self) -> None:
        while not self._released.wait(self._terms.seconds / 3):
            with self._lock:
                if self._released.is_set():
                    return
                try:
                    self._renew()
                except RunLocked:
                    return
                except StorageError:
                    continue  # told where it matters: by what is shipped and by the next checkpoint

    def _renew(self) -> None:
        if self._lost is None:
            began = self._clock()
            terms = replace(self._terms, renewed=self._terms.renewed + 1, behind=self.behind())
            content = _dump(self.owner, terms)
            self._unanswered.append(content)
            tag = self._storage.put_if(LOCK, content, self._tag)
            there = self._storage.read_tagged(LOCK) if tag is None else None
            if there is not None and there[0] in self._unanswered:
                # A renewal that seemed to fail had got through.
                tag = self._storage.put_if(LOCK, content, there[1])
            if tag is not None:
                self._tag, self._terms, self._until = tag, terms, began + terms.seconds
                self._unanswered.clear()
                return
            found = _read(self._storage)
            self._lost = str(found.owner if found and found.owner else "someone unknown")
        raise _replaced(self._lost, self.incarnation)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Follower:
    """A start's lease as its other ranks see it: they do not renew it, but look whose it is."""

    def __init__(self, storage: Storage, incarnation: int, *, clock: Callable[[], float] = _clock) -> None:
        self._service: Conditional = storage if isinstance(storage, Conditional) else _Looking(storage)
        self._incarnation = incarnation
        self._clock = clock
        self._until: float | None = None
        self._lock = threading.Lock()

    def holds(self) -> None:
        """RunLocked when another start has it; StorageError when the service is away.

        Looks no more often than the owner renews it: a trainer that was frozen looks first.
        """
        with self._lock:
            began = self._clock()
            if self._until is not None and began < self._until:
                return
            found = _read(self._service)
            owner = found.owner if found is not None else None
            if found is None or owner is None or owner.incarnation != self._incarnation:
                self._until = None
                raise _replaced(str(owner or "someone unknown"), self._incarnation)
            self._until = began + found.terms.seconds / 3


def honours_conditions(storage: Storage, service: Conditional) -> bool:
    """Whether conditional writes are refused where they should be; tried under a name of its own."""
    # Named as a leftover of an unfinished write: if this process dies here, the next start removes it.
    path = f".{LOCK}.{secrets.token_hex(4)}.tmp"
    first = service.put_if(path, b"1", None)
    try:
        if first is None or service.put_if(path, b"2", None) is not None:
            return False
        second = service.put_if(path, b"3", first)
        return second is not None and service.put_if(path, b"4", first) is None
    finally:
        storage.remove(path)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A lease as it is there."""

    tag: str
    owner: Owner | None
    """None when it cannot be understood."""
    terms: Terms


def _read(service: Conditional) -> _Found | None:
    there = service.read_tagged(LOCK)
    if there is None:
        return None
    content, tag = there
    return _Found(tag=tag, owner=parse_owner(content), terms=_terms(content))


def _is_free(found: _Found, place: str) -> bool:
    return (found.owner is not None and not found.owner.held) or found.terms.place == place


def _watch(storage: Storage, service: Conditional, found: _Found, wait: Callable[[float], object]) -> _Found:
    """The same lease, once it has not changed for so long that its owner cannot think that it holds it."""
    for _ in range(_LOOKS):
        wait(found.terms.seconds * _SLOWER / _LOOKS)
        there = _read(service)
        if there is None or there.tag != found.tag:
            if there is not None and there.owner is not None and not there.owner.held:
                return there
            raise _refused(storage, service)
    return found


def _replaced(by: str, incarnation: int) -> RunLocked:
    return RunLocked(
        f"the run was taken over by {by}: this process (incarnation {incarnation}) must not write there any "
        "more",
        hint="end this process; the other one continues",
    )


def _refused(storage: Storage, service: Conditional) -> RunLocked:
    found = _read(service)
    owner = found.owner if found else None
    return RunLocked(
        f"{storage} is held by {owner or 'a trainer that could not be identified'}",
        hint="wait for it to end, end it, or save to another place",
    )


def _dump(owner: Owner, terms: Terms) -> bytes:
    return json.dumps(asdict(owner) | {"lease": asdict(terms)}).encode()


def _terms(content: bytes) -> Terms:
    """As the lease says; the defaults where it says nothing that makes sense."""
    try:
        value: Any = strictjson.parse(content)["lease"]
        seconds, behind = float(value["seconds"]), dict(value["behind"])
        known = {str(name): float(number) for name, number in behind.items()}
        if not 0 < seconds <= 3600:
            return Terms()
        return Terms(seconds=seconds, place=str(value["place"]), renewed=int(value["renewed"]), behind=known)
    except (ValueError, TypeError, KeyError):
        return Terms()


class _Looking:
    """`Conditional` for a storage that is not: it looks, writes, and looks again. Others may come between."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        if self._storage.stat(path) is None:
            return None
        content = read_small(self._storage, path, limit=_MOST_BYTES)
        return content, digest(content)

    def put_if(self, path: str, content: bytes, tag: str | None) -> str | None:
        there = self.read_tagged(path)
        if (there[1] if there else None) != tag:
            return None
        self._storage.write(path, [content])
        there = self.read_tagged(path)
        return there[1] if there is not None and there[0] == content else None
