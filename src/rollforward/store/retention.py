"""Which checkpoints stay: a pure function from what there is to what to keep.

No clock, no disk. Whatever the policy says, the newest valid checkpoint is kept, so that
something to resume from is never the thing that is removed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from rollforward.position import Position


class Verdict(Enum):
    """What is known of a checkpoint."""

    VALID = "valid"
    INVALID = "invalid"
    """It was read, and proved to be bad."""
    UNKNOWN = "unknown"
    """It could not be read this time."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint as the policy sees it."""

    incarnation: int
    position: Position
    global_step: int = 0
    metric: float | None = None
    """For `Retention.best`; None when it carries none."""
    readable: bool = True
    """False when its manifest could not be read this time: no rule can be applied to it, so it stays."""


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


def keep_mask(
    candidates: Sequence[Candidate], retention: Retention, judge: Callable[[Candidate], Verdict]
) -> list[bool]:
    """For each candidate whether it stays.

    One is valid when its manifest proves intact and no file is missing. Only valid ones count towards
    `newest` and `best`. An invalid one is kept, as evidence, while it is newer than the oldest of the
    `newest` valid ones or there are not as many yet. One of which nothing is known stays wherever a valid
    one would, and takes no place. `judge` may be slow: it is asked of those only on which something depends.
    """
    if not 0 < retention.newest < len(candidates):
        return [True] * len(candidates)
    order = sorted(candidates, key=lambda item: (item.incarnation, item.position), reverse=True)
    keep = {item.position for item in order if not item.readable}
    found = 0
    for candidate in order:
        keep.add(candidate.position)
        found += judge(candidate) is Verdict.VALID
        if found == retention.newest:
            break
    if retention.every > 0:
        keep.update(
            item.position
            for item in order
            if item.position not in keep
            and item.global_step % retention.every == 0
            and judge(item) is not Verdict.INVALID
        )
    keep.update(item.position for item in _best(order, retention.best, judge))
    return [item.position in keep for item in candidates]


def _best(
    order: Sequence[Candidate], count: int, judge: Callable[[Candidate], Verdict]
) -> Iterator[Candidate]:
    """The valid ones with the greatest metric, of equals the first; and those between that may be valid."""
    ranked = [(item.metric, item) for item in order if item.metric is not None]
    for _, item in sorted(ranked, key=lambda pair: -pair[0]):
        if count <= 0:
            return
        verdict = judge(item)
        if verdict is not Verdict.INVALID:
            count -= verdict is Verdict.VALID
            yield item
