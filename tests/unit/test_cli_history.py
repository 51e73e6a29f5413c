"""`rollforward history` tells what happened to a run, in the order in which it did."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.errors import VerifierError
from rollforward.replay import report as recovery_report
from rollforward.store import checkpoints
from rollforward.store.journal import writing


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A run that was killed in step 0_4, killed again in 1_3, and then ran to its end."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("history"))
        patch.chdir(place.root)
        commit_at_once(patch)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=5), resume=True)
        place.train("run", resume=True)
        yield place


def entries(place: Place, capsys: pytest.CaptureFixture[str], run: str = "run") -> list[dict[str, object]]:
    assert main(["history", str(place.root / run), "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)["entries"]
    return found


def test_starts_kills_resumes_and_checkpoints_come_in_their_order(
    trained: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [(entry["what"], entry["start"], entry["position"]) for entry in entries(trained, capsys)]
    assert told == [
        ("started", 1, "0_0"),
        ("checkpoint", 1, "0_0"),
        ("checkpoint", 1, "0_3"),
        ("stopped", 1, "0_4"),
        ("resumed", 2, "0_3"),
        ("checkpoint", 2, "1_1"),
        ("stopped", 2, "1_3"),
        ("resumed", 3, "1_1"),
        ("checkpoint", 3, "1_4"),
        ("checkpoint", 3, "2_0"),
        ("finished", 3, "2_0"),
    ]


def test_a_resume_says_what_it_replayed(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [entry["text"] for entry in entries(trained, capsys) if entry["what"] == "resumed"]
    assert texts == [
        "from checkpoint 0_3 of start 1, by 1 worker; 2 steps replayed, up to 1_0; lost: nothing",
        "from checkpoint 1_1 of start 2, by 1 worker; 3 steps replayed, up to 1_4; lost: nothing",
    ]


def test_a_resume_of_which_the_first_segment_was_pruned_is_no_new_run(
    trained: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.root)
    commit_at_once(monkeypatch)
    with pytest.raises(Killed):
        trained.train("short", ToyPackage(dies_at_update=4), rl_config__save_max_ckpt_num=2)
    trained.train("short", resume=True, rl_config__save_max_ckpt_num=2)
    capsys.readouterr()
    for text in ("from checkpoint 0_3 of start 1", "its journal before 1_4 is gone"):
        first, *_ = [entry for entry in entries(trained, capsys, "short") if entry["what"] != "checkpoint"]
        assert (first["what"], first["start"], first["position"]) == ("resumed", 2, "0_3")
        assert text in str(first["text"])
        (trained.root / "short" / recovery_report.FILE).unlink(missing_ok=True)


def test_a_recovery_is_told_when_nothing_of_its_journal_is_left(
    trained: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.root)
    shutil.copytree(trained.root / "run", trained.root / "bare")
    shutil.rmtree(trained.root / "bare/journal")
    capsys.readouterr()
    told = [(entry["what"], entry["start"]) for entry in entries(trained, capsys, "bare")]
    assert [found for found in told if found[0] != "checkpoint"] == [("resumed", 2), ("resumed", 3)]


def test_each_entry_is_a_line(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    told = entries(trained, capsys)
    assert main(["history", str(trained.root / "run")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == [entry["what"] for entry in told]
    assert {len(line) for line in lines} == {5}
    times = [line[0] for line in lines]
    assert times == sorted(times)


def test_a_clock_that_was_turned_back_turns_nothing_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Starts are numbered; the clock of the second one is two days behind that of the first."""
    monkeypatch.chdir(tmp_path)
    commit_at_once(monkeypatch)
    place = Place(tmp_path)
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=4))

    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) - timedelta(days=2)

    for module in (writing, checkpoints):
        monkeypatch.setattr(module, "datetime", Behind)
    place.train("run", resume=True)
    capsys.readouterr()
    told = entries(place, capsys)
    assert [entry["start"] for entry in told] == sorted(entry["start"] for entry in told)  # type: ignore[type-var]
    assert told[0]["what"] == "started"
    assert told[-1]["what"] == "finished"
    assert str(told[-1]["time"]) < str(told[0]["time"]), "the clock was turned back"


def test_who_is_at_it_is_said(
    trained: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.root)
    with pytest.raises(Killed):
        trained.train("other", ToyPackage(dies_at_update=4))
    capsys.readouterr()
    assert entries(trained, capsys, "other")[-1]["what"] == "stopped", "it let go of its lock"
    path = trained.root / "other/run.lock"
    owner = json.loads(path.read_bytes())
    for pid, what in ((os.getpid(), "running"), (2**22 + 1, "killed")):
        path.write_text(json.dumps(owner | {"held": True, "pid": pid}))
        assert entries(trained, capsys, "other")[-1]["what"] == what


def test_damage_is_told(
    trained: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.root)
    trained.train("hurt")
    segment = trained.root / "hurt/journal/rank_0/1-0_3.journal"
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    capsys.readouterr()
    (damage,) = [entry for entry in entries(trained, capsys, "hurt") if entry["what"] == "damage"]
    assert "1-0_3.journal: damaged at byte" in str(damage["text"])


calls = itertools.count()


def gives_up_in_the_third_chunk(completions: list[str]) -> list[float]:
    """A verifier with a mistake."""
    if next(calls) >= 2:
        raise KeyError("answer")
    return [0.0 for _ in completions]


def test_the_error_that_ended_a_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    with pytest.raises(VerifierError):
        place.train(
            "run", reward_config__verifier_function=[f"{__name__}:{gives_up_in_the_third_chunk.__name__}"]
        )
    capsys.readouterr()
    *_, last = entries(place, capsys)
    assert (last["what"], last["start"], last["position"]) == ("failed", 1, "0_0")
    assert str(last["text"]).startswith("VerifierError: step 0_1, chunk 0: verifier ")
    assert "raised KeyError: 'answer'" in str(last["text"])
