"""What samples learn together, in shared rows and behind one prompt, is what each learns alone."""

from dataclasses import replace

import numpy as np
import pytest
from engine_case import SETTINGS, VOCABULARY, initial_tensors, restore, rows_of, snapshot
from mindspore_case import MODEL, create

from rollforward.engines.mindspore.batches import chunk_of, ladder_of, packed
from rollforward.engines.mindspore.engine import MindSporeEngine
from rollforward.grpo.objective import token_terms
from rollforward.grpo.types import TokenBatch, TrainingBatch

PROMPT, TOKENS = 30, 230
GROUPS = {30: (230, 90, 1), 11: (60, 40, 17, 9, 2), 1: (100, 1)}
"""Length of a prompt -> of its completions."""
ENGINE = replace(
    SETTINGS,
    model_config=MODEL,
    prompt_length=PROMPT,
    samples_per_micro_batch=2,
    sampling=replace(SETTINGS.sampling, max_tokens=TOKENS),
)


@pytest.fixture(scope="module")
def engine() -> MindSporeEngine:
    return create(ENGINE)


def batch_of(engine: MindSporeEngine) -> TrainingBatch:
    source = np.random.default_rng(7)
    lengths = [(prompt, each) for prompt, completions in GROUPS.items() for each in completions]
    prompts = {prompt: source.integers(2, VOCABULARY, PROMPT) for prompt in GROUPS}
    mask = np.arange(TOKENS) < np.array([each for _, each in lengths])[:, None]
    made = TokenBatch(
        prompt_ids=np.array([prompts[prompt] for prompt, _ in lengths], np.int32),
        prompt_mask=np.array([np.arange(PROMPT) >= PROMPT - prompt for prompt, _ in lengths]),
        completion_ids=source.integers(2, VOCABULARY, mask.shape).astype(np.int32),
        completion_mask=mask,
    )
    reference = engine.reference_logprobs(made)
    return TrainingBatch(
        tokens=made,
        advantages=source.normal(0, 1, len(lengths)).astype(np.float32),
        token_weights=(mask / mask.sum()).astype(np.float32),
        reference_logprobs=reference,
        old_logprobs=np.where(mask, reference + source.normal(0, 0.3, mask.shape), 0).astype(np.float32),
    )


def test_these_samples_share_rows_and_prompts_in_rows_of_two_widths(engine: MindSporeEngine) -> None:
    found = packed(chunk_of(batch_of(engine).tokens), ladder_of(ENGINE))
    assert len({each.width for each in found}) > 1
    rows = [row for each in found for row in each.rows]
    assert any(len(row) > 1 for row in rows)
    assert any(len(group) > 2 for row in rows for group in row)


def test_the_gradient_is_the_sum_of_what_each_gives_alone(engine: MindSporeEngine) -> None:
    restore(engine, initial_tensors(engine))
    start = snapshot(engine)
    batch = batch_of(engine)
    outcome = engine.update(batch, 1e-3)
    together = gradient_of(engine)
    alone = {name: np.zeros_like(each) for name, each in together.items()}
    losses = []
    for sample in range(len(batch.advantages)):
        restore(engine, start)
        one = rows_of(batch, slice(sample, sample + 1))
        np.testing.assert_allclose(
            engine.reference_logprobs(one.tokens), one.reference_logprobs, rtol=1e-6, atol=2e-6
        )
        found = engine.update(one, 1e-3)
        losses.append(found.loss)
        np.testing.assert_allclose(found.logprobs[0], outcome.logprobs[sample], rtol=1e-6, atol=2e-6)
        for name, each in gradient_of(engine).items():
            alone[name] += each
    assert outcome.loss == pytest.approx(sum(losses), rel=1e-5, abs=1e-6)
    for name, each in together.items():
        length = np.sqrt((alone[name] ** 2).sum())
        assert np.sqrt(((each - alone[name]) ** 2).sum()) <= 1e-6 * max(length, outcome.grad_norm), name


def test_the_gradient_is_that_of_the_formulas(engine: MindSporeEngine) -> None:
    restore(engine, initial_tensors(engine))
    start = snapshot(engine)
    batch = batch_of(engine)
    outcome = engine.update(batch, 1e-3)
    assert batch.old_logprobs is not None
    terms = token_terms(
        outcome.logprobs.astype(np.float64),
        batch.old_logprobs,
        batch.reference_logprobs,
        batch.advantages,
        SETTINGS.objective,
    )
    assert outcome.loss == pytest.approx((batch.token_weights * terms.loss).sum(), rel=1e-5, abs=1e-6)
    assert outcome.kl == pytest.approx((batch.token_weights * terms.kl).sum(), rel=1e-5)
    gradient = gradient_of(engine)
    length = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert outcome.grad_norm == pytest.approx(length, rel=1e-5)
    losses = []
    for sign in (1, -1):
        restore(engine, start)
        for name, direction in gradient.items():
            moved = start["policy_model"][name] + (sign * 1e-3 / length * direction).astype(np.float32)
            engine.load("policy_model", name, moved)
        losses.append(engine.update(batch, 0.0).loss)
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(length, rel=0.02)


def gradient_of(engine: MindSporeEngine) -> dict[str, np.ndarray]:
    """Of the step just done, read off the first moment after step one."""
    beta1 = SETTINGS.optimizer.adam_beta1
    optimizer = engine.tensors()["optimizer"]
    return {
        name: optimizer[f"adam_m.{name}"].astype(np.float64) / (1 - beta1)
        for name in engine.tensors()["policy_model"]
    }
