"""Starts a run from its configuration: as the only process, as the parent of workers, or as one of them.

The engine's package says which of these this process is (`EnginePackage.this_process`).
"""

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rollforward.config.loading import Loaded
from rollforward.engines.base import find_engine, require
from rollforward.errors import ConfigError
from rollforward.processes.environment import LAUNCHED
from rollforward.processes.launch import Ending, exit_code, launch
from rollforward.processes.streams import telling_loss
from rollforward.processes.supervision import supervise
from rollforward.run.log import LogFile
from rollforward.run.output_folders import claim_logs
from rollforward.run.plan import Plan, prepare
from rollforward.run.request import Request
from rollforward.run.session import train


class Start:
    """What is going to be started. With several workers, each runs `script` with `arguments`."""

    def __init__(self, loaded: Loaded, *, script: Path, arguments: Sequence[str], workers: int) -> None:
        self._loaded = loaded
        self._script = script
        self._arguments = arguments
        self._workers = workers
        self._engine = loaded.config.context.engine
        self._package = require(find_engine(self._engine))

    def compute(self, request: Request) -> int:
        """Run in this process's role; returns the exit code."""
        process = self._package.this_process(os.environ)
        if process.role == "scheduler":
            self._package.serve_scheduler(self._loaded.config.context.device_target)
            return 0
        if process.role == "worker":
            if self._workers not in (1, process.world_size):
                launcher = self._package.launched(os.environ)
                raise ConfigError(
                    f"--workers {self._workers}, but {launcher} started {process.world_size}",
                    hint="leave --workers out",
                )
            train(self._plan(request, world_size=process.world_size, rank=process.rank), self._package)
            return 0
        plan = self._plan(request, world_size=self._workers)
        if self._workers > 1:
            # The first worker keeps the log; what is lost here can only be reported on standard error.
            with telling_loss(lambda _line: None):
                return exit_code(self._launch(self._arguments, plan))
        train(plan, self._package)
        return 0

    def supervised(self, request: Request, *, max_restarts: int) -> int:
        """Run it, and start it again when it fails; the computing is done in another process."""
        launcher = self._package.launched(os.environ)
        if launcher and LAUNCHED not in os.environ:
            raise ConfigError(
                f"--max_restarts {max_restarts} under {launcher}: {launcher} has started this worker, ends "
                "the others when one fails, and none of them can start it again",
                hint=f"leave it out and start {launcher} again with --resume_training after a failure, or "
                "let rollforward start the workers: rollforward train --workers N --max_restarts N",
            )
        # Errors that the user must fix are found before anything is started.
        plan = self._plan(request, world_size=self._workers)

        def start(arguments: Sequence[str]) -> Ending:
            return self._launch(arguments, plan)

        logs = claim_logs(plan.outputs.log, plan.outputs.run)
        logs.mkdir(parents=True, exist_ok=True)
        with closing(LogFile(_line)) as log, telling_loss(log.line):
            log.keep(logs / "train.log")
            ending = supervise(
                start, self._arguments, run=plan.outputs.run, max_restarts=max_restarts, say=log.line
            )
        return exit_code(ending)

    def _plan(self, request: Request, *, world_size: int, rank: int | None = None) -> Plan:
        return prepare(self._loaded, request, self._package, world_size=world_size, rank=rank)

    def _launch(self, arguments: Sequence[str], plan: Plan) -> Ending:
        return launch(
            self._script,
            arguments,
            package=self._package,
            engine=self._engine,
            workers=self._workers,
            log_folder=claim_logs(plan.outputs.log, plan.outputs.run),
            run_folder=plan.outputs.run,
        )


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
