"""What users of TRL's trainer meet: verbs, folders of TRL, refusals, changes between two starts."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from small_trl import CASES, EXAMPLE, Death, Died, build, bytes_of, die, history_of
from transformers import AutoModelForCausalLM, TrainerCallback

from rollforward.cli.main import main
from rollforward.errors import CheckpointMismatch, InputError
from rollforward.replay.metrics import read
from rollforward.torch import as_array
from rollforward.trl import export_checkpoint
from rollforward.trl.compatibility import check_trainer
from rollforward.trl.facts import _reward_digest


def train(out: Path, case: str = "plain", **how: Any) -> Any:
    trainer = build(CASES[case], out, **how)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 28 steps that died in one of them."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.raises(Died):
        train(out, death=Death("update", 17, die))
    train(out)
    return out


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_rollouts_are_shown_as_texts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = json.loads(printed(capsys, "rollouts", str(run), "--step", "0_20", "--json"))
    assert len(step["samples"]) == 8
    assert len({sample["prompt"] for sample in step["samples"]}) == 2
    for sample in step["samples"]:
        assert sample["rewards"] == {"right": sample["reward"]}
        assert 1 <= sample["tokens"] <= 8
    lines = printed(capsys, "rollouts", str(run), "--step", "0_20", "--worst", "2").splitlines()
    assert len(lines) == 2


def test_history_verify_inspect_and_diff_work_on_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "resumed\t2\t0_15" in printed(capsys, "history", str(run))
    assert "damaged" not in printed(capsys, "verify", str(run), "--deep")
    assert "0_28" in printed(capsys, "inspect", str(run))
    capsys.readouterr()
    assert main(["diff", f"{run}:0_3", f"{run}:0_28"]) == 1
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_every_step_has_its_figures_once(run: Path) -> None:
    records = read(run / "metrics.jsonl")
    assert [record["global_step"] for record in records] == list(range(28))
    assert all("reward" in record and "loss" in record for record in records)


def test_any_step_is_rebuilt_by_the_training_command(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("small_trl.py"))
    out = tmp_path / "run"
    train(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    arguments = ["rebuild", str(out), "--to", "0_11", "--out", str(tmp_path / "new")]
    assert main([*arguments, "--", sys.executable, program, "plain", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    export_checkpoint(tmp_path / "new", tmp_path / "eleven")
    assert json.loads((tmp_path / "eleven" / "trainer_state.json").read_text())["global_step"] == 11
    stock = train(tmp_path / "stock", stock=True, save_steps=11)
    theirs = (tmp_path / "stock" / "checkpoint-11" / "model.safetensors").read_bytes()
    assert tensors_of(theirs) == tensors_of((tmp_path / "eleven" / "model.safetensors").read_bytes())
    assert stock.state.global_step == 28


def tensors_of(content: bytes) -> dict[str, bytes]:
    from safetensors.numpy import load

    return {name: array.tobytes() for name, array in load(content).items()}


@pytest.mark.parametrize("case", ["plain", "lora"])
def test_trl_resumes_from_an_exported_checkpoint_as_from_its_own(case: str, tmp_path: Path) -> None:
    """Within epoch 0, where TRL itself is exact."""
    train(tmp_path / "run", case)
    assert main(["export", f"{tmp_path / 'run'}:0_6", "--to", str(tmp_path / "six"), "--format", "trl"]) == 0
    own = tmp_path / "own" / "checkpoint-6"
    build(CASES[case], own.parent, stock=True, save_steps=6, max_steps=6).train()
    ends = []
    for start in (tmp_path / "six", own):
        trainer = build(CASES[case], tmp_path / "out", stock=True, max_steps=10, lr_scheduler_type="constant")
        trainer.train(str(start))
        ends.append([row.get("reward") for row in history_of(trainer) if row["step"] > 6])
    assert len(ends[0]) == 5
    assert ends[0] == ends[1]
    theirs = {path.name for path in own.iterdir()}
    assert {path.name for path in (tmp_path / "six").iterdir()} <= theirs


def test_a_run_starts_from_a_checkpoint_of_trl(tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = train(tmp_path / "whole", stock=True)
    train(out, stock=True, save_steps=6)
    for path in out.iterdir():
        if path.name != "checkpoint-6":
            subprocess.run(["rm", "-r", path], check=True)
    said: list[str] = []
    dying = build(CASES["plain"], out, death=Death("update", 8, die), said=said.append)
    with pytest.raises(Died):
        dying.train(resume_from_checkpoint=True)
    resumed = build(CASES["plain"], out, said=said.append)
    resumed.train(resume_from_checkpoint=True)
    assert bytes_of(resumed) == bytes_of(whole)
    assert (out / "commits" / "0_6.json").exists()
    assert any("is resumed" in line for line in said)


def test_a_checkpoint_of_trl_that_is_not_used_is_mentioned(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    said: list[str] = []
    build(CASES["plain"], tmp_path, said=said.append, max_steps=1).train()
    assert any("checkpoint-3 is not used" in line for line in said)


def test_what_changed_between_two_starts_is_named(tmp_path: Path) -> None:
    with pytest.raises(Died):
        train(tmp_path, death=Death("update", 8, die))
    said: list[str] = []
    train(tmp_path, said=said.append, temperature=0.7)
    assert any("args.temperature" in line for line in said)


def test_another_learning_rate_is_not_taken_in_silence(tmp_path: Path) -> None:
    """TRL keeps the checkpoint's, so does a resumed run here: nothing finished is thrown away for it."""
    with pytest.raises(Died):
        train(tmp_path, death=Death("update", 8, die))
    said: list[str] = []
    resumed = train(tmp_path, said=said.append, learning_rate=1e-4)
    assert any("learning rate is 0.0001 here and 0.0005 in the checkpoint" in line for line in said)
    assert any("2 of 2 updates equal" in line for line in said)
    assert bytes_of(resumed) == bytes_of(train(tmp_path.with_name("whole")))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Died):
        train(tmp_path, death=Death("update", 8, die))
    with pytest.raises(InputError, match="trained with AdamW, and this trainer has SGD"):
        train(tmp_path, optim="sgd")


