"""A run in a storage that is far away: files that grow are written here first, and shipped behind.

    journal/rank_0/1-0_0.journal    the spool: on this machine's disk, fsynced, as in a run on a disk
                                    the storage: a row of pieces, what was synced since the last one

`Shipping` is a `Storage`. Whole files go straight to where the run is, and whatever is read comes from there.
What grows (journal, metrics) goes to a spool in the working folder first, and a thread ships it: what was
synced while one piece was on its way goes together as the next. The storage has whole pieces in order or not
at all, so it always has a beginning of the file. When all of a closed file is there, the spool lets go of it.

**Order.** A table of a checkpoint, and its manifest, are written only when the storage has everything that
was synced here before: what a checkpoint holds is on record there too.

**Durability.** A record is durable on this machine when `Appender.sync` returns. With `remote`, the storage
has it by then as well: nothing is lost with the machine. Otherwise what is `behind` is lost with it. A
storage that does not answer costs nothing but that: shipping is tried again until it does, and begins the
file anew there, since it is unknown what got through. With `remote`, whoever waits for it gets the error.

**Who may write.** A fence is asked before anything is written, shipped, published or removed, on every rank;
and a manifest is put on the condition that the one that is there is still the one that was seen. What a
replaced trainer had sent before it was replaced may still arrive: records that extend what it had recorded,
or a manifest that does not replace another. Both are true states of that start, so they do no harm: later
starts have higher incarnations, and count before it.

**After a crash.** A start on the same machine ships what its predecessor left in the spool (`bring_up`),
before any rank reads a journal, unless a start elsewhere has gone on from what was there: then it is another
future, and put aside. On another machine there is no spool, and the run goes on from what the storage has.

Nothing here knows which storage that is. Left out: shipping to two places.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from rollforward.errors import RollforwardError, StorageError
from rollforward.storage import (
    Appender,
    Buffer,
    Conditional,
    Entry,
    LocalStorage,
    ReadHandle,
    Storage,
    read_small,
)
from rollforward.storage.failures import settled_error
from rollforward.store import strictjson
from rollforward.store.journal.reading import journal_ranks, list_segments
from rollforward.store.layout import COMMITS, JOURNAL, TABLES
from rollforward.wording import counted, in_bytes

PIECE_BYTES = 8 << 20
"""At most so much is shipped at a time."""
RETRY_SECONDS = 5.0
"""Between two tries, while the storage does not answer; its own retries come before."""
_NOTE = "started.json"
"""In the spool: which start it belongs to."""
_CLOSE_SECONDS = 3.0
"""How long `close` waits for what is left to be shipped."""
_LATE_SECONDS = 10.0
"""From then on being behind is told."""

Fence = Callable[[], None]
"""Raises when this trainer was replaced."""


@dataclass(frozen=True, kw_only=True)
class Fences:
    """How a trainer finds out that it was replaced: of `store.lease`, `Lease.holds` and `check`, or
    `Follower.holds`."""

    ship: Fence = lambda: None
    commit: Fence = lambda: None


class Shipping:
    """`Storage` of a run that is at `far`, with a spool on this machine. `close` ships what is left.

    `remote`: a record counts as written when `far` has it. `warn` gets a line when shipping falls behind, and
    when it has caught up; from any thread.
    """

    def __init__(
        self,
        far: Storage,
        spool: LocalStorage,
        *,
        incarnation: int,
        remote: bool = False,
        fences: Fences = Fences(),
        warn: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.root = str(far)
        self.far = far
        self.spool = spool
        self.remote = remote
        self.fences = fences
        self._warn = warn
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._files: list[_Growing] = []
        """Those that are not shipped to their end, in the order in which they were begun."""
        self._changed = threading.Condition()
        self._error: StorageError | None = None
        """Why the last try to ship failed; None when it went well."""
        self._tries = 0
        self._fatal: RollforwardError | None = None
        """Why nothing is shipped any more."""
        self._late = False
        self._closed = False
        spool.write(_NOTE, [json.dumps({"incarnation": incarnation}).encode()])
        self._thread = threading.Thread(target=self._run, name="shipping", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return self.root

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        folder = path.partition("/")[0]
        if folder in (TABLES, COMMITS):
            self.settle()
        if folder == COMMITS:
            return self._commit(path, b"".join(buffers))
        # Tensor files have names of their own; what is derived from the newest checkpoint has not.
        self.fences.ship()
        return self.far.write(path, buffers)

    def open(self, path: str) -> ReadHandle:
        return self.far.open(path)

    def appender(self, path: str) -> Appender:
        return self._begin(_Growing(self, path, self.spool.appender(path)))

    def rewrite(self, path: str, buffers: Iterable[Buffer]) -> Appender:
        content = b"".join(buffers)
        self.fences.ship()
        there = self.far.rewrite(path, [content])
        growing = _Growing(self, path, self.spool.rewrite(path, [content]))
        growing.there, growing.shipped, growing.synced = there, len(content), len(content)
        return self._begin(growing)

    def stat(self, path: str) -> Entry | None:
        return self.far.stat(path)

    def scan(self, folder: str) -> list[Entry]:
        return self.far.scan(folder)

    def remove(self, path: str) -> None:
        # What a replaced trainer takes for a leftover may be its successor's.
        self.fences.ship()
        self.far.remove(path)

    def sync_file(self, path: str) -> None:
        self.far.sync_file(path)

    def sync_folder(self, path: str) -> None:
        self.far.sync_folder(path)

    def settle(self, patience: float | None = None) -> None:
        """Wait until everything that was synced by now is there. StorageError when a try failed.

        Also when it takes longer than `patience` seconds; None: as long as the storage's own retries take.
        """
        limit = None if patience is None else time.monotonic() + patience
        with self._changed:
            self._raise_fatal()
            wanted = [(growing, growing.synced) for growing in self._files]
            tries = self._tries
            self._changed.notify_all()
            while any(growing.shipped < end for growing, end in wanted):
                self._changed.wait(None if limit is None else limit - time.monotonic())
                self._raise_fatal()
                if self._error is not None and self._tries > tries:
                    raise self._error
                if limit is not None and time.monotonic() >= limit:
                    raise StorageError(f"{self.far} did not take it within {patience:.0f} s")

    def behind(self) -> dict[str, float]:
        """What is not there yet: `records` that were synced, `bytes`, and `seconds` since the oldest was."""
        with self._changed:
            late = [growing for growing in self._files if growing.shipped < growing.synced]
            if not late:
                return {}
            return {
                "records": float(sum(len(growing.records) for growing in late if growing.is_journal)),
                "bytes": float(sum(growing.synced - growing.shipped for growing in late)),
                "seconds": round(self._clock() - min(growing.records[0][1] for growing in late), 3),
            }

    def close(self) -> None:
        """Ship what is left, and end. StorageError when that fails: it stays in the spool.

        A process that was told to end has little time, so this takes some seconds at most; `settle` before
        it takes as long as it needs.
        """
        with self._changed:
            if self._closed:
                return
        error: StorageError | None = None
        try:
            self.settle(_CLOSE_SECONDS)
            patience = _CLOSE_SECONDS
        except StorageError as caught:
            error, patience = caught, 0.1
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
        # After an error it may be in the middle of a try, which may go on: what it ships is whole.
        self._thread.join(patience)
        if error is not None:
            raise StorageError(
                f"{in_behind(self.behind())} could not be shipped to {self.far}, and stays in "
                f"{self.spool.root}: {error.message}",
                hint=f"{error.hint}; then " * bool(error.hint)
                + "start the run again on this machine, with the same working folder: that ships it",
            ) from error

    def raise_fatal(self) -> None:
        """Raise what ended the shipping, if anything did."""
        with self._changed:
            self._raise_fatal()

    def note(self, growing: "_Growing", synced: int, *, records: int) -> None:
        """So much of a file is on this machine's disk."""
        with self._changed:
            self._raise_fatal()
            growing.synced = synced
            growing.records += [(synced, self._clock())] * records
            self._changed.notify_all()
        # The storage's own retries may take minutes before a try fails.
        self._tell_if_late("it answers slowly, or not at all")

    def ended(self, growing: "_Growing") -> None:
        """Nothing more is added to a file."""
        with self._changed:
            growing.closed = True
            self._changed.notify_all()

    def _begin(self, growing: "_Growing") -> Appender:
        with self._changed:
            self._raise_fatal()
            self._files.append(growing)
        return growing

    def _commit(self, path: str, content: bytes) -> int:
        if not isinstance(self.far, Conditional):
            self.fences.commit()
            return self.far.write(path, [content])
        there = self.far.read_tagged(path)
        self.fences.commit()
        if self.far.put_if(path, content, there[1] if there else None) is None:
            raise settled_error(
                f"publishing {path} in {self.far}: another trainer has just published one",
                hint="end this process; the other one continues",
            )
        return len(content)

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    # The thread

    def _run(self) -> None:
        while (growing := self._next()) is not None:
            try:
                self._ship(growing)
            except StorageError as error:
                if error.settled:
                    self._stop(error)
                    return
                self._failed(growing, error)
            except RollforwardError as error:
                self._stop(error)
                return
            except Exception as error:
                found = StorageError(
                    f"shipping {growing.path}: {type(error).__name__}: {error}",
                    hint="this is a fault of the program; please report it",
                )
                found.__cause__ = error
                self._stop(found)
                return

    def _next(self) -> "_Growing | None":
        """The next file with something to ship; None at the end."""
        with self._changed:
            while True:
                self._drop_done()
                for growing in self._files:
                    if growing.shipped < growing.synced and not (self._closed and self._error):
                        return growing
                if self._closed:
                    return None
                self._changed.wait()

    def _drop_done(self) -> None:
        """Let go of files of which everything is there."""
        for growing in [each for each in self._files if each.closed and each.shipped == each.synced]:
            self._files.remove(growing)
            if growing.there is not None:
                growing.there.close()
            with suppress(StorageError):  # it is brought up, to no effect, by the next start
                self.spool.remove(growing.path)

    def _ship(self, growing: "_Growing") -> None:
        self.fences.ship()
        with self._changed:
            begin, end = growing.shipped, min(growing.synced, growing.shipped + PIECE_BYTES)
        if growing.doubtful:
            # It is unknown what got through: from the beginning, in place of what is there.
            growing.there = self.far.rewrite(growing.path, _pieces(self.spool, growing.path, 0, end))
            growing.doubtful = False
        else:
            growing.there = growing.there or self.far.appender(growing.path)
            growing.there.append(_pieces(self.spool, growing.path, begin, end))
        with self._changed:
            growing.shipped = end
            growing.records = [record for record in growing.records if record[0] > end]
            self._error = None
            self._changed.notify_all()
            caught_up = self._late and not any(each.shipped < each.synced for each in self._files)
        if caught_up:
            self._late = False
            self._warn(f"journal: {self.far} has everything again")

    def _failed(self, growing: "_Growing", error: StorageError) -> None:
        with self._changed:
            self._error = error
            self._tries += 1
            growing.doubtful = True
            self._changed.notify_all()
        self._tell_if_late(error.message)
        with self._changed:
            if not self._closed:
                self._changed.wait(self._retry_seconds)

    def _tell_if_late(self, why: str) -> None:
        behind = self.behind()
        if not self._late and behind.get("seconds", 0.0) >= _LATE_SECONDS:
            self._late = True
            self._warn(
                f"journal: {self.far} lacks {in_behind(behind)}, which would be lost with this machine; it "
                f"is tried again until it works: {why}"
            )

    def _stop(self, error: RollforwardError) -> None:
        with self._changed:
            self._fatal = error
            self._changed.notify_all()


