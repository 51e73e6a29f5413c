"""What is put into the engine is a whole checkpoint that proved intact, or the run ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_engine
from engine_case import snapshot
from lockstep import LockStep
from numpy.typing import NDArray
from toy_engine import ToyEngine
from toy_run import Ranks
from toy_session import settings_of

from rollforward.errors import NothingToResume
from rollforward.position import Position
from rollforward.replay.recovery import restore
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore

State = dict[str, dict[str, NDArray[Any]]]
MODEL = toy_engine.toy_model_config()


def viewing() -> ToyEngine:
    return toy_engine.create(settings_of(MODEL))


def copying() -> ToyEngine:
    return toy_engine.create_copied(settings_of(MODEL))


EITHER = pytest.mark.parametrize("make", [viewing, copying])


def state(number: int) -> State:
    """Tensors that tell which checkpoint they are of."""
    roles = viewing().roles
    return {
        role: {name: np.full_like(a, number) for name, a in named.items()} for role, named in roles.items()
    }


def save(run: Path, *numbers: int) -> None:
    store = CheckpointStore(run)
    for number in numbers:
        about: dict[str, Any] = {"run_id": "r", "incarnation": 1, "state": {}}
        store.save(Position(0, number), state(number), global_step=number, **about)


def damage(run: Path, role: str, number: int) -> None:
    """Flip the last bit of a file: what comes before it in the file is put in place unharmed."""
    path = next(run.glob(f"*/rank_0/{role}_rank_0-0_{number}.*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def holds(engine: ToyEngine, number: int) -> bool:
    found = snapshot(engine)
    return all(
        np.array_equal(found[role][name], array)
        for role, named in state(number).items()
        for name, array in named.items()
    )


@EITHER
def test_the_newest_is_put_in_place_and_its_bytes_are_told(
    tmp_path: Path, make: Callable[[], ToyEngine]
) -> None:
    save(tmp_path, 1, 2)
    engine = make()
    restored = restore(LocalStorage(tmp_path), engine)
    assert (restored.manifest.position, restored.rejected) == (Position(0, 2), ())
    assert holds(engine, 2)
    assert restored.role_bytes == {
        role: sum(array.nbytes for array in named.values()) for role, named in engine.roles.items()
    }


def test_where_the_memory_is_seen_bytes_go_straight_into_it(tmp_path: Path) -> None:
    class NeverLoads(ToyEngine):
        def load(self, *_: Any, **__: Any) -> None:
            raise AssertionError("the engine's memory is visible, and it was asked to load a copy")

    save(tmp_path, 1)
    engine = NeverLoads(**vars(viewing()))
    restore(LocalStorage(tmp_path), engine)
    assert holds(engine, 1)


@EITHER
@pytest.mark.parametrize("role", ["policy_model", "optimizer", "ref", "table"])
def test_nothing_of_a_damaged_checkpoint_is_left_in_the_engine(
    tmp_path: Path, make: Callable[[], ToyEngine], role: str
) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path, role, 3)
    damage(tmp_path, role, 2)
    engine = make()
    restored = restore(LocalStorage(tmp_path), engine)
    assert restored.manifest.position == Position(0, 1)
    assert [position for position, _ in restored.rejected] == [Position(0, 3), Position(0, 2)]
    assert all(f"{role}_rank_0" in reason for _, reason in restored.rejected)
    assert holds(engine, 1)


@EITHER
def test_when_none_proves_intact_there_is_nothing_to_go_on_with(
    tmp_path: Path, make: Callable[[], ToyEngine]
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path, "optimizer", 1)
    damage(tmp_path, "policy_model", 2)
    with pytest.raises(NothingToResume) as caught:
        restore(LocalStorage(tmp_path), make())
    assert "optimizer_rank_0-0_1" in str(caught.value)
    assert "policy_model_rank_0-0_2" in str(caught.value)


@EITHER
def test_a_checkpoint_that_one_worker_cannot_read_is_used_by_none(
    tmp_path: Path, make: Callable[[], ToyEngine]
) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> bool:
        store = CheckpointStore(tmp_path, rank=rank, world_size=2, exchange=exchange)
        for number in (1, 2):
            about: dict[str, Any] = {"run_id": "r", "incarnation": 1, "state": {}}
            store.save(Position(0, number), state(number), global_step=number, **about)
        if rank == 0:
            # A disk that only the second worker sees so.
            _copy(tmp_path, folders)
            damage(folders[1], "policy_model", 2)
        exchange(None)
        engine = make()
        engine.group = Ranks(rank, 2, exchange)
        restored = restore(LocalStorage(folders[rank]), engine)
        return restored.manifest.position == Position(0, 1) and holds(engine, 1)

    assert LockStep(2).run(work) == [True, True]


def _copy(run: Path, targets: list[Path]) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    for target in targets:
        for path in files:
            copied = target / path.relative_to(run)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
