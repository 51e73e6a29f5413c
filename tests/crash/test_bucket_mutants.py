"""Planted mistakes in what writes to a bucket. The simulation must find each of them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bucket_journal
import pytest
from bucket_run import BucketChecker, Parts, Troubles, Violation, open_bucket, record
from journal_run import Violation as JournalViolation
from journal_run import check_in
from simulated_bucket import SimulatedBucket, instead_of_obstore

from rollforward.storage.objects import ObjectStorage
from rollforward.store import CheckpointStore
from rollforward.store.cleaning import Kept
from rollforward.store.layout import COMMITS
from rollforward.store.shipping import Fences, Shipping

SEEDS = range(1, 400)


@pytest.fixture(autouse=True, scope="module")
def _simulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        instead_of_obstore(patch)
        yield


class SameNames(CheckpointStore):
    """Names its files as on a disk, where nothing can be under way."""

    def _free_number(self, roles: list[str], position: Any, incarnation: int) -> int:
        return self.look(incarnation).free_attempt(roles, position)


class RemovesWhatIsLater(CheckpointStore):
    """Takes for leftovers whatever it does not know, its successor's files too."""

    def tidy(self, committed: Any) -> list[str]:
        return super().tidy(replace(committed, kept=replace(committed.kept, later=Kept.later)))


class Unconditional(Shipping):
    """Puts a manifest whether or not there is another one by now."""

    def _commit(self, path: str, content: bytes) -> int:
        self.fences.commit()
        return self.far.write(path, [content])


class Unfenced(Shipping):
    """Asks before it commits alone, so what is under test is not kept from harm by something else."""

    def __init__(self, *arguments: Any, fences: Fences, **options: Any) -> None:
        super().__init__(*arguments, fences=Fences(commit=fences.commit), **options)


class IgnoresErrors(ObjectStorage):
    """Takes what was not answered for done."""

    def write(self, path: str, buffers: Any) -> int:
        try:
            return super().write(path, buffers)
        except Exception:
            return 0


MUTANTS = {
    "names used twice": Parts(store=SameNames),
    "a successor's files removed": Parts(store=RemovesWhatIsLater, shipping=Unfenced),
    "manifests put without a condition": Parts(shipping=Unconditional),
    "errors ignored": Parts(storage=lambda bucket: IgnoresErrors(bucket, "s3://bucket/run")),  # type: ignore[arg-type]
}


def troubles_for(mistake: str) -> Iterator[Troubles]:
    """Drawn ones; and for a moment that is seldom drawn, just that one."""
    if "manifests" in mistake:
        asked = enumerate(record(Troubles(), MUTANTS[mistake]).bucket.asked, start=1)
        return (Troubles(rival=number) for number, (what, key) in asked if what == "put" and COMMITS in key)
    return map(Troubles.drawn, SEEDS)


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_simulation_finds(mistake: str) -> None:
    checker = BucketChecker()

    def runs() -> None:
        for troubles in troubles_for(mistake):
            for _ in checker.new_states(record(troubles, MUTANTS[mistake])):
                continue

    with pytest.raises(Violation):
        runs()


class EndFirst(ObjectStorage):
    """Removes a growing file from its end."""

    def remove(self, path: str) -> None:
        parts = sorted(self._parts_of(path), key=lambda each: each[1].start, reverse=True)
        self._remove([part.key for _, part in parts])
        self._remove([path])


def test_the_simulation_finds_a_journal_that_is_removed_from_its_end() -> None:
    def opened(bucket: Any) -> ObjectStorage:
        return EndFirst(bucket, "s3://bucket/run")

    def journals() -> None:
        for seed in SEEDS:
            run = bucket_journal.record(Troubles(seed=seed, share=0.02, reads=False), opened)
            for content, promise in bucket_journal.states(run):
                check_in(run, open_bucket(SimulatedBucket(content)), promise)

    with pytest.raises(JournalViolation):
        journals()


def test_the_mutants_are_of_functions_that_are_used() -> None:
    """A renamed method would turn a mutant into the real thing."""
    assert {"_free_number", "tidy"} <= set(vars(CheckpointStore))
    assert {"_commit"} <= set(vars(Shipping))
    assert {"write", "remove", "_parts_of", "_remove"} <= set(vars(ObjectStorage))
