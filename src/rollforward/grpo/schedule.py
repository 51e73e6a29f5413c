"""The learning rate: linear warm-up, then half a cosine from `lr` down to `min_lr`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A function of the number of finished optimizer steps.

    With warm-up length W and decay length D (both in optimizer steps), at step n:
    `lr * (n + 1) / W` while n < W; then `min_lr + (lr - min_lr) * (1 + cos(pi * t)) / 2` with
    t = (n - W) / (D - W), held at `min_lr` once n >= D.
    """

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int

    def at(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if step >= self.decay_steps:
            return self.min_lr
        progress = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
