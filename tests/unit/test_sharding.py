"""A model that is cut over workers: every element is in one part, and each part is a decoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small_model import QWEN2

from rollforward.boxes import cover_fault, whole, within
from rollforward.errors import ModelError
from rollforward.models.config import ModelConfig
from rollforward.models.lora import MODULES, adapted_weights, adapter_names, adapter_shapes
from rollforward.models.shapes import parameter_shapes
from rollforward.models.sharding import Shard, check, counts, learns_in_parts, part_of
from rollforward.models.weights import load_weights
from rollforward.store import layouts
from rollforward.store.covering import PRIME
from rollforward.store.parts import pieces_written
from rollforward.tensors import TensorSpec

FOLDER = Path(__file__).parents[1] / "golden" / "models"
CONFIGS = {
    family: ModelConfig.parse(json.loads((FOLDER / family / "config.json").read_text()))
    for family in ("llama", "qwen2", "qwen3")
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_parts_cover_every_parameter_once_or_are_all_of_it(family: str) -> None:
    config = CONFIGS[family]
    for name, shape in parameter_shapes(config).items():
        boxes = [Shard(index, 2).box(name, shape) for index in range(2)]
        if boxes[0] != whole(shape):
            assert cover_fault(whole(shape), boxes) is None, name
        else:
            assert boxes == [whole(shape)] * 2, name
            assert "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")), name


@pytest.mark.parametrize("family", CONFIGS)
def test_a_part_is_a_decoder_with_the_shapes_of_its_boxes(family: str) -> None:
    config = CONFIGS[family]
    part = parameter_shapes(part_of(config, 2))
    shard = Shard(1, 2)
    for name, shape in parameter_shapes(config).items():
        assert part[name] == shard.box(name, shape).shape, name
        assert shard.whole_shape(f"adam_m.{name}", part[name]) == shape, name


@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_is_cut_like_the_matrix_that_it_stands_beside(family: str) -> None:
    config = CONFIGS[family]
    for weight, shape in adapted_weights(config, MODULES).items():
        first, second = adapter_names(weight)
        whole_ones, parts = (adapter_shapes(each, 3, MODULES) for each in (config, part_of(config, 2)))
        for index in range(2):
            shard = Shard(index, 2)
            box, a, b = (
                shard.box(name, size)
                for name, size in ((weight, shape), (first, whole_ones[first]), (second, whole_ones[second]))
            )
            assert (a.shape, b.shape) == (parts[first], parts[second])
            assert (b.offset[0], a.offset[1]) == box.offset, "B A of the parts is the part of B A"
            assert (b.shape[0], a.shape[1]) == box.shape
            assert shard.whole_shape(f"adam_v.{first}", a.shape) == whole_ones[first]
            assert shard.whole_shape(f"adam_v.{second}", b.shape) == whole_ones[second]
        assert [learns_in_parts(first), learns_in_parts(second)] == [
            a.shape == whole_ones[first],
            b.shape == whole_ones[second],
        ]


def test_norms_of_heads_learn_in_parts_and_other_norms_do_not() -> None:
    in_parts = {
        name.split(".", 3)[-1] for name in parameter_shapes(CONFIGS["qwen3"]) if learns_in_parts(name)
    }
    assert in_parts == {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


def test_the_numbers_that_work_divide_heads_and_mlp_and_vocabulary() -> None:
    assert counts(CONFIGS["llama"]) == [1, 2]
    smollm2 = replace(CONFIGS["llama"], heads=9, kv_heads=3, intermediate=1536, vocab_size=49152)
    assert counts(smollm2) == [1, 3]


def test_fewer_key_value_heads_than_workers_are_refused_with_the_numbers_that_work() -> None:
    with pytest.raises(ModelError, match=r"4 does not divide num_key_value_heads \(2\)") as caught:
        check(CONFIGS["qwen2"], 4)
    assert "can be 1, 2 for this model" in caught.value.hint


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_what_replicas_hold_alike_is_written_by_one_of_them(replicas: int) -> None:
    config = CONFIGS["qwen3"]
    shapes = parameter_shapes(config)
    written: dict[str, int] = {}
    sizes: list[int] = []
    total = 0
    for replica in range(replicas):
        for index in range(2):
            named = {
                name: TensorSpec.piece(
                    name, "float32", shape, Shard(index, 2).box(name, shape), (replica, replicas)
                )
                for name, shape in shapes.items()
                if Shard(index, 2).box(name, shape) != whole(shape)
            }
            mine = pieces_written(named)
            sizes.append(sum(named[name].nbytes for name in mine))
            for name in mine:
                written[name] = written.get(name, 0) + 1
            total += layouts.cover({"policy_model": named})
    assert set(written.values()) == {2}, "each of the two parts once"
    assert total % PRIME == 0
    assert max(sizes) <= min(sizes) + 2 * 4 * 24 * 32, sizes


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_worker_reads_its_part_of_a_folder_and_of_what_is_cut_by_rows_no_other_rows(
    tmp_path: Path, dtype: type[np.floating[Any]]
) -> None:
    config = ModelConfig.parse(QWEN2)
    source = np.random.default_rng(1)
    given = {
        name: source.normal(size=shape).astype(dtype) for name, shape in parameter_shapes(config).items()
    }
    given["model.layers.1.mlp.up_proj.weight"][-1, -1] = np.nan
    safetensors.numpy.save_file(given, tmp_path / "model.safetensors")

    def read(shard: Shard) -> dict[str, np.ndarray]:
        layout = {
            name: TensorSpec.piece(name, np.float32, each.shape, shard.box(name, each.shape))
            for name, each in given.items()
        }
        parts = {name: np.empty(spec.shape, np.float32) for name, spec in layout.items()}
        load_weights(tmp_path, config, parts, layout)
        return parts

    for name, part in read(Shard(0, 2)).items():
        box = Shard(0, 2).box(name, given[name].shape)
        np.testing.assert_array_equal(part, given[name][within(box, whole(given[name].shape))])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        read(Shard(1, 2))
