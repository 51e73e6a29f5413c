"""The journals that the crash tests crash, and what must hold after every crash.

A script drives one rank through starts, steps, checkpoints, removals, kills in the middle of an
append, returns to older checkpoints and changes of the configuration. `SCRIPT` has all of that;
`random_script` makes others.
"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from crash_states import DiskModel, Tree, crash_states
from journal_case import SETTINGS, chunk, open_log, outcome
from simulated_disk import Killed, SimulatedDisk

from rollforward.grpo.types import RolloutChunk
from rollforward.position import Position
from rollforward.replay.codec import pack, unpack_outcome
from rollforward.storage import LocalStorage, Storage
from rollforward.store.journal.reading import Key, read_journal
from rollforward.store.journal.segments import read_record

ROOT = "/data/run"

FIRST = Position(0, 0)

Open = Callable[[SimulatedDisk], Storage]
Content = dict[Key, int]
"""What a start has of each chunk: the seed that it was made from."""


def open_storage(disk: SimulatedDisk) -> Storage:
    return LocalStorage(ROOT, disk)


def step(number: int) -> Position:
    return Position(0, number)


@dataclass(frozen=True)
class Promise:
    """What was reported as durable: records of an incarnation, those it inherited included."""

    incarnation: int = 0
    chunks: frozenset[Key] = frozenset()
    outcomes: frozenset[Position] = frozenset()
    """Steps whose outcome was written or found before the newest chunk or checkpoint was reported."""
    oldest: Position = FIRST
    """Chunks before this may have been removed."""
    worked: int = 0
    """The newest incarnation that has a chunk of its own."""


@dataclass
class JournalRun:
    """A finished run: its disk with the log, and what each start meant to have."""

    disk: SimulatedDisk = field(default_factory=SimulatedDisk)
    meant: dict[int, Content] = field(default_factory=dict)
    inherited: dict[int, frozenset[Key]] = field(default_factory=dict)
    meant_outcomes: dict[int, dict[Position, int]] = field(default_factory=dict)
    """The seed of each outcome."""
    inherited_outcomes: dict[int, frozenset[Position]] = field(default_factory=dict)
    promise: Promise = field(default_factory=Promise)

    def promised(self, **changes: Any) -> None:
        self.promise = replace(self.promise, **changes)
        self.disk.mark(self.promise)


SCRIPT = [
    *("step", "step", "checkpoint", "step", "kill"),
    *("start", "step", "step", "killed_before_the_sync"),
    *("start", "step", "step", "step", "checkpoint", "step", "prune"),
    *("change", "step", "checkpoint", "step"),
    *("start", "step", "step", "prune", "step"),
]


def random_script(seed: int) -> list[str]:
    """Thirty things in an order that only chance would choose."""
    rng = random.Random(seed)
    kinds = {
        "step": 10,
        "part": 2,
        "checkpoint": 4,
        "prune": 2,
        "kill": 2,
        "killed_before_the_sync": 1,
        "start": 2,
        "back": 1,
        "change": 1,
    }
    return rng.choices(list(kinds), list(kinds.values()), k=30)


class Driver:
    """Runs a script. `too_many`: how many steps too many are removed, for a mutant."""

    def __init__(self, storage: Open, too_many: int, run: JournalRun | None = None) -> None:
        self.run = JournalRun() if run is None else run
        self._storage = storage
        self._too_many = too_many
        self._checkpoints: list[tuple[int, int]] = []
        """(incarnation, step) of those on the history that goes on, oldest first."""
        self._salt = 0
        self._changed_at = 0
        self._next = 0
        self._recorded: frozenset[Position] = frozenset()
        """Steps whose outcome this start has written, or found and repeated."""
        self._killed = False
        self.run.disk.mkdir("/data")
        self.run.disk.fsync_folder("/")
        self.start()

    def do(self, script: list[str]) -> JournalRun:
        for word in script:
            if self._killed and word not in ("start", "back", "change"):
                self.start()
            getattr(self, word)()
        return self.run

    def start(self) -> None:
        """From the newest checkpoint, with all that the journal has."""
        have = self.run.meant.get(self.run.promise.incarnation, {})
        until = self._from()[1]
        while all((step(until), part) in have for part in range(SETTINGS.chunks_per_step)):
            until += 1
        self._start(inherits=until + 1)

    def back(self) -> None:
        """From an older checkpoint, as when the newest is damaged."""
        older = self._checkpoints[-2][1] if len(self._checkpoints) > 1 else 0
        if older < max(self.run.promise.oldest.step, self._changed_at):
            # It was removed, or is of another configuration: nothing beyond it could be used.
            return self.start()
        newest = self._checkpoints[-1:]
        self._checkpoints[-1:] = []
        self.start()
        self._checkpoints += newest
        return None

    def change(self) -> None:
        """From the newest checkpoint, with another configuration: what is beyond it is abandoned."""
        self._salt += 1000
        self._changed_at = self._from()[1]
        self._start(inherits=self._from()[1])

    def step(self) -> None:
        for part in range(SETTINGS.chunks_per_step):
            self._part(part)
        seed = self._salt + self._next
        self.run.meant_outcomes[self.run.promise.incarnation][step(self._next)] = seed
        self._log.record(step(self._next), 0, outcome(seed), 1e-3)
        self._recorded |= {step(self._next)}
        self._next += 1

    def part(self) -> None:
        """A step that is not finished."""
        self._part(0)
        self._killed = True

    def checkpoint(self) -> None:
        self._log.journal.checkpoint_begun()
        self._promise()
        self._checkpoints.append((self.run.promise.incarnation, self._next))

    def prune(self) -> None:
        """All but the two newest checkpoints."""
        self._checkpoints[:-2] = []
        oldest = min((number for _, number in self._checkpoints), default=0)
        self.run.promised(oldest=max(self.run.promise.oldest, step(oldest)))
        self._log.journal.prune(step(oldest + self._too_many))

    def kill(self) -> None:
        """A part of the frame is written when the process goes; the machine lives."""
        self._kill(700)

    def killed_before_the_sync(self) -> None:
        """The next start finds a whole frame that nobody has made durable."""
        self._kill(None)

    def _kill(self, short_write: int | None) -> None:
        while self._log.find(step(self._next), 0) is not None:
            self.step()
        disk = self.run.disk
        disk.kill_after, disk.short_write = len(disk.log) + 1, short_write
        try:
            self._append(step(self._next), 0)
        except Killed:
            pass
        else:
            assert self._storage is not open_storage, "only a mutant never gets to the sync"
        self._killed = True
        disk.kill_after = disk.short_write = None

    def _from(self) -> tuple[int, int]:
        return self._checkpoints[-1] if self._checkpoints else (0, 0)

    def _start(self, *, inherits: int) -> None:
        run, (saved_by, start) = self.run, self._from()
        incarnation = run.promise.incarnation + 1
        before = run.meant.get(incarnation - 1, {})
        run.meant[incarnation] = {key: seed for key, seed in before.items() if key[0] < step(inherits)}
        run.inherited[incarnation] = frozenset(run.meant[incarnation])
        outcomes = run.meant_outcomes.get(incarnation - 1, {})
        run.meant_outcomes[incarnation] = {at: seed for at, seed in outcomes.items() if at < step(inherits)}
        run.inherited_outcomes[incarnation] = frozenset(run.meant_outcomes[incarnation])
        self._log, report = open_log(
            self._storage(run.disk),
            incarnation,
            step(start),
            (saved_by, step(start)) if saved_by else None,
            fingerprint=f"{self._salt}",
        )
        assert not report.problems
        run.promised(
            incarnation=incarnation,
            chunks=run.promise.chunks & run.inherited[incarnation],
            outcomes=run.promise.outcomes & run.inherited_outcomes[incarnation],
        )
        self._next, self._killed, self._recorded = start, False, frozenset()

    def _part(self, part: int) -> None:
        if self._log.find(step(self._next), part) is None:
            self._append(step(self._next), part)
        else:
            # It is used, whoever wrote it.
            self._promise((step(self._next), part))

    def _append(self, position: Position, part: int) -> None:
        key, seed = (position, part), self._salt + 10 * position.step + part
        self.run.meant[self.run.promise.incarnation][key] = seed
        self._log.append(*key, made(seed))
        self._promise(key, own=True)

    def _promise(self, *chunks: Key, own: bool = False) -> None:
        """These are durable, and with them what was written before."""
        before = self.run.promise
        self.run.promised(
            chunks=before.chunks | {*chunks},
            outcomes=before.outcomes | self._recorded,
            worked=before.incarnation if own else before.worked,
        )


def record(script: list[str], storage: Open = open_storage, *, too_many: int = 0) -> JournalRun:
    """Run a script. `storage` is what mutants replace."""
    return Driver(storage, too_many).do(script)


@functools.lru_cache(1000)
def made(seed: int) -> RolloutChunk:
    """The chunk of a seed; of several sectors."""
    return chunk(seed, prompts=2, generations=3, width=20, length=60)


@functools.lru_cache(1000)
def payload_of(seed: int) -> dict[str, bytes]:
    """What a record of it holds."""
    return {name: array.tobytes() for name, array in pack(made(seed))[0].items()}


class Violation(AssertionError):
    """A crash cost something that was promised."""


def check(run: JournalRun, tree: Tree, promise: Promise) -> int:
    """Read a disk that a crash left; the incarnation whose history it has, 0 for none.

    All that was reported is there, all that is there is right, and no crash looks like damage.
    """
    return check_in(run, open_storage(SimulatedDisk.of(tree)), promise)


def check_in(run: JournalRun, storage: Storage, promise: Promise) -> int:
    """`check` for any storage."""
    view = read_journal([storage], rank=0, since=step(0))
    if view.problems:
        raise Violation(f"a crash was taken for damage: {view.problems}")
    tip = view.header.identity.incarnation if view.header is not None else 0
    if tip < promise.worked:
        raise Violation(f"work of start {promise.worked} was reported and {tip} is what is found")
    # A start that has done nothing yet hides nothing: what is found then is of the one before it.
    promised = promise.chunks if tip <= promise.incarnation else promise.chunks & run.inherited[tip]
    lost = [key for key in promised if key[0] >= promise.oldest and key not in view.rollouts]
    kept = promise.outcomes if tip <= promise.incarnation else promise.outcomes & run.inherited_outcomes[tip]
    lost += [(at, 0) for at in kept if at >= promise.oldest and (at, 0) not in view.outcomes]
    if lost:
        raise Violation(f"reported and not there: {sorted(lost)}")
    for (at, _), place in view.outcomes.items():
        seed = run.meant_outcomes[tip].get(at)
        if seed is None or unpack_outcome(read_record(place)).loss != outcome(seed).loss:
            raise Violation(f"the outcome of {at} holds something else")
    for key, place in view.rollouts.items():
        seed = run.meant[tip].get(key)
        if seed is None:
            raise Violation(f"{key} is of a future that was abandoned")
        found = read_record(place).arrays
        if {name: array.tobytes() for name, array in found.items()} != payload_of(seed):
            raise Violation(f"{key} holds something else")
    return tip


def check_going_on(tree: Tree) -> None:
    """A new start on the disk that a crash left repairs it, goes on, and is found by the next."""
    disk = SimulatedDisk.of(tree)
    check_going_on_in(lambda: open_storage(disk))


def check_going_on_in(reopened: Callable[[], Storage]) -> None:
    """`check_going_on` for any storage; `reopened` makes it for a process of its own."""
    storage = reopened()
    before = read_journal([storage], rank=0, since=step(0))
    tip = before.header
    checkpoint = (tip.identity.incarnation, tip.first) if tip is not None else None
    fingerprint = tip.identity.fingerprint if tip is not None else "f"
    start = tip.first if tip is not None else step(0)
    log, report = open_log(storage, 90, start, checkpoint, fingerprint=fingerprint)
    log.append(report.until, 1, chunk(7))
    after = read_journal([reopened()], rank=0, since=step(0))
    if after.problems or after.torn:
        raise Violation(f"after going on: {after.problems} {after.torn}")
    kept = {key for key in before.rollouts if start <= key[0] <= report.until}
    if not kept <= after.rollouts.keys() or (report.until, 1) not in after.rollouts:
        raise Violation("going on lost what was there")


def states(run: JournalRun) -> Iterator[tuple[Tree, Promise]]:
    """Every distinct crash state of the run, with what was promised before it."""
    model = DiskModel()
    promise = Promise()
    seen: set[tuple[int, Promise]] = set()
    for number, op in enumerate(run.disk.log):
        model.apply(op)
        if op.kind == "mark":
            promise = op.note
        for tree in crash_states(model, seed=number):
            key = (hash(frozenset(tree.items())), promise)
            if key not in seen:
                seen.add(key)
                yield tree, promise
