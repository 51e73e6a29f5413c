"""When a run saves: as often as is worth it, never two saves at once, and never anything in its numbers."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.errors import ConfigError
from rollforward.grpo.ports import Engine, Group
from rollforward.grpo.types import EngineSettings
from rollforward.inspection.doctor import examine
from rollforward.inspection.folder import checkpoints_of
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.replay import saving
from rollforward.replay.cadence import Cadence
from rollforward.replay.metrics import FILE, read
from rollforward.storage import LocalStorage
from rollforward.store.catalog import load_manifest, positions
from rollforward.store.checkpoints import Attempt
from rollforward.store.saved import Spent

ALL = {"rl_config__save_max_ckpt_num": 100}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def saved(place: Place, run: str) -> list[str]:
    return [str(info.position) for info in checkpoints_of(place.root / run, deep=True) if info.valid]


def cost_as_told(monkeypatch: pytest.MonkeyPatch, *, steps: int) -> None:
    """No machine disturbs what is measured: from the first commit on, a save is worth it every few steps."""

    def advise(_: Cadence, spent: Spent) -> dict[str, Any]:
        assert spent.blocked >= 0
        assert spent.processor > 0
        assert spent.seconds > 0
        return {"interval": steps, "why": f"the test wants {steps}"}

    monkeypatch.setattr(Cadence, "advise", advise)


class TestAuto:
    def test_it_is_as_often_as_is_worth_it_and_the_log_and_the_checkpoints_say_why(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commit_at_once(monkeypatch)
        cost_as_told(monkeypatch, steps=4)
        place.train("run", rl_config__save_ckpt_interval="auto", **ALL)
        assert saved(place, "run") == ["0_0", "0_1", "1_0", "1_4", "2_0"]
        lines = [line for line in capsys.readouterr().out.splitlines() if "checkpoints: every" in line]
        assert [line.partition("checkpoints: ")[2] for line in lines] == [
            "every 4 steps from now on: the test wants 4"
        ]
        found = examine(name_checkpoint_folders("", "", place.root / "run"))
        told = [finding.text for finding in found if "the run saved" in finding.text]
        assert told == ["when 2_0 was saved, the run saved every 4 steps: the test wants 4"]
        storage = LocalStorage(place.root / "run")
        assert load_manifest(storage, positions(storage)[0]).state[saving.INTERVAL] == {
            "steps": 4,
            "why": "the test wants 4",
        }

    def test_it_does_not_reach_the_numbers(self, place: Place) -> None:
        """Measured for real: whatever the intervals were."""
        place.train("plain")
        place.train("run", rl_config__save_ckpt_interval="auto", rl_config__save_ckpt_share=0.5)
        assert place.digests("run") == place.digests("plain")
        figures = [
            [
                {name: row[name] for name in ("loss", "reward", "grad_norm")}
                for row in read(place.root / run / FILE)
            ]
            for run in ("plain", "run")
        ]
        assert figures[0] == figures[1]

    def test_killed_and_resumed_it_ends_with_the_same_bytes(self, place: Place) -> None:
        place.train("plain")
        # Few updates before the second death: how many are left depends on when saves were written.
        for dies, resume in ((4, False), (3, True)):
            with pytest.raises(Killed):
                place.train(
                    "run",
                    ToyPackage(dies_at_update=dies),
                    resume=resume,
                    rl_config__save_ckpt_interval="auto",
                    rl_config__save_ckpt_share=0.5,
                )
        place.train("run", resume=True)
        assert place.digests("run") == place.digests("plain")

    def test_all_ranks_do_as_the_first_one_measures(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each measures something else; a rank that went its own way would wait for the others for ever."""
        commit_at_once(monkeypatch)
        asked = 0

        def advise(_: Cadence, __: Spent) -> dict[str, Any]:
            nonlocal asked
            asked += 1
            return {"interval": asked, "why": f"measured {asked} times"}

        followed: list[int] = []
        follow = Cadence.follow

        def note(cadence: Cadence, advice: Any) -> bool:
            followed.append(advice["interval"])
            return follow(cadence, advice)

        monkeypatch.setattr(Cadence, "advise", advise)
        monkeypatch.setattr(Cadence, "follow", note)
        ended = place.train_by_two("run", rl_config__save_ckpt_interval="auto", **ALL)
        assert ended == [None, None]
        assert followed[::2] == followed[1::2], "both were told the same"
        assert asked == len(followed) >= 4
        place.train_by_two("plain", **ALL)
        assert place.digests("run") == place.digests("plain")

    def test_another_word_than_auto_is_refused(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="must be a number, or one of auto; it is 'often'"):
            place.train("run", rl_config__save_ckpt_interval="often")
        with pytest.raises(ConfigError, match="must be at least 0; it is -1"):
            place.train("run", rl_config__save_ckpt_interval=-1)


