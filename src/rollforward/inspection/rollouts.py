"""The rollouts of one step in readable form: prompts, completions and rewards as text.

The tokenizer is the one that the run keeps beside its checkpoints, so only the run's folder is needed.
The texts are those the verifiers saw: without special tokens. The core does not install a library that
reads tokenizers: without one, token ids are shown instead, and a problem says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollforward.inspection.steps import JournaledChunk, Made, read_step
from rollforward.models.config import CONFIG_FILE
from rollforward.position import Position
from rollforward.replay.codec import RecordedOutcome
from rollforward.storage import LocalStorage
from rollforward.store import Manifest, find, locate_attachments

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion."""

    rank: int
    chunk: int
    sample: int
    """Its number in the chunk."""
    prompt_index: int
    """Its prompt's number in the dataset."""
    prompt: str
    completion: str
    reward: float
    """From all verifiers together, weighted as the run's configuration says."""
    rewards: Mapping[str, float]
    """From each verifier, unweighted."""
    tokens: int
    """Tokens in the completion."""
    stopped: bool
    """Whether it ended by itself; otherwise it was cut at the maximum length."""


@dataclass(frozen=True, kw_only=True)
class StepTexts:
    """A step in readable form."""

    position: Position
    samples: tuple[Sample, ...]
    """By rank, chunk and number."""
    outcomes: Mapping[int, RecordedOutcome]
    """By iteration: the results of the updates."""
    made: tuple[Made, ...]
    """From an `open_run` loop, where only the loop knows what its arrays mean: no samples then."""
    numbers: Mapping[int, Mapping[str, float]]
    """Rank -> outcome, from such a loop."""
    problems: tuple[str, ...]
    """What could not be read, one line each."""


def read_texts(storage: LocalStorage, position: Position) -> StepTexts:
    """The rollouts of a step; NothingToResume, listing what there is, when the journal has none."""
    step = read_step(storage, position)
    samples: tuple[Sample, ...] = ()
    missing: list[str] = []
    if step.chunks:
        manifest = find(storage).manifest
        decode, missing = _decoder(storage, manifest)
        samples = tuple(
            sample for chunk in step.chunks for sample in _samples(chunk, decode, _weights(chunk, manifest))
        )
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


def _decoder(storage: LocalStorage, manifest: Manifest) -> tuple[Decode, list[str]]:
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
    return Tokenizer(Path(storage.root) / located.folder, carried=located.contents).decode, []


def _as_numbers(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _weights(chunk: JournaledChunk, manifest: Manifest) -> Sequence[float]:
    """The configuration's, if the chunk was made with the checkpoint's configuration; else 1 each."""
    count = chunk.rollouts.rewards.shape[1]
    facts: Any = manifest.state.get("facts")
    same = manifest.fingerprint == chunk.identity.fingerprint and isinstance(facts, dict)
    given = facts.get("reward_config.verifier_weight") if same else None
    return given if isinstance(given, list) and len(given) == count else [1.0] * count


def _samples(chunk: JournaledChunk, decode: Decode, weights: Sequence[float]) -> Iterator[Sample]:
    rollouts, tokens = chunk.rollouts, chunk.rollouts.tokens
    told = chunk.identity.about.get("verifiers")
    count = rollouts.rewards.shape[1]
    names = (
        told if isinstance(told, list) and len(told) == count else [f"verifier {n + 1}" for n in range(count)]
    )
    for number in range(len(rollouts.prompt_indices)):
        completion = tokens.completion_ids[number][tokens.completion_mask[number]]
        rewards = [float(reward) for reward in rollouts.rewards[number]]
        yield Sample(
            rank=chunk.rank,
            chunk=chunk.chunk,
            sample=number,
            prompt_index=int(rollouts.prompt_indices[number]),
            prompt=decode(tokens.prompt_ids[number][tokens.prompt_mask[number]].tolist()),
            completion=decode(completion.tolist()),
            reward=sum(weight * reward for weight, reward in zip(weights, rewards, strict=True)),
            rewards=dict(zip(map(str, names), rewards, strict=True)),
            tokens=len(completion),
            stopped=bool(rollouts.stopped[number]),
        )
