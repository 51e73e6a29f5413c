"""A group of one process gives a value back as a group of many would; replicas are groups of groups."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess, Replicas
from rollforward.grpo.ports import Group


def test_one_process_gathers_what_the_others_would_see_of_its_value() -> None:
    group: Group = OneProcess()
    assert (group.rank, group.world_size) == (0, 1)
    value = {"pair": (1, 2), "third": 0.1}
    assert group.all_gather(value) == [{"pair": [1, 2], "third": 0.1}]
    assert math.isnan(group.all_gather(math.nan)[0])
    assert group.all_gather(value)[0] is not value


def test_what_json_cannot_hold_is_refused_by_one_process_too() -> None:
    with pytest.raises(EngineError, match="workers exchange JSON values, and this is not one"):
        OneProcess().all_gather({"set": {1}})


def test_sharing_with_nobody_lets_errors_through() -> None:
    with pytest.raises(RuntimeError, match="inside"), OneProcess().sharing():
        raise RuntimeError("inside")


class Told:
    """A group in which everybody's value is known."""

    rank, world_size = 3, 6

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def all_gather(self, value: Any) -> list[Any]:
        assert value == self.values[self.rank]
        return self.values

    def sharing(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_workers_that_hold_a_model_together_count_as_one() -> None:
    replicas = Replicas(Told(["a", "a", "b", "b", "c", "c"]), 2)
    assert (replicas.rank, replicas.world_size, replicas.shard) == (1, 3, 1)
    assert list(replicas.workers) == [1, 3, 5]
    assert replicas.all_gather("b") == ["a", "b", "c"]


def test_workers_of_whole_models_each_count() -> None:
    replicas = Replicas(Told([0, 1, 2, 3, 4, 5]))
    assert (replicas.rank, replicas.world_size) == (3, 6)
    assert replicas.all_gather(3) == [0, 1, 2, 3, 4, 5]


def test_workers_that_hold_a_model_together_and_say_different_things_are_named() -> None:
    with pytest.raises(EngineError, match=r"workers 4 to 5 hold a model together .* their numbers differ"):
        Replicas(Told([1.0, 1.0, 2.0, 2.0, 3.0, 3.5]), 2).all_gather(2.0)


def test_what_is_not_a_number_is_not_a_difference() -> None:
    assert Replicas(Told([[math.nan], [math.nan], 0, 0, 0, 0]), 2).all_gather(0)[1:] == [0, 0]
