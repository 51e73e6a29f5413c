"""Beside a run, a spare set of workers that takes over when it fails: `rollforward train --standby`.

    the run trains                      a spare is started: it makes everything ready and waits
    a worker of the run fails           all are ended; the spare is called, and is the run now
    the new run trains                  another spare is started

A start by the spare is a start as any other: the supervisor decides when there is one and where it resumes
from, and counts it. What the spare read when it was started may have changed by the time it is called.
It checks that, and if so, it ends (`StandbyOutdated`), and the run is started as without one.

A spare that ends by itself never ends the run. It is replaced, up to MOST_LOST times between two
starts of the run.

A spare is started once the run trains and is as far as the last failure: then it has a checkpoint to resume
from, the graphs that it compiled are kept, and what was recovered has been replayed. It is for the number of
workers that the run has.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rollforward.errors import StandbyOutdated
from rollforward.position import Position
from rollforward.processes import heartbeat
from rollforward.processes.launch import Ending, Standby, Team, Workers, starting, starting_standby
from rollforward.processes.supervision import resuming
from rollforward.wording import counted, in_bytes

MOST_LOST = 3
"""How many spares may end by themselves between two starts of the run."""


class Spares:
    """Starts a run, by the spare if there is one, and keeps a spare ready beside it.

    `team` gives what is started for arguments and a number of workers; `arguments` are those of the first
    start, `run` is the folder that it writes to.
    """

    def __init__(
        self,
        team: Callable[[Sequence[str], int], Team],
        arguments: Sequence[str],
        run: Path,
        say: Callable[[str], None],
    ) -> None:
        self._team = team
        self._arguments = arguments
        self._say = say
        self._spare: Standby | None = None
        self._of = 0
        """For how many workers it is."""
        self._told = False
        """Whether it was said that it is ready."""
        self._lost = 0
        self._reached = _left_at(run)
        """The furthest step in which the run has failed."""
        self._open = ExitStack()
        """What ends the spare."""

    def start(self, arguments: Sequence[str], workers: int) -> Ending:
        """Run with these arguments on so many workers, until all is done or something fails."""
        ending = None
        if self._spare is not None and self._of == workers:
            ending = self._by_the_spare(self._spare)
        if ending is None:
            self.close()
            with starting(self._team(arguments, workers)) as running:
                ending = self._watched(running, workers)
        self._reached = max(self._reached, ending.position or self._reached)
        return ending

    def close(self) -> None:
        """End the spare."""
        self._spare = None
        self._open.close()

    def _by_the_spare(self, spare: Standby) -> Ending | None:
        """The same by the spare; None when it cannot be used, and nothing was done."""
        ended = spare.workers.look()
        if ended is not None:
            self._say(f"standby: not used, it has ended: {_first_line(ended)}")
            return None
        used, self._open = self._open, ExitStack()
        self._spare = None
        with used:
            self._say("standby: takes over" + ("" if self._told else ", as soon as it is ready"))
            ending = self._watched(spare.take_over(), self._of)
        if ending.kind == StandbyOutdated.__name__:
            self._say(f"standby: not used: {_first_line(ending)}")
            return None
        return ending

    def _watched(self, running: Workers, workers: int) -> Ending:
        self._lost = 0
        try:
            return running.until_the_end(meanwhile=lambda: self._look_after(running, workers))
        except BaseException:
            self.close()
            raise

    def _look_after(self, running: Workers, workers: int) -> None:
        """Start a spare, or say what became of it."""
        if self._spare is None:
            step = running.step
            if self._lost < MOST_LOST and step is not None and step >= self._reached:
                self._start(workers)
            return
        ended = self._spare.workers.look()
        if ended is not None:
            self._lose(ended)
        elif not self._told and (memory := self._spare.workers.memory) is not None:
            self._told = True
            self._say(
                f"standby: ready, {counted(self._of, 'worker')} with {in_bytes(memory)} of memory; "
                "takes over when the run fails"
            )

    def _start(self, workers: int) -> None:
        team = self._team(self._arguments, workers)
        arguments = resuming(team.arguments, team.address or str(team.run_folder))
        self._spare = self._open.enter_context(starting_standby(replace(team, arguments=arguments)))
        self._of, self._told = workers, False

    def _lose(self, ended: Ending) -> None:
        self.close()
        self._lost += 1
        then = "another one is started" if self._lost < MOST_LOST else "no other is started beside this start"
        self._say(f"standby: lost, {then}: {ended.error}")


def _left_at(run: Path) -> Position:
    """The step in which an earlier start has left the run."""
    pulse = heartbeat.read(run, 0)
    return Position(0, 0) if pulse is None else Position.parse(pulse.position)


def _first_line(ending: Ending) -> str:
    return (ending.error or f"it ended with code {ending.code}").splitlines()[0]
