"""A loop whose optimizer is spread over two processes: `rollforward.Piece`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lockstep import LockStep
from loop_run import write_at_once

import rollforward
from rollforward.errors import CheckpointMismatch, EngineError, InputError
from rollforward.storage import LocalStorage
from rollforward.store import find, read_tensors

ROWS = 5
CUT = [slice(0, 3), slice(3, ROWS)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_at_once(monkeypatch)


class Died(Exception):
    """Ends a start in the middle."""


def held(rank: int, cut: list[slice] = CUT) -> dict[str, dict[str, Any]]:
    mine = cut[rank]
    moments = np.zeros((mine.stop - mine.start, 2))
    return {
        "policy": {"w": np.zeros((ROWS, 2))},
        "optimizer": {
            "m": rollforward.Piece(moments, (ROWS, 2), (mine.start, 0)),
            "count": np.zeros((), int),
        },
    }


def train(path: Path, *, dies_at: int | None = None, prove: bool = False, sums: bool = True) -> list[Any]:
    """What each of two processes ends with: each updates its rows, and all get the new weights."""

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
        def all_sum(numbers: Any) -> list[int]:
            return [sum(each) for each in zip(*exchange(list(numbers)), strict=True)]

        tensors = held(rank)
        options = {"all_gather": exchange, "all_sum": all_sum if sums else None, "prove_unchanged": prove}
        with rollforward.open_run(path, rank=rank, world_size=2, log=lambda _: None, **options) as run:
            start = run.restore(tensors)
            moments, mine = tensors["optimizer"]["m"].array, CUT[rank]
            for step in range(start.step if start else 0, 6):
                batch = run.once(step, "batch", lambda step=step: np.arange(10.0).reshape(ROWS, 2) * step)
                with run.updating(step):
                    if step == dies_at:
                        raise Died
                    moments += batch[mine] + tensors["policy"]["w"][mine] / 3
                    tensors["optimizer"]["count"] += 1
                    tensors["policy"]["w"][...] = np.concatenate([*map(np.array, exchange(moments.tolist()))])
                run.outcome(step, loss=float(tensors["policy"]["w"].sum()))
                run.checkpoint(step + 1, tensors, every=2)
        return tensors["policy"]["w"], moments

    return LockStep(2).run(work)


@pytest.mark.parametrize("sums", [False, True])
def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path, sums: bool) -> None:
    whole = train(tmp_path / "whole", sums=sums)
    for step in (3, 5):
        assert all(isinstance(ended, Died) for ended in train(tmp_path / "killed", dies_at=step, sums=sums))
    killed = train(tmp_path / "killed", prove=True, sums=sums)
    for one, other in zip(whole, killed, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))
    storage = LocalStorage(tmp_path / "killed")
    found = {(role, name): array for role, name, array in read_tensors(storage, find(storage).manifest)}
    assert found["optimizer", "m"].tobytes() == np.concatenate([whole[0][1], whole[1][1]]).tobytes()


def opened(path: Path, arrays: Callable[[int], Any]) -> list[Any]:
    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
        with rollforward.open_run(path, rank=rank, world_size=2, all_gather=exchange) as run:
            run.restore(arrays(rank))
            with run.updating(0):
                pass

    return LockStep(2).run(work)


def test_pieces_that_do_not_cover_their_tensor_are_refused_when_the_run_begins(tmp_path: Path) -> None:
    for error in opened(tmp_path / "run", lambda rank: held(rank, [slice(0, 2), slice(3, ROWS)])):
        assert isinstance(error, EngineError)
        assert "optimizer m" in error.message
        assert "2 of 10 elements are in no piece" in error.message
    assert not list((tmp_path / "run").glob("commits/*"))


def test_a_piece_beyond_its_tensor_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    for error in opened(tmp_path / "run", lambda _: held(0, [slice(2, ROWS + 1)])):
        assert isinstance(error, InputError)
        assert "[4, 2] at [2, 0] is not in [5, 2]" in error.message


def test_pieces_of_a_tensor_of_another_shape_are_told(tmp_path: Path) -> None:
    train(tmp_path / "run")

    def larger(rank: int) -> dict[str, dict[str, Any]]:
        found = held(rank)
        found["optimizer"]["m"] = rollforward.Piece(np.zeros((2, 2)), (6, 2), (2 * rank, 0))
        return found

    for error in opened(tmp_path / "run", larger):
        assert isinstance(error, CheckpointMismatch)
        assert "optimizer m: F64 [5, 2] in the checkpoint, F64 [6, 2] in the model" in error.message
