import numpy as np
import pytest

from rollforward.store.mindformers_names import Heads, looks_like_mindformers, to_ours, to_theirs

HEADS = Heads(query_rows=8, key_rows=4)


def ours(layers=2):
    """Hugging Face names of a small model, each tensor with values of its own."""
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
            shapes[f"{start}self_attn.{name}.weight"] = (rows, 8)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{start}self_attn.{name}.bias"] = (8 if name == "q_proj" else 4,)
        shapes |= {f"{start}mlp.{name}.weight": (12, 8) for name in ("gate_proj", "up_proj")}
        shapes[f"{start}mlp.down_proj.weight"] = (8, 12)
        shapes |= {f"{start}{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1000 * i
        for i, (name, shape) in enumerate(shapes.items())
    }


def equal(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "policy_model.", "policy_model.model."])
def test_there_and_back_is_where_we_were(prefix):
    theirs = to_theirs(ours(), prefix=prefix)
    assert theirs.unmapped == ()
    assert f"{prefix}model.layers.1.attention.wq.bias" in theirs.tensors
    assert looks_like_mindformers(theirs.tensors)
    assert not looks_like_mindformers(ours())
    back = to_ours(theirs.tensors, HEADS)
    assert back.unmapped == ()
    assert equal(back.tensors, ours())


def test_concatenated_projections_are_split():
    theirs = dict(to_theirs(ours(1)).tensors)
    start = "model.layers.0."
    for kind in ("weight", "bias"):
        parts = [theirs.pop(f"{start}attention.{name}.{kind}") for name in ("wq", "wk", "wv")]
        theirs[f"{start}attention.w_qkv.{kind}"] = np.concatenate(parts)
    gates = [theirs.pop(f"{start}feed_forward.{name}.weight") for name in ("w1", "w3")]
    theirs[f"{start}feed_forward.w_gate_hidden.weight"] = np.concatenate(gates)
    assert equal(to_ours(theirs, HEADS).tensors, ours(1))


def test_the_optimizers_moments_go_with_their_parameters():
    theirs = {
        f"adam_{m}.policy_model.{name}": array
        for m in "mv"
        for name, array in to_theirs(ours(1)).tensors.items()
    }
    found = to_ours(theirs, HEADS).tensors
    assert equal(found, {f"adam_{m}.{name}": array for m in "mv" for name, array in ours(1).items()})
    assert "adam_m.p.model.norm_out.weight" in to_theirs(found, prefix="p.").tensors


def test_what_has_no_counterpart_is_listed():
    found = to_ours({"model.freqs_mgr.freqs_cis": np.ones(1), "global_step": np.ones(1)}, HEADS)
    assert found.unmapped == ("global_step", "model.freqs_mgr.freqs_cis")
    assert found.tensors == {}
    assert to_theirs({"value_head.weight": np.ones(1)}).unmapped == ("value_head.weight",)


def test_a_concatenation_of_another_size_is_refused():
    with pytest.raises(ValueError, match="16 rows are needed"):
        to_ours({"model.layers.0.attention.w_qkv.weight": np.ones((12, 8))}, HEADS)


def test_two_parameters_that_lead_to_one_are_refused():
    twice = {"a.model.norm_out.weight": np.ones(1), "b.model.norm_out.weight": np.ones(1)}
    with pytest.raises(ValueError, match="both lead to"):
        to_ours(twice, HEADS)