class _Growing:
    """`Appender` of a file in the spool that is shipped behind."""

    def __init__(self, shipping: Shipping, path: str, here: Appender) -> None:
        self.path = path
        self.is_journal = path.startswith(f"{JOURNAL}/")
        self.size = here.size
        self.there: Appender | None = None
        """Where it is shipped to; None before the first piece."""
        self.shipped = 0
        """Bytes that are there."""
        self.synced = 0
        """Bytes that are on this machine's disk."""
        self.records: list[tuple[int, float]] = []
        """Of each sync that is not there: where it ended, and when it was."""
        self.closed = False
        self.doubtful = False
        """Whether a piece did not get through, as far as is known."""
        self._shipping = shipping
        self._here = here

    def append(self, buffers: Iterable[Buffer]) -> None:
        self.write(buffers)
        self.sync()

    def write(self, buffers: Iterable[Buffer]) -> None:
        self._here.write(buffers)

    def sync(self) -> None:
        """See `Appender.sync`; with `Shipping.remote`, returns when the storage has it."""
        before = self.size
        self._here.sync()
        self.size = self._here.size
        self._shipping.note(self, self.size, records=int(self.size > before))
        if self._shipping.remote and self.is_journal:
            self._shipping.settle()

    def close(self) -> None:
        self._here.close()
        self._shipping.ended(self)


