"""Which checkpoints stay: a pure function from what there is to what to keep.

No clock, no disk. Whatever the policy says, the newest valid checkpoint is kept, so that
something to resume from is never the thing that is removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollforward.position import Position


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint as the policy sees it."""

    incarnation: int
    position: Position
    global_step: int = 0
    valid: bool = True
    """False when its manifest cannot be read or a file is missing."""
    metric: float | None = None
    """For `Retention.best`; None when it carries none."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What to keep; a checkpoint stays when any of the rules wants it."""

    newest: int = 5
    """This many of the newest (`save_max_ckpt_num`); 0 keeps all."""
    every: int = 0
    """Those whose global step is a multiple of this; 0 for none."""
    best: int = 0
    """This many with the greatest metric; of equals the newest."""
    metric: str = "reward"
    """Which of the figures that checkpoints carry (`Manifest.metrics`) `best` goes by."""


def keep_mask(candidates: Sequence[Candidate], retention: Retention) -> list[bool]:
    """For each candidate whether it stays.

    Only valid ones count towards `newest` and `best`. An invalid one is kept, as evidence, while
    it is newer than the oldest of the `newest` valid ones or there are not as many yet.
    """
    order = sorted(
        range(len(candidates)),
        key=lambda i: (candidates[i].incarnation, candidates[i].position),
        reverse=True,
    )
    valid = [i for i in order if candidates[i].valid]
    if not valid or retention.newest <= 0:
        return [True] * len(candidates)
    newest = valid[: retention.newest]
    keep = set(newest)
    keep.update(order if len(valid) < retention.newest else order[: order.index(newest[-1])])
    if retention.every > 0:
        keep.update(i for i in valid if candidates[i].global_step % retention.every == 0)
    ranked = sorted(
        (i for i in valid if candidates[i].metric is not None),
        key=lambda i: (candidates[i].metric or 0.0, candidates[i].incarnation, candidates[i].position),
        reverse=True,
    )
    keep.update(ranked[: retention.best])
    return [i in keep for i in range(len(candidates))]
