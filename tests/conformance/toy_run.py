"""A whole run in NumPy: trainer, toy engine, checkpoints and journal, on any storage and number of ranks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from engine_case import SETTINGS, TRAINER
from toy_engine import ToyEngine, create, toy_model_config

from rollforward.errors import NothingToResume
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.schedule import LearningRate
from rollforward.grpo.trainer import Trainer
from rollforward.grpo.types import Floats, Prompt
from rollforward.position import Position
from rollforward.replay.inheriting import JournalReport
from rollforward.replay.rollout_log import JournaledRollouts, LogSettings, open_rollout_log
from rollforward.storage import Storage
from rollforward.store import CheckpointStore, Manifest, Retention, find, read_tensors
from rollforward.store.catalog import positions
from rollforward.store.journal.records import Identity
from rollforward.store.lock import next_incarnation

Exchange = Callable[[Any], list[Any]]
State = dict[str, dict[str, np.ndarray]]

STEPS_PER_EPOCH = 6
CHUNKS = 2
"""Of each rank, unless a run says how many there are in a step."""
START, END = Position(0, 0), Position(2, 0)
VERSIONS = {"numpy": np.__version__}


@dataclass
class Ranks:
    """The group of one rank."""

    rank: int
    world_size: int
    exchange: Exchange

    def all_gather(self, value: Any) -> list[Any]:
        return self.exchange(value)

    def sharing(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Work:
    """What was done over all starts of a run: how often each piece, and what was said."""

    generated: Counter[tuple[int, Position]] = field(default_factory=Counter)
    """(rank, position) -> chunks generated."""
    updated: Counter[tuple[int, Position]] = field(default_factory=Counter)
    reports: list[JournalReport] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@dataclass
class Watch:
    """Checkpoints and observer of a rank. Saving blocks."""

    store: CheckpointStore
    engine: ToyEngine
    log: JournaledRollouts
    work: Work
    incarnation: int
    rank: int
    at: Position = START

    def due(self, global_step: int, every: Any) -> bool:
        return global_step % int(every) == 0

    def begin(self, position: Position, global_step: int) -> None:
        self.log.journal.checkpoint_begun()
        self.store.save(
            position,
            self.engine.tensors(),
            global_step=global_step,
            run_id="toy",
            incarnation=self.incarnation,
            state={},
        )
        self.log.journal.prune(min(positions(self.store.storage)))

    def before_update(self) -> None:
        self.work.updated[self.rank, self.at] += 1

    def boundary(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is under way."""

    def phase(self, position: Position, name: str) -> None:
        self.at = position
        if name == "verify":
            self.work.generated[self.rank, position] += 1

    def step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Told to nobody."""


def score(_: Sequence[Prompt], completions: Sequence[str]) -> Floats:
    """Rewards even tokens, and stopping early."""
    rows = [[int(token) for token in text.split()] for text in completions]
    even = [sum(token % 2 == 0 for token in row) / 6 for row in rows]
    return np.array([[e, 1.0 / len(row)] for e, row in zip(even, rows, strict=True)], dtype=np.float32)


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def run_rank(
    storage: Storage, rank: int, world_size: int, exchange: Exchange, work: Work, **changes: Any
) -> State:
    """Start, or start again, and run to the end: the tensors that the run ends with.

    `changes` are to the trainer's settings; `end` is where to stop, `chunks` how many a step has.
    """
    end, chunks = changes.pop("end", END), changes.pop("chunks", world_size * CHUNKS)
    engine = create(
        replace(
            SETTINGS,
            model_config=toy_model_config(),
            optimizer=replace(SETTINGS.optimizer, max_grad_norm=1.0),
            chunks=chunks // world_size,
        ),
        Ranks(rank, world_size, exchange),
    )
    manifest = _restore(storage, engine)
    incarnation = exchange(next_incarnation(storage, None) if rank == 0 else 0)[0]
    start = manifest.position if manifest else START
    log, report = open_rollout_log(
        sources=(storage,),
        storage=storage,
        identity=Identity(
            run_id="toy",
            rank=rank,
            world_size=world_size,
            incarnation=incarnation,
            fingerprint="toy",
            versions=VERSIONS,
            device="CPU",
        ),
        start=start,
        checkpoint=manifest.order if manifest else None,
        settings=LogSettings(chunks_per_step=chunks, steps_per_epoch=STEPS_PER_EPOCH),
        all_gather=exchange,
        notice=work.notices.append,
    )
    assert not report.problems
    work.reports.append(report)
    store = CheckpointStore(
        storage,
        rank=rank,
        world_size=world_size,
        exchange=exchange,
        retention=Retention(newest=2),
        previous=manifest,
    )
    watch = Watch(store, engine, log, work, incarnation, rank)
    if start < end:
        _trainer(engine, log, watch, chunks, **changes).run(start, end)
    log.journal.close()
    return {role: {name: a.copy() for name, a in named.items()} for role, named in engine.tensors().items()}


def _restore(storage: Storage, engine: ToyEngine) -> Manifest | None:
    try:
        manifest = find(storage).manifest
    except NothingToResume:
        return None
    for role, name, array in read_tensors(storage, manifest):
        engine.load(role, name, array)
    return manifest


def _trainer(engine: ToyEngine, log: JournaledRollouts, watch: Watch, chunks: int, **changes: Any) -> Trainer:
    prompts = [
        Prompt(index=i, text=f"{i}", token_ids=(2 + i % 14, 2 + i // 14 % 14), answer="")
        for i in range(chunks * STEPS_PER_EPOCH)
    ]
    return Trainer(
        engine=engine,
        schedule=PromptSchedule(
            prompts=prompts,
            seed=5,
            chunk_size=1,
            chunks_per_step=chunks,
        ),
        learning_rate=LearningRate(lr=0.05, min_lr=0.01, warmup_steps=2, decay_steps=24),
        score=score,
        decode=decode,
        log=log,
        checkpoints=watch,
        observer=watch,
        settings=replace(TRAINER, **changes),
    )


def same(left: State, right: State) -> bool:
    """Whether all tensors have the same bytes."""
    return left.keys() == right.keys() and all(
        left[role].keys() == right[role].keys()
        and all(left[role][name].tobytes() == right[role][name].tobytes() for name in left[role])
        for role in left
    )
