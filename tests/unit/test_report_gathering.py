"""A page shows any run that `history` can read, and only reads it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

import rollforward
from rollforward.errors import NothingToResume
from rollforward.inspection.report.gathering import encode, gather, names_of, readers_of

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"};alert(1);//',
    "\u2028\u2029",
    "a lone \ud800 surrogate",
    "\x1b[2J\x1b[31mred",
    "right \u202eto left\u2066",
    "\x00 nothing",
    "x" * 1_000_000,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A run that was killed once, with a checkpoint after every third step."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("gathering"))
        patch.chdir(place.root)
        commit_at_once(patch)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        place.train("run", resume=True, rl_config__epochs=3)
        yield place


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path.relative_to(folder)): (found.st_ino, found.st_size, found.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for found in [path.lstat()]
    }


def parts(*folders: Path, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode(gather(readers_of(folders, **options))))
    return found


def test_everything_is_there_and_nothing_is_changed(place: Place) -> None:
    before = snapshot(place.root / "run")
    found = parts(place.root / "run")
    assert snapshot(place.root / "run") == before
    assert {"0/curves", "0/timeline", "0/rollouts", "0/health", "0/rollouts/1_1", "0/rollouts/2_4"} <= set(
        found
    )
    assert not [name for name, value in found.items() if "error" in value]
    health = found["0/health"]
    assert health["deep"]
    assert not any(each["reason"] for each in health["checkpoints"])
    first, second = health["configurations"]
    assert (first["start"], second["start"]) == (1, 2)
    assert second["changed"] == ["rl_config.epochs changed from 2 to 3"]
    assert second["keys"]["rl_config.epochs"] == "3"


def test_a_damaged_byte_is_found(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.root / "run", tmp_path / "run")
    newest = max(
        (tmp_path / "run" / "train").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    )
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    journal = sorted((tmp_path / "run" / "journal").rglob("*.journal"))[0]
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    found = parts(tmp_path / "run")
    assert [each["reason"] for each in found["0/health"]["checkpoints"] if each["reason"]]
    assert [each for journal in found["0/health"]["journals"] for each in journal["problems"]]
    assert any(entry[1] == "damage" for entry in found["0/timeline"]["entries"])
    assert found["0/rollouts/2_4"]["groups"], "what is intact is still shown"


@pytest.mark.parametrize(
    "gone", ["metrics.jsonl", "journal", "configurations.jsonl", "recoveries.jsonl", "train"]
)
def test_without_one_of_its_files_the_rest_is_shown(place: Place, tmp_path: Path, gone: str) -> None:
    shutil.copytree(place.root / "run", tmp_path / "run")
    path = tmp_path / "run" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = parts(tmp_path / "run")
    assert not [name for name, value in found.items() if "error" in value]
    assert found["0/curves"]["charts"], "of metrics, or of outcomes in the journal"
    assert found["0/timeline"]["starts"]


def test_what_cannot_be_read_says_so_beside_what_can(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.root / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    found = parts(tmp_path / "run")
    assert "metrics.jsonl" in found["0/curves"]["error"]
    assert found["0/timeline"]["starts"]
    assert found["0/rollouts/2_4"]["groups"]


def test_a_run_under_way_is_read_while_it_holds_its_lock(tmp_path: Path) -> None:
    tensors = {"policy": {"w": np.zeros(2, dtype=np.float32)}}
    with rollforward.open_run(tmp_path / "run", log=lambda _: None) as run:
        run.restore(tensors)
        run.checkpoint(0, tensors)
        (reader,) = readers_of([tmp_path / "run"])
        for step in range(3):
            with run.updating(step):
                tensors["policy"]["w"] += 1
            run.outcome(step, loss=1.0)
            run.metrics(step, reward=float(step))
            (chart, *_) = reader.curves()["curves"]["charts"]
            timeline = reader.past()["timeline"]
            assert (chart["values"], timeline["running"]) == ([[float(n) for n in range(step + 1)]], True)
            assert timeline["starts"][-1]["ending"] == "running"
    assert not reader.past()["timeline"]["running"]


def test_hostile_texts_come_through_as_they_are(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "run")
    packed = encode(gather(readers_of([folder], whole=[])))
    assert packed.isascii()
    (step,) = [value for name, value in json.loads(packed).items() if name.startswith("0/rollouts/")]
    shown = {each["text"] for group in step["groups"] for each in group["completions"]}
    assert shown == {text[:20_000] for text in HOSTILE}


def hostile_run(folder: Path) -> Path:
    """A loop's run: what it made says what no model would."""
    tensors = {"policy": {"w": np.zeros(2, dtype=np.float32)}}
    info = {
        "prompts": [f"<b>{number}</b>" for number in range(len(HOSTILE))],
        "completions": HOSTILE,
        "rewards": {"<i>verifier</i>": [float(number) for number in range(len(HOSTILE))], "odd": ["x"] * 9},
        "tokens": ["many"] * len(HOSTILE),
        "advantages": [{}] * len(HOSTILE),
    }
    with rollforward.open_run(folder, facts={"<u>fact</u>": "</style>"}, log=lambda _: None) as run:
        run.restore(tensors)
        run.once(0, "rollouts", lambda: (np.zeros(1), info))
        with run.updating(0):
            tensors["policy"]["w"] += 1
        run.outcome(0, loss=0.0)
        run.metrics(0, **{"<b>reward</b>": 1.0, "reward": 1.0})
        run.checkpoint(1, tensors)
    return folder


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a" / "save_ckpt", tmp_path / "b" / "save_ckpt"]) == ["a", "b"]
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]) == [
        "x/a",
        "y/a",
        "y/b",
    ]
    assert names_of([tmp_path / "x" / "a\x1b[2J"]) == ["x/a\\x1b[2J"]
    assert names_of([Path("/")]) == ["/"]
    assert names_of([Path("/a/b"), Path("/a")]) == ["b", "a"]


def test_a_run_named_twice_is_shown_once(place: Place) -> None:
    (place.root / "link").symlink_to(place.root / "run")
    (reader,) = readers_of([place.root / "run", Path("run"), place.root / "link"])
    assert reader.name.endswith("/run")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingToResume, match="holds no run"):
        readers_of([tmp_path])
