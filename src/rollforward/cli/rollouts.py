"""`rollforward rollouts`: the prompts, completions and rewards of one step."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from rollforward.cli.arguments import Parser, count, position
from rollforward.cli.output import cell, print_json, print_line, warn
from rollforward.inspection.folder import open_run
from rollforward.inspection.rollouts import Sample, StepTexts, read_texts, worst

NAME = "rollouts"
SUMMARY = "read the prompts, completions and rewards of a step"
DESCRIPTION = """\
Read the rollouts of a step from a run's journal: each prompt, its completions, the reward of
each verifier, and what the updates of the step gave. The journal reaches back to the oldest kept
checkpoint. A step that is under way, or that a kill cut short, shows the chunks that are finished.

On a terminal it is text to read, elsewhere one line a completion, with tabs between: rank, chunk,
sample, number of the prompt, reward, tokens, stopped (or cut, at the greatest length), prompt,
completion; the two texts are JSON strings, so that a line stays a line.

A loop of one's own (open_run) has samples too if the JSON of what it made tells them, as that of
rollforward.trl does. Otherwise the arrays are listed that it made once: rank, number, name, name of the
array, dtype and shape; and what it gave as the outcome of the step, with its rank."""


def add_arguments(parser: Parser) -> None:
    """The options of `rollouts`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder (--save_checkpoint_dir)")
    parser.add_option("--step", metavar="0_37", type=position, required=True, help="which step: epoch_step")
    parser.add_option(
        "--worst", metavar="N", type=count, help="only the N completions with the lowest reward"
    )
    parser.add_option("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the rollouts."""
    step = read_texts(open_run(options.folder), options.step)
    samples = step.samples if options.worst is None else worst(step.samples, options.worst)
    if options.json:
        value = {
            "folder": options.folder,
            "position": str(step.position),
            "samples": [asdict(sample) for sample in samples],
            "updates": [asdict(outcome) for _, outcome in sorted(step.outcomes.items())],
            "problems": list(step.problems),
        }
        if step.made or step.numbers:
            value |= {
                "made": [asdict(made) for made in step.made],
                "outcome": {
                    str(rank): {n: v if math.isfinite(v) else repr(v) for n, v in numbers.items()}
                    for rank, numbers in step.numbers.items()
                },
            }
        print_json(value)
    elif (step.made or step.numbers) and not step.samples:
        for fields in _of_a_loop(step):
            print_line(*fields)
    elif sys.stdout.isatty():
        _text(step, samples)
    else:
        for sample in samples:
            print_line(*_fields(sample))
    for problem in step.problems:
        warn(problem)
    return 0


def _fields(sample: Sample) -> list[str]:
    numbers = (sample.rank, sample.chunk, sample.sample, sample.prompt_index)
    texts = (json.dumps(sample.prompt), json.dumps(sample.completion))
    ended = "stopped" if sample.stopped else "cut"
    return [*map(str, numbers), f"{sample.reward:.9g}", str(sample.tokens), ended, *texts]


def _of_a_loop(step: StepTexts) -> Iterator[tuple[str, ...]]:
    for made in step.made:
        where = (str(made.rank), str(made.chunk), _on_a_line(made.name))
        for name, what in made.arrays.items():
            yield (*where, _on_a_line(name), what)
        if made.info is not None:
            yield (*where, "info", json.dumps(made.info))
    for rank, numbers in step.numbers.items():
        yield str(rank), "outcome", *(f"{_on_a_line(name)} {value!r}" for name, value in numbers.items())


def _on_a_line(name: str) -> str:
    return json.dumps(name)[1:-1]


def _text(step: StepTexts, samples: Sequence[Sample]) -> None:
    console = Console(highlight=False)
    shown: tuple[int, str] | None = None
    for sample in samples:
        if shown != (sample.prompt_index, sample.prompt):
            shown = sample.prompt_index, sample.prompt
            console.rule(f"prompt {sample.prompt_index}", align="left", style="dim")
            console.print(cell(sample.prompt, "bold"))
        each = ", ".join(f"{name} {reward:g}" for name, reward in sample.rewards.items())
        ended = "stopped" if sample.stopped else "cut at the greatest length"
        where = f"rank {sample.rank}, chunk {sample.chunk}, sample {sample.sample}"
        console.print(
            Text.assemble(
                (f"reward {sample.reward:g}", "cyan"),
                cell(f" ({each}), {sample.tokens} tokens, {ended}; {where}"),
            )
        )
        console.print(Padding(cell(sample.completion or "(nothing)"), (0, 0, 0, 4)))
    console.rule(style="dim")
    rewards = [sample.reward for sample in step.samples]
    if rewards:
        console.print(
            f"step {step.position}: {len(rewards)} completions, mean reward {sum(rewards) / len(rewards):.4f}"
        )
    for rank, numbers in step.numbers.items():
        told = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
        console.print(f"rank {rank}: {told}")
    for iteration, outcome in sorted(step.outcomes.items()):
        console.print(
            f"update {iteration}: loss {outcome.loss:+.5f}, gradient norm {outcome.grad_norm:.4f}, "
            f"kl {outcome.kl:.5f}, clip fraction {outcome.clip_fraction:.3f}, "
            f"learning rate {outcome.learning_rate:.3g}"
        )
