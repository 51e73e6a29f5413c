"""Which rollouts a page shows, and how much of each: a rule that the page tells.

Steps: the last, the first, the middle, then the middles between those, and so on, until the bytes are used up
that rollouts may take or `MOST_STEPS` are reached. So of a short run it is all of them. Of a step: the
prompts with the lowest and with the highest rewards, in turn, until the step's share of bytes is used up. Of
a text: its beginning. Steps that are asked for by name are shown whole, whatever that takes.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

from rollforward.errors import NothingToResume
from rollforward.inspection.history import Past
from rollforward.inspection.report.past import Number
from rollforward.inspection.rollouts import Sample, StepTexts, TextReader
from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.journal.history import index_steps

MOST_STEPS = 200
MOST_BYTES = 8 << 20
"""Of JSON, for all steps of a run that are sampled; it is packed to a fraction of that in a page."""
STEP_BYTES = 1 << 20
TEXT_CHARACTERS = 20_000


def steps_of(past: Past) -> list[Position]:
    """The steps that the journal still has of the run's newest history, in order."""
    return sorted({position for start in past.starts for position, _ in start.steps()})


def spread_out(count: int) -> Iterator[int]:
    """0 to `count` - 1: the last, the first, the middle, the middles between those, ..., each once."""
    if count:
        yield count - 1
    if count > 1:
        yield 0
    between = [(0, count - 1)]
    while between:
        for low, high in between:
            if high - low > 1:
                yield (low + high) // 2
        halves = [((low, (low + high) // 2), ((low + high) // 2, high)) for low, high in between]
        between = [part for pair in halves for part in pair if part[1] - part[0] > 1]


def as_json(
    storage: Storage,
    past: Past,
    number: Number,
    *,
    whole: Collection[Position] = (),
    most_bytes: int = MOST_BYTES,
) -> dict[str, Any]:
    """The rollouts of a page: a value for each step, and the rule by which they were chosen."""
    there = steps_of(past)
    sampled = [there[at] for at, _ in zip(spread_out(len(there)), range(MOST_STEPS), strict=False)]
    shown: dict[Position, dict[str, Any]] = {}
    problems: dict[str, None] = {}
    wanted = [*dict.fromkeys([*whole, *sampled])]
    index = {rank: index_steps(starts, frozenset(wanted)) for rank, starts in past.by_rank.items()}
    reader = TextReader(storage, index)
    for position in wanted:
        if most_bytes <= 0 and position not in whole:
            break
        try:
            step = reader.read(position)
        except NothingToResume as error:
            problems[error.message.partition("\n")[0]] = None
            continue
        problems |= dict.fromkeys(step.problems)
        if not step.samples:
            continue
        value = _step(step, number(position), whole=position in whole)
        if position not in whole:
            most_bytes -= value["bytes"]
        shown[position] = value
    return {
        "steps": [shown[position] for position in sorted(shown)],
        "there": len(there),
        "all": len(shown) == len(there),
        "first": str(there[0]) if there else "",
        "last": str(there[-1]) if there else "",
        "problems": [line[:2000] for line in problems][:100],
    }


def _step(step: StepTexts, number: int, *, whole: bool) -> dict[str, Any]:
    verifiers = sorted({name for sample in step.samples for name in sample.rewards})
    groups = [list(group) for _, group in groupby(step.samples, key=_group)]
    kept: dict[int, dict[str, Any]] = {}
    size = 0
    for at in _worst_and_best(groups):
        value = _as_json(groups[at], verifiers, None if whole else TEXT_CHARACTERS)
        size += len(json.dumps(value))
        if not whole and kept and size > STEP_BYTES:
            break
        kept[at] = value
    return {
        "position": str(step.position),
        "step": number,
        "verifiers": verifiers,
        "groups": [kept[at] for at in sorted(kept)],
        "of": len(groups),
        "bytes": size,
    }


def _group(sample: Sample) -> tuple[int, int, int, str]:
    return sample.rank, sample.chunk, sample.prompt_index, sample.prompt


def _worst_and_best(groups: Sequence[Sequence[Sample]]) -> Iterator[int]:
    """The groups: that with the lowest reward in it, that with the highest, the second lowest, ..."""
    rising = sorted(range(len(groups)), key=lambda at: min(sample.reward for sample in groups[at]))
    while rising:
        yield rising.pop(0)
        if rising:
            yield rising.pop()


def _as_json(group: Sequence[Sample], verifiers: Sequence[str], most: int | None) -> dict[str, Any]:
    first = group[0]
    return {
        "prompt": first.prompt[:most],
        "more": _more(first.prompt, most),
        "where": [first.rank, first.chunk, first.prompt_index],
        "completions": [
            {
                "text": sample.completion[:most],
                "more": _more(sample.completion, most),
                "reward": sample.reward,
                "rewards": [sample.rewards.get(name) for name in verifiers],
                "advantage": sample.advantage,
                "tokens": sample.tokens,
                "stopped": sample.stopped,
            }
            for sample in group
        ],
    }


def _more(text: str, most: int | None) -> int:
    """How many characters of a text are not shown."""
    return 0 if most is None else max(0, len(text) - most)
