"""TRL's side of `against_trl.py`: a step for each line of standard input. Needs nothing of Rollforward."""

import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

EOS = 0


def main() -> None:
    """Read lengths, do a step, print what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    model = str(Path(task["folder"], "model"))
    prompts = json.loads(Path(task["folder"], "prompts.json").read_text())
    texts = [" ".join(f"w{token}" for token in prompts[step % len(prompts)]) for step in range(task["steps"])]
    forced = ForcedLengths()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=forced.reward,
            args=config(task, folder),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            callbacks=[OnDemand(forced, answers)],
        )
        trainer.model.generate = functools.partial(forced.generate, trainer.model.generate)
        trainer.train()


def config(task: dict[str, Any], folder: str) -> trl.GRPOConfig:
    """As on the other side. Activations are kept, not computed again."""
    parts = task["samples"] // task["micro_batch"]
    return trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=task["micro_batch"],
        gradient_accumulation_steps=parts,
        steps_per_generation=parts,
        num_generations=task["samples"],
        max_completion_length=task["max_tokens"],
        max_steps=task["steps"],
        beta=task["beta"],
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        seed=task["seed"],
    )


class ForcedLengths(transformers.LogitsProcessor):
    """Rows end when they are told to, and not before: two writes into the scores of each step."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.made: list[int] = []
        self.seconds = 0.0
        self._begin = 0

    def generate(self, original: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        """The model's own, with this."""
        self._begin = input_ids.shape[1]
        start = time.perf_counter()
        found = original(input_ids=input_ids, logits_processor=[self], **given)
        self.seconds = time.perf_counter() - start
        return found

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """float32 [B, V], changed in place."""
        token = input_ids.shape[1] - self._begin + 1
        scores[:, EOS] = -torch.inf
        for row, length in enumerate(self.lengths):
            if length == token:
                scores[row] = -torch.inf
                scores[row, EOS] = 0
        return scores

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Every other completion is good, so that there is something to learn."""
        self.made = [len(ids) for ids in completion_ids]
        return [float(row % 2) for row in range(len(completion_ids))]


class OnDemand(transformers.TrainerCallback):
    """Waits before each step until it is asked for, and answers after it."""

    def __init__(self, forced: ForcedLengths, answers: Any) -> None:
        self._forced, self._answers = forced, answers
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A line with the lengths; none ends the program."""
        told = sys.stdin.readline()
        if not told:
            raise SystemExit
        self._forced.lengths = json.loads(told)
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """What the step took."""
        seconds = time.perf_counter() - self._start
        record = {"seconds": seconds, "generation": self._forced.seconds, "lengths": self._forced.made}
        print(json.dumps(record), file=self._answers, flush=True)


if __name__ == "__main__":
    main()
