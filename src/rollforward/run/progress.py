"""What a person sees during a run.

On a terminal: the log, and below it a live display of step, reward, KL, tokens per second,
time left and last checkpoint. Anywhere else: one plain line per step, easy to grep.
Both show the same things. `ObserverList` combines several observers.
"""

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rollforward.grpo.ports import Observer
from rollforward.position import Position
from rollforward.wording import in_minutes

_WINDOW = 20
"""Number of steps over which speed is averaged to estimate the time left."""


class Display(Observer, Protocol):
    """Shows a run to a person."""

    def line(self, text: str) -> None:
        """A line of the log."""
        ...

    def saved(self, position: Position) -> None:
        """A checkpoint was committed."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class ObserverList:
    """An `Observer` that forwards everything to several others, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def phase(self, position: Position, name: str) -> None:
        """The run enters a phase."""
        for observer in self._observers:
            observer.phase(position, name)

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        for observer in self._observers:
            observer.step(position, metrics)


class Silent:
    """The display of every rank but the first: nothing. Errors go to standard error elsewhere."""

    def line(self, text: str) -> None:
        """Nothing."""

    def saved(self, position: Position) -> None:
        """Nothing."""

    def phase(self, position: Position, name: str) -> None:
        """Nothing."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Pace:
    """Estimates the time left from the newest steps, without the first, which compiles."""

    def __init__(self, *, steps_per_epoch: int, total_steps: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self._ends: deque[float] = deque(maxlen=_WINDOW)

    def done(self, position: Position) -> int:
        """Note that the step at `position` is done; returns the total number of steps done."""
        self._ends.append(time.monotonic())
        return position.global_step(self._steps_per_epoch) + 1

    def left(self, done: int) -> str:
        """Time left, as minutes and seconds; a question mark while it is unknown."""
        remaining = self.total_steps - done
        if remaining <= 0:
            return "0:00"
        if len(self._ends) < 2:
            return "?"
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * remaining
        return in_minutes(seconds)


class PlainLines:
    """One line per step, on standard output."""

    def __init__(self, *, steps_per_epoch: int, total_steps: int) -> None:
        self._pace = Pace(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        self._saved = "none"

    def line(self, text: str) -> None:
        """A line of the log."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def saved(self, position: Position) -> None:
        """A checkpoint was committed."""
        self._saved = str(position)

    def phase(self, position: Position, name: str) -> None:
        """Not worth a line."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """The step's figures in one line."""
        done = self._pace.done(position)
        kl = f"kl {metrics['kl']:.5f}  " if "kl" in metrics else ""
        self.line(
            f"step {position} ({done}/{self._pace.total_steps})  reward {metrics['reward']:.4f}  "
            f"{kl}loss {metrics['loss']:+.5f}  "
            f"length {metrics['completion_length']:.1f}  {tokens_per_second(metrics):.0f} tokens/s  "
            f"left {self._pace.left(done)}  checkpoint {self._saved}"
        )

    def close(self) -> None:
        """Nothing to release."""


class LiveDisplay:
    """A progress bar with the newest figures, at the bottom of the terminal."""

    def __init__(self, console: Console, *, steps_per_epoch: int, total_steps: int) -> None:
        self._pace = Pace(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("reward {task.fields[reward]}"),
            TextColumn("kl {task.fields[kl]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            TextColumn("checkpoint {task.fields[saved]}"),
            console=console,
            # Leaves the processor to training most of the time.
            refresh_per_second=4,
        )
        self._task: TaskID = self._progress.add_task(
            "start", total=total_steps, reward="-", kl="-", speed="-", left="?", saved="none"
        )
        self._progress.start()

    def line(self, text: str) -> None:
        """A line of the log, above the display."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def saved(self, position: Position) -> None:
        """A checkpoint was committed."""
        self._progress.update(self._task, saved=str(position))

    def phase(self, position: Position, name: str) -> None:
        """Name the phase beside the bar."""
        self._progress.update(self._task, description=f"{position} {name}")

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Show the step's figures."""
        done = self._pace.done(position)
        self._progress.update(
            self._task,
            completed=done,
            reward=f"{metrics['reward']:.3f}",
            kl=f"{metrics['kl']:.4f}" if "kl" in metrics else "-",
            speed=f"{tokens_per_second(metrics):.0f}",
            left=self._pace.left(done),
        )

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()


def open_display(*, rank: int, steps_per_epoch: int, total_steps: int) -> Display:
    """Live on a terminal, plain lines elsewhere, nothing on any rank but the first."""
    if rank != 0:
        return Silent()
    console = Console()
    if console.is_terminal:
        return LiveDisplay(console, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    return PlainLines(steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def tokens_per_second(metrics: Mapping[str, float]) -> float:
    """Completion tokens of a step over the seconds of all its phases; 0 when nothing was timed."""
    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    return metrics["tokens"] / seconds if seconds > 0 else 0.0
