"""The loop keeps its order, repeats itself bit for bit, and uses what is finished instead of redoing it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from engine_case import SETTINGS, TRAINER
from toy_engine import create, toy_model_config

from rollforward.errors import NonFinite
from rollforward.grpo.group import OneProcess
from rollforward.grpo.ports import Engine, Group, RolloutLog
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.schedule import LearningRate
from rollforward.grpo.trainer import Trainer, TrainerSettings
from rollforward.grpo.types import Floats, Prompt, RolloutChunk, TrainingBatch, UpdateOutcome
from rollforward.position import Position

STEPS_PER_EPOCH = 6
START = Position(0, 0)
END = Position(2, 0)
ENGINE = replace(
    SETTINGS, model_config=toy_model_config(), optimizer=replace(SETTINGS.optimizer, max_grad_norm=1.0)
)
PROMPTS = [
    Prompt(index=i, text=f"{i}", token_ids=(2 + i % 14, 2 + i // 14), answer="")
    for i in range(4 * STEPS_PER_EPOCH)
]


def score(_: Sequence[Prompt], completions: Sequence[str]) -> Floats:
    """Rewards even tokens, and stopping early."""
    rows = [[int(token) for token in text.split()] for text in completions]
    even = [sum(token % 2 == 0 for token in row) / ENGINE.sampling.max_tokens for row in rows]
    return np.array([[e, 1.0 / len(row)] for e, row in zip(even, rows, strict=True)], dtype=np.float32)


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


@dataclass
class MemoryLog:
    """A log that outlives the trainer, like the journal."""

    chunks: dict[tuple[Position, int], RolloutChunk] = field(default_factory=dict)
    outcomes: list[tuple[Position, int, float, float]] = field(default_factory=list)

    def find(self, position: Position, chunk: int) -> RolloutChunk | None:
        return self.chunks.get((position, chunk))

    def append(self, position: Position, chunk: int, rollouts: RolloutChunk) -> None:
        self.chunks[position, chunk] = rollouts

    def record(
        self, position: Position, iteration: int, outcome: UpdateOutcome, learning_rate: float
    ) -> None:
        self.outcomes.append((position, iteration, outcome.loss, learning_rate))


@dataclass
class Witness:
    """Checkpoints, observer and engine spy in one: everything that happens, in order; states by position."""

    engine: Engine
    events: list[str] = field(default_factory=list)
    saved: dict[Position, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    metrics: dict[Position, Mapping[str, float]] = field(default_factory=dict)
    group: Group = field(default_factory=OneProcess)

    def due(self, global_step: int, every: Any) -> bool:
        return global_step % int(every) == 0

    def begin(self, position: Position, global_step: int) -> None:
        self.events.append(f"begin {position} {global_step}")
        self.saved[position] = snapshot(self.engine)

    def before_update(self) -> None:
        self.events.append("before_update")

    def boundary(self) -> None:
        self.events.append("boundary")

    def close(self) -> None:
        self.events.append("close")

    def phase(self, position: Position, name: str) -> None:
        self.events.append(f"{name} {position}")

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        self.events.append(f"step {position}")
        self.metrics[position] = metrics


def snapshot(engine: Engine) -> dict[str, dict[str, np.ndarray]]:
    return {role: {name: a.copy() for name, a in named.items()} for role, named in engine.tensors().items()}


def same(left: dict[str, dict[str, np.ndarray]], right: dict[str, dict[str, np.ndarray]]) -> bool:
    return all(
        left[role].keys() == right[role].keys()
        and all(left[role][name].tobytes() == right[role][name].tobytes() for name in left[role])
        for role in left
    )


def trainer(
    engine: Engine, log: RolloutLog, *, settings: TrainerSettings = TRAINER, chunks: int = 2, **parts: Any
) -> tuple[Trainer, Witness]:
    witness = Witness(engine)
    schedule = PromptSchedule(prompts=PROMPTS, seed=5, chunk_size=4 // chunks, chunks_per_step=chunks)
    rate = LearningRate(lr=0.05, min_lr=0.01, warmup_steps=2, decay_steps=24)
    made = Trainer(
        engine=engine,
        schedule=schedule,
        learning_rate=rate,
        score=parts.get("score", score),
        decode=decode,
        log=log,
        checkpoints=witness,
        observer=witness,
        settings=settings,
    )
    return made, witness


def run(
    start: Position = START,
    end: Position = END,
    *,
    state: dict[str, dict[str, np.ndarray]] | None = None,
    log: MemoryLog | None = None,
    **changes: Any,
) -> Witness:
    engine = create(ENGINE)
    for role, named in (state or {}).items():
        for name, array in named.items():
            engine.load(role, name, array)
    chunks = changes.pop("chunks", 2)
    made, witness = trainer(engine, log or MemoryLog(), settings=replace(TRAINER, **changes), chunks=chunks)
    made.run(start, end)
    return witness


def test_the_reward_rises() -> None:
    metrics = run().metrics
    rewards = [metrics[position]["reward"] for position in sorted(metrics)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_a_step_keeps_its_order() -> None:
    """A chunk is logged before its use, weights released before a change, a step told before it is saved."""
    events = run(end=Position(0, 4)).events
    at = Position(0, 3)
    start = events.index(f"generate {at}")
    assert events[start:] == [
        *[f"{phase} {at}" for phase in ("generate", "verify", "reference", "log")] * 2,
        f"update {at}",
        "before_update",
        f"log {at}",
        f"checkpoint {at}",
        "boundary",
        f"step {at}",
        "checkpoint 0_4",
        "begin 0_4 4",
        "close",
    ]


def test_checkpoints_come_when_due_and_at_the_end_and_roll_over_with_the_epoch() -> None:
    events = run().events
    begun = [event for event in events if event.startswith("begin")]
    assert begun == ["begin 0_4 4", "begin 1_2 8", "begin 2_0 12"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2}, {"ref_model_sync_steps": 3}, {"loss_aggregation": "sequence_mean"}],
    ids=["plain", "two iterations", "reference synchronised", "sequence mean"],
)
def test_resumed_from_any_checkpoint_it_ends_with_the_same_bytes(changes: dict[str, Any]) -> None:
    whole = run(**changes)
    for position in (Position(0, 4), Position(1, 2)):
        resumed = run(position, state=whole.saved[position], **changes)
        assert same(resumed.saved[END], whole.saved[END])
        for step, metrics in resumed.metrics.items():
            steady = {k: v for k, v in metrics.items() if not k.startswith("seconds/")}
            assert steady.items() <= whole.metrics[step].items()


def test_what_the_log_holds_is_used_and_never_generated_again() -> None:
    log = MemoryLog()
    whole = run(log=log)
    half_done = Position(1, 1)
    kept = {
        (position, chunk): rollouts
        for (position, chunk), rollouts in log.chunks.items()
        if position < half_done or (position, chunk) == (half_done, 0)
    }
    again = MemoryLog(dict(kept))
    resumed = run(Position(0, 4), state=whole.saved[Position(0, 4)], log=again)
    assert same(resumed.saved[END], whole.saved[END])
    generated = [event.split()[1] for event in resumed.events if event.startswith("generate")]
    assert generated[:3] == ["1_1", "1_2", "1_2"], "one chunk of 1_1 was there already"
    assert log.outcomes[4:] == again.outcomes


def test_two_chunks_or_one_give_the_same_experience() -> None:
    """How a step is cut into chunks decides what is journaled together, not what is learnt."""
    split, whole = MemoryLog(), MemoryLog()
    run(end=Position(0, 1), log=split)
    run(end=Position(0, 1), log=whole, chunks=1)
    at = Position(0, 0)
    joined = np.concatenate([split.chunks[at, i].tokens.completion_ids for i in range(2)])
    assert np.array_equal(joined, whole.chunks[at, 0].tokens.completion_ids)


def test_the_reference_follows_only_when_asked() -> None:
    initial = snapshot(create(ENGINE))["ref"]
    fixed = run().saved[END]["ref"]
    synced = run(ref_model_sync_steps=4).saved[END]
    assert all(np.array_equal(fixed[name], initial[name]) for name in initial)
    assert all(np.array_equal(synced["ref"][name], synced["policy_model"][name]) for name in initial)


def test_a_second_iteration_is_held_against_the_policy_that_generated() -> None:
    """With ratios of one, nothing would ever be clipped."""
    engine = create(replace(ENGINE, optimizer=replace(ENGINE.optimizer, max_grad_norm=0.0)))
    log = MemoryLog()
    made, witness = trainer(engine, log, settings=replace(TRAINER, num_iterations=3))
    made.learning_rate = LearningRate(lr=0.5, min_lr=0.5, warmup_steps=0, decay_steps=0)
    made.run(Position(0, 0), Position(0, 2))
    assert witness.metrics[Position(0, 0)]["clip_fraction"] > 0.0
    assert [iteration for _, iteration, _, _ in log.outcomes] == [0, 1, 2] * 2


def test_a_reward_that_is_not_finite_stops_the_run_before_it_is_logged() -> None:
    def broken(prompts: Sequence[Prompt], completions: Sequence[str]) -> Floats:
        rewards = score(prompts, completions)
        rewards[3] = np.inf
        return rewards

    log = MemoryLog()
    made, witness = trainer(create(ENGINE), log, score=broken)
    with pytest.raises(NonFinite, match=r"rewards of samples \[3\]") as caught:
        made.run(Position(0, 0), END)
    assert log.chunks == {}
    assert witness.saved == {}
    known = caught.value.evidence
    assert (known.position, known.phase, known.chunk, known.at_fault) == (Position(0, 0), "verify", 0, (3,))
    assert len(known.prompts) == len(known.completions) == len(known.arrays["completion_ids"])
    assert np.isinf(known.arrays["computed.rewards"][3]).all()


def test_so_does_a_reference_log_probability() -> None:
    engine = create(ENGINE)
    engine.roles["ref"]["head.bias"][:] = np.nan
    log = MemoryLog()
    made, _ = trainer(engine, log)
    with pytest.raises(NonFinite, match=r"reference log-probabilities of samples \[0, 1") as caught:
        made.run(Position(0, 0), END)
    assert log.chunks == {}
    assert caught.value.evidence.phase == "reference"
    assert "rewards" in caught.value.evidence.arrays


def test_an_update_that_is_not_a_number_stops_the_run_before_it_is_recorded() -> None:
    log = MemoryLog()
    engine = create(ENGINE)
    update = engine.update

    def poisoned(batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
        if log.outcomes:
            batch.advantages[5] = np.nan
        return update(batch, learning_rate)

    engine.update = poisoned  # type: ignore[method-assign]
    made, _ = trainer(engine, log)
    with pytest.raises(NonFinite) as caught:
        made.run(Position(0, 0), END)
    assert [position for position, *_ in log.outcomes] == [Position(0, 0)]
    known = caught.value.evidence
    assert (known.position, known.phase, known.iteration) == (Position(0, 1), "update", 0)
    assert known.at_fault == (5,)
    assert known.facts["learning_rate"] == made.learning_rate.at(1)
    chunks = [log.chunks[Position(0, 1), chunk] for chunk in range(2)]
    assert [prompt.index for prompt in known.prompts] == [i for c in chunks for i in c.prompt_indices]
    assert np.isnan(known.arrays["advantages"][5])
    assert np.isnan(known.arrays["computed.loss"][5]).any()


def test_metrics_tell_the_rewards_of_each_verifier_and_the_phases_seconds() -> None:
    log = MemoryLog()
    at = Position(0, 0)
    metrics = run(end=Position(0, 1), log=log).metrics[at]
    rewards = np.concatenate([log.chunks[at, i].rewards for i in range(2)]).astype(np.float64)
    assert metrics["reward/even"] == pytest.approx(rewards[:, 0].mean())
    assert metrics["reward/short"] == pytest.approx(rewards[:, 1].mean())
    weighted = rewards[:, 0] + 0.5 * rewards[:, 1]
    assert metrics["reward"] == pytest.approx(weighted.mean(), rel=1e-5)
    assert metrics["reward_std"] == pytest.approx(weighted.std(), rel=1e-3)
    assert {"seconds/generate", "seconds/verify", "seconds/reference", "seconds/update"} <= metrics.keys()


class WithoutReference:
    """An engine whose reference may not be used."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        assert name not in ("reference_logprobs", "sync_reference"), name
        return getattr(self._engine, name)


def test_without_a_kl_term_the_reference_is_not_asked_and_nothing_is_said_of_it() -> None:
    settings = replace(ENGINE, objective=replace(ENGINE.objective, beta=0.0))
    engine: Any = WithoutReference(create(settings))
    log = MemoryLog()
    loop, witness = trainer(engine, log, settings=replace(TRAINER, uses_reference=False))
    loop.run(START, Position(0, 2))
    assert not any(event.startswith("reference") for event in witness.events)
    assert all((chunk.reference_logprobs == 0).all() for chunk in log.chunks.values())
    for metrics in witness.metrics.values():
        assert "kl" not in metrics
        assert "loss" in metrics
