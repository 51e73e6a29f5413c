"""Rotary frequencies are those of transformers, in every scaling and in both spellings."""

import json
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from golden_models import FOLDER
from mindspore import Tensor
from numpy.typing import NDArray

from rollforward.engines.mindspore.model import Rotary
from rollforward.errors import ModelError
from rollforward.models.rope import RopeConfig, inverse_frequencies

CASES: list[dict[str, Any]] = json.loads((FOLDER / "rope.json").read_text())
HEAD_DIM = 64


def in_the_older_spelling(config: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type", None)
    return {
        "max_position_embeddings": config["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": {"type": kind, **scaling} if kind else None,
    }


def cosines_and_sines(
    rope: RopeConfig, positions: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[B, L, head_dim] each: every head's."""
    found = [
        part.asnumpy() for part in Rotary(rope, heads=2, kv_heads=1, head_dim=HEAD_DIM)(Tensor(positions))
    ]
    for all_heads, one_head in zip(found[:2], found[2:], strict=True):
        np.testing.assert_array_equal(all_heads, np.repeat(one_head, 2, axis=2))
    return found[2][:, :, 0], found[3][:, :, 0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['length']}")
def test_frequencies_agree_with_transformers(case: dict[str, Any]) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rope = RopeConfig.parse(case["config"])
    last = (case["length"] or 12) - 1
    cos, sin = cosines_and_sines(rope, np.array([[0, 1, last]], np.int32))
    angles = np.array([[0], [1], [last]]) * np.tile(case["inverse_frequencies"], 2)
    np.testing.assert_allclose(cos[0], np.cos(angles) * case["attention_factor"], atol=5e-5)
    np.testing.assert_allclose(sin[0], np.sin(angles) * case["attention_factor"], atol=5e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['length']}")
def test_both_spellings_mean_the_same(case: dict[str, Any]) -> None:
    assert RopeConfig.parse(in_the_older_spelling(case["config"])) == RopeConfig.parse(case["config"])


def test_a_long_row_does_not_stretch_its_short_neighbour_under_dynamic_scaling() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    dynamic = next(case for case in CASES if case["name"] == "dynamic" and case["length"] == 10)
    rope = RopeConfig.parse(dynamic["config"])
    positions = np.array([[0, 1, 9], [0, 1, 199]], np.int32)
    cos, _ = cosines_and_sines(rope, positions)
    frequencies = np.tile(inverse_frequencies(rope, HEAD_DIM), 2)
    np.testing.assert_allclose(cos[0], np.cos(positions[0][:, None] * frequencies), atol=5e-6)
    assert not np.allclose(cos[1, 1], cos[0, 1], atol=5e-5)


def test_a_scaling_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="longrope") as caught:
        RopeConfig.parse({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}})
    assert "yarn" in str(caught.value.hint)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_scaling_without_its_parameters_says_which_one(key: str) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    del scaling[key]
    with pytest.raises(ModelError, match=key):
        RopeConfig.parse({"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_theta": "many"}, "rope_theta is 'many'"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "from layer to layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_a_wrong_value_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        RopeConfig.parse(config)
