"""Going on from folders that MindRLHF wrote, with the NumPy engine: found, checked, refused, made ours."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from ckpt_writer import ckpt_bytes, strategy_bytes
from lockstep import LockStep
from numpy.typing import NDArray
from toy_run import Ranks
from toy_session import Killed, Place, ToyPackage

from rollforward.errors import (
    CheckpointMismatch,
    ConfigError,
    ModelError,
    NothingToResume,
    RollforwardError,
)
from rollforward.interop.restoring import restore_foreign
from rollforward.interop.resuming import ForeignPlan, next_position
from rollforward.position import Position
from rollforward.run.sources import FromOthers
from rollforward.storage import LocalStorage
from rollforward.store import find, load_manifest, read_tensors
from rollforward.store.checkpoints import Attempt

FOLDERS = {"policy_model": "train", "optimizer": "optimizer", "ref": "ref"}
State = dict[str, dict[str, NDArray[Any]]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours from start to end, with a checkpoint every three steps."""
    place = Place(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place.root)
        place.train("run")
    return place.root / "run"


@pytest.fixture
def theirs(place: Place, ours: Path) -> Path:
    """The same run as MindRLHF's folder: 0_3 and 1_1 are there, and then it was killed."""
    for position in (Position(0, 3), Position(1, 1)):
        write(place.root / "theirs", position, state_at(ours, position))
    return place.root / "theirs"


def same_end(place: Place, run: str, ours: Path) -> bool:
    """Whether two runs end with the same bits, at the same step."""
    found, whole = (find(LocalStorage(folder)).manifest for folder in (place.root / run, ours))
    return (found.position, found.role_digests()) == (whole.position, whole.role_digests())


def state_at(run: Path, position: Position) -> State:
    """The tensors of a checkpoint of ours, with what MindRLHF's files hold besides."""
    state: State = {role: {} for role in FOLDERS}
    storage = LocalStorage(run)
    for role, name, array in read_tensors(storage, load_manifest(storage, position)):
        state[role][name] = array
    state["optimizer"]["global_step"] = state["optimizer"]["global_step"].astype(np.int32)
    # An optimizer's parameters are saved with it, and the trainer appends its counters.
    state["optimizer"] |= state["policy_model"] | {"learning_rate": np.array(1e-3, np.float32)}
    state["policy_model"] |= {
        "policy_model.kl_loss": np.zeros((), np.float32),
        "epoch_num": np.array(position.epoch, np.int64),
        "step_num": np.array(position.step, np.int64),
    }
    return state


def write(
    root: Path,
    position: Position,
    state: Mapping[str, Mapping[str, NDArray[Any]]],
    *,
    rank: int = 0,
    extension: str = "safetensors",
) -> None:
    for role, arrays in state.items():
        folder = root / FOLDERS[role] / f"rank_{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{role}_rank_{rank}-{position}.{extension}"
        if extension == "ckpt":
            (folder / name).write_bytes(ckpt_bytes(arrays))
        else:
            safetensors.numpy.save_file(dict(arrays), folder / name)
        meta = {"last_epoch": position.epoch, "last_step": position.step, "last_ckpt_file": name}
        (folder / "meta.json").write_text(json.dumps(meta))


def change(path: Path, edit: Callable[[dict[str, NDArray[Any]]], None]) -> None:
    """Change the tensors of a file."""
    arrays = safetensors.numpy.load_file(path)
    edit(arrays)
    safetensors.numpy.save_file(arrays, path)


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


