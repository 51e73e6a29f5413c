"""Rollforward's side of `against_trl.py`: a step for each line of standard input."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollforward.engines.mindspore.engine import create
from rollforward.grpo.ports import Engine
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.schedule import LearningRate
from rollforward.grpo.trainer import Trainer, TrainerSettings
from rollforward.grpo.types import (
    Bools,
    EngineSettings,
    Floats,
    Generation,
    Ints,
    ObjectiveSettings,
    OptimizerSettings,
    Prompt,
    SamplingSettings,
)
from rollforward.position import Position

EOS, PAD = 0, 1
RATE = 1e-6


def main() -> None:
    """Read lengths, do a step, print what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.loads(sys.argv[1])
    forced, watch = ForcedLengths(engine_of(task)), Watch()
    trainer = trainer_of(task, forced, watch)
    for step, told in enumerate(sys.stdin):
        forced.lengths = json.loads(told)
        start = time.perf_counter()
        trainer.run(Position(0, step), Position(0, step + 1))
        seconds = time.perf_counter() - start
        record = {"seconds": seconds, "generation": watch.metrics["seconds/generate"], "lengths": forced.made}
        print(json.dumps(record), file=answers, flush=True)


class ForcedLengths:
    """An engine whose completions have given lengths.

    The uniform number 0 draws the first token of the vocabulary, which is the stop token; those from 0.5 on
    never do, as long as it is unlikely. What the engine does is the same.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lengths: list[int] = []
        self.made: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> Generation:
        """See `grpo.ports.Engine.generate`."""
        numbers = np.float32(0.5) + uniforms * np.float32(0.5)
        for row, length in enumerate(self.lengths):
            numbers[row, length - 1] = 0
        made = self._engine.generate(prompt_ids, prompt_mask, np.minimum(numbers, np.float32(1 - 2.0**-24)))
        self.made = made.lengths.tolist()
        return made


def engine_of(task: Mapping[str, Any]) -> Engine:
    """The MindSpore engine."""
    model = Path(task["folder"], "model")
    return create(
        EngineSettings(
            model_config=json.loads((model / "config.json").read_bytes()),
            policy_folder=str(model),
            reference_folder=str(model),
            prompt_length=task["prompt"],
            samples_per_generation=task["samples"],
            samples_per_micro_batch=task["micro_batch"],
            sampling=SamplingSettings(max_tokens=task["max_tokens"], stop_token_ids=(EOS,), pad_token_id=PAD),
            objective=ObjectiveSettings(beta=task["beta"]),
            optimizer=OptimizerSettings(),
        )
    )


def trainer_of(task: Mapping[str, Any], engine: Any, watch: "Watch") -> Trainer:
    """The trainer that `rollforward train` runs, without its journal and its checkpoints."""
    ids = json.loads(Path(task["folder"], "prompts.json").read_text())
    prompts = [
        Prompt(index=step, text="", token_ids=tuple(ids[step % len(ids)]), answer="")
        for step in range(task["steps"])
    ]
    return Trainer(
        engine=engine,
        schedule=PromptSchedule(prompts=prompts, seed=task["seed"], chunk_size=1, chunks_per_step=1),
        learning_rate=LearningRate(lr=RATE, min_lr=RATE, warmup_steps=0, decay_steps=0),
        score=every_other,
        decode=lambda ids: " ".join(f"w{token}" for token in ids),
        log=NoLog(),
        checkpoints=NoCheckpoints(),
        observer=watch,
        settings=TrainerSettings(
            seed=task["seed"],
            num_generations=task["samples"],
            num_iterations=1,
            prompt_length=task["prompt"],
            max_tokens=task["max_tokens"],
            pad_token_id=PAD,
            standardise_advantages=True,
            loss_aggregation="token_mean",
            verifier_names=("every other",),
            verifier_weights=(1.0,),
            ref_model_sync_steps=0,
            save_ckpt_interval=1 << 30,
        ),
    )


def every_other(_: Sequence[Prompt], completions: Sequence[str]) -> Floats:
    """Every other completion is good, so that there is something to learn."""
    return (np.arange(len(completions), dtype=np.float32) % 2)[:, None]


class Watch:
    """Keeps the figures of the last step."""

    metrics: Mapping[str, float]

    def phase(self, *_: Any) -> None:
        """Not of interest."""

    def step(self, _: Position, metrics: Mapping[str, float]) -> None:
        """See `grpo.ports.Observer`."""
        self.metrics = metrics


class NoLog:
    """Finds nothing, keeps nothing."""

    def find(self, *_: Any) -> None:
        """Nothing."""

    append = record = find


class NoCheckpoints:
    """Saves nothing."""

    def begin(self, *_: Any) -> None:
        """Nothing."""

    before_update = boundary = close = begin


if __name__ == "__main__":
    main()
