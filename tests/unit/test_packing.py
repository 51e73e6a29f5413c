"""Rows hold every sample once, are mostly tokens, and depend on the chunk's samples alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.grpo.packing import LEAST, Ladder, MicroBatch, micro_batches, rung, rungs

LIMIT_PROMPT, LIMIT_TOKENS, EVEN = 40, 128, 2000
chunks = st.lists(
    st.tuples(st.integers(1, LIMIT_PROMPT), st.lists(st.integers(1, LIMIT_TOKENS), min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)
"""Groups: the length of the prompt, and of each completion."""
memory = st.integers(1, 16)


def ladder_of(samples: int, even: int = EVEN, *, alone: bool = False) -> Ladder:
    return Ladder.of(
        prompt_length=LIMIT_PROMPT, max_tokens=LIMIT_TOKENS, samples=samples, even=even, alone=alone
    )


def flat(chunk: list[tuple[int, list[int]]]) -> tuple[list[int], list[int], list[int]]:
    """Prompts, completions and group of each sample."""
    found = [
        (prompt, length, group) for group, (prompt, completions) in enumerate(chunk) for length in completions
    ]
    prompts, completions, groups = (list(each) for each in zip(*found, strict=True))
    return prompts, completions, groups


def samples_of(found: tuple[MicroBatch, ...]) -> list[int]:
    return [sample for each in found for row in each.rows for group in row for sample in group]


@pytest.mark.parametrize(
    ("limits", "samples", "even", "widths"),
    [
        ((40, 128), 1, 2750, (167,)),
        ((40, 128), 4, 2750, (294, 147)),
        ((40, 24), 4, 2750, (224,)),
        ((6, 11), 128, 288, (46,)),
        ((40, 4096), 1, 2750, (4135, 2068, 1034, 517, 259, 130)),
        ((5, 1), 8, 2750, (5,)),
    ],
)
def test_the_widths_of(limits: tuple[int, int], samples: int, even: int, widths: tuple[int, ...]) -> None:
    prompt, tokens = limits
    found = Ladder.of(prompt_length=prompt, max_tokens=tokens, samples=samples, even=even)
    assert found.widths == widths


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 256), st.integers(1, 100_000))
def test_no_more_memory_than_was_given_and_every_sample_fits(
    prompt: int, tokens: int, samples: int, even: int
) -> None:
    found = Ladder.of(prompt_length=prompt, max_tokens=tokens, samples=samples, even=even)
    assert found.widths[0] >= prompt + tokens - 1
    assert list(found.widths) == sorted(set(found.widths), reverse=True)
    assert all(width >= LEAST for width in found.widths[1:])
    for width in found.widths:
        assert found.rows(width) * width <= samples * (prompt + tokens - 1)


@given(st.data(), st.integers(1, 100_000), st.integers(1, 64))
def test_a_rung_holds_its_length_and_at_most_as_much_again(
    data: st.DataObject, limit: int, least: int
) -> None:
    length = data.draw(st.integers(0, limit))
    found = rung(length, limit, least)
    assert found in rungs(limit, least)
    assert length <= found <= max(2 * length, 2 * least)


@given(chunks, memory, st.booleans())
def test_every_sample_is_in_one_row_that_holds_it(
    chunk: list[tuple[int, list[int]]], samples: int, alone: bool
) -> None:
    prompts, completions, groups = flat(chunk)
    ladder = ladder_of(samples, alone=alone)
    found = micro_batches(prompts, completions, groups, ladder)
    assert sorted(samples_of(found)) == list(range(len(completions)))
    for each in found:
        assert each.width in ladder.widths
        assert 0 < len(each.rows) <= each.height <= ladder.rows(each.width)
        smaller = -(-each.height // 2) * each.width
        assert each.height < 2 * len(each.rows) or smaller < LEAST, "more than half of the rows are filled"
        for row in each.rows:
            assert not alone or len([sample for group in row for sample in group]) == 1
            columns = tokens = 0
            for group in row:
                assert len({groups[sample] for sample in group}) == 1
                columns += prompts[group[0]] + sum(completions[sample] - 1 for sample in group)
                tokens += sum(completions[sample] for sample in group)
            assert columns <= each.width
            assert tokens <= each.width
            assert len({groups[group[0]] for group in row}) == len(row), "a prompt stands once in a row"


@given(chunks, memory, st.data())
def test_samples_that_do_not_count_are_in_none_and_change_nothing(
    chunk: list[tuple[int, list[int]]], samples: int, data: st.DataObject
) -> None:
    prompts, completions, groups = flat(chunk)
    counts = data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))
    found = micro_batches(prompts, completions, groups, ladder_of(samples), counts)
    kept = np.flatnonzero(counts).tolist()
    assert sorted(samples_of(found)) == kept
    without = micro_batches(
        *([each[sample] for sample in kept] for each in (prompts, completions, groups)), ladder_of(samples)
    )
    assert [each.shape for each in found] == [each.shape for each in without]
    assert samples_of(found) == [kept[sample] for sample in samples_of(without)]


def test_samples_without_a_token_are_left_out() -> None:
    assert samples_of(micro_batches([3, 3, 4], [0, 5, 0], [0, 0, 1], ladder_of(4))) == [1]
    assert micro_batches([3], [0], [0], ladder_of(4)) == ()


@given(chunks)
def test_equal_samples_stand_in_their_own_order(chunk: list[tuple[int, list[int]]]) -> None:
    """In rows of one width, which stay in the order in which they were filled."""
    prompts, completions, groups = flat(chunk)
    ladder = ladder_of(1)
    assert len(ladder.widths) == 1
    order = samples_of(micro_batches(prompts, completions, groups, ladder))
    for kind in set(zip(completions, groups, strict=True)):
        equal = [sample for sample in order if (completions[sample], groups[sample]) == kind]
        assert equal == sorted(equal)


def test_short_samples_need_few_shapes() -> None:
    """As in the demo: each shape takes seconds to compile, a step a fraction of one."""
    ladder = Ladder.of(prompt_length=6, max_tokens=11, samples=128, even=300)
    (width,) = ladder.widths
    most = ladder.rows(width)
    heights = {ladder.height(rows, width) for rows in range(1, most + 1)}
    assert len(heights) <= 4 < np.log2(most)
    assert min(heights) * width >= LEAST


def test_padding_is_hardly_computed_and_a_prompt_seldom_twice() -> None:
    """Eight completions of a prompt, of a quarter of the limit on average."""
    source = np.random.default_rng(3)
    computed = needed = apart = 0
    shapes = set()
    for _ in range(200):
        completions = np.minimum(source.geometric(1 / 32, 8), LIMIT_TOKENS).tolist()
        found = micro_batches([LIMIT_PROMPT] * 8, completions, [0] * 8, ladder_of(4, 2750))
        computed += sum(each.height * each.width for each in found)
        shapes |= {each.shape for each in found}
        needed += LIMIT_PROMPT + sum(completions)
        apart += 8 * LIMIT_PROMPT + sum(completions)
    assert computed < 1.35 * needed
    assert computed < 0.75 * apart
    assert len(shapes) <= 6