class Stops(TrainerCallback):
    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= 8


def test_a_run_that_a_callback_ended_is_over(tmp_path: Path) -> None:
    first = build(CASES["plain"], tmp_path)
    first.add_callback(Stops())
    first.train()
    said: list[str] = []
    again = build(CASES["plain"], tmp_path, said=said.append)
    again.train()
    assert (first.state.global_step, again.state.global_step) == (8, 8)
    assert bytes_of(again) == bytes_of(first)
    assert any("a callback ended it at step 8 of 28" in line for line in said)


class Shrinks(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.shrink)

    def shrink(self, _args: Any, state: Any, _control: Any, model: Any, **_: Any) -> None:
        if state.global_step in (3, 4):
            with torch.no_grad():
                next(iter(model.parameters())).mul_(0.9)


@pytest.mark.parametrize("case", ["plain", "reference follows"])
def test_weights_that_change_outside_an_update_are_an_error(case: str, tmp_path: Path) -> None:
    trainer = build(CASES[case], tmp_path)
    trainer.add_callback(Shrinks("on_step_begin"))
    with pytest.raises(InputError, match="changed before the optimizer's step"):
        trainer.train()


def test_a_callback_may_change_weights_at_the_end_of_a_step(tmp_path: Path) -> None:
    def run(out: Path, death: Death | None = None) -> Any:
        trainer = build(CASES["plain"], out, death=death)
        trainer.add_callback(Shrinks("on_step_end"))
        trainer.train()
        return trainer

    with pytest.raises(Died):
        run(tmp_path / "killed", Death("update", 8, die))
    assert bytes_of(run(tmp_path / "killed")) == bytes_of(run(tmp_path / "whole"))


