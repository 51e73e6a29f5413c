"""Slices of the vocabulary's logits give what all logits at once would."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from rollforward.engines.mindspore.vocabulary import TokenLogprobs, log_from_1, slices_of

TOKENS, VOCABULARY, HIDDEN = 7, 11, 3


class WithGradients(nn.Cell):
    def __init__(self, slice_bytes: int) -> None:
        super().__init__()
        self.logprobs = TokenLogprobs(TOKENS, VOCABULARY, slice_bytes)
        self.gradients = ms.ops.GradOperation(get_all=True, sens_param=True)(self.logprobs)

    def construct(self, hidden, weight, targets, sensitivity):  # type: ignore[no-untyped-def]
        found = self.gradients(hidden, weight, targets, sensitivity)
        return self.logprobs(hidden, weight, targets), found[0], found[1]


@pytest.mark.parametrize("slice_rows", [1, 3, 100])
def test_logprobs_and_gradients_are_those_of_the_formula(slice_rows: int) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    source = np.random.default_rng(0)
    hidden, weight = source.normal(size=(TOKENS, HIDDEN)), source.normal(size=(VOCABULARY, HIDDEN))
    targets, sensitivity = source.integers(0, VOCABULARY, TOKENS), source.normal(size=TOKENS)
    logits = hidden @ weight.T
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    logits_gradient = (np.eye(VOCABULARY)[targets] - probabilities) * sensitivity[:, None]

    arrays = (hidden, weight, targets, sensitivity)
    dtypes = (np.float32, np.float32, np.int32, np.float32)
    inputs = [ms.Tensor(array.astype(dtype)) for array, dtype in zip(arrays, dtypes, strict=True)]
    cell = WithGradients(slice_rows * VOCABULARY * 4)
    assert len(cell.logprobs.slices) == -(-TOKENS // slice_rows)
    logprobs, hidden_gradient, weight_gradient = (found.asnumpy() for found in cell(*inputs))
    np.testing.assert_allclose(logprobs, np.log(probabilities[np.arange(TOKENS), targets]), atol=1e-5)
    np.testing.assert_allclose(hidden_gradient, logits_gradient @ weight, atol=1e-5)
    np.testing.assert_allclose(weight_gradient, logits_gradient.T @ hidden, atol=1e-5)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 10), (5, 10), (1024, 49152), (7, 10**9)])
def test_slices_cover_every_token_once_within_the_bound(tokens: int, vocabulary: int) -> None:
    bound = 2**20
    slices = slices_of(tokens, vocabulary, bound)
    assert [token for start, end in slices for token in range(start, end)] == list(range(tokens))
    for start, end in slices:
        assert end - start == 1 or (end - start) * vocabulary * 4 <= bound


class Log(nn.Cell):
    def construct(self, x):  # type: ignore[no-untyped-def]
        return log_from_1(x)


def test_a_number_has_the_same_logarithm_at_any_place_among_any_count() -> None:
    """Otherwise a replay differs: how threads share the numbers changes when a graph has run some times."""
    ms.set_context(mode=ms.GRAPH_MODE)
    numbers = np.random.default_rng(0).uniform(1, 6, 300).astype(np.float32)
    expected = Log()(ms.Tensor(numbers)).asnumpy()
    np.testing.assert_allclose(expected, np.log(numbers.astype(np.float64)), atol=2e-7)
    for first, count in [(0, 1), (0, 5), (3, 15), (7, 16), (1, 17), (40, 33), (100, 147)]:
        found = Log()(ms.Tensor(numbers[first : first + count])).asnumpy()
        assert found.tobytes() == expected[first : first + count].tobytes(), (first, count)
