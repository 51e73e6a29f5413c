"""Which checkpoints stay: a pure function from the existing checkpoints to those to keep.

No clock, no disk. Whatever the policy says, the newest valid checkpoint is kept, so there is
always something to resume from.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from rollforward.position import Position


class Verdict(Enum):
    """What is known about a checkpoint."""

    VALID = "valid"
    INVALID = "invalid"
    """It was read and found to be bad."""
    UNKNOWN = "unknown"
    """It could not be read this time."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint as the policy sees it."""

    incarnation: int
    position: Position
    global_step: int = 0
    metric: float | None = None
    """For `Retention.best`; None when it has none."""
    readable: bool = True
    """False when its manifest could not be read this time: no rule applies to it, so it stays."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What to keep; a checkpoint stays if any of the rules keeps it."""

    newest: int = 5
    """This many of the newest (`save_max_ckpt_num`); 0 keeps all."""
    every: int = 0
    """Those whose global step is a multiple of this; 0 keeps none."""
    best: int = 0
    """This many with the highest metric; the newest wins a tie."""
    metric: str = "reward"
    """The metric that `best` uses, one of those in checkpoints (`Manifest.metrics`)."""


def keep_mask(
    candidates: Sequence[Candidate], retention: Retention, judge: Callable[[Candidate], Verdict]
) -> list[bool]:
    """For each candidate, whether it stays.

    A candidate is valid when its manifest is intact and no file is missing. Only valid ones count towards
    `newest` and `best`. An invalid one is kept, as evidence, while it is newer than the oldest of the
    `newest` valid ones or there are not yet that many. An unknown one stays if a valid one would, and does
    not count. `judge` may be slow, so it is called only when the result depends on it.
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
    """The valid ones with the highest metric, the first of equals; and those in between that may be valid."""
    ranked = [(item.metric, item) for item in order if item.metric is not None]
    for _, item in sorted(ranked, key=lambda pair: -pair[0]):
        if count <= 0:
            return
        verdict = judge(item)
        if verdict is not Verdict.INVALID:
            count -= verdict is Verdict.VALID
            yield item
