"""`rollforward doctor`: checks everything that a resume needs, and says what to do."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rollforward.cli import computing
from rollforward.cli.arguments import Parser
from rollforward.cli.output import cell, print_json
from rollforward.config.keys import ActorConfig, Config
from rollforward.config.places import outputs
from rollforward.engines.base import Finding, find_engine, names
from rollforward.errors import ConfigError
from rollforward.inspection import doctor, machine
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.replay.configurations import FILE
from rollforward.run.places import resumed_address
from rollforward.storage.address import open_storage

if TYPE_CHECKING:
    from rollforward.run.fitting import Planned

NAME = "doctor"
SUMMARY = "find out why a run does not resume"
DESCRIPTION = """\
Look at the folders that a run is to be resumed from, and at the machine: meta.json of every rank,
files that do not open, parameter names that do not match, unequal steps, every byte of every
checkpoint, timeouts of the communication library, the scheduler's port, disk space, and whether the run
fits into memory. Before a new run:
  rollforward doctor --config grpo.yaml --actor_checkpoint_path MODEL

Memory is computed from the configuration (--config, or the one in the run's folder) and compared with what
this machine, or its container, has.

Of a run in object storage it looks at checkpoints, journal and lock, and tries whether the service honours
conditional writes, with an object that it removes again.

Nothing else is changed. The exit code is 0 when there is no problem, 1 when there is one."""

_MARKS = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "problem": ("PROBLEM", "bold red")}


def add_arguments(parser: Parser) -> None:
    """The options of `doctor`."""
    parser.add_option("--actor_checkpoint_path", metavar="DIR", default="", help="the train/ folder of a run")
    parser.add_option("--ref_checkpoint_path", metavar="DIR", default="", help="the ref/ folder of a run")
    parser.add_option("--save_checkpoint_dir", metavar="DIR", help="where new checkpoints will go")
    parser.add_option("--config", metavar="FILE", help="the configuration that it will be started with")
    computing.add_keys(parser)
    parser.add_option("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the findings."""
    places = outputs(Config(actor_config=ActorConfig(save=options.save_checkpoint_dir or "")))
    actor, reference = options.actor_checkpoint_path, options.ref_checkpoint_path
    address = resumed_address(actor, reference, places)
    engines = map(find_engine, names())
    if address is not None:
        plan = _planned(options, address)
        found = doctor.examine_address(open_storage(address), engines, os.environ)
    else:
        source = name_checkpoint_folders(actor, reference, places.run)
        plan = _planned(options, source.run)
        is_new = plan is not None and plan.is_new
        target = places.run if options.save_checkpoint_dir or is_new else source.run
        needed = plan.first_save if plan and is_new else doctor.next_checkpoint_bytes(source.run)
        found = [] if is_new else doctor.examine(source)
        found += doctor.examine_environment(target, needed, engines, os.environ)
    found += [plan.memory] if plan and plan.memory else []
    problems = sum(finding.level == "problem" for finding in found)
    if options.json:
        print_json({"problems": problems, "findings": [asdict(one) for one in found]})
    else:
        _print(found)
    return 1 if problems else 0


def _planned(options: argparse.Namespace, place: str | Path) -> "Planned | None":
    """What the configuration says of the start; None without one, as for a run of somebody else's loop."""
    run = open_storage(place)
    asked = options.config is not None or bool(options.overrides)
    if not asked and run.stat(FILE) is None:
        return None
    try:
        with computing.needing_the_trainer():
            from rollforward.run.fitting import look
    except ConfigError:
        if asked:
            raise
        # The core alone looks at runs, and does not know what one needs.
        return None
    return look(
        options.config,
        options.overrides,
        run,
        actor=options.actor_checkpoint_path,
        workers=options.workers,
        room=machine.room(),
    )


def _print(found: Sequence[Finding]) -> None:
    console = Console()
    for finding in found:
        word, style = _MARKS[finding.level]
        console.print(
            Text.assemble((word, style), cell(f"  {finding.check}: {finding.text}")), soft_wrap=True
        )
        if finding.hint and finding.level != "ok":
            console.print(cell(f"         Try: {finding.hint}"), soft_wrap=True)
