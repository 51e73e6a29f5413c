"""What every engine promises (`grpo.ports.Engine`), held against each engine there is."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_engine
from engine_case import (
    PAD,
    SETTINGS,
    STOP,
    TOKENS,
    VOCABULARY,
    EngineCase,
    assert_same_bits,
    joined,
    prompts,
    restore,
    rows_of,
    snapshot,
    token_batch,
    training_batch,
    uniforms,
)

from rollforward.errors import EngineError, NonFinite
from rollforward.grpo.objective import token_terms
from rollforward.grpo.ports import Engine
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Saved, ShadowCheckpoints, find, read_tensors
from rollforward.store.saved import About
from rollforward.tensors import layout_of


# Once for all tests: every test starts from the initial tensors, and compiling is what takes time.
@cache
def toy() -> EngineCase:
    return EngineCase("toy", toy_engine.create, toy_engine.toy_model_config(VOCABULARY))


@cache
def toy_copied() -> EngineCase:
    return EngineCase(
        "toy-copied", toy_engine.create_copied, toy_engine.toy_model_config(VOCABULARY), views=False
    )


@cache
def mindspore() -> EngineCase:
    import mindspore_case

    return EngineCase("mindspore", mindspore_case.create, mindspore_case.ONE_LAYER)


@cache
def mindspore_copied() -> EngineCase:
    import mindspore_case

    return EngineCase("mindspore-copied", mindspore_case.create_copied, mindspore_case.ONE_LAYER, views=False)


CASES = [
    pytest.param(toy, id="toy"),
    pytest.param(toy_copied, id="toy-copied"),
    pytest.param(mindspore, id="mindspore", marks=pytest.mark.engine),
    pytest.param(mindspore_copied, id="mindspore-copied", marks=pytest.mark.engine),
]

OTHER_SETTINGS = pytest.mark.parametrize("case", [CASES[0], CASES[2]], indirect=True)
"""For tests that need an engine of other settings, which is one more to compile. Whether its memory is copied
changes no bit (`test_copies_and_views_of_memory_give_the_same_bits`)."""

COOLER = replace(SETTINGS.sampling, temperature=0.7)

CLIPPING = replace(SETTINGS.optimizer, max_grad_norm=0.2)
"""Between the gradient norms of the two batches that are clipped and not."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> EngineCase:
    make: Callable[[], EngineCase] = request.param
    return make()


def gradient_of(engine: Engine) -> dict[str, np.ndarray]:
    """The gradient of the step just done, read off the first moment after step one."""
    beta1 = SETTINGS.optimizer.adam_beta1
    optimizer = engine.tensors()["optimizer"]
    return {
        name: optimizer[f"adam_m.{name}"].astype(np.float64) / (1 - beta1)
        for name in engine.tensors()["policy_model"]
    }


