"""Supervised fine-tuning with transformers' Trainer, for comparison: python finetune.py RUN [--resume]

Nothing of Rollforward is in it: `rollforward prove` shows how it resumes.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

EXAMPLE = Path(__file__).parents[1] / "arithmetic"


def main():
    """Train, from the newest checkpoint if told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("arguments", nargs="*", help="NAME=VALUE of TrainingArguments")
    parser.add_argument("--resume", action="store_true", help="resume_from_checkpoint=True")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "model")

    def tokens(row):
        ids = tokenizer(f"{row['prompt']}{row['answer']}")["input_ids"][:8]
        ids += [tokenizer.pad_token_id] * (8 - len(ids))
        return {"input_ids": ids, "labels": ids}

    lines = (EXAMPLE / "train.jsonl").read_text().splitlines()[:120]
    data = Dataset.from_list([json.loads(line) for line in lines])
    given = dict(argument.split("=", 1) for argument in options.arguments)
    config = {
        "output_dir": options.run,
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "save_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | {name: json.loads(value) for name, value in given.items()}
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(EXAMPLE / "model"),
        TrainingArguments(**config),
        train_dataset=data.map(tokens, remove_columns=data.column_names),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=True if options.resume else None)


if __name__ == "__main__":
    main()
