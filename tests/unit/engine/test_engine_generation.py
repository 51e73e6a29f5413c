"""Generation with a cache draws what the whole model would, row by row, whatever surrounds a row."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from golden_models import GoldenModel, golden_model, logits_of
from numpy.typing import NDArray

from rollforward.engines.mindspore.generation import Generator
from rollforward.engines.mindspore.kernels import ladder, rung
from rollforward.errors import EngineError
from rollforward.grpo.types import Generation, SamplingSettings

ROWS, TOKENS, PAD = 3, 8, 47
STOPS = (5, 11, 38)
TEMPERATURE = 1.3
SAMPLING = SamplingSettings(
    max_tokens=TOKENS, temperature=TEMPERATURE, stop_token_ids=STOPS, pad_token_id=PAD
)


@pytest.fixture(scope="module")
def golden() -> GoldenModel:
    return golden_model("qwen2")


@pytest.fixture(scope="module")
def generator(golden: GoldenModel) -> Generator:
    return golden.generator(rows=ROWS, sampling=SAMPLING)


def with_stops(generator: Generator, stops: tuple[int, ...]) -> Generator:
    """The same graphs, which know nothing of stop tokens, with others."""
    other = copy.copy(generator)
    other._sampling = replace(SAMPLING, stop_token_ids=stops)
    return other


def uniforms(samples: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((samples, TOKENS), np.float32)


def prompts(golden: GoldenModel, rows: list[int]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    return golden.prompts[rows], golden.mask[rows]


def generate(generator: Generator, golden: GoldenModel, rows: list[int], seed: int = 0) -> Generation:
    return generator.generate(*prompts(golden, rows), uniforms(len(rows), seed))


def assert_same(one: Generation, other: Generation) -> None:
    np.testing.assert_array_equal(one.completion_ids, other.completion_ids)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.stopped, other.stopped)


def test_the_cache_draws_what_the_model_without_one_draws(golden: GoldenModel, generator: Generator) -> None:
    ids, mask = golden.left_padded()
    numbers = uniforms(4)
    completions = with_stops(generator, ()).generate(ids, mask, numbers).completion_ids
    whole = (
        logits_of(
            golden.family,
            np.concatenate([ids, completions], axis=1),
            np.concatenate([mask, np.ones_like(completions, np.bool_)], axis=1),
        )[:, ids.shape[1] - 1 : -1].astype(np.float64)
        / TEMPERATURE
    )
    weights = np.exp(whole - whole.max(axis=-1, keepdims=True))
    cumulative = np.cumsum(weights / weights.sum(axis=-1, keepdims=True), axis=-1)
    expected = (cumulative <= numbers[..., None]).sum(axis=-1)
    distance = np.abs(cumulative - numbers[..., None]).min(axis=-1)
    assert (distance > 1e-4).all(), "a number this near to an edge proves nothing: take another seed"
    np.testing.assert_array_equal(completions, expected)


def test_a_completion_ends_with_its_first_stop_token(golden: GoldenModel, generator: Generator) -> None:
    ended = 0
    for seed in range(5):
        found = generate(generator, golden, [0, 1, 2, 3, 0, 1], seed)
        for ids, length, stopped in zip(found.completion_ids, found.lengths, found.stopped, strict=True):
            ended += int(stopped)
            assert stopped == (ids[length - 1] in STOPS)
            assert stopped or length == TOKENS
            assert not np.isin(ids[: length - 1], STOPS).any()
            assert (ids[length:] == PAD).all()
    assert 0 < ended < 30, "the seeds show both ends"


def test_rows_that_stopped_early_do_not_disturb_those_that_go_on(
    golden: GoldenModel, generator: Generator
) -> None:
    endless = with_stops(generator, ())
    for seed in range(5):
        ending = generate(generator, golden, [0, 1, 2], seed)
        going_on = generate(endless, golden, [0, 1, 2], seed)
        for row, length in enumerate(ending.lengths):
            np.testing.assert_array_equal(
                ending.completion_ids[row, :length], going_on.completion_ids[row, :length]
            )


def test_a_row_does_not_depend_on_its_neighbours(golden: GoldenModel, generator: Generator) -> None:
    ids, mask = prompts(golden, [0, 1, 3])
    numbers = uniforms(3, seed=1)
    together = generator.generate(ids, mask, numbers)
    others_ids, others_mask = prompts(golden, [2, 2, 2])
    for row in range(3):
        for place in range(3):
            changed_ids, changed_mask = others_ids.copy(), others_mask.copy()
            changed_ids[place], changed_mask[place] = ids[row], mask[row]
            changed_numbers = uniforms(3, seed=2)
            changed_numbers[place] = numbers[row]
            apart = generator.generate(changed_ids, changed_mask, changed_numbers)
            np.testing.assert_array_equal(apart.completion_ids[place], together.completion_ids[row])
            assert apart.lengths[place] == together.lengths[row]
            assert apart.stopped[place] == together.stopped[row]


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7])
def test_any_number_of_samples_is_cut_and_filled_up(
    golden: GoldenModel, generator: Generator, samples: int
) -> None:
    ids, mask = prompts(golden, [row % 4 for row in range(samples)])
    numbers = uniforms(samples, seed=3)
    together = generator.generate(ids, mask, numbers)
    assert together.completion_ids.shape == (samples, TOKENS)
    for row in range(samples):
        one = slice(row, row + 1)
        alone = generator.generate(ids[one], mask[one], numbers[one])
        np.testing.assert_array_equal(alone.completion_ids[0], together.completion_ids[row])


def test_padding_may_stand_on_either_side_or_between(golden: GoldenModel, generator: Generator) -> None:
    numbers = uniforms(4, seed=4)
    right = generator.generate(golden.prompts, golden.mask, numbers)
    left = generator.generate(*golden.left_padded(), numbers)
    ids, mask = golden.prompts.copy(), golden.mask.copy()
    mask[1] = [True, False, True, False, False, True, False, False, True]
    ids[1] = PAD
    ids[1, mask[1]] = golden.prompts[1, :4]
    between = generator.generate(ids, mask, numbers)
    assert_same(left, right)
    assert_same(between, right)


def test_what_stands_under_padding_does_not_matter(golden: GoldenModel, generator: Generator) -> None:
    numbers = uniforms(4, seed=5)
    clean = generator.generate(golden.prompts, golden.mask, numbers)
    dirty = np.where(golden.mask, golden.prompts, 33).astype(np.int32)
    assert_same(generator.generate(dirty, golden.mask, numbers), clean)


def test_nothing_remains_of_an_earlier_call(golden: GoldenModel, generator: Generator) -> None:
    first = generate(generator, golden, [0, 1, 2], seed=6)
    generate(generator, golden, [3, 3, 0], seed=7)
    assert_same(generate(generator, golden, [0, 1, 2], seed=6), first)


def test_steps_end_when_every_row_is_done(golden: GoldenModel, generator: Generator) -> None:
    """Every token stops: one step, for each of two rounds of samples."""
    stopping = with_stops(generator, tuple(range(48)))
    steps = []
    step = stopping._step
    stopping._step = lambda *given: steps.append(len(given[1])) or step(*given)
    found = generate(stopping, golden, [0, 1, 2, 3])
    assert steps == [3, 1]
    assert found.lengths.tolist() == [1] * 4
    assert found.stopped.all()


def test_any_order_and_any_company_give_the_same_tokens(golden: GoldenModel, generator: Generator) -> None:
    """Rows that leave early, free slots that others take, and fewer, some, and more slots than samples."""
    numbers = np.random.default_rng(11).random((13, TOKENS), np.float32)
    rows = np.arange(13) % 4
    source = np.random.default_rng(12)
    alone = golden.generator(rows=1, sampling=SAMPLING)
    expected = alone.generate(golden.prompts[rows], golden.mask[rows], numbers)
    assert len(set(expected.lengths.tolist())) > 2, "rows that leave at different times"
    for some in (generator, golden.generator(rows=20, sampling=SAMPLING)):
        for size in (13, 13, 8, 3):
            taken = source.permutation(13)[:size]
            found = some.generate(golden.prompts[rows[taken]], golden.mask[rows[taken]], numbers[taken])
            np.testing.assert_array_equal(found.completion_ids, expected.completion_ids[taken])
            np.testing.assert_array_equal(found.lengths, expected.lengths[taken])
            np.testing.assert_array_equal(found.stopped, expected.stopped[taken])


def test_a_prompt_runs_once_for_the_samples_that_follow_each_other(
    golden: GoldenModel, generator: Generator
) -> None:
    watched = copy.copy(generator)
    ran = []
    run = watched._run_prompts
    watched._run_prompts = lambda areas, *given: ran.extend(areas) or run(areas, *given)
    generate(watched, golden, [0] * 7 + [1] * 6 + [3])
    assert [len(prompt) for _, prompt in ran] == [int(golden.lengths[row]) for row in (0, 1, 3)]


def test_other_shapes_and_empty_prompts_are_refused(golden: GoldenModel, generator: Generator) -> None:
    ids, mask = golden.prompts, golden.mask
    with pytest.raises(EngineError, match="built for"):
        generator.generate(ids[:, :-1], mask[:, :-1], uniforms(4))
    with pytest.raises(EngineError, match="8 tokens"):
        generator.generate(ids, mask, uniforms(4)[:, :-1])
    with pytest.raises(EngineError, match="sample 2 has no token"):
        generator.generate(ids, mask & (np.arange(4) != 2)[:, None], uniforms(4))


def test_ladders_end_with_all_and_are_climbed_no_higher_than_needed() -> None:
    assert ladder(16, 4, least=2) == (4, 16)
    assert ladder(2, 4, least=2) == (2,)
    assert ladder(35, 2, least=4) == (5, 9, 18, 35)
    assert ladder(1, 2) == (1,)
    for most in range(1, 70):
        rungs = ladder(most, 2)
        assert rungs[0] == 1
        assert rungs[-1] == most
        for number in range(1, most + 1):
            found = rung(number, rungs)
            assert found >= number
            assert all(each < number for each in rungs if each < found)