class TestTensors:
    def test_every_role_is_there_and_moments_match_parameters(self, case: EngineCase) -> None:
        tensors = case.engine().tensors()
        assert set(tensors) == {"policy_model", "optimizer", "ref"}
        policy = {name: array.shape for name, array in tensors["policy_model"].items()}
        assert {name: array.shape for name, array in tensors["ref"].items()} == policy
        moments = {f"adam_{kind}.{name}": shape for kind in "mv" for name, shape in policy.items()}
        assert {n: a.shape for n, a in tensors["optimizer"].items()} == {**moments, "global_step": (1,)}

    def test_a_view_taken_early_shows_the_newest_values(self, case: EngineCase) -> None:
        if not case.views:
            pytest.skip("the host does not see this engine's memory")
        engine = case.engine()
        assert engine.views
        views = {role: dict(tensors) for role, tensors in engine.tensors().items()}
        before = snapshot(engine)
        engine.update(training_batch(engine, 4, seed=1), 1e-2)
        assert_same_bits(views, snapshot(engine))
        changed = [
            name
            for name, array in views["policy_model"].items()
            if array.tobytes() != before["policy_model"][name].tobytes()
        ]
        assert changed == list(views["policy_model"])

    def test_a_copy_taken_early_stays_as_it_was(self, case: EngineCase) -> None:
        if case.views:
            pytest.skip("the host sees this engine's memory")
        engine = case.engine()
        assert not engine.views
        copies = {role: dict(tensors) for role, tensors in engine.tensors().items()}
        before = snapshot(engine)
        engine.update(training_batch(engine, 4, seed=1), 1e-2)
        assert_same_bits(copies, before)
        name = next(iter(copies["policy_model"]))
        copies["policy_model"][name][...] = 7
        assert not (engine.tensors()["policy_model"][name] == 7).any()

    @pytest.mark.parametrize("way", ["load", "views"])
    def test_what_is_put_in_place_is_what_is_computed_with(self, case: EngineCase, way: str) -> None:
        if way == "views" and not case.views:
            pytest.skip("the host does not see this engine's memory")
        engine = case.engine()
        batch = training_batch(engine, 4, seed=1)
        engine.update(batch, 1e-2)
        reached = snapshot(engine)
        expected = engine.update(batch, 1e-2)
        final = snapshot(engine)
        other = case.twin()
        other.update(training_batch(engine, 4, seed=9), 0.1)
        if way == "views":
            for role, named in other.tensors().items():
                for name, array in named.items():
                    array[...] = reached[role][name]
        else:
            restore(other, reached)
        assert_same_bits(snapshot(other), reached)
        assert_outcomes_equal(other.update(batch, 1e-2), expected)
        assert_same_bits(snapshot(other), final)

    @pytest.mark.parametrize(
        ("role", "name", "change"),
        [
            ("nobody", None, lambda a: a),
            ("policy_model", "no.such.tensor", lambda a: a),
            ("policy_model", None, lambda a: a[:-1]),
            ("policy_model", None, lambda a: a.astype(np.float64)),
            ("ref", None, lambda a: a[None]),
        ],
    )
    def test_a_tensor_that_does_not_fit_is_refused(
        self, case: EngineCase, role: str, name: str | None, change: Any
    ) -> None:
        engine = case.engine()
        before = snapshot(engine)
        known, array = next(iter(engine.tensors()["policy_model"].items()))
        with pytest.raises(EngineError):
            engine.load(role, name or known, change(array.copy()))
        assert_same_bits(snapshot(engine), before)

    def test_the_layout_is_that_of_the_tensors(self, case: EngineCase) -> None:
        engine = case.engine()
        assert engine.layout() == layout_of(engine.tensors())
        assert all(spec.is_whole for named in engine.layout().values() for spec in named.values())

    def test_a_revision_changes_with_its_role_and_only_then(self, case: EngineCase) -> None:
        engine = case.engine()
        batch = training_batch(engine, 4, seed=1)

        def changed(work: Callable[[], object]) -> set[str]:
            tensors, before = snapshot(engine), {role: engine.revision(role) for role in engine.layout()}
            work()
            moved = {role for role, revision in before.items() if engine.revision(role) > revision}
            for role in before.keys() - moved:
                assert engine.revision(role) == before[role]
                assert_same_bits({role: engine.tensors()[role]}, {role: tensors[role]})
            return moved

        assert changed(lambda: engine.generate(*prompts(4), uniforms(4))) == set()
        assert changed(lambda: engine.reference_logprobs(batch.tokens)) == set()
        assert changed(lambda: engine.update(batch, 1e-2)) == {"policy_model", "optimizer"}
        assert changed(engine.sync_reference) == {"ref"}
        for role in engine.layout():
            name, array = next(iter(snapshot(engine)[role].items()))
            assert changed(partial(engine.load, role, name, array)) == {role}


