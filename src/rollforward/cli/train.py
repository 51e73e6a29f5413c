"""`rollforward train`: start a run, or go on with one."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rollforward.cli import worker
from rollforward.cli.arguments import Parser, count, count_from_0, position, split_list
from rollforward.config import loading as config
from rollforward.errors import ConfigError
from rollforward.processes import launch, reports
from rollforward.processes.environment import started_by_msrun, this_process
from rollforward.processes.supervision import supervise
from rollforward.run.engine import MindSpore
from rollforward.run.plan import Asked, prepare
from rollforward.run.progress import LogFile
from rollforward.run.session import train

NAME = "train"
SUMMARY = "train a policy with GRPO, or resume a run"
DESCRIPTION = """\
Train a policy with GRPO, or resume a run.

A new run starts from Hugging Face folders:
  rollforward train --config grpo.yaml --actor_checkpoint_path MODEL --save_checkpoint_dir RUN
A run that was killed goes on from its newest valid checkpoint:
  rollforward train --config grpo.yaml --resume_training --actor_checkpoint_path RUN/train \\
      --ref_checkpoint_path RUN/ref --save_checkpoint_dir RUN
With --max_restarts that is done for you: a run that fails is resumed from its own folder.
With --resume_position it goes on from any step that the journal reaches, in a new folder; from a
step between checkpoints only with the configuration that the run had there.

Options take precedence over the configuration. Names may be written with dashes."""

_CONFIGURATION = (
    ("--dataset_file", "FILE", "rl_config.dataset_file", "JSON Lines, or reasoning_gym:NAME?parameter=value"),
    ("--tokenizer_dir", "DIR", "rl_config.tokenizer_dir", "folder of the tokenizer (default: the actor's)"),
    (
        "--on_divergence",
        "stop|accept",
        "rl_config.on_divergence",
        "what to do when a replayed step gives other bits than were recorded (default: stop)",
    ),
)
_OPTIONS = (
    (
        "--save_checkpoint_dir",
        "DIR",
        "actor_config.save",
        "the run's folder: new checkpoints, metrics (default: save_ckpt in $LOCAL_DEFAULT_PATH or ./output)",
    ),
    (
        "--save_strategy_dir",
        "DIR",
        "rl_config.save_strategy_dir",
        "where strategy_<rank>.ckpt goes; old ones there are cleared (default: strategy, beside save_ckpt)",
    ),
    (
        "--generate_checkpoint_path",
        "DIR",
        "generate_config.load",
        "accepted and ignored: the policy that is trained is the one that generates",
    ),
)


def add_arguments(parser: Parser) -> None:
    """The options of `train`."""
    parser.add_option("--config", metavar="FILE", help="YAML with MindRLHF's sections and keys")
    parser.add_option("--resume_training", action="store_true", help="go on from the newest valid checkpoint")
    parser.add_option(
        "--actor_checkpoint_path",
        metavar="DIR",
        default="",
        help="the policy: a Hugging Face folder; with --resume_training, the train/ folder of a run",
    )
    parser.add_option(
        "--ref_checkpoint_path",
        metavar="DIR",
        default="",
        help="the reference model (default: the actor's); with --resume_training, the ref/ folder of a run",
    )
    parser.add_option(
        "--resume_position",
        metavar="0_137",
        type=position,
        help="go on from this step instead, in a new folder, and take over nothing beyond it",
    )
    for name, metavar, path, text in _OPTIONS:
        parser.add_option(name, metavar=metavar, dest=path, help=text)
    parser.add_option(
        "--max_restarts",
        metavar="N",
        type=count_from_0,
        default=0,
        help="when the run fails, resume it from its own folder, at most so often (default: 0)",
    )
    parser.add_option(
        "--tensorboard",
        metavar="DIR",
        nargs="?",
        const="",
        help="write TensorBoard events (default: tensorboard/ in the run's folder)",
    )
    add_configuration(parser)


def add_configuration(parser: Parser) -> None:
    """The options of all verbs that compute: what the configuration says, and how many processes."""
    for name, metavar, path, text in _CONFIGURATION:
        parser.add_option(name, metavar=metavar, dest=path, help=text)
    parser.add_option(
        "--verifier_function", metavar="A,B", type=split_list, help="reward functions, with commas between"
    )
    parser.add_option("--verifier_weight", metavar="X,Y", type=_numbers, help="a weight for each of them")
    parser.add_option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="any key of the configuration; may be given many times",
    )
    parser.add_option("--workers", metavar="N", type=count, default=1, help="processes on this machine")


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train."""
    asked = Asked(
        resume=options.resume_training,
        actor_checkpoint_path=options.actor_checkpoint_path,
        ref_checkpoint_path=options.ref_checkpoint_path,
        position=options.resume_position,
    )
    if options.max_restarts:
        return _supervise(options, arguments, asked)
    return compute(options, arguments, asked, overrides(options))


