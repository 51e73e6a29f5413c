"""`rollforward export` hands a checkpoint to others: whole, verified, and the same when it comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from small_model import QWEN2
from toy_session import Place

from rollforward.cli.main import main
from rollforward.errors import NothingToResume
from rollforward.interop.exporting import with_dtype
from rollforward.interop.files import read_arrays
from rollforward.interop.folders import find_foreign
from rollforward.interop.mapping import fit
from rollforward.models.config import ModelConfig
from rollforward.models.shapes import tensor_layout
from rollforward.models.weights import load_weights
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore

MODEL = ModelConfig.parse(QWEN2)
LAYOUT = tensor_layout(MODEL)


def state(step: int):
    source = np.random.default_rng(step)
    found = {
        # A second moment is a mean of squares.
        role: {
            name: abs(source.normal(size=array.shape).astype(array.dtype)) for name, array in named.items()
        }
        for role, named in LAYOUT.items()
    }
    found["optimizer"]["global_step"][:] = step
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "run")
    files = {"config.json": json.dumps(QWEN2).encode(), "tokenizer.json": b"{}"}
    for step in (2, 4):
        store.save(
            Position(1, step),
            state(step),
            global_step=step,
            run_id="r",
            incarnation=1,
            state={},
            attachments=files,
        )
    return tmp_path / "run"


def test_the_policy_as_a_folder_of_hugging_face(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run), "--to", str(out)]) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, out.iterdir()))
    assert json.loads((out / "config.json").read_text()) == QWEN2 | {"torch_dtype": "float32"}
    parameters = {name: np.zeros(array.shape, array.dtype) for name, array in LAYOUT["policy_model"].items()}
    load_weights(out, MODEL, parameters)
    for name, array in state(4)["policy_model"].items():
        np.testing.assert_array_equal(parameters[name], array)


def test_what_goes_to_mindrlhf_comes_back_the_same(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", f"{run}:1_2", "--to", str(out), "--format", "mindrlhf"]) == 0
    folders = {"policy_model": out / "train", "optimizer": out / "optimizer", "ref": out / "ref"}
    found = find_foreign(folders, world_size=1)
    assert found.position == Position(1, 2)
    for role, named in state(2).items():
        file = fit(role, dict(read_arrays(found.files[role][0])), LAYOUT, groups=2)
        assert file.problems == ()
        assert file.tensors.keys() == named.keys()
        for name, array in named.items():
            np.testing.assert_array_equal(file.tensors[name], array, err_msg=name)
    counters = safetensors.numpy.load_file(found.files["policy_model"][0])
    assert (counters["epoch_num"], counters["step_num"]) == (1, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "mindrlhf", "--model_parallel", "3"], "model_parallel can be 1, 2 for this model"),
        (["--model_parallel", "2"], "--model_parallel cuts what --format mindrlhf writes"),
    ],
    ids=["a number that does not divide it", "for transformers"],
)
def test_a_model_that_cannot_be_cut_so_is_not_cut(
    run: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", str(out), *options]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() or not any(out.iterdir())


def test_a_model_that_mindformers_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    monkeypatch.chdir(tmp_path)
    place.train("toy", rl_config__max_steps=1)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "toy"), "--to", str(out), "--format", "mindrlhf"]) == 2
    assert not out.exists() or not any(out.iterdir())


def test_a_folder_in_which_something_lies_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("mine")
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 2
    assert "something is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_not_handed_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "train/rank_0/policy_model_rank_0-1_2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["export", f"{run}:1_2", "--to", str(tmp_path / "model")]) == 1
    assert f"{run}: train/rank_0/policy_model_rank_0-1_2.safetensors: " in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main(["export", f"{run}:1_4", "--to", str(tmp_path / "model"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["position"] == "1_4"
    assert sorted(said["files"]) == sorted(map(str, (tmp_path / "model").iterdir()))


@pytest.mark.parametrize("form", ["huggingface", "mindrlhf"])
def test_an_export_that_is_killed_anywhere_leaves_nothing_that_looks_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """After each file that it writes: neither transformers nor MindRLHF would open what is there."""

    def is_whole(out: Path) -> bool:
        if form == "huggingface":
            return (out / "config.json").exists()
        folders = {"policy_model": out / "train", "optimizer": out / "optimizer", "ref": out / "ref"}
        try:
            find_foreign(folders, world_size=1)
        except NothingToResume:
            return False
        return True

    looked: list[bool] = []
    write = LocalStorage.write

    def looking(self: LocalStorage, path: str, buffers: object) -> int:
        looked.append(is_whole(tmp_path / "out"))
        return write(self, path, buffers)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStorage, "write", looking)
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--format", form]) == 0
    assert len(looked) >= 3
    assert not any(looked), "before its last file it is not whole"
    assert is_whole(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, {"torch_dtype": "float32", "dtype": "float32"}),
        ({}, {"torch_dtype": "float32"}),
    ],
)
def test_the_config_names_the_dtype_of_the_file(given: dict[str, str], named: dict[str, str]) -> None:
    arrays = {"w": np.zeros(9, np.float32), "count": np.zeros(2, np.int64)}
    assert json.loads(with_dtype(json.dumps(QWEN2 | given).encode(), arrays)) == QWEN2 | named
    as_it_was = json.dumps(QWEN2 | named).encode()
    assert with_dtype(as_it_was, arrays) == as_it_was