class TestGenerate:
    def test_completions_are_padded_after_their_end(self, case: EngineCase) -> None:
        rows = 24
        made = case.engine().generate(*prompts(rows), uniforms(rows))
        assert made.completion_ids.dtype == np.int32
        assert made.completion_ids.shape == (rows, TOKENS)
        assert made.stopped.dtype == np.bool_
        assert 0 < made.stopped.sum() < rows
        for ids, length, stopped in zip(made.completion_ids, made.lengths, made.stopped, strict=True):
            assert (ids[length:] == PAD).all()
            assert STOP not in ids[: length - 1]
            assert stopped == (ids[length - 1] == STOP)
            assert stopped or length == TOKENS

    def test_the_uniforms_are_the_only_randomness(self, case: EngineCase) -> None:
        engine = case.engine()
        first = engine.generate(*prompts(8), uniforms(8))
        engine.generate(*prompts(8, seed=3), uniforms(8, seed=3))
        again = engine.generate(*prompts(8), uniforms(8))
        other = engine.generate(*prompts(8), uniforms(8, seed=1))
        np.testing.assert_array_equal(first.completion_ids, again.completion_ids)
        np.testing.assert_array_equal(first.lengths, again.lengths)
        assert (first.completion_ids != other.completion_ids).any()

    def test_generating_changes_no_tensor(self, case: EngineCase) -> None:
        engine = case.engine()
        before = snapshot(engine)
        engine.generate(*prompts(8), uniforms(8))
        assert_same_bits(snapshot(engine), before)

    def test_a_row_is_the_same_whoever_shares_its_batch(self, case: EngineCase) -> None:
        engine = case.engine()
        ids, mask = prompts(11)
        numbers = uniforms(11)
        whole = engine.generate(ids, mask, numbers)
        for rows in ([10, 2, 7, 3, 0], [4], list(range(10, -1, -1))):
            part = engine.generate(ids[rows], mask[rows], numbers[rows])
            np.testing.assert_array_equal(part.completion_ids, whole.completion_ids[rows])
            np.testing.assert_array_equal(part.lengths, whole.lengths[rows])
            np.testing.assert_array_equal(part.stopped, whole.stopped[rows])

    def test_the_side_of_the_padding_does_not_matter(self, case: EngineCase) -> None:
        engine = case.engine()
        ids, mask = prompts(8)
        order = np.argsort(~mask, axis=1, kind="stable")
        right_ids, right_mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
        assert (right_mask != mask).any()
        left = engine.generate(ids, mask, uniforms(8))
        right = engine.generate(right_ids, right_mask, uniforms(8))
        np.testing.assert_array_equal(left.completion_ids, right.completion_ids)


