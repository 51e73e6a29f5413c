"""What the tests of the journal share: identities, chunks of rollouts, and a view of a whole journal."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rollforward.grpo.types import RolloutChunk, TokenBatch, UpdateOutcome
from rollforward.position import Position
from rollforward.replay.inheriting import JournalReport
from rollforward.replay.rollout_log import JournaledRollouts, LogSettings, open_rollout_log
from rollforward.storage import Storage
from rollforward.store.journal.records import Identity

SETTINGS = LogSettings(chunks_per_step=2, steps_per_epoch=10)


def identity(incarnation: int, *, rank: int = 0, world_size: int = 1, **others: Any) -> Identity:
    values: dict[str, Any] = {
        "run_id": "run",
        "fingerprint": "f",
        "versions": {"numpy": "1.26"},
        "device": "CPU",
        **others,
    }
    return Identity(incarnation=incarnation, rank=rank, world_size=world_size, **values)


def chunk(
    seed: int,
    *,
    prompts: int = 2,
    generations: int = 3,
    width: int = 5,
    length: int = 7,
    vocabulary: int = 300,
) -> RolloutChunk:
    """Rollouts like the trainer's: left-padded prompts, the same for a group; right-padded completions."""
    rng = np.random.default_rng(seed)
    samples = prompts * generations
    prompt_mask = np.repeat(
        np.arange(width) >= width - rng.integers(1, width + 1, prompts)[:, None], generations, axis=0
    )
    prompt_ids = np.repeat(rng.integers(1, vocabulary, (prompts, width)), generations, axis=0)
    lengths = rng.integers(1, length + 1, samples)
    mask = np.arange(length) < lengths[:, None]
    return RolloutChunk(
        prompt_indices=np.repeat(rng.integers(0, 1000, prompts), generations).astype(np.int32),
        tokens=TokenBatch(
            prompt_ids=np.where(prompt_mask, prompt_ids, 0).astype(np.int32),
            prompt_mask=prompt_mask,
            completion_ids=np.where(mask, rng.integers(1, vocabulary, mask.shape), 0).astype(np.int32),
            completion_mask=mask,
        ),
        stopped=lengths < length,
        rewards=rng.random((samples, 2), dtype=np.float32),
        reference_logprobs=np.where(mask, -rng.random(mask.shape), 0).astype(np.float32),
    )


def arrays_of(rollouts: RolloutChunk) -> dict[str, np.ndarray]:
    tokens = rollouts.tokens
    return {
        "prompt_indices": rollouts.prompt_indices,
        "prompt_ids": tokens.prompt_ids,
        "prompt_mask": tokens.prompt_mask,
        "completion_ids": tokens.completion_ids,
        "completion_mask": tokens.completion_mask,
        "stopped": rollouts.stopped,
        "rewards": rollouts.rewards,
        "reference_logprobs": rollouts.reference_logprobs,
    }


def assert_same_chunk(found: RolloutChunk | None, expected: RolloutChunk) -> None:
    """Equal to the last bit, in dtype, shape and layout."""
    assert found is not None
    for name, array in arrays_of(expected).items():
        other = arrays_of(found)[name]
        assert (other.dtype, other.shape) == (array.dtype, array.shape), name
        assert other.flags.c_contiguous, name
        assert other.tobytes() == array.tobytes(), name


def outcome(seed: int) -> UpdateOutcome:
    """Numbers that a decimal notation would spoil."""
    rng = np.random.default_rng(seed)
    loss, grad_norm, kl, clip = rng.random(4).tolist()
    return UpdateOutcome(
        loss=loss, grad_norm=grad_norm, kl=kl, clip_fraction=clip, logprobs=np.zeros((0, 0), np.float32)
    )


def open_log(
    storage: Storage,
    incarnation: int,
    start: Position,
    checkpoint: tuple[int, Position] | None = None,
    *,
    sources: tuple[Storage, ...] | None = None,
    inherit_before: Position | None = None,
    settings: LogSettings = SETTINGS,
    all_gather: Callable[[Any], list[Any]] = lambda value: [value],
    notice: Callable[[str], None] = lambda _: None,
    weights_digest: Callable[[], str] = lambda: "",
    **about: Any,
) -> tuple[JournaledRollouts, JournalReport]:
    """A start of the run on one rank."""
    return open_rollout_log(
        sources=(storage,) if sources is None else sources,
        storage=storage,
        identity=identity(incarnation, **about),
        start=start,
        checkpoint=checkpoint,
        inherit_before=inherit_before,
        settings=settings,
        all_gather=all_gather,
        notice=notice,
        weights_digest=weights_digest,
    )


def run_step(
    log: JournaledRollouts,
    position: Position,
    seed: int | None = None,
    chunks: Iterable[int] = range(SETTINGS.chunks_per_step),
) -> None:
    """Chunks of a step, generated where the log lacks them, and its update."""
    seed = position.global_step(SETTINGS.steps_per_epoch) if seed is None else seed
    for number in chunks:
        if log.find(position, number) is None:
            log.append(position, number, chunk(10 * seed + number))
    log.record(position, 0, outcome(seed), 1e-3)
