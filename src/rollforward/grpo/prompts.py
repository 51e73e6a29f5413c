"""Which prompts a chunk of a step has: a function of (seed, epoch), with no state.

An epoch is a permutation of the dataset, cut into steps; the remainder at its end (fewer
prompts than a step needs) is not used in that epoch. A step is cut into chunks, numbered over
the whole step: which worker takes which makes no difference here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollforward.errors import DataError
from rollforward.grpo.randomness import permutation
from rollforward.grpo.types import Prompt
from rollforward.position import Position


@dataclass(frozen=True, kw_only=True)
class PromptSchedule:
    """The prompts of every step of a run."""

    prompts: Sequence[Prompt]
    seed: int
    chunk_size: int
    """Prompts in a chunk."""
    chunks_per_step: int
    """Over all workers."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the dataset has {len(self.prompts)} prompts, but one step needs {self.prompts_per_step}: "
                f"{self.chunks_per_step} chunks (workers x num_rollouts) x chunk_size {self.chunk_size}",
                hint="use a larger dataset, or lower rl_config.chunk_size or rl_config.num_rollouts",
            )

    @property
    def prompts_per_step(self) -> int:
        """Over all workers."""
        return self.chunks_per_step * self.chunk_size

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in one pass over the dataset."""
        return len(self.prompts) // self.prompts_per_step

    def slots(self, chunk: int) -> range:
        """The places of a chunk's prompts in a step."""
        return range(chunk * self.chunk_size, (chunk + 1) * self.chunk_size)

    def chunk(self, position: Position, chunk: int) -> list[Prompt]:
        """The prompts of a chunk at a position."""
        order = permutation(self.seed, position.epoch, len(self.prompts))
        start = position.step * self.prompts_per_step
        return [self.prompts[order[start + slot]] for slot in self.slots(chunk)]