class TestReferenceLogprobs:
    def test_they_are_logprobs_and_zero_where_masked(self, case: EngineCase) -> None:
        tokens = token_batch(7)
        logprobs = case.engine().reference_logprobs(tokens)
        assert logprobs.dtype == np.float32
        assert logprobs.shape == tokens.completion_mask.shape
        assert (logprobs[~tokens.completion_mask] == 0).all()
        assert (logprobs[tokens.completion_mask] < 0).all()

    def test_over_all_tokens_they_are_a_distribution(self, case: EngineCase) -> None:
        one = token_batch(1)
        repeat = {name: np.repeat(getattr(one, name), VOCABULARY, 0) for name in vars(one)}
        repeat["completion_ids"][:, 0] = np.arange(VOCABULARY)
        logprobs = case.engine().reference_logprobs(replace(one, **repeat))
        assert np.exp(logprobs[:, 0].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)

    @OTHER_SETTINGS
    def test_they_are_of_the_distribution_that_completions_are_drawn_from(self, case: EngineCase) -> None:
        engine = case.engine(sampling=COOLER)
        engine.sync_reference()
        one, rows = token_batch(1), 200
        repeat = {name: np.repeat(getattr(one, name), VOCABULARY, 0) for name in vars(one)}
        repeat["completion_ids"][:, 0] = np.arange(VOCABULARY)
        tokens = replace(one, **repeat)
        logprobs = engine.reference_logprobs(tokens)[:, 0].astype(np.float64)
        plain = case.engine()
        plain.sync_reference()
        scaled = plain.reference_logprobs(tokens)[:, 0].astype(np.float64) / 0.7
        np.testing.assert_allclose(logprobs, scaled - np.log(np.exp(scaled).sum()), atol=1e-5)
        no_weights = np.zeros((VOCABULARY, TOKENS), np.float32)
        batch = training_batch(plain, VOCABULARY, tokens=tokens, token_weights=no_weights)
        np.testing.assert_allclose(engine.update(batch, 0.0).logprobs[:, 0], logprobs, atol=1e-5)
        # And the sampler, which finds its token by inverting the cumulative distribution, agrees.
        edges = np.cumsum(np.exp(logprobs))
        drawn = np.repeat(uniforms(1), rows, 0)
        drawn[:, 0] = (np.arange(rows) + 0.5) / rows
        prompt = [np.repeat(each, rows, 0) for each in (one.prompt_ids, one.prompt_mask)]
        made = engine.generate(prompt[0], prompt[1], drawn).completion_ids[:, 0]
        clear = np.abs(drawn[:, :1] - edges).min(axis=1) > 1e-4
        assert clear.sum() > rows / 2
        assert made[clear].tolist() == np.searchsorted(edges, drawn[clear, 0]).tolist()

    def test_the_side_of_the_padding_does_not_matter(self, case: EngineCase) -> None:
        engine = case.engine()
        tokens = token_batch(6)
        order = np.argsort(~tokens.prompt_mask, axis=1, kind="stable")
        right = replace(
            tokens,
            prompt_ids=np.take_along_axis(tokens.prompt_ids, order, 1),
            prompt_mask=np.take_along_axis(tokens.prompt_mask, order, 1),
        )
        np.testing.assert_array_equal(engine.reference_logprobs(tokens), engine.reference_logprobs(right))

    @OTHER_SETTINGS
    def test_what_greedy_decoding_chose_is_the_likeliest(self, case: EngineCase) -> None:
        greedy = replace(SETTINGS.sampling, temperature=0.0)
        engine = case.engine(sampling=greedy)
        engine.sync_reference()
        ids, mask = prompts(4)
        made = engine.generate(ids, mask, uniforms(4))
        tokens = replace(
            token_batch(4),
            prompt_ids=ids,
            prompt_mask=mask,
            completion_ids=made.completion_ids,
            completion_mask=np.arange(TOKENS) < made.lengths[:, None],
        )
        chosen = engine.reference_logprobs(tokens)[:, 0]
        for token in range(VOCABULARY):
            other = made.completion_ids.copy()
            other[:, 0] = token
            logprobs = engine.reference_logprobs(replace(tokens, completion_ids=other))[:, 0]
            assert (logprobs <= chosen + 1e-5).all()


