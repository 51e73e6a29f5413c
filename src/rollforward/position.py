"""Where a run stands: the pair (epoch, step), the one term that every package shares.

A position names the *next* step to run. The checkpoint at `0_20` holds the state after 20
steps of epoch 0, and a resumed run starts with step 20. After an epoch's last step the
position is the next epoch's first step: with 20 steps per epoch, `1_0` follows `0_19`.
"""

import re
from typing import NamedTuple

_WRITTEN = re.compile(r"(0|[1-9]\d{0,17})_(0|[1-9]\d{0,17})", re.ASCII)


class Position(NamedTuple):
    """The next step to run. Sorts in the order in which steps run."""

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"{self.epoch}_{self.step}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Parse a position such as `0_20`; ValueError for anything else."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a position; one is written epoch_step, as in 0_20")
        return cls(int(match[1]), int(match[2]))

    def following(self, steps_per_epoch: int) -> "Position":
        """The position after this step."""
        if self.step + 1 >= steps_per_epoch:
            return Position(self.epoch + 1, 0)
        return Position(self.epoch, self.step + 1)

    def global_step(self, steps_per_epoch: int) -> int:
        """The number of steps completed at this position, over all epochs."""
        return self.epoch * steps_per_epoch + self.step
