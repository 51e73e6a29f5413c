"""What MindFormers calls a model's tensors, and what is in its files besides, held against our names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rollforward.engines.mindspore.config import ModelConfig
from rollforward.engines.mindspore.shapes import tensor_layout
from rollforward.run.foreign import fit
from rollforward.store.mindformers_names import to_theirs

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LAYOUT = tensor_layout(ModelConfig.parse(CONFIG))
PREFIX = "grpo_model_train.policy_model."
Arrays = dict[str, NDArray[Any]]


def random(role: str) -> Arrays:
    source = np.random.default_rng(len(role))
    return {name: source.normal(0, 1, like.shape).astype(like.dtype) for name, like in LAYOUT[role].items()}


def in_their_words(ours: Mapping[str, NDArray[Any]]) -> Arrays:
    mapped = to_theirs(ours, prefix=PREFIX)
    return {**mapped.tensors, **{name: ours[name] for name in mapped.unmapped}}


def assert_fits(role: str, theirs: Arrays, ours: Arrays) -> None:
    found, problems = fit(role, theirs, LAYOUT)
    assert problems == []
    assert found.keys() == ours.keys()
    for name, array in found.items():
        assert array.dtype == ours[name].dtype
        np.testing.assert_array_equal(array, ours[name], err_msg=name)


@pytest.mark.parametrize("role", ["policy_model", "optimizer", "ref"])
def test_every_tensor_of_a_role_finds_its_name(role: str) -> None:
    ours = random(role)
    theirs = in_their_words(ours)
    assert not theirs.keys() & ours.keys() - {"global_step"}
    assert_fits(role, theirs, ours)


def test_concatenated_projections_are_split_as_the_model_s_heads_say() -> None:
    ours = random("policy_model")
    theirs = in_their_words(ours)
    for layer in range(2):
        at = f"{PREFIX}model.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [theirs.pop(f"{at}.attention.{part}.{kind}") for part in ("wq", "wk", "wv")]
            theirs[f"{at}.attention.w_qkv.{kind}"] = np.concatenate(parts)
        parts = [theirs.pop(f"{at}.feed_forward.{part}.weight") for part in ("w1", "w3")]
        theirs[f"{at}.feed_forward.w_gate_hidden.weight"] = np.concatenate(parts)
    assert_fits("policy_model", theirs, ours)


def test_an_optimizer_s_file_holds_what_it_trains_and_counters_besides() -> None:
    ours = random("optimizer")
    theirs = in_their_words(ours) | in_their_words(random("policy_model"))
    theirs |= {"global_step": ours["global_step"].astype(np.int32), "learning_rate": np.ones((), np.float32)}
    assert_fits("optimizer", theirs, ours)


def test_half_precision_is_widened() -> None:
    ours = {name: array.astype(np.float16).astype(np.float32) for name, array in random("ref").items()}
    theirs = {name: array.astype(np.float16) for name, array in in_their_words(ours).items()}
    assert_fits("ref", theirs, ours)


def test_a_tied_head_may_be_there_when_it_is_the_embedding() -> None:
    ours = random("policy_model")
    theirs = in_their_words(ours)
    theirs[f"{PREFIX}lm_head.weight"] = ours["model.embed_tokens.weight"].copy()
    assert_fits("policy_model", theirs, ours)
    theirs[f"{PREFIX}lm_head.weight"][0, 0] += 1
    _, problems = fit("policy_model", theirs, LAYOUT)
    assert problems == ["lm_head.weight differs from model.embed_tokens.weight, but config.json ties them"]


def test_what_has_no_counterpart_is_named_as_the_file_has_it() -> None:
    theirs = in_their_words(random("policy_model"))
    theirs["policy_model.model.layers.0.attention.lora_a.weight"] = np.zeros(2, np.float32)
    _, problems = fit("policy_model", theirs, LAYOUT)
    assert problems == ["policy_model.model.layers.0.attention.lora_a.weight has no counterpart in the model"]


def test_two_tensors_of_one_name_are_a_problem() -> None:
    theirs = in_their_words(random("policy_model"))
    theirs["model.norm.weight"] = np.zeros(16, np.float32)
    _, problems = fit("policy_model", theirs, LAYOUT)
    assert problems == ["two tensors lead to model.norm.weight"]
    theirs["other.model.norm_out.weight"] = np.zeros(16, np.float32)
    _, problems = fit("policy_model", theirs, LAYOUT)
    assert len(problems) == 1
    assert "both lead to 'model.norm.weight'" in problems[0]
