"""A training loop of somebody else's over `open_run`'s parts, on any storage and number of ranks.

What is made once depends on the weights, on the step and on the rank; the update takes what all ranks made.
Each make and each return of `once` is noted, so that a test can say what was made twice.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rollforward.library import Run, Start
from rollforward.position import Position
from rollforward.replay.loop import LoopSettings, Place, Ranks
from rollforward.storage import Storage
from rollforward.store import Retention
from rollforward.store.lock import next_incarnation
from rollforward.store.shadow import _Worker

Exchange = Callable[[Any], list[Any]]
State = dict[str, dict[str, NDArray[Any]]]
Key = tuple[int, Position, str]
"""(rank, step, name) of something that is made once."""

EPOCHS = (3, 4, 2)
"""Steps of each epoch: no rule tells which step follows one."""
STEPS = tuple(Position(epoch, step) for epoch, steps in enumerate(EPOCHS) for step in range(steps))
AFTER = dict(zip(STEPS, [*STEPS[1:], Position(len(EPOCHS), 0)], strict=True))

ALONE: Exchange = lambda value: [value]  # noqa: E731


@dataclass
class Work:
    """What was done over all starts of a run, and what was said."""

    made: Counter[Key] = field(default_factory=Counter)
    durable: set[Key] = field(default_factory=set)
    """What `once` has returned."""
    again: list[Key] = field(default_factory=list)
    """What was made although it was durable."""
    updated: Counter[tuple[int, Position]] = field(default_factory=Counter)
    starts: list[Start | None] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    kept: Callable[[Key], None] = lambda _: None
    """Told of each thing when it is durable."""


def new_state() -> State:
    return {
        "policy": {"w": np.linspace(0, 1, 5, dtype=np.float32), "b": np.zeros((), np.float64)},
        "optimizer_state": {"m": np.zeros(5, np.float32), "count": np.zeros(1, np.int64)},
    }


def open_loop(
    storage: Storage, *, rank: int = 0, world_size: int = 1, exchange: Exchange = ALONE, **options: Any
) -> Run:
    """`open_run` on a storage that has no lock."""
    say: Callable[[str], None] = options.pop("say", lambda _: None)
    settings = LoopSettings(
        ranks=Ranks(rank, world_size, exchange),
        facts={"lr": 0.1},
        versions={"numpy": np.__version__},
        retention=Retention(newest=2),
        prove_unchanged=True,
        on_divergence="stop",
        log=say,
    )
    incarnation = exchange(next_incarnation(storage, None) if rank == 0 else 0)[0]
    place = Place(storage=storage, incarnation=incarnation, fence=lambda: None, opened=time.perf_counter())
    return Run(place, replace(settings, **options), release=lambda: None)


def run_loop(
    storage: Storage,
    work: Work,
    *,
    rank: int = 0,
    world_size: int = 1,
    exchange: Exchange = ALONE,
    steps: tuple[Position, ...] = STEPS,
    every: int = 3,
    **options: Any,
) -> State:
    """Start, or start again, and run to the end: the tensors that the run ends with."""
    tensors = new_state()
    with open_loop(
        storage, rank=rank, world_size=world_size, exchange=exchange, say=work.said.append, **options
    ) as run:
        start = run.restore(tensors)
        work.starts.append(start)
        for step in steps:
            if start is not None and step < start.position:
                continue
            make = _maker(work, tensors, rank, step)
            rollouts = run.once(step, "rollouts", lambda make=make: make("rollouts"))
            rewards, tries = run.once(step, "rewards", lambda make=make: (make("rewards")["x"], {"tries": 1}))
            assert tries == {"tries": 1}
            for name in ("rollouts", "rewards"):
                work.durable.add((rank, step, name))
                work.kept((rank, step, name))
            total = _sum(exchange, rollouts["x"] + rewards)
            with run.updating(step):
                loss = _update(tensors, total)
                work.updated[rank, step] += 1
            run.outcome(step, loss=loss)
            run.checkpoint(AFTER[step], tensors, every=every, state={"metrics": {"reward": loss}})
    return tensors


def _maker(
    work: Work, tensors: State, rank: int, step: Position
) -> Callable[[str], Mapping[str, NDArray[Any]]]:
    def make(name: str) -> Mapping[str, NDArray[Any]]:
        key = (rank, step, name)
        if key in work.durable:
            work.again.append(key)
        work.made[key] += 1
        rng = np.random.default_rng([*step, rank, len(name)])
        return {"x": (rng.random(5) * tensors["policy"]["w"]).astype(np.float32), "n": np.int8(rank)}

    return make


def _sum(exchange: Exchange, mine: NDArray[Any]) -> NDArray[Any]:
    """In the order of ranks, the bits through JSON."""
    return np.sum([np.array(each, np.float32) for each in exchange(mine.tolist())], axis=0, dtype=np.float32)


def _update(tensors: State, total: NDArray[Any]) -> float:
    policy, optimizer = tensors["policy"], tensors["optimizer_state"]
    optimizer["m"] *= np.float32(0.9)
    optimizer["m"] += total
    optimizer["count"] += 1
    policy["w"] += np.float32(0.1) * optimizer["m"]
    policy["b"] -= float(total.mean())
    return float(policy["w"].sum()) / 3


def same(one: State, other: State) -> bool:
    """The same bits in every tensor."""
    return one.keys() == other.keys() and all(
        array.tobytes() == other[role][name].tobytes() for role in one for name, array in one[role].items()
    )


def write_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's work is done where it is given, so that a kill finds the same on any machine."""
    monkeypatch.setattr(_Worker, "submit", lambda _, task: task())
