"""The newest checkpoints of two runs are compared to the bit, whatever wrote them."""

import json
import sys
from pathlib import Path
from typing import Any

import ckpt_writer
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from toy_session import Place

from rollforward.inspection.comparing import TensorDifference
from rollforward.proving.causes import Group, group_of
from rollforward.proving.leavings import look_at
from rollforward.proving.tensors import TensorsCompared, compare_tensors

Arrays = dict[str, NDArray[Any]]


class Two:
    """Two runs' folders."""

    def __init__(self, root: Path) -> None:
        self.a, self.b = root / "a", root / "b"

    def save(self, path: str, a: Arrays, b: Arrays | None = None) -> None:
        """A file in both, with the same content unless another is given."""
        for folder, arrays in ((self.a, a), (self.b, a if b is None else b)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            save_file(arrays, folder / path)

    def compare(self, *named: str) -> TensorsCompared:
        return compare_tensors(look_at(self.a, named), look_at(self.b, named))

    def what(self) -> list[tuple[str, str, str]]:
        return [(item.role, item.name, item.what) for item in self.compare().differences]


@pytest.fixture
def two(tmp_path: Path) -> Two:
    return Two(tmp_path)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def test_equal_files_are_equal_and_all_their_tensors_counted(two: Two) -> None:
    two.save("checkpoint-3/model.safetensors", {"a": floats(1, 2), "b": np.arange(3)})
    two.save("checkpoint-3/optimizer.safetensors", {"m": floats(1)})
    found = two.compare()
    assert (found.differences, found.skipped) == ([], {})
    assert sorted(found.names) == [
        ("checkpoint-3/model.safetensors", "a"),
        ("checkpoint-3/model.safetensors", "b"),
        ("checkpoint-3/optimizer.safetensors", "m"),
    ]


def test_a_difference_has_its_size(two: Two) -> None:
    two.save(
        "m.safetensors", {"w": floats(1, 2, 3), "v": floats(1)}, {"w": floats(1, 2.5, 2), "v": floats(1)}
    )
    (item,) = two.compare().differences
    assert (item.role, item.name, item.elements, item.largest) == ("m.safetensors", "w", 2, 1.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (floats(0.0), floats(-0.0)),
        (floats(1.0), np.nextafter(floats(1.0), floats(2.0))),
        (np.array([1], ml_dtypes.bfloat16), np.array([1.0078125], ml_dtypes.bfloat16)),
        (floats(np.nan), floats(1.0)),
        (np.array([2**62]), np.array([2**62 + 1])),
    ],
    ids=["sign of zero", "last bit", "bfloat16", "nan", "large integers"],
)
def test_one_bit_is_a_difference(two: Two, a: NDArray[Any], b: NDArray[Any]) -> None:
    two.save("m.safetensors", {"w": a}, {"w": b})
    assert two.what() == [("m.safetensors", "w", "values")]
    two.save("m.safetensors", {"w": a}, {"w": a})
    assert two.what() == []


def test_another_shape_dtype_or_set_of_names_differs(two: Two) -> None:
    two.save("m.safetensors", {"w": floats(1, 2), "x": floats(1)}, {"w": floats(1), "y": floats(1)})
    assert sorted(two.what()) == [
        ("m.safetensors", "w", "dtype or shape"),
        ("m.safetensors", "x", "only in A"),
        ("m.safetensors", "y", "only in B"),
    ]


