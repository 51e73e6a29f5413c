"""Whatever a crash leaves of the journal, what was reported is there, and what is there is right."""

import pytest
from journal_run import (
    ROOT,
    SCRIPT,
    JournalRun,
    Violation,
    check,
    check_going_on,
    open_storage,
    random_script,
    record,
    states,
)
from simulated_disk import SimulatedDisk

from rollforward.replay import inheriting
from rollforward.storage import LocalStorage, Storage
from rollforward.storage.appending import FileAppender
from rollforward.storage.base import Appender, FileOps
from rollforward.store.journal import reading, writing
from rollforward.store.journal.frames import encode_frame
from rollforward.store.journal.reading import list_segments
from rollforward.store.journal.writing import Journal


@pytest.fixture(scope="module")
def run() -> JournalRun:
    return record(SCRIPT)


def check_all(run: JournalRun) -> tuple[int, set[int]]:
    """How many crash states there are, and the starts whose histories they show."""
    count, tips = 0, set()
    for tree, promise in states(run):
        tips.add(check(run, tree, promise))
        if count % 10 == 0:
            check_going_on(tree)
        count += 1
    return count, tips


def test_no_crash_loses_what_was_reported_or_shows_what_was_abandoned(run: JournalRun) -> None:
    count, tips = check_all(run)
    assert count > 200
    assert tips == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("seed", [1, 2])
def test_no_crash_of_a_run_made_by_chance_loses_anything(seed: int) -> None:
    assert check_all(record(random_script(seed)))[0] > 100


@pytest.mark.slow
def test_ten_thousand_crash_states_of_runs_made_by_chance() -> None:
    count = seed = 0
    while count < 10_000:
        seed += 1
        count += check_all(record(random_script(seed)))[0]
    print(f"{count} crash states of {seed} runs")


def test_the_run_that_is_crashed_does_all_that_a_journal_does(run: JournalRun) -> None:
    paths = {op.path for op in run.disk.log} | {op.target for op in run.disk.log}
    assert any(path.endswith(".torn") for path in paths), "it repairs"
    assert any(op.kind == "unlink" and op.path.endswith(".journal") for op in run.disk.log), "it removes"
    left = [segment.name.path.rpartition("/")[2] for segment in list_segments(open_storage(run.disk), 0)]
    assert left == ["4-0_5.journal", "4-0_6.journal", "5-0_6.journal"]


class Mutant(LocalStorage):
    """A storage whose appenders are not as they should be."""

    def __init__(self, disk: SimulatedDisk, kind: type[FileAppender]) -> None:
        super().__init__(ROOT, disk)
        self._kind = kind

    def appender(self, path: str) -> Appender:
        made = super().appender(path)
        made.__class__ = self._kind
        return made


class Quiet:
    """`FileOps` without some of the calls."""

    def __init__(self, ops: FileOps, *calls: str) -> None:
        self._ops = ops
        self._calls = calls

    def __getattr__(self, name: str) -> object:
        return (lambda *_: None) if name in self._calls else getattr(self._ops, name)


class WithoutFsync(FileAppender):
    def sync(self) -> None:
        self._ops = Quiet(self._ops, "fsync")  # type: ignore[assignment]
        super().sync()


class WithoutFolderSync(FileAppender):
    def sync(self) -> None:
        self._named = True
        super().sync()


class EverySecondFsync(FileAppender):
    """As a journal would that leaves a chunk's fsync to the next one."""

    def sync(self) -> None:
        own = self._ops
        self._turn = not getattr(self, "_turn", True)
        if self._turn:
            self._ops = Quiet(own, "fsync")  # type: ignore[assignment]
        super().sync()
        self._ops = own


def first_violation(run: JournalRun) -> str:
    """The first broken promise that the harness finds; empty when it finds none."""
    for tree, promise in states(run):
        try:
            check(run, tree, promise)
        except Violation as violation:
            return str(violation)
    return ""


@pytest.mark.parametrize("kind", [WithoutFsync, WithoutFolderSync, EverySecondFsync])
def test_the_harness_finds_a_sync_that_is_left_out(kind: type[FileAppender]) -> None:
    def mutant(disk: SimulatedDisk) -> Storage:
        return Mutant(disk, kind)

    assert first_violation(record(SCRIPT, mutant))


def test_the_harness_finds_a_start_that_uses_what_a_crash_could_still_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inheriting, "settle", lambda *_: None)
    assert "reported and not there" in first_violation(record(SCRIPT))


def test_the_harness_finds_a_journal_that_does_not_say_what_is_unsynced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def as_in_version_2(sequence: int, _: int, payload: bytes, salt: bytes) -> bytes:
        return encode_frame(sequence, 0, payload, salt)

    monkeypatch.setattr(writing, "encode_frame", as_in_version_2)
    assert "a crash was taken for damage" in first_violation(record(SCRIPT))


def test_the_harness_finds_a_checkpoint_that_begins_before_its_steps_are_on_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Journal, "checkpoint_begun", lambda journal: setattr(journal, "_roll", True))
    assert "reported and not there" in first_violation(record(SCRIPT))


def test_the_harness_finds_that_too_much_is_removed() -> None:
    assert "reported and not there" in first_violation(record(SCRIPT, too_many=2))


def test_the_harness_finds_a_reader_that_believes_abandoned_futures(
    run: JournalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "is_live", lambda *_: True)
    assert "holds something else" in first_violation(run)
