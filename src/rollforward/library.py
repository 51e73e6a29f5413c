"""Crash recovery for a training loop of your own: `open_run`.

    import rollforward

    tensors = {"policy": {"w": w}, "optimizer": {"m": m, "v": v}}    # NumPy arrays: role -> name -> array

    with rollforward.open_run("output/run", facts={"lr": lr, "seed": seed}) as run:
        start = run.restore(tensors)                       # the newest intact checkpoint, into the arrays
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "rollouts", lambda: sample(w, step))    # kept before it is used
            with run.updating(step):                       # weights change only in here
                loss = update(tensors, batch)
            run.outcome(step, loss=loss)                   # a replay has to repeat it, to the last bit
            run.checkpoint(step + 1, tensors, every=10)    # written while the next step samples

Killed anywhere and started again, the loop goes on from the newest checkpoint that proves intact. Steps that
had been finished since are replayed: `once` gives back what was recorded, so nothing is sampled again, the
update runs, and what it gives is compared with what was recorded, bit by bit. The run ends with the bytes it
would have had.

What the loop has to keep to: `update`, and all that stands outside `once`, is a function of the tensors, the
batch and `facts`; a random number is keyed by the step, or drawn inside `once`. Steps are numbers, or pairs
(epoch, step), and only ever go up.

With several processes each of them runs the same loop on the same tensors (data-parallel training); the calls
that are collective say so. Left out: tensors that are split over processes, and starting with another number
of them.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from rollforward.agreement import AllGather, together
from rollforward.errors import InputError, NothingToResume
from rollforward.position import Position
from rollforward.replay.arguments import (
    Step,
    as_json,
    as_number,
    as_position,
    check_alike,
    check_same_layout,
    check_tensors,
    misuse,
    other_loop,
)
from rollforward.replay.comparing import OnDivergence
from rollforward.replay.facts import changes
from rollforward.replay.loop import LoopSettings, Place, Ranks, Recording, StepUnderWay
from rollforward.replay.recorded_steps import said
from rollforward.replay.recovery import Arrays, Restored, restore
from rollforward.replay.saving import named_positions
from rollforward.storage import LocalStorage
from rollforward.store import Retention, RunLock
from rollforward.store.checkpoints import Tensors
from rollforward.store.cleaning import remove_strays
from rollforward.store.guests import adopt
from rollforward.store.journal.history import history, journal_ranks
from rollforward.store.manifest import digest_of_arrays

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run goes on: what `Run.restore` put in place."""

    position: Position
    """(epoch, step) of the step to do next; the epoch is 0 for a loop that counts steps only."""
    state: Mapping[str, Any]
    """What `Run.checkpoint` was given as `state`."""

    @property
    def step(self) -> int:
        """The step to do next, in its epoch."""
        return self.position.step

    @property
    def epoch(self) -> int:
        """The epoch of the step to do next."""
        return self.position.epoch


