"""What fails on one rank reaches all of them, whoever uses `together`; nobody is left waiting."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toy_engine
from journal_case import open_log
from lockstep import LockStep
from toy_run import Ranks
from toy_session import settings_of

from rollforward import errors
from rollforward.agreement import together
from rollforward.config.keys import Config
from rollforward.errors import (
    CheckpointMismatch,
    EngineError,
    NonFinite,
    RollforwardError,
    RunLocked,
    StorageError,
)
from rollforward.interop import restoring
from rollforward.position import Position
from rollforward.replay.recovery import restore
from rollforward.run import claiming
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, RunLock
from rollforward.store.place import RunPlace

Exchange = Callable[[Any], list[Any]]

KINDS = [
    StorageError("the disk is full", hint="make room"),
    RunLocked("held by another", hint="wait"),
    CheckpointMismatch("of another model", hint="use its model"),
    EngineError("out of memory"),
    KeyError("a fault of the program"),
]
EACH = pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)


class Failing(LocalStorage):
    """A storage one of whose methods raises."""

    def __init__(self, root: Path, method: str, error: Exception) -> None:
        super().__init__(root)

        def fail(*_: object, **__: object) -> None:
            raise error

        setattr(self, method, fail)


def assert_reached_all(results: list[Any], error: Exception, *, wrapped: bool = False) -> None:
    """Rank 1 raised the error; `wrapped` where a storage's trouble is said in other words."""
    other, own = results
    kind = type(error) if isinstance(error, RollforwardError) else RollforwardError
    assert type(other) is kind, repr(other)
    told = error.message if isinstance(error, RollforwardError) else f"KeyError: {error}"
    assert f"rank 1: {told}" in other.message
    assert other.hint == getattr(error, "hint", None)
    if wrapped and isinstance(error, StorageError):
        assert type(own) is StorageError
        assert own.__cause__ is error
    else:
        assert own is error


@EACH
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_error_of_one_rank_reaches_the_others_as_what_it_is(error: Exception, victim: int) -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        def own() -> int:
            if rank == victim:
                raise error
            return rank

        return together(own, exchange)

    results = LockStep(3).run(work)
    assert results[victim] is error
    others = [result for rank, result in enumerate(results) if rank != victim]
    kind = type(error) if isinstance(error, RollforwardError) else RollforwardError
    assert {type(other) for other in others} == {kind}
    assert all(f"rank {victim}: " in other.message for other in others)
    assert all(other.hint == getattr(error, "hint", None) for other in others)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RollforwardError)],
)
def test_every_class_of_error_crosses_over(kind: type[RollforwardError]) -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        def own() -> None:
            if rank == 0:
                raise kind("what", hint="try")

        return together(own, exchange)

    first, second = LockStep(2).run(work)
    assert (type(first), first.message) == (kind, "what")
    assert (type(second), second.message, second.hint) == (kind, "rank 0: what", "try")


def test_a_class_that_only_one_rank_knows_arrives_as_the_one_above_it() -> None:
    class Own(NonFinite):
        """Of a trainer."""

    def work(rank: int, exchange: Exchange) -> Any:
        def own() -> None:
            if rank == 0:
                raise Own("a loss")

        return together(own, exchange)

    assert [type(result) for result in LockStep(2).run(work)] == [Own, NonFinite]


def test_ranks_that_fail_differently_are_all_named_to_the_one_that_did_not() -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        def own() -> None:
            if rank < 2:
                raise KINDS[rank]

        return together(own, exchange)

    first, second, third = LockStep(3).run(work)
    assert [first, second] == KINDS[:2]
    assert type(third) is RollforwardError
    assert third.message == "rank 0: the disk is full; rank 1: held by another"


def test_a_result_that_cannot_be_sent_fails_here_and_there_instead_of_in_the_exchange() -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        return together(lambda: float("nan") if rank else 1.0, exchange)

    first, second = LockStep(2).run(work)
    assert isinstance(second, ValueError)
    assert isinstance(first, RollforwardError)
    assert "rank 1: ValueError" in first.message


