"""The loop: one step after another, each a pure function of the weights and the position.

                                  one step, on every worker: its share of the step's chunks

    prompts --> generate --> verify --> reference --> log ----> before_update --> update --> boundary
    schedule    engine       rewards    engine        durable   checkpoints       engine     commit
                   |_______________ a chunk __________|                              |
                        (skipped when the log has it)                       loss, norm: checked, logged

With beta 0 there is no reference in it.

The trainer knows what GRPO needs and in which order things happen. It does not know what
computes (`Engine`), what survives and how (`RolloutLog`, `Checkpoints`), or who watches
(`Observer`). Recovery is not a mode: a resumed run enters `run` at a later position, and
chunks that the log still has are taken from there instead of being generated.

Left out: an evaluation loop, and generation that runs ahead of the update (off-policy by a
step), which would trade exactness for throughput.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from rollforward.errors import NonFinite, VerifierError
from rollforward.grpo.addition import share
from rollforward.grpo.advantages import centred_advantages, standardised_advantages
from rollforward.grpo.group import Replicas
from rollforward.grpo.nonfinite import arrays_of, check_finite, known_of
from rollforward.grpo.objective import sequence_mean_weights, token_mean_weights
from rollforward.grpo.ports import Checkpoints, Engine, Observer, RolloutLog
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.randomness import sampling_uniforms
from rollforward.grpo.schedule import LearningRate
from rollforward.grpo.types import (
    Bools,
    Floats,
    Ints,
    Prompt,
    RolloutChunk,
    TokenBatch,
    TrainingBatch,
    UpdateOutcome,
)
from rollforward.position import Position

Score = Callable[[Sequence[Prompt], Sequence[str]], Floats]
"""Rewards of completions (text), each with its prompt: float32 [B, number of verifiers]."""

_MEND_REWARD = "a reward must be a finite number: fix the verifier and resume with --resume_training"
_MEND_REFERENCE = (
    "the reference model gives them; see that its weights are what they should be (rollforward verify --deep)"
)

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What the trainer needs from the configuration."""

    seed: int
    num_generations: int
    num_iterations: int
    prompt_length: int
    """P: prompts are padded to this."""
    max_tokens: int
    """T: completions are padded to this."""
    pad_token_id: int
    standardise_advantages: bool
    loss_aggregation: Literal["token_mean", "sequence_mean"]
    verifier_names: tuple[str, ...]
    verifier_weights: tuple[float, ...]
    ref_model_sync_steps: int
    """Every this many steps the reference becomes a copy of the policy; 0: never."""
    save_ckpt_interval: int | Literal["auto"]
    """Save a checkpoint every this many steps, or as often as is worth it."""
    uses_reference: bool = True
    """Whether the objective has a KL term. If not, the reference computes nothing, its log-probabilities are
    recorded as 0, and there is no KL among the figures."""
    model_parallel: int = 1
    """Workers that hold the model together."""


