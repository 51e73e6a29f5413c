"""Make the golden journal of format version 3: python tests/golden/journal/make.py

It is committed. A later version must go on reading it; when the format changes, its version goes
up and a folder is added here, and this one stays as it is. So do those before, made by this file as it was
then, with the same content: `version_1` of one rank; `version_2` with one segment more for each rank.
"""

from pathlib import Path

import numpy as np

from rollforward.grpo.types import RolloutChunk, TokenBatch, UpdateOutcome
from rollforward.position import Position
from rollforward.replay.codec import pack, pack_outcome
from rollforward.storage import LocalStorage
from rollforward.store.journal.reading import read_journal, read_journals
from rollforward.store.journal.records import Identity
from rollforward.store.journal.writing import Journal

FOLDER = Path(__file__).parent / "version_3"


def chunk(number: int) -> RolloutChunk:
    """Two prompts with two completions each; plain arithmetic, so that every machine agrees."""
    lengths = np.array([3, 1, 4, 2])
    mask = np.arange(4) < lengths[:, None]
    prompt_mask = np.arange(3) >= np.array([0, 0, 2, 2])[:, None]
    ids = np.arange(16, dtype=np.int32).reshape(4, 4) * 20_000 * number + 1
    prompt = np.array([[5, 6, 7], [5, 6, 7], [8, 8, 9], [8, 8, 9]], dtype=np.int32)
    return RolloutChunk(
        prompt_indices=np.array([10, 10, 3, 3], dtype=np.int32) + number,
        tokens=TokenBatch(
            prompt_ids=np.where(prompt_mask, prompt, 2).astype(np.int32),
            prompt_mask=prompt_mask,
            completion_ids=np.where(mask, ids, 2).astype(np.int32),
            completion_mask=mask,
        ),
        stopped=lengths < 4,
        rewards=np.array([[1, 0.5], [0, 0.25], [1, 0], [0, 0]], dtype=np.float32) * (number + 1),
        reference_logprobs=np.where(mask, -1 / (1 + ids % 7), 0).astype(np.float32),
    )


def outcome(step: int) -> UpdateOutcome:
    """Numbers that have no short decimal form."""
    return UpdateOutcome(
        loss=-step / 3, grad_norm=step / 7, kl=1e-300 * step, clip_fraction=0.0, logprobs=np.zeros((4, 4))
    )


def identity(incarnation: int, rank: int = 0, world_size: int = 1, chunks: int | None = 2) -> Identity:
    """The same run, started again."""
    return Identity(
        run_id="golden",
        rank=rank,
        world_size=world_size,
        incarnation=incarnation,
        fingerprint="0123456789abcdef",
        versions={"rollforward": "0.1.0"},
        device="CPU",
        chunks_per_step=chunks,
        about={"verifiers": ["accuracy_reward", "format_reward"]},
    )


def main() -> None:
    """Start 1, of two ranks, does steps 0_0 and 0_1 and half of 0_2; start 2, of one, goes on from 0_1."""
    storage = LocalStorage(FOLDER)

    def fixed() -> str:
        return "2026-01-31T12:00:00.000000Z"

    for rank in range(2):
        nothing = read_journal([storage], rank=rank, since=Position(0, 0))
        first = Journal(storage, identity(1, rank, 2), start=Position(0, 0), inherited=nothing, now=fixed)
        for step in range(3):
            if (step, rank) != (2, 1):
                first.append(Position(0, step), rank, *pack(chunk(2 * step + rank)))
            if step < 2:
                first.record(Position(0, step), 0, *pack_outcome(outcome(step), 1e-3, "feed" * 8))
            if step == 0:
                # Not after step 1: its outcome is not durable when what follows is written.
                first.checkpoint_begun()
        first.close()
    view = read_journals([storage], since=Position(0, 1), checkpoint=(1, Position(0, 1)))
    second = Journal(
        storage, identity(2), start=Position(0, 1), inherited=view.inherited(Position(0, 3)), now=fixed
    )
    second.note(Position(0, 2), "resumed", {"checkpoint": "0_1"})
    second.append(Position(0, 2), 1, *pack(chunk(5)))
    second.close()


if __name__ == "__main__":
    main()
