"""Going to a step that is not the newest: its checkpoint rebuilt, and runs that branch off there."""

import shutil
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.errors import CheckpointMismatch, ConfigError, NothingToResume, RunExists
from rollforward.inspection.folder import checkpoint_at, checkpoints_of, open_run
from rollforward.position import Position
from rollforward.replay.metrics import FILE, place_of, read
from rollforward.storage import LocalStorage
from rollforward.store.journal.reading import read_journal

LONG = {"actor_config__lr_schedule__decay_steps": 10}
"""The learning rate does not depend on where a run ends."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run with checkpoints 0_0, 0_3, 1_1, 1_4, 2_0, killed twice on its way."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("branching"))
        patch.chdir(place.root)
        commit_at_once(patch)
        for moment in (4, 5):
            with pytest.raises(Killed):
                place.train("run", ToyPackage(dies_at_update=moment), resume=moment == 5, **LONG)
        place.train("run", resume=True, **LONG)
    return place


@pytest.fixture
def place(trained: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The trained run's place, with nothing beside the run."""
    monkeypatch.chdir(trained.root)
    for name in ("new", "branch", "stopped", "hurt", "again", "two"):
        shutil.rmtree(trained.root / name, ignore_errors=True)
    return trained


class NothingGenerated(ToyPackage):
    """An engine that must not be asked for rollouts."""

    def create(self, settings: object, group: object) -> object:  # type: ignore[override]
        engine = super().create(settings, group)  # type: ignore[arg-type]

        def refused(*_: object) -> None:
            raise AssertionError("a rebuilt step was generated anew")

        engine.generate = refused  # type: ignore[method-assign, assignment]
        return engine


def rebuild(place: Place, position: str, run: str = "new", source: str = "run", **changes: object) -> None:
    how = {"position": Position.parse(position), "rebuild": True}
    place.train(run, NothingGenerated(), resume=True, source=source, asked=how, **(LONG | changes))


def branch(place: Place, position: str, run: str = "branch", source: str = "run", **changes: object) -> None:
    how = {"position": Position.parse(position)}
    place.train(run, resume=True, source=source, asked=how, **(LONG | changes))


def digests(folder: Path, position: str) -> dict[str, str]:
    return checkpoint_at(open_run(folder), Position.parse(position)).manifest.role_digests()


def positions(folder: Path) -> list[str]:
    return [str(info.position) for info in checkpoints_of(folder, deep=True) if info.valid]


class TestRebuild:
    @pytest.mark.parametrize("position", ["0_2", "0_4", "1_0", "1_3"])
    def test_it_has_the_bytes_that_a_run_stopped_there_saved(self, place: Place, position: str) -> None:
        step = Position.parse(position).global_step(5)
        place.train("stopped", rl_config__max_steps=step, **LONG)
        rebuild(place, position)
        assert positions(place.root / "new") == [position]
        assert digests(place.root / "new", position) == digests(place.root / "stopped", position)
        told = [str(place_of(record)) for record in read(place.root / "new" / FILE)]
        assert len(told) == step, "the metrics of the steps before"

    @pytest.mark.parametrize("position", ["0_3", "2_0"])
    def test_the_step_of_a_checkpoint_is_copied(self, place: Place, position: str) -> None:
        rebuild(place, position)
        assert positions(place.root / "new") == [position]
        assert digests(place.root / "new", position) == digests(place.root / "run", position)

    def test_a_run_goes_on_from_it_as_the_old_one_did(self, place: Place) -> None:
        rebuild(place, "0_4")
        place.train("again", resume=True, source="new", **LONG)
        assert place.digests("again") == place.digests("run")

    def test_the_run_is_left_as_it_is(self, place: Place) -> None:
        def content() -> dict[Path, bytes]:
            return {path: path.read_bytes() for path in (place.root / "run").rglob("*") if path.is_file()}

        before = content()
        rebuild(place, "1_2")
        assert content() == before

    def test_a_damaged_checkpoint_on_the_way_costs_a_longer_replay(self, place: Place) -> None:
        shutil.copytree(place.root / "run", place.root / "hurt")
        path = place.root / "hurt/train/rank_0/policy_model_rank_0-1_1.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        rebuild(place, "1_3", source="hurt")
        rebuild(place, "1_3", run="again")
        assert digests(place.root / "new", "1_3") == digests(place.root / "again", "1_3")

    def test_another_configuration_is_refused(self, place: Place) -> None:
        for position in ("0_3", "0_4"):
            with pytest.raises(CheckpointMismatch, match=r"rl_config\.beta changed from 0\.01 to 0\.5"):
                rebuild(place, position, rl_config__beta=0.5)
        assert not (place.root / "new").exists()


