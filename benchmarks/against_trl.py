"""GRPO steps of TRL and of Rollforward side by side: python benchmarks/against_trl.py --trl PYTHON

`PYTHON` is the interpreter of an environment with TRL. Both trainers learn the same model from the same
prompts, in processes of their own that take turns, each doing a step when told. Random weights, so how long
the completions are is forced: the same lengths on both sides, ends drawn by the seed.

    full       every completion is as long as `max_tokens`: nothing is padding
    quarter    lengths are exponential with a mean of a quarter of it, cut off at it
    tokens/s   completion tokens over the seconds of a step, of the fastest round: other work only adds
    ratio      Rollforward's to TRL's. Targets: 1.3 where nothing is padding, 2.0 at a quarter of 512
    limit      what the machine could do at most: every weight read once for each decoding step, at the
               memory's speed, or the products of that step, at that of matrix multiplication, whichever takes
               longer; for the rest the products; attention is not counted. Both speeds by NumPy, in this run

TRL generates with transformers and learns in micro-batches of `--micro_batch` samples, without recomputing
activations. Ours is `grpo.trainer` with the MindSpore engine; its journal and checkpoints are left out here,
as TRL's are: `overhead.py` says what they cost.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollforward.models.config import ModelConfig
from rollforward.models.shapes import parameter_shapes

HERE = Path(__file__).resolve().parent
TRAINERS = {"rollforward": "against_trl_ours.py", "trl": "against_trl_theirs.py"}
TARGETS = {("full", 24): 1.3, ("full", 128): 1.3, ("full", 512): 1.3, ("quarter", 512): 2.0}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
MODELS = {
    "26m": LLAMA
    | {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "smollm2": LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}

Record = dict[str, Any]


def main() -> None:
    """Measure in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", type=Path, required=True, help="Python of an environment with TRL")
    parser.add_argument("--model", choices=MODELS, default="26m")
    parser.add_argument("--limits", type=int, nargs="+", default=[24, 128, 512], help="values of max_tokens")
    parser.add_argument("--cases", choices=["full", "quarter"], nargs="+", default=["full", "quarter"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=8, help="completions of a step, all of one prompt")
    parser.add_argument("--micro_batch", type=int, default=4, help="samples of one backward pass")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of the prompt")
    parser.add_argument("--beta", type=float, default=0.01, help="0: without a reference model")
    parser.add_argument("--rounds", type=int, default=3, help="steps timed, after one that is not")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    rows: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="against-trl-") as name:
        folder = Path(name)
        write_model(folder, MODELS[options.model], options)
        for threads in options.threads:
            machine: Record = {}
            for limit in options.limits:
                # Again and again: the best counts, and other work may slow down one or the other.
                for name, speed in in_process(
                    threads, [sys.executable, str(HERE / "machine_speed.py")]
                ).items():
                    machine[name] = max(speed, machine.get(name, 0.0))
                print(told(threads, machine), flush=True)
                rows += measure(folder, threads, limit, options, machine)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def write_model(folder: Path, config: Record, options: argparse.Namespace) -> None:
    """Random weights as a Hugging Face folder, with a tokenizer of words `w3`, `w4`, ...; and the prompts."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    source = np.random.default_rng(options.seed)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    weights = {
        name: np.ones(shape, np.float32)
        if "norm" in name
        else source.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        for name, shape in parameter_shapes(ModelConfig.parse(config)).items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    words = ["<eos>", "<pad>", "<unk>", *(f"w{index}" for index in range(3, config["vocab_size"]))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(model / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(special | kind))
    prompts = source.integers(3, config["vocab_size"], (options.rounds + 1, options.prompt))
    (folder / "prompts.json").write_text(json.dumps(prompts.tolist()))


def lengths_of(case: str, limit: int, options: argparse.Namespace) -> list[int]:
    """How long the completions of every step of a case are."""
    if case == "full":
        return [limit] * options.samples
    drawn = np.random.default_rng((options.seed, limit)).exponential(limit / 4, options.samples)
    return np.clip(np.ceil(drawn), 1, limit).astype(int).tolist()


def measure(
    folder: Path, threads: int, limit: int, options: argparse.Namespace, machine: Record
) -> list[Record]:
    """Both trainers at one limit: a row for each case."""
    task = {
        "folder": str(folder),
        "max_tokens": limit,
        "steps": len(options.cases) * (options.rounds + 1),
        **{name: getattr(options, name) for name in ("samples", "micro_batch", "prompt", "beta", "seed")},
    }
    python = {"rollforward": sys.executable, "trl": str(options.trl)}
    workers = {
        name: Worker(threads, [python[name], str(HERE / script), json.dumps(task | {"threads": threads})])
        for name, script in TRAINERS.items()
    }
    rows = []
    try:
        for case in options.cases:
            lengths = lengths_of(case, limit, options)
            found: dict[str, list[Record]] = {name: [] for name in workers}
            for _ in range(options.rounds + 1):
                for name, worker in workers.items():
                    found[name].append(worker.step(lengths))
            rows.append(row(case, limit, threads, options, machine, found))
            print(f"{HEADER}\n{line(rows[-1])}" if len(rows) == 1 else line(rows[-1]), flush=True)
    finally:
        for worker in workers.values():
            worker.end()
    return rows


class Worker:
    """A trainer in a process of its own, which does a step when it is told to."""

    def __init__(self, threads: int, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            pinned(threads, command),
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self, lengths: list[int]) -> Record:
        """Seconds of a step with completions of these lengths, and of its parts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(lengths) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a trainer ended with {self._process.wait()}; see above")
        record: Record = json.loads(answer)
        if sorted(record["lengths"]) != sorted(lengths):
            raise SystemExit(f"completions of {record['lengths']} tokens instead of {lengths}")
        return record

    def end(self) -> None:
        """The trainer ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def pinned(threads: int, command: Sequence[str]) -> list[str]:
    """On the first cores, as many as threads."""
    return ["taskset", "-c", f"0-{threads - 1}", *command]


def environment(threads: int) -> dict[str, str]:
    """The same number of threads for everybody."""
    count = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {"GLOG_v": "3", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, **count}


def in_process(threads: int, command: Sequence[str]) -> Record:
    """What a program prints."""
    done = subprocess.run(
        pinned(threads, command), env=environment(threads), stdout=subprocess.PIPE, text=True, check=True
    )
    found: Record = json.loads(done.stdout)
    return found


def least_seconds(lengths: list[int], options: argparse.Namespace, machine: Record) -> float:
    """What a step takes at least on this machine; see the top."""
    shapes = parameter_shapes(ModelConfig.parse(MODELS[options.model]))
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    products = 2 * weights / machine["operations_per_second"]
    reading = 4 * weights / machine["bytes_per_second"]
    decoding = sum(
        max(reading, products * sum(length > step for length in lengths)) for step in range(max(lengths))
    )
    seen = sum(length + options.prompt for length in lengths)
    passes = 3 + (1 if options.beta else 0)
    return decoding + products * options.prompt + passes * products * seen


def row(
    case: str,
    limit: int,
    threads: int,
    options: argparse.Namespace,
    machine: Record,
    found: dict[str, list[Record]],
) -> Record:
    """The figures of one case; the first step of each trainer is not counted."""
    lengths = lengths_of(case, limit, options)
    tokens = sum(lengths)
    best = {name: min(steps[1:], key=lambda step: step["seconds"]) for name, steps in found.items()}
    speed = {name: tokens / step["seconds"] for name, step in best.items()}
    return {
        "case": case,
        "max_tokens": limit,
        "threads": threads,
        "lengths": lengths,
        "tokens_per_second": speed,
        "ratio": speed["rollforward"] / speed["trl"],
        "target": TARGETS.get((case, limit)),
        "generation_seconds": {name: step["generation"] for name, step in best.items()},
        "learning_seconds": {name: step["seconds"] - step["generation"] for name, step in best.items()},
        "machine": dict(machine),
        "machine_tokens_per_second": tokens / least_seconds(lengths, options, machine),
        "rounds": {name: [step["seconds"] for step in steps] for name, steps in found.items()},
    }


def told(threads: int, machine: Record) -> str:
    """The machine in a line."""
    operations, read = machine["operations_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    return f"{threads} thread{'s' * (threads > 1)}: {operations:.0f} GFLOP/s, memory {read:.1f} GB/s"


HEADER = (
    f"{'threads':>7} {'limit':>6} {'case':<8} {'tokens':>7} {'ours tok/s':>11} {'TRL tok/s':>10} "
    f"{'ratio':>6} {'target':>7} {'ours gen+learn s':>17} {'TRL gen+learn s':>17} "
    f"{'limit tok/s':>12} {'ours':>5} {'TRL':>5}"
)


def line(row: Record) -> str:
    """A row of the table."""
    speed, limit = row["tokens_per_second"], row["machine_tokens_per_second"]
    parts = {
        name: f"{row['generation_seconds'][name]:.2f} + {row['learning_seconds'][name]:.2f}" for name in speed
    }
    return (
        f"{row['threads']:>7} {row['max_tokens']:>6} {row['case']:<8} {sum(row['lengths']):>7} "
        f"{speed['rollforward']:>11.1f} {speed['trl']:>10.1f} {row['ratio']:>6.2f} {row['target'] or '-':>7} "
        f"{parts['rollforward']:>17} {parts['trl']:>17} {limit:>12.0f} "
        f"{speed['rollforward'] / limit:>5.0%} {speed['trl'] / limit:>5.0%}"
    )


if __name__ == "__main__":
    main()
