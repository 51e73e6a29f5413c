"""Checkpoints in the shadow of generation: written from the live arrays while the next step generates.

    begin          agree on names, start a thread, return
    (generation)   the thread writes this rank's part straight from the live arrays, without a copy
    before_update  what is not written yet, normally nothing, is copied aside
    boundary       when every rank's part is durable: gather what was written, collectively
    (generation)   rank 0's thread publishes the manifest
    boundary       every rank learns that the checkpoint exists
    (generation)   the thread derives meta.json and removes old files, and what `tidied` removes

Promises: what is saved is the state as it was at `begin`, to the bit, as long as arrays change
only between `before_update` and the next `begin`. The caller waits for at most one copy of its
part, and normally not at all. Everything collective happens on the caller's thread. A failure in
the background is told at the next boundary; training goes on, since the checkpoint before
stands; what never succeeded is raised by `close`. With `prove_unchanged` every tensor is digested
in `begin` already, and a tensor that has other bytes when it is written fails the save.

It fits `grpo.ports.Checkpoints`, which it does not know.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rollforward.errors import EngineError, RollforwardError, StorageError
from rollforward.position import Position
from rollforward.store.attempt import Attempt, Committed, Description, Saved
from rollforward.store.checkpoints import CheckpointStore, Tensors
from rollforward.store.manifest import Manifest
from rollforward.store.tensorfile import CHUNK_BYTES, as_bytes, dtype_code


class _Guard:
    """A lock between the thread that writes and the caller who waits to change the arrays.

    A plain lock is not enough: the writer takes it again for the next chunk at once, and the
    caller might get no turn until the last one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.Event()
        self._free.set()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For the writer; stands back while the caller waits."""
        self._free.wait()
        with self._lock:
            yield

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """For the caller; waits for one chunk at most."""
        self._free.clear()
        try:
            with self._lock:
                yield
        finally:
            self._free.set()


class LiveSource:
    """A live array as a `TensorSource`: read in place until it is told to keep a copy."""

    def __init__(self, array: NDArray[Any], guard: _Guard) -> None:
        self.dtype = dtype_code(array.dtype)
        self.shape = tuple(array.shape)
        # A view in C order is read in place; anything else has to be copied, and only once.
        self._array: NDArray[np.uint8] | None = as_bytes(array)
        self._guard = guard

    def chunks(self) -> Generator[memoryview, None, None]:
        """Each chunk is given out under the guard, so that it cannot change while it is written."""
        begin = 0
        while True:
            with self._guard.reading():
                if self._array is None:
                    raise RuntimeError("a tensor was read after its part had been written")
                data = self._array.data
                if begin >= data.nbytes:
                    return
                yield data[begin : begin + CHUNK_BYTES]
            begin += CHUNK_BYTES

    def keep_copy(self) -> int:
        """Read from a copy from now on; returns its bytes. The caller holds the guard."""
        if self._array is None:
            return 0
        self._array = np.array(self._array, copy=True)
        return self._array.nbytes

    def release(self) -> None:
        """Nothing more will be read; a copy is let go."""
        with self._guard.reading():
            self._array = None


class _Worker:
    """One thread that does one thing after the other. It ends with the process."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Do this after what was given before; does not wait."""
        self._tasks.put(task)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until all that was given is done, or the thread is no more."""
        done = threading.Event()
        self.submit(done.set)
        while not done.wait(1.0) and self._thread is not None and self._thread.is_alive():
            continue

    def _run(self) -> None:
        while True:
            self._tasks.get()()


class _Job:
    """One checkpoint under way, and what came of the thread's work for it: write, then publish."""

    def __init__(self, attempt: Attempt, sources: Mapping[str, Mapping[str, LiveSource]]) -> None:
        self.attempt = attempt
        self.sources = sources
        self.manifest: Manifest | None = None
        """Set when all ranks have written: from then on it is being published."""
        self.verdict: Any = None
        self.error: Exception | None = None
        self.blocked = 0.0
        self.seconds = 0.0
        """How long the thread has worked for it."""
        self.idle = threading.Event()
        """Set when the thread has done what it was given."""

    def run(self, work: Callable[[], Any]) -> None:
        """On the thread."""
        began = time.perf_counter()
        try:
            self.verdict = work()
        except Exception as error:
            self.error = error if isinstance(error, RollforwardError) else _unexpected(error)
        finally:
            self.seconds += time.perf_counter() - began
            self.idle.set()