class TestUpdate:
    def test_the_outcome_is_that_of_the_formulas(self, case: EngineCase) -> None:
        engine = case.engine()
        batch = training_batch(engine, 7)
        outcome = engine.update(batch, 1e-3)
        assert batch.old_logprobs is not None
        terms = token_terms(
            outcome.logprobs.astype(np.float64),
            batch.old_logprobs,
            batch.reference_logprobs,
            batch.advantages,
            SETTINGS.objective,
        )
        weights = batch.token_weights
        assert outcome.loss == pytest.approx((weights * terms.loss).sum(), rel=1e-5)
        assert outcome.kl == pytest.approx((weights * terms.kl).sum(), rel=1e-5)
        assert outcome.clip_fraction == pytest.approx((weights * terms.clipped).sum(), rel=1e-5)
        assert 0.05 < outcome.clip_fraction < 0.95

    def test_logprobs_are_those_before_the_step(self, case: EngineCase) -> None:
        engine = case.engine()
        engine.sync_reference()
        batch = training_batch(engine, 7)
        outcome = engine.update(batch, 0.1)
        np.testing.assert_allclose(outcome.logprobs, batch.reference_logprobs, atol=1e-5)
        assert (outcome.logprobs[~batch.tokens.completion_mask] == 0).all()

    @OTHER_SETTINGS
    @pytest.mark.parametrize("changes", [{}, {"sampling": COOLER}], ids=["plain", "temperature 0.7"])
    def test_the_gradient_is_that_of_finite_differences(
        self, case: EngineCase, changes: dict[str, Any]
    ) -> None:
        engine = case.engine(**changes)
        start = snapshot(engine)
        batch = training_batch(engine, 4, seed=1)
        norm = engine.update(batch, 1e-3).grad_norm
        gradient = gradient_of(engine)
        assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradient.values())), rel=1e-5)
        # Each tensor alone along its own gradient, and all of them along a random direction.
        source = np.random.default_rng(5)
        random = {name: source.normal(size=g.shape) for name, g in gradient.items()}
        for direction in [random, *({name: g} for name, g in gradient.items())]:
            length = np.sqrt(sum((d**2).sum() for d in direction.values()))
            slope = sum((gradient[name] * d).sum() for name, d in direction.items()) / length
            losses = []
            for sign in (1, -1):
                restore(engine, start)
                for name, d in direction.items():
                    moved = start["policy_model"][name] + (sign * 3e-3 / length * d).astype(np.float32)
                    engine.load("policy_model", name, moved)
                losses.append(engine.update(batch, 0.0).loss)
            assert (losses[0] - losses[1]) / 6e-3 == pytest.approx(slope, rel=0.03, abs=3e-4), list(direction)

    @OTHER_SETTINGS
    def test_with_beta_zero_nothing_comes_of_the_reference_or_of_samples_without_an_advantage(
        self, case: EngineCase
    ) -> None:
        batch = training_batch(case.engine(), 8, seed=2)
        engine = case.engine(objective=replace(SETTINGS.objective, beta=0.0))
        start = snapshot(engine)
        idle = np.array([0, 3, 4])
        batch.advantages[idle] = 0
        outcome = engine.update(batch, 1e-3)
        learnt = snapshot(engine)
        assert outcome.kl == 0
        assert outcome.grad_norm > 0
        # Other tokens of the same number, and another reference.
        ids = batch.tokens.completion_ids.copy()
        ids[idle] = 2 + (ids[idle] + 5) % (VOCABULARY - 2)
        other = replace(
            batch,
            tokens=replace(batch.tokens, completion_ids=ids),
            reference_logprobs=np.zeros_like(batch.reference_logprobs),
        )
        restore(engine, start)
        again = engine.update(other, 1e-3)
        assert (again.loss, again.grad_norm, again.clip_fraction) == (
            outcome.loss,
            outcome.grad_norm,
            outcome.clip_fraction,
        )
        assert_same_bits(snapshot(engine), learnt)
        # They add what they would if they were computed: next to nothing, for next to no advantage.
        restore(engine, start)
        batch.advantages[idle] = 1e-30
        computed = engine.update(batch, 1e-3)
        assert computed.loss == pytest.approx(outcome.loss, rel=1e-6)
        assert computed.grad_norm == pytest.approx(outcome.grad_norm, rel=1e-5)
        assert computed.clip_fraction >= outcome.clip_fraction

    @OTHER_SETTINGS
    def test_without_any_advantage_and_with_beta_zero_the_gradient_is_zero(self, case: EngineCase) -> None:
        batch = training_batch(case.engine(), 7, advantages=np.zeros(7, np.float32))
        engine = case.engine(objective=replace(SETTINGS.objective, beta=0.0))
        outcome = engine.update(batch, 1e-3)
        assert (outcome.loss, outcome.grad_norm, outcome.kl) == (0, 0, 0)
        assert engine.tensors()["optimizer"]["global_step"] == 1

    def test_without_old_logprobs_the_ratio_is_one(self, case: EngineCase) -> None:
        engine = case.engine()
        start = snapshot(engine)
        batch = training_batch(engine, 4, seed=1, old_logprobs=None)
        outcome = engine.update(batch, 1e-3)
        implicit = gradient_of(engine)
        restore(engine, start)
        explicit = engine.update(replace(batch, old_logprobs=outcome.logprobs), 1e-3)
        assert outcome.clip_fraction == explicit.clip_fraction == 0
        assert outcome.loss == pytest.approx(explicit.loss, rel=1e-6)
        for name, gradient in gradient_of(engine).items():
            np.testing.assert_allclose(gradient, implicit[name], atol=1e-6)

    def test_adamw_is_adamw(self, case: EngineCase) -> None:
        engine = case.engine()
        settings = SETTINGS.optimizer
        expected = {n: a.astype(np.float64) for n, a in snapshot(engine)["policy_model"].items()}
        first = {name: np.zeros(array.shape) for name, array in expected.items()}
        second = {name: np.zeros(array.shape) for name, array in expected.items()}
        batch = training_batch(engine, 4, seed=1)
        for step, rate in enumerate((1e-2, 3e-2, 1e-3), 1):
            before = {n: m.astype(np.float64) for n, m in first.items()}
            engine.update(batch, rate)
            for name, value in expected.items():
                moment = engine.tensors()["optimizer"][f"adam_m.{name}"].astype(np.float64)
                gradient = (moment - settings.adam_beta1 * before[name]) / (1 - settings.adam_beta1)
                first[name] = moment
                second[name] = settings.adam_beta2 * second[name] + (1 - settings.adam_beta2) * gradient**2
                if value.ndim >= 2:
                    value *= 1 - rate * settings.weight_decay
                root = np.sqrt(second[name] / (1 - settings.adam_beta2**step))
                value -= rate * first[name] / (1 - settings.adam_beta1**step) / (root + settings.eps)
        assert engine.tensors()["optimizer"]["global_step"].tolist() == [3]
        # Where the gradient is noise (a key's bias shifts all scores alike) so is its sign; skip those.
        for name, array in engine.tensors()["policy_model"].items():
            firm = np.sqrt(second[name]) > 1e-4
            np.testing.assert_allclose(array[firm], expected[name][firm], atol=2e-4, err_msg=name)
            assert firm.any() or name.endswith("k_proj.bias")

    @OTHER_SETTINGS
    def test_a_long_gradient_is_clipped_and_reported_in_full(self, case: EngineCase) -> None:
        engine, clipping = case.engine(), case.engine(optimizer=CLIPPING)
        batch = training_batch(engine, 4)
        norm = engine.update(batch, 1e-3).grad_norm
        assert norm > CLIPPING.max_grad_norm
        assert clipping.update(batch, 1e-3).grad_norm == norm
        whole = gradient_of(engine)
        for name, gradient in gradient_of(clipping).items():
            np.testing.assert_allclose(gradient, whole[name] * CLIPPING.max_grad_norm / norm, atol=1e-6)

    @OTHER_SETTINGS
    def test_a_short_gradient_is_left_alone(self, case: EngineCase) -> None:
        engine, clipping = case.engine(), case.engine(optimizer=CLIPPING)
        batch = training_batch(engine, 4)
        batch = replace(batch, token_weights=batch.token_weights / 16)
        assert engine.update(batch, 1e-3).grad_norm < CLIPPING.max_grad_norm
        clipping.update(batch, 1e-3)
        assert_same_bits(snapshot(clipping), snapshot(engine))

    def test_the_same_bits_in_give_the_same_bits_out(self, case: EngineCase) -> None:
        one, two = case.engine(), case.twin()
        for seed in (0, 1, 3):
            batch = training_batch(one, 6, seed=seed)
            assert_outcomes_equal(one.update(batch, 1e-2), two.update(batch, 1e-2))
        assert_same_bits(snapshot(one), snapshot(two))

    def test_rows_without_weight_change_nothing(self, case: EngineCase) -> None:
        engine = case.engine()
        batch = training_batch(engine, 6)
        outcome = engine.update(batch, 1e-2)
        expected = gradient_of(engine)
        junk = training_batch(engine, 5, seed=8)
        both = joined(batch, replace(junk, token_weights=np.zeros_like(junk.token_weights)))
        engine = case.engine()
        padded = engine.update(both, 1e-2)
        assert padded.loss == pytest.approx(outcome.loss, rel=1e-6)
        for name, gradient in gradient_of(engine).items():
            np.testing.assert_allclose(gradient, expected[name], atol=1e-6)

    @OTHER_SETTINGS
    @pytest.mark.parametrize("rows", [1, 3, 4, 9])
    def test_a_batch_may_have_any_number_of_rows(self, case: EngineCase, rows: int) -> None:
        engine = case.engine()
        start = snapshot(engine)
        batch = training_batch(engine, rows)
        outcome = engine.update(batch, 1e-3)
        whole = gradient_of(engine)
        assert outcome.logprobs.shape == (rows, TOKENS)
        added = {name: np.zeros(g.shape) for name, g in whole.items()}
        for row in range(rows):
            restore(engine, start)
            engine.update(rows_of(batch, [row]), 1e-3)
            for name, gradient in gradient_of(engine).items():
                added[name] += gradient
        for name, gradient in whole.items():
            np.testing.assert_allclose(gradient, added[name], atol=1e-6)

    @OTHER_SETTINGS
    def test_chunks_give_what_they_give_by_themselves(self, case: EngineCase) -> None:
        """Of nine rows each: the second micro-batch of a chunk is filled up."""
        engine, alone = case.engine(chunks=3), case.engine()
        parts = [training_batch(alone, 9, seed) for seed in (0, 2, 4)]
        outcome = engine.update(joined(*parts), 1e-3)
        added = gradient_of(engine)
        start = snapshot(alone)
        losses, sums = [], {name: np.zeros(gradient.shape) for name, gradient in added.items()}
        for number, part in enumerate(parts):
            restore(alone, start)
            found = alone.update(part, 1e-3)
            losses.append(found.loss)
            assert found.logprobs.tobytes() == outcome.logprobs[9 * number : 9 * number + 9].tobytes()
            for name, gradient in gradient_of(alone).items():
                sums[name] += gradient
        assert outcome.loss == math.fsum(losses)
        for name, gradient in added.items():
            np.testing.assert_allclose(gradient, sums[name], atol=1e-6)

    def test_what_is_rewarded_becomes_likelier(self, case: EngineCase) -> None:
        engine = case.engine()
        engine.sync_reference()
        batch = training_batch(engine, 4, seed=1, old_logprobs=None)
        batch = replace(batch, advantages=np.array([1, 1, -1, -1], dtype=np.float32))
        before = engine.update(batch, 1e-2).logprobs.sum(axis=1)
        for _ in range(4):
            after = engine.update(batch, 1e-2).logprobs.sum(axis=1)
        assert (after[:2] > before[:2]).all()
        assert (after[2:] < before[2:]).all()

    def test_a_loss_that_is_no_number_changes_nothing_and_names_the_samples(self, case: EngineCase) -> None:
        engine = case.engine()
        before = snapshot(engine)
        batch = training_batch(engine, 7)
        advantages = batch.advantages.copy()
        advantages[5] = np.nan
        with pytest.raises(NonFinite, match=r"\b5\b") as caught:
            engine.update(replace(batch, advantages=advantages), 1e-2)
        assert caught.value.samples == (5,)
        assert np.isfinite(caught.value.arrays["computed.loss"]).all(axis=1).tolist() == [True] * 5 + [
            False,
            True,
        ]
        assert caught.value.arrays["computed.logprobs"].shape == batch.reference_logprobs.shape
        assert math.isnan(caught.value.facts["loss"])
        assert_same_bits(snapshot(engine), before)
        assert np.isfinite(engine.update(batch, 1e-2).loss)


