"""A run of adapters on the real engine: killed, it ends with the same bits, and beside its own base only."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import safetensors.numpy
from command import ARITHMETIC, PROGRAM, SETTINGS, Command

from rollforward.models.config import ModelConfig
from rollforward.models.lora import MODULES, adapter_shapes
from rollforward.models.shapes import layout_of_trained, tensor_layout
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage
from rollforward.store import find, read_tensors

pytestmark = pytest.mark.engine

LORA = SETTINGS | {
    "actor_config.lora.rank": 4,
    "actor_config.recompute_config.recompute": "true",
    "rl_config.weights_digest_interval": 1,
}


def said_by(*arguments: object, code: int = 0) -> str:
    done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Never interrupted."""
    command = Command(tmp_path_factory.mktemp("lora") / "whole", settings=LORA)
    said = command.finish()
    assert "adapters: rank 4, alpha 16, beside q_proj" in said
    return command


def test_killed_in_an_update_it_ends_with_the_same_bits(adapted: Command, tmp_path: Path) -> None:
    killed = Command(tmp_path / "killed", settings=LORA)
    killed.take_graphs(adapted)
    process = killed.start()
    killed.kill_inside(process, "update", 3)
    assert process.wait(timeout=600) != 0
    said = killed.finish(resume=True)
    assert "updates equal to the last bit" in said
    assert killed.newest()["digests"] == adapted.newest()["digests"]
    assert killed.figures() == adapted.figures()
    (report,) = recovery_report.read(LocalStorage(killed.run))
    assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)


@pytest.mark.slow
def test_two_workers_with_a_spread_optimizer_learn_the_same_bits(adapted: Command, tmp_path: Path) -> None:
    """By name: adapters and two workers, each without the other, are in the suite."""
    changes = {"rl_config.num_rollouts": 1, "actor_config.enable_parallel_optimizer": "true"}
    two = Command(tmp_path / "two", workers=2, settings=LORA | changes)
    two.finish()
    assert two.newest()["digests"] == adapted.newest()["digests"]
    assert two.figures() == adapted.figures()


def test_a_checkpoint_is_adapters_and_their_moments_alone(adapted: Command) -> None:
    config = ModelConfig.parse(json.loads((ARITHMETIC / "model/config.json").read_text()))
    expected = layout_of_trained(adapter_shapes(config, 4, MODULES))
    storage = LocalStorage(adapted.run)
    held = {(role, name): array.shape for role, name, array in read_tensors(storage, find(storage).manifest)}
    shapes = {(role, name): spec.shape for role, named in expected.items() for name, spec in named.items()}
    assert held == shapes


def test_at_rank_8_a_checkpoint_of_a_135m_model_is_a_twentieth_of_a_full_one() -> None:
    smollm2 = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    }
    config = ModelConfig.parse(smollm2)

    def elements(layout) -> int:
        roles = ("policy_model", "optimizer")
        return sum(math.prod(spec.shape) for role in roles for spec in layout[role].values())

    share = elements(layout_of_trained(adapter_shapes(config, 8, MODULES))) / elements(tensor_layout(config))
    assert 0.01 < share < 0.05


def test_another_base_is_refused_and_a_moved_one_is_found(adapted: Command, tmp_path: Path) -> None:
    """The run continues for a step more."""
    command = Command(tmp_path / "moved", settings=LORA | {"rl_config.max_steps": 7})
    shutil.copytree(adapted.run, command.run)
    base = shutil.copytree(ARITHMETIC / "model", tmp_path / "base")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (base / "model.safetensors").write_bytes(content)
    command.settings["actor_config.load"] = base
    assert "belong to another base" in command.ended(command.start(resume=True), 2)
    shutil.copy(ARITHMETIC / "model/model.safetensors", base)
    assert f"the base is {base}" in command.finish(resume=True)


def test_other_adapters_are_refused(adapted: Command, tmp_path: Path) -> None:
    command = Command(tmp_path / "other", settings=LORA | {"actor_config.lora.rank": 2})
    shutil.copytree(adapted.run, command.run)
    assert "the checkpoint has rank 4" in command.ended(command.start(resume=True), 2)


def test_every_step_can_be_rebuilt_and_told_apart(adapted: Command, tmp_path: Path) -> None:
    out = tmp_path / "third"
    said_by("rebuild", adapted.run, "--to", "0_3", "--out", out)
    told = said_by("diff", f"{out}:0_3", f"{adapted.run}:0_4", code=1)
    assert "lora_B" in told
    said_by("verify", out)
    assert "0_3" in said_by("inspect", out)


def test_what_is_exported_merged_starts_a_run_of_all_weights(
    whole: Command, adapted: Command, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    said_by("export", adapted.run, "--to", merged, "--merge")
    command = Command(tmp_path / "next", settings=SETTINGS | {"rl_config.max_steps": 1})
    command.take_graphs(whole)
    arguments = command.arguments(resume=False)
    arguments[arguments.index("--actor_checkpoint_path") + 1] = str(merged)
    said_by("train", *arguments)
    base = safetensors.numpy.load_file(ARITHMETIC / "model/model.safetensors")
    found = safetensors.numpy.load_file(merged / "model.safetensors")
    changed = {name for name in base if base[name].tobytes() != found[name].tobytes()}
    assert {name.split(".")[-2] for name in changed} == set(MODULES)
