"""Adapters beside a base: PEFT's function, trained alone, on a reference that is the base itself."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mindspore_case
import numpy as np
import pytest
import safetensors.numpy
from engine_case import (
    SETTINGS,
    TOKENS,
    assert_same_bits,
    initial_tensors,
    prompts,
    restore,
    rows_of,
    snapshot,
    token_batch,
    training_batch,
    uniforms,
)
from golden_models import FOLDER as MODELS
from golden_models import Logits, golden_model
from mindspore import Tensor

from rollforward.engines.mindspore.adapters import adapted
from rollforward.engines.mindspore.compiling import Graphs
from rollforward.engines.mindspore.engine import MindSporeEngine
from rollforward.engines.mindspore.generation import Generator
from rollforward.engines.mindspore.model import Decoder, ModelConfig
from rollforward.engines.mindspore.package import MindSpore
from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess
from rollforward.grpo.randomness import adapter_values
from rollforward.grpo.types import LoraSettings, SamplingSettings
from rollforward.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODULES,
    AdapterConfig,
    adapter_names,
    merged,
)
from rollforward.models.weights import load_weights

ADAPTERS = Path(__file__).parents[2] / "golden" / "adapters"
LORA = LoraSettings(rank=2, alpha=3.0, target_modules=MODULES)
SCALE = np.float64(LORA.scale)
Arrays = Mapping[str, np.ndarray]


def of_peft(family: str) -> tuple[LoraSettings, dict[str, np.ndarray]]:
    """The settings and the tensors in a folder that PEFT wrote."""
    said = AdapterConfig.parse((ADAPTERS / family / ADAPTER_CONFIG).read_bytes())
    modules = tuple(name for name in MODULES if name in said.modules)
    tensors = safetensors.numpy.load_file(ADAPTERS / family / ADAPTER_WEIGHTS)
    return LoraSettings(rank=said.rank, alpha=said.alpha, target_modules=modules), tensors


@cache
def golden_policy(family: str) -> Decoder:
    """A golden model with PEFT's adapter, on a base of its own."""
    golden_model(family)  # graph mode, on the CPU
    config = ModelConfig.parse(json.loads((MODELS / family / "config.json").read_text()))
    base = Decoder(config)
    views = {name: parameter.asnumpy() for name, parameter in base.named_parameters().items()}
    load_weights(MODELS / family, config, views)
    lora, tensors = of_peft(family)
    policy = adapted(base, lora)
    assert policy.named_parameters().keys() == tensors.keys()
    for name, parameter in policy.named_parameters().items():
        parameter.asnumpy()[...] = tensors[name]
    return policy


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_agree_with_peft(family: str) -> None:
    golden = golden_model(family)
    with np.load(ADAPTERS / family / "expected.npz") as expected:
        logits = expected["logits"]
    mask = golden.mask
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) * mask
    given = (golden.prompts, positions, mask.astype(np.int32) - 1, mask.astype(np.int32) - 1)
    found = Logits(golden_policy(family))(*(Tensor(each.astype(np.int32)) for each in given)).asnumpy()
    np.testing.assert_allclose(found[mask], logits[mask], atol=1e-4, rtol=0)
    assert abs(found[mask] - golden.logits[mask]).max() > 0.1, "the adapter does something"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_continuation_is_that_of_peft(family: str) -> None:
    golden = golden_model(family)
    with np.load(ADAPTERS / family / "expected.npz") as expected:
        greedy = expected["greedy"]
    sampling = SamplingSettings(max_tokens=greedy.shape[1], temperature=0.0)
    settings = golden.settings(rows=len(greedy), sampling=sampling)
    generator = Generator(golden_policy(family), settings, Graphs(settings, OneProcess()))
    unused = np.zeros(greedy.shape, np.float32)
    found = generator.generate(golden.prompts, golden.mask, unused)
    np.testing.assert_array_equal(found.completion_ids, greedy)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merged_weight_is_that_of_peft(family: str) -> None:
    lora, tensors = of_peft(family)
    weight = "model.layers.1.self_attn.v_proj.weight"
    config = ModelConfig.parse(json.loads((MODELS / family / "config.json").read_text()))
    base = {name: np.zeros(p.shape, np.float32) for name, p in Decoder(config).named_parameters().items()}
    load_weights(MODELS / family, config, base)
    first, second = adapter_names(weight)
    with np.load(ADAPTERS / family / "expected.npz") as expected:
        np.testing.assert_allclose(
            merged(base[weight], tensors[first], tensors[second], lora.scale), expected["merged"], atol=1e-6
        )


