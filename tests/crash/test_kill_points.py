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

import numpy as np
import pytest
from kill_points import IN_A_CHECKPOINT, IN_A_STEP, IN_PRUNING, POINTS
from mortal_ranks import MortalRanks, Start, diary
from toy_session import Place

from rollforward.run import recovery_report
from rollforward.run.metrics import FILE
from rollforward.storage import LocalStorage
from rollforward.store import Manifest, Retention, find, list_checkpoints, read_tensors
from rollforward.store.pruning import prune

ONE_PLACE = [(name,) for name in (*IN_A_STEP, *IN_A_CHECKPOINT, *IN_PRUNING)]
TORN = "in the journal's write"
MID_STEP = "in the second update of a step"
IN_RECOVERY_TOO = [
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

TWO_ITERATIONS = {
    "rl_config__num_iterations": 2,
    "ref_config__sync_ref_model": True,
    "ref_config__ref_model_sync_steps": 2,
}
COMMON = {
    "rl_config__max_steps": 8,
    "rl_config__num_generations": 2,
    "rl_config__batch_size": 2,
    "actor_config__lr_schedule__decay_steps": 16,
    "rl_config__save_ckpt_interval": 3,
    "rl_config__save_max_ckpt_num": 2,
    "rl_config__weights_digest_interval": 2,
}
SIZES: dict[int, dict[str, Any]] = {1: {"rl_config__chunk_size": 2}, 2: {"rl_config__chunk_size": 1}}
"""By ranks: as many prompts to a step with one as with two, so that both have the same steps."""


def state_of(folder: Path) -> tuple[Manifest, dict[tuple[str, str], np.ndarray]]:
    """The newest checkpoint and its tensors, (role, name) -> array."""
    storage = LocalStorage(folder)
    manifest = find(storage).manifest
    return manifest, {(role, name): array for role, name, array in read_tensors(storage, manifest)}


def figures(folder: Path) -> list[dict[str, float]]:
    """Every line of the metrics, without what the clock says."""
    clock = ("incarnation", "time", "tokens_per_second")
    return [
        {key: value for key, value in json.loads(line).items() if key not in clock and "seconds/" not in key}
        for line in (folder / FILE).read_text().splitlines()
    ]


def assert_same_end(folder: Path, whole: Path) -> None:
    """The same bytes in every tensor of every role, and the same metrics, line by line."""
    (manifest, state), (expected_manifest, expected) = state_of(folder), state_of(whole)
    assert manifest.position == expected_manifest.position
    assert manifest.metrics == expected_manifest.metrics
    assert state.keys() == expected.keys()
    assert {role for role, _ in state} == {"policy_model", "optimizer", "ref"}
    for key, array in expected.items():
        assert state[key].tobytes() == array.tobytes(), key
    assert figures(folder) == figures(whole)


def assert_nothing_generated_twice(pages: list[list[str]]) -> None:
    """What a rank once had finished is not generated again."""
    finished: set[str] = set()
    for what, *words in pages:
        if what == "finished":
            finished.add(words[0])
        assert not (what == "generated" and words[0] in finished), words


def assert_nothing_is_left(folder: Path, whole: Path) -> None:
    """Every checkpoint is whole, and after `rollforward prune` there are the files that there should be."""
    storage = LocalStorage(folder)
    assert all(found.valid for found in list_checkpoints(storage, deep=True))
    assert prune(storage, Retention(newest=2)) == []
    assert files_of(folder) == files_of(whole)


def files_of(folder: Path) -> set[str]:
    """All but reports of recoveries, and segments of the journal, named after the starts that wrote them."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.endswith((".journal", ".journal.torn", recovery_report.FILE))}


def assert_nothing_finished_was_lost(folder: Path) -> None:
    """What the recoveries say of themselves."""
    for report in recovery_report.read(LocalStorage(folder)):
        assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)
        assert report.updates_repeated == report.updates_replayed


class Runs:
    """Runs with their places, the ranks that do them, and their uninterrupted twins."""

    def __init__(self, root: Path, ranks: MortalRanks) -> None:
        self.place = Place(root)
        self._ranks = ranks
        self._wholes: dict[str, Path] = {}

    def whole(self, world_size: int, changes: dict[str, Any]) -> Path:
        """A run that was never killed."""
        name = f"whole_{len(self._wholes)}"
        key = json.dumps([world_size, changes])
        if key not in self._wholes:
            assert set(self.start(name, world_size, changes)) == {0}
            self._wholes[key] = self.place.root / name
        return self._wholes[key]

    def start(
        self, run: str, world_size: int, changes: dict[str, Any], points: dict[str, str] | None = None
    ) -> list[int]:
        """Go on with the run if there is anything to go on with, else begin it."""
        begun = any((self.place.root / run / "commits").glob("*.json"))
        start = Start(
            root=str(self.place.root),
            run=run,
            world_size=world_size,
            resume=begun,
            changes=COMMON | SIZES[world_size] | changes,
            points=points or {},
        )
        return self._ranks.start(start)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """In memory, if it can be: what a killed process wrote is the kernel's, whatever the disk has of it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, MortalRanks() as ranks:
        yield Runs(Path(folder), ranks)


def die_and_resume(runs: Runs, points: tuple[str, ...], victim: int, world_size: int, **changes: Any) -> None:
    run = f"killed_{victim}_of_{world_size}_{len(changes)}_{CASES.index(points)}"
    for number, point in enumerate(points, 1):
        codes = runs.start(run, world_size, changes, {str(victim): point})
        killed = [words[0] for what, *words in diary(runs.place.root, run, victim) if what == "killed"]
        assert killed == list(points[:number]), f"{point}: never got there"
        assert codes[victim] == -signal.SIGKILL
    assert set(runs.start(run, world_size, changes)) == {0}

    folder = runs.place.root / run
    assert_same_end(folder, runs.whole(world_size, changes))
    for rank in range(world_size):
        assert_nothing_generated_twice(diary(runs.place.root, run, rank))
    assert_nothing_finished_was_lost(folder)
    assert_nothing_is_left(folder, runs.whole(world_size, changes))


@pytest.mark.parametrize("points", CASES, ids=", then ".join)
def test_one_rank(runs: Runs, points: tuple[str, ...]) -> None:
    die_and_resume(runs, points, 0, 1, **TWO_ITERATIONS)


@pytest.mark.parametrize("points", CASES, ids=", then ".join)
def test_one_of_two_ranks(runs: Runs, points: tuple[str, ...]) -> None:
    """The second, which waits for the first, is killed by who watches them, and the other way round."""
    first = any(POINTS[point].first_rank_only for point in points)
    die_and_resume(runs, points, 0 if first else 1, 2, **TWO_ITERATIONS)


def test_meta_json_says_what_was_resumed_from_as_soon_as_training_goes_on(runs: Runs) -> None:
    run, folder = "meta", runs.place.root / "meta"
    runs.start(run, 2, {}, {"1": "between the manifest and meta.json"})
    manifest = find(LocalStorage(folder)).manifest
    stale = meta_json(folder)
    runs.start(run, 2, {}, {"1": "in the first replayed update"})
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
    runs.start(run, 2, {}, {"0": "in the first checkpoint of all"})
    assert list((journal / "rank_1").iterdir())
    assert runs.start(run, 1, {}) == [0]
    assert list((journal / "rank_1").iterdir()) == []
    assert list((journal / "rank_0").iterdir())
    assert_same_end(runs.place.root / run, runs.whole(1, {}))
