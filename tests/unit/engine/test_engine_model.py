"""The model's borders: names, masks, and what a token may see."""

import mindspore as ms
import numpy as np
import pytest
from golden_models import FAMILIES, FOLDER, golden_model, logits_of
from mindspore import Tensor, nn
from safetensors import safe_open

from rollforward.engines.mindspore.model import (
    MASKED,
    Decoder,
    ModelConfig,
    attention_mask,
    initialise,
)

FAMILY = "qwen3"


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_carry_the_names_of_the_files(family: str) -> None:
    written = set()
    for file in (FOLDER / family).glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            written |= set(opened.keys())
    parameters = golden_model(family).decoder.named_parameters()
    assert set(parameters) == written
    assert {parameter.name for parameter in parameters.values()} == written


def test_a_prefix_stands_before_every_name_and_a_cell_around_the_model_changes_none() -> None:
    decoder = Decoder(ModelConfig.parse(golden_model(FAMILY).config), prefix="reference.")

    class Around(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder

    around = Around()
    names = [parameter.name for parameter in around.get_parameters()]
    assert names == [f"reference.{name}" for name in decoder.named_parameters()]


def test_a_tied_head_is_the_embedding_itself_and_another_is_not() -> None:
    tied, untied = golden_model("qwen3").decoder, golden_model("llama").decoder
    assert tied.head_weight is tied.named_parameters()["model.embed_tokens.weight"]
    assert untied.head_weight is untied.named_parameters()["lm_head.weight"]


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    config = ModelConfig.parse(golden_model("llama").config)
    drawn = []
    for seed in (1, 1, 2):
        decoder = Decoder(config)
        initialise(decoder, seed)
        drawn.append({name: value.asnumpy().copy() for name, value in decoder.named_parameters().items()})
    for name in drawn[0]:
        np.testing.assert_array_equal(drawn[0][name], drawn[1][name])
        if "norm" in name or name.endswith("bias"):
            assert (drawn[0][name] == (1.0 if "norm" in name else 0.0)).all()
        else:
            assert not np.array_equal(drawn[0][name], drawn[2][name])
            assert drawn[0][name].std() == pytest.approx(0.02, rel=0.1)


def test_a_query_sees_its_own_sample_and_the_prompt_before_it() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    groups = np.array([[0, 0, 0, 0, 0, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1, -1]], np.int32)
    samples = np.array([[0, 0, 1, 1, 2, 0, 3, -1], [0, 1, 1, -1, -1, -1, -1, -1]], np.int32)
    added = attention_mask(Tensor(groups), Tensor(samples)).asnumpy()
    assert added.shape == (2, 1, 8, 8)
    seen = (added == 0)[:, 0]
    assert (added[:, 0][~seen] == np.float32(MASKED)).all()
    assert [np.flatnonzero(row).tolist() for row in seen[0]] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 4],
        [5],
        [5, 6],
        [7],
    ]
    assert np.flatnonzero(seen[1][2]).tolist() == [0, 1, 2]
    assert seen.any(axis=2).all(), "no query sees nothing: a softmax over nothing means nothing"


def test_no_token_sees_a_later_one() -> None:
    golden = golden_model(FAMILY)
    before = logits_of(FAMILY, golden.prompts, golden.mask)
    changed = golden.prompts.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 48
    after = logits_of(FAMILY, changed, golden.mask)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert not np.allclose(after[0, 5], before[0, 5])


def test_no_token_sees_padding() -> None:
    golden = golden_model(FAMILY)
    ids, mask = golden.left_padded()
    before = logits_of(FAMILY, ids, mask)
    after = logits_of(FAMILY, np.where(mask, ids, 33).astype(np.int32), mask)
    np.testing.assert_array_equal(after[mask], before[mask])


def test_a_row_of_padding_alone_is_no_nan() -> None:
    golden = golden_model(FAMILY)
    found = logits_of(FAMILY, golden.prompts, golden.mask & (np.arange(4) != 2)[:, None])
    assert np.isfinite(found).all()
