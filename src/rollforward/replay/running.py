"""An open run of somebody else's loop: the order of its calls, and what each of them does.

`Run` enforces the order and keeps the live tensors; `loop.Recording` has what is written and taken over. The
reader's view, with the whole loop, is in `rollforward.library`.
"""

import contextlib
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from rollforward.agreement import together
from rollforward.errors import InputError, NothingToResume
from rollforward.position import Position
from rollforward.replay.arguments import (
    Step,
    as_json,
    as_number,
    as_position,
    check_same_layout,
    check_tensors,
    misuse,
    other_loop,
)
from rollforward.replay.cadence import Every
from rollforward.replay.facts import changes
from rollforward.replay.loop import LoopSettings, Place, Recording, StepUnderWay
from rollforward.replay.metrics import PLACE
from rollforward.replay.rebuilding import Rebuilt
from rollforward.replay.recorded_steps import said
from rollforward.replay.recovery import Arrays, Restored, restore
from rollforward.store.catalog import named_positions
from rollforward.store.guests import adopt
from rollforward.store.journal.history import history
from rollforward.store.journal.reading import journal_ranks
from rollforward.store.manifest import digest_of_arrays
from rollforward.tensors import Held, Tensors, arrays_of

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a resumed run continues, as `Run.restore` found it."""

    position: Position
    """(epoch, step) of the next step; the epoch is 0 in a loop that only counts steps."""
    state: Mapping[str, Any]
    """The `state` that `Run.checkpoint` was given."""
    free: Tensors = field(default_factory=dict)
    """role -> name -> array, of the `free` roles: new arrays, as they were given to `Run.checkpoint`."""

    @property
    def step(self) -> int:
        """The number of the next step, in its epoch."""
        return self.position.step

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.position.epoch


class Run:
    """An open run: what `open_run` returns. Use it as a context manager.

    When the `with` block ends, a checkpoint under way is committed and the folder is unlocked. After an
    error nothing more is committed: the next start recovers. Calls out of order raise InputError.
    """

    def __init__(self, place: Place, settings: LoopSettings, *, release: Callable[[], None]) -> None:
        self._place = place
        self._settings = settings
        self._release = release
        self._closed = False
        self._tensors: Held | None = None
        """The live ones; None until `restore` is called."""
        self._free: frozenset[str] = frozenset()
        """Roles whose tensors may differ from checkpoint to checkpoint."""
        self._restored = False
        self._digests: dict[str, str] | None = None
        self._recording: Recording | None = None
        """None until there is something to continue from: in a new run, until its first step."""
        self._expected: list[Position] = []
        """The steps that must come next, if known."""
        self._under_way: StepUnderWay | None = None
        self._last: Position | None = None
        """The newest step that is over."""
        self._done = 0
        """Steps done, over all starts."""
        self._saved: Position | None = None
        """The newest checkpoint that was started or restored."""
        self._updating = False

    def restore(self, tensors: Held, *, free: Collection[str] = ()) -> Start | None:
        """Read the newest checkpoint that proves intact into the arrays; None for a new run. Collective.

        `tensors`: role -> name -> writable array, or `Piece` of one, in the run's shapes and dtypes. They are
        the live tensors that the loop trains. When the first step of a new run begins, their content is saved
        as its first checkpoint; until then they may still be initialised.
        `free`: roles whose tensors may have other names and shapes in each checkpoint, or be missing, such as
        an optimizer that makes its moments in its first step. They are not in `tensors` here, but returned in
        `Start.free`; `checkpoint` is given them together with the others.

        Raises NothingToResume when there are checkpoints and none is intact, CheckpointMismatch when they are
        of other tensors or of another number of processes.
        """
        self._check_open()
        if self._tensors is not None:
            misuse("restore was called twice; call it once, before the first step")
        check_tensors(tensors, writeable=True)
        if both := sorted(set(free) & tensors.keys()):
            misuse(f"{both} are among the tensors and among the free roles")
        self._tensors, self._free = tensors, frozenset(free)
        if self._is_new():
            self._settings.say(f"run: {self._place.storage} is new")
            start = None
        else:
            ranks = self._settings.ranks
            found = restore(
                self._place.storage,
                Arrays(tensors, ranks),
                saved_by=ranks.world_size,
                free=self._free,
            )
            start = self._go_on(found)
        # After an error the arrays do not hold a state of the run, and nothing may be recorded on top of it.
        self._restored = True
        return start

    def once(self, step: Step, name: str, make: Callable[[], T], *, together: bool = False) -> T:
        """The result of `make`, or what an earlier start recorded as that.

        `make` returns arrays by name, one array, or a pair of either and a small JSON value, in any dtype
        that safetensors has. `once` returns the same form, dtypes, shapes and bits whether the result is new
        or recorded, in arrays of its own (C-contiguous, writable). The result is on stable storage by then.

        A step may call it several times. Results are identified by the order of the calls, and a replay
        checks the names. `make` must not communicate with other processes, since some may not call theirs;
        unless `together`: then the call is collective, and either all processes call theirs or none does.
        """
        under_way = self._at(step)
        if under_way.making is not None:
            misuse(f"step {under_way.position}: once({name!r}) was called inside once({under_way.making!r})")
        made: T = self._begun().once(under_way, name, make, together=together)
        return made

    @property
    def until(self) -> Position | None:
        """Where `rollforward rebuild` wants the state: call `checkpoint` before this step. Otherwise None."""
        return self._settings.until

    @contextlib.contextmanager
    def updating(self, step: Step) -> Iterator[None]:
        """Change the tensors in here, and nowhere else. Collective, on entry and on exit."""
        under_way = self._at(step)
        self._check_unchanged(f"before the update of step {under_way.position}")
        self._begun().checkpoints.before_update()
        self._updating = True
        yield
        # It stays so after an error: the arrays do not hold a state of the run then.
        self._updating = False
        self._note_digests()
        self._begun().checkpoints.boundary()

    def outcome(self, step: Step, /, **values: float) -> None:
        """End the step and record its numbers, as float64. A replay has to give the same bits.

        Raises ReplayDiverged, which names the values that differ, and versions that changed since.
        """
        self._at(step)
        self._end_step({name: as_number(name, value) for name, value in values.items()})

    def metrics(self, step: Step, /, **figures: float) -> None:
        """Write a step's figures to `metrics.jsonl`, where the verbs that show a run read them.

        `step` is the step under way, whose line is written when it ends, or the newest one that is over,
        whose line is written now: call it before the checkpoint that holds the step. Figures of one step may
        come in several calls. A resumed run has each step's line once. Only the first process writes.
        """
        position = as_position(step)
        self._check_ready()
        under_way = self._under_way is not None and self._under_way.position == position
        if not under_way and position != self._last:
            misuse(f"metrics of step {position}, which is neither under way nor the newest one")
        number = self._done if under_way else self._done - 1
        if taken := sorted(figures.keys() & set(PLACE)):
            misuse(f"metrics cannot be named {taken}: these say where a line belongs")
        numbers = {name: as_number(name, value) for name, value in figures.items()}
        self._begun().measured(position, number, numbers)
        if not under_way:
            self._begun().write_metrics()

    def checkpoint(
        self,
        step: Step,
        tensors: Held,
        *,
        every: Every | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the state before `step`, the one that comes next. Collective.

        Writing begins here, straight from the arrays, and continues in the background. The checkpoint is
        committed at the end of a later `updating`, or of the run. A failure is logged, and raised at the end
        of the run unless a newer checkpoint succeeds.

        `tensors`: those of `restore`, or new arrays of the same layout, which are the live ones from now on;
        and those of the free roles.
        `every`: save only when the number of finished steps is a multiple of this; None: always. "auto": as
        often as saving costs at most 2 % of the time, by what is measured; ask after each step then. A save
        that is due while the last is still being written begins after a later step; the log says so.
        `state`: a JSON object that `Start.state` returns, the same on all processes. `Retention.best` goes by
        its `metrics`, name -> number.
        """
        position = as_position(step)
        self._check_ready()
        if every is not None and every != "auto" and every < 1:
            misuse(f"a checkpoint every {every} steps")
        last = self._last if self._under_way is None else self._under_way.position
        if last is not None and position <= last:
            misuse(f"checkpoint {position} after step {last}: name the step that comes next")
        check_tensors(tensors, writeable=False)
        check_same_layout(self._fixed(tensors), self._fixed(self._live()))
        if self._under_way is not None:
            self._end_step({})
        self._expect(position, f"checkpoint {position}")
        self._check_unchanged(f"before checkpoint {position}")
        self._tensors = tensors
        self._note_digests()
        self._expected = self._expected or [position]
        if self._recording is None:
            self._begin_run(position, state)
            return
        self._recording.reached(position)
        if self.until is not None and position >= self.until:
            self._rebuilt(position, state)
        checkpoints = self._recording.checkpoints
        if position != self._saved and (every is None or checkpoints.due(self._done, every)):
            self._saved = position
            checkpoints.begin(position, self._done, self._state(state))

    def close(self) -> None:
        """Commit a checkpoint under way and unlock the folder. Collective; closing twice does nothing.

        Raises StorageError when the newest checkpoint could not be saved.
        """
        if self._closed:
            return
        try:
            if self._updating:
                misuse("the run is closed inside updating")
            if self._recording is not None:
                self._check_unchanged("before the run was closed")
                self._recording.close(self._done, self._last)
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

    def _rebuilt(self, position: Position, state: Mapping[str, Any] | None) -> NoReturn:
        """Save what `rollforward rebuild` asked for, and end the program."""
        if position != self.until:
            misuse(f"checkpoint {position} follows the step before {self.until}, which is to be rebuilt")
        self._begun().checkpoints.begin(position, self._done, self._state(state))
        self.close()
        raise Rebuilt(0)

    # Where the run begins or resumes

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
        """Start a new run: the arrays' current content is saved before anything else. Collective."""
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
                hint="name another folder; rollforward train --resume_training resumes its own runs",
            )
        for line in changes(manifest.state.get("facts", {}), settings.facts):
            settings.warn(f"since the checkpoint was saved {line}")
        for line in changes(manifest.versions, settings.versions):
            settings.warn(f"the version of {line}; results may differ in their last bits")
        self._last = Position.parse(own["after"]) if own["after"] else None
        self._done, self._saved = manifest.global_step, manifest.position
        self._expected = self._record(manifest.run_id, manifest.position, restored).expected()
        self._note_digests()
        return Start(position=manifest.position, state=own["state"], free=restored.free)

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
        """The step; begins it if it is the next one."""
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
        if self.until is not None and position >= self.until:
            misuse(
                f"step {position} begins and {self.until} is to be rebuilt: call checkpoint after each step"
            )
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
            other_loop(f"{what} where step {self._expected[0]} is expected")

    def _check_open(self) -> None:
        if self._closed:
            misuse("the run is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._restored:
            misuse("call restore first, in a new run too")
        if self._updating:
            misuse("an update is under way: leave updating first; after an error in it, end the run")

    # What the run holds

    def _live(self) -> Held:
        assert self._tensors is not None
        return self._tensors

    def _fixed(self, tensors: Held) -> Held:
        return {role: named for role, named in tensors.items() if role not in self._free}

    def _begun(self) -> Recording:
        assert self._recording is not None
        return self._recording

    def _not_saved(self) -> None:
        self._saved = None

    def _state(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a checkpoint stores besides its tensors."""
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
                misuse(f"{when}: changed outside updating: {', '.join(changed[:8])}")

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


def _digests(held: Held) -> dict[str, str]:
    return {
        f"{role} {name}": digest_of_arrays({name: array})
        for role, named in arrays_of(held).items()
        for name, array in named.items()
    }
