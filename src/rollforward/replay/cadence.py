"""After which steps a checkpoint begins: every so many, or as often as a share of the time pays for.

Young [1] and Daly [2] ask how much work should lie between two checkpoints. A save costs d seconds, a step
takes s, a failure comes every M seconds on average. With k steps from save to save, saving costs d / (k s) of
the time. In their setting a failure costs half an interval, k s / 2. Here nothing is lost: what lies beyond
the checkpoint is replayed, at r seconds a step, so it costs k r / 2. The sum of both shares,

    d / (k s)  +  k r / (2 M),     is least at     k = sqrt(2 d M / (r s)),

Young's formula where r = s. Nobody knows M. So `auto` is told which share p of the time saving may take:

    k = max(1, ceil(d / (p s)), ceil(w / s))

which is the best k for M = d r / (2 p^2 s); where failures are rarer it costs at most p more than the best.
w is how long the disk takes for a save: the next one begins when the last is written. All of it is measured
in this run: d is the time that training waited for the save, and the processor time of the thread that wrote
it, which is the most that it can have taken from the steps. The first save begins after the first step.

The first rank measures and decides; the others are told at a commit, with what they are told anyway. So all
ranks begin at the same step, although each has other figures. Nothing here reaches the numbers of a run.

[1] J. W. Young, A first order approximation to the optimum checkpoint interval. CACM 17(9), 1974
[2] J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps. FGCS 22(3), 2006
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rollforward.store.saved import Spent
from rollforward.wording import counted, in_bytes

Every = int | Literal["auto"]
"""Steps from one checkpoint to the next, or `auto`."""

SHARE = 0.02
"""Of the time, for saving; unless a run says otherwise."""
_SAVES, _STEPS = 5, 20
"""How many of the newest are looked at: the median of their figures counts."""
_NEAR = 1.5
"""An interval that differs by no more than this factor is not worth a change."""


def interval(*, cost: float, step: float, writing: float, share: float) -> int:
    """Steps from save to save; all in seconds. See the module's docstring."""
    step = max(step, 1e-9)
    return max(1, math.ceil(cost / (share * step)), math.ceil(writing / step))


class Cadence:
    """When the checkpoints of a run begin. All ranks ask alike, and are told alike (`follow`).

    `share`: for `auto`. `kept`: a multiple of this many steps that retention keeps; `auto` saves there too.
    """

    def __init__(
        self, *, share: float = SHARE, kept: int = 0, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.interval = 1
        """Of `auto`, in force."""
        self.why = ""
        """Why it is what it is, with figures; empty before the first save."""
        self._share = share
        self._kept = kept
        self._now = now
        self._begun: int | None = None
        """Steps done when the newest save began."""
        self._late = False
        """Whether a save that was due waits for the one before."""
        self._asked: tuple[int, float] | None = None
        """Steps done, and the time, when `due` was asked last."""
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._saves: deque[Spent] = deque(maxlen=_SAVES)

    def due(self, done: int, every: Every) -> bool:
        """Whether a checkpoint should begin after this many steps; asked after each."""
        self._clock(done)
        if every != "auto":
            return self._late or done % every == 0
        return self.must(done, every) or self._begun is None or done - self._begun >= self.interval

    def must(self, done: int, every: Every) -> bool:
        """Whether retention counts on the one that is due: then it is not put off."""
        at = self._kept if every == "auto" else math.lcm(self._kept, every)
        return at > 0 and done % at == 0

    def begun(self, done: int) -> None:
        """A save has begun."""
        self._begun, self._late = done, False

    def put_off(self) -> None:
        """What is due waits until the save before it is written."""
        self._late = True

    def advise(self, spent: Spent) -> dict[str, Any]:
        """The interval from now on, as this rank sees it after one more save; JSON."""
        self._saves.append(spent)
        if not self._steps:
            return {"interval": self.interval, "why": self.why}
        step = statistics.median(self._steps)
        blocked, processor, writing = (
            statistics.median(getattr(save, name) for save in self._saves)
            for name in ("blocked", "processor", "seconds")
        )
        found = interval(cost=blocked + processor, step=step, writing=writing, share=self._share)
        if self.why and self.interval / _NEAR <= found <= self.interval * _NEAR:
            found = self.interval
        why = (
            f"a save costs {blocked + processor:.3g} s (training waits {blocked:.3g} s, the writer computes "
            f"{processor:.3g} s) and takes {writing:.3g} s to write, a step takes {step:.3g} s, and saving "
            f"may cost {self._share:.3g} of the time"
        )
        return {"interval": found, "why": why}

    def follow(self, advice: Mapping[str, Any]) -> bool:
        """Take over what the first rank advises; whether that is another interval, or the first."""
        changed = not self.why or advice["interval"] != self.interval
        self.interval, self.why = advice["interval"], advice["why"]
        return changed and bool(self.why)

    def slow(self, done: int, every: int, took: float, size: int) -> str:
        """For the log: why checkpoints are further apart than was asked for."""
        steps = every * statistics.median(self._steps) if self._steps else 0.0
        return (
            f"checkpoints come less often than every {counted(every, 'step')}: after {done} steps the one "
            f"before was not written yet, {took:.3g} s after it began ({in_bytes(size)} on this worker), and "
            f"{counted(every, 'step')} take {steps:.3g} s. From now on no step waits for the disk: what is "
            "due begins when the last is written"
        )

    def _clock(self, done: int) -> None:
        now = self._now()
        if self._asked is not None and done > self._asked[0]:
            self._steps.append((now - self._asked[1]) / (done - self._asked[0]))
        self._asked = done, now
