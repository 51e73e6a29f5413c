"""What MindFormers calls a model's tensors, and what is in its files besides, held against our names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_model import QWEN2

from rollforward.interop.mapping import fit
from rollforward.interop.names import Heads, concatenated, to_theirs
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import tensor_layout

CONFIG = QWEN2 | {"tie_word_embeddings": True}
LAYOUT = tensor_layout(ModelConfig.parse(CONFIG))
GROUPS = 2
HEADS = Heads(query_rows=16, key_rows=8, groups=GROUPS)
PREFIX = "grpo_model_train.policy_model."
Arrays = dict[str, NDArray[Any]]


def random(role: str) -> Arrays:
    source = np.random.default_rng(len(role))
    found = {name: source.normal(0, 1, like.shape).astype(like.dtype) for name, like in LAYOUT[role].items()}
    # A second moment is a mean of squares.
    return {name: abs(array) if name.startswith("adam_v.") else array for name, array in found.items()}


def in_their_words(ours: Mapping[str, NDArray[Any]]) -> Arrays:
    mapped = to_theirs(ours, prefix=PREFIX)
    assert mapped.unmapped == ()
    return dict(mapped.tensors)


def problems_of(role: str, theirs: Arrays) -> tuple[str, ...]:
    found = fit(role, theirs, LAYOUT, GROUPS)
    assert found.tensors == {}
    return found.problems


def assert_fits(role: str, theirs: Arrays, ours: Arrays, left_out: tuple[str, ...] = ()) -> None:
    found = fit(role, theirs, LAYOUT, GROUPS)
    assert found.problems == ()
    assert found.left_out == left_out
    assert found.tensors.keys() == ours.keys()
    for name, array in found.tensors.items():
        assert array.dtype == ours[name].dtype
        np.testing.assert_array_equal(array, ours[name], err_msg=name)


@pytest.mark.parametrize("role", ["policy_model", "optimizer", "ref"])
def test_every_tensor_of_a_role_finds_its_name(role: str) -> None:
    ours = random(role)
    theirs = in_their_words(ours)
    assert not theirs.keys() & ours.keys() - {"global_step"}
    assert_fits(role, theirs, ours)


def test_hugging_face_names_behind_a_prefix_are_found() -> None:
    for role in LAYOUT:
        ours = random(role)
        moved = {
            f"{name[:7]}actor.{name[7:]}" if name.startswith("adam_") else f"actor.{name}": array
            for name, array in ours.items()
            if name != "global_step"
        }
        assert_fits(role, moved | {n: a for n, a in ours.items() if n == "global_step"}, ours)


def test_concatenated_projections_are_taken_apart_as_the_model_s_heads_say() -> None:
    ours = random("policy_model")
    theirs = concatenated(in_their_words(ours), HEADS)
    assert f"{PREFIX}model.layers.1.attention.w_qkv.bias" in theirs
    assert_fits("policy_model", theirs, ours)
    assert fit("policy_model", theirs, LAYOUT, GROUPS).concatenated
    assert not fit("policy_model", ours, LAYOUT, GROUPS).concatenated


def test_an_optimizer_s_file_holds_what_it_trains_and_counters_besides() -> None:
    ours = random("optimizer")
    theirs = in_their_words(ours) | in_their_words(random("policy_model"))
    theirs |= {"global_step": ours["global_step"].astype(np.int32), "learning_rate": np.ones((), np.float32)}
    assert_fits("optimizer", theirs, ours, ("learning_rate",))


def test_what_mindrlhf_s_model_monitors_is_left_out_by_name() -> None:
    ours = random("policy_model")
    monitors = ("actor_loss", "clipfrac", "kl_loss", "old_log_ratio")
    theirs = in_their_words(ours) | {PREFIX + name: np.zeros((), np.float32) for name in monitors}
    theirs |= {name: np.zeros((), np.int64) for name in ("epoch_num", "step_num")}
    assert_fits("policy_model", theirs, ours, tuple(sorted((*monitors, "epoch_num", "step_num"))))


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
    assert problems_of("policy_model", theirs) == (
        "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them",
    )


def test_what_has_no_counterpart_is_named_as_the_file_has_it() -> None:
    theirs = in_their_words(random("policy_model"))
    strange = ["policy_model.model.layers.0.attention.lora_a.weight", "p.model.layers.7.ffn_norm.weight"]
    for name in strange:
        theirs[name] = np.zeros(2, np.float32)
    expected = {f"{name} has no counterpart in the model" for name in strange}
    assert set(problems_of("policy_model", theirs)) == expected


def test_two_tensors_of_one_name_are_a_problem() -> None:
    theirs = in_their_words(random("policy_model"))
    theirs["model.norm.weight"] = np.zeros(16, np.float32)
    assert problems_of("policy_model", theirs) == ("two tensors lead to model.norm.weight",)
    theirs["other.model.norm_out.weight"] = np.zeros(16, np.float32)
    (told,) = problems_of("policy_model", theirs)
    assert "both lead to 'model.norm.weight'" in told