def _supervise(options: argparse.Namespace, arguments: Sequence[str], asked: Asked) -> int:
    """Start the run, and start it again when it fails; all that computes is another process."""
    if started_by_msrun():
        raise ConfigError(
            f"--max_restarts {options.max_restarts} under msrun: msrun has started this worker, ends the "
            "others when one fails, and none of them can start it again",
            hint="leave it out and start msrun again with --resume_training after a failure, or let "
            "rollforward start the workers: rollforward train --workers N --max_restarts N",
        )
    loaded = config.load(options.config, overrides(options))
    # What the user has to mend is found before anything is started.
    places = prepare(loaded, asked, MindSpore(), world_size=options.workers).outputs

    def start(given: Sequence[str]) -> launch.Ending:
        return launch.launch(
            Path(worker.__file__),
            given,
            workers=options.workers,
            log_folder=places.log,
            run_folder=places.run,
        )

    places.log.mkdir(parents=True, exist_ok=True)
    with closing(LogFile(_line)) as log:
        log.keep(places.log / "train.log")
        ending = supervise(start, arguments, run=places.run, max_restarts=options.max_restarts, say=log.line)
    return launch.exit_code(ending)


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def compute(
    options: argparse.Namespace, arguments: Sequence[str], asked: Asked, given: Sequence[tuple[str, Any]]
) -> int:
    """Run as whatever this process is: the only one, the parent of workers, a worker, msrun's scheduler.

    `arguments` is the whole command line, for workers; `given` is what it says of the configuration.
    """
    process, engines = this_process(), MindSpore()
    reports.join()
    loaded = config.load(options.config, given)
    if process.role == "scheduler":
        engines.serve_scheduler(loaded.config.context.device_target)
        return 0
    several = process.role == "alone" and options.workers > 1
    if process.role == "worker" and options.workers not in (1, process.world_size):
        raise ConfigError(
            f"--workers {options.workers}, but msrun started {process.world_size}", hint="leave --workers out"
        )
    plan = prepare(
        loaded,
        asked,
        engines,
        world_size=options.workers if several else process.world_size,
        rank=process.rank if process.role == "worker" else None,
    )
    if several:
        ending = launch.launch(
            Path(worker.__file__),
            arguments,
            workers=options.workers,
            log_folder=plan.outputs.log,
            run_folder=plan.outputs.run,
        )
        return launch.exit_code(ending)
    train(plan, engines)
    return 0


def overrides(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """What options say, as (dotted key, value) for `config.load`; `--set` goes first."""
    found = [config.parse_override(text) for text in options.overrides]
    for _name, _metavar, path, _text in (*_CONFIGURATION, *_OPTIONS):
        value = getattr(options, path, None)
        if value is not None:
            found.append((path, value))
    if options.verifier_function is not None:
        found.append(("reward_config.verifier_function", options.verifier_function))
        if options.verifier_weight is None:
            # Weights of the file belong to the functions of the file.
            found.append(("reward_config.verifier_weight", []))
    if options.verifier_weight is not None:
        found.append(("reward_config.verifier_weight", options.verifier_weight))
    tensorboard = getattr(options, "tensorboard", None)
    if tensorboard is not None:
        found.append(("rl_config.tensorboard", True))
        if tensorboard:
            found.append(("rl_config.tensorboard_dir", tensorboard))
    return found


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in split_list(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}") from None
