"""Small real runs of GRPO with TRL: the model and the problems of examples/arithmetic, seconds long.

As a program, one start of a run: python small_trl.py CASE OUT [--stock] [--dies PLACE:STEP]
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
import xxhash
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rollforward.trl import GRPOTrainer, Recovery

torch.set_num_threads(1)

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"
ROWS = [json.loads(line) for line in (EXAMPLE / "train.jsonl").read_text().splitlines()]
OF_THE_CLOCK = ("time", "per_second")
"""Parts of the names of figures that are other ones each time."""


class Died(Exception):
    """Ends a start in the middle."""


@dataclass(frozen=True)
class Case:
    """A way to train, on 24 problems: arguments of `GRPOConfig`. By default an epoch has 12 steps."""

    args: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 16
    lora: bool = False
    evaluates: bool = False
    conversational: bool = False


CASES = {
    "plain": Case(steps=28),
    "two iterations": Case({"num_iterations": 2}),
    "accumulating": Case(
        {
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "num_iterations": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 3,
        }
    ),
    "reference follows": Case({"sync_ref_model": True, "ref_model_sync_steps": 3, "beta": 0.1}),
    "lora": Case({"beta": 0.05}, lora=True),
    "conversational": Case({"beta": 0.05}, conversational=True),
    "best model": Case(
        {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "load_best_model_at_end": True,
            "metric_for_best_model": "reward",
            "save_total_limit": 2,
        },
        evaluates=True,
    ),
    "by epochs": Case(
        {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
        steps=28,
        evaluates=True,
    ),
}


class Death(TrainerCallback):
    """Ends a start at a place of a step, by `how`."""

    def __init__(self, place: str, step: int, how: Callable[[], None]) -> None:
        self.place, self.step, self.how = place, step, how

    def at(self, place: str, step: int) -> None:
        if (place, step) == (self.place, self.step):
            self.how()

    def on_substep_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.at("accumulate", state.global_step)

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.at("update", state.global_step)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.at("updated", state.global_step - 1)

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.at("save", state.global_step)


def die() -> None:
    raise Died


def build(
    case: Case,
    out: Path,
    *,
    stock: bool = False,
    death: Death | None = None,
    rewarded: list[int] | None = None,
    said: Callable[[str], None] = lambda _: None,
    model: Any = None,
    **args: Any,
) -> Any:
    """A trainer; `rewarded` notes the step of each call of the reward function."""

    def right(completions: list[Any], answer: list[str], trainer_state: Any, **_: Any) -> list[float]:
        if rewarded is not None:
            rewarded.append(trainer_state.global_step)
        if death is not None:
            death.at("generate", trainer_state.global_step)
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        answers = [text.split("=")[-1].strip() for text in texts]
        return [float(given == wanted) for given, wanted in zip(answers, answer, strict=True)]

    rows = ROWS[:24]
    if case.conversational:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    config = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": case.steps,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 5e-4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **case.args,
        **args,
    }
    given: dict[str, Any] = {"callbacks": [death] if death else []}
    if case.lora:
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if case.evaluates:
        given["eval_dataset"] = Dataset.from_list(rows[:8])
    if case.conversational:
        given["processing_class"] = _with_template()
    if not stock:
        given["recovery"] = Recovery(log=said, prove_unchanged=True)
    return (trl.GRPOTrainer if stock else GRPOTrainer)(
        str(EXAMPLE / "model") if model is None else model,
        reward_funcs=right,
        args=trl.GRPOConfig(**config),
        train_dataset=Dataset.from_list(rows),
        **given,
    )


def _with_template() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(EXAMPLE / "model"), padding_side="left")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def bytes_of(trainer: Any) -> str:
    """A digest of the weights."""
    hasher = xxhash.xxh3_128()
    for name, tensor in trainer.model.state_dict().items():
        hasher.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def history_of(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, without the clock's figures."""
    return [
        {name: value for name, value in row.items() if not any(part in name for part in OF_THE_CLOCK)}
        for row in trainer.state.log_history
    ]


def main() -> None:
    # The processes of torchrun share a pipe: whole lines, or one's last lands in the middle of another's.
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("out")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--dies", default="", help="PLACE:STEP: SIGKILL there, by the process of rank 0")
    options = parser.parse_args()
    death = None
    if options.dies and os.environ.get("RANK", "0") == "0":
        place, step = options.dies.split(":")
        death = Death(place, int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
    case, out = CASES[options.case], Path(options.out)
    size = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    batch = case.args.get("per_device_train_batch_size", size)
    trainer = build(
        case, out, stock=options.stock, death=death, said=print, per_device_train_batch_size=batch
    )
    trainer.train(get_last_checkpoint(out) if options.stock and out.is_dir() else None)
    print(f"end {bytes_of(trainer)}")


if __name__ == "__main__":
    sys.exit(main())