def open_run(
    path: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    all_gather: AllGather | None = None,
    facts: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    keep: int | Retention = 5,
    prove_unchanged: bool = False,
    on_divergence: OnDivergence = "stop",
    log: Callable[[str], None] | None = None,
) -> "Run":
    """Open a run's folder, new or not, and hold it until the run is closed. Collective.

    `rank`, `world_size`, `all_gather`: this process among those that train together; `all_gather(value)`
    gives each process's value (anything JSON can hold) on all of them, in the order of ranks.
    `facts`: what influences the numbers, for JSON: hyperparameters, seed, a digest of the data. When they
    changed the resume names them, and nothing that was recorded with others is replayed.
    `versions`: of what computes, besides NumPy; where they changed a replay is compared with a tolerance.
    `keep`: how many checkpoints stay, or a `rollforward.store.Retention`.
    `prove_unchanged`: digest all tensors after each update and again before the next, to find what changes
    them outside `updating`; a pass over memory each.
    `on_divergence`: what to do when a replay gives other bits than were recorded: "stop", or "accept" them.
    `log` is told what happens, a line at a time; by default `logging.getLogger("rollforward")` is.

    Raises RunLocked when another process holds the folder, InputError for what cannot be meant, StorageError.
    """
    if all_gather is None:
        if world_size != 1:
            misuse("a run of several processes needs all_gather, by which they agree")
        all_gather = _alone
    if not 0 <= rank < world_size:
        misuse(f"rank {rank} of {world_size} processes")
    if on_divergence not in ("stop", "accept"):
        misuse(f"on_divergence is {on_divergence!r}; it is 'stop' or 'accept'")
    settings = LoopSettings(
        ranks=Ranks(rank, world_size, all_gather),
        facts=as_json("facts", facts or {}),
        versions={"numpy": np.__version__, **(versions or {})},
        retention=keep if isinstance(keep, Retention) else Retention(newest=keep),
        prove_unchanged=prove_unchanged,
        on_divergence=on_divergence,
        log=log or _to_logger,
    )
    folder = Path(path).expanduser()
    opened = time.perf_counter()
    with contextlib.ExitStack() as stack:

        def acquire() -> RunLock | None:
            if rank != 0:
                return None
            lock = stack.enter_context(RunLock.acquire(folder))
            if lock.taken_over is not None:
                settings.say(f"lock: taken over, its owner ended without letting go: {lock.taken_over}")
            remove_strays(LocalStorage(folder))
            return lock

        lock, answers = together(
            acquire,
            all_gather,
            tell=lambda lock: [rank, world_size, settings.facts, lock.incarnation if lock else 0],
        )
        check_alike(answers, world_size)
        place = Place(
            storage=LocalStorage(folder),
            incarnation=answers[0][-1],
            fence=lock.check if lock else _nothing,
            opened=opened,
        )
        return Run(place, settings, release=stack.pop_all().close)


