"""A run from its options to its last checkpoint, with a NumPy engine: killed, damaged, moved, refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lockstep import LockStep
from toy_run import Ranks
from toy_session import Killed, Place, ToyPackage, commit_at_once, tidy_at_once

from rollforward.errors import (
    CheckpointMismatch,
    ConfigError,
    DataError,
    ModelError,
    NothingToResume,
    RunExists,
    RunLocked,
    StorageError,
)
from rollforward.inspection.folder import checkpoints_of
from rollforward.processes import heartbeat
from rollforward.replay.metrics import FILE, read
from rollforward.run.session import train
from rollforward.store import RunLock


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def positions(folder: Path) -> list[str]:
    return [str(info.position) for info in checkpoints_of(folder, deep=True) if info.valid]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def comparable(folder: Path) -> list[dict[str, float]]:
    """Metrics without what the clock and the disk say."""
    clock, elsewhere = ("incarnation", "time", "tokens_per_second"), ("seconds/", "saves_")
    return [
        {key: value for key, value in record.items() if key not in clock and not key.startswith(elsewhere)}
        for record in read(folder / FILE)
    ]


class TestKilled:
    @pytest.mark.parametrize("moments", [(0,), (6, 1), (3, 3, 3)])
    def test_a_killed_and_resumed_run_ends_as_if_nothing_had_happened(
        self, place: Place, moments: tuple[int, ...]
    ) -> None:
        place.train("whole")
        resume = False
        for moment in moments:
            with pytest.raises(Killed):
                place.train("killed", ToyPackage(dies_at_update=moment), resume=resume)
            resume = True
        place.train("killed", resume=True)
        assert place.digests("killed") == place.digests("whole")
        assert comparable(place.root / "killed") == comparable(place.root / "whole")
        assert len(comparable(place.root / "killed")) == 10

    def test_the_digests_tell_runs_apart(self, place: Place) -> None:
        place.train("one")
        place.train("other", rl_config__seed=1)
        assert place.digests("one")["policy_model"] != place.digests("other")["policy_model"]
        assert place.digests("one")["ref"] == place.digests("other")["ref"]

    @pytest.mark.parametrize(
        "file",
        ["train/rank_0/policy_model_rank_0-1_1.safetensors", "tables/rank_0/table_rank_0-1_1.json"],
    )
    def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
    ) -> None:
        commit_at_once(monkeypatch)
        place.train("whole")
        with pytest.raises(Killed):
            place.train("hurt", ToyPackage(dies_at_update=7))
        flip_a_bit(place.root / "hurt" / file)
        capsys.readouterr()
        place.train("hurt", resume=True)
        log = capsys.readouterr().out
        assert "checkpoint: 1_1 rejected: " in log
        assert "training: resumes at step 0_3 (4 of 10)" in log
        assert place.digests("hurt") == place.digests("whole")
        assert comparable(place.root / "hurt") == comparable(place.root / "whole")

    def test_when_every_checkpoint_is_damaged_all_reasons_are_told_and_nothing_goes_on(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        with pytest.raises(Killed):
            place.train("hurt", ToyPackage(dies_at_update=7))
        for path in (place.root / "hurt/train/rank_0").glob("*.safetensors"):
            flip_a_bit(path)
        before = everything_in(place.root / "hurt/commits")
        package = ToyPackage()
        with pytest.raises(NothingToResume) as caught:
            place.train("hurt", package, resume=True)
        assert package.updates == []
        assert everything_in(place.root / "hurt/commits") == before
        for position in ("0_0", "0_3", "1_1"):
            assert f"policy_model_rank_0-{position}.safetensors" in str(caught.value)


class TestFolders:
    def test_each_station_of_the_contract_is_a_line_of_the_log(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commit_at_once(monkeypatch)
        (place.root / "strategy").mkdir()
        (place.root / "strategy/strategy_3.ckpt").write_text("old")
        (place.root / "strategy/precious.txt").write_text("keep")
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        capsys.readouterr()
        place.train("run", resume=True)
        stations = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
        order = ["data", "strategy", "logs", "checkpoint", "restored", "training", "step 0_3 (4/10)  reward"]
        found = [stations.index(name) for name in order[:-1]]
        assert found == sorted(found)
        assert [path.name for path in sorted((place.root / "strategy").iterdir())] == [
            "precious.txt",
            "strategy_0.ckpt",
        ]

    def test_outputs_go_below_local_default_path(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(place.root / "root"))
        outputs = place.plan("unused", actor_config__save="", rl_config__save_strategy_dir="").outputs
        assert outputs.run == place.root / "root/save_ckpt"
        assert outputs.strategy == place.root / "root/strategy"
        assert outputs.log == place.root / "root/log"

    def test_a_run_can_go_on_in_a_new_folder_and_leaves_the_old_one_as_it_was(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        tidy_at_once(monkeypatch)
        place.train("whole")
        with pytest.raises(Killed):
            place.train("old", ToyPackage(dies_at_update=4))
        before = everything_in(place.root / "old")
        place.train("new", resume=True, source="old")
        assert everything_in(place.root / "old") == before
        assert place.digests("new") == place.digests("whole")
        assert comparable(place.root / "new") == comparable(place.root / "whole")
        assert positions(place.root / "new") == ["0_3", "1_1", "1_4", "2_0"], "self-contained from its start"

    def test_a_resume_needs_no_model_folder(self, place: Place) -> None:
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        for path in place.model.iterdir():
            path.unlink()
        place.train("run", resume=True)
        assert positions(place.root / "run")[-1] == "2_0"

    def test_old_checkpoints_go_as_asked(self, place: Place) -> None:
        place.train("run", rl_config__save_max_ckpt_num=2)
        assert positions(place.root / "run") == ["1_4", "2_0"]

    def test_interval_zero_saves_at_the_end_only(self, place: Place) -> None:
        place.train("run", rl_config__save_ckpt_interval=0)
        assert positions(place.root / "run") == ["0_0", "2_0"]

    def test_a_finished_run_has_nothing_to_do(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        place.train("run")
        before = place.digests("run")
        capsys.readouterr()
        place.train("run", resume=True)
        assert "nothing to do" in capsys.readouterr().out
        assert place.digests("run") == before

    def test_more_epochs_go_on_where_fewer_ended(self, place: Place) -> None:
        place.train("whole", actor_config__lr_schedule__decay_steps=10)
        place.train("short", rl_config__max_steps=4, actor_config__lr_schedule__decay_steps=10)
        assert positions(place.root / "short")[-1] == "0_4"
        place.train("short", resume=True, actor_config__lr_schedule__decay_steps=10)
        assert place.digests("short") == place.digests("whole")

    def test_a_run_that_is_made_longer_has_another_learning_rate_and_says_so(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        capsys.readouterr()
        place.train("run", resume=True, rl_config__epochs=3)
        said = capsys.readouterr().out
        assert "lr_schedule.decay_steps changed from 10 to 15" in said
        assert "made with another configuration, generated again" in said
        assert positions(place.root / "run")[-1] == "3_0"

    def test_heartbeat_and_tensorboard(self, place: Place) -> None:
        place.train("run", rl_config__tensorboard=True)
        pulse = heartbeat.read(place.root / "run", 0)
        assert pulse is not None
        assert (pulse.phase, pulse.position) == ("checkpoint", "2_0")
        assert list((place.root / "run/tensorboard").glob("events.out.tfevents.*"))

    def test_a_changed_configuration_is_said(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        place.train("run", resume=True, rl_config__beta=0.5)
        assert "rl_config.beta changed from 0.01 to 0.5" in capsys.readouterr().out


class TestRefused:
    """Each of these leaves the disk as it was."""

    @pytest.fixture(autouse=True)
    def _nothing_changes(self, place: Place) -> object:
        self.before: dict[str, bytes] | None = None
        yield
        if self.before is not None:
            assert everything_in(place.root) == self.before

    def refuse(
        self, place: Place, kind: type[Exception], *told: str, run: str = "run", **how: object
    ) -> None:
        self.before = everything_in(place.root)
        with pytest.raises(kind) as caught:
            place.train(run, **how)
        for text in told:
            assert text in str(caught.value)

    def test_a_new_run_over_an_old_one(self, place: Place) -> None:
        place.train("run")
        self.refuse(place, RunExists, "already holds a run", "--resume_training")

    def test_a_resume_into_a_folder_that_holds_another_run(self, place: Place) -> None:
        place.train("run")
        place.train("other")
        self.refuse(place, RunExists, "already holds a run", resume=True, source="other")

    def test_nothing_to_resume(self, place: Place) -> None:
        self.refuse(place, NothingToResume, "run/train: no such folder", "holds model", resume=True)

    def test_each_checkpoint_that_does_not_count_is_told_once(self, place: Place) -> None:
        place.train("run")
        for folder in ("model", "model.copy"):
            (place.root / "run" / folder / "config.json").unlink()
        self.before = everything_in(place.root)
        with pytest.raises(NothingToResume) as caught:
            place.train("run", resume=True)
        assert caught.value.message.count("checkpoint 2_0: model/config.json is missing") == 1
        assert "put back what is missing" in str(caught.value.hint)

    def test_folders_without_a_checkpoint_are_described_rank_by_rank(self, place: Place) -> None:
        folder = place.root / "run/train/rank_0"
        folder.mkdir(parents=True)
        (place.root / "run/ref").mkdir()
        (folder / "something.ckpt").write_text("x")
        self.refuse(
            place,
            NothingToResume,
            "policy, rank 0: no meta.json",
            "something.ckpt",
            "ref has no rank_0, rank_1",
            resume=True,
        )

    def test_a_number_of_workers_that_does_not_divide_the_step(self, place: Place) -> None:
        place.train("run")
        self.before = everything_in(place.root)
        with pytest.raises(CheckpointMismatch, match=r"has 2 chunks, .* 3 workers cannot share") as caught:
            place.plan("run", resume=True, world_size=3)
        assert caught.value.hint == "start with a number of workers that divides 2: 1, 2"

    def test_another_dataset_size(self, place: Place) -> None:
        place.train("run")
        place.dataset.write_text("".join(place.dataset.read_text().splitlines(keepends=True)[:8]))
        self.refuse(place, CheckpointMismatch, "an epoch had 5 steps", "has 2 now", resume=True)

    def test_a_checkpoint_of_another_model(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.train("run")
        larger = ToyPackage().tensor_layout({"model_type": "toy", "vocab_size": 99})
        monkeypatch.setattr(ToyPackage, "tensor_layout", lambda *_: larger)
        self.refuse(place, CheckpointMismatch, "policy_model embedding.weight", "[99, 6]", resume=True)

    @pytest.mark.parametrize(
        ("kind", "told", "changes"),
        [
            (ConfigError, "no dataset is named", {"rl_config__dataset_file": ""}),
            (DataError, "cannot read the dataset", {"rl_config__dataset_file": "absent.jsonl"}),
            (DataError, "longer than 2 tokens", {"generate_config__max_prompt_length": 2}),
            (DataError, "one step needs 84", {"rl_config__chunk_size": 42}),
            (ConfigError, "unknown verifier", {"reward_config__verifier_function": ["acuracy_reward"]}),
            (ConfigError, "no model to start from", {"actor_config__load": ""}),
            (ModelError, "no such folder", {"actor_config__load": "nowhere"}),
            (ModelError, "no config.json there", {"actor_config__load": "."}),
            (ConfigError, "ids end at", {"generate_config__sampling_config__eos_token_id": [999]}),
            (ConfigError, "is a file", {"actor_config__save": "train.jsonl/run"}),
        ],
    )
    def test_input_that_cannot_be_used(
        self, place: Place, kind: type[Exception], told: str, changes: dict[str, object]
    ) -> None:
        self.refuse(place, kind, told, **changes)

    def test_a_tokenizer_that_does_not_fit(self, place: Place) -> None:
        place.write_model(5)
        self.refuse(place, DataError, "vocab_size is 5")

    def test_a_model_family_that_is_not_supported(self, place: Place) -> None:
        place.write_model(5, model_type="mamba")
        self.refuse(place, ModelError, "mamba")

    def test_a_folder_that_another_trainer_holds(self, place: Place) -> None:
        with RunLock.acquire(place.root / "run"):
            self.refuse(place, RunLocked, "is held by process")
            assert everything_in(place.root) == self.before
        self.before = None


class TestTwoStarts:
    """What decides whether a folder may be written to is decided under its lock."""

    def test_a_new_run_that_got_the_lock_late_refuses_the_finished_first_one(self, place: Place) -> None:
        late = place.plan("run", rl_config__seed=99)
        place.train("run")
        before = everything_in(place.root / "run")
        package = ToyPackage()
        with pytest.raises(RunExists, match="already holds a run"):
            train(late, package)
        after = everything_in(place.root / "run")
        assert package.updates == []
        assert {name for name in after if after[name] != before.get(name)} <= {"run.lock"}

    def test_so_do_two_workers(self, place: Place) -> None:
        plans = [place.plan("run", world_size=2, rank=rank) for rank in range(2)]
        place.train("run")

        def work(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
            train(plans[rank], ToyPackage(group=lambda: Ranks(rank, 2, exchange)))

        assert [type(end) for end in LockStep(2).run(work)] == [RunExists, RunExists]

    def test_a_copy_that_got_the_lock_late_refuses_it_too(self, place: Place) -> None:
        place.train("old")
        late = place.plan("run", resume=True, source="old")
        place.train("run", rl_config__seed=3)
        with pytest.raises(RunExists, match="already holds a run"):
            train(late, ToyPackage())

    def test_a_resume_that_got_the_lock_late_goes_on_from_what_the_other_has_done(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("whole")
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        late = place.plan("run", resume=True)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4), resume=True)
        capsys.readouterr()
        train(late, ToyPackage())
        assert "lost: nothing" in capsys.readouterr().out
        assert place.digests("run") == place.digests("whole")

    def test_a_resume_refuses_another_run_that_took_the_place(self, place: Place) -> None:
        place.train("run")
        late = place.plan("run", resume=True, rl_config__epochs=3)
        shutil.rmtree(place.root / "run")
        place.train("run", rl_config__seed=3)
        before = place.digests("run")
        with pytest.raises(RunExists, match="changed by another start"):
            train(late, ToyPackage())
        assert place.digests("run") == before

    def test_a_list_of_guests_that_cannot_be_read_is_noticed_before_training(self, place: Place) -> None:
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        (place.root / "run/guests.json").write_text("[")
        package = ToyPackage()
        with pytest.raises(StorageError, match=r"guests\.json"):
            place.train("run", package, resume=True)
        assert package.updates == []
