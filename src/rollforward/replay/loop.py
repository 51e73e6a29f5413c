"""What one start of a training loop writes and takes over: journal, checkpoints, and the proof of the replay.

`Recording` is created once it is known where the start begins. It knows steps, what is made once in each,
and their outcomes. `rollforward.library` enforces the order of calls.
"""

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollforward.agreement import AllGather
from rollforward.channel import AllSum
from rollforward.errors import CheckpointInvalid, InputError, NothingToResume, StorageError
from rollforward.position import Position
from rollforward.replay import metrics, once
from rollforward.replay import report as recovery_report
from rollforward.replay.arguments import other_loop
from rollforward.replay.cadence import Cadence
from rollforward.replay.comparing import Comparing, OnDivergence
from rollforward.replay.facts import fingerprint
from rollforward.replay.inheriting import FINISHED, JournalReport, note_failure, take_over
from rollforward.replay.metrics import MetricsFile
from rollforward.replay.recorded_steps import AFTER, CHUNKS, RecordedSteps, said
from rollforward.replay.recovery import Restored
from rollforward.replay.report import Recovering, RecoveryReport, make_report
from rollforward.replay.saving import JournaledCheckpoints
from rollforward.storage import Storage
from rollforward.store import CheckpointStore, Manifest, Retention
from rollforward.store.journal.records import Identity
from rollforward.store.place import settle_storage
from rollforward.store.saved import About
from rollforward.tensors import Held