@dataclass
class SlowDisk(ToyPackage):
    """A save is written when the engine has done three more updates, or the run has nothing more to do."""

    total: int = 10
    changed: threading.Condition = field(default_factory=threading.Condition)
    done: int = 0
    at_once: int = 0
    most: int = 0
    """The most saves that were in progress at a time."""

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        engine = super().create(settings, group)
        update = engine.update

        def count(*arguments: Any) -> Any:
            outcome = update(*arguments)
            with self.changed:
                self.done += 1
                self.changed.notify_all()
            return outcome

        engine.update = count  # type: ignore[method-assign]
        return engine

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write = Attempt.write

        def slow(attempt: Attempt) -> None:
            with self.changed:
                self.at_once += 1
                self.most = max(self.most, self.at_once)
                target = min(self.done + 3, self.total)
                assert not self.done or self.changed.wait_for(lambda: self.done >= target, 300)
            write(attempt)
            with self.changed:
                self.at_once -= 1

        monkeypatch.setattr(Attempt, "write", slow)


class TestSlowDisk:
    def test_saves_do_not_pile_up_and_the_log_says_once_that_they_come_less_often(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("plain")
        capsys.readouterr()
        monkeypatch.setattr(saving, "PATIENCE", 0.05)
        disk = SlowDisk()
        disk.install(monkeypatch)
        place.train("run", disk, rl_config__save_ckpt_interval=1, **ALL)
        lines = capsys.readouterr().out.splitlines()
        warnings = [line for line in lines if "come less often" in line]
        assert len(warnings) == 1
        assert (
            "checkpoints come less often than every 1 step: after 2 steps the one before was not"
            in warnings[0]
        )
        assert disk.most == 1
        found = saved(place, "run")
        assert found[:2] == ["0_0", "0_1"]
        assert found[-1] == "2_0"
        assert 3 <= len(found) <= 6, "every third or fourth step, and the last"
        assert place.digests("run") == place.digests("plain")

    def test_a_disk_that_is_only_late_once_is_waited_for(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Whoever asked for every step gets it, as long as the disk keeps up by and large."""
        waited = threading.Event()
        write, wait = Attempt.write, saving.ShadowCheckpoints.can_begin

        def late(attempt: Attempt) -> None:
            assert str(attempt.description.position) != "0_1" or waited.wait(300)
            write(attempt)

        def and_tell(shadow: saving.ShadowCheckpoints, patience: float) -> bool:
            waited.set()
            return wait(shadow, patience)

        monkeypatch.setattr(saving, "PATIENCE", 60.0)
        monkeypatch.setattr(Attempt, "write", late)
        monkeypatch.setattr(saving.ShadowCheckpoints, "can_begin", and_tell)
        place.train("run", rl_config__save_ckpt_interval=1, **ALL)
        assert len(saved(place, "run")) == 11
        assert "come less often" not in capsys.readouterr().out

    def test_what_retention_counts_on_is_waited_for(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saving, "PATIENCE", 0.0)
        ready = threading.Event()
        write, begin = Attempt.write, saving.JournaledCheckpoints.begin

        def held(attempt: Attempt) -> None:
            assert str(attempt.description.position) != "0_4" or ready.wait(300)
            write(attempt)

        def begins(self: saving.JournaledCheckpoints, position: Any, *rest: Any) -> None:
            if str(position) == "1_0":
                ready.set()
            begin(self, position, *rest)

        monkeypatch.setattr(Attempt, "write", held)
        monkeypatch.setattr(saving.JournaledCheckpoints, "begin", begins)
        place.train("run", rl_config__save_ckpt_interval=1, rl_config__keep_ckpt_per_n_steps=5, **ALL)
        assert {"1_0", "2_0"} <= set(saved(place, "run"))
