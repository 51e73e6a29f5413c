"""The rollouts of one step in readable form: prompts, completions and rewards as text.

The tokenizer is the one that the run keeps beside its checkpoints, so only the run's folder is needed.
The texts are those the verifiers saw: without special tokens. The core does not install a library that
reads tokenizers: without one, token ids are shown instead, and a problem says so.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollforward.grpo.advantages import centred_advantages, standardised_advantages
from rollforward.inspection.steps import JournaledChunk, Made, index_step, step_in
from rollforward.models.config import CONFIG_FILE
from rollforward.position import Position
from rollforward.replay.codec import RecordedOutcome
from rollforward.replay.once import EVALUATION
from rollforward.storage import Storage
from rollforward.store import Manifest, find, locate_attachments
from rollforward.store.journal.reading import JournalView

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion."""

    rank: int
    chunk: int
    """Its number in the step; in journals of format version 1, among the rank's own."""
    sample: int
    """Its number in the chunk."""
    prompt_index: int
    """Its prompt's number in the dataset; where that is not known, among the prompts of the chunk."""
    prompt: str
    completion: str
    reward: float
    """From all verifiers together, weighted as the run's configuration says."""
    rewards: Mapping[str, float]
    """From each verifier, unweighted."""
    advantage: float | None
    """Compared with the other completions of its prompt, as the update used it; None where not known."""
    tokens: int
    """Tokens in the completion."""
    stopped: bool
    """Whether it ended by itself; otherwise it was cut at the maximum length."""


@dataclass(frozen=True, kw_only=True)
class StepTexts:
    """A step in readable form."""

    position: Position
    samples: tuple[Sample, ...]
    """By chunk and number."""
    outcomes: Mapping[int, RecordedOutcome]
    """By iteration: the results of the updates."""
    made: tuple[Made, ...]
    """From an `open_run` loop, where only the loop knows what its arrays mean; samples are from its JSON."""
    numbers: Mapping[int, Mapping[str, float]]
    """Rank -> outcome, from such a loop."""
    problems: tuple[str, ...]
    """What could not be read, one line each."""


def read_texts(storage: Storage, position: Position) -> StepTexts:
    """The rollouts of a step; NothingToResume, listing what there is, when the journal has none."""
    return TextReader(storage, index_step(storage, position)).read(position)


class TextReader:
    """Reads the texts of several steps, and the tokenizer once; `index` says where their records are."""

    def __init__(self, storage: Storage, index: Mapping[int, JournalView]) -> None:
        self._storage = storage
        self._index = index
        self._tools: tuple[Manifest, Decode, list[str]] | None = None

    def read(self, position: Position) -> StepTexts:
        """One of the steps, like `read_texts`."""
        step = step_in(self._storage, self._index, position)
        samples: tuple[Sample, ...] = ()
        missing: list[str] = []
        if step.chunks:
            if self._tools is None:
                manifest = find(self._storage).manifest
                self._tools = manifest, *_decoder(self._storage, manifest)
            manifest, decode, missing = self._tools
            samples = tuple(
                sample for chunk in step.chunks for sample in _samples(chunk, decode, _facts(chunk, manifest))
            )
        samples += tuple(sample for made in step.made if made.name != EVALUATION for sample in _told(made))
        return StepTexts(
            position=position,
            samples=samples,
            outcomes=step.outcomes,
            made=step.made,
            numbers=step.numbers,
            problems=(*step.problems, *missing),
        )


