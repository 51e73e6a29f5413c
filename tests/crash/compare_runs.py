"""What has to hold of a run that was killed, held against one that was not."""

import json
from pathlib import Path

import numpy as np

from rollforward.position import Position
from rollforward.replay import report as recovery_report
from rollforward.replay.metrics import FILE, read
from rollforward.storage import LocalStorage
from rollforward.store import Manifest, Retention, find, list_checkpoints, read_tensors
from rollforward.store.pruning import prune


def state_of(folder: Path) -> tuple[Manifest, dict[tuple[str, str], np.ndarray]]:
    """The newest checkpoint and its tensors, (role, name) -> array."""
    storage = LocalStorage(folder)
    manifest = find(storage).manifest
    return manifest, {(role, name): array for role, name, array in read_tensors(storage, manifest)}


def figures(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step, without what the clock and the disk say; no line is torn."""
    assert all(json.loads(line) for line in (folder / FILE).read_text().splitlines())
    clock, elsewhere = ("incarnation", "time", "tokens_per_second"), ("seconds/", "saves_")
    return [
        {key: value for key, value in record.items() if key not in clock and not key.startswith(elsewhere)}
        for record in read(folder / FILE)
    ]


def assert_same_end(folder: Path, whole: Path) -> None:
    """The same bytes in every tensor of every role, and the same metrics of every step."""
    (manifest, state), (expected_manifest, expected) = state_of(folder), state_of(whole)
    assert manifest.position == expected_manifest.position
    assert manifest.metrics == expected_manifest.metrics
    assert state.keys() == expected.keys()
    assert {role for role, _ in state} == {"policy_model", "optimizer", "ref"}
    for key, array in expected.items():
        assert state[key].tobytes() == array.tobytes(), key
    assert figures(folder) == figures(whole)


def assert_every_checkpoint_is_whole(folder: Path) -> None:
    assert all(found.valid for found in list_checkpoints(LocalStorage(folder), deep=True))


def assert_nothing_is_left(folder: Path, whole: Path) -> None:
    """After `rollforward prune` there are the files that there should be."""
    assert prune(LocalStorage(folder), Retention(newest=2)) == []
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


class Finished:
    """What one rank has finished, by its diaries: no such chunk may be generated again."""

    def __init__(self) -> None:
        self._chunks: dict[str, Position] = {}

    def read(self, pages: list[list[str]]) -> None:
        """Go through a diary; AssertionError where a finished chunk is generated again."""
        for what, *words in pages:
            if what == "finished":
                self._chunks[words[0]] = Position.parse(words[1])
            assert not (what == "generated" and words[0] in self._chunks), words

    def branch(self, position: Position) -> None:
        """Nothing of this position or later is taken over."""
        self._chunks = {chunk: where for chunk, where in self._chunks.items() if where < position}
