"""Shared by the verbs that compute, `train` and `rebuild`: configuration options, and starting a run.

Training needs more packages than the verbs that look at runs, so it is imported only when needed.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollforward.cli.arguments import Parser, count, split_list
from rollforward.errors import ConfigError

if TYPE_CHECKING:
    from rollforward.config.loading import Loaded
    from rollforward.run.starting import Start

INSTALL = "pip install 'rollforward[mindspore]'"
WORKER = Path(__file__).with_name("worker.py")
"""The script that each worker runs."""

_CONFIGURATION = (
    ("--dataset_file", "FILE", "rl_config.dataset_file", "JSON Lines, or reasoning_gym:NAME?parameter=value"),
    ("--tokenizer_dir", "DIR", "rl_config.tokenizer_dir", "folder of the tokenizer (default: the actor's)"),
    (
        "--on_divergence",
        "stop|accept",
        "rl_config.on_divergence",
        "what to do when a replayed step differs from the record (default: stop)",
    ),
)


def add_configuration(parser: Parser) -> None:
    """The options of all verbs that compute: the configuration, and how many processes."""
    for name, metavar, path, text in _CONFIGURATION:
        parser.add_option(name, metavar=metavar, dest=path, help=text)
    parser.add_option(
        "--verifier_function", metavar="A,B", type=split_list, help="reward functions, separated by commas"
    )
    parser.add_option("--verifier_weight", metavar="X,Y", type=_numbers, help="a weight for each of them")
    add_keys(parser)


def add_keys(parser: Parser) -> None:
    """Any key of the configuration, and how many processes."""
    parser.add_option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="any key of the configuration; can be given several times",
    )
    parser.add_option("--workers", metavar="N", type=count, default=1, help="processes on this machine")


@contextmanager
def needing_the_trainer() -> Iterator[None]:
    """Imports inside it may fail because only the core is installed: the error says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "rollforward":
            raise
        raise ConfigError(f"training needs more than the core: {INSTALL} ({error.name} is missing)") from None


def start_of(
    options: argparse.Namespace, given: Sequence[tuple[str, Any]], arguments: Sequence[str]
) -> "Start":
    """The start that the command line asks for. `given`: its configuration values.

    If it names no configuration file, the configuration of the resumed run is used.
    """
    with needing_the_trainer():
        from rollforward.config.loading import load
        from rollforward.run import configuration
        from rollforward.run.starting import Start

    def loaded() -> "Loaded":
        if options.config is not None or not options.resumes:
            return load(options.config, given)
        carried = configuration.of_resumed(
            given,
            actor=options.actor_checkpoint_path,
            reference=options.ref_checkpoint_path,
            until=options.resume_position,
        )
        named = given if carried is None else configuration.check_named(carried, given)
        return load(None, named, carried=carried)

    return Start(loaded, script=WORKER, arguments=arguments, workers=options.workers)


def overrides(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """The options' values, as (dotted key, value) for `config.loading.load`; `--set` comes first."""
    with needing_the_trainer():
        from rollforward.config.loading import parse_override
    found = [parse_override(text) for text in options.overrides]
    # An option that stands for a key is parsed under the key's dotted name.
    found += [(name, value) for name, value in vars(options).items() if "." in name and value is not None]
    if options.verifier_function is not None:
        found.append(("reward_config.verifier_function", options.verifier_function))
        if options.verifier_weight is None:
            # The weights in the file belong to the functions in the file.
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
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
