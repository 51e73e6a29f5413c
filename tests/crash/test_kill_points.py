"""Killed at an exact place, whichever, and resumed, a run ends as if nothing had happened.

`CASES` says what is covered: each is a list of places (`kill_points`), one for each start that dies;
the start after them runs to the end. The ranks are real processes and die by SIGKILL.
"""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compare_runs import (
    Finished,
    assert_every_checkpoint_is_whole,
    assert_nothing_finished_was_lost,
    assert_nothing_is_left,
    assert_same_end,
)
from kill_points import IN_A_CHECKPOINT, IN_A_NEW_FOLDER, IN_A_STEP, IN_PRUNING, POINTS
from mortal_ranks import MortalRanks, Start, diary
from toy_session import Place

from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import find

ONE_PLACE = [(name,) for name in (*IN_A_STEP, *IN_A_CHECKPOINT, *IN_PRUNING)]
TORN = "in the journal's write"
MID_STEP = "in the second update of a step"
IN_RECOVERY_TOO = [
    (MID_STEP, "before a table is read"),
    (MID_STEP, "in restoring"),
    (TORN, "before the torn end is copied aside"),
    (TORN, "before the torn end is cut"),
    (TORN, "after the torn end was cut"),
    (MID_STEP, "before the next incarnation's segment"),
    (MID_STEP, "in the header of the next incarnation's segment"),
    (MID_STEP, "before the metrics are cut back"),
    (MID_STEP, "after the metrics were cut back"),
    (MID_STEP, "in the first replayed update"),
    (MID_STEP, "in the second replayed update"),
    # Recovery itself is killed, and then the recovery from that.
    (MID_STEP, "in the second replayed update", "between two replayed updates"),
    (TORN, "before the torn end is cut", "before the torn end is cut", "in restoring"),
    # The first of these checkpoints never came to be: the replay saves it, and is killed in that.
    ("in the background write", "in the background write"),
    ("every part written, before the manifest", "between the manifest's rename and the folder's sync"),
    ("between the manifest and meta.json", "before an old manifest goes", "between two old files"),
]
CASES = [*ONE_PLACE, *IN_RECOVERY_TOO]

COMMON = {
    "rl_config__num_iterations": 2,
    "ref_config__sync_ref_model": True,
    "ref_config__ref_model_sync_steps": 2,
    "rl_config__save_ckpt_interval": 3,
    "rl_config__save_max_ckpt_num": 2,
    "rl_config__weights_digest_interval": 2,
    "rl_config__max_steps": 8,
    "rl_config__num_generations": 2,
    "rl_config__batch_size": 2,
    "actor_config__lr_schedule__decay_steps": 16,
}
SIZES: dict[int, dict[str, Any]] = {1: {"rl_config__chunk_size": 2}, 2: {"rl_config__chunk_size": 1}}
"""By ranks: as many prompts to a step with one as with two, so that both have the same steps."""


