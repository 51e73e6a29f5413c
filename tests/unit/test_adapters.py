"""Adapters on disk: named as PEFT names them, bound to their base, handed on alone or merged with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from rollforward.cli.main import main
from rollforward.config.loading import load
from rollforward.errors import CheckpointMismatch, ConfigError, ModelError
from rollforward.grpo.randomness import adapter_values
from rollforward.grpo.types import LoraSettings
from rollforward.interop.adapters import digest_of_base
from rollforward.models.config import ModelConfig
from rollforward.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODULES,
    AdapterConfig,
    adapter_names,
    adapter_shapes,
    merged,
)
from rollforward.models.shapes import layout_of_trained, parameter_shapes
from rollforward.models.weights import load_weights, stored_weights
from rollforward.position import Position
from rollforward.run import adapters
from rollforward.store import CheckpointStore

GOLDEN = Path(__file__).parents[1] / "golden"
LORA = LoraSettings(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj"))


def model(family: str) -> ModelConfig:
    return ModelConfig.parse(json.loads((GOLDEN / "models" / family / "config.json").read_text()))


def weights_of(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    found = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    load_weights(folder, config, found)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_names_and_shapes_are_those_in_a_file_of_peft(family: str) -> None:
    folder = GOLDEN / "adapters" / family
    said = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes())
    written = safetensors.numpy.load_file(folder / ADAPTER_WEIGHTS)
    assert adapter_shapes(model(family), said.rank, said.modules) == {n: a.shape for n, a in written.items()}


def test_what_is_said_of_an_adapter_comes_back() -> None:
    said = AdapterConfig(base="/models/base", rank=8, alpha=12.5, modules=("q_proj", "v_proj"))
    assert AdapterConfig.parse(said.to_json()) == said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "does not describe LoRA"),
        ({"r": 0}, "not of its kind"),
        ({"target_modules": ["embed_tokens"]}, "not of its kind"),
    ],
)
def test_another_kind_of_adapter_is_refused(change: dict[str, object], named: str) -> None:
    said = json.loads(AdapterConfig(base="b", rank=8, alpha=8, modules=("q_proj",)).to_json())
    with pytest.raises(ModelError, match=named):
        AdapterConfig.parse(json.dumps(said | change).encode())


def test_what_an_adapter_starts_from_is_a_function_of_seed_and_name() -> None:
    values = adapter_values(7, "a", (8, 400))
    assert values.dtype == np.float32
    assert values.tobytes() == adapter_values(7, "a", (8, 400)).tobytes()
    assert values[:2].tobytes() == adapter_values(7, "a", (2, 400)).tobytes(), "whatever the rank"
    assert values.tobytes() != adapter_values(8, "a", (8, 400)).tobytes()
    assert values.tobytes() != adapter_values(7, "b", (8, 400)).tobytes()
    assert abs(values).max() <= 0.05
    assert abs(values.std() - 0.05 / np.sqrt(3)) < 1e-3
    assert abs(values.mean()) < 2e-3


class TestBase:
    def test_its_digest_does_not_depend_on_how_it_is_cut_into_files(self, tmp_path: Path) -> None:
        folder, config = GOLDEN / "models" / "llama", model("llama")
        assert len(list(folder.glob("*.safetensors"))) > 1
        arrays: dict[str, np.ndarray] = {}
        for file in folder.glob("*.safetensors"):
            arrays |= safetensors.numpy.load_file(file)
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
        digest = digest_of_base(stored_weights(folder, config))
        assert digest_of_base(stored_weights(tmp_path, config)) == digest
        arrays["model.norm.weight"][3] += 1e-3
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
        assert digest_of_base(stored_weights(tmp_path, config)) != digest

    def test_a_resume_with_other_adapters_is_refused_with_both(self, tmp_path: Path) -> None:
        config = load(None, [("actor_config.lora.rank", 4)]).config
        saved = {ADAPTER_CONFIG: adapters.about(LORA, tmp_path)}
        with pytest.raises(CheckpointMismatch, match=r"the checkpoint has rank 3.*configuration rank 4"):
            adapters.base_of_resumed(config, adapters.lora_of(config), saved)
        with pytest.raises(CheckpointMismatch, match=r"rank 3.*the configuration no adapters"):
            adapters.base_of_resumed(config, None, saved)
        with pytest.raises(CheckpointMismatch, match=r"the checkpoint has no adapters"):
            adapters.base_of_resumed(config, adapters.lora_of(config), {})
        with pytest.raises(CheckpointMismatch, match=r"alpha 6.*alpha 7"):
            adapters.base_of_resumed(config, replace(LORA, alpha=7), saved)

    def test_it_is_where_it_was_or_where_the_configuration_says(self, tmp_path: Path) -> None:
        saved = {ADAPTER_CONFIG: adapters.about(LORA, tmp_path / "gone")}
        config = load(None, []).config
        with pytest.raises(ConfigError, match="gone is no folder") as caught:
            adapters.base_of_resumed(config, LORA, saved)
        assert "actor_config.load" in (caught.value.hint or "")
        moved = load(None, [("actor_config.load", str(tmp_path))]).config
        assert adapters.base_of_resumed(moved, LORA, saved) == tmp_path
        assert adapters.base_of_resumed(config, None, {}) is None


def values(config: ModelConfig) -> dict[str, np.ndarray]:
    source = np.random.default_rng(2)
    shapes = adapter_shapes(config, LORA.rank, LORA.target_modules)
    return {name: source.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of a golden model, bf16."""
    return Path(shutil.copytree(GOLDEN / "models" / "qwen2", tmp_path / "base"))


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """A run of adapters, with one checkpoint."""
    config = model("qwen2")
    layout = layout_of_trained(adapter_shapes(config, LORA.rank, LORA.target_modules))
    files = {
        "config.json": (base / "config.json").read_bytes(),
        "tokenizer.json": b"{}",
        ADAPTER_CONFIG: adapters.about(LORA, base),
    }
    CheckpointStore(tmp_path / "run").save(
        Position(0, 2),
        {
            "policy_model": values(config),
            "optimizer": {n: np.zeros(s.shape, s.dtype) for n, s in layout["optimizer"].items()},
            "ref": {},
        },
        global_step=2,
        run_id="r",
        incarnation=1,
        state={"facts": {"base": digest_of_base(stored_weights(base, config))}},
        attachments=files,
    )
    return tmp_path / "run"


