"""Every call that the journal makes may fail: the error says what to do, and nothing reported is lost."""

import errno
from collections import Counter

import pytest
from journal_case import open_log
from journal_run import (
    ROOT,
    SCRIPT,
    Driver,
    JournalRun,
    check,
    check_going_on,
    open_storage,
    payload_of,
    step,
)
from simulated_disk import SimulatedDisk

from rollforward.errors import StorageError
from rollforward.replay.codec import pack

CALLS = ("create", "write", "fsync", "rename", "unlink", "mkdir", "fsync_folder", "scan")


class Faulty(SimulatedDisk):
    """A disk whose n-th call of a kind fails; `sticky`: and all that follow."""

    def __init__(self, call: str, number: int, code: int, *, sticky: bool) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.failed = False

        def fail(kind: str, path: str) -> None:
            if not path.startswith(f"{ROOT}/journal"):
                return
            self.seen[kind] += 1
            if kind == call and (self.seen[kind] == number or (sticky and self.failed)):
                self.failed = True
                raise OSError(code, "Injected")

        self.fail = fail


def run_on(disk: SimulatedDisk) -> tuple[JournalRun, StorageError | None]:
    """The script on this disk, up to the first error."""
    run = JournalRun(disk)
    try:
        Driver(open_storage, 0, run).do(SCRIPT)
    except StorageError as error:
        return run, error
    return run, None


def calls_made() -> Counter[str]:
    disk = Faulty("none", 0, 0, sticky=False)
    _, error = run_on(disk)
    assert error is None
    return disk.seen


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "see dmesg")])
def test_a_call_that_fails_costs_nothing_that_was_reported(call: str, code: int, hint: str) -> None:
    made = calls_made()[call]
    assert made, f"the journal makes no call {call}"
    failed = 0
    for number in range(1, made + 1):
        disk = Faulty(call, number, code, sticky=number % 2 == 0)
        run, error = run_on(disk)
        if error is not None:
            failed += 1
            assert hint in (error.hint or ""), f"{call} {number}: {error}"
            assert "/journal" in error.message
        disk.fail = lambda _call, _path: None
        check(run, disk.tree(), run.promise)
        check_going_on(disk.tree())
    assert failed, f"no failing {call} was noticed"


@pytest.mark.parametrize("call", ["open_read", "pread", "lstat"])
def test_what_cannot_be_read_is_reported_and_generated_again(call: str) -> None:
    """Never handed out half, and never an error that is not ours."""
    disk = Faulty(call, 10**9, errno.EIO, sticky=False)
    run, _ = run_on(disk)
    disk.seen.clear()
    resumed = SimulatedDisk.of(disk.tree())
    resumed.fail = disk.fail
    open_log(open_storage(resumed), 9, step(6), (4, step(6)), fingerprint="1000")
    reported = 0
    for number in range(1, disk.seen[call] + 1):
        faulty = Faulty(call, number, errno.EIO, sticky=False)
        again = SimulatedDisk.of(disk.tree())
        again.fail = faulty.fail
        try:
            log, report = open_log(open_storage(again), 9, step(6), (4, step(6)), fingerprint="1000")
        except StorageError:
            reported += 1
            continue
        reported += bool(report.problems)
        for (position, part), seed in run.meant[4].items():
            found = log.find(position, part)
            if found is not None:
                held = {name: array.tobytes() for name, array in pack(found)[0].items()}
                assert held == payload_of(seed)
    assert reported
