"""A model's files that are not what they should be are named in an error, in bounded time and memory."""

import json
import os
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollforward.errors import ModelError
from rollforward.models.config import ModelConfig, parse_model_config
from rollforward.models.rope import inverse_frequencies
from rollforward.models.shapes import tensor_layout
from rollforward.models.weights import load_weights

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
HUGE = 10**400
ODD: list[Any] = [
    0,
    -1,
    True,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    HUGE,
    1e308,
    float("nan"),
    float("inf"),
    1 << 62,
]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17210284\n"


def tried(config: dict[str, Any]) -> None:
    """Whatever a configuration says is either refused or can be computed with."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            parsed = ModelConfig.parse(config)
        except ModelError as error:
            refusal = error
        else:
            assert np.isfinite(inverse_frequencies(parsed.rope, parsed.head_dim)).all()
            tensor_layout(parsed)
            return
    assert refusal.hint
    assert len(str(refusal)) < 1000


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "key",
    [
        *GOOD,
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "layer_types",
        "hidden_act",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "tie_word_embeddings",
        "attention_bias",
        "quantization_config",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    ],
)
def test_any_value_of_a_key_is_refused_or_used(key: str, value: Any) -> None:
    for scaling in (None, LLAMA3, YARN):
        tried({**GOOD, "rope_parameters": scaling, key: value})
        tried({**GOOD, "use_sliding_window": True, "rope_scaling": scaling, key: value})


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_any_value_of_a_rotary_scaling_is_refused_or_used(scaling: dict[str, Any], value: Any) -> None:
    for key in (
        *scaling,
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ):
        tried({**GOOD, "rope_parameters": {**scaling, "mscale": 1.0, "mscale_all_dim": 1.0, key: value}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embed"),
        (
            {"rope_parameters": YARN, "original_max_position_embeddings": 0},
            "original_max_position_embeddings is 0",
        ),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"rms_norm_eps": HUGE}, "rms_norm_eps is 1000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is Infinity"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor"),
    ],
)
def test_a_value_that_no_model_has_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ModelConfig.parse({**GOOD, **change})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nests too deep"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (LFS, "pointer of Git LFS"),
    ],
)
def test_a_config_that_is_something_else_is_named(content: bytes, said: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)config.json.*{said}"):
        parse_model_config(content, Path("config.json"))


def refused(folder: Path, match: str) -> None:
    begun = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=match):
            load_weights(folder, ModelConfig.parse(GOOD), {})
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 60


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_in_place_of_weights_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    refused(tmp_path, "pointer of Git LFS")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "x.safetensors"])
def test_weights_that_are_not_a_file_are_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    if name == "x.safetensors":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    refused(tmp_path, name)


HEADERS = {
    "99 MB of blanks": b"{" + b" " * 99_000_000 + b"}",
    "8 MB of empty lists": b'{"a":[' + b"[]," * 2_700_000 + b"[]]}",
    "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}',
    "a shape of huge numbers": json.dumps(
        {"a": {"dtype": "F32", "shape": [10**4000] * 500, "data_offsets": [0, 4]}}
    ).encode(),
    "many dimensions": json.dumps({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}).encode(),
    "huge offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[' + b"9" * 4000 + b",0]}}",
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_without_measure_is_refused_in_bounded_memory(tmp_path: Path, damage: str) -> None:
    header = HEADERS[damage]
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refused(tmp_path, "not a safetensors file")
