"""This process as one worker of a run: connected to the others and watched, then at work, with a log.

Whatever is opened during its work is closed in reverse order when it exits, and also when a signal ends
the process: then the stack is not unwound, but everything is closed (`processes.stopping.ending`).
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from rollforward.engines.base import EnginePackage
from rollforward.errors import RollforwardError
from rollforward.grpo.ports import Group
from rollforward.processes import stopping
from rollforward.processes.heartbeat import Heartbeat
from rollforward.processes.stalls import CollectiveWatch
from rollforward.processes.streams import telling_loss
from rollforward.run.log import WorkerLog
from rollforward.run.plan import Plan
from rollforward.run.progress import Display, open_display
from rollforward.run.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Company:
    """This process among the workers, connected to them and watched."""

    group: Group
    clock: Stopwatch
    watch: CollectiveWatch
    closing: ExitStack
    """What is closed when the worker exits."""


@dataclass(frozen=True, kw_only=True)
class Worker(Company):
    """One worker at work: it has a log, and the first one a display."""

    log: WorkerLog
    display: Display
    standby: bool
    """Whether it had everything ready before the run's last failure."""

    @property
    def is_first(self) -> bool:
        """Whether it is the one that reports for all."""
        return self.group.rank == 0

    def heartbeat(self, plan: Plan, incarnation: int) -> Heartbeat:
        """From now on the others can see what this worker is doing."""
        run, group = plan.outputs.run, self.group
        heart = Heartbeat(run, rank=group.rank, incarnation=incarnation, start=plan.start)
        self.closing.enter_context(closing(heart))
        self.watch.follow(heart, run, rank=group.rank, world_size=group.world_size, incarnation=incarnation)
        return heart


@contextmanager
def joined(plan: Plan, package: EnginePackage) -> Iterator[Company]:
    """Join the other workers and prepare to be stopped. Collective when there are several."""
    clock = Stopwatch()
    patience = plan.config.rl_config.collective_timeout
    package.prepare(os.environ, patience=patience)
    watch = CollectiveWatch(patience, end=stopping.end_at_once)

    def behind_a_signal() -> RollforwardError | None:
        """The error that made the framework send the signal, if the framework sent it."""
        return watch.lost() if package.lost_contact() else None

    with ExitStack() as stack, stopping.ending(stack.close, cause=behind_a_signal):
        stack.callback(watch.close)
        with clock.timing("framework"):
            group = package.connect(plan.config.context.device_target, watch.meeting)
        yield Company(group=group, clock=clock, watch=watch, closing=stack)


def at_work(plan: Plan, company: Company, *, standby: bool = False) -> Worker:
    """Begin to report."""
    rank, closes = company.group.rank, company.closing.enter_context
    display = closes(
        closing(open_display(rank=rank, steps_per_epoch=plan.steps_per_epoch, total_steps=plan.total_steps))
    )
    log = closes(closing(WorkerLog(display.line, rank)))
    closes(telling_loss(log.line))
    return Worker(
        group=log.heard_over(company.group),
        log=log,
        display=display,
        clock=company.clock,
        watch=company.watch,
        closing=company.closing,
        standby=standby,
    )
