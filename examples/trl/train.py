"""GRPO with TRL on the problems of examples/arithmetic; kill it at any moment: python train.py RUN

`--stock` trains with TRL's own trainer instead, and resumes as TRL does. Further options are arguments of
`GRPOConfig`, as NAME=VALUE.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from trl import GRPOConfig

EXAMPLE = Path(__file__).parents[1] / "arithmetic"


def right(completions, answer, **_):
    """1 for the right number at the end, 0 for any other."""
    given = [text.split("=")[-1].strip() for text in completions]
    return [float(number == wanted) for number, wanted in zip(given, answer, strict=True)]


def main():
    """Train, from wherever the run stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("arguments", nargs="*", help="NAME=VALUE of GRPOConfig")
    parser.add_argument("--stock", action="store_true", help="TRL's own trainer")
    parser.add_argument("--resume", action="store_true", help="with --stock: resume_from_checkpoint=True")
    parser.add_argument("--lora", action="store_true", help="train an adapter of rank 4")
    options = parser.parse_args()
    if options.stock:
        from trl import GRPOTrainer
    else:
        from rollforward.trl import GRPOTrainer

    given = dict(argument.split("=", 1) for argument in options.arguments)
    config = {
        "output_dir": options.run,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 11,
        "max_steps": 40,
        "save_steps": 5,
        "logging_steps": 1,
        "learning_rate": 5e-4,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
    } | {name: json.loads(value) for name, value in given.items()}
    lora = {}
    if options.lora:
        from peft import LoraConfig

        lora["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    lines = (EXAMPLE / "train.jsonl").read_text().splitlines()[:60]
    trainer = GRPOTrainer(
        str(EXAMPLE / "model"),
        reward_funcs=right,
        args=GRPOConfig(**config),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        **lora,
    )
    trainer.train(resume_from_checkpoint=True if options.resume else None)


if __name__ == "__main__":
    main()
