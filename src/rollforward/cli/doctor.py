"""`rollforward doctor`: checks everything that a resume needs, and says what to do."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rollforward.cli.arguments import Parser
from rollforward.cli.output import cell, print_json
from rollforward.config.keys import ActorConfig, Config
from rollforward.config.places import outputs
from rollforward.engines.base import Finding, find_engine, names
from rollforward.inspection import doctor
from rollforward.interop.role_folders import name_checkpoint_folders

NAME = "doctor"
SUMMARY = "find out why a run does not resume"
DESCRIPTION = """\
Look at the folders that a run is to be resumed from, and at the machine: meta.json of every rank,
files that do not open, parameter names that do not match, unequal steps, every byte of every
checkpoint, timeouts of the communication library, the scheduler's port, disk space.

Nothing is changed. The exit code is 0 when there is no problem, 1 when there is one."""

_MARKS = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "problem": ("PROBLEM", "bold red")}


def add_arguments(parser: Parser) -> None:
    """The options of `doctor`."""
    parser.add_option("--actor_checkpoint_path", metavar="DIR", default="", help="the train/ folder of a run")
    parser.add_option("--ref_checkpoint_path", metavar="DIR", default="", help="the ref/ folder of a run")
    parser.add_option("--save_checkpoint_dir", metavar="DIR", help="where new checkpoints will go")
    parser.add_option("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the findings."""
    save = outputs(Config(actor_config=ActorConfig(save=options.save_checkpoint_dir or ""))).run
    source = name_checkpoint_folders(options.actor_checkpoint_path, options.ref_checkpoint_path, save)
    target = Path(options.save_checkpoint_dir) if options.save_checkpoint_dir else source.run
    found = doctor.examine(source)
    found += doctor.examine_environment(
        target, doctor.next_checkpoint_bytes(source.run), map(find_engine, names()), os.environ
    )
    problems = sum(finding.level == "problem" for finding in found)
    if options.json:
        print_json({"problems": problems, "findings": [asdict(one) for one in found]})
    else:
        _print(found)
    return 1 if problems else 0


def _print(found: Sequence[Finding]) -> None:
    console = Console()
    for finding in found:
        word, style = _MARKS[finding.level]
        console.print(
            Text.assemble((word, style), cell(f"  {finding.check}: {finding.text}")), soft_wrap=True
        )
        if finding.hint and finding.level != "ok":
            console.print(cell(f"         Try: {finding.hint}"), soft_wrap=True)