def put_base(engine: MindSporeEngine, weights: Arrays) -> None:
    for name, array in weights.items():
        engine._memory.write(engine._base[name], array)


def base_of(engine: MindSporeEngine) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy().copy() for name, parameter in engine._base.items()}


@cache
def whole() -> MindSporeEngine:
    """An engine that trains all weights."""
    return mindspore_case.create(replace(SETTINGS, model_config=mindspore_case.MODEL))


def weights() -> dict[str, np.ndarray]:
    """Of the base in these tests."""
    return initial_tensors(whole())["policy_model"]


def make(**changes: Any) -> MindSporeEngine:
    settings = replace(SETTINGS, model_config=mindspore_case.MODEL, lora=LORA)
    return mindspore_case.create(replace(settings, **changes))


_made: dict[str, MindSporeEngine] = {}


def engine(kind: str = "one", *, second: float = 0.0, **changes: Any) -> MindSporeEngine:
    """An engine of adapters, in its initial state; B is normal with the deviation `second`."""
    if kind not in _made:
        _made[kind] = make(**changes)
    found = _made[kind]
    put_base(found, weights())
    restore(found, adapters(found, second))
    return found


def adapters(engine: MindSporeEngine, second: float) -> dict[str, dict[str, Any]]:
    source = np.random.default_rng(3)
    policy = {
        name: adapter_values(7, name, spec.shape)
        if "lora_A" in name
        else source.normal(0, second, spec.shape).astype(np.float32)
        for name, spec in engine.layout()["policy_model"].items()
    }
    optimizer = {n: np.zeros(s.shape, s.dtype) for n, s in engine.layout()["optimizer"].items()}
    return {"policy_model": policy, "optimizer": optimizer}


def test_layout_is_known_before_there_is_an_engine() -> None:
    found = engine().layout()
    assert MindSpore().tensor_layout(mindspore_case.MODEL, LORA) == found
    assert found["ref"] == {}
    assert len(found["policy_model"]) == 2 * len(MODULES) * mindspore_case.MODEL["num_hidden_layers"]


def test_the_policy_starts_as_the_base_and_the_reference_is_the_base() -> None:
    one, tokens = engine(), token_batch(6)
    reference = one.reference_logprobs(tokens)
    restore(whole(), {"ref": weights()})
    assert reference.tobytes() == whole().reference_logprobs(tokens).tobytes()
    assert one.update(training_batch(one, 6), 0.0).logprobs.any()
    batch = training_batch(one, 6)
    np.testing.assert_array_equal(one.update(batch, 1e-2).logprobs, batch.reference_logprobs)
    assert one.reference_logprobs(tokens).tobytes() == reference.tobytes(), "whatever the policy learns"


def test_only_adapters_learn() -> None:
    one = engine(second=0.2)
    before = snapshot(one)["policy_model"]
    one.update(training_batch(one, 6), 1e-2)
    after = snapshot(one)["policy_model"]
    assert all(before[name].tobytes() != after[name].tobytes() for name in before)
    assert_same_bits({"base": base_of(one)}, {"base": weights()})


def test_gradients_are_those_of_the_weights_behind_the_adapters() -> None:
    """With W' = W + s B A: dA = s B^T dW', dB = s dW' A^T; dW' is that of an engine of whole weights."""
    one = engine(second=0.2)
    given = adapters(one, 0.2)["policy_model"]
    full = dict(weights())
    for weight in full:
        first, second = adapter_names(weight)
        if first in given:
            full[weight] = merged(full[weight], given[first], given[second], LORA.scale)
    restore(whole(), {**initial_tensors(whole()), "policy_model": full, "ref": weights()})
    batch = training_batch(one, 4, seed=1)
    outcome, expected = one.update(batch, 0.0), whole().update(batch, 0.0)
    np.testing.assert_allclose(outcome.loss, expected.loss, rtol=1e-4)
    np.testing.assert_allclose(outcome.logprobs, expected.logprobs, atol=1e-4)

    def gradient(of: MindSporeEngine, name: str) -> np.ndarray:
        return of.tensors()["optimizer"][f"adam_m.{name}"].astype(np.float64)

    for weight in full:
        first, second = adapter_names(weight)
        if first in given:
            behind = gradient(whole(), weight)
            np.testing.assert_allclose(
                gradient(one, first), SCALE * given[second].T @ behind, atol=2e-5, rtol=1e-3
            )
            np.testing.assert_allclose(
                gradient(one, second), SCALE * behind @ given[first].T, atol=2e-5, rtol=1e-3
            )