def worst(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Those with the lowest rewards, lowest first."""
    return sorted(samples, key=lambda sample: sample.reward)[:count]


def _told(made: Made) -> Iterator[Sample]:
    """The samples that a loop tells of in its JSON: lists of one item a completion.

    `prompts` and `completions` (texts, or messages), and `rewards`, a list for each function, null where it
    gave none; `advantages`, `tokens` and `stopped` where they are known.
    """
    info = made.info if isinstance(made.info, dict) else {}
    prompts, completions, rewards = (info.get(name) for name in ("prompts", "completions", "rewards"))
    if not (isinstance(prompts, list) and isinstance(completions, list) and isinstance(rewards, dict)):
        return
    tokens, stopped, advantages = (info.get(name, []) for name in ("tokens", "stopped", "advantages"))
    columns = [prompts, completions, *rewards.values()]
    columns += [column or prompts for column in (tokens, stopped, advantages)]
    if not all(isinstance(column, list) and len(column) == len(prompts) for column in columns):
        return
    numbers: dict[str, int] = {}
    for number, (prompt, completion) in enumerate(
        zip(map(_text, prompts), map(_text, completions), strict=True)
    ):
        each = {name: _number(column[number]) for name, column in rewards.items()}
        given = {name: reward for name, reward in each.items() if reward is not None}
        yield Sample(
            rank=made.rank,
            chunk=made.chunk,
            sample=number,
            prompt_index=numbers.setdefault(prompt, len(numbers)),
            prompt=prompt,
            completion=completion,
            reward=sum(given.values()),
            rewards=given,
            advantage=_number(advantages[number]) if advantages else None,
            tokens=int(_number(tokens[number]) or 0) if tokens else 0,
            stopped=bool(stopped[number]) if stopped else True,
        )


def _number(value: Any) -> float | None:
    """What a loop told, if it is a number that a float holds."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def _text(said: Any) -> str:
    """A text; of messages, what each says, with its role before it if there are several."""
    if not isinstance(said, list):
        return said if isinstance(said, str) else json.dumps(said)
    messages = [each if isinstance(each, dict) else {"content": each} for each in said]
    lines = [
        each["content"] if isinstance(each.get("content"), str) else json.dumps(each) for each in messages
    ]
    if len(messages) == 1:
        return lines[0]
    return "\n".join(f"{each.get('role', '')}: {line}" for each, line in zip(messages, lines, strict=True))


def _decoder(storage: Storage, manifest: Manifest) -> tuple[Decode, list[str]]:
    """A function from token ids to text, and what it lacks, one line each."""
    located = locate_attachments(storage, manifest)
    if CONFIG_FILE not in located.contents:
        line = f"token ids are shown, not text: checkpoint {manifest.position} carries no {CONFIG_FILE}"
        return _as_numbers, [line]
    try:
        from rollforward.data.tokenizer import Tokenizer
    except ModuleNotFoundError as error:
        line = (
            f"token ids are shown, not text: {error.name} is not installed (pip install 'rollforward[train]')"
        )
        return _as_numbers, [line]
    return Tokenizer(Path(str(storage)) / located.folder, carried=located.contents).decode, []


def _as_numbers(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _facts(chunk: JournaledChunk, manifest: Manifest) -> Mapping[str, Any]:
    """The configuration's, if the chunk was made with the checkpoint's configuration; else none."""
    facts: Any = manifest.state.get("facts")
    same = manifest.fingerprint == chunk.identity.fingerprint and isinstance(facts, dict)
    return facts if same else {}


def _weights(facts: Mapping[str, Any], count: int) -> Sequence[float]:
    """Of each verifier; 1 where it is not known."""
    given = facts.get("reward_config.verifier_weight")
    return given if isinstance(given, list) and len(given) == count else [1.0] * count


def _advantages(facts: Mapping[str, Any], rewards: Sequence[float]) -> Sequence[float | None]:
    """Of a chunk's samples, as the trainer computes them; None where the configuration is not known."""
    size, standardised = facts.get("rl_config.num_generations"), facts.get("rl_config.advantage_std")
    if type(size) is not int or size < 1 or len(rewards) % size or not isinstance(standardised, bool):
        return [None] * len(rewards)
    formula = standardised_advantages if standardised else centred_advantages
    return list(map(float, formula(np.array(rewards, np.float32), size)))


def _samples(chunk: JournaledChunk, decode: Decode, facts: Mapping[str, Any]) -> Iterator[Sample]:
    rollouts, tokens = chunk.rollouts, chunk.rollouts.tokens
    told = chunk.identity.about.get("verifiers")
    count = rollouts.rewards.shape[1]
    names = (
        told if isinstance(told, list) and len(told) == count else [f"verifier {n + 1}" for n in range(count)]
    )
    each = [[float(reward) for reward in row] for row in rollouts.rewards]
    weights = _weights(facts, count)
    totals = [sum(weight * reward for weight, reward in zip(weights, row, strict=True)) for row in each]
    advantages = _advantages(facts, totals)
    for number in range(len(rollouts.prompt_indices)):
        completion = tokens.completion_ids[number][tokens.completion_mask[number]]
        yield Sample(
            rank=chunk.rank,
            chunk=chunk.chunk,
            sample=number,
            prompt_index=int(rollouts.prompt_indices[number]),
            prompt=decode(tokens.prompt_ids[number][tokens.prompt_mask[number]].tolist()),
            completion=decode(completion.tolist()),
            reward=totals[number],
            rewards=dict(zip(map(str, names), each[number], strict=True)),
            advantage=advantages[number],
            tokens=len(completion),
            stopped=bool(rollouts.stopped[number]),
        )
