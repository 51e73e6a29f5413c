import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.interop.names import (
    Heads,
    concatenated,
    is_bookkeeping,
    plain_name,
    to_ours,
    to_theirs,
)

HEADS = Heads(query_rows=8, key_rows=4, groups=2)


def ours(layers=2, heads=HEADS, inner=12, hidden=8):
    """Hugging Face names of a small model, each tensor with values of its own."""
    query, key = heads.query_rows, heads.key_rows
    shapes = {"model.embed_tokens.weight": (16, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (16, hidden)
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key), ("o_proj", hidden)):
            shapes[f"{start}self_attn.{name}.weight"] = (rows, hidden)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{start}self_attn.{name}.bias"] = (query if name == "q_proj" else key,)
        shapes |= {f"{start}mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}{name}.weight"] = (hidden,)
    return {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1000 * i
        for i, (name, shape) in enumerate(shapes.items())
    }


def equal(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "policy_model.", "grpo_model_train.policy_model.model."])
def test_there_and_back_is_where_we_were(prefix):
    theirs = to_theirs(ours(), prefix=prefix)
    assert theirs.unmapped == ()
    assert f"{prefix}model.layers.1.attention.wq.bias" in theirs.tensors
    back = to_ours(theirs.tensors, HEADS)
    assert back.unmapped == ()
    assert equal(back.tensors, ours())
    assert back.origins["model.norm.weight"] == f"{prefix}model.norm_out.weight"


@given(
    groups=st.integers(1, 4),
    queries=st.integers(1, 3),
    width=st.integers(1, 4),
    inner=st.integers(1, 6),
    moment=st.sampled_from(["", "adam_m.", "adam_v."]),
    prefix=st.sampled_from(["", "policy_model.model."]),
)
@settings(max_examples=60, deadline=None)
def test_there_and_back_with_projections_together(groups, queries, width, inner, moment, prefix):
    heads = Heads(query_rows=groups * queries * width, key_rows=groups * width, groups=groups)
    mine = {moment + name: array for name, array in ours(2, heads, inner).items()}
    theirs = concatenated(to_theirs(mine, prefix=prefix).tensors, heads)
    assert not any(".wq." in name or ".w3." in name for name in theirs)
    assert f"{moment}{prefix}model.layers.1.attention.w_qkv.bias" in theirs
    assert equal(to_ours(theirs, heads).tensors, mine)


def test_the_model_that_computes_with_concatenated_projections_finds_the_same_numbers():
    """Split and reshaped as the forward pass of MindFormers 1.5 does it, with biases."""
    mine = ours(1)
    theirs = concatenated(to_theirs(mine).tensors, HEADS)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)

    def ours_of(name):
        found = x @ mine[f"model.layers.0.{name}.weight"].T
        return found + mine.get(f"model.layers.0.{name}.bias", 0)

    whole = x @ theirs["model.layers.0.attention.w_qkv.weight"].T
    whole = whole + theirs["model.layers.0.attention.w_qkv.bias"]
    # Two groups of two query heads, a key and a value, each two wide.
    query, key, value = np.split(whole.reshape(3, 2, 8), [4, 6], axis=2)
    for name, part in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
        np.testing.assert_allclose(part.reshape(3, -1), ours_of(f"self_attn.{name}"), rtol=1e-6)
    both = (x @ theirs["model.layers.0.feed_forward.w_gate_hidden.weight"].T).reshape(3, 12, 2)
    for index, name in enumerate(("gate_proj", "up_proj")):
        np.testing.assert_allclose(both[:, :, index], ours_of(f"mlp.{name}"), rtol=1e-6)


@pytest.mark.parametrize(("first", "second"), [("adam_m", "adam_v"), ("moment1", "moment2")])
def test_the_optimizers_moments_go_with_their_parameters(first, second):
    theirs = {
        f"{m}.policy_model.{name}": array
        for m in (first, second)
        for name, array in to_theirs(ours(1)).tensors.items()
    }
    found = to_ours({**theirs, "global_step": np.array([7])}, HEADS).tensors
    expected = {f"adam_{m}.{name}": array for m in "mv" for name, array in ours(1).items()}
    assert equal(found, {**expected, "global_step": np.array([7])})
    back = to_theirs(found, prefix="p.").tensors
    assert "adam_m.p.model.norm_out.weight" in back
    assert back["global_step"] == [7]


def test_a_step_count_that_begins_at_minus_one_is_brought_to_ours():
    theirs = {"exp_avg.model.norm_out.weight": np.ones(2), "exp_avg_sq.model.norm_out.weight": np.ones(2)}
    found = to_ours({**theirs, "global_step": np.array([6])}, HEADS).tensors
    assert found.keys() == {"adam_m.model.norm.weight", "adam_v.model.norm.weight", "global_step"}
    assert found["global_step"] == [7]


@pytest.mark.parametrize("prefix", ["", "policy_model.", "actor.network.", "model."])
def test_hugging_face_names_are_found_behind_prefixes(prefix):
    theirs = {f"{prefix}{name}": array for name, array in ours(1).items()}
    theirs |= {f"adam_m.{prefix}{name}": array for name, array in ours(1).items()}
    found = to_ours(theirs, HEADS)
    assert found.unmapped == ()
    assert equal(found.tensors, {**ours(1), **{f"adam_m.{name}": array for name, array in ours(1).items()}})


def test_what_has_no_counterpart_is_listed():
    strange = ("lamb_m.model.lm_head.weight", "max_exp_avg_sq.model.norm_out.weight")
    strange += ("model.freqs_mgr.freqs_cis", "model.layers.0.attention.wq.lora_a", "other_model.norm.weight")
    found = to_ours({name: np.ones(1) for name in strange}, HEADS)
    assert found.unmapped == strange
    assert found.tensors == {}
    assert to_theirs({"value_head.weight": np.ones(1)}).unmapped == ("value_head.weight",)
    assert to_theirs({"p.lm_head.weight": np.ones(1)}).unmapped == ("p.lm_head.weight",)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention.w_qkv.weight", (12, 8)),
        ("attention.w_qkv.weight", ()),
        ("feed_forward.w_gate_hidden.weight", (3, 8)),
        ("feed_forward.w_gate_hidden.weight", (0, 8)),
    ],
)
def test_a_concatenation_of_another_size_is_refused(name, shape):
    with pytest.raises(ValueError, match="are needed to take it apart"):
        to_ours({f"model.layers.0.{name}": np.ones(shape)}, HEADS)


def test_two_parameters_that_lead_to_one_are_refused():
    twice = {"a.model.norm_out.weight": np.ones(1), "b.model.norm_out.weight": np.ones(1)}
    with pytest.raises(ValueError, match=r"'b\..*' and 'a\.model\..*' both lead to 'model\."):
        to_ours(twice, HEADS)


def test_names_for_lists():
    assert plain_name("adam_m.policy_model.model.model.norm_out.weight") == "adam_m.model.norm_out.weight"
    assert plain_name("policy_model.value_head.weight") == "policy_model.value_head.weight"
    assert is_bookkeeping("grpo_model_train.policy_model.kl_loss")
    assert not is_bookkeeping("model.norm.weight")
