"""Goodput, useful time over all time, of a run that is killed again and again: a model, from measured costs.

A kill once in `KILL_EVERY` new steps, at any moment alike; a supervisor that starts the run again at
once. For a checkpoint interval of I steps, each kill costs on average

    restart                  process start, graphs, loading: until steps are done again, and a first slow step
    D x redo                 the steps since the checkpoint, replayed or generated and trained again
    the step under way       half of it; with a journal what generation had finished is kept

and each checkpoint what it holds up training. D is (I-1)/2 for saves that block. Ours go on while the next
step generates and are committed at its end, so that step is done again too if it is killed: D is (I+1)/2.

Left out: kills during a recovery, and waiting for a new machine; of all but `standby`, time to notice it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILL_EVERY = 20
INTERVALS = (1, 5, 20, 100)
COLOURS = {"standby": "#1b9e77", "replay": "#d95f02", "without journal": "#7570b3", "reload": "#666666"}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one way to go on, in seconds."""

    step: float
    """A new step."""
    update: float
    """The part of it that comes after its rollouts are finished."""
    restart: float
    redo: float
    """For each step that is done again."""
    save: float
    """By which a checkpoint holds up training."""
    chunks: int
    """In which its rollouts are generated and journaled, one after the other."""
    journal: bool
    shadow: bool
    """Whether saves go on while the next step generates."""

    def lost(self) -> float:
        """Of the step that was under way, on average."""
        if not self.journal:
            return self.step / 2
        generation = self.step - self.update
        return (generation**2 / self.chunks + self.update**2) / (2 * self.step)

    def goodput(self, interval: int) -> float:
        """In 0 ... 1."""
        again = (interval + (1 if self.shadow else -1)) / 2
        useful = KILL_EVERY * self.step
        kill = self.restart + again * self.redo + self.lost()
        return useful / (useful + KILL_EVERY / interval * self.save + kill)

    def seconds(self, *, steps: int, interval: int, again: Sequence[int]) -> float:
        """Of a run from its first step on, killed halfway through generations, with so many steps to redo."""
        halfway = (self.step - self.update) / 2
        kills = sum(halfway + self.restart + count * self.redo for count in again)
        return steps * self.step + steps // interval * self.save + kills


def table(costs: Mapping[str, Costs]) -> str:
    """A line a way."""
    lines = [f"{'goodput with checkpoints every':<32}" + "".join(f"{i:>4} steps" for i in INTERVALS)]
    for way, of in costs.items():
        lines.append(f"{way:<32}" + "".join(f"{of.goodput(interval):>10.1%}" for interval in INTERVALS))
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """For each model: time to the next new step in its parts, and goodput over the interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(12, 3.6 * len(results)), layout="constrained", squeeze=False
    )
    for row, (name, result) in zip(axes, results.items(), strict=True):
        draw_parts(row[0], name, result["recoveries"])
        draw_goodput(row[1], name, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_parts(axis: Any, name: str, recoveries: Mapping[str, Mapping[str, float]]) -> None:
    """A bar a way, in pieces."""
    ways = list(recoveries)
    left = [0.0] * len(ways)
    for part in next(iter(recoveries.values())):
        if part == "total":
            continue
        widths = [recoveries[way][part] for way in ways]
        axis.barh(ways, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(title=f"{name}: from the restart to the next new step", xlabel="seconds")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_goodput(axis: Any, name: str, result: Mapping[str, Any]) -> None:
    """A line a way, from the model, and crosses where real runs were measured."""
    intervals = range(1, INTERVALS[-1] + 1)
    for way, of in result["costs"].items():
        axis.plot(intervals, [100 * of.goodput(i) for i in intervals], color=COLOURS[way], label=way)
        axis.plot(INTERVALS, [100 * of.goodput(i) for i in INTERVALS], "o", color=COLOURS[way])
    for way, real in result.get("real", {}).items():
        label = f"{way}, measured"
        axis.plot(KILL_EVERY, 100 * real["goodput"], "x", color=COLOURS[way], markersize=11, label=label)
    axis.set(
        title=f"{name}: goodput, killed once in {KILL_EVERY} steps (model)",
        xlabel="steps between checkpoints",
        ylabel="% of the time",
        xscale="log",
        xticks=INTERVALS,
        xticklabels=INTERVALS,
        ylim=(0, 100),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
