"""A step's chunks see their share of the epoch's order, and the shares make a whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.errors import DataError
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.types import Prompt
from rollforward.position import Position


def problems(count: int) -> list[Prompt]:
    return [Prompt(index=i, text=f"{i}=", token_ids=(i,), answer=str(i)) for i in range(count)]


def schedule(count: int, *, chunks: int, chunk_size: int) -> PromptSchedule:
    return PromptSchedule(prompts=problems(count), seed=3, chunk_size=chunk_size, chunks_per_step=chunks)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 20))
def test_the_chunks_of_an_epoch_see_each_prompt_once(chunks: int, chunk_size: int, more: int) -> None:
    count = chunks * chunk_size + more
    made = schedule(count, chunks=chunks, chunk_size=chunk_size)
    seen = [
        prompt.index
        for step in range(made.steps_per_epoch)
        for chunk in range(chunks)
        for prompt in made.chunk(Position(0, step), chunk)
    ]
    assert len(seen) == len(set(seen)) == made.steps_per_epoch * made.prompts_per_step
    assert count - len(seen) < made.prompts_per_step


def test_small_chunks_split_the_step_that_large_ones_make() -> None:
    large, small = schedule(40, chunks=2, chunk_size=4), schedule(40, chunks=4, chunk_size=2)
    position = Position(1, 3)
    whole = [p.index for chunk in range(2) for p in large.chunk(position, chunk)]
    parts = [p.index for chunk in range(4) for p in small.chunk(position, chunk)]
    assert parts == whole
    assert [s for chunk in range(4) for s in small.slots(chunk)] == list(range(8))


def test_a_dataset_smaller_than_one_step_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"has 5 prompts.*needs 8: 2 chunks .* x chunk_size 4"):
        schedule(5, chunks=2, chunk_size=4)
