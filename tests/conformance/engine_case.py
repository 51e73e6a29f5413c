"""What the conformance suite needs to know of an engine, and the batches it feeds to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rollforward.grpo.ports import Engine, Group
from rollforward.grpo.trainer import TrainerSettings
from rollforward.grpo.types import (
    EngineSettings,
    Floats,
    ObjectiveSettings,
    OptimizerSettings,
    SamplingSettings,
    TokenBatch,
    TrainingBatch,
)

PROMPT, TOKENS, VOCABULARY = 5, 6, 16
STOP, PAD = 1, 0

SETTINGS = EngineSettings(
    model_config={},
    policy_folder=None,
    reference_folder=None,
    prompt_length=PROMPT,
    samples_per_generation=4,
    samples_per_micro_batch=4,
    sampling=SamplingSettings(max_tokens=TOKENS, stop_token_ids=(STOP,), pad_token_id=PAD),
    objective=ObjectiveSettings(beta=0.1, epsilon_low=0.2, epsilon_high=0.3),
    optimizer=OptimizerSettings(weight_decay=0.1, max_grad_norm=0.0),
)
"""Clipping of gradients is off, so that a gradient can be read off the first moment."""

TRAINER = TrainerSettings(
    seed=5,
    num_generations=4,
    num_iterations=1,
    prompt_length=PROMPT,
    max_tokens=TOKENS,
    pad_token_id=PAD,
    standardise_advantages=True,
    loss_aggregation="token_mean",
    verifier_names=("even", "short"),
    verifier_weights=(1.0, 0.5),
    ref_model_sync_steps=0,
    save_ckpt_interval=4,
)
"""For trainers over an engine of SETTINGS."""


@dataclass
class EngineCase:
    """An engine under test. Engines of equal settings are made once: compiling is what takes time."""

    name: str
    create: Callable[[EngineSettings, Group | None], Engine]
    model_config: Mapping[str, Any]
    views: bool = True
    """Whether `tensors()` shows the newest values; otherwise it is a copy of the moment."""
    made: dict[str, Engine] = field(default_factory=dict)

    def engine(self, **changes: Any) -> Engine:
        """An engine in its initial state; `changes` are to SETTINGS."""
        key = repr(sorted(changes.items()))
        if key not in self.made:
            self.made[key] = self._make(**changes)
        restore(self.made[key], initial_tensors(self.made[key]))
        return self.made[key]

    def twin(self) -> Engine:
        """A second engine of the same settings, with graphs of its own, in its initial state."""
        if "twin" not in self.made:
            self.made["twin"] = self._make()
        restore(self.made["twin"], initial_tensors(self.made["twin"]))
        return self.made["twin"]

    def _make(self, **changes: Any) -> Engine:
        return self.create(replace(SETTINGS, model_config=self.model_config, **changes), None)


def initial_tensors(engine: Engine) -> dict[str, dict[str, Any]]:
    """Random weights, another reference, a fresh optimizer: a function of names and shapes."""
    state: dict[str, dict[str, Any]] = {}
    for seed, (role, named) in enumerate(sorted(engine.layout().items())):
        source = np.random.default_rng(seed)
        state[role] = {}
        for name, spec in sorted(named.items()):
            if role == "optimizer":
                state[role][name] = np.zeros(spec.shape, spec.dtype)
            else:
                state[role][name] = source.normal(0, 0.4, spec.shape).astype(spec.dtype)
    return state


def restore(engine: Engine, state: Mapping[str, Mapping[str, Any]]) -> None:
    for role, tensors in state.items():
        for name, array in tensors.items():
            engine.load(role, name, array)


def snapshot(engine: Engine) -> dict[str, dict[str, Any]]:
    """A copy of everything that the engine says it consists of."""
    return {role: {n: a.copy() for n, a in tensors.items()} for role, tensors in engine.tensors().items()}


def assert_same_bits(left: Mapping[str, Mapping[str, Any]], right: Mapping[str, Mapping[str, Any]]) -> None:
    assert left.keys() == right.keys()
    for role, tensors in left.items():
        assert tensors.keys() == right[role].keys()
        for name, array in tensors.items():
            assert array.tobytes() == right[role][name].tobytes(), f"{role} {name} differs"


def prompts(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts of one to PROMPT tokens: ids, mask."""
    source = np.random.default_rng(seed)
    ids = source.integers(2, VOCABULARY, (rows, PROMPT)).astype(np.int32)
    lengths = source.integers(1, PROMPT + 1, rows)
    mask = np.arange(PROMPT) >= PROMPT - lengths[:, None]
    return np.where(mask, ids, PAD).astype(np.int32), mask


def uniforms(rows: int, seed: int = 0) -> Floats:
    return np.random.default_rng(100 + seed).random((rows, TOKENS), dtype=np.float32)


def token_batch(rows: int, seed: int = 0) -> TokenBatch:
    """Random completions of one to TOKENS tokens behind random prompts."""
    source = np.random.default_rng(200 + seed)
    prompt_ids, prompt_mask = prompts(rows, seed)
    ids = source.integers(2, VOCABULARY, (rows, TOKENS)).astype(np.int32)
    mask = np.arange(TOKENS) < source.integers(1, TOKENS + 1, rows)[:, None]
    return TokenBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=np.where(mask, ids, PAD).astype(np.int32),
        completion_mask=mask,
    )


def training_batch(engine: Engine, rows: int, seed: int = 0, **changes: Any) -> TrainingBatch:
    """A batch as the trainer makes one, its old log-probabilities some way off the policy's.

    Its seed decides its lengths, and they the shapes that an engine compiles: the largest alone with 4 rows
    and a seed of 1, 6 and 0, 1 or 3, 8 and 2.
    """
    source = np.random.default_rng(300 + seed)
    tokens = token_batch(rows, seed)
    reference = engine.reference_logprobs(tokens)
    mask = tokens.completion_mask
    drift = source.normal(0, 0.3, mask.shape)
    made = TrainingBatch(
        tokens=tokens,
        advantages=source.normal(0, 1, rows).astype(np.float32),
        token_weights=(mask / mask.sum()).astype(np.float32),
        reference_logprobs=reference,
        old_logprobs=np.where(mask, reference + drift, 0).astype(np.float32),
    )
    return replace(made, **changes)


def joined(*batches: TrainingBatch) -> TrainingBatch:
    """Batches one under the other."""

    def stack(name: str) -> Any:
        return np.concatenate([getattr(batch, name) for batch in batches])

    tokens = {
        name: np.concatenate([getattr(batch.tokens, name) for batch in batches])
        for name in vars(batches[0].tokens)
    }
    return TrainingBatch(
        tokens=replace(batches[0].tokens, **tokens),
        advantages=stack("advantages"),
        token_weights=stack("token_weights"),
        reference_logprobs=stack("reference_logprobs"),
        old_logprobs=stack("old_logprobs"),
    )


def rows_of(batch: TrainingBatch, rows: Any) -> TrainingBatch:
    """Some rows of a batch, in the order given."""
    tokens = TokenBatch(
        prompt_ids=batch.tokens.prompt_ids[rows],
        prompt_mask=batch.tokens.prompt_mask[rows],
        completion_ids=batch.tokens.completion_ids[rows],
        completion_mask=batch.tokens.completion_mask[rows],
    )
    return TrainingBatch(
        tokens=tokens,
        advantages=batch.advantages[rows],
        token_weights=batch.token_weights[rows],
        reference_logprobs=batch.reference_logprobs[rows],
        old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[rows],
    )
