"""A `config.json` becomes a model's shape, or an error that names what stands in the way."""

from typing import Any

import pytest

from rollforward.errors import ModelError
from rollforward.models.config import ModelConfig

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def test_keys_that_are_absent_take_the_defaults_of_transformers() -> None:
    config = ModelConfig.parse(GOOD)
    assert (config.kv_heads, config.head_dim, config.tied) == (4, 16, False)
    assert config.rms_norm_eps == 1e-6
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)


def test_families_differ_in_biases_and_norms() -> None:
    llama = ModelConfig.parse({**GOOD, "attention_bias": True, "mlp_bias": True})
    qwen2 = ModelConfig.parse({**GOOD, "model_type": "qwen2"})
    qwen3 = ModelConfig.parse({**GOOD, "model_type": "qwen3"})
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.qk_norm) == (True, True, True, False)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.mlp_bias, qwen3.qk_norm) == (False, False, False, True)
    assert qwen3.head_dim == 128


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_missing_size_is_named(key: str) -> None:
    config = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ModelError, match=key):
        ModelConfig.parse(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        ({"model_type": "qwen3_moe"}, "nearest is qwen3"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": "100"}, "vocab_size is '100'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        ModelConfig.parse({**GOOD, **change})
    assert caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 32},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_a_sliding_window_that_no_layer_uses_is_no_obstacle(change: dict[str, Any]) -> None:
    plain = {**GOOD, "model_type": "qwen2"}
    assert ModelConfig.parse({**plain, **change}) == ModelConfig.parse(plain)
