"""Names and shapes of all tensors of an engine, from its configuration alone: no framework, no memory.

So a checkpoint can be compared with a model before anything slow is loaded. A test keeps this equal
to what the decoder and the learner actually have.
"""

import numpy as np

from rollforward.models.config import ModelConfig
from rollforward.tensors import Layout, TensorSpec

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Hugging Face name -> shape of every parameter; a tied head is not listed."""
    hidden = config.hidden_size
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.layers):
        for name, shape in _layer(config).items():
            shapes[f"model.layers.{index}.{name}"] = shape
    return shapes


def tensor_layout(config: ModelConfig) -> Layout:
    """What `Engine.layout()` will be."""
    layout = layout_of_trained(parameter_shapes(config))
    return {**layout, "ref": layout["policy_model"]}


def layout_of_trained(shapes: Shapes) -> Layout:
    """The policy's tensors that are trained, and their moments; there is no reference."""
    named = {name: TensorSpec.whole(np.float32, shape) for name, shape in shapes.items()}
    optimizer = {f"{moment}.{name}": spec for moment in ("adam_m", "adam_v") for name, spec in named.items()}
    optimizer["global_step"] = TensorSpec.whole(np.int64, (1,))
    return {"policy_model": named, "optimizer": optimizer, "ref": {}}


def _layer(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, outputs in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
        shapes[f"self_attn.{name}.weight"] = (outputs, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{name}.bias"] = (outputs,)
    shapes["self_attn.o_proj.weight"] = (hidden, width)
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    for name, outputs, inputs in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        shapes[f"mlp.{name}.weight"] = (outputs, inputs)
        if config.mlp_bias:
            shapes[f"mlp.{name}.bias"] = (outputs,)
    return shapes
