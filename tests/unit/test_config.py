"""A configuration that is wrong says where, all at once; one that is right means what MindRLHF means."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollforward.config.ignored import IGNORED
from rollforward.config.keys import Config, what_affects_numbers
from rollforward.config.loading import load, parse_override
from rollforward.config.places import outputs
from rollforward.config.schema import meaning_of, walk
from rollforward.errors import ConfigError
from rollforward.replay.facts import fingerprint

MINDRLHF = """\
rl_config:
  dataset_file: train.jsonl
  tokenizer_dir: model
  chunk_size: 2
  num_rollouts: 4
  num_generations: 8
  packing: True
  parallel_mode: semi_auto_parallel
  load_ckpt_format: hf_safetensors
  tokenizer_type: qwen
  enable_oldpolicy: True
  save_prompt_completions_dir: /tmp/
actor_config:
  load: model
  loss_scale_value: 1
  parallel_config: {data_parallel: 1, model_parallel: 4, recompute: {deeper: 1}}
  optimizer: {type: adamw, adam_beta2: 0.95, eps: 1e-8, opt_offload: False}
  lr_schedule: {lr_decay_style: cosine, lr: 5e-7, min_lr: 1.0e-10, warmup_step: 10, decay_steps: 200000}
ref_config: {ref_model_batch_size: 2, sync_ref_model: False, ref_model_sync_steps: 50}
reward_config: {verifier_function: ["accuracy_reward", "format_reward"], verifier_weight: [1.0, 0.5]}
generate_config:
  use_vllm: 1
  max_prompt_length: 2048
  sampling_config: {max_tokens: 512, top_k: 20, repetition_penalty: 1.05, eos_token_id: [3, 4]}
monitor_config: {anything: {goes: here}}
profiler_config: {profile: False}
context: {mode: 0, device_target: CPU, ascend_config: {precision_mode: must_keep_origin_dtype}}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "grpo.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text))
    return str(caught.value)


def test_the_yaml_that_a_user_of_mindrlhf_has_is_understood(tmp_path: Path) -> None:
    loaded = load(written(tmp_path, MINDRLHF))
    config = loaded.config
    assert config.samples_per_chunk == 16
    assert config.samples_per_generation == 16
    assert config.actor_config.lr_schedule.lr == 5e-7  # YAML 1.1 reads 5e-7 as text
    assert config.actor_config.optimizer.eps == 1e-8
    assert config.actor_config.parallel_config.model_parallel == 4
    assert config.verifier_weights == (1.0, 0.5)
    assert config.generate_config.sampling_config.eos_token_id == (3, 4)


def test_what_means_nothing_here_is_named_once_and_whole_sections_as_one(tmp_path: Path) -> None:
    ignored = load(written(tmp_path, MINDRLHF)).ignored
    assert "rl_config.packing" in ignored
    assert "actor_config.parallel_config.data_parallel" in ignored
    assert "actor_config.parallel_config.model_parallel" not in ignored
    assert "monitor_config" in ignored
    assert "generate_config.sampling_config.repetition_penalty" in ignored
    assert not any("lr_schedule" in path or "deeper" in path for path in ignored)
    assert len(set(ignored)) == len(ignored)


@pytest.mark.parametrize("name", ["pipeline_stage", "context_parallel", "expert_parallel"])
def test_a_way_to_cut_a_model_that_there_is_not_is_refused_by_name(tmp_path: Path, name: str) -> None:
    at_one = f"actor_config: {{parallel_config: {{{name}: 1}}}}\n"
    assert load(written(tmp_path, at_one)).config.actor_config.parallel_config.model_parallel == 1
    told = complaint(tmp_path, at_one.replace("1", "2"))
    assert f"actor_config.parallel_config.{name}: is 2, and nothing here does that" in told
    assert "model_parallel cuts a model over workers" in told


def test_a_cut_model_goes_together_with_adapters_and_with_recomputing(tmp_path: Path) -> None:
    text = "parallel_config: {model_parallel: 2}, lora: {rank: 8}, recompute_config: {recompute: true}"
    actor = load(written(tmp_path, f"actor_config: {{{text}}}\n")).config.actor_config
    assert (actor.parallel_config.model_parallel, actor.lora.rank) == (2, 8)
    assert actor.recompute_config.recompute