def test_alone_nothing_is_prefixed_and_results_come_back() -> None:
    def fail() -> None:
        raise StorageError("full")

    assert together(lambda: 3, lambda value: [value], tell=str) == (3, ["3"])
    with pytest.raises(StorageError, match=r"^full$"):
        together(fail, lambda value: [value])


@EACH
def test_it_is_so_when_a_checkpoint_is_saved(tmp_path: Path, error: Exception) -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        storage = Failing(tmp_path, "write", error) if rank else LocalStorage(tmp_path)
        store = CheckpointStore(storage, rank=rank, world_size=2, exchange=exchange)
        tensors = {"policy_model": {name: np.zeros(4) for name in "ab"}}
        store.save(Position(0, 1), tensors, global_step=1, run_id="r", incarnation=1, state={})

    results = LockStep(2).run(work)
    assert_reached_all(results, error, wrapped=True)
    assert results[0].message.startswith("checkpoint 0_1 was not saved, writing it failed on rank 1: ")
    assert not list(tmp_path.glob("commits/*"))


@EACH
@pytest.mark.parametrize("method", ["scan", "appender"])
def test_it_is_so_when_the_journal_is_taken_over(tmp_path: Path, error: Exception, method: str) -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        storage = Failing(tmp_path, method, error) if rank else LocalStorage(tmp_path)
        open_log(storage, 1, Position(0, 0), all_gather=exchange, rank=rank, world_size=2)

    assert_reached_all(LockStep(2).run(work), error)


@EACH
@pytest.mark.parametrize("method", ["scan", "open"])
def test_it_is_so_when_a_checkpoint_is_restored(tmp_path: Path, error: Exception, method: str) -> None:
    model = toy_engine.toy_model_config()
    if method == "open" and isinstance(error, StorageError):
        pytest.skip("a file that cannot be read rejects its checkpoint: see test_recovery")

    def work(rank: int, exchange: Exchange) -> Any:
        engine = toy_engine.create(settings_of(model), Ranks(rank, 2, exchange))
        store = CheckpointStore(tmp_path, rank=rank, world_size=2, exchange=exchange)
        store.save(Position(0, 1), engine.tensors(), global_step=1, run_id="r", incarnation=1, state={})
        restore(Failing(tmp_path, method, error) if rank else LocalStorage(tmp_path), engine)

    assert_reached_all(LockStep(2).run(work), error)


@EACH
def test_it_is_so_when_another_trainers_folder_is_read(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(position=Position(0, 1), warnings=(), files={})
    source: Any = SimpleNamespace(folders={}, ranks=1, warnings=())
    monkeypatch.setattr(restoring, "newest", lambda *_: found)

    def read(*given: Any) -> dict[str, Any]:
        if given[-1] == 1:
            raise error
        return {}

    monkeypatch.setattr(restoring, "_read", read)
    model = toy_engine.toy_model_config()

    def work(rank: int, exchange: Exchange) -> Any:
        engine = toy_engine.create(settings_of(model), Ranks(rank, 2, exchange))
        restoring.restore_foreign(source, engine, engine.layout())

    results = LockStep(2).run(work)
    if isinstance(error, CheckpointMismatch):
        # A verdict over what all ranks have read: the same words on each.
        assert [str(result) for result in results] == [f"rank 1: {error}"] * 2
    else:
        assert_reached_all(results, error)


@EACH
def test_it_is_so_when_the_folder_is_locked(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(RunLock, "acquire", acquire)

    def work(rank: int, exchange: Exchange) -> Any:
        # The last rank is the first here, so that the error is told from where the checks expect it.
        group = Ranks(1 - rank, 2, lambda value: exchange(value)[::-1])
        plan: Any = SimpleNamespace(
            source=SimpleNamespace(newest_incarnation=lambda: 0),
            place=RunPlace.at(tmp_path),
            config=Config(),
        )
        with ExitStack() as stack:
            log = SimpleNamespace(line=print)
            worker: Any = SimpleNamespace(is_first=group.rank == 0, group=group, closing=stack, log=log)
            claiming.claim_folder(plan, worker)

    other, own = LockStep(2).run(work)
    assert own is error
    assert type(other) is (type(error) if isinstance(error, RollforwardError) else RollforwardError)
    assert other.message.startswith("rank 0: ")