class Evaluates(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 4:
            self.trainer.evaluate()


def test_a_callback_may_evaluate(tmp_path: Path) -> None:
    callback = Evaluates()
    callback.trainer = trainer = build(CASES["best model"], tmp_path)
    trainer.add_callback(callback)
    trainer.train()
    assert any("eval_reward" in row for row in read(tmp_path / "metrics.jsonl") if row["step"] == 3)


def test_a_changed_reward_is_named_whatever_kind_it_is() -> None:
    def reward(completions: list[str], weight: float) -> list[float]:
        return [weight for _ in completions]

    one, other = (_reward_digest(functools.partial(reward, weight=weight)) for weight in (1.0, 2.0))
    assert one != other
    assert one == _reward_digest(functools.partial(reward, weight=1.0))


def test_what_a_reward_function_logs_for_show_may_be_anything(tmp_path: Path) -> None:
    trainer = build(CASES["plain"], tmp_path, max_steps=4, save_steps=2)
    plain = trainer.reward_funcs[0]

    def reward(log_extra: Any, completions: list[Any], **more: Any) -> list[float]:
        log_extra("vector", [torch.ones(2) for _ in completions])
        return plain(completions=completions, log_extra=log_extra, **more)

    trainer.reward_funcs[0] = reward
    trainer.train()
    assert trainer.state.global_step == 4


def test_an_adapter_of_another_name_with_modules_besides_is_exported(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    trainer = build(
        CASES["plain"], tmp_path / "run", model=get_peft_model(model, config, adapter_name="mine")
    )
    trainer.train()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "adapter")]) == 0
    base = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP"),
        ("args.auto_find_batch_size", True, "auto_find_batch_size"),
        ("args.ignore_data_skip", True, "ignore_data_skip"),
    ],
)
def test_what_cannot_be_exact_is_refused(name: str, value: bool, told: str, tmp_path: Path) -> None:
    trainer = build(CASES["plain"], tmp_path)
    owner = trainer.args if name.startswith("args.") else trainer
    setattr(owner, name.removeprefix("args."), value)
    with pytest.raises(InputError, match=told):
        check_trainer(trainer)


def test_vllm_is_warned_about(tmp_path: Path) -> None:
    trainer = build(CASES["plain"], tmp_path)
    trainer.use_vllm = True
    assert any("vLLM" in warning for warning in check_trainer(trainer))


def test_another_signature_in_trl_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _generate_and_score_completions(self: Any, inputs: Any, more: Any) -> None: ...

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", _generate_and_score_completions)
    with pytest.raises(InputError, match=r"_generate_and_score_completions takes inputs, more"):
        build(CASES["plain"], tmp_path)


def test_a_run_of_another_loop_is_not_exported_for_trl(tmp_path: Path) -> None:
    import numpy as np

    import rollforward

    with rollforward.open_run(tmp_path) as run:
        run.restore({"policy_model": {"w": np.zeros(1)}})
        run.checkpoint(0, {"policy_model": {"w": np.zeros(1)}})
    with pytest.raises(CheckpointMismatch, match=r"rollforward\.trl"):
        export_checkpoint(tmp_path, tmp_path / "out")


def test_a_run_of_another_loop_is_not_continued(tmp_path: Path) -> None:
    import rollforward

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model")
    tensors = {"policy_model": {name: as_array(each) for name, each in model.named_parameters()}}
    with rollforward.open_run(tmp_path) as run:
        run.restore(tensors)
        run.checkpoint(0, tensors)
    with pytest.raises(InputError, match="holds a run of another training loop"):
        build(CASES["plain"], tmp_path).train()


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = train(tmp_path, "best model")
    best = trainer.state.best_global_step
    export_checkpoint(tmp_path, tmp_path / "best", step=best)
    stored = tensors_of((tmp_path / "best" / "model.safetensors").read_bytes())
    held = {name: each.detach().numpy().tobytes() for name, each in trainer.model.named_parameters()}
    assert stored == held