def test_no_key_is_both_meant_and_ignored() -> None:
    from rollforward.config.keys import Config

    assert not {path for path, _, _ in walk(Config)} & IGNORED


def test_every_problem_of_a_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = complaint(
        tmp_path,
        "rl_config:\n  epoch: 3\n  beta: x\n  seed: -1\n  chunk_size: 1.5\nactor_config: 3\ncontexts: {}\n",
    )
    assert "6 problems" in text
    assert "grpo.yaml:2: rl_config.epoch: unknown key; the nearest known key is 'epochs'" in text
    assert "grpo.yaml:3: rl_config.beta: expected a number, got the text 'x'" in text
    assert "grpo.yaml:4: rl_config.seed: must be between 0" in text
    assert "grpo.yaml:5: rl_config.chunk_size: expected a whole number, got the number 1.5" in text
    assert "grpo.yaml:6: actor_config: expected keys below this section" in text
    assert "grpo.yaml:7: contexts: unknown key; the nearest known key is 'context'" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rl_config: {num_generations: 1}", "at least 2; it is 1"),
        ("rl_config: {advantage_std: 1}", "expected true or false, got the whole number 1"),
        ("rl_config: {epochs: true}", "expected a whole number, got true/false"),
        ("rl_config: {beta: .nan}", "expected a number"),
        ("rl_config: {dataset_file: }", "expected text, got nothing"),
        ("rl_config: {loss_aggregation: mean}", "one of token_mean, sequence_mean; it is 'mean'"),
        ("reward_config: {verifier_function: []}", "at least one verifier"),
        ("reward_config: {verifier_weight: [1, 2]}", "2 weights for 1 verifiers"),
        ("actor_config: {lr_schedule: {warmup_step: 5, decay_steps: 5}}", "greater than warmup_step (5)"),
        ("actor_config: {lr_schedule: {lr: 1.0, min_lr: 2.0}}", "must not be greater than lr"),
        ("rl_config: {seq_length: 100}", "is 100, but max_prompt_length 512 + max_tokens 512 = 1024"),
        ("rl_config:\n  seed: 1\n  seed: 2", "rl_config.seed: given twice, first on line 2"),
        ("rl_config: [", "not valid YAML"),
        ("- rl_config", "expected sections such as rl_config"),
    ],
)
def test_a_wrong_value_says_what_was_expected(tmp_path: Path, text: str, told: str) -> None:
    assert told in complaint(tmp_path, text)