class TestBranch:
    def test_with_nothing_changed_it_ends_as_the_run_did(self, place: Place) -> None:
        branch(place, "0_4")
        assert place.digests("branch") == place.digests("run")
        assert positions(place.root / "branch")[0] == "0_3"

    def test_nothing_of_the_position_or_beyond_is_inherited(self, place: Place) -> None:
        branch(place, "0_4")
        view = read_journal([LocalStorage(place.root / "run")], rank=0, since=Position(0, 0))
        assert view.first_incomplete(Position(0, 3), chunks_per_step=2, steps_per_epoch=5) == Position(2, 0)
        own = read_journal([LocalStorage(place.root / "branch")], rank=0, since=Position(0, 0))
        assert own.header is not None
        assert set(own.header.lineage.values()) == {Position(0, 4)}

    def test_from_a_checkpoint_it_may_have_another_configuration(self, place: Place) -> None:
        branch(place, "1_1", rl_config__beta=0.5)
        assert place.digests("branch")["policy_model"] != place.digests("run")["policy_model"]
        figures = [read(place.root / name / FILE) for name in ("run", "branch")]
        assert [a["loss"] == b["loss"] for a, b in zip(*figures, strict=True)] == [True] * 6 + [False] * 4

    def test_between_checkpoints_another_configuration_is_refused_and_the_way_is_told(
        self, place: Place
    ) -> None:
        with pytest.raises(CheckpointMismatch, match="rollforward rebuild RUN --to 0_4 --out NEW"):
            branch(place, "0_4", rl_config__beta=0.5)
        assert not (place.root / "branch").exists()


class TestRefused:
    """Each before anything is written."""

    @pytest.mark.parametrize(
        ("position", "kind", "told"),
        [
            ("0_5", ConfigError, "there is no step 0_5: an epoch has 5 steps"),
            ("2_1", ConfigError, "position 2_1 is after the run's end, 2_0"),
        ],
    )
    def test_a_position_that_there_is_not(
        self, place: Place, position: str, kind: type[Exception], told: str
    ) -> None:
        with pytest.raises(kind, match=told):
            rebuild(place, position)
        assert not (place.root / "new").exists()

    def test_a_position_before_the_oldest_checkpoint(self, place: Place) -> None:
        shutil.copytree(place.root / "run", place.root / "hurt")
        (place.root / "hurt/commits/0_0.json").unlink()
        with pytest.raises(
            NothingToResume, match="at or before 0_2\n  the oldest checkpoint is 0_3"
        ) as caught:
            rebuild(place, "0_2", source="hurt")
        assert "the oldest checkpoint's position or a later one" in str(caught.value.hint)

    def test_a_position_that_the_journal_does_not_reach(self, place: Place) -> None:
        shutil.copytree(place.root / "run", place.root / "hurt")
        for later in ("1_4", "2_0"):
            (place.root / f"hurt/commits/{later}.json").unlink()
        segment = place.root / "hurt/journal/rank_0/2-1_1.journal"
        content = bytearray(segment.read_bytes())
        content[-200] ^= 1
        segment.write_bytes(content)
        with pytest.raises(NothingToResume) as caught:
            rebuild(place, "1_4", source="hurt")
        assert not (place.root / "new").exists()
        assert "step 1_4 cannot be reached: from checkpoint 1_1" in caught.value.message
        assert "the journal leads up to 1_3 only, where chunk 1 is missing" in caught.value.message
        assert "2-1_1.journal: cut off at byte" in caught.value.message
        rebuild(place, "1_3", source="hurt")
        assert digests(place.root / "new", "1_3")["policy_model"]

    def test_what_one_worker_s_journal_lacks_is_refused_on_every_worker(self, place: Place) -> None:
        place.train_by_two("two")
        (segment,) = (place.root / "two/journal/rank_1").glob("1-0_0.journal")
        segment.unlink()
        how = {"resume": True, "source": "two", "world_size": 2, "asked": {"position": Position(0, 1)}}
        for rank in (0, 1, None):
            with pytest.raises(NothingToResume, match="leads up to 0_0 only, where chunks 2, 3 are missing"):
                place.plan("new", rank=rank, **how)

    def test_a_branch_into_the_same_folder(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="needs a folder of its own"):
            branch(place, "0_4", run="run")

    def test_a_rebuild_into_a_folder_that_is_used_names_its_own_option(self, place: Place) -> None:
        place.train("used")
        for run in ("run", "used"):
            with pytest.raises(
                (ConfigError, RunExists), match=r"folder of its own|already holds a run"
            ) as caught:
                rebuild(place, "0_4", run=run)
            assert "--out" in str(caught.value.hint)
            assert "name" in str(caught.value.hint)
            assert "--save_checkpoint_dir" not in str(caught.value.hint)

    def test_a_position_without_a_resume(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="it needs --resume_training"):
            place.train("new", asked={"position": Position(0, 4)})
