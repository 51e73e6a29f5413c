"""Train the base model: a small Qwen2 that has read many sums, a good part of them wrong.

It learns to continue `48+76=` as the corpus does (see problems.py), so it knows three ways to
answer and gives each its share. GRPO starts from there. The answers are drawn anew for each batch:
how often a problem is answered in which way is all that can be learnt.

The engine's own update does the training. With an advantage of 1, no KL and a single iteration, the
gradient of the GRPO loss is that of the mean negative log-probability of the given completions:

    d/dw -[exp(logp - stop(logp)) * 1]  =  -d logp/dw

Takes some minutes; `--steps` and `--seed` are there to try other models.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from make_tokenizer import VOCABULARY, write_tokenizer
from numpy.typing import NDArray
from problems import Problem, deal, written_by_hand
from safetensors.numpy import save_file

os.environ.setdefault("GLOG_v", "3")
from rollforward.engines.mindspore.engine import MindSporeEngine, create
from rollforward.engines.mindspore.model import Decoder, ModelConfig, initialise
from rollforward.grpo.types import (
    EngineSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SamplingSettings,
    TokenBatch,
    TrainingBatch,
)

HERE = Path(__file__).resolve().parent
PROMPT_LENGTH = 6
"""`99+99=`"""
MAX_TOKENS = 11
"""`180+18=198` and the end."""
ID = {token: index for index, token in enumerate(VOCABULARY)}
PAD, EOS = ID["<pad>"], ID["<eos>"]

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "float32",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long, and how fast."""

    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warm_up: int = 100
    final_share: float = 0.02
    """The rate falls along a cosine to this share of `learning_rate`."""
    seed: int = 1

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + np.cos(np.pi * step / self.steps))
        return float(self.learning_rate * min(1.0, (step + 1) / self.warm_up) * max(self.final_share, cosine))


def make_engine(recipe: Recipe) -> MindSporeEngine:
    """An engine with fresh weights."""
    settings = EngineSettings(
        model_config=CONFIG,
        policy_folder=None,
        reference_folder=None,
        prompt_length=PROMPT_LENGTH,
        samples_per_generation=recipe.batch_size,
        samples_per_micro_batch=recipe.batch_size,
        sampling=SamplingSettings(max_tokens=MAX_TOKENS, stop_token_ids=(EOS,), pad_token_id=PAD),
        objective=ObjectiveSettings(beta=0.0),
        optimizer=OptimizerSettings(adam_beta2=0.98, weight_decay=0.01, max_grad_norm=1.0),
    )
    engine = create(settings)
    fresh = Decoder(ModelConfig.parse(CONFIG))
    initialise(fresh, recipe.seed, CONFIG["initializer_range"])
    for name, parameter in fresh.named_parameters().items():
        engine.load("policy_model", name, parameter.asnumpy())
    return engine


def batch_of(problems: list[Problem], answers: list[str]) -> TrainingBatch:
    """Worked sums as completions that all deserve to be made likelier."""
    rows = len(problems)
    prompt_ids = np.full((rows, PROMPT_LENGTH), PAD, np.int32)
    completion_ids = np.full((rows, MAX_TOKENS), PAD, np.int32)
    for row, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        prompt = [ID[character] for character in problem.prompt]
        completion = [*(ID[character] for character in answer), EOS]
        prompt_ids[row, PROMPT_LENGTH - len(prompt) :] = prompt
        completion_ids[row, : len(completion)] = completion
    completion_mask = completion_ids != PAD
    return TrainingBatch(
        tokens=TokenBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_ids != PAD,
            completion_ids=completion_ids,
            completion_mask=completion_mask,
        ),
        advantages=np.ones(rows, np.float32),
        token_weights=(completion_mask / completion_mask.sum()).astype(np.float32),
        reference_logprobs=np.zeros((rows, MAX_TOKENS), np.float32),
        old_logprobs=None,
    )


def train(recipe: Recipe) -> dict[str, NDArray[np.float32]]:
    """The trained weights, by Hugging Face name."""
    engine, corpus = make_engine(recipe), deal().corpus
    random = np.random.Generator(np.random.Philox(recipe.seed))
    began, average = time.monotonic(), float("nan")
    for step in range(recipe.steps):
        problems = [corpus[index] for index in random.integers(len(corpus), size=recipe.batch_size)]
        batch = batch_of(problems, [written_by_hand(problem, random) for problem in problems])
        outcome = engine.update(batch, recipe.rate(step))
        loss = -float((outcome.logprobs * batch.token_weights).sum())
        average = loss if step == 0 else 0.98 * average + 0.02 * loss
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {average:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return {name: np.array(array) for name, array in engine.tensors()["policy_model"].items()}


def write_model(folder: Path, weights: dict[str, NDArray[np.float32]]) -> None:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "model", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=Recipe.batch_size, help="default: %(default)s")
    parser.add_argument(
        "--learning_rate", type=float, default=Recipe.learning_rate, help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    options = parser.parse_args()
    recipe = Recipe(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    print(f"{asdict(recipe)}")
    weights = train(recipe)
    write_model(options.out, weights)
    print(f"{options.out}: {sum(array.size for array in weights.values())} parameters")


if __name__ == "__main__":
    main()
