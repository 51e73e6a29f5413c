"""Starts a run from its configuration: as the only process, as the parent of workers, or as one of them.

The engine's package says which of these this process is (`EnginePackage.this_process`).
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from rollforward.config.loading import Loaded
from rollforward.data.dataset import RememberedDataset
from rollforward.engines.base import find_engine, require
from rollforward.errors import ConfigError
from rollforward.grpo.addition import divisors
from rollforward.processes.environment import LAUNCHED
from rollforward.processes.launch import Ending, Team, exit_code, launch
from rollforward.processes.spares import Spares
from rollforward.processes.standby import in_standby
from rollforward.processes.streams import telling_loss
from rollforward.processes.supervision import on_workers, supervise
from rollforward.run.log import LogFile
from rollforward.run.output_folders import claim_logs
from rollforward.run.plan import Plan, prepare
from rollforward.run.request import Request
from rollforward.run.session import train
from rollforward.run.standby import stand_by


class Start:
    """What is going to be started. With several workers, each runs `script` with `arguments`.

    `load` reads the configuration.
    """

    def __init__(
        self, load: Callable[[], Loaded], *, script: Path, arguments: Sequence[str], workers: int
    ) -> None:
        self._load = load
        self._loaded = loaded = load()
        self._dataset = RememberedDataset()
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
            self._train(request, process.world_size, process.rank)
            return 0
        if self._workers > 1:
            plan = self._plan(request, world_size=self._workers)
            # The first worker keeps the log; what is lost here can only be reported on standard error.
            with telling_loss(lambda _line: None):
                return exit_code(launch(self._team(self._arguments, plan, self._workers)))
        self._train(request, self._workers, 0)
        return 0

    def _train(self, request: Request, world_size: int, rank: int) -> None:
        """As one worker, or the only one."""
        if not in_standby(rank):
            train(self._plan(request, world_size=world_size, rank=rank), self._package)
            return
        plan = self._plan(request, world_size=world_size, rank=rank, beside=True)

        def again() -> Plan:
            self._loaded = self._load()
            return self._plan(request, world_size=world_size, rank=rank)

        stand_by(plan, self._package, again)

    def supervised(
        self, request: Request, *, max_restarts: int, min_workers: int | None = None, standby: bool = False
    ) -> int:
        """Run it, and start it again when it fails; the computing is done in another process.

        `min_workers`: go on with as few as that, when the usual number cannot be started again. `standby`:
        have workers ready that take over.
        """
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
        chunks, fewest = plan.chunks_per_step, min_workers or self._workers
        if fewest > self._workers:
            raise ConfigError(
                f"--min_workers {fewest}, but --workers {self._workers}: it is about going on with fewer",
                hint=f"name a number below {self._workers}",
            )
        each = plan.model_parallel
        numbers = [each * groups for groups in reversed(divisors(chunks))]
        numbers = [number for number in numbers if fewest <= number <= self._workers]

        def team(arguments: Sequence[str], workers: int) -> Team:
            given = (
                arguments
                if workers == self._workers
                else on_workers(arguments, workers, chunks // (workers // each))
            )
            return self._team(given, plan, workers)

        def start(arguments: Sequence[str], workers: int) -> Ending:
            return launch(team(arguments, workers))

        logs = claim_logs(plan.outputs.log, plan.outputs.run)
        logs.mkdir(parents=True, exist_ok=True)
        with closing(LogFile(_line)) as log, telling_loss(log.line):
            log.keep(logs / "train.log")
            with closing(Spares(team, self._arguments, plan.outputs.run, log.line)) as spares:
                ending = supervise(
                    spares.start if standby else start,
                    self._arguments,
                    run=plan.place.storage if plan.place.remote else plan.outputs.run,
                    max_restarts=max_restarts,
                    workers=numbers,
                    say=log.line,
                )
        return exit_code(ending)

    def _plan(
        self, request: Request, *, world_size: int, rank: int | None = None, beside: bool = False
    ) -> Plan:
        return prepare(
            self._loaded,
            request,
            self._package,
            world_size=world_size,
            rank=rank,
            beside=beside,
            dataset=self._dataset,
        )

    def _team(self, arguments: Sequence[str], plan: Plan, workers: int) -> Team:
        return Team(
            script=self._script,
            arguments=arguments,
            package=self._package,
            engine=self._engine,
            workers=workers,
            log_folder=claim_logs(plan.outputs.log, plan.outputs.run),
            run_folder=plan.outputs.run,
            address=plan.outputs.address,
        )


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