class Run:
    """A run that is open; made by `open_run`, used as a context manager.

    When the `with` block ends, what is under way is committed and the folder let go. After an error nothing
    more is committed: the next start recovers. A call that is not in the order which the module describes
    raises InputError.
    """

    def __init__(self, place: Place, settings: LoopSettings, *, release: Callable[[], None]) -> None:
        self._place = place
        self._settings = settings
        self._release = release
        self._closed = False
        self._tensors: Tensors | None = None
        """The live ones; None until `restore`."""
        self._digests: dict[str, str] | None = None
        self._recording: Recording | None = None
        """None until there is something to go on from: in a new run, until its first step."""
        self._expected: list[Position] = []
        """The steps that have to come next, where that is known."""
        self._under_way: StepUnderWay | None = None
        self._last: Position | None = None
        """The newest step that is over."""
        self._done = 0
        """Steps, over all starts."""
        self._saved: Position | None = None
        """The newest checkpoint that was begun or restored."""
        self._updating = False

    def restore(self, tensors: Tensors) -> Start | None:
        """Read the newest checkpoint that proves intact into the arrays; None for a new run. Collective.

        `tensors`: role -> name -> writable array, of the shapes and dtypes that the run has; they are the
        live ones, in which the loop trains. A run is new until its first step begins: the arrays as they
        are then are its first checkpoint, saved before anything else is.

        Raises NothingToResume when there are checkpoints and none is intact, CheckpointMismatch when they are
        of other tensors or of another number of processes.
        """
        self._check_open()
        if self._tensors is not None:
            misuse("restore was called before; a run is restored once, before its first step")
        check_tensors(tensors, writeable=True)
        self._tensors = tensors
        if self._is_new():
            self._settings.say(f"run: {self._place.storage} is new")
            return None
        return self._go_on(restore(self._place.storage, Arrays(tensors, self._settings.ranks)))

    def once(self, step: Step, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once: from the journal when an earlier start of the run finished it.

        `make` returns arrays by name, one array, or a pair of either and a small JSON value; any dtype that
        safetensors has will do. What `once` returns has the same form, dtypes, shapes and bits every time,
        in arrays of its own. It is on stable storage when this returns.

        A step may have several, told apart by the order of the calls; a replay checks the names. `make`
        must not communicate with the other processes: some of them may have theirs already.
        """
        under_way = self._at(step)
        if under_way.making is not None:
            misuse(f"step {under_way.position}: once({name!r}) was called inside once({under_way.making!r})")
        made: T = self._begun().once(under_way, name, make)
        return made

    @contextlib.contextmanager
    def updating(self, step: Step) -> Iterator[None]:
        """Where the tensors may change, and nowhere else. Collective, on entry and on exit."""
        under_way = self._at(step)
        self._check_unchanged(f"before the update of step {under_way.position}")
        self._begun().checkpoints.before_update()
        self._updating = True
        yield
        # After an error it stays so: what the arrays hold then is no state of the run.
        self._updating = False
        self._note_digests()
        self._begun().checkpoints.boundary()

    def outcome(self, step: Step, /, **values: float) -> None:
        """Record what the step gave, as float64; its last call. In a replay it has to have the same bits.

        ReplayDiverged names the values that differ and what is not as it was at the recording.
        """
        self._at(step)
        self._end_step({name: as_number(name, value) for name, value in values.items()})

    def checkpoint(
        self,
        step: Step,
        tensors: Tensors,
        *,
        every: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the state before `step`, the one that comes next. Collective.

        `every`: only after each so many steps, counted over all starts; None: now. Writing begins here,
        straight from the arrays, and is committed at the end of a later `updating`, or of the run. A
        failure is told in the log, and raised at the end of the run if nothing newer could be saved.
        `tensors`: those of `restore`, or others of the same layout, which are the live ones from now on.
        `state`: what `Start.state` is to hold, for JSON; the same on all processes. Its `metrics`, names
        with numbers, are what `Retention.best` goes by.
        """
        position = as_position(step)
        self._check_ready()
        if every is not None and every < 1:
            misuse(f"a checkpoint every {every} steps")
        last = self._last if self._under_way is None else self._under_way.position
        if last is not None and position <= last:
            misuse(f"checkpoint {position} after step {last}: it is named after the step that comes next")
        check_tensors(tensors, writeable=False)
        check_same_layout(tensors, self._live())
        if self._under_way is not None:
            self._end_step({})
        self._expect(position, f"checkpoint {position}")
        self._check_unchanged(f"before checkpoint {position}")
        self._tensors = tensors
        self._note_digests()
        self._expected = self._expected or [position]
        if self._recording is None:
            self._begin_run(position, state)
        elif position != self._saved and (every is None or self._done % every == 0):
            self._saved = position
            self._recording.checkpoints.begin(position, self._done, self._state(state))

    def close(self) -> None:
        """Commit what is under way and let the folder go. Collective; closing twice does nothing.

        StorageError when the newest state could not be saved.
        """
        if self._closed:
            return
        try:
            if self._updating:
                misuse("the run is closed inside updating")
            if self._recording is not None:
                self._check_unchanged("before the run was closed")
                self._recording.close(self._done)
        except BaseException as error:
            self._abandon(error)
            raise
        self._let_go()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            self._abandon(error)

    # Where the run begins, and where it goes on

    def _is_new(self) -> bool:
        """Whether there is no checkpoint, as the first rank sees it. Collective."""
        storage, ranks = self._place.storage, self._settings.ranks

        def look() -> bool:
            if ranks.rank != 0 or named_positions(storage):
                return False
            for rank in journal_ranks(storage):
                if any(start.first is not None for start in history(storage, rank)):
                    raise NothingToResume(
                        f"{storage} has the journal of a run, but no checkpoint: commits/ is empty or gone",
                        hint="put commits/ back, or name another folder for a new run",
                    )
            adopt(storage)
            return True

        new: bool = together(look, ranks.all_gather)[1][0]
        return new

    def _begin_run(self, position: Position, state: Mapping[str, Any] | None = None) -> None:
        """The first step of a new run: what the arrays hold now is saved before anything else. Collective."""
        run_id = self._settings.ranks.all_gather(uuid.uuid4().hex)[0]
        self._done = position.step if position.epoch == 0 else 0
        self._note_digests()
        recording = self._record(run_id, position, None)
        recording.checkpoints.save_now(position, self._done, self._state(state))
        self._saved = position

    def _go_on(self, restored: Restored) -> Start:
        manifest, settings = restored.manifest, self._settings
        for position, reason in restored.rejected:
            settings.warn(f"checkpoint {position} was rejected: {reason}")
        own = manifest.state.get("library")
        if not isinstance(own, dict):
            raise InputError(
                f"{self._place.storage} holds a run that open_run did not write",
                hint="name another folder; rollforward train --resume_training goes on with its own runs",
            )
        for line in changes(manifest.state.get("facts", {}), settings.facts):
            settings.warn(f"since the checkpoint was saved {line}")
        for line in changes(manifest.versions, settings.versions):
            settings.warn(f"the version of {line}; results may differ in their last bits")
        self._last = Position.parse(own["after"]) if own["after"] else None
        self._done, self._saved = manifest.global_step, manifest.position
        self._expected = self._record(manifest.run_id, manifest.position, restored).expected()
        self._note_digests()
        return Start(position=manifest.position, state=own["state"])

    def _record(self, run_id: str, start: Position, restored: Restored | None) -> Recording:
        self._recording = Recording(
            self._place,
            self._settings,
            run_id=run_id,
            start=start,
            after=self._last,
            restored=restored,
            tensors=self._live,
            not_saved=self._not_saved,
        )
        return self._recording

    # Steps

    def _at(self, step: Step) -> StepUnderWay:
        """The step, begun if it is the next one."""
        position = as_position(step)
        self._check_ready()
        under_way = self._under_way
        if under_way is not None and under_way.position == position:
            return under_way
        last = self._last if under_way is None else under_way.position
        if last is not None and position <= last:
            misuse(
                f"the outcome of step {position} was recorded already"
                if position == last
                else f"step {position} comes after step {last}: steps only go up"
            )
        if under_way is not None:
            self._end_step({})
        self._expect(position, f"step {position}")
        if self._recording is None:
            self._begin_run(position)
        del self._expected[:1]
        self._under_way = self._begun().begin(position, self._last)
        return self._under_way

    def _end_step(self, values: Mapping[str, float]) -> None:
        assert self._under_way is not None
        self._begun().end(self._under_way, values)
        self._last, self._under_way = self._under_way.position, None
        self._done += 1

    def _expect(self, position: Position, what: str) -> None:
        if self._expected and position != self._expected[0]:
            other_loop(f"{what} comes where step {self._expected[0]} is next")

    def _check_open(self) -> None:
        if self._closed:
            misuse("the run is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if self._tensors is None:
            misuse("the run is not restored yet: call restore first, in a new run too")
        if self._updating:
            misuse("an update is under way: leave updating first; after an error in it, close the run")

    # What the run holds

    def _live(self) -> Tensors:
        assert self._tensors is not None
        return self._tensors

    def _begun(self) -> Recording:
        assert self._recording is not None
        return self._recording

    def _not_saved(self) -> None:
        self._saved = None

    def _state(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a checkpoint says besides its tensors."""
        own = as_json("state", state or {})
        metrics = own.get("metrics")
        return {
            "facts": self._settings.facts,
            "library": {"after": said(self._last), "state": own},
            "metrics": metrics if isinstance(metrics, dict) else {},
        }

    def _note_digests(self) -> None:
        if self._settings.prove_unchanged:
            self._digests = _digests(self._live())

    def _check_unchanged(self, when: str) -> None:
        if self._digests is not None:
            now = _digests(self._live())
            changed = [name for name, found in self._digests.items() if now[name] != found]
            if changed:
                misuse(f"{when}, outside updating, these changed: {', '.join(changed[:8])}")

    def _abandon(self, error: BaseException) -> None:
        try:
            if self._recording is not None:
                self._recording.abandon(error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._closed = True
        try:
            if self._recording is not None:
                self._recording.let_go()
        finally:
            self._release()


def _digests(tensors: Tensors) -> dict[str, str]:
    return {
        f"{role} {name}": digest_of_arrays({name: array})
        for role, named in tensors.items()
        for name, array in named.items()
    }


def _alone(value: Any) -> list[Any]:
    return [value]


def _nothing() -> None:
    """The first rank alone publishes, and it alone is fenced."""


def _to_logger(line: str) -> None:
    level = logging.WARNING if line.startswith("warning: ") else logging.INFO
    logging.getLogger("rollforward").log(level, line)
