"""`rollforward rebuild`: the checkpoint of any step that the journal reaches."""

import argparse
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rollforward.cli import computing
from rollforward.cli.arguments import Parser, position
from rollforward.cli.output import print_line
from rollforward.errors import InputError
from rollforward.inspection.folder import new_folder, open_run
from rollforward.position import Position
from rollforward.replay.rebuilding import VARIABLE, Rebuild, copy_for_replay
from rollforward.run.request import Request
from rollforward.store.catalog import positions
from rollforward.store.layout import ROLE_FOLDERS

NAME = "rebuild"
COMMAND = "[-- COMMAND]"
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
and a run can be resumed from NEW.

For a run of rollforward.trl or of a loop of your own (open_run), add the command that trains it, as
it was given: rollforward rebuild RUN --to 0_137 --out NEW -- python train.py. Where it opens RUN, it
gets NEW, and it ends when the step is reached."""


def add_arguments(parser: Parser) -> None:
    """The options of `rebuild`."""
    parser.add_argument("folder", metavar="RUN", help="the run's folder or address (--save_checkpoint_dir)")
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
    folder, out, command = options.folder.rstrip("/"), Path(options.out), options.command
    open_run(folder)
    if command:
        return _with_its_own_command(folder, out, options.to, command)
    given = [
        *computing.overrides(options),
        ("actor_config.save", str(out)),
        # What the run itself writes outside its folder is left alone.
        ("rl_config.save_strategy_dir", str(out / "strategy")),
        ("rl_config.tensorboard", False),
    ]
    options.resumes, options.resume_position = True, options.to
    options.actor_checkpoint_path = f"{folder}/{ROLE_FOLDERS['policy_model']}"
    options.ref_checkpoint_path = f"{folder}/{ROLE_FOLDERS['ref']}"
    request = Request(
        resume=True,
        actor_checkpoint_path=options.actor_checkpoint_path,
        ref_checkpoint_path=options.ref_checkpoint_path,
        position=options.to,
        rebuild=True,
    )
    return computing.start_of(options, given, arguments).compute(request)


def _with_its_own_command(folder: str, out: Path, until: Position, command: Sequence[str]) -> int:
    """Replay a loop that only its own program knows; its exit code."""
    target = new_folder(out)
    if copy_for_replay(open_run(folder), target, until) == until:
        print_line(f"checkpoint {until} was saved by the run itself: copied to {out}")
        return 0
    asked = Rebuild(run=folder, out=out, until=until)
    code = subprocess.run([*command], env={**os.environ, VARIABLE: asked.as_text()}, check=False).returncode
    if code == 0 and until not in positions(target):
        raise InputError(
            f"the command ended without opening {folder}, or before step {until}",
            hint="give the command that trains this run, with the same folder",
        )
    return code