class Runs:
    """Runs with their place, the ranks that do them, and the one that was never killed."""

    def __init__(self, root: Path, ranks: MortalRanks) -> None:
        self.place = Place(root)
        self._ranks = ranks

    def whole(self, world_size: int) -> Path:
        """A run that was never killed."""
        run = f"whole_{world_size}"
        if not (self.place.root / run).exists():
            assert set(self.start(run, world_size)) == {0}
        return self.place.root / run

    def start(
        self,
        run: str,
        world_size: int,
        victim: int = 0,
        point: str = "",
        source: str = "",
        position: str = "",
    ) -> list[int]:
        """Go on with the run if there is anything to go on with, else with `source`; else begin it.

        How each rank ended; the victim dies at the point.
        """
        begun = any((self.place.root / run / "commits").glob("*.json"))
        killed = self.killed(run, victim)
        start = Start(
            root=str(self.place.root),
            run=run,
            world_size=world_size,
            resume=begun or bool(source),
            source="" if begun else source,
            position="" if begun else position,
            changes=COMMON | SIZES[world_size],
            points={str(victim): point} if point else {},
        )
        codes = self._ranks.start(start)
        if point:
            assert self.killed(run, victim) == [*killed, point], f"{point}: never got there"
            assert codes[victim] == -signal.SIGKILL
        return codes

    def killed(self, run: str, rank: int) -> list[str]:
        """The points at which it was killed so far."""
        return [words[0] for what, *words in diary(self.place.root, run, rank) if what == "killed"]

    def check(self, run: str, world_size: int, source: str = "", position: str = "") -> None:
        """The run has ended as if nothing had happened."""
        folder, whole = self.place.root / run, self.whole(world_size)
        assert_same_end(folder, whole)
        assert_every_checkpoint_is_whole(folder)
        assert_nothing_finished_was_lost(folder)
        assert_nothing_is_left(folder, whole)
        for rank in range(world_size):
            finished = Finished()
            if source:
                finished.read(diary(self.place.root, source, rank))
            if position:
                finished.branch(Position.parse(position))
            finished.read(diary(self.place.root, run, rank))


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """In memory, if it can be: what a killed process wrote is the kernel's, whatever the disk has of it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, MortalRanks() as ranks:
        yield Runs(Path(folder), ranks)


def victim_of_two(points: tuple[str, ...]) -> int:
    """The second rank, unless the first alone gets to all of the points."""
    return 0 if any(POINTS[point].first_rank_only for point in points) else 1


def die_and_resume(runs: Runs, points: tuple[str, ...], victim: int, world_size: int) -> None:
    run = f"killed_{world_size}_{CASES.index(points)}"
    for point in points:
        runs.start(run, world_size, victim, point)
    assert set(runs.start(run, world_size)) == {0}
    runs.check(run, world_size)


@pytest.mark.parametrize(
    "points",
    [
        # One rank alone has less to go wrong than two: two of three places by name.
        pytest.param(points, marks=[] if number % 3 == 0 else pytest.mark.slow)
        for number, points in enumerate(CASES)
    ],
    ids=", then ".join,
)
def test_one_rank(runs: Runs, points: tuple[str, ...]) -> None:
    die_and_resume(runs, points, 0, 1)


@pytest.mark.parametrize("points", CASES, ids=", then ".join)
def test_one_of_two_ranks(runs: Runs, points: tuple[str, ...]) -> None:
    """The other, which waits for it, is killed by who watches them."""
    die_and_resume(runs, points, victim_of_two(points), 2)


@pytest.mark.parametrize("position", ["", "0_4"], ids=["moved", "branched off at 0_4"])
@pytest.mark.parametrize("point", [*IN_A_NEW_FOLDER, "in the second replayed update"])
def test_going_on_in_a_new_folder(runs: Runs, point: str, position: str) -> None:
    """The new folder goes on by itself as soon as it can; until then the same is asked for again."""
    number, victim = [*POINTS].index(point), victim_of_two((point,))
    old, new = f"old_{number}{position}", f"new_{number}{position}"
    runs.start(old, 2, 0, "in the next epoch's first generation")
    runs.start(new, 2, victim, point, source=old, position=position)
    assert set(runs.start(new, 2, source=old, position=position)) == {0}
    runs.check(new, 2, source=old, position=position)


def test_meta_json_says_what_was_resumed_from_as_soon_as_training_goes_on(runs: Runs) -> None:
    run, folder = "meta", runs.place.root / "meta"
    runs.start(run, 2, 1, "between the manifest and meta.json")
    manifest = find(LocalStorage(folder)).manifest
    stale = meta_json(folder)
    runs.start(run, 2, 1, "in the first replayed update")
    assert find(LocalStorage(folder)).manifest == manifest
    told = meta_json(folder)
    assert set(told.values()) == {Path(file.path).name for file in manifest.files}
    assert {path for path in told if told[path] != stale[path]} >= {"train/rank_1", "optimizer/rank_1"}


def meta_json(folder: Path) -> dict[str, str]:
    """Rank folder -> the file that its `meta.json` names."""
    return {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())["last_ckpt_file"]
        for path in folder.glob("*/rank_*/meta.json")
    }


def test_the_journal_of_a_rank_that_is_no_more_goes_with_the_first_checkpoint(runs: Runs) -> None:
    run, journal = "fewer", runs.place.root / "fewer/journal"
    runs.start(run, 2, 0, "in the first checkpoint of all")
    assert list((journal / "rank_1").iterdir())
    assert runs.start(run, 1) == [0]
    assert list((journal / "rank_1").iterdir()) == []
    assert list((journal / "rank_0").iterdir())
    assert_same_end(runs.place.root / run, runs.whole(1))
