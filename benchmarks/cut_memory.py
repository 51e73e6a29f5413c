"""What memory a worker of a cut model needs, measured, beside what `doctor` computes before the start.

    python benchmarks/cut_memory.py [--cuts 1 2 3] [--layers N] [--rows N] [--repeats N] [--json FILE]

The widths, the vocabulary and the depth of SmolLM2-135M, but 12 query and 6 key-value heads of 48 in place
of 9 and 3 of 64, so that the model can be cut over two workers, too. Weights are random. A step: completions
of 64 tokens to prompts of 32 are generated, and the same rows are learnt from in one micro-batch. Each row of
the table is a start of its own, without kept graphs: its peak is its own, and holds what compiling needs. Of
the workers, the one that needs most counts. They share the cores of this machine, and its seconds.

Left out: what saving copies.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from training import SMOLLM2_135M
from workers import best, peak

from rollforward.engines.mindspore.package import MindSpore, free_port
from rollforward.grpo.types import (
    EngineSettings,
    LoraSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SamplingSettings,
    TokenBatch,
    TrainingBatch,
)
from rollforward.models.config import ModelConfig
from rollforward.models.lora import MODULES
from rollforward.models.shapes import parameter_shapes
from rollforward.models.weights import SINGLE
from rollforward.storage import LocalStorage
from rollforward.store.tensorfile import ArraySource, write_tensors

PROMPT, TOKENS = 32, 64
NONE = "-"
"""In place of a folder: msrun loses arguments that are empty."""
HEADER = (
    "| trained | recompute | T | measured, GB | computed, GB | framework, GB | update, s | token, ms |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Measure in fresh processes, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 2, 3], help="over how many workers")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="completions of a step")
    parser.add_argument("--repeats", type=int, default=2, help="steps timed after the first; the best counts")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--measure", nargs=2, metavar=("BASE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args, *args.measure)
        return
    rows = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args.layers)
        for base, recompute, cut in product((NONE, folder), (False, True), args.cuts):
            rows.append({"cut": cut, "lora": base != NONE, "recompute": recompute})
            rows[-1] |= under_msrun(args, cut, base, recompute=recompute)
            print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def model(layers: int) -> dict[str, Any]:
    """A parsed `config.json`."""
    return SMOLLM2_135M | {"num_attention_heads": 12, "num_key_value_heads": 6, "num_hidden_layers": layers}


def write_base(folder: Path, layers: int) -> None:
    """For adapters to stand beside."""
    source = np.random.default_rng(1)
    shapes = parameter_shapes(ModelConfig.parse(model(layers)))
    weights = {name: source.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    write_tensors(LocalStorage(folder), SINGLE, {name: ArraySource(each) for name, each in weights.items()})


def under_msrun(args: argparse.Namespace, cut: int, base: str, *, recompute: bool) -> dict[str, Any]:
    """`measure` by so many workers; the worst of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if cut > 1:
            command += ["-P", "-m", "mindspore.parallel.cluster.run", "--join=True", f"--log_dir={folder}"]
            command += [f"--worker_num={cut}", f"--local_worker_num={cut}", f"--master_port={free_port()}"]
        command += [__file__, f"--layers={args.layers}", f"--rows={args.rows}", f"--repeats={args.repeats}"]
        command += ["--measure", base, f"{folder}/found.json"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(
            [*command, "--recompute"] if recompute else command,
            env={"GLOG_v": "3", **os.environ, "PATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,  # MindSpore sometimes crashes in its exit handlers
        )
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_bytes())
        return found


def measure(args: argparse.Namespace, base: str, out: str) -> None:
    """One row, as a worker of `msrun`."""
    from rollforward.engines.mindspore.engine import create
    from rollforward.engines.mindspore.parallel import connect, serve_scheduler

    if os.environ.get("MS_ROLE") == "MS_SCHED":
        serve_scheduler()
    group = connect()
    framework = peak()
    settings = EngineSettings(
        model_config=model(args.layers),
        policy_folder=None,
        reference_folder=None,
        prompt_length=PROMPT,
        samples_per_generation=args.rows,
        samples_per_micro_batch=args.rows,
        sampling=SamplingSettings(max_tokens=TOKENS),
        objective=ObjectiveSettings(beta=0.01),
        optimizer=OptimizerSettings(),
        model_parallel=group.world_size,
        recompute=args.recompute,
        lora=LoraSettings(rank=8, alpha=16, target_modules=MODULES) if base != NONE else None,
        base_folder=base if base != NONE else None,
    )
    engine = create(settings, group)
    for array in engine.tensors()["policy_model"].values():
        # What is whole on every worker must be the same there.
        array[...] = np.random.default_rng(1).standard_normal(array.shape, dtype=np.float32) * np.float32(
            0.02
        )
    if base == NONE:
        engine.sync_reference()
    source = np.random.default_rng(2)
    ids = source.integers(0, SMOLLM2_135M["vocab_size"], (args.rows, PROMPT)).astype(np.int32)
    mask = np.ones(ids.shape, dtype=np.bool_)
    uniforms = source.random((args.rows, TOKENS), dtype=np.float32)

    def generate() -> TokenBatch:
        made = engine.generate(ids, mask, uniforms)
        return TokenBatch(
            prompt_ids=ids,
            prompt_mask=mask,
            completion_ids=made.completion_ids,
            completion_mask=np.arange(TOKENS) < made.lengths[:, None],
        )

    tokens = generate()
    batch = TrainingBatch(
        tokens=tokens,
        advantages=np.where(np.arange(args.rows) % 2, 1, -1).astype(np.float32),
        token_weights=np.full((args.rows, TOKENS), 1 / (args.rows * TOKENS), dtype=np.float32),
        reference_logprobs=engine.reference_logprobs(tokens),
        old_logprobs=None,
    )
    engine.update(batch, 1e-6)
    found = {
        "update_s": best(lambda: engine.update(batch, 1e-6), args.repeats, group.all_gather),
        "token_s": best(generate, args.repeats, group.all_gather) / TOKENS,
        "framework_gb": framework / 1e9,
        "peak_gb": peak() / 1e9,
        "computed_gb": MindSpore().memory_needed(settings, group.world_size).total / 1e9,
    }
    everyone = group.all_gather(found)
    if group.rank == 0:
        Path(out).write_text(json.dumps({name: max(each[name] for each in everyone) for name in found}))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    trained, recompute = "adapters" if row["lora"] else "all", "yes" if row["recompute"] else "no"
    sizes = f"{row['peak_gb']:.2f} | {row['computed_gb']:.2f} | {row['framework_gb']:.2f}"
    times = f"{row['update_s']:.1f} | {row['token_s'] * 1e3:.0f}"
    return f"| {trained} | {recompute} | {row['cut']} | {sizes} | {times} |"


if __name__ == "__main__":
    main()