class Trainer:
    """Runs steps. State lives in the engine and in the log, never here."""

    def __init__(
        self,
        *,
        engine: Engine,
        schedule: PromptSchedule,
        learning_rate: LearningRate,
        score: Score,
        decode: Decode,
        log: RolloutLog,
        checkpoints: Checkpoints,
        observer: Observer,
        settings: TrainerSettings,
    ) -> None:
        self.engine = engine
        self.schedule = schedule
        self.learning_rate = learning_rate
        self.score = score
        self.decode = decode
        self.log = log
        self.checkpoints = checkpoints
        self.observer = observer
        self.settings = settings
        self.replicas = Replicas(engine.group, settings.model_parallel)
        """Each has a share of the chunks; its workers, who hold the model together, make the same samples."""
        self.chunks = share(schedule.chunks_per_step, self.replicas.world_size, self.replicas.rank)
        """Those of this worker, by their numbers in the step."""

    def run(self, start: Position, end: Position) -> None:
        """Run every step from `start` up to, not including, `end`; the state at `end` is saved."""
        clock = PhaseClock(self.observer)
        position = start
        while position < end:
            self._step(position, clock)
            position = position.following(self.schedule.steps_per_epoch)
            done = position.global_step(self.schedule.steps_per_epoch)
            if position >= end or self.checkpoints.due(done, self.settings.save_ckpt_interval):
                clock.enter(position, "checkpoint")
                self.checkpoints.begin(position, done)
        self.checkpoints.close()
        clock.stop()

    def _step(self, position: Position, clock: "PhaseClock") -> None:
        experience = [self._chunk(position, chunk, clock) for chunk in self.chunks]
        # Chunk by chunk, here and below: a worker that has more chunks computes the same bits of each.
        weights = np.asarray(self.settings.verifier_weights, dtype=np.float32)
        rewards = [rollouts.rewards @ weights for rollouts in experience]
        rollouts = concatenate(experience)
        batch = self._training_batch(rollouts, rewards)

        clock.enter(position, "update")
        self.checkpoints.before_update()
        outcomes = self._update(position, batch, rollouts, clock)
        done = position.global_step(self.schedule.steps_per_epoch) + 1
        if self.settings.ref_model_sync_steps and done % self.settings.ref_model_sync_steps == 0:
            clock.enter(position, "update")
            self.engine.sync_reference()

        clock.enter(position, "checkpoint")
        self.checkpoints.boundary()
        # Before the next checkpoint begins: a step in a checkpoint is never run, or reported, again.
        self._report(position, experience, rewards, outcomes, clock.take())

    def _chunk(self, position: Position, chunk: int, clock: "PhaseClock") -> RolloutChunk:
        """One chunk of experience: from the log if it is there, otherwise generated, scored and logged."""
        finished = self.log.find(position, chunk)
        if finished is not None:
            return finished
        clock.enter(position, "generate")
        settings = self.settings
        prompts = [
            prompt for prompt in self.schedule.chunk(position, chunk) for _ in range(settings.num_generations)
        ]
        samples = [
            slot * settings.num_generations + sibling
            for slot in self.schedule.slots(chunk)
            for sibling in range(settings.num_generations)
        ]
        prompt_ids, prompt_mask = left_pad(prompts, settings.prompt_length, settings.pad_token_id)
        uniforms = sampling_uniforms(settings.seed, position, samples, settings.max_tokens)
        generation = self.engine.generate(prompt_ids, prompt_mask, uniforms)
        columns = np.arange(settings.max_tokens)
        tokens = TokenBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=generation.completion_ids,
            completion_mask=columns[None, :] < generation.lengths[:, None],
        )
        clock.enter(position, "verify")
        texts = [
            self.decode(ids[:length].tolist())
            for ids, length in zip(generation.completion_ids, generation.lengths, strict=True)
        ]
        known = partial(known_of, prompts, texts, position=position, chunk=chunk)
        with known(phase="verify", arrays=arrays_of(tokens)):
            try:
                given = self.score(prompts, texts)
            except VerifierError as error:
                where = f"step {position}, chunk {chunk}"
                raise VerifierError(f"{where}: {error.message}", hint=error.hint) from error
            rewards = check_finite("rewards", given, _MEND_REWARD)
        logprobs = np.zeros(tokens.completion_ids.shape, dtype=np.float32)
        if settings.uses_reference:
            clock.enter(position, "reference")
            with known(phase="reference", arrays={**arrays_of(tokens), "rewards": rewards}):
                logprobs = self.engine.reference_logprobs(tokens)
                check_finite("reference log-probabilities", logprobs, _MEND_REFERENCE)
        rollouts = RolloutChunk(
            prompt_indices=np.array([prompt.index for prompt in prompts], dtype=np.int32),
            tokens=tokens,
            stopped=generation.stopped,
            rewards=rewards,
            reference_logprobs=logprobs,
        )
        # Non-finite values have stopped the run by now: from the log they would fail again.
        clock.enter(position, "log")
        self.log.append(position, chunk, rollouts)
        return rollouts

    def _training_batch(self, rollouts: RolloutChunk, rewards: Sequence[Floats]) -> TrainingBatch:
        """`rewards`: [B of a chunk] for each chunk."""
        settings, mask = self.settings, rollouts.tokens.completion_mask
        advantages = standardised_advantages if settings.standardise_advantages else centred_advantages
        counts = self.replicas.all_gather([int(mask.sum()), len(mask)])
        if settings.loss_aggregation == "token_mean":
            weights = token_mean_weights(mask, sum(tokens for tokens, _ in counts))
        else:
            weights = sequence_mean_weights(mask, sum(samples for _, samples in counts))
        return TrainingBatch(
            tokens=rollouts.tokens,
            advantages=np.concatenate([advantages(each, settings.num_generations) for each in rewards]),
            token_weights=weights,
            reference_logprobs=rollouts.reference_logprobs,
            old_logprobs=None,
        )

    def _update(
        self, position: Position, batch: TrainingBatch, rollouts: RolloutChunk, clock: "PhaseClock"
    ) -> list[UpdateOutcome]:
        """`num_iterations` optimizer steps on one experience; the old policy is the one before the first."""
        first = position.global_step(self.schedule.steps_per_epoch) * self.settings.num_iterations
        outcomes: list[UpdateOutcome] = []
        for iteration in range(self.settings.num_iterations):
            rate = self.learning_rate.at(first + iteration)
            if iteration > 0:
                batch = replace(batch, old_logprobs=outcomes[0].logprobs)
                clock.enter(position, "update")
            try:
                outcomes.append(self.engine.update(batch, rate))
            except NonFinite as error:
                error.facts["learning_rate"] = rate
                with self._known_of_batch(position, iteration, batch, rollouts):
                    raise
            clock.enter(position, "log")
            self.log.record(position, iteration, outcomes[-1], rate)
        return outcomes

    def _known_of_batch(
        self, position: Position, iteration: int, batch: TrainingBatch, rollouts: RolloutChunk
    ) -> AbstractContextManager[None]:
        tokens = batch.tokens
        arrays = {
            **arrays_of(tokens),
            "rewards": rollouts.rewards,
            "advantages": batch.advantages,
            "token_weights": batch.token_weights,
            "reference_logprobs": batch.reference_logprobs,
        }
        if batch.old_logprobs is not None:
            arrays["old_logprobs"] = batch.old_logprobs
        return known_of(
            [self.schedule.prompts[index] for index in rollouts.prompt_indices],
            [
                self.decode(ids[mask].tolist())
                for ids, mask in zip(tokens.completion_ids, tokens.completion_mask, strict=True)
            ],
            position=position,
            phase="update",
            arrays=arrays,
            iteration=iteration,
        )

    def _report(
        self,
        position: Position,
        experience: Sequence[RolloutChunk],
        rewards: Sequence[Floats],
        outcomes: Sequence[UpdateOutcome],
        seconds: Mapping[str, float],
    ) -> None:
        """Gather the figures of the step's chunks from all workers and pass them to the observer."""
        own = [_figures_of(*each) for each in zip(experience, rewards, strict=True)]
        parts = [part for told in self.replicas.all_gather(own) for part in told]
        samples = sum(part["samples"] for part in parts)
        tokens = sum(part["tokens"] for part in parts)
        mean = math.fsum(part["reward"] for part in parts) / samples
        square = math.fsum(part["reward_squared"] for part in parts) / samples
        step = position.global_step(self.schedule.steps_per_epoch)
        metrics: dict[str, float] = {
            "reward": mean,
            "reward_std": math.sqrt(max(square - mean * mean, 0.0)),
            "loss": outcomes[-1].loss,
            "grad_norm": outcomes[-1].grad_norm,
            "clip_fraction": outcomes[-1].clip_fraction,
            "learning_rate": self.learning_rate.at((step + 1) * self.settings.num_iterations - 1),
            "completion_length": tokens / samples,
            "stopped_fraction": sum(part["stopped"] for part in parts) / samples,
            "samples": samples,
            "tokens": tokens,
        }
        if self.settings.uses_reference:
            metrics["kl"] = outcomes[-1].kl
        for index, name in enumerate(self.settings.verifier_names):
            metrics[f"reward/{name}"] = math.fsum(part["verifiers"][index] for part in parts) / samples
        self.observer.step(
            position, metrics | {f"seconds/{phase}": spent for phase, spent in seconds.items()}
        )


