"""What a run says of its own checkpoints: in the log, in the metrics, and by how it ends."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import toy_engine
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.errors import ConfigError, EngineError, StorageError
from rollforward.grpo.ports import Engine, Group
from rollforward.grpo.types import EngineSettings
from rollforward.inspection.folder import checkpoints_of
from rollforward.position import Position
from rollforward.replay.metrics import FILE, read
from rollforward.run.saving import RunCheckpoints
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, shadow
from rollforward.store.catalog import oldest_position
from rollforward.store.checkpoints import Attempt
from rollforward.store.journal.writing import Journal
from rollforward.store.saved import Committed
from rollforward.store.shadow import ShadowCheckpoints


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def told_in_metrics(run: Path, name: str) -> int:
    return sum(record[name] for record in read(run / FILE))


class TestNothingLearnt:
    """Steps were taken, and the policy has the bytes that it had."""

    def test_a_learning_rate_of_zero_is_told_and_stops_nothing(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("run", actor_config__lr_schedule__lr=0)
        warnings = [line for line in capsys.readouterr().out.splitlines() if "suspicious" in line]
        assert [line.partition(", ")[0] for line in warnings] == [
            f"warning: suspicious: the policy of checkpoint {now} is byte for byte that of {before}"
            for before, now in [("0_0", "0_3"), ("0_3", "1_1"), ("1_1", "1_4"), ("1_4", "2_0")]
        ]
        assert "only with a learning rate of 0" in warnings[0]
        assert told_in_metrics(place.root / "run", "saves_suspicious") == 4
        assert len(read(place.root / "run" / FILE)) == 10

    def test_the_checkpoint_that_was_resumed_from_is_compared_with_too(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commit_at_once(monkeypatch)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        assert "suspicious" not in capsys.readouterr().out
        place.train("run", resume=True, rl_config__max_steps=6, actor_config__lr_schedule__lr=0)
        assert "checkpoint 1_1 is byte for byte that of 0_3, 3 steps earlier" in capsys.readouterr().out

    def test_learning_is_not_suspicious(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        place.train("run")
        assert "suspicious" not in capsys.readouterr().out
        assert told_in_metrics(place.root / "run", "saves_suspicious") == 0


@dataclass
class TooEarly(ToyPackage):
    """Its engine changes a weight while it generates, in the step after the first checkpoint."""

    changed: threading.Event = field(default_factory=threading.Event)

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        engine = super().create(settings, group)
        generate = engine.generate

        def generate_and_change(*arguments: Any) -> Any:
            if len(self.updates) == 3 and not self.changed.is_set():
                engine.tensors()["policy_model"]["head.bias"][1] += 1
                self.changed.set()
            return generate(*arguments)

        engine.generate = generate_and_change  # type: ignore[method-assign]
        return engine

    def hold_up(self, write: Callable[[Attempt], None]) -> Any:
        """Writing, but not before the weight has been changed."""

        def late(attempt: Attempt) -> None:
            assert not self.updates or self.changed.wait(300)
            write(attempt)

        return late


class TestProvingUnchanged:
    def test_an_engine_that_changes_its_weights_too_early_stops_the_run(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = TooEarly()
        monkeypatch.setattr(Attempt, "write", package.hold_up(Attempt.write))
        with pytest.raises(EngineError, match=r"checkpoint 0_3: policy_model head\.bias changed"):
            place.train("run", package, rl_config__save_ckpt_prove_unchanged=True)
        assert [str(info.position) for info in checkpoints_of(place.root / "run", deep=True)] == ["0_0"]

    def test_an_engine_that_waits_is_proved_right(self, place: Place) -> None:
        place.train("plain")
        place.train("run", rl_config__save_ckpt_prove_unchanged=True)
        assert place.digests("run") == place.digests("plain")


class TestCopies:
    """The memory of a device is read by copies: no more of them than there is to save."""

    def test_a_killed_and_resumed_run_ends_with_the_same_bytes_and_copies_what_changed(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        made: list[toy_engine.CopiedToyEngine] = []

        def make(settings: EngineSettings, group: Group) -> toy_engine.CopiedToyEngine:
            made.append(toy_engine.create_copied(settings, group))
            return made[-1]

        off = {"rl_config__weights_digest_interval": 0}
        place.train("plain", **off)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=5, make=make), **off)
        place.train("run", ToyPackage(make=make), resume=True, **off)
        assert place.digests("run") == place.digests("plain")
        # 0_0, 0_3 before the kill; 1_1, 1_4 and 2_0 after it. The reference never changed.
        for engine, saves, references in ((made[0], 2, 1), (made[1], 3, 0)):
            for role, times in (("policy_model", saves), ("optimizer", saves), ("ref", references)):
                assert [engine.copied[role, name] for name in engine.roles[role]] == [times] * len(
                    engine.roles[role]
                )


def refuse(monkeypatch: pytest.MonkeyPatch, position: str) -> None:
    """A disk that takes no tensors of this checkpoint."""
    write = Attempt.write

    def full(attempt: Attempt) -> None:
        if str(attempt.description.position) == position:
            raise StorageError("writing: No space left on device", hint="free some space")
        write(attempt)

    monkeypatch.setattr(Attempt, "write", full)


class TestFailed:
    """A checkpoint could not be saved."""

    def test_training_goes_on_and_log_and_metrics_tell(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("whole")
        refuse(monkeypatch, "1_1")
        capsys.readouterr()
        place.train("run")
        assert "warning: checkpoint 1_1 was not saved, writing it failed" in capsys.readouterr().out
        assert told_in_metrics(place.root / "run", "saves_failed") == 1
        assert told_in_metrics(place.root / "whole", "saves_failed") == 0
        assert place.digests("run") == place.digests("whole")

    def test_when_nothing_newer_is_saved_the_run_fails_and_the_metrics_tell(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refuse(monkeypatch, "2_0")
        with pytest.raises(StorageError, match="checkpoint 2_0 was not saved"):
            place.train("run")
        records = read(place.root / "run" / FILE)
        assert [record["saves_failed"] for record in records] == [0] * 9 + [1]


class TestBest:
    """Checkpoints carry what the steps before them were rewarded with, and the best can be kept."""

    @staticmethod
    def carried(run: Path) -> dict[str, dict[str, float]]:
        return {
            str(info.position): info.manifest.metrics
            for info in checkpoints_of(run, deep=True)
            if info.manifest is not None
        }

    def test_a_checkpoint_carries_the_mean_reward_since_the_one_before(self, place: Place) -> None:
        place.train("run")
        rewards = [record["reward"] for record in read(place.root / "run" / FILE)]
        carried = self.carried(place.root / "run")
        assert carried.pop("0_0") == {}
        ends = {"0_3": rewards[:3], "1_1": rewards[3:6], "1_4": rewards[6:9], "2_0": rewards[9:]}
        assert {name: metrics["reward"] for name, metrics in carried.items()} == pytest.approx(
            {name: sum(steps) / len(steps) for name, steps in ends.items()}
        )
        assert all(set(found) == {"reward", "reward/toy_session:shortness"} for found in carried.values())

    def test_a_killed_and_resumed_run_s_checkpoints_carry_the_same(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        place.train("whole")
        with pytest.raises(Killed):
            place.train("killed", ToyPackage(dies_at_update=5))
        place.train("killed", resume=True)
        assert self.carried(place.root / "killed") == self.carried(place.root / "whole")
        place.train("moved", resume=True, source="killed")
        assert self.carried(place.root / "moved") == {"2_0": self.carried(place.root / "whole")["2_0"]}

    def test_the_best_stay_besides_the_newest(self, place: Place) -> None:
        """Training makes the reward greater, so the verifier that is punished is best at first."""
        verifier = "reward/toy_session:shortness"
        changes = {"reward_config__verifier_weight": [-1.0], "rl_config__best_ckpt_metric": verifier}
        place.train("all", **changes)
        carried = {
            name: metrics[verifier] for name, metrics in self.carried(place.root / "all").items() if metrics
        }
        best = max(carried, key=lambda name: carried[name])
        assert best not in ("1_4", "2_0")
        place.train("run", **changes, rl_config__save_max_ckpt_num=1, rl_config__keep_best_ckpt_num=1)
        assert list(self.carried(place.root / "run")) == [best, "2_0"]

    def test_every_nth_stays_besides_the_newest(self, place: Place) -> None:
        place.train("run", rl_config__save_max_ckpt_num=1, rl_config__keep_ckpt_per_n_steps=6)
        assert list(self.carried(place.root / "run")) == ["0_0", "1_1", "2_0"]

    def test_a_metric_that_there_will_not_be_is_refused(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="must be one of reward, reward/toy_session:shortness"):
            place.train("run", rl_config__best_ckpt_metric="revard")


class OwnTime(threading.local):
    """A clock for each thread, which goes when it is told to: the machine's speed is nowhere in it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter

    def taking(self, method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """The method, which takes so long."""

        def run(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return method(*arguments, **named)

        return run


class TestWaiting:
    """The log says for how long training waited, all of it, and removing old files is no part of that."""

    def test_what_the_log_says_is_what_training_waited(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock, waited = OwnTime(), []

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                began = clock.now
                found = method(*arguments)
                waited.append(clock.now - began)
                return found

            return run

        monkeypatch.setattr(shadow, "time", clock)
        for kind, name, seconds in (
            (CheckpointStore, "plan", 1.0),
            (CheckpointStore, "all_ready", 0.25),
            (Attempt, "gather", 2.0),
            (Attempt, "conclude", 4.0),
            (Journal, "prune", 100.0),
        ):
            monkeypatch.setattr(kind, name, clock.taking(getattr(kind, name), seconds))
        # It asks whether the last one is written, too, where the writer is held up.
        for name in ("due", "begin", "before_update", "boundary", "close"):
            monkeypatch.setattr(RunCheckpoints, name, timed(getattr(RunCheckpoints, name)))
        place.train("run", rl_config__save_max_ckpt_num=1)
        lines = [line for line in capsys.readouterr().out.splitlines() if "training waited" in line]
        logged = [float(re.search(r"training waited ([\d.]+) s", line)[1]) for line in lines]  # type: ignore[index]
        assert len(lines) == 5
        # The first is saved before there is a step to hold up.
        assert min(logged[1:]) >= 7
        assert sum(logged[1:]) == sum(waited)

    def test_training_goes_on_while_old_files_are_removed(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package, pruning, begun = Counted(), [], threading.Semaphore(0)
        prune, conclude = Journal.prune, ShadowCheckpoints._conclude

        def go_on_once_it_prunes(self: ShadowCheckpoints, *committed: Any) -> None:
            conclude(self, *committed)
            begun.acquire()

        def slow(journal: Journal, oldest: Position) -> list[str]:
            pruning.append(threading.current_thread())
            if len(pruning) == 2:
                package.updated.clear()
                begun.release()
                went_on.append(package.updated.wait(300))
            elif len(pruning) > 2:
                begun.release()
            return prune(journal, oldest)

        went_on: list[bool] = []
        monkeypatch.setattr(Journal, "prune", slow)
        commit_at_once(monkeypatch)
        monkeypatch.setattr(ShadowCheckpoints, "_conclude", go_on_once_it_prunes)
        place.train("run", package, rl_config__save_max_ckpt_num=1)
        # The first is saved, and its journal pruned, before there is a step to hold up.
        assert len(pruning) == 5
        assert threading.main_thread() not in pruning[1:]
        assert went_on == [True]
        segments = sorted((place.root / "run/journal/rank_0").glob("*.journal"))
        assert [segment.name for segment in segments] == ["1-1_4.journal", "1-2_0.journal"]

    def test_pruning_the_journal_opens_no_manifest(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The names in commits/ say which is the oldest."""
        place.train("run")
        storage = LocalStorage(place.root / "run")
        monkeypatch.setattr(LocalStorage, "open", None)
        assert oldest_position(storage) == Position(0, 0)

    def test_a_folder_that_was_emptied_under_the_trainer_is_reported_in_words(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"there is no manifest in .*/commits") as caught:
            oldest_position(LocalStorage(tmp_path))
        assert caught.value.hint is not None
        assert "moved" in caught.value.hint


@dataclass
class Counted(ToyPackage):
    """Its engine's updates can be waited for."""

    updated: threading.Event = field(default_factory=threading.Event)

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        engine = super().create(settings, group)
        update = engine.update

        def update_and_tell(*arguments: Any) -> Any:
            outcome = update(*arguments)
            self.updated.set()
            return outcome

        engine.update = update_and_tell  # type: ignore[method-assign]
        return engine


def last_files(run: Path) -> set[str]:
    """What all `meta.json` name."""
    return {json.loads(path.read_text())["last_ckpt_file"] for path in run.glob("*/rank_0/meta.json")}


def files_of(position: str) -> set[str]:
    return {
        f"policy_model_rank_0-{position}.safetensors",
        f"optimizer_rank_0-{position}.safetensors",
        "ref_rank_0-0_0.safetensors",
    }


class TestMetaJson:
    """It is derived from the manifest, and never left behind it."""

    def test_a_kill_between_manifest_and_meta_json_is_mended_by_the_next_start(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        tidy, killed = CheckpointStore.tidy, threading.Event()

        def stop_at_the_second(store: CheckpointStore, committed: Committed) -> list[str]:
            if committed.manifest.global_step == 3:
                killed.wait()
                return []
            return tidy(store, committed)

        monkeypatch.setattr(CheckpointStore, "tidy", stop_at_the_second)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        killed.set()
        run = place.root / "run"
        assert [str(info.position) for info in checkpoints_of(run, deep=True)] == ["0_0", "0_3"]
        assert last_files(run) == files_of("0_0"), "the manifest was there before"
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=0), resume=True)
        assert last_files(run) == files_of("0_3")

    def test_after_a_fall_back_it_names_the_checkpoint_that_was_taken(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        run = place.root / "run"
        (run / "optimizer/rank_0/optimizer_rank_0-0_3.safetensors").unlink()
        (run / "train/rank_0/meta.json").write_text("{")
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=0), resume=True)
        assert last_files(run) == files_of("0_0")

    def test_the_folder_that_was_resumed_from_is_left_alone(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        with pytest.raises(Killed):
            place.train("old", ToyPackage(dies_at_update=4))
        stale = place.root / "old/train/rank_0/meta.json"
        stale.write_text("{}")
        place.train("new", resume=True, source="old")
        assert stale.read_text() == "{}"