def test_the_shards_of_a_model_are_one_however_it_was_cut(two: Two) -> None:
    names = ["checkpoint-8/model-00001-of-00002.safetensors", "checkpoint-8/model-00002-of-00002.safetensors"]
    two.save(names[0], {"a": floats(1)})
    two.save(names[1], {"b": floats(2)})
    assert [name for _, name in two.compare().names] == ["a", "b"]
    for path in two.b.rglob("*.safetensors"):
        path.unlink()
    save_file({"a": floats(1), "b": floats(3)}, two.b / "checkpoint-8/model-00001-of-00001.safetensors")
    (two.b / "checkpoint-8/model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert two.what() == [("checkpoint-8/model.safetensors", "b", "values")]


def test_only_the_newest_checkpoint_counts(two: Two) -> None:
    two.save("checkpoint-9/m.safetensors", {"w": floats(1)}, {"w": floats(2)})
    two.save("checkpoint-10/m.safetensors", {"w": floats(3)})
    assert two.what() == []


def test_a_run_that_ends_with_another_checkpoint_differs(two: Two) -> None:
    two.save("checkpoint-9/m.safetensors", {"w": floats(1)})
    (two.b / "checkpoint-9").rename(two.b / "checkpoint-12")
    ((role, other, what),) = two.what()
    assert (role, other) == ("checkpoint-9/m.safetensors", "checkpoint-12/m.safetensors")
    assert what == "another is the newest"


def test_a_file_that_the_killed_run_lacks_differs_and_one_that_it_has_besides_does_not(two: Two) -> None:
    two.save("m.safetensors", {"w": floats(1)})
    save_file({"v": floats(1)}, two.b / "writing.safetensors")
    found = two.compare()
    assert found.differences == []
    assert "writing.safetensors" in found.skipped
    (two.b / "m.safetensors").unlink()
    assert two.what() == [("m.safetensors", "", "only in A")]


def test_a_file_that_only_the_killed_run_left_damaged_differs(two: Two) -> None:
    two.save("m.safetensors", {"w": floats(1, 2, 3)})
    whole = (two.b / "m.safetensors").read_bytes()
    (two.b / "m.safetensors").write_bytes(whole[:-1])
    assert [what for _, _, what in two.what()] == ["cannot be read in B"]
    # In both it says nothing about the resume.
    (two.a / "m.safetensors").write_bytes(whole[:-1])
    found = two.compare()
    assert (found.differences, list(found.skipped)) == ([], ["m.safetensors"])


def test_ckpt_files_are_compared(two: Two) -> None:
    for folder, value in ((two.a, 1.0), (two.b, 2.0)):
        folder.mkdir()
        parameters = {"w": np.array([value, 3.0], np.float32), "step": np.array(4, np.int64)}
        (folder / "net-1_20.ckpt").write_bytes(ckpt_writer.ckpt_bytes(parameters))
    assert two.what() == [("net-1_20.ckpt", "w", "values")]
    assert [name for _, name in two.compare().names] == ["step", "w"]


def test_without_torch_its_files_are_named_as_not_compared(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    two.save("checkpoint-3/model.safetensors", {"w": floats(1)})
    for folder in (two.a, two.b):
        (folder / "checkpoint-3/optimizer.pt").write_bytes(b"PK")
    found = two.compare()
    assert found.differences == []
    assert found.skipped == {"checkpoint-3/optimizer.pt": "torch, which reads it, is not installed here"}


def test_files_that_the_user_names_are_compared_byte_by_byte(two: Two) -> None:
    two.save("m.safetensors", {"w": floats(1)})
    for folder, text in ((two.a, "x" * 3_000_000 + "y"), (two.b, "x" * 3_000_000 + "z")):
        (folder / "samples.txt").write_text(text)
    assert two.compare().differences == []
    assert two.compare("samples.*").differences == [TensorDifference("samples.txt", "", "other")]
    (two.b / "samples.txt").write_text("x" * 3_000_000 + "y")
    assert two.compare("samples.*").differences == []
    (two.b / "samples.txt").unlink()
    assert two.compare("samples.*").differences == [TensorDifference("samples.txt", "", "only in A")]


def test_runs_of_ours_are_compared_by_their_newest_valid_checkpoints(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.train("a")
    place.train("b")
    place.train("c", rl_config__seed=8)
    a, b, c = (look_at(tmp_path / name) for name in "abc")
    same = compare_tensors(a, b)
    assert same.differences == []
    assert {role for role, _ in same.names} >= {"policy_model", "optimizer", "ref"}
    assert set(same.checkpoints.values()) == {("2_0", "2_0")}
    differing = compare_tensors(a, c).differences
    assert {group_of(item.role, item.name) for item in differing} >= {Group.WEIGHTS, Group.OPTIMIZER}
    # With its newest checkpoint damaged an older one counts, and that is another one.
    (tmp_path / "b" / "commits" / "2_0.json").write_text("{}")
    assert "another is the newest" in {
        item.what for item in compare_tensors(a, look_at(tmp_path / "b")).differences
    }