def _figures_of(rollouts: RolloutChunk, rewards: Floats) -> dict[str, Any]:
    """What a chunk adds to the figures of its step."""
    lengths = rollouts.tokens.completion_mask.sum(axis=1)
    return {
        "samples": len(lengths),
        "tokens": int(lengths.sum()),
        "stopped": int(rollouts.stopped.sum()),
        "reward": float(rewards.sum(dtype=np.float64)),
        "reward_squared": float(np.square(rewards, dtype=np.float64).sum()),
        "verifiers": rollouts.rewards.sum(axis=0, dtype=np.float64).tolist(),
    }


class PhaseClock:
    """Tells the observer which phase the run is in, and adds up the seconds of each."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0

    def enter(self, position: Position, phase: str) -> None:
        """End the current phase and begin this one."""
        self.stop()
        self._observer.phase(position, phase)
        self._phase, self._since = phase, time.perf_counter()

    def stop(self) -> None:
        """End the current phase."""
        if self._phase is not None:
            spent = time.perf_counter() - self._since
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
        self._phase = None

    def take(self) -> dict[str, float]:
        """End the phase; returns the seconds of each phase since the last call."""
        self.stop()
        taken, self._seconds = self._seconds, {}
        return taken


def left_pad(prompts: Sequence[Prompt], length: int, pad_token_id: int) -> tuple[Ints, Bools]:
    """Prompts as a matrix with aligned row ends: ids int32 [B, length] and mask bool [B, length]."""
    ids = np.full((len(prompts), length), pad_token_id, dtype=np.int32)
    mask = np.zeros((len(prompts), length), dtype=np.bool_)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt.token_ids) :] = prompt.token_ids
        mask[row, length - len(prompt.token_ids) :] = True
    return ids, mask


def concatenate(chunks: Sequence[RolloutChunk]) -> RolloutChunk:
    """The chunks of a step as one, in order."""
    if len(chunks) == 1:
        return chunks[0]
    tokens = [chunk.tokens for chunk in chunks]
    return RolloutChunk(
        prompt_indices=np.concatenate([chunk.prompt_indices for chunk in chunks]),
        tokens=TokenBatch(
            prompt_ids=np.concatenate([part.prompt_ids for part in tokens]),
            prompt_mask=np.concatenate([part.prompt_mask for part in tokens]),
            completion_ids=np.concatenate([part.completion_ids for part in tokens]),
            completion_mask=np.concatenate([part.completion_mask for part in tokens]),
        ),
        stopped=np.concatenate([chunk.stopped for chunk in chunks]),
        rewards=np.concatenate([chunk.rewards for chunk in chunks]),
        reference_logprobs=np.concatenate([chunk.reference_logprobs for chunk in chunks]),
    )
