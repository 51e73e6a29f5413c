"""A group of one process gives a value back as a group of many would."""

import math

import pytest

from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess
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