class TestExport:
    def test_as_a_folder_of_peft(self, run: Path, base: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert main(["export", str(run), "--to", str(out)]) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            ADAPTER_CONFIG,
            ADAPTER_WEIGHTS,
            "tokenizer.json",
        ]
        found = safetensors.numpy.load_file(out / ADAPTER_WEIGHTS)
        assert found.keys() == values(model("qwen2")).keys()
        for name, array in values(model("qwen2")).items():
            np.testing.assert_array_equal(found[name], array)
        said = AdapterConfig.parse((out / ADAPTER_CONFIG).read_bytes())
        assert said == AdapterConfig(base=str(base), rank=3, alpha=6.0, modules=("q_proj", "down_proj"))

    def test_merged_with_its_base(self, run: Path, base: Path, tmp_path: Path) -> None:
        out, config = tmp_path / "out", model("qwen2")
        assert main(["export", str(run), "--to", str(out), "--merge"]) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        whole, before, factors = weights_of(out, config), weights_of(base, config), values(config)
        changed = 0
        for name, array in before.items():
            first, second = adapter_names(name)
            if first in factors:
                changed += 1
                array = merged(array, factors[first], factors[second], 2.0)
            np.testing.assert_array_equal(whole[name], array)
        assert changed == 2 * config.layers
        assert (
            json.loads((out / "config.json").read_text())[
                "torch_dtype" if "torch_dtype" in (out / "config.json").read_text() else "dtype"
            ]
            == "float32"
        )

    def test_another_base_is_refused_and_nothing_is_left(
        self, run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = bytearray((base / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (base / "model.safetensors").write_bytes(content)
        assert main(["export", str(run), "--to", str(tmp_path / "out"), "--merge"]) == 2
        assert "belong to another base" in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*"))

    def test_a_base_that_was_moved(
        self, run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        moved = base.rename(tmp_path / "moved")
        command = ["export", str(run), "--to", str(tmp_path / "out"), "--merge"]
        assert main(command) == 2
        assert "--base FOLDER" in capsys.readouterr().err
        assert main([*command, "--base", str(moved)]) == 0

    def test_mindrlhf_has_no_names_for_adapters(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["export", str(run), "--to", str(tmp_path / "out"), "--format", "mindrlhf"]
        assert main(command) == 2
        assert "holds adapters" in capsys.readouterr().err
        assert main([*command, "--merge"]) == 2
        assert "not --format mindrlhf" in capsys.readouterr().err

    def test_the_whole_of_a_run_has_nothing_to_merge(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        CheckpointStore(tmp_path / "whole").save(
            Position(0, 1),
            {"policy_model": {"w": np.zeros(2, np.float32)}},
            global_step=1,
            run_id="r",
            incarnation=1,
            state={},
            attachments={"config.json": (base / "config.json").read_bytes()},
        )
        assert main(["export", str(tmp_path / "whole"), "--to", str(tmp_path / "out"), "--merge"]) == 2
        assert "no adapters to merge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lora.target_modules": ["lm_head"]}, "each must be one of q_proj"),
        ({"lora.rank": 8, "lora.target_modules": []}, "name at least one part"),
        ({"lora.rank": 8, "lora.alpha": 0}, "nothing is learnt"),
        ({"lora.rank": -1}, "at least 0"),
        ({"lora.dropout": 0.1}, "unknown key"),
        ({"recompute_config.select_recompute": True}, "select_recompute: is not supported"),
        (
            {"recompute_config.recompute_slice_activation": True},
            "recompute_slice_activation: is not supported",
        ),
        ({"recompute_config.recompute": [2, 3]}, "expected true or false"),
        ({"recompute_config.swap": True}, "unknown key"),
    ],
)
def test_what_a_configuration_cannot_have_is_named(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(None, [(f"actor_config.{key}", value) for key, value in given.items()])


@pytest.mark.parametrize("given", [("ref_config.sync_ref_model", True), ("ref_config.load", "elsewhere")])
def test_the_reference_of_adapters_is_their_base(given: tuple[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{given[0]}: cannot be .* base with the adapters off"):
        load(None, [("actor_config.lora.rank", 8), given])


def test_the_parts_that_can_have_adapters_are_the_models() -> None:
    assert load(None, []).config.actor_config.lora.target_modules == MODULES


def test_a_configuration_of_mindrlhf_is_read_as_it_is() -> None:
    usual = {
        "recompute": False,
        "select_recompute": False,
        "parallel_optimizer_comm_recompute": False,
        "mp_comm_recompute": True,
        "recompute_slice_activation": False,
    }
    load(None, [(f"actor_config.recompute_config.{key}", value) for key, value in usual.items()])
