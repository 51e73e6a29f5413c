"""Which prompts a worker sees at which step: a function of (seed, epoch), with no state.

An epoch is a permutation of the dataset, cut into steps; the remainder at its end (fewer
prompts than a step needs) is not used in that epoch. A step has `slots`, numbered over all
workers: worker `r` of `W` takes the r-th of `W` equal runs of them, and cuts it into chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollforward.errors import DataError
from rollforward.grpo.randomness import permutation
from rollforward.grpo.types import Prompt
from rollforward.position import Position


@dataclass(frozen=True, kw_only=True)
class PromptSchedule:
    """The prompts of every step of a run, for one worker."""

    prompts: Sequence[Prompt]
    seed: int
    chunk_size: int
    """Prompts in a chunk."""
    chunks_per_step: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the dataset has {len(self.prompts)} prompts, but one step needs {self.prompts_per_step}: "
                f"{self.world_size} workers x num_rollouts {self.chunks_per_step} "
                f"x chunk_size {self.chunk_size}",
                hint="use a larger dataset, or lower rl_config.chunk_size or rl_config.num_rollouts",
            )

    @property
    def prompts_per_step(self) -> int:
        """Over all workers."""
        return self.world_size * self.chunks_per_step * self.chunk_size

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in one pass over the dataset."""
        return len(self.prompts) // self.prompts_per_step

    def slots(self, chunk: int) -> range:
        """The places in a step, over all workers, of this worker's chunk."""
        first = (self.rank * self.chunks_per_step + chunk) * self.chunk_size
        return range(first, first + self.chunk_size)

    def chunk(self, position: Position, chunk: int) -> list[Prompt]:
        """The prompts of this worker's chunk at a position."""
        order = permutation(self.seed, position.epoch, len(self.prompts))
        start = position.step * self.prompts_per_step
        return [self.prompts[order[start + slot]] for slot in self.slots(chunk)]
