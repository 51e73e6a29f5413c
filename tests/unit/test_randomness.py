"""Random numbers are a function of what they are for, and stay so across versions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollforward.grpo.randomness import permutation, sampling_uniforms
from rollforward.position import Position

words = st.integers(0, 2**63 - 1)


def test_the_stream_of_a_sample_never_changes_between_versions() -> None:
    """A changed number here means that no old run can be resumed or rebuilt bit for bit."""
    drawn = sampling_uniforms(7, Position(1, 20), [3], 4)
    assert drawn.tolist() == [
        [0.6892024278640747, 0.3026443123817444, 0.1054307222366333, 0.7262117862701416]
    ]
    assert permutation(7, 1, 8).tolist() == [2, 0, 4, 1, 5, 3, 7, 6]


@given(words, words, st.lists(st.integers(0, 10_000), min_size=2, max_size=5, unique=True))
def test_a_sample_draws_the_same_numbers_alone_and_in_company(
    seed: int, step: int, samples: list[int]
) -> None:
    position = Position(0, step)
    together = sampling_uniforms(seed, position, samples, 6)
    alone = [sampling_uniforms(seed, position, [sample], 6)[0] for sample in samples]
    assert np.array_equal(together, np.stack(alone))


@given(words)
def test_more_tokens_continue_the_same_stream(seed: int) -> None:
    long = sampling_uniforms(seed, Position(0, 0), [0, 1], 9)
    assert np.array_equal(long[:, :4], sampling_uniforms(seed, Position(0, 0), [0, 1], 4))


def test_seed_epoch_step_and_sample_each_give_another_stream() -> None:
    streams = [
        sampling_uniforms(0, Position(0, 0), [0], 8),
        sampling_uniforms(1, Position(0, 0), [0], 8),
        sampling_uniforms(0, Position(1, 0), [0], 8),
        sampling_uniforms(0, Position(0, 1), [0], 8),
        sampling_uniforms(0, Position(0, 0), [1], 8),
    ]
    assert len({stream.tobytes() for stream in streams}) == len(streams)


def test_uniforms_fill_the_unit_interval_evenly_and_stay_below_one() -> None:
    drawn = sampling_uniforms(0, Position(0, 0), range(200), 500)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=20, range=(0.0, 1.0))
    expected = drawn.size / 20
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 43.8, "19 degrees of freedom, p = 0.001"


@given(words, st.integers(0, 1000), st.integers(1, 300))
def test_an_epoch_shows_every_prompt_once(seed: int, epoch: int, count: int) -> None:
    assert sorted(permutation(seed, epoch, count).tolist()) == list(range(count))


def test_epochs_differ_in_order() -> None:
    assert permutation(0, 0, 50).tolist() != permutation(0, 1, 50).tolist()