class ShadowCheckpoints:
    """`CheckpointStore.save` spread over a step. Collective: all ranks call each method at the same point.

    `tensors` gives the live arrays, role -> name -> array; `about` goes to every checkpoint as to
    `CheckpointStore.save`. `saved` is told of each committed checkpoint, `failed` of each that
    could not be saved, `warned` of what went wrong after a commit; all on the caller's thread.
    `tidied` is called on the background thread after each commit, for what else can be removed now, and
    returns warnings: so no removal, however slow the disk, holds up the caller.
    """

    def __init__(
        self,
        store: CheckpointStore,
        tensors: Callable[[], Tensors],
        about: Mapping[str, Any],
        *,
        saved: Callable[[Saved], None],
        failed: Callable[[StorageError], None],
        warned: Callable[[str], None],
        tidied: Callable[[], list[str]] = lambda: [],
        prove_unchanged: bool = False,
    ) -> None:
        self.copied_bytes = 0
        """How much the last checkpoint had to copy aside."""
        self._store = store
        self._tensors = tensors
        self._about = about
        self._saved = saved
        self._failed = failed
        self._warned = warned
        self._tidied = tidied
        self._prove_unchanged = prove_unchanged
        self._guard = _Guard()
        self._job: _Job | None = None
        self._worker = _Worker()
        self._leftover_warnings: list[str] = []
        self._unsaved: StorageError | None = None

    def begin(self, position: Position, global_step: int, *, state: Mapping[str, Any] | None = None) -> None:
        """Start to save the state as it is now, and return. `state` stands in for that of `about`.

        A checkpoint that is still under way is waited for and committed first.
        """
        self._settle()
        started = time.perf_counter()
        live = {
            role: {name: LiveSource(array, self._guard) for name, array in named.items()}
            for role, named in self._tensors().items()
        }
        own = {} if state is None else {"state": state}
        description = Description(
            position=position,
            global_step=global_step,
            **{"fingerprint": "", "versions": {}, "attachments": {}, **self._about, **own},
        )
        try:
            job = _Job(self._store.plan(description, live), live)
        except StorageError as error:
            self._note_failure(error)
            return
        digests = self._digests(job) if self._prove_unchanged else None
        self.copied_bytes = 0
        self._job = job
        self._give(job, lambda: self._write(job, digests))
        job.blocked += time.perf_counter() - started

    def before_update(self) -> None:
        """The arrays may change once this returns."""
        job = self._job
        if job is None or job.manifest is not None or job.idle.is_set():
            return
        started = time.perf_counter()
        mine = [source for _, _, source in self._share(job)]
        with self._guard.copying():
            self.copied_bytes += sum(source.keep_copy() for source in mine)
        job.blocked += time.perf_counter() - started

    def boundary(self) -> None:
        """Go on with what all ranks have finished; tell of what is committed and what failed."""
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
        """Finish and commit what is under way; StorageError when the newest state could not be saved."""
        self._settle()
        self._worker.wait()
        self._tell_warnings()
        if self._unsaved is not None:
            raise self._with_what_stands(self._unsaved)

    def abandon(self) -> None:
        """Leave what is under way uncommitted: for a run that ends with an error. Not collective.

        Nothing is read from the arrays or written any more once this returns.
        """
        self._job = None
        self._worker.wait()

    def _with_what_stands(self, error: StorageError) -> StorageError:
        before = self._store.previous
        stands = f"the newest in the folder is {before.position}" if before else "none was saved before it"
        return StorageError(f"{error.message}; {stands}", hint=error.hint)

    def _settle(self) -> None:
        """Wait for what is under way and commit it."""
        while (job := self._job) is not None:
            started = time.perf_counter()
            job.idle.wait()
            self._store.all_ready(True)
            job.blocked += time.perf_counter() - started
            self._advance(job)

    def _advance(self, job: _Job) -> None:
        """All ranks have written: let rank 0 publish. It has published: believe it."""
        started = time.perf_counter()
        try:
            if job.manifest is None:
                manifest = job.manifest = self._store.gather(job.attempt, job.error)
                self._give(job, lambda: self._store.publish(job.attempt, manifest))
                committed = None
            else:
                committed = self._store.conclude(job.attempt, job.manifest, job.verdict, job.error)
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
        self._worker.submit(lambda: self._tidy(committed))
        self._saved(
            Saved(
                committed.manifest,
                job.attempt.bytes_written,
                job.seconds,
                job.blocked,
                committed.warnings,
                committed.suspicion,
            )
        )

    def _give(self, job: _Job, work: Callable[[], Any]) -> None:
        job.idle.clear()
        self._worker.submit(lambda: job.run(work))

    def _write(self, job: _Job, digests: Mapping[tuple[str, str], str] | None) -> None:
        """On the thread: this rank's part."""
        try:
            self._store.write(job.attempt)
            if digests is not None:
                _compare(job.attempt, digests)
        finally:
            for _, _, source in self._share(job):
                source.release()

    def _tidy(self, committed: Committed) -> None:
        """On the thread: what a commit leaves to do."""
        try:
            self._leftover_warnings += [*self._store.tidy(committed), *self._tidied()]
        except Exception as error:
            self._leftover_warnings.append(f"tidying up failed: {type(error).__name__}: {error}")

    def _share(self, job: _Job) -> Iterator[tuple[str, str, LiveSource]]:
        for role, name in self._store.share(job.attempt):
            yield role, name, job.sources[role][name]

    def _digests(self, job: _Job) -> dict[tuple[str, str], str]:
        found = {}
        for role, name, source in self._share(job):
            hasher = xxhash.xxh3_128()
            for chunk in source.chunks():
                hasher.update(chunk)
            found[role, name] = hasher.hexdigest()
        return found

    def _note_failure(self, error: StorageError) -> None:
        self._unsaved = error
        self._failed(error)

    def _tell_warnings(self) -> None:
        while self._leftover_warnings:
            self._warned(self._leftover_warnings.pop(0))


def _compare(attempt: Attempt, digests: Mapping[tuple[str, str], str]) -> None:
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