def _pieces(storage: Storage, path: str, begin: int, end: int) -> Iterator[bytes]:
    with storage.open(path) as handle:
        for offset in range(begin, end, PIECE_BYTES):
            piece = bytearray(min(PIECE_BYTES, end - offset))
            handle.read_into(memoryview(piece), offset)
            yield bytes(piece)


def bring_up(spool: LocalStorage, far: Storage, *, aside: LocalStorage, say: Callable[[str], None]) -> None:
    """Ship what an earlier start left in the spool, and empty it; for the holder of the lease, on each rank.

    If a later start has recorded something, what was not shipped belongs to a future that did not happen: it
    is moved to `aside`. Lines about either go to `say`. Idempotent: a start that dies in here leaves it to
    the next.
    """
    left = [path for path in _files_in(spool, "") if path != _NOTE]
    if not left:
        return
    newest = max(
        (segment.name.incarnation for rank in journal_ranks(far) for segment in list_segments(far, rank)),
        default=0,
    )
    replaced = newest > _incarnation_of(spool)
    moved = files = 0
    for path in left:
        size = _size(spool, path)
        if size > _size(far, path):
            files, moved = files + 1, moved + size - _size(far, path)
            if replaced:
                aside.write(path, _pieces(spool, path, 0, size))
            else:
                far.rewrite(path, _pieces(spool, path, 0, size)).close()
        spool.remove(path)
    spool.sync_folder("")
    if files and replaced:
        say(
            f"journal: {in_bytes(moved)} that had not been shipped when start {newest} went on elsewhere are "
            f"not used, and are now in {aside.root}"
        )
    elif files:
        say(f"journal: {in_bytes(moved)} that {far} did not have yet were shipped from {spool.root}")


def in_behind(behind: Mapping[str, float]) -> str:
    """What a `Shipping` is behind by, in words."""
    if not behind:
        return "nothing"
    return (
        f"{counted(int(behind.get('records', 0)), 'record')} of the journal, "
        f"{in_bytes(int(behind.get('bytes', 0)))}, {behind.get('seconds', 0.0):.1f} s old"
    )


def _files_in(storage: Storage, folder: str) -> Iterator[str]:
    for entry in storage.scan(folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.kind == "folder":
            yield from _files_in(storage, path)
        elif entry.kind == "file":
            yield path


def _size(storage: Storage, path: str) -> int:
    entry = storage.stat(path)
    return entry.size if entry is not None and entry.kind == "file" else 0


def _incarnation_of(spool: LocalStorage) -> int:
    """The start that the spool belongs to; 0 when that is unknown: then everything else is newer."""
    try:
        return int(strictjson.parse(read_small(spool, _NOTE, limit=1 << 12))["incarnation"])
    except (StorageError, ValueError, TypeError, KeyError):
        return 0
