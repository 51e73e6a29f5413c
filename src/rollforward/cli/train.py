"""`rollforward train`: start a run, or resume one."""

import argparse
from collections.abc import Sequence

from rollforward.cli import computing
from rollforward.cli.arguments import Parser, count, count_from_0, position
from rollforward.errors import ConfigError
from rollforward.run.request import Request

NAME = "train"
SUMMARY = "train a policy with GRPO, or resume a run"
DESCRIPTION = """\
Train a policy with GRPO, or resume a run.

A new run starts from Hugging Face folders:
  rollforward train --config grpo.yaml --actor_checkpoint_path MODEL --save_checkpoint_dir RUN
A run that was killed resumes from its newest valid checkpoint, in its own folder or in a new one:
  rollforward train --resume_training --save_checkpoint_dir RUN
  rollforward train --resume_training --actor_checkpoint_path RUN/train \\
      --ref_checkpoint_path RUN/ref --save_checkpoint_dir NEW
A resume takes the configuration from the run's folder unless --config is given; options change it.
Verifiers of your own are named again (--verifier_function), since a folder's word runs no code.
With --max_restarts that is done for you: a run that fails is resumed from its own folder; with
--standby by workers that have everything ready; and with --min_workers also where a machine or
device is gone for good. Any number of workers that divides the chunks of a step (workers x
num_rollouts at the first start) goes on with the same bits.
A run may be in object storage, and then resumes on any machine:
  rollforward train --resume_training --save_checkpoint_dir s3://bucket/runs/17
With --resume_position it goes on from any step that the journal reaches, in a new folder; from a
step between checkpoints only with the configuration that the run had there.

Options take precedence over the configuration. Names may be written with dashes."""

_OPTIONS = (
    (
        "--save_checkpoint_dir",
        "DIR",
        "actor_config.save",
        "the run's folder, or s3://bucket/path: new checkpoints, metrics (default: save_ckpt in "
        "$LOCAL_DEFAULT_PATH or ./output)",
    ),
    (
        "--work_dir",
        "DIR",
        "rl_config.work_dir",
        "of a run in s3://: where this machine keeps what is only its own (default: in ~/.cache/rollforward)",
    ),
    (
        "--journal_durability",
        "local|remote",
        "rl_config.journal_durability",
        "of a run in s3://: a chunk is used when this machine's disk has it, or when the service does "
        "(default: local)",
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
    parser.add_option(
        "--resume_training", action="store_true", help="resume from the newest valid checkpoint"
    )
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
        help="resume from this step instead, in a new folder, and drop everything after it",
    )
    for name, metavar, path, text in _OPTIONS:
        parser.add_option(name, metavar=metavar, dest=path, help=text)
    parser.add_option(
        "--max_restarts",
        metavar="N",
        type=count_from_0,
        default=0,
        help="when the run fails, resume it from its own folder, up to this many times (default: 0)",
    )
    parser.add_option(
        "--min_workers",
        metavar="N",
        type=count,
        help="when one of the workers fails twice running, resume with fewer, down to this many",
    )
    parser.add_option(
        "--standby",
        action="store_true",
        help="keep workers ready that take over when the run fails: its memory once more",
    )
    parser.add_option(
        "--tensorboard",
        metavar="DIR",
        nargs="?",
        const="",
        help="write TensorBoard events (default: tensorboard/ in the run's folder)",
    )
    computing.add_configuration(parser)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train."""
    options.resumes = options.resume_training
    request = Request(
        resume=options.resume_training,
        actor_checkpoint_path=options.actor_checkpoint_path,
        ref_checkpoint_path=options.ref_checkpoint_path,
        position=options.resume_position,
    )
    start = computing.start_of(options, computing.overrides(options), arguments)
    if options.max_restarts:
        return start.supervised(
            request,
            max_restarts=options.max_restarts,
            min_workers=options.min_workers,
            standby=options.standby,
        )
    if options.standby:
        raise ConfigError(
            "--standby takes over when a run is restarted, and restarts are off", hint="add --max_restarts"
        )
    if options.min_workers is not None:
        raise ConfigError(
            "--min_workers says with how few workers a restarted run goes on, and restarts are off",
            hint="add --max_restarts",
        )
    return start.compute(request)