class TestGoesOn:
    def test_in_another_folder_and_ends_as_if_nothing_had_happened(
        self, place: Place, ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = content(theirs)
        capsys.readouterr()
        place.train("new", resume=True, source="theirs")
        said = capsys.readouterr().out
        assert f"checkpoint: 1_1 in {theirs} is the newest complete one; it has no manifest" in said
        assert "no manifest, so nothing can be verified by digest" in said
        assert "computed again: epoch_num, kl_loss, learning_rate, step_num" in said
        assert "training: resumes at step 1_1 (7 of 10)" in said
        assert content(theirs) == before
        assert same_end(place, "new", ours)

    def test_in_the_same_folder_which_becomes_ours_and_keeps_theirs(
        self, place: Place, ours: Path, theirs: Path
    ) -> None:
        before = {path: data for path, data in content(theirs).items() if path.suffix == ".safetensors"}
        with pytest.raises(Killed):
            place.train("theirs", ToyPackage(dies_at_update=0), resume=True, rl_config__save_max_ckpt_num=1)
        first = find(LocalStorage(theirs)).manifest
        assert first.position == Position(1, 1), "saved at once"
        place.train("theirs", resume=True, rl_config__save_max_ckpt_num=1)
        assert same_end(place, "theirs", ours)
        assert {path: path.read_bytes() for path in before} == before

    def test_killed_before_the_folder_became_ours_theirs_is_still_whole(
        self, place: Place, ours: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(Attempt, "gather", killed)
            with pytest.raises(Killed):
                place.train("theirs", resume=True)
        assert (theirs / "train/rank_0/policy_model.1_rank_0-1_1.safetensors").exists(), "it was written"
        place.train("theirs", resume=True)
        assert same_end(place, "theirs", ours)

    def test_from_ckpt_files(self, place: Place, ours: Path) -> None:
        write(
            place.root / "ckpt",
            Position(1, 1),
            state_at(ours, Position(1, 1)),
            extension="ckpt",
        )
        place.train("new", resume=True, source="ckpt")
        assert same_end(place, "new", ours)

    def test_from_the_newest_position_that_policy_and_optimizer_share(
        self, place: Place, theirs: Path
    ) -> None:
        (theirs / "optimizer/rank_0/optimizer_rank_0-1_1.safetensors").unlink()
        assert place.plan("new", resume=True, source="theirs").start == Position(0, 3)

    def test_past_garbage_behind_a_meta_json(
        self, place: Place, theirs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (theirs / "train/rank_0/meta.json").open("a") as file:
            file.write('ensors"}')
        place.train("new", resume=True, source="theirs", rl_config__max_steps=6)
        assert "meta.json: more follows after its JSON, as MindRLHF leaves it" in capsys.readouterr().out

    @pytest.mark.parametrize("damage", ["cut", "not finite"])
    def test_past_a_damaged_newest_one(
        self, place: Place, ours: Path, theirs: Path, damage: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = theirs / "optimizer/rank_0/optimizer_rank_0-1_1.safetensors"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            change(path, lambda arrays: arrays["adam_m.head.weight"].__setitem__((0, 0), np.nan))
        capsys.readouterr()
        place.train("new", resume=True, source="theirs")
        said = capsys.readouterr().out
        assert "checkpoint: 1_1 rejected: " in said
        assert "training: resumes at step 0_3 (4 of 10)" in said
        assert same_end(place, "new", ours)

    def test_past_a_newest_one_whose_files_are_all_gone_and_says_what_is_lost(
        self, place: Place, ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in theirs.rglob("*-1_1.safetensors"):
            path.unlink()
        capsys.readouterr()
        place.train("new", resume=True, source="theirs")
        said = capsys.readouterr().out
        for folder, role in (("train", "policy_model"), ("optimizer", "optimizer"), ("ref", "ref")):
            assert (
                f"warning: {theirs / folder}: meta.json of rank_0 names {role}_rank_0-1_1.safetensors, which "
                "is not there; going back to 0_3, and what was trained from there to 1_1 is lost"
            ) in said
        assert same_end(place, "new", ours)

    def test_with_the_model_s_own_weights_where_no_reference_was_saved(
        self, place: Place, ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in (theirs / "ref/rank_0").iterdir():
            path.unlink()
        (theirs / "ref/rank_0").rmdir()
        plan = place.plan("new", resume=True, source="theirs", ref_config__sync_ref_model=True)
        assert isinstance(plan.source, FromOthers)
        assert plan.source.theirs.reference_model == place.model
        place.train("new", resume=True, source="theirs")
        assert f"the reference model is that of {place.model}" in capsys.readouterr().out
        assert same_end(place, "new", ours), "here the reference is the first model"

    def test_after_the_last_step_there_is_nothing_to_do(
        self, place: Place, ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(theirs, Position(2, 5), state_at(ours, Position(1, 1)))
        place.train("new", resume=True, source="theirs")
        assert "nothing to do, the run ends at 2_0" in capsys.readouterr().out


class TestOfMindFormersTrainer:
    """Policy and optimizer in one file of `checkpoint/`; epochs and steps count from 1."""

    def test_it_goes_on_after_the_step_that_the_file_names(
        self, place: Place, ours: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_whole(place.root / "output", Position(1, 3), state_at(ours, Position(0, 3)))
        write_whole(place.root / "output", Position(2, 1), state_at(ours, Position(1, 1)))
        self.train(place)
        said = capsys.readouterr().out
        assert "output/checkpoint holds policy and optimizer in one file" in said
        assert "training: resumes at step 1_1 (7 of 10)" in said
        assert same_end(place, "new", ours)

    def test_past_a_damaged_newest_one(self, place: Place, ours: Path) -> None:
        write_whole(place.root / "output", Position(1, 3), state_at(ours, Position(0, 3)))
        path = write_whole(place.root / "output", Position(2, 1), state_at(ours, Position(1, 1)))
        path.write_bytes(path.read_bytes()[:-3])
        self.train(place)
        assert same_end(place, "new", ours)

    def test_a_folder_of_weights_alone_is_refused(self, place: Place, ours: Path) -> None:
        state = state_at(ours, Position(1, 1))
        write_whole(place.root / "output", Position(2, 1), {**state, "optimizer": {}})
        with pytest.raises(NothingToResume, match="without the optimizer's moments"):
            self.train(place)

    def train(self, place: Place) -> None:
        source = place.root / "output/checkpoint"
        place.train("new", resume=True, asked={"actor_checkpoint_path": str(source)})


def write_whole(root: Path, position: Position, state: State) -> Path:
    """A file of MindFormers' trainer."""
    folder = root / "checkpoint/rank_0"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"qwen_rank_0-{position}.ckpt"
    path.write_bytes(ckpt_bytes({**state["policy_model"], **state["optimizer"]}))
    meta = {"last_epoch": position.epoch, "last_step": position.step, "last_ckpt_file": path.name}
    (folder / "meta.json").write_text(json.dumps(meta))
    return path


class TestSplitOverRanks:
    """Rows of the largest tensors are split over two ranks, each role by a strategy of its own."""

    SPLIT = ("head.weight", "adam_m.head.weight", "adam_v.head.weight")

    def write(self, place: Place, state: State, folder: str = "theirs") -> Path:
        root = place.root / folder
        for rank in range(2):
            part = {
                role: {
                    name: np.split(array, 2)[rank].copy() if name in self.SPLIT else array
                    for name, array in arrays.items()
                }
                for role, arrays in state.items()
            }
            write(root, Position(1, 1), part, rank=rank, extension="ckpt")
        return root

    def put_strategy(self, root: Path) -> None:
        splits = {name: ([2], [0, -1], 0, 0) for name in self.SPLIT}
        for inner in ("train_policy_strategy", "infer_ref_strategy"):
            (root / "strategy" / inner).mkdir(parents=True)
            for rank in range(2):
                path = root / f"strategy/{inner}/strategy_{rank}.ckpt"
                path.write_bytes(strategy_bytes(splits))

    def test_one_worker_puts_them_together(
        self, place: Place, ours: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.put_strategy(self.write(place, state_at(ours, Position(1, 1))))
        place.train("new", resume=True, source="theirs")
        said = capsys.readouterr().out
        assert "tensors split over 2 ranks are merged by the strategy files in" in said
        assert "2 workers saved, and this run has 1: a step takes chunk_size" in said
        assert same_end(place, "new", ours)

    def test_two_workers_put_them_together_from_different_copies(self, place: Place, ours: Path) -> None:
        self.put_strategy(self.write(place, state_at(ours, Position(1, 1))))
        assert place.train_by_two("new", resume=True, source="theirs") == [None, None]
        path = place.root / "theirs/ref/rank_1/ref_rank_1-1_1.ckpt"
        bias = state_at(ours, Position(1, 1))["ref"]["head.bias"]
        path.write_bytes(path.read_bytes().replace(bias.tobytes(), (bias + 1).tobytes()))
        for error in place.train_by_two("newer", resume=True, source="theirs"):
            assert isinstance(error, CheckpointMismatch)
            assert "ranks 0 and 1 hold different tensors of 1_1" in error.message

    def test_the_headers_of_the_whole_are_held_against_the_model(self, place: Place, ours: Path) -> None:
        state = state_at(ours, Position(1, 1))
        state["policy_model"]["head.weight"] = np.zeros((48, 6), np.float32)
        self.put_strategy(self.write(place, state))
        with pytest.raises(CheckpointMismatch) as caught:
            place.plan("new", resume=True, source="theirs")
        told = "policy_model_rank_0-1_1.ckpt and its like of 2 ranks: head.weight has shape [48, 6], instead"
        assert told in caught.value.message

    def test_without_strategy_files_it_says_where_to_put_them(self, place: Place, ours: Path) -> None:
        root = self.write(place, state_at(ours, Position(1, 1)))
        with pytest.raises(CheckpointMismatch) as one:
            place.plan("new", resume=True, source="theirs")
        assert f"put the strategy files of their trainer into {root / 'strategy'}" in one.value.hint
        with pytest.raises(CheckpointMismatch) as two:
            place.plan("new", resume=True, source="theirs", world_size=2)
        assert "[12, 6], a part of [24, 6]" in two.value.message
        assert "put the strategy files of their trainer into strategy/" in two.value.hint

    def test_strategy_files_that_a_start_would_clear_are_not_used(self, place: Place, ours: Path) -> None:
        root = self.write(place, state_at(ours, Position(1, 1)))
        self.put_strategy(root)
        with pytest.raises(ConfigError, match="a start clears this run's own strategy folder"):
            place.plan(
                "new",
                resume=True,
                source="theirs",
                rl_config__save_strategy_dir=str(root / "strategy/train_policy_strategy"),
            )


class TestRefused:
    """Each of these leaves the disk as it was."""

    def refuse(
        self, place: Place, kind: type[RollforwardError], *told: str, source: str = "theirs", **changes: Any
    ) -> None:
        before = content(place.root)
        with pytest.raises(kind) as caught:
            place.train("new", resume=True, source=source, **changes)
        for text in told:
            assert text in str(caught.value)
        assert content(place.root) == before

    @pytest.mark.parametrize("gone", [("train",), ("optimizer",), ("train", "optimizer"), ("train", "ref")])
    def test_without_a_meta_json_the_line_to_write_is_named(
        self, place: Place, ours: Path, theirs: Path, gone: tuple[str, ...]
    ) -> None:
        lines = {}
        for folder in gone:
            path = theirs / folder / "rank_0/meta.json"
            lines[path] = path.read_text()
            path.unlink()
        # A newer file is no proof: nobody vouches for it.
        newer = (
            theirs
            / gone[0]
            / "rank_0"
            / json.loads(lines[theirs / gone[0] / "rank_0/meta.json"])["last_ckpt_file"].replace("1_1", "1_2")
        )
        newer.write_bytes(b"half")
        self.refuse(
            place,
            NothingToResume,
            "no meta.json",
            "as the other folders say",
            *(f"write into {path}: {line}" for path, line in lines.items()),
        )
        for path, line in lines.items():
            path.write_text(line)
        place.train("new", resume=True, source="theirs")
        assert same_end(place, "new", ours)

    def test_without_an_optimizer(self, place: Place, theirs: Path) -> None:
        (theirs / "optimizer").rename(place.root / "elsewhere")
        self.refuse(place, NothingToResume, "theirs/optimizer does not exist", "the optimizer's moments")

    def test_without_any_reference(self, place: Place, theirs: Path) -> None:
        (theirs / "ref").rename(place.root / "elsewhere")
        self.refuse(
            place,
            NothingToResume,
            "theirs/ref has no rank folders",
            "--ref_checkpoint_path",
            actor_config__load="",
            actor_config__model_config=str(place.model),
            rl_config__tokenizer_dir=str(place.model),
        )

    def test_without_a_model_s_config(self, place: Place, theirs: Path) -> None:
        self.refuse(place, ModelError, f"{theirs / 'train'} carries no config.json", actor_config__load="")

    def test_a_folder_of_more_workers(self, place: Place, ours: Path, theirs: Path) -> None:
        write(theirs, Position(1, 1), state_at(ours, Position(1, 1)), rank=1)
        self.refuse(place, CheckpointMismatch, "saved by 2 workers and this run has 1", "--workers 2")

    def test_every_position_damaged(self, place: Place, theirs: Path) -> None:
        for path in (theirs / "train/rank_0").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        self.refuse(place, NothingToResume, "0_3 rejected", "1_1 rejected", "policy_model_rank_0-1_1")

    def test_tensors_without_a_counterpart_are_all_listed(self, place: Place, theirs: Path) -> None:
        def rename(arrays: dict[str, NDArray[Any]]) -> None:
            arrays["head.wight"] = arrays.pop("head.weight")
            arrays["head.bias"] = arrays["head.bias"].astype(np.float64)

        change(theirs / "train/rank_0/policy_model_rank_0-1_1.safetensors", rename)
        change(
            theirs / "optimizer/rank_0/optimizer_rank_0-1_1.safetensors",
            lambda arrays: arrays.update({"adam_v.head.bias": np.zeros(5, np.float32)}),
        )
        self.refuse(
            place,
            CheckpointMismatch,
            "policy_model_rank_0-1_1.safetensors: there is no head.weight",
            "head.wight has no counterpart in the model",
            "head.bias is float64, which float32 cannot hold without loss",
            "optimizer_rank_0-1_1.safetensors: adam_v.head.bias has shape [5], instead of [24]",
        )

    def test_ckpt_files_are_held_against_the_model_too(self, place: Place, ours: Path) -> None:
        state = state_at(ours, Position(1, 1))
        state["ref"]["more"] = state["ref"].pop("head.bias")
        write(place.root / "ckpt", Position(1, 1), state, extension="ckpt")
        self.refuse(
            place,
            CheckpointMismatch,
            "ref_rank_0-1_1.ckpt: more has no counterpart in the model",
            "there is no head.bias",
            source="ckpt",
        )

    @pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
    def test_a_header_tells_before_an_engine_is_made(self, place: Place, ours: Path, extension: str) -> None:
        state = state_at(ours, Position(1, 1))
        state["ref"]["more"] = np.zeros(2, np.float32)
        write(place.root / "theirs", Position(1, 1), state, extension=extension)
        with pytest.raises(CheckpointMismatch, match="more has no counterpart in the model"):
            place.plan("new", resume=True, source="theirs")

    def test_files_that_hold_parts_of_tensors(self, place: Place, theirs: Path) -> None:
        change(
            theirs / "train/rank_0/policy_model_rank_0-1_1.safetensors",
            lambda arrays: arrays.update({"head.weight": arrays["head.weight"][:12].copy()}),
        )
        self.refuse(place, CheckpointMismatch, "[12, 6], a part of [24, 6]", "put the strategy files")

    def test_a_step_that_the_dataset_does_not_have(self, place: Place, ours: Path, theirs: Path) -> None:
        write(theirs, Position(1, 7), state_at(ours, Position(1, 1)))
        self.refuse(place, CheckpointMismatch, "saved at step 7 of an epoch, and an epoch has 5 steps now")


class TestSeveralWorkers:
    def test_each_takes_its_own_files_and_all_must_hold_the_same(
        self, place: Place, ours: Path, theirs: Path
    ) -> None:
        state = state_at(ours, Position(1, 1))
        write(theirs, Position(1, 1), state, rank=1)
        source = ForeignPlan(
            run=theirs,
            folders={role: theirs / folder for role, folder in FOLDERS.items()},
            ranks=2,
            strategies={},
            reference_model=None,
            model=place.model / "config.json",
            key_value_heads=1,
            position=Position(1, 1),
            first_epoch=0,
            warnings=(),
        )

        def work(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
            engine = ToyPackage().create(engine_settings(place), Ranks(rank, 2, exchange))
            return restore_foreign(source, engine, engine.layout()), engine

        for taken, engine in LockStep(2).run(work):
            assert taken.position == Position(1, 1)
            np.testing.assert_array_equal(
                engine.tensors()["policy_model"]["head.weight"], state["policy_model"]["head.weight"]
            )
        change(
            theirs / "ref/rank_1/ref_rank_1-1_1.safetensors",
            lambda arrays: arrays["head.bias"].__setitem__(0, 9),
        )
        for error in LockStep(2).run(work):
            assert isinstance(error, CheckpointMismatch)
            assert "ranks 0 and 1 hold different tensors of 1_1" in error.message


def engine_settings(place: Place) -> Any:
    from rollforward.run.building import engine_settings as of_plan

    return of_plan(place.plan("unused"))


@pytest.mark.parametrize(
    ("saved", "first_epoch", "following"),
    [
        ((0, 3), 0, (0, 3)),
        ((1, 0), 0, (1, 0)),
        ((2, 5), 0, (2, 0)),
        ((1, 1), 1, (0, 1)),
        ((1, 5), 1, (1, 0)),
        ((3, 2), 1, (2, 2)),
    ],
    ids=[
        "inside an epoch",
        "between two",
        "after the last",
        "MindFormers' first",
        "MindFormers' last of an epoch",
        "MindFormers' later",
    ],
)
def test_the_next_step_after_what_a_file_is_named_after(
    saved: tuple[int, int], first_epoch: int, following: tuple[int, int]
) -> None:
    assert next_position(Position(*saved), first_epoch, 5) == Position(*following)
