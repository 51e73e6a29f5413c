"""TRL's GRPOTrainer that survives: `from rollforward.trl import GRPOTrainer` instead of `from trl`.

    trainer = GRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(output_dir="output/run", ...), ...)
    trainer.train()                # new, or resumed from whatever output/run holds

Promise: killed anywhere and started again, the run ends with the same bytes as one that was never
interrupted, and that one with the same as TRL's own trainer. No finished rollout is generated or rewarded
again.

    trainer        the trainer: what it overrides of TRL's and transformers', and in which order
    session        one start of a run: what is recorded, saved and restored, and when
    generation     what one call of TRL's `_generate_and_score_completions` gives and does, as a record
    progress       what TRL's trainer needs to continue, besides its tensors
    order          the order of the data, by epoch
    facts          what reaches the numbers
    compatibility  the versions and methods that all of this was written for, and what it refuses
    exporting      a checkpoint as TRL's own `checkpoint-N`

What is exact, and what cannot be: docs/how-to/trl.md.
"""

from rollforward.trl.exporting import export_checkpoint
from rollforward.trl.session import Recovery
from rollforward.trl.trainer import GRPOTrainer

__all__ = ["GRPOTrainer", "Recovery", "export_checkpoint"]
