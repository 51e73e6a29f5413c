"""Whatever becomes of the requests to a bucket, what was reported is found and nothing wrong is loaded."""

from collections.abc import Iterator

import bucket_journal
import pytest
from bucket_run import (
    BucketChecker,
    BucketRun,
    Troubles,
    check_going_on,
    open_bucket,
    record,
)
from journal_run import JournalRun, check_going_on_in, check_in
from simulated_bucket import FATES, SimulatedBucket, instead_of_obstore

SEEDS = 14
JOURNALS = 6
GOING_ON_EVERY = 60
READS = ("get", "head", "list")


@pytest.fixture(autouse=True, scope="module")
def _simulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        instead_of_obstore(patch)
        yield


class Checked:
    """Counts distinct states over many runs, and checks each."""

    def __init__(self) -> None:
        self.count = 0
        self._checker = BucketChecker()

    def run(self, troubles: Troubles) -> BucketRun:
        run = record(troubles)
        for content in self._checker.new_states(run):
            self.count += 1
            if self.count % GOING_ON_EVERY == 0:
                check_going_on(content)
        return run


def test_a_run_whose_requests_go_wrong_in_any_way_loses_nothing_that_was_reported() -> None:
    checked, happened, fenced = Checked(), set(), 0
    for seed in range(SEEDS):
        troubles = Troubles.drawn(seed)
        fenced += checked.run(troubles).fenced
        happened |= {(what, fate) for _, what, _, fate in troubles.happened}
    assert checked.count > 1000
    assert {("put", fate) for fate in FATES} <= happened, "every fate was met"
    assert fenced > 0, "some trainer woke up and found that it had been replaced"


@pytest.mark.slow
def test_more_than_ten_thousand_states_of_runs_whose_requests_go_wrong_in_any_way() -> None:
    checked, seed = Checked(), 0
    while checked.count < 10_000:
        seed += 1
        checked.run(Troubles.drawn(1000 + seed))
    print(f"{checked.count} states of {seed} runs")


@pytest.mark.slow
def test_each_request_of_a_run_meets_each_fate() -> None:
    checked, undisturbed = Checked(), record(Troubles())
    for number, (what, _) in enumerate(undisturbed.bucket.asked, start=1):
        for fate in ("fails",) if what in READS else FATES:
            checked.run(Troubles(fates={number: fate}))
    print(f"{checked.count} states of {len(undisturbed.bucket.asked)} requests")
    assert checked.count > 10_000


@pytest.mark.slow
def test_a_rival_takes_over_between_any_two_requests() -> None:
    checked, fenced = Checked(), 0
    asked = len(record(Troubles()).bucket.asked)
    for number in range(1, asked):
        fenced += checked.run(Troubles(rival=number)).fenced
    print(f"{checked.count} states, {fenced} of {asked} told that they were replaced")
    assert checked.count > 10_000


@pytest.mark.slow
def test_a_start_is_killed_between_any_two_requests() -> None:
    checked = Checked()
    for number in range(1, 300):
        for fate in ("done", "lost", "late"):
            checked.run(Troubles(kills=(number,), fates={number: fate}))
    print(f"{checked.count} states")
    assert checked.count > 10_000


class CheckedJournals(Checked):
    """The same for journals."""

    def journal(self, run: JournalRun) -> None:
        for content, promise in bucket_journal.states(run):
            check_in(run, open_bucket(SimulatedBucket(content)), promise)
            self.count += 1
            if self.count % GOING_ON_EVERY == 0:
                bucket = SimulatedBucket(content)
                check_going_on_in(lambda bucket=bucket: open_bucket(bucket))


def journal_troubles(seed: int) -> Troubles:
    """Reads do not fail: a start that cannot read all of a journal says so, and goes on with less of it."""
    return Troubles(seed=seed, share=(0.0, 0.02, 0.06)[seed % 3], reads=False)


def test_a_journal_whose_requests_go_wrong_keeps_what_was_reported() -> None:
    checked = CheckedJournals()
    for seed in range(JOURNALS):
        checked.journal(bucket_journal.record(journal_troubles(seed)))
    assert checked.count > 200


def test_a_journal_that_is_shipped_keeps_what_was_reported_with_the_machine_or_without() -> None:
    checked = CheckedJournals()
    for seed in range(JOURNALS):
        checked.journal(bucket_journal.record_shipped(journal_troubles(seed)))
    assert checked.count > 200


@pytest.mark.slow
def test_more_than_ten_thousand_states_of_journals_whose_requests_go_wrong() -> None:
    checked, seed = CheckedJournals(), 0
    while checked.count < 10_000:
        seed += 1
        record = bucket_journal.record if seed % 2 else bucket_journal.record_shipped
        checked.journal(record(journal_troubles(1000 + seed)))
    print(f"{checked.count} states of {seed} journals")
