"""One long run on two real processes, killed at random instants, pruned and branched off in between.

The same numbers of another size: ROLLFORWARD_RUN_KILLS (500), ROLLFORWARD_RUN_BRANCH_EVERY (25 kills),
ROLLFORWARD_RUN_SECONDS (0.8, the longest that a start lives), ROLLFORWARD_RUN_SEED (1).
"""

import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from compare_runs import (
    Finished,
    assert_every_checkpoint_is_whole,
    assert_nothing_finished_was_lost,
    assert_same_end,
    figures,
)
from mortal_ranks import MortalRanks, Start, diary
from soak_settings import SETTINGS
from toy_session import Place

from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import Retention, find
from rollforward.store.catalog import positions
from rollforward.store.journal.reading import read_journals
from rollforward.store.pruning import prune

RANKS, CHUNKS, STEPS_PER_EPOCH = 2, 4, 5
"""Chunks of a step, over both ranks."""


class LongRun:
    """The run as it goes from folder to folder, and what has happened to it."""

    def __init__(self, place: Place, ranks: MortalRanks, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.folder = "run_0"
        self._place = place
        self._ranks = ranks
        self._drawn = random.Random(seed)
        self._finished = [Finished() for _ in range(RANKS)]
        self._source, self._position = "", ""
        """Of a branch that cannot be resumed by itself yet."""

    @property
    def path(self) -> Path:
        return self._place.root / self.folder

    @property
    def begun(self) -> bool:
        return bool(positions(LocalStorage(self.path)))

    def start(self, after: float | None = None, **changes: Any) -> None:
        """Go on, until it is killed or to the end."""
        victims = self._drawn.choice([[0], [1], [0, 1]])
        begun = self.begun
        codes = self._ranks.start(
            Start(
                root=str(self._place.root),
                run=self.folder,
                world_size=RANKS,
                resume=begun or bool(self._source),
                source="" if begun else self._source,
                position="" if begun else self._position,
                changes=SETTINGS | changes,
                after=after,
                victims=victims,
            )
        )
        assert set(codes) == ({0} if after is None else {-9})
        self.counts["kills"] += after is not None
        self._look()

    def prune(self) -> None:
        """By hand, to fewer than the run keeps itself."""
        self.counts["prunes"] += 1
        assert prune(LocalStorage(self.path), Retention(newest=self._drawn.randint(1, 2))) == []
        self._look()

    def branch(self) -> None:
        """Go on in a new folder, from any step that the journal reaches."""
        first, last = self._reach()
        step = self._drawn.randint(first, last)
        position = Position(*divmod(step, STEPS_PER_EPOCH))
        self.counts["branches"] += 1
        self.counts["steps gone back"] += last - step
        self._close_diary(position)
        self._source, self._position = self.folder, str(position)
        self.folder = f"run_{self.counts['branches']}"

    def leave_source(self) -> None:
        """The folder that it branched off from is needed no more."""
        if self._source and self.begun:
            shutil.rmtree(self._place.root / self._source)
            self._source = self._position = ""

    def close(self) -> None:
        """No finished chunk was generated twice."""
        self._close_diary(Position(0, 0))

    def steps(self) -> int:
        """Those of the newest checkpoint, be it where it branched off from."""
        folder = self.path if self.begun else self._place.root / self._source
        return find(LocalStorage(folder)).manifest.global_step

    def _reach(self) -> tuple[int, int]:
        """The oldest checkpoint, and the first step that the journal does not have whole."""
        storage = LocalStorage(self.path)
        oldest = min(positions(storage))
        newest = find(storage).manifest
        view = read_journals([storage], since=newest.position, checkpoint=newest.order)
        end = view.first_incomplete(newest.position, chunks_per_step=CHUNKS, steps_per_epoch=STEPS_PER_EPOCH)
        return oldest.global_step(STEPS_PER_EPOCH), end.global_step(STEPS_PER_EPOCH)

    def _close_diary(self, position: Position) -> None:
        for rank, finished in enumerate(self._finished):
            pages = diary(self._place.root, self.folder, rank)
            self.counts["chunks"] += sum(what == "finished" for what, *_ in pages)
            finished.read(pages)
            finished.branch(position)

    def _look(self) -> None:
        """What is there after each kill is in order."""
        assert_every_checkpoint_is_whole(self.path)
        assert_nothing_finished_was_lost(self.path)


@pytest.mark.slow
def test_five_hundred_kills_with_pruning_and_branching(tmp_path: Path) -> None:
    kills = int(os.environ.get("ROLLFORWARD_RUN_KILLS", "500"))
    every = int(os.environ.get("ROLLFORWARD_RUN_BRANCH_EVERY", "25"))
    seconds = float(os.environ.get("ROLLFORWARD_RUN_SECONDS", "0.8"))
    seed = int(os.environ.get("ROLLFORWARD_RUN_SEED", "1"))
    drawn = random.Random(seed)
    place = Place(tmp_path)
    with MortalRanks() as ranks:
        run = LongRun(place, ranks, seed)
        for kill in range(kills):
            if run.begun and kill > 0 and kill % every == 0:
                run.branch()
            elif run.begun and kill % every == every // 2:
                run.prune()
            run.start(after=drawn.uniform(0, seconds))
            run.leave_source()
        # However fast the machine is: the end lies a few steps behind what was reached.
        end = {"rl_config__max_steps": run.steps() + 10}
        run.start(**end)
        run.close()
        whole = LongRun(place, ranks, seed)
        whole.folder = "whole"
        whole.start(**end)
    print(dict(run.counts), "steps:", whole.steps())
    assert_same_end(run.path, whole.path)
    moving = [record["grad_norm"] > 0 for record in figures(whole.path)]
    assert sum(moving) > 0.5 * len(moving), "a policy that rests proves nothing"
