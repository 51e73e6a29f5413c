"""Adapters that a run of ours exports are what PEFT opens, and merged ones what transformers opens."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rollforward.cli.main import main
from rollforward.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from rollforward.position import Position
from rollforward.store import CheckpointStore

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2"])


def run_of(family: str, folder: Path) -> Path:
    """A run whose policy is the golden adapter."""
    said = AdapterConfig.parse((GOLDEN / "adapters" / family / ADAPTER_CONFIG).read_bytes())
    base = GOLDEN / "models" / family
    ours = AdapterConfig(base=str(base), rank=said.rank, alpha=said.alpha, modules=said.modules)
    CheckpointStore(folder).save(
        Position(0, 1),
        {"policy_model": safetensors.numpy.load_file(GOLDEN / "adapters" / family / ADAPTER_WEIGHTS)},
        global_step=1,
        run_id="r",
        incarnation=1,
        state={},
        attachments={
            "config.json": (base / "config.json").read_bytes(),
            ADAPTER_CONFIG: ours.to_json(),
        },
    )
    return folder


def assert_golden(family: str, model: torch.nn.Module) -> None:
    with np.load(GOLDEN / "models" / family / "expected.npz") as given:
        prompts, lengths = given["prompts"], given["lengths"]
    with np.load(GOLDEN / "adapters" / family / "expected.npz") as expected:
        logits = expected["logits"]
    for row, length in enumerate(lengths):
        ids = torch.tensor(prompts[row : row + 1, :length], dtype=torch.int64)
        with torch.no_grad():
            found = model(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(found, logits[row, :length], atol=1e-4, rtol=0)


@FAMILIES
def test_peft_opens_the_adapters(family: str, tmp_path: Path) -> None:
    run = run_of(family, tmp_path / "run")
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / family, dtype=torch.float32)
    assert_golden(family, PeftModel.from_pretrained(base, tmp_path / "out").eval())


@FAMILIES
def test_transformers_opens_the_merged_model(family: str, tmp_path: Path) -> None:
    run = run_of(family, tmp_path / "run")
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--merge"]) == 0
    assert_golden(family, AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
