"""A verifier that tells no sample from another is reported: once, with samples, and only when it is so."""

from collections.abc import Sequence

import numpy as np

from rollforward.grpo.ports import Observer
from rollforward.grpo.types import Floats, Prompt
from rollforward.position import Position
from rollforward.verifiers.sameness import STEPS, SameRewards

PROMPTS = [
    Prompt(index=40 + row // 2, text=f"{row // 2}+1=<think>\n", token_ids=(1,), answer=str(row // 2 + 1))
    for row in range(8)
]
COMPLETIONS = [f"sample {row}" for row in range(8)]
NAMES = ("accuracy_reward", "format_reward")


class Steps:
    """A run of two verifiers, seen from one of its workers: the first differs, the second does not."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.watch = SameRewards(NAMES, self.said.append)
        self.rewards = np.zeros((8, 2), dtype=np.float32)
        self.rewards[::2, 0] = 1.0
        self._score = self.watch.watching(self._scores)
        self._step = 0

    def _scores(self, _prompts: Sequence[Prompt], completions: Sequence[str]) -> Floats:
        return self.rewards[: len(completions)]

    def run(self, steps: int, *, chunks: int = 2, others: float | None = None) -> None:
        """Steps of so many chunks that are scored here; `others` is what the other workers' mean is."""
        for _ in range(steps):
            for _ in range(chunks):
                assert self._score(PROMPTS, COMPLETIONS) is not None
            means = self.rewards.mean(axis=0, dtype=np.float64) if others is None else (0.5, others)
            metrics = {f"reward/{name}": float(mean) for name, mean in zip(NAMES, means, strict=True)}
            self.watch.step(Position(0, self._step), metrics)
            self._step += 1


def test_a_verifier_that_tells_nothing_apart_is_reported_once_with_three_samples() -> None:
    steps = Steps()
    steps.run(STEPS - 1)
    assert steps.said == []
    steps.run(1)
    [report] = steps.said
    first, *samples = report.split("\n  ")
    assert first.startswith(
        "warning: verifier format_reward gave every sample of 20 steps in a row the same reward, 0 "
    )
    assert "(0_0 to 0_19)" in first
    assert samples == [
        r"prompt 40: '0+1=<think>\n' -> 'sample 0', expected '1'",
        r"prompt 41: '1+1=<think>\n' -> 'sample 2', expected '2'",
        r"prompt 42: '2+1=<think>\n' -> 'sample 4', expected '3'",
    ]
    steps.run(3 * STEPS)
    assert len(steps.said) == 1


def test_one_other_sample_starts_the_count_again() -> None:
    steps = Steps()
    steps.run(STEPS - 1)
    steps.rewards[5, 1] = 0.25
    steps.run(1)
    steps.rewards[5, 1] = 0.0
    steps.run(STEPS - 1)
    assert steps.said == []
    steps.run(1)
    assert "(0_20 to 0_39)" in steps.said[0]


def test_another_value_for_all_starts_the_count_again() -> None:
    steps = Steps()
    steps.run(STEPS - 1)
    steps.rewards[:, 1] = 0.1
    steps.run(STEPS - 1)
    assert steps.said == []
    steps.run(1)
    assert "the same reward, 0.1 (0_19 to 0_38)" in steps.said[0]


def test_what_other_workers_samples_have_counts_too() -> None:
    """Every sample of this worker has 0, but the mean over all workers says that others have not."""
    steps = Steps()
    steps.run(2 * STEPS, others=0.125)
    assert steps.said == []


def test_a_replayed_step_is_passed_over() -> None:
    """Its rewards are in the journal and were not seen here: it neither counts nor starts the count again."""
    steps = Steps()
    steps.run(STEPS - 1)
    steps.run(STEPS, chunks=0)
    assert steps.said == []
    steps.run(1)
    assert len(steps.said) == 1


def test_a_replayed_step_with_another_mean_starts_the_count_again() -> None:
    steps = Steps()
    steps.run(STEPS - 1)
    steps.run(1, chunks=0, others=0.5)
    steps.run(STEPS - 1)
    assert steps.said == []


def test_samples_are_of_one_prompt_where_there_is_one_only() -> None:
    said: list[str] = []
    watch = SameRewards(["mine"], said.append)
    score = watch.watching(lambda _prompts, completions: np.zeros((len(completions), 1), dtype=np.float32))
    observer: Observer = watch
    for step in range(STEPS):
        score(PROMPTS[:2], COMPLETIONS[:2])
        observer.phase(Position(0, step), "verify")
        observer.step(Position(0, step), {"reward/mine": 0.0})
    assert said[0].count("prompt 40: ") == 2
