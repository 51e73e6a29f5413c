"""Weights come from the files as they are, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rollforward.errors import ModelError
from rollforward.models.config import ModelConfig
from rollforward.models.weights import load_weights

FOLDER = Path(__file__).parents[2] / "golden" / "models"

Arrays = dict[str, NDArray[np.float32]]


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig.parse(json.loads((folder / "config.json").read_text()))


def empty_parameters(folder: Path) -> Arrays:
    """As a model has them: in the shapes of the files, which the golden logits prove to be right."""
    arrays = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary, and cannot be iterated)
                arrays[name] = np.full(opened.get_slice(name).get_shape(), 7.0, np.float32)
    return arrays


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "qwen3", tmp_path / "qwen3"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "llama", tmp_path / "llama"))


def rewrite(folder: Path, change: Callable[[Arrays], object]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def test_half_precision_is_widened_without_rounding(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    load_weights(qwen3, config_of(qwen3), parameters)
    stored = load_file(qwen3 / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}
    for name, array in parameters.items():
        np.testing.assert_array_equal(array, stored[name].astype(np.float32))


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    folder = FOLDER / "qwen2"
    parameters = empty_parameters(folder)
    load_weights(folder, config_of(folder), parameters)
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    name = "model.layers.1.mlp.down_proj.weight"
    entry = json.loads(raw[8 : 8 + length])[name]
    assert entry["dtype"] == "BF16"
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    found = parameters[name].reshape(-1).view(np.uint32)
    np.testing.assert_array_equal(found >> 16, np.frombuffer(raw[begin:end], "<u2"))
    np.testing.assert_array_equal(found & 0xFFFF, 0)


def test_shards_are_joined_by_their_index(llama: Path) -> None:
    parameters = empty_parameters(llama)
    load_weights(llama, config_of(llama), parameters)
    for file in sorted(llama.glob("*.safetensors")):
        for name, array in load_file(file).items():
            np.testing.assert_array_equal(parameters[name], array)


def test_a_missing_tensor_is_listed_with_the_nearest_name(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    rewrite(
        qwen3, lambda a: a.update({"layers.0.mlp.up_proj.weight": a.pop("model.layers.0.mlp.up_proj.weight")})
    )
    with pytest.raises(ModelError) as caught:
        load_weights(qwen3, config_of(qwen3), parameters)
    said = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight (nearest: layers.0.mlp.up_proj.weight)" in said
    assert "not part of the model: layers.0.mlp.up_proj.weight" in said
    assert all((array == 7.0).all() for array in parameters.values()), "something was put in place"


def test_a_tensor_of_another_shape_is_listed_with_both(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    rewrite(qwen3, lambda a: a.update({"model.norm.weight": np.zeros(5, np.float16)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \[5\] instead of \[32\]"):
        load_weights(qwen3, config_of(qwen3), parameters)


def test_a_copy_of_the_tied_head_is_accepted_and_another_one_is_not(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    rewrite(qwen3, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))
    load_weights(qwen3, config_of(qwen3), parameters)
    rewrite(qwen3, lambda a: a.update({"lm_head.weight": -a["model.embed_tokens.weight"]}))
    with pytest.raises(ModelError, match="ties them"):
        load_weights(qwen3, config_of(qwen3), parameters)


def test_a_head_that_is_missing_hints_at_tying(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    parameters["lm_head.weight"] = parameters["model.embed_tokens.weight"].copy()
    config = ModelConfig.parse(
        {**json.loads((qwen3 / "config.json").read_text()), "tie_word_embeddings": False}
    )
    with pytest.raises(ModelError) as caught:
        load_weights(qwen3, config, parameters)
    assert "tie_word_embeddings" in str(caught.value.hint)


def test_computed_buffers_of_old_files_are_passed_over(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    rewrite(qwen3, lambda a: a.update(frequencies))
    load_weights(qwen3, config_of(qwen3), parameters)


def test_a_value_that_is_not_a_number_is_found(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    rewrite(qwen3, lambda a: a["model.norm.weight"].__setitem__(3, np.nan))
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN"):
        load_weights(qwen3, config_of(qwen3), parameters)


def test_integer_weights_are_refused(qwen3: Path) -> None:
    parameters = empty_parameters(qwen3)
    rewrite(qwen3, lambda a: a.update({"model.norm.weight": np.zeros(32, np.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is I8"):
        load_weights(qwen3, config_of(qwen3), parameters)


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_a_file_cut_short_is_refused(qwen3: Path, kept: int) -> None:
    file = qwen3 / "model.safetensors"
    parameters = empty_parameters(qwen3)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_weights(qwen3, config_of(qwen3), parameters)


HEADERS = {
    "longer than the file": (1 << 62).to_bytes(8, "little"),
    "not JSON": (4).to_bytes(8, "little") + b"{{{{" + bytes(64),
    "not an object": (4).to_bytes(8, "little") + b"[1] " + bytes(64),
    "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    **{
        name: len(header).to_bytes(8, "little") + header + bytes(64)
        for name, header in {
            "offsets outside": b'{"a":{"dtype":"F32","shape":[20],"data_offsets":[0,80]}}',
            "offsets backwards": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[8,4]}}',
            "a negative size": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
            "a shape that does not fill": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
            "a shape of text": b'{"a":{"dtype":"F32","shape":"ab","data_offsets":[0,8]}}',
            "a type of list": b'{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}',
            "no offsets": b'{"a":{"dtype":"F32","shape":[2]}}',
            "an entry of null": b'{"a":null}',
        }.items()
    },
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header_is_refused(qwen3: Path, damage: str) -> None:
    parameters = empty_parameters(qwen3)
    (qwen3 / "model.safetensors").write_bytes(HEADERS[damage])
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_weights(qwen3, config_of(qwen3), parameters)


def test_a_shard_that_is_missing_is_named(llama: Path) -> None:
    parameters = empty_parameters(llama)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_weights(llama, config_of(llama), parameters)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", ""]
)
def test_an_index_cannot_lead_out_of_its_folder(llama: Path, file: str) -> None:
    parameters = empty_parameters(llama)
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not a safetensors file of the same folder"):
        load_weights(llama, config_of(llama), parameters)


def test_an_index_that_promises_more_than_its_shards_hold_is_refused(llama: Path) -> None:
    parameters = empty_parameters(llama)
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model\.extra \(not in"):
        load_weights(llama, config_of(llama), parameters)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_no_index_is_refused(llama: Path, text: str) -> None:
    parameters = empty_parameters(llama)
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="index"):
        load_weights(llama, config_of(llama), parameters)


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    config = config_of(FOLDER / "qwen3")
    with pytest.raises(ModelError) as missing:
        load_weights(tmp_path / "nowhere", config, {})
    assert "does not exist" in str(missing.value.hint)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError) as pickled:
        load_weights(tmp_path, config, {})
    assert "save_pretrained" in str(pickled.value.hint)
