"""Warns once when a verifier has given every sample of many steps the same reward.

Such a verifier teaches nothing: all advantages are zero. Often it cannot read what the model writes
(the chat template opens `<think>` in the prompt, the answer is in other words), and days of
training pass at reward 0. But the task may simply be solved, so it is only a warning.

`SameRewards` sees the rewards of its own worker's samples as they are scored, and, as an observer, the
mean over all workers at the end of each step. A step counts when all samples that were scored
here have one reward and the mean of all workers is that reward too; any other starts the count
again. A step whose rewards all came from the journal (replayed, or its chunks were taken over) was not seen
here: it is skipped, unless its mean is different, which starts the count again. Each start of the run counts
from 0, and reports for itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rollforward.grpo.types import Floats, Prompt
from rollforward.position import Position
from rollforward.verifiers.scoring import shown

STEPS = 20
"""This many steps in a row trigger a report."""
_SAMPLES = 3

Scorer = Callable[[Sequence[Prompt], Sequence[str]], Floats]


@dataclass
class _Verifier:
    name: str
    reward: float | None = None
    """The reward of all samples since `since`."""
    since: Position | None = None
    steps: int = 0
    told: bool = False
    own: list[float] = field(default_factory=list)
    """The different rewards of this step's samples; two are enough to know."""

    def ends_step(self, position: Position, mean: float | None) -> bool:
        """Count the step; whether it is the one at which to report."""
        own, self.own = self.own, []
        if len(own) > 1 or (own and mean is not None and not _same(own[0], mean)):
            self.reward, self.steps = None, 0
        elif own and own[0] != self.reward:
            self.reward, self.since, self.steps = own[0], position, 1
        elif own:
            self.steps += 1
        elif self.reward is not None and mean is not None and not _same(self.reward, mean):
            self.reward, self.steps = None, 0
        return not self.told and self.steps >= STEPS


class SameRewards:
    """Wraps the scoring of samples (`watching`), and is an `Observer` of the steps.

    `say` takes a line for the log. Every worker may have one; only the first worker's must be shown.
    """

    def __init__(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        self._verifiers = [_Verifier(name) for name in names]
        self._say = say
        self._samples: list[tuple[Prompt, str]] = []

    def watching(self, score: Scorer) -> Scorer:
        """`score`, whose rewards are noted here on their way through."""

        def watched(prompts: Sequence[Prompt], completions: Sequence[str]) -> Floats:
            rewards = score(prompts, completions)
            for column, verifier in enumerate(self._verifiers):
                different = {*verifier.own, *np.unique(rewards[:, column]).tolist()}
                verifier.own = sorted(different)[:2]
            self._samples = _of_different_prompts(prompts, completions)
            return rewards

        return watched

    def phase(self, position: Position, name: str) -> None:
        """Nothing to count."""

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Count the step, and report what has come to `STEPS` of them."""
        for verifier in self._verifiers:
            if verifier.ends_step(position, metrics.get(f"reward/{verifier.name}")):
                verifier.told = True
                self._say(self._report(verifier, position))

    def _report(self, verifier: _Verifier, position: Position) -> str:
        lines = [
            f"warning: verifier {verifier.name} gave every sample of {verifier.steps} steps in a row the "
            f"same reward, {verifier.reward:g} ({verifier.since} to {position}), so nothing is learned "
            "from it. Can it read what the model writes? Samples of the last step:"
        ]
        lines += [
            f"prompt {prompt.index}: {shown(prompt.text, tail=True)} -> {shown(text, tail=True)}, "
            f"expected {shown(prompt.answer)}"
            for prompt, text in self._samples
        ]
        return "\n  ".join(lines)


def _same(reward: float, mean: float) -> bool:
    # The mean is of float32 rewards, added in float64 and divided: equal except for its last bits.
    return abs(reward - mean) <= 1e-9 * max(abs(reward), abs(mean))


def _of_different_prompts(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[tuple[Prompt, str]]:
    """Three samples, from different prompts if possible."""
    seen: set[int] = set()
    first: list[tuple[Prompt, str]] = []
    rest: list[tuple[Prompt, str]] = []
    for prompt, text in zip(prompts, completions, strict=True):
        (rest if prompt.index in seen else first).append((prompt, text))
        seen.add(prompt.index)
    return [*first, *rest][:_SAMPLES]
