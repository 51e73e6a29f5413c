"""Tokens are drawn from the filtered distribution, by inversion, and from nothing else."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.typing import NDArray

from rollforward.engines.mindspore.sampling import Sampler
from rollforward.grpo.types import SamplingSettings

ROWS, VOCABULARY = 64, 50

SETTINGS = {
    "plain": SamplingSettings(max_tokens=1),
    "cold": SamplingSettings(max_tokens=1, temperature=0.4),
    "hot": SamplingSettings(max_tokens=1, temperature=3.0),
    "top-k": SamplingSettings(max_tokens=1, top_k=5),
    "top-k of one": SamplingSettings(max_tokens=1, top_k=1),
    "top-k of more than all": SamplingSettings(max_tokens=1, top_k=VOCABULARY + 1),
    "top-p": SamplingSettings(max_tokens=1, top_p=0.7),
    "top-p of nearly nothing": SamplingSettings(max_tokens=1, top_p=1e-6),
    "all": SamplingSettings(max_tokens=1, temperature=1.5, top_k=20, top_p=0.9),
}


@pytest.fixture(scope="module", params=SETTINGS)
def drawn_by(request: pytest.FixtureRequest) -> tuple[SamplingSettings, Sampler]:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    settings = SETTINGS[request.param]
    return settings, Sampler(settings, VOCABULARY)


def logits(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)


def filtered(row: NDArray[np.float32], settings: SamplingSettings) -> NDArray[np.float64]:
    """The distribution of one row, worked out token by token."""
    scaled = row.astype(np.float64) / settings.temperature
    weights = np.exp(scaled - scaled.max())
    ranked = [int(token) for token in np.argsort(-weights)]
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    total, reached, kept = sum(weights[ranked]), 0.0, []
    for token in ranked:
        if reached >= settings.top_p * total:
            break
        kept.append(token)
        reached += weights[token]
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / sum(weights[kept])
    return probabilities


def draw(sampler: Sampler, rows: NDArray[np.float32], uniforms: NDArray[np.float32]) -> NDArray[np.int32]:
    found: NDArray[np.int32] = sampler(Tensor(rows), Tensor(uniforms)).asnumpy()
    return found


def test_each_uniform_number_falls_into_its_tokens_share(drawn_by: tuple[SamplingSettings, Sampler]) -> None:
    settings, sampler = drawn_by
    for seed in range(4):
        rows = logits(seed)
        uniforms = np.random.default_rng(1000 + seed).random(ROWS, np.float32)
        for row, uniform, token in zip(rows, uniforms, draw(sampler, rows, uniforms), strict=True):
            probabilities = filtered(row, settings)
            upper = np.cumsum(probabilities)[token]
            assert probabilities[token] > 0, "a token that was filtered"
            assert upper - probabilities[token] - 1e-5 <= uniform <= upper + 1e-5


def test_even_draws_give_every_token_its_share(drawn_by: tuple[SamplingSettings, Sampler]) -> None:
    """Evenly spaced numbers through one distribution count out its probabilities."""
    settings, sampler = drawn_by
    row = logits(99)[0]
    uniforms = ((np.arange(ROWS * 32) + 0.5) / (ROWS * 32)).astype(np.float32)
    rows = np.repeat(row[None], ROWS, axis=0)
    tokens = np.concatenate([draw(sampler, rows, part) for part in np.split(uniforms, 32)])
    shares = np.bincount(tokens, minlength=VOCABULARY) / tokens.size
    np.testing.assert_allclose(shares, filtered(row, settings), atol=2 / tokens.size)


def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(
    drawn_by: tuple[SamplingSettings, Sampler],
) -> None:
    settings, sampler = drawn_by
    rows = logits(5)
    rows[:, 0] = rows[:, -1] = -1000.0  # impossible tokens, so that a draw that slips off either end is seen
    for uniform in (np.float32(0), np.nextafter(np.float32(1), np.float32(0))):
        tokens = draw(sampler, rows, np.full(ROWS, uniform, np.float32))
        for row, token in zip(rows, tokens, strict=True):
            probabilities = filtered(row, settings)
            assert probabilities[token] > 0
            outside = probabilities[token + 1 :] if uniform else probabilities[:token]
            assert outside.sum() < 1e-6


def test_a_large_vocabulary_is_drawn_to_its_end() -> None:
    """Float32 sums over a vocabulary of real size: the last tokens are still reached, and never passed."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    vocabulary = 150_000
    sampler = Sampler(SamplingSettings(max_tokens=1), vocabulary)
    uniforms = np.array([0.0, 0.25, 0.5, 0.75, 0.999, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    tokens = draw(sampler, np.zeros((len(uniforms), vocabulary), np.float32), uniforms)
    np.testing.assert_allclose(tokens, uniforms * vocabulary, atol=1)
    assert tokens.max() < vocabulary


def test_greedy_takes_the_largest_and_ignores_the_numbers() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    sampler = Sampler(SamplingSettings(max_tokens=1, temperature=0.0, top_p=0.5), VOCABULARY)
    rows = logits(3)
    for uniform in (0.0, 0.9):
        tokens = draw(sampler, rows, np.full(ROWS, uniform, np.float32))
        np.testing.assert_array_equal(tokens, rows.argmax(axis=1))
