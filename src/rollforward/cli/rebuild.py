"""`rollforward rebuild`: the checkpoint of any step that the journal reaches."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rollforward.cli import computing
from rollforward.cli.arguments import Parser, position
from rollforward.inspection.folder import open_run
from rollforward.run.request import Request
from rollforward.store.layout import ROLE_FOLDERS

NAME = "rebuild"
SUMMARY = "make the checkpoint of any step that the journal reaches"
DESCRIPTION = """\
Make the checkpoint of a step that was not saved: load the newest checkpoint at or before it, and
replay the steps between from the journal, each compared with what was recorded. Nothing is
generated, and the run's folder is not changed.
  rollforward rebuild RUN --to 0_137 --out NEW

The configuration is the one that the run's folder carries. One that is given has to be the run's own,
options that it was trained with included: with another one the steps would not be repeated. Verifiers
of your own are named again (--verifier_function), since a folder's word runs no code. The weights
are those, bit for bit, that the run would have saved there. Metrics up to the step go to NEW too,
and a run can be resumed from NEW."""


def add_arguments(parser: Parser) -> None:
    """The options of `rebuild`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder (--save_checkpoint_dir)")
    parser.add_option(
        "--to", metavar="0_137", type=position, required=True, help="the state before this step is run"
    )
    parser.add_option("--out", metavar="NEW", required=True, help="the folder of the new checkpoint")
    parser.add_option(
        "--config", metavar="FILE", help="the YAML that the run was trained with (default: the run's own)"
    )
    computing.add_configuration(parser)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Replay and save."""
    folder, out = Path(options.folder), Path(options.out)
    open_run(folder)
    given = [
        *computing.overrides(options),
        ("actor_config.save", str(out)),
        # What the run itself writes outside its folder is left alone.
        ("rl_config.save_strategy_dir", str(out / "strategy")),
        ("rl_config.tensorboard", False),
    ]
    options.resumes, options.resume_position = True, options.to
    options.actor_checkpoint_path = str(folder / ROLE_FOLDERS["policy_model"])
    options.ref_checkpoint_path = str(folder / ROLE_FOLDERS["ref"])
    request = Request(
        resume=True,
        actor_checkpoint_path=options.actor_checkpoint_path,
        ref_checkpoint_path=options.ref_checkpoint_path,
        position=options.to,
        rebuild=True,
    )
    return computing.start_of(options, given, arguments).compute(request)