class Ranks:
    """`grpo.ports.Group` of the processes that train together."""

    def __init__(
        self, rank: int, world_size: int, all_gather: AllGather, all_sum: AllSum | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.all_sum = all_sum
        self._all_gather = all_gather

    def all_gather(self, value: Any) -> list[Any]:
        """Each rank's value, on every rank."""
        return self._all_gather(value)

    def sharing(self) -> AbstractContextManager[None]:
        """Nobody watches."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How a loop is recorded; see `library.open_run`."""

    ranks: Ranks
    facts: dict[str, Any]
    versions: dict[str, str]
    retention: Retention
    prove_unchanged: bool
    on_divergence: OnDivergence
    log: Callable[[str], None]
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    until: Position | None = None
    """Replay up to here, and make nothing anew; see `rebuilding`."""

    def say(self, line: str) -> None:
        """Log a line; the first rank does it for all."""
        if self.ranks.rank == 0:
            self.log(line)

    def warn(self, text: str) -> None:
        """Log a warning; every rank logs its own."""
        which = f"rank {self.ranks.rank}: " if self.ranks.world_size > 1 else ""
        self.log(f"warning: {which}{text}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a start writes, and as whom."""

    storage: Storage
    incarnation: int
    fence: Callable[[], None]
    """See `CheckpointStore`."""
    opened: float
    """When the run was opened, by `time.perf_counter`."""
    remote: bool = False
    """See `CheckpointStore`."""
    left_behind: Mapping[str, float] = field(default_factory=dict)
    """What an earlier start had not shipped when it was last heard of; see `store.shipping`."""


@dataclass
class StepUnderWay:
    """A step that has begun, and what an earlier start recorded of it."""

    position: Position
    after: Position | None
    chunks: int = 0
    """Results of `once` so far."""
    making: str | None = None
    """The name of the result being made."""
    outcome: dict[str, float | str] | None = None
    """As it was recorded."""
    recorded_chunks: int | None = None
    recorded_by: Identity | None = None


class Recording:
    """Journal and checkpoints of this start; a `report.Replayed`. Creating one is collective.

    `start` is the first step, which comes after `after`. `restored` is the checkpoint that was loaded, None
    for a new run. `tensors` returns the live arrays and pieces.
    """

    def __init__(
        self,
        place: Place,
        settings: LoopSettings,
        *,
        run_id: str,
        start: Position,
        after: Position | None,
        restored: Restored | None,
        tensors: Callable[[], Held],
        not_saved: Callable[[], None],
    ) -> None:
        ranks = settings.ranks
        self.unreadable_chunks = 0
        """Chunks that the journal had, but that could not be used when needed."""
        self._place = place
        self._settings = settings
        self._recovering: Recovering | None = None
        self._metrics: MetricsFile | None = None
        """Opened with the first figures."""
        self._measured: metrics.Record = {}
        """The newest line."""
        self._metrics_written = True
        self._metrics_failed = False
        manifest = restored.manifest if restored else None
        identity = _identity(place, settings, run_id)
        opening = time.perf_counter()
        self._steps = RecordedSteps(start=start, after=after)
        self._journal, report = take_over(
            sources=(place.storage,) if restored else (),
            storage=place.storage,
            identity=identity,
            start=start,
            checkpoint=manifest.order if manifest else None,
            steps=self._steps,
            all_gather=ranks.all_gather,
        )
        self._until = report.until
        """No rank has a record of a later step."""
        seconds = time.perf_counter() - opening
        self.checkpoints = JournaledCheckpoints(
            _store(place, settings, manifest),
            self._journal,
            tensors,
            About(
                run_id=run_id,
                incarnation=place.incarnation,
                state={},
                fingerprint=identity.fingerprint,
                versions=settings.versions,
                attachments=settings.attachments,
            ),
            say=settings.say,
            warn=settings.warn,
            failed=not_saved,
            cadence=Cadence(kept=settings.retention.every),
        )
        self._comparing = Comparing(
            identity,
            notice=lambda text: settings.warn(f"journal: {text}"),
            on_divergence=settings.on_divergence,
            to_accept='on_divergence="accept"',
        )
        for line in (*report.repaired, *report.problems):
            settings.say(f"journal: {line}")
        if restored is not None:
            self._recovering = self._recover(restored, report, seconds)

    @property
    def replayed_updates(self) -> int:
        """Updates whose outcome was compared with a recorded one."""
        return self._comparing.replayed

    @property
    def repeated_updates(self) -> int:
        """Those of them that gave the same bits."""
        return self._comparing.repeated

    def expected(self) -> list[Position]:
        """The steps that a loop must take first: those that are replayed, and the one after them."""
        under_way = self._steps.under_way
        steps = [*self._steps.replayed, *([under_way] if under_way is not None else [])]
        return steps or [self._steps.start]

    def begin(self, position: Position, after: Position | None) -> StepUnderWay:
        """Begin a step. Collective until the replay is over."""
        self.reached(position)
        step = StepUnderWay(position, after)
        try:
            record = self._journal.find_outcome(position, 0)
            if record is not None:
                chunks = record.number(CHUNKS)
                place = self._journal.inherited.outcomes[position, 0]
                step.outcome = {name: float(array) for name, array in record.arrays.items()}
                step.recorded_chunks = chunks
                step.recorded_by = self._journal.inherited.headers[place.segment.name].identity
        except (CheckpointInvalid, ValueError, TypeError) as error:
            self._settings.warn(f"journal: step {position} is replayed without proof: {error}")
        return step

    def reached(self, position: Position) -> None:
        """Note that all steps before this one are over. Collective until the replay is over."""
        if self._recovering is not None:
            self._recovering.begins(position)

    def once(self, step: StepUnderWay, name: str, make: Callable[[], Any], *, together: bool) -> Any:
        """The next recorded result of this step; otherwise a new one, by then on stable storage.

        Collective if `together`: unless all ranks have it recorded, all make it.
        """
        where = f"step {step.position}: {name!r}"
        number = step.chunks
        if step.recorded_chunks is not None and number >= step.recorded_chunks:
            other_loop(
                f"{where} would be result {number + 1} of once; "
                f"the step was recorded with {step.recorded_chunks}"
            )
        found = self._find(step, number, name)
        if together and step.position <= self._until:
            all_have_it = all(self._settings.ranks.all_gather(found is not None))
            if found is not None and not all_have_it:
                self.unreadable_chunks += 1
                found = None
        if found is None:
            if self._settings.until is not None:
                raise NothingToResume(
                    f"{where} is not in the journal, so {self._settings.until} cannot be reached",
                    hint="rollforward history has the steps that there are; use the run's own command",
                )
            step.making = name
            try:
                made = make()
            finally:
                step.making = None
            try:
                arrays, metadata = once.pack(made)
                about = {once.NAME: name, AFTER: said(step.after)}
                self._journal.append(step.position, number, arrays, {**metadata, **about})
            except ValueError as error:
                raise InputError(
                    f"{where}: the result cannot be stored: {error}",
                    hint="return an array, arrays by name, or a pair of one of these and a JSON value",
                ) from error
            found = [once.unpack(arrays, metadata)]
        step.chunks += 1
        return found[0]

    def end(self, step: StepUnderWay, values: Mapping[str, float]) -> None:
        """End the step: its figures are written, and its outcome is compared with the record, or recorded."""
        self.write_metrics()
        if step.recorded_chunks is not None and step.chunks != step.recorded_chunks:
            other_loop(
                f"step {step.position} ends after {step.chunks} results of once; it was recorded with "
                f"{step.recorded_chunks}"
            )
        if step.outcome is not None and step.recorded_by is not None:
            where, given = f"step {step.position}", dict[str, float | str](values)
            if self._comparing.repeats(where, given, step.outcome, step.recorded_by):
                return
        arrays = {name: np.array(value, np.float64) for name, value in values.items()}
        metadata = {CHUNKS: str(step.chunks), AFTER: said(step.after)}
        self._journal.record(step.position, 0, arrays, metadata)

    def measured(self, position: Position, global_step: int, figures: Mapping[str, float]) -> None:
        """Note a step's figures, on the first rank; `write_metrics` makes a line of them."""
        if self._settings.ranks.rank != 0:
            return
        if self._measured and metrics.place_of(self._measured) != position:
            self._measured = {}
        if self._metrics is None:
            self._metrics = self._open_metrics()
        self._measured = {
            **self._measured,
            "epoch": position.epoch,
            "step": position.step,
            "global_step": global_step,
            **figures,
            "incarnation": self._place.incarnation,
            "time": round(time.time(), 3),
        }
        self._metrics_written = False

    def write_metrics(self) -> None:
        """Write the newest step's line durably. A file that cannot be written is no reason to stop."""
        if self._metrics is None or self._metrics_written:
            return
        self._metrics_written = True
        try:
            self._metrics.append(self._measured)
        except StorageError as error:
            self._no_metrics(error)

    def _open_metrics(self) -> MetricsFile | None:
        if self._metrics_failed:
            return None
        try:
            kept = metrics.before(metrics.read_from(self._place.storage), self._steps.start)
            return MetricsFile(self._place.storage, kept)
        except StorageError as error:
            self._no_metrics(error)
            return None

    def _no_metrics(self, error: StorageError) -> None:
        """Only the first rank writes them: if it stopped here, the others would wait for it."""
        self._settings.warn(f"no more figures are written to {metrics.FILE} in this start: {error.message}")
        self._metrics_failed = True
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def close(self, steps: int, last: Position | None) -> None:
        """Commit the save in progress, and record that the run ended after this many steps. Collective."""
        if last is not None:
            self.reached(self._steps.behind(last))
        self.checkpoints.close()
        self._journal.note(None, FINISHED, {"steps": steps})
        settle_storage(self._place.storage)

    def abandon(self, error: BaseException) -> None:
        """Commit nothing more; record which error ends this start."""
        self.checkpoints.abandon()
        if isinstance(error, Exception):
            note_failure(self._journal, error)

    def let_go(self) -> None:
        """Close the files."""
        self._journal.close()
        if self._metrics is not None:
            self._metrics.close()

    def _find(self, step: StepUnderWay, number: int, name: str) -> list[Any] | None:
        """What an earlier start recorded, in a list; None when there is nothing, or it cannot be read."""
        where = f"step {step.position}"
        try:
            record = self._journal.find_rollouts(step.position, number)
            if record is None:
                return None
            found = once.unpack(once.copied(record), record.metadata)
        except (CheckpointInvalid, ValueError) as error:
            self.unreadable_chunks += 1
            self._settings.warn(f"journal: {where}, {name!r} is run again: {error}")
            return None
        recorded, after = record.metadata.get(once.NAME), record.metadata.get(AFTER)
        if recorded != name:
            other_loop(f"{where}: once({name!r}) where {recorded!r} was recorded")
        if after != said(step.after):
            other_loop(
                f"{where} comes after {said(step.after) or 'none'}; it was recorded after {after or 'none'}"
            )
        return [found]

    def _recover(self, restored: Restored, journal: JournalReport, seconds: float) -> Recovering:
        """Reports what the run resumes from, and when the replay is over. Collective."""
        ranks = self._settings.ranks

        def keep(report: RecoveryReport) -> None:
            if ranks.rank == 0:
                try:
                    recovery_report.keep(self._place.storage, report)
                except StorageError as error:
                    self._settings.warn(f"the report of the recovery is not kept: {error.message}")

        report = make_report(
            restored,
            journal,
            incarnation=self._place.incarnation,
            workers=ranks.world_size,
            end=journal.finished,
            bytes_restored=sum(ranks.all_gather(sum(restored.role_bytes.values()))),
            seconds={"find": restored.find_seconds, "load": restored.seconds, "journal": seconds},
            left_behind=self._place.left_behind,
        )
        return Recovering(
            report,
            self,
            ranks,
            following=self._steps.behind,
            say=self._settings.say,
            keep=keep,
            age=lambda: time.perf_counter() - self._place.opened,
        )


def _identity(place: Place, settings: LoopSettings, run_id: str) -> Identity:
    """As what this rank writes its journal."""
    return Identity(
        run_id=run_id,
        rank=settings.ranks.rank,
        world_size=settings.ranks.world_size,
        incarnation=place.incarnation,
        fingerprint=fingerprint(settings.facts),
        versions=settings.versions,
        device=platform.machine(),
    )


def _store(place: Place, settings: LoopSettings, previous: Manifest | None) -> CheckpointStore:
    """Where checkpoints go, with `meta.json` as the newest one says."""
    ranks = settings.ranks
    store = CheckpointStore(
        place.storage,
        rank=ranks.rank,
        world_size=ranks.world_size,
        exchange=ranks.all_gather,
        all_sum=ranks.all_sum,
        retention=settings.retention,
        previous=previous,
        fence=place.fence,
        remote=place.remote,
    )
    for warning in store.derive_meta():
        settings.warn(warning)
    return store