class TestSyncReference:
    def test_the_reference_becomes_the_policy_and_stays_when_it_moves_on(self, case: EngineCase) -> None:
        engine = case.engine()
        batch = training_batch(engine, 4, seed=1)
        engine.sync_reference()
        assert_same_bits({"": engine.tensors()["ref"]}, {"": engine.tensors()["policy_model"]})
        synced = snapshot(engine)["ref"]
        engine.update(batch, 1e-2)
        assert_same_bits({"": engine.tensors()["ref"]}, {"": synced})
        outcome = engine.update(replace(batch, old_logprobs=None), 1e-2)
        moved = engine.reference_logprobs(batch.tokens)
        assert np.abs(moved - outcome.logprobs).max() > 1e-3
        engine.sync_reference()
        final = engine.update(replace(batch, old_logprobs=None), 0.0)
        np.testing.assert_allclose(engine.reference_logprobs(batch.tokens), final.logprobs, atol=2e-2)


@pytest.mark.engine
def test_a_layout_and_a_revision_are_had_without_copying_and_a_tensor_by_copying_it_alone() -> None:
    import mindspore_case

    memory = mindspore_case.CountedCopies()
    settings = replace(SETTINGS, model_config=mindspore_case.ONE_LAYER)
    engine = mindspore_case.create(settings, memory=memory)
    for role, named in engine.layout().items():
        engine.revision(role)
        assert list(engine.tensors()[role]) == list(named)
        assert memory.copied == []
        name, spec = max(named.items(), key=lambda item: item[1].nbytes)
        assert engine.tensors()[role][name].nbytes == spec.nbytes
        assert memory.copied == [spec.nbytes]
        memory.copied.clear()


