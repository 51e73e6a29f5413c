"""Checkpoints hidden behind generation: written from the live tensors while the next step generates.

    begin          agree on names, start a thread, return
    (generation)   the thread writes this rank's part of what may have changed, straight from the live tensors
    before_update  what is not yet written, normally nothing, is copied aside
    boundary       once every rank's part is durable: gather what was written, collectively
    (generation)   rank 0's thread publishes the manifest
    boundary       every rank learns that the checkpoint exists
    (generation)   the thread updates meta.json, removes old files, and calls `tidied`

Promises: what is saved is the state as it was at `begin`, to the bit, as long as tensors change
only between `before_update` and the next `begin`. The caller waits for at most one copy of its
part, and normally not at all. No tensor of another rank's part is read, nor any role whose revision
is the same as in the previous checkpoint (see `live`). All collectives run on the caller's thread. A
failure in the background is reported at the next boundary; training continues, since the previous
checkpoint remains valid; `close` raises if the newest state was never saved. With `prove_unchanged`,
`begin` already digests every tensor of the part. The save then fails if a tensor's bytes are different
when it is written, or if they differ from the previous checkpoint although its role's revision is
the same.

It fits `grpo.ports.Checkpoints`, although it does not import it.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rollforward.errors import EngineError, RollforwardError, StorageError
from rollforward.position import Position
from rollforward.store.attempt import Attempt
from rollforward.store.checkpoints import CheckpointStore
from rollforward.store.live import Buffers, Guard, Live, LiveSource, Share, as_live, revisions_of, sources_of
from rollforward.store.manifest import Head
from rollforward.store.saved import About, Committed, Saved, Spent
from rollforward.store.tensorfile import digest_of
from rollforward.tensors import Held

Digests = Mapping[tuple[str, str], str]
"""(role, name) -> digest."""


class _Worker:
    """One thread that runs one task after another. It ends with the process."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Run this after the tasks submitted before; does not wait."""
        self._tasks.put(task)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until all submitted tasks are done, or the thread has ended."""
        done = threading.Event()
        self.submit(done.set)
        while not done.wait(1.0) and self._thread is not None and self._thread.is_alive():
            continue

    def _run(self) -> None:
        while True:
            self._tasks.get()()


class _Job:
    """One checkpoint in progress, and the results of the thread's work on it: write, then publish."""

    def __init__(self, attempt: Attempt, share: Share) -> None:
        self.attempt = attempt
        self.share: list[LiveSource] = [source for named in share.values() for source in named.values()]
        self.head: Head | None = None
        """Set once all ranks have written: from then on it is being published."""
        self.verdict: Any = None
        self.error: Exception | None = None
        self.blocked = 0.0
        self.seconds = 0.0
        """How long the thread has worked on it."""
        self.processor = 0.0
        """Seconds of the processor that this took."""
        self.idle = threading.Event()
        """Set when the thread has finished its current task."""

    def run(self, work: Callable[[], Any]) -> None:
        """Runs on the thread."""
        began, computed = time.perf_counter(), time.thread_time()
        try:
            self.verdict = work()
        except Exception as error:
            self.error = error if isinstance(error, RollforwardError) else _unexpected(error)
        finally:
            self.seconds += time.perf_counter() - began
            self.processor += time.thread_time() - computed
            self.idle.set()


