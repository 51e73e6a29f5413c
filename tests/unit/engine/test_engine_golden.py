"""The model computes what transformers computes, from the same files."""

import numpy as np
import pytest
from golden_models import FAMILIES, GoldenModel, golden_model, logits_of

from rollforward.grpo.types import SamplingSettings


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> GoldenModel:
    return golden_model(request.param)


def test_logits_agree_with_transformers(golden: GoldenModel) -> None:
    found = logits_of(golden.family, golden.prompts, golden.mask)
    np.testing.assert_allclose(found[golden.mask], golden.logits[golden.mask], atol=1e-4, rtol=0)


def test_padding_at_the_left_changes_no_logits(golden: GoldenModel) -> None:
    ids, mask = golden.left_padded()
    found = logits_of(golden.family, ids, mask)
    np.testing.assert_allclose(found[mask], golden.logits[golden.mask], atol=1e-4, rtol=0)


def test_greedy_continuation_is_that_of_transformers(golden: GoldenModel) -> None:
    samples, tokens = golden.greedy.shape
    sampling = SamplingSettings(max_tokens=tokens, temperature=0.0)
    generator = golden.generator(rows=samples, sampling=sampling)
    unused = np.zeros(golden.greedy.shape, np.float32)
    right = generator.generate(golden.prompts, golden.mask, unused)
    left = generator.generate(*golden.left_padded(), unused)
    np.testing.assert_array_equal(right.completion_ids, golden.greedy)
    np.testing.assert_array_equal(left.completion_ids, golden.greedy)
    assert not right.stopped.any()
    assert (right.lengths == tokens).all()