@pytest.mark.engine
def test_a_checkpoint_copies_what_changed_once_while_the_engine_generates(tmp_path: Path) -> None:
    engine: Any = mindspore_copied().engine()
    memory = engine._memory
    about = About(run_id="r", incarnation=1, state={})
    saved: list[Saved] = []
    checkpoints = ShadowCheckpoints(
        CheckpointStore(tmp_path), engine, about, saved=saved.append, failed=print, warned=print
    )
    sizes = {role: [spec.nbytes for spec in named.values()] for role, named in engine.layout().items()}
    for step, roles in ((1, list(sizes)), (2, ["policy_model", "optimizer"])):
        batch = training_batch(engine, 4, seed=step)
        state = snapshot(engine)
        memory.copied.clear()
        checkpoints.begin(Position(0, step), step)
        engine.generate(*prompts(8), uniforms(8))
        checkpoints.before_update()
        engine.update(batch, 1e-2)
        assert sorted(memory.copied) == sorted(size for role in roles for size in sizes[role])
        assert checkpoints._buffers.allocated <= sum(map(sum, sizes.values())), "one save's memory, for both"
        checkpoints.boundary()
        checkpoints.close()
        storage = LocalStorage(tmp_path)
        found: dict[str, dict[str, np.ndarray]] = {}
        for role, name, array in read_tensors(storage, find(storage).manifest):
            found.setdefault(role, {})[name] = array
        assert_same_bits({role: found[role] for role in state}, state)
    assert len(saved) == 2


@pytest.mark.engine
def test_copies_and_views_of_memory_give_the_same_bits() -> None:
    viewed, copied = mindspore().engine(), mindspore_copied().engine()
    for seed in range(3):
        batch = training_batch(viewed, 7, seed=seed)
        assert_outcomes_equal(copied.update(batch, 1e-2), viewed.update(batch, 1e-2))
        if seed == 1:
            viewed.sync_reference()
            copied.sync_reference()
    assert_same_bits(snapshot(copied), snapshot(viewed))


def assert_outcomes_equal(left: Any, right: Any) -> None:
    """Bit for bit."""
    for name in ("loss", "grad_norm", "kl", "clip_fraction"):
        assert getattr(left, name) == getattr(right, name), name
    assert left.logprobs.tobytes() == right.logprobs.tobytes()