def test_what_is_put_in_place_continues_with_the_same_bits() -> None:
    one = engine(second=0.1)
    batch = training_batch(one, 6)
    one.update(batch, 1e-2)
    reached = snapshot(one)
    expected, final = one.update(batch, 1e-2), snapshot(one)
    drawn = one.generate(*prompts(6), uniforms(6))
    # An engine of its own, and one that recomputes, which changes no bit.
    other = engine("recomputing", recompute=True)
    restore(other, reached)
    found = other.update(batch, 1e-2)
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert_same_bits(snapshot(other), final)
    again = other.generate(*prompts(6), uniforms(6))
    assert again.completion_ids.tobytes() == drawn.completion_ids.tobytes()


def test_chunks_add_up_to_the_same_bits_whatever_else_is_in_the_batch() -> None:
    """The log-probabilities of a sample do not depend on the samples beside it."""
    one = engine(second=0.3)
    batch = training_batch(one, 8, seed=2)
    all_of_them = one.update(batch, 0.0).logprobs
    restore(one, adapters(one, 0.3))
    for rows in (slice(0, 4), slice(4, 8)):
        part = rows_of(batch, rows)
        part = replace(part, token_weights=part.token_weights / part.token_weights.sum())
        np.testing.assert_allclose(one.update(part, 0.0).logprobs, all_of_them[rows], atol=1e-5)


def test_completions_are_drawn_from_the_policy_and_not_from_the_base() -> None:
    adapted_ones = engine(second=1.0).generate(*prompts(6), uniforms(6))
    assert adapted_ones.completion_ids.shape == (6, TOKENS)
    plain = engine().generate(*prompts(6), uniforms(6))
    assert adapted_ones.completion_ids.tobytes() != plain.completion_ids.tobytes()
    restore(whole(), {"policy_model": weights()})
    assert (
        plain.completion_ids.tobytes() == whole().generate(*prompts(6), uniforms(6)).completion_ids.tobytes()
    )


def test_the_base_is_read_either_way() -> None:
    folder = MODELS / "qwen2"
    config = json.loads((folder / "config.json").read_text())
    settings = replace(SETTINGS, model_config=config, lora=LORA, base_folder=str(folder))
    viewed, copied = mindspore_case.create(settings), mindspore_case.create_copied(settings)
    assert_same_bits({"base": base_of(copied)}, {"base": base_of(viewed)})
    assert any(array.any() for array in base_of(viewed).values())


def test_a_reference_that_is_the_base_does_not_follow_the_policy() -> None:
    with pytest.raises(EngineError, match="its base, which never changes"):
        engine().sync_reference()


def test_recomputing_changes_no_bit() -> None:
    one, again = engine(second=0.2), engine("recomputing", second=0.2, recompute=True)
    batch = training_batch(one, 6)
    assert one.update(batch, 1e-2).grad_norm == again.update(batch, 1e-2).grad_norm
    assert_same_bits(snapshot(again), snapshot(one))


def test_recomputing_changes_no_bit_where_all_weights_are_trained() -> None:
    settings = replace(SETTINGS, model_config=mindspore_case.MODEL, recompute=True)
    again = mindspore_case.create(settings)
    for each in (whole(), again):
        restore(each, initial_tensors(each))
    batch = training_batch(whole(), 6)
    assert whole().update(batch, 1e-2).grad_norm == again.update(batch, 1e-2).grad_norm
    assert_same_bits(snapshot(again), snapshot(whole()))
