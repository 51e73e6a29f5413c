"""What is said of tensors before MindSpore is loaded is what MindSpore then has."""

import json
from dataclasses import replace

import mindspore_case
import pytest
from engine_case import SETTINGS
from golden_models import FAMILIES, FOLDER

from rollforward.engines.mindspore.model import Decoder
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import parameter_shapes, tensor_layout


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_the_decoders(family: str) -> None:
    config = ModelConfig.parse(json.loads((FOLDER / family / "config.json").read_text()))
    real = {key: tuple(parameter.shape) for key, parameter in Decoder(config).named_parameters().items()}
    assert parameter_shapes(config) == real


def test_layout_is_that_of_the_engine() -> None:
    engine = mindspore_case.create(replace(SETTINGS, model_config=mindspore_case.MODEL))
    assert tensor_layout(ModelConfig.parse(mindspore_case.MODEL)) == engine.layout()