NESTED = "\n".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 60))
LISTS = "\n".join(f"    - &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))
DEEP = "[" * 1500  # far more than Python recurses; PyYAML takes time with the square of it


@pytest.fixture
def as_python_begins() -> Iterator[None]:
    """Python recurses as deep as when a configuration is read: MindSpore, once imported, allows more."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


HUGE = "0x" + "f" * 20_000  # PyYAML makes it, and Python does not print it


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rl_config: !!python/object/apply:os.system [exit]", "not valid YAML: could not determine"),
        ("rl_config: {seed: !!python/name:os.system }", "not valid YAML: could not determine"),
        ("rl_config: {seed: !!python/tuple [1]}", "not valid YAML: could not determine"),
        ("rl_config: {seed: !!int abc}", "not valid YAML"),
        ("rl_config: {seed: !!bool maybe}", "not valid YAML"),
        ("rl_config: {seed: 2001-99-99}", "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        (f"rl_config: {{seed: {'9' * 5000}}}", "not valid YAML"),
        (f"rl_config: {{seed: {'9' * 400}}}", "expected a whole number"),
        (f"actor_config: {{lr_schedule: {{lr: {'9' * 400}}}}}", "expected a number"),
        (f"rl_config: {{seed: {HUGE}}}", "of too many digits"),
        (f"rl_config: {{dataset_file: [{HUGE}]}}", "expected text"),
        ("rl_config: {max_steps: 99999999999999999999}", "expected a whole number"),
        (f"rl_config: {DEEP}", "nests too deep"),
        (f"a0: &a0 {{x: 1}}\n{NESTED}", "unknown key"),
        (f"rl_config:\n  dataset_file:\n    - &a0 [1]\n{LISTS}", "expected text, got the list"),
        ("rl_config: &a {seed: 1, x: *a}", "rl_config.x: unknown key"),
        ("rl_config: {dataset_file: &a [*a]}", "expected text"),
    ],
)
@pytest.mark.usefixtures("as_python_begins")
def test_yaml_that_is_more_than_data_ends_in_an_error(tmp_path: Path, text: str, told: str) -> None:
    """Tags for Python objects, numbers without measure, anchors that stand for billions or for themselves."""
    assert told in complaint(tmp_path, text)


@pytest.mark.parametrize("value", ["!!python/name:os.system", "9" * 5000, DEEP, "2001-99-99", "!!int x"])
@pytest.mark.usefixtures("as_python_begins")
def test_odd_yaml_of_the_command_line_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set rl_config\.seed="):
        parse_override(f"rl_config.seed={value}")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge"])
def test_a_configuration_that_is_not_a_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "grpo.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(path))


def test_a_missing_file_is_an_error_of_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "absent.yaml"))


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")).config == load(None).config


def test_options_go_before_the_file_and_are_named_when_wrong(tmp_path: Path) -> None:
    file = written(tmp_path, "rl_config: {seed: 1, beta: 0.5}")
    config = load(file, [("rl_config.seed", 7), ("generate_config.sampling_config.max_tokens", 3)]).config
    assert (config.rl_config.seed, config.rl_config.beta) == (7, 0.5)
    assert config.generate_config.sampling_config.max_tokens == 3
    with pytest.raises(ConfigError, match=r"command line: rl_config\.sead: unknown key"):
        load(file, [("rl_config.sead", 7)])


def test_set_reads_its_value_as_yaml() -> None:
    assert parse_override("rl_config.advantage_std=false") == ("rl_config.advantage_std", False)
    assert parse_override("a.b=[x, y]") == ("a.b", ["x", "y"])
    assert parse_override("a.b=c=d") == ("a.b", "c=d")
    for wrong in ("rl_config.seed", "seed=1", "a.b=["):
        with pytest.raises(ConfigError, match="--set"):
            parse_override(wrong)


def test_the_fingerprint_changes_with_what_changes_the_numbers_and_with_nothing_else() -> None:
    def of(*overrides: tuple[str, object]) -> str:
        return fingerprint(what_affects_numbers(load(None, list(overrides)).config))

    assert of() == of(("rl_config.save_ckpt_interval", 9), ("actor_config.load", "elsewhere"))
    assert of() != of(("rl_config.beta", 0.02))
    assert of() != of(("generate_config.sampling_config.top_p", 0.9))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_the_home_folder_is_meant_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [path for path, declared, _ in walk(Config) if meaning_of(declared).is_path]
    assert {path.rpartition(".")[2] for path in paths} == {
        "dataset_file",
        "tokenizer_dir",
        "save_strategy_dir",
        "tensorboard_dir",
        "load",
        "save",
        "model_config",
        "work_dir",
    }
    config = load(None, [(path, "~/there") for path in paths]).config
    for path in paths:
        value: object = config
        for part in path.split("."):
            value = getattr(value, part)
        assert value == str(tmp_path / "there"), path
    assert outputs(load(None).config, {"LOCAL_DEFAULT_PATH": "~/w"}).run == tmp_path / "w/save_ckpt"
    with pytest.raises(ConfigError, match="no such home folder"):
        outputs(load(None).config, {"LOCAL_DEFAULT_PATH": "~nobody_of_this_name/w"})
    with pytest.raises(ConfigError, match=r"actor_config\.save: .*no such home folder"):
        load(None, [("actor_config.save", "~nobody_of_this_name/w")])


def test_what_other_trainers_call_a_key_is_understood(tmp_path: Path) -> None:
    told = complaint(tmp_path, "rl_config: {save_steps: 5, learning_rate: 1e-6}\noutput_dir: out\n")
    assert "rl_config.save_steps: unknown key; here that is rl_config.save_ckpt_interval" in told
    assert "rl_config.learning_rate: unknown key; here that is actor_config.lr_schedule.lr" in told
    assert "output_dir: unknown key; here that is actor_config.save" in told
