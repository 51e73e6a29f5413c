"""What ranks tell each other: the same over an all-gather and over sums; of a fixed size over sums."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import LockStep

from rollforward.agreement import tallied
from rollforward.channel import Channel, all_sum_of
from rollforward.errors import RollforwardError, StorageError

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@dataclass
class Summing:
    """AllReduce of float32 over an all-gather; counts the numbers that a rank passes."""

    exchange: object
    passed: list[int] = field(default_factory=list)

    def all_sum(self, numbers):
        self.passed.append(len(numbers))
        gathered = np.array(self.exchange(list(numbers)), np.float32)
        total = gathered[0]
        for row in gathered[1:]:
            total = total + row
        return [int(number) for number in total]


def tally(world_size, value, numbers, *, summing):
    def work(rank, exchange):
        group = Summing(exchange)
        channel = Channel(exchange, all_sum_of(group) if summing else None)
        return channel.tally(value if rank == 0 else None, numbers[rank]), group.passed

    return LockStep(world_size).run(work)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), values, st.integers(0, 80), st.data())
def test_sums_and_an_all_gather_tell_the_same(world_size, value, count, data):
    number = st.integers(0, (1 << 128) - 1)
    numbers = [data.draw(st.lists(number, min_size=count, max_size=count)) for _ in range(world_size)]
    expected = (value, [sum(each) for each in zip(*numbers, strict=True)])
    for summing in (False, True):
        assert [told for told, _ in tally(world_size, value, numbers, summing=summing)] == [
            expected
        ] * world_size


@pytest.mark.parametrize("length", [0, 2000, 2013, 2014, 2015, 2016, 9000])
def test_a_value_of_any_length_arrives_whole(length):
    for told, passed in tally(3, "x" * length, [[7], [8], [9]], summing=True):
        assert told == ("x" * length, [24])
        assert all(words & (words - 1) == 0 for words in passed), "powers of two"


def test_what_a_rank_passes_does_not_depend_on_their_number():
    sizes = {
        world_size: tally(world_size, "x" * 3000, [[1] * 9] * world_size, summing=True)[0][1]
        for world_size in (1, 2, 8, 32)
    }
    assert len({tuple(passed) for passed in sizes.values()}) == 1


def test_65_793_ranks_may_add_up():
    """The largest sum of a word, in float32."""
    assert float(np.float32(65_793 * 255)) == 65_793 * 255
    assert float(np.float32(65_793 * 255)) + 1 <= 1 << 24


@pytest.mark.parametrize("summing", [False, True])
def test_what_fails_on_one_rank_is_raised_by_all(summing):
    def work(rank, exchange):
        def fail():
            if rank == 1:
                raise StorageError("the disk is full", hint="free some")
            return ("told" if rank == 0 else None), [rank]

        channel = Channel(exchange, Summing(exchange).all_sum if summing else None)
        return tallied(fail, 1, channel)

    for error in LockStep(3).run(work):
        assert isinstance(error, StorageError)
        assert "the disk is full" in error.message
        assert error.hint == "free some"


@pytest.mark.parametrize("summing", [False, True])
def test_a_value_that_cannot_be_sent_leaves_nobody_waiting(summing):
    def work(rank, exchange):
        channel = Channel(exchange, Summing(exchange).all_sum if summing else None)
        return tallied(lambda: ({1, 2} if rank == 0 else None, []), 0, channel)

    zero, one = LockStep(2).run(work)
    assert isinstance(zero, TypeError)
    assert isinstance(one, RollforwardError)
