"""Every worker sees its share of the epoch's order, and the shares make a whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.errors import DataError
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.types import Prompt
from rollforward.position import Position


def problems(count: int) -> list[Prompt]:
    return [Prompt(index=i, text=f"{i}=", token_ids=(i,), answer=str(i)) for i in range(count)]


def schedules(count: int, *, world_size: int, chunks: int, chunk_size: int) -> list[PromptSchedule]:
    return [
        PromptSchedule(
            prompts=problems(count),
            seed=3,
            chunk_size=chunk_size,
            chunks_per_step=chunks,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
def test_workers_together_see_each_prompt_of_an_epoch_once(
    world_size: int, chunks: int, chunk_size: int, more: int
) -> None:
    count = world_size * chunks * chunk_size + more
    workers = schedules(count, world_size=world_size, chunks=chunks, chunk_size=chunk_size)
    steps = workers[0].steps_per_epoch
    seen = [
        prompt.index
        for step in range(steps)
        for worker in workers
        for chunk in range(chunks)
        for prompt in worker.chunk(Position(0, step), chunk)
    ]
    assert len(seen) == len(set(seen)) == steps * workers[0].prompts_per_step
    assert count - len(seen) < workers[0].prompts_per_step


def test_two_workers_split_the_step_that_one_worker_would_run() -> None:
    (alone,) = schedules(40, world_size=1, chunks=2, chunk_size=4)
    pair = schedules(40, world_size=2, chunks=2, chunk_size=2)
    position = Position(1, 3)
    whole = [p.index for chunk in range(2) for p in alone.chunk(position, chunk)]
    parts = [p.index for worker in pair for chunk in range(2) for p in worker.chunk(position, chunk)]
    assert parts == whole
    assert [s for worker in pair for chunk in range(2) for s in worker.slots(chunk)] == list(range(8))


def test_a_dataset_smaller_than_one_step_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"has 5 prompts.*needs 8.*num_rollouts 2"):
        schedules(5, world_size=1, chunks=2, chunk_size=4)
