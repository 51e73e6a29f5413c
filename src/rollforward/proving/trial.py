"""A run of the command in a folder of its own: started, killed at its places, started again, until it ends.

    DIR/killed/run            what `{out}` stands for
    DIR/killed/start_1.log    all output of each start

After a kill the command is started with `--resume_args` behind it as soon as its folder holds something to
resume from. Until then it is started as at first: a trainer may refuse to resume where nothing was saved yet,
and a user would not ask it to.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollforward.proving.leavings import Numbers, look_at
from rollforward.proving.series import Row, Series, first_new_row, told
from rollforward.proving.starting import KillPlace, Start, run_start

OUT = "{out}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is put to the proof."""

    words: tuple[str, ...]
    """With `{out}` where the folder of a run goes."""
    resume_args: str = ""
    """What goes behind them after a kill, as a shell would split it."""
    begin: re.Pattern[str] | None = None
    """A start has begun with the first line of its output that matches; None: at once."""

    def at(self, run: Path, *, resume: bool) -> tuple[str, ...]:
        """The words of a start, with its folder in place of `{out}`."""
        words = [*self.words, *(shlex.split(self.resume_args) if resume else ())]
        return tuple(word.replace(OUT, str(run)) for word in words)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A kill that took place, and what the next start found."""

    start: int
    """The number of the start that was killed."""
    seconds: float
    """How long it had run."""
    where: str
    """Where it was to be killed."""
    logged: str
    """The last step that was logged; empty when there was none."""
    checkpoint: Numbers
    """The numbers of the newest checkpoint; empty when there is none, or none with a number."""
    resumes: bool
    """Whether the next start is given `--resume_args`; if not, nothing was saved yet."""


@dataclass
class Trial:
    """A run with all its starts."""

    name: str
    folder: Path
    """Where the trainer wrote: `{out}`."""
    starts: list[Start] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    first_rows: dict[str, list[Row | None]] = field(default_factory=dict)
    """Series -> for each start after a kill, the row that it logged first."""
    began_anew: list[int] = field(default_factory=list)
    """Numbers of the starts that were to resume and logged the run's first step first."""

    @property
    def failure(self) -> str:
        """Why the run did not come to its end; empty when it did."""
        last = self.starts[-1]
        if last.hung:
            return f"start {last.number} did not end within {last.seconds:.0f} s, and was ended"
        if last.code is None or last.code == 0:
            return ""
        how = f"ended with exit code {last.code}" if last.code > 0 else f"was killed by signal {-last.code}"
        return f"start {last.number} {how}"


def run_trial(
    name: str,
    folder: Path,
    command: Command,
    *,
    places: Sequence[KillPlace] = (),
    limit: float | None = None,
    can_be_saved: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Trial:
    """Run the command in `folder/run` to its end, killed at each place in turn.

    `limit` is what a start may take. `can_be_saved` is False when an undisturbed run left no checkpoint that
    is known as one: then every start after the first is given `--resume_args`.
    """
    # A trainer may change its working directory.
    trial = Trial(name, folder.absolute() / "run")
    trial.folder.mkdir(parents=True)
    series: dict[str, Series] = {}
    resume = False
    for number, place in enumerate([*places, None], start=1):
        words = command.at(trial.folder, resume=resume)
        say(f"{name}, start {number}: {shlex.join(words)}")
        log = folder / f"start_{number}.log"
        start = run_start(number, words, log, begin=command.begin, place=place, limit=limit)
        trial.starts.append(start)
        left = look_at(trial.folder)
        before, series = series, {path: left.read(path) for path in left.series}
        if number > 1:
            _note_first_rows(trial, before, series)
        if not start.killed:
            say(f"{name}: {trial.failure or f'start {number} came to its end'}, {start.seconds:.1f} s")
            return trial
        say(f"{name}: start {number} killed, {place}")
        resume = left.saved or not can_be_saved
        trial.kills.append(
            Kill(
                start=number,
                seconds=start.seconds,
                where=str(place),
                logged=_last_step(series.values()),
                checkpoint=left.newest,
                resumes=resume,
            )
        )
    return trial


def _note_first_rows(trial: Trial, before: Mapping[str, Series], after: Mapping[str, Series]) -> None:
    """Keep what the newest start logged first, and whether that was the run's first step again."""
    kill, number = trial.kills[-1], trial.starts[-1].number
    anew = False
    for path, series in after.items():
        earlier = before.get(path, Series())
        row = first_new_row(earlier, series)
        trial.first_rows.setdefault(path, [None] * (number - 2)).append(row)
        anew |= row is not None and len(earlier.by_step) > 1 and series.step(row) == min(earlier.by_step)
    # A checkpoint of step 0 is one of the beginning.
    if anew and kill.resumes and (any(kill.checkpoint) or not kill.checkpoint):
        trial.began_anew.append(number)


def _last_step(series: Iterable[Series]) -> str:
    """Of the longest series."""
    longest = max(series, key=lambda one: len(one.rows), default=Series())
    return "" if longest.last is None else told(longest.last)
