"""Long runs on real processes, killed at random instants, each time gone on with by another number of them.

The same of another size: ROLLFORWARD_WORKER_KILLS (200), ROLLFORWARD_WORKER_SECONDS (0.8, the longest that a
start lives), ROLLFORWARD_WORKER_SEED (1).
"""

import itertools
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from compare_runs import (
    assert_every_checkpoint_is_whole,
    assert_nothing_finished_was_lost,
    assert_same_end,
    figures,
)
from mortal_ranks import MortalRanks, Start, diary
from soak_settings import SETTINGS
from toy_session import Place

from rollforward.replay.report import read
from rollforward.storage import LocalStorage
from rollforward.store import find
from rollforward.store.catalog import positions


def run_killed(
    place: Place, workers: Sequence[int], *, chunks: int, kills: int, seconds: float, spread: bool
) -> None:
    """Kill a run on these numbers of workers in turn; compare its end with that of one never killed."""
    drawn = random.Random(int(os.environ.get("ROLLFORWARD_WORKER_SEED", "1")))
    turns = itertools.cycle(workers)
    run, whole = place.root / "run", place.root / "whole"
    changes = SETTINGS | {"rl_config__num_rollouts": chunks // workers[0]}
    changes |= {"actor_config__enable_parallel_optimizer": spread}

    def start(ranks: MortalRanks, name: str, count: int, after: float | None, **more: Any) -> None:
        victims = drawn.sample(range(count), drawn.randint(1, count))
        resume = bool(positions(LocalStorage(place.root / name)))
        codes = ranks.start(
            Start(
                root=str(place.root),
                run=name,
                world_size=count,
                resume=resume,
                changes=changes | more,
                after=after,
                victims=victims,
            )
        )
        assert set(codes) == ({0} if after is None else {-9})

    with MortalRanks() as ranks:
        # A start that comes to its first checkpoint fixes how large the run's steps are. Each gets longer,
        # since a busy machine may take more than `seconds` to come there.
        for times in itertools.count(1):
            if positions(LocalStorage(run)):
                break
            start(ranks, "run", workers[0], after=times * seconds)
        for _ in range(kills):
            start(ranks, "run", next(turns), after=drawn.uniform(0, seconds))
            assert_every_checkpoint_is_whole(run)
            assert_nothing_finished_was_lost(run)
        end = {"rl_config__max_steps": find(LocalStorage(run)).manifest.global_step + 10}
        start(ranks, "run", next(turns), after=None, **end)
        start(ranks, "whole", 1, after=None, **end, rl_config__num_rollouts=chunks)
    assert_same_end(run, whole)
    pages = [page for rank in range(max(workers)) for page in diary(place.root, "run", rank)]
    finished = Counter(chunk for what, chunk, *_ in pages if what == "finished")
    assert set(finished.values()) == {1}, "what was finished was not done again, by whichever worker"
    moving = [record["grad_norm"] > 0 for record in figures(whole)]
    assert sum(moving) > 0.5 * len(moving), "a policy that rests proves nothing"
    reports = read(LocalStorage(run))
    print(
        f"{kills} kills, {len(moving)} steps, {sum(finished.values())} chunks, "
        f"{sum(report.steps_replayed for report in reports)} steps replayed, "
        f"{sum(report.updates_repeated for report in reports)} updates equal to the last bit"
    )


@pytest.mark.parametrize("spread", [False, True], ids=["whole optimizer", "spread optimizer"])
def test_a_dozen_kills(tmp_path: Path, spread: bool) -> None:
    run_killed(Place(tmp_path), [4, 2, 1, 2], chunks=4, kills=12, seconds=0.6, spread=spread)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True], ids=["whole optimizer", "spread optimizer"])
@pytest.mark.parametrize(("workers", "chunks"), [([4, 2, 1, 2], 4), ([3, 6, 2, 1], 6)], ids=["4", "6"])
def test_two_hundred_kills(tmp_path: Path, workers: list[int], chunks: int, spread: bool) -> None:
    kills = int(os.environ.get("ROLLFORWARD_WORKER_KILLS", "200"))
    seconds = float(os.environ.get("ROLLFORWARD_WORKER_SECONDS", "0.8"))
    run_killed(Place(tmp_path), workers, chunks=chunks, kills=kills, seconds=seconds, spread=spread)
