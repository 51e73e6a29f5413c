"""What update and reference cost where completions are shorter than their limit, with and without the ladder.

    python benchmarks/lengths.py [--shape smollm2-135m|demo] [--limit N] [--mean N] [--threads N]

Two processes learn from the same batches, taking turns: one as `grpo.packing` has it, the other with every
sample in a row of its own that is as wide as the limits. The times are of the engine alone: reference
log-probabilities, then the update. Each step is done twice, since the first time may compile; what that takes
longer is told apart. Lengths are drawn from a geometric distribution of the given mean and cut off at the
limit, the same in both. Weights are random.

A token is one of a completion: neither prompts nor padding count.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from training import DEMO_MODEL, SHAPES, SMOLLM2_135M, Shape

from rollforward.grpo.types import TokenBatch, TrainingBatch

WAYS = ("packed", "one width")


def main() -> None:
    """Measure both in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of every prompt")
    parser.add_argument("--limit", type=int, default=128, help="max_tokens")
    parser.add_argument("--mean", type=float, help="tokens of a completion; default: a quarter of the limit")
    parser.add_argument("--samples", type=int, default=8, help="of a step")
    parser.add_argument("--micro_batch", type=int, default=4, help="rows of one backward pass")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of both")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.mean = args.mean or args.limit / 4
    if args.measure:
        measure(args)
        return
    found = in_turns(args)
    print(f"{'':<12}{'tokens/s':>10}{'s a step':>10}{'compiling s':>13}{'shapes':>8}{'peak GB':>9}")
    for way, rows in found.items():
        tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
        first = sum(row["first_seconds"] - row["seconds"] for row in rows)
        print(
            f"{way:<12}{tokens / seconds:>10.1f}{seconds / len(rows):>10.2f}{first:>13.1f}"
            f"{rows[-1]['shapes']:>8}{rows[-1]['peak_gb']:>9.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


def in_turns(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """One process each, told one after the other to do its next step."""
    environment = {"GLOG_v": "3", **os.environ}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    given = ("shape", "prompt", "limit", "mean", "samples", "micro_batch", "steps")
    options = [f"--{name}={getattr(args, name)}" for name in given]
    workers = {
        way: subprocess.Popen(
            [sys.executable, __file__, *options, "--measure", way],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in WAYS
    }
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.steps):
        for way, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise SystemExit(f"{way}: ended with {worker.wait()}")
            found[way].append(json.loads(line))
    for worker in workers.values():
        worker.communicate()
    return found


def measure(args: argparse.Namespace) -> None:
    """A step for each line of standard input: twice, since the first may compile."""
    from rollforward.engines.mindspore.engine import create
    from rollforward.grpo import packing

    if args.measure == "one width":
        packing.Ladder.of = one_width
    model = json.loads(DEMO_MODEL.read_bytes()) if args.shape == "demo" else SMOLLM2_135M
    shape = Shape(prompt=args.prompt, tokens=args.limit, samples=args.samples, micro_batch=args.micro_batch)
    engine = create(shape.settings(model, None))
    source = np.random.Generator(np.random.Philox(key=1))
    for array in engine.tensors()["policy_model"].values():
        array[...] = source.standard_normal(array.shape, dtype=np.float32) * np.float32(0.02)
    engine.sync_reference()
    for _ in sys.stdin:
        tokens = batch(args, model["vocab_size"], source)
        first = seconds_of(engine, tokens)
        row = {
            "tokens": int(tokens.completion_mask.sum()),
            "first_seconds": first,
            "seconds": seconds_of(engine, tokens),
            "shapes": sum(len(kind.made) for kind in engine.graphs.kinds),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        print(json.dumps(row), flush=True)


def one_width(*, prompt_length: int, max_tokens: int, samples: int, even: int, alone: bool = True) -> Any:
    """Every sample in a row of its own, as wide as the limits."""
    from rollforward.grpo.packing import Ladder

    longest = prompt_length + max_tokens - 1
    return Ladder(widths=(longest,), columns=samples * longest, even=even, alone=alone)


def batch(args: argparse.Namespace, vocabulary: int, source: np.random.Generator) -> TokenBatch:
    """Prompts of one length; completions of random ones."""
    rows = args.samples
    lengths = np.minimum(source.geometric(1 / args.mean, rows), args.limit)
    return TokenBatch(
        prompt_ids=source.integers(0, vocabulary, (rows, args.prompt)).astype(np.int32),
        prompt_mask=np.ones((rows, args.prompt), np.bool_),
        completion_ids=source.integers(0, vocabulary, (rows, args.limit)).astype(np.int32),
        completion_mask=np.arange(args.limit) < lengths[:, None],
    )


def seconds_of(engine: Any, tokens: TokenBatch) -> float:
    """Of reference and update."""
    rows, mask = len(tokens.prompt_ids), tokens.completion_mask
    start = time.perf_counter()
    made = TrainingBatch(
        tokens=tokens,
        advantages=np.where(np.arange(rows) % 2, 1, -1).astype(np.float32),
        token_weights=(mask / mask.sum()).astype(np.float32),
        reference_logprobs=engine.reference_logprobs(tokens),
        old_logprobs=None,
    )
    engine.update(made, 1e-6)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
