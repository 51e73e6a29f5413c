"""What surviving costs a TRL run: python benchmarks/trl_cost.py [--model small|135m] [--rounds 3]

TRL's own trainer and `rollforward.trl`'s train the same steps in turn, in one process: same weights, prompts
and random state, so the same tokens; a benchmark that found other losses would stop. Both log every step and
save every `--save_steps`; TRL's also without saving, which is what the others are compared with.

    step        seconds from the beginning of one optimizer step to that of the next, median of the rounds
    ratio       to TRL without saving, of the best rounds: what other processes do only adds
    cpu         CPU seconds a step of the whole process, writing in the background included, and their ratio:
                what other processes do hardly changes it
    waited      seconds a step inside `rollforward.trl`: journal, checkpoints, and their share of the step

small: the model of examples/arithmetic (0.3 M parameters). 135m: random weights in SmolLM2-135M's shape.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset

from rollforward.library import Run
from rollforward.trl import GRPOTrainer, Recovery

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
WAYS = ("TRL, not saving", "TRL", "rollforward.trl")
LEFT_OUT = 1
"""Steps at the beginning that are not counted."""


class Clock(transformers.TrainerCallback):
    """When each step began."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last one is over."""
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())


def main() -> None:
    """Measure in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["small", "135m"], default="small")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="trl-cost-") as folder:
        model = str(EXAMPLE / "model") if options.model == "small" else large_model(Path(folder, "model"))
        for number in range(options.rounds):
            for way in WAYS:
                out = Path(folder) / f"{number}_{WAYS.index(way)}"
                found[way].append(train(way, model, out, options))
                print(f"round {number + 1}: {way}: {found[way][-1]['step']:.3f} s a step", flush=True)
    if len({json.dumps(each["losses"]) for rounds in found.values() for each in rounds}) != 1:
        raise SystemExit("the trainers did not compute the same")
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def large_model(folder: Path) -> str:
    """SmolLM2-135M's shape, with random weights and the example's tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(EXAMPLE / "model").save_pretrained(folder)
    return str(folder)


def train(way: str, model: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one trainer."""
    clock, waited = Clock(), [0.0]
    small = options.model == "small"
    args = trl.GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=11 if small else 24,
        max_steps=options.steps,
        save_strategy="no" if way == WAYS[0] else "steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=1e-5,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
    )
    rows = [json.loads(line) for line in (EXAMPLE / "train.jsonl").read_text().splitlines()[:60]]
    given: dict[str, Any] = {
        "model": model,
        "reward_funcs": lambda completions, **_: [float(len(text) % 3) for text in completions],
        "args": args,
        "train_dataset": Dataset.from_list(rows),
        "callbacks": [clock],
    }
    if way == "rollforward.trl":
        trainer = GRPOTrainer(**given, recovery=Recovery(log=lambda _: None))
    else:
        trainer = trl.GRPOTrainer(**given)
    with waiting(waited, clock):
        trainer.train()
    times = clock.times[LEFT_OUT:]
    steps = [after - before for before, after in itertools.pairwise(times)][:-1]
    return {
        "step": statistics.fmean(steps),
        "cpu": (clock.cpu[-2] - clock.cpu[LEFT_OUT]) / len(steps),
        "waited": waited[0] / len(clock.times),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


@contextmanager
def waiting(waited: list[float], clock: Clock) -> Iterator[None]:
    """Add up the time in the library's calls, less what `once` spends in making; from the first step on."""
    names = ("once", "updating", "outcome", "metrics", "checkpoint")
    original = {name: getattr(Run, name) for name in names}
    inside = [0.0]

    def timed(call: Callable[[], Any], into: list[float]) -> Any:
        began = time.perf_counter()
        try:
            return call()
        finally:
            if clock.times:
                into[0] += time.perf_counter() - began

    def once(self: Run, step: Any, name: str, make: Callable[[], Any], **how: Any) -> Any:
        made = lambda: timed(make, inside)  # noqa: E731
        return timed(lambda: original["once"](self, step, name, made, **how), waited)

    @contextmanager
    def updating(self: Run, step: Any) -> Iterator[None]:
        block = original["updating"](self, step)
        timed(block.__enter__, waited)
        yield
        timed(lambda: block.__exit__(None, None, None), waited)

    def plainly(name: str) -> Callable[..., Any]:
        return lambda self, *given, **named: timed(lambda: original[name](self, *given, **named), waited)

    replaced = {"once": once, "updating": updating} | {name: plainly(name) for name in names[2:]}
    for name, function in replaced.items():
        setattr(Run, name, function)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(Run, name, function)
        waited[0] -= inside[0]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The figures side by side."""
    best = min(each["step"] for each in found[WAYS[0]])
    least = min(each["cpu"] for each in found[WAYS[0]])
    lines = ["| trainer | step | ratio | cpu | ratio | waited |", "|---|---|---|---|---|---|"]
    for way, rounds in found.items():
        steps = [each["step"] for each in rounds]
        waited = statistics.median(each["waited"] for each in rounds)
        share = f"{1000 * waited:.1f} ms, {waited / min(steps):.1%}" if way == "rollforward.trl" else ""
        cpu = min(each["cpu"] for each in rounds)
        cells = (
            f"{statistics.median(steps):.3f} s",
            f"{min(steps) / best:.3f}",
            f"{cpu:.3f} s",
            f"{cpu / least:.3f}",
        )
        lines.append(f"| {way} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