class ShadowCheckpoints:
    """`CheckpointStore.save`, spread over a step. Collective: all ranks call each method at the same point.

    `live` is what is saved, or a function that returns its arrays and pieces; `about` goes into every
    checkpoint.
    `saved` is called for each committed checkpoint, `failed` for each that could not be saved, `warned` for
    problems after a commit; all on the caller's thread. `tidied` is called on the background thread after
    each commit, to remove whatever else is no longer needed, and returns warnings: so no removal, however
    slow the disk, delays the caller. `advise` is called when a checkpoint has been published, with what it
    took on this rank; what it returns on the first rank, some JSON, is `Saved.advice` on all.
    """

    def __init__(
        self,
        store: CheckpointStore,
        live: Live | Callable[[], Held],
        about: About,
        *,
        saved: Callable[[Saved], None],
        failed: Callable[[StorageError], None],
        warned: Callable[[str], None],
        tidied: Callable[[], list[str]] = lambda: [],
        advise: Callable[[Spent], Any] = lambda _: None,
        prove_unchanged: bool = False,
    ) -> None:
        self.copied_bytes = 0
        """Bytes that the last checkpoint had to copy aside."""
        self._store = store
        self._live = as_live(live)
        self._about = about
        self._saved = saved
        self._failed = failed
        self._warned = warned
        self._tidied = tidied
        self._advise = advise
        self._prove_unchanged = prove_unchanged
        self._guard = Guard()
        self._buffers = Buffers()
        self._job: _Job | None = None
        self._worker = _Worker()
        self._leftover_warnings: list[str] = []
        self._unsaved: StorageError | None = None

    def begin(self, position: Position, global_step: int, *, state: Mapping[str, Any] | None = None) -> None:
        """Start saving the current state, and return. `state` replaces the one in `about`.

        If a checkpoint is still in progress, waits for it and commits it first.
        """
        self._settle()
        started = time.perf_counter()
        description = self._about.at(position, global_step, state)
        try:
            attempt = self._store.plan(description, self._live.layout(), revisions_of(self._live))
        except StorageError as error:
            self._note_failure(error)
            return
        attempt.sources = sources_of(
            self._live, attempt.share(), self._guard, self._buffers, copied=self._store.remote
        )
        if self._store.remote:
            attempt.aside = self._aside
        proof = self._proof(attempt) if self._prove_unchanged else None
        self.copied_bytes = 0
        self._job = job = _Job(attempt, attempt.sources)
        self._give(job, lambda: self._write(job, proof))
        job.blocked += time.perf_counter() - started

    def can_begin(self, patience: float) -> bool:
        """Whether no save is being written, at the latest after so many seconds. Collective.

        One that only has to be published does not count: `begin` waits for that.
        """
        job = self._job
        if job is None or job.head is not None:
            return True
        if not patience:
            # Not all ranks had written at the last boundary, as all of them know.
            return False
        started = time.perf_counter()
        job.idle.wait(patience)
        ready = self._store.all_ready(job.idle.is_set())
        job.blocked += time.perf_counter() - started
        return ready

    def under_way(self) -> tuple[float, int]:
        """How long ago the save in progress began, in seconds, and the bytes of this rank's part."""
        job = self._job
        if job is None:
            return 0.0, 0
        layout = self._live.layout()
        size = sum(layout[role][name].nbytes for role, name in job.attempt.share())
        return time.perf_counter() - job.attempt.started, size

    def before_update(self) -> None:
        """Once this returns, the arrays may change."""
        job = self._job
        if job is None or job.head is not None or job.idle.is_set():
            return
        started = time.perf_counter()
        with self._guard.copying():
            self.copied_bytes += sum(source.keep_copy() for source in job.share)
        job.blocked += time.perf_counter() - started

    def boundary(self) -> None:
        """Advance what all ranks have finished; report what was committed and what failed."""
        self._tell_warnings()
        job = self._job
        if job is None:
            return
        started = time.perf_counter()
        ready = self._store.all_ready(job.idle.is_set())
        job.blocked += time.perf_counter() - started
        if ready:
            self._advance(job)

    def close(self) -> None:
        """Finish and commit what is in progress; StorageError when the newest state could not be saved."""
        self._settle()
        self._worker.wait()
        self._tell_warnings()
        if self._unsaved is not None:
            raise self._with_what_stands(self._unsaved)

    def abandon(self) -> None:
        """Leave what is in progress uncommitted: for a run that ends with an error. Not collective.

        Once this returns, nothing more is read from the arrays or written.
        """
        self._job = None
        self._worker.wait()

    def _with_what_stands(self, error: StorageError) -> StorageError:
        before = self._store.previous
        stands = f"the newest in the folder is {before.position}" if before else "none was saved before it"
        return StorageError(f"{error.message}; {stands}", hint=error.hint)

    def _settle(self) -> None:
        """Wait for what is in progress and commit it."""
        while (job := self._job) is not None:
            started = time.perf_counter()
            job.idle.wait()
            self._store.all_ready(True)
            job.blocked += time.perf_counter() - started
            self._advance(job)

    def _advance(self, job: _Job) -> None:
        """If all ranks have written, let rank 0 publish. If it has published, conclude."""
        started = time.perf_counter()
        try:
            if job.head is None:
                head = job.head = job.attempt.gather(job.error)
                self._give(job, lambda: job.attempt.publish(head))
                committed = None
            else:
                advice = self._advise(Spent(job.blocked, job.processor, job.seconds))
                committed = job.attempt.conclude(job.head, job.verdict, job.error, advice=advice)
        except StorageError as error:
            self._job = None
            self._note_failure(error)
            return
        except BaseException:
            self._job = None
            raise
        job.blocked += time.perf_counter() - started
        if committed is not None:
            self._job = None
            self._conclude(job, committed)

    def _conclude(self, job: _Job, committed: Committed) -> None:
        self._unsaved = None
        self._aside(lambda: self._tidy(committed))
        self._saved(
            Saved(
                committed.manifest,
                job.attempt.bytes_written,
                job.seconds,
                job.blocked,
                committed.warnings,
                committed.suspicion,
                committed.advice,
            )
        )

    def _give(self, job: _Job, work: Callable[[], Any]) -> None:
        job.idle.clear()
        self._worker.submit(lambda: job.run(work))

    def _aside(self, work: Callable[[], object]) -> None:
        """On the thread: what a service may take long for, and nobody waits for."""

        def quietly() -> None:
            try:
                work()
            except Exception as error:
                self._leftover_warnings.append(f"tidying up failed: {type(error).__name__}: {error}")

        self._worker.submit(quietly)

    def _write(self, job: _Job, proof: Digests | None) -> None:
        """On the thread: write this rank's part."""
        try:
            job.attempt.write()
            if proof is not None:
                _compare(job.attempt, proof)
                job.attempt.check_unchanged(proof)
        finally:
            for source in job.share:
                source.release()

    def _tidy(self, committed: Committed) -> None:
        """On the thread: clean up after a commit."""
        self._leftover_warnings += [*self._store.tidy(committed), *self._tidied()]

    def _proof(self, attempt: Attempt) -> Digests:
        """Digests of the current bytes: this rank's part, and what it leaves out as unchanged."""
        names = [*attempt.share(), *attempt.left_out()]
        found = {}
        # Read separately from what is written later: a copy made now would prove nothing about that.
        for role, named in sources_of(self._live, names, self._guard, self._buffers).items():
            for name, source in named.items():
                found[role, name] = digest_of(source, name)
                source.release()
        return found

    def _note_failure(self, error: StorageError) -> None:
        self._unsaved = error
        self._failed(error)

    def _tell_warnings(self) -> None:
        while self._leftover_warnings:
            self._warned(self._leftover_warnings.pop(0))


def _compare(attempt: Attempt, digests: Digests) -> None:
    for role, written in attempt.written.items():
        for record in written.tensors if written is not None else ():
            if record.digest != digests[role, record.name]:
                raise EngineError(
                    f"checkpoint {attempt.description.position}: {role} {record.name} changed while it was "
                    "written",
                    hint="the engine must not touch its tensors between begin and before_update",
                )


def _unexpected(error: Exception) -> StorageError:
    found = StorageError(
        f"{type(error).__name__}: {error}", hint="this is a fault of the program; please report it"
    )
    found.__cause__ = error
    return found
