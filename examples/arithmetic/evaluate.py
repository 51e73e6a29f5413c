"""How many of the held-out problems a policy gets right: one answer each, greedily, and several drawn.

    python examples/arithmetic/evaluate.py examples/arithmetic/model      a Hugging Face folder
    python examples/arithmetic/evaluate.py output/save_ckpt               a run: its newest checkpoint

Prints one line of JSON. Drawn answers come from a fixed seed at temperature 1, the training's own.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("GLOG_v", "3")
from rollforward.data.dataset import load_dataset
from rollforward.data.tokenizer import Tokenizer
from rollforward.engines.mindspore.engine import create
from rollforward.grpo.trainer import left_pad
from rollforward.grpo.types import (
    EngineSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Prompt,
    SamplingSettings,
)
from rollforward.storage import LocalStorage
from rollforward.store import find, read_attachments, read_tensors
from rollforward.verifiers import resolve, score

HERE = Path(__file__).resolve().parent
PROMPT_LENGTH, MAX_TOKENS = 6, 11


@dataclass(frozen=True)
class Policy:
    """A model folder, and the weights that go in place of its own where it is a run's."""

    folder: Path
    weights: Mapping[str, NDArray[Any]] | None


def open_policy(folder: Path, scratch: Path) -> Policy:
    """A Hugging Face folder as it is; of a run's folder, the newest checkpoint that is whole."""
    if not (folder / "commits").is_dir():
        return Policy(folder, None)
    storage = LocalStorage(folder)
    manifest = find(storage).manifest
    for name, content in read_attachments(storage, manifest).items():
        (scratch / name).write_bytes(content)
    return Policy(
        scratch, {name: array for _, name, array in read_tensors(storage, manifest, ["policy_model"])}
    )


def complete(policy: Policy, prompts: list[Prompt], tokenizer: Tokenizer, temperature: float) -> list[str]:
    """One completion of each prompt."""
    settings = EngineSettings(
        model_config=json.loads((policy.folder / "config.json").read_text(encoding="utf-8")),
        policy_folder=str(policy.folder) if policy.weights is None else None,
        reference_folder=None,
        prompt_length=PROMPT_LENGTH,
        samples_per_generation=len(prompts),
        samples_per_micro_batch=1,
        sampling=SamplingSettings(
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            stop_token_ids=tokenizer.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
        ),
        objective=ObjectiveSettings(),
        optimizer=OptimizerSettings(),
    )
    engine = create(settings)
    for name, array in (policy.weights or {}).items():
        engine.load("policy_model", name, array)
    ids, mask = left_pad(prompts, PROMPT_LENGTH, tokenizer.pad_token_id)
    uniforms = np.random.Generator(np.random.Philox(0)).random((len(prompts), MAX_TOKENS), dtype=np.float32)
    generation = engine.generate(ids, mask, uniforms)
    return [
        tokenizer.decode(row[:length].tolist())
        for row, length in zip(generation.completion_ids, generation.lengths, strict=True)
    ]


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=Path, default=HERE / "heldout.jsonl", help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, default=8, help="answers drawn for each (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        policy = open_policy(options.folder, Path(scratch))
        tokenizer = Tokenizer(policy.folder)
        problems = load_dataset(str(options.problems), tokenizer, PROMPT_LENGTH)
        verifiers = resolve(["accuracy_reward"])
        found: dict[str, float] = {"problems": len(problems)}
        for name, temperature, samples in (("greedy", 0.0, 1), ("drawn", 1.0, options.samples)):
            prompts = [prompt for prompt in problems for _ in range(samples)]
            completions = complete(policy, prompts, tokenizer, temperature)
            found[f"{name}_right"] = round(float(score(verifiers, prompts, completions).mean()), 4)
            found[f"{name}_with_working"] = round(
                sum("=" in text for text in completions) / len(completions), 4
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
