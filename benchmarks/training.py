"""How fast the MindSpore engine generates and learns, in how much memory, and how soon after a start.

    python benchmarks/training.py [--shape demo|smollm2-135m ...] [--samples N] [--repeats N] [--json FILE]

Each row is a process of its own: its peak memory is its own, and "first step" runs from the start
of the process to the end of the first generation and update, so it holds import and compilation.
Three starts for each shape: without kept graphs, with an empty folder for them, and with a full one.
Weights are random: a token takes as long whatever it says, and no stop token is set.

Left out: data, verifiers, checkpoints. See `benchmarks/checkpoint.py` for those.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rollforward.grpo.types import (
    EngineSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SamplingSettings,
    TokenBatch,
    TrainingBatch,
)

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "arithmetic" / "model" / "config.json"
SMOLLM2_135M = {
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
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Shape:
    """A model with the batch it is measured on."""

    prompt: int
    tokens: int
    samples: int
    micro_batch: int

    def settings(self, model: dict[str, Any], folder: str | None) -> EngineSettings:
        """Random weights: no folder to read them from."""
        return EngineSettings(
            model_config=model,
            policy_folder=None,
            reference_folder=None,
            prompt_length=self.prompt,
            samples_per_generation=self.samples,
            samples_per_micro_batch=self.micro_batch,
            sampling=SamplingSettings(max_tokens=self.tokens),
            objective=ObjectiveSettings(beta=0.01),
            optimizer=OptimizerSettings(),
            compile_cache_folder=folder,
        )


SHAPES = {
    "demo": Shape(prompt=6, tokens=11, samples=128, micro_batch=128),
    "smollm2-135m": Shape(prompt=32, tokens=64, samples=16, micro_batch=4),
}


def main() -> None:
    """Measure in fresh processes, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--samples", type=int, help="completions for each step; default: as the shape says")
    parser.add_argument("--micro_batch", type=int, help="rows of one backward pass")
    parser.add_argument("--repeats", type=int, default=3, help="steps timed after the first; the best counts")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--measure", nargs=3, metavar=("SHAPE", "FOLDER", "STARTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, folder, started = args.measure
        changes = {"samples": args.samples, "micro_batch": args.micro_batch}
        shape = replace(SHAPES[name], **{key: value for key, value in changes.items() if value})
        print(json.dumps(measure(name, shape, folder or None, float(started), args.repeats)))
        return
    rows = []
    for name in args.shape or list(SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            for graphs, path in (("not kept", ""), ("kept, first start", folder), ("kept, restart", folder)):
                rows.append({"shape": name, "graphs": graphs, **in_a_process(name, path, args)})
                print(line(rows[-1]) if len(rows) > 1 else f"{HEADER}\n{line(rows[0])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def in_a_process(name: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    options = [f"--repeats={args.repeats}"]
    options += [f"--samples={args.samples}"] if args.samples else []
    options += [f"--micro_batch={args.micro_batch}"] if args.micro_batch else []
    command = [sys.executable, __file__, *options, "--measure", name, folder, repr(time.time())]
    environment = {"GLOG_v": "3", **os.environ}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, shape: Shape, folder: str | None, started: float, repeats: int) -> dict[str, Any]:
    """One start: seconds to the first step, the best of the repeats, and the peak memory.

    An update is the engine's alone; the reference's log-probabilities are computed before it.
    """
    from rollforward.engines.mindspore.engine import create

    model = json.loads(DEMO_MODEL.read_bytes()) if name == "demo" else SMOLLM2_135M
    engine = create(shape.settings(model, folder))
    source = np.random.Generator(np.random.Philox(key=1))
    policy = engine.tensors()["policy_model"]
    for array in policy.values():
        # Norms and biases too: what the numbers are does not matter, that they are no zeros does.
        array[...] = source.standard_normal(array.shape, dtype=np.float32) * np.float32(0.02)
    engine.sync_reference()
    rows = shape.samples
    ids = source.integers(0, model["vocab_size"], (rows, shape.prompt)).astype(np.int32)
    mask = np.ones(ids.shape, dtype=np.bool_)
    uniforms = source.random((rows, shape.tokens), dtype=np.float32)

    def generate() -> TokenBatch:
        made = engine.generate(ids, mask, uniforms)
        return TokenBatch(
            prompt_ids=ids,
            prompt_mask=mask,
            completion_ids=made.completion_ids,
            completion_mask=np.arange(shape.tokens) < made.lengths[:, None],
        )

    tokens = generate()
    batch = TrainingBatch(
        tokens=tokens,
        advantages=np.where(np.arange(rows) % 2, 1, -1).astype(np.float32),
        token_weights=np.full((rows, shape.tokens), 1 / (rows * shape.tokens), dtype=np.float32),
        reference_logprobs=engine.reference_logprobs(tokens),
        old_logprobs=None,
    )

    def update() -> None:
        engine.update(batch, 1e-6)

    update()
    first_step = time.time() - started
    generating, learning = best(generate, repeats), best(update, repeats)
    return {
        "parameters": sum(array.size for array in policy.values()),
        "samples": rows,
        "first_step_s": first_step,
        "token_step_s": generating / shape.tokens,
        "generated_tokens_per_s": rows * shape.tokens / generating,
        "update_s": learning,
        "updated_tokens_per_s": rows * (shape.prompt + shape.tokens) / learning,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def best(action: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several runs: other work on the machine only ever adds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


COLUMNS = (
    "model",
    "graphs",
    "first step s",
    "ms/token step",
    "gen tok/s",
    "update s",
    "upd tok/s",
    "peak GB",
)
HEADER = "{:<13} {:<18} {:>12} {:>14} {:>10} {:>9} {:>10} {:>8}".format(*COLUMNS)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    speeds = (
        f"{row['generated_tokens_per_s']:>10.0f} {row['update_s']:>9.2f} {row['updated_tokens_per_s']:>10.0f}"
    )
    start = f"{row['first_step_s']:>12.1f} {row['token_step_s'] * 1e3:>14.1f}"
    return f"{row['shape']:<13} {row['graphs']:<18} {start} {speeds} {row['peak_memory_gb']:>8.2f}"


if __name__ == "__main__":
    main()
